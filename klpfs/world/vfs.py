"""File requests of real processes, made in the name of the process.

Model
    While the emulated kernel works on a request that needs it, the process that made the request is ``current``: it can
    be seen in the function that it executes, and on its way out a pending switch of its patch state is made.

Locks
    None: on the trio thread. Requests that need no core do not come this way.

Source
    kernel/entry/common.c (``exit_to_user_mode_loop``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from klpfs.kernel.kernel import KernelOops
from klpfs.kernfs.vfs import Vfs

if TYPE_CHECKING:
    from klpfs.kernfs import Kernfs
    from klpfs.kernfs.files import OpenFile
    from klpfs.world.readers import Readers
    from klpfs.world.tasks import WorldTasks

__all__ = ["WorldVfs"]


class WorldVfs(Vfs):
    """The whole tree, for the callers of a world; *proc* is the path of a procfs with their pids."""

    def __init__(self, kernfs: Kernfs, tasks: WorldTasks, readers: Readers, *, proc: str) -> None:
        super().__init__(kernfs, proc=proc)
        self._tasks = tasks
        self._readers = readers

    async def read(self, fh: int, size: int, offset: int) -> bytes:
        file = self.file(fh)
        with self._on_behalf(file):
            if file.ops.is_stream:
                read = super().read
                if file.nonblock:
                    return await read(fh, size, offset)
                ino = self.ino(file.node)
                return await self._readers.guard(file.caller.pid, ino, offset, lambda: read(fh, size, offset))
            with self._tasks.in_kernel(self._tasks.ensure(file.caller.pid)):
                return await super().read(fh, size, offset)

    async def write(self, fh: int, data: bytes, offset: int) -> int:
        file = self.file(fh)
        with self._on_behalf(file):
            if file.ops.is_stream:
                return await super().write(fh, data, offset)
            with self._tasks.in_kernel(self._tasks.ensure(file.caller.pid)):
                return await super().write(fh, data, offset)

    @contextmanager
    def _on_behalf(self, file: OpenFile) -> Iterator[None]:
        """Whoever reads or writes is in the kernel; if that crashes, it ends. It is known if it opened the file."""
        try:
            yield
        except KernelOops as oops:
            if oops.ends_task:
                self._readers.kill(file.caller.pid, self.ino(file.node))
            raise
