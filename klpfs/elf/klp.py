"""The livepatch in a module: its ``struct klp_patch``, and the module ELF format's sections and symbols.

Two sorts of module are known. In the usual one the structure is static data: a pointer to ``__this_module`` followed
by one to an array of objects; relocations show both, also after ``strip``. kpatch-build's modules build it at run time
from the rows of ``.kpatch.funcs`` and ``.kpatch.callbacks.*``. What is found here is what stands in the file: a
module's init may change it (``replace``, say), and then memory at the call of ``klp_enable_patch`` counts.

Sources: include/linux/livepatch.h, kernel/livepatch/core.c (``klp_resolve_symbols``, ``klp_write_section_relocs``),
Documentation/livepatch/module-elf-format.rst; kpatch: kmod/patch/livepatch-patch-hook.c, kpatch-patch.h.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from klpfs.elf import layouts as C
from klpfs.elf.reader import ElfModule, Location, Reference, Section

#: Objects, functions and states that are decoded at most in a module, false candidates included.
MAX_ROWS = 150_000

CALLBACKS = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")

# as sscanf(".klp.sym.%55[^.].%511[^,],%lu") and sscanf(".klp.rela.%55[^.]") take them; %lu skips white space
_SYMBOL = re.compile(r"\.klp\.sym\.([^.]{1,55})\.([^,]{1,511}),[ \t-\r]*([0-9]+)", re.DOTALL)
_SECTION = re.compile(r"\.klp\.rela\.([^.]{1,55})", re.DOTALL)


class KlpFormatError(OSError):
    """A livepatch section or symbol that the kernel refuses; ``log`` is its line, without the "livepatch: "."""

    def __init__(self, number: int, log: str) -> None:
        super().__init__(number, log)
        self.log = log


class FuncInfo(NamedTuple):
    """``struct klp_func``. ``new_symbol`` is the new function's name, None when the module was stripped."""

    old_name: str
    sympos: int
    new_func: Reference | None
    new_symbol: str | None


class ObjectInfo(NamedTuple):
    """``struct klp_object``; ``name`` None is vmlinux. ``callbacks`` gives the function for each callback there is."""

    name: str | None
    funcs: list[FuncInfo]
    callbacks: dict[str, Reference]


class StateInfo(NamedTuple):
    """``struct klp_state``."""

    id: int
    version: int


class PatchInfo(NamedTuple):
    """``struct klp_patch``. ``location`` is None when the module builds the structure at run time (kpatch)."""

    location: Location | None
    replace: bool
    objects: list[ObjectInfo]
    states: list[StateInfo]

    @property
    def is_kpatch(self) -> bool:
        """Whether this was read from kpatch's tables."""
        return self.location is None


class KlpSymbol(NamedTuple):
    """The parts of a ``.klp.sym.`` name. ``objname`` is "vmlinux" for the kernel."""

    objname: str
    name: str
    sympos: int


def find_patch(elf: ElfModule, layouts: Mapping[str, C.StructLayout] = C.KLP_LAYOUT) -> PatchInfo | None:
    """The patch in a module, or None when there is none. Raises ModuleFormatError for broken tables."""
    if (rows := elf.any_section(".kpatch.funcs")) is not None:
        return _kpatch(elf, rows)
    found = list(find_static(elf, layouts))
    # something else may look like a patch without objects: prefer one that has some
    return next((patch for patch in found if patch.objects), found[0] if found else None)


def find_static(elf: ElfModule, layouts: Mapping[str, C.StructLayout] = C.KLP_LAYOUT) -> Iterator[PatchInfo]:
    """Everything in a module's data that looks like a ``struct klp_patch``."""
    patch = layouts["klp_patch"]
    decoder = _Decoder(elf, layouts)
    this = elf.this_module_section.number
    for section in elf.sections:
        if not section.alloc or section.executable or section.name == "__param":
            continue
        pointers = elf.pointers(section)
        for offset, target in sorted(pointers.items()):
            if target.section != this or target.offset != 0:
                continue
            start = offset - patch.members["mod"]
            if start < 0 or start % 8 or start + patch.size > section.size:
                continue
            decoded = decoder.patch(Location(section.number, start))
            if decoded is not None:
                yield decoded


