"""File operations and open files.

Model
    A :class:`FileOps` says what reading and writing a file means; one may serve many nodes. :class:`OpenFile` is one
    open of one node: it holds the snapshot that makes sequential reads consistent (``struct seq_file``).

Locks
    :attr:`OpenFile.lock` (a thread lock, held while ``show`` runs) keeps two threads from filling one buffer at a time.
    Writes, async shows and streams of one open file are serialised on the trio thread, by the order in which they come
    (``of->mutex``). A blocked write does not stop reads, not even of the same open file.

Source
    fs/kernfs/file.c, fs/sysfs/file.c, fs/seq_file.c (``seq_read_iter``, ``traverse``).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import trio

if TYPE_CHECKING:
    from klpfs.kernfs.tree import KernfsNode

__all__ = [
    "PAGE_SIZE",
    "STREAM_SEEK_DATA",
    "STREAM_SIZE",
    "Attribute",
    "Caller",
    "FileOps",
    "OpenFile",
    "SeqFile",
    "StreamOps",
]

PAGE_SIZE = 4096

STREAM_SIZE = 1 << 61
"""A size that a stream may claim so that ``lseek(SEEK_END)`` reaches it as a read at this offset (see StreamOps)."""

STREAM_SEEK_DATA = 1 << 60
"""The offset at which a stream is read after somebody emulated ``lseek(SEEK_DATA)`` on its file (see StreamOps)."""

#: the poll(2) mask of a file with nothing special to say: EPOLLIN | EPOLLOUT | EPOLLRDNORM | EPOLLWRNORM
DEFAULT_POLLMASK = 0x1 | 0x4 | 0x40 | 0x100
POLLPRI, POLLERR = 0x2, 0x8


class Caller(NamedTuple):
    """Who asks: the thread id, user and group that the request names. ``pid`` 0 means that it is not known."""

    pid: int
    uid: int
    gid: int


#: the emulator itself
KERNEL_CALLER = Caller(0, 0, 0)


class FileOps:
    """What a file node does. Subclass and override; the defaults are a file that can be neither read nor written.

    Class or instance attributes:

    - ``size``: st_size in bytes (4096 for a sysfs attribute, 0 for a procfs or debugfs file);
    - ``page``: one-page semantics of sysfs: a show longer than 4095 bytes is cut, a write beyond 4096 bytes is cut;
    - ``readable``, ``writable``: whether there is a show or store at all;
    - ``strict_open``: an open for reading (writing) is EACCES for everybody, root too, unless some read (write) bit
      is set in the mode and the file is readable (writable): KERNFS_ROOT_EXTRA_OPEN_PERM_CHECK, which sysfs sets and
      procfs and debugfs do not;
    - ``is_async``: :meth:`ashow` instead of :meth:`show`;
    - ``is_stream``: :meth:`read` and :meth:`write` instead of show and store;
    - ``read_errno``, ``write_errno``: the answer to a read (write) when there is no show (store) and the open passed.
    """

    size: int = PAGE_SIZE
    page: bool = True
    readable: bool = False
    writable: bool = False
    strict_open: bool = True
    is_async: bool = False
    is_stream: bool = False
    read_errno: int = errno.EINVAL
    write_errno: int = errno.EINVAL
    hooked: bool = False
    """Whether a subclass overrides :meth:`open` or :meth:`release`, which then want the trio thread; set by itself."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.hooked = cls.open is not FileOps.open or cls.release is not FileOps.release

    def open(self, file: OpenFile) -> None:
        """Called at open, on the trio thread or a driver's; may set ``file.private``. Raises OSError to refuse."""

    def release(self, file: OpenFile) -> None:
        """Called once when the last descriptor of *file* is closed, on any thread."""

    def show(self, caller: Caller) -> bytes:
        """The content. Runs in any thread without any lock of the core: read plain values only. Raises OSError."""
        raise OSError(self.read_errno, os.strerror(self.read_errno))

    async def ashow(self, caller: Caller) -> bytes:
        """The content, for files that need the core (``is_async``). On the trio thread. Raises OSError."""
        return self.show(caller)

    async def store(self, data: bytes, caller: Caller) -> int:
        """Take one write of at least one byte; the number of bytes consumed. On the trio thread. Raises OSError."""
        raise OSError(self.write_errno, os.strerror(self.write_errno))

    async def read(self, file: OpenFile, size: int, offset: int) -> bytes:
        """Streams only: up to *size* bytes at *offset*. On the trio thread; may block. Raises OSError."""
        raise OSError(self.read_errno, os.strerror(self.read_errno))

    async def write(self, file: OpenFile, data: bytes, offset: int) -> int:
        """Streams only: take *data*; the number of bytes consumed. On the trio thread. Raises OSError."""
        raise OSError(self.write_errno, os.strerror(self.write_errno))

    def fsync(self, file: OpenFile) -> None:
        """fsync(2): nothing to do. Raises OSError."""

    def poll(self, file: OpenFile) -> int:
        """The poll(2) mask of *file* now. Wakers call :meth:`KernfsNode.notify`.

        Source: fs/kernfs/file.c ``kernfs_generic_poll``: a file not read since the last notification (a fresh one, too)
        also has POLLPRI and POLLERR.
        """
        if file.event != file.node.event:
            return DEFAULT_POLLMASK | POLLERR | POLLPRI
        return DEFAULT_POLLMASK


