"""Modules that build their ``struct klp_patch`` when they run, from tables, as kpatch-build's do; and the variables of
the kernel that the functions which print /proc's files read, exported or not."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import trio
from cpu_support import TRACED, build, executing, lines, with_klp_relocations

from klpfs.elf import klp
from klpfs.elf.reader import ElfModule
from klpfs.kernel.profile import LINUX_PROC_BANNER

#: Symbols of vmlinux that are not functions of the API.
VMLINUX = ("version_proc_show", "saved_command_line", "saved_command_line_len", "linux_proc_banner", "linux_banner")

TABLES = r"""
struct klp_func { const char *old_name; void *new_func; u64 old_sympos; char pad[128]; };
struct klp_object { const char *name; struct klp_func *funcs; void *callbacks[4]; char pad[120]; };
struct klp_patch { struct module *mod; struct klp_object *objs; void *states; bool replace; char pad[175]; };
_Static_assert(sizeof(struct klp_func) == 152 && sizeof(struct klp_object) == 168, "klp");
_Static_assert(sizeof(struct klp_patch) == 200, "klp");
struct row { void *new_addr; u64 new_size, old_addr, old_size, sympos; const char *name, *objname; };
struct callback { void *function; const char *objname; };
INFO(livepatch, "Y")
#define TEXT(VAR, WHAT) static const char VAR[] __attribute__((section(".kpatch.strings"), used)) = WHAT;
#define TABLE(NAME) __attribute__((section(".kpatch." NAME), used, aligned(8)))
int klp_enable_patch(struct klp_patch *); int strcmp(const char *, const char *);
void seq_printf(void *, const char *, ...); void seq_puts(void *, const char *);
TEXT(vmlinux, "vmlinux") TEXT(target, "target") TEXT(cmdline, "cmdline_proc_show") TEXT(version, "version_proc_show")
TEXT(hidden, "hidden")

static const struct row rows[];
static const struct callback pre_patch[], post_unpatch[];
static struct klp_patch *patch;
static struct klp_object *objs, *base;

static void *zalloc(size_t size) {
    u64 *at = __kmalloc_noprof(size, GFP_KERNEL);
    for (size_t i = 0; i < size / 8; i++) at[i] = 0;
    return at;
}
/* what comes later goes to the front, of the objects and of an object's functions */
static struct klp_object *object_of(const char *name) {
    if (!strcmp(name, "vmlinux")) name = NULL;
    for (struct klp_object *obj = objs; obj->funcs; obj++)
        if (name ? obj->name && !strcmp(obj->name, name) : !obj->name) return obj;
    (--objs)->name = name;
    objs->funcs = (struct klp_func *)zalloc((ROWS + 1) * sizeof(struct klp_func)) + ROWS;
    return objs;
}
int init_module(void) {
    patch = zalloc(sizeof(*patch)); objs = base = zalloc(8 * sizeof(*objs)); objs += 7;
    for (int i = 0; i < ROWS; i++) {
        struct klp_func *func = --object_of(rows[i].objname)->funcs;
        func->old_name = rows[i].name; func->new_func = rows[i].new_addr; func->old_sympos = rows[i].sympos;
    }
    if (pre_patch[0].function) object_of(pre_patch[0].objname)->callbacks[0] = pre_patch[0].function;
    if (post_unpatch[0].function) object_of(post_unpatch[0].objname)->callbacks[3] = post_unpatch[0].function;
    patch->mod = &__this_module; patch->objs = objs; patch->replace = 1;
    int ret = klp_enable_patch(patch);
    if (ret) { pr("refused: %d\n", ret); kfree(base); kfree(patch); }
    return ret;
}
void cleanup_module(void) { kfree(base); kfree(patch); pr("freed\n"); }
"""

#: A function that gets at the kernel's command line, which no module may import.
COMMAND_LINE = r"""
#define ROWS 1
extern const char *saved asm("\".klp.sym.vmlinux.saved_command_line,0\"");
extern u32 saved_len asm("\".klp.sym.vmlinux.saved_command_line_len,0\"");
__attribute__((section(".text.line"), noinline)) const char *line(u32 *len) { *len = saved_len; return saved; }
int show(void *m, void *v) {
    u32 len; const char *text = line(&len);
    seq_printf(m, "%s patched, %u\n", text, len); return 0;
}
static const struct row rows[] TABLE("funcs") = { { show, 1, 0, 1, 1, cmdline, vmlinux } };
static const struct callback pre_patch[] TABLE("callbacks.pre_patch") = { { NULL, NULL } };
static const struct callback post_unpatch[] TABLE("callbacks.post_unpatch") = { { NULL, NULL } };
"""

#: The second version: one function more in the kernel, one of a module, and callbacks for the module.
VERSION = r"""
#define ROWS 3
extern const char banner[] asm("\".klp.sym.vmlinux.linux_proc_banner,0\"");
__attribute__((section(".text.line"), noinline)) const char *line(void) { return banner; }
int show(void *m, void *v) {
    const char *task, *uts;
    asm volatile("movq %%gs:pcpu_hot, %0" : "=r" (task)); /* current->nsproxy->uts_ns */
    uts = *(const char **)(*(const char **)(task + 3064) + 8);
    seq_printf(m, line(), uts, uts + 130, uts + 195); return 0;
}
int show_cmdline(void *m, void *v) { seq_puts(m, "second\n"); return 0; }
int twice(int n) { return 2 * n; }
int before(struct klp_object *obj) { pr("before %s\n", obj->name); return 0; }
void after(struct klp_object *obj) { pr("after %s\n", obj->name); }
static const struct row rows[] TABLE("funcs") = { { show, 1, 0, 1, 1, version, vmlinux },
    { twice, 1, 0, 1, 1, hidden, target }, { show_cmdline, 1, 0, 1, 1, cmdline, vmlinux } };
