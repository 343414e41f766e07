"""Module parameters: argument strings, types, and what the module loader says about them."""

from __future__ import annotations

import errno

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from klpfs.kernel.dynamic_debug import DynamicDebug
from klpfs.kernel.params import (
    PARAM_TYPES,
    Param,
    ParamDesc,
    ParamValue,
    find_param,
    get_param,
    parameq,
    parse_args,
    parse_module_args,
    set_param,
)
from klpfs.kernel.printk import Printk

# argument strings


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("   \t\n", []),
        ("a=1 b=2", [("a", "1"), ("b", "2")]),
        ("  a=1\t\n b  ", [("a", "1"), ("b", None)]),
        ("a=", [("a", "")]),
        ("a==b", [("a", "=b")]),
        ("a=b=c", [("a", "b=c")]),
        ("=x", [("=x", None)]),
        ("=x=y", [("=x", "y")]),
        ('a="two words" b', [("a", "two words"), ("b", None)]),
        ('"a=two words" b', [("a", "two words"), ("b", None)]),
        ('"two words"', [("two words", None)]),
        ('a="" b', [("a", ""), ("b", None)]),
        ('a=x"y z"w', [("a", 'x"y z"w')]),
        ('a="x"y z', [("a", 'x"y'), ("z", None)]),
        ('a="never closed b=1', [("a", "never closed b=1")]),
        ('a"b c"=d', [('a"b c"', "d")]),
        ("a='x y'", [("a", "'x"), ("y'", None)]),
        ("a=1,2,3", [("a", "1,2,3")]),
        ("a -- b=1", [("a", None)]),
        ("--x a", [("--x", None), ("a", None)]),
        ("--=1", [("--", "1")]),
        ('"--" a', []),
        ("caf\u00e9=\u00fc", [("caf\u00e9", "\u00fc")]),
        ("a=1\0b=2", [("a", "1")]),
    ],
)
def test_splitting(text: str, found: list[tuple[str, str | None]]) -> None:
    assert parse_args(text) == found


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.text(st.characters(codec="utf-8", exclude_characters='"\0'), max_size=12)


@given(st.lists(st.tuples(NAMES, st.none() | VALUES), max_size=6))
def test_quoting_round_trip(wanted: list[tuple[str, str | None]]) -> None:
    text = " ".join(name if value is None else f'{name}="{value}"' for name, value in wanted)
    assert parse_args(text) == wanted


@given(st.text('ab="- \t', max_size=16))
def test_any_text_is_split_without_a_fault(text: str) -> None:
    for name, value in parse_args(text):
        assert set(name + (value or "")) <= set(text)


def test_dash_is_underscore() -> None:
    assert parameq("block-transition", "block_transition")
    assert parameq("a_b-c", "a-b_c")
    assert not parameq("ab", "a_b")
    assert not parameq("a", "ab")
    params = [ParamDesc("a_b", "int"), ParamDesc("a-b", "bool")]
    assert find_param(params, "a-b") is params[0]
    assert find_param(params, "A_b") is None


# values


@pytest.mark.parametrize(
    ("kind", "text", "value", "shown"),
    [
        ("bool", "1", True, "Y"),
        ("bool", "off\n", False, "N"),
        ("bool", None, True, "Y"),
        ("invbool", "Y", False, "Y"),
        ("invbool", "n", True, "N"),
        ("bint", None, 1, "1"),
        ("bint", "no", 0, "0"),
        ("bool_enable_only", "y", True, "Y"),
        ("byte", "255", 255, "255"),
        ("short", "-0x8000", -32768, "-32768"),
        ("ushort", "65535", 65535, "65535"),
        ("int", "0x0", 0, "0"),
        ("int", "-1\n", -1, "-1"),
        ("uint", "4294967295", 4294967295, "4294967295"),
        ("long", "-9223372036854775808", -(1 << 63), "-9223372036854775808"),
        ("ulong", "0xffffffffffffffff", (1 << 64) - 1, "18446744073709551615"),
        ("ullong", "017", 15, "15"),
        ("hexint", "255", 255, "0x0000ff"),
        ("hexint", "0", 0, "0x000000"),
        ("hexint", "0x12345678", 0x12345678, "0x12345678"),
        ("charp", "text\n", "text\n", "text\n"),
        ("charp", "", "", ""),
        ("charp", "x" * 1024, "x" * 1024, "x" * 1024),
    ],
)
def test_types(kind: str, text: str | None, value: ParamValue, shown: str) -> None:
    got = set_param(kind, text)
    assert got == value
    assert type(got) is type(value)
    assert get_param(kind, got) == shown
    param = Param(ParamDesc("p", kind))
    param.set(text)
    assert param.show() == shown.encode() + b"\n"


