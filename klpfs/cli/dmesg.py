"""``klpfs dmesg``: the kernel log of the running emulator, in the format of util-linux's dmesg."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from klpfs.cli import common

if TYPE_CHECKING:
    from klpfs.control.protocol import LogRecord


def level_list(text: str) -> frozenset[int]:
    """The numbers of a comma-separated list of level names. Raises click.BadParameter."""
    from klpfs.kernel.printk import LEVELS

    names = text.split(",")
    for name in names:
        if name not in LEVELS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(LEVELS)}")
    return frozenset(map(LEVELS.index, names))


def _colour(level: int) -> str | None:
    return "red" if level <= 3 else "yellow" if level == 4 else None


def render(record: LogRecord, *, time: bool, decode: bool, colour: bool) -> str:
    """One record as util-linux's dmesg prints it."""
    from klpfs.kernel.kmsg import render_record
    from klpfs.kernel.printk import Record

    usec = round(record.time * 1_000_000)
    raw = Record(record.seq, record.level, record.facility, usec, record.caller, 0, record.text.encode())
    text = render_record(raw, style="time" if time else "notime", decode=decode)
    shade = _colour(record.level) if colour else None
    return click.style(text, fg=shade) if shade else text


@click.command(
    "dmesg",
    short_help="Print the kernel log.",
    epilog="""\b
Examples:
  klpfs dmesg
  klpfs dmesg --follow
  klpfs dmesg --json | jq -r 'select(.level <= 3).text'
  klpfs dmesg --clear
""",
)
@click.option("-w", "--follow", is_flag=True, help="Wait for new messages.")
@click.option("-W", "--follow-new", is_flag=True, help="Wait for new messages, and print only those.")
@click.option("-C", "--clear", is_flag=True, help="Clear the log, without printing it.")
@click.option("-c", "--read-clear", is_flag=True, help="Print the log, then clear it.")
@click.option("-t", "--notime", is_flag=True, help="Print no time stamps.")
@click.option("-x", "--decode", is_flag=True, help="Print facility and level before each message.")
@click.option("-l", "--level", type=level_list, metavar="LIST", help="Only these levels, such as err,warn.")
@common.mount_option
@common.json_option
@common.daemon_errors
def command(
    follow: bool,
    follow_new: bool,
    clear: bool,
    read_clear: bool,
    notime: bool,
    decode: bool,
    level: frozenset[int] | None,
    mount: str | None,
    as_json: bool,
) -> None:
    """Print the messages since the last clearing. With --json, one JSON object a line."""
    import msgspec

    from klpfs.control.protocol import Dmesg, LogRecord

    if (clear or read_clear) and (follow or follow_new):
        raise click.UsageError("--clear and --read-clear cannot be combined with --follow and --follow-new")
    with common.connect(mount) as client:
        records: Iterable[LogRecord]
        if clear:
            client.call(Dmesg(clear=True), list[LogRecord])
            return
        if follow or follow_new:
            records = client.stream(Dmesg(follow=True, new=follow_new), LogRecord)
        else:
            records = client.call(Dmesg(clear=read_clear), list[LogRecord])
        colour = common.use_colour()
        for record in records:
            if level is not None and record.level not in level:
                continue
            if as_json:
                sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
            else:
                sys.stdout.write(render(record, time=not notime, decode=decode, colour=colour) + "\n")
            if follow or follow_new:
                sys.stdout.flush()
