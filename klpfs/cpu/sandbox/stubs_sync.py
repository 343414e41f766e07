"""Kernel functions that lock: mutexes, semaphores, spinlocks, reference counts, RCU.

Model
    The state of a lock is where inlined code looks for it, in emulated memory; who holds it is kept here, so that a
    thread that would wait for itself, or for a circle of others, is reported instead of hanging. A thread that waits is
    asleep for the daemon, too.

Source
    kernel/locking/{mutex,rwsem,semaphore,spinlock}.c, kernel/rcu, lib/refcount.c, lib/dec_and_lock.c.
"""

from __future__ import annotations

from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.thread import Crash, Spin, Thread, Woken, stub
from klpfs.cpu.sandbox.waiting import EINTR, ETIME, Steps, sleep_for, ticks_to_ns, wait_on, wake_all, wake_first

_READER, _WRITER = 0x100, 1
_QRW_WRITER, _QRW_READER = 0xFF, 0x200


# -- sleeping on an address -------------------------------------------------------------------------------------------


def _no_deadlock(m: Machine, t: Thread, lock: int) -> None:
    """Crash *t* if waiting for the holder of *lock* means waiting for itself."""
    seen: set[int] = set()
    holder = m.holders.get(lock)
    while holder is not None and holder.tid not in seen:
        if holder is t or (holder.task is t.task and holder.state == "asked"):
            raise Crash("hung", "possible deadlock: the lock is held by the task that waits for it")
        seen.add(holder.tid)
        holder = m.holders.get(holder.waits_for) if holder.waits_for is not None else None


# -- fairness: who was woken and came too late gets the lock next (MUTEX_FLAG_HANDOFF, RWSEM_FLAG_HANDOFF) -------------


def _reserved(m: Machine, t: Thread, lock: int) -> bool:
    """Whether *lock* is meant for somebody else."""
    waiter = m.reserved.get(lock)
    return waiter is not None and waiter is not t and waiter.state != "dead"


def _taken(m: Machine, t: Thread, lock: int) -> None:
    if m.reserved.get(lock) is t:
        del m.reserved[lock]


def _wake_next(m: Machine, lock: int) -> None:
    waiter = m.reserved.get(lock)
    if waiter is not None and waiter.waits_for == lock:
        m.queues.remove(lock, waiter)
        m.wake(waiter)
    else:
        wake_first(m, lock)


def _acquire(m: Machine, t: Thread, lock: int, state: str, take: Any, release: Any) -> Steps:
    """Sleep until *take* succeeds; *release* wakes the next one if a signal ends that."""
    woken = False
    while not take():
        _no_deadlock(m, t, lock)
        if woken and not _reserved(m, t, lock):
            m.reserved[lock] = t
        if (yield from wait_on(m, t, lock, state)) is Woken.SIGNAL:
            _taken(m, t, lock)
            release(m, lock)
            return -EINTR
        woken = True
    return 0


# -- mutexes ----------------------------------------------------------------------------------------------------------


@stub("__mutex_init")
def _mutex_init(m: Machine, t: Thread, lock: int, name: int, key: int) -> None:
    m.mem.write(lock, bytes(16))
    head = lock + L.MUTEX_LIST.offset
    m.mem.store(head, head)
    m.mem.store(head + 8, head)
    m.holders.pop(lock, None)


def _mutex_try(m: Machine, t: Thread, lock: int) -> bool:
    if m.mem.get(lock, L.MUTEX_OWNER) & ~7 or _reserved(m, t, lock):
        return False
    m.mem.put(lock, L.MUTEX_OWNER, t.task.addr)
    m.holders[lock] = t
    _taken(m, t, lock)
    return True


def _mutex_lock(m: Machine, t: Thread, lock: int, state: str) -> Steps:
    return _acquire(m, t, lock, state, lambda: _mutex_try(m, t, lock), _wake_next)


@stub("mutex_lock")
def _mutex_lock_plain(m: Machine, t: Thread, lock: int) -> int | Steps:
    return 0 if _mutex_try(m, t, lock) else _mutex_lock(m, t, lock, "D")


@stub("mutex_lock_interruptible", "mutex_lock_killable")
def _mutex_lock_interruptible(m: Machine, t: Thread, lock: int) -> int | Steps:
    return 0 if _mutex_try(m, t, lock) else _mutex_lock(m, t, lock, "S")


