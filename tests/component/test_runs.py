"""How runs ended: remembered whoever ran, and whatever ended them (W-6)."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.repo import runs
from nbdbackupd.repo.runs import Begun, End, Runs
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

BOOT = "0d6c1f5e-0000-4000-8000-00000000000a"
OTHER = "0d6c1f5e-0000-4000-8000-00000000000b"
UNIT = "nbdbackup@vm1.service"


def at(minute: int) -> str:
    return f"2026-02-10T12:{minute:02}:00.000000Z"


def begun(minute: int, ident: str = UNIT, boot: str = BOOT) -> Begun:
    return Begun(ident=ident, domain="vm1", host="here", boot=boot, begun=at(minute))


def end(minute: int, result: str, **more: str) -> End:
    status = {runs.SAVED: 0, runs.BUSY: 75}.get(result, 50)
    return End(
        domain="vm1", unit=UNIT, host="here", begun=at(minute), ended=at(minute + 1),
        result=result, status=status, **more,
    )  # fmt: skip


@pytest.fixture
def known(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "lib" / "state")


def test_w6_a_failure_stays_until_a_good_end(known: Runs, tmp_path: Path) -> None:
    assert known.look("vm1", boot=BOOT) == runs.Seen()
    failed = end(10, runs.FAILED, reason="No space left on device")
    known.record(failed)
    known.record(end(20, runs.BUSY))
    known.record(end(30, runs.SKIPPED))
    # those that say nothing of the domain's protection hide no failure
    seen = known.look("vm1", boot=BOOT)
    assert seen.failure == failed
    assert seen.end == end(30, runs.SKIPPED)
    # one that began before it does not make it good, one after does; whoever ran
    known.record(replace(end(5, runs.SAVED), unit=""))
    assert known.look("vm1", boot=BOOT).failure == failed
    known.record(replace(end(40, runs.CURRENT), unit=""))
    assert known.look("vm1", boot=OTHER).failure is None
    # what is settled late is in its place
    known.record(end(35, runs.FAILED))
    assert known.look("vm1", boot=BOOT).failure is None
    (path,) = (tmp_path / "lib/state/runs").glob("*.json")
    modes = [each.stat().st_mode & 0o777 for each in (path, path.parent, path.parents[1])]
    assert modes == [0o600, 0o700, 0o700]
    # QEMU must get to scratch space beside it
    assert (tmp_path / "lib").stat().st_mode & 0o777 == 0o755
    assert json.loads(path.read_text())["version"] == 1


def test_w6_names_of_a_domain_count_together(known: Runs) -> None:
    uuid = "5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77"
    failed = replace(end(10, runs.FAILED), domain=uuid)
    known.record(failed)
    assert known.look("vm1", uuid, boot=BOOT).failure == failed
    known.record(end(20, runs.SAVED))
    assert known.look("vm1", uuid, boot=BOOT).failure is None
    assert known.look("vm1", "", boot=BOOT).end == end(20, runs.SAVED)


def test_w6_a_run_lives_as_long_as_its_block(known: Runs, tmp_path: Path) -> None:
    with known.living(begun(10)) as living:
        assert known.look("vm1", boot=BOOT).alive == (begun(10),)
        assert known.settle("vm1", boot=BOOT) == ()
        living.end(ended=at(11), result=runs.FAILED, status=20, reason="no\n  such thing")
        # its own word counts, not that it is about to go
    seen = known.look("vm1", boot=BOOT)
    assert (seen.alive, seen.end and seen.end.reason) == ((), "no such thing")
    assert list((tmp_path / "lib/state/begun").iterdir()) == []


def test_w6_what_the_host_cut_short_is_noted_for_the_next_boot(known: Runs, tmp_path: Path) -> None:
    note = tmp_path / "lib/state/begun" / UNIT
    with known.living(begun(10)) as living:
        living.end(ended=at(11), result=runs.FAILED, status=143, reason="the host was going down")
        living.is_unfinished = True
    assert note.exists()
    seen = known.look("vm1", boot=OTHER)
    assert seen.failure is not None
    assert seen.failure.reason == "the host was going down"
    for tries in (1, 2, 3):
        boot = f"boot {tries}"
        with known.living(begun(20 + tries, boot=boot)) as living:
            assert living.run.tries == tries
            living.is_unfinished = True
        seen = known.look("vm1", boot=OTHER)
        assert seen.failure is not None
        assert (seen.failure.reason, seen.failure.status) == (runs.HOST_ENDED, None)
    # as often as that is enough; the failure stays
    (settled,) = known.settle("vm1", boot=OTHER)
    assert settled.begun == at(23)
    assert not note.exists()
    assert known.look("vm1", boot=OTHER).failure == settled


KILLED = """
import sys
from pathlib import Path
from nbdbackupd.repo.runs import Begun, Runs
run = Begun(ident=sys.argv[2], domain="vm1", host="here", boot=sys.argv[3],
            begun="2026-02-10T12:10:00.000000Z")
with Runs(Path(sys.argv[1])).living(run):
    print("lives", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ident", [UNIT, "hand-1"])
def test_w6_kill_9_is_seen_later(known: Runs, tmp_path: Path, ident: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "lib/state", ident, BOOT], cwd=TOP,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "lives\n"
        assert [each.ident for each in known.look("vm1", boot=BOOT).alive] == [ident]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    seen = known.look("vm1", boot=BOOT)
    assert seen.failure is not None
    assert (seen.alive, seen.failure.reason) == ((), runs.KILLED)
    # systemd's word, which ExecStopPost= has, is better than ours
    (settled,) = known.settle("vm1", boot=BOOT, reason="it was ended because memory ran out")
    seen = known.look("vm1", boot=BOOT)
    assert seen.failure == settled
    assert "memory" in settled.reason
    assert os.listdir(tmp_path / "lib/state/begun") == []  # noqa: PTH208 - names are enough


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": 2}', '{"version": 1, "end": {"domain": 5}}', "[" * 99999]
)
def test_a_record_that_is_damaged_is_passed_over(known: Runs, tmp_path: Path, text: str) -> None:
    for folder in ("runs", "begun"):
        (tmp_path / "lib/state" / folder).mkdir(parents=True)
    (tmp_path / "lib/state/runs/vm1.json").write_text(text)
    (tmp_path / "lib/state/begun" / UNIT).write_text(text)
    assert known.look("vm1", boot=BOOT) == runs.Seen()
    with known.living(begun(10)) as living:
        living.end(ended=at(11), result=runs.SAVED, status=0, reason="")
    assert known.look("vm1", boot=BOOT).end is not None


def test_a_record_that_is_no_file(known: Runs, tmp_path: Path) -> None:
    (tmp_path / "lib/state/runs").mkdir(parents=True)
    os.mkfifo(tmp_path / "lib/state/runs/vm1.json")
    assert known.look("vm1", boot=BOOT) == runs.Seen()
