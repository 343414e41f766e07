#!/usr/bin/env python3
"""Run the twins and the kernel's livepatch selftests inside ``klpfs run``, and print the results as KTAP.

    tools/conformance/run.py [--as root|user|both] [--verbose] [NAME ...]

NAME selects by a part of the name: ``twin``, ``twin-05``, ``selftest``, ``callbacks``. Exits with 1 if anything
differs. As root everything runs twice, as root and as an ordinary user (made for the occasion, removed afterwards);
as an ordinary user it runs once.

A twin passes when it prints, byte for byte, what it printed on a real kernel. Most of these texts were taken on a
terminal, which shows (lines end in CR LF, ls lists in columns), so those twins run on a pseudo terminal here; the
others print into a pipe. A selftest passes when its script, as the kernel has it, exits with 0 and says "ok" for each
of its tests.

Every script runs in a directory of its own, and with a /tmp of its own, so that leftovers of one cannot change another.
When root, klpfs is shown to the ordinary user even where that one may not look.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import ordinary

TWINS = ordinary.TOP / "tests/conformance/twins"
BUILD_MODULES = Path(__file__).with_name("build-modules")
USER = "klpfs-conformance"
TEST_LINE = re.compile(r"^TEST: (.*) \.\.\. (.*)$")
SECONDS = {"twin": 120, "selftest": 600}
EXIT_FAILED = 125  # of klpfs run: there is no world
COLUMN = 20  # the width of a column of the table


@dataclasses.dataclass
class Case:
    """One script. *kind* is ``twin`` or ``selftest``."""

    kind: str
    script: Path

    @property
    def name(self) -> str:
        """``twin-01-tree``, ``selftest-callbacks``."""
        return f"{self.kind}-{self.script.stem.removeprefix('test-')}"

    @property
    def truth(self) -> str:
        """What the twin printed on a real kernel."""
        return decode((TWINS / "truth" / f"{self.script.stem}.txt").read_bytes())

    @property
    def on_terminal(self) -> bool:
        """Whether that was on a terminal."""
        return self.kind == "twin" and "\r\n" in self.truth


@dataclasses.dataclass
class Result:
    """What became of a case: *why* it failed ("" when it passed), its subtests as (name, passed), the time it took."""

    why: str
    details: list[str]
    subtests: list[tuple[str, bool]]
    seconds: float


def all_cases(modules: Path) -> list[Case]:
    """The twins, then the selftests, each in the order of their names."""
    twins = [Case("twin", path) for path in sorted(TWINS.glob("[0-9]*.sh"))]
    return twins + [Case("selftest", path) for path in sorted((modules / "selftests").glob("test-*.sh"))]


def prepare(case: Case, work: Path, modules: Path) -> None:
    """Fill the directory that *case* runs in."""
    if case.kind == "twin":
        files = [case.script, TWINS / "lib.sh"]
    else:
        files = [path for path in case.script.parent.iterdir() if path.is_file()]
    for path in files:
        shutil.copy(path, work)
    (work / "test_modules").mkdir()
    for path in modules.glob("*.ko"):
        shutil.copy(path, work / "test_modules")


def decode(data: bytes) -> str:
    """Bytes as text, whatever they are."""
    return data.decode(errors="surrogateescape")


def judge(case: Case, output: str, status: int | None) -> Result:
    """The result of *case* by what it printed and its exit status (None: it took too long)."""
    lines = output.replace("\r\n", "\n").split("\n")
    why = f"still running after {SECONDS[case.kind]} seconds" if status is None else ""
    if status == EXIT_FAILED:
        return Result("klpfs run failed", lines, [], 0)
    if case.kind == "twin":
        if output == case.truth:
            return Result(why, [], [], 0)
        expected = case.truth.replace("\r\n", "\n").split("\n")
        diff = list(difflib.unified_diff(expected, lines, "real kernel", "klpfs", lineterm=""))
        changed = sum(line[0] in "+-" for line in diff) - 2
        return Result(why or (f"{changed} lines differ" if diff else "line ends differ"), diff, [], 0)
    said = {match[1]: match[2] for line in lines if (match := TEST_LINE.match(line))}
    names = re.findall(r'^start_test "(.*)"$', case.script.read_text(), re.MULTILINE)
    subtests = [(name, said.get(name) == "ok") for name in names]
    failed = sum(not passed for _, passed in subtests)
    if not why and status != 0:
        why = f"exit status {status}"
    if not why and failed:
        why = f"{failed} of {len(subtests)} tests failed"
    return Result(why, lines if why else [], subtests, 0)


def run_case(case: Case, modules: Path, user: str | None) -> Result:
    """Run one script inside ``klpfs run``."""
    # becomes the /tmp of the script
    base = Path(tempfile.mkdtemp(prefix="klpfs-conformance-"))
    try:
        work = base / "work"
        work.mkdir()
        prepare(case, work, modules)
        script = ["bash", f"./{case.script.name}"]
        command = [*ordinary.KLPFS, "run", "--"]
        env = ordinary.environment()
        if os.geteuid() == 0:
            base.chmod(0o1777)
            if user is not None:
                shutil.chown(work, user, user)
            command = [*ordinary.prefix(base, user), *command, *script]
        else:
            # who is not root can mount in a world only
            command += ["sh", "-c", f'mount --bind {base} /tmp && cd /tmp/work && exec "$@"', "sh", *script]
        started = time.monotonic()
        output, status = execute(command, work, env, SECONDS[case.kind], terminal=case.on_terminal)
        seconds = time.monotonic() - started
        result = judge(case, decode(output), status)
        return dataclasses.replace(result, seconds=seconds)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def execute(
    command: list[str], cwd: Path, env: dict[str, str], seconds: float, *, terminal: bool
) -> tuple[bytes, int | None]:
    """What *command* prints, to a pipe or to a controlling terminal of its own, and its exit status (None: after
    *seconds* it was still running and was killed; the world goes with it)."""
    if terminal:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**env, "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        )
    else:
        ours, theirs = os.pipe()
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True
        )
    os.close(theirs)
    output = bytearray()
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([ours], [], [], left)[0]:
                break
            try:
                data = os.read(ours, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # the other side of the terminal is closed
                    raise
                data = b""
            if not data:
                return bytes(output), process.wait(max(deadline - time.monotonic(), 1))
            output += data
        return bytes(output), None
    except subprocess.TimeoutExpired:
        return bytes(output), None
    finally:
        os.close(ours)
        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def comment(lines: list[str], indent: str, limit: int | None) -> None:
    """Print *lines* as KTAP diagnostics."""
    shown = lines if limit is None else lines[:limit]
    for line in shown:
        print(f"{indent}# {line}".encode(errors="surrogateescape").decode(errors="backslashreplace"))
    if len(shown) < len(lines):
        print(f"{indent}# ... {len(lines) - len(shown)} more lines (--verbose shows all)")


def run_all(cases: list[Case], modules: Path, user: str | None, label: str, limit: int | None) -> dict[str, Result]:
    """Run *cases* as one KTAP test of subtests."""
    print(f"    KTAP version 1\n    1..{len(cases)}")
    results = {}
    for number, case in enumerate(cases, 1):
        result = results[case.name] = run_case(case, modules, user)
        if result.subtests:
            print(f"        KTAP version 1\n        1..{len(result.subtests)}")
            for sub, (name, passed) in enumerate(result.subtests, 1):
                print(f"        {'ok' if passed else 'not ok'} {sub} {name}")
        if result.why:
            comment([result.why, *result.details], "    ", limit)
        print(f"    {'not ok' if result.why else 'ok'} {number} {case.name}", flush=True)
    return results


def table(results: dict[str, dict[str, Result]]) -> Iterator[str]:
    """One row a script, one column for each way of running it."""
    columns = list(results)
    names = list(dict.fromkeys(name for column in results.values() for name in column))
    width = max(len(name) for name in names)
    yield f"{'':{width}}" + "".join(f"  {column:>{COLUMN}}" for column in columns)
    for name in names:
        row = f"{name:{width}}"
        for column in columns:
            result = results[column][name]
            said = f"{'FAILED' if result.why else 'ok'} {result.seconds:5.1f} s"
            row += f"  {said:>{COLUMN}}"
        yield row


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="who", choices=["root", "user", "both"], default="both")
    parser.add_argument("--verbose", action="store_true", help="print differences whole")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    root = os.geteuid() == 0
    if args.who == "root" and not root:
        parser.error("--as root: not root here")
    modules = Path(subprocess.run([BUILD_MODULES], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    cases = [c for c in all_cases(modules) if not args.names or any(name in c.name for name in args.names)]
    if not cases:
        parser.error(f"no such script: {' '.join(args.names)}")
    limit = None if args.verbose else 60
    ways = [way for way in ("root", "user") if args.who in (way, "both") and (root or way == "user")]
    results: dict[str, dict[str, Result]] = {}
    failed = False
    print(f"KTAP version 1\n1..{len(ways)}")
    for number, way in enumerate(ways, 1):
        label = "as root" if way == "root" else "as an ordinary user"
        reason = ordinary.cannot_be_user() if way == "user" else ""
        if reason:
            print(f"ok {number} {label} # SKIP {reason}")
            continue
        if way == "user" and root:
            with ordinary.ordinary_user(USER) as user:
                results[label] = run_all(cases, modules, user, label, limit)
        else:
            results[label] = run_all(cases, modules, None, label, limit)
        bad = any(result.why for result in results[label].values())
        failed |= bad
        print(f"{'not ok' if bad else 'ok'} {number} {label}", flush=True)
    if results:
        comment(["", *table(results)], "", None)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
