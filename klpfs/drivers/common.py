"""What both drivers need: options, mount points, errors, and who waits for whom."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import trio

from klpfs.kernfs.vfs import Vfs

__all__ = [
    "FOREVER",
    "Interrupts",
    "MountError",
    "Options",
    "check_mountpoint",
    "clear_dead_mount",
    "errno_of",
    "mount_state",
    "passed_fd",
    "quick_threads",
    "signal_pending",
    "unmount",
]

log = logging.getLogger("klpfs.drivers")

T = TypeVar("T")

FOREVER = 10 * 365 * 86400.0
"""Seconds; the timeout of what is taken back by an explicit notice."""

UNKNOWN_PID_WAIT = 60.0
"""Seconds that a read may block for a caller whose pid is not visible, so that its signals cannot be seen."""


class MountError(OSError):
    """Mounting failed: errno, what is wrong, and where."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to mount.

    ``allow_other``: whether other users may look; None means when root mounts. ``default_permissions``: whether the
    kernel checks modes (for a passed descriptor: whether the mounter said so); otherwise Vfs must. ``proc``: a procfs
    in which the pids of the mount's callers are valid, another one than /proc when the mount was made in another PID
    namespace. ``fsname``: the source shown in /proc/mounts. ``extra``: further options for the library, as of ``-o``.
    """

    allow_other: bool | None = None
    default_permissions: bool = True
    proc: str = "/proc"
    owner: tuple[int, int] | None = None
    fsname: str = "klpfs"
    extra: tuple[str, ...] = ()

    def root_ids(self, mountpoint: str) -> tuple[int, int] | None:
        """Who stands for root; None if root does."""
        if self.owner is None and passed_fd(mountpoint) is None and os.geteuid() != 0:
            return os.geteuid(), os.getegid()
        return self.owner

    def apply(self, vfs: Vfs, mountpoint: str) -> None:
        """Tell *vfs* what follows from the options."""
        vfs.owner = self.root_ids(mountpoint)
        vfs.proc = self.proc
        vfs.check_permissions = vfs.check_permissions or not self.default_permissions

    def flags(self) -> set[str]:
        """The options for ``-o``."""
        opts = {f"fsname={self.fsname}", "subtype=klpfs", *self.extra}
        if self.allow_other or (self.allow_other is None and os.geteuid() == 0):
            opts.add("allow_other")
        if self.default_permissions:
            opts.add("default_permissions")
        return opts


def errno_of(exc: OSError) -> int:
    """The errno to answer for *exc*: its own if the protocol can carry it, else EIO."""
    number = exc.errno
    return number if isinstance(number, int) and 0 < number < 512 else errno.EIO


@contextlib.contextmanager
def quick_threads() -> Iterator[None]:
    """Let a driver's thread have the interpreter within 0.1 ms when the core is busy (5 ms by default)."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, 1e-4))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# -- mount points ------------------------------------------------------------------------------------------------------


def passed_fd(mountpoint: str) -> int | None:
    """The descriptor that ``/dev/fd/N`` names, or None for a directory."""
    prefix, _, number = mountpoint.rpartition("/")
    return int(number) if prefix == "/dev/fd" and number.isdecimal() else None


