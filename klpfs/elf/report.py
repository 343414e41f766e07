"""What a module would do, as data: the report behind ``klpfs inspect``.

The file is read and compared with the target kernel's symbols; nothing of it is executed. The checks are those of
klp_init_object_loaded and klp_find_object_symbol (kernel/livepatch/core.c), of simplify_symbols and check_version
(kernel/module); the loader's verdict itself is left to the loader.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import msgspec

from klpfs.elf import klp
from klpfs.elf import layouts as C
from klpfs.elf.layout import lay_out
from klpfs.elf.reader import ElfModule
from klpfs.elf.symbols import SymbolTable

STATIC_DATA = "static data"
KPATCH_TABLES = "kpatch tables"


class FuncReport(msgspec.Struct):
    """A function to be replaced. ``problem`` is "" when it resolves, or when its object has to be loaded first."""

    old_name: str
    sympos: int
    new_symbol: str | None
    address: int | None = None
    size: int | None = None
    problem: str = ""


class ObjectReport(msgspec.Struct):
    """An object; ``callbacks`` gives the function's name for each callback ("?" in a stripped module)."""

    name: str
    functions: list[FuncReport]
    callbacks: dict[str, str]


class StateReport(msgspec.Struct):
    """A system state that the patch modifies."""

    id: int
    version: int


class PatchReport(msgspec.Struct):
    """The patch. ``source``: where it was found, STATIC_DATA or KPATCH_TABLES."""

    source: str
    replace: bool
    objects: list[ObjectReport]
    states: list[StateReport]


class RelocReport(msgspec.Struct):
    """A livepatch relocation section, with the symbols that it uses.

    ``unsupported``: those of the kernel whose users klpfs cannot run (None: not known).
    """

    section: str
    object: str
    relocations: int
    symbols: list[str]
    problems: list[str]
    unsupported: list[str] | None = None


class ImportReport(msgspec.Struct):
    """A symbol that the module imports.

    ``exported``: whether the kernel offers it; ``runnable``: whether klpfs can run code that uses it (None: not known).
    """

    name: str
    exported: bool
    gpl_only: bool
    weak: bool
    runnable: bool | None
    problem: str = ""


class ParamReport(msgspec.Struct):
    """A parameter of the module."""

    name: str
    type: str
    perm: str
    max: int
    default: str | None


class ModuleReport(msgspec.Struct):
    """All that the file tells."""

    file: str
    name: str
    kind: str
    version: str
    license: str
    vermagic: str
    kernel: str
    synthetic: bool
    signed: bool
    symbol_versions: bool
    core_size: int
    init_size: int
    params: list[ParamReport]
    patch: PatchReport | None
    relocations: list[RelocReport]
    imports: list[ImportReport]
    exports: list[str]
    problems: list[str]


def examine(
    elf: ElfModule,
    table: SymbolTable,
    *,
    supported: Container[str] | None = None,
    layouts: Mapping[str, C.StructLayout] = C.KLP_LAYOUT,
) -> ModuleReport:
    """The report on a module against the symbols of a kernel.

    ``supported``: names of kernel symbols whose users klpfs can run. Raises ModuleFormatError for a broken file.
    """
    layout = lay_out(elf)
    patch = klp.find_patch(elf, layouts)
    relocations = [_relocations(elf, section.number, table, supported) for section in elf.klp_rela_sections]
    imports = [_import(elf, name, weak, table, supported) for name, weak in dict(elf.undefined).items() if name]
    found = _patch(elf, patch, table) if patch is not None else None
    problems = []
    if elf.is_livepatch and found is None:
        problems.append("no struct klp_patch in the data: the module builds it when it runs")
    if found is not None and not elf.is_livepatch:
        problems.append("a patch in a module that is not marked as a livepatch module (modinfo 'livepatch')")
    if found is not None:
        problems += [
            f"{obj.name}: {func.old_name}: {func.problem}"
            for obj in found.objects
            for func in obj.functions
            if func.problem
        ]
    problems += [f"{part.section}: {problem}" for part in relocations for problem in part.problems]
    problems += [f"{symbol.name}: {symbol.problem}" for symbol in imports if symbol.problem]
    return ModuleReport(
        file=elf.filename,
        name=elf.name,
        kind="livepatch" if elf.is_livepatch else "module",
        version=elf.info("version") or "",
        license=elf.info("license") or "",
        vermagic=elf.info("vermagic") or "",
        kernel=table.release,
        synthetic=elf.spec is not None,
        signed=elf.signature is not None,
        symbol_versions=elf.has_versions,
        core_size=layout.core_size,
        init_size=layout.init_size,
        params=[ParamReport(p.name, p.type, f"{p.perm:04o}", p.max, p.default) for p in elf.params],
        patch=found,
        relocations=relocations,
        imports=imports,
        exports=[export.name for export in elf.exports],
        problems=problems,
    )


