"""The default driver: pyfuse3 (libfuse3) on the trio loop.

Caching
    Every entry and attribute of a static node is cached by the kernel for ever, so that stat never reaches the server.
    What a provider names (``KernfsNode.made``) is looked up each time. Names that do not exist are never cached.
    Every open is ``direct_io``: no page cache, no read-ahead, reads come with the caller's size and offset. flush is
    answered ENOSYS, which the kernel remembers; open never is (under concurrent readers that returned stale and
    padded data).

Removal
    The driver listens to :class:`~klpfs.kernfs.Kernfs`. When a subtree is dead, drained and unlinked, each of its
    entries that the kernel knows is invalidated, children first, from a worker thread while the loop goes on serving,
    without ``deleted=``. (A synchronous invalidation from the loop's own thread hangs for good when another request
    holds the directory; with ``deleted=`` inotify would report what sysfs never reports.) A look-up whose answer is
    under way holds the directory in the kernel, so the invalidation comes after it and nothing stale remains. An
    addition or removal also drops the parent's cached attributes (link count, times), which cannot block.

Not visible here
    pyfuse3 passes on neither lseek (a stream sees the next offset only: see :class:`klpfs.kernfs.StreamOps`), nor
    FUSE_INTERRUPT (see :class:`klpfs.drivers.common.Interrupts`), nor descriptor flags changed after open.

Threads
    A driver thread runs pyfuse3's session loop on a minimal event loop of its own (:class:`_Loop`; pyfuse3 looks its
    loop up at run time, as its asyncio support does) and answers there what needs no core: look-up, attributes, open,
    plain reads, listings. Everything else (stores, async shows, streams, dynamic directories, hooks) runs as a task
    on the trio thread while the driver thread goes on serving. Invalidations use a worker thread.

    ``known`` is written by the driver thread only, always before it looks whether the node is still alive, and read
    on the trio thread after the node was marked dead: so either the look-up fails or the removal sees it.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from klpfs.drivers._pyfuse3_loop import Call, Loop, SyncCall
from klpfs.drivers.common import (
    FOREVER,
    Interrupts,
    MountError,
    Options,
    check_mountpoint,
    clear_dead_mount,
    errno_of,
    passed_fd,
    quick_threads,
)
from klpfs.kernfs.files import Caller, StreamOps
from klpfs.kernfs.tree import KernfsNode
from klpfs.kernfs.vfs import ROOT_INO, SetAttr, Vfs

__all__ = ["serve"]

log = logging.getLogger("klpfs.drivers.pyfuse3")

P = ParamSpec("P")
T = TypeVar("T")


def _answer(exc: Exception, operation: str, args: tuple[object, ...]) -> FUSEError:
    """The library's error for *exc*: anything unexpected, which would end the mount, becomes EIO and a log entry."""
    if isinstance(exc, FUSEError):
        return exc
    if isinstance(exc, OSError):
        return FUSEError(errno_of(exc))
    log.error("%s%r failed", operation, args, exc_info=exc)
    return FUSEError(errno.EIO)


