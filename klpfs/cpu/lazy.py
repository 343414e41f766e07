"""The execution engine of a machine, started when it does not disturb.

Model
    Starting the engine costs a quarter of a second of two processes' time, most of it imports. A machine that comes up
    gets this stand-in, which starts the real one soon after, or with the first module if that comes earlier. Nothing
    but the standard library is imported until then.

Locks
    Trio thread only.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from klpfs.cpu.host import Cpu
    from klpfs.cpu.proto import Limits
    from klpfs.elf.reader import ElfModule
    from klpfs.loader import ElfCode
    from klpfs.machine import Machine

__all__ = ["LazyEngine", "attach", "available"]

log = logging.getLogger(__name__)

SETTLE = 0.3
"""Real seconds after the boot until the engine starts by itself."""


def available() -> bool:
    """Whether the engine (unicorn, the extra ``exec``) is installed."""
    return importlib.util.find_spec("unicorn") is not None


def attach(machine: Machine, limits: Limits | None = None, *, settle: float = SETTLE) -> LazyEngine | None:
    """Give *machine* an engine that starts after *settle* real seconds or with the first module; None if there is none.

    To be called inside the machine's block. Without an engine, metadata alone drive patches, and the log says so.
    """
    if not available():
        return None
    engine = LazyEngine(machine, limits)
    machine.engine = engine
    machine.nursery.start_soon(engine.settle, settle, name="start of the execution engine")
    return engine


class LazyEngine:
    """See the module's docstring. *cpu* is the engine once it runs."""

    def __init__(self, machine: Machine, limits: Limits | None = None) -> None:
        self._machine = machine
        self._limits = limits
        self.cpu: Cpu | None = None
        self._failed = False

    def start(self) -> Cpu | None:
        """Start now; None where it cannot run (the reason is logged once)."""
        if self.cpu is None and not self._failed:
            from klpfs.cpu.host import Cpu

            try:
                self.cpu = Cpu(self._machine, self._limits)
            except OSError as error:
                self._failed = True
                log.warning("module code cannot be executed: %s", error)
        return self.cpu

    async def settle(self, seconds: float) -> None:
        """Start after *seconds* of real time, whatever the machine's clock does."""
        await trio.to_thread.run_sync(time.sleep, seconds, abandon_on_cancel=True)
        self.start()

    async def code(self, machine: Machine, elf: ElfModule) -> ElfCode:
        """What runs the module *elf* (see :class:`klpfs.machine.Engine`)."""
        cpu = self.start()
        if cpu is None:
            from klpfs.loader import MetadataCode

            return MetadataCode(machine, elf)
        return await cpu.code(machine, elf)

    async def aclose(self) -> None:
        """End the sandbox, if there is one."""
        if self.cpu is not None:
            await self.cpu.aclose()
