"""Events: sent to the journal with their fields, each of them used, described once for all."""

import ast
import io
import logging
import os
import re
import socket
import string
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest

from nbdbackupd import events, log, threads
from nbdbackupd.app import ctl
from nbdbackupd.app.context import Context
from nbdbackupd.errors import BusyError, DomainError, GaveWayError, Interrupted
from nbdbackupd.events import ALL, Event
from nbdbackupd.ops.backup import outcome
from nbdbackupd.ops.domain import endings
from scripts import gen_events, generated
from tests.lib.pages import TOP

logger = logging.getLogger("nbdbackupd.test")
CATALOG: Final = TOP / "packaging/common/nbdbackup.catalog"


class Journal:
    """A sender that keeps what it gets; it fails as long as ``broken`` is set."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.broken = False

    def send(self, message: str, **fields: Any) -> int:
        if self.broken:
            raise OSError(111, "refused")
        self.records.append({"MESSAGE": message, **fields})
        return 0


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger(log.ROOT)
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@contextmanager
def journal(level: int = logging.WARNING) -> Iterator[tuple[Journal, socket.socket]]:
    """A journal in the place of standard error: its sender, and the stream's other end."""
    here, there = socket.socketpair()
    there.settimeout(10)
    fake = Journal()
    with here, there, here.makefile("w", buffering=1) as stream:
        status = os.fstat(stream.fileno())
        log.setup(level, stream, f"{status.st_dev}:{status.st_ino}", send=fake.send)
        yield fake, there


def test_an_event_comes_with_its_fields_and_those_of_the_run() -> None:
    with journal() as (fake, _), log.context(DOMAIN="vm 1", UUID="u", RUN="r", SET=Path("/set")):
        events.emit(logger, events.DISK_DEMOTED, disk="vda", reason="no bitmap")
        logger.warning("plain", extra=log.fields(BYTES=5))
    demoted, plain = fake.records
    assert demoted["MESSAGE"] == "disk vda is read in full: no bitmap"
    assert demoted["MESSAGE_ID"] == events.DISK_DEMOTED.id
    assert demoted["PRIORITY"] == "4"
    assert demoted["SYSLOG_IDENTIFIER"] == "nbdbackupctl"
    assert demoted["CODE_FILE"] == __file__
    own = {name: value for name, value in demoted.items() if name.startswith("NBDBACKUP_")}
    assert own == {
        "NBDBACKUP_DOMAIN": "vm 1",
        "NBDBACKUP_UUID": "u",
        "NBDBACKUP_RUN": "r",
        "NBDBACKUP_SET": "/set",
        "NBDBACKUP_DISK": "vda",
        "NBDBACKUP_REASON": "no bitmap",
    }
    assert plain["NBDBACKUP_BYTES"] == "5"
    assert plain["NBDBACKUP_RUN"] == "r"
    assert "MESSAGE_ID" not in plain


def test_context_ends_with_its_block_and_blocks_nest() -> None:
    with log.context(DOMAIN="a", RUN="r"):
        with log.context(DOMAIN="b"):
            assert log.present() == {"DOMAIN": "b", "RUN": "r"}
        assert log.present() == {"DOMAIN": "a", "RUN": "r"}
    assert log.present() == {}
    with pytest.raises(ValueError, match="reserved"), log.context(MESSAGE="x"):
        pass


def test_threads_speak_in_the_context_of_their_run() -> None:
    def say() -> None:
        logger.warning("from a thread")

    with journal() as (fake, _), log.context(RUN="r7"):
        threads.Threads(lambda: None).run({"one": say, "two": say})
        timer = threading.Timer(0, log.carried(say))
        timer.start()
        timer.join(10)
    assert [each["NBDBACKUP_RUN"] for each in fake.records] == ["r7"] * 3
    assert {"one", "two"} < {each["THREAD_NAME"] for each in fake.records}


@pytest.mark.parametrize(("level", "count"), [(logging.ERROR, 3), (logging.DEBUG, 4)])
def test_the_journal_gets_what_the_run_tells_whatever_is_asked_for(level: int, count: int) -> None:
    with journal(level) as (fake, _):
        logger.debug("detail")
        logger.info("told")
        events.emit(logger, events.BACKUP_SKIPPED, reason="x")
        events.emit(logger, events.BACKUP_FAILED, reason="y", duration_usec=events.usec(1.5))
    assert len(fake.records) == count
    assert fake.records[-1]["PRIORITY"] == "3"
    assert fake.records[-1]["NBDBACKUP_DURATION_USEC"] == "1500000"


