"""printk's formats and sscanf, over a little memory."""

from __future__ import annotations

import struct

import pytest

from klpfs.cpu.sandbox.fmt import FormatEnv, UnknownFormat, hash_pointer, vformat, vscan

BASE = 0xFFFF888000001000


class FakeMemory:
    """A page at BASE."""

    def __init__(self) -> None:
        self.page = bytearray(4096)
        self.used = 0

    def put(self, data: bytes) -> int:
        """The address of *data*."""
        at, self.used = self.used, self.used + -(-len(data) // 8) * 8
        self.page[at : at + len(data)] = data
        return BASE + at

    def read(self, addr: int, size: int) -> bytes:
        assert BASE <= addr <= BASE + 4096 - size, hex(addr)
        return bytes(self.page[addr - BASE : addr - BASE + size])

    def load(self, addr: int, size: int = 8) -> int:
        return int.from_bytes(self.read(addr, size), "little")

    def cstring(self, addr: int, limit: int = 4096) -> bytes:
        return self.read(addr, min(limit, BASE + 4096 - addr)).split(b"\0")[0]


class Values:
    """Arguments given as Python values: integers, or bytes that are put into memory."""

    def __init__(self, memory: FakeMemory, values: tuple[int | bytes, ...]) -> None:
        self._rest = [memory.put(v + b"\0") if isinstance(v, bytes) else v & (1 << 64) - 1 for v in values]

    def next(self) -> int:
        return self._rest.pop(0)


def env(memory: FakeMemory) -> FormatEnv:
    return FormatEnv(
        memory,
        b"key",
        lambda addr, offset, back: f"sym{'+0x%x/0x10' % (addr & 15) if offset else ''}{'!' if back else ''}",
    )


def fmt(text: str, *values: int | bytes) -> str:
    memory = FakeMemory()
    return vformat(env(memory), text.encode(), Values(memory, values)).decode("latin-1")


@pytest.mark.parametrize(
    ("text", "values", "wanted"),
    [
        ("plain 100%%", (), "plain 100%"),
        ("%d %i %u", (-1, 5, -1), "-1 5 4294967295"),
        ("%ld %lu %lld %zu", (-1, -1, -2, 7), "-1 18446744073709551615 -2 7"),
        ("%hhd %hd %hhu", (0xFF, 0xFFFF, 0x1FF), "-1 -1 255"),
        ("%x %X %#x %o %#o", (255, 255, 255, 8, 8), "ff FF 0xff 10 010"),
        ("[%5d] [%-5d] [%05d] [%+d] [% d]", (42, 42, 42, 42, 42), "[   42] [42   ] [00042] [+42] [ 42]"),
        ("[%05d] [%#06x] [%.3d] [%6.3d]", (-42, 0xAB, 7, 7), "[-0042] [0x00ab] [007] [   007]"),
        ("[%*d] [%-*d] [%*d]", (4, 1, 4, 2, -4, 3), "[   1] [2   ] [3   ]"),
        ("[%s] [%6s] [%-6s] [%.2s]", (b"abc", b"abc", b"abc", b"abc"), "[abc] [   abc] [abc   ] [ab]"),
        ("%s %s %s", (0, 5, -14), "(null) (efault) (efault)"),
        ("[%c%c] [%3c]", (ord("a"), ord("b"), ord("c")), "[ab] [  c]"),
        ("%px %px", (0xFFFF888000001234, 0), "ffff888000001234 0000000000000000"),
        ("%p %p", (0, -12), "0000000000000000 fffffffffffffff4"),
        ("%pe %pe", (-12, -4095), "-ENOMEM -4095"),
        ("%pS %ps %pB", (0x1003, 0x1003, 0x1003), "sym+0x3/0x10 sym sym+0x3/0x10!"),
        ("%phC %*ph %*phN", (b"\x01\x02", 3, b"\x0a\x0b\x0c", 2, b"\xde\xad"), "01 0a 0b 0c dead"),
        ("%pM %pMR %pm", (bytes(range(6)),) * 3, "00:01:02:03:04:05 05:04:03:02:01:00 000102030405"),
        ("%pI4 %pi4 %pI4h", (bytes([192, 168, 0, 1]),) * 3, "192.168.0.1 192.168.000.001 1.0.168.192"),
        ("%pI6c", (bytes.fromhex("20010db8" + "0" * 23 + "1"),), "2001:db8::1"),
        ("%pUb", (bytes(range(16)),), "00010203-0405-0607-0809-0a0b0c0d0e0f"),
        ("%pGg|%pGg|%pGg", (struct.pack("<I", 0xCC0), struct.pack("<I", 0x820), struct.pack("<I", 0xDC0)),
         "GFP_KERNEL|GFP_ATOMIC|GFP_KERNEL|__GFP_ZERO"),
        ("%*pb %*pbl", (12, struct.pack("<Q", 0x0F3), 12, struct.pack("<Q", 0x0F3)), "0f3 0-1,4-7"),
        ("%*pE", (6, b'a\n"\x01b\\'), 'a\\n\\"\\001b\\\\'),
        ("%%%d%%", (1,), "%1%"),
        ("%", (), ""),
    ],
)  # fmt: skip
def test_conversions(text: str, values: tuple[int | bytes, ...], wanted: str) -> None:
    assert fmt(text, *values) == wanted


def test_pointers_are_hashed() -> None:
    shown = fmt("%p", 0xFFFF888000001234)
    assert shown == f"{hash_pointer(b'key', 0xFFFF888000001234):016x}"
    assert shown.startswith("00000000")
    assert fmt("%pK", 0xFFFF888000001234) == shown
    assert fmt("%p", 0xFFFF888000001238) != shown


def test_formats_inside_formats() -> None:
    memory = FakeMemory()
    inner = memory.put(b"<%d %s>\0")
    save = memory.put(struct.pack("<6Q", 0, 0, 0, 0, 0, 11))
    overflow = memory.put(struct.pack("<Q", memory.put(b"deep\0")))
    va_list = memory.put(struct.pack("<IIQQ", 40, 48, overflow, save))
    vaf = memory.put(struct.pack("<QQ", inner, va_list))
    assert vformat(env(memory), b"[%pV]", Values(memory, (vaf,))) == b"[<11 deep>]"


@pytest.mark.parametrize("text", ["%q", "%pR", "%y", "%pGx"])
def test_what_is_not_known_is_said(text: str) -> None:
    with pytest.raises(UnknownFormat, match="%"):
        fmt(text, BASE)


@pytest.mark.parametrize(
    ("text", "form", "wanted"),
    [
        ("12 -7 0x1f", "%d %d %x", [12, -7, 0x1F]),
        ("k=077,z", "k=%i,%c", [0o77, ord("z")]),
        ("12345", "%2d%3d", [12, 345]),
        ("1 2", "%*d %d", [2]),
        ("abc", "%d", []),
        ("5%", "%d%%%n", [5, 2]),
    ],
)
def test_scanning(text: str, form: str, wanted: list[int]) -> None:
    memory, found = FakeMemory(), []
    values = Values(memory, tuple(range(0x100, 0x200, 8)))
    vscan(memory, text.encode(), form.encode(), values, lambda addr, value, size: found.append(value))
    assert found == wanted
