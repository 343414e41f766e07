"""Start and end of the daemon: whatever happens, the caller knows, and nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import KLPFS, Cli, Mounted, exists, is_mounted, patch, wait_for


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def mounted(cli: Cli) -> Iterator[Mounted]:
    with cli.mounted() as m:
        yield m


def ended(m: Mounted) -> None:
    """Assert that nothing of the mount is left, its log included when there is nothing in it."""
    wait_for(lambda: not exists(m.pid), "end of the daemon")
    assert not is_mounted(m.path)
    assert os.listdir(m.path) == []
    left = [path.name for path in m.cli.runtime.iterdir() if path.suffix != ".log"]
    assert left == []


def test_mount_returns_when_the_mount_can_be_read(cli: Cli) -> None:
    for name in ("a", "b", "c"):
        with cli.mounted(name=name) as m:
            assert sorted(os.listdir(m.path)) == ["dev", "proc", "sys"]
            assert os.listdir(m.klp) == []


def test_the_daemon_raises_its_limits(cli: Cli) -> None:
    limits = {which: resource.getrlimit(which) for which in (resource.RLIMIT_CPU, resource.RLIMIT_AS)}
    try:
        for which, (_, hard) in limits.items():
            resource.setrlimit(which, (1 << 32, hard))  # inherited by the command, and so by the daemon
        with cli.mounted() as m:
            for which, (_, hard) in limits.items():
                assert resource.prlimit(m.pid, which)[0] == hard
    finally:
        for which, limit in limits.items():
            resource.setrlimit(which, limit)


def test_the_daemon_lets_go_of_the_caller(cli: Cli) -> None:
    (cli.dir / "k").mkdir()
    begin = time.monotonic()
    # the command substitution ends only when nobody holds its pipe any more
    done = subprocess.run(
        ["bash", "-c", f'out=$({KLPFS} mount k 2>&1); echo "<$out>"; exec {KLPFS} umount k'],
        cwd=cli.dir,
        env=cli.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "<>\n", "")
    assert time.monotonic() - begin < 20


def test_umount(mounted: Mounted) -> None:
    assert mounted.cli.ok("umount", mounted.path) == ""
    ended(mounted)


def test_umount_by_a_relative_path_and_a_link(cli: Cli) -> None:
    with cli.mounted() as m:
        cli.ok("umount", "./k/")
        ended(m)
    (cli.dir / "link").symlink_to("k")
    with cli.mounted() as m:
        cli.ok("umount", cli.dir / "link")
        ended(m)


@pytest.mark.parametrize("program", [["umount"], ["fusermount3", "-u"]])
def test_unmounting_from_outside_ends_the_daemon(mounted: Mounted, program: list[str]) -> None:
    subprocess.run([*program, str(mounted.path)], check=True, timeout=30)
    ended(mounted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_the_daemon(mounted: Mounted, number: signal.Signals) -> None:
    os.kill(mounted.pid, number)
    ended(mounted)


def test_a_signal_ends_it_in_the_middle_of_a_transition(mounted: Mounted) -> None:
    cli = mounted.cli
    cli.ok("task", "add", "--on-cpu")
    cli.ok("insmod", cli.module(patch("slow")))
    held = os.open(mounted.klp / "slow/enabled", os.O_RDONLY)
    os.kill(mounted.pid, signal.SIGTERM)
    ended(mounted)
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.read(held, 1)
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.close(held)  # flush(2), which the kernel asks the server about


def test_shutdown_by_the_socket(mounted: Mounted) -> None:
    subprocess.run(
        [
            "python3",
            "-c",
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            's.sendall(b\'{"op": "shutdown"}\\n\'); print(s.recv(100).decode(), end="")',
            mounted.cli.entries()[0]["socket"],
        ],
        check=True,
        timeout=30,
    )
    ended(mounted)


def test_a_busy_mount(mounted: Mounted) -> None:
    cli = mounted.cli
    with open(mounted.path / "proc/modules"):
        assert "busy" in cli.fails(4, "umount", mounted.path)
        mounted.alive()
        cli.ok("umount", "--lazy", mounted.path)
        assert not is_mounted(mounted.path)
    wait_for(lambda: not exists(mounted.pid), "end of the daemon after the last close")


def test_a_dead_mount_is_named_and_cleared(mounted: Mounted) -> None:
    cli = mounted.cli
    os.kill(mounted.pid, signal.SIGKILL)
    wait_for(lambda: "not connected" in mounted.sh("ls $M").stderr, "death of the daemon")
    assert "no klpfs mount is running" in cli.fails(3, "status")
    error = cli.fails(4, "mount", mounted.path)
    assert "dead mount (transport endpoint is not connected); clear it with: klpfs umount" in error
    done = cli.run("umount", mounted.path)
    assert done.returncode == 0
    assert f"dead mount cleared: its daemon (pid {mounted.pid}) was gone" in done.stderr
    ended(mounted)
    with cli.mounted():
        pass


def test_foreground(cli: Cli) -> None:
    (cli.dir / "k").mkdir()
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [KLPFS, "mount", "k", "--foreground"], cwd=cli.dir, env=cli.env, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert f"mounted at {cli.dir}/k (pid {process.pid})" in process.stderr.readline()
        assert os.listdir(cli.dir / "k/sys/kernel/livepatch") == []
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()
        assert not is_mounted(cli.dir / "k")
        assert list(cli.runtime.glob("*.json")) == []


def test_a_second_mount_at_the_same_place(mounted: Mounted) -> None:
    assert "something is mounted there already" in mounted.cli.fails(4, "mount", mounted.path)
    mounted.alive()


def test_what_cannot_be_a_mount_point(cli: Cli) -> None:
    (cli.dir / "file").write_text("")
    (cli.dir / "full").mkdir()
    (cli.dir / "full/x").write_text("")
    assert cli.fails(4, "mount", "nosuch") == "klpfs: nosuch: No such file or directory\n"
    assert cli.fails(4, "mount", "file") == "klpfs: file: not a directory\n"
    assert "not empty" in cli.fails(4, "mount", "full")
    assert cli.fails(4, "umount", "nosuch") == "klpfs: nosuch: nothing is mounted there\n"
    assert cli.fails(4, "umount", "/proc") == "klpfs: /proc: not a klpfs mount\n"
    for driver in ("pyfuse3", "fusepy"):
        with cli.mounted("-o", "nonempty", "--driver", driver, name="full") as m:
            m.alive()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernel", "9.9"], "kernel profile '9.9' is unknown: choose one of 6.12, "),
        (["--clock", "sundial"], "clock 'sundial': expected 'real', 'virtual', 'manual' or a factor"),
        (["--clock", "-1"], "clock '-1': expected"),
        (["--subtree", "sys/nosuch"], "--subtree sys/nosuch: there is no such directory in the tree"),
        (["--subtree", "proc/modules"], "--subtree proc/modules: there is no such directory in the tree"),
        (["--driver", "ext4"], "'ext4' is not one of 'pyfuse3', 'fusepy'"),
        (["--cpus", "0"], "0 is not in the range 1<=x<=8192"),
        (["--cpus", "two"], "'two' is not a valid integer"),
        (["-o", "ro,frobnicate"], "unknown mount option 'frobnicate'; known are "),
        (["--nosuch"], "No such option"),
        (["more"], "unexpected extra argument"),
    ],
)
def test_bad_options(cli: Cli, arguments: list[str], words: str) -> None:
    (cli.dir / "k").mkdir()
    assert words in cli.fails(2, "mount", "k", *arguments)
    assert not is_mounted(cli.dir / "k")
    assert not cli.runtime.exists() or [p for p in cli.runtime.iterdir() if p.suffix != ".log"] == []


def test_no_fuse_device(cli: Cli) -> None:
    """In a mount namespace of its own, /dev/fuse is hidden: the start's error reaches the caller."""
    (cli.dir / "k").mkdir()
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f"mount --bind /dev/null /dev/fuse; exec {KLPFS} mount k"],
        cwd=cli.dir,
        env=cli.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 4, done
    assert done.stderr.splitlines()[-1].startswith(f"klpfs: {cli.dir}/k: ")
    assert "Traceback" not in done.stderr
    assert list(cli.runtime.glob("*.json")) == []


