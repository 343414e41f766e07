"""The execution engine: unicorn, set up so that nothing that module code does goes unnoticed.

Model
    Code runs in ring 3 with flat segments. So every privileged instruction, HLT included, raises #GP, which stops the
    engine; the address tells a trap of ours from a crime of the module's. Page tables are not used: the engine's TLB
    takes virtual addresses as they are (``UC_TLB_VIRTUAL``; kernel addresses do not work otherwise), and protections
    are those of the mapped regions. The GDT is there only while ring 3 is entered. ``rdtsc`` faults (CR4.TSD); RDRAND,
    XGETBV and the FS/GS base instructions do not exist on the chosen processor.

    Instructions are counted from the first run on: only code that was translated while a limit was given is counted.
    The engine's own time-out is not used; it starts a thread for every run.

Locks
    None.

Source
    unicorn's ``uc.h``; Intel SDM volume 3, chapters 3 (segments) and 5 (privileged instructions).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import unicorn as _unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from klpfs.cpu.layout import AREAS, PAGE_SIZE, PROT_EXEC, PROT_READ, PROT_WRITE
from klpfs.cpu.space import Space

__all__ = ["REGISTERS", "Engine", "Stop"]

unicorn: Any = _unicorn
"""Its annotations are those of Python 2's binding, and wrong."""

REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "eflags",
)  # fmt: skip
"""General registers, by the names that :meth:`Engine.registers` uses."""

IDS = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in REGISTERS}
"""Unicorn's numbers of them."""
RAX, RSP, RBP, RIP = IDS["rax"], IDS["rsp"], IDS["rbp"], IDS["rip"]
RDX, RCX = IDS["rdx"], IDS["rcx"]
ARGUMENTS = tuple(IDS[name] for name in ("rdi", "rsi", "rdx", "rcx", "r8", "r9"))

_CODE_SELECTOR, _DATA_SELECTOR = 0x33, 0x2B  # __USER_CS, __USER_DS
_NOWHERE = 1
"""Where the engine would stop by itself: an address that no code can have."""
_TCG_BUFFER = 32 << 20


class Stop(NamedTuple):
    """Why a run ended, with the registers as they were then.

    *kind*: ``quantum`` (used up, or no reason), ``gp`` (#GP at *rip*), ``interrupt`` (*number*; *rip* after it), ``io``
    and ``syscall`` (*rip* after the instruction), ``invalid`` (#UD), ``fault`` (*addr*, *access* read, write or fetch).
    """

    kind: str
    rip: int
    number: int = 0
    addr: int = 0
    access: str = ""


def _descriptor(dpl: int, code: bool) -> int:
    access = 0x90 | dpl << 5 | (0xB if code else 3)
    flags = 0xA if code else 0xC
    return 0xFFFF | access << 40 | 0xF << 48 | flags << 52


_ACCESS = {
    uc_const.UC_MEM_READ_UNMAPPED: "read",
    uc_const.UC_MEM_READ_PROT: "read",
    uc_const.UC_MEM_WRITE_UNMAPPED: "write",
    uc_const.UC_MEM_WRITE_PROT: "write",
    uc_const.UC_MEM_FETCH_UNMAPPED: "fetch",
    uc_const.UC_MEM_FETCH_PROT: "fetch",
}