def _guard(
    fn: Callable[Concatenate[_Operations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Operations, P], Coroutine[Any, Any, T]]:
    """Let nothing but the library's errors out of a handler. The most frequent ones do so themselves."""

    @functools.wraps(fn)
    async def handler(self: _Operations, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await fn(self, *args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, fn.__name__, args) from None

    return cast("Callable[Concatenate[_Operations, P], Coroutine[Any, Any, T]]", handler)


class _Known:
    """A node that the kernel holds, and how many look-ups it has not forgotten yet."""

    __slots__ = ("lookups", "node")

    def __init__(self, node: KernfsNode) -> None:
        self.node = node
        self.lookups = 0


class _Operations(pyfuse3.Operations):
    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, vfs: Vfs, options: Options) -> None:
        super().__init__()
        self.vfs = vfs
        self.known: dict[int, _Known] = {ROOT_INO: _Known(vfs.root)}
        self.interrupts = Interrupts(options.proc)
        self.closing = False
        self.invalidating = 0
        self.quiet = trio.Condition()
        # removals of different directories do not wait for each other, nor for what else uses trio's threads
        self.limiter = trio.CapacityLimiter(8)

    # -- removal and addition ------------------------------------------------------------------------------------------

    async def entry_removed(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
        await self.entries_removed([node])

    async def entries_removed(self, nodes: Sequence[KernfsNode]) -> None:
        """Take every name of *nodes* that the kernel knows back from it; return when that is done."""
        if self.closing:
            return
        entries: list[tuple[int, bytes]] = []
        parents: dict[int, None] = {}
        for node in nodes:
            parent = node.parent
            if parent is None:
                continue
            ino = self.vfs.ino(parent)
            if ino not in self.known:
                continue
            if parent.alive:
                parents[ino] = None
            if self.vfs.ino(node) in self.known:
                entries.append((ino, os.fsencode(node.name)))
        if not entries and not parents:
            return
        self.invalidating += 1
        try:
            await trio.to_thread.run_sync(_invalidate, entries, list(parents), limiter=self.limiter)
        finally:
            self.invalidating -= 1
            async with self.quiet:
                self.quiet.notify_all()

    def entry_added(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
        """The parent's link count and times have changed."""
        ino = self.vfs.ino(parent)
        if ino in self.known and not self.closing:
            _invalidate((), (ino,))

    async def wait_quiet(self) -> None:
        """Return once no invalidation is under way."""
        async with self.quiet:
            while self.invalidating:
                await self.quiet.wait()

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def caller(self, ctx: RequestContext) -> Caller:
        return self.vfs.caller(ctx.pid, ctx.uid, ctx.gid)

    def node(self, ino: int) -> KernfsNode:
        known = self.known.get(ino)
        if known is None:
            raise FUSEError(errno.ESTALE)
        return known.node

    def attributes(self, node: KernfsNode, parent: KernfsNode | None = None) -> EntryAttributes:
        attr = EntryAttributes()
        attr.st_ino = self.vfs.ino(node)
        attr.st_mode = node.st_mode
        attr.st_nlink = node.nlink
        attr.st_uid, attr.st_gid = self.vfs.ids(node)
        stream = node.ops if isinstance(node.ops, StreamOps) else None
        attr.st_size = node.size if stream is None else stream.end_offset()
        attr.st_blksize = 4096
        attr.st_blocks = 0
        attr.st_atime_ns = node.atime_ns
        attr.st_mtime_ns = node.mtime_ns
        attr.st_ctime_ns = node.ctime_ns
        static = not node.made and (parent is None or parent.get(node.name) is node)
        # A provider's node is looked up on each walk, which brings its attributes; a second covers the stat that
        # follows.
        attr.entry_timeout = FOREVER if static else 0
        # asked at each seek from the end of a stream
        attr.attr_timeout = 0 if stream is not None else FOREVER if static else 1
        return attr

    def remember(self, node: KernfsNode) -> bool:
        """Count a look-up of *node*; False if it is dead (then it may not be named to the kernel any more)."""
        ino = self.vfs.ino(node)
        known = self.known.get(ino)
        if known is None:
            known = self.known[ino] = _Known(node)
        known.lookups += 1
        if node.alive:
            return True
        self.drop(ino, 1)
        return False

    def drop(self, ino: int, count: int) -> None:
        """Take *count* look-ups back."""
        known = self.known.get(ino)
        if known is not None and ino != ROOT_INO:
            known.lookups -= count
            if known.lookups <= 0:
                del self.known[ino]

    @_guard
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self.node(parent_inode)
        caller = self.caller(ctx)
        if parent.provider is None:
            node = self.vfs.lookup(parent, os.fsdecode(name), caller)
        else:
            node = await SyncCall(self.vfs.lookup, parent, os.fsdecode(name), caller)
        attr = self.attributes(node, parent)
        if not self.remember(node):
            raise FUSEError(errno.ENOENT)
        return attr

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, count in inode_list:
            self.drop(ino, count)

    @_guard
    async def getattr(self, inode: pyfuse3.InodeT, ctx: RequestContext) -> EntryAttributes:
        return self.attributes(self.node(inode))

    @_guard
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self.node(inode)
        change = SetAttr(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        self.vfs.setattr(node, change, self.caller(ctx))
        return self.attributes(node)

    @_guard
    async def readlink(self, inode: pyfuse3.InodeT, ctx: RequestContext) -> pyfuse3.FileNameT:
        return os.fsencode(self.vfs.readlink(self.node(inode), self.caller(ctx)))

    @_guard
    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: RequestContext) -> bool:
        self.vfs.access(self.node(inode), mode, self.caller(ctx))
        return True

    @_guard
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data, stats = StatvfsData(), self.vfs.statfs()
        data.f_bsize, data.f_frsize, data.f_namemax = stats.f_bsize, stats.f_frsize, stats.f_namemax
        data.f_blocks, data.f_bfree, data.f_bavail = stats.f_blocks, stats.f_bfree, stats.f_bavail
        data.f_files, data.f_ffree, data.f_favail = stats.f_files, stats.f_ffree, stats.f_favail
        return data

    # -- extended attributes -------------------------------------------------------------------------------------------

    @_guard
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: RequestContext) -> bytes:
        self.vfs.getxattr(self.node(inode), os.fsdecode(name))

    @_guard
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        names = self.vfs.listxattr(self.node(inode))
        return [os.fsencode(name) for name in names]

    @_guard
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        self.vfs.setxattr(self.node(inode), os.fsdecode(name), value)

    @_guard
    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: RequestContext) -> None:
        self.vfs.removexattr(self.node(inode), os.fsdecode(name))

    # -- refused -------------------------------------------------------------------------------------------------------

    @_guard
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if stat.S_ISREG(mode):  # do_mknodat() takes that for a creat(2)
            self.vfs.create(self.node(parent_inode), os.fsdecode(name), self.caller(ctx))
        self.vfs.refuse(self.node(parent_inode), self.caller(ctx))

    @_guard
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        self.vfs.refuse(self.node(parent_inode), self.caller(ctx))

    @_guard
    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: RequestContext) -> None:
        self.vfs.refuse(self.node(parent_inode), self.caller(ctx))

    @_guard
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: RequestContext) -> None:
        self.vfs.refuse(self.node(parent_inode), self.caller(ctx))

    @_guard
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        self.vfs.refuse(self.node(parent_inode), self.caller(ctx))

    @_guard
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: RequestContext,
    ) -> None:
        self.vfs.refuse(self.node(parent_inode_old), self.caller(ctx))

    @_guard
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        self.vfs.refuse(self.node(new_parent_inode), self.caller(ctx))

    @_guard
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        self.vfs.create(self.node(parent_inode), os.fsdecode(name), self.caller(ctx))

    # -- files ---------------------------------------------------------------------------------------------------------

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: RequestContext) -> FileInfo:
        try:
            node = self.node(inode)
            caller = self.vfs.caller(ctx.pid, ctx.uid, ctx.gid)
            if self.vfs.has_hooks(node):
                fh = await SyncCall(self.vfs.open, node, flags, caller)
            else:
                fh = self.vfs.open(node, flags, caller)
            return FileInfo(fh, True, False)  # direct_io, not keep_cache
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, "open", (inode, flags)) from None

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        try:
            data = self.vfs.read_now(fh, size, off)
            if data is None:
                data = await Call(self.read_on_trio, fh, size, off)
            return data
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, "read", (fh, off, size)) from None

    async def read_on_trio(self, fh: int, size: int, off: int) -> bytes:
        file = self.vfs.file(fh)
        if file.ops.is_stream:
            return await self.interrupts.guard(file.caller.pid, self.vfs.read, fh, size, off)
        return await self.vfs.read(fh, size, off)

    @_guard
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        written: int = await Call(self.vfs.write, fh, buf, off)
        return written

    @_guard
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise FUSEError(errno.ENOSYS)

    @_guard
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        self.vfs.fsync(fh)

    @_guard
    async def poll(
        self,
        inode: pyfuse3.InodeT,
        fh: pyfuse3.FileHandleT,
        poll_handle: pyfuse3.PollHandle | None,
        ctx: RequestContext,
    ) -> int:
        wake = functools.partial(_wake, poll_handle) if poll_handle is not None else None
        mask: int = await SyncCall(self.vfs.poll, fh, wake)
        return mask

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        try:
            if self.vfs.has_hooks(self.vfs.file(fh).node):
                await SyncCall(self.vfs.release, fh)
            else:
                self.vfs.release(fh)
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, "release", (fh,)) from None

    # -- directories ---------------------------------------------------------------------------------------------------

    async def opendir(self, inode: pyfuse3.InodeT, ctx: RequestContext) -> pyfuse3.FileHandleT:
        try:
            return self.vfs.opendir(self.node(inode), self.vfs.caller(ctx.pid, ctx.uid, ctx.gid))
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, "opendir", (inode,)) from None

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        try:
            parent = self.vfs.dir_node(fh)
            if parent.provider is None:
                entries = self.vfs.readdir(fh, start_id)
            else:
                entries = await SyncCall(self.vfs.readdir, fh, start_id)
            for name, node, position in entries:
                if position <= 2:
                    # "." and ".." do not count as look-ups, and the kernel takes no more than this from them
                    attr = EntryAttributes()
                    attr.st_ino = self.vfs.ino(node)
                    attr.st_mode = node.st_mode
                elif self.remember(node):
                    attr = self.attributes(node, parent)
                else:
                    continue
                if not pyfuse3.readdir_reply(token, os.fsencode(name), attr, position):
                    if position > 2:
                        self.drop(self.vfs.ino(node), 1)
                    break
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, "readdir", (fh, start_id)) from None

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        try:
            self.vfs.releasedir(fh)
        except Exception as exc:  # noqa: BLE001 - logged by _answer
            raise _answer(exc, "releasedir", (fh,)) from None

    @_guard
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        return None


