"""Strict number and boolean parsing, as the kernel's attribute and parameter handlers do it.

Model: pure functions over C strings. A ``bytes`` or ``str`` argument is read up to its first NUL; characters are
bytes (``str`` is encoded with ``surrogateescape``), so nothing outside ASCII is ever a digit. No locks, no state.
Errors are ``OSError``: ``EINVAL`` for text that is no number, ``ERANGE`` for a number that does not fit the type.

Source: lib/kstrtox.c (_parse_integer_fixup_radix, _parse_integer_limit, _kstrtoull, kstrtoll, kstrtobool, the
*_from_user family), lib/vsprintf.c (simple_strtoul), kernel/sysctl.c (__do_proc_dointvec, proc_get_long).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

__all__ = [
    "INT_TYPES",
    "c_string",
    "kstrtobool",
    "kstrtobool_from_user",
    "kstrtoint",
    "kstrtoint_from_user",
    "kstrtol",
    "kstrtoll",
    "kstrtos8",
    "kstrtos16",
    "kstrtou8",
    "kstrtou16",
    "kstrtouint",
    "kstrtouint_from_user",
    "kstrtoul",
    "kstrtoull",
    "kstrtox",
    "proc_dointvec",
    "simple_strtoul",
]

ULLONG_MAX: Final = (1 << 64) - 1
INT_MAX: Final = (1 << 31) - 1
_SPACES: Final = b" \t\n\v\f\r\xa0"  # isspace() of the kernel's ctype table
_TMPBUFLEN: Final = 22
_DIGITS: Final = {c: i for i, c in enumerate(b"0123456789abcdef")} | {c: i + 10 for i, c in enumerate(b"ABCDEF")}

INT_TYPES: Final[dict[str, tuple[int, bool]]] = {
    "u8": (8, False),
    "s8": (8, True),
    "u16": (16, False),
    "s16": (16, True),
    "uint": (32, False),
    "int": (32, True),
    "ulong": (64, False),
    "long": (64, True),
    "ull": (64, False),
    "ll": (64, True),
}
"""Width in bits and signedness of each integer type of the family, on a 64 bit machine."""


def c_string(text: str | bytes) -> bytes:
    """The bytes of a C string: ``text`` up to, and without, its first NUL."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    end = data.find(b"\0")
    return data if end < 0 else data[:end]


def _fixup_radix(data: bytes, base: int) -> tuple[bytes, int]:
    """Find the base from the prefix when ``base`` is 0 (0x: 16, 0: 8, else 10), and skip a 0x of base 16."""
    hex_prefix = data[:1] == b"0" and data[1:2] in (b"x", b"X")
    if base == 0:
        base = 10
        if data[:1] == b"0":
            base = 16 if hex_prefix and data[2:3] and data[2] in _DIGITS else 8
    if base == 16 and hex_prefix:
        data = data[2:]
    return data, base


def _parse_integer(data: bytes, base: int) -> tuple[int, int]:
    """Digits of ``base`` at the start of ``data``: (value without any limit, number of characters used)."""
    value = used = 0
    for char in data:
        digit = _DIGITS.get(char, 99)
        if digit >= base:
            break
        value = value * base + digit
        used += 1
    return value, used


def _kstrtoull(data: bytes, base: int) -> int:
    data, base = _fixup_radix(data, base)
    value, used = _parse_integer(data, base)
    if value > ULLONG_MAX:  # found while reading the digits, so it comes before any complaint about what follows
        raise OSError(errno.ERANGE, "Numerical result out of range")
    if not used or data[used:] not in (b"", b"\n"):
        raise OSError(errno.EINVAL, "Invalid argument")
    return value


def kstrtox(text: str | bytes, base: int, bits: int, signed: bool) -> int:
    """Parse an integer of ``bits`` bits.

    ``base`` is 2 to 16, or 0 for detection. One sign (``+``; ``-`` only for signed types) and one trailing newline
    are allowed, white space is not. Raises ``OSError`` with ``EINVAL`` or ``ERANGE``.
    Source: lib/kstrtox.c, kstrtoull, kstrtoll and the narrower functions built on them.
    """
    data = c_string(text)
    if signed and data[:1] == b"-":
        value = -_kstrtoull(data[1:], base)
    else:
        value = _kstrtoull(data[1:] if data[:1] == b"+" else data, base)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if not low <= value <= high:
        raise OSError(errno.ERANGE, "Numerical result out of range")
    return value


def kstrtou8(text: str | bytes, base: int = 0) -> int:
    """``unsigned char``; see :func:`kstrtox`."""
    return kstrtox(text, base, 8, False)


def kstrtos8(text: str | bytes, base: int = 0) -> int:
    """``signed char``; see :func:`kstrtox`."""
    return kstrtox(text, base, 8, True)


def kstrtou16(text: str | bytes, base: int = 0) -> int:
    """``unsigned short``; see :func:`kstrtox`."""
    return kstrtox(text, base, 16, False)


