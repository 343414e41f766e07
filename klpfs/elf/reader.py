"""Read a module file (``.ko``), real or synthetic, into plain data.

:meth:`ElfModule.parse` makes the checks of the kernel's loader in the kernel's order and refuses with its answers and
log lines; what the loader does not look at before it runs a module is decoded on demand. The fields are taken from the
file directly: the kernel's checks concern raw header fields, and a module must not cost more memory or time than its
size justifies. (:mod:`klpfs.elf.dwarf` leaves debug information to pyelftools.)

Trust: the bytes come from anybody. Whatever is wrong ends in :class:`ModuleFormatError`, an ``OSError``; tables and
names are capped so that no file takes more than some 200 MB.

Sources: kernel/module/main.c (``elf_validity_*``, ``find_module_sections``), kernel/module/signing.c and
kernel/module_signature.c, kernel/module/version.c, include/linux/moduleparam.h, include/linux/export-internal.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from klpfs.elf import layouts as C
from klpfs.elf.compression import is_compressed_module, unpack

#: Largest module file that is taken, bytes.
MAX_FILE = 64 << 20
MAX_SYMBOLS = 120_000
#: Relocations of one section.
MAX_RELOCS = 150_000
#: Pointers of all sections that were looked at.
MAX_POINTERS = 150_000
#: All names of symbols or of sections together, bytes.
MAX_NAMES = 16 << 20
MAX_MODINFO = 1 << 20
#: Rows of __versions, __param, __ksymtab.
MAX_ROWS = 100_000

SIGNATURE_MARKER = b"~Module signature appended~\n"
_NO_NAME = "(missing .modinfo section or name field)"


class ModuleFormatError(OSError):
    """A module file that the kernel refuses.

    ``errno`` is mostly ENOEXEC; ``log`` holds the line that the kernel would log ("" when it logs none), ``level`` the
    line's level.
    """

    def __init__(self, number: int, message: str, *, log: str = "", level: str = "err") -> None:
        super().__init__(number, message)
        self.log = log
        self.level = level


class Section(NamedTuple):
    """A section header. ``offset`` and ``size`` in bytes; for SHT_NOBITS there are no bytes in the file."""

    number: int
    name: str
    type: int
    flags: int
    addr: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entsize: int

    @property
    def alloc(self) -> bool:
        """Whether the section is loaded into memory."""
        return bool(self.flags & C.SHF_ALLOC)

    @property
    def executable(self) -> bool:
        """Whether the section holds code."""
        return bool(self.flags & C.SHF_EXECINSTR)


class Symbol(NamedTuple):
    """An entry of .symtab; ``shndx`` is a section's number or one of the SHN values."""

    number: int
    name: str
    value: int
    size: int
    bind: int
    type: int
    shndx: int


class Rela(NamedTuple):
    """A relocation: ``symbol`` is an index into :attr:`ElfModule.symbols`."""

    offset: int
    type: int
    symbol: int
    addend: int


class Location(NamedTuple):
    """A place in a module: section index and offset in bytes."""

    section: int
    offset: int


class Reference(NamedTuple):
    """What a relocated pointer points to: a place, or a symbol that is not defined in the module (``section`` 0)."""

    section: int
    offset: int
    symbol: str


class ModuleParam(NamedTuple):
    """A row of __param.

    ``type`` is the name of the kernel's type ("int", "charp" ...; "custom" when the module has operations of its own,
    "unknown" when they cannot be found), ``max`` the length of an array or a string (0: neither), ``default`` the
    value in the file as text, None where it cannot be told; ``ops`` and ``arg`` what the row points to.
    """

    name: str
    type: str
    perm: int
    max: int
    default: str | None
    ops: Reference | None
    arg: Reference | None


class ModuleExport(NamedTuple):
    """A symbol that the module offers to others. ``crc`` is None without symbol versions."""

    name: str
    location: Reference
    gpl: bool
    crc: int | None


class Signature(NamedTuple):
    """A signature that was appended to the module; ``size`` is that of the PKCS#7 message in bytes."""

    size: int
    valid_format: bool


