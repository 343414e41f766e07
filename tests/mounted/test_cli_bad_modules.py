"""Files and parameters that insmod must refuse as a kernel does; the mount outlives all of them."""

from __future__ import annotations

import gzip
import lzma
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import Cli, Mounted, patch


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with Cli(tmp_path_factory.mktemp("modules")).mounted() as m:
        yield m
        m.alive()
        assert m.cli.json("lsmod") == []
        assert os.listdir(m.klp) == []


@pytest.fixture(scope="module")
def good(mounted: Mounted) -> Path:
    return mounted.cli.module(
        patch("good", more='[[params]]\nname = "number"\n[[params]]\nname = "flag"\ntype = "bool"')
    )


def refused(m: Mounted, path: Path | str, text: str, *params: str, verb: str = "insert") -> None:
    """Assert kmod's words for a refusal."""
    error = m.cli.fails(1, "insmod", path, *params)
    assert error == f"insmod: ERROR: could not {verb} module {path}: {text}\n"
    assert (m.path / "proc/modules").read_text() == ""


def file(m: Mounted, data: bytes) -> Path:
    path = m.cli.dir / "bad.ko"
    path.write_bytes(data)
    return path


def test_files_that_cannot_be_read(mounted: Mounted) -> None:
    refused(mounted, "nosuch.ko", "No such file or directory", verb="load")
    refused(mounted, "nosuch.ko/x", "No such file or directory", verb="load")
    refused(mounted, mounted.cli.dir, "Is a directory")
    refused(mounted, "/dev/null", "Invalid parameters")
    refused(mounted, "/dev/zero", "Invalid parameters")
    fifo = mounted.cli.dir / "fifo"
    os.mkfifo(fifo)
    refused(mounted, fifo, "Invalid parameters")


def test_a_file_that_is_too_large(mounted: Mounted) -> None:
    path = mounted.cli.dir / "huge.ko"
    with path.open("wb") as out:
        out.truncate(1 << 40)
    refused(mounted, path, "File too large")
    path.unlink()


def test_files_that_are_no_modules(mounted: Mounted, good: Path) -> None:
    refused(mounted, file(mounted, b""), "Invalid parameters")
    refused(mounted, file(mounted, b"not an elf"), "Invalid module format")
    refused(mounted, file(mounted, bytes(100_000)), "Invalid module format")
    refused(mounted, file(mounted, b"\x7fELF" + bytes(60)), "Invalid module format")
    refused(mounted, file(mounted, Path("/bin/true").read_bytes()), "Invalid module format")
    data = good.read_bytes()
    for length in (16, 52, 63, 64, 1000, len(data) - 1):
        refused(mounted, file(mounted, data[:length]), "Invalid module format")


def test_broken_compression(mounted: Mounted, good: Path) -> None:
    for data in (lzma.compress(good.read_bytes()), gzip.compress(good.read_bytes()), b"\x28\xb5\x2f\xfd" + bytes(20)):
        refused(mounted, file(mounted, data[:-9]), "Invalid parameters")
        assert mounted.cli.fails(1, "inspect", "bad.ko").startswith("klpfs: ")
    bomb = file(mounted, gzip.compress(bytes(1 << 30)))
    refused(mounted, bomb, "Invalid parameters")


def test_modules_with_broken_bytes(mounted: Mounted, good: Path) -> None:
    """Whatever the file, insmod ends with 0 or 1 and one line; what was taken in can be taken out."""
    data = good.read_bytes()
    rng = random.Random(958)
    for _ in range(40):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 30)):
            broken[rng.randrange(64 if rng.random() < 0.2 else len(broken))] = rng.randrange(256)
        done = mounted.cli.run("insmod", file(mounted, bytes(broken)))
        assert done.returncode in (0, 1), done
        assert done.stdout == ""
        assert done.stderr.count("\n") == done.returncode, done
        for module in mounted.cli.json("lsmod"):
            enabled = mounted.klp / module["name"] / "enabled"
            if enabled.exists():
                enabled.write_text("0")
                mounted.gone(module["name"])
            mounted.sh(f"until [ $(cat $M/sys/module/{module['name']}/refcnt) = 0 ]; do :; done")
            mounted.cli.ok("rmmod", module["name"])


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (["number=many"], "Invalid parameters"),
        (["number="], "Invalid parameters"),
        (["number"], "Invalid parameters"),
        (["number=99999999999"], "Numerical result out of range"),
        (["flag=maybe"], "Invalid parameters"),
    ],
)
def test_bad_parameters(mounted: Mounted, good: Path, params: list[str], text: str) -> None:
    refused(mounted, good, text, *params)
    if "=" in params[0] and params[0] != "number=":
        value = params[0].partition("=")[2]
        assert f"good: `{value}' invalid for parameter `{params[0].partition('=')[0]}'" in mounted.cli.ok("dmesg")


def test_refusals_of_the_livepatch_core(mounted: Mounted) -> None:
    cli = mounted.cli
    refused(mounted, cli.module(patch("nosuch", "no_such_function_at_all")), "Invalid parameters")
    refused(mounted, cli.module(patch("unmarked", more='omit_modinfo = ["livepatch"]')), "Invalid parameters")
    failing = '[objects.callbacks]\npre_patch = { ret = "-ENODEV" }\n'
    refused(mounted, cli.module(patch("callback") + failing), "No such device")


def test_refusals_of_the_loader(mounted: Mounted) -> None:
    cli = mounted.cli
    refused(mounted, cli.module(patch("old", more='vermagic = "5.4.0 SMP mod_unload "')), "Invalid module format")
    refused(mounted, cli.module(patch("closed", more='license = "Proprietary"')), "Unknown symbol in module")
    refused(mounted, cli.module(patch("needy", more='requires = ["no_such_symbol"]')), "Unknown symbol in module")
    assert "needy: Unknown symbol no_such_symbol (err -2)" in cli.ok("dmesg", "-t")
    refused(mounted, cli.module('name = "failing"\nkind = "module"\n[init]\nret = "-EIO"'), "Input/output error")


def test_a_module_that_the_caller_may_not_read(mounted: Mounted, good: Path) -> None:
    """The client reads the file, with its own rights, not the daemon's."""
    secret = mounted.cli.dir / "secret.ko"
    secret.write_bytes(good.read_bytes())
    secret.chmod(0)
    done = mounted.sh(f"setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-all klpfs insmod {secret}")
    assert done.returncode == 1
    assert done.stderr == f"insmod: ERROR: could not load module {secret}: Permission denied\n"


def test_removals_that_are_refused(mounted: Mounted) -> None:
    cli = mounted.cli
    assert cli.fails(1, "rmmod", "nosuch") == "rmmod: ERROR: Module nosuch is not currently loaded\n"
    lib = cli.module('name = "lib"\nkind = "module"\n[[functions]]\nname = "lib_call"\nexport = "any"\n')
    user = cli.module('name = "user"\nkind = "module"\nrequires = ["lib_call"]\n')
    cli.ok("insmod", lib)
    cli.ok("insmod", user)
    assert cli.ok("lsmod").splitlines()[2].endswith("  1 user")
    assert cli.fails(1, "rmmod", "lib") == "rmmod: ERROR: Module lib is in use by: user\n"
    assert "File exists" in cli.fails(1, "insmod", lib)
    cli.ok("rmmod", "user", cli.dir / "lib.ko")
    assert mounted.sh("for i in 1 2; do klpfs rmmod no-such; done").stderr.count("no_such is not currently loaded") == 2
