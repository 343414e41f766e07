"""Calling the callbacks of an object, each under the rule that guards it.

Source
    kernel/livepatch/core.h (``klp_pre_patch_callback`` and its kin), Documentation/livepatch/callbacks.rst.
"""

from __future__ import annotations

from klpfs.livepatch.types import KlpObject

__all__ = [
    "klp_post_patch_callback",
    "klp_post_unpatch_callback",
    "klp_pre_patch_callback",
    "klp_pre_unpatch_callback",
]


async def klp_pre_patch_callback(obj: KlpObject) -> int:
    """Run pre_patch; its answer. Only if it was 0 will the post_unpatch callback run later."""
    ret = 0
    if obj.callbacks.pre_patch is not None:
        ret = await obj.callbacks.pre_patch(obj) or 0
    obj.callbacks.post_unpatch_enabled = not ret
    return ret


async def klp_post_patch_callback(obj: KlpObject) -> None:
    """Run post_patch."""
    if obj.callbacks.post_patch is not None:
        await obj.callbacks.post_patch(obj)


async def klp_pre_unpatch_callback(obj: KlpObject) -> None:
    """Run pre_unpatch."""
    if obj.callbacks.pre_unpatch is not None:
        await obj.callbacks.pre_unpatch(obj)


async def klp_post_unpatch_callback(obj: KlpObject) -> None:
    """Run post_unpatch, once, if pre_patch had succeeded."""
    if obj.callbacks.post_unpatch_enabled and obj.callbacks.post_unpatch is not None:
        await obj.callbacks.post_unpatch(obj)
    obj.callbacks.post_unpatch_enabled = False
