"""``--start-paused``: a domain that is off is started for one run, and only for that."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.command import LabError
from tests.lab.compare import first_difference
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.process import wait_until
from tests.lib.scene import Scene, scene

pytestmark = pytest.mark.system
DISKS = (DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=8 * MIB))
MARKER = "started-paused"


@pytest.fixture
def off(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A domain with data that was shut down in order."""
    name = f"vm{abs(hash(request.node.name)) % 100000}"
    with scene(lab, tmp_path, name, DISKS) as here:
        here.guest.write("vda", 0, 3 * MIB, 1)
        here.guest.write("vdb", MIB, MIB, 2)
        here.guest.stop()
        yield here


def state(here: Scene) -> str:
    return here.lab.virsh("domstate", "--domain", here.guest.name).strip()


def marker(here: Scene) -> list[Path]:
    return list(here.ctl.runtime.rglob(MARKER))


def number(here: Scene) -> str:
    return here.lab.virsh("domid", "--domain", here.guest.name).strip()


def write_and_stop(here: Scene, byte: int) -> None:
    """The guest runs, writes and shuts down in order."""
    here.guest.start()
    here.guest.write("vda", byte * 64 * 1024, 64 * 1024, byte)
    here.guest.write_zeroes("vdb", MIB, 128 * 1024, unmap=True)
    here.guest.stop()


def continues(here: Scene, base: str) -> None:
    """The next increments, off and running, are deltas on ``base`` and complete."""
    write_and_stop(here, 0x31)
    saved = here.save("-l", "inc", "-S")
    assert saved.point["parent"] == base
    assert set(saved.modes.values()) == {"delta"}
    here.guest.start()
    here.guest.write("vda", 5 * MIB, 64 * 1024, 0x32)
    assert set(here.save("-l", "inc").modes.values()) == {"delta"}
    here.prove_all()


def test_full_and_increment_of_a_domain_that_is_off(off: Scene) -> None:
    full = off.save("-S", "--freeze", "require")
    assert (full.point["level"], full.point["consistency"]) == ("full", "offline")
    assert state(off) == "shut off"
    assert marker(off) == []
    for target in off.guest.disks:
        # stored in order: a killed QEMU leaves none, or one that is in use
        assert off.bitmaps_off(target) == {full.point["checkpoint"]: ["auto"]}
    continues(off, full.id)


def test_a_guest_that_was_destroyed_is_crash_consistent(off: Scene) -> None:
    off.guest.start()
    off.guest.destroy()
    assert off.save("-S").point["consistency"] == "crash"
    assert state(off) == "shut off"


def test_a_guest_that_runs_is_left_running(off: Scene) -> None:
    off.guest.start()
    before = number(off)
    assert off.save("-S").point["consistency"] == "crash"
    assert (state(off), number(off)) == ("running", before)


@pytest.mark.parametrize("and_suspend", [False, True])
def test_whoever_resumes_it_keeps_it(off: Scene, and_suspend: bool) -> None:
    references = off.references()
    with off.held("-S") as process:
        off.guest.adopt_process()
        assert state(off) == "paused"
        assert len(marker(off)) == 1
        off.lab.virsh("resume", "--domain", off.guest.name)
        off.guest.write("vda", 0, MIB, 9)
        if and_suspend:
            off.lab.virsh("suspend", "--domain", off.guest.name)
        before = number(off)
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "resumed by somebody" in stderr
    assert (state(off), number(off)) == ("paused" if and_suspend else "running", before)
    assert marker(off) == []
    (point,) = off.ctl.points(off.set)
    restored = off.ctl.restore(off.set, off.directory / "r", "--point", point["id"])
    for target, image in restored.items():
        assert first_difference(references[target], image) is None
    if and_suspend:
        off.lab.virsh("resume", "--domain", off.guest.name)
    assert set(off.save("-l", "inc").modes.values()) == {"delta"}
    off.prove_all()


KILLS = [
    "KILL@instance-started#1",
    "KILL+@instance-started#1",
    "KILL+@job-begun#1",
    "KILL@point-published#1",
    "KILL+@point-published#1",
    "KILL@instance-ended#1",
    "KILL+@instance-ended#1",
]


