"""Text from outside made fit for a terminal, a log, a mail: the one place that escapes it.

Names and messages come from sets, guests, other hosts. A control character in them moves the
cursor, a line feed begins a line that nobody said, a bidirectional control turns words around, and
what has no width hides. Each such character is shown by its number instead. JSON escapes by
itself, and stays exact; that it has a version is said here, too.
"""

import re
from typing import Any, Final

JSON_VERSION: Final = 1
"""Of the documents of ``--json``, see docs/json.md."""

CONTROL: Final = re.compile("[\0-\x08\x0a-\x1f\x7f-\x9f]")
"""What no name may hold that a set gives: control characters, but for the tab, which libvirt takes.

Others that can't be seen (bidirectional controls, joiners of letters) belong to real names.
"""


def line(text: str) -> str:
    r"""The text as one line: ``\x1b``, ``\n``, ``\u202e`` for what can't be shown.

    A byte of a file's name that is no UTF-8 (PEP 383) becomes ``\xff``.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def lines(text: str) -> str:
    """The same, but for line feeds, which stay."""
    return "\n".join(map(line, text.split("\n")))


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def versioned(**members: Any) -> dict[str, Any]:
    """A document for ``--json``: its version, then its members."""
    return {"version": JSON_VERSION, **members}
