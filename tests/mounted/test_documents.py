"""The session in README.md and the demo do what they show."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cli_support import REPO, Cli, is_mounted, wait_for


def session(text: str) -> list[tuple[str, str]]:
    """Commands and expected outputs of the ``console`` blocks of a Markdown text."""
    steps: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line[2:], ""))
            else:
                command, output = steps[-1]
                steps[-1] = (command, output + line + "\n")
    return steps


def test_the_session_of_the_readme(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    (tmp_path / "examples").symlink_to(REPO / "examples")
    steps = session((REPO / "README.md").read_text())
    assert len(steps) > 10
    try:
        for command, expected in steps:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=cli.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                check=False,
            )
            # bash counts lines when it runs a command that it was given as an argument
            assert done.stdout.replace("bash: line 1: ", "bash: ") == expected, command
    finally:
        if is_mounted(tmp_path / "k"):
            cli.run("umount", "--lazy", tmp_path / "k")
    wait_for(lambda: not cli.entries(), "the end of the daemon")


def test_the_readme_names_both_commands() -> None:
    readme = (REPO / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "4", "5", "130"])
def test_exit_codes_of_the_readme_are_those_of_the_help(tmp_path: Path, code: str) -> None:
    text = Cli(tmp_path).ok("--help")
    meaning = re.search(rf"^\| {code} \| (.*) \|$", (REPO / "README.md").read_text(), re.MULTILINE)
    assert meaning is not None
    assert re.search(rf"^ +{code} +{re.escape(meaning[1])}$", text, re.MULTILINE)


def test_the_demo(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    done = subprocess.run(
        [REPO / "examples/demo.sh"], env=cli.env, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "livepatch: forcing remaining tasks to the patched state" in done.stdout
    assert "\x1b" not in done.stdout
