"""The log ring: records, continuation, overwriting, waiting, and the sysctl files."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from klpfs.kernel.printk import LOG_USER, PRINTKRB_RECORD_MAX, Printk


class Time:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self) -> float:
        return self.value


def texts(printk: Printk) -> list[bytes]:
    return [record.text for record in printk.records()]


def test_a_record() -> None:
    time = Time()
    printk = Printk(time)
    time.value = 12.3456789
    assert printk.emit(3, "something bad\n", caller="T7") == 0
    (record,) = printk.records()
    assert (record.seq, record.level, record.facility, record.prio) == (0, 3, 0, 3)
    assert (record.ts_usec, record.caller, record.text, record.message) == (
        12345679,
        "T7",
        b"something bad",
        "something bad",
    )
    assert record.line_count == 1


def test_sequence_numbers_go_up_by_one() -> None:
    printk = Printk(Time())
    assert [printk.emit(6, str(i)) for i in range(5)] == [0, 1, 2, 3, 4]
    assert printk.first_seq == 0
    assert printk.next_seq == 5


def test_time_never_goes_back() -> None:
    time = Time()
    printk = Printk(time)
    for time.value in (5.0, 4.0, 6.0):
        printk.emit(6, "tick")
    assert [record.ts_usec for record in printk.records()] == [5_000_000, 5_000_000, 6_000_000]


def test_logger_levels_and_prefix() -> None:
    printk = Printk(Time())
    log = printk.logger("livepatch: ")
    for function in (log.emerg, log.alert, log.crit, log.err, log.warn, log.notice, log.info, log.debug):
        function("x")
    log.log(6, "two\nlines")
    assert [record.level for record in printk.records()] == [0, 1, 2, 3, 4, 5, 6, 7, 6]
    assert texts(printk) == [b"livepatch: x"] * 8 + [b"livepatch: two\nlines"]


def test_default_level_and_facility() -> None:
    printk = Printk(Time())
    printk.emit(-1, "x", facility=LOG_USER)
    assert printk.read_valid(0).prio == 12  # type: ignore[union-attr]  # it is there


def test_the_present_task_is_the_caller() -> None:
    printk = Printk(Time(), caller=lambda: "T42")
    printk.emit(6, "mine")
    printk.emit(6, "of another", caller="C0")
    assert [record.caller for record in printk.records()] == ["T42", "C0"]


def test_text_ends_at_nul_and_may_be_any_bytes() -> None:
    printk = Printk(Time())
    printk.emit(6, b"a\xff\0hidden")
    printk.emit(6, "a\udcff")
    assert texts(printk) == [b"a\xff", b"a\xff"]
    assert next(printk.records()).message == "a\udcff"


def test_level_prefixes_of_printk() -> None:
    printk = Printk(Time())
    printk.printk("\x016info\n")
    printk.printk("plain\n")
    printk.printk("\x013\x014first wins\n")
    printk.printk("\x01dno prefix\n")
    printk.emit(2, "\x016stripped, not heeded")
    assert [(record.level, record.text) for record in printk.records()] == [
        (6, b"info"),
        (4, b"plain"),
        (3, b"first wins"),
        (4, b"\x01dno prefix"),
        (2, b"stripped, not heeded"),
    ]


def test_user_text_has_no_level_prefix() -> None:
    printk = Printk(Time())
    printk.emit(5, "\x013kept", facility=LOG_USER)
    assert texts(printk) == [b"\x013kept"]


def test_an_unfinished_line_is_not_readable() -> None:
    printk = Printk(Time())
    printk.printk("\x016begun")
    assert texts(printk) == []
    assert (printk.first_seq, printk.next_seq) == (0, 0)
    printk.printk("\x01c, ended\n")
    assert texts(printk) == [b"begun, ended"]
    assert printk.next_seq == 1


def test_the_next_record_finishes_a_line() -> None:
    printk = Printk(Time())
    printk.printk("\x016begun")
    printk.emit(6, "other")
    printk.printk("\x01ctoo late\n")
    assert texts(printk) == [b"begun", b"other", b"too late"]


def test_only_the_same_caller_continues() -> None:
    printk = Printk(Time())
    printk.printk("\x016begun", caller="T1")
    printk.printk("\x01cforeign\n", caller="T2")
    assert texts(printk) == [b"begun", b"foreign"]


def test_a_continuation_that_would_not_fit_is_a_record_of_its_own() -> None:
    printk = Printk(Time())
    printk.printk("\x016" + "a" * 1000)
    printk.printk("\x01c" + "b" * 100 + "\n")
    assert texts(printk) == [b"a" * 1000, b"b" * 100]


def test_many_continuations_grow_one_record() -> None:
    printk = Printk(Time(), size=4096)
    for _ in range(60):
        for i in range(40):
            printk.printk(f"\x01c {i:02d}" if i else "\x016x")
        printk.printk("\x01c\n")
    assert set(texts(printk)) == {b"x" + b"".join(b" %02d" % i for i in range(1, 40))}
    assert 4096 // 160 < len(texts(printk)) <= 4096 // 128


def test_long_text_is_cut() -> None:
    printk = Printk(Time())
    printk.emit(6, "x" * 5000)
    assert texts(printk) == [b"x" * (PRINTKRB_RECORD_MAX - 2)]
    printk.printk("\x016" + "y" * 5000 + "\n")  # its newline is cut off, too, so that it stays open
    assert len(texts(printk)) == 1
    printk.emit(6, "z")
    assert texts(printk)[1] == b"y" * (PRINTKRB_RECORD_MAX - 3)


def test_a_device_closes_its_record() -> None:
    printk = Printk(Time())
    printk.vprintk_emit(0, 6, b"found", subsystem="usb", device="+usb:1-1")
    (record,) = printk.records()
    assert (record.subsystem, record.device) == ("usb", "+usb:1-1")


@pytest.mark.parametrize("size", [0, 2048, 5000, -4096])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Printk(Time(), size=size)


def test_the_oldest_records_are_overwritten() -> None:
    printk = Printk(Time(), size=4096)
    for i in range(1000):
        printk.emit(6, f"record {i:04d}")
    kept = list(printk.records())
    assert [record.seq for record in kept] == list(range(1000 - len(kept), 1000))
    assert printk.first_seq == kept[0].seq
    assert len(kept) == 4096 // 32  # each takes 24 bytes: one descriptor for 32 bytes is what limits
    assert printk.read_valid(0) is kept[0]


def test_256_kib_keep_8192_short_records() -> None:
    printk = Printk(Time())
    for _ in range(9000):
        printk.emit(6, "x")
    assert len(texts(printk)) == 8192


@settings(max_examples=60)
@given(st.lists(st.integers(0, 1100), max_size=120))
def test_ring_model(lengths: list[int]) -> None:
    """What is left is the newest records, lies in one turn of the ring, and nothing was dropped without need."""
    size = 4096
    printk = Printk(Time(), size=size)
    for i, length in enumerate(lengths):
        before = list(printk.records())
        printk.emit(6, "x" * length)
        kept = list(printk.records())
        assert kept[-1].seq == i
        assert [record.seq for record in kept] == list(range(kept[0].seq, i + 1))
        assert kept[-1].end - kept[0].begin <= size
        for record in kept:
            assert record.begin // size == record.end // size or record.end % size <= 1032 + 8
        for dropped in before[: len(before) - len(kept) + 1]:
            assert kept[-1].end - dropped.begin > size or len(before) == size // 32


def run_with(printk: Printk, *texts: str) -> tuple[list[bytes], float]:
    got: list[bytes] = []

    async def reader() -> None:
        seq = 0
        for _ in texts:
            await printk.wait_new(seq)
            record = printk.read_valid(seq)
            assert record is not None
            got.append(record.text)
            seq = record.seq + 1

    async def main() -> float:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            for text in texts:
                await trio.sleep(600)
                printk.printk(text)
        return trio.current_time() - start

    took = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return got, took


def test_waiting_for_records() -> None:
    assert run_with(Printk(Time()), "\x016a\n", "\x016b\n") == ([b"a", b"b"], 1200)


def test_an_unfinished_line_wakes_nobody() -> None:
    printk = Printk(Time())

    async def main() -> None:
        printk.printk("\x016begun")
        with trio.move_on_after(10) as scope:
            await printk.wait_new(0)
        assert scope.cancelled_caught
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(printk.wait_new, 0)
                await trio.sleep(1)
                printk.printk("\x01c\n")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert texts(printk) == [b"begun"]


def test_listeners_see_each_record() -> None:
    printk = Printk(Time())
    seen: list[int] = []
    printk.listeners.append(lambda: seen.append(printk.next_seq))
    printk.emit(6, "a")
    printk.emit(6, "b")
    assert seen == [1, 2]


def test_clear_hides_and_keeps() -> None:
    printk = Printk(Time())
    printk.emit(6, "old")
    printk.clear()
    printk.emit(6, "new")
    assert printk.clear_seq == 1
    assert texts(printk) == [b"old", b"new"]
    assert [record.text for record in printk.records(printk.clear_seq)] == [b"new"]


def test_printk_devkmsg_file() -> None:
    printk = Printk(Time())
    assert printk.sysctl_printk_devkmsg_show() == b"ratelimit\n"
    for word in (b"on\n", b"off\n", b"ratelimit\n"):
        assert printk.sysctl_printk_devkmsg_store(word) == len(word)
        assert printk.sysctl_printk_devkmsg_show() == word
    for bad in (b"on", b"onx\n", b"\n", b"maybe\n", b"on\n\n", b"ratelimited\n", b""):
        with pytest.raises(OSError, match="Invalid") as caught:
            printk.sysctl_printk_devkmsg_store(bad)
        assert caught.value.errno == errno.EINVAL
    assert printk.devkmsg == "ratelimit"


def test_printk_file() -> None:
    printk = Printk(Time())
    assert printk.sysctl_printk_show() == b"7\t4\t1\t7\n"
    assert printk.sysctl_printk_store(b"4\n") == 2
    assert printk.sysctl_printk_store(b"8 5 2 6\n") == 8
    assert printk.sysctl_printk_show() == b"8\t5\t2\t6\n"
    printk.emit(-1, "x")
    assert next(printk.records()).level == 5
    with pytest.raises(OSError, match="Invalid"):
        printk.sysctl_printk_store(b"loud\n")
