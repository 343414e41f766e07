"""``klpfs task``: create tasks in the emulator and say what they do, so that a transition has something to wait for."""

from __future__ import annotations

import signal as signals

import click

from klpfs.cli import common


def signal_number(text: str) -> int:
    """A signal from its number, or its name with or without ``SIG``. Raises click.BadParameter."""
    name = text.upper()
    if name.isdecimal() and int(name) <= 64:
        return int(name)
    try:
        return signals.Signals[name if name.startswith("SIG") else f"SIG{name}"].value
    except KeyError:
        raise click.BadParameter(f"{text!r} is not a signal") from None


def stack_list(text: str) -> list[str]:
    """Comma-separated functions, the innermost first; nothing is an empty stack. Raises click.BadParameter."""
    names = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(names):
        raise click.BadParameter(f"{text!r}: an empty name among the functions")
    return names


_STATE = click.Choice(["R", "S", "D", "T", "t", "X", "Z", "P", "I"])
_STACK_HELP = "What it sleeps in, the innermost function first: FUNC[+OFFSET],MODULE:FUNC,0xADDRESS."
_pids = click.argument("pids", metavar="PID...", nargs=-1, required=True, type=click.IntRange(min=1, max=0x7FFFFFFF))


@click.group(
    "task",
    short_help="Add, change, wake, signal and remove emulated tasks.",
    epilog="""\b
Examples:
  klpfs task add --comm worker --kthread --state D --stack busymod_work_func
  klpfs task set 17 --stack '' --state S
  klpfs task wake 17
  klpfs task signal 17 --signal KILL
""",
)
def command() -> None:
    """Emulated tasks: they block a transition as real ones do.

    A task blocks when it runs (--on-cpu), when its stack cannot be trusted (--unreliable), or when a function that is
    to be replaced is on its stack.
    """


@command.command("add", short_help="Create tasks.")
@click.option("--comm", default="task", show_default=True, help="Its name.")
@click.option("--kthread", is_flag=True, help="A kernel thread: it ignores signals and never returns to user space.")
@click.option("--state", type=_STATE, default="S", show_default=True, help="Its state, as ps(1) shows it.")
@click.option("--stack", type=stack_list, default="", metavar="LIST", help=_STACK_HELP)
@click.option("--unreliable", is_flag=True, help="Its stack cannot be trusted.")
@click.option("--on-cpu", is_flag=True, help="It is running, and goes on running.")
@click.option("--in-user", is_flag=True, help="With --on-cpu: it runs in user space, where a signal finds it.")
@click.option("--wake-leaves", is_flag=True, help="A wake-up makes it leave the kernel instead of sleeping on.")
@click.option("--count", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="How many.")
@common.mount_option
@common.json_option
@common.daemon_errors
def add(
    comm: str,
    kthread: bool,
    state: str,
    stack: list[str],
    unreliable: bool,
    on_cpu: bool,
    in_user: bool,
    wake_leaves: bool,
    count: int,
    mount: str | None,
    as_json: bool,
) -> None:
    """Create tasks and print their pids, one a line."""
    from klpfs.control.protocol import TaskAdd

    request = TaskAdd(
        comm=comm,
        kthread=kthread,
        state=state,
        stack=stack,
        reliable=not unreliable,
        on_cpu=on_cpu,
        in_user=in_user,
        wake_leaves=wake_leaves,
        count=count,
    )
    with common.connect(mount) as client:
        pids = client.call(request, list[int])
    if as_json:
        common.print_json(pids)
    else:
        click.echo("\n".join(map(str, pids)))


@command.command("set", short_help="Change what tasks do.")
@_pids
@click.option("--state", type=_STATE, default=None, help="Its state, as ps(1) shows it.")
@click.option("--stack", type=stack_list, default=None, metavar="LIST", help=_STACK_HELP)
@click.option("--reliable/--unreliable", default=None, help="Whether its stack can be trusted.")
@click.option("--on-cpu/--off-cpu", default=None, help="Whether it is running.")
@common.mount_option
@common.daemon_errors
def set_(
    pids: tuple[int, ...],
    state: str | None,
    stack: list[str] | None,
    reliable: bool | None,
    on_cpu: bool | None,
    mount: str | None,
) -> None:
    """Change the state, the stack or the running of each PID; what is not given stays."""
    from klpfs.control.protocol import TaskInfo, TaskSet

    with common.connect(mount) as client:
        for pid in pids:
            request = TaskSet(pid=pid, state=state, stack=stack, reliable=reliable, on_cpu=on_cpu)
            client.call(request, TaskInfo)


@command.command("wake", short_help="Wake tasks.")
@_pids
@common.mount_option
@common.daemon_errors
def wake(pids: tuple[int, ...], mount: str | None) -> None:
    """Let each PID finish what it waits for: it leaves the kernel, and with that the functions on its stack."""
    from klpfs.control.protocol import TaskInfo, TaskWake

    with common.connect(mount) as client:
        for pid in pids:
            client.call(TaskWake(pid=pid), TaskInfo)


@command.command("signal", short_help="Send a signal to tasks.")
@_pids
@click.option("-s", "--signal", "number", type=signal_number, default="TERM", show_default=True, help="Name or number.")
@common.mount_option
@common.daemon_errors
def signal(pids: tuple[int, ...], number: int, mount: str | None) -> None:
    """Send a signal to each PID, as kill(1) would."""
    from klpfs.control.protocol import TaskSignal

    with common.connect(mount) as client:
        for pid in pids:
            client.call(TaskSignal(pid=pid, signal=number), bool)


@command.command("remove", short_help="End tasks.")
@_pids
@common.mount_option
@common.daemon_errors
def remove(pids: tuple[int, ...], mount: str | None) -> None:
    """End each PID, whatever it is doing."""
    from klpfs.control.protocol import TaskRemove

    with common.connect(mount) as client:
        for pid in pids:
            client.call(TaskRemove(pid=pid), type(None))
