"""The life of a patch by way of the real commands and a shell on the mount, with both drivers."""

from __future__ import annotations

import ctypes
import gzip
import json
import lzma
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import Cli, Mounted, patch

from klpfs.drivers import DRIVERS


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture(params=DRIVERS)
def mounted(cli: Cli, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    with cli.mounted("--driver", request.param) as m:
        yield m


def test_from_insmod_to_rmmod(mounted: Mounted) -> None:
    cli = mounted.cli
    before = mounted.sh("cat $M/proc/cmdline").stdout
    ko = cli.module(patch("fix"))
    assert cli.ok("insmod", ko) == ""
    mounted.settled("fix")
    done = mounted.sh(
        "cd $KLP; ls; cat fix/enabled fix/transition fix/vmlinux/patched; ls fix/vmlinux; cat $M/proc/cmdline;"
        "cat $M/sys/module/fix/refcnt; cut -d' ' -f1,3,4 $M/proc/modules"
    )
    assert done.stdout.splitlines() == [
        "fix",
        "1",
        "0",
        "1",
        "cmdline_proc_show,1",
        "patched",
        "fix: this has been live patched",
        "1",
        "fix 1 -",
    ]
    assert cli.fails(1, "rmmod", "fix") == "rmmod: ERROR: Module fix is in use\n"
    assert mounted.sh("echo 0 > $KLP/fix/enabled").returncode == 0
    mounted.gone("fix")
    assert mounted.sh("ls $KLP; cat $M/proc/cmdline").stdout == before
    mounted.sh("until [ $(cat $M/sys/module/fix/refcnt) = 0 ]; do :; done")
    assert cli.ok("rmmod", "fix") == ""
    assert not (mounted.path / "sys/module/fix").exists()
    assert cli.ok("lsmod") == "Module                  Size  Used by\n"
    lines = cli.ok("dmesg", "--notime").splitlines()
    assert [line for line in lines if line.startswith("livepatch:")] == [
        "livepatch: enabling patch 'fix'",
        "livepatch: 'fix': starting patching transition",
        "livepatch: 'fix': patching complete",
        "livepatch: 'fix': starting unpatching transition",
        "livepatch: 'fix': unpatching complete",
    ]


@pytest.mark.parametrize("driver", DRIVERS)
def test_paths_that_are_no_utf8(cli: Cli, driver: str) -> None:
    # in a mount namespace of its own, because other tests read the mount table as text
    script = (
        "d=$(printf 'm\\377'); mkdir $d && klpfs mount --driver $1 $d && cat $d/sys/module/compression && klpfs status;"
        "klpfs status --json; klpfs umount $d; ls -A $d"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", driver],
        cwd=cli.dir,
        env=cli.env,
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.splitlines()
    assert lines[0] == b"xz"
    assert os.fsencode(cli.dir / "m") + b"\xff, driver" in lines[1]
    status = json.loads(next(line for line in lines if line.startswith(b"{")))
    assert os.fsencode(status["mountpoint"]) == os.fsencode(cli.dir / "m") + b"\xff"
    assert lines[-1].startswith(b"{"), "something is left"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_mounting_with_a_closed_standard_descriptor(cli: Cli, closed: str) -> None:
    (cli.dir / "k").mkdir()
    script = f"klpfs mount k {closed} && cat k/proc/modules && klpfs umount k"
    done = subprocess.run(["sh", "-c", script], cwd=cli.dir, env=cli.env, capture_output=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


STALL = ("task", "add", "--comm", "sleeper", "--kthread", "--state", "D", "--stack", "cmdline_proc_show")


def test_a_stalled_transition_is_reversed(mounted: Mounted) -> None:
    cli = mounted.cli
    (pid,) = cli.ok(*STALL).split()
    cli.ok("insmod", cli.module(patch("slow")))
    status = cli.json("status")
    assert status["transition"]["patch"] == "slow"
    assert status["transition"]["direction"] == "patching"
    (task,) = status["transition"]["stragglers"]
    assert task == {"pid": int(pid), "comm": "sleeper", "state": "D", "reason": "sleeps in cmdline_proc_show"}
    assert mounted.sh("cat $KLP/slow/transition; cat $M/proc/" + pid + "/patch_state").stdout == "1\n0\n"
    assert "Device or resource busy" in cli.fails(1, "insmod", cli.module(patch("other", "meminfo_proc_show")))
    assert mounted.sh("echo 0 > $KLP/slow/enabled").returncode == 0
    mounted.gone("slow")
    assert mounted.sh("cat $M/proc/" + pid + "/patch_state").stdout == "-1\n"


def test_a_stalled_transition_is_forced(mounted: Mounted) -> None:
    cli = mounted.cli
    cli.ok(*STALL)
    cli.ok("insmod", cli.module(patch("slow")))
    assert mounted.sh("cat $KLP/slow/transition; echo 1 > $KLP/slow/force").stdout == "1\n"
    mounted.settled("slow")
    assert "forcing remaining tasks to the patched state" in cli.ok("dmesg")
    assert cli.json("status")["patches"][0]["forced"] is False  # only a forced unpatching pins the module


def test_a_task_that_wakes_up_ends_the_stall(mounted: Mounted) -> None:
    cli = mounted.cli
    (pid,) = cli.ok(*STALL).split()
    cli.ok("insmod", cli.module(patch("slow")))
    assert cli.json("status")["transition"]["pending"] == 1
    cli.ok("task", "wake", pid)
    mounted.settled("slow")


def test_replace(mounted: Mounted) -> None:
    cli = mounted.cli
    cli.ok("insmod", cli.module(patch("one")))
    cli.ok("insmod", cli.module(patch("two", "meminfo_proc_show")))
    cli.ok("insmod", cli.module(patch("all", more="replace = true")))
    mounted.gone("one")
    mounted.gone("two")
    assert mounted.sh("ls $KLP; cat $KLP/all/replace").stdout == "all\n1\n"
    mounted.sh("until [ $(cat $M/sys/module/one/refcnt)$(cat $M/sys/module/two/refcnt) = 00 ]; do :; done")
    cli.ok("rmmod", "one", "two")
    assert [m["name"] for m in cli.json("lsmod")] == ["all"]


def test_a_module_that_comes_and_goes(mounted: Mounted) -> None:
    cli = mounted.cli
    target = cli.module('name = "target"\nkind = "module"\n[[functions]]\nname = "target_fn"\n')
    cli.ok("insmod", cli.module(patch("fix", "target_fn", obj="target")))
    assert mounted.sh("cat $KLP/fix/target/patched").stdout == "0\n"
    cli.ok("insmod", target)
    assert mounted.sh("cat $KLP/fix/target/patched").stdout == "1\n"
    cli.ok("rmmod", "target")
    assert mounted.sh("cat $KLP/fix/target/patched").stdout == "0\n"


def test_parameters(mounted: Mounted) -> None:
    cli = mounted.cli
    ko = cli.module(
        'name = "tunable"\nkind = "module"\n'
        '[[params]]\nname = "count"\nperm = "0644"\n[[params]]\nname = "flag"\ntype = "bool"\n'
    )
    cli.ok("insmod", ko, "count=0x10", "flag=y")
    assert mounted.sh("cd $M/sys/module/tunable/parameters; cat count flag; echo 5 > count; cat count").stdout == (
        "16\nY\n5\n"
    )


def test_compressed_modules(mounted: Mounted) -> None:
    """As packages ship them; unpacked by the one who inserts, as by kmod."""
    cli = mounted.cli
    data = cli.module(patch("packed")).read_bytes()
    lib = ctypes.CDLL("libzstd.so.1")
    lib.ZSTD_compress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(len(data) + 4096)
    size = lib.ZSTD_compress(out, ctypes.c_size_t(len(out)), data, ctypes.c_size_t(len(data)), 3)
    for suffix, content in (("gz", gzip.compress(data)), ("xz", lzma.compress(data)), ("zst", out.raw[:size])):
        path = cli.dir / f"packed.ko.{suffix}"
        path.write_bytes(content)
        assert cli.json("inspect", path)["loads"]
        cli.ok("insmod", path)
        (mounted.klp / "packed/enabled").write_text("0")
        mounted.gone("packed")
        mounted.sh("until [ $(cat $M/sys/module/packed/refcnt) = 0 ]; do :; done")
        cli.ok("rmmod", path)


def test_waiting_for_the_log(mounted: Mounted) -> None:
    """poll(2) on dev/kmsg returns with a record; with pyfuse3 a seek to the end means the end as it was then."""
    fd = os.open(mounted.path / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                os.read(fd, 8192)
            except BlockingIOError:
                break
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        for text in ("one", "two"):
            with subprocess.Popen(["bash", "-c", f"sleep 0.2; echo {text} > {mounted.path}/dev/kmsg"]):
                assert poller.poll(20_000) == [(fd, select.POLLIN)]
            assert os.read(fd, 8192).endswith(f";{text}\n".encode())
        os.lseek(fd, 0, os.SEEK_END)
        if mounted.cli.entries()[0]["driver"] == "pyfuse3":
            mounted.sh("echo three > $M/dev/kmsg")
            assert os.read(fd, 8192).endswith(b";three\n")
        with pytest.raises(BlockingIOError):
            os.read(fd, 8192)
    finally:
        os.close(fd)
