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
    """``struct work_struct``. *fn* is the work function; *name* is what a kworker shows while it runs it.

    ``pending``: queued, or about to be when its timer expires; ``running``: *worker* runs *fn* now. Both may hold.
    """

    def __init__(self, fn: Callable[[], Awaitable[None]], name: str) -> None:
        self.fn = fn
        self.name = name
        self.pending = False
        self.running = False
        self.worker: Task | None = None
        self.runs = 0
        """How often it has run to its end."""
        self._canceling = 0
        self._changed = trio.Event()

    @property
    def queued(self) -> bool:
        """Whether nothing but a free worker is missing for it to run."""
        return self.pending

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


class DelayedWork(Work):
    """``struct delayed_work``: a work item with a timer."""

    def __init__(self, fn: Callable[[], Awaitable[None]], name: str) -> None:
        super().__init__(fn, name)
        self.timer: trio.CancelScope | None = None

    @property
    def queued(self) -> bool:
        """Whether it is pending and its timer has expired."""
        return self.pending and self.timer is None


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

    def _queue(self, work: Work) -> None:
        # a running instance is followed by the next one on the same worker
        if not work.running:
            detached(self._nursery, self._run, work, name=f"work {work.name}")

    def schedule_work(self, work: Work) -> bool:
        """Queue *work*; False if it was pending already, or somebody waits for its end in :meth:`cancel_work_sync`."""
        if work.pending or work._canceling:
            return False
        work.pending = True
        self._queue(work)
        return True

    def schedule_delayed_work(self, work: DelayedWork, delay: float) -> bool:
        """Queue *work* after *delay* seconds; False as for :meth:`schedule_work`."""
        if work.pending or work._canceling:
            return False
        work.pending = True
        if delay <= 0:
            self._queue(work)
            return True
        work.timer = trio.CancelScope()
        detached(self._nursery, self._timer, work, delay, work.timer, name=f"timer {work.name}")
        return True

    def cancel_work(self, work: Work) -> bool:
        """Take *work* off the queue; whether it was pending. A running instance goes on (see :meth:`flush_work`)."""
        was = work.pending
        work.pending = False
        self._stop_timer(work)
        work._tell()
        return was

    @staticmethod
    def _stop_timer(work: Work) -> bool:
        if not isinstance(work, DelayedWork) or work.timer is None:
            return False
        work.timer.cancel()
        work.timer = None
        return True

    async def flush_work(self, work: Work) -> bool:
        """Wait for the end of the instance of *work* that was queued last; whether there was any.

        One that waits for its timer is queued at once (``flush_delayed_work``). Should it queue itself again, that
        instance is not waited for.
        """
        if self._stop_timer(work):
            self._queue(work)
        if not work.pending and not work.running:
            return False
        last = work.runs + work.pending + work.running
        while work.runs < last and (work.pending or work.running):
            await work._changed.wait()
        return True

    async def cancel_work_sync(self, work: Work) -> bool:
        """Cancel *work* and wait for a running instance, which cannot queue it again; whether it was pending."""
        was = self.cancel_work(work)
        work._canceling += 1
        try:
            while work.running:
                await work._changed.wait()
        finally:
            work._canceling -= 1
        return was

    async def _timer(self, work: DelayedWork, delay: float, scope: trio.CancelScope) -> None:
        with scope:
            await self._clock.sleep(delay)
        if work.timer is scope:
            work.timer = None
            await self._run(work)

    async def _run(self, work: Work) -> None:
        if not work.queued or work.running:
            return
        work.running = True
        work.worker = task = self._worker()
        idle_stack = task.stack
        task.stack = [*self._sched.frames("process_one_work"), *idle_stack]
        try:
            with self._sched.running(task):
                while work.queued:
                    work.pending = False
                    try:
                        await work.fn()
                    except Exception:
                        log.exception("work %s failed", work.name)
                    work.runs += 1
                    work._tell()
        finally:
            work.running = False
            work.worker = None
            task.stack = idle_stack
            if task.alive:
                self._idle.appendleft(task)
            work._tell()
