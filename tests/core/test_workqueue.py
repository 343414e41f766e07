"""Work items and delayed work (kernel/workqueue.c)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
from conftest import machine
from core_support import Run

from klpfs.kernel.sched import Task
from klpfs.kernel.workqueue import DelayedWork, Work
from klpfs.machine import Machine


class Item:
    """A work function that notes when it ran, on which worker, and takes *seconds*."""

    def __init__(self, m: Machine, seconds: float = 0) -> None:
        self.m = m
        self.seconds = seconds
        self.ran: list[float] = []
        self.workers: list[Task | None] = []
        self.then: Callable[[], Awaitable[None] | None] = lambda: None

    async def __call__(self) -> None:
        self.ran.append(round(trio.current_time(), 3))
        self.workers.append(self.m.sched.current)
        await trio.sleep(self.seconds)
        result = self.then()
        if result is not None:
            await result


def kworkers(m: Machine) -> list[str]:
    """Names of the workers."""
    return [t.comm for t in m.sched.for_each_process_thread() if t.comm.startswith("kworker/")]


def test_it_runs_once_on_a_worker(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m)
            work = Work(item, "item")
            assert not await m.workqueue.flush_work(work), "nothing to wait for"
            assert m.workqueue.schedule_work(work)
            assert not m.workqueue.schedule_work(work), "pending already"
            assert item.ran == []
            assert await m.workqueue.flush_work(work)
            assert item.ran == [0]
            assert (work.pending, work.running, work.worker, work.runs) == (False, False, None, 1)
            (worker,) = item.workers
            assert worker is not None
            assert (worker.comm, worker.kthread, worker.state, worker.ppid) == ("kworker/0:0", True, "I", 2)

    run(main)


def test_workers_are_started_as_needed_and_used_again(run: Run) -> None:
    async def main() -> None:
        async with machine(cpus=2) as m:
            works = [Work(Item(m, seconds=5), "slow") for _ in range(5)]
            for work in works:
                m.workqueue.schedule_work(work)
            await trio.sleep(1)
            assert kworkers(m) == ["kworker/0:0", "kworker/1:0", "kworker/0:1", "kworker/1:1", "kworker/0:2"]
            await trio.sleep(5)
            for work in works:
                m.workqueue.schedule_work(work)
            await trio.sleep(6)
            assert len(kworkers(m)) == 5
            assert all(work.runs == 2 for work in works)

    run(main)


def test_the_stack_of_a_worker(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:

            def where() -> list[str]:
                task = next(t for t in m.sched.for_each_process_thread() if t.comm.startswith("kworker/"))
                return [str(m.kallsyms.lookup(a)).partition("+")[0] for a in task.trace()]

            idle = ["worker_thread", "kthread", "ret_from_fork", "ret_from_fork_asm"]
            work = Work(Item(m, seconds=5), "item")
            m.workqueue.schedule_work(work)
            await trio.sleep(1)
            assert where() == ["process_one_work", *idle]
            await m.workqueue.flush_work(work)
            assert where() == idle

    run(main)


def test_queued_while_it_runs_it_runs_again_on_the_same_worker(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m, seconds=2)
            work = Work(item, "item")
            m.workqueue.schedule_work(work)
            await trio.sleep(1)
            assert m.workqueue.schedule_work(work)
            assert not m.workqueue.schedule_work(work)
            await m.workqueue.flush_work(work)
            assert item.ran == [0, 2], "never twice at a time"
            assert item.workers[0] is item.workers[1]
            assert len(kworkers(m)) == 1

    run(main)


def test_delayed_work(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m)
            work = DelayedWork(item, "item")
            assert m.workqueue.schedule_delayed_work(work, 10)
            assert not m.workqueue.schedule_delayed_work(work, 1)
            assert not m.workqueue.schedule_work(work)
            await trio.sleep(9.9)
            assert item.ran == []
            assert work.pending
            await trio.sleep(0.2)
            assert item.ran == [10]
            assert m.workqueue.schedule_delayed_work(work, 0)
            await m.workqueue.flush_work(work)
            assert item.ran == [10, 10.1]

    run(main)


def test_delayed_work_that_queues_itself(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m, seconds=0.5)
            work = DelayedWork(item, "item")

            def again() -> None:
                assert m.workqueue.schedule_delayed_work(work, 2)

            item.then = again
            m.workqueue.schedule_delayed_work(work, 1)
            await trio.sleep(10)
            assert item.ran == [1, 3.5, 6, 8.5], "not before its timer has expired"
            assert await m.workqueue.cancel_work_sync(work)
            await trio.sleep(10)
            assert len(item.ran) == 4

    run(main)


def test_a_timer_that_expires_while_it_runs(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m, seconds=5)
            work = DelayedWork(item, "item")
            m.workqueue.schedule_delayed_work(work, 0)
            await trio.sleep(1)
            m.workqueue.schedule_delayed_work(work, 1)
            await trio.sleep(20)
            assert item.ran == [0, 5]

    run(main)


def test_flushing_does_not_wait_for_the_timer(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m, seconds=1)
            work = DelayedWork(item, "item")

            def again() -> None:
                m.workqueue.schedule_delayed_work(work, 100)

            item.then = again
            m.workqueue.schedule_delayed_work(work, 100)
            assert await m.workqueue.flush_work(work)
            assert trio.current_time() == 1
            assert work.pending, "the next instance is not waited for"
            assert item.ran == [0]

    run(main)


def test_cancelling(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m, seconds=3)
            work = Work(item, "item")
            assert not m.workqueue.cancel_work(work)
            m.workqueue.schedule_work(work)
            assert m.workqueue.cancel_work(work)
            await trio.sleep(1)
            assert item.ran == []
            m.workqueue.schedule_work(work)
            await trio.sleep(1)
            assert not m.workqueue.cancel_work(work), "running, not pending"
            assert work.running
            assert not await m.workqueue.cancel_work_sync(work)
            assert trio.current_time() == 4

    run(main)


def test_cancelling_one_that_queues_itself(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m, seconds=3)
            work = Work(item, "item")
            queued: list[bool] = []
            item.then = lambda: queued.append(m.workqueue.schedule_work(work))
            m.workqueue.schedule_work(work)
            await trio.sleep(1)
            await m.workqueue.cancel_work_sync(work)
            assert queued == [False], "somebody waits for it to end"
            assert not work.pending
            assert m.workqueue.schedule_work(work), "afterwards it can be used again"

    run(main)


def test_cancelled_and_queued_again_at_once(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            item = Item(m)
            work = DelayedWork(item, "item")
            m.workqueue.schedule_work(work)
            m.workqueue.cancel_work(work)
            m.workqueue.schedule_delayed_work(work, 5)
            m.workqueue.cancel_work(work)
            m.workqueue.schedule_delayed_work(work, 7)
            await trio.sleep(20)
            assert item.ran == [7]

    run(main)


def test_a_flush_ends_when_what_it_waits_for_is_cancelled(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            work = Work(Item(m, seconds=2), "item")
            m.workqueue.schedule_work(work)
            await trio.sleep(1)
            m.workqueue.schedule_work(work)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.workqueue.flush_work, work)
                await trio.sleep(0.5)
                m.workqueue.cancel_work(work)
            assert trio.current_time() == 2

    run(main)


def test_a_work_function_that_fails(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with machine() as m:

            async def broken() -> None:
                raise RuntimeError("oops")

            work = Work(broken, "broken")
            with caplog.at_level(logging.ERROR):
                m.workqueue.schedule_work(work)
                await m.workqueue.flush_work(work)
            assert "work broken failed" in caplog.text
            good = Item(m)
            m.workqueue.schedule_work(Work(good, "good"))
            await trio.sleep(1)
            assert good.ran, "the worker lives on"

    run(main)


def test_work_is_done_for_nobody(run: Run) -> None:
    """Not in the context of who queued it: neither as its task nor with its locks."""

    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("writer")
            item = Item(m)
            held: list[object] = []
            item.then = lambda: held.extend(m.lockdep.held())
            work = Work(item, "item")
            async with m.livepatch.klp.klp_mutex:
                with m.sched.running(task):
                    m.workqueue.schedule_work(work)
                await m.workqueue.flush_work(work)
            assert item.workers != [task]
            assert held == []

    run(main)
