"""Tasks: pids, inheritance, waking, signals (kernel/fork.c, kernel/sched/core.c, kernel/signal.c in small)."""

from __future__ import annotations

import signal

import pytest
import trio
from conftest import machine
from core_support import Run

from klpfs.kernel.sched import FIRST_HIGH_PID, RESERVED_PIDS, Sched, Task, detached


@pytest.fixture
def sched() -> Sched:
    """Two CPUs and kthreadd."""
    return Sched(lambda: 0.0)


def test_what_is_there_at_boot(sched: Sched) -> None:
    (kthreadd,) = sched.for_each_process_thread()
    assert (kthreadd.pid, kthreadd.comm, kthreadd.ppid, kthreadd.kthread) == (2, "kthreadd", 0, True)
    assert [(t.pid, t.comm, t.idle_cpu) for t in sched.idle] == [(0, "swapper/0", 0), (0, "swapper/1", 1)]


@pytest.mark.parametrize("cpus", [0, -1, 8193])
def test_numbers_of_cpus_that_make_no_sense(cpus: int) -> None:
    with pytest.raises(ValueError, match="cpus"):
        Sched(lambda: 0.0, cpus=cpus)


def test_pids(sched: Sched) -> None:
    tasks = [sched.spawn(f"t{n}") for n in range(RESERVED_PIDS + 5)]
    pids = [t.pid for t in tasks]
    assert pids[: RESERVED_PIDS - 3] == list(range(3, RESERVED_PIDS)), "where no real process is numbered"
    assert pids[RESERVED_PIDS - 3 :] == list(range(FIRST_HIGH_PID, FIRST_HIGH_PID + 8)), "beyond any real process"
    sched.exit(tasks[10])
    assert sched.spawn("again").pid == tasks[10].pid
    with pytest.raises(OSError, match="in use"):
        sched.spawn("taken", pid=5)
    assert sched.spawn("asked", pid=77_777).pid == 77_777
    sched.spawn("high", pid=FIRST_HIGH_PID + 8)
    assert sched.spawn("next").pid == FIRST_HIGH_PID + 9


def test_find_and_exit(sched: Sched) -> None:
    task = sched.spawn("t")
    task.patch_pending = True
    assert sched.find(task.pid) is task
    sched.exit(task)
    assert (task.alive, task.state, task.patch_pending) == (False, "X", False)
    with pytest.raises(OSError, match="no task"):
        sched.find(task.pid)
    sched.exit(task)


def test_names_states_and_parents(sched: Sched) -> None:
    parent = sched.spawn("a-name-that-is-too-long")
    assert parent.comm == "a-name-that-is-"
    assert (parent.ppid, sched.spawn("k", kthread=True).ppid, sched.spawn("c", parent=parent).ppid) == (
        1,
        2,
        parent.pid,
    )
    thread = sched.spawn("thread", tgid=parent.pid)
    assert (thread.tgid, parent.tgid) == (parent.pid, parent.pid)
    with pytest.raises(OSError, match="expected one of"):
        sched.spawn("t", state="Q")


def test_current_is_of_the_context(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            a, b = m.sched.spawn("a"), m.sched.spawn("b", state="D")
            seen: list[Task | None] = []

            async def look() -> None:
                await trio.lowlevel.checkpoint()
                seen.append(m.sched.current)

            async with trio.open_nursery() as nursery:
                with m.sched.running(a):
                    nursery.start_soon(look)
                    detached(nursery, look, name="a kernel thread")
                    with m.sched.running(b):
                        assert m.sched.current is b
                        assert (a.state, b.state) == ("R", "R")
                    assert m.sched.current is a
                    assert b.state == "D"
                assert m.sched.current is None
                nursery.start_soon(look)
            assert sorted(seen, key=repr) == sorted([a, None, None], key=repr)

    run(main)


def test_sleeping_and_frames(sched: Sched) -> None:
    with sched.sleeping("D", [1]), sched.frame(2):
        pass  # nobody: nothing to do
    task = sched.spawn("t")
    task.stack = [9]
    with sched.running(task):
        with sched.frame(5):
            with sched.sleeping("D", [1, 2]):
                assert (task.state, task.stack) == ("D", [1, 2, 5, 9])
            assert (task.state, task.stack) == ("R", [5, 9])
        assert task.stack == [9]
    assert (task.state, task.stack) == ("S", [9])


@pytest.mark.parametrize(("state", "leaves", "woken"), [("S", False, True), ("S", True, True), ("D", True, False)])
def test_waking(sched: Sched, state: str, leaves: bool, woken: bool) -> None:
    calls: list[Task] = []
    task = sched.spawn("t", kthread=True, state=state)
    task.stack, task.wake_leaves, task.on_wake = [1], leaves, calls.append
    assert sched.wake_up_state(task) == woken
    assert bool(calls) == woken
    assert task.stack == ([] if woken and leaves else [1])


@pytest.mark.parametrize(
    ("state", "on_cpu", "in_user", "real", "leaves"),
    [
        ("S", False, False, False, True),
        ("D", False, False, False, False),
        ("R", True, True, False, True),
        ("R", True, False, False, False),
        ("S", False, False, True, False),
        ("T", False, False, False, False),
    ],
)
def test_the_fake_signal(sched: Sched, state: str, on_cpu: bool, in_user: bool, real: bool, leaves: bool) -> None:
    switched: list[Task] = []
    sched.update_patch_state = switched.append
    task = sched.spawn("t", state=state)
    task.on_cpu, task.in_user, task.real, task.stack = on_cpu, in_user, real, [1]
    sched.set_notify_signal(task)
    assert bool(switched) == leaves
    assert task.notify_signal != leaves
    assert task.alive, "it is not a signal that anybody could see"


@pytest.mark.parametrize(
    ("state", "sig", "after"),
    [
        ("S", signal.SIGTERM, "X"),
        ("S", signal.SIGKILL, "X"),
        ("R", signal.SIGHUP, "X"),
        ("D", signal.SIGKILL, "D"),
        ("S", signal.SIGCHLD, "S"),
        ("S", signal.SIGWINCH, "S"),
        ("S", 0, "S"),
        ("S", signal.SIGSTOP, "T"),
        ("D", signal.SIGSTOP, "D"),
        ("T", signal.SIGCONT, "S"),
        ("T", signal.SIGTERM, "T"),
        ("T", signal.SIGKILL, "X"),
        ("Z", 0, "Z"),
    ],
)
def test_signals(sched: Sched, state: str, sig: int, after: str) -> None:
    task = sched.spawn("t", state=state)
    sched.signal(task, sig)
    assert task.state == after
    assert task.alive == (after != "X")


def test_a_fatal_signal_waits_for_the_way_out(sched: Sched) -> None:
    switched: list[Task] = []
    sched.update_patch_state = switched.append
    task = sched.spawn("t", state="D")
    sched.signal(task, signal.SIGTERM)
    assert task.alive
    sched.leave_kernel(task)
    assert switched == [task], "first the switch, then the end, as on the way to user space"
    assert not task.alive
    stopped = sched.spawn("s", state="T")
    sched.signal(stopped, signal.SIGTERM)
    sched.signal(stopped, signal.SIGCONT)
    assert not stopped.alive


def test_kernel_threads_get_no_signals(sched: Sched) -> None:
    task = sched.spawn("k", kthread=True)
    for sig in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        sched.signal(task, sig)
    assert (task.alive, task.state) == (True, "S")


def test_signals_of_real_processes_go_to_them(sched: Sched) -> None:
    sent: list[int] = []
    task = sched.spawn("r")
    task.real, task.on_signal = True, lambda t, sig: sent.append(sig)
    sched.signal(task, 15)
    assert sent == [15]
    assert task.alive


def test_kernel_threads_show_where_they_are(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.kthread("khelper")
            names = [str(m.kallsyms.lookup(a)).partition("+")[0] for a in task.trace()]
            assert names == ["kthread", "ret_from_fork", "ret_from_fork_asm"]
            assert (task.state, task.ppid) == ("I", 2)

    run(main)
