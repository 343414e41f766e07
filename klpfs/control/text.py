"""JSON with texts that need not be Unicode: paths and names of modules are bytes (``surrogateescape``).

msgspec knows Unicode only. Where a text is not, the standard library writes and reads it, as lone surrogates.
"""

from __future__ import annotations

from typing import Any

import msgspec


def to_json(obj: object) -> bytes:
    """*obj* in one line."""
    try:
        return msgspec.json.encode(obj)
    except UnicodeEncodeError:
        import json

        return json.dumps(msgspec.to_builtins(obj), separators=(",", ":")).encode()


def from_json(data: bytes, kind: Any) -> Any:
    """What :func:`to_json` was given, or somebody else wrote, as a *kind*. Raises as msgspec.json.decode does."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as err:
        if "surrogate" not in str(err):
            raise
    import json

    try:
        return msgspec.convert(json.loads(data), kind)
    except json.JSONDecodeError as err:
        raise msgspec.DecodeError(str(err)) from None
