"""What the commands share: exit codes, errors, the connection to the daemon, tables and JSON."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from klpfs.control.client import Client
    from klpfs.control.runtime import Entry

#: Everything was done.
EXIT_OK: Final = 0
#: The emulated kernel, or the file that was given, refused.
EXIT_REFUSED: Final = 1
#: The command line is wrong (click's own code).
EXIT_USAGE: Final = 2
#: No running mount fits, or more than one.
EXIT_NO_MOUNT: Final = 3
#: The mount could not be started, or not be taken away.
EXIT_MOUNT: Final = 4
#: The daemon went away, or failed at the request.
EXIT_DAEMON: Final = 5
#: Interrupted from the keyboard (128 + SIGINT).
EXIT_INTERRUPTED: Final = 130

#: The table of ``klpfs --help``; README.md repeats it.
EXIT_CODES: Final[dict[int, str]] = {
    EXIT_OK: "done",
    EXIT_REFUSED: "refused by the emulated kernel, or the file given is not usable",
    EXIT_USAGE: "wrong command line",
    EXIT_NO_MOUNT: "no running mount fits, or several do",
    EXIT_MOUNT: "the mount could not be started or taken away",
    EXIT_DAEMON: "the daemon went away, or failed at the request",
    EXIT_INTERRUPTED: "interrupted",
}

F = TypeVar("F", bound=Callable[..., Any])


class CliError(click.ClickException):
    """An error with its exit code; shown on standard error as ``PREFIX: message``."""

    def __init__(self, message: str, exit_code: int, *, prefix: str = "klpfs") -> None:
        super().__init__(message)
        self.code = exit_code
        self.prefix = prefix

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message, every line of it."""
        click.echo(f"{self.prefix}: {self.message}", file=file or sys.stderr)


def json_option(func: F) -> F:
    """Adds ``--json`` as the argument ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(func)


def mount_option(func: F) -> F:
    """Adds ``--mount DIR``, which chooses among several running mounts, as the argument ``mount``."""
    return click.option(
        "--mount",
        metavar="DIR",
        default=None,
        help="The mount that is meant, when several run (default: $KLPFS_MOUNT, else the only one).",
    )(func)


def describe(entry: Entry) -> str:
    """One line about a running mount."""
    return f"{entry.mountpoint}  (pid {entry.pid}, kernel {entry.kernel}, driver {entry.driver})"


def connect(mount: str | None) -> Client:
    """The daemon that a command means. Raises CliError, with the candidates when there are several."""
    from klpfs.control.client import Client, ConnectionLostError
    from klpfs.control.runtime import NoDaemonError, find

    try:
        return Client(find(mount))
    except NoDaemonError as err:
        lines = [str(err), *(f"  {describe(entry)}" for entry in err.candidates)]
        raise CliError("\n".join(lines), EXIT_NO_MOUNT) from None
    except ConnectionLostError as err:
        raise CliError(str(err), EXIT_NO_MOUNT) from None


def daemon_errors(func: F) -> F:
    """Turn what the client raises into CliError: refusals (OSError) to exit code 1, the others to 5."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from klpfs.control.client import ConnectionLostError, RequestError

        try:
            return func(*args, **kwargs)
        except (ConnectionLostError, RequestError) as err:
            raise CliError(str(err), EXIT_DAEMON) from None
        except BrokenPipeError:
            raise  # whoever read our output has seen enough; click ends quietly
        except OSError as err:
            raise CliError(err.strerror or str(err), EXIT_REFUSED) from None

    return wrapper  # type: ignore[return-value]


def print_json(obj: object) -> None:
    """Print one JSON document, indented for a terminal, on one line for a pipe."""
    import msgspec

    from klpfs.control.text import to_json

    data = to_json(obj)
    if sys.stdout.isatty():
        data = msgspec.json.format(data, indent=2)
    click.echo(data.decode())


def use_colour() -> bool:
    """Whether standard output is a terminal that is to be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
    """Print a table: by rich on a terminal, as aligned columns without decoration into a pipe.

    ``right`` numbers the columns that are aligned to the right.
    """
    numbers = set(right)
    cells = [[str(cell) for cell in row] for row in rows]
    if use_colour():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, title in enumerate(header):
            table.add_column(title, justify="right" if i in numbers else "left", overflow="fold")
        for row in cells:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    for line in [list(header), *cells]:
        parts = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(parts).rstrip())
