"""/dev/kmsg, syslog(2), and the lines of dmesg."""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from klpfs.kernel import kmsg as km
from klpfs.kernel.kmsg import KmsgReader, Syslog, record_print_text, render_dmesg, render_record
from klpfs.kernel.printk import Printk
from klpfs.kernfs import STREAM_SEEK_DATA, STREAM_SIZE

BIG = 8192


def make(*texts: str, size: int = 1 << 18, print_caller: bool = False, print_time: bool = True) -> Printk:
    printk = Printk(lambda: 1.5, size=size, print_caller=print_caller, print_time=print_time)
    for text in texts:
        printk.emit(6, text)
    return printk


def code_of(function: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r"\w") as caught:
        function()
    assert caught.value.errno is not None
    return caught.value.errno


def read_all(reader: KmsgReader) -> list[bytes]:
    out: list[bytes] = []
    while True:
        try:
            out.append(reader.read_nowait(BIG))
        except BlockingIOError:
            return out


def virtual(function: Callable[[], Awaitable[None]]) -> None:
    trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))


# records as read(2) gives them


def test_format_of_a_record() -> None:
    printk = make("first", "second")
    assert read_all(KmsgReader(printk)) == [b"6,0,1500000,-;first\n", b"6,1,1500000,-;second\n"]


def test_format_with_caller() -> None:
    printk = make(print_caller=True)
    printk.emit(6, "x", caller="T12")
    assert read_all(KmsgReader(printk)) == [b"6,0,1500000,-,caller=T12;x\n"]


def test_escapes() -> None:
    printk = make()
    printk.emit(6, b"\ttab back\\slash two\nlines \x7f caf\xc3\xa9 ~")
    (data,) = read_all(KmsgReader(printk))
    assert data == b"6,0,1500000,-;\\x09tab back\\x5cslash two\\x0alines \\x7f caf\\xc3\\xa9 ~\n"


def test_dictionary() -> None:
    printk = make()
    printk.emit(6, "found", subsystem="usb", device="+usb:1-1\\")
    printk.emit(6, "half", device="n8")
    assert read_all(KmsgReader(printk)) == [
        b"6,0,1500000,-;found\n SUBSYSTEM=usb\n DEVICE=+usb:1-1\\x5c\n",
        b"6,1,1500000,-;half\n DEVICE=n8\n",
    ]


def test_continuation_that_became_a_record_is_flagged() -> None:
    printk = make()
    printk.printk("\x016one\n")
    printk.printk("\x01ctwo\n")
    assert read_all(KmsgReader(printk)) == [b"6,0,1500000,-;one\n", b"4,1,1500000,c;two\n"]


def test_a_record_never_exceeds_the_kernels_buffer() -> None:
    printk = make()
    printk.emit(6, b"\x01" * 1000)
    (data,) = read_all(KmsgReader(printk))
    # the last escape is cut by one byte, since each is terminated, and the newline takes the last place of all
    header = b"6,0,1500000,-;"
    body = (b"\\x01" * 1000)[: 2047 - len(header)]
    assert data == header + body + b"\n"
    assert len(data) == 2048


@given(st.binary(max_size=400).filter(lambda text: b"\0" not in text and not text.endswith(b"\n")))
def test_escaping_round_trip(text: bytes) -> None:
    printk = make()
    KmsgReader(printk).write(b"<11>" + text + b"\n")
    (data,) = read_all(KmsgReader(printk))
    head, _, body = data.partition(b";")
    assert head == b"11,0,1500000,-"
    assert re.fullmatch(rb"[ -~]*\n", body)
    assert re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), body[:-1]) == text


# reading


def test_small_buffer_skips_the_record() -> None:
    reader = KmsgReader(make("first", "second"))
    assert code_of(lambda: reader.read_nowait(4)) == errno.EINVAL
    assert reader.read_nowait(21) == b"6,1,1500000,-;second\n"


