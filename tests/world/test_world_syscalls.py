"""The supervised system calls, made by a statically linked C program that uses no library around them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from world_support import build, patch, script, world

SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#define SAY(call) do { errno = 0; long r = (call); \
    printf("%s = %ld %s\n", #call, r, r < 0 ? strerrorname_np(errno) : ""); fflush(stdout); } while (0)
static long init_module(const void *p, unsigned long n, const char *a) { return syscall(SYS_init_module, p, n, a); }
static long finit_module(int fd, const char *a, int f) { return syscall(SYS_finit_module, fd, a, f); }
static long delete_module(const char *n, unsigned f) { return syscall(SYS_delete_module, n, f); }
static char *image; static size_t size;

static void load(const char *path) {
    int fd = open(path, O_RDONLY); struct stat st; fstat(fd, &st); size = st.st_size;
    image = mmap(0, size, PROT_READ, MAP_PRIVATE, fd, 0); close(fd);
}

static void errors(void) {
    char *bad = (char *)16;
    int null = open("/dev/null", O_RDWR), dir = open(".", O_RDONLY), wo = open("w", O_WRONLY | O_CREAT, 0600);
    SAY(init_module(image, 63, ""));
    SAY(init_module(bad, 4096, ""));
    SAY(init_module(image, size, bad));
    SAY(finit_module(-1, "", 0));
    SAY(finit_module(null, "", 0));
    SAY(finit_module(dir, "", 0));
    SAY(finit_module(wo, "", 0));
    SAY(finit_module(null, "", 64));
    SAY(delete_module("nosuch", 0));
    SAY(delete_module("", 0));
    SAY(delete_module(bad, 0));
    SAY(delete_module("a_name_that_is_longer_than_a_module_name_may_be_in_the_kernel", 0));
    SAY(syscall(SYS_uname, bad));
}

static void life(const char *name) {
    SAY(init_module(image, size, "") == 0);
    SAY(init_module(image, size, ""));
    SAY(delete_module(name, O_NONBLOCK));
    SAY(delete_module(name, O_NONBLOCK | O_TRUNC));
}

static void logging(void) {
    char buf[4096]; memset(buf, 0, sizeof buf);
    SAY(klogctl(10, 0, 0) > 1000);
    SAY(klogctl(5, 0, 0));
    SAY(klogctl(3, buf, sizeof buf));
    int fd = open("/dev/kmsg", O_RDWR | O_NONBLOCK);
    SAY(write(fd, "<5>hello\n", 9));
    SAY(klogctl(3, buf, sizeof buf) > 20 && strstr(buf, "hello") != NULL);
    SAY(klogctl(4, buf, sizeof buf) > 20);
    SAY(klogctl(3, buf, sizeof buf));
    SAY(klogctl(8, 0, 9));
    SAY(klogctl(11, 0, 0));
    SAY(klogctl(2, (char *)16, 10));
    SAY(lseek(fd, 0, SEEK_END));
    SAY(read(fd, buf, sizeof buf));
    SAY(lseek(fd, 0, SEEK_DATA));
    SAY(read(fd, buf, sizeof buf));
    SAY(lseek(fd, 0, SEEK_SET));
    SAY(read(fd, buf, sizeof buf) > 10);
    int other = open("w", O_RDWR | O_CREAT, 0600);
    SAY(write(other, "abc", 3));
    SAY(lseek(other, 0, SEEK_END));
    SAY(lseek(other, 1, SEEK_DATA));
}

static void nothing(int sig) { (void)sig; }

static void blocked(void) {
    char buf[4096]; struct sigaction sa = { .sa_handler = nothing }; sigaction(SIGALRM, &sa, 0);
    while (klogctl(9, 0, 0)) klogctl(2, buf, sizeof buf);
    struct itimerval t = { .it_value = { .tv_usec = 200000 } };
    setitimer(ITIMER_REAL, &t, 0);
    SAY(klogctl(2, buf, sizeof buf));
    int fd = open("/dev/kmsg", O_RDONLY); lseek(fd, 0, SEEK_END);
    setitimer(ITIMER_REAL, &t, 0);
    SAY(read(fd, buf, sizeof buf));
    pid_t child = fork();
    if (child == 0) { read(fd, buf, sizeof buf); _exit(0); }
    usleep(200000); kill(child, SIGKILL); int status;
    waitpid(child, &status, 0);
    SAY(WTERMSIG(status));
}

/* signals during a long load must neither break it nor start it again */
static void storm(void) {
    struct sigaction sa = { .sa_handler = nothing, .sa_flags = SA_RESTART }; sigaction(SIGALRM, &sa, 0);
    struct itimerval t = { .it_value = { .tv_usec = 1000 }, .it_interval = { .tv_usec = 1000 } };
    setitimer(ITIMER_REAL, &t, 0);
    SAY(init_module(image, size, ""));
    t.it_value.tv_usec = 0; setitimer(ITIMER_REAL, &t, 0);
}

static void *one(void *arg) { (void)arg; struct utsname u; for (int i = 0; i < 200; i++) uname(&u); return 0; }

static void parallel(void) {
    pthread_t t[8];
    for (int i = 0; i < 8; i++) pthread_create(&t[i], 0, one, 0);
    for (int i = 0; i < 8; i++) pthread_join(t[i], 0);
    puts("joined");
}

int main(int argc, char **argv) {
    if (argc > 2) load(argv[2]);
    if (!strcmp(argv[1], "errors")) errors();
    if (!strcmp(argv[1], "life")) life(argv[3]);
    if (!strcmp(argv[1], "log")) logging();
    if (!strcmp(argv[1], "blocked")) blocked();
    if (!strcmp(argv[1], "storm")) storm();
    if (!strcmp(argv[1], "parallel")) parallel();
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, without any shared library."""
    where = tmp_path_factory.mktemp("static")
    (where / "calls.c").write_text(SOURCE)
    assert shutil.which("gcc"), "the tests need gcc"
    subprocess.run(["gcc", "-static", "-O1", "-w", "-o", where / "calls", where / "calls.c"], check=True)
    return where / "calls"


