"""The emulated machine: threads, traps, modules, tasks.

Model
    One thread runs at a time, until it waits, ends or has used up its quantum. A kernel function is a trap at its
    address, which stops the engine; its stub runs here, between two runs of the engine, and the thread goes on at the
    return address. Threads that wait keep their registers in a context of the engine.

Locks
    None.

Source
    arch/x86/kernel/traps.c and arch/x86/mm/fault.c for what a fault means, kernel/kthread.c, kernel/sched/core.c.
"""

from __future__ import annotations

import random
import traceback
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from klpfs.cpu import layout as L
from klpfs.cpu import proto
from klpfs.cpu.api import API, NATIVE, Api, Kind
from klpfs.cpu.layout import AREAS, PAGE_SIZE, PROT_EXEC, PROT_READ, PROT_WRITE, U64
from klpfs.cpu.sandbox.engine import ARGUMENTS, RAX, RCX, RDX, RSP, Engine, Stop
from klpfs.cpu.sandbox.fmt import FormatEnv, UnknownFormat, VaList, vformat
from klpfs.cpu.sandbox.memory import Heap, Memory, PageFault
from klpfs.cpu.sandbox.probes import RETURN, Hook, entry_steps, frame_of_return
from klpfs.cpu.sandbox.report import CALLBACK, EXIT, bare_report, make_report, stack_of
from klpfs.cpu.sandbox.thread import (
    HANDLERS,
    Ask,
    Crash,
    Invoke,
    Sleep,
    Spin,
    StubFrame,
    Task,
    Thread,
    WaitQueues,
    Woken,
    signed,
)
from klpfs.cpu.sandbox.unwind import OrcTable
from klpfs.cpu.space import Space

__all__ = ["Machine", "Module"]

_HLT = 0xF4
"""What fills the pages of vmlinux where no stub stands: #GP."""
_TRAP = b"\xcd\x80"
"""What stands for a kernel function: a software interrupt. Unlike HLT it leaves no exception behind that would turn
the next one into a double fault."""
_TRAP_VECTOR = 0x80
_SPIN_LIMIT = 2000
_NANOSECONDS_PER_INSTRUCTION = 20
"""What an instruction is taken to last where a run ended early: the engine does not tell how many it executed."""
_SITE = _TRAP + bytes.fromhex("0f1f00")
"""The entry of a function whose calls are traced: a trap and a nop of three bytes."""
_NOP5 = bytes.fromhex("0f1f440000")


_EXCEPTIONS = {
    0: "divide error",
    1: "debug",
    3: "int3",
    4: "overflow",
    5: "bounds",
    8: "double fault",
    12: "stack segment",
    16: "coprocessor fault",
    17: "alignment check",
    19: "simd exception",
}
"""By vector, as arch/x86/kernel/traps.c words them."""


@dataclass
class Module:
    """A module's code and what its file says about it."""

    info: proto.ModuleInfo
    orc: OrcTable | None
    addrs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.addrs = [addr for addr, _, _ in self.info.symbols]

    def symbol(self, addr: int) -> tuple[str, int, int] | None:
        """``(name, offset, size)`` of the function that *addr* lies in."""
        i = bisect_right(self.addrs, addr) - 1
        if i < 0:
            return None
        start, size, name = self.info.symbols[i]
        return (name, addr - start, size) if addr < start + max(size, 1) else None


class _StackArgs:
    """The arguments of a variadic function after its named ones."""

    def __init__(self, machine: Machine, named: int, rsp: int) -> None:
        self._machine = machine
        self._index = named
        self._rsp = rsp

    def next(self) -> int:
        index, self._index = self._index, self._index + 1
        if index < len(ARGUMENTS):
            return self._machine.engine.get(ARGUMENTS[index])
        return self._machine.mem.load(self._rsp + 8 + 8 * (index - len(ARGUMENTS)))


