"""The consistency model: how every task gets from one set of functions to the other.

Model
    A transition marks all tasks as pending and then tries to switch each: at once if its stack is reliable and free of
    the functions in question, else again every second. A task that leaves the kernel switches itself. The transition is
    complete when no task is left.

Locks
    Everything here runs under ``klp_mutex``, but for :func:`klp_update_patch_state`, which a task calls for itself.

Source
    kernel/livepatch/transition.c, Documentation/livepatch/livepatch.rst.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator

import trio

from klpfs.kernel.clock import HZ
from klpfs.kernel.sched import Task, detached
from klpfs.livepatch.callbacks import klp_post_patch_callback, klp_post_unpatch_callback
from klpfs.livepatch.patch import klp_find_ops, klp_unpatch_objects
from klpfs.livepatch.types import (
    KLP_TRANSITION_IDLE,
    KLP_TRANSITION_PATCHED,
    KLP_TRANSITION_UNPATCHED,
    Klp,
    KlpFunc,
    KlpPatch,
)

__all__ = [
    "SIGNALS_TIMEOUT",
    "StackCheck",
    "klp_cancel_transition",
    "klp_force_transition",
    "klp_init_transition",
    "klp_reverse_transition",
    "klp_send_signals",
    "klp_start_transition",
    "klp_transition_work_fn",
    "klp_try_complete_transition",
    "klp_update_patch_state",
]

SIGNALS_TIMEOUT = 15
"""Failed attempts between two rounds of signals."""

MAX_STACK_ENTRIES = 100
"""A stack that fills the array is unreliable (``stack_trace_consume_entry`` stops the walk)."""


def _target(klp: Klp) -> str:
    return "patching" if klp.klp_target_state == KLP_TRANSITION_PATCHED else "unpatching"


def _name(klp: Klp) -> str:
    assert klp.klp_transition_patch is not None
    return klp.klp_transition_patch.name


async def klp_transition_work_fn(klp: Klp) -> None:
    """The delayed work that retries."""
    async with klp.klp_mutex:
        if klp.klp_transition_patch is not None:
            await klp_try_complete_transition(klp)


async def _klp_synchronize_transition() -> None:
    # The kernel schedules a no-op on each CPU, so that no handler is left halfway. Handlers here are atomic; what
    # remains is that others get to run.
    await trio.lowlevel.checkpoint()


def _all_tasks(klp: Klp) -> Iterator[Task]:
    yield from klp.kernel.sched.for_each_process_thread()
    yield from klp.kernel.sched.idle


async def klp_complete_transition(klp: Klp) -> None:
    """Every task is switched: remove what is no longer reached, run the post callbacks, end the transition."""
    from klpfs.livepatch.core import klp_discard_nops, klp_unpatch_replaced_patches

    patch = klp.klp_transition_patch
    assert patch is not None
    target = klp.klp_target_state
    klp.debug["completing"](patch.name, _target(klp))

    if patch.replace and target == KLP_TRANSITION_PATCHED:
        klp_unpatch_replaced_patches(klp, patch)
        await klp_discard_nops(klp, patch)

    if target == KLP_TRANSITION_UNPATCHED:
        klp_unpatch_objects(klp, patch)
        await _klp_synchronize_transition()

    for _, func in patch.funcs():
        func.transition = False

    if target == KLP_TRANSITION_PATCHED:
        await _klp_synchronize_transition()

    for task in _all_tasks(klp):
        klp.kernel.warn_on_once(task.patch_pending, "kernel/livepatch/transition.c klp_complete_transition")
        task.patch_state = KLP_TRANSITION_IDLE

    for obj in patch.obj_list:
        if not obj.is_loaded:
            continue
        if target == KLP_TRANSITION_PATCHED:
            await klp_post_patch_callback(obj)
        elif target == KLP_TRANSITION_UNPATCHED:
            await klp_post_unpatch_callback(obj)

    klp.log.notice(f"'{patch.name}': {_target(klp)} complete")
    klp.klp_target_state = KLP_TRANSITION_IDLE
    klp.klp_transition_patch = None
    klp.transition_done.set()
    klp.transition_done = trio.Event()


async def klp_cancel_transition(klp: Klp) -> None:
    """End a transition that was initialised but not started (a callback refused, or ftrace did)."""
    where = "kernel/livepatch/transition.c klp_cancel_transition"
    if klp.kernel.warn_on_once(klp.klp_target_state != KLP_TRANSITION_PATCHED, where):
        return
    klp.debug["canceling"](_name(klp))
    klp.klp_target_state = KLP_TRANSITION_UNPATCHED
    await klp_complete_transition(klp)


def klp_update_patch_state(klp: Klp, task: Task) -> None:
    """Switch *task* if it is pending. The caller sees to it that it does not run patched code (or is itself)."""
    if task.patch_pending:
        task.patch_pending = False
        task.patch_state = klp.klp_target_state


def _forbidden_range(klp: Klp, func: KlpFunc) -> tuple[int, int]:
    """``(address, size)`` of the code that may not be on a stack while *func* is in transition."""
    if klp.klp_target_state == KLP_TRANSITION_UNPATCHED:
        return func.new_func, func.new_size
    ops = klp_find_ops(klp, func.old_func)
    assert ops is not None
    below = ops.func_stack.index(func) + 1
    if below == len(ops.func_stack):
        # The kernel asks for a stack of one. With more, this is a patch below others whose disabling was reversed, and
        # it reads whatever lies before the list's head.
        return func.old_func, func.old_size
    return ops.func_stack[below].new_func, ops.func_stack[below].new_size


class StackCheck:
    """The ranges that one pass over the tasks looks for, ready for binary search.

    The kernel walks all functions for each task; sorting once gives the same answer for 100,000 tasks in a pass. Most
    of them sleep in the same few places, so what was looked up once is remembered.
    """

    def __init__(self, klp: Klp) -> None:
        patch = klp.klp_transition_patch
        assert patch is not None
        ranges = []
        for order, (obj, func) in enumerate(patch.funcs()):
            if obj.patched:
                addr, size = _forbidden_range(klp, func)
                ranges.append((addr, addr + size, order, func.old_name))
        ranges.sort()
        self._ranges = ranges
        self._starts = [r[0] for r in ranges]
        self._clean: set[int] = set()
        self._dirty: dict[int, tuple[int, str]] = {}

    def find(self, entries: list[int]) -> str | None:
        """The name of the first function, in the patch's order, whose code is on the stack."""
        if self._clean.issuperset(entries):
            return None
        best: tuple[int, str] | None = None
        for address in entries:
            if address in self._clean:
                continue
            hit = self._dirty.get(address) or self._first_around(address)
            if hit is None:
                self._clean.add(address)
                continue
            self._dirty[address] = hit
            if best is None or hit < best:
                best = hit
        return None if best is None else best[1]

    def _first_around(self, address: int) -> tuple[int, str] | None:
        """The first function, by its place in the patch, that *address* lies in. Those of one address are aliases."""
        best: tuple[int, str] | None = None
        i = bisect_right(self._starts, address) - 1
        start = self._starts[i] if i >= 0 else 0
        while i >= 0 and self._starts[i] == start:
            _, end, order, name = self._ranges[i]
            if address < end and (best is None or order < best[0]):
                best = order, name
            i -= 1
        return best


