"""Modules run: init and exit, logging, memory, waiting, work, threads, parameters, files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio
from cpu_support import TRACED, build, executing, lines

HELLO = r"""
int init_module(void) { pr("hello: %s %d %lx %c\n", "world", -5, 0xdeadbeefUL, 'x'); return 0; }
void cleanup_module(void) { pr("bye\n"); }
"""


def test_init_and_exit_run(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, cpu):
            await m.init_module(build("hello", HELLO))
            assert lines(m)[-1] == "hello: world -5 deadbeef x"
            await m.delete_module("hello")
            assert lines(m)[-1] == "bye"
            assert set(cpu.confinement) == {"rlimits", "no_new_privs", "seccomp"}

    run(main)


def test_a_failing_init_unloads_the_module(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                await m.init_module(
                    build("fails", "int init_module(void) { return -19; } void cleanup_module(void) {}")
                )
            assert info.value.errno == 19
            assert m.modules.find_module("fails") is None
            await m.init_module(build("fails", HELLO))  # the place is free again

    run(main)


def test_an_init_that_answers_something_positive_shows_where(run: Any) -> None:
    async def main() -> None:
        async with executing(more=["dump_stack_lvl", "do_init_module"]) as (m, _):
            await m.init_module(build("odd", "int init_module(void) { return 3; } void cleanup_module(void) {}"))
            assert [re.sub(r"\+0x.*", "", line) for line in lines(m)[-4:]] == [
                " <TASK>",
                " dump_stack_lvl",
                " do_init_module",
                " </TASK>",
            ]

    run(main)


NAMED = r"""
int init_module(void) { return 0; }
void cleanup_module(void) { pr("%s in %ps\n", __this_module.name, cleanup_module); *(volatile int *)0 = 0; }
"""


@pytest.mark.parametrize("name", [b"\xff\xc3\xfe", "\U0010ff80".encode(), b"a/b"])
def test_names_of_any_bytes(run: Any, name: bytes) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            placeholder = b"x" * len(name)
            await m.init_module(build(placeholder.decode(), NAMED).replace(placeholder, name))
            text = name.decode("utf-8", "surrogateescape")
            assert m.modules.find_module(text) is not None
            try:
                await m.delete_module(text)
            except OSError:
                pass  # it crashes
            said = b"\n".join(r.text for r in m.printk.records())
            assert name + b" in cleanup_module+0x" in said or name + b" in cleanup_module [" in said
            assert b"RIP: 0010:cleanup_module+0x" in said

    run(main)


SLEEPER = r"""
struct list_head { struct list_head *next, *prev; };
struct work_struct { u64 data; struct list_head entry; void (*func)(struct work_struct *); };
extern void *system_wq; bool queue_work_on(int, void *, struct work_struct *); bool flush_work(struct work_struct *);
void sleeps(struct work_struct *w) { pr("work begins\n"); msleep(5000); pr("work ends\n"); }
struct work_struct work = { 0, { &work.entry, &work.entry }, sleeps };
int init_module(void) { queue_work_on(8192, system_wq, &work); return 0; }
void cleanup_module(void) { flush_work(&work); pr("gone\n"); }
"""


def test_a_sleeping_work_function_is_on_the_stack_of_its_worker(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("sleeper", SLEEPER))
            await trio.sleep(1)
            worker = next(t for t in m.sched.tasks.values() if t.code_fn is not None)
            names = [str(m.kallsyms.lookup(addr)).partition("+")[0] for addr in worker.trace()]
            assert names[0] == "msleep"
            assert "sleeps" in names
            assert worker.state == "D"
            assert not worker.on_cpu
            began = trio.current_time()
            await m.delete_module("sleeper")  # waits for the work, in emulated time
            assert 3 < trio.current_time() - began < 5
            assert lines(m)[-3:] == ["work begins", "work ends", "gone"]

    run(main)


MUTEX = r"""
struct mutex { u64 owner; u32 wait_lock; u32 osq; void *next, *prev; };
struct task; struct task *kthread_create_on_node(int (*)(void *), void *, int, const char *, ...);
int wake_up_process(struct task *); int kthread_stop(struct task *); bool kthread_should_stop(void);
void mutex_lock(struct mutex *); void mutex_unlock(struct mutex *); void __mutex_init(struct mutex *, void *, void *);
struct mutex lock; struct task *a, *b; int turns;
int run(void *name) {
    while (!kthread_should_stop()) {
        mutex_lock(&lock); turns++; msleep(100); mutex_unlock(&lock); msleep(10);
    }
    pr("%s stops after %s\n", (char *)name, turns > 5 ? "some turns" : "too few"); return 7;
}
int init_module(void) {
    __mutex_init(&lock, "lock", NULL);
    a = kthread_create_on_node(run, "a", -1, "test/%d", 1); b = kthread_create_on_node(run, "b", -1, "test/%d", 2);
    wake_up_process(a); wake_up_process(b); return 0;
}
void cleanup_module(void) { pr("stopped: %d %d\n", kthread_stop(a), kthread_stop(b)); }
"""


def test_kernel_threads_share_a_mutex(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("threads", MUTEX))
            assert {t.comm for t in m.sched.tasks.values()} >= {"test/1", "test/2"}
            await trio.sleep(2)
            await m.delete_module("threads")
            assert lines(m)[-1] == "stopped: 7 7"
            assert "a stops after some turns" in lines(m)
            assert not {t.comm for t in m.sched.tasks.values()} & {"test/1", "test/2"}

    run(main)


PARAMS = r"""
extern const struct kernel_param_ops param_ops_int, param_ops_bool, param_ops_charp;
int number = 3; bool flag; char *text = "first"; int custom;
int set_twice(const char *val, const struct kernel_param *kp) {
    int kstrtoint(const char *, u32, int *); int v, err = kstrtoint(val, 0, &v);
    if (err) return err; *(int *)kp->arg = 2 * v; return 0;
}
int get_twice(char *buf, const struct kernel_param *kp) {
    int sprintf(char *, const char *, ...); return sprintf(buf, "<%d>\n", *(int *)kp->arg);
}
const struct kernel_param_ops twice = { 0, (void *)set_twice, (void *)get_twice };
PARAM(number, &param_ops_int, "int", &number, 0644)
PARAM(flag, &param_ops_bool, "bool", &flag, 0644)
PARAM(text, &param_ops_charp, "charp", &text, 0644)
PARAM(custom, &twice, "int", &custom, 0644)
int init_module(void) { pr("number %d flag %d text %s custom %d\n", number, flag, text, custom); return 0; }
void cleanup_module(void) { pr("number %d flag %d text %s custom %d\n", number, flag, text, custom); }
"""


def test_parameters_live_in_the_module(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("params", PARAMS), "number=-7 flag=1 text=given custom=0x10")
            assert lines(m)[-1] == "number -7 flag 1 text given custom 32"

            async def show(name: str) -> str:
                return (await m.kernfs.read_file(f"sys/module/params/parameters/{name}")).decode()

            assert [await show(n) for n in ("number", "flag", "text", "custom")] == ["-7\n", "Y\n", "given\n", "<32>\n"]
            await m.kernfs.write_file("sys/module/params/parameters/number", b"12\n")
            await m.kernfs.write_file("sys/module/params/parameters/custom", b"4")
            assert [await show(n) for n in ("number", "custom")] == ["12\n", "<8>\n"]
            with pytest.raises(OSError, match="number"):
                await m.kernfs.write_file("sys/module/params/parameters/number", b"many\n")
            await m.delete_module("params")
            assert lines(m)[-1] == "number 12 flag 1 text given custom 8"

    run(main)


ODD_PARAMS = r"""
extern const char loops_per_jiffy[]; extern const struct kernel_param_ops param_array_ops, param_ops_int;
struct array { u32 max, elemsize; u32 *num; const struct kernel_param_ops *ops; void *elem; };
int first, list[2]; u32 count;
struct array huge = { 0xffffffff, 4, &count, &param_ops_int, list };
struct array odd = { 2, 4, &count, (void *)loops_per_jiffy, list };
PARAM(first, (void *)loops_per_jiffy, "int", &first, 0)
PARAM(huge, &param_array_ops, "array of int", &huge, 0444)
PARAM(odd, &param_array_ops, "array of what", &odd, 0)
PARAM(vague, &param_array_ops, "", NULL, 0)
int init_module(void) { return 0; }
void cleanup_module(void) {}
"""


def test_parameters_that_no_kernel_type_describes_keep_no_module_out(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("odd", ODD_PARAMS), "huge=5,6")
            assert await m.kernfs.read_file("sys/module/odd/parameters/huge") == b"5,6\n"

    run(main)


FILES = r"""
struct attribute { const char *name; u16 mode; };
struct kobj_attribute { struct attribute attr; long (*show)(void *, void *, char *);
    long (*store)(void *, void *, const char *, size_t); };
