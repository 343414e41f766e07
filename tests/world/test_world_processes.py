"""Exit codes, signals, the terminal, and that nothing is left behind, whoever is killed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from world_support import (
    KLPFS,
    MARK,
    PATIENCE,
    build,
    environment,
    leaves_nothing,
    marked,
    patch,
    script,
    wait_until,
    world,
)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 200", 200),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
        ("kill -SEGV $$", 128 + 11),
    ],
)
def test_exit_status_is_the_commands(command: str, code: int) -> None:
    assert world("sh", "-c", command, check=False).returncode == code


def test_exit_status_of_klpfs_itself(tmp_path: Path) -> None:
    missing = world("/nosuch/command", check=False)
    assert (missing.returncode, missing.stderr) == (127, "klpfs: /nosuch/command: No such file or directory\n")
    nameless = world("", check=False)
    assert (nameless.returncode, nameless.stderr) == (127, "klpfs: '': No such file or directory\n")
    (tmp_path / "data").write_text("no program")
    refused = world(str(tmp_path / "data"), check=False)
    assert (refused.returncode, refused.stderr) == (126, f"klpfs: {tmp_path}/data: Permission denied\n")
    profile = world("true", options=("--kernel", "9.9"), check=False)
    assert profile.returncode == 125
    assert "9.9" in profile.stderr
    assert "6.12" in profile.stderr
    os.mkfifo(tmp_path / "fifo")
    for options, word in [
        (("--log", "/nosuch/dir/log"), "/nosuch/dir/log"),
        (("--log", str(tmp_path / "fifo")), "nobody reads"),
        (("--clock", "sundial"), "sundial"),
        (("--modules", "/nosuch/dir"), "/nosuch/dir"),
        (("--release", "a/b"), "a/b"),
        (("--trap", "nosuch"), "nosuch"),
    ]:
        done = world("true", options=options, check=False)
        assert done.returncode == 125, options
        assert done.stderr.startswith("klpfs: "), done.stderr
        assert word in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    usage = subprocess.run([*KLPFS, "run"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "Missing argument" in usage.stderr


def test_streams_directory_and_environment(tmp_path: Path) -> None:
    done = world(
        "sh", "-c", "cat; echo err >&2; pwd; echo $WORD", cwd=tmp_path, input="in\n", env={**environment(), "WORD": "x"}
    )
    assert (done.stdout, done.stderr) == (f"in\n{tmp_path}\nx\n", "err\n")
    read, write = os.pipe()
    os.write(write, b"from a pipe\n")
    os.close(write)
    out = subprocess.run(
        [*KLPFS, "run", "--", "bash", "-c", f"cat <&{read}; ls /proc/self/fd"],
        pass_fds=[read], capture_output=True, text=True, timeout=PATIENCE, check=True,
    ).stdout.split("\n")  # fmt: skip
    assert out[0] == "from a pipe"
    assert set(out[1:-1]) == {"0", "1", "2", "3", str(read)}  # 3 is the directory's
    os.close(read)
    assert script("pwd; ls | head -3", cwd=Path("/sys/kernel"))[0] == "/sys/kernel"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_descriptors_that_are_closed_stay_closed(closed: str, tmp_path: Path) -> None:
    look = f"for fd in 0 1 2; do [ -e /proc/self/fd/$fd ] && echo $fd; done > {tmp_path}"
    klpfs = " ".join([*KLPFS, "run", "--"])
    for prefix, name in ((klpfs, "world"), ("", "host")):
        command = f"{prefix} sh -c '{look}/{name}; exit 7' {closed}"
        assert subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, timeout=PATIENCE).returncode == 7
    assert (tmp_path / "world").read_text() == (tmp_path / "host").read_text()


def test_a_removed_directory(tmp_path: Path) -> None:
    look = "readlink /proc/self/cwd; touch x"
    gone = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "
    for prefix in (" ".join([*KLPFS, "run", "--"]), ""):
        done = subprocess.run(
            ["sh", "-c", f"{gone}{prefix} sh -c '{look}'"], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.stdout == f"{tmp_path}/gone (deleted)\n", done.stderr
        assert done.returncode == 1  # nothing can be made there


@pytest.mark.parametrize(("limit", "words"), [("-n 8", "Too many open files"), ("-n 16", "Too many open files")])
def test_what_runs_out_is_named(limit: str, words: str) -> None:
    command = f"ulimit {limit}; exec {' '.join(KLPFS)} run -- true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (125, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{words} (ulimit -n)" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_command_starts_ends_the_world(number: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image")  # the daemon waits for somebody who writes to it
    with leaves_nothing(tmp_path) as env:
        front = subprocess.Popen(
            [*KLPFS, "run", "--kernel-image", str(tmp_path / "image"), "--", "true"], env=env, stderr=subprocess.PIPE
        )
        wait_until(lambda: len(marked(env[MARK])) == 3, "the world's processes")
        time.sleep(0.2)
        front.send_signal(number)
        assert front.wait(PATIENCE) == 128 + number
        assert front.stderr is not None
        assert front.stderr.read() == b""
        front.stderr.close()


def test_signal_dispositions_are_as_they_were() -> None:
    script_text = "grep -E 'Sig(Ign|Blk)' /proc/self/status"
    plain = subprocess.run(["sh", "-c", script_text], capture_output=True, text=True, check=True).stdout
    assert world("sh", "-c", script_text).stdout == plain
    ignoring = f"trap '' HUP; exec {' '.join(KLPFS)} run -- sh -c \"{script_text}\""
    out = subprocess.run(["sh", "-c", ignoring], capture_output=True, text=True, check=True).stdout
    assert int(out.split()[3], 16) & 1 << (signal.SIGHUP - 1)


def test_the_command_is_no_special_process() -> None:
    out = script(
        "echo $$ $PPID; cat /proc/1/comm; tr '\\0' ' ' < /proc/1/cmdline; echo; ls /proc | grep -c '^2..$'; true"
    )
    assert out == ["300 1", "klpfs-init", "klpfs-init ", "0"]


@contextmanager
def started(*command: str, env: dict[str, str], **kwargs: object) -> Iterator[subprocess.Popen[str]]:
    """A world in the background."""
    with subprocess.Popen(
        [*KLPFS, "run", "--", *command],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,  # type: ignore[call-overload]
    ) as proc:
        try:
            yield proc
        finally:
            proc.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_sent_to_klpfs_reach_the_command(number: int, tmp_path: Path) -> None:
    with leaves_nothing(tmp_path) as env:
        text = f"trap 'echo got; exit 9' {number}; echo ready; while :; do sleep .05; done"
        with started("bash", "-c", text, env=env) as proc:
            assert proc.stdout is not None
            assert proc.stdout.readline() == "ready\n"
            proc.send_signal(number)
            assert proc.stdout.readline() == "got\n"
            assert proc.wait(10) == 9


def test_a_signal_that_ends_the_command() -> None:
    with started("sleep", "60", env=environment()) as proc:
        wait_until(lambda: _descendant(proc.pid, "sleep"), "the command starts")
        proc.terminate()
        assert proc.wait(10) == 128 + signal.SIGTERM


def _processes(mark: str, front: int) -> dict[str, int]:
    """Pids by role of the processes of one world."""
    roles = {}
    for pid in marked(mark):
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        status = Path(f"/proc/{pid}/status").read_text()
        inside = "NSpid:" in status and len(status.split("NSpid:")[1].splitlines()[0].split()) > 1
        if comm == "klpfs-init":
            roles["init"] = pid
        elif inside:
            roles[comm] = pid
        else:
            roles["front" if pid == front else "daemon"] = pid
    return roles


def _descendant(pid: int, comm: str) -> bool:
    out = subprocess.run(["pgrep", "-x", comm], capture_output=True, text=True, check=False).stdout.split()
    for found in out:
        status = Path(f"/proc/{found}/stat")
        parent = int(found)
        while parent > 1:
            try:
                parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                break
            if parent == pid:
                return status.exists()
    return False


@pytest.mark.parametrize("victim", ["front", "daemon", "init", "sleep"])
def test_nothing_is_left_after_sigkill_of(victim: str, tmp_path: Path) -> None:
    build(tmp_path, "cmdline")
    with leaves_nothing(tmp_path) as env:
        text = f"insmod {tmp_path}/livepatch_cmdline.ko; cat /dev/kmsg > /dev/null & echo ready; exec sleep 600"
        with started("bash", "-c", text, env=env, stderr=subprocess.PIPE, start_new_session=True) as proc:
            assert proc.stdout is not None
            assert proc.stdout.readline() == "ready\n"
            wait_until(lambda: len(_processes(env[MARK], proc.pid)) == 5, "all processes run")
            os.kill(_processes(env[MARK], proc.pid)[victim], signal.SIGKILL)
            code = proc.wait(10)
            assert code == {"front": -9, "daemon": 125, "init": 137, "sleep": 137}[victim]
            assert proc.stderr is not None
            said = proc.stderr.read()
            assert ("daemon ended by signal 9" in said) == (victim == "daemon"), said


def test_processes_left_in_the_background_end_with_the_command(tmp_path: Path) -> None:
    with leaves_nothing(tmp_path) as env:
        out = world(
            "bash",
            "-c",
            "sleep 600 & setsid sleep 600 & nohup sleep 600 >/dev/null 2>&1 & cd /proc/$!; echo done",
            env=env,
        )
        assert out.stdout == "done\n"


def test_many_worlds_one_after_the_other(tmp_path: Path) -> None:
    build(tmp_path, "cmdline")
    with leaves_nothing(tmp_path) as env:
        for _ in range(10):
            text = "insmod livepatch_cmdline.ko && ls /sys/kernel/livepatch && exit 3"
            done = world("sh", "-c", text, cwd=tmp_path, env=env, check=False)
            assert (done.stdout, done.returncode, done.stderr) == ("livepatch_cmdline\n", 3, "")


def test_worlds_side_by_side(tmp_path: Path) -> None:
    """Each with a state of its own, all at once."""
    count = 50
    build(tmp_path, *(patch(f"p{i}", "cmdline_proc_show", f"world {i}") for i in range(count)))
    text = "read line < gate; cat /proc/cmdline; ls /sys/kernel/livepatch; lsmod | wc -l; ls /proc | grep -cx 300"
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with leaves_nothing(tmp_path) as env:
        running = [
            subprocess.Popen(
                [*KLPFS, "run", "--", "sh", "-c", f"insmod p{i}.ko; {text}"],
                cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for i in range(count)
        ]  # fmt: skip
        # all stand at the gate: their shells wait for it to be opened for writing
        wait_until(lambda: _at_the_gate(env[MARK]) == count, "all worlds are up", 100)
        os.close(os.open(gate, os.O_WRONLY))
        outputs = [proc.communicate(timeout=PATIENCE)[0] for proc in running]
    for i, output in enumerate(outputs):
        assert output == f"world {i}\np{i}\n2\n1\n", output
        assert running[i].returncode == 0


def _at_the_gate(mark: str) -> int:
    count = 0
    for pid in marked(mark):
        try:
            # fifo_open() waits there, in openat(2)
            count += Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open")
        except OSError:
            continue
    return count


# -- a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A shell with job control on a pseudo terminal."""

    def __init__(self, env: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**env, "PS1": "outer> ", "TERM": "dumb"})
        self.text = ""
        self.seen = 0

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str, seconds: float = 20) -> str:
        """Wait for *text* in what comes next; everything up to it."""
        end = time.monotonic() + seconds
        while text not in self.text[self.seen :]:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come, but {self.text[self.seen :]!r}"
            try:
                self.text += os.read(self.fd, 65536).decode(errors="replace").replace("\r", "")
            except OSError:
                break  # the other side is closed
        start, self.seen = self.seen, self.text.index(text, self.seen) + len(text)
        return self.text[start : self.seen]

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def close(self) -> None:
        os.close(self.fd)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with leaves_nothing(tmp_path) as env:
        term = Terminal({**env, "KLPFS": " ".join(KLPFS)})
        try:
            term.expect("outer> ")
            yield term
        finally:
            term.close()


