"""``python -m bench [--json FILE] [NAME...]``: run all benchmarks, or those named.

Prints a table on standard output and progress on standard error. Exit code 1 when a benchmark could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

KLPFS = str(Path(sys.executable).parent / "klpfs")
HERE = Path(__file__).resolve().parent


@dataclass
class Result:
    """One measured value, in *unit*; *base* is what it is compared with, *ratio* the quotient."""

    name: str
    value: float
    unit: str
    base: str = ""
    ratio: float | None = None
    target: str = ""


def klpfs(*args: str, env: dict[str, str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a klpfs command to its end."""
    return subprocess.run([KLPFS, *args], env=env, text=True, capture_output=True, check=check)


@contextmanager
def scratch() -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory and an environment whose mounts nobody else sees."""
    work = Path(tempfile.mkdtemp(prefix="klpfs-bench-"))
    (work / "run").mkdir(mode=0o700)
    (work / "m").mkdir()
    env = os.environ | {"XDG_RUNTIME_DIR": str(work / "run")}
    try:
        yield work, env
    finally:
        klpfs("umount", "--lazy", str(work / "m"), env=env, check=False)
        shutil.rmtree(work, ignore_errors=True)


def per_read(path: str, count: int = 3000) -> float:
    """Microseconds for open, read, read to the end, close; the best of five rounds."""

    def once() -> None:
        fd = os.open(path, os.O_RDONLY)
        while os.read(fd, 4096):
            pass
        os.close(fd)

    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count // 5):
            once()
        rounds.append((time.perf_counter() - start) / (count // 5) * 1e6)
    return min(rounds)


def elapsed(fn: Callable[[], object], rounds: int = 5) -> float:
    """Milliseconds, the best of some rounds: what is above it is the machine's noise."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


SPEC = 'name = "{name}"\n[[objects]]\n[[objects.functions]]\nold_name = "cmdline_proc_show"\noutput = "x"\n'


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and the servers that it starts, on one core: then a ratio compares work and not schedulers."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def bench_read() -> Iterator[Result]:
    """Reading one attribute through each driver, beside tmpfs and a C libfuse server, all on one core."""
    with one_core():
        yield from _reads()


def _reads() -> Iterator[Result]:
    shm = Path("/dev/shm/klpfs-bench")
    shm.write_text("1\n")
    tmpfs = per_read(str(shm))
    shm.unlink()
    yield Result("read, tmpfs", tmpfs, "us")
    base, name = tmpfs, "tmpfs"
    with scratch() as (work, _):
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True
        )
        binary = work / "one_file_fuse"
        source = HERE / "one_file_fuse.c"
        subprocess.run(["gcc", "-O2", "-o", binary, source, *flags.stdout.split()], check=True)
        server = subprocess.Popen([binary, "-f", "-s", work / "m"])
        try:
            while not (work / "m/enabled").exists():
                time.sleep(0.01)
            base, name = per_read(str(work / "m/enabled")), "C libfuse"
        finally:
            subprocess.run(["fusermount3", "-u", work / "m"], check=False)
            server.wait()
    yield Result("read, C libfuse", base, "us", "tmpfs", base / tmpfs)
    for driver, target in (("pyfuse3", "ratio 1.3"), ("fusepy", "")):
        with scratch() as (work, env):
            spec = work / "a.toml"
            spec.write_text(SPEC.format(name="a"))
            klpfs("mkmod", str(spec), "-o", str(work / "a.ko"), env=env)
            klpfs("mount", str(work / "m"), "--driver", driver, env=env)
            klpfs("insmod", str(work / "a.ko"), env=env)
            value = per_read(str(work / "m/sys/kernel/livepatch/a/enabled"))
            yield Result(f"read, klpfs {driver}", value, "us", name, value / base, target)


