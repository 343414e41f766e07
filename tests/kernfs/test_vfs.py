"""The facade without a mount: the table of what kernfs answers, permissions, listings."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernfs_support import refusal

from klpfs.kernfs import Attribute, Caller, Entry, Kernfs, OpenFile, SeqFile, StaticProvider
from klpfs.kernfs.vfs import SetAttr, Vfs

Run = Callable[..., Any]
ROOT = Caller(0, 0, 0)
USER = Caller(0, 1000, 1000)


async def store(data: bytes) -> int:
    return len(data)


def tree() -> Kernfs:
    fs = Kernfs()
    patch = fs.make_path("klp/patch")
    fs.create_file(patch, "enabled", Attribute(lambda: b"1\n", store), 0o644)
    fs.create_file(patch, "force", Attribute(None, store), 0o200)
    fs.create_file(patch, "transition", Attribute(lambda: b"0\n"), 0o444)
    fs.create_file(patch, "odd", Attribute(lambda: b"0\n"), 0o644)  # a mode that promises too much
    fs.create_dir(patch, "vmlinux")
    proc = fs.make_path("proc")
    fs.create_file(proc, "secret", SeqFile(lambda caller: b"s"), 0o400)
    fs.create_file(proc, "modules", SeqFile(lambda caller: b"m"), 0o444)
    fs.create_link(proc, "self", lambda caller: str(caller.pid))
    return fs


def node(vfs: Vfs, path: str) -> Any:
    found = vfs.resolve(path)
    assert found is not None, path
    return found


def refused(number: int, fn: Callable[..., Any], *args: Any) -> None:
    with refusal(number):
        fn(*args)


@pytest.mark.parametrize("checking", [False, True])
@pytest.mark.parametrize(
    ("path", "flags", "number"),
    [
        ("klp/patch/enabled", os.O_RDONLY, 0),
        ("klp/patch/enabled", os.O_RDWR | os.O_TRUNC | os.O_APPEND, 0),
        ("klp/patch/enabled", os.O_RDONLY | os.O_TRUNC, 0),
        ("klp/patch/force", os.O_WRONLY, 0),
        ("klp/patch/force", os.O_RDONLY, errno.EACCES),
        ("klp/patch/force", os.O_RDWR, errno.EACCES),
        ("klp/patch/transition", os.O_RDONLY, 0),
        ("klp/patch/transition", os.O_WRONLY, errno.EACCES),
        ("klp/patch/transition", os.O_RDWR, errno.EACCES),
        ("klp/patch/odd", os.O_WRONLY, errno.EACCES),
        ("klp/patch/enabled", os.O_RDONLY | os.O_DIRECT, errno.EINVAL),
        ("klp/patch/transition", os.O_WRONLY | os.O_DIRECT, errno.EACCES),
        ("klp/patch", os.O_RDONLY, errno.EISDIR),
        ("proc/secret", os.O_RDWR, 0),  # not sysfs: root may
        ("proc/modules", os.O_WRONLY, 0),
        ("proc/self", os.O_RDONLY, errno.ELOOP),
    ],
)
def test_open_by_root(path: str, flags: int, number: int, checking: bool) -> None:
    vfs = Vfs(tree(), check_permissions=checking)
    if number:
        refused(number, vfs.open, node(vfs, path), flags, ROOT)
    else:
        fh = vfs.open(node(vfs, path), flags, ROOT)
        assert vfs.open_files == 1
        vfs.release(fh)
    assert vfs.open_files == 0


def test_chmod_changes_what_may_be_opened() -> None:
    vfs = Vfs(tree())
    enabled = node(vfs, "klp/patch/enabled")
    vfs.setattr(enabled, SetAttr(mode=0o444), ROOT)
    refused(errno.EACCES, vfs.open, enabled, os.O_WRONLY, ROOT)
    vfs.setattr(enabled, SetAttr(mode=0o200), ROOT)
    refused(errno.EACCES, vfs.open, enabled, os.O_RDONLY, ROOT)
    vfs.release(vfs.open(enabled, os.O_WRONLY, ROOT))


def test_permissions_of_others() -> None:
    vfs = Vfs(tree(), check_permissions=True)
    enabled, secret = node(vfs, "klp/patch/enabled"), node(vfs, "proc/secret")
    vfs.release(vfs.open(enabled, os.O_RDONLY, USER))
    refused(errno.EACCES, vfs.open, enabled, os.O_WRONLY, USER)
    refused(errno.EACCES, vfs.open, enabled, os.O_RDONLY | os.O_TRUNC, USER)
    refused(errno.EACCES, vfs.open, secret, os.O_RDONLY, USER)
    refused(errno.EACCES, vfs.access, secret, os.R_OK, USER)
    vfs.access(secret, os.F_OK, USER)
    vfs.access(secret, os.R_OK | os.W_OK, ROOT)
    refused(errno.EACCES, vfs.access, secret, os.X_OK, ROOT)
    vfs.setattr(secret, SetAttr(uid=1000), ROOT)
    vfs.release(vfs.open(secret, os.O_RDONLY, USER))
    vfs.setattr(secret, SetAttr(uid=1, gid=1000, mode=0o040), ROOT)
    vfs.release(vfs.open(secret, os.O_RDONLY, USER))
    vfs.setattr(secret, SetAttr(mode=0o404), ROOT)
    refused(errno.EACCES, vfs.open, secret, os.O_RDONLY, USER)  # the group is asked, not the others
    klp = node(vfs, "klp")
    vfs.setattr(klp, SetAttr(mode=0o700), ROOT)
    refused(errno.EACCES, vfs.lookup, klp, "patch", USER)
    refused(errno.EACCES, vfs.opendir, klp, USER)
    vfs.lookup(klp, "patch", ROOT)
    unchecked = Vfs(vfs.kernfs)  # the kernel has checked
    unchecked.release(unchecked.open(secret, os.O_RDONLY, USER))


def test_supplementary_groups(tmp_path: Path) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17/status").write_text("Name:\tx\nGroups:\t5 77 \nVmPeak:\t1 kB\n")
    vfs = Vfs(tree(), check_permissions=True, proc=str(tmp_path))
    secret = node(vfs, "proc/secret")
    me = Caller(17, 1000, 12345)
    vfs.setattr(secret, SetAttr(gid=77, mode=0o040), ROOT)
    vfs.release(vfs.open(secret, os.O_RDONLY, me))
    refused(errno.EACCES, vfs.open, secret, os.O_RDONLY, me._replace(pid=18))
    vfs.setattr(secret, SetAttr(uid=1000), ROOT)
    vfs.setattr(secret, SetAttr(gid=5), me)
    refused(errno.EPERM, vfs.setattr, secret, SetAttr(gid=6), me)


def test_an_ordinary_user_may_stand_for_root() -> None:
    vfs = Vfs(tree(), check_permissions=True)
    vfs.owner = (1000, 100)
    assert vfs.caller(5, 1000, 100) == (5, 0, 0)
    assert vfs.caller(5, 1001, 101) == (5, 1001, 101)
    enabled = node(vfs, "klp/patch/enabled")
    assert (vfs.stat(enabled)["st_uid"], vfs.stat(enabled)["st_gid"]) == (1000, 100)
    vfs.setattr(enabled, SetAttr(uid=1000, gid=100), vfs.caller(5, 1000, 100))
    assert (enabled.uid, enabled.gid) == (0, 0)
    vfs.setattr(enabled, SetAttr(uid=7, gid=8), ROOT)
    assert vfs.ids(enabled) == (7, 8)


def test_attributes_and_who_may_change_them() -> None:
    vfs = Vfs(tree(), check_permissions=True)
    enabled = node(vfs, "klp/patch/enabled")
    assert {key: value for key, value in vfs.stat(enabled).items() if "time" not in key and key != "st_ino"} == {
        "st_mode": 0o100644,
        "st_nlink": 1,
        "st_uid": 0,
        "st_gid": 0,
        "st_size": 4096,
        "st_blocks": 0,
        "st_blksize": 4096,
    }
    assert vfs.stat(node(vfs, "klp"))["st_nlink"] == 3
    for change in (SetAttr(mode=0o666), SetAttr(uid=1000), SetAttr(gid=1000), SetAttr(mtime_ns=1)):
        refused(errno.EPERM, vfs.setattr, enabled, change, USER)
    refused(errno.EACCES, vfs.setattr, enabled, SetAttr(size=0), USER)
    refused(errno.EACCES, vfs.setattr, enabled, SetAttr(mtime_ns=5, atime_ns=5, now=True), USER)
    vfs.setattr(enabled, SetAttr(mode=0o4755, uid=1000, gid=7, atime_ns=3, mtime_ns=4, ctime_ns=5), ROOT)
    after = vfs.stat(enabled)
    assert [after[f"st_{x}"] for x in ("mode", "uid", "gid", "atime_ns", "mtime_ns", "ctime_ns")] == [
        0o104755,
        1000,
        7,
        3,
        4,
        5,
    ]
    vfs.setattr(enabled, SetAttr(mode=0o600, size=100), USER)  # the owner
    vfs.setattr(enabled, SetAttr(gid=1000), USER)
    refused(errno.EPERM, vfs.setattr, enabled, SetAttr(gid=99), USER)
    refused(errno.EPERM, vfs.setattr, enabled, SetAttr(uid=0), USER)
    assert vfs.stat(enabled)["st_size"] == 4096


def test_what_kernfs_refuses() -> None:
    vfs = Vfs(tree(), check_permissions=True)
    klp = node(vfs, "klp")
    refused(errno.EPERM, vfs.refuse, klp, ROOT)
    refused(errno.EACCES, vfs.refuse, klp, USER)
    refused(errno.EACCES, vfs.create, klp, "new", ROOT)
    refused(errno.ENODATA, vfs.getxattr, klp, "user.x")
    refused(errno.ENODATA, vfs.removexattr, klp, "user.x")
    refused(errno.EOPNOTSUPP, vfs.setxattr, klp, "user.x", b"")
    assert vfs.listxattr(klp) == []
    assert (vfs.statfs().f_bsize, vfs.statfs().f_blocks, vfs.statfs().f_namemax) == (4096, 0, 255)


def test_lookup() -> None:
    vfs = Vfs(tree())
    klp = node(vfs, "klp")
    assert vfs.lookup(klp, "patch", ROOT) is node(vfs, "klp/patch")
    refused(errno.ENOENT, vfs.lookup, klp, "nosuch", ROOT)
    refused(errno.ENAMETOOLONG, vfs.lookup, klp, "x" * 256, ROOT)
    refused(errno.ENOTDIR, vfs.lookup, node(vfs, "proc/modules"), "x", ROOT)
    assert vfs.readlink(node(vfs, "proc/self"), Caller(42, 0, 0)) == "42"
    refused(errno.EINVAL, vfs.readlink, klp, ROOT)


def test_handles_must_exist() -> None:
    vfs = Vfs(tree())
    for call in (vfs.file, vfs.dir_node, vfs.fsync):
        refused(errno.EBADF, call, 999)
    refused(errno.EBADF, vfs.readdir, 999, 0)
    refused(errno.EBADF, vfs.read_now, 999, 1, 0)
    vfs.release(999)
    vfs.releasedir(999)


def test_reads_that_need_no_core(run: Run) -> None:
    async def slow(caller: Caller) -> bytes:
        return b"slow"

    async def main() -> None:
        fs = tree()
        fs.create_file(fs.root, "slow", SeqFile(slow), 0o444)
        vfs = Vfs(fs)
        fh = vfs.open(node(vfs, "klp/patch/enabled"), os.O_RDWR, ROOT)
        assert vfs.read_now(fh, 100, 0) == b"1\n"
        assert await vfs.read(fh, 100, 0) == b"1\n"
        assert await vfs.write(fh, b"0", 0) == 1
        vfs.fsync(fh)
        fh = vfs.open(node(vfs, "slow"), os.O_RDONLY, ROOT)
        assert vfs.read_now(fh, 100, 0) is None
        assert await vfs.read(fh, 100, 0) == b"slow"

    run(main)


def names(vfs: Vfs, fh: int, start: int = 0) -> list[str]:
    return [name for name, _, _ in vfs.readdir(fh, start)]


def test_listings(run: Run) -> None:
    async def main() -> None:
        fs = tree()
        vfs = Vfs(fs)
        patch = node(vfs, "klp/patch")
        fh = vfs.opendir(patch, ROOT)
        everything = list(vfs.readdir(fh, 0))
        assert [name for name, _, _ in everything] == [
            ".",
            "..",
            "enabled",
            "force",
            "transition",
            "odd",
            "vmlinux",
        ]
        assert everything[0][1] is patch
        assert everything[1][1] is node(vfs, "klp")
        assert [position for _, _, position in everything] == list(range(1, 8))
        fs.create_file(patch, "new", Attribute(), 0o444)
        await fs.remove(node(vfs, "klp/patch/transition"))
        assert names(vfs, fh, 3) == ["force", "odd", "vmlinux"]  # the listing that was begun
        assert names(vfs, fh) == [".", "..", "enabled", "force", "odd", "vmlinux", "new"]
        await fs.remove(patch)
        assert names(vfs, fh, 3) == []
        assert names(vfs, fh) == [".", ".."]
        again = vfs.opendir(patch, ROOT)
        assert names(vfs, again) == [".", ".."]
        refused(errno.ENOENT, vfs.lookup, patch, "enabled", ROOT)
        assert vfs.stat(patch)["st_mode"] == 0o40755
        vfs.setattr(patch, SetAttr(mode=0o700), ROOT)
        vfs.releasedir(fh)
        vfs.releasedir(again)
        assert vfs.open_files == 0
        refused(errno.ENOTDIR, vfs.opendir, node(vfs, "proc/modules"), ROOT)

    run(main)


def test_subtree() -> None:
    fs = tree()
    vfs = Vfs(fs, fs.lookup("klp"))
    assert vfs.ino(vfs.root) == 1
    assert vfs.ino(node(vfs, "patch")) == fs.lookup("klp/patch").ino  # type: ignore[union-attr]
    fh = vfs.opendir(vfs.root, ROOT)
    assert [(name, vfs.ino(n)) for name, n, _ in vfs.readdir(fh, 0)][:2] == [(".", 1), ("..", 1)]
    with pytest.raises(NotADirectoryError):
        Vfs(fs, fs.lookup("proc/modules"))


def test_dynamic_directories_are_told_apart() -> None:
    fs = tree()
    fs.create_dynamic_dir(fs.root, "dyn", StaticProvider({"a": Entry.file(SeqFile(lambda caller: b"a"))}))
    vfs = Vfs(fs)
    assert vfs.is_static(vfs.root)
    assert not vfs.is_static(node(vfs, "dyn"))
    fh = vfs.opendir(node(vfs, "dyn"), ROOT)
    assert names(vfs, fh) == [".", "..", "a"]


def test_hooks_are_told_apart() -> None:
    class Hooked(SeqFile):
        def open(self, file: OpenFile) -> None:
            file.private = 1

    fs = tree()
    hooked = fs.create_file(fs.root, "hooked", Hooked(), 0o444)
    vfs = Vfs(fs)
    assert vfs.has_hooks(hooked)
    assert not vfs.has_hooks(node(vfs, "klp/patch/enabled"))
    assert not vfs.has_hooks(vfs.root)


def test_poll_wakers() -> None:
    vfs = Vfs(tree())
    enabled = node(vfs, "klp/patch/enabled")
    fh = vfs.open(enabled, os.O_RDONLY, ROOT)
    woken: list[str] = []
    assert vfs.poll(fh, lambda: woken.append("replaced")) & 0xA
    assert vfs.poll(fh, lambda: woken.append("kept"))
    enabled.notify()
    enabled.notify()
    assert woken == ["kept"]
    vfs.poll(fh, lambda: woken.append("released"))
    vfs.release(fh)
    enabled.notify()
    assert woken == ["kept"]
