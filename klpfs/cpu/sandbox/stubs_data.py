"""Kernel functions on data structures: lists, sorting, trees, IDRs and XArrays, bitmaps, notifier chains.

Model
    Lists, trees and notifier chains live in emulated memory, where inlined code walks them. An IDR, IDA or XArray is
    opaque to its users: its contents are kept here, by the address of its structure.

Source
    lib/list_debug.c, lib/list_sort.c, lib/sort.c, lib/bsearch.c, lib/rbtree.c, lib/idr.c, lib/xarray.c, lib/find_bit.c,
    lib/hweight.c, lib/math, lib/crc32.c, kernel/notifier.c.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator
from typing import Any

from klpfs.cpu.layout import U32, U64
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.stubs_mem import EINVAL
from klpfs.cpu.sandbox.thread import Crash, Invoke, Thread, signed, stub

Steps = Generator[Any, Any, int | None]

LIST_POISON1, LIST_POISON2 = 0xDEAD000000000100, 0xDEAD000000000122
ENOENT, ENOSPC, EEXIST = 2, 28, 17
_MAX_ITEMS = 1 << 20


# -- lists ------------------------------------------------------------------------------------------------------------


def _corrupt(m: Machine, t: Thread, text: str) -> None:
    """``CHECK_DATA_CORRUPTION`` with CONFIG_BUG_ON_DATA_CORRUPTION: say what, then BUG()."""
    m.print(t, f"\x013{text}\n".encode())
    raise Crash("bug", "lib/list_debug.c:32" if "add" in text else "lib/list_debug.c:62")


@stub("__list_add_valid_or_report")
def _list_add_valid(m: Machine, t: Thread, new: int, prev: int, following: int) -> bool:
    if not prev:
        _corrupt(m, t, "list_add corruption. prev is NULL.")
    if not following:
        _corrupt(m, t, "list_add corruption. next is NULL.")
    back = m.mem.load(following + 8)
    if back != prev:
        _corrupt(
            m,
            t,
            f"list_add corruption. next->prev should be prev ({prev:016x}), but was {back:016x}. "
            f"(next={following:016x}).",
        )
    forward = m.mem.load(prev)
    if forward != following:
        _corrupt(
            m,
            t,
            f"list_add corruption. prev->next should be next ({following:016x}), but was {forward:016x}. "
            f"(prev={prev:016x}).",
        )
    if new in (prev, following):
        _corrupt(m, t, f"list_add double add: new={new:016x}, prev={prev:016x}, next={following:016x}.")
    return True


@stub("__list_del_entry_valid_or_report")
def _list_del_valid(m: Machine, t: Thread, entry: int) -> bool:
    following, prev = m.mem.load(entry), m.mem.load(entry + 8)
    if not following:
        _corrupt(m, t, f"list_del corruption, {entry:016x}->next is NULL")
    if not prev:
        _corrupt(m, t, f"list_del corruption, {entry:016x}->prev is NULL")
    if following == LIST_POISON1:
        _corrupt(m, t, f"list_del corruption, {entry:016x}->next is LIST_POISON1 ({LIST_POISON1:016x})")
    if prev == LIST_POISON2:
        _corrupt(m, t, f"list_del corruption, {entry:016x}->prev is LIST_POISON2 ({LIST_POISON2:016x})")
    forward = m.mem.load(prev)
    if forward != entry:
        _corrupt(
            m,
            t,
            f"list_del corruption. prev->next should be {entry:016x}, but was {forward:016x}. (prev={prev:016x})",
        )
    back = m.mem.load(following + 8)
    if back != entry:
        _corrupt(
            m,
            t,
            f"list_del corruption. next->prev should be {entry:016x}, but was {back:016x}. (next={following:016x})",
        )
    return True


def _merge_sort(items: list[Any], compare: Any) -> Generator[Any, Any, list[Any]]:
    """A stable sort whose comparisons are calls into module code."""
    if len(items) <= 1:
        return items
    middle = len(items) // 2
    left = yield from _merge_sort(items[:middle], compare)
    right = yield from _merge_sort(items[middle:], compare)
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        answer = yield compare(left[i], right[j])
        if signed(answer, 32) <= 0:
            out.append(left[i])
            i += 1
        else:
            out.append(right[j])
            j += 1
    return out + left[i:] + right[j:]


@stub("list_sort")
def _list_sort(m: Machine, t: Thread, private: int, head: int, compare: int) -> Steps:
    mem, items, item = m.mem, [], m.mem.load(head)
    while item != head:
        items.append(item)
        item = mem.load(item)
        if len(items) > _MAX_ITEMS:
            raise Crash("hung", "stuck in list_sort")
    items = yield from _merge_sort(items, lambda a, b: Invoke(compare, (private, a, b)))
    ring = [head, *items]
    for here, following in zip(ring, [*items, head], strict=True):
        mem.store(here, following)
        mem.store(following + 8, here)
    return None


def _sort(m: Machine, base: int, count: int, size: int, compare: Any) -> Steps:
    mem = m.mem
    if count * size > _MAX_ITEMS * 8:
        mem.check(base, count * size, write=True)
        raise Crash("budget", "sort of more than 8 MB")
    if not count or not size:
        return None
    mem.check(base, count * size, write=True)
    scratch = m.heap.alloc(2 * size, "")
    if not scratch:
        raise Crash("budget", "the heap is used up")
    try:

        def order(a: bytes, b: bytes) -> Invoke:
            mem.write(scratch, a + b)
            invoke: Invoke = compare(scratch, scratch + size)
            return invoke

        rows = [mem.read(base + i * size, size) for i in range(count)]
        rows = yield from _merge_sort(rows, order)
        mem.write(base, b"".join(rows))
    finally:
        m.heap.free(scratch)
    return None


@stub("sort")
def _sort_plain(m: Machine, t: Thread, base: int, count: int, size: int, compare: int, swap: int) -> Steps:
    return _sort(m, base, count, size, lambda a, b: Invoke(compare, (a, b)))


@stub("sort_r")
def _sort_r(m: Machine, t: Thread, base: int, count: int, size: int, compare: int, swap: int, private: int) -> Steps:
    return _sort(m, base, count, size, lambda a, b: Invoke(compare, (a, b, private)))


@stub("bsearch")
def _bsearch(m: Machine, t: Thread, key: int, base: int, count: int, size: int, compare: int) -> Steps:
    while count > 0:
        pivot = base + (count >> 1) * size
        answer = signed((yield Invoke(compare, (key, pivot))), 32)
        if answer == 0:
            return pivot
        if answer > 0:
            base = pivot + size
            count -= 1
        count >>= 1
    return 0


# -- red-black trees: struct rb_node is __rb_parent_color, rb_right, rb_left; the root points to the top node ---------


class _Tree:
    """lib/rbtree.c in the textbook's form, on emulated memory."""

    def __init__(self, m: Machine, root: int) -> None:
        self.mem, self.root = m.mem, root

    def parent(self, node: int) -> int:
        return self.mem.load(node) & ~3

    def black(self, node: int) -> bool:
        return not node or bool(self.mem.load(node) & 1)

    def set_parent(self, node: int, parent: int) -> None:
        self.mem.store(node, parent | self.mem.load(node) & 1)

    def paint(self, node: int, black: bool) -> None:
        self.mem.store(node, self.parent(node) | black)

    def child(self, node: int, left: bool) -> int:
        return self.mem.load(node + (16 if left else 8))

    def set_child(self, node: int, left: bool, child: int) -> None:
        self.mem.store(node + (16 if left else 8), child)

    def replace(self, old: int, new: int, parent: int) -> None:
        """Let what pointed to *old* point to *new*."""
        if not parent:
            self.mem.store(self.root, new)
        else:
            self.set_child(parent, self.child(parent, True) == old, new)

    def rotate(self, node: int, left: bool) -> None:
        """Rotate to the *left* (or right) around *node*."""
        pivot = self.child(node, not left)
        inner = self.child(pivot, left)
        parent = self.parent(node)
        self.set_child(node, not left, inner)
        if inner:
            self.set_parent(inner, node)
        self.replace(node, pivot, parent)
        self.set_parent(pivot, parent)
        self.set_child(pivot, left, node)
        self.set_parent(node, pivot)

    def inserted(self, node: int) -> None:
        """Restore the colours after a red node was linked in."""
        self.paint(node, False)
        while (parent := self.parent(node)) and not self.black(parent):
            grand = self.parent(parent)
            is_left = self.child(grand, True) == parent
            uncle = self.child(grand, not is_left)
            if not self.black(uncle):
                self.paint(parent, True)
                self.paint(uncle, True)
                self.paint(grand, False)
                node = grand
                continue
            if (self.child(parent, True) == node) != is_left:
                self.rotate(parent, is_left)
                node, parent = parent, node
            self.paint(parent, True)
            self.paint(grand, False)
            self.rotate(grand, not is_left)
        self.paint(self.mem.load(self.root), True)

    def erase(self, node: int) -> None:
        """Unlink *node*."""
        left, right = self.child(node, True), self.child(node, False)
        parent = self.parent(node)
        was_black = self.black(node)
        if left and right:
            successor = right
            while self.child(successor, True):
                successor = self.child(successor, True)
            was_black = self.black(successor)
            moved = self.child(successor, False)
            hole = self.parent(successor)
            if hole == node:
                hole = successor
            else:
                self.set_child(hole, True, moved)
                if moved:
                    self.set_parent(moved, hole)
                self.set_child(successor, False, right)
                self.set_parent(right, successor)
            self.set_child(successor, True, left)
            self.set_parent(left, successor)
            self.replace(node, successor, parent)
            self.mem.store(successor, self.mem.load(node))
            if moved and hole == successor:
                self.set_parent(moved, successor)
        else:
            moved, hole = left or right, parent
            if moved:
                self.set_parent(moved, parent)
            self.replace(node, moved, parent)
        if was_black:
            self._rebalance(moved, hole)

    def _rebalance(self, node: int, parent: int) -> None:
        while parent and self.black(node):
            left = self.child(parent, True) == node
            sibling = self.child(parent, not left)
            if not self.black(sibling):
                self.paint(sibling, True)
                self.paint(parent, False)
                self.rotate(parent, left)
                sibling = self.child(parent, not left)
            if self.black(self.child(sibling, True)) and self.black(self.child(sibling, False)):
                self.paint(sibling, False)
                node, parent = parent, self.parent(parent)
                continue
            if self.black(self.child(sibling, not left)):
                self.paint(self.child(sibling, left), True)
                self.paint(sibling, False)
                self.rotate(sibling, not left)
                sibling = self.child(parent, not left)
            self.paint(sibling, self.black(parent))
            self.paint(parent, True)
            self.paint(self.child(sibling, not left), True)
            self.rotate(parent, left)
            return
        if node:
            self.paint(node, True)

    def end(self, node: int, left: bool) -> int:
        """The outermost node of a subtree."""
        while node and self.child(node, left):
            node = self.child(node, left)
        return node

    def step(self, node: int, forward: bool) -> int:
        """The neighbour of *node* in order; 0 at the end."""
        if self.parent(node) == node:
            return 0
        if self.child(node, not forward):
            return self.end(self.child(node, not forward), forward)
        while (parent := self.parent(node)) and self.child(parent, not forward) == node:
            node = parent
        return parent


