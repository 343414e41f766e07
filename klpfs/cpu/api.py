"""The kernel functions and variables that executed module code can use: one table.

Model
    A module's undefined symbols resolve to addresses of the emulated vmlinux. At such an address stands either real
    code (*native*: return thunks, ``__fentry__``), or a trap that a stub answers. A *local* stub works inside the
    sandbox on the emulated memory; a *core* stub is an event that the daemon answers with its own livepatch core,
    workqueue, sysfs. A function that is not in this table can be linked against, as long as the kernel has it; a call
    of it ends the calling thread with an oops that names it.

    A line of the table reads ``type[!] name(types)``. Types: ``ptr ulong size`` 64 bits; ``long`` signed 64; ``int
    uint`` 32; ``bool``; ``str`` a NUL-terminated string; ``fmt`` a printf format with the arguments that follow it;
    ``va`` a format, then a ``va_list``. ``!`` marks functions that may block; a thread that waits in one is asleep,
    with its call chain on the stack of its task. Several names in one line share signature and stub.

Locks
    None; constant. Importable without the execution engine.

Source
    Prototypes: the headers of Linux 6.12 (include/linux/*.h) as configured by Debian for amd64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

__all__ = ["API", "DATA", "HOST_STATS", "NATIVE", "SUPPORTED", "Api", "Data", "Kind"]


class Kind(Enum):
    """Where a kernel function is handled."""

    NATIVE = "native"
    LOCAL = "local"
    CORE = "core"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Api:
    """A kernel function: its *result* and *args* types, whether it may *block*, and the name of its *stub*."""

    name: str
    kind: Kind
    result: str
    args: tuple[str, ...]
    blocks: bool
    stub: str

    @property
    def prototype(self) -> str:
        """As the table has it."""
        return f"{self.result} {self.name}({', '.join(self.args)})"


@dataclass(frozen=True, slots=True)
class Data:
    """A kernel variable: *size* in bytes, *percpu* address or 0, and how it begins (see :mod:`klpfs.cpu.vmlinux`)."""

    name: str
    size: int
    percpu: int = 0
    alias: str = ""


NATIVE: Mapping[str, bytes] = MappingProxyType(
    {
        # name: machine code. ret; ret after clearing eax; jmp *reg with the pad that keeps slots apart.
        "__fentry__": b"\xc3",
        "__x86_return_thunk": b"\xc3",
        "__SCT__cond_resched": b"\x31\xc0\xc3",
        "__SCT__might_resched": b"\x31\xc0\xc3",
        "__SCT__preempt_schedule": b"\xc3",
        "__SCT__preempt_schedule_notrace": b"\xc3",
        "preempt_schedule_thunk": b"\xc3",
        "preempt_schedule_notrace_thunk": b"\xc3",
        "pv_native_save_fl": b"\xb8\x02\x02\x00\x00\xc3",
        "pv_native_irq_disable": b"\xc3",
        "pv_native_irq_enable": b"\xc3",
        "__native_queued_spin_unlock": b"\xc6\x07\x00\xc3",
        "__native_vcpu_is_preempted": b"\x31\xc0\xc3",
        **{
            f"__x86_indirect_thunk_{reg}": (b"\xff" if number < 8 else b"\x41\xff") + bytes([0xE0 | number & 7])
            for number, reg in enumerate(
                ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
            )
            if reg != "rsp"
        },
    }
)

_LOCAL = """
# memory (mm/slub.c, mm/util.c, mm/vmalloc.c)
ptr __kmalloc_noprof __kmalloc_large_noprof(size, uint)
ptr __kmalloc_node_noprof(size, ptr, uint, int)
ptr __kvmalloc_node_noprof(size, ptr, uint, int)
ptr __kmalloc_cache_noprof(ptr, uint, size)
ptr __kmalloc_cache_node_noprof(ptr, uint, int, size)
ptr __kmalloc_large_node_noprof(size, uint, int)
ptr __kmalloc_node_track_caller_noprof(size, ptr, uint, int, ulong)
ptr krealloc_noprof(ptr, size, uint)
ptr kvrealloc_noprof(ptr, size, uint)
void kfree kvfree vfree kfree_sensitive kfree_const vfree_atomic(ptr)
void kvfree_sensitive(ptr, size)
size ksize(ptr)
ptr kmemdup_noprof(ptr, size, uint)
ptr kvmemdup(ptr, size, uint)
ptr kmemdup_nul(ptr, size, uint)
ptr kstrdup(ptr, uint)
ptr kstrdup_const(ptr, uint)
ptr kstrndup(ptr, size, uint)
ptr vmalloc_noprof vzalloc_noprof vmalloc_user_noprof(ulong)
ptr vmalloc_node_noprof vzalloc_node_noprof(ulong, int)
ptr __vmalloc_noprof(ulong, uint)
ulong get_free_pages_noprof(uint, uint)
ulong get_zeroed_page_noprof(uint)
void free_pages(ulong, uint)
ptr __kmem_cache_create_args(ptr, uint, ptr, uint)
ptr! kmem_cache_alloc_noprof(ptr, uint)
ptr! kmem_cache_alloc_node_noprof(ptr, uint, int)
ptr mempool_create_node_noprof(int, ptr, ptr, ptr, uint, int)
ptr! mempool_alloc_noprof(ptr, uint)
void! mempool_free(ptr, ptr)
void mempool_destroy(ptr)
ptr mempool_kmalloc(uint, ulong)
void mempool_kfree(ptr, ptr)
ptr! mempool_alloc_slab(uint, ptr)
void mempool_free_slab(ptr, ptr)
ptr alloc_pages_noprof(uint, uint)
void __free_pages(ptr, uint)
void kmem_cache_free(ptr, ptr)
void kmem_cache_destroy(ptr)
uint kmem_cache_size(ptr)
int kmem_cache_shrink(ptr)
ptr pcpu_alloc_noprof(size, size, bool, uint)
void free_percpu(ptr)

