"""The seccomp filter: which system calls of the world go to the supervisor.

Model
    A classic BPF program for each process of the world. Calls that are not of interest are allowed without a look at
    their arguments, which the kernel remembers in a bitmap, so that they cost nothing. Of the others, some depend on an
    argument: ``kill`` only with a pid that no real process of the world can have, ``lseek`` not from the beginning or
    the current place. The program is written here rather than by libseccomp because that cannot compare an
    argument with both ends of a range.

    Programs of the other word sizes (i386, x32) are covered with their own numbers.

Source
    seccomp(2), kernel/seccomp.c (``seccomp_cache_prepare_bitmap``), include/uapi/linux/{seccomp,audit,filter}.h,
    arch/x86/entry/syscalls/*.tbl, include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from klpfs.world.sysapi import Instruction

__all__ = ["ABIS", "FIRST_HIGH_PID", "RESERVED_PIDS", "Rule", "build", "rules"]

AUDIT_ARCH_X86_64: Final = 0xC000003E
AUDIT_ARCH_I386: Final = 0x40000003
AUDIT_ARCH_AARCH64: Final = 0xC00000B7
X32_BIT: Final = 0x40000000

RET_ALLOW: Final = 0x7FFF0000
RET_USER_NOTIF: Final = 0x7FC00000

#: Pids below are those of emulated tasks (kernel/pid.c RESERVED_PIDS); 1 is real.
RESERVED_PIDS: Final = 300
#: As are those from here on (PID_MAX_LIMIT and up).
FIRST_HIGH_PID: Final = 4_194_305

SEEK_END: Final = 2
SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4

# offsets in struct seccomp_data, little endian
_NR, _ARCH = 0, 4
_LD, _JA, _JEQ, _JGE, _AND, _RET = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06


def _low(arg: int) -> int:
    return 16 + 8 * arg


#: System call numbers of what may be supervised, by ABI.
ABIS: Final[dict[int, dict[str, int]]] = {
    AUDIT_ARCH_X86_64: {
        "init_module": 175, "delete_module": 176, "finit_module": 313, "syslog": 103, "uname": 63, "lseek": 8,
        "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
        "pidfd_open": 434, "pidfd_send_signal": 424, "getpid": 39, "getppid": 110, "gettid": 186, "getuid": 102,
        "geteuid": 107, "getgid": 104, "getegid": 108, "getpgrp": 111, "getpgid": 121, "getsid": 124,
        "sysinfo": 99, "times": 100, "sethostname": 170, "setdomainname": 171, "getpriority": 140,
        "sched_yield": 24, "pause": 34, "alarm": 37, "umask": 95, "sync": 162,
    },
    AUDIT_ARCH_I386: {
        "init_module": 128, "delete_module": 129, "finit_module": 350, "syslog": 103, "uname": 122, "lseek": 19,
        "kill": 37, "tkill": 238, "tgkill": 270, "rt_sigqueueinfo": 178, "rt_tgsigqueueinfo": 335,
        "pidfd_open": 434, "pidfd_send_signal": 424, "getpid": 20, "_llseek": 140, "olduname": 109, "oldolduname": 59,
    },
    AUDIT_ARCH_AARCH64: {
        "init_module": 105, "delete_module": 106, "finit_module": 273, "syslog": 116, "uname": 160, "lseek": 62,
        "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
        "pidfd_open": 434, "pidfd_send_signal": 424, "getpid": 172, "getppid": 173, "gettid": 178,
    },
}  # fmt: skip

#: What is supervised in any case; uname unless it is to be the host's.
ALWAYS: Final = ("init_module", "finit_module", "delete_module", "syslog")
#: Supervised for pids that are none of a real process: name and the arguments that are pids.
BY_PID: Final = {
    "kill": (0,),
    "tkill": (0,),
    "tgkill": (0, 1),
    "rt_sigqueueinfo": (0,),
    "rt_tgsigqueueinfo": (0, 1),
    "pidfd_open": (0,),
}


class Rule(list[Instruction]):
    """Instructions that are reached with the call's number matched; they end in one of the two answers."""