def test_exact_buffer_fits() -> None:
    assert KmsgReader(make("first")).read_nowait(20) == b"6,0,1500000,-;first\n"
    assert code_of(lambda: KmsgReader(make("first")).read_nowait(19)) == errno.EINVAL


def test_end_of_the_log() -> None:
    reader = KmsgReader(make())
    assert code_of(lambda: reader.read_nowait(BIG)) == errno.EAGAIN


def test_readers_do_not_disturb_each_other() -> None:
    printk = make("a")
    one, two = KmsgReader(printk), KmsgReader(printk)
    assert one.read_nowait(BIG) == two.read_nowait(BIG)


def test_overrun() -> None:
    printk = make(*map(str, range(200)), size=4096)
    reader = KmsgReader(printk)
    first = reader.read_nowait(BIG)
    for i in range(200, 1000):
        printk.emit(6, str(i))
    assert reader.poll() == select.POLLIN | select.POLLRDNORM | select.POLLERR | select.POLLPRI
    assert code_of(lambda: reader.read_nowait(BIG)) == errno.EPIPE
    assert reader.poll() == select.POLLIN | select.POLLRDNORM
    rest = read_all(reader)
    assert first.endswith(b";72\n")
    assert rest[0].endswith(b";872\n")
    assert rest[-1].endswith(b";999\n")


def test_seek() -> None:
    printk = make("old")
    printk.clear()
    printk.emit(6, "new")
    reader = KmsgReader(printk)
    assert len(read_all(reader)) == 2
    assert reader.seek(0, os.SEEK_SET) == 0
    assert len(read_all(reader)) == 2
    assert reader.seek(0, os.SEEK_DATA) == 0
    assert read_all(reader) == [b"6,1,1500000,-;new\n"]
    reader.seek(0, os.SEEK_SET)
    assert reader.seek(0, os.SEEK_END) == 0
    assert read_all(reader) == []
    printk.emit(6, "newest")
    assert read_all(reader) == [b"6,2,1500000,-;newest\n"]


@pytest.mark.parametrize("whence", [os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE])
def test_seek_elsewhere(whence: int) -> None:
    reader = KmsgReader(make("a"))
    assert code_of(lambda: reader.seek(1, whence)) == errno.ESPIPE
    assert code_of(lambda: reader.seek(-1, whence)) == errno.ESPIPE


@pytest.mark.parametrize("whence", [os.SEEK_CUR, os.SEEK_HOLE, 77])
def test_seek_by_other_means(whence: int) -> None:
    assert code_of(lambda: KmsgReader(make("a")).seek(0, whence)) == errno.EINVAL


def test_seek_to_data_that_was_overwritten() -> None:
    printk = make(size=4096)
    printk.clear()
    for i in range(1000):
        printk.emit(6, str(i))
    reader = KmsgReader(printk)
    reader.seek(0, os.SEEK_DATA)
    assert code_of(lambda: reader.read_nowait(BIG)) == errno.EPIPE
    assert reader.read_nowait(BIG).endswith(b";872\n")


def test_reading_at_offsets() -> None:
    async def main() -> None:
        printk = make("old")
        printk.clear()
        printk.emit(6, "new")
        reader = KmsgReader(printk)
        pos = 0

        async def read(offset: int | None = None) -> str:
            nonlocal pos
            if offset is not None:
                pos = offset
            data = await reader.read_at(BIG, pos, nonblock=True)
            pos += len(data)
            return data.decode().partition(";")[2].rstrip()

        assert [await read(), await read()] == ["old", "new"]
        assert await read(0) == "old"  # SEEK_SET
        assert await read(km.OFFSET_DATA) == "new"
        with pytest.raises(BlockingIOError):
            await read()
        printk.emit(6, "third")
        assert await read(km.OFFSET_DATA) == "new"
        assert await read(pos - 5) == "third"  # other offsets mean nothing
        printk.emit(6, "fourth")
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                await read(km.OFFSET_END)
        printk.emit(6, "fifth")
        assert await read() == "fifth"
        printk.emit(6, "sixth")
        assert await read(pos - 3) == "sixth"  # what the shell does when it has read more than a line
        assert await read(0) == "old"

    virtual(main)