class Machine:
    """Everything in the sandbox. *send* takes messages for the daemon."""

    def __init__(self, space: Space, start: proto.Start, send: Callable[[msgspec.Struct], None]) -> None:
        self.space = space
        self.limits = start.limits
        self.send = send
        self.mem = Memory(space)
        self.engine = Engine(space, AREAS["percpu"].base)
        self.heap = Heap(self.mem, lambda addr, size: self.map(addr, size, PROT_READ | PROT_WRITE), start.limits.heap)
        self.fmt = FormatEnv(self.mem, start.hash_key, self.symbol_text)
        self.queues = WaitQueues()
        self.modules: dict[str, Module] = {}
        self.threads: dict[int, Thread] = {}
        self.tasks: dict[int, Task] = {}
        self.runnable: deque[Thread] = deque()
        self.functions: dict[int, Api] = {}
        self.names: dict[str, int] = {}
        self.symbols: dict[int, tuple[str, int]] = {}
        """Name and size of what stands at an address of vmlinux, as far as modules came across it."""
        self.patched: dict[int, int] = {}
        """Functions whose calls are traced: address, and the site that traps."""
        self.sites: dict[int, int] = {}
        self.hooks: dict[int, list[Hook]] = {}
        """Probes of functions, by address."""
        self.objects: dict[int, Any] = {}
        """Python's side of kernel objects (IDRs, caches, lock owners), by address."""
        self.holders: dict[int, Thread] = {}
        """Who holds a lock, by its address."""
        self.reserved: dict[int, Thread] = {}
        """Who gets a lock next, because it came too late once."""
        self.printk_ratelimit = 0
        self.deferred: list[int] = []
        """What to free once no thread can see it any more (RCU)."""
        self.log_tokens: dict[str, tuple[float, int]] = {}
        self.random = random.Random(start.hash_key)
        """What modules are told is random: nobody outside the machine relies on it, and runs can be repeated."""
        self.linked: set[int] = set()
        """Tasks that are on the list of all processes."""
        self._warned: set[str] = set()
        self._doomed: Thread | None = None
        self._current: Thread | None = None
        self._free_stacks: list[int] = []
        self._next_stack = AREAS["stack"].base + L.THREAD_SIZE
        self._text_pages: set[int] = set()
        self._calls = 0
        for name in ("data", "percpu", "host"):
            self.map(AREAS[name].base, AREAS[name].size, PROT_READ | PROT_WRITE)
        for addr in (EXIT, CALLBACK, RETURN):
            self._plant(addr, _TRAP)

    # -- memory and symbols -----------------------------------------------------------------------------------------

    def map(self, addr: int, size: int, prot: int) -> None:
        """Map pages for the engine and for stubs."""
        self.engine.map(addr, size, prot)
        self.mem.map(addr, size, prot)

    def unmap(self, addr: int, size: int) -> None:
        """Unmap pages."""
        self.engine.unmap(addr, size)
        self.mem.unmap(addr, size)

    def _plant(self, addr: int, code: bytes) -> None:
        """Put a stub's *code* at *addr*; the rest of its page traps."""
        for page in {addr & -PAGE_SIZE, (addr + len(code) - 1) & -PAGE_SIZE}:
            if page not in self._text_pages:
                self._text_pages.add(page)
                self.space.fill(page, PAGE_SIZE, _HLT)
                self.map(page, PAGE_SIZE, PROT_READ | PROT_EXEC)
        self.space.write(addr, code)
        self.engine.flush(addr, len(code))

    def define(self, addr: int, name: str, size: int) -> None:
        """Kernel function *name* of *size* bytes stands at *addr*."""
        self.symbols[addr] = (name, size)
        api = API.get(name)
        if api is None:
            return
        self._plant(addr, NATIVE[name] if api.kind is Kind.NATIVE else _TRAP)
        self.functions[addr] = api
        self.names.setdefault(name, addr)

    def module_at(self, addr: int) -> Module | None:
        """The module whose memory *addr* lies in."""
        for module in self.modules.values():
            for base, size in module.info.regions:
                if base <= addr < base + size:
                    return module
        return None

    def symbol_text(self, addr: int, offset: bool, backtrace: bool) -> str:
        """``sprint_symbol``: ``name+0x1/0x2 [module]``, or the number where there is no symbol."""
        module = self.module_at(addr)
        hit = module.symbol(addr - backtrace) if module is not None else None
        if module is not None and hit is not None:
            name, at, size = hit
            return name + (f"+{at + backtrace:#x}/{size:#x}" if offset else "") + f" [{module.info.name}]"
        known = self.symbols.get(addr)
        if known is not None:
            return known[0] + (f"+0x0/{known[1]:#x}" if offset else "")
        return f"{addr:#x}"

    # -- tasks ------------------------------------------------------------------------------------------------------

    def task(self, info: proto.TaskInfo) -> Task:
        """The task of *info*, made now if it is new."""
        task = self.tasks.get(info.pid)
        if task is None:
            self._reap_tasks()
            addr = self.heap.alloc(L.TASK_SIZE, "", zero=True)
            cred = self.heap.alloc(L.CRED_SIZE, "", zero=True)
            if not addr or not cred:
                raise Crash("budget", "the heap is used up")
            task = self.tasks[info.pid] = Task(info, addr, cred)
            mem = self.mem
            for member in (L.TASK_REAL_PARENT, L.TASK_PARENT, L.TASK_GROUP_LEADER):
                mem.put(addr, member, addr)
            mem.put(addr, L.TASK_USAGE, 2)
            mem.put(addr, L.TASK_PRIO, 120)
            for member in (L.TASK_REAL_CRED, L.TASK_CRED):
                mem.put(addr, member, cred)
            mem.put(addr, L.TASK_PATCH_STATE, -1)
            mem.put(addr, L.TASK_NSPROXY, L.INIT_NSPROXY)
        task.info = info
        mem = self.mem
        if not task.threads:  # it was in user space: exit_to_user_mode_loop() has dealt with signals
            pending = 1 << L.TIF_SIGPENDING | 1 << L.TIF_NOTIFY_SIGNAL
            mem.put(task.addr, L.TASK_THREAD_FLAGS, mem.get(task.addr, L.TASK_THREAD_FLAGS) & ~pending)
        mem.put(task.addr, L.TASK_PID, info.pid)
        mem.put(task.addr, L.TASK_TGID, info.tgid)
        flags = L.PF_KTHREAD if info.kthread else 0x400000
        if info.kthread and info.comm.startswith("kworker/"):
            flags |= L.PF_WQ_WORKER
        mem.put(task.addr, L.TASK_FLAGS, flags)
        mem.write(task.addr + L.TASK_COMM.offset, info.comm.encode("utf-8", "replace")[:15].ljust(16, b"\0"))
        ids = info.uid.to_bytes(4, "little") + info.gid.to_bytes(4, "little")
        mem.write(task.cred + L.CRED_UIDS.offset, ids * 4)
        self._calls += 1
        task.used = self._calls
        return task

    def link_tasks(self, infos: list[proto.TaskInfo]) -> None:
        """Make ``init_task.tasks`` the list of all processes."""
        heads = [L.INIT_TASK + L.TASK_TASKS.offset]
        for info in infos:
            try:
                heads.append(self.task(info).addr + L.TASK_TASKS.offset)
            except Crash:
                break  # no memory for more
        for before, after in zip(heads, [*heads[1:], heads[0]], strict=True):
            self.mem.store(before, after)
            self.mem.store(after + 8, before)
        self.linked = {info.pid for info in infos}

    def task_at(self, addr: int) -> Task | None:
        """The task whose ``task_struct`` is at *addr*."""
        return next((task for task in self.tasks.values() if task.addr == addr), None)

    def forget_task(self, pid: int) -> None:
        """Free a task's structures, unless somebody holds a reference."""
        task = self.tasks.get(pid)
        if task is None or task.threads or pid in self.linked or self.mem.get(task.addr, L.TASK_USAGE) > 2:
            return
        del self.tasks[pid]
        self.heap.free(task.addr)
        self.heap.free(task.cred)

    def _reap_tasks(self) -> None:
        if len(self.tasks) < 256:
            return
        idle = sorted((t for t in self.tasks.values() if not t.threads and not t.info.kthread), key=lambda t: t.used)
        for task in idle[:64]:
            self.forget_task(task.info.pid)

    # -- threads ----------------------------------------------------------------------------------------------------

    def start_call(self, call: proto.Call) -> None:
        """A thread is born."""
        if len(self.threads) >= self.limits.threads:
            self.send(proto.Died(call.tid, bare_report("budget", "too many threads", call.module)))
            return
        if self._free_stacks:
            stack = self._free_stacks.pop()
        else:
            # one unmapped page below each stack
            stack = self._next_stack + PAGE_SIZE
            self._next_stack = stack + L.THREAD_SIZE
            if self._next_stack > AREAS["stack"].end:
                self.send(proto.Died(call.tid, bare_report("budget", "no stack left", call.module)))
                return
            self.map(stack, L.THREAD_SIZE, PROT_READ | PROT_WRITE)
        try:
            task = self.task(call.task)
        except Crash as crash:
            self._free_stacks.append(stack)
            self.send(proto.Died(call.tid, bare_report(crash.kind, crash.text, call.module)))
            return
        task.threads += 1
        thread = Thread(call.tid, call.module, task, (stack, stack + L.THREAD_SIZE), call.addr)
        self._leave()
        thread.context = self.engine.fresh_context()
        self.engine.restore(thread.context)
        self._current = thread
        self._bind(thread)
        rsp = stack + L.THREAD_SIZE - 64
        self.mem.store(rsp, EXIT)
        self.engine.set(RSP, rsp)
        for reg, value in zip(ARGUMENTS, call.args, strict=False):
            self.engine.set(reg, value & U64)
        thread.slept_at = self.now()
        self.threads[call.tid] = thread
        # What the daemon calls while another thread waits for it comes first: it is the same flow of control.
        self.runnable.appendleft(thread)

    def _bind(self, thread: Thread) -> None:
        hot = AREAS["percpu"].base + L.PERCPU_HOT
        self.space.put(hot, L.PCPU_CURRENT, thread.task.addr)
        self.space.put(hot, L.PCPU_TOP_OF_STACK, thread.stack[1])
        self.space.put(thread.task.addr, L.TASK_STACK, thread.stack[0])

    def _leave(self) -> None:
        current, self._current = self._current, None
        if current is not None and current.state != "dead":
            self.engine.save(current.context)

    def _enter(self, thread: Thread) -> None:
        if self._current is not thread:
            self._leave()
            self.engine.restore(thread.context)
            self._current = thread
            self._bind(thread)

    def _bury(self, thread: Thread) -> None:
        thread.state = "dead"
        for frame in thread.frames:
            frame.steps.close()
        thread.frames.clear()
        self.queues.drop(thread)
        self.threads.pop(thread.tid, None)
        thread.task.threads -= 1
        self._free_stacks.append(thread.stack[0])
        if self._current is thread:
            self._current = None
        if thread in self.runnable:
            self.runnable.remove(thread)

    def ready(self, thread: Thread, outcome: object) -> None:
        """Let *thread* run again, its stub resumed with *outcome*."""
        self._refill(thread)
        thread.seq += 1
        thread.state = "runnable"
        thread.resume, thread.outcome = thread.in_stub, outcome
        thread.quiet = True
        self.runnable.append(thread)

    def wake(self, thread: Thread, outcome: object = Woken.WAKE) -> bool:
        """End the sleep of *thread*, from within the sandbox; False if it does not sleep."""
        if thread.state != "asleep":
            return False
        self.send(proto.Unblock(thread.tid))
        self.ready(thread, outcome)
        return True

    def now(self) -> int:
        """Nanoseconds since boot."""
        return self.space.load(L.TIME_PAGE + L.TIME_MONOTONIC)

    def jiffies(self) -> int:
        """The kernel's tick counter."""
        return self.space.load(L.TIME_PAGE + L.TIME_JIFFIES)

    # -- running ----------------------------------------------------------------------------------------------------

    def run_slice(self) -> bool:
        """Run the next thread for a while. Whether all that is runnable merely spins."""
        thread = self.runnable.popleft()
        self._enter(thread)
        spinning = False
        try:
            if thread.resume:
                thread.resume = False
                outcome, thread.outcome = thread.outcome, None
                if not self._advance(thread, outcome):
                    return thread.spins > 0 and all(t.spins for t in self.runnable)
            thread.spins = 0
            while self._step(thread):
                pass
            spinning = thread.spins > 0
        except PageFault as fault:
            self._die(thread, "page_fault", addr=fault.addr, access="write" if fault.write else "read")
        except UnknownFormat as unknown:
            self._die(thread, "missing", f"printk format {unknown.args[0]}")
        except Crash as crash:
            self._die(thread, crash.kind, crash.text, addr=crash.addr)
        except Exception as error:  # noqa: BLE001 - whatever it is: the sandbox lives on, and the traceback is printed
            # A fault of a stub ends its caller, not the sandbox with every other module.
            traceback.print_exc()
            self._die(thread, "missing", f"a working stub: {type(error).__name__}: {error}")
        return spinning and all(t.spins for t in self.runnable)

    def _charge(self, thread: Thread, instructions: int) -> None:
        thread.instructions += instructions
        if thread.instructions > self.limits.instructions:
            raise Crash("budget", f"{self.limits.instructions} instructions without a pause")

    def _step(self, thread: Thread) -> bool:
        """Run until something happens; whether *thread* may go on at once."""
        import time

        begin = time.thread_time_ns()
        stop = self.engine.run(thread.rip, self.limits.quantum)
        thread.rip = stop.rip
        if stop.kind != "quantum":
            self._charge(thread, (time.thread_time_ns() - begin) // _NANOSECONDS_PER_INSTRUCTION)
        if stop.kind == "interrupt" and stop.number == _TRAP_VECTOR:
            thread.rip = (stop.rip - len(_TRAP)) & U64
            return self._trap(thread, thread.rip)
        if stop.kind == "gp":
            return self._privileged(thread, stop.rip)
        if stop.kind == "quantum":
            self._charge(thread, self.limits.quantum)
            # Busy code takes time: the daemon moves the clock on, and other threads get their turn.
            self._sleep(thread, Sleep("R", 0))
            return False
        if stop.kind == "invalid":
            return self._undefined(thread)
        if stop.kind == "fault":
            if stop.access == "fetch":
                self._bad_jump(thread, stop)
            raise Crash("page_fault", stop.access, stop.addr)
        if stop.kind == "interrupt":
            if self.mem.prot(thread.rip - 2) and self.space.read(thread.rip - 2, 1) == b"\xcd":
                thread.rip -= 2
                raise Crash("gp_fault", f"int {stop.number:#x}")
            if stop.number == 3:
                thread.rip -= 1
            raise Crash("trap", _EXCEPTIONS.get(stop.number, f"exception {stop.number}"))
        raise Crash("gp_fault", f"{stop.kind} instruction in a module")

    def _bad_jump(self, thread: Thread, stop: Stop) -> None:
        """Code went where no code is: an unsupported kernel function, or nowhere."""
        text = AREAS["text"]
        if text.base <= stop.addr < text.end:
            raise Crash("missing", "", stop.addr)

    def _trap(self, thread: Thread, rip: int) -> bool:
        api = self.functions.get(rip)
        if api is not None:
            return self._kernel_call(thread, api, rip)
        if rip == EXIT:
            value = self.engine.get(RAX)
            self.send(proto.Done(thread.tid, value))
            self._bury(thread)
            return False
        if rip == CALLBACK:
            if not thread.frames:
                raise Crash("gp_fault", "returned from a call that nobody made")
            return self._advance(thread, self.engine.get(RAX))
        if rip == RETURN and thread.returning:
            thread.frames.append(frame_of_return(self, thread, thread.returning.pop()))
            return self._advance(thread, None)
        if rip in self.sites:
            return self._traced_entry(thread, self.sites[rip], rip)
        raise Crash("gp_fault", f"int {_TRAP_VECTOR:#x}")

    def _privileged(self, thread: Thread, rip: int) -> bool:
        """#GP: instructions that kernel code may use and ring 3 may not. The harmless ones are emulated."""
        text = AREAS["text"]
        if text.base <= rip < text.end:
            raise Crash("missing", "", rip)
        code = self.space.read(rip, 3) if self.mem.prot(rip) and self.mem.prot(rip + 2) else b""
        if code[:1] in (b"\xfa", b"\xfb"):  # cli, sti: there are no interrupts
            thread.rip = rip + 1
            self.engine.renew()
            return True
        if code[:2] == b"\x0f\x31" or code == b"\x0f\x01\xf9":  # rdtsc, rdtscp: the core's clock at 1 GHz
            self.engine.renew()
            now = self.now()
            self.engine.set(RAX, now & L.U32)
            self.engine.set(RDX, now >> 32)
            if len(code) == 3 and code[1] == 1:
                self.engine.set(RCX, 0)
                rip += 1
            thread.rip = rip + 2
            return True
        raise Crash("gp_fault", "privileged instruction")

    def _undefined(self, thread: Thread) -> bool:
        """#UD: WARN and BUG are ud2 with an entry in the module's __bug_table."""
        rip = thread.rip
        module = self.module_at(rip)
        if module is not None and self.space.read(rip, 2) in (b"\x0f\x0b", b"\x0f\xb9"):
            entry = self._bug_entry(module, rip)
            if entry:
                flags = self.space.get(entry, L.BUG_FLAGS)
                where = self.space.load(entry + 4, 4)
                file = self.mem.cstring((entry + 4 + signed(where, 32)) & U64, 256).decode("utf-8", "replace")
                text = f"{file}:{self.space.get(entry, L.BUG_LINE)}"
                if not flags & L.BUGFLAG_WARNING:
                    raise Crash("bug", text)
                if flags & L.BUGFLAG_ONCE:
                    if flags & L.BUGFLAG_DONE:
                        thread.rip = rip + 2
                        return True
                    self.space.put(entry, L.BUG_FLAGS, flags | L.BUGFLAG_DONE)
                if not flags & L.BUGFLAG_NO_CUT_HERE:
                    self.print(thread, b"\x014------------[ cut here ]------------\n")
                self.count_log(thread.module, 20)
                self.send(proto.Warned(thread.tid, make_report(self, thread, "warn", text)))
                thread.rip = rip + 2
                return True
        raise Crash("invalid", "")

    def _bug_entry(self, module: Module, rip: int) -> int:
        base, size = module.info.bug_table
        for entry in range(base, base + size, L.BUG_ENTRY_SIZE):
            if (entry + signed(self.space.load(entry, 4), 32)) & U64 == rip:
                return entry
        return 0

    def _traced_entry(self, thread: Thread, function: int, site: int) -> bool:
        thread.rip = site + len(_SITE)
        return self._ask_ftrace(thread, function, thread.rip)

    def _ask_ftrace(self, thread: Thread, function: int, after: int) -> bool:
        if function in self.hooks and not thread.probing:
            steps = entry_steps(self, thread, function, after)
            thread.frames.append(StubFrame(_FTRACE, function, steps, self.engine.get(RSP), traced=True))
            return self._advance(thread, None)
        steps = _ftrace_steps()
        next(steps)
        thread.frames.append(StubFrame(_FTRACE, function, steps, self.engine.get(RSP), traced=True))
        thread.in_stub = True
        self._await(thread, Ask("ftrace", [function]), stack=False)
        return False

    # -- kernel calls -----------------------------------------------------------------------------------------------

    def _kernel_call(self, thread: Thread, api: Api, addr: int, *, traced: bool = True) -> bool:
        if traced and addr in self.patched:
            return self._ask_ftrace(thread, addr, 0)
        thread.kernel_calls += 1
        if thread.kernel_calls > self.limits.kernel_calls:
            raise Crash("budget", f"{self.limits.kernel_calls} kernel calls without a pause")
        rsp = self.engine.get(RSP)
        result = HANDLERS[api.stub](self, thread, *self._arguments(api, rsp))
        if isinstance(result, Generator):
            thread.frames.append(StubFrame(api, addr, result, rsp))
            return self._advance(thread, None)
        self._return(thread, int(result) if result is not None else 0, rsp)
        return True

    def _arguments(self, api: Api, rsp: int) -> list[Any]:
        values: list[Any] = []
        for i, kind in enumerate(api.args):
            raw = self.engine.get(ARGUMENTS[i]) if i < 6 else self.mem.load(rsp + 8 + 8 * (i - 6))
            match kind:
                case "ptr" | "ulong" | "size":
                    values.append(raw)
                case "int":
                    values.append(signed(raw, 32))
                case "uint":
                    values.append(raw & L.U32)
                case "long":
                    values.append(signed(raw))
                case "bool":
                    values.append(bool(raw & 0xFF))
                case "str":
                    values.append(self.mem.cstring(raw, 1 << 16))
                case "fmt":
                    fmt = self.mem.cstring(raw, 1 << 16)
                    values.append(vformat(self.fmt, fmt, _StackArgs(self, i + 1, rsp)))
                case "va":
                    fmt = self.mem.cstring(raw, 1 << 16)
                    values.append(vformat(self.fmt, fmt, VaList(self.mem, self.engine.get(ARGUMENTS[i + 1]))))
                case "fmtptr":
                    values.append(raw)
                    values.append(_StackArgs(self, i + 1, rsp))
                case _:
                    raise ValueError(f"{api.name}: argument type {kind}")
        return values

    def _return(self, thread: Thread, value: int, rsp: int) -> None:
        """``ret`` from a kernel function."""
        thread.rip = self.mem.load(rsp)
        self.engine.set(RSP, rsp + 8)
        self.engine.set(RAX, value & U64)

    def _advance(self, thread: Thread, outcome: object) -> bool:
        """Resume the innermost stub; whether the thread may go on at once."""
        frame = thread.frames[-1]
        thread.in_stub = True
        if not frame.traced:
            # Whatever happens now happens in the kernel function, called from where it was called.
            thread.rip = frame.addr
            self.engine.set(RSP, frame.rsp)
        try:
            request = frame.steps.send(outcome)
        except StopIteration as stop:
            thread.frames.pop()
            thread.in_stub = False
            if not frame.traced:
                self._return(thread, int(stop.value) if stop.value is not None else 0, frame.rsp)
            elif stop.value:
                thread.rip = stop.value
            elif frame.addr in self.functions:
                return self._kernel_call(thread, self.functions[frame.addr], frame.addr, traced=False)
            return True
        match request:
            case Invoke(addr, args):
                if sum(not f.traced for f in thread.frames) > self.limits.nesting:
                    raise Crash("budget", "calls from kernel functions nested too deeply")
                frame.called = True
                rsp = (frame.rsp - 128 & -16) - 8
                self.mem.store(rsp, CALLBACK)
                self.engine.set(RSP, rsp)
                for reg, value in zip(ARGUMENTS, args, strict=False):
                    self.engine.set(reg, value & U64)
                thread.rip, thread.in_stub = addr, False
                return True
            case Ask():
                if self._doomed is thread:
                    self._doomed = None
                    self._bury(thread)
                    return False
                self._await(thread, request, stack=frame.api.blocks)
                return False
            case Sleep():
                self._sleep(thread, request)
                return False
            case Spin():
                thread.spins += 1
                if thread.spins > _SPIN_LIMIT:
                    raise Crash("hung", f"stuck in {frame.api.name}")
                thread.resume, thread.outcome = True, None
                self.runnable.append(thread)
                return False
        raise TypeError(f"a stub yielded {request!r}")

    def _await(self, thread: Thread, ask: Ask, *, stack: bool) -> None:
        thread.state = "asked"
        trace, reliable = stack_of(self, thread) if stack else (None, True)
        self.send(proto.Event(thread.tid, ask.name, ask.args, trace, reliable))

    def _sleep(self, thread: Thread, sleep: Sleep) -> None:
        thread.state = "asleep"
        thread.seq += 1
        thread.quiet = True
        thread.interruptible, thread.busy = sleep.state == "S", sleep.state == "R"
        thread.slept_at = self.now()
        trace, reliable = stack_of(self, thread)
        self.send(proto.Block(thread.tid, thread.seq, sleep.state, sleep.timeout, trace, reliable))

    def timer_expired(self, message: proto.Wake) -> None:
        """The daemon ends a sleep."""
        thread = self.threads.get(message.tid)
        if thread is None or thread.state != "asleep" or thread.seq != message.seq:
            return
        self.ready(thread, Woken.SIGNAL if message.signal else Woken.TIMEOUT)

    def _refill(self, thread: Thread) -> None:
        """Budgets are for busy code: sleeping a second earns a whole one."""
        if thread.state == "asleep" and thread.in_stub:
            slept = min(max(self.now() - thread.slept_at, 0), 1_000_000_000)
            share = slept / 1_000_000_000
            thread.instructions = max(0, thread.instructions - int(self.limits.instructions * share))
            thread.kernel_calls = max(0, thread.kernel_calls - int(self.limits.kernel_calls * share))

    def answer(self, message: proto.Answer) -> None:
        """The daemon answers an event."""
        thread = self.threads.get(message.tid)
        if thread is not None and thread.state == "asked":
            self.ready(thread, message.value)
            # The caller of a kernel function is served before those that merely run.
            self.runnable.remove(thread)
            self.runnable.appendleft(thread)

    def kill(self, message: proto.Kill) -> None:
        """End a thread, wherever it is."""
        thread = self.threads.get(message.tid)
        if thread is None:
            return
        if message.reason is None:
            self._bury(thread)
            return
        self._enter(thread)
        self._die(thread, "killed", message.reason)

    def nudge(self, message: proto.Nudge) -> None:
        """Wake a task's threads up."""
        task = self.tasks.get(message.pid)
        if task is None:
            return
        if message.stop:
            task.should_stop = True
        if message.signal:
            flags = self.mem.get(task.addr, L.TASK_THREAD_FLAGS)
            self.mem.put(task.addr, L.TASK_THREAD_FLAGS, flags | 1 << L.TIF_NOTIFY_SIGNAL)
        self.wake_task(task, signal=message.signal)

    def wake_task(self, task: Task, *, signal: bool = False) -> bool:
        """``wake_up_process``: the task is running from now on; whether it slept."""
        self.mem.put(task.addr, L.TASK_STATE, L.TASK_RUNNING)
        woken = False
        for thread in list(self.threads.values()):
            asleep = thread.task is task and thread.state == "asleep" and not thread.busy
            if asleep and (thread.interruptible or not signal):
                woken = self.wake(thread, Woken.SIGNAL if signal else Woken.WAKE) or woken
        return woken

    def collect(self) -> None:
        """Free what RCU let go, once every thread has been seen asleep, new or finished since."""
        if self.deferred and all(t.quiet or t.state == "asleep" for t in self.threads.values()):
            for addr in self.deferred:
                self.heap.free(addr)
            self.deferred.clear()

    # -- printing ---------------------------------------------------------------------------------------------------

    def count_log(self, module: str, lines: int = 1) -> None:
        """Charge *module* for log lines."""
        limits = self.limits
        tokens, then = self.log_tokens.get(module, (float(limits.log_lines), self.now()))
        now = self.now()
        tokens = min(limits.log_lines, tokens + (now - then) / 1e9 * limits.log_rate) - lines
        if tokens < 0:
            raise Crash("budget", f"{limits.log_lines} log lines in a row")
        self.log_tokens[module] = (tokens, now)

    def print(self, thread: Thread, text: bytes) -> None:
        """``printk``."""
        self.count_log(thread.module)
        self.send(proto.Print(thread.tid, text[:2048]))

    def warn(self, thread: Thread, where: str, message: str = "", *, once: bool = False) -> None:
        """``WARN()`` in a kernel function."""
        if once:
            if where in self._warned:
                return
            self._warned.add(where)
        self.print(thread, b"\x014------------[ cut here ]------------\n")
        if message:
            self.print(thread, f"\x014{message}\n".encode())
        self.count_log(thread.module, 20)
        self.send(proto.Warned(thread.tid, make_report(self, thread, "warn", where)))

    def caller(self, thread: Thread) -> int:
        """The return address of the kernel function that *thread* is entering."""
        return self.mem.load(self.engine.get(RSP))

    def dump(self, thread: Thread) -> None:
        """``dump_stack``."""
        self.send(proto.Warned(thread.tid, make_report(self, thread, "dump")))

    def finish(self, thread: Thread, value: int) -> None:
        """End *thread* from within a kernel function, as if its first function had returned *value*."""
        self.send(proto.Done(thread.tid, value & U64))
        self._doomed = thread

    # -- patched functions ------------------------------------------------------------------------------------------

    def set_patched(self, message: proto.Patched) -> None:
        """Trace the calls of a function, or stop it."""
        addr, site = message.addr, message.site
        if message.on:
            self.patched[addr] = site
        else:
            site = self.patched.pop(addr, site)
        if addr in self.functions or not self.mem.prot(site):
            return
        if message.on:
            self.sites[site] = addr
        else:
            self.sites.pop(site, None)
        self.space.write(site, _SITE if message.on else _NOP5)
        self.engine.flush(site, 5)

    def set_key(self, key: int, enabled: int) -> None:
        """Set the count of a static key (``static_key_enable`` and its kin)."""
        before = signed(self.mem.load(key, 4), 32)
        self.mem.store(key, enabled, 4)
        if (before > 0) != (enabled > 0):
            self.update_jump_labels(key)

    def update_jump_labels(self, key: int) -> None:
        """Static key *key* was switched: rewrite the branches that depend on it (``jump_label_update``)."""
        enabled = signed(self.mem.load(key, 4), 32) > 0
        for module in self.modules.values():
            base, size = module.info.jump_table
            for entry in range(base, base + size, L.JUMP_ENTRY_SIZE):
                relative = signed(self.space.load(entry + 8))
                if (entry + 8 + (relative & ~3)) & U64 != key:
                    continue
                code = (entry + signed(self.space.load(entry, 4), 32)) & U64
                target = (entry + 4 + signed(self.space.load(entry + 4, 4), 32)) & U64
                self._patch_branch(code, target, jump=enabled != bool(relative & 1))

    def write_text(self, addr: int, code: bytes) -> None:
        """``text_poke`` in a module."""
        self.mem.check(addr, len(code))
        self.space.write(addr, code)
        self.engine.flush(addr, len(code))

    def _patch_branch(self, code: int, target: int, *, jump: bool) -> None:
        short = self.space.read(code, 2) in (b"\x66\x90",) or self.space.read(code, 1) == b"\xeb"
        if short:
            text = b"\xeb" + bytes([target - code - 2 & 0xFF]) if jump else b"\x66\x90"
        else:
            text = b"\xe9" + (target - code - 5 & L.U32).to_bytes(4, "little") if jump else _NOP5
        self.write_text(code, text)

    # -- modules ----------------------------------------------------------------------------------------------------

    def add_module(self, info: proto.ModuleInfo) -> None:
        """A module is in memory."""
        ip, entries, count = info.orc
        self.modules[info.name] = Module(info, OrcTable(self.mem, ip, entries, count) if count else None)

    def remove_module(self, name: str) -> None:
        """A module is gone."""
        module = self.modules.pop(name, None)
        if module is None:
            return
        self.heap.disown(name)
        self.log_tokens.pop(name, None)
        for base, size in module.info.regions:
            for site in [s for s in self.sites if base <= s < base + size]:
                self.patched.pop(self.sites.pop(site), None)
            for addr in [a for a in self.objects if base <= a < base + size]:
                del self.objects[addr]
            for addr in [a for a in self.hooks if base <= a < base + size]:
                del self.hooks[addr]
            for hooks in self.hooks.values():
                hooks[:] = [hook for hook in hooks if not base <= hook.addr < base + size]

    # -- reports ----------------------------------------------------------------------------------------------------

    def _die(self, thread: Thread, kind: str, text: str = "", *, addr: int = 0, access: str = "") -> None:
        if thread.state == "dead":
            return
        if kind == "page_fault" and not access:
            access, text = text or "read", ""
        low = thread.stack[0]
        if kind == "page_fault" and low - PAGE_SIZE <= addr < low:
            kind = "stack"
        if kind == "page_fault" and L.MISSING_DATA <= addr < L.MISSING_DATA_END:
            name, _ = self.symbols.get(addr & -L.MISSING_DATA_SLOT, ("?", 0))
            kind, text = "missing", f"kernel data {name}"
        report = make_report(self, thread, kind, text, addr=addr, access=access)
        self._bury(thread)
        self.send(proto.Died(thread.tid, report))


def _ftrace_steps() -> Any:
    """After the daemon's answer: go on at the implementation that it chose; 0 stands for the original."""
    target = yield None
    return int(target or 0)


_FTRACE = Api("ftrace", Kind.CORE, "ptr", (), False, "ftrace")