def _stmt(code: int, k: int) -> Instruction:
    return Instruction(code, 0, 0, k)


_NOTIFY = _stmt(_RET, RET_USER_NOTIF)
_ALLOW = _stmt(_RET, RET_ALLOW)


def _pid_rule(args: Iterable[int]) -> Rule:
    """Notify if one of the arguments is in [2, 300) or from FIRST_HIGH_PID up, taken as positive 32-bit numbers."""
    rule = Rule()
    for arg in args:
        rule += [
            _stmt(_LD, _low(arg)),
            Instruction(_JGE, 5, 0, 0x80000000),  # negative: a process group, or all; -> next
            Instruction(_JGE, 3, 0, FIRST_HIGH_PID),  # -> notify
            Instruction(_JGE, 3, 0, RESERVED_PIDS),  # -> next
            Instruction(_JGE, 1, 0, 2),  # -> notify
            _stmt(_JA, 1),  # 0 or 1 -> next
            _NOTIFY,
        ]
    rule.append(_ALLOW)
    return rule


def _lseek_rule(whence: int) -> Rule:
    """Notify for what readers of /dev/kmsg use: SEEK_END, SEEK_DATA, SEEK_HOLE. *whence*: which argument that is."""
    return Rule(
        [
            _stmt(_LD, _low(whence)),
            Instruction(_JGE, 0, 2, SEEK_END),
            Instruction(_JGE, 1, 0, SEEK_HOLE + 1),
            _NOTIFY,
            _ALLOW,
        ]
    )


def rules(abi: dict[str, int], *, keep_uname: bool, traps: Collection[str]) -> dict[int, Rule]:
    """The rules of one ABI by system call number. *traps* are calls whose kernel function may be patched.

    Raises ValueError for a trap whose name is not known here.
    """
    out: dict[int, Rule] = {}
    notify = Rule([_NOTIFY])
    for name in ALWAYS:
        out[abi[name]] = notify
    if not keep_uname:
        for name in ("uname", "olduname", "oldolduname"):
            if name in abi:
                out[abi[name]] = notify
    for name, args in BY_PID.items():
        out[abi[name]] = _pid_rule(args)
    out[abi["pidfd_send_signal"]] = notify
    out[abi["lseek"]] = _lseek_rule(2)
    if "_llseek" in abi:
        out[abi["_llseek"]] = _lseek_rule(4)
    for name in traps:
        if not any(name in table for table in ABIS.values()):
            known = ", ".join(sorted(set(ABIS[AUDIT_ARCH_X86_64]) - set(ALWAYS) - set(BY_PID)))
            raise ValueError(f"no system call {name!r} is known here, but {known}")
        if name in abi:
            out[abi[name]] = notify
    return out


def build(*, keep_uname: bool = False, traps: Collection[str] = ("getpid",)) -> list[Instruction]:
    """The whole program."""
    program = [_stmt(_LD, _ARCH)]
    for arch, abi in ABIS.items():
        body: list[Instruction] = [_stmt(_LD, _NR)]
        if arch == AUDIT_ARCH_X86_64:
            body.append(_stmt(_AND, 0xFFFFFFFF ^ X32_BIT))  # x32 has the same numbers, where it has these calls
        for number, rule in sorted(rules(abi, keep_uname=keep_uname, traps=traps).items()):
            assert len(rule) < 256
            body.append(Instruction(_JEQ, 0, len(rule), number))
            body += rule
        body.append(_ALLOW)
        # a jump reaches 255 instructions; the way past a longer body is an unconditional one
        program += [Instruction(_JEQ, 1, 0, arch), _stmt(_JA, len(body)), *body]
    program.append(_ALLOW)
    return program
