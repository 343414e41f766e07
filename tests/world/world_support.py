"""What the tests of a world share: running commands in one, modules for it, an ordinary user, counting what is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from klpfs.elf.writer import write_module
from klpfs.kernel import profile as profiles
from klpfs.spec import parse_toml
from klpfs.world.libmodules import pick_release

KLPFS = [sys.executable, "-m", "klpfs.cli"]
#: Set in the environment of every world, so that its processes can be found.
MARK = "KLPFS_TEST_MARK"
#: Seconds that a command may take before the test fails.
PATIENCE = 60

EXAMPLES = Path(__file__).parents[2] / "examples" / "modules"


def environment() -> dict[str, str]:
    """The environment of a world, with a mark of its own."""
    return {**os.environ, "LC_ALL": "C", MARK: uuid.uuid4().hex}


def world(
    *command: str,
    options: tuple[str, ...] = (),
    cwd: Path | None = None,
    check: bool = True,
    input: str | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``klpfs run OPTIONS -- COMMAND``; its output and exit code. *check*: both klpfs and the command must succeed."""
    done = subprocess.run(
        [*KLPFS, "run", *options, "--", *command],
        cwd=cwd,
        env=env or environment(),
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def script(text: str, **kwargs: object) -> list[str]:
    """The output lines, errors among them, of a bash script in a world; the script must succeed."""
    done = world("bash", "-c", f"exec 2>&1\n{text}", **kwargs)  # type: ignore[arg-type]
    assert done.stderr == "", done.stderr
    return done.stdout.splitlines()


def release() -> str:
    """What ``uname -r`` says in a world of the default kernel."""
    profile = profiles.profile()
    return pick_release(profile.name, profile.release)


def build(directory: Path, *specs: str) -> Path:
    """The modules that *specs* describe (texts, or names of examples), built into *directory*."""
    profile = profiles.profile()
    for text in specs:
        example = EXAMPLES / f"{text}.toml"
        spec = parse_toml(example.read_text() if "\n" not in text and example.exists() else text)
        data = write_module(spec, release=release(), flags=profile.vermagic_flags)
        (directory / f"{spec.name}.ko").write_bytes(data)
    return directory


def patch(name: str, function: str, output: str = "", log: str = "") -> str:
    """The spec of a livepatch of one kernel function."""
    what = f'output = "{output}\\n"' if output else f'log = "{log or name}"'
    return f"""
name = "{name}"
[[objects]]
[[objects.functions]]
old_name = "{function}"
{what}
"""


def marked(mark: str) -> list[int]:
    """The processes that have *mark* in their environment."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            if mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Wait in real time until *condition* holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timeout: {what}"
        time.sleep(0.01)


def klpfs_mounts() -> list[str]:
    """Lines of the mount table of this namespace that could have come out of a world."""
    with open("/proc/self/mountinfo") as file:
        return [
            line for line in file if "klpfs" in line and line.split()[4].split("/")[1] in ("proc", "sys", "dev", "lib")
        ]


def orphaned_sockets() -> list[str]:
    """Unix sockets with a name of ours that no process holds: other tests have theirs, and those are held."""
    with open("/proc/net/unix") as file:
        named = {line.split()[6]: line for line in file if "/control" in line}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            named.pop(os.readlink(link).removeprefix("socket:[").removesuffix("]"), None)
        except OSError:
            continue  # the process has ended
    return list(named.values())


@contextmanager
def leaves_nothing(tmp: Path) -> Iterator[dict[str, str]]:
    """Yield an environment for worlds; afterwards, no process with it, and no mount, socket or file may be left.

    *tmp* serves as the directory for temporary files.
    """
    env = {**environment(), "TMPDIR": str(tmp)}
    mounts, files = klpfs_mounts(), sorted(os.listdir(tmp))
    yield env
    wait_until(lambda: not marked(env[MARK]), "processes of a world are left", 10)
    assert klpfs_mounts() == mounts
    wait_until(lambda: not orphaned_sockets(), "a socket is left", 10)
    assert sorted(os.listdir(tmp)) == files
