"""Symbols and types out of a kernel image: bzImage or vmlinux, whatever its compression.

A distribution's kernel carries its own symbol table for kallsyms, compressed by a table of 256 tokens, and usually BTF.
Both are found in the decompressed image without any symbol file.

Sources: Documentation/arch/x86/boot.rst (payload_offset), scripts/kallsyms.c (``write_src``), kernel/kallsyms.c
(``kallsyms_expand_symbol``, ``kallsyms_sym_address``),
Documentation/bpf/btf.rst, include/linux/export-internal.h (``__ksymtab``).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from klpfs.elf.compression import CompressionError, unpack
from klpfs.elf.layouts import KLP_LAYOUT, StructLayout, usable

#: Largest image, compressed or not, bytes.
MAX_IMAGE = 512 << 20


class ImageError(OSError):
    """A file that is no usable kernel image (ENOEXEC), or whose decompressor is missing (ENOPKG)."""

    def __init__(self, message: str, number: int = errno.ENOEXEC) -> None:
        super().__init__(number, message)


class KernelSymbol(NamedTuple):
    """A symbol of the kernel; addresses are those of the link, before KASLR moves them."""

    address: int
    type: str
    name: str


class KernelExport(NamedTuple):
    """An exported symbol; ``crc`` is None when the kernel has no symbol versions."""

    name: str
    address: int
    gpl: bool
    crc: int | None


class KernelImage:
    """A kernel image, decompressed. What is asked for is decoded at its first use."""

    def __init__(self, elf: bytes, filename: str = "vmlinux") -> None:
        """Open a decompressed image. Raises ImageError when it is no x86-64 kernel."""
        self.filename = filename
        self.data = elf
        self._sections = self._read_sections()

    @classmethod
    def load(cls, path: Path | str) -> KernelImage:
        """Read a bzImage or vmlinux file. Raises OSError."""
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE + 1)
        if len(data) > MAX_IMAGE:
            raise ImageError(f"{path}: larger than {MAX_IMAGE} bytes", errno.EFBIG)
        return cls(decompress(data, str(path)), str(path))

    def _read_sections(self) -> dict[str, tuple[int, int, int]]:
        """Address, file offset and size of each section with contents."""
        import io

        from elftools.elf.elffile import ELFFile

        try:
            elf = ELFFile(io.BytesIO(self.data))
            if elf["e_machine"] != "EM_X86_64" or elf.elfclass != 64:
                raise ImageError(f"{self.filename}: not an x86-64 kernel")
            found = {
                section.name: (section["sh_addr"], section["sh_offset"], section["sh_size"])
                for section in elf.iter_sections()
                if section["sh_type"] not in ("SHT_NOBITS", "SHT_NULL")
            }
        except ImageError:
            raise
        except Exception as exc:  # pyelftools meets broken files with whatever its helpers raise
            raise ImageError(f"{self.filename}: no ELF file: {exc}") from exc
        return {
            name: (addr, offset, size)
            for name, (addr, offset, size) in found.items()
            if offset + size <= len(self.data)
        }

    def section(self, name: str) -> memoryview | None:
        """The bytes of a section, None when the image has none of that name."""
        where = self._sections.get(name)
        return None if where is None else memoryview(self.data)[where[1] : where[1] + where[2]]

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel address. Raises ImageError where the image has none."""
        for start, offset, length in self._sections.values():
            if start and start <= address and address + size <= start + length:
                return self.data[offset + address - start : offset + address - start + size]
        raise ImageError(f"{self.filename}: no data at {address:#x}")

    @cached_property
    def symbols(self) -> list[KernelSymbol]:
        """All symbols of kallsyms in its order (by address). Raises ImageError when there is no table."""
        rodata = self.section(".rodata")
        if rodata is None:
            raise ImageError(f"{self.filename}: no .rodata section")
        try:
            return list(_Kallsyms(bytes(rodata), self.filename).symbols())
        except (IndexError, struct.error) as exc:
            raise ImageError(f"{self.filename}: broken kallsyms tables: {exc}") from exc

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Address of the first symbol of each name."""
        return {symbol.name: symbol.address for symbol in reversed(self.symbols)}

    @cached_property
    def release(self) -> str:
        """What ``uname -r`` says on this kernel, "" when it cannot be told."""
        start = self.data.find(b"Linux version ")
        return self.data[start + 14 : start + 14 + 65].split(b" ")[0].decode("latin-1") if start >= 0 else ""

    @cached_property
    def exports(self) -> list[KernelExport]:
        """Exported symbols, from __ksymtab and its like."""
        out = []
        for suffix, gpl in (("", False), ("_gpl", True)):
            where, crcs = self._sections.get("__ksymtab" + suffix), self.section("__kcrctab" + suffix)
            if where is None:
                continue
            address, offset, size = where
            strings_at, strings_offset, strings_size = self._sections.get("__ksymtab_strings", (0, 0, 0))
            for row, (value, name, _) in enumerate(
                struct.iter_unpack("<iii", self.data[offset : offset + size // 12 * 12])
            ):
                at = address + 12 * row + 4 + name - strings_at
                if not 0 <= at < strings_size:
                    raise ImageError(f"{self.filename}: row {row} of __ksymtab{suffix} has no name")
                end = self.data.find(b"\0", strings_offset + at)
                text = self.data[strings_offset + at : end].decode("latin-1")
                crc = None
                if crcs is not None and len(crcs) >= 4 * row + 4:
                    crc = struct.unpack_from("<I", crcs, 4 * row)[0]
                out.append(KernelExport(text, address + 12 * row + value & (1 << 64) - 1, gpl, crc))
        return out

    @cached_property
    def ftrace_sites(self) -> list[int]:
        """Addresses of the calls that ftrace knows (__start_mcount_loc), in ascending order."""
        start, stop = self.by_name.get("__start_mcount_loc"), self.by_name.get("__stop_mcount_loc")
        if start is None or stop is None or not start <= stop:
            return []
        count = (stop - start) // 8
        return sorted(site for site in struct.unpack(f"<{count}Q", self.read(start, count * 8)) if site)

    @cached_property
    def btf(self) -> Btf | None:
        """The kernel's type information, None when it was built without."""
        section = self.section(".BTF")
        return None if section is None else Btf(bytes(section), self.filename)


