"""A running domain as a source, against a real libvirtd and a real QEMU."""

import contextlib
import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdbackupd import rundir
from nbdbackupd.errors import (
    BusyError,
    ConfigError,
    DomainError,
    FreezeError,
    NbdbackupError,
    ScratchSpaceError,
    SourceError,
)
from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.ops.status import gather
from nbdbackupd.source import Snapshot, guard, scratch
from nbdbackupd.source.running import RunningDisk, RunningRequest, marker, open_running
from nbdbackupd.source.sweep import Swept, sweep
from nbdbackupd.virt import checkpoints, jobs
from nbdbackupd.virt.connection import Connection, open_connection
from nbdbackupd.virt.domain import Domain, GuestState
from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lab.process import wait_until
from tests.lib.told import heard

pytestmark = pytest.mark.system
SMALL_MIB = 32
MIB = 1024 * 1024
KIB = 1024
STAYING: list[nbd.NBD] = []


@pytest.fixture
def guest(lab: DaemonLab, request: pytest.FixtureRequest) -> Iterator[Guest]:
    name = f"vm '{abs(hash(request.node.name)) % 10000}\" <&>"
    guest = lab.guest(
        name,
        [DiskSpec(target="vda"), DiskSpec(target="vdb"), DiskSpec(target="vdc", format="raw")],
    )
    guest.start()
    yield guest
    guest.destroy()
    guest.undefine()
    STAYING.clear()


@pytest.fixture
def domain(connection: Connection, guest: Guest) -> Domain:
    return Domain.find(connection, guest.name)


@pytest.fixture
def trouble() -> list[NbdbackupError]:
    return []


@pytest.fixture
def request_(lab: DaemonLab, domain: Domain, trouble: list[NbdbackupError]) -> RunningRequest:
    # whoever holds the domain's lock has made it
    rundir.make_domain_dir(lab.directory / "run", domain.uuid)
    return RunningRequest(
        domain=domain,
        disks=(
            RunningDisk(target="vda"),
            RunningDisk(target="vdb"),
            RunningDisk(target="vdc", tracked=False),
        ),
        run_id="r1",
        runtime_dir=rundir.socket_dir(lab.directory / "run", domain.uuid),
        scratch_dir=lab.directory / "scratch",
        scratch_reserve=MIB,
        on_trouble=trouble.append,
    )


def delta_of(request: RunningRequest, base: str, new: str = "") -> RunningRequest:
    disks = tuple(replace(disk, delta=disk.tracked) for disk in request.disks)
    return replace(request, disks=disks, base_checkpoint=base, new_checkpoint=new)


def dirty(snapshot: Snapshot, target: str) -> list[tuple[int, int]]:
    """Return what an independent client sees as changed.

    It stays: QEMU 7.2 aborts if a client of an iothread's disk leaves before the job's end.
    """
    export = snapshot.exports[target]
    handle: Any = nbd.NBD()  # more of it than is in our stubs
    STAYING.append(handle)
    handle.add_meta_context(f"qemu:dirty-bitmap:{export.bitmap}")
    handle.set_export_name(export.name)
    handle.connect_unix(str(export.socket))
    found: list[tuple[int, int]] = []
    place = 0

    def extents(_context: str, _offset: int, entries: list[int], _error: Any) -> int:
        nonlocal place
        for length, is_dirty in zip(entries[::2], entries[1::2], strict=True):
            if is_dirty and found and sum(found[-1]) == place:
                found[-1] = (found[-1][0], found[-1][1] + length)
            elif is_dirty:
                found.append((place, length))
            place += length
        return 0

    while place < handle.get_size():
        handle.block_status(handle.get_size() - place, place, extents)
    return found


def assert_clean(request: RunningRequest) -> None:
    assert jobs.active_job(request.domain) is None
    assert scratch.leftovers(request.scratch_dir, request.domain.uuid) == []
    assert not request.socket.exists()
    assert not marker(request.runtime_dir).exists()


