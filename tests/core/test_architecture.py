"""Who may import whom. Imports for type checkers only do not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    "klpfs/kernel": ("klpfs.drivers", "klpfs.elf", "klpfs.cli", "klpfs.cpu", "klpfs.control", "klpfs.world", "pyfuse3"),
    "klpfs/livepatch": ("klpfs.drivers", "klpfs.elf", "klpfs.cli", "klpfs.cpu", "klpfs.control", "klpfs.world"),
    "klpfs/kernfs": ("klpfs.livepatch", "klpfs.kernel", "klpfs.drivers", "klpfs.elf", "klpfs.cli", "klpfs.cpu"),
    "klpfs/drivers": ("klpfs.livepatch", "klpfs.kernel", "klpfs.elf", "klpfs.cli", "klpfs.cpu", "klpfs.machine"),
    "klpfs/elf": ("klpfs.livepatch", "klpfs.drivers", "klpfs.cli", "klpfs.machine", "klpfs.control", "klpfs.world"),
}
EVERYWHERE = {"pyfuse3": "klpfs/drivers", "fuse": "klpfs/drivers", "unicorn": "klpfs/cpu", "click": "klpfs/cli"}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports at run time, anywhere in it."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += [child for child in ast.iter_child_nodes(node) if not _is_type_checking(node)]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layers(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            for package in FORBIDDEN[folder]:
                assert not within(module, package), f"{path.relative_to(ROOT)} imports {module}"


def test_the_core_imports_no_parser_of_module_files() -> None:
    """The composition, not the core, chooses how modules are read and run."""
    for folder in ("kernel", "livepatch", "kernfs"):
        for path in (ROOT / "klpfs" / folder).glob("*.py"):
            for module in imports(path):
                assert not within(module, "klpfs.loader"), path
                assert not within(module, "klpfs.synthetic"), path


@pytest.mark.parametrize("library", EVERYWHERE)
def test_libraries_stay_where_they_belong(library: str) -> None:
    for path in (ROOT / "klpfs").rglob("*.py"):
        if str(path.relative_to(ROOT)).startswith(EVERYWHERE[library]):
            continue
        for module in imports(path):
            assert not within(module, library), f"{path.relative_to(ROOT)} imports {module}"


def test_every_package_says_what_it_is() -> None:
    for path in (ROOT / "klpfs").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
