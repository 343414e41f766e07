"""``klpfs doctor``: what klpfs needs from this system, and how to get what is missing."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import shutil
import sys
from collections.abc import Callable

import click
import msgspec

from klpfs.cli import common


class Check(msgspec.Struct):
    """One line of the report. ``needed_for`` says what does not work without it;"""

    what: str
    ok: bool
    detail: str
    needed_for: str


def _fuse_device() -> tuple[bool, str]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        return False, f"/dev/fuse: {err.strerror}; load the module (modprobe fuse), or give the container the device"
    return True, "/dev/fuse can be opened"


def _program(name: str, package: str) -> tuple[bool, str]:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return (True, path) if path else (False, f"not found; Debian package {package}")


def _library(name: str, package: str) -> tuple[bool, str]:
    path = ctypes.util.find_library(name)
    return (True, path) if path else (False, f"not found; Debian package {package}")


def _python(name: str, requirement: str) -> tuple[bool, str]:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as err:
        return False, f"{err}; pip install '{requirement}'"
    return True, str(getattr(module, "__version__", "installed"))


def _user_namespaces() -> tuple[bool, str]:
    """Try it in a child: unshare(2) cannot be undone."""
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        os._exit(0 if libc.unshare(0x10000000 | 0x00020000) == 0 else ctypes.get_errno() & 0x7F)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0:
        return True, "allowed"
    return False, f"{os.strerror(code)}; an administrator allows them with sysctl kernel.unprivileged_userns_clone=1"


def _seccomp() -> tuple[bool, str]:
    """Whether the kernel knows SECCOMP_RET_USER_NOTIF (seccomp(2), SECCOMP_GET_ACTION_AVAIL)."""
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail", encoding="ascii") as file:
            known = "user_notif" in file.read().split()
    except OSError as err:
        return False, f"/proc/sys/kernel/seccomp/actions_avail: {err.strerror}"
    return (True, "user notification") if known else (False, "this kernel has no user notification (5.0 has it)")


def _runtime_dir() -> tuple[bool, str]:
    from klpfs.control.runtime import RuntimeDirError, make_runtime_dir

    try:
        return True, str(make_runtime_dir())
    except RuntimeDirError as err:
        return False, str(err)


def checks() -> list[Check]:
    """Look at everything."""
    table: list[tuple[str, Callable[[], tuple[bool, str]], str]] = [
        ("Python", lambda: (sys.version_info >= (3, 11), sys.version.split()[0]), "mount"),
        ("FUSE device", _fuse_device, "mount"),
        ("fusermount3", lambda: _program("fusermount3", "fuse3"), "mount"),
        ("pyfuse3", lambda: _python("pyfuse3", "pyfuse3>=3.4,<4"), "mount"),
        ("runtime directory", _runtime_dir, "mount"),
        ("libfuse 2", lambda: _library("fuse", "libfuse2"), "mount --driver fusepy"),
        ("fusepy", lambda: _python("fuse", "fusepy>=3.0.1,<4"), "mount --driver fusepy"),
        ("user namespaces", _user_namespaces, "run, shell"),
        ("seccomp", _seccomp, "run, shell"),
        ("libseccomp", lambda: _library("seccomp", "libseccomp2"), "run, shell"),
        ("kmod", lambda: _program("modinfo", "kmod"), "insmod and lsmod inside run and shell"),
    ]
    return [Check(what, *look(), needed_for) for what, look, needed_for in table]


@click.command("doctor", short_help="Check what this system offers.")
@common.json_option
def command(as_json: bool) -> None:
    """Check what klpfs needs from this system. Exit code 1 when a mount is not possible."""
    found = checks()
    if as_json:
        common.print_json(found)
    else:
        rows = [(check.what, "ok" if check.ok else "MISSING", check.needed_for, check.detail) for check in found]
        common.print_table(("WHAT", "", "NEEDED FOR", "DETAIL"), rows)
    if any(not check.ok and check.needed_for == "mount" for check in found):
        raise click.exceptions.Exit(common.EXIT_REFUSED)
