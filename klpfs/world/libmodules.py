"""/lib/modules/RELEASE: which release a world has, and what its directory holds.

Model
    The emulated kernel's release should be one whose headers are installed, so that modules can be built against it.
    Its directory is the host's where that is complete. Else a tmpfs covers it in the world's mount namespace, with what
    the host or ``--modules DIR`` has, index files for modprobe, and a ``build`` directory.

Locks
    None: one thread, before the command starts.

Source
    depmod(8), modules.dep(5), libkmod (index files: magic 0xb007f457, version 2.1, offset of the root node).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from klpfs.world import sysapi
from klpfs.world.mounts import WorldError, overlay_dir

__all__ = ["headers_of", "pick_release", "set_up"]

MODULES = "/lib/modules"
HEADERS = "/usr/src/linux-headers-"

#: What depmod writes when there are no modules.
_EMPTY_INDEX = bytes.fromhex("b007f457000200010000000c")
_INDEX_FILES = {
    "modules.dep": b"",
    "modules.dep.bin": _EMPTY_INDEX,
    "modules.alias": b"",
    "modules.alias.bin": _EMPTY_INDEX,
    "modules.softdep": b"",
    "modules.symbols": b"",
    "modules.symbols.bin": _EMPTY_INDEX,
    "modules.builtin": b"",
    "modules.builtin.bin": _EMPTY_INDEX,
    "modules.builtin.alias.bin": _EMPTY_INDEX,
    "modules.devname": b"",
    "modules.order": b"",
}


def headers_of(release: str) -> str | None:
    """The installed headers of *release*, or None."""
    for path in (f"{MODULES}/{release}/build", HEADERS + release):
        if os.path.isdir(path):
            return path
    return None


def _installed() -> Iterator[str]:
    for directory, prefix in ((MODULES, ""), ("/usr/src", "linux-headers-")):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            if name.startswith(prefix) and headers_of(name.removeprefix(prefix)):
                yield name.removeprefix(prefix)


def _version_key(release: str) -> tuple[bool, list[int]]:
    plain = re.search(r"-(rt|cloud|common)", release) is None
    return plain, [int(n) for n in re.findall(r"\d+", release)]


def pick_release(series: str, default: str) -> str:
    """The release to be: *default* if its headers are installed, else the newest of *series* (``6.12``) that has
    headers, else *default*."""
    if headers_of(default):
        return default
    fitting = [r for r in _installed() if re.match(re.escape(series) + r"(?:[.-]|$)", r) and not r.endswith("-common")]
    return max(fitting, key=_version_key, default=default)


def _place(source: str, target: str, origin: str) -> None:
    """Show *source* at *target*, a name in a tmpfs: links are made anew, files and directories bound.

    *origin* is the path of the directory of *source*, for links that lead out of it.
    """
    mode = os.lstat(source).st_mode
    if stat.S_ISLNK(mode):
        link = os.readlink(source)
        os.symlink(os.path.normpath(f"{origin}/{link}") if link.startswith("..") else link, target)
    elif stat.S_ISDIR(mode):
        os.mkdir(target)
        sysapi.bind(source, target)
    elif stat.S_ISREG(mode):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        sysapi.bind(source, target)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, data)
    os.close(fd)


def _add_build(directory: str, release: str) -> None:
    if os.path.lexists(f"{directory}/build"):
        return
    headers = headers_of(release)
    if headers:
        os.symlink(headers, f"{directory}/build")
        return
    # scripts look whether it is there; whoever runs make in it is told why that cannot work
    os.mkdir(f"{directory}/build")
    text = f"$(error the headers of kernel {release} are not installed (Debian package linux-headers-{release}))\n"
    _write(f"{directory}/build/Makefile", text.encode())


def _depmod(release: str) -> None:
    """Run depmod; its complaints about missing lists of builtin modules are of no interest."""
    import subprocess  # 15 ms, for this option alone

    path = "/usr/sbin:/sbin:/usr/bin:/bin:" + os.environ.get("PATH", "")
    try:
        done = subprocess.run(
            ["depmod", release],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": path, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise WorldError("--modules needs depmod (Debian package kmod)") from None
    lines = [line for line in done.stderr.splitlines() if "could not open modules." not in line]
    if done.returncode:
        raise WorldError("--modules: " + ("; ".join(lines) or f"depmod failed with exit code {done.returncode}"))


def set_up(release: str, modules: str | None) -> None:
    """Make /lib/modules/*release* what it should be, in this mount namespace. Raises WorldError."""
    if "/" in release or release in ("", ".", ".."):
        raise WorldError(f"{release!r} cannot be a kernel release")
    if modules is not None and not os.path.isdir(modules):
        raise WorldError(f"--modules {modules}: not a directory")
    base = os.path.realpath(MODULES)
    directory = f"{base}/{release}"
    complete = modules is None and all(os.path.exists(f"{directory}/{n}") for n in ("build", "modules.dep.bin"))
    if complete:
        return
    # opened before anything is covered: it may lie below what is
    source = os.open(modules or directory, os.O_PATH | os.O_DIRECTORY) if modules or os.path.isdir(directory) else None
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        build = headers_of(release)
        build = os.path.realpath(build) if build else None
        if not os.path.isdir(base):
            overlay_dir(os.path.dirname(base))
            os.mkdir(base, 0o755)
        if not os.path.isdir(directory):
            overlay_dir(base)
            os.mkdir(directory, 0o755)
        if source is not None:
            os.fchdir(source)  # before the tmpfs covers it
        sysapi.mount("klpfs", directory, "tmpfs", sysapi.MS_NOSUID | sysapi.MS_NODEV, "mode=755")
        if source is not None:
            for name in os.listdir("."):
                if modules is None or not name.startswith("modules."):
                    _place(f"./{name}", f"{directory}/{name}", os.path.abspath(modules or directory))
        if build and not os.path.lexists(f"{directory}/build"):
            os.symlink(build, f"{directory}/build")
        _add_build(directory, release)
        for name, data in _INDEX_FILES.items():
            if not os.path.exists(f"{directory}/{name}"):
                _write(f"{directory}/{name}", data)
        if modules is not None:
            _depmod(release)
    except OSError as err:
        what = os.strerror(err.errno or errno.EIO)
        raise WorldError(f"cannot set up {directory}: {err.filename or ''}: {what}") from None
    finally:
        os.fchdir(here)
        os.close(here)
        if source is not None:
            os.close(source)