def test_what_cant_be_sent_is_a_line_on_the_stream() -> None:
    with journal() as (fake, there):
        fake.broken = True
        logger.warning("one\ntwo")
        events.emit(logger, events.SCRATCH_LOW, reason="full", bytes=1)
        fake.broken = False
        logger.warning("again")
        # a stream socket, and all has been written: one receive gets it
        got = there.recv(1000).decode()
    assert got == "<4>one\\ntwo\n<3>scratch space is filling up, the job is ended: full\n"
    assert [each["MESSAGE"] for each in fake.records] == ["again"]


def test_secrets_and_odd_bytes() -> None:
    with journal() as (fake, _), log.hidden("hunter2"), log.context(DOMAIN="x hunter2"):
        events.emit(logger, events.BACKUP_SKIPPED, reason="said hunter2 \udcff")
        try:
            raise ValueError("bad hunter2")
        except ValueError:
            logger.exception("failed with %s", "hunter2")
    assert "hunter2" not in repr(fake.records)
    assert fake.records[0]["NBDBACKUP_REASON"] == "said ******** \\udcff"
    assert "ValueError: bad ********" in fake.records[1]["MESSAGE"]


def test_a_program_that_libvirt_s_hook_calls_tells_the_journal() -> None:
    fake, stream = Journal(), io.StringIO()
    log.setup(logging.ERROR, stream)
    assert log.to_journal(stream, fake.send)
    with log.context(DOMAIN="vm 1"):
        events.emit(logger, events.IMAGES_RELEASED, reason="r", duration_usec=5)
        logger.debug("detail")
        fake.broken = True
        events.emit(logger, events.IMAGES_HELD, reason="h")
    (told,) = fake.records
    assert told["MESSAGE_ID"] == events.IMAGES_RELEASED.id
    assert told["NBDBACKUP_DOMAIN"] == "vm 1"
    # nobody listens: rather there than nowhere
    assert stream.getvalue() == "<3>images of vm 1 are still held, its start may fail: h\n"


def test_empty_fields_are_left_out_and_unknown_ones_are_no_reason_to_fail() -> None:
    with journal() as (fake, _):
        events.emit(
            logger, events.BACKUP_COMMITTED,
            point="p", level="copy", checkpoint="", bytes=0, duration_usec=1,
        )  # fmt: skip
    assert "NBDBACKUP_CHECKPOINT" not in fake.records[0]
    assert fake.records[0]["NBDBACKUP_BYTES"] == "0"
    assert fake.records[0]["MESSAGE"] == "restore point p of ? is committed: copy, 0 bytes"


def test_a_terminal_hears_what_the_command_does_not_say_itself() -> None:
    stream = io.StringIO()
    log.setup(logging.WARNING, stream)
    events.emit(logger, events.BACKUP_FAILED, reason="x", duration_usec=1)
    events.emit(logger, events.DISK_DEMOTED, disk="vda", reason="{DISK} %s")
    assert stream.getvalue() == "warning: disk vda is read in full: {DISK} %s\n"


def test_events_take_their_own_fields_only() -> None:
    with pytest.raises(ValueError, match="event disk-demoted has fields"):
        events.emit(logger, events.DISK_DEMOTED, disk="vda")
    with pytest.raises(ValueError, match="event disk-demoted has fields"):
        events.emit(logger, events.DISK_DEMOTED, disk="vda", reason="x", bytes=1)


@pytest.mark.parametrize("is_journal", [True, False])
def test_a_report_that_is_logged_is_in_the_journal_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_journal: bool
) -> None:
    context = Context.from_args(Namespace())
    with (tmp_path / "out").open("w") as out, redirect_stdout(out):
        status = os.fstat(out.fileno())
        inode = status.st_ino if is_journal else status.st_ino + 1
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{inode}")
        context.show({}, "nothing saved", is_logged=True)
        context.show({}, "the rest")
    said = (tmp_path / "out").read_text().splitlines()
    assert said == ["nothing saved", "the rest"][is_journal:]


@pytest.mark.parametrize(("is_journal", "head"), [(True, "<3>"), (False, "")])
def test_the_last_line_of_a_failure_is_an_error_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_journal: bool, head: str
) -> None:
    with (tmp_path / "stderr").open("w+", encoding="utf-8") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        inode = status.st_ino if is_journal else status.st_ino + 1
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{inode}")
        assert ctl.main(["verify", str(tmp_path / "none")]) == 50
        stream.seek(0)
        *_, last = stream.read().splitlines()
    assert last.startswith(f"{head}nbdbackupctl: ")


