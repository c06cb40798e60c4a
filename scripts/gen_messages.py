"""The body of scripts/gen-messages: every text of two words or more in the product's code."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from scripts.generated import TOP, main

LIST: Final = TOP / "tests/unit/messages.txt"
WORDS: Final = re.compile(r"[^\W\d_]{2,}\S* +(\S* +)*\S*[^\W\d_]{2,}")
HEAD: Final = """\
# What nbdbackupd says, made by scripts/gen-messages from its code: errors, warnings, events, lines
# of reports, help. Each is true, short, plain, and names what, where, and the cure. {} is a value.
"""


def generated() -> Mapping[Path, str]:
    """The list and what must stand in it."""
    found = {
        text for path in (TOP / "nbdbackupd").rglob("*.py") for text in texts(path.read_text())
    }
    return {LIST: HEAD + "".join(f"{text}\n" for text in sorted(found))}


def texts(source: str) -> Iterator[str]:
    """The texts of a module that are no docstrings, values as ``{}``, each as one line."""
    tree = ast.parse(source)
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if id(node) in docs or id(node) in inner:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(_part(part) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        line = " ".join(text.split())
        if WORDS.search(line):
            yield line


def _part(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


if __name__ == "__main__":
    sys.exit(main("gen-messages", generated(), sys.argv[1:]))
