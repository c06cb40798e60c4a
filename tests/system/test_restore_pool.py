"""Restores into a storage pool of a real libvirt."""

import random
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab.command import LabError
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib import sets
from tests.lib.ctl import Ctl
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.system
USAGE, WARNED, DOMAIN, INTEGRITY, REPOSITORY = 2, 3, 20, 40, 50


@pytest.fixture
def pool(lab: DaemonLab, tmp_path: Path) -> Iterator[str]:
    """A pool that is a directory with an odd name."""
    name = f"pool-{uuid.uuid4().hex[:8]}"
    directory = tmp_path / "the 'pool', it is"
    directory.mkdir()
    lab.virsh("pool-create-as", "--name", name, "--type", "dir", "--target", directory)
    yield name
    lab.virsh("pool-destroy", name)


@pytest.fixture
def ctl(lab: DaemonLab, tmp_path: Path) -> Ctl:
    return Ctl(lab.uri, tmp_path / "ctl")


def built(path: Path, format_: str = "qcow2") -> SetBuilder:
    rng = random.Random(4)
    made = SetBuilder(path, format=format_)
    made.disks = {"vda": sets.random_disk(rng, 3 * MIB), "vdb": sets.random_disk(rng, MIB)}
    made.full()
    made.inc({"vda": sets.random_changes(rng, 3 * MIB, 20)})
    return made


def volumes(lab: DaemonLab, pool: str) -> dict[str, Path]:
    """What libvirt knows without being told to look once more."""
    lines = lab.virsh("vol-list", pool).splitlines()
    return {name: Path(path) for name, path in
            (line.split(maxsplit=1) for line in lines if line.strip())}  # fmt: skip


def test_volumes_are_made_and_filled(lab: DaemonLab, pool: str, tmp_path: Path, ctl: Ctl) -> None:
    for number, format_ in enumerate(("qcow2", "raw")):
        made = built(tmp_path / f"set{number}", format_)
        ctl("restore", made.path, "--pool", pool, code=(WARNED, 0)[number])
        found = volumes(lab, pool)
        for disk, content in made.images[-1].items():
            name = f"{disk}.{format_}"
            assert sets.read_image(found[name], format_) == content
            xml = lab.virsh("vol-dumpxml", "--pool", pool, name)
            assert f"<capacity unit='bytes'>{len(content)}</capacity>" in xml
            assert f"<format type='{format_}'/>" in xml
    assert sorted(found) == ["vda.qcow2", "vda.raw", "vdb.qcow2", "vdb.raw"]
    # with the XML beside, and only what was asked for
    out = tmp_path / "out"
    ctl("restore", made.path, "--pool", pool, "-o", out, code=REPOSITORY)
    ctl("restore", made.path, "--pool", pool, "-o", out, "--format", "qcow2", "-d", "vdb",
        "--point", "point1", "--force", code=0)  # fmt: skip
    assert (out / "vm1.xml").exists()
    found = volumes(lab, pool)
    assert sets.read_image(found["vdb.qcow2"], "qcow2") == made.images[0]["vdb"]


def test_a_pool_in_which_volumes_are_being_made(
    lab: DaemonLab, pool: str, tmp_path: Path, ctl: Ctl
) -> None:
    """libvirt refuses to look at a pool as long as it allocates a volume there, for anybody."""
    made = built(tmp_path / "set")
    with ThreadPoolExecutor() as others:
        # takes some seconds: the metadata of a large image
        theirs = others.submit(
            lab.virsh, "vol-create-as", "--pool", pool, "theirs", "400G",
            "--allocation", "0", "--format", "qcow2", "--prealloc-metadata",
        )  # fmt: skip
        wait_until(lambda: is_busy(lab, pool), "a volume being made", 20)
        ctl("restore", made.path, "--pool", pool, "-j", "2", code=WARNED)
        theirs.result()
    found = volumes(lab, pool)
    for disk, content in made.images[-1].items():
        assert sets.read_image(found[f"{disk}.qcow2"], "qcow2") == content


def is_busy(lab: DaemonLab, pool: str) -> bool:
    try:
        lab.virsh("pool-refresh", pool)
    except LabError as err:
        return "asynchronous jobs" in str(err)
    return False


def test_a_guest_starts_from_its_volume(
    lab: DaemonLab, pool: str, tmp_path: Path, ctl: Ctl
) -> None:
    made = built(tmp_path / "set")
    ctl("restore", made.path, "--pool", pool, code=WARNED)
    path = volumes(lab, pool)["vda.qcow2"]
    for each in (path.parent, *path.parent.parents):
        if each.stat().st_uid == 0 and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o111)
    options = GuestOptions(uuid=str(uuid.uuid4()))
    guest = lab.guest(f"of-{pool}", (DiskSpec(target="vda", path=path),), options)
    guest.start()
    try:
        assert guest.reference("vda", tmp_path / "raw").read_bytes() == made.images[-1]["vda"]
        guest.stop()
    finally:
        guest.close()


def test_failures_leave_no_volume(lab: DaemonLab, pool: str, tmp_path: Path, ctl: Ctl) -> None:
    made = built(tmp_path / "set")
    stream = made.path / made.points[0].disk("vda").file
    data = bytearray(stream.read_bytes())
    data[len(data) // 2] ^= 1
    stream.write_bytes(data)
    ctl("restore", made.path, "--pool", pool, "--point", "point1", code=INTEGRITY)
    assert volumes(lab, pool) == {}
    # a kill leaves one that says what it is, and a lock, which the next restore removes
    with ctl.start("restore", made.path, "--pool", pool, "-d", "vdb", "-j", "1",
                   "--bandwidth-limit", "64K") as process:  # fmt: skip
        deadline = time.monotonic() + 30
        while "vdb.qcow2.incomplete" not in volumes(lab, pool):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
    lab.virsh("pool-refresh", pool)
    assert set(volumes(lab, pool)) == {"vdb.qcow2.incomplete", ".nbdbackup-restore"}
    ctl("restore", made.path, "--pool", pool, "-d", "vdb", code=WARNED)
    lab.virsh("pool-refresh", pool)
    assert set(volumes(lab, pool)) == {"vdb.qcow2"}


def test_pools_that_can_not_be_used(lab: DaemonLab, pool: str, tmp_path: Path, ctl: Ctl) -> None:
    made = built(tmp_path / "set")
    assert "storage pool nosuch" in ctl(
        "restore", made.path, "--pool", "nosuch", code=DOMAIN
    ).stderr  # fmt: skip
    lab.virsh("pool-define-as", "--name", f"{pool}-off", "--type", "dir", "--target", tmp_path)
    assert "pool-start" in ctl("restore", made.path, "--pool", f"{pool}-off", code=DOMAIN).stderr
    lab.virsh("pool-undefine", f"{pool}-off")
    ctl("restore", made.path, "--pool", pool, "--in-place", code=USAGE)
    ctl("restore", made.path, "--pool", pool, "--as-chain", code=USAGE)
    assert volumes(lab, pool) == {}
