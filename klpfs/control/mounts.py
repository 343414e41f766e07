"""What is mounted where: finding klpfs mounts, dead ones too, and taking them away.

A FUSE mount whose daemon died stays in the mount table; every look at it fails with ENOTCONN ("Transport endpoint is
not connected") until it is unmounted. So the table is read, and nothing below a mount point is touched.

Source: proc_pid_mountinfo(5), fs/fuse/inode.c, umount(2).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from typing import NamedTuple

#: fsname of our mounts; the type in the mount table is ``fuse`` or ``fuse.klpfs``.
FSNAME = "klpfs"


class Mount(NamedTuple):
    """A line of mountinfo: where, of which file system type, and from which source."""

    mountpoint: str
    fstype: str
    source: str

    @property
    def is_klpfs(self) -> bool:
        """Whether a klpfs daemon made it."""
        return self.fstype == "fuse.klpfs" or (self.fstype.startswith("fuse") and self.source == FSNAME)


def _unescape(text: str) -> str:
    """Undo the octal escapes of the mount table."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def mounts() -> list[Mount]:
    """The mount table of this process, in order."""
    out = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, tail = left.split(" "), right.split(" ")
            if len(fields) > 4 and len(tail) > 1:
                out.append(Mount(_unescape(fields[4]), tail[0], _unescape(tail[1])))
    return out


def mount_at(path: str) -> Mount | None:
    """The topmost mount whose mount point is ``path`` (absolute, free of symlinks), or None."""
    found = None
    for mount in mounts():
        if mount.mountpoint == path:
            found = mount
    return found


def is_dead(path: str) -> bool:
    """Whether the FUSE mount at ``path`` has lost its daemon."""
    try:
        os.statvfs(path)
    except OSError as err:
        return err.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def resolve(path: str) -> str:
    """``path`` absolute and free of symlinks, without looking at its last part unless that is a symlink."""
    full = os.path.abspath(path)
    if full == "/":
        return full
    parent = os.path.realpath(os.path.dirname(full))
    here = os.path.join(parent, os.path.basename(full))
    return os.path.realpath(here) if os.path.islink(here) else here


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount what is at ``path``: with umount(8) as root, else with fusermount3(1).

    Raises OSError: EBUSY when something uses it, ENOENT when there is no program to do it, else EPERM with the
    program's own words.
    """
    commands = []
    if os.geteuid() == 0:
        commands.append(["umount", "--lazy", path] if lazy else ["umount", path])
    commands.append(["fusermount3", "-u", "-z", path] if lazy else ["fusermount3", "-u", path])
    commands.append(["fusermount", "-u", "-z", path] if lazy else ["fusermount", "-u", path])
    available = [cmd for cmd in commands if shutil.which(cmd[0])]
    if not available:
        raise OSError(errno.ENOENT, "neither umount nor fusermount3 is installed (Debian package fuse3)")
    done = subprocess.run(
        available[0],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        words = (done.stderr.strip() or f"{available[0][0]} failed").splitlines()[-1]
        raise OSError(errno.EBUSY if "busy" in words else errno.EPERM, words)
