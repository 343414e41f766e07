"""Symbols by name, position and address (kernel/kallsyms.c, kernel/module/kallsyms.c)."""

from __future__ import annotations

import pytest
from conftest import machine
from core_support import Run, add_module, livepatch_lines
from hypothesis import given
from hypothesis import strategies as st

from klpfs.kernel.kallsyms import DictTable, Kallsyms, Resolved, SymInfo

BASE = 0xFFFFFFFFC0000000


def module(*symbols: tuple[str, int, int, str]) -> Kallsyms:
    """Symbols of one module, ``target``, at offsets of its base."""
    kallsyms = Kallsyms(DictTable(["once"]))
    kallsyms.add_module("target", [SymInfo(name, BASE + at, size, kind) for name, at, size, kind in symbols])
    return kallsyms


@pytest.mark.parametrize(
    ("name", "sympos", "expected"),
    [
        ("once", 0, 0),
        ("once", 1, 0),
        ("once", 2, "symbol position 2 for symbol 'once' in object 'vmlinux' not found"),
        ("twice", 0, "unresolvable ambiguity for symbol 'twice' in object '(null)'"),
        ("twice", 1, 0),
        ("twice", 2, 1),
        ("twice", 3, "symbol position 3 for symbol 'twice' in object 'vmlinux' not found"),
        ("nosuch", 0, "symbol 'nosuch' not found in symbol table"),
        ("nosuch", 1, "symbol 'nosuch' not found in symbol table"),
    ],
)
def test_positions_in_vmlinux(run: Run, name: str, sympos: int, expected: int | str) -> None:
    async def main() -> None:
        async with machine() as m:
            if isinstance(expected, int):
                found = m.livepatch.find_object_symbol(None, name, sympos)
                assert found == m.kallsyms.on_each_match_symbol(name)[expected]
                assert livepatch_lines(m) == []
            else:
                with pytest.raises(OSError, match=name):
                    m.livepatch.find_object_symbol(None, name, sympos)
                assert livepatch_lines(m) == [expected]

    run(main)


def test_positions_in_a_module_follow_its_symbol_table(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = add_module(m, "target")
            # not in the order of the addresses
            symbols = [SymInfo("f", mod.base + at, 16, kind) for at, kind in ((64, "t"), (0, "t"), (32, "d"))]
            m.kallsyms.add_module("target", symbols)
            found = [m.livepatch.find_object_symbol("target", "f", n) for n in (1, 2, 3)]
            assert found == [mod.base + 64, mod.base, mod.base + 32]
            for sympos in (0, 4):
                with pytest.raises(OSError, match="target"):
                    m.livepatch.find_object_symbol("target", "f", sympos)
            assert livepatch_lines(m) == [
                "unresolvable ambiguity for symbol 'f' in object 'target'",
                "symbol position 4 for symbol 'f' in object 'target' not found",
            ]
            with pytest.raises(OSError, match="absent"):
                m.livepatch.find_object_symbol("absent", "f", 1)

    run(main)


@given(st.integers(0, 6), st.integers(0, 8))
def test_any_position_among_any_number(count: int, sympos: int) -> None:
    kallsyms = Kallsyms(DictTable(["before", *["f"] * count, "after"]))
    found = kallsyms.on_each_match_symbol("f")
    assert len(found) == count
    assert found == sorted(found)


def test_look_ups_by_address_in_vmlinux() -> None:
    kallsyms = Kallsyms(DictTable(["first", "second"]))
    base = DictTable.BASE
    assert kallsyms.lookup(base) == Resolved("first", None, 0, 64)
    assert str(kallsyms.lookup(base + 65)) == "second+0x1/0x40"
    assert kallsyms.lookup_size_offset(base + 63) == (64, 63)
    for outside in (base - 1, base + 128, 0):
        assert kallsyms.lookup(outside) is None
        assert kallsyms.lookup_size_offset(outside) is None


def test_a_symbol_of_a_module_reaches_to_the_next() -> None:
    kallsyms = module(("a", 0, 10, "t"), ("b", 32, 10, "t"), ("data", 8192, 8, "d"))
    assert str(kallsyms.lookup(BASE + 31)) == "a+0x1f/0x20 [target]"
    # the last one to the end of the text, whose size is a multiple of a page
    assert str(kallsyms.lookup(BASE + 4095)) == "b+0xfdf/0xfe0 [target]"
    assert kallsyms.lookup(BASE + 4096) is None
    assert kallsyms.lookup(BASE - 1) is None


def test_labels_of_the_assembler_are_not_found() -> None:
    kallsyms = module(("a", 0, 32, "t"), (".L5", 4, 0, "t"), ("$x", 8, 0, "t"), ("$d.3", 9, 0, "t"), ("", 10, 0, "t"))
    assert str(kallsyms.lookup(BASE + 12)) == "a+0xc/0x1000 [target]"
    kallsyms = module(("a", 0, 32, "t"), ("$ax", 8, 0, "t"))
    assert str(kallsyms.lookup(BASE + 12)) == "$ax+0x4/0xff8 [target]"


def test_of_aliases_the_first_in_the_table_is_named() -> None:
    kallsyms = module(("init_module", 0, 32, "t"), ("target_init", 0, 32, "t"), ("b", 32, 16, "t"))
    assert str(kallsyms.lookup(BASE + 1)) == "init_module+0x1/0x20 [target]"


def test_several_modules() -> None:
    kallsyms = module(("a", 0, 16, "t"))
    kallsyms.add_module("other", [SymInfo("z", BASE + 0x5000, 16, "T")])
    kallsyms.add_module("data_only", [SymInfo("d", BASE + 0x9000, 16, "d")])
    assert str(kallsyms.lookup(BASE + 0x5001)) == "z+0x1/0x1000 [other]"
    assert str(kallsyms.lookup(BASE)) == "a+0x0/0x1000 [target]"
    assert kallsyms.lookup(BASE + 0x9000) is None, "data are not looked for"
    kallsyms.remove_module("target")
    assert kallsyms.lookup(BASE) is None
    assert kallsyms.module_on_each_symbol("target", "a") == []
    kallsyms.remove_module("target")
    kallsyms.remove_module("data_only")
    kallsyms.add_module("other", [SymInfo("y", BASE, 16, "T")])
    assert kallsyms.lookup(BASE + 0x5001) is None, "the new symbols take the place of the old"
    assert [s.name for s in kallsyms.symbols_of("other")] == ["y"]
    assert kallsyms.symbols_of("nosuch") == []
