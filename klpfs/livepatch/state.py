"""System states: what patches changed in the running system, and whether a new one can deal with it.

Source
    kernel/livepatch/state.c, Documentation/livepatch/system-state.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from klpfs.livepatch.types import Klp, KlpPatch, KlpState

__all__ = ["klp_get_prev_state", "klp_get_state", "klp_is_patch_compatible"]


def _states(patch: KlpPatch) -> Iterator[KlpState]:
    """``klp_for_each_state``: the array ends at id 0."""
    return takewhile(lambda state: state.id, patch.states)


def klp_get_state(patch: KlpPatch, id: int) -> KlpState | None:
    """The state *id* that *patch* declares, or None."""
    return next((state for state in _states(patch) if state.id == id), None)


def klp_get_prev_state(klp: Klp, id: int) -> KlpState | None:
    """The state *id* of the newest patch below the one in transition, or None. Only for callbacks of that one."""
    if klp.kernel.warn_on_once(klp.klp_transition_patch is None, "kernel/livepatch/state.c klp_get_prev_state"):
        return None
    last: KlpState | None = None
    for patch in klp.klp_patches:
        if patch is klp.klp_transition_patch:
            break
        last = klp_get_state(patch, id) or last
    return last


def _klp_is_state_compatible(patch: KlpPatch, old_state: KlpState) -> bool:
    state = klp_get_state(patch, old_state.id)
    if state is None:
        # Only a cumulative patch has to take over everything that was changed.
        return not patch.replace
    return state.version >= old_state.version


def klp_is_patch_compatible(klp: Klp, patch: KlpPatch) -> bool:
    """Whether *patch* can deal with the states of all installed patches."""
    if not klp.kernel.profile.has("system_states"):
        return True
    return all(
        _klp_is_state_compatible(patch, old_state) for old_patch in klp.klp_patches for old_state in _states(old_patch)
    )
