"""The host's shutdown and a run in progress: systemd-logind waits for it, up to a bound."""

import time

import pytest

from tests.host.appliance import Appliance, Protected, data, service
from tests.lab.disks import MIB
from tests.lab.hostroot import BOOKWORM
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

BOUND_SECONDS = 14
CONFIGURATION = "/etc/systemd/logind.conf.d/lab.conf"


def begin_off(appliance: Appliance, protected: Protected, mib: int) -> None:
    """Have a slow run read the images of the guest, a megabyte a second, after its end.

    A guest that runs would do: libvirtd has the shutdown wait for it.
    """
    name = protected.name
    protected.change(mib)
    protected.guest.shutdown()
    wait_until(appliance.is_idle, "the units", 30)
    reading = "MESSAGE=disk vdb: reading changes"
    before = len(appliance.events(name, reading))
    appliance.host.run("systemctl", "start", "--no-block", service(name))
    wait_until(lambda: len(appliance.events(name, reading)) > before, "the run", 60)


def delays(appliance: Appliance) -> list[str]:
    """Who has the shutdown wait, and what for."""
    told = appliance.host.run("systemd-inhibit", "--list", "--no-pager", "--no-legend")
    return [" ".join(line.split()) for line in told.splitlines() if line.split()[-1] == "delay"]


# once: systemd-logind is the same in all releases, and this takes two boots
@pytest.mark.parametrize("suite", [BOOKWORM], indirect=True, scope="session")
def test_the_shutdown_waits_for_a_run_but_not_for_good(appliance: Appliance) -> None:
    host = appliance.host
    host.write(CONFIGURATION, f"[Login]\nInhibitDelayMaxSec={BOUND_SECONDS}\n")
    host.run("systemctl", "restart", "systemd-logind")
    protected = Protected(appliance, "vm20")
    guest = protected.guest
    guest.start()
    protected.change()
    appliance.configure("vm20")
    protected.note(appliance.save("vm20"))
    appliance.configure("vm20", limits__bandwidth="1M")

    begin_off(appliance, protected, 8)
    # libvirtd lets go of its own a moment after the last guest's end
    (line,) = [each for each in delays(appliance) if each.startswith("nbdbackup ")]
    assert "backup of vm20" in line
    begun = time.monotonic()
    host.poweroff()
    assert time.monotonic() - begun < BOUND_SECONDS + 10
    host.boot()
    assert appliance.levels("vm20") == ["full", "inc"]
    saved = appliance.points("vm20")[-1]
    assert data(saved) == 8 * MIB
    protected.note(saved)
    assert delays(appliance) == []

    guest.start()
    begin_off(appliance, protected, 30)
    begun = time.monotonic()
    host.poweroff()
    took = time.monotonic() - begun
    assert BOUND_SECONDS - 1 < took < 30
    host.boot()
    assert appliance.levels("vm20") == ["full", "inc"]
    reason = "NBDBACKUP_REASON=interrupted by signal 15"
    assert [each["MESSAGE"] for each in appliance.events("vm20", reason)]
    # ended in order: no change is lost, nothing is read whole
    appliance.configure("vm20")
    point = appliance.save("vm20")
    assert (point["level"], point["parent"]) == ("inc", saved["id"])
    assert {disk["mode"] for disk in point["disks"]} == {"delta"}
    assert data(point) == 30 * MIB
    protected.note(point)
    assert appliance.failed() == []
    protected.prove()
    host.run("rm", CONFIGURATION)
    host.run("systemctl", "restart", "systemd-logind")