def test_killed_at_each_step(off: Scene) -> None:
    """Ended by the next run, whether that one starts the domain, too, or reads its images."""
    off.save("-l", "full")
    for count, fault in enumerate(KILLS):
        write_and_stop(off, 0x41 + count)
        references = off.references()
        before = len(off.ctl.points(off.set))
        with off.ctl.rigged(fault):
            off.ctl("backup", off.guest.name, "-o", off.set, "-S", code=-signal.SIGKILL)
        assert len(marker(off)) == 1, fault
        is_made = len(off.ctl.points(off.set)) > before
        assert is_made == (count >= 4), fault
        saved = off.save("-l", "inc", *(["-S"] if count % 2 else []))
        assert state(off) == "shut off", fault
        assert marker(off) == [], fault
        assert set(saved.modes.values()) == {"delta"}, fault
        off.prove(saved)
        if is_made:
            # the point of the killed run, too
            made = off.ctl.points(off.set)[-2]["id"]
            images = off.ctl.restore(off.set, off.directory / f"r{count}", "--point", made)
            for target, image in images.items():
                assert first_difference(references[target], image) is None
    continues(off, off.history[-1].id)


def test_resumed_after_the_kill(off: Scene) -> None:
    full = off.save("-l", "full")
    write_and_stop(off, 0x51)
    with off.ctl.rigged("KILL+@job-begun#1"):
        off.ctl("backup", off.guest.name, "-o", off.set, "-S", code=-signal.SIGKILL)
    off.guest.adopt_process()
    off.lab.virsh("resume", "--domain", off.guest.name)
    off.guest.write("vda", 6 * MIB, MIB, 0x52)
    before = number(off)
    saved = off.save("-l", "inc")
    assert (state(off), number(off)) == ("running", before)
    assert marker(off) == []
    assert saved.point["parent"] == full.id
    assert set(saved.modes.values()) == {"delta"}
    off.guest.stop()
    continues(off, saved.id)


def test_abort_ends_what_a_killed_run_started(off: Scene) -> None:
    with off.ctl.rigged("KILL+@job-begun#1"):
        off.ctl("backup", off.guest.name, "-o", off.set, "-S", code=-signal.SIGKILL)
    assert state(off) == "paused"
    off.ctl("abort", off.guest.name)
    assert state(off) == "shut off"
    continues(off, off.save().id)


def test_terminated_in_the_middle(off: Scene) -> None:
    full = off.save("-S")
    write_and_stop(off, 0x61)
    with off.held("-S") as process:
        process.terminate()
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert state(off) == "shut off"
    off.assert_clean()
    assert off.bitmaps_off("vda") == {full.point["checkpoint"]: ["auto"]}
    continues(off, full.id)


def test_libvirtd_dies_in_the_middle(off: Scene, lab: DaemonLab) -> None:
    """The instance hangs on no connection, and is known again afterwards."""
    with off.held("-S") as process:
        before = number(off)
        lab.kill9()
        lab.start()
        assert (state(off), number(off)) == ("paused", before)
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert state(off) == "shut off"
    off.assert_clean()
    continues(off, off.ctl.points(off.set)[-1]["id"])


def test_somebody_starts_it_first(off: Scene) -> None:
    with (
        off.ctl.rigged("STOP@instance-started#1"),
        off.ctl.start("backup", off.guest.name, "-o", off.set, "-S") as process,
    ):
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
        off.guest.start()
        before = number(off)
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert (state(off), number(off)) == ("running", before)
    assert marker(off) == []
    assert off.ctl.points(off.set)[-1]["consistency"] == "crash"


def test_a_saved_state_is_not_touched(off: Scene) -> None:
    off.guest.start()
    off.lab.virsh("managedsave", "--domain", off.guest.name)
    off.guest.adopt_process()
    assert "virsh managedsave-remove" in off.refuse("-S", code=20)
    assert state(off) == "shut off"
    off.lab.virsh("start", "--domain", off.guest.name)
    # restored, not booted anew
    with pytest.raises(LabError, match="managed save"):
        off.lab.virsh("managedsave-dumpxml", "--domain", off.guest.name)


def test_a_domain_that_cannot_be_started(off: Scene) -> None:
    image = off.guest.image("vdb")
    image.rename(image.with_suffix(".away"))
    assert "can't be started" in off.refuse("-S", code=20)
    assert state(off) == "shut off"
    assert marker(off) == []
    image.with_suffix(".away").rename(image)
    continues(off, off.save("-S").id)
