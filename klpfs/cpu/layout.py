"""Where things stand: the emulated address space, and the C structures that module code and stubs share.

Model
    All offsets and sizes are in bytes. They are those of the 6.12 kernel for x86-64 in Debian's configuration (no lock
    debugging, SLUB, ORC unwinder, HZ 250), the one that its module builds see.

Source
    ``include/linux/{livepatch,module,moduleparam,workqueue_types,timer_types,completion,mutex_types,rwsem,semaphore,
    wait,sched,nsproxy,utsname,sysinfo,pid_namespace,time_namespace,percpu_counter,kernel_stat,seq_file,kobject,sysfs,proc_fs,bug,jump_label,dynamic_debug}.h``,
    ``arch/x86/include/asm/{orc_types,current,paravirt_types}.h``, ``Documentation/arch/x86/x86_64/mm.rst``; the
    numbers were read with ``offsetof`` by a compiler run against the headers of linux-headers-6.12-amd64.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["AREAS", "Area", "Field"]

PAGE_SIZE: Final = 4096
U64: Final = (1 << 64) - 1
U32: Final = (1 << 32) - 1

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4

HZ: Final = 250
NSEC_PER_JIFFY: Final = 1_000_000_000 // HZ
THREAD_SIZE: Final = 16384
MAX_SCHEDULE_TIMEOUT: Final = (1 << 63) - 1
NR_CPUS: Final = 2
"""Per-CPU copies that exist; emulated code always runs on CPU 0."""


class Area(NamedTuple):
    """A stretch of the emulated address space: *base* address, *size*, and *offset* in the shared memory file."""

    base: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.base + self.size


_SIZES: Final = {
    # name: (base, size). Bases as the kernel's memory map has them.
    "modules": (0xFFFFFFFFC0000000, 0x3F000000),
    "text": (0xFFFFFFFF81000000, 32 << 20),
    "data": (0xFFFFFFFF83800000, 4 << 20),
    "percpu": (0xFFFF88807DC00000, NR_CPUS * (256 << 10)),
    "heap": (0xFFFF888004000000, 64 << 20),
    "host": (0xFFFF888040000000, 16 << 20),
    "stack": (0xFFFFC90000000000, 16 << 20),
}


def _areas() -> dict[str, Area]:
    areas, offset = {}, 0
    for name, (base, size) in _SIZES.items():
        areas[name] = Area(base, size, offset)
        offset += size
    return areas


AREAS: Final = _areas()
SPACE_SIZE: Final = sum(area.size for area in AREAS.values())
"""Size of the shared memory file. It is sparse: pages that nobody touched take no memory."""

PERCPU_SIZE: Final = 256 << 10
PERCPU_HOT: Final = 0x34000
"""Address of ``pcpu_hot`` in a per-CPU area; per-CPU symbols are offsets from 0, as in the kernel."""
HRTIMER_BASES: Final = 0x35000
"""``hrtimer_bases.clock_base`` in a per-CPU area: one ``struct hrtimer_clock_base`` for each of HRTIMER_CLOCKS."""
HRTIMER_BASE_SIZE: Final = 64
HRTIMER_CLOCKS: Final = (
    (1, "ktime_get"),
    (0, "ktime_get_real_fast_ns"),
    (7, "ktime_get_boot_fast_ns"),
    (11, "ktime_get_real_fast_ns"),
)
"""Number of the clock (CLOCK_MONOTONIC and so on) and the kernel function that tells its time."""
PERCPU_MODULES: Final = 0x36000
"""Where the per-CPU data of modules begin."""
PERCPU_CANARY: Final = 0x28
"""``fixed_percpu_data.stack_canary``, which compiled code reads as ``%gs:0x28``."""

TEXT_SLOTS: Final = AREAS["text"].end - (1 << 20)
"""Where kernel functions get an address whose own one is not known, or taken."""
TEXT_SLOT_SIZE: Final = 16

MISSING_DATA: Final = 0xFFFFFFFF83400000
"""Where variables that are not emulated seem to stand if the data area covers their own address: nothing is mapped
here, so that an access is noticed, and refused by the variable's name."""
MISSING_DATA_SLOT: Final = 16 << 10
MISSING_DATA_END: Final = MISSING_DATA + (4 << 20)

