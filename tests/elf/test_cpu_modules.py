"""What ordinary modules do: timers, notifiers, devices, probes, functions that nobody can trace."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from cpu_support import TRACED, CpuTable, build, executing, lines

from klpfs.cpu.host import Cpu
from klpfs.cpu.layout import AREAS
from klpfs.kernel.kallsyms import Symbol
from klpfs.machine import open_machine

EXIT = "void cleanup_module(void) {}\n"


def loaded(m: Any, since: int) -> list[str]:
    """What modules logged."""
    return [line for line in lines(m, since) if "retpoline" not in line and "Spectre" not in line]


HRTIMER = r"""
struct base { void *cpu_base; u32 index; int clock; long pad[4]; u64 (*get_time)(void); long offset; };
struct hrtimer { long node[3]; u64 expires, softexpires; int (*function)(struct hrtimer *); struct base *base;
    u8 state, rel, soft, hard; };
void hrtimer_init(struct hrtimer *, int, int); void hrtimer_start_range_ns(struct hrtimer *, long, u64, int);
int hrtimer_cancel(struct hrtimer *); u64 hrtimer_forward(struct hrtimer *, u64, u64);
static struct hrtimer timer; static int runs;
"""


@pytest.mark.parametrize("clock", [0, 1, 7])
def test_an_hrtimer_runs_again_until_its_function_is_done(run: Any, clock: int) -> None:
    source = (
        HRTIMER
        + r"""
static int fire(struct hrtimer *t) {
    pr("run %d of clock %d\n", ++runs, t->base->clock);
    hrtimer_forward(t, t->base->get_time(), 20000000); /* what hrtimer_forward_now() does */
    return runs < 3;
}
int init_module(void) {
    hrtimer_init(&timer, CLOCK, 1);
    timer.function = fire;
    hrtimer_start_range_ns(&timer, 20000000, 0, 1);
    return 0;
}
void cleanup_module(void) { pr("active %d %d\n", hrtimer_cancel(&timer), hrtimer_cancel(&timer)); }
""".replace("CLOCK", str(clock))
    )

    async def main() -> None:
        async with executing() as (m, _):
            since, began = m.printk.next_seq, m.clock.now()
            await m.init_module(build("hr", source))
            await trio.sleep(1)
            times = [r.ts_usec / 1e6 - began for r in m.printk.records(since) if r.message.startswith("run ")]
            assert times == pytest.approx([0.02, 0.04, 0.06], abs=0.01)
            await m.delete_module("hr")
            number = 1 if clock == 0 else clock  # a relative time of CLOCK_REALTIME is one of CLOCK_MONOTONIC
            assert loaded(m, since) == [f"run {i} of clock {number}" for i in (1, 2, 3)] + ["active 0 0"]

    run(main)


def test_an_hrtimer_can_be_cancelled_by_its_module_while_it_repeats(run: Any) -> None:
    source = (
        HRTIMER
        + r"""
static int fire(struct hrtimer *t) { runs++; hrtimer_forward(t, t->base->get_time(), 10000000); return 1; }
int init_module(void) {
    hrtimer_init(&timer, 1, 1);
    timer.function = fire;
    hrtimer_start_range_ns(&timer, 10000000, 0, 1);
    msleep(100);
    pr("active %d\n", hrtimer_cancel(&timer));
    runs = 0;
    msleep(100);
    pr("runs %d\n", runs);
    return 0;
}
"""
    )

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("hr", source + EXIT))
            assert loaded(m, since) == ["active 1", "runs 0"]

    run(main)


def test_a_module_without_text_loads_and_cannot_be_removed(run: Any) -> None:
    data = build("bare", '__attribute__((section(".init.text"))) int init_module(void) { return 0; }', exit=False)

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(data)
            with pytest.raises(OSError, match="no exit function") as refused:
                await m.delete_module("bare")
            assert refused.value.errno == errno.EBUSY

    run(main)


def test_symbols_of_the_init_part_last_as_long_as_it(run: Any) -> None:
    source = r"""
__attribute__((used)) static void after(void) { pr("later\n"); }
__attribute__((section(".init.text"))) int init_module(void) { pr("now %ps\n", init_module); return 0; }
void cleanup_module(void) {}
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("early", source))
            assert loaded(m, since) == ["now init_module [early]"]
            names = {s.name for s in m.kallsyms.symbols_of("early")}
            assert "cleanup_module" in names
            assert "init_module" not in names

    run(main)