class Attribute(FileOps):
    """A sysfs attribute: one page, mode enforced at open even for root.

    ``show``: the content, called in any thread; None when it cannot be read. ``store``: takes the bytes of one write
    and returns how many it consumed (normally all); None when it cannot be written. Both raise OSError to refuse.
    """

    def __init__(
        self,
        show: Callable[[], bytes] | None = None,
        store: Callable[[bytes], Awaitable[int]] | None = None,
        *,
        size: int = PAGE_SIZE,
    ) -> None:
        self._show = show
        self._store = store
        self.readable = show is not None
        self.writable = store is not None
        self.size = size

    def show(self, caller: Caller) -> bytes:
        if self._show is None:
            raise OSError(self.read_errno, os.strerror(self.read_errno))
        return self._show()

    async def store(self, data: bytes, caller: Caller) -> int:
        if self._store is None:
            raise OSError(self.write_errno, os.strerror(self.write_errno))
        return await self._store(data)


class SeqFile(FileOps):
    """A procfs or debugfs file: text of any length, size 0, root may open it whatever its mode.

    ``show(caller)`` gives the content; an ``async def`` one runs on the trio thread, a plain one in any thread.
    ``store(data, caller)`` takes one write. A missing one answers *read_errno* (EINVAL) or *write_errno* (EIO, as
    procfs does for a file without a write method).
    """

    page = False
    size = 0
    strict_open = False

    def __init__(
        self,
        show: Callable[[Caller], bytes] | Callable[[Caller], Awaitable[bytes]] | None = None,
        store: Callable[[bytes, Caller], Awaitable[int]] | None = None,
        *,
        is_async: bool | None = None,
        size: int = 0,
        strict_open: bool = False,
        read_errno: int = errno.EINVAL,
        write_errno: int = errno.EIO,
    ) -> None:
        self._show = show
        self._store = store
        self.readable = show is not None
        self.writable = store is not None
        if is_async is None:
            # CO_COROUTINE, without importing inspect
            is_async = bool(getattr(getattr(show, "__code__", None), "co_flags", 0) & 0x80)
        self.is_async = is_async
        self.size = size
        self.strict_open = strict_open
        self.read_errno, self.write_errno = read_errno, write_errno

    def show(self, caller: Caller) -> bytes:
        if self._show is None:
            raise OSError(self.read_errno, os.strerror(self.read_errno))
        return cast("Callable[[Caller], bytes]", self._show)(caller)

    async def ashow(self, caller: Caller) -> bytes:
        if self._show is None:
            raise OSError(self.read_errno, os.strerror(self.read_errno))
        return await cast("Callable[[Caller], Awaitable[bytes]]", self._show)(caller)

    async def store(self, data: bytes, caller: Caller) -> int:
        if self._store is None:
            raise OSError(self.write_errno, os.strerror(self.write_errno))
        return await self._store(data, caller)


class StreamOps(FileOps):
    """A file whose reads and writes are messages (``/dev/kmsg``): override :meth:`read`, :meth:`write` and
    :meth:`poll`.

    Offsets: a FUSE server is not told of ``lseek``; it sees the offset of the next read. So a stream must take the
    offset as a hint only: 0 after some reads means that somebody rewound; :data:`STREAM_SIZE` (when ``size`` is that)
    or more means ``SEEK_END`` (a driver that is asked at each seek lets it lead to :meth:`end_offset`); ``SEEK_DATA``
    moves to 0 unless somebody who sees the system call (a seccomp supervisor) sets the shared offset to
    :data:`STREAM_SEEK_DATA`; anything else continues. ``file.nonblock`` tells whether to answer EAGAIN instead of
    blocking.
    """

    is_stream = True
    page = False
    size = 0
    strict_open = False
    readable = True
    writable = True

    def end_offset(self) -> int:
        """The offset to which ``SEEK_END`` leads now. Any thread."""
        return self.size


