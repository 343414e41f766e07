"""``klpfs clock``: read the emulator's clock, or move it forward."""

from __future__ import annotations

import math
import re

import click

from klpfs.cli import common

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Seconds from a number with or without a unit: ``90``, ``1.5s``, ``200ms``, ``10m``, ``2h``, ``1d``.

    Raises click.BadParameter.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|d)?", text.strip())
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else math.nan
    if not 0 < seconds <= 7 * 86400:
        raise click.BadParameter(f"{text!r} is not a time of at most 7 days, such as 90, 1.5s, 200ms, 10m, 2h or 1d")
    return seconds


@click.command(
    "clock",
    short_help="Show the emulated clock, or move it forward.",
    epilog="""\b
Examples:
  klpfs clock
  klpfs mount /tmp/k --clock manual
  klpfs clock --advance 10m
""",
)
@click.option("--advance", type=duration, metavar="TIME", help="Move the clock forward; not possible for the real one.")
@common.mount_option
@common.json_option
@common.daemon_errors
def command(advance: float | None, mount: str | None, as_json: bool) -> None:
    """Show the seconds since boot and how the clock runs."""
    from klpfs.control.protocol import Clock, ClockInfo

    with common.connect(mount) as client:
        info = client.call(Clock(advance=advance), ClockInfo)
    if as_json:
        common.print_json(info)
    else:
        click.echo(f"{info.now:.6f} {info.mode}" + (f" x{info.rate:g}" if info.mode == "scaled" else ""))
