"""Dynamic debug: the switchable ``pr_debug`` sites, and the query language of their control file.

Model: a :class:`DebugSite` stands for one ``pr_debug`` in the source. Sites belong to tables, one for each module;
built-in code has tables that never go, those of loaded modules come with MODULE_STATE_COMING and go with
MODULE_STATE_GOING. A site that is off costs one attribute read. Source files, functions and formats are ASCII;
queries are any bytes, taken one character a byte.

Locks: none; everything happens on the trio thread without an await (the kernel's ddebug_lock). Listing the sites
only reads and may happen in any thread.

Source: lib/dynamic_debug.c (ddebug_exec_queries and what it calls, ddebug_proc_show, ddebug_proc_write,
__dynamic_emit_prefix, ddebug_dyndbg_module_param_cb), lib/parser.c (match_wildcard), lib/string_helpers.c
(string_unescape).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from klpfs.kernel.kstrtox import c_string, kstrtouint
from klpfs.kernel.printk import Printk

__all__ = ["ClassMap", "DebugSite", "DynamicDebug", "c_format", "match_wildcard"]

FLAG_PRINT: Final = 1
FLAG_MODNAME: Final = 2
FLAG_FUNCNAME: Final = 4
FLAG_LINENO: Final = 8
FLAG_TID: Final = 16
FLAG_SOURCENAME: Final = 32
_INCL_ANY: Final = FLAG_MODNAME | FLAG_FUNCNAME | FLAG_LINENO | FLAG_TID | FLAG_SOURCENAME

_FLAG_CHARS: Final = {
    "p": FLAG_PRINT,
    "m": FLAG_MODNAME,
    "f": FLAG_FUNCNAME,
    "s": FLAG_SOURCENAME,
    "l": FLAG_LINENO,
    "t": FLAG_TID,
    "_": 0,
}
"""Flags in the order in which they are listed."""

CLASS_DEFAULT: Final = 63  # _DPRINTK_CLASS_DFLT: sites without a class
UINT_MAX: Final = 0xFFFFFFFF
_MAXWORDS: Final = 9
_PREFIX_SIZE: Final = 128
_USER_BUF_PAGE: Final = 4096
_SPACES: Final = " \t\n\v\f\r\xa0"  # isspace() of the kernel's ctype table
_HEADER: Final = "# filename:lineno [module]function flags format\n"
_CONVERSION: Final = re.compile(r"(%[-+ #0]*(?:\*|\d+)?(?:\.(?:\*|\d+)?)?)(?:hh|h|ll|l|L|z|t|j)?([a-zA-Z%])")


def c_format(fmt: str, args: Sequence[object]) -> str:
    """Format ``args`` by a C format: ``%s %c %d %i %u %x %X %o %%`` with flags, width, precision, length modifiers.

    Raises ``TypeError`` when the arguments do not fit the format, ``ValueError`` for any other conversion.
    """
    return _CONVERSION.sub(lambda m: m[1] + ("d" if m[2] in "iu" else m[2]), fmt) % tuple(args)


def match_wildcard(pattern: str, text: str) -> bool:
    """Whether ``text`` matches ``pattern``, where ``*`` is any text and ``?`` any character.

    Of several asterisks at the end only one can match the empty text. Source: lib/parser.c.
    """
    s = p = 0
    star = False
    restart_s = restart_p = 0
    while s < len(text):
        char = pattern[p] if p < len(pattern) else ""
        if char == "?":
            s += 1
            p += 1
        elif char == "*":
            star = True
            restart_s = s
            p += 1
            if p == len(pattern):
                return True
            restart_p = p
        elif char == text[s]:
            s += 1
            p += 1
        else:
            if not star:
                return False
            restart_s += 1
            s = restart_s
            p = restart_p
    if p < len(pattern) and pattern[p] == "*":
        p += 1
    return p == len(pattern)


def _unescape(text: str) -> str:
    """Undo the backslash sequences of the classes space, octal and special; others stay. Source: string_unescape."""

    def one(match: re.Match[str]) -> str:
        what = match[1]
        if what[0] in "01234567":
            return chr(int(what, 8))
        return {"n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f", "a": "\a", "e": "\x1b"}.get(what, what)

    # an octal number ends before the digit that would make it exceed a byte
    return re.sub(r"\\([0-3][0-7]{0,2}|[4-7][0-7]?|[nrtvfae\"\\])", one, text)


@dataclass(frozen=True, slots=True)
class ClassMap:
    """Names of the classes of a module's sites: class ``base`` + i is ``names[i]`` (DECLARE_DYNDBG_CLASSMAP)."""

    names: tuple[str, ...]
    base: int = 0


