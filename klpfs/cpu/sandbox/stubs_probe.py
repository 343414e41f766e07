"""Kernel functions that set probes: kprobes, kretprobes, ftrace callbacks.

Model
    A stub works out the address, lets the daemon hook the function there, and enters the probe into the machine's table
    (see :mod:`~klpfs.cpu.sandbox.probes`).

Source
    kernel/kprobes.c (``register_kprobe``, ``_kprobe_addr``), kernel/trace/ftrace.c (``register_ftrace_function``).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.probes import Hook
from klpfs.cpu.sandbox.stubs_mem import alloc, free
from klpfs.cpu.sandbox.thread import Ask, Crash, Thread, signed, stub
from klpfs.cpu.sandbox.waiting import Steps

EINVAL, ENOENT, EBUSY, ENOMEM = 22, 2, 16, 12
_MAX_FUNCTIONS = 4096


def _hook(
    m: Machine, t: Thread, kind: str, addr: int, function: int, modifies: bool
) -> Generator[Any, Any, Hook | int]:
    """Hook *function*; a negative errno if it cannot be."""
    token = int((yield Ask("hook", [function, modifies, kind])))
    if token < 0:
        return token
    hook = Hook(kind, addr, t.module, token)
    m.hooks.setdefault(function, []).append(hook)
    return hook


def _unhook(m: Machine, function: int, hook: Hook) -> Steps:
    hooks = m.hooks.get(function, [])
    if hook in hooks:
        hooks.remove(hook)
    if not hooks:
        m.hooks.pop(function, None)
    yield Ask("unhook", [hook.token])
    return None


def _find(m: Machine, addr: int) -> list[tuple[int, Hook]]:
    return [(function, hook) for function, hooks in m.hooks.items() for hook in hooks if hook.addr == addr]


def _address(m: Machine, probe: int) -> Generator[Any, Any, int]:
    """``_kprobe_addr``: from the symbol's name or the address, and the offset."""
    name, addr = m.mem.get(probe, L.KPROBE_SYMBOL_NAME), m.mem.get(probe, L.KPROBE_ADDR)
    if bool(name) == bool(addr):
        return -EINVAL
    if name:
        addr = int((yield Ask("kallsyms_lookup_name", [m.mem.cstring(name, 512)])))
        if not addr:
            return -ENOENT
    return addr + (m.mem.get(probe, L.KPROBE_OFFSET) if name else 0)


def _register(m: Machine, t: Thread, probe: int, kind: str) -> Generator[Any, Any, int]:
    m.mem.check(probe, L.KPROBE_SIZE, write=True)
    addr = yield from _address(m, probe)
    if addr < 0:
        return addr
    if _find(m, probe):
        return -EINVAL
    modifies = kind == "kprobe" and m.mem.get(probe, L.KPROBE_POST_HANDLER) != 0
    hook = yield from _hook(m, t, kind, probe, addr, modifies)
    if isinstance(hook, int):
        return hook
    flags = m.mem.get(probe, L.KPROBE_FLAGS)
    hook.enabled = not flags & L.KPROBE_FLAG_DISABLED
    # KPROBE_FLAG_FTRACE, KPROBE_FLAG_ON_FUNC_ENTRY
    m.mem.put(probe, L.KPROBE_FLAGS, flags & L.KPROBE_FLAG_DISABLED | 8 | 16)
    m.mem.put(probe, L.KPROBE_ADDR, addr)
    m.mem.put(probe, L.KPROBE_NMISSED, 0)
    return 0


@stub("register_kprobe")
def _register_kprobe(m: Machine, t: Thread, probe: int) -> Steps:
    return (yield from _register(m, t, probe, "kprobe"))


def _unregister(m: Machine, probe: int) -> Steps:
    for function, hook in _find(m, probe):
        yield from _unhook(m, function, hook)
        if hook.kind == "kretprobe":
            free(m, m.mem.get(probe, L.KRETPROBE_RH))
            m.mem.put(probe, L.KRETPROBE_RH, 0)
    return None


@stub("unregister_kprobe", "unregister_kretprobe")
def _unregister_kprobe(m: Machine, t: Thread, probe: int) -> Steps:
    m.mem.check(probe, L.KPROBE_SIZE)
    return _unregister(m, probe)


@stub("register_kprobes")
def _register_kprobes(m: Machine, t: Thread, array: int, count: int) -> Steps:
    return (yield from _register_all(m, t, array, count, _register_kprobe))


@stub("register_kretprobes")
def _register_kretprobes(m: Machine, t: Thread, array: int, count: int) -> Steps:
    return (yield from _register_all(m, t, array, count, _register_kretprobe))


def _register_all(m: Machine, t: Thread, array: int, count: int, register: Any) -> Generator[Any, Any, int]:
    if count <= 0:
        return -EINVAL
    for i in range(min(count, _MAX_FUNCTIONS)):
        answer: int = yield from register(m, t, m.mem.load(array + 8 * i))
        if answer < 0:
            yield from _unregister_all(m, array, i)
            return answer
    return 0