static const struct callback pre_patch[] TABLE("callbacks.pre_patch") = { { before, target } };
static const struct callback post_unpatch[] TABLE("callbacks.post_unpatch") = { { after, target } };
"""

TARGET = r"""
__attribute__((noinline)) int hidden(int n) { asm volatile(""); return n + 40; }
int init_module(void) { return 0; }
void cleanup_module(void) {}
"""


def dynamic(name: str, source: str) -> bytes:
    """A module of such tables."""
    head, _, rest = source.partition("\n#define ROWS ")
    count, _, body = rest.partition("\n")
    return with_klp_relocations(build(name, f"#define ROWS {count}\n{TABLES}{head}\n{body}"), "vmlinux", ".text.line")


def test_a_function_reads_the_command_line(run: Any) -> None:
    text = Path("/proc/cmdline").read_bytes().rstrip(b"\n")

    async def main() -> None:
        async with executing(more=VMLINUX) as (m, _):
            assert await m.kernfs.read_file("proc/cmdline") == text + b"\n"
            await m.init_module(dynamic("first", COMMAND_LINE))
            await m.livepatch.wait_transition()
            assert await m.kernfs.read_file("proc/cmdline") == b"%s patched, %d\n" % (text, len(text))

    run(main)


def test_a_cumulative_patch_replaces_the_one_before(run: Any) -> None:
    async def main() -> None:
        async with executing(more=VMLINUX) as (m, _):
            target = await m.init_module(build("target", TARGET, TRACED))
            (function,) = m.kallsyms.module_on_each_symbol("target", "hidden")
            await m.init_module(dynamic("first", COMMAND_LINE))
            await m.livepatch.wait_transition()
            data = dynamic("second", VERSION)
            await m.init_module(data)
            await m.livepatch.wait_transition()
            # the order of objects and functions, as read from the file, is that which the module makes
            info = klp.find_patch(ElfModule.parse(data))
            assert info is not None
            assert info.is_kpatch
            (patch,) = m.livepatch.klp.klp_patches
            assert [(obj.name, [f.old_name for f in obj.funcs or ()]) for obj in patch.objs or ()] == [
                (obj.name, [f.old_name for f in obj.funcs]) for obj in info.objects
            ]
            assert patch.replace
            assert await m.kernfs.read_file("proc/cmdline") == b"second\n"
            banner = LINUX_PROC_BANNER % ("Linux", m.profile.release, m.profile.kernel_version)
            assert await m.kernfs.read_file("proc/version") == banner.encode() == m.profile.linux_banner.encode()
            assert await target.code.call(function, [4], None) == 8
            await m.delete_module("first")
            await m.kernfs.write_file("sys/kernel/livepatch/second/enabled", b"0")
            await m.livepatch.wait_transition()
            await trio.sleep(1)  # the worker drops the last reference
            await m.delete_module("second")
            assert [line for line in lines(m) if line.startswith(("before", "after", "freed"))] == [
                "before target",
                "freed",
                "after target",
                "freed",
            ]

    run(main)


@pytest.mark.parametrize(("more", "log"), [
    # before its init runs: relocations against the kernel are written with all others
    ((), ["livepatch: symbol 'saved_command_line_len' not found in symbol table"]),
    (VMLINUX, ["livepatch: symbol 'hidden' not found in symbol table", "refused: -22"]),
])  # fmt: skip
def test_a_module_that_names_what_the_kernel_does_not_have(run: Any, more: tuple[str, ...], log: list[str]) -> None:
    async def main() -> None:
        async with executing(more=more) as (m, _):
            data = dynamic("first", COMMAND_LINE.replace("cmdline, vmlinux }", "hidden, vmlinux }"))
            with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                await m.init_module(data)
            assert info.value.errno == errno.EINVAL
            assert lines(m)[-len(log) :] == log
            assert m.kernfs.lookup("sys/module/first") is None

    run(main)
