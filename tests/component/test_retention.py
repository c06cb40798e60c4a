"""Retention with real sets: what is protected, what a prune takes, and what it leaves alone."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdbackupd.app import context as app_context
from nbdbackupd.app import ctl
from nbdbackupd.errors import BusyError, RepositoryError
from nbdbackupd.repo import layout, protected
from nbdbackupd.repo.protected import Protection
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains
from tests.lib.told import heard

pytestmark = pytest.mark.component

NOW = datetime(2026, 2, 10, 12, 0, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("NBDBACKUP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(app_context, "now", lambda: NOW)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    chains.make_chain(path)
    return path


def command(*words: object) -> int:
    return ctl.main([str(each) for each in words])


# -- protect


def test_a_point_is_protected_and_listed(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with heard() as names:
        note = ["--until", "2026-12-31", "--note", "before the upgrade"]
        assert command("protect", chain, "--point", "p2", *note) == 0
        assert command("protect", chain, "--point", "latest") == 0
    assert names == ["point-protected", "point-protected"]
    said = capsys.readouterr().out
    assert "p2 is protected until 2026-12-31 23:59:59 UTC: before the upgrade\n" in said
    assert "p3 is protected\n" in said
    assert command("list", chain) == 0
    assert "protected until 2026-12-31 23:59:59 UTC: before the up" in capsys.readouterr().out
    assert command("list", "--json", chain) == 0
    told = json.loads(capsys.readouterr().out)["protections"]
    assert [(each["point"], each["since"], each["until"]) for each in told] == [
        ("p2", "2026-02-10T12:00:00Z", "2026-12-31T23:59:59Z"), ("p3", "2026-02-10T12:00:00Z", ""),
    ]  # fmt: skip
    found = protected.read(chain, ["p1", "p2", "p3"])
    assert {ident: each.holds(NOW) for ident, each in found.items()} == {"p2": True, "p3": True}
    assert not found["p2"].holds(datetime(2027, 1, 1, tzinfo=UTC))
    with heard() as names:
        assert command("unprotect", chain, "--point", "p2") == 0
    assert names == ["point-unprotected"]
    assert list(protected.read(chain, ["p1", "p2", "p3"])) == ["p3"]
    assert command("unprotect", chain, "--point", "p2") == RepositoryError.exit_code
    assert "p2 is not protected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--point", "none"], 50, "no restore point with id 'none'"),
        (["--point", "p1", "--until", "2026-02-09"], 2, "--until is over already"),
        (["--point", "p1", "--until", "1999-01-01"], 2, "--until is over already"),
        (["--point", "p1", "--note", "a\nb"], 2, "--note takes one line"),
        (["--point", "p1", "--note", "x" * 501], 2, "--note takes one line"),
    ],
)
def test_what_is_refused(
    chain: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    before = chains.tree(chain)
    assert command("protect", chain, *words) == code
    assert said in capsys.readouterr().err
    assert chains.tree(chain) == before


def test_a_busy_set_is_not_protected(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SetDirectory.open(chain).lock(owner="a test"):
        assert command("protect", chain, "--point", "p1") == BusyError.exit_code
    assert "a test" in capsys.readouterr().err
    assert not (chain / layout.PROTECTED).exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b'{"version": 2}', b'{"version": 1, "point": "p2"}', b"\0" * 20000,
     b'{"version": 1, "point": "p1", "until": 5}', b'{"version": 1, "point": "p1", "x": ""}',
     b'{"version": 1, "point": "p1", "until": "2026-01-01"}',
     b'{"version": 1, "point": "p1", "until": "soon"}', None],
)  # fmt: skip
def test_a_damaged_note_protects(
    chain: Path, capsys: pytest.CaptureFixture[str], data: bytes | None
) -> None:
    note = chain / layout.protection("p1")
    note.parent.mkdir()
    if data is None:
        note.symlink_to("/etc/passwd")
    else:
        note.write_bytes(data)
    (found,) = protected.read(chain, ["p1", "p2"]).values()
    assert found == Protection(point="p1", damage=found.damage)
    assert found.damage
    assert found.holds(datetime(9999, 1, 1, tzinfo=UTC))
    assert command("list", chain) == 3
    said = capsys.readouterr()
    assert "protected by a note that can't be read" in said.out
    assert "can't be read, and protects" in said.err
    assert command("unprotect", chain, "--point", "p1") == 0
    assert protected.read(chain, ["p1"]) == {}


def test_notes_behind_a_link_are_not_read(chain: Path, tmp_path: Path) -> None:
    (chain / layout.PROTECTED).symlink_to(tmp_path)
    with pytest.raises(RepositoryError, match="is a symbolic link"):
        protected.read(chain, ["p1"])
