"""Numbers and booleans as the kernel's attribute and parameter handlers parse them."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klpfs.kernel import kstrtox as k

FAMILY: dict[Callable[..., int], tuple[int, bool]] = {
    k.kstrtou8: (8, False),
    k.kstrtos8: (8, True),
    k.kstrtou16: (16, False),
    k.kstrtos16: (16, True),
    k.kstrtouint: (32, False),
    k.kstrtoint: (32, True),
    k.kstrtoul: (64, False),
    k.kstrtol: (64, True),
    k.kstrtoull: (64, False),
    k.kstrtoll: (64, True),
}


def fails(code: int, function: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError, match=r"\w") as caught:
        function(*args)
    assert caught.value.errno == code


@pytest.mark.parametrize("function", FAMILY)
def test_limits_of_each_type(function: Callable[..., int]) -> None:
    bits, signed = FAMILY[function]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    for value in (low, high, 0, 1):
        assert function(str(value)) == value
        assert function(f"{value}\n") == value
    fails(errno.ERANGE, function, str(high + 1))
    fails(errno.ERANGE if signed else errno.EINVAL, function, str(low - 1))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0x0", 0),
        ("0X1f", 31),
        ("0x1F\n", 31),
        ("017", 15),
        ("00", 0),
        ("+5", 5),
        ("-0x10", -16),
        ("-010", -8),
        ("-0", 0),
        (b"12\x0034", 12),
    ],
)
def test_base_is_found_from_the_prefix(text: str | bytes, value: int) -> None:
    assert k.kstrtoint(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "-",
        "+",
        "x",
        "0x",
        "0xg",
        "08",
        "1 ",
        " 1",
        "1\n\n",
        "1\nx",
        "12abc",
        "--1",
        "+-1",
        "-+1",
        "1_0",
        "\u0661",
    ],
)
def test_what_is_no_number(text: str) -> None:
    fails(errno.EINVAL, k.kstrtoint, text)


def test_overflow_is_found_before_garbage() -> None:
    fails(errno.ERANGE, k.kstrtoint, "99999999999999999999999 and more")
    fails(errno.EINVAL, k.kstrtoint, "9999999999 and more")
    fails(errno.ERANGE, k.kstrtoint, "99999999999")
    fails(errno.ERANGE, k.kstrtoll, "-18446744073709551615")


def test_explicit_bases() -> None:
    assert k.kstrtouint("0x1f", 16) == k.kstrtouint("1f", 16) == 31
    assert k.kstrtouint("077", 10) == 77
    assert k.kstrtouint("101", 2) == 5
    fails(errno.EINVAL, k.kstrtouint, "0x1f", 10)
    fails(errno.EINVAL, k.kstrtouint, "0x", 16)


@given(
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from(["d", "x", "X", "o"]),
    st.booleans(),
    st.sampled_from(list(FAMILY)),
)
def test_round_trip(value: int, form: str, newline: bool, function: Callable[..., int]) -> None:
    prefix = {"d": "", "x": "0x", "X": "0X", "o": "0"}[form]
    text = ("-" if value < 0 else "") + prefix + format(abs(value), form) + ("\n" if newline else "")
    bits, signed = FAMILY[function]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if value < 0 and not signed:
        fails(errno.EINVAL, function, text)
    elif low <= value <= high:
        assert function(text) == value
    else:
        fails(errno.ERANGE, function, text)


@given(st.text("0123456789abcdefxXgG+- \n", max_size=8))
def test_any_text_against_a_grammar(text: str) -> None:
    match = re.fullmatch(r"([+-]?)(?:(0[xX])([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))\n?", text)
    if match is None:
        fails(errno.EINVAL, k.kstrtoint, text)
        return
    sign, _, hexa, octal, decimal = match.groups()
    value = int(hexa, 16) if hexa else int(octal, 8) if octal else int(decimal)
    value = -value if sign == "-" else value
    if -(1 << 31) <= value < 1 << 31:
        assert k.kstrtoint(text) == value
    else:
        fails(errno.ERANGE, k.kstrtoint, text)


@given(st.binary(max_size=4))
def test_bool_looks_at_two_characters(data: bytes) -> None:
    text = data.split(b"\0")[0]
    if re.match(rb"[yYtT1]|[oO][nN]", text):
        assert k.kstrtobool(data) is True
    elif re.match(rb"[nNfF0]|[oO][fF]", text):
        assert k.kstrtobool(data) is False
    else:
        fails(errno.EINVAL, k.kstrtobool, data)


@pytest.mark.parametrize(
    ("text", "value"), [("1garbage", True), ("yes", True), ("oN!", True), ("ofx", False), ("0x1", False)]
)
def test_bool_ignores_what_follows(text: str, value: bool) -> None:
    assert k.kstrtobool(text) is value


@pytest.mark.parametrize("text", [None, "", "\n", " 1", "2", "-1", "o", "ox", "maybe", "enable"])
def test_no_bool(text: str | None) -> None:
    fails(errno.EINVAL, k.kstrtobool, text)


def test_copies_from_user_space_are_cut() -> None:
    assert k.kstrtobool_from_user(b"on" + b"x" * 5000) is True
    assert k.kstrtoint_from_user(b"7\n" + b"\0" * 40) == 7
    assert k.kstrtoint_from_user(b"0" * 33 + b"\n" + b"x") == 0  # what is wrong lies beyond the copy
    fails(errno.EINVAL, k.kstrtouint_from_user, b"-1\n")
    assert k.kstrtouint_from_user(b"4294967295") == 4294967295


def test_simple_strtoul() -> None:
    assert k.simple_strtoul(b"99999>x") == (99999, 5)
    assert k.simple_strtoul(b">x") == (0, 0)
    assert k.simple_strtoul(b"0x1g", 0) == (1, 3)
    assert k.simple_strtoul(b"18446744073709551617") == (1, 20)


@pytest.mark.parametrize(
    ("data", "new", "used"),
    [
        (b"1\n", [1, 20], 2),
        (b"1 2\n", [1, 2], 4),
        (b" \t-3\t0x10  \n", [-3, 16], 12),
        (b"1 2 three", [1, 2], 4),
        (b"", [10, 20], 0),
        (b"010", [8, 20], 3),
    ],
)
def test_sysctl_integers(data: bytes, new: list[int], used: int) -> None:
    assert k.proc_dointvec(data, [10, 20]) == (new, used)


@pytest.mark.parametrize(
    "data",
    [b"x\n", b"\n", b" ", b"1x", b"+1", b"-", b"1 y", b"2147483648", b"-2147483649", b"0" * 30, b"1,2", b"1" * 25],
)
def test_no_sysctl_integers(data: bytes) -> None:
    fails(errno.EINVAL, k.proc_dointvec, data, [10, 20])


def test_sysctl_limits() -> None:
    assert k.proc_dointvec(b"2147483647 -2147483648", [0, 0])[0] == [2147483647, -2147483648]
    assert k.proc_dointvec(b"2", [0], low=0, high=2)[0] == [2]

    def limited() -> None:
        k.proc_dointvec(b"3", [0], low=0, high=2)

    fails(errno.EINVAL, limited)
