"""Real processes as tasks of the emulated scheduler.

Model
    Each thread of the world has a :class:`~klpfs.kernel.sched.Task` of the same number. Before the livepatch core
    walks the tasks, :meth:`WorldTasks.refresh` adds those that are new (with the patch state of their parent, as a fork
    does), drops those that ended, and looks at the state of the rest. A thread's stack is what it does in the emulated
    kernel (a system call or a read that executes module code), and below that the functions of the host's kernel that
    it sleeps in, as far as that may be read and the emulated kernel has functions of the same names. So a process that
    sleeps in ``pipe_read`` holds up a patch of ``pipe_read``.

    A thread in module code is told at each look of signals that wait for it, so that killing it ends its sleep there.

    A thread that has been in user space since the last look has passed the kernel's exit and is switched. That is seen
    from what it does: it runs, or waits in another system call, or the same one with other arguments.

Locks
    None: on the trio thread.

Source
    kernel/fork.c (``klp_copy_process``), kernel/entry/common.c (``exit_to_user_mode_loop``), proc(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from typing import TYPE_CHECKING

from klpfs.world.bpf import FIRST_HIGH_PID, RESERVED_PIDS

if TYPE_CHECKING:
    from klpfs.kernel.sched import Sched, Task
    from klpfs.world.hostproc import HostProc

__all__ = ["WorldTasks", "own_frames"]

#: Functions of the host's kernel that wait for a FUSE server or a seccomp supervisor.
_WAITING = ("request_wait", "fuse_", "seccomp", "syscall_trace", "schedule")


def _is_real(tid: int) -> bool:
    return tid == 1 or RESERVED_PIDS <= tid < FIRST_HIGH_PID


def own_frames(task: Task, lines: list[str]) -> list[str]:
    """Of the host's frames of a real *task*, those that it has in the emulated kernel, too.

    While it is in functions of the emulated kernel, the host's waits for us, in functions that it does not pass there.
    """
    if task.code_fn is None and not task.stack:
        return lines
    return list(dropwhile(lambda line: line.lstrip("_").startswith(_WAITING), lines))


class _Real:
    """What is known of one real thread."""

    __slots__ = ("busy", "gone", "key", "path", "syscall", "task")

    def __init__(self, task: Task, path: str, key: tuple[int, int]) -> None:
        self.task = task
        self.path = path
        self.key = key
        self.busy = 0
        self.gone = False
        self.syscall = ""


class WorldTasks:
    """The real threads of a world, in *sched*."""

    def __init__(self, sched: Sched, proc: HostProc) -> None:
        self.sched = sched
        self.proc = proc
        self._known: dict[int, _Real] = {}
        self._frames: dict[str, int] = {}
        sched.providers.append(self.refresh)

    # -- the list -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the tasks up to date."""
        seen = set()
        for pid in self.proc.pids():
            try:
                tids = self.proc.threads(pid)
            except OSError:
                continue
            for tid in tids:
                try:
                    self._look(tid, pid)
                except OSError:
                    continue  # it ended just now
                seen.add(tid)
        for tid, real in list(self._known.items()):
            if tid not in seen:
                self._forget(tid, real)

    def ensure(self, tid: int) -> Task | None:
        """The task of a real thread, made if it is not known yet; None if there is no such thread."""
        if not _is_real(tid):
            return None
        try:
            return self._look(tid, 0).task
        except OSError:
            real = self._known.get(tid)
            if real is not None:
                self._forget(tid, real)
            return None

    def _look(self, tid: int, pid: int) -> _Real:
        path = f"{pid}/task/{tid}" if pid else str(tid)
        stat = self.proc.stat(path)
        real = self._known.get(tid)
        if real is not None and real.key[1] != stat.start:
            self._forget(tid, real)  # another thread with the same number
            real = None
        if real is None:
            pid = pid or self.proc.tgid(tid)
            # as it is now: it may have left the kernel, and so been switched, before it forked
            parent = self.ensure(stat.ppid if tid == pid else pid)
            task = self.sched.spawn(stat.comm, pid=tid, tgid=pid, ppid=stat.ppid, parent=parent)
            task.real = True
            real = self._known[tid] = _Real(task, f"{pid}/task/{tid}", (tid, stat.start))
            task.stack_fn = lambda: self._trace(real)
        task = real.task
        task.comm, task.ppid = stat.comm[:15], stat.ppid
        if not real.busy:
            task.state = stat.state if stat.state in "RSDTtXZPI" else "S"
            if task.patch_pending:
                self._switch_if_it_left(real)
        elif task.on_interrupt is not None and self._signal_pending(tid):
            task.on_interrupt(task)
        return real

    def _signal_pending(self, tid: int) -> bool:
        """Whether a signal waits for a real thread to return to user space: one that is neither blocked nor ignored."""
        status = self.proc.status(tid)
        pending, shared, blocked, ignored = (int(status[key], 16) for key in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn"))
        return bool((pending | shared) & ~blocked & ~ignored)

    def _forget(self, tid: int, real: _Real) -> None:
        self._known.pop(tid, None)
        real.gone = True
        if not real.busy:
            self.sched.exit(real.task)

    # -- what keeps a task from being switched ------------------------------------------------------------------------

    def _switch_if_it_left(self, real: _Real) -> None:
        """Switch a pending task that has been in user space, or was told by a signal to go there."""
        task = real.task
        now = self.proc.syscall(real.path)
        before, real.syscall = real.syscall, now
        left = task.state in "RZX" or (bool(before) and now != before)
        if left or (task.notify_signal and task.state == "S"):
            real.syscall = ""
            self.sched.leave_kernel(task)

    def _trace(self, real: _Real) -> list[int]:
        """Where a real task sleeps in the host's kernel, as addresses of the emulated one."""
        frames: list[int] = []
        if real.gone:
            return frames
        try:
            lines = self.proc.stack(real.path)
            if lines is None:
                lines = [self.proc.wchan(real.path)]
        except OSError:
            return frames
        for line in own_frames(real.task, lines):
            name = line.partition("+")[0]
            frames.append(self._address(name))
        return [frame for frame in frames if frame]

    def _address(self, name: str) -> int:
        """An address in the emulated kernel's function *name*, 0 if it has none."""
        address = self._frames.get(name)
        if address is None:
            address = self._frames[name] = next(iter(self.sched.frames(name.partition(".")[0])), 0)
        return address

    # -- doing something for a task -----------------------------------------------------------------------------------

    @contextmanager
    def in_kernel(self, task: Task | None) -> Iterator[None]:
        """*task* is ``current`` for the duration; then it returns to user space, where a pending switch is made."""
        if task is None:
            yield
            return
        real = self._known.get(task.pid)
        if real is not None and real.task is not task:
            real = None
        if real is not None:
            real.busy += 1
        try:
            with self.sched.running(task):
                yield
        finally:
            if real is not None:
                real.busy -= 1
                if not real.busy:
                    if real.gone:
                        self.sched.exit(task)
                    else:
                        task.notify_signal = False
                        self.sched.update_patch_state(task)
