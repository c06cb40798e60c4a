"""Runs of units in the journal of a real systemd, as the files are installed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nbdbackupd import events
from tests.lab.command import run
from tests.lab.host import Host
from tests.lab.hostguest import HostGuest, guest_binds
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lab.process import wait_until
from tests.lib.pages import TOP

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

PACKAGES = ("python3-yaml", "python3-jinja2", "python3-lz4")
IMAGE = "/var/lib/libvirt/images/vm1.qcow2"
MIB = 1 << 20


@pytest.fixture(scope="module", params=SUITES)
def host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A host with a domain that is off; a run of it takes some seconds."""
    stage = tmp_path_factory.mktemp("stage")
    run(["make", "-C", TOP, "install", f"DESTDIR={stage}"])
    with HostLab() as lab:
        host = lab.host("lab-a", hypervisor(request.param), readonly_binds=guest_binds())
        host.apt("update")
        host.apt("install", "--no-install-recommends", *PACKAGES)
        for name in ("usr", "etc"):
            host.copy_in(stage / name, "/")
        host.write("/etc/nbdbackup/nbdbackup.yaml", "limits: {bandwidth: 2M}\n")
        host.run("systemd-tmpfiles", "--create", "nbdbackup.conf")
        # what systemd's package does when files of the directory change
        host.run("journalctl", "--update-catalog")
        host.run("systemctl", "daemon-reload")
        # it looks for hooks when it starts; without ours a domain that is off has no increments
        host.run("systemctl", "restart", "libvirtd")
        host.run("qemu-img", "create", "-q", "-f", "qcow2", IMAGE, "32M")
        write(host, 1, 12 * MIB)
        HostGuest(host, "vm1", {"vda": IMAGE})
        yield host


def write(host: Host, pattern: int, length: int) -> None:
    host.run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} 0 {length}", IMAGE)


def told(host: Host, *matches: str) -> list[dict[str, Any]]:
    return host.journal("-t", "nbdbackupctl", *matches)


def by_id(host: Host, event: events.Event) -> list[dict[str, Any]]:
    return told(host, f"MESSAGE_ID={event.id}")


def ends(host: Host, unit: str) -> str:
    """Wait for the end of a unit's run; its result."""

    def state(name: str) -> str:
        return host.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    wait_until(lambda: state("ActiveState") in {"inactive", "failed"}, f"end of {unit}", 60)
    return state("Result")


def test_a_run_while_journald_is_restarted(host: Host) -> None:
    unit = "nbdbackup@vm1.service"
    host.run("systemctl", "start", "--no-block", unit)
    wait_until(lambda: by_id(host, events.BACKUP_STARTED) != [], "the run", 30)
    host.run("systemctl", "restart", "systemd-journald")
    assert by_id(host, events.BACKUP_COMMITTED) == []
    assert ends(host, unit) == "success", host.run("journalctl", "--no-pager", "-u", unit)
    host.run("journalctl", "--sync")
    (started,) = by_id(host, events.BACKUP_STARTED)
    (committed,) = by_id(host, events.BACKUP_COMMITTED)
    for each in (started, committed):
        assert each["_SYSTEMD_UNIT"] == unit
        assert each["NBDBACKUP_DOMAIN"] == "vm1"
        assert each["NBDBACKUP_RUN"] == committed["NBDBACKUP_POINT"]
    document = json.loads(host.run("nbdbackupctl", "list", committed["NBDBACKUP_SET"], "--json"))
    (point,) = document["points"]
    assert committed["NBDBACKUP_POINT"] == point["id"]
    assert (committed["NBDBACKUP_LEVEL"], committed["PRIORITY"]) == ("full", "5")
    assert committed["NBDBACKUP_CHECKPOINT"] == point["checkpoint"]
    assert committed["NBDBACKUP_UUID"] == point["uuid"]
    # at 2 MiB each second
    assert 3_000_000 < int(committed["NBDBACKUP_DURATION_USEC"]) < 60_000_000
    assert int(committed["NBDBACKUP_BYTES"]) > 12 * MIB