PLAIN = r"""
__attribute__((noinline)) int traced(int x) { return x; }
__attribute__((noinline, no_instrument_function)) int untraced(int x) { return x + 1; }
int init_module(void) { return 0; }
"""
PATCH = r"""
struct func { const char *old_name; void *new_func; u64 sympos; char pad[128]; };
struct object { const char *name; struct func *funcs; char pad[152]; };
struct patch { void *mod; struct object *objs; void *states; bool replace; char pad[175]; };
int klp_enable_patch(struct patch *);
static int new(int x) { return 0; }
static struct func funcs[2] = { { .old_name = "FUNCTION", .new_func = new } };
static struct object objs[2] = { { .name = "plain", .funcs = funcs } };
static struct patch patch = { .mod = &__this_module, .objs = objs };
INFO(livepatch, "Y")
int init_module(void) { return klp_enable_patch(&patch); }
"""


def test_a_function_without_an_ftrace_site_cannot_be_patched(run: Any) -> None:
    plain = build("plain", PLAIN + EXIT, TRACED)

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(plain)
            since = m.printk.next_seq
            with pytest.raises(OSError, match="init answered -22") as refused:
                await m.init_module(build("lp", PATCH.replace("FUNCTION", "untraced") + EXIT))
            assert refused.value.errno == errno.EINVAL
            assert "livepatch: failed to find location for function 'untraced'" in lines(m, since)
            await m.init_module(build("lp2", PATCH.replace("FUNCTION", "traced") + EXIT))

    run(main)


NOTIFIER = r"""
struct block { int (*call)(struct block *, u64, void *); struct block *next; int priority; };
int register_module_notifier(struct block *); int unregister_module_notifier(struct block *);
static int say(struct block *b, u64 state, void *mod) {
    pr("%d: %s is %d, %d\n", b->priority, (char *)mod + 24, (int)state, *(int *)mod);
    return b->priority == 1 && state == 1 && ((char *)mod)[24] == 'x' ? 0x8000 | 2 : 1;
}
static struct block low = { say, 0, 1 }, high = { say, 0, 2 };
int init_module(void) { return register_module_notifier(&low) ?: register_module_notifier(&high); }
void cleanup_module(void) { unregister_module_notifier(&high); unregister_module_notifier(&low); }
"""
QUIET = "int init_module(void) { return RESULT; }\n" + EXIT


def test_module_notifiers_see_modules_come_and_go(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("watcher", NOTIFIER))
            since = m.printk.next_seq
            await m.init_module(build("other", QUIET.replace("RESULT", "0")))
            await m.delete_module("other")
            with pytest.raises(OSError, match="init answered -19"):
                await m.init_module(build("failing", QUIET.replace("RESULT", "-19")))
            assert loaded(m, since) == [
                *("2: other is 1, 1", "1: other is 1, 1", "2: other is 0, 0", "1: other is 0, 0"),
                *("2: other is 2, 2", "1: other is 2, 2"),
                *("2: failing is 1, 1", "1: failing is 1, 1", "2: failing is 2, 2", "1: failing is 2, 2"),
            ]
            since = m.printk.next_seq
            await m.delete_module("watcher")
            await m.init_module(build("other", QUIET.replace("RESULT", "0")))
            # the watcher's own end is told after its exit function, when nobody listens any more
            assert loaded(m, since) == []

    run(main)


def test_a_module_notifier_can_refuse_a_module(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("watcher", NOTIFIER))
            since = m.printk.next_seq
            with pytest.raises(OSError, match="refused by a notifier") as refused:
                await m.init_module(build("xother", QUIET.replace("RESULT", "0")))
            assert refused.value.errno == errno.EPERM
            # those who had agreed before are told that it goes again; it is still coming then
            assert loaded(m, since) == ["2: xother is 1, 1", "1: xother is 1, 1", "2: xother is 2, 1"]
            assert m.modules.find_module("xother") is None

    run(main)


