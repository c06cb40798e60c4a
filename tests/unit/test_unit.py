"""Tests of a unit are quick: none of them starts a process."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STARTERS = ("subprocess", "multiprocessing", "nbdbackupd.proc", "tests.lab", "tests.lib.ctl")


def imported(source: str) -> Iterator[str]:
    """The modules that a text imports, and what it takes from them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starters(source: str) -> list[str]:
    return [
        name
        for name in imported(source)
        if any(name == each or name.startswith(f"{each}.") for each in STARTERS)
    ]


@pytest.mark.parametrize("file", sorted(HERE.glob("*.py")), ids=lambda file: file.stem)
def test_no_process_is_started(file: Path) -> None:
    """Those that do are component tests."""
    assert starters(file.read_text("utf-8")) == []


def test_what_would_start_one() -> None:
    assert starters("def f():\n import subprocess") == ["subprocess"]
    assert starters("from nbdbackupd import proc, log") == ["nbdbackupd.proc"]
    assert starters("from tests.lab.command import run") == ["tests.lab.command.run"]
