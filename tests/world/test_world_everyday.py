"""The tools of every day in a world: those that walk /proc, and programs that start others."""

from __future__ import annotations

from pathlib import Path

from world_support import build, patch, script, world

LIB = """
until_() { for _ in $(seq 200); do eval "$1" && return; sleep .05; done; echo "TIMEOUT: $1"; }
"""


def test_lists_of_processes(tmp_path: Path) -> None:
    """Real and emulated processes side by side."""
    build(tmp_path, "busy")
    out = script(
        LIB
        + """
        insmod busy.ko block_transition=Y
        sleep 654.5 & S=$!; until_ 'grep -q ^sleep /proc/$S/cmdline'
        ps -e -o comm= | grep -cE '^(kthreadd|kworker/.*|sleep)$'
        test "$(pgrep -xf 'sleep 654.5')" = $S && echo found
        pgrep -c kthreadd
        top -b -n 1 | grep -cE 'kthreadd|sleep'
        ps -p $S -o stat=,args= | tr -s ' '
        ps -o pid= -p $$ | tr -d ' ' | cmp - <(echo $$) && echo self
        """,
        cwd=tmp_path,
    )
    assert int(out[0]) >= 3
    assert out[1:3] == ["found", "1"]
    assert int(out[3]) >= 2
    assert out[4].endswith("sleep 654.5")
    assert out[5:] == ["self"]


def test_who_has_a_file_open(tmp_path: Path) -> None:
    out = script(
        LIB
        + """
        touch f; sleep 600 3< f & S=$!; until_ "[ -e /proc/$S/fd/3 ]"
        lsof -t f | grep -cx $S; fuser f 2>/dev/null | grep -cw $S
        readlink /proc/$S/exe /proc/$S/fd/3 | xargs -n 1 basename
        sleep 600 3< /sys/kernel/livepatch & S=$!; until_ "[ -e /proc/$S/fd/3 ]"
        readlink /proc/$S/fd/3
        """,
        cwd=tmp_path,
    )
    assert out == ["1", "1", "sleep", "f", "/sys/kernel/livepatch"]


def test_pipes_substitution_and_here_documents(tmp_path: Path) -> None:
    out = script(
        """
        cat <(echo a) <(dmesg --notime | grep -c . | sed 's/.*/n/') <<< ignored
        tee >(cat > copy) <<< text > /dev/null; wait $!; cat copy
        cat <<END
here
END
        (echo sub; exit 3); echo $?
        """,
        cwd=tmp_path,
    )
    assert out == ["a", "n", "text", "here", "sub", "3"]


def test_python_programs_that_start_others(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        """
import multiprocessing, os, subprocess, sys

def square(x):
    return x * x, open("/proc/self/patch_state").read().strip()

if __name__ == "__main__":
    print(subprocess.run(["cat", "/proc/self/patch_state"], capture_output=True, text=True).stdout.strip())
    for how in ("fork", "spawn"):
        with multiprocessing.get_context(how).Pool(2) as pool:
            print(pool.map(square, range(3)))
    subprocess.run("dmesg > /dev/null", shell=True, check=True)
    print(subprocess.run(["insmod", "nosuch.ko"], capture_output=True, text=True).stderr.strip())
"""
    )
    out = world("python3", "program.py", cwd=tmp_path).stdout.splitlines()
    squares = "[(0, '-1'), (1, '-1'), (4, '-1')]"
    assert out == [
        "-1",
        squares,
        squares,
        "insmod: ERROR: could not load module nosuch.ko: No such file or directory",
    ]


def test_why_a_transition_does_not_end(tmp_path: Path) -> None:
    """An operator finds the task that holds a transition up, and what it does."""
    build(tmp_path, "busy", "busy_fix")
    out = script(
        LIB
        + """
        insmod busy.ko block_transition=Y; insmod livepatch_busy_fix.ko
        for p in /proc/[0-9]*; do [ "$(cat $p/patch_state)" = 0 ] && P=$p; done 2>/dev/null
        sed 's/+.*//' $P/stack | grep -o 'busy.*'; cut -c -7 $P/comm
        echo N > /sys/module/busy/parameters/block_transition
        until_ '[ "$(cat /sys/kernel/livepatch/livepatch_busy_fix/transition)" = 0 ]'; cat $P/patch_state
        """,
        cwd=tmp_path,
    )
    assert out == ["busy_work_func", "kworker", "-1"]


def test_symbols_of_another_kernel(tmp_path: Path) -> None:
    """A patch finds only what the kernel given has."""
    build(tmp_path, patch("mine", "a_function_of_mine"), patch("other", "cmdline_proc_show"))
    exports = ("__fentry__", "klp_enable_patch", "_printk")
    names = ["_stext", "a_function_of_mine", *exports, "_etext", *(f"__ksymtab_{name}" for name in exports)]
    (tmp_path / "System.map").write_text(
        "".join(f"{0xFFFFFFFF81000000 + 256 * rank:x} T {name}\n" for rank, name in enumerate(names))
    )
    out = script(
        LIB
        + """
        insmod mine.ko && until_ '[ "$(cat /sys/kernel/livepatch/mine/transition)" = 0 ]'
        ls -d /sys/kernel/livepatch/mine/vmlinux/*,1; insmod other.ko
        dmesg --notime | grep 'not found'; grep -cE '^[0-9a-f]+ [A-Za-z] [^[]*$' /proc/kallsyms
        """,
        cwd=tmp_path,
        options=("--kallsyms", "System.map"),
    )
    assert out == [
        "/sys/kernel/livepatch/mine/vmlinux/a_function_of_mine,1",
        "insmod: ERROR: could not insert module other.ko: Invalid parameters",
        "livepatch: symbol 'cmdline_proc_show' not found in symbol table",
        "9",
    ]


def test_symbol_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"\x7fELF" + bytes(100))
    for options, message in (
        (("--kernel-image", "nosuch"), "--kernel-image nosuch: No such file or directory"),
        (("--kallsyms", "garbage"), "garbage"),
        (("--kernel-image", "garbage"), "garbage"),
        (("--kallsyms", "a", "--kernel-image", "b"), "--kernel-image and --kallsyms exclude each other"),
    ):
        done = world("true", options=options, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout) == (125, "")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
