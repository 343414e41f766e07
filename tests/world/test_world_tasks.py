"""Real processes take part in transitions, and run the functions that are replaced for them."""

from __future__ import annotations

from pathlib import Path

import cpu_support
from world_support import build, patch, release, script

from klpfs.world.bpf import ABIS, AUDIT_ARCH_X86_64

LIB = """
until_() { for _ in $(seq 200); do eval "$1" && return; sleep .05; done; echo "TIMEOUT: $1"; }
state() { cat /proc/$1/patch_state; }
transition() { cat /sys/kernel/livepatch/$1/transition; }
"""


def test_a_stopped_process_stalls_a_patch_of_where_it_is_stopped(tmp_path: Path) -> None:
    build(tmp_path, patch("stop", "do_signal_stop"))
    out = script(
        LIB
        + """
        sleep 600 & S=$!; kill -STOP $S; until_ "grep -q ' T ' /proc/$S/stat"
        insmod stop.ko; transition stop; state $S; state $$; state 1
        grep -c do_signal_stop /proc/$S/stack
        sleep 1.5; transition stop
        kill -CONT $S; until_ '[ "$(transition stop)" = 0 ]'; state $S
        """,
        cwd=tmp_path,
    )
    assert out == ["1", "0", "1", "1", "1", "1", "-1"]


def test_a_sleeping_process_stalls_until_it_ends(tmp_path: Path) -> None:
    build(tmp_path, patch("nap", "hrtimer_nanosleep"))
    out = script(
        LIB
        + """
        sleep 600 & S=$!; until_ "grep -q nanosleep /proc/$S/stack"
        insmod nap.ko; state $S; state $$; kill $S
        until_ '[ "$(transition nap)" = 0 ]'; ls /proc/$S 2>&1 | head -1
        """,
        cwd=tmp_path,
    )
    assert out[:2] == ["0", "1"]
    assert len(out) == 3
    assert out[2].endswith("No such file or directory")


def test_a_process_that_left_the_kernel_since_is_switched(tmp_path: Path) -> None:
    build(tmp_path, patch("nap", "hrtimer_nanosleep"))
    out = script(
        LIB
        + """
        python3 -c "import time
while 1: time.sleep(.3)" & P=$!
        until_ "grep -q nanosleep /proc/$P/stack"
        insmod nap.ko; until_ '[ "$(transition nap)" = 0 ]'; echo complete; kill $P
        """,
        cwd=tmp_path,
    )
    assert out == ["complete"]


def test_fork_copies_the_patch_state(tmp_path: Path) -> None:
    build(tmp_path, patch("stop", "do_signal_stop"))
    out = script(
        LIB
        + """
        cat > parent.py <<'END'
import os, signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, lambda *a: None)
os.kill(os.getpid(), signal.SIGSTOP)   # until the patch is on its way
child = subprocess.Popen(["sleep", "600"])
print(open(f"/proc/{child.pid}/patch_state").read().strip() == open("/proc/self/patch_state").read().strip())
child.kill()
END
        sleep 600 & S=$!; kill -STOP $S; python3 parent.py & P=$!
        until_ "grep -q ' T ' /proc/$S/stat && grep -q ' T ' /proc/$P/stat"
        insmod stop.ko; state $P; kill -CONT $P; wait $P
        (sleep 600 & state $!; kill $!)
        """,
        cwd=tmp_path,
    )
    assert out == ["0", "True", "1"]


def test_threads_are_tasks_of_their_own(tmp_path: Path) -> None:
    build(tmp_path, patch("nap", "hrtimer_nanosleep"))
    out = script(
        LIB
        + """
        python3 -c "import threading, time
t = threading.Thread(target=time.sleep, args=(600,), daemon=True); t.start()
open('tid', 'w').write(str(t.native_id)); input()" < <(sleep 600) & P=$!
        until_ "[ -s tid ]"; T=$(cat tid); until_ "grep -q nanosleep /proc/$P/task/$T/stack"
        insmod nap.ko; state $P; state $P/task/$T; state $T; ls /proc | grep -cx $T
        ls /proc/$P/task | wc -l; kill -9 $P; kill $(pgrep sleep)
        until_ '[ "$(transition nap)" = 0 ]'
        """,
        cwd=tmp_path,
    )
    assert [line for line in out if line.isdigit()] == ["1", "0", "0", "0", "2"]


