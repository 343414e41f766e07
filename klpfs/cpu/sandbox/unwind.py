"""Call chains of suspended threads.

Model
    Modules built for ORC carry, for every instruction, where the caller's frame is. A chain that can be followed to the
    thread's first frame that way is *reliable*. Code without ORC data is searched for words that look like return
    addresses, and the chain is not reliable: livepatch will not trust it.

Locks
    None.

Source
    arch/x86/kernel/unwind_orc.c (``unwind_next_frame``), arch/x86/include/asm/orc_types.h,
    arch/x86/kernel/stacktrace.c (``arch_stack_walk_reliable``).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from klpfs.cpu.layout import ORC_ENTRY_SIZE, U64

__all__ = ["Frame", "OrcTable", "unwind"]

_UNDEFINED, _PREV_SP, _BP = 0, 1, 4  # ORC_REG_*
_TYPE_CALL = 2
_MAX_FRAMES = 128


class Memory(Protocol):
    """Emulated memory."""

    def read(self, addr: int, size: int) -> bytes: ...
    def load(self, addr: int, size: int = 8) -> int: ...


class Frame(NamedTuple):
    """One entry of a chain: a return address, and whether it was found by following frames."""

    addr: int
    reliable: bool


class OrcTable:
    """The unwind data of one module: ``(address, entry)`` sorted by address."""

    def __init__(self, mem: Memory, ip_addr: int, entry_addr: int, count: int) -> None:
        ips = struct.unpack(f"<{count}i", mem.read(ip_addr, 4 * count)) if count else ()
        raw = mem.read(entry_addr, ORC_ENTRY_SIZE * count) if count else b""
        rows = []
        for i, displacement in enumerate(ips):
            sp_offset, bp_offset, flags = struct.unpack_from("<hhH", raw, ORC_ENTRY_SIZE * i)
            rows.append(((ip_addr + 4 * i + displacement) & U64, sp_offset, bp_offset, flags))
        rows.sort()
        self._addrs = [row[0] for row in rows]
        self._rows = rows

    def find(self, ip: int) -> tuple[int, int, int, int, int] | None:
        """``(sp_reg, sp_offset, bp_reg, bp_offset, type)`` for the instruction at *ip*, or None."""
        i = bisect_right(self._addrs, ip) - 1
        if i < 0:
            return None
        _, sp_offset, bp_offset, flags = self._rows[i]
        return flags & 15, sp_offset, flags >> 4 & 15, bp_offset, flags >> 8 & 7


def _step(mem: Memory, orc: tuple[int, int, int, int, int], regs: dict[str, int]) -> tuple[int, int, int] | None:
    """``(return address, sp, bp)`` of the caller, or None at the end or when it cannot be told."""
    sp_reg, sp_offset, bp_reg, bp_offset, kind = orc
    if kind != _TYPE_CALL:
        return None
    match sp_reg:
        case 5:  # SP
            sp = regs["sp"] + sp_offset
        case 4:  # BP
            sp = regs["bp"] + sp_offset
        case 9:  # SP_INDIRECT
            sp = mem.load(regs["sp"] & U64) + sp_offset
        case 8:  # BP_INDIRECT
            sp = mem.load((regs["bp"] + sp_offset) & U64)
        case 2 | 3 | 6 | 7:
            name = {2: "dx", 3: "di", 6: "r10", 7: "r13"}[sp_reg]
            if name not in regs:
                return None
            sp = regs[name] + sp_offset
        case _:
            return None
    sp &= U64
    bp = regs["bp"]
    if bp_reg == _PREV_SP:
        bp = mem.load((sp + bp_offset) & U64)
    elif bp_reg == _BP:
        bp = mem.load((bp + bp_offset) & U64)
    elif bp_reg != _UNDEFINED:
        return None
    return mem.load((sp - 8) & U64), sp, bp


def unwind(
    mem: Memory,
    find_orc: Callable[[int], OrcTable | None],
    is_return_address: Callable[[int], bool],
    ip: int,
    regs: Mapping[str, int],
    stack: tuple[int, int],
    ends: frozenset[int],
    *,
    exact: bool,
) -> tuple[list[Frame], bool, int, int]:
    """Addresses from *ip* outwards, *ip* itself included: ``(frames, reliable, end, bp)``.

    *regs* has ``sp`` and ``bp`` (others for the first frame only); *stack* is where the stack lies; *ends* are return
    addresses behind which no code stands: *end* is the one that was reached, or 0. *exact*: *ip* is that of the present
    instruction, not a return address.
    """
    frames: list[Frame] = []
    state = dict(regs)
    while ip not in ends:
        if len(frames) >= _MAX_FRAMES:
            return frames, False, 0, 0
        frames.append(Frame(ip, True))
        table = find_orc(ip)
        orc = table.find(ip if exact else ip - 1) if table is not None else None
        try:
            step = _step(mem, orc, state) if orc is not None else None
        except Exception:  # noqa: BLE001 - whatever the memory raises, the chain ends here
            step = None
        if step is None or not stack[0] <= step[1] <= stack[1] or step[1] <= state["sp"]:
            return frames + _scan(mem, is_return_address, state["sp"], stack), False, 0, 0
        ip, sp, bp = step
        state = {"sp": sp, "bp": bp}
        exact = False
    return frames, True, ip, state["bp"]


def _scan(mem: Memory, is_return_address: Callable[[int], bool], sp: int, stack: tuple[int, int]) -> list[Frame]:
    """Whatever on the rest of the stack looks like a return address (``show_trace_log_lvl`` marks these with ``?``)."""
    low = max(sp & ~7, stack[0])
    if not low < stack[1]:
        return []
    data = mem.read(low, stack[1] - low)
    words = struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])
    return [Frame(word, False) for word in words if is_return_address(word)][:_MAX_FRAMES]
