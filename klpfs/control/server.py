"""The trio server of the control socket: connections, framing, limits.

A line that is too long, not JSON, or not a request is answered and, where the framing is lost, the connection closed;
nothing that a client sends, or fails to read, reaches past its own connection. There are no timeouts here: the daemon's
clock is the emulated one and may stand still. Instead, when too many connections are open, the one that has been idle
for the longest makes room.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from klpfs.control import protocol
from klpfs.control.runtime import reachable

log = logging.getLogger("klpfs.control")

#: Connections served at one time.
MAX_CONNECTIONS: Final = 128
#: Lines longer than this are decoded in a thread, so that a large module does not stop the emulator meanwhile; bytes.
_BIG: Final = 256 << 10
_CHUNK: Final = 256 << 10

#: Sends a further reply of the same request.
Emit = Callable[[object], Awaitable[None]]
#: Serves one request; the return value is the result of its last reply.
Handler = Callable[[protocol.AnyRequest, Emit], Awaitable[object]]


class _Connection:
    """One client. ``last`` orders connections by when they last sent something."""

    def __init__(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        self.stream = stream
        self.scope = scope
        self.busy = False
        self.last = 0
        self.buffer = bytearray()

    async def read_line(self) -> bytes | None:
        """The next line without its newline; None at the end of input. Raises ProtocolError when it is too long."""
        searched = 0
        while True:
            end = self.buffer.find(b"\n", searched)
            if end >= 0:
                line = bytes(self.buffer[:end])
                del self.buffer[: end + 1]
                return line
            searched = len(self.buffer)
            if searched > protocol.MAX_LINE:
                raise protocol.ProtocolError(f"request longer than {protocol.MAX_LINE} bytes")
            chunk = await self.stream.receive_some(_CHUNK)
            if not chunk:
                if self.buffer:
                    raise protocol.ProtocolError("request without a newline at the end of input")
                return None
            self.buffer += chunk


class ControlServer:
    """Serves ``handler`` on a listening socket. Construct with :func:`listen`; run :meth:`serve` in a nursery."""

    def __init__(self, sock: socket.socket, handler: Handler) -> None:
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._handler = handler
        self._connections: set[_Connection] = set()
        self._order = itertools.count(1)
        self._uids = {0, os.geteuid()}

    async def serve(self) -> None:
        """Accept and serve connections until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await self._listener.accept()
                except OSError as err:
                    if err.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                        raise
                    log.warning("control socket: %s", err.strerror)
                    self._make_room()
                    await trio.to_thread.run_sync(time.sleep, 0.1)  # real time: the emulated one may stand still
                    continue
                if len(self._connections) >= MAX_CONNECTIONS:
                    self._make_room()
                nursery.start_soon(self._connection, stream)

    def _make_room(self) -> None:
        idle = [conn for conn in self._connections if not conn.busy]
        if idle:
            min(idle, key=lambda conn: conn.last).scope.cancel()

    async def _connection(self, stream: trio.SocketStream) -> None:
        """Serve one client, whatever it does."""
        with trio.CancelScope() as scope:
            conn = _Connection(stream, scope)
            conn.last = next(self._order)
            self._connections.add(conn)
            try:
                if not self._allowed(stream):
                    await self._refuse(conn, None, protocol.ProtocolError("another user's mount"))
                    return
                await self._requests(conn)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # it hung up
            except Exception:
                log.exception("control connection")
            finally:
                self._connections.discard(conn)
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)

    def _allowed(self, stream: trio.SocketStream) -> bool:
        """The socket's mode keeps others out already; this holds when somebody changes the mode."""
        cred = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        assert isinstance(cred, bytes)
        uid: int = struct.unpack("3i", cred)[1]
        return uid in self._uids

    async def _requests(self, conn: _Connection) -> None:
        while True:
            try:
                line = await conn.read_line()
            except protocol.ProtocolError as err:
                await self._refuse(conn, None, err)
                return  # what follows cannot be told apart any more
            if line is None:
                return
            conn.last = next(self._order)
            if not line.strip():
                continue
            try:
                if len(line) > _BIG:
                    request = await trio.to_thread.run_sync(protocol.decode_request, line)
                else:
                    request = protocol.decode_request(line)
            except protocol.ProtocolError as err:
                await self._refuse(conn, protocol.request_id(line) if len(line) <= _BIG else None, err)
                continue
            del line
            conn.busy = True
            try:
                await self._one(conn, request)
            finally:
                conn.busy = False

    async def _refuse(self, conn: _Connection, ident: int | str | None, err: protocol.ProtocolError) -> None:
        info = protocol.ErrorInfo("request", err.message, path=err.path)
        await self._send(conn, protocol.Reply(ok=False, id=ident, error=info))

    async def _send(self, conn: _Connection, reply: protocol.Reply[object]) -> None:
        await conn.stream.send_all(protocol.encode(reply))

    async def _one(self, conn: _Connection, request: protocol.AnyRequest) -> None:
        """Serve one request. A refusal of the emulated kernel is an OSError with an errno."""

        async def emit(result: object) -> None:
            await self._send(conn, protocol.Reply(ok=True, id=request.id, result=result, more=True))

        reply: protocol.Reply[object]
        try:
            if isinstance(request, protocol.Dmesg) and request.follow:
                result = await self._until_hangup(conn, request, emit)
            else:
                result = await self._handler(request, emit)
            reply = protocol.Reply(ok=True, id=request.id, result=result)
        except protocol.ProtocolError as err:
            info = protocol.ErrorInfo("request", err.message, path=err.path)
            reply = protocol.Reply(ok=False, id=request.id, error=info)
        except OSError as err:
            code = err.errno or errno.EIO
            info = protocol.ErrorInfo("kernel", err.strerror or os.strerror(code), errno=code)
            reply = protocol.Reply(ok=False, id=request.id, error=info)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as err:
            log.exception("control request %s", type(request).__name__)
            info = protocol.ErrorInfo("internal", f"{type(err).__name__}: {err}")
            reply = protocol.Reply(ok=False, id=request.id, error=info)
        await self._send(conn, reply)

    async def _until_hangup(self, conn: _Connection, request: protocol.AnyRequest, emit: Emit) -> object:
        """Run an endless request, and stop it when the client hangs up: it may never have anything to send."""
        result: object = None
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                try:
                    while await conn.stream.receive_some(_CHUNK):
                        pass  # a client that follows has nothing more to say
                except trio.BrokenResourceError:
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                result = await self._handler(request, emit)
            except (OSError, protocol.ProtocolError, trio.BrokenResourceError) as err:
                failure = err  # out of the nursery first, which would wrap it in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result


def listen(path: str) -> socket.socket:
    """A listening Unix socket at ``path``, mode 0600 from its first moment. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind(2) gives the socket file the mode that fchmod(2) set on the socket before
        os.fchmod(sock.fileno(), 0o600)
        with reachable(path) as short:
            sock.bind(short)
        os.chmod(path, 0o600)
        sock.listen(MAX_CONNECTIONS)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
