"""The language of synthetic modules: what a module is and does, as data.

A spec is a TOML file. ``klpfs mkmod`` checks it and stores it, normalised to JSON, in a section of the ``.ko`` that it
writes; the loader reads it back from there and acts it out. The language covers what the kernel's livepatch samples
and selftests do in C (``samples/livepatch``, ``tools/testing/selftests/livepatch/test_modules``): patches with objects,
functions and ``sympos``, callbacks that log, take time and fail, system states, shadow variables, parameters that steer
all of these, target modules whose functions can be patched, and work that sleeps inside such a function.

Model: everything that happens in a module is an :class:`Action`. An action has shorthand fields (``log``, ``output``,
``duration`` ...) and a list of single operations (``ops``); :meth:`Action.steps` gives both as one list of operations
in the order in which they run, so an interpreter needs to know nothing but :data:`Op` and ``ret``.

Locks: none, all classes are immutable. Errors: :class:`SpecError`, which names the file, the field and the remedy.
"""

from __future__ import annotations

import difflib
import errno
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

#: Longest module name: MODULE_NAME_LEN less its NUL (include/linux/moduleparam.h, 64-bit).
MODULE_NAME_MAX = 55
#: Longest symbol name: KSYM_NAME_LEN less its NUL (include/linux/kallsyms.h).
SYMBOL_NAME_MAX = 511
#: Longest spec file that is read, bytes.
SPEC_MAX = 8 << 20

#: What the kernel's own test modules print for each module state, by the state's short name.
STATE_TEXT: Mapping[str, str] = {
    "LIVE": "[MODULE_STATE_LIVE] Normal state",
    "COMING": "[MODULE_STATE_COMING] Full formed, running module_init",
    "GOING": "[MODULE_STATE_GOING] Going away",
    "UNFORMED": "[MODULE_STATE_UNFORMED] Still setting it up",
}

Level = Literal["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]
#: One line or several.
Text = str | list[str]
#: An integer, ``"$parameter"`` or a negative errno such as ``"-EBUSY"``.
Value = int | str
#: A truth value or ``"$parameter"``.
Flag = bool | str
#: Seconds, ``"forever"`` (until somebody wakes the sleeper, such as the module's exit) or ``"$parameter"``.
Seconds = float | int | str

ParamType = Literal[
    "bool", "invbool", "byte", "short", "ushort", "int", "uint", "long", "ulong", "ullong", "hexint", "charp", "string"
]  # fmt: skip

_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+\Z")
_SYMBOL = re.compile(r"[A-Za-z_.$][A-Za-z0-9_.$]*\Z")
_PARAM_REF = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)\Z")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
#: Placeholders that a text may hold besides ``{param.NAME}``.
PLACEHOLDERS = frozenset({"object", "state", "info", "callback", "module", "patch", "function", "value"})


class SpecError(ValueError):
    """A spec that cannot be used: where (file and field), what is wrong, and how to put it right."""

    def __init__(self, filename: str, field: str, problem: str, remedy: str = "") -> None:
        self.filename = filename
        self.field = field
        self.problem = problem
        self.remedy = remedy
        where = f"{filename}: {field}" if field else filename
        super().__init__(f"{where}: {problem}" + (f" ({remedy})" if remedy else ""))


class _Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all parts of a spec share: immutable, named fields only, unknown ones refused."""


class _OpBase(_Base, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True, omit_defaults=True):
    """Conditions that every operation may carry; all of those given must hold.

    ``*_prev_state``: id of a system state that an earlier patch carries (``klp_get_prev_state``); ``*_param``: a
    parameter, true when it is neither 0, "N" nor empty.
    """

    if_prev_state: int | None = None
    unless_prev_state: int | None = None
    if_param: str = ""
    unless_param: str = ""


class Log(_OpBase, frozen=True, kw_only=True, tag="log"):
    """Print one line to the kernel log."""

    text: str
    level: Level = "info"


class Output(_OpBase, frozen=True, kw_only=True, tag="output"):
    """Append text to what the reader of a show function gets (``seq_printf``)."""

    text: str


class Sleep(_OpBase, frozen=True, kw_only=True, tag="sleep"):
    """Sleep, uninterruptibly but for the module's exit."""

    seconds: Seconds