MISC = r"""
struct file; struct inode;
struct fops { void *owner; long pad0[2]; long (*read)(struct file *, char *, size_t, long *);
    long (*write)(struct file *, const char *, size_t, long *); long pad1[8];
    int (*open)(struct inode *, struct file *);
    void *pad2; int (*release)(struct inode *, struct file *); char pad3[136]; };
_Static_assert(sizeof(struct fops) == 264, "file_operations");
struct misc { int minor; const char *name; const struct fops *fops; void *list[2]; void *parent, *this_device;
    void *groups; const char *nodename; u16 mode; };
int misc_register(struct misc *); void misc_deregister(struct misc *);
int _dev_info(const void *, const char *, ...);
long simple_read_from_buffer(void *, size_t, long *, const void *, size_t);
u64 _copy_from_user(void *, const void *, u64);
static char text[32] = "hello\n"; static u64 length = 6;
static struct misc misc;
static int open(struct inode *i, struct file *f) { pr("open %d\n", *(void **)((char *)f + 32) == &misc); return 0; }
static int release(struct inode *i, struct file *f) { pr("release\n"); return 0; }
static long read(struct file *f, char *to, size_t n, long *at) {
    return simple_read_from_buffer(to, n, at, text, length);
}
static long write(struct file *f, const char *from, size_t n, long *at) {
    if (n > sizeof(text))
        return -28;
    _copy_from_user(text, from, n);
    return length = n;
}
static const struct fops fops = { .owner = &__this_module, .read = read, .write = write, .open = open,
    .release = release };
static struct misc misc = { .minor = 255, .name = "gadget", .fops = &fops, .mode = 0644 };
int init_module(void) {
    int error = misc_register(&misc);
    if (!error)
        _dev_info(misc.this_device, "minor %d\n", misc.minor);
    return error;
}
void cleanup_module(void) { misc_deregister(&misc); misc_deregister(&misc); }
"""


def test_a_misc_device_has_a_node_that_calls_its_module(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("gadget", MISC))
            assert m.kernfs.lookup("dev/gadget").mode & 0o777 == 0o644
            assert await m.kernfs.read_file("dev/gadget") == b"hello\n"
            assert await m.kernfs.write_file("dev/gadget", b"bye\n") == 4
            assert await m.kernfs.read_file("dev/gadget") == b"bye\n"
            with pytest.raises(OSError, match="-28"):
                await m.kernfs.write_file("dev/gadget", bytes(40))
            assert await m.kernfs.read_file("sys/devices/virtual/misc/gadget/dev") == b"10:256\n"
            assert m.kernfs.lookup("sys/class/misc/gadget") is not None
            assert loaded(m, since) == ["misc gadget: minor 256", *["open 1", "release"] * 4]
            assert m.modules.find_module("gadget").refcnt == 0
            await m.delete_module("gadget")
            assert m.kernfs.lookup("dev/gadget") is None
            assert any("misc.c:275" in line for line in lines(m, since))  # it is registered no more the second time

    run(main)


CHRDEV = r"""
struct cdev { char kobj[64]; void *owner; const void *ops; void *list[2]; u32 dev, count; };
int alloc_chrdev_region(u32 *, u32, u32, const char *); int register_chrdev_region(u32, u32, const char *);
void unregister_chrdev_region(u32, u32); void cdev_init(struct cdev *, const void *);
int cdev_add(struct cdev *, u32, u32); void cdev_del(struct cdev *);
void *class_create(const char *); void class_destroy(void *);
void *device_create(void *, void *, u32, void *, const char *, ...); void device_destroy(void *, u32);
long simple_read_from_buffer(void *, size_t, long *, const void *, size_t);
static long read(void *f, char *to, size_t n, long *at) { return simple_read_from_buffer(to, n, at, "char\n", 5); }
static const struct { void *pad0[3]; void *read; char pad1[232]; } fops = { .read = read };
static u32 dev; static struct cdev cdev; static void *cls;
int init_module(void) {
    int error = alloc_chrdev_region(&dev, 3, 2, "chars");
    if (error)
        return error;
    pr("%d:%d, again %d\n", dev >> 20, dev & 0xfffff, register_chrdev_region(dev + 1, 1, "late"));
    cls = class_create("chars");
    pr("duplicate %d\n", (int)(long)class_create("chars"));
    device_create(cls, NULL, dev + 1, NULL, "char%d", 1);
    return 0;
}
static int set(const char *text, const void *kp) {
    if (text[0] == '0') {
        cdev_del(&cdev);
        return 0;
    }
    cdev_init(&cdev, &fops);
    return cdev_add(&cdev, dev, 2);
}
static const struct kernel_param_ops ops = { 0, set, NULL, NULL };
PARAM(drive, &ops, "int", NULL, 0200)
void cleanup_module(void) { device_destroy(cls, dev + 1); class_destroy(cls); unregister_chrdev_region(dev, 2); }
"""


def test_a_character_device_is_found_by_its_number(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("chars", CHRDEV))
            assert loaded(m, since)[0].startswith("246:3, again -16")
            assert loaded(m, since)[-1] == "duplicate -17"
            with pytest.raises(OSError, match="no driver for 246:4") as refused:
                await m.kernfs.read_file("dev/char1")
            assert refused.value.errno == errno.ENXIO
            await m.kernfs.write_file("sys/module/chars/parameters/drive", b"1")
            assert await m.kernfs.read_file("dev/char1") == b"char\n"
            await m.kernfs.write_file("sys/module/chars/parameters/drive", b"0")
            with pytest.raises(OSError, match="no driver"):
                await m.kernfs.read_file("dev/char1")
            await m.delete_module("chars")
            assert m.kernfs.lookup("dev/char1") is None
            assert m.kernfs.lookup("sys/class/chars") is None

    run(main)


