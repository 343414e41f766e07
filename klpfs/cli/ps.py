"""``klpfs ps``: the tasks of the running emulator."""

from __future__ import annotations

import click

from klpfs.cli import common


@click.command("ps", short_help="List the tasks with their patch states.")
@common.mount_option
@common.json_option
@common.daemon_errors
def command(mount: str | None, as_json: bool) -> None:
    """List the tasks: state letter as in ps(1), whether it runs now, its patch state, its name and its stack.

    The patch state is that of /proc/PID/patch_state: -1 outside a transition, 0 unpatched, 1 patched. A stack that
    cannot be trusted is marked with a question mark. The names of kernel threads are in brackets.
    """
    from klpfs.control.protocol import Ps, TaskInfo

    with common.connect(mount) as client:
        tasks = client.call(Ps(), list[TaskInfo])
    if as_json:
        common.print_json(tasks)
        return
    rows = [
        (
            task.pid,
            task.state,
            "yes" if task.on_cpu else "-",
            task.patch_state,
            f"[{task.comm}]" if task.kthread else task.comm,
            ("" if task.reliable else "? ") + " < ".join(task.stack) or "-",
        )
        for task in tasks
    ]
    common.print_table(("PID", "STATE", "ONCPU", "PATCH", "COMM", "STACK"), rows, right=(0, 3))
