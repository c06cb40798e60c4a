"""The packages, installed in clean hosts with systemd and libvirt, protecting real guests."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.appliance import Appliance, Protected
from tests.lab.command import run
from tests.lab.disks import MIB
from tests.lab.hostguest import guest_binds
from tests.lab.hostlab import SHARED, HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

TOP = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("packages")
    built = run([TOP / "scripts/build-deb", directory], timeout_seconds=300)
    return [Path(line) for line in built.splitlines()]


@pytest.fixture(scope="module", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lab(suite: str) -> Iterator[HostLab]:
    """One for each suite."""
    assert suite in SUITES
    with HostLab() as lab:
        yield lab


@pytest.fixture(scope="module")
def appliance(suite: str, lab: HostLab, packages: list[Path]) -> Appliance:
    host = lab.host("lab-a", hypervisor(suite), readonly_binds=guest_binds())
    return Appliance(lab, host, packages)


@pytest.fixture(scope="module")
def other(suite: str, lab: HostLab, packages: list[Path]) -> Appliance:
    host = lab.host("lab-b", hypervisor(suite), readonly_binds=guest_binds())
    return Appliance(lab, host, packages)


def data(*points: dict[str, Any]) -> int:
    """Bytes that points hold as data of the disk that tests write to."""
    return sum(
        disk["data_bytes"] for each in points for disk in each["disks"] if disk["target"] == "vdb"
    )


def test_a_timer_saves(appliance: Appliance) -> None:
    host = appliance.host
    protected = Protected(appliance, "vm1")
    protected.guest.start()
    protected.change()
    appliance.configure("vm1", schedule__calendar=["*:*:0/8"], schedule__random_delay="0s")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "--now", "nbdbackup@vm1.timer")
    first = appliance.wait_points("vm1", 1)[0]
    assert (first["level"], first["consistency"]) == ("full", "filesystem")
    protected.note(first)

    # the next one by the timer may begin before the change, the one after it can't
    protected.change(2)
    seen = len(appliance.points("vm1"))
    appliance.wait_points("vm1", seen + 1)
    host.run("systemctl", "disable", "--now", "nbdbackup@vm1.timer")
    wait_until(appliance.is_idle, "the last run", 30)
    full, *increments = appliance.points("vm1")
    assert full["level"] == "full"
    assert {point["level"] for point in increments} == {"inc"}
    assert data(*increments) == 2 * MIB
    protected.note(increments[-1])
    # systemd started them all, and each run ended well
    services = host.journal("UNIT=nbdbackup@vm1.service", "JOB_TYPE=start", "JOB_RESULT=done")
    assert len(services) >= len(increments) + 1
    assert appliance.failed() == []
    protected.prove()
    protected.guest.virsh("destroy", "vm1")


def test_a_guest_that_ends_is_saved(appliance: Appliance) -> None:
    """Full, the hook's increment when it is off, and one more when it runs again."""
    protected = Protected(appliance, "vm2")
    guest = protected.guest
    appliance.configure("vm2", on_shutdown=True)
    guest.start()
    protected.change()
    protected.note(appliance.save("vm2"))

    protected.change(2)
    guest.shutdown()
    off = appliance.wait_points("vm2", 2)[-1]
    assert (off["level"], off["consistency"]) == ("inc", "offline")
    assert data(off) == 2 * MIB
    protected.note(off)

    guest.start()
    protected.change()
    again = appliance.save("vm2")
    assert (again["level"], again["parent"]) == ("inc", off["id"])
    assert data(again) == MIB
    protected.note(again)
    assert appliance.failed() == []
    protected.prove()
    guest.virsh("destroy", "vm2")


def test_a_start_comes_before_a_backup(appliance: Appliance) -> None:
    host = appliance.host
    protected = Protected(appliance, "vm3")
    guest = protected.guest
    appliance.configure("vm3", on_shutdown=True)
    guest.start()
    protected.change()
    protected.note(appliance.save("vm3"))
    # 16 seconds
    appliance.configure("vm3", on_shutdown=True, limits__bandwidth="512K")
    protected.change(8)
    guest.shutdown()
    reading = "MESSAGE=disk vdb: reading changes"
    wait_until(lambda: appliance.events("vm3", reading) != [], "the backup", 30)
    assert host.call("pgrep", "-f", "^qemu-storage-daemon").returncode == 0
    begun = time.monotonic()
    guest.virsh("start", "vm3")
    assert time.monotonic() - begun < 10
    guest.wait_ready()
    assert guest.exec("cat /mnt/vda/writes") == "9\n"
    wait_until(appliance.is_idle, "the end of the run", 30)
    # neither a failure nor a point
    assert appliance.failed() == []
    assert appliance.levels("vm3") == ["full"]
    told = [each["MESSAGE"] for each in appliance.events("vm3")]
    assert any("gave way to its start" in message for message in told), told

    appliance.configure("vm3")
    increment = appliance.save("vm3")
    assert increment["level"] == "inc"
    assert data(increment) == 8 * MIB
    protected.note(increment)
    protected.prove()
    guest.virsh("destroy", "vm3")


def test_increments_go_on_after_migration(appliance: Appliance, other: Appliance) -> None:
    both = (appliance, other)
    for each in both:
        each.configure(
            "vm4",
            on_shutdown=True,
            repository__path=f"{SHARED}/repository",
            checkpoint_directory=f"{SHARED}/state",
        )
    protected = Protected(appliance, "vm4", SHARED)
    guest = protected.guest
    guest.start()
    protected.change()
    protected.note(appliance.save("vm4"))
    for number, (here, there) in enumerate([both, both[::-1]], 1):
        protected.change(number)
        guest.migrate(there.host)
        wait_until(lambda: all(each.is_idle() for each in both), "reconciliation", 30)
        # nothing was saved where it is no longer
        assert len(there.points("vm4")) == number
        point = there.save("vm4")
        assert point["level"] == "inc"
        assert data(point) == number * MIB
        protected.note(point)
        assert here.host.call("virsh", "domstate", "vm4").returncode == 1
        assert here.failed() == there.failed() == []
    protected.prove()
    protected.prove(other)
    guest.virsh("destroy", "vm4")