def kstrtos16(text: str | bytes, base: int = 0) -> int:
    """``short``; see :func:`kstrtox`."""
    return kstrtox(text, base, 16, True)


def kstrtouint(text: str | bytes, base: int = 0) -> int:
    """``unsigned int``; see :func:`kstrtox`."""
    return kstrtox(text, base, 32, False)


def kstrtoint(text: str | bytes, base: int = 0) -> int:
    """``int``; see :func:`kstrtox`."""
    return kstrtox(text, base, 32, True)


def kstrtoul(text: str | bytes, base: int = 0) -> int:
    """``unsigned long`` of a 64 bit machine; see :func:`kstrtox`."""
    return kstrtox(text, base, 64, False)


def kstrtol(text: str | bytes, base: int = 0) -> int:
    """``long`` of a 64 bit machine; see :func:`kstrtox`."""
    return kstrtox(text, base, 64, True)


def kstrtoull(text: str | bytes, base: int = 0) -> int:
    """``unsigned long long``; see :func:`kstrtox`."""
    return kstrtox(text, base, 64, False)


def kstrtoll(text: str | bytes, base: int = 0) -> int:
    """``long long``; see :func:`kstrtox`."""
    return kstrtox(text, base, 64, True)


def kstrtobool(text: str | bytes | None) -> bool:
    """A truth value from the first character, or the first two of ``on`` and ``of``.

    ``yYtT1`` and ``on`` are true, ``nNfF0`` and ``of`` false, in either case; whatever follows is not looked at.
    Raises ``OSError(EINVAL)`` otherwise, for None and the empty string too. Source: lib/kstrtox.c, kstrtobool.
    """
    data = c_string(text)[:2] if text is not None else b""
    first, both = data[:1], data.lower()
    if first in (b"y", b"Y", b"t", b"T", b"1") or both == b"on":
        return True
    if first in (b"n", b"N", b"f", b"F", b"0") or both == b"of":
        return False
    raise OSError(errno.EINVAL, "Invalid argument")


def kstrtobool_from_user(data: bytes) -> bool:
    """:func:`kstrtobool` of what a process wrote: only the first three bytes are copied in."""
    return kstrtobool(bytes(data[:3]))


def _from_user(data: bytes, base: int, bits: int, signed: bool) -> int:
    # sign, the digits of base 2, a newline: what is longer is cut, which makes it wrong only by accident
    return kstrtox(bytes(data[: 1 + bits + 1]), base, bits, signed)


def kstrtoint_from_user(data: bytes, base: int = 0) -> int:
    """:func:`kstrtoint` of what a process wrote, cut to 34 bytes as the kernel's copy is."""
    return _from_user(data, base, 32, True)


def kstrtouint_from_user(data: bytes, base: int = 0) -> int:
    """:func:`kstrtouint` of what a process wrote, cut to 34 bytes as the kernel's copy is."""
    return _from_user(data, base, 32, False)


def simple_strtoul(data: bytes, base: int = 10) -> tuple[int, int]:
    """The old forgiving conversion: (value modulo 2**64, number of bytes used); no digit at all is 0.

    ``base`` 0 detects. Source: lib/vsprintf.c, simple_strntoull.
    """
    rest, base = _fixup_radix(data, base)
    value, used = _parse_integer(rest, base)
    return value & ULLONG_MAX, len(data) - len(rest) + used


def proc_dointvec(
    data: bytes, values: Sequence[int], *, low: int = -INT_MAX - 1, high: int = INT_MAX
) -> tuple[list[int], int]:
    """What writing ``data`` to a sysctl file of integers makes of its present ``values``: (new values, bytes used).

    Numbers are decimal, 0x or octal, with a minus sign but no plus, separated by white space. Fewer than there are
    values change only the first ones; what follows the last one is not used. Raises ``OSError(EINVAL)``, also for a
    number outside ``low`` to ``high``. Source: kernel/sysctl.c, __do_proc_dointvec, proc_get_long.
    """
    new = list(values)
    if not data:
        return new, 0
    left = bytes(data[:4095])
    for i in range(len(new)):
        left = left.lstrip(_SPACES)
        if not left:
            if i == 0:
                raise OSError(errno.EINVAL, "Invalid argument")
            break
        piece = c_string(left[: _TMPBUFLEN - 1])
        digits = piece[1:] if piece[:1] == b"-" and len(left) > 1 else piece
        rest, base = _fixup_radix(digits, 0)
        value, count = _parse_integer(rest, base)
        used = len(piece) - len(rest) + count
        if not digits[:1].isdigit() or value > ULLONG_MAX or used == _TMPBUFLEN - 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        if left[used : used + 1] not in (b"", b" ", b"\t", b"\n"):
            raise OSError(errno.EINVAL, "Invalid argument")
        if digits is not piece:
            value = -value
        if not low <= value <= high:
            raise OSError(errno.EINVAL, "Invalid argument")
        new[i] = value
        left = left[used:]
    return new, len(data) - len(left.lstrip(_SPACES))
