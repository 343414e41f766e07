"""Running klpfs as an ordinary user, from a checkout and with a Python that this user may not be able to read.

Model
    A user account that exists for the occasion, and a mount namespace in which what klpfs consists of is reachable for
    everybody, at its own place; a directory of the caller's is /tmp there.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# the interpreter as itself, not through .venv, whose links an ordinary user may not be able to follow
_INTERPRETER = Path(sys._base_executable)  # type: ignore[attr-defined]  # there since 3.3, and no other way
_PACKAGES = Path(sysconfig.get_path("purelib")).resolve()

#: The command klpfs.
KLPFS = [str(_INTERPRETER), "-m", "klpfs.cli"]


def environment() -> dict[str, str]:
    """The environment for KLPFS: a minimal one."""
    return {
        "PATH": SYSTEM_PATH,
        "LC_ALL": "C",
        "HOME": "/tmp",
        "PYTHONPATH": f"{TOP}:{_PACKAGES}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def prefix(base: Path, user: str | None, *setup: str) -> list[str]:
    """What to put before a command for it to run as *user* (None: as root), with *base* as /tmp and in /tmp/work.

    *setup*: shell commands that root runs before, in the mount namespace that is theirs. Only root can do this.
    """
    steps = [*_covers(base, [TOP, _PACKAGES, Path(sys.base_prefix)]), *setup, "cd /tmp/work", 'exec "$@"']
    command = ["unshare", "--mount", "sh", "-c", " && ".join(steps), "sh"]
    if user is not None:
        command += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
    return command


def _covers(base: Path, needed: list[Path]) -> list[str]:
    """Commands that put *base* in the place of /tmp, and keep *needed* where they are, reachable for everybody: what
    lies in a directory that only its owner may enter is seen in an empty one in its place."""
    places = {Path("/tmp"): base}
    commands = []
    for rank, path in enumerate(needed):
        if any(path.is_relative_to(other) for other in needed[:rank]):
            continue
        closed = (parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001)
        place = Path("/tmp") if path.is_relative_to("/tmp") else next(closed, None)
        if place is None:
            continue
        cover = places.setdefault(place, base / f"cover-{len(places)}")
        target = cover / path.relative_to(place)
        target.mkdir(parents=True, exist_ok=True)
        commands.append(f"mount --rbind {shlex.quote(str(path))} {shlex.quote(str(target))}")
    commands += [f"mount --rbind {cover} {shlex.quote(str(place))}" for place, cover in reversed(places.items())]
    return commands


@contextmanager
def ordinary_user(name: str) -> Iterator[str]:
    """The user account *name*, which exists at least during the block. Raises CalledProcessError."""
    created = subprocess.run(["id", name], capture_output=True, check=False).returncode != 0
    if created:
        # with subordinate ids, so that another user than root exists in the world: a twin changes owners
        options = ["--system", "--add-subids-for-system", "--user-group", "--no-create-home"]
        subprocess.run(["useradd", *options, name], check=True)
    try:
        yield name
    finally:
        if created:
            subprocess.run(["userdel", name], check=False, capture_output=True)


def cannot_be_user() -> str:
    """Why an ordinary user cannot have a world on this system, or ""."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        return "an ordinary user may not open /dev/fuse"
    for name, allowed in (
        ("kernel/unprivileged_userns_clone", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "0"),
    ):
        path = Path("/proc/sys", name)
        if path.exists() and path.read_text().strip() != allowed:
            return f"an ordinary user may not create user namespaces ({name})"
    return ""
