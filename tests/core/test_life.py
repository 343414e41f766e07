"""A patch from insmod to rmmod, and every refusal on the way, without a mount and on a clock that jumps."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
from conftest import KLP, gone, insmod, insmod_errno, klog, machine, patch_spec, read, write

from klpfs.kernel.locking import LockOrderError
from klpfs.kernel.sched import Task
from klpfs.livepatch import KlpFunc, KlpObject, KlpPatch, core
from klpfs.machine import Machine

Run = Callable[..., Any]

ENABLED = [
    "livepatch: enabling patch 'fix'",
    "livepatch: 'fix': initializing patching transition",
    "livepatch: 'fix': starting patching transition",
    "livepatch: 'fix': completing patching transition",
    "livepatch: 'fix': patching complete",
]
DISABLED = [
    "livepatch: 'fix': initializing unpatching transition",
    "livepatch: 'fix': starting unpatching transition",
    "livepatch: 'fix': completing unpatching transition",
    "livepatch: 'fix': unpatching complete",
]


def livepatch_log(m: Machine) -> list[str]:
    """The log from the first line of the livepatch core on."""
    lines = klog(m)
    first = next((i for i, line in enumerate(lines) if line.startswith("livepatch:")), len(lines))
    return lines[first:]


async def errno_of_write(m: Machine, path: str, text: str) -> str:
    """The name of the errno that a write is refused with."""
    with pytest.raises(OSError) as info:  # noqa: PT011 - the caller compares the errno
        await write(m, path, text)
    return errno.errorcode[info.value.errno or 0]


def sleeper(m: Machine, function: str, *, kthread: bool = True, state: str = "D") -> Task:
    """A task that sleeps inside a function of vmlinux or of a module."""
    found = m.kallsyms.on_each_match_symbol(function)
    for mod in m.modules.modules:
        found = found or m.kallsyms.module_on_each_symbol(mod, function)
    task = m.sched.spawn("sleeper", kthread=kthread, state=state)
    task.stack = [found[0] + 1]
    return task


def test_from_insmod_to_rmmod(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = await insmod(m, patch_spec("fix"))
            assert await read(m, f"{KLP}/fix/enabled") == "1"
            assert await read(m, f"{KLP}/fix/transition") == "0"
            assert await read(m, f"{KLP}/fix/replace") == "0"
            assert await read(m, f"{KLP}/fix/vmlinux/patched") == "1"
            assert m.kernfs.lookup(f"{KLP}/fix/vmlinux/cmdline_proc_show,1") is not None
            assert await read(m, "proc/cmdline") == "fix: this has been live patched"
            assert await read(m, "sys/module/fix/refcnt") == "1"
            await write(m, f"{KLP}/fix/enabled", "0\n")
            # the write is over, the worker is not: the seed's point
            assert m.kernfs.lookup(f"{KLP}/fix") is not None
            assert mod.refcnt == 1
            await gone(m, f"{KLP}/fix")
            await trio.testing.wait_all_tasks_blocked()
            assert mod.refcnt == 0
            assert m.livepatch.patches == []
            await m.delete_module("fix")
            assert m.kernfs.lookup("sys/module/fix") is None
            assert livepatch_log(m) == ENABLED + DISABLED

    run(main)


def test_freeing_inside_the_store_is_an_inversion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why commit 958ef1e39d24 has a workqueue: the same freeing, done at once, inverts klp_mutex and kn->active."""

    async def at_once(klp: Any, patch: KlpPatch) -> None:
        await core.klp_free_patch_start(klp, patch)
        await core.klp_free_patch_finish(klp, patch)

    async def main(free_at_once: bool) -> list[str]:
        async with machine() as m:
            await insmod(m, patch_spec("fix"))
            if free_at_once:
                monkeypatch.setattr(core, "klp_free_patch_async", at_once)
                with pytest.raises(LockOrderError) as info:
                    await write(m, f"{KLP}/fix/enabled", "0")
                assert "klp_mutex" in str(info.value)
                assert "kn->active#enabled" in str(info.value)
                assert info.value.site.startswith("kernfs_drain")
                assert "_enabled_store" in info.value.prior_site
            else:
                await write(m, f"{KLP}/fix/enabled", "0")
                await gone(m, f"{KLP}/fix")
            return m.lockdep.reports

    assert run(main, False) == []
    assert len(run(main, True)) == 1


