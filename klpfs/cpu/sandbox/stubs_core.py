"""Kernel functions that the daemon answers: the log, livepatch, work, timers, threads, sysfs, procfs, debugfs.

Model
    A stub reads what its arguments point to, so that a bad pointer faults here, and asks; names of events are those of
    :mod:`klpfs.cpu.events`. What the daemon answers is an address, a number, or a list of calls to make.

Source
    kernel/printk/printk.c, kernel/livepatch/{core,shadow,state}.c, kernel/workqueue.c, kernel/time/{timer,hrtimer}.c,
    kernel/kthread.c, lib/kobject.c, fs/sysfs, fs/proc/generic.c, fs/debugfs, kernel/module/main.c.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.fmt import Args, vformat
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.memory import PageFault
from klpfs.cpu.sandbox.stubs_mem import alloc, free
from klpfs.cpu.sandbox.stubs_print import hex_line
from klpfs.cpu.sandbox.thread import HANDLERS, Ask, Crash, Invoke, Thread, signed, stub
from klpfs.cpu.sandbox.waiting import Steps

_MAX_ROWS = 4096
_FORTIFIED = (
    "strncpy", "strnlen", "strlen", "strscpy", "strlcat", "strcat", "strncat", "memset", "memcpy", "memmove", "memscan",
    "memcmp", "memchr", "memchr_inv", "kmemdup", "strcpy",
)  # fmt: skip
"""``enum fortify_func`` (include/linux/fortify-string.h)."""


# -- the log ----------------------------------------------------------------------------------------------------------


@stub("_printk", "_printk_deferred", "vprintk")
def _printk(m: Machine, t: Thread, text: bytes) -> int:
    m.print(t, text)
    skip = 2 if text[:1] == b"\x01" else 0
    return len(text) - skip


@stub("__dynamic_pr_debug")
def _dynamic_pr_debug(m: Machine, t: Thread, descriptor: int, text: bytes) -> Steps:
    # called only where the site's static key is on
    m.mem.check(descriptor, L.DDEBUG_SIZE)
    m.count_log(t.module)
    yield Ask("pr_debug", [descriptor, text])
    return None


@stub("print_hex_dump")
def _print_hex_dump(
    m: Machine,
    t: Thread,
    level: bytes,
    prefix: bytes,
    kind: int,
    rowsize: int,
    groupsize: int,
    buf: int,
    size: int,
    ascii: bool,
) -> None:
    if rowsize not in (16, 32):
        rowsize = 16
    for at in range(0, size, rowsize):
        line = hex_line(m.mem.read(buf + at, min(rowsize, size - at)), rowsize, groupsize, ascii)
        where = {1: b"%016x: " % (buf + at), 2: b"%08x: " % at}.get(kind, b"")
        m.print(t, level + prefix + where + line + b"\n")


@stub("__warn_printk")
def _warn_printk(m: Machine, t: Thread, text: bytes) -> None:
    m.print(t, b"\x014------------[ cut here ]------------\n")
    m.print(t, text if text[:1] == b"\x01" else b"\x014" + text)


@stub("dump_stack")
def _dump_stack(m: Machine, t: Thread) -> None:
    m.count_log(t.module, 20)
    m.dump(t)


@stub("dump_stack_lvl")
def _dump_stack_lvl(m: Machine, t: Thread, level: bytes) -> None:
    _dump_stack(m, t)


@stub("panic")
def _panic(m: Machine, t: Thread, text: bytes) -> None:
    raise Crash("panic", text.decode("utf-8", "replace"))


@stub("__stack_chk_fail")
def _stack_chk_fail(m: Machine, t: Thread) -> None:
    caller = m.symbol_text(m.caller(t), True, True)
    raise Crash("panic", f"stack-protector: Kernel stack is corrupted in: {caller}")


@stub("__fortify_panic")
def _fortify_panic(m: Machine, t: Thread) -> None:
    raise Crash("bug", "lib/string_helpers.c:1040")


@stub("__fortify_report")
def _fortify_report(m: Machine, t: Thread, reason: int, available: int, size: int) -> None:
    name = _FORTIFIED[reason >> 1] if reason >> 1 < len(_FORTIFIED) else "unknown"
    m.warn(
        t,
        "lib/string_helpers.c:1032",
        f"{name}: detected buffer overflow: {size} byte {'write' if reason & 1 else 'read'} of buffer size {available}",
    )


@stub("BUG_func")
def _bug_func(m: Machine, t: Thread) -> None:
    raise Crash("bug", "arch/x86/kernel/alternative.c:450")


@stub("add_taint")
def _add_taint(m: Machine, t: Thread, flag: int, lockdep_ok: int) -> Steps:
    yield Ask("add_taint", [flag, lockdep_ok])
    return None


# -- livepatch --------------------------------------------------------------------------------------------------------


def _string(m: Machine, addr: int) -> bytes | None:
    return m.mem.cstring(addr, 4096) if addr else None


def _rows(m: Machine, base: int, size: int, *ends: L.Field) -> list[int]:
    """Addresses of the rows of an array that ends with one whose *ends* are all zero."""
    rows = []
    while any(m.mem.get(base, field) for field in ends):
        rows.append(base)
        if len(rows) > _MAX_ROWS:
            raise Crash("hung", "stuck in klp_enable_patch: an array has no end")
        base += size
    return rows


def read_patch(m: Machine, patch: int) -> list[Any]:
    """What ``klp_enable_patch`` reads: ``[mod, objects, states, replace]``, rows beginning with their addresses.

    An object: ``[address, name, functions or None, callbacks]``; a function: ``[address, old name, new function,
    sympos]``; a state: ``[address, id, version]``. *objects* None for a NULL pointer.
    """
    mem = m.mem
    mod, objs = mem.get(patch, L.KLP_PATCH_MOD), mem.get(patch, L.KLP_PATCH_OBJS)
    states = mem.get(patch, L.KLP_PATCH_STATES)
    objects: list[Any] | None = None
    if objs and mod:
        objects = []
        for obj in _rows(m, objs, L.KLP_OBJECT_SIZE, L.KLP_OBJECT_NAME, L.KLP_OBJECT_FUNCS):
            funcs = mem.get(obj, L.KLP_OBJECT_FUNCS)
            rows: list[Any] | None = None
            if funcs:
                rows = [
                    [
                        func,
                        _string(m, mem.get(func, L.KLP_FUNC_OLD_NAME)),
                        mem.get(func, L.KLP_FUNC_NEW_FUNC),
                        mem.get(func, L.KLP_FUNC_OLD_SYMPOS),
                    ]
                    for func in _rows(
                        m, funcs, L.KLP_FUNC_SIZE, L.KLP_FUNC_OLD_NAME, L.KLP_FUNC_NEW_FUNC, L.KLP_FUNC_OLD_SYMPOS
                    )
                ]
            callbacks = [
                mem.get(obj, field)
                for field in (
                    L.KLP_OBJECT_PRE_PATCH,
                    L.KLP_OBJECT_POST_PATCH,
                    L.KLP_OBJECT_PRE_UNPATCH,
                    L.KLP_OBJECT_POST_UNPATCH,
                )
            ]
            objects.append([obj, _string(m, mem.get(obj, L.KLP_OBJECT_NAME)), rows, callbacks])
    rows = []
    if states:
        rows = [
            [state, mem.get(state, L.KLP_STATE_ID), mem.get(state, L.KLP_STATE_VERSION)]
            for state in _rows(m, states, L.KLP_STATE_SIZE, L.KLP_STATE_ID)
        ]
    mem.check(patch, L.KLP_PATCH_SIZE, write=True)
    return [mod, objects, rows, bool(mem.get(patch, L.KLP_PATCH_REPLACE))]


@stub("klp_enable_patch")
def _klp_enable_patch(m: Machine, t: Thread, patch: int) -> Steps:
    answer = yield Ask("klp_enable_patch", [patch, read_patch(m, patch) if patch else None])
    return int(answer)


@stub("klp_get_state")
def _klp_get_state(m: Machine, t: Thread, patch: int, number: int) -> int:
    states = m.mem.get(patch, L.KLP_PATCH_STATES)
    if states:
        for state in _rows(m, states, L.KLP_STATE_SIZE, L.KLP_STATE_ID):
            if m.mem.get(state, L.KLP_STATE_ID) == number:
                return state
    return 0


def _asking(name: str, count: int) -> None:
    """A stub that passes its arguments on as they are."""

    def run(m: Machine, t: Thread, *args: Any) -> Steps:
        answer = yield Ask(name, list(args[:count]))
        return int(answer or 0)

    HANDLERS[name] = run


for _name, _count in (
    ("klp_get_prev_state", 1),
    ("klp_shadow_get", 2),
    ("klp_shadow_alloc", 6),
    ("klp_shadow_get_or_alloc", 6),
    ("klp_shadow_free", 3),
    ("klp_shadow_free_all", 2),
    ("work_busy", 1),
    ("kobject_put", 1),
    ("kobject_get", 1),
    ("kobject_del", 1),
    ("proc_remove", 1),
    ("debugfs_remove", 1),
    ("try_module_get", 1),
    ("__module_get", 1),
    ("module_put", 1),
    ("module_refcount", 1),
    ("__symbol_get", 1),
    ("__symbol_put", 1),
    ("kallsyms_lookup_name", 1),
    ("kobject_create_and_add", 2),
    ("proc_mkdir", 2),
    ("remove_proc_entry", 2),
    ("remove_proc_subtree", 2),
    ("proc_create", 4),
    ("proc_create_data", 5),
    ("proc_create_single_data", 5),
    ("debugfs_create_dir", 2),
    ("kobject_uevent", 2),
    ("debugfs_create_blob", 4),
    ("debugfs_create_str", 4),
    ("debugfs_create_symlink", 3),
    ("debugfs_lookup", 2),
    ("debugfs_lookup_and_remove", 2),
    ("proc_symlink", 3),
    ("sysfs_create_link", 3),
    ("sysfs_remove_link", 2),
):
    _asking(_name, _count)
HANDLERS["debugfs_create_file"] = HANDLERS["debugfs_create_file_unsafe"] = lambda m, t, *args: _ask_file(args)


def _ask_file(args: tuple[Any, ...]) -> Steps:
    answer = yield Ask("debugfs_create_file", list(args))
    return int(answer)


def _debugfs_value(name: str, size: int, kind: str) -> None:
    def run(m: Machine, t: Thread, file: bytes, mode: int, parent: int, value: int) -> Steps:
        m.mem.check(value, size, write=bool(mode & 0o222))
        yield Ask("debugfs_create_value", [file, mode, parent, value, size, kind])
        return None

    HANDLERS[f"debugfs_create_{name}"] = run


for _bits in (8, 16, 32, 64):
    _debugfs_value(f"u{_bits}", _bits // 8, "u")
    _debugfs_value(f"x{_bits}", _bits // 8, "x")
_debugfs_value("bool", 1, "bool")
_debugfs_value("ulong", 8, "u")
_debugfs_value("size_t", 8, "u")
_debugfs_value("atomic_t", 4, "d")


@stub("proc_create_seq_private")
def _proc_create_seq(
    m: Machine, t: Thread, name: bytes, mode: int, parent: int, ops: int, size: int, data: int
) -> Steps:
    m.mem.check(ops, 32)
    private = alloc(m, t, size, 0x100) if size else data
    answer = yield Ask("proc_create_seq", [name, mode, parent, ops, private])
    return int(answer)


# -- work -------------------------------------------------------------------------------------------------------------


def _work_func(m: Machine, work: int) -> int:
    m.mem.check(work, L.WORK_SIZE, write=True)
    return m.mem.get(work, L.WORK_FUNC)


@stub("queue_work_on")
def _queue_work_on(m: Machine, t: Thread, cpu: int, wq: int, work: int) -> Steps:
    answer = yield Ask("queue_work", [wq, work, _work_func(m, work), 0, False, False])
    return int(answer)


def _queue_delayed(m: Machine, wq: int, work: int, delay: int, modify: bool) -> Steps:
    m.mem.put(work, L.DELAYED_WORK_WQ, wq)
    answer = yield Ask("queue_work", [wq, work, _work_func(m, work), delay, True, modify])
    return int(answer)


@stub("queue_delayed_work_on")
def _queue_delayed_work_on(m: Machine, t: Thread, cpu: int, wq: int, work: int, delay: int) -> Steps:
    return _queue_delayed(m, wq, work, delay, False)


@stub("mod_delayed_work_on")
def _mod_delayed_work_on(m: Machine, t: Thread, cpu: int, wq: int, work: int, delay: int) -> Steps:
    return _queue_delayed(m, wq, work, delay, True)


def _work_stub(names: str, event: str) -> None:
    def run(m: Machine, t: Thread, work: int) -> Steps:
        m.mem.check(work, L.WORK_SIZE, write=True)
        answer = yield Ask(event, [work])
        return int(answer)

    for name in names.split():
        HANDLERS[name] = run


_work_stub("flush_work flush_delayed_work", "flush_work")
_work_stub("cancel_work_sync cancel_delayed_work_sync", "cancel_work_sync")
_work_stub("cancel_work cancel_delayed_work", "cancel_work")


@stub("delayed_work_timer_fn")
def _delayed_work_timer_fn(m: Machine, t: Thread, timer: int) -> None:
    raise Crash("missing", "a call of delayed_work_timer_fn")


@stub("alloc_workqueue")
def _alloc_workqueue(m: Machine, t: Thread, fmt: int, args: Args, flags: int, max_active: int) -> Steps:
    # the format's arguments come after flags and max_active
    args.next(), args.next()
    name = vformat(m.fmt, m.mem.cstring(fmt, 256), args)
    wq = alloc(m, t, 512, 0x100)
    if wq:
        yield Ask("alloc_workqueue", [wq, name])
    return wq


@stub("destroy_workqueue")
def _destroy_workqueue(m: Machine, t: Thread, wq: int) -> Steps:
    yield Ask("drain_workqueue", [wq, True])
    free(m, wq)
    return None


@stub("drain_workqueue", "__flush_workqueue")
def _drain_workqueue(m: Machine, t: Thread, wq: int) -> Steps:
    yield Ask("drain_workqueue", [wq, False])
    return None


# -- timers: struct timer_list is pending when its entry is hashed (pprev set) ----------------------------------------


@stub("init_timer_key")
def _init_timer_key(m: Machine, t: Thread, timer: int, function: int, flags: int, name: int, key: int) -> None:
    m.mem.put(timer, L.TIMER_ENTRY_PPREV, 0)
    m.mem.put(timer, L.TIMER_FUNCTION, function)
    m.mem.put(timer, L.TIMER_FLAGS, flags)


def _arm(m: Machine, timer: int, expires: int) -> Steps:
    was = m.mem.get(timer, L.TIMER_ENTRY_PPREV) != 0
    m.mem.put(timer, L.TIMER_EXPIRES, expires)
    function = m.mem.get(timer, L.TIMER_FUNCTION)
    if not function:  # shut down
        return 0
    m.mem.put(timer, L.TIMER_ENTRY_PPREV, timer)
    delay = max(signed(expires - m.jiffies()), 0) * L.NSEC_PER_JIFFY
    yield Ask("timer_start", [timer, function, delay, L.TIMER_ENTRY_PPREV.offset])
    return int(was)


@stub("mod_timer")
def _mod_timer(m: Machine, t: Thread, timer: int, expires: int) -> Steps:
    return _arm(m, timer, expires)


@stub("mod_timer_pending")
def _mod_timer_pending(m: Machine, t: Thread, timer: int, expires: int) -> int | Steps:
    return _arm(m, timer, expires) if m.mem.get(timer, L.TIMER_ENTRY_PPREV) else 0


@stub("timer_reduce")
def _timer_reduce(m: Machine, t: Thread, timer: int, expires: int) -> int | Steps:
    pending = m.mem.get(timer, L.TIMER_ENTRY_PPREV)
    if pending and signed(m.mem.get(timer, L.TIMER_EXPIRES) - expires) <= 0:
        return 1
    return _arm(m, timer, expires)


@stub("add_timer")
def _add_timer(m: Machine, t: Thread, timer: int) -> Steps:
    if m.mem.get(timer, L.TIMER_ENTRY_PPREV):
        raise Crash("bug", "kernel/time/timer.c:1299")
    return _arm(m, timer, m.mem.get(timer, L.TIMER_EXPIRES))


def _disarm(m: Machine, timer: int, wait: bool, shutdown: bool) -> Steps:
    was = m.mem.get(timer, L.TIMER_ENTRY_PPREV) != 0
    m.mem.put(timer, L.TIMER_ENTRY_PPREV, 0)
    if shutdown:
        m.mem.put(timer, L.TIMER_FUNCTION, 0)
    yield Ask("timer_stop", [timer, wait])
    return int(was)


def _timer_stops() -> None:
    for name, wait, shutdown in (
        ("timer_delete", False, False),
        ("try_to_del_timer_sync", False, False),
        ("timer_delete_sync", True, False),
        ("timer_shutdown", False, True),
        ("timer_shutdown_sync", True, True),
    ):

        def run(m: Machine, t: Thread, timer: int, _wait: bool = wait, _shutdown: bool = shutdown) -> Steps:
            return _disarm(m, timer, _wait, _shutdown)

        HANDLERS[name] = run


_timer_stops()


@stub("hrtimer_init")
def _hrtimer_init(m: Machine, t: Thread, timer: int, clock: int, mode: int) -> None:
    m.mem.write(timer, bytes(64))
    m.mem.store(timer, timer)
    if clock == 0 and mode & 1:  # a relative time is one of CLOCK_MONOTONIC
        clock = 1
    index = next((i for i, (number, _) in enumerate(L.HRTIMER_CLOCKS) if number == clock), 0)
    m.mem.put(timer, L.HRTIMER_BASE, L.AREAS["percpu"].base + L.HRTIMER_BASES + index * L.HRTIMER_BASE_SIZE)


def _clock_offset(m: Machine, timer: int) -> int:
    """Nanoseconds that the clock of *timer* is ahead of CLOCK_MONOTONIC."""
    base = m.mem.get(timer, L.HRTIMER_BASE)
    clock = m.mem.get(base, L.CLOCK_BASE_CLOCKID) if base else 1
    page = {0: L.TIME_REAL, 11: L.TIME_REAL, 7: L.TIME_BOOT}.get(clock, L.TIME_MONOTONIC)
    return m.space.load(L.TIME_PAGE + page) - m.now()


@stub("hrtimer_start_range_ns")
def _hrtimer_start(m: Machine, t: Thread, timer: int, time: int, delta: int, mode: int) -> Steps:
    offset = _clock_offset(m, timer)
    expires = time + m.now() + offset if mode & 1 else time  # HRTIMER_MODE_REL
    m.mem.put(timer, L.HRTIMER_EXPIRES, expires)
    m.mem.put(timer, L.HRTIMER_SOFTEXPIRES, expires)
    m.mem.put(timer, L.HRTIMER_STATE, 1)
    function = m.mem.get(timer, L.HRTIMER_FUNCTION)
    delay = max(expires - offset - m.now(), 0)
    yield Ask("hrtimer_start", [timer, function, delay, offset])
    return None


def _hrtimer_stop(m: Machine, timer: int, wait: bool) -> Steps:
    was = m.mem.get(timer, L.HRTIMER_STATE)
    m.mem.put(timer, L.HRTIMER_STATE, 0)
    yield Ask("timer_stop", [timer, wait])
    return int(was & 1)


@stub("hrtimer_cancel")
def _hrtimer_cancel(m: Machine, t: Thread, timer: int) -> Steps:
    return _hrtimer_stop(m, timer, True)


@stub("hrtimer_try_to_cancel")
def _hrtimer_try_to_cancel(m: Machine, t: Thread, timer: int) -> Steps:
    return _hrtimer_stop(m, timer, False)


@stub("hrtimer_active")
def _hrtimer_active(m: Machine, t: Thread, timer: int) -> bool:
    return bool(m.mem.get(timer, L.HRTIMER_STATE))


@stub("hrtimer_forward")
def _hrtimer_forward(m: Machine, t: Thread, timer: int, now: int, interval: int) -> int:
    expires = signed(m.mem.get(timer, L.HRTIMER_EXPIRES))
    if now < expires or interval <= 0:
        return 0
    overruns = (now - expires) // interval + 1
    m.mem.put(timer, L.HRTIMER_EXPIRES, expires + overruns * interval)
    m.mem.put(timer, L.HRTIMER_SOFTEXPIRES, expires + overruns * interval)
    return overruns


@stub("call_rcu", "call_rcu_hurry")
def _call_rcu(m: Machine, t: Thread, head: int, function: int) -> Steps:
    m.mem.check(head, 16, write=True)
    m.mem.store(head + 8, function)
    yield Ask("call_rcu", [head, function])
    return None


@stub("call_srcu")
def _call_srcu(m: Machine, t: Thread, srcu: int, head: int, function: int) -> Steps:
    return _call_rcu(m, t, head, function)  # type: ignore[return-value]


# -- kernel threads ---------------------------------------------------------------------------------------------------


@stub("kthread_create_on_node")
def _kthread_create(m: Machine, t: Thread, function: int, data: int, node: int, name: bytes) -> Steps:
    answer = yield Ask("kthread_create", [function, data, name])
    if not isinstance(answer, list):
        return int(answer)
    from klpfs.cpu.proto import TaskInfo

    pid, comm = answer
    task = m.task(TaskInfo(pid, pid, comm, True))
    task.unstarted, task.kthread_data, task.should_stop = True, data, False
    return task.addr


@stub("kthread_should_stop")
def _kthread_should_stop(m: Machine, t: Thread) -> bool:
    return t.task.should_stop


@stub("kthread_should_park")
def _kthread_should_park(m: Machine, t: Thread) -> bool:
    return False


@stub("kthread_data")
def _kthread_data(m: Machine, t: Thread, addr: int) -> int:
    task = m.task_at(addr)
    return task.kthread_data if task else 0


@stub("kthread_stop", "kthread_stop_put")
def _kthread_stop(m: Machine, t: Thread, addr: int) -> Steps:
    m.mem.check(addr, L.TASK_SIZE)
    task = m.task_at(addr)
    if task is None:
        raise PageFault(addr, write=True)
    task.should_stop = True
    started, task.unstarted = not task.unstarted, False
    if started:
        m.wake_task(task)
    answer = yield Ask("kthread_stop", [task.info.pid, started])
    return int(answer)


@stub("kthread_bind")
def _kthread_bind(m: Machine, t: Thread, addr: int, cpu: int) -> None:
    m.mem.check(addr, L.TASK_SIZE)


@stub("kthread_complete_and_exit")
def _kthread_exit(m: Machine, t: Thread, completion: int, code: int) -> Steps:
    if completion:
        HANDLERS["complete"](m, t, completion)
    m.finish(t, code)
    yield Ask("never")
    return None


@stub("send_sig")
def _send_sig(m: Machine, t: Thread, sig: int, addr: int, private: int) -> Steps:
    m.mem.check(addr, L.TASK_SIZE)
    task = m.task_at(addr)
    if task is None:
        return -3  # ESRCH
    answer = yield Ask("send_sig", [task.info.pid, sig])
    return int(answer)


# -- tasks ------------------------------------------------------------------------------------------------------------


@stub("__task_pid_nr_ns")
def _task_pid_nr_ns(m: Machine, t: Thread, addr: int, kind: int, ns: int) -> int:
    return m.mem.get(addr or t.task.addr, L.TASK_PID if kind == 0 else L.TASK_TGID)


@stub("task_active_pid_ns")
def _task_active_pid_ns(m: Machine, t: Thread, addr: int) -> Steps:
    where = yield Ask("variable", ["init_pid_ns"])
    return int(where)


@stub("__get_task_comm")
def _get_task_comm(m: Machine, t: Thread, buf: int, size: int, addr: int) -> int:
    comm = m.mem.cstring(addr + L.TASK_COMM.offset, 16)
    if size:
        m.mem.write(buf, comm[: size - 1].ljust(size, b"\0"))
    return buf


@stub("__put_task_struct")
def _put_task_struct(m: Machine, t: Thread, addr: int) -> None:
    m.mem.check(addr, L.TASK_SIZE)


@stub("set_user_nice")
def _set_user_nice(m: Machine, t: Thread, addr: int, nice: int) -> None:
    m.mem.put(addr, L.TASK_PRIO, 120 + max(-20, min(nice, 19)))


@stub("capable")
def _capable(m: Machine, t: Thread, capability: int) -> bool:
    return t.task.info.uid == 0


@stub("from_kuid", "from_kuid_munged", "from_kgid", "from_kgid_munged", "make_kuid", "make_kgid")
def _same_id(m: Machine, t: Thread, ns: int, number: int) -> int:
    return number


@stub("migrate_disable", "migrate_enable")
def _migrate(m: Machine, t: Thread) -> None:
    return None


@stub("__local_bh_enable_ip")
def _local_bh_enable(m: Machine, t: Thread, ip: int, count: int) -> None:
    return None


@stub("smp_call_function_single")
def _smp_call_function_single(m: Machine, t: Thread, cpu: int, function: int, info: int, wait: int) -> Steps:
    if cpu:
        return -6  # ENXIO: emulated code runs on CPU 0
    yield Invoke(function, (info,))
    return 0


@stub("on_each_cpu_cond_mask")
def _on_each_cpu(m: Machine, t: Thread, condition: int, function: int, info: int, wait: bool, mask: int) -> Steps:
    if condition and not (yield Invoke(condition, (0, info))) & 0xFF:
        return None
    yield Invoke(function, (info,))
    return None


# -- static keys ------------------------------------------------------------------------------------------------------


def _static_key(names: str, change: Any) -> None:
    def run(m: Machine, t: Thread, key: int) -> int:
        m.set_key(key, change(signed(m.mem.load(key, 4), 32)))
        return 1

    for name in names.split():
        HANDLERS[name] = run


_static_key("static_key_slow_inc static_key_slow_inc_cpuslocked static_key_fast_inc_not_disabled", lambda n: n + 1)
_static_key("static_key_slow_dec static_key_slow_dec_cpuslocked", lambda n: max(n - 1, 0))
_static_key("static_key_enable static_key_enable_cpuslocked", lambda n: max(n, 1))
_static_key("static_key_disable static_key_disable_cpuslocked", lambda n: 0)


@stub("static_key_count")
def _static_key_count(m: Machine, t: Thread, key: int) -> int:
    return signed(m.mem.load(key, 4), 32)


# -- kobjects and sysfs -----------------------------------------------------------------------------------------------


@stub("kobject_init")
def _kobject_init(m: Machine, t: Thread, kobj: int, ktype: int) -> None:
    kset = m.mem.get(kobj, L.KOBJECT_KSET)
    m.mem.write(kobj, bytes(L.KOBJECT_SIZE))
    m.mem.put(kobj, L.KOBJECT_KSET, kset)  # set before, as the caller of kobject_add() is told to
    m.mem.store(kobj + 8, kobj + 8)
    m.mem.store(kobj + 16, kobj + 8)
    m.mem.put(kobj, L.KOBJECT_KTYPE, ktype)
    m.mem.put(kobj, L.KOBJECT_REF, 1)
    m.mem.store(kobj + 60, 1, 1)  # state_initialized


def _ktype(m: Machine, kobj: int) -> Generator[Any, Any, list[Any]]:
    """``[release, show, store, default groups]`` of a kobject's type."""
    ktype = m.mem.get(kobj, L.KOBJECT_KTYPE)
    if not ktype:
        return [0, 0, 0, []]
    ops = m.mem.get(ktype, L.KTYPE_SYSFS_OPS)
    show, store = (m.mem.get(ops, L.SYSFS_OPS_SHOW), m.mem.get(ops, L.SYSFS_OPS_STORE)) if ops else (0, 0)
    groups = m.mem.get(ktype, L.KTYPE_DEFAULT_GROUPS)
    found = (yield from groups_of(m, kobj, groups)) if groups else []
    return [m.mem.get(ktype, L.KTYPE_RELEASE), show, store, found]