def _unregister_all(m: Machine, array: int, count: int) -> Steps:
    for i in range(min(max(count, 0), _MAX_FUNCTIONS)):
        yield from _unregister(m, m.mem.load(array + 8 * i))
    return None


@stub("unregister_kprobes", "unregister_kretprobes")
def _unregister_kprobes(m: Machine, t: Thread, array: int, count: int) -> Steps:
    return _unregister_all(m, array, count)


def _switch(m: Machine, probe: int, on: bool) -> int:
    found = _find(m, probe)
    if not found:
        return -EINVAL
    for _, hook in found:
        hook.enabled = on
    flags = m.mem.get(probe, L.KPROBE_FLAGS)
    m.mem.put(probe, L.KPROBE_FLAGS, flags & ~L.KPROBE_FLAG_DISABLED | (0 if on else L.KPROBE_FLAG_DISABLED))
    return 0


@stub("enable_kprobe")
def _enable_kprobe(m: Machine, t: Thread, probe: int) -> int:
    return _switch(m, probe, True)


@stub("disable_kprobe")
def _disable_kprobe(m: Machine, t: Thread, probe: int) -> int:
    return _switch(m, probe, False)


@stub("register_kretprobe")
def _register_kretprobe(m: Machine, t: Thread, probe: int) -> Steps:
    m.mem.check(probe, L.KRETPROBE_SIZE, write=True)
    most = signed(m.mem.get(probe, L.KRETPROBE_MAXACTIVE), 32)
    if most <= 0:
        most = max(10, 2 * L.NR_CPUS)
        m.mem.put(probe, L.KRETPROBE_MAXACTIVE, most)
    rethook = alloc(m, t, L.RETHOOK_SIZE, 0x100)
    if not rethook:
        return -ENOMEM
    m.mem.store(rethook, probe)  # rethook.data: get_kretprobe() goes this way
    m.mem.put(probe, L.KRETPROBE_RH, rethook)
    m.mem.put(probe, L.KRETPROBE_NMISSED, 0)
    answer = yield from _register(m, t, probe, "kretprobe")
    if answer:
        free(m, rethook)
        m.mem.put(probe, L.KRETPROBE_RH, 0)
    for _, hook in _find(m, probe):
        hook.free = most
    return answer


# -- ftrace: the addresses of an ops' filter are kept on our side -----------------------------------------------------


def _filter(m: Machine, ops: int) -> list[int]:
    m.mem.check(ops, L.FTRACE_OPS_SIZE, write=True)
    found = m.objects.get(ops)
    if not isinstance(found, list):
        found = m.objects[ops] = []
    return found


@stub("ftrace_set_filter_ip")
def _ftrace_set_filter_ip(m: Machine, t: Thread, ops: int, ip: int, remove: int, reset: int) -> Steps:
    chosen = _filter(m, ops)
    function = int((yield Ask("ftrace_location", [ip])))
    if not function:
        return -EINVAL
    if reset:
        chosen.clear()
    if remove and function in chosen:
        chosen.remove(function)
    elif not remove and function not in chosen:
        chosen.append(function)
    return 0


@stub("ftrace_set_filter")
def _ftrace_set_filter(m: Machine, t: Thread, ops: int, buf: int, length: int, reset: int) -> Steps:
    chosen = _filter(m, ops)
    if reset:
        chosen.clear()
    if not buf:
        return 0
    name = m.mem.read(buf, min(length, 512)).split(b"\0")[0].strip()
    if set(name) & set(b"*?["):
        raise Crash("missing", "patterns in ftrace_set_filter")
    found = int((yield Ask("kallsyms_lookup_name", [name])))
    function = int((yield Ask("ftrace_location", [found]))) if found else 0
    if not function:
        return -EINVAL
    chosen.append(function)
    return 0


@stub("ftrace_free_filter")
def _ftrace_free_filter(m: Machine, t: Thread, ops: int) -> None:
    _filter(m, ops).clear()


@stub("register_ftrace_function")
def _register_ftrace(m: Machine, t: Thread, ops: int) -> Steps:
    chosen = _filter(m, ops)
    if not chosen:
        raise Crash("missing", "register_ftrace_function of all functions")
    if _find(m, ops):
        return -EBUSY
    flags = m.mem.get(ops, L.FTRACE_OPS_FLAGS)
    for function in chosen:
        hook = yield from _hook(m, t, "ftrace", ops, function, bool(flags & L.FTRACE_OPS_FL_IPMODIFY))
        if isinstance(hook, int):
            for other, done in _find(m, ops):
                yield from _unhook(m, other, done)
            return hook
    m.mem.put(ops, L.FTRACE_OPS_FLAGS, flags | 1)  # FTRACE_OPS_FL_ENABLED
    return 0


@stub("unregister_ftrace_function")
def _unregister_ftrace(m: Machine, t: Thread, ops: int) -> Steps:
    found = _find(m, ops)
    if not found:
        return -EBUSY
    for function, hook in found:
        yield from _unhook(m, function, hook)
    m.mem.put(ops, L.FTRACE_OPS_FLAGS, m.mem.get(ops, L.FTRACE_OPS_FLAGS) & ~1)
    return 0