def test_what_the_catalogue_and_the_verb_show(host: Host) -> None:
    write(host, 2, MIB)
    host.run("systemctl", "start", "nbdbackup@vm1.service")
    last = by_id(host, events.BACKUP_COMMITTED)[-1]
    assert last["NBDBACKUP_LEVEL"] == "inc"
    text = host.run("journalctl", "--no-pager", "-x", f"MESSAGE_ID={events.BACKUP_COMMITTED.id}")
    words = " ".join(text.replace("\N{LIGHT SHADE}", "").split())
    assert "Defined-By: nbdbackupd" in words
    assert f"{last['NBDBACKUP_BYTES']} is what its disks take" in words
    run_id = last["NBDBACKUP_RUN"]
    of_run = json.loads(host.run("nbdbackupctl", "log", "vm1", "--run", run_id, "--json"))
    names = [each["event"] for each in of_run["entries"] if each["event"]]
    assert names[0] == "backup-started"
    assert names[-1] == "backup-committed"
    assert {each["fields"]["run"] for each in of_run["entries"]} == {run_id}
    shown = host.run("nbdbackupctl", "log", "vm1")
    # also what was printed, and the run before
    assert f"restore point {run_id} of vm1 is committed: inc" in shown
    assert "committed: full" in shown
    assert shown.count("\n") > len(of_run["entries"])


def test_a_run_that_gives_way(host: Host) -> None:
    """The domain is started while its images are read: the run and the hook tell of it."""
    write(host, 3, 12 * MIB)
    host.run("systemctl", "start", "--no-block", "nbdbackup@vm1.service")
    wait_until(
        lambda: any("reading changes" in each["MESSAGE"] for each in told(host, "-n", "3")),
        "the reading", 30,
    )  # fmt: skip
    host.run("virsh", "start", "vm1")
    # the run waits for minutes then, and tries again
    wait_until(lambda: by_id(host, events.BACKUP_AGAIN) != [], "the wait", 30)
    host.run("systemctl", "stop", "nbdbackup@vm1.service")
    host.run("virsh", "destroy", "vm1")
    (again,) = by_id(host, events.BACKUP_AGAIN)
    assert (again["PRIORITY"], again["NBDBACKUP_DOMAIN"]) == ("5", "vm1")
    assert again["NBDBACKUP_AT"] in again["MESSAGE"]
    (gave_way,) = by_id(host, events.BACKUP_GAVE_WAY)
    assert (gave_way["PRIORITY"], gave_way["NBDBACKUP_DOMAIN"]) == ("5", "vm1")
    started = by_id(host, events.BACKUP_STARTED)
    assert gave_way["NBDBACKUP_RUN"] == started[-1]["NBDBACKUP_RUN"]
    # by what the hook has called; it says nothing itself where all went well
    (released,) = host.journal(f"MESSAGE_ID={events.IMAGES_RELEASED.id}")
    assert released["NBDBACKUP_DOMAIN"] == "vm1"
    assert gave_way["NBDBACKUP_RUN"] in released["NBDBACKUP_REASON"]
    assert 0 < int(released["NBDBACKUP_DURATION_USEC"]) < 10_000_000
    assert released["MESSAGE"] in host.run("nbdbackupctl", "log", "vm1")
    assert host.journal("-t", "nbdbackup-hook") == []


def test_a_run_that_fails(host: Host) -> None:
    unit = r"nbdbackup@no\x20such.service"
    assert host.call("systemctl", "start", unit).returncode != 0
    (failed,) = by_id(host, events.BACKUP_FAILED)
    assert (failed["PRIORITY"], failed["NBDBACKUP_DOMAIN"]) == ("3", "no such")
    assert "no domain" in failed["NBDBACKUP_REASON"]
    lines = host.run("nbdbackupctl", "log", "no such").splitlines()
    assert any("  error     no such  backup of no such failed: " in line for line in lines)
