"""What the kernel counts of memory, CPU time and load: the host's numbers, where module code looks for them.

Model
    A patched copy of a function that prints a file of /proc (``meminfo_proc_show``) reads the kernel's variables and
    calls its functions. Both find what the host's own file says, so that its output differs from the unpatched one by
    what the patch changes. Numbers stand in the kernel's variables (``vm_node_stat``), or in words of the first data
    page from which the sandbox's stubs answer (:data:`klpfs.cpu.layout.HOST_STATS`). They are read anew whenever code
    starts or goes on after it waited, so one run of a function that does not wait sees one state.

Locks
    Trio thread only.

Source
    fs/proc/{meminfo,uptime,loadavg}.c, include/linux/{mmzone,vmstat,percpu_counter,pid_namespace,time_namespace}.h,
    kernel/sched/loadavg.c (``get_avenrun``), mm/hugetlb.c (``hugetlb_report_meminfo``), mm/memtest.c,
    arch/x86/mm/pat/set_memory.c (``arch_report_meminfo``).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from klpfs.cpu import layout as L

if TYPE_CHECKING:
    from klpfs.cpu.space import Space
    from klpfs.cpu.vmlinux import Vmlinux
    from klpfs.machine import Machine

__all__ = ["HostStats", "cpu_times", "parse_meminfo"]

_LINE = re.compile(rb"^([^:\n]+):\s*(\d+)", re.MULTILINE)
_HUGETLB = (b"HugePages_", b"Hugepagesize:", b"Hugetlb:")
_ARCH = (b"DirectMap",)
_MEMTEST = (b"EarlyMemtestBad",)
_NODE_STATS: Mapping[int, str] = {
    # enum node_stat_item: the line of /proc/meminfo that shows nothing else
    0: "Inactive(anon)",
    1: "Active(anon)",
    2: "Inactive(file)",
    3: "Active(file)",
    4: "Unevictable",
    5: "SReclaimable",
    6: "SUnreclaim",
    17: "AnonPages",
    18: "Mapped",
    20: "Dirty",
    21: "Writeback",
    22: "WritebackTmp",
    23: "Shmem",
    24: "ShmemHugePages",
    25: "ShmemPmdMapped",
    26: "FileHugePages",
    27: "FilePmdMapped",
    28: "AnonHugePages",
    38: "PageTables",
    39: "SecPageTables",
    41: "SwapCached",
}
_NR_FILE_PAGES, _NR_KERNEL_MISC_RECLAIMABLE, _NR_KERNEL_STACK_KB = 19, 34, 37
_ZONE_STATS: Mapping[int, str] = {0: "MemFree", 7: "Mlocked", 8: "Bounce", 11: "Unaccepted"}
_FUNCTIONS: Mapping[str, str] = {
    # word of HOST_STATS: line
    "MemTotal": "MemTotal",
    "MemFree": "MemFree",
    "MemAvailable": "MemAvailable",
    "Buffers": "Buffers",
    "Shmem": "Shmem",
    "SwapTotal": "SwapTotal",
    "SwapFree": "SwapFree",
    "CommitLimit": "CommitLimit",
    "Committed_AS": "Committed_AS",
    "VmallocUsed": "VmallocUsed",
    "Percpu": "Percpu",
    "Zswap": "Zswap",
}
_FSHIFT = 11
_FOUR_LEVELS_KB = (1 << 45) >> 10
"""Size of the vmalloc area with page tables of four levels."""


def parse_meminfo(text: bytes) -> dict[str, int]:
    """Line to number of a file like /proc/meminfo, in its units (kB)."""
    return {name.decode("latin-1"): int(number) for name, number in _LINE.findall(text)}


def cpu_times(text: bytes, cpu: int) -> list[int]:
    """Nanoseconds that *cpu* spent on what ``enum cpu_usage_stat`` lists, by a file like /proc/stat."""
    ticks = [0] * 10
    for line in text.splitlines():
        name, *numbers = line.split()
        if name == b"cpu%d" % cpu:
            ticks[: len(numbers)] = [int(number) for number in numbers[:10]]
            break
    user, nice, system, idle, iowait, irq, softirq, *rest = ticks
    return [number * 10_000_000 for number in (user, nice, system, softirq, irq, idle, iowait, *rest)]


def _lines(text: bytes, starts: tuple[bytes, ...]) -> bytes:
    return b"".join(line for line in text.splitlines(keepends=True) if line.startswith(starts))


class HostStats:
    """Keeps the numbers of *machine*'s host in *space*. Nothing is read before a module links against one of them."""

    def __init__(self, machine: Machine, space: Space, vmlinux: Vmlinux) -> None:
        self._machine = machine
        self._space = space
        self._vmlinux = vmlinux

    def refresh(self) -> None:
        """Bring them up to date, as far as code that is loaded can see them."""
        wanted = self._vmlinux.host_stats
        if "meminfo" in wanted:
            self._meminfo(self._machine.procfs.host_file("meminfo"))
        if "loadavg" in wanted:
            self._loadavg(self._machine.procfs.host_file("loadavg"))
        if "uptime" in wanted:
            self._uptime(self._machine.procfs.host_file("uptime"))

    def _word(self, name: str, value: int) -> None:
        self._space.store(L.HOST_STATS + 8 * L.HOST_STAT_WORDS.index(name), value)

    def _longs(self, name: str, values: Mapping[int, int]) -> None:
        base = self._vmlinux.variable(name)
        for index, value in values.items():
            self._space.store(base + 8 * index, value)

    def _text(self, where: int, text: bytes) -> None:
        self._space.write(where, text[: L.HOST_TEXT_SIZE - 1] + b"\0")

    def _meminfo(self, text: bytes) -> None:
        kb = parse_meminfo(text)
        # a line that the host's kernel does not have: it counts none of those
        pages = {name: number >> 2 for name, number in kb.items()}
        node = {item: pages.get(name, 0) for item, name in _NODE_STATS.items()}
        node[_NR_FILE_PAGES] = sum(pages.get(name, 0) for name in ("Cached", "SwapCached", "Buffers"))
        node[_NR_KERNEL_MISC_RECLAIMABLE] = max(pages.get("KReclaimable", 0) - pages.get("SReclaimable", 0), 0)
        node[_NR_KERNEL_STACK_KB] = kb.get("KernelStack", 0)
        self._longs("vm_node_stat", node)
        self._longs("vm_zone_stat", {item: pages.get(name, 0) for item, name in _ZONE_STATS.items()})
        self._longs("num_poisoned_pages", {0: pages.get("HardwareCorrupted", 0)})
        self._space.store(self._vmlinux.variable("zswap_stored_pages"), pages.get("Zswapped", 0), 4)
        self._space.put(self._vmlinux.variable("vm_committed_as"), L.PERCPU_COUNTER_COUNT, pages.get("Committed_AS", 0))
        for word, name in _FUNCTIONS.items():
            self._word(word, pages.get(name, 0))
        self._text(L.HOST_HUGETLB, _lines(text, _HUGETLB))
        self._text(L.HOST_ARCH_MEMINFO, _lines(text, _ARCH))
        self._text(L.HOST_MEMTEST, _lines(text, _MEMTEST))
        # code computes VMALLOC_TOTAL from whether the CPU has page tables of five levels
        five = kb.get("VmallocTotal", 0) > _FOUR_LEVELS_KB
        self._space.store(self._vmlinux.variable("boot_cpu_data") + L.CPUINFO_LA57_BYTE, five, 1)

    def _loadavg(self, text: bytes) -> None:
        fields = text.split()
        try:
            loads = [self._load(field) for field in fields[:3]]
            running, threads = map(int, fields[3].split(b"/"))
            last = int(fields[4])
        except (IndexError, ValueError):
            return
        for i, load in enumerate(loads):
            self._word(f"avenrun{i}", load)
        self._word("nr_running", running)
        self._space.store(self._vmlinux.variable("nr_threads"), threads, 4)
        self._space.put(self._vmlinux.variable("init_pid_ns"), L.PID_NS_IDR_NEXT, last + 1)

    @staticmethod
    def _load(text: bytes) -> int:
        """The smallest load, in fixed point, that is printed as *text*."""
        whole, _, part = text.partition(b".")
        hundredths = int(whole) * 100 + int(part)
        return -(-(hundredths << _FSHIFT) // 100)

    def _uptime(self, text: bytes) -> None:
        """The host's uptime is the machine's in a time namespace: ``timens_add_boottime`` adds the difference."""
        fields = text.split()
        if not fields:
            return
        seconds, _, part = fields[0].partition(b".")
        ns = int(seconds) * 1_000_000_000 + int(part.ljust(9, b"0")[:9])
        offset = ns - int(self._space.load(L.TIME_PAGE + L.TIME_BOOT))
        where = L.INIT_TIME_NS + L.TIME_NS_BOOTTIME
        self._space.write(where, struct.pack("<qq", offset // 1_000_000_000, offset % 1_000_000_000))