class DebugSite:
    """One ``pr_debug``. Call it with the arguments of its format; it prints when its ``p`` flag is set."""

    __slots__ = ("_dyndbg", "class_id", "filename", "flags", "format", "function", "lineno", "modname", "prefix")

    def __init__(
        self,
        dyndbg: DynamicDebug,
        filename: str,
        lineno: int,
        modname: str,
        function: str,
        format: str,
        prefix: str = "",
        class_id: int = CLASS_DEFAULT,
    ) -> None:
        """See :meth:`DynamicDebug.register` for the arguments."""
        self._dyndbg = dyndbg
        self.filename = filename
        self.lineno = lineno
        self.modname = modname
        self.function = function
        self.format = format
        self.prefix = prefix
        self.class_id = class_id
        self.flags = 0

    @property
    def enabled(self) -> bool:
        """Whether the site prints: ask before computing costly arguments."""
        return bool(self.flags & FLAG_PRINT)

    def __call__(self, *args: object) -> None:
        """Print the message when enabled. Source: dynamic_pr_debug, __dynamic_pr_debug."""
        if self.flags & FLAG_PRINT:
            self.emit(c_format(self.format, args))

    def emit(self, text: str) -> None:
        """Print an already formatted message (without ``pr_fmt``), whatever the ``p`` flag says."""
        self._dyndbg.printk.printk(f"\x017{self._emit_prefix()}{self.prefix}{text}")

    def _emit_prefix(self) -> str:
        flags = self.flags
        if not flags & _INCL_ANY:
            return ""
        head = ""
        if flags & FLAG_TID:
            tid = self._dyndbg.tid()
            head = "<intr> " if tid is None else f"[{tid}] "
        where = ""
        if flags & FLAG_MODNAME:
            where += f"{self.modname}:"
        if flags & FLAG_FUNCNAME:
            where += f"{self.function}:"
        if flags & FLAG_SOURCENAME:
            where += f"{self.filename}:"
        if flags & FLAG_LINENO:
            where += f"{self.lineno}:"
        return (head + where + (" " if where else ""))[: _PREFIX_SIZE - 1]

    def describe_flags(self) -> str:
        """The flags as listed: their letters, or ``_`` for none."""
        return "".join(char for char, flag in _FLAG_CHARS.items() if self.flags & flag) or "_"


@dataclass(slots=True)
class _Table:
    modname: str
    sites: list[DebugSite] = field(default_factory=list)
    maps: list[ClassMap] = field(default_factory=list)

    def class_id(self, name: str) -> int | None:
        for classes in reversed(self.maps):  # the kernel's list has the last one first
            if name in classes.names:
                return classes.base + classes.names.index(name)
        return None

    def class_name(self, class_id: int) -> str | None:
        for classes in reversed(self.maps):
            if classes.base <= class_id < classes.base + len(classes.names):
                return classes.names[class_id - classes.base]
        return None


@dataclass(slots=True)
class _Query:
    function: str | None = None
    filename: str | None = None
    module: str | None = None
    format: str | None = None
    class_string: str | None = None
    first_lineno: int = 0
    last_lineno: int = 0


class _QueryError(Exception):
    """A query that is not understood; the message is already in the log, the answer is EINVAL."""