def _klp_check_and_switch_task(klp: Klp, task: Task, check: StackCheck) -> tuple[int, str]:
    """``(0, "")`` if *task* could be switched, else an errno and, for EADDRINUSE, the function it sleeps in."""
    if task.on_cpu and task is not klp.kernel.sched.current:
        return errno.EBUSY, ""
    if not task.reliable:
        return errno.EINVAL, ""
    entries = task.trace()
    if entries:
        if len(entries) >= MAX_STACK_ENTRIES:
            return errno.EINVAL, ""
        name = check.find(entries)
        if name is not None:
            return errno.EADDRINUSE, name
    task.patch_pending = False
    task.patch_state = klp.klp_target_state
    return 0, ""


def _klp_try_switch_task(klp: Klp, task: Task, check: StackCheck) -> bool:
    if task.patch_state == klp.klp_target_state:
        return True
    ret, old_name = _klp_check_and_switch_task(klp, task, check)
    match ret:
        case 0:
            return True
        case errno.EBUSY:
            klp.debug["running"]("klp_try_switch_task", task.comm, task.pid)
        case errno.EINVAL:
            klp.debug["unreliable"]("klp_try_switch_task", task.comm, task.pid)
        case errno.EADDRINUSE:
            klp.debug["sleeping"]("klp_try_switch_task", task.comm, task.pid, old_name)
    return False


def klp_send_signals(klp: Klp) -> None:
    """Prod the tasks that are left: kernel threads are woken, the others get a fake signal."""
    if klp.klp_signals_cnt == SIGNALS_TIMEOUT or not klp.kernel.profile.has("signals_by_itself"):
        klp.log.notice("signaling remaining tasks")
    sched = klp.kernel.sched
    for task in sched.for_each_process_thread():
        if not task.patch_pending:
            continue
        if task.kthread:
            sched.wake_up_state(task, "S")
        else:
            sched.set_notify_signal(task)