def test_a_process_that_sleeps_in_a_replaced_function(tmp_path: Path) -> None:
    """``cat`` reads a file whose show function is replaced by one that sleeps; undoing the patch waits for it."""
    build(
        tmp_path,
        """
name = "slow"
[[objects]]
[[objects.functions]]
old_name = "cmdline_proc_show"
duration = 3
output = "slow\\n"
""",
    )
    out = script(
        LIB
        + """
        insmod slow.ko; until_ '[ "$(transition slow)" = 0 ]'
        cat /proc/cmdline & C=$!; until_ "grep -q slow /proc/$C/stack"
        grep -o 'cmdline_proc_show.* .slow.$' /proc/$C/stack | sed 's/+.*/ in the patch/'; cat /proc/$C/wchan; echo
        echo 0 > /sys/kernel/livepatch/slow/enabled; transition slow; state $C; state $$
        wait $C; until_ '[ ! -e /sys/kernel/livepatch/slow ]'; echo gone
        """,
        cwd=tmp_path,
    )
    assert out[0].endswith("cmdline_proc_show in the patch")
    assert out[2:] == ["1", "1", "0", "slow", "gone"]


def test_emulated_tasks_and_signals(tmp_path: Path) -> None:
    out = script(
        """
        kill -0 2; echo $?; kill -9 2; echo $?; kill -0 250; echo $?; cat /proc/2/comm
        setpriv --reuid 65534 --clear-groups sh -c 'kill -9 2' ; echo $?
        unshare -fp --mount-proc sh -c 'sleep 600 & kill -9 $! && wait $!; echo $! $?'
        python3 - <<'END'
import os, signal
fd = os.pidfd_open(2)
print(signal.pidfd_send_signal(fd, 0), end=" ")
other = os.fork()
if other == 0:
    signal.pause()
fd2 = os.pidfd_open(other)
signal.pidfd_send_signal(fd2, signal.SIGKILL)
print(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]), end=" ")
try:
    os.pidfd_open(250)
except ProcessLookupError as err:
    print(err.errno)
END
        """,
        cwd=tmp_path,
    )
    assert [line for line in out if line and "kill:" not in line and line != "Killed"] == [
        "0",
        "0",
        "1",
        "kthreadd",
        "1",
        "2 137",
        "None -9 3",
    ]


def test_a_replaced_system_call(tmp_path: Path) -> None:
    build(
        tmp_path,
        """
name = "pid"
[[objects]]
[[objects.functions]]
old_name = "__x64_sys_getpid"
ret = 4242
""",
    )
    out = script(
        LIB
        + """
        pid() { python3 -c 'import os; print(os.getpid())'; }
        [ $(pid) -lt 400 ] && echo real
        insmod pid.ko; until_ '[ "$(transition pid)" = 0 ]'; pid
        echo 0 > /sys/kernel/livepatch/pid/enabled; until_ '[ ! -e /sys/kernel/livepatch/pid ]'
        [ $(pid) -lt 400 ] && echo real
        """,
        cwd=tmp_path,
    )
    assert out == ["real", "4242", "real"]


def test_other_system_calls_can_be_named(tmp_path: Path) -> None:
    build(tmp_path, patch("ppid", "__x64_sys_getppid").replace('log = "ppid"', "ret = -1"))
    out = script(
        "insmod ppid.ko; python3 -c 'import os; print(os.getpid() > 1, os.getppid())'",
        cwd=tmp_path,
        options=("--trap", "getpid,getppid"),
    )
    assert out == ["True -1"]
    assert "getppid" in ABIS[AUDIT_ARCH_X86_64]


