"""``klp_enable_patch``: what it checks, in which order, what it logs and leaves behind (kernel/livepatch/core.c)."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, machine, read
from core_support import Run, add_module, address, directories, livepatch_lines, make_patch, refused, sleeper, warnings

from klpfs.kernel.kallsyms import SymInfo
from klpfs.livepatch import KlpFunc, KlpObject, KlpPatch
from klpfs.machine import Machine


def assert_untouched(m: Machine, patch: KlpPatch) -> None:
    """Nothing is left of a patch that was refused."""
    assert patch.mod is not None
    assert patch.mod.refcnt == 0
    assert directories(m) == []
    assert m.livepatch.patches == []
    assert m.livepatch.transition_patch is None
    assert m.livepatch.klp.klp_ops == {}
    assert m.ftrace.hooked() == []
    assert all(t.patch_state == -1 and not t.patch_pending for t in m.sched.for_each_process_thread())
    assert m.lockdep.reports == []
    assert warnings(m) == []
    assert not m.livepatch.klp.klp_mutex.locked()


def test_directories_and_attributes(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            add_module(m, "target", ["work", "rest"])
            patch = make_patch(m, "fix", {"vmlinux": ["once", "twice,2"], "target": ["work"], "absent": ["thing"]})
            await m.livepatch.klp_enable_patch(patch)
            assert directories(m) == [
                "fix",
                "fix/absent",
                "fix/absent/thing,1",
                "fix/target",
                "fix/target/work,1",
                "fix/vmlinux",
                "fix/vmlinux/once,1",
                "fix/vmlinux/twice,2",
            ]
            node = m.kernfs.lookup(f"{KLP}/fix")
            assert node is not None
            modes = {child.name: child.mode for child in node.children() if child.kind == "file"}
            assert modes == {"enabled": 0o644, "transition": 0o444, "force": 0o200, "replace": 0o444}
            assert [await read(m, f"{KLP}/fix/{obj}/patched") for obj in ("vmlinux", "target", "absent")] == [
                "1",
                "1",
                "0",
            ]
            assert patch.mod is not None
            assert patch.mod.refcnt == 1
            assert (patch.enabled, patch.forced) == (True, False)
            assert len(m.ftrace.hooked()) == 3

    run(main)


def test_a_patch_without_objects_is_a_patch(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {}))
            assert directories(m) == ["fix"]
            assert livepatch_lines(m)[-1] == "'fix': patching complete"

    run(main)


@pytest.mark.parametrize(
    ("func", "number", "lines"),
    [
        (KlpFunc("", 1), "EINVAL", []),
        (KlpFunc("once", 0), "EINVAL", []),
        (KlpFunc("x" * 512, 1), "EINVAL", []),
        (KlpFunc("nosuch", 1), "EINVAL", ["symbol 'nosuch' not found in symbol table"]),
        (KlpFunc("nosuch", 1, 2), "EINVAL", ["symbol 'nosuch' not found in symbol table"]),
        (KlpFunc("twice", 1), "EINVAL", ["unresolvable ambiguity for symbol 'twice' in object '(null)'"]),
        (KlpFunc("twice", 1, 3), "EINVAL", ["symbol position 3 for symbol 'twice' in object 'vmlinux' not found"]),
        (KlpFunc("once", 1, 2), "EINVAL", ["symbol position 2 for symbol 'once' in object 'vmlinux' not found"]),
        (KlpFunc("once", 1), "ENOENT", ["kallsyms size lookup failed for 'once' replacement"]),
    ],
)
def test_functions_that_are_refused(run: Run, func: KlpFunc, number: str, lines: list[str]) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "fix", livepatch=True)
            patch = KlpPatch(mod, [KlpObject(None, [func])])
            assert await refused(m.livepatch.klp_enable_patch, patch) == number
            assert livepatch_lines(m) == lines
            assert_untouched(m, patch)

    run(main)


def test_an_ambiguous_symbol_of_a_module_names_the_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            target = add_module(m, "target", ["work"])
            symbols = [SymInfo("work", target.base + 64 * i, 64, "t") for i in range(2)]
            m.kallsyms.add_module("target", symbols)
            patch = make_patch(m, "fix", {"target": ["work"]})
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
            assert livepatch_lines(m) == ["unresolvable ambiguity for symbol 'work' in object 'target'"]
            del m.modules.modules["fix"]
            patch = make_patch(m, "fix", {"target": ["work,2"]})
            await m.livepatch.klp_enable_patch(patch)
            assert patch.obj_list[0].func_list[0].old_func == symbols[1].value

    run(main)


def test_names_that_are_too_long(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "fix", livepatch=True)
            patch = KlpPatch(mod, [KlpObject("m" * 56, [])])
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
            assert_untouched(m, patch)
            await m.livepatch.klp_enable_patch(KlpPatch(mod, [KlpObject("m" * 55, [])]))
            assert directories(m) == ["fix", "fix/" + "m" * 55]

    run(main)


def test_one_name_twice_in_a_directory(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "fix", ["a", "b"], livepatch=True)
            func = KlpFunc("once", mod.base)
            patch = KlpPatch(mod, [KlpObject(None, [func, KlpFunc("once", mod.base + 64, 1)])])
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EEXIST"
            lines = [r.message for r in m.printk.records()][-2:]
            assert lines == [
                "sysfs: cannot create duplicate filename '/kernel/livepatch/fix/vmlinux/once,1'",
                "kobject: kobject_add_internal failed for once,1 with -EEXIST, don't try to register things with "
                "the same name in the same directory.",
            ]
            assert_untouched(m, patch)
            patch = KlpPatch(mod, [KlpObject(None, [func]), KlpObject(None, [])])
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EEXIST"
            assert_untouched(m, patch)

    run(main)


def test_a_patch_that_is_not_marked(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {"vmlinux": ["once"]})
            assert patch.mod is not None
            patch.mod.is_livepatch = False
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
            assert livepatch_lines(m) == ["module fix is not marked as a livepatch module"]
            assert_untouched(m, patch)

    run(main)


def test_a_module_that_is_going(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {"vmlinux": ["once"]})
            assert patch.mod is not None
            patch.mod.state = "going"
            assert await refused(m.livepatch.klp_enable_patch, patch) == "ENODEV"
            assert livepatch_lines(m) == []
            assert_untouched(m, patch)

    run(main)


def test_relocations_against_a_loaded_object_that_fail(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            add_module(m, "target", ["work"])
            patch = make_patch(m, "fix", {"vmlinux": ["once"], "target": ["work"], "absent": ["work"]})
            assert patch.mod is not None
            code = patch.mod.code
            code.reloc_errno = 8  # type: ignore[attr-defined]
            assert await refused(m.livepatch.klp_enable_patch, patch) == "ENOEXEC"
            assert code.relocs == [("apply", "target")]  # type: ignore[attr-defined]
            assert_untouched(m, patch)

    run(main)


def test_a_failure_in_the_second_object_undoes_the_first(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            add_module(m, "target", ["work"])
            events: list[str] = []
            patch = make_patch(
                m, "fix", {"vmlinux": ["once"], "target": ["work"]}, events=events, pre_patch={"target": -19}
            )
            assert await refused(m.livepatch.klp_enable_patch, patch) == "ENODEV"
            assert livepatch_lines(m) == [
                "enabling patch 'fix'",
                "'fix': initializing patching transition",
                "pre-patch callback failed for object 'target'",
                "failed to enable patch 'fix'",
                "'fix': canceling patching transition, going to unpatch",
                "'fix': completing unpatching transition",
                "'fix': unpatching complete",
            ]
            # the object whose pre-patch callback failed gets no post-unpatch callback; nobody gets pre-unpatch
            assert events == ["pre_patch vmlinux", "pre_patch target", "post_unpatch vmlinux"]
            assert_untouched(m, patch)

    run(main)


def test_a_function_without_a_location_after_its_pre_patch_callback(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch = make_patch(m, "fix", {"vmlinux": ["once", "untraceable", "vfs_read"]}, events=events)
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
            assert livepatch_lines(m)[2:5] == [
                "failed to find location for function 'untraceable'",
                "failed to patch object 'vmlinux'",
                "failed to enable patch 'fix'",
            ]
            assert events == ["pre_patch vmlinux", "post_unpatch vmlinux"]
            assert_untouched(m, patch)

    run(main)


def test_a_positive_answer_of_a_pre_patch_callback_refuses_too(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch = make_patch(m, "fix", {"vmlinux": ["once"]}, events=events, pre_patch={"vmlinux": 1})
            with pytest.raises(OSError, match="answered 1"):
                await m.livepatch.klp_enable_patch(patch)
            assert events == ["pre_patch vmlinux"]
            assert_untouched(m, patch)

    run(main)


def test_during_a_transition_nothing_is_logged_and_nothing_stays(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            sleeper(m, address(m, "once"))
            await m.livepatch.klp_enable_patch(make_patch(m, "first", {"vmlinux": ["once"]}))
            before = livepatch_lines(m)
            second = make_patch(m, "second", {"vmlinux": ["vfs_read"]}, replace=True)
            assert await refused(m.livepatch.klp_enable_patch, second) == "EBUSY"
            assert livepatch_lines(m) == before
            assert directories(m) == ["first", "first/vmlinux", "first/vmlinux/once,1"]
            assert second.mod is not None
            assert second.mod.refcnt == 0
            # what is wrong with a patch is found first
            third = make_patch(m, "third", {"vmlinux": ["nosuch"]})
            assert await refused(m.livepatch.klp_enable_patch, third) == "EINVAL"

    run(main)


def test_one_patch_cannot_be_enabled_twice(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {"vmlinux": ["once"]})
            await m.livepatch.klp_enable_patch(patch)
            assert patch.mod is not None
            assert (
                await refused(
                    m.livepatch.klp_enable_patch,
                    KlpPatch(patch.mod, [KlpObject(None, [KlpFunc("once", patch.mod.base)])]),
                )
                == "EEXIST"
            )
            assert patch.mod.refcnt == 1
            assert await read(m, f"{KLP}/fix/enabled") == "1"

    run(main)


def test_a_refused_patch_can_come_again(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {"vmlinux": ["once"], "target": ["work"]})
            target = add_module(m, "target", ["other"])
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
            m.kallsyms.add_module("target", [SymInfo("work", target.base, 64, "t")])
            await m.livepatch.klp_enable_patch(patch)
            assert await read(m, f"{KLP}/fix/target/patched") == "1"

    run(main)


@pytest.mark.parametrize("kernel", ["seed", "5.1"])
def test_atomic_replace_exists_since_it_does(run: Run, kernel: str) -> None:
    async def main() -> None:
        async with machine(kernel) as m:
            patch = make_patch(m, "fix", {"vmlinux": ["once"]}, replace=True)
            if kernel == "seed":
                assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
                assert_untouched(m, patch)
            else:
                await m.livepatch.klp_enable_patch(patch)
                assert patch.enabled

    run(main)


def test_enabling_waits_for_the_mutex(run: Run) -> None:
    """A callback that sleeps keeps all other changes waiting, but nobody from reading."""

    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "slow", {"vmlinux": ["once"]})

            async def pre_patch(obj: KlpObject) -> int:
                await trio.sleep(5)
                return 0

            assert patch.objs is not None
            patch.objs[0].callbacks.pre_patch = pre_patch
            other = make_patch(m, "other", {"vmlinux": ["vfs_read"]})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.livepatch.klp_enable_patch, patch)
                await trio.sleep(1)
                nursery.start_soon(m.livepatch.klp_enable_patch, other)
                await trio.sleep(1)
                assert directories(m) == ["slow", "slow/vmlinux", "slow/vmlinux/once,1"]
                assert await read(m, f"{KLP}/slow/enabled") == "0"
                assert await read(m, f"{KLP}/slow/transition") == "1"
            assert trio.current_time() >= 5
            assert [p.name for p in m.livepatch.patches] == ["slow", "other"]
            await gone(m, f"{KLP}/nosuch")

    run(main)