# -- compression -------------------------------------------------------------------------------------------------------


def decompress(data: bytes, filename: str = "vmlinuz") -> bytes:
    """The ELF file in a kernel image. Raises ImageError."""
    if data[:4] == b"\x7fELF":
        return data
    if data[0x202:0x206] == b"HdrS":
        setup, protocol = data[0x1F1] or 4, struct.unpack_from("<H", data, 0x206)[0]
        if protocol < 0x208 or len(data) < 0x250:
            raise ImageError(f"{filename}: boot protocol {protocol:#x} is too old to tell where the kernel lies")
        offset, length = struct.unpack_from("<II", data, 0x248)
        start = (setup + 1) * 512 + offset
        data = data[start : start + length]
    try:
        out = unpack(data, MAX_IMAGE, sized=True)
    except CompressionError as err:
        number = err.errno if err.errno == errno.ENOPKG else errno.ENOEXEC
        raise ImageError(f"{filename}: {err.strerror}", number or errno.ENOEXEC) from err
    if out is not None:
        if out[:4] != b"\x7fELF":
            raise ImageError(f"{filename}: the compressed data is no ELF file")
        return out
    raise ImageError(f"{filename}: neither bzImage nor vmlinux, or an unknown compression ({data[:4].hex()})")


# -- kallsyms ----------------------------------------------------------------------------------------------------------


