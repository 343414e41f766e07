"""The one clock: whatever waits or stamps takes its time from here.

Model
    Time is trio's. A real clock is trio's own; a scaled one runs *rate* seconds for each real second; a virtual one
    jumps to the next deadline as soon as nothing is left to do; a manual one stands still until it is told to jump.

Source
    include/linux/jiffies.h (``HZ``; Debian's amd64 kernels are built with 250), kernel/time/timer.c
    (``round_jiffies_relative``).
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio.testing import MockClock

__all__ = ["HZ", "Clock", "parse_clock"]

HZ = 250
"""Jiffies per second."""


def _mock(clock: trio.abc.Clock) -> MockClock | None:
    """*clock* if it is one of trio's emulated clocks. trio.testing costs 100 ms (it imports pytest where that is
    installed), so the real clock must not load it; where nobody did, there is no MockClock either."""
    testing = sys.modules.get("trio.testing")
    return clock if testing is not None and isinstance(clock, testing.MockClock) else None


def parse_clock(text: str) -> MockClock | None:
    """The trio clock that *text* asks for: ``real`` (None), a factor such as ``10``, ``virtual`` or ``manual``.

    Raises ValueError that says what is accepted.
    """
    if text == "real":
        return None

    from trio.testing import MockClock

    match text:
        case "virtual":
            # The threshold is real seconds without work; requests from user space arrive within it.
            return MockClock(autojump_threshold=0.01)
        case "manual":
            return MockClock(rate=0)
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (0 < rate <= 1_000_000):
        raise ValueError(f"clock {text!r}: expected 'real', 'virtual', 'manual' or a factor between 0 and 1000000")
    return None if rate == 1 else MockClock(rate=rate)


class Clock:
    """Seconds since boot, on trio's clock. Construct inside :func:`trio.run`."""

    def __init__(self) -> None:
        self._trio_clock = trio.lowlevel.current_clock()
        self._boot = self._trio_clock.current_time()

    def now(self) -> float:
        """Seconds since boot (``ktime_get_boottime``). Callable from any thread."""
        return self._trio_clock.current_time() - self._boot

    def jiffies(self) -> int:
        """Jiffies since boot."""
        return int(self.now() * HZ)

    async def sleep(self, seconds: float) -> None:
        """Sleep *seconds* of emulated time."""
        await trio.sleep(seconds)

    def round_jiffies_relative(self, delta: int) -> float:
        """Seconds until about *delta* jiffies from now, moved to a whole second as the kernel does to batch wake-ups.

        Rounded down when less than a quarter of a second past a whole one, else up; never into the past.
        """
        now = self.jiffies()
        target = now + delta
        rem = target % HZ
        rounded = target - rem if rem < HZ // 4 else target - rem + HZ
        if rounded <= now:
            rounded = target
        return (rounded - now) / HZ

    @property
    def kind(self) -> str:
        """``real``, ``scaled``, ``virtual`` or ``manual``."""
        clock = _mock(self._trio_clock)
        if clock is None:
            return "real"
        if clock.autojump_threshold != math.inf:
            return "virtual"
        return "manual" if clock.rate == 0 else "scaled"

    def jump(self, seconds: float) -> None:
        """Move emulated time forward by *seconds*.

        Raises ValueError for a negative amount or a clock that cannot jump (the real one).
        """
        clock = _mock(self._trio_clock)
        if clock is None:
            raise ValueError("the real clock cannot jump: start with --clock manual, virtual or a factor")
        clock.jump(seconds)

    @property
    def rate(self) -> float:
        """Emulated seconds for each real one."""
        clock = _mock(self._trio_clock)
        return 1.0 if clock is None else clock.rate
