"""Requests and replies of the control socket, and their strict decoding.

Every request is a JSON object with the member ``op`` and, optionally, an ``id`` that its replies repeat. Unknown
members are refused, so that a misspelt option is an error and not a silence. Binary data (a module's file) travels as
base64, which is how msgspec writes ``bytes``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta

from klpfs.control.text import from_json, to_json

#: Version of the protocol; a client refuses a daemon that speaks another one.
PROTOCOL: Final = 1
#: Largest module file that can be sent, in bytes.
MAX_MODULE: Final = 64 << 20
#: Longest request line in bytes: a module in base64 and its names.
MAX_LINE: Final = (MAX_MODULE + 2) // 3 * 4 + (256 << 10)
#: Farthest that the clock can be moved by one request, in seconds.
MAX_ADVANCE: Final = 7 * 86400
#: Largest number of tasks that one request adds.
MAX_TASKS: Final = 1_000_000

Name = Annotated[str, Meta(min_length=1, max_length=255)]
Path = Annotated[str, Meta(max_length=4096)]
Pid = Annotated[int, Meta(ge=1, le=0x7FFF_FFFF)]
Uint = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
#: A stack: the innermost function first, each ``[module:]function[+offset]`` or an address.
Stack = Annotated[list[Annotated[str, Meta(min_length=1, max_length=600)]], Meta(max_length=64)]
#: Task states as ``ps`` and /proc/<pid>/stat show them (fs/proc/array.c, task_state_array).
STATES: Final = ("R", "S", "D", "T", "t", "X", "Z", "P", "I")
StateLetter = Annotated[str, Meta(pattern="^[RSDTtXZPI]$")]


class Request(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True):
    """Base of all requests. ``id`` is repeated in the replies."""

    id: int | str | None = None


class Ping(Request, tag="ping"):
    """Is anybody there, and of which version? Result: :class:`Pong`."""


class Insmod(Request, tag="insmod"):
    """Load a module from ``data``; ``path`` is for the log only. ``args`` as finit_module(2) takes them.

    ``flags``: MODULE_INIT_IGNORE_MODVERSIONS (1), MODULE_INIT_IGNORE_VERMAGIC (2). Result: :class:`Loaded`.
    """

    data: Annotated[bytes, Meta(max_length=MAX_MODULE)]
    path: Path = ""
    args: Annotated[str, Meta(max_length=64 << 10)] = ""
    flags: Uint = 0


class Rmmod(Request, tag="rmmod"):
    """Unload a module; ``flags`` as delete_module(2) takes them (O_NONBLOCK, O_TRUNC). Result: null."""

    name: Name
    flags: Uint = 0


class Lsmod(Request, tag="lsmod"):
    """List the modules, the newest first. Result: list of :class:`ModuleInfo`."""


class Dmesg(Request, tag="dmesg"):
    """Read the log. Result: list of :class:`LogRecord`; with ``follow`` one reply a record (``more`` set).

    ``since`` is the first sequence number wanted; without it, the reading starts after the last clearing.
    ``new`` starts at the end instead.
    """

    since: Annotated[int, Meta(ge=0)] | None = None
    follow: bool = False
    new: bool = False
    clear: bool = False


class Status(Request, tag="status"):
    """Describe the emulator, its patches and its transition. Result: :class:`StatusInfo`."""


class Ps(Request, tag="ps"):
    """List the tasks. Result: list of :class:`TaskInfo`."""


class TaskAdd(Request, tag="task-add"):
    """Create ``count`` emulated tasks. Result: list of their pids.

    ``stack`` names the functions that the task sleeps in, the innermost first. ``on_cpu``: it is running, in user
    space if ``in_user``, until something else is said of it. ``wake_leaves``: see :class:`klpfs.kernel.sched.Task`.
    """

    comm: Annotated[str, Meta(min_length=1, max_length=64)] = "task"
    kthread: bool = False
    state: StateLetter = "S"
    stack: Stack = []
    reliable: bool = True
    on_cpu: bool = False
    in_user: bool = False
    wake_leaves: bool = False
    count: Annotated[int, Meta(ge=1, le=MAX_TASKS)] = 1


class TaskSet(Request, tag="task-set"):
    """Change what is given of a task's state, stack, reliability of its stack, or running. Result: TaskInfo."""

    pid: Pid
    state: StateLetter | None = None
    stack: Stack | None = None
    reliable: bool | None = None
    on_cpu: bool | None = None


class TaskWake(Request, tag="task-wake"):
    """Wake a task: it leaves the kernel. Result: :class:`TaskInfo`."""

    pid: Pid


class TaskSignal(Request, tag="task-signal"):
    """Send a signal to a task. Result: whether it still exists."""

    pid: Pid
    signal: Annotated[int, Meta(ge=0, le=64)] = 15


class TaskRemove(Request, tag="task-remove"):
    """End an emulated task. Result: null."""

    pid: Pid


class Clock(Request, tag="clock"):
    """Read the clock, or, with ``advance`` (seconds), move it forward. Result: :class:`ClockInfo`."""

    advance: Annotated[float, Meta(gt=0, le=MAX_ADVANCE)] | None = None


class Shutdown(Request, tag="shutdown"):
    """Unmount and end the daemon. Result: null, sent before the end."""


AnyRequest = (
    Ping
    | Insmod
    | Rmmod
    | Lsmod
    | Dmesg
    | Status
    | Ps
    | TaskAdd
    | TaskSet
    | TaskWake
    | TaskSignal
    | TaskRemove
    | Clock
    | Shutdown
)

