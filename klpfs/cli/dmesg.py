"""``klpfs dmesg``: the kernel log of the running emulator, in the format of util-linux's dmesg."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import click

from klpfs.cli import common

if TYPE_CHECKING:
    from klpfs.control.protocol import LogRecord

LEVELS: Final = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")
FACILITIES: Final = (
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
    "res0", "res1", "res2", "res3", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7",
)  # fmt: skip


def level_list(text: str) -> frozenset[int]:
    """The numbers of a comma-separated list of level names. Raises click.BadParameter."""
    names = text.split(",")
    for name in names:
        if name not in LEVELS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(LEVELS)}")
    return frozenset(map(LEVELS.index, names))


def _colour(record: LogRecord) -> str | None:
    """util-linux's default colours, in essence: red for errors, bold for what is worse."""
    return "red" if record.level <= 3 else "yellow" if record.level == 4 else None


def render(record: LogRecord, *, time: bool, decode: bool, colour: bool) -> str:
    """One record as text; the time stamp is seconds.microseconds since boot, as the kernel prints it."""
    out = ""
    if decode:
        facility = FACILITIES[record.facility] if record.facility < len(FACILITIES) else str(record.facility)
        out += f"{facility:<6}:{LEVELS[record.level]:<6}: "
    if time:
        seconds, micros = divmod(round(record.time * 1_000_000), 1_000_000)
        stamp = f"[{seconds:5d}.{micros:06d}] "
        out += click.style(stamp, fg="green") if colour else stamp
    shade = _colour(record) if colour else None
    return out + (click.style(record.text, fg=shade) if shade else record.text)


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
