"""Turning a transition around, forcing it, and disabling: what is logged, called and pinned."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, machine, read, write
from core_support import (
    Run,
    add_module,
    address,
    directories,
    disable,
    livepatch_lines,
    make_patch,
    refused,
    sleeper,
    warnings,
)

from klpfs.kernel.sched import Task
from klpfs.livepatch import KlpPatch, core
from klpfs.machine import Machine

FREE = ["1", "y", "on", "T"]
"""Values that mean yes."""


async def stalled(m: Machine, events: list[str], *, unpatching: bool) -> tuple[KlpPatch, Task]:
    """A patch whose enabling, or disabling, a task holds up; *events* starts with the transition."""
    patch = make_patch(m, "fix", {"vmlinux": ["once"]}, events=events)
    assert patch.objs is not None
    assert patch.objs[0].funcs is not None
    if unpatching:
        await m.livepatch.klp_enable_patch(patch)
        task = sleeper(m, patch.objs[0].funcs[0].new_func)
        events.clear()
        await disable(m, "fix")
    else:
        task = sleeper(m, address(m, "once"))
        await m.livepatch.klp_enable_patch(patch)
    assert await read(m, f"{KLP}/fix/transition") == "1"
    return patch, task


def test_reversing_an_enabling(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch, task = await stalled(m, events, unpatching=False)
            assert patch.mod is not None
            free = m.sched.tasks[2]
            assert (free.patch_state, task.patch_state) == (1, 0)
            await disable(m, "fix")
            # now the others have to come back, and the one that never left is no obstacle
            assert (free.patch_state, free.patch_pending) == (1, True)
            assert (task.patch_state, task.patch_pending) == (0, False)
            assert await read(m, f"{KLP}/fix/enabled") == "0"
            await gone(m, f"{KLP}/fix", 3)
            assert livepatch_lines(m) == [
                "enabling patch 'fix'",
                "'fix': initializing patching transition",
                "'fix': starting patching transition",
                "'fix': reversing transition from patching to unpatching",
                "'fix': starting unpatching transition",
                "'fix': completing unpatching transition",
                "'fix': unpatching complete",
            ]
            assert events == ["pre_patch vmlinux", "post_unpatch vmlinux"]
            await trio.testing.wait_all_tasks_blocked()
            assert patch.mod.refcnt == 0
            assert m.ftrace.hooked() == []

    run(main)


def test_reversing_a_disabling(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch, task = await stalled(m, events, unpatching=True)
            assert await read(m, f"{KLP}/fix/enabled") == "0"
            await write(m, f"{KLP}/fix/enabled", "1")
            assert await read(m, f"{KLP}/fix/enabled") == "1"
            assert task.patch_state == 1
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            assert livepatch_lines(m)[5:] == [
                "'fix': initializing unpatching transition",
                "'fix': starting unpatching transition",
                "'fix': reversing transition from unpatching to patching",
                "'fix': starting patching transition",
                "'fix': completing patching transition",
                "'fix': patching complete",
            ]
            # no pre-patch callback the second time, and a post-unpatch one is still to come
            assert events == ["pre_unpatch vmlinux", "post_patch vmlinux"]
            task.stack = []
            await disable(m, "fix")
            await gone(m, f"{KLP}/fix", 1)
            assert events[2:] == ["pre_unpatch vmlinux", "post_unpatch vmlinux"]
            assert patch.mod is not None
            assert warnings(m) == []

    run(main)


def test_reversing_time_and_again(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch, task = await stalled(m, events, unpatching=False)
            inside = sleeper(m, patch.obj_list[0].func_list[0].new_func, "inside")
            for value in "0101010":
                await write(m, f"{KLP}/fix/enabled", value)
                assert await refused(write, m, f"{KLP}/fix/enabled", value) == "EINVAL"
                assert await read(m, f"{KLP}/fix/enabled") == value
                await trio.sleep(2)
                assert await read(m, f"{KLP}/fix/transition") == "1"
            m.sched.exit(inside)
            m.sched.exit(task)
            await gone(m, f"{KLP}/fix", 3)
            assert events == ["pre_patch vmlinux", "post_unpatch vmlinux"]
            assert livepatch_lines(m).count("'fix': reversing transition from unpatching to patching") == 3
            assert warnings(m) == []
            assert m.lockdep.reports == []

    run(main)


def test_reversing_a_replace_leaves_the_old_patch(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            old = make_patch(m, "old", {"vmlinux": ["vfs_read"]})
            await m.livepatch.klp_enable_patch(old)
            task = sleeper(m, address(m, "once"))
            new = make_patch(m, "new", {"vmlinux": ["once"]}, replace=True)
            await m.livepatch.klp_enable_patch(new)
            assert "new/vmlinux/vfs_read,1" in directories(m)
            # one that came back to the original through the nop would have to leave it first
            back = m.sched.spawn("back", kthread=True)
            back.stack = [address(m, "vfs_read") + 1]
            await disable(m, "new")
            await trio.sleep(5)
            assert await read(m, f"{KLP}/new/transition") == "1"
            assert back.patch_state == 1
            back.stack = []
            await gone(m, f"{KLP}/new", 3)
            assert await read(m, f"{KLP}/old/enabled") == "1"
            assert old.enabled
            assert m.livepatch.implementation(address(m, "vfs_read"), task) == old.obj_list[0].func_list[0].new_func
            assert len(m.livepatch.klp.klp_ops) == 1

    run(main)


@pytest.mark.parametrize("value", FREE)
def test_forcing_an_enabling(run: Run, value: str) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch, task = await stalled(m, events, unpatching=False)
            assert patch.mod is not None
            await write(m, f"{KLP}/fix/force", value)
            assert livepatch_lines(m)[-1] == "forcing remaining tasks to the patched state"
            assert (task.patch_state, task.patch_pending) == (1, False)
            assert await read(m, f"{KLP}/fix/transition") == "1", "the next try completes it"
            await write(m, f"{KLP}/fix/force", "1")
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            assert events == ["pre_patch vmlinux", "post_patch vmlinux"]
            assert not patch.forced, "nothing was removed"
            task.stack = []
            await disable(m, "fix")
            await gone(m, f"{KLP}/fix", 1)
            await trio.testing.wait_all_tasks_blocked()
            assert patch.mod.refcnt == 0

    run(main)


def test_forcing_a_disabling_pins_the_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch, _ = await stalled(m, events, unpatching=True)
            assert patch.mod is not None
            await write(m, f"{KLP}/fix/force", "1")
            assert patch.forced
            await gone(m, f"{KLP}/fix", 3)
            await trio.testing.wait_all_tasks_blocked()
            assert events == ["pre_unpatch vmlinux", "post_unpatch vmlinux"]
            assert patch.mod.refcnt == 1
            assert await refused(m.delete_module, "fix") == "EAGAIN"  # that is EWOULDBLOCK
            assert warnings(m) == []

    run(main)


def test_forced_then_reversed_stays_pinned(run: Run) -> None:
    """Nothing takes the mark back: the code may still be in use."""

    async def main() -> None:
        async with machine() as m:
            patch, task = await stalled(m, [], unpatching=True)
            await write(m, f"{KLP}/fix/force", "1")
            await write(m, f"{KLP}/fix/enabled", "1")
            await trio.sleep(2)
            assert await read(m, f"{KLP}/fix/enabled") == "1"
            task.stack = []
            await disable(m, "fix")
            await gone(m, f"{KLP}/fix", 3)
            assert patch.mod is not None
            assert patch.mod.refcnt == 1

    run(main)


@pytest.mark.parametrize("value", ["1", "0", "x", "", "2", "maybe"])
def test_forcing_outside_a_transition(run: Run, value: str) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            if value in ("0", ""):
                await write(m, f"{KLP}/fix/force", value)
            else:
                assert await refused(write, m, f"{KLP}/fix/force", value) == "EINVAL"
            assert livepatch_lines(m)[-1] == "'fix': patching complete"

    run(main)


def test_forcing_a_replace_pins_all_that_are_replaced(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patches = [make_patch(m, name, {"vmlinux": ["once"]}) for name in ("a", "b")]
            for patch in patches:
                await m.livepatch.klp_enable_patch(patch)
            sleeper(m, patches[1].obj_list[0].func_list[0].new_func)
            new = make_patch(m, "new", {"vmlinux": ["once"]}, replace=True)
            await m.livepatch.klp_enable_patch(new)
            await write(m, f"{KLP}/new/force", "1")
            assert [p.forced for p in [*patches, new]] == [True, True, False]
            await gone(m, f"{KLP}/a", 3)
            await trio.testing.wait_all_tasks_blocked()
            assert directories(m) == ["new", "new/vmlinux", "new/vmlinux/once,1"]
            assert [p.mod.refcnt for p in [*patches, new] if p.mod] == [1, 1, 1]

    run(main)


@pytest.mark.parametrize(("kernel", "pins"), [("5.10", True), ("6.1", False)])
def test_forcing_used_to_pin_everything(run: Run, kernel: str, pins: bool) -> None:
    async def main() -> None:
        async with machine(kernel) as m:
            other = make_patch(m, "other", {"vmlinux": ["vfs_read"]})
            await m.livepatch.klp_enable_patch(other)
            patch, _ = await stalled(m, [], unpatching=False)
            await write(m, f"{KLP}/fix/force", "1")
            assert (patch.forced, other.forced) == (pins, pins)

    run(main)


# -- disabling ---------------------------------------------------------------------------------------------------------


def test_disabling_frees_objects_at_once_and_the_patch_later(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            add_module(m, "target", ["work"])
            patch = make_patch(m, "fix", {"vmlinux": ["once"], "target": ["work"]})
            await m.livepatch.klp_enable_patch(patch)
            file = m.kernfs.open(f"{KLP}/fix/enabled")
            await disable(m, "fix")
            # klp_free_patch_start() is over, klp_free_patch_finish() waits for a worker
            assert directories(m) == ["fix"]
            assert patch.mod is not None
            assert patch.mod.refcnt == 1
            assert m.livepatch.patches == []
            assert await read(m, f"{KLP}/fix/enabled") == "0"
            # a store that got in before the worker
            assert patch.kobj is not None
            for value in (b"0", b"1"):
                assert await refused(core._enabled_store, m.livepatch.klp, patch.kobj, value) == "EINVAL"
            await gone(m, f"{KLP}/fix")
            await trio.testing.wait_all_tasks_blocked()
            assert patch.mod.refcnt == 0
            assert await refused(file.write, b"1") == "ENODEV"
            assert m.lockdep.reports == []
            assert ("kn->active#enabled", "klp_mutex") in m.lockdep.edges

    run(main)


def test_a_disabled_patch_is_never_enabled_again(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            node = m.kernfs.lookup(f"{KLP}/fix/enabled")
            assert node is not None
            # an operation in flight holds the directory, and with it the reference to the module
            with node.active(site="a slow reader"):
                await disable(m, "fix")
                await trio.sleep(30)
                assert m.modules.modules["fix"].refcnt == 1
                assert await refused(m.delete_module, "fix") == "EAGAIN"
                worker = next(t for t in m.sched.for_each_process_thread() if t.comm.startswith("kworker"))
                assert (worker.state, worker.on_cpu) == ("D", False)
                # meanwhile, others go on: the worker that waits is no obstacle either
                await m.livepatch.klp_enable_patch(make_patch(m, "other", {"vmlinux": ["once"]}))
                assert await read(m, f"{KLP}/other/transition") == "0"
            await gone(m, f"{KLP}/fix")
            await trio.testing.wait_all_tasks_blocked()
            assert m.modules.modules["fix"].refcnt == 0

    run(main)


def test_disabling_below_others_and_in_a_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            for name, function in (("a", "once"), ("b", "once"), ("c", "vfs_read")):
                await m.livepatch.klp_enable_patch(make_patch(m, name, {"vmlinux": [function]}))
            await disable(m, "a")
            await gone(m, f"{KLP}/a")
            sleeper(m, m.livepatch.patches[1].obj_list[0].func_list[0].new_func)
            await disable(m, "c")
            assert await refused(write, m, f"{KLP}/b/enabled", "0") == "EBUSY"
            assert await refused(write, m, f"{KLP}/b/enabled", "1") == "EINVAL"
            assert await refused(write, m, f"{KLP}/b/force", "1") == "EINVAL"
            assert [p.name for p in m.livepatch.patches] == ["b", "c"]

    run(main)


def test_the_seed_enforces_the_order(run: Run) -> None:
    async def main() -> None:
        async with machine("seed") as m:
            for name in "abc":
                await m.livepatch.klp_enable_patch(make_patch(m, name, {"vmlinux": ["once"]}))
            for name in "ab":
                assert await refused(write, m, f"{KLP}/{name}/enabled", "0") == "EBUSY"
            for name in "cba":
                await disable(m, name)
                await gone(m, f"{KLP}/{name}")
            assert m.livepatch.klp.klp_ops == {}

    run(main)