def bench_start() -> Iterator[Result]:
    """From ``klpfs mount`` to the first read, beside starting Python."""
    python = elapsed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))

    def mount() -> None:
        with scratch() as (work, env):
            start = time.perf_counter()
            klpfs("mount", str(work / "m"), env=env)
            (work / "m/proc/modules").read_bytes()
            times.append((time.perf_counter() - start) * 1e3)

    times: list[float] = []
    for _ in range(5):
        mount()
    value = min(times)
    yield Result("mount to first read", value, "ms", "python -c pass", value / python, "200 ms")


def bench_run() -> Iterator[Result]:
    """``klpfs run -- true`` beside ``unshare -m true``."""
    unshare = elapsed(lambda: subprocess.run(["unshare", "-m", "true"], check=True))
    value = elapsed(lambda: subprocess.run([KLPFS, "run", "--", "true"], check=True))
    yield Result("run -- true", value, "ms", "unshare -m true", value / unshare, "300 ms")


def bench_pass() -> Iterator[Result]:
    """One pass of a transition over 100,000 tasks and 1,000 patched functions, beside a bare loop over the tasks."""
    import trio
    import trio.testing

    from klpfs.kernel.kallsyms import DictTable
    from klpfs.livepatch import KlpFunc, KlpObject, KlpPatch
    from klpfs.livepatch.transition import StackCheck
    from klpfs.machine import open_machine

    async def main() -> tuple[float, float]:
        names = [f"function_{i}" for i in range(2000)]
        async with open_machine(table=DictTable(names)) as machine:
            klp, sched = machine.livepatch.klp, machine.sched
            addresses = [machine.kallsyms.on_each_match_symbol(name)[0] for name in names]
            tasks = [sched.spawn("task", state="S") for _ in range(100_000)]
            for i, task in enumerate(tasks):
                task.stack = [addresses[1000 + (i + j) % 1000] + 8 for j in range(8)]
            funcs = [KlpFunc(names[i], addresses[i + 1000], old_func=addresses[i]) for i in range(1000)]
            for func in funcs:
                func.old_size, func.new_size = 64, 64
            obj = KlpObject(None, funcs)
            obj.func_list, obj.patched = funcs, True
            patch = KlpPatch(None, [obj])
            patch.obj_list = [obj]
            klp.klp_transition_patch, klp.klp_target_state = patch, 1
            from klpfs.kernel.ftrace import FtraceOps
            from klpfs.livepatch.types import KlpOps

            for func in funcs:
                klp.klp_ops[func.old_func] = KlpOps(FtraceOps(lambda ip, task: ip), [func])
            start = time.perf_counter()
            for task in sched.for_each_process_thread():
                assert task is not None
            loop = time.perf_counter() - start
            start = time.perf_counter()
            check = StackCheck(klp)
            hits = sum(check.find(task.trace()) is not None for task in sched.for_each_process_thread())
            assert hits == 0
            one = time.perf_counter() - start
            klp.klp_transition_patch, klp.klp_target_state = None, -1
            return one * 1e3, loop * 1e3

    value, loop = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    yield Result(
        "transition pass, 100,000 tasks of 8 frames", value, "ms", "loop over the tasks", value / loop, "150 ms"
    )


