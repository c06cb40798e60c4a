"""What comes from outside reaches a terminal, a log, a mail escaped (S-5)."""

import io
import json
import logging
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from nbdbackupd import log, plain
from nbdbackupd.app import asking, context, streams, tables
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import check
from nbdbackupd.errors import FormatError
from nbdbackupd.format import manifest, stream
from nbdbackupd.ops.notify import notification
from nbdbackupd.repo.virtnbdbackup import peer
from nbdbackupd.systemd import units
from tests.lib import points

EVIL = "a\x1b[2J\nwarning: b\r\x07\x9b31m\u202ec\u200bd\ud800-\udcff\u2028e\x00"
SHOWN = r"a\x1b[2J\nwarning: b\r\x07\x9b31m\u202ec\u200bd\ud800-\xff\u2028e\x00"


DISK = points.disk_point("vda", "vda.full.data", b"data", b"index")


def harmless(text: str) -> bool:
    return all(char == "\n" or char.isprintable() for char in text)


def test_each_character_is_shown_by_its_number() -> None:
    assert plain.line(EVIL) == SHOWN
    assert plain.lines(EVIL) == SHOWN.replace(r"J\n", "J\n")
    for text in ("", "vm 1", "Größe", "数据库", "a\\x1b"):
        assert plain.line(text) == plain.lines(text) == text
    for number in range(0x3000):
        char = chr(number)
        assert plain.line(char) == char or plain.line(char).isascii()
        assert plain.line(char).isprintable()


def test_reports_and_complaints(capsys: pytest.CaptureFixture[str]) -> None:
    context = Context.from_args(Namespace())
    context.show({}, f"restored {EVIL}")
    streams.complain(EVIL)
    out, err = capsys.readouterr()
    assert harmless(out + err)
    assert err == f"nbdbackupctl: {SHOWN}\n"
    with_json = Context.from_args(Namespace(json=True))
    with_json.show({"name": EVIL}, "")
    text = capsys.readouterr().out
    assert harmless(text)
    assert json.loads(text) == {"name": EVIL}


def test_log_lines(tmp_path: Path) -> None:
    """A message is one line everywhere; a traceback keeps its lines."""
    logger = logging.getLogger("nbdbackupd.test")
    terminal = io.StringIO()
    sent: list[str] = []
    log.setup(logging.INFO, terminal)
    try:
        with log.run_log(tmp_path / "logs" / "a.log"):
            logger.warning("disk %s", EVIL)
            try:
                raise ValueError(EVIL)
            except ValueError:
                logger.exception("bad")
        log.to_journal(terminal, lambda message, **_: sent.append(message))
        logger.warning("disk %s", EVIL)
    finally:
        log.setup(logging.CRITICAL, sys.stderr)
    texts = [terminal.getvalue(), (tmp_path / "logs" / "a.log").read_text(), *sent]
    assert all(map(harmless, texts))
    assert f"warning: disk {SHOWN}\n" in terminal.getvalue()
    assert "\nwarning: b" not in terminal.getvalue().partition("Traceback")[0]
    assert sent == [f"disk {SHOWN}"]


def test_progress_tables_questions_and_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    with context.Progress(shown, "plain") as bar:
        bar._disk = EVIL
        bar._show(bar._text(1, 2, 1, 1.0))
    assert harmless(shown.getvalue())
    assert all(map(harmless, tables.render([(EVIL, EVIL)])))
    assert harmless("\n".join(check._fold(EVIL)))

    answers = (tmp_path / "answer").open("w+")
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr(sys, "stderr", asked := io.StringIO())
    with pytest.raises(Exception, match="refused"):
        asking.ask("This will be overwritten", (EVIL,), "refused", lambda: None)
    answers.close()
    assert harmless(asked.getvalue())
    assert harmless(units._clean(EVIL))


def test_mail() -> None:
    notice = notification.Notice(
        event="failure", unit="u", domain=EVIL, host="h", what=EVIL, result="r", meaning="",
        started="", ended="", lines=(EVIL,), remark=EVIL,
    )  # fmt: skip
    text = notification._fill(notification.DEFAULT, notice)
    assert harmless(text.body)
    assert text.subject.isprintable()


@pytest.mark.parametrize("char", ["\x1b", "\n", "\r", "\x7f", "\x85", "\x9b", "\x00"])
@pytest.mark.parametrize("member", ["id", "domain", "uuid", "chain", "target", "format", "file"])
def test_a_manifest_with_control_characters_is_refused(member: str, char: str) -> None:
    document = json.loads(manifest.pack(points.full_point(disks=(DISK,))))
    where = document["disks"][0] if member in ("target", "format", "file") else document
    where[member] += char
    document["digest"] = manifest._digest(document)
    with pytest.raises(FormatError, match=r"control characters|stand for nothing") as caught:
        manifest.parse(manifest._canonical(document))
    assert caught.value.message.isprintable()


def test_names_that_people_have_are_read() -> None:
    """Joiners and directions are part of real names; a tab is taken by libvirt."""
    for name in ("\u0646\u200c\u0627", "a\tb", "\U0001f469\u200d\U0001f4bb"):
        document = json.loads(manifest.pack(points.full_point(disks=(DISK,))))
        document["domain"] = name
        document["digest"] = manifest._digest(document)
        assert manifest.parse(manifest._canonical(document)).domain == name


@pytest.mark.parametrize("member", ["diskName", "diskFormat", "checkpointName"])
def test_a_stream_of_a_peer_with_control_characters_is_refused(member: str) -> None:
    meta = stream.StreamMeta(
        virtual_size=1, data_size=1, date="d", disk_name="vda", disk_format="raw",
        checkpoint="c", compression=None, parent_checkpoint="", incremental=False,
    )  # fmt: skip
    document = meta.to_json() | {member: "a\x1b[2J"}
    with pytest.raises(FormatError, match="control characters"):
        stream.parse_meta(json.dumps(document).encode())


def test_xml_of_a_peer_with_control_characters_is_refused() -> None:
    for inner in (
        "<name>a&#10;b</name>",
        "<name>a</name><devices><disk><target dev='v&#13;a'/></disk></devices>",
    ):
        with pytest.raises(FormatError, match="control characters"):
            peer.parse_config(f"<domain>{inner}</domain>".encode())
