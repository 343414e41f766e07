"""The users and groups of a world that has a user namespace of its own.

Model
    Its root is the user who started it. Where an administrator gave that user subordinate ids, they are the world's
    other users, so that ``chown 1:1`` or ``su`` work there; the mapping of those is written by newuidmap(1) and
    newgidmap(1), from a process outside. Without them root is the only user, and to change owner to another one is
    EINVAL.

Locks
    None: before the command starts.

Source
    user_namespaces(7), subuid(5), newuidmap(1).
"""

from __future__ import annotations

import os
import pwd

__all__ = ["Mapper"]

#: The ids of a world are those of 16 bits, as on a system of its own.
_IDS_MAX = 65536
_TOOLS = (("uid", "/usr/bin/newuidmap", "/etc/subuid"), ("gid", "/usr/bin/newgidmap", "/etc/subgid"))


def subordinate(path: str, uid: int) -> tuple[int, int] | None:
    """The first range of subordinate ids that *path* gives to *uid*: first id and how many. None: no range."""
    owners = {str(uid)}
    try:
        owners.add(pwd.getpwuid(uid).pw_name)
    except KeyError:
        pass
    try:
        with open(path) as file:
            for line in file:
                owner, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if owner in owners and first.isdecimal() and count.isdecimal() and int(count):
                    return int(first), int(count)
    except OSError:
        pass
    return None


class Mapper:
    """Maps the ids of the user namespace that this process is going to make.

    To be made before that namespace; :meth:`write` afterwards. A child stays outside meanwhile where it is needed.
    """

    def __init__(self) -> None:
        self._own = {"uid": os.geteuid(), "gid": os.getegid()}
        self._child = 0
        commands = []
        for kind, tool, path in _TOOLS:
            found = subordinate(path, self._own["uid"])
            if found is None or not os.access(tool, os.X_OK):
                return
            first, count = found
            numbers = (os.getpid(), 0, self._own[kind], 1, 1, first, min(count, _IDS_MAX - 1))
            commands.append([tool, *map(str, numbers)])
        read, self._go = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._go)
            os._exit(self._outside(read, commands))
        os.close(read)

    @staticmethod
    def _outside(start: int, commands: list[list[str]]) -> int:
        """The child's work; its exit status has bit 0 set when users are mapped, bit 1 for groups."""
        done = 0
        try:
            if os.read(start, 1):
                null = os.open(os.devnull, os.O_RDWR)
                quiet = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
                for bit, command in enumerate(commands):
                    pid = os.posix_spawn(command[0], command, {}, file_actions=quiet, setsigmask=())
                    if os.waitpid(pid, 0)[1] == 0:
                        done |= 1 << bit
        except OSError:
            pass
        return done

    def write(self) -> None:
        """Map the ids of the namespace that this process is in now. Raises OSError."""
        done = self._by_tools()
        if not done & 2:
            self._single("setgroups", "deny")
            self._single("gid_map", f"0 {self._own['gid']} 1")
        if not done & 1:
            self._single("uid_map", f"0 {self._own['uid']} 1")

    def _by_tools(self) -> int:
        if not self._child:
            return 0
        os.write(self._go, b"g")
        os.close(self._go)
        _, status = os.waitpid(self._child, 0)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0

    @staticmethod
    def _single(name: str, text: str) -> None:
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
