"""What tests of all layers share: a virtual clock, and a machine that needs no kernel image."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from klpfs.elf.writer import write_module
from klpfs.kernel import profile as profiles
from klpfs.kernel.kallsyms import DictTable
from klpfs.kernel.module import Module
from klpfs.machine import Machine, open_machine
from klpfs.spec import parse_toml

KERNEL_FUNCTIONS = [
    "cmdline_proc_show",
    "meminfo_proc_show",
    "version_proc_show",
    "msleep",
    "process_one_work",
    "worker_thread",
    "kthread",
    "ret_from_fork",
    "ret_from_fork_asm",
    "vfs_read",
    "twice",
    "once",
    "twice",
    "untraceable",
]


class TestTable(DictTable):
    """A few functions of vmlinux (``twice`` exists twice, ``untraceable`` has no ftrace location); all else that a
    module may import is exported."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(KERNEL_FUNCTIONS, notrace=["untraceable"])

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        """What a synthetic module imports, GPL-only where the kernel has it so."""
        if name.startswith(
            ("klp_", "_printk", "__fentry__", "__x86_", "param_ops_", "param_array_ops", "queue_", "msleep")
        ):
            return None, name.startswith("klp_")
        return None


@asynccontextmanager
async def machine(kernel: str = "6.12", **kwargs: Any) -> AsyncIterator[Machine]:
    """A machine over :class:`TestTable`, with the debug lines of the livepatch core switched on."""
    async with open_machine(kernel, table=TestTable(), **kwargs) as m:
        m.dynamic_debug.control_write("file kernel/livepatch/* +p")
        yield m


@pytest.fixture
def run() -> Callable[..., Any]:
    """``run(async_fn, *args)``: under trio, with a clock that jumps whenever nothing is left to do."""

    def run(fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        return trio.run(fn, *args, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


def ko(text: str, m: Machine | None = None) -> bytes:
    """The module file that a spec describes, built for the kernel that *m* is."""
    profile = m.profile if m is not None else profiles.profile()
    return write_module(parse_toml(text), release=profile.release, flags=profile.vermagic_flags)


async def insmod(m: Machine, text: str, args: str = "") -> Module:
    """Load the module that a spec describes."""
    return await m.init_module(ko(text, m), args)


async def insmod_errno(m: Machine, text: str, args: str = "") -> str:
    """The name of the errno that loading it fails with."""
    with pytest.raises(OSError) as info:  # noqa: PT011 - the caller compares the errno
        await insmod(m, text, args)
    return errno.errorcode[info.value.errno or 0]


def klog(m: Machine) -> list[str]:
    """The lines of the kernel log, without the taint lines, as the kernel's own selftests look at them."""
    return [r.message for r in m.printk.records() if "taint" not in r.message]


def patch_spec(name: str, function: str = "cmdline_proc_show", *, object: str = "vmlinux", more: str = "") -> str:
    """The spec of a livepatch that replaces one function."""
    return f"""
name = "{name}"
{more}
[[objects]]
name = "{object}"
[[objects.functions]]
old_name = "{function}"
output = "{name}: this has been live patched\\n"
"""


KLP = "sys/kernel/livepatch"


async def read(m: Machine, path: str) -> str:
    """A file of the tree, without the newline at its end."""
    return (await m.kernfs.read_file(path)).decode().removesuffix("\n")


async def write(m: Machine, path: str, text: str) -> None:
    """Write to a file of the tree."""
    await m.kernfs.write_file(path, text.encode())


async def gone(m: Machine, path: str, seconds: float = 3600) -> None:
    """Wait (in emulated time) until *path* does not exist."""
    with trio.fail_after(seconds):
        while m.kernfs.lookup(path) is not None:  # noqa: ASYNC110 - the tree has no event for it
            await trio.sleep(0.1)