def test_offsets_are_those_of_the_file_system() -> None:
    assert (STREAM_SIZE, STREAM_SEEK_DATA) == (km.OFFSET_END, km.OFFSET_DATA)


def test_poll() -> None:
    printk = make()
    reader = KmsgReader(printk)
    assert reader.poll() == 0
    printk.printk("\x016begun")
    assert reader.poll() == 0
    printk.printk("\x01c\n")
    assert reader.poll() == select.POLLIN | select.POLLRDNORM
    reader.read_nowait(BIG)
    assert reader.poll() == 0


def test_blocking_read() -> None:
    async def main() -> None:
        printk = make()
        reader = KmsgReader(printk)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await reader.read(BIG))

        with trio.move_on_after(3600) as scope:
            await reader.read(BIG)
        assert scope.cancelled_caught  # and nothing is lost by that
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
            await trio.sleep(3600)
            printk.emit(6, "a")
            await trio.sleep(3600)
            assert got == [b"6,0,1500000,-;a\n"]  # one record for one of the two
            printk.emit(6, "b")
        assert got == [b"6,0,1500000,-;a\n", b"6,1,1500000,-;b\n"]
        with pytest.raises(BlockingIOError):
            await reader.read(BIG, nonblock=True)

    virtual(main)


def test_permission_to_open() -> None:
    printk = make()
    assert code_of(lambda: KmsgReader(printk, privileged=False)) == errno.EPERM
    KmsgReader(printk, privileged=False, readable=False)
    printk.dmesg_restrict = False
    KmsgReader(printk, privileged=False)
    printk.sysctl_printk_devkmsg_store(b"off\n")
    assert code_of(lambda: KmsgReader(printk)) == errno.EPERM


# writing


@pytest.mark.parametrize(
    ("written", "prio", "text"),
    [
        (b"plain\n", 12, b"plain"),
        (b"<3>error level\n", 11, b"error level"),
        (b"<11>user facility\n", 11, b"user facility"),
        (b"<30>daemon\n", 30, b"daemon"),
        (b"<99999>odd prefix\n", 1695, b"odd prefix"),
        (b"<4294967299>wraps\n", 11, b"wraps"),
        (b"<2048>facility 256 is 0\n", 8, b"facility 256 is 0"),
        (b"<>empty\n", 8, b"empty"),
        (b"<x>no prefix\n", 12, b"<x>no prefix"),
        (b"<3 >no prefix\n", 12, b"<3 >no prefix"),
        (b"<0x3>no prefix\n", 12, b"<0x3>no prefix"),
        (b"<-3>no prefix\n", 12, b"<-3>no prefix"),
        (b"<3", 12, b"<3"),
        (b"<3><4>twice\n", 11, b"<4>twice"),
        (b"\tindented\x01\n", 12, b"\tindented\x01"),
        (b"two\nlines\n", 12, b"two\nlines"),
        (b"\n\n", 12, b"\n"),
        (b"\n", 12, b""),
        (b"", 12, b""),
        (b"cut\0here\n", 12, b"cut"),
        (b"<3\0>nul\n", 12, b"<3"),
        (b"\x013not the kernel's\n", 12, b"\x013not the kernel's"),
        (b"x" * 1023 + b"\n", 12, b"x" * 1023),
        (b"x" * 1024, 12, b"x" * 1023),
    ],
)
def test_write(written: bytes, prio: int, text: bytes) -> None:
    printk = make()
    assert KmsgReader(printk).write(written, caller="T9") == len(written)
    printk.emit(6, "next")
    record = printk.read_valid(0)
    assert record is not None
    assert (record.prio, record.text, record.caller) == (prio, text, "T9")


