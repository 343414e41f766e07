"""Compressed modules and kernel images.

Decompression of gzip, xz, lzma and bzip2 is Python's own; zstd and lz4 are left to the C libraries that every Debian
system has (libzstd.so.1, liblz4.so.1).

Sources: kernel/module/decompress.c, scripts/Makefile.lib (the size appended to a compressed image), libkmod-file.c of
kmod (which formats insmod knows, and that it goes by their first bytes).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from ctypes import CDLL

__all__ = ["CompressionError", "is_compressed_module", "unpack"]

#: First bytes of what ``insmod`` unpacks.
_MODULE_FORMATS: Final = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


class CompressionError(OSError):
    """Data that cannot be unpacked: broken (EINVAL), too large (EFBIG), or for want of a library (ENOPKG)."""

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(number, message)


class _Decompressor(Protocol):
    """What zlib's, lzma's and bz2's incremental decompressors have in common."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def is_compressed_module(data: bytes) -> bool:
    """Whether kmod's insmod would unpack a file that begins with *data*."""
    return data.startswith(_MODULE_FORMATS)


def unpack(data: bytes, limit: int, *, sized: bool = False) -> bytes | None:
    """*data* without its compression, None if it has none that is known here.

    At most *limit* bytes come out. *sized*: a kernel's build appended the size, 32 bits, where the format does not
    tell it. Raises CompressionError.
    """
    import bz2  # here, as most modules are not compressed, and every command's start counts
    import lzma
    import zlib

    try:
        if data.startswith(b"\x1f\x8b"):
            return _whole(zlib.decompressobj(zlib.MAX_WBITS | 16), data, limit)
        if data.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
            return _whole(lzma.LZMADecompressor(lzma.FORMAT_AUTO), data, limit)
        if data.startswith(b"BZh"):
            return _whole(bz2.BZ2Decompressor(), data, limit)
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            return _unzstd(data, limit, sized=sized)
        if data.startswith(b"\x02\x21\x4c\x18"):
            return _unlz4(data, limit)
    except CompressionError:
        raise
    except (zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as err:
        raise CompressionError(f"broken compressed data: {err}") from err
    return None


def _whole(decompressor: _Decompressor, data: bytes, limit: int) -> bytes:
    out = decompressor.decompress(data, limit)
    if not decompressor.eof:
        raise CompressionError(f"the compressed data is cut short, or larger than {limit} bytes")
    return out


def _library(name: str, package: str) -> CDLL:
    import ctypes

    try:
        return ctypes.CDLL(name)
    except OSError as err:
        raise CompressionError(f"its compression needs {name} (package {package})", errno.ENOPKG) from err


def _unzstd(data: bytes, limit: int, *, sized: bool) -> bytes:
    import ctypes

    lib = _library("libzstd.so.1", "libzstd1")
    for name in ("ZSTD_decompress", "ZSTD_findFrameCompressedSize"):
        getattr(lib, name).restype = ctypes.c_size_t
    lib.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
    lib.ZSTD_isError.argtypes = [ctypes.c_size_t]
    if sized:
        (total,) = struct.unpack_from("<I", data, len(data) - 4)
    else:
        total = lib.ZSTD_getFrameContentSize(data, ctypes.c_size_t(len(data)))
        if total >= (1 << 64) - 2:  # unknown to the format, or broken
            total = limit
    if not 0 < total <= limit:
        raise CompressionError(f"an impossible size of {total} bytes", errno.EFBIG)
    out = ctypes.create_string_buffer(total)
    frame = lib.ZSTD_findFrameCompressedSize(data, ctypes.c_size_t(len(data)))
    size = frame
    if not lib.ZSTD_isError(frame):
        size = lib.ZSTD_decompress(out, ctypes.c_size_t(len(out)), data, ctypes.c_size_t(frame))
    if lib.ZSTD_isError(size):
        raise CompressionError("broken zstd data")
    return out.raw[:size]


def _unlz4(data: bytes, limit: int) -> bytes:
    """The legacy frame: blocks of up to 8 MB, each preceded by its compressed size."""
    import ctypes

    lib = _library("liblz4.so.1", "liblz4-1")
    chunk = ctypes.create_string_buffer(8 << 20)
    out = bytearray()
    position = 4
    while position + 8 <= len(data):  # the last four bytes are the size of the whole
        (size,) = struct.unpack_from("<I", data, position)
        block = data[position + 4 : position + 4 + size]
        got = lib.LZ4_decompress_safe(block, chunk, len(block), len(chunk))
        if got < 0 or len(block) < size or len(out) + got > limit:
            raise CompressionError("broken lz4 data")
        out += memoryview(chunk)[:got]
        position += 4 + size
    return bytes(out)