@stub("mutex_trylock")
def _mutex_trylock(m: Machine, t: Thread, lock: int) -> int:
    return _mutex_try(m, t, lock)


@stub("mutex_unlock")
def _mutex_unlock(m: Machine, t: Thread, lock: int) -> None:
    m.mem.put(lock, L.MUTEX_OWNER, 0)
    m.holders.pop(lock, None)
    _wake_next(m, lock)


@stub("mutex_is_locked")
def _mutex_is_locked(m: Machine, t: Thread, lock: int) -> bool:
    return bool(m.mem.get(lock, L.MUTEX_OWNER) & ~7)


@stub("refcount_dec_and_mutex_lock", "atomic_dec_and_mutex_lock")
def _dec_and_mutex_lock(m: Machine, t: Thread, counter: int, lock: int) -> Steps:
    value = m.mem.load(counter, 4)
    if value != 1:
        m.mem.store(counter, value - 1, 4)
        return 0
    yield from _mutex_lock(m, t, lock, "D")
    m.mem.store(counter, m.mem.load(counter, 4) - 1, 4)
    if m.mem.load(counter, 4) == 0:
        return 1
    _mutex_unlock(m, t, lock)
    return 0


# -- read-write semaphores and semaphores -----------------------------------------------------------------------------


@stub("__init_rwsem")
def _init_rwsem(m: Machine, t: Thread, sem: int, name: int, key: int) -> None:
    m.mem.write(sem, bytes(40))
    m.mem.store(sem + 24, sem + 24)
    m.mem.store(sem + 32, sem + 24)
    m.holders.pop(sem, None)


def _rwsem_try(m: Machine, t: Thread, sem: int, write: bool) -> bool:
    count = m.mem.get(sem, L.RWSEM_COUNT)
    if count & _WRITER or (write and count) or _reserved(m, t, sem):
        return False
    m.mem.put(sem, L.RWSEM_COUNT, count | _WRITER if write else count + _READER)
    if write:
        m.holders[sem] = t
    _taken(m, t, sem)
    return True


def _rwsem_lock(m: Machine, t: Thread, sem: int, write: bool, state: str) -> Steps:
    return _acquire(m, t, sem, state, lambda: _rwsem_try(m, t, sem, write), wake_all)


@stub("down_read")
def _down_read(m: Machine, t: Thread, sem: int) -> Steps:
    return _rwsem_lock(m, t, sem, False, "D")


@stub("down_read_interruptible", "down_read_killable")
def _down_read_interruptible(m: Machine, t: Thread, sem: int) -> Steps:
    return _rwsem_lock(m, t, sem, False, "S")


@stub("down_read_trylock")
def _down_read_trylock(m: Machine, t: Thread, sem: int) -> int:
    return _rwsem_try(m, t, sem, False)


@stub("down_write")
def _down_write(m: Machine, t: Thread, sem: int) -> Steps:
    return _rwsem_lock(m, t, sem, True, "D")


@stub("down_write_killable")
def _down_write_killable(m: Machine, t: Thread, sem: int) -> Steps:
    return _rwsem_lock(m, t, sem, True, "S")


@stub("down_write_trylock")
def _down_write_trylock(m: Machine, t: Thread, sem: int) -> int:
    return _rwsem_try(m, t, sem, True)


@stub("up_read")
def _up_read(m: Machine, t: Thread, sem: int) -> None:
    m.mem.put(sem, L.RWSEM_COUNT, max(m.mem.get(sem, L.RWSEM_COUNT) - _READER, 0))
    wake_all(m, sem)


@stub("up_write")
def _up_write(m: Machine, t: Thread, sem: int) -> None:
    m.mem.put(sem, L.RWSEM_COUNT, m.mem.get(sem, L.RWSEM_COUNT) & ~_WRITER)
    m.holders.pop(sem, None)
    wake_all(m, sem)


@stub("downgrade_write")
def _downgrade_write(m: Machine, t: Thread, sem: int) -> None:
    m.mem.put(sem, L.RWSEM_COUNT, _READER)
    m.holders.pop(sem, None)
    wake_all(m, sem)