class SleepWhile(_OpBase, frozen=True, kw_only=True, tag="sleep_while"):
    """Sleep in short naps as long as a parameter is true."""

    param: str


class SetParam(_OpBase, frozen=True, kw_only=True, tag="set_param"):
    """Give a parameter of the module a value, as a write to its file would."""

    param: str
    value: str


class Call(_OpBase, frozen=True, kw_only=True, tag="call"):
    """Call a function of the module: it stays on the task's stack while it sleeps."""

    function: str


class StateSet(_OpBase, frozen=True, kw_only=True, tag="state_set"):
    """``klp_get_state(patch, id)->data = value``."""

    id: int
    value: Value


class StateTake(_OpBase, frozen=True, kw_only=True, tag="state_take"):
    """Take the data of the same state over from the previous patch (``klp_get_prev_state``)."""

    id: int


class StateClear(_OpBase, frozen=True, kw_only=True, tag="state_clear"):
    """Free the data of a state."""

    id: int


class ConsoleLoglevel(_OpBase, frozen=True, kw_only=True, tag="console_loglevel"):
    """Set ``console_loglevel``; the one before may be kept in a state's data, or fetched from there."""

    level: int | None = None
    save_state: int | None = None
    from_state: int | None = None


class ShadowAlloc(_OpBase, frozen=True, kw_only=True, tag="shadow_alloc"):
    """``klp_shadow_alloc(obj, id, ...)``; ``obj`` names an object, the same name being the same object."""

    id: int
    value: Value = 0
    obj: str = "obj"
    log: str = ""


class ShadowGetOrAlloc(_OpBase, frozen=True, kw_only=True, tag="shadow_get_or_alloc"):
    """``klp_shadow_get_or_alloc(obj, id, ...)``; ``{value}`` in ``log`` is what was found or made."""

    id: int
    value: Value = 0
    obj: str = "obj"
    log: str = ""


class ShadowGet(_OpBase, frozen=True, kw_only=True, tag="shadow_get"):
    """``klp_shadow_get(obj, id)``; prints ``log`` with ``{value}``, or ``log_missing`` when there is none."""

    id: int
    obj: str = "obj"
    log: str = ""
    log_missing: str = ""


class ShadowFree(_OpBase, frozen=True, kw_only=True, tag="shadow_free"):
    """``klp_shadow_free(obj, id, dtor)``; the destructor prints ``log`` with ``{value}``."""

    id: int
    obj: str = "obj"
    log: str = ""


class ShadowFreeAll(_OpBase, frozen=True, kw_only=True, tag="shadow_free_all"):
    """``klp_shadow_free_all(id, dtor)``; the destructor prints ``log`` with ``{value}`` for each."""

    id: int
    log: str = ""


Op = (
    Log | Output | Sleep | SleepWhile | SetParam | Call | StateSet | StateTake | StateClear | ConsoleLoglevel
    | ShadowAlloc | ShadowGetOrAlloc | ShadowGet | ShadowFree | ShadowFreeAll
)  # fmt: skip


def lines(text: Text) -> list[str]:
    """A text field as a list of lines; the empty string is none."""
    if isinstance(text, str):
        return [text] if text else []
    return list(text)