class _Decoder:
    def __init__(self, elf: ElfModule, layouts: Mapping[str, C.StructLayout]) -> None:
        self.elf = elf
        self.layouts = layouts
        self.left = MAX_ROWS

    def data(self, target: Reference | None) -> bool:
        """Whether a pointer leads to data of the module."""
        if target is None or not 0 < target.section < len(self.elf.sections):
            return False
        section = self.elf.sections[target.section]
        return section.alloc and not section.executable and 0 <= target.offset < max(section.size, 1)

    def pointer(self, where: Location, offset: int) -> Reference | None:
        return self.elf.pointers(self.elf.sections[where.section]).get(where.offset + offset)

    def row(self, where: Location, size: int) -> bool:
        """Whether there is one more row at a place; counts it."""
        self.left -= 1
        if self.left < 0:
            raise self.elf.fail(f"more than {MAX_ROWS} objects, functions and states of livepatches")
        return where.offset + size <= self.elf.sections[where.section].size

    def number(self, where: Location, offset: int, size: int) -> int:
        return int.from_bytes(self.elf.bytes_at(Location(where.section, where.offset + offset), size), "little")

    def patch(self, where: Location) -> PatchInfo | None:
        """Decode a structure, None when it cannot be one."""
        members = self.layouts["klp_patch"].members
        objs = self.pointer(where, members["objs"])
        states = self.pointer(where, members["states"])
        if objs is None or not self.data(objs) or (states is not None and not self.data(states)):
            return None
        objects = self.objects(Location(objs.section, objs.offset))
        if objects is None:
            return None
        replace = bool(self.number(where, members["replace"], 1))
        return PatchInfo(where, replace, objects, self.states(states) if states is not None else [])

    def objects(self, where: Location) -> list[ObjectInfo] | None:
        """klp_for_each_object_static: up to one with neither functions nor a name."""
        size, members = self.layouts["klp_object"].size, self.layouts["klp_object"].members
        offsets = self.layouts["klp_callbacks"].members
        out: list[ObjectInfo] = []
        while self.row(where, size):
            name, funcs = self.pointer(where, members["name"]), self.pointer(where, members["funcs"])
            if name is None and funcs is None:
                return out
            text = None
            if name is not None:
                text = self.elf.string_at(name, C.MODULE_NAME_LEN) if self.data(name) else None
                if not text or not text.isprintable():
                    return None
            rows: list[FuncInfo] | None = []
            if funcs is not None:
                rows = self.funcs(Location(funcs.section, funcs.offset)) if self.data(funcs) else None
            if rows is None:
                return None
            callbacks = {}
            for callback in CALLBACKS:
                target = self.pointer(where, members["callbacks"] + offsets[callback])
                if target is not None:
                    if not target.section or not self.elf.sections[target.section].executable:
                        return None
                    callbacks[callback] = target
            out.append(ObjectInfo(text, rows, callbacks))
            where = Location(where.section, where.offset + size)
        return out or None

    def funcs(self, where: Location) -> list[FuncInfo] | None:
        """klp_for_each_func_static: up to one without old name, new function and position."""
        size, members = self.layouts["klp_func"].size, self.layouts["klp_func"].members
        out: list[FuncInfo] = []
        while self.row(where, size):
            name, new = self.pointer(where, members["old_name"]), self.pointer(where, members["new_func"])
            sympos = self.number(where, members["old_sympos"], 8)
            if name is None and new is None and not sympos:
                return out
            text = self.elf.string_at(name, 512) if name is not None and self.data(name) else None
            if name is not None and (not text or not text.isprintable()):
                return None
            if new is not None and (not new.section or not self.elf.sections[new.section].executable):
                return None
            out.append(FuncInfo(text or "", sympos, new, self.elf.function_at(new) if new is not None else None))
            where = Location(where.section, where.offset + size)
        return out

    def states(self, target: Reference) -> list[StateInfo]:
        """klp_for_each_state: up to one with id 0."""
        size, members = self.layouts["klp_state"].size, self.layouts["klp_state"].members
        where = Location(target.section, target.offset)
        out: list[StateInfo] = []
        while self.row(where, size):
            number = self.number(where, members["id"], 8)
            if not number:
                break
            out.append(StateInfo(number, self.number(where, members["version"], 4)))
            where = Location(where.section, where.offset + size)
        return out


