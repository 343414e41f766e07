"""Work items, delayed work and the kworker tasks that run them.

Model
    A work item is queued at most once at a time and runs in a kworker, a kernel thread of :mod:`klpfs.kernel.sched`.
    While it runs, that kworker is ``current``, so that a function that sleeps inside a work item is on the stack of a
    real task and can stall a transition. A work item never runs concurrently with itself.

Locks
    None: all on the trio thread.

Source
    kernel/workqueue.c (``queue_work``, ``queue_delayed_work``, ``flush_work``, ``cancel_work_sync``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from klpfs.kernel.clock import Clock
from klpfs.kernel.sched import Sched, Task, detached

__all__ = ["DelayedWork", "Work", "Workqueue"]

log = logging.getLogger(__name__)


class Work:
    """``struct work_struct``. *fn* is the work function; *name* is what a kworker shows while it runs it."""

    def __init__(self, fn: Callable[[], Awaitable[None]], name: str) -> None:
        self.fn = fn
        self.name = name
        self.pending = False
        self.running = False
        self.done = trio.Event()
        self.done.set()
        self.worker: Task | None = None


class DelayedWork(Work):
    """``struct delayed_work``: a work item with a timer."""

    def __init__(self, fn: Callable[[], Awaitable[None]], name: str) -> None:
        super().__init__(fn, name)
        self.timer: trio.CancelScope | None = None


class Workqueue:
    """``system_wq``: runs work items on kworkers, starting one more whenever all are busy."""

    def __init__(self, nursery: trio.Nursery, sched: Sched, clock: Clock) -> None:
        self._nursery = nursery
        self._sched = sched
        self._clock = clock
        self._idle: deque[Task] = deque()
        self._count = 0

    def _worker(self) -> Task:
        if self._idle:
            return self._idle.popleft()
        self._count += 1
        cpu = (self._count - 1) % self._sched.cpus
        number = (self._count - 1) // self._sched.cpus
        task = self._sched.kthread(f"kworker/{cpu}:{number}")
        task.stack = [*self._sched.frames("worker_thread"), *task.stack]
        return task

    def schedule_work(self, work: Work) -> bool:
        """Queue *work*; False if it was pending already."""
        if work.pending:
            return False
        work.pending = True
        if work.done.is_set():
            work.done = trio.Event()
        if not work.running:
            detached(self._nursery, self._run, work, name=f"work {work.name}")
        return True

    def schedule_delayed_work(self, work: DelayedWork, delay: float) -> bool:
        """Queue *work* after *delay* seconds; False if it was pending already."""
        if work.pending:
            return False
        work.pending = True
        if work.done.is_set():
            work.done = trio.Event()
        work.timer = trio.CancelScope()
        detached(self._nursery, self._timer, work, delay, work.timer, name=f"timer {work.name}")
        return True

    def cancel_work(self, work: Work) -> bool:
        """Take *work* off the queue; whether it was pending. A running instance goes on (see :meth:`flush_work`)."""
        was = work.pending
        work.pending = False
        if isinstance(work, DelayedWork) and work.timer is not None:
            work.timer.cancel()
            work.timer = None
        if was and not work.running:
            work.done.set()
        return was

    async def flush_work(self, work: Work) -> bool:
        """Wait until *work* is neither pending nor running; whether there was anything to wait for."""
        if work.done.is_set():
            return False
        if isinstance(work, DelayedWork) and work.timer is not None:
            # flush_delayed_work() runs what waits for its timer at once
            work.timer.cancel()
            work.timer = None
            if not work.running:
                detached(self._nursery, self._run, work, name=f"work {work.name}")
        while not work.done.is_set():
            await work.done.wait()
        return True

    async def cancel_work_sync(self, work: Work) -> bool:
        """Cancel *work* and wait for a running instance; whether it was pending."""
        was = self.cancel_work(work)
        while work.running:
            await work.done.wait()
        return was

    async def _timer(self, work: DelayedWork, delay: float, scope: trio.CancelScope) -> None:
        with scope:
            await self._clock.sleep(delay)
        if scope.cancelled_caught or work.timer is not scope:
            return
        work.timer = None
        if work.pending and not work.running:
            await self._run(work)

    async def _run(self, work: Work) -> None:
        if not work.pending or work.running:
            return
        work.running = True
        work.worker = task = self._worker()
        idle_stack = task.stack
        task.stack = [*self._sched.frames("process_one_work"), *idle_stack]
        try:
            with self._sched.running(task):
                while work.pending:
                    work.pending = False
                    try:
                        await work.fn()
                    except Exception:
                        log.exception("work %s failed", work.name)
        finally:
            work.running = False
            work.worker = None
            task.stack = idle_stack
            if task.alive:
                self._idle.appendleft(task)
            if not work.pending:
                work.done.set()
