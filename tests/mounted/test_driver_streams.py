"""Stream files, blocking operations and interrupts, on both drivers."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from driver_support import Server, bash, refused

from klpfs.drivers.common import signal_pending
from klpfs.kernfs import STREAM_SEEK_DATA, STREAM_SIZE

RO, WO, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR

READER = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.write(1, b'.'); os.write(1, os.read(fd, 100))"


def reader(toy: Server, code: str = READER) -> subprocess.Popen[bytes]:
    """A process that has opened the stream and is about to block in a read."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", code, str(toy.path / "stream")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"."
    return process


def end(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def asleep_in_read(toy: Server, readers: int = 1) -> None:
    """Return once that many reads have come to the server."""
    deadline = time.monotonic() + 20
    seen = 0
    while seen < readers:
        seen += len(toy.call("offsets"))
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_records_one_a_read(toy: Server) -> None:
    fd = os.open(toy.path / "stream", RO | os.O_NONBLOCK)
    with refused(errno.EAGAIN):
        os.read(fd, 100)
    for text in ("one", "two", "three"):
        toy.call("log", text)
    assert [os.read(fd, 100), os.read(fd, 100)] == [b"0;one\n", b"1;two\n"]
    with refused(errno.EINVAL):
        os.read(fd, 3)
    assert os.read(fd, 100) == b"2;three\n"
    with refused(errno.EAGAIN):
        os.read(fd, 100)
    assert bash(f"echo four > {toy.path}/stream; printf 'five' >> {toy.path}/stream") == (0, "")
    assert [os.read(fd, 100), os.read(fd, 100)] == [b"3;four\n", b"4;five\n"]
    os.close(fd)
    assert bash(f"dd if={toy.path}/stream bs=8192 iflag=nonblock 2>&1 | head -n 2") == (0, "0;one\n1;two\n")


def test_seeks_arrive_as_offsets(toy: Server) -> None:
    for text in ("one", "two"):
        toy.call("log", text)
    fd = os.open(toy.path / "stream", RO | os.O_NONBLOCK)
    assert os.read(fd, 100) == b"0;one\n"
    assert os.lseek(fd, 0, os.SEEK_SET) == 0
    assert os.read(fd, 100) == b"0;one\n"
    assert os.lseek(fd, 0, os.SEEK_END) == STREAM_SIZE
    with refused(errno.EAGAIN):
        os.read(fd, 100)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0  # not told from SEEK_SET by either library
    os.lseek(fd, STREAM_SEEK_DATA, os.SEEK_SET)  # what a supervisor that sees the call does instead
    os.read(fd, 100)
    assert toy.call("offsets") == [0, 0, STREAM_SIZE, STREAM_SEEK_DATA]
    os.close(fd)


def test_a_blocked_reader_blocks_nobody(toy: Server) -> None:
    readers = [reader(toy) for _ in range(12)]
    asleep_in_read(toy, 12)
    for _ in range(50):
        assert (toy.path / "attrs/enabled").read_bytes() == b"1\n"
        assert "attrs" in os.listdir(toy.path)
    assert (toy.path / "seq/slow").stat().st_size == 0
    assert bash(f"echo 0 > {toy.path}/attrs/enabled; cat {toy.path}/attrs/enabled") == (0, "0\n")
    toy.call("log", "at last")
    assert [end(process) for process in readers] == [(0, b"0;at last\n", b"")] * 12


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_blocked_reader_can_be_killed(toy: Server, number: signal.Signals) -> None:
    process = reader(toy)
    asleep_in_read(toy)
    start = time.monotonic()
    process.send_signal(number)
    status, out, _ = end(process)
    assert status in (-number, 130, 1)  # Python turns SIGINT into an exception
    assert out == b""
    assert time.monotonic() - start < 10


def test_a_handled_signal_interrupts_a_read(toy: Server) -> None:
    process = reader(
        toy,
        """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *args: None)
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(sys.argv[1], os.O_RDONLY)
os.write(1, b'.')
buffer = ctypes.create_string_buffer(100)
print(libc.read(fd, buffer, 100), os.strerror(ctypes.get_errno()))
""",
    )
    asleep_in_read(toy)
    process.send_signal(signal.SIGUSR1)
    assert end(process) == (0, b"-1 Interrupted system call\n", b"")


def test_a_thread_of_several_can_be_interrupted(toy: Server) -> None:
    process = reader(
        toy,
        """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
thread = threading.Thread(target=os.read, args=(fd, 100))
thread.start()
os.write(1, b'.')
thread.join()
""",
    )
    asleep_in_read(toy)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL


def test_ignored_and_blocked_signals_do_not_interrupt(toy: Server) -> None:
    process = reader(
        toy,
        """
import os, signal, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
fd = os.open(sys.argv[1], os.O_RDONLY)
os.write(1, b'.')
os.write(1, os.read(fd, 100))
""",
    )
    asleep_in_read(toy)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.4)  # several looks at the signals
    assert process.poll() is None
    toy.call("log", "x")
    assert end(process) == (0, b"0;x\n", b"")


