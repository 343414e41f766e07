"""System states (kernel/livepatch/state.c, Documentation/livepatch/system-state.rst)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import KLP, gone, machine
from core_support import Run, directories, disable, livepatch_lines, make_patch, refused, warnings

from klpfs.livepatch import KlpObject, KlpState

States = Sequence[tuple[int, int]]


@pytest.mark.parametrize(
    ("installed", "states", "replace", "compatible"),
    [
        ([], [], True, True),
        ([[(1, 2)]], [(1, 2)], True, True),
        ([[(1, 2)]], [(1, 3)], True, True),
        ([[(1, 2)]], [(1, 1)], True, False),
        ([[(1, 2)]], [(1, 1)], False, False),
        ([[(1, 2)]], [], True, False),
        ([[(1, 2)]], [], False, True),
        ([[(1, 2)]], [(2, 9)], False, True),
        ([[(1, 1)], [(2, 1)]], [(1, 1), (2, 1)], True, True),
        ([[(1, 1)], [(2, 1)]], [(1, 1)], True, False),
        ([[(1, 1)], [(1, 3)]], [(1, 2)], False, False),
        ([[(1, 1), (2, 5)]], [(2, 5), (1, 1)], True, True),
        # a state 0 ends the list
        ([[(0, 0), (1, 5)]], [], True, True),
        ([[(1, 5)]], [(0, 0), (1, 5)], True, False),
    ],
)
def test_compatibility(run: Run, installed: list[States], states: States, replace: bool, compatible: bool) -> None:
    async def main() -> None:
        async with machine() as m:
            for n, old in enumerate(installed):
                await m.livepatch.klp_enable_patch(make_patch(m, f"old{n}", {"vmlinux": ["once"]}, states=old))
            patch = make_patch(m, "new", {"vmlinux": ["once"]}, states=states, replace=replace)
            if compatible:
                await m.livepatch.klp_enable_patch(patch)
                assert patch.enabled
                return
            before = directories(m)
            assert await refused(m.livepatch.klp_enable_patch, patch) == "EINVAL"
            assert livepatch_lines(m)[-1] == (
                "Livepatch patch (new) is not compatible with the already installed livepatches."
            )
            assert directories(m) == before
            assert patch.mod is not None
            assert patch.mod.refcnt == 0

    run(main)


def test_a_disabled_patch_imposes_nothing(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"vmlinux": ["once"]}, states=[(1, 9)]))
            await disable(m, "old")
            await gone(m, f"{KLP}/old")
            new = make_patch(m, "new", {"vmlinux": ["once"]}, states=[(1, 1)], replace=True)
            await m.livepatch.klp_enable_patch(new)
            assert new.enabled

    run(main)


def test_before_they_existed(run: Run) -> None:
    async def main() -> None:
        async with machine("5.1") as m:
            await m.livepatch.klp_enable_patch(make_patch(m, "old", {"vmlinux": ["once"]}, states=[(1, 9)]))
            await m.livepatch.klp_enable_patch(make_patch(m, "new", {"vmlinux": ["once"]}, states=[(1, 1)]))
            assert len(m.livepatch.patches) == 2

    run(main)


def test_get_state(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            patch = make_patch(m, "fix", {}, states=[(7, 1), (8, 2), (0, 0), (9, 3)])
            found = m.livepatch.klp_get_state(patch, 8)
            assert found is not None
            assert (found.id, found.version) == (8, 2)
            assert [m.livepatch.klp_get_state(patch, id) for id in (0, 1, 9)] == [None, None, None]

    run(main)


def test_the_data_of_a_state_are_handed_on(run: Run) -> None:
    """The newest patch below the one in transition that has the state, for all callbacks of that one."""

    async def main() -> None:
        async with machine() as m:
            seen: list[object] = []
            for n, states in enumerate([[(1, 1)], [(1, 1), (2, 1)], [(2, 1)]]):
                patch = make_patch(m, f"p{n}", {"vmlinux": ["once"]}, states=states)
                for state in patch.states:
                    state.data = f"p{n}:{state.id}"
                await m.livepatch.klp_enable_patch(patch)

            async def look(obj: KlpObject) -> int:
                assert obj.patch is not None
                own = m.livepatch.klp_get_state(obj.patch, 1)
                previous = [m.livepatch.klp_get_prev_state(id) for id in (1, 2, 3)]
                seen.append([None if p is None else p.data for p in previous])
                assert isinstance(own, KlpState)
                assert own.data is None
                return 0

            new = make_patch(m, "new", {"vmlinux": ["once"]}, states=[(1, 1), (2, 1)], replace=True)
            assert new.objs is not None
            new.objs[0].callbacks.pre_patch = new.objs[0].callbacks.post_patch = look
            new.objs[0].callbacks.pre_unpatch = look
            await m.livepatch.klp_enable_patch(new)
            await gone(m, f"{KLP}/p0")
            await disable(m, "new")
            # post_patch runs before the replaced patches leave the list; later there is nobody below
            assert seen == [["p1:1", "p2:2", None], ["p1:1", "p2:2", None], [None, None, None]]

    run(main)


def test_asking_for_the_previous_state_outside_a_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            for _ in range(3):
                assert m.livepatch.klp_get_prev_state(1) is None
            assert warnings(m) == ["kernel/livepatch/state.c klp_get_prev_state"], "once"

    run(main)
