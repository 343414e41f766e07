"""The kernel functions that need the machine: events of emulated threads, answered with its core.

Model
    One method for each event; its arguments come from the sandbox, which checked the pointers. An answer is what the
    kernel function returns: a number, an address. Objects of the core that emulated code holds pointers to (kobjects,
    work items, directories) are kept here by address.

Locks
    Runs in the trio task that called the module code, with whatever locks that task holds.

Source
    kernel/livepatch/, kernel/workqueue.c, kernel/time/timer.c, kernel/kthread.c, kernel/module/main.c, kernel/panic.c.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from klpfs.cpu import layout as L
from klpfs.cpu import proto
from klpfs.cpu.api import API
from klpfs.cpu.files import Files
from klpfs.cpu.hoststats import cpu_times
from klpfs.cpu.oops import ModuleOops
from klpfs.kernel.ftrace import FtraceOps
from klpfs.kernel.kernel import TAINT_LETTERS
from klpfs.kernel.workqueue import DelayedWork, Work
from klpfs.livepatch import KlpCallbacks, KlpFunc, KlpObject, KlpPatch, KlpState

if TYPE_CHECKING:
    from klpfs.cpu.host import Cpu, HostThread
    from klpfs.cpu.space import Space
    from klpfs.kernel.module import Module
    from klpfs.kernel.sched import Task

__all__ = ["Events", "PatchMemory"]

log = logging.getLogger(__name__)

Handler = Callable[..., Awaitable[Any]]
_SLEEPS = {"flush_work", "cancel_work_sync", "drain_workqueue", "kthread_stop", "timer_stop"}
_SOFTIRQ_DELAY = 1 / L.HZ


def to_int(value: int) -> int:
    """An ``int`` that C code returned."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def text_of(data: bytes | None) -> str:
    """A C string as the core has it."""
    return (data or b"").decode("utf-8", "surrogateescape")


