"""``nbdbackupctl log``: how journalctl is asked, what is made of its records, a set's own logs."""

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd import events
from nbdbackupd.app import ctl
from nbdbackupd.app.verbs import log as verb
from nbdbackupd.errors import NotSupportedError, ProcessError, UsageError
from nbdbackupd.ops.status import journal
from nbdbackupd.ops.status.journal import Entry, Query


def matches(query: Query) -> list[str]:
    words = journal.argv(query)
    return words[words.index("--") + 1 :]


def test_what_is_asked_for() -> None:
    assert matches(Query()) == [
        "SYSLOG_IDENTIFIER=nbdbackupctl", "SYSLOG_IDENTIFIER=nbdbackup-hook",
    ]  # fmt: skip
    assert matches(Query(run="r1")) == ["NBDBACKUP_RUN=r1"]
    assert matches(Query(domain="vm 1", run="r1")) == [
        "NBDBACKUP_DOMAIN=vm 1", "NBDBACKUP_RUN=r1", "+",
        "NBDBACKUP_UUID=vm 1", "NBDBACKUP_RUN=r1",
    ]  # fmt: skip
    asked = matches(Query(domain="vm 1"))
    assert asked[:3] == ["NBDBACKUP_DOMAIN=vm 1", "+", "NBDBACKUP_UUID=vm 1"]
    assert r"_SYSTEMD_UNIT=nbdbackup@vm\x201.service" in asked
    assert asked[-2:] == ["+", "SYSLOG_IDENTIFIER=nbdbackup-hook"]
    words = journal.argv(Query(since="-2h", count=7, follow=True))
    assert {"--since=-2h", "--lines=7", "--follow"} < set(words)
    assert "--follow" not in journal.argv(Query())


def record(**fields: Any) -> bytes:
    return json.dumps({"__REALTIME_TIMESTAMP": "1795266361152247", **fields}).encode()


def test_records_become_entries() -> None:
    found = journal.parse(
        record(
            MESSAGE=[104, 105, 255], PRIORITY="3", MESSAGE_ID=events.BACKUP_FAILED.id,
            NBDBACKUP_DOMAIN="vm1", NBDBACKUP_REASON=["first", "second"],
        )
    )  # fmt: skip
    assert found is not None
    assert found.describe() == {
        "version": 1, "time": "2026-11-21T13:06:01.152Z", "priority": 3, "event": "backup-failed",
        "message": "hi\\xff", "fields": {"domain": "vm1", "reason": "first"},
    }  # fmt: skip
    plain = journal.parse(record(MESSAGE=None, _SYSTEMD_UNIT=r"nbdbackup@vm\x202.service"))
    assert plain is not None
    assert (plain.message, plain.priority, plain.event) == ("", 6, "")
    assert plain.fields == {"domain": "vm 2"}
    foreign = journal.parse(record(MESSAGE="x", MESSAGE_ID="f" * 32, PRIORITY="7"))
    assert foreign is not None
    assert foreign.event == ""


def test_lines_of_the_hook_tell_their_domain_in_words() -> None:
    line = record(MESSAGE="domain vm1: let go", SYSLOG_IDENTIFIER="nbdbackup-hook", PRIORITY="4")
    found = journal.parse(line, "vm1")
    assert found is not None
    assert found.fields == {"domain": "vm1"}
    assert journal.parse(line, "vm") is None
    assert journal.parse(line) is not None


@pytest.mark.parametrize(
    "line",
    [b"", b"-- No entries --", b"[]", b"{}", b"7", record(PRIORITY="x"), record(PRIORITY=[])],
)
def test_what_is_no_record_is_left_out(line: bytes) -> None:
    assert journal.parse(line) is None


def test_text_is_harmless_to_a_terminal() -> None:
    entry = Entry(
        time=datetime(2026, 1, 31, 12, tzinfo=UTC), priority=4, message="one \x1b[2J\ntwo",
        fields={"domain": "v\x07m"},
    )  # fmt: skip
    local = entry.time.astimezone()
    head = f"{local:%Y-%m-%d %H:%M:%S %Z}"
    assert verb.render(entry) == f"{head}  warning   v\\x07m  one \\x1b[2J\n    two"


