"""Patches made in Python, straight for ``klp_enable_patch``, with callbacks that note what happens."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
import trio
from conftest import KLP, write

from klpfs.kernel.kallsyms import SymInfo
from klpfs.kernel.module import Module, ModuleImage
from klpfs.kernel.sched import Task
from klpfs.livepatch import KlpCallbacks, KlpFunc, KlpObject, KlpPatch, KlpState
from klpfs.machine import Machine

Run = Callable[..., Any]


class Bare:
    """The code of a module made in Python: it does nothing, and notes the klp relocations asked of it."""

    executes = False
    dead = False

    def __init__(self) -> None:
        self.relocs: list[tuple[str, str | None]] = []
        self.reloc_errno = 0
        self.entered = trio.Event()
        self.go_on = trio.Event()
        self.go_on.set()
        self.ret = 0

    async def load(self, mod: Module) -> None: ...

    async def init(self, mod: Module) -> int:
        self.entered.set()
        await self.go_on.wait()
        return self.ret

    async def exit(self, mod: Module) -> None: ...

    async def free(self, mod: Module) -> None: ...

    async def apply_relocs(self, mod: Module, objname: str | None) -> None:
        self.relocs.append(("apply", objname))
        if self.reloc_errno:
            raise OSError(self.reloc_errno, "relocations")

    async def clear_relocs(self, mod: Module, objname: str | None) -> None:
        self.relocs.append(("clear", objname))

    async def param_set(self, mod: Module, name: str, text: str) -> None: ...

    def param_get(self, mod: Module, name: str) -> str:
        return ""

    async def call(self, addr: int, args: Sequence[int], task: Task | None) -> int:
        return 0

    async def show(self, addr: int, task: Task | None) -> bytes:
        return b""


def image(m: Machine, name: str, *modinfo: tuple[str, str], code: Bare | None = None, **more: Any) -> ModuleImage:
    """A module as the loader would take it: of this kernel, signed, in tree, unless *modinfo* says otherwise."""
    given = dict(modinfo)
    info = {"license": "GPL", "intree": "Y", "retpoline": "Y", "vermagic": m.profile.vermagic, **given}
    return ModuleImage(name, [(k, v) for k, v in info.items() if v], code or Bare(), **{"signed": True, **more})


def add_module(m: Machine, name: str, functions: Sequence[str] = (), *, livepatch: bool = False) -> Module:
    """A live module, put in place without being loaded, whose *functions* are 64 bytes each."""
    base = m.modules.module_alloc(64 * len(functions) + 1)
    mod = Module(name, image(m, name), m.kernel, base=base)
    mod.state, mod.klp_alive, mod.is_livepatch = "live", True, livepatch
    m.kallsyms.add_module(name, [SymInfo(f, base + 64 * i, 64, "t") for i, f in enumerate(functions)])
    m.modules.modules[name] = mod
    return mod


def make_patch(
    m: Machine,
    name: str,
    objects: Mapping[str, Sequence[str]],
    *,
    events: list[str] | None = None,
    pre_patch: Mapping[str, int] | None = None,
    replace: bool = False,
    states: Sequence[tuple[int, int]] = (),
) -> KlpPatch:
    """A patch of *objects* (name to function names, each ``name`` or ``name,sympos``) and its live module.

    With *events*, every callback notes ``callback object``; *pre_patch* gives what the pre-patch callbacks answer.
    """
    news = [f"new_{f.replace(',', '_')}" for functions in objects.values() for f in functions]
    mod = add_module(m, name, news, livepatch=True)
    addresses = iter([mod.base + 64 * i for i in range(len(news))])
    built = []
    for obj, functions in objects.items():
        funcs = []
        for function in functions:
            old_name, _, sympos = function.partition(",")
            funcs.append(KlpFunc(old_name, next(addresses), int(sympos or 0)))
        callbacks = KlpCallbacks()
        if events is not None:
            for kind in ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch"):
                ret = (pre_patch or {}).get(obj, 0) if kind == "pre_patch" else None
                setattr(callbacks, kind, note(events, kind, ret))
        built.append(KlpObject(None if obj == "vmlinux" else obj, funcs, callbacks))
    return KlpPatch(mod, built, [KlpState(id, version) for id, version in states], replace)


def note(events: list[str], kind: str, ret: int | None) -> Callable[[KlpObject], Awaitable[int | None]]:
    """A callback that notes its call and answers *ret*."""

    async def callback(obj: KlpObject) -> int | None:
        events.append(f"{kind} {obj.display_name}")
        return ret

    return callback


async def refused(fn: Callable[..., Awaitable[Any]], *args: Any) -> str:
    """The name of the errno that ``fn(*args)`` is refused with."""
    with pytest.raises(OSError) as info:  # noqa: PT011 - the caller compares the errno
        await fn(*args)
    return errno.errorcode[info.value.errno or 0]


def livepatch_lines(m: Machine, *, tries: bool = False) -> list[str]:
    """What the livepatch core has logged, without its prefix and, unless asked for, without the attempts."""
    lines = [r.message for r in m.printk.records() if r.message.startswith("livepatch: ")]
    return [line.removeprefix("livepatch: ") for line in lines if tries or "klp_try_switch_task" not in line]


def warnings(m: Machine) -> list[str]:
    """Where the kernel has warned."""
    return [r.message.partition(" at ")[2] for r in m.printk.records() if r.message.startswith("WARNING: ")]


def address(m: Machine, function: str, sympos: int = 1) -> int:
    """Where a function of vmlinux lies."""
    return m.kallsyms.on_each_match_symbol(function)[sympos - 1]


def sleeper(m: Machine, where: int, comm: str = "sleeper", *, kthread: bool = True, state: str = "D") -> Task:
    """A task that sleeps in the function at the address *where*."""
    task = m.sched.spawn(comm, kthread=kthread, state=state)
    task.stack = [where + 1]
    return task


async def disable(m: Machine, name: str) -> None:
    """Write 0 to the patch's file."""
    await write(m, f"{KLP}/{name}/enabled", "0")


def directories(m: Machine, path: str = KLP) -> list[str]:
    """The directories below *path*, as relative paths, sorted."""
    root = m.kernfs.lookup(path)
    assert root is not None
    found: list[str] = []
    todo = [("", root)]
    while todo:
        prefix, node = todo.pop()
        for child in node.children():
            if child.kind == "dir":
                found.append(f"{prefix}{child.name}")
                todo.append((f"{prefix}{child.name}/", child))
    return sorted(found)
