"""Function tracing: the hook at a function's entry that lets its calls be redirected.

Model
    An :class:`FtraceOps` is registered for one address. When a task enters the function there, the handler returns the
    address to go on at. ``ftrace_enabled`` is the sysctl; livepatch registers permanent hooks, which keep it on.

Source
    kernel/trace/ftrace.c (``register_ftrace_function``, ``ftrace_set_filter_ip``, ``ftrace_enable_sysctl``); permanent
    hooks since Linux commit 7162431dcf72 ("ftrace: Introduce PERMANENT ftrace_ops flag" (in v5.5)).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from klpfs.kernel.kallsyms import Kallsyms
from klpfs.kernel.sched import Task

__all__ = ["Ftrace", "FtraceOps"]


@dataclass(eq=False, slots=True)
class FtraceOps:
    """``struct ftrace_ops``: *func* gets the address entered and the task, and returns the address to continue at."""

    func: Callable[[int, Task | None], int]
    permanent: bool = False
    ipmodify: bool = False
    ip: int = 0


class Ftrace:
    """All hooks of one kernel."""

    def __init__(self, kallsyms: Kallsyms) -> None:
        self._kallsyms = kallsyms
        self.ftrace_enabled = 1
        self._last_enabled = True
        self._ops: dict[int, list[FtraceOps]] = {}
        self.on_patched: list[Callable[[int, bool], None]] = []
        """Told ``(address, hooked)`` whenever the first hook of a function appears or the last one goes."""
        self.module_site: Callable[[int], bool | None] = lambda addr: None
        """Whether a function of a module has a site that can be hooked; None where nobody knows: then it has."""

    def location(self, addr: int) -> int:
        """``ftrace_location``: where the function at *addr* can be hooked; 0 if it cannot."""
        hit = self._kallsyms.lookup(addr)
        if hit is None or hit.offset != 0:
            return 0
        if hit.modname is None and not self._kallsyms.table.has_ftrace(addr):
            return 0
        if hit.modname is not None and self.module_site(addr) is False:
            return 0
        return addr

    def register_ftrace_function(self, ops: FtraceOps, ip: int) -> None:
        """Hook *ip*.

        Raises OSError(EBUSY) for a permanent hook while tracing is off, or a second hook that changes the address.
        """
        if ops.permanent and not self.ftrace_enabled:
            raise OSError(errno.EBUSY, "ftrace is disabled (kernel.ftrace_enabled = 0)")
        here = self._ops.setdefault(ip, [])
        if ops.ipmodify and any(o.ipmodify for o in here):
            raise OSError(errno.EBUSY, f"the function at {ip:#x} is redirected already")
        ops.ip = ip
        here.append(ops)
        if len(here) == 1:
            self._tell(ip, True)

    def unregister_ftrace_function(self, ops: FtraceOps) -> None:
        """Remove a hook. Raises OSError(ENOENT) if it is not registered."""
        here = self._ops.get(ops.ip, [])
        if ops not in here:
            raise OSError(errno.ENOENT, "not registered")
        here.remove(ops)
        if not here:
            del self._ops[ops.ip]
            self._tell(ops.ip, False)

    def _tell(self, ip: int, hooked: bool) -> None:
        for listener in self.on_patched:
            listener(ip, hooked)

    def permanent_ops_registered(self) -> bool:
        """``is_permanent_ops_registered``."""
        return any(o.permanent for here in self._ops.values() for o in here)

    def sysctl_write(self, value: int) -> None:
        """``ftrace_enable_sysctl``: set the sysctl. Raises OSError(EBUSY) while a permanent hook needs it."""
        self.ftrace_enabled = value
        if self._last_enabled == bool(value):
            return
        if not value and self.permanent_ops_registered():
            self.ftrace_enabled = 1
            raise OSError(errno.EBUSY, "a livepatch is enabled")
        self._last_enabled = bool(value)

    def enter(self, addr: int, task: Task | None) -> int:
        """The address at which *task* goes on when it calls the function at *addr*."""
        if not self.ftrace_enabled:
            return addr
        for ops in self._ops.get(addr, ()):
            new = ops.func(addr, task)
            if ops.ipmodify and new != addr:
                return new
        return addr

    def hooked(self) -> list[int]:
        """Addresses that have a hook."""
        return list(self._ops)
