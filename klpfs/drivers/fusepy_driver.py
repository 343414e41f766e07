"""The second driver: fusepy (libfuse2), with threads.

Caching
    libfuse2's path interface offers no invalidation, so names are never cached: each component of each path is looked
    up at each walk, which also refreshes its attributes. Opens are ``direct_io``, flush is not implemented (the
    kernel then stops sending it), writes come whole (``big_writes``).

Threads
    Requests are served by Python threads that run libfuse's session functions; one of them at a time waits for requests
    (fusepy's own loop, ``fuse_main``, cannot be stopped from outside and takes over the process's signals). Whatever
    needs no core is answered in that thread at once: look-up, attributes, open, plain reads, listings. For anything
    else (stores, async shows, streams, dynamic directories, hooks) the thread passes the turn to wait for requests on
    to another, and waits for a task on the trio thread.

What libfuse2 makes different from pyfuse3 and the real kernel
    - a path costs a request for each component, see above;
    - libfuse2 tells inodes apart by path. A directory removed and created again under its name is the same inode to it:
      a working directory inside the old one shows the new one's files (open files are not affected);
    - getcwd(2) inside a removed directory answers the old path until somebody looks that name up;
    - stat of a descriptor or working directory asks by path as well: the attributes of the last 4096 removed nodes are
      kept for that, older ones answer ENOENT. fstat of an open directory shows the link count of the last look-up;
    - signals do interrupt a blocked stream read (libfuse2 passes FUSE_INTERRUPT on), within 0.1 s, with EINTR.

    As with pyfuse3, lseek on a stream is seen only as the offset of the next read.

Source
    libfuse 2.9's fuse.h and fuse_lowlevel.h for the C functions that fusepy does not declare.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import logging
import os
import select
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from klpfs.drivers.common import (
    FOREVER,
    MountError,
    Options,
    check_mountpoint,
    clear_dead_mount,
    errno_of,
    passed_fd,
    quick_threads,
)
from klpfs.kernfs.files import Caller
from klpfs.kernfs.tree import KernfsNode
from klpfs.kernfs.vfs import SetAttr, Vfs


def _import_fuse() -> Any:
    """fusepy, told where libfuse2 is: its own search runs ldconfig, at 50 ms."""
    given = os.environ.get("FUSE_LIBRARY_PATH")
    os.environ["FUSE_LIBRARY_PATH"] = given or "libfuse.so.2"
    try:
        import fuse
    except OSError as exc:
        raise ImportError(f"the fusepy driver needs libfuse2: {exc}") from None
    finally:
        if given is None:
            del os.environ["FUSE_LIBRARY_PATH"]
    return fuse


fuse: Any = _import_fuse()
_FUSE: Any = fuse.FUSE

__all__ = ["serve"]

log = logging.getLogger("klpfs.drivers.fusepy")

ENCODING = "latin-1"
"""What fusepy encodes names with: one that maps every byte, whereas it would fail on names that are not valid UTF-8."""

LOOKUP = 1
"""The opcode of a request about a name (FUSE_LOOKUP of linux/fuse.h)."""

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


class _Args(ctypes.Structure):
    _fields_ = [
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    ]


class _FuseOperations(ctypes.Structure):
    """fusepy's ``struct fuse_operations``, and the member that follows in libfuse 2.8."""

    _fields_ = [
        *fuse.fuse_operations._fields_,
        (
            "poll",
            ctypes.CFUNCTYPE(
                ctypes.c_int,
                ctypes.c_char_p,
                ctypes.POINTER(fuse.fuse_file_info),
                ctypes.c_void_p,
                ctypes.POINTER(ctypes.c_uint),
            ),
        ),
    ]


