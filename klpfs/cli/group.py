"""``klpfs``: the group of all commands."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

import click

from klpfs import __version__

#: Command: (module, short help). The help stands here so that ``klpfs --help`` imports none of the modules; a test
#: compares it with theirs.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "mount": ("klpfs.cli.mount", "Mount an emulated kernel at DIR."),
    "umount": ("klpfs.cli.umount", "Take the mount at DIR away, a dead one too."),
    "insmod": ("klpfs.cli.insmod", "Insert a module."),
    "rmmod": ("klpfs.cli.rmmod", "Remove modules."),
    "lsmod": ("klpfs.cli.lsmod", "List the modules."),
    "dmesg": ("klpfs.cli.dmesg", "Print the kernel log."),
    "status": ("klpfs.cli.status", "Show the patches, and what a transition waits for."),
    "ps": ("klpfs.cli.ps", "List the tasks with their patch states."),
    "task": ("klpfs.cli.task", "Add, change, wake, signal and remove emulated tasks."),
    "clock": ("klpfs.cli.clock", "Show the emulated clock, or move it forward."),
    "doctor": ("klpfs.cli.doctor", "Check what this system offers."),
    "mkmod": ("klpfs.cli.mkmod", "Write a module from a specification, without a compiler."),
    "inspect": ("klpfs.cli.inspect", "Say what a module would do, without loading it."),
    "run": ("klpfs.cli.run", "Run a command in a world of its own."),
    "shell": ("klpfs.cli.shell", "Start a shell in a world of its own."),
}

EPILOG: Final = """\b
Examples:
  klpfs mount /tmp/k
  klpfs mkmod examples/modules/cmdline.toml -o cmdline.ko
  klpfs insmod cmdline.ko
  cat /tmp/k/sys/kernel/livepatch/*/enabled
  klpfs umount /tmp/k

\b
Exit codes:
{codes}
"""


def _epilog() -> str:
    from klpfs.cli.common import EXIT_CODES

    return EPILOG.format(codes="\n".join(f"  {code:<4} {text}" for code, text in EXIT_CODES.items()))


class LazyGroup(click.Group):
    """A group that imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. Its reader may have seen enough: then the end is a good one, and quiet.

        Click would end with 1; and what is still buffered must not go into the closed pipe at exit.
        """
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of ``--help``, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples and exit codes."""
        self.epilog = _epilog()
        super().format_epilog(ctx, formatter)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", "-V", prog_name="klpfs", message="%(prog)s %(version)s")
def cli() -> None:
    """A flight simulator for Linux kernel livepatch: /sys/kernel/livepatch without a kernel."""