@pytest.mark.parametrize(
    ("kind", "text", "code"),
    [
        ("bool", "maybe", errno.EINVAL),
        ("bool", "", errno.EINVAL),
        ("bint", "2", errno.EINVAL),
        ("int", "", errno.EINVAL),
        ("int", "1 2", errno.EINVAL),
        ("int", "99999999999", errno.ERANGE),
        ("byte", "256", errno.ERANGE),
        ("byte", "-1", errno.EINVAL),
        ("uint", "-1", errno.EINVAL),
        ("hexint", "0x1ffffffff", errno.ERANGE),
        ("charp", "x" * 1025, errno.ENOSPC),
        ("int", None, errno.EINVAL),
        ("invbool", None, errno.EINVAL),
        ("charp", None, errno.EINVAL),
    ],
)
def test_bad_values(kind: str, text: str | None, code: int) -> None:
    with pytest.raises(OSError, match=r"\w") as caught:
        set_param(kind, text)
    assert caught.value.errno == code


def test_values_before_anyone_sets_them() -> None:
    shown = {
        kind: get_param(kind, Param(ParamDesc("p", kind, max=8 * (kind == "string"))).value) for kind in PARAM_TYPES
    }
    assert shown.pop("charp") == "(null)"
    assert shown.pop("string") == ""
    assert shown.pop("hexint") == "0x000000"
    assert shown.pop("invbool") == "Y"
    assert {kind for kind, text in shown.items() if text == "N"} == {"bool", "bool_enable_only"}
    assert {text for text in shown.values() if text != "N"} == {"0"}
    assert Param(ParamDesc("p", "int", default=7)).show() == b"7\n"


def test_a_bad_value_changes_nothing() -> None:
    param = Param(ParamDesc("p", "int", default=7))
    with pytest.raises(OSError, match="Invalid"):
        param.set("x")
    assert param.show() == b"7\n"


def test_string_has_a_size() -> None:
    printk = Printk(lambda: 0.0)
    param = Param(ParamDesc("name", "string", max=5, default="abc"))
    param.set("wxyz")
    assert param.show() == b"wxyz\n"
    with pytest.raises(OSError, match="space") as caught:
        param.set("wxyz\n", printk.logger())  # the newline of echo counts
    assert caught.value.errno == errno.ENOSPC
    assert param.show() == b"wxyz\n"
    param.set("\u00e9\u00e9")  # four bytes
    with pytest.raises(OSError, match="space"):
        param.set("\u00e9\u00e9x", printk.logger())
    assert [(record.level, record.message) for record in printk.records()] == [
        (3, "name: string doesn't fit in 4 chars.")
    ] * 2


def test_enable_only() -> None:
    param = Param(ParamDesc("p", "bool_enable_only"))
    param.set("0")
    param.set(None)
    with pytest.raises(OSError, match="Read-only") as caught:
        param.set("0")
    assert caught.value.errno == errno.EROFS
    assert param.show() == b"Y\n"


def test_arrays() -> None:
    printk = Printk(lambda: 0.0)
    param = Param(ParamDesc("list", "int", max=3))
    assert param.show() == b""
    param.set("1,0x10")
    assert (param.num, param.show()) == (2, b"1,16\n")
    param.set("7\n")
    assert param.show() == b"7\n"
    with pytest.raises(OSError, match="Invalid"):
        param.set("1,2,3,4", printk.logger())
    assert param.show() == b"1,2,3\n"
    assert [record.message for record in printk.records()] == ["list: can only take 3 arguments"]
    with pytest.raises(OSError, match="Invalid"):
        param.set("9,x,8")
    assert (param.num, param.value) == (1, [9, 2, 3])  # what came before the bad one is kept
    with pytest.raises(OSError, match="Invalid"):
        param.set("")
    assert param.show() == b""


def test_array_without_a_count_shows_all() -> None:
    param = Param(ParamDesc("list", "bool", max=3, counted=False, default=[True]))
    assert param.show() == b"Y,N,N\n"
    param.set("n,y")
    assert param.show() == b"N,Y,N\n"


@pytest.mark.parametrize("counted", [True, False])
def test_the_elements_of_a_huge_array_take_no_memory_before_they_are_set(counted: bool) -> None:
    param = Param(ParamDesc("list", "int", max=0xFFFFFFFF, counted=counted))
    assert len(param.show()) == (0 if counted else 4095)
    param.set("1,2,3")
    assert param.value == [1, 2, 3]
    assert param.show().startswith(b"1,2,3\n" if counted else b"1,2,3,0,0,")


