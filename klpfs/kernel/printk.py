"""The kernel log: a ring of records, and the functions that put lines into it.

Model: records carry a sequence number, a level, a facility, a time in microseconds, the caller and a text of bytes.
They live in a data ring of a fixed size in bytes and a descriptor ring of one entry for 32 bytes of it; a new record
overwrites the oldest ones. A text without a newline at its end stays open: the same caller may continue it
(``KERN_CONT``), and no reader sees it before it is closed by a newline or by the next record. Newlines inside a text
are kept: one record, several lines.

Locks: none. The ring belongs to the trio thread. Readers that wait do so in a trio parking lot, which every new
record empties; functions in ``Printk.listeners`` are called then, too.

Source: kernel/printk/printk.c (vprintk_store, vprintk_emit, devkmsg_sysctl_set_loglvl), kernel/printk/
printk_ringbuffer.c (prb_reserve, prb_reserve_in_last, data_alloc, data_realloc, _prb_read_valid), kernel/printk/
sysctl.c, include/linux/printk.h.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from klpfs.kernel.kstrtox import c_string, proc_dointvec

if TYPE_CHECKING:
    import trio

__all__ = [
    "FACILITIES",
    "LEVELS",
    "LOG_KERN",
    "LOG_USER",
    "PRINTKRB_RECORD_MAX",
    "Logger",
    "Printk",
    "Record",
]

LOGLEVEL_DEFAULT: Final = -1
LOGLEVEL_EMERG: Final = 0
LOGLEVEL_ALERT: Final = 1
LOGLEVEL_CRIT: Final = 2
LOGLEVEL_ERR: Final = 3
LOGLEVEL_WARNING: Final = 4
LOGLEVEL_NOTICE: Final = 5
LOGLEVEL_INFO: Final = 6
LOGLEVEL_DEBUG: Final = 7

LOG_KERN: Final = 0
LOG_USER: Final = 1

LEVELS: Final = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")
"""Names of the levels, as dmesg(1) spells them."""
FACILITIES: Final = (
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
)  # fmt: skip
"""Names of the facilities from 0 on, as dmesg(1) spells them."""

PRINTKRB_RECORD_MAX: Final = 1024
"""Most bytes that one record may reserve, its terminator included."""

LOG_NEWLINE: Final = 2
LOG_CONT: Final = 8

_KERN_SOH: Final = 0x01
_BLOCK_HEAD: Final = 8  # each block of the data ring begins with the descriptor's id, an unsigned long
_AVERAGE_RECORD: Final = 32  # PRB_AVGBITS: one descriptor for this many bytes of text


@dataclass(slots=True)
class Record:
    """One record of the log. ``text`` has no newline at its end; ``ts_usec`` counts from the machine's boot."""

    seq: int
    level: int
    facility: int
    ts_usec: int
    caller: str
    flags: int
    text: bytes
    subsystem: str = ""
    device: str = ""
    final: bool = False
    begin: int = 0
    """Logical position of the record's block in the data ring."""
    end: int = 0
    """Logical position after the record's block."""

    @property
    def prio(self) -> int:
        """Facility and level in one number, as syslog(3) has them."""
        return self.facility << 3 | self.level

    @property
    def message(self) -> str:
        """The text as ``str``; bytes that are no UTF-8 become surrogates."""
        return self.text.decode("utf-8", "surrogateescape")

    @property
    def line_count(self) -> int:
        """Number of lines of the text, an empty one after a last newline included."""
        return self.text.count(b"\n") + 1


def _parse_prefix(text: bytes) -> tuple[int, int, int]:
    """Levels and flags at the start of a format: (bytes used, level or LOGLEVEL_DEFAULT, flags).

    Source: printk_parse_prefix, printk_get_level.
    """
    used, level, flags = 0, LOGLEVEL_DEFAULT, 0
    while len(text) >= used + 2 and text[used] == _KERN_SOH:
        kind = text[used + 1 : used + 2]
        if b"0" <= kind <= b"7":
            if level == LOGLEVEL_DEFAULT:
                level = int(kind)
        elif kind == b"c":
            flags |= LOG_CONT
        else:
            break
        used += 2
    return used, level, flags


