"""Reading and writing open files: snapshots, pages, empty writes."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import trio
from kernfs_support import refusal

from klpfs.kernfs import Attribute, Caller, FileOps, Kernfs, OpenFile, SeqFile, StreamOps

Run = Callable[..., Any]


def counter(width: int = 1) -> Callable[[], bytes]:
    numbers = itertools.count(1)
    return lambda: b"%0*d\n" % (width, next(numbers))


def opened(ops: FileOps, flags: int = os.O_RDWR) -> OpenFile:
    fs = Kernfs()
    return fs.open_node(fs.create_file(fs.root, "f", ops, 0o644), flags, Caller(7, 1000, 1000))


def test_sequential_reads_share_a_snapshot() -> None:
    file = opened(Attribute(counter(4)))
    assert [file.read(2, offset) for offset in (0, 2, 4, 5, 5)] == [b"00", b"01", b"\n", b"", b""]
    assert file.read(100, 0) == b"0002\n"
    assert file.read(100, 5) == b""  # the end, without another show
    assert file.read(100, 0) == b"0003\n"


def test_a_read_elsewhere_shows_afresh() -> None:
    file = opened(Attribute(counter(4)))
    assert file.read(2, 0) == b"00"
    assert file.read(2, 3) == b"2\n"
    assert file.read(2, 1) == b"00"
    assert file.read(2, 3) == b"3\n"  # where the last one ended: still its snapshot
    assert file.read(2, 100) == b""
    assert file.read(9, 0) == b"0005\n"


def test_reading_nothing_shows_nothing() -> None:
    file = opened(Attribute(counter()))
    assert file.read(0, 0) == b""
    assert file.read(5, 0) == b"1\n"


def test_what_was_buffered_survives_a_removal(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        node = fs.create_file(fs.root, "f", Attribute(lambda: b"12\n"), 0o444)
        file = fs.open("f")
        assert file.read(1, 0) == b"1"
        await fs.remove(node)
        assert file.read(10, 1) == b"2\n"
        for offset in (3, 0, 1):
            with refusal(errno.ENODEV):
                file.read(10, offset)

    run(main)


def test_a_failing_show_leaves_no_snapshot() -> None:
    answers = iter([OSError(errno.EBUSY, "busy"), b"ok\n"])

    def show() -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    file = opened(Attribute(show))
    with pytest.raises(OSError, match="busy"):
        file.read(10, 0)
    assert file.node.active_refs == 0
    assert file.read(10, 0) == b"ok\n"


@pytest.mark.parametrize(("length", "seen"), [(4094, 4094), (4095, 4095), (4096, 4095), (10000, 4095)])
def test_an_attribute_shows_one_page(length: int, seen: int) -> None:
    assert len(opened(Attribute(lambda: b"x" * length)).read(1 << 17, 0)) == seen


def test_a_seq_file_shows_any_length(run: Run) -> None:
    text = bytes(range(256)) * 1000

    async def show(caller: Caller) -> bytes:
        await trio.sleep(1)
        return text

    async def main() -> None:
        for ops in (SeqFile(lambda caller: text), SeqFile(show)):
            assert ops.is_async == (ops._show is show)
            file = opened(ops)
            parts = [await file.aread(100_000, offset) for offset in (0, 100_000, 200_000, 256_000)]
            assert [len(part) for part in parts] == [100_000, 100_000, 56_000, 0]
            assert b"".join(parts) == text
            assert await file.aread(3, 1000) == text[1000:1003]

    run(main)


def test_who_asks_is_who_opened(run: Run) -> None:
    async def main() -> None:
        async def store(data: bytes, caller: Caller) -> int:
            assert caller == (7, 1000, 1000)
            return len(data)

        file = opened(SeqFile(lambda caller: b"%d %d %d\n" % caller, store))
        assert file.read(100, 0) == b"7 1000 1000\n"
        assert await file.write(b"x") == 1

    run(main)


def test_writes(run: Run) -> None:
    async def main() -> None:
        got: list[bytes] = []

        async def store(data: bytes) -> int:
            got.append(data)
            if data == b"bad":
                raise OSError(errno.EINVAL, "no")
            return 3 if data == b"partial" else len(data)

        file = opened(Attribute(None, store))
        assert await file.write(b"") == 0
        assert got == []
        assert await file.write(b"0\n", 4096) == 2
        assert await file.write(b"partial") == 3
        assert await file.write(b"y" * 5000) == 4096
        assert [len(data) for data in got] == [2, 7, 4096]
        with pytest.raises(OSError, match="no"):
            await file.write(b"bad")
        assert file.node.active_refs == 0

    run(main)


def test_writes_of_one_open_file_take_turns(run: Run) -> None:
    async def main() -> None:
        inside: list[int] = []

        async def store(data: bytes) -> int:
            inside.append(1)
            assert len(inside) == 1
            await trio.sleep(1)
            inside.pop()
            return len(data)

        file = opened(Attribute(lambda: b"r\n", store))
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.write, b"a")
            nursery.start_soon(file.write, b"b")
            await trio.testing.wait_all_tasks_blocked()
            assert file.read(10, 0) == b"r\n"  # reads go on meanwhile
        assert trio.current_time() - start == pytest.approx(2)

    run(main)


def test_files_without_show_or_store(run: Run) -> None:
    async def main() -> None:
        for ops, read_errno, write_errno in (
            (Attribute(), errno.EINVAL, errno.EINVAL),
            (SeqFile(), errno.EINVAL, errno.EIO),
            (SeqFile(read_errno=errno.EIO, write_errno=errno.EPERM), errno.EIO, errno.EPERM),
        ):
            file = opened(ops)
            with refusal(read_errno):
                file.read(1, 0)
            with refusal(write_errno):
                await file.write(b"x")

    run(main)


def test_hooks(run: Run) -> None:
    class Ops(SeqFile):
        def __init__(self) -> None:
            super().__init__(lambda caller: b"x")
            self.released = 0

        def open(self, file: OpenFile) -> None:
            if file.flags & os.O_ACCMODE == os.O_WRONLY:
                raise OSError(errno.EPERM, "read only")
            file.private = "mine"

        def release(self, file: OpenFile) -> None:
            self.released += 1

    ops = Ops()
    file = opened(ops, os.O_RDONLY)
    assert file.private == "mine"
    file.release()
    file.release()
    assert (ops.released, file.released) == (1, True)
    with pytest.raises(OSError, match="read only"):
        opened(ops, os.O_WRONLY)


def test_streams_do_not_hold_up_a_removal(run: Run) -> None:
    class Stream(StreamOps):
        async def read(self, file: OpenFile, size: int, offset: int) -> bytes:
            await trio.sleep(1000)
            return b"late"

        async def write(self, file: OpenFile, data: bytes, offset: int) -> int:
            return offset

    async def main() -> None:
        fs = Kernfs()
        node = fs.create_file(fs.root, "s", Stream(), 0o644)
        file = fs.open("s")
        assert not file.nonblock
        assert await file.write(b"x", 42) == 42
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.aread, 10, 0)
            await trio.testing.wait_all_tasks_blocked()
            start = trio.current_time()
            await fs.remove(node)
            assert trio.current_time() == start
            nursery.cancel_scope.cancel()
        for attempt in (file.aread(1, 0), file.write(b"x")):
            with refusal(errno.ENODEV):
                await attempt

    run(main)


def test_poll_masks(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        node = fs.create_file(fs.root, "f", Attribute(lambda: b"x"), 0o444)
        file = fs.open("f")
        ready, changed = 0x145, 0x145 | 0x2 | 0x8
        assert file.poll() == changed  # never read
        file.read(10, 0)
        assert file.poll() == ready
        node.notify()
        assert file.poll() == changed
        file.read(10, 0)
        assert file.poll() == ready
        await fs.remove(node)
        assert file.poll() == changed

    run(main)


def test_read_and_write_by_path(run: Run) -> None:
    async def main() -> None:
        fs = Kernfs()
        got: list[bytes] = []

        async def store(data: bytes) -> int:
            got.append(data)
            return len(data)

        fs.create_file(fs.make_path("a"), "f", Attribute(lambda: b"v\n", store), 0o644)
        assert await fs.read_file("a/f") == b"v\n"
        assert await fs.write_file("a/f", b"w") == 1
        assert got == [b"w"]
        with pytest.raises(FileNotFoundError):
            await fs.read_file("a/g")
        with pytest.raises(IsADirectoryError):
            await fs.read_file("a")

    run(main)
