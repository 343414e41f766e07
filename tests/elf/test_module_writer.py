"""Written modules: read back by our own reader, by pyelftools, by binutils and by kmod."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from elf_support import FULL, PLAIN, module, strip
from elftools.elf.elffile import ELFFile

from klpfs.elf import klp
from klpfs.elf import layouts as C
from klpfs.elf.reader import ElfModule
from klpfs.elf.writer import write_module
from klpfs.spec import from_json, load_spec, parse_toml

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "modules").glob("*.toml"))


def output(*command: str | Path) -> str:
    """Standard output of a tool; it has to succeed and to say nothing on standard error."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "full.ko"
    path.write_bytes(module(FULL))
    return path


def test_reader_finds_what_the_spec_says() -> None:
    elf = ElfModule.parse(module(FULL))
    assert (elf.name, elf.label, elf.is_livepatch, elf.has_versions, elf.signature) == (
        "full", "full", True, False, None,
    )  # fmt: skip
    assert elf.spec is not None
    assert from_json(elf.spec) == parse_toml(FULL)
    assert elf.modinfo == [
        ("description", "everything"),
        ("author", "A"),
        ("author", "B"),
        ("version", "1.0"),
        ("livepatch", "Y"),
        ("license", "GPL"),
        ("parm", "ret:a number"),
        ("parmtype", "ret:int"),
        ("parm", "flag:"),
        ("parmtype", "flag:bool"),
        ("parm", "list:"),
        ("parmtype", "list:array of short"),
        ("parm", "text:"),
        ("parmtype", "text:string"),
        ("parm", "word:"),
        ("parmtype", "word:charp"),
        ("srcversion", elf.info("srcversion")),
        ("depends", "other"),
        ("name", "full"),
        ("retpoline", "Y"),
        ("vermagic", "6.12.117+deb12-amd64 SMP preempt mod_unload modversions "),
    ]
    assert [(p.name, p.type, p.perm, p.max, p.default) for p in elf.params] == [
        ("ret", "int", 0o644, 0, "-5"),
        ("flag", "bool", 0o444, 0, "Y"),
        ("list", "short", 0o444, 4, "1,-2"),
        ("text", "string", 0o444, 16, "hi"),
        ("word", "charp", 0o444, 0, "hello"),
    ]
    assert {(e.name, e.gpl) for e in elf.exports} == {("offered", True), ("offered_to_all", False)}
    assert all(e.crc is not None and e.location.symbol == e.name for e in elf.exports)
    assert {name for name, weak in elf.undefined if not weak} == {
        "__fentry__", "klp_enable_patch", "kfree", "param_ops_int", "param_ops_bool", "param_ops_short",
        "param_array_ops", "param_ops_string", "param_ops_charp",
    }  # fmt: skip


def test_functions_have_symbols_and_call_sites() -> None:
    elf = ElfModule.parse(module(FULL))
    functions = {s.name: s for s in elf.functions()}
    assert {"livepatch_cmdline_proc_show", "pre_patch_vmlinux", "post_unpatch_busy", "init_module"} <= functions.keys()
    assert sum(s.name == "twice" for s in elf.functions()) == 2
    sites = {(site.section, site.offset) for site in elf.ftrace_sites}
    traced = {s.name for s in elf.functions() if (s.shndx, s.value + 4) in sites}
    assert {s.name for s in elf.functions()} - traced == {"quiet"}
    init = functions["init_module"]
    this = elf.pointers(elf.this_module_section)
    assert this[C.MODULE_INIT_OFFSET].symbol == "init_module"
    assert this[C.MODULE_INIT_OFFSET].offset == init.value
    assert this[C.MODULE_EXIT_OFFSET].symbol == "cleanup_module"


def test_the_patch_is_there_as_in_a_real_module() -> None:
    elf = ElfModule.parse(module(FULL))
    patch = klp.find_patch(elf)
    assert patch is not None
    assert patch.replace
    assert patch.states == [(1, 2), (77, 0)]
    assert [o.name for o in patch.objects] == [None, "busy"]
    assert [(f.old_name, f.sympos, f.new_symbol) for o in patch.objects for f in o.funcs] == [
        ("cmdline_proc_show", 0, "livepatch_cmdline_proc_show"),
        ("busy_func", 2, "livepatch_busy_func"),
    ]
    assert [sorted(o.callbacks) for o in patch.objects] == [["pre_patch"], ["post_unpatch"]]
    (section,) = klp.sections_of(elf, None)
    asked = []

    def find(objname: str | None, name: str, sympos: int) -> int:
        asked.append((objname, name, sympos))
        return 0x1000

    assert set(klp.resolve_symbols(elf, section, find).values()) == {0x1000}
    assert asked == [(None, "foo", 0), (None, "bar", 2)]