class OpenFile:
    """One open of one file node (``struct kernfs_open_file`` and its ``seq_file``).

    ``node``; ``flags`` as of open(2); ``caller`` who opened; ``private`` for the file's own use; ``released`` once
    closed.
    """

    __slots__ = (
        "_buf",
        "_from",
        "_shown",
        "_turn",
        "caller",
        "event",
        "flags",
        "lock",
        "node",
        "ops",
        "plain",
        "private",
        "read_pos",
        "released",
    )

    def __init__(self, node: KernfsNode, flags: int, caller: Caller) -> None:
        ops = node.ops
        if ops is None:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.node = node
        self.ops: FileOps = ops
        self.plain = not (ops.is_async or ops.is_stream)
        self.flags = flags
        self.caller = caller
        self.private: Any = None
        self.released = False
        self.event = node.event - 1  # never read: a poll reports POLLPRI | POLLERR
        self.read_pos = 0
        self.lock = threading.Lock()
        self._buf = b""
        self._from = 0
        self._shown = False
        self._turn: trio.Lock | None = None

    @property
    def nonblock(self) -> bool:
        """Whether the file was opened with O_NONBLOCK."""
        return bool(self.flags & os.O_NONBLOCK)

    @property
    def turn(self) -> trio.Lock:
        """Serialises writes and async reads of this open file, on the trio thread."""
        if self._turn is None:
            self._turn = trio.Lock()
        return self._turn

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, size: int, offset: int) -> bytes:
        """Read from a file with a plain ``show``. Any thread. Raises OSError: ENODEV once the node is removed.

        Source: fs/seq_file.c ``seq_read_iter``. What was buffered by an earlier read is handed out even after a
        removal.
        """
        # The hot path of every driver, so calls are spelled out: _settle, get_active and put_active.
        with self.lock:
            if offset == 0 or offset != self.read_pos:
                self._shown = False
                self._buf = b""
                self._from = 0
                self.read_pos = offset
            start = self._from
            if start >= len(self._buf) and size:
                node = self.node
                if self._shown:  # the end
                    if not node.alive:
                        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                    return b""
                guard = node.fs._lock
                with guard:
                    if not node.alive:
                        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                    node._active += 1
                try:
                    self._fill(self.ops.show(self.caller), offset)
                    start = offset
                except BaseException:
                    self._reset()
                    raise
                finally:
                    with guard:
                        node._active -= 1
                        wake = node._drained if node._active == 0 else None
                    if wake is not None:
                        wake()
            data = self._buf[start : start + size]
            end = len(data)
            self._from = start + end
            self.read_pos += end
            return data

    async def aread(self, size: int, offset: int) -> bytes:
        """Read from any file. On the trio thread. Raises OSError as :meth:`read`, or what a stream raises."""
        ops, node = self.ops, self.node
        if ops.is_stream:
            node.get_active()
            node.put_active()  # a blocked reader must not hold up a removal: streams see it through node.alive
            return await ops.read(self, size, offset)
        if not ops.is_async:
            return self.read(size, offset)
        async with self.turn:
            if self._settle(size, offset):
                return self._take(size)
            with node.active(site="kernfs_seq_show"):
                if not self._shown:
                    try:
                        self._fill(await ops.ashow(self.caller), offset)
                    except BaseException:
                        self._reset()
                        raise
            return self._take(size)

    def _reset(self) -> None:
        self._buf, self._from, self._shown, self.read_pos = b"", 0, False, 0

    def _settle(self, size: int, offset: int) -> bool:
        """Settle the position as seq_read_iter does; whether the buffer alone can answer."""
        if offset == 0 or offset != self.read_pos:
            self._buf, self._from, self._shown = b"", 0, False
            self.read_pos = offset
        return size == 0 or self._from < len(self._buf)

    def _fill(self, data: bytes, offset: int) -> None:
        if len(data) >= PAGE_SIZE and self.ops.page:
            data = data[: PAGE_SIZE - 1]
        self._buf, self._from, self._shown = data, offset, True
        self.event = self.node.event

    def _take(self, size: int) -> bytes:
        start = self._from
        data = self._buf[start : start + size]
        self._from += len(data)
        self.read_pos += len(data)
        return data

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(self, data: bytes, offset: int = 0) -> int:
        """Write: one call of ``store`` (none for no bytes), holding an active reference. On the trio thread.

        Returns the number of bytes consumed. Raises OSError: ENODEV once the node is removed, or what the store raises.
        Source: fs/kernfs/file.c ``kernfs_fop_write_iter``, fs/sysfs/file.c ``sysfs_kf_write``.
        """
        ops, node = self.ops, self.node
        if ops.is_stream:
            node.get_active()
            node.put_active()
            return await ops.write(self, data, offset)
        if ops.page:
            data = data[:PAGE_SIZE]
        if not data:
            node.get_active()
            node.put_active()
            return 0
        async with self.turn:
            with node.active(site="kernfs_fop_write_iter"):
                return await ops.store(data, self.caller)

    def poll(self) -> int:
        """The poll(2) mask; ``POLLERR | POLLPRI`` on top of everything once the node is removed."""
        if not self.node.alive:
            return DEFAULT_POLLMASK | POLLERR | POLLPRI
        return self.ops.poll(self)

    def release(self) -> None:
        """Close. Idempotent."""
        if not self.released:
            self.released = True
            self._buf = b""
            self.ops.release(self)
