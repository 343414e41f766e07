"""The kernel's selftests on a machine in this process: no mount, no waiting (see :mod:`selftests`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selftests import Player, built_modules, steps

from klpfs.cpu import lazy
from klpfs.machine import open_machine

pytestmark = pytest.mark.timeout(300)  # the first test may have to build the modules

SCRIPTS = {"callbacks": 11, "ftrace": 1, "livepatch": 3, "shadow-vars": 1, "state": 4, "sysfs": 4}
"""Script: number of tests in it."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_selftest(name: str, run: Callable[..., Any], tmp_path: Path) -> None:
    modules = built_modules()
    script = steps(modules / f"selftests/test-{name}.sh", tmp_path)

    async def play() -> Player:
        async with open_machine("6.12") as machine:
            assert lazy.attach(machine) is not None
            player = Player(machine, modules)
            await player.play(script)
            return player

    assert len(run(play).tests) == SCRIPTS[name]