# strings and bytes (lib/string.c, lib/string_helpers.c, arch/x86/lib)
ptr memcpy __memcpy memmove __memmove(ptr, ptr, size)
ptr memset __memset(ptr, int, size)
int memcmp bcmp(ptr, ptr, size)
ptr memchr memscan(ptr, int, size)
ptr memchr_inv(ptr, int, size)
size strlen(ptr)
size strnlen(ptr, size)
int strcmp(ptr, ptr)
int strncmp(ptr, ptr, size)
int strcasecmp(ptr, ptr)
int strncasecmp(ptr, ptr, size)
ptr strcpy(ptr, ptr)
ptr strncpy(ptr, ptr, size)
size strlcpy(ptr, ptr, size)
long sized_strscpy strscpy(ptr, ptr, size)
ptr strcat(ptr, ptr)
ptr strncat(ptr, ptr, size)
size strlcat(ptr, ptr, size)
ptr stpcpy(ptr, ptr)
ptr strchr(ptr, int)
ptr strrchr(ptr, int)
ptr strchrnul(ptr, int)
ptr strnchr(ptr, size, int)
ptr strstr(ptr, ptr)
ptr strnstr(ptr, ptr, size)
ptr strsep(ptr, ptr)
size strspn(ptr, ptr)
size strcspn(ptr, ptr)
ptr strpbrk(ptr, ptr)
ptr strim(ptr)
ptr skip_spaces(ptr)
ptr strreplace(ptr, int, int)
bool sysfs_streq(ptr, ptr)
int match_string(ptr, size, str)
int __sysfs_match_string(ptr, size, ptr)
int hex_to_bin(uint)
int hex2bin(ptr, ptr, size)
ptr bin2hex(ptr, ptr, size)

# numbers (lib/kstrtox.c, lib/vsprintf.c, lib/math)
int kstrtoull kstrtoll kstrtouint kstrtoint kstrtou16 kstrtos16 kstrtou8 kstrtos8 _kstrtoul _kstrtol(str, uint, ptr)
int kstrtobool(ptr, ptr)
int kstrtoull_from_user kstrtoll_from_user kstrtoul_from_user kstrtol_from_user(ptr, size, uint, ptr)
int kstrtouint_from_user kstrtoint_from_user kstrtou8_from_user(ptr, size, uint, ptr)
int kstrtobool_from_user(ptr, size, ptr)
ulong simple_strtoul simple_strtoull simple_strtol simple_strtoll(ptr, ptr, uint)
ulong memparse(ptr, ptr)
ulong int_sqrt gcd lcm(ulong, ulong)
uint __sw_hweight32(uint)
ulong __sw_hweight64(ulong)
ulong _find_first_bit _find_first_zero_bit _find_last_bit(ptr, ulong)
ulong _find_next_bit _find_next_zero_bit(ptr, ulong, ulong)
uint crc32_le(uint, ptr, size)
void get_random_bytes(ptr, size)
uint get_random_u32 get_random_u8 get_random_u16()
ulong __bitmap_weight(ptr, uint)
void __bitmap_set __bitmap_clear(ptr, uint, int)
bool __bitmap_equal __bitmap_subset __bitmap_intersects(ptr, ptr, uint)
bool __bitmap_and __bitmap_or __bitmap_xor __bitmap_andnot(ptr, ptr, ptr, uint)
ptr bitmap_alloc bitmap_zalloc(uint, uint)
void bitmap_free(ptr)
bool glob_match(str, str)
int string_get_size(ulong, ulong, uint, ptr, int)
ptr argv_split(uint, ptr, ptr)
void argv_free(ptr)
uint __get_random_u32_below(uint)
ulong get_random_u64()

