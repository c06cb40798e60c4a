"""What happens to a guest, and what others do to it, while a run reads its disks."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdbackupd.errors import DomainError
from nbdbackupd.model import jobxml
from nbdbackupd.model.jobxml import JobDisk
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import open_connection
from nbdbackupd.virt.domain import Domain
from tests.lab.command import LabError
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lib.scene import Saved, Scene, scene

pytestmark = pytest.mark.system
DISKS = (DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=8 * MIB))
KIB = 1024
# of virDomainBackupBegin: PRESERVE_SHUTDOWN_DOMAIN, since libvirt 11.10, and one of no meaning yet
PRESERVE_GUEST = 1 << 1
UNKNOWN_FLAG = 1 << 13


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A running guest with a full of it."""
    name = f"vm{abs(hash(request.node.name)) % 100000}"
    with scene(lab, tmp_path, name, DISKS) as here:
        here.guest.write("vda", 0, 3 * MIB, 1)
        here.guest.write("vdb", MIB, MIB, 2)
        here.save("-l", "full")
        here.guest.write("vda", 2 * MIB, 128 * KIB, 3)
        here.guest.write_zeroes("vdb", MIB, 64 * KIB, unmap=True)
        yield here


def go_on(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    os.kill(process.pid, signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=100)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stdout, stderr


def keep(here: Scene, stdout: str, references: dict[str, Path]) -> Saved:
    """Note the point that a run of ours has made."""
    here.assert_clean()
    saved = Saved(set=here.set, report=json.loads(stdout), references=references)
    here.history.append(saved)
    return saved


# -- the guest ends in the middle


def power_off(guest: Guest) -> None:
    guest.stop()


def destroy(guest: Guest) -> None:
    guest.destroy()


@pytest.mark.parametrize("starts", [True, False], ids=["then started", "stays off"])
@pytest.mark.parametrize("end", [power_off, destroy])
def test_the_guest_ends(here: Scene, end: Callable[[Guest], None], starts: bool) -> None:
    """The run's checkpoint is stored in the images, and is no base of anything."""
    base = here.history[-1]
    with here.held("-l", "inc") as process:
        here.guest.write("vda", 4 * MIB, 64 * KIB, 4)
        end(here.guest)
        code, _, stderr = go_on(process)
    assert code == 30, stderr
    assert [point["id"] for point in here.ctl.points(here.set)] == [base.id]
    if starts:
        here.guest.start()
        here.guest.write("vdb", 3 * MIB, 64 * KIB, 5)
    saved = here.save("-l", "inc")
    assert saved.point["parent"] == base.id
    assert set(saved.modes.values()) == {"delta"}
    assert here.checkpoints() == [saved.point["checkpoint"]]
    if starts:
        here.guest.stop()
    for target in here.guest.disks:
        assert list(here.bitmaps_off(target)) == [saved.point["checkpoint"]]
    here.prove_all()


def test_qemu_is_killed_and_the_domain_stays_off(here: Scene) -> None:
    base = here.history[-1]
    # once through a shutdown, so that the base is stored in the images
    here.guest.stop()
    here.guest.start()
    with here.held("-l", "inc") as process:
        here.guest.kill9()
        code, _, stderr = go_on(process)
    assert code == 30, stderr
    here.guest.wait_shut_off()
    saved = here.save("-l", "inc", code=3)
    assert saved.point["parent"] == base.id
    # nobody knows what changed
    assert set(saved.modes.values()) == {"full"}
    assert all("bitmap" in reason for reason in saved.reasons.values())
    here.guest.start()
    here.guest.write("vda", 7 * MIB, 64 * KIB, 6)
    assert set(here.save("-l", "inc").modes.values()) == {"delta"}
    here.prove_all()


# -- what others do meanwhile


def test_suspended_and_resumed(here: Scene) -> None:
    references = here.references()
    with here.held("-l", "inc") as process:
        here.lab.virsh("suspend", "--domain", here.guest.name)
        here.guest.write("vda", 5 * MIB, 64 * KIB, 7)
        here.lab.virsh("resume", "--domain", here.guest.name)
        code, stdout, stderr = go_on(process)
    assert code == 0, stderr
    keep(here, stdout, references)
    assert set(here.save("-l", "inc").modes.values()) == {"delta"}
    here.prove_all()


def test_a_suspended_guest_stays_suspended(here: Scene) -> None:
    references = here.references()
    with here.held("-l", "inc") as process:
        here.lab.virsh("suspend", "--domain", here.guest.name)
        code, stdout, stderr = go_on(process)
    assert code == 0, stderr
    assert here.guest.is_paused()
    here.lab.virsh("resume", "--domain", here.guest.name)
    keep(here, stdout, references)
    here.prove_all()


def test_what_libvirt_refuses_meanwhile_harms_nobody(here: Scene) -> None:
    """Saving the state, unplugging and resizing a disk, a copy of it; plugging one in works."""
    references = here.references()
    name = here.guest.name
    with here.held("-l", "inc") as process:
        for words in (
            ("blockresize", "--domain", name, "--path", "vda", "--size", "20M"),
            ("detach-disk", "--domain", name, "--target", "vda", "--live"),
            ("blockcopy", name, "vda", "--transient-job", "--dest", here.directory / "copy"),
            ("managedsave", "--domain", name),
        ):
            with pytest.raises(LabError):
                here.lab.virsh(*words, timeout_seconds=60)
        here.guest.attach(DiskSpec(target="vdc", size=4 * MIB))
        here.guest.write("vdc", 0, MIB, 8)
        code, stdout, stderr = go_on(process)
    assert code == 0, stderr
    assert here.guest.is_running()
    keep(here, stdout, references)
    saved = here.save("-l", "inc", code=3)
    assert saved.modes == {"vda": "delta", "vdb": "delta", "vdc": "full"}
    here.prove_all()


# -- jobs on single disks


def test_a_block_job_is_named(here: Scene) -> None:
    """Commit, pull and copy: refused before anything is begun, and the chain goes on."""
    guest, name = here.guest, here.guest.name
    overlay = guest.places.images / f"{name}-overlay.qcow2"
    here.lab.virsh(
        "snapshot-create-as", "--domain", name, "--disk-only", "--no-metadata",
        "--diskspec", f"vda,file={overlay}", "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    guest.write("vda", 6 * MIB, 4 * MIB, 9)
    copy = guest.places.images / f"{name}-copy.qcow2"
    begin: dict[str, tuple[str | Path, ...]] = {
        "block copy": ("blockcopy", name, "vda", "--transient-job", "--dest", copy),
        "block pull": ("blockpull", name, "vda", "--bandwidth", "1"),
    }
    for job, words in begin.items():
        here.lab.virsh(*words)
        refused_for(here, job)
        here.lab.virsh("blockjob", name, "vda", "--abort")
    # a disk that is left out may have one
    here.lab.virsh("blockcopy", name, "vda", "--transient-job", "--dest", f"{copy}2")
    result = here.ctl("backup", name, "-o", here.directory / "other", "-x", "vda", "--json")
    assert [disk["target"] for disk in result.json["point"]["disks"]] == ["vdb"]
    here.lab.virsh("blockjob", name, "vda", "--abort")
    assert set(here.save("-l", "inc").modes.values()) == {"delta"}
    guest.write("vda", 9 * MIB, 4 * MIB, 10)
    here.lab.virsh("blockcommit", name, "vda", "--active", "--bandwidth", "1")
    refused_for(here, "active block commit")
    here.lab.virsh("blockjob", name, "vda", "--abort")
    here.lab.virsh("blockcommit", name, "vda", "--active", "--pivot")
    into = here.directory / "other2"
    here.save("-l", "full", into=into)
    assert set(here.save("-l", "inc", into=into).modes.values()) == {"delta"}
    here.prove_all()


def refused_for(here: Scene, job: str) -> None:
    before = here.checkpoints()
    result = here.ctl("backup", here.guest.name, "-o", here.set, code=75)
    (line,) = result.stderr.splitlines()
    assert f"disk vda: {job}" in line
    assert "virsh blockjob" in line
    assert here.checkpoints() == before
    assert not list(here.set.glob(".draft*"))


# -- the wish that libvirt keeps QEMU for us


def test_a_flag_that_libvirt_does_not_know(here: Scene) -> None:
    """Refused by the real one, then left out; a real mistake is not taken for that."""
    if jobs.PRESERVE_GUEST:
        assert jobs.PRESERVE_GUEST == PRESERVE_GUEST
    directory = here.guest.places.monitor.parent
    socket, file = directory / "flag.sock", directory / "flag.scratch"

    def xml(*others: str) -> str:
        disk = JobDisk(target="vda", scratch=os.fspath(file))
        return jobxml.backup_xml(os.fspath(socket), [disk], others)

    with open_connection(here.lab.uri) as connection:
        domain = Domain.find(connection, here.guest.name)
        with pytest.raises(DomainError, match="vdz"):
            jobs.begin(domain, xml("vdb", "vdz"), "", flag=UNKNOWN_FLAG)
        assert jobs.active_job(domain) is None
        for _ in range(2):
            assert not jobs.begin(domain, xml("vdb"), "", flag=UNKNOWN_FLAG)
            job = jobs.active_job(domain)
            assert job is not None
            assert job.backup is not None
            assert job.backup.socket == os.fspath(socket)
            jobs.abort(domain)
    log = (here.lab.directory / "l/log/libvirtd.log").read_text()
    # asked for once, however many jobs begin
    assert log.count(f"unsupported flags (0x{UNKNOWN_FLAG:x}) in function qemuBackupBegin") == 2
