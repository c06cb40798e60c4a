"""The appliance on a host that is shut down or loses its power while guests run."""

import json

import pytest

from tests.host.appliance import Appliance, Protected, data, service
from tests.lab.disks import MIB

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

PENDING = "/var/lib/nbdbackup/state/pending"


def test_what_was_put_off_is_caught_up(appliance: Appliance) -> None:
    """libvirt-guests shuts the guest down; the hook starts nothing then, the next boot does.

    A-2: as libvirt 9.0 and 11.3 come, it is stopped beside libvirtd, and guests are killed.
    """
    host = appliance.host
    after = host.run("systemctl", "show", "--value", "--property=After", "libvirt-guests.service")
    assert "libvirtd.service" in after.split()
    protected = Protected(appliance, "vm11")
    guest = protected.guest
    appliance.configure("vm11", on_shutdown=True)
    guest.start()
    protected.change()
    protected.note(appliance.save("vm11"))
    protected.change(2)

    host.poweroff()
    before = host.spec.directory / f"upper{PENDING}/vm11"
    assert before.is_file()
    host.boot()
    point = appliance.wait_points("vm11", 2)[-1]
    assert point["level"] == "inc"
    assert {disk["mode"] for disk in point["disks"]} == {"delta"}
    assert data(point) == 2 * MIB
    # the note says what libvirt no longer knows
    assert point["consistency"] == "offline"
    protected.note(point)
    assert not before.exists()
    (run,) = host.journal(f"UNIT={service('vm11', 'nbdbackup-offline')}", "JOB_RESULT=done",
                          "JOB_TYPE=start")  # fmt: skip
    assert run["_BOOT_ID"] == host.run("cat", "/proc/sys/kernel/random/boot_id").strip().replace(
        "-", ""
    )

    # one boot more has nothing to catch up
    host.poweroff()
    host.boot()
    guest.start()
    protected.change()
    again = appliance.save("vm11")
    assert (again["level"], again["parent"]) == ("inc", point["id"])
    assert data(again) == MIB
    protected.note(again)
    assert appliance.failed() == []
    protected.prove()
    guest.destroy()


def test_power_is_lost_in_the_middle_of_a_run(appliance: Appliance) -> None:
    """The next boot tries that run again.

    What has changed is known by nobody then: it is read whole, once, and that is said.
    """
    host = appliance.host
    protected = Protected(appliance, "vm12")
    guest = protected.guest
    appliance.configure("vm12", on_shutdown=True)
    guest.start()
    protected.change()
    protected.note(appliance.save("vm12"))
    appliance.begin(protected)

    host.crash()
    host.boot()
    assert guest.state() == "shut off"
    full, whole = appliance.wait_points("vm12", 2)
    assert (full["level"], whole["level"]) == ("full", "inc")
    for disk in whole["disks"]:
        assert disk["mode"] == "full"
        assert disk["reason"], whole
        assert any(disk["target"] in warning for warning in whole["warnings"]), whole
    told = [each["MESSAGE"] for each in appliance.events("vm12", "PRIORITY=4")]
    assert any(whole["disks"][1]["reason"] in message for message in told), told
    # done, with warnings: no failure; and no other run of that boot
    done = host.call("nbdbackupctl", "status", "--json", "vm12")
    (domain,) = json.loads(done.stdout)["domains"]
    last = domain["last_run"]
    assert (last["unit"], last["status"]) == (service("vm12"), 3)
    assert (last["result"], last["point"]) == ("saved", whole["id"])
    assert appliance.failed() == []
    protected.note(whole)

    guest.start()
    protected.change(2)
    increment = appliance.save("vm12")
    assert {disk["mode"] for disk in increment["disks"]} == {"delta"}
    assert data(increment) == 2 * MIB
    protected.note(increment)
    appliance.assert_nothing_is_left("vm12")
    assert appliance.failed() == []
    protected.prove()
    guest.destroy()
