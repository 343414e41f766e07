"""Entry point of ``klpfs``; ``python -m klpfs.cli`` is the same.

Nothing is imported here that a start can do without: ``klpfs run`` with a plain command line does not even need click.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def run_at_once(argv: Sequence[str]) -> int | None:
    """``klpfs run`` without click, whose import is a good part of its time; None when click has to look at ``argv``."""
    from klpfs.world.options import UsageError, parse

    try:
        options = parse(argv)
    except UsageError:
        return None
    from klpfs.world.front import run

    return run(options)


def main() -> None:
    """Run the command of sys.argv, then exit with its code."""
    try:
        _main()
    except KeyboardInterrupt:  # while something was imported: click has its own way with one inside a command
        sys.exit(130)


def _main() -> None:
    if sys.argv[1:2] == ["run"]:
        status = run_at_once(sys.argv[2:])
        if status is not None:
            sys.exit(status)

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the descriptor is closed, and everybody below writes to it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # paths and names are bytes

    if sys.argv[1:2] == ["mount"] and not {"-h", "--help", "-f", "--foreground"} & set(sys.argv):
        from klpfs.control import prefork

        prefork.prepare()

    import click

    from klpfs.cli.common import EXIT_INTERRUPTED, EXIT_OK, CliError
    from klpfs.cli.group import cli

    try:
        # not click's standalone mode, which ends an interrupted command with 1
        result = cli.main(prog_name="klpfs", standalone_mode=False)
    except CliError as err:
        err.show()
        sys.exit(err.code)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(result if isinstance(result, int) else EXIT_OK)


if __name__ == "__main__":
    main()
