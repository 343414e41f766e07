"""The kernel that modules see: data structures, strings, waiting, warnings, debug sites, livepatch."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from cpu_support import build, executing, lines, with_klp_relocations

EXIT = "void cleanup_module(void) {}\n"


def check(run: Any, source: str, *wanted: str, clock: float | None = None) -> None:
    """Load a module and compare what it logs in its init function."""

    async def main() -> None:
        async with executing() as (m, _):
            since, began = m.printk.next_seq, trio.current_time()
            await m.init_module(build("kernel", source + EXIT))
            assert [line for line in lines(m, since) if "retpoline" not in line and "Spectre" not in line] == list(
                wanted
            )
            if clock is not None:
                assert trio.current_time() - began == pytest.approx(clock, abs=0.05)

    run(main)


def test_sorting_and_searching_call_back(run: Any) -> None:
    source = r"""
    void sort(void *, size_t, size_t, int (*)(const void *, const void *), void *);
    void *bsearch(const void *, const void *, size_t, size_t, int (*)(const void *, const void *));
    struct list { struct list *next, *prev; int n; };
    void list_sort(void *, struct list *, int (*)(void *, const struct list *, const struct list *));
    int ints(const void *a, const void *b) { return *(int *)a - *(int *)b; }
    int items(void *priv, const struct list *a, const struct list *b) { return a->n - b->n; }
    int numbers[] = { 5, -3, 12, 0, 7, -8, 5 };
    int init_module(void) {
        sort(numbers, 7, 4, ints, NULL);
        for (int i = 0; i < 7; i++) pr("%d", numbers[i]);
        int key = 7, *found = bsearch(&key, numbers, 7, 4, ints), none = 6;
        pr("at %ld, %s\n", found - numbers, bsearch(&none, numbers, 7, 4, ints) ? "found" : "not found");
        struct list head = { &head, &head }, rows[4];
        for (int i = 0; i < 4; i++) {
            rows[i].n = (i * 7 + 3) % 5; rows[i].prev = head.prev; rows[i].next = &head;
            head.prev->next = &rows[i]; head.prev = &rows[i];
        }
        list_sort(NULL, &head, items);
        for (struct list *p = head.next; p != &head; p = p->next) pr("%d%s\n", p->n, p->next->prev == p ? "" : "!");
        return 0;
    }
    """
    check(run, source, "-8", "-3", "0", "5", "5", "7", "12", "at 5, not found", "0", "2", "3", "4")


def test_trees_stay_balanced(run: Any) -> None:
    source = r"""
    struct node { u64 parent; struct node *right, *left; int key; };
    void rb_insert_color(struct node *, struct node **); void rb_erase(struct node *, struct node **);
    struct node *rb_first(struct node **), *rb_next(struct node *), *rb_prev(struct node *), *rb_last(struct node **);
    struct node nodes[64], *root;
    int height(struct node *n) {  /* black height, or -1 where a rule is broken */
        if (!n) return 1;
        int l = height(n->left), r = height(n->right), black = n->parent & 1;
        if (l < 0 || l != r) return -1;
        if (!black && ((n->left && !(n->left->parent & 1)) || (n->right && !(n->right->parent & 1)))) return -1;
        return l + black;
    }
    void insert(struct node *n) {
        struct node **link = &root, *parent = NULL;
        while (*link) { parent = *link; link = n->key < parent->key ? &parent->left : &parent->right; }
        n->parent = (u64)parent; n->left = n->right = NULL; *link = n; rb_insert_color(n, &root);
    }
    int init_module(void) {
        int broken = 0, ordered = 1, n = 0, last = -1;
        for (int i = 0; i < 64; i++) { nodes[i].key = i * 37 % 64; insert(&nodes[i]); broken += height(root) < 0; }
        for (struct node *p = rb_first(&root); p; p = rb_next(p), n++) { ordered &= p->key > last; last = p->key; }
        pr("%d nodes, %d broken, ordered %d, last %d, before %d\n", n, broken, ordered, rb_last(&root)->key,
           rb_prev(rb_last(&root))->key);
        for (int i = 0; i < 64; i += 2) { rb_erase(&nodes[i], &root); broken += height(root) < 0; }
        for (n = 0, last = -1, ordered = 1; n == 0 || 0;) {
            for (struct node *p = rb_first(&root); p; p = rb_next(p), n++) { ordered &= p->key > last; last = p->key; }
        }
        pr("%d nodes, %d broken, ordered %d\n", n, broken, ordered);
        for (int i = 1; i < 64; i += 2) rb_erase(&nodes[i], &root);
        pr("%s\n", root ? "left over" : "empty");
        return 0;
    }
    """
    check(run, source, "64 nodes, 0 broken, ordered 1, last 63, before 62", "32 nodes, 0 broken, ordered 1", "empty")


def test_strings_and_numbers(run: Any) -> None:
    source = r"""
    long sized_strscpy(char *, const char *, size_t); char *strim(char *), *strsep(char **, const char *);
    char *kasprintf(u32, const char *, ...), *kstrdup(const char *, u32); int strcmp(const char *, const char *);
    int kstrtoint(const char *, u32, int *), sscanf(const char *, const char *, ...); bool sysfs_streq(char *, char *);
    char *strstr(const char *, const char *); size_t strlen(const char *); int hex2bin(u8 *, const char *, size_t);
    int scnprintf(char *, size_t, const char *, ...), snprintf(char *, size_t, const char *, ...);
    int init_module(void) {
        char buf[8], padded[] = "  x y \n", list[] = "a,b,,c", *rest = list, *part; int n = -1, a, b; u8 bytes[2];
        pr("%ld %s %ld\n", sized_strscpy(buf, "much too long", 8), buf, sized_strscpy(buf, "fits", 8));
        pr("<%s>\n", strim(padded));
        while ((part = strsep(&rest, ","))) pr("[%s]", part);
        char *made = kasprintf(GFP_KERNEL, "%s-%d", "made", 3), *copy = kstrdup(made, GFP_KERNEL);
        pr("%s %d %zu %s\n", copy, strcmp(made, copy), strlen(made), strstr(made, "e-"));
        kfree(made); kfree(copy);
        int e1 = kstrtoint("0x7f\n", 0, &n), e2 = kstrtoint("99999999999", 0, &a), e3 = kstrtoint("1x", 0, &a);
        pr("%d %d %d %d\n", e1, n, e2, e3);
        n = sscanf("12 -5", "%d %d", &a, &b); pr("%d %d %d\n", n, a, b);
        int full = snprintf(buf, 8, "%s", "1234567890"), kept = scnprintf(buf, 8, "%s", "1234567890");
        pr("%d %d %s\n", full, kept, buf);
        int e4 = hex2bin(bytes, "beef", 2); pr("%d %x%x %d\n", e4, bytes[0], bytes[1], sysfs_streq("on\n", "on"));
        return 0;
    }
    """
    check(
        run,
        source,
        "-7 much to 4",
        "<x y>",
        *["[a]", "[b]", "[]", "[c]"],
        "made-3 0 6 e-3",
        "0 127 -34 -22",
        "2 12 -5",
        "10 7 1234567",
        "0 beef 1",
    )


def test_numbers_to_pointers(run: Any) -> None:
    source = r"""
    struct idr { u64 words[2]; u32 base, next; } idr; struct ida { u64 words[2]; } ida; struct xa { u64 words[2]; } xa;
    int idr_alloc(struct idr *, void *, int, int, u32);
    int idr_for_each(struct idr *, int (*)(int, void *, void *), void *);
    void *idr_find(struct idr *, u64), *idr_remove(struct idr *, u64); int ida_alloc_range(struct ida *, u32, u32, u32);
    void ida_free(struct ida *, u32); void *xa_store(struct xa *, u64, void *, u32), *xa_load(struct xa *, u64);
    int each(int id, void *p, void *data) { pr("%d: %s\n", id, (char *)p); return 0; }
    int init_module(void) {
        idr_alloc(&idr, "zero", 0, 0, 0); idr_alloc(&idr, "five", 5, 6, 0);
        pr("%d %s\n", idr_alloc(&idr, "none", 5, 6, 0), (char *)idr_find(&idr, 5));
        idr_for_each(&idr, each, NULL); idr_remove(&idr, 0); pr("%s\n", idr_find(&idr, 0) ? "there" : "gone");
        ida_alloc_range(&ida, 0, -1, 0); ida_alloc_range(&ida, 0, -1, 0); ida_free(&ida, 0);
        int first = ida_alloc_range(&ida, 0, -1, 0), second = ida_alloc_range(&ida, 0, -1, 0);
        pr("%d %d\n", first, second);
        xa_store(&xa, 1UL << 40, "far", 0); pr("%s\n", (char *)xa_load(&xa, 1UL << 40));
        return 0;
    }
    """
    check(run, source, "-28 five", "0: zero", "5: five", "gone", "0 2", "far")


def test_wait_queues(run: Any) -> None:
    source = r"""
    struct list { struct list *next, *prev; }; struct head { u32 lock; struct list list; } queue;
    struct entry { u32 flags; void *private; void *func; struct list list; };
    void __init_waitqueue_head(struct head *, const char *, void *); void init_wait_entry(struct entry *, int);
    long prepare_to_wait_event(struct head *, struct entry *, int); void finish_wait(struct head *, struct entry *);
    long schedule_timeout(long); int __wake_up(struct head *, u32, int, void *);
    void *kthread_create_on_node(int (*)(void *), void *, int, const char *, ...); int wake_up_process(void *);
    volatile int ready;
    int waker(void *data) { msleep(2000); ready = 1; __wake_up(&queue, 3, 1, NULL); return 0; }
    int init_module(void) {
        struct entry e; long left = 2500;
        __init_waitqueue_head(&queue, "queue", NULL);
        wake_up_process(kthread_create_on_node(waker, NULL, -1, "waker"));
        init_wait_entry(&e, 0);
        while (!ready && left) { prepare_to_wait_event(&queue, &e, 2); if (!ready) left = schedule_timeout(left); }
        finish_wait(&queue, &e);
        pr("ready %d, %s\n", ready, left > 1900 && left < 2100 ? "in time" : "late");
        return 0;
    }
    """
    check(run, source, "ready 1, in time", clock=2)


def test_warnings_are_reported_and_survived(run: Any) -> None:
    source = r"""
    #define WARN_HERE(FLAGS) asm volatile("1: ud2\n.pushsection __bug_table,\"aw\"\n2: .long 1b - .\n.long %c0 - .\n" \
        ".word %c1\n.word %c2\n.popsection" :: "i"(file), "i"(42), "i"(FLAGS))
    static const char file[] = "kernel.c";
    int init_module(void) { WARN_HERE(1); for (int i = 0; i < 3; i++) { WARN_HERE(1 | 2); } pr("alive\n"); return 0; }
    """

    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("warns", source + EXIT))
            log = lines(m)
            assert log.count("------------[ cut here ]------------") == 2
            warnings = [line for line in log if line.startswith("WARNING: CPU: 0 PID: 1 at kernel.c:42 init_module+")]
            assert len(warnings) == 2
            assert log[-1] == "alive"
            assert m.kernel.test_taint("W")
            assert not m.kernel.test_taint("D")

    run(main)


DEBUG = r"""
struct _ddebug { const char *modname, *function, *filename, *format; u32 bits; u32 pad; u64 key[2]; };
void __dynamic_pr_debug(struct _ddebug *, const char *, ...);
struct _ddebug site __attribute__((section("__dyndbg"), used, aligned(8)))
    = { "debugs", "say", "drivers/debugs.c", "n is %d\n", 17 };
