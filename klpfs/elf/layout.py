"""Where the sections of a module come to lie in memory, and the symbols that kallsyms keeps of it.

The loader sorts the sections into memory types, each a multiple of a page; ``/proc/modules``, ``lsmod`` and
``/sys/module/<name>/coresize`` show the sum of the types that stay. Nothing is copied or relocated here.

Sources: kernel/module/main.c (``layout_sections``, ``simplify_symbols``), kernel/module/kallsyms.c (``layout_symtab``,
``elf_type``, ``is_core_symbol``), kernel/module/strict_rwx.c (``module_enforce_rwx_sections``).
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from klpfs.elf import layouts as C
from klpfs.elf.reader import ElfModule, Section, Symbol

PAGE_SIZE = 4096
#: Bytes of the kernel's module area (MODULES_LEN).
MODULE_AREA = 0x3F000000

#: Memory types (enum mod_mem_type), in the kernel's order.
TEXT, DATA, RODATA, RO_AFTER_INIT, INIT_TEXT, INIT_DATA, INIT_RODATA = range(7)
CORE_TYPES = (TEXT, DATA, RODATA, RO_AFTER_INIT)
INIT_TYPES = (INIT_TEXT, INIT_DATA, INIT_RODATA)
TYPE_NAMES = ("text", "data", "rodata", "ro_after_init", "init_text", "init_data", "init_rodata")

_PASSES = (
    # required flags, forbidden flags, type in the core part, type in the init part
    (C.SHF_EXECINSTR | C.SHF_ALLOC, 0, TEXT, INIT_TEXT),
    (C.SHF_ALLOC, C.SHF_WRITE, RODATA, INIT_RODATA),
    (C.SHF_RO_AFTER_INIT | C.SHF_ALLOC, 0, RO_AFTER_INIT, None),
    (C.SHF_WRITE | C.SHF_ALLOC, 0, DATA, INIT_DATA),
    (C.SHF_ALLOC, 0, DATA, INIT_DATA),
)


class Place(NamedTuple):
    """Where a section lies: memory type and offset in bytes from that type's start."""

    type: int
    offset: int


class ModuleLayout(NamedTuple):
    """The memory of a module: page-rounded size of each type in bytes, and the place of each loaded section."""

    sizes: dict[int, int]
    places: dict[int, Place]

    @property
    def core_size(self) -> int:
        """Bytes that stay after init: what /proc/modules and coresize show."""
        return sum(self.sizes.get(kind, 0) for kind in CORE_TYPES)

    @property
    def init_size(self) -> int:
        """Bytes that are freed after init (initsize)."""
        return sum(self.sizes.get(kind, 0) for kind in INIT_TYPES)

    def address(self, section: int, bases: dict[int, int]) -> int | None:
        """Address of a section when the memory types start at ``bases``; None when it is not loaded.

        A type of no size has no memory: its sections, all of them empty, begin at 0 (``module_memory_alloc``).
        """
        place = self.places.get(section)
        return None if place is None else bases.get(place.type, 0) + place.offset


class CoreSymbol(NamedTuple):
    """A symbol as kallsyms shows it: ``section`` 0 for an absolute or undefined one, ``type`` nm's letter."""

    name: str
    section: int
    value: int
    size: int
    type: str


def section_flags(elf: ElfModule, section: Section) -> int:
    """A section's flags as the loader changes them before the layout."""
    flags = section.flags
    dropped = (elf.modinfo_section, elf.section("__versions"), elf.section(".data..percpu"))
    if any(section is other for other in dropped):
        flags &= ~C.SHF_ALLOC
    elif section.name in (".data..ro_after_init", "__jump_table"):
        flags |= C.SHF_RO_AFTER_INIT
    return flags


def lay_out(elf: ElfModule) -> ModuleLayout:
    """Place the sections.

    Raises ModuleFormatError(ENOEXEC) for a section that is both writable and executable, ENOMEM for sizes that no
    module area holds.
    """
    for section in elf.sections:
        if section.flags & C.SHF_WRITE and section.flags & C.SHF_EXECINSTR:
            log = f"{elf.name}: section {section.name} (index {section.number}) has invalid WRITE|EXEC flags"
            raise elf.fail(f"section {section.name} is writable and executable", log=log)
    flags = [section_flags(elf, section) for section in elf.sections]
    sizes: dict[int, int] = {}
    places: dict[int, Place] = {}

    def place(section: Section, kind: int) -> None:
        start = _align(sizes.get(kind, 0), section.align)
        places[section.number] = Place(kind, start)
        sizes[kind] = start + section.size
        if sizes[kind] > MODULE_AREA:
            raise elf.fail(f"section {section.name} of {section.size} bytes does not fit", number=errno.ENOMEM)

    for init in (False, True):
        for required, forbidden, core_type, init_type in _PASSES:
            kind = init_type if init else core_type
            for section in elf.sections:
                have = flags[section.number]
                if have & required != required or have & forbidden or section.number in places:
                    continue
                if section.name.startswith(".init") == init and kind is not None:
                    place(section, kind)
    _lay_out_symtab(elf, sizes, places)
    return ModuleLayout({kind: _align(size, PAGE_SIZE) for kind, size in sizes.items() if size}, places)


