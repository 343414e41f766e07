"""Kernel functions that print, scan and convert: sprintf and its kin, seq_file, kstrto*, parameters.

Source
    lib/vsprintf.c, fs/seq_file.c, fs/sysfs/file.c, fs/libfs.c, lib/kstrtox.c, lib/hexdump.c, lib/cmdline.c,
    kernel/params.c, kernel/kallsyms.c.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.fmt import Args, vscan
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.stubs_mem import EINVAL, ENOMEM, alloc, duplicate, free
from klpfs.cpu.sandbox.thread import HANDLERS, Crash, Invoke, Thread, signed, stub
from klpfs.kernel import kstrtox

Steps = Generator[Any, Any, int | None]


# -- into buffers -----------------------------------------------------------------------------------------------------


def _put(m: Machine, buf: int, size: int, text: bytes) -> None:
    if size:
        m.mem.write(buf, text[: size - 1] + b"\0")


@stub("sprintf", "vsprintf")
def _sprintf(m: Machine, t: Thread, buf: int, text: bytes) -> int:
    m.mem.write(buf, text + b"\0")
    return len(text)


@stub("snprintf", "vsnprintf")
def _snprintf(m: Machine, t: Thread, buf: int, size: int, text: bytes) -> int:
    if size > 0x7FFFFFFF:
        return 0
    _put(m, buf, size, text)
    return len(text)


@stub("scnprintf", "vscnprintf")
def _scnprintf(m: Machine, t: Thread, buf: int, size: int, text: bytes) -> int:
    if size > 0x7FFFFFFF:
        return 0
    _put(m, buf, size, text)
    return min(len(text), max(size - 1, 0))


@stub("sysfs_emit")
def _sysfs_emit(m: Machine, t: Thread, buf: int, text: bytes) -> int:
    if not buf or buf & (L.PAGE_SIZE - 1):
        m.print(t, b"\x014invalid sysfs_emit: buf:%016x\n" % buf)
        return 0
    return _scnprintf(m, t, buf, L.PAGE_SIZE, text)  # type: ignore[return-value]


@stub("sysfs_emit_at")
def _sysfs_emit_at(m: Machine, t: Thread, buf: int, at: int, text: bytes) -> int:
    if not buf or buf & (L.PAGE_SIZE - 1) or not 0 <= at < L.PAGE_SIZE:
        m.print(t, b"\x014invalid sysfs_emit_at: buf:%016x at:%d\n" % (buf, at))
        return 0
    return _scnprintf(m, t, buf + at, L.PAGE_SIZE - at, text)  # type: ignore[return-value]


@stub("kasprintf", "kvasprintf", "kvasprintf_const")
def _kasprintf(m: Machine, t: Thread, flags: int, text: bytes) -> int:
    return duplicate(m, t, text + b"\0")


@stub("sscanf")
def _sscanf(m: Machine, t: Thread, buf: int, fmt: int, args: Args) -> int:
    return vscan(m.mem, m.mem.cstring(buf), m.mem.cstring(fmt), args, m.mem.store)


@stub("vsscanf")
def _vsscanf(m: Machine, t: Thread, buf: int, fmt: int, args: int) -> int:
    from klpfs.cpu.sandbox.fmt import VaList

    return vscan(m.mem, m.mem.cstring(buf), m.mem.cstring(fmt), VaList(m.mem, args), m.mem.store)


def hex_line(data: bytes, rowsize: int, groupsize: int, ascii: bool) -> bytes:
    """``hex_dump_to_buffer`` of one row."""
    if rowsize not in (16, 32):
        rowsize = 16
    data = data[:rowsize]
    if groupsize not in (1, 2, 4, 8) or len(data) % groupsize:
        groupsize = 1
    groups = [data[i : i + groupsize][::-1].hex() for i in range(0, len(data), groupsize)]
    line = " ".join(groups)
    if ascii:
        width = rowsize // groupsize * (2 * groupsize + 1) + 1
        line = line.ljust(width) + "".join(chr(b) if 0x20 <= b < 0x7F else "." for b in data)
    return line.encode()


@stub("hex_dump_to_buffer")
def _hex_dump_to_buffer(
    m: Machine, t: Thread, buf: int, size: int, rowsize: int, groupsize: int, line: int, room: int, ascii: bool
) -> int:
    text = hex_line(m.mem.read(buf, min(size, 32)), rowsize, groupsize, ascii)
    _put(m, line, room, text)
    return len(text)


@stub("sprint_symbol", "sprint_symbol_build_id")
def _sprint_symbol(m: Machine, t: Thread, buf: int, addr: int) -> int:
    return _sprintf(m, t, buf, m.symbol_text(addr, True, False).encode())  # type: ignore[return-value]


@stub("sprint_symbol_no_offset")
def _sprint_symbol_no_offset(m: Machine, t: Thread, buf: int, addr: int) -> int:
    return _sprintf(m, t, buf, m.symbol_text(addr, False, False).encode())  # type: ignore[return-value]


# -- seq_file: the buffer is the daemon's, or of seq_read() below -----------------------------------------------------


def seq_add(m: Machine, seq: int, text: bytes) -> int:
    """Append to a seq_file; -1 and the overflow mark (count == size) if it does not fit."""
    mem = m.mem
    size, count = mem.get(seq, L.SEQ_SIZE), mem.get(seq, L.SEQ_COUNT)
    if count + len(text) < size:
        mem.write(mem.get(seq, L.SEQ_BUF) + count, text)
        mem.put(seq, L.SEQ_COUNT, count + len(text))
        return 0
    mem.put(seq, L.SEQ_COUNT, size)
    return -1


@stub("seq_printf", "seq_vprintf")
def _seq_printf(m: Machine, t: Thread, seq: int, text: bytes) -> None:
    seq_add(m, seq, text)


@stub("__seq_puts", "seq_puts")
def _seq_puts(m: Machine, t: Thread, seq: int, text: int) -> None:
    seq_add(m, seq, m.mem.cstring(text))


@stub("seq_putc")
def _seq_putc(m: Machine, t: Thread, seq: int, ch: int) -> None:
    seq_add(m, seq, bytes([ch & 0xFF]))


@stub("seq_write")
def _seq_write(m: Machine, t: Thread, seq: int, data: int, size: int) -> int:
    return seq_add(m, seq, m.mem.read(data, size))


def _delimiter(m: Machine, addr: int) -> bytes:
    return m.mem.cstring(addr, 256) if addr else b""


@stub("seq_put_decimal_ull")
def _seq_put_ull(m: Machine, t: Thread, seq: int, delimiter: int, value: int) -> None:
    seq_add(m, seq, _delimiter(m, delimiter) + b"%d" % value)


@stub("seq_put_decimal_ll")
def _seq_put_ll(m: Machine, t: Thread, seq: int, delimiter: int, value: int) -> None:
    seq_add(m, seq, _delimiter(m, delimiter) + b"%d" % value)


@stub("seq_put_hex_ll")
def _seq_put_hex(m: Machine, t: Thread, seq: int, delimiter: int, value: int, width: int) -> None:
    seq_add(m, seq, _delimiter(m, delimiter) + f"{value:0{min(width, 16) or 1}x}".encode())


@stub("seq_pad")
def _seq_pad(m: Machine, t: Thread, seq: int, ch: int) -> None:
    fill = m.mem.get(seq, L.SEQ_PAD_UNTIL) - m.mem.get(seq, L.SEQ_COUNT)
    text = b" " * fill if 0 < fill <= L.PAGE_SIZE else b""
    seq_add(m, seq, text + (bytes([ch & 0xFF]) if ch else b""))


def _seq_open(m: Machine, t: Thread, file: int, op: int, private: int, buffer: int = 0) -> int:
    seq = alloc(m, t, L.SEQ_FILE_SIZE, 0x100)
    if not seq:
        return 0
    m.mem.put(file, L.FILE_PRIVATE, seq)
    m.mem.put(seq, L.SEQ_OP, op)
    m.mem.put(seq, L.SEQ_FILE, file)
    m.mem.put(seq, L.SEQ_PRIVATE, private)
    if buffer:
        m.mem.put(seq, L.SEQ_BUF, alloc(m, t, buffer))
        m.mem.put(seq, L.SEQ_SIZE, buffer)
    return seq


@stub("seq_open")
def _seq_open_stub(m: Machine, t: Thread, file: int, op: int) -> int:
    return 0 if _seq_open(m, t, file, op, 0) else -ENOMEM


@stub("__seq_open_private")
def _seq_open_private(m: Machine, t: Thread, file: int, op: int, size: int) -> int:
    private = alloc(m, t, max(size, 1), 0x100)
    return private if private and _seq_open(m, t, file, op, private) else 0


@stub("seq_open_private")
def _seq_open_private_int(m: Machine, t: Thread, file: int, op: int, size: int) -> int:
    return 0 if _seq_open_private(m, t, file, op, size) else -ENOMEM


@stub("single_open", "single_open_size")
def _single_open(m: Machine, t: Thread, file: int, show: int, data: int, size: int = 0) -> int:
    op = alloc(m, t, 32, 0x100)
    if not op:
        return -ENOMEM
    # single_start() and its kin never run: seq_read() calls show once where start is missing
    m.mem.store(op + 24, show)
    return 0 if _seq_open(m, t, file, op, data, size) else -ENOMEM


@stub("single_release", "seq_release", "seq_release_private")
def _seq_release(m: Machine, t: Thread, inode: int, file: int) -> int:
    seq = m.mem.get(file, L.FILE_PRIVATE)
    if seq:
        op = m.mem.get(seq, L.SEQ_OP)
        if m.heap.size(op) and not m.mem.load(op):
            free(m, op)
        free(m, m.mem.get(seq, L.SEQ_BUF))
        free(m, seq)
    return 0


def seq_show(m: Machine, t: Thread, seq: int) -> Generator[Any, Any, int]:
    """Fill a seq_file with the whole of its contents: start, show and next, stop. 0 or a negative errno."""
    mem = m.mem
    op = mem.get(seq, L.SEQ_OP)
    start, stop, following, show = (mem.load(op + 8 * i) for i in range(4))
    position = m.heap.alloc(8, t.module, zero=True)
    if not position:
        return -ENOMEM
    try:
        if not start:
            return signed((yield Invoke(show, (seq, 1))), 32)
        item = yield Invoke(start, (seq, position))
        err = 0
        while item and not err:
            if signed(item) < 0 and signed(item) >= -4095:
                err = signed(item)
                break
            before = mem.get(seq, L.SEQ_COUNT)
            answer = signed((yield Invoke(show, (seq, item))), 32)
            if answer > 0:  # SEQ_SKIP
                mem.put(seq, L.SEQ_COUNT, before)
            elif answer < 0:
                err = answer
                break
            if mem.get(seq, L.SEQ_COUNT) == mem.get(seq, L.SEQ_SIZE):
                break
            item = yield Invoke(following, (seq, item, position))
        yield Invoke(stop, (seq, item if not err else 0))
        return err
    finally:
        m.heap.free(position)


@stub("seq_read")
def _seq_read(m: Machine, t: Thread, file: int, buf: int, size: int, where: int) -> Steps:
    mem = m.mem
    seq = mem.get(file, L.FILE_PRIVATE)
    at = mem.load(where)
    if at == 0 or not mem.get(seq, L.SEQ_BUF):
        room = max(mem.get(seq, L.SEQ_SIZE), L.PAGE_SIZE)
        while True:
            if not mem.get(seq, L.SEQ_BUF):
                mem.put(seq, L.SEQ_BUF, alloc(m, t, room))
                mem.put(seq, L.SEQ_SIZE, room)
                if not mem.get(seq, L.SEQ_BUF):
                    return -ENOMEM
            mem.put(seq, L.SEQ_COUNT, 0)
            err = yield from seq_show(m, t, seq)
            if err:
                return err
            if mem.get(seq, L.SEQ_COUNT) < mem.get(seq, L.SEQ_SIZE):
                break
            free(m, mem.get(seq, L.SEQ_BUF))
            mem.put(seq, L.SEQ_BUF, 0)
            room *= 2
    count = max(0, min(size, mem.get(seq, L.SEQ_COUNT) - at))
    mem.write(buf, mem.read(mem.get(seq, L.SEQ_BUF) + at, count))
    mem.store(where, at + count)
    return count


@stub("seq_lseek", "noop_llseek", "default_llseek", "generic_file_llseek")
def _lseek(m: Machine, t: Thread, file: int, offset: int, whence: int) -> int:
    position = m.mem.get(file, L.FILE_POS)
    if whence == 1:
        offset += position
    elif whence != 0:
        return -EINVAL
    if offset < 0:
        return -EINVAL
    m.mem.put(file, L.FILE_POS, offset)
    return offset


@stub("simple_open")
def _simple_open(m: Machine, t: Thread, inode: int, file: int) -> int:
    private = m.mem.get(inode, L.INODE_PRIVATE)
    if private:
        m.mem.put(file, L.FILE_PRIVATE, private)
    return 0


@stub("pde_data")
def _pde_data(m: Machine, t: Thread, inode: int) -> int:
    return m.mem.get(inode, L.INODE_PRIVATE)


@stub("seq_list_start")
def _seq_list_start(m: Machine, t: Thread, head: int, position: int) -> int:
    item = m.mem.load(head)
    while item != head:
        if position == 0:
            return item
        position -= 1
        item = m.mem.load(item)
    return 0


@stub("seq_list_start_head")
def _seq_list_start_head(m: Machine, t: Thread, head: int, position: int) -> int:
    return head if position == 0 else _seq_list_start(m, t, head, position - 1)  # type: ignore[return-value]


@stub("seq_list_next")
def _seq_list_next(m: Machine, t: Thread, item: int, head: int, position: int) -> int:
    following = m.mem.load(item)
    m.mem.store(position, m.mem.load(position) + 1)
    return 0 if following == head else following


@stub("simple_read_from_buffer")
def _simple_read(m: Machine, t: Thread, to: int, count: int, where: int, data: int, available: int) -> int:
    at = signed(m.mem.load(where))
    if at < 0:
        return -EINVAL
    count = min(count, max(0, available - at))
    m.mem.write(to, m.mem.read(data + at, count))
    m.mem.store(where, at + count)
    return count


@stub("simple_write_to_buffer")
def _simple_write(m: Machine, t: Thread, to: int, room: int, where: int, data: int, count: int) -> int:
    at = signed(m.mem.load(where))
    if at < 0:
        return -EINVAL
    count = min(count, max(0, room - at))
    m.mem.write(to + at, m.mem.read(data, count))
    m.mem.store(where, at + count)
    return count


# -- numbers ----------------------------------------------------------------------------------------------------------

_KSTRTO: dict[str, tuple[Callable[[bytes, int], int], int]] = {
    "kstrtoull": (kstrtox.kstrtoull, 8),
    "kstrtoll": (kstrtox.kstrtoll, 8),
    "kstrtoul": (kstrtox.kstrtoul, 8),
    "kstrtol": (kstrtox.kstrtol, 8),
    "kstrtouint": (kstrtox.kstrtouint, 4),
    "kstrtoint": (kstrtox.kstrtoint, 4),
    "kstrtou16": (kstrtox.kstrtou16, 2),
    "kstrtos16": (kstrtox.kstrtos16, 2),
    "kstrtou8": (kstrtox.kstrtou8, 1),
    "kstrtos8": (kstrtox.kstrtos8, 1),
}


def _convert(m: Machine, kind: str, text: bytes, base: int, result: int) -> int:
    parse, size = _KSTRTO[kind]
    try:
        value = parse(text, base)
    except OSError as error:
        return -(error.errno or EINVAL)
    m.mem.store(result, value, size)
    return 0


def _kstrto(kind: str) -> None:
    def plain(m: Machine, t: Thread, text: bytes, base: int, result: int) -> int:
        return _convert(m, kind, text, base, result)

    def from_user(m: Machine, t: Thread, data: int, size: int, base: int, result: int) -> int:
        return _convert(m, kind, m.mem.read(data, min(size, 66)).split(b"\0")[0], base, result)

    name = {"kstrtoul": "_kstrtoul", "kstrtol": "_kstrtol"}.get(kind, kind)
    HANDLERS[name] = plain
    HANDLERS[f"{kind}_from_user"] = from_user


for _kind in _KSTRTO:
    _kstrto(_kind)
for _kind in ("kstrtou16", "kstrtos16", "kstrtos8"):
    del HANDLERS[f"{_kind}_from_user"]


@stub("kstrtobool")
def _kstrtobool(m: Machine, t: Thread, text: int, result: int) -> int:
    try:
        value = kstrtox.kstrtobool(m.mem.cstring(text) if text else None)
    except OSError as error:
        return -(error.errno or EINVAL)
    m.mem.store(result, value, 1)
    return 0


@stub("kstrtobool_from_user")
def _kstrtobool_from_user(m: Machine, t: Thread, data: int, size: int, result: int) -> int:
    try:
        value = kstrtox.kstrtobool(m.mem.read(data, min(size, 4)).split(b"\0")[0])
    except OSError as error:
        return -(error.errno or EINVAL)
    m.mem.store(result, value, 1)
    return 0


def _simple_number(text: bytes, base: int) -> tuple[int, int]:
    """``simple_strtoull``: value and bytes used."""
    at = 0
    if base in (0, 16) and text[:2].lower() == b"0x" and text[2:3] and text[2:3] in b"0123456789abcdefABCDEF":
        base, at = 16, 2
    elif base == 0:
        base = 8 if text[:1] == b"0" else 10
    digits = b"0123456789abcdefghijklmnopqrstuvwxyz"[:base]
    end = at
    while end < len(text) and text[end : end + 1].lower() in [bytes([d]) for d in digits]:
        end += 1
    return (int(text[at:end], base) if end > at else 0), end


@stub("simple_strtoul", "simple_strtoull")
def _simple_strtoul(m: Machine, t: Thread, text: int, end: int, base: int) -> int:
    value, used = _simple_number(m.mem.cstring(text, 128), base)
    if end:
        m.mem.store(end, text + used)
    return value


@stub("simple_strtol", "simple_strtoll")
def _simple_strtol(m: Machine, t: Thread, text: int, end: int, base: int) -> int:
    data = m.mem.cstring(text, 128)
    minus = data[:1] == b"-"
    value, used = _simple_number(data[minus:], base)
    if end:
        m.mem.store(end, text + minus + used)
    return -value if minus else value


@stub("memparse")
def _memparse(m: Machine, t: Thread, text: int, end: int) -> int:
    data = m.mem.cstring(text, 128)
    value, used = _simple_number(data, 0)
    shift = {b"E": 60, b"P": 50, b"T": 40, b"G": 30, b"M": 20, b"K": 10}.get(data[used : used + 1].upper())
    if shift is not None:
        value, used = value << shift, used + 1
    if end:
        m.mem.store(end, text + used)
    return value


# -- parameters -------------------------------------------------------------------------------------------------------

_INTEGERS: dict[str, tuple[str, str, int, bool]] = {
    # kernel type: kstrto kind, format, size, signed
    "byte": ("kstrtou8", "d", 1, False),
    "short": ("kstrtos16", "d", 2, True),
    "ushort": ("kstrtou16", "d", 2, False),
    "int": ("kstrtoint", "d", 4, True),
    "uint": ("kstrtouint", "d", 4, False),
    "long": ("kstrtol", "d", 8, True),
    "ulong": ("kstrtoul", "d", 8, False),
    "ullong": ("kstrtoull", "d", 8, False),
    "hexint": ("kstrtouint", "#08x", 4, False),
}


def _param_integer(kind: str) -> None:
    parse, form, size, is_signed = _INTEGERS[kind]

    def set_(m: Machine, t: Thread, text: int, kp: int) -> int:
        if not text:
            return -EINVAL
        return _convert(m, parse, m.mem.cstring(text), 0, m.mem.get(kp, L.PARAM_ARG))

    def get(m: Machine, t: Thread, buf: int, kp: int) -> int:
        value = m.mem.load(m.mem.get(kp, L.PARAM_ARG), size)
        if is_signed:
            value = signed(value, 8 * size)
        return _scnprintf(m, t, buf, L.PAGE_SIZE, f"{value:{form}}\n".encode())  # type: ignore[return-value]

    HANDLERS[f"param_set_{kind}"] = set_
    HANDLERS[f"param_get_{kind}"] = get


for _kind in _INTEGERS:
    _param_integer(_kind)


def _set_bool(m: Machine, text: int, at: int, size: int, invert: bool) -> int:
    data = m.mem.cstring(text) if text else b"1"
    try:
        value = kstrtox.kstrtobool(data)
    except OSError as error:
        return -(error.errno or EINVAL)
    m.mem.store(at, value ^ invert, size)
    return 0


@stub("param_set_bool")
def _param_set_bool(m: Machine, t: Thread, text: int, kp: int) -> int:
    return _set_bool(m, text, m.mem.get(kp, L.PARAM_ARG), 1, False)


@stub("param_set_invbool")
def _param_set_invbool(m: Machine, t: Thread, text: int, kp: int) -> int:
    return _set_bool(m, text, m.mem.get(kp, L.PARAM_ARG), 1, True)


@stub("param_set_bint")
def _param_set_bint(m: Machine, t: Thread, text: int, kp: int) -> int:
    return _set_bool(m, text, m.mem.get(kp, L.PARAM_ARG), 4, False)


@stub("param_set_bool_enable_only")
def _param_set_bool_enable_only(m: Machine, t: Thread, text: int, kp: int) -> int:
    at = m.mem.get(kp, L.PARAM_ARG)
    before = m.mem.load(at, 1)
    err = _set_bool(m, text, at, 1, False)
    if not err and before and not m.mem.load(at, 1):
        m.mem.store(at, 1, 1)
        return -30  # EROFS
    return err


@stub("param_get_bool")
def _param_get_bool(m: Machine, t: Thread, buf: int, kp: int) -> int:
    value = m.mem.load(m.mem.get(kp, L.PARAM_ARG), 1)
    return _sprintf(m, t, buf, b"Y\n" if value else b"N\n")  # type: ignore[return-value]


@stub("param_get_invbool")
def _param_get_invbool(m: Machine, t: Thread, buf: int, kp: int) -> int:
    value = m.mem.load(m.mem.get(kp, L.PARAM_ARG), 1)
    return _sprintf(m, t, buf, b"N\n" if value else b"Y\n")  # type: ignore[return-value]


@stub("param_set_uint_minmax")
def _param_set_uint_minmax(m: Machine, t: Thread, text: int, kp: int, low: int, high: int) -> int:
    if not text:
        return -EINVAL
    try:
        value = kstrtox.kstrtouint(m.mem.cstring(text), 0)
    except OSError as error:
        return -(error.errno or EINVAL)
    if not low <= value <= high:
        return -EINVAL
    m.mem.store(m.mem.get(kp, L.PARAM_ARG), value, 4)
    return 0


@stub("param_set_charp")
def _param_set_charp(m: Machine, t: Thread, text: int, kp: int) -> int:
    data = m.mem.cstring(text, 1025)
    if len(data) > 1024:
        m.print(t, b"\x013%s: string parameter too long\n" % m.mem.cstring(m.mem.get(kp, L.PARAM_NAME), 64))
        return -28  # ENOSPC
    at = m.mem.get(kp, L.PARAM_ARG)
    new = duplicate(m, t, data + b"\0")
    if not new:
        return -ENOMEM
    old = m.mem.load(at)
    m.mem.store(at, new)
    if m.heap.size(old):
        free(m, old)
    return 0


@stub("param_get_charp")
def _param_get_charp(m: Machine, t: Thread, buf: int, kp: int) -> int:
    at = m.mem.load(m.mem.get(kp, L.PARAM_ARG))
    text = m.mem.cstring(at) if at else b"(null)"
    return _scnprintf(m, t, buf, L.PAGE_SIZE, text + b"\n")  # type: ignore[return-value]


@stub("param_free_charp")
def _param_free_charp(m: Machine, t: Thread, arg: int) -> None:
    at = m.mem.load(arg)
    if m.heap.size(at):
        free(m, at)


@stub("param_set_copystring")
def _param_set_copystring(m: Machine, t: Thread, text: int, kp: int) -> int:
    kps = m.mem.get(kp, L.PARAM_ARG)
    data = m.mem.cstring(text)
    room = m.mem.get(kps, L.PARAM_STRING_MAXLEN)
    if len(data) + 1 > room:
        name = m.mem.cstring(m.mem.get(kp, L.PARAM_NAME), 64)
        m.print(t, b"\x013%s: string doesn't fit in %u chars.\n" % (name, room - 1))
        return -28  # ENOSPC
    m.mem.write(m.mem.get(kps, L.PARAM_STRING_STRING), data + b"\0")
    return 0


@stub("param_get_string")
def _param_get_string(m: Machine, t: Thread, buf: int, kp: int) -> int:
    kps = m.mem.get(kp, L.PARAM_ARG)
    text = m.mem.cstring(m.mem.get(kps, L.PARAM_STRING_STRING))
    return _scnprintf(m, t, buf, L.PAGE_SIZE, text + b"\n")  # type: ignore[return-value]


def _element(m: Machine, t: Thread, kp: int, arr: int) -> int:
    """A struct kernel_param for the elements of an array."""
    copy = alloc(m, t, L.PARAM_SIZE)
    if not copy:
        raise Crash("budget", "the heap is used up")
    m.mem.write(copy, m.mem.read(kp, L.PARAM_SIZE))
    m.mem.put(copy, L.PARAM_ARG, m.mem.get(arr, L.PARAM_ARRAY_ELEM))
    m.mem.put(copy, L.PARAM_OPS, m.mem.get(arr, L.PARAM_ARRAY_OPS))
    return copy


@stub("param_array_set")
def _param_array_set(m: Machine, t: Thread, text: int, kp: int) -> Steps:
    mem = m.mem
    arr = mem.get(kp, L.PARAM_ARG)
    name = mem.cstring(mem.get(kp, L.PARAM_NAME), 64)
    if not text:
        m.print(t, b"\x013%s: expects arguments\n" % name)
        return -EINVAL
    parts = mem.cstring(text).split(b",")
    limit, size = mem.get(arr, L.PARAM_ARRAY_MAX), mem.get(arr, L.PARAM_ARRAY_ELEMSIZE)
    number = mem.get(arr, L.PARAM_ARRAY_NUM)
    setter = mem.get(mem.get(arr, L.PARAM_ARRAY_OPS), L.PARAM_OPS_SET)
    element = _element(m, t, kp, arr)
    if number:
        mem.store(number, 0, 4)
    try:
        for count, part in enumerate(parts):
            if count >= limit:
                m.print(t, b"\x013%s: can only take %i arguments\n" % (name, limit))
                return -EINVAL
            item = duplicate(m, t, part + b"\0")
            err = signed((yield Invoke(setter, (item, element))), 32)
            m.heap.free(item)
            if err:
                return err
            mem.put(element, L.PARAM_ARG, mem.get(element, L.PARAM_ARG) + size)
            if number:
                mem.store(number, count + 1, 4)
        return 0
    finally:
        m.heap.free(element)


@stub("param_array_get")
def _param_array_get(m: Machine, t: Thread, buf: int, kp: int) -> Steps:
    mem = m.mem
    arr = mem.get(kp, L.PARAM_ARG)
    number = mem.get(arr, L.PARAM_ARRAY_NUM)
    count = mem.load(number, 4) if number else mem.get(arr, L.PARAM_ARRAY_MAX)
    size = mem.get(arr, L.PARAM_ARRAY_ELEMSIZE)
    getter = mem.get(mem.get(arr, L.PARAM_ARRAY_OPS), L.PARAM_OPS_GET)
    element = _element(m, t, kp, arr)
    at = 0
    try:
        for i in range(min(count, 4096)):
            if i:
                mem.store(buf + at - 1, ord(","), 1)  # over the newline of the last one
            mem.put(element, L.PARAM_ARG, mem.get(arr, L.PARAM_ARRAY_ELEM) + i * size)
            answer = signed((yield Invoke(getter, (buf + at, element))), 32)
            if answer < 0:
                return answer
            at += answer
        mem.store(buf + at, 0, 1)
        return at
    finally:
        m.heap.free(element)


@stub("param_array_free")
def _param_array_free(m: Machine, t: Thread, arg: int) -> Steps:
    mem = m.mem
    release = mem.get(mem.get(arg, L.PARAM_ARRAY_OPS), L.PARAM_OPS_FREE)
    number = mem.get(arg, L.PARAM_ARRAY_NUM)
    if release:
        for i in range(min(mem.load(number, 4) if number else mem.get(arg, L.PARAM_ARRAY_MAX), 4096)):
            yield Invoke(release, (mem.get(arg, L.PARAM_ARRAY_ELEM) + i * mem.get(arg, L.PARAM_ARRAY_ELEMSIZE),))
    return None
