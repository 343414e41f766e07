"""The kernel image that modules link against: where its functions and variables stand, and what is in them.

Model
    A function stands at the address that the machine's symbol table gives it, so that stack traces and ``%pS`` agree
    with /proc/kallsyms; if there is none, or it is taken, in a slot of its own. It is made known to the sandbox when
    something first refers to it. Variables get addresses in the data area; per-CPU ones are offsets.

Locks
    Trio thread only.

Source
    init/main.c (``saved_command_line``), init/init_task.c, init/version.c, kernel/nsproxy.c, kernel/params.c
    (``STANDARD_PARAM_DEF``), kernel/printk/printk.c (``console_printk``), arch/x86/kernel/paravirt.c (``pv_ops``),
    arch/x86/kernel/setup_percpu.c, lib/ctype.c.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from klpfs.cpu import layout as L
from klpfs.cpu.api import API, DATA, HOST_STATS, INTEGER_PARAMS, NATIVE
from klpfs.cpu.layout import AREAS
from klpfs.cpu.space import Space
from klpfs.kernel.profile import LINUX_PROC_BANNER

if TYPE_CHECKING:
    from klpfs.kernel.kallsyms import SymbolTable
    from klpfs.kernel.profile import Profile

__all__ = ["INITIAL_JIFFIES", "Vmlinux"]

INITIAL_JIFFIES = (-300 * L.HZ) & 0xFFFFFFFF
"""``jiffies`` at boot: five minutes before the 32 bits wrap (include/linux/jiffies.h)."""

_FREE_DATA = L.INIT_TASK + 3 * L.PAGE_SIZE
_WORKQUEUES = tuple(name for name in DATA if name.startswith("system_") and name.endswith("_wq"))
_PARAM_OPS = {
    # type: set, get, free, KERNEL_PARAM_OPS_FL_NOARG
    "bool": ("param_set_bool", "param_get_bool", "", 1),
    "bool_enable_only": ("param_set_bool_enable_only", "param_get_bool", "", 1),
    "invbool": ("param_set_invbool", "param_get_invbool", "", 0),
    "bint": ("param_set_bint", "param_get_int", "", 1),
    "charp": ("param_set_charp", "param_get_charp", "param_free_charp", 0),
    "string": ("param_set_copystring", "param_get_string", "", 0),
    **{kind: (f"param_set_{kind}", f"param_get_{kind}", "", 0) for kind in INTEGER_PARAMS},
}


def _ctype() -> bytes:
    """``_ctype``: classes of all 256 characters (upper 1, lower 2, digit 4, control 8, punctuation 0x10, space 0x20,
    hexadecimal 0x40, hard space 0x80)."""
    out = bytearray(256)
    for code in range(128):
        ch = chr(code)
        if code < 0x20 or code == 0x7F:
            out[code] = 0x28 if ch in "\t\n\v\f\r" else 8
        elif ch == " ":
            out[code] = 0xA0
        elif ch.isdigit():
            out[code] = 4
        elif ch.isalpha():
            out[code] = (1 if ch.isupper() else 2) | (0x40 if ch in "abcdefABCDEF" else 0)
        else:
            out[code] = 0x10
    for code in range(0xA0, 0x100):
        if code == 0xA0:
            out[code] = 0xA0
        elif code < 0xC0 or code in (0xD7, 0xF7):
            out[code] = 0x10
        else:
            out[code] = 1 if code < 0xE0 and code != 0xDF else 2
    return bytes(out)


class Vmlinux:
    """The emulated vmlinux on *space*; *table* has the symbols that the machine knows.

    *profile* is what kernel it is, *command_line* what it was booted with.
    """

    def __init__(
        self, space: Space, table: SymbolTable, profile: Profile, *, command_line: bytes, cpus: int, canary: int
    ) -> None:
        self._space = space
        self._table = table
        self.cpus = cpus
        self._canary = canary
        self.functions: dict[int, str] = {}
        """Kernel functions that are known to the sandbox, by address."""
        self._addresses: dict[str, int] = {}
        self.pending: list[tuple[int, str, int]] = []
        """Functions that the sandbox must be told about: address, name, size."""
        self._told: set[int] = set()
        self._next_slot = L.TEXT_SLOTS
        self._next_data = _FREE_DATA
        self._next_missing = L.MISSING_DATA
        self.data: dict[str, int] = {
            "jiffies": L.TIME_PAGE + L.TIME_JIFFIES,
            "init_nsproxy": L.INIT_NSPROXY,
            "init_task": L.INIT_TASK,
            "init_time_ns": L.INIT_TIME_NS,
        }
        self.host_stats: set[str] = set()
        """Files of the host's /proc whose numbers modules link against."""
        self.kernel_kobj = self._reserve(L.KOBJECT_SIZE)
        self.workqueues: dict[int, str] = {}
        self._fill()
        self._fill_texts(profile, command_line)

    # -- functions --------------------------------------------------------------------------------------------------

    def function(self, name: str) -> int:
        """Address of kernel function *name* of the API table."""
        known = self._addresses.get(name)
        if known is not None:
            return known
        addr, size = 0, L.TEXT_SLOT_SIZE
        text = AREAS["text"]
        for symbol in self._table.lookup(name):
            room = len(NATIVE.get(name, b"\xf4"))
            if text.base <= symbol.address < L.TEXT_SLOTS - 16 and all(
                symbol.address + i not in self.functions for i in range(room)
            ):
                addr, size = symbol.address, symbol.size
                break
        if not addr:
            addr, self._next_slot = self._next_slot, self._next_slot + L.TEXT_SLOT_SIZE
        self.functions[addr] = name
        self._addresses[name] = addr
        self.pending.append((addr, name, size))
        return addr

    def tell(self, addr: int, name: str, size: int) -> None:
        """Let the sandbox know what stands at *addr*, so that ``%pS`` does: somebody was given the address."""
        if addr not in self._told and addr not in self.functions:
            self._told.add(addr)
            self.pending.append((addr, name, size))

    def unsupported(self, name: str) -> int:
        """An address for a function of the kernel that neither symbol table nor sandbox have: a call of it faults."""
        if name not in self._addresses:
            addr, self._next_slot = self._next_slot, self._next_slot + L.TEXT_SLOT_SIZE
            self._addresses[name] = addr
            self.functions[addr] = name
        return self._addresses[name]

    def missing_variable(self, name: str) -> int:
        """An address for variable *name*, which is not emulated: an access of it faults. 0 when there are too many."""
        if name not in self._addresses:
            addr = self._next_missing
            if addr >= L.MISSING_DATA_END:
                return 0
            self._next_missing = addr + L.MISSING_DATA_SLOT
            self._addresses[name] = addr
            self.pending.append((addr, name, L.MISSING_DATA_SLOT))
        return self._addresses[name]

    def symbol(self, name: str) -> int | None:
        """Address of function or variable *name*, if it can be used; None otherwise."""
        if name in HOST_STATS:
            self.host_stats.add(HOST_STATS[name])
        if name in DATA:
            return self.variable(name)
        return self.function(name) if name in API else None

    def name_of(self, addr: int) -> str | None:
        """The kernel function that stands at *addr*."""
        return self.functions.get(addr)

    def return_address(self, addr: int) -> int:
        """Where a kernel function that begins at *addr* would be returned to by what it calls: an address inside it.

        Any other address is given back as it is.
        """
        if addr not in self.functions:
            return addr
        found = self._table.addr_to_symbol(addr)
        return addr if found is None else addr + min(16, found[2] - found[1] - 1)

    # -- variables --------------------------------------------------------------------------------------------------

    def _reserve(self, size: int) -> int:
        addr = self._next_data
        self._next_data = -(-(addr + size) // 16) * 16
        return addr

    def variable(self, name: str) -> int:
        """Address (or per-CPU offset) of kernel variable *name*."""
        data = DATA[name]
        if data.percpu or name == "fixed_percpu_data":
            return data.percpu
        if data.alias:
            name = data.alias
        if name not in self.data:
            self.data[name] = self._reserve(DATA[name].size)
        return self.data[name]

    def _put(self, name: str, data: bytes) -> None:
        self._space.write(self.variable(name), data)

    def _pointer(self, name: str, value: int) -> None:
        self._put(name, struct.pack("<Q", value))

    def _fill(self) -> None:
        space = self._space
        for name in ("nr_cpu_ids", "__num_online_cpus"):
            self._put(name, struct.pack("<I", self.cpus))
        for name in ("__cpu_online_mask", "__cpu_possible_mask", "__cpu_present_mask", "__cpu_active_mask"):
            self._put(name, ((1 << self.cpus) - 1).to_bytes(1024, "little"))
        percpu = AREAS["percpu"].base
        bases = [percpu + min(cpu, L.NR_CPUS - 1) * L.PERCPU_SIZE for cpu in range(8192)]
        self._put("__per_cpu_offset", struct.pack("<8192Q", *bases))
        for cpu in range(L.NR_CPUS):
            base = bases[cpu]
            space.store(base + DATA["this_cpu_off"].percpu, base)
            space.store(base + L.PERCPU_HOT + L.PCPU_CPU_NUMBER.offset, cpu, 4)
            space.store(base + L.PERCPU_CANARY, self._canary)
            # struct pcpu_hot: INIT_PREEMPT_COUNT is gone once the system runs; the sign bit says "no need to resched"
            space.store(base + L.PERCPU_HOT + L.PCPU_PREEMPT_COUNT.offset, 0x80000000, 4)
        self._pointer("page_offset_base", 0xFFFF888000000000)
        self._pointer("vmalloc_base", 0xFFFFC90000000000)
        self._pointer("vmemmap_base", 0xFFFFEA0000000000)
        self._put("system_state", struct.pack("<I", 3))  # SYSTEM_RUNNING
        self._put("console_printk", struct.pack("<4i", 7, 4, 1, 7))
        self._put("hex_asc", b"0123456789abcdef\0")
        self._put("hex_asc_upper", b"0123456789ABCDEF\0")
        self._put("_ctype", _ctype())
        self._put("ftrace_enabled", struct.pack("<I", 1))
        for name in ("cpu_khz", "tsc_khz"):
            self._put(name, struct.pack("<I", 1_000_000))
        self._pointer("loops_per_jiffy", 4_000_000)
        cache = self._reserve(256)
        self._put("kmalloc_caches", struct.pack("<Q", cache) * (L.KMALLOC_CACHES_SIZE // 8))
        for name in _WORKQUEUES:
            addr = self._reserve(64)
            self.workqueues[addr] = name
            self._pointer(name, addr)
        self._pointer("kernel_kobj", self.kernel_kobj)
        init = self.variable("init_task")
        space.put(init, L.TASK_FLAGS, L.PF_KTHREAD)
        space.write(init + L.TASK_COMM.offset, b"swapper/0")
        space.put(init, L.TASK_NSPROXY, L.INIT_NSPROXY)
        space.put(L.INIT_NSPROXY, L.NSPROXY_COUNT, 1)
        space.put(L.INIT_NSPROXY, L.NSPROXY_UTS_NS, self.variable("init_uts_ns"))
        space.put(L.INIT_NSPROXY, L.NSPROXY_TIME_NS, L.INIT_TIME_NS)
        for offset in (0, 8):
            space.store(init + L.TASK_TASKS.offset + offset, init + L.TASK_TASKS.offset)
        for member in (L.TASK_REAL_PARENT, L.TASK_PARENT, L.TASK_GROUP_LEADER):
            space.put(init, member, init)
        self._fill_pointers()

    def _fill_texts(self, profile: Profile, command_line: bytes) -> None:
        """What the kernel says of itself: its names, its banners, its command line."""
        names = ("Linux", os.uname().nodename, profile.release, profile.kernel_version, "x86_64", "(none)")
        self._put(
            "init_uts_ns", b"".join(n.encode()[: L.UTS_NAME_SIZE - 1].ljust(L.UTS_NAME_SIZE, b"\0") for n in names)
        )
        for name, banner in (("linux_banner", profile.linux_banner), ("linux_proc_banner", LINUX_PROC_BANNER)):
            self._put(name, banner.encode()[: DATA[name].size - 1] + b"\0")
        text = self._reserve(len(command_line) + 1)
        self._space.write(text, command_line + b"\0")
        self._pointer("saved_command_line", text)
        self._put("saved_command_line_len", struct.pack("<I", len(command_line)))

    def _fill_pointers(self) -> None:
        ops = bytearray(struct.pack("<Q", self.function("BUG_func")) * (L.PV_OPS_SIZE // 8))
        for offset, name in (
            (L.PV_IRQ_SAVE_FL, "pv_native_save_fl"),
            (L.PV_IRQ_DISABLE, "pv_native_irq_disable"),
            (L.PV_IRQ_ENABLE, "pv_native_irq_enable"),
            (L.PV_QUEUED_SPIN_UNLOCK, "__native_queued_spin_unlock"),
            (L.PV_VCPU_IS_PREEMPTED, "__native_vcpu_is_preempted"),
        ):
            struct.pack_into("<Q", ops, offset, self.function(name))
        self._put("pv_ops", bytes(ops))
        for kind, (setter, getter, release, flags) in _PARAM_OPS.items():
            pointers = (self.function(setter), self.function(getter), self.function(release) if release else 0)
            self._put(f"param_ops_{kind}", struct.pack("<IIQQQ", flags, 0, *pointers))
        array = [self.function(f"param_array_{what}") for what in ("set", "get", "free")]
        self._put("param_array_ops", struct.pack("<IIQQQ", 0, 0, *array))
        self.function("autoremove_wake_function")
        for cpu in range(L.NR_CPUS):
            base = AREAS["percpu"].base + cpu * L.PERCPU_SIZE + L.HRTIMER_BASES
            for i, (clock, getter) in enumerate(L.HRTIMER_CLOCKS):
                self._space.put(base + i * L.HRTIMER_BASE_SIZE, L.CLOCK_BASE_INDEX, i)
                self._space.put(base + i * L.HRTIMER_BASE_SIZE, L.CLOCK_BASE_CLOCKID, clock)
                self._space.put(base + i * L.HRTIMER_BASE_SIZE, L.CLOCK_BASE_GET_TIME, self.function(getter))

    def data_end(self) -> int:
        """First free address of the data area."""
        return self._next_data
