"""``klpfs status``: the running emulator at a glance: its patches, and what a transition waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from klpfs.cli import common

if TYPE_CHECKING:
    from klpfs.control.protocol import StatusInfo


def _objects(patch_objects: list[tuple[str, bool, int]]) -> str:
    return " ".join(f"{name}:{count}" + ("" if patched else "(not patched)") for name, patched, count in patch_objects)


def show(info: StatusInfo) -> None:
    """Print ``info`` for a reader."""
    where = info.mountpoint + (f" (only {info.subtree})" if info.subtree else "")
    click.echo(f"mount       {where}, driver {info.driver}, pid {info.pid}, klpfs {info.version}")
    rate = f" x{info.clock.rate:g}" if info.clock.mode == "scaled" else ""
    click.echo(f"kernel      {info.release} (profile {info.kernel}), {info.cpus} CPUs")
    click.echo(f"clock       {info.clock.now:.3f} s, {info.clock.mode}{rate}")
    click.echo(
        f"state       {info.modules} modules, {info.tasks} tasks, tainted {info.tainted}, "
        f"ftrace_enabled {info.ftrace_enabled}"
    )
    if not info.patches:
        click.echo("patches     none")
    else:
        click.echo("")
        rows = [
            (
                patch.stack_order,
                patch.name,
                int(patch.enabled),
                int(patch.transition),
                int(patch.replace),
                "yes" if patch.forced else "-",
                _objects([(obj.name, obj.patched, len(obj.funcs)) for obj in patch.objects]),
            )
            for patch in info.patches
        ]
        header = ("ORDER", "PATCH", "ENABLED", "TRANSITION", "REPLACE", "FORCED", "OBJECTS:FUNCTIONS")
        common.print_table(header, rows, right=(0, 2, 3, 4))
    transition = info.transition
    if transition is not None:
        click.echo("")
        click.echo(
            f"transition  {transition.direction} '{transition.patch}', {transition.tries} failed tries, "
            f"{transition.pending} tasks pending"
        )
        stragglers = [(task.pid, task.state, task.comm, task.reason) for task in transition.stragglers]
        if stragglers:
            common.print_table(("PID", "STATE", "COMM", "REASON"), stragglers, right=(0,))
        if transition.pending > len(transition.stragglers):
            click.echo(f"... and {transition.pending - len(transition.stragglers)} more")


@click.command("status", short_help="Show the patches, and what a transition waits for.")
@common.mount_option
@common.json_option
@common.daemon_errors
def command(mount: str | None, as_json: bool) -> None:
    """Show the mount, its kernel and clock, the stack of patches, and the tasks that a transition waits for."""
    from klpfs.control.protocol import Status, StatusInfo

    with common.connect(mount) as client:
        info = client.call(Status(), StatusInfo)
    if as_json:
        common.print_json(info)
    else:
        show(info)
