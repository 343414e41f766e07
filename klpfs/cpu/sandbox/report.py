"""Call chains and crash reports of the thread that runs now.

Source
    arch/x86/kernel/dumpstack.c (``show_trace_log_lvl``, ``show_opcodes``: 42 bytes before the instruction, 22 from it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klpfs.cpu import proto
from klpfs.cpu.layout import AREAS, PROT_EXEC, PROT_READ, U64
from klpfs.cpu.sandbox.engine import RBP, RSP
from klpfs.cpu.sandbox.memory import PageFault
from klpfs.cpu.sandbox.thread import StubFrame, Thread
from klpfs.cpu.sandbox.unwind import OrcTable, unwind

if TYPE_CHECKING:
    from klpfs.cpu.sandbox.machine import Machine

__all__ = ["CALLBACK", "EXIT", "bare_report", "make_report", "stack_of"]

EXIT = AREAS["text"].end - 16
"""Return address of a thread's first frame."""
CALLBACK = AREAS["text"].end - 32
"""Return address of module code that a stub called."""
_ENDS = frozenset({EXIT, CALLBACK})

Chain = list[tuple[int, bool]]


def _walk(
    m: Machine, thread: Thread, frames: list[StubFrame], rip: int, sp: int, bp: int, *, exact: bool
) -> tuple[Chain, bool]:
    """The chain from *rip* outwards, through the kernel functions of *frames* that called module code."""

    def orc(addr: int) -> OrcTable | None:
        module = m.module_at(addr)
        return module.orc if module is not None else None

    def is_return_address(word: int) -> bool:
        module = m.module_at(word)
        return module is not None and module.symbol(word) is not None and bool(m.mem.prot(word) & PROT_EXEC)

    found: Chain = []
    reliable = True
    while True:
        chain, sure, end, bp = unwind(
            m.mem, orc, is_return_address, rip, {"sp": sp, "bp": bp}, thread.stack, _ENDS, exact=exact
        )
        found += [(frame.addr, frame.reliable) for frame in chain]
        reliable = reliable and sure
        while frames and frames[-1].traced and not (end == CALLBACK and frames[-1].called):
            frames.pop()
        if end != CALLBACK or not frames:
            return found, reliable
        frame = frames.pop()
        found.append((frame.addr, True))
        rip, sp, exact = m.mem.load(frame.rsp), frame.rsp + 8, False


def _chain(m: Machine, thread: Thread) -> tuple[Chain, bool]:
    """The chain of *thread*: the kernel function that it is in comes first."""
    frames, bp = list(thread.frames), m.engine.get(RBP)
    if thread.rip in m.functions and not (thread.in_stub and frames):
        # a kernel function that needs no frame
        sp = m.engine.get(RSP)
        rest, reliable = _walk(m, thread, frames, m.mem.load(sp), sp + 8, bp, exact=False)
        return [(thread.rip, True), *rest], reliable
    if thread.in_stub and frames:
        frame = frames.pop()
        if frame.traced:
            return _walk(m, thread, frames, thread.rip, frame.rsp, bp, exact=True)
        rest, reliable = _walk(m, thread, frames, m.mem.load(frame.rsp), frame.rsp + 8, bp, exact=False)
        return [(frame.addr, True), *rest], reliable
    return _walk(m, thread, frames, thread.rip, m.engine.get(RSP), bp, exact=True)


def stack_of(m: Machine, thread: Thread) -> tuple[list[int], bool]:
    """Addresses on the stack of the running *thread*, innermost first, and whether they can be trusted."""
    try:
        chain, reliable = _chain(m, thread)
    except PageFault:
        return [], False
    return [addr for addr, _ in chain], reliable


def bare_report(kind: str, text: str, module: str) -> proto.Report:
    """A report about a call that did not even begin."""
    return proto.Report(kind, text, 0, "", 0, {}, b"", 0, [], 0, module)


def make_report(
    m: Machine, thread: Thread, kind: str, text: str = "", *, addr: int = 0, access: str = ""
) -> proto.Report:
    """What happened to the running *thread*, for the log."""
    regs = m.engine.registers()
    rip = regs["rip"] = thread.rip
    code, at = b"", 0
    for i in range(64):
        where = (rip - 42 + i) & U64
        if m.mem.prot(where) & PROT_READ:
            code += m.space.read(where, 1)
            at += i < 42
    try:
        trace = _chain(m, thread)[0][1:]
    except PageFault:
        trace = []
    stub = rip if rip in m.functions else 0
    return proto.Report(kind, text, addr, access, rip, regs, code, at, trace, stub, thread.module)