def test_symbols_of_another_kernel(cli: Cli) -> None:
    symbols = cli.dir / "System.map"
    symbols.write_text("ffffffff81000000 T _text\nffffffff81000100 T only_here\nffffffff81000200 T klp_enable_patch\n")
    with cli.mounted("--kallsyms", "System.map", "--release", "6.12.0-mine") as m:
        assert (m.path / "proc/sys/kernel/osrelease").read_text() == "6.12.0-mine\n"
        assert "only_here" in (m.path / "proc/kallsyms").read_text()
        cli.ok("task", "add", "--stack", "only_here")
        assert "no function cmdline_proc_show" in cli.fails(1, "task", "add", "--stack", "cmdline_proc_show")
    symbols.write_text("this is no symbol table\n")
    assert f"{symbols}: " in cli.fails(4, "mount", "k", "--kallsyms", "System.map")
    assert f"{cli.dir}/nosuch: No such file or directory" in cli.fails(4, "mount", "k", "--kernel-image", "nosuch")
    assert f"{symbols}: " in cli.fails(4, "mount", "k", "--kernel-image", symbols)
    assert "exclude each other" in cli.fails(2, "mount", "k", "--kernel-image", "x", "--kallsyms", "y")


@pytest.mark.parametrize("driver", ["pyfuse3", "fusepy"])
def test_subtree(cli: Cli, driver: str) -> None:
    with cli.mounted("--subtree", "/sys/kernel/livepatch/", "--driver", driver) as m:
        assert os.listdir(m.path) == []
        cli.ok("insmod", cli.module(patch("fix")))
        assert m.sh("cat $M/fix/enabled; echo 0 > $M/fix/enabled").stdout == "1\n"
        wait_for(lambda: os.listdir(m.path) == [], "removal")
        assert cli.json("status")["subtree"] == "sys/kernel/livepatch"