# printing (lib/vsprintf.c, fs/seq_file.c, fs/sysfs/file.c)
int sprintf(ptr, fmt)
int snprintf(ptr, size, fmt)
int scnprintf(ptr, size, fmt)
int vsprintf(ptr, va)
int vsnprintf(ptr, size, va)
int vscnprintf(ptr, size, va)
int sysfs_emit(ptr, fmt)
int sysfs_emit_at(ptr, int, fmt)
ptr kasprintf(uint, fmt)
ptr kvasprintf(uint, va)
ptr kvasprintf_const(uint, va)
int sscanf(ptr, fmtptr)
int vsscanf(ptr, ptr, ptr)
int hex_dump_to_buffer(ptr, size, int, int, ptr, size, bool)
void seq_printf(ptr, fmt)
void seq_vprintf(ptr, va)
void __seq_puts seq_puts(ptr, ptr)
void seq_putc(ptr, int)
int seq_write(ptr, ptr, size)
void seq_put_decimal_ull(ptr, ptr, ulong)
void seq_put_decimal_ull_width(ptr, ptr, ulong, uint)
void seq_put_decimal_ll(ptr, ptr, long)
void seq_put_hex_ll(ptr, ptr, ulong, uint)
void seq_pad(ptr, int)
int single_open(ptr, ptr, ptr)
int single_open_size(ptr, ptr, ptr, size)
int seq_open(ptr, ptr)
ptr __seq_open_private(ptr, ptr, int)
int seq_open_private(ptr, ptr, int)
int single_release seq_release seq_release_private(ptr, ptr)
long! seq_read(ptr, ptr, size, ptr)
long seq_lseek(ptr, long, int)
ptr seq_list_start(ptr, long)
ptr seq_list_start_head(ptr, long)
ptr seq_list_next(ptr, ptr, ptr)
long simple_read_from_buffer(ptr, size, ptr, ptr, size)
long simple_write_to_buffer(ptr, size, ptr, ptr, size)
long noop_llseek default_llseek generic_file_llseek(ptr, long, int)
int simple_open(ptr, ptr)
ptr pde_data(ptr)
int sprint_symbol sprint_symbol_no_offset sprint_symbol_build_id(ptr, ulong)

# user memory: there is none but what the kernel hands in (arch/x86/lib/usercopy_64.c, mm/maccess.c)
ulong _copy_from_user _copy_to_user(ptr, ptr, ulong)
long copy_from_kernel_nofault copy_to_kernel_nofault(ptr, ptr, size)
long strncpy_from_user(ptr, ptr, long)
int __get_user_1 __get_user_2 __get_user_4 __get_user_8 __put_user_1 __put_user_2 __put_user_4 __put_user_8()
int __get_user_nocheck_1 __get_user_nocheck_2 __get_user_nocheck_4 __get_user_nocheck_8()
int __put_user_nocheck_1 __put_user_nocheck_2 __put_user_nocheck_4 __put_user_nocheck_8()
ulong __clear_user clear_user(ptr, ulong)
long strnlen_user(ptr, long)
ptr memdup_user vmemdup_user memdup_user_nul(ptr, size)
ptr strndup_user(ptr, long)
int simple_attr_open(ptr, ptr, ptr, ptr, ptr)
int simple_attr_release nonseekable_open stream_open(ptr, ptr)
long! simple_attr_read simple_attr_write simple_attr_write_signed(ptr, ptr, size, ptr)
long! debugfs_attr_read debugfs_attr_write debugfs_attr_write_signed(ptr, ptr, size, ptr)
void __check_object_size(ptr, ulong, bool)
void __copy_overflow(int, ulong)