def attribute(m: Machine, attr: int) -> list[Any]:
    """``[address, name, mode, show, store]`` of a ``struct kobj_attribute``; the functions only if it is one."""
    mem = m.mem
    name = mem.cstring(mem.get(attr, L.ATTRIBUTE_NAME), 256)
    try:
        show, store = mem.get(attr, L.KOBJ_ATTRIBUTE_SHOW), mem.get(attr, L.KOBJ_ATTRIBUTE_STORE)
    except PageFault:
        show = store = 0
    return [attr, name, mem.get(attr, L.ATTRIBUTE_MODE) & 0o777, show, store]


def _attributes(m: Machine, array: int) -> list[Any]:
    found: list[Any] = []
    while item := m.mem.load(array + 8 * len(found)):
        found.append(attribute(m, item))
        if len(found) > _MAX_ROWS:
            raise Crash("hung", "an array of attributes has no end")
    return found


def _group(m: Machine, kobj: int, group: int) -> Generator[Any, Any, list[Any]]:
    """``[name, attributes]`` of an attribute group; the ones that its ``is_visible`` hides are left out."""
    name = _string(m, m.mem.get(group, L.ATTRIBUTE_GROUP_NAME))
    array = m.mem.get(group, L.ATTRIBUTE_GROUP_ATTRS)
    if m.mem.get(group, L.ATTRIBUTE_GROUP_BIN_ATTRS):
        raise Crash("missing", "binary attributes of an attribute group")
    visible = m.mem.get(group, L.ATTRIBUTE_GROUP_IS_VISIBLE)
    attrs = []
    for i, attr in enumerate(_attributes(m, array) if array else []):
        if visible:
            attr[2] = (yield Invoke(visible, (kobj, attr[0], i))) & 0o777
        if attr[2]:
            attrs.append(attr)
    return [name, attrs]