async def klp_try_complete_transition(klp: Klp) -> None:
    """Try to switch every task that is left; complete the transition, or come back in a second."""
    from klpfs.livepatch.core import klp_free_patch_async, klp_free_replaced_patches_async

    patch = klp.klp_transition_patch
    assert patch is not None
    klp.kernel.warn_on_once(
        klp.klp_target_state == KLP_TRANSITION_IDLE, "kernel/livepatch/transition.c klp_try_complete_transition"
    )
    complete = True
    target = klp.klp_target_state
    check = StackCheck(klp)
    for task in klp.kernel.sched.for_each_process_thread():
        if task.patch_state != target and not _klp_try_switch_task(klp, task, check):
            complete = False
    for task in klp.kernel.sched.idle:
        if not _klp_try_switch_task(klp, task, check):
            complete = False
            # wake_up_if_idle(): the idle loop is passed at once, and switches the task
            klp_update_patch_state(klp, task)

    assert klp.transition_work is not None
    if not complete:
        periodic = klp.kernel.profile.has("signals_by_itself")
        if periodic and klp.klp_signals_cnt and klp.klp_signals_cnt % SIGNALS_TIMEOUT == 0:
            klp_send_signals(klp)
        klp.klp_signals_cnt += 1
        delay = klp.kernel.clock.round_jiffies_relative(HZ)
        klp.kernel.workqueue.schedule_delayed_work(klp.transition_work, delay)
        return

    await klp_complete_transition(klp)
    if not patch.enabled:
        await klp_free_patch_async(klp, patch)
    elif patch.replace:
        await klp_free_replaced_patches_async(klp, patch)


async def _tick(klp: Klp, task: Task) -> None:
    """A task that runs in user space is interrupted by the next tick, and switches on its way back."""
    await klp.kernel.clock.sleep(1 / HZ)
    if task.on_cpu and task.in_user:
        klp_update_patch_state(klp, task)


def klp_start_transition(klp: Klp) -> None:
    """Let tasks begin to switch to the target state."""
    klp.kernel.warn_on_once(
        klp.klp_target_state == KLP_TRANSITION_IDLE, "kernel/livepatch/transition.c klp_start_transition"
    )
    klp.log.notice(f"'{_name(klp)}': starting {_target(klp)} transition")
    for task in _all_tasks(klp):
        if task.patch_state != klp.klp_target_state:
            task.patch_pending = True
            if task.on_cpu and task.in_user:
                detached(klp.kernel.nursery, _tick, klp, task, name=f"tick {task.comm}")
    klp.klp_signals_cnt = 0


def klp_init_transition(klp: Klp, patch: KlpPatch, state: int) -> None:
    """Make *patch* the one in transition, towards *state*; all tasks start out in the other state."""
    where = "kernel/livepatch/transition.c klp_init_transition"
    klp.kernel.warn_on_once(klp.klp_target_state != KLP_TRANSITION_IDLE, where)
    klp.klp_transition_patch = patch
    klp.klp_target_state = state
    klp.debug["initializing"](patch.name, _target(klp))
    initial_state = KLP_TRANSITION_UNPATCHED if state == KLP_TRANSITION_PATCHED else KLP_TRANSITION_PATCHED
    for task in _all_tasks(klp):
        klp.kernel.warn_on_once(task.patch_state != KLP_TRANSITION_IDLE, where)
        task.patch_state = initial_state
    for _, func in patch.funcs():
        func.transition = True


async def klp_reverse_transition(klp: Klp) -> None:
    """Turn a transition around, in the middle of it."""
    patch = klp.klp_transition_patch
    assert patch is not None
    patching = klp.klp_target_state == KLP_TRANSITION_PATCHED
    klp.debug["reversing"](patch.name, "patching to unpatching" if patching else "unpatching to patching")
    for task in _all_tasks(klp):
        task.patch_pending = False
    await _klp_synchronize_transition()
    patch.enabled = not patch.enabled
    klp.klp_target_state = KLP_TRANSITION_UNPATCHED if patching else KLP_TRANSITION_PATCHED
    klp_start_transition(klp)


def klp_force_transition(klp: Klp) -> None:
    """Switch all tasks that are left, safe or not. The next retry then completes the transition.

    Which modules that pins for ever differs: rule ``force_pins_all``.
    """
    klp.log.warn("forcing remaining tasks to the patched state")
    for task in _all_tasks(klp):
        klp_update_patch_state(klp, task)
    patch = klp.klp_transition_patch
    assert patch is not None
    if klp.kernel.profile.has("force_pins_all"):
        for each in klp.klp_patches:
            each.forced = True
    elif klp.klp_target_state == KLP_TRANSITION_UNPATCHED:
        patch.forced = True
    elif patch.replace:
        for each in klp.klp_patches:
            if each is not patch:
                each.forced = True
