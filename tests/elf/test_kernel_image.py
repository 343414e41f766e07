"""Kernel images: compression, kallsyms, exports, call sites and types; text files of symbols."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_support import (
    EXPORTS,
    KLP_STRUCTS,
    RELEASE,
    SITES,
    SYMBOLS,
    TEXT,
    btf,
    bzimage,
    compressed,
    kallsyms,
    vmlinux,
)

from klpfs.elf.layouts import StructLayout
from klpfs.elf.symbols import ListTable
from klpfs.elf.vmlinux import Btf, ImageError, KernelImage, decompress, klp_layouts, read_symbol_file

IMAGE = vmlinux()


@pytest.mark.parametrize("method", ["gzip", "xz", "lzma", "bzip2", "zstd", "lz4"])
def test_every_compression(method: str, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(compressed(IMAGE, method)))
    image = KernelImage.load(path)
    assert image.data == IMAGE
    assert image.release == RELEASE


@pytest.mark.parametrize("method", ["gzip", "xz", "bzip2", "zstd", "lz4"])
def test_broken_compression(method: str) -> None:
    payload = bytearray(compressed(IMAGE, method))
    payload[len(payload) // 2 :] = os.urandom(8) * 8
    with pytest.raises(ImageError, match="dir/vmlinuz: "):
        decompress(bzimage(bytes(payload)), "dir/vmlinuz")


@pytest.mark.parametrize("order", ["6.4", "6.2", "6.0"])
def test_kallsyms(order: str) -> None:
    image = KernelImage(vmlinux(kallsyms(SYMBOLS, order=order)))
    assert [tuple(symbol) for symbol in image.symbols] == SYMBOLS
    assert image.by_name["twice"] == TEXT + 0x8060


def test_kallsyms_without_absolute_percpu_symbols() -> None:
    symbols = [symbol for symbol in SYMBOLS if symbol[0] >= TEXT]
    image = KernelImage(vmlinux(kallsyms(symbols, percpu=False)))
    assert [tuple(symbol) for symbol in image.symbols] == symbols


def test_no_kallsyms() -> None:
    with pytest.raises(ImageError, match="no kallsyms token table"):
        _ = KernelImage(vmlinux(b"nothing of the sort")).symbols


def test_exports_and_call_sites() -> None:
    image = KernelImage(IMAGE)
    assert {(e.name, e.gpl, e.crc) for e in image.exports} == set(EXPORTS)
    assert {e.name: e.address for e in image.exports} == {name: image.by_name[name] for name, *_ in EXPORTS}
    assert image.ftrace_sites == sorted(SITES)


def test_btf() -> None:
    image = KernelImage(IMAGE)
    assert image.btf is not None
    assert image.btf.struct("klp_state") == StructLayout(24, {"id": 0, "version": 8})
    assert image.btf.struct("int") is None
    assert image.btf.struct("nothing") is None
    layouts = klp_layouts(image.btf)
    assert layouts is not None
    assert layouts["klp_patch"].members["replace"] == 32
    lacking = {name: layout for name, layout in KLP_STRUCTS.items() if name != "klp_func"}
    assert klp_layouts(Btf(btf(lacking))) is None


@pytest.mark.parametrize("data", [b"", bytes(24), btf({})[:30]])
def test_broken_btf(data: bytes) -> None:
    with pytest.raises(ImageError, match="vmlinux"):
        Btf(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "neither bzImage nor vmlinux"),
        (b"GIF89a", r"unknown compression \(47494638\)"),
        (bzimage(b"????"), r"unknown compression \(3f3f3f3f\)"),
        (bzimage(compressed(b"text", "gzip")), "the compressed data is no ELF file"),
        (bytes(0x202) + b"HdrS" + b"\1\2" + bytes(100), "too old"),
    ],
)
def test_files_that_are_no_kernel(data: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as info:
        decompress(data)
    assert info.value.errno == errno.ENOEXEC


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(IMAGE) - 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_changed_images_give_answers_or_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(IMAGE)
    for place, value in changes:
        data[place] = value
    refusal = None
    try:
        image = KernelImage(bytes(data))
        assert len(image.symbols) >= 0
        assert image.exports is not None
        assert image.ftrace_sites is not None
        assert image.btf is None or klp_layouts(image.btf) is not False
    except ImageError as exc:
        refusal = exc
    assert refusal is None or refusal.strerror


def test_system_map(tmp_path: Path) -> None:
    path = tmp_path / "System.map"
    path.write_text("".join(f"{address:016x} {kind} {name}\n" for address, kind, name in SYMBOLS))
    assert [tuple(symbol) for symbol in read_symbol_file(path)] == SYMBOLS
    table = ListTable.from_file(path)
    assert [entry.address for entry in table.lookup("twice")] == [TEXT + 0x8060, TEXT + 0x8100]
    assert table.has_ftrace(TEXT + 0x8010), "nothing is known, so everything is traceable"
    assert table.exported("klp_enable_patch") == (None, False)
    assert table.exported("cmdline_proc_show") is None


def test_proc_kallsyms_with_hidden_addresses(tmp_path: Path) -> None:
    path = tmp_path / "kallsyms"
    path.write_text("".join(f"{0:016x} {kind} {name}\n" for _, kind, name in SYMBOLS) + f"{0:016x} t f\t[module]\n")
    symbols = read_symbol_file(path)
    assert [symbol.name for symbol in symbols] == [name for _, _, name in SYMBOLS]
    assert [symbol.address for symbol in symbols] == sorted({symbol.address for symbol in symbols})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 symbols"),
        ("ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n", "1 symbols"),
        ("0 T a\nhello\n", "line 2: expected 'address type name'"),
        ("0 T a\n0 TT b\n", "line 2: 'TT' is no symbol type"),
        ("0 T " + "a" * 5000, "line 1: too long"),
    ],
)
def test_malformed_symbol_files(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(ImageError, match=problem):
        read_symbol_file(path)