class Action(_Base, frozen=True, kw_only=True):
    """Something that happens: log lines, operations, a pause, a wait, more log lines, a return value; in this order."""

    log: Text = ""
    level: Level = "info"
    ops: list[Op] = []
    output: str = ""
    duration: Seconds = 0
    while_param: str = ""
    log_exit: Text = ""
    ret: Value = 0

    def steps(self) -> list[Op]:
        """All that the action does, shorthand fields included, in order of execution."""
        out: list[Op] = [Log(text=line, level=self.level) for line in lines(self.log)]
        out += self.ops
        if self.output:
            out.append(Output(text=self.output))
        if self.duration:
            out.append(Sleep(seconds=self.duration))
        if self.while_param:
            out.append(SleepWhile(param=self.while_param))
        out += [Log(text=line, level=self.level) for line in lines(self.log_exit)]
        return out


class Function(Action, frozen=True, kw_only=True):
    """A function that the module defines. Two of one name are two local symbols, told apart by their ``sympos``.

    ``export`` puts it into the module's symbol table for others; ``notrace`` takes away its ftrace location, so that it
    cannot be patched.
    """

    name: str
    export: Literal["no", "gpl", "any"] = "no"
    notrace: bool = False


class Replacement(Action, frozen=True, kw_only=True):
    """``struct klp_func``: the function to be replaced, and what the new one does.

    ``sympos`` 0 expects the name to be unique in the object; N is its Nth occurrence. ``new_name`` is the symbol of the
    new function and defaults to ``livepatch_`` and the old name.
    """

    old_name: str
    sympos: int = 0
    new_name: str = ""

    @property
    def symbol(self) -> str:
        """Symbol name of the new function."""
        return self.new_name or f"livepatch_{self.old_name}"


class Callbacks(_Base, frozen=True, kw_only=True):
    """``struct klp_callbacks``. Only ``pre_patch`` returns a value."""

    pre_patch: Action | None = None
    post_patch: Action | None = None
    pre_unpatch: Action | None = None
    post_unpatch: Action | None = None

    NAMES: ClassVar[tuple[str, ...]] = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")

    def items(self) -> Iterator[tuple[str, Action]]:
        """The callbacks that there are, by name, in the order of the C structure."""
        for name in self.NAMES:
            action: Action | None = getattr(self, name)
            if action is not None:
                yield name, action


class Object(_Base, frozen=True, kw_only=True):
    """``struct klp_object``: ``vmlinux`` or a module, which need not be loaded yet.

    ``uses`` names unexported symbols of the object that the new functions refer to, as ``name`` or ``name,sympos``;
    they become ``.klp.sym`` symbols and a ``.klp.rela`` section.
    """

    name: str = "vmlinux"
    functions: list[Replacement] = []
    callbacks: Callbacks = Callbacks()
    uses: list[str] = []

    @property
    def is_vmlinux(self) -> bool:
        """Whether the object is the kernel itself."""
        return self.name == "vmlinux"


class State(_Base, frozen=True, kw_only=True):
    """``struct klp_state``: a system state that the patch modifies."""

    id: int
    version: int = 0


class Param(_Base, frozen=True, kw_only=True):
    """A module parameter. ``max`` is the length of an array (of any type but ``string``) or of a ``string``."""

    name: str
    type: ParamType = "int"
    perm: int | str = 0o444
    default: bool | int | str | list[int] = 0
    max: int = 0
    description: str = ""

    @property
    def mode(self) -> int:
        """Permission bits of the parameter's file; 0 when it has none."""
        return self.perm if isinstance(self.perm, int) else int(self.perm, 8)

    @property
    def default_text(self) -> str:
        """The default, as one would write it to the parameter's file."""
        value = self.default
        if self.type in ("bool", "invbool") and not isinstance(value, str):
            return "Y" if value else "N"
        if isinstance(value, list):
            return ",".join(str(v) for v in value)
        return "" if self.type in ("charp", "string") and value in (0, "") else str(value)


