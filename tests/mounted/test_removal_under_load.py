"""A patch's directory goes while others look: readers in a loop, held descriptors, a working directory inside.

500 times a patch is loaded, disabled by ``echo 0`` and unloaded while eight processes read whatever they find.
"""

from __future__ import annotations

import base64
import errno
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from cli_support import Cli, Mounted, patch, wait_for

from klpfs.drivers import DRIVERS
from klpfs.elf.writer import write_module
from klpfs.spec import parse_toml

CYCLES = 500
READERS = 8


@pytest.fixture(params=DRIVERS)
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    with Cli(tmp_path).mounted("--driver", request.param) as m:
        yield m


class Control:
    """One connection to the daemon's control socket."""

    def __init__(self, m: Mounted) -> None:
        (entry,) = m.cli.entries()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(entry["socket"])
        self.file = self.sock.makefile("rb")

    def __call__(self, op: str, **members: Any) -> Any:
        self.sock.sendall(json.dumps({"op": op, **members}).encode() + b"\n")
        return json.loads(self.file.readline())

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def _read_all(klp: str, stop: Event, results: Any, number: int) -> None:
    """Read everything there is, over and over; report what was seen that may not be."""
    base = f"{klp}/fix"
    files = ["enabled", "transition", "replace", "vmlinux/patched"]
    seen: set[str] = set()
    reads = 0
    while not stop.is_set():
        for name in files:
            try:
                with open(f"{base}/{name}", "rb", buffering=0) as file:
                    data = file.read(100)
                    again = os.pread(file.fileno(), 100, 0)
                seen |= {data.decode(), again.decode()}
                reads += 1
            except OSError as error:
                seen.add(errno.errorcode[error.errno or 0])
        try:
            for entry in os.listdir(base):
                seen.add("file" if entry in ("enabled", "transition", "replace", "force", "vmlinux") else entry)
        except OSError as error:
            seen.add(errno.errorcode[error.errno or 0])
    results.put((number, reads, seen))


def test_readers_see_values_enoent_and_enodev_only(mounted: Mounted) -> None:
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    results = context.Queue()
    readers = [
        context.Process(target=_read_all, args=(str(mounted.klp), stop, results, number), daemon=True)
        for number in range(READERS)
    ]
    control = Control(mounted)
    module = write_module(parse_toml(patch("fix")))
    data = base64.b64encode(module).decode()
    refcnt = mounted.path / "sys/module/fix/refcnt"
    for reader in readers:
        reader.start()
    try:
        for _ in range(CYCLES):
            assert control("insmod", data=data)["ok"]
            (mounted.klp / "fix/enabled").write_text("0\n")
            wait_for(lambda: not (mounted.klp / "fix").exists(), "removal of the patch", 30)
            # the directory goes first, the reference to the module last
            wait_for(lambda: refcnt.read_text() == "0\n", "the last reference", 30)
            assert control("rmmod", name="fix")["ok"]
    finally:
        stop.set()
    seen: set[str] = set()
    total = 0
    for _ in readers:
        _, reads, here = results.get(timeout=60)
        seen |= here
        total += reads
    for reader in readers:
        reader.join(timeout=30)
        assert reader.exitcode == 0
    control.close()
    assert seen <= {"0\n", "1\n", "file", "ENOENT", "ENODEV"}, seen
    assert total > CYCLES
    assert os.listdir(mounted.klp) == []
    assert os.listdir(mounted.path / "sys/module") == ["compression"]
    mounted.alive()


def test_what_is_held_open_when_the_directory_goes(mounted: Mounted) -> None:
    cli = mounted.cli
    cli.ok("insmod", cli.module(patch("fix")))
    mounted.settled("fix")
    cli.ok("task", "add", "--comm", "stuck", "--state", "D", "--stack", "fix:livepatch_cmdline_proc_show")
    done = mounted.sh(
        r"""
        exec 5<$KLP/fix/enabled 6<>$KLP/fix/enabled 7<$KLP/fix/vmlinux
        cd $KLP/fix
        echo 0 > enabled; echo "write: $?"
        cat transition enabled; ls -d $KLP/fix/vmlinux/cmdline_proc_show,1
        klpfs task remove $(klpfs ps --json | python3 -c '
import json, sys
print(next(t["pid"] for t in json.load(sys.stdin) if t["comm"] == "stuck"))')
        until [ ! -e $KLP/fix ]; do sleep .05; done
        ls -a; ls /proc/self/fd/7/ 2>&1 | wc -l
        cat enabled 2>&1
        cat <&5 2>&1
        echo 1 >&6
        """
    )
    out = done.stdout.splitlines()
    assert out[:4] == ["write: 0", "1", "0", f"{mounted.klp}/fix/vmlinux/cmdline_proc_show,1"], done
    rest = out[4:]
    assert "cat: enabled: No such file or directory" in rest
    assert "cat: -: No such device" in rest
    assert "enabled" not in rest, "a removed directory lists nothing"
    assert "No such device" in done.stderr
    mounted.alive()
