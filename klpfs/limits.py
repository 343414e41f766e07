"""The resource limits of a daemon: not those of the shell that it was started from.

Model
    A user's limits are meant for the programs that they run. The daemon stands for the kernel, which has none: it
    raises each that could end it, or what it starts, as far as it may. A command in a world keeps the limits that it
    was given, since its processes are forked beside the daemon, not from it.

Source
    setrlimit(2): the soft limit can go up to the hard one, and beyond with CAP_SYS_RESOURCE.
"""

from __future__ import annotations

import resource
from typing import Final

__all__ = ["raise_limits"]

_UNLIMITED: Final = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
_FILES: Final = 65536
"""Descriptors that are enough; there is no unlimited number of them."""


def raise_limits() -> None:
    """Raise the limits of this process on memory, CPU time, file sizes and descriptors."""
    for which in (*_UNLIMITED, resource.RLIMIT_NOFILE):
        soft, hard = resource.getrlimit(which)
        wanted = _FILES if which == resource.RLIMIT_NOFILE else resource.RLIM_INFINITY
        if soft in (wanted, resource.RLIM_INFINITY) or (which == resource.RLIMIT_NOFILE and soft > wanted):
            continue
        enough = hard == resource.RLIM_INFINITY or (which == resource.RLIMIT_NOFILE and hard >= wanted)
        for attempt in ((wanted, hard if enough else wanted), (hard, hard)):
            try:
                resource.setrlimit(which, attempt)
                break
            except (OSError, ValueError):
                continue  # not for this user, or more than there can be: as far as it goes
