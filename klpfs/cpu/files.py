"""Files that module code makes: sysfs attributes, kobjects, /proc and debugfs entries.

Model
    A kobject of emulated code is a :class:`klpfs.kernel.kobject.Kobject` here, found by its address; the reference
    count is ours. A file calls its functions in the module when it is read or written: attributes get a page, seq files
    a seq_file, files with operations of their own a ``struct file``. /proc and debugfs entries are known to the code by
    the address of an object that only we look into.

Locks
    None of its own; a read or write holds an active reference on the file (see :mod:`klpfs.kernfs`), so that its
    removal waits for the module's function.

Source
    lib/kobject.c, fs/sysfs/{file,group}.c, fs/proc/generic.c, fs/debugfs/{inode,file}.c, fs/seq_file.c.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klpfs.cpu import layout as L
from klpfs.cpu.devices import Devices
from klpfs.kernel.kobject import Kobject, KobjType
from klpfs.kernfs import PAGE_SIZE, Attribute, Caller, FileOps, KernfsNode

if TYPE_CHECKING:
    from klpfs.cpu.host import Cpu, HostThread
    from klpfs.kernel.sched import Task

__all__ = ["Files"]

_MAX_FILE = 4 << 20


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


class ModuleFile(FileOps):
    """A file whose functions are a module's: *show* and *store* do what reading and writing does."""

    is_async = True

    def __init__(
        self,
        show: Callable[[Caller], Awaitable[bytes]] | None,
        store: Callable[[bytes, Caller], Awaitable[int]] | None,
        *,
        attribute: bool,
    ) -> None:
        self._show, self._store = show, store
        self.readable, self.writable = show is not None, store is not None
        self.page = self.strict_open = attribute
        self.size = PAGE_SIZE if attribute else 0
        self.read_errno = self.write_errno = errno.EIO

    async def ashow(self, caller: Caller) -> bytes:
        """Read all of it."""
        if self._show is None:
            raise OSError(errno.EIO, "no show")
        return await self._show(caller)

    async def store(self, data: bytes, caller: Caller) -> int:
        """Write."""
        if self._store is None:
            raise OSError(errno.EIO, "no store")
        return await self._store(data, caller)


@dataclass(eq=False)
class _ModuleKobject:
    kobj: Kobject
    addr: int
    dynamic: bool
    release: int = 0
    show: int = 0
    store: int = 0
    module: str = ""
    memory: int = 0
    """What to free at the end of a dynamic one, if not *addr*."""


