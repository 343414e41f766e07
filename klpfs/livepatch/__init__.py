"""The livepatch core, file by file as kernel/livepatch/.

Model
    ``core`` enables and disables patches and keeps their directories, ``transition`` moves the tasks over, ``patch``
    keeps a ``func_stack`` for each patched function and chooses from it, ``shadow`` and ``state`` are the two
    services for patch authors. What they share is :class:`klpfs.livepatch.types.Klp`. :class:`Livepatch` is the whole
    of it as module code and the module loader see it.

Locks
    ``klp_mutex`` around every change. Attribute stores take it inside the active reference of their file, so nothing
    that waits for such references (the last put of a patch) may run under it: see :mod:`klpfs.livepatch.core`.

Source
    kernel/livepatch/, Documentation/livepatch/; the free work since Linux commit 958ef1e39d24 ("livepatch: Simplify API
    by removing registration step" (in v5.1)).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from klpfs.kernel.kobject import Kobject, KobjType
from klpfs.kernel.locking import Mutex
from klpfs.kernel.workqueue import DelayedWork
from klpfs.livepatch import core, shadow, state, transition
from klpfs.livepatch.types import (
    KLP_TRANSITION_IDLE,
    KLP_TRANSITION_PATCHED,
    KLP_TRANSITION_UNPATCHED,
    Klp,
    KlpCallbacks,
    KlpFunc,
    KlpObject,
    KlpPatch,
    KlpState,
)

if TYPE_CHECKING:
    from klpfs.kernel.kernel import Kernel
    from klpfs.kernel.module import Module
    from klpfs.kernel.sched import Task

__all__ = [
    "KLP_TRANSITION_IDLE",
    "KLP_TRANSITION_PATCHED",
    "KLP_TRANSITION_UNPATCHED",
    "Klp",
    "KlpCallbacks",
    "KlpFunc",
    "KlpObject",
    "KlpPatch",
    "KlpState",
    "Livepatch",
]

# pr_debug sites of kernel/livepatch/transition.c (6.12): key, line, function, format
_SITES = [
    ("completing", 97, "klp_complete_transition", "'%s': completing %s transition\n"),
    ("canceling", 170, "klp_cancel_transition", "'%s': canceling patching transition, going to unpatch\n"),
    ("running", 345, "klp_try_switch_task", "%s: %s:%d is running\n"),
    ("unreliable", 349, "klp_try_switch_task", "%s: %s:%d has an unreliable stack\n"),
    ("sleeping", 353, "klp_try_switch_task", "%s: %s:%d is sleeping on function %s\n"),
    ("unknown", 358, "klp_try_switch_task", "%s: Unknown error code (%d) when trying to switch %s:%d\n"),
    ("initializing", 591, "klp_init_transition", "'%s': initializing %s transition\n"),
    ("reversing", 653, "klp_reverse_transition", "'%s': reversing transition from %s\n"),
]


class Livepatch:
    """The livepatch subsystem of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        root = Kobject(kernel.kernfs, KobjType())
        root.add(kernel.kernfs.make_path("sys/kernel"), "livepatch")
        debug = {
            key: kernel.dynamic_debug.register(
                "kernel/livepatch/transition.c", line, "livepatch", function, text, prefix="livepatch: "
            )
            for key, line, function, text in _SITES
        }
        self.klp = klp = Klp(
            kernel,
            kernel.printk.logger("livepatch: "),
            Mutex("klp_mutex", kernel.lockdep, partial(kernel.sched.sleeping, "D")),
            Mutex("klp_shadow_lock", kernel.lockdep),
            root,
            debug,
        )
        klp.ktype_object = KobjType(core.object_attributes(klp))
        klp.transition_work = DelayedWork(partial(transition.klp_transition_work_fn, klp), "klp_transition_work_fn")
        kernel.sched.update_patch_state = partial(transition.klp_update_patch_state, klp)

        self.klp_get_state = state.klp_get_state
        self.klp_get_prev_state = partial(state.klp_get_prev_state, klp)
        self.klp_shadow_get = partial(shadow.klp_shadow_get, klp)
        self.klp_shadow_alloc = partial(shadow.klp_shadow_alloc, klp)
        self.klp_shadow_get_or_alloc = partial(shadow.klp_shadow_get_or_alloc, klp)
        self.klp_shadow_free = partial(shadow.klp_shadow_free, klp)
        self.klp_shadow_free_all = partial(shadow.klp_shadow_free_all, klp)

    @property
    def patches(self) -> list[KlpPatch]:
        """The patches that are enabled or in transition, oldest first (``klp_patches``)."""
        return list(self.klp.klp_patches)

    @property
    def transition_patch(self) -> KlpPatch | None:
        """The patch in transition, if any (``klp_transition_patch``)."""
        return self.klp.klp_transition_patch

    async def klp_enable_patch(self, patch: KlpPatch | None) -> None:
        """See :func:`klpfs.livepatch.core.klp_enable_patch`."""
        await core.klp_enable_patch(self.klp, patch)

    async def klp_module_coming(self, mod: Module) -> None:
        """See :func:`klpfs.livepatch.core.klp_module_coming`."""
        await core.klp_module_coming(self.klp, mod)

    async def klp_module_going(self, mod: Module) -> None:
        """See :func:`klpfs.livepatch.core.klp_module_going`."""
        await core.klp_module_going(self.klp, mod)

    def find_object_symbol(self, objname: str | None, name: str, sympos: int) -> int:
        """See :func:`klpfs.livepatch.core.klp_find_object_symbol`."""
        return core.klp_find_object_symbol(self.klp, objname, name, sympos)

    def implementation(self, old_func: int, task: Task | None) -> int:
        """The address that *task* runs when it calls the function at *old_func*."""
        return self.klp.kernel.ftrace.enter(old_func, task)

    async def wait_transition(self) -> None:
        """Return when no transition is in progress."""
        while self.klp.klp_transition_patch is not None:
            await self.klp.transition_done.wait()
