"""``klpfs inspect``: what a module would do, and whether the kernel would take it; nothing of it is executed."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from klpfs.cli import common

if TYPE_CHECKING:
    from klpfs.elf.report import ModuleReport
    from klpfs.elf.symbols import SymbolTable
    from klpfs.kernel.profile import Profile

#: How a machine without engine starts the line that says so; nobody expects execution here.
NOT_EXECUTED: Final = "klpfs: module code is not executed"
#: Seconds of emulated time that a module's init may take in the trial.
INIT_LIMIT: Final = 600.0


def supported_symbols() -> frozenset[str] | None:
    """Kernel symbols whose users klpfs can run; None when there is no execution engine to ask."""
    from klpfs.cpu.lazy import available

    if not available():  # what a machine would execute modules with
        return None
    from klpfs.cpu.api import SUPPORTED

    return frozenset(SUPPORTED)


def trial(data: bytes, args: str, profile: Profile, table: SymbolTable) -> tuple[int, list[str]]:
    """Load the module into a machine of its own: the errno that insmod would get (0: none), and the kernel log.

    The code of a real module is not executed; a synthetic one is acted out. Time is virtual.
    """
    import trio
    import trio.testing

    from klpfs.machine import open_machine

    async def load() -> tuple[int, list[str]]:
        async with open_machine(profile, table=table) as machine:
            start = machine.printk.next_seq
            code = 0
            with trio.move_on_after(INIT_LIMIT) as limit:
                try:
                    await machine.init_module(data, args)
                except OSError as err:
                    code = err.errno or errno.EIO
            if limit.cancelled_caught:
                code = errno.ETIMEDOUT
            messages = [record.message for record in machine.printk.records(start)]
            return code, [line for line in messages if not line.startswith(NOT_EXECUTED)]

    return trio.run(load, clock=trio.testing.MockClock(autojump_threshold=0))


def verdict_text(code: int) -> str:
    """A sentence about the errno of a trial."""
    from klpfs.cli.insmod import MOD_STRERROR

    if code == 0:
        return "insmod would succeed"
    if code == errno.ETIMEDOUT:
        return f"insmod would not return within {INIT_LIMIT:.0f} seconds"
    name = errno.errorcode.get(code, str(code))
    return f"insmod would fail: {MOD_STRERROR.get(code, os.strerror(code))} ({name})"


def show(report: ModuleReport, verdict: str, log: list[str]) -> None:
    """Print the report for people."""
    marks = [
        mark
        for mark, holds in (
            ("synthetic", report.synthetic),
            ("signed", report.signed),
            ("with symbol versions", report.symbol_versions),
        )
        if holds
    ]
    click.echo(f"{report.name}: {report.kind}" + (f" ({', '.join(marks)})" if marks else ""))
    for label, value in (
        ("version", report.version),
        ("license", report.license),
        ("vermagic", report.vermagic.strip()),
        ("kernel", report.kernel),
        ("memory", f"{report.core_size} bytes, and {report.init_size} during init"),
        ("exports", ", ".join(report.exports)),
    ):
        if value:
            click.echo(f"  {label + ':':<10}{value}")
    if report.params:
        click.echo("\nparameters")
        params = [
            (p.name, p.type + (f"[{p.max}]" if p.max else ""), p.perm, "" if p.default is None else p.default)
            for p in report.params
        ]
        indented(("name", "type", "perm", "default"), params)
    if report.patch is not None:
        show_patch(report)
    if report.relocations:
        click.echo("\nlivepatch relocations")
        sections = [
            (r.section, r.object, str(r.relocations), runnable_text(r.unsupported), " ".join(r.symbols))
            for r in report.relocations
        ]
        indented(("section", "object", "count", "runs in klpfs", "symbols"), sections)
    if report.imports:
        click.echo("\nkernel symbols used")
        known = {None: "?", True: "yes", False: "NO"}
        imports = [
            (
                i.name,
                ("gpl" if i.gpl_only else "yes") if i.exported else ("no (weak)" if i.weak else "NO"),
                known[i.runnable],
                i.problem,
            )
            for i in report.imports
        ]
        indented(("symbol", "exported", "runs in klpfs", ""), imports)
    if report.problems:
        click.echo("\nproblems")
        for problem in report.problems:
            click.echo(f"  {problem}")
    click.echo(f"\n{verdict}")
    for line in log:
        click.echo(f"  {line}")


def runnable_text(unsupported: list[str] | None) -> str:
    """Whether klpfs can run code that uses some symbols, of which it does not have *unsupported*."""
    if unsupported is None:
        return "?"
    return "NO: " + ", ".join(unsupported) if unsupported else "yes"


def show_patch(report: ModuleReport) -> None:
    """Print the patch: its objects, functions, callbacks and states."""
    from klpfs.elf.report import KPATCH_TABLES

    patch = report.patch
    assert patch is not None
    replaces = "replaces all others" if patch.replace else "adds to others"
    if patch.source == KPATCH_TABLES:
        replaces += ", unless kpatch-build was told --non-replace"  # only the module's code has it
    click.echo(f"\npatch (from {patch.source}), {replaces}")
    rows = []
    for obj in patch.objects:
        for func in obj.functions:
            where = "when the module is there" if func.address is None else f"{func.address:#x}+{func.size:#x}"
            rows.append((obj.name, f"{func.old_name},{func.sympos}", func.new_symbol or "?", func.problem or where))
        if not obj.functions:
            rows.append((obj.name, "-", "-", "no functions"))
    indented(("object", "function,sympos", "replaced by", "resolves"), rows)
    callbacks = [(obj.name, name, function) for obj in patch.objects for name, function in obj.callbacks.items()]
    if callbacks:
        click.echo("\ncallbacks")
        indented(("object", "callback", "function"), callbacks)
    if patch.states:
        click.echo("\nsystem states")
        indented(("id", "version"), [(str(s.id), str(s.version)) for s in patch.states])


def indented(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table below a heading."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        click.echo("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


@click.command(
    "inspect",
    short_help="Say what a module would do, without loading it.",
    epilog="""\b
