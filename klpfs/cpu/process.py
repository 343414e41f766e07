"""The sandbox process, as the daemon holds it: start, frames in and out, end.

Model
    A fresh interpreter, not a fork: nothing of the daemon's memory is in it. It gets the socket, the memory file and
    nothing else. Frames are read by whoever waits for an answer, without a detour through the event loop if the answer
    comes within a millisecond, and by a pump task otherwise.

Locks
    Trio thread only.

Source
    posix_spawn(3), socketpair(2).
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from klpfs.cpu import proto

__all__ = ["SandboxProcess"]

log = logging.getLogger(__name__)

_CODE = "import sys; sys.path[:] = sys.argv[3:]; from klpfs.cpu.sandbox.main import main; main(3, 4)"
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class SandboxProcess:
    """One running sandbox. *dispatch* gets each message in order; *died* is told once when the process ends."""

    def __init__(
        self, memory_fd: int, dispatch: Callable[[proto.FromSandbox], None], died: Callable[[str], None]
    ) -> None:
        self._dispatch = dispatch
        self._died = died
        self.alive = True
        self._frames = proto.FrameBuffer()
        self._out = bytearray()
        self._writable = trio.Event()
        ours, theirs = socket.socketpair()
        self._socket = ours
        ours.setblocking(False)
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        # -S: site is not needed to import from the places that this interpreter knows already
        package = str(Path(__file__).resolve().parent.parent.parent)
        path = [package, *(entry for entry in sys.path if entry and entry != package and os.path.isdir(entry))]
        path += [entry for entry in sys.path if entry.endswith(".zip")]
        # copies with numbers above those wanted: dup2 onto itself would leave the close-on-exec flag set
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 5) for fd in (theirs.fileno(), memory_fd)]
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", _CODE, "3", "4", *path],
                {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, high[0], 3),
                    (os.POSIX_SPAWN_DUP2, high[1], 4),
                ],
                setsid=True,
            )
        finally:
            theirs.close()
            for fd in high:
                os.close(fd)

    # -- sending ----------------------------------------------------------------------------------------------------

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, now or as soon as there is room. Raises OSError(EPIPE) when the sandbox is gone."""
        if not self.alive:
            raise BrokenPipeError("the sandbox is gone")
        frame = proto.encode_to_sandbox(message)
        if not self._out:
            try:
                sent = self._socket.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._lost(f"cannot send: {error}")
                raise BrokenPipeError("the sandbox is gone") from error
            frame = frame[sent:]
        if frame:
            self._out += frame
            self._writable.set()

    def _flush(self) -> None:
        while self._out:
            try:
                del self._out[: self._socket.send(self._out)]
            except BlockingIOError:
                return
            except OSError as error:
                self._lost(f"cannot send: {error}")
                return

    async def run_writer(self) -> None:
        """Send what did not fit at once."""
        while self.alive:
            await self._writable.wait()
            self._writable = trio.Event()
            while self._out and self.alive:
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                except trio.ClosedResourceError:
                    return
                self._flush()

    # -- receiving --------------------------------------------------------------------------------------------------

    def drain(self, milliseconds: int) -> bool:
        """Handle what has arrived, waiting at most *milliseconds* for it; whether anything had."""
        if not self.alive:
            return False
        if self._out:
            self._flush()
        if not self._poll.poll(milliseconds):
            return False
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lost(f"cannot receive: {error}")
            return True
        if not data:
            self._lost("it ended")
            return True
        try:
            for frame in self._frames.feed(data):
                self._dispatch(proto.decode_from_sandbox(frame))
        except (msgspec.DecodeError, ValueError, TypeError, KeyError, IndexError) as error:
            self.kill()
            self._lost(f"it sent nonsense: {error}")
        return True

    async def run_pump(self) -> None:
        """Handle messages as they come, until the end."""
        while self.alive:
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except trio.ClosedResourceError:
                return
            self.drain(0)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _lost(self, why: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self.kill()
        status = self._reap()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        self._writable.set()
        self._died(f"{why}{status}")

    def _reap(self) -> str:
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return ""
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            return f" (signal {os.WTERMSIG(status)})"
        return f" (status {os.WEXITSTATUS(status)})" if os.WIFEXITED(status) and os.WEXITSTATUS(status) else ""

    def kill(self) -> None:
        """End the process at once."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """End it, on purpose: nobody is told."""
        if self.alive:
            self._died = lambda why: None
            self._lost("closed")
