"""A setting is one entry of one table: all that is made of the others is made of a new one, too."""

from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.app import ctl
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import config
from nbdbackupd.app.verbs.backup import with_options
from nbdbackupd.config import files, kinds, manpage, sample, schema
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.config.setting import Option, Setting
from nbdbackupd.config.settings import settings_for
from nbdbackupd.ops.backup import prepare
from nbdbackupd.ops.domain.images import ALONE
from scripts import gen_completion, gen_manual, generated

MADE_UP = Setting(
    "limits.made_up",
    kinds.count(1, 9),
    4,
    help="Do so much of it at a time.",
    option=Option("-y, --made-up N", "run"),
)


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with one more entry, as its class and its list have it."""
    monkeypatch.setattr(DomainSettings, MADE_UP.field, MADE_UP, raising=False)
    monkeypatch.setitem(schema.BY_PATH, MADE_UP.path, MADE_UP)


def read(directory: Path, text: str) -> DomainSettings:
    (directory / "nbdbackup.yaml").write_text(text)
    return settings_for("vm", "", {}, files.read_all(directory).require_sound())


def value(settings: Any) -> int:
    """As code asks for it; mypy knows only what the table in the file has."""
    found: int = settings.limits_made_up
    return found


@pytest.mark.usefixtures("one_more")
def test_files_options_and_requests_have_it(tmp_path: Path) -> None:
    assert value(schema.defaults()) == 4
    found = read(tmp_path, "limits: {made_up: 7}\n")
    assert value(found) == 7
    args = ctl.build_parser().parse_args(["backup", "vm", "-o", "/x"])
    host = Context.from_args(args).host
    for argv, wanted in (([], 7), (["--made-up", "9"], 9), (["-y", "2"], 2)):
        args = ctl.build_parser().parse_args(["backup", "vm", "-o", "/x", *argv])
        request = prepare.request("vm", Path("/x"), host, with_options(args, found), ALONE)
        assert value(request.settings) == wanted


@pytest.mark.usefixtures("one_more")
def test_a_wrong_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nbdbackup.yaml").write_text("limits: {made_up: 10}\n")
    (problem,) = files.read_all(tmp_path).problems
    assert "out of range: 10" in str(problem)
    with pytest.raises(SystemExit):
        ctl.build_parser().parse_args(["backup", "vm", "--made-up", "10"])
    assert "argument -y/--made-up: out of range: 10" in capsys.readouterr().err


@pytest.mark.usefixtures("one_more")
def test_config_show_has_it(tmp_path: Path) -> None:
    found = read(tmp_path, "limits: {made_up: 7}\n")
    (row,) = [
        line.split() for line in config._render(found, "vm").splitlines() if "made_up" in line
    ]
    assert row == ["limits.made_up", "7", f"{tmp_path}/nbdbackup.yaml:1"]
    told = [each for each in config._document(found, "vm", "")["settings"] if each["value"] == 7]
    assert [each["path"] for each in told] == ["limits.made_up"]


@pytest.mark.usefixtures("one_more")
def test_generated_files_have_it() -> None:
    text = sample.render()
    section = text[text.index("\nlimits:") : text.index("\nretention:")]
    assert "  # Do so much of it at a time.\n  #made_up: 4\n" in section
    page = manpage.render()
    assert '.BR limits.made_up " \\fR(number from 1 to 9; default \\fB4\\fR)"\n' in page
    assert "\nCommand line:\n\\fB\\-\\-made\\-up\\fR.\n" in page
    ((path, page),) = gen_manual.generated().items()
    entry = '.TP\n.BR \\-y ", " \\-\\-made\\-up " \\fIN\\fR"\nDo so much of it at a time.\n'
    assert entry in page
    # behind the last one of its group, and nothing else is touched
    assert page.replace(entry, "") == path.read_text()
    assert page[: page.index(entry)].rindex("\\-\\-timeout") > page.index(".SS backup")
    completion = gen_completion.generate()
    # the list is wrapped
    assert "-y --made-up" in " ".join(completion.split())
    assert "*:--made-up" in completion


def test_the_manual_is_current() -> None:
    assert generated.stale(gen_manual.generated()) == [], "run scripts/gen-manual"


def test_an_option_that_goes_leaves_the_manual() -> None:
    """What stands around it stays; a changed letter is taken over."""
    page = '.SS v\nProse.\n.TP\n.B \\-\\-old\nGone.\n.PP\nMore.\n.TP\n.BI \\-\\-kept " N"\nText.\n'
    kept = gen_completion.Option(names=("-k", "--kept"), metavar="N", help="no text of this")
    verb = gen_completion.Command(options=(kept,))
    told = gen_manual.render(page, gen_completion.Command(options=()), {"v": verb})
    head = ".SS v\nProse.\n.PP\nMore.\n.TP\n"
    assert told == head + '.BR \\-k ", " \\-\\-kept " \\fIN\\fR"\nText.\n'


@pytest.mark.parametrize(
    ("usage", "flags", "argument", "words", "is_bare"),
    [
        ("--raw", ("--raw",), "", (), False),
        ("-S, --start-paused", ("-S", "--start-paused"), "", (), False),
        ("-z, --compress [LEVEL]", ("-z", "--compress"), "LEVEL", (), True),
        ("--freeze auto|never", ("--freeze",), "auto|never", ("auto", "never"), False),
        ("--scratch-dir DIR", ("--scratch-dir",), "DIR", (), False),
    ],
)
def test_usage(
    usage: str, flags: tuple[str, ...], argument: str, words: tuple[str, ...], *, is_bare: bool
) -> None:
    option = Option(usage, "run")
    assert (option.flags, option.argument) == (flags, argument)
    assert (option.words, option.is_bare) == (words, is_bare)
    assert option.name == flags[-1].strip("-").replace("-", "_")
