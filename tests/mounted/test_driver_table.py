"""The table of what kernfs answers, through real system calls, on both drivers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import stat
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from driver_support import Server, bash, python_as, refused, serving

RO, WO, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR


def read(path: Path) -> bytes:
    fd = os.open(path, RO)
    try:
        return os.read(fd, 1 << 17)
    finally:
        os.close(fd)


# -- attributes --------------------------------------------------------------------------------------------------------


def test_stat(toy: Server) -> None:
    for name, mode in (("enabled", 0o644), ("force", 0o200), ("transition", 0o444)):
        st = os.stat(toy.path / "attrs" / name)
        assert (stat.S_IMODE(st.st_mode), st.st_size, st.st_nlink, st.st_uid, st.st_gid) == (mode, 4096, 1, 0, 0)
        assert (st.st_blocks, st.st_blksize, stat.S_ISREG(st.st_mode)) == (0, 4096, True)
    for name, links in (("attrs/vmlinux/func,1", 2), ("attrs/vmlinux", 3), ("attrs", 3), ("", 7)):
        st = os.stat(toy.path / name)
        assert (st.st_mode, st.st_size, st.st_nlink, st.st_blocks) == (0o40755, 0, links, 0)
    assert os.stat(toy.path / "seq/text").st_size == 0
    assert os.stat(toy.path).st_ino == 1


def test_stat_follows_additions_and_removals(toy: Server) -> None:
    storm = toy.path / "storm"
    assert os.stat(storm).st_nlink == 2
    before = os.stat(storm).st_mtime_ns
    toy.call("mkdir", "storm/a")
    toy.call("mkdir", "storm/b")
    assert os.stat(storm).st_nlink == 4
    assert os.stat(storm).st_mtime_ns > before
    assert sorted(os.listdir(storm)) == ["a", "b"]
    toy.call("rm", "storm/a")
    assert os.stat(storm).st_nlink == 3
    assert os.listdir(storm) == ["b"]
    assert not (storm / "a").exists()
    toy.call("mkdir", "storm/a")  # a name that was looked up in vain is found once it exists
    assert (storm / "a/enabled").exists()


@pytest.mark.parametrize(("name", "flags"), [("force", RO), ("force", RW), ("transition", WO), ("transition", RW)])
def test_modes_hold_for_root(toy: Server, name: str, flags: int) -> None:
    assert os.access(toy.path / "attrs" / name, os.R_OK | os.W_OK) or os.geteuid() != 0
    with refused(errno.EACCES):
        os.open(toy.path / "attrs" / name, flags)


def test_what_is_not_sysfs_opens_for_root(toy: Server) -> None:
    assert read(toy.path / "seq/private") == b"0\n"
    fd = os.open(toy.path / "seq/private", RW)
    with refused(errno.EIO):
        os.write(fd, b"x")
    os.close(fd)


def test_reading(toy: Server) -> None:
    assert (toy.path / "attrs/enabled").read_bytes() == b"1\n"
    assert len(read(toy.path / "attrs/long")) == 4095
    assert (toy.path / "seq/text").read_bytes() == bytes(range(250)) * 1200
    assert (toy.path / "seq/slow").read_bytes() == b"slow\n" * 1000
    attr = toy.path / "attrs/enabled"
    script = f"cat {attr}; tail -n1 {attr}; head -c1 {attr}; dd if={attr} bs=1 skip=1 status=none; wc -c < {attr}"
    assert bash(script) == (0, "1\n1\n1\n2\n")
    assert bash(f"dd if={attr} bs=1 skip=10 status=none") == (0, "")
    assert bash(f"grep -c . {attr}; od -An -c {attr}; readlink {attr}; echo $?")[1] == "1\n   1  \\n\n1\n"


def test_snapshots(toy: Server) -> None:
    fd = os.open(toy.path / "attrs/counter", RO)
    assert [os.read(fd, 1), os.read(fd, 1), os.read(fd, 1)] == [b"1", b"\n", b""]
    assert os.pread(fd, 10, 0) == b"2\n"
    assert os.pread(fd, 10, 1) == b"\n"  # elsewhere: shown afresh
    assert os.pread(fd, 10, 0) == b"4\n"
    assert os.pread(fd, 10, 50) == b""
    os.lseek(fd, 0, os.SEEK_SET)
    assert os.read(fd, 10) == b"6\n"
    assert os.read(fd, 10) == b""
    os.close(fd)
    assert bash(f"exec 3<{toy.path}/attrs/counter; read -u3 x; echo $x") == (0, "7\n")


def test_empty_writes_store_nothing(toy: Server) -> None:
    fd = os.open(toy.path / "attrs/enabled", WO)
    assert os.write(fd, b"") == 0
    os.close(fd)
    assert bash(f"printf '' > {toy.path}/attrs/enabled; : > {toy.path}/attrs/force; : >> {toy.path}/attrs/enabled") == (
        0,
        "",
    )
    assert toy.call("stores") == []


def test_truncation_changes_nothing(toy: Server) -> None:
    attr = toy.path / "attrs/enabled"
    os.close(os.open(attr, RO | os.O_TRUNC))
    os.truncate(attr, 0)
    os.truncate(attr, 100)
    os.truncate(toy.path / "attrs/transition", 5)
    fd = os.open(attr, WO | os.O_TRUNC)
    os.ftruncate(fd, 7)
    os.close(fd)
    assert os.stat(attr).st_size == 4096
    assert read(attr) == b"1\n"
    assert bash(f"truncate -s 0 {attr}; truncate -s 100 {attr}") == (0, "")
    assert toy.call("stores") == []


def test_writes_are_one_store_each(toy: Server) -> None:
    attr = toy.path / "attrs/enabled"
    assert bash(f"echo 0 > {attr}; echo 1 >> {attr}; printf 0 > {attr}") == (0, "")
    assert toy.call("stores") == [["enabled", "0\n"], ["enabled", "1\n"], ["enabled", "0"]]
    assert bash(f"dd if=<(printf '10\n') of={attr} bs=1 conv=notrunc status=none") == (0, "")
    assert toy.call("stores") == [["enabled", "1"], ["enabled", "0"], ["enabled", "\n"]]
    fd = os.open(attr, RW)
    assert os.pwrite(fd, b"1", 12345) == 1
    assert os.pread(fd, 10, 0) == b"1\n"
    os.close(fd)
    assert os.stat(attr).st_size == 4096
    assert toy.call("stores") == [["enabled", "1"]]


def test_writes_beyond_a_page(toy: Server) -> None:
    fd = os.open(toy.path / "attrs/enabled", WO)
    assert os.write(fd, b" " * 4096) == 4096
    assert os.write(fd, b" " * 4097) == 4096
    assert os.write(fd, b" " * 300_000) == 4096
    os.close(fd)
    assert [len(data) for _, data in toy.call("stores")] == [4096, 4096, 4096]
    assert bash(f"head -c 5000 /dev/zero | tr '\\0' ' ' > {toy.path}/attrs/enabled")[0] == 0
    assert [len(data) for _, data in toy.call("stores")] == [4096, 904]
    fd = os.open(toy.path / "seq/rw", WO)
    assert os.write(fd, b" " * 100_000) == 100_000
    os.close(fd)
    assert toy.call("stores") == [["rw", "100000", str(os.getpid()), "0"]]


def test_the_store_has_the_last_word(toy: Server) -> None:
    fd = os.open(toy.path / "attrs/enabled", WO)
    assert os.write(fd, b"p1") == 1
    for number in (errno.EINVAL, errno.EBUSY, errno.EPERM, errno.ENOENT):
        with refused(number):
            os.write(fd, b"e%d" % number)
    os.close(fd)
    status, said = bash(f"echo e16 > {toy.path}/attrs/enabled")
    assert (status, said.rpartition(": ")[2]) == (1, "Device or resource busy\n")
    with refused(errno.EBUSY):
        read(toy.path / "attrs/busy")


# -- what nobody may do ------------------------------------------------------------------------------------------------


def test_the_tree_cannot_be_changed(toy: Server) -> None:
    attrs = toy.path / "attrs"
    for call in (
        lambda: os.mkdir(attrs / "x"),
        lambda: os.mkdir(toy.path / "x"),
        lambda: os.rmdir(attrs / "vmlinux"),
        lambda: os.rmdir(attrs),
        lambda: os.unlink(attrs / "enabled"),
        lambda: os.rename(attrs / "enabled", attrs / "on"),
        lambda: os.rename(attrs / "enabled", toy.path / "on"),
        lambda: os.link(attrs / "enabled", attrs / "l"),
        lambda: os.symlink("x", attrs / "l"),
        lambda: os.mkfifo(attrs / "f"),
        lambda: os.unlink(toy.path / "links/rel"),
    ):
        with refused(errno.EPERM):
            call()
    for flags in (WO, RW, RO):
        with refused(errno.EACCES):
            os.open(attrs / "new", flags | os.O_CREAT)
    with refused(errno.EEXIST):
        os.open(attrs / "enabled", WO | os.O_CREAT | os.O_EXCL)
    with refused(errno.EEXIST):
        os.mkdir(attrs / "vmlinux")
    with refused(errno.EXDEV):
        os.link(attrs / "enabled", "/tmp/klpfs-link")
    with refused(errno.EACCES):  # a regular file: mknod(2) does what creat(2) does
        os.mknod(attrs / "n", stat.S_IFREG | 0o600)
    with refused(errno.EPERM):
        os.mkfifo(attrs / "n")
    os.close(os.open(attrs / "enabled", WO | os.O_CREAT | os.O_TRUNC, 0o600))
    assert stat.S_IMODE(os.stat(attrs / "enabled").st_mode) == 0o644
    status, said = bash(f"touch {attrs}/new; mkdir {attrs}/x; rm -f {attrs}/enabled; mv {attrs}/enabled {attrs}/on")
    assert [line.rpartition(": ")[2] for line in said.splitlines()] == [
        "Permission denied",
        "Operation not permitted",
        "Operation not permitted",
        "Operation not permitted",
    ]
    assert status == 1
    status, said = bash(f"cat {attrs}; echo 0 > {attrs}; {attrs}/enabled")
    assert [line.rpartition(": ")[2] for line in said.splitlines()] == [
        "Is a directory",
        "Is a directory",
        "Permission denied",
    ]
    assert status == 126


def test_changed_attributes_last_as_long_as_the_directory(toy: Server) -> None:
    toy.call("mkdir", "storm/p")
    attr = toy.path / "storm/p/enabled"
    os.chmod(attr, 0o600)
    os.chown(attr, 1, 2)
    os.chown(attr, -1, 3)
    os.utime(attr, ns=(10**18, 2 * 10**18))
    st = os.stat(attr)
    assert (st.st_mode, st.st_uid, st.st_gid) == (0o100600, 1, 3)
    assert (st.st_atime_ns, st.st_mtime_ns) == (10**18, 2 * 10**18)
    os.utime(attr)
    assert abs(os.stat(attr).st_mtime - time.time()) < 60
    assert bash(f"touch -a -d @1000 {attr}; touch -m -d @2000 {attr}; stat -c '%X %Y' {attr}; touch {attr}") == (
        0,
        "1000 2000\n",
    )
    os.chmod(toy.path / "storm/p", 0o700)
    assert stat.S_IMODE(os.stat(toy.path / "storm/p").st_mode) == 0o700
    toy.call("rm", "storm/p")
    toy.call("mkdir", "storm/p")
    st = os.stat(attr)
    assert (st.st_mode, st.st_uid, st.st_gid) == (0o100644, 0, 0)
    assert stat.S_IMODE(os.stat(toy.path / "storm/p").st_mode) == 0o755


def test_odd_calls(toy: Server) -> None:
    attr = toy.path / "attrs/enabled"
    with refused(errno.EINVAL):
        os.open(attr, RO | os.O_DIRECT)
    for name in ("user.x", "security.selinux", "system.posix_acl_access", "trusted.x"):
        with refused(errno.ENODATA, *([errno.EOPNOTSUPP] if "acl" in name else [])):
            os.getxattr(attr, name)
    assert os.listxattr(attr) == []
    assert os.listxattr(toy.path / "attrs") == []
    for flags in (0, os.XATTR_CREATE):
        with refused(errno.EOPNOTSUPP):
            os.setxattr(attr, "user.x", b"1", flags)
    with refused(errno.ENODATA):
        os.removexattr(attr, "user.x")
    fs = os.statvfs(attr)
    assert (fs.f_bsize, fs.f_blocks, fs.f_files, fs.f_namemax) == (4096, 0, 0, 255)
    fd = os.open(attr, RW)
    os.fsync(fd)
    os.fdatasync(fd)
    with refused(errno.ENOTTY):
        fcntl.ioctl(fd, termios.TCGETS, b"\0" * 64)
    with refused(errno.ENODEV):
        mmap.mmap(fd, 2, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    fd = os.open(toy.path / "attrs", RO | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def test_listings(toy: Server) -> None:
    assert bash(f"ls -aU {toy.path}/attrs/vmlinux | sort | xargs") == (0, ". .. func,1 patched\n")
    with os.scandir(toy.path / "attrs") as entries:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    assert kinds["vmlinux"]
    assert not kinds["enabled"]
    inodes = {entry.name: entry.inode() for entry in os.scandir(toy.path / "attrs")}
    assert inodes == {name: os.stat(toy.path / "attrs" / name).st_ino for name in inodes}
    for i in range(300):  # more than one reply can hold
        toy.call("mkdir", f"storm/{i:0100}")
    assert len(os.listdir(toy.path / "storm")) == 300
    assert bash(f"find {toy.path}/storm | wc -l") == (0, f"{1 + 300 * 7}\n")
    with refused(errno.ENOTDIR):
        os.listdir(toy.path / "attrs/enabled")
    with refused(errno.ENAMETOOLONG):
        os.stat(toy.path / ("x" * 256))
    with refused(errno.ENOENT):
        os.stat(os.fsencode(toy.path) + b"/\xff\xfe")


def test_links(toy: Server) -> None:
    assert os.readlink(toy.path / "links/rel") == "../attrs/enabled"
    assert (toy.path / "links/rel").read_bytes() == b"1\n"
    assert os.readlink(toy.path / "links/me") == f"pid-{os.getpid()}"
    assert bash(f"readlink {toy.path}/links/me")[1] != f"pid-{os.getpid()}\n"
    st = os.lstat(toy.path / "links/rel")
    assert (st.st_mode, st.st_size, st.st_nlink) == (0o120777, 16, 1)


def test_dynamic_directories(toy: Server) -> None:
    dyn = toy.path / "dyn"
    assert os.listdir(dyn) == []
    toy.call("dyn", ["1", "2"])
    assert sorted(os.listdir(dyn)) == ["1", "2"]
    assert (dyn / "1/state").read_bytes() == b"1\n"
    assert os.listdir(dyn / "1") == ["state"]
    fd = os.open(dyn / "1/state", RO)
    toy.call("dyn", ["2", "3"])
    assert sorted(os.listdir(dyn)) == ["2", "3"]
    assert not (dyn / "1").exists()
    assert not (dyn / "1/state").exists()
    assert (dyn / "3/state").read_bytes() == b"3\n"
    assert os.pread(fd, 10, 0) == b"1\n"  # whether it still answers is up to the file
    os.close(fd)


# -- removal -----------------------------------------------------------------------------------------------------------


def test_held_across_removal(toy: Server) -> None:
    toy.call("mkdir", "storm/p")
    attr = toy.path / "storm/p/enabled"
    fd, unread, part = os.open(attr, RW), os.open(attr, RW), os.open(attr, RO)
    directory = os.open(toy.path / "storm/p", RO | os.O_DIRECTORY)
    assert os.read(fd, 10) == b"1\n"
    assert os.read(part, 1) == b"1"
    assert set(os.listdir(directory)) == {"enabled", "force", "transition", "vmlinux"}
    toy.call("rm", "storm/p")
    for call in (
        lambda: os.read(fd, 10),
        lambda: os.pread(fd, 10, 0),
        lambda: os.write(fd, b"0"),
        lambda: os.read(unread, 10),
        lambda: os.write(unread, b"0"),
    ):
        with refused(errno.ENODEV):
            call()
    assert os.read(part, 10) == b"\n"  # it had been shown before
    assert os.fstat(fd).st_size == 4096
    assert os.listdir(directory) == []
    for path in (attr, toy.path / "storm/p", toy.path / "storm/p/vmlinux/patched"):
        with refused(errno.ENOENT):
            os.stat(path)
    with refused(errno.ENOENT):
        os.open("enabled", RO, dir_fd=directory)
    assert os.listdir(toy.path / "storm") == []
    assert toy.call("stores") == []
    for each in (fd, unread, part, directory):
        os.close(each)


def test_working_directory_inside_a_removed_one(toy: Server) -> None:
    toy.call("mkdir", "storm/p")
    script = f"""
        cd {toy.path}/storm/p || exit 9
        exec 5<enabled; read -u5 x; echo "fd5: $x"
        echo ready > $FIFO; read < $BACK
        ls; ls -a; cat enabled; pwd; stat -c %F .
        cat <&5
        bash -c 'read -u5 y; echo "rc=$? y=$y"' 2>&1 | tail -n 2 | sed 's/.*: //'
        [ -e {toy.path}/storm/p ]; echo "exists: $?"
        {sys.executable} -I -c 'import os; os.getcwd()' 2>&1 | tail -n 1
    """
    fifo, back = toy.path.parent / "fifo", toy.path.parent / "back"
    os.mkfifo(fifo)
    os.mkfifo(back)
    result: list[tuple[int, str]] = []
    shell = threading.Thread(target=lambda: result.append(bash(script, FIFO=str(fifo), BACK=str(back))))
    shell.start()
    assert fifo.read_text() == "ready\n"
    toy.call("rm", "storm/p")
    back.write_text("go\n")
    shell.join(60)
    assert result == [
        (
            0,
            "fd5: 1\n"
            ".\n..\n"
            "cat: enabled: No such file or directory\n"
            f"{toy.path}/storm/p\n"
            "directory\n"
            "cat: -: No such device\n"
            "No such device\n"
            "rc=1 y=\n"
            "exists: 1\n"
            "FileNotFoundError: [Errno 2] No such file or directory\n",
        )
    ]


def test_a_directory_created_again_is_another_one(toy: Server, driver: str) -> None:
    toy.call("mkdir", "storm/p")
    inside = os.open(toy.path / "storm/p", RO | os.O_DIRECTORY)
    fd = os.open(toy.path / "storm/p/enabled", RO)
    before = os.stat(toy.path / "storm/p").st_ino
    toy.call("rm", "storm/p")
    toy.call("mkdir", "storm/p")
    assert (toy.path / "storm/p/enabled").read_bytes() == b"1\n"
    assert os.stat(toy.path / "storm/p").st_ino != before
    with refused(errno.ENODEV):
        os.read(fd, 10)
    if driver == "pyfuse3":
        with refused(errno.ENOENT):
            os.open("enabled", RO, dir_fd=inside)
    else:
        # libfuse2 tells inodes apart by path, as the driver's documentation says
        os.close(os.open("enabled", RO, dir_fd=inside))
    os.close(fd)
    os.close(inside)


def test_removal_takes_names_back_at_once(toy: Server, driver: str) -> None:
    for _ in range(100):
        toy.call("mkdir", "storm/p")
        assert (toy.path / "storm/p/vmlinux/patched").read_bytes() == b"1\n"
        assert len(os.listdir(toy.path / "storm/p")) == 4
        inside = os.open(toy.path / "storm/p", os.O_PATH)
        toy.call("rm", "storm/p")
        if driver == "pyfuse3":  # libfuse2 leaves the old name until it is looked up
            assert os.readlink(f"/proc/self/fd/{inside}").endswith("/p (deleted)")
        os.close(inside)
        for name in ("", "enabled", "vmlinux", "vmlinux/patched"):
            assert not (toy.path / "storm/p" / name).exists()


def test_inotify_sees_nothing(toy: Server) -> None:
    toy.call("mkdir", "storm/p")
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    everything = 0xFFF & ~(0x1 | 0x10 | 0x20)  # without access, open and close by readers
    for name in ("storm", "storm/p", "storm/p/enabled", "storm/p/vmlinux"):
        assert libc.inotify_add_watch(watch, os.fsencode(toy.path / name), everything) > 0
    fd = os.open(toy.path / "storm/p/enabled", RO)
    toy.call("notify", "storm/p/enabled")
    toy.call("mkdir", "storm/q")
    toy.call("rm", "storm/p")
    toy.call("rm", "storm/q")
    assert os.listdir(toy.path / "storm") == []
    assert not (toy.path / "storm/p").exists()
    os.close(fd)
    with refused(errno.EAGAIN):
        os.read(watch, 4096)
    os.close(watch)


# -- poll --------------------------------------------------------------------------------------------------------------


def test_poll(toy: Server) -> None:
    toy.call("mkdir", "storm/p")
    fd = os.open(toy.path / "storm/p/enabled", RO)
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLPRI)
    assert poller.poll(0) == [(fd, select.POLLIN | select.POLLPRI | select.POLLERR)]
    os.read(fd, 10)
    assert poller.poll(0) == [(fd, select.POLLIN)]
    poller.modify(fd, select.POLLPRI)
    assert poller.poll(50) == []
    toy.call("notify", "storm/p/enabled")
    assert poller.poll(10_000) == [(fd, select.POLLPRI | select.POLLERR)]
    os.pread(fd, 10, 0)
    assert poller.poll(50) == []
    toy.begin("rm", "storm/p")
    assert poller.poll(10_000) == [(fd, select.POLLPRI | select.POLLERR)]
    toy.finish()
    os.close(fd)


def test_epoll_wakes_on_a_notification(toy: Server) -> None:
    fd = os.open(toy.path / "attrs/enabled", RO)
    os.read(fd, 10)
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLPRI)
        assert epoll.poll(0.05) == []
        for _ in range(3):
            toy.call("notify", "attrs/enabled")
            assert epoll.poll(10) == [(fd, select.EPOLLPRI | select.EPOLLERR)]
            os.pread(fd, 10, 0)
            assert epoll.poll(0.02) == []
    os.close(fd)


# -- errors, other users -----------------------------------------------------------------------------------------------


def test_a_bug_is_logged_and_answered_eio(toy: Server) -> None:
    for _ in range(3):
        with refused(errno.EIO):
            read(toy.path / "attrs/bug")
        fd = os.open(toy.path / "attrs/bug", WO)
        with refused(errno.EIO):
            os.write(fd, b"x")
        os.close(fd)
    assert read(toy.path / "attrs/enabled") == b"1\n"
    log = toy.log()
    assert log.count("RuntimeError: a bug in a show") == 3
    assert log.count("RuntimeError: a bug in a store") == 3
    assert "read(" in log
    assert "write(" in log


AS_USER = """
import os, sys, errno
def attempt(fn, *args):
    try:
        fn(*args)
    except OSError as exc:
        return errno.errorcode[exc.errno]
    return "ok"
