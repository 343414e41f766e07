"""Atomic replace: nops that come and go, and the replaced (Documentation/livepatch/cumulative-patches.rst)."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, machine, read
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


def test_nops_for_what_others_patch_and_only_that(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            target = add_module(m, "target", ["work", "rest"])
            await m.livepatch.klp_enable_patch(
                make_patch(m, "a", {"vmlinux": ["once", "twice,2"], "target": ["work"], "absent": ["f"]})
            )
            await m.livepatch.klp_enable_patch(make_patch(m, "b", {"vmlinux": ["once,1", "vfs_read"]}))
            task = sleeper(m, address(m, "msleep"))
            new = make_patch(m, "new", {"vmlinux": ["msleep", "once"]}, replace=True)
            await m.livepatch.klp_enable_patch(new)
            mine = [d.removeprefix("new/") for d in directories(m) if d.startswith("new/")]
            # position 0 and 1 are the same function; what the patch itself replaces gets no nop
            assert mine == [
                "absent",
                "absent/f,1",
                "target",
                "target/work,1",
                "vmlinux",
                "vmlinux/msleep,1",
                "vmlinux/once,1",
                "vmlinux/twice,2",
                "vmlinux/vfs_read,1",
            ]
            assert [await read(m, f"{KLP}/new/{o}/patched") for o in ("vmlinux", "target", "absent")] == ["1", "1", "0"]
            nops = {f"{o.display_name}:{f.old_name}" for o, f in new.funcs() if f.nop}
            assert nops == {"vmlinux:twice", "vmlinux:vfs_read", "target:work", "absent:f"}
            assert m.livepatch.implementation(target.base, None) == target.base
            assert m.livepatch.implementation(target.base, task) != target.base, "not switched yet"
            m.sched.exit(task)
            await m.livepatch.wait_transition()
            await trio.testing.wait_all_tasks_blocked()
            assert directories(m) == ["new", "new/vmlinux", "new/vmlinux/msleep,1", "new/vmlinux/once,1"]
            assert set(m.ftrace.hooked()) == {address(m, "once"), address(m, "msleep")}
            assert await read(m, f"{KLP}/new/replace") == "1"
            assert [mod.refcnt for name, mod in m.modules.modules.items() if name in "ab"] == [0, 0]
            assert warnings(m) == []
            assert m.lockdep.reports == []

    run(main)


def test_the_first_patch_may_replace_nothing(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "new", {"vmlinux": ["once"]}, replace=True))
            assert await read(m, f"{KLP}/new/enabled") == "1"
            assert directories(m) == ["new", "new/vmlinux", "new/vmlinux/once,1"]

    run(main)


def test_a_replace_by_nothing_restores_the_original(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            add_module(m, "target", ["work"])
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"vmlinux": ["once"], "target": ["work"]}))
            await m.livepatch.klp_enable_patch(make_patch(m, "none", {}, replace=True))
            await gone(m, f"{KLP}/old")
            assert directories(m) == ["none"]
            assert m.ftrace.hooked() == []
            assert m.livepatch.implementation(address(m, "once"), None) == address(m, "once")

    run(main)


def test_a_task_in_the_replaced_function_holds_up_the_replace(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            old = make_patch(m, "old", {"vmlinux": ["once"]})
            await m.livepatch.klp_enable_patch(old)
            task = sleeper(m, old.obj_list[0].func_list[0].new_func)
            await m.livepatch.klp_enable_patch(make_patch(m, "none", {}, replace=True))
            # the function of the old patch is what the nop covers
            assert livepatch_lines(m, tries=True)[-1].endswith("is sleeping on function once")
            assert await read(m, f"{KLP}/old/enabled") == "1", "until the transition is complete"
            await trio.sleep(3)
            assert "none/vmlinux/once,1" in directories(m)
            task.stack = []
            await gone(m, f"{KLP}/old", 3)
            assert directories(m) == ["none"]

    run(main)


def test_the_replaced_cannot_be_touched_during_the_replace(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"vmlinux": ["once"]}))
            sleeper(m, address(m, "vfs_read"))
            await m.livepatch.klp_enable_patch(make_patch(m, "new", {"vmlinux": ["vfs_read"]}, replace=True))
            assert await refused(disable, m, "old") == "EBUSY"

    run(main)


def test_a_target_module_that_comes_during_the_replace(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"target": ["work"]}))
            task = sleeper(m, address(m, "vfs_read"))
            await m.livepatch.klp_enable_patch(make_patch(m, "new", {"vmlinux": ["vfs_read"]}, replace=True))
            target = add_module(m, "target", ["work"])
            target.state = "coming"
            await m.livepatch.klp_module_coming(target)
            target.state = "live"
            assert [r for r in livepatch_lines(m) if "target" in r] == [
                "applying patch 'old' to loading module 'target'",
                "applying patch 'new' to loading module 'target'",
            ]
            stack = m.livepatch.klp.klp_ops[target.base].func_stack
            assert [f.nop for f in stack] == [True, False]
            m.sched.exit(task)
            await gone(m, f"{KLP}/old", 3)
            assert m.ftrace.hooked() == [address(m, "vfs_read")]
            assert warnings(m) == []

    run(main)


def test_disabling_the_patch_that_replaced(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"vmlinux": ["once"]}))
            new = make_patch(m, "new", {"vmlinux": ["once"]}, replace=True)
            await m.livepatch.klp_enable_patch(new)
            await gone(m, f"{KLP}/old")
            assert len(m.livepatch.klp.klp_ops[address(m, "once")].func_stack) == 1
            await disable(m, "new")
            await gone(m, f"{KLP}/new")
            assert m.ftrace.hooked() == []

    run(main)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_chains(run: Run, count: int) -> None:
    async def main() -> None:
        async with machine() as m:
            for n in range(count):
                await m.livepatch.klp_enable_patch(make_patch(m, f"p{n}", {"vmlinux": ["once"]}, replace=n % 2 == 1))
                await trio.testing.wait_all_tasks_blocked()
            left = [p.name for p in m.livepatch.patches]
            assert left == ([f"p{count - 1}"] if count % 2 == 0 else [f"p{n}" for n in range(max(0, count - 2), count)])
            pinned = {name for name, mod in m.modules.modules.items() if mod.refcnt}
            assert pinned == set(left)

    run(main)