__attribute__((noinline)) void say(int n) {
    asm goto("1: .byte 0x0f, 0x1f, 0x44, 0, 0\n.pushsection __jump_table,\"aw\"\n.balign 8\n"
             ".long 1b - .\n.long %l[on] - .\n.quad %c0 - .\n.popsection" :: "i"(&site.key) :: on);
    return;
on: __dynamic_pr_debug(&site, "n is %d\n", n);
}
int init_module(void) { say(1); return 0; }
void cleanup_module(void) { say(2); }
"""


def test_debug_sites_of_modules(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("debugs", DEBUG))
            control = "sys/kernel/debug/dynamic_debug/control"
            assert b'drivers/debugs.c:17 [debugs]say =_ "n is %d' in await m.kernfs.read_file(control)
            await m.kernfs.write_file(control, b"module debugs +pf\n")
            await m.delete_module("debugs")
            assert [line for line in lines(m) if "n is" in line] == ["say: n is 2"]
            assert b"debugs.c" not in await m.kernfs.read_file(control)
            await m.init_module(build("debugs", DEBUG), "dyndbg=+p")
            assert [line for line in lines(m) if "n is" in line][1:] == ["n is 1"]

    run(main)


PATCH = r"""
struct klp_func { const char *old_name; void *new_func; u64 old_sympos; char pad[128]; };
struct klp_object { const char *name; struct klp_func *funcs; int (*pre_patch)(struct klp_object *);
    void (*post_patch)(struct klp_object *); void (*pre_unpatch)(struct klp_object *);
    void (*post_unpatch)(struct klp_object *); char pad[104]; struct module *mod; char flags[8]; };
