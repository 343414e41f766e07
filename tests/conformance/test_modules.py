"""The kernel's samples and test modules, and stripped copies: one by one, and as their sources say to use them."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from selftests import built_modules

from klpfs.cpu import lazy
from klpfs.machine import Machine, open_machine

pytestmark = pytest.mark.timeout(300)  # the first test may have to build the modules

KLP = "sys/kernel/livepatch"
TARGETS = [
    "livepatch-callbacks-busymod",
    "livepatch-callbacks-mod",
    "livepatch-shadow-mod",
    "test_klp_callbacks_busy",
    "test_klp_callbacks_mod",
    "test_klp_shadow_vars",
]
PATCHES = [
    "livepatch-callbacks-demo",
    "livepatch-sample",
    "livepatch-shadow-fix1",
    "livepatch-shadow-fix2",
    "test_klp_atomic_replace",
    "test_klp_callbacks_demo",
    "test_klp_callbacks_demo2",
    "test_klp_livepatch",
    "test_klp_state",
    "test_klp_state2",
    "test_klp_state3",
    "test_klp_syscall",
]


@asynccontextmanager
async def machine() -> AsyncIterator[Machine]:
    """A machine that executes modules."""
    async with open_machine("6.12") as m:
        assert lazy.attach(m) is not None
        yield m


def module(name: str, *, stripped: Path | None = None) -> bytes:
    """A built module; stripped in the directory *stripped*."""
    path = built_modules() / f"{name}.ko"
    if stripped is not None:
        copy = stripped / path.name
        subprocess.run(["strip", "--strip-unneeded", "-o", copy, path], check=True)
        path = copy
    return path.read_bytes()


async def disable(m: Machine, name: str) -> None:
    """Disable a patch, wait for the end of its directory, and unload it."""
    await m.kernfs.write_file(f"{KLP}/{name}/enabled", b"0\n")
    with trio.fail_after(30):
        while m.kernfs.lookup(f"{KLP}/{name}") is not None:  # noqa: ASYNC110 - as a shell waits
            await trio.sleep(0.1)
    await m.delete_module(name)


async def refusal(m: Machine, data: bytes) -> int:
    """The errno that a module is refused with; 0 if it is not."""
    try:
        await m.init_module(data)
    except OSError as error:
        return error.errno or 0
    return 0


def lines(m: Machine) -> list[str]:
    """The log, without the two lines of the boot."""
    return [record.message for record in m.printk.records()][2:]


@pytest.mark.parametrize("name", TARGETS + PATCHES)
@pytest.mark.parametrize("strip", [False, True], ids=["built", "stripped"])
def test_life_of_a_module(name: str, strip: bool, run: Callable[..., Any], tmp_path: Path) -> None:
    data = module(name, stripped=tmp_path if strip else None)
    loaded = name.replace("-", "_")

    async def live() -> list[str]:
        async with machine() as m:
            await m.init_module(data)
            await trio.sleep(3)
            assert await m.kernfs.read_file(f"sys/module/{loaded}/initstate") == b"live\n"
            assert (m.kernfs.lookup(f"{KLP}/{loaded}") is not None) == (name in PATCHES)
            if name in PATCHES:
                assert await m.kernfs.read_file(f"{KLP}/{loaded}/enabled") == b"1\n"
                assert await m.kernfs.read_file(f"{KLP}/{loaded}/transition") == b"0\n"
                await disable(m, loaded)
            else:
                await m.delete_module(loaded)
            assert await m.kernfs.read_file("proc/modules") == b""
            return lines(m)

    log = run(live)
    assert log[0] == f"{loaded}: loading out-of-tree module taints kernel."
    assert not [line for line in log if re.search("klpfs|BUG|WARNING|Oops|not tainted", line, re.IGNORECASE)]


def test_a_stripped_target_cannot_be_patched(run: Callable[..., Any], tmp_path: Path) -> None:
    """Its local functions have no symbols any more: kernel/livepatch/core.c, ``klp_find_object_symbol``."""
    busy = module("test_klp_callbacks_busy", stripped=tmp_path)

    async def load() -> list[str]:
        async with machine() as m:
            await m.init_module(busy)
            assert await refusal(m, module("test_klp_callbacks_demo")) == errno.EINVAL
            assert m.kernfs.lookup(f"{KLP}/test_klp_callbacks_demo") is None
            return lines(m)

    assert "livepatch: symbol 'busymod_work_func' not found in symbol table" in run(load)


def test_a_stripped_target_is_refused_when_it_comes(run: Callable[..., Any], tmp_path: Path) -> None:
    busy = module("test_klp_callbacks_busy", stripped=tmp_path)

    async def load() -> list[str]:
        async with machine() as m:
            await m.init_module(module("test_klp_callbacks_demo"))
            await trio.sleep(3)
            assert await refusal(m, busy) == errno.EINVAL
            assert m.kernfs.lookup("sys/module/test_klp_callbacks_busy") is None
            return lines(m)

    log = run(load)
    assert log[-2:] == [
        "livepatch: failed to initialize patch 'test_klp_callbacks_demo' for module 'test_klp_callbacks_busy' (-22)",
        "livepatch: patch 'test_klp_callbacks_demo' failed for module 'test_klp_callbacks_busy', refusing to load"
        " module 'test_klp_callbacks_busy'",
    ]


def test_the_sample(run: Callable[..., Any]) -> None:
    """samples/livepatch/livepatch-sample.c: /proc/cmdline reads otherwise while the patch is enabled."""

    async def patch() -> None:
        async with machine() as m:
            before = await m.kernfs.read_file("proc/cmdline")
            await m.init_module(module("livepatch-sample"))
            await trio.sleep(3)
            assert await m.kernfs.read_file("proc/cmdline") == b"this has been live patched\n"
            await disable(m, "livepatch_sample")
            assert await m.kernfs.read_file("proc/cmdline") == before

    run(patch)


def test_shadow_variables_fix_a_leak(run: Callable[..., Any]) -> None:
    """samples/livepatch/livepatch-shadow-{mod,fix1,fix2}.c, in the order that they describe.

    Dummies are made each second and freed 12 seconds later, at a check every 3 seconds. fix1 attaches to new ones what
    they leak, as a shadow variable, and tells of older ones; fix2 counts the checks in a second shadow variable.
    """

    async def fix() -> dict[str, list[str]]:
        async with machine() as m:
            log = {}
            seen = m.printk.next_seq

            async def phase(name: str) -> None:
                nonlocal seen
                log[name] = [record.message for record in m.printk.records(seen)]
                seen = m.printk.next_seq

            await m.init_module(module("livepatch-shadow-mod"))
            await trio.sleep(20.5)
            await phase("buggy")
            await m.init_module(module("livepatch-shadow-fix1"))
            await trio.sleep(30)
            await phase("fix1")
            await m.init_module(module("livepatch-shadow-fix2"))
            await trio.sleep(30)
            await phase("fix2")
            await disable(m, "livepatch_shadow_fix2")
            await disable(m, "livepatch_shadow_fix1")
            await phase("disabled")
            await m.delete_module("livepatch_shadow_mod")
            await phase("removed")
            assert await m.kernfs.read_file("proc/modules") == b""
            return log

    log = run(fix)

    def count(phase: str, pattern: str) -> int:
        return sum(re.fullmatch(pattern, line) is not None for line in log[phase])

    dummy = r"dummy @ [0-9a-f]{16}"
    assert count("buggy", rf"dummy_alloc: {dummy}, expires @ [0-9a-f]+") == 20
    assert count("buggy", r"cleanup_work_func: jiffies = [0-9a-f]+") == 6
    freed = count("buggy", rf"dummy_free: {dummy}, expired = [0-9a-f]+")
    assert freed > 0

    made = count("fix1", rf"livepatch_shadow_fix1: livepatch_fix1_dummy_alloc: {dummy}, expires @ [0-9a-f]+")
    assert 28 <= made <= 31
    # all that were there when the fix came leaked, and no others
    assert count("fix1", rf"livepatch_shadow_fix1: livepatch_fix1_dummy_free: {dummy} leaked!") == 20 - freed
    prevented = rf"livepatch_shadow_fix1: livepatch_fix1_dummy_leak_dtor: {dummy}, prevented leak @ [0-9a-f]{{16}}"
    assert count("fix1", prevented) > 0
    assert count("fix1", "dummy_(alloc|free): .*") <= 1

    # at most 5 checks in the life of a dummy, the one that ends it included
    counts = [match[1] for line in log["fix2"] if (match := re.search(r"check counter = (\d+)$", line))]
    assert counts[0] == "1"
    assert set(counts) <= {"1", "2", "3", "4", "5"}
    assert counts[-1] in {"4", "5"}
    assert count("fix2", rf"livepatch_shadow_fix2: .*dummy_leak_dtor: {dummy}, prevented leak @ .*") == len(counts)
    assert not [line for phase in ("fix2", "disabled", "removed") for line in log[phase] if "leaked!" in line]

    # what is left of fix1's variables goes with it, and the dummies with their module
    left = count("disabled", prevented)
    assert left > 0
    assert count("removed", rf"dummy_free: {dummy}, expired = [0-9a-f]+") >= left


def test_callbacks_sample_waits_for_a_busy_module(run: Callable[..., Any]) -> None:
    """samples/livepatch/livepatch-callbacks-demo.c: a module sleeping in a patched function stalls the transition,
    and another target may come and go meanwhile."""

    async def stall() -> list[str]:
        async with machine() as m:
            await m.init_module(module("livepatch-callbacks-busymod"), "sleep_secs=30")
            await trio.sleep(1)  # until the worker is in the function
            await m.init_module(module("livepatch-callbacks-demo"))
            await trio.sleep(10)
            assert await m.kernfs.read_file(f"{KLP}/livepatch_callbacks_demo/transition") == b"1\n"
            await m.init_module(module("livepatch-callbacks-mod"))
            await m.delete_module("livepatch_callbacks_mod")
            await trio.sleep(25)
            assert await m.kernfs.read_file(f"{KLP}/livepatch_callbacks_demo/transition") == b"0\n"
            await disable(m, "livepatch_callbacks_demo")
            await m.delete_module("livepatch_callbacks_busymod")
            return [line for line in lines(m) if "taint" not in line]

    coming = "livepatch_callbacks_mod -> [MODULE_STATE_COMING] Full formed, running module_init"
    going = "livepatch_callbacks_mod -> [MODULE_STATE_GOING] Going away"
    live = "livepatch_callbacks_busymod -> [MODULE_STATE_LIVE] Normal state"
    assert run(stall) == [
        "livepatch_callbacks_busymod: livepatch_callbacks_mod_init",
        "livepatch_callbacks_busymod: busymod_work_func, sleeping 30 seconds ...",
        "livepatch: enabling patch 'livepatch_callbacks_demo'",
        "livepatch_callbacks_demo: pre_patch_callback: vmlinux",
        f"livepatch_callbacks_demo: pre_patch_callback: {live}",
        "livepatch: 'livepatch_callbacks_demo': starting patching transition",
        "livepatch: applying patch 'livepatch_callbacks_demo' to loading module 'livepatch_callbacks_mod'",
        f"livepatch_callbacks_demo: pre_patch_callback: {coming}",
        "livepatch_callbacks_mod: livepatch_callbacks_mod_init",
        "livepatch_callbacks_mod: livepatch_callbacks_mod_exit",
        "livepatch: reverting patch 'livepatch_callbacks_demo' on unloading module 'livepatch_callbacks_mod'",
        f"livepatch_callbacks_demo: post_unpatch_callback: {going}",
        "livepatch: signaling remaining tasks",
        "livepatch_callbacks_busymod: busymod_work_func exit",
        "livepatch_callbacks_demo: post_patch_callback: vmlinux",
        f"livepatch_callbacks_demo: post_patch_callback: {live}",
        "livepatch: 'livepatch_callbacks_demo': patching complete",
        "livepatch_callbacks_demo: pre_unpatch_callback: vmlinux",
        f"livepatch_callbacks_demo: pre_unpatch_callback: {live}",
        "livepatch: 'livepatch_callbacks_demo': starting unpatching transition",
        "livepatch_callbacks_demo: post_unpatch_callback: vmlinux",
        f"livepatch_callbacks_demo: post_unpatch_callback: {live}",
        "livepatch: 'livepatch_callbacks_demo': unpatching complete",
        "livepatch_callbacks_busymod: livepatch_callbacks_mod_exit",
    ]


def test_the_callbacks_sample_refuses_a_module(run: Callable[..., Any]) -> None:
    """samples/livepatch/livepatch-callbacks-demo.c: a failing pre-patch callback keeps the target out."""

    async def refuse() -> None:
        async with machine() as m:
            await m.init_module(module("livepatch-callbacks-demo"))
            await trio.sleep(3)
            await m.kernfs.write_file("sys/module/livepatch_callbacks_demo/parameters/pre_patch_ret", b"-19\n")
            assert await refusal(m, module("livepatch-callbacks-mod")) == errno.ENODEV
            assert m.kernfs.lookup("sys/module/livepatch_callbacks_mod") is None

    run(refuse)
