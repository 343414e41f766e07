"""Nodes, the tree, active references and removal.

Model, locks and source: see :mod:`klpfs.kernfs`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import trio

from klpfs.kernfs.files import KERNEL_CALLER, Caller, FileOps, OpenFile

__all__ = [
    "DirProvider",
    "Entry",
    "Kernfs",
    "KernfsNode",
    "Kind",
    "Listener",
    "LockChecker",
    "SelfRemovalError",
    "StaticProvider",
]

Kind = Literal["dir", "file", "link"]

_TYPE_BITS = {"dir": stat.S_IFDIR, "file": stat.S_IFREG, "link": stat.S_IFLNK}


class LockChecker(Protocol):
    """What kernfs needs of the lock-order checker (:class:`klpfs.kernel.locking.Lockdep`)."""

    def acquire(self, cls: str, *, read: bool = False, site: str | None = None) -> None: ...

    def release(self, cls: str) -> None: ...


class Listener(Protocol):
    """Who must be told of removals: a driver, whose kernel-side caches outlive a node.

    Two optional methods are called where they exist. ``entries_removed(nodes)``, a coroutine, takes all nodes of one
    removal at once, children first, instead of one ``entry_removed`` call for each. ``entry_added(parent, name,
    node)``, plain, is told of creations; it must not block.
    """

    async def entry_removed(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
        """*node* is dead, drained and unlinked from *parent*. Return once nobody can reach it by *name* any more."""


class SelfRemovalError(RuntimeError):
    """A task that holds an active reference on a node waits for the removal of that node."""


class DirProvider(Protocol):
    """The content of a dynamic directory, asked at each request, on the trio thread."""

    def lookup(self, name: str) -> Entry | None:
        """The entry called *name*, or None."""

    def list(self) -> Iterable[str]:
        """The names of all entries."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a dynamic directory.

    ``kind``; ``mode``, ``uid``, ``gid``; ``ops`` of a file; ``provider`` of a (dynamic) directory; ``target`` of a
    link, a string or a function of the caller. ``key`` tells incarnations apart: as long as it stays equal, the same
    node (inode number, chmod) is kept for the name. ``node`` is a ready node to be used instead of all that.
    """

    kind: Kind
    mode: int = 0o555
    ops: FileOps | None = None
    provider: DirProvider | None = None
    target: str | Callable[[Caller], str] = ""
    uid: int = 0
    gid: int = 0
    key: Hashable = None
    node: KernfsNode | None = None

    @classmethod
    def file(cls, ops: FileOps, mode: int = 0o444, *, uid: int = 0, gid: int = 0, key: Hashable = None) -> Entry:
        """A regular file."""
        return cls("file", mode, ops=ops, uid=uid, gid=gid, key=key)

    @classmethod
    def dir(
        cls, provider: DirProvider, mode: int = 0o555, *, uid: int = 0, gid: int = 0, key: Hashable = None
    ) -> Entry:
        """A dynamic directory."""
        return cls("dir", mode, provider=provider, uid=uid, gid=gid, key=key)

    @classmethod
    def link(cls, target: str | Callable[[Caller], str], *, uid: int = 0, gid: int = 0, key: Hashable = None) -> Entry:
        """A symbolic link."""
        return cls("link", 0o777, target=target, uid=uid, gid=gid, key=key)

    @classmethod
    def of(cls, node: KernfsNode) -> Entry:
        """A node made elsewhere, a directory of the static tree for instance."""
        return cls(node.kind, node.mode, node=node)


class StaticProvider:
    """A provider over a plain mapping of names to entries."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries

    def lookup(self, name: str) -> Entry | None:
        return self.entries.get(name)

    def list(self) -> Iterable[str]:
        return tuple(self.entries)


# The nodes on which a task holds active references. A task's context is copied to those it starts, so it names the
# task.
_held: ContextVar[tuple[tuple[object, KernfsNode], ...]] = ContextVar("klpfs_kernfs_held", default=())