def test_errors(program: Path, tmp_path: Path) -> None:
    build(tmp_path, "cmdline")
    out = world(str(program), "errors", "livepatch_cmdline.ko", cwd=tmp_path).stdout.splitlines()
    assert [line.rpartition("= ")[2] for line in out] == [
        "-1 ENOEXEC",
        "-1 EFAULT",
        "-1 EFAULT",
        "-1 EBADF",
        "-1 EINVAL",
        "-1 EINVAL",
        "-1 EBADF",
        "-1 EINVAL",
        "-1 ENOENT",
        "-1 ENOENT",
        "-1 EFAULT",
        "-1 ENOENT",
        "-1 EFAULT",
    ]


def test_life(program: Path, tmp_path: Path) -> None:
    build(tmp_path, "busy", patch("own", "cmdline_proc_show", "x"))
    out = world(str(program), "life", "busy.ko", "busy", cwd=tmp_path).stdout.splitlines()
    assert [line.rpartition("= ")[2] for line in out] == ["1 ", "-1 EEXIST", "0 ", "-1 ENOENT"]
    out = world(str(program), "life", "own.ko", "own", cwd=tmp_path).stdout.splitlines()
    assert [line.rpartition("= ")[2] for line in out][:3] == ["1 ", "-1 EEXIST", "-1 EAGAIN"]


def test_log(program: Path, tmp_path: Path) -> None:
    out = world(str(program), "log", cwd=tmp_path).stdout.splitlines()
    assert [line.rpartition("= ")[2] for line in out] == [
        "1 ",
        "0 ",
        "0 ",
        "9 ",
        "1 ",
        "1 ",
        "0 ",
        "-1 EINVAL",
        "-1 EINVAL",
        "-1 EFAULT",
        "0 ",
        "-1 EAGAIN",
        "0 ",
        "-1 EAGAIN",
        "0 ",
        "1 ",
        "3 ",
        "3 ",
        "1 ",
    ]


def test_blocked_readers_can_be_interrupted_and_killed(program: Path, tmp_path: Path) -> None:
    out = world(str(program), "blocked", cwd=tmp_path).stdout.splitlines()
    assert [line.rpartition("= ")[2] for line in out] == ["-1 EINTR", "-1 EINTR", "9 "]


def test_signals_during_a_load(program: Path, tmp_path: Path) -> None:
    build(tmp_path, 'name = "long"\nkind = "module"\n[init]\nduration = 1\nlog = "ready"\n')
    out = script(f"{program} storm long.ko; lsmod | wc -l; dmesg | grep -c ready", cwd=tmp_path)
    assert out == ['init_module(image, size, "") = 0 ', "2", "1"]


def test_a_caller_that_is_killed_harms_nobody(program: Path, tmp_path: Path) -> None:
    build(tmp_path, 'name = "long"\nkind = "module"\n[init]\nduration = 1\n', "cmdline")
    out = script(
        """
        insmod long.ko & I=$!; sleep .3; kill -9 $I; wait $I 2> /dev/null; echo $?
        insmod livepatch_cmdline.ko; lsmod | sort | awk '{print $1}'
        sleep 1.2; cat /sys/module/long/initstate; rmmod long; echo $?
        """,
        cwd=tmp_path,
    )
    assert out == ["137", "Module", "livepatch_cmdline", "long", "live", "0"]


def test_callers_do_not_wait_for_one_another(program: Path, tmp_path: Path) -> None:
    build(tmp_path, *(f'name = "long{i}"\nkind = "module"\n[init]\nduration = 1\n' for i in range(4)))
    out = script(
        f"""
        start=$(date +%s%N)
        for i in 0 1 2 3; do insmod long$i.ko & done
        {program} parallel; cat /sys/module/long0/initstate
        wait; lsmod | wc -l; echo $(( ($(date +%s%N) - start) / 1000000 < 3000 ))
        """,
        cwd=tmp_path,
    )
    assert out == ["joined", "coming", "5", "1"]


