"""Devices that modules register: their nodes are in the world's /dev, and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cpu_support
import ordinary
import pytest
from world_support import PATIENCE, environment, release

from klpfs.world.mounts import DevDir

SOURCE = r"""
struct fops { void *owner; u32 flags, pad; void *llseek; long (*read)(void *, char *, size_t, long *);
    char more[256]; };
struct miscdevice { int minor; const char *name; const void *fops; char list[16]; void *parent, *this_device;
    const void *groups; const char *nodename; u16 mode; };
int misc_register(struct miscdevice *); void misc_deregister(struct miscdevice *);
long simple_read_from_buffer(void *, size_t, long *, const void *, size_t);
long get(void *f, char *buf, size_t size, long *pos) { return simple_read_from_buffer(buf, size, pos, "hello\n", 6); }
static const struct fops fops = { .read = get };
static struct miscdevice devices[] = {
    { 255, "klpfs_one", &fops, .mode = 0444 }, { 255, "klpfs_dir!klpfs_two", &fops }, { 255, "shm!klpfs_three", &fops },
    { 255, "null", &fops },
};
int init_module(void) { for (int i = 0; i < 4; i++) misc_register(devices + i); return 0; }
void cleanup_module(void) { for (int i = 0; i < 4; i++) misc_deregister(devices + i); }
"""

Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def user() -> Iterator[str]:
    name = f"klpfs-test-dev-{os.environ.get('PYTEST_XDIST_WORKER', '')}".rstrip("-")
    with ordinary.ordinary_user(name) as found:
        yield found


@pytest.fixture(params=["root", "user", "read-only"])
def run(request: pytest.FixtureRequest, tmp_path: Path, user: str) -> Run:
    """Run a bash script in a world of root's, of an ordinary user's, and where the root directory is read-only. There
    is a module devices.ko."""
    who = user if request.param == "user" else None
    (tmp_path / "work").mkdir()
    (tmp_path / "work/devices.ko").write_bytes(cpu_support.build("devices", SOURCE, release=release()))
    tmp_path.chmod(0o1777)
    for path in (tmp_path / "work", tmp_path / "work/devices.ko"):
        shutil.chown(path, who or "root", who or "root")
    setup = ["mount --bind / / && mount -o remount,bind,ro /"] if request.param == "read-only" else []

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *ordinary.prefix(tmp_path, who, *setup),
                *ordinary.KLPFS,
                "run",
                "--",
                "bash",
                "-c",
                f"exec 2>&1\n{script}",
            ],
            env={**environment(), **ordinary.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return run


def test_nodes_come_and_go_with_the_devices(run: Run) -> None:
    before = sorted(os.listdir("/dev")), sorted(os.listdir("/dev/shm"))
    script = r"""
    exec 2>&1; cd /tmp/work
    sort=$(ls /dev | wc -l); head -c 2 /dev/zero | od -An -tx1
    insmod devices.ko
    cat /dev/klpfs_one /dev/klpfs_dir/klpfs_two /dev/shm/klpfs_three
    readlink /dev/klpfs_one; stat -L -c %A /dev/klpfs_one
    ls -d /dev/klpfs*; expr $(ls /dev | wc -l) - $sort
    # all that was there is there, and the log
    head -c 2 /dev/zero | od -An -tx1; echo ok >/dev/null; [ -c /dev/null ]; echo $?
    ls /dev/pts >/dev/null; echo $?; echo yes >/dev/shm/klpfs-test-file; rm /dev/shm/klpfs-test-file; echo $?
    head -n 1 /dev/kmsg | grep -c 'Linux version'
    dmesg | sed -n 's/^[^]]*] klpfs: //p'
    rmmod devices
    ls /dev | wc -l | diff - <(echo $sort) && ls -d /dev/klpfs* /dev/shm/klpfs*
    insmod devices.ko; cat /dev/klpfs_one
    """
    done = run(script)
    assert done.stdout.splitlines() == [
        " 00 00",
        *["hello"] * 3,
        "/proc/.klpfs/dev/klpfs_one",
        "-r--r--r--",
        "/dev/klpfs_dir",
        "/dev/klpfs_one",
        "2",
        " 00 00",
        *["0"] * 3,
        "1",
        "/dev/klpfs_one is a link to a file here, without ioctl",
        "/dev/klpfs_dir/klpfs_two is a link to a file here, without ioctl",
        "/dev/shm/klpfs_three is a link to a file here, without ioctl",
        "/dev/null is /proc/.klpfs/dev/null (File exists)",
        "ls: cannot access '/dev/klpfs*': No such file or directory",
        "ls: cannot access '/dev/shm/klpfs*': No such file or directory",
        "hello",
    ], done
    assert (sorted(os.listdir("/dev")), sorted(os.listdir("/dev/shm"))) == before


@pytest.mark.parametrize("name", ["../klpfs", "a/../../klpfs", "", "a//b", "./a", ".."])
def test_a_name_does_not_lead_out_of_dev(name: str) -> None:
    assert DevDir(-1).handle(b"+" + name.encode()) == b"Invalid argument"
    assert DevDir(-1).handle(b"-" + name.encode()) == b""  # there is none