def test_write_without_newline_shows_with_the_next_record() -> None:
    printk = make()
    reader = KmsgReader(printk)
    reader.write(b"no newline")
    assert code_of(lambda: reader.read_nowait(BIG)) == errno.EAGAIN
    reader.write(b"more\n")
    assert read_all(reader) == [b"12,0,1500000,-;no newline\n", b"12,1,1500000,-;more\n"]


def test_write_too_much() -> None:
    printk = make()
    assert code_of(lambda: km.devkmsg_write(printk, b"a" * 1025)) == errno.EINVAL
    assert code_of(lambda: km.devkmsg_write(printk, b"a" * 2000)) == errno.EINVAL
    assert printk.next_seq == 0


def test_write_while_off() -> None:
    printk = make()
    reader = KmsgReader(printk)
    printk.sysctl_printk_devkmsg_store(b"off\n")
    assert reader.write(b"ignored\n") == 8
    assert code_of(lambda: reader.write(b"a" * 1025)) == errno.EINVAL
    assert read_all(reader) == []


# syslog(2)


def nowait(syslog: Syslog, action: int, length: int = 0, **options: bool) -> int | bytes:
    return syslog.syslog_nowait(action, length, **options)


def test_syslog_read_all() -> None:
    syslog = Syslog(make("first", "two\nlines"))
    assert nowait(syslog, km.SYSLOG_ACTION_READ_ALL, BIG) == (
        b"<6>[    1.500000] first\n<6>[    1.500000] two\n<6>[    1.500000] lines\n"
    )


def test_syslog_read_all_gives_the_newest_that_fit() -> None:
    syslog = Syslog(make("aaaa", "bbbb", "cccc"))
    line = len(b"<6>[    1.500000] aaaa\n")
    assert (
        nowait(syslog, km.SYSLOG_ACTION_READ_ALL, 2 * line + 5) == b"<6>[    1.500000] bbbb\n<6>[    1.500000] cccc\n"
    )
    assert nowait(syslog, km.SYSLOG_ACTION_READ_ALL, line - 1) == b""


def test_syslog_clear() -> None:
    printk = make("old")
    syslog = Syslog(printk)
    assert nowait(syslog, km.SYSLOG_ACTION_READ_CLEAR, BIG) == b"<6>[    1.500000] old\n"
    assert nowait(syslog, km.SYSLOG_ACTION_READ_ALL, BIG) == b""
    printk.emit(6, "new")
    assert nowait(syslog, km.SYSLOG_ACTION_READ_ALL, BIG) == b"<6>[    1.500000] new\n"
    assert nowait(syslog, km.SYSLOG_ACTION_CLEAR) == 0
    assert nowait(syslog, km.SYSLOG_ACTION_READ_ALL, BIG) == b""
    assert len(read_all(KmsgReader(printk))) == 2  # /dev/kmsg keeps them
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == 44  # and so does SYSLOG_ACTION_READ


def test_syslog_read_consumes() -> None:
    syslog = Syslog(make("first", "second", "third"))
    assert nowait(syslog, km.SYSLOG_ACTION_READ, 60) == b"<6>[    1.500000] first\n<6>[    1.500000] second\n"
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == 24
    assert nowait(syslog, km.SYSLOG_ACTION_READ, 10) == b"<6>[    1."
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == 14
    assert nowait(syslog, km.SYSLOG_ACTION_READ, 60) == b"500000] third\n"
    assert nowait(syslog, km.SYSLOG_ACTION_READ, 60) == b""
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == 0


def test_syslog_read_blocks() -> None:
    async def main() -> None:
        printk = make()
        syslog = Syslog(printk)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def reader() -> None:
                assert await syslog.syslog(km.SYSLOG_ACTION_READ, 100) == b"<6>[    1.500000] late\n"

            await trio.sleep(86400)
            printk.emit(6, "late")
        with pytest.raises(OSError, match="permitted"):
            await syslog.syslog(km.SYSLOG_ACTION_READ, 100, privileged=False)
        assert await syslog.syslog(km.SYSLOG_ACTION_READ, 0) == b""

    virtual(main)


