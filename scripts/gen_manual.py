"""The body of scripts/gen-manual: the options of nbdbackupctl(1) are those of its parser.

Which options there are, how they are spelled and what their arguments are called is the parser's;
what the page says of them is written by hand. A new option begins with the text of its help. The
first line of each exit status is of ``errors.MEANINGS``.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from nbdbackupd.config import manpage
from nbdbackupd.errors import MEANINGS
from scripts.gen_completion import Command, Option, read_parser
from scripts.generated import TOP, main

PAGE: Final = TOP / "docs/man/nbdbackupctl.1"
TAG: Final = re.compile(r'\.B[IR]? (?:\\-\w ", " )?(\\-\\-[\w\\-]+)')


def generated() -> Mapping[Path, str]:
    """The page and what must stand in it."""
    return {PAGE: render(PAGE.read_text(), *read_parser())}


def render(page: str, program: Command, verbs: Mapping[str, Command]) -> str:
    """The page with the options of the program and its verbs."""
    shared = {option.names for option in program.options}
    lines: list[str] = []
    for heading, body in _sections(page.splitlines()):
        lines += [heading] if heading else []
        name = heading.removeprefix(".SS ")
        if heading == ".SH GLOBAL OPTIONS":
            lines += _section(body, program.options)
        elif heading == ".SH EXIT STATUS":
            lines += _statuses(body)
        elif name in verbs:
            own = [option for option in verbs[name].options if option.names not in shared]
            lines += _section(body, own)
        else:
            lines += body
    return "\n".join(lines) + "\n"


def _statuses(lines: list[str]) -> list[str]:
    """An entry for each exit status: its meaning, then what the page says more of it."""
    entries = "\n".join(lines).split(".TP\n")[1:]
    more = {re.sub(r"^\.BI? | ", "", tag): text for tag, _, *text in map(str.splitlines, entries)}
    found: list[str] = []
    for status, meaning in MEANINGS.items():
        number, plus, letter = status.partition("+")
        tag = f".BI {number}+ {letter}" if plus else f".B {number}"
        found += [".TP", tag, f"{meaning[:1].upper()}{meaning[1:]}.", *more.get(status, [])]
    return found


def _sections(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each heading with the lines below it; what stands before the first has none."""
    heading, body = "", list[str]()
    for line in lines:
        if line.startswith((".SH ", ".SS ")):
            yield heading, body
            heading, body = line, []
        else:
            body.append(line)
    yield heading, body


def _section(lines: list[str], options: Sequence[Option]) -> list[str]:
    """The lines of a section with an entry for each option, a new one behind that before it."""
    blocks = list(_blocks(lines))
    known = {option.names[-1]: option for option in options}
    behind = 1
    for name, option in known.items():
        names = [each for each, _ in blocks]
        if name not in names:
            told = f"{option.help[:1].upper()}{option.help[1:]}."
            blocks.insert(behind, (name, manpage.inline(told)))
            behind += 1
        else:
            behind = names.index(name) + 1
    found: list[str] = []
    for name, text in blocks:
        if name in known:
            found += [".TP", tag(known[name]), *text]
        elif not name:
            found += text
    return found


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The long name of each option with its text; all other lines with an empty name."""
    name, block, depth = "", list[str](), 0
    rest = iter(lines)
    for line in rest:
        depth += line.startswith(".RS") - line.startswith(".RE")
        if depth == 0 and line == ".TP":
            tagged = next(rest)
            yield name, block
            found = TAG.match(tagged)
            name = found[1].replace("\\", "") if found else ""
            block = [] if found else [line, tagged]
        elif depth == 0 and line == ".PP" and name:
            yield name, block
            name, block = "", [line]
        else:
            block.append(line)
    yield name, block


def tag(option: Option) -> str:
    """The line of roff that names an option and its argument."""
    *letters, name = [each.replace("-", "\\-") for each in option.names]
    flags = "".join(f'{letter} ", " ' for letter in letters) + name
    if not option.metavar:
        return f".BR {flags}" if letters else f".B {flags}"
    if option.choices:
        words = "\\fR|\\fB".join(option.choices).replace("-", "\\-")
        return f'.BR {flags} " \\fB{words}\\fR"'
    if option.optional:
        return f'.BR {flags} " [\\fI{option.metavar}\\fR]"'
    return (
        f'.BR {flags} " \\fI{option.metavar}\\fR"'
        if letters
        else f'.BI {flags} " {option.metavar}"'
    )


if __name__ == "__main__":
    sys.exit(main("gen-manual", generated(), sys.argv[1:]))
