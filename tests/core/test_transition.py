"""The consistency model: who blocks a transition, who is switched when, retries and signals
(kernel/livepatch/transition.c)."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, machine, read, write
from core_support import Run, add_module, address, disable, livepatch_lines, make_patch, refused, sleeper, warnings

from klpfs.kernel.sched import Task
from klpfs.kernel.workqueue import Work
from klpfs.livepatch import KlpPatch
from klpfs.machine import Machine


def new_func(patch: KlpPatch, number: int = 0) -> int:
    """Address of a replacement of *patch*."""
    return [func for obj in patch.objs or () for func in obj.funcs or ()][number].new_func


def tries(m: Machine) -> int:
    """How often the transition was tried in vain."""
    return m.livepatch.klp.klp_signals_cnt


async def stall(m: Machine, function: str = "once") -> tuple[KlpPatch, Task]:
    """A patch that cannot be enabled, and the kernel thread that sees to that."""
    task = sleeper(m, address(m, function), "stuck")
    patch = make_patch(m, "fix", {"vmlinux": [function]})
    await m.livepatch.klp_enable_patch(patch)
    return patch, task


def test_states_and_flags_during_a_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            free = m.sched.spawn("free")
            _, task = await stall(m)
            assert (task.patch_state, task.patch_pending) == (0, True)
            assert (free.patch_state, free.patch_pending) == (1, False)
            assert all((t.patch_state, t.patch_pending) == (1, False) for t in m.sched.idle)
            assert m.livepatch.klp.klp_target_state == 1
            task.stack = []
            await m.livepatch.wait_transition()
            assert all(t.patch_state == -1 for t in [*m.sched.for_each_process_thread(), *m.sched.idle])
            assert m.livepatch.klp.klp_target_state == -1
            assert warnings(m) == []

    run(main)


@pytest.mark.parametrize("offset", [0, 1, 63])
def test_every_address_inside_the_function_blocks(run: Run, offset: int) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("outer")
            inner = address(m, "msleep") + 4
            task.stack = [inner, address(m, "once") + offset, address(m, "vfs_read") + 8]
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert await read(m, f"{KLP}/fix/transition") == "1"

    run(main)


@pytest.mark.parametrize("where", [-1, 64])
def test_the_neighbours_do_not_block(run: Run, where: int) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("near")
            task.stack = [address(m, "once") + where]
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


@pytest.mark.parametrize(("depth", "reliable"), [(99, True), (100, False), (200, False)])
def test_a_stack_that_fills_the_array_is_unreliable(run: Run, depth: int, reliable: bool) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("deep")
            task.stack = [address(m, "vfs_read") + 1] * depth
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert await read(m, f"{KLP}/fix/transition") == ("0" if reliable else "1")
            line = f"klp_try_switch_task: deep:{task.pid} has an unreliable stack"
            assert (line in livepatch_lines(m, tries=True)) == (not reliable)

    run(main)


def test_the_first_function_in_the_patchs_order_is_named(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("both")
            task.stack = [address(m, "vfs_read") + 1, address(m, "once") + 1]
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["msleep", "once", "vfs_read"]}))
            assert livepatch_lines(m, tries=True)[-1] == (
                f"klp_try_switch_task: both:{task.pid} is sleeping on function once"
            )

    run(main)


def test_attempts_are_silent_until_they_are_switched_on(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            m.dynamic_debug.control_write("func klp_try_switch_task -p")
            _, task = await stall(m)
            assert livepatch_lines(m, tries=True)[-1] == "'fix': starting patching transition"
            m.dynamic_debug.control_write("func klp_try_switch_task +p")
            task.on_cpu = True
            await trio.sleep(1.1)
            assert livepatch_lines(m, tries=True)[-1] == f"klp_try_switch_task: stuck:{task.pid} is running"

    run(main)


def test_unpatching_waits_for_the_new_functions_only(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {"vmlinux": ["once", "vfs_read"]})
            await m.livepatch.klp_enable_patch(patch)
            old = sleeper(m, address(m, "once"), "old")
            new = sleeper(m, new_func(patch, 1), "new")
            await disable(m, "fix")
            assert (old.patch_state, new.patch_state) == (0, 1)
            assert await read(m, f"{KLP}/fix/enabled") == "0"
            assert await read(m, f"{KLP}/fix/transition") == "1"
            assert await read(m, f"{KLP}/fix/vmlinux/patched") == "1"
            new.stack = []
            await gone(m, f"{KLP}/fix", 3)

    run(main)


def test_a_second_patch_waits_for_the_function_of_the_first(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            first = make_patch(m, "first", {"vmlinux": ["once"]})
            await m.livepatch.klp_enable_patch(first)
            original = sleeper(m, address(m, "once"), "original")
            patched = sleeper(m, new_func(first), "patched")
            await m.livepatch.klp_enable_patch(make_patch(m, "second", {"vmlinux": ["once"]}))
            # nobody can come back to the original: the one who is still there is no obstacle
            assert (original.patch_state, patched.patch_state) == (1, 0)

    run(main)


def test_reversing_the_disabling_of_a_patch_below_another(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            first = make_patch(m, "first", {"vmlinux": ["once"]})
            await m.livepatch.klp_enable_patch(first)
            await m.livepatch.klp_enable_patch(make_patch(m, "second", {"vmlinux": ["once"]}))
            task = sleeper(m, new_func(first), "stuck")
            await disable(m, "first")
            assert task.patch_state == 1
            await write(m, f"{KLP}/first/enabled", "1")
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/first/transition") == "0"
            assert await read(m, f"{KLP}/first/enabled") == "1"
            assert m.livepatch.implementation(address(m, "once"), task) != new_func(first)
            assert warnings(m) == []

    run(main)


def test_a_running_task_blocks_and_current_does_not(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mine = m.sched.spawn("insmod")
            hog = m.sched.spawn("hog", state="R")
            hog.on_cpu = True
            with m.sched.running(mine):
                await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
                assert (mine.patch_state, hog.patch_state) == (1, 0)
            hog.on_cpu = False
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_current_is_looked_at_too(run: Run) -> None:
    """A module whose init was called from inside the function that it patches."""

    async def main() -> None:
        async with machine() as m:
            mine = m.sched.spawn("insmod")
            with m.sched.running(mine), m.sched.frame(address(m, "once") + 1):
                await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
                assert mine.patch_state == 0
            await trio.sleep(1.1)
            assert mine.patch_state == -1

    run(main)


def test_a_zombie_has_no_stack(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            m.sched.spawn("dead", state="Z")
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


@pytest.mark.parametrize("way", ["leaves", "exits", "is killed", "wakes"])
def test_ways_out_of_the_function(run: Run, way: str) -> None:
    async def main() -> None:
        async with machine() as m:
            task = sleeper(m, address(m, "once"), kthread=False, state="S")
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            match way:
                case "leaves":
                    m.sched.leave_kernel(task)
                    assert (task.patch_state, task.patch_pending) == (1, False), "it switches itself, at once"
                case "exits":
                    m.sched.exit(task)
                case "is killed":
                    m.sched.signal(task, 9)
                case "wakes":
                    task.wake_leaves = True
                    m.sched.wake_up_state(task)
            assert await read(m, f"{KLP}/fix/transition") == "1", "only the next try notices"
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_a_kernel_thread_does_not_switch_itself(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            _, task = await stall(m)
            m.sched.leave_kernel(task)
            assert task.patch_state == 0, "there is no user space to return to"
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_a_task_in_user_space_is_interrupted_by_the_tick(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            user = m.sched.spawn("loop", state="R")
            user.on_cpu = user.in_user = True
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert user.patch_state == 0
            await trio.sleep(0.005)
            assert user.patch_state == 1
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_an_idle_task_is_switched_in_its_loop(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            idle = m.sched.idle[1]
            idle.on_cpu = True
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert await read(m, f"{KLP}/fix/transition") == "1"
            assert idle.patch_state == 1, "woken from its idling"
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_children_inherit_state_and_flag(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            _, task = await stall(m)
            child = m.sched.spawn("child", parent=task)
            assert (child.patch_state, child.patch_pending) == (0, True)
            other = m.sched.spawn("other")
            assert (other.patch_state, other.patch_pending) == (1, False)
            with m.sched.running(task):
                forked = m.sched.spawn("forked")
                thread = m.sched.spawn("thread", kthread=True)
            assert forked.patch_state == 0, "of the current task"
            assert thread.patch_state == 1, "kthreadd forks them"
            task.stack = []
            await m.livepatch.wait_transition()
            assert warnings(m) == []

    run(main)


def test_a_worker_that_waits_for_the_mutex_sleeps(run: Run) -> None:
    """Otherwise it would pass for running, and hold up the transition that it waits for."""

    async def main() -> None:
        async with machine() as m:
            klp = m.livepatch.klp

            async def contend() -> None:
                async with klp.klp_mutex:
                    pass

            work = Work(contend, "contend")
            async with klp.klp_mutex:
                m.workqueue.schedule_work(work)
                await trio.testing.wait_all_tasks_blocked()
                assert work.worker is not None
                assert (work.worker.state, work.worker.on_cpu) == ("D", False)
            await m.workqueue.flush_work(work)

    run(main)


def test_a_retry_a_second_at_whole_seconds(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await trio.sleep(0.4)
            await stall(m)
            seen = [0.4]
            for _ in range(40):
                before = tries(m)
                await trio.sleep(0.1)
                if tries(m) != before:
                    seen.append(round(trio.current_time(), 1))
            # round_jiffies_relative(): the first from 1.4 up to 2.0, then one a second
            assert seen == [0.4, 2.0, 3.0, 4.0]

    run(main)


def test_signals_from_the_fifteenth_failure_on_and_every_fifteenth(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            woken: list[float] = []
            _, _ = await stall(m)
            thread = sleeper(m, address(m, "once"), "woken", state="S")
            thread.patch_state, thread.patch_pending = 0, True
            thread.on_wake = lambda task: woken.append(round(trio.current_time()))
            user = sleeper(m, address(m, "once"), "user", kthread=False, state="D")
            user.patch_state, user.patch_pending = 0, True
            done = m.sched.spawn("done", state="S")
            await trio.sleep(14.5)
            assert woken == []
            assert not user.notify_signal
            await trio.sleep(31)
            assert woken == [15, 30, 45]
            assert user.notify_signal, "it will notice when it wakes"
            assert user.patch_state == 0
            assert not done.notify_signal, "already switched"
            assert livepatch_lines(m).count("signaling remaining tasks") == 1
            # the sleep of the uninterruptible one ends: it leaves with the signal pending, and is switched
            m.sched.leave_kernel(user)
            assert (user.patch_state, user.notify_signal) == (1, False)

    run(main)


def test_reversing_starts_the_count_anew(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await stall(m)
            await trio.sleep(20.5)
            assert tries(m) == 21
            # somebody who has been switched already, and now sleeps in the new function
            inside = m.sched.spawn("inside", kthread=True, state="D")
            inside.stack = [new_func(m.livepatch.patches[0]) + 1]
            await disable(m, "fix")
            assert tries(m) == 0
            await trio.sleep(20)
            assert livepatch_lines(m).count("signaling remaining tasks") == 2

    run(main)


def test_a_wake_up_that_ends_the_wait(run: Run) -> None:
    """A kernel thread whose wait is over once somebody wakes it: the signals free the transition."""

    async def main() -> None:
        async with machine() as m:
            _, task = await stall(m)
            task.state, task.wake_leaves = "S", True
            await trio.sleep(14.5)
            assert await read(m, f"{KLP}/fix/transition") == "1"
            await trio.sleep(2)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_a_transition_never_gives_up(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            m.dynamic_debug.control_write("func klp_try_switch_task -p")
            _, task = await stall(m)
            await trio.sleep(3600.5)
            assert tries(m) == 3601
            assert await refused(write, m, f"{KLP}/fix/enabled", "1") == "EINVAL"
            m.sched.exit(task)
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_objects_that_are_not_loaded_do_not_count(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {"absent": ["work"], "vmlinux": ["once"]})
            task = m.sched.spawn("t")
            task.stack = [new_func(patch, 0) + 1]
            await m.livepatch.klp_enable_patch(patch)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            await disable(m, "fix")
            await gone(m, f"{KLP}/fix", 1)

    run(main)


def test_tasks_of_providers_take_part(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            asked = 0

            def provider() -> None:
                nonlocal asked
                asked += 1
                if 100_000 not in m.sched.tasks:
                    task = m.sched.spawn("real", pid=100_000)
                    task.stack = [address(m, "once") + 1]

            m.sched.providers.append(provider)
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert asked > 0
            assert m.sched.tasks[100_000].patch_state == 0
            m.sched.tasks[100_000].stack = []
            await m.livepatch.wait_transition()
            assert warnings(m) == []

    run(main)


def test_a_stack_that_lives_elsewhere(run: Run) -> None:
    """The inner frames of a task come from where its code is executed."""

    async def main() -> None:
        async with machine() as m:
            target = add_module(m, "target", ["work"])
            frames = [target.base + 5]
            task = m.sched.spawn("worker", kthread=True)
            task.stack_fn = lambda: frames
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"target": ["work"]}))
            assert await read(m, f"{KLP}/fix/transition") == "1"
            frames.clear()
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)