def mount_state(path: str, *, patience: float = 5.0) -> Literal["none", "other", "live", "dead"]:
    """What is at *path*: nothing mounted, something else, a klpfs mount that is served, or one whose server is gone.

    /proc/self/mounts tells what is mounted; between live and dead decides statfs(2), the one question that is never
    answered from the kernel's cache. A mount whose server does not answer within *patience* seconds counts as live.
    """
    path = os.path.abspath(path)
    kind = ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split(" ")
                if _unescape(fields[1]) == path:
                    kind = fields[2]
    except OSError:
        return "none"
    if not kind:
        return "none"
    if not kind.startswith("fuse"):
        return "other"
    answers: list[int | None] = []

    def ask() -> None:
        try:
            os.statvfs(path)
        except OSError as exc:
            answers.append(exc.errno)

    # A wait for a server that hangs is deaf to signals, so it must not be this thread that waits.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    # ENOTCONN: the descriptor was closed; ECONNABORTED: the connection was aborted before the first reply
    if answers and answers[0] in (errno.ENOTCONN, errno.ECONNABORTED):
        return "dead"
    return "live" if kind == "fuse.klpfs" else "other"


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount *path* with fusermount3, or umount where that is missing. Raises OSError with the tool's words.

    *lazy*: detach now, clean up when nobody uses it any more. Blocks while the tool runs; the server must be able to
    serve.
    """
    attempts = (
        ["fusermount3", "-u", *(["-z"] if lazy else []), path],
        ["fusermount", "-u", *(["-z"] if lazy else []), path],
        ["umount", *(["-l"] if lazy else []), path],
    )
    said = "no fusermount3, fusermount or umount found"
    for command in attempts:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return
        said = (done.stderr or done.stdout).strip() or said
        break
    raise OSError(errno.EBUSY if "busy" in said else errno.EINVAL, f"{path}: {said}")


def clear_dead_mount(path: str) -> bool:
    """Unmount *path* if it is a mount whose server is gone; whether it was. Raises OSError if that fails."""
    if mount_state(path) != "dead":
        return False
    unmount(path, lazy=True)
    return True


def check_mountpoint(mountpoint: str) -> None:
    """Raise :class:`MountError` with the reason if nothing can be mounted at *mountpoint*."""
    fd = passed_fd(mountpoint)
    if fd is not None:
        try:
            os.fstat(fd)
        except OSError as exc:
            raise MountError(exc.errno, f"{mountpoint}: {exc.strerror}") from None
        return
    if not os.path.exists("/dev/fuse"):
        raise MountError(errno.ENODEV, "/dev/fuse does not exist: the kernel's fuse module is not available here")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError(errno.EACCES, "/dev/fuse cannot be opened for reading and writing by this user")
    try:
        mode = os.stat(mountpoint).st_mode
        os.statvfs(mountpoint)  # a stat may be answered from the kernel's cache
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            raise MountError(
                exc.errno, f"{mountpoint}: a dead mount is in the way (its server is gone); unmount it first"
            ) from None
        raise MountError(exc.errno, f"{mountpoint}: {exc.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(errno.ENOTDIR, f"{mountpoint}: {os.strerror(errno.ENOTDIR)}")


# -- blocked readers ---------------------------------------------------------------------------------------------------


class _Blocked:
    __slots__ = ("pid", "scope", "since")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.scope = trio.CancelScope()
        self.since = time.monotonic()


def signal_pending(status: str) -> bool:
    """Whether *status*, the text of a /proc/<tid>/status, shows a signal that would interrupt the thread's sleep."""
    masks = dict.fromkeys(("SigPnd", "ShdPnd", "SigBlk"), 0)
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key in masks:
            masks[key] = int(value, 16)
    return bool((masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"])


class Interrupts:
    """Ends blocked reads whose callers have a signal pending, for a library that does not pass FUSE_INTERRUPT on.

    A caller whose request the server has read sleeps until the answer comes, even after SIGKILL. So while a read
    blocks, its caller's pending signals are looked up in *proc* ten times a second (in real time, whatever clock the
    emulated kernel runs on), and a pending one ends the read with EINTR. Two things differ from the kernel: a read is
    not restarted after a signal (SA_RESTART, SIGSTOP), and a caller that *proc* does not show is interrupted once a
    minute. *fd*: the /dev/fuse descriptor; when its connection has ended all blocked reads end with ENOTCONN.
    """

    PERIOD = 0.1

    def __init__(self, proc: str) -> None:
        self._proc = proc
        self._blocked: set[_Blocked] = set()
        self._some = trio.Event()
        self._limiter = trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self._some.wait()
            while self._blocked:
                for entry in await trio.to_thread.run_sync(self._look, list(self._blocked), limiter=self._limiter):
                    entry.scope.cancel()
            self._some = trio.Event()

    def _look(self, blocked: list[_Blocked]) -> list[_Blocked]:
        time.sleep(self.PERIOD)
        return [entry for entry in blocked if self._interrupted(entry)]

    def _interrupted(self, entry: _Blocked) -> bool:
        if entry.pid == 0:
            return time.monotonic() - entry.since > UNKNOWN_PID_WAIT
        try:
            with open(f"{self._proc}/{entry.pid}/status", encoding="ascii", errors="replace") as status:
                return signal_pending(status.read())
        except OSError:
            return True  # not there any more

    async def guard(self, pid: int, fn: Callable[..., Awaitable[T]], *args: object) -> T:
        """``await fn(*args)`` on behalf of *pid*. Raises OSError(EINTR) after a signal."""
        entry = _Blocked(pid)
        with entry.scope:
            self._blocked.add(entry)
            self._some.set()
            try:
                return await fn(*args)
            finally:
                self._blocked.discard(entry)
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))