@stub("rb_insert_color")
def _rb_insert_color(m: Machine, t: Thread, node: int, root: int) -> None:
    _Tree(m, root).inserted(node)


@stub("rb_erase")
def _rb_erase(m: Machine, t: Thread, node: int, root: int) -> None:
    _Tree(m, root).erase(node)


@stub("rb_next")
def _rb_next(m: Machine, t: Thread, node: int) -> int:
    return _Tree(m, 0).step(node, True)


@stub("rb_prev")
def _rb_prev(m: Machine, t: Thread, node: int) -> int:
    return _Tree(m, 0).step(node, False)


@stub("rb_first")
def _rb_first(m: Machine, t: Thread, root: int) -> int:
    return _Tree(m, root).end(m.mem.load(root), True)


@stub("rb_last")
def _rb_last(m: Machine, t: Thread, root: int) -> int:
    return _Tree(m, root).end(m.mem.load(root), False)


@stub("rb_replace_node")
def _rb_replace(m: Machine, t: Thread, old: int, new: int, root: int) -> None:
    tree = _Tree(m, root)
    parent = tree.parent(old)
    m.mem.write(new, m.mem.read(old, 24))
    for left in (True, False):
        if tree.child(old, left):
            tree.set_parent(tree.child(old, left), new)
    tree.replace(old, new, parent)


