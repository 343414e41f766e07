"""The doors of the kernel log: /dev/kmsg, syslog(2), and the lines that dmesg(1) prints.

Model: a :class:`KmsgReader` is one open /dev/kmsg; it stands before a record and gives one record a read. A
:class:`Syslog` is the state behind syslog(2), one for each machine: a reader that all processes share, and the
console's level. :func:`render_dmesg` is for klpfs' own ``dmesg``; Debian's reads /dev/kmsg and renders by itself.

Locks: none; everything happens on the trio thread. Reads that wait are ``async`` and may be cancelled: nothing is
lost then. Two reads that wait on one open file share its records between them.

Source: kernel/printk/printk.c (devkmsg_*, info_print_ext_header, msg_add_ext_text, msg_add_dict_text,
printk_get_next_message, record_print_text, find_first_fitting_seq, syslog_print, syslog_print_all, do_syslog).
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Collection, Iterable, Iterator
from typing import Final, Literal

from klpfs.kernel.kstrtox import c_string, simple_strtoul
from klpfs.kernel.printk import FACILITIES, LEVELS, LOG_CONT, LOG_USER, PRINTKRB_RECORD_MAX, Printk, Record

__all__ = [
    "SYSLOG_ACTION_CLEAR",
    "SYSLOG_ACTION_CLOSE",
    "SYSLOG_ACTION_CONSOLE_LEVEL",
    "SYSLOG_ACTION_CONSOLE_OFF",
    "SYSLOG_ACTION_CONSOLE_ON",
    "SYSLOG_ACTION_OPEN",
    "SYSLOG_ACTION_READ",
    "SYSLOG_ACTION_READ_ALL",
    "SYSLOG_ACTION_READ_CLEAR",
    "SYSLOG_ACTION_SIZE_BUFFER",
    "SYSLOG_ACTION_SIZE_UNREAD",
    "KmsgReader",
    "Syslog",
    "devkmsg_write",
    "print_ext_record",
    "record_print_text",
    "render_dmesg",
    "render_record",
    "seek_offset",
]

SYSLOG_ACTION_CLOSE: Final = 0
SYSLOG_ACTION_OPEN: Final = 1
SYSLOG_ACTION_READ: Final = 2
SYSLOG_ACTION_READ_ALL: Final = 3
SYSLOG_ACTION_READ_CLEAR: Final = 4
SYSLOG_ACTION_CLEAR: Final = 5
SYSLOG_ACTION_CONSOLE_OFF: Final = 6
SYSLOG_ACTION_CONSOLE_ON: Final = 7
SYSLOG_ACTION_CONSOLE_LEVEL: Final = 8
SYSLOG_ACTION_SIZE_UNREAD: Final = 9
SYSLOG_ACTION_SIZE_BUFFER: Final = 10

OFFSET_END: Final = 1 << 61
"""A read at this offset follows lseek(fd, 0, SEEK_END): the size that the file claims (see KmsgReader.read_at)."""
OFFSET_DATA: Final = 1 << 60
"""A read at this offset follows lseek(fd, 0, SEEK_DATA), if someone who saw that call has moved the file there."""
OFFSET_SEQ: Final = 1 << 62
"""A read at this offset or beyond follows a seek to the record whose number is in the bits above OFFSET_SEQ_SHIFT."""
OFFSET_SEQ_SHIFT: Final = 24  # more than any record is long: no read leads from one such offset to another one

PRINTK_MESSAGE_MAX: Final = 2048
"""Size of the buffer in which one record is rendered, its terminator included."""


class _Buffer:
    """Bytes up to a limit, with the two ways in which the kernel appends to one."""

    __slots__ = ("data", "size")

    def __init__(self, size: int) -> None:
        self.data = bytearray()
        self.size = size

    def format(self, text: bytes) -> None:
        """``scnprintf``: one byte less than there is room for, because of the terminator."""
        self.data += text[: max(self.size - len(self.data) - 1, 0)]

    def char(self, char: int) -> None:
        """``append_char``: uses the last byte, too."""
        if len(self.data) < self.size:
            self.data.append(char)

    def escaped(self, text: bytes, end: bytes) -> None:
        """``msg_add_ext_text``: anything but printable ASCII, and the backslash, as ``\\xNN``."""
        for char in text:
            if 0x20 <= char < 0x7F and char != 0x5C:
                self.char(char)
            else:
                self.format(b"\\x%02x" % char)
        self.char(end[0])


def print_ext_record(record: Record, print_caller: bool = False) -> bytes:
    """A record as a read of /dev/kmsg gives it: ``PRIO,SEQ,USEC,FLAG[,caller=ID];TEXT`` and its dictionary.

    Nothing exceeds :data:`PRINTK_MESSAGE_MAX` bytes; a text that grows beyond it is cut, its newline too.
    """
    flag = b"c" if record.flags & LOG_CONT else b"-"
    caller = b",caller=" + record.caller.encode() if print_caller else b""
    out = _Buffer(PRINTK_MESSAGE_MAX)
    out.format(b"%d,%d,%d,%s%s;" % (record.prio, record.seq, record.ts_usec, flag, caller))
    out.escaped(record.text, b"\n")
    for key, value in ((b"SUBSYSTEM", record.subsystem), (b"DEVICE", record.device)):
        if value:
            out.char(0x20)
            out.escaped(key, b"=")
            out.escaped(c_string(value), b"\n")
    return bytes(out.data)


def _print_prefix(record: Record, syslog: bool, time: bool, print_caller: bool) -> bytes:
    """``info_print_prefix``: the part before the text of each line."""
    prefix = b"<%d>" % record.prio if syslog else b""
    if time:
        prefix += b"[%5d.%06d]" % divmod(record.ts_usec, 1_000_000)
    if print_caller:
        prefix += b"[%6s]" % record.caller.encode()
    return prefix + b" " if time or print_caller else prefix


def record_print_text(
    record: Record,
    *,
    syslog: bool = True,
    time: bool = True,
    print_caller: bool = False,
    size: int = PRINTK_MESSAGE_MAX,
) -> bytes:
    """A record as syslog(2) gives it: each line with its prefix, and a newline at the end.

    Only whole lines are given: the first that does not fit ``size`` and those after it are dropped.
    """
    prefix = _print_prefix(record, syslog, time, print_caller)
    text = record.text[:size]
    out = bytearray()
    truncated = False
    while True:
        line, newline, _ = text.partition(b"\n")
        if not newline and truncated:
            break
        if len(out) + len(prefix) + len(text) + 2 > size:
            if len(out) + len(prefix) + len(line) + 2 > size:
                break
            text = text[: size - len(out) - len(prefix) - 2]
            truncated = True
        out += prefix + line + b"\n"
        if len(text) == len(line):
            break
        text = text[len(line) + 1 :]
    return bytes(out)


def devkmsg_write(printk: Printk, data: bytes, *, caller: str | None = None) -> int:
    """One write(2) to /dev/kmsg: one record. Returns the bytes consumed, which are all.

    A prefix ``<N>`` gives level (N & 7) and facility (N >> 3 & 255); facility 0 becomes ``user``. Text ends at the
    first NUL. Without a newline at its end the record is not readable before the next one. Raises
    ``OSError(EINVAL)`` for more than 1024 bytes. With printk_devkmsg ``off`` nothing is logged; ``ratelimit`` is
    not enforced.
    """
    if len(data) > PRINTKRB_RECORD_MAX:
        raise OSError(errno.EINVAL, "Invalid argument")
    if printk.devkmsg == "off":
        return len(data)
    line = c_string(data)
    level, facility = printk.default_message_loglevel, LOG_USER
    if line[:1] == b"<":
        value, used = simple_strtoul(line[1:], 10)
        if line[1 + used : 2 + used] == b">":
            level = value & 7
            facility = ((value & 0xFFFFFFFF) >> 3 & 0xFF) or LOG_USER
            line = line[2 + used :]
    printk.vprintk_emit(facility, level, line, caller=caller)
    return len(data)


def seek_offset(printk: Printk, whence: int) -> int:
    """The file offset that stands for ``lseek(fd, 0, whence)`` of now: SEEK_DATA or SEEK_END. Any thread."""
    seq = printk.clear_seq if whence == os.SEEK_DATA else printk.next_seq
    return OFFSET_SEQ + (seq << OFFSET_SEQ_SHIFT)


class KmsgReader:
    """One open /dev/kmsg. A new one stands before the oldest record there is."""

    def __init__(self, printk: Printk, *, readable: bool = True, privileged: bool = True) -> None:
        """Open it. ``readable``: not O_WRONLY; ``privileged``: the caller has CAP_SYSLOG.

        Raises ``OSError(EPERM)`` when the caller may not read the log, or when printk_devkmsg is ``off``.
        """
        if printk.devkmsg == "off" or (readable and printk.dmesg_restrict and not privileged):
            raise OSError(errno.EPERM, "Operation not permitted")
        self.printk = printk
        self.seq = printk.first_seq
        """Sequence number of the next record."""
        self._offset = 0  # where the last read_at() ended

    def read_nowait(self, size: int) -> bytes:
        """The next record, as :func:`print_ext_record` gives it.

        Raises ``OSError``: ``EAGAIN`` when there is none yet; ``EPIPE`` when records were overwritten before they
        were read, and the reader then stands before the oldest one left; ``EINVAL`` when the record is longer than
        ``size``, and it is skipped.
        """
        record = self.printk.read_valid(self.seq)
        if record is None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        if record.seq != self.seq:
            self.seq = record.seq
            raise OSError(errno.EPIPE, "Broken pipe")
        self.seq += 1
        data = print_ext_record(record, self.printk.print_caller)
        if len(data) > size:
            raise OSError(errno.EINVAL, "Invalid argument")
        return data

    async def read(self, size: int, *, nonblock: bool = False) -> bytes:
        """:meth:`read_nowait`, but unless ``nonblock`` it waits for a record. May be cancelled."""
        while True:
            try:
                return self.read_nowait(size)
            except BlockingIOError:
                if nonblock:
                    raise
            await self.printk.wait_new(self.seq)

    async def read_at(self, size: int, offset: int, *, nonblock: bool = False) -> bytes:
        """:meth:`read` for a file system that is told the offset of each read, but nothing of lseek(2).

        If ``offset`` is not where the last read ended, 0 means SEEK_SET, :data:`OFFSET_DATA` SEEK_DATA,
        :data:`OFFSET_END` SEEK_END, and :func:`seek_offset` tells of a seek as of the time when it was called. Any
        other offset is ignored, as the device ignores them all.
        """
        self.moved(offset)
        data = await self.read(size, nonblock=nonblock)
        self._offset = offset + len(data)
        return data

    def moved(self, offset: int) -> None:
        """The file's offset is ``offset`` now: see :meth:`read_at`."""
        if offset == self._offset:
            return
        whence = {0: os.SEEK_SET, OFFSET_DATA: os.SEEK_DATA, OFFSET_END: os.SEEK_END}.get(offset)
        if whence is not None:
            self.seek(0, whence)
        elif offset >= OFFSET_SEQ and not offset & (1 << OFFSET_SEQ_SHIFT) - 1:
            self.seq = (offset - OFFSET_SEQ) >> OFFSET_SEQ_SHIFT
        self._offset = offset

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2). SEEK_SET: the oldest record; SEEK_DATA: the first after the last clear; SEEK_END: after the last.

        Returns 0. Raises ``OSError``: ``ESPIPE`` for any offset but 0, ``EINVAL`` for another ``whence``.
        """
        if offset:
            raise OSError(errno.ESPIPE, "Illegal seek")
        if whence == os.SEEK_SET:
            self.seq = self.printk.first_seq
        elif whence == os.SEEK_DATA:
            self.seq = self.printk.clear_seq
        elif whence == os.SEEK_END:
            self.seq = self.printk.next_seq
        else:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    def poll(self) -> int:
        """Poll mask: readable when there is a record, with ERR and PRI when records were lost; never writable."""
        record = self.printk.read_valid(self.seq)
        if record is None:
            return 0
        mask = select.POLLIN | select.POLLRDNORM
        return mask if record.seq == self.seq else mask | select.POLLERR | select.POLLPRI

    def write(self, data: bytes, *, caller: str | None = None) -> int:
        """:func:`devkmsg_write`."""
        return devkmsg_write(self.printk, data, caller=caller)


class Syslog:
    """syslog(2) of one machine."""

    def __init__(self, printk: Printk) -> None:
        self.printk = printk
        self._seq = 0
        self._partial = 0
        self._time = True
        self._saved_console_loglevel: int | None = None

    async def syslog(
        self, action: int, length: int = 0, *, buffer: bool = True, privileged: bool = True
    ) -> int | bytes:
        """One call: the result, or for the actions that read, the bytes for the caller's buffer (length: result).

        ``length`` is that of the buffer, or the level of SYSLOG_ACTION_CONSOLE_LEVEL; ``buffer`` is False for a null
        pointer; ``privileged``: the caller has CAP_SYSLOG. SYSLOG_ACTION_READ waits for a record; it may be
        cancelled. Raises ``OSError``: ``EPERM``, ``EINVAL``.
        """
        if action == SYSLOG_ACTION_READ and privileged and buffer and length > 0:
            while self.printk.read_valid(self._seq) is None:
                await self.printk.wait_new(self._seq)
        return self.syslog_nowait(action, length, buffer=buffer, privileged=privileged)

    def syslog_nowait(
        self, action: int, length: int = 0, *, buffer: bool = True, privileged: bool = True
    ) -> int | bytes:
        """:meth:`syslog` that never waits: SYSLOG_ACTION_READ of an empty log gives no bytes."""
        printk = self.printk
        open_to_all = action in (SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_SIZE_BUFFER) and not printk.dmesg_restrict
        if not privileged and not open_to_all:
            raise OSError(errno.EPERM, "Operation not permitted")
        if action in (SYSLOG_ACTION_READ, SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_READ_CLEAR):
            if not buffer or length < 0:
                raise OSError(errno.EINVAL, "Invalid argument")
            if not length:
                return b""
            return self._read(length) if action == SYSLOG_ACTION_READ else self._read_all(action, length)
        if action in (SYSLOG_ACTION_CLOSE, SYSLOG_ACTION_OPEN):
            return 0
        if action == SYSLOG_ACTION_CLEAR:
            printk.clear()
            return 0
        if action == SYSLOG_ACTION_CONSOLE_OFF:
            if self._saved_console_loglevel is None:
                self._saved_console_loglevel = printk.console_loglevel
            printk.console_loglevel = printk.minimum_console_loglevel
            return 0
        if action == SYSLOG_ACTION_CONSOLE_ON:
            if self._saved_console_loglevel is not None:
                printk.console_loglevel = self._saved_console_loglevel
                self._saved_console_loglevel = None
            return 0
        if action == SYSLOG_ACTION_CONSOLE_LEVEL and 1 <= length <= 8:
            printk.console_loglevel = max(length, printk.minimum_console_loglevel)
            self._saved_console_loglevel = None
            return 0
        if action == SYSLOG_ACTION_SIZE_UNREAD:
            return self._size_unread()
        if action == SYSLOG_ACTION_SIZE_BUFFER:
            return printk.size
        raise OSError(errno.EINVAL, "Invalid argument")

    def _text(self, record: Record, time: bool) -> bytes:
        return record_print_text(record, time=time, print_caller=self.printk.print_caller)

    def _text_size(self, record: Record, time: bool) -> int:
        """What the rendered record takes, without regard to truncation (get_record_print_text_size)."""
        prefix = _print_prefix(record, True, time, self.printk.print_caller)
        return len(prefix) * record.line_count + len(record.text) + 1

    def _read(self, size: int) -> bytes:
        """Whole records that fit, or a part of the first one, which is continued next time (syslog_print)."""
        out = bytearray()
        while size and (record := self.printk.read_valid(self._seq)) is not None:
            if record.seq != self._seq:
                self._seq = record.seq
                self._partial = 0
            if not self._partial:
                self._time = self.printk.print_time
            text = self._text(record, self._time)[self._partial :]
            if len(text) <= size:
                self._seq = record.seq + 1
                self._partial = 0
            elif not out:
                text = text[:size]
                self._partial += size
            else:
                break
            if not text:
                break
            out += text
            size -= len(text)
        return bytes(out)

    def _read_all(self, action: int, size: int) -> bytes:
        """The newest records that fit, of those after the last clear (syslog_print_all)."""
        time = self.printk.print_time
        records = list(self.printk.records(self.printk.clear_seq))
        total = sum(self._text_size(record, time) for record in records)
        first = 0
        while first < len(records) and total > size:
            total -= self._text_size(records[first], time)
            first += 1
        text = b"".join(self._text(record, time) for record in records[first:])
        if action == SYSLOG_ACTION_READ_CLEAR:
            self.printk.clear()
        return text

    def _size_unread(self) -> int:
        record = self.printk.read_valid(self._seq)
        if record is None:
            return 0
        if record.seq != self._seq:
            self._seq = record.seq
            self._partial = 0
        time = self._time if self._partial else self.printk.print_time
        size = -self._partial
        for unread in self.printk.records(self._seq):
            size += self._text_size(unread, time)
            time = self.printk.print_time
        return size


# dmesg


def _safe(text: bytes, indent: int) -> str:
    """Text for a terminal: what cannot be printed as ``\\xNN``, lines after the first indented. Source: dmesg(1)."""
    out: list[str] = []
    chars = text.decode("utf-8", "surrogateescape")
    for i, char in enumerate(chars):
        if char == "\n":
            out.append("\n" + " " * indent if i + 1 < len(chars) else "\n")
        elif char.isprintable() or char in "\t\v\f\r" or (char >= "\x80" and char.isspace()):
            out.append(char)
        else:
            out.extend(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
    return "".join(out)


def render_record(record: Record, *, style: Literal["time", "notime", "raw"] = "time", decode: bool = False) -> str:
    """The line or lines of one record, without a newline at the end.

    ``style``: with a time stamp, without, or ``raw`` as syslog(2) gives it (unsafe for terminals: nothing is
    escaped). ``decode`` puts ``facility:level:`` first, if both have names. Of a text with several lines, those after
    the first are indented to its beginning; an empty text gives an empty line.
    """
    if style == "raw":
        return record_print_text(record)[:-1].decode("utf-8", "surrogateescape")
    if not record.text:
        return ""
    prefix = ""
    if decode and record.facility < len(FACILITIES):
        prefix = f"{FACILITIES[record.facility]:<6}:{LEVELS[record.level]:<6}: "
    if style == "time":
        prefix += "[{:5d}.{:06d}] ".format(*divmod(record.ts_usec, 1_000_000))
    return prefix + _safe(record.text, len(prefix))


def render_dmesg(
    records: Iterable[Record],
    *,
    style: Literal["time", "notime", "raw"] = "time",
    decode: bool = False,
    levels: Collection[int] | None = None,
    facilities: Collection[int] | None = None,
) -> Iterator[str]:
    """:func:`render_record` for the records of these levels and facilities (None: all)."""
    for record in records:
        if levels is not None and record.level not in levels:
            continue
        if facilities is not None and record.facility not in facilities:
            continue
        yield render_record(record, style=style, decode=decode)
