"""What the kernfs tests share."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refusal(number: int) -> Iterator[None]:
    """The block must raise OSError with errno *number*."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
        yield
    assert caught.value.errno == number, f"{caught.value!r}, not {errno.errorcode[number]}"