def test_attribute_groups_hide_what_is_not_visible_and_ksets_hold_kobjects(run: Any) -> None:
    source = r"""
struct attr { const char *name; u16 mode; long (*show)(void *, struct attr *, char *); void *store; };
struct group { const char *name; u16 (*is_visible)(void *, struct attr *, int); void *bin; struct attr **attrs;
    void *b; };
struct kobj { const char *name; void *entry[2]; struct kobj *parent; void *kset; void *ktype, *sd; int ref;
    char bits[4]; };
struct ktype { void (*release)(struct kobj *); const void *ops; const struct group **groups; void *pad[4]; };
void *kset_create_and_add(const char *, void *, void *); void kset_unregister(void *); extern void *kernel_kobj;
int kobject_init_and_add(struct kobj *, const struct ktype *, void *, const char *, ...);
void kobject_put(struct kobj *);
extern const char kobj_sysfs_ops[];
int sysfs_emit(char *, const char *, ...);
static long show(void *k, struct attr *a, char *to) { return sysfs_emit(to, "%s\n", a->name); }
static struct attr seen = { "seen", 0444, show }, hidden = { "hidden", 0444, show };
static u16 visible(void *k, struct attr *a, int n) { return n ? 0 : 0400; }
static struct attr *attrs[] = { &seen, &hidden, NULL };
static const struct group group = { .is_visible = visible, .attrs = attrs };
static const struct group *groups[] = { &group, NULL };
static void release(struct kobj *k) { pr("release %s\n", k->name); }
static const struct ktype ktype = { release, NULL, groups };
static struct kobj object; static void *kset;
int init_module(void) {
    kset = kset_create_and_add("shelf", NULL, kernel_kobj);
    object.kset = kset;
    return kobject_init_and_add(&object, &ktype, NULL, "book%d", 1);
}
void cleanup_module(void) { kobject_put(&object); kset_unregister(kset); }
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("shelf", source))
            assert await m.kernfs.read_file("sys/kernel/shelf/book1/seen") == b"seen\n"
            assert m.kernfs.lookup("sys/kernel/shelf/book1/seen").mode & 0o777 == 0o400
            assert m.kernfs.lookup("sys/kernel/shelf/book1/hidden") is None
            await m.delete_module("shelf")
            assert m.kernfs.lookup("sys/kernel/shelf") is None
            assert loaded(m, since) == ["release book1"]

    run(main)


def test_tasklets_run_once_they_are_enabled(run: Any) -> None:
    source = r"""
struct tasklet { void *next; u64 state; int count; bool new; void (*function)(u64); u64 data; };
void tasklet_init(struct tasklet *, void (*)(u64), u64); void __tasklet_schedule(struct tasklet *);
void tasklet_kill(struct tasklet *);
static struct tasklet t;
static void fire(u64 data) { pr("tasklet %d, state %d\n", (int)data, (int)t.state); }
int init_module(void) {
    tasklet_init(&t, fire, 7);
    t.count = t.state = 1;
    __tasklet_schedule(&t);
    msleep(100);
    pr("disabled\n");
    t.count = 0;
    tasklet_kill(&t);
    pr("state %d\n", (int)t.state);
    return 0;
}
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("tasklet", source + EXIT))
            assert loaded(m, since) == ["disabled", "tasklet 7, state 2", "state 0"]

    run(main)


def test_a_kernel_thread_is_woken_by_the_signals_that_it_allows(run: Any) -> None:
    source = r"""
void *kthread_create_on_node(int (*)(void *), void *, int, const char *, ...); int wake_up_process(void *);
int kthread_stop(void *); bool kthread_should_stop(void); long schedule_timeout_interruptible(long);
void kernel_sigaction(int, void *); void flush_signals(void *); int send_sig(int, void *, int);
static void *task;
static int work(void *unused) {
    kernel_sigaction(15, (void *)2);
    while (!kthread_should_stop()) {
        pr("%s\n", schedule_timeout_interruptible(250000) > 240000 ? "woken" : "late");
        flush_signals(task);
    }
    return 0;
}
int init_module(void) {
    task = kthread_create_on_node(work, NULL, -1, "listener");
    wake_up_process(task);
    msleep(20);
    send_sig(15, task, 0);
    msleep(20);
    pr("and one that it does not\n");
    send_sig(10, task, 0);
    msleep(20);
    return kthread_stop(task);
}
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("listener", source + EXIT))
            assert loaded(m, since) == ["woken", "and one that it does not", "woken"]

    run(main)


def test_functions_of_the_library(run: Any) -> None:
    source = r"""