TIME_PAGE: Final = AREAS["data"].base
"""First page of the data area: the clock, kept current by the host (jiffies, then nanoseconds, see the offsets)."""
TIME_JIFFIES: Final = 0
TIME_MONOTONIC: Final = 8
TIME_REAL: Final = 16
TIME_BOOT: Final = 24
INIT_TASK: Final = TIME_PAGE + PAGE_SIZE
"""``init_task``: the idle task of CPU 0, head of the list of all processes."""
INIT_NSPROXY: Final = TIME_PAGE + 256
"""``init_nsproxy``, to which ``nsproxy`` of every task points."""
INIT_TIME_NS: Final = TIME_PAGE + 384
"""``init_time_ns``."""
HOST_STAT_WORDS: Final = (
    "MemTotal", "MemFree", "MemAvailable", "Buffers", "Shmem", "SwapTotal", "SwapFree", "CommitLimit", "Committed_AS",
    "VmallocUsed", "Percpu", "Zswap", "avenrun0", "avenrun1", "avenrun2", "nr_running",
)  # fmt: skip
HOST_STATS: Final = TIME_PAGE + 512
"""Numbers of the host's, kept current by the host: one word for each of HOST_STAT_WORDS; memory in pages."""
HOST_TEXT_SIZE: Final = 1024
HOST_HUGETLB: Final = TIME_PAGE + 1024
HOST_ARCH_MEMINFO: Final = HOST_HUGETLB + HOST_TEXT_SIZE
HOST_MEMTEST: Final = HOST_ARCH_MEMINFO + HOST_TEXT_SIZE
"""Lines of the host's /proc/meminfo that a function of its own prints: strings, HOST_TEXT_SIZE bytes at most."""


class Field(NamedTuple):
    """A member of a structure."""

    offset: int
    size: int


MODULE_SIZE: Final = 1280
MODULE_STATE: Final = Field(0, 4)
MODULE_NAME: Final = Field(24, 56)
MODULE_VERSION: Final = Field(184, 8)
MODULE_SRCVERSION: Final = Field(192, 8)
MODULE_KP: Final = Field(264, 8)
MODULE_NUM_KP: Final = Field(272, 4)
MODULE_INIT: Final = Field(312, 8)
MODULE_TAINTS: Final = Field(848, 8)
MODULE_ARGS: Final = Field(944, 8)
MODULE_PERCPU: Final = Field(952, 8)
MODULE_PERCPU_SIZE: Final = Field(960, 4)
MODULE_KLP: Final = Field(1152, 1)
MODULE_KLP_ALIVE: Final = Field(1153, 1)
MODULE_EXIT: Final = Field(1200, 8)
MODULE_REFCNT: Final = Field(1208, 4)
MODULE_STATES: Final = {"LIVE": 0, "COMING": 1, "GOING": 2, "UNFORMED": 3}

KLP_PATCH_SIZE: Final = 200
KLP_PATCH_MOD: Final = Field(0, 8)
KLP_PATCH_OBJS: Final = Field(8, 8)
KLP_PATCH_STATES: Final = Field(16, 8)
KLP_PATCH_REPLACE: Final = Field(24, 1)
KLP_PATCH_ENABLED: Final = Field(128, 1)
KLP_PATCH_FORCED: Final = Field(129, 1)

KLP_OBJECT_SIZE: Final = 168
KLP_OBJECT_NAME: Final = Field(0, 8)
KLP_OBJECT_FUNCS: Final = Field(8, 8)
KLP_OBJECT_PRE_PATCH: Final = Field(16, 8)
KLP_OBJECT_POST_PATCH: Final = Field(24, 8)
KLP_OBJECT_PRE_UNPATCH: Final = Field(32, 8)
KLP_OBJECT_POST_UNPATCH: Final = Field(40, 8)
KLP_OBJECT_POST_UNPATCH_ENABLED: Final = Field(48, 1)
KLP_OBJECT_MOD: Final = Field(152, 8)
KLP_OBJECT_DYNAMIC: Final = Field(160, 1)
KLP_OBJECT_PATCHED: Final = Field(161, 1)

KLP_FUNC_SIZE: Final = 152
KLP_FUNC_OLD_NAME: Final = Field(0, 8)
KLP_FUNC_NEW_FUNC: Final = Field(8, 8)
KLP_FUNC_OLD_SYMPOS: Final = Field(16, 8)
KLP_FUNC_OLD_FUNC: Final = Field(24, 8)
KLP_FUNC_OLD_SIZE: Final = Field(128, 8)
KLP_FUNC_NEW_SIZE: Final = Field(136, 8)
KLP_FUNC_NOP: Final = Field(144, 1)
KLP_FUNC_PATCHED: Final = Field(145, 1)
KLP_FUNC_TRANSITION: Final = Field(146, 1)

