"""Domains with awkward names, and what an administrator does with virsh between two runs."""

import pytest

from nbdbackupd.model import unitname
from tests.host.appliance import Appliance, Protected, data, service
from tests.lab.disks import MIB
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

HOSTILE = "-a b,c.d%i%%\\x2d$HOME'\"`id`;&@ü\N{SNOWMAN}"


def test_a_hostile_name(appliance: Appliance) -> None:
    """By the timer, the hook, and each of its units."""
    host = appliance.host
    protected = Protected(appliance, HOSTILE)
    guest = protected.guest
    appliance.configure(
        HOSTILE, on_shutdown=True, schedule__calendar=["*:*:0/12"], schedule__random_delay="0s"
    )
    host.run("systemctl", "daemon-reload")
    guest.start()
    protected.change()
    timer = unitname.unit("nbdbackup", HOSTILE, "timer")
    host.run("systemctl", "enable", "--quiet", "--now", timer)
    appliance.wait_points(HOSTILE, 1)
    host.run("systemctl", "disable", "--quiet", "--now", timer)
    wait_until(appliance.is_idle, "the last run", 30)
    number = len(appliance.points(HOSTILE))
    protected.note(appliance.points(HOSTILE)[-1])

    protected.change(2)
    guest.shutdown()
    off = appliance.wait_points(HOSTILE, number + 1)[-1]
    assert (off["level"], off["consistency"]) == ("inc", "offline")
    assert data(off) == 2 * MIB
    protected.note(off)

    # libvirt has forgotten its checkpoints: the hook's unit tells it of them
    guest.virsh("checkpoint-delete", "--metadata", "--checkpointname", off["checkpoint"],
                "--", HOSTILE)  # fmt: skip
    guest.start()
    wait_until(appliance.is_idle, "the hook's unit", 60)
    known = guest.virsh("checkpoint-list", "--name", "--", HOSTILE).split()
    assert known == [off["checkpoint"]]
    protected.change()
    again = appliance.save(HOSTILE)
    assert (again["level"], data(again)) == ("inc", MIB)
    assert again["domain"] == HOSTILE
    protected.note(again)
    # what was started is what the name means: no other unit, nothing run by a shell
    for kind in ("nbdbackup", "nbdbackup-offline", "nbdbackup-checkpoints"):
        assert host.journal(f"UNIT={service(HOSTILE, kind)}", "JOB_RESULT=done")
    assert appliance.failed() == []
    (state,) = appliance.json("status", "--", HOSTILE)["domains"]
    assert (state["domain"], state["health"]) == (HOSTILE, "ok")
    protected.prove()
    guest.destroy()
    appliance.wait_points(HOSTILE, number + 3)


def test_renamed_and_defined_anew(appliance: Appliance) -> None:
    """Increments go on when it is defined again; a new name begins a set of its own."""
    protected = Protected(appliance, "vm16")
    guest = protected.guest
    appliance.configure("vm16")
    guest.start()
    protected.change()
    protected.note(appliance.save("vm16"))
    protected.change(2)
    guest.shutdown()

    xml = guest.virsh("dumpxml", "--inactive", "vm16")
    guest.virsh("undefine", "--checkpoints-metadata", "vm16")
    guest.virsh("define", "/dev/stdin", stdin=xml.encode())
    assert guest.virsh("checkpoint-list", "--name", "vm16").split() == []
    point = appliance.save("vm16")
    assert (point["level"], data(point)) == ("inc", 2 * MIB)
    protected.note(point)

    guest.virsh("domrename", "vm16", "vm16 new")
    guest.name = "vm16 new"
    appliance.configure("vm16 new")
    guest.start()
    protected.change(3)
    renamed = appliance.save("vm16 new")
    assert (renamed["level"], data(renamed)) == ("full", 6 * MIB)
    guest.shutdown()
    # under its old name, the old set goes on with all that has changed since
    guest.virsh("domrename", "vm16 new", "vm16")
    guest.name = "vm16"
    guest.start()
    protected.change()
    point = appliance.save("vm16")
    assert (point["level"], data(point)) == ("inc", 4 * MIB)
    protected.note(point)
    assert appliance.failed() == []
    protected.prove()
    guest.destroy()
