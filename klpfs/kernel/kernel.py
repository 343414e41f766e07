"""The parts of one emulated kernel, under one roof.

Source
    init/main.c in spirit: what exists before the first module is loaded.
"""

from __future__ import annotations

import logging
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

__all__ = ["TAINT_LETTERS", "Kernel"]

log = logging.getLogger(__name__)

TAINT_LETTERS = "PFSRMBUDAWCIOELKXTNJ"
"""Letter of each taint bit (kernel/panic.c ``taint_flags``); the letter of a clear bit 0 would be G."""


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