def test_syslog_read_after_overrun() -> None:
    printk = make(size=4096)
    syslog = Syslog(printk)
    printk.emit(6, "first")
    nowait(syslog, km.SYSLOG_ACTION_READ, 5)
    for i in range(1000):
        printk.emit(6, f"{i:03d}")
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == 128 * 22
    assert nowait(syslog, km.SYSLOG_ACTION_READ, 22) == b"<6>[    1.500000] 872\n"


@given(st.lists(st.text("ab\n", max_size=60), max_size=12), st.lists(st.integers(1, 80), min_size=1, max_size=8))
def test_syslog_reads_of_any_size_give_the_whole(texts: list[str], sizes: list[int]) -> None:
    printk = make(*texts)
    syslog = Syslog(printk)
    whole = nowait(syslog, km.SYSLOG_ACTION_READ_ALL, 1 << 20)
    assert isinstance(whole, bytes)
    got = b""
    for i in range(len(whole) + 1):
        assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == len(whole) - len(got)
        size = sizes[i % len(sizes)]
        piece = nowait(syslog, km.SYSLOG_ACTION_READ, size)
        assert isinstance(piece, bytes)
        assert len(piece) <= size
        got += piece
        if not piece:
            break
    assert got == whole


def test_syslog_console_levels() -> None:
    printk = make()
    syslog = Syslog(printk)
    assert nowait(syslog, km.SYSLOG_ACTION_CONSOLE_OFF) == 0
    assert nowait(syslog, km.SYSLOG_ACTION_CONSOLE_OFF) == 0
    assert printk.console_loglevel == 1
    assert nowait(syslog, km.SYSLOG_ACTION_CONSOLE_ON) == 0
    assert printk.console_loglevel == 7
    assert nowait(syslog, km.SYSLOG_ACTION_CONSOLE_ON) == 0
    assert nowait(syslog, km.SYSLOG_ACTION_CONSOLE_LEVEL, 4) == 0
    assert printk.console_loglevel == 4
    nowait(syslog, km.SYSLOG_ACTION_CONSOLE_OFF)
    nowait(syslog, km.SYSLOG_ACTION_CONSOLE_LEVEL, 8)
    nowait(syslog, km.SYSLOG_ACTION_CONSOLE_ON)
    assert printk.console_loglevel == 8
    printk.minimum_console_loglevel = 3
    nowait(syslog, km.SYSLOG_ACTION_CONSOLE_LEVEL, 1)
    assert printk.console_loglevel == 3


def test_syslog_sizes_and_nothing() -> None:
    syslog = Syslog(make(size=1 << 16))
    assert nowait(syslog, km.SYSLOG_ACTION_CLOSE) == 0
    assert nowait(syslog, km.SYSLOG_ACTION_OPEN) == 0
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_BUFFER) == 1 << 16
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_UNREAD) == 0


def test_syslog_errors() -> None:
    syslog = Syslog(make("a"))
    for action in (2, 3, 4):
        assert code_of(lambda action=action: nowait(syslog, action, -1)) == errno.EINVAL  # type: ignore[misc]
        assert code_of(lambda action=action: nowait(syslog, action, 10, buffer=False)) == errno.EINVAL  # type: ignore[misc]
        assert nowait(syslog, action, 0) == b""
    for level in (-1, 0, 9):
        assert code_of(lambda level=level: nowait(syslog, 8, level)) == errno.EINVAL  # type: ignore[misc]
    for action in (-1, 11, 100):
        assert code_of(lambda action=action: nowait(syslog, action)) == errno.EINVAL  # type: ignore[misc]


