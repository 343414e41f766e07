"""The parts of one emulated kernel, under one roof.

Source
    init/main.c in spirit: what exists before the first module is loaded. lib/dump_stack.c, kernel/panic.c
    (``print_tainted_verbose``), arch/x86/kernel/dumpstack.c.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from klpfs.kernel.clock import Clock
from klpfs.kernel.ftrace import Ftrace
from klpfs.kernel.kallsyms import Kallsyms
from klpfs.kernel.locking import Lockdep
from klpfs.kernel.profile import Profile
from klpfs.kernel.sched import Sched
from klpfs.kernel.workqueue import Workqueue

if TYPE_CHECKING:
    from klpfs.kernel.dynamic_debug import DynamicDebug
    from klpfs.kernel.module import Modules
    from klpfs.kernel.printk import Printk
    from klpfs.kernfs import Kernfs

__all__ = ["TAINT_LETTERS", "Kernel", "KernelOops", "call_trace", "stack_info"]

log = logging.getLogger(__name__)

TAINT_LETTERS = "PFSRMBUDAWCIOELKXTNJ"
"""Letter of each taint bit (kernel/panic.c ``taint_flags``); the letter of a clear bit 0 would be G."""

_TAINT_NAMES = (
    "PROPRIETARY_MODULE", "FORCED_MODULE", "CPU_OUT_OF_SPEC", "FORCED_RMMOD", "MACHINE_CHECK", "BAD_PAGE", "USER",
    "DIE", "OVERRIDDEN_ACPI_TABLE", "WARN", "CRAP", "FIRMWARE_WORKAROUND", "OOT_MODULE", "UNSIGNED_MODULE",
    "SOFTLOCKUP", "LIVEPATCH", "AUX", "RANDSTRUCT", "TEST", "FWCTL",
)  # fmt: skip


def _tainted(tainted: int) -> str:
    if not tainted:
        return "Not tainted"
    return "Tainted: " + "".join(
        letter if tainted >> bit & 1 else ("G" if bit == 0 else " ") for bit, letter in enumerate(TAINT_LETTERS)
    )


def stack_info(pid: int, comm: str, tainted: int, release: str, *, uid: int = 0) -> list[str]:
    """``dump_stack_print_info``: who runs, and on what kernel. *tainted* are the bits of its taints."""
    lines = [f"CPU: 0 UID: {uid} PID: {pid} Comm: {comm[:20]} {_tainted(tainted)} {release}"]
    if tainted:
        flags = [f"[{letter}]={_TAINT_NAMES[bit]}" for bit, letter in enumerate(TAINT_LETTERS) if tainted >> bit & 1]
        lines.append("Tainted: " + ", ".join(flags))
    return lines


def call_trace(frames: Iterable[str]) -> list[str]:
    """``show_trace_log_lvl``: the lines around and with *frames*, innermost first."""
    return ["Call Trace:", " <TASK>", *(f" {frame}" for frame in frames), " </TASK>"]


class KernelOops(OSError):
    """Code crashed in kernel mode. *ends_task*: the kernel would have ended the task that ran it (``make_task_dead``);
    not where the code only wanted something that is not emulated, or took longer than it may here."""

    def __init__(self, number: int, summary: str, *, ends_task: bool) -> None:
        super().__init__(number, summary)
        self.ends_task = ends_task


@dataclass(eq=False)
class Kernel:
    """One kernel. Everything is reached from here; nothing is global."""

    profile: Profile
    clock: Clock
    nursery: trio.Nursery
    kernfs: Kernfs
    lockdep: Lockdep
    printk: Printk
    dynamic_debug: DynamicDebug
    sched: Sched
    workqueue: Workqueue
    kallsyms: Kallsyms
    ftrace: Ftrace
    modules: Modules = field(init=False)
    tainted: int = 0
    lock_debugging: bool = True
    _warned: set[str] = field(default_factory=set)

    def add_taint(self, letter: str, *, lockdep_ok: bool = True) -> None:
        """``add_taint``: set the flag that *letter* stands for; some say that lock debugging is over."""
        if not lockdep_ok and self.lock_debugging:
            self.lock_debugging = False
            self.printk.logger("").warn("Disabling lock debugging due to kernel taint")
        self.tainted |= 1 << TAINT_LETTERS.index(letter)

    def test_taint(self, letter: str) -> bool:
        """``test_taint``."""
        return bool(self.tainted >> TAINT_LETTERS.index(letter) & 1)

    def dump_stack(self, functions: str) -> None:
        """``dump_stack``: who runs, and where. *functions* of vmlinux (space separated, innermost first) are on the
        stack above what the task's own says."""
        task = self.sched.current
        pid, comm = (task.pid, task.comm) if task is not None else (1, "insmod")
        stack = [*self.sched.frames(f"dump_stack_lvl {functions}"), *(task.inner() if task is not None else ())]
        frames = (str(self.kallsyms.lookup(addr) or f"0x{addr:x}") for addr in stack)
        for line in [*stack_info(pid, comm, self.tainted, self.profile.release), *call_trace(frames)]:
            self.printk.emit(-1, line, caller=f"T{pid}")

    def warn(self, where: str, message: str = "") -> None:
        """``WARN()``: the log says so and the kernel is tainted W. *where* is ``file:line function``-like."""
        plain = self.printk.logger("")
        plain.warn("------------[ cut here ]------------")
        if message:
            plain.warn(message)
        task = self.sched.current
        plain.warn(f"WARNING: CPU: 0 PID: {task.pid if task else 0} at {where}")
        plain.warn("---[ end trace 0000000000000000 ]---")
        self.add_taint("W")
        log.warning("WARN at %s %s", where, message)

    def warn_on(self, condition: object, where: str) -> bool:
        """``WARN_ON()``: warn if *condition* holds; returns whether it does."""
        if condition:
            self.warn(where)
        return bool(condition)

    def warn_on_once(self, condition: object, where: str) -> bool:
        """``WARN_ON_ONCE()``: warn if *condition* holds, unless this place has warned before; returns whether it
        holds."""
        if condition and where not in self._warned:
            self._warned.add(where)
            self.warn(where)
        return bool(condition)
