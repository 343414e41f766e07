"""The livepatch core: enabling, disabling, the sysfs interface, modules that come and go.

Model
    One call, :func:`klp_enable_patch`, checks a patch, builds its directories and starts the transition. A patch whose
    transition to the disabled state completes is freed, directory included, by a work item of its own.

Locks
    ``klp_mutex`` around everything. The store functions take it inside ``kn->active`` (the attribute operation in
    flight); the last ``kobject_put`` of a patch waits for those operations, so it must run without ``klp_mutex`` and
    outside any store function of the patch: :func:`klp_free_patch_finish` on the workqueue.

Source
    kernel/livepatch/core.c; the free work since Linux commit 958ef1e39d24 ("livepatch: Simplify API by removing
    registration step" (in v5.1)).
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

import trio

from klpfs.kernel.kallsyms import KSYM_NAME_LEN
from klpfs.kernel.kobject import KobjAttribute, Kobject, KobjType
from klpfs.kernel.kstrtox import kstrtobool
from klpfs.kernel.workqueue import Work
from klpfs.livepatch.callbacks import (
    klp_post_patch_callback,
    klp_post_unpatch_callback,
    klp_pre_patch_callback,
    klp_pre_unpatch_callback,
)
from klpfs.livepatch.patch import klp_patch_object, klp_unpatch_object, klp_unpatch_objects, klp_unpatch_objects_dynamic
from klpfs.livepatch.state import klp_is_patch_compatible
from klpfs.livepatch.transition import (
    klp_cancel_transition,
    klp_force_transition,
    klp_init_transition,
    klp_reverse_transition,
    klp_send_signals,
    klp_start_transition,
    klp_try_complete_transition,
)
from klpfs.livepatch.types import (
    KLP_TRANSITION_PATCHED,
    KLP_TRANSITION_UNPATCHED,
    Klp,
    KlpFunc,
    KlpObject,
    KlpPatch,
)

if TYPE_CHECKING:
    from klpfs.kernel.module import Module

__all__ = [
    "MODULE_NAME_LEN",
    "klp_discard_nops",
    "klp_enable_patch",
    "klp_find_object_symbol",
    "klp_free_patch_async",
    "klp_free_replaced_patches_async",
    "klp_module_coming",
    "klp_module_going",
    "klp_unpatch_replaced_patches",
]

KLP_KTYPE_FUNC = KobjType()

MODULE_NAME_LEN = 56
"""Longest module name, the NUL included (include/linux/moduleparam.h, 64 bit)."""


# -- look-ups ----------------------------------------------------------------------------------------------------------


def _klp_find_object_module(klp: Klp, obj: KlpObject) -> None:
    if obj.name is None:
        return
    mod = klp.kernel.modules.find_module(obj.name)
    # klp_alive: between klp_module_coming() and klp_module_going() those two are in charge of the object.
    if mod is not None and mod.klp_alive:
        obj.mod = mod


def _klp_find_func(obj: KlpObject, old_func: KlpFunc) -> KlpFunc | None:
    for func in obj.func_list:
        if func.old_name == old_func.old_name and (func.old_sympos or 1) == (old_func.old_sympos or 1):
            return func
    return None


def _klp_find_object(patch: KlpPatch, old_obj: KlpObject) -> KlpObject | None:
    return next((obj for obj in patch.obj_list if obj.name == old_obj.name), None)


def klp_find_object_symbol(klp: Klp, objname: str | None, name: str, sympos: int) -> int:
    """The address of symbol *name* in *objname* (None: vmlinux); the *sympos*-th of that name, 0 if it must be unique.

    Raises OSError(EINVAL), having logged why, when it is missing, ambiguous, or there are fewer.
    """
    kallsyms = klp.kernel.kallsyms
    found = kallsyms.on_each_match_symbol(name) if objname is None else kallsyms.module_on_each_symbol(objname, name)
    # The search ends at the position asked for, or with the second symbol where it must be unique.
    count = min(len(found), sympos or 2)
    addr = found[count - 1] if count else 0
    if not addr:
        klp.log.err(f"symbol '{name}' not found in symbol table")
    elif count > 1 and not sympos:
        # The kernel passes a NULL pointer for vmlinux here, and prints what printf makes of it.
        klp.log.err(f"unresolvable ambiguity for symbol '{name}' in object '{objname or '(null)'}'")
    elif sympos and count != sympos:
        klp.log.err(f"symbol position {sympos} for symbol '{name}' in object '{objname or 'vmlinux'}' not found")
    else:
        return addr
    raise OSError(errno.EINVAL, f"{objname or 'vmlinux'}: cannot resolve symbol {name},{sympos}")


# -- sysfs: /sys/kernel/livepatch/<patch>/{enabled,transition,force,...} -----------------------------------------------


def _patch_of(kobj: Kobject) -> KlpPatch:
    assert isinstance(kobj.owner, KlpPatch)
    return kobj.owner


async def _enabled_store(klp: Klp, kobj: Kobject, data: bytes) -> int:
    enabled = kstrtobool(data)
    patch = _patch_of(kobj)
    async with klp.klp_mutex:
        if patch.enabled == enabled:
            raise OSError(errno.EINVAL, "already in the requested state")
        if patch is klp.klp_transition_patch:
            await klp_reverse_transition(klp)
        elif not enabled:
            await _klp_disable_patch(klp, patch)
        else:
            raise OSError(errno.EINVAL, "a disabled patch cannot be enabled again")
    return len(data)


async def _force_store(klp: Klp, kobj: Kobject, data: bytes) -> int:
    if kstrtobool(data):
        async with klp.klp_mutex:
            if _patch_of(kobj) is not klp.klp_transition_patch:
                raise OSError(errno.EINVAL, "not in transition")
            klp_force_transition(klp)
    return len(data)


async def _signal_store(klp: Klp, kobj: Kobject, data: bytes) -> int:
    if kstrtobool(data):
        async with klp.klp_mutex:
            if _patch_of(kobj) is not klp.klp_transition_patch:
                raise OSError(errno.EINVAL, "not in transition")
            klp_send_signals(klp)
    return len(data)


def _stack_order_show(klp: Klp, kobj: Kobject) -> bytes:
    patch = _patch_of(kobj)
    if patch not in klp.klp_patches:
        raise OSError(errno.ENODEV, "not on the stack")
    return b"%d\n" % (klp.klp_patches.index(patch) + 1)


def _bool(value: bool) -> bytes:
    return b"1\n" if value else b"0\n"


def patch_attributes(klp: Klp) -> list[KobjAttribute]:
    """The attributes of a patch that exist in this kernel."""
    all_attributes = {
        "attr_enabled": KobjAttribute(
            "enabled", 0o644, lambda kobj: _bool(_patch_of(kobj).enabled), partial(_enabled_store, klp)
        ),
        "attr_transition": KobjAttribute(
            "transition", 0o444, lambda kobj: _bool(_patch_of(kobj) is klp.klp_transition_patch)
        ),
        "attr_signal": KobjAttribute("signal", 0o200, None, partial(_signal_store, klp)),
        "attr_force": KobjAttribute("force", 0o200, None, partial(_force_store, klp)),
        "attr_replace": KobjAttribute("replace", 0o444, lambda kobj: _bool(_patch_of(kobj).replace)),
        "attr_stack_order": KobjAttribute("stack_order", 0o444, partial(_stack_order_show, klp)),
    }
    return [attr for rule, attr in all_attributes.items() if klp.kernel.profile.has(rule)]


def object_attributes(klp: Klp) -> list[KobjAttribute]:
    """The attributes of an object that exist in this kernel."""

    def patched_show(kobj: Kobject) -> bytes:
        assert isinstance(kobj.owner, KlpObject)
        return _bool(kobj.owner.patched)

    return [KobjAttribute("patched", 0o444, patched_show)] if klp.kernel.profile.has("attr_patched") else []


def _kobject_add(klp: Klp, kobj: Kobject, parent: Kobject, name: str) -> None:
    try:
        kobj.add(parent, name)
    except OSError as error:
        if error.errno == errno.EEXIST and parent.node is not None:
            path = parent.node.path().lstrip("/").removeprefix("sys/")
            plain = klp.kernel.printk.logger("")
            plain.warn(f"sysfs: cannot create duplicate filename '/{path}/{name}'")
            plain.err(
                f"kobject: kobject_add_internal failed for {name} with -EEXIST, don't try to register things with "
                "the same name in the same directory."
            )
        raise


# -- atomic replace ----------------------------------------------------------------------------------------------------


def _klp_alloc_object_dynamic(klp: Klp, name: str | None, patch: KlpPatch) -> KlpObject:
    obj = KlpObject(name, [], dynamic=True)
    _klp_init_object_early(klp, patch, obj)
    return obj


def _klp_add_object_nops(klp: Klp, patch: KlpPatch, old_obj: KlpObject) -> None:
    obj = _klp_find_object(patch, old_obj)
    if obj is None:
        obj = _klp_alloc_object_dynamic(klp, old_obj.name, patch)
    for old_func in old_obj.func_list:
        if _klp_find_func(obj, old_func) is None:
            nop = KlpFunc(old_func.old_name, old_sympos=old_func.old_sympos, nop=True)
            _klp_init_func_early(klp, obj, nop)


def _klp_add_nops(klp: Klp, patch: KlpPatch) -> None:
    """Functions that others patch and *patch* does not get a nop, which leads back to the original code."""
    for old_patch in klp.klp_patches:
        for old_obj in old_patch.obj_list:
            _klp_add_object_nops(klp, patch, old_obj)


def klp_unpatch_replaced_patches(klp: Klp, new_patch: KlpPatch) -> None:
    """Take the functions of all patches below *new_patch* off their stacks."""
    for old_patch in klp.klp_patches:
        if old_patch is new_patch:
            return
        old_patch.enabled = False
        klp_unpatch_objects(klp, old_patch)


async def klp_discard_nops(klp: Klp, new_patch: KlpPatch) -> None:
    """Remove the nops, once the patches that they cover are gone."""
    klp_unpatch_objects_dynamic(klp, new_patch)
    await _klp_free_objects(klp, new_patch, nops_only=True)


# -- freeing -----------------------------------------------------------------------------------------------------------


async def _put(kobj: Kobject | None) -> None:
    assert kobj is not None
    await kobj.put()


async def _klp_free_objects(klp: Klp, patch: KlpPatch, *, nops_only: bool) -> None:
    for obj in list(patch.obj_list):
        for func in list(obj.func_list):
            if nops_only and not func.nop:
                continue
            obj.func_list.remove(func)
            await _put(func.kobj)
        if nops_only and not obj.dynamic:
            continue
        patch.obj_list.remove(obj)
        await _put(obj.kobj)


def _klp_free_object_loaded(obj: KlpObject) -> None:
    obj.mod = None
    for func in obj.func_list:
        func.old_func = 0
        if func.nop:
            func.new_func = 0


async def klp_free_patch_start(klp: Klp, patch: KlpPatch) -> None:
    """The part of the freeing that may run under ``klp_mutex``: off the list, objects and functions gone."""
    if patch in klp.klp_patches:
        klp.klp_patches.remove(patch)
    await _klp_free_objects(klp, patch, nops_only=False)


async def klp_free_patch_finish(klp: Klp, patch: KlpPatch) -> None:
    """The part that must run outside ``klp_mutex``: the directory goes, and last of all the module reference."""
    with klp.kernel.sched.sleeping("D"):
        await _put(patch.kobj)
        await patch.finish.wait()
    if not patch.forced:
        assert patch.mod is not None
        klp.kernel.modules.module_put(patch.mod)


async def klp_free_patch_async(klp: Klp, patch: KlpPatch) -> None:
    """Free *patch*, leaving the part that would deadlock here to the workqueue."""
    await klp_free_patch_start(klp, patch)
    assert patch.free_work is not None
    klp.kernel.workqueue.schedule_work(patch.free_work)


async def klp_free_replaced_patches_async(klp: Klp, new_patch: KlpPatch) -> None:
    """Free all patches below *new_patch*."""
    for old_patch in list(klp.klp_patches):
        if old_patch is new_patch:
            return
        await klp_free_patch_async(klp, old_patch)


# -- initialisation ----------------------------------------------------------------------------------------------------


def _klp_init_func_early(klp: Klp, obj: KlpObject, func: KlpFunc) -> None:
    func.kobj = Kobject(klp.kernel.kernfs, KLP_KTYPE_FUNC, func)
    func.obj = obj
    obj.func_list.append(func)


def _klp_init_object_early(klp: Klp, patch: KlpPatch, obj: KlpObject) -> None:
    obj.func_list = []
    obj.patch = patch
    obj.kobj = Kobject(klp.kernel.kernfs, klp.ktype_object, obj)
    patch.obj_list.append(obj)


def _klp_init_patch_early(klp: Klp, patch: KlpPatch) -> None:
    patch.obj_list = []
    patch.enabled = False
    patch.forced = False
    patch.finish = trio.Event()
    patch.kobj = Kobject(
        klp.kernel.kernfs, KobjType(patch_attributes(klp), release=lambda kobj: patch.finish.set()), patch
    )
    patch.free_work = Work(partial(klp_free_patch_finish, klp, patch), "klp_free_patch_work_fn")
    for obj in patch.objs or ():
        _klp_init_object_early(klp, patch, obj)
        for func in obj.funcs or ():
            _klp_init_func_early(klp, obj, func)


def _klp_init_func(klp: Klp, obj: KlpObject, func: KlpFunc) -> None:
    if not func.old_name:
        raise OSError(errno.EINVAL, "a function without a name")
    if not func.new_func and not func.nop:
        raise OSError(errno.EINVAL, f"{func.old_name}: no replacement")
    if len(func.old_name) >= KSYM_NAME_LEN:
        raise OSError(errno.EINVAL, f"{func.old_name[:40]}...: name too long")
    func.patched = False
    func.transition = False
    assert func.kobj is not None
    assert obj.kobj is not None
    _kobject_add(klp, func.kobj, obj.kobj, f"{func.old_name},{func.old_sympos or 1}")


async def _klp_init_object_loaded(klp: Klp, patch: KlpPatch, obj: KlpObject) -> None:
    assert patch.mod is not None
    if obj.is_module:
        await patch.mod.code.apply_relocs(patch.mod, obj.name)
    kallsyms = klp.kernel.kallsyms
    for func in obj.func_list:
        func.old_func = klp_find_object_symbol(klp, obj.name, func.old_name, func.old_sympos)
        found = kallsyms.lookup_size_offset(func.old_func)
        if found is None:
            klp.log.err(f"kallsyms size lookup failed for '{func.old_name}'")
            raise OSError(errno.ENOENT, func.old_name)
        func.old_size = found[0]
        if func.nop:
            func.new_func = func.old_func
        found = kallsyms.lookup_size_offset(func.new_func)
        if found is None:
            klp.log.err(f"kallsyms size lookup failed for '{func.old_name}' replacement")
            raise OSError(errno.ENOENT, func.old_name)
        func.new_size = found[0]


async def _klp_init_object(klp: Klp, patch: KlpPatch, obj: KlpObject) -> None:
    if obj.name is not None and len(obj.name) >= MODULE_NAME_LEN:
        raise OSError(errno.EINVAL, f"{obj.name[:40]}...: name too long")
    obj.patched = False
    obj.mod = None
    _klp_find_object_module(klp, obj)
    assert obj.kobj is not None
    assert patch.kobj is not None
    _kobject_add(klp, obj.kobj, patch.kobj, obj.display_name)
    for func in obj.func_list:
        _klp_init_func(klp, obj, func)
    if obj.is_loaded:
        await _klp_init_object_loaded(klp, patch, obj)


async def _klp_init_patch(klp: Klp, patch: KlpPatch) -> None:
    assert patch.kobj is not None
    _kobject_add(klp, patch.kobj, klp.root_kobj, patch.name)
    if patch.replace:
        _klp_add_nops(klp, patch)
    for obj in list(patch.obj_list):
        await _klp_init_object(klp, patch, obj)
    klp.klp_patches.append(patch)


# -- enable and disable ------------------------------------------------------------------------------------------------


async def _klp_disable_patch(klp: Klp, patch: KlpPatch) -> None:
    """``__klp_disable_patch``. Raises OSError(EBUSY) during another transition, or where an enforced stack forbids
    it."""
    if klp.kernel.warn_on(not patch.enabled, "kernel/livepatch/core.c __klp_disable_patch"):
        raise OSError(errno.EINVAL, "not enabled")
    if klp.klp_transition_patch is not None:
        raise OSError(errno.EBUSY, f"{klp.klp_transition_patch.name} is in transition")
    if klp.kernel.profile.has("stack_order_enforced") and klp.klp_patches[-1] is not patch:
        raise OSError(errno.EBUSY, f"{klp.klp_patches[-1].name} was enabled later")
    klp_init_transition(klp, patch, KLP_TRANSITION_UNPATCHED)
    for obj in patch.obj_list:
        if obj.patched:
            await klp_pre_unpatch_callback(obj)
    klp_start_transition(klp)
    patch.enabled = False
    await klp_try_complete_transition(klp)


async def _klp_enable_objects(klp: Klp, patch: KlpPatch) -> None:
    for obj in patch.obj_list:
        if not obj.is_loaded:
            continue
        ret = await klp_pre_patch_callback(obj)
        if ret:
            klp.log.warn(f"pre-patch callback failed for object '{obj.display_name}'")
            raise OSError(-ret, f"pre-patch callback of {obj.display_name} answered {ret}")
        try:
            klp_patch_object(klp, obj)
        except OSError:
            klp.log.warn(f"failed to patch object '{obj.display_name}'")
            raise


async def _klp_enable_patch(klp: Klp, patch: KlpPatch) -> None:
    """``__klp_enable_patch``."""
    if klp.klp_transition_patch is not None:
        raise OSError(errno.EBUSY, f"{klp.klp_transition_patch.name} is in transition")
    if klp.kernel.warn_on(patch.enabled, "kernel/livepatch/core.c __klp_enable_patch"):
        raise OSError(errno.EINVAL, "already enabled")
    klp.log.notice(f"enabling patch '{patch.name}'")
    klp_init_transition(klp, patch, KLP_TRANSITION_PATCHED)
    try:
        await _klp_enable_objects(klp, patch)
    except OSError:
        klp.log.warn(f"failed to enable patch '{patch.name}'")
        await klp_cancel_transition(klp)
        raise
    klp_start_transition(klp)
    patch.enabled = True
    await klp_try_complete_transition(klp)


async def klp_enable_patch(klp: Klp, patch: KlpPatch | None) -> None:
    """Check *patch*, create its directories, resolve its symbols and start the transition to it.

    To be called from the init function of the patch's own module. Raises OSError: EINVAL for a malformed patch, a
    module without the livepatch mark, an incompatible state or an unknown symbol; EBUSY during a transition or while
    ftrace is off; ENODEV when the module is going; what a pre-patch callback answers.
    """
    if patch is None or patch.mod is None or patch.objs is None:
        raise OSError(errno.EINVAL, "no patch, no module or no objects")
    if any(obj.funcs is None for obj in patch.objs):
        raise OSError(errno.EINVAL, f"{patch.name}: an object without a list of functions")
    if not patch.mod.is_livepatch:
        klp.log.err(f"module {patch.name} is not marked as a livepatch module")
        raise OSError(errno.EINVAL, f"{patch.name} is not marked as a livepatch module")
    if patch.replace and not klp.kernel.profile.has("atomic_replace"):
        # The field does not exist there, so no code of such a kernel can have set it.
        raise OSError(errno.EINVAL, f"{patch.name}: kernel {klp.kernel.profile.name} has no atomic replace")

    async with klp.klp_mutex:
        if not klp_is_patch_compatible(klp, patch):
            klp.log.err(f"Livepatch patch ({patch.name}) is not compatible with the already installed livepatches.")
            raise OSError(errno.EINVAL, f"{patch.name}: incompatible system state")
        if not klp.kernel.modules.try_module_get(patch.mod):
            raise OSError(errno.ENODEV, f"{patch.name} is going")
        _klp_init_patch_early(klp, patch)
        try:
            await _klp_init_patch(klp, patch)
            await _klp_enable_patch(klp, patch)
        except OSError as error:
            failure = error
            await klp_free_patch_start(klp, patch)
        else:
            return
    await klp_free_patch_finish(klp, patch)
    raise failure


# -- modules -----------------------------------------------------------------------------------------------------------


async def _klp_cleanup_module_patches_limited(klp: Klp, mod: Module, limit: KlpPatch | None) -> None:
    """Undo what patches did to *mod*, in the order of the list, up to *limit*."""
    for patch in list(klp.klp_patches):
        if patch is limit:
            break
        for obj in patch.obj_list:
            if obj.name != mod.name:
                continue
            if patch is not klp.klp_transition_patch:
                await klp_pre_unpatch_callback(obj)
            klp.log.notice(f"reverting patch '{patch.name}' on unloading module '{mod.name}'")
            klp_unpatch_object(klp, obj)
            await klp_post_unpatch_callback(obj)
            assert patch.mod is not None
            await patch.mod.code.clear_relocs(patch.mod, obj.name)
            _klp_free_object_loaded(obj)
            break


async def _klp_apply_to_coming(klp: Klp, patch: KlpPatch, obj: KlpObject, mod: Module) -> None:
    obj.mod = mod
    try:
        await _klp_init_object_loaded(klp, patch, obj)
    except OSError as error:
        assert error.errno is not None
        klp.log.warn(f"failed to initialize patch '{patch.name}' for module '{mod.name}' ({-error.errno})")
        raise
    klp.log.notice(f"applying patch '{patch.name}' to loading module '{mod.name}'")
    ret = await klp_pre_patch_callback(obj)
    if ret:
        klp.log.warn(f"pre-patch callback failed for object '{obj.name}'")
        raise OSError(-ret, f"pre-patch callback of {obj.name} answered {ret}")
    try:
        klp_patch_object(klp, obj)
    except OSError as error:
        assert error.errno is not None
        klp.log.warn(f"failed to apply patch '{patch.name}' to module '{mod.name}' ({-error.errno})")
        await klp_post_unpatch_callback(obj)
        raise
    if patch is not klp.klp_transition_patch:
        await klp_post_patch_callback(obj)


async def klp_module_coming(klp: Klp, mod: Module) -> None:
    """Patch *mod*, which is about to be loaded. Raises OSError to refuse it."""
    if klp.kernel.warn_on(mod.state != "coming", "kernel/livepatch/core.c klp_module_coming"):
        raise OSError(errno.EINVAL, mod.name)
    if mod.name == "vmlinux":
        klp.log.err("vmlinux.ko: invalid module name")
        raise OSError(errno.EINVAL, "a module cannot be called vmlinux")
    async with klp.klp_mutex:
        mod.klp_alive = True
        for patch in list(klp.klp_patches):
            obj = next((o for o in patch.obj_list if o.name == mod.name), None)
            if obj is None:
                continue
            try:
                await _klp_apply_to_coming(klp, patch, obj, mod)
            except OSError:
                klp.log.warn(
                    f"patch '{patch.name}' failed for module '{mod.name}', refusing to load module '{mod.name}'"
                )
                mod.klp_alive = False
                obj.mod = None
                await _klp_cleanup_module_patches_limited(klp, mod, patch)
                raise


async def klp_module_going(klp: Klp, mod: Module) -> None:
    """Take all patches off *mod*, which is about to go."""
    if klp.kernel.warn_on(mod.state not in ("going", "coming"), "kernel/livepatch/core.c klp_module_going"):
        return
    async with klp.klp_mutex:
        mod.klp_alive = False
        await _klp_cleanup_module_patches_limited(klp, mod, None)
