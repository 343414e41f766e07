"""What the daemon and the sandbox say to each other.

Model
    A stream socket carries frames: four bytes of length (little-endian), then one msgpack array whose first element
    tags the message. The daemon's messages are :data:`ToSandbox`, the sandbox's :data:`FromSandbox`. Each side handles
    them in the order in which they were sent. Addresses and register values are unsigned 64-bit integers.

    Emulated threads are numbered by the daemon (*tid*). A thread is *running* from ``Call``, ``Answer`` or ``Wake`` on,
    until the sandbox says ``Event``, ``Block``, ``Done`` or ``Died`` for it; ``Unblock`` says that another thread made
    it run again. When no thread is running, the sandbox is idle.

    Names of modules and functions are bytes to the kernel, and text whose bytes need not be UTF-8 to the daemon
    (``surrogateescape``); msgpack's text must be UTF-8. Such bytes travel, and stand in the sandbox, as the private
    characters U+10FF80 to U+10FFFF; the daemon gets back what it sent.

Locks
    None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

__all__ = [
    "MAX_FRAME",
    "FrameBuffer",
    "FromSandbox",
    "ToSandbox",
    "decode_from_sandbox",
    "decode_to_sandbox",
    "encode",
    "encode_to_sandbox",
]

MAX_FRAME = 8 << 20
"""Longest frame, in bytes; anything longer means that the other side is out of its mind."""

Value = Any  # int, str, bytes, None or a list of them: what events carry


class Limits(msgspec.Struct, array_like=True, frozen=True):
    """Budgets. Instructions and kernel calls are per call and refill while its thread sleeps; the rest per module."""

    instructions: int = 100_000_000
    """Instructions that one call may execute without sleeping."""
    kernel_calls: int = 1_000_000
    """Kernel functions that one call may call without sleeping."""
    log_lines: int = 10_000
    """Log lines of a module in a row; refilled with :attr:`log_rate` a second."""
    log_rate: int = 500
    heap: int = 32 << 20
    """Bytes that one module may hold allocated."""
    quantum: int = 1_000_000
    """Instructions between two looks at the other threads."""
    threads: int = 256
    """Emulated threads alive at a time."""
    nesting: int = 16
    """Calls from stubs back into module code (constructors, comparisons) inside one another."""


class Start(msgspec.Struct, array_like=True, tag=0):
    """First message: the budgets and the machine."""

    limits: Limits
    cpus: int
    hash_key: bytes
    """Key of the hash of ``%p``."""
    canary: int


class Map(msgspec.Struct, array_like=True, tag=1):
    """Map regions ``(address, size, protection)``; their contents are in the shared memory already."""

    regions: list[tuple[int, int, int]]


class Unmap(msgspec.Struct, array_like=True, tag=2):
    """Take regions ``(address, size)`` away."""

    regions: list[tuple[int, int]]


class Stubs(msgspec.Struct, array_like=True, tag=3):
    """Kernel functions that stand at addresses from now on: ``(address, name, size)``.

    Without a stub it is but a name, for whoever prints the address.
    """

    items: list[tuple[int, str, int]]


class ModuleInfo(msgspec.Struct, array_like=True, tag=4):
    """A module was laid out."""

    name: str
    struct: int
    """Address of its ``struct module``."""
    regions: list[tuple[int, int]]
    symbols: list[tuple[int, int, str]]
    """Functions: ``(address, size, name)``, sorted."""
    orc: tuple[int, int, int]
    """Address of .orc_unwind_ip, address of .orc_unwind, number of entries."""
    jump_table: tuple[int, int]
    bug_table: tuple[int, int]


class ModuleGone(msgspec.Struct, array_like=True, tag=5):
    """A module's memory is about to be unmapped."""

    name: str


class Flush(msgspec.Struct, array_like=True, tag=6):
    """The daemon wrote to executable memory ``(address, size)``."""

    addr: int
    size: int


class Patched(msgspec.Struct, array_like=True, tag=7):
    """Calls of the function at *addr* are to be asked about (*on*) or go straight on; *site* is where it traps."""

    addr: int
    site: int
    on: bool


class TaskInfo(msgspec.Struct, array_like=True, frozen=True):
    """Whom a call runs for."""

    pid: int
    tgid: int
    comm: str
    kthread: bool = False
    uid: int = 0
    gid: int = 0


class Call(msgspec.Struct, array_like=True, tag=8):
    """Start thread *tid*: call *addr* with *args* for a task. *module* pays for it."""

    tid: int
    addr: int
    args: list[int]
    task: TaskInfo
    module: str


class Answer(msgspec.Struct, array_like=True, tag=9):
    """The answer to the event of thread *tid*."""

    tid: int
    value: Value


class Wake(msgspec.Struct, array_like=True, tag=10):
    """End the block number *seq* of thread *tid*: its time is up, or (*signal*) somebody interrupts it."""

    tid: int
    seq: int
    signal: bool = False


class Kill(msgspec.Struct, array_like=True, tag=11):
    """End thread *tid*; *reason* None: without a report."""

    tid: int
    reason: str | None = None


class Nudge(msgspec.Struct, array_like=True, tag=12):
    """``wake_up_process`` of task *pid*.

    *stop*: ``kthread_should_stop`` is true for it from now on. *signal*: ``set_notify_signal`` instead,
    ``signal_pending`` is true until it returns to user space.
    """

    pid: int
    stop: bool = False
    signal: bool = False