def test_plain_module_has_no_patch() -> None:
    elf = ElfModule.parse(module(PLAIN))
    assert not elf.is_livepatch
    assert klp.find_patch(elf) is None
    assert elf.undefined == [("__fentry__", False)]


def test_parameter_decides_replace_at_run_time() -> None:
    text = 'name = "m"\nreplace = "$r"\n[[params]]\nname = "r"\ntype = "bool"\n[[objects]]\nname = "other"\n'
    patch = klp.find_patch(ElfModule.parse(module(text)))
    assert patch is not None
    assert not patch.replace


def test_vermagic_and_modinfo_may_be_chosen() -> None:
    spec = parse_toml(PLAIN)
    elf = ElfModule.parse(write_module(spec, release="5.1.0", flags="SMP mod_unload"))
    assert elf.info("vermagic") == "5.1.0 SMP mod_unload "
    elf = ElfModule.parse(module(PLAIN + 'release = "6.1.9"\n'))
    assert elf.info("vermagic") == "6.1.9 SMP preempt mod_unload modversions "
    elf = ElfModule.parse(
        module(
            PLAIN + 'vermagic = "x"\nintree = true\nomit_modinfo = ["license"]\nmodinfo = {test = "Y", retpoline = "N"}'
        )
    )
    assert elf.info("vermagic") == "x"
    assert elf.info("license") is None
    assert (elf.info("intree"), elf.info("test"), elf.info("retpoline")) == ("Y", "Y", "N")


def test_same_spec_same_bytes() -> None:
    assert module(FULL) == module(FULL)


def test_pyelftools_agrees(full: Path) -> None:
    elf = ElfModule.load(full)
    with full.open("rb") as file:
        other = ELFFile(file)
        assert other["e_type"] == "ET_REL"
        assert [s.name for s in other.iter_sections()] == [s.name for s in elf.sections]
        table = other.get_section_by_name(".symtab")
        assert [(s.name, s["st_value"], s["st_size"]) for s in table.iter_symbols()] == [
            (s.name, s.value, s.size) for s in elf.symbols
        ]
        # local symbols first, as the table's header says
        first_global = table["sh_info"]
        binds = [s["st_info"]["bind"] for s in table.iter_symbols()]
        assert set(binds[:first_global]) == {"STB_LOCAL"}
        assert "STB_LOCAL" not in binds[first_global:]


def test_binutils_accept(full: Path) -> None:
    output("readelf", "-aW", full)
    assert ".klp.rela.vmlinux..data RELA" in output("readelf", "-SW", full)
    assert "AIo" in output("readelf", "-SW", full)
    assert "OS [0xff20] .klp.sym.vmlinux.bar,2" in output("readelf", "-sW", full)
    assert "T offered\n" in output("nm", full)
    assert "<livepatch_cmdline_proc_show>" in output("objdump", "-d", full)
    assert "relocatable, x86-64" in output("file", full)


def test_strip_leaves_a_module(tmp_path: Path) -> None:
    # strip drops the mark of livepatch symbols, so a module that has some may not be stripped
    path = tmp_path / "m.ko"
    path.write_bytes(module(FULL.replace('uses = ["foo", "bar,2"]', "")))
    elf, bare = ElfModule.load(path), ElfModule.load(strip(path))
    assert len(bare.symbols) < len(elf.symbols)
    assert bare.spec == elf.spec
    assert bare.params[0].default == "-5"
    before, after = klp.find_patch(elf), klp.find_patch(bare)
    assert before is not None
    assert after is not None
    assert [(o.name, [f[:2] for f in o.funcs]) for o in after.objects] == [
        (o.name, [f[:2] for f in o.funcs]) for o in before.objects
    ]
    assert [f.new_symbol for o in after.objects for f in o.funcs] == [None, None]
    assert after.states == before.states


def test_kmod_accepts(full: Path) -> None:
    assert output("modinfo", "-F", "name", full) == "full\n"
    assert output("modinfo", "-F", "livepatch", full) == "Y\n"
    assert output("modinfo", "-F", "depends", full) == "other\n"
    assert "text: (string)" in output("modinfo", "-F", "parm", full)
    assert "list: (array of short)" in output("modinfo", "-F", "parm", full)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_become_modules(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    target = tmp_path / "x.ko"
    target.write_bytes(write_module(spec))
    output("readelf", "-aW", target)
    elf = ElfModule.load(target)
    assert elf.name == spec.name
    assert (klp.find_patch(elf) is not None) == spec.is_livepatch


def test_many_functions() -> None:
    functions = "".join(f'[[objects.functions]]\nold_name = "f{i}"\n' for i in range(1000))
    patch = klp.find_patch(ElfModule.parse(module(f'name = "many"\n[[objects]]\n{functions}')))
    assert patch is not None
    assert [f.old_name for f in patch.objects[0].funcs] == [f"f{i}" for i in range(1000)]
