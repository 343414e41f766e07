"""What each supervised system call answers.

Model
    Loading and removing modules, and the log, go to the emulated machine; ``uname`` gets its release and version. Calls
    that name a pid below 300 or above the host's largest are about emulated tasks, unless the caller lives in a PID
    namespace of its own, where such a pid is its own business. ``lseek`` matters for /dev/kmsg alone, which is a FUSE
    file, whose server is not told of seeks: the offset of the open file is set to a number by which it can tell.
    Concurrent ``finit_module`` of one file is one load, and all callers get its result.

    Whoever runs code that crashes is killed, as by ``make_task_dead``: with SIGKILL whatever the trap was, since a
    SIGSEGV, which the kernel takes for most, could leave a core dump with the host.

    System calls named by ``--trap`` go to the host as long as nobody replaces the function behind them.

Locks
    ``fast`` handlers run in the supervisor's thread and touch nothing of the core but plain values. The others run on
    the trio thread, one task for each call.

Source
    kernel/module/main.c (``init_module``, ``finit_module``, ``copy_module_from_user``), kernel/module/decompress.c,
    kernel/printk/printk.c (``do_syslog``), kernel/sys.c (``newuname``), kernel/signal.c, kernel/pid.c (``pidfd_open``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from typing import TYPE_CHECKING, Final

import trio

from klpfs.kernel.kernel import KernelOops
from klpfs.kernel.kmsg import Syslog, seek_offset
from klpfs.world import sysapi
from klpfs.world.bpf import AUDIT_ARCH_I386, SEEK_HOLE
from klpfs.world.hostproc import CAP_SYS_MODULE, CAP_SYSLOG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from klpfs.drivers.common import Interrupts
    from klpfs.kernel.sched import Task
    from klpfs.machine import Machine
    from klpfs.world.hostproc import HostProc
    from klpfs.world.notify import Call, Supervisor
    from klpfs.world.tasks import WorldTasks

__all__ = ["Syscalls"]

MODULE_NAME_LEN: Final = 56
MODULE_INIT_COMPRESSED_FILE: Final = 4
MODULE_INIT_FLAGS: Final = 1 | 2 | MODULE_INIT_COMPRESSED_FILE
ELF_HEADER_SIZE: Final = 64
#: No module is that large; what claims to be is not copied. Bytes.
MODULE_SIZE_MAX: Final = 1 << 28
#: Longest parameter string that is read, in bytes (the kernel takes any).
ARGS_MAX: Final = 1 << 20
O_PATH: Final = 0o10000000
PER_MASK, PER_LINUX32 = 0xFF, 0x08


def _fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def decompress(data: bytes) -> bytes:
    """A compressed module as Debian's kernel unpacks it, which knows xz only. Raises OSError(EINVAL)."""
    from klpfs.elf.compression import CompressionError, unpack

    try:
        out = unpack(data, MODULE_SIZE_MAX) if data.startswith(b"\xfd7zXZ\0") else None
    except CompressionError:
        out = None
    if out is None:
        raise _fail(errno.EINVAL)
    return out


def _read_file(fd: int, st: os.stat_result) -> bytes:
    """``kernel_read_file``. Raises OSError: EINVAL, EFBIG, ETXTBSY for a file that somebody may write to."""
    if not stat.S_ISREG(st.st_mode):
        raise _fail(errno.EINVAL)
    try:
        # deny_write_access() has no counterpart, but a lease for reading is refused for the same reason
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as err:
        if err.errno == errno.EAGAIN:
            raise _fail(errno.ETXTBSY) from None
        # somebody else's file, or a file system without leases: nothing can be told
    if st.st_size > MODULE_SIZE_MAX:
        raise _fail(errno.EFBIG)
    parts = []
    offset = 0
    while piece := os.pread(fd, 1 << 20, offset):
        parts.append(piece)
        offset += len(piece)
    if not parts:
        raise _fail(errno.EINVAL)
    return b"".join(parts)


