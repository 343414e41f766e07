"""Emulated memory that the daemon hands out: what the core gives to module code.

Model
    Shadow variables, buffers of seq files and attributes, kernel objects, ``struct module`` of modules that execute
    nothing. The area is mapped in the sandbox from the start. Objects are rounded to powers of two.

Locks
    Trio thread only.
"""

from __future__ import annotations

import errno

from klpfs.cpu.layout import AREAS, PERCPU_MODULES
from klpfs.cpu.space import Space

__all__ = ["HostHeap", "PercpuArea"]


class HostHeap:
    """An allocator on the host area of *space*."""

    def __init__(self, space: Space) -> None:
        self._space = space
        area = AREAS["host"]
        self._next, self._end = area.base, area.end
        self._free: dict[int, list[int]] = {}
        self._live: dict[int, int] = {}

    def alloc(self, size: int, data: bytes = b"") -> int:
        """Address of *size* zeroed bytes that begin with *data*, aligned to the next power of two (at most a page).

        Raises OSError(ENOMEM) when the area is used up.
        """
        room = 1 << max(size - 1, len(data) - 1, 15).bit_length()
        stack = self._free.get(room)
        if stack:
            addr = stack.pop()
        else:
            align = min(room, 4096)
            addr = -(-self._next // align) * align
            if addr + room > self._end:
                raise OSError(errno.ENOMEM, "the memory for objects of the core is used up")
            self._next = addr + room
        self._live[addr] = room
        self._space.write(addr, data.ljust(room, b"\0"))
        return addr

    def alloc_or_null(self, size: int) -> int:
        """As :meth:`alloc`, but 0 when there is no memory."""
        try:
            return self.alloc(size)
        except OSError:
            return 0

    def free(self, addr: int) -> None:
        """Give back what :meth:`alloc` gave. Raises KeyError for anything else."""
        self._free.setdefault(self._live.pop(addr), []).append(addr)

    def owns(self, addr: int) -> bool:
        """Whether an object begins at *addr*."""
        return addr in self._live


class PercpuArea:
    """Offsets in the per-CPU areas for the per-CPU variables of modules. First fit."""

    SIZE = 0x4000
    """Bytes that modules have together; what their code allocates comes behind."""

    def __init__(self) -> None:
        self._live: dict[int, int] = {}

    def alloc(self, size: int, align: int, name: str) -> tuple[int, int]:
        """``(offset, size)``. Raises OSError(ENOMEM)."""
        step, start = max(align, 8), PERCPU_MODULES
        for base, length in sorted(self._live.items()):
            if start + size <= base:
                break
            start = -(-(base + length) // step) * step
        if start + size > PERCPU_MODULES + self.SIZE:
            raise OSError(errno.ENOMEM, f"{name}: Could not allocate {size} bytes percpu data")
        self._live[start] = max(size, 1)
        return start, size

    def free(self, start: int) -> None:
        """Give back what :meth:`alloc` gave."""
        del self._live[start]
