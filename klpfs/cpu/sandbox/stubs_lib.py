"""Kernel functions of lib/ that few modules need: fifos, radix trees, bitmaps, pools, command lines, user values.

Model
    ``__get_user_N`` and ``__put_user_N`` have a calling convention of their own: address, value and error are in
    registers that a C function would not use. What is a table in the kernel (radix trees, xarrays) is one of Python's,
    kept by address, as in :mod:`~klpfs.cpu.sandbox.stubs_data`.

Source
    lib/{kfifo,llist,bitmap,argv_split,glob,string_helpers,radix-tree,xarray}.c, mm/{mempool,util,page_alloc}.c,
    fs/libfs.c (``simple_attr_*``), arch/x86/lib/{get,put}user.S, kernel/static_call_inline.c, kernel/stacktrace.c.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.layout import U32, U64
from klpfs.cpu.sandbox.engine import RAX, RCX, RDX
from klpfs.cpu.sandbox.fmt import vformat
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.memory import PageFault
from klpfs.cpu.sandbox.report import stack_of
from klpfs.cpu.sandbox.stubs_data import entries, lowest_free
from klpfs.cpu.sandbox.stubs_mem import alloc, duplicate, free
from klpfs.cpu.sandbox.thread import HANDLERS, Crash, Invoke, Thread, signed, stub
from klpfs.cpu.sandbox.waiting import Steps
from klpfs.kernel import kstrtox

EINVAL, EFAULT, ENOMEM, EEXIST, EBUSY, EACCES = 22, 14, 12, 17, 16, 13
_MAX_BITS = 1 << 20
_MAX_TEXT = 1 << 16


# -- values in user memory --------------------------------------------------------------------------------------------


def _user_values(size: int) -> None:
    @stub(f"__get_user_{size}", f"__get_user_nocheck_{size}")
    def get_user(m: Machine, t: Thread) -> int:
        try:
            value, error = m.mem.load(m.engine.get(RAX), size), 0
        except PageFault:
            value, error = 0, -EFAULT
        m.engine.set(RDX, value)
        return error

    @stub(f"__put_user_{size}", f"__put_user_nocheck_{size}")
    def put_user(m: Machine, t: Thread) -> int:
        value, error = m.engine.get(RAX), 0
        try:
            m.mem.store(m.engine.get(RCX), value & (1 << 8 * size) - 1, size)
        except PageFault:
            error = -EFAULT
        m.engine.set(RCX, error & U64)
        return value  # the caller keeps it in rax


for _size in (1, 2, 4, 8):
    _user_values(_size)


@stub("__clear_user", "clear_user")
def _clear_user(m: Machine, t: Thread, to: int, size: int) -> int:
    try:
        m.mem.write(to, bytes(size))
    except PageFault:
        return size
    return 0


@stub("strnlen_user")
def _strnlen_user(m: Machine, t: Thread, text: int, limit: int) -> int:
    try:
        return min(len(m.mem.cstring(text, limit)) + 1, limit + 1)
    except PageFault:
        return 0


def _user_copy(m: Machine, t: Thread, src: int, size: int, tail: bytes = b"") -> int:
    try:
        data = m.mem.read(src, size)
    except PageFault:
        return -EFAULT
    return duplicate(m, t, data + tail) or -ENOMEM


@stub("memdup_user", "vmemdup_user")
def _memdup_user(m: Machine, t: Thread, src: int, size: int) -> int:
    return _user_copy(m, t, src, size)


@stub("memdup_user_nul")
def _memdup_user_nul(m: Machine, t: Thread, src: int, size: int) -> int:
    return _user_copy(m, t, src, size, b"\0")


@stub("strndup_user")
def _strndup_user(m: Machine, t: Thread, src: int, limit: int) -> int:
    try:
        text = m.mem.cstring(src, limit)
    except PageFault:
        return -EFAULT
    return -EINVAL if len(text) >= limit else duplicate(m, t, text + b"\0") or -ENOMEM


# -- files of one number (fs/libfs.c): a struct of our own, which only these functions look into ----------------------

_ATTR_SIZE, _GET, _SET, _DATA, _FORMAT, _TEXT = 96, 0, 8, 16, 24, 32


class _List:
    def __init__(self, *values: int) -> None:
        self._values = iter(values)

    def next(self) -> int:
        return next(self._values)


@stub("simple_attr_open")
def _simple_attr_open(m: Machine, t: Thread, inode: int, file: int, get: int, set_: int, fmt: int) -> int:
    attr = alloc(m, t, _ATTR_SIZE, 0x100)
    if not attr:
        return -ENOMEM
    for offset, value in ((_GET, get), (_SET, set_), (_DATA, m.mem.get(inode, L.INODE_PRIVATE)), (_FORMAT, fmt)):
        m.mem.store(attr + offset, value)
    m.mem.put(file, L.FILE_PRIVATE, attr)
    return 0


@stub("simple_attr_release")
def _simple_attr_release(m: Machine, t: Thread, inode: int, file: int) -> int:
    free(m, m.mem.get(file, L.FILE_PRIVATE))
    return 0


@stub("simple_attr_read", "debugfs_attr_read")
def _simple_attr_read(m: Machine, t: Thread, file: int, buf: int, count: int, where: int) -> Steps:
    attr = m.mem.get(file, L.FILE_PRIVATE)
    get = m.mem.load(attr + _GET)
    if not get:
        return -EACCES
    text = m.mem.cstring(attr + _TEXT, 24)
    if not m.mem.load(where) or not text:
        room = alloc(m, t, 8, 0x100)
        answer = signed((yield Invoke(get, (m.mem.load(attr + _DATA), room))), 32)
        value = m.mem.load(room)
        free(m, room)
        if answer:
            return answer
        text = vformat(m.fmt, m.mem.cstring(m.mem.load(attr + _FORMAT), 256), _List(value))[:23]
        m.mem.write(attr + _TEXT, text + b"\0")
    at = signed(m.mem.load(where))
    if at < 0:
        return -EINVAL
    part = text[at : at + count]
    m.mem.write(buf, part)
    m.mem.store(where, at + len(part))
    return len(part)


def _attr_write(parse: Any, *names: str) -> None:
    @stub(*names)
    def write(m: Machine, t: Thread, file: int, buf: int, count: int, where: int) -> Steps:
        attr = m.mem.get(file, L.FILE_PRIVATE)
        function = m.mem.load(attr + _SET)
        if not function:
            return -EACCES
        try:
            value = parse(m.mem.read(buf, min(count, 23)).split(b"\0")[0], 0)
        except PageFault:
            return -EFAULT
        except OSError as error:
            return -(error.errno or EINVAL)
        answer = signed((yield Invoke(function, (m.mem.load(attr + _DATA), value & U64))), 32)
        return answer or count


_attr_write(kstrtox.kstrtoull, "simple_attr_write", "debugfs_attr_write")
_attr_write(kstrtox.kstrtoll, "simple_attr_write_signed", "debugfs_attr_write_signed")


@stub("nonseekable_open", "stream_open")
def _nonseekable_open(m: Machine, t: Thread, inode: int, file: int) -> int:
    return 0


# -- fifos: struct __kfifo is in, out, mask, esize, data --------------------------------------------------------------


def _fifo(m: Machine, fifo: int) -> tuple[int, int, int, int, int]:
    first, last, mask, esize = (m.mem.load(fifo + 4 * i, 4) for i in range(4))
    return first, last, mask, esize, m.mem.load(fifo + 16)


def _fifo_move(m: Machine, fifo: int, addr: int, at: int, count: int, *, put: bool) -> None:
    _, _, mask, esize, data = _fifo(m, fifo)
    for i in range(count):
        slot, item = data + (at + i & mask) * esize, addr + i * esize
        src, dst = (item, slot) if put else (slot, item)
        m.mem.write(dst, m.mem.read(src, esize))


@stub("__kfifo_alloc")
def _kfifo_alloc(m: Machine, t: Thread, fifo: int, size: int, esize: int, flags: int) -> int:
    size = 1 << max(size - 1, 0).bit_length()
    m.mem.write(fifo, bytes(24))
    if size < 2:
        return -EINVAL
    data = alloc(m, t, size * esize)
    m.mem.store(fifo + 8, size - 1 if data else 0, 4)
    m.mem.store(fifo + 12, esize, 4)
    m.mem.store(fifo + 16, data)
    return 0 if data else -ENOMEM


@stub("__kfifo_init")
def _kfifo_init(m: Machine, t: Thread, fifo: int, buffer: int, size: int, esize: int) -> int:
    count = size // max(esize, 1)
    count = 1 << count.bit_length() - 1 if count else 0
    m.mem.write(fifo, bytes(24))
    m.mem.store(fifo + 8, max(count - 1, 0), 4)
    m.mem.store(fifo + 12, esize, 4)
    m.mem.store(fifo + 16, buffer)
    return 0 if count >= 2 else -EINVAL


@stub("__kfifo_free")
def _kfifo_free(m: Machine, t: Thread, fifo: int) -> None:
    free(m, m.mem.load(fifo + 16))
    m.mem.write(fifo, bytes(24))


@stub("__kfifo_in")
def _kfifo_in(m: Machine, t: Thread, fifo: int, buf: int, count: int) -> int:
    first, last, mask, _, _ = _fifo(m, fifo)
    count = min(count, mask + 1 - (first - last & U32))
    _fifo_move(m, fifo, buf, first, count, put=True)
    m.mem.store(fifo, first + count & U32, 4)
    return count


@stub("__kfifo_out_peek")
def _kfifo_out_peek(m: Machine, t: Thread, fifo: int, buf: int, count: int) -> int:
    first, last, _, _, _ = _fifo(m, fifo)
    count = min(count, first - last & U32)
    _fifo_move(m, fifo, buf, last, count, put=False)
    return count


@stub("__kfifo_out")
def _kfifo_out(m: Machine, t: Thread, fifo: int, buf: int, count: int) -> int:
    done = int(_kfifo_out_peek(m, t, fifo, buf, count))  # type: ignore[arg-type]
    m.mem.store(fifo + 4, m.mem.load(fifo + 4, 4) + done & U32, 4)
    return done


# -- radix trees and the rest of the xarrays --------------------------------------------------------------------------


@stub("radix_tree_insert")
def _radix_insert(m: Machine, t: Thread, root: int, index: int, item: int) -> int:
    found = entries(m, root)
    if index in found:
        return -EEXIST
    found[index] = item
    return 0


@stub("radix_tree_lookup")
def _radix_lookup(m: Machine, t: Thread, root: int, index: int) -> int:
    return entries(m, root).get(index, 0)


@stub("radix_tree_delete")
def _radix_delete(m: Machine, t: Thread, root: int, index: int) -> int:
    return entries(m, root).remove(index) or 0


@stub("__xa_alloc")
def _xa_alloc(m: Machine, t: Thread, xa: int, where: int, entry: int, limit: int, flags: int) -> int:
    # struct xa_limit { u32 max, min; } is passed in one register
    found = entries(m, xa)
    number = lowest_free(found, limit >> 32, (limit & U32) + 1)
    if number < 0:
        return -EBUSY
    found[number] = entry
    m.mem.store(where, number, 4)
    return 0


@stub("__xa_insert")
def _xa_insert(m: Machine, t: Thread, xa: int, index: int, entry: int, flags: int) -> int:
    found = entries(m, xa)
    if index in found:
        return -EBUSY
    found[index] = entry
    return 0


@stub("__xa_cmpxchg")
def _xa_cmpxchg(m: Machine, t: Thread, xa: int, index: int, old: int, entry: int, flags: int) -> int:
    found = entries(m, xa)
    before = found.get(index, 0)
    if before == old:
        if entry:
            found[index] = entry
        else:
            found.remove(index)
    return before


# -- bitmaps ----------------------------------------------------------------------------------------------------------


def _bits(m: Machine, addr: int, count: int) -> int:
    if count > _MAX_BITS:
        raise Crash("hung", "stuck in a bitmap function")
    return int.from_bytes(m.mem.read(addr, (count + 63) // 64 * 8), "little") & (1 << count) - 1


def _put_bits(m: Machine, addr: int, bits: int, count: int) -> None:
    m.mem.write(addr, bits.to_bytes((count + 63) // 64 * 8, "little"))


@stub("__bitmap_weight")
def _bitmap_weight(m: Machine, t: Thread, addr: int, count: int) -> int:
    return _bits(m, addr, count).bit_count()


def _bitmap_range(name: str, value: bool) -> None:
    def run(m: Machine, t: Thread, addr: int, start: int, count: int) -> None:
        if count <= 0:
            return
        base = addr + start // 64 * 8
        start %= 64
        bits, mask = _bits(m, base, -(-(start + count) // 64) * 64), (1 << count) - 1 << start
        _put_bits(m, base, bits | mask if value else bits & ~mask, start + count)

    HANDLERS[name] = run


_bitmap_range("__bitmap_set", True)
_bitmap_range("__bitmap_clear", False)


@stub("__bitmap_equal")
def _bitmap_equal(m: Machine, t: Thread, one: int, other: int, count: int) -> bool:
    return _bits(m, one, count) == _bits(m, other, count)


@stub("__bitmap_subset")
def _bitmap_subset(m: Machine, t: Thread, one: int, other: int, count: int) -> bool:
    return not _bits(m, one, count) & ~_bits(m, other, count)


@stub("__bitmap_intersects")
def _bitmap_intersects(m: Machine, t: Thread, one: int, other: int, count: int) -> bool:
    return bool(_bits(m, one, count) & _bits(m, other, count))


def _bitmap_two(name: str, combine: Any) -> None:
    def run(m: Machine, t: Thread, to: int, one: int, other: int, count: int) -> bool:
        bits = combine(_bits(m, one, count), _bits(m, other, count))
        _put_bits(m, to, bits, count)
        return bool(bits)

    HANDLERS[name] = run


_bitmap_two("__bitmap_and", lambda a, b: a & b)
_bitmap_two("__bitmap_or", lambda a, b: a | b)
_bitmap_two("__bitmap_xor", lambda a, b: a ^ b)
_bitmap_two("__bitmap_andnot", lambda a, b: a & ~b)


@stub("bitmap_alloc", "bitmap_zalloc")
def _bitmap_alloc(m: Machine, t: Thread, count: int, flags: int) -> int:
    return alloc(m, t, (count + 63) // 64 * 8, 0x100)


@stub("bitmap_free")
def _bitmap_free(m: Machine, t: Thread, addr: int) -> None:
    free(m, addr)


# -- lists without locks, trees in post-order -------------------------------------------------------------------------


@stub("llist_add_batch")
def _llist_add_batch(m: Machine, t: Thread, first: int, last: int, head: int) -> bool:
    before = m.mem.load(head)
    m.mem.store(last, before)
    m.mem.store(head, first)
    return not before


@stub("llist_del_first")
def _llist_del_first(m: Machine, t: Thread, head: int) -> int:
    first = m.mem.load(head)
    if first:
        m.mem.store(head, m.mem.load(first))
    return first


@stub("llist_reverse_order")
def _llist_reverse(m: Machine, t: Thread, head: int) -> int:
    out = 0
    while head:
        following = m.mem.load(head)
        m.mem.store(head, out)
        head, out = following, head
    return out


def _deepest_left(m: Machine, node: int) -> int:
    while True:
        child = m.mem.load(node + 16) or m.mem.load(node + 8)
        if not child:
            return node
        node = child


@stub("rb_first_postorder")
def _rb_first_postorder(m: Machine, t: Thread, root: int) -> int:
    node = m.mem.load(root)
    return _deepest_left(m, node) if node else 0


@stub("rb_next_postorder")
def _rb_next_postorder(m: Machine, t: Thread, node: int) -> int:
    if not node:
        return 0
    parent = m.mem.load(node) & ~3
    right = m.mem.load(parent + 8) if parent else 0
    return _deepest_left(m, right) if right and m.mem.load(parent + 16) == node else parent


# -- text -------------------------------------------------------------------------------------------------------------


@stub("argv_split")
def _argv_split(m: Machine, t: Thread, flags: int, text: int, count: int) -> int:
    words = m.mem.cstring(text, _MAX_TEXT).split()
    array = alloc(m, t, 8 * (len(words) + 2))
    if not array:
        return 0
    m.mem.store(array, 0)
    for i, word in enumerate([*words, None]):
        m.mem.store(array + 8 + 8 * i, duplicate(m, t, word + b"\0") if word is not None else 0)
    if count:
        m.mem.store(count, len(words), 4)
    return array + 8


@stub("argv_free")
def _argv_free(m: Machine, t: Thread, argv: int) -> None:
    at = argv
    while word := m.mem.load(at):
        free(m, word)
        at += 8
    free(m, argv - 8)


@stub("glob_match")
def _glob_match(m: Machine, t: Thread, pattern: bytes, text: bytes) -> bool:
    # fnmatch knows no backslash, and the kernel no difference between ! and ^ in a class
    rules = re.sub(rb"\\(.)", rb"[\1]", pattern).replace(b"[^", b"[!")
    return fnmatch.fnmatchcase(text, rules)


_UNITS = {0: (1000, ("", "k", "M", "G", "T", "P", "E", "Z", "Y")), 1: (1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))}


@stub("string_get_size")
def _string_get_size(m: Machine, t: Thread, size: int, block: int, units: int, buf: int, room: int) -> int:
    divisor, names = _UNITS[units & 1]
    number, i, rest = size * block, 0, 0
    while number >= divisor:
        number, rest = divmod(number, divisor)
        i += 1
    digits = 0
    while number * 10 ** (digits + 1) < 1000 and number:
        digits += 1
    thousandths = rest * 1000 // divisor + (500, 50, 5)[min(digits, 2)]
    if thousandths >= 1000:
        thousandths, number = thousandths - 1000, number + 1
    tail = f".{thousandths:03d}"[: digits + 1] if digits and i else ""
    if not i:
        number, tail = size * block, ""
    unit = "" if units & 0x40000000 else names[i] if i < len(names) else "UNK"
    text = f"{number}{tail}{'' if units & 0x80000000 else ' '}{unit}{'' if units & 0x40000000 else 'B'}"
    data = text.encode()
    if room:
        m.mem.write(buf, data[: room - 1] + b"\0")
    return len(data)


@stub("get_random_u8", "get_random_u16")
def _get_random_small(m: Machine, t: Thread) -> int:
    return m.random.getrandbits(8)


# -- pools and pages --------------------------------------------------------------------------------------------------


@stub("mempool_create_node_noprof")
def _mempool_create(
    m: Machine, t: Thread, least: int, take: int, give: int, data: int, flags: int, node: int
) -> Steps | int:
    pool = alloc(m, t, 128, 0x100)
    if pool:
        m.objects[pool] = [take, give, data]
    return pool


def _pool(m: Machine, pool: int) -> list[int]:
    found: list[int] | None = m.objects.get(pool)
    if not isinstance(found, list):
        raise PageFault(pool, write=False)
    return found


@stub("mempool_alloc_noprof")
def _mempool_alloc(m: Machine, t: Thread, pool: int, flags: int) -> Steps:
    take, _, data = _pool(m, pool)
    element: int = yield Invoke(take, (flags, data))
    return element


@stub("mempool_free")
def _mempool_free(m: Machine, t: Thread, element: int, pool: int) -> Steps:
    _, give, data = _pool(m, pool)
    if element:
        yield Invoke(give, (element, data))
    return None


@stub("mempool_destroy")
def _mempool_destroy(m: Machine, t: Thread, pool: int) -> None:
    if pool:
        del m.objects[pool]
        free(m, pool)


@stub("mempool_kmalloc")
def _mempool_kmalloc(m: Machine, t: Thread, flags: int, size: int) -> int:
    return alloc(m, t, size)


@stub("mempool_kfree")
def _mempool_kfree(m: Machine, t: Thread, element: int, data: int) -> None:
    free(m, element)


HANDLERS["mempool_alloc_slab"] = lambda m, t, flags, cache: HANDLERS["kmem_cache_alloc_noprof"](m, t, cache, flags)
HANDLERS["mempool_free_slab"] = lambda m, t, element, cache: HANDLERS["kmem_cache_free"](m, t, cache, element)

_PAGE_OFFSET, _VMEMMAP, _PAGE_STRUCT = 0xFFFF888000000000, 0xFFFFEA0000000000, 64


@stub("alloc_pages_noprof")
def _alloc_pages(m: Machine, t: Thread, flags: int, order: int) -> int:
    # struct page itself is not there: page_address() computes with its address only
    addr = HANDLERS["get_free_pages_noprof"](m, t, flags, order)
    assert isinstance(addr, int)
    return _VMEMMAP + (addr - _PAGE_OFFSET >> 12) * _PAGE_STRUCT if addr else 0


@stub("__free_pages")
def _free_page_struct(m: Machine, t: Thread, page: int, order: int) -> None:
    HANDLERS["free_pages"](m, t, ((page - _VMEMMAP) // _PAGE_STRUCT << 12) + _PAGE_OFFSET, order)


# -- static calls and stacks ------------------------------------------------------------------------------------------


@stub("__static_call_update")
def _static_call_update(m: Machine, t: Thread, key: int, trampoline: int, function: int) -> None:
    m.mem.store(key, function)
    if trampoline:
        m.write_text(
            trampoline, b"\xe9" + (function - trampoline - 5 & U32).to_bytes(4, "little") if function else _RET
        )


_RET = b"\xc3\xcc\xcc\xcc\xcc"


@stub("stack_trace_save")
def _stack_trace_save(m: Machine, t: Thread, store: int, room: int, skip: int) -> int:
    chain, _ = stack_of(m, t)
    chain = chain[skip : skip + room]
    for i, addr in enumerate(chain):
        m.mem.store(store + 8 * i, addr)
    return len(chain)


@stub("stack_trace_print")
def _stack_trace_print(m: Machine, t: Thread, store: int, count: int, spaces: int) -> None:
    for i in range(min(count, 64)):
        name = m.symbol_text(m.mem.load(store + 8 * i), True, False)
        m.print(t, f"\x014{'':{min(spaces, 64) + 1}}{name}\n".encode())


@stub("stop_machine", "stop_machine_cpuslocked")
def _stop_machine(m: Machine, t: Thread, function: int, data: int, mask: int) -> Steps:
    return signed((yield Invoke(function, (data,))), 32)
