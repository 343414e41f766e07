"""What each request of the control socket does to a machine."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from klpfs import __version__
from klpfs.control import protocol
from klpfs.control.protocol import ProtocolError
from klpfs.control.server import Emit
from klpfs.kernel.sched import Task
from klpfs.livepatch import KLP_TRANSITION_PATCHED
from klpfs.livepatch.transition import StackCheck

if TYPE_CHECKING:
    from klpfs.kernel.printk import Record
    from klpfs.livepatch import KlpPatch
    from klpfs.machine import Machine

#: Pending tasks that ``status`` names; the rest is counted.
MAX_STRAGGLERS: Final = 20
#: Tasks that are created between two looks at what else there is to do.
_BATCH: Final = 1000

_FUNCTION: Final = re.compile(r"(?:(?P<mod>[\w-]+):)?(?P<name>[A-Za-z_.$][\w.$]*)(?:\+(?P<off>0x[0-9a-fA-F]+|\d+))?")
#: Where in a function a task sleeps when the request does not say, in bytes: behind a call, so inside the function.
_DEFAULT_OFFSET: Final = 16


class Operations:
    """Serves requests for one machine; ``mountpoint``, ``driver`` and ``subtree`` are only reported.

    ``shutdown`` is called by a :class:`~klpfs.control.protocol.Shutdown`; it must return at once.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        mountpoint: str = "",
        driver: str = "",
        subtree: str = "",
        shutdown: Callable[[], None],
    ) -> None:
        self.machine = machine
        self.mountpoint = mountpoint
        self.driver = driver
        self.subtree = subtree
        self._shutdown = shutdown
        #: Tasks that were created through this interface: only these can be changed and removed.
        self._own: set[Task] = set()

    async def __call__(self, request: protocol.AnyRequest, emit: Emit) -> object:
        """The result of ``request``. Raises OSError as the emulated kernel refuses, ProtocolError for a bad value."""
        match request:
            case protocol.Ping():
                return protocol.Pong(__version__, protocol.PROTOCOL, os.getpid(), self.mountpoint)
            case protocol.Insmod():
                module = await self.machine.init_module(request.data, request.args, flags=request.flags)
                return protocol.Loaded(module.name)
            case protocol.Rmmod():
                await self.machine.delete_module(request.name, request.flags)
                return None
            case protocol.Lsmod():
                return self._modules()
            case protocol.Dmesg():
                return await self._dmesg(request, emit)
            case protocol.Status():
                return self._status()
            case protocol.Ps():
                tasks = [*self.machine.sched.idle, *self.machine.sched.for_each_process_thread()]
                return [self._task_info(task) for task in tasks]
            case protocol.TaskAdd():
                return await self._task_add(request)
            case protocol.TaskSet():
                return self._task_set(request)
            case protocol.TaskWake():
                return self._task_wake(request.pid)
            case protocol.TaskSignal():
                return self._task_signal(request)
            case protocol.TaskRemove():
                task = self._own_task(request.pid)
                self.machine.sched.exit(task)
                self._own.discard(task)
                return None
            case protocol.Clock():
                return await self._clock(request)
            case protocol.Shutdown():
                self._shutdown()
                return None

    # -- modules and log --------------------------------------------------------------------------------------------

    def _modules(self) -> list[protocol.ModuleInfo]:
        return [
            protocol.ModuleInfo(
                mod.name, mod.total_size, mod.refcnt, [m.name for m in mod.holders], mod.state, mod.taint_letters()
            )
            for mod in reversed(self.machine.modules.modules.values())
            if mod.state != "unformed"
        ]

    async def _dmesg(self, request: protocol.Dmesg, emit: Emit) -> object:
        printk = self.machine.printk
        start = printk.clear_seq if request.since is None else request.since
        seq = printk.next_seq if request.new else start
        if not request.follow:
            records = [_log_record(record) for record in printk.records(seq)]
            if request.clear:
                printk.clear()
            return records
        while True:
            for record in printk.records(seq):
                await emit(_log_record(record))
                seq = record.seq + 1
            await printk.wait_new(seq)

    # -- status -----------------------------------------------------------------------------------------------------

    def _status(self) -> protocol.StatusInfo:
        machine = self.machine
        patches = machine.livepatch.patches
        return protocol.StatusInfo(
            version=__version__,
            pid=os.getpid(),
            mountpoint=self.mountpoint,
            driver=self.driver,
            subtree=self.subtree,
            kernel=machine.profile.name,
            release=machine.profile.release,
            cpus=machine.sched.cpus,
            clock=self._clock_info(),
            tainted=machine.kernel.tainted,
            ftrace_enabled=machine.ftrace.ftrace_enabled,
            modules=len(machine.modules.modules),
            tasks=len(machine.sched.for_each_process_thread()),
            patches=[self._patch_status(order, patch) for order, patch in enumerate(patches, 1)],
            transition=self._transition_status(),
        )

    def _patch_status(self, order: int, patch: KlpPatch) -> protocol.PatchStatus:
        objects = [
            protocol.ObjectStatus(
                obj.display_name,
                obj.patched,
                [protocol.FuncStatus(func.old_name, func.old_sympos or 1, func.patched) for func in obj.func_list],
            )
            for obj in patch.obj_list
        ]
        moving = patch is self.machine.livepatch.transition_patch
        return protocol.PatchStatus(patch.name, patch.enabled, moving, patch.replace, patch.forced, order, objects)

    def _transition_status(self) -> protocol.TransitionStatus | None:
        klp = self.machine.livepatch.klp
        patch = klp.klp_transition_patch
        if patch is None:
            return None
        sched = self.machine.sched
        pending = [t for t in [*sched.for_each_process_thread(), *sched.idle] if t.patch_state != klp.klp_target_state]
        check = StackCheck(klp)
        return protocol.TransitionStatus(
            patch=patch.name,
            direction="patching" if klp.klp_target_state == KLP_TRANSITION_PATCHED else "unpatching",
            tries=klp.klp_signals_cnt,
            pending=len(pending),
            stragglers=[
                protocol.Straggler(task.pid, task.comm, task.state, _reason(task, check))
                for task in pending[:MAX_STRAGGLERS]
            ],
        )

    # -- tasks ------------------------------------------------------------------------------------------------------

    def _task_info(self, task: Task) -> protocol.TaskInfo:
        stack = []
        for address in task.trace():
            where = self.machine.kallsyms.lookup(address)
            stack.append(str(where) if where is not None else f"{address:#x}")
        return protocol.TaskInfo(
            task.pid,
            task.comm,
            task.kthread,
            task.state,
            task.patch_state,
            task.on_cpu,
            task.reliable,
            stack,
            task.real,
        )

    def _address(self, entry: str, path: str) -> int:
        """The address that a stack entry names. Raises ProtocolError for bad syntax, OSError(ENOENT) for no symbol."""
        if entry.startswith("0x"):
            try:
                address = int(entry, 16)
            except ValueError:
                address = 1 << 64
            if address >> 64:
                raise ProtocolError(f"{entry!r} is not an address of 64 bits", path)
            return address
        match = _FUNCTION.fullmatch(entry)
        if match is None:
            raise ProtocolError(f"{entry!r} is neither [MODULE:]FUNCTION[+OFFSET] nor an address", path)
        mod, name = match["mod"], match["name"]
        kallsyms = self.machine.kallsyms
        if mod is not None:
            found = kallsyms.module_on_each_symbol(mod.replace("-", "_"), name)
        else:
            found = kallsyms.on_each_match_symbol(name)
            for module in self.machine.modules.modules:
                found = found or kallsyms.module_on_each_symbol(module, name)
        if not found:
            raise OSError(errno.ENOENT, f"no function {name} in {'module ' + mod if mod else 'the kernel or a module'}")
        hit = kallsyms.lookup(found[0])
        size = hit.size if hit is not None else 1
        offset = int(match["off"], 0) if match["off"] else min(_DEFAULT_OFFSET, size - 1)
        if not 0 <= offset < size:
            raise OSError(errno.ERANGE, f"{name} has {size} bytes, offset {offset:#x} lies behind it")
        return found[0] + offset

    def _stack(self, entries: list[str]) -> list[int]:
        return [self._address(entry, f"$.stack[{i}]") for i, entry in enumerate(entries)]

    def _own_task(self, pid: int) -> Task:
        """The task ``pid``. Raises OSError: ESRCH, or EPERM for one that the kernel or the host owns."""
        task = self.machine.sched.find(pid)
        if task not in self._own:
            owner = "a process of the host" if task.real else "the kernel's own task"
            raise OSError(errno.EPERM, f"{pid} ({task.comm}) is {owner}")
        return task

    async def _task_add(self, request: protocol.TaskAdd) -> list[int]:
        stack = self._stack(request.stack)
        self._own = {task for task in self._own if task.alive}
        pids = []
        for i in range(request.count):
            state = "R" if request.on_cpu else request.state
            task = self.machine.sched.spawn(request.comm, kthread=request.kthread, state=state)
            task.stack = list(stack)
            task.reliable = request.reliable
            task.on_cpu = request.on_cpu
            task.in_user = request.in_user
            task.wake_leaves = request.wake_leaves
            self._own.add(task)
            pids.append(task.pid)
            if i % _BATCH == _BATCH - 1:
                await trio.lowlevel.checkpoint()
        return pids

    def _task_set(self, request: protocol.TaskSet) -> protocol.TaskInfo:
        task = self._own_task(request.pid)
        stack = None if request.stack is None else self._stack(request.stack)
        if stack is not None:
            task.stack = stack
        if request.state is not None:
            task.state = request.state
        if request.reliable is not None:
            task.reliable = request.reliable
        if request.on_cpu is not None:
            task.on_cpu = request.on_cpu
            task.state = request.state or ("R" if request.on_cpu else "S")
        return self._task_info(task)

    def _task_wake(self, pid: int) -> protocol.TaskInfo:
        task = self.machine.sched.find(pid)
        if task in self._own:
            # what it waited for has happened: it goes on, out of the functions on its stack
            self.machine.sched.leave_kernel(task)
        else:
            self.machine.sched.wake_up_state(task, "SDI")
        return self._task_info(task)

    def _task_signal(self, request: protocol.TaskSignal) -> bool:
        task = self.machine.sched.find(request.pid)
        if task.real:
            raise OSError(errno.EPERM, f"{task.pid} ({task.comm}) is a process of the host: use kill")
        self.machine.sched.signal(task, request.signal)
        return task.alive

    # -- clock ------------------------------------------------------------------------------------------------------

    def _clock_info(self) -> protocol.ClockInfo:
        clock = self.machine.clock
        return protocol.ClockInfo(clock.now(), clock.kind, clock.rate)

    async def _clock(self, request: protocol.Clock) -> protocol.ClockInfo:
        """Move the clock from one deadline to the next, so that all that is due on the way happens at its own time."""
        left = request.advance or 0.0
        if left and self.machine.clock.kind == "real":
            raise OSError(
                errno.EOPNOTSUPP, "the real clock cannot be moved: mount with --clock manual, virtual or a factor"
            )
        if not left:
            return self._clock_info()

        from trio.testing import wait_all_tasks_blocked  # costs what klpfs.kernel.clock says

        while left > 0:
            await wait_all_tasks_blocked()
            due = trio.lowlevel.current_statistics().seconds_to_next_deadline
            step = min(left, max(due, 1e-6))
            self.machine.clock.jump(step)
            left -= step
        await wait_all_tasks_blocked()
        return self._clock_info()


def _reason(task: Task, check: StackCheck) -> str:
    """Why a task has not been switched yet: the conditions of klp_check_and_switch_task, in its order."""
    if task.on_cpu:
        return "runs on a CPU" + (" in user space" if task.in_user else "")
    if not task.reliable:
        return "its stack cannot be trusted"
    function = check.find(task.trace())
    return f"sleeps in {function}" if function else "will be switched at the next try"


def _log_record(record: Record) -> protocol.LogRecord:
    text = record.text.decode("utf-8", "backslashreplace")
    return protocol.LogRecord(
        record.seq, record.ts_usec / 1_000_000, record.level, record.facility, text, record.caller
    )
