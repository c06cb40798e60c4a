"""The hook while libvirt's daemon hangs in it, and killed in the middle of its work."""

import pytest

from tests.host.appliance import Appliance, Protected, data, service
from tests.lab.disks import MIB
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

# as the kernel runs the hook: by its first line
HOOK = "^/bin/sh .*/qemu.d/nbdbackup "
# freeze libvirt's daemon when its hook is there, for $2 seconds; prints the hooks seen
HANG = f"""
virsh start "$1" >/var/tmp/start.log 2>&1 &
start=$!
until seen=$(pgrep -a -f '{HOOK}'); do kill -0 $start || exit 1; done
kill -STOP $(pidof libvirtd)
echo "$seen"
sleep "$2"
if pgrep -a -f '{HOOK}'; then echo "the hook still runs"; fi
kill -CONT $(pidof libvirtd)
wait $start || {{ cat /var/tmp/start.log; exit 1; }}
"""
# libvirt 9.0 may say that the agent was gone before it answered
LATE = """
virsh shutdown "$1" --mode agent
kill -STOP $(pidof libvirtd)
sleep 5
kill -CONT $(pidof libvirtd)
"""
# the one that it kills at once may be any of several; each has had some microseconds
KILLER = f"while :; do pkill -KILL -f '{HOOK}'; done"
READING = "MESSAGE=disk vdb: reading changes"


def begin_offline(appliance: Appliance, protected: Protected) -> None:
    """Have a slow backup at work after the guest's end."""
    name = protected.name
    appliance.configure(name, on_shutdown=True, limits__bandwidth="512K")
    protected.change(8)
    seen = len(appliance.events(name, READING))
    protected.guest.shutdown()
    wait_until(lambda: len(appliance.events(name, READING)) > seen, "the backup", 30)
    appliance.configure(name, on_shutdown=True)


def test_the_daemon_hangs_while_its_hook_works(appliance: Appliance) -> None:
    """The hook makes the backup let go, ends in time, and all goes on when the daemon does."""
    host = appliance.host
    protected = Protected(appliance, "vm13")
    guest = protected.guest
    appliance.configure("vm13", on_shutdown=True)
    guest.start()
    protected.change()
    protected.note(appliance.save("vm13"))
    begin_offline(appliance, protected)
    said = host.run("sh", "-c", HANG, "-", "vm13", "6", timeout_seconds=60)
    assert "nbdbackup vm13 prepare begin -" in said
    assert "still runs" not in said
    guest.wait_ready()
    wait_until(appliance.is_idle, "the units", 60)
    assert appliance.failed() == []
    assert appliance.levels("vm13") == ["full"]
    point = appliance.save("vm13")
    assert point["level"] == "inc"
    assert data(point) == 8 * MIB
    protected.note(point)

    # the guest ends while the daemon hangs; it is told of it late, and so is the hook
    protected.change(2)
    host.run("sh", "-c", LATE, "-", "vm13", timeout_seconds=60)
    point = appliance.wait_points("vm13", 3)[-1]
    assert (point["level"], point["consistency"]) == ("inc", "offline")
    assert data(point) == 2 * MIB
    protected.note(point)
    assert appliance.failed() == []
    protected.prove()


def test_the_hook_is_killed_in_its_work(appliance: Appliance) -> None:
    """libvirt takes that for a refusal. Nothing of it stays, and no change is lost."""
    host = appliance.host
    protected = Protected(appliance, "vm14")
    guest = protected.guest
    appliance.configure("vm14", on_shutdown=True)
    guest.start()
    protected.change()
    protected.note(appliance.save("vm14"))
    begin_offline(appliance, protected)
    host.run("systemd-run", "--quiet", "--unit=killer", "sh", "-c", KILLER)
    try:
        refused = host.call("virsh", "start", "vm14")
        assert refused.returncode == 1
        assert b"ook script execution failed" in refused.stderr, refused
    finally:
        host.run("systemctl", "stop", "killer")
    guest.start()
    assert guest.exec("cat /mnt/vda/writes") == "9\n"
    wait_until(appliance.is_idle, "the units", 60)
    protected.change()

    # at its end, too: the point after it is not made, the next run makes it
    host.run("systemd-run", "--quiet", "--unit=killer", "sh", "-c", KILLER)
    try:
        guest.shutdown()
    finally:
        host.run("systemctl", "stop", "killer")
    wait_until(appliance.is_idle, "the units", 60)
    assert appliance.levels("vm14") == ["full"]
    assert appliance.failed() == []
    assert host.call("pgrep", "-f", "nbdbackup").returncode == 1
    point = appliance.save("vm14")
    assert (point["level"], point["consistency"]) == ("inc", "offline")
    assert data(point) == 9 * MIB
    protected.note(point)
    guest.start()
    wait_until(appliance.is_idle, "the units", 60)
    protected.change(2)
    point = appliance.save("vm14")
    assert (point["level"], data(point)) == ("inc", 2 * MIB)
    protected.note(point)
    # a kill leaves what it had begun to write; the next run or the next boot removes it
    protected.prove()
    guest.destroy()
    wait_until(lambda: len(appliance.points("vm14")) == 4, "the point after its end", 60)
    wait_until(appliance.is_idle, "the units", 60)
    assert appliance.failed() == []
    assert service("vm14") not in host.run("systemctl", "list-jobs")