# -- numbers to pointers ----------------------------------------------------------------------------------------------


_NOT_EMPTY = 2
"""What ``xa_head`` holds while there are entries: ``xa_empty`` and its kin compare it with NULL."""


class Entries(dict[int, int]):
    """What an xarray, IDR or IDA at an address holds, by number."""

    def __init__(self, m: Machine, addr: int) -> None:
        self._m, self._head = m, addr + 8

    def __setitem__(self, number: int, entry: int) -> None:
        if not self:
            self._m.mem.store(self._head, _NOT_EMPTY)
        super().__setitem__(number, entry)

    def remove(self, number: int) -> int | None:
        """Take *number* out; what was there."""
        found = self.pop(number, None)
        if found is not None and not self:
            self._m.mem.store(self._head, 0)
        return found


def entries(m: Machine, addr: int) -> Entries:
    """The entries of the xarray, IDR or IDA at *addr*."""
    m.mem.check(addr, 16, write=True)
    found = m.objects.get(addr)
    if not isinstance(found, Entries):
        found = m.objects[addr] = Entries(m, addr)
    return found


def lowest_free(entries: Entries, start: int, end: int) -> int:
    """The first free number from *start* on; -ENOSPC if there is none below *end*."""
    number = start
    while number in entries:
        number += 1
    return number if number < end else -ENOSPC


