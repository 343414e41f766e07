"""System calls that Python 3.11 does not offer, through libc.

Everything here raises OSError with the errno of the call. No state, no locks, safe in any thread and after a fork.

Source: mount(2), unshare(2), prctl(2), signalfd(2), seccomp(2), pidfd_getfd(2), process_vm_readv(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

PIDFD_THREAD: Final = os.O_EXCL  # Linux 6.9
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWUTS: Final = 0x04000000

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_MOVE: Final = 0x2000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MS_SLAVE: Final = 0x80000
MNT_DETACH: Final = 2

PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
PR_SET_NO_NEW_PRIVS: Final = 38

MACHINE: Final = os.uname().machine

# include/uapi/asm-generic/unistd.h: the same numbers on every architecture since Linux 5
_SYS_PIDFD_OPEN: Final = 434
_SYS_PIDFD_GETFD: Final = 438
_SYS_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}.get(MACHINE, -1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.syscall.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_writev.restype = ctypes.c_ssize_t


def _check(result: int, what: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result


def unshare(flags: int) -> None:
    """``unshare(2)``. EPERM without CAP_SYS_ADMIN (all but CLONE_NEWUSER), ENOSPC when user namespaces are limited."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, nstype: int) -> None:
    """``setns(2)`` of the calling thread."""
    _check(_libc.setns(fd, nstype), "setns")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """``mount(2)``."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if fstype is None else fstype.encode(),
        flags,
        None if data is None else os.fsencode(data),
    )
    _check(result, target)


def bind(source: str, target: str) -> None:
    """A recursive bind mount. In a user namespace only a recursive one is allowed where mounts lie below."""
    mount(source, target, None, MS_BIND | MS_REC)


def umount(target: str) -> None:
    """``umount2(2)``: take a mount away, with what is mounted in it, at once."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), target)


def prctl(option: int, arg: int = 0) -> int:
    """``prctl(2)`` with one argument."""
    return _check(_libc.prctl(option, arg, 0, 0, 0), "prctl")


def set_name(name: str) -> None:
    """The ``comm`` of this process (15 bytes)."""
    text = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(text))


def set_title(title: str) -> None:
    """Replace what /proc/PID/cmdline shows of this process.

    The argument area is written over; its last byte is made non-zero, which is how the kernel knows that a process
    set its title (fs/proc/base.c ``get_mm_cmdline``). Does nothing where /proc/self/stat cannot be read.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        # fields 48 and 49 of proc_pid_stat(5), counted from field 3
        start, end = int(fields[45]), int(fields[46])
    except (OSError, IndexError, ValueError):
        return
    room = end - start
    if start == 0 or room < 16:
        return
    text = title.encode()[: room - 2]
    ctypes.memmove(start, text.ljust(room - 1, b"\0") + b" ", room)


def pidfd_open(pid: int, flags: int = 0) -> int:
    """``pidfd_open(2)``."""
    return _check(_libc.syscall(_SYS_PIDFD_OPEN, ctypes.c_int(pid), ctypes.c_uint(flags)))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """``pidfd_getfd(2)``: a duplicate of another process's descriptor. Linux 5.6."""
    return _check(_libc.syscall(_SYS_PIDFD_GETFD, ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0)))


class Instruction(NamedTuple):
    """One classic BPF instruction (``struct sock_filter``)."""

    code: int
    jt: int
    jf: int
    k: int


def pack_filter(program: Iterable[Instruction]) -> bytes:
    """The instructions as the kernel reads them."""
    return b"".join(struct.pack("=HBBI", *ins) for ins in program)


SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW: Final = 1 << 2
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5


def seccomp_listener(program: bytes, flags: int) -> int:
    """Install a filter for this process and its descendants; the listener's descriptor. EINVAL for unknown flags."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    return _check(
        _libc.syscall(_SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, ctypes.c_uint(flags), ctypes.byref(fprog)), "seccomp"
    )


class SignalInfo(NamedTuple):
    """What a signalfd says of one signal: number, si_code, sender's pid (0 for the kernel's)."""

    signo: int
    code: int
    pid: int


SFD_NONBLOCK: Final = os.O_NONBLOCK
SFD_CLOEXEC: Final = os.O_CLOEXEC


def signalfd(signals: Iterable[int]) -> int:
    """A non-blocking descriptor for *signals* (the caller must have blocked them)."""
    mask = 0
    for number in signals:
        mask |= 1 << (number - 1)
    raw = ctypes.create_string_buffer(struct.pack("=QQQQ", mask, 0, 0, 0) * 4)  # sigset_t of libc: 1024 bits
    return _check(_libc.signalfd(-1, raw, SFD_NONBLOCK | SFD_CLOEXEC), "signalfd")


def read_signalfd(fd: int) -> list[SignalInfo]:
    """The signals that are pending there."""
    out: list[SignalInfo] = []
    while True:
        try:
            data = os.read(fd, 128 * 16)
        except BlockingIOError:
            return out
        for at in range(0, len(data), 128):
            signo, _errno, code, pid = struct.unpack_from("=IiiI", data, at)
            out.append(SignalInfo(signo, code, pid))


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def _process_vm(call: Any, pid: int, local: _IoVec, remote: _IoVec) -> int:
    one = ctypes.c_ulong(1)
    return int(call(ctypes.c_int(pid), ctypes.byref(local), one, ctypes.byref(remote), one, ctypes.c_ulong(0)))


def read_memory(pid: int, address: int, length: int) -> bytes:
    """Up to *length* bytes of another process's memory (``process_vm_readv(2)``).

    Short where the mapping ends. Raises OSError: EFAULT when nothing is there, EPERM, ESRCH.
    """
    if length <= 0:
        return b""
    buffer = ctypes.create_string_buffer(length)
    local, remote = _IoVec(ctypes.addressof(buffer), length), _IoVec(address, length)
    count = _check(_process_vm(_libc.process_vm_readv, pid, local, remote), f"memory of pid {pid}")
    return buffer.raw[:count]


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Write *data* into another process's memory (``process_vm_writev(2)``). Raises OSError(EFAULT) if not all fits."""
    if not data:
        return
    buffer = ctypes.create_string_buffer(data, len(data))
    local = _IoVec(ctypes.addressof(buffer), len(data))
    remote = _IoVec(address, len(data))
    count = _check(_process_vm(_libc.process_vm_writev, pid, local, remote), f"memory of pid {pid}")
    if count < len(data):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