# lists, trees, sorting (lib/list_debug.c, lib/sort.c, lib/bsearch.c, lib/list_sort.c, lib/rbtree.c, lib/idr.c)
bool __list_add_valid_or_report(ptr, ptr, ptr)
bool __list_del_entry_valid_or_report(ptr)
void! sort(ptr, size, size, ptr, ptr)
void! sort_r(ptr, size, size, ptr, ptr, ptr)
ptr! bsearch(ptr, ptr, size, size, ptr)
void! list_sort(ptr, ptr, ptr)
void rb_insert_color(ptr, ptr)
void rb_erase(ptr, ptr)
ptr rb_next rb_prev(ptr)
ptr rb_first rb_last(ptr)
void rb_replace_node(ptr, ptr, ptr)
int idr_alloc(ptr, ptr, int, int, uint)
int idr_alloc_cyclic(ptr, ptr, int, int, uint)
ptr idr_find(ptr, ulong)
ptr idr_remove(ptr, ulong)
ptr idr_replace(ptr, ptr, ulong)
ptr idr_get_next(ptr, ptr)
int! idr_for_each(ptr, ptr, ptr)
void idr_destroy(ptr)
int ida_alloc_range(ptr, uint, uint, uint)
void ida_free(ptr, uint)
void ida_destroy(ptr)
ptr xa_load(ptr, ulong)
ptr xa_store __xa_store(ptr, ulong, ptr, uint)
ptr xa_erase __xa_erase(ptr, ulong)
int __xa_alloc(ptr, ptr, ptr, ulong, uint)
int __xa_insert(ptr, ulong, ptr, uint)
ptr __xa_cmpxchg(ptr, ulong, ptr, ptr, uint)
int radix_tree_insert(ptr, ulong, ptr)
ptr radix_tree_lookup radix_tree_delete(ptr, ulong)
int __kfifo_alloc(ptr, uint, size, uint)
int __kfifo_init(ptr, ptr, uint, size)
void __kfifo_free(ptr)
uint __kfifo_in __kfifo_out __kfifo_out_peek(ptr, ptr, uint)
bool llist_add_batch(ptr, ptr, ptr)
ptr llist_del_first llist_reverse_order(ptr)
ptr rb_first_postorder rb_next_postorder(ptr)
void xa_destroy(ptr)
ptr xa_find xa_find_after(ptr, ptr, ulong, uint)

# locks (kernel/locking)
void __mutex_init(ptr, ptr, ptr)
void! mutex_lock(ptr)
int! mutex_lock_interruptible mutex_lock_killable(ptr)
int mutex_trylock(ptr)
void mutex_unlock(ptr)
bool mutex_is_locked(ptr)
void __init_rwsem(ptr, ptr, ptr)
void! down_read(ptr)
int! down_read_interruptible down_read_killable(ptr)
int down_read_trylock(ptr)
void up_read(ptr)
void! down_write(ptr)
int! down_write_killable(ptr)
int down_write_trylock(ptr)
void up_write(ptr)
void downgrade_write(ptr)
void! down(ptr)
int! down_interruptible down_killable(ptr)
int down_trylock(ptr)
int! down_timeout(ptr, long)
void up(ptr)
void! _raw_spin_lock _raw_spin_lock_irq _raw_spin_lock_bh(ptr)
ulong! _raw_spin_lock_irqsave(ptr)
void _raw_spin_unlock _raw_spin_unlock_irq _raw_spin_unlock_bh(ptr)
void _raw_spin_unlock_irqrestore(ptr, ulong)
int _raw_spin_trylock _raw_spin_trylock_bh(ptr)
void! _raw_read_lock _raw_read_lock_irq _raw_read_lock_bh _raw_write_lock _raw_write_lock_irq _raw_write_lock_bh(ptr)
ulong! _raw_read_lock_irqsave _raw_write_lock_irqsave(ptr)
void _raw_read_unlock _raw_read_unlock_irq _raw_read_unlock_bh(ptr)
void _raw_write_unlock _raw_write_unlock_irq _raw_write_unlock_bh(ptr)
void _raw_read_unlock_irqrestore _raw_write_unlock_irqrestore(ptr, ulong)
void refcount_warn_saturate(ptr, int)
bool refcount_dec_if_one(ptr)
bool refcount_dec_not_one(ptr)
bool! refcount_dec_and_mutex_lock(ptr, ptr)
bool! _atomic_dec_and_lock refcount_dec_and_lock(ptr, ptr)
int! atomic_dec_and_mutex_lock(ptr, ptr)

# RCU (kernel/rcu)
void __rcu_read_lock __rcu_read_unlock()
void! synchronize_rcu synchronize_rcu_expedited rcu_barrier()
void! synchronize_srcu synchronize_srcu_expedited srcu_barrier(ptr)
void kvfree_call_rcu(ptr, ptr)
int __srcu_read_lock(ptr)
void __srcu_read_unlock(ptr, int)
int init_srcu_struct(ptr)
void cleanup_srcu_struct(ptr)