# -- the table of events


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Every call in the package that names an event."""
    for path in sorted((TOP / "nbdbackupd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("emit"):
                yield path, node


def constants() -> dict[str, Event]:
    return {name: value for name, value in vars(events).items() if isinstance(value, Event)}


def test_every_event_is_used() -> None:
    """Named somewhere outside the table, in code that the tests of layers and system run."""
    used = set()
    for path in (TOP / "nbdbackupd").rglob("*.py"):
        if path.name != "events.py":
            used |= set(re.findall(r"\bevents\.([A-Z][A-Z_]+)\b", path.read_text()))
    hook = (TOP / "hooks/qemu").read_text()
    used |= {name for name, event in constants().items() if event.id in hook}
    assert set(constants()) - used == set()


def test_every_event_is_provoked_by_a_test() -> None:
    """By one that names it, and so looks whether it is told."""
    texts = [
        path.read_text()
        for path in (TOP / "tests").rglob("test_*.py")
        if path.name not in {"test_events.py", "test_log_verb.py"}
    ]
    missing = {
        event.name
        for name, event in constants().items()
        if not any(re.search(rf'"{event.name}"|{event.id}|\b{name}\b', text) for text in texts)
    }
    assert missing == set()


def test_every_call_gives_the_fields_of_its_event() -> None:
    known = constants()
    checked = 0
    for path, call in calls():
        name = ast.unparse(call.args[1]) if len(call.args) > 1 else ""
        event = known.get(name.removeprefix("events."))
        if event is None or any(each.arg is None for each in call.keywords):
            continue
        given = {str(each.arg).upper() for each in call.keywords}
        assert given == set(event.fields), f"{path}:{call.lineno}"
        checked += 1
    assert checked > 10


def test_ids_and_names_are_unlike() -> None:
    assert len(ALL) == len(constants())
    assert len({event.id for event in ALL}) == len({event.name for event in ALL}) == len(ALL)
    for event in ALL:
        assert UUID(event.id).version == 4
        assert UUID(event.id).hex == event.id
        assert f"{event.name.replace('-', '_').upper()}" in constants()
        assert 2 <= event.priority <= 6


def test_texts_name_fields_that_are_there() -> None:
    for event in ALL:
        assert set(event.fields) <= set(events.FIELDS)
        log.fields(**dict.fromkeys(event.fields))
        for text in (event.text, event.meaning, event.cure):
            named = {name for _, name, _, _ in string.Formatter().parse(text) if name}
            assert named <= {*event.fields, *events.CONTEXT}, event.name
        assert event.meaning.endswith(".")
        assert event.cure.endswith(".")


# -- what is made of it


def test_generated_files_are_current() -> None:
    assert generated.stale(gen_events.generated()) == [], "run scripts/gen-events"


def test_catalogue_says_what_the_table_says() -> None:
    entries = re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]
    assert [each.split("\n", 1)[0] for each in entries] == [event.id for event in ALL]
    for event, entry in zip(ALL, entries, strict=True):
        head, _, body = entry.partition("\n\n")
        assert re.fullmatch(
            r"[0-9a-f]{32}\nSubject: \S.*\nDefined-By: nbdbackupd\nDocumentation: \S+", head
        )
        words = " ".join(body.split())
        for text in (event.meaning, event.cure):
            assert re.sub(r"\{(\w+)\}", r"@NBDBACKUP_\1@", text) in words
        assert max(map(len, body.split("\n"))) <= 78


# -- how runs end


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (DomainError("gone"), events.BACKUP_FAILED),
        (BusyError("locked"), events.BACKUP_BUSY),
        (GaveWayError("starts"), events.BACKUP_GAVE_WAY),
        (Interrupted(15), events.BACKUP_FAILED),
        (ValueError(), events.BACKUP_FAILED),
    ],
)
def test_an_ending_is_told_once_where_it_is_seen_first(error: BaseException, event: Event) -> None:
    outer = endings.Ending(logger, outcome.event_of)
    inner = endings.Ending(logger, outcome.event_of)
    with journal() as (fake, _):
        with pytest.raises(type(error)), outer.told(), log.context(RUN="r"), inner.told():
            raise error
        with pytest.raises(KeyError), outer.told():
            raise KeyError("another")
    first, second = fake.records
    assert first["MESSAGE_ID"] == event.id
    assert first["NBDBACKUP_RUN"] == "r"
    assert first["NBDBACKUP_REASON"] == (str(error) or "ValueError")
    assert second["MESSAGE_ID"] == events.BACKUP_FAILED.id
    assert "NBDBACKUP_RUN" not in second