def groups_of(m: Machine, kobj: int, array: int) -> Generator[Any, Any, list[Any]]:
    """The attribute groups of a NULL-terminated array."""
    found: list[Any] = []
    while group := m.mem.load(array + 8 * len(found)):
        found.append((yield from _group(m, kobj, group)))
        if len(found) > _MAX_ROWS:
            raise Crash("hung", "an array of attribute groups has no end")
    return found


def _names(m: Machine, group: int) -> tuple[bytes | None, list[bytes]]:
    """The name of a group, and those of its attributes."""
    array = m.mem.get(group, L.ATTRIBUTE_GROUP_ATTRS)
    name = _string(m, m.mem.get(group, L.ATTRIBUTE_GROUP_NAME))
    return name, [attr[1] for attr in _attributes(m, array)] if array else []


def _group_array(m: Machine, array: int) -> list[int]:
    found: list[int] = []
    while group := m.mem.load(array + 8 * len(found)) if array else 0:
        found.append(group)
        if len(found) > _MAX_ROWS:
            raise Crash("hung", "an array of attribute groups has no end")
    return found


@stub("kobject_add")
def _kobject_add(m: Machine, t: Thread, kobj: int, parent: int, name: bytes) -> Steps:
    kset = m.mem.get(kobj, L.KOBJECT_KSET)
    if kset and not parent:
        parent = kset + L.KSET_KOBJ
    ktype = yield from _ktype(m, kobj)
    answer = yield Ask("kobject_add", [kobj, parent, name, *ktype])
    return int(answer)


