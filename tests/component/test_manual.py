"""The manual, the completion and the exit codes say what the parser and the errors do."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdbackupd import __version__, errors
from scripts import gen_completion, generated
from scripts.gen_completion import Command
from tests.lib.pages import DESIGN, TOP, tables

pytestmark = pytest.mark.component

MAN = TOP / "docs/man/nbdbackupctl.1"
COMPLETION = TOP / "packaging/completion/nbdbackupctl.bash"


# -- the manual


def plain(line: str) -> str:
    """A line of roff without its escapes."""
    return re.sub(r"\\f.|\\\||\\(?=-)", "", line)


def man_section(title: str) -> list[str]:
    """The lines of one section of the manual."""
    lines = MAN.read_text().splitlines()
    start = lines.index(f".SH {title}") + 1
    ends = [n for n, line in enumerate(lines) if n >= start and line.startswith(".SH ")]
    return lines[start : ends[0] if ends else None]


def man_verbs() -> dict[str, list[str]]:
    """The lines of each verb of the manual, in its order."""
    found: dict[str, list[str]] = {}
    for line in man_section("VERBS"):
        if line.startswith(".SS "):
            found[line.removeprefix(".SS ")] = []
        else:
            found[list(found)[-1]].append(line)
    return found


def man_options(lines: list[str]) -> dict[tuple[str, ...], str]:
    """The options in tags: spellings, and the value's text."""
    found = {}
    for tag, line in itertools.pairwise(lines):
        if tag == ".TP" and re.match(r"\.B[IR]? \\-", line):
            words = plain(line).partition(" ")[2].replace('"', "").replace(",", " ").split()
            names = tuple(word for word in words if word.startswith("-"))
            found[names] = " ".join(word for word in words if not word.startswith("-"))
    return found


def parser_options(command: Command) -> dict[tuple[str, ...], str]:
    """The same of a parser."""
    return {
        option.names: f"[{option.metavar}]" if option.optional else option.metavar
        for option in command.options
    }


def test_manual_has_every_verb_and_option_and_no_others() -> None:
    program, verbs = gen_completion.read_parser()
    shared = parser_options(program)
    assert man_options(man_section("GLOBAL OPTIONS")) == shared
    described = man_verbs()
    assert list(described) == list(verbs)
    for verb, command in verbs.items():
        own = {k: v for k, v in parser_options(command).items() if k not in shared}
        assert man_options(described[verb]) == own, verb


def test_manual_shows_each_verb_in_its_synopsis() -> None:
    _, verbs = gen_completion.read_parser()
    synopsis = "\n".join(man_section("SYNOPSIS"))
    for verb, command in verbs.items():
        part = re.search(rf"^\.B {verb}$(.*?)^\.YS$", synopsis, re.MULTILINE | re.DOTALL)
        assert part is not None, verb
        assert f".I {command.positionals[0]}" in part[1]


def test_manual_is_of_this_version() -> None:
    (head,) = re.findall(r"^\.TH .*$", MAN.read_text(), re.MULTILINE)
    assert f'"nbdbackupd {__version__}"' in head


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_manual_renders_without_a_warning() -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8", MAN], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- exit codes


def exit_codes() -> set[str]:
    """The codes of the exception tree, and those that are no exceptions."""
    found = {0, 3}
    left = [errors.NbdbackupError]
    while left:
        kind = left.pop()
        found.add(kind.exit_code)
        left += kind.__subclasses__()
    assert errors.Interrupted(15).exit_code == 128 + 15
    return {*map(str, found), "128+n"}


def test_exit_codes_agree_everywhere() -> None:
    man = {
        plain(line).partition(" ")[2].replace(" ", "")
        for tag, line in itertools.pairwise(man_section("EXIT STATUS"))
        if tag == ".TP"
    }
    assert man == exit_codes()
    assert set(errors.MEANINGS) == exit_codes()
    (rows,) = tables(DESIGN, "exit status")
    assert {row[0]: row[2] for row in rows} == errors.MEANINGS


STATUSES = TOP / "docs/reference/exit-status.md"


def test_exit_statuses_are_explained() -> None:
    """The page has each status once, and tells of units what they are told."""
    (rows,) = tables(STATUSES, "status")
    assert [row[:2] for row in rows] == [list(each) for each in errors.MEANINGS.items()]
    good = {row[0] for row in rows if row[2] == "success"}
    for unit in (TOP / "units").glob("nbdbackup*.service"):
        text = unit.read_text()
        if "nbdbackupctl run" in text or "nbdbackupctl verify" in text:
            (listed,) = re.findall(r"^SuccessExitStatus=(.*)$", text, re.MULTILINE)
            assert {"0", *listed.split()} == good, unit.name


# -- completion


def test_completion_is_what_the_generator_prints() -> None:
    assert generated.stale(gen_completion.generated()) == [], "run scripts/gen-completion"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_completion_is_sound_bash() -> None:
    done = subprocess.run(
        ["shellcheck", "-s", "bash", COMPLETION], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def complete(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last word; runs in ``tmp_path``."""
    script = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _nbdbackupctl;'
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, COMPLETION, "nbdbackupctl", *words],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert not done.stderr
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_completion_offers_what_fits(tmp_path: Path) -> None:
    (tmp_path / "a set").mkdir()
    (tmp_path / "a file").write_text("")
    domains = tmp_path / ".config/libvirt/qemu"
    domains.mkdir(parents=True)
    (domains / "vm-of-test.xml").write_text("<domain/>")
    verbs = list(gen_completion.read_parser()[1])
    for words, wanted in (
        ([""], verbs),
        (["re"], ["restore", "remove", "report"]),
        (["-c", "qemu", ":", "///system", "re"], ["restore", "remove", "report"]),
        (["--progress", "p"], ["plain"]),
        (["backup", "-l", ""], ["auto", "full", "inc", "diff", "copy"]),
        (["backup", "--level", "=", "i"], ["inc"]),
        (["backup", "--level", "="], ["auto", "full", "inc", "diff", "copy"]),
        (["backup", "--freeze-"], ["--freeze-mountpoint"]),
        (["backup", "-z", "--freeze-"], ["--freeze-mountpoint"]),
        (["backup", "-z", "6", "vm-of"], ["vm-of-test"]),
        (["backup", "-o", "a"], ["a set"]),
        (["backup", "vm-of-test", "vm"], []),
        (["restore", "a"], ["a set"]),
        (["restore", "--format", ""], ["qcow2", "raw"]),
        (["restore", "--sequence", "a f"], ["a file"]),
        (["verify", "--point", ""], []),
        (["config", "s"], ["show", "sample"]),
        # domains for SOURCE, and what comes second
        (["restore", "vm-of"], ["vm-of-test"]),
        (["config", "show", "vm-of"], ["vm-of-test"]),
        (["files", "a set", "c"], ["cp"]),
        (["boot", "--stop", "no-such"], []),
    ):
        assert complete(tmp_path, *words) == wanted, words
