"""Symbols of the kernel and of its modules, by name and by address.

Model
    The kernel's own symbols come from a :class:`SymbolTable` (a shipped table, a kernel image or a text file), in the
    order of kallsyms, which is what ``sympos`` counts. Modules bring theirs when they load.

Source
    kernel/kallsyms.c (``kallsyms_on_each_match_symbol``, ``kallsyms_lookup_size_offset``), kernel/module/kallsyms.c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

__all__ = ["KSYM_NAME_LEN", "DictTable", "Kallsyms", "Resolved", "SymInfo", "Symbol", "SymbolTable"]

KSYM_NAME_LEN = 512
"""Longest symbol name, the NUL included (include/linux/kallsyms.h)."""

PAGE_SIZE = 4096


@dataclass(slots=True)
class SymInfo:
    """A symbol of a module: *value* is its address once the module is laid out, *type* the letter that nm shows."""

    name: str
    value: int
    size: int
    type: str


class Symbol(NamedTuple):
    """A symbol of the kernel: address, size in bytes, type letter."""

    address: int
    size: int
    type: str


class SymbolLike(Protocol):
    """What a table gives: see :class:`Symbol`."""

    @property
    def address(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def type(self) -> str: ...


class Resolved(NamedTuple):
    """What an address lies in: symbol, module (None: vmlinux), offset in and size of the symbol in bytes."""

    name: str
    modname: str | None
    offset: int
    size: int

    def __str__(self) -> str:
        """As ``%pS`` prints it."""
        tail = f" [{self.modname}]" if self.modname else ""
        return f"{self.name}+{self.offset:#x}/{self.size:#x}{tail}"


class SymbolTable(Protocol):
    """The symbols of vmlinux."""

    def lookup(self, name: str) -> Sequence[SymbolLike]:
        """All symbols called *name*, in sympos order."""

    def addr_to_symbol(self, address: int) -> tuple[str, int, int] | None:
        """``(name, offset, size)`` of the symbol that *address* lies in."""

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        """``(crc, gpl_only)`` of an exported symbol; no CRC where none is known."""

    def has_ftrace(self, address: int) -> bool:
        """Whether the function at *address* has an ftrace location."""

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        """All symbols as ``(address, type, name)``, in the order of /proc/kallsyms."""


class DictTable:
    """A :class:`SymbolTable` of a few names; a name may be given several times. Addresses are made up, 64 bytes
    apart."""

    BASE = 0xFFFFFFFF81000000

    def __init__(self, names: Iterable[str], *, exports: Mapping[str, bool] | None = None, notrace: Iterable[str] = ()):
        self._by_name: dict[str, list[Symbol]] = {}
        self._addrs: list[int] = []
        self._names: list[str] = []
        self._exports = dict(exports or {})
        self._notrace = set(notrace)
        for i, name in enumerate(names):
            addr = self.BASE + 64 * i
            self._by_name.setdefault(name, []).append(Symbol(addr, 64, "T"))
            self._addrs.append(addr)
            self._names.append(name)

    def lookup(self, name: str) -> list[Symbol]:
        return list(self._by_name.get(name, ()))

    def addr_to_symbol(self, address: int) -> tuple[str, int, int] | None:
        i = bisect_right(self._addrs, address) - 1
        if i < 0 or address >= self._addrs[i] + 64:
            return None
        return self._names[i], address - self._addrs[i], 64

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        gpl = self._exports.get(name)
        return None if gpl is None else (None, gpl)

    def has_ftrace(self, address: int) -> bool:
        hit = self.addr_to_symbol(address)
        return hit is not None and hit[0] not in self._notrace

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        return iter([(address, "T", name) for address, name in zip(self._addrs, self._names, strict=True)])


def _is_mapping_symbol(name: str) -> bool:
    """``is_mapping_symbol``: labels of the assembler, which no look-up by address ever finds."""
    return name.startswith((".L", "L0")) or (name[:1] == "$" and name[1:2] in tuple("adtx") and name[2:3] in ("", "."))


class _ModuleSymbols:
    """The symbols of one module.

    A look-up by address takes what lies between a symbol and the next one for that symbol's, whatever size its file
    gives (``find_kallsyms_symbol``), up to the end of the module's text.
    """

    def __init__(self, symbols: list[SymInfo]) -> None:
        self.all = symbols
        self.by_name: dict[str, list[SymInfo]] = {}
        for sym in symbols:
            self.by_name.setdefault(sym.name, []).append(sym)
        named = [s for s in symbols if s.name and not _is_mapping_symbol(s.name)]
        text: dict[int, SymInfo] = {}
        for sym in named:
            if sym.type in "tTwW":
                text.setdefault(sym.value, sym)
        self.functions = [text[value] for value in sorted(text)]
        self.addrs = [s.value for s in self.functions]
        end = max((s.value + max(s.size, 1) for s in named if s.type in "tTwW"), default=0)
        end = -(-end // PAGE_SIZE) * PAGE_SIZE
        bounds = sorted({s.value for s in named})
        self.ends = []
        for value in self.addrs:
            i = bisect_right(bounds, value)
            self.ends.append(min(bounds[i], end) if i < len(bounds) else end)


class Kallsyms:
    """Name and address look-ups over vmlinux and all loaded modules."""

    def __init__(self, table: SymbolTable, *, check_versions: bool = True) -> None:
        self.table = table
        self.check_versions = check_versions
        """Whether the CRCs of *table* are those of the very kernel that modules are meant for."""
        self._modules: dict[str, _ModuleSymbols] = {}
        # modules by the address of their first function; no two overlap
        self._starts: list[int] = []
        self._names: list[str] = []

    @cached_property
    def _end(self) -> int:
        """Where vmlinux ends (``is_ksym_addr``): no symbol of it has anything to do with addresses from there on."""
        return max((s.address for s in self.table.lookup("_end")), default=1 << 64)

    def add_module(self, name: str, symbols: list[SymInfo]) -> None:
        """The symbols of a module are known from now on, in the order of its symbol table."""
        self.remove_module(name)
        self._modules[name] = added = _ModuleSymbols(symbols)
        if added.addrs:
            i = bisect_right(self._starts, added.addrs[0])
            self._starts.insert(i, added.addrs[0])
            self._names.insert(i, name)

    def remove_module(self, name: str) -> None:
        """Forget the symbols of a module."""
        if self._modules.pop(name, None) is not None and name in self._names:
            i = self._names.index(name)
            del self._starts[i], self._names[i]

    def on_each_match_symbol(self, name: str) -> list[int]:
        """Addresses of all vmlinux symbols called *name*, in sympos order."""
        return [s.address for s in self.table.lookup(name)]

    def module_on_each_symbol(self, modname: str, name: str) -> list[int]:
        """Addresses of the symbols called *name* in module *modname*, in symbol table order; empty if it is not
        loaded."""
        symbols = self._modules.get(modname)
        return [] if symbols is None else [s.value for s in symbols.by_name.get(name, ())]

    def lookup(self, addr: int) -> Resolved | None:
        """What *addr* lies in, or None (``kallsyms_lookup``)."""
        i = bisect_right(self._starts, addr) - 1
        if i >= 0:
            modname = self._names[i]
            symbols = self._modules[modname]
            j = bisect_right(symbols.addrs, addr) - 1
            if j >= 0 and addr < symbols.ends[j]:
                start = symbols.addrs[j]
                return Resolved(symbols.functions[j].name, modname, addr - start, symbols.ends[j] - start)
        if addr >= self._end:
            return None
        hit = self.table.addr_to_symbol(addr)
        return None if hit is None else Resolved(hit[0], None, hit[1], hit[2])

    def lookup_size_offset(self, addr: int) -> tuple[int, int] | None:
        """``(size, offset)`` of the symbol that *addr* lies in (``kallsyms_lookup_size_offset``)."""
        hit = self.lookup(addr)
        return None if hit is None else (hit.size, hit.offset)

    def symbols_of(self, modname: str) -> list[SymInfo]:
        """The symbols of a loaded module, in symbol table order."""
        symbols = self._modules.get(modname)
        return [] if symbols is None else list(symbols.all)