class KernfsNode:
    """A directory, a file or a symbolic link (``struct kernfs_node``).

    ``mode`` holds the permission bits only, see :attr:`st_mode`. ``ino`` is unique for the life of the tree, the root's
    is 1. ``made``: a provider named it, so it may be gone without notice. ``alive`` turns false, for good, when a
    removal begins. ``priv`` belongs to the creator. Times are wall clock nanoseconds. chmod, chown and touch change
    the node and die with it.
    """

    __slots__ = (
        "__weakref__",
        "_active",
        "_children",
        "_drained",
        "_key",
        "_made",
        "_removed",
        "_subdirs",
        "alive",
        "atime_ns",
        "ctime_ns",
        "event",
        "fs",
        "gid",
        "ino",
        "kind",
        "made",
        "mode",
        "mtime_ns",
        "name",
        "ops",
        "parent",
        "pollers",
        "priv",
        "provider",
        "target",
        "uid",
    )

    def __init__(
        self,
        fs: Kernfs,
        parent: KernfsNode | None,
        name: str,
        kind: Kind,
        mode: int,
        *,
        ops: FileOps | None = None,
        provider: DirProvider | None = None,
        target: str | Callable[[Caller], str] = "",
        uid: int = 0,
        gid: int = 0,
        priv: Any = None,
    ) -> None:
        self.fs = fs
        self.parent = parent
        self.name = name
        self.kind: Kind = kind
        self.mode = mode & 0o7777
        self.ops = ops
        self.provider = provider
        self.target = target
        self.uid, self.gid = uid, gid
        self.ino = fs._next_ino()
        self.alive = True
        self.atime_ns = self.mtime_ns = self.ctime_ns = fs.now_ns()
        self.priv = priv
        self.event = 1
        self.pollers: dict[object, Callable[[], None]] | None = None
        self._active = 0
        self._children: dict[str, KernfsNode] | None = None
        self._made: dict[str, KernfsNode] | None = None
        self._key: Hashable = None
        self.made = False
        self._subdirs = 0
        self._drained: Callable[[], None] | None = None
        self._removed: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<KernfsNode {self.kind} {self.path()!r}{'' if self.alive else ' dead'}>"

    # -- what stat(2) says ---------------------------------------------------------------------------------------------

    @property
    def st_mode(self) -> int:
        """Type and permission bits."""
        return _TYPE_BITS[self.kind] | self.mode

    @property
    def nlink(self) -> int:
        """2 and one for each sub directory; 1 for anything else."""
        return 2 + self._subdirs if self.kind == "dir" else 1

    @property
    def size(self) -> int:
        """st_size: what the file's operations say, the target's length in bytes for a fixed link, 0 for a directory."""
        if self.ops is not None:
            return self.ops.size
        if self.kind == "link" and isinstance(self.target, str):
            return len(os.fsencode(self.target))
        return 0

    @property
    def is_dir(self) -> bool:
        return self.kind == "dir"

    def path(self) -> str:
        """The path from the root, without a leading slash; the last known one for a removed node."""
        parts: list[str] = []
        node: KernfsNode | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return "/".join(reversed(parts))

    # -- children ------------------------------------------------------------------------------------------------------

    def get(self, name: str) -> KernfsNode | None:
        """The static child called *name*. Any thread."""
        children = self._children
        return children.get(name) if children is not None else None

    def child(self, name: str) -> KernfsNode | None:
        """The child called *name*, static or provided; None if there is none or this directory is dead.

        Any thread for a static directory, the trio thread for one with a provider.
        """
        if not self.alive:
            return None
        node = self.get(name)
        if node is not None:
            return node if node.alive else None
        if self.provider is None:
            return None
        entry = self.provider.lookup(name)
        return self._make(name, entry) if entry is not None else None

    def entries(self) -> list[tuple[str, KernfsNode]]:
        """All children with their names, static ones first; none of a dead directory. Threads as for :meth:`child`."""
        if not self.alive:
            return []
        pairs = [(name, node) for name, node in list((self._children or {}).items()) if node.alive]
        if self.provider is not None:
            static = self._children or {}
            names = [name for name in self.provider.list() if name not in static]
            if self._made is not None and len(self._made) > 2 * len(names) + 16:
                listed = set(names)
                self._made = {name: node for name, node in self._made.items() if name in listed}
            for name in names:
                entry = self.provider.lookup(name)
                if entry is not None:
                    pairs.append((name, self._make(name, entry)))
        return pairs

    def children(self) -> list[KernfsNode]:
        """The nodes of :meth:`entries`."""
        return [node for _, node in self.entries()]

    def _make(self, name: str, entry: Entry) -> KernfsNode:
        if entry.node is not None:
            return entry.node
        made = self._made
        if made is None:
            made = self._made = {}
        node = made.get(name)
        if node is not None and node._key == entry.key and node.kind == entry.kind:
            node.ops, node.provider, node.target = entry.ops, entry.provider, entry.target
            return node
        node = KernfsNode(
            self.fs,
            self,
            name,
            entry.kind,
            entry.mode,
            ops=entry.ops,
            provider=entry.provider,
            target=entry.target,
            uid=entry.uid,
            gid=entry.gid,
        )
        node._key = entry.key
        node.made = True
        made[name] = node
        return node

    # -- active references ---------------------------------------------------------------------------------------------

    def get_active(self) -> None:
        """Take an active reference (``kernfs_get_active``). Any thread. Raises OSError(ENODEV) on a dead node."""
        with self.fs._lock:
            if self.alive:
                self._active += 1
                return
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def put_active(self) -> None:
        """Drop an active reference; the last one lets a waiting removal go on. Any thread."""
        with self.fs._lock:
            self._active -= 1
            wake = self._drained if self._active == 0 else None
        if wake is not None:
            wake()

    @property
    def active_refs(self) -> int:
        """The number of active references held."""
        return self._active

    @property
    def lock_class(self) -> str:
        """The lock-order checker's class of this node's active reference."""
        return f"kn->active#{self.name}"

    @contextlib.contextmanager
    def active(self, *, site: str) -> Iterator[None]:
        """Hold an active reference that the lock-order checker sees. On the trio thread. Raises OSError(ENODEV)."""
        self.get_active()
        try:
            lockdep = self.fs.lockdep
            cls = self.lock_class
            if lockdep is not None:
                lockdep.acquire(cls, read=True, site=f"{site} {self.path()}")
            token = _held.set((*_held.get(), (trio.lowlevel.current_task(), self)))
            try:
                yield
            finally:
                _held.reset(token)
                if lockdep is not None:
                    lockdep.release(cls)
        finally:
            self.put_active()

    # -- poll ----------------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Wake everybody who polls this file (``kernfs_notify``, ``sysfs_notify``). On the trio thread."""
        self.event += 1
        self.wake_pollers()

    def wake_pollers(self) -> None:
        """Make pollers look again, without an event of its own (a stream became readable). On the trio thread."""
        pollers, self.pollers = self.pollers, None
        for wake in (pollers or {}).values():
            wake()


