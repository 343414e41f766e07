"""The clock (kernel/time/timer.c ``round_jiffies_relative``; trio's clocks)."""

from __future__ import annotations

import math
import time

import pytest
import trio
import trio.testing
from core_support import Run
from hypothesis import given
from hypothesis import strategies as st

from klpfs.kernel.clock import HZ, Clock, parse_clock


class At(Clock):
    """A clock that stands at a number of jiffies."""

    def __init__(self, jiffies: int) -> None:
        self._at = jiffies

    def jiffies(self) -> int:
        return self._at


@pytest.mark.parametrize(
    ("now", "delta", "until"),
    [
        (0, HZ, HZ),
        (1, HZ, HZ),
        (HZ // 4 - 1, HZ, HZ),
        (HZ // 4, HZ, 2 * HZ),
        (HZ - 1, HZ, 2 * HZ),
        (100, 10, HZ),
        # rounding down would lead into the past: as asked for
        (HZ + 1, 10, HZ + 11),
        (HZ, 0, HZ),
        (HZ + 3, 0, HZ + 3),
    ],
)
def test_rounding_to_whole_seconds(now: int, delta: int, until: int) -> None:
    assert At(now).round_jiffies_relative(delta) * HZ == until - now


@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_rounding_never_leads_into_the_past(now: int, delta: int) -> None:
    jiffies = round(At(now).round_jiffies_relative(delta) * HZ)
    assert jiffies > 0
    assert jiffies == delta or (now + jiffies) % HZ == 0
    assert abs(jiffies - delta) < HZ


@pytest.mark.parametrize(
    ("text", "kind", "rate"),
    [("real", "real", 1), ("1", "real", 1), ("virtual", "virtual", 0), ("manual", "manual", 0), ("10", "scaled", 10),
     ("0.5", "scaled", 0.5), ("1e3", "scaled", 1000)],
)  # fmt: skip
def test_kinds(text: str, kind: str, rate: float) -> None:
    clock = parse_clock(text)

    async def main() -> tuple[str, float]:
        here = Clock()
        return here.kind, here.rate

    assert trio.run(main, clock=clock) == (kind, rate)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "fast", "1000001", "10x"])
def test_clocks_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'real', 'virtual', 'manual' or a factor"):
        parse_clock(text)


def test_seconds_since_boot(run: Run) -> None:
    async def main() -> None:
        await trio.sleep(100)
        clock = Clock()
        assert (clock.now(), clock.jiffies()) == (0, 0)
        await clock.sleep(2.5)
        assert (clock.now(), clock.jiffies()) == (2.5, 625)

    run(main)


def test_a_virtual_clock_sleeps_fast(run: Run) -> None:
    start = time.perf_counter()
    run(trio.sleep, 1e6)
    assert time.perf_counter() - start < 5


def test_a_manual_clock_moves_when_told() -> None:
    async def main() -> None:
        clock = Clock()
        woken: list[float] = []

        async def sleeper() -> None:
            await clock.sleep(10)
            woken.append(clock.now())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(9)
            await trio.testing.wait_all_tasks_blocked()
            assert woken == []
            clock.jump(2)
        assert woken == [11]
        with pytest.raises(ValueError, match="back"):
            clock.jump(-1)

    trio.run(main, clock=parse_clock("manual"))


def test_the_real_clock_cannot_jump() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="cannot jump"):
            Clock().jump(1)

    trio.run(main)


def test_a_scaled_clock_runs_faster() -> None:
    async def main() -> float:
        clock = Clock()
        start = time.perf_counter()
        await clock.sleep(50)
        assert not math.isnan(clock.now())
        return time.perf_counter() - start

    assert trio.run(main, clock=parse_clock("1000")) < 10
