"""What the tests of the command line share: the real ``klpfs`` program, a mount of its own, and modules to insert.

Every test has a runtime directory of its own, so that tests that run at the same time do not see each other's mounts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klpfs.elf.writer import write_module
from klpfs.spec import parse_toml

REPO = Path(__file__).resolve().parents[2]
KLPFS = str(Path(sys.executable).parent / "klpfs")
Result = subprocess.CompletedProcess[str]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Poll until ``condition()`` holds; AssertionError naming ``what`` when it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.01)


def is_mounted(path: Path) -> bool:
    """Whether the mount table names ``path``."""
    return any(line.split(" ")[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def exists(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Cli:
    """Runs ``klpfs`` with the environment of one test; ``dir`` is its scratch directory."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.runtime = directory / "run" / "klpfs"
        self.runtime.parent.mkdir()
        dropped = {"KLPFS_MOUNT", "KLPFS_SOCKET", "NO_COLOR"}
        self.env = {key: value for key, value in os.environ.items() if key not in dropped}
        self.env |= {
            "XDG_RUNTIME_DIR": str(self.runtime.parent),
            "PATH": f"{Path(KLPFS).parent}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
        }

    def run(self, *args: str | Path, cwd: Path | None = None, **env: str) -> Result:
        """The finished ``klpfs ARGS``."""
        return subprocess.run(
            [KLPFS, *map(str, args)],
            cwd=cwd or self.dir,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def ok(self, *args: str | Path) -> str:
        """Standard output of a command that must succeed, silently."""
        done = self.run(*args)
        assert done.returncode == 0, done
        assert done.stderr == "", done
        return done.stdout

    def fails(self, code: int, *args: str | Path) -> str:
        """Standard error of a command that must fail with ``code``, and print no data and no traceback."""
        done = self.run(*args)
        assert done.returncode == code, done
        assert done.stdout == "", done
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr

    def json(self, *args: str | Path) -> Any:
        """The parsed output of ``klpfs ARGS --json``."""
        return json.loads(self.ok(*args, "--json"))

    def module(self, toml: str) -> Path:
        """A module file made from a spec; the file is called as the module."""
        spec = parse_toml(toml)
        path = self.dir / f"{spec.name}.ko"
        path.write_bytes(write_module(spec))
        return path

    @contextmanager
    def mounted(self, *options: str, name: str = "k") -> Iterator[Mounted]:
        """A mount for the duration of the block; afterwards neither mount nor daemon may be left."""
        path = self.dir / name
        path.mkdir(exist_ok=True)
        pids = []
        try:
            started = self.run("mount", path, *options)
            pids = [e["pid"] for e in self.entries() if e["mountpoint"] == str(path)]
            assert (started.returncode, started.stdout, started.stderr) == (0, "", ""), started
            yield Mounted(self, path, pids[0])
        finally:
            if is_mounted(path):
                self.run("umount", "--lazy", path)
            for pid in pids:
                if exists(pid):
                    os.kill(pid, signal.SIGTERM)
                wait_for(lambda pid=pid: not exists(pid), f"the end of daemon {pid}")
            assert not is_mounted(path)

    def entries(self) -> list[dict[str, Any]]:
        """What the registry holds."""
        return [json.loads(path.read_text()) for path in sorted(self.runtime.glob("*.json"))]


class Mounted:
    """A running mount: where it is and which process serves it."""

    def __init__(self, cli: Cli, path: Path, pid: int) -> None:
        self.cli = cli
        self.path = path
        self.pid = pid
        self.klp = path / "sys/kernel/livepatch"

    def sh(self, script: str) -> Result:
        """A finished bash script; ``$M`` is the mount and ``$KLP`` its livepatch directory."""
        env = self.cli.env | {"M": str(self.path), "KLP": str(self.klp)}
        return subprocess.run(
            ["bash", "-c", script], cwd=self.cli.dir, env=env, capture_output=True, text=True, timeout=90, check=False
        )

    def alive(self) -> None:
        """Assert that the mount answers and its daemon serves commands."""
        assert (self.path / "proc/modules").read_text() is not None
        assert self.cli.json("status", "--mount", self.path)["pid"] == self.pid

    def gone(self, name: str) -> None:
        """Wait until the patch's directory is gone."""
        wait_for(lambda: not (self.klp / name).exists(), f"removal of {name}")

    def settled(self, name: str) -> None:
        """Wait until the patch's transition is over."""
        wait_for(lambda: (self.klp / name / "transition").read_text() == "0\n", f"end of the transition of {name}")


def patch(name: str, function: str = "cmdline_proc_show", more: str = "", *, obj: str = "vmlinux") -> str:
    """The spec of a livepatch of one function."""
    return f"""
name = "{name}"
{more}
[[objects]]
name = "{obj}"
[[objects.functions]]
old_name = "{function}"
output = "{name}: this has been live patched\\n"
"""
