"""Shadow variables: data attached to an object from outside, by ``(obj, id)``.

Model
    A shadow variable's *data* is whatever the caller's allocator gives: an address where module code executes, a
    ``bytearray`` otherwise. Constructor and destructor may be coroutines (they run module code).

Locks
    ``klp_shadow_lock`` is held while a constructor or destructor runs, as in the kernel, where it is a spinlock: they
    must not call back into this file.

Source
    kernel/livepatch/shadow.c, Documentation/livepatch/shadow-vars.rst.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from klpfs.livepatch.types import Klp

__all__ = [
    "KlpShadow",
    "klp_shadow_alloc",
    "klp_shadow_free",
    "klp_shadow_free_all",
    "klp_shadow_get",
    "klp_shadow_get_or_alloc",
]

Ctor = Callable[[object, object, object], Awaitable[int]]
Dtor = Callable[[object, object], Awaitable[None]]
Alloc = Callable[[int], object]
Free = Callable[[object], None]


@dataclass(eq=False, slots=True)
class KlpShadow:
    """``struct klp_shadow``: *data* of *size* bytes, and how to give it back."""

    obj: object
    id: int
    data: object
    size: int
    free: Free | None = None


def _hex(obj: object) -> str:
    return f"{obj:016x}" if isinstance(obj, int) else repr(obj)


def klp_shadow_get(klp: Klp, obj: object, id: int) -> object | None:
    """The data of shadow variable ``(obj, id)``, or None."""
    shadow = klp.klp_shadow_hash.get((obj, id))
    return None if shadow is None else shadow.data


async def _get_or_alloc(
    klp: Klp,
    obj: object,
    id: int,
    size: int,
    ctor: Ctor | None,
    ctor_data: object,
    alloc: Alloc,
    free: Free | None,
    *,
    warn_on_exist: bool,
) -> object | None:
    existing = klp.klp_shadow_hash.get((obj, id))
    if existing is None:
        data = alloc(size)
        if data is None or data == 0:
            return None
        async with klp.klp_shadow_lock:
            existing = klp.klp_shadow_hash.get((obj, id))
            if existing is None:
                if ctor is not None:
                    err = await ctor(obj, data, ctor_data)
                    if err:
                        if free is not None:
                            free(data)
                        klp.log.err(f"Failed to construct shadow variable <{_hex(obj)}, {id:x}> ({err})")
                        return None
                klp.klp_shadow_hash[obj, id] = KlpShadow(obj, id, data, size, free)
                return data
        if free is not None:
            free(data)
    if warn_on_exist:
        klp.kernel.warn(
            "kernel/livepatch/shadow.c __klp_shadow_get_or_alloc", f"Duplicate shadow variable <{_hex(obj)}, {id:x}>"
        )
        return None
    return existing.data


async def klp_shadow_alloc(
    klp: Klp,
    obj: object,
    id: int,
    size: int,
    ctor: Ctor | None = None,
    ctor_data: object = None,
    *,
    alloc: Alloc = bytearray,
    free: Free | None = None,
) -> object | None:
    """Attach *size* zeroed bytes to *obj* as *id*; None, with a warning, if there is one already or *ctor* fails."""
    return await _get_or_alloc(klp, obj, id, size, ctor, ctor_data, alloc, free, warn_on_exist=True)


async def klp_shadow_get_or_alloc(
    klp: Klp,
    obj: object,
    id: int,
    size: int,
    ctor: Ctor | None = None,
    ctor_data: object = None,
    *,
    alloc: Alloc = bytearray,
    free: Free | None = None,
) -> object | None:
    """The data of ``(obj, id)``, attached now if there is none; None if *ctor* fails."""
    return await _get_or_alloc(klp, obj, id, size, ctor, ctor_data, alloc, free, warn_on_exist=False)


async def _free_struct(klp: Klp, shadow: KlpShadow, dtor: Dtor | None) -> None:
    del klp.klp_shadow_hash[shadow.obj, shadow.id]
    if dtor is not None:
        await dtor(shadow.obj, shadow.data)
    if shadow.free is not None:
        shadow.free(shadow.data)


async def klp_shadow_free(klp: Klp, obj: object, id: int, dtor: Dtor | None = None) -> None:
    """Detach and free ``(obj, id)`` if it exists; *dtor* sees it first."""
    async with klp.klp_shadow_lock:
        shadow = klp.klp_shadow_hash.get((obj, id))
        if shadow is not None:
            await _free_struct(klp, shadow, dtor)


async def klp_shadow_free_all(klp: Klp, id: int, dtor: Dtor | None = None) -> None:
    """Detach and free every shadow variable called *id*, of whatever object."""
    async with klp.klp_shadow_lock:
        for shadow in [s for s in klp.klp_shadow_hash.values() if s.id == id]:
            await _free_struct(klp, shadow, dtor)
