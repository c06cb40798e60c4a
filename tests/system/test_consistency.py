"""What state of the guest a point holds, and that the guest goes on: a real Linux with an agent."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.agent_guest import AgentGuest
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lib.scene import WARNED, Saved, Scene, scene, scene_of, tree

pytestmark = [pytest.mark.system, pytest.mark.slow]
KIB = 1024
DOMAIN = 20


@pytest.fixture
def here(lab: DaemonLab, linux: AgentGuest, tmp_path: Path) -> Iterator[Scene]:
    """The Linux guest, thawed before and after."""
    linux.set_freeze_hook("exit 0")
    linux.exec("rm -f /tmp/freeze.log /mnt/vd?/*; sync")
    here = scene_of(lab, tmp_path, linux.guest)
    yield here
    assert not linux.is_frozen()
    # a frozen file system would hold this one for ever
    linux.exec("for disk in vda vdb; do echo alive >/mnt/$disk/alive; done; sync")
    for name in here.checkpoints():
        lab.virsh("checkpoint-delete", "--domain", linux.guest.name, name)


def save(here: Scene, *options: str, code: int = 0) -> Saved:
    """Back up a guest that may write by itself: what was frozen can't be compared by reference."""
    report = here.ctl("backup", here.guest.name, "-o", here.set, "--json", *options, code=code)
    here.assert_clean()
    return Saved(set=here.set, report=report.json, references={}, stderr=report.stderr)


def files(here: Scene, saved: Saved, linux: AgentGuest) -> dict[str, str]:
    """What the file systems of a point hold, after proof that they need no repair."""
    images = here.ctl.restore(
        here.set, here.directory / saved.id, "--point", saved.id, "--format", "raw"
    )
    found = {}
    for target, image in images.items():
        # -n: touch nothing; a journal to replay or any fault is an exit status of its own
        subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True, timeout=60)
        said = subprocess.run(
            ["debugfs", "-R", "cat /file", image], check=True, capture_output=True, timeout=60
        )
        found[target] = said.stdout.decode()
        assert (
            "needs_recovery"
            not in subprocess.run(
                ["dumpe2fs", "-h", image], check=True, capture_output=True, timeout=60, text=True
            ).stdout
        )
    assert linux.guest.is_running()
    return found


def test_frozen_file_systems_are_whole(here: Scene, linux: AgentGuest) -> None:
    # written and not synced: only a freeze brings it onto the disk
    linux.exec("echo one >/mnt/vda/file; echo eins >/mnt/vdb/file")
    full = save(here)
    assert full.point["consistency"] == "filesystem"
    assert linux.freeze_log() == ["freeze", "thaw"]
    assert not linux.is_frozen()
    linux.exec("echo two >/mnt/vda/file; echo zwei >/mnt/vdb/file")
    inc = save(here, "--freeze", "require", "-z")
    assert (inc.point["consistency"], inc.point["level"]) == ("filesystem", "inc")
    assert files(here, full, linux) == {"vda": "one\n", "vdb": "eins\n"}
    assert files(here, inc, linux) == {"vda": "two\n", "vdb": "zwei\n"}
    assert any(name.startswith("guest-info.") for name in tree(here.set))
    here.ctl("verify", here.set)


def test_never_and_single_mountpoints(here: Scene, linux: AgentGuest) -> None:
    never = save(here, "--freeze", "never")
    assert never.point["consistency"] == "crash"
    assert linux.freeze_log() == []
    one = save(here, "-F", "/mnt/vdb")
    assert one.point["consistency"] == "filesystem"
    assert linux.freeze_log() == ["freeze", "thaw"]
    both = save(here, "-F", "/mnt/vda,/mnt/vdb")
    assert both.point["consistency"] == "filesystem"
    none = save(here, "-F", "/mnt/none", code=WARNED)
    assert none.point["consistency"] == "crash"
    assert "no file system" in none.warnings[0]
    said = here.refuse("-F", "/mnt/none", "--freeze", "require", code=DOMAIN)
    assert "no file system" in said


