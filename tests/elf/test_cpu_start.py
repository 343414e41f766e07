"""When the execution engine starts, and what happens where there is none."""

from __future__ import annotations

import errno
import os
import re
from typing import Any

import pytest
import trio
from cpu_support import CpuTable, build, lines

from klpfs.cpu import lazy
from klpfs.machine import open_machine

MODULE = 'int init_module(void) { pr("ran\\n"); return 0; }\nvoid cleanup_module(void) {}\n'


def test_the_engine_starts_with_the_first_module(run: Any) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            assert engine.cpu is None
            await m.init_module(build("first", MODULE))
            assert lines(m)[-1] == "ran"
            assert engine.cpu is not None
            assert engine.cpu.alive
        assert not engine.cpu.alive

    run(main)


def test_or_by_itself_soon_after_the_boot() -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=0)
            assert engine is not None
            with trio.fail_after(30):
                while engine.cpu is None or not engine.cpu.confinement:  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.01)

    trio.run(main)


def test_without_unicorn_metadata_drive_modules(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            assert lazy.attach(m) is None
            assert m.engine is None
            await m.init_module(build("first", MODULE))
            assert "ran" not in lines(m)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(main)


def test_where_the_sandbox_cannot_start_modules_are_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            with pytest.raises(OSError, match="no memfd here") as info:
                await m.init_module(build("first", MODULE))
            assert info.value.errno == errno.ENOMEM
            (line,) = lines(m)[-1:]
            assert line == "klpfs: first: cannot be executed: no sandbox can be started: [Errno 38] no memfd here"
            assert m.kernfs.lookup("sys/module/first") is None
            monkeypatch.undo()  # it is tried again each time
            await m.init_module(build("first", MODULE))
            assert lines(m)[-1] == "ran"

    def refuse() -> int:
        raise OSError(38, "no memfd here")

    monkeypatch.setattr("klpfs.cpu.host.create_memory", refuse)
    run(main)


def test_a_sandbox_that_ends_while_it_starts_is_a_reason_too(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            with pytest.raises(OSError, match="did not start") as info:
                await m.init_module(build("first", MODULE))
            assert info.value.errno == errno.ENOMEM
            assert re.match(r"klpfs: first: cannot be executed: its sandbox did not start: .*status 7", lines(m)[-1])
            assert not any("stopped" in line for line in lines(m))  # there was nothing to stop

    monkeypatch.setattr("klpfs.cpu.process._CODE", "import sys; sys.exit(7)")
    run(main)


KEEPER = r"""
INFO(livepatch, "Y")
struct klp_func { const char *old_name; void *new_func; u64 old_sympos; char pad[128]; };
struct klp_object { const char *name; struct klp_func *funcs; void *callbacks[4]; char pad[120]; };
struct klp_state { u64 id; u32 version; void *data; };
struct klp_patch { void *mod; struct klp_object *objs; struct klp_state *states; bool replace; char pad[175]; };
int klp_enable_patch(struct klp_patch *); void seq_puts(void *, const char *);
void *klp_shadow_alloc(void *, u64, size_t, u32, void *, void *), *klp_shadow_get(void *, u64);
struct klp_state *klp_get_prev_state(u64);
struct device; struct file_operations { char pad[264]; };
struct miscdevice { int minor; const char *name; const void *fops; char list[16]; struct device *parent, *this_device;
    const void *groups; const char *nodename; u16 mode; };
int misc_register(struct miscdevice *); void misc_deregister(struct miscdevice *);
u32 NAME_param = 11;
PARAM(number, &param_ops_uint, "uint", &NAME_param, 0644)
extern char init_task[];
int show(void *m, void *v) { seq_puts(m, "NAME\n"); return 0; }
void post_unpatch(void *obj) { pr("NAME unpatched\n"); }
static struct klp_func funcs[] = { { "cmdline_proc_show", show }, { } };
static struct klp_object objs[] = { { .funcs = funcs, .callbacks = { NULL, NULL, NULL, post_unpatch } }, { } };
static struct klp_state states[] = { { 5, 7, objs }, { } };
static struct klp_patch patch = { &__this_module, objs, states, REPLACE };
static const struct file_operations fops;
static struct miscdevice misc = { 255, "NAME", &fops };
int init_module(void) {
    pr("NAME: shadow %s\n", klp_shadow_get(init_task, 1) ? "there" : "not there");
    klp_shadow_alloc(init_task, 1, 8, GFP_KERNEL, NULL, NULL);
    misc_register(&misc);
    int ret = klp_enable_patch(&patch);
    pr("NAME: minor %d, answer %d\n", misc.minor, ret);
    return ret;
}
void cleanup_module(void) {}
"""


def kill(engine: lazy.LazyEngine) -> None:
    """End the sandbox, behind the daemon's back."""
    assert engine.cpu is not None
    engine.cpu.process.kill()
    os.waitid(os.P_PID, engine.cpu.process.pid, os.WEXITED | os.WNOWAIT)


def keeper(name: str, *, replace: bool = False) -> bytes:
    """A module that leaves something in every list of the kernel's."""
    head = "extern struct kernel_param_ops param_ops_uint;\n"
    return build(name, head + KEEPER.replace("NAME", name).replace("REPLACE", str(int(replace))))


def test_after_its_death_a_new_sandbox_runs_what_comes_afterwards(run: Any) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            await m.init_module(keeper("old"))
            await m.livepatch.wait_transition()
            assert await m.kernfs.read_file("proc/cmdline") == b"old\n"
            kill(engine)

            # nobody has noticed yet; the next module does
            since = m.printk.next_seq
            await m.init_module(build("hello", MODULE))
            said = [line for line in lines(m, since) if "retpoline" not in line and "Spectre" not in line]
            assert said[0].startswith("klpfs: module execution stopped: the sandbox is gone: ")
            assert said[1:] == [
                "klpfs: the code of these modules is gone, 1 shadow variables with it: old",
                "klpfs: they cannot be removed; modules loaded from now on run in a new sandbox",
                "ran",
            ]
            await m.delete_module("hello")

            # the old one is there, and answers errors
            assert await m.kernfs.read_file("sys/module/old/initstate") == b"live\n"
            assert await m.kernfs.read_file("sys/module/old/parameters/number") == b"11\n"
            for attempt in (
                m.kernfs.read_file("proc/cmdline"),
                m.kernfs.write_file("sys/module/old/parameters/number", b"12"),
            ):
                with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                    await attempt
                assert info.value.errno == errno.EIO
            with pytest.raises(OSError, match="in use") as info:
                await m.delete_module("old")
            assert info.value.errno == errno.EWOULDBLOCK
            with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                await m.init_module(keeper("old"))
            assert info.value.errno == errno.EEXIST

            # what replaces it starts anew: no shadow variable, another minor
            since = m.printk.next_seq
            await m.init_module(keeper("new", replace=True))
            await m.livepatch.wait_transition()
            assert await m.kernfs.read_file("proc/cmdline") == b"new\n"
            assert [line for line in lines(m, since) if re.match("new: (shadow|minor)", line)] == [
                "new: shadow not there",
                "new: minor 257, answer 0",
            ]
            await trio.sleep(1)  # the worker drops the last reference
            assert m.kernfs.lookup("sys/kernel/livepatch/old") is None
            with pytest.raises(OSError, match="sandbox") as info:
                await m.delete_module("old")
            assert info.value.errno == errno.EBUSY
            assert m.modules.modules["old"].state == "live"

            # and so on, as often as it takes
            kill(engine)
            await m.init_module(build("hello", MODULE))
            assert lines(m)[-1] == "ran"

    run(main)


def test_a_dead_patch_can_be_disabled(run: Any) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            await m.init_module(keeper("old"))
            await m.livepatch.wait_transition()
            kill(engine)
            await m.kernfs.write_file("sys/kernel/livepatch/old/enabled", b"0")
            await m.livepatch.wait_transition()
            assert "old unpatched" not in lines(m)  # the callback
            m.procfs.host_file = lambda name: b"host\n"
            assert await m.kernfs.read_file("proc/cmdline") == b"host\n"
            await trio.sleep(1)
            with pytest.raises(OSError, match="sandbox") as info:
                await m.delete_module("old")
            assert info.value.errno == errno.EBUSY

    run(main)


def test_state_of_the_dead_is_known_and_its_data_are_not(run: Any) -> None:
    source = KEEPER.replace("static struct klp_object objs", "int pre_patch(void *obj);\nstatic struct klp_object objs")
    source = (
        source.replace(".callbacks = { NULL,", ".callbacks = { pre_patch,")
        + r"""
    int pre_patch(void *obj) {
        struct klp_state *prev = klp_get_prev_state(5);
        pr("state %lu, version %d\n", prev->id, prev->version);
        pr("data: %d\n", *(int *)prev->data);
        return 0;
    }
    """
    )

    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            await m.init_module(keeper("old"))
            await m.livepatch.wait_transition()
            kill(engine)
            head = "extern struct kernel_param_ops param_ops_uint;\n"
            data = build("new", head + source.replace("NAME", "new").replace("REPLACE", "1"))
            with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared
                await m.init_module(data)
            assert info.value.errno == errno.EFAULT
            said = "\n".join(lines(m))
            assert "state 5, version 7" in said
            assert "data: " not in said
            assert "klp_state.data of a module whose code is gone" in said

    run(main)


def test_what_the_dead_export_cannot_be_used(run: Any) -> None:
    exporter = (
        MODULE
        + r"""
    int exported(void) { return 5; }
    asm(".section __ksymtab_strings,\"aMS\",@progbits,1; __kstrtab_exported: .asciz \"exported\";"
        "__kstrtabns_exported: .asciz \"\"; .previous;"
        ".section __ksymtab,\"a\"; .balign 4; __ksymtab_exported: .long exported - .;"
        ".long __kstrtab_exported - .; .long __kstrtabns_exported - .; .previous");
    """
    )
    user = "int exported(void);\n" + MODULE.replace("return 0;", "return exported();")

    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            m.kallsyms.table.exported = lambda name: None if name == "exported" else (None, False)
            await m.init_module(build("exporter", exporter))
            kill(engine)
            with pytest.raises(OSError, match="exported is gone") as info:
                await m.init_module(build("user", user))
            assert info.value.errno == errno.EIO
            assert lines(m)[-1] == "klpfs: user: exported is of module exporter, whose code is gone with its sandbox"
            assert m.modules.modules["exporter"].refcnt == 0

    run(main)