@stub("idr_alloc")
def _idr_alloc(m: Machine, t: Thread, idr: int, ptr: int, start: int, end: int, flags: int) -> int:
    if start < 0:
        return -EINVAL
    found = entries(m, idr)
    number = lowest_free(found, start, end if end > 0 else 1 << 31)
    if number >= 0:
        found[number] = ptr
    return number


@stub("idr_alloc_cyclic")
def _idr_alloc_cyclic(m: Machine, t: Thread, idr: int, ptr: int, start: int, end: int, flags: int) -> int:
    found = entries(m, idr)
    limit = end if end > 0 else 1 << 31
    number = lowest_free(found, max(start, m.mem.load(idr + 20, 4)), limit)
    if number < 0:
        number = lowest_free(found, max(start, 0), limit)
    if number >= 0:
        found[number] = ptr
        m.mem.store(idr + 20, number + 1, 4)
    return number


@stub("idr_find")
def _idr_find(m: Machine, t: Thread, idr: int, number: int) -> int:
    return entries(m, idr).get(number, 0)


@stub("idr_remove")
def _idr_remove(m: Machine, t: Thread, idr: int, number: int) -> int:
    return entries(m, idr).remove(number) or 0


@stub("idr_replace")
def _idr_replace(m: Machine, t: Thread, idr: int, ptr: int, number: int) -> int:
    found = entries(m, idr)
    if number not in found:
        return -ENOENT
    old, found[number] = found[number], ptr
    return old


@stub("idr_get_next")
def _idr_get_next(m: Machine, t: Thread, idr: int, where: int) -> int:
    start = m.mem.load(where, 4)
    for number, ptr in sorted(entries(m, idr).items()):
        if number >= start:
            m.mem.store(where, number, 4)
            return ptr
    return 0


@stub("idr_for_each")
def _idr_for_each(m: Machine, t: Thread, idr: int, fn: int, data: int) -> Steps:
    for number, ptr in sorted(entries(m, idr).items()):
        answer = signed((yield Invoke(fn, (number, ptr, data))), 32)
        if answer:
            return answer
    return 0


@stub("idr_destroy", "ida_destroy", "xa_destroy")
def _idr_destroy(m: Machine, t: Thread, idr: int) -> None:
    m.objects.pop(idr, None)
    m.mem.store(idr + 8, 0)


@stub("ida_alloc_range")
def _ida_alloc_range(m: Machine, t: Thread, ida: int, low: int, high: int, flags: int) -> int:
    found = entries(m, ida)
    if signed(low, 32) < 0:
        return -ENOSPC
    number = lowest_free(found, low, (high if signed(high, 32) >= 0 else 0x7FFFFFFF) + 1)
    if number >= 0:
        found[number] = 1
    return number


@stub("ida_free")
def _ida_free(m: Machine, t: Thread, ida: int, number: int) -> None:
    if entries(m, ida).remove(number) is None:
        m.print(t, b"\x013ida_free called for id=%d which is not allocated.\n" % number)


@stub("xa_load")
def _xa_load(m: Machine, t: Thread, xa: int, index: int) -> int:
    return entries(m, xa).get(index, 0)


@stub("xa_store", "__xa_store")
def _xa_store(m: Machine, t: Thread, xa: int, index: int, entry: int, flags: int) -> int:
    found = entries(m, xa)
    old = found.get(index, 0)
    if entry:
        found[index] = entry
    else:
        found.remove(index)
    return old


@stub("xa_erase", "__xa_erase")
def _xa_erase(m: Machine, t: Thread, xa: int, index: int) -> int:
    return entries(m, xa).remove(index) or 0


def _xa_search(m: Machine, xa: int, where: int, limit: int, after: bool) -> int:
    start = m.mem.load(where)
    for index, entry in sorted(entries(m, xa).items()):
        if start + after <= index <= limit:
            m.mem.store(where, index)
            return entry
    return 0


@stub("xa_find")
def _xa_find(m: Machine, t: Thread, xa: int, where: int, limit: int, marks: int) -> int:
    return _xa_search(m, xa, where, limit, False)


@stub("xa_find_after")
def _xa_find_after(m: Machine, t: Thread, xa: int, where: int, limit: int, marks: int) -> int:
    return _xa_search(m, xa, where, limit, True)