def test_several_mounts(cli: Cli) -> None:
    with cli.mounted(name="a") as a, cli.mounted("--kernel", "seed", name="b") as b:
        error = cli.fails(3, "lsmod")
        assert "2 klpfs mounts are running; choose one with --mount DIR or KLPFS_MOUNT" in error
        assert f"{a.path}  (pid {a.pid}, kernel 6.12, driver pyfuse3)" in error
        assert f"{b.path}  (pid {b.pid}, kernel seed, driver pyfuse3)" in error
        ko = cli.module(patch("fix"))
        cli.ok("insmod", "--mount", a.path, ko)
        assert os.listdir(a.klp) == ["fix"]
        assert os.listdir(b.klp) == []
        assert cli.run("lsmod", KLPFS_MOUNT="b").stdout.count("\n") == 1
        assert cli.run("lsmod", KLPFS_MOUNT=str(a.klp)).stdout.count("\n") == 2
        assert "no running klpfs mount at /nowhere" in cli.fails(3, "lsmod", "--mount", "/nowhere")


def test_the_runtime_directory_is_private(mounted: Mounted) -> None:
    runtime = mounted.cli.runtime
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    (entry,) = mounted.cli.entries()
    assert stat.S_IMODE(os.stat(entry["socket"]).st_mode) == 0o600
    assert entry["mountpoint"] == str(mounted.path)


def test_a_runtime_directory_that_others_can_enter_is_not_used(cli: Cli) -> None:
    cli.runtime.mkdir(mode=0o755)
    (cli.dir / "k").mkdir()
    error = cli.fails(4, "mount", "k")
    assert f"{cli.runtime}: open to others (mode 0755, 0700 is needed)" in error
    cli.runtime.rmdir()
    cli.runtime.symlink_to(cli.dir)
    assert f"{cli.runtime}: not a directory" in cli.fails(4, "mount", "k")
    assert not is_mounted(cli.dir / "k")


def test_a_very_long_runtime_path(cli: Cli) -> None:
    deep = cli.dir / ("d" * 100) / ("e" * 60)
    deep.mkdir(parents=True)
    cli.env["XDG_RUNTIME_DIR"] = str(deep)
    cli.runtime = deep / "klpfs"
    with cli.mounted() as m:
        m.alive()


def test_the_daemon_logs_to_a_file(cli: Cli) -> None:
    log = cli.dir / "daemon.log"
    with cli.mounted("--log", "daemon.log", "-o", "debug"):
        pass
    assert "DEBUG" in log.read_text()
    log.unlink()
    with cli.mounted("--log", str(log)) as m:
        os.kill(m.pid, signal.SIGTERM)
        ended(m)
    assert "SIGTERM: ending" in log.read_text()
    assert "DEBUG" not in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "log /nowhere/x: No such file or directory" in cli.fails(4, "mount", "k", "--log", "/nowhere/x")


def test_interrupting_a_start_leaves_nothing(cli: Cli) -> None:
    (cli.dir / "k").mkdir()
    for delay in (0.02, 0.08, 0.15, 0.3):
        process = subprocess.Popen(
            [KLPFS, "mount", "k"], cwd=cli.dir, env=cli.env, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        if process.returncode == 0:  # it was through already
            cli.ok("umount", "k")
        else:
            # 1: before there was anything but an interpreter that starts, which says so in a few ways
            early = stderr.endswith("KeyboardInterrupt\n") and "klpfs/cli" not in stderr
            assert process.returncode in (130, -signal.SIGINT) or early, stderr
        wait_for(lambda: not is_mounted(cli.dir / "k"), "removal of the mount")
        wait_for(lambda: not list(cli.runtime.glob("*.json")), "removal of the entry")


def test_entries_of_daemons_of_other_versions_are_skipped(mounted: Mounted) -> None:
    runtime = mounted.cli.runtime
    (runtime / "junk.json").write_text("{not json")
    (runtime / "other.json").write_text(json.dumps({"name": 5}))
    mounted.alive()
    (runtime / "junk.json").unlink()
    (runtime / "other.json").unlink()
