"""What the ELF tests share: specs, a small C module of our own built by gcc, and changes to single header fields.

``KLPFS_TEST_MODULES`` may name a directory of modules built by kbuild or kpatch-build; they are examined as well.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from klpfs.elf import klp, layout
from klpfs.elf.reader import ElfModule
from klpfs.elf.writer import write_module
from klpfs.spec import parse_toml

#: A spec that uses all that the writer knows.
FULL = """
name = "full"
version = "1.0"
description = "everything"
author = ["A", "B"]
replace = true
depends = ["other"]
requires = ["kfree"]

[[params]]
name = "ret"
perm = "0644"
default = -5
description = "a number"

[[params]]
name = "flag"
type = "bool"
default = true

[[params]]
name = "list"
type = "short"
max = 4
default = [1, -2]

[[params]]
name = "text"
type = "string"
max = 16
default = "hi"

[[params]]
name = "word"
type = "charp"
default = "hello"

[[states]]
id = 1
version = 2

[[states]]
id = 77

[[objects]]
uses = ["foo", "bar,2"]

[[objects.functions]]
old_name = "cmdline_proc_show"
output = "x {module}"

[objects.callbacks.pre_patch]
log = "hi {object}"
ret = "$ret"

[[objects]]
name = "busy"

[[objects.functions]]
old_name = "busy_func"
sympos = 2

[objects.callbacks.post_unpatch]
log = "bye"

[[functions]]
name = "offered"
export = "gpl"

[[functions]]
name = "offered_to_all"
export = "any"

[[functions]]
name = "quiet"
notrace = true

[[functions]]
name = "twice"

[[functions]]
name = "twice"
"""

PLAIN = 'name = "plain"\nkind = "module"\n'

C_MODULE = r"""
/* A module as kbuild makes them, as far as a reader of modules can tell: sections, tables, a struct klp_patch. */
struct module { char pad[0x18]; char name[56]; char rest[0x500 - 0x18 - 56]; };
struct kobject { char pad[64]; };
struct list { void *next, *prev; };
struct klp_func { const char *old_name; void *new_func; unsigned long old_sympos; void *old_func; struct kobject kobj;
    struct list node, stack_node; unsigned long old_size, new_size; _Bool nop, patched, transition; };
struct klp_callbacks { void *pre_patch, *post_patch, *pre_unpatch, *post_unpatch; _Bool post_unpatch_enabled; };
struct klp_object { const char *name; struct klp_func *funcs; struct klp_callbacks callbacks; struct kobject kobj;
    struct list func_list, node; void *mod; _Bool dynamic, patched; };
struct klp_state { unsigned long id; unsigned int version; void *data; };
struct klp_patch { struct module *mod; struct klp_object *objs; struct klp_state *states; _Bool replace;
    struct list list; struct kobject kobj; struct list obj_list; _Bool enabled, forced;
    char free_work[32]; char finish[32]; };
struct kernel_param { const char *name; struct module *mod; const void *ops; unsigned short perm; signed char level;
    unsigned char flags; void *arg; };
struct modversion_info { unsigned long crc; char name[56]; };

#define INFO(n, text) static const char info_##n[] __attribute__((section(".modinfo"), used)) = text
INFO(1, "description=of our own"); INFO(2, "license=GPL"); INFO(3, "livepatch=Y"); INFO(4, "name=own_module");
INFO(5, "vermagic=6.12.0 SMP preempt mod_unload modversions "); INFO(6, "parmtype=level:int");

struct module __this_module __attribute__((section(".gnu.linkonce.this_module"))) = { .name = "own_module" };
extern int klp_enable_patch(struct klp_patch *);
extern int optional(void) __attribute__((weak));
extern const char param_ops_int[];

static int level = 42;
static const struct kernel_param param __attribute__((section("__param"), used)) =
    { "level", &__this_module, param_ops_int, 0644, -1, 0, &level };
static const struct modversion_info versions[] __attribute__((section("__versions"), used)) =
    { { 0x12345678, "module_layout" }, { 0x9abcdef0, "klp_enable_patch" } };

/* looks like a patch at first sight: a pointer to the module, then one to data */
struct operations { struct module *owner; const char *name; int (*open)(void); };
static int new_show(void) { return optional ? optional() : 1; }
static struct operations decoy __attribute__((used)) = { &__this_module, "decoy", new_show };

static int pre_patch(void) { return 0; }
static struct klp_func funcs[] = { { .old_name = "cmdline_proc_show", .new_func = new_show },
    { .old_name = "twice", .new_func = pre_patch, .old_sympos = 3 }, { 0 } };
static struct klp_func no_funcs[] = { { 0 } };
static struct klp_object objs[] = { { .funcs = funcs, .callbacks = { .pre_patch = pre_patch } },
    { .name = "target", .funcs = no_funcs }, { 0 } };