def _kpatch(elf: ElfModule, section: Section) -> PatchInfo:
    """Read kpatch's tables. Its hook puts each object and function at the head of a list, so the order is reversed."""
    pointers = elf.pointers(section)
    contents = elf.table(section, C.KPATCH_FUNC_SIZE, MAX_ROWS, "functions")
    objects: dict[str, ObjectInfo] = {}

    def object_of(target: Reference | None) -> ObjectInfo:
        name = elf.string_at(target, C.MODULE_NAME_LEN) if target is not None and target.section else None
        if not name:
            raise elf.fail(f"section {section.name}: a row names no object")
        if name not in objects:
            objects[name] = ObjectInfo(None if name == "vmlinux" else name, [], {})
        return objects[name]

    for row in range(len(contents) // C.KPATCH_FUNC_SIZE):
        base = row * C.KPATCH_FUNC_SIZE
        new, name = pointers.get(base), pointers.get(base + 40)
        text = elf.string_at(name, 512) if name is not None and name.section else None
        if not text:
            raise elf.fail(f"section {section.name}: row {row} names no function")
        (sympos,) = struct.unpack_from("<Q", contents, base + 32)
        symbol = elf.function_at(new) if new is not None else None
        object_of(pointers.get(base + 48)).funcs.append(FuncInfo(text, sympos, new, symbol))
    for info in objects.values():
        info.funcs.reverse()
    for callback in CALLBACKS:
        table = elf.any_section(f".kpatch.callbacks.{callback}")
        if table is None:
            continue
        pairs = elf.pointers(table)
        for base, function in sorted(pairs.items()):
            if base % 16 == 0:
                object_of(pairs.get(base + 8)).callbacks[callback] = function
    # KLP_REPLACE_ENABLE, true unless kpatch-build was told otherwise; it is in the code, not in the data
    return PatchInfo(None, True, list(reversed(objects.values())), [])


def parse_symbol_name(name: str) -> KlpSymbol:
    """Take ``.klp.sym.<object>.<symbol>,<sympos>`` apart. Raises KlpFormatError(EINVAL)."""
    match = _SYMBOL.match(name)
    if match is None:
        raise KlpFormatError(errno.EINVAL, f"symbol {name} has an incorrectly formatted name")
    return KlpSymbol(match[1], match[2], int(match[3]) & (1 << 64) - 1)


def parse_section_name(name: str) -> str:
    """The object of ``.klp.rela.<object>.<section>``. Raises KlpFormatError(EINVAL)."""
    match = _SECTION.match(name)
    if match is None:
        raise KlpFormatError(errno.EINVAL, f"section {name} has an incorrectly formatted name")
    return match[1]


def sections_of(elf: ElfModule, objname: str | None) -> list[Section]:
    """The livepatch relocation sections of an object (None: vmlinux) that the loader would apply.

    Raises KlpFormatError(EINVAL) for a malformed name, whichever object is asked for.
    """
    wanted = objname or "vmlinux"
    return [section for section in _applied(elf) if parse_section_name(section.name) == wanted]


def _applied(elf: ElfModule) -> Iterator[Section]:
    """klp sections as apply_relocations() comes upon them: their target has to exist and to be loaded."""
    for section in elf.klp_rela_sections:
        if section.info < len(elf.sections) and elf.sections[section.info].alloc:
            yield section


def resolve_symbols(elf: ElfModule, section: Section, find: Callable[[str | None, str, int], int]) -> dict[int, int]:
    """Resolve the symbols that a livepatch relocation section uses (klp_resolve_symbols): symbol number -> address.

    ``find(objname, name, sympos)`` is the lookup in the object (None: vmlinux) and raises OSError when it fails.
    Raises KlpFormatError(EINVAL) for a symbol that is not marked, has a malformed name, or is one of vmlinux in a
    section of a module.
    """
    sec_objname = parse_section_name(section.name)
    out: dict[int, int] = {}
    for rela in elf.relocations(section):
        if rela.symbol in out:
            continue
        symbol = elf.symbols[rela.symbol]
        if symbol.shndx != C.SHN_LIVEPATCH:
            raise KlpFormatError(errno.EINVAL, f"symbol {symbol.name} is not marked as a livepatch symbol")
        objname, name, sympos = parse_symbol_name(symbol.name)
        if sec_objname != "vmlinux" and objname == "vmlinux":
            raise KlpFormatError(
                errno.EINVAL,
                f"invalid access to vmlinux symbol '{name}' from module-specific livepatch relocation section",
            )
        out[rela.symbol] = find(None if objname == "vmlinux" else objname, name, sympos)
    return out
