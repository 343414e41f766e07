"""Blocked readers of a stream, and the signals that end their wait.

Model
    A FUSE request that the server has taken ends with the server's answer alone, even when its caller is killed. The
    driver watches whoever opened the file; but a descriptor may have been inherited, and then another thread reads. So
    while a read blocks, the threads of the world that read this file at this offset are looked up ten times a second,
    in real time, and a signal that is pending for one of them ends the read with EINTR.

Locks
    The look is taken in a worker thread, on plain values; all else on the trio thread.

Source
    fs/fuse/dev.c (``request_wait_answer``), fs/proc/fd.c (``seq_show``), fs/proc/array.c (``task_sig``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from klpfs.drivers.common import signal_pending

if TYPE_CHECKING:
    from klpfs.world.hostproc import HostProc

__all__ = ["Readers"]

T = TypeVar("T")

#: Seconds between two looks.
PERIOD: Final = 0.1


class _Blocked:
    """A read that blocks: inode and offset tell which threads it may be."""

    __slots__ = ("ino", "offset", "opener", "scope")

    def __init__(self, opener: int, ino: int, offset: int) -> None:
        self.opener = opener
        self.ino = ino
        self.offset = offset
        self.scope = trio.CancelScope()


class Readers:
    """The blocked reads of one world."""

    def __init__(self, proc: HostProc) -> None:
        self._proc = proc
        self._blocked: set[_Blocked] = set()
        self._some = trio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self._some.wait()
            while self._blocked:
                for entry in await trio.to_thread.run_sync(self._look, list(self._blocked)):
                    entry.scope.cancel()
            self._some = trio.Event()

    async def guard(self, opener: int, ino: int, offset: int, fn: Callable[[], Awaitable[T]]) -> T:
        """``await fn()``, a read of inode *ino* at *offset*. Raises OSError(EINTR) when its reader has a signal."""
        entry = _Blocked(opener, ino, offset)
        with entry.scope:
            self._blocked.add(entry)
            self._some.set()
            try:
                return await fn()
            finally:
                self._blocked.discard(entry)
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))

    def _look(self, blocked: list[_Blocked]) -> list[_Blocked]:
        """Those of *blocked* whose reader has a signal pending. Sleeps first."""
        time.sleep(PERIOD)
        orphans = [entry for entry in blocked if not self._reads(entry.opener, entry)]
        if not orphans:
            return []  # each is read by who opened it, whom the driver watches
        gone = []
        openers = {entry.opener for entry in blocked} - {entry.opener for entry in orphans}
        for tid in self._pending_threads():
            if tid not in openers:
                gone += [entry for entry in orphans if self._reads(tid, entry)]
        return gone

    def _pending_threads(self) -> list[int]:
        """The threads that have a signal to take."""
        found = []
        for pid in self._proc.pids():
            try:
                for tid in self._proc.threads(pid):
                    status = self._proc.read(f"{pid}/task/{tid}/status").decode("ascii", "replace")
                    if signal_pending(status):
                        found.append(tid)
            except OSError:
                continue
        return found

    def kill(self, tid: int, ino: int) -> None:
        """End *tid*, which opened inode *ino*, if it is in a system call on it; somebody else may have the file."""
        with contextlib.suppress(OSError):
            if int(self._file(tid).get(b"ino", b"0")) == ino:
                self._proc.kill(tid)

    def _reads(self, tid: int, entry: _Blocked) -> bool:
        """Whether *tid* waits in a system call whose first argument is a descriptor of the file, at that offset."""
        values = self._file(tid)
        return int(values.get(b"ino", b"0")) == entry.ino and int(values.get(b"pos", b"-1")) == entry.offset

    def _file(self, tid: int) -> dict[bytes, bytes]:
        """What fdinfo says of the descriptor that is the first argument of *tid*'s system call; nothing if none is."""
        try:
            fields = self._proc.syscall(str(tid)).split()
            if len(fields) < 2 or fields[0] == "-1":
                return {}
            info = self._proc.read(f"{tid}/fdinfo/{int(fields[1], 16)}")
        except (OSError, ValueError):
            return {}
        return dict(line.split(b":\t", 1) for line in info.splitlines() if b":\t" in line)