# waiting (kernel/sched/wait.c, completion.c, core.c, kernel/time/timer.c)
void __init_waitqueue_head(ptr, str, ptr)
void __init_swait_queue_head(ptr, str, ptr)
void init_wait_entry(ptr, int)
void prepare_to_wait(ptr, ptr, int)
bool prepare_to_wait_exclusive(ptr, ptr, int)
long prepare_to_wait_event(ptr, ptr, int)
void finish_wait(ptr, ptr)
void add_wait_queue add_wait_queue_exclusive(ptr, ptr)
void remove_wait_queue(ptr, ptr)
long! wait_woken(ptr, uint, long)
int! __wake_up(ptr, uint, int, ptr)
int! __wake_up_sync(ptr, uint)
void! __wake_up_locked(ptr, uint, int)
int autoremove_wake_function default_wake_function woken_wake_function(ptr, uint, int, ptr)
int wake_up_process(ptr)
int wake_up_state(ptr, uint)
void! schedule io_schedule()
long! schedule_timeout schedule_timeout_interruptible schedule_timeout_uninterruptible schedule_timeout_killable(long)
long! schedule_timeout_idle(long)
void! wait_for_completion(ptr)
ulong! wait_for_completion_timeout wait_for_completion_io_timeout(ptr, ulong)
int! wait_for_completion_interruptible wait_for_completion_killable(ptr)
long! wait_for_completion_interruptible_timeout wait_for_completion_killable_timeout(ptr, ulong)
bool try_wait_for_completion completion_done(ptr)
void complete complete_all(ptr)
void! msleep(uint)
ulong! msleep_interruptible(uint)
void! usleep_range_state(ulong, ulong, uint)
void! __udelay __ndelay __const_udelay(ulong)
int! __cond_resched()
void! yield()
bool kthread_should_stop kthread_should_park()
ptr kthread_data(ptr)

# time (kernel/time)
ulong ktime_get ktime_get_raw ktime_get_mono_fast_ns()
ulong ktime_get_raw_fast_ns ktime_get_boot_fast_ns ktime_get_real_fast_ns()
ulong ktime_get_with_offset ktime_get_coarse_with_offset(int)
ulong sched_clock local_clock()
void ktime_get_ts64 ktime_get_real_ts64 ktime_get_coarse_ts64 ktime_get_coarse_real_ts64 ktime_get_raw_ts64(ptr)
long ktime_get_seconds ktime_get_real_seconds()
ulong get_jiffies_64()
uint jiffies_to_msecs jiffies_to_usecs(ulong)
ulong __msecs_to_jiffies __usecs_to_jiffies(uint)
ulong nsecs_to_jiffies nsecs_to_jiffies64 jiffies64_to_nsecs jiffies64_to_msecs jiffies_64_to_clock_t(ulong)
ulong round_jiffies round_jiffies_relative round_jiffies_up(ulong)

# counters: the host's (mm, fs/proc/meminfo.c, kernel/sched/loadavg.c, kernel/sched/cputime.c)
void si_meminfo si_swapinfo(ptr)
long si_mem_available()
ulong vm_commit_limit vm_memory_committed vmalloc_nr_pages pcpu_nr_pages zswap_total_pages()
void hugetlb_report_meminfo arch_report_meminfo memtest_report_meminfo(ptr)
void get_avenrun(ptr, ulong, int)
uint nr_running()
ulong get_idle_time(ptr, int)
long ns_to_timespec64(long)
void set_normalized_timespec64(ptr, long, long)
ulong nsec_to_clock_t(ulong)

# tasks and modules (kernel/pid.c, kernel/module/main.c, kernel/sched)
int __task_pid_nr_ns(ptr, int, ptr)
ptr __get_task_comm(ptr, size, ptr)
void __put_task_struct(ptr)
void set_user_nice(ptr, long)
bool capable(int)
uint from_kuid from_kuid_munged from_kgid from_kgid_munged(ptr, uint)
uint make_kuid make_kgid(ptr, uint)
void migrate_disable migrate_enable()
void __local_bh_enable_ip(ulong, uint)
int! smp_call_function_single(int, ptr, ptr, int)
void! on_each_cpu_cond_mask(ptr, ptr, ptr, bool, ptr)

# static keys (kernel/jump_label.c)
void static_key_slow_inc static_key_slow_dec static_key_enable static_key_disable(ptr)
void static_key_slow_inc_cpuslocked static_key_slow_dec_cpuslocked static_key_enable_cpuslocked(ptr)
void static_key_disable_cpuslocked(ptr)
bool static_key_fast_inc_not_disabled(ptr)
int static_key_count(ptr)

# parameters (kernel/params.c)
int param_set_byte param_set_short param_set_ushort param_set_int param_set_uint param_set_long(ptr, ptr)
int param_set_ulong param_set_ullong param_set_hexint param_set_charp param_set_bool(ptr, ptr)
int param_set_bool_enable_only param_set_invbool param_set_bint param_set_copystring(ptr, ptr)
int param_set_uint_minmax(ptr, ptr, uint, uint)
int param_get_byte param_get_short param_get_ushort param_get_int param_get_uint param_get_long(ptr, ptr)
int param_get_ulong param_get_ullong param_get_hexint param_get_charp param_get_bool(ptr, ptr)
int param_get_invbool param_get_string(ptr, ptr)
int! param_array_set param_array_get(ptr, ptr)
void param_free_charp(ptr)
void! param_array_free(ptr)

