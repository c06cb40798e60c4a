"""The body of scripts/gen-pot: the texts of Cockpit's page, as gettext's catalogues begin."""

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from scripts.generated import TOP, main

PAGE: Final = TOP / "cockpit"
CATALOGUE: Final = PAGE / "po/nbdbackup.pot"
LITERAL: Final = r'"(?:[^"\\\n]|\\.)*"'
CALL: Final = re.compile(rf"\b_\(\s*({LITERAL}(?:\s*\+\s*{LITERAL})*)\s*\)")
HEAD: Final = """\
# Texts of the page of Cockpit, made by scripts/gen-pot from cockpit/*.js.
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"
"""


def generated() -> Mapping[Path, str]:
    """The catalogue and what must stand in it."""
    places: dict[str, set[str]] = {}
    for path in sorted(PAGE.glob("*.js")):
        for text in texts(path.read_text(encoding="utf-8")):
            places.setdefault(text, set()).add(path.name)
    entries = [
        f'\n#: {" ".join(sorted(places[text]))}\nmsgid {quoted(text)}\nmsgstr ""\n'
        for text in sorted(places)
    ]
    return {CATALOGUE: HEAD + "".join(entries)}


def texts(source: str) -> list[str]:
    """What a module gives to gettext; literals that are added are one."""
    return [
        "".join(ast.literal_eval(each) for each in re.findall(LITERAL, found))
        for found in CALL.findall(source)
    ]


def quoted(text: str) -> str:
    """As a catalogue has it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


if __name__ == "__main__":
    sys.exit(main("gen-pot", generated(), sys.argv[1:]))
