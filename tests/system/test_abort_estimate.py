"""``abort`` and ``estimate`` against a real libvirtd."""

import fcntl
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdbackupd import durable, rundir
from nbdbackupd.config import schema
from nbdbackupd.errors import BusyError, SourceError
from nbdbackupd.model.chain import Level
from nbdbackupd.ops.backup import abort, backup, estimate
from nbdbackupd.ops.backup.request import BackupRequest
from nbdbackupd.source.running import RunningDisk, RunningRequest, open_running
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import Connection, open_connection
from nbdbackupd.virt.domain import Domain
from tests.lab.daemon import DaemonLab
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest

pytestmark = pytest.mark.system
MIB = 1024 * 1024
KIB = 1024


@pytest.fixture
def guest(lab: DaemonLab, request: pytest.FixtureRequest) -> Guest:
    guest = lab.guest(request.node.name, [DiskSpec(target="vda"), DiskSpec(target="vdb")])
    guest.start()
    return guest


@pytest.fixture
def order(lab: DaemonLab, guest: Guest) -> abort.AbortRequest:
    return abort.AbortRequest(
        domain=guest.name, runtime_dir=lab.directory / "run", scratch_dir=lab.directory / "scratch"
    )


def job_request(order: abort.AbortRequest, domain: Domain, runtime_dir: Path) -> RunningRequest:
    return RunningRequest(
        domain=domain,
        disks=(RunningDisk(target="vda"),),
        run_id="r1",
        runtime_dir=runtime_dir,
        scratch_dir=order.scratch_dir,
        scratch_reserve=0,
        on_trouble=lambda _error: None,
    )


def test_abort_ends_our_own_leftover(
    lab: DaemonLab, connection: Connection, order: abort.AbortRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # what nobody has who is dead
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    domain = Domain.find(connection, order.domain)
    rundir.make_domain_dir(order.runtime_dir, domain.uuid)
    runtime_dir = rundir.socket_dir(order.runtime_dir, domain.uuid)
    with open_connection(lab.uri) as other:
        dead = Domain.find(other, order.domain)
        # whose run is not dead in fact, and finds that its job was ended
        with (
            pytest.raises(SourceError, match="was ended before"),
            open_running(job_request(order, dead, runtime_dir)),
        ):
            report = abort.run(order, connection)
    assert "nbd.sock" in report.ended[0]
    assert report.left == ""
    assert "ended a backup job" in report.message
    assert jobs.active_job(domain) is None
    again = abort.run(order, connection)
    assert again.message == f"domain {order.domain} has no backup job"
    assert json.loads(json.dumps(again.to_json()))["ended"] == []


def test_abort_leaves_foreign_jobs_unless_told(
    connection: Connection, order: abort.AbortRequest, tmp_path: Path, lab: DaemonLab
) -> None:
    domain = Domain.find(connection, order.domain)

    def end_it() -> None:
        with open_running(job_request(order, domain, lab.directory / "foreign")):
            report = abort.run(order, connection)
            assert report.ended == ()
            assert "foreign/nbd.sock" in report.left
            assert "--any" in report.message
            assert jobs.active_job(domain) is not None
            report = abort.run(replace(order, any=True), connection)
            assert "foreign/nbd.sock" in report.ended[0]
            assert report.left == ""
            assert jobs.active_job(domain) is None

    # D-0: the run whose job it was publishes nothing
    with pytest.raises(SourceError, match="its backup job was ended before"):
        end_it()
    assert tmp_path.exists()


def test_abort_does_not_touch_a_run_that_lives(
    connection: Connection, order: abort.AbortRequest
) -> None:
    domain = Domain.find(connection, order.domain)
    directory = rundir.make_domain_dir(order.runtime_dir, domain.uuid)
    with (
        durable.Lock(directory / rundir.LOCK, owner="backup of x"),
        pytest.raises(BusyError, match="backup of x"),
    ):
        abort.run(order, connection)


def save(lab: DaemonLab, connection: Connection, guest: Guest, run_id: str) -> None:
    request = BackupRequest(
        domain=guest.name,
        directory=lab.directory / guest.name,
        run_id=run_id,
        now=datetime(2026, 1, 1, tzinfo=UTC),
        runtime_dir=lab.directory / "run",
        settings=schema.defaults().given(
            scratch_directory=lab.directory / "scratch",
            scratch_reserve=MIB,
            checkpoint_directory=lab.directory / "state",
        ),
        program="test",
        level=Level.AUTO,
    )
    backup.run(request, connection, progress=lambda *_: None, cancelled=lambda: None)


def estimate_request(lab: DaemonLab, guest: Guest, directory: str) -> estimate.EstimateRequest:
    return estimate.EstimateRequest(
        domain=guest.name,
        directory=lab.directory / directory,
        runtime_dir=lab.directory / "run",
        run_id="estimate",
    )


def test_estimate(lab: DaemonLab, connection: Connection, guest: Guest) -> None:
    save(lab, connection, guest, "run-1")
    request = estimate_request(lab, guest, guest.name)
    report = estimate.run(request, connection)
    assert [(disk.mode, disk.bytes) for disk in report.disks] == [("delta", 0), ("delta", 0)]
    guest.write("vda", MIB, 3 * 64 * KIB, 1)
    guest.write_zeroes("vdb", 0, 64 * KIB, unmap=True)
    report = estimate.run(request, connection)
    assert {disk.target: disk.bytes for disk in report.disks} == {"vda": 192 * KIB, "vdb": 64 * KIB}
    assert report.total == 256 * KIB
    save(lab, connection, guest, "run-2")
    assert estimate.run(request, connection).total == 0
    name = guest.virsh("checkpoint-list", "--name", guest.name).split()[-1]
    guest.virsh("checkpoint-delete", "--metadata", guest.name, name)
    guest.write("vda", 0, 64 * KIB, 1)
    # libvirt lost it, the set did not
    assert estimate.run(request, connection).total == 64 * KIB
    guest.kill9()
    guest.virsh("list")
    lab.restart()
    guest.start()
    report = estimate.run(request, connection)
    assert [disk.mode for disk in report.disks] == ["full", "full"]
    assert "missing or inconsistent" in report.disks[0].reason
    assert report.total == 128 * MIB
    assert json.loads(json.dumps(report.to_json()))["disks"][0]["mode"] == "full"


def test_estimate_without_a_full_and_of_a_domain_that_is_off(
    lab: DaemonLab, connection: Connection, guest: Guest
) -> None:
    request = estimate_request(lab, guest, "none")
    report = estimate.run(request, connection)
    assert [disk.mode for disk in report.disks] == ["full", "full"]
    assert report.base == ""
    guest.destroy()
    assert estimate.run(request, connection) == report
    assert not list((lab.directory / "run").rglob("lease.json"))