def test_ctrl_c_ends_the_command(terminal: Terminal) -> None:
    # exec: a shell that is about to wait for a child loses a Ctrl-C in that moment, without klpfs, too
    terminal.send("$KLPFS run -- sh -c 'echo rea''dy; exec sleep 600'; echo code=$?\n")
    terminal.expect("\nready\n")
    terminal.send("\x03")
    terminal.expect("code=130")


def test_a_command_that_handles_ctrl_c_goes_on(terminal: Terminal) -> None:
    text = "trap 'echo cau''ght' INT; echo rea''dy; for i in 1 2 3; do sleep .3; done; echo fini''shed"
    terminal.send(f'$KLPFS run -- bash -c "{text}"\n')
    terminal.expect("\nready\n")
    terminal.send("\x03")
    terminal.expect("caught\n")
    assert terminal.expect("finished\n").count("caught") == 0  # once, not twice


def test_ctrl_z_stops_the_job_and_fg_continues_it(terminal: Terminal) -> None:
    terminal.send("$KLPFS run -- sh -c 'echo rea''dy; read line; echo got $line; exit 5'\n")
    terminal.expect("\nready\n")
    terminal.send("\x1a")
    terminal.expect("Stopped")
    terminal.expect("outer> ")
    terminal.send("jobs\n")
    terminal.expect("Stopped")
    terminal.send("fg\n")
    time.sleep(0.2)  # the terminal must belong to the job when the line is typed
    terminal.send("hello\n")
    terminal.expect("got hello")
    terminal.send("echo code=$?\n")
    terminal.expect("code=5")


