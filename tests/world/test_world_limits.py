"""Resource limits of the shell that starts a world: the command's, not the emulated kernel's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cpu_support
import pytest
from world_support import KLPFS, PATIENCE, environment, release

MODULE = 'int init_module(void) { pr("ran\\n"); return 0; }\nvoid cleanup_module(void) {}\n'


def limited(limit: str, text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a bash script in a world that is started under ``ulimit`` *limit*. There is a module hello.ko."""
    (tmp_path / "hello.ko").write_bytes(cpu_support.build("hello", MODULE, release=release()))
    return subprocess.run(
        ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", *KLPFS, "run", "--", "bash", "-c", text],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("limit", ["-S -f 0", "-S -v 400000", "-S -d 150000", "-n 30"])
def test_the_kernel_has_none_and_the_command_keeps_its_own(tmp_path: Path, limit: str) -> None:
    which = limit.split()[-2]
    done = limited(limit, f"ulimit {which}; insmod hello.ko && dmesg | tail -n 1 | sed 's/^[^]]*] //'", tmp_path)
    assert done.stderr == ""
    assert done.stdout == f"{limit.split()[-1]}\nran\n"
    assert done.returncode == 0


def test_time_that_the_kernel_takes_does_not_count(tmp_path: Path) -> None:
    # far more than a second of the daemon's time, little of each program's
    text = (
        "ulimit -t; insmod hello.ko; for i in {1..25}; do cat /proc/kallsyms >kallsyms || exit; done; echo still there"
    )
    done = limited("-S -t 1", text, tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("1\nstill there\n", "", 0)


def test_where_they_cannot_be_raised_a_module_is_refused_with_the_reason(tmp_path: Path) -> None:
    # nothing may write a file: not even the emulated memory, which is one
    text = "insmod hello.ko; echo $?; dmesg | tail -n 1 | sed 's/^[^]]*] //'"
    if subprocess.run(["bash", "-c", "ulimit -f 0; ulimit -f 1 2>/dev/null"], check=False).returncode == 0:
        pytest.skip("this user may raise limits")
    done = limited("-f 0", text, tmp_path)
    assert "could not insert module hello.ko: Cannot allocate memory" in done.stderr
    assert done.stdout == (
        "1\nklpfs: hello: cannot be executed: no sandbox can be started: [Errno 27] File too large\n"
    )
    assert done.returncode == 0