def resolve(table: SymbolTable, name: str, sympos: int) -> tuple[int, int, str]:
    """Address, size and problem ("" for none) of a function of vmlinux that is to be patched."""
    found = table.lookup(name)
    if not found:
        return 0, 0, "not found in the kernel's symbol table"
    if sympos == 0 and len(found) > 1:
        return 0, 0, f"ambiguous: {len(found)} symbols have this name, sympos must say which"
    if sympos > len(found):
        return 0, 0, f"position {sympos} not found: {len(found)} symbols have this name"
    entry = found[max(sympos, 1) - 1]
    if not table.has_ftrace(entry.address):
        return entry.address, entry.size, "no ftrace location: it cannot be patched"
    return entry.address, entry.size, ""


def _patch(elf: ElfModule, patch: klp.PatchInfo, table: SymbolTable) -> PatchReport:
    objects = []
    for obj in patch.objects:
        functions = []
        for func in obj.funcs:
            report = FuncReport(func.old_name, func.sympos, func.new_symbol)
            if not func.old_name or func.new_func is None:
                report.problem = "without old name or new function"
            elif obj.name is None:
                address, size, report.problem = resolve(table, func.old_name, func.sympos)
                report.address, report.size = address or None, size or None
            functions.append(report)
        callbacks = {name: elf.function_at(target) or "?" for name, target in obj.callbacks.items()}
        objects.append(ObjectReport(obj.name or "vmlinux", functions, callbacks))
    return PatchReport(
        KPATCH_TABLES if patch.is_kpatch else STATIC_DATA,
        patch.replace,
        objects,
        [StateReport(state.id, state.version) for state in patch.states],
    )


def _relocations(elf: ElfModule, number: int, table: SymbolTable, supported: Container[str] | None) -> RelocReport:
    """One section of livepatch relocations: its symbols, as far as they are known, and its problems."""
    section = elf.sections[number]
    report = RelocReport(section.name, "", section.size // C.RELA_SIZE, [], [])
    kernels: set[str] = set()

    def find(objname: str | None, name: str, sympos: int) -> int:
        if objname is None:
            address, _, problem = resolve_data(table, name, sympos)
            if problem:
                report.problems.append(f"symbol '{name}': {problem}")
            else:
                kernels.add(name)
            return address
        return 0

    used = {rela.symbol for rela in elf.relocations(section)}
    report.symbols = sorted(elf.symbols[symbol].name for symbol in used)
    try:
        report.object = klp.parse_section_name(section.name)
        klp.resolve_symbols(elf, section, find)
    except klp.KlpFormatError as exc:
        report.problems.append(exc.log)
    if supported is not None:
        report.unsupported = sorted(name for name in kernels if name not in supported)
    return report


def resolve_data(table: SymbolTable, name: str, sympos: int) -> tuple[int, int, str]:
    """As :func:`resolve`, for a symbol of any sort, which needs no ftrace location."""
    address, size, problem = resolve(table, name, sympos)
    return address, size, "" if address else problem


def _import(
    elf: ElfModule, name: str, weak: bool, table: SymbolTable, supported: Container[str] | None
) -> ImportReport:
    export = table.exported(name)
    report = ImportReport(
        name,
        exported=export is not None,
        gpl_only=export is not None and export[1],
        weak=weak,
        runnable=None if supported is None else name in supported,
    )
    if export is None:
        if not weak:
            report.problem = "unknown symbol: neither the kernel nor any loaded module exports it"
    elif elf.has_versions and export[0] is not None and not getattr(table, "shipped", False):
        crc = elf.versions.get(name)
        if crc is None:
            report.problem = "no symbol version in the module"
        elif crc != export[0]:
            report.problem = f"symbol version {crc:#010x} in the module, {export[0]:#010x} in the kernel"
    return report


def as_dict(report: ModuleReport) -> dict[str, Any]:
    """The report as plain data, for JSON."""
    data: dict[str, Any] = msgspec.to_builtins(report)
    return data
