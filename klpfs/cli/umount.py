"""``klpfs umount``: take a mount away and end its daemon; clear a mount whose daemon died."""

from __future__ import annotations

import errno
import os
import time
from typing import Final

import click

from klpfs.cli import common

#: How long the daemon may take to end once its mount is gone, in seconds.
PATIENCE: Final = 10.0


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_gone(pid: int) -> bool:
    """Wait for the daemon to end; whether it did."""
    end = time.monotonic() + PATIENCE
    while _exists(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@click.command(
    "umount",
    short_help="Take the mount at DIR away, a dead one too.",
    epilog="""\b
Examples:
  klpfs umount /tmp/k
  klpfs umount --lazy /tmp/k
""",
)
@click.argument("directory", metavar="DIR")
@click.option("-l", "--lazy", is_flag=True, help="Take it away even while files in it are open.")
def command(directory: str, lazy: bool) -> None:
    """Unmount DIR and wait for its daemon to end.

    A mount whose daemon died ("transport endpoint is not connected") is recognised and cleared. umount(8) and
    fusermount3(1) may be used just as well: the daemon ends with its mount. With --lazy it ends when the last user of
    the mount is gone, and is not waited for.
    """
    from klpfs.control.runtime import all_entries, normalize, remove_entry
    from klpfs.drivers.common import mount_state, unmount

    path = normalize(directory)
    state = mount_state(path)
    if state == "none":
        raise common.CliError(f"{directory}: nothing is mounted there", common.EXIT_MOUNT)
    if state == "other":
        raise common.CliError(f"{directory}: not a klpfs mount", common.EXIT_MOUNT)
    entry = next((e for e in reversed(all_entries()) if e.mountpoint == path), None)
    dead = state == "dead"
    try:
        unmount(path, lazy=lazy or dead)
    except OSError as err:
        hint = f" (who uses it: fuser -vm {directory}; or: klpfs umount --lazy)" if err.errno == errno.EBUSY else ""
        raise common.CliError(f"{err.strerror}{hint}", common.EXIT_MOUNT) from None
    if dead:
        tail = f"; its log is {entry.log}" if entry and entry.log and os.path.exists(entry.log) else ""
        if entry is not None:
            remove_entry(entry)
            tail = tail if os.path.exists(entry.log) else ""
        who = f" (pid {entry.pid})" if entry else ""
        click.echo(f"klpfs: {directory}: dead mount cleared: its daemon{who} was gone{tail}", err=True)
    elif entry is not None and not lazy and not _wait_gone(entry.pid):
        raise common.CliError(
            f"{directory}: unmounted, but its daemon (pid {entry.pid}) has not ended after {PATIENCE:g} s",
            common.EXIT_MOUNT,
        )
