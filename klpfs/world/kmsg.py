"""/dev/kmsg of a world.

Model
    The emulated device is a regular FUSE file, whose server does not see lseek(2). The supervisor does, and marks the
    open file by setting its offset to a number that no reader reaches by reading (:mod:`.syscalls`). A read at such an
    offset is a seek first. The size is 0, as for the device.

Locks
    None: on the trio thread.

Source
    kernel/printk/printk.c (``devkmsg_llseek``).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from klpfs.kernel.devfs import KmsgOps
from klpfs.kernfs import STREAM_SEEK_DATA, STREAM_SIZE

if TYPE_CHECKING:
    from klpfs.kernel.printk import Printk
    from klpfs.kernfs import OpenFile

__all__ = ["WorldKmsg"]


class WorldKmsg(KmsgOps):
    """The file operations."""

    size = 0

    def __init__(self, printk: Printk) -> None:
        super().__init__(printk)
        self._expected: dict[OpenFile, int] = {}

    def release(self, file: OpenFile) -> None:
        self._expected.pop(file, None)
        super().release(file)

    async def read(self, file: OpenFile, size: int, offset: int) -> bytes:
        """One record; a read at an offset where the last one did not end is a seek if the offset says so."""
        if offset != self._expected.get(file, 0):
            reader = self.reader(file)
            if offset == STREAM_SEEK_DATA:
                reader.seek(0, os.SEEK_DATA)
            elif offset == STREAM_SIZE:
                reader.seek(0, os.SEEK_END)
            elif offset == 0:
                reader.seek(0, os.SEEK_SET)
        self._expected[file] = offset  # also when nothing comes of it: the offset stays as it is then
        data = await self.reader(file).read(size, nonblock=file.nonblock)
        self._expected[file] = offset + len(data)
        return data