class _Load:
    """A load from a file on its way; *error* is its errno, 0 for success."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error = 0


class Syscalls:
    """The handlers of one world."""

    def __init__(
        self,
        machine: Machine,
        proc: HostProc,
        tasks: WorldTasks,
        interrupts: Interrupts,
        *,
        init_pid: int,
        traps: tuple[str, ...],
    ) -> None:
        """*init_pid* is pid 1 of the world as the daemon's PID namespace has it."""
        self.machine = machine
        self.proc = proc
        self.tasks = tasks
        self.interrupts = interrupts
        self.syslog_state = Syslog(machine.printk)
        self._kmsg = machine.kmsg
        self._pidfds: dict[int, Task] = {}
        self._loads: dict[tuple[int, int], _Load] = {}
        self._own_uts = os.stat("/proc/self/ns/uts").st_ino
        # how far down in the list of a thread's numbers is the one that the world knows
        self._depth = len(_nspid(init_pid)) - 1
        self._pid_ns = self.proc.readlink("1/ns/pid")
        self._addresses: dict[str, int] = {}
        for name in traps:
            # the entry that the kernel's table holds; what is behind it may be patched as well
            found = machine.kallsyms.on_each_match_symbol(f"__x64_sys_{name}")
            if found:
                self._addresses[name] = found[0]
        self._hooked: frozenset[str] = frozenset()
        machine.ftrace.on_patched.append(self._patched)

    def register(self, supervisor: Supervisor) -> None:
        """Enter the handlers into *supervisor*."""
        for name in ("uname", "olduname", "oldolduname"):
            supervisor.fast[name] = self.uname
        for name in ("lseek", "_llseek"):
            supervisor.fast[name] = self.lseek
        supervisor.fast["pidfd_send_signal"] = self.no_pidfd
        for name in self._addresses:
            supervisor.fast[name] = self.not_hooked
            supervisor.slow[name] = self.trapped
        supervisor.slow.update(
            {
                "init_module": self.init_module,
                "finit_module": self.finit_module,
                "delete_module": self.delete_module,
                "syslog": self.syslog,
                "kill": self.kill,
                "tkill": self.kill,
                "tgkill": self.tgkill,
                "rt_sigqueueinfo": self.kill,
                "rt_tgsigqueueinfo": self.tgkill,
                "pidfd_open": self.pidfd_open,
                "pidfd_send_signal": self.pidfd_send_signal,
            }
        )

    # -- who calls ----------------------------------------------------------------------------------------------------

    def tid(self, call: Call) -> int:
        """The caller's thread id in the world. Raises OSError(ESRCH) when it has died."""
        try:
            return _nspid(call.pid)[self._depth]
        except (OSError, IndexError):
            raise _fail(errno.ESRCH) from None

    def _may(self, call: Call, cap: int) -> int:
        """The caller's thread id, if it has the capability. Raises OSError(EPERM)."""
        tid = self.tid(call)
        if not self.proc.capable(tid, cap):
            raise _fail(errno.EPERM)
        return tid

    def _elsewhere(self, call: Call) -> bool:
        """Whether the caller lives in a PID namespace below the world's."""
        try:
            return os.readlink(f"/proc/{call.pid}/ns/pid") != self._pid_ns
        except OSError:
            return False

    @contextlib.contextmanager
    def _on_behalf(self, call: Call, tid: int) -> Iterator[None]:
        """The caller is in the kernel; if that crashes, the caller ends."""
        try:
            with self.tasks.in_kernel(self.tasks.ensure(tid)):
                yield
        except KernelOops as oops:
            if oops.ends_task and call.valid():
                with contextlib.suppress(OSError):
                    self.proc.kill(tid)  # it comes before the answer takes effect
            raise

    # -- modules ------------------------------------------------------------------------------------------------------

    async def _load(self, call: Call, tid: int, data: bytes, args: bytes, flags: int) -> None:
        with self._on_behalf(call, tid):
            await self.machine.init_module(data, args.decode("utf-8", "surrogateescape"), flags=flags)
        call.answer(0)

    async def init_module(self, call: Call) -> None:
        """``init_module(image, length, parameters)``."""
        tid = self._may(call, CAP_SYS_MODULE)
        image, length, parameters = call.args[:3]
        if length < ELF_HEADER_SIZE:
            raise _fail(errno.ENOEXEC)
        if length > MODULE_SIZE_MAX:
            raise _fail(errno.ENOMEM)
        data = await trio.to_thread.run_sync(call.read, image, length)
        await self._load(call, tid, data, call.read_string(parameters, ARGS_MAX), 0)

    async def finit_module(self, call: Call) -> None:
        """``finit_module(fd, parameters, flags)``."""
        tid = self._may(call, CAP_SYS_MODULE)
        flags = call.int_arg(2)
        if flags & ~MODULE_INIT_FLAGS:
            raise _fail(errno.EINVAL)
        fd = call.dup_fd(call.int_arg(0))
        try:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | O_PATH) not in (os.O_RDONLY, os.O_RDWR):
                raise _fail(errno.EBADF)
            st = os.fstat(fd)
            inode = st.st_dev, st.st_ino
            running = self._loads.get(inode)
            if running is not None:
                # idempotent_wait_for_completion
                await self.interrupts.guard(tid, running.done.wait)
                if running.error:
                    raise _fail(running.error)
                call.answer(0)
                return
            load = self._loads[inode] = _Load()
            try:
                # in a thread: the file may lie in the emulated tree, and waits for this one then
                data = await trio.to_thread.run_sync(_read_file, fd, st)
                if flags & MODULE_INIT_COMPRESSED_FILE:
                    data = await trio.to_thread.run_sync(decompress, data)
                await self._load(call, tid, data, call.read_string(call.args[1], ARGS_MAX), flags)
            except OSError as err:
                load.error = err.errno or errno.EIO
                raise
            finally:
                del self._loads[inode]
                load.done.set()
        finally:
            os.close(fd)

    async def delete_module(self, call: Call) -> None:
        """``delete_module(name, flags)``."""
        tid = self._may(call, CAP_SYS_MODULE)
        name = call.read_string(call.args[0], MODULE_NAME_LEN)
        if not name or len(name) >= MODULE_NAME_LEN:
            raise _fail(errno.ENOENT)
        with self._on_behalf(call, tid):
            await self.machine.delete_module(name.decode("utf-8", "surrogateescape"), call.int_arg(1))
        call.answer(0)

    # -- the log ------------------------------------------------------------------------------------------------------

    async def syslog(self, call: Call) -> None:
        """``syslog(action, buffer, length)``."""
        action, buffer, length = call.int_arg(0), call.args[1], call.int_arg(2)
        tid = self.tid(call)
        privileged = self.proc.capable(tid, CAP_SYSLOG)

        async def work() -> int | bytes:
            return await self.syslog_state.syslog(action, length, buffer=bool(buffer), privileged=privileged)

        result = await self.interrupts.guard(tid, work)
        if isinstance(result, bytes):
            call.write(buffer, result)
            result = len(result)
        call.answer(result)

    def lseek(self, call: Call) -> bool:
        """``lseek`` and ``_llseek`` (i386) with SEEK_END and beyond: ``devkmsg_llseek``."""
        if call.name == "_llseek":
            offset, whence = (call.args[1] & 0xFFFFFFFF) << 32 | call.args[2] & 0xFFFFFFFF, call.int_arg(4)
        else:
            offset, whence = call.args[1], call.int_arg(2)
        number = call.int_arg(0)
        try:
            path = os.readlink(f"/proc/{call.pid}/fd/{number}")
        except OSError:
            path = ""
        if path != "/dev/kmsg":
            call.proceed()
            return True
        fd = call.dup_fd(number)
        try:
            if offset:
                raise _fail(errno.ESPIPE)
            if whence == SEEK_HOLE:
                raise _fail(errno.EINVAL)
            # the offset belongs to the open file, which this descriptor shares; the next read brings it to the server
            where = seek_offset(self.machine.printk, whence)
            try:
                os.lseek(fd, where, os.SEEK_SET)
            except OSError:  # it is the host's
                call.proceed()
                return True
            # and fsync does at once, for those who poll before they read; where the world has a user namespace, who is
            # outside may not
            self._kmsg.seek_hint = where
            with contextlib.suppress(PermissionError):
                os.fsync(fd)
        finally:
            os.close(fd)
        if call.name == "_llseek":
            call.write(call.args[3], bytes(8))
        call.answer(0)
        return True

    # -- uname --------------------------------------------------------------------------------------------------------

    def uname(self, call: Call) -> bool:
        """``uname(buffer)``: release and version are the emulated kernel's, the names the caller's namespace's."""
        own = os.uname()
        node, domain = own.nodename, ""
        try:
            uts = os.stat(f"/proc/{call.pid}/ns/uts").st_ino
            if uts == self._own_uts:
                with open("/proc/sys/kernel/domainname") as file:
                    domain = file.read().strip()
            else:
                node, domain = _names_in(call.pid)
            with open(f"/proc/{call.pid}/personality") as file:
                personality = int(file.read(), 16)
        except OSError:
            personality = 0
        machine = own.machine
        if machine == "x86_64" and (personality & PER_MASK == PER_LINUX32 or call.arch == AUDIT_ARCH_I386):
            machine = "i686" if personality & PER_MASK == PER_LINUX32 else machine
        profile = self.machine.profile
        fields = (own.sysname, node, profile.release, profile.kernel_version, machine, domain)
        # struct new_utsname, old_utsname, and oldold_utsname
        count, size = {"uname": (6, 65), "olduname": (5, 65), "oldolduname": (5, 9)}[call.name]
        data = struct.pack(f"{size}s" * count, *(f.encode()[: size - 1] for f in fields[:count]))
        try:
            call.write(call.args[0], data)
        except OSError:
            # a bad pointer, or a program that its user may not read: then its memory is closed to the daemon as well
            call.proceed()
            return True
        call.answer(0)
        return True

    # -- signals to emulated tasks ------------------------------------------------------------------------------------

    async def _signal(self, call: Call, pid: int, sig: int, tgid: int | None = None) -> None:
        tid = self.tid(call)
        if self._elsewhere(call):
            call.proceed()
            return
        sched = self.machine.sched
        task = sched.tasks.get(pid)
        if task is None or (tgid is not None and task.tgid != tgid):
            raise _fail(errno.ESRCH)
        if not 0 <= sig <= 64:
            raise _fail(errno.EINVAL)
        if self.proc.status(tid)["Uid"].split()[1] != self._root_uid():
            raise _fail(errno.EPERM)
        sched.signal(task, sig)
        call.answer(0)

    def _root_uid(self) -> str:
        """The uid of the world's root, as the procfs shows it to the daemon."""
        return self.proc.status(1)["Uid"].split()[1]

    async def kill(self, call: Call) -> None:
        """``kill``, ``tkill``, ``rt_sigqueueinfo`` of an emulated task."""
        await self._signal(call, call.int_arg(0), call.int_arg(1))

    async def tgkill(self, call: Call) -> None:
        """``tgkill``, ``rt_tgsigqueueinfo`` of an emulated task."""
        tgid, pid = call.int_arg(0), call.int_arg(1)
        if tgid <= 0 or pid <= 0:
            raise _fail(errno.EINVAL)
        await self._signal(call, pid, call.int_arg(2), tgid)

    async def pidfd_open(self, call: Call) -> None:
        """``pidfd_open`` of an emulated task: an eventfd that stands for it and becomes readable when it ends."""
        pid, flags = call.int_arg(0), call.args[1] & 0xFFFFFFFF
        if self._elsewhere(call):
            call.proceed()
            return
        if flags & ~os.O_NONBLOCK:
            raise _fail(errno.EINVAL)
        task = self.machine.sched.tasks.get(pid)
        if task is None:
            raise _fail(errno.ESRCH)
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        ident = _eventfd_id("/proc/self/fdinfo", fd)
        number = call.add_fd(fd)
        self._pidfds[ident] = task
        call.answer(number)
        self.machine.nursery.start_soon(self._watch, task, fd, ident)

    async def _watch(self, task: Task, fd: int, ident: int) -> None:
        try:
            while task.alive:  # noqa: ASYNC110  # the scheduler has no event for a task's end
                await trio.sleep(1)
            os.eventfd_write(fd, 1)
        finally:
            os.close(fd)
        self._pidfds.pop(ident, None)

    def no_pidfd(self, call: Call) -> bool:
        """As long as nobody has a pidfd of an emulated task, the call is about a real one."""
        if self._pidfds:
            return False
        call.proceed()
        return True

    async def pidfd_send_signal(self, call: Call) -> None:
        """``pidfd_send_signal(pidfd, sig, info, flags)``."""
        try:
            ident = _eventfd_id(f"/proc/{call.pid}/fdinfo", call.int_arg(0))
        except OSError:
            ident = -1
        task = self._pidfds.get(ident)
        if task is None:
            call.proceed()
            return
        await self._signal(call, task.pid, call.int_arg(1))

    # -- calls whose function may be patched --------------------------------------------------------------------------

    def _patched(self, address: int, hooked: bool) -> None:
        names = {name for name, addr in self._addresses.items() if addr == address}
        self._hooked = self._hooked | names if hooked else self._hooked - names

    def not_hooked(self, call: Call) -> bool:
        """Nobody replaces the function: the host's kernel executes the call."""
        if call.name in self._hooked:
            return False
        call.proceed()
        return True

    async def trapped(self, call: Call) -> None:
        """Run the function that the caller's patch state selects."""
        machine = self.machine
        address = self._addresses[call.name]
        tid = self.tid(call)
        task = self.tasks.ensure(tid)
        target = machine.ftrace.enter(address, task)
        where = machine.kallsyms.lookup(target) if target != address else None
        mod = machine.modules.find_module(where.modname) if where is not None and where.modname else None
        if mod is None:
            call.proceed()
            return
        with self._on_behalf(call, tid):
            result = await mod.code.call(target, [0], task)
        # a C function of type long: what lies in [-4095, -1] is an errno
        result &= (1 << 64) - 1
        if result > (1 << 64) - 4096:
            call.fail((1 << 64) - result)
        else:
            call.answer(result - (1 << 64) if result >> 63 else result)


def _nspid(pid: int) -> list[int]:
    """The numbers of a thread in each PID namespace that it is in, the daemon's first. Raises OSError."""
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"NSpid:"):
                return [int(number) for number in line.split()[1:]]
    return []


def _eventfd_id(directory: str, fd: int) -> int:
    """The number by which the kernel tells eventfds apart; -1 for another descriptor. Raises OSError."""
    with open(f"{directory}/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"eventfd-id:"):
                return int(line.split()[1])
    return -1


def _names_in(pid: int) -> tuple[str, str]:
    """Node and domain name in the UTS namespace of a process. The daemon's own where that may not be entered."""
    names = [os.uname().nodename, ""]

    def look() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
            try:
                sysapi.setns(fd, sysapi.CLONE_NEWUTS)
            finally:
                os.close(fd)
            names[0] = os.uname().nodename
            with open("/proc/sys/kernel/domainname") as file:
                names[1] = file.read().strip()
        except OSError:
            pass

    # a namespace of this kind can be entered by a single thread, which is not used for anything else afterwards
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return names[0], names[1]
