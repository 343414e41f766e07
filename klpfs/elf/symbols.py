"""Lookup of the target kernel's symbols: addresses, sizes, ``sympos``, exports, ftrace call sites.

Three sources, one interface (:class:`SymbolTable`): a kernel image, a text file (System.map, /proc/kallsyms), and the
table that klpfs ships for a kernel. The shipped table answers a lookup without being read as a whole: names are sorted
and compressed in blocks, an index tells the block, and what belongs to a name is fetched from chunks in address order.

File format, all little-endian: ``KLPSYM1\\n``, the size of the header (u32), the header (JSON: release, number of
symbols, parts as [offset, size] counted from the end of the header, first name and part of each block, base and part of
each chunk), then the parts:

* blocks of BLOCK names, zlib, front-coded: length of the prefix shared with the name before (u8), rest, NUL;
* rank: for each name, in sorted order, its number in address order: low 16 bits (u16 each), then the rest (zlib, u8);
* chunks of CHUNK symbols in address order, zlib: differences of the addresses (u32), types (u8), flags (u8);
* exports, zlib: numbers in address order (u32), CRCs (u32), 1 for GPL only (u8).

Addresses count from ``_text``; those of absolute symbols (type A) are as they are. Symbols ``__pfx_X`` (the padding of
16 bytes before a function X, of the same type) are left out and made from a flag of X.

Locks: none; tables are filled lazily, and a lookup in another thread at worst decodes a block twice.
"""

from __future__ import annotations

import bisect
import errno
import json
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from klpfs.elf.vmlinux import KernelExport, KernelImage, KernelSymbol

#: Address of _text where nothing else is known: that of an x86-64 kernel without KASLR.
TEXT_BASE = 0xFFFFFFFF81000000
MAGIC = b"KLPSYM1\n"
BLOCK = 1024
CHUNK = 2048
DATA_DIR = Path(__file__).resolve().parent.parent / "kernel" / "data"

_HAS_PREFIX, _HAS_FTRACE = 1, 2
_PREFIX = "__pfx_"
_PREFIX_SIZE = 16
#: Symbols on either side of an address that a look-up decodes.
_NEAR = 16
_MASK32 = (1 << 32) - 1


class SymbolEntry(NamedTuple):
    """One symbol of a name: address, size in bytes (up to the next symbol, as kallsyms tells it), nm's letter."""

    address: int
    size: int
    type: str


class SymbolTable(Protocol):
    """What the kernel knows of its own symbols."""

    release: str

    def lookup(self, name: str) -> list[SymbolEntry]:
        """All symbols of a name in the order of their addresses: number N is ``sympos`` N + 1."""

    def addr_to_symbol(self, address: int) -> tuple[str, int, int] | None:
        """Name, offset and size of the symbol that an address lies in, None when it lies in none."""

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        """CRC (None: unknown) and whether GPL only, or None when the name is not exported."""

    def export_address(self, name: str) -> int | None:
        """Address of an exported symbol."""

    def has_ftrace(self, address: int) -> bool:
        """Whether the function that starts at an address can be traced, and so patched."""

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        """Address, type and name of all symbols in kallsyms' order."""