struct fifo { u32 in, out, mask, esize; void *data; };
int __kfifo_alloc(struct fifo *, u32, size_t, u32); void __kfifo_free(struct fifo *);
u32 __kfifo_in(struct fifo *, const void *, u32); u32 __kfifo_out(struct fifo *, void *, u32);
struct xarray { u32 lock, flags; void *head; };
int __xa_alloc(struct xarray *, u32 *, void *, u64, u32); void *xa_store(struct xarray *, u64, void *, u32);
void *xa_erase(struct xarray *, u64); int __xa_insert(struct xarray *, u64, void *, u32);
int radix_tree_insert(struct xarray *, u64, void *); void *radix_tree_delete(struct xarray *, u64);
char **argv_split(u32, const char *, int *); void argv_free(char **);
bool glob_match(const char *, const char *); int string_get_size(u64, u64, u32, char *, int);
void *__kmem_cache_create_args(const char *, u32, void *, u32); void *kmem_cache_alloc_noprof(void *, u32);
void kmem_cache_free(void *, void *); void kmem_cache_destroy(void *);
void __bitmap_set(u64 *, u32, int); u64 __bitmap_weight(const u64 *, u32); void __bitmap_clear(u64 *, u32, int);
static void construct(int *object) { object[0] = 42; }
static u32 xs[8]; static struct xarray xa, tree; static struct fifo fifo; static u64 bits[3]; static char text[32];
static int get(const int *from, int *error) {
    int value;
    asm volatile("call __get_user_4" : "=a"(*error), "=d"(value) : "0"(from) : "rcx", "memory");
    return value;
}
static int put(int value, int *to) {
    int error; register u64 in asm("rax") = value;
    asm volatile("call __put_user_4" : "=c"(error) : "0"(to), "r"(in) : "rbx", "memory");
    return error;
}
int init_module(void) {
    u32 ints[5] = { 1, 2, 3, 4, 5 }, number; int i, n; char **argv; void *cache; u64 args[4] = { [3] = (u64)construct };
    __kfifo_alloc(&fifo, 3, 4, GFP_KERNEL);
    n = __kfifo_in(&fifo, ints, 3);
    n = n * 10 + __kfifo_out(&fifo, xs, 2);
    n = n * 10 + __kfifo_in(&fifo, ints, 5);
    n = n * 10 + __kfifo_out(&fifo, xs, 8);
    pr("fifo %d of %d: %d %d %d %d\n", n, fifo.mask + 1, xs[0], xs[1], xs[2], xs[3]);
    __kfifo_free(&fifo);
    pr("empty %d, insert %d %d", !xa.head, __xa_insert(&xa, 3, &xa, 0), __xa_insert(&xa, 3, &xa, 0));
    n = __xa_alloc(&xa, &number, &xa, 4ull | 3ull << 32, 0);
    pr("alloc %d %d", n, number);
    pr("full %d, empty %d", __xa_alloc(&xa, &number, &xa, 4ull | 3ull << 32, 0), !xa.head);
    xa_erase(&xa, 3);
    xa_store(&xa, 4, NULL, 0);
    pr("empty %d\n", !xa.head);
    n = radix_tree_insert(&tree, 9, &tree);
    i = radix_tree_insert(&tree, 9, &tree);
    pr("radix %d %d %d\n", n, i, radix_tree_delete(&tree, 9) == &tree);
    argv = argv_split(GFP_KERNEL, " set  a b ", &n);
    pr("%d words: %s %s %s %d\n", n, argv[0], argv[1], argv[2], !argv[3]);
    argv_free(argv);
    pr("glob %d %d %d\n", glob_match("a[!b]*", "acd"), glob_match("a[!b]*", "abd"), glob_match("\\*", "x"));
    string_get_size(3000000, 512, 1, text, sizeof(text));
    pr("%s\n", text);
    cache = __kmem_cache_create_args("things", 8, args, 0);
    int *object = kmem_cache_alloc_noprof(cache, GFP_KERNEL);
    pr("constructed %d\n", object[0]);
    kmem_cache_free(cache, object);
    kmem_cache_destroy(cache);
    __bitmap_set(bits, 60, 70);
    __bitmap_clear(bits, 64, 4);
    pr("bits %d, %llx %llx\n", (int)__bitmap_weight(bits, 192), bits[0], bits[2]);
    i = put(-5, (int *)xs);
    pr("put %d %d, get %d", i, put(1, (int *)8), get((int *)xs, &n));
    pr("errors %d", n);
    get((int *)8, &n);
    pr("%d\n", n);
    return 0;
}
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("library", source.replace('d", ', 'd\\n", ') + EXIT))
            assert loaded(m, since) == [
                "fifo 3234 of 4: 3 1 2 3",
                "empty 0, insert -16 0",
                "alloc 0 4",
                "full -16, empty 0",
                "empty 1",
                "radix 0 -17 1",
                "3 words: set a b 1",
                "glob 1 0 0",
                "1.43 GiB",
                "constructed 42",
                "bits 66, f000000000000000 3",
                "put 0 -14, get -5",
                "errors 0",
                "-14",
            ]

    run(main)


