"""A blocking client of the control socket, for the commands. It imports neither trio nor rich: start-up time counts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TypeVar

from klpfs.control import protocol
from klpfs.control.runtime import Entry, reachable
from klpfs.control.text import to_json

T = TypeVar("T")

#: Longest reply line that a client accepts, in bytes: a million tasks fit.
MAX_REPLY = 1 << 30


class ConnectionLostError(Exception):
    """The daemon could not be reached, or went away before it answered."""


class RequestError(Exception):
    """The daemon did not understand the request, or failed at it: not a refusal of the emulated kernel."""


class Client:
    """A connection to one daemon; a context manager.

    Refusals of the emulated kernel are raised as ``OSError(errno, message)``, others as :class:`RequestError`; a
    daemon that is not there, or ends meanwhile, as :class:`ConnectionLostError`.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with reachable(entry.socket) as path:
                self._sock.connect(path)
        except OSError as err:
            self._sock.close()
            raise ConnectionLostError(f"cannot reach the daemon at {entry.socket}: {err.strerror}") from None
        self._file = self._sock.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._sock.close()

    def _send(self, request: protocol.Request) -> None:
        try:
            self._sock.sendall(protocol.encode(request))
        except OSError as err:
            # what the daemon had to say before it hung up is worth more than the broken pipe
            if not isinstance(err, BrokenPipeError | ConnectionResetError):
                raise ConnectionLostError(f"the daemon does not take the request: {err.strerror}") from None

    def _receive(self, result_type: type[T]) -> protocol.Reply[T]:
        try:
            line = self._file.readline(MAX_REPLY)
        except OSError as err:
            raise ConnectionLostError(f"the daemon went away: {err.strerror}") from None
        if not line.endswith(b"\n"):
            raise ConnectionLostError("the daemon went away without an answer")
        try:
            reply = protocol.decode_reply(line, result_type)
        except protocol.ProtocolError as err:
            raise RequestError(err.message) from None
        if not reply.ok:
            raise _failure(reply.error)
        return reply

    def call(self, request: protocol.Request, result_type: type[T]) -> T:
        """Send a request and return its result, decoded as ``result_type``."""
        self._send(request)
        # a null result is legal only where the type allows for it, and msgspec has checked that
        return self._receive(result_type).result  # type: ignore[return-value]

    def stream(self, request: protocol.Request, result_type: type[T]) -> Iterator[T]:
        """Send a request and yield the results of its replies until the last one, or until the daemon ends."""
        self._send(request)
        while True:
            reply = self._receive(result_type)
            if reply.result is not None:
                yield reply.result
            if not reply.more:
                return


def _failure(error: protocol.ErrorInfo | None) -> Exception:
    """The exception for an error reply."""
    if error is None:
        return RequestError("the daemon failed without saying why")
    if error.kind == "kernel" and error.errno is not None:
        return OSError(error.errno, error.message)
    where = f" (at {error.path})" if error.path and error.path != "$" else ""
    return RequestError(f"{error.message}{where}")


def read_module(path: str) -> bytes:
    """Read a module's file with the caller's own permissions, unpacked if it is compressed, as kmod does.

    Raises OSError, with EFBIG above the socket's limit and EINVAL for a broken compression. EISDIR and EINVAL for what
    is not a regular file are finit_module(2)'s own (kernel/module/main.c and kernel_read_file).
    """
    import errno
    import stat

    from klpfs.elf.compression import is_compressed_module, unpack

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        data = file.read(protocol.MAX_MODULE + 1)
    if is_compressed_module(data):
        data = unpack(data, protocol.MAX_MODULE) or b""
    if len(data) > protocol.MAX_MODULE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data


def dump(obj: Any) -> bytes:
    """``obj`` (structs included) as one JSON document, without a newline."""
    return to_json(obj)
