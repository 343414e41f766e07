"""``klpfs lsmod``: the modules of the running emulator, in the format of kmod's lsmod."""

from __future__ import annotations

import click

from klpfs.cli import common


@click.command("lsmod", short_help="List the modules.")
@common.mount_option
@common.json_option
@common.daemon_errors
def command(mount: str | None, as_json: bool) -> None:
    """List the modules, the newest first: name, size in bytes, references, and the modules that hold them."""
    from klpfs.control.protocol import Lsmod, ModuleInfo

    with common.connect(mount) as client:
        modules = client.call(Lsmod(), list[ModuleInfo])
    if as_json:
        common.print_json(modules)
        return
    click.echo("Module                  Size  Used by")
    for module in modules:  # tools/lsmod.c
        holders = ",".join(module.holders)
        click.echo(f"{module.name:<19} {module.size:>8}  {module.refcnt}" + (f" {holders}" if holders else ""))