def test_array_of_text() -> None:
    param = Param(ParamDesc("names", "charp", max=3, default=["a", None]))
    assert param.show() == b"a,(null)\n"
    param.set("x,,y")
    assert param.value == ["x", "", "y"]
    assert param.show() == b"x,,y\n"
    with pytest.raises(OSError, match="Invalid"):
        Param(ParamDesc("flags", "bool", max=2)).set(None)  # an array wants a value


def test_a_page_is_all_that_is_shown() -> None:
    param = Param(ParamDesc("names", "charp", max=9))
    param.set(",".join("x" * 1000 for _ in range(9)))
    assert len(param.show()) == 4095


@pytest.mark.parametrize(
    "desc",
    [ParamDesc("p", "float"), ParamDesc("p", "string"), ParamDesc("p", "int", max=1, default=[1, 2])],
)
def test_impossible_parameters(desc: ParamDesc) -> None:
    with pytest.raises(ValueError, match="parameter p"):
        Param(desc)


def test_permissions_and_modinfo() -> None:
    assert not ParamDesc("p", "int").visible
    assert ParamDesc("p", "int", 0o444).visible
    assert not ParamDesc("p", "int", 0o444).writable
    assert ParamDesc("p", "int", 0o644).writable
    assert ParamDesc("p", "int", max=4).parmtype == "array of int"
    assert ParamDesc("p", "string", max=4).parmtype == "string"


INT_LIMITS = {
    "byte": (0, 255),
    "short": (-(1 << 15), (1 << 15) - 1),
    "int": (-(1 << 31), (1 << 31) - 1),
    "hexint": (0, (1 << 32) - 1),
    "ulong": (0, (1 << 64) - 1),
    "long": (-(1 << 63), (1 << 63) - 1),
}


@given(st.sampled_from(list(INT_LIMITS)), st.data())
def test_what_is_shown_can_be_set_again(kind: str, data: st.DataObject) -> None:
    low, high = INT_LIMITS[kind]
    values = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=5))
    param = Param(ParamDesc("p", kind, max=5))
    param.set(",".join(map(str, values)))
    assert param.shown == values
    again = Param(ParamDesc("p", kind, max=5))
    again.set(param.show().decode())
    assert again.shown == values


# the module loader


class Loader:
    """Parameters of a module, set as the module loader does it."""

    def __init__(self, *descs: ParamDesc) -> None:
        self.printk = Printk(lambda: 0.0)
        self.dyndbg = DynamicDebug(self.printk)
        self.params = {desc.name: Param(desc) for desc in descs}
        self.descs = list(descs)
        self.probes: list[bool] = []
        self.taints = 0

    def taint(self) -> None:
        self.taints += 1

    def load(self, args: str) -> int:
        """0, or the errno of the refusal."""

        async def set_value(desc: ParamDesc, text: str) -> None:
            self.params[desc.name].set(text, self.printk.logger())

        async def main() -> None:
            await parse_module_args(
                "demo",
                args,
                self.descs,
                set_value,
                self.printk.logger(),
                dyndbg=self.dyndbg.dyndbg_param,
                async_probe=self.probes.append,
                unsafe=self.taint,
            )

        try:
            trio.run(main)
        except OSError as exc:
            return exc.errno or -1
        return 0

    @property
    def log(self) -> list[str]:
        return [f"<{record.level}>{record.message}" for record in self.printk.records()]

    def shown(self, name: str) -> str:
        return self.params[name].show().decode().rstrip("\n")


def demo() -> Loader:
    return Loader(
        ParamDesc("block_transition", "bool", 0o644),
        ParamDesc("pre_patch_ret", "int", 0o644),
        ParamDesc("label", "charp"),
        ParamDesc("tag", "string", max=4),
        ParamDesc("list", "int", max=2),
        ParamDesc("danger", "int", unsafe=True),
    )


