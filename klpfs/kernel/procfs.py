"""What /proc shows of the emulated kernel: its modules, symbols, sysctls, the files whose code a patch may replace, and
its tasks.

Model
    Files of the whole kernel are nodes of the tree under ``proc/``; the directories of tasks are dynamic, made at each
    look-up from :mod:`klpfs.kernel.sched`. A file that a kernel function prints (``/proc/cmdline`` by
    ``cmdline_proc_show``) shows the host's content as long as nobody replaces that function, and the replacement's
    output to tasks that run it.

Source
    fs/proc/array.c (``do_task_stat``, ``proc_pid_status``), fs/proc/base.c (``proc_pid_stack``,
    ``proc_pid_patch_state``), fs/proc/cmdline.c, kernel/kallsyms.c (``s_show``), kernel/sysctl.c (``proc_dointvec``).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable

from klpfs.kernel.kernel import TAINT_LETTERS, Kernel
from klpfs.kernel.kstrtox import proc_dointvec
from klpfs.kernel.sched import TASK_STATES, Task
from klpfs.kernfs import Caller, Entry, Kernfs, KernfsNode, SeqFile, StaticProvider

__all__ = ["SHOW_FUNCTIONS", "ProcFs", "TaskDirs"]

SHOW_FUNCTIONS = {
    "cmdline": "cmdline_proc_show",
    "meminfo": "meminfo_proc_show",
    "version": "version_proc_show",
    "uptime": "uptime_proc_show",
    "loadavg": "loadavg_proc_show",
    "stat": "show_stat",
    "devices": "devinfo_show",
    "filesystems": "filesystems_proc_show",
    "softirqs": "show_softirqs",
    "cpuinfo": "show_cpuinfo",
}
"""Files of /proc and the functions of the kernel that print them."""

ITEM_FUNCTIONS = {"devinfo_show": "major numbers", "show_cpuinfo": "struct cpuinfo_x86"}
"""Those of them that the kernel calls once for each item of a list, and of what, which is not emulated."""

PF_KTHREAD = 0x00200000
TASK_COMM_LEN = 16
SYSCALL_FRAMES = "do_syscall_64 entry_SYSCALL_64_after_hwframe"


def _host_file(name: str) -> bytes:
    try:
        with open(f"/proc/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _pid(name: str) -> int:
    """``name_to_int``: the pid that a name stands for; -1 for one that is no number as the kernel writes it."""
    return int(name) if name.isascii() and name.isdigit() and (name[0] != "0" or name == "0") else -1


class ProcFs:
    """The part of /proc that belongs to the emulated kernel.

    ``task_of`` tells which task a request comes from; None, the default, is one that no transition has to wait for.
    ``host_file`` reads the host's file of that name.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.task_of: Callable[[Caller], Task | None] = lambda caller: None
        self.host_file: Callable[[str], bytes] = _host_file
        self.privileged: Callable[[Caller], bool] = lambda caller: caller.uid == 0
        self.tasks = TaskDirs(kernel)
        kernfs = kernel.kernfs
        proc = kernfs.lookup("proc") or kernfs.create_dynamic_dir(kernfs.root, "proc", self.tasks)
        for name in SHOW_FUNCTIONS:
            kernfs.create_file(proc, name, self.show_file(name), 0o444)
        kernfs.create_file(proc, "modules", SeqFile(self._modules_show), 0o444)
        kernfs.create_file(proc, "kallsyms", SeqFile(self._kallsyms_show), 0o444)
        self._sysctls(kernfs, proc)

    # -- files that a patch may replace -----------------------------------------------------------------------------

    def show_file(self, name: str) -> SeqFile:
        """The file /proc/*name*, printed by the function of :data:`SHOW_FUNCTIONS`."""

        async def show(caller: Caller) -> bytes:
            return await self.run_show(SHOW_FUNCTIONS[name], self.task_of(caller), lambda: self.host_file(name))

        return SeqFile(show)

    async def run_show(self, function: str, task: Task | None, original: Callable[[], bytes]) -> bytes:
        """The output of kernel function *function* for *task*; *original* gives that of the unpatched one."""
        kernel = self.kernel
        found = kernel.kallsyms.on_each_match_symbol(function)
        if not found:
            return original()
        target = kernel.ftrace.enter(found[0], task)
        if target == found[0]:
            return original()
        where = kernel.kallsyms.lookup(target)
        mod = kernel.modules.find_module(where.modname) if where and where.modname else None
        if mod is None:
            raise OSError(errno.EIO, f"{function}: its replacement at {target:#x} lies in no module")
        if function in ITEM_FUNCTIONS and mod.code.executes:
            items = ITEM_FUNCTIONS[function]
            kernel.printk.logger("klpfs: ").err(
                f"{mod.name}: its copy of {function} cannot run: it prints one item of a list ({items}), "
                "which is not emulated"
            )
            raise OSError(errno.EIO, f"{function}: the list of {items} is not emulated")
        return await mod.code.show(target, task)

    # -- the whole kernel -------------------------------------------------------------------------------------------

    def _modules_show(self, caller: Caller) -> bytes:
        return self.kernel.modules.proc_modules(show_addresses=self.privileged(caller))

    def _kallsyms_show(self, caller: Caller) -> bytes:
        show = self.privileged(caller)
        out = []
        for addr, kind, name in self.kernel.kallsyms.table:
            out.append(f"{addr if show else 0:016x} {kind} {name}\n")
        for mod in reversed(self.kernel.modules.modules.values()):
            if mod.state == "unformed":
                continue
            for sym in self.kernel.kallsyms.symbols_of(mod.name):
                if sym.name:
                    out.append(f"{sym.value if show else 0:016x} {sym.type} {sym.name}\t[{mod.name}]\n")
        return "".join(out).encode("utf-8", "surrogateescape")

    def _sysctls(self, kernfs: Kernfs, proc: KernfsNode) -> None:
        kernel = self.kernel
        where = kernfs.create_dir(kernfs.create_dir(proc, "sys", 0o555), "kernel", 0o555)

        def sysctl(
            name: str, mode: int, show: Callable[[], bytes], store: Callable[[bytes], Awaitable[int]] | None
        ) -> None:
            async def write(data: bytes, caller: Caller) -> int:
                assert store is not None
                return await store(data)

            ops = SeqFile(lambda caller: show(), None if store is None else write)
            kernfs.create_file(where, name, ops, mode)

        async def ftrace_store(data: bytes) -> int:
            value, used = proc_dointvec(data, [kernel.ftrace.ftrace_enabled])
            kernel.ftrace.sysctl_write(value[0])
            return used

        async def tainted_store(data: bytes) -> int:
            # proc_taint(): bits that stand for nothing are ignored
            value, used = proc_dointvec(data, [0], low=0, high=(1 << 64) - 1)
            kernel.tainted |= value[0] & ((1 << len(TAINT_LETTERS)) - 1)
            return used

        async def devkmsg_store(data: bytes) -> int:
            return kernel.printk.sysctl_printk_devkmsg_store(data)

        async def printk_store(data: bytes) -> int:
            return kernel.printk.sysctl_printk_store(data)

        sysctl("ftrace_enabled", 0o644, lambda: b"%d\n" % kernel.ftrace.ftrace_enabled, ftrace_store)
        sysctl("tainted", 0o644, lambda: b"%d\n" % kernel.tainted, tainted_store)
        sysctl("printk_devkmsg", 0o644, kernel.printk.sysctl_printk_devkmsg_show, devkmsg_store)
        sysctl("printk", 0o644, kernel.printk.sysctl_printk_show, printk_store)
        sysctl("osrelease", 0o444, lambda: kernel.profile.release.encode() + b"\n", None)
        sysctl("version", 0o444, lambda: kernel.profile.kernel_version.encode() + b"\n", None)