def full(request: RunningRequest, name: str) -> str:
    with open_running(replace(request, new_checkpoint=name)) as snapshot:
        return snapshot.checkpoint_xml


@contextlib.contextmanager
def left_with(message: str) -> Iterator[None]:
    """D-0: a body that saw no error is no success if the job did not live to its end."""
    with pytest.raises(SourceError, match=message):
        yield


def test_full_then_delta(guest: Guest, request_: RunningRequest) -> None:
    guest.write("vda", 0, MIB, 0xAA)
    with open_running(replace(request_, new_checkpoint="cp.0")) as snapshot:
        assert set(snapshot.exports) == {"vda", "vdb", "vdc"}
        assert snapshot.exports["vda"].size == 64 * MIB
        assert snapshot.exports["vda"].bitmap == ""
        assert snapshot.consistency is Consistency.CRASH
        assert "<name>cp.0</name>" in snapshot.checkpoint_xml
        assert "<domain>" not in snapshot.checkpoint_xml
        assert snapshot.demoted == {}
        assert snapshot.warnings == ()
        guest.write("vda", 8 * MIB, 64 * KIB, 1)
    assert_clean(request_)
    guest.write("vdb", 2 * MIB, 64 * KIB, 2)
    with open_running(delta_of(request_, "cp.0", "cp.1")) as snapshot:
        assert snapshot.demoted == {}
        assert dirty(snapshot, "vda") == [(8 * MIB, 64 * KIB)]
        assert dirty(snapshot, "vdb") == [(2 * MIB, 64 * KIB)]
        assert snapshot.exports["vdc"].bitmap == ""
        guest.write("vdb", 4 * MIB, 64 * KIB, 2)
    with open_running(delta_of(request_, "cp.1")) as snapshot:
        assert snapshot.checkpoint_xml == ""
        assert dirty(snapshot, "vda") == []
        assert dirty(snapshot, "vdb") == [(4 * MIB, 64 * KIB)]
    assert checkpoints.names(request_.domain) == ["cp.0", "cp.1"]
    assert_clean(request_)


def test_a_removed_bitmap_demotes_its_disk_only(guest: Guest, request_: RunningRequest) -> None:
    full(request_, "cp.0")
    remove_bitmap(guest, "vda", "cp.0")
    guest.write("vdb", 0, 64 * KIB, 2)
    with open_running(delta_of(request_, "cp.0", "cp.1")) as snapshot:
        assert list(snapshot.demoted) == ["vda"]
        assert "missing or inconsistent" in snapshot.demoted["vda"]
        assert snapshot.exports["vda"].bitmap == ""
        assert dirty(snapshot, "vdb") == [(0, 64 * KIB)]
    with open_running(delta_of(request_, "cp.1")) as snapshot:
        assert snapshot.demoted == {}
    # libvirt itself refuses to delete a checkpoint with a lost bitmap
    assert checkpoints.delete(request_.domain, "cp.0") is checkpoints.Deleted.ALL
    assert list(guest.bitmaps("vdb")) == ["cp.1"]
    assert checkpoints.delete(request_.domain, "cp.0") is checkpoints.Deleted.ABSENT
    assert checkpoints.delete(request_.domain, "cp.1") is checkpoints.Deleted.ALL
    assert guest.bitmaps("vda") == {}


def remove_bitmap(guest: Guest, target: str, name: str) -> None:
    image = str(guest.image(target))
    node = next(
        node["node-name"]
        for node in guest.qmp("query-named-block-nodes")
        if node["file"] == image and node["drv"] == "qcow2"
    )
    guest.qmp("block-dirty-bitmap-remove", {"node": node, "name": name})


