"""Finding the patch in compiled modules, and the names and symbols of the livepatch module ELF format."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest
from elf_support import C_MODULE, FULL, KPATCH_MODULE, compile_module, given_modules, module, strip, with_section
from hypothesis import given
from hypothesis import strategies as st

from klpfs.elf import dwarf, klp
from klpfs.elf import layouts as C
from klpfs.elf.reader import ElfModule, ModuleFormatError


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_module(C_MODULE, tmp_path_factory.mktemp("own") / "own.ko")


@pytest.fixture(scope="module")
def kpatch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_module(KPATCH_MODULE, tmp_path_factory.mktemp("kpatch") / "kp.ko")


@pytest.mark.parametrize("stripped", [False, True])
def test_static_patch_is_found_among_decoys(own: Path, stripped: bool) -> None:
    elf = ElfModule.load(strip(own) if stripped else own)
    (patch,) = klp.find_static(elf)
    assert klp.find_patch(elf) == patch
    assert patch.replace
    assert not patch.is_kpatch
    assert patch.states == [(9, 4)]
    kernel, target = patch.objects
    assert (kernel.name, target.name) == (None, "target")
    assert [(f.old_name, f.sympos) for f in kernel.funcs] == [("cmdline_proc_show", 0), ("twice", 3)]
    assert [f.new_symbol for f in kernel.funcs] == ([None, None] if stripped else ["new_show", "pre_patch"])
    assert list(kernel.callbacks) == ["pre_patch"]
    assert elf.function_at(kernel.callbacks["pre_patch"]) == (None if stripped else "pre_patch")
    assert target.funcs == []
    assert target.callbacks == {}


@pytest.mark.parametrize("stripped", [False, True])
def test_kpatch_builds_its_patch_from_tables(kpatch: Path, stripped: bool) -> None:
    patch = klp.find_patch(ElfModule.load(strip(kpatch) if stripped else kpatch))
    assert patch is not None
    assert patch.is_kpatch
    # its hook puts each at the head of a list, so the last one comes first
    assert [o.name for o in patch.objects] == ["xfs", "ext4", None]
    assert [[(f.old_name, f.sympos) for f in o.funcs] for o in patch.objects] == [
        [],
        [("second", 0)],
        [("third", 2), ("first", 1)],
    ]
    assert [list(o.callbacks) for o in patch.objects] == [["post_unpatch"], ["pre_patch"], []]


def test_kpatch_tables_without_names(kpatch: Path) -> None:
    elf = ElfModule.load(kpatch)
    section = elf.any_section(".rela.kpatch.funcs")
    assert section is not None
    data = with_section(elf.data, section.number, type=C.SHT_PROGBITS)
    with pytest.raises(ModuleFormatError, match=r"section \.kpatch\.funcs: row 0 names no function"):
        klp.find_patch(ElfModule.parse(data))


def test_layouts_from_debug_information(own: Path, tmp_path: Path) -> None:
    layouts = dwarf.klp_layouts(ElfModule.load(own))
    assert layouts is not None
    assert layouts["klp_func"].size == 152
    assert layouts["klp_object"] == (168, layouts["klp_object"].members)
    assert layouts["klp_patch"].members["replace"] == 24
    assert dwarf.klp_layouts(ElfModule.load(strip(own))) is None
    # another layout than the table's is found and used
    other = C_MODULE.replace(
        "struct klp_object { const char *name;", "struct klp_object { long more; const char *name;"
    )
    elf = ElfModule.load(compile_module(other, tmp_path / "other.ko"))
    layouts = dwarf.klp_layouts(elf)
    assert layouts is not None
    assert layouts["klp_object"].size == 176
    patch = klp.find_patch(elf, layouts)
    assert patch is not None
    assert [o.name for o in patch.objects] == [None, "target"]


def test_broken_debug_information_is_ignored(own: Path) -> None:
    elf = ElfModule.load(own)
    for name in (".debug_info", ".debug_abbrev", ".debug_str", ".debug_line"):
        section = elf.any_section(name)
        assert section is not None
        data = bytearray(elf.data)
        for at in range(section.offset, section.offset + section.size, 7):
            data[at] ^= 0xA5
        found = dwarf.klp_layouts(ElfModule.parse(bytes(data)))
        assert found is None or C.usable(found)


def test_layouts_that_cannot_be() -> None:
    assert C.usable(C.KLP_LAYOUT)
    assert not C.usable({})
    for layout in (C.StructLayout(0, {}), C.StructLayout(8, {"mod": 0, "objs": 64, "states": 0, "replace": 0})):
        assert not C.usable({**C.KLP_LAYOUT, "klp_patch": layout})


def test_modules_have_their_patch_also_when_stripped(own: Path, tmp_path: Path) -> None:
    for path in [own, *given_modules()]:
        elf = ElfModule.load(path)
        patch = klp.find_patch(elf)
        assert (patch is not None) == elf.is_livepatch, path
        if patch is not None and not elf.livepatch_symbols:
            copy = tmp_path / path.name
            copy.write_bytes(path.read_bytes())
            again = klp.find_patch(ElfModule.load(strip(copy)))
            assert again is not None
            assert [(o.name, [f[:2] for f in o.funcs]) for o in again.objects] == [
                (o.name, [f[:2] for f in o.funcs]) for o in patch.objects
            ], path


# -- names -------------------------------------------------------------------------------------------------------------

GOOD_SYMBOLS = {
    ".klp.sym.vmlinux.snprintf,0": ("vmlinux", "snprintf", 0),
    ".klp.sym.btrfs.can_modify_feature.isra.3,12": ("btrfs", "can_modify_feature.isra.3", 12),
    ".klp.sym.a.b, 7": ("a", "b", 7),
    ".klp.sym.a.b,1trailing": ("a", "b", 1),
    f".klp.sym.{'m' * 55}.{'s' * 511},0": ("m" * 55, "s" * 511, 0),
    ".klp.sym.a.b,18446744073709551617": ("a", "b", 1),
}
BAD_SYMBOLS = [
    "snprintf", ".klp.sym.", ".klp.sym.vmlinux", ".klp.sym.vmlinux.snprintf", ".klp.sym.vmlinux.snprintf,",
    ".klp.sym.vmlinux.snprintf,x", ".klp.sym.vmlinux.,0", ".klp.sym..snprintf,0", ".klp.sym.vmlinux.snprintf,-1",
    f".klp.sym.{'m' * 56}.f,0", f".klp.sym.m.{'s' * 512},0", "x.klp.sym.vmlinux.snprintf,0",
]  # fmt: skip


@pytest.mark.parametrize(("name", "parts"), GOOD_SYMBOLS.items())
def test_symbol_names(name: str, parts: tuple[str, str, int]) -> None:
    assert klp.parse_symbol_name(name) == parts


@pytest.mark.parametrize("name", BAD_SYMBOLS)
def test_malformed_symbol_names(name: str) -> None:
    with pytest.raises(klp.KlpFormatError) as info:
        klp.parse_symbol_name(name)
    assert info.value.errno == errno.EINVAL
    assert info.value.log == f"symbol {name} has an incorrectly formatted name"


@given(st.text())
def test_any_symbol_name(name: str) -> None:
    for text in (name, ".klp.sym." + name, ".klp.sym.m." + name):
        try:
            parts = klp.parse_symbol_name(text)
        except klp.KlpFormatError:
            continue
        assert text.startswith(f".klp.sym.{parts.objname}.{parts.name},")


def test_section_names() -> None:
    assert klp.parse_section_name(".klp.rela.ext4.text.ext4_attr_store") == "ext4"
    assert klp.parse_section_name(".klp.rela.vmlinux..data") == "vmlinux"
    assert klp.parse_section_name(".klp.rela.vmlinux") == "vmlinux"
    for name in (".klp.rela.", ".klp.rela..text", ".rela.text", ""):
        with pytest.raises(klp.KlpFormatError) as info:
            klp.parse_section_name(name)
        assert info.value.log == f"section {name} has an incorrectly formatted name"


# -- sections and symbols in a module ----------------------------------------------------------------------------------

MODULES_OWN = FULL.replace('name = "busy"', 'name = "busy"\nuses = ["busy_local"]')


def find(objname: str | None, name: str, sympos: int) -> int:
    return len(name) + sympos


def test_sections_belong_to_their_object() -> None:
    elf = ElfModule.parse(module(MODULES_OWN))
    assert [s.name for s in klp.sections_of(elf, None)] == [".klp.rela.vmlinux..data"]
    assert [s.name for s in klp.sections_of(elf, "busy")] == [".klp.rela.busy..data"]
    assert klp.sections_of(elf, "other") == []
    (section,) = klp.sections_of(elf, "busy")
    resolved = klp.resolve_symbols(elf, section, find)
    assert {elf.symbols[number].name: value for number, value in resolved.items()} == {
        ".klp.sym.busy.busy_local,0": len("busy_local")
    }


def refused(data: bytes, objname: str | None) -> str:
    elf = ElfModule.parse(data)

    def resolve() -> None:
        for section in klp.sections_of(elf, objname):
            klp.resolve_symbols(elf, section, find)

    with pytest.raises(klp.KlpFormatError) as info:
        resolve()
    assert info.value.errno == errno.EINVAL
    return info.value.log


def test_unmarked_symbol_is_refused() -> None:
    data = module(MODULES_OWN)
    elf = ElfModule.parse(data)
    symbol = next(s for s in elf.livepatch_symbols if "busy" in s.name)
    out = bytearray(data)
    struct.pack_into("<H", out, elf.symtab.offset + 24 * symbol.number + 6, 0)
    assert refused(bytes(out), "busy") == f"symbol {symbol.name} is not marked as a livepatch symbol"


def test_vmlinux_symbol_in_a_modules_section_is_refused() -> None:
    data = module(MODULES_OWN).replace(b".klp.rela.vmlinux..data", b".klp.rela.vmlinuz..data")
    assert refused(data, "vmlinuz") == (
        "invalid access to vmlinux symbol 'foo' from module-specific livepatch relocation section"
    )


def test_malformed_names_are_refused() -> None:
    data = module(MODULES_OWN)
    assert refused(data.replace(b".klp.sym.vmlinux.foo,0", b".klp.sym.vmlinux.foo;0"), None) == (
        "symbol .klp.sym.vmlinux.foo;0 has an incorrectly formatted name"
    )
    # a malformed section is refused whichever object is asked for
    assert refused(data.replace(b".klp.rela.busy..data", b".klp.rola.busy..data"), None) == (
        "section .klp.rola.busy..data has an incorrectly formatted name"
    )


def test_failed_lookup_is_passed_on() -> None:
    elf = ElfModule.parse(module(FULL))

    def missing(objname: str | None, name: str, sympos: int) -> int:
        raise OSError(errno.EINVAL, f"{name} is missing")

    (section,) = klp.sections_of(elf, None)
    with pytest.raises(OSError, match="foo is missing"):
        klp.resolve_symbols(elf, section, missing)


def test_unloaded_target_is_passed_over() -> None:
    data = module(FULL)
    elf = ElfModule.parse(data)
    (section,) = klp.sections_of(elf, None)
    for target in (len(elf.sections), elf.symtab.number):
        assert klp.sections_of(ElfModule.parse(with_section(data, section.number, info=target)), None) == []
