"""Dynamic debug: sites, the control file's listing and its query language."""

from __future__ import annotations

import errno
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from klpfs.kernel.dynamic_debug import ClassMap, DebugSite, DynamicDebug, c_format, match_wildcard
from klpfs.kernel.printk import Printk

TRANSITION = "kernel/livepatch/transition.c"
SITES = [
    (97, "klp_complete_transition", "'%s': completing %s transition\n"),
    (170, "klp_cancel_transition", "'%s': canceling patching transition, going to unpatch\n"),
    (345, "klp_try_switch_task", "%s: %s:%d is running\n"),
    (349, "klp_try_switch_task", "%s: %s:%d has an unreliable stack\n"),
    (353, "klp_try_switch_task", "%s: %s:%d is sleeping on function %s\n"),
    (358, "klp_try_switch_task", "%s: Unknown error code (%d) when trying to switch %s:%d\n"),
    (591, "klp_init_transition", "'%s': initializing %s transition\n"),
    (653, "klp_reverse_transition", "'%s': reversing transition from %s\n"),
]
HEADER = "# filename:lineno [module]function flags format\n"


def make(tid: int | None = 77) -> tuple[DynamicDebug, Printk]:
    printk = Printk(lambda: 0.0)
    dyndbg = DynamicDebug(printk, tid=lambda: tid)
    for lineno, function, fmt in SITES:
        dyndbg.register(TRANSITION, lineno, "livepatch", function, fmt, prefix="livepatch: ")
    return dyndbg, printk


def log(printk: Printk) -> list[str]:
    return [f"<{record.level}>{record.message}" for record in printk.records()]


def flags(dyndbg: DynamicDebug) -> dict[int, str]:
    return {site.lineno: site.describe_flags() for site in dyndbg.sites}


def on(dyndbg: DynamicDebug) -> list[int]:
    return [site.lineno for site in dyndbg.sites if site.enabled]


ALL = [lineno for lineno, _, _ in SITES]


def test_listing() -> None:
    dyndbg, _ = make()
    assert dyndbg.control_write("file kernel/livepatch/* +p\n") == 27
    assert dyndbg.control_write("func klp_try_switch_task -p\n") == 28
    dyndbg.control_write("func klp_init_transition +pflmts")
    listed = [
        r"""97 [livepatch]klp_complete_transition =p "'%s': completing %s transition\n" """,
        r"""170 [livepatch]klp_cancel_transition =p "'%s': canceling patching transition, going to unpatch\n" """,
        r"""345 [livepatch]klp_try_switch_task =_ "%s: %s:%d is running\n" """,
        r"""349 [livepatch]klp_try_switch_task =_ "%s: %s:%d has an unreliable stack\n" """,
        r"""353 [livepatch]klp_try_switch_task =_ "%s: %s:%d is sleeping on function %s\n" """,
        r"""358 [livepatch]klp_try_switch_task =_ "%s: Unknown error code (%d) when trying to switch %s:%d\n" """,
        r"""591 [livepatch]klp_init_transition =pmfslt "'%s': initializing %s transition\n" """,
        r"""653 [livepatch]klp_reverse_transition =p "'%s': reversing transition from %s\n" """,
    ]
    assert dyndbg.control_show() == HEADER + "".join(f"{TRANSITION}:{line[:-1]}\n" for line in listed)


def test_listing_without_sites() -> None:
    assert DynamicDebug(Printk(lambda: 0.0)).control_show() == HEADER


def test_listing_escapes_white_space_only() -> None:
    dyndbg = DynamicDebug(Printk(lambda: 0.0))
    dyndbg.register("a.c", 1, "a", "f", 'say "x"\t\r\\%s\n')
    assert dyndbg.control_show() == HEADER + 'a.c:1 [a]f =_ "say "x"\\t\\r\\%s\\n"\n'


# printing


def test_a_site_prints_when_it_is_on() -> None:
    dyndbg, printk = make()
    site = dyndbg.sites[6]
    site("demo", "patching")
    assert on(dyndbg) == []
    dyndbg.control_write("line 591 +p")
    assert on(dyndbg) == [591]
    site("demo", "patching")
    assert log(printk) == ["<7>livepatch: 'demo': initializing patching transition"]
    assert next(printk.records()).final


