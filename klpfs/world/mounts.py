"""Mounts of a world: the FUSE tree at the literal paths, with what the host has beside it.

Model
    The FUSE file system is mounted once, over /proc, on top of a procfs of the world's PID namespace; then its parts
    are bound to where they belong, /proc last, which hides the rest. What the host has in /sys/kernel is bound back
    into directories and files that the daemon made for the purpose. Everything happens in the world's own mount
    namespace.

    The procfs stays reachable at ``/proc/.klpfs/proc``, where the symbolic links of the FUSE /proc lead, and a private
    tmpfs at ``/proc/.klpfs/run`` holds the control socket.

Locks
    None: one thread, before the command starts. Each path into the FUSE tree waits for the daemon.

Source
    mount(2), mount_namespaces(7), fs/fuse/inode.c (``fuse_fill_super_common``: the namespace that opened /dev/fuse must
    be the one that mounts), fs/namespace.c (``mount_too_revealing``).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from klpfs.world import sysapi

__all__ = [
    "HIDDEN",
    "DevDir",
    "WorldError",
    "bind_host_entries",
    "mount_fuse",
    "mount_proc",
    "overlay_dir",
    "place_tree",
]

#: The directory below /proc that is not listed: ``proc`` is a procfs, ``run`` a tmpfs, ``dev`` has modules' devices.
HIDDEN = ".klpfs"


class WorldError(Exception):
    """The world could not be made; the message is for the user, complete with what to do about it."""


def mount_proc() -> int:
    """A procfs of this PID namespace over /proc; a descriptor (O_PATH) of its root. Raises WorldError."""
    flags = sysapi.MS_NOSUID | sysapi.MS_NODEV | sysapi.MS_NOEXEC
    try:
        sysapi.mount("proc", "/proc", "proc", flags)
    except OSError as err:
        hint = ""
        if err.errno == errno.EPERM:
            hint = (
                " (the kernel refuses a new /proc where parts of the present one are hidden, as container runtimes do:"
                " docker run --security-opt systempaths=unconfined, podman run --security-opt unmask=ALL;"
                " on hosts with AppArmor also check kernel.apparmor_restrict_unprivileged_userns)"
            )
        raise WorldError(f"cannot mount /proc: {err.strerror}{hint}") from None
    return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def mount_fuse() -> int:
    """Mount the emulated tree over /proc; the /dev/fuse descriptor to serve it on. Raises WorldError."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        hints = {
            errno.ENOENT: "load the fuse module (modprobe fuse); a container needs --device /dev/fuse",
            errno.ENODEV: "load the fuse module (modprobe fuse)",
            errno.EACCES: "an administrator can allow it: chmod 666 /dev/fuse, and for good a udev rule"
            ' (KERNEL=="fuse", MODE="0666"), which the package fuse3 brings',
            errno.EPERM: "the container's device rules forbid it: start it with --device /dev/fuse",
        }
        hint = hints.get(err.errno or 0, "")
        raise WorldError(f"cannot open /dev/fuse: {err.strerror}" + (f"; {hint}" if hint else "")) from None
    data = f"fd={fd},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions"
    try:
        sysapi.mount("klpfs", "/proc", "fuse.klpfs", sysapi.MS_NOSUID | sysapi.MS_NODEV, data)
    except OSError as err:
        raise WorldError(f"cannot mount a FUSE file system: {err.strerror}") from None
    return fd


def _try_bind(source: str, target: str) -> bool:
    """Bind if both are there and may be; whether it worked."""
    try:
        sysapi.bind(source, target)
    except OSError:
        return False
    return True


def bind_host_entries(host: int, target: str) -> None:
    """Bind entries of the directory *host* (a descriptor) over those of the same name that stand for them in *target*.

    The daemon made those entries, with no permission bits at all; other directories are gone through in search of more.
    """
    with os.scandir(target) as entries:
        present = [(entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in entries]
    os.fchdir(host)
    for name, mode in present:
        if stat.S_IMODE(mode) == 0:
            _try_bind(f"./{name}", f"{target}/{name}")
    for name, mode in present:
        if stat.S_IMODE(mode) and stat.S_ISDIR(mode):
            try:
                inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=host)
            except OSError:
                continue  # the emulated kernel alone has it
            bind_host_entries(inner, f"{target}/{name}")
            os.close(inner)
            os.fchdir(host)