class Logger:
    """The ``pr_*`` functions of one source file: each line gets the file's ``pr_fmt`` prefix.

    Every method takes the text of one message, without the newline at its end, and returns its sequence number.
    """

    __slots__ = ("prefix", "printk")

    def __init__(self, printk: Printk, prefix: str = "") -> None:
        self.printk = printk
        self.prefix = prefix

    def log(self, level: int, text: str) -> int:
        """Emit ``text`` at ``level`` 0 to 7."""
        return self.printk.emit(level, self.prefix + text)

    def emerg(self, text: str) -> int:
        """``pr_emerg``."""
        return self.log(LOGLEVEL_EMERG, text)

    def alert(self, text: str) -> int:
        """``pr_alert``."""
        return self.log(LOGLEVEL_ALERT, text)

    def crit(self, text: str) -> int:
        """``pr_crit``."""
        return self.log(LOGLEVEL_CRIT, text)

    def err(self, text: str) -> int:
        """``pr_err``."""
        return self.log(LOGLEVEL_ERR, text)

    def warn(self, text: str) -> int:
        """``pr_warn``."""
        return self.log(LOGLEVEL_WARNING, text)

    def notice(self, text: str) -> int:
        """``pr_notice``."""
        return self.log(LOGLEVEL_NOTICE, text)

    def info(self, text: str) -> int:
        """``pr_info``."""
        return self.log(LOGLEVEL_INFO, text)

    def debug(self, text: str) -> int:
        """``printk(KERN_DEBUG ...)``: unconditional, unlike ``pr_debug``, which is a dynamic debug site."""
        return self.log(LOGLEVEL_DEBUG, text)