class _Kallsyms:
    """The tables of scripts/kallsyms.c in a kernel's read-only data.

    The order in the file is: number of symbols, names, markers, token table, token index. The offsets and their base
    come after that (since 6.4) or before it; the order of names (three bytes a symbol) is the last table since 6.4, or
    stands behind the markers (6.2, 6.3 and late 6.1). Each table starts at a multiple of eight bytes.
    """

    def __init__(self, data: bytes, filename: str) -> None:
        self.data = data
        self.filename = filename
        self.tokens, table, after = self._find_tokens()
        self.names, self.count = self._find_names(table) or self._search_names(table)
        self.offsets, self.base = self._find_offsets(after)

    def _find_tokens(self) -> tuple[list[bytes], int, int]:
        """The tokens, where their table starts, and where the index of tokens ends.

        Digits occur in names and stand for themselves, so "0\\0" "1\\0" ... is found; an index follows that proves it.
        """
        digits = b"".join(b"%d\0" % i for i in range(10))
        at = self.data.find(digits)
        while at >= 0:
            end = at
            for _ in range(0x30, 0x100):
                end = self.data.find(b"\0", end) + 1
                if not end:
                    break
            index = _align8(end)
            if end and end - at < 1 << 16 and len(self.data) >= index + 512:
                positions = struct.unpack_from("<256H", self.data, index)
                start = at - positions[0x30]
                if positions[0] == 0 and start >= 0 and positions[0x31] == positions[0x30] + 2:
                    tokens = self.data[start:end].split(b"\0")
                    if len(tokens) == 257 and all(self.data[start + p - 1] == 0 or p == 0 for p in positions[1:]):
                        return tokens[:256], start, index + 512
            at = self.data.find(digits, at + 1)
        raise ImageError(f"{self.filename}: no kallsyms token table; was it built without CONFIG_KALLSYMS?")

    def _find_names(self, end: int) -> tuple[int, int] | None:
        """Start of the compressed names and the number of symbols, from the markers before the token table.

        None when there are no markers there.
        """
        data = self.data
        position = end - 4
        if position > 0 and data[position:end] == b"\0\0\0\0":
            position -= 4  # alignment
        markers, last = 0, struct.unpack_from("<I", data, max(position, 0))[0]
        value = last
        while value and position >= 4:
            markers += 1
            position -= 4
            before = struct.unpack_from("<I", data, position)[0]
            if before >= value:
                return None
            value = before
        if value:
            return None
        markers += 1
        low, high = (markers - 1) * 256 + 1, markers * 256
        # the number of symbols stands eight bytes before the names; 256 names take at most 256 * 130 bytes
        names = (position - last) & ~7
        for candidate in range(names, max(names - 256 * 130, 8), -8):
            (count,) = struct.unpack_from("<I", data, candidate - 8)
            if low <= count <= high and self._walk(candidate, count, position):
                return candidate, count
        return None

    def _search_names(self, end: int) -> tuple[int, int]:
        """The same, where the order of names stands between the markers and the token table: by their sizes."""
        for i, (count,) in enumerate(struct.iter_unpack("<Q", self.data[: end & ~7])):
            if not 256 < count < 1 << 22:
                continue
            names = 8 * i + 8
            markers = end - _align8(3 * count) - _align8(4 * ((count + 255) // 256))
            if names < markers and self._plausible(names) and self._walk(names, count, markers):
                return names, int(count)
        raise ImageError(f"{self.filename}: no kallsyms names before the token table")

    def _plausible(self, position: int) -> bool:
        """Whether some names at a position look like symbols: a type letter and a printable name."""
        for _ in range(16):
            text, position = self._name(position)
            if len(text) < 2 or not text[:1].isalpha() or not text.isascii() or not text.decode().isprintable():
                return False
        return True

    def _name(self, position: int) -> tuple[bytes, int]:
        """The type letter and name at a position, and the position behind it."""
        length = self.data[position]
        position += 1
        if length & 0x80:
            length = length & 0x7F | self.data[position] << 7
            position += 1
        tokens = self.tokens
        return b"".join([tokens[code] for code in self.data[position : position + length]]), position + length

    def _walk(self, position: int, count: int, end: int) -> bool:
        """Whether ``count`` names from a position end where the markers start."""
        data = self.data
        for _ in range(count):
            if position >= end:
                return False
            length = data[position]
            position += 1
            if length & 0x80:
                length = length & 0x7F | data[position] << 7
                position += 1
            position += length
        return _align8(position) == end

    def _find_offsets(self, after: int) -> tuple[list[int], int]:
        """Offsets of the symbols and the address that they count from."""
        data, count = self.data, self.count
        size = _align8(4 * count)
        for offsets, base_at in ((_align8(after), _align8(after) + size), (self.names - 16 - size, self.names - 16)):
            if offsets < 0 or base_at + 8 > len(data):
                continue
            (base,) = struct.unpack_from("<Q", data, base_at)
            if base >= 0xFFFFFFFF80000000:
                return list(struct.unpack_from(f"<{count}i", data, offsets)), base
        raise ImageError(f"{self.filename}: no kallsyms addresses")

    def symbols(self) -> Iterator[KernelSymbol]:
        """All symbols in the order of the table."""
        position, base = self.names, self.base
        # CONFIG_KALLSYMS_ABSOLUTE_PERCPU: kernel addresses are negative offsets, those of per-CPU data positive
        percpu = sum(offset < 0 for offset in self.offsets) > self.count // 2
        for offset in self.offsets:
            raw, position = self._name(position)
            text = raw.decode("latin-1")
            address = base + (offset & 0xFFFFFFFF)
            if percpu:
                address = offset if offset >= 0 else base - 1 - offset
            yield KernelSymbol(address, text[0], text[1:])


def _align8(value: int) -> int:
    return (value + 7) & ~7


# -- BTF ---------------------------------------------------------------------------------------------------------------


class Btf:
    """Sizes and members of structures in BTF. Types are scanned once, for the names only."""

    #: bytes that follow struct btf_type for each kind, besides those counted by vlen
    _EXTRA = {1: 4, 3: 12, 14: 4, 17: 4}
    _PER_MEMBER = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}

    def __init__(self, data: bytes, filename: str = "vmlinux") -> None:
        """Check the header. Raises ImageError."""
        self.filename = filename
        if len(data) < 24:
            raise ImageError(f"{filename}: .BTF of {len(data)} bytes")
        magic, _, _, header, type_off, type_len, str_off, str_len = struct.unpack_from("<HBBIIIII", data)
        if magic != 0xEB9F or header + type_off + type_len > len(data) or header + str_off + str_len > len(data):
            raise ImageError(f"{filename}: malformed .BTF header")
        self.types = data[header + type_off : header + type_off + type_len]
        self.strings = data[header + str_off : header + str_off + str_len]

    @cached_property
    def _offsets(self) -> list[int]:
        """Offset of each type in :attr:`types`, by its number; number 0 is void."""
        out = [0]
        position, end, types = 0, len(self.types), self.types
        extra, per_member = self._EXTRA, self._PER_MEMBER
        while position + 12 <= end:
            out.append(position)
            info = int.from_bytes(types[position + 4 : position + 8], "little")
            kind = info >> 24 & 0x1F
            position += 12 + extra.get(kind, 0) + per_member.get(kind, 0) * (info & 0xFFFF)
        return out

    def _string(self, offset: int) -> str:
        end = self.strings.find(b"\0", offset)
        return self.strings[offset : end if end >= 0 else len(self.strings)].decode("latin-1")

    def _structs(self, name: str) -> Iterator[int]:
        needle = self.strings.find(b"\0" + name.encode() + b"\0") + 1
        if not needle:
            return
        wanted = needle.to_bytes(4, "little")
        for offset in self._offsets[1:]:
            if self.types[offset : offset + 4] == wanted and self.types[offset + 7] & 0x1F in (4, 5):
                yield offset

    def struct(self, name: str) -> StructLayout | None:
        """Layout of a structure or union: offsets in bytes (of bit fields: where the bits start); None if unknown."""
        for offset in self._structs(name):
            info, size = struct.unpack_from("<II", self.types, offset + 4)
            members = {}
            for i in range(info & 0xFFFF):
                if offset + 24 + 12 * i > len(self.types):
                    break
                member, _, bits = struct.unpack_from("<III", self.types, offset + 12 + 12 * i)
                members[self._string(member)] = (bits & 0xFFFFFF if info >> 31 else bits) // 8
            return StructLayout(size, members)
        return None


def klp_layouts(btf: Btf) -> dict[str, StructLayout] | None:
    """The livepatch structures' layouts, None when one of them is missing."""
    found = {name: layout for name in KLP_LAYOUT if (layout := btf.struct(name)) is not None}
    return found if usable(found) else None


# -- text files --------------------------------------------------------------------------------------------------------


def read_symbol_file(path: Path | str) -> list[KernelSymbol]:
    """Symbols of a System.map or a saved /proc/kallsyms, without those of modules.

    Where the addresses are hidden (all zero), ascending ones stand in, so that order and ``sympos`` are kept.
    Raises OSError when it cannot be read, ImageError when it is no such file.
    """
    out = []
    with open(path, encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            if len(line) > 4096:
                raise ImageError(f"{path}: line {number}: too long for a symbol table")
            parts = line.split()
            if not parts or (len(parts) == 4 and parts[3].startswith("[")):
                continue
            try:
                address, kind, name = int(parts[0], 16), parts[1], parts[2]
            except (ValueError, IndexError):
                raise ImageError(f"{path}: line {number}: expected 'address type name'") from None
            if len(kind) != 1:
                raise ImageError(f"{path}: line {number}: '{kind}' is no symbol type")
            out.append(KernelSymbol(address, kind, name))
            if len(out) > 2_000_000:
                raise ImageError(f"{path}: more than 2000000 symbols")
    if len(out) < 2:
        raise ImageError(f"{path}: {len(out)} symbols; Debian's System.map is a stub, use the kernel image")
    if not any(symbol.address for symbol in out):
        return [s._replace(address=0xFFFFFFFF81000000 + 16 * i) for i, s in enumerate(out)]
    out.sort(key=lambda symbol: symbol.address)  # stable: the order in the file decides among equals
    return out