class Engine:
    """One processor on the shared memory."""

    def __init__(self, space: Space, gs_base: int) -> None:
        self._host = space.host_address()
        self._space = space
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc = self._uc
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_NEHALEM)
        uc.ctl_set_tcg_buffer_size(_TCG_BUFFER)
        uc.ctl_set_tlb_mode(uc_const.UC_TLB_VIRTUAL)
        self._stop: Stop | None = None
        uc.hook_add(uc_const.UC_HOOK_INTR, self._on_interrupt)
        uc.hook_add(uc_const.UC_HOOK_MEM_INVALID, self._on_bad_access)
        uc.hook_add(uc_const.UC_HOOK_INSN, self._on_in, aux1=x86.UC_X86_INS_IN)
        uc.hook_add(uc_const.UC_HOOK_INSN, self._on_out, aux1=x86.UC_X86_INS_OUT)
        uc.hook_add(uc_const.UC_HOOK_INSN, self._on_syscall, aux1=x86.UC_X86_INS_SYSCALL)
        uc.hook_add(uc_const.UC_HOOK_INSN, self._on_syscall, aux1=x86.UC_X86_INS_SYSENTER)
        uc.hook_add(uc_const.UC_HOOK_INSN, self._on_cpuid, aux1=x86.UC_X86_INS_CPUID)
        self._enter_ring3()
        uc.reg_write(x86.UC_X86_REG_GS_BASE, gs_base)
        for name in REGISTERS:
            if name not in ("rip", "eflags"):
                uc.reg_write(IDS[name], 0)
        self._fresh = uc.context_save()
        self.version = unicorn.__version__

    def _enter_ring3(self) -> None:
        """Return from an interrupt that never was; afterwards the descriptors are not needed any more."""
        uc, base = self._uc, AREAS["stack"].base
        self.map(base, PAGE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC)
        gdt = (0, 0, _descriptor(0, True), _descriptor(0, False), 0, _descriptor(3, False), _descriptor(3, True))
        self._space.write(base, struct.pack("<7Q", *gdt))
        self._space.write(base + 0x100, b"\x48\xcf")  # iretq
        landing = base + 0x200
        frame = struct.pack("<5Q", landing, _CODE_SELECTOR, 0x202, base + 0xF00, _DATA_SELECTOR)
        self._space.write(base + 0x800, frame)
        uc.reg_write(x86.UC_X86_REG_CR4, 0x200 | 4)  # OSFXSR, TSD
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, base, len(gdt) * 8 - 1, 0))
        uc.reg_write(x86.UC_X86_REG_CS, 0x10)
        uc.reg_write(x86.UC_X86_REG_SS, 0x18)
        uc.reg_write(RSP, base + 0x800)
        uc.emu_start(base + 0x100, landing, count=2)
        if uc.reg_read(x86.UC_X86_REG_CS) != _CODE_SELECTOR or uc.reg_read(RIP) != landing:
            raise RuntimeError("the engine did not enter ring 3")
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, 0, 0, 0))
        self.unmap(base, PAGE_SIZE)
        self._space.fill(base, PAGE_SIZE)

    # -- memory -----------------------------------------------------------------------------------------------------

    def map(self, addr: int, size: int, prot: int) -> None:
        """Pages of the shared memory appear at *addr*."""
        self._uc.mem_map_ptr(addr, size, prot, self._host + self._space.offset(addr, size))

    def unmap(self, addr: int, size: int) -> None:
        """They disappear, with all code translated from them."""
        self.flush(addr, size)
        self._uc.mem_unmap(addr, size)

    def flush(self, addr: int, size: int) -> None:
        """Code at *addr* changed."""
        self._uc.ctl_remove_cache(addr, addr + size)

    # -- registers --------------------------------------------------------------------------------------------------

    def fresh_context(self) -> Any:
        """A context with clear registers."""
        self._uc.context_restore(self._fresh)
        return self._uc.context_save()

    def save(self, context: Any) -> None:
        """Put the registers into *context*."""
        self._uc.context_update(context)

    def restore(self, context: Any) -> None:
        """Take the registers from *context*."""
        self._uc.context_restore(context)

    def get(self, reg: int) -> int:
        """A register, by unicorn's number."""
        value: int = self._uc.reg_read(reg)
        return value

    def set(self, reg: int, value: int) -> None:
        """Set a register, by unicorn's number."""
        self._uc.reg_write(reg, value)

    def renew(self) -> None:
        """Forget that there was an exception: the next one would be taken for a double fault."""
        kept = self.registers()
        self._uc.context_restore(self._fresh)
        for name, value in kept.items():
            if name != "rip":
                self._uc.reg_write(IDS[name], value)

    def registers(self) -> dict[str, int]:
        """All of :data:`REGISTERS`."""
        return {name: self._uc.reg_read(reg) for name, reg in IDS.items()}

    # -- running ----------------------------------------------------------------------------------------------------

    def _on_interrupt(self, uc: Any, number: int, _data: object) -> None:
        self._stop = Stop("interrupt", 0, number=number)
        uc.emu_stop()

    def _on_bad_access(self, uc: Any, access: int, addr: int, size: int, value: int, _data: object) -> bool:
        self._stop = Stop("fault", 0, addr=addr & 0xFFFFFFFFFFFFFFFF, access=_ACCESS.get(access, "read"))
        return False

    def _on_in(self, uc: Any, port: int, size: int, _data: object) -> int:
        self._stop = Stop("io", 0)
        uc.emu_stop()
        return 0

    def _on_out(self, uc: Any, port: int, size: int, value: int, _data: object) -> None:
        self._stop = Stop("io", 0)
        uc.emu_stop()

    def _on_syscall(self, uc: Any, _data: object) -> None:
        self._stop = Stop("syscall", 0)
        uc.emu_stop()

    def _on_cpuid(self, uc: Any, _data: object) -> int:
        # The answer of a processor that has no leaf: the same everywhere.
        for reg in (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX):
            uc.reg_write(reg, 0)
        return 1

    def run(self, rip: int, count: int) -> Stop:
        """Execute from *rip*, at most *count* instructions."""
        uc = self._uc
        self._stop = None
        failed = 0
        try:
            uc.emu_start(rip, _NOWHERE, count=count)
        except unicorn.UcError as error:
            failed = error.errno
        now: int = uc.reg_read(RIP)
        stop: Stop | None = self._stop
        if stop is None:
            if not failed:
                return Stop("quantum", now)
            if failed == uc_const.UC_ERR_INSN_INVALID:
                return Stop("invalid", now)
            if failed in (uc_const.UC_ERR_FETCH_UNMAPPED, uc_const.UC_ERR_FETCH_PROT):
                return Stop("fault", now, addr=now, access="fetch")
            if failed == uc_const.UC_ERR_EXCEPTION:
                return Stop("interrupt", now, number=8)
            # Accesses that the hook did not see: the address is not known then.
            access = "write" if failed in (uc_const.UC_ERR_WRITE_PROT, uc_const.UC_ERR_WRITE_UNMAPPED) else "read"
            return Stop("fault", now, addr=0, access=access)
        if stop.kind == "interrupt" and stop.number == 13:
            return Stop("gp", now, number=13)
        return stop._replace(rip=now)
