"""``klpfs shell``: the user's shell in a world of its own."""

from __future__ import annotations

import os
from typing import Any

import click

from klpfs.cli.run import epilog, options_from, with_options

__all__ = ["command"]

_BASH_START = """\
[ -f /etc/bash.bashrc ] && . /etc/bash.bashrc
[ -f ~/.bashrc ] && . ~/.bashrc
PS1="(klpfs $(uname -r)) ${PS1:-\\$ }"
"""


def shell_command(shell: str) -> list[str]:
    """The command that starts *shell* with a prompt that says where one is.

    bash reads its start-up files as always and then puts the name in front of its prompt; of other shells the prompt is
    taken from the environment, where they look at it.
    """
    from klpfs.world.front import fill_standard_streams

    if os.path.basename(shell) == "bash":
        fill_standard_streams()  # the descriptor must not be one of theirs
        start = os.memfd_create("klpfs-bashrc", 0)
        os.write(start, _BASH_START.encode())
        os.set_inheritable(start, True)
        return [shell, "--rcfile", f"/proc/self/fd/{start}", "-i"]
    os.environ["PS1"] = "(klpfs) " + os.environ.get("PS1", "$ ")
    return [shell, "-i"]


@click.command("shell", epilog=epilog(), short_help="Start a shell in a world of its own.")
@with_options
def command(**values: Any) -> int:
    """Start your shell ($SHELL) in a world of its own; see klpfs run. The world ends with the shell."""
    from klpfs.world.front import run

    return run(options_from(values, tuple(shell_command(os.environ.get("SHELL") or "/bin/sh"))))