base = sys.argv[1]
print(attempt(os.open, base + "/attrs/enabled", os.O_RDONLY), attempt(os.open, base + "/attrs/enabled", os.O_WRONLY),
      attempt(os.open, base + "/attrs/force", os.O_WRONLY), attempt(os.open, base + "/seq/private", os.O_RDONLY),
      attempt(os.chmod, base + "/attrs/enabled", 0o666), attempt(os.chown, base + "/attrs/enabled", 65534, 65534),
      attempt(os.utime, base + "/attrs/enabled", (1, 1)), attempt(os.truncate, base + "/attrs/enabled", 0),
      attempt(os.mkdir, base + "/x"), attempt(os.unlink, base + "/attrs/enabled"),
      attempt(os.open, base + "/new", os.O_CREAT | os.O_WRONLY), attempt(os.listdir, base + "/attrs"),
      os.access(base + "/attrs/enabled", os.R_OK), os.access(base + "/attrs/enabled", os.W_OK),
      attempt(os.listdir, base + "/storm/p"), attempt(os.stat, base + "/storm/p/enabled"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("default_permissions", [True, False])
def test_other_users(driver: str, tmp_path: Path, default_permissions: bool) -> None:
    for up in (tmp_path, *tmp_path.parents):
        if up.stat().st_mode & 0o5 != 0o5:
            up.chmod(up.stat().st_mode | 0o055)
    with serving(driver, tmp_path / "mnt", default_permissions=default_permissions) as toy:
        toy.call("mkdir", "storm/p")
        os.chmod(toy.path / "storm/p", 0o700)
        assert python_as(65534, AS_USER, str(toy.path)).split() == [
            *("ok", "EACCES", "EACCES", "EACCES"),
            *("EPERM", "EPERM", "EPERM", "EACCES"),
            *("EACCES", "EACCES", "EACCES", "ok"),
            *("True", "False", "EACCES", "EACCES"),
        ]
        os.chown(toy.path / "attrs/enabled", 65534, -1)
        assert python_as(65534, "import sys; print(open(sys.argv[1], 'r+').read())", f"{toy.path}/attrs/enabled")
