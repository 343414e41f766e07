"""``klpfs insmod``: load a module into the running emulator, as kmod's insmod does into a kernel."""

from __future__ import annotations

import errno
import os
from typing import Final

import click

from klpfs.cli import common

#: What kmod calls the errors of init_module(2) (tools/insmod.c, mod_strerror).
MOD_STRERROR: Final = {
    errno.ENOEXEC: "Invalid module format",
    errno.ENOENT: "Unknown symbol in module",
    errno.ESRCH: "Module has wrong symbol version",
    errno.EINVAL: "Invalid parameters",
}

#: finit_module(2)'s flags.
IGNORE_MODVERSIONS: Final = 1
IGNORE_VERMAGIC: Final = 2


def insert_error(path: str, code: int) -> common.CliError:
    """kmod's line for a module that the kernel refused with errno ``code``."""
    text = MOD_STRERROR.get(code, os.strerror(code))
    return common.CliError(f"ERROR: could not insert module {path}: {text}", common.EXIT_REFUSED, prefix="insmod")


@click.command(
    "insmod",
    short_help="Insert a module.",
    epilog="""\b
Examples:
  klpfs insmod livepatch-sample.ko
  klpfs insmod busy.ko block_transition=Y
""",
)
@click.argument("path", metavar="X.ko")
@click.argument("params", metavar="[PARAM=VALUE]...", nargs=-1, type=click.UNPROCESSED)
@click.option("-f", "--force", is_flag=True, help="Ignore the version magic and symbol versions.")
@common.mount_option
@common.json_option
@common.daemon_errors
def command(path: str, params: tuple[str, ...], force: bool, mount: str | None, as_json: bool) -> None:
    """Insert the module in the file X.ko, with its parameters.

    The file is read with your permissions, not the daemon's. Nothing is printed when all went well.
    """
    from klpfs.control.client import read_module
    from klpfs.control.protocol import Insmod, Loaded

    with common.connect(mount) as client:
        try:
            data = read_module(path)
        except OSError as err:
            code = err.errno or errno.EIO
            if code in (errno.EISDIR, errno.EINVAL, errno.EFBIG):  # it was opened, and refused by its contents
                raise insert_error(path, code) from None
            raise common.CliError(
                f"ERROR: could not load module {path}: {os.strerror(code)}", common.EXIT_REFUSED, prefix="insmod"
            ) from None
        request = Insmod(
            data=data,
            path=os.path.abspath(path),
            args=" ".join(params),  # as kmod joins them: a value with a blank needs quotes of its own
            flags=IGNORE_MODVERSIONS | IGNORE_VERMAGIC if force else 0,
        )
        try:
            loaded = client.call(request, Loaded)
        except OSError as err:
            raise insert_error(path, err.errno or errno.EIO) from None
    if as_json:
        common.print_json(loaded)
