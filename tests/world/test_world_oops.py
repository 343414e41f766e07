"""Who runs code that crashes is killed, as by the kernel; who only meets a limit of klpfs gets an error."""

from __future__ import annotations

from pathlib import Path

import cpu_support
import pytest
from world_support import release, world

CRASHES = {
    "null": "*(volatile int *)0 = 1;",
    "bug": 'asm volatile("ud2");',
    "call": "((void (*)(void))0xffff900000000000)();",
}


def build(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / f"{name}.ko").write_bytes(cpu_support.build(name, source, release=release()))


def outcome(text: str, cwd: Path) -> list[str]:
    """What a bash script in a world prints. The daemon says on standard error that there was a crash."""
    return world("bash", "-c", f"exec 2>&1\n{text}", cwd=cwd).stdout.splitlines()


@pytest.mark.parametrize("how", CRASHES)
def test_a_crash_in_init_kills_who_loads(tmp_path: Path, how: str) -> None:
    source = f"int init_module(void) {{ {CRASHES[how]} return 0; }}\nvoid cleanup_module(void) {{}}\n"
    build(tmp_path, "bad", source)
    text = """
    insmod bad.ko; echo $?
    cut -d' ' -f1,3,5 /proc/modules
    rmmod bad 2>&1 | tail -n 1; echo still here
    dmesg | grep -c 'end trace'
    """
    out = outcome(text, cwd=tmp_path)
    assert any(line.endswith("Killed                  insmod bad.ko") for line in out)
    assert [line for line in out if "Killed" not in line] == [
        "137",
        "bad 1 Loading",
        "rmmod: ERROR: Module bad is in use",
        "still here",
        "1",
    ]


def test_a_crash_in_exit_kills_who_removes(tmp_path: Path) -> None:
    source = f"int init_module(void) {{ return 0; }}\nvoid cleanup_module(void) {{ {CRASHES['null']} }}\n"
    build(tmp_path, "bad", source)
    out = outcome("insmod bad.ko; rmmod bad; echo $?; cut -d' ' -f5 /proc/modules", cwd=tmp_path)
    assert [line for line in out if "Killed" not in line] == ["137", "Unloading"]


def test_a_missing_function_is_an_error(tmp_path: Path) -> None:
    source = "int kernel_read_file(void);\n"
    source += "int init_module(void) { return kernel_read_file(); }\nvoid cleanup_module(void) {}\n"
    build(tmp_path, "needs", source)
    assert outcome("insmod needs.ko; echo $?", cwd=tmp_path) == [
        "insmod: ERROR: could not insert module needs.ko: Bad address",
        "1",
    ]


FILES = r"""
void *proc_create_single_data(const char *, u16, void *, int (*)(void *, void *), void *);
void remove_proc_entry(const char *, void *);
int show(void *m, void *v) { return *(volatile int *)0; }
static int set(const char *text, const struct kernel_param *p) { return *(volatile int *)8; }
static const struct kernel_param_ops ops = { .set = set };
static int value;
PARAM(number, &ops, "int", &value, 0200)
int init_module(void) { proc_create_single_data("bad", 0444, NULL, show, NULL); return 0; }
void cleanup_module(void) { remove_proc_entry("bad", NULL); }
"""


def test_and_so_who_reads_or_writes_what_crashes(tmp_path: Path) -> None:
    build(tmp_path, "files", FILES)
    text = """
    insmod files.ko
    cat /proc/bad; echo $?
    bash -c 'echo 1 >/sys/module/files/parameters/number; echo not reached'; echo $?
    # the one who opened it is not the one who reads
    exec 5</proc/bad
    cat <&5; echo $?
    rmmod files; echo $?
    """
    out = outcome(text, cwd=tmp_path)
    assert [line for line in out if "Killed" not in line] == ["137", "137", "cat: -: Bad address", "1", "0"]
