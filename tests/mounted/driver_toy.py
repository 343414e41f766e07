"""A server process with a toy tree, for the driver tests: ``python driver_toy.py DRIVER MOUNTPOINT [OPTION=VALUE
...]``.

Prints ``ready`` once mounted. Then each line on standard input is a command as a JSON list, answered by one JSON
line. The server ends at the end of its input, on SIGTERM, or when it is unmounted from outside (it then prints
``ended``).

The tree::

    attrs/enabled     0644  one value; stores are recorded; a store of "e<errno>" fails, of "p<n>" consumes n bytes
    attrs/force       0200  write only
    attrs/transition  0444  read only
    attrs/counter     0444  counts how often it was shown
    attrs/long        0444  shows 10000 bytes
    attrs/busy        0444  refuses with EBUSY
    attrs/bug         0644  raises RuntimeError
    attrs/stall       0644  a store sleeps until the command "go"
    seq/text          0444  300000 bytes
    seq/slow          0444  an async show, with a pause
    seq/rw            0644  records writes; longer than a page is fine
    seq/private       0400  not sysfs: root may do anything
    links/rel, links/me     a fixed link; a link computed from the caller
    dyn/              a dynamic directory, set by the command "dyn"
    stream            a log: one record a read
    storm/            where the command "storm" creates and removes directories
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

import trio

from klpfs.drivers import Options, get_driver
from klpfs.kernfs import (
    STREAM_SEEK_DATA,
    STREAM_SIZE,
    Attribute,
    Caller,
    Entry,
    Kernfs,
    KernfsNode,
    OpenFile,
    SeqFile,
    StaticProvider,
    StreamOps,
)
from klpfs.kernfs.vfs import Vfs


class Log(StreamOps):
    """Records with a number; a reader starts at the first one."""

    size = STREAM_SIZE

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.more = trio.Event()
        self.node: KernfsNode | None = None
        self.offsets: list[int] = []

    def open(self, file: OpenFile) -> None:
        file.private = 0

    def add(self, text: bytes) -> None:
        self.records.append(b"%d;%s\n" % (len(self.records), text))
        self.more.set()
        self.more = trio.Event()
        if self.node is not None:
            self.node.wake_pollers()

    async def read(self, file: OpenFile, size: int, offset: int) -> bytes:
        self.offsets.append(offset)
        if offset in (0, STREAM_SEEK_DATA):
            file.private = 0
        elif offset >= STREAM_SIZE:
            file.private = max(file.private, len(self.records)) if file.read_pos != offset else file.private
            file.read_pos = offset
        while file.private >= len(self.records):
            if file.nonblock:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            await self.more.wait()
        record = self.records[file.private]
        if len(record) > size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        file.private += 1
        return record

    async def write(self, file: OpenFile, data: bytes, offset: int) -> int:
        self.add(data.rstrip(b"\n"))
        return len(data)

    def poll(self, file: OpenFile) -> int:
        return 0x4 | 0x100 | (0x1 | 0x40 if file.private < len(self.records) else 0)


class Toy:
    """The tree and the commands on it."""

    def __init__(self) -> None:
        self.fs = Kernfs()
        self.value = b"1\n"
        self.stores: list[list[str]] = []
        self.count = 0
        self.go = trio.Event()
        self.log = Log()
        self.dyn: dict[str, Entry] = {}
        self.nursery: trio.Nursery | None = None
        self.removed: dict[str, trio.Event] = {}
        self.build()

    def build(self) -> None:
        fs = self.fs
        attrs = fs.make_path("attrs")
        self.patch(attrs)
        fs.create_file(attrs, "counter", Attribute(self.show_count), 0o444)
        fs.create_file(attrs, "long", Attribute(lambda: b"x" * 10000), 0o444)
        fs.create_file(attrs, "busy", Attribute(self.busy), 0o444)
        fs.create_file(attrs, "bug", Attribute(self.bug, self.bug_store), 0o644)
        fs.create_file(attrs, "stall", Attribute(lambda: b"s\n", self.stall), 0o644)
        seq = fs.make_path("seq")
        fs.create_file(seq, "text", SeqFile(lambda caller: bytes(range(250)) * 1200), 0o444)
        fs.create_file(seq, "slow", SeqFile(self.slow), 0o444)
        fs.create_file(seq, "rw", SeqFile(lambda caller: b"rw\n", self.seq_store), 0o644)
        fs.create_file(seq, "private", SeqFile(lambda caller: b"%d\n" % caller.uid), 0o400)
        links = fs.make_path("links")
        fs.create_link(links, "rel", "../attrs/enabled")
        fs.create_link(links, "me", lambda caller: f"pid-{caller.pid}")
        fs.create_dynamic_dir(fs.root, "dyn", StaticProvider(self.dyn))
        self.log.node = fs.create_file(fs.root, "stream", self.log, 0o644)
        fs.make_path("storm")

    def patch(self, parent: KernfsNode) -> None:
        fs = self.fs
        fs.create_file(parent, "enabled", Attribute(lambda: self.value, self.store), 0o644)
        fs.create_file(parent, "force", Attribute(None, self.store), 0o200)
        fs.create_file(parent, "transition", Attribute(lambda: b"0\n"), 0o444)
        obj = fs.create_dir(parent, "vmlinux")
        fs.create_file(obj, "patched", Attribute(lambda: b"1\n"), 0o444)
        fs.create_dir(obj, "func,1")

    # -- attributes

    async def store(self, data: bytes) -> int:
        self.stores.append(["enabled", data.decode("latin-1")])
        if data.startswith(b"e"):
            raise OSError(int(data[1:]), "refused")
        if data.startswith(b"p"):
            return int(data[1:])
        if data.strip() in (b"0", b"1"):
            self.value = data.strip() + b"\n"
        return len(data)

    async def seq_store(self, data: bytes, caller: Caller) -> int:
        self.stores.append(["rw", str(len(data)), str(caller.pid), str(caller.uid)])
        return len(data)

    def show_count(self) -> bytes:
        self.count += 1
        return b"%d\n" % self.count

    def busy(self) -> bytes:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def bug(self) -> bytes:
        raise RuntimeError("a bug in a show")

    async def bug_store(self, data: bytes) -> int:
        raise RuntimeError("a bug in a store")

    async def stall(self, data: bytes) -> int:
        self.stores.append(["stall", data.decode()])
        await self.go.wait()
        return len(data)

    async def slow(self, caller: Caller) -> bytes:
        await trio.sleep(0.05)
        return b"slow\n" * 1000

    # -- commands

    async def command(self, name: str, *args: Any) -> Any:
        return await getattr(self, "do_" + name)(*args)

    async def do_stores(self) -> list[list[str]]:
        stores, self.stores = self.stores, []
        return stores

    async def do_mkdir(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        node = self.fs.lookup(parent)
        assert node is not None
        self.patch(self.fs.create_dir(node, name))

    async def do_rm(self, path: str) -> None:
        node = self.fs.lookup(path)
        assert node is not None, path
        await self.fs.remove(node)

    async def do_rm_soon(self, path: str) -> None:
        """Begin a removal; ``rm_wait`` waits for its end."""
        assert self.nursery is not None
        self.removed[path] = trio.Event()

        async def remove() -> None:
            await self.do_rm(path)
            self.removed[path].set()

        self.nursery.start_soon(remove)

    async def do_is_removed(self, path: str) -> bool:
        return self.removed[path].is_set()

    async def do_rm_wait(self, path: str) -> None:
        await self.removed[path].wait()

    async def do_go(self) -> None:
        self.go.set()
        self.go = trio.Event()

    async def do_dyn(self, names: Iterable[str]) -> None:
        self.dyn.clear()
        for name in names:
            self.dyn[name] = Entry.dir(
                StaticProvider({"state": Entry.file(SeqFile(lambda caller, n=name: f"{n}\n".encode()), 0o444)})
            )

    async def do_log(self, text: str) -> None:
        self.log.add(text.encode())

    async def do_offsets(self) -> list[int]:
        offsets, self.log.offsets = self.log.offsets, []
        return offsets

    async def do_notify(self, path: str) -> None:
        node = self.fs.lookup(path)
        assert node is not None
        node.notify()

    async def do_storm(self, rounds: int, names: int) -> float:
        """Create and remove *names* directories *rounds* times, each removal awaited; the seconds it took."""
        storm = self.fs.lookup("storm")
        assert storm is not None
        start = trio.current_time()
        for _ in range(rounds):
            nodes = []
            for i in range(names):
                node = self.fs.create_dir(storm, f"p{i}")
                self.patch(node)
                nodes.append(node)
            await trio.sleep(0.001)
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(self.fs.remove, node)
        return trio.current_time() - start


async def main(driver: str, mountpoint: str, *settings: str) -> None:
    given: dict[str, Any] = {key: json.loads(value) for key, _, value in (item.partition("=") for item in settings)}
    serve = get_driver(driver)
    if user := given.pop("user", 0):  # not earlier, others may not be able to read the interpreter's files
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    toy = Toy()
    root = toy.fs.lookup(given.pop("subtree", ""))
    options = Options(**given)
    vfs = Vfs(toy.fs, root)

    async with trio.open_nursery() as nursery:
        toy.nursery = nursery

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await serve(vfs, mountpoint, options=options, task_status=task_status)
            print("ended", flush=True)
            nursery.cancel_scope.cancel()

        async def stop() -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(stop)
        await nursery.start(run)
        print("ready", flush=True)
        pending = b""
        stdin = trio.lowlevel.FdStream(os.dup(0))
        while data := await stdin.receive_some(65536):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                try:
                    answer: Any = {"result": await toy.command(*json.loads(line))}
                except Exception as exc:  # noqa: BLE001 - the test wants to see whatever it was
                    answer = {"error": repr(exc)}
                print(json.dumps(answer), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
