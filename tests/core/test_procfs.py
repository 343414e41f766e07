"""What /proc shows of tasks, modules, symbols and sysctls (fs/proc/array.c, fs/proc/base.c, kernel/sysctl.c)."""

from __future__ import annotations

import pytest
from conftest import KLP, insmod, machine, patch_spec, read, write
from core_support import Run, address, refused, sleeper

from klpfs.kernfs import Caller

USER = Caller(1234, 1000, 1000)


def test_a_task(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = sleeper(m, address(m, "once"), "victim")
            where = f"proc/{task.pid}"
            assert await read(m, f"{where}/comm") == "victim"
            assert await read(m, f"{where}/stack") == "[<0>] once+0x1/0x40"
            assert await read(m, f"{where}/wchan") == "once"
            assert await read(m, f"{where}/patch_state") == "-1"
            stat = (await read(m, f"{where}/stat")).split()
            assert len(stat) == 52
            assert stat[:4] == [str(task.pid), "(victim)", "D", "2"]
            status = dict(line.split(":\t") for line in (await read(m, f"{where}/status")).splitlines())
            assert (status["Name"], status["State"], status["Kthread"]) == ("victim", "D (disk sleep)", "1")
            assert (status["Pid"], status["PPid"], status["Threads"]) == (str(task.pid), "2", "1")
            modes = {name: m.kernfs.lookup(f"{where}/{name}") for name in ("patch_state", "stack")}
            assert {name: node.mode for name, node in modes.items() if node} == {"patch_state": 0o400, "stack": 0o400}
            task.on_cpu = True
            assert await read(m, f"{where}/stack") == "", "nothing while it runs"

    run(main)


def test_the_state_during_a_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            stuck = sleeper(m, address(m, "once"))
            free = m.sched.spawn("free")
            await insmod(m, patch_spec("fix", "once"))
            assert [await read(m, f"proc/{t.pid}/patch_state") for t in (stuck, free)] == ["0", "1"]
            await write(m, f"{KLP}/fix/force", "1")
            await m.livepatch.wait_transition()
            assert [await read(m, f"proc/{t.pid}/patch_state") for t in (stuck, free)] == ["-1", "-1"]

    run(main)


@pytest.mark.parametrize("name", ["02", "00", "x", "2x", "-2", "+2", "", "٢", "99999999999999999999"])
def test_names_that_are_no_task(run: Run, name: str) -> None:
    async def main() -> None:
        async with machine() as m:
            assert m.kernfs.lookup("proc/2/comm") is not None
            assert m.procfs.tasks.lookup(name) is None

    run(main)


def test_threads_are_found_and_not_listed(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            leader = m.sched.spawn("leader")
            thread = m.sched.spawn("thread", tgid=leader.pid)
            proc = m.kernfs.lookup("proc")
            assert proc is not None
            names = {name for name, _ in proc.entries()}
            assert str(leader.pid) in names
            assert str(thread.pid) not in names
            assert await read(m, f"proc/{thread.pid}/comm") == "thread"
            assert await read(m, f"proc/{leader.pid}/task/{thread.pid}/comm") == "thread"
            assert m.kernfs.lookup(f"proc/{leader.pid}/task/2") is None
            assert m.kernfs.lookup(f"proc/{leader.pid}/task/0{thread.pid}") is None
            assert "Threads:\t2" in await read(m, f"proc/{leader.pid}/status")
            m.sched.exit(thread)
            assert m.kernfs.lookup(f"proc/{thread.pid}") is None

    run(main)


def test_a_task_can_be_renamed(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            task = m.sched.spawn("before")
            await write(m, f"proc/{task.pid}/comm", "a-name-that-is-too-long")
            assert await read(m, f"proc/{task.pid}/comm") == "a-name-that-is-"

    run(main)


def test_addresses_are_for_root(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            mod = await insmod(m, patch_spec("fix", "once"))
            for path in ("proc/modules", "proc/kallsyms"):
                shown = (await m.kernfs.read_file(path)).decode()
                hidden = (await m.kernfs.read_file(path, USER)).decode()
                assert len(shown.splitlines()) == len(hidden.splitlines())
                assert "0" * 16 in hidden
                assert f"{mod.base:x}" not in hidden
            lines = (await read(m, "proc/kallsyms")).splitlines()
            assert f"{address(m, 'once'):016x} T once" in lines
            assert any(line.endswith(" livepatch_once\t[fix]") for line in lines)

    run(main)


def test_a_replaced_file_of_proc(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            m.procfs.host_file = lambda name: f"original {name}\n".encode()
            assert await read(m, "proc/cmdline") == "original cmdline"
            await insmod(m, patch_spec("fix"))
            assert await read(m, "proc/cmdline") == "fix: this has been live patched"
            assert await read(m, "proc/meminfo") == "original meminfo"
            await write(m, f"{KLP}/fix/enabled", "0")
            assert await read(m, "proc/cmdline") == "original cmdline"

    run(main)


def test_who_reads_decides_during_a_transition(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            m.procfs.host_file = lambda name: b"original\n"
            m.procfs.task_of = lambda caller: m.sched.tasks.get(caller.pid)
            stuck = sleeper(m, address(m, "cmdline_proc_show"))
            free = m.sched.spawn("free")
            await insmod(m, patch_spec("fix"))
            seen = [await m.kernfs.read_file("proc/cmdline", Caller(t.pid, 0, 0)) for t in (stuck, free)]
            assert seen == [b"original\n", b"fix: this has been live patched\n"]

    run(main)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("4096\n", 4096), ("0x10", 16), ("010", 8), ("0", 0), (f"{1 << 40}", 0)]
)
def test_taints_are_added_by_their_bits(run: Run, text: str, value: int) -> None:
    async def main() -> None:
        async with machine() as m:
            await write(m, "proc/sys/kernel/tainted", text)
            assert await read(m, "proc/sys/kernel/tainted") == str(value)
            await write(m, "proc/sys/kernel/tainted", "2")
            assert await read(m, "proc/sys/kernel/tainted") == str(value | 2), "none is ever taken back"

    run(main)


@pytest.mark.parametrize("text", ["x", "1x", " ", "\n", "0x"])
@pytest.mark.parametrize("name", ["tainted", "ftrace_enabled"])
def test_numbers_that_sysctls_refuse(run: Run, name: str, text: str) -> None:
    async def main() -> None:
        async with machine() as m:
            before = await read(m, f"proc/sys/kernel/{name}")
            assert await refused(write, m, f"proc/sys/kernel/{name}", text) == "EINVAL"
            assert await read(m, f"proc/sys/kernel/{name}") == before

    run(main)


def test_names_of_the_kernel(run: Run) -> None:
    async def main() -> None:
        async with machine() as m:
            assert await read(m, "proc/sys/kernel/osrelease") == m.profile.release
            assert await read(m, "proc/sys/kernel/version") == m.profile.kernel_version

    run(main)