class Work(_Base, frozen=True, kw_only=True):
    """Work that the module's init starts: a function of the module run by a kworker or by a kthread of its own.

    ``delay``: seconds before the first run; ``every``: seconds between runs (0: one run). ``wait`` says what init waits
    for: the function's start, its end (``done``), or that it either sleeps or has ended (``settled``). ``at_exit``:
    the module's exit wakes the sleeper, or waits until it has slept its time; either way it waits for the end.
    """

    function: str
    thread: Literal["kworker", "kthread"] = "kworker"
    comm: str = ""
    delay: Seconds = 0
    every: Seconds = 0
    wait: Literal["none", "started", "settled", "done"] = "none"
    at_exit: Literal["wake", "wait"] = "wake"
    if_param: str = ""


class Init(Action, frozen=True, kw_only=True):
    """``module_init``: its steps, then the works, then, in a livepatch and unless ``ret`` is set, the enabling."""

    enable: Flag = True


class ModuleSpec(_Base, frozen=True, kw_only=True):
    """A whole module. See the module's docstring, and ``examples/modules`` for commented examples."""

    name: str
    kind: Literal["livepatch", "module"] = "livepatch"
    version: str = ""
    license: str = "GPL"
    author: Text = ""
    description: str = ""
    depends: list[str] = []
    release: str = ""
    vermagic: str = ""
    intree: bool = False
    modinfo: dict[str, str] = {}
    omit_modinfo: list[str] = []
    requires: list[str] = []
    log_prefix: str = "{module}: "
    replace: Flag = False
    objects: list[Object] = []
    states: list[State] = []
    params: list[Param] = []
    functions: list[Function] = []
    works: list[Work] = []
    init: Init = Init()
    exit: Action = Action()

    @property
    def is_livepatch(self) -> bool:
        """Whether the module carries a patch."""
        return self.kind == "livepatch"

    def function(self, name: str) -> Function | None:
        """The first function of that name, or None."""
        return next((f for f in self.functions if f.name == name), None)

    def param(self, name: str) -> Param | None:
        """The parameter of that name, or None."""
        return next((p for p in self.params if p.name == name), None)

    def actions(self) -> Iterator[tuple[str, Action]]:
        """Every action of the module with the path of its field."""
        yield "init", self.init
        yield "exit", self.exit
        for i, function in enumerate(self.functions):
            yield f"functions[{i}]", function
        for i, obj in enumerate(self.objects):
            for j, repl in enumerate(obj.functions):
                yield f"objects[{i}].functions[{j}]", repl
            for name, action in obj.callbacks.items():
                yield f"objects[{i}].callbacks.{name}", action

    def to_json(self) -> bytes:
        """The spec normalised: JSON without the fields that have their default."""
        return msgspec.json.encode(self)


def param_ref(value: object) -> str | None:
    """The parameter's name when a value is ``"$name"``, else None."""
    match = _PARAM_REF.match(value) if isinstance(value, str) else None
    return match[1] if match else None


def errno_value(text: str) -> int | None:
    """``"-EBUSY"`` as a negative number, or None when it is no such name."""
    number = getattr(errno, text[1:], None) if text.startswith("-E") else None
    return -number if isinstance(number, int) else None


