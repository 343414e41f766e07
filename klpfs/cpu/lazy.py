"""The execution engine of a machine, started when it does not disturb.

Model
    Starting the engine costs a quarter of a second of two processes' time, most of it imports. A machine that comes up
    gets this stand-in, which starts the real one soon after, or with the first module if that comes earlier. Nothing
    but the standard library is imported until then. A module that comes after the death of the sandbox starts another
    one. Where none can be started although the engine is installed, a real module is refused: it would seem to run.

Locks
    Trio thread only.
"""

from __future__ import annotations

import errno
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
    """See the module's docstring. *cpu* is the engine once it runs; another one takes its place when it died."""

    def __init__(self, machine: Machine, limits: Limits | None = None) -> None:
        self._machine = machine
        self._limits = limits
        self.cpu: Cpu | None = None

    def start(self) -> Cpu:
        """The engine, started now if there is none that is alive. Raises OSError where it cannot run."""
        if self.cpu is not None:
            self.cpu.process.drain(0)  # has it died, and nobody noticed?
        if self.cpu is None or not self.cpu.alive:
            from klpfs.cpu.host import Cpu

            self.cpu = Cpu(self._machine, self._limits, self.cpu)
        return self.cpu

    async def settle(self, seconds: float) -> None:
        """Start after *seconds* of real time, whatever the machine's clock does."""
        await trio.to_thread.run_sync(time.sleep, seconds, abandon_on_cancel=True)
        if self.cpu is None:
            try:
                self.start()
            except OSError as error:
                log.warning("module code cannot be executed: %s", error)

    async def code(self, machine: Machine, elf: ElfModule) -> ElfCode:
        """What runs the module *elf* (see :class:`klpfs.machine.Engine`). Raises OSError(ENOMEM), with the reason in
        the log, where no sandbox can be started."""
        try:
            cpu = self.start()
            reason = "" if await cpu.started() else f"its sandbox did not start: {cpu.death}"
        except OSError as error:
            reason = f"no sandbox can be started: {error}"
        if reason:
            machine.printk.logger("klpfs: ").err(f"{elf.name}: cannot be executed: {reason}")
            raise OSError(errno.ENOMEM, f"{elf.name}: {reason}")
        return await cpu.code(machine, elf)

    async def aclose(self) -> None:
        """End the sandbox, if there is one."""
        if self.cpu is not None:
            await self.cpu.aclose()
