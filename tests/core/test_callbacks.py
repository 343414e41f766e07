"""Callbacks: which run when, in which order, and under which rule (Documentation/livepatch/callbacks.rst)."""

from __future__ import annotations

import pytest
import trio
from conftest import KLP, gone, machine, write
from core_support import Run, add_module, address, directories, disable, make_patch, refused, sleeper

from klpfs.livepatch import KlpObject


def test_order_over_the_objects(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            for name in ("one", "two"):
                add_module(m, name, ["work"])
            patch = make_patch(
                m, "fix", {"two": ["work"], "vmlinux": ["once"], "absent": ["f"], "one": []}, events=events
            )
            await m.livepatch.klp_enable_patch(patch)
            order = ["two", "vmlinux", "one"]
            assert events == [f"pre_patch {o}" for o in order] + [f"post_patch {o}" for o in order]
            events.clear()
            await disable(m, "fix")
            assert events == [f"pre_unpatch {o}" for o in order] + [f"post_unpatch {o}" for o in order]

    run(main)


def test_an_object_without_functions_is_patched(run: Run) -> None:
    """So its pre-unpatch callback runs."""

    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": []}, events=events))
            await disable(m, "fix")
            assert [e.split()[0] for e in events] == ["pre_patch", "post_patch", "pre_unpatch", "post_unpatch"]

    run(main)


@pytest.mark.parametrize("missing", ["pre_patch", "post_patch", "pre_unpatch", "post_unpatch"])
def test_any_callback_may_be_missing(run: Run, missing: str) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            patch = make_patch(m, "fix", {"vmlinux": ["once"]}, events=events)
            assert patch.objs is not None
            setattr(patch.objs[0].callbacks, missing, None)
            await m.livepatch.klp_enable_patch(patch)
            await disable(m, "fix")
            kinds = ["pre_patch", "post_patch", "pre_unpatch", "post_unpatch"]
            assert [e.split()[0] for e in events] == [k for k in kinds if k != missing]

    run(main)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failing_pre_patch_callback(run: Run, failing: int) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            names = ["vmlinux", "one", "two"]
            for name in names[1:]:
                add_module(m, name, ["work"])
            patch = make_patch(m, "fix", {n: [] for n in names}, events=events, pre_patch={names[failing]: -5})
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EIO"
            assert events == [
                *[f"pre_patch {n}" for n in names[: failing + 1]],
                *[f"post_unpatch {n}" for n in names[:failing]],
            ]
            assert directories(m) == []

    run(main)


def test_post_patch_waits_for_the_end_of_the_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            events: list[str] = []
            task = sleeper(m, address(m, "once"))
            await m.livepatch.klp_enable_patch(make_patch(m, "fix", {"vmlinux": ["once"]}, events=events))
            await trio.sleep(10)
            assert events == ["pre_patch vmlinux"]
            m.sched.exit(task)
            await trio.sleep(1.1)
            assert events == ["pre_patch vmlinux", "post_patch vmlinux"]
            task = sleeper(m, m.livepatch.patches[0].obj_list[0].func_list[0].new_func)
            await disable(m, "fix")
            await trio.sleep(10)
            assert events[2:] == ["pre_unpatch vmlinux"]
            m.sched.exit(task)
            await trio.sleep(1.1)
            assert events[3:] == ["post_unpatch vmlinux"]

    run(main)


def test_replaced_patches_get_no_callbacks(run: Run) -> None:
    """Only the new patch's run: it knows best how to take over (callbacks.rst, "cumulative patches")."""

    async def main() -> None:
        async with machine() as m:
            old: list[str] = []
            new: list[str] = []
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"vmlinux": ["once"]}, events=old))
            old.clear()
            patch = make_patch(m, "new", {"vmlinux": ["vfs_read"]}, events=new, replace=True)
            await m.livepatch.klp_enable_patch(patch)
            await gone(m, f"{KLP}/old")
            assert old == []
            assert new == ["pre_patch vmlinux", "post_patch vmlinux"]

    run(main)


def test_what_a_callback_sees(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            target = add_module(m, "target", ["work"])
            patch = make_patch(m, "fix", {"target": ["work"]})
            seen: list[tuple[str, bool, bool, bool]] = []

            def look(kind: str):  # type: ignore[no-untyped-def]
                async def callback(obj: KlpObject) -> int:
                    assert obj.mod is target
                    assert m.livepatch.klp.klp_mutex.held_by_me()
                    in_transition = m.livepatch.transition_patch is patch
                    seen.append((kind, obj.patched, patch.enabled, in_transition))
                    return 0

                return callback

            assert patch.objs is not None
            for kind in ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch"):
                setattr(patch.objs[0].callbacks, kind, look(kind))
            await m.livepatch.klp_enable_patch(patch)
            await disable(m, "fix")
            assert seen == [
                ("pre_patch", False, False, True),
                ("post_patch", True, True, True),
                ("pre_unpatch", True, True, True),
                ("post_unpatch", False, False, True),
            ]

    run(main)


def test_a_slow_callback_holds_up_the_writer_of_another_patch(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "slow", {"vmlinux": ["once"]})

            async def post_unpatch(obj: KlpObject) -> None:
                await trio.sleep(7)

            assert patch.objs is not None
            patch.objs[0].callbacks.post_unpatch = post_unpatch
            await m.livepatch.klp_enable_patch(patch)
            await m.livepatch.klp_enable_patch(make_patch(m, "other", {"vmlinux": ["vfs_read"]}))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disable, m, "slow")
                await trio.sleep(1)
                nursery.start_soon(write, m, f"{KLP}/other/enabled", "0")
                await trio.sleep(1)
                assert [p.name for p in m.livepatch.patches] == ["slow", "other"]
            assert trio.current_time() == 7
            await gone(m, f"{KLP}/other")

    run(main)
