"""The reader: the loader's refusals in the loader's words, and no input that makes it fail otherwise."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from elf_support import (
    C_MODULE,
    FULL,
    PLAIN,
    compile_module,
    everything,
    given_modules,
    module,
    strip,
    with_header,
    with_section,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from klpfs.elf.reader import MAX_RELOCS, MAX_SYMBOLS, SIGNATURE_MARKER, ElfModule, ModuleFormatError

DATA = module(FULL)
ELF = ElfModule.parse(DATA)
NUMBER = {section.name: section.number for section in ELF.sections}
COUNT = len(ELF.sections)


def refuse(data: bytes) -> ModuleFormatError:
    """The error for a module that is refused."""
    with pytest.raises(ModuleFormatError) as info:
        ElfModule.parse(data, "dir/x.ko")
    assert str(info.value.strerror).startswith("dir/x.ko: ")
    return info.value


def test_empty_file_has_an_errno_of_its_own() -> None:
    error = refuse(b"")
    assert (error.errno, error.log) == (errno.EINVAL, "")


def test_every_truncation_is_an_invalid_format() -> None:
    for size in [*range(1, 200), *range(200, len(DATA), 97), len(DATA) - 1]:
        error = refuse(DATA[:size])
        assert error.errno == errno.ENOEXEC
        assert error.log


THIS = ".gnu.linkonce.this_module"
REFUSALS = {
    "no header": (DATA[:52], "Invalid ELF header len 52"),
    "garbage": (b"not an elf" * 10, "Invalid ELF header magic: != \x7fELF"),
    "executable": (with_header(DATA, type=2), "Invalid ELF header type: 2 != 1"),
    "other machine": (with_header(DATA, machine=183), "Invalid architecture in ELF header: 183"),
    "section header size": (with_header(DATA, shentsize=40), "Invalid ELF section header size"),
    "headers beyond the end": (with_header(DATA, shoff=len(DATA)), "Invalid ELF section header overflow"),
    "too many headers": (with_header(DATA, shnum=0xFFFF), "Invalid ELF section header overflow"),
    "no headers": (
        with_header(DATA, shnum=0),
        f"Invalid ELF section name index: {COUNT - 1} || e_shstrndx ({COUNT - 1}) >= e_shnum (0)",
    ),
    "section 0": (
        with_section(DATA, 0, type=0xFFFFFFFF),
        "ELF Spec violation: section 0 type(-1)!=SH_NULL or non-zero len or addr",
    ),
    "section beyond the end": (with_section(DATA, 1, size=1 << 40), "Invalid ELF section in module (section 1 type 1)"),
    "section that wraps around": (
        with_section(DATA, 1, offset=(1 << 64) - 8, size=16),
        "Invalid ELF section in module (section 1 type 1)",
    ),
    "name table's index": (
        with_header(DATA, shstrndx=COUNT),
        f"Invalid ELF section name index: {COUNT} || e_shstrndx ({COUNT}) >= e_shnum ({COUNT})",
    ),
    "name table's type": (with_section(DATA, NUMBER[".shstrtab"], type=1), "Invalid ELF section name table type: 1"),
    "name table is empty": (with_section(DATA, NUMBER[".shstrtab"], size=0), "empty section name table"),
    "name table without end": (
        with_section(DATA, NUMBER[".shstrtab"], size=5),
        "ELF Spec violation: section name table isn't null terminated",
    ),
    "name beyond the table": (
        with_section(DATA, 1, name=1 << 20),
        "Invalid ELF section name in module (section 1 type 1)",
    ),
    "two modinfo": (
        with_section(DATA, 1, name=DATA[ELF.sections[-1].offset :].index(b".modinfo\0")),
        "Only one .modinfo section must exist.",
    ),
    "no this_module": (
        with_section(DATA, NUMBER[THIS], name=0),
        f"module full: Exactly one {THIS} section must exist.",
    ),
    "this_module without contents": (
        with_section(DATA, NUMBER[THIS], type=8),
        f"module full: {THIS} section must have a size set",
    ),
    "this_module not loaded": (
        with_section(DATA, NUMBER[THIS], flags=0),
        f"module full: {THIS} must occupy memory during process execution",
    ),
    "this_module of another kernel": (
        with_section(DATA, NUMBER[THIS], size=0x4C0),
        f"module full: {THIS} section size must match the kernel's built struct module size at run time",
    ),
    "no modinfo either": (
        with_section(with_section(DATA, NUMBER[THIS], name=0), NUMBER[".modinfo"], name=0),
        f"module (missing .modinfo section or name field): Exactly one {THIS} section must exist.",
    ),
    "no symbols": (with_section(DATA, NUMBER[".symtab"], type=1), "full: module has no symbols (stripped?)"),
    "string table's index": (
        with_section(DATA, NUMBER[".symtab"], link=200),
        f"Invalid ELF sh_link!=SHN_UNDEF(200) or (sh_link(200) >= hdr->e_shnum({COUNT})",
    ),
    "string table's type": (
        with_section(DATA, NUMBER[".symtab"], link=1),
        "Invalid ELF symbol string table type: 1",
    ),
}


@pytest.mark.parametrize(("data", "log"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_in_the_kernels_words(data: bytes, log: str) -> None:
    error = refuse(data)
    assert error.errno == errno.ENOEXEC
    assert error.log == log
    assert error.level == ("warning" if "stripped?" in log else "err")


def test_name_comes_from_struct_module() -> None:
    data = DATA.replace(b"name=full\0", b"name=fool\0")
    elf = ElfModule.parse(data)
    assert (elf.name, elf.label) == ("full", "fool")
    elf = ElfModule.parse(with_section(DATA, NUMBER[".modinfo"], name=0))
    assert (elf.name, elf.label, elf.modinfo) == ("full", "full", [])


def test_livepatch_mark_needs_its_equals_sign() -> None:
    assert ElfModule.parse(DATA.replace(b"livepatch=Y", b"livepatch=N")).is_livepatch
    assert not ElfModule.parse(DATA.replace(b"livepatch=Y", b"livepatchXY")).is_livepatch


def signed(message: bytes, head: bytes | None = None) -> bytes:
    head = head if head is not None else struct.pack(">BBBBB3sI", 0, 0, 2, 0, 0, b"\0\0\0", len(message))
    return DATA + message + head + SIGNATURE_MARKER


def test_signature_is_cut_off() -> None:
    elf = ElfModule.parse(signed(b"\x30\x03abc"))
    assert elf.signature == (5, True)
    assert elf.size == len(DATA)
    assert elf.spec == ELF.spec


def test_signature_of_another_sort_counts_as_none() -> None:
    elf = ElfModule.parse(signed(b"abc", struct.pack(">BBBBB3sI", 0, 0, 1, 0, 0, b"\0\0\0", 3)))
    assert elf.signature is not None
    assert not elf.signature.valid_format
    assert elf.notices == ["module: not signed with expected PKCS#7 message"]


@pytest.mark.parametrize(
    ("data", "log"),
    [
        (signed(b"", struct.pack(">BBBBB3sI", 0, 0, 2, 0, 0, b"\0\0\0", 1 << 31)), ""),
        (
            signed(b"\x30\0", struct.pack(">BBBBB3sI", 1, 0, 2, 0, 0, b"\0\0\0", 2)),
            "module: PKCS#7 signature info has unexpected non-zero params",
        ),
        (signed(b"\x30\x09abc"), ""),
        (b"0123456789" + SIGNATURE_MARKER, ""),
    ],
    ids=["size", "fields", "no PKCS#7", "no header"],
)
def test_broken_signatures_are_bad_messages(data: bytes, log: str) -> None:
    error = refuse(data)
    assert error.errno == errno.EBADMSG
    assert error.log == log


def test_symbol_versions_old_and_extended(tmp_path: Path) -> None:
    elf = ElfModule.load(compile_module(C_MODULE, tmp_path / "own.ko"))
    assert elf.has_versions
    assert elf.versions == {"module_layout": 0x12345678, "klp_enable_patch": 0x9ABCDEF0}
    extended = C_MODULE + (
        'static const unsigned int crcs[] __attribute__((section("__version_ext_crcs"), used)) = { 1, 0xfffffff0 };\n'
        'static const char names[] __attribute__((section("__version_ext_names"), used)) = "a\\0long_name";\n'
    )
    elf = ElfModule.load(compile_module(extended, tmp_path / "ext.ko"))
    assert elf.versions["a"] == 1
    assert elf.versions["long_name"] == 0xFFFFFFF0


def test_weak_symbols_are_told_apart(tmp_path: Path) -> None:
    elf = ElfModule.load(compile_module(C_MODULE, tmp_path / "own.ko"))
    assert ("optional", True) in elf.undefined
    assert ("klp_enable_patch", False) in elf.undefined
    assert [(p.name, p.type, p.perm, p.default) for p in elf.params] == [("level", "int", 0o644, "42")]


def test_compiled_modules_are_read_whole(tmp_path: Path) -> None:
    own = compile_module(C_MODULE, tmp_path / "own.ko")
    for path in [own, strip(own), *given_modules()]:
        everything(path.read_bytes())
        elf = ElfModule.load(path)
        assert elf.name == elf.info("name")
        assert {name for name, _ in elf.undefined} >= {"__fentry__"}
        assert elf.ftrace_sites


# -- whatever the bytes ------------------------------------------------------------------------------------------------


def survive(data: bytes) -> None:
    """Whatever the bytes: a module or an OSError, and soon."""
    start = time.monotonic()
    refusal = None
    try:
        everything(data)
    except OSError as exc:
        refusal = exc
    if refusal is not None:
        assert refusal.errno in (errno.ENOEXEC, errno.EINVAL, errno.EBADMSG, errno.ENOMEM)
        assert refusal.strerror
    assert time.monotonic() - start < 10


HEADERS = struct.unpack_from("<Q", DATA, 40)[0]
#: Places that matter more than others: the header, the section headers, tables.
PLACES = (
    st.integers(0, 63)
    | st.integers(HEADERS, len(DATA) - 1)
    | st.integers(0, len(DATA) - 1)
    | st.sampled_from(
        [
            ELF.sections[NUMBER[name]].offset + i
            for name in (
                ".symtab",
                ".rela.data",
                ".rela__param",
                "__param",
                ".data",
                ".rodata",
                ".klp.rela.vmlinux..data",
            )
            for i in range(min(ELF.sections[NUMBER[name]].size, 256))
        ]
    )
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=12))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(DATA)
    for place, value in changes:
        data[place] = value
    survive(bytes(data))


NUMBERS = st.sampled_from([0, 1, 8, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]) | st.integers(
    0, len(DATA) + 64
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, COUNT - 1),
            st.dictionaries(
                st.sampled_from(["name", "type", "flags", "offset", "size", "link", "info"]), NUMBERS, min_size=1
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_changed_section_headers(changes: list[tuple[int, dict[str, int]]]) -> None:
    data = DATA
    for number, fields in changes:
        wide = ("flags", "offset", "size")
        data = with_section(
            data, number, **{k: v & ((1 << 64) - 1 if k in wide else 0xFFFFFFFF) for k, v in fields.items()}
        )
    survive(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, len(DATA)), st.integers(0, len(DATA)))
def test_cut_and_spliced(extra: bytes, start: int, end: int) -> None:
    survive(DATA[:start] + extra + DATA[end:])


def big_module(kind: str, target: str) -> bytes:
    """A file of some 60 MB that holds as much of something as possible."""
    base = module('name = "m"\n[[params]]\nname = "p"\n[[objects]]\nuses = ["x"]\n')
    elf = ElfModule.parse(base)
    number = {s.name: s.number for s in elf.sections}
    size, start = 60 << 20, len(base)
    if kind == "symbols":  # as many symbols as fit, each with a name of its own
        count = size // 2 // 24
        body = b"".join(struct.pack("<IBBHQQ", i, 18, 0, 1, i, 1) for i in range(count)) + b"a" * (size // 2)
        data = with_section(base + body, number[".symtab"], offset=start, size=24 * count)
        return with_section(data, number[".strtab"], offset=start + 24 * count, size=size // 2)
    if kind == "allowed symbols":  # as many as are allowed
        body = b"".join(struct.pack("<IBBHQQ", 130 * i, 18, 0, 1, i, 1) for i in range(MAX_SYMBOLS))
        data = with_section(base + body, number[".symtab"], offset=start, size=len(body))
        names = (b"a" * 129 + b"\0") * (MAX_SYMBOLS + 2)
        return with_section(data + names, number[".strtab"], offset=start + len(body), size=len(names))
    if kind == "relocations":  # pointers without end
        body = b"".join(struct.pack("<QQq", 8 * i, 1 << 32 | 1, i) for i in range(size // 24))
        return with_section(base + body, number[target], offset=start, size=len(body))
    if kind == "allowed relocations":
        body = b"".join(struct.pack("<QQq", 8 * i, 1 << 32 | 1, i << 33) for i in range(MAX_RELOCS))
        return with_section(base + body + bytes(size), number[target], offset=start, size=len(body))
    if kind == "zeros":  # a table that is all zeros, or all NULs
        return with_section(base + bytes(size), number[target], offset=start, size=size)
    headers = b"".join(struct.pack("<IIQQQQIIQQ", i, 8, 2, 0, 0, 1 << 20, 0, 0, 1, 0) for i in range(60000))
    old = base[struct.unpack_from("<Q", base, 40)[0] :]
    names = b"n" * (50 << 20) + b"\0"
    data = with_header(base + old + headers + names, shoff=start, shnum=len(elf.sections) + 60000)
    return with_section(data, elf.shstrndx, offset=start + len(old) + len(headers), size=len(names))


DECODE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from elf_support import everything
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
with open(sys.argv[2], "rb") as file:
    data = file.read()
try:
    everything(data)
    print("taken")
except OSError as exc:
    print("refused:", exc)
print(time.monotonic() - start)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

BIG = [
    ("symbols", ""),
    ("allowed symbols", ""),
    ("relocations", ".rela.data"),
    ("relocations", ".klp.rela.vmlinux..data"),
    ("allowed relocations", ".rela.data"),
    ("allowed relocations", ".rela__param"),
    ("zeros", ".modinfo"),
    ("zeros", ".symtab"),
    ("zeros", "__param"),
    ("zeros", ".data"),
    ("zeros", ".strtab"),
    ("sections", ""),
]


@pytest.mark.parametrize(("kind", "target"), BIG)
def test_memory_and_time_are_bounded(kind: str, target: str, tmp_path: Path) -> None:
    """The reader takes 200 MB at most, the file's own bytes included, and some seconds."""
    path = tmp_path / "big.ko"
    path.write_bytes(big_module(kind, target))
    command = [sys.executable, "-c", DECODE, str(Path(__file__).parent), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, seconds, kilobytes = result.stdout.splitlines()
    assert answer.startswith(("taken", "refused"))
    assert float(seconds) < 20
    assert int(kilobytes) < 200 << 10


def test_too_large_a_file(tmp_path: Path) -> None:
    path = tmp_path / "huge.ko"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ModuleFormatError) as info:
        ElfModule.load(path)
    assert info.value.errno == errno.EFBIG


def test_stripped_module_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.ko"
    path.write_bytes(module(PLAIN))
    assert ElfModule.load(strip(path)).name == "plain"
