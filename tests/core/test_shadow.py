"""Shadow variables (kernel/livepatch/shadow.c)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from conftest import machine
from core_support import Run, livepatch_lines, warnings

from klpfs.kernel.locking import LockOrderError


async def set_first(obj: object, data: Any, ctor_data: object) -> int:
    """A constructor that keeps its argument, or fails with it when it is negative."""
    assert isinstance(ctor_data, int)
    if ctor_data < 0:
        return ctor_data
    data[0] = ctor_data
    return 0


def test_get_and_alloc(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            klp = m.livepatch
            assert klp.klp_shadow_get(0x10, 1) is None
            data = await klp.klp_shadow_alloc(0x10, 1, 8)
            assert data == bytearray(8), "zeroed"
            assert klp.klp_shadow_get(0x10, 1) is data
            assert klp.klp_shadow_get(0x10, 2) is None
            assert klp.klp_shadow_get(0x11, 1) is None
            assert await klp.klp_shadow_alloc(0x10, 2, 1) is not data
            assert await klp.klp_shadow_alloc(0x10, 3, 0) == bytearray(), "even of no size"
            assert klp.klp_shadow_get(0x10, 3) is not None

    run(main)


def test_a_duplicate_is_a_warning(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            klp = m.livepatch
            first = await klp.klp_shadow_alloc(0x10, 0xAB, 1, set_first, 5)
            assert await klp.klp_shadow_alloc(0x10, 0xAB, 1, set_first, 6) is None
            assert first == bytearray([5])
            assert "Duplicate shadow variable <0000000000000010, ab>" in [r.message for r in m.printk.records()]
            assert len(warnings(m)) == 1
            assert m.kernel.test_taint("W")
            assert await klp.klp_shadow_get_or_alloc(0x10, 0xAB, 1, set_first, 7) is first
            assert first == bytearray([5]), "no constructor for what is there"
            assert len(warnings(m)) == 1

    run(main)


@pytest.mark.parametrize("call", ["klp_shadow_alloc", "klp_shadow_get_or_alloc"])
def test_a_constructor_that_fails(run: Run, call: str) -> None:
    async def main() -> None:
        async with machine() as m:
            freed: list[object] = []
            alloc = getattr(m.livepatch, call)
            assert await alloc(0x10, 1, 1, set_first, -12, free=freed.append) is None
            assert livepatch_lines(m) == ["Failed to construct shadow variable <0000000000000010, 1> (-12)"]
            assert m.livepatch.klp_shadow_get(0x10, 1) is None
            assert freed == [bytearray(1)]
            assert await alloc(0x10, 1, 1, set_first, 3) == bytearray([3])
            assert warnings(m) == []

    run(main)


@pytest.mark.parametrize("nothing", [None, 0])
def test_no_memory(run: Run, nothing: object) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await m.livepatch.klp_shadow_alloc(1, 1, 1, alloc=lambda size: nothing) is None
            assert m.livepatch.klp_shadow_get(1, 1) is None

    run(main)


def test_destructors(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            klp = m.livepatch
            seen: list[tuple[object, bytes]] = []
            freed: list[object] = []

            async def dtor(obj: object, data: Any) -> None:
                assert klp.klp_shadow_get(obj, 1) is None, "detached already"
                seen.append((obj, bytes(data)))

            for obj in (1, 2, 3):
                await klp.klp_shadow_alloc(obj, 1, 1, set_first, obj, free=freed.append)
                await klp.klp_shadow_alloc(obj, 2, 1, set_first, obj + 10, free=freed.append)
            await klp.klp_shadow_free(2, 1, dtor)
            await klp.klp_shadow_free(2, 1, dtor)
            await klp.klp_shadow_free(9, 1, dtor)
            assert seen == [(2, b"\2")]
            await klp.klp_shadow_free_all(1, dtor)
            assert sorted(seen[1:]) == [(1, b"\1"), (3, b"\3")]
            await klp.klp_shadow_free_all(1, dtor)
            assert len(seen) == len(freed) == 3
            assert [klp.klp_shadow_get(obj, 2) for obj in (1, 2, 3)] == [b"\x0b", b"\x0c", b"\x0d"]
            await klp.klp_shadow_free_all(2)
            assert m.livepatch.klp.klp_shadow_hash == {}
            assert len(freed) == 6

    run(main)


def test_two_that_allocate_at_the_same_time(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            constructed: list[object] = []
            freed: list[object] = []
            got: list[object] = []

            async def ctor(obj: object, data: Any, ctor_data: object) -> int:
                await trio.sleep(1)
                constructed.append(data)
                return 0

            async def get(free: Any) -> None:
                got.append(await m.livepatch.klp_shadow_get_or_alloc(1, 1, 4, ctor, free=free))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(get, freed.append)
                nursery.start_soon(get, freed.append)
            assert len(constructed) == 1
            assert got[0] is got[1] is constructed[0]
            assert len(freed) == 1, "the speculative one"
            assert freed[0] is not constructed[0]

    run(main)


def test_constructors_and_destructors_must_not_call_back(run: Run) -> None:
    """They run under ``klp_shadow_lock``, a spinlock in the kernel."""

    async def main() -> None:
        async with machine() as m:

            async def ctor(obj: object, data: object, ctor_data: object) -> int:
                await m.livepatch.klp_shadow_free(1, 2)
                return 0

            with pytest.raises(LockOrderError, match="possible recursive locking detected") as info:
                await m.livepatch.klp_shadow_alloc(1, 1, 1, ctor)
            assert info.value.cls == info.value.held == "klp_shadow_lock"
            assert not m.livepatch.klp.klp_shadow_lock.locked()

    run(main)
