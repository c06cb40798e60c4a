"""Log lines on a stream and in a file."""

import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from nbdbackupd import log
from nbdbackupd.errors import RepositoryError

logger = logging.getLogger("nbdbackupd.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger(log.ROOT)
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_terminal_gets_the_level_only_from_warnings_up() -> None:
    stream = io.StringIO()
    log.setup(logging.DEBUG, stream)
    log.setup(logging.INFO, stream)
    logger.info("saved %s", "vda")
    logger.debug("detail")
    logger.warning("slow")
    assert stream.getvalue() == "saved vda\nwarning: slow\n"


def stream_id(stream: TextIO) -> str:
    status = os.fstat(stream.fileno())
    return f"{status.st_dev}:{status.st_ino}"


def test_journal_gets_a_priority_and_one_line_each(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+", encoding="utf-8") as stream:
        log.setup(logging.DEBUG, stream, stream_id(stream))
        logger.error("one\ntwo")
        logger.info("three")
        logger.debug("four")
        stream.seek(0)
        assert stream.read() == "<3>one\\ntwo\n<6>three\n<7>four\n"


@pytest.mark.parametrize("value", ["", "1:2", "nonsense"])
def test_foreign_journal_stream_is_ignored(tmp_path: Path, value: str) -> None:
    with (tmp_path / "file").open("w+", encoding="utf-8") as stream:
        log.setup(logging.INFO, stream, value)
        logger.info("plain")
        stream.seek(0)
        assert stream.read() == "plain\n"


@pytest.mark.parametrize(
    "name", ["message", "Disk", "MESSAGE", "PRIORITY", "LOGGER", "_PID", "PASSWORD", "X" * 65, "Ä"]
)
def test_fields_refuse(name: str) -> None:
    with pytest.raises(ValueError, match="log field"):
        log.fields(**{name: 1})


def test_fields_pass_through_logging() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment,method-assign]
    logger.addHandler(handler)
    try:
        logger.warning("x", extra=log.fields(DISK="vda", BYTES=5))
    finally:
        logger.removeHandler(handler)
    assert records[0].__dict__["BYTES"] == 5


def test_run_log_has_utc_stamps_and_ends_with_the_block(tmp_path: Path) -> None:
    log.setup(logging.ERROR, io.StringIO())
    path = tmp_path / "logs" / "run.log"
    with log.run_log(path):
        logger.info("first\nsecond \udcff")
    logger.info("outside")
    (line,) = path.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(stamp + r" info     first\\nsecond \\xff", line)
    assert path.stat().st_mode & 0o777 == 0o600


def test_secrets_are_hidden_everywhere(tmp_path: Path) -> None:
    stream = io.StringIO()
    log.setup(logging.INFO, stream)
    with log.run_log(tmp_path / "log"), log.hidden("hunter2", ""):
        logger.info("connect with %s", "hunter2")
        try:
            raise ValueError("bad hunter2")
        except ValueError:
            logger.exception("failed")
    assert "hunter2" not in stream.getvalue() + (tmp_path / "log").read_text()
    assert "********" in stream.getvalue()


def test_full_disk_costs_the_log_not_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    log.setup(logging.INFO, stream)
    with pytest.raises(RepositoryError, match="run's log"), log.run_log(Path("/dev/null/x")):
        pass
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    with pytest.raises(RepositoryError, match="run's log"), log.run_log(path):
        pass
    with log.run_log(Path("/dev/full")):
        logger.info("lost")
        logger.info("lost, too")
    assert stream.getvalue().splitlines()[-1].startswith("warning: the run's log /dev/full is inc")


def test_warnings_are_remembered_whoever_is_shown_them() -> None:
    """W-1: what was warned of decides the exit status, also with ``--quiet``."""
    stream = io.StringIO()
    log.setup(logging.ERROR, stream)
    logging.getLogger("nbdbackupd.any").info("fine")
    assert log.warned() == ()
    logging.getLogger("nbdbackupd.any").warning("disk %s is odd", "vda")
    assert log.warned() == ("disk vda is odd",)
    assert not stream.getvalue()
    log.to_journal(stream, lambda *_, **__: None)
    logging.getLogger("nbdbackupd.any").error("worse")
    assert log.warned() == ("disk vda is odd", "worse")
    log.setup(logging.ERROR, stream)
    assert log.warned() == ()
