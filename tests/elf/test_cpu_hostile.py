"""Modules that mean harm, or are broken: each ends in a report at most, and everything else lives on.

All of them run in one machine, one after the other, so that each also shows that those before it did no damage.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing
from cpu_support import build, executing

from klpfs.cpu.proto import Limits

LIMITS = Limits(
    instructions=3_000_000, kernel_calls=20_000, log_lines=200, heap=1 << 20, quantum=200_000, threads=64, nesting=8
)


class Case(NamedTuple):
    """*code* is the body of the init function, *more* what stands before it; *log* must match a line of the report, or
    no report is to be there (None)."""

    code: str
    log: str | None
    more: str = ""


def asm(text: str) -> str:
    """Inline assembly in Intel's syntax."""
    return (
        f'asm volatile(".intel_syntax noprefix; {text}; .att_syntax" ::: "memory", "rax", "rcx", "rdx", "rdi", "rsi");'
    )


GP = "Oops: general protection fault: 0000"
NULL_DEREFERENCE = "BUG: kernel NULL pointer dereference, address: 0000000000000000"

CASES = {
    "infinite_loop": Case("for (;;) asm volatile(\"\");", "budget used up: 3000000 instructions"),
    "pause_loop": Case("for (;;) asm volatile(\"pause\");", "budget used up"),
    "recursion": Case(
        "return f(1);",
        "BUG: TASK stack guard page was hit",
        "int f(int n) { asm volatile(\"\" : \"+r\"(n)); n += f(n); asm volatile(\"\" : \"+r\"(n)); return n; }",
    ),
    "large_frames": Case(
        "return f(1);",
        "BUG: ",
        "int f(int n) { volatile char a[6000]; a[n & 4095] = n; return f(n + 1) + a[n & 1023]; }",
    ),
    "stack_pointer_gone": Case(asm("mov rsp, 0x1000; push rax"), "BUG: kernel NULL|BUG: unable to handle"),
    "wild_write": Case("*(volatile int *)0xffff900000000000 = 1;", "unable to handle page fault .*: ffff900000000000"),
    "noncanonical": Case("*(volatile int *)0x4141414141414141 = 1;", "non-canonical address 0x4141414141414141"),
    "null_read": Case("return *(volatile int *)0;", NULL_DEREFERENCE),
    "null_write": Case("*(volatile int *)0 = 1;", NULL_DEREFERENCE),
    "write_to_code": Case("*(volatile char *)init_module = 0x90;", "unable to handle page fault"),
    "write_to_constants": Case(
        "*(volatile char *)text = 1;",
        "unable to handle page fault",
        'const char text[64] = "x";',
    ),
    "write_to_vmlinux": Case("*(volatile char *)_printk = 0xc3;", "unable to handle page fault"),
    "run_data": Case("return ((int (*)(void))data)();", "NX-protected page", "char data[16] = { 0xc3 };"),
    "run_stack": Case("volatile char c[16] = { 0xc3 }; return ((int (*)(void))c)();", "NX-protected page"),
    "run_heap": Case(
        "char *p = __kmalloc_noprof(64, GFP_KERNEL); *p = 0xc3; return ((int (*)(void))p)();", "NX-protected page"
    ),
    "jump_to_null": Case("return ((int (*)(void))NULL)();", NULL_DEREFERENCE),
    "jump_into_vmlinux": Case("return ((int (*)(void))0xffffffff81f00000)();", "needs kernel function"),
    "jump_behind_a_trap": Case("return ((int (*)(void))((char *)_printk + 1))();", "BUG|Oops|needs kernel function"),
    "smashed_return": Case(asm("mov rax, 0x4242424242424242; push rax; ret"), "0x4242424242424242"),
    "forged_callback": Case(asm("mov rax, 0xffffffff82ffffe0; push rax; ret"), GP),
    "forged_end": Case(asm("mov eax, -5; mov rcx, 0xffffffff82fffff0; push rcx; ret"), None),
    "in": Case(asm("mov dx, 0x60; in al, dx"), GP),
    "out": Case(asm("mov dx, 0x64; mov al, 0xfe; out dx, al"), GP),
    "insb": Case("volatile char b[64]; asm volatile(\"rep insb\" :: \"D\"(b), \"d\"(96), \"c\"(64));", GP),
    "hlt": Case(asm("hlt"), GP),
    "rdmsr": Case(asm("mov ecx, 0xc0000082; rdmsr"), GP),
    "wrmsr": Case(asm("mov ecx, 0xc0000082; wrmsr"), GP),
    "read_cr0": Case(asm("mov rax, cr0"), GP),
    "write_cr3": Case(asm("mov cr3, rax"), GP),
    "write_cr4": Case(asm("mov cr4, rax"), GP),
    "lidt": Case(asm("lidt [rsp]"), GP),
    "lgdt": Case(asm("lgdt [rsp]"), GP),
    "ltr": Case(asm("ltr ax"), GP),
    "invlpg": Case(asm("invlpg [rsp]"), GP),
    "wbinvd": Case(asm("wbinvd"), GP),
    "swapgs": Case(asm("swapgs"), GP),
    "debug_register": Case(asm("mov dr7, rax"), GP),
    "syscall": Case(asm("syscall"), GP),
    "sysenter": Case(asm("sysenter"), GP),
    "int_80": Case(asm("int 0x80"), GP),
    "int_3": Case(asm("int3"), "Oops: int3: 0000"),
    "iret": Case(asm("iretq"), GP),
    "far_return": Case(asm("push 0x10; push rax; retfq"), "Oops: "),
    "ud2": Case(asm("ud2"), "Oops: invalid opcode: 0000"),
    "rdrand": Case(asm("rdrand rax"), "Oops: invalid opcode: 0000"),
    "divide": Case(asm("xor ecx, ecx; mov eax, 1; xor edx, edx; div ecx"), "Oops: divide error: 0000"),
    "harmless_flags": Case(asm("cli; sti; cli; sti; pushfq; popfq; rdtsc; cpuid; rdtsc"), None),
    "log_flood": Case('for (;;) pr("flood\\n");', "budget used up: 200 log lines"),
    "long_lines": Case('for (int i = 0; i < 9; i++) pr("%0*d\\n", 1 << 30, 1);', None),
    "heap_flood": Case(
        "int n = 0; while (__kmalloc_noprof(4096, 0) && n < 9999) n++; return n > 255 ? -7 : 0;",
        r"\[-7\]",
    ),
    "call_flood": Case("for (;;) kfree(NULL);", "budget used up"),
    "wild_free": Case("kfree((void *)0xffff900000000000);", "unable to handle page fault"),
    "double_free": Case("void *p = __kmalloc_noprof(64, 0); kfree(p); kfree(p);", "kernel BUG at mm/slub.c"),
    "bad_format_pointer": Case('pr("%s\\n", (char *)0xffff900000000000);', "unable to handle page fault"),
    "unknown_format": Case('pr("%q\\n", 1);', "needs printk format"),
    "huge_copy": Case(
        "memcpy(text, text, -1UL);",
        "unable to handle page fault",
        "void *memcpy(void *, void *, u64); char text[64];",
    ),
    "huge_fill": Case(
        "memset(text, 0, 1UL << 40);",
        "unable to handle page fault",
        "void *memset(void *, int, u64); char text[64];",
    ),
    "bad_patch": Case(
        "return klp_enable_patch((void *)0x1234);",
        "unable to handle page fault for address: 0000000000001234",
        "int klp_enable_patch(void *);",
    ),
    "endless_patch": Case(
        "p[0] = &__this_module; p[1] = rows; for (int i = 0; i < 100000; i++) rows[i] = rows;"
        "return klp_enable_patch(p);",
        "unable to handle page fault|soft lockup|an array has no end",
        "int klp_enable_patch(void *); void *p[25]; void *rows[100000];",
    ),
    "endless_callbacks": Case(
        "char a[8] = { 1, 2 }; sort(a, 2, 1, compare, NULL); return 0;",
        "nested too deeply|stack guard page|BUG",
        "void sort(void *, u64, u64, int (*)(char *, char *), void *);"
        "int compare(char *x, char *y) { char a[8] = { 1, 2 }; sort(a, 2, 1, compare, NULL); return 0; }",
    ),
    "self_deadlock": Case(
        "mutex_lock(m); mutex_lock(m);", "possible deadlock", "void mutex_lock(void *); u64 m[4];"
    ),
    "spin_deadlock": Case(
        "_raw_spin_lock(&l); _raw_spin_lock(&l);",
        "spinlock recursion",
        "void _raw_spin_lock(u32 *); u32 l;",
    ),
    "endless_list": Case(
        "l.next = &l; l.prev = &l; a.next = a.prev = &a; list_sort(NULL, &l, NULL); l.next = &a;"
        "list_sort(NULL, &l, NULL);",
        "stuck in list_sort",
        "struct list { struct list *next, *prev; } l, a; void list_sort(void *, struct list *, void *);",
    ),
    "list_corruption": Case(
        "return __list_add_valid_or_report(b, a, c);",
        "list_add corruption",
        "bool __list_add_valid_or_report(void *, void *, void *); u64 a[2], b[2], c[2];",
    ),
    "bogus_seq_file": Case(
        'seq_printf((void *)8, "x");',
        "NULL pointer dereference",
        "void seq_printf(void *, const char *, ...);",
    ),
    "bogus_task": Case("wake_up_process((void *)0x18);", "NULL pointer dereference", "int wake_up_process(void *);"),
    "wake_nobody": Case("wake_up_process(__kmalloc_noprof(16384, 0x100));", None, "int wake_up_process(void *);"),
    "thread_bomb": Case(
        'for (int i = 0; i < 200; i++) wake_up_process(kthread_create_on_node(f, NULL, -1, "bomb%d", i)); return -4;',
        "too many threads|no stack left|unable to handle page fault",
        "void *kthread_create_on_node(int (*)(void *), void *, int, const char *, ...); int wake_up_process(void *);"
        "int f(void *x) { msleep(1000); return 0; }",
    ),
    "current_overwritten": Case(
        'asm volatile("movq $0, %gs:0x34000"); pr("still here\\n"); mutex_lock(m); return 0;', None,
        "void mutex_lock(void *); u64 m[4];",
    ),
    "module_overwritten": Case(
        'for (int i = 0; i < 1280; i++) ((volatile char *)&__this_module)[i] = 0xff; return 0;',
        None,
    ),
    "bogus_work": Case(
        "w[3] = 0x1234; queue_work_on(0, system_wq, w); flush_work(w); return 0;",
        "BUG: unable to handle page fault|BUG: kernel NULL",
        "extern void *system_wq; bool queue_work_on(int, void *, void *); bool flush_work(void *); u64 w[4];",
    ),
    "bogus_timer": Case(
        "t[3] = 0x4343434343434343; mod_timer(t, 0); msleep(100); return 0;",
        "0x4343434343434343",
        "int mod_timer(void *, u64); u64 t[5];",
    ),
    "hostile_name": Case("kobject_put(kobject_create_and_add(\"../../etc\", kernel_kobj));", None,
        "extern void *kernel_kobj; void *kobject_create_and_add(const char *, void *); void kobject_put(void *);"),
    "panic": Case('panic("no %s", "way");', "Kernel panic - not syncing: no way", "void panic(const char *, ...);"),
    "huge_section": Case("return big[sizeof(big) / 2];", r"\[-12\]", "char big[512 << 20];"),
    "bad_relocation": Case("", "overflow in relocation type 10", 'asm(".section .data; .long init_module; .text");'),
    "unknown_relocation": Case("", "Unknown rela relocation: 23", 'asm(".section .data; .long foo@tpoff; .text");'),
}  # fmt: skip