def test_pending_signals_are_read_from_status() -> None:
    text = "Name:\tx\nSigQ:\t0/1\nSigPnd:\t{}\nShdPnd:\t{}\nSigBlk:\t{}\nSigIgn:\t0000000000001000\n"
    none, usr1 = "0" * 16, "0000000000000200"
    assert not signal_pending(text.format(none, none, none))
    assert signal_pending(text.format(usr1, none, none))
    assert signal_pending(text.format(none, usr1, none))
    assert not signal_pending(text.format(none, usr1, usr1))
    assert not signal_pending("")


def test_stream_poll(toy: Server) -> None:
    fd = os.open(toy.path / "stream", RO | os.O_NONBLOCK)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(50) == []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poller.poll, 20_000)
        toy.call("log", "wake up")
        assert waiting.result(30) == [(fd, select.POLLIN)]
    assert os.read(fd, 100) == b"0;wake up\n"
    assert poller.poll(50) == []
    os.close(fd)


def test_a_stalled_store_stops_nothing_else(toy: Server) -> None:
    done: list[int] = []

    def write() -> None:
        fd = os.open(toy.path / "attrs/stall", WO)
        done.append(os.write(fd, b"now"))
        os.close(fd)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 20
    while not toy.call("stores"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(50):
        assert (toy.path / "attrs/stall").read_bytes() == b"s\n"  # the very file
        assert (toy.path / "attrs/enabled").read_bytes() == b"1\n"
        os.stat(toy.path / "attrs/stall")
    assert bash(f"echo 0 > {toy.path}/attrs/enabled; ls {toy.path}/attrs | wc -l; cat {toy.path}/seq/slow | wc -l") == (
        0,
        "9\n1000\n",
    )
    assert done == []
    while any(writer.is_alive() for writer in writers):
        toy.call("go")
        time.sleep(0.01)
    assert done == [3, 3, 3]


def test_a_removal_waits_for_a_store_and_readers_go_on(toy: Server) -> None:
    writer = threading.Thread(target=lambda: bash(f"echo x > {toy.path}/attrs/stall"))
    writer.start()
    deadline = time.monotonic() + 20
    while not toy.call("stores"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(os.listdir(toy.path / "attrs/vmlinux")) == 2
    fd = os.open(toy.path / "attrs/enabled", RO)
    toy.call("rm_soon", "attrs")
    toy.call("storm", 1, 1)  # another directory's removal is not held up
    assert not toy.call("is_removed", "attrs")
    with refused(errno.ENODEV):
        os.read(fd, 10)
    with refused(errno.ENODEV, errno.ENOENT):
        os.open(toy.path / "attrs/transition", RO)
    assert (toy.path / "seq/rw").read_bytes() == b"rw\n"
    assert writer.is_alive()
    toy.call("go")
    toy.call("rm_wait", "attrs")
    writer.join(20)
    assert not writer.is_alive()
    assert not (toy.path / "attrs").exists()
    os.close(fd)
