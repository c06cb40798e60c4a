"""Two hosts of different releases that share files, a block device and the state directory."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_DNS, uuid5

import pytest

from tests.host.appliance import Appliance
from tests.lab.command import LabError, run
from tests.lab.disks import MIB, DiskSpec, attach_loop
from tests.lab.domain_xml import DomainSpec, domain_xml
from tests.lab.hostguest import HostGuest, guest_binds
from tests.lab.hostlab import SHARED, HostLab
from tests.lab.hostroot import BOOKWORM, TRIXIE, hypervisor
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

DEVICE = "/dev/san"
STATE = f"{SHARED}/state"
REPOSITORY = f"{SHARED}/repository"


class Pair:
    """Host a has the older release, b the newer."""

    def __init__(self, lab: HostLab, packages: list[Path], device: Path) -> None:
        self.lab = lab
        binds = guest_binds()
        hosts = [
            lab.host(name, hypervisor(suite), readonly_binds=binds)
            for name, suite in (("lab-a", BOOKWORM), ("lab-b", TRIXIE))
        ]
        self.a, self.b = (Appliance(lab, host, packages) for host in hosts)
        self.minor = device.name.removeprefix("loop")
        for each in (self.a, self.b):
            self.attach(each)

    def attach(self, appliance: Appliance) -> None:
        """A node of its own, so that QEMU's locks on it are seen on this host alone."""
        appliance.host.run("mknod", "-m", "666", DEVICE, "b", "7", self.minor)

    def lose_power(self, appliance: Appliance) -> None:
        appliance.host.crash()
        appliance.host.boot()
        self.attach(appliance)


@pytest.fixture(scope="module")
def pair(packages: list[Path]) -> Iterator[Pair]:
    with HostLab() as lab:
        image = lab.directory / "san.raw"
        with image.open("wb") as file:
            file.truncate(160 * MIB)
        device = attach_loop(image)
        try:
            yield Pair(lab, packages, device)
        finally:
            # the hosts hold it
            lab.close()
            run(["losetup", "--detach", device])


class Moving:
    """A domain without a guest that both hosts know; QEMU itself writes to its disk."""

    def __init__(self, pair: Pair, name: str, path: str = "", **settings: Any) -> None:
        self.pair = pair
        self.name = name
        self.path = path or f"{SHARED}/{name}.qcow2"
        self.uuid = str(uuid5(NAMESPACE_DNS, name))
        settings = {"checkpoint_directory": STATE, "repository__path": REPOSITORY, **settings}
        pair.a.host.run("qemu-img", "create", "-q", "-f", "qcow2", self.path, "128M")
        disk = DiskSpec(target="vda", block=path != "")
        xml = domain_xml(
            DomainSpec(name=name, uuid=self.uuid, disks=[(disk, Path(self.path))])
        ).encode()
        for each in (pair.a, pair.b):
            each.host.run("virsh", "--quiet", "define", "/dev/stdin", stdin=xml)
            each.configure(name, **settings)

    def virsh(self, on: Appliance, verb: str, *words: str) -> str:
        return on.host.run("virsh", "--quiet", verb, self.name, *words)

    def start(self, on: Appliance) -> None:
        self.virsh(on, "start")

    def end(self, on: Appliance) -> None:
        """As a shutdown: QEMU stores its bitmaps; it is libvirt that ends it."""
        self.virsh(on, "destroy", "--graceful")
        wait_until(on.is_idle, "the units of its end", 30)

    def write(self, on: Appliance, mib: int, *, pattern: int = 0xAA) -> None:
        command = (
            f'qemu-io -d /machine/peripheral/ua-vda/virtio-backend "write -P {pattern} {mib}M 1M"'
        )
        said = self.virsh(on, "qemu-monitor-command", "--hmp", command)
        assert not said.strip(), said

    def run(self, on: Appliance, code: int = 0) -> str:
        """What a timer starts; returns all that it says."""
        done = on.host.call("nbdbackupctl", "run", self.name, timeout_seconds=60)
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == code, said
        return said

    def points(self) -> list[dict[str, Any]]:
        return self.pair.b.points(self.name)

    def image(self) -> dict[str, Any]:
        """What the image's header says, past what this host keeps in memory of a device."""
        host = self.pair.b.host
        options = f"driver=qcow2,file.driver={'host_device' if self.path == DEVICE else 'file'}"
        options += f",file.cache.direct=on,file.filename={self.path}"
        told = host.run("qemu-img", "info", "-U", "--output=json", "--image-opts", options)
        return dict(json.loads(told)["format-specific"]["data"])

    def check(self) -> None:
        """The image is sound."""
        self.pair.b.host.run("qemu-img", "check", "-q", "-f", "qcow2", self.path)

    def forget(self) -> None:
        """End it everywhere, for the next test; the device is the next one's."""
        for each in (self.pair.a, self.pair.b):
            for words in (("destroy",), ("undefine", "--checkpoints-metadata")):
                with suppress(LabError):
                    self.virsh(each, *words)


def bitmaps(info: dict[str, Any]) -> dict[str, list[str]]:
    return {each["name"]: each["flags"] for each in info.get("bitmaps", [])}


