"""A small kernel image, made as the kernel's build makes a large one: kallsyms, exports, call sites, BTF, bzImage."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import struct

TEXT = 0xFFFFFFFF81000000
DATA = 0xFFFFFFFF82000000
RODATA = 0xFFFFFFFF81800000
INIT = 0xFFFFFFFF83000000
RELEASE = "6.12.0-test"

#: (address, type, name) in kallsyms' order; enough of them for several markers.
SYMBOLS: list[tuple[int, str, str]] = [
    (0, "A", "fixed_percpu_data"),
    (0x1000, "A", "cpu_tss_rw"),
    (TEXT, "T", "_text"),
    (TEXT, "T", "startup_64"),
    *((TEXT + 0x100 + 32 * i, "t" if i % 3 else "T", f"function_{i:03d}_of_many") for i in range(700)),
    (TEXT + 0x8000, "t", "__pfx_cmdline_proc_show"),
    (TEXT + 0x8010, "t", "cmdline_proc_show"),
    (TEXT + 0x8060, "t", "twice"),
    (TEXT + 0x8080, "T", "__pfx_klp_enable_patch"),
    (TEXT + 0x8090, "T", "klp_enable_patch"),
    (TEXT + 0x8100, "t", "twice"),
    (TEXT + 0x8180, "T", "_printk"),
    (TEXT + 0x8180, "W", "alias_of_printk"),
    (TEXT + 0x8200, "T", "x" * 200),
    (DATA, "d", "some_data"),
    (DATA + 8, "D", "__this_cpu_99"),
    (INIT, "D", "__start_mcount_loc"),
    (INIT + 32, "D", "__stop_mcount_loc"),
    (INIT + 0x1000, "B", "_end"),
]
#: name, GPL only, CRC
EXPORTS = [("_printk", False, 0x11111111), ("klp_enable_patch", True, 0xDEADBEEF), ("fixed_percpu_data", False, 7)]
SITES = [TEXT + 0x8014, TEXT + 0x8090, TEXT + 0x8104, TEXT + 0x104]

WORDS = [b"function_", b"_of_many", b"proc_show", b"__pfx_", b"klp_"]


def align(data: bytes, size: int = 8) -> bytes:
    """Data filled up to a multiple of ``size``."""
    return data + bytes(-len(data) % size)


def kallsyms(symbols: list[tuple[int, str, str]], *, order: str = "6.4", percpu: bool = True) -> bytes:
    """The tables of scripts/kallsyms.c in the order of a version: 6.4, 6.2, or 6.0."""
    texts = [(kind + name).encode() for _, kind, name in symbols]
    used = set(b"".join(texts)) | set(b"0123456789")
    free = iter(code for code in range(1, 256) if code not in used)
    tokens = {code: bytes([code]) for code in used} | {next(free): word for word in WORDS}
    names, markers = b"", []
    for i, text in enumerate(texts):
        if i % 256 == 0:
            markers.append(len(names))
        for code, word in tokens.items():
            if word in WORDS:
                text = text.replace(word, bytes([code]))
        length = bytes([len(text)]) if len(text) < 128 else bytes([len(text) & 127 | 128, len(text) >> 7])
        names += length + text
    table, index = b"", []
    for code in range(256):
        index.append(len(table))
        table += tokens.get(code, b"") + b"\0"
    base = TEXT
    if percpu:
        values = [address if address < TEXT else base - 1 - address for address, _, _ in symbols]
    else:
        values = [address - base for address, _, _ in symbols]
    place = align(struct.pack(f"<{len(values)}{'i' if percpu else 'I'}", *values)) + struct.pack("<Q", base)
    seqs = align(b"".join(number.to_bytes(3, "big") for number in range(len(symbols))))
    body = align(struct.pack("<I", len(symbols))) + align(names) + align(struct.pack(f"<{len(markers)}I", *markers))
    body += seqs if order == "6.2" else b""
    body += align(table) + align(struct.pack("<256H", *index))
    return body + place + seqs if order == "6.4" else place + body


def btf(structs: dict[str, tuple[int, list[tuple[str, int]]]]) -> bytes:
    """BTF with an int type and some structures: name -> (size, [(member, offset in bytes)])."""
    strings = b"\0int\0"
    types = struct.pack("<IIII", 1, 1 << 24, 4, 32)
    types += struct.pack("<III", 0, 2 << 24, 1)  # a pointer, as filler
    types += struct.pack("<III", 0, 3 << 24, 0) + struct.pack("<III", 1, 1, 4)  # an array
    types += struct.pack("<III", 0, 13 << 24 | 1, 1) + struct.pack("<II", 0, 1)  # a function prototype
    for name, (size, members) in structs.items():
        types += struct.pack("<III", len(strings), 4 << 24 | len(members), size)
        strings += name.encode() + b"\0"
        for member, offset in members:
            types += struct.pack("<III", len(strings), 1, offset * 8)
            strings += member.encode() + b"\0"
    head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return head + types + strings


KLP_STRUCTS = {
    "klp_func": (152, [("old_name", 0), ("new_func", 8), ("old_sympos", 16)]),
    "klp_object": (168, [("name", 0), ("funcs", 8), ("callbacks", 16)]),
    "klp_callbacks": (40, [("pre_patch", 0), ("post_patch", 8), ("pre_unpatch", 16), ("post_unpatch", 24)]),
    "klp_state": (24, [("id", 0), ("version", 8)]),
    "klp_patch": (208, [("mod", 0), ("objs", 8), ("states", 16), ("replace", 32)]),
}


def vmlinux(tables: bytes | None = None, *, types: bytes | None = None) -> bytes:
    """The ELF file of a kernel."""
    by_name = {name: address for address, _, name in reversed(SYMBOLS)}
    rodata = align(f"Linux version {RELEASE} (somebody) 0123\0".encode()) + b"0\x001\x002\x003\x00" + bytes(8)
    rodata += tables if tables is not None else kallsyms(SYMBOLS)
    strings = b"\0"
    rows: dict[str, list[tuple[int, int, int]]] = {"": [], "_gpl": []}
    for name, gpl, crc in EXPORTS:
        rows["_gpl" if gpl else ""].append((by_name[name], len(strings), crc))
        strings += name.encode() + b"\0"
    parts: list[tuple[str, int, int, bytes]] = [(".text", TEXT, 1, bytes(16)), (".rodata", RODATA, 1, rodata)]
    where = RODATA + (1 << 20)
    strings_at = where
    parts.append(("__ksymtab_strings", where, 1, strings))
    for suffix, entries in rows.items():
        where += 1 << 12
        table = b""
        for i, (address, name, _) in enumerate(entries):
            at = where + 12 * i
            value = (address - at + (1 << 31)) % (1 << 32) - (1 << 31) if address >= TEXT else address - at & 0xFFFFFFFF
            table += struct.pack("<IiI", value & 0xFFFFFFFF, strings_at + name - at - 4, 0)
        parts.append(("__ksymtab" + suffix, where, 1, table))
        parts.append(("__kcrctab" + suffix, where + 2048, 1, b"".join(struct.pack("<I", crc) for *_, crc in entries)))
    parts.append((".init.data", INIT, 1, struct.pack("<4Q", *SITES)))
    parts.append((".BTF", RODATA + (2 << 20), 1, types if types is not None else btf(KLP_STRUCTS)))
    names = b"\0"
    out, headers = bytearray(64), bytes(64)
    for name, address, kind, body in [*parts, (".shstrtab", 0, 3, b"")]:
        at = len(names)
        names += name.encode() + b"\0"
        body = body if name != ".shstrtab" else names
        out += bytes(-len(out) % 8)
        headers += struct.pack("<IIQQQQIIQQ", at, kind, 2, address, len(out), len(body), 0, 0, 8, 0)
        out += body
    count = len(parts) + 2
    out += bytes(-len(out) % 8)
    ident = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)
    out[:64] = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, TEXT, 0, len(out), 0, 64, 0, 0, 64, count, count - 1)
    return bytes(out + headers)


def bzimage(payload: bytes) -> bytes:
    """A compressed kernel behind a boot header."""
    setup, offset = 3, 100
    head = bytearray((setup + 1) * 512)
    head[0x1F1] = setup
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + bytes(offset) + payload + b"the rest of the image"


def compressed(data: bytes, method: str) -> bytes:
    """Data as the kernel's build compresses them."""
    size = struct.pack("<I", len(data))
    if method == "gzip":
        return gzip.compress(data)
    if method == "xz":
        return lzma.compress(data, check=lzma.CHECK_CRC32) + size
    if method == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_ALONE) + size
    if method == "bzip2":
        return bz2.compress(data) + size
    out = ctypes.create_string_buffer(len(data) + 4096)
    if method == "zstd":
        lib = ctypes.CDLL("libzstd.so.1")
        lib.ZSTD_compress.restype = ctypes.c_size_t
        got = lib.ZSTD_compress(out, ctypes.c_size_t(len(out)), data, ctypes.c_size_t(len(data)), 3)
        return out.raw[:got] + size
    lib = ctypes.CDLL("liblz4.so.1")
    blocks = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        block = data[start : start + (8 << 20)]
        got = lib.LZ4_compress_default(block, out, len(block), len(out))
        blocks += struct.pack("<I", got) + out.raw[:got]
    return blocks + size