@stub("kobject_init_and_add")
def _kobject_init_and_add(m: Machine, t: Thread, kobj: int, ktype: int, parent: int, name: bytes) -> Steps:
    _kobject_init(m, t, kobj, ktype)
    return (yield from _kobject_add(m, t, kobj, parent, name))  # type: ignore[misc,no-any-return]


@stub("sysfs_create_file_ns")
def _sysfs_create_file(m: Machine, t: Thread, kobj: int, attr: int, ns: int) -> Steps:
    answer = yield Ask("sysfs_create", [kobj, None, [attribute(m, attr)]])
    return int(answer)


@stub("sysfs_remove_file_ns")
def _sysfs_remove_file(m: Machine, t: Thread, kobj: int, attr: int, ns: int) -> Steps:
    yield Ask("sysfs_remove", [kobj, None, [attribute(m, attr)[1]]])
    return None


@stub("sysfs_create_files")
def _sysfs_create_files(m: Machine, t: Thread, kobj: int, array: int) -> Steps:
    answer = yield Ask("sysfs_create", [kobj, None, _attributes(m, array)])
    return int(answer)


@stub("sysfs_remove_files")
def _sysfs_remove_files(m: Machine, t: Thread, kobj: int, array: int) -> Steps:
    yield Ask("sysfs_remove", [kobj, None, [a[1] for a in _attributes(m, array)]])
    return None