def test_processes_can_be_gone_through(run: Any) -> None:
    source = r"""
extern char init_task[]; void __rcu_read_lock(void); void __rcu_read_unlock(void);
int init_module(void) {
    int n = 0;
    for (char *p = *(char **)(init_task + 2224); p != init_task + 2224; p = *(char **)p, n++)
        if (p[2976 - 2224] == 'd')
            pr("%s %d\n", p + 2976 - 2224, *(int *)(p + 2432 - 2224));
    pr("more than one %d\n", n > 1);
    return 0;
}
"""

    async def main() -> None:
        async with executing() as (m, _):
            task = m.sched.spawn("daemon")
            since = m.printk.next_seq
            await m.init_module(build("tasks", source + EXIT))
            assert loaded(m, since) == [f"daemon {task.pid}", "more than one 1"]
            m.sched.exit(task)
            await m.delete_module("tasks")
            since = m.printk.next_seq
            await m.init_module(build("tasks", source + EXIT))
            assert f"daemon {task.pid}" not in loaded(m, since)

    run(main)


PROBED = r"""
__attribute__((noinline)) int target(int x) { asm volatile(""); pr("target %d\n", x); return x + 1; }
static int (*volatile call)(int) = target;
static int set(const char *text, const void *kp) { pr("answer %d\n", call(text[0] - '0')); return 0; }
static const struct kernel_param_ops ops = { 0, set, NULL, NULL };
PARAM(run, &ops, "int", NULL, 0200)
int init_module(void) { return 0; }
"""
KPROBE = r"""
struct regs { u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss; };
struct kprobe { void *lists[4]; u64 nmissed; void *addr; const char *symbol_name; u32 offset;
    int (*pre)(struct kprobe *, struct regs *); void (*post)(struct kprobe *, struct regs *, u64); char pad[40];
    u32 flags; };
_Static_assert(sizeof(struct kprobe) == 128, "struct kprobe");
struct instance { char pad[32]; void *ret_addr; void *frame; char data[]; };
struct kretprobe { struct kprobe kp; int (*handler)(struct instance *, struct regs *);
    int (*entry)(struct instance *, struct regs *); int maxactive, nmissed; u64 data_size; void *rh; };
int register_kprobe(struct kprobe *); void unregister_kprobe(struct kprobe *); int disable_kprobe(struct kprobe *);
int register_kretprobe(struct kretprobe *); void unregister_kretprobe(struct kretprobe *);
"""


def test_kprobes_see_and_change_the_arguments(run: Any) -> None:
    probe = (
        KPROBE
        + r"""
static int pre(struct kprobe *p, struct regs *r) {
    pr("pre %s %d, at the entry %d\n", p->symbol_name, (int)r->di, r->ip == (u64)p->addr);
    if (r->di == 7)
        r->di = 70;
    return 0;
}
static void post(struct kprobe *p, struct regs *r, u64 flags) { pr("post\n"); }
static struct kprobe kp = { .symbol_name = "target", .pre = pre, POST };
int init_module(void) { return register_kprobe(&kp); }
void cleanup_module(void) { unregister_kprobe(&kp); }
"""
    )
    path = "sys/module/plain/parameters/run"
    patch = PATCH.replace("FUNCTION", "target").replace("return 0; }", "return 99; }", 1)

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("plain", PROBED + EXIT, TRACED))
            await m.init_module(build("probe", probe.replace("POST", "")))
            since = m.printk.next_seq
            await m.kernfs.write_file(path, b"1")
            await m.kernfs.write_file(path, b"7")
            await m.init_module(build("lp", patch + EXIT))
            await m.kernfs.write_file(path, b"2")
            await m.delete_module("probe")
            await m.kernfs.write_file(path, b"3")
            assert [line for line in loaded(m, since) if not line.startswith("livepatch: ")] == [
                *("pre target 1, at the entry 1", "target 1", "answer 2"),
                *("pre target 7, at the entry 1", "target 70", "answer 71"),
                *("pre target 2, at the entry 1", "answer 99", "answer 99"),
            ]
            # a probe with a post handler and a livepatch exclude each other
            with pytest.raises(OSError, match="init answered -16"):
                await m.init_module(build("probe2", probe.replace("POST", ".post = post")))
            await m.kernfs.write_file("sys/kernel/livepatch/lp/enabled", b"0")
            await trio.sleep(5)
            await m.delete_module("lp")
            await m.init_module(build("probe2", probe.replace("POST", ".post = post")))
            with pytest.raises(OSError, match="init answered -16"):
                await m.init_module(build("lp", patch + EXIT))
            since = m.printk.next_seq
            await m.kernfs.write_file(path, b"4")
            assert loaded(m, since) == ["pre target 4, at the entry 1", "post", "target 4", "answer 5"]
            await m.delete_module("plain")  # the probe is gone with its function
            await m.delete_module("probe2")

    run(main)


