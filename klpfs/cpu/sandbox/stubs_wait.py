"""Kernel functions that wait and tell the time: delays, schedule(), wait queues, completions, clocks, rate limits.

Source
    kernel/sched/{wait,completion,core}.c, kernel/time/{timer,timekeeping,time}.c, lib/ratelimit.c.
"""

from __future__ import annotations

import datetime
from collections.abc import Generator
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.layout import U32, U64, Field
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.thread import HANDLERS, Ask, Crash, Invoke, Sleep, Thread, Woken, signed, stub
from klpfs.cpu.sandbox.waiting import ERESTARTSYS, Steps, sleep_for, ticks_to_ns, wait_on, wake_all, wake_first

# -- time -------------------------------------------------------------------------------------------------------------


@stub("msleep")
def _msleep(m: Machine, t: Thread, milliseconds: int) -> Steps:
    # msecs_to_jiffies() + 1: at least as long as asked for
    ticks = -(-milliseconds * L.HZ // 1000) + 1
    yield from sleep_for(m, "D", max(ticks - 1, 1) * L.NSEC_PER_JIFFY)
    return None


@stub("msleep_interruptible")
def _msleep_interruptible(m: Machine, t: Thread, milliseconds: int) -> Steps:
    left = yield from sleep_for(m, "S", milliseconds * 1_000_000)
    return left // 1_000_000


@stub("usleep_range_state")
def _usleep_range(m: Machine, t: Thread, low: int, high: int, state: int) -> Steps:
    yield from sleep_for(m, "S" if state == L.TASK_INTERRUPTIBLE else "D", min(low, 1 << 40) * 1000)
    return None


@stub("__udelay")
def _udelay(m: Machine, t: Thread, microseconds: int) -> Steps:
    yield Sleep("R", min(microseconds, 20_000_000) * 1000)
    return None


@stub("__ndelay")
def _ndelay(m: Machine, t: Thread, nanoseconds: int) -> Steps:
    yield Sleep("R", min(nanoseconds, 20_000_000_000))
    return None


@stub("__const_udelay")
def _const_udelay(m: Machine, t: Thread, loops: int) -> Steps:
    # udelay(n) of a constant passes n * 0x10c7, ndelay(n) n * 5: units of 2**-32 seconds
    yield Sleep("R", min(loops * 1_000_000_000 >> 32, 20_000_000_000))
    return None


@stub("__cond_resched")
def _cond_resched(m: Machine, t: Thread) -> int:
    return 0


@stub("yield")
def _yield(m: Machine, t: Thread) -> Steps:
    yield Sleep("R", 0)
    return None


@stub("ktime_get", "ktime_get_raw", "ktime_get_mono_fast_ns", "ktime_get_raw_fast_ns", "sched_clock", "local_clock")
def _ktime_get(m: Machine, t: Thread) -> int:
    return m.now()


@stub("ktime_get_boot_fast_ns")
def _ktime_get_boot(m: Machine, t: Thread) -> int:
    return m.space.load(L.TIME_PAGE + L.TIME_BOOT)


@stub("ktime_get_real_fast_ns")
def _ktime_get_real(m: Machine, t: Thread) -> int:
    return m.space.load(L.TIME_PAGE + L.TIME_REAL)


@stub("ktime_get_with_offset", "ktime_get_coarse_with_offset")
def _ktime_get_with_offset(m: Machine, t: Thread, which: int) -> int:
    # TK_OFFS_REAL, TK_OFFS_BOOT, TK_OFFS_TAI
    return m.space.load(L.TIME_PAGE + (L.TIME_BOOT if which == 1 else L.TIME_REAL))


def _timespec(m: Machine, addr: int, nanoseconds: int) -> None:
    m.mem.store(addr, nanoseconds // 1_000_000_000)
    m.mem.store(addr + 8, nanoseconds % 1_000_000_000)


@stub("ktime_get_ts64", "ktime_get_coarse_ts64", "ktime_get_raw_ts64")
def _ktime_get_ts64(m: Machine, t: Thread, addr: int) -> None:
    _timespec(m, addr, m.now())


@stub("ktime_get_real_ts64", "ktime_get_coarse_real_ts64")
def _ktime_get_real_ts64(m: Machine, t: Thread, addr: int) -> None:
    _timespec(m, addr, m.space.load(L.TIME_PAGE + L.TIME_REAL))


@stub("ktime_get_seconds")
def _ktime_get_seconds(m: Machine, t: Thread) -> int:
    return m.now() // 1_000_000_000


@stub("ktime_get_real_seconds")
def _ktime_get_real_seconds(m: Machine, t: Thread) -> int:
    return m.space.load(L.TIME_PAGE + L.TIME_REAL) // 1_000_000_000


def _calendar(m: Machine, addr: int, seconds: int, *, long_year: bool) -> None:
    """``struct rtc_time``, and ``struct tm``, whose year is a long: 1900 is year 0."""
    days, rest = divmod(seconds, 86400)
    date = datetime.date.fromordinal(min(max(days + 719163, 1), datetime.date.max.toordinal()))
    fields = [rest % 60, rest // 60 % 60, rest // 3600, date.day, date.month - 1]
    for i, value in enumerate(fields):
        m.mem.store(addr + 4 * i, value, 4)
    at = addr + 24 if long_year else addr + 20
    m.mem.store(at, date.year - 1900 & U64, 8 if long_year else 4)
    at += 8 if long_year else 4
    m.mem.store(at, date.isoweekday() % 7, 4)
    m.mem.store(at + 4, date.timetuple().tm_yday - 1, 4)


@stub("rtc_time64_to_tm")
def _rtc_time64_to_tm(m: Machine, t: Thread, seconds: int, addr: int) -> None:
    _calendar(m, addr, seconds, long_year=False)
    m.mem.store(addr + 32, 0, 4)  # tm_isdst


@stub("time64_to_tm")
def _time64_to_tm(m: Machine, t: Thread, seconds: int, offset: int, addr: int) -> None:
    _calendar(m, addr, seconds + offset, long_year=True)


@stub("get_jiffies_64")
def _get_jiffies_64(m: Machine, t: Thread) -> int:
    return m.jiffies()


@stub("jiffies_to_msecs", "jiffies64_to_msecs")
def _jiffies_to_msecs(m: Machine, t: Thread, ticks: int) -> int:
    return ticks * (1000 // L.HZ)


@stub("jiffies_to_usecs")
def _jiffies_to_usecs(m: Machine, t: Thread, ticks: int) -> int:
    return ticks * (1_000_000 // L.HZ)


@stub("__msecs_to_jiffies")
def _msecs_to_jiffies(m: Machine, t: Thread, milliseconds: int) -> int:
    if signed(milliseconds, 32) < 0:
        return L.MAX_SCHEDULE_TIMEOUT >> 1
    return -(-milliseconds * L.HZ // 1000)


@stub("__usecs_to_jiffies")
def _usecs_to_jiffies(m: Machine, t: Thread, microseconds: int) -> int:
    return -(-microseconds * L.HZ // 1_000_000)


@stub("nsecs_to_jiffies", "nsecs_to_jiffies64")
def _nsecs_to_jiffies(m: Machine, t: Thread, nanoseconds: int) -> int:
    return nanoseconds // L.NSEC_PER_JIFFY


@stub("jiffies64_to_nsecs")
def _jiffies_to_nsecs(m: Machine, t: Thread, ticks: int) -> int:
    return ticks * L.NSEC_PER_JIFFY


@stub("jiffies_64_to_clock_t")
def _jiffies_to_clock_t(m: Machine, t: Thread, ticks: int) -> int:
    return ticks * 100 // L.HZ


def _round(m: Machine, ticks: int, up: bool = False) -> int:
    rest = ticks % L.HZ
    rounded = ticks - rest if rest < L.HZ // 4 and not up else ticks - rest + L.HZ
    return rounded if rounded > m.jiffies() else ticks


@stub("round_jiffies")
def _round_jiffies(m: Machine, t: Thread, ticks: int) -> int:
    return _round(m, ticks)


@stub("round_jiffies_up")
def _round_jiffies_up(m: Machine, t: Thread, ticks: int) -> int:
    return _round(m, ticks, True)


@stub("round_jiffies_relative")
def _round_jiffies_relative(m: Machine, t: Thread, ticks: int) -> int:
    return _round(m, ticks + m.jiffies()) - m.jiffies()


# -- schedule() and wait queues ---------------------------------------------------------------------------------------


def _letter(state: int) -> str:
    if state & L.TASK_INTERRUPTIBLE:
        return "S"
    return "I" if state & L.TASK_NOLOAD else "D"


def _schedule(m: Machine, t: Thread, timeout: int | None) -> Generator[Any, Any, int]:
    """``schedule_timeout``: sleep unless the task was woken meanwhile; nanoseconds left."""
    state = m.mem.get(t.task.addr, L.TASK_STATE)
    end = None if timeout is None else m.now() + timeout
    if state == L.TASK_RUNNING:
        yield Sleep("R", 0)
    else:
        yield Sleep(_letter(state), timeout)
    m.mem.put(t.task.addr, L.TASK_STATE, L.TASK_RUNNING)
    return 0 if end is None else max(end - m.now(), 0)


@stub("schedule", "io_schedule")
def _schedule_stub(m: Machine, t: Thread) -> Steps:
    yield from _schedule(m, t, None)
    return None


def _schedule_timeout(m: Machine, t: Thread, jiffies: int, state: int | None) -> Steps:
    if state is not None:
        m.mem.put(t.task.addr, L.TASK_STATE, state)
    if jiffies < 0:
        m.print(t, b"\x013schedule_timeout: wrong timeout value %x\n" % (jiffies & U64))
        m.mem.put(t.task.addr, L.TASK_STATE, L.TASK_RUNNING)
        return 0
    left = yield from _schedule(m, t, ticks_to_ns(jiffies))
    return -(-left // L.NSEC_PER_JIFFY) if jiffies < L.MAX_SCHEDULE_TIMEOUT else jiffies


def _schedule_timeouts() -> None:
    for name, state in (
        ("schedule_timeout", None),
        ("schedule_timeout_interruptible", L.TASK_INTERRUPTIBLE),
        ("schedule_timeout_uninterruptible", L.TASK_UNINTERRUPTIBLE),
        ("schedule_timeout_killable", L.TASK_UNINTERRUPTIBLE | 0x100),
        ("schedule_timeout_idle", L.TASK_UNINTERRUPTIBLE | L.TASK_NOLOAD),
    ):

        def run(m: Machine, t: Thread, jiffies: int, _state: int | None = state) -> Steps:
            return _schedule_timeout(m, t, jiffies, _state)

        HANDLERS[name] = run


_schedule_timeouts()


def _list_init(m: Machine, head: int) -> None:
    m.mem.store(head, head)
    m.mem.store(head + 8, head)


def _list_empty(m: Machine, head: int) -> bool:
    return m.mem.load(head) == head


def _list_add(m: Machine, new: int, prev: int, following: int) -> None:
    m.mem.store(following + 8, new)
    m.mem.store(new, following)
    m.mem.store(new + 8, prev)
    m.mem.store(prev, new)


def _list_del_init(m: Machine, entry: int) -> None:
    following, prev = m.mem.load(entry), m.mem.load(entry + 8)
    m.mem.store(following + 8, prev)
    m.mem.store(prev, following)
    _list_init(m, entry)


def _entry(waiter: int) -> int:
    return waiter + L.WAIT_ENTRY_LIST.offset


@stub("__init_waitqueue_head", "__init_swait_queue_head")
def _init_waitqueue_head(m: Machine, t: Thread, head: int, name: bytes, key: int) -> None:
    m.mem.store(head, 0, 4)
    _list_init(m, head + L.WAIT_HEAD_LIST.offset)


@stub("init_wait_entry")
def _init_wait_entry(m: Machine, t: Thread, waiter: int, flags: int) -> None:
    m.mem.put(waiter, L.WAIT_ENTRY_FLAGS, flags)
    m.mem.put(waiter, L.WAIT_ENTRY_PRIVATE, t.task.addr)
    m.mem.put(waiter, L.WAIT_ENTRY_FUNC, m.names.get("autoremove_wake_function", 0))
    _list_init(m, _entry(waiter))


def _enqueue(m: Machine, head: int, waiter: int, *, tail: bool) -> None:
    ring = head + L.WAIT_HEAD_LIST.offset
    if tail:
        _list_add(m, _entry(waiter), m.mem.load(ring + 8), ring)
    else:
        _list_add(m, _entry(waiter), ring, m.mem.load(ring))


@stub("prepare_to_wait")
def _prepare_to_wait(m: Machine, t: Thread, head: int, waiter: int, state: int) -> None:
    m.mem.put(waiter, L.WAIT_ENTRY_FLAGS, m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) & ~1)
    if _list_empty(m, _entry(waiter)):
        _enqueue(m, head, waiter, tail=False)
    m.mem.put(t.task.addr, L.TASK_STATE, state)


@stub("prepare_to_wait_exclusive")
def _prepare_to_wait_exclusive(m: Machine, t: Thread, head: int, waiter: int, state: int) -> bool:
    m.mem.put(waiter, L.WAIT_ENTRY_FLAGS, m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) | 1)
    was_empty = False
    if _list_empty(m, _entry(waiter)):
        was_empty = _list_empty(m, head + L.WAIT_HEAD_LIST.offset)
        _enqueue(m, head, waiter, tail=True)
    m.mem.put(t.task.addr, L.TASK_STATE, state)
    return was_empty


def _signal_pending(m: Machine, t: Thread) -> bool:
    return bool(m.mem.get(t.task.addr, L.TASK_THREAD_FLAGS) & (1 << L.TIF_SIGPENDING | 1 << L.TIF_NOTIFY_SIGNAL))


@stub("prepare_to_wait_event")
def _prepare_to_wait_event(m: Machine, t: Thread, head: int, waiter: int, state: int) -> int:
    if state & L.TASK_INTERRUPTIBLE and _signal_pending(m, t):
        _list_del_init(m, _entry(waiter))
        return -ERESTARTSYS
    if _list_empty(m, _entry(waiter)):
        _enqueue(m, head, waiter, tail=bool(m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) & 1))
    m.mem.put(t.task.addr, L.TASK_STATE, state)
    return 0


@stub("finish_wait")
def _finish_wait(m: Machine, t: Thread, head: int, waiter: int) -> None:
    m.mem.put(t.task.addr, L.TASK_STATE, L.TASK_RUNNING)
    if not _list_empty(m, _entry(waiter)):
        _list_del_init(m, _entry(waiter))


@stub("add_wait_queue")
def _add_wait_queue(m: Machine, t: Thread, head: int, waiter: int) -> None:
    _enqueue(m, head, waiter, tail=False)


@stub("add_wait_queue_exclusive")
def _add_wait_queue_exclusive(m: Machine, t: Thread, head: int, waiter: int) -> None:
    m.mem.put(waiter, L.WAIT_ENTRY_FLAGS, m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) | 1)
    _enqueue(m, head, waiter, tail=True)


@stub("remove_wait_queue")
def _remove_wait_queue(m: Machine, t: Thread, head: int, waiter: int) -> None:
    _list_del_init(m, _entry(waiter))


def _default_wake(m: Machine, waiter: int) -> bool:
    addr = m.mem.get(waiter, L.WAIT_ENTRY_PRIVATE)
    task = m.task_at(addr)
    if task is None or m.mem.get(addr, L.TASK_STATE) == L.TASK_RUNNING:
        return False
    m.wake_task(task)
    return True


@stub("default_wake_function")
def _default_wake_function(m: Machine, t: Thread, waiter: int, mode: int, flags: int, key: int) -> int:
    return _default_wake(m, waiter)


@stub("autoremove_wake_function")
def _autoremove_wake_function(m: Machine, t: Thread, waiter: int, mode: int, flags: int, key: int) -> int:
    woken = _default_wake(m, waiter)
    if woken:
        _list_del_init(m, _entry(waiter))
    return woken


@stub("woken_wake_function")
def _woken_wake_function(m: Machine, t: Thread, waiter: int, mode: int, flags: int, key: int) -> int:
    m.mem.put(waiter, L.WAIT_ENTRY_FLAGS, m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) | 2)
    return _default_wake(m, waiter)


@stub("wait_woken")
def _wait_woken(m: Machine, t: Thread, waiter: int, mode: int, timeout: int) -> Steps:
    if not m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) & 2:
        timeout = (yield from _schedule_timeout(m, t, timeout, mode)) or 0
    m.mem.put(waiter, L.WAIT_ENTRY_FLAGS, m.mem.get(waiter, L.WAIT_ENTRY_FLAGS) & ~2)
    return timeout


def _wake_up(m: Machine, head: int, mode: int, exclusive: int, key: int) -> Steps:
    mem = m.mem
    ring = head + L.WAIT_HEAD_LIST.offset
    entry = mem.load(ring)
    for _ in range(100_000):
        if entry == ring:
            return 0
        following = mem.load(entry)
        waiter = entry - L.WAIT_ENTRY_LIST.offset
        flags = mem.get(waiter, L.WAIT_ENTRY_FLAGS)
        woken = signed((yield Invoke(mem.get(waiter, L.WAIT_ENTRY_FUNC), (waiter, mode, 0, key))), 32)
        if woken < 0:
            return 0
        if woken and flags & 1:
            exclusive -= 1
            if not exclusive:
                return 0
        entry = following
    raise Crash("hung", "stuck in __wake_up")


@stub("__wake_up")
def _wake_up_stub(m: Machine, t: Thread, head: int, mode: int, count: int, key: int) -> Steps:
    return _wake_up(m, head, mode, count, key)


@stub("__wake_up_sync")
def _wake_up_sync(m: Machine, t: Thread, head: int, mode: int) -> Steps:
    return _wake_up(m, head, mode, 1, 0)


@stub("__wake_up_locked")
def _wake_up_locked(m: Machine, t: Thread, head: int, mode: int, count: int) -> Steps:
    return _wake_up(m, head, mode, count, 0)


@stub("wake_up_process")
def _wake_up_process(m: Machine, t: Thread, addr: int) -> int | Steps:
    m.mem.check(addr, L.TASK_SIZE)
    task = m.task_at(addr)
    if task is None:
        return 0
    if task.unstarted:
        task.unstarted = False
        return _start_kthread(task.info.pid)
    return m.wake_task(task)


def _start_kthread(pid: int) -> Steps:
    yield Ask("kthread_start", [pid])
    return 1


@stub("wake_up_state")
def _wake_up_state(m: Machine, t: Thread, addr: int, state: int) -> int | Steps:
    return _wake_up_process(m, t, addr)  # type: ignore[return-value]


# -- completions ------------------------------------------------------------------------------------------------------


def _wait_for(m: Machine, t: Thread, addr: int, state: str, jiffies: int) -> Generator[Any, Any, int]:
    """Jiffies left, at least 1; 0 when the time is up; -ERESTARTSYS."""
    timeout = ticks_to_ns(jiffies)
    end = None if timeout is None else m.now() + timeout
    while True:
        done = m.mem.get(addr, L.COMPLETION_DONE)
        left = None if end is None else end - m.now()
        if done:
            if done != L.COMPLETE_ALL:
                m.mem.put(addr, L.COMPLETION_DONE, done - 1)
            return 1 if left is None else max(1, -(-left // L.NSEC_PER_JIFFY))
        if left is not None and left <= 0:
            return 0
        if (yield from wait_on(m, t, addr, state, left)) is Woken.SIGNAL:
            return -ERESTARTSYS


@stub("wait_for_completion")
def _wait_for_completion(m: Machine, t: Thread, addr: int) -> Steps:
    yield from _wait_for(m, t, addr, "D", L.MAX_SCHEDULE_TIMEOUT)
    return None


@stub("wait_for_completion_timeout", "wait_for_completion_io_timeout")
def _wait_for_completion_timeout(m: Machine, t: Thread, addr: int, jiffies: int) -> Steps:
    return _wait_for(m, t, addr, "D", jiffies)


@stub("wait_for_completion_interruptible", "wait_for_completion_killable")
def _wait_for_completion_interruptible(m: Machine, t: Thread, addr: int) -> Steps:
    answer = yield from _wait_for(m, t, addr, "S", L.MAX_SCHEDULE_TIMEOUT)
    return min(answer, 0)


@stub("wait_for_completion_interruptible_timeout", "wait_for_completion_killable_timeout")
def _wait_for_completion_interruptible_timeout(m: Machine, t: Thread, addr: int, jiffies: int) -> Steps:
    return _wait_for(m, t, addr, "S", jiffies)


@stub("try_wait_for_completion")
def _try_wait_for_completion(m: Machine, t: Thread, addr: int) -> bool:
    done = m.mem.get(addr, L.COMPLETION_DONE)
    if done and done != L.COMPLETE_ALL:
        m.mem.put(addr, L.COMPLETION_DONE, done - 1)
    return bool(done)


@stub("completion_done")
def _completion_done(m: Machine, t: Thread, addr: int) -> bool:
    return bool(m.mem.get(addr, L.COMPLETION_DONE))


@stub("complete")
def _complete(m: Machine, t: Thread, addr: int) -> None:
    done = m.mem.get(addr, L.COMPLETION_DONE)
    if done != L.COMPLETE_ALL:
        m.mem.put(addr, L.COMPLETION_DONE, done + 1)
    wake_first(m, addr)


@stub("complete_all")
def _complete_all(m: Machine, t: Thread, addr: int) -> None:
    m.mem.put(addr, L.COMPLETION_DONE, L.COMPLETE_ALL)
    wake_all(m, addr)


# -- rate limits ------------------------------------------------------------------------------------------------------


def _rate_limit(m: Machine, t: Thread, rs: int, name: bytes) -> int:
    def get(field: Field) -> int:
        return m.mem.get(rs, field)

    interval, burst = signed(get(L.RATELIMIT_INTERVAL), 32), signed(get(L.RATELIMIT_BURST), 32)
    if interval <= 0 or burst <= 0:
        return int(interval == 0 or burst > 0)
    begin, now = get(L.RATELIMIT_BEGIN), m.jiffies()
    if not begin or now > begin + interval:
        missed = get(L.RATELIMIT_MISSED)
        if missed:
            m.print(t, b"\x014%s: %d callbacks suppressed\n" % (name, missed))
        m.mem.put(rs, L.RATELIMIT_MISSED, 0)
        m.mem.put(rs, L.RATELIMIT_PRINTED, 0)
        m.mem.put(rs, L.RATELIMIT_BEGIN, now)
    printed = get(L.RATELIMIT_PRINTED)
    if burst > printed:
        m.mem.put(rs, L.RATELIMIT_PRINTED, printed + 1)
        return 1
    m.mem.put(rs, L.RATELIMIT_MISSED, get(L.RATELIMIT_MISSED) + 1)
    return 0


@stub("___ratelimit")
def _ratelimit(m: Machine, t: Thread, rs: int, name: bytes) -> int:
    return _rate_limit(m, t, rs, name)


@stub("__printk_ratelimit")
def _printk_ratelimit(m: Machine, t: Thread, name: bytes) -> int:
    if not m.printk_ratelimit:
        m.printk_ratelimit = rs = m.heap.alloc(32, "", zero=True)
        m.mem.put(rs, L.RATELIMIT_INTERVAL, 5 * L.HZ)
        m.mem.put(rs, L.RATELIMIT_BURST, 10)
    return _rate_limit(m, t, m.printk_ratelimit, name)


@stub("printk_timed_ratelimit")
def _printk_timed_ratelimit(m: Machine, t: Thread, where: int, milliseconds: int) -> bool:
    now, before = m.jiffies(), m.mem.load(where)
    if before and (now - before & U32) <= milliseconds * L.HZ // 1000:
        return False
    m.mem.store(where, now)
    return True
