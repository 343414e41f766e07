"""What the driver tests share: a server process behind a mount, and helpers to poke it.

A server that hangs must not hang the tests: a caller of a FUSE mount waits without end for its answer, deaf to
signals. So each server has a watchdog that kills it after a while, which ends every wait with an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from klpfs.drivers.common import mount_state, unmount

TOY = Path(__file__).parent / "driver_toy.py"


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The block must raise OSError with one of the errnos *numbers*."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
        yield
    expected = "/".join(errno.errorcode[number] for number in numbers)
    assert caught.value.errno in numbers, f"{caught.value!r}, not {expected}"


class Server:
    """A process that serves a mount, and answers JSON commands on its standard input and output.

    *script* is run with *args*; it prints ``ready`` when the mount can be used, and one JSON line for each command.
    """

    LIMIT = 100.0

    def __init__(self, script: Path, mountpoint: Path, args: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        self.path = mountpoint
        self.errors = mountpoint.parent / f"{mountpoint.name}.stderr"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=pass_fds,
            )
        self.watchdog = threading.Timer(self.LIMIT, self.process.kill)
        self.watchdog.daemon = True
        self.watchdog.start()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def wait_ready(self) -> None:
        line = self.line()
        assert line == "ready", f"{line!r} {self.errors.read_text()}"

    def call(self, name: str, *args: Any) -> Any:
        """The result of a command. Raises AssertionError with what the server raised."""
        self.begin(name, *args)
        return self.finish()

    def begin(self, name: str, *args: Any) -> None:
        """Send a command only; :meth:`finish` waits for its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *args]).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self) -> Any:
        line = self.line()
        assert line.startswith("{"), f"{line!r} {self.errors.read_text()}"
        answer = json.loads(line)
        assert "error" not in answer, answer
        return answer["result"]

    def log(self) -> str:
        """What the server wrote to its standard error."""
        return self.errors.read_text()

    def stop(self) -> int:
        """End the server in order; its exit status, 0 if all was well."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
            raise

    def clean(self) -> None:
        """Leave nothing behind, whatever the state."""
        self.watchdog.cancel()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            if mount_state(str(self.path)) != "none":
                unmount(str(self.path), lazy=True)


@contextmanager
def serving(
    driver: str,
    mountpoint: Path,
    *,
    script: Path = TOY,
    pass_fds: Sequence[int] = (),
    at: str | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """A server of *script* with *driver* at *mountpoint*, until the block ends.

    *settings* go to the script as ``name=JSON``. *at* overrides the name that is given to the driver, for what is
    mounted already. *pass_fds* are the server's from then on.
    """
    if at is None:
        mountpoint.mkdir(exist_ok=True)
    words = [driver, at or str(mountpoint), *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    server = Server(script, mountpoint, words, pass_fds=pass_fds)
    for fd in pass_fds:
        os.close(fd)  # or a server that fails would leave callers of the mount waiting for us
    try:
        server.wait_ready()
        yield server
    finally:
        server.clean()


def bash(script: str, **env: str) -> tuple[int, str]:
    """Exit status and output, errors included, of a bash script."""
    done = subprocess.run(
        ["bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C", **env},
    )
    return done.returncode, done.stdout


def python_as(uid: int, code: str, *args: str) -> str:
    """Output of a Python program that runs as *uid* without supplementary groups; it must succeed."""
    done = subprocess.run(
        # becomes the user once the interpreter, which others may not be able to reach, is running
        [sys.executable, "-I", "-c", f"import os\nos.setgroups([]); os.setgid({uid}); os.setuid({uid})\n{code}", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout
