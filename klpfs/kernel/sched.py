"""Tasks: who runs, who sleeps where, and which patch state each one has.

Model
    A :class:`Task` is a thread. It carries exactly what the consistency model looks at: whether it is on a CPU, whether
    its stack can be trusted, the return addresses on its stack (innermost first), its ``patch_state`` and the
    ``TIF_PATCH_PENDING`` flag. Real processes of a world are added by providers before every walk.

Locks
    None: all on the trio thread (the kernel's ``tasklist_lock`` is the absence of ``await``).

Source
    include/linux/sched.h (``struct task_struct``), kernel/sched/core.c (``wake_up_state``, ``task_curr``),
    kernel/signal.c and kernel/entry/common.c (``exit_to_user_mode_loop`` switches a pending task).
"""

from __future__ import annotations

import contextvars
import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

__all__ = ["FIRST_HIGH_PID", "KLP_TRANSITION_IDLE", "RESERVED_PIDS", "Sched", "Task", "detached"]

KLP_TRANSITION_IDLE = -1
"""``patch_state`` outside a transition (include/linux/livepatch.h)."""

RESERVED_PIDS = 300
"""Real pids wrap around to this number (kernel/pid.c), so the ones below never collide with a real process."""

FIRST_HIGH_PID = 4_194_305
"""Above the largest ``pid_max``: where emulated pids go on when those below :data:`RESERVED_PIDS` are used up."""

TASK_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "disk sleep",
    "T": "stopped",
    "t": "tracing stop",
    "X": "dead",
    "Z": "zombie",
    "P": "parked",
    "I": "idle",
}


@dataclass(eq=False, slots=True)
class Task:
    """``struct task_struct``, as far as livepatch cares.

    ``state`` is the letter that ``ps`` shows; ``stack`` holds return addresses, innermost first; ``on_cpu`` means
    that it runs now (``task_curr``); ``in_user`` that it runs in user space; ``reliable`` that its stack trace can be
    trusted; ``wake_leaves`` that a wake-up makes it leave what it sleeps in instead of going back to sleep;
    ``fatal_signal`` that it ends as soon as it gets to see its signals; ``real`` that it mirrors a process of the host.
    """

    pid: int
    comm: str
    tgid: int = 0
    ppid: int = 0
    kthread: bool = False
    state: str = "S"
    stack: list[int] = field(default_factory=list)
    reliable: bool = True
    on_cpu: bool = False
    in_user: bool = False
    wake_leaves: bool = False
    idle_cpu: int | None = None
    real: bool = False
    start: float = 0.0
    patch_state: int = KLP_TRANSITION_IDLE
    patch_pending: bool = False
    notify_signal: bool = False
    fatal_signal: bool = False
    alive: bool = True
    cmdline: str = ""
    on_wake: Callable[[Task], None] | None = None
    on_signal: Callable[[Task, int], None] | None = None
    on_interrupt: Callable[[Task], None] | None = None
    """While it executes module code: what ends an interruptible sleep there."""
    code_fn: Callable[[], list[int]] | None = None
    """While it executes module code: a function that reads that part of the stack, the innermost one."""
    stack_fn: Callable[[], list[int]] | None = None
    """Where the outermost part of the stack lives elsewhere (in the host's kernel), a function that reads it."""

    def inner(self) -> list[int]:
        """What :meth:`trace` gives, without what lies elsewhere."""
        return [*self.code_fn(), *self.stack] if self.code_fn is not None else self.stack

    def trace(self) -> list[int]:
        """``stack_trace_save_tsk``: the return addresses, innermost first."""
        return [*self.inner(), *self.stack_fn()] if self.stack_fn is not None else self.inner()

    def __repr__(self) -> str:
        return f"<Task {self.comm}:{self.pid} {self.state}>"


def detached(nursery: trio.Nursery, fn: Callable[..., Awaitable[None]], *args: Any, name: str) -> None:
    """Start *fn* in *nursery* with nothing of the caller's context: neither ``current`` nor the references it holds.

    What a kernel thread does is not done inside the system call that set it off.
    """
    contextvars.Context().run(partial(nursery.start_soon, fn, *args, name=name))


class Sched:
    """All tasks of one kernel, the idle task of each CPU included."""

    def __init__(self, now: Callable[[], float], *, cpus: int = 2) -> None:
        if not 1 <= cpus <= 8192:
            raise ValueError(f"cpus: {cpus} is not between 1 and 8192")
        self.cpus = cpus
        self._now = now
        self.tasks: dict[int, Task] = {}
        self.idle = [Task(0, f"swapper/{cpu}", kthread=True, state="R", idle_cpu=cpu) for cpu in range(cpus)]
        self.providers: list[Callable[[], None]] = []
        self.update_patch_state: Callable[[Task], None] = lambda task: None
        """Set by the livepatch core: ``klp_update_patch_state``."""
        self.frames: Callable[[str], list[int]] = lambda names: []
        """Return addresses inside the functions of vmlinux called so, as far as they exist (space separated)."""
        self._current: contextvars.ContextVar[Task | None] = contextvars.ContextVar("current", default=None)
        self._next_low = 2
        self._next_high = FIRST_HIGH_PID
        self.spawn("kthreadd", kthread=True, state="S", ppid=0)

    # -- identity ---------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Task | None:
        """The task on whose behalf the running code runs; None for the outside (a system call of the host)."""
        return self._current.get()

    @contextmanager
    def running(self, task: Task) -> Iterator[Task]:
        """Make *task* ``current`` for the duration (``schedule()`` to it and back).

        It does not count as being on a CPU: whenever other code runs here, this task is suspended, which in a kernel is
        a sleep or a preemption, and its stack is as reliable as then.
        """
        token = self._current.set(task)
        before, task.state = task.state, "R"
        try:
            yield task
        finally:
            self._current.reset(token)
            if task.state == "R":
                task.state = before

    @contextmanager
    def sleeping(self, state: str, stack: list[int] | None = None) -> Iterator[None]:
        """``current`` sleeps in *state* for the duration; *stack* is pushed on its stack (innermost first)."""
        task = self.current
        if task is None:
            yield
            return
        old_state, old_stack = task.state, task.stack
        task.state = state
        if stack is not None:
            task.stack = [*stack, *old_stack]
        try:
            yield
        finally:
            task.state, task.stack = old_state, old_stack

    @contextmanager
    def frame(self, address: int) -> Iterator[None]:
        """``current`` is inside the function around *address* for the duration: its return address is on the stack."""
        task = self.current
        if task is None:
            yield
            return
        before = task.stack
        task.stack = [address, *before]
        try:
            yield
        finally:
            task.stack = before

    # -- life -------------------------------------------------------------------------------------------------------

    def _alloc_pid(self) -> int:
        while self._next_low < RESERVED_PIDS:
            pid, self._next_low = self._next_low, self._next_low + 1
            if pid not in self.tasks:
                return pid
        # released low pids first, then upwards without end
        for pid in range(2, RESERVED_PIDS):
            if pid not in self.tasks:
                return pid
        while self._next_high in self.tasks:
            self._next_high += 1
        self._next_high += 1
        return self._next_high - 1

    def spawn(
        self,
        comm: str,
        *,
        pid: int | None = None,
        tgid: int | None = None,
        ppid: int | None = None,
        kthread: bool = False,
        state: str = "S",
        parent: Task | None = None,
    ) -> Task:
        """Create a task (``copy_process``); it inherits the patch state of *parent* (``klp_copy_process``).

        Kernel threads descend from kthreadd; a user task whose parent is not known takes its state from there too.
        Raises OSError(EEXIST) for a pid in use, OSError(EINVAL) for a state letter unknown.
        """
        if state not in TASK_STATES:
            raise OSError(errno.EINVAL, f"task state {state!r}: expected one of {' '.join(TASK_STATES)}")
        if pid is None:
            pid = self._alloc_pid()
        elif pid in self.tasks:
            raise OSError(errno.EEXIST, f"pid {pid} is in use by {self.tasks[pid].comm}")
        if ppid is None:
            ppid = parent.pid if parent else (2 if kthread else 1)
        task = Task(pid, comm[:15], tgid=tgid or pid, ppid=ppid, kthread=kthread, state=state, start=self._now())
        source = parent or (None if kthread else self.current) or self.tasks.get(2)
        if source is not None:
            task.patch_state, task.patch_pending = source.patch_state, source.patch_pending
        self.tasks[pid] = task
        return task

    def kthread(self, comm: str) -> Task:
        """A kernel thread of kthreadd, idle (``kthread_create``)."""
        task = self.spawn(comm, kthread=True, state="I")
        task.stack = self.frames("kthread ret_from_fork ret_from_fork_asm")
        return task

    def exit(self, task: Task) -> None:
        """``do_exit``: the task is gone, and with it whatever it blocked."""
        task.alive = False
        task.state = "X"
        task.patch_pending = False
        self.tasks.pop(task.pid, None)

    def find(self, pid: int) -> Task:
        """The task with *pid*. Raises OSError(ESRCH)."""
        task = self.tasks.get(pid)
        if task is None:
            raise OSError(errno.ESRCH, f"no task with pid {pid}")
        return task

    def for_each_process_thread(self) -> list[Task]:
        """All tasks but the idle ones; providers are asked first, so that real processes are there."""
        for provider in self.providers:
            provider()
        return list(self.tasks.values())

    # -- waking and signals -----------------------------------------------------------------------------------------

    def wake_up_state(self, task: Task, states: str = "S") -> bool:
        """Wake *task* if it sleeps in one of *states*; whether it did.

        A task that is woken looks at what it waits for and goes back to sleep in the same place, unless its
        ``wake_leaves`` says that a wake-up ends its wait.
        """
        if task.state not in states:
            return False
        if task.on_wake is not None:
            task.on_wake(task)
        if task.wake_leaves:
            self.leave_kernel(task)
        return True

    def set_notify_signal(self, task: Task) -> None:
        """The fake signal of a transition: an interruptible sleep ends and the task passes the kernel's exit."""
        task.notify_signal = True
        if task.on_interrupt is not None:
            task.on_interrupt(task)
        elif (task.on_cpu and task.in_user) or (task.state == "S" and not task.real):
            self.leave_kernel(task)

    def leave_kernel(self, task: Task) -> None:
        """*task* returns to user space (or, a kernel thread, to its main loop): its stack is empty, and a pending
        switch is made on the way (``exit_to_user_mode_loop``)."""
        task.stack = []
        task.notify_signal = False
        if task.on_wake is not None:
            task.on_wake(task)
        if not task.kthread:
            if task.state in "SD":
                task.state = "S"
            self.update_patch_state(task)
            if task.fatal_signal:
                self.exit(task)

    def signal(self, task: Task, sig: int) -> None:
        """Deliver signal *sig* to *task* as ``kill(2)`` would.

        Kernel threads ignore signals, unless they listen. 0 only checks. SIGSTOP and its kin stop, SIGCONT goes on.
        There are no handlers: all others end the task, an uninterruptible sleeper and one that runs in the kernel when
        they leave it, a stopped one when it goes on, unless it is SIGKILL.
        """
        if sig == 0 or (task.kthread and task.on_signal is None):
            return
        if task.on_signal is not None:
            task.on_signal(task, sig)
            return
        ignored = {17, 23, 28}  # SIGCHLD, SIGURG, SIGWINCH: ignored by default
        if sig in ignored:
            return
        if sig in {19, 20, 21, 22}:  # SIGSTOP SIGTSTP SIGTTIN SIGTTOU
            if task.state in "RS":
                task.state = "T"
        elif sig == 18:  # SIGCONT
            if task.state == "T":
                task.state = "S"
                self.leave_kernel(task)
        elif task.state == "D" or (task.on_cpu and not task.in_user) or (task.state in "Tt" and sig != 9):
            task.fatal_signal = True
        else:
            self.exit(task)
