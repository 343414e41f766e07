"""How a mount begins and ends, on both drivers: signals, unmounting from outside, crashes, passed descriptors."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from driver_support import TOY, Server, bash, python_as, refused, serving

from klpfs.drivers import DRIVERS, MountError, Options, get_driver
from klpfs.drivers.common import (
    check_mountpoint,
    clear_dead_mount,
    errno_of,
    mount_state,
    passed_fd,
    unmount,
)
from klpfs.kernfs import Kernfs
from klpfs.kernfs.vfs import Vfs


def exit_status(server: Server) -> int:
    return server.process.wait(20)


def test_ends_when_unmounted_from_outside(driver: str, tmp_path: Path) -> None:
    with serving(driver, tmp_path / "mnt") as toy:
        assert mount_state(str(toy.path)) == "live"
        unmount(str(toy.path))
        assert toy.line() == "ended"
        assert exit_status(toy) == 0, toy.log()
        assert mount_state(str(toy.path)) == "none"
        assert os.listdir(toy.path) == []
        assert toy.log() == ""


def test_ends_on_sigterm(driver: str, tmp_path: Path) -> None:
    with serving(driver, tmp_path / "mnt") as toy:
        toy.process.send_signal(signal.SIGTERM)
        assert exit_status(toy) == 0, toy.log()
        assert mount_state(str(toy.path)) == "none"
        assert toy.log() == ""


def test_ends_though_somebody_is_inside(driver: str, tmp_path: Path) -> None:
    """An open file, a working directory, a blocked reader, and a store that stalls: none holds the end up."""
    with serving(driver, tmp_path / "mnt") as toy:
        inside = os.open(toy.path / "attrs", os.O_PATH)
        fd = os.open(toy.path / "attrs/enabled", os.O_RDONLY)
        with pytest.raises(OSError, match="busy"):
            unmount(str(toy.path))
        assert mount_state(str(toy.path)) == "live"
        errors: list[int | None] = []

        def block(name: str, flags: int) -> None:
            file = os.open(toy.path / name, flags)
            try:
                if flags == os.O_RDONLY:
                    os.read(file, 10)
                else:
                    os.write(file, b"x")
            except OSError as exc:
                errors.append(exc.errno)
            finally:
                os.close(file)

        threads = [
            threading.Thread(target=block, args=args)
            for args in (("stream", os.O_RDONLY), ("attrs/stall", os.O_WRONLY))
        ]
        for thread in threads:
            thread.start()
        while not toy.call("stores"):
            time.sleep(0.01)
        toy.process.send_signal(signal.SIGTERM)
        assert exit_status(toy) == 0, toy.log()
        for thread in threads:
            thread.join(20)
        assert set(errors) <= {errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV}
        assert len(errors) == 2
        assert mount_state(str(toy.path)) == "none"
        with refused(errno.ENOTCONN, errno.ECONNABORTED):
            os.read(fd, 10)
        os.close(fd)
        os.close(inside)
        assert "Traceback" not in toy.log()


def test_a_killed_server_leaves_a_dead_mount_that_can_be_cleared(driver: str, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    with serving(driver, mnt) as toy:
        toy.process.kill()
        assert exit_status(toy) == -signal.SIGKILL
        with refused(errno.ENOTCONN):
            os.listdir(mnt)
        assert mount_state(str(mnt)) == "dead"
        with pytest.raises(MountError, match="dead mount is in the way") as caught:
            check_mountpoint(str(mnt))
        assert caught.value.errno == errno.ENOTCONN
        assert clear_dead_mount(str(mnt))
        assert mount_state(str(mnt)) == "none"
        assert not clear_dead_mount(str(mnt))
        assert os.listdir(mnt) == []
    with serving(driver, mnt) as toy:
        assert (mnt / "attrs/enabled").read_bytes() == b"1\n"


def abort_file(path: Path) -> Path:
    device = os.minor(os.stat(path).st_dev)
    return Path(f"/sys/fs/fuse/connections/{device}/abort")


def test_an_aborted_connection_ends_the_server_and_leaves_no_mount(driver: str, tmp_path: Path) -> None:
    with serving(driver, tmp_path / "mnt") as toy:
        abort = abort_file(toy.path)
        if abort.exists():
            abort.write_text("1")
        else:
            # no fusectl is mounted: forcing the unmount aborts the connection just as well
            subprocess.run(["umount", "-f", str(toy.path)], check=False, capture_output=True)
        assert exit_status(toy) == 0, toy.log()
        assert mount_state(str(toy.path)) == "none"


def test_subtree(driver: str, tmp_path: Path) -> None:
    with serving(driver, tmp_path / "mnt", subtree="attrs/vmlinux") as toy:
        assert sorted(os.listdir(toy.path)) == ["func,1", "patched"]
        assert (toy.path / "patched").read_bytes() == b"1\n"
        assert os.stat(toy.path).st_nlink == 3
        assert bash(f"ls -a {toy.path} | xargs")[1] == ". .. func,1 patched\n"
    with serving(driver, tmp_path / "mnt", subtree="storm") as toy:
        toy.call("mkdir", "storm/p")
        inside = os.open(toy.path / "p", os.O_RDONLY)
        assert (toy.path / "p/enabled").read_bytes() == b"1\n"
        toy.call("rm", "storm/p")
        assert os.listdir(toy.path) == []
        assert os.listdir(inside) == []
        assert stat.S_ISDIR(os.fstat(inside).st_mode)
        assert not (toy.path / "p").exists()
        toy.call("rm", "attrs")  # elsewhere
        os.close(inside)


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root")
def test_a_passed_descriptor(driver: str, tmp_path: Path) -> None:
    """The mount is made by somebody else, in another mount namespace for instance; the server gets /dev/fuse only."""
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    assert libc.mount(b"klpfs", os.fsencode(mnt), b"fuse.klpfs", 0x6, data.encode()) == 0, os.strerror(
        ctypes.get_errno()
    )
    with serving(driver, mnt, at=f"/dev/fd/{fd}", pass_fds=[fd]) as toy:
        assert (mnt / "attrs/enabled").read_bytes() == b"1\n"
        toy.call("mkdir", "storm/p")
        assert (mnt / "storm/p/enabled").read_bytes() == b"1\n"
        toy.call("rm", "storm/p")
        assert not (mnt / "storm/p").exists()
        assert toy.stop() == 0, toy.log()
        assert mount_state(str(mnt)) == "dead"  # unmounting is up to who mounted
        assert clear_dead_mount(str(mnt))


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that others can reach; pytest closes its own at the start of every session, of others, too."""
    with tempfile.TemporaryDirectory(prefix="klpfs-test-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_is_the_root_of_his_mount(driver: str, open_dir: Path) -> None:
    mnt = open_dir / "mnt"
    mnt.mkdir()
    os.chown(mnt, 65534, 65534)
    code = """
import os, stat, sys
rw, wo, ro = os.O_RDWR, os.O_WRONLY, os.O_RDONLY
for name, flags in (("enabled", rw), ("force", wo), ("force", ro), ("transition", wo)):
    try:
        fd = os.open(sys.argv[1] + "/attrs/" + name, flags)
        if flags != os.O_RDONLY:
            os.write(fd, b"0")
        print("ok", end=" ")
    except OSError as exc:
        print(exc.strerror, end=" ")
attr = sys.argv[1] + "/attrs/enabled"
os.chmod(attr, 0o600)
os.chown(attr, 65534, 65534)
st = os.stat(attr)
print(oct(st.st_mode), st.st_uid, st.st_gid, open(sys.argv[1] + "/seq/private").read(), end="")
"""
    with serving(driver, mnt, user=65534) as toy:
        denied = "Permission denied"
        assert python_as(65534, code, str(mnt)) == f"ok ok {denied} {denied} 0o100600 65534 65534 0\n"
        assert toy.call("stores") == [["enabled", "0"], ["enabled", "0"]]
        with refused(errno.EACCES):
            os.listdir(mnt)  # not even root, without allow_other
        assert toy.stop() == 0
        assert os.listdir(mnt) == []


def test_cycles_leave_nothing_behind(driver: str, tmp_path: Path) -> None:
    """In one process, one mount after the other; threads and descriptors stay as many as they were."""
    code = f"""
import gc, os, sys, threading, trio
sys.path.insert(0, {str(TOY.parent)!r})
from driver_toy import Toy
from klpfs.drivers import get_driver
from klpfs.kernfs.vfs import Vfs
def held():
    gc.collect()  # what only waits for the collector, such as the pidfd of a finished umount, is no leak
    return len(os.listdir("/proc/self/fd")), threading.active_count()
async def cycle(unmount):
    toy = Toy()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: get_driver({driver!r})(
            Vfs(toy.fs), sys.argv[1], task_status=task_status))
        text = await trio.to_thread.run_sync(lambda: open(sys.argv[1] + "/attrs/enabled").read())
        assert text == "1\\n"
        assert len(toy.fs.listeners) == 1
        if unmount:
            await trio.run_process(["umount", sys.argv[1]])
        else:
            nursery.cancel_scope.cancel()
    assert toy.fs.listeners == []
    assert os.listdir(sys.argv[1]) == []
async def main():
    for i in range(6):
        await cycle(i % 2)
        if i == 1:
            before = held()
    after = held()
    print(before, after, "ok" if after[0] == before[0] and after[1] <= before[1] + 1 else "leak")
trio.run(main)
"""
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(mnt)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("ok\n"), done
        assert done.stderr == ""
    finally:
        if mount_state(str(mnt)) != "none":
            unmount(str(mnt), lazy=True)


@pytest.mark.parametrize(
    ("path", "number", "words"),
    [
        ("nosuch", errno.ENOENT, "No such file"),
        ("file", errno.ENOTDIR, "Not a directory"),
        ("/dev/fd/987", errno.EBADF, "Bad file descriptor"),
    ],
)
def test_bad_mount_points(driver: str, tmp_path: Path, path: str, number: int, words: str) -> None:
    (tmp_path / "file").touch()

    async def main() -> None:
        await get_driver(driver)(Vfs(Kernfs()), str(tmp_path / path))

    with pytest.raises(MountError, match=words) as caught:
        trio.run(main)
    assert caught.value.errno == number
    assert path in str(caught.value)


def test_bad_options_are_refused(driver: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        await get_driver(driver)(Vfs(Kernfs()), str(tmp_path), options=Options(extra=("nosuchoption",)))

    with pytest.raises(MountError) as caught:
        trio.run(main)
    assert str(tmp_path) in str(caught.value)
    assert mount_state(str(tmp_path)) == "none"


def test_one_mount_per_process(driver: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()

    async def main() -> None:
        serve = get_driver(driver)
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[None]) -> None:
                await serve(Vfs(Kernfs()), str(first), task_status=task_status)

            await nursery.start(run)
            with pytest.raises(MountError, match="one mount per process"):
                await serve(Vfs(Kernfs()), str(second))
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert mount_state(str(first)) == "none"


def test_names_of_drivers() -> None:
    assert DRIVERS == ("pyfuse3", "fusepy")
    with pytest.raises(ValueError, match="unknown driver 'nfs', known are pyfuse3, fusepy"):
        get_driver("nfs")


def test_mount_points_are_understood(tmp_path: Path) -> None:
    assert passed_fd("/dev/fd/17") == 17
    assert passed_fd("/dev/fd/x") is None
    assert passed_fd("/mnt/fd/17") is None
    assert mount_state(str(tmp_path)) == "none"
    assert mount_state("/proc") == "other"
    with pytest.raises(OSError, match=str(tmp_path)):
        unmount(str(tmp_path))
    assert [errno_of(OSError(n, "x")) for n in (errno.EBUSY, 0, 512, -1)] == [errno.EBUSY, *[errno.EIO] * 3]
    assert errno_of(OSError("no number")) == errno.EIO


def test_a_mount_point_with_odd_characters(driver: str, tmp_path: Path) -> None:
    with serving(driver, tmp_path / "a b\tc\\d\u00e4") as toy:
        assert mount_state(str(toy.path)) == "live"
        assert (toy.path / "attrs/enabled").read_bytes() == b"1\n"
        assert toy.stop() == 0
        assert mount_state(str(toy.path)) == "none"
