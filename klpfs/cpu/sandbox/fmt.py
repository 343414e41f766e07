"""printk's format strings, over emulated memory.

Model
    :func:`vformat` takes a format and a source of arguments and gives the whole text; callers cut it. Extensions of
    ``%p`` read what the pointer points to. A pointer is printed as a hash, as the kernel does unless
    ``no_hash_pointers``.

Source
    lib/vsprintf.c (``vsnprintf``, ``format_decode``, ``number``, ``string``, ``pointer`` and its helpers),
    include/trace/events/mmflags.h, lib/errname.c, Documentation/core-api/printk-formats.rst.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from klpfs.cpu.layout import PAGE_SIZE, U64

__all__ = ["Args", "FormatEnv", "UnknownFormat", "VaList", "vformat", "vscan"]

_MAX_ERRNO = 4095
_MAX_OUTPUT = 1 << 20


class UnknownFormat(Exception):
    """A conversion that is not emulated; *args[0]* names it."""


class Args(Protocol):
    """Where the arguments of a variadic call come from."""

    def next(self) -> int:
        """The next one, as an unsigned 64-bit integer."""


class Memory(Protocol):
    """Emulated memory; every access raises for a bad address."""

    def read(self, addr: int, size: int) -> bytes: ...
    def load(self, addr: int, size: int = 8) -> int: ...
    def cstring(self, addr: int, limit: int = ...) -> bytes: ...


class VaList:
    """``va_list`` of the System V ABI, at an address: register save area first, then the overflow area."""

    def __init__(self, mem: Memory, addr: int) -> None:
        self._mem = mem
        self._gp = mem.load(addr, 4)
        self._overflow = mem.load(addr + 8)
        self._save = mem.load(addr + 16)

    def next(self) -> int:
        """The next argument."""
        if self._gp < 48:
            value = self._mem.load(self._save + self._gp)
            self._gp += 8
            return value
        value = self._mem.load(self._overflow)
        self._overflow += 8
        return value


@dataclass(slots=True)
class FormatEnv:
    """What conversions need: memory, the key of pointer hashes, and names of addresses (``name+0x1/0x2 [mod]``)."""

    mem: Memory
    hash_key: bytes
    symbol: Callable[[int, bool, bool], str]
    """Of an address: with the offset or without; of a return address (looks one byte before)."""


@dataclass(slots=True)
class _Spec:
    left: bool = False
    plus: bool = False
    space: bool = False
    special: bool = False
    zero: bool = False
    width: int = -1
    precision: int = -1
    bits: int = 32
    conversion: str = ""
    suffix: str = field(default="")


_GFP_NAMES = (
    (0x3CA20, "GFP_TRANSHUGE_NONE"),  # never matched: keeps the table's order evident
    (0x152CCA, "GFP_HIGHUSER_MOVABLE"),
    (0x100CC2, "GFP_HIGHUSER"),
    (0x100CC0, "GFP_USER"),
    (0x400CC0, "GFP_KERNEL_ACCOUNT"),
    (0xCC0, "GFP_KERNEL"),
    (0xC40, "GFP_NOFS"),
    (0x820, "GFP_ATOMIC"),
    (0xC00, "GFP_NOIO"),
    (0x2800, "GFP_NOWAIT"),
    (0x1, "GFP_DMA"),
    (0x2, "__GFP_HIGHMEM"),
    (0x4, "GFP_DMA32"),
    (0x8, "__GFP_MOVABLE"),
    (0x10, "__GFP_RECLAIMABLE"),
    (0x20, "__GFP_HIGH"),
    (0x40, "__GFP_IO"),
    (0x80, "__GFP_FS"),
    (0x100, "__GFP_ZERO"),
    (0x400, "__GFP_DIRECT_RECLAIM"),
    (0x800, "__GFP_KSWAPD_RECLAIM"),
    (0x1000, "__GFP_WRITE"),
    (0x2000, "__GFP_NOWARN"),
    (0x4000, "__GFP_RETRY_MAYFAIL"),
    (0x8000, "__GFP_NOFAIL"),
    (0x10000, "__GFP_NORETRY"),
    (0x20000, "__GFP_MEMALLOC"),
    (0x40000, "__GFP_COMP"),
    (0x80000, "__GFP_NOMEMALLOC"),
    (0x100000, "__GFP_HARDWALL"),
    (0x200000, "__GFP_THISNODE"),
    (0x400000, "__GFP_ACCOUNT"),
    (0x800000, "__GFP_ZEROTAGS"),
)


def _gfp_flags(value: int) -> str:
    names = []
    for mask, name in _GFP_NAMES[1:]:
        if value & mask == mask:
            names.append(name)
            value &= ~mask
    if value:
        names.append(f"{value:#x}")
    return "|".join(names)


def _number(spec: _Spec, value: int, base: int, *, signed: bool, upper: bool = False) -> bytes:
    sign = ""
    if signed:
        if value < 0:
            sign, value = "-", -value
        elif spec.plus:
            sign = "+"
        elif spec.space:
            sign = " "
    digits = {8: f"{value:o}", 10: f"{value}", 16: f"{value:x}"}[base]
    if upper:
        digits = digits.upper()
    prefix = ""
    if spec.special and base != 10:
        # number() drops the prefix of an octal zero only
        prefix = ("0X" if upper else "0x") if base == 16 else ("0" if value else "")
    if len(digits) < spec.precision:
        digits = digits.rjust(spec.precision, "0")
    body = sign + prefix + digits
    if spec.width > len(body):
        if spec.left:
            body = body.ljust(spec.width)
        elif spec.zero:
            body = sign + prefix + digits.rjust(spec.width - len(sign) - len(prefix), "0")
        else:
            body = body.rjust(spec.width)
    return body.encode()


def _string(spec: _Spec, text: bytes) -> bytes:
    if spec.precision >= 0:
        text = text[: spec.precision]
    if spec.width > len(text):
        text = text.ljust(spec.width) if spec.left else text.rjust(spec.width)
    return text


def _is_err(value: int) -> bool:
    return value > U64 - _MAX_ERRNO


def _bad_pointer(value: int) -> bytes | None:
    """``check_pointer_msg``: what stands for a pointer that cannot be read."""
    if value == 0:
        return b"(null)"
    if value < PAGE_SIZE or _is_err(value):
        return b"(efault)"
    return None


def _c_string(env: FormatEnv, spec: _Spec, value: int) -> bytes:
    bad = _bad_pointer(value)
    if bad is not None:
        # error strings are not cut by a precision
        return _string(_Spec(left=spec.left, width=spec.width), bad)
    limit = spec.precision if spec.precision >= 0 else _MAX_OUTPUT
    return _string(spec, env.mem.cstring(value, limit) if limit else b"")


def hash_pointer(key: bytes, value: int) -> int:
    """``ptr_to_hashval``: 32 bits that stand for a pointer until the next boot."""
    digest = hashlib.blake2b(struct.pack("<Q", value), digest_size=4, key=key).digest()
    return int.from_bytes(digest, "little")


def _plain_pointer(spec: _Spec, value: int) -> bytes:
    if spec.width == -1:
        spec.width, spec.zero = 16 + (2 if spec.special else 0), True
    return _number(spec, value, 16, signed=False)


def _hashed_pointer(env: FormatEnv, spec: _Spec, value: int) -> bytes:
    if value == 0 or _is_err(value):
        return _plain_pointer(spec, value)
    return _plain_pointer(spec, hash_pointer(env.hash_key, value))


def _hex_string(env: FormatEnv, spec: _Spec, value: int, separator: str) -> bytes:
    count = min(max(spec.width, 1), 64)
    return (
        env.mem.read(value, count).hex(separator).encode() if separator else env.mem.read(value, count).hex().encode()
    )


def _mac(env: FormatEnv, spec: _Spec, value: int, suffix: str) -> bytes:
    data = env.mem.read(value, 6)
    if suffix[1:2] == "R":
        data = data[::-1]
    if suffix[0] == "m":
        return _string(spec, data.hex().encode())
    return _string(spec, data.hex("-" if suffix[1:2] == "F" else ":").encode())


def _ip(env: FormatEnv, spec: _Spec, value: int, suffix: str) -> bytes:
    import ipaddress

    if suffix[1:2] == "4":
        data = env.mem.read(value, 4)
        if suffix[2:3] in ("h", "l"):
            data = data[::-1]
        form = "{:03d}" if suffix[0] == "i" else "{:d}"
        return _string(spec, ".".join(form.format(b) for b in data).encode())
    if suffix[1:2] == "6":
        data = env.mem.read(value, 16)
        if suffix[0] == "i":
            return _string(spec, data.hex().encode())
        if suffix[2:3] == "c":
            return _string(spec, ipaddress.IPv6Address(data).compressed.encode())
        return _string(spec, data.hex(":", 2).encode())
    raise UnknownFormat(f"%p{suffix[:2]}")


def _uuid(env: FormatEnv, spec: _Spec, value: int, suffix: str) -> bytes:
    data = env.mem.read(value, 16)
    kind = suffix[1:2]
    if kind in ("l", "L"):
        data = data[3::-1] + data[5:3:-1] + data[7:5:-1] + data[8:]
    text = "-".join(data[a:b].hex() for a, b in ((0, 4), (4, 6), (6, 8), (8, 10), (10, 16)))
    return _string(spec, (text.upper() if kind in ("B", "L") else text).encode())


def _bitmap(env: FormatEnv, spec: _Spec, value: int, as_list: bool) -> bytes:
    bits = max(spec.width, 0)
    words = env.mem.read(value, (bits + 63) // 64 * 8)
    number = int.from_bytes(words, "little") & ((1 << bits) - 1)
    if not as_list:
        groups = [f"{number >> shift & 0xFFFFFFFF:08x}" for shift in range(0, max(bits, 1), 32)]
        if bits % 32:
            groups[-1] = groups[-1][-((bits % 32 + 3) // 4) :]
        return ",".join(reversed(groups)).encode()
    ranges, start = [], None
    for bit in range(bits + 1):
        is_set = bit < bits and number >> bit & 1
        if is_set and start is None:
            start = bit
        elif not is_set and start is not None:
            ranges.append(f"{start}" if start == bit - 1 else f"{start}-{bit - 1}")
            start = None
    return ",".join(ranges).encode()


_ESCAPES = {
    0x07: b"\\a",
    0x08: b"\\b",
    0x09: b"\\t",
    0x0A: b"\\n",
    0x0B: b"\\v",
    0x0C: b"\\f",
    0x0D: b"\\r",
    0x1B: b"\\e",
}
_ESCAPES |= {0x22: b'\\"', 0x5C: b"\\\\"}


def _escaped(env: FormatEnv, spec: _Spec, value: int) -> bytes:
    """``%*pE``: the default classes only (anything that does not print, by ``\\ooo`` where it has no letter)."""
    out = b""
    for byte in env.mem.read(value, max(spec.width, 1)):
        if 0x20 <= byte < 0x7F and byte not in (0x22, 0x5C):
            out += bytes([byte])
        else:
            out += _ESCAPES.get(byte, b"\\%03o" % byte)
    return out


def _pointer(env: FormatEnv, spec: _Spec, value: int) -> bytes:
    suffix = spec.suffix
    kind = suffix[:1]
    if kind in ("S", "s", "B", "F", "f"):
        name = env.symbol(value, kind in ("S", "B", "F"), kind == "B" or suffix[1:2] == "b")
        return _string(spec, name.encode())
    if kind == "x":
        return _plain_pointer(spec, value)
    if kind in ("", "K"):
        return _hashed_pointer(env, spec, value)
    if kind == "e":
        if _is_err(value):
            code = U64 + 1 - value
            symbolic = errno.errorcode.get(code)
            return _string(spec, f"-{symbolic}".encode()) if symbolic else _number(spec, -code, 10, signed=True)
        return _hashed_pointer(env, spec, value)
    if kind not in tuple("VMmIiUhbEGag"):
        # an alphanumeric that is no extension is eaten, and the pointer hashed
        if kind in tuple("RrdDtCNOg4") or kind == "f":
            raise UnknownFormat(f"%p{kind}")
        return _hashed_pointer(env, spec, value)
    bad = _bad_pointer(value)
    if bad is not None:
        return _string(_Spec(left=spec.left, width=spec.width), bad)
    match kind:
        case "V":
            return vformat(
                env, env.mem.cstring(env.mem.load(value), PAGE_SIZE), VaList(env.mem, env.mem.load(value + 8))
            )
        case "M" | "m":
            return _mac(env, spec, value, suffix)
        case "I" | "i":
            return _ip(env, spec, value, suffix)
        case "U":
            return _uuid(env, spec, value, suffix)
        case "h":
            return _hex_string(env, spec, value, {"C": ":", "D": "-", "N": ""}.get(suffix[1:2], " "))
        case "b":
            return _bitmap(env, spec, value, suffix[1:2] == "l")
        case "E":
            return _escaped(env, spec, value)
        case "a":
            return _plain_pointer(_Spec(special=True, zero=True, width=18), env.mem.load(value))
        case "G":
            if suffix[1:2] == "g":
                return _string(spec, _gfp_flags(env.mem.load(value, 4)).encode())
    raise UnknownFormat(f"%p{suffix[:2]}")


def _to_signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


class _Parser:
    """``format_decode``: one conversion of a format at a time."""

    def __init__(self, fmt: bytes, args: Args) -> None:
        self.fmt = fmt
        self.args = args
        self.at = 0

    def literal(self) -> bytes:
        """Text up to the next conversion."""
        end = self.fmt.find(b"%", self.at)
        if end < 0:
            end = len(self.fmt)
        text, self.at = self.fmt[self.at : end], end
        return text

    def _peek(self) -> str:
        return chr(self.fmt[self.at]) if self.at < len(self.fmt) else ""

    def _count(self) -> int:
        if self._peek() == "*":
            self.at += 1
            return _to_signed(self.args.next(), 32)
        start = self.at
        while self._peek().isdigit():
            self.at += 1
        return int(self.fmt[start : self.at] or b"-1")

    def spec(self) -> _Spec | None:
        """The conversion that starts here, or None at the end."""
        if self.at >= len(self.fmt):
            return None
        self.at += 1
        spec = _Spec()
        while True:
            match self._peek():
                case "-":
                    spec.left = True
                case "+":
                    spec.plus = True
                case " ":
                    spec.space = True
                case "#":
                    spec.special = True
                case "0":
                    spec.zero = True
                case _:
                    break
            self.at += 1
        spec.width = self._count()
        if spec.width < -1:
            spec.left, spec.width = True, -spec.width
        spec.width = min(spec.width, _MAX_OUTPUT)
        if self._peek() == ".":
            self.at += 1
            spec.precision = max(self._count(), 0)
        match self._peek():
            case "h":
                self.at += 1
                spec.bits = 16
                if self._peek() == "h":
                    self.at += 1
                    spec.bits = 8
            case "l" | "z" | "t" | "L":
                first = self._peek()
                self.at += 1
                spec.bits = 64
                if first == "l" and self._peek() == "l":
                    self.at += 1
        spec.conversion = self._peek()
        self.at += 1
        if spec.conversion == "p":
            start = self.at
            while self._peek().isalnum() and self.at - start < 8:
                self.at += 1
            spec.suffix = self.fmt[start : self.at].decode("latin-1")
            while self._peek().isalnum():
                self.at += 1
        return spec


def vformat(env: FormatEnv, fmt: bytes, args: Args) -> bytes:
    """The text that *fmt* makes of *args*.

    Raises :class:`UnknownFormat`, and whatever the memory raises for a pointer that cannot be read.
    """
    out = bytearray()
    parser = _Parser(fmt, args)
    while True:
        out += parser.literal()
        spec = parser.spec()
        if spec is None:
            return bytes(out)
        if len(out) > _MAX_OUTPUT:
            return bytes(out[:_MAX_OUTPUT])
        match spec.conversion:
            case "%":
                out += b"%"
            case "c":
                out += _string(_Spec(left=spec.left, width=spec.width), bytes([args.next() & 0xFF]))
            case "s":
                out += _c_string(env, spec, args.next())
            case "p":
                out += _pointer(env, spec, args.next())
            case "d" | "i":
                out += _number(spec, _to_signed(args.next(), spec.bits), 10, signed=True)
            case "u" | "x" | "X" | "o":
                value = args.next() & ((1 << spec.bits) - 1)
                base = {"u": 10, "o": 8}.get(spec.conversion, 16)
                out += _number(spec, value, base, signed=False, upper=spec.conversion == "X")
            case "":
                return bytes(out)
            case _:
                # The kernel warns once ("Please remove unsupported %...") and stops interpreting.
                raise UnknownFormat(f"%{spec.conversion}")


def vscan(mem: Memory, text: bytes, fmt: bytes, args: Args, store: Callable[[int, int, int], None]) -> int:
    """``vsscanf``: the number of conversions stored. *store* takes address, value and size in bytes.

    Supports d i u x o c s n with widths, suppression and length modifiers.
    """
    at = i = done = 0
    space = b" \t\n\v\f\r"

    def skip() -> None:
        nonlocal at
        while at < len(text) and text[at] in space:
            at += 1

    while i < len(fmt):
        ch = chr(fmt[i])
        i += 1
        if ch.isspace():
            skip()
            continue
        if ch != "%":
            if at >= len(text) or text[at] != ord(ch):
                return done
            at += 1
            continue
        if fmt[i : i + 1] == b"%":
            i += 1
            if text[at : at + 1] != b"%":
                return done
            at += 1
            continue
        suppress = fmt[i : i + 1] == b"*"
        i += suppress
        start = i
        while fmt[i : i + 1].isdigit():
            i += 1
        width = int(fmt[start:i] or b"0")
        size = 4
        while fmt[i : i + 1] in (b"h", b"l", b"L", b"z") and i < len(fmt):
            size = {b"h": size // 2}.get(fmt[i : i + 1], 8)
            i += 1
        conversion = fmt[i : i + 1]
        i += 1
        if conversion == b"n":
            store(args.next(), at, size)
            continue
        if at >= len(text):
            return done
        if conversion == b"c":
            chunk = text[at : at + (width or 1)]
            at += len(chunk)
            if not suppress:
                base = args.next()
                for offset, byte in enumerate(chunk):
                    store(base + offset, byte, 1)
                done += 1
            continue
        skip()
        if conversion == b"s":
            end = at
            while end < len(text) and text[end] not in space and (not width or end - at < width):
                end += 1
            if not suppress:
                base = args.next()
                for offset, byte in enumerate(text[at:end] + b"\0"):
                    store(base + offset, byte, 1)
                done += 1
            at = end
            continue
        radix = {b"d": 10, b"u": 10, b"i": 0, b"x": 16, b"X": 16, b"o": 8}.get(conversion)
        if radix is None:
            raise UnknownFormat(f"%{conversion.decode('latin-1')} of sscanf")
        value, used = _scan_integer(text[at : at + width] if width else text[at:], radix)
        if not used:
            return done
        at += used
        if not suppress:
            store(args.next(), value, size)
            done += 1
    return done


def _scan_integer(text: bytes, radix: int) -> tuple[int, int]:
    at = sign = 0
    if text[:1] in (b"-", b"+"):
        sign = text[:1] == b"-"
        at = 1
    if radix in (0, 16) and text[at : at + 2].lower() == b"0x":
        radix, at = 16, at + 2
    elif radix == 0:
        radix = 8 if text[at : at + 1] == b"0" else 10
    valid = b"0123456789abcdef"[:radix]
    end = at
    while end < len(text) and text[end : end + 1].lower() in [bytes([c]) for c in valid]:
        end += 1
    if end == at:
        return 0, 0
    value = int(text[at:end], radix)
    return (-value if sign else value), end
