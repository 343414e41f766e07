"""Nodes, active references, removal, and what the lock-order checker sees of them."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
from kernfs_support import refusal

from klpfs.kernel.locking import Lockdep, LockOrderError, Mutex
from klpfs.kernfs import (
    Attribute,
    Caller,
    Entry,
    Kernfs,
    KernfsNode,
    SelfRemovalError,
    SeqFile,
    StaticProvider,
)

Run = Callable[..., Any]
ME = Caller(1, 0, 0)


async def nothing(data: bytes) -> int:
    return len(data)


def attribute(text: bytes = b"1\n") -> Attribute:
    return Attribute(lambda: text, nothing)


def test_creation_and_lookup() -> None:
    fs = Kernfs()
    top = fs.make_path("sys/kernel/livepatch")
    assert fs.make_path("sys/kernel/livepatch") is top
    node = fs.create_file(top, "enabled", attribute(), 0o644)
    assert (node.path(), node.kind, node.mode, node.size, node.nlink) == (
        "sys/kernel/livepatch/enabled",
        "file",
        0o644,
        4096,
        1,
    )
    assert fs.lookup("sys/kernel/livepatch/enabled") is node
    assert fs.lookup("/sys/kernel//livepatch/enabled/") is node
    assert fs.lookup("sys/kernel/nosuch/enabled") is None
    assert fs.lookup("enabled", top) is node
    assert fs.lookup("") is fs.root
    link = fs.create_link(top, "link", "enabled")
    assert (link.size, link.mode, link.st_mode) == (7, 0o777, 0o120777)
    assert len({fs.root.ino, top.ino, node.ino, link.ino}) == 4
    assert fs.root.ino == 1
    assert [name for name, _ in top.entries()] == ["enabled", "link"]


def test_link_counts() -> None:
    fs = Kernfs()
    top = fs.make_path("top")
    assert (top.nlink, top.size, fs.root.nlink) == (2, 0, 3)
    fs.create_dir(top, "a")
    fs.create_file(top, "f", attribute(), 0o444)
    assert top.nlink == 3


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("", errno.EINVAL),
        (".", errno.EINVAL),
        ("..", errno.EINVAL),
        ("a/b", errno.EINVAL),
        ("a\0b", errno.EINVAL),
        ("x" * 256, errno.ENAMETOOLONG),
        ("taken", errno.EEXIST),
    ],
)
def test_bad_names(name: str, number: int) -> None:
    fs = Kernfs()
    fs.create_dir(fs.root, "taken")
    with refusal(number):
        fs.create_dir(fs.root, name)


def test_parents_must_be_live_directories(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        top = fs.make_path("top")
        file = fs.create_file(top, "f", attribute(), 0o444)
        with pytest.raises(NotADirectoryError):
            fs.create_dir(file, "x")
        with pytest.raises(NotADirectoryError):
            fs.make_path("top/f")
        await fs.remove(top)
        with pytest.raises(FileNotFoundError):
            fs.create_dir(top, "x")

    run(main)


def test_removal_is_complete_when_it_returns(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        top = fs.make_path("top")
        patch = fs.create_dir(top, "patch")
        file = fs.create_file(patch, "enabled", attribute(), 0o644)
        opened = fs.open("top/patch/enabled")
        told: list[tuple[str, str, bool, int]] = []

        class Listener:
            async def entry_removed(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
                told.append((parent.name, name, node.alive, node.active_refs))

        fs.listeners.append(Listener())
        await fs.remove(patch)
        assert told == [("patch", "enabled", False, 0), ("top", "patch", False, 0)]
        assert fs.lookup("top/patch") is None
        assert top.entries() == []
        assert patch.entries() == []
        assert patch.child("enabled") is None
        assert top.nlink == 2
        assert not file.alive
        assert file.path() == "top/patch/enabled"
        with refusal(errno.ENODEV):
            opened.read(10, 0)
        with refusal(errno.ENODEV):
            await opened.write(b"0")
        with refusal(errno.ENODEV):
            await opened.write(b"")
        with refusal(errno.ENODEV):
            fs.open_node(file, os.O_RDONLY, ME)
        await fs.remove(patch)  # a second time: nothing
        assert len(told) == 2
        with refusal(errno.EBUSY):
            await fs.remove(fs.root)

    run(main)


def test_listeners_that_take_a_whole_removal(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        top = fs.make_path("top/a/b")
        batches: list[list[str]] = []
        added: list[str] = []

        class Listener:
            async def entry_removed(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
                raise AssertionError("entries_removed exists")

            async def entries_removed(self, nodes: list[KernfsNode]) -> None:
                batches.append([node.name for node in nodes])

            def entry_added(self, parent: KernfsNode, name: str, node: KernfsNode) -> None:
                added.append(f"{parent.name}/{name}")

        fs.listeners.append(Listener())
        fs.create_dir(top, "c")
        node = fs.lookup("top/a")
        assert node is not None
        await fs.remove(node)
        assert added == ["b/c"]
        assert batches == [["c", "b", "a"]]

    run(main)


def test_removal_waits_for_a_store(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        events: list[str] = []

        async def store(data: bytes) -> int:
            events.append("store begins")
            await trio.sleep(5)
            assert fs.lookup("p") is None  # marked dead at once
            events.append("store ends")
            return len(data)

        patch = fs.make_path("p")
        file = fs.create_file(patch, "enabled", Attribute(lambda: b"", store), 0o644)
        opened = fs.open("p/enabled")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.write, b"0")
            await trio.testing.wait_all_tasks_blocked()
            assert file.active_refs == 1
            start = trio.current_time()
            await fs.remove(patch)
            events.append("removed")
            assert trio.current_time() - start == pytest.approx(5)
        assert events == ["store begins", "store ends", "removed"]
        assert file.active_refs == 0

    run(main)


def test_removal_waits_for_a_show_in_another_thread(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        inside, go = threading.Event(), threading.Event()

        def show() -> bytes:
            inside.set()
            assert go.wait(10)
            return b"late\n"

        patch = fs.make_path("p")
        fs.create_file(patch, "f", Attribute(show), 0o444)
        opened = fs.open("p/f")
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(opened.read(100, 0)))
        reader.start()
        assert inside.wait(10)
        threading.Timer(0.05, go.set).start()
        await fs.remove(patch)
        assert got == [b"late\n"] or not reader.join(10)  # type: ignore[func-returns-value]
        assert got == [b"late\n"]

    trio.run(main)


def test_two_removals_meet(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()

        async def store(data: bytes) -> int:
            await trio.sleep(3)
            return len(data)

        patch = fs.make_path("p/obj")
        fs.create_file(patch, "f", Attribute(None, store), 0o200)
        top = fs.lookup("p")
        assert top is not None
        times: dict[str, float] = {}

        async def remove(node: KernfsNode) -> None:
            await fs.remove(node)
            times[node.name] = trio.current_time()

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.open("p/obj/f").write, b"x")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(remove, patch)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(remove, top)
            nursery.start_soon(remove, top)
        assert {name: when - start for name, when in times.items()} == {
            "obj": pytest.approx(3),
            "p": pytest.approx(3),
        }
        assert fs.root.entries() == []

    run(main)


def test_a_cancelled_removal_ends_all_the_same(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()

        async def store(data: bytes) -> int:
            await trio.sleep(3)
            return len(data)

        node = fs.make_path("p")
        fs.create_file(node, "f", Attribute(None, store), 0o200)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.open("p/f").write, b"x")
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1):
                await fs.remove(node)
            assert fs.lookup("p") is None
            assert fs.root.entries() == []

    run(main)


def test_removed_nodes_can_be_collected(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        for i in range(50):
            node = fs.create_dir(fs.root, f"p{i}")
            fs.create_file(node, "f", attribute(), 0o444)
            await fs.remove(node)
        del node
        gc.collect()
        assert not [obj for obj in gc.get_objects() if isinstance(obj, KernfsNode) and obj.fs is fs and obj.parent]

    run(main)


# -- the lock-order checker --------------------------------------------------------------------------------------------


def test_removal_inside_the_own_store_is_an_inversion(run: Run) -> None:
    """The reason why a patch is freed by a workqueue: see the commit that removed the registration step."""

    async def main() -> None:
        lockdep = Lockdep()
        fs = Kernfs(lockdep)
        mutex = Mutex("klp_mutex", lockdep)
        patch = fs.make_path("sys/kernel/livepatch/patch")

        async def free_here(data: bytes) -> int:
            async with mutex:
                await fs.remove(patch)
            return len(data)

        file = fs.create_file(patch, "enabled", Attribute(lambda: b"1\n", free_here), 0o644)
        with pytest.raises(LockOrderError) as caught:
            await fs.write_file(file.path(), b"0")
        text = str(caught.value)
        assert "'kn->active#enabled' at kernfs_drain sys/kernel/livepatch/patch/enabled" in text
        assert "holding 'klp_mutex'" in text
        assert "free_here" in text  # where the mutex was taken inside the store: the opposite order
        assert file.alive  # nothing was begun
        assert lockdep.held() == []

    run(main)


def test_removal_under_the_mutex_that_a_store_takes_is_an_inversion(run: Run) -> None:
    async def main() -> None:
        lockdep = Lockdep()
        fs = Kernfs(lockdep)
        mutex = Mutex("klp_mutex", lockdep)
        patch = fs.make_path("p")

        async def store(data: bytes) -> int:
            async with mutex:
                return len(data)

        fs.create_file(patch, "enabled", Attribute(None, store), 0o200)
        await fs.write_file("p/enabled", b"0")
        with pytest.raises(LockOrderError, match=r"kn->active#enabled.*klp_mutex"):
            async with mutex:
                await fs.remove(patch)
        assert patch.alive
        await fs.remove(patch)  # without the mutex: clean
        assert lockdep.reports != []

    run(main)


def test_the_workqueue_way_is_clean(run: Run) -> None:
    async def main() -> None:
        lockdep = Lockdep()
        fs = Kernfs(lockdep)
        mutex = Mutex("klp_mutex", lockdep)
        patch = fs.make_path("p")
        async with trio.open_nursery() as nursery:

            async def store(data: bytes) -> int:
                async with mutex:
                    nursery.start_soon(fs.remove, patch)
                    await trio.sleep(1)
                return len(data)

            fs.create_file(patch, "enabled", Attribute(None, store), 0o200)
            assert await fs.write_file("p/enabled", b"0") == 1
        assert fs.lookup("p") is None
        assert lockdep.reports == []

    run(main)


def test_without_a_checker_self_removal_is_still_refused(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        patch = fs.make_path("p")

        async def store(data: bytes) -> int:
            await fs.remove(patch)
            return len(data)

        fs.create_file(patch, "enabled", Attribute(None, store), 0o200)
        with pytest.raises(SelfRemovalError, match="p/enabled"):
            await fs.write_file("p/enabled", b"0")
        assert patch.alive

    run(main)


# -- dynamic directories -----------------------------------------------------------------------------------------------


def test_dynamic_directory() -> None:
    fs = Kernfs()
    entries: dict[str, Entry] = {}
    proc = fs.create_dynamic_dir(fs.root, "proc", StaticProvider(entries))
    fs.create_file(proc, "modules", SeqFile(lambda caller: b""), 0o444)
    assert [name for name, _ in proc.entries()] == ["modules"]
    entries["17"] = Entry.dir(StaticProvider({"comm": Entry.file(SeqFile(lambda caller: b"x\n"))}), key=1)
    entries["self"] = Entry.link(lambda caller: str(caller.pid))
    entries["modules"] = Entry.link("hidden by the static one")
    assert [name for name, _ in proc.entries()] == ["modules", "17", "self"]
    assert fs.lookup("proc/modules") is proc.get("modules")
    node = fs.lookup("proc/17")
    assert node is not None
    assert node.made
    assert not proc.made
    assert fs.lookup("proc/17") is node  # the same incarnation keeps its inode
    assert fs.lookup("proc/17/comm") is not None
    assert fs.lookup("proc/18") is None
    entries["17"] = Entry.dir(StaticProvider({}), key=2)
    again = fs.lookup("proc/17")
    assert again is not None
    assert again is not node
    assert again.ino != node.ino
    del entries["17"]
    assert fs.lookup("proc/17") is None
    ready = fs.make_path("elsewhere/dir")
    entries["ready"] = Entry.of(ready)
    assert fs.lookup("proc/ready") is ready


def test_a_dynamic_directory_forgets_what_is_gone() -> None:
    fs = Kernfs()
    entries: dict[str, Entry] = {}
    proc = fs.create_dynamic_dir(fs.root, "proc", StaticProvider(entries))
    for i in range(1000):
        entries.clear()
        entries[str(i)] = Entry.link("x")
        proc.entries()
    assert len(proc._made or ()) < 40


def test_notify_wakes_pollers() -> None:
    fs = Kernfs()
    node = fs.create_file(fs.root, "f", attribute(), 0o444)
    woken: list[int] = []
    node.pollers = {"a": lambda: woken.append(1)}
    event = node.event
    node.wake_pollers()
    assert node.event == event
    node.pollers = {"a": lambda: woken.append(2)}
    node.notify()
    node.notify()
    assert woken == [1, 2]
    assert node.event == event + 2