def test_a_standby_leaves_a_live_device_alone(pair: Pair) -> None:
    """H-7, H-4: a's nightly run after its power loss, while the domain runs on b."""
    a, b = pair.a, pair.b
    moving = Moving(pair, "san", DEVICE)
    moving.start(a)
    moving.write(a, 1)
    moving.run(a)
    moving.write(a, 2)
    moving.end(a)
    # where it ended here and nowhere else since, increments go on
    moving.run(a)
    first, second = moving.points()
    assert [each["level"] for each in (first, second)] == ["full", "inc"]
    assert list(bitmaps(moving.image())) == [second["checkpoint"]]

    moving.start(a)
    pair.lose_power(a)
    moving.start(b)
    for mib in range(3, 8):
        moving.write(b, mib)
    before = moving.image()
    assert "in-use" in bitmaps(before)[second["checkpoint"]]
    said = moving.run(a)
    assert "runs on host lab-b" in said
    assert second["id"] in said
    # nor is it started there for a backup
    refused = a.host.call("nbdbackupctl", "backup", "-S", moving.name)
    assert refused.returncode == 20, refused
    assert "runs on host lab-b" in refused.stderr.decode()
    assert moving.image() == before
    assert len(moving.points()) == 2
    for mib in range(8, 16):
        moving.write(b, mib)
    moving.end(b)
    moving.check()
    # its own host saves it, the other one does not save the same once more
    moving.run(b, 3)
    point = moving.points()[-1]
    assert len(moving.points()) == 3
    assert point["level"] == "inc"
    assert f"host lab-b has saved what its end left, as point {point['id']}" in moving.run(a)
    moving.start(b)
    moving.forget()


def test_without_notes_a_device_is_not_written_to(pair: Pair) -> None:
    """H-7: no host has noted anything, so each may have the device open."""
    a, b = pair.a, pair.b
    moving = Moving(pair, "san2", DEVICE)
    moving.start(a)
    moving.write(a, 1)
    moving.run(a)
    moving.end(a)
    moving.start(b)
    moving.write(b, 2)
    # else it would note once more where the domain runs
    wait_until(b.is_idle, "reconciliation", 30)
    full = moving.points()[-1]
    notes = f"{STATE}/{moving.uuid}/hosts"
    a.host.run("mv", notes, f"{notes}.away")
    before = moving.image()
    said = moving.run(a, 20)
    assert "may be in use" in said
    assert moving.image() == before
    moving.write(b, 3)
    a.host.run("mv", f"{notes}.away", notes)
    moving.end(b)
    moving.check()
    a.host.run("rm", "-r", notes)
    before = moving.image()
    said = moving.run(a, 3)
    assert "no host has noted where its domain last ran" in said
    point = moving.points()[-1]
    assert (point["level"], point["parent"], point["checkpoint"]) == ("diff", full["id"], "")
    assert point["disks"][0]["data_bytes"] == 2 * MIB
    assert moving.image() == before
    # without any chain: a copy
    a.host.run("rm", "-r", f"{REPOSITORY}/{moving.name}")
    moving.run(a, 3)
    assert [each["level"] for each in moving.points()] == ["copy"]
    assert moving.image() == before
    # that no other host can open it is the administrator's word
    a.configure(moving.name, block_devices="local", repository__path=REPOSITORY)
    a.host.run("rm", "-r", f"{REPOSITORY}/{moving.name}")
    moving.run(a)
    assert [each["level"] for each in moving.points()] == ["full"]
    moving.forget()


def start_during_a_backup(
    moving: Moving, here: Appliance, there: Appliance, *, is_nightly: bool
) -> None:
    """As a cluster relocates a domain: shut down here, started there at once."""

    def runs() -> int:
        return len(here.events(moving.name, "MESSAGE=disk vda: reading all of it"))

    seen = runs()
    moving.virsh(here, "destroy", "--graceful")
    wait_until(lambda: runs() > seen, "the hook's run", 30)
    if is_nightly:
        here.host.run("systemctl", "stop", f"nbdbackup-offline@{moving.name}.service")
        stopped = runs()
        here.host.run("systemctl", "start", "--no-block", f"nbdbackup@{moving.name}.service")
        wait_until(lambda: runs() > stopped, "the nightly run", 30)
    refused = there.host.call("nbdbackupctl", "backup", moving.name)
    assert refused.returncode == 75, refused
    assert f"on host {here.host.name}" in refused.stderr.decode()
    look = f"nbdbackupctl check {moving.name} -o {REPOSITORY}/{moving.name}/*"
    shown = " ".join(there.host.call("sh", "-c", look).stdout.decode().split())
    assert f" on host {here.host.name} (backup of {moving.name}, run 20" in shown, shown
    assert f"a run on host {here.host.name} reads its images" in shown, shown
    begun = time.monotonic()
    moving.start(there)
    assert time.monotonic() - begun < 8

    def told() -> list[str]:
        return [each["MESSAGE"] for each in here.events(moving.name)]

    if is_nightly:
        # it waits for minutes and tries again, as nobody says that its guest will end
        wait_until(lambda: any("is tried again at" in each for each in told()), "its wait", 30)
        here.host.run("systemctl", "stop", f"nbdbackup@{moving.name}.service")
    wait_until(here.is_idle, "the end of the run", 30)
    assert any("gave way to its start" in message for message in told()), told()[-9:]


