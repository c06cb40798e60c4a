"""Runs that are asked to end, and runs that meet: nothing is left, nobody waits for ever."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lab.process import wait_until
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness, wait_for_job

pytestmark = pytest.mark.system

DISKS = (DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=16 * MIB))
SLOW = "SLOW1.5@block-written#2"
"""Makes a copy of some seconds."""

SOON = 30.0
"""What is "at once" in seconds on a machine that has other things to do."""

MOMENTS = [
    "TERM@leftovers-swept#1",
    "INT@run-noted#1",
    "HUP@scratch-prepared#1",
    "TERM@job-begun#1",
    "INT+@job-begun#1",
    "HUP@metadata-collected#1",
    "TERM+@block-written#2",
    "INT@stream-finished#1",
    "HUP@job-aborted#1",
]


@pytest.fixture(scope="module")
def guest(lab: DaemonLab) -> Guest:
    guest = lab.guest("vm 1", DISKS)
    guest.start()
    return guest


def exit_code(fault: str) -> int:
    return 128 + signal.Signals[f"SIG{fault.partition('@')[0].rstrip('+')}"]


def test_interrupted_at_each_step(witness: Witness, ctl: RiggedCtl) -> None:
    for level in ("full", "inc"):
        before = witness.points()
        for fault in MOMENTS:
            witness.change()
            with ctl.rigged(fault):
                result = witness.run("-l", level, code=exit_code(fault))
            assert result.json["error"]["kind"] == "Interrupted"
            assert len(result.stderr.splitlines()) == 1, result.stderr
            assert witness.points() == before
            witness.assert_clean()
        assert witness.run("-l", level).json["point"]["warnings"] == []
        witness.assert_clean()
    witness.check_all()


def test_too_late_to_be_interrupted(witness: Witness, ctl: RiggedCtl) -> None:
    """The point is as good as made: the run ends well."""
    with ctl.rigged("TERM@point-published#1"):
        witness.run("-l", "full")
    with ctl.rigged("TERM+@point-published#1"):
        witness.run("-l", "inc")
    assert len(witness.points()) == 2
    witness.assert_clean()
    witness.check_all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_from_outside(
    witness: Witness, guest: Guest, ctl: RiggedCtl, number: signal.Signals
) -> None:
    with ctl.rigged(SLOW), ctl.start("backup", guest.name, "-o", witness.path) as process:
        wait_for_job(guest)
        guest.write("vda", 0, MIB, 5)  # its old content is in the scratch file now
        time.sleep(0.5)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(number)
        time.sleep(0.1)  # two at once would be seen in the order of their numbers
        process.send_signal(signal.SIGINT)  # an impatient user; cleaning up goes on
        stdout, stderr = process.communicate(timeout=60)
        assert time.monotonic() - begun < SOON
    assert process.returncode == 128 + number
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    witness.assert_clean()
    witness.run()
    witness.check_all()


def started(process: "subprocess.Popen[str]", guest: Guest) -> None:
    wait_for_job(guest)
    assert process.poll() is None


def test_second_run_is_refused_at_once(
    witness: Witness, guest: Guest, ctl: RiggedCtl, tmp_path: Path
) -> None:
    references = witness.take()
    with ctl.rigged(SLOW):
        first = ctl.start("backup", guest.name, "-o", witness.path, "--json")
        with first as process:
            ctl.faults = ()
            started(process, guest)
            for path in (witness.path, tmp_path / "another"):
                begun = time.monotonic()
                refused = ctl("backup", guest.name, "-o", path, "--json", code=75)
                assert time.monotonic() - begun < SOON
                assert f"process {process.pid} (backup of vm 1, run " in refused.stderr
                assert refused.json["error"]["kind"] == "BusyError"
            assert not (tmp_path / "another").exists()
            stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    witness.note(references)
    assert json.loads(stdout)["point"]["id"] == witness.points()[0]["id"]
    witness.assert_clean()
    witness.check_all()


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler of a signal by now: on a busy machine that takes seconds."""
    found = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (signum - 1) & 1)


def test_second_run_waits_if_asked_to(witness: Witness, guest: Guest, ctl: RiggedCtl) -> None:
    references = witness.take()
    with ctl.rigged(SLOW):
        first = ctl.start("backup", guest.name, "-o", witness.path)
        with first as process:
            ctl.faults = ()
            started(process, guest)
            begun = time.monotonic()
            ctl("backup", guest.name, "-o", witness.path, "--wait", "0.5", code=75)
            assert time.monotonic() - begun > 0.5
            # a run that waits can be told to end, too
            options = ("-o", witness.path, "--wait", "50")
            with ctl.start("backup", guest.name, *options) as waiting:
                wait_until(lambda: catches(waiting.pid, signal.SIGTERM), "a listener", 60)
                time.sleep(0.5)
                assert waiting.poll() is None
                waiting.send_signal(signal.SIGTERM)
                waiting.communicate(timeout=SOON)
            assert waiting.returncode == 128 + signal.SIGTERM
            ctl("backup", guest.name, "-o", witness.path, "-l", "inc", "--wait", "60", "--json")
            assert process.wait(30) == 0
    assert len(witness.points()) == 2
    assert references
    witness.assert_clean()
