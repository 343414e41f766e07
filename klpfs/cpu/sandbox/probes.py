"""What happens at the entry of a traced function: kprobes, kretprobes, ftrace callbacks, and then livepatch.

Model
    The daemon keeps the ftrace hooks (:mod:`klpfs.kernel.ftrace`), and so says where calls trap; here is who wants to
    be called at a function's entry. Handlers get a ``struct pt_regs`` in emulated memory, and what they change in it
    counts. A kretprobe puts :data:`RETURN` in place of the return address. A handler's own calls are not probed, as in
    the kernel, which counts them as missed.

    Only entries of functions that have an ftrace site, and kernel functions that modules can call, can be probed:
    everything else is refused with a line in the log, because the handler would never be called.

Source
    kernel/kprobes.c, arch/x86/kernel/kprobes/ftrace.c (``kprobe_ftrace_handler``), kernel/trace/{rethook,ftrace}.c.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from klpfs.cpu import layout as L
from klpfs.cpu.api import Api, Kind
from klpfs.cpu.layout import AREAS, U64
from klpfs.cpu.sandbox.engine import IDS, RSP
from klpfs.cpu.sandbox.thread import Ask, Invoke, StubFrame, Thread, signed

if TYPE_CHECKING:
    from klpfs.cpu.sandbox.machine import Machine

__all__ = ["RETURN", "Hook", "Returning", "entry_steps", "frame_of_return"]

RETURN = AREAS["text"].end - 48
"""What stands where a kretprobe took the return address away (``arch_rethook_trampoline``)."""

_PT_REGS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_ax", "rip", "cs", "eflags", "rsp", "ss"),
)
"""Members of ``struct pt_regs``, eight bytes each."""
_RETURN_API = Api("rethook", Kind.CORE, "ptr", (), False, "rethook")
_IP, _SP, _SITE_SIZE = 16 * 8, 19 * 8, 5


@dataclass(eq=False)
class Hook:
    """Somebody who wants to know: *kind* kprobe, kretprobe or ftrace, with the structure at *addr*."""

    kind: str
    addr: int
    module: str
    token: int
    """What the daemon calls the hook."""
    enabled: bool = True
    free: int = 0
    """Instances of a kretprobe that are left."""
    active: list[Returning] = field(default_factory=list)


@dataclass(eq=False)
class Returning:
    """A call that a kretprobe waits for."""

    hook: Hook
    instance: int
    target: int
    function: int
    rsp: int


def _store(m: Machine, at: int, values: dict[str, int], ip: int) -> None:
    words = {**values, "orig_ax": U64, "rip": ip, "cs": 0x10, "ss": 0x18}
    m.mem.write(at, b"".join((words[name] & U64).to_bytes(8, "little") for name in _PT_REGS))


def _load(m: Machine, at: int, values: dict[str, int]) -> None:
    """Take over what a handler changed; the stack pointer stays."""
    for i, name in enumerate(_PT_REGS):
        if name in values and name != "rsp":
            values[name] = m.mem.load(at + 8 * i)


def _registers(m: Machine) -> dict[str, int]:
    return {name: value for name, value in m.engine.registers().items() if name != "rip"}


def _restore(m: Machine, values: dict[str, int]) -> None:
    for name, value in values.items():
        m.engine.set(IDS[name], value & U64)


def entry_steps(m: Machine, t: Thread, function: int, after: int) -> Generator[Any, Any, int]:
    """Call the hooks of *function*, then ask for its implementation. Where to go on; 0: in the kernel function.

    *after*: the address behind the site, 0 for a kernel function.
    """
    values = _registers(m)
    regs = m.heap.alloc(8 * len(_PT_REGS), "")
    ip = after or function + _SITE_SIZE
    t.probing = True
    target = 0
    try:
        for hook in list(m.hooks.get(function, ())):
            if not hook.enabled:
                continue
            if hook.kind == "kretprobe":
                yield from _enter(m, t, hook, function, regs, values)
                continue
            if hook.kind == "ftrace":
                _store(m, regs, values, ip)
                site = ip - _SITE_SIZE
                parent = m.mem.load(values["rsp"])
                yield Invoke(m.mem.load(hook.addr), (site, parent, hook.addr, regs))
                moved = m.mem.load(regs + _IP)
                if m.mem.load(hook.addr + L.FTRACE_OPS_FLAGS.offset) & L.FTRACE_OPS_FL_IPMODIFY and moved != ip:
                    target = moved
                _load(m, regs, values)
                continue
            pre, post = (m.mem.get(hook.addr, f) for f in (L.KPROBE_PRE_HANDLER, L.KPROBE_POST_HANDLER))
            _store(m, regs, values, function)
            skip = signed((yield Invoke(pre, (hook.addr, regs))), 32) if pre else 0
            if not skip and post:
                m.mem.store(regs + _IP, ip)
                yield Invoke(post, (hook.addr, regs, 0))
            _load(m, regs, values)
            if skip:
                target = m.mem.load(regs + _IP)
    finally:
        t.probing = False
        m.heap.free(regs)
    _restore(m, values)
    chosen = int((yield Ask("ftrace", [function])) or 0)
    return chosen or target or after


def _enter(
    m: Machine, t: Thread, hook: Hook, function: int, regs: int, values: dict[str, int]
) -> Generator[Any, Any, None]:
    """A kretprobe at the entry: run its entry handler, then take the return address away."""
    probe = hook.addr
    if hook.free <= 0:
        missed = m.mem.get(probe, L.KRETPROBE_NMISSED)
        m.mem.put(probe, L.KRETPROBE_NMISSED, missed + 1)
        return
    size = L.KRETPROBE_INSTANCE_SIZE + m.mem.get(probe, L.KRETPROBE_DATA_SIZE)
    instance = m.heap.alloc(size, hook.module, zero=True)
    if not instance:
        return
    rsp = values["rsp"]
    m.mem.put(instance, L.RETHOOK_NODE_RETHOOK, m.mem.get(probe, L.KRETPROBE_RH))
    m.mem.put(instance, L.RETHOOK_NODE_RET_ADDR, m.mem.load(rsp))
    m.mem.put(instance, L.RETHOOK_NODE_FRAME, rsp)
    handler = m.mem.get(probe, L.KRETPROBE_ENTRY_HANDLER)
    if handler:
        _store(m, regs, values, function)
        if signed((yield Invoke(handler, (instance, regs))), 32):
            m.heap.free(instance)
            return
        _load(m, regs, values)
    hook.free -= 1
    t.returning.append(Returning(hook, instance, m.mem.load(rsp), function, rsp))
    m.mem.store(rsp, RETURN)


def return_steps(m: Machine, t: Thread, returning: Returning) -> Generator[Any, Any, int]:
    """A function with a kretprobe returned: call the handler. Where to go on."""
    values, hook = _registers(m), returning.hook
    regs = m.heap.alloc(8 * len(_PT_REGS), "")
    handler = m.mem.get(hook.addr, L.KRETPROBE_HANDLER) if hook.enabled else 0
    was, t.probing = t.probing, True
    try:
        if handler:
            _store(m, regs, values, returning.target)
            m.mem.store(regs + _SP, values["rsp"])
            yield Invoke(handler, (returning.instance, regs))
            _load(m, regs, values)
    finally:
        t.probing = was
        m.heap.free(regs)
        m.heap.free(returning.instance)
        hook.free += 1
    _restore(m, values)
    return returning.target


def frame_of_return(m: Machine, t: Thread, returning: Returning) -> StubFrame:
    """The frame that stands for the trampoline: its return address is back where it was."""
    rsp = m.engine.get(RSP) - 8
    m.mem.store(rsp, returning.target)
    return StubFrame(_RETURN_API, returning.function, return_steps(m, t, returning), rsp, traced=True)