class Forget(msgspec.Struct, array_like=True, tag=13):
    """Task *pid* has ended."""

    pid: int


class Key(msgspec.Struct, array_like=True, tag=14):
    """Switch the static key at *addr*."""

    addr: int
    on: bool


class Tasks(msgspec.Struct, array_like=True, tag=15):
    """All processes of the machine: what ``for_each_process`` goes through."""

    items: list[TaskInfo]


ToSandbox = (
    Start
    | Map
    | Unmap
    | Stubs
    | ModuleInfo
    | ModuleGone
    | Flush
    | Patched
    | Call
    | Answer
    | Wake
    | Kill
    | Nudge
    | Forget
    | Key
    | Tasks
)


class Ready(msgspec.Struct, array_like=True, tag=0):
    """The sandbox is up. *confinement* names what holds it: rlimits, no_new_privs, seccomp."""

    confinement: list[str]
    engine: str


class Print(msgspec.Struct, array_like=True, tag=1):
    """``printk`` of thread *tid*: the text with its level prefix."""

    tid: int
    text: bytes


class Event(msgspec.Struct, array_like=True, tag=2):
    """Thread *tid* waits for the daemon to do *name*. *stack* is there if the function may block."""

    tid: int
    name: str
    args: list[Value]
    stack: list[int] | None
    reliable: bool


class Block(msgspec.Struct, array_like=True, tag=3):
    """Thread *tid* sleeps: *state* is the task's (S, D; R spins), *timeout* in nanoseconds or None."""

    tid: int
    seq: int
    state: str
    timeout: int | None
    stack: list[int]
    reliable: bool


class Unblock(msgspec.Struct, array_like=True, tag=4):
    """Thread *tid* runs again; somebody in the sandbox woke it."""

    tid: int


class Done(msgspec.Struct, array_like=True, tag=5):
    """Thread *tid* returned *value*."""

    tid: int
    value: int


class Report(msgspec.Struct, array_like=True):
    """What a crash report is made of. Register names as the kernel prints them; *trace* pairs addresses with trust."""

    kind: str
    """page_fault, gp_fault, trap, stack, budget, missing, hung, bug, warn, panic, killed."""
    text: str
    """For kinds that carry one: the reason, the message, the missing function."""
    addr: int
    """Faulting address, or 0."""
    access: str
    """read, write or fetch."""
    rip: int
    regs: dict[str, int]
    code: bytes
    """Bytes around *rip*: 42 before, 22 from it on, as far as they can be read."""
    code_at: int
    """Index in *code* of the byte at *rip*."""
    trace: list[tuple[int, bool]]
    stub: int
    """Address of the kernel function that was being called, or 0."""
    module: str


class Died(msgspec.Struct, array_like=True, tag=6):
    """Thread *tid* crashed."""

    tid: int
    report: Report


class Warned(msgspec.Struct, array_like=True, tag=7):
    """Thread *tid* ran into a warning and goes on."""

    tid: int
    report: Report


FromSandbox = Ready | Print | Event | Block | Unblock | Done | Died | Warned

_encoder = msgspec.msgpack.Encoder()
_to_sandbox = msgspec.msgpack.Decoder(ToSandbox)
_from_sandbox = msgspec.msgpack.Decoder(FromSandbox)


_MARKS = (b"\xf4\x8f\xbe", b"\xf4\x8f\xbf")
"""What the private characters begin with in UTF-8."""
_STAND_IN = {0xDC00 + byte: 0x10FF00 + byte for byte in range(0x80, 0x100)}
_REAL = {stand_in: escape for escape, stand_in in _STAND_IN.items()}
#: a name may hold those characters, too: then their bytes travel
_OWN = {char: "".join(chr(0x10FF00 + byte) for byte in chr(char).encode()) for char in _REAL}


def _to_wire(text: str) -> str:
    return text.translate(_OWN).translate(_STAND_IN)


def _from_wire(text: str) -> str:
    return text.translate(_REAL).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _texts(value: Value, change: Callable[[str], str]) -> Value:
    """*value* with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {_texts(key, change): _texts(item, change) for key, item in value.items()}
    return value


def _marked(body: bytes) -> bool:
    return any(mark in body for mark in _MARKS)


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def encode(message: msgspec.Struct) -> bytes:
    """One frame of the sandbox's."""
    return _frame(_encoder.encode(message))


def encode_to_sandbox(message: msgspec.Struct) -> bytes:
    """One frame of the daemon's."""
    try:
        body = _encoder.encode(message)
        odd = _marked(body)
    except UnicodeEncodeError:
        odd = True
    if odd:
        body = _encoder.encode(_texts(msgspec.to_builtins(message, builtin_types=(bytes,)), _to_wire))
    return _frame(body)


def decode_to_sandbox(body: bytes) -> ToSandbox:
    """A message of the daemon. Raises msgspec.ValidationError for anything else."""
    message: ToSandbox = _to_sandbox.decode(body)
    return message


def decode_from_sandbox(body: bytes) -> FromSandbox:
    """A message of the sandbox. Raises msgspec.ValidationError for anything else."""
    message: FromSandbox = _from_sandbox.decode(body)
    if _marked(body):
        message = msgspec.convert(_texts(msgspec.msgpack.decode(body), _from_wire), FromSandbox)
    return message


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add *data*; the bodies of all frames that are complete. Raises ValueError for a frame that is too long."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if size > MAX_FRAME:
                raise ValueError(f"frame of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            frames.append(bytes(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
        return frames
