"""``klpfs run``: a command in a world of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from klpfs.world.options import EXIT_CANNOT_EXECUTE, EXIT_FAILED, EXIT_NOT_FOUND, OPTIONS, Options

__all__ = ["EXIT_CODES", "command", "options_from", "with_options"]

F = TypeVar("F", bound=Callable[..., Any])

#: What the exit code of ``klpfs run`` and ``klpfs shell`` means.
EXIT_CODES = {
    "0 to 124": "the command's own",
    f"{EXIT_FAILED}": "klpfs failed: namespaces, mounts, the daemon (standard error says which)",
    f"{EXIT_CANNOT_EXECUTE}": "the command cannot be executed",
    f"{EXIT_NOT_FOUND}": "the command was not found",
    "128 + n": "the command was ended by signal n",
}


def with_options(func: F) -> F:
    """Add the options of a world."""
    for option in reversed(OPTIONS):
        text = option.help + (f" [default: {option.default}]" if option.default else "")
        if option.metavar is None:
            func = click.option(option.name, is_flag=True, help=text)(func)
        else:
            func = click.option(option.name, metavar=option.metavar, help=text)(func)
    return func


def options_from(values: dict[str, Any], command: tuple[str, ...]) -> Options:
    """The options as click has parsed them. Raises click.UsageError."""
    options = Options(command=list(command))
    for option in OPTIONS:
        value = values[option.name[2:].replace("-", "_")]
        if value is None or value is False:
            continue
        try:
            options.set(option.name, "" if value is True else value)
        except ValueError as err:
            raise click.UsageError(str(err)) from None
    return options


def epilog() -> str:
    """The exit codes, for the help."""
    return "\b\nExit codes:\n" + "\n".join(f"  {code:<9} {text}" for code, text in EXIT_CODES.items())


@click.command(
    "run",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    epilog=epilog(),
    short_help="Run a command in a world of its own.",
)
@with_options
@click.argument("argv", metavar="[--] CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(argv: tuple[str, ...], **values: Any) -> int:
    """Run a command in a world of its own.

    There, /sys/kernel/livepatch, /sys/module, /proc/modules, /dev/kmsg, insmod, rmmod, modprobe, lsmod, dmesg, sysctl
    and the system calls behind them are those of an emulated kernel. Everything else is this system's. The world ends
    with the command.
    """
    from klpfs.world.front import run

    return run(options_from(values, argv))