@pytest.mark.parametrize(
    ("letters", "prefix"),
    [
        ("", ""),
        ("m", "livepatch: "),
        ("f", "klp_init_transition: "),
        ("l", "591: "),
        ("s", "kernel/livepatch/transition.c: "),
        ("t", "[77] "),
        ("tm", "[77] livepatch: "),
        ("flmt", "[77] livepatch:klp_init_transition:591: "),
        ("flmts", "[77] livepatch:klp_init_transition:kernel/livepatch/transition.c:591: "),
        ("_", ""),
    ],
)
def test_prefixes(letters: str, prefix: str) -> None:
    dyndbg, printk = make()
    dyndbg.control_write(f"func klp_init_transition +p{letters}")
    dyndbg.sites[6]("demo", "unpatching")
    assert log(printk) == [f"<7>{prefix}livepatch: 'demo': initializing unpatching transition"]


def test_prefix_in_an_interrupt() -> None:
    dyndbg, printk = make(tid=None)
    dyndbg.control_write("line 591 +pt")
    dyndbg.sites[6]("demo", "patching")
    assert log(printk) == ["<7><intr> livepatch: 'demo': initializing patching transition"]


def test_prefix_without_print_prints_nothing() -> None:
    dyndbg, printk = make()
    dyndbg.control_write("+flmt")
    dyndbg.sites[6]("demo", "patching")
    assert log(printk) == []
    assert set(flags(dyndbg).values()) == {"mflt"}


def test_a_long_prefix_is_cut() -> None:
    dyndbg = DynamicDebug(Printk(lambda: 0.0))
    site = dyndbg.register("a.c", 1, "m" * 60, "f" * 100, "text\n")
    dyndbg.control_write("+pmf")
    site()
    assert log(dyndbg.printk) == ["<7>" + ("m" * 60 + ":" + "f" * 100)[:127] + "text"]


def test_text_that_is_already_formatted() -> None:
    dyndbg, printk = make()
    dyndbg.control_write("line 97 +pl")
    dyndbg.sites[0].emit("100% done\n")
    assert log(printk) == ["<7>97: livepatch: 100% done"]


@pytest.mark.parametrize(
    ("fmt", "args", "text"),
    [
        ("%s: %s:%d", ("a", "b", 3), "a: b:3"),
        ("%5u|%-4i|%04lx|%#llx|%zu|%hhd", (1, 2, 255, 16, 5, 6), "    1|2   |00ff|0x10|5|6"),
        ("%.2s%c%%", ("abc", "x"), "abx%"),
        ("%*d", (4, 7), "   7"),
        ("nothing", (), "nothing"),
    ],
)
def test_c_format(fmt: str, args: tuple[object, ...], text: str) -> None:
    assert c_format(fmt, args) == text


def test_c_format_with_wrong_arguments() -> None:
    with pytest.raises(TypeError):
        c_format("%s %s", ("one",))


# queries


@pytest.mark.parametrize(
    ("query", "lines"),
    [
        ("+p", ALL),
        ("module livepatch +p", ALL),
        ("module live* +p", ALL),
        ("module live +p", []),
        ("file transition.c +p", ALL),
        ("file kernel/livepatch/transition.c +p", ALL),
        ("file livepatch/transition.c +p", []),
        ("file */livepatch/* +p", ALL),
        ("file trans?tion.c +p", ALL),
        ("file nosuch.c +p", []),
        ("file transition.c:345-353 +p", [345, 349, 353]),
        ("file transition.c:170 +p", [170]),
        ("file transition.c:klp_*_task +p", [345, 349, 353, 358]),
        ("file transition.c:*cancel* +p", [170]),
        ("file transition.c:-170 +p", [97, 170]),
        ("file transition.c: +p", ALL),
        ("func klp_init_transition +p", [591]),
        ("func klp_init +p", []),
        ("func klp_*it*_transition +p", [591]),
        ("line 345 +p", [345]),
        ("line 345-349 +p", [345, 349]),
        ("line 591- +p", [591, 653]),
        ("line -170 +p", [97, 170]),
        ("line 0 +p", ALL),
        ("line - +p", ALL),
        ("line 0-0 +p", ALL),
        ("line +97 +p", [97]),
        ('line "" +p', ALL),
        ("format transition +p", [97, 170, 591, 653]),
        ("format ^transition +p", []),
        ("format ^'%s': +p", [97, 170, 591, 653]),
        ('format "is running" +p', [345]),
        ("format 'is running' +p", [345]),
        (r"format is\040running +p", [345]),
        (r"format running\n +p", [345]),
        (r"format running\012 +p", [345]),
        (r'format "running\n" +p', [345]),
        (r"format running\q +p", []),
        ("format stack* +p", []),
        ('format "" +p', ALL),
        ("format ^ +p", ALL),
        ("func klp_try_switch_task format sleeping +p", [353]),
        ("module livepatch file transition.c func klp_* line 97-170 +p", [97, 170]),
        ("func klp_* file transition.c line 300- format %d +p", [345, 349, 353, 358]),
        ("   func\tklp_init_transition \t +p  ", [591]),
        ("func klp_init_transition +p # and so on", [591]),
        ("func 'klp_init_transition'+p", [591]),
        ("class DRM_UT +p", []),
        ("func klp_init_transition +p; line 97 +p", [97, 591]),
        ("func klp_init_transition +p\nline 97 +p\n", [97, 591]),
        (";;\n\n # comment ; line 97 +p", [97]),
        ("# line 97 +p", []),
        ("line 97 +p\0; line 170 +p", [97]),
        ("+p;line 345-358 -p", [97, 170, 591, 653]),
        ("line 97 =p;line 97 =", []),
    ],
)
def test_queries(query: str, lines: list[int]) -> None:
    dyndbg, printk = make()
    assert dyndbg.control_write(query) == len(query)
    assert on(dyndbg) == lines
    assert log(printk) == []