@pytest.mark.parametrize("value", ["1", "y", "on", "2", "x", "10x", ""])
def test_values_that_enabled_refuses_or_ignores(run: Run, value: str) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, patch_spec("fix"))
            if value:
                assert await errno_of_write(m, f"{KLP}/fix/enabled", value) == "EINVAL"
            else:
                await write(m, f"{KLP}/fix/enabled", value)
            assert await read(m, f"{KLP}/fix/enabled") == "1"

    run(main)


@pytest.mark.parametrize(
    ("spec", "number", "line"),
    [
        (patch_spec("fix", "nosuch"), "EINVAL", "livepatch: symbol 'nosuch' not found in symbol table"),
        (
            patch_spec("fix", "twice"),
            "EINVAL",
            "livepatch: unresolvable ambiguity for symbol 'twice' in object '(null)'",
        ),
        (
            patch_spec("fix", "twice").replace('old_name = "twice"', 'old_name = "twice"\nsympos = 3'),
            "EINVAL",
            "livepatch: symbol position 3 for symbol 'twice' in object 'vmlinux' not found",
        ),
        (
            patch_spec("fix", "untraceable"),
            "EINVAL",
            "livepatch: failed to find location for function 'untraceable'",
        ),
        (
            patch_spec("fix", more='omit_modinfo = ["livepatch"]'),
            "EINVAL",
            "livepatch: module fix is not marked as a livepatch module",
        ),
    ],
)
def test_patches_that_are_refused(run: Run, spec: str, number: str, line: str) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await insmod_errno(m, spec) == number
            assert line in klog(m)
            assert m.kernfs.lookup(f"{KLP}/fix") is None
            assert m.modules.modules == {}
            assert m.livepatch.transition_patch is None
            assert m.ftrace.hooked() == []

    run(main)


def test_sympos_chooses_one_of_several(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, patch_spec("fix", "twice").replace('old_name = "twice"', 'old_name = "twice"\nsympos = 2'))
            assert m.ftrace.hooked() == [m.kallsyms.on_each_match_symbol("twice")[1]]
            assert m.kernfs.lookup(f"{KLP}/fix/vmlinux/twice,2") is not None

    run(main)


