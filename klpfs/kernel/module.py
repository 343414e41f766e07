"""Modules: loading, references, parameters, removal, and what /sys/module and /proc/modules show of them.

Model
    A module comes as a :class:`ModuleImage`, read from a file by somebody else, with a :class:`ModuleCode` that runs
    it. :meth:`Modules.load_module` takes it through the kernel's steps in the kernel's order, so that the first
    complaint is the kernel's first complaint: version magic, name in use, taints, unknown symbols, patches of the
    coming module, parameters, init.

Locks
    ``module_mutex`` is the absence of ``await``: checks and changes of the list are atomic on the trio thread.
    Nothing is held while module code runs.

Source
    kernel/module/main.c (``load_module``, ``do_init_module``, ``delete_module``), kernel/module/sysfs.c,
    kernel/module/procfs.c, kernel/module/version.c, kernel/module/decompress.c (``compression_show``).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from klpfs.kernel.kallsyms import SymInfo
from klpfs.kernel.kernel import TAINT_LETTERS, Kernel
from klpfs.kernel.params import ParamDesc, parse_module_args
from klpfs.kernfs import Attribute, KernfsNode

if TYPE_CHECKING:
    from klpfs.kernel.sched import Task
    from klpfs.livepatch import Livepatch

__all__ = ["Export", "Module", "ModuleCode", "ModuleImage", "Modules", "Note"]

log = logging.getLogger(__name__)

MODULE_AREA = 0xFFFFFFFFC0000000
"""Where modules lie (arch/x86/include/asm/pgtable_64_types.h ``MODULES_VADDR``)."""

GPL_COMPATIBLE = {"GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"}
"""include/linux/license.h."""

RESOLVE_TIMEOUT = 30
"""Seconds that a module waits for the owner of a symbol to initialise (``resolve_symbol_wait``)."""

MODULE_INIT_IGNORE_MODVERSIONS = 1
MODULE_INIT_IGNORE_VERMAGIC = 2


def _line(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape") + b"\n"


def _reachable(name: str) -> bool:
    """Whether a path can lead to an entry *name*. The kernel makes the others, too, and nobody can open them."""
    return 0 < len(os.fsencode(name)) <= 255 and name not in (".", "..") and "/" not in name


class ModuleCode(Protocol):
    """What runs a module. Functions answer as C functions do: 0 or a negative errno.

    *executes*: it runs machine code, which reads the structures of the kernel that it is handed.
    """

    executes: bool

    @property
    def dead(self) -> bool:
        """Whether what ran it is gone, so that none of its functions can be called any more."""

    async def load(self, mod: Module) -> None:
        """Place and relocate the module. Raises OSError(ENOEXEC)."""

    async def init(self, mod: Module) -> int:
        """Run ``module_init``."""

    async def exit(self, mod: Module) -> None:
        """Run ``module_exit``."""

    async def free(self, mod: Module) -> None:
        """The memory of the module goes."""

    async def param_set(self, mod: Module, name: str, text: str) -> None:
        """Set a parameter from text. Raises OSError (EINVAL, ERANGE, ENOSPC)."""

    def param_get(self, mod: Module, name: str) -> str:
        """A parameter as text, without the newline."""

    async def apply_relocs(self, mod: Module, objname: str | None) -> None:
        """Write the klp relocations against *objname* (None: vmlinux). Raises OSError(EINVAL, ENOEXEC)."""

    async def clear_relocs(self, mod: Module, objname: str | None) -> None:
        """Undo :meth:`apply_relocs`."""

    async def call(self, addr: int, args: Sequence[int], task: Task | None) -> int:
        """Run the function at *addr*."""

    async def show(self, addr: int, task: Task | None) -> bytes:
        """Run the seq_file show function at *addr*; what it printed."""


@dataclass(frozen=True, slots=True)
class Export:
    """An exported symbol."""

    name: str
    value: int
    gpl: bool


@dataclass(frozen=True, slots=True)
class Note:
    """A note section: what /sys/module/<name>/notes/ shows."""

    name: str
    data: bytes


@dataclass(eq=False)
class ModuleImage:
    """A module as read from its file. Sizes in bytes; ``sections`` are ``(name, address)``, filled in by ``code.load``
    together with the values of ``symbols``; ``undefined`` are ``(name, weak)``; ``versions`` the CRCs of
    ``__versions``."""

    name: str
    modinfo: list[tuple[str, str]]
    code: ModuleCode
    core_size: int = 16384
    init_size: int = 0
    sections: list[tuple[str, int]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    symbols: list[SymInfo] = field(default_factory=list)
    core_symbols: list[SymInfo] | None = None
    """The symbols that stay when init is through (``core_kallsyms``); None: all of them."""
    undefined: list[tuple[str, bool]] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    exports: list[Export] = field(default_factory=list)
    params: list[ParamDesc] = field(default_factory=list)
    signed: bool = False
    has_init: bool = True
    has_exit: bool = True

    def get_modinfo(self, key: str) -> str | None:
        """``get_modinfo``: the first value of *key*."""
        return next((value for tag, value in self.modinfo if tag == key), None)


@dataclass(eq=False)
class Module:
    """``struct module``. ``state`` is ``unformed``, ``coming``, ``live`` or ``going``; ``refcnt`` counts users, as
    ``/sys/module/<name>/refcnt`` shows it."""

    name: str
    image: ModuleImage
    kernel: Kernel
    state: str = "unformed"
    refcnt: int = 0
    taints: int = 0
    klp_alive: bool = False
    is_livepatch: bool = False
    using_gplonly: bool = False
    using: list[Module] = field(default_factory=list)
    holders: list[Module] = field(default_factory=list)
    base: int = 0
    init_freed: bool = False
    node: KernfsNode | None = None
    holders_dir: KernfsNode | None = None
    finished: trio.Event = field(default_factory=trio.Event)
    args: str = ""

    @property
    def code(self) -> ModuleCode:
        """What runs it."""
        return self.image.code

    def taint_letters(self) -> str:
        """``module_flags_taint``."""
        return "".join(letter for bit, letter in enumerate(TAINT_LETTERS) if self.taints >> bit & 1)

    def tainted(self, letter: str) -> bool:
        """Whether the module taints the kernel with the flag that *letter* stands for."""
        return bool(self.taints >> TAINT_LETTERS.index(letter) & 1)

    def flags(self) -> str:
        """``module_flags``: what /proc/modules and oopses show behind a module."""
        if not self.taints and self.state == "live":
            return ""
        sign = {"going": "-", "coming": "+"}.get(self.state, "")
        return f"({self.taint_letters()}{sign})"

    @property
    def total_size(self) -> int:
        """``module_total_size``, in bytes."""
        return self.image.core_size + (0 if self.init_freed else self.image.init_size)


class Modules:
    """All modules of one kernel, newest first as in the kernel's list."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.livepatch: Livepatch | None = None
        self.modules: dict[str, Module] = {}
        self.notifier: Callable[[Module, bool], Awaitable[int]] | None = None
        """What calls the notifiers that modules registered; the bool: those told are told of the end, too."""
        self._log = kernel.printk.logger("")
        self._root = kernel.kernfs.make_path("sys/module")
        if kernel.profile.module_compression:
            show = partial(_line, kernel.profile.module_compression)
            kernel.kernfs.create_file(self._root, "compression", Attribute(show, None), 0o444)
        self._next_addr = MODULE_AREA
        self._free: dict[int, list[int]] = {}
        self._once: set[str] = set()

    # -- the list ---------------------------------------------------------------------------------------------------

    def find_module(self, name: str) -> Module | None:
        """``find_module``: the module called *name*, unless it is not formed yet."""
        mod = self.modules.get(name)
        return None if mod is None or mod.state == "unformed" else mod

    def module_alloc(self, size: int) -> int:
        """Address of *size* free bytes in the module area, page aligned."""
        size = -(-size // 4096) * 4096
        if self._free.get(size):
            return self._free[size].pop()
        addr, self._next_addr = self._next_addr, self._next_addr + size + 4096  # a guard page between two
        return addr

    def module_free(self, addr: int, size: int) -> None:
        """Give back what :meth:`module_alloc` gave."""
        self._free.setdefault(-(-size // 4096) * 4096, []).append(addr)

    def try_module_get(self, mod: Module) -> bool:
        """``try_module_get``: take a reference, unless the module is going."""
        if mod.state in ("going", "unformed"):
            return False
        mod.refcnt += 1
        return True

    def module_put(self, mod: Module) -> None:
        """``module_put``."""
        if not self.kernel.warn_on(mod.refcnt <= 0, "kernel/module/main.c module_put"):
            mod.refcnt -= 1

    # -- loading ----------------------------------------------------------------------------------------------------

    def _add_taint_module(self, mod: Module, letter: str, *, lockdep_ok: bool = True) -> None:
        self.kernel.add_taint(letter, lockdep_ok=lockdep_ok)
        mod.taints |= 1 << TAINT_LETTERS.index(letter)

    def _notice_once(self, key: str, text: str) -> None:
        if key not in self._once:
            self._once.add(key)
            self._log.notice(text)

    def _check_modinfo(self, image: ModuleImage, flags: int) -> bool:
        """``check_modinfo``: version magic. The release counts only when the module carries no symbol versions.

        Returns whether the module is only let in because CONFIG_MODULE_FORCE_LOAD is set, as in Debian's kernels.
        """
        forced = bool(flags & MODULE_INIT_IGNORE_MODVERSIONS)
        if forced:
            # check_modstruct_version(): without versions, module_layout cannot be compared
            image.versions = {}
            self._try_to_force_load(image, "module_layout")
        layout = self.kernel.kallsyms.table.exported("module_layout")
        if layout is not None and not self._same_version(image, "module_layout", layout[0]):
            # check_modstruct_version(): struct module itself is another one
            raise OSError(errno.ENOEXEC, f"{image.name}: module_layout")
        magic = None if flags & MODULE_INIT_IGNORE_VERMAGIC else image.get_modinfo("vermagic")
        if magic is None:
            self._try_to_force_load(image, "bad vermagic")
            return True
        ours = self.kernel.profile.vermagic
        same = magic == ours
        if image.versions:
            same = magic.partition(" ")[2] == ours.partition(" ")[2]
        if not same:
            self._log.err(f"{image.name}: version magic '{magic}' should be '{ours}'")
            raise OSError(errno.ENOEXEC, f"{image.name}: vermagic")
        return forced

    def _try_to_force_load(self, image: ModuleImage, reason: str) -> None:
        if not self.kernel.test_taint("F"):
            self._log.warn(f"{image.name}: {reason}: kernel tainted.")
        self.kernel.add_taint("F", lockdep_ok=False)

    async def _patient_check_exists(self, name: str) -> None:
        old = self.modules.get(name)
        if old is None:
            return
        if old.state in ("coming", "unformed"):
            await old.finished.wait()
            old = self.modules.get(name)
        if old is not None and old.state == "live":
            raise OSError(errno.EEXIST, f"{name} is loaded already")
        raise OSError(errno.EBUSY, f"{name} was just being loaded or removed")

    def _augment_taints(self, mod: Module) -> None:
        """``module_augment_kernel_taints``."""
        image, kernel = mod.image, self.kernel
        prev_proprietary = kernel.test_taint("P")
        if image.get_modinfo("intree") is None:
            if not kernel.test_taint("O"):
                self._log.warn(f"{mod.name}: loading out-of-tree module taints kernel.")
            self._add_taint_module(mod, "O")
        if image.get_modinfo("retpoline") is None:
            self._log.err("Spectre V2 : System may be vulnerable to spectre v2")
            self._log.warn(f"{mod.name}: loading module not compiled with retpoline compiler.")
        if image.get_modinfo("staging") is not None:
            self._add_taint_module(mod, "C")
            self._log.warn(
                f"{mod.name}: module is from the staging directory, the quality is unknown, you have been warned."
            )
        if mod.is_livepatch:
            self._add_taint_module(mod, "K")
            self._notice_once("livepatch", f"{mod.name}: tainting kernel with TAINT_LIVEPATCH")
        license = image.get_modinfo("license") or "unspecified"
        if license not in GPL_COMPATIBLE:
            if not kernel.test_taint("P"):
                self._log.warn(f"{mod.name}: module license '{license}' taints kernel.")
            self._add_taint_module(mod, "P", lockdep_ok=False)
        if image.get_modinfo("test") is not None:
            if not kernel.test_taint("N"):
                self._log.warn(f"{mod.name}: loading test module taints kernel.")
            self._add_taint_module(mod, "N")
        if not image.signed:
            self._notice_once(
                "signature",
                f"{mod.name}: module verification failed: signature and/or required key missing - tainting kernel",
            )
            self._add_taint_module(mod, "E")
        if not prev_proprietary and kernel.test_taint("P"):
            self._log.warn(f"{mod.name}: module license taints kernel.")

    def _resolve_symbol(self, mod: Module, name: str) -> bool:
        """``resolve_symbol``: whether the exported *name* is there for *mod*, which from then on uses its owner.

        Raises OSError: EINVAL another version, ENOENT the owner is going, EBUSY it is not initialised yet.
        """
        gpl_ok = not mod.tainted("P")
        found = self.kernel.kallsyms.table.exported(name)
        if found is not None:
            crc, gpl_only = found
            if gpl_only and not gpl_ok:
                return False
            mod.using_gplonly |= gpl_only
            self._check_version(mod, name, crc)
            return True
        for owner in self.modules.values():
            if owner.state == "unformed":
                continue
            for export in owner.image.exports:
                if export.name == name and (gpl_ok or not export.gpl):
                    mod.using_gplonly |= export.gpl
                    if not self._inherit_taint(mod, owner, name):
                        return False
                    self._ref_module(mod, owner)
                    return True
        return False

    def _inherit_taint(self, mod: Module, owner: Module, name: str) -> bool:
        """``inherit_taint``: who uses a proprietary module is proprietary, and then may not use GPL-only symbols."""
        if not owner.tainted("P"):
            return True
        if mod.using_gplonly:
            self._log.err(
                f"{mod.name}: module using GPL-only symbols uses symbols {name} from proprietary module {owner.name}."
            )
            return False
        if not mod.tainted("P"):
            self._log.warn(
                f"{mod.name}: module uses symbols {name} from proprietary module {owner.name}, inheriting taint."
            )
            mod.taints |= 1 << TAINT_LETTERS.index("P")
        return True

    def _ref_module(self, mod: Module, owner: Module) -> None:
        """``ref_module``."""
        if owner in mod.using:
            return
        if owner.state == "coming":
            raise OSError(errno.EBUSY, owner.name)
        if not self.try_module_get(owner):
            raise OSError(errno.ENOENT, f"{owner.name} is going")
        mod.using.append(owner)
        owner.holders.insert(0, mod)

    async def _resolve_symbol_wait(self, mod: Module, name: str) -> bool:
        """``resolve_symbol_wait``: give the owner of the symbol half a minute to initialise."""
        deadline = trio.current_time() + RESOLVE_TIMEOUT
        while True:
            try:
                return self._resolve_symbol(mod, name)
            except OSError as error:
                owner = self.modules.get(error.args[1])
                if error.errno != errno.EBUSY or owner is None:
                    raise
                with trio.move_on_at(deadline) as scope:
                    await owner.finished.wait()
                if scope.cancelled_caught:
                    self._log.warn(f"{mod.name}: gave up waiting for init of module {owner.name}.")
                    raise

    def _check_version(self, mod: Module, name: str, crc: int | None) -> None:
        """``check_version``: raises OSError(EINVAL) when the module was built against another CRC.

        One without any versions passes, being a synthetic one or forced.
        """
        if not self._same_version(mod.image, name, crc):
            raise OSError(errno.EINVAL, name)

    def _same_version(self, image: ModuleImage, name: str, crc: int | None) -> bool:
        if not crc or not image.versions or not self.kernel.kallsyms.check_versions:
            return True
        wanted = image.versions.get(name)
        if wanted is None:
            self._log.warn(f"{image.name}: no symbol version for {name}")
        elif wanted != crc:
            self._log.warn(f"{image.name}: disagrees about version of symbol {name}")
        return wanted == crc

    async def _simplify_symbols(self, mod: Module) -> None:
        failure = 0
        for name, weak in mod.image.undefined:
            err = errno.ENOENT
            try:
                if await self._resolve_symbol_wait(mod, name) or weak:
                    continue
            except OSError as error:
                err = error.errno or errno.EINVAL
            self._log.warn(f"{mod.name}: Unknown symbol {name} (err {-err})")
            failure = err
        if failure:
            raise OSError(failure, f"{mod.name}: unresolved symbols")

    def _verify_exported_symbols(self, mod: Module) -> None:
        for export in mod.image.exports:
            owner = next(
                (
                    m
                    for m in self.modules.values()
                    for e in m.image.exports
                    if e.name == export.name and m.state != "unformed"
                ),
                None,
            )
            kernel_has = self.kernel.kallsyms.table.exported(export.name) is not None
            if owner is not None or kernel_has:
                self._log.err(
                    f"{mod.name}: exports duplicate symbol {export.name} (owned by {owner.name if owner else 'kernel'})"
                )
                raise OSError(errno.ENOEXEC, export.name)

    async def load_module(self, image: ModuleImage, args: str = "", *, flags: int = 0) -> Module:
        """``load_module``: take *image* in. Raises OSError with the kernel's errno, the reason being in the log.

        ENOEXEC version magic or relocations, EEXIST or EBUSY a module of that name, ENOENT an unknown symbol, EINVAL,
        ERANGE or ENOSPC a parameter, what a pre-patch callback or the init function answered.
        """
        forced = self._check_modinfo(image, flags)
        await self._patient_check_exists(image.name)
        mod = Module(image.name, image, self.kernel, args=args)
        mod.is_livepatch = image.get_modinfo("livepatch") is not None
        if forced:
            mod.taints |= 1 << TAINT_LETTERS.index("F")
        mod.refcnt = 1  # module_unload_init(): dropped when init is through
        self.modules[mod.name] = mod
        try:
            await self._load(mod, args)
        finally:
            mod.finished.set()
        return mod

    async def _load(self, mod: Module, args: str) -> None:
        livepatch = self.livepatch
        assert livepatch is not None
        loaded = coming = told = False
        try:
            self._augment_taints(mod)
            await self._simplify_symbols(mod)
            await mod.code.load(mod)
            loaded = True
            await mod.code.apply_relocs(mod, None)
            self._verify_exported_symbols(mod)
            self.kernel.kallsyms.add_module(mod.name, mod.image.symbols)
            mod.state = "coming"
            await livepatch.klp_module_coming(mod)
            coming = True
            error = await self.notify(mod, robust=True)
            if error:
                raise OSError(-error, f"{mod.name}: refused by a notifier")
            told = True
            await self._parse_args(mod, args)
            self._sysfs_setup(mod)
        except BaseException:
            with trio.CancelScope(shield=True):
                if mod.state == "coming":
                    mod.state = "going"
                if told:
                    await self.notify(mod)
                if coming:
                    await livepatch.klp_module_going(mod)
                await self._free_module(mod, loaded=loaded)
            raise
        await self._do_init_module(mod)

    async def notify(self, mod: Module, *, robust: bool = False) -> int:
        """Tell ``module_notify_list`` the state of *mod*; 0 or a negative errno. *robust*: take it back if refused."""
        return 0 if self.notifier is None else await self.notifier(mod, robust)

    async def _parse_args(self, mod: Module, args: str) -> None:
        async def set_param(desc: ParamDesc, text: str) -> None:
            await mod.code.param_set(mod, desc.name, text)

        await parse_module_args(
            mod.name,
            args,
            mod.image.params,
            set_param,
            self._log,
            dyndbg=self.kernel.dynamic_debug.dyndbg_param,
            unsafe=lambda: self.kernel.add_taint("U"),
        )

    async def _do_init_module(self, mod: Module) -> None:
        livepatch = self.livepatch
        assert livepatch is not None
        ret = await mod.code.init(mod) if mod.image.has_init else 0
        if ret < 0:
            mod.state = "going"
            mod.refcnt -= 1
            await self.notify(mod)
            await livepatch.klp_module_going(mod)
            await self._free_module(mod, loaded=True)
            raise OSError(-ret, f"{mod.name}: init answered {ret}")
        if ret > 0:
            self._log.warn(
                f"do_init_module: '{mod.name}'->init suspiciously returned {ret}, it should follow 0/-E convention\n"
                "do_init_module: loading module anyway..."
            )
            self.kernel.dump_stack("do_init_module do_syscall_64 entry_SYSCALL_64_after_hwframe")
        mod.state = "live"
        await self.notify(mod)
        mod.refcnt -= 1
        mod.init_freed = True
        if mod.image.core_symbols is not None:
            mod.image.symbols, mod.image.core_symbols = mod.image.core_symbols, None
            self.kernel.kallsyms.add_module(mod.name, mod.image.symbols)

    async def _free_module(self, mod: Module, *, loaded: bool) -> None:
        """``free_module``."""
        await self._sysfs_teardown(mod)
        mod.state = "unformed"
        self.kernel.dynamic_debug.remove_module(mod.name)
        self.kernel.kallsyms.remove_module(mod.name)
        for used in mod.using:
            used.holders.remove(mod)
            self.module_put(used)
        mod.using.clear()
        if loaded:
            await mod.code.free(mod)
        if self.modules.get(mod.name) is mod:
            del self.modules[mod.name]

    # -- removal ----------------------------------------------------------------------------------------------------

    async def delete_module(self, name: str, flags: int = 0) -> None:
        """``delete_module``: raises OSError: ENOENT unknown, EWOULDBLOCK in use, EBUSY being loaded or removed, or
        without an exit function (unless ``O_TRUNC`` forces it)."""
        forced = bool(flags & os.O_TRUNC)
        mod = self.find_module(name) if name else None
        if mod is None or len(name) >= 56:
            raise OSError(errno.ENOENT, f"{name} is not loaded")
        if mod.holders:
            raise OSError(errno.EWOULDBLOCK, f"{name} is used by {', '.join(m.name for m in mod.holders)}")
        if mod.state != "live":
            raise OSError(errno.EBUSY, f"{name} is {mod.state}")
        if mod.code.dead and (forced or not mod.refcnt):
            # what it entered into the kernel's lists can only be taken out by its exit function
            raise OSError(errno.EBUSY, f"{name}: its code is gone with the sandbox that ran it")
        if mod.image.has_init and not mod.image.has_exit:
            if not forced:
                raise OSError(errno.EBUSY, f"{name} has no exit function")
            self.kernel.add_taint("R", lockdep_ok=False)
        if mod.refcnt:
            if not forced:
                raise OSError(errno.EWOULDBLOCK, f"{name} is in use")
            self.kernel.add_taint("R", lockdep_ok=False)
        mod.state = "going"
        with trio.CancelScope(shield=True):
            if mod.image.has_exit:
                await mod.code.exit(mod)
            await self.notify(mod)
            assert self.livepatch is not None
            await self.livepatch.klp_module_going(mod)
            await self._free_module(mod, loaded=True)

    # -- /sys/module/<name>/ ----------------------------------------------------------------------------------------

    def _sysfs_setup(self, mod: Module) -> None:
        """``mod_sysfs_setup``."""
        kernfs = self.kernel.kernfs
        # kobject_set_name_vargs(): a slash cannot be part of a file name
        mod.node = node = kernfs.create_dir(self._root, mod.name.replace("/", "!"))

        def attr(name: str, mode: int, text: Attribute, where: KernfsNode = node) -> None:
            kernfs.create_file(where, name, text, mode)

        async def uevent_store(data: bytes) -> int:
            action = data.decode("latin-1").split(maxsplit=1)
            known = {"add", "remove", "change", "move", "online", "offline", "bind", "unbind"}
            if not action or action[0] not in known:
                raise OSError(errno.EINVAL, "uevent: unknown action")
            return len(data)

        mod.holders_dir = kernfs.create_dir(node, "holders")
        visible = [p for p in mod.image.params if p.perm and _reachable(p.name)]
        if visible:
            params = kernfs.create_dir(node, "parameters")
            for param in visible:
                attr(param.name, param.perm, self._param_attribute(mod, param), params)
        attr("uevent", 0o200, Attribute(None, uevent_store))
        for key in ("version", "srcversion"):
            value = mod.image.get_modinfo(key)
            if value is not None:
                attr(key, 0o444, Attribute(partial(_line, value), None))
        attr("initstate", 0o444, Attribute(lambda: mod.state.encode() + b"\n", None))
        attr("coresize", 0o444, Attribute(lambda: b"%d\n" % mod.image.core_size, None))
        attr("initsize", 0o444, Attribute(lambda: b"%d\n" % (0 if mod.init_freed else mod.image.init_size), None))
        attr("taint", 0o444, Attribute(lambda: mod.taint_letters().encode() + b"\n", None))
        attr("refcnt", 0o444, Attribute(lambda: b"%d\n" % mod.refcnt, None))
        for used in mod.using:
            if used.holders_dir is not None and _reachable(mod.name):
                kernfs.create_link(used.holders_dir, mod.name, f"../../{mod.name}")
        if mod.image.sections:
            sections = kernfs.create_dir(node, "sections")
            for name, address in mod.image.sections:
                if _reachable(name) and sections.get(name) is None:
                    attr(name, 0o400, Attribute(partial(_line, f"0x{address:016x}"), None), sections)
        if mod.image.notes:
            notes = kernfs.create_dir(node, "notes")
            for note in mod.image.notes:
                if _reachable(note.name) and notes.get(note.name) is None:
                    attr(note.name, 0o444, Attribute(partial(bytes, note.data), None), notes)

    def _param_attribute(self, mod: Module, param: ParamDesc) -> Attribute:
        async def store(data: bytes) -> int:
            # kernel_param_lock and param_attr_store(); a set function sees the text with its newline
            await mod.code.param_set(mod, param.name, data.decode("utf-8", "surrogateescape"))
            return len(data)

        def show() -> bytes:
            text = mod.code.param_get(mod, param.name)
            # an array prints a newline behind its last element only (param_array_get)
            return b"" if param.is_array and not text else text.encode("utf-8", "surrogateescape") + b"\n"

        return Attribute(show if param.perm & 0o444 else None, store if param.perm & 0o222 else None)

    async def _sysfs_teardown(self, mod: Module) -> None:
        for used in mod.using:
            link = used.holders_dir.get(mod.name) if used.holders_dir is not None else None
            if link is not None:
                await self.kernel.kernfs.remove(link)
        if mod.node is not None:
            node, mod.node = mod.node, None
            await self.kernel.kernfs.remove(node)

    # -- /proc/modules ----------------------------------------------------------------------------------------------

    def proc_modules(self, *, show_addresses: bool) -> bytes:
        """The text of /proc/modules; addresses are zero for those who may not see them."""
        lines = []
        for mod in reversed(self.modules.values()):
            if mod.state == "unformed":
                continue
            users = "".join(f"{m.name}," for m in mod.holders)
            if mod.image.has_init and not mod.image.has_exit:
                users += "[permanent],"
            state = {"going": "Unloading", "coming": "Loading"}.get(mod.state, "Live")
            base = mod.base if show_addresses else 0
            taints = f" {mod.flags()}" if mod.taints else ""
            lines.append(f"{mod.name} {mod.total_size} {mod.refcnt} {users or '-'} {state} 0x{base:016x}{taints}\n")
        return "".join(lines).encode("utf-8", "surrogateescape")