@pytest.mark.parametrize(
    ("query", "messages"),
    [
        ("nonsense", ["bad flag-op n, at start of nonsense", "flags parse failed"]),
        ("file x.c", ["bad flag-op x, at start of x.c", "flags parse failed"]),
        ("func x p", ["bad flag-op p, at start of p", "flags parse failed"]),
        ("func x *p", ["bad flag-op *, at start of *p", "flags parse failed"]),
        ("func x +pz", ["unknown flag 'z'", "flags parse failed"]),
        ("func x ++p", ["unknown flag '+'", "flags parse failed"]),
        ("func +p", ["expecting pairs of match-spec <value>", "query parse failed"]),
        ("function x +p", ['unknown keyword "function"', "query parse failed"]),
        ("FUNC x +p", ['unknown keyword "FUNC"', "query parse failed"]),
        ("func a func b +p", ["match-spec:func val:a overridden by b", "query parse failed"]),
        ("file a file b:3 +p", ["match-spec:file val:a overridden by b:3", "query parse failed"]),
        ("func a file x.c:b +p", ["match-spec:func val:a overridden by b", "query parse failed"]),
        ("module a module b +p", ["match-spec:module val:a overridden by b", "query parse failed"]),
        ("format a format b\\n +p", ["match-spec:format val:a overridden by b", "query parse failed"]),
        ("class a class b +p", ["match-spec:class val:a overridden by b", "query parse failed"]),
        ("line 1 line 2 +p", ["match-spec: line used 2x", "query parse failed"]),
        ("file x.c:1 line 2 +p", ["match-spec: line used 2x", "query parse failed"]),
        ("line x +p", ["bad line-number: x", "query parse failed"]),
        ("line 0x10 +p", ["bad line-number: 0x10", "query parse failed"]),
        ("line 1-x +p", ["bad line-number: x", "query parse failed"]),
        ("line 1-2-3 +p", ["bad line-number: 2-3", "query parse failed"]),
        ("line 4294967296 +p", ["bad line-number: 4294967296", "query parse failed"]),
        ("line 9-3 +p", ["last-line:3 < 1st-line:9", "query parse failed"]),
        ('format "x +p', ["unclosed quote: x +p", "tokenize failed"]),
        ("format 'it''s +p", ["unclosed quote: s +p", "tokenize failed"]),
        ("1 2 3 4 5 6 7 8 9 10", ["too many words, legal max <=9", "tokenize failed"]),
    ],
)
def test_bad_queries(query: str, messages: list[str]) -> None:
    dyndbg, printk = make()
    with pytest.raises(OSError, match="Invalid") as caught:
        dyndbg.control_write(query)
    assert caught.value.errno == errno.EINVAL
    assert on(dyndbg) == []
    assert log(printk) == [f"<3>dyndbg: {message}".rstrip("\n") for message in messages]


def test_a_quote_does_not_protect_a_semicolon() -> None:
    dyndbg, printk = make()
    with pytest.raises(OSError, match="Invalid"):
        dyndbg.control_write('format "is;running" +p')
    assert log(printk) == [
        "<3>dyndbg: unclosed quote: is",
        "<3>dyndbg: tokenize failed",
        "<3>dyndbg: expecting pairs of match-spec <value>",
        "<3>dyndbg: query parse failed",
    ]