class Files:
    """All such files of one engine, and the events about them."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.machine = cpu.machine
        self._kobjects: dict[int, _ModuleKobject] = {}
        self._entries: dict[int, KernfsNode] = {}
        self.devices = Devices(cpu, self)

    # -- tasks ------------------------------------------------------------------------------------------------------

    def _task(self, caller: Caller) -> Task | None:
        return self.machine.procfs.task_of(caller)

    # -- kobjects ---------------------------------------------------------------------------------------------------

    def _parent(self, addr: int) -> Kobject | KernfsNode:
        found = self._kobjects.get(addr)
        if found is not None:
            return found.kobj
        if addr == self.cpu.vmlinux.kernel_kobj:
            return self.machine.kernfs.make_path("sys/kernel")
        name = self.cpu.module_name(addr - 80) if addr else None  # struct module's mkobj.kobj
        if name is not None:
            node = self.machine.kernfs.lookup(f"sys/module/{name}")
            if node is not None:
                return node
        if addr:
            raise OSError(errno.EINVAL, f"no kobject at {addr:#x}")
        return self.machine.kernfs.make_path("sys")

    def _node(self, addr: int) -> KernfsNode:
        where = self._parent(addr)
        node = where.node if isinstance(where, Kobject) else where
        if node is None:
            raise OSError(errno.ENOENT, "the kobject has no directory")
        return node

    def warn_duplicate(self, node: KernfsNode, name: str) -> None:
        """``sysfs_warn_dup``."""
        path = node.path().lstrip("/").removeprefix("sys/")
        self.machine.printk.logger("").warn(f"sysfs: cannot create duplicate filename '/{path}/{name}'")

    def adopt(self, addr: int, kobj: Kobject) -> None:
        """*kobj*, whose life is somebody else's business, stands at *addr*: attributes can be added to it."""
        self._kobjects[addr] = _ModuleKobject(kobj, addr, False)

    def disown(self, addr: int) -> None:
        """Undo :meth:`adopt`."""
        self._kobjects.pop(addr, None)

    def _add(self, addr: int, parent: int, name: str, entry: _ModuleKobject) -> None:
        where = self._parent(parent)
        try:
            entry.kobj.add(where, name)
        except OSError as error:
            node = where.node if isinstance(where, Kobject) else where
            if error.errno == errno.EEXIST and node is not None:
                self.warn_duplicate(node, name)
                self.machine.printk.logger("").err(
                    f"kobject: kobject_add_internal failed for {name} with -EEXIST, don't try to register things with "
                    "the same name in the same directory."
                )
            raise
        self._kobjects[addr] = entry
        space = self.cpu.space
        space.put(addr, L.KOBJECT_NAME, self.cpu.heap.alloc(len(name) + 1, name.encode("utf-8", "surrogateescape")))
        space.put(addr, L.KOBJECT_PARENT, parent)
        space.put(addr, L.KOBJECT_REF, 1)

    async def on_kobject_create_and_add(self, thread: HostThread, name: bytes, parent: int) -> int:
        """Address of the new kobject, or 0."""
        addr = self.cpu.heap.alloc(L.KOBJECT_SIZE)
        text = name.decode("utf-8", "surrogateescape")
        entry = _ModuleKobject(Kobject(self.machine.kernfs, KobjType()), addr, True, module=thread.module)
        try:
            self._add(addr, parent, text, entry)
        except OSError as error:
            self.machine.printk.logger("").warn(f"kobject_create_and_add: kobject_add error: {-(error.errno or 0)}")
            self.cpu.heap.free(addr)
            return 0
        return addr

    async def on_kset_create(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``kset_create_and_add``: the address of the kset, whose kobject lies inside; 0 if it cannot be added."""
        kset = self.cpu.heap.alloc(L.KSET_SIZE)
        self.cpu.space.store(kset, kset)
        self.cpu.space.store(kset + 8, kset)
        addr = kset + L.KSET_KOBJ
        entry = _ModuleKobject(Kobject(self.machine.kernfs, KobjType()), addr, True, module=thread.module, memory=kset)
        try:
            self._add(addr, parent, name.decode("utf-8", "surrogateescape"), entry)
        except OSError:
            self.cpu.heap.free(kset)
            return 0
        return kset

    async def on_kobject_add(
        self,
        thread: HostThread,
        addr: int,
        parent: int,
        name: bytes,
        release: int,
        show: int,
        store: int,
        groups: list[Any],
    ) -> int:
        """``kobject_add`` of an object in the module's own memory."""
        ktype = KobjType()
        entry = _ModuleKobject(Kobject(self.machine.kernfs, ktype), addr, False, release, show, store, thread.module)
        self._add(addr, parent, name.decode("utf-8", "surrogateescape"), entry)
        for group, attrs in groups:
            await self.on_sysfs_create(thread, addr, group, attrs)
        return 0

    async def on_kobject_get(self, thread: HostThread, addr: int) -> int:
        """``kobject_get``."""
        entry = self._kobjects.get(addr)
        if entry is not None:
            entry.kobj.get()
            self.cpu.space.put(addr, L.KOBJECT_REF, entry.kobj.refcount)
        return addr

    async def on_kobject_put(self, thread: HostThread, addr: int) -> int:
        """``kobject_put``: the last one removes the directory and calls the type's release."""
        entry = self._kobjects.get(addr)
        if entry is None:
            return 0
        last = entry.kobj.refcount <= 1
        await entry.kobj.put()
        if not last:
            self.cpu.space.put(addr, L.KOBJECT_REF, entry.kobj.refcount)
            return 0
        del self._kobjects[addr]
        name = self.cpu.space.get(addr, L.KOBJECT_NAME)
        if entry.dynamic:
            self.cpu.heap.free(entry.memory or addr)
        elif entry.release:
            await self.cpu.call(entry.release, [addr], thread.task, module=entry.module)
        if self.cpu.heap.owns(name):
            self.cpu.heap.free(name)  # after the release, which may print it (kobject_cleanup)
        return 0

    async def on_kobject_del(self, thread: HostThread, addr: int) -> int:
        """``kobject_del``: the directory goes, the object stays."""
        entry = self._kobjects.get(addr)
        if entry is not None and entry.kobj.node is not None:
            node, entry.kobj.node = entry.kobj.node, None
            await self.machine.kernfs.remove(node)
        return 0

    async def on_kobject_uevent(self, thread: HostThread, addr: int, action: int) -> int:
        """``kobject_uevent``: nobody listens for uevents."""
        return 0

    # -- attributes -------------------------------------------------------------------------------------------------

    def _attribute(self, kobj: int, attr: int, show: int, store: int) -> ModuleFile:
        cpu = self.cpu

        async def do_show(caller: Caller) -> bytes:
            return await cpu.call_kobj_show(show, kobj, attr, self._task(caller))

        async def do_store(data: bytes, caller: Caller) -> int:
            return await cpu.call_kobj_store(store, kobj, attr, data, self._task(caller))

        return ModuleFile(do_show if show else None, do_store if store else None, attribute=True)

    async def on_sysfs_create(self, thread: HostThread, kobj: int, group: bytes | None, attrs: list[Any]) -> int:
        """``sysfs_create_file`` and its kin in directory *group*; *attrs* as ``[address, name, mode, show, store]``."""
        node = self._node(kobj)
        entry = self._kobjects.get(kobj)
        if group:
            name = group.decode("utf-8", "surrogateescape")
            try:
                node = self.machine.kernfs.create_dir(node, name)
            except OSError:
                self.warn_duplicate(node, name)
                raise
        made: list[KernfsNode] = []
        for addr, raw, mode, show, store in attrs:
            name = raw.decode("utf-8", "surrogateescape")
            if entry is not None and (entry.show or entry.store):
                show, store = entry.show if mode & 0o444 else 0, entry.store if mode & 0o222 else 0
            try:
                made.append(
                    self.machine.kernfs.create_file(node, name, self._attribute(kobj, addr, show, store), mode & 0o777)
                )
            except OSError:
                self.warn_duplicate(node, name)
                for done in made:
                    await self.machine.kernfs.remove(done)
                raise
        return 0

    async def on_sysfs_remove(self, thread: HostThread, kobj: int, group: bytes | None, names: list[bytes]) -> int:
        """``sysfs_remove_file`` and its kin."""
        node: KernfsNode | None = self._node(kobj)
        if node is not None and group:
            node = node.get(group.decode("utf-8", "surrogateescape"))
            if node is not None:
                await self.machine.kernfs.remove(node)
            return 0
        for raw in names:
            child = node.get(raw.decode("utf-8", "surrogateescape")) if node is not None else None
            if child is not None:
                await self.machine.kernfs.remove(child)
        return 0

    async def on_sysfs_notify(self, thread: HostThread, kobj: int, group: bytes | None, name: bytes | None) -> int:
        """``sysfs_notify``: wake those who poll the attribute."""
        node: KernfsNode | None = self._node(kobj)
        for part in (group, name):
            if part and node is not None:
                node = node.get(part.decode("utf-8", "surrogateescape"))
        if node is not None:
            node.notify()
        return 0

    # -- /proc and debugfs ------------------------------------------------------------------------------------------

    def _token(self, node: KernfsNode) -> int:
        addr = self.cpu.heap.alloc(64)
        self._entries[addr] = node
        return addr

    def _directory(self, parent: int, root: str) -> KernfsNode:
        if parent in self._entries:
            return self._entries[parent]
        if parent:
            raise OSError(errno.EINVAL, f"no directory at {parent:#x}")
        return self.machine.kernfs.make_path(root)

    def _proc_path(self, name: bytes, parent: int) -> tuple[KernfsNode, str]:
        """``__xlate_proc_name``: a name may contain slashes; directories on the way must exist."""
        where: KernfsNode | None = self._directory(parent, "proc")
        *way, last = name.decode("utf-8", "surrogateescape").split("/")
        for part in way:
            where = where.get(part) if where is not None and part else where
        if where is None or not where.is_dir:
            self.machine.printk.logger("").err(f"name '{name.decode('utf-8', 'replace')}'")
            raise OSError(errno.ENOENT, "no such directory")
        return where, last

    def _make(self, where: KernfsNode, name: str, ops: FileOps, mode: int, what: str) -> int:
        try:
            return self._token(self.machine.kernfs.create_file(where, name, ops, mode & 0o777 or 0o444))
        except OSError as error:
            if error.errno == errno.EEXIST and what == "proc_dir_entry":
                self.machine.kernel.warn(
                    "fs/proc/generic.c:377 proc_register", f"{what} '{where.name}/{name}' already registered"
                )
            return 0

    async def on_proc_create_single_data(
        self, thread: HostThread, name: bytes, mode: int, parent: int, show: int, data: int
    ) -> int:
        """A file of one show function."""
        where, last = self._proc_path(name, parent)

        async def do_show(caller: Caller) -> bytes:
            return await self.cpu.call_show(show, self._task(caller), private=data)

        return self._make(where, last, ModuleFile(do_show, None, attribute=False), mode, "proc_dir_entry")

    async def on_proc_create(
        self, thread: HostThread, name: bytes, mode: int, parent: int, ops: int, data: int = 0
    ) -> int:
        """A file with a ``struct proc_ops``."""
        where, last = self._proc_path(name, parent)
        get = self.cpu.space.get
        calls = tuple(get(ops, field) for field in (L.PROC_OPEN, L.PROC_READ, L.PROC_WRITE, L.PROC_RELEASE))
        if not calls[1] and get(ops, L.PROC_READ_ITER):
            calls = (calls[0], self.cpu.vmlinux.function("seq_read"), *calls[2:])
        return self._make(where, last, self._operations(calls, data), mode, "proc_dir_entry")

    async def on_proc_create_data(self, thread: HostThread, *args: Any) -> int:
        """As :meth:`on_proc_create`, with data."""
        return await self.on_proc_create(thread, *args)

    async def on_proc_create_seq(
        self, thread: HostThread, name: bytes, mode: int, parent: int, ops: int, private: int
    ) -> int:
        """A file of seq_operations."""
        where, last = self._proc_path(name, parent)

        async def do_show(caller: Caller) -> bytes:
            seq = self.cpu.heap.alloc(L.SEQ_FILE_SIZE)
            file = self.cpu.heap.alloc(L.FILE_SIZE)
            try:
                self.cpu.space.put(seq, L.SEQ_OP, ops)
                self.cpu.space.put(seq, L.SEQ_PRIVATE, private)
                self.cpu.space.put(file, L.FILE_PRIVATE, seq)
                return await self._read_all(self.cpu.vmlinux.function("seq_read"), file, self._task(caller))
            finally:
                self.cpu.heap.free(file)
                self.cpu.heap.free(seq)

        return self._make(where, last, ModuleFile(do_show, None, attribute=False), mode, "proc_dir_entry")

    async def _read_all(self, read: int, file: int, task: Task | None) -> bytes:
        """Call a ``read`` until it answers 0."""
        cpu, out = self.cpu, bytearray()
        buf, position = cpu.heap.alloc(PAGE_SIZE), cpu.heap.alloc(8)
        try:
            while len(out) < _MAX_FILE:
                answer = _signed(await cpu.call(read, [file, buf, PAGE_SIZE, position], task))
                if answer < 0:
                    raise OSError(-answer, f"read answered {answer}")
                if not answer:
                    break
                out += cpu.space.read(buf, min(answer, PAGE_SIZE))
        finally:
            cpu.heap.free(position)
            cpu.heap.free(buf)
        return bytes(out)

    def device(self, find: Callable[[], tuple[int, int, int, int]]) -> ModuleFile:
        """The node of a device. *find*: its ``file_operations``, number, cdev and private data, or OSError."""

        def start(inode: int, file: int) -> tuple[int, ...]:
            fops, number, cdev, private = find()
            space = self.cpu.space
            space.put(inode, L.INODE_RDEV, number)
            space.put(inode, L.INODE_CDEV, cdev)
            space.put(file, L.FILE_PRIVATE, private)
            space.put(file, L.FILE_OP, fops)
            owner = space.get(fops, L.FOPS_OWNER)
            calls = (space.get(fops, f) for f in (L.FOPS_OPEN, L.FOPS_READ, L.FOPS_WRITE, L.FOPS_RELEASE))
            return (*calls, owner)

        return self._operations((0, 1, 1, 0), 0, start)

    def _operations(
        self, calls: tuple[int, ...], data: int, start: Callable[[int, int], tuple[int, ...]] | None = None
    ) -> ModuleFile:
        """A file of open, read, write and release functions (0: none): opened for every read and write.

        With *start*, which gets inode and file, these are what it answers, with the owning ``struct module`` behind
        them, which is held meanwhile.
        """
        cpu = self.cpu
        modules = self.machine.modules

        async def with_file(task: Task | None, body: Callable[[int, int, int], Awaitable[Any]]) -> Any:
            inode, file = cpu.heap.alloc(L.INODE_SIZE), cpu.heap.alloc(L.FILE_SIZE)
            owner = None
            try:
                cpu.space.put(inode, L.INODE_PRIVATE, data)
                cpu.space.put(file, L.FILE_INODE, inode)
                open_, read, write, release = calls
                if start is not None:
                    open_, read, write, release, holder = start(inode, file)
                    owner = modules.modules.get(cpu.module_name(holder) or "") if holder else None
                    if owner is not None and not modules.try_module_get(owner):
                        owner = None
                        raise OSError(errno.ENXIO, "the driver is going")
                if open_:
                    answer = await cpu.call(open_, [inode, file], task)
                    if answer & 0xFFFFFFFF:
                        raise OSError((1 << 32) - (answer & 0xFFFFFFFF), "open refused")
                try:
                    return await body(file, read, write)
                finally:
                    if release:
                        await cpu.call(release, [inode, file], task)
            finally:
                if owner is not None:
                    modules.module_put(owner)
                cpu.heap.free(file)
                cpu.heap.free(inode)

        async def do_show(caller: Caller) -> bytes:
            task = self._task(caller)

            async def body(file: int, read: int, _: int) -> bytes:
                if not read:
                    raise OSError(errno.EINVAL, "no read")
                return await self._read_all(read, file, task)

            text: bytes = await with_file(task, body)
            return text

        async def do_store(text: bytes, caller: Caller) -> int:
            task = self._task(caller)

            async def body(file: int, _: int, write: int) -> int:
                if not write:
                    raise OSError(errno.EINVAL, "no write")
                buf, position = cpu.heap.alloc(len(text) + 1, text), cpu.heap.alloc(8)
                try:
                    return _signed(await cpu.call(write, [file, buf, len(text), position], task))
                finally:
                    cpu.heap.free(position)
                    cpu.heap.free(buf)

            answer: int = await with_file(task, body)
            if answer < 0:
                raise OSError(-answer, f"write answered {answer}")
            return min(answer, len(text))

        return ModuleFile(do_show if calls[1] else None, do_store if calls[2] else None, attribute=False)

    async def on_proc_mkdir(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``proc_mkdir``."""
        where, last = self._proc_path(name, parent)
        try:
            return self._token(self.machine.kernfs.create_dir(where, last, 0o555))
        except OSError:
            return 0

    async def _remove(self, node: KernfsNode) -> None:
        await self.machine.kernfs.remove(node)
        gone = [addr for addr, entry in self._entries.items() if not entry.alive]
        for addr in gone:
            del self._entries[addr]
            self.cpu.heap.free(addr)

    async def on_proc_remove(self, thread: HostThread, addr: int) -> int:
        """``proc_remove``: the entry and everything below."""
        node = self._entries.get(addr)
        if node is not None:
            await self._remove(node)
        return 0

    async def on_remove_proc_entry(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``remove_proc_entry``."""
        where, last = self._proc_path(name, parent)
        node = where.get(last)
        if node is None:
            self.machine.kernel.warn(
                "fs/proc/generic.c:711 remove_proc_entry", f"name '{name.decode('utf-8', 'replace')}'"
            )
            return 0
        await self._remove(node)
        return 0

    async def on_remove_proc_subtree(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``remove_proc_subtree``."""
        where, last = self._proc_path(name, parent)
        node = where.get(last)
        if node is None:
            return -errno.ENOENT
        await self._remove(node)
        return 0

    async def on_debugfs_create_dir(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``debugfs_create_dir``: the dentry, or an error pointer."""
        where = self._directory(parent, "sys/kernel/debug")
        return self._token(self.machine.kernfs.create_dir(where, name.decode("utf-8", "surrogateescape")))

    async def on_debugfs_create_file(
        self, thread: HostThread, name: bytes, mode: int, parent: int, data: int, ops: int
    ) -> int:
        """``debugfs_create_file``: the dentry, or an error pointer."""
        where = self._directory(parent, "sys/kernel/debug")
        get = self.cpu.space.get
        calls = tuple(get(ops, field) for field in (L.FOPS_OPEN, L.FOPS_READ, L.FOPS_WRITE, L.FOPS_RELEASE))
        text = name.decode("utf-8", "surrogateescape")
        return self._token(self.machine.kernfs.create_file(where, text, self._operations(calls, data), mode & 0o777))

    async def on_debugfs_create_value(
        self, thread: HostThread, name: bytes, mode: int, parent: int, addr: int, size: int, kind: str
    ) -> int:
        """A variable as a file: *kind* u, x, d or bool."""
        space = self.cpu.space

        def show() -> bytes:
            value = space.load(addr, size)
            if kind == "bool":
                return b"Y\n" if value else b"N\n"
            if kind == "x":
                return f"0x{value:0{2 * size}x}\n".encode()
            if kind == "d":
                value -= (value >> 8 * size - 1) << 8 * size
            return b"%d\n" % value

        async def store(data: bytes) -> int:
            from klpfs.kernel.kstrtox import kstrtobool, kstrtoll, kstrtoull

            parse: Callable[[bytes], int] = kstrtobool if kind == "bool" else kstrtoll if kind == "d" else kstrtoull
            space.store(addr, int(parse(data)), size)
            return len(data)

        where = self._directory(parent, "sys/kernel/debug")
        ops = Attribute(show if mode & 0o444 else None, store if mode & 0o222 else None)
        ops.strict_open = False
        ops.size = 0
        text = name.decode("utf-8", "surrogateescape")
        return self._token(self.machine.kernfs.create_file(where, text, ops, mode & 0o777))

    def _debugfs_file(self, name: bytes, mode: int, parent: int, show: Callable[[], bytes]) -> int:
        where = self._directory(parent, "sys/kernel/debug")
        ops = Attribute(show if mode & 0o444 else None)
        ops.strict_open = ops.page = False
        ops.size = 0
        text = name.decode("utf-8", "surrogateescape")
        return self._token(self.machine.kernfs.create_file(where, text, ops, mode & 0o777))

    async def on_debugfs_create_blob(self, thread: HostThread, name: bytes, mode: int, parent: int, blob: int) -> int:
        """``debugfs_create_blob``: the bytes of a ``struct debugfs_blob_wrapper`` (data, size)."""
        space = self.cpu.space
        return self._debugfs_file(
            name, mode, parent, lambda: space.read(space.load(blob), min(space.load(blob + 8), _MAX_FILE))
        )

    async def on_debugfs_create_str(self, thread: HostThread, name: bytes, mode: int, parent: int, where: int) -> int:
        """``debugfs_create_str``: what a ``char *`` points to, for reading."""
        space = self.cpu.space
        return self._debugfs_file(name, mode & 0o444, parent, lambda: space.cstring(space.load(where)) + b"\n")

    async def on_debugfs_create_symlink(self, thread: HostThread, name: bytes, parent: int, target: bytes) -> int:
        """``debugfs_create_symlink``."""
        where, text = self._directory(parent, "sys/kernel/debug"), name.decode("utf-8", "surrogateescape")
        return self._token(self.machine.kernfs.create_link(where, text, target.decode("utf-8", "surrogateescape")))

    async def on_proc_symlink(self, thread: HostThread, name: bytes, parent: int, target: bytes) -> int:
        """``proc_symlink``."""
        where, last = self._proc_path(name, parent)
        try:
            return self._token(self.machine.kernfs.create_link(where, last, target.decode("utf-8", "surrogateescape")))
        except OSError:
            return 0

    async def on_debugfs_lookup(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``debugfs_lookup``: the dentry, or 0."""
        node = self._directory(parent, "sys/kernel/debug").get(name.decode("utf-8", "surrogateescape"))
        return next((addr for addr, entry in self._entries.items() if entry is node), 0)

    async def on_debugfs_lookup_and_remove(self, thread: HostThread, name: bytes, parent: int) -> int:
        """``debugfs_lookup_and_remove``."""
        return await self.on_debugfs_remove(thread, await self.on_debugfs_lookup(thread, name, parent))

    async def on_sysfs_create_link(self, thread: HostThread, kobj: int, target: int, name: bytes) -> int:
        """``sysfs_create_link``: from the directory of one kobject to that of another."""
        node, text = self._node(kobj), name.decode("utf-8", "surrogateescape")
        up = node.path().strip("/").count("/")
        where = "../" * up + self._node(target).path().strip("/").removeprefix("sys/")
        try:
            self.machine.kernfs.create_link(node, text, where)
        except OSError:
            self.warn_duplicate(node, text)
            raise
        return 0

    async def on_sysfs_remove_link(self, thread: HostThread, kobj: int, name: bytes) -> int:
        """``sysfs_remove_link``."""
        return await self.on_sysfs_remove(thread, kobj, None, [name])

    async def on_debugfs_remove(self, thread: HostThread, addr: int) -> int:
        """``debugfs_remove``: the entry and everything below; nothing for NULL and error pointers."""
        node = self._entries.get(addr)
        if node is not None:
            await self._remove(node)
        return 0

    def forget_region(self, base: int, size: int) -> None:
        """A module's memory goes; kobjects in it can only dangle now."""
        for addr in [a for a in self._kobjects if base <= a < base + size]:
            del self._kobjects[addr]
