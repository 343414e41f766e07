"""Module parameters: splitting an argument string, setting, showing, and the complaints of the module loader.

Model: a :class:`ParamDesc` describes a parameter, a :class:`Param` is one with its value (``struct kernel_param``).
Values are ``bool`` for ``bool`` and ``invbool``, ``int`` for the numbers and ``bint``, ``str`` for ``charp`` and
``string`` (None is a ``charp`` that points nowhere), and lists of these for arrays. Text is ``str`` whose bytes are
read as the kernel reads them (``surrogateescape``).

Locks: none here; the module serialises access (``mod->param_lock``).

Source: kernel/params.c (parse_args, parse_one, parameq, param_set_*, param_get_*, param_array_*, param_attr_show),
lib/cmdline.c (next_arg), kernel/module/main.c (load_module, unknown_module_param_cb).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from klpfs.kernel.kstrtox import c_string, kstrtobool, kstrtox
from klpfs.kernel.printk import Logger

__all__ = [
    "PARAM_TYPES",
    "Param",
    "ParamDesc",
    "ParamValue",
    "find_param",
    "get_param",
    "next_arg",
    "parameq",
    "parse_args",
    "parse_module_args",
    "set_param",
]

_INTS: Final = {
    "byte": (8, False),
    "short": (16, True),
    "ushort": (16, False),
    "int": (32, True),
    "uint": (32, False),
    "long": (64, True),
    "ulong": (64, False),
    "ullong": (64, False),
    "hexint": (32, False),
}
PARAM_TYPES: Final = frozenset(_INTS) | {"bool", "bint", "invbool", "bool_enable_only", "charp", "string"}
"""Types of a single value; a parameter with a ``max`` and another type than ``string`` is an array of it."""

_NOARG: Final = frozenset({"bool", "bint", "bool_enable_only"})  # KERNEL_PARAM_OPS_FL_NOARG
_CHARP_MAX: Final = 1024
_PAGE_SIZE: Final = 4096
_SPACES: Final = " \t\n\v\f\r\xa0"  # isspace() of the kernel's ctype table, on bytes

Scalar = bool | int | str | None
ParamValue = Scalar | list[Scalar]


@dataclass(frozen=True, slots=True)
class ParamDesc:
    """A parameter as its module declares it."""

    name: str
    type: str
    """One of :data:`PARAM_TYPES`; of each element if it is an array."""
    perm: int = 0
    """Permission bits of its file in ``parameters/``; 0: it has none."""
    default: ParamValue = None
    """Value before anyone sets it; None is zero, the empty text, or for ``charp`` a null pointer."""
    max: int = 0
    """Elements of an array, or size in bytes of a ``string`` with its terminator; else 0."""
    counted: bool = True
    """Whether an array knows how many elements were set; one that does not shows all of them."""
    unsafe: bool = False
    """``module_param_unsafe``: setting it taints the kernel."""

    @property
    def is_array(self) -> bool:
        """Whether it takes a list of values separated by commas."""
        return self.max > 0 and self.type != "string"

    @property
    def noarg(self) -> bool:
        """Whether the bare name, without a value, sets it."""
        return self.type in _NOARG and not self.is_array

    @property
    def visible(self) -> bool:
        """Whether it has a file in ``parameters/``."""
        return self.perm != 0

    @property
    def writable(self) -> bool:
        """Whether that file has a store operation, whatever chmod says later."""
        return bool(self.perm & 0o222)

    @property
    def parmtype(self) -> str:
        """Its type as modinfo shows it."""
        return f"array of {self.type}" if self.is_array else self.type


class Param:
    """A parameter and its value."""

    __slots__ = ("desc", "num", "value")

    def __init__(self, desc: ParamDesc) -> None:
        """Raises ``ValueError`` for an unknown type, a ``string`` without ``max`` or too many default values."""
        if desc.type not in PARAM_TYPES:
            raise ValueError(f"parameter {desc.name}: unknown type {desc.type!r}")
        if desc.type == "string" and desc.max <= 0:
            raise ValueError(f"parameter {desc.name}: a string needs max, its size in bytes")
        self.desc = desc
        self.num = 0
        """Elements of an array that are set; 1 otherwise."""
        self.value: ParamValue
        if desc.is_array:
            given = list(desc.default) if isinstance(desc.default, list) else []
            if len(given) > desc.max:
                raise ValueError(f"parameter {desc.name}: {len(given)} values for an array of {desc.max}")
            self.num = len(given)
            # a module may declare billions of elements: those that nobody has set are not kept
            self.value = given
        else:
            self.num = 1
            self.value = _zero(desc.type) if desc.default is None else desc.default

    def set(self, text: str | None, log: Logger | None = None) -> None:
        """Set from text; None stands for a name without a value.

        Complaints that the set function itself makes go to ``log``. Raises ``OSError`` with ``EINVAL``, ``ERANGE``,
        ``ENOSPC`` or ``EROFS``; then a single value stays, while an array keeps the elements before the bad one.
        """
        desc = self.desc
        if text is None and not desc.noarg:
            raise OSError(errno.EINVAL, "Invalid argument")
        if not desc.is_array:
            assert not isinstance(self.value, list)
            self.value = _set_scalar(desc, text, self.value, log)
            return
        assert isinstance(self.value, list)
        assert text is not None
        self.num = 0
        for item in text.split(","):
            if self.num == desc.max:
                _complain(log, f"{desc.name}: can only take {desc.max} arguments")
                raise OSError(errno.EINVAL, "Invalid argument")
            if self.num == len(self.value):
                self.value.append(_zero(desc.type))
            self.value[self.num] = _set_scalar(desc, item, self.value[self.num], log)
            self.num += 1

    def show(self) -> bytes:
        """Content of its file: the value and a newline, but for an empty array nothing at all."""
        return c_string(get_param(self.desc, self.shown) + "\n") if self.shown != [] else b""

    @property
    def first(self) -> Scalar:
        """The value, of an array its first element."""
        if isinstance(self.value, list):
            return self.value[0] if self.value else _zero(self.desc.type)
        return self.value

    @property
    def shown(self) -> ParamValue:
        """The value, of an array only the elements that are shown: no more than a page can take."""
        if isinstance(self.value, list):
            count = min(self.num if self.desc.counted else self.desc.max, _PAGE_SIZE)
            return (self.value + [_zero(self.desc.type)] * (count - len(self.value)))[:count]
        return self.value


def _zero(kind: str) -> Scalar:
    if kind == "charp":
        return None
    if kind == "string":
        return ""
    return False if kind in ("bool", "invbool", "bool_enable_only") else 0


def _complain(log: Logger | None, text: str) -> None:
    if log is not None:
        log.err(text)


def _set_scalar(desc: ParamDesc, text: str | None, old: Scalar, log: Logger | None) -> Scalar:
    kind = desc.type
    if kind in _INTS:
        assert text is not None
        bits, signed = _INTS[kind]
        return kstrtox(text, 0, bits, signed)
    if kind == "charp":
        assert text is not None
        if len(c_string(text)) > _CHARP_MAX:
            _complain(log, f"{desc.name}: string parameter too long")
            raise OSError(errno.ENOSPC, "No space left on device")
        return _cut(text)
    if kind == "string":
        assert text is not None
        if len(c_string(text)) >= desc.max:
            _complain(log, f"{desc.name}: string doesn't fit in {desc.max - 1} chars.")
            raise OSError(errno.ENOSPC, "No space left on device")
        return _cut(text)
    value = kstrtobool("1" if text is None else text)
    if kind == "bint":
        return int(value)
    if kind == "invbool":
        return not value
    if kind == "bool_enable_only" and old and not value:
        raise OSError(errno.EROFS, "Read-only file system")
    return value


def _cut(text: str) -> str:
    return text.split("\0", 1)[0]


def set_param(desc: ParamDesc | str, text: str | None, log: Logger | None = None) -> ParamValue:
    """The value that ``text`` gives a parameter (described, or of that type), starting from its default.

    Raises ``OSError`` as :meth:`Param.set` does.
    """
    param = Param(ParamDesc("", desc) if isinstance(desc, str) else desc)
    param.set(text, log)
    return param.shown


def get_param(desc: ParamDesc | str, value: ParamValue) -> str:
    """A value as its file shows it, without the newline at its end, cut to a page.

    Source: param_get_*, param_array_get.
    """
    kind = desc if isinstance(desc, str) else desc.type
    if isinstance(value, list):
        text = ",".join(_show_scalar(kind, item) for item in value)
    else:
        text = _show_scalar(kind, value)
    return c_string(text)[: _PAGE_SIZE - 2].decode("utf-8", "surrogateescape")


def _show_scalar(kind: str, value: Scalar) -> str:
    if kind in ("bool", "bool_enable_only"):
        return "Y" if value else "N"
    if kind == "invbool":
        return "N" if value else "Y"
    if kind == "hexint":
        return f"{int(value or 0):#08x}"
    if kind in ("charp", "string"):
        return "(null)" if value is None else str(value)
    return str(int(value or 0))


# argument strings


def _to_chars(text: str) -> str:
    """One character a byte."""
    return c_string(text).decode("latin-1")


def _from_chars(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


def next_arg(args: str) -> tuple[str, str | None, str]:
    """Take the first argument of a string of one character a byte: (name, value or None, rest).

    A double quote starts or ends a stretch in which blanks do not separate; those around a whole argument or a
    whole value are dropped, others stay. Source: lib/cmdline.c, next_arg.
    """
    quoted = in_quote = args[:1] == '"'
    if quoted:
        args = args[1:]
    equals = end = 0
    while end < len(args):
        char = args[end]
        if char in _SPACES and not in_quote:
            break
        if char == "=" and equals == 0:  # a leading one does not count
            equals = end
        if char == '"':
            in_quote = not in_quote
        end += 1
    stop = end
    value: str | None = None
    if equals:
        start = equals + 1
        if args[start : start + 1] == '"':
            start += 1
            if args[end - 1] == '"':
                stop = end - 1
    if quoted and end > 0 and args[end - 1] == '"':
        stop = end - 1
    if equals:
        value = args[start:stop]
    return args[: equals or stop], value, args[end + 1 :].lstrip(_SPACES)


def _split(text: str) -> tuple[list[tuple[str, str | None]], str | None]:
    """All arguments before ``--``, and what comes after it (None without one)."""
    found: list[tuple[str, str | None]] = []
    rest = _to_chars(text).lstrip(_SPACES)
    while rest:
        name, value, rest = next_arg(rest)
        if value is None and name == "--":
            return found, _from_chars(rest)
        found.append((_from_chars(name), None if value is None else _from_chars(value)))
    return found, None


def parse_args(text: str) -> list[tuple[str, str | None]]:
    """Split an argument string into (name, value) up to ``--``; the value is None where there is no ``=``."""
    return _split(text)[0]


def parameq(a: str, b: str) -> bool:
    """Whether two names are the same parameter: ``-`` and ``_`` are one character."""
    return a.replace("-", "_") == b.replace("-", "_")


def find_param(params: Sequence[ParamDesc], name: str) -> ParamDesc | None:
    """The first parameter of that name, as :func:`parameq` compares."""
    return next((desc for desc in params if parameq(name, desc.name)), None)


async def parse_module_args(
    modname: str,
    args: str,
    params: Sequence[ParamDesc],
    set_value: Callable[[ParamDesc, str], Awaitable[None]],
    log: Logger,
    *,
    dyndbg: Callable[[str, str | None], None] | None = None,
    async_probe: Callable[[bool], None] | None = None,
    unsafe: Callable[[], None] | None = None,
) -> None:
    """Set a module's parameters from the string that insmod passes, and log what the module loader logs.

    ``set_value`` sets one parameter from text and raises ``OSError`` as the kernel's set functions do; a name without
    a value comes as ``"1"``. ``log`` has no prefix. ``dyndbg`` gets the module and the value of a ``dyndbg`` argument
    (``DynamicDebug.dyndbg_param``), ``async_probe`` that of ``async_probe``; ``unsafe`` is called to taint the kernel.

    Every argument is tried. Raises the last error as ``OSError``. Unknown names are only warned about.
    Source: parse_args, parse_one, unknown_module_param_cb, load_module.
    """
    found, after_dashes = _split(args)
    error: OSError | None = None
    for name, value in found:
        desc = find_param(params, name)
        if desc is None:
            _unknown_param(modname, name, value, log, dyndbg, async_probe)
            continue
        try:
            if value is None and not desc.noarg:
                raise OSError(errno.EINVAL, "Invalid argument")
            if desc.unsafe:
                log.notice(f"Setting dangerous option {desc.name} - tainting kernel")
                if unsafe is not None:
                    unsafe()
            await set_value(desc, "1" if value is None else value)
        except OSError as exc:
            shown = value or ""
            if desc.is_array:  # the set function has cut the text at its first comma
                shown = shown.split(",", 1)[0]
            if exc.errno == errno.ENOENT:
                log.err(f"{modname}: Unknown parameter `{name}'")
            elif exc.errno == errno.ENOSPC:
                log.err(f"{modname}: `{shown}' too large for parameter `{name}'")
            else:
                log.err(f"{modname}: `{shown}' invalid for parameter `{name}'")
            error = exc
    if error is not None:
        raise OSError(error.errno, error.strerror)
    if after_dashes is not None:
        log.warn(f"{modname}: parameters '{after_dashes}' after `--' ignored")


def _unknown_param(
    modname: str,
    name: str,
    value: str | None,
    log: Logger,
    dyndbg: Callable[[str, str | None], None] | None,
    async_probe: Callable[[bool], None] | None,
) -> None:
    if name == "async_probe":
        wanted = True
        try:
            wanted = kstrtobool(value)
        except OSError:
            pass  # without a value, or with nonsense, it is asked for
        if async_probe is not None:
            async_probe(wanted)
        return
    # the callback of dynamic debug cuts the name at its first dot, and a warning shows what is left
    head, dot, tail = name.partition(".")
    if (tail if dot else head) != "dyndbg":
        log.warn(f"{modname}: unknown parameter '{head}' ignored")
    elif dyndbg is not None:
        dyndbg(head if dot else modname, value)
