"""Patched functions that print what the kernel counts, in /proc/meminfo, loadavg, uptime: the host's numbers."""

from __future__ import annotations

import errno
import re
from typing import Any

import pytest
from cpu_support import executing, lines
from test_cpu_kpatch import dynamic

MEMINFO = b"""\
MemTotal:       24684084 kB
MemFree:        20757268 kB
MemAvailable:   24014492 kB
Buffers:           90012 kB
Cached:          3319676 kB
SwapCached:           12 kB
Active:           944824 kB
Inactive:        2508888 kB
Active(anon):       1576 kB
Inactive(anon):    51464 kB
Active(file):     943248 kB
Inactive(file):  2457424 kB
Unevictable:       14664 kB
Mlocked:           13748 kB
SwapTotal:       1048572 kB
SwapFree:        1048560 kB
Zswap:               308 kB
Zswapped:            796 kB
Dirty:             14836 kB
Writeback:             4 kB
AnonPages:         58912 kB
Mapped:            13416 kB
Shmem:              9004 kB
KReclaimable:     257840 kB
Slab:             297072 kB
SReclaimable:     257832 kB
SUnreclaim:        39240 kB
KernelStack:        1393 kB
PageTables:         2448 kB
SecPageTables:        20 kB
NFS_Unstable:          0 kB
Bounce:               24 kB
WritebackTmp:         28 kB
CommitLimit:    12342040 kB
Committed_AS:     155716 kB
VmallocTotal:   34359738367 kB
VmallocUsed:       14256 kB
VmallocChunk:          0 kB
Percpu:              688 kB
EarlyMemtestBad:     0 kB
HardwareCorrupted:     8 kB
AnonHugePages:      2048 kB
ShmemHugePages:     4096 kB
ShmemPmdMapped:     8192 kB
FileHugePages:     16384 kB
FilePmdMapped:     32768 kB
Unaccepted:           32 kB
HugePages_Total:       1
HugePages_Free:        1
HugePages_Rsvd:        0
HugePages_Surp:        0
Hugepagesize:       2048 kB
Hugetlb:            2048 kB
DirectMap4k:       28672 kB
DirectMap2M:     2068480 kB
DirectMap1G:    25165824 kB
"""

#: One livepatch function; which, and of what, is for the source that follows.
ONE_ROW = r"""
extern u64 limit_of(void) asm("\".klp.sym.vmlinux.vm_commit_limit,0\"");
#define ROWS 1
__attribute__((section(".text.line"), noinline)) u64 commit_limit(void) { return limit_of(); }
static const struct callback pre_patch[] TABLE("callbacks.pre_patch") = { { NULL, NULL } };
static const struct callback post_unpatch[] TABLE("callbacks.post_unpatch") = { { NULL, NULL } };
int show(void *m, void *v);
TEXT(replaced, "REPLACED")
static const struct row rows[] TABLE("funcs") = { { show, 1, 0, 1, 1, replaced, vmlinux } };
int seq_write(void *, const void *, size_t);
"""

