"""/proc of a world: the host's for its real processes, with the emulated kernel's files and tasks in it.

Model
    A directory provider for /proc itself and for each process. What the emulated kernel says nothing about is a
    symbolic link to the same place in the procfs below ``/proc/.klpfs/proc``; so reading it costs the daemon a look-up
    and nothing more, and descriptors, mappings and the like are the real ones. ``exe``, ``cwd`` and ``root`` are links
    with the text of the real ones. ``patch_state``, ``stack`` and ``wchan`` are files of their own, and so is
    everything about emulated tasks. (/proc/sys is mounted: see :mod:`.mounts`.)

Locks
    None: providers run on the trio thread. They never follow a link, so that they cannot lead into this file system.

Source
    proc(5), fs/proc/base.c, fs/proc/self.c, fs/proc/thread_self.c.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from klpfs.kernfs import Caller, Entry, SeqFile
from klpfs.world.mounts import HIDDEN
from klpfs.world.tasks import own_frames

if TYPE_CHECKING:
    from klpfs.kernel.procfs import ProcFs
    from klpfs.kernel.sched import Task
    from klpfs.machine import Machine
    from klpfs.world.hostproc import HostProc
    from klpfs.world.tasks import WorldTasks

__all__ = ["WorldProc"]

_TEXT_LINKS = frozenset({"exe", "cwd", "root"})


class WorldProc:
    """The entries of /proc."""

    def __init__(self, machine: Machine, proc: HostProc, tasks: WorldTasks) -> None:
        self.machine = machine
        self.proc = proc
        self.tasks = tasks
        self.emulated: ProcFs = machine.procfs
        self.uids = IdMap(proc, "uid_map")
        self.gids = IdMap(proc, "gid_map")
        self.has_patch_state = machine.profile.has("proc_patch_state")

    # -- the directory ------------------------------------------------------------------------------------------------

    def lookup(self, name: str) -> Entry | None:
        if name.isascii() and name.isdigit():
            return self.emulated.tasks.lookup(name) or self._process(name)
        if name == "self":
            return Entry.link(lambda caller: str(self._tgid(caller)))
        if name == "thread-self":
            return Entry.link(lambda caller: f"{self._tgid(caller)}/task/{caller.pid}")
        return self.host_entry(name, "")

    def list(self) -> Iterable[str]:
        names = [*self.proc.listdir("."), *self.emulated.tasks.list()]
        pids = [name for name in names if name.isdigit()]
        return [*(name for name in names if not name.isdigit()), *sorted(pids, key=int)]

    def host_entry(self, path: str, up: str) -> Entry | None:
        """A link to *path* in the procfs; *up* leads from the directory it is in to /proc. None if it is not there."""
        try:
            mode = self.proc.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                return Entry.link(self.proc.readlink(path))
        except OSError:
            return None
        return Entry.link(f"{up}{HIDDEN}/proc/{path}")

    def _tgid(self, caller: Caller) -> int:
        try:
            if caller.pid > 0:
                return self.proc.tgid(caller.pid)
        except OSError:
            pass
        raise OSError(errno.ENOENT, "the caller is in no PID namespace of this /proc")

    # -- processes ----------------------------------------------------------------------------------------------------

    def _process(self, name: str) -> Entry | None:
        return self.process_dir(name, "../", thread=False)

    def process_dir(self, path: str, up: str, *, thread: bool) -> Entry | None:
        """The directory of a real process or thread; None if there is none."""
        try:
            st = self.proc.lstat(path)
        except OSError:
            return None
        uid, gid = self.uids.inside(st.st_uid), self.gids.inside(st.st_gid)
        return Entry.dir(_ProcessDir(self, path, up, uid, gid, thread=thread), uid=uid, gid=gid, key=st.st_ino)

    def may_look(self, caller: Caller, uid: int) -> None:
        """``ptrace_may_access`` in short: root and the owner. Raises OSError(EACCES)."""
        if caller.uid not in (0, uid):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


class _ProcessDir:
    """The entries of the directory of a real process (*path* ``PID``) or thread (``PID/task/TID``)."""

    def __init__(self, world: WorldProc, path: str, up: str, uid: int, gid: int, *, thread: bool) -> None:
        self.world = world
        self.path = path
        self.up = up
        self.uid, self.gid = uid, gid
        self.thread = thread
        self.tid = int(path.rpartition("/")[2])

    def lookup(self, name: str) -> Entry | None:
        world = self.world
        if name == "patch_state":
            if not world.has_patch_state:
                return None
            return self._file(self._patch_state, 0o400)
        if name == "stack":
            return self._file(self._stack, 0o400)
        if name == "wchan":
            return self._file(self._wchan, 0o444)
        if name == "task" and not self.thread:
            return Entry.dir(_ThreadsDir(world, self.path, self.up), uid=self.uid, gid=self.gid)
        path = f"{self.path}/{name}"
        if name in _TEXT_LINKS:
            return Entry.link(lambda caller: self._link_text(path, caller), uid=self.uid, gid=self.gid)
        return world.host_entry(path, self.up)

    def list(self) -> Iterable[str]:
        try:
            names = self.world.proc.listdir(self.path)
        except OSError:
            return []
        if self.world.has_patch_state and "patch_state" not in names:
            names.append("patch_state")
        return names

    def _file(self, show: Callable[[], bytes], mode: int) -> Entry:
        async def ashow(caller: Caller) -> bytes:
            return show()

        return Entry.file(SeqFile(ashow, write_errno=errno.EINVAL), mode, uid=self.uid, gid=self.gid)

    def _link_text(self, path: str, caller: Caller) -> str:
        self.world.may_look(caller, self.uid)
        return self.world.proc.readlink(path)

    def _task(self) -> Task:
        task = self.world.tasks.ensure(self.tid)
        if task is None:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        return task

    def _patch_state(self) -> bytes:
        return b"%d\n" % self._task().patch_state

    def _stack(self) -> bytes:
        task = self._task()
        lines = self.world.proc.stack(self.path)
        if lines is None:
            name = self.world.proc.wchan(self.path)
            lines = [] if name == "0" else [f"{name}+0x0/0x0"]
        kallsyms = self.world.machine.kallsyms
        lines = [*(str(kallsyms.lookup(a) or f"{a:#x}") for a in task.inner()), *own_frames(task, lines)]
        return "".join(f"[<0>] {line}\n" for line in lines).encode("utf-8", "surrogateescape")

    def _wchan(self) -> bytes:
        task = self._task()
        for address in task.inner():
            where = self.world.machine.kallsyms.lookup(address)
            if where is not None:
                return where.name.encode("utf-8", "surrogateescape")
        return self.world.proc.wchan(self.path).encode()


class _ThreadsDir:
    """``/proc/PID/task``."""

    def __init__(self, world: WorldProc, path: str, up: str) -> None:
        self.world = world
        self.path = f"{path}/task"
        self.up = f"{up}../../"

    def lookup(self, name: str) -> Entry | None:
        if not (name.isascii() and name.isdigit()):
            return None
        return self.world.process_dir(f"{self.path}/{name}", self.up, thread=True)

    def list(self) -> Iterable[str]:
        try:
            return self.world.proc.listdir(self.path)
        except OSError:
            return []


class IdMap:
    """User or group ids of the daemon's namespace as those of the world's (``from_kuid_munged``)."""

    def __init__(self, proc: HostProc, name: str) -> None:
        self._ranges = []
        for line in proc.read(f"1/{name}").decode().splitlines():
            inside, outside, count = map(int, line.split())
            self._ranges.append((inside, outside, count))

    def inside(self, ident: int) -> int:
        """The id inside; the overflow id if it has none."""
        for inside, outside, count in self._ranges:
            if outside <= ident < outside + count:
                return ident - outside + inside
        return 65534