class _Library:
    """The functions of libfuse2 that fusepy does not declare, by name."""

    def __init__(self) -> None:
        lib: ctypes.CDLL = fuse._libfuse
        ptr, string = ctypes.c_void_p, ctypes.c_char_p
        args, table = ctypes.POINTER(_Args), ctypes.POINTER(_FuseOperations)
        find = ctypes.CDLL(None).dlvsym
        find.restype, find.argtypes = ptr, [ptr, string, string]
        for name, version, result, *arguments in (
            ("fuse_mount", b"FUSE_2.6", ptr, string, args),
            ("fuse_kern_chan_new", b"FUSE_2.4", ptr, ctypes.c_int),
            ("fuse_new", b"FUSE_2.6", ptr, ptr, args, table, ctypes.c_size_t, ptr),
            ("fuse_get_session", b"FUSE_2.6", ptr, ptr),
            ("fuse_chan_fd", b"FUSE_2.4", ctypes.c_int, ptr),
            ("fuse_chan_bufsize", b"FUSE_2.4", ctypes.c_size_t, ptr),
            ("fuse_chan_recv", b"FUSE_2.6", ctypes.c_int, ctypes.POINTER(ptr), string, ctypes.c_size_t),
            ("fuse_session_process", b"FUSE_2.4", None, ptr, string, ctypes.c_size_t, ptr),
            ("fuse_session_exit", b"FUSE_2.4", None, ptr),
            ("fuse_unmount", b"FUSE_2.6", None, string, ptr),
            ("fuse_destroy", b"FUSE_2.2", None, ptr),
            ("fuse_interrupted", b"FUSE_2.6", ctypes.c_int),
            ("fuse_notify_poll", b"FUSE_2.8", ctypes.c_int, ptr),
            ("fuse_pollhandle_destroy", b"FUSE_2.8", None, ptr),
        ):
            # A plain look-up finds fuse_new of FUSE_1, which takes other arguments.
            address = find(lib._handle, name.encode(), version)
            if address is None:
                raise ImportError(f"libfuse2 has no {name}@{version.decode()}")
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)(address))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


_lib = _Library()


class _Pending:
    """A task on the trio thread that a request's thread waits for."""

    __slots__ = ("done", "error", "result", "scope")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.scope = trio.CancelScope()
        self.result: Any = None
        self.error: BaseException | None = None


