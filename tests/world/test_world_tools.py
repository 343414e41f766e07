"""Debian's kmod, util-linux and procps through the life of a patch, with the kernel's words for what is refused."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from world_support import KLPFS, PATIENCE, build, environment, patch, release, script, wait_until, world

KLP = "/sys/kernel/livepatch"

#: Functions of every script below.
LIB = f"""
until_() {{ for _ in $(seq 200); do eval "$1" && return; sleep .05; done; echo "TIMEOUT: $1"; }}
disable() {{ echo 0 > {KLP}/$1/enabled; until_ "[ ! -e {KLP}/$1 ]"; until_ "[ \\$(cat /sys/module/$1/refcnt) = 0 ]"; }}
settled() {{ until_ "[ \\$(cat {KLP}/$1/transition) = 0 ]"; }}
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A directory with a few modules."""
    (tmp_path / "ko").mkdir()
    return build(tmp_path / "ko", "cmdline", "busy", "busy_fix", "params", "callbacks")


def test_life_of_a_patch(modules: Path) -> None:
    out = script(
        LIB
        + """
        insmod livepatch_cmdline.ko; settled livepatch_cmdline
        ls /sys/kernel/livepatch; lsmod | awk '{print $1, $3}'; cat /sys/module/livepatch_cmdline/{initstate,refcnt}
        cat /proc/cmdline; grep -c . /proc/modules
        insmod livepatch_cmdline.ko; echo rc=$?
        rmmod livepatch_cmdline; echo rc=$?
        disable livepatch_cmdline
        cmp /proc/cmdline /proc/.klpfs/proc/cmdline && echo original
        rmmod livepatch_cmdline; echo rc=$?
        lsmod; ls /sys/module
        rmmod livepatch_cmdline
        """,
        cwd=modules,
        check=False,
    )
    assert out == [
        "livepatch_cmdline",
        "Module Used",
        "livepatch_cmdline 1",
        "live",
        "1",
        "livepatch_cmdline: this has been live patched",
        "1",
        "insmod: ERROR: could not insert module livepatch_cmdline.ko: File exists",
        "rc=1",
        "rmmod: ERROR: Module livepatch_cmdline is in use",
        "rc=1",
        "original",
        "rc=0",
        "Module                  Size  Used by",
        "compression",
        "rmmod: ERROR: Module livepatch_cmdline is not currently loaded",
    ]


def test_refusals(modules: Path) -> None:
    out = script(
        """
        echo 'not an elf' > bad.ko; : > empty.ko; head -c 3000 livepatch_cmdline.ko > cut.ko
        for what in bad empty cut nosuch; do insmod $what.ko; done
        insmod /dev/null; insmod .
        rmmod nosuch
        insmod busy.ko block_transition=maybe
        insmod busy.ko nosuch=1 && dmesg | grep -o "unknown parameter.*"
        setpriv --bounding-set=-all --inh-caps=-all insmod livepatch_cmdline.ko
        true
        """,
        cwd=modules,
    )
    assert out == [
        "insmod: ERROR: could not insert module bad.ko: Invalid module format",
        "insmod: ERROR: could not insert module empty.ko: Invalid parameters",
        "insmod: ERROR: could not insert module cut.ko: Invalid module format",
        "insmod: ERROR: could not load module nosuch.ko: No such file or directory",
        "insmod: ERROR: could not insert module /dev/null: Invalid parameters",
        "insmod: ERROR: could not insert module .: Is a directory",
        "rmmod: ERROR: Module nosuch is not currently loaded",
        "insmod: ERROR: could not insert module busy.ko: Invalid parameters",
        "unknown parameter 'nosuch' ignored",
        "insmod: ERROR: could not insert module livepatch_cmdline.ko: Operation not permitted",
    ]


def test_modprobe_with_a_modules_directory(modules: Path) -> None:
    out = script(
        LIB
        + """
        modprobe livepatch-cmdline; settled livepatch_cmdline; lsmod | awk 'NR>1 {print $1}'
        modprobe livepatch_cmdline; echo rc=$?
        modprobe nosuch
        modprobe -r livepatch_cmdline; echo rc=$?
        disable livepatch_cmdline; modprobe -r livepatch_cmdline; echo rc=$?; lsmod | wc -l
        modinfo -F livepatch livepatch_cmdline; modinfo -F filename busy; [ -d /lib/modules/$(uname -r)/build ]; echo $?
        """,
        options=("--modules", str(modules)),
    )
    where = f"/lib/modules/{release()}"
    assert out == [
        "livepatch_cmdline",
        "rc=0",
        f"modprobe: FATAL: Module nosuch not found in directory {where}",
        "modprobe: FATAL: Module livepatch_cmdline is in use.",
        "rc=1",
        "rc=0",
        "1",
        "Y",
        f"{where}/busy.ko",
        "0",
    ]
    assert sorted(path.suffix for path in modules.iterdir()) == [".ko"] * 5  # the index was not written there


def test_modprobe_without_a_modules_directory() -> None:
    out = script("modprobe nosuch; modprobe -r nosuch; true", options=("--release", "6.12.0-none"))
    assert out == [
        "modprobe: FATAL: Module nosuch not found in directory /lib/modules/6.12.0-none",
        "modprobe: FATAL: Module nosuch not found.",
    ]


def test_a_release_without_headers_says_so() -> None:
    out = script(
        "cd /lib/modules/$(uname -r)/build && echo there; make 2>&1 | grep -c headers",
        options=("--release", "6.12.0-none"),
    )
    assert out == ["there", "1"]


def test_stalled_transition_and_the_task_it_waits_for(modules: Path) -> None:
    out = script(
        LIB
        + """
        insmod busy.ko block_transition=Y; insmod livepatch_busy_fix.ko
        cat /sys/kernel/livepatch/livepatch_busy_fix/transition
        for p in /proc/[0-9]*; do
          [ "$(cat $p/patch_state)" = 0 ] || continue
          sed 's#/.*##' $p/comm; grep -o busy_work_func $p/stack; ps -o stat=,comm= -p ${p#/proc/}
        done
        cat /proc/self/patch_state /proc/1/patch_state /proc/$$/task/$$/patch_state
        insmod livepatch_cmdline.ko
        echo N > /sys/module/busy/parameters/block_transition; settled livepatch_busy_fix
        cat /proc/[0-9]*/patch_state | sort -u
        """,
        cwd=modules,
    )
    assert [line.split("/")[0].rstrip() for line in out] == [
        "1",
        "kworker",
        "busy_work_func",
        "D    kworker",
        "1",
        "1",
        "1",
        "insmod: ERROR: could not insert module livepatch_cmdline.ko: Device or resource busy",
        "-1",
    ]


def test_the_log(modules: Path) -> None:
    out = script(
        """
        dmesg -C; dmesg | wc -l
        echo plain > /dev/kmsg; echo '<3>bad' > /dev/kmsg; printf 'two\\nlines\\n' > /dev/kmsg
        dmesg --notime; dmesg --notime -l err; dmesg -x --notime | tail -1; dmesg -r | sed 's/\\[.*\\]/T/' | head -1
        dmesg -S | sed 's/^[^]]*] //' | tail -1
        timeout 1 dmesg --follow-new --notime > follow & sleep .5; echo new > /dev/kmsg; wait; cat follow
        timeout 1 dmesg -w --notime | tail -1
        dd if=/dev/kmsg bs=8192 iflag=nonblock 2>&1 >/dev/null | head -1
        dmesg -c --notime | wc -l; dmesg | wc -l
        dmesg -n 1; cat /proc/sys/kernel/printk; cat /proc/sys/kernel/printk_devkmsg; stat -c '%A %s' /dev/kmsg
        { read -t .2 line; echo ${line%%,*}; } < /dev/kmsg
        """,
        cwd=modules,
    )
    assert out == [
        "0",
        *("plain", "bad", "two", "lines"),
        "bad",
        "user  :warn  : lines",
        "<5>T plain",
        "lines",
        "new",
        "new",
        "dd: error reading '/dev/kmsg': Resource temporarily unavailable",
        "5",
        "0",
        "1\t4\t1\t7",
        "ratelimit",
        "-rw-r--r-- 0",
        "5",
    ]


def test_sysctl(modules: Path) -> None:
    out = script(
        LIB
        + """
        sysctl kernel.ftrace_enabled kernel.tainted kernel.osrelease
        sysctl -q -w kernel.ftrace_enabled=0; sysctl --values kernel.ftrace_enabled
        insmod livepatch_cmdline.ko; sysctl -q -w kernel.ftrace_enabled=1
        insmod livepatch_cmdline.ko; settled livepatch_cmdline
        sysctl -w kernel.ftrace_enabled=0; sysctl --values kernel.ftrace_enabled
        sysctl --values kernel.tainted; sysctl -a 2>/dev/null | grep -c '^vm\\.'
        """,
        cwd=modules,
        check=False,
    )
    assert out[:-2] == [
        "kernel.ftrace_enabled = 1",
        "kernel.tainted = 0",
        f"kernel.osrelease = {release()}",
        "0",
        "insmod: ERROR: could not insert module livepatch_cmdline.ko: Device or resource busy",
        'sysctl: setting key "kernel.ftrace_enabled": Device or resource busy',
        "1",
    ]
    assert int(out[-2]) & 1 << 15  # TAINT_LIVEPATCH
    assert int(out[-1]) > 10


def test_uname_and_its_files() -> None:
    out = script("uname -r; uname -v; cat /proc/sys/kernel/osrelease; cut -d' ' -f3 /proc/version; uname -m; uname -n")
    ours = script("uname -r; uname -m; uname -n; cat /proc/version", options=("--keep-uname",))
    own = os.uname()
    assert out[0] == out[2] == out[3] == release()
    assert out[1].startswith("#1 SMP")
    assert out[4:] == [own.machine, own.nodename]
    assert ours[:3] == [own.release, own.machine, own.nodename]
    assert own.release in ours[3]
    assert script("unshare -u sh -c 'hostname elsewhere; uname -nr'") == [f"elsewhere {release()}"]


def test_kernel_log_to_a_file(modules: Path, tmp_path: Path) -> None:
    log = tmp_path / "kernel.log"
    world("insmod", "livepatch_cmdline.ko", cwd=modules, options=("--log", str(log)))
    assert "livepatch: enabling patch 'livepatch_cmdline'" in log.read_text()


def test_kernel_log_to_a_pipe_that_is_read_late(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    size = fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    text = "x" * 200
    fill = f"for i in $(seq {2 * size // 200}); do echo $i {text} > /dev/kmsg; done; touch {tmp_path}/full"
    wait = f"while [ ! -e {tmp_path}/read ]; do sleep .05; done"
    with subprocess.Popen(
        [*KLPFS, "run", "--log", str(tmp_path / "pipe"), "--", "sh", "-c", f"{fill}; {wait}"], env=environment()
    ) as front:
        wait_until((tmp_path / "full").exists, "the pipe is full, and the kernel goes on")
        data = b""

        def last() -> bool:
            nonlocal data
            try:
                data += os.read(reader, 65536)
            except BlockingIOError:
                pass
            return f"{2 * size // 200} {text}\n".encode() in data

        wait_until(last, "the last line")
        (tmp_path / "read").touch()
        assert front.wait(PATIENCE) == 0
    os.close(reader)
    assert data.count(text.encode()) == 2 * size // 200


def test_every_file_that_a_patch_may_print(tmp_path: Path) -> None:
    build(tmp_path, patch("mem", "meminfo_proc_show", "patched memory"))
    out = script(
        LIB
        + """
        insmod mem.ko; settled mem; cat /proc/meminfo; head -1 /proc/meminfo; disable mem; head -1 /proc/meminfo
        grep ' meminfo_proc_show' /proc/kallsyms | awk '{print $2, $3}'; grep -c '\\[mem\\]$' /proc/kallsyms
        setpriv --reuid 65534 grep -c '^0000000000000000 . klp_enable_patch$' /proc/kallsyms
        """,
        cwd=tmp_path,
    )
    assert out[:2] == ["patched memory"] * 2
    assert out[2].startswith("MemTotal:")
    assert out[3].split()[1] == "meminfo_proc_show"
    assert int(out[-2]) > 0
    assert out[-1] == "1"
