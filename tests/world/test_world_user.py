"""Worlds of an ordinary user, and worlds in odd surroundings: what lacks is worked around, or named."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import ordinary
import pytest
from world_support import PATIENCE, build, environment

USER = "klpfs-test-world"

LIB = """
exec 2>&1
until_() { for _ in $(seq 200); do eval "$1" && return; sleep .05; done; echo "TIMEOUT: $1"; }
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def user() -> Iterator[str]:
    """An account; one for each worker that runs tests."""
    with ordinary.ordinary_user(f"{USER}-{os.environ.get('PYTEST_XDIST_WORKER', '')}".rstrip("-")) as name:
        yield name


@pytest.fixture(params=["root", "user"])
def who(request: pytest.FixtureRequest, user: str) -> str | None:
    """As whom a world is made; None: root."""
    return user if request.param == "user" else None


@pytest.fixture
def run(tmp_path: Path, user: str) -> Run:
    """Run ``klpfs run OPTIONS -- bash -c SCRIPT`` in tmp_path/work as *who*, after root's commands *setup* in the mount
    namespace that it will run in."""
    work = tmp_path / "work"
    work.mkdir()

    def run(
        script: str, who: str | None, *setup: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        tmp_path.chmod(0o1777)
        for path in (work, *work.rglob("*")):
            shutil.chown(path, who or "root", who or "root")
        return subprocess.run(
            [*ordinary.prefix(tmp_path, who, *setup), *ordinary.KLPFS, "run", *options, "--", "bash", "-c", script],
            env={**environment(), **ordinary.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return run


LIFE = (
    LIB
    + """
id -u
insmod livepatch_cmdline.ko; until_ '[ "$(cat /sys/kernel/livepatch/livepatch_cmdline/transition)" = 0 ]'
cat /proc/cmdline; lsmod | tail -n 1 | awk '{print $1, $3}'; cat /proc/self/patch_state
insmod livepatch_cmdline.ko; rmmod livepatch_cmdline
echo 1 > /sys/kernel/livepatch/livepatch_cmdline/enabled
echo 0 > /sys/kernel/livepatch/livepatch_cmdline/enabled
until_ '[ ! -e /sys/kernel/livepatch/livepatch_cmdline ]'
until_ 'rmmod livepatch_cmdline 2>/dev/null'
echo marked > /dev/kmsg
dmesg --notime | grep -E "^(livepatch: |marked)"
dmesg -C; echo later > /dev/kmsg; dmesg --notime
sysctl -n kernel.ftrace_enabled; sysctl -qw kernel.ftrace_enabled=0; cat /proc/sys/kernel/ftrace_enabled
grep -c ' klp_enable_patch$' /proc/kallsyms; ps -e -o comm= | grep -cx kthreadd; uname -r
"""
)


def expected_life(release: str) -> list[str]:
    """What LIFE prints."""
    return [
        "0",
        "livepatch_cmdline: this has been live patched",
        "livepatch_cmdline 1",
        "-1",
        "insmod: ERROR: could not insert module livepatch_cmdline.ko: File exists",
        "rmmod: ERROR: Module livepatch_cmdline is in use",
        "bash: line 9: echo: write error: Invalid argument",
        "livepatch: enabling patch 'livepatch_cmdline'",
        "livepatch: 'livepatch_cmdline': starting patching transition",
        "livepatch: 'livepatch_cmdline': patching complete",
        "livepatch: 'livepatch_cmdline': starting unpatching transition",
        "livepatch: 'livepatch_cmdline': unpatching complete",
        "marked",
        "later",
        "1",
        "0",
        "1",
        "1",
        release,
    ]


def test_life_of_a_patch(run: Run, who: str | None, tmp_path: Path) -> None:
    build(tmp_path / "work", "cmdline")
    done = run(LIFE, who)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    out = done.stdout.splitlines()
    assert out == expected_life(out[-1]), done.stdout
    assert out[-1].startswith("6.12.")


#: A /dev as containers have it.
SMALL_DEV = (
    "mkdir /tmp/dev",
    "mount -t tmpfs -o mode=755 none /tmp/dev",
    *(f"cp -a /dev/{name} /tmp/dev" for name in ("null", "zero", "full", "random", "urandom", "tty", "fuse")),
    "ln -s /proc/self/fd /tmp/dev/fd",
    "ln -s pts/ptmx /tmp/dev/ptmx",
    "mkdir /tmp/dev/pts /tmp/dev/shm",
    "mount --move /tmp/dev /dev",
)
#: The capabilities that containers leave to root.
CONTAINER = (
    "+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,+sys_chroot,+mknod,"
    "+audit_write,+setfcap"
)
FEW_CAPABILITIES = f'set -- setpriv --bounding-set=-all,{CONTAINER} --inh-caps=-all "$@"'
EMPTY = "mount -t tmpfs -o mode=755 none"


@pytest.mark.parametrize(
    "setup",
    [
        SMALL_DEV,
        (f"{EMPTY} /sys",),
        (f"{EMPTY} /sys/kernel",),
        (f"{EMPTY} /usr/lib/modules || true",),
        ("mount -o remount,bind,ro /",),
        ("umask 077",),
        ("ulimit -n 64",),
        ("mkdir gone", "cd gone", "rmdir ../gone"),
        (FEW_CAPABILITIES,),
        ('set -- setpriv --no-new-privs "$@"',),
    ],
    ids=[
        "dev",
        "sys",
        "sys-kernel",
        "modules",
        "read-only",
        "umask",
        "descriptors",
        "cwd",
        "capabilities",
        "no-new-privs",
    ],
)
def test_odd_surroundings(run: Run, who: str | None, setup: tuple[str, ...], tmp_path: Path) -> None:
    build(tmp_path / "work", "cmdline")
    done = run(LIFE, who, *setup)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    out = done.stdout.splitlines()
    assert out == expected_life(out[-1]), done.stdout


def test_what_an_ordinary_user_lacks_is_named(run: Run, user: str) -> None:
    for setup, words in (
        (("touch /tmp/fuse", "chmod 600 /tmp/fuse", "mount --bind /tmp/fuse /dev/fuse"), ("/dev/fuse", "chmod 666")),
        (("mount --bind /dev/null /proc/meminfo",), ("/proc", "systempaths=unconfined")),
        (("umount -l /proc",), ("/proc", "not mounted")),
        (("ulimit -p 4",), ("(ulimit -u",)),
    ):
        done = run("true", user, *setup)
        assert (done.returncode, done.stdout) == (125, ""), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert all(word in done.stderr for word in words), done.stderr