def test_syslog_permissions() -> None:
    printk = make("a")
    syslog = Syslog(printk)
    for action in range(11):
        assert code_of(lambda action=action: nowait(syslog, action, 4, privileged=False)) == errno.EPERM  # type: ignore[misc]
    printk.dmesg_restrict = False
    assert nowait(syslog, km.SYSLOG_ACTION_READ_ALL, BIG, privileged=False) == b"<6>[    1.500000] a\n"
    assert nowait(syslog, km.SYSLOG_ACTION_SIZE_BUFFER, privileged=False) == printk.size
    for action in (0, 1, 2, 4, 5, 6, 7, 8, 9, 11):
        assert code_of(lambda action=action: nowait(syslog, action, 4, privileged=False)) == errno.EPERM  # type: ignore[misc]


def test_syslog_without_time_and_with_caller() -> None:
    assert nowait(Syslog(make("a\nb", print_time=False)), 3, BIG) == b"<6>a\n<6>b\n"
    printk = make(print_caller=True)
    printk.emit(6, "a", caller="T1")
    assert nowait(Syslog(printk), 3, BIG) == b"<6>[    1.500000][    T1] a\n"
    printk.print_time = False
    assert nowait(Syslog(printk), 3, BIG) == b"<6>[    T1] a\n"


# text


def one(text: bytes, level: int = 6, facility: int = 0) -> str:
    printk = Printk(lambda: 12345.000001)
    printk.emit(level, text, facility=facility)
    return render_record(next(printk.records()))


def test_rendered_lines_are_cut_to_the_buffer() -> None:
    printk = make()
    printk.emit(6, "x\n" * 400 + "end")
    record = next(printk.records())
    whole = record_print_text(record, size=1 << 20)
    assert whole.count(b"\n") == 401
    # whole lines only, as many as fit with a terminator
    assert record_print_text(record) == b"<6>[    1.500000] x\n" * (2047 // 20)
    assert record_print_text(record, size=30) == b"<6>[    1.500000] x\n"
    assert record_print_text(record, size=20) == b""
    printk.emit(6, "y" * 1000)
    record = list(printk.records())[1]
    assert record_print_text(record, size=100) == b""


def test_dmesg_line() -> None:
    assert one(b"hello") == "[12345.000001] hello"


def test_dmesg_several_lines_are_indented() -> None:
    printk = make("two\nlines", "end\n")
    two = next(printk.records())
    assert render_record(two) == "[    1.500000] two\n               lines"
    assert render_record(two, style="notime") == "two\nlines"
    assert render_record(two, decode=True) == "kern  :info  : [    1.500000] two\n" + " " * 30 + "lines"
    assert render_record(two, style="raw") == "<6>[    1.500000] two\n<6>[    1.500000] lines"


def test_dmesg_newline_at_the_end_is_not_indented() -> None:
    assert one(b"twice\n\n") == "[12345.000001] twice\n"
    assert one(b"\n") == ""


def test_dmesg_escapes_what_a_terminal_must_not_see() -> None:
    assert one(b"\ttab\x01 \x1b[31m \xff caf\xc3\xa9 \xc2\xa0 \x7f back\\") == (
        "[12345.000001] \ttab\\x01 \\x1b[31m \\xff caf\u00e9 \u00a0 \\x7f back\\"
    )


def test_dmesg_decodes_known_facilities() -> None:
    printk = make()
    for prefix in (b"<3>", b"<30>", b"<89>", b"<99999>"):
        km.devkmsg_write(printk, prefix + b"x\n")
    assert list(render_dmesg(printk.records(), style="notime", decode=True)) == [
        "user  :err   : x",
        "daemon:info  : x",
        "ftp   :alert : x",
        "x",
    ]


def test_dmesg_filters() -> None:
    printk = make("kernel")
    km.devkmsg_write(printk, b"<3>user\n")
    assert list(render_dmesg(printk.records(), style="notime", levels={3})) == ["user"]
    assert list(render_dmesg(printk.records(), style="notime", facilities={0})) == ["kernel"]
    assert list(render_dmesg(printk.records(), style="raw", levels={6}, facilities={1})) == []
    assert list(render_dmesg(printk.records(), style="raw")) == ["<6>[    1.500000] kernel", "<11>[    1.500000] user"]