def test_a_stopped_command_that_is_continued_from_inside(terminal: Terminal) -> None:
    terminal.send("$KLPFS run -- bash -c '(sleep 1; kill -CONT $$) & kill -STOP $$; echo awa''ke'; echo code=$?\n")
    terminal.expect("awake\n")


def test_terminal_size(terminal: Terminal) -> None:
    terminal.resize(33, 77)
    text = "stty size; trap 'stty size' WINCH; echo rea''dy; while :; do sleep .1; done"
    terminal.send(f'$KLPFS run -- sh -c "{text}"\n')
    terminal.expect("33 77\n")
    terminal.expect("ready\n")
    terminal.resize(44, 88)
    terminal.expect("44 88\n")
    terminal.send("\x03")
    terminal.expect("outer> ")


def test_shell_with_job_control(terminal: Terminal) -> None:
    terminal.send("HOME=/nosuch SHELL=/bin/bash $KLPFS shell; echo code=$?\n")
    terminal.expect("(klpfs 6.12")
    terminal.send("sleep 600\n")
    time.sleep(0.3)
    terminal.send("\x1a")
    terminal.expect("Stopped")
    terminal.send("jobs; bg; kill %1; wait; echo in''side $(uname -r)\n")
    terminal.expect("inside 6.12")
    terminal.expect("(klpfs ")
    terminal.send("cat\n")
    time.sleep(0.2)
    terminal.send("\x03")
    terminal.expect("^C")
    terminal.expect("(klpfs ")
    terminal.send("exit 4\n")
    terminal.expect("code=4")
    terminal.send("cat && echo still the own''er\n")
    time.sleep(0.2)
    terminal.send("\x04")
    terminal.expect("still the owner")
