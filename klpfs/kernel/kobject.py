"""Kernel objects: reference-counted, with a directory each.

Model
    ``kobject_init`` starts a count of one, ``kobject_add`` makes the directory and the default attributes,
    ``kobject_put`` of the last reference removes the directory and then calls the type's ``release``. The removal waits
    for attribute operations in flight, which is why the last put of a patch may not happen in its own store handler.

Locks
    ``kobject_put`` may sleep in ``kernfs_remove`` (class ``kn->active#<attribute>``).

Source
    lib/kobject.c, fs/sysfs/dir.c, fs/sysfs/group.c.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from klpfs.kernfs import Attribute, Kernfs, KernfsNode

__all__ = ["KobjAttribute", "KobjType", "Kobject"]


@dataclass(frozen=True, slots=True)
class KobjAttribute:
    """``struct kobj_attribute``: *show* gives the text, *store* takes what was written and returns bytes consumed."""

    name: str
    mode: int
    show: Callable[[Kobject], bytes] | None = None
    store: Callable[[Kobject, bytes], Awaitable[int]] | None = None


@dataclass(frozen=True, slots=True)
class KobjType:
    """``struct kobj_type``: what a kind of object has in common."""

    attributes: Sequence[KobjAttribute] = ()
    release: Callable[[Kobject], None] | None = None


@dataclass(eq=False, slots=True)
class Kobject:
    """``struct kobject``. *owner* is the structure that embeds it (``container_of``)."""

    kernfs: Kernfs
    ktype: KobjType
    owner: object = None
    name: str = ""
    parent: Kobject | None = None
    node: KernfsNode | None = None
    refcount: int = field(default=1)

    def add(self, parent: Kobject | KernfsNode, name: str) -> None:
        """``kobject_add``: create the directory *name* under *parent*, with the default attributes.

        A parent Kobject is referenced until this one is released. Raises OSError(EEXIST) for a name that is taken,
        OSError(EINVAL) for an empty one, OSError(ENOENT) when the parent has no directory.
        """
        if not name:
            raise OSError(errno.EINVAL, "kobject: empty name")
        # kobject_set_name_vargs(): a slash cannot be part of a file name
        name = name.replace("/", "!")
        where = parent.node if isinstance(parent, Kobject) else parent
        if where is None:
            raise OSError(errno.ENOENT, f"kobject {name}: the parent has no directory")
        self.name = name
        self.node = self.kernfs.create_dir(where, name)
        if isinstance(parent, Kobject):
            self.parent = parent
            parent.get()
        for attr in self.ktype.attributes:
            self.create_file(attr)

    def create_file(self, attr: KobjAttribute) -> KernfsNode:
        """``sysfs_create_file``. Raises OSError(EEXIST), OSError(ENOENT) when the object has no directory."""
        if self.node is None:
            raise OSError(errno.ENOENT, f"kobject {self.name}: no directory")
        show, store = attr.show, attr.store
        ops = Attribute(
            None if show is None else (lambda: show(self)),
            None if store is None else (lambda data: store(self, data)),
        )
        return self.kernfs.create_file(self.node, attr.name, ops, attr.mode)

    def get(self) -> Kobject:
        """``kobject_get``: one more reference."""
        self.refcount += 1
        return self

    async def put(self) -> None:
        """``kobject_put``: one reference less; the last one removes the directory and releases the object."""
        self.refcount -= 1
        if self.refcount > 0:
            return
        if self.node is not None:
            node, self.node = self.node, None
            await self.kernfs.remove(node)
        if self.ktype.release is not None:
            self.ktype.release(self)
        if self.parent is not None:
            parent, self.parent = self.parent, None
            await parent.put()
