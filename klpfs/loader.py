"""From the bytes of a ``.ko`` to what the kernel's module code takes.

Model
    The file is read by :mod:`klpfs.elf`; what runs it is chosen here: a synthetic module is acted out from its spec, a
    real one is executed where an execution engine is there, and else driven by its metadata alone.

Source
    kernel/module/main.c (``elf_validity_cache_copy``, ``layout_and_allocate``, ``simplify_symbols``),
    kernel/module/kallsyms.c (``elf_type``, ``is_core_symbol``).
"""

from __future__ import annotations

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from klpfs.elf import klp as elf_klp
from klpfs.elf import layout as elf_layout
from klpfs.elf.reader import ElfModule, ModuleFormatError, Reference, Section
from klpfs.kernel.kallsyms import SymInfo
from klpfs.kernel.module import Export, Module, ModuleImage, Note
from klpfs.kernel.params import PARAM_TYPES, Param, ParamDesc
from klpfs.kernel.sched import Task
from klpfs.livepatch import KlpCallbacks, KlpFunc, KlpObject, KlpPatch, KlpState

if TYPE_CHECKING:
    from klpfs.machine import Machine

__all__ = ["ElfCode", "Loader", "MetadataCode"]

log = logging.getLogger(__name__)

SHT_NOTE = 7


class ElfCode(ABC):
    """What all ways of running a module share: its place in memory, its symbols and its klp relocations.

    A subclass says what the functions do.
    """

    executes = False

    def __init__(self, machine: Machine, elf: ElfModule) -> None:
        self.machine = machine
        self._elf: ElfModule | None = elf
        self.layout = elf_layout.lay_out(elf)
        self.image: ModuleImage
        self.addresses: dict[int, int] = {}
        """Section number to address."""
        self.params: dict[str, Param] = {}
        self._size = 0

    @property
    def dead(self) -> bool:
        """See :class:`klpfs.kernel.module.ModuleCode`."""
        return False

    @property
    def elf(self) -> ElfModule:
        """The file."""
        assert self._elf is not None, "the file was let go"
        return self._elf

    def release_elf(self) -> None:
        """Let go of the file, unless klp relocations will still be read from it."""
        if not self.elf.klp_rela_sections:
            self._elf = None

    async def load(self, mod: Module) -> None:
        """``layout_and_allocate``: choose addresses, give them to sections, symbols and exports."""
        elf, image, layout = self.elf, mod.image, self.layout
        self._size = sum(layout.sizes.values())
        mod.base = base = self.machine.modules.module_alloc(self._size)
        bases = {}
        for kind, size in sorted(layout.sizes.items()):
            bases[kind], base = base, base + size
        for section in elf.sections:
            address = layout.address(section.number, bases)
            if address is not None:
                self.addresses[section.number] = address
        image.sections = [(s.name, self.addresses[s.number]) for s in elf_layout.loaded_sections(elf, layout)]
        exported = {e.name for e in elf.exports}

        def symbols(*, core: bool) -> list[SymInfo]:
            return [
                SymInfo(
                    sym.name,
                    self.addresses.get(sym.section, 0) + sym.value,
                    sym.size,
                    sym.type.upper() if sym.name in exported else sym.type,
                )
                for sym in elf_layout.kallsyms(elf, layout, core=core)
                if sym.type != "U"
            ]

        image.symbols = symbols(core=False)
        if layout.init_size and not elf.is_livepatch:
            image.core_symbols = symbols(core=True)
        image.exports = [Export(e.name, self.reference_address(e.location), e.gpl) for e in elf.exports]

    def reference_address(self, where: Reference) -> int:
        """The address of a place in the module's file; 0 for one that is not loaded."""
        base = self.addresses.get(where.section)
        return 0 if base is None else base + where.offset

    async def free(self, mod: Module) -> None:
        """Give the memory back."""
        self.machine.modules.module_free(mod.base, self._size)

    @abstractmethod
    async def init(self, mod: Module) -> int:
        """See :class:`klpfs.kernel.module.ModuleCode`; this and the others below."""

    @abstractmethod
    async def exit(self, mod: Module) -> None: ...

    @abstractmethod
    async def call(self, addr: int, args: Sequence[int], task: Task | None) -> int: ...

    @abstractmethod
    async def show(self, addr: int, task: Task | None) -> bytes: ...

    # -- klp relocations --------------------------------------------------------------------------------------------

    def resolve_klp(self, objname: str | None) -> list[tuple[Section, dict[int, int]]]:
        """The klp relocation sections against *objname*, each with the addresses of its symbols (by number).

        Raises OSError(EINVAL), having logged why.
        """
        livepatch = self.machine.livepatch
        try:
            return [
                (section, elf_klp.resolve_symbols(self.elf, section, livepatch.find_object_symbol))
                for section in elf_klp.sections_of(self.elf, objname)
            ]
        except elf_klp.KlpFormatError as error:
            livepatch.klp.log.err(error.log)
            raise

    async def apply_relocs(self, mod: Module, objname: str | None) -> None:
        """Resolve the symbols of the klp relocations; whoever executes the code writes them, too."""
        if mod.is_livepatch and self._elf is not None:
            self.resolve_klp(objname)

    async def clear_relocs(self, mod: Module, objname: str | None) -> None:  # noqa: B027 - nothing was written
        """Undo :meth:`apply_relocs`, for those that write."""

    # -- parameters -------------------------------------------------------------------------------------------------

    async def param_set(self, mod: Module, name: str, text: str) -> None:
        """See :class:`klpfs.kernel.module.ModuleCode`."""
        self.params[name].set(text, self.machine.printk.logger(""))

    def param_get(self, mod: Module, name: str) -> str:
        """See :class:`klpfs.kernel.module.ModuleCode`."""
        return self.params[name].show().decode("utf-8", "surrogateescape").removesuffix("\n")


