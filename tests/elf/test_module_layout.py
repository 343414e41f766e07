"""Where sections come to lie, how large a module is, and which symbols kallsyms keeps."""

from __future__ import annotations

import errno
import struct

import pytest
from elf_support import C_MODULE, FULL, PLAIN, compile_module, module, with_section

from klpfs.elf import layout as L
from klpfs.elf.reader import ElfModule, ModuleFormatError

MORE = r"""
int in_init_text(void);
__attribute__((section(".init.text"))) int in_init_text(void) { return 3; }
__attribute__((section(".init.data"), used)) static int in_init_data = 4;
__attribute__((section(".data..ro_after_init"), used)) static int sealed = 5;
__attribute__((section(".data..percpu"), used)) static int for_each_cpu = 6;
static int zeros[5000];
int *zeros_address(void);
int *zeros_address(void) { return zeros; }
"""


@pytest.fixture(scope="module")
def elf(tmp_path_factory: pytest.TempPathFactory) -> ElfModule:
    return ElfModule.load(compile_module(C_MODULE + MORE, tmp_path_factory.mktemp("layout") / "m.ko"))


def test_types_of_sections(elf: ElfModule) -> None:
    layout = L.lay_out(elf)
    kinds = {elf.sections[number].name: L.TYPE_NAMES[place.type] for number, place in layout.places.items()}
    assert {name: kinds.get(name) for name in (
        ".text", ".data", ".bss", "__param", ".init.text", ".init.data", ".data..ro_after_init", ".data..percpu",
        ".modinfo", "__versions", ".debug_info", ".symtab", ".gnu.linkonce.this_module",
    )} == {
        ".text": "text",
        ".data": "data",
        ".bss": "data",
        "__param": "rodata" if not elf.any_section("__param").flags & 1 else "data",  # type: ignore[union-attr]
        ".init.text": "init_text",
        ".init.data": "init_data",
        ".data..ro_after_init": "ro_after_init",
        ".data..percpu": None,
        ".modinfo": None,
        "__versions": None,
        ".debug_info": None,
        ".symtab": "init_data",
        ".gnu.linkonce.this_module": "data",
    }  # fmt: skip


def test_sizes_are_pages(elf: ElfModule) -> None:
    layout = L.lay_out(elf)
    assert all(size % L.PAGE_SIZE == 0 and size for size in layout.sizes.values())
    assert layout.core_size == sum(layout.sizes.get(kind, 0) for kind in L.CORE_TYPES)
    assert layout.sizes[L.DATA] >= 5 * L.PAGE_SIZE  # the zeros take memory, too
    assert layout.init_size >= 2 * L.PAGE_SIZE


def test_sections_do_not_overlap(elf: ElfModule) -> None:
    layout = L.lay_out(elf)
    for kind, size in layout.sizes.items():
        end = 0
        for number, place in sorted(layout.places.items(), key=lambda item: item[1].offset):
            if place.type == kind and elf.sections[number].size:
                assert place.offset >= end
                assert place.offset % max(elf.sections[number].align, 1) == 0
                end = place.offset + elf.sections[number].size
        assert end <= size


def test_addresses(elf: ElfModule) -> None:
    layout = L.lay_out(elf)
    bases = {kind: 0x1000000 * (kind + 1) for kind in range(7)}
    text = elf.section(".text")
    assert text is not None
    assert layout.address(text.number, bases) == bases[L.TEXT] + layout.places[text.number].offset
    modinfo = elf.modinfo_section
    assert modinfo is not None
    assert layout.address(modinfo.number, bases) is None


def test_sections_in_sysfs() -> None:
    elf = ElfModule.parse(module(PLAIN))
    names = [section.name for section in L.loaded_sections(elf, L.lay_out(elf))]
    assert names == [
        ".text", "__mcount_loc", ".note.gnu.build-id", ".gnu.linkonce.this_module", ".symtab", ".strtab",
    ]  # fmt: skip


def test_plain_module_is_three_pages_and_livepatches_keep_all_symbols() -> None:
    plain = ElfModule.parse(module(PLAIN))
    layout = L.lay_out(plain)
    assert layout.core_size == 3 * L.PAGE_SIZE
    names = {symbol.name: symbol.type for symbol in L.kallsyms(plain, layout)}
    assert names == {
        "plain_init": "t", "plain_exit": "t", "init_module": "t", "cleanup_module": "t", "__this_module": "d",
    }  # fmt: skip
    during_init = {symbol.name for symbol in L.kallsyms(plain, layout, core=False)}
    assert during_init > names.keys()
    assert "__fentry__" in during_init
    full = ElfModule.parse(module(FULL))
    kept = {symbol.name: symbol.type for symbol in L.kallsyms(full, L.lay_out(full))}
    assert kept["klp_enable_patch"] == "U"
    assert kept[".klp.sym.vmlinux.foo,0"] == "?"
    assert kept["patch"] == "d"
    assert kept["__param_ret"] == "r"
    assert kept["full.toml"] == "a"


def test_letters(elf: ElfModule) -> None:
    letters = {symbol.name: L.symbol_type(elf, symbol) for symbol in elf.symbols if symbol.name}
    assert letters["zeros"] == "b"
    assert letters["sealed"] == "d"
    assert letters["for_each_cpu"] == "a"
    assert letters["optional"] == "w"
    assert letters["init_module"] == "t"


def test_writable_code_is_refused() -> None:
    data = with_section(module(PLAIN), 1, flags=7)
    with pytest.raises(ModuleFormatError) as info:
        L.lay_out(ElfModule.parse(data))
    assert info.value.errno == errno.ENOEXEC
    assert info.value.log == "plain: section .text (index 1) has invalid WRITE|EXEC flags"


def test_huge_section_does_not_fit() -> None:
    data = with_section(module(PLAIN), 1, type=8, size=1 << 40)
    with pytest.raises(ModuleFormatError) as info:
        L.lay_out(ElfModule.parse(data))
    assert info.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    ("shndx", "log", "level"),
    [
        (0xFFF2, "plain: please compile with -fno-common", "warning"),
        (200, "plain: Symbol plain_exit has an invalid section index 200 (max {max})", "err"),
        (0xFFFF, "plain: Symbol plain_exit has an invalid section index 65535 (max {max})", "err"),
    ],
)
def test_symbols_that_cannot_be_placed(shndx: int, log: str, level: str) -> None:
    data = bytearray(module(PLAIN))
    elf = ElfModule.parse(bytes(data))
    L.check_symbols(elf)
    symbol = next(s for s in elf.symbols if s.name == "plain_exit")
    struct.pack_into("<H", data, elf.symtab.offset + 24 * symbol.number + 6, shndx)
    with pytest.raises(ModuleFormatError) as info:
        L.check_symbols(ElfModule.parse(bytes(data)))
    assert info.value.log == log.format(max=len(elf.sections) - 1)
    assert info.value.level == level
