"""The packages, installed in clean hosts with systemd and libvirt, protecting real guests."""

import json
import time
from pathlib import Path

import pytest

from tests.host.appliance import NEWER, Appliance, Protected, data, service
from tests.lab.disks import MIB
from tests.lab.hostlab import SHARED
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

# docs/reference/events.md
COMMITTED = "fc784c664edf4627aa3b57fa23ee0f81"
NOT_MOUNTED = "0de8c46365e3410fafb823f469d1d39c"
METRICS = "/var/lib/metrics"
MAIL = "/var/spool/lab-mail"
SENDMAIL = f"#!/bin/sh\ncat >{MAIL}.new && mv {MAIL}.new {MAIL}\n"
HOOK = "/etc/libvirt/hooks/qemu.d/nbdbackup"
SOCKETS = ("libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket")


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
    assert guest.freeze_log() == []
    first = appliance.save("vm2")
    assert first["consistency"] == "filesystem"
    assert guest.freeze_log() == ["freeze", "thaw"]
    assert not guest.is_frozen()
    protected.note(first)

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
        base = there.points("vm4")[-1]["checkpoint"]
        # the hook's "started" comes seconds before libvirt takes a checkpoint
        guest.migrate(there.host, mib_per_second=8)
        wait_until(lambda: all(each.is_idle() for each in both), "reconciliation", 30)
        assert there.host.run("virsh", "checkpoint-list", "--name", "vm4").split() == [base]
        # nothing was saved where it is no longer, nor tried
        assert len(there.points("vm4")) == number
        assert here.host.journal(f"UNIT={service('vm4', 'nbdbackup-offline')}") == []
        assert here.host.call("test", "-e", "/run/nbdbackup/xml/vm4.xml").returncode == 1
        assert "libvirt no longer knows it" in here.ctl("run", "--shutdown", "vm4")
        point = there.save("vm4")
        assert point["level"] == "inc"
        assert data(point) == number * MIB
        protected.note(point)
        assert here.host.call("virsh", "domstate", "vm4").returncode == 1
        assert here.failed() == there.failed() == []
    protected.prove()
    protected.prove(other)
    guest.virsh("destroy", "vm4")


def metrics(appliance: Appliance, name: str) -> dict[str, float]:
    """Read a domain's metrics by name."""
    text = appliance.host.run("cat", f"{METRICS}/nbdbackup-{name}.prom")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(f'{{domain="{name}"}} ' in line for line in lines)
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_what_happened_is_told(appliance: Appliance) -> None:
    """The journal, the status, the metrics; and people, of a failure."""
    host = appliance.host
    protected = Protected(appliance, "vm5")
    host.run("mkdir", METRICS)
    host.write("/etc/nbdbackup/nbdbackup.yaml", f"monitoring: {{metrics_directory: {METRICS}}}\n")
    host.write("/usr/sbin/sendmail", SENDMAIL, mode=0o755)
    settings = {"notification__mail": ["root"], "schedule__calendar": ["*-01-01"]}
    appliance.configure("vm5", **settings)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "--now", "nbdbackup@vm5.timer")
    protected.guest.start()
    protected.change()
    point = appliance.save("vm5")

    committed = appliance.events("vm5", f"MESSAGE_ID={COMMITTED}")[-1]
    assert committed["NBDBACKUP_POINT"] == point["id"]
    assert committed["NBDBACKUP_UUID"] == point["uuid"]
    assert committed["NBDBACKUP_LEVEL"] == "full"
    stored = sum(disk["stored_bytes"] for disk in point["disks"])
    assert int(committed["NBDBACKUP_BYTES"]) == stored
    assert 0 < int(committed["NBDBACKUP_DURATION_USEC"]) < 60e6
    assert committed["_SYSTEMD_UNIT"] == "nbdbackup@vm5.service"
    explained = host.run("journalctl", "--no-pager", "-x", f"NBDBACKUP_POINT={point['id']}")
    assert "Subject: Backup committed" in explained
    assert f"{stored} is what its disks take" in explained
    entries = appliance.json("log", "vm5")["entries"]
    told = next(each for each in entries if each["event"] == "backup-committed")
    assert told["fields"]["point"] == point["id"]
    (state,) = appliance.json("status", "vm5")["domains"]
    assert (state["health"], state["point"], state["points"]) == ("ok", point["id"], 1)
    timers = host.run("nbdbackupctl", "timers")
    assert "vm5" in timers
    assert "-01-01" in timers
    good = metrics(appliance, "vm5")
    assert good["nbdbackup_last_run_success"] == 1
    assert good["nbdbackup_last_point_data_bytes"] == sum(d["data_bytes"] for d in point["disks"])

    appliance.configure("vm5", repository__marker=".mounted", **settings)
    service = "nbdbackup@vm5.service"
    assert host.call("systemctl", "start", service).returncode == 1
    assert appliance.failed() == [service]
    assert len(appliance.events("vm5", f"MESSAGE_ID={NOT_MOUNTED}")) == 1
    wait_until(lambda: host.call("test", "-e", MAIL).returncode == 0, "the mail", 30)
    mail = host.run("cat", MAIL)
    assert "To: root" in mail
    assert service in mail
    assert "marker" in mail
    # what the mount point itself has is told, and that it may not be all
    listed = host.call("nbdbackupctl", "list", "--json", "vm5")
    assert listed.returncode == 3
    assert b"marker" in listed.stderr
    assert len(json.loads(listed.stdout)["sets"][0]["points"]) == 1
    bad = metrics(appliance, "vm5")
    assert bad["nbdbackup_last_run_success"] == 0
    same = "nbdbackup_last_success_timestamp_seconds"
    assert bad[same] == good[same]
    assert host.call("nbdbackupctl", "status", "--nagios", "vm5").returncode == 2
    host.run("systemctl", "reset-failed", service)
    host.run("systemctl", "disable", "--now", "nbdbackup@vm5.timer")
    protected.guest.virsh("destroy", "vm5")