class MetadataCode(ElfCode):
    """A real module without an engine to execute it: its patch is enabled as its data describe it.

    Callbacks and replaced functions do nothing; the log says so once.
    """

    async def init(self, mod: Module) -> int:
        """Enable the patch found in the module's data. -ENOEXEC where it is built by code only."""
        self.machine.loader_notice()
        if not any(name == "klp_enable_patch" for name, _ in self.elf.undefined):
            return 0
        info = elf_klp.find_patch(self.elf)
        if info is None:
            self.machine.printk.logger("klpfs: ").err(
                f"{mod.name}: no struct klp_patch in its data; executing its init needs unicorn (klpfs[exec])"
            )
            return -errno.ENOEXEC
        objects = []
        for obj in info.objects:
            funcs = []
            for func in obj.funcs:
                addr = self.reference_address(func.new_func) if func.new_func is not None else 0
                funcs.append(KlpFunc(func.old_name, addr, func.sympos))
            objects.append(KlpObject(obj.name, funcs, KlpCallbacks()))
        states = [KlpState(s.id, s.version) for s in info.states]
        try:
            await self.machine.livepatch.klp_enable_patch(KlpPatch(mod, objects, states, info.replace))
        except OSError as error:
            return -(error.errno or errno.EINVAL)
        return 0

    async def exit(self, mod: Module) -> None:
        """Nothing to run."""

    async def call(self, addr: int, args: Sequence[int], task: Task | None) -> int:
        """Raises OSError(ENOSYS): nothing here executes code."""
        raise OSError(errno.ENOSYS, f"function at {addr:#x}: executing module code needs unicorn (klpfs[exec])")

    async def show(self, addr: int, task: Task | None) -> bytes:
        """Raises OSError(ENOSYS): nothing here executes code."""
        raise OSError(errno.ENOSYS, f"function at {addr:#x}: executing module code needs unicorn (klpfs[exec])")


class Loader:
    """Reads module files for one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    async def read(self, data: bytes, flags: int = 0) -> ModuleImage:
        """The module that *data* is. Raises OSError(ENOEXEC), its log line written."""
        try:
            elf = ElfModule.parse(data)
            elf_layout.check_symbols(elf)
            code = await self._code(elf)
        except ModuleFormatError as error:
            if error.log:
                plain = self.machine.printk.logger("")
                (plain.err if error.level == "err" else plain.warn)(error.log)
            raise
        params = [_param(p.name, p.type, p.perm, p.max, p.default) for p in elf.params]
        code.params = {desc.name: Param(desc) for desc in params}
        names = {sym.name for sym in elf.symbols if sym.shndx}
        code.image = ModuleImage(
            elf.name,
            elf.modinfo,
            code,
            core_size=code.layout.core_size,
            init_size=code.layout.init_size,
            notes=[Note(s.name, elf.contents(s)) for s in elf.sections if s.type == SHT_NOTE and s.alloc and s.size],
            undefined=elf.undefined,
            versions=elf.versions,
            params=params,
            signed=False,
            has_init="init_module" in names,
            has_exit="cleanup_module" in names,
        )
        return code.image

    async def _code(self, elf: ElfModule) -> ElfCode:
        if elf.spec is not None:
            from klpfs.spec import SpecError, from_json
            from klpfs.synthetic import SyntheticCode

            try:
                return SyntheticCode(self.machine, elf, from_json(elf.spec, elf.name))
            except SpecError as error:
                raise OSError(errno.ENOEXEC, str(error)) from error
        engine = self.machine.engine
        if engine is not None:
            return await engine.code(self.machine, elf)
        return MetadataCode(self.machine, elf)


def _param(name: str, kind: str, perm: int, length: int, default: str | None) -> ParamDesc:
    if kind not in PARAM_TYPES or (kind == "string" and not length):
        # a type of the module's own takes any text; its functions are executed where code is
        return ParamDesc(name, "charp", perm, max=0 if kind == "string" else length)
    desc = ParamDesc(name, kind, perm, max=length)
    if default is None or (desc.is_array and not default):
        return desc
    value = Param(desc)
    try:
        value.set(default)
    except OSError:  # what stands in the file breaks the type's rules; nobody has set it by them
        return desc
    return ParamDesc(name, kind, perm, default=value.shown, max=length)