@dataclass(eq=False)
class PatchMemory:
    """Where the structures of a patch stand, in which memory: ``KlpPatch.priv``."""

    addr: int
    space: Space
    funcs: dict[KlpFunc, int] = field(default_factory=dict)
    states: dict[KlpState, int] = field(default_factory=dict)
    objects: dict[KlpObject, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Timer:
    scope: trio.CancelScope | None = None
    idle: trio.Event = field(default_factory=trio.Event)
    stopped: bool = False
    """Cancelled: a function that runs now does not restart it."""

    def __post_init__(self) -> None:
        self.idle.set()


@dataclass(eq=False)
class _Kthread:
    task: Task
    function: int
    data: int
    module: str
    started: bool = False
    signals: set[int] = field(default_factory=set)
    done: trio.Event = field(default_factory=trio.Event)
    code: int = -errno.EINTR


class Events:
    """Answers the events of one engine."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.machine = cpu.machine
        self.files = Files(cpu)
        self._works: dict[int, Work] = {}
        self._queues: dict[int, set[int]] = {}
        self._timers: dict[int, _Timer] = {}
        self._kthreads: dict[int, _Kthread] = {}
        self._hooks: dict[int, tuple[FtraceOps, str]] = {}
        self._last_hook = 0

    async def handle(self, thread: HostThread, event: proto.Event) -> Any:
        """Do what *event* asks for; the answer. An OSError becomes a negative errno."""
        handler: Handler | None = None
        for part in (self, self.files, self.files.devices):
            handler = handler or getattr(part, f"on_{event.name}", None)
        if handler is None:
            raise OSError(errno.EPROTO, f"the sandbox asked for {event.name}")
        task, state = thread.task, ""
        if event.name in _SLEEPS and task is not None:
            state, task.state = task.state, "D"
        try:
            return await handler(thread, *event.args)
        except ModuleOops:
            raise
        except OSError as error:
            return -(error.errno or errno.EINVAL)
        finally:
            if state and task is not None:
                task.state = state

    # -- the log ----------------------------------------------------------------------------------------------------

    async def on_pr_debug(self, thread: HostThread, descriptor: int, text: bytes) -> int:
        """``__dynamic_pr_debug`` at a site that is enabled."""
        site = self.cpu.debug_sites.get(descriptor)
        if site is not None:
            site.emit(text_of(text))
        return 0

    # -- livepatch --------------------------------------------------------------------------------------------------

    def _module_at(self, addr: int) -> Module | None:
        name = self.cpu.module_name(addr)
        return self.machine.modules.modules.get(name) if name is not None else None

    async def on_ftrace(self, thread: HostThread, addr: int) -> int:
        """Where *thread* goes on that enters the patched function at *addr*; 0: at the original."""
        target = self.machine.ftrace.enter(addr, thread.task)
        return 0 if target == addr else target

    async def on_ftrace_location(self, thread: HostThread, addr: int) -> int:
        """The function that has its ftrace site at *addr* or is itself there; 0 if there is none."""
        for function in (addr, addr - 4):
            if self.machine.ftrace.location(function):
                return function
        return 0

    async def on_hook(self, thread: HostThread, addr: int, modifies: bool, kind: str) -> int:
        """Hook the function at *addr*, for the sandbox; a number for :meth:`on_unhook`.

        Raises OSError: EBUSY where another hook changes the address already, EOPNOTSUPP for a place that the emulated
        kernel never comes to; a probe there would pretend to work.
        """
        ftrace = self.machine.ftrace
        known = self.cpu.module_at_address(addr) or self.cpu.vmlinux.name_of(addr) in API
        if not known or not ftrace.location(addr):
            where = self.machine.kallsyms.lookup(addr)
            self.machine.printk.logger("").err(
                f"klpfs: {thread.module}: a {kind} at {where or hex(addr)} is not supported: only entries of functions "
                "of modules, and of kernel functions that modules call, can be probed"
            )
            raise OSError(errno.EOPNOTSUPP, f"{kind} at {addr:#x}")
        ops = FtraceOps(lambda ip, task: ip, ipmodify=modifies)
        try:
            ftrace.register_ftrace_function(ops, addr)
        except OSError as error:
            if kind == "kprobe":
                self.machine.printk.logger("").err(
                    f"kprobes: Failed to arm kprobe-ftrace at {self.machine.kallsyms.lookup(addr)} "
                    f"(error {-(error.errno or errno.EINVAL)})"
                )
            raise
        self._last_hook += 1
        self._hooks[self._last_hook] = (ops, thread.module)
        return self._last_hook

    async def on_unhook(self, thread: HostThread, token: int) -> int:
        """Undo :meth:`on_hook`."""
        self._unhook(token)
        return 0

    def _unhook(self, token: int) -> None:
        found = self._hooks.pop(token, None)
        if found is not None:
            self.machine.ftrace.unregister_ftrace_function(found[0])

    async def on_klp_enable_patch(self, thread: HostThread, addr: int, read: list[Any] | None) -> int:
        """``klp_enable_patch`` with the structures as they are in memory now."""
        if read is None:
            await self.machine.livepatch.klp_enable_patch(None)
            return 0
        mod_addr, objects, states, replace = read
        memory = PatchMemory(addr, self.cpu.space)
        objs: list[KlpObject] | None = None
        if objects is not None:
            objs = [self._object(memory, thread.module, *row) for row in objects]
        for state_addr, number, version in states:
            memory.states[KlpState(number, version)] = state_addr
        patch = KlpPatch(
            self._module_at(mod_addr) if mod_addr else None, objs, list(memory.states), bool(replace), priv=memory
        )
        await self.machine.livepatch.klp_enable_patch(patch)
        return 0

    def _object(
        self, memory: PatchMemory, module: str, addr: int, name: bytes | None, funcs: list[Any] | None, calls: list[int]
    ) -> KlpObject:
        rows: list[KlpFunc] | None = None
        if funcs is not None:
            rows = []
            for func_addr, old_name, new_func, sympos in funcs:
                func = KlpFunc(text_of(old_name), new_func, sympos)
                memory.funcs[func] = func_addr
                rows.append(func)
        names = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")
        callbacks = KlpCallbacks()
        for which, call in zip(names, calls, strict=True):
            if call:
                setattr(callbacks, which, partial(self._callback, memory, module, call, which == "pre_patch"))
        obj = KlpObject(None if name is None else text_of(name), rows, callbacks, priv=addr)
        memory.objects[obj] = addr
        return obj

    async def _callback(self, memory: PatchMemory, module: str, call: int, answers: bool, obj: KlpObject) -> int | None:
        """A callback: the structures that it may read are brought up to date first.

        If it crashes, the kernel would lose the task, and livepatch with it; here the patch is refused, or the work
        goes on without what the callback would have done.
        """
        self._write_back(memory, obj)
        try:
            answer = await self.cpu.call(call, [memory.objects[obj]], module=module)
        except ModuleOops:
            return -errno.EFAULT if answers else None
        except OSError:
            return -errno.EIO if answers else None  # the sandbox is gone
        return to_int(answer) if answers else None

    def _write_back(self, memory: PatchMemory, obj: KlpObject) -> None:
        space, addr = self.cpu.space, memory.objects[obj]
        space.put(addr, L.KLP_OBJECT_MOD, self.cpu.module_address(obj.mod.name) if obj.mod is not None else 0)
        space.put(addr, L.KLP_OBJECT_PATCHED, obj.patched)
        if obj.patch is not None:
            space.put(memory.addr, L.KLP_PATCH_ENABLED, obj.patch.enabled)
            space.put(memory.addr, L.KLP_PATCH_FORCED, obj.patch.forced)
        for func in obj.func_list:
            where = memory.funcs.get(func)
            if where is None:  # a nop of an atomic replace
                continue
            space.put(where, L.KLP_FUNC_OLD_FUNC, func.old_func)
            space.put(where, L.KLP_FUNC_OLD_SIZE, func.old_size)
            space.put(where, L.KLP_FUNC_NEW_SIZE, func.new_size)
            space.put(where, L.KLP_FUNC_PATCHED, func.patched)
            space.put(where, L.KLP_FUNC_TRANSITION, func.transition)

    async def on_klp_get_prev_state(self, thread: HostThread, number: int) -> int:
        """Address of the state *number* of the newest patch below the one in transition; 0 if there is none."""
        state = self.machine.livepatch.klp_get_prev_state(number)
        if state is None:
            return 0
        for patch in self.machine.livepatch.patches:
            memory = patch.priv
            if isinstance(memory, PatchMemory) and state in memory.states:
                addr = memory.states[state]
                return addr if memory.space is self.cpu.space else self._copied_state(memory.space, addr)
        return 0

    def _copied_state(self, space: Space, addr: int) -> int:
        """A state whose module is dead: what the core knows of it can be read, what its data point to cannot."""
        copy = self.cpu.heap.alloc(L.KLP_STATE_SIZE, space.read(addr, L.KLP_STATE_SIZE))
        if space.get(addr, L.KLP_STATE_DATA):
            gone = self.cpu.vmlinux.missing_variable("klp_state.data of a module whose code is gone")
            self.cpu.space.put(copy, L.KLP_STATE_DATA, gone)
        return copy

    # -- shadow variables: their data are objects of the daemon's heap ----------------------------------------------

    async def on_klp_shadow_get(self, thread: HostThread, obj: int, number: int) -> int:
        """Address of the data, or 0."""
        data = self.machine.livepatch.klp_shadow_get(obj, number)
        return data if isinstance(data, int) else 0

    def _ctor(self, thread: HostThread, ctor: int) -> Any:
        async def construct(obj: object, data: object, ctor_data: object) -> int:
            assert isinstance(obj, int) and isinstance(data, int) and isinstance(ctor_data, int)
            return to_int(await self.cpu.call(ctor, [obj, data, ctor_data], thread.task, module=thread.module))

        return construct if ctor else None

    def _dtor(self, thread: HostThread, dtor: int) -> Any:
        async def destroy(obj: object, data: object) -> None:
            assert isinstance(obj, int) and isinstance(data, int)
            await self.cpu.call(dtor, [obj, data], thread.task, module=thread.module)

        return destroy if dtor else None

    def free_shadow(self, data: object) -> None:
        """The data of a shadow variable that code allocated."""
        assert isinstance(data, int)
        self.cpu.heap.free(data)

    async def on_klp_shadow_alloc(
        self,
        thread: HostThread,
        obj: int,
        number: int,
        size: int,
        gfp: int,
        ctor: int,
        ctor_data: int,
        /,
        *,
        get: bool = False,
    ) -> int:
        """Address of the new data, or 0."""
        livepatch = self.machine.livepatch
        make = livepatch.klp_shadow_get_or_alloc if get else livepatch.klp_shadow_alloc
        data = await make(
            obj,
            number,
            size,
            self._ctor(thread, ctor),
            ctor_data,
            alloc=self.cpu.heap.alloc_or_null,
            free=self.free_shadow,
        )
        return data if isinstance(data, int) else 0

    async def on_klp_shadow_get_or_alloc(self, thread: HostThread, *args: int) -> int:
        """Address of the data, new or not, or 0."""
        return await self.on_klp_shadow_alloc(thread, *args, get=True)

    async def on_klp_shadow_free(self, thread: HostThread, obj: int, number: int, dtor: int) -> int:
        """Detach and free one."""
        await self.machine.livepatch.klp_shadow_free(obj, number, self._dtor(thread, dtor))
        return 0

    async def on_klp_shadow_free_all(self, thread: HostThread, number: int, dtor: int) -> int:
        """Detach and free all of a number."""
        await self.machine.livepatch.klp_shadow_free_all(number, self._dtor(thread, dtor))
        return 0

    # -- work -------------------------------------------------------------------------------------------------------

    def _pending(self, addr: int, pending: bool) -> None:
        data = self.cpu.space.get(addr, L.WORK_DATA)
        self.cpu.space.put(addr, L.WORK_DATA, data & ~L.WORK_STRUCT_PENDING | pending)

    async def _run_work(self, addr: int, module: str) -> None:
        self._pending(addr, False)
        try:
            await self.cpu.call(self.cpu.space.get(addr, L.WORK_FUNC), [addr], module=module)
        except ModuleOops:
            pass  # the log has it; the worker lives on

    def _work(self, addr: int, function: int, module: str, delayed: bool) -> Work:
        work = self._works.get(addr)
        if work is None or (delayed and not isinstance(work, DelayedWork)):
            found = self.machine.kallsyms.lookup(function)
            kind = DelayedWork if delayed else Work
            work = kind(partial(self._run_work, addr, module), found.name if found is not None else f"{function:#x}")
            self._works[addr] = work
        return work

    async def on_queue_work(
        self, thread: HostThread, wq: int, addr: int, function: int, delay: int, delayed: bool, modify: bool
    ) -> bool:
        """``queue_work_on`` and ``queue_delayed_work_on``; *delay* in jiffies. With *modify*, an earlier time goes."""
        queue = self.machine.workqueue
        work = self._work(addr, function, thread.module, delayed)
        was = False
        if modify and work.pending:
            was = queue.cancel_work(work)
        if isinstance(work, DelayedWork) and delayed:
            done = queue.schedule_delayed_work(work, delay / L.HZ)
        else:
            done = queue.schedule_work(work)
        if done:
            self._pending(addr, True)
            self._queues.setdefault(wq, set()).add(addr)
        return was if modify else done

    async def on_flush_work(self, thread: HostThread, addr: int) -> bool:
        """``flush_work``."""
        work = self._works.get(addr)
        return await self.machine.workqueue.flush_work(work) if work is not None else False

    async def on_cancel_work(self, thread: HostThread, addr: int) -> bool:
        """``cancel_work``."""
        work = self._works.get(addr)
        if work is None:
            return False
        was = self.machine.workqueue.cancel_work(work)
        self._pending(addr, False)
        return was

    async def on_cancel_work_sync(self, thread: HostThread, addr: int) -> bool:
        """``cancel_work_sync``."""
        work = self._works.get(addr)
        if work is None:
            return False
        was = await self.machine.workqueue.cancel_work_sync(work)
        self._pending(addr, False)
        return was

    async def on_work_busy(self, thread: HostThread, addr: int) -> int:
        """``work_busy``: WORK_BUSY_PENDING 1, WORK_BUSY_RUNNING 2."""
        work = self._works.get(addr)
        return (work.pending | work.running << 1) if work is not None else 0

    async def on_alloc_workqueue(self, thread: HostThread, addr: int, name: bytes) -> int:
        """A workqueue of the module's own: its items run on the same workers as all others."""
        self._queues[addr] = set()
        return 0

    async def on_drain_workqueue(self, thread: HostThread, wq: int, destroy: bool) -> int:
        """Wait for all items of a workqueue; those that wait for their timer are not on it yet."""
        for addr in list(self._queues.get(wq, ())):
            work = self._works.get(addr)
            if work is not None and not (isinstance(work, DelayedWork) and work.timer is not None):
                await self.machine.workqueue.flush_work(work)
        if destroy:
            self._queues.pop(wq, None)
        return 0

    # -- timers -----------------------------------------------------------------------------------------------------

    def _start_timer(self, addr: int, delay: float, fire: Callable[[], Awaitable[float | None]]) -> None:
        timer = self._timers.setdefault(addr, _Timer())
        if timer.scope is not None:
            timer.scope.cancel()
        timer.scope = first = trio.CancelScope()

        async def run() -> None:
            scope, wait = first, delay
            while True:
                with scope:
                    await trio.sleep(max(wait, 0))
                if timer.scope is not scope:
                    return
                timer.scope, timer.idle = None, trio.Event()
                again: float | None = None
                try:
                    again = await fire()
                except OSError:
                    pass  # crashed: the log has it
                finally:
                    timer.idle.set()
                if again is None or timer.scope is not None or timer.stopped:
                    return  # over, armed anew meanwhile, or cancelled while it ran
                wait, timer.scope = again, (scope := trio.CancelScope())

        timer.stopped = False
        self._detached(run, name=f"timer {addr:#x}")

    def _detached(self, run: Callable[..., Awaitable[None]], *args: object, name: str) -> None:
        """Start *run* outside the context of whoever asked for it; the machine outlives it whatever happens."""
        from klpfs.kernel.sched import detached

        async def guarded() -> None:
            try:
                await run(*args)
            except Exception:
                log.exception("%s failed", name)

        detached(self.machine.nursery, guarded, name=name)

    async def on_timer_start(self, thread: HostThread, addr: int, function: int, delay: int, pending: int) -> int:
        """Arm a ``timer_list``; *delay* in nanoseconds, *pending* the offset of the word that says so."""

        async def fire() -> None:
            self.cpu.space.store(addr + pending, 0)
            await self.cpu.call(function, [addr], self.machine.sched.idle[0], module=thread.module)

        self._start_timer(addr, delay / 1e9, fire)
        return 0

    async def on_hrtimer_start(self, thread: HostThread, addr: int, function: int, delay: int, offset: int) -> int:
        """Arm an ``hrtimer`` whose clock is *offset* ns ahead; again if its function answers HRTIMER_RESTART."""
        space = self.cpu.space

        async def fire() -> float | None:
            space.put(addr, L.HRTIMER_STATE, 0)
            answer = await self.cpu.call(function, [addr], self.machine.sched.idle[0], module=thread.module)
            if not to_int(answer):
                return None
            space.put(addr, L.HRTIMER_STATE, 1)
            return (space.get(addr, L.HRTIMER_EXPIRES) - offset) / 1e9 - self.machine.clock.now()

        self._start_timer(addr, delay / 1e9, fire)
        return 0

    async def on_timer_stop(self, thread: HostThread, addr: int, wait: bool) -> int:
        """Disarm; with *wait*, the function does not run any more either."""
        timer = self._timers.get(addr)
        if timer is None:
            return 0
        timer.stopped = True
        if timer.scope is not None:
            timer.scope.cancel()
            timer.scope = None
        elif wait:
            await timer.idle.wait()
        return 0

    async def on_call_rcu(self, thread: HostThread, head: int, function: int) -> int:
        """Call *function* after a grace period."""
        module = thread.module

        async def later() -> None:
            await trio.sleep(_SOFTIRQ_DELAY)
            try:
                await self.cpu.call(function, [head], self.machine.sched.idle[0], module=module)
            except OSError:
                pass  # crashed: the log has it

        self._detached(later, name="rcu callback")
        return 0

    async def on_tasklet_schedule(self, thread: HostThread, addr: int) -> int:
        """``tasklet_schedule``: run it in softirq context, as soon as it is not disabled."""
        module, space = thread.module, self.cpu.space

        async def softirq() -> None:
            while space.load(addr + 16, 4):  # noqa: ASYNC110 - count: disabled, until code changes it in memory
                await trio.sleep(_SOFTIRQ_DELAY)
            space.store(addr + 8, 2)  # TASKLET_STATE_RUN, and no longer TASKLET_STATE_SCHED
            argument = addr if space.load(addr + 20, 1) else space.load(addr + 32)
            try:
                await self.cpu.call(space.load(addr + 24), [argument], self.machine.sched.idle[0], module=module)
            except OSError:
                pass  # crashed: the log has it
            finally:
                space.store(addr + 8, space.load(addr + 8) & ~2)

        self._detached(softirq, name=f"tasklet {addr:#x}")
        return 0

    async def on_variable(self, thread: HostThread, name: bytes | str) -> int:
        """Where a variable of the kernel stands that a stub works on."""
        return self.cpu.vmlinux.variable(name if isinstance(name, str) else name.decode())

    async def on_cpu_times(self, thread: HostThread, cpu: int) -> list[int]:
        """``kcpustat_cpu_fetch``: nanoseconds in the order of ``enum cpu_usage_stat``, from the host's /proc/stat."""
        return cpu_times(self.machine.procfs.host_file("stat"), cpu)

    async def on_allow_signal(self, thread: HostThread, pid: int, sig: int, allowed: bool) -> int:
        """``allow_signal`` and ``disallow_signal`` of a kernel thread: it is woken by those that it lets in."""
        kthread = self._kthreads.get(pid)
        if kthread is None:
            return 0
        (kthread.signals.add if allowed else kthread.signals.discard)(sig)

        def deliver(task: Task, number: int) -> None:
            if number in kthread.signals and self.cpu.alive:
                self.cpu.send(proto.Nudge(task.pid, signal=True))

        kthread.task.on_signal = deliver
        return 0

    # -- kernel threads ---------------------------------------------------------------------------------------------

    async def on_kthread_create(self, thread: HostThread, function: int, data: int, name: bytes) -> list[Any]:
        """``kthread_create``: pid and name of the task, which does not run yet."""
        if sum(kthread.module == thread.module for kthread in self._kthreads.values()) >= self.cpu.limits.threads:
            raise OSError(errno.EAGAIN, f"{thread.module} has too many threads")
        task = self.machine.sched.kthread(text_of(name)[:15])
        self._kthreads[task.pid] = _Kthread(task, function, data, thread.module)
        return [task.pid, task.comm]

    async def on_kthread_start(self, thread: HostThread, pid: int) -> int:
        """The first ``wake_up_process``."""
        kthread = self._kthreads.get(pid)
        if kthread is None or kthread.started:
            return 0
        kthread.started = True
        self._detached(self._run_kthread, kthread, name=f"kthread {kthread.task.comm}")
        return 1

    async def _run_kthread(self, kthread: _Kthread) -> None:
        sched = self.machine.sched
        try:
            with sched.running(kthread.task):
                kthread.code = to_int(await self.cpu.call(kthread.function, [kthread.data], module=kthread.module))
        except OSError as error:
            kthread.code = -(error.errno or errno.EIO)
        finally:
            kthread.done.set()
            self._exit(kthread)

    def _exit(self, kthread: _Kthread) -> None:
        if kthread.task.alive:
            self.machine.sched.exit(kthread.task)
        if self.cpu.alive:
            self.cpu.send(proto.Forget(kthread.task.pid))

    async def on_kthread_stop(self, thread: HostThread, pid: int, started: bool) -> int:
        """``kthread_stop``: what the thread returned; -EINTR if it never ran."""
        kthread = self._kthreads.pop(pid, None)
        if kthread is None:
            return -errno.ESRCH
        if kthread.started:
            await kthread.done.wait()
            if self.cpu.alive:
                self.cpu.send(proto.Forget(pid))
        else:
            self._exit(kthread)
        return kthread.code

    async def on_send_sig(self, thread: HostThread, pid: int, sig: int) -> int:
        """``send_sig``."""
        self.machine.sched.signal(self.machine.sched.find(pid), sig)
        return 0

    # -- modules ----------------------------------------------------------------------------------------------------

    async def on_add_taint(self, thread: HostThread, flag: int, lockdep_ok: int) -> int:
        """``add_taint``."""
        if 0 <= flag < len(TAINT_LETTERS):
            self.machine.kernel.add_taint(TAINT_LETTERS[flag], lockdep_ok=bool(lockdep_ok))
        return 0

    async def on_try_module_get(self, thread: HostThread, addr: int) -> bool:
        """``try_module_get``; no module stands for vmlinux."""
        mod = self._module_at(addr)
        return self.machine.modules.try_module_get(mod) if mod is not None else addr == 0

    async def on___module_get(self, thread: HostThread, addr: int) -> int:
        """``__module_get``."""
        mod = self._module_at(addr)
        if mod is not None:
            mod.refcnt += 1
        return 0

    async def on_module_put(self, thread: HostThread, addr: int) -> int:
        """``module_put``."""
        mod = self._module_at(addr)
        if mod is not None:
            self.machine.modules.module_put(mod)
        return 0

    async def on_module_refcount(self, thread: HostThread, addr: int) -> int:
        """``module_refcount``."""
        mod = self._module_at(addr)
        return mod.refcnt if mod is not None else -1

    async def on___symbol_get(self, thread: HostThread, name: bytes) -> int:
        """``__symbol_get``: the address of an exported symbol whose owner is held from now on; 0 if there is none."""
        symbol = text_of(name)
        for mod in self.machine.modules.modules.values():
            for export in mod.image.exports:
                if export.name == symbol:
                    return export.value if self.machine.modules.try_module_get(mod) else 0
        exported = self.machine.kallsyms.table.exported(symbol) is not None
        return await self.on_kallsyms_lookup_name(thread, name) if exported else 0

    async def on___symbol_put(self, thread: HostThread, name: bytes) -> int:
        """``__symbol_put``."""
        symbol = text_of(name)
        for mod in self.machine.modules.modules.values():
            if any(export.name == symbol for export in mod.image.exports):
                self.machine.modules.module_put(mod)
                break
        return 0

    async def on_kallsyms_lookup_name(self, thread: HostThread, name: bytes) -> int:
        """``kallsyms_lookup_name``: first vmlinux, then modules (also ``module:symbol``)."""
        symbol = text_of(name)
        usable = self.cpu.vmlinux.symbol(symbol)
        if usable is not None:
            return usable
        kallsyms = self.machine.kallsyms
        found = kallsyms.on_each_match_symbol(symbol)
        if found:
            where = kallsyms.lookup(found[0])
            if where is not None:
                self.cpu.vmlinux.tell(found[0], symbol, where.size)
            return found[0]
        modname, colon, rest = symbol.partition(":")
        for mod in self.machine.modules.modules.values():
            if not colon or mod.name == modname:
                here = kallsyms.module_on_each_symbol(mod.name, rest if colon else symbol)
                if here:
                    return here[0]
        return 0

    def forget_region(self, base: int, size: int, module: str) -> None:
        """The memory of *module* goes: what was kept by address inside it is not valid any more."""
        for token, (ops, owner) in list(self._hooks.items()):
            if owner == module or base <= ops.ip < base + size:
                self._unhook(token)
        for addr in [a for a in self._works if base <= a < base + size]:
            work = self._works[addr]
            if not work.pending and not work.running:
                del self._works[addr]
        for addr in [a for a in self._timers if base <= a < base + size and self._timers[a].scope is None]:
            del self._timers[addr]
        for pid, kthread in list(self._kthreads.items()):
            if base <= kthread.function < base + size and not kthread.started:
                del self._kthreads[pid]
                self._exit(kthread)
        self.files.forget_region(base, size)