def _down(m: Machine, t: Thread, sem: int, state: str, timeout: int | None = None) -> Steps:
    end = None if timeout is None else m.now() + timeout
    woken = False
    while True:
        count = m.mem.get(sem, L.SEMAPHORE_COUNT)
        if count > 0 and not _reserved(m, t, sem):
            m.mem.put(sem, L.SEMAPHORE_COUNT, count - 1)
            _taken(m, t, sem)
            return 0
        if woken and not _reserved(m, t, sem):
            m.reserved[sem] = t
        left = None if end is None else end - m.now()
        if left is not None and left <= 0:
            _taken(m, t, sem)
            _wake_next(m, sem)
            return -ETIME
        if (yield from wait_on(m, t, sem, state, left)) is Woken.SIGNAL:
            _taken(m, t, sem)
            _wake_next(m, sem)
            return -EINTR
        woken = True


@stub("down")
def _down_plain(m: Machine, t: Thread, sem: int) -> Steps:
    return _down(m, t, sem, "D")


@stub("down_interruptible", "down_killable")
def _down_interruptible(m: Machine, t: Thread, sem: int) -> Steps:
    return _down(m, t, sem, "S")


@stub("down_timeout")
def _down_timeout(m: Machine, t: Thread, sem: int, jiffies: int) -> Steps:
    return _down(m, t, sem, "D", ticks_to_ns(jiffies))


@stub("down_trylock")
def _down_trylock(m: Machine, t: Thread, sem: int) -> int:
    count = m.mem.get(sem, L.SEMAPHORE_COUNT)
    if count <= 0:
        return 1
    m.mem.put(sem, L.SEMAPHORE_COUNT, count - 1)
    return 0


@stub("up")
def _up(m: Machine, t: Thread, sem: int) -> None:
    m.mem.put(sem, L.SEMAPHORE_COUNT, m.mem.get(sem, L.SEMAPHORE_COUNT) + 1)
    _wake_next(m, sem)


# -- spinning locks: the locked byte of a qspinlock, the counts of a qrwlock ------------------------------------------


def _spin_try(m: Machine, t: Thread, lock: int) -> bool:
    if m.mem.load(lock, 4):
        return False
    m.mem.store(lock, 1, 4)
    m.holders[lock] = t
    return True


def _spin_wait(m: Machine, t: Thread, lock: int, take: Any) -> Steps:
    while not take(m, t, lock):
        if m.holders.get(lock) is t:
            raise Crash("hung", "spinlock recursion")
        yield Spin()
    return 0


@stub("_raw_spin_lock", "_raw_spin_lock_irq", "_raw_spin_lock_bh", "_raw_spin_lock_irqsave")
def _spin_lock(m: Machine, t: Thread, lock: int) -> int | Steps:
    return 0 if _spin_try(m, t, lock) else _spin_wait(m, t, lock, _spin_try)


@stub("_raw_spin_trylock", "_raw_spin_trylock_bh")
def _spin_trylock(m: Machine, t: Thread, lock: int) -> int:
    return _spin_try(m, t, lock)


@stub("_raw_spin_unlock", "_raw_spin_unlock_irq", "_raw_spin_unlock_bh", "_raw_spin_unlock_irqrestore")
def _spin_unlock(m: Machine, t: Thread, lock: int, flags: int = 0) -> None:
    m.mem.store(lock, 0, 1)
    m.holders.pop(lock, None)


def _read_try(m: Machine, t: Thread, lock: int) -> bool:
    counts = m.mem.load(lock, 4)
    if counts & _QRW_WRITER:
        return False
    m.mem.store(lock, counts + _QRW_READER, 4)
    return True


def _write_try(m: Machine, t: Thread, lock: int) -> bool:
    if m.mem.load(lock, 4):
        return False
    m.mem.store(lock, _QRW_WRITER, 4)
    m.holders[lock] = t
    return True


@stub("_raw_read_lock", "_raw_read_lock_irq", "_raw_read_lock_bh", "_raw_read_lock_irqsave")
def _read_lock(m: Machine, t: Thread, lock: int) -> Steps:
    return _spin_wait(m, t, lock, _read_try)


@stub("_raw_write_lock", "_raw_write_lock_irq", "_raw_write_lock_bh", "_raw_write_lock_irqsave")
def _write_lock(m: Machine, t: Thread, lock: int) -> Steps:
    return _spin_wait(m, t, lock, _write_try)


