"""Crash reports as the kernel words them.

Model
    The sandbox says what happened and where (:class:`klpfs.cpu.proto.Report`); here the lines of the log are made of
    it, with the names that the machine knows.

Locks
    None.

Source
    arch/x86/mm/fault.c (``show_fault_oops``), arch/x86/kernel/dumpstack.c (``__die_header``, ``show_opcodes``,
    ``show_trace_log_lvl``, ``oops_end``), arch/x86/kernel/process_64.c (``__show_regs``), arch/x86/kernel/traps.c,
    lib/dump_stack.c (``dump_stack_print_info``), lib/bug.c (``__report_bug``), kernel/panic.c (``__warn``,
    ``print_tainted_verbose``), kernel/module/main.c (``print_modules``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from klpfs.cpu import layout as L
from klpfs.cpu.layout import AREAS, U64
from klpfs.cpu.proto import Report, TaskInfo
from klpfs.kernel.kernel import KernelOops, call_trace, stack_info

__all__ = ["ModuleOops", "OopsContext", "oops_lines", "warn_lines"]

KERN_ALERT, KERN_CRIT, KERN_WARNING, KERN_DEFAULT, KERN_EMERG = 1, 2, 4, -1, 0

Line = tuple[int, str]


_LIMITS = ("missing", "hung", "budget")
"""Kinds of reports that are not about what the kernel would have stumbled over."""


class ModuleOops(KernelOops):
    """Module code crashed; the log has the report. *errno* is EFAULT, *summary* says what happened."""

    def __init__(self, number: int, summary: str, report: Report) -> None:
        missing = report.kind in _LIMITS or (report.kind == "page_fault" and _missing_data(report.addr & U64))
        super().__init__(number, summary, ends_task=not missing)
        self.summary = summary
        self.report = report


@dataclass(frozen=True, slots=True)
class OopsContext:
    """What the machine adds: the task, the names, the state of the kernel. *number* counts oopses from 1."""

    task: TaskInfo
    number: int
    release: str
    version: str
    tainted: int
    modules: str
    symbol: Callable[[int], str]
    function: Callable[[int], str]
    """Name of the function at an address, or the address."""


def _stack_info(ctx: OopsContext) -> list[str]:
    task = ctx.task
    return stack_info(task.pid, task.comm, ctx.tainted, f"{ctx.release} {ctx.version}".rstrip(), uid=task.uid)


def _registers(report: Report, ctx: OopsContext, error: int | None) -> list[str]:
    regs = {name: value & U64 for name, value in report.regs.items()}

    def reg(name: str) -> str:
        return f"{regs.get(name, 0):016x}"

    code = report.code
    if report.code_at < len(code):
        shown = " ".join(f"<{byte:02x}>" if i == report.code_at else f"{byte:02x}" for i, byte in enumerate(code))
        code_line = f"Code: {shown}"
    else:
        code_line = f"Code: Unable to access opcode bytes at 0x{(report.rip - 42) & U64:x}."
    gs = AREAS["percpu"].base
    lines = [
        f"RIP: 0010:{ctx.symbol(report.rip)}",
        code_line,
        f"RSP: 0018:{reg('rsp')} EFLAGS: {regs.get('eflags', 0):08x}",
        f"RAX: {reg('rax')} RBX: {reg('rbx')} RCX: {reg('rcx')}",
        f"RDX: {reg('rdx')} RSI: {reg('rsi')} RDI: {reg('rdi')}",
        f"RBP: {reg('rbp')} R08: {reg('r8')} R09: {reg('r9')}",
        f"R10: {reg('r10')} R11: {reg('r11')} R12: {reg('r12')}",
        f"R13: {reg('r13')} R14: {reg('r14')} R15: {reg('r15')}",
        f"FS:  0000000000000000(0000) GS:{gs:016x}(0000) knlGS:0000000000000000",
        "CS:  0010 DS: 0000 ES: 0000 CR0: 0000000080050033",
        f"CR2: {report.addr & U64:016x} CR3: 0000000000000000 CR4: 0000000000000006",
    ]
    return lines


def _trace(report: Report, ctx: OopsContext) -> list[str]:
    return call_trace(f"{'' if reliable else '? '}{ctx.symbol(addr)}" for addr, reliable in report.trace)


def _where(report: Report, ctx: OopsContext) -> str:
    """The module function that was running: the innermost one of the chain."""
    modules = AREAS["modules"]
    for addr in (report.rip, *(frame for frame, _ in report.trace)):
        if modules.base <= addr < modules.end:
            return ctx.function(addr)
    return "a function"


def _page_fault(report: Report) -> list[Line]:
    addr = report.addr & U64
    present = bool(report.access == "fetch" and report.code) or False
    error = {"read": 0, "write": 2, "fetch": 0x10}.get(report.access, 0) | (1 if present else 0)
    what = {"write": "write access", "fetch": "instruction fetch"}.get(report.access, "read access")
    lines: list[Line] = []
    if present:
        lines.append((KERN_CRIT, "kernel tried to execute NX-protected page - exploit attempt? (uid: 0)"))
    if addr < L.PAGE_SIZE:
        lines.append((KERN_ALERT, f"BUG: kernel NULL pointer dereference, address: {addr:016x}"))
    else:
        lines.append((KERN_ALERT, f"BUG: unable to handle page fault for address: {addr:016x}"))
    lines += [
        (KERN_ALERT, f"#PF: supervisor {what} in kernel mode"),
        (KERN_ALERT, f"#PF: error_code(0x{error:04x}) - {'permissions violation' if present else 'not-present page'}"),
        (KERN_ALERT, "PGD 0 P4D 0 "),
        (KERN_DEFAULT, f"Oops: Oops: {error:04x}"),
    ]
    return lines


def _missing_data(addr: int) -> bool:
    """Whether a variable of the kernel stands at *addr* which is not emulated."""
    text, data = AREAS["text"], AREAS["data"]
    return text.base <= addr < 0xFFFFFFFFA0000000 and not data.base <= addr < data.end


def _canonical(addr: int) -> bool:
    return addr >> 47 in (0, 0x1FFFF)


def _head(report: Report, ctx: OopsContext) -> tuple[list[Line], str]:
    """The lines up to the Oops line, this one last and without its number; and a summary."""
    kind, text, addr = report.kind, report.text, report.addr & U64
    where = _where(report, ctx)
    match kind:
        case "page_fault" if not _canonical(addr):
            why = f"general protection fault, probably for non-canonical address 0x{addr:x}"
            return [(KERN_DEFAULT, f"Oops: {why}: 0000")], f"{where}: {why}"
        case "page_fault":
            lines = _page_fault(report)
            if _missing_data(addr):
                lines.insert(0, (KERN_ALERT, f"{report.module}: {where} needs kernel data {ctx.symbol(addr)}"))
            return lines, f"{where}: bad {report.access or 'read'} at {addr:#x}"
        case "stack":
            line = f"BUG: TASK stack guard page was hit at {addr:016x}"
            return [(KERN_EMERG, line), (KERN_DEFAULT, "Oops: stack guard page: 0000")], f"{where}: stack overflow"
        case "missing":
            name = text or ctx.function(addr)
            line = (
                f"{report.module}: {where} needs kernel function {name}"
                if not text.startswith(("printk", "kernel data"))
                else (f"{report.module}: {where} needs {name}")
            )
            return [(KERN_ALERT, line), (KERN_DEFAULT, "Oops: unsupported kernel function: 0000")], line
        case "bug":
            lines = [(KERN_DEFAULT, "------------[ cut here ]------------"), (2, f"kernel BUG at {text}!")]
            return [*lines, (KERN_DEFAULT, "Oops: invalid opcode: 0000")], f"{where}: kernel BUG at {text}"
        case "invalid":
            return [(KERN_DEFAULT, "Oops: invalid opcode: 0000")], f"{where}: invalid opcode"
        case "gp_fault":
            return [(KERN_DEFAULT, "Oops: general protection fault: 0000")], f"{where}: {text}"
        case "trap":
            return [(KERN_DEFAULT, f"Oops: {text}: 0000")], f"{where}: {text}"
        case "hung":
            task = ctx.task
            line = f"watchdog: BUG: soft lockup - CPU#0 stuck! [{task.comm}:{task.pid}]"
            why = f"{report.module}: {where}: {text}"
            return [(KERN_EMERG, line), (KERN_ALERT, why), (KERN_DEFAULT, "Oops: soft lockup: 0000")], why
        case "budget":
            line = f"{report.module}: {where}: budget used up: {text}"
            return [(KERN_ALERT, line), (KERN_DEFAULT, "Oops: budget used up: 0000")], line
        case "panic":
            return [
                (KERN_EMERG, f"Kernel panic - not syncing: {text}"),
                (KERN_DEFAULT, "Oops: panic in a module: 0000"),
            ], f"{where}: panic: {text}"
    return [(KERN_DEFAULT, f"Oops: {text or kind}: 0000")], f"{where}: {text or kind}"


def oops_lines(report: Report, ctx: OopsContext) -> tuple[list[Line], str]:
    """The log lines of a crash, each with its level (-1: default), and one line that says what happened."""
    head, summary = _head(report, ctx)
    level, last = head[-1]
    head[-1] = (level, f"{last} [#{ctx.number}] PREEMPT SMP NOPTI")
    lines = list(head)
    if not report.regs:
        return lines, summary
    registers = _registers(report, ctx, None)
    body = [*_stack_info(ctx), *registers, *_trace(report, ctx), ctx.modules]
    if report.kind in ("page_fault", "stack") and _canonical(report.addr & U64):
        body.append(f"CR2: {report.addr & U64:016x}")
    body += ["---[ end trace 0000000000000000 ]---", *registers]
    return lines + [(KERN_DEFAULT, line) for line in body], summary


def warn_lines(report: Report, ctx: OopsContext) -> list[Line]:
    """The log lines of a WARN, after its "cut here"; or of ``dump_stack``."""
    if report.kind == "dump":
        return [(KERN_DEFAULT, line) for line in [*_stack_info(ctx), *_trace(report, ctx)]]
    first = f"WARNING: CPU: 0 PID: {ctx.task.pid} at {report.text} {ctx.symbol(report.rip)}"
    body = [ctx.modules, *_stack_info(ctx), *_registers(report, ctx, None), *_trace(report, ctx)]
    body.append("---[ end trace 0000000000000000 ]---")
    return [(KERN_WARNING, first), *((KERN_DEFAULT, line) for line in body)]
