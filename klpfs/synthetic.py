"""Acting out a synthetic module: its spec is its code.

Model
    Each :class:`klpfs.spec.Action` is a function: it runs its steps in order, in the task that called it, with its
    address on that task's stack, so that one that sleeps stalls a transition as real code would. Functions of the
    module that a patch replaces are entered through ftrace and end up in the patch's implementation.

Source
    tools/testing/selftests/livepatch/test_modules/, samples/livepatch/: what such modules do.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from klpfs import spec as S
from klpfs.elf.reader import ElfModule
from klpfs.kernel.module import Module
from klpfs.kernel.sched import Task, detached
from klpfs.kernel.workqueue import DelayedWork, Work
from klpfs.livepatch import KlpCallbacks, KlpFunc, KlpObject, KlpPatch, KlpState
from klpfs.loader import ElfCode

if TYPE_CHECKING:
    from klpfs.machine import Machine

__all__ = ["SyntheticCode"]

NAP = 0.1
"""Seconds between two looks of a ``sleep_while``."""


@dataclass
class _Context:
    """What a running action knows: placeholders for its texts, and what it printed for a reader."""

    values: dict[str, object] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Running:
    """A work of the module."""

    spec: S.Work
    work: Work | None = None
    started: trio.Event = field(default_factory=trio.Event)
    settled: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)


class SyntheticCode(ElfCode):
    """The code of one synthetic module."""

    def __init__(self, machine: Machine, elf: ElfModule, spec: S.ModuleSpec) -> None:
        super().__init__(machine, elf)
        self.spec = spec
        self._actions: dict[int, S.Action] = {}
        self._functions: dict[str, int] = {}
        self._new_funcs: dict[int, int] = {}
        self._patch: KlpPatch | None = None
        self._works: list[_Running] = []
        self._leaving = trio.Event()
        self._mod: Module | None = None

    async def load(self, mod: Module) -> None:
        """Place the module and note which action lies at which address."""
        await super().load(mod)
        self._mod = mod
        waiting: dict[str, list[int]] = {}
        for sym in mod.image.symbols:
            if sym.type in "tT":
                waiting.setdefault(sym.name, []).append(sym.value)
        for function in self.spec.functions:
            addr = waiting[function.name].pop(0)
            self._actions[addr] = function
            self._functions.setdefault(function.name, addr)
        for obj in self.spec.objects:
            for repl in obj.functions:
                addr = waiting[repl.symbol].pop(0)
                self._actions[addr] = repl
                self._new_funcs[id(repl)] = addr
        self.release_elf()

    # -- values -----------------------------------------------------------------------------------------------------

    def _param(self, name: str) -> Any:
        return self.params[name].first

    def _value(self, value: S.Value) -> int:
        if isinstance(value, int):
            return value
        name = S.param_ref(value)
        if name is not None:
            return int(self._param(name))
        return S.errno_value(value) or 0

    def _flag(self, value: S.Flag) -> bool:
        if isinstance(value, bool):
            return value
        name = S.param_ref(value)
        return name is not None and self._true(name)

    def _true(self, name: str) -> bool:
        return self._param(name) not in (0, False, "", "N", None)

    def _seconds(self, value: S.Seconds) -> float:
        if value == "forever":
            return math.inf
        if isinstance(value, int | float):
            return float(value)
        name = S.param_ref(value)
        return float(self._param(name)) if name is not None else 0.0

    # -- running ----------------------------------------------------------------------------------------------------

    def _values(self, **more: object) -> dict[str, object]:
        assert self._mod is not None
        values: dict[str, object] = {"module": self._mod.name, "patch": self._mod.name, **more}
        for name in self.params:
            values[f"param.{name}"] = self.param_get(self._mod, name)
        return values

    def _print(self, text: str, level: str, context: _Context) -> None:
        line = S.render(self.spec.log_prefix + text, context.values)
        logger = self.machine.printk.logger("")
        getattr(logger, "warn" if level == "warning" else level)(line)

    async def _act(self, action: S.Action, context: _Context) -> int:
        for step in action.steps():
            if self._applies(step):
                await self._step(step, context)
        return self._value(action.ret)

    def _applies(self, step: S.Op) -> bool:
        prev = self.machine.livepatch.klp_get_prev_state
        if step.if_prev_state is not None and prev(step.if_prev_state) is None:
            return False
        if step.unless_prev_state is not None and prev(step.unless_prev_state) is not None:
            return False
        if step.if_param and not self._true(step.if_param):
            return False
        return not (step.unless_param and self._true(step.unless_param))

    async def _step(self, step: S.Op, context: _Context) -> None:
        match step:
            case S.Log():
                self._print(step.text, step.level, context)
            case S.Output():
                context.output.append(S.render(step.text, context.values))
            case S.Sleep():
                await self._sleep(self._seconds(step.seconds))
            case S.SleepWhile():
                while self._true(step.param) and not self._leaving.is_set():
                    await self._sleep(NAP)
            case S.SetParam():
                self.params[step.param].set(step.value)
                context.values.update(self._values())
            case S.Call():
                await self._enter(self._functions[step.function])
            case S.StateSet() | S.StateTake() | S.StateClear() | S.ConsoleLoglevel():
                self._state_step(step)
            case _:
                await self._shadow_step(step, context)

    async def _sleep(self, seconds: float) -> None:
        """Sleep uninterruptibly, until *seconds* are over, the module leaves, or somebody wakes the task by hand."""
        sched = self.machine.sched
        woken = trio.Event()
        task = sched.current
        for running in self._works:
            if running.started.is_set():
                running.settled.set()
        if task is not None:
            task.on_wake = lambda _: woken.set()
        try:
            with sched.sleeping("D", sched.frames("msleep")):
                async with trio.open_nursery() as nursery:

                    async def wake_on(event: trio.Event) -> None:
                        await event.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(wake_on, woken)
                    nursery.start_soon(wake_on, self._leaving)
                    if seconds == math.inf:
                        await trio.sleep_forever()
                    await self.machine.clock.sleep(seconds)
                    nursery.cancel_scope.cancel()
        finally:
            if task is not None:
                task.on_wake = None

    def _state_step(self, step: S.StateSet | S.StateTake | S.StateClear | S.ConsoleLoglevel) -> None:
        livepatch, printk = self.machine.livepatch, self.machine.printk
        patch = self._patch
        if patch is None:
            return
        if isinstance(step, S.ConsoleLoglevel):
            if step.save_state is not None:
                state = livepatch.klp_get_state(patch, step.save_state)
                if state is not None:
                    state.data = printk.console_loglevel
            if step.from_state is not None:
                state = livepatch.klp_get_state(patch, step.from_state)
                if state is not None and isinstance(state.data, int):
                    printk.console_loglevel = state.data
            if step.level is not None:
                printk.console_loglevel = step.level
            return
        state = livepatch.klp_get_state(patch, step.id)
        if state is None:
            return
        match step:
            case S.StateSet():
                state.data = self._value(step.value)
            case S.StateTake():
                previous = livepatch.klp_get_prev_state(step.id)
                state.data = previous.data if previous is not None else None
            case S.StateClear():
                state.data = None

    async def _shadow_step(self, step: S.Op, context: _Context) -> None:
        livepatch = self.machine.livepatch

        def say(text: str, value: object) -> None:
            if text:
                self._print(text, "info", _Context({**context.values, "value": value}))

        async def ctor(obj: object, data: object, ctor_data: object) -> int:
            assert isinstance(data, list)
            data[0] = ctor_data
            return 0

        async def dtor(text: str, obj: object, data: object) -> None:
            assert isinstance(data, list)
            say(text, data[0])

        match step:
            case S.ShadowAlloc() | S.ShadowGetOrAlloc():
                alloc = (
                    livepatch.klp_shadow_alloc if isinstance(step, S.ShadowAlloc) else livepatch.klp_shadow_get_or_alloc
                )
                data = await alloc(step.obj, step.id, 8, ctor, self._value(step.value), alloc=lambda size: [0])
                if isinstance(data, list):
                    say(step.log, data[0])
            case S.ShadowGet():
                data = livepatch.klp_shadow_get(step.obj, step.id)
                if isinstance(data, list):
                    say(step.log, data[0])
                else:
                    say(step.log_missing, "")
            case S.ShadowFree():
                await livepatch.klp_shadow_free(step.obj, step.id, partial(dtor, step.log))
            case S.ShadowFreeAll():
                await livepatch.klp_shadow_free_all(step.id, partial(dtor, step.log))

    async def _enter(self, addr: int) -> int:
        """Call the function at *addr*, or what replaces it for the current task."""
        machine = self.machine
        target = machine.ftrace.enter(addr, machine.sched.current)
        if target == addr:
            return await self.call(addr, (), machine.sched.current)
        where = machine.kallsyms.lookup(target)
        owner = machine.modules.find_module(where.modname) if where and where.modname else None
        if owner is None:
            raise OSError(errno.EFAULT, f"no code at {target:#x}")
        return await owner.code.call(target, (), machine.sched.current)

    async def call(self, addr: int, args: Sequence[int], task: Task | None) -> int:
        """Run the function at *addr*. Raises OSError(EFAULT) where there is none."""
        return await self._run(addr, _Context())

    async def show(self, addr: int, task: Task | None) -> bytes:
        """Run the show function at *addr*; what it printed."""
        context = _Context()
        await self._run(addr, context)
        return "".join(context.output).encode("utf-8", "surrogateescape")

    async def _run(self, addr: int, context: _Context) -> int:
        action = self._actions.get(addr)
        if action is None:
            raise OSError(errno.EFAULT, f"no function at {addr:#x}")
        name = action.old_name if isinstance(action, S.Replacement) else getattr(action, "name", "")
        context.values.update(self._values(function=name))
        with self.machine.sched.frame(addr + 1):
            return await self._act(action, context)

    # -- life -------------------------------------------------------------------------------------------------------

    async def init(self, mod: Module) -> int:
        """The init action, the works, then, in a livepatch, the enabling."""
        init = self.spec.init
        ret = await self._act(init, _Context(self._values()))
        if ret:
            return ret
        for work in self.spec.works:
            if not work.if_param or self._true(work.if_param):
                await self._start(work)
        if self.spec.is_livepatch and self._flag(init.enable):
            self._patch = self._build(mod)
            try:
                await self.machine.livepatch.klp_enable_patch(self._patch)
            except OSError as error:
                await self._stop_works()
                return -(error.errno or errno.EINVAL)
        return 0

    async def exit(self, mod: Module) -> None:
        """End the works, then the exit action."""
        await self._stop_works()
        await self._act(self.spec.exit, _Context(self._values()))

    def _build(self, mod: Module) -> KlpPatch:
        objects = []
        for obj in self.spec.objects:
            callbacks = KlpCallbacks()
            for name, action in obj.callbacks.items():
                setattr(callbacks, name, partial(self._callback, name, action))
            funcs = [KlpFunc(r.old_name, self._new_funcs[id(r)], r.sympos) for r in obj.functions]
            objects.append(KlpObject(None if obj.is_vmlinux else obj.name, funcs, callbacks))
        states = [KlpState(state.id, state.version) for state in self.spec.states]
        return KlpPatch(mod, objects, states, self._flag(self.spec.replace))

    async def _callback(self, name: str, action: S.Action, obj: KlpObject) -> int:
        state = S.STATE_TEXT[obj.mod.state.upper()] if obj.mod is not None else ""
        info = f"{obj.display_name} -> {state}" if obj.is_module else obj.display_name
        values = self._values(object=obj.display_name, state=state, info=info, callback=f"{name}_callback")
        return await self._act(action, _Context(values))

    # -- works ------------------------------------------------------------------------------------------------------

    async def _start(self, spec: S.Work) -> None:
        running = _Running(spec)
        self._works.append(running)
        machine = self.machine
        if spec.thread == "kworker":
            work = DelayedWork(partial(self._work_fn, running), spec.function)
            running.work = work
            machine.workqueue.schedule_delayed_work(work, self._seconds(spec.delay))
        else:
            detached(machine.nursery, self._kthread, running, name=f"kthread {spec.function}")
        match spec.wait:
            case "started":
                await running.started.wait()
            case "settled":
                await running.settled.wait()
            case "done":
                await running.done.wait()

    async def _work_fn(self, running: _Running) -> None:
        running.started.set()
        await self._enter(self._functions[running.spec.function])
        every = self._seconds(running.spec.every)
        if every and not self._leaving.is_set():
            running.settled.set()
            assert isinstance(running.work, DelayedWork)
            self.machine.workqueue.schedule_delayed_work(running.work, every)
        else:
            running.settled.set()
            running.done.set()

    async def _kthread(self, running: _Running) -> None:
        sched, clock = self.machine.sched, self.machine.clock
        task = sched.kthread(running.spec.comm or running.spec.function)
        try:
            with sched.running(task):
                with sched.sleeping("I"):
                    await clock.sleep(self._seconds(running.spec.delay))
                while not self._leaving.is_set():
                    running.started.set()
                    await self._enter(self._functions[running.spec.function])
                    every = self._seconds(running.spec.every)
                    if not every:
                        break
                    running.settled.set()
                    await self._sleep(every)
        finally:
            sched.exit(task)
            running.settled.set()
            running.done.set()

    async def _stop_works(self) -> None:
        waits = [r for r in self._works if r.spec.at_exit == "wait" and not r.spec.every]
        for running in waits:
            if running.started.is_set():
                await running.done.wait()
        self._leaving.set()
        for running in self._works:
            if running.work is not None:
                await self.machine.workqueue.cancel_work_sync(running.work)
            else:
                await running.done.wait()
        self._works.clear()