def test_a_killed_qemu_loses_the_bitmaps(guest: Guest, request_: RunningRequest) -> None:
    full(request_, "cp.0")
    guest.kill9()
    wait_until(lambda: not request_.domain.is_active(), "end in libvirt", 20)
    guest.start()
    with open_running(delta_of(request_, "cp.0", "cp.1")) as snapshot:
        assert set(snapshot.demoted) == {"vda", "vdb"}
    assert checkpoints.delete(request_.domain, "cp.0") is checkpoints.Deleted.METADATA


def test_an_inconsistent_bitmap_is_found(guest: Guest, request_: RunningRequest) -> None:
    full(request_, "cp.0")
    guest.stop()
    wait_until(lambda: not request_.domain.is_active(), "end in libvirt", 20)
    guest.start()
    guest.kill9()  # the stored bitmaps stay marked as in use
    wait_until(lambda: not request_.domain.is_active(), "end in libvirt", 20)
    guest.start()
    with open_running(delta_of(request_, "cp.0", "cp.1")) as snapshot:
        assert set(snapshot.demoted) == {"vda", "vdb"}
    assert checkpoints.delete(request_.domain, "cp.0") is checkpoints.Deleted.ALL


def test_a_clean_restart_keeps_the_delta(guest: Guest, request_: RunningRequest) -> None:
    full(request_, "cp.0")
    guest.write("vda", 3 * MIB, 64 * KIB, 7)
    guest.stop()
    guest.start()
    with open_running(delta_of(request_, "cp.0")) as snapshot:
        assert dirty(snapshot, "vda") == [(3 * MIB, 64 * KIB)]


def test_lost_metadata_is_redefined(guest: Guest, request_: RunningRequest) -> None:
    stored = full(request_, "cp.0")
    guest.virsh("checkpoint-delete", "--metadata", "--domain", guest.name, "cp.0")
    guest.write("vda", MIB, 64 * KIB, 7)
    request = delta_of(request_, "cp.0")
    with open_running(request) as snapshot:
        assert set(snapshot.demoted) == {"vda", "vdb"}
        assert "cp.0" in snapshot.demoted["vda"]
    with open_running(replace(request, base_xml=stored)) as snapshot:
        assert snapshot.demoted == {}
        assert dirty(snapshot, "vda") == [(MIB, 64 * KIB)]


def test_redefinition_with_one_bitmap_gone(guest: Guest, request_: RunningRequest) -> None:
    stored = full(request_, "cp.0")
    guest.virsh("checkpoint-delete", "--metadata", "--domain", guest.name, "cp.0")
    remove_bitmap(guest, "vdb", "cp.0")
    with open_running(replace(delta_of(request_, "cp.0"), base_xml=stored)) as snapshot:
        assert list(snapshot.demoted) == ["vdb"]


def test_a_hot_plugged_disk_is_read_in_full(guest: Guest, request_: RunningRequest) -> None:
    full(request_, "cp.0")
    guest.attach(DiskSpec(target="vdd"))
    request = delta_of(request_, "cp.0", "cp.1")
    request = replace(request, disks=(*request.disks, RunningDisk(target="vdd", delta=True)))
    with open_running(request) as snapshot:
        assert list(snapshot.demoted) == ["vdd"]
    with open_running(replace(request, base_checkpoint="cp.1", new_checkpoint="")) as snapshot:
        assert snapshot.demoted == {}


def test_a_failing_body_leaves_nothing(request_: RunningRequest) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        open_running(replace(request_, new_checkpoint="cp.0")),
    ):
        raise KeyboardInterrupt
    assert_clean(request_)
    assert checkpoints.delete(request_.domain, "cp.0") is checkpoints.Deleted.ALL
    assert checkpoints.names(request_.domain) == []


def test_a_failing_begin_leaves_nothing(guest: Guest, request_: RunningRequest) -> None:
    full(request_, "cp.0")
    with pytest.raises(DomainError, match=r"cp\.0"), ExitStack() as stack:
        stack.enter_context(open_running(replace(request_, new_checkpoint="cp.0")))
    assert_clean(request_)
    assert not guest.is_paused()


