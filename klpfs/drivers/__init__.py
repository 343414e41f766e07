"""FUSE drivers: thin adapters between a FUSE library and :class:`klpfs.kernfs.vfs.Vfs`.

Model
    Each driver is one coroutine with the signature of :class:`Serve`: it mounts, reports through *task_status* that the
    mount can be used, serves until it is cancelled (then unmounts) or until somebody unmounts from outside (then
    returns). All meaning is in :class:`~klpfs.kernfs.vfs.Vfs`; a driver adds caching rules, removal notices and error
    guarding: an unexpected exception is logged on the ``klpfs.drivers`` logger with its operation and answered EIO.

    ========  ==========================  ===========================================================================
    driver    library                     remarks
    ========  ==========================  ===========================================================================
    pyfuse3   libfuse3, on the trio loop  the default: entries are cached for ever and taken back when a node goes
    fusepy    libfuse2, threads           nothing about names is cached, so that every path component costs a request
    ========  ==========================  ===========================================================================

Locks
    One session per process and library: both libraries keep global state. See each driver for its threads.

Source
    The measured rules of the FUSE protocol that the drivers keep are named where they apply; fs/fuse/{dir,file,dev}.c
    is the other end.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import trio

from klpfs.drivers.common import MountError, Options
from klpfs.kernfs.vfs import Vfs

__all__ = ["DRIVERS", "MountError", "Options", "Serve", "get_driver"]

DRIVERS = ("pyfuse3", "fusepy")
"""The names that :func:`get_driver` takes, the default first."""


class Serve(Protocol):
    """The interface of a driver."""

    async def __call__(
        self,
        vfs: Vfs,
        mountpoint: str,
        *,
        options: Options | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Mount *vfs* at *mountpoint* and serve it.

        *mountpoint* is a directory, or ``/dev/fd/N`` for an open /dev/fuse that somebody else mounts. Raises
        :class:`MountError`.
        """


def get_driver(name: str) -> Serve:
    """The driver called *name*, loaded now.

    Raises ValueError if there is no such driver and ImportError if its library is missing.
    """
    if name not in DRIVERS:
        raise ValueError(f"unknown driver {name!r}, known are {', '.join(DRIVERS)}")
    return cast(Serve, importlib.import_module(f"klpfs.drivers.{name}_driver").serve)