# notifier chains (kernel/notifier.c)
int atomic_notifier_chain_register atomic_notifier_chain_unregister raw_notifier_chain_register(ptr, ptr)
int raw_notifier_chain_unregister blocking_notifier_chain_register blocking_notifier_chain_unregister(ptr, ptr)
int! blocking_notifier_call_chain_robust(ptr, ulong, ulong, ptr)
int! atomic_notifier_call_chain raw_notifier_call_chain blocking_notifier_call_chain(ptr, ulong, ptr)

# states of a patch: read where they stand (kernel/livepatch/state.c)
ptr klp_get_state(ptr, ulong)

# static calls, stacks (kernel/static_call_inline.c, kernel/stacktrace.c, kernel/stop_machine.c)
void rtc_time64_to_tm(long, ptr)
void time64_to_tm(long, int, ptr)
void __static_call_update(ptr, ptr, ptr)
uint stack_trace_save(ptr, uint, uint)
void stack_trace_print(ptr, uint, int)
int! stop_machine stop_machine_cpuslocked(ptr, ptr, ptr)

# ends of the world (kernel/panic.c, lib/bug.c)
void __stack_chk_fail __fortify_panic BUG_func()
void __fortify_report(uint, size, size)
int ___ratelimit(ptr, str)
int __printk_ratelimit(str)
bool printk_timed_ratelimit(ptr, uint)
"""

_CORE = """
int _printk _printk_deferred(fmt)
int vprintk(va)
void __dynamic_pr_debug(ptr, fmt)
void print_hex_dump(str, str, int, int, int, ptr, size, bool)
void __warn_printk(fmt)
void dump_stack()
void dump_stack_lvl(str)
void panic(fmt)
void add_taint(uint, int)

int! klp_enable_patch(ptr)
ptr klp_get_prev_state(ulong)
ptr klp_shadow_get(ptr, ulong)
ptr! klp_shadow_alloc(ptr, ulong, size, uint, ptr, ptr)
ptr! klp_shadow_get_or_alloc(ptr, ulong, size, uint, ptr, ptr)
void! klp_shadow_free(ptr, ulong, ptr)
void! klp_shadow_free_all(ulong, ptr)

bool queue_work_on(int, ptr, ptr)
bool queue_delayed_work_on mod_delayed_work_on(int, ptr, ptr, ulong)
bool! flush_work flush_delayed_work(ptr)
bool! cancel_work_sync cancel_delayed_work_sync(ptr)
bool cancel_work cancel_delayed_work(ptr)
uint work_busy(ptr)
ptr alloc_workqueue(fmtptr, uint, int)
void! destroy_workqueue drain_workqueue __flush_workqueue(ptr)
void delayed_work_timer_fn(ptr)

void init_timer_key(ptr, ptr, uint, ptr, ptr)
int mod_timer mod_timer_pending timer_reduce(ptr, ulong)
void add_timer(ptr)
int timer_delete timer_shutdown try_to_del_timer_sync(ptr)
int! timer_delete_sync timer_shutdown_sync(ptr)
void hrtimer_init(ptr, int, int)
void hrtimer_start_range_ns(ptr, long, ulong, int)
int hrtimer_try_to_cancel(ptr)
int! hrtimer_cancel(ptr)
bool hrtimer_active(ptr)
ulong hrtimer_forward(ptr, long, long)
void call_rcu call_rcu_hurry(ptr, ptr)
void call_srcu(ptr, ptr, ptr)

ptr kthread_create_on_node(ptr, ptr, int, fmt)
int! kthread_stop kthread_stop_put(ptr)
void kthread_bind(ptr, uint)
void! kthread_complete_and_exit(ptr, long)
int send_sig(int, ptr, int)

ptr kobject_create_and_add(str, ptr)
void! kobject_put(ptr)
ptr kobject_get(ptr)
void kobject_init(ptr, ptr)
int kobject_add(ptr, ptr, fmt)
int kobject_init_and_add(ptr, ptr, ptr, fmt)
void! kobject_del(ptr)
int kobject_uevent(ptr, int)
int sysfs_create_file_ns(ptr, ptr, ptr)
void! sysfs_remove_file_ns(ptr, ptr, ptr)
int sysfs_create_files(ptr, ptr)
void! sysfs_remove_files(ptr, ptr)
int sysfs_create_group sysfs_create_groups(ptr, ptr)
void! sysfs_remove_group sysfs_remove_groups(ptr, ptr)
void sysfs_notify(ptr, ptr, ptr)

