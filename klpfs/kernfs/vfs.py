"""The facade between FUSE drivers and the tree: every file system request, with the answer that kernfs gives.

Model
    A driver translates its library's requests into calls of :class:`Vfs` and their results, OSError included, back. It
    owns no meaning. Nodes are named by :class:`KernfsNode`, open files and directories by small integers.

Threads
    All methods that are not coroutines may be called from any thread as long as no dynamic directory is involved
    (:meth:`Vfs.is_static` tells); with one, and for every coroutine, the trio thread is needed. :meth:`Vfs.read_now`
    answers a read of a plain file at once, in whatever thread: a read never waits for the core.

Permissions
    Where the kernel checks modes for a mount (``default_permissions``) only the checks that it leaves to the file
    system are made: the *strict* open of sysfs, which refuses even root. Otherwise (``check_permissions``) the
    caller's uid, gid and supplementary groups are checked here as ``generic_permission`` does; uid 0 passes.

Source
    fs/kernfs/{dir,file,inode,symlink}.c; fs/namei.c (``generic_permission``, ``lookup_open``), fs/attr.c
    (``setattr_prepare``).
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from klpfs.kernfs.files import Caller, OpenFile
from klpfs.kernfs.tree import Kernfs, KernfsNode

__all__ = ["ROOT_INO", "SetAttr", "StatFs", "Vfs"]

ROOT_INO = 1

R_OK, W_OK, X_OK = os.R_OK, os.W_OK, os.X_OK
O_ACCMODE, O_RDONLY, O_WRONLY, O_TRUNC, O_DIRECT = os.O_ACCMODE, os.O_RDONLY, os.O_WRONLY, os.O_TRUNC, os.O_DIRECT


@dataclass(slots=True)
class SetAttr:
    """The changes of one setattr request; None means unchanged. Times are in nanoseconds.

    ``now``: the times were given as "now", which needs write permission only, not ownership.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    now: bool = False


@dataclass(slots=True, frozen=True)
class StatFs:
    """What statfs(2) says of a kernfs mount. ``f_type`` is not here: a FUSE server cannot set it."""

    f_bsize: int = 4096
    f_frsize: int = 4096
    f_blocks: int = 0
    f_bfree: int = 0
    f_bavail: int = 0
    f_files: int = 0
    f_ffree: int = 0
    f_favail: int = 0
    f_namemax: int = 255


class _Dir:
    """One open directory: the listing as it was when reading started."""

    __slots__ = ("entries", "node")

    def __init__(self, node: KernfsNode) -> None:
        self.node = node
        self.entries: list[tuple[str, KernfsNode]] | None = None


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