# -- journalctl stood for by a program that does what is to be provoked


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path for a program of that name, the first on PATH, on a host with a journal."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(journal, "JOURNALS", (tmp_path,))
    return place / "journalctl"


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def go_on() -> None:
    pass


def test_records_in_pieces_and_a_last_line_without_end(journalctl: Path) -> None:
    one, two = record(MESSAGE="one").decode(), record(MESSAGE="two").decode()
    program(
        journalctl, f"printf '%s' '{one[:20]}'; sleep 0.3; printf '%s\\n%s\\n' '{one[20:]}' '{two}'"
    )
    assert [each.message for each in journal.read(Query(), go_on)] == ["one", "two"]


def test_failures_of_journalctl(journalctl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(journalctl, "echo 'Failed to parse timestamp: soon' >&2; exit 1")
    with pytest.raises(UsageError, match="--since soon"):
        list(journal.read(Query(since="soon"), go_on))
    program(journalctl, "echo 'No space' >&2; exit 1")
    with pytest.raises(ProcessError, match="No space"):
        list(journal.read(Query(), go_on))
    program(journalctl, "exec sleep 100")
    monkeypatch.setattr(journal, "SILENCE_SECONDS", 0.5)
    with pytest.raises(ProcessError, match=r"said nothing for 0\.5 s"):
        list(journal.read(Query(), go_on))
    program(journalctl, "exec cat /dev/zero")
    monkeypatch.setattr(journal, "MAX_RECORD", 1 << 20)
    with pytest.raises(ProcessError, match="has more than"):
        list(journal.read(Query(), go_on))


def test_a_host_without_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "JOURNALS", (tmp_path / "none",))
    with pytest.raises(NotSupportedError, match="nbdbackupctl log -o DIR"):
        list(journal.read(Query(), go_on))
    assert ctl.main(["log", "vm1"]) == 20
    assert "no systemd journal" in capsys.readouterr().err


# -- a set's own logs


@pytest.fixture
def backup_set(tmp_path: Path) -> Path:
    logs = tmp_path / "set/logs"
    logs.mkdir(parents=True)
    (logs / "20260130T100000-aa.log").write_text(
        "2026-01-30T10:00:00.000Z info     first\n2026-01-30T10:00:01.500Z error    bad\n"
    )
    (logs / "20260131T100000-bb.log").write_bytes(
        b"2026-01-31T10:00:00.000Z warning  odd \xff\nnonsense\n2026-13-31T10:00:00.000Z info  x\n"
    )
    return logs.parent


def test_logs_of_a_set(backup_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(["log", "-o", str(backup_set), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert [(each["message"], each["priority"], each["fields"]["run"]) for each in entries] == [
        ("first", 6, "20260130T100000-aa"),
        ("bad", 3, "20260130T100000-aa"),
        ("odd \\xff", 4, "20260131T100000-bb"),
    ]
    assert entries[1]["time"] == "2026-01-30T10:00:01.500Z"
    for options, wanted in (
        (["-n", "1"], ["odd"]),
        (["--run", "20260130T100000-aa"], ["first", "bad"]),
        (["--since", "2026-01-30T10:00:01Z"], ["bad", "odd"]),
        (["--since", "2026-02-02"], []),
    ):
        assert ctl.main(["log", "-o", str(backup_set), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[-1].split()[0] for line in lines] == wanted, options


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["vm1"], 2, "without DOMAIN and --follow"),
        (["-f"], 2, "without DOMAIN and --follow"),
        (["--since", "yesterday"], 2, "not a time: 'yesterday'"),
        (["--run", "none"], 50, "has no log of run none"),
    ],
)
def test_logs_of_a_set_refuse(
    backup_set: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    assert ctl.main(["log", "-o", str(backup_set), *options]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_is_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(["log", "-o", str(tmp_path / "none")]) == 50
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "none") in line