def test_a_freeze_that_answers_with_an_error(here: Scene, linux: AgentGuest) -> None:
    linux.set_freeze_hook('[ "$1" = thaw ]')
    saved = save(here, code=WARNED)
    assert saved.point["consistency"] == "crash"
    assert "not frozen" in saved.warnings[0]
    assert not linux.is_frozen()
    for options in (("--freeze", "require"), ("--strict",)):
        assert "not frozen" in here.refuse(*options, code=DOMAIN)
        assert not linux.is_frozen()


def test_paused_instead(here: Scene, linux: AgentGuest) -> None:
    paused = save(here, "--pause")
    assert paused.point["consistency"] == "paused"
    assert linux.freeze_log() == []
    assert not linux.guest.is_paused()
    linux.guest.virsh("suspend", "--domain", linux.guest.name)
    try:
        # W-1: an agent that can't be asked is told of, and a failure where that is wished
        for options, level, code in (
            (("--pause",), "paused", 0), (("--freeze", "never"), "crash", 0), ((), "crash", WARNED)
        ):  # fmt: skip
            report = here.ctl.backup(linux.guest.name, here.set, *options, code=code)
            assert report["point"]["consistency"] == level
            assert bool(report["point"]["warnings"]) == (code == WARNED)
            # somebody else's pause is not ours to end
            assert linux.guest.is_paused()
        said = here.ctl(
            "backup", linux.guest.name, "-o", here.set, "--freeze", "require", code=DOMAIN
        ).stderr
        assert "does not run" in said
    finally:
        linux.guest.virsh("resume", "--domain", linux.guest.name)
    here.ctl("verify", here.set)


def test_without_an_agent(lab: DaemonLab, tmp_path: Path) -> None:
    with scene(lab, tmp_path, "bare") as here:
        said = here.refuse("--freeze", "require", code=DOMAIN)
        assert "no guest agent channel" in said
        assert here.checkpoints() == []
        assert here.save("--strict").point["consistency"] == "crash"
        assert here.save("--pause").point["consistency"] == "paused"


def test_writes_during_the_run_are_in_the_next_point(lab: DaemonLab, tmp_path: Path) -> None:
    disks = [DiskSpec(target=target, size=8 * MIB) for target in ("vda", "vdb")]
    with scene(lab, tmp_path, "busy", disks) as here:
        guest = here.guest
        for target in guest.disks:
            guest.write(target, 0, 6 * MIB, 0x11)
        for number, options in enumerate((("-l", "full"), ("-l", "inc", "-z"), ("-l", "diff"))):
            guest.write("vda", 0, 64 * KIB, 0x20 + number)
            references = here.references()
            with here.held(*options) as process:
                for target in guest.disks:
                    guest.write(target, number * 64 * KIB, MIB, 0x80 + number)
                    guest.write_zeroes(target, 3 * MIB, MIB, unmap=True)
                    guest.discard(target, 7 * MIB, 64 * KIB)
                process.send_signal(signal.SIGCONT)
                out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            saved = Saved(set=here.set, report=json.loads(out), references=references)
            here.history.append(saved)
            here.assert_clean()
        here.save()
        here.prove_all()


@pytest.mark.timeout(240)
def test_a_hanging_agent(here: Scene, linux: AgentGuest) -> None:
    linux.exec(
        "(sleep 1; kill -STOP $(pidof qemu-ga); sleep 40; kill -CONT $(pidof qemu-ga))"
        " >/dev/null 2>&1 &"
    )
    time.sleep(2)
    begun = time.monotonic()
    report = here.ctl.backup(here.guest.name, here.set, code=WARNED)
    assert time.monotonic() - begun < 60
    assert report["point"]["consistency"] == "crash"
    assert "not frozen" in " ".join(report["point"]["warnings"])
    linux.wait_ready()
    assert not linux.is_frozen()
    # G-2: not asked for a while, and that is said; who insists gets it, and any freeze is undone
    (warning,) = here.ctl.backup(here.guest.name, here.set, code=WARNED)["point"]["warnings"]
    assert "it is asked again from" in warning
    saved = here.ctl.backup(here.guest.name, here.set, "--freeze", "require")
    assert saved["point"]["consistency"] == "filesystem"
    here.ctl("verify", here.set)
