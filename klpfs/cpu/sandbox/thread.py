"""Emulated threads, and what their stubs may ask of the machine.

Model
    A stub is a function of the machine, the thread and its arguments. One that can finish at once returns its result;
    one that cannot is a generator: what it yields is done, and it is resumed with the outcome.

    - ``Invoke(addr, args)``: call module code; the outcome is its result.
    - ``Ask(name, args)``: let the daemon do it; the outcome is its answer.
    - ``Sleep(state, timeout)``: sleep until woken; the outcome is a :class:`Woken`.
    - ``Spin()``: let others run; the outcome is None.

Locks
    None.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from klpfs.cpu.layout import U64

if TYPE_CHECKING:
    from klpfs.cpu.api import Api
    from klpfs.cpu.proto import TaskInfo

__all__ = ["HANDLERS", "Ask", "Crash", "Invoke", "Sleep", "Spin", "Stub", "StubFrame", "Thread", "Woken", "stub"]


class Woken(Enum):
    """Why a sleep ended."""

    WAKE = 0
    TIMEOUT = 1
    SIGNAL = 2


@dataclass(frozen=True, slots=True)
class Invoke:
    """Call module code at *addr*."""

    addr: int
    args: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """An event for the daemon."""

    name: str
    args: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sleep:
    """Sleep in *state* (S, D, or R for busy waiting), for at most *timeout* nanoseconds (None: for ever)."""

    state: str
    timeout: int | None = None


@dataclass(frozen=True, slots=True)
class Spin:
    """Try again later."""


Request = Invoke | Ask | Sleep | Spin
Steps = Generator[Request, Any, int | None]
Stub = Callable[..., "int | bool | Steps | None"]

HANDLERS: dict[str, Stub] = {}
"""The stub of each kernel function."""


def stub(*names: str) -> Callable[[Stub], Stub]:
    """Declare the stub of kernel functions *names*."""

    def register(fn: Stub) -> Stub:
        for name in names:
            if name in HANDLERS:
                raise ValueError(f"two stubs for {name}")
            HANDLERS[name] = fn
        return fn

    return register


class Crash(Exception):
    """The running thread is to die with a report. *kind* and *text* as in :class:`klpfs.cpu.proto.Report`."""

    def __init__(self, kind: str, text: str = "", addr: int = 0) -> None:
        self.kind, self.text, self.addr = kind, text, addr
        super().__init__(f"{kind}: {text}")


@dataclass(slots=True)
class StubFrame:
    """A kernel function that waits for something, and the stack pointer at its entry. *traced*: it is not really one,
    but the question which implementation a function's call is to reach."""

    api: Api
    addr: int
    steps: Steps
    rsp: int
    traced: bool = False
    called: bool = False
    """Whether it called module code: a probe's handler, for a traced one."""


@dataclass(eq=False, slots=True)
class Task:
    """A task as far as emulated code can see it: its ``task_struct`` at *addr*."""

    info: TaskInfo
    addr: int
    cred: int
    threads: int = 0
    should_stop: bool = False
    unstarted: bool = False
    """A kernel thread that was created and not woken up yet."""
    kthread_data: int = 0
    used: int = 0


@dataclass(eq=False, slots=True)
class Thread:
    """One call into module code."""

    tid: int
    module: str
    task: Task
    stack: tuple[int, int]
    rip: int
    context: Any = None
    frames: list[StubFrame] = field(default_factory=list)
    state: str = "runnable"
    """runnable, asked, asleep, dead."""
    seq: int = 0
    interruptible: bool = False
    resume: bool = False
    outcome: Any = None
    spins: int = 0
    instructions: int = 0
    kernel_calls: int = 0
    slept_at: int = 0
    busy: bool = False
    """Asleep for the scheduler only: it spins, and nothing but time ends that."""
    waits_for: int | None = None
    """The address that it sleeps on."""
    in_stub: bool = False
    """Whether it is in its innermost kernel function, not in code that this one called."""
    probing: bool = False
    """Whether a probe's handler runs: what it calls is not probed."""
    returning: list[Any] = field(default_factory=list)
    """Calls whose return address a kretprobe took, innermost last."""
    quiet: bool = True
    """Whether it passed a quiescent state since RCU last had something to free."""


def signed(value: int, bits: int = 64) -> int:
    """The two's complement reading of *value*."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def unsigned(value: int) -> int:
    """*value* as a register holds it."""
    return value & U64


class WaitQueues:
    """Threads that sleep on an address: completions, mutexes, wait queue heads; first come, first served."""

    def __init__(self) -> None:
        self._queues: dict[int, list[Thread]] = {}

    def add(self, key: int, thread: Thread) -> None:
        """*thread* waits at *key*."""
        self._queues.setdefault(key, []).append(thread)

    def remove(self, key: int, thread: Thread) -> None:
        """It does not any more."""
        queue = self._queues.get(key, [])
        if thread in queue:
            queue.remove(thread)
        if not queue:
            self._queues.pop(key, None)

    def first(self, key: int) -> Thread | None:
        """Who waits longest."""
        queue = self._queues.get(key)
        return queue[0] if queue else None

    def all(self, key: int) -> list[Thread]:
        """Everybody who waits there."""
        return list(self._queues.get(key, ()))

    def drop(self, thread: Thread) -> None:
        """*thread* died."""
        for key in list(self._queues):
            self.remove(key, thread)