struct klp_state { u64 id; u32 version; void *data; };
struct klp_patch { struct module *mod; struct klp_object *objs; struct klp_state *states; bool replace;
    char pad[175]; };
_Static_assert(sizeof(struct klp_func) == 152 && sizeof(struct klp_object) == 168, "klp");
_Static_assert(sizeof(struct klp_state) == 24 && sizeof(struct klp_patch) == 200, "klp");
INFO(livepatch, "Y")
int klp_enable_patch(struct klp_patch *); void seq_printf(void *, const char *, ...);
struct klp_state *klp_get_state(struct klp_patch *, u64);
int show(void *m, void *v) { seq_printf(m, "%s was here\n", __this_module.name); return 0; }
struct klp_func funcs[] = { { "cmdline_proc_show", show }, {} };
extern struct klp_patch patch;
int pre(struct klp_object *obj) {
    pr("pre: %s, state %d\n", obj->mod ? obj->mod->name : "vmlinux", klp_get_state(&patch, 7)->version);
    return PRE;
}
void post(struct klp_object *obj) { pr("post: patched %d\n", obj->flags[1]); }
void unpre(struct klp_object *obj) { msleep(1000); pr("unpre\n"); }
struct klp_object objs[] = { { NULL, funcs, pre, post, unpre }, {} };
struct klp_state states[] = { { 7, 3 }, {} };
struct klp_patch patch = { &__this_module, objs, states };
int init_module(void) { return klp_enable_patch(&patch); }
"""


def test_a_livepatch_runs_its_callbacks(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            original = await m.kernfs.read_file("proc/cmdline")
            await m.init_module(build("patches", PATCH.replace("PRE;", "0;") + EXIT))
            await m.livepatch.wait_transition()
            assert await m.kernfs.read_file("proc/cmdline") == b"patches was here\n"
            log = lines(m)
            assert [line for line in log if line.startswith(("pre", "post"))] == [
                "pre: vmlinux, state 3",
                "post: patched 1",
            ]
            began = trio.current_time()
            await m.kernfs.write_file("sys/kernel/livepatch/patches/enabled", b"0")
            assert trio.current_time() - began == pytest.approx(1, abs=0.05)  # the callback sleeps
            await m.livepatch.wait_transition()
            assert await m.kernfs.read_file("proc/cmdline") == original
            assert "unpre" in lines(m)

    run(main)


@pytest.mark.parametrize(("answer", "number"), [("-19;", 19), ("*(volatile int *)0;", 14)])
def test_a_callback_that_refuses_or_crashes_refuses_the_patch(run: Any, answer: str, number: int) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            source = PATCH.replace("PRE;", answer) + EXIT
            with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                await m.init_module(build("patches", source))
            assert info.value.errno == number
            assert m.kernfs.lookup("sys/kernel/livepatch/patches") is None
            assert any("pre-patch callback failed" in line for line in lines(m))
            await m.init_module(build("patches", PATCH.replace("PRE;", "0;") + EXIT))

    run(main)


ORC = r"""
asm(".text\n.globl frames\n.type frames, @function\nframes:\n1: push %rbx\n2: mov $60000, %edi\n call msleep\n"
    "3: pop %rbx\n4: ret\n5: .size frames, . - frames\n"
    ".globl outer\n.type outer, @function\nouter:\n6: sub $40, %rsp\n7: call frames\n add $40, %rsp\n8: ret\n"
    ".size outer, . - outer\n9:\n"
    ".pushsection .orc_unwind_ip,\"a\"\n.long 1b - .\n.long 2b - .\n.long 4b - .\n.long 6b - .\n.long 7b - .\n"
    ".long 8b - .\n.long 9b - .\n.popsection\n"
    /* sp_offset, bp_offset, sp_reg SP 5 | bp_reg PREV_SP no, 0 << 4 | type CALL 2 << 8 */
    ".pushsection .orc_unwind,\"a\"\n.short 8, 0, 0x205\n.short 16, 0, 0x205\n.short 8, 0, 0x205\n.short 8, 0, 0x205\n"
    ".short 48, 0, 0x205\n.short 8, 0, 0x205\n.short 0, 0, 0\n.popsection\n");