def test_daemons_restart_in_the_middle(appliance: Appliance) -> None:
    host = appliance.host
    protected = Protected(appliance, "vm6")
    appliance.configure("vm6")
    protected.guest.start()
    protected.change()
    protected.note(appliance.save("vm6"))

    appliance.begin(protected)
    host.run("systemctl", "restart", "systemd-journald")
    point = appliance.wait_points("vm6", 2)[-1]
    assert data(point) == 8 * MIB
    protected.note(point)
    committed = appliance.events("vm6", f"MESSAGE_ID={COMMITTED}")
    assert committed[-1]["NBDBACKUP_POINT"] == point["id"]
    assert appliance.failed() == []

    appliance.begin(protected)
    host.run("systemctl", "restart", "libvirtd")
    wait_until(appliance.is_idle, "the end of the run", 60)
    host.run("systemctl", "reset-failed", "nbdbackup*")
    appliance.assert_nothing_is_left("vm6")
    # whether or not that run has failed: nothing is lost, and nothing is whole again
    protected.change()
    protected.note(appliance.save("vm6"))
    full, first, *rest = appliance.points("vm6")
    assert (full["level"], first["level"]) == ("full", "inc")
    assert {each["level"] for each in rest} == {"inc"}
    assert data(*rest) == 9 * MIB
    protected.prove()
    protected.guest.virsh("destroy", "vm6")


def test_packages_change_in_the_middle(
    appliance: Appliance, packages: list[Path], newer_packages: list[Path]
) -> None:
    """An upgrade leaves the run alone, which goes on with what it has; a removal ends it."""
    host = appliance.host
    protected = Protected(appliance, "vm7")
    appliance.configure("vm7")
    protected.guest.start()
    protected.change()
    protected.note(appliance.save("vm7"))

    appliance.begin(protected, 16)  # 16 s
    main = ("systemctl", "show", "--value", "-p", "MainPID", "nbdbackup@vm7.service")
    pid = host.run(*main)
    appliance.install(newer_packages)
    assert host.run(*main) == pid != "0\n"
    assert NEWER in appliance.ctl("--version")
    point = appliance.wait_points("vm7", 2)[-1]
    assert data(point) == 16 * MIB
    protected.note(point)
    assert appliance.failed() == []

    appliance.begin(protected, 24)  # longer than apt takes until it stops the run
    host.apt("remove", "nbdbackupd", "nbdbackup-restore")
    assert host.call("which", "nbdbackupctl").returncode == 1
    assert host.call("pgrep", "-f", "nbdbackupctl run").returncode == 1
    appliance.assert_nothing_is_left("vm7")
    appliance.install(packages)
    assert appliance.failed() == []
    assert appliance.levels("vm7") == ["full", "inc"]
    point = appliance.save("vm7")
    assert point["level"] == "inc"
    assert data(point) == 24 * MIB
    protected.note(point)
    protected.prove()
    protected.guest.virsh("destroy", "vm7")


