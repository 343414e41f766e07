"""What the commands print: formats, JSON, exit codes, help, and that nothing decorates a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator

import pytest
from cli_support import KLPFS, Cli, Mounted, patch, wait_for

from klpfs import __version__
from klpfs.cli.common import EXIT_CODES
from klpfs.cli.group import COMMANDS
from klpfs.cli.group import cli as group


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount with one patch loaded, whose clock only moves when it is told to."""
    cli = Cli(tmp_path_factory.mktemp("reports"))
    with cli.mounted("--clock", "manual", "--cpus", "3") as m:
        cli.ok("insmod", cli.module(patch("fix", more='replace = true\nversion = "2"')))
        yield m


@pytest.fixture
def cli(mounted: Mounted) -> Cli:
    return mounted.cli


def on_terminal(cli: Cli, *args: str, **env: str) -> str:
    """The output of a command whose standard output is a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen([KLPFS, *args], env=cli.env | {"TERM": "xterm"} | env, stdout=child, stdin=child)
    os.close(child)
    out = b""
    try:
        while chunk := os.read(parent, 65536):
            out += chunk
    except OSError:
        pass  # EIO: the other side has closed the terminal
    os.close(parent)
    assert process.wait(timeout=30) == 0
    return out.decode()


def test_version(cli: Cli) -> None:
    assert cli.ok("--version") == f"klpfs {__version__}\n"


def test_help_of_every_command_has_what_the_table_says(cli: Cli) -> None:
    text = cli.ok("--help")
    context = group.make_context("klpfs", ["lsmod"])
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} " in text
        assert summary in text
        command = group.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(limit=200) == summary
    for name in ("mount", "umount", "insmod", "rmmod", "dmesg", "task", "clock", "mkmod"):
        assert "Examples:" in cli.ok(name, "--help")


def test_help_lists_the_exit_codes(cli: Cli) -> None:
    text = cli.ok("--help")
    for code, meaning in EXIT_CODES.items():
        assert f"{code:<4} {meaning}" in text


def test_help_imports_no_command(cli: Cli) -> None:
    done = subprocess.run(
        [KLPFS, "--help"], env=cli.env | {"PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "klpfs.cli.common" in imported
    assert not imported & {
        "trio",
        "rich",
        "elftools",
        "unicorn",
        "pyfuse3",
        *(module for module, _ in COMMANDS.values()),
    }


def test_unknown_command(cli: Cli) -> None:
    assert "No such command 'frobnicate'" in cli.fails(2, "frobnicate")
    assert "Missing argument 'X.ko'" in cli.fails(2, "insmod")
    assert "Missing argument 'MODULE...'" in cli.fails(2, "rmmod")


def test_status(mounted: Mounted) -> None:
    text = mounted.cli.ok("status")
    assert f"mount       {mounted.path}, driver pyfuse3, pid {mounted.pid}, klpfs {__version__}\n" in text
    assert "clock       0.000 s, manual\n" in text
    assert "ORDER  PATCH  ENABLED  TRANSITION  REPLACE  FORCED  OBJECTS:FUNCTIONS\n" in text
    assert "    1  fix          1           0        1  -       vmlinux:1\n" in text
    assert "transition  " not in text


def test_status_json(mounted: Mounted) -> None:
    status = mounted.cli.json("status")
    assert status["mountpoint"] == str(mounted.path)
    assert status["cpus"] == 3
    assert status["clock"] == {"now": 0.0, "mode": "manual", "rate": 0.0}
    assert status["transition"] is None
    assert status["patches"] == [
        {
            "name": "fix",
            "enabled": True,
            "transition": False,
            "replace": True,
            "forced": False,
            "stack_order": 1,
            "objects": [
                {
                    "name": "vmlinux",
                    "patched": True,
                    "funcs": [{"name": "cmdline_proc_show", "sympos": 1, "patched": True}],
                }
            ],
        }
    ]


def test_lsmod(cli: Cli) -> None:
    header, line = cli.ok("lsmod").splitlines()
    (module,) = cli.json("lsmod")
    assert header == "Module                  Size  Used by"
    assert line == f"fix                 {module['size']:>8}  1"
    assert module == {
        "name": "fix",
        "size": module["size"],
        "refcnt": 1,
        "holders": [],
        "state": "live",
        "taint": "OEK",
    }


def test_dmesg(mounted: Mounted) -> None:
    cli = mounted.cli
    mounted.sh('env printf "<3>one\\ntwo\\n" > $M/dev/kmsg; printf "\\033[31mred\\n" > $M/dev/kmsg')
    lines = cli.ok("dmesg").splitlines()
    assert lines[-3] == "[    0.000000] one"
    assert lines[-2] == "               two"
    assert lines[-1] == r"[    0.000000] \x1b[31mred"
    assert cli.ok("dmesg", "-t").splitlines()[-1] == r"\x1b[31mred"
    assert cli.ok("dmesg", "-x").splitlines()[-3] == "user  :err   : [    0.000000] one"
    assert cli.ok("dmesg", "-l", "err", "-t").splitlines() == ["one", "two"]
    assert "'loud' is not one of emerg, alert" in cli.fails(2, "dmesg", "-l", "err,loud")
    records = [json.loads(line) for line in cli.ok("dmesg", "--json").splitlines()]
    assert [r["seq"] for r in records] == list(range(records[0]["seq"], records[-1]["seq"] + 1))
    assert records[-2]["text"] == "one\ntwo"
    assert (records[-2]["level"], records[-2]["facility"], records[-2]["time"]) == (3, 1, 0.0)


def test_dmesg_clear_and_follow(mounted: Mounted) -> None:
    cli = mounted.cli
    cli.ok("dmesg", "--clear")
    assert cli.ok("dmesg") == ""
    mounted.sh("echo first > $M/dev/kmsg")
    process = subprocess.Popen([KLPFS, "dmesg", "--follow", "-t"], env=cli.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    mounted.sh("echo second > $M/dev/kmsg")
    assert process.stdout.readline() == "second\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    process.stdout.close()
    assert cli.ok("dmesg", "--read-clear", "-t") == "first\nsecond\n"
    assert cli.ok("dmesg") == ""
    assert "cannot be combined" in cli.fails(2, "dmesg", "-C", "-w")


def test_a_reader_that_has_seen_enough(mounted: Mounted) -> None:
    mounted.sh("for i in {1..3000}; do echo line $i; done > $M/dev/kmsg")
    done = mounted.sh("set -o pipefail; klpfs dmesg -t | head -1; echo ${PIPESTATUS[0]}")
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_tasks(mounted: Mounted) -> None:
    cli = mounted.cli
    pids = cli.ok(
        "task", "add", "--comm", "sleeper", "--stack", "cmdline_proc_show+0x4,vfs_read", "--count", "2"
    ).split()
    (odd,) = cli.json("task", "add", "--comm", "odd", "--kthread", "--unreliable", "--on-cpu")
    tasks = {task["pid"]: task for task in cli.json("ps")}
    one = tasks[int(pids[0])]
    assert (one["comm"], one["state"], one["patch_state"], one["kthread"]) == ("sleeper", "S", -1, False)
    assert one["stack"][0].startswith("cmdline_proc_show+0x4/0x")
    assert (tasks[odd]["on_cpu"], tasks[odd]["reliable"], tasks[odd]["state"]) == (True, False, "R")
    rows = [line.split() for line in cli.ok("ps").splitlines()]
    assert rows[0] == ["PID", "STATE", "ONCPU", "PATCH", "COMM", "STACK"]
    assert ["0", "R", "-", "-1", "[swapper/2]", "-"] in rows
    assert [str(odd), "R", "yes", "-1", "[odd]", "?"] in rows
    cli.ok("task", "set", pids[0], "--stack", "", "--state", "D")
    cli.ok("task", "set", str(odd), "--off-cpu", "--reliable")
    tasks = {task["pid"]: task for task in cli.json("ps")}
    assert (tasks[int(pids[0])]["stack"], tasks[int(pids[0])]["state"]) == ([], "D")
    assert (tasks[odd]["on_cpu"], tasks[odd]["reliable"]) == (False, True)
    cli.ok("task", "signal", pids[1])  # nothing handles it: it ends
    cli.ok("task", "remove", pids[0], str(odd))
    assert not {int(pids[0]), int(pids[1]), odd} & {task["pid"] for task in cli.json("ps")}
    assert cli.fails(1, "task", "wake", pids[0]) == f"klpfs: no task with pid {pids[0]}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task", "wake"], "Missing argument 'PID...'"),
        (["task", "wake", "x"], "'x' is not a valid integer"),
        (["task", "wake", "0"], "0 is not in the range"),
        (["task", "add", "--state", "Q"], "'Q' is not one of"),
        (["task", "add", "--stack", "a,,b"], "an empty name among the functions"),
        (["task", "add", "--stack", "a b"], "(at $.stack[0])"),
        (["task", "add", "--count", "0"], "0 is not in the range"),
        (["task", "signal", "2", "-s", "NOSUCH"], "'NOSUCH' is not a signal"),
        (["task", "frob"], "No such command 'frob'"),
        (["clock", "--advance", "soon"], "'soon' is not a time"),
        (["clock", "--advance", "0"], "'0' is not a time"),
        (["clock", "--advance", "8d"], "'8d' is not a time of at most 7 days"),
    ],
)
def test_bad_arguments(mounted: Mounted, arguments: list[str], words: str) -> None:
    done = mounted.cli.run(*arguments)
    assert done.returncode in (2, 5), done
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stall_of_ten_minutes(mounted: Mounted) -> None:
    """The manual clock goes from deadline to deadline: six hundred retries, and the signals after the fifteenth."""
    cli = mounted.cli
    cli.ok("dmesg", "--clear")
    start = cli.json("clock")["now"]
    (pid,) = cli.ok("task", "add", "--comm", "stuck", "--kthread", "--on-cpu").split()
    cli.ok("insmod", cli.module(patch("slow", "meminfo_proc_show")))
    assert cli.json("clock", "--advance", "10m") == {"now": start + 600, "mode": "manual", "rate": 0.0}
    transition = cli.json("status")["transition"]
    assert 595 <= transition["tries"] <= 602
    assert transition["stragglers"] == [{"pid": int(pid), "comm": "stuck", "state": "R", "reason": "runs on a CPU"}]
    text = cli.ok("status")
    assert f"transition  patching 'slow', {transition['tries']} failed tries, 1 tasks pending\n" in text
    assert cli.ok("dmesg", "-t").splitlines().count("livepatch: signaling remaining tasks") == 1
    cli.ok("task", "remove", pid)
    cli.ok("clock", "--advance", "1.5s")
    wait_for(lambda: (mounted.klp / "slow/transition").read_text() == "0\n", "completion")
    (mounted.klp / "slow/enabled").write_text("0")
    mounted.gone("slow")
    cli.ok("rmmod", "slow")


def test_scaled_and_virtual_clocks(tmp_path_factory: pytest.TempPathFactory) -> None:
    cli = Cli(tmp_path_factory.mktemp("clocks"))
    with cli.mounted("--clock", "1000") as m:
        assert cli.json("clock")["rate"] == 1000
        assert cli.ok("clock").endswith(" scaled x1000\n")
        cli.ok("task", "add", "--on-cpu", "--kthread")
        cli.ok("insmod", cli.module(patch("slow")))
        wait_for(lambda: cli.json("status")["transition"]["tries"] > 100, "a hundred tries in a tenth of a second")
        m.alive()
    with cli.mounted("--clock", "virtual") as m:
        assert cli.json("clock")["mode"] == "virtual"
        (pid,) = cli.ok("task", "add", "--on-cpu", "--kthread").split()
        cli.ok("insmod", cli.module(patch("slow")))
        wait_for(lambda: "signaling" in cli.ok("dmesg"), "fifteen virtual seconds")
        cli.ok("task", "remove", pid)
        m.settled("slow")


def test_colour_only_on_a_terminal(mounted: Mounted) -> None:
    cli = mounted.cli
    assert "\x1b[" not in cli.ok("status") + cli.ok("ps")
    assert "\x1b[1m" in on_terminal(cli, "ps")
    assert "\x1b[" not in on_terminal(cli, "ps", NO_COLOR="1")
    assert "\x1b[" not in on_terminal(cli, "ps", TERM="dumb")
    assert "kthreadd" in on_terminal(cli, "ps")
    cli.ok("dmesg", "-C")
    mounted.sh('echo "<2>bad" > $M/dev/kmsg')
    assert "\x1b[31m" in on_terminal(cli, "dmesg")
    assert "\x1b[" not in on_terminal(cli, "dmesg", NO_COLOR="1")
    assert on_terminal(cli, "status", "--json").startswith("{\r\n")


def test_data_and_diagnostics_are_kept_apart(mounted: Mounted) -> None:
    done = mounted.sh("klpfs rmmod nosuch fix 2>err; echo $?; cat err")
    assert done.stdout == (
        "1\nrmmod: ERROR: Module nosuch is not currently loaded\nrmmod: ERROR: Module fix is in use\n"
    )


def test_without_a_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    cli = Cli(tmp_path_factory.mktemp("none"))
    for command in (
        ["status"],
        ["ps"],
        ["lsmod"],
        ["dmesg"],
        ["clock"],
        ["rmmod", "x"],
        ["insmod", "x"],
        ["task", "add"],
    ):
        error = cli.fails(3, *command)
        assert error == "klpfs: no klpfs mount is running; start one with: klpfs mount DIR\n"


def test_doctor(cli: Cli) -> None:
    rows = {row["what"]: row for row in cli.json("doctor")}
    assert rows["FUSE device"]["ok"] is True
    assert rows["Python"]["needed_for"] == "mount"
    assert "FUSE device" in cli.ok("doctor")
