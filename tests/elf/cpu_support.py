"""Modules for the execution tests: compiled here, from C with nothing but a compiler, and a machine that runs them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

from klpfs.cpu.api import API
from klpfs.cpu.host import Cpu
from klpfs.cpu.proto import Limits
from klpfs.kernel import profile as profiles
from klpfs.kernel.kallsyms import DictTable
from klpfs.machine import Machine, open_machine

CC = shutil.which("gcc") or shutil.which("cc")

PRELUDE = r"""
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long u64;
typedef unsigned long size_t; typedef _Bool bool;
#define NULL ((void *)0)
#define STRUCT_MODULE(NAME, INIT, EXIT) \
    struct module { \
        u32 state; char pad0[20]; char name[56]; char pad1[232]; int (*init)(void); char pad2[880]; \
        void (*exit)(void); char pad3[72]; \
    } __this_module __attribute__((section(".gnu.linkonce.this_module"), aligned(64))) \
        = { .name = NAME, .init = INIT, .exit = EXIT }; \
    _Static_assert(sizeof(struct module) == 1280, "struct module"); \
    _Static_assert(__builtin_offsetof(struct module, init) == 312, "init"); \
    _Static_assert(__builtin_offsetof(struct module, exit) == 1200, "exit");
#define INFO(TAG, TEXT) \
    static const char TAG##_info[] __attribute__((section(".modinfo"), used, aligned(1))) = #TAG "=" TEXT;
struct kernel_param_ops { u32 flags; int (*set)(const char *, const void *); int (*get)(char *, const void *);
    void (*free)(void *); };
struct kernel_param { const char *name; void *mod; const struct kernel_param_ops *ops; const u16 perm; char level;
    u8 flags; void *arg; };
#define PARAM(NAME, OPS, TYPE, VAR, PERM) \
    static const char parmtype_##NAME[] __attribute__((section(".modinfo"), used, aligned(1))) \
        = "parmtype=" #NAME ":" TYPE; \
    static const char param_name_##NAME[] = #NAME; \
    static const struct kernel_param param_##NAME __attribute__((section("__param"), used, aligned(8))) \
        = { param_name_##NAME, &__this_module, OPS, PERM, -1, 0, VAR };
int _printk(const char *, ...);
#define pr(...) _printk("\0016" __VA_ARGS__)
void *__kmalloc_noprof(size_t, u32); void kfree(const void *); void msleep(u32);
#define GFP_KERNEL 0xcc0
"""

FLAGS = (
    "-O2", "-std=gnu11", "-ffreestanding", "-fno-builtin", "-fno-pic", "-fno-pie", "-mcmodel=kernel", "-mno-red-zone",
    "-mno-sse", "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-fno-common", "-w",
)  # fmt: skip
TRACED = ("-pg", "-mfentry", "-mrecord-mcount")
"""Flags that give every function an ftrace site."""


@cache
def build(
    name: str, source: str, flags: Sequence[str] = (), *, init: bool = True, exit: bool = True, release: str = ""
) -> bytes:
    """The module *name* made of C *source*, which defines ``init_module`` and ``cleanup_module``.

    *release*: of the kernel that it is for, by default that of the default profile.
    """
    assert CC is not None, "these tests need a C compiler"
    profile = profiles.profile(release=release or None)
    declared = f'STRUCT_MODULE("{name}", {"init_module" if init else "NULL"}, {"cleanup_module" if exit else "NULL"})\n'
    head = ("int init_module(void);\n" if init else "") + ("void cleanup_module(void);\n" if exit else "")
    info = f'INFO(license, "GPL") INFO(name, "{name}") INFO(vermagic, "{profile.vermagic}")\n'
    with tempfile.TemporaryDirectory() as where:
        c = Path(where) / f"{name}.c"
        c.write_text(PRELUDE + head + declared + info + source)
        command = [CC, *FLAGS, *flags, "-c", str(c), "-o", f"{c}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Path(f"{c}.o").read_bytes()


def with_klp_relocations(data: bytes, objname: str, section: str) -> bytes:
    """The object file *data* with the relocations of *section* and the symbols ``.klp.sym.*`` turned into livepatch's,
    as the tools that build livepatches do it."""
    image = bytearray(data)
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [list(struct.unpack_from("<IIQQQQIIQQ", image, table + i * size)) for i in range(count)]
    strings = bytes(image[headers[names][4] : headers[names][4] + headers[names][5]])

    def name(header: list[int]) -> str:
        return strings[header[0] :].split(b"\0")[0].decode()

    symtab = next(h for h in headers if h[1] == 2)
    texts = headers[symtab[6]]
    for at in range(symtab[4], symtab[4] + symtab[5], 24):
        (label,) = struct.unpack_from("<I", image, at)
        if bytes(image[texts[4] + label :]).startswith(b".klp.sym."):
            struct.pack_into("<H", image, at + 6, 0xFF20)
    new = f".klp.rela.{objname}.{section}".encode() + b"\0"
    for header in headers:
        if header[1] == 4 and name(header) == f".rela{section}":
            header[0] = len(strings)
            header[2] |= 0x00100002
    headers[names][4], headers[names][5] = len(image), len(strings) + len(new)
    image += strings + new
    for i, header in enumerate(headers):
        struct.pack_into("<IIQQQQIIQQ", image, table + i * size, *header)
    return bytes(image)


class CpuTable(DictTable):
    """A vmlinux that has and exports everything that the sandbox knows, and a few functions that it does not."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        super().__init__([*API, "cmdline_proc_show", "kernel_read_file", "some_other_function", *more])

    def exported(self, name: str) -> tuple[int | None, bool] | None:
        """Everything but what starts with ``no_such``."""
        return None if name.startswith("no_such") else (None, False)


@asynccontextmanager
async def executing(limits: Limits | None = None, *, more: Sequence[str] = ()) -> AsyncIterator[tuple[Machine, Cpu]]:
    """A machine with an execution engine; *more*: further symbols of its vmlinux."""
    async with open_machine(table=CpuTable(more)) as m:
        m.dynamic_debug.control_write("file kernel/livepatch/* +p")
        m.engine = cpu = Cpu(m, limits)
        yield m, cpu


def lines(m: Machine, since: int = 0) -> list[str]:
    """The log's messages, taint lines left out."""
    return [r.message for r in m.printk.records(since) if not re.search(r"taint|verification|out-of-tree", r.message)]