class Vfs:
    """File system requests against *kernfs*, or against the subtree below *root*.

    ``owner``: user and group who stand for the emulated kernel's 0:0, when an ordinary user mounts; None: 0:0 itself.
    *check_permissions*: check modes against the caller here, because the kernel does not. *proc*: a procfs in which the
    callers' pids are valid, read for their supplementary groups. Raises OSError(ENOTDIR) if *root* is not a directory.
    """

    def __init__(
        self,
        kernfs: Kernfs,
        root: KernfsNode | None = None,
        *,
        check_permissions: bool = False,
        proc: str = "/proc",
    ) -> None:
        self.kernfs = kernfs
        self.root = root if root is not None else kernfs.root
        if self.root.kind != "dir":
            _fail(errno.ENOTDIR)
        self.check_permissions = check_permissions
        self.proc = proc
        self.owner: tuple[int, int] | None = None
        self._files: dict[int, OpenFile] = {}
        self._dirs: dict[int, _Dir] = {}
        self._fh = itertools.count(1)

    # -- users ---------------------------------------------------------------------------------------------------------

    def caller(self, pid: int, uid: int, gid: int) -> Caller:
        """The caller of a request, whose ids are the mount's."""
        if self.owner is not None:
            if uid == self.owner[0]:
                uid = 0
            if gid == self.owner[1]:
                gid = 0
        return Caller(pid, uid, gid)

    def ids(self, node: KernfsNode) -> tuple[int, int]:
        """User and group of *node* as the mount shows them."""
        uid, gid = node.uid, node.gid
        if self.owner is not None:
            if uid == 0:
                uid = self.owner[0]
            if gid == 0:
                gid = self.owner[1]
        return uid, gid

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def ino(self, node: KernfsNode) -> int:
        """The inode number of *node* in this mount: 1 for the mount's root."""
        return ROOT_INO if node is self.root else node.ino

    @staticmethod
    def is_static(node: KernfsNode) -> bool:
        """Whether the children of *node* are known without a provider, so that any thread may ask for them."""
        return node.provider is None

    def resolve(self, path: str) -> KernfsNode | None:
        """The node at *path* below the mount's root, or None. Links are not followed."""
        return self.kernfs.lookup(path, self.root)

    def lookup(self, parent: KernfsNode, name: str, caller: Caller) -> KernfsNode:
        """The child *name*. Raises OSError: ENOENT, ENOTDIR, EACCES, ENAMETOOLONG."""
        if parent.kind != "dir":
            _fail(errno.ENOTDIR)
        self._permit(parent, X_OK, caller)
        node = parent.child(name)
        if node is None:
            if len(name) > 63 and len(os.fsencode(name)) > 255:
                _fail(errno.ENAMETOOLONG)
            _fail(errno.ENOENT)
        return node

    def readlink(self, node: KernfsNode, caller: Caller) -> str:
        """The text of a link. Raises OSError: EINVAL for anything else, or what a computed target raises."""
        if node.kind != "link":
            _fail(errno.EINVAL)
        return node.target if isinstance(node.target, str) else node.target(caller)

    # -- permissions ---------------------------------------------------------------------------------------------------

    def _groups(self, caller: Caller) -> frozenset[int]:
        """The caller's supplementary groups; none if they cannot be read."""
        try:
            with open(f"{self.proc}/{caller.pid}/status", encoding="ascii", errors="replace") as status:
                for line in status:
                    if line.startswith("Groups:"):
                        return frozenset(map(int, line.split()[1:]))
        except (OSError, ValueError):
            pass
        return frozenset()

    def permitted(self, node: KernfsNode, mask: int, caller: Caller) -> bool:
        """``generic_permission``: whether *caller* may do R_OK, W_OK and X_OK of *mask* on *node*."""
        mode = node.mode
        if caller.uid == 0:
            return not (mask & X_OK) or node.kind == "dir" or bool(mode & 0o111)
        if caller.uid == node.uid:
            mode >>= 6
        elif caller.gid == node.gid or (((mode >> 3) ^ mode) & 0o7 & mask and node.gid in self._groups(caller)):
            mode >>= 3
        return mask & ~mode & 0o7 == 0

    def _permit(self, node: KernfsNode, mask: int, caller: Caller) -> None:
        if self.check_permissions and caller.uid != 0 and not self.permitted(node, mask, caller):
            _fail(errno.EACCES)

    def access(self, node: KernfsNode, mask: int, caller: Caller) -> None:
        """access(2). Raises OSError(EACCES). Unlike open, it lets root do anything but execute."""
        if not self.permitted(node, mask & 0o7, caller):
            _fail(errno.EACCES)

    # -- attributes ----------------------------------------------------------------------------------------------------

    def setattr(self, node: KernfsNode, change: SetAttr, caller: Caller) -> None:
        """chmod, chown, touch, truncate. They last as long as the node; a size is accepted and ignored.

        Raises OSError: EPERM (not the owner), EACCES (no write permission for truncate or touch), as
        ``setattr_prepare``.
        """
        if self.owner is not None:
            change.uid = 0 if change.uid == self.owner[0] else change.uid
            change.gid = 0 if change.gid == self.owner[1] else change.gid
        if self.check_permissions and caller.uid != 0:
            owner = caller.uid == node.uid
            explicit = not change.now and (change.atime_ns is not None or change.mtime_ns is not None)
            if change.uid not in (None, node.uid) or (not owner and (change.mode is not None or explicit)):
                _fail(errno.EPERM)
            if change.gid not in (None, node.gid) and not (
                owner and (change.gid == caller.gid or change.gid in self._groups(caller))
            ):
                _fail(errno.EPERM)
            if change.size is not None or (change.now and not owner):
                self._permit(node, W_OK, caller)
        if change.mode is not None:
            node.mode = change.mode & 0o7777
        if change.uid is not None:
            node.uid = change.uid
        if change.gid is not None:
            node.gid = change.gid
        if change.atime_ns is not None:
            node.atime_ns = change.atime_ns
        if change.mtime_ns is not None:
            node.mtime_ns = change.mtime_ns
        node.ctime_ns = change.ctime_ns if change.ctime_ns is not None else time.time_ns()

    def statfs(self) -> StatFs:
        """statfs(2): a file system of no size."""
        return StatFs()

    def getxattr(self, node: KernfsNode, name: str) -> NoReturn:
        """Always OSError(ENODATA)."""
        _fail(errno.ENODATA)

    def listxattr(self, node: KernfsNode) -> list[str]:
        """No names."""
        return []

    def setxattr(self, node: KernfsNode, name: str, value: bytes) -> NoReturn:
        """Always OSError(EOPNOTSUPP)."""
        _fail(errno.EOPNOTSUPP)

    def removexattr(self, node: KernfsNode, name: str) -> NoReturn:
        """Always OSError(ENODATA), there being nothing to remove."""
        _fail(errno.ENODATA)

    # -- what kernfs does not let anybody do ---------------------------------------------------------------------------

    def refuse(self, parent: KernfsNode, caller: Caller) -> NoReturn:
        """mkdir, rmdir, unlink, rename, link, symlink, mknod below *parent*.

        Always OSError: EACCES without write permission to the directory, else EPERM.
        """
        self._permit(parent, W_OK | X_OK, caller)
        _fail(errno.EPERM)

    def create(self, parent: KernfsNode, name: str, caller: Caller) -> NoReturn:
        """open(O_CREAT) of a name that does not exist: always OSError(EACCES)."""
        _fail(errno.EACCES)

    # -- files ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def has_hooks(node: KernfsNode) -> bool:
        """Whether opening or closing *node* calls code of the file's own, which wants the trio thread."""
        return node.ops is not None and node.ops.hooked

    def open(self, node: KernfsNode, flags: int, caller: Caller) -> int:
        """Open a file; a handle. O_TRUNC and O_APPEND mean nothing here.

        Raises OSError: EISDIR, ELOOP (a link), ENODEV (removed), EACCES (mode; sysfs also for root), EINVAL
        (O_DIRECT), or what the file's own hook raises. Source: fs/kernfs/file.c ``kernfs_fop_open``.
        """
        ops = node.ops
        if ops is None:
            _fail(errno.EISDIR if node.kind == "dir" else errno.ELOOP)
        accmode = flags & O_ACCMODE
        read, write = accmode != O_WRONLY, accmode != O_RDONLY
        if self.check_permissions and caller.uid != 0:
            self._permit(node, (R_OK if read else 0) | (W_OK if write or flags & O_TRUNC else 0), caller)
        if not node.alive:
            _fail(errno.ENODEV)
        if ops.strict_open and (
            (write and not (node.mode & 0o222 and ops.writable)) or (read and not (node.mode & 0o444 and ops.readable))
        ):
            _fail(errno.EACCES)
        if flags & O_DIRECT:
            _fail(errno.EINVAL)
        fh = next(self._fh)
        self._files[fh] = self.kernfs.open_node(node, flags, caller)
        return fh

    def file(self, fh: int) -> OpenFile:
        """The open file behind a handle. Raises OSError(EBADF)."""
        file = self._files.get(fh)
        if file is None:
            _fail(errno.EBADF)
        return file

    def read_now(self, fh: int, size: int, offset: int) -> bytes | None:
        """Read where that needs neither the core nor the trio thread; None where :meth:`read` must be awaited instead.

        Raises OSError: ENODEV (removed), or what the file's show raises.
        """
        file = self._files.get(fh)
        if file is None:
            _fail(errno.EBADF)
        return file.read(size, offset) if file.plain else None

    async def read(self, fh: int, size: int, offset: int) -> bytes:
        """Read from any file. Raises OSError as :meth:`read_now`; a stream may block."""
        return await self.file(fh).aread(size, offset)

    async def write(self, fh: int, data: bytes, offset: int) -> int:
        """Write; the number of bytes consumed. Raises OSError: ENODEV (removed), or what the file's store raises."""
        return await self.file(fh).write(data, offset)

    def poll(self, fh: int, wake: Callable[[], None] | None) -> int:
        """The poll(2) mask now; *wake*, if given, replaces the handle's waker and is called once something changes."""
        file = self.file(fh)
        mask = file.poll()
        if wake is not None and file.node.alive:
            if file.node.pollers is None:
                file.node.pollers = {}
            file.node.pollers[file] = wake
        return mask

    def fsync(self, fh: int) -> None:
        """fsync(2), which a few files make something of. Raises OSError: EBADF, or what the file raises."""
        file = self.file(fh)
        file.ops.fsync(file)

    def release(self, fh: int) -> None:
        """The last descriptor of *fh* was closed. Unknown handles are ignored."""
        file = self._files.pop(fh, None)
        if file is not None:
            if file.node.pollers:
                file.node.pollers.pop(file, None)
            file.release()

    @property
    def open_files(self) -> int:
        """The number of handles not yet released."""
        return len(self._files) + len(self._dirs)

    # -- directories ---------------------------------------------------------------------------------------------------

    def opendir(self, node: KernfsNode, caller: Caller) -> int:
        """Open a directory, a removed one too; a handle. Raises OSError: ENOTDIR, EACCES."""
        if node.kind != "dir":
            _fail(errno.ENOTDIR)
        if self.check_permissions:
            self._permit(node, R_OK, caller)
        fh = next(self._fh)
        self._dirs[fh] = _Dir(node)
        return fh

    def dir_node(self, fh: int) -> KernfsNode:
        """The directory behind a handle. Raises OSError(EBADF)."""
        handle = self._dirs.get(fh)
        if handle is None:
            _fail(errno.EBADF)
        return handle.node

    def readdir(self, fh: int, start: int) -> Iterator[tuple[str, KernfsNode, int]]:
        """Entries from position *start* on, as (name, node, position after it); ``.`` and ``..`` come first.

        The listing is taken when *start* is 0, so that positions stay good whatever is created or removed meanwhile;
        what was removed since is left out. A removed directory has ``.`` and ``..`` only. Raises OSError(EBADF), at
        once. The iterator itself may be used in any thread.
        """
        handle = self._dirs.get(fh)
        if handle is None:
            _fail(errno.EBADF)
        node = handle.node
        entries = handle.entries
        if entries is None or start == 0:
            up = node.parent if node is not self.root and node.parent is not None else node
            entries = handle.entries = [(".", node), ("..", up), *node.entries()]
        return self._entries(node, entries, start)

    @staticmethod
    def _entries(
        node: KernfsNode, entries: list[tuple[str, KernfsNode]], start: int
    ) -> Iterator[tuple[str, KernfsNode, int]]:
        # lazily: a reply holds some dozens of entries, and a directory may have a hundred thousand
        for position in range(start, len(entries)):
            name, child = entries[position]
            if position < 2 or (child.alive and node.alive):
                yield name, child, position + 1

    def releasedir(self, fh: int) -> None:
        """Close a directory. Unknown handles are ignored."""
        self._dirs.pop(fh, None)

    # -- what stat(2) says ---------------------------------------------------------------------------------------------

    def stat(self, node: KernfsNode) -> dict[str, int]:
        """The attributes of *node* under the names of ``struct stat``, times in nanoseconds.

        A removed node still has them.
        """
        uid, gid = self.ids(node)
        return {
            "st_ino": self.ino(node),
            "st_mode": node.st_mode,
            "st_nlink": node.nlink,
            "st_uid": uid,
            "st_gid": gid,
            "st_size": node.size,
            "st_blocks": 0,
            "st_blksize": 4096,
            "st_atime_ns": node.atime_ns,
            "st_mtime_ns": node.mtime_ns,
            "st_ctime_ns": node.ctime_ns,
        }

    def is_dir(self, node: KernfsNode) -> bool:
        """Whether *node* is a directory."""
        return stat.S_ISDIR(node.st_mode)