def test_the_start_wins_on_either_host(pair: Pair) -> None:
    """H-1, H-8, H-9: a backup on one host lets go of the images for a start on the other one."""
    a, b = pair.a, pair.b
    slow: dict[str, Any] = {"limits__bandwidth": "1M", "on_shutdown": True}
    moving = Moving(pair, "nas", **slow)
    moving.start(b)
    for mib in range(24):
        moving.write(b, mib)
    start_during_a_backup(moving, b, a, is_nightly=False)
    start_during_a_backup(moving, a, b, is_nightly=True)
    assert moving.points() == []
    for each in (a, b):
        each.configure(moving.name, repository__path=REPOSITORY, checkpoint_directory=STATE)
    moving.run(b)
    assert "runs on host lab-b" in moving.run(a)
    moving.end(b)
    moving.check()
    moving.forget()


def test_one_of_two_hosts_saves_what_has_moved(pair: Pair) -> None:
    """H-2, H-5: migrated as virsh does it by default, shut down there."""
    a, b = pair.a, pair.b
    moving = Moving(pair, "moved")
    moving.virsh(b, "undefine")
    moving.start(a)
    moving.write(a, 1)
    moving.run(a)
    a.host.run(
        "virsh", "migrate", "--live", "--unsafe", moving.name, "qemu+ssh://root@lab-b/system"
    )
    wait_until(lambda: all(each.is_idle() for each in (a, b)), "reconciliation", 30)
    moving.write(b, 2)
    before = moving.image()
    for words in (("run",), ("run", "-n"), ("checkpoints",), ("check",)):
        told = a.host.call("nbdbackupctl", *words, moving.name)
        assert told.returncode in ((0, 3) if words == ("check",) else (0,)), told
        assert "runs on host lab-b" in told.stdout.decode(), told
    refused = a.host.call("nbdbackupctl", "backup", moving.name)
    assert refused.returncode == 20
    assert "runs on host lab-b" in refused.stderr.decode()
    assert moving.image() == before
    moving.end(b)
    # b's libvirt has forgotten it, a's says that it was migrated away
    moving.run(b)
    assert "host lab-b has saved what its end left" in moving.run(a)
    increment = moving.points()[-1]
    assert (len(moving.points()), increment["level"]) == (2, "inc")
    assert increment["disks"][0]["data_bytes"] == MIB

    # once more, and a is the first to save it; b leaves it alone
    moving.start(a)
    moving.write(a, 3)
    a.host.run(
        "virsh", "migrate", "--live", "--unsafe", moving.name, "qemu+ssh://root@lab-b/system"
    )
    moving.write(b, 4)
    moving.end(b)
    moving.run(a)
    point = moving.points()[-1]
    assert point["disks"][0]["data_bytes"] == 2 * MIB
    assert "host lab-a has saved what its end left" in moving.run(b)
    assert len(moving.points()) == 3
    moving.check()
    for each in (a, b):
        assert [unit for unit in each.failed() if moving.name in unit] == []
    a.configure(moving.name, standby=True, checkpoint_directory=STATE)
    assert "only stands by" in moving.run(a)
    moving.virsh(a, "undefine", "--checkpoints-metadata")
    assert "it last ran on host lab-b" in moving.run(a)
    moving.forget()


def test_a_backup_during_a_migration(pair: Pair) -> None:
    """H-3: refused on both sides, and nobody is told to end the migration."""
    a, b = pair.a, pair.b
    path = f"{SHARED}/slow.qcow2"
    a.host.run("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    guest = HostGuest(a.host, "slow", {"vda": path})
    for each in (a, b):
        each.configure("slow", checkpoint_directory=STATE, repository__path=REPOSITORY)
    # its memory holds a kernel and what belongs to it: more than a megabyte a second
    guest.virsh("start", "slow")
    words = ("migrate", "--live", "--unsafe", "--bandwidth", "1", "slow")
    command = a.host.argv("virsh", *words, "qemu+ssh://root@lab-b/system")
    with subprocess.Popen(command) as migration:
        wait_until(lambda: "slow" in b.host.run("virsh", "list", "--name"), "its coming", 30)
        for each in (a, b):
            for verb in (("backup",), ("run",), ("abort", "--any")):
                done = each.host.call("nbdbackupctl", *verb, "slow", timeout_seconds=60)
                said = (done.stdout + done.stderr).decode()
                assert done.returncode == 75, said
                assert "is being migrated" in said
                assert "abort --any" not in said
        assert migration.poll() is None
        guest.virsh("migrate-setspeed", "slow", "1000")
        assert migration.wait(60) == 0
    wait_until(b.is_idle, "reconciliation", 30)
    done = b.host.call("nbdbackupctl", "run", "slow", timeout_seconds=60)
    assert done.returncode in (0, 3), done
    b.host.run("virsh", "destroy", "slow")
