"""One emulated machine: boots a kernel with its livepatch core and its part of /sys, /proc and /dev.

Model
    :func:`open_machine` is the boot; everything lives until its block ends. The tree that drivers serve is
    ``machine.kernfs``; files are loaded through :meth:`Machine.init_module` and removed through
    :meth:`Machine.delete_module`, the two system calls.

Locks
    None of its own. All of it on one trio thread.

Source
    init/main.c in spirit.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import trio

from klpfs.kernel.clock import Clock
from klpfs.kernel.dynamic_debug import DynamicDebug
from klpfs.kernel.ftrace import Ftrace
from klpfs.kernel.kallsyms import Kallsyms, SymbolTable
from klpfs.kernel.kernel import Kernel
from klpfs.kernel.locking import Lockdep
from klpfs.kernel.module import Module, Modules
from klpfs.kernel.printk import Printk
from klpfs.kernel.procfs import ProcFs
from klpfs.kernel.profile import DEFAULT_PROFILE, Profile, profile
from klpfs.kernel.sched import Sched
from klpfs.kernel.workqueue import Workqueue
from klpfs.kernfs import Caller, Kernfs, SeqFile
from klpfs.livepatch import Livepatch

if TYPE_CHECKING:
    from klpfs.elf.reader import ElfModule
    from klpfs.loader import ElfCode, Loader

__all__ = ["Engine", "Machine", "open_machine"]

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What executes the code of real modules."""

    async def code(self, machine: Machine, elf: ElfModule) -> ElfCode:
        """Something that runs the module *elf*."""

    async def aclose(self) -> None:
        """Stop executing, for good."""


class Machine:
    """A booted machine. Made by :func:`open_machine`."""

    def __init__(self, nursery: trio.Nursery, profile: Profile, *, cpus: int, table: SymbolTable) -> None:
        self.clock = Clock()
        self.profile = profile
        self.nursery = nursery
        self.lockdep = Lockdep()
        self.kernfs = Kernfs(self.lockdep)
        self.dev_alias = ""
        """Another directory for the nodes of devices, where nobody sees ``dev/`` of the tree."""
        self.dev_node: Callable[[str, bool], Awaitable[str]] | None = None
        """Makes a device's node, which is in that directory, appear in the real /dev, or go; why not."""
        self.sched = Sched(self.clock.now, cpus=cpus)
        self.printk = Printk(self.clock.now)
        self.dynamic_debug = DynamicDebug(self.printk, tid=self._current_tid)
        self.workqueue = Workqueue(nursery, self.sched, self.clock)
        self.kallsyms = Kallsyms(table)
        self.ftrace = Ftrace(self.kallsyms)
        self.kernel = Kernel(
            profile,
            self.clock,
            nursery,
            self.kernfs,
            self.lockdep,
            self.printk,
            self.dynamic_debug,
            self.sched,
            self.workqueue,
            self.kallsyms,
            self.ftrace,
        )
        self.sched.frames = self._frames
        self.modules = self.kernel.modules = Modules(self.kernel)
        self.livepatch = self.modules.livepatch = Livepatch(self.kernel)
        self.procfs = ProcFs(self.kernel)
        self._debugfs()
        self._kmsg()
        plain = self.printk.logger()
        plain.notice(profile.linux_banner.rstrip())
        plain.info(f"smp: Brought up 1 node, {cpus} CPU{'s' if cpus > 1 else ''}")
        self.loader: Loader | None = None
        self.engine: Engine | None = None
        """Executes real modules; None: their metadata alone drives their patches."""
        self._noticed = False

    def _current_tid(self) -> int:
        return self.sched.current.pid if self.sched.current is not None else 1

    def _frames(self, names: str) -> list[int]:
        found = []
        for name in names.split():
            symbols = self.kallsyms.table.lookup(name)
            if symbols:
                # a return address lies behind a call, so inside the function
                found.append(symbols[0].address + min(16, symbols[0].size - 1))
        return found

    def _debugfs(self) -> None:
        where = self.kernfs.make_path("sys/kernel/debug/dynamic_debug")

        async def store(data: bytes, caller: Caller) -> int:
            return self.dynamic_debug.control_write(data)

        control = SeqFile(lambda caller: self.dynamic_debug.control_show().encode("utf-8", "surrogateescape"), store)
        self.kernfs.create_file(where, "control", control, 0o644)

    def _kmsg(self) -> None:
        from klpfs.kernel.devfs import KmsgOps

        self.kmsg = KmsgOps(self.printk)
        node = self.kernfs.create_file(self.kernfs.make_path("dev"), "kmsg", self.kmsg, 0o644)
        self.printk.listeners.append(node.wake_pollers)

    def loader_notice(self) -> None:
        """Say once in the log that the code of real modules is not executed here."""
        if not self._noticed:
            self._noticed = True
            self.printk.logger("klpfs: ").notice(
                "module code is not executed (no unicorn): callbacks and replaced functions have no effect"
            )

    async def init_module(self, data: bytes, args: str = "", *, flags: int = 0) -> Module:
        """``init_module(2)``: load the module that *data* is. Raises OSError with the kernel's errno."""
        from klpfs.loader import Loader

        if not data:
            raise OSError(errno.EINVAL, "an empty file")
        if self.loader is None:
            self.loader = Loader(self)
        image = await self.loader.read(data, flags)
        return await self.modules.load_module(image, args, flags=flags)

    async def delete_module(self, name: str, flags: int = 0) -> None:
        """``delete_module(2)``. Raises OSError with the kernel's errno."""
        await self.modules.delete_module(name, flags)


def shipped_table(profile: Profile) -> SymbolTable:
    """The symbol table that comes with klpfs for *profile*; that of the default profile where it has none of its
    own."""
    from klpfs.elf.symbols import shipped_table as load

    try:
        return load(profile.name)
    except FileNotFoundError:
        return load(DEFAULT_PROFILE)


@asynccontextmanager
async def open_machine(
    kernel: str | Profile = DEFAULT_PROFILE,
    *,
    cpus: int = 2,
    release: str | None = None,
    table: SymbolTable | None = None,
) -> AsyncIterator[Machine]:
    """Boot a machine for the duration of the block.

    *kernel* names a profile; *table* holds the symbols of its vmlinux (default: the shipped table). Raises ValueError
    for an unknown profile or a number of CPUs that makes no sense.
    """
    chosen = kernel if isinstance(kernel, Profile) else profile(kernel, release=release)
    symbols = table if table is not None else shipped_table(chosen)
    try:
        async with trio.open_nursery() as nursery:
            machine = Machine(nursery, chosen, cpus=cpus, table=symbols)
            # A table that klpfs ships is one build of many with the same interface: its CRCs are no reason to refuse.
            machine.kallsyms.check_versions = not getattr(symbols, "shipped", False)
            try:
                yield machine
            finally:
                if machine.engine is not None:
                    with trio.CancelScope(shield=True):
                        await machine.engine.aclose()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # the nursery is ours: an error of the block is the caller's, as it was raised
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