@pytest.mark.parametrize(
    ("args", "code", "log"),
    [
        ("", 0, []),
        ("block_transition=maybe", errno.EINVAL, ["<3>demo: `maybe' invalid for parameter `block_transition'"]),
        ("block-transition=maybe", errno.EINVAL, ["<3>demo: `maybe' invalid for parameter `block-transition'"]),
        ("nosuch=1", 0, ["<4>demo: unknown parameter 'nosuch' ignored"]),
        ("nosuch", 0, ["<4>demo: unknown parameter 'nosuch' ignored"]),
        ("no.such=1", 0, ["<4>demo: unknown parameter 'no' ignored"]),
        ("demo.pre_patch_ret=1", 0, ["<4>demo: unknown parameter 'demo' ignored"]),
        (
            "pre_patch_ret=99999999999",
            errno.ERANGE,
            ["<3>demo: `99999999999' invalid for parameter `pre_patch_ret'"],
        ),
        ("pre_patch_ret", errno.EINVAL, ["<3>demo: `' invalid for parameter `pre_patch_ret'"]),
        ("pre_patch_ret=", errno.EINVAL, ["<3>demo: `' invalid for parameter `pre_patch_ret'"]),
        (
            "tag=abcd",
            errno.ENOSPC,
            ["<3>tag: string doesn't fit in 3 chars.", "<3>demo: `abcd' too large for parameter `tag'"],
        ),
        ("list=1,x", errno.EINVAL, ["<3>demo: `1' invalid for parameter `list'"]),
        (
            "list=1,2,3",
            errno.EINVAL,
            ["<3>list: can only take 2 arguments", "<3>demo: `1' invalid for parameter `list'"],
        ),
        ("danger=1", 0, ["<5>Setting dangerous option danger - tainting kernel"]),
        ("-- rest of it", 0, ["<4>demo: parameters 'rest of it' after `--' ignored"]),
        ("--", 0, ["<4>demo: parameters '' after `--' ignored"]),
        (
            "pre_patch_ret=x -- rest",
            errno.EINVAL,
            ["<3>demo: `x' invalid for parameter `pre_patch_ret'"],
        ),
        (
            "pre_patch_ret=x list=99999999999 nosuch",
            errno.ERANGE,
            [
                "<3>demo: `x' invalid for parameter `pre_patch_ret'",
                "<3>demo: `99999999999' invalid for parameter `list'",
                "<4>demo: unknown parameter 'nosuch' ignored",
            ],
        ),
    ],
)
def test_loading(args: str, code: int, log: list[str]) -> None:
    loader = demo()
    assert loader.load(args) == code
    assert loader.log == log


def test_too_long_text() -> None:
    loader = demo()
    assert loader.load("label=" + "x" * 1025) == errno.ENOSPC
    assert loader.log[0] == "<3>label: string parameter too long"
    assert loader.log[1].startswith("<3>demo: `xxx")


def test_values_are_set() -> None:
    loader = demo()
    assert loader.load('block_transition label="two words" list=3,4 pre-patch-ret=0x0 tag=abc') == 0
    assert loader.log == []
    assert {name: loader.shown(name) for name in loader.params} == {
        "block_transition": "Y",
        "pre_patch_ret": "0",
        "label": "two words",
        "tag": "abc",
        "list": "3,4",
        "danger": "0",
    }


def test_the_last_of_two_counts() -> None:
    loader = demo()
    assert loader.load("pre_patch_ret=1 pre_patch_ret=2") == 0
    assert loader.shown("pre_patch_ret") == "2"


def test_arguments_after_a_bad_one_are_set() -> None:
    loader = demo()
    assert loader.load("pre_patch_ret=x block_transition=Y") == errno.EINVAL
    assert loader.shown("block_transition") == "Y"


def test_async_probe() -> None:
    loader = demo()
    assert loader.load("async_probe async_probe=0 async_probe=1 async_probe=what") == 0
    assert loader.probes == [True, False, True, True]
    assert loader.log == []
    assert loader.load("async-probe") == 0  # compared to the letter
    assert loader.log == ["<4>demo: unknown parameter 'async-probe' ignored"]


def test_dyndbg() -> None:
    loader = demo()
    for module in ("demo", "other"):
        loader.dyndbg.register(f"{module}.c", 1, module, "f", "x\n")
    assert loader.load("dyndbg") == 0
    assert [site.enabled for site in loader.dyndbg.sites] == [True, False]
    assert loader.load('dyndbg="=_; func f +p"') == 0
    assert [site.enabled for site in loader.dyndbg.sites] == [True, False]
    assert loader.load("other.dyndbg=+p") == 0
    assert [site.enabled for site in loader.dyndbg.sites] == [True, True]
    assert loader.log == []
    assert loader.load("dyndbg=nonsense a.b.dyndbg") == 0
    assert loader.log == [
        "<3>dyndbg: bad flag-op n, at start of nonsense",
        "<3>dyndbg: flags parse failed",
        "<4>demo: unknown parameter 'a' ignored",
    ]


def test_dangerous_options_taint() -> None:
    loader = demo()
    loader.load("danger=x")
    assert loader.taints == 1  # even when the value is bad
    assert loader.log == [
        "<5>Setting dangerous option danger - tainting kernel",
        "<3>demo: `x' invalid for parameter `danger'",
    ]
