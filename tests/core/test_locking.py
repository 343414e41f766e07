"""The lock-order checker and the mutex."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from conftest import machine
from core_support import Run
from hypothesis import given
from hypothesis import strategies as st

from klpfs.kernel.locking import Lockdep, LockOrderError, Mutex


def chain(lockdep: Lockdep, *classes: str) -> None:
    """Take the locks in this order, and drop them."""
    taken = []
    try:
        for cls in classes:
            lockdep.acquire(cls, site=f"taking {cls} after {taken[-1] if taken else 'nothing'}")
            taken.append(cls)
    finally:
        for cls in reversed(taken):
            lockdep.release(cls)


def test_one_order_is_fine() -> None:
    lockdep = Lockdep()
    for _ in range(3):
        chain(lockdep, "a", "b", "c")
        chain(lockdep, "b", "c")
        chain(lockdep, "a", "c")
    assert lockdep.reports == []
    assert lockdep.held() == []
    assert set(lockdep.edges) == {("a", "b"), ("b", "c"), ("a", "c")}


def test_an_inversion_names_both_sites() -> None:
    lockdep = Lockdep()
    chain(lockdep, "a", "b")
    with pytest.raises(LockOrderError, match="possible circular locking dependency detected") as info:
        chain(lockdep, "b", "a")
    error = info.value
    assert (error.cls, error.held) == ("a", "b")
    assert (error.site, error.prior_site) == ("taking a after b", "taking b after a")
    assert str(error) in lockdep.reports
    assert lockdep.held() == [], "the lock was not taken"
    assert ("b", "a") not in lockdep.edges
    chain(lockdep, "a", "b")


def test_a_cycle_of_several() -> None:
    lockdep = Lockdep()
    for pair in ("ab", "bc", "cd"):
        chain(lockdep, *pair)
    with pytest.raises(LockOrderError):
        chain(lockdep, "d", "a")
    chain(lockdep, "a", "d")


def test_twice_the_same() -> None:
    lockdep = Lockdep()
    with pytest.raises(LockOrderError, match="possible recursive locking detected"):
        chain(lockdep, "a", "a")


def test_readers() -> None:
    lockdep = Lockdep()
    lockdep.acquire("a", read=True)
    lockdep.acquire("a", read=True)
    with pytest.raises(LockOrderError, match="recursive"):
        lockdep.acquire("a")
    lockdep.release("a")
    assert [h.cls for h in lockdep.held()] == ["a"]
    lockdep.release("a")
    # a read reference orders like any other: a writer waits for it
    lockdep.acquire("a", read=True)
    lockdep.acquire("b")
    lockdep.release("b")
    lockdep.release("a")
    with pytest.raises(LockOrderError):
        chain(lockdep, "b", "a")


def test_switched_off() -> None:
    lockdep = Lockdep(enabled=False)
    chain(lockdep, "a", "b")
    chain(lockdep, "b", "a")
    assert lockdep.reports == []


def test_dropping_what_is_not_held() -> None:
    lockdep = Lockdep()
    lockdep.release("a")
    lockdep.acquire("a")
    lockdep.release("b")
    assert [h.cls for h in lockdep.held()] == ["a"]


@given(st.lists(st.permutations("abcd").map(lambda p: p[:3]), max_size=8))
def test_it_accepts_exactly_what_has_one_order(sequences: list[Sequence[str]]) -> None:
    lockdep = Lockdep()
    edges: set[tuple[str, str]] = set()

    def reaches(start: str, goal: str) -> bool:
        todo, seen = [start], {start}
        while todo:
            here = todo.pop()
            for a, b in edges:
                if a == here and b not in seen:
                    seen.add(b)
                    todo.append(b)
        return goal in seen

    for sequence in sequences:
        ok = True
        for i, cls in enumerate(sequence):
            if any(reaches(cls, held) for held in sequence[:i]):
                ok = False
                break
            edges |= {(held, cls) for held in sequence[:i]}
        if ok:
            chain(lockdep, *sequence)
        else:
            with pytest.raises(LockOrderError):
                chain(lockdep, *sequence)


# -- the mutex ---------------------------------------------------------------------------------------------------------


def test_a_mutex_is_taken_in_turn(run: Run) -> None:
    async def main() -> None:
        mutex = Mutex("m", Lockdep())
        order: list[str] = []

        async def user(name: str) -> None:
            async with mutex:
                assert mutex.locked()
                assert mutex.held_by_me()
                order.append(name)
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(user, name)
                await trio.sleep(0.1)
            assert not mutex.held_by_me()
        assert order == ["a", "b", "c"]
        assert not mutex.locked()

    run(main)


def test_an_inversion_of_two_mutexes(run: Run) -> None:
    async def main() -> None:
        lockdep = Lockdep()
        a, b = Mutex("a", lockdep), Mutex("b", lockdep)
        async with a, b:
            pass
        with pytest.raises(LockOrderError) as info:
            async with b, a:
                pass
        assert "test_locking.py" in info.value.site
        assert "test_locking.py" in info.value.prior_site
        assert info.value.site != info.value.prior_site
        assert not a.locked()
        assert not b.locked()

    run(main)


def test_locks_are_held_per_task(run: Run) -> None:
    async def main() -> None:
        lockdep = Lockdep()
        a, b = Mutex("a", lockdep), Mutex("b", lockdep)

        async def other() -> None:
            async with b:
                await trio.sleep(1)

        async with trio.open_nursery() as nursery, a:
            nursery.start_soon(other)
            await trio.sleep(0.5)
            assert [h.cls for h in lockdep.held()] == ["a"]
        assert lockdep.edges == {}

    run(main)


def test_a_waiter_that_is_cancelled(run: Run) -> None:
    async def main() -> None:
        lockdep = Lockdep()
        mutex = Mutex("m", lockdep)

        async def holder() -> None:
            async with mutex:
                await trio.sleep(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(holder)
            await trio.sleep(1)
            with trio.move_on_after(1):
                async with mutex:
                    raise AssertionError("not reached")
            assert lockdep.held() == []

    run(main)


def test_an_error_inside_drops_the_lock(run: Run) -> None:
    async def main() -> None:
        lockdep = Lockdep()
        mutex = Mutex("m", lockdep)
        with pytest.raises(KeyError):
            async with mutex:
                raise KeyError
        assert not mutex.locked()
        assert lockdep.held() == []

    run(main)


def test_a_waiter_sleeps(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("t")
            mutex = m.livepatch.klp.klp_mutex

            async def wait() -> None:
                with m.sched.running(task):
                    async with mutex:
                        assert task.state == "R"

            async with trio.open_nursery() as nursery, mutex:
                nursery.start_soon(wait)
                await trio.sleep(1)
                assert task.state == "D"

    run(main)
