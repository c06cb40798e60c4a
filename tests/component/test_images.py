"""The proof that no other host has the images of a domain that is off (H-2, H-4, H-7)."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbackupd.errors import BusyError, DomainError, ElsewhereError
from nbdbackupd.ops.checkpoints import reconcile
from nbdbackupd.ops.domain.images import Sharing, gone_to, images_of, note_saved, prove, prove_start
from nbdbackupd.ops.domain.survey import DiskFilter
from nbdbackupd.qemu import image
from nbdbackupd.source.hosts import Host, Hosts
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt.domain import Domain
from tests.lib.loops import loop
from tests.lib.offline import test_domain as off_domain

SIZE = 4 << 20
OTHER = Host("b" * 32, "host-b")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device over a file of this host."""
    with loop(tmp_path / "disk", SIZE, filled=b"\0") as device:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", device, "1M"], check=True)
        yield device


@pytest.fixture
def domain(device: Path) -> Iterator[Domain]:
    with off_domain("vm1", {"vda": device}) as domain:
        yield domain


@contextmanager
def held(domain: Domain, directory: Path, sharing: Sharing) -> Iterator[Lease]:
    (directory / domain.uuid).mkdir(parents=True, exist_ok=True)
    with images_of(domain, directory, "run-1", lambda: None, sharing) as lease:
        assert lease is not None
        yield lease


def test_without_other_hosts_the_kernel_tells(domain: Domain, device: Path, tmp_path: Path) -> None:
    """H-7: increments of local devices go on; a word of the administrator counts more."""
    path = os.fspath(device)
    for devices, own in (("auto", True), ("local", True), ("shared", False)):
        with held(domain, tmp_path, Sharing(devices=devices)) as lease:
            assert (lease.doubt(path) == "") == own
            assert lease.doubt(os.fspath(tmp_path / "disk")) == ""
            if own:
                with lease.writing(path):
                    pass
                continue
            assert "block_devices" in lease.doubt(path)
            with pytest.raises(ElsewhereError, match="is not written to"), lease.writing(path):
                pass


def test_a_device_needs_to_be_closed_everywhere(
    domain: Domain, device: Path, tmp_path: Path
) -> None:
    sharing = Sharing(state_dir=tmp_path / "shared")
    path = os.fspath(device)
    here = Hosts(tmp_path / "shared", domain.name, domain.uuid)
    there = Hosts(tmp_path / "shared", domain.name, domain.uuid, OTHER)
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", device, "old"], check=True)
    with held(domain, tmp_path, sharing) as lease:
        assert "no host has noted" in lease.doubt(path)
        with pytest.raises(ElsewhereError):
            reconcile.eraser(lease)("old", device)
    assert [each.name for each in image.info(device, format="qcow2").bitmaps] == ["old"]
    with pytest.raises(DomainError, match="vm1 is not started, disk vda: no host has noted"):
        prove_start(domain, sharing)

    here.announce(arrived=False)
    here.started()
    here.ended("shutdown")
    with held(domain, tmp_path, sharing) as lease:
        assert lease.doubt(path) == ""
        reconcile.eraser(lease)("old", device)
    assert image.info(device, format="qcow2").bitmaps == ()
    prove_start(domain, sharing)
    note_saved(domain, sharing, "point-1")
    assert prove(domain, sharing).saver is None

    there.announce(arrived=False)
    with pytest.raises(BusyError, match="is being started on host host-b"):
        prove(domain, sharing)
    there.started()
    with (
        pytest.raises(ElsewhereError, match="runs on host host-b, as that host has noted"),
        held(domain, tmp_path, sharing),
    ):
        pass
    there.ended("destroyed")
    there.saved("point-2", 2)
    saver = prove(domain, sharing).saver
    assert saver is not None
    assert (saver.name, saver.saved) == ("host-b", "point-2")


def test_a_domain_that_is_not_defined_here_any_more(domain: Domain, tmp_path: Path) -> None:
    """H-4: its timer may still be enabled on the host that it has left."""
    sharing = Sharing(state_dir=tmp_path / "shared")
    assert gone_to("vm1", sharing) == ""
    Hosts(tmp_path / "shared", "vm0", "0" * 36, OTHER).started()
    here = Hosts(tmp_path / "shared", domain.name, domain.uuid)
    here.started()
    assert gone_to("vm1", sharing) == ""
    here.ended("migrated")
    Hosts(tmp_path / "shared", domain.name, domain.uuid, OTHER).started()
    assert gone_to("vm1", sharing) == "no domain vm1 is defined here; it last ran on host host-b"
    assert gone_to("vm2", sharing) == ""
    assert gone_to("vm1", Sharing()) == ""


def test_an_end_that_nobody_saw_is_noted(domain: Domain, device: Path, tmp_path: Path) -> None:
    """The host lost its power: for the others it has the domain until then."""
    sharing = Sharing(state_dir=tmp_path / "shared")
    Hosts(tmp_path / "shared", domain.name, domain.uuid).started()
    with held(domain, tmp_path, sharing) as lease:
        assert lease.doubt(os.fspath(device)) == ""
    there = Hosts(tmp_path / "shared", domain.name, domain.uuid, OTHER)
    assert [note.reason for note in there.notes()] == ["unseen"]


def test_a_shared_directory_that_can_not_be_written(
    domain: Domain, device: Path, tmp_path: Path
) -> None:
    """Files have QEMU's lock; a device is not written to by a host that nobody hears."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / domain.uuid).symlink_to("/proc/no such")
    with held(domain, tmp_path, Sharing(state_dir=tmp_path / "shared")) as lease:
        assert "other hosts can't be told" in lease.doubt(os.fspath(device))
        assert lease.doubt(os.fspath(tmp_path / "disk")) == ""


def test_a_qemu_that_has_an_image_is_seen_before_anything_is_done(
    domain: Domain, device: Path, tmp_path: Path
) -> None:
    """H-2: whoever has it, a run that will be refused touches nothing."""
    # asked before it has the image, it could not get it
    argv = ["stdbuf", "-oL", "qemu-io", "-f", "qcow2", "-c", "read 0 512", "-c", "sleep 60000"]
    with subprocess.Popen([*argv, str(device)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "read 512/512" in process.stdout.readline()
            assert image.why_locked(device, format="qcow2") is not None
            with (
                pytest.raises(BusyError, match="is in use by another program"),
                held(domain, tmp_path, Sharing()),
            ):
                pass
            # one that is left out may be another domain's at the moment
            with held(domain, tmp_path, Sharing(disks=DiskFilter(exclude=("vda",)))):
                pass
        finally:
            process.kill()
    with held(domain, tmp_path, Sharing()):
        pass
