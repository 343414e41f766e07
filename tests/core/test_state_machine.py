"""Random operations on a machine, and what must hold after each of them.

The machine lives in a thread of its own with a clock that stands still; rules are carried out there one by one, and
time moves only by a rule.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from conftest import KLP, insmod, machine, write
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from klpfs.kernel.sched import Task
from klpfs.livepatch import KlpPatch
from klpfs.machine import Machine

TARGET = 'name = "target"\nkind = "module"\n[[functions]]\nname = "work"\n'


def _spec(name: str, *, replace: bool = False, vmlinux: tuple[str, ...] = (), target: bool = False) -> str:
    text = f'name = "{name}"\nreplace = {"true" if replace else "false"}\n'
    if vmlinux:
        text += "[[objects]]\n" + "".join(f'[[objects.functions]]\nold_name = "{f}"\n' for f in vmlinux)
    if target:
        text += '[[objects]]\nname = "target"\n[[objects.functions]]\nold_name = "work"\n'
    return text


PATCHES = {
    "one": _spec("one", vmlinux=("cmdline_proc_show",)),
    "two": _spec("two", vmlinux=("cmdline_proc_show", "meminfo_proc_show")),
    "three": _spec("three", target=True),
    "four": _spec("four", replace=True, vmlinux=("meminfo_proc_show",), target=True),
    "five": _spec("five", replace=True, vmlinux=("version_proc_show",)),
}
FUNCTIONS = ["cmdline_proc_show", "meminfo_proc_show", "work"]

names = st.sampled_from(sorted(PATCHES))


class World:
    """A machine in a thread, and a way to run coroutines there."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.clock = trio.testing.MockClock(rate=0)
        self.thread = threading.Thread(target=trio.run, args=(self._main,), kwargs={"clock": self.clock}, daemon=True)
        self.thread.start()
        assert self.ready.wait(30)

    async def _main(self) -> None:
        async with machine() as self.m:
            self.token = trio.lowlevel.current_trio_token()
            self.stop = trio.Event()
            self.ready.set()
            await self.stop.wait()

    def run(self, fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Await ``fn(*args)`` there, then wait until nothing is left to do without time passing."""

        async def call() -> Any:
            try:
                return await fn(*args)
            finally:
                await trio.testing.wait_all_tasks_blocked()

        return trio.from_thread.run(call, trio_token=self.token)

    def close(self) -> None:
        """End the machine."""
        trio.from_thread.run_sync(self.stop.set, trio_token=self.token)
        self.thread.join(30)
        assert not self.thread.is_alive()


class Livepatches(RuleBasedStateMachine):
    """Operators, tasks and modules, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.m: Machine = self.world.m
        self.tasks: list[Task] = []
        self.seen: dict[str, KlpPatch] = {}

    def teardown(self) -> None:
        self.world.close()

    # -- what is done --------------------------------------------------------------------------------------------------

    def attempt(self, fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Something that the kernel may refuse."""
        try:
            self.world.run(fn, *args)
        except OSError:
            pass

    @rule(name=names)
    def load(self, name: str) -> None:
        self.attempt(insmod, self.m, PATCHES[name])

    @rule(name=names, value=st.sampled_from("01"))
    def enabled(self, name: str, value: str) -> None:
        self.attempt(write, self.m, f"{KLP}/{name}/enabled", value)

    @rule(name=names)
    def force(self, name: str) -> None:
        self.attempt(write, self.m, f"{KLP}/{name}/force", "1")

    @rule(name=names)
    def unload(self, name: str) -> None:
        self.attempt(self.m.delete_module, name)

    @rule()
    def target_comes(self) -> None:
        self.attempt(insmod, self.m, TARGET)

    @rule()
    def target_goes(self) -> None:
        if not any(self._inside("target", task) for task in self.tasks):
            self.attempt(self.m.delete_module, "target")

    @rule(function=st.sampled_from(FUNCTIONS), kthread=st.booleans(), state=st.sampled_from("SD"))
    def sleep_inside(self, function: str, kthread: bool, state: str) -> None:
        async def sleep() -> None:
            found = self.m.kallsyms.on_each_match_symbol(function)
            found = found or self.m.kallsyms.module_on_each_symbol("target", function)
            if found and len(self.tasks) < 6:
                task = self.m.sched.spawn("sleeper", kthread=kthread, state=state)
                task.stack = [self.m.livepatch.implementation(found[0], task) + 1]
                self.tasks.append(task)

        self.world.run(sleep)

    @precondition(lambda self: self.tasks)
    @rule(number=st.integers(0, 5), ends=st.booleans())
    def leave(self, number: int, ends: bool) -> None:
        async def leave() -> None:
            task = self.tasks[number % len(self.tasks)]
            self.m.sched.leave_kernel(task)
            if ends:
                self.m.sched.exit(task)
                self.tasks.remove(task)

        self.world.run(leave)

    @rule(seconds=st.integers(1, 20))
    def time_passes(self, seconds: int) -> None:
        async def pass_() -> None:
            for _ in range(seconds):
                self.world.clock.jump(1)
                await trio.testing.wait_all_tasks_blocked()

        self.world.run(pass_)

    def _inside(self, modname: str, task: Task) -> bool:
        where = [self.m.kallsyms.lookup(address) for address in task.stack]
        return any(w is not None and w.modname == modname for w in where)

    # -- what holds ----------------------------------------------------------------------------------------------------

    @invariant()
    def no_disabled_patch_outside_a_transition(self) -> None:
        klp = self.m.livepatch.klp
        for patch in klp.klp_patches:
            assert patch.enabled or patch is klp.klp_transition_patch, patch.name
        assert klp.klp_transition_patch is None or klp.klp_transition_patch in klp.klp_patches

    @invariant()
    def patch_states(self) -> None:
        allowed = {-1} if self.m.livepatch.transition_patch is None else {0, 1}
        tasks = [*self.m.sched.for_each_process_thread(), *self.m.sched.idle]
        assert {task.patch_state for task in tasks} <= allowed
        if self.m.livepatch.transition_patch is None:
            assert not any(task.patch_pending for task in tasks)

    @invariant()
    def func_stacks(self) -> None:
        klp = self.m.livepatch.klp
        order = {id(patch): i for i, patch in enumerate(klp.klp_patches)}
        for address, ops in klp.klp_ops.items():
            assert ops.func_stack
            positions = [order[id(func.obj.patch)] for func in ops.func_stack if func.obj is not None]
            assert positions == sorted(positions, reverse=True), "the newest first"
            assert all(func.patched and func.old_func == address for func in ops.func_stack)
        stacked = {id(func) for ops in klp.klp_ops.values() for func in ops.func_stack}
        for patch in klp.klp_patches:
            for obj, func in patch.funcs():
                assert func.patched == (id(func) in stacked)
                assert func.patched == (obj.is_loaded and obj.patched)
        assert set(self.m.ftrace.hooked()) == set(klp.klp_ops)

    @invariant()
    def directories(self) -> None:
        root = self.m.kernfs.lookup(KLP)
        assert root is not None
        patches = {patch.name: patch for patch in self.m.livepatch.patches}
        assert {node.name for node in root.children()} == set(patches)
        for name, patch in patches.items():
            node = self.m.kernfs.lookup(f"{KLP}/{name}")
            assert node is not None
            objects = {child.name for child in node.children() if child.kind == "dir"}
            assert objects == {obj.display_name for obj in patch.obj_list}
            for obj in patch.obj_list:
                where = self.m.kernfs.lookup(f"{KLP}/{name}/{obj.display_name}")
                assert where is not None
                functions = {child.name for child in where.children() if child.kind == "dir"}
                assert functions == {f"{func.old_name},{func.old_sympos or 1}" for func in obj.func_list}

    @invariant()
    def references(self) -> None:
        patches = {patch.name: patch for patch in self.m.livepatch.patches}
        self.seen |= patches
        for name, mod in self.m.modules.modules.items():
            if name == "target":
                assert mod.refcnt == 0
            elif name in patches:
                assert mod.refcnt == 1
            elif name in self.seen and self.seen[name].mod is mod:
                assert mod.refcnt == int(self.seen[name].forced), f"{name} pinned only when forced"
            assert (self.m.kernfs.lookup(f"sys/module/{name}") is not None) == (mod.state == "live")

    @invariant()
    def nothing_suspicious(self) -> None:
        assert self.m.lockdep.reports == []
        assert not any("WARNING" in record.message for record in self.m.printk.records())


@pytest.mark.timeout(240)
class TestLivepatches(Livepatches.TestCase):
    """Runs :class:`Livepatches`."""

    settings = settings(
        max_examples=250,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,  # the same sequences everywhere; a longer search is a local run
        suppress_health_check=list(HealthCheck),
    )
