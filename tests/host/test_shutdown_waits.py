"""The host's shutdown and a run in progress: systemd-logind waits for it, up to a bound."""

import time

import pytest

from tests.host.appliance import Appliance, Protected, data, service
from tests.lab.disks import MIB
from tests.lab.hostroot import BOOKWORM

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

BOUND_SECONDS = 12
CONFIGURATION = "/etc/systemd/logind.conf.d/nbdbackup.conf"
SHIPPED = "/usr/lib/systemd/logind.conf.d/nbdbackup.conf"


def test_the_shutdown_waits_for_a_run_but_not_for_good(appliance: Appliance, suite: str) -> None:
    host = appliance.host
    assert "\nInhibitDelayMaxSec=30\n" in host.run("cat", SHIPPED)
    if suite != BOOKWORM:
        pytest.skip("the same systemd-logind, and two boots")
    host.write(CONFIGURATION, f"[Login]\nInhibitDelayMaxSec={BOUND_SECONDS}\n")
    host.run("systemctl", "restart", "systemd-logind")
    protected = Protected(appliance, "vm20")
    guest = protected.guest
    appliance.configure("vm20")
    guest.start()
    protected.change()
    protected.note(appliance.save("vm20"))
    assert "nbdbackup" not in host.run("systemd-inhibit", "--list", "--no-pager")

    # 8 seconds of work
    appliance.begin(protected, 8)
    held = host.run("systemd-inhibit", "--list", "--no-pager")
    (line,) = [each for each in held.splitlines() if "backup of vm20" in each]
    assert line.split()[0] == "nbdbackup"
    assert line.split()[-1] == "delay"
    host.poweroff()
    host.boot()
    saved = appliance.points("vm20")[-1]
    assert appliance.levels("vm20") == ["full", "inc"]
    assert data(saved) == 8 * MIB
    assert guest.state() == "shut off"
    protected.references[saved["id"]] = {"vdb": protected.digests()["vdb"]}

    # 24 seconds of work
    guest.start()
    appliance.begin(protected, 24)
    begun = time.monotonic()
    host.poweroff()
    assert time.monotonic() - begun > BOUND_SECONDS - 2
    host.boot()
    assert appliance.levels("vm20") == ["full", "inc"]
    told = [
        each["MESSAGE"]
        for each in appliance.events("vm20", "NBDBACKUP_REASON=interrupted by signal 15")
    ]
    assert told, [each["MESSAGE"] for each in appliance.events("vm20")][-10:]
    # ended in order: no change is lost, nothing is read whole
    guest.start()
    point = appliance.save("vm20")
    assert (point["level"], point["parent"]) == ("inc", saved["id"])
    assert {disk["mode"] for disk in point["disks"]} == {"delta"}
    assert data(point) == 24 * MIB
    protected.note(point)
    assert appliance.failed() == []
    protected.prove()
    guest.destroy()
    host.run("rm", CONFIGURATION)
    host.run("systemctl", "restart", "systemd-logind")
    assert service("vm20") not in host.run("systemctl", "list-jobs")
