"""Taking away what the sandbox does not need.

Model
    Resource limits first; then no new privileges and a system call filter that leaves memory, time, the sockets and files
    that are open already, and the exit. Every other call fails with EPERM: no file can be opened, no process started, no
    connection made. All of it works without privileges, and in a container.

Locks
    None.

Source
    setrlimit(2), prctl(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import resource
import sys

__all__ = ["confine", "limit_resources"]

ADDRESS_SPACE = 2 << 30
"""Bytes of address space: the engine's buffers, the emulated memory and Python with room to spare."""
_FILES = 16
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SIGKILL = 9

_ALLOWED = (
    "read", "write", "recvfrom", "sendto", "recvmsg", "sendmsg", "poll", "ppoll", "close", "futex", "brk", "mmap", "munmap",
    "mremap", "mprotect", "madvise", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "clock_gettime",
    "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "getrandom", "getpid", "gettid", "sched_yield",
    "restart_syscall", "exit", "exit_group", "rseq", "membarrier", "fstat", "lseek",
)  # fmt: skip


def limit_resources() -> list[str]:
    """Set limits on memory, files and everything that makes no sense here; what was done, for the record."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for which, value in ((resource.RLIMIT_AS, ADDRESS_SPACE), (resource.RLIMIT_NOFILE, _FILES)):
        _, hard = resource.getrlimit(which)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (wanted, wanted))
    return ["rlimits"]


def confine() -> list[str]:
    """Drop privileges and install the filter; what could be done, by name."""
    done = []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        done.append("no_new_privs")
    try:
        import pyseccomp as seccomp

        rules = seccomp.SyscallFilter(defaction=seccomp.ERRNO(errno.EPERM))
        for name in _ALLOWED:
            try:
                rules.add_rule(seccomp.ALLOW, name)
            except (OSError, ValueError):
                continue  # a call that this architecture does not have
        rules.load()
        done.append("seccomp")
    except (ImportError, OSError, RuntimeError) as error:
        print(f"klpfs sandbox: no system call filter: {error}", file=sys.stderr)
    return done