static struct klp_state states[] = { { .id = 9, .version = 4 }, { 0 } };
static struct klp_patch patch = { .mod = &__this_module, .objs = objs, .states = states, .replace = 1 };

int init_module(void) { return klp_enable_patch(&patch); }
void cleanup_module(void) { }
"""

KPATCH_MODULE = r"""
/* A module as kpatch-build makes them: no struct klp_patch, but tables of functions and callbacks. */
struct module { char pad[0x18]; char name[56]; char rest[0x500 - 0x18 - 56]; };
struct kpatch_func { void *new_addr; unsigned long new_size, old_addr, old_size, sympos; const char *name, *objname; };
struct kpatch_callback { void *callback; const char *objname; };
static const char i1[] __attribute__((section(".modinfo"), used)) = "livepatch=Y";
static const char i2[] __attribute__((section(".modinfo"), used)) = "name=kp";
struct module __this_module __attribute__((section(".gnu.linkonce.this_module"))) = { .name = "kp" };
static int a(void) { return 1; }
static int b(void) { return 2; }
static int c(void) { return 3; }
static int hook(void) { return 0; }
#define TABLE(s) __attribute__((section(s), used))
static struct kpatch_func rows[] TABLE(".kpatch.funcs") = {
    { a, 8, 0, 8, 1, "first", "vmlinux" }, { b, 8, 0, 8, 0, "second", "ext4" }, { c, 8, 0, 8, 2, "third", "vmlinux" } };
static struct kpatch_callback pre[] TABLE(".kpatch.callbacks.pre_patch") = { { hook, "ext4" } };
static struct kpatch_callback post[] TABLE(".kpatch.callbacks.post_unpatch") = { { hook, "xfs" } };
int init_module(void) { return a() + b(); }
"""

GCC = (
    "gcc", "-c", "-O2", "-g", "-ffreestanding", "-fno-pic", "-mcmodel=kernel", "-fcf-protection=branch",
    "-mno-red-zone", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-pg", "-mfentry", "-mrecord-mcount",
)  # fmt: skip


def module(text: str) -> bytes:
    """The module file of a spec."""
    return write_module(parse_toml(text))


def compile_module(source: str, path: Path) -> Path:
    """Compile C to a module file."""
    path.with_suffix(".c").write_text(source)
    subprocess.run([*GCC, str(path.with_suffix(".c")), "-o", str(path)], check=True)
    return path


def strip(path: Path) -> Path:
    """A stripped copy of a module."""
    copy = path.with_suffix(".stripped.ko")
    subprocess.run(["strip", "--strip-unneeded", "-o", str(copy), str(path)], check=True)
    return copy


def given_modules() -> list[Path]:
    """The modules that the environment names."""
    directory = os.environ.get("KLPFS_TEST_MODULES")
    return sorted(Path(directory).glob("*.ko")) if directory else []


#: Offset and struct format of fields of the ELF header.
HEADER = {"type": (16, "H"), "machine": (18, "H"), "shoff": (40, "Q"), "shentsize": (58, "H"), "shnum": (60, "H"),
          "shstrndx": (62, "H")}  # fmt: skip
#: The same for a section header.
SECTION = {"name": (0, "I"), "type": (4, "I"), "flags": (8, "Q"), "addr": (16, "Q"), "offset": (24, "Q"),
           "size": (32, "Q"), "link": (40, "I"), "info": (44, "I")}  # fmt: skip


def with_header(data: bytes, **fields: int) -> bytes:
    """A copy with other values in the ELF header."""
    out = bytearray(data)
    for name, value in fields.items():
        offset, code = HEADER[name]
        struct.pack_into("<" + code, out, offset, value)
    return bytes(out)


def with_section(data: bytes, number: int, **fields: int) -> bytes:
    """A copy with other values in a section's header."""
    out = bytearray(data)
    (shoff,) = struct.unpack_from("<Q", data, 40)
    for name, value in fields.items():
        offset, code = SECTION[name]
        struct.pack_into("<" + code, out, shoff + 64 * number + offset, value)
    return bytes(out)


def everything(data: bytes) -> None:
    """Decode all that can be decoded."""
    elf = ElfModule.parse(data, "x.ko")
    calls: list[Callable[[], object]] = [
        lambda: elf.modinfo,
        lambda: elf.symbols,
        lambda: elf.undefined,
        lambda: elf.versions,
        lambda: elf.params,
        lambda: elf.exports,
        lambda: elf.ftrace_sites,
        lambda: elf.spec,
        lambda: layout.check_symbols(elf),
        lambda: layout.kallsyms(elf, layout.lay_out(elf)),
        lambda: klp.find_patch(elf),
        lambda: [klp.resolve_symbols(elf, s, lambda *_: 1) for s in klp.sections_of(elf, None)],
    ]
    refused = None
    for call in calls:
        try:
            call()
        except OSError as exc:
            refused = exc
    if refused is not None:
        raise refused