class TaskDirs:
    """A directory provider: one directory for each emulated task that leads its thread group.

    Those of other threads exist, too, but are not listed, as in the real /proc.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def lookup(self, name: str) -> Entry | None:
        task = self.kernel.sched.tasks.get(_pid(name))
        if task is None or task.real:
            return None
        return Entry.dir(StaticProvider(self.entries(task)), key=(task.pid, id(task)))

    def entries(self, task: Task, *, thread: bool = False) -> dict[str, Entry]:
        """The files of the directory of *task*; *thread*: under ``task/`` of its group."""

        def no_link(caller: Caller) -> str:
            raise OSError(errno.ENOENT, "kernel threads have none")

        entries = {
            "comm": Entry.file(
                SeqFile(lambda c: task.comm.encode("utf-8", "surrogateescape") + b"\n", self._comm_store(task)), 0o644
            ),
            "cmdline": Entry.file(SeqFile(lambda c: task.cmdline.encode("utf-8", "surrogateescape")), 0o444),
            "stat": Entry.file(SeqFile(lambda c: self.stat(task)), 0o444),
            "statm": Entry.file(SeqFile(lambda c: b"0 0 0 0 0 0 0\n"), 0o444),
            "status": Entry.file(SeqFile(lambda c: self.status(task)), 0o444),
            "stack": Entry.file(SeqFile(lambda c: self.stack(task)), 0o400),
            "wchan": Entry.file(SeqFile(lambda c: self.wchan(task)), 0o444),
            "environ": Entry.file(SeqFile(lambda c: b""), 0o400),
            "maps": Entry.file(SeqFile(lambda c: b""), 0o444),
            "cgroup": Entry.file(SeqFile(lambda c: b"0::/\n"), 0o444),
            "fd": Entry.dir(StaticProvider({}), 0o500),
            "exe": Entry.link(no_link),
            "cwd": Entry.link(lambda c: "/"),
            "root": Entry.link(lambda c: "/"),
        }
        if self.kernel.profile.has("proc_patch_state"):
            entries["patch_state"] = Entry.file(SeqFile(lambda c: b"%d\n" % task.patch_state), 0o400)
        if not thread:
            entries["task"] = Entry.dir(_ThreadDirs(self, task.tgid))
        return entries

    @staticmethod
    def _comm_store(task: Task) -> Callable[[bytes, Caller], Awaitable[int]]:
        async def store(data: bytes, caller: Caller) -> int:
            task.comm = data[: TASK_COMM_LEN - 1].rstrip(b"\n\0").decode("latin-1")
            return len(data)

        return store

    def threads(self, tgid: int) -> list[Task]:
        """The tasks of a thread group."""
        return [t for t in self.kernel.sched.tasks.values() if t.tgid == tgid]

    def stat(self, task: Task) -> bytes:
        """One line of 52 fields (``do_task_stat``)."""
        flags = PF_KTHREAD if task.kthread else 0x400000
        start = int(task.start * 100)
        group = 0 if task.kthread else task.tgid
        fields = [
            task.pid, f"({task.comm})", task.state, task.ppid, group, group, 0, -1, flags, 0, 0, 0, 0, 0, 0, 0, 0,
            20, 0, len(self.threads(task.tgid)), 0, start, 0, 0, (1 << 64) - 1, 0, 0, 0, 0, 0, 0, 0,
            0x7FFFFFFF if task.kthread else 0, 0, 1, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ]  # fmt: skip
        return (" ".join(map(str, fields)) + "\n").encode("utf-8", "surrogateescape")

    def status(self, task: Task) -> bytes:
        """``proc_pid_status``, without the memory of which there is none."""
        lines = [
            f"Name:\t{task.comm}",
            "Umask:\t0000" if task.kthread else "Umask:\t0022",
            f"State:\t{task.state} ({TASK_STATES[task.state]})",
            f"Tgid:\t{task.tgid}",
            "Ngid:\t0",
            f"Pid:\t{task.pid}",
            f"PPid:\t{task.ppid}",
            "TracerPid:\t0",
            "Uid:\t0\t0\t0\t0",
            "Gid:\t0\t0\t0\t0",
            "FDSize:\t64",
            "Groups:\t ",
            f"NStgid:\t{task.tgid}",
            f"NSpid:\t{task.pid}",
            f"NSpgid:\t{0 if task.kthread else task.tgid}",
            f"NSsid:\t{0 if task.kthread else task.tgid}",
            f"Kthread:\t{int(task.kthread)}",
            f"Threads:\t{len(self.threads(task.tgid))}",
            "SigQ:\t0/0",
            "SigPnd:\t0000000000000000",
            "ShdPnd:\t0000000000000000",
            "SigBlk:\t0000000000000000",
            f"SigIgn:\t{'ffffffffffffffff' if task.kthread else '0000000000000000'}",
            "SigCgt:\t0000000000000000",
        ]
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")

    def stack(self, task: Task) -> bytes:
        """The return addresses, innermost first, as ``proc_pid_stack`` prints them. Nothing while it runs."""
        if task.on_cpu:
            return b""
        lines = []
        for address in task.trace():
            where = self.kernel.kallsyms.lookup(address)
            lines.append(f"[<0>] {where if where is not None else f'0x{address:016x}'}\n")
        return "".join(lines).encode("utf-8", "surrogateescape")

    def wchan(self, task: Task) -> bytes:
        """The function that the task sleeps in, or 0."""
        for address in task.trace():
            where = self.kernel.kallsyms.lookup(address)
            if where is not None:
                return where.name.encode("utf-8", "surrogateescape")
        return b"0"

    # last in the class: inside it, the name stands for the method from here on
    def list(self) -> Iterable[str]:
        return [str(t.pid) for t in self.kernel.sched.tasks.values() if t.pid == t.tgid and not t.real]


class _ThreadDirs:
    def __init__(self, dirs: TaskDirs, tgid: int) -> None:
        self._dirs = dirs
        self._tgid = tgid

    def lookup(self, name: str) -> Entry | None:
        task = self._dirs.kernel.sched.tasks.get(_pid(name))
        if task is None or task.tgid != self._tgid:
            return None
        return Entry.dir(StaticProvider(self._dirs.entries(task, thread=True)), key=(task.pid, id(task)))

    def list(self) -> Iterable[str]:
        return [str(t.pid) for t in self._dirs.threads(self._tgid)]
