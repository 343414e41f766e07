"""Modules that a patch wants: coming, going, refused (``klp_module_coming``, ``klp_module_going``)."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, insmod, insmod_errno, klog, machine, patch_spec, read
from core_support import (
    Run,
    add_module,
    address,
    disable,
    livepatch_lines,
    make_patch,
    refused,
    sleeper,
    warnings,
)

from klpfs.kernel.module import Module
from klpfs.machine import Machine

TARGET = 'name = "target"\nkind = "module"\n[[functions]]\nname = "work"\n'


async def coming(m: Machine, functions: list[str]) -> Module:
    """The module ``target`` with *functions*, on its way in."""
    mod = add_module(m, "target", functions)
    mod.state, mod.klp_alive = "coming", False
    await m.livepatch.klp_module_coming(mod)
    return mod


async def going(m: Machine, mod: Module) -> None:
    """*mod* on its way out."""
    mod.state = "going"
    await m.livepatch.klp_module_going(mod)
    m.kallsyms.remove_module(mod.name)
    del m.modules.modules[mod.name]


def test_coming_and_going_time_and_again(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch = make_patch(m, "fix", {"target": ["work"]}, events=events)
            await m.livepatch.klp_enable_patch(patch)
            assert events == []
            assert await read(m, f"{KLP}/fix/target/patched") == "0"
            assert patch.mod is not None
            for _ in range(3):
                mod = await coming(m, ["work"])
                assert await read(m, f"{KLP}/fix/target/patched") == "1"
                assert m.livepatch.implementation(mod.base, None) == patch.obj_list[0].func_list[0].new_func
                await going(m, mod)
                assert await read(m, f"{KLP}/fix/target/patched") == "0"
                assert m.ftrace.hooked() == []
                assert patch.obj_list[0].mod is None
                assert patch.obj_list[0].func_list[0].old_func == 0
            assert events == 3 * ["pre_patch target", "post_patch target", "pre_unpatch target", "post_unpatch target"]
            assert patch.mod.code.relocs == 3 * [("apply", "target"), ("clear", "target")]  # type: ignore[attr-defined]
            await disable(m, "fix")
            assert len(events) == 12, "not loaded: no callbacks"
            assert warnings(m) == []

    run(main)


def test_the_target_is_not_held(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, TARGET)
            await insmod(m, patch_spec("fix", "work", object="target"))
            assert m.modules.modules["target"].refcnt == 0
            await m.delete_module("target")
            assert await read(m, f"{KLP}/fix/target/patched") == "0"
            assert await read(m, f"{KLP}/fix/enabled") == "1"

    run(main)


def test_a_patch_that_comes_while_its_target_does(run: Run) -> None:
    """Between its coming and its going, those two are in charge: ``klp_alive``."""

    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "target", ["work"])
            mod.state, mod.klp_alive = "coming", False
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"target": ["work"]}))
            assert await read(m, f"{KLP}/fix/target/patched") == "0"
            await m.livepatch.klp_module_coming(mod)
            assert await read(m, f"{KLP}/fix/target/patched") == "1"

    run(main)


@pytest.mark.parametrize(
    ("functions", "number", "lines"),
    [
        (
            ["other"],
            "EINVAL",
            [
                "symbol 'work' not found in symbol table",
                "failed to initialize patch 'bad' for module 'target' (-22)",
            ],
        ),
        (
            ["work", "work"],
            "EINVAL",
            [
                "unresolvable ambiguity for symbol 'work' in object 'target'",
                "failed to initialize patch 'bad' for module 'target' (-22)",
            ],
        ),
    ],
)
def test_a_symbol_that_is_missing_refuses_the_module(
    run: Run, functions: list[str], number: str, lines: list[str]
) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            await m.livepatch.klp_enable_patch(make_patch(m, "bad", {"target": ["work"]}, events=events))
            before = len(livepatch_lines(m))
            assert await refused(coming, m, functions) == number
            assert livepatch_lines(m)[before:] == [
                *lines,
                "patch 'bad' failed for module 'target', refusing to load module 'target'",
            ]
            assert events == []
            assert not m.modules.modules["target"].klp_alive
            assert m.livepatch.patches[0].obj_list[0].mod is None

    run(main)


def test_a_function_that_cannot_be_hooked_refuses_the_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            good: list[str] = []
            bad: list[str] = []
            await m.livepatch.klp_enable_patch(make_patch(m, "good", {"target": ["work"]}, events=good))
            await m.livepatch.klp_enable_patch(make_patch(m, "bad", {"target": ["work", "rest"]}, events=bad))
            m.ftrace.ftrace_enabled = 0
            before = len(livepatch_lines(m))
            assert await refused(coming, m, ["work", "rest"]) == "EBUSY"
            assert livepatch_lines(m)[before:] == [
                "applying patch 'good' to loading module 'target'",
                "failed to register ftrace handler for function 'work' (-16)",
                "failed to apply patch 'good' to module 'target' (-16)",
                "patch 'good' failed for module 'target', refusing to load module 'target'",
            ]
            assert good == ["pre_patch target", "post_unpatch target"]
            assert bad == []
            assert m.livepatch.klp.klp_ops == {}
            m.ftrace.ftrace_enabled = 1
            mod = await coming(m, ["work", "rest"])
            assert len(m.livepatch.klp.klp_ops[mod.base].func_stack) == 2

    run(main)


def test_only_the_patches_before_the_failing_one_are_reverted(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: dict[str, list[str]] = {name: [] for name in ("a", "b", "bad", "c")}
            for name, noted in events.items():
                answer = {"target": -12} if name == "bad" else {}
                patch = make_patch(m, name, {"target": ["work"]}, events=noted, pre_patch=answer)
                await m.livepatch.klp_enable_patch(patch)
            assert await refused(coming, m, ["work"]) == "ENOMEM"
            full = ["pre_patch target", "post_patch target", "pre_unpatch target", "post_unpatch target"]
            assert events == {"a": full, "b": full, "bad": ["pre_patch target"], "c": []}
            assert [r for r in livepatch_lines(m) if r.startswith("reverting")] == [
                "reverting patch 'a' on unloading module 'target'",
                "reverting patch 'b' on unloading module 'target'",
            ]
            assert m.livepatch.klp.klp_ops == {}

    run(main)


def test_coming_during_the_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            stuck = sleeper(m, address(m, "once"))
            patch = make_patch(m, "fix", {"vmlinux": ["once"], "target": ["work"]}, events=events)
            await m.livepatch.klp_enable_patch(patch)
            mod = await coming(m, ["work"])
            assert events == ["pre_patch vmlinux", "pre_patch target"], "post-patch at the end of the transition"
            new = patch.obj_list[1].func_list[0].new_func
            assert m.livepatch.implementation(mod.base, stuck) == mod.base
            assert m.livepatch.implementation(mod.base, m.sched.tasks[2]) == new
            m.sched.exit(stuck)
            await trio.sleep(1.1)
            assert events[2:] == ["post_patch vmlinux", "post_patch target"]

    run(main)


@pytest.mark.parametrize("unpatching", [False, True])
def test_going_during_the_transition(run: Run, unpatching: bool) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            mod = await coming(m, ["work"])
            mod.state = "live"
            patch = make_patch(m, "fix", {"vmlinux": ["once"], "target": ["work"]}, events=events)
            if unpatching:
                await m.livepatch.klp_enable_patch(patch)
                stuck = sleeper(m, patch.obj_list[0].func_list[0].new_func)
                events.clear()
                await disable(m, "fix")
                assert events == ["pre_unpatch vmlinux", "pre_unpatch target"]
            else:
                stuck = sleeper(m, address(m, "once"))
                await m.livepatch.klp_enable_patch(patch)
            events.clear()
            await going(m, mod)
            # of the patch in transition, pre-unpatch is not called (again)
            assert events == ["post_unpatch target"]
            assert livepatch_lines(m)[-1] == "reverting patch 'fix' on unloading module 'target'"
            m.sched.exit(stuck)
            await trio.sleep(1.1)
            assert events[1:] == (["post_unpatch vmlinux"] if unpatching else ["post_patch vmlinux"])
            assert warnings(m) == []

    run(main)


def test_the_task_that_held_up_the_transition_goes_with_its_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = await coming(m, ["work"])
            mod.state = "live"
            task = sleeper(m, mod.base)
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"target": ["work"]}))
            m.sched.exit(task)
            await going(m, mod)
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            assert await read(m, f"{KLP}/fix/target/patched") == "0"

    run(main)


def test_a_module_that_fails_after_it_was_patched(run: Run) -> None:
    """A bad parameter, and an init that fails, come after ``klp_module_coming``: its patches are reverted."""
    spec = TARGET + '[[params]]\nname = "p"\n'

    async def main() -> None:
        async with machine() as m:
            await insmod(m, patch_spec("fix", "work", object="target"))
            assert await insmod_errno(m, spec, "p=x") == "EINVAL"
            assert await insmod_errno(m, spec + '[init]\nret = "-ENODEV"\n') == "ENODEV"
            lines = [line for line in klog(m) if "module 'target'" in line]
            assert lines == 2 * [
                "livepatch: applying patch 'fix' to loading module 'target'",
                "livepatch: reverting patch 'fix' on unloading module 'target'",
            ]
            assert m.ftrace.hooked() == []
            assert m.modules.find_module("target") is None
            await insmod(m, spec)
            assert await read(m, f"{KLP}/fix/target/patched") == "1"

    run(main)


def test_wrong_states_are_a_bug(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "target")
            assert await refused(m.livepatch.klp_module_coming, mod) == "EINVAL"
            await m.livepatch.klp_module_going(mod)
            assert mod.klp_alive
            assert warnings(m) == [
                "kernel/livepatch/core.c klp_module_coming",
                "kernel/livepatch/core.c klp_module_going",
            ]
            assert m.kernel.test_taint("W")

    run(main)


def test_vmlinux_is_no_name_for_a_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "vmlinux")
            mod.state = "coming"
            assert await refused(m.livepatch.klp_module_coming, mod) == "EINVAL"
            assert livepatch_lines(m) == ["vmlinux.ko: invalid module name"]

    run(main)


def test_unloading_waits_for_the_mutex(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, TARGET)
            await insmod(m, patch_spec("fix", "work", object="target"))
            async with trio.open_nursery() as nursery, m.livepatch.klp.klp_mutex:
                nursery.start_soon(m.delete_module, "target")
                await trio.sleep(5)
                assert m.modules.modules["target"].state == "going"
                assert await refused(m.delete_module, "target") == "EBUSY"
                assert await insmod_errno(m, TARGET) == "EBUSY"
                assert "target 12288 0 - Unloading" in await read(m, "proc/modules")
            assert m.modules.find_module("target") is None
            await disable(m, "fix")
            await gone(m, f"{KLP}/fix")

    run(main)