PATCHED_MEMINFO = r"""
struct sysinfo { long uptime; u64 loads[3], totalram, freeram, sharedram, bufferram, totalswap, freeswap;
    u16 procs, pad; u64 totalhigh, freehigh; u32 mem_unit; };
_Static_assert(sizeof(struct sysinfo) == 112, "sysinfo");
void si_meminfo(struct sysinfo *); void si_swapinfo(struct sysinfo *); long si_mem_available(void);
u64 vm_memory_committed(void), vmalloc_nr_pages(void), pcpu_nr_pages(void), zswap_total_pages(void);
void hugetlb_report_meminfo(void *); void arch_report_meminfo(void *); void memtest_report_meminfo(void *);
void seq_put_decimal_ull_width(void *, const char *, u64, u32);
extern long vm_node_stat[], vm_zone_stat[], num_poisoned_pages; extern int zswap_stored_pages;
extern struct { u32 lock; long count; } vm_committed_as; extern char boot_cpu_data[];
static void kb(void *m, const char *label, u64 pages) {
    seq_put_decimal_ull_width(m, label, pages << 2, 8); seq_write(m, " kB\n", 4);
}
int show(void *m, void *v) {
    struct sysinfo i; long *n = vm_node_stat, *z = vm_zone_stat;
    si_meminfo(&i); si_swapinfo(&i);
    if (i.mem_unit != 4096 || i.totalhigh || i.freehigh || vm_committed_as.count != vm_memory_committed()) return -5;
    if (z[0] != i.freeram) return -6;
    kb(m, "MemTotal:       ", i.totalram); kb(m, "MemFree:        ", i.freeram);
    kb(m, "MemAvailable:   ", si_mem_available()); kb(m, "Buffers:        ", i.bufferram);
    kb(m, "Cached:         ", n[19] - n[41] - i.bufferram); kb(m, "SwapCached:     ", n[41]);
    kb(m, "Active:         ", n[1] + n[3]); kb(m, "Inactive:       ", n[0] + n[2]);
    kb(m, "Active(anon):   ", n[1]); kb(m, "Inactive(anon): ", n[0]); kb(m, "Active(file):   ", n[3]);
    kb(m, "Inactive(file): ", n[2]); kb(m, "Unevictable:    ", n[4]); kb(m, "Mlocked:        ", z[7]);
    kb(m, "SwapTotal:      ", i.totalswap); kb(m, "SwapFree:       ", i.freeswap);
    kb(m, "Zswap:          ", zswap_total_pages());
    seq_printf(m, "Zswapped:       %8lu kB\n", (u64)zswap_stored_pages << 2);
    kb(m, "Dirty:          ", n[20]); kb(m, "Writeback:      ", n[21]); kb(m, "AnonPages:      ", n[17]);
    kb(m, "Mapped:         ", n[18]); kb(m, "Shmem:          ", i.sharedram);
    kb(m, "KReclaimable:   ", n[5] + n[34]); kb(m, "Slab:           ", n[5] + n[6]);
    kb(m, "SReclaimable:   ", n[5]); kb(m, "SUnreclaim:     ", n[6]);
    seq_printf(m, "KernelStack:    %8lu kB\n", n[37]);
    kb(m, "PageTables:     ", n[38]); kb(m, "SecPageTables:  ", n[39]); kb(m, "NFS_Unstable:   ", 0);
    kb(m, "Bounce:         ", z[8]); kb(m, "WritebackTmp:   ", n[22]); kb(m, "CommitLimit:    ", commit_limit());
    kb(m, "Committed_AS:   ", vm_memory_committed());
    seq_printf(m, "VmallocTotal:   %8lu kB\n", boot_cpu_data[0x72] & 1 ? 13743895347199UL : 34359738367UL);
    kb(m, "VmallocUsed:    ", vmalloc_nr_pages()); kb(m, "VMALLOCCHUNK:   ", 0);
    kb(m, "Percpu:         ", pcpu_nr_pages());
    memtest_report_meminfo(m);
    seq_printf(m, "HardwareCorrupted: %5lu kB\n", num_poisoned_pages << 2);
    kb(m, "AnonHugePages:  ", n[28]); kb(m, "ShmemHugePages: ", n[24]); kb(m, "ShmemPmdMapped: ", n[25]);
    kb(m, "FileHugePages:  ", n[26]); kb(m, "FilePmdMapped:  ", n[27]); kb(m, "Unaccepted:     ", z[11]);
    hugetlb_report_meminfo(m); arch_report_meminfo(m);
    return 0;
}
"""

PATCHED_LOADAVG = r"""
void get_avenrun(u64 *, u64, int); u32 nr_running(void); extern int nr_threads; void *task_active_pid_ns(void *);
int show(void *m, void *v) {
    u64 a[3]; get_avenrun(a, 10, 0);
    u32 last = *(u32 *)((char *)task_active_pid_ns(NULL) + 20);
    for (int i = 0; i < 3; i++) seq_printf(m, "%lu.%02lu ", a[i] >> 11, (a[i] & 2047) * 100 >> 11);
    seq_printf(m, "%u/%d %d!\n", nr_running(), nr_threads, last - 1);
    return 0;
}
"""

