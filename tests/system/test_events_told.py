"""Events that other tests do not provoke with their eyes on them: each is told when it happens."""

import fcntl
import json
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.scene import WARNED, Scene, scene
from tests.lib.told import told

pytestmark = pytest.mark.system
BUSY = 75
DISK = DiskSpec(target="vda", size=8 * MIB)
KILL = "KILL@disk-copied#1"


@pytest.fixture(scope="module")
def here(lab: DaemonLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A guest with a full of it, for one test after the other."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    directory = tmp_path_factory.mktemp("told")
    with scene(lab, directory, "told", [DISK], options) as here:
        here.guest.write("vda", 0, MIB, 1)
        here.save()
        yield here


def backup(here: Scene, *options: str, code: int = 0) -> set[str]:
    """What a run tells that is asked to tell all."""
    return told(
        here.ctl("backup", here.guest.name, "-o", here.set, "-v", *options, code=code).stderr
    )


def test_a_base_that_libvirt_forgot_and_nothing_to_save(here: Scene) -> None:
    (base,) = here.checkpoints()
    here.lab.virsh("checkpoint-delete", "--metadata", here.guest.name, base)
    assert {"checkpoint-redefined", "backup-skipped"} < backup(here, "--threshold", "1")
    here.save()
    here.prove_all()


def test_no_disk_has_its_changes(here: Scene) -> None:
    (base,) = here.checkpoints()
    image = str(here.guest.image("vda"))
    (node,) = [
        each["node-name"]
        for each in here.guest.qmp("query-named-block-nodes")
        if each["file"] == image and each["drv"] == "qcow2"
    ]
    here.guest.qmp("block-dirty-bitmap-remove", {"node": node, "name": base})
    assert {"base-lost", "disk-demoted", "backup-warned"} < backup(here, code=WARNED)


def test_a_run_in_the_way_and_one_that_died(here: Scene) -> None:
    with here.held():
        assert "backup-busy" in backup(here, code=BUSY)
    assert "dead-run-swept" in backup(here)


def test_images_are_let_go_of_or_not(here: Scene) -> None:
    guest, ctl = here.guest, here.ctl
    guest.write("vda", 0, MIB, 2)
    guest.stop()
    with ctl.rigged(KILL):
        backup(here, code=-signal.SIGKILL)
    left = here.bitmaps_off("vda").keys() - {each["checkpoint"] for each in ctl.points(here.set)}
    assert len(left) == 1
    socket = here.directory / "s"
    reader = ["qemu-nbd", "-r", "-k", str(socket), "-f", "qcow2", str(guest.image("vda"))]
    with subprocess.Popen(reader) as process:
        try:
            wait_until(socket.exists, "reader", 30)
            found = ctl("checkpoints", guest.name, "--repair", "-o", here.set, "-v", code=WARNED)
        finally:
            process.terminate()
    assert "checkpoint-left" in told(found.stderr)
    assert f"checkpoint {left.pop()} is left as it is: " in found.stderr

    with (
        ctl.rigged("STOP@disk-copied#1"),
        ctl.start("backup", guest.name, "-o", here.set, "-v") as run,
    ):
        ctl.faults = ()
        stat = Path(f"/proc/{run.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
        assert "images-released" in told(ctl("yield", guest.name, "-v").stderr)
        run.send_signal(signal.SIGCONT)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == BUSY
    assert "backup-gave-way" in told(stderr)

    directory = ctl.runtime / str(guest.options.uuid)
    lease = {
        "version": 1, "domain": guest.name, "uuid": guest.options.uuid, "run_id": "r",
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "pid": 1, "start": 0,
        "server_pid": 0, "server_start": 0,
    }  # fmt: skip
    (directory / "lease.json").write_text(json.dumps(lease))
    with (directory / "images").open("r+") as images:
        fcntl.flock(images, fcntl.LOCK_SH)
        assert "images-held" in told(ctl("yield", guest.name, "-v", code=BUSY).stderr)
    (directory / "lease.json").unlink()
    here.prove_all()
