"""Which implementation a task gets: the choice of ``klp_ftrace_handler`` (kernel/livepatch/patch.c), and ftrace under
it."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, machine, write
from core_support import Run, add_module, address, disable, make_patch, refused, sleeper, warnings

from klpfs.kernel.ftrace import FtraceOps
from klpfs.kernel.sched import Task
from klpfs.livepatch import KlpFunc, KlpPatch
from klpfs.livepatch.patch import klp_ftrace_handler
from klpfs.livepatch.types import KlpOps
from klpfs.machine import Machine


def new(patch: KlpPatch) -> int:
    """The replacement of the only function of *patch*."""
    return patch.obj_list[0].func_list[0].new_func


@pytest.mark.parametrize(
    ("stack", "transition", "patch_state", "expected"),
    [
        (["new"], False, -1, "new"),
        (["new"], False, 0, "new"),
        (["new"], True, 1, "new"),
        (["new"], True, 0, "original"),
        (["new", "old"], True, 1, "new"),
        (["new", "old"], True, 0, "old"),
        (["new", "old", "older"], True, 0, "old"),
        (["nop"], False, -1, "original"),
        (["nop", "old"], True, 1, "original"),
        (["nop", "old"], True, 0, "old"),
        (["new"], True, None, "new"),
        (["nop", "old"], True, None, "original"),
    ],
)
def test_the_choice(run: Run, stack: list[str], transition: bool, patch_state: int | None, expected: str) -> None:
    async def main() -> None:
        async with machine() as m:
            codes = {"new": 1, "old": 2, "older": 3, "nop": 100, "original": 100}
            funcs = [KlpFunc("f", codes[name], nop=name == "nop") for name in stack]
            funcs[0].transition = transition
            task = None if patch_state is None else Task(5, "t", patch_state=patch_state)
            ops = KlpOps(FtraceOps(lambda ip, task: ip), funcs)
            assert klp_ftrace_handler(m.livepatch.klp, ops, 100, task) == codes[expected]
            assert warnings(m) == []

    run(main)


def test_states_that_cannot_be(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            idle = Task(5, "t")
            ops = KlpOps(FtraceOps(lambda ip, task: ip), [KlpFunc("f", 1, transition=True)])
            assert klp_ftrace_handler(m.livepatch.klp, ops, 100, idle) == 1
            ops.func_stack.clear()
            assert klp_ftrace_handler(m.livepatch.klp, ops, 100, idle) == 100
            assert len(warnings(m)) == 2

    run(main)


def test_each_task_has_its_own_during_a_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            old = address(m, "once")
            first = make_patch(m, "first", {"vmlinux": ["once"]})
            await m.livepatch.klp_enable_patch(first)
            stuck, free = sleeper(m, new(first)), m.sched.spawn("free")
            second = make_patch(m, "second", {"vmlinux": ["once"]})
            await m.livepatch.klp_enable_patch(second)
            assert m.livepatch.implementation(old, stuck) == new(first)
            assert m.livepatch.implementation(old, free) == new(second)
            assert m.livepatch.implementation(old, m.sched.spawn("child", parent=stuck)) == new(first)
            # turned around, those who had switched go back one by one
            inside = sleeper(m, new(second), "inside")
            await disable(m, "second")
            assert m.livepatch.implementation(old, free) == new(second)
            await trio.sleep(1.1)
            assert m.livepatch.implementation(old, free) == new(first)
            assert m.livepatch.implementation(old, inside) == new(second)
            m.sched.leave_kernel(inside)
            await gone(m, f"{KLP}/second")
            assert m.livepatch.implementation(old, inside) == new(first)

    run(main)


def test_removal_from_the_middle_of_the_stack(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patches = [make_patch(m, name, {"vmlinux": ["once"]}) for name in "abc"]
            for patch in patches:
                await m.livepatch.klp_enable_patch(patch)
            ops = m.livepatch.klp.klp_ops[address(m, "once")]
            assert [f.new_func for f in ops.func_stack] == [new(p) for p in reversed(patches)]
            functions = {name: patch.obj_list[0].func_list[0] for name, patch in zip("abc", patches, strict=True)}
            for name, rest in (("b", "ca"), ("a", "c")):
                await disable(m, name)
                await gone(m, f"{KLP}/{name}")
                assert ops.func_stack == [functions[n] for n in rest]
                assert not functions[name].patched
            await disable(m, "c")
            assert m.livepatch.klp.klp_ops == {}
            assert m.ftrace.hooked() == []

    run(main)


def test_one_hook_for_all_patches(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            told: list[tuple[int, bool]] = []
            m.ftrace.on_patched.append(lambda ip, hooked: told.append((ip, hooked)))
            for name in "ab":
                await m.livepatch.klp_enable_patch(make_patch(m, name, {"vmlinux": ["once"]}))
            for name in "ab":
                await disable(m, name)
            assert told == [(address(m, "once"), True), (address(m, "once"), False)]

    run(main)


# -- ftrace itself -----------------------------------------------------------------------------------------------------


def test_locations(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            once = address(m, "once")
            target = add_module(m, "target", ["work"])
            assert m.ftrace.location(once) == once
            assert m.ftrace.location(once + 1) == 0, "inside a function"
            assert m.ftrace.location(address(m, "untraceable")) == 0
            assert m.ftrace.location(5) == 0
            assert m.ftrace.location(target.base) == target.base

    run(main)


async def hook(m: Machine, ops: FtraceOps, ip: int) -> None:
    m.ftrace.register_ftrace_function(ops, ip)


def test_two_that_redirect_one_function(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            once = address(m, "once")
            tracer, other = FtraceOps(lambda ip, task: ip), FtraceOps(lambda ip, task: 7, ipmodify=True)
            await hook(m, tracer, once)
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            assert m.livepatch.implementation(once, None) == new(m.livepatch.patches[0])
            assert await refused(hook, m, other, once) == "EBUSY"
            await disable(m, "fix")
            await hook(m, other, once)
            patch = make_patch(m, "again", {"vmlinux": ["once"]})
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EBUSY"
            assert m.livepatch.implementation(once, None) == 7
            m.ftrace.unregister_ftrace_function(other)
            m.ftrace.unregister_ftrace_function(tracer)
            with pytest.raises(OSError, match="not registered"):
                m.ftrace.unregister_ftrace_function(tracer)
            assert m.ftrace.hooked() == []

    run(main)


def test_the_sysctl(run: Run) -> None:
    path = "proc/sys/kernel/ftrace_enabled"

    async def main() -> None:
        async with machine() as m:
            await write(m, path, "0")
            await write(m, path, "0")
            patch = make_patch(m, "fix", {"vmlinux": ["once"]})
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EBUSY"
            await write(m, path, "5")
            assert m.ftrace.ftrace_enabled == 5, "any number that is not 0"
            await m.livepatch.klp_enable_patch(patch)
            assert await refused(write, m, path, "0") == "EBUSY"
            assert m.ftrace.ftrace_enabled == 1
            await disable(m, "fix")
            await write(m, path, "0")
            assert await refused(write, m, path, "x") == "EINVAL"

    run(main)


def test_before_hooks_were_permanent(run: Run) -> None:
    """Switching tracing off silently took the patch off, too (Linux commit 7162431dcf72)."""

    async def main() -> None:
        async with machine("seed") as m:
            once = address(m, "once")
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}))
            await write(m, "proc/sys/kernel/ftrace_enabled", "0")
            assert m.livepatch.implementation(once, None) == once
            await m.livepatch.klp_enable_patch(make_patch(m, "other", {"vmlinux": ["vfs_read"]}))
            await write(m, "proc/sys/kernel/ftrace_enabled", "1")
            assert m.livepatch.implementation(once, None) == new(m.livepatch.patches[0])

    run(main)