ptr proc_create(str, uint, ptr, ptr)
ptr proc_create_data(str, uint, ptr, ptr, ptr)
ptr proc_create_single_data(str, uint, ptr, ptr, ptr)
ptr proc_create_seq_private(str, uint, ptr, ptr, uint, ptr)
ptr proc_mkdir(str, ptr)
void! proc_remove(ptr)
void! remove_proc_entry(str, ptr)
int! remove_proc_subtree(str, ptr)
ptr debugfs_create_dir(str, ptr)
ptr debugfs_create_file debugfs_create_file_unsafe(str, uint, ptr, ptr, ptr)
void debugfs_create_u8 debugfs_create_u16 debugfs_create_u32 debugfs_create_u64(str, uint, ptr, ptr)
void debugfs_create_x8 debugfs_create_x16 debugfs_create_x32 debugfs_create_x64(str, uint, ptr, ptr)
void debugfs_create_bool debugfs_create_ulong debugfs_create_atomic_t debugfs_create_size_t(str, uint, ptr, ptr)
void! debugfs_remove(ptr)
ptr debugfs_create_blob(str, uint, ptr, ptr)
void debugfs_create_str(str, uint, ptr, ptr)
ptr debugfs_create_symlink(str, ptr, str)
ptr debugfs_lookup(str, ptr)
void! debugfs_lookup_and_remove(str, ptr)
ptr proc_symlink(str, ptr, str)
int sysfs_create_link(ptr, ptr, str)
void! sysfs_remove_link(ptr, str)
ptr kset_create_and_add(str, ptr, ptr)
void! kset_unregister(ptr)

int register_module_notifier unregister_module_notifier register_reboot_notifier unregister_reboot_notifier(ptr)
int _dev_emerg _dev_alert _dev_crit _dev_err _dev_warn _dev_notice _dev_info(ptr, fmt)
void _dev_printk(str, ptr, fmt)
void __dynamic_dev_dbg(ptr, ptr, fmt)
int misc_register(ptr)
void! misc_deregister(ptr)
int alloc_chrdev_region(ptr, uint, uint, str)
int register_chrdev_region(uint, uint, str)
void unregister_chrdev_region(uint, uint)
int __register_chrdev(uint, uint, uint, str, ptr)
void __unregister_chrdev(uint, uint, uint, ptr)
void cdev_init(ptr, ptr)
ptr cdev_alloc()
int cdev_add(ptr, uint, uint)
void cdev_del(ptr)
ptr class_create(ptr)
int class_register(ptr)
void class_destroy class_unregister(ptr)
ptr device_create(ptr, ptr, uint, ptr, fmt)
void! device_destroy(ptr, uint)
int device_create_file(ptr, ptr)
void! device_remove_file(ptr, ptr)
int register_kprobe register_kretprobe enable_kprobe disable_kprobe(ptr)
void unregister_kprobe unregister_kretprobe(ptr)
int register_kprobes register_kretprobes(ptr, int)
void unregister_kprobes unregister_kretprobes(ptr, int)
int ftrace_set_filter_ip(ptr, ulong, int, int)
int ftrace_set_filter(ptr, ptr, int, int)
void ftrace_free_filter(ptr)
int register_ftrace_function unregister_ftrace_function(ptr)
void tasklet_setup(ptr, ptr)
void tasklet_init(ptr, ptr, ulong)
void __tasklet_schedule __tasklet_hi_schedule(ptr)
void! tasklet_kill tasklet_unlock_wait(ptr)
void kernel_sigaction(int, ptr)
void flush_signals sched_set_fifo sched_set_fifo_low(ptr)
void sched_set_normal(ptr, int)
bool set_freezable()

