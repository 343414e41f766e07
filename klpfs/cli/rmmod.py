"""``klpfs rmmod``: unload modules from the running emulator, as kmod's rmmod does from a kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from klpfs.cli import common

if TYPE_CHECKING:
    from klpfs.control.client import Client


def module_name(arg: str) -> str:
    """The module that ``arg`` means: a name, or a file's path; kmod's modname_normalize takes - for _."""
    base = os.path.basename(arg) if os.path.exists(arg) else arg
    for suffix in (".ko", ".ko.xz", ".ko.zst", ".ko.gz"):
        base = base.removesuffix(suffix)
    return base.replace("-", "_")


def _refusal(client: Client, name: str, force: bool) -> str | None:
    """Try to remove one module; what kmod would say against it, or None when it is gone."""
    from klpfs.control.protocol import Lsmod, ModuleInfo, Rmmod

    found = next((m for m in client.call(Lsmod(), list[ModuleInfo]) if m.name == name), None)
    if found is None:
        return f"ERROR: Module {name} is not currently loaded"
    if not force:  # tools/rmmod.c, check_module_inuse
        if found.holders:
            return f"ERROR: Module {name} is in use by: {' '.join(found.holders)}"
        if found.refcnt:
            return f"ERROR: Module {name} is in use"
    flags = os.O_NONBLOCK | (os.O_TRUNC if force else 0)
    try:
        client.call(Rmmod(name=name, flags=flags), type(None))
    except OSError as err:
        return f"ERROR: could not remove module {name}: {os.strerror(err.errno or 0)}"
    return None


@click.command(
    "rmmod",
    short_help="Remove modules.",
    epilog="""\b
Examples:
  klpfs rmmod livepatch_sample
  klpfs rmmod first second
""",
)
@click.argument("modules", metavar="MODULE...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Remove a module that is in use, where the kernel allows it.")
@common.mount_option
@common.daemon_errors
def command(modules: tuple[str, ...], force: bool, mount: str | None) -> None:
    """Remove each MODULE. A patch's module can go once its directory is gone and its refcnt is 0."""
    refusals = []
    with common.connect(mount) as client:
        for arg in modules:
            refusal = _refusal(client, module_name(arg), force)
            if refusal is not None:
                refusals.append(refusal)
                click.echo(f"rmmod: {refusal}", err=True)
    if refusals:
        raise click.exceptions.Exit(common.EXIT_REFUSED)
