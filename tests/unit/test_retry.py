"""What gave way, or found others at work, is tried again (W-7); libvirt's test driver."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd import durable, events, log, rundir
from nbdbackupd.app import ctl
from nbdbackupd.errors import GaveWayError
from nbdbackupd.ops.backup import backup
from nbdbackupd.ops.run import runner
from nbdbackupd.ops.status import record
from nbdbackupd.repo import runs
from nbdbackupd.systemd import units
from nbdbackupd.virt import jobs, same_host
from tests.lib import points

NODE = f"""<node><domain type='test'><name>vm1</name><uuid>{points.UUID}</uuid>
<memory>8192</memory><os><type>hvm</type></os></domain></node>"""
UNIT = "nbdbackup@vm1.service"


class Host:
    """A domain, a configuration, and a run of the domain's unit."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.runtime = root / "run"
        (root / "etc").mkdir()
        (root / "etc/nbdbackup.yaml").write_text(f"repository: {{path: {root / 'repository'}}}")
        (root / "node.xml").write_text(NODE)

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status and standard error."""
        head = ["-c", f"test://{self.root}/node.xml", "--config-dir", str(self.root / "etc")]
        code = ctl.main([*head, "--runtime-dir", str(self.runtime), "run", *words, "vm1"])
        return code, self.capsys.readouterr().err

    def look(self) -> runs.Seen:
        return runs.Runs(self.root / "state").look("vm1", boot=runs.boot_id())

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "state/runs/vm1.json").read_text())
        return found


@pytest.fixture
def host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Host:
    monkeypatch.setenv("NBDBACKUP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(record, "own_unit", lambda: UNIT)
    monkeypatch.setattr(runner, "RETRY_SECONDS", (0.3, 0.3, 0.3))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    # this driver has no files, and can't prove whose they are, and no jobs
    monkeypatch.setattr(same_host, "prove", lambda *_: None)
    monkeypatch.setattr(jobs, "is_migrating", lambda _: False)
    return Host(tmp_path, capsys)


@pytest.fixture
def busy(host: Host) -> Iterator[durable.Lock]:
    """Another run has the domain."""
    folder = rundir.make_domain_dir(host.runtime, points.UUID)
    with durable.Lock(folder / rundir.LOCK, owner="somebody") as lock:
        yield lock


@pytest.mark.usefixtures("busy")
def test_w7_all_tries_are_used_up(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    begun = time.monotonic()
    with caplog.at_level(logging.INFO):
        code, err = host.run("--retry", "--wait", "0")
    assert code == 75
    told = [vars(each).get(log.MESSAGE_ID) for each in caplog.records]
    assert told.count(events.BACKUP_AGAIN.id) == 3
    assert time.monotonic() - begun >= 0.9
    # only the last one is told, and it is a failure
    assert err.count("somebody") == 1
    seen = host.look()
    assert (seen.end, seen.alive) == (seen.failure, ())
    assert seen.failure is not None
    assert (seen.failure.status, seen.failure.unit, seen.failure.again) == (75, UNIT, "")
    assert "somebody" in seen.failure.reason


@pytest.mark.usefixtures("busy")
def test_w7_by_hand_there_is_one_try(host: Host) -> None:
    code, err = host.run("--wait", "0")
    assert code == 75, err


def test_w7_a_run_that_waits_is_shown_and_goes_on(
    host: Host, busy: durable.Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", (2.0,))
    waiting: list[str] = []

    def look() -> None:
        path = host.runtime / rundir.DOING / UNIT
        until = time.monotonic() + 20
        while time.monotonic() < until and not waiting:
            text = path.read_text() if path.exists() else ""
            if text.startswith("tried again at "):
                waiting.append(text)
                end = host.document()["end"]
                waiting.append(f"{end['result']} {end['again'] > end['ended']}")
                busy.__exit__(None, None, None)
            time.sleep(0.02)

    looker = threading.Thread(target=look)
    looker.start()
    code, _ = host.run("--retry", "--wait", "0")
    looker.join()
    assert len(waiting) == 2
    assert "somebody" in waiting[0]
    assert waiting[1] == "busy True"
    # it went on; that this driver can't be backed up is another matter
    assert code not in (0, 75)
    assert host.document()["end"]["status"] == code
    assert not (host.runtime / rundir.DOING / UNIT).exists()


def test_w7_who_gave_way_is_not_asked_twice(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def gives_way(*_: object, cancelled: Any, **__: object) -> None:
        tries.append(1)
        if len(tries) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        cancelled()
        raise GaveWayError("once more")

    monkeypatch.setattr(backup, "run", gives_way)
    code, err = host.run("--retry")
    assert (code, len(tries)) == (75, 4)
    assert "once more" in err


@pytest.mark.usefixtures("busy")
def test_w7_told_to_end_while_it_waits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", (60.0,))
    monkeypatch.setattr(units, "is_stopping", lambda: True)
    doing = record.RunRecord.doing

    def told(self: record.RunRecord, text: str) -> None:
        doing(self, text)
        if text.startswith("tried again at "):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(record.RunRecord, "doing", told)
    code, _ = host.run("--retry", "--wait", "0")
    assert code == 143
    seen = host.look()
    assert seen.failure is not None
    assert seen.failure.reason == "the host was going down"
    # hooks/catch-up finds it at the next boot
    assert (host.root / "state/begun" / UNIT).exists()


def test_w6_a_run_that_was_killed_is_told_by_its_unit(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ExecStopPost= of the unit: with systemd's word for it, also to Prometheus."""
    folder = host.root / "metrics"
    folder.mkdir()
    (host.root / "etc/nbdbackup.yaml").write_text(f"monitoring: {{metrics_directory: {folder}}}")
    known = runs.Runs(host.root / "state")
    now = record.stamp(datetime.now(UTC))
    run = runs.Begun(ident=UNIT, domain="vm1", host="here", boot=runs.boot_id(), begun=now)
    with known.living(run) as living:
        living.is_unfinished = True
    monkeypatch.setenv("SERVICE_RESULT", "oom-kill")
    monkeypatch.setenv("EXIT_STATUS", "KILL")
    head = ["-c", f"test://{host.root}/node.xml", "--config-dir", str(host.root / "etc")]
    ctl.main([*head, "--runtime-dir", str(host.runtime), "abort", "vm1"])
    failure = host.look().failure
    assert failure is not None
    assert failure.reason == "it was ended because memory ran out"
    (text,) = (path.read_text() for path in folder.iterdir())
    assert 'nbdbackup_last_run_exit_status{domain="vm1"} 137\n' in text
    assert 'nbdbackup_failed_runs_total{domain="vm1"} 1\n' in text


def test_w6_a_configuration_that_is_broken(host: Host) -> None:
    (host.root / "etc/nbdbackup.yaml").write_text("x: [")
    code, _ = host.run()
    assert code == 10
    failure = host.look().failure
    assert failure is not None
    assert (failure.status, "nbdbackup.yaml:" in failure.reason) == (10, True)


def test_w6_a_state_directory_that_is_full_stops_no_backup(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(durable, "write_all", full)
    code, err = host.run("--dry-run")
    assert (code, err) == (0, "")
    code, err = host.run()
    assert "this run is not noted: can't write " in err
    assert code not in (0, 1)