void kcpustat_cpu_fetch(ptr, int)
ptr task_active_pid_ns(ptr)
bool try_module_get(ptr)
void __module_get module_put(ptr)
int module_refcount(ptr)
ptr __symbol_get(str)
void __symbol_put(str)
ulong kallsyms_lookup_name(str)
"""

_LINE = re.compile(r"(?P<result>\w+)(?P<blocks>!?) (?P<names>[\w !]+)\((?P<args>[^)]*)\)$")


def _parse(text: str, kind: Kind) -> dict[str, Api]:
    table: dict[str, Api] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"api table: {line!r}")
        args = tuple(a for a in re.split(r",\s*", match["args"]) if a)
        names = match["names"].replace("!", "").split()
        blocks = bool(match["blocks"]) or "!" in match["names"]
        for name in names:
            if name in table:
                raise ValueError(f"api table: {name} twice")
            table[name] = Api(name, kind, match["result"], args, blocks, name)
    return table


def _table() -> dict[str, Api]:
    table = {name: Api(name, Kind.NATIVE, "void", (), False, name) for name in NATIVE}
    for text, kind in ((_LOCAL, Kind.LOCAL), (_CORE, Kind.CORE)):
        for name, api in _parse(text, kind).items():
            if name in table:
                raise ValueError(f"api table: {name} twice")
            table[name] = api
    return table


API: Mapping[str, Api] = MappingProxyType(_table())
"""Every kernel function that module code may call, by name."""


INTEGER_PARAMS = ("byte", "short", "ushort", "int", "uint", "long", "ulong", "ullong", "hexint")
"""Types of parameters that are integers."""


def _data() -> dict[str, Data]:
    ops = [*INTEGER_PARAMS, "charp", "bool", "bool_enable_only", "invbool", "bint", "string"]
    sizes = {
        "jiffies": 8,
        "module_notify_list": 48,
        "reboot_notifier_list": 48,
        "panic_notifier_list": 16,
        "freezer_active": 16,
        "console_printk": 16,
        "kmalloc_caches": 5 * 14 * 8,
        "random_kmalloc_seed": 8,
        "kernel_kobj": 8,
        "kobj_sysfs_ops": 16,
        "init_user_ns": 1024,
        "init_pid_ns": 256,
        "init_uts_ns": 432,
        "init_nsproxy": 72,
        "saved_command_line": 8,
        "saved_command_line_len": 4,
        "linux_banner": 512,
        "init_time_ns": 88,
        "vm_node_stat": 47 * 8,
        "vm_zone_stat": 12 * 8,
        "vm_committed_as": 40,
        "num_poisoned_pages": 8,
        "zswap_stored_pages": 4,
        "nr_threads": 4,
        "linux_proc_banner": 512,
        "init_task": 9792,
        "system_state": 4,
        "nr_cpu_ids": 4,
        "__num_online_cpus": 4,
        "__cpu_online_mask": 1024,
        "__cpu_possible_mask": 1024,
        "__cpu_present_mask": 1024,
        "__cpu_active_mask": 1024,
        "__per_cpu_offset": 8192 * 8,
        "page_offset_base": 8,
        "vmalloc_base": 8,
        "vmemmap_base": 8,
        "phys_base": 8,
        "pv_ops": 664,
        "param_array_ops": 32,
        "system_wq": 8,
        "system_percpu_wq": 8,
        "system_highpri_wq": 8,
        "system_long_wq": 8,
        "system_unbound_wq": 8,
        "system_dfl_wq": 8,
        "system_freezable_wq": 8,
        "system_power_efficient_wq": 8,
        "system_freezable_power_efficient_wq": 8,
        "hex_asc": 17,
        "hex_asc_upper": 17,
        "_ctype": 256,
        "cpu_khz": 4,
        "tsc_khz": 4,
        "loops_per_jiffy": 8,
        "oops_in_progress": 4,
        "panic_timeout": 4,
        "boot_cpu_data": 512,
        "ftrace_enabled": 4,
        "hugetlb_optimize_vmemmap_key": 16,
        **{f"param_ops_{op}": 32 for op in ops},
    }
    table = {name: Data(name, size) for name, size in sizes.items()}
    table["jiffies_64"] = Data("jiffies_64", 8, alias="jiffies")
    table["high_res_key"] = Data("high_res_key", 16)
    for name, addr, size in (
        ("pcpu_hot", 0x34000, 64),
        ("const_pcpu_hot", 0x34000, 64),
        ("current_task", 0x34000, 8),
        ("__preempt_count", 0x34008, 4),
        ("cpu_number", 0x3400C, 4),
        ("this_cpu_off", 0x34100, 8),
        ("__stack_chk_guard", 0x28, 8),
        ("__ref_stack_chk_guard", 0x28, 8),
        ("fixed_percpu_data", 0, 48),
        ("numa_node", 0x34110, 4),
        ("kstack_offset", 0x34118, 4),
    ):
        table[name] = Data(name, size, percpu=addr)
    return table


DATA: Mapping[str, Data] = MappingProxyType(_data())
"""Every kernel variable that module code may use, by name."""

_HOST_STATS = {
    "meminfo": """
        si_meminfo si_swapinfo si_mem_available vm_commit_limit vm_memory_committed vmalloc_nr_pages pcpu_nr_pages
        zswap_total_pages hugetlb_report_meminfo arch_report_meminfo memtest_report_meminfo vm_node_stat vm_zone_stat
        vm_committed_as num_poisoned_pages zswap_stored_pages
    """,
    "loadavg": "get_avenrun nr_running nr_threads",
    "uptime": "init_time_ns kcpustat_cpu_fetch get_idle_time",
}
HOST_STATS: Mapping[str, str] = MappingProxyType(
    {name: file for file, names in _HOST_STATS.items() for name in names.split()}
)
"""The functions and variables that tell the host's numbers, and the file of /proc that has them."""

SUPPORTED: Mapping[str, Kind] = MappingProxyType(
    {**{name: api.kind for name, api in API.items()}, **dict.fromkeys(DATA, Kind.DATA)}
)
"""Whether klpfs can run code that uses a kernel symbol, and where it is handled: by name."""
