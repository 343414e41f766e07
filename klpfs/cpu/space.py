"""The emulated memory, shared between the daemon and the sandbox.

Model
    One memory file (``memfd``), mapped by both sides. Every address of the areas in :mod:`klpfs.cpu.layout` has a fixed
    place in it. The daemon lays out modules, reads parameters and keeps the clock by plain memory access; the sandbox
    executes on it. The file is sealed against shrinking, so that the sandbox cannot make the daemon's mapping fault.

Locks
    None. Both sides write words that the other reads; what needs an order goes through the socket.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from bisect import bisect_right

from klpfs.cpu.layout import AREAS, SPACE_SIZE, Area, Field

__all__ = ["BadAddress", "Space", "create_memory"]

_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4

_INT = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


class BadAddress(Exception):
    """An address outside the emulated memory. *addr* is the first bad byte; *write* says what was tried."""

    def __init__(self, addr: int, *, write: bool = False) -> None:
        self.addr = addr
        self.write = write
        super().__init__(f"bad address {addr:#x}")


def create_memory() -> int:
    """A sealed memory file of the right size; its descriptor. Raises OSError where memfd_create is not there."""
    fd = os.memfd_create("klpfs-cpu", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SPACE_SIZE)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Space:
    """A mapping of the emulated memory. Addresses are the emulated kernel's; integers are little-endian."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SPACE_SIZE)
        ordered: list[Area] = sorted(AREAS.values())
        self._areas = ordered
        self._bases = [area.base for area in ordered]

    def close(self) -> None:
        """Unmap."""
        self._map.close()

    def host_address(self) -> int:
        """Where the mapping begins in this process; the engine maps its pages from there."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def offset(self, addr: int, size: int, *, write: bool = False) -> int:
        """Offset in the file of *size* bytes at *addr*. Raises :class:`BadAddress` unless one area holds them."""
        i = bisect_right(self._bases, addr) - 1
        if i < 0:
            raise BadAddress(addr, write=write)
        area = self._areas[i]
        if addr >= area.end:
            raise BadAddress(addr, write=write)
        if addr + size > area.end:
            raise BadAddress(area.end, write=write)
        return area.offset + addr - area.base

    def read(self, addr: int, size: int) -> bytes:
        """*size* bytes at *addr*."""
        at = self.offset(addr, size)
        return self._map[at : at + size]

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Put *data* at *addr*."""
        at = self.offset(addr, len(data), write=True)
        self._map[at : at + len(data)] = data

    def fill(self, addr: int, size: int, byte: int = 0) -> None:
        """Set *size* bytes at *addr*."""
        self.write(addr, bytes([byte]) * size)

    def load(self, addr: int, size: int = 8) -> int:
        """The unsigned integer of *size* bytes at *addr*."""
        at = self.offset(addr, size)
        value: int = _INT[size].unpack_from(self._map, at)[0]
        return value

    def store(self, addr: int, value: int, size: int = 8) -> None:
        """Put an integer of *size* bytes at *addr*, cut to its width."""
        at = self.offset(addr, size, write=True)
        _INT[size].pack_into(self._map, at, value & ((1 << 8 * size) - 1))

    def get(self, base: int, field: Field) -> int:
        """Member *field* of the structure at *base*."""
        return self.load(base + field.offset, field.size)

    def put(self, base: int, field: Field, value: int) -> None:
        """Set member *field* of the structure at *base*."""
        self.store(base + field.offset, value, field.size)

    def cstring(self, addr: int, limit: int = 4096) -> bytes:
        """The NUL-terminated string at *addr*, cut after *limit* bytes."""
        at = self.offset(addr, 1)
        end = self._map.find(b"\0", at, at + limit)
        if end < 0:
            end = at + limit
        self.offset(addr, end - at)
        return self._map[at:end]
