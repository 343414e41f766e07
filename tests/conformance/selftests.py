"""The kernel's livepatch selftests without a mount and without waiting.

Model
    Each script is run by bash with ``steps.sh`` in the place of the selftests' ``functions.sh``; what comes out is
    the list of its steps. A :class:`Player` takes the steps on a machine in this process, on the virtual clock, and
    compares the log with what the script expects, as ``check_result`` does. Conditions of the scripts themselves
    (``if [[ $(cat /proc/cmdline) ...``) see no machine; nor are there processes to be counted, as test-syscall.sh does.

Source
    tools/testing/selftests/livepatch/functions.sh.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import trio

from klpfs.machine import Machine

HERE = Path(__file__).parent
KLP = "sys/kernel/livepatch"
TIMEOUT = 60  # emulated seconds, as functions.sh waits
# what insmod(8) makes of an errno
MESSAGES = {
    errno.ENOENT: "Unknown symbol in module",
    errno.ENOEXEC: "Invalid module format",
    errno.EINVAL: "Invalid parameters",
}

# The lines that `date` keeps unique in reality are not needed here; a redirection to the log becomes a step.
_LOGGED = re.compile(r"^(grep .*) > /dev/kmsg$", re.MULTILINE)


@cache
def built_modules() -> Path:
    """The directory of the built modules; they are built if they are not there yet, which takes root and a minute."""
    build = HERE.parents[1] / "tools/conformance/build-modules"
    return Path(subprocess.run([build], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


class SelftestError(AssertionError):
    """A step went otherwise than the script expects."""


def steps(script: Path, workdir: Path) -> list[list[str]]:
    """The steps of *script*, each a list of words. *workdir* is an empty directory to run it in."""
    copy = workdir / script.name
    copy.write_text(_LOGGED.sub(r"\1", script.read_text()))
    (workdir / "functions.sh").write_bytes((HERE / "steps.sh").read_bytes())
    out = workdir / "steps"
    command = f"exec bash {shlex.quote(str(copy))} 9>{shlex.quote(str(out))}"
    subprocess.run(["bash", "-c", command], cwd=workdir, check=True, stdout=subprocess.DEVNULL)
    lines = out.read_text().split("\n")[:-1]
    return [[word.replace("\x1e", "\n") for word in line.split("\x1f")] for line in lines]


@dataclass
class Player:
    """Takes steps on *machine*, with the modules of directory *modules*."""

    machine: Machine
    modules: Path
    tests: list[str] = field(default_factory=list)
    start: int = 0

    async def play(self, script: list[list[str]]) -> None:
        """Take all steps. Raises :class:`SelftestError`."""
        for name, *args in script:
            await getattr(self, name)(*args)

    # -- steps ------------------------------------------------------------------------------------------------------

    async def setup_config(self) -> None:
        await self._write(
            "sys/kernel/debug/dynamic_debug/control", "file kernel/livepatch/* +p\nfunc klp_try_switch_task -p\n"
        )
        await self.set_ftrace_enabled("1")

    async def start_test(self, name: str) -> None:
        self.tests.append(name)
        self.start = self.machine.printk.next_seq

    async def log(self, text: str) -> None:
        await self._write("dev/kmsg", text + "\n")

    async def grep(self, pattern: str, path: str) -> None:
        """``grep PATTERN FILE > /dev/kmsg``."""
        for line in (await self._read(path.lstrip("/"))).splitlines():
            if pattern in line:
                await self.log(line)

    async def load_mod(self, mod: str, *params: str) -> None:
        await self.log(f"% insmod test_modules/{mod}.ko {' '.join(params)}".strip())
        await self._insmod(mod, params)

    async def load_lp_nowait(self, mod: str, *params: str) -> None:
        await self.load_mod(mod, *params)
        await self._wait(lambda: self._exists(f"{KLP}/{mod}"), f"{mod} in {KLP}")

    async def load_lp(self, mod: str, *params: str) -> None:
        await self.load_lp_nowait(mod, *params)
        await self._wait_value(f"{KLP}/{mod}/transition", "0")

    async def load_failing_mod(self, mod: str, *params: str) -> None:
        await self.log(f"% insmod test_modules/{mod}.ko {' '.join(params)}".strip())
        try:
            await self._insmod(mod, params)
        except OSError as error:
            number = error.errno or 0
            message = MESSAGES.get(number, os.strerror(number))
            await self.log(f"insmod: ERROR: could not insert module test_modules/{mod}.ko: {message}")
        else:
            raise SelftestError(f"{mod} unexpectedly loaded")

    async def unload_mod(self, mod: str) -> None:
        await self._wait_value(f"sys/module/{mod}/refcnt", "0")
        await self.log(f"% rmmod {mod}")
        await self.machine.delete_module(mod, os.O_NONBLOCK)
        await self._wait(lambda: not self._exists(f"sys/module/{mod}"), f"{mod} gone from sys/module")

    async def disable_lp(self, mod: str) -> None:
        await self.log(f"% echo 0 > /{KLP}/{mod}/enabled")
        await self._write(f"{KLP}/{mod}/enabled", "0\n")
        await self._wait(lambda: not self._exists(f"{KLP}/{mod}"), f"{mod} gone from {KLP}")

    async def set_pre_patch_ret(self, mod: str, value: str) -> None:
        path = f"sys/module/{mod}/parameters/pre_patch_ret"
        await self.log(f"% echo {value} > /{path}")
        await self._write(path, value + "\n")
        await self._wait_value(path, value)

    async def set_ftrace_enabled(self, *args: str) -> None:
        *flags, value = args
        path = "proc/sys/kernel/ftrace_enabled"
        said = ""
        try:
            await self._write(path, value + "\n")
        except OSError as error:
            said = f'sysctl: setting key "kernel.ftrace_enabled": {os.strerror(error.errno or 0)}'
        got = await self._read(path)
        if got == value:
            await self.log(f"livepatch: kernel.ftrace_enabled = {got}")
        elif "--fail" in flags:
            await self.log(f"livepatch: {said}")
        else:
            raise SelftestError(f"kernel.ftrace_enabled: wrote {value}, reads {got}")

    async def loop_until(self, condition: str) -> None:
        """The conditions that scripts use themselves: a file with one line, and the number of patches."""
        if match := re.fullmatch(r"grep -q \^(\w+)\$? /(\S+)", condition):
            await self._wait_value(match[2], match[1])
        elif match := re.fullmatch(r'mods=\(/(\S+)/\*\); .*"\$nmods" -eq (\d+) .*', condition):
            path, number = match[1], int(match[2])
            await self._wait(lambda: len(self._names(path)) == number, f"{number} entries in {path}")
        else:
            raise SelftestError(f"cannot play: loop_until {condition}")

    async def check_sysfs_rights(self, mod: str, path: str, expected: str) -> None:
        node = self.machine.kernfs.lookup(f"{KLP}/{mod}/{path}".rstrip("/"))
        kind = stat.S_IFDIR if node is not None and node.kind == "dir" else stat.S_IFREG
        rights = stat.filemode(kind | node.mode) if node is not None else "nothing"
        if rights != expected:
            raise SelftestError(f"{mod}/{path}: {rights}, expected {expected}")

    async def check_sysfs_value(self, mod: str, path: str, expected: str) -> None:
        value = await self._read(f"{KLP}/{mod}/{path}")
        if value != expected:
            raise SelftestError(f"{mod}/{path} is {value}, expected {expected}")

    async def check_result(self, expected: str) -> None:
        result = [r.message for r in self.machine.printk.records(self.start)]
        result = [line for line in result if "livepatch:" in line or "test_klp" in line]
        result = [line for line in result if not re.search("taint(ing|s) kernel", line)]
        lines = expected.splitlines()
        if result != lines:
            diff = difflib.unified_diff(lines, result, "expected", "klpfs", lineterm="")
            raise SelftestError("\n".join([f"test: {self.tests[-1]}", *diff]))

    # -- the machine ------------------------------------------------------------------------------------------------

    def _exists(self, path: str) -> bool:
        return self.machine.kernfs.lookup(path) is not None

    def _names(self, path: str) -> list[str]:
        node = self.machine.kernfs.lookup(path)
        return [name for name, _ in node.entries()] if node is not None else []

    async def _read(self, path: str) -> str:
        return (await self.machine.kernfs.read_file(path)).decode().removesuffix("\n")

    async def _write(self, path: str, text: str) -> None:
        await self.machine.kernfs.write_file(path, text.encode())

    async def _insmod(self, mod: str, params: tuple[str, ...]) -> None:
        await self.machine.init_module((self.modules / f"{mod}.ko").read_bytes(), " ".join(params))

    async def _wait(self, condition: Callable[[], bool], what: str) -> None:
        with trio.move_on_after(TIMEOUT):
            while not condition():  # noqa: ASYNC110 - as the shell waits
                await trio.sleep(0.1)
            return
        raise SelftestError(f"waited in vain for {what}")

    async def _wait_value(self, path: str, value: str) -> None:
        got = None
        with trio.move_on_after(TIMEOUT):
            while (got := await self._read(path)) != value:  # noqa: ASYNC110 - as the shell waits
                await trio.sleep(0.1)
            return
        raise SelftestError(f"waited in vain: /{path} is {got}, not {value}")