def test_null_pointers_are_refused(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = await insmod(m, 'name = "plain"\nkind = "module"\n')
            for patch in (None, KlpPatch(None, []), KlpPatch(mod, None), KlpPatch(mod, [KlpObject(None, None)])):
                with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared below
                    await m.livepatch.klp_enable_patch(patch)
                assert info.value.errno == errno.EINVAL
            mod.is_livepatch = True
            for func in (KlpFunc(""), KlpFunc("once"), KlpFunc("x" * 512, 1)):
                with pytest.raises(OSError) as info:  # noqa: PT011 - the errno is compared below
                    await m.livepatch.klp_enable_patch(KlpPatch(mod, [KlpObject(None, [func])]))
                assert info.value.errno == errno.EINVAL
            assert mod.refcnt == 0

    run(main)


def test_a_stall_of_ten_minutes_takes_milliseconds(run: Run) -> None:
    async def main() -> float:
        start = time.perf_counter()
        async with machine() as m:
            task = sleeper(m, "cmdline_proc_show")
            await insmod(m, patch_spec("fix"))
            assert await read(m, f"{KLP}/fix/transition") == "1"
            await trio.sleep(600)
            assert await read(m, f"{KLP}/fix/transition") == "1"
            assert task.patch_state == 0
            assert klog(m).count("livepatch: signaling remaining tasks") == 1
            tries = m.livepatch.klp.klp_signals_cnt
            assert 590 <= tries <= 610, "one try a second"
            m.sched.exit(task)
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            assert all(t.patch_state == -1 for t in m.sched.for_each_process_thread())
        return time.perf_counter() - start

    assert run(main) < 5


def test_who_is_switched_when(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            runs = m.sched.spawn("hog", state="R")
            runs.on_cpu = True
            unreliable = m.sched.spawn("unreliable")
            unreliable.reliable = False
            user = sleeper(m, "cmdline_proc_show", kthread=False, state="S")
            thread = sleeper(m, "cmdline_proc_show", state="S")
            free = m.sched.spawn("free")
            in_user = m.sched.spawn("user", state="R")
            in_user.on_cpu = in_user.in_user = True
            await insmod(m, patch_spec("fix"))
            assert [t.patch_state for t in (runs, unreliable, user, thread, free)] == [0, 0, 0, 0, 1]
            await trio.sleep(0.01)
            assert in_user.patch_state == 1, "the next tick interrupts it"
            await trio.sleep(14)
            assert user.patch_state == 0
            # the 16th try signals: that ends the sleep of the user task, a kernel thread is only woken
            await trio.sleep(2)
            assert user.patch_state == 1
            assert thread.patch_state == 0
            runs.on_cpu = False
            unreliable.reliable = True
            await trio.sleep(1.1)
            assert [t.patch_state for t in (runs, unreliable)] == [1, 1]
            thread.stack = []
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def test_debug_lines_of_the_attempts(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = sleeper(m, "cmdline_proc_show")
            other = m.sched.spawn("other")
            other.reliable = False
            await insmod(m, patch_spec("fix"))
            assert (
                f"livepatch: klp_try_switch_task: sleeper:{task.pid} is sleeping on function cmdline_proc_show"
            ) in klog(m)
            assert f"livepatch: klp_try_switch_task: other:{other.pid} has an unreliable stack" in klog(m)

    run(main)


def test_reversing_in_both_directions(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = sleeper(m, "cmdline_proc_show")
            await insmod(m, patch_spec("fix"))
            await write(m, f"{KLP}/fix/enabled", "0")
            assert await read(m, f"{KLP}/fix/enabled") == "0"
            assert await read(m, f"{KLP}/fix/transition") == "1"
            await write(m, f"{KLP}/fix/enabled", "1")
            assert await read(m, f"{KLP}/fix/enabled") == "1"
            m.sched.exit(task)
            await trio.sleep(2.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            lines = [line for line in livepatch_log(m) if "klp_try" not in line]
            assert lines == [
                *ENABLED[:3],
                "livepatch: 'fix': reversing transition from patching to unpatching",
                "livepatch: 'fix': starting unpatching transition",
                "livepatch: 'fix': reversing transition from unpatching to patching",
                "livepatch: 'fix': starting patching transition",
                *ENABLED[3:],
            ]

    run(main)


def test_another_patch_has_to_wait(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, patch_spec("first"))
            sleeper(m, "meminfo_proc_show")
            await insmod(m, patch_spec("second", "meminfo_proc_show"))
            assert await errno_of_write(m, f"{KLP}/first/enabled", "0") == "EBUSY"
            assert await insmod_errno(m, patch_spec("third")) == "EBUSY"
            assert m.kernfs.lookup(f"{KLP}/third") is None
            assert m.modules.find_module("third") is None
            assert await errno_of_write(m, f"{KLP}/first/force", "1") == "EINVAL"

    run(main)


def test_forcing_completes_at_the_next_retry_and_pins_what_is_removed(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            sleeper(m, "cmdline_proc_show")
            mod = await insmod(m, patch_spec("fix"))
            assert await errno_of_write(m, f"{KLP}/fix/force", "x") == "EINVAL"
            await write(m, f"{KLP}/fix/force", "0")
            assert await read(m, f"{KLP}/fix/transition") == "1"
            await write(m, f"{KLP}/fix/force", "1")
            assert await read(m, f"{KLP}/fix/transition") == "1"
            await trio.sleep(1.1)
            assert await read(m, f"{KLP}/fix/transition") == "0"
            # now a task inside the new code, and unpatching by force: the module is pinned for ever
            task = m.sched.spawn("inside", kthread=True, state="D")
            task.stack = [m.livepatch.patches[0].obj_list[0].func_list[0].new_func + 1]
            await write(m, f"{KLP}/fix/enabled", "0")
            await write(m, f"{KLP}/fix/force", "1")
            await gone(m, f"{KLP}/fix")
            await trio.sleep(5)
            assert mod.refcnt == 1
            with pytest.raises(OSError, match="in use") as info:
                await m.delete_module("fix")
            assert info.value.errno == errno.EWOULDBLOCK

    run(main)


def test_atomic_replace_with_nops_that_come_and_go(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            old = await insmod(m, patch_spec("old"))
            task = sleeper(m, "meminfo_proc_show")
            await insmod(m, patch_spec("new", "meminfo_proc_show", more="replace = true"))
            nop = f"{KLP}/new/vmlinux/cmdline_proc_show,1"
            assert await read(m, f"{KLP}/new/transition") == "1"
            assert m.kernfs.lookup(nop) is not None
            addr = m.kallsyms.on_each_match_symbol("cmdline_proc_show")[0]
            assert m.livepatch.implementation(addr, task) != addr, "not switched: still the old patch's function"
            assert m.livepatch.implementation(addr, None) == addr, "switched: the nop leads to the original"
            m.sched.exit(task)
            await gone(m, f"{KLP}/old")
            await trio.sleep(1)
            assert m.kernfs.lookup(nop) is None
            assert old.refcnt == 0
            assert [p.name for p in m.livepatch.patches] == ["new"]
            assert await read(m, f"{KLP}/new/replace") == "1"
            assert addr not in m.ftrace.hooked()

    run(main)


def test_a_forced_replace_pins_the_replaced(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            old = await insmod(m, patch_spec("old"))
            sleeper(m, "meminfo_proc_show")
            new = await insmod(m, patch_spec("new", "meminfo_proc_show", more="replace = true"))
            await write(m, f"{KLP}/new/force", "1")
            await gone(m, f"{KLP}/old")
            await trio.sleep(2)
            assert old.refcnt == 1
            await write(m, f"{KLP}/new/enabled", "0")
            await gone(m, f"{KLP}/new")
            await trio.sleep(2)
            assert new.refcnt == 0

    run(main)


def test_the_func_stack_and_disabling_out_of_order(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            for name in ("a", "b", "c"):
                await insmod(m, patch_spec(name))
            addr = m.kallsyms.on_each_match_symbol("cmdline_proc_show")[0]
            ops = m.livepatch.klp.klp_ops[addr]
            assert [f.obj.patch.name for f in ops.func_stack if f.obj and f.obj.patch] == ["c", "b", "a"]
            await write(m, f"{KLP}/b/enabled", "0")
            await gone(m, f"{KLP}/b")
            assert await read(m, "proc/cmdline") == "c: this has been live patched"
            await write(m, f"{KLP}/c/enabled", "0")
            await gone(m, f"{KLP}/c")
            assert await read(m, "proc/cmdline") == "a: this has been live patched"

    run(main)


def test_the_stack_order_is_enforced_in_the_seed(run: Run) -> None:
    async def main() -> None:
        async with machine("seed") as m:
            await insmod(m, patch_spec("a"))
            await insmod(m, patch_spec("b"))
            names = {node.name for node in m.kernfs.lookup(f"{KLP}/a").children()}  # type: ignore[union-attr]
            assert names == {"enabled", "transition", "signal", "force", "vmlinux"}
            assert await errno_of_write(m, f"{KLP}/a/enabled", "0") == "EBUSY"
            assert await errno_of_write(m, f"{KLP}/a/signal", "1") == "EINVAL"
            await write(m, f"{KLP}/b/enabled", "0")
            await gone(m, f"{KLP}/b")
            task = m.sched.spawn("inside", state="S")
            task.stack = [m.livepatch.patches[0].obj_list[0].func_list[0].new_func + 1]
            await write(m, f"{KLP}/a/enabled", "0")
            await trio.sleep(60)
            assert await read(m, f"{KLP}/a/transition") == "1", "nobody signals by itself there"
            await write(m, f"{KLP}/a/signal", "1")
            assert "livepatch: signaling remaining tasks" in klog(m)
            await gone(m, f"{KLP}/a")

    run(main)


def test_ftrace_enabled(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await write(m, "proc/sys/kernel/ftrace_enabled", "0\n")
            assert await insmod_errno(m, patch_spec("fix")) == "EBUSY"
            assert livepatch_log(m) == [
                *ENABLED[:2],
                "livepatch: failed to register ftrace handler for function 'cmdline_proc_show' (-16)",
                "livepatch: failed to patch object 'vmlinux'",
                "livepatch: failed to enable patch 'fix'",
                "livepatch: 'fix': canceling patching transition, going to unpatch",
                "livepatch: 'fix': completing unpatching transition",
                "livepatch: 'fix': unpatching complete",
            ]
            await write(m, "proc/sys/kernel/ftrace_enabled", "1\n")
            await insmod(m, patch_spec("fix"))
            assert await errno_of_write(m, "proc/sys/kernel/ftrace_enabled", "0") == "EBUSY"
            assert await read(m, "proc/sys/kernel/ftrace_enabled") == "1"

    run(main)


CALLBACKS = """
[[params]]
name = "pre_patch_ret"
type = "int"
perm = "0644"
[[objects]]
name = "{object}"
[objects.callbacks.pre_patch]
log = "{{callback}}: {{info}}"
ret = "$pre_patch_ret"
[objects.callbacks.post_patch]
log = "{{callback}}: {{info}}"
[objects.callbacks.pre_unpatch]
log = "{{callback}}: {{info}}"
[objects.callbacks.post_unpatch]
log = "{{callback}}: {{info}}"
"""


def callbacks(name: str, *objects: str) -> str:
    """The spec of a livepatch with all callbacks, and no functions, for each object."""
    head, _, rest = CALLBACKS.partition("[[objects]]")
    return f'name = "{name}"\n' + head + "".join("[[objects]]" + rest.format(object=o) for o in objects)


TARGET = 'name = "target"\nkind = "module"\n[[functions]]\nname = "work"\n'
COMING = "target -> [MODULE_STATE_COMING] Full formed, running module_init"
LIVE = "target -> [MODULE_STATE_LIVE] Normal state"
GOING = "target -> [MODULE_STATE_GOING] Going away"


def test_callbacks_follow_the_life_of_their_objects(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, callbacks("cb", "vmlinux", "target"))
            await insmod(m, TARGET)
            await m.delete_module("target")
            await insmod(m, TARGET)
            await write(m, f"{KLP}/cb/enabled", "0")
            await gone(m, f"{KLP}/cb")
            lines = [line.removeprefix("cb: ") for line in klog(m) if line.startswith("cb: ") or "module '" in line]
            assert lines == [
                "pre_patch_callback: vmlinux",
                "post_patch_callback: vmlinux",
                "livepatch: applying patch 'cb' to loading module 'target'",
                f"pre_patch_callback: {COMING}",
                f"post_patch_callback: {COMING}",
                f"pre_unpatch_callback: {GOING}",
                "livepatch: reverting patch 'cb' on unloading module 'target'",
                f"post_unpatch_callback: {GOING}",
                "livepatch: applying patch 'cb' to loading module 'target'",
                f"pre_patch_callback: {COMING}",
                f"post_patch_callback: {COMING}",
                "pre_unpatch_callback: vmlinux",
                f"pre_unpatch_callback: {LIVE}",
                "post_unpatch_callback: vmlinux",
                f"post_unpatch_callback: {LIVE}",
            ]

    run(main)


def test_a_pre_patch_callback_that_fails_refuses_the_patch(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await insmod_errno(m, callbacks("cb", "vmlinux"), "pre_patch_ret=-19") == "ENODEV"
            assert [line for line in livepatch_log(m) if "cb" in line or "callback" in line][2:] == [
                "cb: pre_patch_callback: vmlinux",
                "livepatch: pre-patch callback failed for object 'vmlinux'",
                "livepatch: failed to enable patch 'cb'",
                "livepatch: 'cb': canceling patching transition, going to unpatch",
                "livepatch: 'cb': completing unpatching transition",
                "livepatch: 'cb': unpatching complete",
            ]

    run(main)


def test_a_pre_patch_callback_that_fails_refuses_the_coming_module(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, callbacks("good", "target"))
            await insmod(m, callbacks("bad", "target"))
            await write(m, "sys/module/bad/parameters/pre_patch_ret", "-19\n")
            assert await insmod_errno(m, TARGET) == "ENODEV"
            lines = klog(m)
            start = lines.index("livepatch: applying patch 'good' to loading module 'target'")
            assert lines[start:] == [
                "livepatch: applying patch 'good' to loading module 'target'",
                f"good: pre_patch_callback: {COMING}",
                f"good: post_patch_callback: {COMING}",
                "livepatch: applying patch 'bad' to loading module 'target'",
                f"bad: pre_patch_callback: {COMING}",
                "livepatch: pre-patch callback failed for object 'target'",
                "livepatch: patch 'bad' failed for module 'target', refusing to load module 'target'",
                f"good: pre_unpatch_callback: {COMING}",
                "livepatch: reverting patch 'good' on unloading module 'target'",
                f"good: post_unpatch_callback: {COMING}",
            ]
            assert m.kernfs.lookup("sys/module/target") is None

    run(main)


def test_a_module_called_vmlinux_is_refused(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await insmod_errno(m, 'name = "vmlinux"\nkind = "module"\n') == "EINVAL"
            assert "livepatch: vmlinux.ko: invalid module name" in klog(m)

    run(main)


def test_a_worker_inside_the_function_stalls_its_patch(run: Run) -> None:
    spec = """
name = "target"
kind = "module"
[[params]]
name = "block"
type = "bool"
perm = "0644"
[[functions]]
name = "work"
while_param = "block"
[[works]]
function = "work"
wait = "settled"
"""

    async def main() -> None:
        async with machine() as m:
            await insmod(m, spec, "block=Y")
            await insmod(m, patch_spec("fix", "work", object="target"))
            await trio.sleep(5)
            assert await read(m, f"{KLP}/fix/transition") == "1"
            (stuck,) = [t for t in m.sched.for_each_process_thread() if t.patch_state == 0]
            assert stuck.comm.startswith("kworker/")
            assert stuck.state == "D"
            assert "work+" in (await m.kernfs.read_file(f"proc/{stuck.pid}/stack")).decode()
            assert await read(m, f"proc/{stuck.pid}/patch_state") == "0"
            await write(m, "sys/module/target/parameters/block", "N")
            await trio.sleep(2)
            assert await read(m, f"{KLP}/fix/transition") == "0"

    run(main)


def state_spec(name: str, version: int | None, *, replace: bool = True) -> str:
    """The spec of a livepatch that carries one system state."""
    head = f'name = "{name}"\nreplace = {"true" if replace else "false"}\n'
    if version is not None:
        head += f"[[states]]\nid = 1\nversion = {version}\n"
    return head + '[[objects]]\n[[objects.functions]]\nold_name = "once"\n'


@pytest.mark.parametrize(
    ("version", "replace", "compatible"),
    [(2, True, True), (3, True, True), (1, True, False), (None, True, False), (None, False, True)],
)
def test_system_states(run: Run, version: int | None, replace: bool, compatible: bool) -> None:
    async def main() -> None:
        async with machine() as m:
            await insmod(m, state_spec("old", 2))
            if compatible:
                await insmod(m, state_spec("new", version, replace=replace))
                return
            assert await insmod_errno(m, state_spec("new", version, replace=replace)) == "EINVAL"
            assert "livepatch: Livepatch patch (new) is not compatible with the already installed livepatches." in klog(
                m
            )

    run(main)


def test_shadow_variables(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            lp = m.livepatch
            seen: list[object] = []

            async def ctor(obj: object, data: Any, ctor_data: object) -> int:
                data[0] = 7
                return -22 if ctor_data == "fail" else 0

            async def dtor(obj: object, data: Any) -> None:
                seen.append((obj, bytes(data)))

            assert lp.klp_shadow_get("a", 1) is None
            first = await lp.klp_shadow_alloc("a", 1, 2, ctor)
            assert first == bytearray([7, 0])
            assert lp.klp_shadow_get("a", 1) is first
            assert await lp.klp_shadow_alloc("a", 1, 2) is None, "it exists: a warning, and nothing"
            assert any("Duplicate shadow variable <'a', 1>" in line for line in klog(m))
            assert await lp.klp_shadow_get_or_alloc("a", 1, 2) is first
            assert await lp.klp_shadow_get_or_alloc("b", 1, 1) == bytearray(1)
            assert await lp.klp_shadow_alloc("c", 1, 1, ctor, "fail") is None
            assert "livepatch: Failed to construct shadow variable <'c', 1> (-22)" in klog(m)
            await lp.klp_shadow_alloc("a", 2, 1)
            await lp.klp_shadow_free("a", 2, dtor)
            await lp.klp_shadow_free("nobody", 2, dtor)
            await lp.klp_shadow_free_all(1, dtor)
            assert seen == [("a", b"\0"), ("a", b"\x07\0"), ("b", b"\0")]
            assert m.livepatch.klp.klp_shadow_hash == {}

    run(main)


def test_stack_order_attribute(run: Run) -> None:
    async def main() -> None:
        async with machine("6.14") as m:
            for name in ("a", "b"):
                await insmod(m, patch_spec(name))
            assert await read(m, f"{KLP}/a/stack_order") == "1"
            assert await read(m, f"{KLP}/b/stack_order") == "2"
            await write(m, f"{KLP}/a/enabled", "0")
            await gone(m, f"{KLP}/a")
            assert await read(m, f"{KLP}/b/stack_order") == "1"

    run(main)


def test_many_patches_of_many_functions(run: Run) -> None:
    functions = [f"f{i}" for i in range(20)]
    target = 'name = "target"\nkind = "module"\n' + "".join(f'[[functions]]\nname = "{f}"\n' for f in functions)
    body = '[[objects]]\nname = "target"\n' + "".join(f'[[objects.functions]]\nold_name = "{f}"\n' for f in functions)

    async def main() -> None:
        async with machine() as m:
            await insmod(m, target)
            for n in range(50):
                await insmod(m, f'name = "p{n}"\n{body}')
            assert all(len(ops.func_stack) == 50 for ops in m.livepatch.klp.klp_ops.values())
            for n in range(50):
                await write(m, f"{KLP}/p{n}/enabled", "0")
                await gone(m, f"{KLP}/p{n}")
            await trio.sleep(1)
            for n in range(50):
                await m.delete_module(f"p{n}")
            assert m.livepatch.klp.klp_ops == {}
            assert m.kernfs.lookup(KLP).children() == []  # type: ignore[union-attr]

    run(main)