def bench_many() -> Iterator[Result]:
    """1,000 synthetic patches of 100 functions each on a mount: load, find, unload; memory of the daemon."""
    from klpfs.control import protocol, runtime
    from klpfs.control.client import Client
    from klpfs.elf.writer import write_module
    from klpfs.spec import parse_toml

    functions = [f"function_{i}" for i in range(100)]
    target = 'name = "target"\nkind = "module"\n' + "".join(f'[[functions]]\nname = "{f}"\n' for f in functions)
    body = "".join(f'[[objects.functions]]\nold_name = "{f}"\n' for f in functions)
    modules = [write_module(parse_toml(target))]
    modules += [write_module(parse_toml(f'name = "p{n}"\n[[objects]]\nname = "target"\n{body}')) for n in range(1000)]
    with scratch() as (work, env):
        klpfs("mount", str(work / "m"), env=env)
        os.environ["XDG_RUNTIME_DIR"] = env["XDG_RUNTIME_DIR"]
        (entry,) = runtime.running()
        with Client(entry) as client:
            start = time.perf_counter()
            for data in modules:
                client.call(protocol.Insmod(data=data), protocol.Loaded)
            load = time.perf_counter() - start
            start = time.perf_counter()
            find = subprocess.run(["find", work / "m/sys/kernel/livepatch"], capture_output=True, check=True)
            listed = time.perf_counter() - start
            assert find.stdout.count(b"function_") == 100_000
            start = time.perf_counter()
            subprocess.run(["find", work / "m/sys/kernel/livepatch"], stdout=subprocess.DEVNULL, check=True)
            again = time.perf_counter() - start
            status = Path(f"/proc/{entry.pid}/status").read_text()
            rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
            start = time.perf_counter()
            klp = work / "m/sys/kernel/livepatch"
            for n in range(1000):
                (klp / f"p{n}/enabled").write_text("0")
            for n in range(1000):
                while (klp / f"p{n}").exists() or (work / f"m/sys/module/p{n}/refcnt").read_text() != "0\n":
                    time.sleep(0.01)
                client.call(protocol.Rmmod(name=f"p{n}"), type(None))
            unload = time.perf_counter() - start
    per = load / 1001
    yield Result("1,000 patches of 100 functions: load", load, "s", "one of them", load / per, "10 s")
    yield Result("1,000 patches of 100 functions: find", listed, "s", "second find", listed / again, "5 s")
    yield Result("1,000 patches of 100 functions: unload", unload, "s", "load", unload / load)
    yield Result("1,000 patches of 100 functions: daemon", rss, "MB", target="300 MB")


def bench_load() -> Iterator[Result]:
    """Inserting each of the kernel's own sample and test modules, built from Debian's packages, executed."""
    from klpfs.control import protocol, runtime
    from klpfs.control.client import Client, RequestError

    builder = HERE.parent / "tools/conformance/build-modules"
    where = subprocess.run([builder], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    times: list[tuple[float, str]] = []
    for path in sorted(Path(where).glob("*.ko")):
        with scratch() as (work, env):
            klpfs("mount", str(work / "m"), env=env)
            os.environ["XDG_RUNTIME_DIR"] = env["XDG_RUNTIME_DIR"]
            (entry,) = runtime.running()
            time.sleep(1)  # the engine starts in the background
            data = path.read_bytes()
            with Client(entry) as client:
                start = time.perf_counter()
                try:
                    client.call(protocol.Insmod(data=data), protocol.Loaded)
                except RequestError as error:
                    print(f"load: {path.name}: {error}", file=sys.stderr)
                    continue
                times.append(((time.perf_counter() - start) * 1e3, path.stem))
                start = time.perf_counter()
                client.call(protocol.Ping(), protocol.Pong)
                ping = (time.perf_counter() - start) * 1e3
    slowest, name = max(times)
    median = statistics.median(t for t, _ in times)
    yield Result(f"insmod, median of {len(times)} modules", median, "ms", "a ping", median / ping, "50 ms")
    yield Result(f"insmod, slowest ({name})", slowest, "ms", "a ping", slowest / ping, "50 ms")


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {
    "read": bench_read,
    "start": bench_start,
    "run": bench_run,
    "pass": bench_pass,
    "many": bench_many,
    "load": bench_load,
}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)} (default: all)")
    args = parser.parse_args()
    unknown = set(args.names) - set(BENCHES)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; known are {', '.join(BENCHES)}")
    from klpfs.cli.common import print_table

    results: list[Result] = []
    failed = False
    for name in args.names or BENCHES:
        print(f"measuring {name} ...", file=sys.stderr)
        try:
            results += BENCHES[name]()
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    rows = [
        (r.name, f"{r.value:.1f} {r.unit}", r.base, "" if r.ratio is None else f"{r.ratio:.2f}", r.target)
        for r in results
    ]
    print_table(("WHAT", "VALUE", "BESIDE", "RATIO", "TARGET"), rows, right=(1, 3))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
