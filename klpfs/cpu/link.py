"""Relocation of modules, in the shared memory.

Source
    arch/x86/kernel/module.c (``__write_relocate_add``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from klpfs.cpu.layout import U32, U64
from klpfs.cpu.space import Space

if TYPE_CHECKING:
    from klpfs.elf.reader import Rela

__all__ = ["RelocationError", "apply", "clear"]

_NONE, _64, _PC32, _PLT32, _32, _32S, _PC64 = 0, 1, 2, 4, 10, 11, 24
_SIZES = {_64: 8, _PC32: 4, _PLT32: 4, _32: 4, _32S: 4, _PC64: 8}


class RelocationError(OSError):
    """A relocation that cannot be applied: ENOEXEC, with the kernel's lines for the log."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(errno.ENOEXEC, lines[0])
        self.lines = lines


def _values(
    name: str, relas: Iterable[Rela], base: int, size: int, symbol: Callable[[int], int]
) -> Iterable[tuple[int, int, int, int]]:
    """``(address, value, width, type)`` of each relocation. Raises :class:`RelocationError`."""
    for rela in relas:
        if rela.type == _NONE:
            continue
        width = _SIZES.get(rela.type)
        if width is None:
            raise RelocationError([f"{name}: Unknown rela relocation: {rela.type}"])
        if rela.offset + width > size:
            raise RelocationError([f"{name}: relocation at {rela.offset:#x} outside of its section"])
        where = base + rela.offset
        value = (symbol(rela.symbol) + rela.addend) & U64
        fits = True
        if rela.type == _32:
            fits = value <= U32
        elif rela.type == _32S:
            fits = value < 1 << 31 or value >= (1 << 64) - (1 << 31)
        elif rela.type in (_PC32, _PLT32, _PC64):
            # cut to 32 bits without a check, as the kernel does
            value = (value - where) & U64
        if not fits:
            raise RelocationError(
                [
                    f"overflow in relocation type {rela.type} val {value:x}",
                    f"`{name}' likely not compiled with -mcmodel=kernel",
                ]
            )
        yield where, value & ((1 << 8 * width) - 1), width, rela.type


def apply(space: Space, name: str, relas: Iterable[Rela], base: int, size: int, symbol: Callable[[int], int]) -> None:
    """Relocate the section of *size* bytes at *base*; *symbol* gives the value of a symbol by its number.

    Raises :class:`RelocationError`, also where something is written already.
    """
    for where, value, width, kind in _values(name, relas, base, size, symbol):
        if space.load(where, width):
            raise RelocationError(
                [
                    "x86/modules: Invalid relocation target, existing value is nonzero for type "
                    f"{kind}, loc {where:016x}, val {value:x}"
                ]
            )
        space.store(where, value, width)


def clear(space: Space, name: str, relas: Iterable[Rela], base: int, size: int, symbol: Callable[[int], int]) -> None:
    """Undo :func:`apply`. Raises :class:`RelocationError` where something else is written."""
    for where, value, width, kind in _values(name, relas, base, size, symbol):
        if space.load(where, width) != value:
            raise RelocationError(
                [
                    "x86/modules: Invalid relocation target, existing value does not match expected value for type "
                    f"{kind}, loc {where:016x}, val {value:x}"
                ]
            )
        space.store(where, 0, width)