def test_the_hook_without_libvirt(appliance: Appliance) -> None:
    """It holds nobody up, and its units say what is wrong."""
    host = appliance.host
    protected = Protected(appliance, "vm8")
    appliance.configure("vm8", on_shutdown=True)
    xml = protected.guest.virsh("dumpxml", "vm8").encode()

    def hook(*words: str) -> None:
        begun = time.monotonic()
        done = host.call(HOOK, "vm8", *words, stdin=xml)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        # libvirt hangs for as long as it takes
        assert time.monotonic() - begun < 13

    pid = host.run("systemctl", "show", "--value", "-p", "MainPID", "libvirtd.service").strip()
    host.run("kill", "-STOP", pid)
    try:
        hook("prepare", "begin", "-")
        hook("started", "begin", "-")
        hook("release", "end", "-")
    finally:
        host.run("kill", "-CONT", pid)
    wait_until(appliance.is_idle, "the units", 60)
    assert appliance.failed() == []

    host.run("systemctl", "stop", *SOCKETS, "libvirtd.service")
    try:
        hook("prepare", "begin", "-")
        hook("started", "begin", "-")
        wait_until(appliance.is_idle, "the unit", 60)
        assert appliance.failed() == ["nbdbackup-checkpoints@vm8.service"]
        said = host.journal("-u", "nbdbackup-checkpoints@vm8.service", "PRIORITY=3")
        assert any("libvirt" in each["MESSAGE"] for each in said)
        assert not any("Traceback" in each["MESSAGE"] for each in said)
    finally:
        host.run("systemctl", "start", *SOCKETS, "libvirtd.service")
        host.run("systemctl", "reset-failed", "nbdbackup*")


def test_a_machine_that_libvirt_does_not_know(appliance: Appliance) -> None:
    """Its timer, its unit and status, with no libvirt there at all; see ``qmp``."""
    host, disk, image = appliance.host, "/machine/peripheral/disk1/virtio-backend", "/var/lib/q.img"
    host.run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    host.run(
        *("systemd-run", "--quiet", "--unit=q7", "--property=RuntimeDirectory=q7"),
        *("qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-display", "none"),
        *("-nodefaults", "-S", "-qmp", "unix:/run/q7/qmp,server=on,wait=off"),
        *("-monitor", "unix:/run/q7/hmp,server=on,wait=off"),
        *("-blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={image}"),
        *("-device", "virtio-blk-pci,drive=n1,id=disk1"),
    )

    def write(pattern: int) -> None:
        talk = (
            "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect('/run/q7/hmp');"
            "s.sendall(sys.argv[1].encode() + b'\\n'); time.sleep(1); print(s.recv(65536))"
        )
        command = f'qemu-io -d {disk} "write -P {pattern} 0 1M"'
        # what it did QEMU tells elsewhere
        assert "rror" not in host.run("python3", "-c", talk, command)

    there = ("test", "-S", "/run/q7/hmp")
    wait_until(lambda: host.call(*there).returncode == 0, "monitor", 30)
    host.run("systemctl", "stop", *SOCKETS, "libvirtd.service")
    try:
        write(3)
        never, soon = ["*-01-01"], {"schedule__enable": True, "schedule__random_delay": "0s"}
        appliance.configure("q7", qmp="/run/q7/qmp", schedule__calendar=["*:*:0/8"], **soon)
        host.run("systemctl", "start", "nbdbackup-timers")
        first = appliance.wait_points("q7", 1)[0]
        assert (first["domain"], first["level"]) == ("q7", "full")
        appliance.configure("q7", qmp="/run/q7/qmp", schedule__calendar=never, **soon)
        host.run("systemctl", "start", "nbdbackup-timers")
        wait_until(appliance.is_idle, "the units", 60)
        write(4)
        last = appliance.save("q7")
        assert (last["level"], last["disks"][0]["mode"]) == ("inc", "delta")
        (seen,) = appliance.json("status", "q7")["domains"]
        assert (seen["health"], seen["protected"]) == ("ok", True)
        restored = appliance.json("restore", "q7", "-o", "/var/lib/q7-restored")["disks"][0]
        host.run("qemu-img", "compare", "-U", image, restored["path"])
    finally:
        host.run("systemctl", "start", *SOCKETS, "libvirtd.service")
        host.run("systemctl", "stop", "q7.service", "nbdbackup@q7.timer")
        host.run("rm", "-f", "/etc/nbdbackup/domains.d/q7.yaml")
    assert appliance.failed() == []