def _entries(path: str) -> list[tuple[str, bool, bool]]:
    """What is in a directory: name, whether it is a link, whether a directory. No file is looked at for that."""
    with os.scandir(path) as entries:
        return [(entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries]


def _refill(host: str, target: str, found: list[tuple[str, bool, bool]]) -> None:
    """Bind or link what was *found* in the directory *host* into the empty directory *target*."""
    for name, is_link, is_dir in found:
        there = f"{target}/{name}"
        if is_link:
            os.symlink(os.readlink(f"{host}/{name}"), there)
            continue
        if is_dir:
            os.mkdir(there)
        else:
            os.close(os.open(there, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        _try_bind(f"{host}/{name}", there)


def overlay_dir(path: str, *, leave_out: frozenset[str] = frozenset(), mode: str = "755") -> None:
    """Replace the directory *path* by a tmpfs in which everything that was there is bound or linked again.

    Names in *leave_out* are not. Raises OSError.
    """
    host = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = [entry for entry in _entries(path) if entry[0] not in leave_out]
        sysapi.mount("klpfs", path, "tmpfs", sysapi.MS_NOSUID | sysapi.MS_NODEV, f"mode={mode}")
        os.fchdir(host)
        _refill(".", path, found)
        os.fchdir(here)
    finally:
        os.close(host)
        os.close(here)


class DevDir:
    """The nodes of the emulated kernel's devices in /dev: links to files of the tree, made and removed at any time.

    With the first one, a tmpfs takes the place of /dev in the world, with all that the host has there bound again. It
    is prepared elsewhere, so that no process sees it half done: *stage* is a descriptor of a tmpfs. What the host's
    kernel adds to its /dev later is not seen any more. Nothing here waits for the daemon.
    """

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._own: set[str] = set()
        self._links: set[str] = set()

    def handle(self, message: bytes) -> bytes:
        """Do what the daemon asks for, ``+NAME`` or ``-NAME``; the reason why not, empty if it was done."""
        name = message[1:].decode("utf-8", "surrogateescape")
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if message[:1] == b"+":
                self._add(name)
            else:
                self._remove(name)
        except OSError as err:
            return (err.strerror or str(err)).encode()
        finally:
            os.fchdir(here)
            os.close(here)
        return b""

    def _add(self, name: str) -> None:
        directories, last = name.split("/")[:-1], name.split("/")[-1]
        if any(part in ("", ".", "..") for part in (*directories, last)):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        where = "/dev"
        self._take_over(where)
        for part in directories:
            where = f"{where}/{part}"
            try:
                os.mkdir(where)
                self._own.add(where)
            except FileExistsError:
                self._take_over(where)
        os.symlink(f"/proc/{HIDDEN}/dev/{name}", f"{where}/{last}")
        self._links.add(name)

    def _take_over(self, path: str) -> None:
        """Make *path* a directory of this class's own, so that nothing is created in the host's."""
        if path in self._own:
            return
        os.fchdir(self._stage)
        found = _entries(path)
        os.mkdir("stage")
        try:
            sysapi.mount("klpfs", "stage", "tmpfs", sysapi.MS_NOSUID | sysapi.MS_NODEV, "mode=755")
            try:
                _refill(path, "stage", found)
                sysapi.mount("stage", path, None, sysapi.MS_MOVE)
            except OSError:
                sysapi.umount("stage")
                raise
        finally:
            os.rmdir("stage")
        self._own.add(path)

    def _remove(self, name: str) -> None:
        if name not in self._links:
            return
        self._links.discard(name)
        path = f"/dev/{name}"
        os.unlink(path)
        while (path := os.path.dirname(path)) != "/dev" and path in self._own and not os.path.ismount(path):
            os.rmdir(path)
            self._own.discard(path)


def _bind_kmsg(source: str) -> None:
    """The emulated /dev/kmsg, also where the host (a container) has none."""
    try:
        sysapi.bind(source, "/dev/kmsg")
    except FileNotFoundError:
        overlay_dir("/dev")
        os.close(os.open("/dev/kmsg", os.O_CREAT | os.O_WRONLY, 0o644))
        sysapi.bind(source, "/dev/kmsg")


def _place_sysctls(host: str) -> None:
    """/proc/sys is the procfs's, *host*, with the emulated kernel's files over those of the same names.

    It cannot be made of links: sysctl(8) does not follow any that lead out of /proc/sys.
    """
    emulated = os.open("/proc/sys/kernel", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    names = os.listdir("/proc/sys/kernel")
    merged = any(stat.S_IMODE(os.lstat(f"/proc/sys/kernel/{name}").st_mode) == 0 for name in names)
    sysapi.bind(host, "/proc/sys")
    os.fchdir(emulated)
    if merged:
        # the host's kernel lacks one of the files, and nothing can be created there
        inner = os.open(f"{host}/kernel", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sysapi.bind("../kernel", "/proc/sys/kernel")
        bind_host_entries(inner, "/proc/sys/kernel")
        os.close(inner)
    else:
        for name in names:
            sysapi.bind(f"./{name}", f"/proc/sys/kernel/{name}")
    os.close(emulated)


def place_tree(*, report: Callable[[int], None]) -> int:
    """Bind the parts of the tree at /proc to where they belong.

    *report* is given a descriptor (O_PATH) of the private tmpfs, which is then returned. Raises WorldError.
    """
    try:
        os.listdir("/proc/sys/kernel")  # one READDIRPLUS instead of a LOOKUP for each name below
        missing = [path for path in ("/sys/kernel", "/sys/module") if not os.path.isdir(path)]
        if missing:  # no sysfs is mounted, or the host's kernel has no modules at all
            overlay_dir("/sys")
            for path in missing:
                os.mkdir(path)
        kernel = os.open("/sys/kernel", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sysapi.bind("/proc/sys/kernel", "/sys/kernel")
        bind_host_entries(kernel, "/sys/kernel")
        os.close(kernel)
        sysapi.bind("/proc/sys/module", "/sys/module")
        _bind_kmsg("/proc/dev/kmsg")
        sysapi.bind("/proc/proc", "/proc")
        hidden = f"/proc/{HIDDEN}"
        sysapi.mount("proc", f"{hidden}/proc", "proc", sysapi.MS_NOSUID | sysapi.MS_NODEV | sysapi.MS_NOEXEC)
        sysapi.mount("klpfs", f"{hidden}/run", "tmpfs", sysapi.MS_NOSUID | sysapi.MS_NODEV, "mode=755,size=1m")
        run = os.open(f"{hidden}/run", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        report(run)
        _place_sysctls(f"{hidden}/proc/sys")
        return run
    except OSError as err:
        if err.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise WorldError("the daemon ended while the world was being made") from None
        raise WorldError(f"cannot set up {err.filename or 'the tree'}: {err.strerror}") from None