def test_kretprobes_see_and_change_the_result(run: Any) -> None:
    probe = (
        KPROBE
        + r"""
static int entry(struct instance *i, struct regs *r) { *(int *)i->data = r->di; return r->di == 3; }
static int handler(struct instance *i, struct regs *r) {
    pr("returned %d from %d\n", (int)r->ax, *(int *)i->data);
    r->ax += 100;
    return 0;
}
static struct kretprobe rp = { .kp = { .symbol_name = "target" }, .handler = handler, .entry = entry, .data_size = 8 };
int init_module(void) { return register_kretprobe(&rp); }
void cleanup_module(void) { unregister_kretprobe(&rp); pr("missed %d\n", rp.nmissed); }
"""
    )
    path = "sys/module/plain/parameters/run"

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("plain", PROBED + EXIT, TRACED))
            await m.init_module(build("probe", probe))
            since = m.printk.next_seq
            for text in (b"1", b"3"):
                await m.kernfs.write_file(path, text)
            await m.delete_module("probe")
            await m.kernfs.write_file(path, b"5")
            assert loaded(m, since) == [
                *("target 1", "returned 2 from 1", "answer 102"),
                *("target 3", "answer 4", "missed 0", "target 5", "answer 6"),
            ]

    run(main)


def test_where_a_probe_would_never_be_hit_it_is_refused_by_name(run: Any) -> None:
    probe = (
        KPROBE
        + r"""
static struct kprobe kp = { .symbol_name = NAME, .offset = OFFSET };
int init_module(void) { return register_kprobe(&kp) ?: (pr("found %pS\n", kp.addr), unregister_kprobe(&kp), 0); }
"""
    )

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("plain", PROBED + EXIT, TRACED))
            for name, offset, number in (
                ("some_other_function", 0, errno.EOPNOTSUPP),
                ("target", 9, errno.EOPNOTSUPP),
                ("nowhere_to_be_found", 0, errno.ENOENT),
            ):
                since = m.printk.next_seq
                source = probe.replace("NAME", f'"{name}"').replace("OFFSET", str(offset))
                with pytest.raises(OSError, match=f"init answered -{number}"):
                    await m.init_module(build("probe", source + EXIT))
                refused = [line for line in loaded(m, since) if f"a kprobe at {name}" in line]
                assert len(refused) == (number == errno.EOPNOTSUPP)
            # what modules use it for: the address of a function that is not exported
            since = m.printk.next_seq
            source = probe.replace("NAME", '"kallsyms_lookup_name"').replace("OFFSET", "0")
            await m.init_module(build("probe", source + EXIT))
            assert loaded(m, since) == ["found kallsyms_lookup_name+0x0/0x40"]

    run(main)


def test_an_ftrace_callback_redirects_a_function(run: Any) -> None:
    hook = (
        KPROBE
        + r"""
struct ftrace_ops { void (*func)(u64, u64, struct ftrace_ops *, struct regs *); void *next; u64 flags; char pad[192]; };
int ftrace_set_filter(struct ftrace_ops *, const char *, int, int); int register_ftrace_function(struct ftrace_ops *);
int unregister_ftrace_function(struct ftrace_ops *);
static int other(int x) { return 1000 + x; }
static void callback(u64 ip, u64 parent, struct ftrace_ops *ops, struct regs *r) {
    if (r->di == 2)
        r->ip = (u64)other;
}
static struct ftrace_ops ops = { .func = callback, .flags = 1 << 2 | 1 << 13 };
int init_module(void) {
    pr("unknown %d\n", ftrace_set_filter(&ops, "nowhere_to_be_found", 19, 0));
    return ftrace_set_filter(&ops, "target", 6, 0) ?: register_ftrace_function(&ops);
}
void cleanup_module(void) { unregister_ftrace_function(&ops); }
"""
    )
    path = "sys/module/plain/parameters/run"

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("plain", PROBED + EXIT, TRACED))
            since = m.printk.next_seq
            await m.init_module(build("hook", hook))
            for text in (b"1", b"2"):
                await m.kernfs.write_file(path, text)
            with pytest.raises(OSError, match="init answered -16"):
                await m.init_module(build("lp", PATCH.replace("FUNCTION", "target") + EXIT))
            await m.delete_module("hook")
            await m.kernfs.write_file(path, b"2")
            assert [line for line in loaded(m, since) if not line.startswith("livepatch: ")] == [
                *("unknown -22", "target 1", "answer 2", "answer 1002", "target 2", "answer 3")
            ]

    run(main)


