"""Kernel functions on memory and strings.

Source
    mm/slub.c, mm/util.c, mm/vmalloc.c, lib/string.c, lib/string_helpers.c, lib/hexdump.c, lib/usercopy.c, mm/maccess.c,
    mm/percpu.c.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from klpfs.cpu import layout as L
from klpfs.cpu.sandbox.machine import Machine
from klpfs.cpu.sandbox.memory import PageFault
from klpfs.cpu.sandbox.thread import Crash, Invoke, Thread, signed, stub

GFP_ZERO = 0x100
ZERO_SIZE_PTR = 16
EFAULT, EINVAL, E2BIG, ENOMEM, ERANGE = 14, 22, 7, 12, 34


def alloc(m: Machine, t: Thread, size: int, flags: int = 0) -> int:
    """``kmalloc`` for the module of *t*."""
    return m.heap.alloc(size, t.module, zero=bool(flags & GFP_ZERO))


def free(m: Machine, addr: int) -> None:
    """``kfree``. Crashes for what is no object, as the hardened free list does."""
    if addr <= ZERO_SIZE_PTR:
        return
    room = m.heap.size(addr)
    for inside in [key for key in m.objects if addr <= key < addr + room]:
        del m.objects[inside]
    if not m.heap.free(addr):
        if not m.mem.prot(addr):
            raise PageFault(addr, write=False)
        raise Crash("bug", "mm/slub.c:553")


@stub("__kmalloc_noprof", "__kmalloc_large_noprof")
def _kmalloc(m: Machine, t: Thread, size: int, flags: int) -> int:
    return alloc(m, t, size, flags)


@stub("__kmalloc_node_noprof", "__kvmalloc_node_noprof")
def _kmalloc_node(m: Machine, t: Thread, size: int, buckets: int, flags: int, node: int) -> int:
    return alloc(m, t, size, flags)


@stub("__kmalloc_node_track_caller_noprof")
def _kmalloc_track(m: Machine, t: Thread, size: int, buckets: int, flags: int, node: int, caller: int) -> int:
    return alloc(m, t, size, flags)


@stub("__kmalloc_cache_noprof")
def _kmalloc_cache(m: Machine, t: Thread, cache: int, flags: int, size: int) -> int:
    return alloc(m, t, size, flags)


@stub("__kmalloc_cache_node_noprof")
def _kmalloc_cache_node(m: Machine, t: Thread, cache: int, flags: int, node: int, size: int) -> int:
    return alloc(m, t, size, flags)


@stub("__kmalloc_large_node_noprof")
def _kmalloc_large_node(m: Machine, t: Thread, size: int, flags: int, node: int) -> int:
    return alloc(m, t, size, flags)


@stub("krealloc_noprof", "kvrealloc_noprof")
def _krealloc(m: Machine, t: Thread, addr: int, size: int, flags: int) -> int:
    if size == 0:
        free(m, addr)
        return ZERO_SIZE_PTR
    if addr <= ZERO_SIZE_PTR:
        return alloc(m, t, size, flags)
    room = m.heap.size(addr)
    if not room:
        raise Crash("bug", "mm/slub.c:4500")
    if size <= room:
        return addr
    new = alloc(m, t, size, flags)
    if new:
        m.mem.write(new, m.mem.read(addr, room))
        free(m, addr)
    return new


@stub("kfree", "kvfree", "vfree", "vfree_atomic")
def _kfree(m: Machine, t: Thread, addr: int) -> None:
    free(m, addr)


@stub("kfree_const")
def _kfree_const(m: Machine, t: Thread, addr: int) -> None:
    if m.heap.size(addr):
        free(m, addr)


@stub("kfree_sensitive")
def _kfree_sensitive(m: Machine, t: Thread, addr: int) -> None:
    m.mem.write(addr, bytes(m.heap.size(addr)))
    free(m, addr)


@stub("kvfree_sensitive")
def _kvfree_sensitive(m: Machine, t: Thread, addr: int, size: int) -> None:
    _kfree_sensitive(m, t, addr)


@stub("ksize")
def _ksize(m: Machine, t: Thread, addr: int) -> int:
    return m.heap.size(addr)


def duplicate(m: Machine, t: Thread, data: bytes) -> int:
    """A new object that holds *data*; 0 when there is no memory."""
    addr = alloc(m, t, len(data))
    if addr:
        m.mem.write(addr, data)
    return addr


@stub("kmemdup_noprof", "kvmemdup")
def _kmemdup(m: Machine, t: Thread, src: int, size: int, flags: int) -> int:
    return duplicate(m, t, m.mem.read(src, size))


@stub("kmemdup_nul")
def _kmemdup_nul(m: Machine, t: Thread, src: int, size: int, flags: int) -> int:
    return duplicate(m, t, m.mem.read(src, size) + b"\0")


@stub("kstrdup", "kstrdup_const")
def _kstrdup(m: Machine, t: Thread, src: int, flags: int) -> int:
    return duplicate(m, t, m.mem.cstring(src) + b"\0") if src else 0


@stub("kstrndup")
def _kstrndup(m: Machine, t: Thread, src: int, limit: int, flags: int) -> int:
    return duplicate(m, t, m.mem.cstring(src, limit) + b"\0") if src else 0


@stub("vmalloc_noprof")
def _vmalloc(m: Machine, t: Thread, size: int) -> int:
    return alloc(m, t, max(size, L.PAGE_SIZE + 1)) if size else 0


@stub("vzalloc_noprof", "vmalloc_user_noprof")
def _vzalloc(m: Machine, t: Thread, size: int) -> int:
    return alloc(m, t, max(size, L.PAGE_SIZE + 1), GFP_ZERO) if size else 0


@stub("vmalloc_node_noprof")
def _vmalloc_node(m: Machine, t: Thread, size: int, node: int) -> int:
    return _vmalloc(m, t, size)  # type: ignore[return-value]


@stub("vzalloc_node_noprof")
def _vzalloc_node(m: Machine, t: Thread, size: int, node: int) -> int:
    return _vzalloc(m, t, size)  # type: ignore[return-value]


@stub("__vmalloc_noprof")
def _vmalloc_flags(m: Machine, t: Thread, size: int, flags: int) -> int:
    return alloc(m, t, max(size, L.PAGE_SIZE + 1), flags) if size else 0


@stub("get_free_pages_noprof")
def _get_free_pages(m: Machine, t: Thread, flags: int, order: int) -> int:
    return alloc(m, t, L.PAGE_SIZE << order, flags) if order <= 10 else 0


@stub("get_zeroed_page_noprof")
def _get_zeroed_page(m: Machine, t: Thread, flags: int) -> int:
    return alloc(m, t, L.PAGE_SIZE, GFP_ZERO)


@stub("free_pages")
def _free_pages(m: Machine, t: Thread, addr: int, order: int) -> None:
    free(m, addr)


# -- caches: struct kmem_cache is opaque; its object size and constructor are kept on our side ------------------------


@stub("__kmem_cache_create_args")
def _kmem_cache_create(m: Machine, t: Thread, name: int, size: int, args: int, flags: int) -> int:
    m.mem.cstring(name, 256)
    cache = alloc(m, t, 256, GFP_ZERO)
    if cache:
        # struct kmem_cache_args: align, useroffset, usersize, freeptr_offset, use_freeptr_offset, ctor at 24
        m.objects[cache] = (size, m.mem.load(args + 24) if args else 0)
    return cache


def _cache(m: Machine, addr: int) -> tuple[int, int]:
    found: tuple[int, int] | None = m.objects.get(addr)
    if not isinstance(found, tuple):
        raise PageFault(addr, write=False)
    return found


def _construct(addr: int, ctor: int) -> Generator[Any, Any, int]:
    yield Invoke(ctor, (addr,))
    return addr


def _cache_alloc(m: Machine, t: Thread, cache: int, flags: int) -> int | Generator[Any, Any, int]:
    # A constructor runs for each object of a new slab; here each object is a new one.
    size, ctor = _cache(m, cache)
    addr = alloc(m, t, size, flags)
    return _construct(addr, ctor) if ctor and addr else addr


@stub("kmem_cache_alloc_noprof")
def _kmem_cache_alloc(m: Machine, t: Thread, cache: int, flags: int) -> int | Generator[Any, Any, int]:
    return _cache_alloc(m, t, cache, flags)


@stub("kmem_cache_alloc_node_noprof")
def _kmem_cache_alloc_node(m: Machine, t: Thread, cache: int, flags: int, node: int) -> int | Generator[Any, Any, int]:
    return _cache_alloc(m, t, cache, flags)


@stub("kmem_cache_free")
def _kmem_cache_free(m: Machine, t: Thread, cache: int, addr: int) -> None:
    _cache(m, cache)
    free(m, addr)


@stub("kmem_cache_destroy")
def _kmem_cache_destroy(m: Machine, t: Thread, cache: int) -> None:
    if cache:
        _cache(m, cache)
        del m.objects[cache]
        free(m, cache)


@stub("kmem_cache_size")
def _kmem_cache_size(m: Machine, t: Thread, cache: int) -> int:
    return _cache(m, cache)[0]


@stub("kmem_cache_shrink")
def _kmem_cache_shrink(m: Machine, t: Thread, cache: int) -> int:
    _cache(m, cache)
    return 0


# -- per-CPU memory: offsets from the first CPU's area, behind that of the modules ------------------------------------


@stub("pcpu_alloc_noprof")
def _pcpu_alloc(m: Machine, t: Thread, size: int, align: int, reserved: bool, flags: int) -> int:
    state: dict[int, tuple[int, str]] = m.objects.setdefault(L.PERCPU_MODULES, {})
    start = L.PERCPU_MODULES + 0x4000
    step = max(align, 8)
    for base, (length, _) in sorted(state.items()):
        if start + size <= base:
            break
        start = -(-(base + length) // step) * step
    if not size or start + size > L.PERCPU_SIZE:
        return 0
    state[start] = (size, t.module)
    for cpu in range(L.NR_CPUS):
        m.mem.write(L.AREAS["percpu"].base + cpu * L.PERCPU_SIZE + start, bytes(size))
    return start


@stub("free_percpu")
def _free_percpu(m: Machine, t: Thread, addr: int) -> None:
    state: dict[int, tuple[int, str]] = m.objects.setdefault(L.PERCPU_MODULES, {})
    if addr and state.pop(addr, None) is None:
        raise Crash("bug", "mm/percpu.c:2300")


# -- bytes ------------------------------------------------------------------------------------------------------------


@stub("memcpy", "__memcpy", "memmove", "__memmove")
def _memcpy(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    m.mem.check(dst, size, write=True) if size else None
    m.mem.write(dst, m.mem.read(src, size))
    return dst


@stub("memset", "__memset")
def _memset(m: Machine, t: Thread, dst: int, value: int, size: int) -> int:
    if size:
        m.mem.check(dst, size, write=True)
        m.mem.write(dst, bytes([value & 0xFF]) * size)
    return dst


@stub("memcmp", "bcmp")
def _memcmp(m: Machine, t: Thread, a: int, b: int, size: int) -> int:
    left, right = m.mem.read(a, size), m.mem.read(b, size)
    if left == right:
        return 0
    i = next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)
    return left[i] - right[i]


@stub("memchr", "memscan")
def _memchr(m: Machine, t: Thread, addr: int, value: int, size: int) -> int:
    at = m.mem.read(addr, size).find(value & 0xFF)
    return addr + at if at >= 0 else 0


@stub("memchr_inv")
def _memchr_inv(m: Machine, t: Thread, addr: int, value: int, size: int) -> int:
    for i, byte in enumerate(m.mem.read(addr, size)):
        if byte != value & 0xFF:
            return addr + i
    return 0


@stub("strlen")
def _strlen(m: Machine, t: Thread, s: int) -> int:
    return len(m.mem.cstring(s, 1 << 30))


@stub("strnlen")
def _strnlen(m: Machine, t: Thread, s: int, limit: int) -> int:
    return len(m.mem.cstring(s, min(limit, 1 << 30)))


def _compare(a: bytes, b: bytes) -> int:
    return (a > b) - (a < b)


@stub("strcmp")
def _strcmp(m: Machine, t: Thread, a: int, b: int) -> int:
    return _compare(m.mem.cstring(a), m.mem.cstring(b))


@stub("strncmp")
def _strncmp(m: Machine, t: Thread, a: int, b: int, limit: int) -> int:
    limit = min(limit, 1 << 30)
    return _compare(m.mem.cstring(a, limit), m.mem.cstring(b, limit))


@stub("strcasecmp")
def _strcasecmp(m: Machine, t: Thread, a: int, b: int) -> int:
    return _compare(m.mem.cstring(a).lower(), m.mem.cstring(b).lower())


@stub("strncasecmp")
def _strncasecmp(m: Machine, t: Thread, a: int, b: int, limit: int) -> int:
    limit = min(limit, 1 << 30)
    return _compare(m.mem.cstring(a, limit).lower(), m.mem.cstring(b, limit).lower())


@stub("strcpy")
def _strcpy(m: Machine, t: Thread, dst: int, src: int) -> int:
    m.mem.write(dst, m.mem.cstring(src) + b"\0")
    return dst


@stub("stpcpy")
def _stpcpy(m: Machine, t: Thread, dst: int, src: int) -> int:
    text = m.mem.cstring(src)
    m.mem.write(dst, text + b"\0")
    return dst + len(text)


@stub("strncpy")
def _strncpy(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    m.mem.check(dst, size, write=True) if size else None
    m.mem.write(dst, m.mem.cstring(src, size).ljust(size, b"\0"))
    return dst


@stub("strlcpy")
def _strlcpy(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    text = m.mem.cstring(src)
    if size:
        m.mem.write(dst, text[: size - 1] + b"\0")
    return len(text)


@stub("sized_strscpy", "strscpy")
def _strscpy(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    if size == 0 or size > 0x7FFFFFFF:
        return -E2BIG
    text = m.mem.cstring(src, size)
    if len(text) >= size:
        m.mem.write(dst, text[: size - 1] + b"\0")
        return -E2BIG
    m.mem.write(dst, text + b"\0")
    return len(text)


@stub("strcat")
def _strcat(m: Machine, t: Thread, dst: int, src: int) -> int:
    m.mem.write(dst + len(m.mem.cstring(dst)), m.mem.cstring(src) + b"\0")
    return dst


@stub("strncat")
def _strncat(m: Machine, t: Thread, dst: int, src: int, limit: int) -> int:
    m.mem.write(dst + len(m.mem.cstring(dst)), m.mem.cstring(src, limit) + b"\0")
    return dst


@stub("strlcat")
def _strlcat(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    have, text = len(m.mem.cstring(dst)), m.mem.cstring(src)
    if have >= size:
        raise Crash("bug", "lib/string.c:244")
    m.mem.write(dst + have, text[: size - have - 1] + b"\0")
    return have + len(text)


@stub("strchr")
def _strchr(m: Machine, t: Thread, s: int, ch: int) -> int:
    text = m.mem.cstring(s) + b"\0"
    at = text.find(ch & 0xFF)
    return s + at if at >= 0 else 0


@stub("strrchr")
def _strrchr(m: Machine, t: Thread, s: int, ch: int) -> int:
    at = (m.mem.cstring(s) + b"\0").rfind(ch & 0xFF)
    return s + at if at >= 0 else 0


@stub("strchrnul")
def _strchrnul(m: Machine, t: Thread, s: int, ch: int) -> int:
    text = m.mem.cstring(s)
    at = text.find(ch & 0xFF)
    return s + (at if at >= 0 else len(text))


@stub("strnchr")
def _strnchr(m: Machine, t: Thread, s: int, size: int, ch: int) -> int:
    at = m.mem.cstring(s, size).find(ch & 0xFF)
    return s + at if at >= 0 else 0


@stub("strstr")
def _strstr(m: Machine, t: Thread, a: int, b: int) -> int:
    at = m.mem.cstring(a).find(m.mem.cstring(b))
    return a + at if at >= 0 else 0


@stub("strnstr")
def _strnstr(m: Machine, t: Thread, a: int, b: int, size: int) -> int:
    at = m.mem.read(a, size).find(m.mem.cstring(b))
    return a + at if at >= 0 else 0


@stub("strsep")
def _strsep(m: Machine, t: Thread, where: int, delimiters: int) -> int:
    start = m.mem.load(where)
    if not start:
        return 0
    text, stops = m.mem.cstring(start), m.mem.cstring(delimiters)
    at = next((i for i, byte in enumerate(text) if byte in stops), None)
    if at is None:
        m.mem.store(where, 0)
    else:
        m.mem.store(start + at, 0, 1)
        m.mem.store(where, start + at + 1)
    return start


@stub("strspn")
def _strspn(m: Machine, t: Thread, s: int, accept: int) -> int:
    text, wanted = m.mem.cstring(s), m.mem.cstring(accept)
    return next((i for i, byte in enumerate(text) if byte not in wanted), len(text))


@stub("strcspn")
def _strcspn(m: Machine, t: Thread, s: int, reject: int) -> int:
    text, stops = m.mem.cstring(s), m.mem.cstring(reject)
    return next((i for i, byte in enumerate(text) if byte in stops), len(text))


@stub("strpbrk")
def _strpbrk(m: Machine, t: Thread, s: int, accept: int) -> int:
    text, wanted = m.mem.cstring(s), m.mem.cstring(accept)
    return next((s + i for i, byte in enumerate(text) if byte in wanted), 0)


_SPACE = b" \t\n\v\f\r\xa0"


@stub("strim")
def _strim(m: Machine, t: Thread, s: int) -> int:
    text = m.mem.cstring(s)
    kept = text.rstrip(_SPACE)
    if len(kept) < len(text):
        m.mem.store(s + len(kept), 0, 1)
    return s + len(kept) - len(kept.lstrip(_SPACE))


@stub("skip_spaces")
def _skip_spaces(m: Machine, t: Thread, s: int) -> int:
    text = m.mem.cstring(s)
    return s + len(text) - len(text.lstrip(_SPACE))


@stub("strreplace")
def _strreplace(m: Machine, t: Thread, s: int, old: int, new: int) -> int:
    m.mem.write(s, m.mem.cstring(s).replace(bytes([old & 0xFF]), bytes([new & 0xFF])))
    return s


def _sysfs_equal(a: bytes, b: bytes) -> bool:
    return a.removesuffix(b"\n") == b.removesuffix(b"\n") if abs(len(a) - len(b)) <= 1 else False


@stub("sysfs_streq")
def _sysfs_streq(m: Machine, t: Thread, a: int, b: int) -> bool:
    return _sysfs_equal(m.mem.cstring(a), m.mem.cstring(b))


def _match(m: Machine, array: int, count: int, equal: object, text: bytes) -> int:
    assert callable(equal)
    for i in range(min(count, 1 << 16)):
        item = m.mem.load(array + 8 * i)
        if not item:
            break
        if equal(m.mem.cstring(item), text):
            return i
    return -EINVAL


@stub("match_string")
def _match_string(m: Machine, t: Thread, array: int, count: int, text: bytes) -> int:
    return _match(m, array, count, bytes.__eq__, text)


@stub("__sysfs_match_string")
def _sysfs_match_string(m: Machine, t: Thread, array: int, count: int, text: int) -> int:
    return _match(m, array, count, _sysfs_equal, m.mem.cstring(text))


@stub("hex_to_bin")
def _hex_to_bin(m: Machine, t: Thread, ch: int) -> int:
    text = bytes([ch & 0xFF])
    return int(text, 16) if text in b"0123456789abcdefABCDEF" else -1


@stub("hex2bin")
def _hex2bin(m: Machine, t: Thread, dst: int, src: int, count: int) -> int:
    try:
        data = bytes.fromhex(m.mem.read(src, 2 * count).decode("ascii"))
    except ValueError:
        return -EINVAL
    if len(data) != count:
        return -EINVAL
    m.mem.write(dst, data)
    return 0


@stub("bin2hex")
def _bin2hex(m: Machine, t: Thread, dst: int, src: int, count: int) -> int:
    m.mem.write(dst, m.mem.read(src, count).hex().encode())
    return dst + 2 * count


# -- user and unsure memory -------------------------------------------------------------------------------------------


def copy(m: Machine, dst: int, src: int, size: int) -> int:
    """Copy what can be copied; the number of bytes that could not."""
    try:
        m.mem.check(dst, size, write=True) if size else None
        m.mem.write(dst, m.mem.read(src, size))
    except PageFault:
        return size
    return 0


@stub("_copy_from_user", "_copy_to_user")
def _copy_user(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    return copy(m, dst, src, size)


@stub("copy_from_kernel_nofault", "copy_to_kernel_nofault")
def _copy_nofault(m: Machine, t: Thread, dst: int, src: int, size: int) -> int:
    return -EFAULT if copy(m, dst, src, size) else 0


@stub("strncpy_from_user")
def _strncpy_from_user(m: Machine, t: Thread, dst: int, src: int, count: int) -> int:
    if count <= 0:
        return 0
    try:
        text = m.mem.cstring(src, count)
    except PageFault:
        return -EFAULT
    m.mem.write(dst, (text + b"\0")[:count])
    return len(text)


@stub("__check_object_size")
def _check_object_size(m: Machine, t: Thread, addr: int, size: int, to_user: bool) -> None:
    room = m.heap.requested(addr)
    if room and size > max(room, m.heap.size(addr)):
        raise Crash("bug", "mm/usercopy.c:102")


@stub("__copy_overflow")
def _copy_overflow(m: Machine, t: Thread, size: int, count: int) -> None:
    m.print(t, b"\x014Buffer overflow detected (%d < %d)!\n" % (signed(size, 32), count))


@stub("get_random_bytes")
def _get_random_bytes(m: Machine, t: Thread, addr: int, size: int) -> None:
    m.mem.check(addr, size, write=True) if size else None
    m.mem.write(addr, m.random.randbytes(size))


@stub("get_random_u32")
def _get_random_u32(m: Machine, t: Thread) -> int:
    return m.random.getrandbits(32)


@stub("get_random_u64")
def _get_random_u64(m: Machine, t: Thread) -> int:
    return m.random.getrandbits(64)


@stub("__get_random_u32_below")
def _get_random_u32_below(m: Machine, t: Thread, ceiling: int) -> int:
    return m.random.randrange(ceiling) if ceiling else m.random.getrandbits(32)