def _oserror(number: int, what: str = "") -> OSError:
    return OSError(number, os.strerror(number), what) if what else OSError(number, os.strerror(number))


class Kernfs:
    """A tree. Creation and removal happen on the trio thread; lookups of static nodes and shows in any.

    *lockdep*: the lock-order checker, if any. *now_ns*: wall clock in nanoseconds, for new nodes' times.
    """

    def __init__(self, lockdep: LockChecker | None = None, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self.lockdep = lockdep
        self.now_ns = now_ns
        self.listeners: list[Listener] = []
        self._lock = threading.Lock()
        self._ino = 0
        self.root = KernfsNode(self, None, "", "dir", 0o755)

    def _next_ino(self) -> int:
        self._ino += 1
        return self._ino

    # -- creation ------------------------------------------------------------------------------------------------------

    def _add(self, parent: KernfsNode, node: KernfsNode) -> KernfsNode:
        if parent._children is None:
            parent._children = {}
        parent._children[node.name] = node
        if node.kind == "dir":
            parent._subdirs += 1
        parent.mtime_ns = parent.ctime_ns = self.now_ns()
        for listener in self.listeners:
            added = getattr(listener, "entry_added", None)
            if added is not None:
                added(parent, node.name, node)
        return node

    def _check(self, parent: KernfsNode, name: str) -> None:
        if parent.kind != "dir":
            raise _oserror(errno.ENOTDIR, parent.path())
        if not parent.alive:
            raise _oserror(errno.ENOENT, parent.path())
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise _oserror(errno.EINVAL, name)
        if len(os.fsencode(name)) > 255:
            raise _oserror(errno.ENAMETOOLONG, name)
        if parent.get(name) is not None:
            raise _oserror(errno.EEXIST, f"{parent.path()}/{name}")

    def create_dir(
        self, parent: KernfsNode, name: str, mode: int = 0o755, *, uid: int = 0, gid: int = 0, priv: Any = None
    ) -> KernfsNode:
        """A directory. Raises OSError: EEXIST, ENOENT (dead parent), ENOTDIR, EINVAL or ENAMETOOLONG (name)."""
        self._check(parent, name)
        return self._add(parent, KernfsNode(self, parent, name, "dir", mode, uid=uid, gid=gid, priv=priv))

    def create_file(
        self,
        parent: KernfsNode,
        name: str,
        ops: FileOps,
        mode: int,
        *,
        uid: int = 0,
        gid: int = 0,
        priv: Any = None,
    ) -> KernfsNode:
        """A file. Raises as :meth:`create_dir`."""
        self._check(parent, name)
        return self._add(parent, KernfsNode(self, parent, name, "file", mode, ops=ops, uid=uid, gid=gid, priv=priv))

    def create_link(
        self, parent: KernfsNode, name: str, target: str | Callable[[Caller], str], *, priv: Any = None
    ) -> KernfsNode:
        """A symbolic link; *target* is its text, or a function of the caller. Raises as :meth:`create_dir`."""
        self._check(parent, name)
        return self._add(parent, KernfsNode(self, parent, name, "link", 0o777, target=target, priv=priv))

    def create_dynamic_dir(
        self, parent: KernfsNode, name: str, provider: DirProvider, mode: int = 0o555, *, priv: Any = None
    ) -> KernfsNode:
        """A directory whose entries *provider* names at each request, beside any created in it.

        Raises as :meth:`create_dir`.
        """
        self._check(parent, name)
        return self._add(parent, KernfsNode(self, parent, name, "dir", mode, provider=provider, priv=priv))

    def make_path(self, path: str, mode: int = 0o755) -> KernfsNode:
        """The directory *path*, created with its parents as far as missing. Raises OSError(ENOTDIR)."""
        node = self.root
        for name in filter(None, path.split("/")):
            child = node.get(name)
            node = self.create_dir(node, name, mode) if child is None else child
            if node.kind != "dir":
                raise _oserror(errno.ENOTDIR, node.path())
        return node

    # -- access --------------------------------------------------------------------------------------------------------

    def lookup(self, path: str, start: KernfsNode | None = None) -> KernfsNode | None:
        """The node at *path* (links are not followed), or None."""
        node = start or self.root
        for name in filter(None, path.split("/")):
            child = node.child(name)
            if child is None:
                return None
            node = child
        return node

    def open(self, path: str, flags: int = os.O_RDWR, caller: Caller = KERNEL_CALLER) -> OpenFile:
        """Open the file at *path* without any permission check, for the emulator's own use and for tests.

        Raises OSError: ENOENT, EISDIR, ENODEV, or what the file's open hook raises.
        """
        node = self.lookup(path)
        if node is None:
            raise _oserror(errno.ENOENT, path)
        return self.open_node(node, flags, caller)

    def open_node(self, node: KernfsNode, flags: int, caller: Caller) -> OpenFile:
        """Open *node*, calling its open hook inside an active reference. Raises OSError(ENODEV) on a dead node."""
        if node.ops is not None and not node.ops.hooked:
            if not node.alive:
                raise _oserror(errno.ENODEV)
            return OpenFile(node, flags, caller)
        node.get_active()
        try:
            file = OpenFile(node, flags, caller)
            file.ops.open(file)
        finally:
            node.put_active()
        return file

    async def read_file(self, path: str, caller: Caller = KERNEL_CALLER) -> bytes:
        """The whole content of the file at *path*. Raises OSError."""
        file = self.open(path, os.O_RDONLY, caller)
        try:
            parts: list[bytes] = []
            offset = 0
            while part := await file.aread(1 << 17, offset):
                parts.append(part)
                offset += len(part)
            return b"".join(parts)
        finally:
            file.release()

    async def write_file(self, path: str, data: bytes, caller: Caller = KERNEL_CALLER) -> int:
        """One write(2) of *data* to the file at *path*. Raises OSError."""
        file = self.open(path, os.O_WRONLY, caller)
        try:
            return await file.write(data)
        finally:
            file.release()

    # -- removal -------------------------------------------------------------------------------------------------------

    async def remove(self, node: KernfsNode) -> None:
        """Remove *node* and everything below it (``kernfs_remove``); return once nobody can reach it any more.

        The whole subtree is marked dead at once: descriptors answer ENODEV, lookups ENOENT, listings are empty. Then,
        child before parent, active references are waited for and the node is unlinked; at last each listener is told.
        Removing what another task is removing waits for that. Raises the lock-order checker's error, before anything is
        changed, if the caller holds a lock that a file of the subtree also takes in its store, and
        :class:`SelfRemovalError` if it holds an active reference inside the subtree.
        """
        if node.parent is None:
            raise _oserror(errno.EBUSY, "/")
        nodes = list(_postorder(node))
        me = trio.lowlevel.current_task()
        held = [pos for task, pos in _held.get() if task is me]
        for pos in nodes:
            if pos.kind == "file" and self.lockdep is not None:
                self.lockdep.acquire(pos.lock_class, site=f"kernfs_drain {pos.path()}")
                self.lockdep.release(pos.lock_class)
            if pos in held:
                raise SelfRemovalError(f"removal of {pos.path()!r} from inside an operation on it would never end")
        done = trio.Event()
        mine: list[KernfsNode] = []
        others: list[trio.Event] = []
        with self._lock:
            for pos in nodes:
                if pos.alive:
                    pos.alive = False
                    pos._removed = done
                    mine.append(pos)
                elif pos._removed is not None:
                    others.append(pos._removed)
        # A removal that has begun must end, whatever happens to the task that asked for it.
        with trio.CancelScope(shield=True):
            try:
                for event in others:
                    await event.wait()
                for pos in mine:
                    await self._drain(pos)
                    pos.wake_pollers()
                    self._unlink(pos)
                if mine:
                    await self._tell(mine)
            finally:
                done.set()

    async def _tell(self, nodes: list[KernfsNode]) -> None:
        for listener in list(self.listeners):
            batch = getattr(listener, "entries_removed", None)
            if batch is not None:
                await batch(nodes)
                continue
            for pos in nodes:
                assert pos.parent is not None
                await listener.entry_removed(pos.parent, pos.name, pos)

    async def _drain(self, node: KernfsNode) -> None:
        """Wait until no active reference is left (``kernfs_drain``)."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        me = threading.get_ident()

        def wake() -> None:
            if threading.get_ident() == me:
                done.set()
            else:
                token.run_sync_soon(done.set)

        with self._lock:
            if node._active == 0:
                return
            node._drained = wake
        await done.wait()
        node._drained = None

    def _unlink(self, node: KernfsNode) -> None:
        parent = node.parent
        assert parent is not None
        if parent._children is not None and parent._children.get(node.name) is node:
            del parent._children[node.name]
            if node.kind == "dir":
                parent._subdirs -= 1
            parent.mtime_ns = parent.ctime_ns = self.now_ns()


def _postorder(node: KernfsNode) -> Iterator[KernfsNode]:
    """The subtree of *node*, children before their parent; provided entries are not part of it."""
    stack: list[tuple[KernfsNode, bool]] = [(node, False)]
    while stack:
        pos, expanded = stack.pop()
        if expanded or not pos._children:
            yield pos
        else:
            stack.append((pos, True))
            stack.extend((child, False) for child in pos._children.values())
