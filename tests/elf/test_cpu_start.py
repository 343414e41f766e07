"""When the execution engine starts, and what happens where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from cpu_support import CpuTable, build, lines

from klpfs.cpu import lazy
from klpfs.machine import open_machine

MODULE = 'int init_module(void) { pr("ran\\n"); return 0; }\nvoid cleanup_module(void) {}\n'


def test_the_engine_starts_with_the_first_module(run: Any) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            assert engine.cpu is None
            await m.init_module(build("first", MODULE))
            assert lines(m)[-1] == "ran"
            assert engine.cpu is not None
            assert engine.cpu.alive
        assert not engine.cpu.alive

    run(main)


def test_or_by_itself_soon_after_the_boot() -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=0)
            assert engine is not None
            with trio.fail_after(30):
                while engine.cpu is None or not engine.cpu.confinement:  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.01)

    trio.run(main)


def test_without_unicorn_metadata_drive_modules(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            assert lazy.attach(m) is None
            assert m.engine is None
            await m.init_module(build("first", MODULE))
            assert "ran" not in lines(m)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(main)


def test_where_the_sandbox_cannot_start_metadata_drive_modules(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_machine(table=CpuTable()) as m:
            engine = lazy.attach(m, settle=3600)
            assert engine is not None
            await m.init_module(build("first", MODULE))
            assert engine.cpu is None
            assert "ran" not in lines(m)

    def refuse() -> int:
        raise OSError(38, "no memfd here")

    monkeypatch.setattr("klpfs.cpu.host.create_memory", refuse)
    run(main)