def source(case: Case) -> str:
    """The module of a case."""
    return f"{case.more}\nint init_module(void) {{ {case.code} return 0; }}\nvoid cleanup_module(void) {{ }}\n"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    """The log lines of each case."""

    async def main() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        async with executing(LIMITS) as (m, cpu):
            await m.init_module(build("before", source(Case('pr("before\\n");', None))))
            for name, case in CASES.items():
                since = m.printk.next_seq
                error = 0
                try:
                    with trio.fail_after(600):
                        await m.init_module(build(name, source(case)))
                except OSError as caught:
                    error = caught.errno or 0
                found[name] = [r.message for r in m.printk.records(since)]
                found[name].append(f"[-{error}]" if error else "[ok]")
                assert cpu.alive, f"{name}: {found[name]}"
                if name == "thread_bomb":
                    await trio.sleep(5)
                assert not cpu.threads, name
            await trio.sleep(10)
            assert not cpu.threads
            await m.init_module(build("after", source(Case('pr("after all\\n");', None))))
            assert "after all" in [r.message for r in m.printk.records()]
            await m.delete_module("before")
        return found

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("name", CASES)
def test_hostile(name: str, outcomes: dict[str, list[str]]) -> None:
    log = outcomes[name]
    wanted = CASES[name].log
    if wanted is None:
        assert not [line for line in log if re.search("Oops|BUG", line)], log
    else:
        assert [line for line in log if re.search(wanted, line)], log


def test_a_report_has_registers_code_and_trace(outcomes: dict[str, Any]) -> None:
    log = outcomes["null_write"]
    assert "#PF: supervisor write access in kernel mode" in log
    assert "#PF: error_code(0x0002) - not-present page" in log
    assert any(re.match(r"Oops: Oops: 0002 \[#\d+\] PREEMPT SMP NOPTI", line) for line in log)
    assert any(re.match(r"RIP: 0010:init_module\+0x[0-9a-f]+/0x[0-9a-f]+ \[null_write\]", line) for line in log)
    assert any(re.match(r"Code: [0-9a-f ]*<c7>", line) for line in log)
    assert any(line.startswith("RAX: ") for line in log)
    assert " <TASK>" in log
    assert any("Modules linked in:" in line and "null_write(" in line for line in log)
    assert "---[ end trace 0000000000000000 ]---" in log


def test_a_frame_of_the_caller_is_in_the_trace(outcomes: dict[str, Any]) -> None:
    log = outcomes["wild_free"]
    assert any(re.match(r"RIP: 0010:kfree\+0x0/", line) for line in log)
    assert any(re.search(r"init_module\+0x.* \[wild_free\]", line) for line in log)
