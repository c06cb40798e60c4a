"""``estimate`` and ``abort`` of the command line, beside runs that live, died or are of others."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.process import wait_until
from tests.lib.scene import WARNED, Scene, scene

pytestmark = pytest.mark.system
KIB = 1024
BUSY = 75
PULL = """<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>
<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>
<disk name='vdb' backup='no'/></disks></domainbackup>"""


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    disks = [
        DiskSpec(target="vda", size=16 * MIB + 512),
        DiskSpec(target="vdb", size=8 * MIB, cluster_size=4 * KIB),
    ]
    with scene(lab, tmp_path, request.node.name, disks) as here:
        here.guest.write("vda", 0, 8 * MIB, 0x33)
        here.guest.write("vdb", 0, 8 * MIB, 0x33)
        yield here


def estimate(here: Scene) -> dict[str, tuple[str, int]]:
    """Ask before the run; the text must say the same."""
    arguments = ("estimate", here.guest.name, "-o", here.set)
    report = here.ctl(*arguments, "--json").json
    assert report["bytes"] == sum(disk["bytes"] for disk in report["disks"])
    text = here.ctl(*arguments).stdout
    assert all(disk["target"] in text for disk in report["disks"])
    return {disk["target"]: (disk["mode"], disk["bytes"]) for disk in report["disks"]}


def test_estimate_is_what_the_next_increment_stores(here: Scene) -> None:
    guest = here.guest
    assert estimate(here) == {"vda": ("full", 16 * MIB + 512), "vdb": ("full", 8 * MIB)}
    assert not here.set.exists()
    here.save()
    assert estimate(here) == {"vda": ("delta", 0), "vdb": ("delta", 0)}
    guest.write("vda", MIB + 512, 512, 1)
    guest.write("vda", 16 * MIB, 512, 2)
    guest.write_zeroes("vda", 3 * MIB, MIB, unmap=True)
    guest.discard("vdb", 64 * KIB, 192 * KIB)
    guest.write("vdb", MIB - 4 * KIB, 8 * KIB, 3)
    told = estimate(here)
    assert here.checkpoints() == [here.history[-1].point["checkpoint"]]
    for level in ("diff", "inc"):
        saved = here.save("-l", level, "-z")
        for target, (mode, amount) in told.items():
            disk = saved.disk(target)
            assert mode == disk["mode"] == "delta"
            # a bitmap counts whole granules, also the one that the disk's end cuts
            stored = disk["data_bytes"] + disk["zero_bytes"]
            assert stored <= amount < stored + 64 * KIB
            assert amount > 0
    guest.attach(DiskSpec(target="vdc", size=4 * MIB))
    assert estimate(here)["vdc"] == ("full", 4 * MIB)
    here.save(code=WARNED)
    here.prove_all()


def kill_in_the_middle(here: Scene, *options: str) -> None:
    """Have a run killed within its job, and its guard as well."""
    with here.ctl.rigged("SLAY@disk-copied#1"):
        here.ctl("backup", here.guest.name, "-o", here.set, *options, code=-signal.SIGKILL)
    assert here.has_job()


def test_abort_of_what_a_dead_run_left(here: Scene) -> None:
    name = here.guest.name
    assert "no backup job" in here.ctl("abort", name).stdout
    full = here.save()
    here.guest.write("vda", 0, MIB, 0x44)
    kill_in_the_middle(here)
    said = here.ctl("abort", name, "--json").json
    assert (len(said["ended"]), said["left"]) == (1, "")
    assert "nbd.sock" in said["ended"][0]
    assert not here.has_job()
    assert here.guest.block_jobs() == []
    # the next run removes the rest, and saves all since the last committed point
    here.guest.write("vdb", 0, MIB, 0x55)
    inc = here.save()
    assert inc.point["parent"] == full.id
    assert inc.modes == {"vda": "delta", "vdb": "delta"}
    assert inc.disk("vda")["data_bytes"] == inc.disk("vdb")["data_bytes"] == MIB
    assert here.checkpoints() == [inc.point["checkpoint"]]
    # or sweeps up by itself, whatever its target
    kill_in_the_middle(here)
    here.save(into=here.directory / "other")
    kill_in_the_middle(here, "-l", "copy")
    here.save()
    here.prove_all()


def test_abort_beside_a_run_that_lives(here: Scene) -> None:
    here.save()
    with here.held() as process:
        for verb, options in (
            ("abort", ()), ("abort", ("--any",)), ("backup", ("-o", here.set)),
            ("backup", ("-o", here.directory / "other")),
        ):  # fmt: skip
            said = here.ctl(verb, here.guest.name, *options, code=BUSY).stderr
            assert str(process.pid) in said
        assert here.guest.block_jobs()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["point"]["level"] == "inc"
    here.assert_clean()
    here.prove_all()


def test_backup_jobs_of_others(here: Scene) -> None:
    name = here.guest.name
    folder = here.lab.directory / "foreign"
    folder.mkdir()
    folder.chmod(0o777)
    here.save()
    xml = folder / "job.xml"
    xml.write_text(PULL.format(socket=folder / "foreign.sock", scratch=folder / "scratch"))
    here.lab.virsh("backup-begin", "--domain", name, xml)
    here.guest.write("vda", 0, MIB, 0x77)
    said = here.ctl("backup", name, "-o", here.set, code=BUSY).stderr
    assert "foreign.sock" in said
    assert "abort --any" in said
    report = here.ctl("abort", name, "--json").json
    assert report["ended"] == []
    assert "foreign.sock" in report["left"]
    assert here.has_job()
    assert "--any ends it" in here.ctl("abort", name).stdout
    report = here.ctl("abort", name, "--any", "--json").json
    assert "foreign.sock" in report["ended"][0]
    assert not here.has_job()
    inc = here.save()
    assert inc.disk("vda")["data_bytes"] == MIB
    here.prove_all()


def test_other_jobs_on_a_disk(here: Scene) -> None:
    name = here.guest.name
    here.save()
    copy = here.lab.directory / "copy.qcow2"
    here.lab.virsh(
        "blockcopy", "--domain", name, "vda", copy, "--transient-job", "--bandwidth", "1"
    )
    here.guest.write("vdb", 0, MIB, 0x77)
    assert here.guest.block_jobs()
    for level in ("inc", "copy"):
        said = here.ctl("backup", name, "-o", here.set, "-l", level, code=BUSY).stderr
        assert "disk vda: block copy" in said
    # it is nobody's backup: left alone
    here.ctl("abort", name, "--any")
    assert here.guest.block_jobs()
    assert here.checkpoints() == [here.history[-1].point["checkpoint"]]
    here.lab.virsh("blockjob", "--domain", name, "vda", "--abort")
    wait_until(lambda: not here.guest.block_jobs(), "end of the copy", 20)
    inc = here.save()
    assert inc.disk("vdb")["data_bytes"] == MIB
    here.prove_all()