def test_compressed_modules(tmp_path: Path) -> None:
    build(tmp_path, "busy", "params")
    out = script(
        """
        xz --check=crc32 busy.ko; gzip params_demo.ko
        insmod busy.ko.xz && lsmod | wc -l; rmmod busy
        python3 - <<'END'
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name in ("busy.ko.xz", "params_demo.ko.gz", "/etc/hostname"):
    fd = os.open(name, os.O_RDONLY)
    print(libc.syscall(313, fd, b"", 4), os.strerror(ctypes.get_errno()) if name[0] == "/" else "")
END
        lsmod | wc -l
        """,
        cwd=tmp_path,
    )
    # the kernel unpacks what it was configured for, which is xz
    assert out == ["2", "0 ", "-1 ", "-1 Invalid argument", "2"]


def test_concurrent_loads_of_one_file_are_one_load(tmp_path: Path) -> None:
    """finit_module(2) gives all of them the result of the first; init_module(2) of the same module does not."""
    build(tmp_path, 'name = "long"\nkind = "module"\n[init]\nduration = 1\nlog = "ready"\n')
    (tmp_path / "fail").mkdir()
    build(tmp_path / "fail", 'name = "sour"\nkind = "module"\n[init]\nduration = 1\nret = -12\n')
    out = script(
        """
        for i in 1 2 3; do insmod long.ko & pids="$pids $!"; done
        for pid in $pids; do wait $pid; echo $?; done
        dmesg | grep -c ready; insmod long.ko
        insmod fail/sour.ko & insmod fail/sour.ko & wait
        """,
        cwd=tmp_path,
        check=False,
    )
    sour = "insmod: ERROR: could not insert module fail/sour.ko: Cannot allocate memory"
    assert out == [
        *("0", "0", "0", "1"),
        "insmod: ERROR: could not insert module long.ko: File exists",
        *(sour, sour),
    ]


def test_a_file_that_somebody_may_write_to(tmp_path: Path) -> None:
    build(tmp_path, "cmdline")
    out = script(
        """
        exec 3>> livepatch_cmdline.ko; insmod livepatch_cmdline.ko; exec 3>&-
        insmod livepatch_cmdline.ko; echo $?
        """,
        cwd=tmp_path,
    )
    assert out == ["insmod: ERROR: could not insert module livepatch_cmdline.ko: Text file busy", "0"]


def test_bytes_of_parameters_and_names(tmp_path: Path) -> None:
    build(tmp_path, 'name = "told"\nkind = "module"\n[[params]]\nname = "text"\ntype = "charp"\nperm = "0644"\n')
    out = script(
        r"""
        for text in é $'\xff\xc3'; do
            insmod told.ko text=$text; od -An -tx1 /sys/module/told/parameters/text; rmmod told
        done
        """,
        cwd=tmp_path,
    )
    assert out == [" c3 a9 0a", " ff c3 0a"]


POLL = """
import os, select, subprocess, sys, threading
how = sys.argv[1]
fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
os.lseek(fd, 0, os.SEEK_END)
if how == "epoll":
    poll = select.epoll()
    poll.register(fd, select.EPOLLIN)
    wait = lambda: [event for _, event in poll.poll(20)]
else:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    wait = lambda: [event for _, event in poll.poll(20000)]
for text in ("one", "two"):
    threading.Timer(0.2, lambda: subprocess.run(f"echo {text} > /dev/kmsg", shell=True)).start()
    print(wait(), os.read(fd, 8192).partition(b";")[2])
subprocess.run("echo three > /dev/kmsg", shell=True)
print(wait(), os.lseek(fd, 0, os.SEEK_END), poll.poll(0))
subprocess.run("echo four > /dev/kmsg", shell=True)
print(os.read(fd, 8192).partition(b";")[2])
"""


@pytest.mark.parametrize("how", ["poll", "epoll"])
def test_polling_the_log(how: str) -> None:
    out = world("python3", "-c", POLL, how).stdout.splitlines()
    assert out == ["[1] b'one\\n'", "[1] b'two\\n'", "[1] 0 []", "b'four\\n'"]


def test_threads_with_descriptors_of_their_own(tmp_path: Path) -> None:
    """A descriptor is one of the calling thread, whatever its process has under that number."""
    build(tmp_path, "cmdline")
    code = """
import ctypes, os, threading
libc = ctypes.CDLL(None, use_errno=True)
def thread():
    libc.unshare(0x400)  # CLONE_FILES
    fd = os.open("livepatch_cmdline.ko", os.O_RDONLY)
    print(libc.syscall(313, fd, b"", 0), os.strerror(ctypes.get_errno()))
    kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    print(os.lseek(kmsg, 0, os.SEEK_END))
worker = threading.Thread(target=thread)
worker.start()
worker.join()
"""
    assert world("python3", "-c", code, cwd=tmp_path).stdout.splitlines() == ["0 Success", "0"]
