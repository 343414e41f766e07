"""The spec language: what it takes, and what it says of what it does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from elf_support import FULL
from hypothesis import given
from hypothesis import strategies as st

from klpfs.spec import (
    Log,
    ModuleSpec,
    Output,
    Sleep,
    SleepWhile,
    SpecError,
    errno_value,
    from_data,
    from_json,
    load_spec,
    param_ref,
    parse_toml,
    render,
)

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "modules").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_specs(path: Path) -> None:
    spec = load_spec(path)
    assert path.read_text().startswith("# "), "an example explains itself"
    assert from_json(spec.to_json()) == spec


def test_there_are_enough_examples() -> None:
    assert len(EXAMPLES) >= 10
    assert any(not load_spec(path).is_livepatch for path in EXAMPLES)


def test_normalised_form_is_the_same_spec() -> None:
    spec = parse_toml(FULL)
    again = from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()


def test_steps_have_the_order_of_the_docstring() -> None:
    spec = parse_toml("""
name = "m"
kind = "module"
[[params]]
name = "go"
[[functions]]
name = "f"
log = ["one", "two"]
ops = [{ op = "log", text = "three", level = "err" }]
output = "out"
duration = 1.5
while_param = "go"
log_exit = "end"
ret = "-EBUSY"
""")
    function = spec.functions[0]
    assert function.steps() == [
        Log(text="one"),
        Log(text="two"),
        Log(text="three", level="err"),
        Output(text="out"),
        Sleep(seconds=1.5),
        SleepWhile(param="go"),
        Log(text="end"),
    ]
    assert function.ret == "-EBUSY"
    assert errno_value("-EBUSY") == -16
    assert errno_value("EBUSY") is None
    assert errno_value("-EWHAT") is None


def test_rendering() -> None:
    assert render("{{{object}}} {state}{param.x}", {"object": "vmlinux", "param.x": 3}) == "{vmlinux} 3"
    assert param_ref("$ret") == "ret"
    assert param_ref("ret") is None
    assert param_ref(3) is None


BASE = 'name = "m"\n'
PARAM = BASE + '[[params]]\nname = "p"\n'
FUNC = BASE + '[[objects]]\n[[objects.functions]]\nold_name = "f"\n'

BAD = {
    "no TOML": ("name ==", "", "not TOML: Invalid value (at line 1"),
    "no name": ("kind = 'module'", "", "required field 'name' is missing"),
    "name of another type": ("name = 3", "name", "expected str, got int"),
    "dash in a name": ("name = 'a-b'", "name", "'a-b' is no module name (letters"),
    "empty name": ("name = ''", "name", "the name is empty"),
    "long name": (f"name = '{'a' * 56}'", "name", "56 characters long (at most 55)"),
    "unknown field": (BASE + "replac = true", "", "unknown field 'replac' (did you mean 'replace'?)"),
    "unknown field far from any": (BASE + "zzz = 1", "", "known fields: author, depends"),
    "unknown kind": (BASE + "kind = 'x'", "kind", "'x' is not one of the values that are possible here"),
    "the second function": (
        FUNC + "[[objects.functions]]\nold_nam = 'x'",
        "objects[0].functions[1]",
        "unknown field 'old_nam' (did you mean 'old_name'?)",
    ),
    "sympos as text": (FUNC + "sympos = '1'", "objects[0].functions[0].sympos", "expected int, got str"),
    "negative sympos": (FUNC + "sympos = -1", "objects[0].functions[0].sympos", "-1 is out of range"),
    "no symbol": (
        BASE + "[[objects]]\n[[objects.functions]]\nold_name = 'a b'",
        "objects[0].functions[0].old_name",
        "no symbol name",
    ),
    "endless symbol": (
        BASE + f"[[objects]]\n[[objects.functions]]\nold_name = '{'a' * 512}'",
        "objects[0].functions[0].old_name",
        "512 characters long (at most 511)",
    ),
    "a patch in a plain module": (BASE + "kind = 'module'\n[[objects]]", "objects", 'set kind = "livepatch"'),
    "replace in a plain module": (BASE + "kind = 'module'\nreplace = true", "replace", 'set kind = "livepatch"'),
    "objects as number": (BASE + "objects = 3", "objects", "expected array, got int"),
    "empty object name": (BASE + "[[objects]]\nname = ''", "objects[0].name", "omit it for vmlinux"),
    "unknown parameter": (BASE + "[init]\nret = '$x'", "init.ret", "no parameter 'x'"),
    "misspelt parameter": (
        BASE + "[[params]]\nname = 'delay'\n[init]\nret = '$dely'",
        "init.ret",
        "did you mean 'delay'?",
    ),
    "neither flag nor parameter": (BASE + "replace = 'yes'", "replace", "'yes' is neither true, false nor a parameter"),
    "unknown placeholder": (BASE + "[init]\nlog = '{obj}'", "init.log", "unknown placeholder {obj} (known: {callback}"),
    "placeholder of no parameter": (BASE + "[init]\nlog = '{param.x}'", "init.log", "no parameter 'x'"),
    "lone brace": (BASE + "[init]\nlog = 'a } b'", "init.log", "a single '}'"),
    "NUL in a text": (BASE + '[init]\nlog = "a\\u0000"', "init.log", "NUL"),
    "unknown operation": (BASE + "[init]\nops = [{op = 'foo'}]", "init.ops[0].op", "unknown operation 'foo'"),
    "operation without op": (BASE + "[init]\nops = [{}]", "init.ops[0]", "required field 'op' is missing"),
    "operation's field": (
        BASE + "[init]\nops = [{op = 'log', text = 'x', x = 1}]",
        "init.ops[0]",
        "unknown field 'x' (known fields: if_param",
    ),
    "operation's missing field": (BASE + "[init]\nops = [{op = 'log'}]", "init.ops[0]", "'text' is missing"),
    "unknown state": (
        BASE + "[init]\nops = [{op = 'state_take', id = 3}]",
        "init.ops[0].id",
        "the patch has no state 3 (add [[states]] with id = 3)",
    ),
    "console_loglevel without level": (
        BASE + "[init]\nops = [{op = 'console_loglevel'}]",
        "init.ops[0]",
        "neither level nor from_state",
    ),
    "call of nothing": (
        BASE + "[init]\nops = [{op = 'call', function = 'f'}]",
        "init.ops[0].function",
        "no function 'f'",
    ),
    "work of nothing": (BASE + "[[works]]\nfunction = 'f'", "works[0].function", "no function 'f'"),
    "long thread name": (
        BASE + "[[functions]]\nname = 'f'\n[[works]]\nfunction = 'f'\ncomm = 'abcdefghijklmnop'",
        "works[0].comm",
        "at most 15",
    ),
    "negative time": (BASE + "[init]\nduration = -1", "init.duration", "-1 seconds"),
    "no number": (BASE + "[init]\nduration = nan", "init.duration", "nan seconds"),
    "delay for ever": (
        BASE + "[[functions]]\nname = 'f'\n[[works]]\nfunction = 'f'\ndelay = 'forever'",
        "works[0].delay",
        "neither a number of seconds nor a parameter",
    ),
    "returning callback": (
        BASE + "[[objects]]\n[objects.callbacks.post_patch]\nret = -1",
        "objects[0].callbacks.post_patch.ret",
        "only pre_patch can fail",
    ),
    "unknown callback": (BASE + "[[objects]]\n[objects.callbacks.pre]", "objects[0].callbacks", "unknown field 'pre'"),
    "function called init_module": (
        BASE + "[[functions]]\nname = 'init_module'",
        "functions[0].name",
        "made from [init]",
    ),
    "ambiguous export": (
        BASE + "[[functions]]\nname = 'f'\n[[functions]]\nname = 'f'\nexport = 'gpl'",
        "functions[1].export",
        "defined twice",
    ),
    "parameter twice": (PARAM + "[[params]]\nname = 'p'", "params[1].name", "defined twice"),
    "parameter's name": (BASE + "[[params]]\nname = 'a b'", "params[0].name", "no parameter name"),
    "parameter's type": (PARAM + "type = 'float'", "params[0].type", "possible: bool, invbool"),
    "permissions in words": (PARAM + "perm = 'rw'", "params[0].perm", "'rw' are no permissions"),
    "permissions too high": (PARAM + "perm = 0o1777", "params[0].perm", "no permissions"),
    "permissions for all": (PARAM + "perm = '0666'", "params[0].perm", "lets everybody write"),
    "default of another type": (PARAM + "default = 'x'", "params[0].default", "'x' is not of type int"),
    "number for text": (PARAM + "type = 'charp'\ndefault = 3", "params[0].default", "3 is no text"),
    "list without length": (PARAM + "default = [1]", "params[0].default", "no array (add max = LENGTH)"),
    "list too long": (PARAM + "max = 1\ndefault = [1, 2]", "params[0].default", "2 values for an array of 1"),
    "string without length": (PARAM + "type = 'string'", "params[0].max", "add max = 32"),
    "string too long": (
        PARAM + "type = 'string'\nmax = 2\ndefault = 'ab'",
        "params[0].default",
        "longer than max - 1 = 1",
    ),
    "use without position": (BASE + "[[objects]]\nuses = ['a,x']", "objects[0].uses[0]", "'x' is no position"),
    "huge state": (BASE + "[[states]]\nid = 1\nversion = 4294967296", "states[0].version", "out of range"),
    "modinfo key": (BASE + "[modinfo]\n'a=b' = 'x'", "modinfo", "'a=b' is no modinfo key"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "field", "problem"), BAD.values(), ids=BAD.keys())
def test_errors_name_file_field_and_remedy(text: str, field: str, problem: str) -> None:
    with pytest.raises(SpecError) as info:
        parse_toml(text, "dir/x.toml")
    assert info.value.field == field
    assert str(info.value).startswith("dir/x.toml: " + (f"{field}: " if field else ""))
    assert problem in str(info.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_spec(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"name = '\xff'")
    with pytest.raises(SpecError, match=r"not UTF-8 at byte 8"):
        load_spec(binary)
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (8 << 20) + b"\n")
    with pytest.raises(SpecError, match="larger than"):
        load_spec(big)


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(SpecError):
        parse_toml("name = " + "[" * 100_000)
    with pytest.raises(SpecError):
        from_json(b"[" * 100_000)


FIELDS = [*sorted(ModuleSpec.__struct_fields__), "op", "text", "id", "old_name", "pre_patch", "max", "x"]
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["$p", "log", "m"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(FIELDS), DATA, max_size=6))
def test_arbitrary_data_give_a_spec_or_an_error(data: dict[str, Any]) -> None:
    data.setdefault("name", "m")
    try:
        spec = from_data(data)
    except SpecError:
        return
    assert from_json(spec.to_json()) == spec


@given(st.binary(max_size=200))
def test_arbitrary_sections_give_a_spec_or_an_error(data: bytes) -> None:
    with pytest.raises(SpecError):
        from_json(data)