class DynamicDebug:
    """All sites of one machine, and their control file."""

    def __init__(self, printk: Printk, *, tid: Callable[[], int | None] = lambda: 0) -> None:
        """``tid`` gives the thread id of the task that runs, None in an interrupt (for the ``t`` flag)."""
        self.printk = printk
        self.tid = tid
        self.verbose = 0
        """Parameter dynamic_debug.verbose: 0 off, 1 modules, 2 summaries, 3 parsing, 4 each change."""
        self._tables: list[_Table] = []

    # sites

    def register(
        self,
        filename: str,
        lineno: int,
        modname: str,
        function: str,
        format: str,
        *,
        prefix: str = "",
        class_id: int = CLASS_DEFAULT,
    ) -> DebugSite:
        """Add one site to its module's table, which is made if it is not there; sites are listed in this order.

        ``filename`` is relative to the source tree, ``format`` the C format as written, with its newline, and
        ``prefix`` the ``pr_fmt`` of the file, which is printed but neither listed nor matched.
        """
        site = DebugSite(self, filename, lineno, modname, function, format, prefix, class_id)
        self._table(modname).sites.append(site)
        return site

    def _table(self, modname: str) -> _Table:
        for table in self._tables:
            if table.modname == modname:
                return table
        table = _Table(modname)
        self._tables.append(table)
        return table

    def add_module(self, modname: str, sites: Iterable[DebugSite], classes: Sequence[ClassMap] = ()) -> None:
        """A module comes: add its sites (made with this object) as a table of its own. Without sites: nothing.

        Source: ddebug_add_module.
        """
        table = _Table(modname, list(sites), list(classes))
        if not table.sites:
            return
        self._tables.append(table)
        self._info(1, f"{len(table.sites):3d} debug prints in module {modname}")

    def remove_module(self, modname: str) -> bool:
        """A module goes: forget its sites. False when it had none. Source: ddebug_remove_module."""
        for table in self._tables:
            if table.modname == modname:
                self._tables.remove(table)
                self._info(2, f'removed module "{modname}"')
                return True
        return False

    @property
    def sites(self) -> list[DebugSite]:
        """All sites, in the order of the listing."""
        return [site for table in list(self._tables) for site in list(table.sites)]

    # the control file

    def control_show(self) -> str:
        """Content of the control file. Source: ddebug_proc_show."""
        lines = [_HEADER]
        for table in list(self._tables):
            for site in list(table.sites):
                fmt = site.format.replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n")
                line = f"{site.filename}:{site.lineno} [{table.modname}]{site.function} ={site.describe_flags()}"
                line += f' "{fmt}"'
                if site.class_id != CLASS_DEFAULT:
                    name = table.class_name(site.class_id)
                    line += f" class:{name}" if name is not None else f" class unknown, _id:{site.class_id}"
                lines.append(line + "\n")
        return "".join(lines)

    def control_write(self, text: str | bytes) -> int:
        """Write the control file: queries separated by ``;`` or newlines. Returns the bytes consumed.

        Every query is carried out, also after a bad one; then ``OSError(EINVAL)``. More than 4095 bytes are refused
        with ``E2BIG``. Source: ddebug_proc_write.
        """
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        if not data:
            return 0
        if len(data) > _USER_BUF_PAGE - 1:
            self._emit(4, f"expected <{_USER_BUF_PAGE} bytes into control")
            raise OSError(errno.E2BIG, "Argument list too long")
        self._info(2, f"read {len(data)} bytes from userspace")
        if self.exec_queries(data) < 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        return len(data)

    def dyndbg_param(self, modname: str, value: str | None) -> None:
        """The module parameter ``dyndbg[=queries]``: bad queries are logged and do not stop the module.

        Source: ddebug_dyndbg_module_param_cb.
        """
        self._info(1, f'module: {modname} dyndbg="{value if value is not None else "(null)"}"')
        self.exec_queries("+p" if value is None else value, modname)

    # queries

    def exec_queries(self, text: str | bytes, modname: str | None = None) -> int:
        """Carry out the queries of ``text``: number of sites that matched, or -EINVAL when a query was bad.

        ``modname`` limits queries that name no module. Source: ddebug_exec_queries.
        """
        errors = found = count = 0
        for query in re.split("[;\n]", c_string(text).decode("latin-1")):
            query = query.lstrip(_SPACES)
            if not query or query[0] == "#":
                continue
            self._info(1, f'query {count}: "{query}" mod:{modname or "*"}')
            try:
                found += self._exec_query(query, modname)
            except _QueryError:
                errors += 1
            count += 1
        if count:
            self._info(2, f"processed {count} queries, with {found} matches, {errors} errs")
        return -errno.EINVAL if errors else found

    def _exec_query(self, text: str, modname: str | None) -> int:
        try:
            words = self._tokenize(text)
        except _QueryError:
            self._err("tokenize failed")
            raise
        try:
            flags, mask = self._parse_flags(words[-1])
        except _QueryError:
            self._err("flags parse failed")
            raise
        try:
            query = self._parse_query(words[:-1], modname)
        except _QueryError:
            self._err("query parse failed")
            raise
        found = self._change(query, flags, mask)
        self._info_query(query, "applied" if found else "no-match")
        return found

    def _tokenize(self, text: str) -> list[str]:
        words: list[str] = []
        while text := text.lstrip(_SPACES):
            if text[0] == "#":
                break
            if text[0] in "\"'":
                word, quote, rest = text[1:].partition(text[0])
                if not quote:
                    raise self._bad(f"unclosed quote: {text[1:]}")
            else:
                word = re.split(f"[{_SPACES}]", text, maxsplit=1)[0]
                rest = text[len(word) + 1 :]
            if len(words) == _MAXWORDS:
                raise self._bad(f"too many words, legal max <={_MAXWORDS}")
            words.append(word)
            text = rest
        self._info(3, "split into words:" + "".join(f' "{word}"' for word in words))
        if not words:  # cannot happen: blank queries and comments are skipped before
            raise _QueryError
        return words

    def _parse_flags(self, text: str) -> tuple[int, int]:
        """Flags to set and mask of those to keep. Source: ddebug_parse_flags."""
        if text[:1] not in ("+", "-", "="):
            raise self._bad(f"bad flag-op {text[:1]}, at start of {text}")
        self._info(3, f"op='{text[0]}'")
        flags = 0
        for char in text[1:]:
            if char not in _FLAG_CHARS:
                raise self._bad(f"unknown flag '{char}'")
            flags |= _FLAG_CHARS[char]
        self._info(3, f"flags=0x{flags:x}")
        if text[0] == "=":
            result = flags, 0
        elif text[0] == "+":
            result = flags, UINT_MAX
        else:
            result = 0, UINT_MAX & ~flags
        self._info(3, f"*flagsp=0x{result[0]:x} *maskp=0x{result[1]:x}")
        return result

    def _parse_query(self, words: list[str], modname: str | None) -> _Query:
        """Pairs of keyword and value. Source: ddebug_parse_query."""
        query = _Query()
        if len(words) % 2:
            raise self._bad("expecting pairs of match-spec <value>")
        for keyword, arg in zip(words[::2], words[1::2], strict=True):
            if keyword == "func":
                query.function = self._set(query.function, arg, "func")
            elif keyword == "file":
                name, colon, rest = arg.partition(":")
                query.filename = self._set(query.filename, name if query.filename is None else arg, "file")
                if not colon:
                    continue
                if rest[:1].isalpha() or rest[:1] in ("*", "?"):
                    query.function = self._set(query.function, rest, "func")
                else:
                    self._parse_linerange(query, rest)
            elif keyword == "module":
                query.module = self._set(query.module, arg, "module")
            elif keyword == "format":
                query.format = self._set(query.format, _unescape(arg), "format")
            elif keyword == "line":
                self._parse_linerange(query, arg)
            elif keyword == "class":
                query.class_string = self._set(query.class_string, arg, "class")
            else:
                raise self._bad(f'unknown keyword "{keyword}"')
        if query.module is None and modname:
            query.module = modname
        self._info_query(query, "parsed")
        return query

    def _set(self, old: str | None, value: str, name: str) -> str:
        if old is not None:
            raise self._bad(f"match-spec:{name} val:{old} overridden by {value}")
        return value

    def _parse_lineno(self, text: str) -> int:
        if not text:
            return 0  # "whatever"
        try:
            return kstrtouint(text.encode("latin-1"), 10)
        except OSError:
            raise self._bad(f"bad line-number: {text}") from None

    def _parse_linerange(self, query: _Query, text: str) -> None:
        first, dash, last = text.partition("-")
        if query.first_lineno or query.last_lineno:
            raise self._bad("match-spec: line used 2x")
        query.first_lineno = self._parse_lineno(first)
        if dash:
            query.last_lineno = self._parse_lineno(last) or UINT_MAX
            if query.last_lineno < query.first_lineno:
                raise self._bad(f"last-line:{_int(query.last_lineno)} < 1st-line:{_int(query.first_lineno)}")
        else:
            query.last_lineno = query.first_lineno
        self._info(3, f"parsed line {_int(query.first_lineno)}-{_int(query.last_lineno)}")

    def _change(self, query: _Query, flags: int, mask: int) -> int:
        """Apply the flags to the sites that match; returns their number. Source: ddebug_change."""
        found = 0
        for table in self._tables:
            if query.module is not None and not match_wildcard(query.module, table.modname):
                continue
            class_id: int | None = CLASS_DEFAULT  # sites with a class are left alone unless it is named
            if query.class_string is not None:
                class_id = table.class_id(query.class_string)
                if class_id is None:
                    continue
            for site in table.sites:
                if site.class_id != class_id or not _matches(query, site):
                    continue
                found += 1
                new = (site.flags & mask) | flags
                if new != site.flags:
                    old = site.describe_flags()
                    site.flags = new
                    self._info(
                        4,
                        f"changed {site.filename}:{site.lineno} [{table.modname}]{site.function} "
                        f"{old} => {site.describe_flags()}",
                    )
        if not found:
            self._info(1, "no matches for query")
        return found

    # its own messages

    def _emit(self, level: int, text: str) -> None:
        self.printk.emit(level, b"dyndbg: " + text.encode("latin-1", "replace"))

    def _err(self, text: str) -> None:
        self._emit(3, text)

    def _bad(self, text: str) -> _QueryError:
        self._err(text)
        return _QueryError(text)

    def _info(self, level: int, text: str) -> None:
        if self.verbose >= level:
            self._emit(6, text)

    def _info_query(self, query: _Query, message: str) -> None:
        self._info(
            3,
            f'{message}: func="{query.function or ""}" file="{query.filename or ""}" module="{query.module or ""}" '
            f'format="{(query.format or "").rstrip(chr(10))}" lineno={query.first_lineno}-{query.last_lineno} '
            f"class={query.class_string if query.class_string is not None else '(null)'}",
        )


def _int(value: int) -> int:
    """An unsigned int printed with %d."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _matches(query: _Query, site: DebugSite) -> bool:
    name = query.filename
    if name is not None and not (
        match_wildcard(name, site.filename) or match_wildcard(name, site.filename.rpartition("/")[2])
    ):
        return False
    if query.function is not None and not match_wildcard(query.function, site.function):
        return False
    if query.format is not None:
        if query.format.startswith("^"):
            if not site.format.startswith(query.format[1:]):
                return False
        elif query.format not in site.format:
            return False
    if query.first_lineno and site.lineno < query.first_lineno:
        return False
    return not (query.last_lineno and site.lineno > query.last_lineno)