#: Every operation, in the order of the documentation.
OPS: Final[tuple[str, ...]] = tuple(str(t.__struct_config__.tag) for t in AnyRequest.__args__)


class ErrorInfo(msgspec.Struct, omit_defaults=True):
    """Why a request failed.

    ``kind``: ``request`` (malformed; ``path`` names the field), ``kernel`` (refused as the kernel refuses; ``errno``
    is set), ``internal`` (a fault of the daemon's own, logged there).
    """

    kind: str
    message: str
    errno: int | None = None
    path: str | None = None


ResultT = TypeVar("ResultT")


class Reply(msgspec.Struct, Generic[ResultT], omit_defaults=True):
    """The answer to a request. ``more``: further replies to the same request follow."""

    ok: bool
    id: int | str | None = None
    result: ResultT | None = None
    error: ErrorInfo | None = None
    more: bool = False


class Pong(msgspec.Struct):
    """Who answers: klpfs's version, the protocol's, the daemon's pid, and where it is mounted."""

    version: str
    protocol: int
    pid: int
    mountpoint: str


class Loaded(msgspec.Struct):
    """A module that was loaded, by the name that it carries."""

    name: str


class ModuleInfo(msgspec.Struct):
    """A line of lsmod: name, size in bytes, refcnt, the modules that use it, initstate and taint letters."""

    name: str
    size: int
    refcnt: int
    holders: list[str]
    state: str
    taint: str


class LogRecord(msgspec.Struct):
    """A record of the kernel log. ``time`` in seconds since boot; ``level`` and ``facility`` as syslog(3) numbers."""

    seq: int
    time: float
    level: int
    facility: int
    text: str
    caller: str = ""


class FuncStatus(msgspec.Struct):
    """A function of a patch: its name, the occurrence meant (as in ``name,sympos``), and whether it is patched."""

    name: str
    sympos: int
    patched: bool


class ObjectStatus(msgspec.Struct):
    """An object of a patch (``vmlinux`` or a module), whether it is patched, and its functions."""

    name: str
    patched: bool
    funcs: list[FuncStatus]


class PatchStatus(msgspec.Struct):
    """A patch as sysfs shows it, in stack order from 1 (the oldest)."""

    name: str
    enabled: bool
    transition: bool
    replace: bool
    forced: bool
    stack_order: int
    objects: list[ObjectStatus]


class Straggler(msgspec.Struct):
    """A task that has not been switched yet, and why."""

    pid: int
    comm: str
    state: str
    reason: str


class TransitionStatus(msgspec.Struct):
    """The transition under way: its patch, its direction (``patching`` or ``unpatching``), its failed tries so far,
    how many tasks are pending and the first of them."""

    patch: str
    direction: str
    tries: int
    pending: int
    stragglers: list[Straggler]


class ClockInfo(msgspec.Struct):
    """The emulator's clock: seconds since boot and how it runs (``real``, ``scaled``, ``virtual``, ``manual``)."""

    now: float
    mode: str
    rate: float = 1.0


class StatusInfo(msgspec.Struct):
    """All of ``klpfs status``."""

    version: str
    pid: int
    mountpoint: str
    driver: str
    subtree: str
    kernel: str
    release: str
    cpus: int
    clock: ClockInfo
    tainted: int
    ftrace_enabled: int
    modules: int
    tasks: int
    patches: list[PatchStatus]
    transition: TransitionStatus | None = None


class TaskInfo(msgspec.Struct):
    """A task. ``stack`` innermost first, as ``function+0xoffset/0xsize [module]``; ``patch_state`` -1, 0 or 1 as in
    /proc; ``real`` for a process of the host."""

    pid: int
    comm: str
    kthread: bool
    state: str
    patch_state: int
    on_cpu: bool
    reliable: bool
    stack: list[str]
    real: bool = False


class ProtocolError(Exception):
    """A request or a reply that cannot be understood. ``path`` is a JSON path such as ``$.stack[0]``, or None."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path


def _split_path(text: str) -> tuple[str, str | None]:
    """Separate msgspec's ``message - at `$.path` `` into its two halves."""
    message, sep, path = text.rpartition(" - at `")
    return (message, path.rstrip("`")) if sep else (text, None)


def decode_request(line: bytes) -> AnyRequest:
    """Decode one request line. Raises :class:`ProtocolError` naming the field, and for a bad ``op`` all of them."""
    try:
        request: AnyRequest = from_json(line, AnyRequest)
        return request
    except msgspec.ValidationError as err:
        message, path = _split_path(str(err))
        if path == "$.op" or (path is None and "`op`" in message):
            message = f"{message}; an operation is one of {', '.join(OPS)}"
        raise ProtocolError(message, path or "$") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise ProtocolError(f"not a JSON object: {err}") from None


def request_id(line: bytes) -> int | str | None:
    """The ``id`` of a line that did not decode, if one can be made out, so that its refusal can be matched."""
    try:
        loose: Any = from_json(line, Any)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found = loose.get("id") if isinstance(loose, dict) else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None


def encode(obj: msgspec.Struct) -> bytes:
    """A request or a reply as a line, its newline included."""
    return to_json(obj) + b"\n"


def decode_reply(line: bytes, result_type: type[ResultT]) -> Reply[ResultT]:
    """Decode one reply line with a result of ``result_type``. Raises :class:`ProtocolError`."""
    try:
        reply: Reply[ResultT] = from_json(line, Reply[result_type])  # type: ignore[valid-type]
        return reply
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        message, path = _split_path(str(err))
        raise ProtocolError(f"reply not understood: {message}", path) from None
