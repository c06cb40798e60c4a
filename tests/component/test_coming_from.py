"""The tables of docs/coming-from.md: each option of the others is there, each command is ours."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nbdbackupd.app import ctl
from nbdbackupd.app.verbs import ALL
from tests.lib.pages import TOP

pytestmark = pytest.mark.component
PAGE = TOP / "docs/coming-from.md"


def rows(program: str) -> list[tuple[str, str]]:
    """Their option or command, and ours."""
    part = re.search(
        rf"^## {program}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert part is not None
    found = re.findall(r"^\| (.*?) \| (.*) \|$", part[1], re.MULTILINE)
    return [(theirs, ours) for theirs, ours in found if theirs != program]


def commands() -> list[str]:
    """All of ours, each once."""
    found: dict[str, None] = {}
    for program in ("virtnbdbackup", "virtnbdrestore", "virtnbdmap", "qmpbackup"):
        for _, ours in rows(program):
            for words in re.findall(r"`([^`]+)`", ours):
                if words.partition(" ")[0] in ALL:
                    found[words] = None
    return list(found)


@pytest.mark.parametrize("program", ["virtnbdbackup", "virtnbdrestore", "virtnbdmap"])
def test_each_option_of_theirs_is_in_the_table(program: str) -> None:
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    options = done.stdout.partition("Examples:")[0]
    theirs = set(re.findall(r"^  (?:-\w.*?, )?(--[a-z-]+)", options, re.MULTILINE))
    assert len(theirs) > 10
    told = {name for left, _ in rows(program) for name in re.findall(r"`(--[a-z-]+)`", left)}
    assert theirs == told


def test_each_row_has_an_answer() -> None:
    for program in ("virtnbdbackup", "virtnbdrestore", "virtnbdmap", "qmpbackup"):
        for theirs, ours in rows(program):
            is_told = "`" in ours or ours.startswith(("not needed", "not offered: "))
            assert is_told, (program, theirs)


@pytest.mark.parametrize("words", commands())
def test_our_command_is_understood(words: str, tmp_path: Path) -> None:
    """The parser of the real command takes it; a file and a directory that it names are there."""
    argv = shlex.split(words)
    for name in ("FILE", "SET", "SCRATCH", "STATE"):
        (tmp_path / name).mkdir()
        argv = [str(tmp_path / name) if each == name else each for each in argv]
    if argv[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            ctl.build_parser(argv).parse_args(argv)
    else:
        ctl.build_parser(argv).parse_args(argv)
