"""The command line of ``klpfs run`` and ``klpfs shell``, as data.

Model
    One table of options serves two parsers. The small one here understands every correct command line and imports
    nothing, because each millisecond before the daemon is forked counts. It gives up on anything else; click, which
    knows the same options, then prints the help or the error.

Source
    getopt(3): options end at ``--`` or at the first argument that is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

__all__ = [
    "EXIT_CANNOT_EXECUTE",
    "EXIT_FAILED",
    "EXIT_NOT_FOUND",
    "OPTIONS",
    "Option",
    "Options",
    "UsageError",
    "parse",
]

#: klpfs itself failed: namespaces, mounts, the daemon (as env(1) and ``docker run`` have it).
EXIT_FAILED: Final = 125
#: The command was found but could not be executed.
EXIT_CANNOT_EXECUTE: Final = 126
#: The command was not found.
EXIT_NOT_FOUND: Final = 127


class UsageError(Exception):
    """The command line needs click: help was asked for, or it is wrong."""


class Option(NamedTuple):
    """One option. ``metavar`` None: it is a flag. ``default`` is shown in the help."""

    name: str
    metavar: str | None
    help: str
    default: str = ""


OPTIONS: Final = (
    Option("--kernel", "PROFILE", "The kernel to emulate.", "6.12"),
    Option("--release", "RELEASE", "What uname -r answers (default: the profile's, or installed headers that fit it)."),
    Option("--kernel-image", "FILE", "Take the kernel's symbols from this bzImage or vmlinux."),
    Option("--kallsyms", "FILE", "Take them from this System.map or copy of /proc/kallsyms."),
    Option("--modules", "DIR", "Modules for modprobe: shown at /lib/modules/RELEASE, and indexed by depmod."),
    Option("--keep-uname", None, "Leave uname(2) and /proc/version to the host."),
    Option("--log", "FILE", "Write the emulated kernel's log to FILE as it grows."),
    Option("--cpus", "N", "The number of emulated CPUs.", "2"),
    Option("--clock", "CLOCK", "real, virtual, manual or a factor.", "real"),
    Option("--trap", "NAMES", "System calls whose kernel function may be patched, by commas, or none.", "getpid"),
)


@dataclass
class Options:
    """What was asked for. Paths are as given; ``traps`` are names of system calls."""

    kernel: str = "6.12"
    release: str | None = None
    kernel_image: str | None = None
    kallsyms: str | None = None
    modules: str | None = None
    keep_uname: bool = False
    log: str | None = None
    cpus: int = 2
    clock: str = "real"
    traps: tuple[str, ...] = ("getpid",)
    command: list[str] = field(default_factory=list)

    def set(self, name: str, value: str) -> None:
        """Set the option called *name* (``--kernel``). Raises ValueError that says what is wrong with *value*."""
        if name == "--cpus":
            if not value.isdecimal() or not 1 <= int(value) <= 8192:
                raise ValueError(f"--cpus {value}: expected a number between 1 and 8192")
            self.cpus = int(value)
        elif name == "--trap":
            self.traps = () if value == "none" else tuple(value.split(","))
        elif name == "--keep-uname":
            self.keep_uname = True
        else:
            setattr(self, name[2:].replace("-", "_"), value)


def parse(argv: Sequence[str], *, need_command: bool = True) -> Options:
    """Options and command from *argv* (without the program's and the command's name).

    Raises :class:`UsageError` for everything that is not plainly correct.
    """
    known = {option.name: option for option in OPTIONS}
    options = Options()
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        name, equals, value = word.partition("=")
        option = known.get(name)
        if option is None or (option.metavar is None and equals):
            raise UsageError(word)
        if option.metavar is not None and not equals:
            if not rest:
                raise UsageError(word)
            value = rest.pop(0)
        try:
            options.set(name, value)
        except ValueError as err:
            raise UsageError(str(err)) from None
    options.command = rest
    if need_command and not rest:
        raise UsageError("no command")
    return options
