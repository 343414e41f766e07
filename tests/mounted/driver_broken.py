"""The toy server of ``driver_toy.py`` with one more directory, in which everything that can be called raises.

The directory::

    broken/open       its open hook raises
    broken/release    its release hook raises
    broken/poll       its poll raises
    broken/ashow      an async show that raises
    broken/stream     a stream whose read and write raise
    broken/link       a computed link whose target raises
    broken/odd        shows something that is no bytes at all
    broken/lookup/    a dynamic directory that lists "name", and raises when that is looked up
    broken/list/      a dynamic directory that raises when it is listed
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import driver_toy
import trio

from klpfs.kernfs import Attribute, Caller, Entry, OpenFile, SeqFile, StreamOps


def fail(what: str) -> NoReturn:
    raise RuntimeError(f"a bug in {what}")


class BrokenOpen(Attribute):
    def open(self, file: OpenFile) -> None:
        fail("open")


class BrokenRelease(Attribute):
    def release(self, file: OpenFile) -> None:
        fail("release")


class BrokenPoll(Attribute):
    def poll(self, file: OpenFile) -> int:
        fail("poll")


class BrokenStream(StreamOps):
    async def read(self, file: OpenFile, size: int, offset: int) -> bytes:
        fail("stream read")

    async def write(self, file: OpenFile, data: bytes, offset: int) -> int:
        fail("stream write")


class BrokenLookup:
    def lookup(self, name: str) -> Entry | None:
        fail("lookup")

    def list(self) -> Iterable[str]:
        return ["name"]


class BrokenList:
    def lookup(self, name: str) -> Entry | None:
        return None

    def list(self) -> Iterable[str]:
        fail("list")


async def ashow(caller: Caller) -> bytes:
    fail("async show")


def target(caller: Caller) -> str:
    fail("link")


class Broken(driver_toy.Toy):
    """The toy tree and ``broken``."""

    def build(self) -> None:
        super().build()
        fs = self.fs
        broken = fs.make_path("broken")
        fs.create_file(broken, "open", BrokenOpen(lambda: b"x\n"), 0o444)
        fs.create_file(broken, "release", BrokenRelease(lambda: b"x\n"), 0o444)
        fs.create_file(broken, "poll", BrokenPoll(lambda: b"x\n"), 0o444)
        fs.create_file(broken, "ashow", SeqFile(ashow), 0o444)
        fs.create_file(broken, "stream", BrokenStream(), 0o644)
        fs.create_link(broken, "link", target)
        odd: Any = lambda: None  # noqa: E731 - Any, because the type says that this cannot be
        fs.create_file(broken, "odd", Attribute(odd), 0o444)
        fs.create_dynamic_dir(broken, "lookup", BrokenLookup())
        fs.create_dynamic_dir(broken, "list", BrokenList())


if __name__ == "__main__":
    driver_toy.Toy = Broken  # type: ignore[misc]  # what its main builds
    trio.run(driver_toy.main, *sys.argv[1:])