class ShippedTable:
    """The table in a file of klpfs; see the module's docstring for its format."""

    shipped = True

    def __init__(self, path: Path | str) -> None:
        """Open a table. Raises OSError(ENOEXEC) when it is none."""
        self.path = str(path)
        with open(path, "rb") as file:
            self._data = file.read()
        if self._data[: len(MAGIC)] != MAGIC:
            raise OSError(errno.ENOEXEC, f"{path}: no symbol table of klpfs")
        (size,) = struct.unpack_from("<I", self._data, len(MAGIC))
        start = len(MAGIC) + 4
        try:
            header = json.loads(self._data[start : start + size])
            self.release: str = header["release"]
            self.count: int = header["count"]
            self.text_base: int = header["text"]
            self._firsts: list[str] = header["firsts"]
            self._blocks: list[list[int]] = header["blocks"]
            self._bases: list[int] = header["bases"]
            self._chunks: list[list[int]] = header["chunks"]
            self._low, self._high, self._exports_part = header["low"], header["high"], header["exports"]
        except (ValueError, KeyError) as exc:
            raise OSError(errno.ENOEXEC, f"{path}: malformed header of the symbol table: {exc}") from exc
        self._start = start + size
        self._block = lru_cache(maxsize=16)(self._load_block)
        self._chunk = lru_cache(maxsize=64)(self._load_chunk)

    def _part(self, part: list[int]) -> bytes:
        return self._data[self._start + part[0] : self._start + part[0] + part[1]]

    def _load_block(self, number: int) -> list[str]:
        """The names of a block."""
        out = []
        before = b""
        for entry in _entries(zlib.decompress(self._part(self._blocks[number]))):
            before = before[: entry[0]] + entry[1:]
            out.append(before.decode("latin-1"))
        return out

    def _load_chunk(self, number: int) -> tuple[list[int], bytes, bytes]:
        """Addresses, types and flags of CHUNK symbols."""
        raw = zlib.decompress(self._part(self._chunks[number]))
        count = len(raw) // 6
        value = self._bases[number]
        types = raw[4 * count : 5 * count]
        addresses = []
        for (delta,), kind in zip(struct.iter_unpack("<I", raw[: 4 * count]), types, strict=True):
            value = value + delta & _MASK32
            addresses.append(value if kind == 0x41 else value + self.text_base)
        return addresses, types, raw[5 * count :]

    @cached_property
    def _rank_high(self) -> bytes:
        return zlib.decompress(self._part(self._high))

    def _rank(self, position: int) -> int:
        """Number in address order of a name's position in sorted order."""
        (low,) = struct.unpack_from("<H", self._data, self._start + self._low[0] + 2 * position)
        return int(low) | self._rank_high[position] << 16

    def _ranks(self, name: str) -> list[int]:
        """Numbers in address order of all symbols of a name, ascending."""
        number = max(bisect.bisect_left(self._firsts, name) - 1, 0)
        out = []
        while number < len(self._blocks) and self._firsts[number] <= name:
            names = self._block(number)
            at = bisect.bisect_left(names, name)
            while at < len(names) and names[at] == name:
                out.append(self._rank(number * BLOCK + at))
                at += 1
            number += 1
        return sorted(out)

    def _at(self, rank: int) -> tuple[int, str, int]:
        """Address, type and flags of a symbol."""
        addresses, types, flags = self._chunk(rank // CHUNK)
        return addresses[rank % CHUNK], chr(types[rank % CHUNK]), flags[rank % CHUNK]

    def _end(self, rank: int) -> int:
        """Where a symbol ends: at the next address that has a symbol, padding included."""
        address = self._at(rank)[0]
        end = 0
        while rank + 1 < self.count:
            rank += 1
            start, _, flags = self._at(rank)
            if end and start > end + _PREFIX_SIZE:
                break
            if flags & _HAS_PREFIX and start - _PREFIX_SIZE > address:
                start -= _PREFIX_SIZE
            if start > address and (not end or start < end):
                end = start
        return end or address

    def lookup(self, name: str) -> list[SymbolEntry]:
        """See :class:`SymbolTable`."""
        out = []
        for rank in self._ranks(name):
            address, kind, _ = self._at(rank)
            out.append(SymbolEntry(address, self._end(rank) - address, kind))
        if name.startswith(_PREFIX):
            for rank in self._ranks(name.removeprefix(_PREFIX)):
                address, kind, flags = self._at(rank)
                if flags & _HAS_PREFIX:
                    out.append(SymbolEntry(address - _PREFIX_SIZE, _PREFIX_SIZE, kind))
        return out

    @cached_property
    def _exports(self) -> dict[int, tuple[int, bool]]:
        raw = zlib.decompress(self._part(self._exports_part))
        count = len(raw) // 9
        ranks = struct.unpack_from(f"<{count}I", raw)
        crcs = struct.unpack_from(f"<{count}I", raw, 4 * count)
        return {rank: (crc, bool(gpl)) for rank, crc, gpl in zip(ranks, crcs, raw[8 * count :], strict=True)}

    def _export(self, name: str) -> int | None:
        return next((rank for rank in self._ranks(name) if rank in self._exports), None)

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        """See :class:`SymbolTable`."""
        rank = self._export(name)
        return None if rank is None else self._exports[rank]

    def export_address(self, name: str) -> int | None:
        """See :class:`SymbolTable`."""
        rank = self._export(name)
        return None if rank is None else self._at(rank)[0]

    def _find(self, address: int) -> int:
        """Number of the last symbol at or before an address, -1 when there is none."""
        number = bisect.bisect_right(range(len(self._chunks)), address, key=lambda n: self._chunk(n)[0][0]) - 1
        if number < 0:
            return -1
        return number * CHUNK + bisect.bisect_right(self._chunk(number)[0], address) - 1

    def has_ftrace(self, address: int) -> bool:
        """See :class:`SymbolTable`."""
        rank = self._find(address)
        while rank >= 0:
            start, _, flags = self._at(rank)
            if start != address:
                break
            if flags & _HAS_FTRACE:
                return True
            rank -= 1
        return False

    def addr_to_symbol(self, address: int) -> tuple[str, int, int] | None:
        """See :class:`SymbolTable`."""
        rank = self._find(address)
        near = range(max(rank - _NEAR, 0), min(rank + _NEAR, self.count))
        rows: list[tuple[int, str, int, str]] = []
        for other in near:
            start, kind, flags = self._at(other)
            rows.append((start, kind, other, ""))
            if flags & _HAS_PREFIX:
                rows.append((start - _PREFIX_SIZE, kind, other, _PREFIX))
        rows.sort(key=lambda row: row[0])
        # What lies just outside could change the answer near the ends only.
        if not rows or not rows[0][0] + _PREFIX_SIZE < address < rows[-1][0] - 2 * _PREFIX_SIZE:
            return _addr_to_symbol(self._all, address)
        found = _addr_to_symbol([(start, kind, f"{i}") for i, (start, kind, _, _) in enumerate(rows)], address)
        if found is None or found[0] == "0":
            return _addr_to_symbol(self._all, address)
        _, _, other, prefix = rows[int(found[0])]
        return prefix + self._name(other), found[1], found[2]

    @cached_property
    def _lows(self) -> array[int]:
        lows = array("H", self._data[self._start + self._low[0] : self._start + self._low[0] + 2 * self.count])
        if sys.byteorder == "big":
            lows.byteswap()
        return lows

    def _name(self, rank: int) -> str:
        """The name of a symbol, by its number in address order."""
        position = -1
        while True:  # the low halves of two or three symbols are equal
            position = self._lows.index(rank & 0xFFFF, position + 1)
            if self._rank_high[position] == rank >> 16:
                return self._block(position // BLOCK)[position % BLOCK]

    @cached_property
    def _all(self) -> list[tuple[int, str, str]]:
        """All symbols in order, padding included."""
        names = [name for number in range(len(self._blocks)) for name in self._block(number)]
        by_rank = [""] * self.count
        for position, name in enumerate(names):
            by_rank[self._rank(position)] = name
        out = []
        for rank, name in enumerate(by_rank):
            address, kind, flags = self._at(rank)
            out.append((address, kind, name))
            if flags & _HAS_PREFIX:
                out.append((address - _PREFIX_SIZE, kind, _PREFIX + name))
        out.sort(key=lambda symbol: symbol[0])
        return out

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        return iter(self._all)


class ListTable:
    """A table from lists in memory: those of a kernel image or of a text file.

    ``ftrace_sites`` None means that nothing is known: then every function passes for traceable.
    """

    def __init__(
        self,
        symbols: Iterable[tuple[int, str, str]],
        exports: Iterable[KernelExport] = (),
        ftrace_sites: Iterable[int] | None = None,
        release: str = "",
    ) -> None:
        """Symbols are (address, type, name) in ascending order of their addresses."""
        self.release = release
        self._all = [(address, kind, name) for address, kind, name in symbols]
        self._exports = {export.name: export for export in exports}
        self._sites = None if ftrace_sites is None else sorted(ftrace_sites)

    @classmethod
    def from_image(cls, image: KernelImage) -> ListTable:
        """The table of a kernel image. Raises ImageError when it has no kallsyms."""
        return cls(image.symbols, image.exports, image.ftrace_sites or None, image.release)

    @classmethod
    def from_file(cls, path: Path | str) -> ListTable:
        """The table of a System.map or a saved /proc/kallsyms. Raises OSError."""
        from klpfs.elf.vmlinux import read_symbol_file

        return cls(read_symbol_file(path))

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {}
        for rank, (_, _, name) in enumerate(self._all):
            out.setdefault(name, []).append(rank)
        return out

    def _end(self, rank: int) -> int:
        address = self._all[rank][0]
        while rank < len(self._all):
            if self._all[rank][0] > address:
                return self._all[rank][0]
            rank += 1
        return address

    def lookup(self, name: str) -> list[SymbolEntry]:
        """See :class:`SymbolTable`."""
        return [
            SymbolEntry(self._all[rank][0], self._end(rank) - self._all[rank][0], self._all[rank][1])
            for rank in self._by_name.get(name, ())
        ]

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        """See :class:`SymbolTable`. Text files show exports as __ksymtab symbols at best: without CRC."""
        export = self._exports.get(name)
        if export is not None:
            return export.crc, export.gpl
        if self._exports:
            return None
        if "__ksymtab_" + name in self._by_name:
            return None, False
        # newer kernels' kallsyms tell nothing of exports: a global symbol passes for one
        global_symbol = any(entry.type.isupper() for entry in self.lookup(name))
        return (None, False) if global_symbol else None

    def export_address(self, name: str) -> int | None:
        """See :class:`SymbolTable`."""
        if name in self._exports:
            return self._exports[name].address
        found = self.lookup(name) if self.exported(name) is not None else []
        return found[0].address if found else None

    def has_ftrace(self, address: int) -> bool:
        """See :class:`SymbolTable`."""
        if self._sites is None:
            return True
        end = max((self._end(rank) for rank in self._ranks_at(address)), default=address + 1)
        at = bisect.bisect_left(self._sites, address)
        return at < len(self._sites) and self._sites[at] < end

    def _ranks_at(self, address: int) -> Iterator[int]:
        rank = bisect.bisect_left(self._all, address, key=lambda symbol: symbol[0])
        while rank < len(self._all) and self._all[rank][0] == address:
            yield rank
            rank += 1

    def addr_to_symbol(self, address: int) -> tuple[str, int, int] | None:
        """See :class:`SymbolTable`."""
        return _addr_to_symbol(self._all, address)

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        return iter(self._all)


def shipped_table(kernel: str = "6.12", fallback: str = "") -> ShippedTable:
    """The table that klpfs ships for a kernel version, else that of ``fallback``.

    Raises OSError(ENOENT) when there is none.
    """
    for name in (kernel, fallback):
        path = DATA_DIR / f"{name}.symbols"
        if name and path.is_file():
            return ShippedTable(path)
    raise OSError(errno.ENOENT, f"klpfs ships no symbols of kernel {kernel}")


def given_table(image: str | None, kallsyms: str | None) -> ListTable:
    """The table from the file that a user has named as ``--kernel-image`` or ``--kallsyms``.

    Raises ValueError that says what is wrong with it: for the user.
    """
    if image and kallsyms:
        raise ValueError("--kernel-image and --kallsyms exclude each other")
    option, source = ("--kernel-image", image) if image else ("--kallsyms", kallsyms or "")
    try:
        if image:
            from klpfs.elf.vmlinux import KernelImage

            return ListTable.from_image(KernelImage.load(image))
        return ListTable.from_file(source)
    except OSError as err:
        reason = err.strerror or str(err)
        raise ValueError(f"{option}: {reason}" if source in reason else f"{option} {source}: {reason}") from None


def _entries(raw: bytes) -> Iterator[bytes]:
    """The entries of a block. A shared prefix's length may be 0, so NULs alone do not separate them."""
    position = 0
    while position < len(raw):
        end = raw.index(b"\0", position + 1)
        yield raw[position:end]
        position = end + 1


def _addr_to_symbol(symbols: list[tuple[int, str, str]], address: int) -> tuple[str, int, int] | None:
    """get_symbol_pos: the first of the symbols at the closest address before."""
    rank = bisect.bisect_right(symbols, address, key=lambda symbol: symbol[0]) - 1
    if rank < 0:
        return None
    end = symbols[rank + 1][0] if rank + 1 < len(symbols) else address + 1
    while rank and symbols[rank - 1][0] == symbols[rank][0]:
        rank -= 1
    start, _, name = symbols[rank]
    return name, address - start, end - start


def write_table(
    path: Path | str, symbols: list[KernelSymbol], exports: list[KernelExport], sites: list[int], release: str
) -> None:
    """Write a shipped table. ``symbols`` are in kallsyms' order, ``sites`` ascending."""
    text = next(symbol.address for symbol in symbols if symbol.name == "_text")
    known = {(symbol.name, symbol.address, symbol.type) for symbol in symbols}

    def is_padding(symbol: KernelSymbol) -> bool:
        function = (symbol.name.removeprefix(_PREFIX), symbol.address + _PREFIX_SIZE, symbol.type)
        return symbol.name.startswith(_PREFIX) and function in known

    kept = [symbol for symbol in symbols if not is_padding(symbol)]
    table = ListTable(symbols, ftrace_sites=sites)
    values = [symbol.address if symbol.type == "A" else symbol.address - text & _MASK32 for symbol in kept]
    parts: list[bytes] = []
    where = 0

    def add(part: bytes) -> list[int]:
        nonlocal where
        parts.append(part)
        where += len(part)
        return [where - len(part), len(part)]

    order = sorted(range(len(kept)), key=lambda rank: (kept[rank].name.encode("latin-1"), rank))
    firsts, blocks = [], []
    for start in range(0, len(order), BLOCK):
        names = [kept[rank].name.encode("latin-1") for rank in order[start : start + BLOCK]]
        firsts.append(names[0].decode("latin-1"))
        blocks.append(add(zlib.compress(_front_code(names), 9)))
    low = add(struct.pack(f"<{len(order)}H", *(rank & 0xFFFF for rank in order)))
    high = add(zlib.compress(bytes(rank >> 16 for rank in order), 9))
    bases, chunks = [], []
    before = 0
    for start in range(0, len(kept), CHUNK):
        rows = kept[start : start + CHUNK]
        bases.append(before)
        deltas = []
        for value in values[start : start + CHUNK]:
            deltas.append(value - before & _MASK32)
            before = value
        flags = bytes(
            _HAS_PREFIX * ((_PREFIX + row.name, row.address - _PREFIX_SIZE, row.type) in known)
            | _HAS_FTRACE * (row.type in "tTwW" and table.has_ftrace(row.address))
            for row in rows
        )
        types = "".join(row.type for row in rows).encode()
        chunks.append(add(zlib.compress(struct.pack(f"<{len(rows)}I", *deltas) + types + flags, 9)))
    ranks = {(symbol.name, symbol.address): rank for rank, symbol in enumerate(kept)}
    rows_out = sorted((ranks[export.name, export.address], export.crc or 0, export.gpl) for export in exports)
    packed = struct.pack(f"<{len(rows_out)}I", *(row[0] for row in rows_out))
    packed += struct.pack(f"<{len(rows_out)}I", *(row[1] for row in rows_out))
    packed += bytes(row[2] for row in rows_out)
    header = {
        "release": release, "count": len(kept), "text": text, "firsts": firsts, "blocks": blocks, "low": low,
        "high": high, "bases": bases, "chunks": chunks, "exports": add(zlib.compress(packed, 9)),
    }  # fmt: skip
    encoded = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<I", len(encoded)) + encoded)
        for part in parts:
            file.write(part)


def _front_code(names: list[bytes]) -> bytes:
    out = bytearray()
    before = b""
    for name in names:
        shared = 0
        limit = min(len(name), len(before), 255)
        while shared < limit and name[shared] == before[shared]:
            shared += 1
        out.append(shared)
        out += name[shared:] + b"\0"
        before = name
    return bytes(out)
