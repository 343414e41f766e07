"""The sandbox's main loop.

Model
    Started by the daemon with two descriptors: the socket and the memory file. Imports everything, takes its limits,
    and then serves messages until the socket is closed. Between two messages it runs emulated threads, a slice at a
    time.

Locks
    None.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

import msgspec

from klpfs.cpu import proto

if TYPE_CHECKING:
    from klpfs.cpu.sandbox.machine import Machine

__all__ = ["main"]

_RECEIVE = 1 << 16
_FLUSH = 1 << 16


class _Link:
    """The socket: frames in, buffered frames out."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._frames = proto.FrameBuffer()
        self._out = bytearray()

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message for :meth:`flush`."""
        self._out += proto.encode(message)
        if len(self._out) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        if self._out:
            self._socket.sendall(self._out)
            self._out.clear()

    def receive(self, timeout: int | None) -> list[bytes] | None:
        """Frames that arrived, waiting at most *timeout* milliseconds (None: for ever); None at the end."""
        if timeout is not None and not self._poll.poll(timeout):
            return []
        data = self._socket.recv(_RECEIVE)
        return self._frames.feed(data) if data else None


def main(socket_fd: int, memory_fd: int) -> None:
    """Serve until the daemon hangs up, which it may do at any moment, before anything was served, too."""
    try:
        _run(socket_fd, memory_fd)
    except (BrokenPipeError, ConnectionResetError):
        pass


def _run(socket_fd: int, memory_fd: int) -> None:
    from klpfs.cpu.sandbox.confine import confine, limit_resources

    confinement = limit_resources()
    from klpfs.cpu.sandbox import (  # noqa: F401 - imported for the stubs that they declare, before the doors close
        stubs_core,
        stubs_data,
        stubs_lib,
        stubs_mem,
        stubs_print,
        stubs_probe,
        stubs_stat,
        stubs_sync,
        stubs_system,
        stubs_wait,
    )
    from klpfs.cpu.sandbox.machine import Machine
    from klpfs.cpu.space import Space

    link = _Link(socket_fd)
    space = Space(memory_fd)
    os.close(memory_fd)
    pending: list[bytes] = []
    while not pending:
        frames = link.receive(None)
        if frames is None:
            return
        pending = frames
    start = proto.decode_to_sandbox(pending.pop(0))
    if not isinstance(start, proto.Start):
        raise TypeError(f"expected Start, not {start!r}")
    machine = Machine(space, start, link.send)
    _warm_up()
    confinement += confine()
    link.send(proto.Ready(confinement, f"unicorn {machine.engine.version}"))
    link.flush()
    _serve(machine, link, pending)


def _warm_up() -> None:
    """Load what is imported at first use, while files can still be opened."""
    import ipaddress  # noqa: F401
    import linecache  # noqa: F401
    import traceback  # noqa: F401


def _serve(machine: Machine, link: _Link, pending: list[bytes]) -> None:
    spinning = False
    frames: list[bytes] | None = pending
    while frames is not None:
        for frame in frames:
            _handle(machine, proto.decode_to_sandbox(frame))
        if machine.runnable:
            spinning = machine.run_slice()
            machine.collect()
        link.flush()
        if machine.runnable:
            frames = link.receive(1 if spinning else 0)
        else:
            machine.collect()
            frames = link.receive(None)


def _handle(machine: Machine, message: proto.ToSandbox) -> None:
    match message:
        case proto.Call():
            machine.start_call(message)
        case proto.Answer():
            machine.answer(message)
        case proto.Wake():
            machine.timer_expired(message)
        case proto.Map():
            for addr, size, prot in message.regions:
                machine.map(addr, size, prot)
        case proto.Unmap():
            for addr, size in message.regions:
                machine.unmap(addr, size)
        case proto.Stubs():
            for addr, name, size in message.items:
                machine.define(addr, name, size)
        case proto.ModuleInfo():
            machine.add_module(message)
        case proto.ModuleGone():
            machine.remove_module(message.name)
        case proto.Flush():
            machine.engine.flush(message.addr, message.size)
        case proto.Patched():
            machine.set_patched(message)
        case proto.Kill():
            machine.kill(message)
        case proto.Tasks():
            machine.link_tasks(message.items)
        case proto.Nudge():
            machine.nudge(message)
        case proto.Forget():
            machine.forget_task(message.pid)
        case proto.Key():
            machine.set_key(message.addr, int(message.on))
        case proto.Start():
            raise TypeError("started twice")
