"""``klpfs mkmod`` and ``klpfs inspect`` as programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from elf_support import C_MODULE, FULL, KPATCH_MODULE, PLAIN, compile_module, module, with_header
from image_support import SYMBOLS, bzimage, compressed, vmlinux

from klpfs.elf.reader import ElfModule
from klpfs.elf.report import examine
from klpfs.elf.symbols import ListTable, shipped_table
from klpfs.elf.vmlinux import KernelExport, KernelImage

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "modules"


def klpfs(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    command = [sys.executable, "-m", "klpfs.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def inspect_json(*args: str | Path) -> tuple[int, Any]:
    """Exit status and document of ``inspect --json``."""
    result = klpfs("inspect", "--json", *args)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# -- mkmod -------------------------------------------------------------------------------------------------------------


def test_mkmod_writes_a_module_and_says_nothing(tmp_path: Path) -> None:
    spec = tmp_path / "x.toml"
    spec.write_text(PLAIN)
    result = klpfs("mkmod", spec, "-o", tmp_path / "x.ko")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "x.ko").read_bytes() == module(PLAIN)
    assert klpfs("mkmod", spec, cwd=tmp_path).returncode == 0
    assert (tmp_path / "plain.ko").read_bytes() == module(PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.ko", "x.ko", "x.toml"]


def test_mkmod_for_another_kernel(tmp_path: Path) -> None:
    spec = tmp_path / "x.toml"
    spec.write_text(PLAIN)
    for arguments, vermagic in (
        (("--kernel", "6.1"), "6.1.0 "),
        (("--release", "9.9"), "9.9 SMP preempt mod_unload modversions "),
    ):
        assert klpfs("mkmod", spec, *arguments, "-o", tmp_path / "x.ko").returncode == 0
        assert str(ElfModule.load(tmp_path / "x.ko").info("vermagic")).startswith(vermagic)
    result = klpfs("mkmod", spec, "--kernel", "7")
    assert result.returncode == 2
    assert "kernel profile '7' is unknown" in result.stderr


def test_mkmod_of_all_examples(tmp_path: Path) -> None:
    result = klpfs("mkmod", *sorted(EXAMPLES.glob("*.toml")), "-o", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list(tmp_path.glob("*.ko"))) == len(list(EXAMPLES.glob("*.toml")))


def test_mkmod_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('name = "m"\nlicence = "GPL"\n')
    good = tmp_path / "good.toml"
    good.write_text(PLAIN)
    result = klpfs("mkmod", bad, "-o", tmp_path / "x.ko")
    assert result.returncode == 1
    assert result.stderr == f"klpfs: {bad}: unknown field 'licence' (did you mean 'license'?)\n"
    # a broken spec among good ones: nothing is written
    result = klpfs("mkmod", good, bad, "-o", tmp_path)
    assert result.returncode == 1
    assert not list(tmp_path.glob("*.ko"))
    result = klpfs("mkmod", tmp_path / "none.toml")
    assert (result.returncode, result.stderr) == (1, f"klpfs: {tmp_path}/none.toml: No such file or directory\n")
    result = klpfs("mkmod", good, good, "-o", tmp_path / "x.ko")
    assert result.returncode == 2
    assert "several specs" in result.stderr
    result = klpfs("mkmod", good, "-o", tmp_path / "none" / "x.ko")
    assert (result.returncode, result.stderr) == (1, f"klpfs: {tmp_path}/none/x.ko: No such file or directory\n")
    assert klpfs("mkmod").returncode == 2
    assert klpfs("mkmod", "--check", good, "-o", tmp_path / "y.ko").returncode == 0
    assert not (tmp_path / "y.ko").exists()


def test_mkmod_schema() -> None:
    schema = json.loads(klpfs("mkmod", "--schema").stdout)
    assert "old_name" in schema["$defs"]["Replacement"]["properties"]


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_a_patch_would_do(tmp_path: Path) -> None:
    path = write(tmp_path / "full.ko", module(FULL.replace('uses = ["foo", "bar,2"]', "")))
    result = klpfs("inspect", path)
    assert result.returncode == 1, "it requires another module's callback value, and fails with it"
    lines = result.stdout.splitlines()
    assert lines[0] == "full: livepatch (synthetic)"
    text = " ".join(result.stdout.split())
    for part in (
        "version: 1.0",
        "vermagic: 6.12.117+deb12-amd64 SMP preempt mod_unload modversions",
        "ret int 0644 -5",
        "text string[16] 0444 hi",
        "patch (from static data), replaces all others",
        "vmlinux cmdline_proc_show,0 livepatch_cmdline_proc_show 0xffffffff",
        "busy busy_func,2 livepatch_busy_func when the module is there",
        "vmlinux pre_patch pre_patch_vmlinux",
        "id version 1 2 77 0",
        "klp_enable_patch gpl",
        "exports: offered_to_all, offered",
    ):
        assert part in text, part
    assert "insmod would fail: Input/output error (EIO)" in lines
    assert lines[-1].startswith("  livepatch: ")
    # the parameter is what pre_patch returns
    assert klpfs("inspect", path, "ret=0").returncode == 0


def test_inspect_as_json(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.ko", module('name = "m"\n[[objects]]\n[[objects.functions]]\nold_name = "c_start"\nsympos = 3\n')
    )
    code, document = inspect_json(path)
    assert code == 0
    assert document["loads"]
    assert document["errno"] == ""
    assert "livepatch: enabling patch 'm'" in document["log"]
    (function,) = document["report"]["patch"]["objects"][0]["functions"]
    assert function["address"] == shipped_table().lookup("c_start")[2].address
    assert function["problem"] == ""


@pytest.mark.parametrize(
    ("name", "sympos", "problem", "log"),
    [
        ("nowhere", 0, "not found in the kernel's symbol table", "symbol 'nowhere' not found in symbol table"),
        ("c_start", 0, "ambiguous: 3 symbols have this name", "unresolvable ambiguity for symbol 'c_start' in object"),
        ("c_start", 4, "position 4 not found: 3 symbols", "symbol position 4 for symbol 'c_start' in object 'vmlinux'"),
        ("t_show", 1, "no ftrace location", "failed to find location for function 't_show'"),
    ],
)  # fmt: skip
def test_functions_that_cannot_be_patched(name: str, sympos: int, problem: str, log: str, tmp_path: Path) -> None:
    text = f'name = "m"\n[[objects]]\n[[objects.functions]]\nold_name = "{name}"\nsympos = {sympos}\n'
    code, document = inspect_json(write(tmp_path / "m.ko", module(text)))
    assert code == 1
    assert document["errno"] == "EINVAL"
    assert document["report"]["problems"][0].startswith(f"vmlinux: {name}: {problem}")
    assert log in "\n".join(document["log"])


def test_livepatch_relocations(tmp_path: Path) -> None:
    text = 'name = "m"\n[[objects]]\nuses = ["c_start,2", "nowhere"]\n[[objects]]\nname = "other"\nuses = ["x"]\n'
    code, document = inspect_json(write(tmp_path / "m.ko", module(text)))
    assert code == 1
    kernel, other = document["report"]["relocations"]
    assert kernel["object"] == "vmlinux"
    assert kernel["problems"] == ["symbol 'nowhere': not found in the kernel's symbol table"]
    assert other["symbols"] == [".klp.sym.other.x,0"]
    assert other["problems"] == []
    assert document["log"][-1] == "livepatch: symbol 'nowhere' not found in symbol table"


def test_refused_files(tmp_path: Path) -> None:
    data = module(PLAIN)
    result = klpfs("inspect", write(tmp_path / "x.ko", with_header(data, machine=3)))
    assert result.returncode == 1
    assert result.stderr == (
        f"klpfs: {tmp_path}/x.ko: machine 3 is not x86-64\n"
        "insmod would fail: Invalid module format (ENOEXEC)\n"
        "  Invalid architecture in ELF header: 3\n"
    )
    code, document = inspect_json(tmp_path / "x.ko")
    assert (code, document["loads"], document["errno"], document["report"]) == (1, False, "ENOEXEC", None)
    result = klpfs("inspect", write(tmp_path / "empty.ko", b""))
    assert "insmod would fail: Invalid parameters (EINVAL)" in result.stderr
    result = klpfs("inspect", tmp_path / "none.ko")
    assert (result.returncode, result.stderr) == (1, f"klpfs: {tmp_path}/none.ko: No such file or directory\n")


def test_modules_for_other_kernels(tmp_path: Path) -> None:
    path = write(tmp_path / "m.ko", module(PLAIN + 'release = "6.1.0"\n'))
    code, document = inspect_json(path)
    assert (code, document["errno"]) == (1, "ENOEXEC")
    assert "plain: version magic '6.1.0 SMP preempt mod_unload modversions ' should be" in document["log"][-1]
    assert inspect_json("--release", "6.1.0", path)[0] == 0


def test_target_kernel_from_an_image(tmp_path: Path) -> None:
    image = write(tmp_path / "vmlinuz", bzimage(compressed(vmlinux(), "zstd")))
    spec = 'name = "m"\nrelease = "6.12.0-test"\n[[objects]]\n[[objects.functions]]\nold_name = "{}"\nsympos = {}\n'
    path = write(tmp_path / "m.ko", module(spec.format("twice", 2)))
    _, document = inspect_json("--kernel-image", image, path)
    assert document["report"]["kernel"] == "6.12.0-test"
    assert document["report"]["patch"]["objects"][0]["functions"][0]["address"] == 0xFFFFFFFF81008100
    assert (
        "__fentry__: unknown symbol: neither the kernel nor any loaded module exports it"
        in document["report"]["problems"]
    )
    result = klpfs("inspect", "--kernel-image", path, path)
    assert result.returncode == 1
    assert "no kallsyms" in result.stderr or "no .rodata" in result.stderr or "not an x86-64 kernel" in result.stderr
    result = klpfs("inspect", "--kernel-image", image, "--kallsyms", image, path)
    assert result.returncode == 2


def test_target_kernel_from_a_text_file(tmp_path: Path) -> None:
    text = tmp_path / "System.map"
    text.write_text("".join(f"{address:016x} {kind} {name}\n" for address, kind, name in SYMBOLS))
    path = write(tmp_path / "m.ko", module('name = "m"\n[[objects]]\n[[objects.functions]]\nold_name = "twice"\n'))
    _, document = inspect_json("--kallsyms", text, path)
    assert document["report"]["patch"]["objects"][0]["functions"][0]["problem"].startswith("ambiguous: 2 symbols")


def test_compiled_module(tmp_path: Path) -> None:
    path = compile_module(C_MODULE, tmp_path / "own.ko")
    _, document = inspect_json(path)
    report = document["report"]
    assert report["symbol_versions"]
    assert not report["synthetic"]
    assert report["patch"]["states"] == [{"id": 9, "version": 4}]
    assert "version" not in "\n".join(report["problems"]), "the shipped table is one build of many"
    assert "disagrees" not in "\n".join(document["log"])


def test_symbol_versions_are_compared_with_those_of_an_image(tmp_path: Path) -> None:
    elf = ElfModule.load(compile_module(C_MODULE, tmp_path / "own.ko"))
    exports = [KernelExport("klp_enable_patch", 0x2000, True, 0x12345678), KernelExport("__fentry__", 0x1000, False, 1)]
    table = ListTable([(0x1000, "T", "__fentry__"), (0x2000, "T", "klp_enable_patch")], exports)
    problems = "\n".join(examine(elf, table).problems)
    assert "klp_enable_patch: symbol version 0x9abcdef0 in the module, 0x12345678 in the kernel" in problems
    assert "__fentry__: no symbol version in the module" in problems
    assert "optional" not in problems


def test_kpatch_module(tmp_path: Path) -> None:
    path = compile_module(KPATCH_MODULE, tmp_path / "kp.ko")
    report = examine(ElfModule.load(path), shipped_table())
    assert report.patch is not None
    assert report.patch.source == "kpatch tables"
    assert [o.name for o in report.patch.objects] == ["xfs", "ext4", "vmlinux"]
    text = klpfs("inspect", path).stdout
    assert "patch (from kpatch tables), replaces all others, unless kpatch-build was told --non-replace\n" in text


def test_what_klpfs_can_run() -> None:
    table = ListTable.from_image(KernelImage(vmlinux()))
    elf = ElfModule.parse(module('name = "m"\nrequires = ["_printk"]\n'))
    assert {i.name: i.runnable for i in examine(elf, table).imports} == {
        "__fentry__": None, "klp_enable_patch": None, "_printk": None,
    }  # fmt: skip
    report = examine(elf, table, supported={"_printk"})
    assert {i.name: (i.exported, i.gpl_only, i.runnable) for i in report.imports} == {
        "__fentry__": (False, False, False),
        "klp_enable_patch": (True, True, False),
        "_printk": (True, False, True),
    }


def test_what_klpfs_can_run_of_what_livepatch_relocations_use(tmp_path: Path) -> None:
    uses = '"saved_command_line,0", "linux_proc_banner", "proc_root_init"'
    text = f'name = "m"\n[[objects]]\nuses = [{uses}]\n[[objects]]\nname = "other"\nuses = ["x"]\n'
    elf = ElfModule.parse(module(text))
    assert [r.unsupported for r in examine(elf, shipped_table()).relocations] == [None, None]
    supported = {"saved_command_line", "linux_proc_banner"}
    kernel, other = examine(elf, shipped_table(), supported=supported).relocations
    assert kernel.problems == []
    assert kernel.unsupported == ["proc_root_init"]
    assert other.unsupported == []
    result = klpfs("inspect", write(tmp_path / "m.ko", module(text)))
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("  .klp.rela")]
    assert [(row[1], row[3:5]) for row in rows] == [
        ("vmlinux", ["NO:", "proc_root_init"]),
        ("other", ["yes", ".klp.sym.other.x,0"]),
    ]


def test_endless_init_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "m.ko", module(PLAIN + '[init]\nduration = "forever"\n'))
    result = klpfs("inspect", path)
    assert result.returncode == 1
    assert "insmod would not return within 600 seconds" in result.stdout


def test_init_that_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "m.ko", module(PLAIN + '[init]\nlog = "no device"\nret = "-ENODEV"\n'))
    result = klpfs("inspect", path)
    assert result.returncode == 1
    assert "insmod would fail: No such device (ENODEV)" in result.stdout
    assert "plain: no device" in result.stdout