KLP_STATE_SIZE: Final = 24
KLP_STATE_ID: Final = Field(0, 8)
KLP_STATE_VERSION: Final = Field(8, 4)
KLP_STATE_DATA: Final = Field(16, 8)

TASK_SIZE: Final = 9792
TASK_THREAD_FLAGS: Final = Field(0, 8)
TASK_STATE: Final = Field(24, 4)
TASK_STACK: Final = Field(32, 8)
TASK_USAGE: Final = Field(40, 4)
TASK_FLAGS: Final = Field(44, 4)
TASK_PRIO: Final = Field(108, 4)
TASK_PID: Final = Field(2432, 4)
TASK_TGID: Final = Field(2436, 4)
TASK_REAL_PARENT: Final = Field(2448, 8)
TASK_PARENT: Final = Field(2456, 8)
TASK_GROUP_LEADER: Final = Field(2496, 8)
TASK_REAL_CRED: Final = Field(2952, 8)
TASK_CRED: Final = Field(2960, 8)
TASK_COMM: Final = Field(2976, 16)
TASK_NSPROXY: Final = Field(3064, 8)
TASK_TASKS: Final = Field(2224, 16)
TASK_PATCH_STATE: Final = Field(5212, 4)
CRED_SIZE: Final = 184
CRED_UIDS: Final = Field(8, 32)
"""uid, gid, suid, sgid, euid, egid, fsuid, fsgid: 4 bytes each."""

TASK_RUNNING: Final = 0
TASK_INTERRUPTIBLE: Final = 1
TASK_UNINTERRUPTIBLE: Final = 2
TASK_NOLOAD: Final = 0x400
PF_WQ_WORKER: Final = 0x00000020
PF_KTHREAD: Final = 0x00200000
TIF_SIGPENDING: Final = 2
TIF_NOTIFY_SIGNAL: Final = 17

PCPU_CURRENT: Final = Field(0, 8)
PCPU_PREEMPT_COUNT: Final = Field(8, 4)
PCPU_CPU_NUMBER: Final = Field(12, 4)
PCPU_TOP_OF_STACK: Final = Field(24, 8)

WORK_SIZE: Final = 32
WORK_DATA: Final = Field(0, 8)
WORK_FUNC: Final = Field(24, 8)
DELAYED_WORK_TIMER: Final = Field(32, 40)
DELAYED_WORK_WQ: Final = Field(72, 8)
WORK_STRUCT_PENDING: Final = 1

TIMER_ENTRY_PPREV: Final = Field(8, 8)
TIMER_EXPIRES: Final = Field(16, 8)
TIMER_FUNCTION: Final = Field(24, 8)
TIMER_FLAGS: Final = Field(32, 4)

HRTIMER_EXPIRES: Final = Field(24, 8)
HRTIMER_SOFTEXPIRES: Final = Field(32, 8)
HRTIMER_FUNCTION: Final = Field(40, 8)
HRTIMER_BASE: Final = Field(48, 8)
HRTIMER_STATE: Final = Field(56, 1)
CLOCK_BASE_INDEX: Final = Field(8, 4)
CLOCK_BASE_CLOCKID: Final = Field(12, 4)
CLOCK_BASE_GET_TIME: Final = Field(48, 8)

COMPLETION_DONE: Final = Field(0, 4)
COMPLETION_LIST: Final = Field(16, 16)
COMPLETE_ALL: Final = 0xFFFFFFFF  # UINT_MAX
MUTEX_OWNER: Final = Field(0, 8)
MUTEX_LIST: Final = Field(16, 16)
RWSEM_COUNT: Final = Field(0, 8)
SEMAPHORE_COUNT: Final = Field(4, 4)
WAIT_HEAD_LIST: Final = Field(8, 16)
WAIT_ENTRY_FLAGS: Final = Field(0, 4)
WAIT_ENTRY_PRIVATE: Final = Field(8, 8)
WAIT_ENTRY_FUNC: Final = Field(16, 8)
WAIT_ENTRY_LIST: Final = Field(24, 16)

