"""Kernel functions that count: memory, swap, CPU time, load. The numbers are the host's.

Model
    :mod:`klpfs.cpu.hoststats` keeps them in the first data page; CPU times are asked for.

Source
    mm/show_mem.c (``si_meminfo``, ``si_mem_available``), mm/swapfile.c, mm/util.c, mm/vmalloc.c, mm/percpu.c,
    mm/zswap.c, mm/hugetlb.c, mm/memtest.c, arch/x86/mm/pat/set_memory.c, kernel/sched/{loadavg,cputime,core}.c,
    fs/proc/stat.c (``get_idle_time``), kernel/time/time.c, fs/seq_file.c (``seq_put_decimal_ull_width``).
"""

from __future__ import annotations

import struct

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.engine import RDX
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.stubs_print import seq_add
from klpfs.cpu.sandbox.thread import HANDLERS, Ask, Thread, stub
from klpfs.cpu.sandbox.waiting import Steps

_NSEC_PER_SEC = 1_000_000_000
_NSEC_PER_TICK = _NSEC_PER_SEC // 100


def _word(m: Machine, name: str) -> int:
    return m.space.load(L.HOST_STATS + 8 * L.HOST_STAT_WORDS.index(name))


def _counter(name: str, word: str) -> None:
    def run(m: Machine, t: Thread) -> int:
        return _word(m, word)

    HANDLERS[name] = run


for _name, _number in (
    ("si_mem_available", "MemAvailable"),
    ("vm_commit_limit", "CommitLimit"),
    ("vm_memory_committed", "Committed_AS"),
    ("vmalloc_nr_pages", "VmallocUsed"),
    ("pcpu_nr_pages", "Percpu"),
    ("zswap_total_pages", "Zswap"),
    ("nr_running", "nr_running"),
):
    _counter(_name, _number)


@stub("si_meminfo")
def _si_meminfo(m: Machine, t: Thread, info: int) -> None:
    words = (_word(m, name) for name in ("MemTotal", "MemFree", "Shmem", "Buffers"))
    m.mem.write(info + L.SYSINFO_TOTALRAM, struct.pack("<4Q", *words))
    m.mem.write(info + L.SYSINFO_TOTALHIGH, struct.pack("<QQI", 0, 0, L.PAGE_SIZE))


@stub("si_swapinfo")
def _si_swapinfo(m: Machine, t: Thread, info: int) -> None:
    m.mem.write(info + L.SYSINFO_TOTALSWAP, struct.pack("<QQ", _word(m, "SwapTotal"), _word(m, "SwapFree")))


def _report(name: str, where: int) -> None:
    def run(m: Machine, t: Thread, seq: int) -> None:
        seq_add(m, seq, m.space.cstring(where))

    HANDLERS[name] = run


_report("hugetlb_report_meminfo", L.HOST_HUGETLB)
_report("arch_report_meminfo", L.HOST_ARCH_MEMINFO)
_report("memtest_report_meminfo", L.HOST_MEMTEST)


@stub("seq_put_decimal_ull_width")
def _seq_put_ull_width(m: Machine, t: Thread, seq: int, delimiter: int, value: int, width: int) -> None:
    before = m.mem.cstring(delimiter, 256) if delimiter else b""
    seq_add(m, seq, before + b"%*d" % (width, value))


# -- load and CPU time ------------------------------------------------------------------------------------------------


@stub("get_avenrun")
def _get_avenrun(m: Machine, t: Thread, loads: int, offset: int, shift: int) -> None:
    for i in range(3):
        m.mem.store(loads + 8 * i, (_word(m, f"avenrun{i}") + offset) << (shift & 63))


@stub("kcpustat_cpu_fetch")
def _kcpustat_cpu_fetch(m: Machine, t: Thread, where: int, cpu: int) -> Steps:
    m.mem.check(where, L.KERNEL_CPUSTAT_SIZE, write=True)
    times = yield Ask("cpu_times", [cpu])
    m.mem.write(where, struct.pack(f"<{len(times)}Q", *times))
    return None


@stub("get_idle_time")
def _get_idle_time(m: Machine, t: Thread, times: int, cpu: int) -> int:
    return m.mem.load(times + L.CPUTIME_IDLE)


@stub("ns_to_timespec64")
def _ns_to_timespec64(m: Machine, t: Thread, nanoseconds: int) -> int:
    seconds, rest = divmod(nanoseconds, _NSEC_PER_SEC)
    m.engine.set(RDX, rest)  # a structure of two words is returned in two registers
    return seconds


@stub("set_normalized_timespec64")
def _set_normalized_timespec64(m: Machine, t: Thread, ts: int, seconds: int, nanoseconds: int) -> None:
    more, rest = divmod(nanoseconds, _NSEC_PER_SEC)
    m.mem.store(ts, seconds + more)
    m.mem.store(ts + 8, rest)


@stub("nsec_to_clock_t")
def _nsec_to_clock_t(m: Machine, t: Thread, nanoseconds: int) -> int:
    return nanoseconds // _NSEC_PER_TICK
