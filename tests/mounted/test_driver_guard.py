"""Code of the tree that raises what it should not: the caller gets EIO, the log the traceback, the mount lives on."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver_support import Server, bash, refused, serving

RO, WO = os.O_RDONLY, os.O_WRONLY


@pytest.fixture
def broken(driver: str, tmp_path: Path) -> Iterator[Server]:
    """The tree of ``driver_broken.py``; the server must end well, whatever was called."""
    with serving(driver, tmp_path / "mnt", script=Path(__file__).parent / "driver_broken.py") as server:
        yield server
        assert server.process.poll() is None, server.log()
        assert server.stop() == 0, server.log()


def lives_on(server: Server) -> None:
    """Plain reads, stores, listings, removals and whatever needs the trio thread still work."""
    assert bash(f"echo 0 > {server.path}/attrs/enabled; cat {server.path}/attrs/enabled") == (0, "0\n")
    assert (server.path / "seq/slow").read_bytes() == b"slow\n" * 1000
    server.call("mkdir", "storm/p")
    assert (server.path / "storm/p/enabled").exists()
    server.call("rm", "storm/p")
    assert os.listdir(server.path / "storm") == []


def read(path: Path) -> None:
    fd = os.open(path, RO)
    try:
        os.read(fd, 100)
    finally:
        os.close(fd)


def write(path: Path) -> None:
    fd = os.open(path, WO)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("call", "name", "said"),
    [
        (read, "open", "RuntimeError: a bug in open"),
        (read, "ashow", "RuntimeError: a bug in async show"),
        (read, "stream", "RuntimeError: a bug in stream read"),
        (write, "stream", "RuntimeError: a bug in stream write"),
        (read, "odd", "TypeError"),
        (os.readlink, "link", "RuntimeError: a bug in link"),
        (os.stat, "link", "RuntimeError: a bug in link"),
        (os.stat, "lookup/name", "RuntimeError: a bug in lookup"),
        (os.listdir, "lookup", "RuntimeError: a bug in lookup"),
        (os.listdir, "list", "RuntimeError: a bug in list"),
    ],
)
def test_what_raises_is_answered_eio(broken: Server, call: Callable[[Path], object], name: str, said: str) -> None:
    for _ in range(3):
        with refused(errno.EIO):
            call(broken.path / "broken" / name)
    assert broken.log().count(said) >= 3
    lives_on(broken)


def test_a_release_that_raises_reaches_nobody(broken: Server) -> None:
    """close(2) has returned by then; the handle is gone all the same, so that the file can be opened again."""
    for _ in range(3):
        assert (broken.path / "broken/release").read_bytes() == b"x\n"
    lives_on(broken)
    assert "RuntimeError: a bug in release" in broken.log()


def test_a_poll_that_raises_wakes_the_poller(broken: Server) -> None:
    """poll(2) has no errno for one file: the kernel reports POLLERR, or that the file is always ready."""
    fd = os.open(broken.path / "broken/poll", RO)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    for _ in range(3):
        ((ready, mask),) = poller.poll(10_000)
        assert ready == fd
        assert mask & (select.POLLERR | select.POLLIN)
    assert os.read(fd, 10) == b"x\n"
    os.close(fd)
    assert "RuntimeError: a bug in poll" in broken.log()
    lives_on(broken)


def test_bugs_at_the_same_time(broken: Server) -> None:
    """Each takes a thread or a task of the driver: none is lost by its failing."""
    base = broken.path / "broken"
    script = f"""
        for i in $(seq 40); do
            cat {base}/ashow {base}/open {base}/odd {base}/stream {base}/lookup/name &
            echo x > {base}/stream &
            ls {base}/list &
        done 2>/dev/null
        wait
    """
    assert bash(script)[0] == 0
    log = broken.log()
    for what in ("open", "async show", "stream read", "stream write", "lookup", "list"):
        assert log.count(f"RuntimeError: a bug in {what}\n") >= 40, what
    lives_on(broken)
