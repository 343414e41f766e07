"""Patching and unpatching of functions, and the choice of the implementation that a task gets.

Source
    kernel/livepatch/patch.c.
"""

from __future__ import annotations

import errno

from klpfs.kernel.ftrace import FtraceOps
from klpfs.kernel.sched import Task
from klpfs.livepatch.types import (
    KLP_TRANSITION_IDLE,
    KLP_TRANSITION_UNPATCHED,
    Klp,
    KlpFunc,
    KlpObject,
    KlpOps,
    KlpPatch,
)

__all__ = [
    "klp_find_ops",
    "klp_ftrace_handler",
    "klp_patch_object",
    "klp_unpatch_object",
    "klp_unpatch_objects",
    "klp_unpatch_objects_dynamic",
]


def klp_find_ops(klp: Klp, old_func: int) -> KlpOps | None:
    """The hook of the function at *old_func*, if it is patched."""
    return klp.klp_ops.get(old_func)


def klp_ftrace_handler(klp: Klp, ops: KlpOps, ip: int, task: Task | None) -> int:
    """The address at which *task* goes on when it enters the patched function at *ip*.

    The top of the ``func_stack``, unless that is in transition and the task is not switched yet: then the one below,
    or the original. No task stands for one that is switched already.
    """
    if klp.kernel.warn_on_once(not ops.func_stack, "kernel/livepatch/patch.c klp_ftrace_handler empty"):
        return ip
    func = ops.func_stack[0]
    if func.transition and task is not None:
        klp.kernel.warn_on_once(task.patch_state == KLP_TRANSITION_IDLE, "kernel/livepatch/patch.c klp_ftrace_handler")
        if task.patch_state == KLP_TRANSITION_UNPATCHED:
            if len(ops.func_stack) < 2:
                return ip
            func = ops.func_stack[1]
    return ip if func.nop else func.new_func


def _klp_unpatch_func(klp: Klp, func: KlpFunc) -> None:
    where = "kernel/livepatch/patch.c klp_unpatch_func"
    if klp.kernel.warn_on(not func.patched, where) or klp.kernel.warn_on(not func.old_func, where):
        return
    ops = klp_find_ops(klp, func.old_func)
    if ops is None:
        klp.kernel.warn(where)
        return
    if len(ops.func_stack) == 1:
        klp.kernel.ftrace.unregister_ftrace_function(ops.fops)
        del klp.klp_ops[func.old_func]
    ops.func_stack.remove(func)
    func.patched = False


def _klp_patch_func(klp: Klp, func: KlpFunc) -> None:
    """Raises OSError(EINVAL) for a function without an ftrace location, OSError(EBUSY) as ftrace refuses."""
    where = "kernel/livepatch/patch.c klp_patch_func"
    if klp.kernel.warn_on(not func.old_func, where) or klp.kernel.warn_on(func.patched, where):
        raise OSError(errno.EINVAL, func.old_name)
    ops = klp_find_ops(klp, func.old_func)
    if ops is None:
        location = klp.kernel.ftrace.location(func.old_func)
        if not location:
            klp.log.err(f"failed to find location for function '{func.old_name}'")
            raise OSError(errno.EINVAL, f"{func.old_name} has no ftrace location")
        ops = KlpOps(
            FtraceOps(
                lambda ip, task: klp_ftrace_handler(klp, new, ip, task),
                permanent=klp.kernel.profile.has("ftrace_permanent"),
                ipmodify=True,
            )
        )
        new = ops
        ops.func_stack.insert(0, func)
        klp.klp_ops[func.old_func] = ops
        try:
            klp.kernel.ftrace.register_ftrace_function(ops.fops, location)
        except OSError as error:
            del klp.klp_ops[func.old_func]
            assert error.errno is not None
            klp.log.err(f"failed to register ftrace handler for function '{func.old_name}' ({-error.errno})")
            raise
    else:
        ops.func_stack.insert(0, func)
    func.patched = True


def _klp_unpatch_object(klp: Klp, obj: KlpObject, *, nops_only: bool) -> None:
    for func in obj.func_list:
        if nops_only and not func.nop:
            continue
        if func.patched:
            _klp_unpatch_func(klp, func)
    if obj.dynamic or not nops_only:
        obj.patched = False


def klp_unpatch_object(klp: Klp, obj: KlpObject) -> None:
    """Take all functions of *obj* off their stacks."""
    _klp_unpatch_object(klp, obj, nops_only=False)


def klp_patch_object(klp: Klp, obj: KlpObject) -> None:
    """Put all functions of *obj* on their stacks, or none. Raises OSError (EINVAL, EBUSY)."""
    if klp.kernel.warn_on(obj.patched, "kernel/livepatch/patch.c klp_patch_object"):
        raise OSError(errno.EINVAL, f"{obj.display_name} is patched already")
    for func in obj.func_list:
        try:
            _klp_patch_func(klp, func)
        except OSError:
            klp_unpatch_object(klp, obj)
            raise
    obj.patched = True


def klp_unpatch_objects(klp: Klp, patch: KlpPatch) -> None:
    """Unpatch every patched object of *patch*."""
    for obj in patch.obj_list:
        if obj.patched:
            _klp_unpatch_object(klp, obj, nops_only=False)


def klp_unpatch_objects_dynamic(klp: Klp, patch: KlpPatch) -> None:
    """Unpatch what a replace added to *patch*: its nops."""
    for obj in patch.obj_list:
        if obj.patched:
            _klp_unpatch_object(klp, obj, nops_only=True)