class Printk:
    """The log of one machine."""

    def __init__(
        self,
        now: Callable[[], float],
        *,
        size: int = 1 << 18,
        caller: Callable[[], str] = lambda: "",
        print_caller: bool = False,
        print_time: bool = True,
    ) -> None:
        """Make an empty log.

        ``now`` gives the seconds since the machine's boot. ``size`` is that of the data ring in bytes, a power of
        two of at least 4096 (``ValueError`` otherwise). ``caller`` names the present task or CPU (``T123``, ``C0``)
        for records that do not name theirs; ``print_caller`` shows it to readers, as CONFIG_PRINTK_CALLER does (not
        set in Debian's kernels). ``print_time`` is the parameter printk.time.
        """
        if size < 4096 or size & (size - 1):
            raise ValueError(f"log size {size} is no power of two of at least 4096")
        self.now = now
        self.size = size
        self.caller = caller
        self.print_caller = print_caller
        self.print_time = print_time
        self.clear_seq = 0
        """First record after the last SYSLOG_ACTION_CLEAR."""
        self.console_loglevel = 7
        self.default_message_loglevel = LOGLEVEL_WARNING
        self.minimum_console_loglevel = 1
        self.default_console_loglevel = 7
        self.dmesg_restrict = True
        """Only the privileged may read the log (CONFIG_SECURITY_DMESG_RESTRICT, which Debian sets)."""
        self.listeners: list[Callable[[], None]] = []
        """Called after each record, on the trio thread: pollers, consoles, log files. They must not raise."""
        self._devkmsg = "ratelimit"
        self._records: dict[int, Record] = {}
        self._descs = size // _AVERAGE_RECORD
        self._first = 0
        self._next = 0
        self._head = 0
        self._tail = 0
        self._last_ts = 0
        self._lot: trio.lowlevel.ParkingLot | None = None

    # writing

    def logger(self, prefix: str = "") -> Logger:
        """A :class:`Logger` whose lines begin with ``prefix`` (a ``pr_fmt``, colon and space included)."""
        return Logger(self, prefix)

    def emit(
        self,
        level: int,
        text: str | bytes,
        *,
        facility: int = LOG_KERN,
        caller: str | None = None,
        subsystem: str = "",
        device: str = "",
    ) -> int:
        """Store one complete message and return its sequence number.

        ``level`` is 0 to 7, or -1 for the default. The newline at the end may be left out. Newlines inside are kept
        in the record. ``subsystem`` and ``device`` are the record's dictionary.
        """
        data = c_string(text)
        # the newline is the last byte that fits: without it the record would stay open for a continuation
        data = data.removesuffix(b"\n")[: PRINTKRB_RECORD_MAX - 2] + b"\n"
        self.vprintk_emit(facility, level, data, caller=caller, subsystem=subsystem, device=device)
        return self._next - 1

    def printk(self, text: str | bytes, *, caller: str | None = None) -> int:
        """``printk()`` of an already formatted text with its ``KERN_*`` prefix; returns the length stored.

        Without a newline at the end the record stays open and unseen, as in the kernel.
        """
        return self.vprintk_emit(LOG_KERN, LOGLEVEL_DEFAULT, c_string(text), caller=caller)

    def vprintk_emit(
        self,
        facility: int,
        level: int,
        text: bytes,
        *,
        caller: str | None = None,
        subsystem: str = "",
        device: str = "",
    ) -> int:
        """Store a text exactly as the function of this name does, and wake readers; returns the length stored."""
        length = self._store(facility, level, text, self.caller() if caller is None else caller, subsystem, device)
        if self._lot is not None:
            self._lot.unpark_all()
        for listener in tuple(self.listeners):
            listener()
        return length

    def _store(self, facility: int, level: int, text: bytes, caller: str, subsystem: str, device: str) -> int:
        reserve = min(len(text) + 1, PRINTKRB_RECORD_MAX)
        flags = 0
        if facility == LOG_KERN:
            _, found, flags = _parse_prefix(text[:7])
            if level == LOGLEVEL_DEFAULT:
                level = found
        if level == LOGLEVEL_DEFAULT:
            level = self.default_message_loglevel
        has_device = bool(subsystem or device)
        if has_device:
            flags |= LOG_NEWLINE
        text = text[: reserve - 1]
        if text.endswith(b"\n"):
            text = text[:-1]
            flags |= LOG_NEWLINE
        if facility == LOG_KERN:
            text = text[_parse_prefix(text)[0] :]

        if flags & LOG_CONT:
            last = self._records.get(self._next - 1)
            if last is not None and self._reserve_in_last(last, reserve, caller):
                last.text += text
                if flags & LOG_NEWLINE:
                    last.flags |= LOG_NEWLINE
                    last.final = True
                return len(text)

        begin, end = self._reserve(reserve)
        self._last_ts = max(self._last_ts, round(self.now() * 1_000_000))
        record = Record(
            self._next, level & 7, facility, self._last_ts, caller, flags & 0x1F, text, subsystem, device,
            final=bool(flags & LOG_NEWLINE), begin=begin, end=end,
        )  # fmt: skip
        self._records[record.seq] = record
        self._next += 1
        return len(text)

    # the ring

    def _next_lpos(self, begin: int, reserve: int) -> int:
        """Where a block for ``reserve`` bytes ends; one that would cross the end of the buffer starts at its front."""
        block = (reserve + _BLOCK_HEAD + 7) & ~7
        end = begin + block
        if begin // self.size == end // self.size:
            return end
        return end // self.size * self.size + block

    def _push_tail(self, lpos: int) -> None:
        while self._tail < lpos and self._first < self._next:
            self._tail = self._records.pop(self._first).end
            self._first += 1

    def _reserve(self, reserve: int) -> tuple[int, int]:
        """Room for a new record; the one before is closed. Returns the logical positions of its block."""
        previous = self._records.get(self._next - 1)
        if previous is not None:
            previous.final = True
        if self._next - self._first >= self._descs:
            self._tail = self._records.pop(self._first).end
            self._first += 1
        begin = self._head
        self._head = self._next_lpos(begin, reserve)
        self._push_tail(self._head - self.size)
        return begin, self._head

    def _reserve_in_last(self, last: Record, reserve: int, caller: str) -> bool:
        """Whether the newest record is open, of the same caller, and has room for more; then room is made."""
        if last.final or last.caller != caller:
            return False
        reserve += len(last.text)
        if reserve > PRINTKRB_RECORD_MAX:
            return False
        end = self._next_lpos(last.begin, reserve)
        if end > self._head:
            self._head = last.end = end
            self._push_tail(end - self.size)
        return True

    # reading

    @property
    def first_seq(self) -> int:
        """Sequence number of the oldest record that can be read, 0 when there is none (prb_first_valid_seq)."""
        record = self.read_valid(0)
        return record.seq if record is not None else 0

    @property
    def next_seq(self) -> int:
        """Sequence number after the newest record that can be read (prb_next_seq)."""
        last = self._records.get(self._next - 1)
        return self._next if last is None or last.final else self._next - 1

    def read_valid(self, seq: int) -> Record | None:
        """The record ``seq``, or the oldest left if that is gone; None when it is not there yet (prb_read_valid)."""
        record = self._records.get(max(seq, self._first))
        return record if record is not None and record.final else None

    def records(self, seq: int = 0) -> Iterator[Record]:
        """The readable records from ``seq`` on."""
        while (record := self.read_valid(seq)) is not None:
            yield record
            seq = record.seq + 1

    async def wait_new(self, seq: int) -> None:
        """Return once :meth:`read_valid` of ``seq`` gives a record; returns at once when there is one."""
        import trio

        while self.read_valid(seq) is None:
            if self._lot is None:
                self._lot = trio.lowlevel.ParkingLot()
            await self._lot.park()

    def clear(self) -> None:
        """SYSLOG_ACTION_CLEAR: what is there now is hidden from dmesg, though not from /dev/kmsg."""
        self.clear_seq = self.next_seq

    # sysctl files

    @property
    def devkmsg(self) -> str:
        """``on``, ``off`` or ``ratelimit``: what happens to writes to /dev/kmsg."""
        return self._devkmsg

    def sysctl_printk_devkmsg_show(self) -> bytes:
        """Content of /proc/sys/kernel/printk_devkmsg."""
        return self._devkmsg.encode() + b"\n"

    def sysctl_printk_devkmsg_store(self, data: bytes) -> int:
        """Write /proc/sys/kernel/printk_devkmsg: one of the three words and a newline, nothing more or less.

        Returns the bytes consumed; raises ``OSError(EINVAL)``, and then the value stays.
        """
        word = data.split(b"\n", 1)[0].split(b"\0", 1)[0]
        value = next((name for name in ("on", "off", "ratelimit") if word[:9].startswith(name.encode())), None)
        if value is None or len(value) + 1 != len(data):
            raise OSError(errno.EINVAL, "Invalid argument")
        self._devkmsg = value
        return len(data)

    def sysctl_printk_show(self) -> bytes:
        """Content of /proc/sys/kernel/printk: the four levels, console, default, minimum, default console."""
        return b"%d\t%d\t%d\t%d\n" % (
            self.console_loglevel,
            self.default_message_loglevel,
            self.minimum_console_loglevel,
            self.default_console_loglevel,
        )

    def sysctl_printk_store(self, data: bytes) -> int:
        """Write /proc/sys/kernel/printk: up to four integers. Returns the bytes consumed; ``OSError(EINVAL)``."""
        levels = [
            self.console_loglevel,
            self.default_message_loglevel,
            self.minimum_console_loglevel,
            self.default_console_loglevel,
        ]
        levels, used = proc_dointvec(data, levels)
        (
            self.console_loglevel,
            self.default_message_loglevel,
            self.minimum_console_loglevel,
            self.default_console_loglevel,
        ) = levels
        return used
