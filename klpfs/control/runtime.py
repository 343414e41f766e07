"""The runtime directory and the registry of running daemons.

A daemon leaves two files in the runtime directory: ``NAME.sock``, its control socket (mode 0600), and ``NAME.json``,
an :class:`Entry`. The directory belongs to the user and has mode 0700; one that does not is refused, not used. An entry
whose socket nobody answers any more is that of a daemon that died.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from klpfs.control.text import from_json, to_json

#: Environment variables that choose the daemon: a mount point, or directly a socket (set inside ``klpfs run``).
ENV_MOUNT = "KLPFS_MOUNT"
ENV_SOCKET = "KLPFS_SOCKET"

#: Longest path that fits sun_path (include/uapi/linux/un.h, UNIX_PATH_MAX with its terminating NUL).
_SUN_PATH = 107


class Entry(msgspec.Struct):
    """What a daemon says of itself in the registry. ``started`` is in seconds since the epoch."""

    name: str
    pid: int
    socket: str
    mountpoint: str
    driver: str
    kernel: str
    version: str
    started: float
    log: str = ""


class RuntimeDirError(Exception):
    """There is no runtime directory that may be used."""


class NoDaemonError(Exception):
    """No daemon fits, or more than one; ``candidates`` are those that run."""

    def __init__(self, message: str, candidates: list[Entry]) -> None:
        super().__init__(message)
        self.candidates = candidates


def candidate_dirs() -> list[Path]:
    """Where the runtime directory may be, the preferred one first.

    $XDG_RUNTIME_DIR counts where it is a directory; one of an unusual name keeps its daemons to itself. Otherwise all
    the usual places are looked at: a mount may have been made before a login session created /run/user/UID.
    """
    uid = os.geteuid()
    usual = f"/run/user/{uid}"
    xdg = os.environ.get("XDG_RUNTIME_DIR", "")
    if xdg.startswith("/") and os.path.isdir(xdg) and os.path.normpath(xdg) != usual:
        return [Path(xdg) / "klpfs"]
    found = [usual] if os.path.isdir(usual) else []
    return [*(Path(d) / "klpfs" for d in [*found, *(["/run"] if uid == 0 else [])]), Path(f"/tmp/klpfs-{uid}")]


def _check_private(path: Path) -> None:
    """Refuse a directory that somebody else could have put files into. Raises OSError or RuntimeDirError."""
    st = os.lstat(path)
    if not stat.S_ISDIR(st.st_mode):
        raise RuntimeDirError(f"{path}: not a directory")
    if st.st_uid != os.geteuid():
        raise RuntimeDirError(f"{path}: belongs to user {st.st_uid}, not to {os.geteuid()}")
    if stat.S_IMODE(st.st_mode) & 0o077:
        raise RuntimeDirError(f"{path}: open to others (mode {stat.S_IMODE(st.st_mode):04o}, 0700 is needed)")


def make_runtime_dir() -> Path:
    """The runtime directory, created with mode 0700 where it does not exist. Raises :class:`RuntimeDirError`."""
    reasons = []
    for path in candidate_dirs():
        try:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
            _check_private(path)
            if os.access(path, os.W_OK | os.X_OK):
                return path
            reasons.append(f"{path}: not writable")
        except RuntimeDirError as err:
            reasons.append(str(err))
        except OSError as err:
            reasons.append(f"{path}: {err.strerror}")
    raise RuntimeDirError("no runtime directory for the control socket: " + "; ".join(reasons))


def new_name(pid: int) -> str:
    """A name for a daemon's files. The pid alone would repeat across pid namespaces."""
    return f"{pid}-{secrets.token_hex(3)}"


@contextmanager
def reachable(path: str) -> Iterator[str]:
    """``path`` in a form short enough for a socket address: by way of its directory's fd when it is too long."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield path
        return
    fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{os.path.basename(path)}"
    finally:
        os.close(fd)


def write_entry(directory: Path, entry: Entry) -> Path:
    """Publish an entry, all at once. Returns the file's path."""
    path = directory / f"{entry.name}.json"
    tmp = directory / f".{entry.name}.tmp"
    tmp.write_bytes(to_json(entry))
    tmp.rename(path)
    return path


def remove_entry(entry: Entry) -> None:
    """Take an entry's files away; a log stays if it has something in it, or if the user named it."""
    base = Path(entry.socket).parent
    for path in (base / f"{entry.name}.json", base / f"{entry.name}.sock"):
        try:
            path.unlink()
        except OSError:
            pass  # the other side may have tidied up first
    try:
        if entry.log == str(base / f"{entry.name}.log") and os.path.getsize(entry.log) == 0:
            os.unlink(entry.log)
    except OSError:
        pass


def alive(entry: Entry) -> bool:
    """Whether something listens on the entry's socket. A daemon too busy to accept counts as alive."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            with reachable(entry.socket) as path:
                sock.connect(path)
        except OSError as err:
            return err.errno in (errno.EAGAIN, errno.EINPROGRESS)
    return True


def all_entries() -> list[Entry]:
    """Every entry in every runtime directory of this user, those of dead daemons included, oldest first."""
    found: dict[str, Entry] = {}
    for directory in candidate_dirs():
        try:
            _check_private(directory)
            paths = sorted(directory.glob("*.json"))
        except (OSError, RuntimeDirError):
            continue
        for path in paths:
            try:
                entry = from_json(path.read_bytes(), Entry)
            except (OSError, msgspec.DecodeError):
                continue  # gone meanwhile, or not ours
            found[entry.name] = entry
    return sorted(found.values(), key=lambda e: e.started)


def running() -> list[Entry]:
    """The entries of daemons that answer."""
    return [entry for entry in all_entries() if alive(entry)]


def normalize(path: str) -> str:
    """``path`` absolute and free of symlinks, as the mount table has it. It may be a dead mount, on which every look
    fails: realpath(3) as Python does it takes what it cannot look at as it is."""
    return os.path.realpath(path)


def by_mountpoint(mountpoint: str, entries: list[Entry]) -> Entry | None:
    """The entry of the mount at ``mountpoint`` or above it, the innermost first."""
    want = normalize(mountpoint)
    fitting = [e for e in entries if want == e.mountpoint or want.startswith(e.mountpoint.rstrip("/") + "/")]
    return max(fitting, key=lambda entry: len(entry.mountpoint), default=None)


def find(mount: str | None = None) -> Entry:
    """The daemon that a command means: the one named, else the only one that runs.

    Raises :class:`NoDaemonError` when there is none, or when there are several and none was named.
    """
    sock = os.environ.get(ENV_SOCKET)
    if mount is None and sock:
        return Entry("", 0, sock, "", "", "", "", 0.0)
    mount = mount or os.environ.get(ENV_MOUNT) or None
    live = running()
    if mount is not None:
        entry = by_mountpoint(mount, live)
        if entry is None:
            raise NoDaemonError(f"no running klpfs mount at {mount}", live)
        return entry
    if not live:
        raise NoDaemonError("no klpfs mount is running; start one with: klpfs mount DIR", live)
    if len(live) > 1:
        raise NoDaemonError(f"{len(live)} klpfs mounts are running; choose one with --mount DIR or {ENV_MOUNT}", live)
    return live[0]