SLOW = r"""
struct klp_func { const char *old_name; void *new_func; u64 old_sympos; char pad[128]; };
struct klp_object { const char *name; struct klp_func *funcs; char pad[152]; };
struct klp_patch { struct module *mod; struct klp_object *objs; void *states; char pad[176]; };
INFO(livepatch, "Y")
int klp_enable_patch(struct klp_patch *); void seq_printf(void *, const char *, ...);
int show(void *m, void *v) { msleep(2500); seq_printf(m, "slow\n"); return 0; }
struct klp_func funcs[] = { { "cmdline_proc_show", show }, {} };
struct klp_object objs[] = { { NULL, funcs }, {} };
struct klp_patch patch = { &__this_module, objs };
int init_module(void) { return klp_enable_patch(&patch); }
void cleanup_module(void) {}
"""


def test_a_process_in_code_of_a_module_stalls_and_shows_where(tmp_path: Path) -> None:
    (tmp_path / "slow.ko").write_bytes(cpu_support.build("slow", SLOW, release=release()))
    out = script(
        LIB
        + """
        insmod slow.ko; until_ '[ "$(transition slow)" = 0 ]'
        bash -c 'cat < /proc/cmdline; kill -STOP $$; true' & P=$!
        until_ 'pgrep -P $P cat >/dev/null'; C=$(pgrep -P $P cat)
        until_ "grep -q msleep /proc/$C/wchan"
        head -2 /proc/$C/stack | sed 's,/.*,,; s,show+.*,show,'; grep -c fuse /proc/$C/stack
        echo 0 > /sys/kernel/livepatch/slow/enabled; transition slow; state $C; state $$
        until_ '[ ! -e /sys/kernel/livepatch/slow ]'
        until_ "grep -q ' T ' /proc/$P/stat"; grep -c msleep /proc/$P/stack; kill -CONT $P
        """,
        cwd=tmp_path,
    )
    assert out == ["[<0>] msleep+0x10", "[<0>] show", "0", "1", "1", "0", "slow", "0"]


def test_a_process_that_ran_code_of_a_module_stalls_in_the_kernel_as_before(tmp_path: Path) -> None:
    (tmp_path / "slow.ko").write_bytes(cpu_support.build("slow", SLOW.replace("2500", "1"), release=release()))
    build(tmp_path, patch("stop", "do_signal_stop"))
    out = script(
        LIB
        + """
        insmod slow.ko; until_ '[ "$(transition slow)" = 0 ]'
        bash -c 'read -r LINE < /proc/cmdline; echo $LINE; kill -STOP $$; true' & P=$!
        until_ "grep -q ' T ' /proc/$P/stat"
        insmod stop.ko; transition stop; state $P; kill -CONT $P
        until_ '[ "$(transition stop)" = 0 ]'
        """,
        cwd=tmp_path,
    )
    assert out == ["slow", "1", "0"]


def test_killing_a_process_that_sleeps_in_code_of_a_module_ends_the_stall(tmp_path: Path) -> None:
    source = SLOW.replace("msleep(2500)", "msleep_interruptible(600000)")
    (tmp_path / "slow.ko").write_bytes(cpu_support.build("slow", source, release=release()))
    out = script(
        LIB
        + """
        insmod slow.ko; until_ '[ "$(transition slow)" = 0 ]'
        cat < /proc/cmdline & P=$!
        until_ "grep -q msleep_interruptible /proc/$P/wchan"
        echo 0 > /sys/kernel/livepatch/slow/enabled; sleep 1.5; transition slow
        kill $P; until_ '[ ! -e /sys/kernel/livepatch/slow ]'; wait $P; echo $?
        """,
        cwd=tmp_path,
    )
    assert out == ["1", "143"]
