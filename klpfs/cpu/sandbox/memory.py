"""The sandbox's view of the emulated memory: what is mapped, and the kernel's heap.

Model
    :class:`Memory` knows the protection of every page and refuses what the engine would refuse, so that a stub that is
    given a bad pointer faults as the kernel's own code would. :class:`Heap` hands out objects by size class, last freed
    first, as SLUB does; contents of freed objects stay until they are used again.

Locks
    None.

Source
    mm/slub.c, mm/slab_common.c (``kmalloc_info``, ``kmalloc_size_index``), mm/util.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from klpfs.cpu.layout import AREAS, PAGE_SIZE, PROT_READ, PROT_WRITE, U64, Field
from klpfs.cpu.space import Space

__all__ = ["Heap", "Memory", "PageFault"]

_INT = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


class PageFault(Exception):
    """An access that the page tables forbid. *addr* is the first bad byte."""

    def __init__(self, addr: int, *, write: bool) -> None:
        self.addr = addr & U64
        self.write = write
        super().__init__(f"{'write' if write else 'read'} at {self.addr:#x}")


class Memory:
    """Checked access to mapped pages. Addresses wrap at 64 bits; integers are little-endian and unsigned."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._prot: dict[int, int] = {}

    def map(self, addr: int, size: int, prot: int) -> None:
        """Pages of *size* bytes at *addr* exist from now on."""
        for page in range(addr // PAGE_SIZE, (addr + size) // PAGE_SIZE):
            self._prot[page] = prot

    def unmap(self, addr: int, size: int) -> None:
        """They do not any more."""
        for page in range(addr // PAGE_SIZE, (addr + size) // PAGE_SIZE):
            self._prot.pop(page, None)

    def prot(self, addr: int) -> int:
        """Protection of the page that *addr* lies in; 0 if there is none."""
        return self._prot.get((addr & U64) // PAGE_SIZE, 0)

    def check(self, addr: int, size: int, *, write: bool = False) -> int:
        """Raise :class:`PageFault` unless *size* bytes at *addr* may be accessed; *addr*, wrapped."""
        addr &= U64
        need = PROT_WRITE if write else PROT_READ
        page = addr // PAGE_SIZE
        for number in range(page, (addr + max(size, 1) - 1) // PAGE_SIZE + 1):
            if not self._prot.get(number, 0) & need:
                raise PageFault(addr if number == page else number * PAGE_SIZE, write=write)
        return addr

    def read(self, addr: int, size: int) -> bytes:
        """*size* bytes at *addr*."""
        return self.space.read(self.check(addr, size), size) if size else b""

    def write(self, addr: int, data: bytes | bytearray) -> None:
        """Put *data* at *addr*."""
        if data:
            self.space.write(self.check(addr, len(data), write=True), data)

    def load(self, addr: int, size: int = 8) -> int:
        """The integer of *size* bytes at *addr*."""
        return self.space.load(self.check(addr, size), size)

    def store(self, addr: int, value: int, size: int = 8) -> None:
        """Put an integer of *size* bytes at *addr*, cut to its width."""
        self.space.store(self.check(addr, size, write=True), value, size)

    def get(self, base: int, field: Field) -> int:
        """Member *field* of the structure at *base*."""
        return self.load(base + field.offset, field.size)

    def put(self, base: int, field: Field, value: int) -> None:
        """Set member *field* of the structure at *base*."""
        self.store(base + field.offset, value, field.size)

    def cstring(self, addr: int, limit: int = 1 << 20) -> bytes:
        """The NUL-terminated string at *addr*, cut after *limit* bytes; faults where the memory ends before it does."""
        out = bytearray()
        while len(out) < limit:
            room = min(PAGE_SIZE - (addr & (PAGE_SIZE - 1)), limit - len(out))
            chunk = self.read(addr, room)
            end = chunk.find(b"\0")
            if end >= 0:
                return bytes(out + chunk[:end])
            out += chunk
            addr += room
        return bytes(out)


_CLASSES = (8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
_CHUNK = 256 << 10


@dataclass(slots=True)
class _Object:
    size: int
    room: int
    owner: str


@dataclass
class Heap:
    """``kmalloc``. *grow* maps a new stretch of the heap area; *limit* is the most that one owner may hold."""

    memory: Memory
    grow: Callable[[int, int], None]
    limit: int
    used: dict[str, int] = field(default_factory=dict)
    _live: dict[int, _Object] = field(default_factory=dict)
    _free: dict[int, list[int]] = field(default_factory=dict)
    _next: int = AREAS["heap"].base
    _mapped: int = AREAS["heap"].base

    def _room(self, size: int) -> int:
        for room in _CLASSES:
            if size <= room:
                return room
        # large objects are whole pages, in powers of two as the page allocator gives them
        return 1 << max(size - 1, PAGE_SIZE).bit_length()

    def alloc(self, size: int, owner: str, *, zero: bool = False) -> int:
        """Address of *size* bytes, aligned to their size class; 0 when memory or the owner's budget is used up.

        A size of 0 gives ``ZERO_SIZE_PTR``.
        """
        if size == 0:
            return 16
        if size > AREAS["heap"].size:
            return 0
        room = self._room(size)
        # without an owner: the kernel's own, which half of the area is kept for
        if self.used.get(owner, 0) + room > (self.limit if owner else AREAS["heap"].size // 2):
            return 0
        stack = self._free.get(room)
        if stack:
            addr = stack.pop()
        else:
            # naturally aligned for powers of two, to the largest power of two that divides it otherwise
            align = min(room & -room, PAGE_SIZE)
            addr = -(-self._next // align) * align
            if addr + room > AREAS["heap"].end:
                return 0
            self._next = addr + room
            while self._mapped < self._next:
                chunk = min(_CHUNK, AREAS["heap"].end - self._mapped)
                self.grow(self._mapped, chunk)
                self._mapped += chunk
        self._live[addr] = _Object(size, room, owner)
        self.used[owner] = self.used.get(owner, 0) + room
        if zero:
            self.memory.write(addr, bytes(room))
        return addr

    def free(self, addr: int) -> bool:
        """Give an object back; False if *addr* is none."""
        obj = self._live.pop(addr, None)
        if obj is None:
            return False
        self.used[obj.owner] = self.used.get(obj.owner, 0) - obj.room
        self._free.setdefault(obj.room, []).append(addr)
        return True

    def size(self, addr: int) -> int:
        """Usable bytes of the object at *addr* (``ksize``); 0 if there is none."""
        obj = self._live.get(addr)
        return obj.room if obj else 0

    def requested(self, addr: int) -> int:
        """Bytes that were asked for; 0 if there is no object at *addr*."""
        obj = self._live.get(addr)
        return obj.size if obj else 0

    def disown(self, owner: str) -> None:
        """A module is gone. What it did not free leaks, as in the kernel, and counts against nobody."""
        self.used[""] = self.used.get("", 0) + self.used.pop(owner, 0)
        for obj in self._live.values():
            if obj.owner == owner:
                obj.owner = ""