def _wake(handle: pyfuse3.PollHandle) -> None:
    try:
        handle.notify()
    except OSError as exc:
        log.debug("poll notification: %s", exc)


def _invalidate(entries: Sequence[tuple[int, bytes]], parents: Sequence[int]) -> None:
    """Make the kernel forget *entries* (parent, name), in their order, and the attributes of *parents*."""
    for ino, name in entries:
        try:
            pyfuse3.invalidate_entry(ino, name)
        except FileNotFoundError:
            pass  # the kernel has dropped it by itself
        except OSError as exc:
            log.debug("invalidate_entry(%d, %r): %s", ino, name, exc)
    for ino in parents:
        try:
            pyfuse3.invalidate_inode(ino, attr_only=True)
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.debug("invalidate_inode(%d): %s", ino, exc)


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
        raise MountError(errno.EBUSY, "pyfuse3 serves one mount per process")
    check_mountpoint(mountpoint)
    passed = passed_fd(mountpoint) is not None
    options.apply(vfs, mountpoint)
    operations = _Operations(vfs, options)
    _serving = True
    try:
        try:
            pyfuse3.init(operations, mountpoint, set() if passed else options.flags())
        except RuntimeError as exc:
            raise MountError(errno.EIO, f"{mountpoint}: {exc}") from None
        try:
            with quick_threads():
                await _run(operations, task_status)
        finally:
            pyfuse3.close(unmount=True)
            if not passed:
                # libfuse leaves a mount whose connection was aborted
                try:
                    clear_dead_mount(mountpoint)
                except OSError as exc:
                    log.warning("%s", exc)
    finally:
        _serving = False


async def _run(operations: _Operations, task_status: trio.TaskStatus[None]) -> None:
    listeners = operations.vfs.kernfs.listeners
    ended = trio.Event()

    async def thread(loop: Loop) -> None:
        try:
            with trio.CancelScope(shield=True):
                await loop.run_in_thread()
        finally:
            ended.set()

    async with trio.open_nursery() as outer:
        try:
            async with trio.open_nursery() as calls:
                loop = Loop(calls)
                outer.start_soon(thread, loop)
                calls.start_soon(operations.interrupts.run)
                listeners.append(operations)
                try:
                    task_status.started()
                    await ended.wait()
                finally:
                    listeners.remove(operations)
                    operations.closing = True
                    # An invalidation under way needs the loop: it ends, or the connection does.
                    with trio.CancelScope(shield=True):
                        await operations.wait_quiet()
                    calls.cancel_scope.cancel()
        finally:
            # all calls have been answered by now
            loop.stop()