def render(text: str, values: Mapping[str, object]) -> str:
    """Replace ``{name}`` by ``values[name]``; ``{{`` and ``}}`` stand for braces. What is unknown becomes empty."""

    def one(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        return str(values.get(match[1] or "", ""))

    return _PLACEHOLDER.sub(one, text)


def load_spec(path: Path | str) -> ModuleSpec:
    """Read and check a spec file.

    Raises SpecError for a malformed one, OSError when the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(SPEC_MAX + 1)
    if len(data) > SPEC_MAX:
        raise SpecError(str(path), "", f"larger than {SPEC_MAX} bytes", "is it a spec at all?")
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise SpecError(str(path), "", f"not UTF-8 at byte {exc.start}", "a spec is a TOML text file") from exc
    return parse_toml(text, str(path))


def parse_toml(text: str, filename: str = "<spec>") -> ModuleSpec:
    """Check the text of a spec. Raises SpecError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SpecError(filename, "", f"not TOML: {exc}") from exc
    except RecursionError as exc:
        raise SpecError(filename, "", "nested too deeply") from exc
    return from_data(data, filename)


def from_json(data: bytes, filename: str = "<spec>") -> ModuleSpec:
    """Check a normalised spec, as it stands in a module's section. Raises SpecError."""
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise SpecError(filename, "", f"not JSON: {exc}") from exc
    return from_data(raw, filename)


def from_data(data: object, filename: str = "<spec>") -> ModuleSpec:
    """Check plain data (dicts, lists, numbers, strings). Raises SpecError."""
    try:
        spec = msgspec.convert(data, ModuleSpec, strict=True)
    except msgspec.ValidationError as exc:
        raise _translate(str(exc), data, filename) from exc
    except RecursionError as exc:
        raise SpecError(filename, "", "nested too deeply") from exc
    _Checker(spec, filename).check()
    return spec


def _translate(message: str, data: object, filename: str) -> SpecError:
    """Turn msgspec's message, which ends in "- at `$.path`", into a SpecError with a remedy."""
    problem, _, where = message.partition(" - at `")
    field = where.rstrip("`").removeprefix("$").removeprefix(".")
    # msgspec writes "[...]" for any list item: find the first item that is wrong by checking the items one by one
    field = _locate(field, data)
    known = _fields_at(field, data)
    remedy = ""
    if found := re.search(r"unknown field `(.*)`", problem):
        name = found[1]
        problem = f"unknown field '{name}'"
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else "known fields: " + ", ".join(sorted(known))
    elif found := re.search(r"missing required field `(.*)`", problem):
        problem = f"required field '{found[1]}' is missing"
        remedy = f"add {found[1]} = ..."
    elif found := re.search(r"Expected `(.*)`, got `(.*)`", problem):
        problem = f"expected {found[1].replace('object', 'table')}, got {found[2].replace('object', 'table')}"
    elif found := re.search(r"Invalid enum value (.*)", problem):
        problem = f"{found[1]} is not one of the values that are possible here"
        remedy = _choices_at(field)
    elif found := re.search(r"Invalid value '(.*)'", problem):
        problem = f"unknown operation '{found[1]}'"
        remedy = "operations: " + ", ".join(sorted(str(t.__struct_config__.tag) for t in typing.get_args(Op)))
    return SpecError(filename, field, problem, remedy)


def _path_parts(field: str) -> list[str | int]:
    return [int(p[1:-1]) if p.startswith("[") else p for p in re.findall(r"\[\d+\]|[^.\[\]]+", field)]


def _locate(field: str, data: object) -> str:
    """Replace each "[...]" of msgspec's path by the index of the first item that does not convert."""
    while "[...]" in field:
        head, _, tail = field.partition("[...]")
        items = _data_at(head, data)
        hint = _type_at(head)
        args = typing.get_args(hint)
        if not isinstance(items, list) or not args:
            return field
        for i, item in enumerate(items):
            try:
                msgspec.convert(item, args[0], strict=True)
            except msgspec.ValidationError:
                field = f"{head}[{i}]{tail}"
                break
        else:
            return field
    return field


def _data_at(field: str, data: object) -> object:
    for part in _path_parts(field):
        try:
            data = data[part]  # type: ignore[index]  # a path that msgspec reported fits the data
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _type_at(field: str) -> Any:
    """The annotation of a field path, or None when the path leaves the structure."""
    hint: Any = ModuleSpec
    for part in _path_parts(field):
        hint = _unwrap(hint)
        if isinstance(part, int):
            args = typing.get_args(hint)
            hint = args[0] if args else None
        elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            hint = typing.get_type_hints(hint).get(part)
        else:
            return None
    return _unwrap(hint)


def _unwrap(hint: Any) -> Any:
    """``X | None`` is X; other unions stay."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        return args[0] if len(args) == 1 else hint
    return hint


def _fields_at(field: str, data: object) -> list[str]:
    hint = _type_at(field)
    candidates = list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]
    structs = [c for c in candidates if isinstance(c, type) and issubclass(c, msgspec.Struct)]
    raw = _data_at(field, data)
    if len(structs) > 1 and isinstance(raw, dict):
        structs = [s for s in structs if s.__struct_config__.tag == raw.get("op")]
    return sorted({name for s in structs for name in s.__struct_encode_fields__})


def _choices_at(field: str) -> str:
    hint = _type_at(field)
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return "possible: " + ", ".join(map(str, choices)) if choices else ""


class _Checker:
    """What the types cannot say: names, references between fields, ranges."""

    def __init__(self, spec: ModuleSpec, filename: str) -> None:
        self.spec = spec
        self.filename = filename
        self.params = {p.name for p in spec.params}
        self.functions = {f.name for f in spec.functions}

    def fail(self, field: str, problem: str, remedy: str = "") -> typing.NoReturn:
        raise SpecError(self.filename, field, problem, remedy)

    def check(self) -> None:
        spec = self.spec
        self.module_name("name", spec.name)
        for i, name in enumerate(spec.depends):
            self.module_name(f"depends[{i}]", name)
        for i, name in enumerate(spec.requires):
            self.symbol(f"requires[{i}]", name)
        for field in ("version", "license", "description", "release", "vermagic"):
            self.plain(field, getattr(spec, field))
        for i, line in enumerate(lines(spec.author)):
            self.plain(f"author[{i}]", line)
        for key, value in spec.modinfo.items():
            if not key or not re.match(r"[A-Za-z0-9_.:-]+\Z", key):
                self.fail("modinfo", f"'{key}' is no modinfo key", "letters, digits, '_', '.', ':' and '-'")
            self.plain(f"modinfo.{key}", value)
        self.text("log_prefix", spec.log_prefix)
        self.flag("replace", spec.replace)
        self.flag("init.enable", spec.init.enable)
        if not spec.is_livepatch:
            for field in ("objects", "states"):
                if getattr(spec, field):
                    self.fail(field, "a plain module carries no patch", 'set kind = "livepatch"')
            if spec.replace is not False:
                self.fail("replace", "a plain module carries no patch", 'set kind = "livepatch"')
        self.check_params()
        for i, function in enumerate(spec.functions):
            self.symbol(f"functions[{i}].name", function.name)
            if function.name in ("init_module", "cleanup_module"):
                self.fail(f"functions[{i}].name", f"'{function.name}' is made from [init] and [exit]", "rename it")
            if function.export != "no" and sum(f.name == function.name for f in spec.functions) > 1:
                self.fail(f"functions[{i}].export", f"'{function.name}' is defined twice and cannot be exported")
        for i, obj in enumerate(spec.objects):
            self.check_object(f"objects[{i}]", obj)
        for i, state in enumerate(spec.states):
            self.range(f"states[{i}].id", state.id, 0, 2**64 - 1)
            self.range(f"states[{i}].version", state.version, 0, 2**32 - 1)
        for i, work in enumerate(spec.works):
            where = f"works[{i}]"
            if work.function not in self.functions:
                self.fail(f"{where}.function", f"no function '{work.function}'", "define it in [[functions]]")
            self.seconds(f"{where}.delay", work.delay, forever=False)
            self.seconds(f"{where}.every", work.every, forever=False)
            self.param_name(f"{where}.if_param", work.if_param)
            if len(work.comm) > 15 or not work.comm.isprintable():
                self.fail(f"{where}.comm", "a task's name has at most 15 printable characters")
        for where, action in spec.actions():
            self.check_action(where, action)

    def check_params(self) -> None:
        seen: set[str] = set()
        for i, param in enumerate(self.spec.params):
            where = f"params[{i}]"
            if not re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", param.name):
                self.fail(f"{where}.name", f"'{param.name}' is no parameter name", "letters, digits and '_'")
            if param.name in seen:
                self.fail(f"{where}.name", f"'{param.name}' is defined twice", "rename one of them")
            seen.add(param.name)
            try:
                mode = param.mode
            except ValueError:
                mode = -1
            if not 0 <= mode <= 0o777:
                self.fail(f"{where}.perm", f"{param.perm!r} are no permissions", 'write "0644" or 0o644')
            if mode & 0o002:
                self.fail(f"{where}.perm", f"{mode:04o} lets everybody write", "the kernel refuses to build that")
            self.range(f"{where}.max", param.max, 0, 1 << 16)
            self.check_default(where, param)
            self.plain(f"{where}.description", param.description)

    def check_default(self, where: str, param: Param) -> None:
        value = param.default
        where += ".default"
        if param.type == "string" and param.max == 0:
            self.fail(where.replace(".default", ".max"), "a string needs its greatest length", "add max = 32")
        if param.type in ("charp", "string"):
            if isinstance(value, list) or (not isinstance(value, str) and value != 0):
                self.fail(where, f"{value!r} is no text", 'write default = "text"')
            self.plain(where, str(value))
            if param.type == "string" and isinstance(value, str) and len(value.encode()) >= param.max:
                self.fail(where, f"longer than max - 1 = {param.max - 1} bytes", "raise max")
        elif isinstance(value, list):
            if param.max == 0:
                self.fail(where, "a list for a parameter that is no array", "add max = LENGTH")
            if len(value) > param.max:
                self.fail(where, f"{len(value)} values for an array of {param.max}", "raise max")
        elif isinstance(value, str):
            self.fail(where, f"{value!r} is not of type {param.type}", "write it without quotes")

    def check_object(self, where: str, obj: Object) -> None:
        self.module_name(f"{where}.name", obj.name, empty="omit it for vmlinux")
        for j, repl in enumerate(obj.functions):
            self.symbol(f"{where}.functions[{j}].old_name", repl.old_name)
            if repl.new_name:
                self.symbol(f"{where}.functions[{j}].new_name", repl.new_name)
            self.range(f"{where}.functions[{j}].sympos", repl.sympos, 0, 2**63 - 1)
        for name, action in obj.callbacks.items():
            if name != "pre_patch" and action.ret != 0:
                self.fail(f"{where}.callbacks.{name}.ret", f"{name} returns nothing", "only pre_patch can fail")
        for j, use in enumerate(obj.uses):
            name, comma, pos = use.partition(",")
            self.symbol(f"{where}.uses[{j}]", name)
            if comma and not pos.isdecimal():
                self.fail(f"{where}.uses[{j}]", f"'{pos}' is no position", 'write "name" or "name,2"')

    def check_action(self, where: str, action: Action) -> None:
        for field in ("log", "log_exit"):
            for line in lines(getattr(action, field)):
                self.text(f"{where}.{field}", line)
        self.text(f"{where}.output", action.output)
        self.seconds(f"{where}.duration", action.duration)
        self.param_name(f"{where}.while_param", action.while_param)
        self.value(f"{where}.ret", action.ret)
        for i, op in enumerate(action.ops):
            self.check_op(f"{where}.ops[{i}]", op)

    def check_op(self, where: str, op: Op) -> None:
        self.param_name(f"{where}.if_param", op.if_param)
        self.param_name(f"{where}.unless_param", op.unless_param)
        for field in ("text", "log", "log_missing"):
            self.text(f"{where}.{field}", getattr(op, field, ""))
        match op:
            case Sleep():
                self.seconds(f"{where}.seconds", op.seconds)
            case SleepWhile() | SetParam():
                self.param_name(f"{where}.param", op.param, required=True)
            case Call():
                if op.function not in self.functions:
                    self.fail(f"{where}.function", f"no function '{op.function}'", "define it in [[functions]]")
            case StateSet() | StateTake() | StateClear():
                self.state_id(f"{where}.id", op.id)
            case ConsoleLoglevel():
                for field in ("save_state", "from_state"):
                    if (number := getattr(op, field)) is not None:
                        self.state_id(f"{where}.{field}", number)
                if op.level is None and op.from_state is None:
                    self.fail(where, "neither level nor from_state is given", "add level = 15")
            case ShadowAlloc() | ShadowGetOrAlloc() | ShadowGet() | ShadowFree() | ShadowFreeAll():
                self.range(f"{where}.id", op.id, 0, 2**64 - 1)
        if isinstance(op, StateSet | ShadowAlloc | ShadowGetOrAlloc):
            self.value(f"{where}.value", op.value)

    def state_id(self, where: str, number: int) -> None:
        if number not in {s.id for s in self.spec.states}:
            self.fail(where, f"the patch has no state {number}", f"add [[states]] with id = {number}")

    def module_name(self, where: str, name: str, empty: str = "give it a name") -> None:
        if not name:
            self.fail(where, "the name is empty", empty)
        if not _MODULE_NAME.match(name):
            self.fail(where, f"'{name}' is no module name", "letters, digits and '_'; kbuild turns '-' into '_'")
        if len(name) > MODULE_NAME_MAX:
            self.fail(where, f"{len(name)} characters long", f"at most {MODULE_NAME_MAX}")

    def symbol(self, where: str, name: str) -> None:
        if not _SYMBOL.match(name):
            self.fail(where, f"'{name}' is no symbol name", "letters, digits, '_', '.' and '$'")
        if len(name) > SYMBOL_NAME_MAX:
            self.fail(where, f"{len(name)} characters long", f"at most {SYMBOL_NAME_MAX}")

    def plain(self, where: str, text: str) -> None:
        """A text that goes into .modinfo, where a NUL ends it."""
        if "\0" in text:
            self.fail(where, "holds a NUL character", "remove it")

    def text(self, where: str, text: str) -> None:
        self.plain(where, text)
        for match in _PLACEHOLDER.finditer(text):
            if match[0] in ("{{", "}}"):
                continue
            name = match[1]
            if name is None:
                self.fail(where, f"a single '{match[0]}'", "write it twice for the character itself")
            if name.startswith("param."):
                self.param_name(where, name.removeprefix("param."), required=True)
            elif name not in PLACEHOLDERS:
                self.fail(
                    where,
                    f"unknown placeholder {{{name}}}",
                    "known: " + ", ".join(f"{{{p}}}" for p in sorted(PLACEHOLDERS)) + ", {param.NAME}",
                )

    def param_name(self, where: str, name: str, *, required: bool = False) -> None:
        if (name or required) and name not in self.params:
            close = difflib.get_close_matches(name, self.params, n=1)
            remedy = f"did you mean '{close[0]}'?" if close else "define it in [[params]]"
            self.fail(where, f"no parameter '{name}'", remedy)

    def reference(self, where: str, value: str, what: str) -> None:
        name = param_ref(value)
        if name is None:
            self.fail(where, f"'{value}' is neither {what} nor a parameter", 'parameters are written "$name"')
        self.param_name(where, name, required=True)

    def value(self, where: str, value: Value) -> None:
        if isinstance(value, int):
            self.range(where, value, -(2**63), 2**64 - 1)
        elif errno_value(value) is None:
            self.reference(where, value, "a number, an errno such as -EBUSY,")

    def flag(self, where: str, value: Flag) -> None:
        if isinstance(value, str):
            self.reference(where, value, "true, false")

    def seconds(self, where: str, value: Seconds, *, forever: bool = True) -> None:
        if isinstance(value, str):
            if not (forever and value == "forever"):
                self.reference(where, value, 'a number of seconds, "forever"' if forever else "a number of seconds")
        elif not 0 <= value <= 10**9:
            self.fail(where, f"{value} seconds", "0 to 1000000000")

    def range(self, where: str, value: int, low: int, high: int) -> None:
        if not low <= value <= high:
            self.fail(where, f"{value} is out of range", f"{low} to {high}")