# -- bits and numbers -------------------------------------------------------------------------------------------------


def _bits(m: Machine, addr: int, count: int) -> int:
    count = min(count, _MAX_ITEMS)
    return int.from_bytes(m.mem.read(addr, (count + 63) // 64 * 8), "little") & ((1 << count) - 1)


def _first(bits: int, count: int) -> int:
    return (bits & -bits).bit_length() - 1 if bits else count


@stub("_find_first_bit")
def _find_first_bit(m: Machine, t: Thread, addr: int, count: int) -> int:
    return _first(_bits(m, addr, count), count)


@stub("_find_first_zero_bit")
def _find_first_zero_bit(m: Machine, t: Thread, addr: int, count: int) -> int:
    return _first(~_bits(m, addr, count) & ((1 << min(count, _MAX_ITEMS)) - 1), count)


@stub("_find_last_bit")
def _find_last_bit(m: Machine, t: Thread, addr: int, count: int) -> int:
    bits = _bits(m, addr, count)
    return bits.bit_length() - 1 if bits else count


@stub("_find_next_bit")
def _find_next_bit(m: Machine, t: Thread, addr: int, count: int, start: int) -> int:
    return _first(_bits(m, addr, count) >> start << start, count) if start < count else count


@stub("_find_next_zero_bit")
def _find_next_zero_bit(m: Machine, t: Thread, addr: int, count: int, start: int) -> int:
    if start >= count:
        return count
    return _first((~_bits(m, addr, count) & ((1 << min(count, _MAX_ITEMS)) - 1)) >> start << start, count)


@stub("__sw_hweight32", "__sw_hweight64")
def _hweight(m: Machine, t: Thread, value: int) -> int:
    return value.bit_count()


@stub("int_sqrt")
def _int_sqrt(m: Machine, t: Thread, value: int, unused: int) -> int:
    return math.isqrt(value)


@stub("gcd")
def _gcd(m: Machine, t: Thread, a: int, b: int) -> int:
    return math.gcd(a, b)


@stub("lcm")
def _lcm(m: Machine, t: Thread, a: int, b: int) -> int:
    return math.lcm(a, b)


@stub("crc32_le")
def _crc32_le(m: Machine, t: Thread, seed: int, data: int, size: int) -> int:
    return zlib.crc32(m.mem.read(data, size), seed ^ U32) ^ U32


# -- notifier chains: the head's layout differs by kind, the blocks are linked by priority ----------------------------

HEADS = {"atomic": 8, "raw": 0, "blocking": 40}
NOTIFY_DONE, NOTIFY_STOP_MASK = 0, 0x8000


def register_block(m: Machine, link: int, block: int) -> int:
    mem = m.mem
    priority = signed(mem.load(block + 16, 4), 32)
    for _ in range(_MAX_ITEMS):
        here = mem.load(link)
        if here == block:
            return -EEXIST
        if not here or priority > signed(mem.load(here + 16, 4), 32):
            mem.store(block + 8, here)
            mem.store(link, block)
            return 0
        link = here + 8
    raise Crash("hung", "stuck in notifier_chain_register")


def unregister_block(m: Machine, link: int, block: int) -> int:
    mem = m.mem
    for _ in range(_MAX_ITEMS):
        here = mem.load(link)
        if not here:
            return -ENOENT
        if here == block:
            mem.store(link, mem.load(block + 8))
            return 0
        link = here + 8
    raise Crash("hung", "stuck in notifier_chain_unregister")


def _call_chain(m: Machine, link: int, value: int, data: int) -> Steps:
    answer = NOTIFY_DONE
    here = m.mem.load(link)
    while here:
        following = m.mem.load(here + 8)
        answer = signed((yield Invoke(m.mem.load(here), (here, value, data))), 32)
        if answer & NOTIFY_STOP_MASK:
            break
        here = following
    return answer


def _chain(kind: str) -> None:
    head = HEADS[kind]

    @stub(f"{kind}_notifier_chain_register")
    def register(m: Machine, t: Thread, chain: int, block: int) -> int:
        return register_block(m, chain + head, block)

    @stub(f"{kind}_notifier_chain_unregister")
    def unregister(m: Machine, t: Thread, chain: int, block: int) -> int:
        return unregister_block(m, chain + head, block)

    @stub(f"{kind}_notifier_call_chain")
    def call(m: Machine, t: Thread, chain: int, value: int, data: int) -> Steps:
        return _call_chain(m, chain + head, value & U64, data)


for _kind in HEADS:
    _chain(_kind)
