"""G-1, W-12: a run that ends before its time in its unit, or whose guest does."""

import pytest

from tests.host.appliance import RUN_SECONDS, Appliance, Protected, data, service
from tests.lab.disks import MIB
from tests.lab.process import wait_until
from tests.lib.steps import GUARD

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]
NAME = "vm22"
SOON = 20.0


def main_pid(appliance: Appliance) -> str:
    """The process of the run; it is the main one of the unit."""
    told = appliance.host.run("systemctl", "show", "--property=MainPID", "--value", service(NAME))
    assert told.strip() != "0"
    return told.strip()


def guards(appliance: Appliance) -> list[str]:
    """All guards of the host."""
    return appliance.host.call("pgrep", "-f", GUARD).stdout.decode().split()


def assert_unharmed(appliance: Appliance, protected: Protected) -> None:
    """The guest runs and works; job and guard are gone soon."""
    job = ("virsh", "domjobinfo", "--", NAME)
    wait_until(lambda: "None" in appliance.host.run(*job), "the job's end", SOON)
    wait_until(lambda: not guards(appliance), "the guard's end", SOON)
    appliance.assert_nothing_is_left(NAME)
    assert protected.guest.exec("echo lives") == "lives\n"
    assert not protected.guest.is_frozen()


def test_a_run_that_is_killed_in_its_unit_leaves_the_guest_alone(appliance: Appliance) -> None:
    """Nothing that systemd does at the end of the main process takes the guard away."""
    host = appliance.host
    protected = Protected(appliance, NAME, iothreads=2)
    appliance.configure(NAME)
    protected.guest.start()
    assert appliance.save(NAME)["level"] == "full"
    for end in ("kill", "stop", "abort"):
        appliance.begin(protected)
        assert len(guards(appliance)) == 1
        if end == "kill":
            host.run("kill", "-KILL", main_pid(appliance))
        elif end == "stop":
            host.run("systemctl", "stop", service(NAME), timeout_seconds=RUN_SECONDS)
        else:
            # as a watchdog does
            host.run("systemctl", "kill", "--signal=ABRT", "--kill-whom=main", service(NAME))
        assert_unharmed(appliance, protected)
        wait_until(appliance.is_idle, "the unit's end", RUN_SECONDS)
        host.run("systemctl", "reset-failed")
        assert appliance.save(NAME)["level"] == "inc"
    told = appliance.events(NAME, "MESSAGE_ID=1d5c019f747742428631fb432ad489fd")
    assert any("nbd.sock" in each["MESSAGE"] for each in told)
    protected.note(appliance.points(NAME)[-1])
    protected.prove()
    protected.guest.destroy()


def test_w12_a_guest_that_shuts_down_in_its_run_is_saved_off(appliance: Appliance) -> None:
    """libvirt 11.3 takes half a minute to see that QEMU is gone: that is waited for, not told."""
    host = appliance.host
    protected = Protected(appliance, "vm26", iothreads=2)
    guest = protected.guest
    appliance.configure("vm26")
    guest.start()
    protected.note(appliance.save("vm26"))
    appliance.begin(protected)
    # no wait: libvirt may say "in shutdown" for long
    host.call("virsh", "shutdown", "--mode", "agent", "--", "vm26")
    wait_until(appliance.is_idle, "the end of the run", RUN_SECONDS)
    host.run("systemctl", "reset-failed")
    point = appliance.save("vm26")
    assert (point["level"], point["consistency"]) == ("inc", "offline")
    assert data(point) == 8 * MIB
    told = "\n".join(each["MESSAGE"] for each in appliance.events("vm26"))
    assert "ended during the backup" in told, told
    assert "restart" not in told, told
    assert guest.state() == "shut off"
    assert guards(appliance) == []
    protected.note(point)
    protected.prove()
