"""The daemon's side of module execution: calls into emulated code, and what comes back meanwhile.

Model
    :meth:`Cpu.call` starts an emulated thread and serves it until it returns: events are answered by
    :mod:`klpfs.cpu.events` in the trio task that made the call, sleeps are slept here on the machine's clock. So a call
    behaves like a function that blocks. While code runs, a clock that jumps to the next deadline does not jump:
    emulated code takes no emulated time, unless it spins.

    A task that runs module code has the call chains of its threads on its stack, as of their last kernel call that may
    block; while its code runs it is on a CPU.

    The death of the sandbox takes the memory of all code with it. The modules that it ran stay as they are after a
    crash of their own: listed, in use, and whatever calls them gets an error. Code that is loaded afterwards runs in a
    new engine with a memory of its own (see :mod:`klpfs.cpu.lazy`); of the old one it sees what the core keeps, and
    nothing that stood in its memory.

Locks
    Trio thread only.

Source
    kernel/sched/core.c in spirit; what a crash does is kernel/exit.c (``make_task_dead``) with the daemon left alive.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import trio

from klpfs.cpu import layout as L
from klpfs.cpu import proto
from klpfs.cpu.events import Events
from klpfs.cpu.heap import HostHeap, PercpuArea
from klpfs.cpu.hoststats import HostStats
from klpfs.cpu.layout import AREAS, U64
from klpfs.cpu.oops import ModuleOops, OopsContext, oops_lines, warn_lines
from klpfs.cpu.process import SandboxProcess
from klpfs.cpu.space import Space, create_memory
from klpfs.cpu.vmlinux import INITIAL_JIFFIES, Vmlinux

if TYPE_CHECKING:
    from klpfs.cpu.code import CpuCode
    from klpfs.elf.reader import ElfModule
    from klpfs.kernel.dynamic_debug import DebugSite
    from klpfs.kernel.module import Module
    from klpfs.kernel.sched import Task
    from klpfs.machine import Machine

__all__ = ["Cpu", "HostThread", "to_errno"]

log = logging.getLogger(__name__)

_NOBODY = proto.TaskInfo(1, 1, "insmod")
"""Whom code runs for when it is called from outside."""
_NS = 1_000_000_000
_MAX_TASKS = 1024
"""How many processes modules see at most: each takes ten kilobytes."""


def to_errno(value: int) -> int:
    """An ``int`` that C code returned: the low 32 bits, signed."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


@dataclass(eq=False)
class HostThread:
    """One call in progress."""

    tid: int
    task: Task | None
    info: proto.TaskInfo
    module: str
    inbox: deque[proto.FromSandbox] = field(default_factory=deque)
    arrived: trio.Event | None = None
    running: bool = True
    chain: list[int] = field(default_factory=list)
    reliable: bool = True

    def post(self, message: proto.FromSandbox) -> None:
        """A message for whoever serves the thread."""
        self.inbox.append(message)
        if self.arrived is not None:
            self.arrived.set()


