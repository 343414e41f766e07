"""Reading the world's processes, through a procfs of their PID namespace.

Model
    The daemon holds a descriptor of the procfs that pid 1 of the world mounted. Pids in it are those that the world's
    processes know of each other. Everything is read relative to that descriptor, so no path crosses the emulated tree.

Locks
    None; any thread.

Source
    proc(5), fs/proc/array.c (``do_task_stat``), fs/proc/base.c (``proc_pid_stack``, ``proc_pid_syscall``).
"""

from __future__ import annotations

import os
import signal
from typing import Final, NamedTuple

__all__ = ["CAP_SYSLOG", "CAP_SYS_MODULE", "HostProc", "Stat"]

CAP_SYS_MODULE: Final = 16
CAP_SYSLOG: Final = 34

_O_RDONLY: Final = os.O_RDONLY | os.O_CLOEXEC


class Stat(NamedTuple):
    """A few fields of /proc/PID/stat: ``start`` is in clock ticks since boot."""

    comm: str
    state: str
    ppid: int
    start: int


class HostProc:
    """The procfs behind descriptor *fd*. Methods raise OSError (ENOENT, ESRCH) when a process is gone."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._capable: tuple[int, str] | None = None

    def read(self, path: str) -> bytes:
        """A whole file, *path* being relative to the procfs."""
        fd = os.open(path, _O_RDONLY, dir_fd=self.fd)
        try:
            data = os.read(fd, 16384)
            if len(data) < 1024:
                return data  # procfs gives whole records; a second read would only say that this was all
            parts = [data]
            while data := os.read(fd, 65536):
                parts.append(data)
            return b"".join(parts)
        finally:
            os.close(fd)

    def listdir(self, path: str) -> list[str]:
        """The names in a directory."""
        fd = os.open(path, _O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def readlink(self, path: str) -> str:
        """The text of a link. It is never followed."""
        return os.readlink(path, dir_fd=self.fd)

    def lstat(self, path: str) -> os.stat_result:
        """What *path* is, links not followed."""
        return os.stat(path, dir_fd=self.fd, follow_symlinks=False)

    def pids(self) -> list[int]:
        """The processes of the world."""
        return [int(name) for name in self.listdir(".") if name.isdecimal()]

    def threads(self, pid: int) -> list[int]:
        """The threads of a process."""
        return [int(name) for name in self.listdir(f"{pid}/task")]

    def stat(self, path: str) -> Stat:
        """What ``PATH/stat`` says, *path* being ``PID`` or ``PID/task/TID``."""
        head, _, tail = self.read(f"{path}/stat").rpartition(b")")
        fields = tail.split()
        comm = head.partition(b"(")[2].decode("utf-8", "surrogateescape")
        return Stat(comm, fields[0].decode(), int(fields[1]), int(fields[19]))

    def status(self, tid: int) -> dict[str, str]:
        """The fields of /proc/TID/status."""
        text = self.read(f"{tid}/status").decode("utf-8", "surrogateescape")
        return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}

    def tgid(self, tid: int) -> int:
        """The process that a thread belongs to."""
        return int(self.status(tid)["Tgid"])

    def stack(self, path: str) -> list[str] | None:
        """The kernel stack, innermost first, as ``name+0xOFF/0xSIZE``; None where it may not be read."""
        try:
            text = self.read(f"{path}/stack").decode("ascii", "replace")
        except (PermissionError, FileNotFoundError):
            return None
        return [line.partition("] ")[2].split(" ")[0] for line in text.splitlines()]

    def wchan(self, path: str) -> str:
        """The function that the task sleeps in, ``0`` if none or not to be known."""
        try:
            return self.read(f"{path}/wchan").decode("ascii", "replace") or "0"
        except PermissionError:
            return "0"

    def syscall(self, path: str) -> str:
        """Number, arguments, stack and instruction pointer of the system call the task is in; ``running`` if none."""
        try:
            return self.read(f"{path}/syscall").decode("ascii", "replace").strip()
        except PermissionError:
            return ""

    def kill(self, tid: int) -> None:
        """End the process of *tid* with SIGKILL. Raises OSError(EPERM) where the daemon may not."""
        fd = os.open(str(tid), _O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)  # serves as a pidfd
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)

    def capable(self, tid: int, cap: int) -> bool:
        """Whether *tid* has capability *cap* with respect to the world.

        It has, too, if root of the world has not (in a container that was denied it) and the task is root there: which
        capabilities the host gives out is not the emulated kernel's business.
        """
        if self._capable is None:
            root = self.status(1)
            self._capable = int(root["CapEff"], 16), self._userns(1)
        root_caps, root_ns = self._capable
        status = self.status(tid)
        if self._userns(tid) != root_ns:
            return False
        have = int(status["CapEff"], 16)
        if have >> cap & 1:
            return True
        return not root_caps >> cap & 1 and status["Uid"].split()[1] == "0"

    def _userns(self, tid: int) -> str:
        try:
            return self.readlink(f"{tid}/ns/user")
        except PermissionError:
            return ""