Examples:
  klpfs inspect livepatch-sample.ko
  klpfs inspect --json kpatch-fix.ko | jq .report.patch
  klpfs inspect --kernel-image /boot/vmlinuz-6.12.57+deb13-amd64 fix.ko

\b
Exit codes: 0 when insmod would succeed, 1 when it would not, 2 for a wrong command line.
""",
)
@click.argument("path", metavar="X.ko")
@click.argument("params", metavar="[PARAM=VALUE]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--kernel", default="6.12", show_default=True, metavar="PROFILE", help="The kernel it would meet.")
@click.option("--kernel-image", metavar="FILE", help="Take symbols and types from this bzImage or vmlinux.")
@click.option("--kallsyms", metavar="FILE", help="Take symbols from this System.map or copy of /proc/kallsyms.")
@click.option("--release", metavar="X", help="What uname -r is (default: the image's, else the profile's).")
@common.json_option
def command(
    path: str,
    params: tuple[str, ...],
    kernel: str,
    kernel_image: str | None,
    kallsyms: str | None,
    release: str | None,
    as_json: bool,
) -> int:
    """Say what the module in X.ko is and would do: its patch, its functions and whether the target kernel has them,
    its callbacks, the kernel functions that it calls, and the answer that insmod would get.

    Nothing is executed. What a module's init would change before it enables its patch is not seen.
    """
    if kernel_image and kallsyms:
        raise click.UsageError("--kernel-image and --kallsyms exclude each other")
    from klpfs.elf import dwarf
    from klpfs.elf.layouts import KLP_LAYOUT
    from klpfs.elf.reader import ElfModule, ModuleFormatError
    from klpfs.elf.report import as_dict, examine
    from klpfs.elf.symbols import ListTable, shipped_table
    from klpfs.kernel.profile import DEFAULT_PROFILE, profile

    try:
        target = profile(kernel, release=release)
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint="--kernel") from None
    layouts = None
    table: SymbolTable
    try:
        if kernel_image:
            from klpfs.elf.vmlinux import KernelImage, klp_layouts

            image = KernelImage.load(kernel_image)
            table = ListTable.from_image(image)
            layouts = klp_layouts(image.btf) if image.btf is not None else None
            target = profile(kernel, release=release or image.release or None)
        else:
            table = ListTable.from_file(kallsyms) if kallsyms else shipped_table(target.name, DEFAULT_PROFILE)
    except OSError as err:
        raise common.CliError(f"{err.filename}: {err.strerror}" if err.filename else str(err.strerror), 1) from None
    try:
        elf = ElfModule.load(path)
        if layouts is None and elf.is_livepatch:
            layouts = dwarf.klp_layouts(elf)
        report = examine(elf, table, supported=supported_symbols(), layouts=layouts or KLP_LAYOUT)
    except ModuleFormatError as err:
        if as_json:
            print_refusal(path, err)
            return common.EXIT_REFUSED
        text = f"{err.strerror}\n{verdict_text(err.errno or errno.ENOEXEC)}" + (f"\n  {err.log}" if err.log else "")
        raise common.CliError(text, common.EXIT_REFUSED) from None
    except OSError as err:
        raise common.CliError(f"{path}: {err.strerror}", common.EXIT_REFUSED) from None
    code, log = trial(elf.data, " ".join(params), target, table)
    if as_json:
        common.print_json(
            {"loads": code == 0, "errno": errno.errorcode.get(code, ""), "log": log, "report": as_dict(report)}
        )
    else:
        show(report, verdict_text(code), log)
    return common.EXIT_OK if code == 0 else common.EXIT_REFUSED


def print_refusal(path: str, err: OSError) -> None:
    """The JSON for a file that is no module."""
    log = getattr(err, "log", "")
    common.print_json(
        {
            "loads": False,
            "errno": errno.errorcode.get(err.errno or errno.ENOEXEC, ""),
            "log": [log] if log else [],
            "report": None,
            "error": err.strerror,
        }
    )
