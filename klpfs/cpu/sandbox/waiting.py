"""Sleeping, as the stubs that wait need it.

Model
    A thread sleeps on an address (a lock, a completion) or for a time; whoever changes what is at the address wakes
    threads from there, first come, first served.

Locks
    None.

Source
    kernel/sched/core.c, kernel/time/timer.c (``schedule_timeout``).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.thread import Sleep, Thread, Woken

__all__ = ["EINTR", "ERESTARTSYS", "ETIME", "Steps", "sleep_for", "ticks_to_ns", "wait_on", "wake_all", "wake_first"]

Steps = Generator[Any, Any, int | None]
"""What a stub that may wait is."""

EINTR, ETIME, ERESTARTSYS = 4, 62, 512


def wait_on(m: Machine, t: Thread, key: int, state: str, timeout: int | None = None) -> Generator[Any, Any, Woken]:
    """Sleep until something at *key* changes, somebody wakes the thread, or *timeout* nanoseconds passed."""
    m.queues.add(key, t)
    t.waits_for = key
    try:
        why: Woken = yield Sleep(state, timeout)
    finally:
        t.waits_for = None
        m.queues.remove(key, t)
    return why


def wake_first(m: Machine, key: int) -> None:
    """Wake who waits longest at *key*."""
    first = m.queues.first(key)
    if first is not None:
        m.queues.remove(key, first)
        m.wake(first)


def wake_all(m: Machine, key: int) -> None:
    """Wake everybody who waits at *key*."""
    for thread in m.queues.all(key):
        m.queues.remove(key, thread)
        m.wake(thread)


def ticks_to_ns(jiffies: int) -> int | None:
    """Nanoseconds of a timeout in jiffies; None for the one that never comes."""
    return None if jiffies >= L.MAX_SCHEDULE_TIMEOUT else max(jiffies, 0) * L.NSEC_PER_JIFFY


def sleep_for(m: Machine, state: str, nanoseconds: int) -> Generator[Any, Any, int]:
    """Sleep for a time, whoever wakes the thread; nanoseconds left if a signal ended it."""
    end = m.now() + nanoseconds
    left = nanoseconds
    while left > 0:
        why = yield Sleep(state, left)
        left = end - m.now()
        if why is Woken.TIMEOUT:
            return 0
        if why is Woken.SIGNAL:
            return max(left, 0)
    return 0
