"""Sleeping locks and the lock-order checker.

Model
    :class:`Lockdep` keeps, for every pair of lock classes, where the second was first taken while the first was held.
    An acquisition that would close a cycle is a :class:`LockOrderError` at once, whether or not this run would have
    deadlocked: that is what makes an inversion testable.

Locks
    Held locks are tracked per trio task (outside trio, per thread of control: one).

Source
    kernel/locking/lockdep.c in idea (classes, held stack, dependency graph), kernel/locking/mutex.c for the interface.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from weakref import WeakKeyDictionary

import trio

__all__ = ["HeldLock", "LockOrderError", "Lockdep", "Mutex"]


class LockOrderError(RuntimeError):
    """Two lock classes are taken in both orders, or one is taken twice by the same task.

    Attributes: ``cls`` the class being acquired, ``held`` the class already held, ``site`` where it is acquired,
    ``prior_site`` where the opposite order was seen (both ``file:line function``).
    """

    def __init__(self, cls: str, held: str, site: str, prior_site: str, reason: str) -> None:
        self.cls, self.held, self.site, self.prior_site = cls, held, site, prior_site
        super().__init__(
            f"{reason}: acquiring {cls!r} at {site} while holding {held!r}; "
            f"the opposite order was taken at {prior_site}"
        )


@dataclass(slots=True)
class HeldLock:
    """One lock held by a task."""

    cls: str
    read: bool
    site: str


class _Anchor:
    """Stands for the current task where there is no trio task (plain synchronous callers)."""


@dataclass
class Lockdep:
    """The lock-order checker.

    ``edges`` maps ``(held class, acquired class)`` to the site that established the order.
    """

    enabled: bool = True
    edges: dict[tuple[str, str], str] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)
    _after: dict[str, set[str]] = field(default_factory=dict)
    _held: WeakKeyDictionary[object, list[HeldLock]] = field(default_factory=WeakKeyDictionary)
    _anchor: object = field(default_factory=_Anchor)

    def held(self) -> list[HeldLock]:
        """The locks held by the current task, outermost first."""
        try:
            task: object = trio.lowlevel.current_task()
        except RuntimeError:
            task = self._anchor
        return self._held.setdefault(task, [])

    def acquire(self, cls: str, *, read: bool = False, site: str | None = None) -> None:
        """Note that the current task is about to take a lock of class *cls*.

        Raises :class:`LockOrderError` when that inverts an order seen before, or takes the same class again (two
        readers of one class are fine).
        """
        if not self.enabled:
            return
        site = site or _caller_site()
        held = self.held()
        # Two classes in both orders come first: where the same class is held, too, they say why it is.
        for h in held:
            path = None if h.cls == cls else self._path(cls, h.cls)
            if path is not None:
                prior = self.edges[path[0], path[1]]
                reason = "possible circular locking dependency detected"
                self._report(LockOrderError(cls, h.cls, site, prior, reason))
        for h in held:
            if h.cls == cls and not (h.read and read):
                self._report(LockOrderError(cls, h.cls, site, h.site, "possible recursive locking detected"))
        for h in held:
            if h.cls != cls and (h.cls, cls) not in self.edges:
                self.edges[h.cls, cls] = site
                self._after.setdefault(h.cls, set()).add(cls)
        held.append(HeldLock(cls, read, site))

    def release(self, cls: str) -> None:
        """Note that the current task has dropped its innermost lock of class *cls*."""
        if not self.enabled:
            return
        held = self.held()
        for i in range(len(held) - 1, -1, -1):
            if held[i].cls == cls:
                del held[i]
                return

    def _path(self, start: str, goal: str) -> list[str] | None:
        """A chain of recorded orders that leads from *start* to *goal*, or None."""
        todo = [[start]]
        seen = {start}
        while todo:
            path = todo.pop()
            for nxt in self._after.get(path[-1], ()):
                if nxt == goal:
                    return [*path, nxt]
                if nxt not in seen:
                    seen.add(nxt)
                    todo.append([*path, nxt])
        return None

    def _report(self, error: LockOrderError) -> None:
        self.reports.append(str(error))
        raise error


class Mutex:
    """``struct mutex``: an async context manager known to the lock-order checker.

    *sleeping* is entered while a task waits for its turn (:meth:`klpfs.kernel.sched.Sched.sleeping`): one that waits
    sleeps, and does not run. Raises :class:`LockOrderError` on an inversion. Source: kernel/locking/mutex.c.
    """

    def __init__(
        self, name: str, lockdep: Lockdep, sleeping: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.name = name
        self._lockdep = lockdep
        self._sleeping = sleeping
        self._lock = trio.Lock()

    def locked(self) -> bool:
        """Whether any task holds the mutex (``mutex_is_locked``)."""
        return self._lock.locked()

    def held_by_me(self) -> bool:
        """Whether the current task holds it (``lockdep_assert_held``)."""
        return self._lock.statistics().owner is trio.lowlevel.current_task()

    async def __aenter__(self) -> None:
        self._lockdep.acquire(self.name, site=_caller_site())
        try:
            if self._lock.locked():
                with self._sleeping():
                    await self._lock.acquire()
            else:
                await self._lock.acquire()
        except BaseException:
            self._lockdep.release(self.name)
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._lock.release()
        self._lockdep.release(self.name)


def _caller_site() -> str:
    """``file:line function`` of the nearest frame outside this module."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    name = "/".join(code.co_filename.rsplit("/", 2)[-2:])
    return f"{name}:{frame.f_lineno} {code.co_qualname}"