def loaded_sections(elf: ElfModule, layout: ModuleLayout) -> list[Section]:
    """The sections that /sys/module/<name>/sections lists: loaded and not empty."""
    return [section for section in elf.sections if section.number in layout.places and section.size]


def _align(value: int, align: int) -> int:
    """ALIGN(value, align ?: 1)."""
    mask = (align or 1) - 1
    return (value + mask) & ~mask


def _lay_out_symtab(elf: ElfModule, sizes: dict[int, int], places: dict[int, Place]) -> None:
    """Append the tables of symbols: whole in the init part, those that stay in the core part (layout_symtab)."""
    for section in (elf.symtab, elf.strtab):
        start = _align(sizes.get(INIT_DATA, 0), section.align)
        if section is elf.symtab:
            kept = [s for s in elf.symbols if s.number == 0 or elf.is_livepatch or _is_core(s, places)]
            core = _align(sizes.get(DATA, 0), section.align) + len(kept) * C.SYMBOL_SIZE
            core += sum(len(s.name.encode("utf-8", "surrogateescape")) + 1 for s in kept)
            sizes[DATA] = core + len(kept)  # a type letter each
        places[section.number] = Place(INIT_DATA, start)
        sizes[INIT_DATA] = start + section.size
    # struct mod_kallsyms and a type letter for each symbol
    sizes[INIT_DATA] = _align(sizes[INIT_DATA], 8) + 32 + elf.symtab.size // C.SYMBOL_SIZE


def _is_core(symbol: Symbol, places: dict[int, Place]) -> bool:
    """is_core_symbol with CONFIG_KALLSYMS_ALL: named, and in a section that stays."""
    place = places.get(symbol.shndx) if symbol.shndx != C.SHN_UNDEF else None
    return bool(symbol.name) and place is not None and place.type in CORE_TYPES


def kallsyms(elf: ElfModule, layout: ModuleLayout, *, core: bool = True) -> list[CoreSymbol]:
    """The module's symbols as kallsyms has them: while init runs (``core`` False) all, afterwards those that stay.

    A livepatch module keeps all. Symbols without a name are left out.
    """
    keep_all = elf.is_livepatch or not core
    count = len(elf.sections)
    out = []
    for symbol in elf.symbols[1:]:
        if symbol.name and (keep_all or _is_core(symbol, layout.places)):
            section = symbol.shndx if symbol.shndx < count else 0
            out.append(CoreSymbol(symbol.name, section, symbol.value, symbol.size, symbol_type(elf, symbol)))
    return out


def symbol_type(elf: ElfModule, symbol: Symbol) -> str:
    """nm's letter for a module's symbol (elf_type)."""
    if symbol.bind == C.STB_WEAK:
        return "v" if symbol.type == C.STT_OBJECT else "w"
    if symbol.shndx == C.SHN_UNDEF:
        return "U"
    percpu = elf.section(".data..percpu")
    if symbol.shndx == C.SHN_ABS or (percpu is not None and symbol.shndx == percpu.number):
        return "a"
    if symbol.shndx >= min(C.SHN_LORESERVE, len(elf.sections)):
        return "?"
    section = elf.sections[symbol.shndx]
    if section.executable:
        return "t"
    if section.alloc and section.type != C.SHT_NOBITS:
        return "d" if section.flags & C.SHF_WRITE else "r"
    if section.type == C.SHT_NOBITS:
        return "b"
    return "n" if section.name.startswith(".debug") else "?"


def check_symbols(elf: ElfModule) -> None:
    """Refuse symbols that no loader can place (simplify_symbols): common ones, and bad section numbers.

    Raises ModuleFormatError(ENOEXEC) with the kernel's line for the last one.
    """
    error = None
    count = len(elf.sections)
    for symbol in elf.symbols[1:]:
        if symbol.shndx == C.SHN_COMMON and not symbol.name.startswith("__gnu_lto"):
            log = f"{elf.name}: please compile with -fno-common"
            error = elf.fail(f"symbol {symbol.name} is a common one", log=log, level="warning")
        elif symbol.shndx >= count and symbol.shndx not in (C.SHN_ABS, C.SHN_COMMON, C.SHN_LIVEPATCH):
            log = f"{elf.name}: Symbol {symbol.name} has an invalid section index {symbol.shndx} (max {count - 1})"
            error = elf.fail(f"symbol {symbol.name}: there is no section {symbol.shndx}", log=log)
    if error is not None:
        raise error
