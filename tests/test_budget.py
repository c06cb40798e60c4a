"""No module grows because it is the place where things go."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
MODULE_LINES: Final = 600  # no wall to cut at: one subject each, see docs/design.md
FUNCTION_LINES: Final = 50
SILENCED: Final = 40


def programs() -> list[Path]:
    """All of our programs: the package, scripts, hooks."""
    found = list((ROOT / "nbdbackupd").rglob("*.py"))
    for folder in ("scripts", "hooks", ".ci"):
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def is_python(path: Path, text: str) -> bool:
    return path.suffix == ".py" or (text.startswith("#!") and "python" in text.split("\n", 1)[0])


def long_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, line and length of functions that reach the limit, from ``def`` to the last line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= FUNCTION_LINES:
                yield node.name, node.lineno, length


def test_modules_stay_under_their_limit() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in programs()}
    found = [
        f"{path.relative_to(ROOT)}: {size} lines"
        for path, size in sizes.items()
        if size >= MODULE_LINES
    ]
    assert not found, "\n".join(found)
    assert len(sizes) > 30


def test_functions_stay_under_their_limit() -> None:
    found = []
    for path in programs():
        text = path.read_text()
        if is_python(path, text):
            found += [
                f"{path.relative_to(ROOT)}:{line}: {name} has {length} lines"
                for name, line, length in long_functions(text)
            ]
    assert not found, "\n".join(found)


def test_the_measure() -> None:
    body = "\n".join(["    pass"] * (FUNCTION_LINES - 2))
    assert list(long_functions(f"def short():\n{body}")) == []
    longer = f"class A:\n  @x\n  async def long(self):\n{body}\n    pass"
    assert list(long_functions(longer)) == [("long", 3, FUNCTION_LINES)]


def test_few_checks_are_silenced_and_each_has_a_reason() -> None:
    found = [
        line.partition("# noqa")[2]
        for file in (ROOT / "nbdbackupd").rglob("*.py")
        for line in file.read_text().splitlines()
        if "# noqa" in line
    ]
    assert len(found) < SILENCED
    assert [each for each in found if not re.match(r": [A-Z]+\d+(, [A-Z]+\d+)* - \w", each)] == []


def test_no_queue_that_forgets_its_deadline() -> None:
    """CPython 3.11: SimpleQueue's timed get, interrupted by a signal late, waits for ever."""
    for file in (ROOT / "nbdbackupd").rglob("*.py"):
        assert "SimpleQueue(" not in file.read_text(), file
