"""Seccomp user notifications: receiving system calls, looking at their callers, answering.

Model
    A thread waits on the listener. What a handler in :attr:`Supervisor.fast` can answer without the core is answered
    there; anything else becomes a task of its own on the trio thread, so that callers do not wait for one another.
    Whoever handles a :class:`Call` answers it exactly once; an answer to a caller that has died goes nowhere.

Locks
    The listener is read by its thread alone; answers may come from any thread (the kernel serialises them).

Source
    seccomp_unotify(2), kernel/seccomp.c (``seccomp_notify_recv``, ``seccomp_notify_send``).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from klpfs.world import sysapi
from klpfs.world.bpf import ABIS, AUDIT_ARCH_X86_64, X32_BIT

__all__ = ["Call", "Supervisor"]

log = logging.getLogger("klpfs.world")

_NOTIF: Final = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESP: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_ADDFD: Final = struct.Struct("=QIIII")  # struct seccomp_notif_addfd
_RECV: Final = 0xC0502100
_SEND: Final = 0xC0182101
_ID_VALID: Final = 0x40082102
_ADD_FD: Final = 0x40182103
_SET_FLAGS: Final = 0x40082104
_FLAG_CONTINUE: Final = 1
_SYNC_WAKE_UP: Final = 1

_NAMES: Final = {(arch, number): name for arch, table in ABIS.items() for name, number in table.items()}


class Call:
    """One system call that waits for its answer. ``pid`` is the calling thread's, as the daemon's namespace has it."""

    __slots__ = ("_listener", "answered", "arch", "args", "id", "name", "pid")

    def __init__(self, listener: int, data: bytearray) -> None:
        ident, pid, _flags, number, arch, _ip, *args = _NOTIF.unpack(data)
        self._listener = listener
        self.id: int = ident
        self.pid: int = pid
        self.arch: int = arch
        if arch == AUDIT_ARCH_X86_64:
            number &= ~X32_BIT
        self.name = _NAMES.get((arch, number), "")
        self.args: list[int] = args
        self.answered = False

    def int_arg(self, index: int) -> int:
        """An argument of C type int."""
        value = self.args[index] & 0xFFFFFFFF
        return value - (1 << 32) if value & 0x80000000 else value

    def valid(self) -> bool:
        """Whether the caller still waits: what was read of it before belongs to it then."""
        try:
            fcntl.ioctl(self._listener, _ID_VALID, struct.pack("=Q", self.id))
        except OSError:
            return False
        return True

    def _send(self, value: int, error: int, flags: int) -> None:
        if self.answered:
            return
        self.answered = True
        try:
            fcntl.ioctl(self._listener, _SEND, _RESP.pack(self.id, value, -error, flags))
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.EBADF):  # the caller died; the world ended
                raise

    def answer(self, value: int = 0) -> None:
        """The call returns *value*."""
        self._send(value, 0, 0)

    def fail(self, error: int) -> None:
        """The call fails with errno *error*."""
        self._send(0, error, 0)

    def proceed(self) -> None:
        """Let the host's kernel execute the call."""
        self._send(0, 0, _FLAG_CONTINUE)

    def add_fd(self, fd: int, *, cloexec: bool = True) -> int:
        """Give the caller a duplicate of *fd*; its number there."""
        flags = os.O_CLOEXEC if cloexec else 0
        # a mutable buffer makes ioctl() return the call's result
        return int(fcntl.ioctl(self._listener, _ADD_FD, bytearray(_ADDFD.pack(self.id, 0, fd, 0, flags))))

    # -- the caller's memory and descriptors --------------------------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """Exactly *length* bytes of the caller's memory. Raises OSError(EFAULT)."""
        try:
            data = sysapi.read_memory(self.pid, address, length)
        except OSError:
            data = b""
        if len(data) < length or not self.valid():
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return data

    def read_string(self, address: int, limit: int) -> bytes:
        """A C string of the caller without its NUL, at most *limit* bytes of it. Raises OSError(EFAULT)."""
        out = b""
        while len(out) < limit:
            here = address + len(out)
            piece = min(limit - len(out), 4096 - here % 4096)  # what follows may not be mapped
            data, nul, _ = self.read(here, piece).partition(b"\0")
            out += data
            if nul:
                break
        return out

    def write(self, address: int, data: bytes) -> None:
        """Write into the caller's memory. Raises OSError(EFAULT)."""
        if not self.valid():
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        try:
            sysapi.write_memory(self.pid, address, data)
        except OSError:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from None

    def dup_fd(self, fd: int) -> int:
        """A duplicate of the caller's descriptor *fd*. Raises OSError(EBADF)."""
        try:
            pidfd = self._pidfd()
            try:
                dup = sysapi.pidfd_getfd(pidfd, fd)
            finally:
                os.close(pidfd)
        except OSError as err:
            if err.errno in (errno.ENOSYS, errno.EPERM):
                return self._reopen(fd)
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
        if not self.valid():
            os.close(dup)
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return dup

    def _pidfd(self) -> int:
        """A pidfd of the calling thread: it may have a table of descriptors of its own."""
        try:
            return sysapi.pidfd_open(self.pid, sysapi.PIDFD_THREAD)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
        with open(f"/proc/{self.pid}/status", "rb") as file:
            tgid = int(next(line for line in file if line.startswith(b"Tgid:")).split()[1])
        return sysapi.pidfd_open(tgid)

    def _reopen(self, fd: int) -> int:
        """Where descriptors cannot be duplicated (before Linux 5.6): the same file, opened again."""
        try:
            return os.open(f"/proc/{self.pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None


Fast = Callable[[Call], bool]
"""Answers a call in the supervisor's thread, or returns False to have it handled on the trio thread."""
Slow = Callable[[Call], Awaitable[None]]
"""Handles a call on the trio thread; an OSError that it raises is the answer."""


class Supervisor:
    """Receives the calls of one listener. ``fast`` and ``slow`` hold the handlers by name of the call."""

    def __init__(self, listener: int, nursery: trio.Nursery) -> None:
        self._listener = listener
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self.fast: dict[str, Fast] = {}
        self.slow: dict[str, Slow] = {}

    def start(self) -> None:
        """Begin to receive, in a thread that ends with the last process that has the filter."""
        try:
            # the two sides take turns, so each may as well be woken on the CPU of the other (Linux 6.6)
            fcntl.ioctl(self._listener, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError:
            pass
        threading.Thread(target=self._run, name="seccomp", daemon=True).start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        blank = bytes(_NOTIF.size)
        while True:
            if any(events & ~select.POLLIN and not events & select.POLLIN for _, events in poll.poll()):
                return
            data = bytearray(blank)
            try:
                fcntl.ioctl(self._listener, _RECV, data)
            except InterruptedError:
                continue
            except OSError as err:
                if err.errno == errno.ENOENT:
                    continue  # the caller died before we got to it
                log.error("seccomp listener: %s", err.strerror)
                return
            call = Call(self._listener, data)
            try:
                self._dispatch(call)
            except trio.RunFinishedError:
                return
            except OSError as err:
                call.fail(err.errno or errno.EIO)
            except Exception:
                log.exception("system call %s", call.name)
                call.fail(errno.EIO)

    def _dispatch(self, call: Call) -> None:
        fast = self.fast.get(call.name)
        if fast is not None and fast(call):
            return
        if call.name not in self.slow:
            call.proceed()
            return
        self._token.run_sync_soon(self._nursery.start_soon, self._handle, call)

    async def _handle(self, call: Call) -> None:
        try:
            await self.slow[call.name](call)
        except OSError as err:
            call.fail(err.errno or errno.EIO)
        except Exception:
            log.exception("system call %s", call.name)
            call.fail(errno.EIO)