def test_good_queries_around_a_bad_one_are_carried_out() -> None:
    dyndbg, _ = make()
    with pytest.raises(OSError, match="Invalid"):
        dyndbg.control_write("line 97 +p; nonsense; line 170 +p")
    assert on(dyndbg) == [97, 170]


def test_flag_operators() -> None:
    dyndbg, _ = make()
    for query, result in [
        ("+p", "p"),
        ("+mf", "pmf"),
        ("-p", "mf"),
        ("=pt", "pt"),
        ("+_", "pt"),
        ("+", "pt"),
        ("-_", "pt"),
        ("-", "pt"),
        ("-pt", "_"),
        ("=lsm", "msl"),
        ("=_", "_"),
        ("=p", "p"),
        ("=", "_"),
    ]:
        dyndbg.control_write(query)
        assert set(flags(dyndbg).values()) == {result}, query


def test_an_empty_write_and_a_long_one() -> None:
    dyndbg, printk = make()
    assert dyndbg.control_write(b"") == 0
    assert dyndbg.control_write(b"\n") == 1
    assert dyndbg.control_write(b"#" * 4095) == 4095
    with pytest.raises(OSError, match="too long") as caught:
        dyndbg.control_write(b"#" * 4096)
    assert caught.value.errno == errno.E2BIG
    assert log(printk) == ["<4>dyndbg: expected <4096 bytes into control"]


def test_bytes_that_are_no_ascii_reach_the_log_unchanged() -> None:
    dyndbg, printk = make()
    with pytest.raises(OSError, match="Invalid"):
        dyndbg.control_write(b"caf\xc3\xa9 x +p")
    assert next(printk.records()).text == b'dyndbg: unknown keyword "caf\xc3\xa9"'


@given(st.lists(st.tuples(st.sampled_from(ALL), st.text("pmfslt", max_size=3), st.sampled_from("+-=")), max_size=20))
def test_saving_and_restoring_the_configuration(changes: list[tuple[int, str, str]]) -> None:
    """The way of the kernel's selftests: each line of the listing becomes a query that restores its site."""
    dyndbg, _ = make()
    model: dict[int, set[str]] = {lineno: set() for lineno in ALL}
    for lineno, letters, op in changes:
        dyndbg.control_write(f"file {TRANSITION} line {lineno} {op}{letters}")
        now = model[lineno]
        model[lineno] = {"+": now | set(letters), "-": now - set(letters), "=": set(letters)}[op]
    assert {lineno: set(text) - {"_"} for lineno, text in flags(dyndbg).items()} == model
    rows = [re.split("[: ]", row) for row in dyndbg.control_show().splitlines() if row.startswith("kernel/livepatch")]
    saved = "\n".join(f"file {row[0]} line {row[1]} {row[3]}" for row in rows)
    before = flags(dyndbg)
    dyndbg.control_write("file kernel/livepatch/* +p\nfunc klp_try_switch_task -p\n")
    dyndbg.control_write(saved)
    assert flags(dyndbg) == before


# wildcards


@given(st.text("ab?*", max_size=7), st.text("ab", max_size=8))
@example("a**", "a")
@example("*a", "aaab")
@example("*ab?", "aabab")
def test_wildcards(pattern: str, text: str) -> None:
    wanted = re.fullmatch(pattern.replace("*", ".*").replace("?", "."), text.replace("\n", "")) is not None
    found = match_wildcard(pattern, text)
    if found:
        assert wanted
    elif wanted:
        # the kernel's one deviation: only one of several asterisks may match nothing at the end of the text
        assert re.search(r"\*\*+$", pattern)


def test_several_asterisks_at_the_end() -> None:
    assert match_wildcard("a*", "a")
    assert not match_wildcard("a**", "a")
    assert match_wildcard("a**", "ab")


# modules and classes


def module_sites(dyndbg: DynamicDebug, *numbers: int) -> list[DebugSite]:
    return [
        DebugSite(dyndbg, "demo.c", number, "demo", f"f{number}", f"line {number}\n", "demo: ") for number in numbers
    ]


def test_a_module_comes_and_goes() -> None:
    dyndbg, printk = make()
    dyndbg.add_module("empty", [])
    dyndbg.add_module("demo", module_sites(dyndbg, 5, 9))
    assert dyndbg.control_show().endswith('demo.c:5 [demo]f5 =_ "line 5\\n"\ndemo.c:9 [demo]f9 =_ "line 9\\n"\n')
    dyndbg.control_write("module demo +p")
    dyndbg.sites[-1]()
    assert log(printk) == ["<7>demo: line 9"]
    assert dyndbg.remove_module("demo")
    assert "demo" not in dyndbg.control_show()
    assert not dyndbg.remove_module("demo")
    assert not dyndbg.remove_module("empty")