class _Threads:
    """Threads that receive requests in turns, and the bridge from them to the trio thread."""

    PERIOD = 0.1

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._nursery: trio.Nursery | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._on_end = on_end
        self._turn = threading.Lock()
        self._local = threading.local()
        self._mutex = threading.Lock()
        self._waiting = 0
        self._threads: set[threading.Thread] = set()
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._channel: int | None = None
        self._session: int | None = None
        self._bufsize = 0

    # -- receiving -----------------------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery, channel: int, session: int) -> None:
        """Begin to serve; calls run in *nursery*."""
        self._nursery = nursery
        self._channel, self._session = channel, session
        self._bufsize = _lib.fuse_chan_bufsize(channel)
        self._poll.register(_lib.fuse_chan_fd(channel), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        with self._mutex:
            self._spawn()

    def _spawn(self) -> None:
        thread = threading.Thread(target=self._run, name="klpfs-fusepy", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _run(self) -> None:
        buffer = ctypes.create_string_buffer(self._bufsize)
        local = self._local
        local.turn = False
        local.buffer = buffer
        try:
            while self._take_turn():
                while local.turn:
                    if not self._serve_one(buffer):
                        local.turn = False
                        self._ended = True
                        self._turn.release()
                        return
        finally:
            with self._mutex:
                self._threads.discard(threading.current_thread())
                last = self._ended and not self._threads
            if last:
                self._on_end()

    def _take_turn(self) -> bool:
        """Become the thread that receives; False if this thread is one too many, or it is over."""
        with self._mutex:
            if self._waiting or self._ended:
                return False
            self._waiting += 1
        self._turn.acquire()
        with self._mutex:
            self._waiting -= 1
        if self._over():
            self._turn.release()
            return False
        self._local.turn = True
        return True

    def _over(self) -> bool:
        return self._ended

    def _serve_one(self, buffer: ctypes.Array[ctypes.c_char]) -> bool:
        """Wait for a request and process it; False at the end of the session."""
        for fd, _ in self._poll.poll():
            if fd == self._wake:
                return False
        channel = ctypes.c_void_p(self._channel)
        size = _lib.fuse_chan_recv(ctypes.byref(channel), buffer, self._bufsize)
        if size in (-errno.EINTR, -errno.EAGAIN):
            return True
        if size <= 0:
            return False
        _lib.fuse_session_process(self._session, buffer, size, channel)
        return True

    def opcode(self) -> int:
        """The opcode of the request that the current thread processes (struct fuse_in_header: u32 len, u32 opcode)."""
        return int.from_bytes(self._local.buffer[4:8], "little")

    def _pass_turn(self) -> None:
        """The current thread is about to block: let another one receive."""
        local = self._local
        if local.turn:
            local.turn = False
            with self._mutex:
                if not self._waiting:
                    self._spawn()
            self._turn.release()

    def stop(self) -> None:
        """Make all threads end, and wait for them. On any thread but theirs."""
        os.eventfd_write(self._wake, 1)
        while True:
            with self._mutex:
                threads = list(self._threads)
            if not threads:
                break
            for thread in threads:
                thread.join()

    def close(self) -> None:
        """Free what the threads shared, once they have ended."""
        os.close(self._wake)

    # -- the bridge ----------------------------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Awaitable[Any]], *args: object, interruptible: bool = False) -> Any:
        """``await fn(*args)`` in a task on the trio thread. Raises what it raises, OSError(EINTR) after a signal."""
        self._pass_turn()
        pending = _Pending()
        self._submit(self._start, pending, fn, args)
        while not pending.done.wait(self.PERIOD if interruptible else None):
            if _lib.fuse_interrupted():
                self._submit(pending.scope.cancel)
                pending.done.wait()
        return self._outcome(pending)

    def call_sync(self, fn: Callable[..., Any], *args: object) -> Any:
        """``fn(*args)`` on the trio thread. Raises what it raises."""
        self._pass_turn()
        pending = _Pending()
        self._submit(self._run_sync, pending, fn, args)
        pending.done.wait()
        return self._outcome(pending)

    def _submit(self, fn: Callable[..., object], *args: object) -> None:
        try:
            self._token.run_sync_soon(fn, *args)
        except trio.RunFinishedError:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)) from None

    @staticmethod
    def _outcome(pending: _Pending) -> Any:
        if pending.error is not None:
            raise pending.error
        return pending.result

    @staticmethod
    def _run_sync(pending: _Pending, fn: Callable[..., Any], args: tuple[object, ...]) -> None:
        try:
            pending.result = fn(*args)
        except Exception as exc:  # noqa: BLE001 - it is raised where the call was made
            pending.error = exc
        finally:
            pending.done.set()

    def _start(self, pending: _Pending, fn: Callable[..., Awaitable[Any]], args: tuple[object, ...]) -> None:
        assert self._nursery is not None
        try:
            self._nursery.start_soon(self._task, pending, fn, args)
        except RuntimeError:  # the nursery is closed
            pending.error = OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            pending.done.set()

    async def _task(self, pending: _Pending, fn: Callable[..., Awaitable[Any]], args: tuple[object, ...]) -> None:
        pending.error = OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))  # unless the task comes to its end
        try:
            with pending.scope:
                pending.result = await fn(*args)
                pending.error = None
            if pending.scope.cancelled_caught:
                pending.error = OSError(errno.EINTR, os.strerror(errno.EINTR))
        except Exception as exc:  # noqa: BLE001 - it is raised where the call was made
            pending.error = exc
        finally:
            pending.done.set()


