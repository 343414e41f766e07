"""What the daemon of a mount runs under trio: a machine, a FUSE driver, the control socket, and an eye on signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

import trio

from klpfs.control.daemon import MountConfig, StartError
from klpfs.control.ops import Operations
from klpfs.control.prefork import ENDING
from klpfs.control.runtime import Entry
from klpfs.control.server import ControlServer, listen
from klpfs.cpu.lazy import attach
from klpfs.drivers import Options, get_driver
from klpfs.kernel.kallsyms import SymbolTable
from klpfs.kernel.profile import Profile
from klpfs.kernfs.vfs import Vfs
from klpfs.machine import open_machine

log = logging.getLogger("klpfs.daemon")


async def serve(
    config: MountConfig, kernel: Profile, table: SymbolTable | None, entry: Entry, started: Callable[[], None]
) -> None:
    """Serve until the mount is taken away, a signal asks for the end, or a client does.

    ``table`` holds the kernel's symbols; None stands for those that klpfs ships for ``kernel``.

    ``started`` is called when mount and control socket can be used. Raises StartError, and what the driver raises.
    """
    driver = get_driver(config.driver)
    async with open_machine(kernel, cpus=config.cpus, table=table) as machine:
        attach(machine)
        root = machine.kernfs.lookup(config.subtree) if config.subtree else machine.kernfs.root
        if root is None or root.kind != "dir":
            raise StartError("usage", f"--subtree {config.subtree}: there is no such directory in the tree")
        options = Options(allow_other=config.allow_other, extra=tuple(config.options))
        try:
            sock = listen(entry.socket)
        except OSError as err:
            raise StartError("failed", f"control socket {entry.socket}: {err.strerror}") from None
        async with trio.open_nursery() as nursery:
            stop = nursery.cancel_scope.cancel
            operations = Operations(
                machine, mountpoint=config.mountpoint, driver=config.driver, subtree=config.subtree, shutdown=stop
            )
            nursery.start_soon(ControlServer(sock, operations).serve)
            await nursery.start(_signals, stop)

            async def mount(*, task_status: trio.TaskStatus[None]) -> None:
                await driver(Vfs(machine.kernfs, root), config.mountpoint, options=options, task_status=task_status)
                stop()  # taken away from outside

            await nursery.start(mount)
            started()


async def _signals(stop: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """End cleanly on the signals that ask for it."""
    with trio.open_signal_receiver(*ENDING) as received:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # blocked since the fork: see klpfs.control.daemon
        task_status.started()
        async for number in received:
            log.info("%s: ending", signal.Signals(number).name)
            break
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # impatience must not leave a dead mount behind
    stop()