def test_busy_domain_is_refused_at_once(request_: RunningRequest) -> None:
    other = replace(request_, runtime_dir=request_.runtime_dir / "other", run_id="r2")
    with open_running(other):
        begun = time.monotonic()
        with pytest.raises(BusyError, match=r"backup job in pull mode.*other/nbd\.sock"):
            open_running(request_).__enter__()
        assert time.monotonic() - begun < 5
        # a foreign job is left alone
        swept = sweep(request_.domain, request_.runtime_dir, request_.scratch_dir / "none")
        assert swept == Swept(foreign=swept.foreign)
        assert "other" in swept.foreign
        assert jobs.active_job(request_.domain) is not None
    assert_clean(request_)


def test_sweep_ends_no_job_of_a_run_that_lives(
    request_: RunningRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G-1: a connection of it may be in its handshake, and QEMU would hang."""
    monkeypatch.setattr(guard, "TURN_SECONDS", 0.3)
    with open_running(request_):
        with pytest.raises(BusyError, match="connection of an earlier run to QEMU"):
            sweep(request_.domain, request_.runtime_dir, request_.scratch_dir)
        assert jobs.active_job(request_.domain) is not None
    assert_clean(request_)


def test_sweep_ends_a_dead_runs_job(
    lab: DaemonLab, request_: RunningRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what nobody has who is dead
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with open_connection(lab.uri) as second:
        dead = replace(request_, domain=Domain.find(second, request_.domain.uuid), run_id="r0")
        manager = open_running(dead)
        manager.__enter__()
        assert scratch.leftovers(request_.scratch_dir, request_.domain.uuid)
        swept = sweep(request_.domain, request_.runtime_dir, request_.scratch_dir)
        assert "nbd.sock" in swept.job
        assert_clean(request_)
        assert sweep(request_.domain, request_.runtime_dir, request_.scratch_dir) == Swept()
        with pytest.raises(SourceError, match="its backup job was ended"):
            manager.__exit__(None, None, None)


def test_sweep_removes_files_of_a_dead_guest(guest: Guest, request_: RunningRequest) -> None:
    guest.destroy()
    request_.scratch_dir.mkdir(exist_ok=True)
    request_.runtime_dir.mkdir(parents=True)
    mine = scratch.path(request_.scratch_dir, request_.domain.uuid, "r0", "vda")
    foreign = scratch.path(request_.scratch_dir, "another-uuid", "r0", "vda")
    for file in (mine, foreign, request_.socket):
        file.touch()
    swept = sweep(request_.domain, request_.runtime_dir, request_.scratch_dir)
    assert set(swept.files) == {mine, request_.socket}
    assert foreign.exists()
    foreign.unlink()
    guest.start()


def test_full_scratch_ends_the_job_and_spares_the_guest(
    small: Path, guest: Guest, request_: RunningRequest, trouble: list[NbdbackupError]
) -> None:
    guest.write("vda", 0, 40 * MIB, 1)
    request = replace(request_, scratch_dir=small, scratch_reserve=8 * MIB)
    with left_with("its backup job was ended"), open_running(request):
        for number in range(26):
            guest.write("vda", number * MIB, MIB, 2)
        wait_until(lambda: bool(trouble), "trouble", 10)
        wait_until(lambda: jobs.active_job(request.domain) is None, "end of job", 10)
    assert isinstance(trouble[0], ScratchSpaceError)
    assert request.domain.state() is GuestState.RUNNING
    assert not guest.is_paused()
    assert_clean(request)
    with pytest.raises(ScratchSpaceError, match="--scratch-dir"):
        open_running(replace(request, scratch_reserve=20 * MIB)).__enter__()


def test_scratch_in_another_mount_namespace(lab: DaemonLab, request_: RunningRequest) -> None:
    hidden = lab.directory / "hidden"
    hidden.mkdir(mode=0o755)
    run(["mount", "-t", "tmpfs", "-o", "size=32M,mode=711", "none", hidden])
    try:
        with pytest.raises(ConfigError, match="not to be seen here"):
            open_running(replace(request_, scratch_dir=hidden)).__enter__()
    finally:
        run(["umount", hidden])
    assert jobs.active_job(request_.domain) is None


def test_a_job_that_others_end_is_noticed(
    guest: Guest, request_: RunningRequest, trouble: list[NbdbackupError]
) -> None:
    with left_with("its backup job was ended"), open_running(request_):
        guest.virsh("domjobabort", "--domain", guest.name)
        wait_until(lambda: bool(trouble), "trouble", 10)
    assert "its backup job was ended" in trouble[0].message
    assert_clean(request_)


def test_the_guests_end_is_noticed(
    guest: Guest, request_: RunningRequest, trouble: list[NbdbackupError]
) -> None:
    with left_with("ended during the backup"), open_running(request_):
        guest.stop()
        wait_until(lambda: bool(trouble), "trouble", 10)
    assert "ended during the backup" in trouble[0].message
    assert_clean(request_)
    with pytest.raises(DomainError, match="does not run"):
        open_running(request_).__enter__()
    guest.start()


def test_a_guest_that_is_kept_until_the_job_ends_is_told(
    request_: RunningRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G-6: as libvirt 11.10 and later have it; here only the word of libvirt is not real."""
    monkeypatch.setattr(Domain, "is_kept", lambda _domain: True)
    with heard() as told, open_running(request_):
        wait_until(lambda: told == ["guest-waits"], "the word", 20)
        (note,) = gather.waiting(request_.domain.connection)
        assert "virsh resume" in note


def test_pause_holds_and_releases_the_guest(guest: Guest, request_: RunningRequest) -> None:
    with open_running(replace(request_, freeze=FreezePolicy.PAUSE)) as snapshot:
        assert snapshot.consistency is Consistency.PAUSED
        assert not guest.is_paused()
    guest.virsh("suspend", "--domain", guest.name)
    with open_running(replace(request_, freeze=FreezePolicy.PAUSE)) as snapshot:
        assert snapshot.consistency is Consistency.PAUSED
        assert guest.is_paused()
    assert guest.is_paused()


def test_sweep_resumes_a_guest_that_a_killed_run_paused(
    guest: Guest, request_: RunningRequest
) -> None:
    request_.runtime_dir.mkdir(parents=True)
    marker(request_.runtime_dir).write_text("paused")
    guest.virsh("suspend", "--domain", guest.name)
    assert "resumed" in sweep(request_.domain, request_.runtime_dir, request_.scratch_dir).guest
    assert not guest.is_paused()
    assert_clean(request_)


def test_required_freeze_without_agent(request_: RunningRequest) -> None:
    with pytest.raises(FreezeError, match="no guest agent channel"):
        open_running(replace(request_, freeze=FreezePolicy.REQUIRE)).__enter__()
    assert_clean(request_)


def test_long_socket_path(request_: RunningRequest) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        open_running(replace(request_, runtime_dir=Path("/tmp") / ("x" * 100))).__enter__()


def test_world_writable_runtime_directory(request_: RunningRequest) -> None:
    request_.runtime_dir.mkdir(parents=True)
    request_.runtime_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="writable for everybody"):
        open_running(request_).__enter__()


def test_restart_of_libvirtd_in_the_middle(
    lab: DaemonLab, guest: Guest, request_: RunningRequest, trouble: list[NbdbackupError]
) -> None:
    full(request_, "cp.0")
    guest.write("vda", 0, 64 * KIB, 9)
    with open_running(delta_of(request_, "cp.0")) as snapshot:
        lab.stop()
        assert dirty(snapshot, "vda") == [(0, 64 * KIB)]
        starter = threading.Timer(2, lab.start)
        starter.start()
    starter.join()
    assert trouble == []
    assert_clean(request_)