class _Operations:
    """What fusepy calls: ``operations(name, *args)`` for each request, results and OSError out.

    A member that is None is not implemented, which the kernel remembers (flush) or answers by itself.
    """

    use_ns = True
    flag_nullpath_ok = 1
    flag_nopath = 1
    flag_utime_omit_ok = 1
    flush = lock = bmap = ioctl = getdir = utime = None

    KEPT = 4096

    def __init__(self, vfs: Vfs, threads: _Threads) -> None:
        self.vfs = vfs
        self.threads = threads
        # what was removed last, by path: written on the trio thread
        self.gone: collections.OrderedDict[str, KernfsNode] = collections.OrderedDict()

    def __call__(self, operation: str, *args: Any) -> Any:
        try:
            return getattr(self, operation)(*args)
        except OSError as exc:
            raise OSError(errno_of(exc), exc.strerror) from None
        except Exception:
            log.exception("%s%r failed", operation, args)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None

    def init(self, path: str) -> None:
        """The session begins."""

    def destroy(self, path: str) -> None:
        """The session has ended."""

    # -- removal -------------------------------------------------------------------------------------------------------

    async def entry_removed(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
        """Names need no taking back, but somebody may still be inside."""
        base = self.vfs.root.path()
        path = node.path()
        if base and not path.startswith(base + "/"):
            return
        key = "/" + os.fsencode(path[len(base) :].lstrip("/")).decode(ENCODING)
        self.gone[key] = node
        self.gone.move_to_end(key)
        if len(self.gone) > self.KEPT:
            self.gone.popitem(last=False)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def caller(self) -> Caller:
        uid, gid, pid = fuse.fuse_get_context()
        return self.vfs.caller(pid, uid, gid)

    def node(self, path: str) -> KernfsNode:
        """The node at *path*, or one that was there and that the kernel still holds. Raises OSError(ENOENT)."""
        try:
            return self._find(path)
        except FileNotFoundError:
            # Asked about an inode, not about a name, so somebody has it open or is inside.
            gone = self.gone.get(path) if self.threads.opcode() != LOOKUP else None
            if gone is None:
                raise
            return gone

    def _find(self, path: str) -> KernfsNode:
        names = [os.fsdecode(name.encode(ENCODING)) for name in path.split("/") if name]
        caller = self.caller()
        node = self.vfs.root
        for i, name in enumerate(names):
            if not self.vfs.is_static(node):
                found: KernfsNode = self.threads.call_sync(self._walk, node, names[i:], caller)
                return found
            node = self.vfs.lookup(node, name, caller)
        return node

    def _walk(self, node: KernfsNode, names: list[str], caller: Caller) -> KernfsNode:
        for name in names:
            node = self.vfs.lookup(node, name, caller)
        return node

    def parent(self, path: str) -> KernfsNode:
        return self.node(path.rpartition("/")[0])

    def attributes(self, node: KernfsNode) -> dict[str, int]:
        attr = self.vfs.stat(node)
        for name in ("st_atime", "st_mtime", "st_ctime"):
            attr[name] = attr.pop(name + "_ns")
        return attr

    def getattr(self, path: str | None, info: Any = None) -> dict[str, int]:
        return self.attributes(self.node(path) if path is not None else self.vfs.file(info.fh).node)

    def access(self, path: str, mask: int) -> None:
        self.vfs.access(self.node(path), mask, self.caller())

    def readlink(self, path: str) -> str:
        node = self.node(path)
        if node.made or not isinstance(node.target, str):
            target: str = self.threads.call_sync(self.vfs.readlink, node, self.caller())
        else:
            target = self.vfs.readlink(node, self.caller())
        return os.fsencode(target).decode(ENCODING)

    def chmod(self, path: str, mode: int) -> None:
        self.vfs.setattr(self.node(path), SetAttr(mode=mode & 0o7777), self.caller())

    def chown(self, path: str, uid: int, gid: int) -> None:
        change = SetAttr(uid=None if uid == -1 else uid, gid=None if gid == -1 else gid)
        self.vfs.setattr(self.node(path), change, self.caller())

    def truncate(self, path: str | None, length: int, info: Any = None) -> None:
        node = self.node(path) if path is not None else self.vfs.file(info.fh).node
        self.vfs.setattr(node, SetAttr(size=length), self.caller())

    def utimens(self, path: str, times: tuple[int, int] | None) -> None:
        node = self.node(path)
        now = self.vfs.kernfs.now_ns()
        atime, mtime = times or (UTIME_NOW, UTIME_NOW)
        change = SetAttr(
            atime_ns=None if atime == UTIME_OMIT else now if atime == UTIME_NOW else atime,
            mtime_ns=None if mtime == UTIME_OMIT else now if mtime == UTIME_NOW else mtime,
            now=atime == mtime == UTIME_NOW,
        )
        self.vfs.setattr(node, change, self.caller())

    def statfs(self, path: str) -> dict[str, int]:
        stats = self.vfs.statfs()
        return {name: getattr(stats, name) for name in type(stats).__dataclass_fields__}

    # -- extended attributes -------------------------------------------------------------------------------------------

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        self.vfs.getxattr(self.node(path), name)

    def listxattr(self, path: str) -> list[str]:
        return self.vfs.listxattr(self.node(path))

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> None:
        self.vfs.setxattr(self.node(path), name, value)

    def removexattr(self, path: str, name: str) -> None:
        self.vfs.removexattr(self.node(path), name)

    # -- refused -------------------------------------------------------------------------------------------------------

    def mknod(self, path: str, mode: int, dev: int) -> None:
        self.vfs.refuse(self.parent(path), self.caller())

    def mkdir(self, path: str, mode: int) -> None:
        self.vfs.refuse(self.parent(path), self.caller())

    def unlink(self, path: str) -> None:
        self.vfs.refuse(self.parent(path), self.caller())

    def rmdir(self, path: str) -> None:
        self.vfs.refuse(self.parent(path), self.caller())

    def symlink(self, target: str, source: str) -> None:
        self.vfs.refuse(self.parent(target), self.caller())

    def rename(self, old: str, new: str) -> None:
        self.vfs.refuse(self.parent(old), self.caller())

    def link(self, target: str, source: str) -> None:
        self.vfs.refuse(self.parent(target), self.caller())

    def create(self, path: str, mode: int, info: Any) -> None:
        self.vfs.create(self.parent(path), path.rpartition("/")[2], self.caller())

    # -- files ---------------------------------------------------------------------------------------------------------

    def open(self, path: str, info: Any) -> None:
        node = self.node(path)
        caller = self.caller()
        if self.vfs.has_hooks(node):
            info.fh = self.threads.call_sync(self.vfs.open, node, info.flags, caller)
        else:
            info.fh = self.vfs.open(node, info.flags, caller)
        info.direct_io = 1

    def read(self, path: str | None, size: int, offset: int, info: Any) -> bytes:
        fh = info.fh
        data = self.vfs.read_now(fh, size, offset)
        if data is None:
            stream = self.vfs.file(fh).ops.is_stream
            data = self.threads.call(self.vfs.read, fh, size, offset, interruptible=stream)
        return data

    def write(self, path: str | None, data: bytes, offset: int, info: Any) -> int:
        written: int = self.threads.call(self.vfs.write, info.fh, data, offset)
        return written

    def fsync(self, path: str | None, datasync: int, info: Any) -> None:
        self.vfs.fsync(info.fh)

    def poll(self, info: Any, handle: int | None) -> int:
        """The poll(2) mask; *handle* is notified once, then or never destroyed."""
        wake = _PollHandle(handle) if handle else None
        mask: int = self.threads.call_sync(self.vfs.poll, info.fh, wake)
        return mask

    def release(self, path: str | None, info: Any) -> None:
        if self.vfs.has_hooks(self.vfs.file(info.fh).node):
            self.threads.call_sync(self.vfs.release, info.fh)
        else:
            self.vfs.release(info.fh)

    # -- directories ---------------------------------------------------------------------------------------------------

    def opendir(self, path: str) -> int:
        return self.vfs.opendir(self.node(path), self.caller())

    def readdir(self, path: str | None, fh: int) -> Iterator[tuple[str, dict[str, int], int]]:
        if self.vfs.is_static(self.vfs.dir_node(fh)):
            entries = self.vfs.readdir(fh, 0)
        else:
            entries = self.threads.call_sync(self.vfs.readdir, fh, 0)
        return (
            (os.fsencode(name).decode(ENCODING), {"st_ino": self.vfs.ino(node), "st_mode": node.st_mode}, 0)
            for name, node, _ in entries
        )

    def releasedir(self, path: str | None, fh: int) -> None:
        self.vfs.releasedir(fh)

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> None:
        """Nothing to do."""


class _PollHandle:
    """Notifies a poller when called; frees libfuse's handle in the end."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __call__(self) -> None:
        error = _lib.fuse_notify_poll(self._handle)
        if error:
            log.debug("poll notification: %s", os.strerror(-error))

    def __del__(self) -> None:
        _lib.fuse_pollhandle_destroy(self._handle)


class _Fuse(_FUSE):  # type: ignore[misc]  # fusepy has no types
    """fusepy's request decoding without its main loop, which installs signal handlers and cannot be stopped."""

    def __init__(self, operations: _Operations) -> None:
        self.operations = operations
        self.raw_fi = True
        self.encoding = ENCODING
        self.use_ns = True
        self.table = _FuseOperations()
        for field in _FuseOperations._fields_:  # bit fields have a third member
            name, prototype = field[0], field[1]
            base = name[1:] if name in ("ftruncate", "fgetattr") else name
            value = getattr(operations, base, None)
            if value is None:
                continue
            if hasattr(prototype, "argtypes"):
                value = prototype(self._bind(getattr(self, name)))
            setattr(self.table, name, value)

    def _bind(self, method: Callable[..., int]) -> Callable[..., int]:
        wrapper: Callable[..., int] = self._wrapper

        def callback(*args: Any) -> int:
            return wrapper(method, *args)

        return callback

    def poll(self, path: bytes | None, info: Any, handle: int | None, events: Any) -> int:
        """``poll`` of struct fuse_operations, which fusepy lacks."""
        events[0] = self.operations("poll", info.contents, handle)
        return 0


_serving = False


async def serve(
    vfs: Vfs,
    mountpoint: str,
    *,
    options: Options | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount *vfs* at *mountpoint* and serve it: see :class:`klpfs.drivers.Serve`."""
    global _serving
    options = options or Options()
    if _serving:
        raise MountError(errno.EBUSY, "fusepy serves one mount per process")
    check_mountpoint(mountpoint)
    _serving = True
    try:
        with quick_threads():
            await _run(vfs, mountpoint, options, task_status)
    finally:
        _serving = False


def _arguments(options: Options, *, passed: bool) -> _Args:
    flags = {
        "use_ino",
        "hard_remove",
        "big_writes",
        "atomic_o_trunc",
        "entry_timeout=0",
        "negative_timeout=0",
        f"attr_timeout={FOREVER}",
        f"ac_attr_timeout={FOREVER}",
    }
    if not passed:
        flags |= options.flags() | {"nonempty"}  # libfuse2 alone minds
    words = [b"klpfs", b"-o", os.fsencode(",".join(sorted(flags)))]
    return _Args(len(words), (ctypes.c_char_p * (len(words) + 1))(*words), 0)


async def _run(vfs: Vfs, mountpoint: str, options: Options, task_status: trio.TaskStatus[None]) -> None:
    fd = passed_fd(mountpoint)
    path = os.fsencode(mountpoint)
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()

    def on_end() -> None:
        try:
            token.run_sync_soon(ended.set)
        except trio.RunFinishedError:
            pass

    options.apply(vfs, mountpoint)
    threads = _Threads(on_end)
    operations = _Operations(vfs, threads)
    handler = _Fuse(operations)
    args = _arguments(options, passed=fd is not None)
    channel = _lib.fuse_mount(path, args) if fd is None else _lib.fuse_kern_chan_new(fd)
    if not channel:
        threads.close()
        raise MountError(errno.EIO, f"{mountpoint}: libfuse2 could not mount here")
    filesystem = _lib.fuse_new(channel, args, handler.table, ctypes.sizeof(handler.table), None)
    if not filesystem:
        threads.close()
        _lib.fuse_unmount(path, channel)
        raise MountError(errno.EINVAL, f"{mountpoint}: libfuse2 refuses the options")
    session = _lib.fuse_get_session(filesystem)
    vfs.kernfs.listeners.append(operations)
    try:
        async with trio.open_nursery() as calls:
            threads.start(calls, channel, session)
            try:
                task_status.started()
                await ended.wait()
            finally:
                # Tasks that requests wait for end with an error, so that their threads end, too.
                calls.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(threads.stop)
    finally:
        vfs.kernfs.listeners.remove(operations)
        threads.close()
        if fd is None:
            _lib.fuse_unmount(path, channel)
        _lib.fuse_session_exit(session)
        _lib.fuse_destroy(filesystem)
        if fd is None:
            try:
                clear_dead_mount(mountpoint)
            except OSError as exc:
                log.warning("%s", exc)