def _create_groups(m: Machine, kobj: int, groups: list[int]) -> Steps:
    for done, group in enumerate(groups):
        name, attrs = yield from _group(m, kobj, group)
        answer = int((yield Ask("sysfs_create", [kobj, name, attrs])))
        if answer:
            yield from _remove_groups(m, kobj, groups[:done])
            return answer
    return 0


def _remove_groups(m: Machine, kobj: int, groups: list[int]) -> Steps:
    for group in groups:
        name, attrs = _names(m, group)
        yield Ask("sysfs_remove", [kobj, name, attrs])
    return None


@stub("sysfs_create_group")
def _sysfs_create_group(m: Machine, t: Thread, kobj: int, group: int) -> Steps:
    return _create_groups(m, kobj, [group])


@stub("sysfs_create_groups")
def _sysfs_create_groups(m: Machine, t: Thread, kobj: int, groups: int) -> Steps:
    return _create_groups(m, kobj, _group_array(m, groups))


@stub("sysfs_remove_group")
def _sysfs_remove_group(m: Machine, t: Thread, kobj: int, group: int) -> Steps:
    return _remove_groups(m, kobj, [group])


@stub("sysfs_remove_groups")
def _sysfs_remove_groups(m: Machine, t: Thread, kobj: int, groups: int) -> Steps:
    return _remove_groups(m, kobj, _group_array(m, groups))


@stub("sysfs_notify")
def _sysfs_notify(m: Machine, t: Thread, kobj: int, directory: int, attr: int) -> Steps:
    yield Ask("sysfs_notify", [kobj, _string(m, directory), _string(m, attr)])
    return None
