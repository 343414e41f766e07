"""A module whose code is executed.

Model
    :class:`CpuCode` lays a real module out in the shared memory, relocates it, tells the sandbox, and runs its
    functions through :class:`klpfs.cpu.host.Cpu`. Parameters live in the module's variables: they are set by the
    functions of their type (or the module's own), and read where they stand.

Locks
    None of its own.

Source
    kernel/module/main.c (``move_module``, ``apply_relocations``, ``post_relocation``, ``do_init_module``,
    ``free_module``), kernel/module/strict_rwx.c, kernel/trace/ftrace.c (``ftrace_module_init``), kernel/params.c,
    kernel/livepatch/core.c (``klp_write_section_relocs``).
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from klpfs.cpu import layout as L
from klpfs.cpu import link, proto
from klpfs.cpu.host import to_errno
from klpfs.cpu.layout import AREAS, PROT_EXEC, PROT_READ, PROT_WRITE, U64
from klpfs.cpu.space import BadAddress
from klpfs.elf import layout as elf_layout
from klpfs.elf import layouts as elf
from klpfs.elf.klp import parse_symbol_name
from klpfs.kernel.dynamic_debug import DebugSite
from klpfs.loader import ElfCode

if TYPE_CHECKING:
    from klpfs.cpu.host import Cpu
    from klpfs.elf.reader import ElfModule, Section
    from klpfs.kernel.module import Module
    from klpfs.kernel.sched import Task
    from klpfs.machine import Machine

__all__ = ["CpuCode"]

_MAX_SIZE = 256 << 20
"""Most bytes that a module may have in memory; the kernel would run out of it at some point, too."""
_NOP5 = bytes.fromhex("0f1f440000")
_ENDBR64 = bytes.fromhex("f30f1efa")
_PROTECTION = {
    elf_layout.TEXT: PROT_READ | PROT_EXEC,
    elf_layout.DATA: PROT_READ | PROT_WRITE,
    elf_layout.RODATA: PROT_READ,
    elf_layout.RO_AFTER_INIT: PROT_READ | PROT_WRITE,
    elf_layout.INIT_TEXT: PROT_READ | PROT_EXEC,
    elf_layout.INIT_DATA: PROT_READ | PROT_WRITE,
    elf_layout.INIT_RODATA: PROT_READ,
}
_INTEGERS = {
    # getter: size in bytes, signed, format
    "param_get_byte": (1, False, "d"),
    "param_get_short": (2, True, "d"),
    "param_get_ushort": (2, False, "d"),
    "param_get_int": (4, True, "d"),
    "param_get_uint": (4, False, "d"),
    "param_get_long": (8, True, "d"),
    "param_get_ulong": (8, False, "d"),
    "param_get_ullong": (8, False, "d"),
    "param_get_hexint": (4, False, "#08x"),
}
_FLAG = {"param_get_bool": "NY", "param_get_invbool": "YN"}


class CpuCode(ElfCode):
    """A module executed by *cpu*."""

    executes = True

    def __init__(self, machine: Machine, elf: ElfModule, cpu: Cpu) -> None:
        super().__init__(machine, elf)
        self.cpu = cpu
        self.this_module = 0
        """Address of its ``struct module``."""
        self._name = elf.name
        self.lists_tasks = any(name == "init_task" for name, _ in elf.undefined)
        """Whether it may go through the list of all processes."""
        self._regions: dict[int, tuple[int, int]] = {}
        """Memory type to address and size, as long as it is mapped."""
        self._base = 0
        self._sites: list[int] = []
        self._percpu: tuple[int, int] = (0, 0)
        self._kernel_params: dict[str, int] = {}
        self._token = trio.lowlevel.current_trio_token()

    @property
    def dead(self) -> bool:
        """Whether the sandbox that had it in memory is gone."""
        return not self.cpu.alive

    # -- loading ----------------------------------------------------------------------------------------------------

    async def load(self, mod: Module) -> None:
        """Place, relocate, map. Raises OSError: ENOEXEC for a relocation, ENOMEM for a module too large."""
        cpu, module = self.cpu, self.elf
        if not cpu.alive:
            raise OSError(errno.EIO, "the execution sandbox is gone")
        if sum(self.layout.sizes.values()) > _MAX_SIZE:
            raise OSError(errno.ENOMEM, f"{self._name}: more than {_MAX_SIZE} bytes")
        percpu = module.section(".data..percpu")
        if percpu is not None:
            self._percpu = cpu.percpu.alloc(percpu.size, percpu.align, self._name)
            self.addresses[percpu.number] = self._percpu[0]
        await super().load(mod)
        self._base = base = mod.base
        try:
            if base + self._size > AREAS["modules"].end:
                raise OSError(errno.ENOMEM, f"{self._name}: {self._size} bytes do not fit into the module area")
            for kind, size in sorted(self.layout.sizes.items()):
                self._regions[kind] = (base, size)
                base += size
            self._copy(module, percpu)
            self._relocate(module)
            self._finalize(module)
        except OSError as error:
            if isinstance(error, link.RelocationError):
                for line in error.lines:
                    self.machine.printk.logger("").err(line)
            self._release(mod)
            raise
        self._register(mod, module)
        self.release_elf()

    def _copy(self, module: ElfModule, percpu: Section | None) -> None:
        space = self.cpu.space
        self.cpu.clear_memory(self._base, self._size)
        for section in module.sections:
            address = self.addresses.get(section.number)
            if address is None or section is percpu or section.type == elf.SHT_NOBITS:
                continue
            if section is module.symtab or section is module.strtab:
                continue  # nobody reads them in memory
            if section.size:
                space.write(address, module.contents(section))
        if percpu is not None:
            for cpu in range(L.NR_CPUS):
                where = AREAS["percpu"].base + cpu * L.PERCPU_SIZE + self._percpu[0]
                space.write(where, module.contents(percpu) if percpu.type != elf.SHT_NOBITS else bytes(percpu.size))

    def _symbol_values(self, module: ElfModule) -> Callable[[int], int]:
        """``simplify_symbols``: the value of a symbol, by its number."""
        known: dict[int, int] = {}

        def value(number: int) -> int:
            if number not in known:
                symbol = module.symbols[number]
                if symbol.shndx == elf.SHN_UNDEF:
                    known[number] = self._resolve(symbol.name) if symbol.name else 0
                elif symbol.shndx == elf.SHN_ABS:
                    known[number] = symbol.value
                elif symbol.shndx == elf.SHN_LIVEPATCH:
                    known[number] = 0
                else:
                    known[number] = self.addresses.get(symbol.shndx, 0) + symbol.value
            return known[number]

        return value

    def _resolve(self, name: str) -> int:
        """The address of a symbol that others define; 0 for a weak one that nobody does."""
        usable = self.cpu.vmlinux.symbol(name)
        if usable is not None:
            return usable
        for mod in self.machine.modules.modules.values():
            for export in mod.image.exports:
                if export.name == name and mod.state not in ("unformed", "going"):
                    if mod.code.dead:
                        self.machine.printk.logger("klpfs: ").err(
                            f"{self._name}: {name} is of module {mod.name}, whose code is gone with its sandbox"
                        )
                        raise OSError(errno.EIO, f"{name} is gone")
                    return export.value
        found = self.machine.kallsyms.table.lookup(name)
        area = AREAS["data"]
        if found and area.base <= found[0].address < area.end:  # where emulated variables stand
            return self.cpu.vmlinux.missing_variable(name) or found[0].address
        if found:
            return found[0].address
        return self.cpu.vmlinux.unsupported(name) if self.machine.kallsyms.table.exported(name) is not None else 0

    def _relocate(self, module: ElfModule) -> None:
        values = self._symbol_values(module)
        for section in module.sections[1:]:
            address = self.addresses.get(section.number)
            if address is None:
                continue
            for part in module.rela_sections(section.number):
                link.apply(self.cpu.space, self._name, module.relocations(part), address, section.size, values)

    def _finalize(self, module: ElfModule) -> None:
        """Turn calls of __fentry__ into nops, and find what is found by address later on."""
        space = self.cpu.space
        for site in module.ftrace_sites:
            address = self.addresses.get(site.section, 0) + site.offset
            if self.contains(address) and space.read(address, 1) == b"\xe8":
                space.write(address, _NOP5)
                self._sites.append(address)
        self._sites.sort()
        this = module.section(".gnu.linkonce.this_module")
        assert this is not None  # the reader refused the file otherwise
        self.this_module = self.addresses[this.number]
        space.put(self.this_module, L.MODULE_KLP, module.is_livepatch)
        params = module.section("__param")
        if params is not None and params.number in self.addresses:
            base = self.addresses[params.number]
            space.put(self.this_module, L.MODULE_KP, base)
            space.put(self.this_module, L.MODULE_NUM_KP, params.size // L.PARAM_SIZE)
            for row in range(base, base + params.size - L.PARAM_SIZE + 1, L.PARAM_SIZE):
                try:
                    name = space.cstring(space.get(row, L.PARAM_NAME), 256)
                except BadAddress:
                    continue
                self._kernel_params[name.decode("utf-8", "surrogateescape")] = row
        if self._percpu[1]:
            space.put(self.this_module, L.MODULE_PERCPU, self._percpu[0])
            space.put(self.this_module, L.MODULE_PERCPU_SIZE, self._percpu[1])

    def _table(self, module: ElfModule, name: str) -> tuple[int, int]:
        section = module.section(name)
        if section is None or section.number not in self.addresses:
            return 0, 0
        return self.addresses[section.number], section.size

    def _register(self, mod: Module, module: ElfModule) -> None:
        cpu = self.cpu
        cpu.send(proto.Map([(base, size, _PROTECTION[kind]) for kind, (base, size) in self._regions.items()]))
        functions = sorted(
            (symbol.value, symbol.size, symbol.name)
            for symbol in mod.image.symbols
            if symbol.type.lower() in "tw" and symbol.size and self.contains(symbol.value)
        )
        ip, ip_size = self._table(module, ".orc_unwind_ip")
        entries, size = self._table(module, ".orc_unwind")
        count = min(ip_size // 4, size // L.ORC_ENTRY_SIZE)
        cpu.send(
            proto.ModuleInfo(
                self._name,
                self.this_module,
                list(self._regions.values()),
                functions,
                (ip, entries, count),
                self._table(module, "__jump_table"),
                self._table(module, "__bug_table"),
            )
        )
        cpu.modules[self._name] = self
        self._add_debug_sites(module)

    def _add_debug_sites(self, module: ElfModule) -> None:
        """``ddebug_add_module``: the ``pr_debug`` calls of the module."""
        space, debug = self.cpu.space, self.machine.dynamic_debug
        sites = []
        base, size = self._table(module, "__dyndbg")
        for row in range(base, base + size - L.DDEBUG_SIZE + 1, L.DDEBUG_SIZE):
            try:
                filename, modname, function, text = (
                    space.cstring(space.get(row, field)).decode("utf-8", "surrogateescape")
                    for field in (L.DDEBUG_FILENAME, L.DDEBUG_MODNAME, L.DDEBUG_FUNCTION, L.DDEBUG_FORMAT)
                )
            except BadAddress:
                continue
            bits = space.get(row, L.DDEBUG_BITS)
            site = DebugSite(debug, filename, bits & 0x3FFFF, modname, function, text)
            site.flags = bits >> 24
            self.cpu.add_debug_site(row, site)
            sites.append(site)
        debug.add_module(self._name, sites)

    def contains(self, addr: int) -> bool:
        """Whether *addr* lies in this module."""
        return self._base <= addr < self._base + self._size

    def ftrace_site(self, function: int) -> int:
        """Where a call of the function at *function* can be redirected; 0 if it cannot (``ftrace_location``)."""
        if not self.contains(function):
            return 0
        space = self.cpu.space
        site = function + 4 if space.read(function, 4) == _ENDBR64 else function
        i = bisect_left(self._sites, site)
        return site if i < len(self._sites) and self._sites[i] == site else 0

    # -- running ----------------------------------------------------------------------------------------------------

    async def init(self, mod: Module) -> int:
        """Run the init function; then its own memory goes. Raises OSError(EFAULT) when it crashed."""
        function = self.cpu.space.get(self.this_module, L.MODULE_INIT)
        answer = to_errno(await self.cpu.call(function, module=self._name)) if function else 0
        if answer >= 0 and self.cpu.alive:
            self._free_init()
        return answer

    def _free_init(self) -> None:
        gone = [self._regions.pop(kind) for kind in elf_layout.INIT_TYPES if kind in self._regions]
        sealed = self._regions.get(elf_layout.RO_AFTER_INIT)
        if gone or sealed:
            self.cpu.send(proto.Unmap(gone + ([sealed] if sealed else [])))
        if sealed:
            self.cpu.send(proto.Map([(*sealed, PROT_READ)]))

    async def exit(self, mod: Module) -> None:
        """Run the exit function. Raises OSError(EFAULT) when it crashed."""
        function = self.cpu.space.get(self.this_module, L.MODULE_EXIT)
        if function:
            await self.cpu.call(function, module=self._name)

    async def free(self, mod: Module) -> None:
        """Unmap and forget."""
        self._release(mod)

    def _release(self, mod: Module) -> None:
        cpu = self.cpu
        registered = cpu.modules.get(self._name) is self
        if registered:
            cpu.forget_module(self._name)
            del cpu.modules[self._name]
        if registered and cpu.alive:
            cpu.send(proto.ModuleGone(self._name))
            cpu.send(proto.Unmap(list(self._regions.values())))
        self._regions.clear()
        cpu.events.forget_region(self._base, self._size, self._name)
        cpu.forget_debug_sites(self._base, self._size)
        if self._percpu[1]:
            cpu.percpu.free(self._percpu[0])
            self._percpu = (0, 0)
        self.machine.modules.module_free(mod.base, self._size)

    async def call(self, addr: int, args: Sequence[int], task: Task | None) -> int:
        """Run the function at *addr*; its result as a ``long``."""
        value = await self.cpu.call(addr, args, task, module=self._name)
        return value - (1 << 64) if value >> 63 else value

    async def show(self, addr: int, task: Task | None) -> bytes:
        """Run a seq_file show function; what it printed."""
        return await self.cpu.call_show(addr, task)

    # -- klp relocations --------------------------------------------------------------------------------------------

    async def apply_relocs(self, mod: Module, objname: str | None) -> None:
        """Write the klp relocations against *objname*. Raises OSError: EINVAL for a symbol, ENOEXEC for a place."""
        if mod.is_livepatch and self._elf is not None:
            self._klp_relocs(objname, link.apply)

    async def clear_relocs(self, mod: Module, objname: str | None) -> None:
        """Undo :meth:`apply_relocs`."""
        if mod.is_livepatch and self._elf is not None:
            try:
                self._klp_relocs(objname, link.clear)
            except OSError:
                pass  # the log has it; klp_clear_object_relocs() has nobody to tell

    def _klp_relocs(self, objname: str | None, write: Callable[..., None]) -> None:
        module, vmlinux = self.elf, self.cpu.vmlinux
        for section, symbols in self.resolve_klp(objname):
            for number in symbols:
                found, name, _ = parse_symbol_name(module.symbols[number].name)
                usable = vmlinux.symbol(name) if found == "vmlinux" else None
                if usable is not None:
                    symbols[number] = usable
            target = module.sections[section.info]
            address = self.addresses.get(target.number)
            if address is None:
                continue
            try:
                write(
                    self.cpu.space, self._name, module.relocations(section), address, target.size, symbols.__getitem__
                )
            except link.RelocationError as error:
                for line in error.lines:
                    self.machine.printk.logger("").err(line)
                raise
            finally:
                if target.executable:
                    self.cpu.send(proto.Flush(address, target.size))

    # -- parameters -------------------------------------------------------------------------------------------------

    async def param_set(self, mod: Module, name: str, text: str | None) -> None:
        """Set a parameter through its type's function. Raises OSError as that answers."""
        row = self._kernel_params[name]
        space = self.cpu.space
        function = space.get(space.get(row, L.PARAM_OPS), L.PARAM_OPS_SET)
        if not function:
            raise OSError(errno.EPERM, f"{name} cannot be set")
        data = None if text is None else text.encode("utf-8", "surrogateescape") + b"\0"
        buf = self.cpu.heap.alloc(len(data), data) if data is not None else 0
        try:
            answer = to_errno(await self.cpu.call(function, [buf, row], module=self._name))
        finally:
            if buf:
                self.cpu.heap.free(buf)
        if answer < 0:
            raise OSError(-answer, f"{name}: refused")

    def param_get(self, mod: Module, name: str) -> str:
        """A parameter as text. Callable in any thread. Raises OSError as its type's function answers."""
        row = self._kernel_params[name]
        space = self.cpu.space
        try:
            text = self._show(space.get(row, L.PARAM_OPS), space.get(row, L.PARAM_ARG))
        except BadAddress as error:
            raise OSError(errno.EFAULT, str(error)) from error
        if text is not None:
            return text.decode("utf-8", "surrogateescape")
        try:
            trio.lowlevel.current_trio_token()
        except RuntimeError:
            return trio.from_thread.run_sync(self._run_get, row, trio_token=self._token)
        return self._run_get(row)

    def _show(self, ops: int, arg: int) -> bytes | None:
        """The text of a value of one of the kernel's types; None for others."""
        space = self.cpu.space
        getter = self.cpu.vmlinux.name_of(space.get(ops, L.PARAM_OPS_GET)) or ""
        if getter in _INTEGERS:
            size, is_signed, form = _INTEGERS[getter]
            value = space.load(arg, size)
            if is_signed and value >> 8 * size - 1:
                value -= 1 << 8 * size
            return f"{value:{form}}".encode()
        if getter in _FLAG:
            return _FLAG[getter][bool(space.load(arg, 1))].encode()
        if getter == "param_get_charp":
            at = space.load(arg)
            return space.cstring(at) if at else b"(null)"
        if getter == "param_get_string":
            return space.cstring(space.get(arg, L.PARAM_STRING_STRING))
        if getter == "param_array_get":
            number = space.get(arg, L.PARAM_ARRAY_NUM)
            count = space.load(number, 4) if number else space.get(arg, L.PARAM_ARRAY_MAX)
            first, step = space.get(arg, L.PARAM_ARRAY_ELEM), space.get(arg, L.PARAM_ARRAY_ELEMSIZE)
            items = [
                self._show(space.get(arg, L.PARAM_ARRAY_OPS), (first + i * step) & U64) for i in range(min(count, 4096))
            ]
            return None if None in items else b",".join(item for item in items if item is not None)
        return None

    def _run_get(self, row: int) -> str:
        """A type of the module's own: its code has to run."""
        space = self.cpu.space
        function = space.get(space.get(row, L.PARAM_OPS), L.PARAM_OPS_GET)
        if not function:
            raise OSError(errno.EPERM, "the parameter cannot be read")
        buf = self.cpu.heap.alloc(L.PAGE_SIZE)
        try:
            answer = to_errno(self.cpu.call_now(function, [buf, row], module=self._name))
            if answer < 0:
                raise OSError(-answer, f"get answered {answer}")
            return space.read(buf, min(answer, L.PAGE_SIZE)).decode("utf-8", "surrogateescape").removesuffix("\n")
        finally:
            self.cpu.heap.free(buf)