int outer(void *);
void *kthread_create_on_node(int (*)(void *), void *, int, const char *, ...); int wake_up_process(void *);
int init_module(void) { wake_up_process(kthread_create_on_node(outer, NULL, -1, "sleeps")); return 0; }
"""


def test_stacks_are_unwound_by_orc(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("orc", ORC + EXIT))
            await trio.sleep(1)
            task = next(t for t in m.sched.tasks.values() if t.comm == "sleeps")
            names = [str(m.kallsyms.lookup(addr)).partition("/")[0] for addr in task.trace()]
            assert names[:3] == ["msleep+0x10", "frames+0xb", "outer+0x9"]
            assert task.reliable
            assert task.state == "D"

    run(main)


def test_without_orc_a_stack_is_not_reliable(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("noorc", ORC.replace(".orc_unwind", ".no_unwind") + EXIT))
            await trio.sleep(1)
            task = next(t for t in m.sched.tasks.values() if t.comm == "sleeps")
            assert not task.reliable
            assert "outer" in {str(m.kallsyms.lookup(addr)).partition("+")[0] for addr in task.trace()}

    run(main)


TARGET = r"""
__attribute__((noinline)) int hidden(int n) { asm volatile(""); return n + 40; }
int init_module(void) { return 0; }
void cleanup_module(void) {}
"""
RELOCATED = PATCH.replace("PRE;", "0;").replace(
    "{ NULL, funcs, pre, post, unpre }", '{ "target", funcs, pre, post, unpre }'
)
RELOCATED = RELOCATED.replace('{ "cmdline_proc_show", show }', '{ "hidden", calls_hidden }').replace(
    "struct klp_func funcs[]",
    """extern int hidden_symbol(int) asm("\\".klp.sym.target.hidden,0\\"");
    __attribute__((section(".text.reaches"), noinline)) int calls_hidden(int n) { return hidden_symbol(n) * 2; }
    struct klp_func funcs[]""",
)


def test_klp_relocations_follow_their_object(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, cpu):
            data = with_klp_relocations(build("reaches", RELOCATED + EXIT), "target", ".text.reaches")
            await m.init_module(data)
            (reaches,) = m.kallsyms.module_on_each_symbol("reaches", "calls_hidden")
            place = cpu.space.read(reaches, 32)
            assert b"\xe8\0\0\0\0" in place  # not written yet: the target is not there
            mod = await m.init_module(build("target", TARGET, ("-pg", "-mfentry", "-mrecord-mcount")))
            await m.livepatch.wait_transition()
            assert b"\xe8\0\0\0\0" not in cpu.space.read(reaches, 32)
            assert any("pre: target, state 3" in line for line in lines(m))
            (hidden,) = m.kallsyms.module_on_each_symbol("target", "hidden")
            # calls_hidden() calls hidden(), which is patched with calls_hidden(): an endless recursion, as in a kernel
            with pytest.raises(OSError, match="stack overflow"):
                await mod.code.call(hidden, [2], None)
            await m.delete_module("target")
            assert cpu.space.read(reaches, 32) == place

    run(main)


INTERRUPTED = PATCH.replace("PRE;", "0;").replace(
    'seq_printf(m, "%s was here\\n", __this_module.name);',
    """u64 *flags; unsigned long left = 0;
    asm volatile("movq %%gs:pcpu_hot, %0" : "=r" (flags));
    while (!(*(volatile u64 *)flags & (1UL << 17 | 1UL << 2)) && !left) left = msleep_interruptible(600 * 1000);
    seq_printf(m, "%lu seconds left, signal_pending %d\\n", left / 1000, !!(*flags & 1UL << 17));""",
)


def test_the_fake_signal_of_a_transition_ends_an_interruptible_sleep(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            source = "unsigned long msleep_interruptible(unsigned);\n" + INTERRUPTED.replace("msleep(1000); ", "")
            await m.init_module(build("patches", source + EXIT))
            await m.livepatch.wait_transition()
            task = m.sched.spawn("cat")
            shown = []

            async def read() -> None:
                with m.sched.running(task):
                    shown.append(await m.procfs.run_show("cmdline_proc_show", task, lambda: b""))
                m.sched.leave_kernel(task)

            for _ in range(2):  # the second read finds no signal pending
                m.nursery.start_soon(read)
                await trio.sleep(1)
                names = [str(m.kallsyms.lookup(addr)).partition("/")[0] for addr in task.trace()]
                assert names[0] == "msleep_interruptible+0x10"
                assert names[1].startswith("show+")
                await m.kernfs.write_file("sys/kernel/livepatch/patches/enabled", b"0")
                await m.livepatch.wait_transition()
                # a second before the patch is disabled; then, attempts a second apart, of which every 15th signals; the
                # clock may jump on while the sandbox, a process of its own, takes notice
                left, _, rest = shown.pop().partition(b" ")
                assert rest == b"seconds left, signal_pending 1\n"
                assert 1 < int(left) <= 584
                assert task.code_fn is None
                await trio.sleep(1)
                await m.delete_module("patches")
                await m.init_module(build("patches", source + EXIT))
                await m.livepatch.wait_transition()

    run(main)
