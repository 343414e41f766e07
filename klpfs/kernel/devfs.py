"""The nodes of /dev that belong to the kernel: ``/dev/kmsg``.

Source
    kernel/printk/printk.c (``devkmsg_open``, ``kmsg_fops``).
"""

from __future__ import annotations

import errno
import os

from klpfs.kernel.kmsg import KmsgReader, seek_offset
from klpfs.kernel.printk import Printk
from klpfs.kernfs import STREAM_SIZE, OpenFile, StreamOps

__all__ = ["KmsgOps"]


class KmsgOps(StreamOps):
    """``/dev/kmsg``: each open file has its own place in the log."""

    size = STREAM_SIZE

    def __init__(self, printk: Printk) -> None:
        self._printk = printk
        self.seek_hint = 0
        """Where a supervisor has just moved an open file; it calls fsync(2) on it to make that known at once."""

    def open(self, file: OpenFile) -> None:
        """Start at the oldest record."""
        readable = file.flags & os.O_ACCMODE != os.O_WRONLY
        file.private = KmsgReader(self._printk, readable=readable, privileged=file.caller.uid == 0)

    @staticmethod
    def reader(file: OpenFile) -> KmsgReader:
        """The state of one open file."""
        assert isinstance(file.private, KmsgReader)
        return file.private

    async def read(self, file: OpenFile, size: int, offset: int) -> bytes:
        """One record. Raises OSError: EAGAIN, EINVAL for too small a buffer, EPIPE when records were lost."""
        return await self.reader(file).read_at(size, offset, nonblock=file.nonblock)

    async def write(self, file: OpenFile, data: bytes, offset: int) -> int:
        """Log one record. Raises OSError(EINVAL) for one that is too long."""
        return self.reader(file).write(data)

    def end_offset(self) -> int:
        """The place behind the last record, as of now."""
        return seek_offset(self._printk, os.SEEK_END) if self.size else 0

    def fsync(self, file: OpenFile) -> None:
        """The device has no such function; what is told with this call is :attr:`seek_hint`."""
        hint, self.seek_hint = self.seek_hint, 0
        if not hint:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.reader(file).moved(hint)

    def poll(self, file: OpenFile) -> int:
        """See :meth:`klpfs.kernel.kmsg.KmsgReader.poll`."""
        return self.reader(file).poll()
