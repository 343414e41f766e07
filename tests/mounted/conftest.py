"""Fixtures of the mounted tests: a toy tree behind each driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from driver_support import Server, serving

from klpfs.drivers import DRIVERS


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver in turn."""
    name: str = request.param
    return name


@pytest.fixture
def toy(driver: str, tmp_path: Path) -> Iterator[Server]:
    """The tree of ``driver_toy.py``, mounted with each driver in turn; the server must end well."""
    with serving(driver, tmp_path / "mnt") as server:
        yield server
        assert server.process.poll() is None, server.log()
        assert server.stop() == 0, server.log()