extern void *kernel_kobj; void *kobject_create_and_add(const char *, void *); void kobject_put(void *);
int sysfs_create_file_ns(void *, struct attribute *, void *); int sprintf(char *, const char *, ...);
void *proc_create_single_data(const char *, u16, void *, int (*)(void *, void *), void *); void proc_remove(void *);
void seq_printf(void *, const char *, ...); int kstrtoint(const char *, u32, int *);
int value = 1; void *kobj, *entry;
long show(void *k, void *a, char *buf) { return sprintf(buf, "%d\n", value); }
long store(void *k, void *a, const char *buf, size_t n) { int e = kstrtoint(buf, 0, &value); return e ? e : (long)n; }
struct kobj_attribute attr = { { "value", 0644 }, show, store };
int lines(void *m, void *v) { for (int i = 0; i < 1000; i++) seq_printf(m, "line %d\n", i); return 0; }
int init_module(void) {
    kobj = kobject_create_and_add("testobj", kernel_kobj);
    entry = proc_create_single_data("testlines", 0444, NULL, lines, NULL);
    return sysfs_create_file_ns(kobj, &attr.attr, NULL);
}
void cleanup_module(void) { kobject_put(kobj); proc_remove(entry); }
"""


def test_files_of_modules(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("files", FILES))
            path = "sys/kernel/testobj/value"
            assert await m.kernfs.read_file(path) == b"1\n"
            assert await m.kernfs.write_file(path, b"42\n") == 3
            assert await m.kernfs.read_file(path) == b"42\n"
            with pytest.raises(OSError, match="refused"):
                await m.kernfs.write_file(path, b"x\n")
            text = await m.kernfs.read_file("proc/testlines")  # larger than the first buffer
            assert text == b"".join(b"line %d\n" % i for i in range(1000))
            await m.delete_module("files")
            assert m.kernfs.lookup(path) is None
            assert m.kernfs.lookup("proc/testlines") is None

    run(main)


TIMER = r"""
struct timer_list { void *next, **pprev; u64 expires; void (*function)(struct timer_list *); u32 flags; };
extern volatile u64 jiffies; void init_timer_key(struct timer_list *, void *, u32, const char *, void *);
int mod_timer(struct timer_list *, u64); int timer_delete_sync(struct timer_list *);
struct timer_list timer; int fired;
void fire(struct timer_list *t) { pr("tick %d\n", ++fired); if (fired < 3) mod_timer(t, jiffies + 250); }
int init_module(void) { init_timer_key(&timer, fire, 0, NULL, NULL); mod_timer(&timer, jiffies + 250); return 0; }
void cleanup_module(void) { pr("pending %d\n", timer_delete_sync(&timer)); }
"""


def test_timers_fire_on_the_machines_clock(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            await m.init_module(build("ticks", TIMER))
            await trio.sleep(2.5)
            assert lines(m)[-2:] == ["tick 1", "tick 2"]
            await m.delete_module("ticks")
            assert lines(m)[-1] == "pending 1"
            await trio.sleep(5)
            assert lines(m)[-1] == "pending 1"

    run(main)


COMPLETION = r"""
struct completion { u32 done; u32 lock; void *next, *prev; };
u64 wait_for_completion_timeout(struct completion *, u64); void complete(struct completion *);
struct completion c = { 0, 0, &c.next, &c.next };
int init_module(void) {
    extern volatile u64 jiffies; u64 before = jiffies;
    u64 left = wait_for_completion_timeout(&c, 500);
    pr("left %lu after %lu jiffies\n", left, jiffies - before); complete(&c);
    pr("left %lu\n", wait_for_completion_timeout(&c, 500)); return 0;
}
void cleanup_module(void) {}
"""


def test_waiting_takes_emulated_time(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, _):
            began = trio.current_time()
            await m.init_module(build("waits", COMPLETION))
            assert trio.current_time() - began == pytest.approx(2, abs=0.1)
            assert lines(m)[-2:] == ["left 0 after 500 jiffies", "left 500"]

    run(main)


PATCHED = r"""
__attribute__((noinline)) int answer(int n) { asm volatile(""); return n + 1; }
int init_module(void) { return 0; }
void cleanup_module(void) { pr("answer %d\n", answer(1)); }
int replacement(int n) { return n + 100; }
"""


def test_calls_of_a_patched_function_are_redirected(run: Any) -> None:
    async def main() -> None:
        from klpfs.kernel.ftrace import FtraceOps

        async with executing() as (m, cpu):
            mod = await m.init_module(build("target", PATCHED, TRACED))
            (old,) = m.kallsyms.module_on_each_symbol("target", "answer")
            (new,) = m.kallsyms.module_on_each_symbol("target", "replacement")
            assert await mod.code.call(old, [1], None) == 2
            ops = FtraceOps(lambda ip, task: new, ipmodify=True)
            m.ftrace.register_ftrace_function(ops, old)
            assert await mod.code.call(old, [1], None) == 101
            m.ftrace.unregister_ftrace_function(ops)
            assert await mod.code.call(old, [1], None) == 2
            assert cpu.modules["target"].ftrace_site(old) == old
            assert not cpu.modules["target"].ftrace_site(old + 1)

    run(main)


def test_unknown_kernel_functions_end_in_an_oops_that_names_them(run: Any) -> None:
    async def main() -> None:
        source = (
            "int kernel_read_file(void); int some(void) { return kernel_read_file(); }"
            'int init_module(void) { return 0; } void cleanup_module(void) { pr("before\\n"); some(); pr("after\\n"); }'
        )
        async with executing() as (m, cpu):
            await m.init_module(build("needs", source))  # loading says nothing
            assert "needs kernel" not in "".join(lines(m))
            with pytest.raises(OSError, match="needs kernel function kernel_read_file"):
                await m.delete_module("needs")
            assert "before" in lines(m)
            assert "after" not in lines(m)
            assert any("needs: " in line and "needs kernel function kernel_read_file" in line for line in lines(m))
            assert cpu.alive
            await m.init_module(build("hello", HELLO))

    run(main)


def test_the_end_of_the_sandbox_is_not_the_end_of_the_daemon(run: Any) -> None:
    async def main() -> None:
        async with executing() as (m, cpu):
            await m.init_module(build("sleeper", SLEEPER))
            await trio.sleep(1)
            cpu.process.kill()
            with pytest.raises(OSError, match="sandbox"):
                await m.delete_module("sleeper")
            assert not cpu.alive
            assert any("module execution stopped" in line for line in lines(m))
            with pytest.raises(OSError, match="sandbox"):
                await m.init_module(build("hello", HELLO))

    run(main)


def test_loads_are_fast(run: Any) -> None:
    import time

    async def main() -> None:
        async with executing() as (m, _):
            data = build("hello", HELLO)
            await m.init_module(data)
            await m.delete_module("hello")
            took = []
            for _ in range(10):
                began = time.perf_counter()
                await m.init_module(data)
                took.append(time.perf_counter() - began)
                await m.delete_module("hello")
            assert sorted(took)[len(took) // 2] < 0.05

    run(main)
