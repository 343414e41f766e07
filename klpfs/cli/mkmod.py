"""``klpfs mkmod``: write module files from specs, without a compiler."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from klpfs.cli import common


def target_of(output: str | None, name: str, several: bool) -> str:
    """The file for the module ``name``. Raises click.BadParameter when several modules would go into one file."""
    if output is None:
        return f"{name}.ko"
    if os.path.isdir(output):
        return os.path.join(output, f"{name}.ko")
    if several:
        raise click.BadParameter(f"{output!r} is no directory, and there are several specs", param_hint="-o")
    return output


def write_file(path: str, data: bytes) -> None:
    """Write all of a file or none of it. Raises CliError."""
    if path == "-":
        sys.stdout.buffer.write(data)
        return
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout, say
            Path(path).write_bytes(data)
            return
        partial = f"{path}.{os.getpid()}"
        try:
            Path(partial).write_bytes(data)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as err:
        raise common.CliError(f"{path}: {err.strerror}", common.EXIT_REFUSED) from None


@click.command(
    "mkmod",
    short_help="Write a module from a specification, without a compiler.",
    epilog="""\b
Examples:
  klpfs mkmod examples/modules/cmdline.toml -o cmdline.ko
  klpfs mkmod examples/modules/*.toml -o modules/
  klpfs mkmod --kernel seed old.toml
  modinfo ./cmdline.ko
""",
)
@click.argument("specs", metavar="SPEC.toml...", nargs=-1)
@click.option("-o", "--output", metavar="X.ko|DIR", help="The file, or the directory (default: NAME.ko here).")
@click.option("--kernel", default="6.12", show_default=True, metavar="PROFILE", help="The kernel that it is built for.")
@click.option("--release", metavar="X", help="The release in vermagic (default: the profile's).")
@click.option("--check", is_flag=True, help="Check the specs and write nothing.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of a spec, for editors.")
def command(
    specs: tuple[str, ...], output: str | None, kernel: str, release: str | None, check: bool, schema: bool
) -> None:
    """Write the module that SPEC.toml describes: a .ko that insmod, modinfo and readelf take.

    A spec names a module and says what its functions do; examples/modules holds commented ones. Nothing is printed
    when all went well.
    """
    from klpfs.spec import ModuleSpec, SpecError, load_spec

    if schema:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(ModuleSpec)), indent=2))
        return
    if not specs:
        raise click.UsageError("no SPEC.toml given")
    from klpfs.elf.writer import write_module
    from klpfs.kernel.profile import profile

    try:
        target = profile(kernel, release=release)
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint="--kernel") from None
    modules = []
    for path in specs:
        try:
            spec = load_spec(path)
        except SpecError as err:
            raise common.CliError(str(err), common.EXIT_REFUSED) from None
        except OSError as err:
            raise common.CliError(f"{path}: {err.strerror}", common.EXIT_REFUSED) from None
        modules.append((target_of(output, spec.name, len(specs) > 1), spec))
    if check:
        return
    for path, spec in modules:
        write_file(path, write_module(spec, release=target.release, flags=target.vermagic_flags))