@stub("_raw_read_unlock", "_raw_read_unlock_irq", "_raw_read_unlock_bh", "_raw_read_unlock_irqrestore")
def _read_unlock(m: Machine, t: Thread, lock: int, flags: int = 0) -> None:
    m.mem.store(lock, max(m.mem.load(lock, 4) - _QRW_READER, 0), 4)


@stub("_raw_write_unlock", "_raw_write_unlock_irq", "_raw_write_unlock_bh", "_raw_write_unlock_irqrestore")
def _write_unlock(m: Machine, t: Thread, lock: int, flags: int = 0) -> None:
    m.mem.store(lock, 0, 1)
    m.holders.pop(lock, None)


@stub("_atomic_dec_and_lock", "refcount_dec_and_lock")
def _dec_and_lock(m: Machine, t: Thread, counter: int, lock: int) -> Steps:
    value = m.mem.load(counter, 4)
    if value != 1:
        m.mem.store(counter, value - 1, 4)
        return 0
    yield from _spin_wait(m, t, lock, _spin_try)
    m.mem.store(counter, m.mem.load(counter, 4) - 1, 4)
    if m.mem.load(counter, 4) == 0:
        return 1
    _spin_unlock(m, t, lock)
    return 0


# -- reference counts -------------------------------------------------------------------------------------------------

_REFCOUNT = (
    (19, "saturated; leaking memory."),
    (19, "saturated; leaking memory."),
    (25, "addition on 0; use-after-free."),
    (28, "underflow; use-after-free."),
    (31, "decrement hit 0; leaking memory."),
)


@stub("refcount_warn_saturate")
def _refcount_warn(m: Machine, t: Thread, counter: int, kind: int) -> None:
    m.mem.store(counter, 0xC0000000, 4)  # REFCOUNT_SATURATED
    line, text = _REFCOUNT[kind] if 0 <= kind < len(_REFCOUNT) else (34, "unknown saturation event!?.")
    m.warn(t, f"lib/refcount.c:{line}", f"refcount_t: {text}", once=True)


@stub("refcount_dec_if_one")
def _refcount_dec_if_one(m: Machine, t: Thread, counter: int) -> bool:
    if m.mem.load(counter, 4) != 1:
        return False
    m.mem.store(counter, 0, 4)
    return True


@stub("refcount_dec_not_one")
def _refcount_dec_not_one(m: Machine, t: Thread, counter: int) -> bool:
    value = m.mem.load(counter, 4)
    if value == 1:
        return False
    if value != 0xC0000000:
        m.mem.store(counter, value - 1, 4)
    return True


# -- RCU --------------------------------------------------------------------------------------------------------------


@stub("__rcu_read_lock", "__rcu_read_unlock")
def _rcu_read(m: Machine, t: Thread) -> None:
    return None


@stub("__srcu_read_lock")
def _srcu_read_lock(m: Machine, t: Thread, srcu: int) -> int:
    return 0


@stub("__srcu_read_unlock")
def _srcu_read_unlock(m: Machine, t: Thread, srcu: int, index: int) -> None:
    return None


@stub("init_srcu_struct")
def _init_srcu(m: Machine, t: Thread, srcu: int) -> int:
    m.mem.write(srcu, bytes(24))
    return 0


@stub("cleanup_srcu_struct")
def _cleanup_srcu(m: Machine, t: Thread, srcu: int) -> None:
    return None


def _grace_period(m: Machine, ticks: int) -> Steps:
    yield from sleep_for(m, "D", ticks * L.NSEC_PER_JIFFY)
    return None


@stub("synchronize_rcu", "synchronize_rcu_expedited")
def _synchronize_rcu(m: Machine, t: Thread) -> Steps:
    return _grace_period(m, 1)


@stub("synchronize_srcu", "synchronize_srcu_expedited")
def _synchronize_srcu(m: Machine, t: Thread, srcu: int) -> Steps:
    return _grace_period(m, 1)


@stub("rcu_barrier")
def _rcu_barrier(m: Machine, t: Thread) -> Steps:
    return _grace_period(m, 3)  # callbacks are run one tick after they were posted


@stub("srcu_barrier")
def _srcu_barrier(m: Machine, t: Thread, srcu: int) -> Steps:
    return _grace_period(m, 3)


@stub("kvfree_call_rcu")
def _kvfree_call_rcu(m: Machine, t: Thread, head: int, ptr: int) -> None:
    for thread in m.threads.values():
        thread.quiet = False
    m.deferred.append(ptr)