def test_dyndbg_parameter() -> None:
    dyndbg, printk = make()
    dyndbg.add_module("demo", module_sites(dyndbg, 5, 9))
    dyndbg.dyndbg_param("demo", None)
    assert on(dyndbg) == [5, 9]
    dyndbg.dyndbg_param("demo", "=_;line 9 +p")
    assert on(dyndbg) == [9]
    dyndbg.dyndbg_param("demo", "module livepatch line 97 +p")
    assert on(dyndbg) == [97, 9]
    dyndbg.dyndbg_param("demo", "nonsense")  # logged, nothing more
    assert log(printk) == ["<3>dyndbg: bad flag-op n, at start of nonsense", "<3>dyndbg: flags parse failed"]


def test_classes() -> None:
    dyndbg, _ = make()
    sites = [
        DebugSite(dyndbg, "gpu.c", 1, "gpu", "core", "a\n", class_id=0),
        DebugSite(dyndbg, "gpu.c", 2, "gpu", "kms", "b\n", class_id=1),
        DebugSite(dyndbg, "gpu.c", 3, "gpu", "odd", "c\n", class_id=9),
        DebugSite(dyndbg, "gpu.c", 4, "gpu", "plain", "d\n"),
    ]
    dyndbg.add_module("gpu", sites, [ClassMap(("CORE", "KMS")), ClassMap(("LATE",), base=20)])
    assert dyndbg.control_show().splitlines()[-4:] == [
        'gpu.c:1 [gpu]core =_ "a\\n" class:CORE',
        'gpu.c:2 [gpu]kms =_ "b\\n" class:KMS',
        'gpu.c:3 [gpu]odd =_ "c\\n" class unknown, _id:9',
        'gpu.c:4 [gpu]plain =_ "d\\n"',
    ]
    dyndbg.control_write("module gpu +p")
    assert on(dyndbg) == [4]  # sites with a class are left alone
    dyndbg.control_write("class KMS +p")
    assert on(dyndbg) == [2, 4]
    dyndbg.control_write("module gpu class CORE func core +p")
    assert on(dyndbg) == [1, 2, 4]
    dyndbg.control_write("class LATE +p; class NONE +p; class kms +p")
    assert on(dyndbg) == [1, 2, 4]


# its own messages


def test_verbose() -> None:
    dyndbg, printk = make()
    dyndbg.verbose = 4
    dyndbg.control_write("line 97 +p;line 1 =p # x")
    assert log(printk) == [
        "<6>dyndbg: read 24 bytes from userspace",
        '<6>dyndbg: query 0: "line 97 +p" mod:*',
        '<6>dyndbg: split into words: "line" "97" "+p"',
        "<6>dyndbg: op='+'",
        "<6>dyndbg: flags=0x1",
        "<6>dyndbg: *flagsp=0x1 *maskp=0xffffffff",
        "<6>dyndbg: parsed line 97-97",
        '<6>dyndbg: parsed: func="" file="" module="" format="" lineno=97-97 class=(null)',
        "<6>dyndbg: changed kernel/livepatch/transition.c:97 [livepatch]klp_complete_transition _ => p",
        '<6>dyndbg: applied: func="" file="" module="" format="" lineno=97-97 class=(null)',
        '<6>dyndbg: query 1: "line 1 =p # x" mod:*',
        '<6>dyndbg: split into words: "line" "1" "=p"',
        "<6>dyndbg: op='='",
        "<6>dyndbg: flags=0x1",
        "<6>dyndbg: *flagsp=0x1 *maskp=0x0",
        "<6>dyndbg: parsed line 1-1",
        '<6>dyndbg: parsed: func="" file="" module="" format="" lineno=1-1 class=(null)',
        "<6>dyndbg: no matches for query",
        '<6>dyndbg: no-match: func="" file="" module="" format="" lineno=1-1 class=(null)',
        "<6>dyndbg: processed 2 queries, with 1 matches, 0 errs",
    ]


def test_verbose_about_modules() -> None:
    dyndbg, printk = make()
    dyndbg.verbose = 2
    dyndbg.add_module("demo", module_sites(dyndbg, 1, 2))
    dyndbg.remove_module("demo")
    assert log(printk) == [
        "<6>dyndbg:   2 debug prints in module demo",
        '<6>dyndbg: removed module "demo"',
    ]
