"""The structures of a livepatch and the state that the core shares between its files.

Source
    include/linux/livepatch.h, include/linux/livepatch_external.h, kernel/livepatch/core.h, kernel/livepatch/patch.h.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from klpfs.kernel.ftrace import FtraceOps
from klpfs.kernel.kobject import Kobject, KobjType
from klpfs.kernel.locking import Mutex
from klpfs.kernel.workqueue import DelayedWork, Work

if TYPE_CHECKING:
    from klpfs.kernel.dynamic_debug import DebugSite
    from klpfs.kernel.kernel import Kernel
    from klpfs.kernel.module import Module
    from klpfs.kernel.printk import Logger
    from klpfs.livepatch.shadow import KlpShadow

__all__ = [
    "KLP_TRANSITION_IDLE",
    "KLP_TRANSITION_PATCHED",
    "KLP_TRANSITION_UNPATCHED",
    "Klp",
    "KlpCallbacks",
    "KlpFunc",
    "KlpObject",
    "KlpOps",
    "KlpPatch",
    "KlpState",
]

KLP_TRANSITION_IDLE = -1
KLP_TRANSITION_UNPATCHED = 0
KLP_TRANSITION_PATCHED = 1

Callback = Callable[["KlpObject"], Awaitable[int | None]]


@dataclass(eq=False, slots=True)
class KlpFunc:
    """``struct klp_func``: *old_name* is replaced by the code at *new_func*; *old_sympos* says which of several."""

    old_name: str
    new_func: int = 0
    old_sympos: int = 0
    # internal
    old_func: int = 0
    old_size: int = 0
    new_size: int = 0
    nop: bool = False
    patched: bool = False
    transition: bool = False
    kobj: Kobject | None = None
    obj: KlpObject | None = None


@dataclass(eq=False, slots=True)
class KlpCallbacks:
    """``struct klp_callbacks``: each gets the object; a non-zero answer of *pre_patch* refuses it."""

    pre_patch: Callback | None = None
    post_patch: Callback | None = None
    pre_unpatch: Callback | None = None
    post_unpatch: Callback | None = None
    post_unpatch_enabled: bool = False


@dataclass(eq=False, slots=True)
class KlpObject:
    """``struct klp_object``: the functions of one object; *name* None is vmlinux.

    *funcs* None stands for the NULL pointer that ``klp_enable_patch`` refuses.
    """

    name: str | None = None
    funcs: list[KlpFunc] | None = None
    callbacks: KlpCallbacks = field(default_factory=KlpCallbacks)
    # internal
    func_list: list[KlpFunc] = field(default_factory=list)
    mod: Module | None = None
    dynamic: bool = False
    patched: bool = False
    kobj: Kobject | None = None
    patch: KlpPatch | None = None
    priv: object = None

    @property
    def is_module(self) -> bool:
        """``klp_is_module``."""
        return self.name is not None

    @property
    def is_loaded(self) -> bool:
        """``klp_is_object_loaded``."""
        return self.name is None or self.mod is not None

    @property
    def display_name(self) -> str:
        """The name as messages and directories show it."""
        return self.name if self.name is not None else "vmlinux"


@dataclass(eq=False, slots=True)
class KlpState:
    """``struct klp_state``: a change of the system, by *id*, in a *version*."""

    id: int
    version: int = 0
    data: object = None


@dataclass(eq=False, slots=True)
class KlpPatch:
    """``struct klp_patch``: what ``klp_enable_patch`` takes. *objs* None stands for the NULL pointer."""

    mod: Module | None
    objs: list[KlpObject] | None
    states: list[KlpState] = field(default_factory=list)
    replace: bool = False
    # internal
    obj_list: list[KlpObject] = field(default_factory=list)
    enabled: bool = False
    forced: bool = False
    kobj: Kobject | None = None
    free_work: Work | None = None
    finish: trio.Event = field(default_factory=trio.Event)
    priv: object = None

    @property
    def name(self) -> str:
        """The name of its module, which is the name of its directory."""
        assert self.mod is not None
        return self.mod.name

    def funcs(self) -> Iterator[tuple[KlpObject, KlpFunc]]:
        """All functions with their objects, nops included."""
        for obj in self.obj_list:
            for func in obj.func_list:
                yield obj, func


@dataclass(eq=False, slots=True)
class KlpOps:
    """``struct klp_ops``: the ftrace hook of one patched function and its ``func_stack``, newest first."""

    fops: FtraceOps
    func_stack: list[KlpFunc] = field(default_factory=list)


@dataclass(eq=False)
class Klp:
    """The variables that the files of kernel/livepatch/ share; ``klp_mutex`` guards them.

    ``klp_patches`` lists the patches that are enabled or in transition, oldest first.
    """

    kernel: Kernel
    log: Logger
    klp_mutex: Mutex
    klp_shadow_lock: Mutex
    root_kobj: Kobject
    debug: dict[str, DebugSite]
    klp_patches: list[KlpPatch] = field(default_factory=list)
    klp_transition_patch: KlpPatch | None = None
    klp_target_state: int = KLP_TRANSITION_IDLE
    klp_signals_cnt: int = 0
    klp_ops: dict[int, KlpOps] = field(default_factory=dict)
    """Keyed by the address of the original function."""
    klp_shadow_hash: dict[tuple[object, int], KlpShadow] = field(default_factory=dict)
    ktype_object: KobjType = field(default_factory=KobjType)
    transition_work: DelayedWork | None = None
    transition_done: trio.Event = field(default_factory=trio.Event)
    """Set and replaced whenever a transition ends; lets callers wait without polling."""