class ElfModule:
    """A module file. Attributes that are properties are decoded at their first use and may raise ModuleFormatError."""

    def __init__(self, data: bytes, filename: str) -> None:
        """For :meth:`parse` and :meth:`load` only."""
        self.filename = filename
        self.data = data
        #: bytes of the module proper, without an appended signature
        self.size = len(data)
        #: a module is signed when a signature is appended; nobody's key is known, so it is never verified
        self.signature: Signature | None = None
        #: log lines of checks that did not refuse the module
        self.notices: list[str] = []
        self.sections: list[Section] = []
        self._relas: dict[int, list[Section]] | None = None
        self._pointers: dict[int, dict[int, Reference]] = {}

    @classmethod
    def load(cls, path: Path | str) -> ElfModule:
        """Read a file, a compressed one too. Raises OSError when that fails, and as :meth:`parse`."""
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
        if is_compressed_module(data):
            data = unpack(data, MAX_FILE) or b""
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, filename: str = "module") -> ElfModule:
        """Check and open a module. Raises ModuleFormatError: EINVAL when empty, ENOEXEC when malformed."""
        self = cls(data, filename)
        if not data:  # kernel_read_file() refuses it before anybody looks for ELF
            raise ModuleFormatError(errno.EINVAL, f"{filename}: the file is empty")
        if len(data) > MAX_FILE:
            raise ModuleFormatError(errno.EFBIG, f"{filename}: larger than {MAX_FILE} bytes")
        self._check_signature()
        self._check_header()
        self._check_names()
        self._check_special_sections()
        return self

    def fail(self, what: str, *, log: str = "", number: int = errno.ENOEXEC, level: str = "err") -> ModuleFormatError:
        """An error that names the file."""
        return ModuleFormatError(number, f"{self.filename}: {what}", log=log, level=level)

    # -- the loader's checks ----------------------------------------------------------------------------------------

    def _check_signature(self) -> None:
        """Cut the signature off (module_sig_check, mod_check_sig)."""
        if len(self.data) <= len(SIGNATURE_MARKER) or not self.data.endswith(SIGNATURE_MARKER):
            return
        end = len(self.data) - len(SIGNATURE_MARKER)
        if end <= 12:
            raise self.fail("the appended signature has no header", number=errno.EBADMSG)
        algo, digest, kind, signer, key, pad, size = struct.unpack_from(">BBBBB3sI", self.data, end - 12)
        if size >= end - 12:
            raise self.fail(f"the signature's size {size} exceeds the file's", number=errno.EBADMSG)
        if kind != 2:  # PKEY_ID_PKCS7; an unsupported kind counts as unsigned
            self.notices.append("module: not signed with expected PKCS#7 message")
            self.signature = Signature(size, False)
            self.size = end  # what remains of the signature are trailing bytes
            return
        if algo or digest or signer or key or pad != b"\0\0\0":
            log = "module: PKCS#7 signature info has unexpected non-zero params"
            raise self.fail("the signature's header has non-zero fields", log=log, number=errno.EBADMSG)
        message = self.data[end - 12 - size : end - 12]
        if not _is_der_sequence(message):
            raise self.fail("the signature is no PKCS#7 message", number=errno.EBADMSG)
        self.signature = Signature(size, True)
        self.size = end - 12 - size

    def _check_header(self) -> None:
        """elf_validity_ehdr and elf_validity_cache_sechdrs."""
        data, end = self.data, self.size
        if end < C.ELF_HEADER_SIZE:
            raise self.fail(f"{end} bytes hold no ELF header", log=f"Invalid ELF header len {end}")
        if data[:4] != b"\x7fELF":
            raise self.fail("no ELF file", log="Invalid ELF header magic: != \x7fELF")
        kind, machine = struct.unpack_from("<HH", data, 16)
        if kind != 1:
            raise self.fail(f"ELF type {kind}, not relocatable", log=f"Invalid ELF header type: {kind} != 1")
        if machine != 62:
            raise self.fail(f"machine {machine} is not x86-64", log=f"Invalid architecture in ELF header: {machine}")
        (shoff,) = struct.unpack_from("<Q", data, 40)
        shentsize, shnum, self.shstrndx = struct.unpack_from("<HHH", data, 58)
        if shentsize != C.SECTION_HEADER_SIZE:
            raise self.fail(f"section headers of {shentsize} bytes", log="Invalid ELF section header size")
        if shoff >= end or shnum * C.SECTION_HEADER_SIZE > end - shoff:
            raise self.fail(
                f"the section headers at {shoff:#x} lie beyond the end of the file ({end:#x})",
                log="Invalid ELF section header overflow",
            )
        self.headers = [
            struct.unpack_from("<IIQQQQIIQQ", data, shoff + i * C.SECTION_HEADER_SIZE) for i in range(shnum)
        ]
        # the kernel looks at section 0 even where there are no sections at all
        first = self.headers[0] if shnum else struct.unpack("<IIQQQQIIQQ", data[shoff : shoff + 64].ljust(64, b"\0"))
        if first[1] != C.SHT_NULL or first[5] or first[3]:
            raise self.fail(
                "section 0 is not empty",
                log=f"ELF Spec violation: section 0 type({_s32(first[1])})!=SH_NULL or non-zero len or addr",
            )
        for i, (_, kind, _, _, offset, size, *_) in enumerate(self.headers[1:], 1):
            if kind not in (C.SHT_NULL, C.SHT_NOBITS) and offset + size > end:
                raise self.fail(
                    f"section {i} ({offset:#x}+{size:#x}) lies beyond the end of the file ({end:#x})",
                    log=f"Invalid ELF section in module (section {i} type {kind})",
                )

    def _check_names(self) -> None:
        """elf_validity_cache_secstrings; fills :attr:`sections`."""
        count = len(self.headers)
        index = self.shstrndx
        if index == 0 or index >= count:
            raise self.fail(
                f"the section name table's index {index} is not below {count}",
                log=f"Invalid ELF section name index: {index} || e_shstrndx ({index}) >= e_shnum ({count})",
            )
        _, kind, _, _, offset, size, *_ = self.headers[index]
        if kind != C.SHT_STRTAB:
            log = f"Invalid ELF section name table type: {kind}"
            raise self.fail(f"section {index}, the section name table, has type {kind}", log=log)
        if size == 0:
            raise self.fail("the section name table is empty", log="empty section name table")
        if self.data[offset + size - 1]:
            log = "ELF Spec violation: section name table isn't null terminated"
            raise self.fail("the section name table does not end in NUL", log=log)
        names = _Names(self, offset, size, "section")
        for i, (name, kind, *rest) in enumerate(self.headers):
            if name >= size and kind != C.SHT_NULL:
                raise self.fail(
                    f"section {i}: its name at {name:#x} lies beyond the name table ({size:#x})",
                    log=f"Invalid ELF section name in module (section {i} type {kind})",
                )
            self.sections.append(Section(i, names.at(name) if name < size else "", kind, *rest))
        del self.headers

    def _check_special_sections(self) -> None:
        """elf_validity_cache_index_{info,mod,sym,str}."""
        infos = [s for s in self.sections[1:] if s.name == ".modinfo"]
        if len(infos) > 1:
            raise self.fail(f"{len(infos)} .modinfo sections", log="Only one .modinfo section must exist.")
        self.modinfo_section = infos[0] if infos else None
        called = self.info("name")
        label = _NO_NAME if called is None else called
        mods = [s for s in self.sections[1:] if s.name == ".gnu.linkonce.this_module"]
        rule = None
        if len(mods) != 1:
            rule = f"module {label}: Exactly one .gnu.linkonce.this_module section must exist."
        elif mods[0].type == C.SHT_NOBITS:
            rule = f"module {label}: .gnu.linkonce.this_module section must have a size set"
        elif not mods[0].alloc:
            rule = f"module {label}: .gnu.linkonce.this_module must occupy memory during process execution"
        elif mods[0].size != C.MODULE_SIZE:
            rule = (
                f"module {label}: .gnu.linkonce.this_module section size must match the kernel's built struct module "
                "size at run time"
            )
        if rule is not None:
            size = f" ({mods[0].size} bytes, not {C.MODULE_SIZE})" if len(mods) == 1 else f" ({len(mods)} found)"
            raise self.fail(rule.partition(": ")[2].rstrip(".") + size, log=rule)
        self.this_module_section = mods[0]
        #: the name in struct module, by which the kernel knows the module once it is loaded
        self.name = self._this_module_name()
        symtabs = [s for s in self.sections[1:] if s.type == C.SHT_SYMTAB]
        if len(symtabs) != 1:
            log = f"{label}: module has no symbols (stripped?)"
            raise self.fail(f"{len(symtabs)} symbol tables instead of one", log=log, level="warning")
        self.symtab = symtabs[0]
        link = self.symtab.link
        if link == 0 or link >= len(self.sections):
            raise self.fail(
                f"the symbol table's string table {link} is not below {len(self.sections)}",
                log=f"Invalid ELF sh_link!=SHN_UNDEF({_s32(link)}) or (sh_link({_s32(link)}) >= "
                f"hdr->e_shnum({len(self.sections)})",
            )
        self.strtab = self.sections[link]
        if self.strtab.type != C.SHT_STRTAB:
            log = f"Invalid ELF symbol string table type: {self.strtab.type}"
            raise self.fail(f"section {link}, the symbols' string table, has type {self.strtab.type}", log=log)
        #: the name used in messages before the module is in place (info->name)
        self.label = self.name if called is None else called

    def _this_module_name(self) -> str:
        start = self.this_module_section.offset + C.MODULE_NAME_OFFSET
        raw = self.data[start : start + C.MODULE_NAME_LEN]
        return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")

    # -- contents ---------------------------------------------------------------------------------------------------

    def section(self, name: str) -> Section | None:
        """The first loaded section of a name (find_sec); sections that are not loaded do not count."""
        return next((s for s in self.sections if s.name == name and s.alloc), None)

    def any_section(self, name: str) -> Section | None:
        """The first section of a name, loaded or not."""
        return next((s for s in self.sections[1:] if s.name == name), None)

    def contents(self, section: Section) -> bytes:
        """The bytes of a section in the file: none for SHT_NOBITS."""
        if section.type == C.SHT_NOBITS:
            return b""
        return self.data[section.offset : section.offset + section.size]

    def table(self, section: Section, row: int, limit: int, what: str) -> memoryview:
        """The whole rows of a section, not copied. Raises ModuleFormatError when there are more than ``limit``."""
        rows = section.size // row if section.type != C.SHT_NOBITS else 0
        if rows > limit:
            raise self.fail(f"section {section.name}: {rows} {what}, more than {limit}")
        data = memoryview(self.data)[section.offset : section.offset + rows * row]
        return data[: len(data) // row * row]  # the end of the file bounds the types that the kernel does not check

    def bytes_at(self, where: Location | Reference, size: int) -> bytes:
        """``size`` bytes at a place, zeros in SHT_NOBITS; fewer where the section ends."""
        section = self.sections[where.section]
        if where.offset < 0 or where.offset >= section.size:
            return b""
        size = min(size, section.size - where.offset)
        if section.type == C.SHT_NOBITS:
            return bytes(size)
        start = section.offset + where.offset
        return self.data[start : start + size]

    def string_at(self, where: Location | Reference, limit: int = 4096) -> str | None:
        """The NUL-terminated string at a place, None when it does not end within ``limit`` bytes or the section."""
        raw, end, _ = self.bytes_at(where, limit).partition(b"\0")
        return raw.decode("utf-8", "surrogateescape") if end else None

    @cached_property
    def modinfo(self) -> list[tuple[str, str]]:
        """The entries of .modinfo in order; what holds no "=" is none (get_modinfo compares up to the "=")."""
        section = self.modinfo_section
        if section is None:
            return []
        if section.size > MAX_MODINFO:
            raise self.fail(f".modinfo has {section.size} bytes, more than {MAX_MODINFO}")
        entries = []
        for entry in self.contents(section).split(b"\0"):
            key, equals, value = entry.decode("utf-8", "surrogateescape").partition("=")
            if equals:
                entries.append((key, value))
        return entries

    def info(self, tag: str) -> str | None:
        """The first modinfo value of a tag (get_modinfo)."""
        return next((value for key, value in self.modinfo if key == tag), None)

    @property
    def is_livepatch(self) -> bool:
        """Whether modinfo carries the livepatch mark, whatever its value (check_modinfo_livepatch)."""
        return self.info("livepatch") is not None

    @property
    def spec(self) -> bytes | None:
        """The normalised spec of a synthetic module, None in a real one."""
        section = self.any_section(C.SPEC_SECTION)
        return None if section is None else self.contents(section)

    @cached_property
    def symbols(self) -> list[Symbol]:
        """All symbols, the empty one at index 0 included."""
        names = _Names(self, self.strtab.offset, self.strtab.size, "symbol")
        table = self.table(self.symtab, C.SYMBOL_SIZE, MAX_SYMBOLS, "symbols")
        return [
            Symbol(i, names.at(name), value, size, info >> 4, info & 15, shndx)
            for i, (name, info, _, shndx, value, size) in enumerate(struct.iter_unpack("<IBBHQQ", table))
        ]

    def symbol(self, name: str) -> Symbol | None:
        """The first defined symbol of a name."""
        return next((s for s in self.symbols if s.name == name and s.shndx != C.SHN_UNDEF), None)

    @property
    def undefined(self) -> list[tuple[str, bool]]:
        """Symbols that the kernel or another module must supply, and whether each is weak (may be missing)."""
        return [(s.name, s.bind == C.STB_WEAK) for s in self.symbols[1:] if s.shndx == C.SHN_UNDEF]

    @property
    def livepatch_symbols(self) -> list[Symbol]:
        """Symbols that livepatch resolves (SHN_LIVEPATCH)."""
        return [s for s in self.symbols if s.shndx == C.SHN_LIVEPATCH]

    def functions(self) -> Iterator[Symbol]:
        """The functions that the module defines."""
        count = len(self.sections)
        for symbol in self.symbols:
            if symbol.type == C.STT_FUNC and 0 < symbol.shndx < count:
                yield symbol

    def function_at(self, where: Location | Reference) -> str | None:
        """Name of the function that starts at a place; None in a stripped module."""
        return self._functions.get((where.section, where.offset))

    @cached_property
    def _functions(self) -> dict[tuple[int, int], str]:
        return {(s.shndx, s.value): s.name for s in reversed(list(self.functions()))}

    # -- relocations ------------------------------------------------------------------------------------------------

    def rela_sections(self, target: int) -> list[Section]:
        """The relocation sections of a section, without livepatch's own."""
        if self._relas is None:
            self._relas = {}
            for section in self.sections[1:]:
                if section.type == C.SHT_RELA and not section.flags & C.SHF_RELA_LIVEPATCH:
                    self._relas.setdefault(section.info, []).append(section)
        return self._relas.get(target, [])

    @property
    def klp_rela_sections(self) -> list[Section]:
        """Relocation sections that livepatch applies (SHF_RELA_LIVEPATCH)."""
        return [s for s in self.sections[1:] if s.flags & C.SHF_RELA_LIVEPATCH]

    def relocations(self, section: Section) -> Iterator[Rela]:
        """The entries of a SHT_RELA section. Raises ModuleFormatError when one names a symbol that does not exist."""
        table = self.table(section, C.RELA_SIZE, MAX_RELOCS, "relocations")
        known = self.symtab.size // C.SYMBOL_SIZE
        for offset, info, addend in struct.iter_unpack("<QQq", table):
            if info >> 32 >= known:
                raise self.fail(f"section {section.name}: a relocation names symbol {info >> 32} of {known}")
            yield Rela(offset, info & 0xFFFFFFFF, info >> 32, addend)

    def pointers(self, section: Section) -> dict[int, Reference]:
        """The relocated 64-bit pointers of a section: offset -> what it points to."""
        found = self._pointers.get(section.number)
        if found is None:
            found = {
                rela.offset: self.reference(rela)
                for part in self.rela_sections(section.number)
                for rela in self.relocations(part)
                if rela.type == C.R_X86_64_64
            }
            self._pointers[section.number] = found
            if sum(map(len, self._pointers.values())) > MAX_POINTERS:
                raise self.fail(f"more than {MAX_POINTERS} relocated pointers in the data")
        return found

    def reference(self, rela: Rela) -> Reference:
        """What a relocation refers to, addend included (for PC-relative ones the bias is left to the caller)."""
        symbol = self.symbols[rela.symbol]
        if 0 < symbol.shndx < len(self.sections):
            return Reference(symbol.shndx, symbol.value + rela.addend, symbol.name)
        return Reference(0, symbol.value + rela.addend, symbol.name)

    @cached_property
    def ftrace_sites(self) -> frozenset[Location]:
        """Places of the calls that ftrace knows (__mcount_loc)."""
        section = self.section("__mcount_loc")
        if section is None:
            return frozenset()
        return frozenset(Location(r.section, r.offset) for r in self.pointers(section).values() if r.section)

    # -- tables -----------------------------------------------------------------------------------------------------

    @property
    def has_versions(self) -> bool:
        """Whether the module carries symbol versions, so that the release in vermagic does not count."""
        return self.section("__versions") is not None

    @cached_property
    def versions(self) -> dict[str, int]:
        """CRC of each imported symbol, from __versions or the extended sections of later kernels."""
        out: dict[str, int] = {}
        section = self.section("__versions")
        if section is not None:
            table = self.table(section, C.MODVERSION_SIZE, MAX_ROWS, "entries")
            for crc, name in struct.iter_unpack("<Q56s", table):
                out.setdefault(name.partition(b"\0")[0].decode("utf-8", "surrogateescape"), crc & 0xFFFFFFFF)
        crcs, names = self.section("__version_ext_crcs"), self.section("__version_ext_names")
        if crcs is not None and names is not None:
            if names.size > MAX_NAMES:
                raise self.fail(f"section {names.name}: {names.size} bytes, more than {MAX_NAMES}")
            rows = self.table(crcs, 4, MAX_ROWS, "entries")
            text = self.contents(names).split(b"\0", len(rows) // 4)
            for name, (crc,) in zip(text, struct.iter_unpack("<I", rows), strict=False):
                out.setdefault(name.decode("utf-8", "surrogateescape"), crc)
        return out

    @cached_property
    def exports(self) -> list[ModuleExport]:
        """Symbols that the module exports (__ksymtab and __ksymtab_gpl with relative references)."""
        out = []
        for suffix, gpl in (("", False), ("_gpl", True)):
            section = self.section("__ksymtab" + suffix)
            if section is None:
                continue
            refs = {
                rela.offset: self.reference(rela)
                for part in self.rela_sections(section.number)
                for rela in self.relocations(part)
                if rela.type == C.R_X86_64_PC32
            }
            table = self.section("__kcrctab" + suffix)
            crcs = self.contents(table) if table is not None else b""
            for row in range(len(self.table(section, C.KSYMTAB_SIZE, MAX_ROWS, "entries")) // C.KSYMTAB_SIZE):
                value, name = refs.get(row * C.KSYMTAB_SIZE), refs.get(row * C.KSYMTAB_SIZE + 4)
                text = self.string_at(name) if name is not None and name.section else None
                if value is None or not text:
                    raise self.fail(f"section {section.name}: entry {row} has no value or no name")
                crc = struct.unpack_from("<I", crcs, 4 * row)[0] if len(crcs) >= 4 * row + 4 else None
                out.append(ModuleExport(text, value, gpl, crc))
        return out

    @cached_property
    def params(self) -> list[ModuleParam]:
        """The module's parameters in the order of __param."""
        section = self.section("__param")
        if section is None:
            return []
        refs = self.pointers(section)
        types = dict(value.partition(":")[::2] for key, value in self.modinfo if key == "parmtype")
        contents = self.table(section, C.PARAM_SIZE, MAX_ROWS, "entries")
        out = []
        for row in range(len(contents) // C.PARAM_SIZE):
            base = row * C.PARAM_SIZE
            name = refs.get(base + C.PARAM_NAME)
            text = self.string_at(name) if name is not None and name.section else None
            if not text:
                raise self.fail(f"section __param: entry {row} has no name")
            (perm,) = struct.unpack_from("<H", contents, base + C.PARAM_PERM)
            ops, arg = refs.get(base + C.PARAM_OPS), refs.get(base + C.PARAM_ARG)
            out.append(self._param(text, perm & 0o7777, ops, arg, types.get(text)))
        return out

    def _param(
        self, name: str, perm: int, ops: Reference | None, arg: Reference | None, declared: str | None
    ) -> ModuleParam:
        """Tell a parameter's type by its operations; ``declared`` is what modinfo says."""
        kind = "unknown"
        if ops is not None:
            kind = _type_of(ops)
        length, place = 0, arg
        if ops is not None and not ops.section and ops.symbol == "param_array_ops":
            # struct kparam_array: max, elemsize, num, ops, elem
            kind = (declared or "").removeprefix("array of ")
            kind = kind if kind in _KNOWN_TYPES else "unknown"
            if arg is not None and arg.section:
                head = self.bytes_at(arg, 8)
                length = struct.unpack("<I", head[:4])[0] if len(head) == 8 else 0
                refs = self.pointers(self.sections[arg.section])
                inner, place = refs.get(arg.offset + 16), refs.get(arg.offset + 24)
                if inner is not None:
                    kind = _type_of(inner)
            return ModuleParam(name, kind, perm, length, self._array_default(kind, arg, length), ops, place)
        if kind == "string" and arg is not None and arg.section:  # struct kparam_string: maxlen, string
            head = self.bytes_at(arg, 4)
            length = struct.unpack("<I", head)[0] if len(head) == 4 else 0
            place = self.pointers(self.sections[arg.section]).get(arg.offset + 8)
        return ModuleParam(name, kind, perm, length, self._default(kind, place), ops, arg)

    def _array_default(self, kind: str, arg: Reference | None, length: int) -> str | None:
        """The values that an array has, as many as its counter says, or all where there is no counter."""
        size, _ = _PARAM_TYPES.get(kind, (0, False))
        if arg is None or not arg.section or not 0 < length <= MAX_ROWS:
            return None
        refs = self.pointers(self.sections[arg.section])
        counter, first = refs.get(arg.offset + 8), refs.get(arg.offset + 24)
        if counter is not None and counter.section:
            length = min(length, int.from_bytes(self.bytes_at(counter, 4), "little"))
        if first is None or not first.section or not size:
            return None
        values = [self._default(kind, first._replace(offset=first.offset + i * size)) for i in range(length)]
        return ",".join(value for value in values if value is not None)

    def _default(self, kind: str, place: Reference | None) -> str | None:
        if place is None or not place.section:
            return None
        if kind == "charp":
            text = self.pointers(self.sections[place.section]).get(place.offset)
            return self.string_at(text) if text is not None and text.section else ""
        if kind == "string":
            return self.string_at(place)
        size, signed = _PARAM_TYPES.get(kind, (0, False))
        raw = self.bytes_at(place, size)
        if not size or len(raw) < size:
            return None
        number = int.from_bytes(raw, "little", signed=signed)
        if kind == "bool":
            return "Y" if number else "N"
        if kind == "invbool":
            return "N" if number else "Y"
        return f"{number:#x}" if kind == "hexint" else str(number)


_PARAM_TYPES = {
    "bool": (1, False), "invbool": (1, False), "byte": (1, False), "short": (2, True), "ushort": (2, False),
    "int": (4, True), "uint": (4, False), "hexint": (4, False), "long": (8, True), "ulong": (8, False),
    "ullong": (8, False),
}  # fmt: skip
_KNOWN_TYPES = _PARAM_TYPES.keys() | {"bint", "bool_enable_only", "charp", "string"}


def _type_of(ops: Reference) -> str:
    """The type that a parameter's operations are those of."""
    if ops.section:
        return "custom"
    kind = ops.symbol.removeprefix("param_ops_")
    return kind if kind in _KNOWN_TYPES and kind != ops.symbol else "unknown"


class _Names:
    """Strings of a string table, with a budget: names may overlap, and a file may hold very many of them."""

    def __init__(self, module: ElfModule, start: int, size: int, what: str) -> None:
        self.module = module
        self.start = start
        self.end = start + size
        self.what = what
        self.seen: dict[int, str] = {}
        self.left = MAX_NAMES

    def at(self, offset: int) -> str:
        """The string at an offset, "" beyond the table."""
        name = self.seen.get(offset)
        if name is None:
            start = self.start + offset
            end = self.module.data.find(b"\0", start, self.end)
            end = end if end >= 0 else max(self.end, start)
            self.left -= end - start
            if self.left < 0:
                raise self.module.fail(f"more than {MAX_NAMES} bytes of {self.what} names")
            name = self.seen[offset] = self.module.data[start:end].decode("utf-8", "surrogateescape")
        return name


def _s32(value: int) -> int:
    """An unsigned 32-bit number as %d prints it."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _is_der_sequence(message: bytes) -> bool:
    """Whether bytes are one DER SEQUENCE that fills them."""
    if len(message) < 2 or message[0] != 0x30:
        return False
    length, start = message[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(message[2:start], "big")
    return start + length == len(message)
