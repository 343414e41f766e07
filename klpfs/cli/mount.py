"""``klpfs mount``: start a daemon that serves an emulated kernel at a directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click

from klpfs.cli import common

if TYPE_CHECKING:
    from klpfs.control.daemon import MountConfig, Report

#: Options of ``-o`` that are passed on to the FUSE library; the others have a meaning of their own.
PASSED_ON: Final = frozenset({"ro", "noexec", "nosuid", "nodev", "noatime", "auto_unmount", "dirsync", "sync"})
OWN: Final = frozenset({"allow_other", "noallow_other", "debug", "nonempty"})


def fuse_options(values: tuple[str, ...]) -> set[str]:
    """The single options of all ``-o``. Raises click.BadParameter that names an unknown one."""
    found = set()
    for value in values:
        for option in value.split(","):
            if option not in PASSED_ON | OWN:
                known = ", ".join(sorted(PASSED_ON | OWN))
                raise click.BadParameter(f"unknown mount option {option!r}; known are {known}", param_hint="-o")
            found.add(option)
    return found


def check_directory(directory: str, path: str, *, nonempty: bool) -> None:
    """Refuse what cannot become a mount point. Raises CliError."""

    def refuse(reason: str) -> common.CliError:
        return common.CliError(f"{directory}: {reason}", common.EXIT_MOUNT)

    try:
        entries = os.listdir(path)
    except NotADirectoryError:
        raise refuse("not a directory") from None
    except OSError as err:
        from klpfs.drivers.common import mount_state

        if mount_state(path) == "dead":
            reason = "a dead mount (transport endpoint is not connected); clear it with: klpfs umount"
            raise refuse(f"{reason} {directory}") from None
        raise refuse(err.strerror or str(err)) from None
    if os.path.ismount(path):
        raise refuse("something is mounted there already")
    if entries and not nonempty:
        raise refuse("not empty; what is in it would be hidden (-o nonempty allows that)")


def run_in_foreground(config: MountConfig) -> int:
    """Serve in this process; the exit code."""
    from klpfs.control.daemon import serve_mount

    failures = []

    def report(what: Report) -> None:
        if what.kind == "ready":
            click.echo(f"klpfs: mounted at {config.mountpoint} (pid {what.pid}); end it with Ctrl-C", err=True)
        else:
            failures.append(what)

    status = serve_mount(config, report)
    for failure in failures:
        raise common.CliError(failure.message, exit_code(failure))
    return common.EXIT_DAEMON if status else common.EXIT_OK


def exit_code(report: Report) -> int:
    """The exit code for a failed start."""
    return common.EXIT_USAGE if report.kind == "usage" else common.EXIT_MOUNT


@click.command(
    "mount",
    short_help="Mount an emulated kernel at DIR.",
    epilog="""\b
Examples:
  klpfs mount /tmp/k
  klpfs mount /tmp/k --kernel seed --clock virtual
  klpfs mount /tmp/klp --subtree sys/kernel/livepatch
  klpfs mount /tmp/k --foreground -o debug
""",
)
@click.argument("directory", metavar="DIR")
@click.option("--kernel", default="6.12", show_default=True, metavar="PROFILE", help="The kernel to be; see README.")
@click.option("--release", metavar="X", help="What uname -r is, and vermagic (default: the profile's).")
@click.option(
    "--kernel-image", default="", metavar="FILE", help="Take the kernel's symbols from this bzImage or vmlinux."
)
@click.option(
    "--kallsyms", default="", metavar="FILE", help="Take them from this System.map or copy of /proc/kallsyms."
)
@click.option("--subtree", default="", metavar="PATH", help="Serve only this directory of the tree.")
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground; messages go to standard error.")
@click.option(
    "--driver", type=click.Choice(["pyfuse3", "fusepy"]), default="pyfuse3", show_default=True, help="The FUSE library."
)
@click.option(
    "--clock",
    default="real",
    show_default=True,
    metavar="CLOCK",
    help="real, a factor such as 10, virtual (jumps when idle) or manual (moved by klpfs clock).",
)
@click.option("--cpus", type=click.IntRange(1, 8192), default=2, show_default=True, metavar="N", help="CPUs.")
@click.option("--log", default="", metavar="FILE", help="The daemon's own log (default: in the runtime directory).")
@click.option("-o", "options", multiple=True, metavar="OPTS", help="Mount options, by commas.")
def command(
    directory: str,
    kernel: str,
    release: str | None,
    kernel_image: str,
    kallsyms: str,
    subtree: str,
    foreground: bool,
    driver: str,
    clock: str,
    cpus: int,
    log: str,
    options: tuple[str, ...],
) -> int:
    """Mount an emulated kernel at the directory DIR: its /sys, /proc and /dev.

    Returns when the mount can be used. It ends with klpfs umount DIR, umount DIR, or a SIGTERM to its daemon.

    \b
    Mount options (-o): allow_other (the default for root), noallow_other, auto_unmount, debug (a detailed daemon
    log), dirsync, noatime, nodev, noexec, nonempty, nosuid, ro, sync.
    """
    from klpfs.control.daemon import MountConfig, spawn
    from klpfs.control.runtime import normalize

    if kernel_image and kallsyms:
        raise click.UsageError("--kernel-image and --kallsyms exclude each other")
    given = fuse_options(options)
    path = normalize(directory)
    check_directory(directory, path, nonempty="nonempty" in given)
    passed = sorted(given & PASSED_ON)
    if driver == "fusepy" and "nonempty" in given:
        passed.append("nonempty")  # libfuse 3 has dropped it, libfuse 2 insists on it
    config = MountConfig(
        mountpoint=path,
        kernel=kernel,
        release=release,
        kernel_image=os.path.abspath(kernel_image) if kernel_image else "",
        kallsyms=os.path.abspath(kallsyms) if kallsyms else "",
        subtree=subtree.strip("/"),
        driver=driver,
        clock=clock,
        cpus=cpus,
        options=passed,
        allow_other=True if "allow_other" in given else False if "noallow_other" in given else None,
        log=os.path.abspath(log) if log else "",
        debug="debug" in given,
        foreground=foreground,
    )
    if foreground:
        return run_in_foreground(config)
    report = spawn(config)
    if report.kind != "ready":
        raise common.CliError(report.message, exit_code(report))
    return common.EXIT_OK