PATCHED_UPTIME = r"""
struct times { u64 t[10]; }; struct ts { long sec, nsec; };
void kcpustat_cpu_fetch(struct times *, int); u64 get_idle_time(struct times *, int);
u64 ktime_get_with_offset(int); struct ts ns_to_timespec64(long);
void set_normalized_timespec64(struct ts *, long, long);
int show(void *m, void *v) {
    u64 idle = 0; struct times c; char *current, *time_ns; struct ts up, *offset;
    for (int i = 0; i < 2; i++) { kcpustat_cpu_fetch(&c, i); idle += get_idle_time(&c, i); }
    up = ns_to_timespec64(ktime_get_with_offset(1));
    asm volatile("movq %%gs:pcpu_hot, %0" : "=r" (current));
    time_ns = *(char **)(*(char **)(current + 3064) + 48); offset = (struct ts *)(time_ns + 56);
    set_normalized_timespec64(&up, up.sec + offset->sec, up.nsec + offset->nsec);
    seq_printf(m, "%lu.%02lu %lu.%02lu user %lu!\n", up.sec, up.nsec / 10000000, idle / 1000000000,
               idle % 1000000000 / 10000000, c.t[0] / 10000000);
    return 0;
}
"""


OLD, NEW = b"VmallocChunk", b"VMALLOCCHUNK"
FIVE_LEVELS = MEMINFO.replace(b"34359738367", b"13743895347199")
STAT = b"cpu  5 0 0 9955 0 0 0 0 0 0\ncpu0 1 2 3 9900 5 6 7 8 9 10\ncpu1 4 0 0 55 0 0 0 0 0 0\nintr 7\n"


@pytest.mark.parametrize(("name", "function", "source", "host", "wanted"), [
    *(
        ("meminfo", "meminfo_proc_show", PATCHED_MEMINFO, {"meminfo": text}, text.replace(OLD, NEW))
        for text in (MEMINFO, FIVE_LEVELS)
    ),
    *(
        ("loadavg", "loadavg_proc_show", PATCHED_LOADAVG, {"loadavg": text}, text[:-1] + b"!\n")
        for text in (b"0.00 0.01 0.99 1/107 4711\n", b"12.34 1.29 100.57 3/1107 4194304\n")
    ),
    (
        "uptime",
        "uptime_proc_show",
        PATCHED_UPTIME,
        {"uptime": b"123456.78 99.55\n", "stat": STAT},
        b"123456.78 99.55 user 4!\n",
    ),
])  # fmt: skip
def test_a_patched_copy_prints_the_numbers_of_the_host(
    run: Any, name: str, function: str, source: str, host: dict[str, bytes], wanted: bytes
) -> None:
    async def main() -> None:
        async with executing(more=(function,)) as (m, _):
            m.procfs.host_file = lambda name: host.get(name, b"")
            assert await m.kernfs.read_file(f"proc/{name}") == host[name]
            await m.init_module(dynamic("patch", ONE_ROW.replace("REPLACED", function) + source))
            await m.livepatch.wait_transition()
            assert await m.kernfs.read_file(f"proc/{name}") == wanted
            # they are read anew each time
            host[name] = host[name].replace(b"123456.78", b"123459.01").replace(b"20757268", b"20757264")
            wanted_now = wanted.replace(b"123456.78", b"123459.01").replace(b"20757268", b"20757264")
            assert await m.kernfs.read_file(f"proc/{name}") == wanted_now

    run(main)


@pytest.mark.parametrize(("name", "function"), [("cpuinfo", "show_cpuinfo"), ("devices", "devinfo_show")])
def test_a_copy_that_prints_an_item_of_a_list_is_refused_by_name(run: Any, name: str, function: str) -> None:
    source = ONE_ROW.replace("REPLACED", function) + "int show(void *m, void *v) { return *(long *)v; }\n"

    async def main() -> None:
        async with executing(more=(function,)) as (m, _):
            await m.init_module(dynamic("patch", source))
            await m.livepatch.wait_transition()
            with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                await m.kernfs.read_file(f"proc/{name}")
            assert info.value.errno == errno.EIO
            assert re.fullmatch(rf"klpfs: patch: its copy of {function} cannot run: .*", lines(m)[-1])
            assert not m.kernel.tainted & 1 << 7  # it did not crash

    run(main)