KOBJECT_SIZE: Final = 64
KOBJECT_NAME: Final = Field(0, 8)
KOBJECT_PARENT: Final = Field(24, 8)
KOBJECT_KSET: Final = Field(32, 8)
KOBJECT_KTYPE: Final = Field(40, 8)
KOBJECT_REF: Final = Field(56, 4)
ATTRIBUTE_NAME: Final = Field(0, 8)
ATTRIBUTE_MODE: Final = Field(8, 2)
KOBJ_ATTRIBUTE_SHOW: Final = Field(16, 8)
KOBJ_ATTRIBUTE_STORE: Final = Field(24, 8)
ATTRIBUTE_GROUP_NAME: Final = Field(0, 8)
ATTRIBUTE_GROUP_IS_VISIBLE: Final = Field(8, 8)
ATTRIBUTE_GROUP_ATTRS: Final = Field(24, 8)
ATTRIBUTE_GROUP_BIN_ATTRS: Final = Field(32, 8)
KTYPE_RELEASE: Final = Field(0, 8)
KTYPE_SYSFS_OPS: Final = Field(8, 8)
KTYPE_DEFAULT_GROUPS: Final = Field(16, 8)
SYSFS_OPS_SHOW: Final = Field(0, 8)
SYSFS_OPS_STORE: Final = Field(8, 8)

KSET_SIZE: Final = 96
KSET_KOBJ: Final = 24
"""Offset of the kobject in a kset."""
DEVICE_SIZE: Final = 768
DEVICE_INIT_NAME: Final = Field(80, 8)
DEVICE_BUS: Final = Field(96, 8)
DEVICE_DRIVER: Final = Field(104, 8)
DEVICE_DRIVER_DATA: Final = Field(120, 8)
DEVICE_DEVT: Final = Field(676, 4)
DEVICE_CLASS: Final = Field(704, 8)
CLASS_SIZE: Final = 96
CLASS_DEV_GROUPS: Final = Field(16, 8)
MISC_SIZE: Final = 80
MISC_MINOR: Final = Field(0, 4)
MISC_NAME: Final = Field(8, 8)
MISC_FOPS: Final = Field(16, 8)
MISC_THIS_DEVICE: Final = Field(48, 8)
MISC_GROUPS: Final = Field(56, 8)
MISC_MODE: Final = Field(72, 2)
CDEV_SIZE: Final = 104
CDEV_OPS: Final = Field(72, 8)
CDEV_DEV: Final = Field(96, 4)
CDEV_COUNT: Final = Field(100, 4)

SEQ_FILE_SIZE: Final = 120
SEQ_BUF: Final = Field(0, 8)
SEQ_SIZE: Final = Field(8, 8)
SEQ_COUNT: Final = Field(24, 8)
SEQ_PAD_UNTIL: Final = Field(32, 8)
SEQ_OP: Final = Field(88, 8)
SEQ_FILE: Final = Field(104, 8)
SEQ_PRIVATE: Final = Field(112, 8)

PARAM_SIZE: Final = 40
PARAM_NAME: Final = Field(0, 8)
PARAM_OPS: Final = Field(16, 8)
PARAM_PERM: Final = Field(24, 2)
PARAM_FLAGS: Final = Field(27, 1)
PARAM_ARG: Final = Field(32, 8)
PARAM_OPS_SIZE: Final = 32
PARAM_OPS_FLAGS: Final = Field(0, 4)
PARAM_OPS_SET: Final = Field(8, 8)
PARAM_OPS_GET: Final = Field(16, 8)
PARAM_OPS_FREE: Final = Field(24, 8)
PARAM_STRING_MAXLEN: Final = Field(0, 4)
PARAM_STRING_STRING: Final = Field(8, 8)
PARAM_ARRAY_MAX: Final = Field(0, 4)
PARAM_ARRAY_ELEMSIZE: Final = Field(4, 4)
PARAM_ARRAY_NUM: Final = Field(8, 8)
PARAM_ARRAY_OPS: Final = Field(16, 8)
PARAM_ARRAY_ELEM: Final = Field(24, 8)

PROC_OPEN: Final = Field(8, 8)
PROC_READ: Final = Field(16, 8)
PROC_READ_ITER: Final = Field(24, 8)
PROC_WRITE: Final = Field(32, 8)
PROC_RELEASE: Final = Field(48, 8)
FOPS_SIZE: Final = 264
FOPS_OWNER: Final = Field(0, 8)
FOPS_READ: Final = Field(24, 8)
FOPS_WRITE: Final = Field(32, 8)
FOPS_OPEN: Final = Field(104, 8)
FOPS_RELEASE: Final = Field(120, 8)
FILE_SIZE: Final = 184
FILE_MODE: Final = Field(12, 4)
FILE_OP: Final = Field(16, 8)
FILE_FLAGS: Final = Field(48, 4)
FILE_PRIVATE: Final = Field(32, 8)
FILE_INODE: Final = Field(40, 8)
FILE_POS: Final = Field(112, 8)
INODE_SIZE: Final = 624
INODE_RDEV: Final = Field(76, 4)
INODE_CDEV: Final = Field(576, 8)
INODE_PRIVATE: Final = Field(616, 8)