@pytest.mark.parametrize(
    ("kind", "take", "give"),
    [
        (
            "struct { u64 owner, lock, list[2]; } lock = { .list = { (u64)&lock.list, (u64)&lock.list } }",
            "mutex_lock",
            "",
        ),
        ("struct { u64 count, rest[4]; } lock", "down_write", "up_write"),
        ("struct { u32 lock, count; u64 list[2]; } lock = { .count = 1 }", "down", "up"),
    ],
)
def test_nobody_waits_for_a_busy_lock_for_ever(run: Any, kind: str, take: str, give: str) -> None:
    """Threads that take a lock again as soon as they let it go, and others that want it, too."""
    source = r"""
void *kthread_create_on_node(int (*)(void *), void *, int, const char *, ...); int wake_up_process(void *);
int kthread_stop(void *); bool kthread_should_stop(void); void usleep_range_state(u64, u64, u32);
int TAKE(void *); void GIVE(void *);
static KIND;
static int runs[3];
static int work(void *id) {
    while (!kthread_should_stop()) {
        TAKE(&lock);
        runs[(u64)id]++;
        usleep_range_state(500, 600, 2);
        GIVE(&lock);
    }
    return 0;
}
int init_module(void) {
    void *tasks[3];
    for (u64 i = 0; i < 3; i++)
        wake_up_process(tasks[i] = kthread_create_on_node(work, (void *)i, -1, "worker%d", (int)i));
    msleep(100);
    for (int i = 0; i < 3; i++)
        kthread_stop(tasks[i]);
    pr("fair %d\n", runs[0] > 20 && runs[1] > 20 && runs[2] > 20);
    return 0;
}
"""
    for name, text in (("KIND", kind), ("TAKE", take), ("GIVE", give or "mutex_unlock")):
        source = source.replace(name, text)

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("fair", source + EXIT))
            assert loaded(m, since) == ["fair 1"]

    run(main)


def test_the_calendar(run: Any) -> None:
    source = r"""
void rtc_time64_to_tm(long, int *); void time64_to_tm(long, int, void *);
int init_module(void) {
    int rtc[9]; struct { int sec, min, hour, mday, mon; long year; int wday, yday; } tm;
    rtc_time64_to_tm(1709210096, rtc); /* Thu Feb 29 12:34:56 2024 */
    for (int i = 0; i < 9; i++)
        pr("%d\n", rtc[i]);
    time64_to_tm(-1, 0, &tm); /* Wed Dec 31 23:59:59 1969 */
    pr("%d %d %d %d %d %d %d %d\n", tm.sec, tm.min, tm.hour, tm.mday, tm.mon, (int)tm.year, tm.wday, tm.yday);
    return 0;
}
"""

    async def main() -> None:
        async with executing() as (m, _):
            since = m.printk.next_seq
            await m.init_module(build("calendar", source + EXIT))
            assert loaded(m, since) == [*map(str, (56, 34, 12, 29, 1, 124, 4, 59, 0)), "59 59 23 31 11 69 3 364"]

    run(main)


class DataTable(CpuTable):
    """A vmlinux with a variable whose address emulated ones use."""

    def lookup(self, name: str) -> list[Symbol]:
        """Also the variable."""
        return [Symbol(AREAS["data"].base + 64, 8, "D")] if name == "odd_variable" else super().lookup(name)


def test_a_variable_that_is_not_emulated_is_named(run: Any) -> None:
    source = "extern int odd_variable; int init_module(void) { return odd_variable ? -1 : 0; }\n"

    async def main() -> None:
        async with open_machine(table=DataTable()) as m:
            m.engine = Cpu(m)
            with pytest.raises(OSError, match="odd: init_module needs kernel data odd_variable"):
                await m.init_module(build("odd", source + EXIT))

    run(main)