class Cpu:
    """The execution engine of one machine. Construct inside the machine's block: it starts the sandbox at once.

    *before* is the engine whose place it takes, which is dead.
    """

    def __init__(self, machine: Machine, limits: proto.Limits | None = None, before: Cpu | None = None) -> None:
        while before is not None and not before.modules:
            before = before.before
        self.machine: Machine = machine
        self.before: Cpu | None = before
        self.limits = limits if limits is not None else proto.Limits()
        fd = create_memory()
        try:
            self.space = Space(fd)
            # The same everywhere, so that a run can be repeated; nothing is protected by it.
            seed = hashlib.blake2b(machine.profile.release.encode(), digest_size=24).digest()
            canary = int.from_bytes(seed[16:], "little") & ~0xFF
            self.vmlinux = Vmlinux(
                self.space,
                machine.kallsyms.table,
                machine.profile,
                command_line=machine.procfs.host_file("cmdline").rstrip(b"\n"),
                cpus=machine.sched.cpus,
                canary=canary,
            )
            self.heap = HostHeap(self.space)
            self.percpu = PercpuArea()
            self.host_stats = HostStats(machine, self.space, self.vmlinux)
            self.process = SandboxProcess(fd, self._dispatch, self._on_death)
        finally:
            os.close(fd)
        self.ready = False
        """Whether the sandbox has said that it runs."""
        self.death = ""
        """Why it died."""
        self.confinement: list[str] = []
        self.threads: dict[int, HostThread] = {}
        self.modules: dict[str, CpuCode] = {}
        """Executing modules by name."""
        self.debug_sites: dict[int, DebugSite] = {}
        """The ``pr_debug`` sites of modules, by the address of their descriptor."""
        self._debugging: dict[int, bool] = {}
        self.events = Events(self)
        self._chains: dict[int, list[HostThread]] = {}
        self._next_tid = 1
        self._oopses = 0
        self._jumps = machine.clock.kind == "virtual"
        self._manual = machine.clock.kind == "manual"
        self._boot_realtime = time.time() - machine.clock.now()
        self._used = AREAS["modules"].base
        self._states: dict[int, int] = {}
        self._foreign: dict[str, int] = {}
        self._console: tuple[int, ...] = ()
        self._tasks: list[proto.TaskInfo] = []
        self.send(proto.Start(self.limits, machine.sched.cpus, seed[:16], canary))
        if before is not None:
            self.events.files.devices.take_over(before.events.files.devices)
        machine.ftrace.on_patched.append(self._on_patched)
        machine.ftrace.module_site = self._module_site
        machine.modules.notifier = self._notify_modules
        machine.nursery.start_soon(self.process.run_pump, name="sandbox pump")
        machine.nursery.start_soon(self.process.run_writer, name="sandbox writer")

    # -- the machine's interface ------------------------------------------------------------------------------------

    async def code(self, machine: Machine, elf: ElfModule) -> CpuCode:
        """What runs the module *elf* (see :class:`klpfs.machine.Engine`)."""
        from klpfs.cpu.code import CpuCode

        return CpuCode(machine, elf, self)

    async def aclose(self) -> None:
        """End the sandbox."""
        self.process.close()

    @property
    def alive(self) -> bool:
        """Whether code can be executed."""
        return self.process.alive

    async def started(self) -> bool:
        """Wait until the sandbox runs; whether it does."""
        while self.alive and not self.ready:
            if not self.process.drain(1):
                await trio.lowlevel.checkpoint()  # not idle: the clock must not jump
        self.process.drain(0)  # it may have ended since
        return self.alive

    # -- messages ---------------------------------------------------------------------------------------------------

    def send(self, message: msgspec.Struct) -> None:
        """Send a message to the sandbox, new kernel functions first. Raises OSError(EIO) when it is gone."""
        process, ftrace = self.process, self.machine.ftrace
        try:
            if self.vmlinux.pending:
                items, self.vmlinux.pending = self.vmlinux.pending, []
                if isinstance(message, proto.Start):
                    process.send(message)
                process.send(proto.Stubs(items))
                hooked = ftrace.hooked()
                for addr, _, _ in items:
                    if addr in hooked and addr in self.vmlinux.functions:
                        process.send(proto.Patched(addr, 0, True))  # it was patched before anybody here called it
                if isinstance(message, proto.Start):
                    return
            process.send(message)
        except BrokenPipeError as error:
            raise OSError(errno.EIO, "the execution sandbox is gone") from error

    def _dispatch(self, message: proto.FromSandbox) -> None:
        if isinstance(message, proto.Ready):
            self.ready = True
            self.confinement = message.confinement
            log.info("sandbox ready: %s, confined by %s", message.engine, ", ".join(message.confinement))
            return
        thread = self.threads.get(message.tid)
        if thread is None:
            return  # it was given up
        match message:
            case proto.Print():
                self.machine.printk.printk(message.text, caller=f"T{thread.info.pid}")
            case proto.Warned():
                self._log(warn_lines(message.report, self._context(thread)), thread)
                if message.report.kind == "warn":
                    self.machine.kernel.add_taint("W")
            case proto.Unblock():
                thread.running = True
                thread.post(message)
            case _:
                thread.running = False
                thread.post(message)

    def _on_death(self, why: str) -> None:
        log.error("sandbox lost: %s", why)
        self.death = why
        if self.ready:
            plain = self.machine.printk.logger("")
            plain.emerg(f"klpfs: module execution stopped: the sandbox is gone: {why}")
            shadows = self._drop_shadows()
            if self.modules:
                lost = f", {shadows} shadow variables with it" if shadows else ""
                plain.emerg(f"klpfs: the code of these modules is gone{lost}: {' '.join(self.modules)}")
                plain.emerg("klpfs: they cannot be removed; modules loaded from now on run in a new sandbox")
        for thread in list(self.threads.values()):
            thread.running = False
            if thread.arrived is not None:
                thread.arrived.set()

    def _drop_shadows(self) -> int:
        """Forget the shadow variables whose data and objects were in the memory that is gone; how many."""
        variables = self.machine.livepatch.klp.klp_shadow_hash
        lost = [key for key, shadow in variables.items() if shadow.free == self.events.free_shadow]
        for key in lost:
            del variables[key]
        return len(lost)

    def _log(self, lines: Sequence[tuple[int, str]], thread: HostThread) -> None:
        for level, text in lines:
            self.machine.printk.emit(level, text, caller=f"T{thread.info.pid}")

    def _context(self, thread: HostThread) -> OopsContext:
        machine = self.machine

        def symbol(addr: int) -> str:
            found = machine.kallsyms.lookup(addr)
            return str(found) if found is not None else self._slot(addr)

        def function(addr: int) -> str:
            found = machine.kallsyms.lookup(addr)
            return found.name if found is not None else self._slot(addr)

        listed = "".join(f" {mod.name}{mod.flags()}" for mod in reversed(machine.modules.modules.values()))
        return OopsContext(
            thread.info,
            self._oopses,
            machine.profile.release,
            "",
            machine.kernel.tainted,
            f"Modules linked in:{listed}",
            symbol,
            function,
        )

    def _slot(self, addr: int) -> str:
        return self.vmlinux.name_of(addr) or f"0x{addr:x}"

    # -- the clock and the structures that code may read --------------------------------------------------------------

    def _refresh(self) -> None:
        """What changes by itself: the time, the states of modules, the console's levels."""
        machine, space = self.machine, self.space
        now = machine.clock.now()
        ns = int(now * _NS)
        base = L.TIME_PAGE
        space.store(base + L.TIME_JIFFIES, INITIAL_JIFFIES + int(now * L.HZ))
        space.store(base + L.TIME_MONOTONIC, ns)
        space.store(base + L.TIME_BOOT, ns)
        space.store(base + L.TIME_REAL, int((self._boot_realtime + now) * _NS))
        self.host_stats.refresh()
        for name, mod in machine.modules.modules.items():
            addr = self.struct_module(name)
            if addr:
                state = L.MODULE_STATES[mod.state.upper()]
                if self._states.get(addr) != state:
                    self._states[addr] = state
                    space.put(addr, L.MODULE_STATE, state)
        for addr, site in self.debug_sites.items():
            if self._debugging.get(addr, False) != site.enabled:
                self._debugging[addr] = site.enabled
                self.send(proto.Key(addr + L.DDEBUG_KEY.offset, site.enabled))
        if any(code.lists_tasks for code in self.modules.values()):
            self._list_tasks()
        printk = machine.printk
        levels = (
            printk.console_loglevel,
            printk.default_message_loglevel,
            printk.minimum_console_loglevel,
            printk.default_console_loglevel,
        )
        if levels != self._console:
            self._console = levels
            for i, level in enumerate(levels):
                space.store(self.vmlinux.variable("console_printk") + 4 * i, level, 4)

    def _list_tasks(self) -> None:
        """The processes, for modules that go through them."""
        tasks = [t for t in self.machine.sched.for_each_process_thread() if t.pid == t.tgid and t.pid]
        infos = [proto.TaskInfo(t.pid, t.tgid, t.comm, t.kthread) for t in tasks[:_MAX_TASKS]]
        if infos != self._tasks:
            self._tasks = infos
            self.send(proto.Tasks(infos))

    def _collect(self) -> None:
        """What code may have changed in the kernel's variables."""
        base = self.vmlinux.variable("console_printk")
        levels = tuple(to_errno(self.space.load(base + 4 * i, 4)) for i in range(4))
        if levels != self._console:
            self._console = levels
            printk = self.machine.printk
            (
                printk.console_loglevel,
                printk.default_message_loglevel,
                printk.minimum_console_loglevel,
                printk.default_console_loglevel,
            ) = levels

    def struct_module(self, name: str) -> int:
        """Address of the ``struct module`` of *name*; 0 for a module that is not executed and was not asked for."""
        code = self.modules.get(name)
        return code.this_module if code is not None else self._foreign.get(name, 0)

    def module_address(self, name: str) -> int:
        """As :meth:`struct_module`, made now for a module that is not executed."""
        addr = self.struct_module(name)
        if not addr:
            addr = self._foreign[name] = self.heap.alloc(L.MODULE_SIZE)
            self.space.write(addr + L.MODULE_NAME.offset, name.encode("utf-8", "surrogateescape")[:55])
        return addr

    def module_name(self, addr: int) -> str | None:
        """Whose ``struct module`` is at *addr*."""
        for name in self.machine.modules.modules:
            if self.struct_module(name) == addr:
                return name
        return None

    def forget_module(self, name: str) -> None:
        """A module is gone."""
        self._states.pop(self.struct_module(name), None)
        addr = self._foreign.pop(name, 0)
        if addr:
            self.heap.free(addr)

    def add_debug_site(self, addr: int, site: DebugSite) -> None:
        """*site* has its descriptor at *addr*; it is as its module's file has it."""
        self.debug_sites[addr] = site
        self._debugging[addr] = site.enabled

    def forget_debug_sites(self, base: int, size: int) -> None:
        """A module's memory goes."""
        for addr in [a for a in self.debug_sites if base <= a < base + size]:
            del self.debug_sites[addr], self._debugging[addr]

    async def _notify_modules(self, mod: Module, robust: bool) -> int:
        """Call the notifiers of ``module_notify_list``; 0, or the negative errno of one that refused."""
        chain = self.vmlinux.variable("module_notify_list")
        if not self.alive or not self.space.load(chain + L.BLOCKING_NOTIFIER_HEAD):
            return 0
        states, addr = L.MODULE_STATES, self.module_address(mod.name)
        args = [chain, states[mod.state.upper()], addr]
        name = "blocking_notifier_call_chain"
        if robust:
            name, args = f"{name}_robust", [*args[:2], states["GOING"], addr]
        try:
            answer = to_errno(await self.call(self.vmlinux.function(name), args)) & ~0x8000
        except ModuleOops:
            return 0  # the kernel would have lost the task; the log has it
        return 1 - answer if answer > 1 else 0  # notifier_to_errno()

    # -- patched functions ------------------------------------------------------------------------------------------

    def module_at_address(self, addr: int) -> CpuCode | None:
        """The executing module that *addr* lies in."""
        return next((code for code in self.modules.values() if code.contains(addr)), None)

    def _module_site(self, addr: int) -> bool | None:
        """Whether the compiler left room for a call at the entry of a module's function; not of ``notrace`` ones."""
        for code in self.modules.values():
            if code.contains(addr):
                return bool(code.ftrace_site(addr))
        return self.before._module_site(addr) if self.before is not None else None

    def _on_patched(self, addr: int, on: bool) -> None:
        if not self.alive:
            return
        for code in self.modules.values():
            if code.contains(addr):
                site = code.ftrace_site(addr)
                if site:
                    self._send_patched(proto.Patched(addr, site, on))
                return
        if self.vmlinux.name_of(addr) is not None:
            self._send_patched(proto.Patched(addr, 0, on))

    def _send_patched(self, message: proto.Patched) -> None:
        try:
            self.send(message)
        except OSError:
            pass  # no code to redirect any more, which is nothing to whoever patches

    # -- stacks -----------------------------------------------------------------------------------------------------

    def stack_of(self, task: Task) -> list[int]:
        """Addresses that *task* has on its stack in module code, innermost first."""
        threads = self._chains.get(id(task), ())
        return [addr for thread in reversed(threads) for addr in thread.chain]

    def _push(self, thread: HostThread) -> None:
        task = thread.task
        if task is None:
            return
        threads = self._chains.setdefault(id(task), [])
        threads.append(thread)
        if len(threads) == 1:
            task.code_fn = lambda: self.stack_of(task)
            task.on_interrupt = self._interrupt

    def _pop(self, thread: HostThread) -> None:
        task = thread.task
        if task is None:
            return
        threads = self._chains[id(task)]
        threads.remove(thread)
        task.reliable = all(t.reliable for t in threads)
        if not threads:
            del self._chains[id(task)]
            task.code_fn = task.on_interrupt = None

    def _interrupt(self, task: Task) -> None:
        """``set_notify_signal``: what it sleeps in ends if it is interruptible, and ``signal_pending`` is true."""
        if self.alive:
            self._refresh()
            self.send(proto.Nudge(task.pid, signal=True))

    # -- calls ------------------------------------------------------------------------------------------------------

    def _open(self, addr: int, args: Sequence[int], task: Task | None, module: str) -> HostThread:
        if not self.alive:
            raise OSError(errno.EIO, "the execution sandbox is gone")
        if not module:
            found = self.machine.kallsyms.lookup(addr)
            module = (found.modname if found is not None else None) or ""
        info = _NOBODY
        if task is not None:
            info = proto.TaskInfo(task.pid, task.tgid, task.comm, task.kthread)
        thread = HostThread(self._next_tid, task, info, module)
        self._next_tid += 1
        self._refresh()
        self.send(proto.Call(thread.tid, addr, [arg & U64 for arg in args], info, module))
        self.threads[thread.tid] = thread
        return thread

    async def call(self, addr: int, args: Sequence[int] = (), task: Task | None = None, *, module: str = "") -> int:
        """Call the function at *addr*; what it returned, as an unsigned 64-bit number.

        It runs for *task* (default: the current one). Raises :class:`ModuleOops` when it crashed (the log has the
        report), OSError(EIO) when the sandbox is gone.
        """
        if task is None:
            task = self.machine.sched.current
        thread = self._open(addr, args, task, module)
        self._push(thread)
        try:
            return await self._serve(thread)
        except BaseException:
            if self.alive:
                self.send(proto.Kill(thread.tid))
            raise
        finally:
            self.threads.pop(thread.tid, None)
            self._pop(thread)
            self._collect()

    def call_now(self, addr: int, args: Sequence[int] = (), *, module: str = "") -> int:
        """Call a function that neither blocks nor needs the core, synchronously. Raises as :meth:`call`, and
        OSError(EWOULDBLOCK) for one that does."""
        thread = self._open(addr, args, self.machine.sched.current, module)
        try:
            deadline = time.monotonic() + 5
            while not thread.inbox and self.alive and time.monotonic() < deadline:
                self.process.drain(100)
            message = thread.inbox.popleft() if thread.inbox else None
            match message:
                case proto.Done():
                    return message.value
                case proto.Died():
                    raise self._oops(thread, message.report)
            if self.alive:
                self.send(proto.Kill(thread.tid))
            raise OSError(errno.EWOULDBLOCK, f"the function at {addr:#x} waits for something")
        finally:
            self.threads.pop(thread.tid, None)

    async def _serve(self, thread: HostThread) -> int:
        while True:
            message = await self._next(thread)
            match message:
                case proto.Done():
                    return message.value
                case proto.Died():
                    raise self._oops(thread, message.report)
                case proto.Event():
                    await self._event(thread, message)
                case proto.Block():
                    await self._block(thread, message)

    async def _next(self, thread: HostThread) -> proto.FromSandbox:
        while not thread.inbox:
            if not self.alive:
                raise OSError(errno.EIO, "the execution sandbox died")
            if thread.running and self.process.drain(1):
                continue
            task, was = thread.task, False
            if task is not None and thread.running:
                was, task.on_cpu = task.on_cpu, True
            try:
                if thread.running and self._jumps:
                    # Not idle: the clock must not jump while code runs.
                    await trio.lowlevel.checkpoint()
                    continue
                thread.arrived = trio.Event()
                await thread.arrived.wait()
            finally:
                thread.arrived = None
                if task is not None:
                    task.on_cpu = was
        return thread.inbox.popleft()

    def _note_stack(self, thread: HostThread, stack: list[int], reliable: bool) -> None:
        # a kernel function that module code is in is known by its beginning; on a stack are addresses behind a call
        thread.chain, thread.reliable = [self.vmlinux.return_address(addr) for addr in stack], reliable
        if thread.task is not None:
            thread.task.reliable = all(t.reliable for t in self._chains.get(id(thread.task), ()))

    async def _event(self, thread: HostThread, message: proto.Event) -> None:
        if message.stack is not None:
            self._note_stack(thread, message.stack, message.reliable)
        self._collect()
        value = await self.events.handle(thread, message)
        self._refresh()
        thread.running = True
        self.send(proto.Answer(thread.tid, value))

    async def _block(self, thread: HostThread, message: proto.Block) -> None:
        self._note_stack(thread, message.stack, message.reliable)
        self._collect()
        if message.state == "R":
            await self._spin(message.timeout or 0)
        else:
            task = thread.task
            before = task.state if task is not None else ""
            if task is not None:
                task.state = message.state
            try:
                limit = trio.CancelScope()
                if message.timeout is not None:
                    limit.deadline = trio.current_time() + message.timeout / _NS
                with limit:
                    while not thread.inbox and self.alive:
                        thread.arrived = trio.Event()
                        await thread.arrived.wait()
            finally:
                thread.arrived = None
                if task is not None:
                    task.state = before
            if thread.inbox or not self.alive:
                return
        self._refresh()
        thread.running = True
        self.send(proto.Wake(thread.tid, message.seq))

    async def _spin(self, nanoseconds: int) -> None:
        """Code is busy: that takes time on a clock that would otherwise stand still meanwhile."""
        if self._manual or (not nanoseconds and not self._jumps):
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(max(nanoseconds / _NS, 1 / L.HZ if not nanoseconds else 0))

    def _oops(self, thread: HostThread, report: proto.Report) -> ModuleOops:
        kernel = self.machine.kernel
        self._oopses += 1
        lines, summary = oops_lines(report, self._context(thread))
        self._log(lines, thread)
        kernel.add_taint("D", lockdep_ok=True)
        log.warning("module code crashed: %s", summary)
        return ModuleOops(errno.EFAULT, summary, report)

    # -- functions with buffers -------------------------------------------------------------------------------------

    async def call_show(self, addr: int, task: Task | None = None, *, private: int = 0, token: int = 1) -> bytes:
        """Call ``int show(struct seq_file *, void *)``; what it printed. Raises OSError as it answered."""
        size = L.PAGE_SIZE
        while True:
            seq, buf = self.heap.alloc(L.SEQ_FILE_SIZE), self.heap.alloc(size)
            try:
                self.space.put(seq, L.SEQ_BUF, buf)
                self.space.put(seq, L.SEQ_SIZE, size)
                self.space.put(seq, L.SEQ_PRIVATE, private)
                answer = to_errno(await self.call(addr, [seq, token], task))
                count = self.space.get(seq, L.SEQ_COUNT)
                data = self.space.read(buf, min(count, size))
            finally:
                self.heap.free(seq)
                self.heap.free(buf)
            if answer < 0:
                raise OSError(-answer, f"show answered {answer}")
            if count < size or size >= 1 << 21:
                return data
            size *= 2  # seq_read(): once more with a larger buffer

    async def call_kobj_show(self, show: int, kobj: int, attr: int, task: Task | None = None) -> bytes:
        """Call a ``show`` of ``struct kobj_attribute`` (or of sysfs_ops). Raises OSError as it answered."""
        buf = self.heap.alloc(L.PAGE_SIZE)
        try:
            answer = to_errno(await self.call(show, [kobj, attr, buf], task))
            if answer >= L.PAGE_SIZE:
                where = self.machine.kallsyms.lookup(show)
                self.machine.printk.emit(-1, f"fill_read_buffer: {where} returned bad count")
                answer = L.PAGE_SIZE - 1
            data = self.space.read(buf, max(answer, 0))
        finally:
            self.heap.free(buf)
        if answer < 0:
            raise OSError(-answer, f"show answered {answer}")
        return data

    async def call_kobj_store(self, store: int, kobj: int, attr: int, data: bytes, task: Task | None = None) -> int:
        """Call a ``store``; the bytes that it took. Raises OSError as it answered."""
        buf = self.heap.alloc(max(len(data) + 1, L.PAGE_SIZE), data)
        try:
            answer = await self.call(store, [kobj, attr, buf, len(data)], task)
        finally:
            self.heap.free(buf)
        if answer >> 63:
            raise OSError((1 << 64) - answer, "store refused")
        return min(answer, len(data))

    def clear_memory(self, base: int, size: int) -> None:
        """Zero a stretch of the module area, as far as a module was there before."""
        end = min(base + size, self._used)
        for at in range(base, end, 1 << 20):
            self.space.fill(at, min(1 << 20, end - at))
        self._used = max(self._used, base + size)