KPROBE_SIZE: Final = 128
KPROBE_NMISSED: Final = Field(32, 8)
KPROBE_ADDR: Final = Field(40, 8)
KPROBE_SYMBOL_NAME: Final = Field(48, 8)
KPROBE_OFFSET: Final = Field(56, 4)
KPROBE_PRE_HANDLER: Final = Field(64, 8)
KPROBE_POST_HANDLER: Final = Field(72, 8)
KPROBE_FLAGS: Final = Field(120, 4)
KPROBE_FLAG_DISABLED: Final = 2
KRETPROBE_SIZE: Final = 168
KRETPROBE_HANDLER: Final = Field(128, 8)
KRETPROBE_ENTRY_HANDLER: Final = Field(136, 8)
KRETPROBE_MAXACTIVE: Final = Field(144, 4)
KRETPROBE_NMISSED: Final = Field(148, 4)
KRETPROBE_DATA_SIZE: Final = Field(152, 8)
KRETPROBE_RH: Final = Field(160, 8)
KRETPROBE_INSTANCE_SIZE: Final = 48
RETHOOK_SIZE: Final = 88
RETHOOK_NODE_RETHOOK: Final = Field(24, 8)
RETHOOK_NODE_RET_ADDR: Final = Field(32, 8)
RETHOOK_NODE_FRAME: Final = Field(40, 8)
FTRACE_OPS_SIZE: Final = 216
FTRACE_OPS_FLAGS: Final = Field(16, 8)
FTRACE_OPS_FL_IPMODIFY: Final = 1 << 13

BLOCKING_NOTIFIER_HEAD: Final = 40
"""Offset of the first block in a ``struct blocking_notifier_head``."""
BUG_ENTRY_SIZE: Final = 12
BUG_FILE: Final = Field(4, 4)
BUG_LINE: Final = Field(8, 2)
BUG_FLAGS: Final = Field(10, 2)
BUGFLAG_WARNING: Final = 1
BUGFLAG_ONCE: Final = 2
BUGFLAG_DONE: Final = 4
BUGFLAG_NO_CUT_HERE: Final = 8

JUMP_ENTRY_SIZE: Final = 16
STATIC_KEY_ENABLED: Final = Field(0, 4)
DDEBUG_SIZE: Final = 56
DDEBUG_MODNAME: Final = Field(0, 8)
DDEBUG_FUNCTION: Final = Field(8, 8)
DDEBUG_FILENAME: Final = Field(16, 8)
DDEBUG_FORMAT: Final = Field(24, 8)
DDEBUG_BITS: Final = Field(32, 4)
"""lineno in the low 18 bits, class in 6, flags in 8."""
DDEBUG_KEY: Final = Field(40, 16)
ORC_ENTRY_SIZE: Final = 6
MODVERSION_SIZE: Final = 64

RATELIMIT_INTERVAL: Final = Field(4, 4)
RATELIMIT_BURST: Final = Field(8, 4)
RATELIMIT_PRINTED: Final = Field(12, 4)
RATELIMIT_MISSED: Final = Field(16, 4)
RATELIMIT_BEGIN: Final = Field(24, 8)

PV_OPS_SIZE: Final = 664
PV_IRQ_SAVE_FL: Final = 240
PV_IRQ_DISABLE: Final = 248
PV_IRQ_ENABLE: Final = 256
PV_QUEUED_SPIN_UNLOCK: Final = 632
PV_VCPU_IS_PREEMPTED: Final = 656

KMALLOC_CACHES_SIZE: Final = 5 * 14 * 8
UTS_NAME_SIZE: Final = 65
NSPROXY_COUNT: Final = Field(0, 4)
NSPROXY_UTS_NS: Final = Field(8, 8)
NSPROXY_TIME_NS: Final = Field(48, 8)
TIME_NS_BOOTTIME: Final = 56
"""``offsets.boottime`` of ``struct time_namespace``: a ``struct timespec64``."""
PID_NS_IDR_NEXT: Final = Field(20, 4)
PERCPU_COUNTER_COUNT: Final = Field(8, 8)
SYSINFO_TOTALRAM: Final = 32
SYSINFO_TOTALSWAP: Final = 64
SYSINFO_TOTALHIGH: Final = 88
KERNEL_CPUSTAT_SIZE: Final = 80
CPUTIME_IDLE: Final = 5 * 8
CPUINFO_LA57_BYTE: Final = 48 + 528 // 8
"""The byte of ``x86_capability`` in which X86_FEATURE_LA57, the five levels of page tables, is the lowest bit."""
