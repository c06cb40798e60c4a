"""Sets that the peer wrote, in the versions of two Debians: every point comes back as it was.

References are ``qemu-img``'s, of the paused guest. libvirt is there for the peer alone: what is
tested here runs with a connection to nowhere.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.command import run
from tests.lab.compare import first_difference_raw
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.peer import BOOKWORM, TRIXIE, peer
from tests.lib.ctl import Ctl
from tests.lib.peer_sets import PeerSets, open_directory, shuffle_times
from tests.lib.rigged import RiggedCtl

pytestmark = [pytest.mark.system, pytest.mark.slow]

DAMAGED = 40
BROKEN = 50
WARNED = 3
FORMS = {"plain": (), "lz4": ("-z",)}


@pytest.fixture(scope="module", params=[BOOKWORM, TRIXIE])
def made(
    lab: DaemonLab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PeerSets]:
    """All kinds of sets of one guest: two qcow2 disks, a raw one, spaces in names."""
    disks = (
        DiskSpec(target="vda", size=16 * MIB),
        DiskSpec(target="vdb", size=8 * MIB + 5 * 512),
        DiskSpec(target="vdc", size=8 * MIB, format="raw"),
    )
    guest = lab.guest(f"vm {request.param}", disks)
    guest.start()
    sets = PeerSets(
        peer=peer(request.param, lab.launcher),
        guest=guest,
        directory=tmp_path_factory.mktemp("peer sets"),
        scratch=open_directory(lab.directory / f"scratch {request.param}"),
    )
    try:
        sets.fill("vda", 6 * MIB, 5 * MIB)
        sets.fill("vdb", 3 * MIB, 2 * MIB)
        guest.write("vdc", MIB, MIB, 0x33)
        sets.note("now")
        sets.run("copy", "copy", "--raw")
        sets.run("copy", "bare", "--type", "raw")
        sets.archive("stdout.zip", "-z")
        for form, options in FORMS.items():
            sets.chain(f"chain {form}", *options)
            shuffle_times(sets.directory / f"chain {form}")
        yield sets
    finally:
        guest.close()


@pytest.fixture(params=list(FORMS))
def chain(made: PeerSets, request: pytest.FixtureRequest) -> tuple[Path, dict[str, str]]:
    """A chain of two disks, its points and their references."""
    name = f"chain {request.param}"
    return made.directory / name, made.points[name]


@pytest.fixture
def ctl(tmp_path: Path) -> RiggedCtl:
    return RiggedCtl("test:///nowhere", tmp_path / "ctl")


TWO = ("vda", "vdb")


def verify(ctl: Ctl, path: Path) -> dict[str, Any]:
    """The report on a set that is sound; what nothing vouches for has a status of its own."""
    done = ctl("verify", path, "--json", code=None)
    report: dict[str, Any] = done.json
    assert done.code == (3 if report["warnings"] else 0)
    return report


def test_every_point_comes_back(
    made: PeerSets, chain: tuple[Path, dict[str, str]], ctl: Ctl
) -> None:
    path, points = chain
    listed = ctl("list", path, "--json").json
    assert [point["id"] for point in listed["points"]] == list(points)
    assert listed["written_by"] == "virtnbdbackup"
    assert {point["domain"] for point in listed["points"]} == {made.guest.name}
    assert [point["parent"] for point in listed["points"]] == [
        "", "full", "inc.virtnbdbackup.1", *3 * ["inc.virtnbdbackup.2"],
    ]  # fmt: skip
    for point, reference in points.items():
        made.check(ctl, path, point, reference, TWO)
    shown = ctl("show", path, "--point", "inc.virtnbdbackup.2", "--json").json
    assert shown["points"][0]["disks"][0]["stream"]["parentCheckpoint"] == "virtnbdbackup.1"
    verified = verify(ctl, path)
    assert verified["sound"]
    # the older version writes no checksums
    has_sums = (path / "vda.full.data.chksum").exists()
    assert bool(verified["warnings"]) == (not has_sums)


def test_sequences(made: PeerSets, chain: tuple[Path, dict[str, str]], ctl: Ctl) -> None:
    path, points = chain
    names = ["vdb.full.data", *(f"vdb.inc.virtnbdbackup.{number}.data" for number in (1, 2))]
    files = ",".join(str(path / name) for name in names)
    into = made.directory / "sequence"
    ctl("restore", "--sequence", files, "-o", into, "--format", "raw", code=None)
    reference = made.references[points["inc.virtnbdbackup.2"]]["vdb"]
    assert first_difference_raw(into / "vdb.raw", reference) is None
    shutil.rmtree(into)
    wrong = ",".join(str(path / name) for name in (names[0], names[2]))
    told = ctl("restore", "--sequence", wrong, "-o", into, code=BROKEN).stderr
    assert "a file is missing between them" in told


def test_a_missing_increment_is_named(
    chain: tuple[Path, dict[str, str]], ctl: Ctl, tmp_path: Path
) -> None:
    path = shutil.copytree(chain[0], tmp_path / "a set")
    for file in path.glob("*.inc.virtnbdbackup.2.data*"):
        file.unlink()
    told = ctl("restore", path, "-o", tmp_path / "out", code=BROKEN).stderr
    assert "starts from checkpoint virtnbdbackup.2" in told
    assert not (tmp_path / "out").exists()
    listed = ctl("list", path, "--json", code=DAMAGED).json
    assert [point["id"] for point in listed["points"]] == ["full", "inc.virtnbdbackup.1"]
    assert len(listed["problems"]) == 3
    ctl("verify", path, code=DAMAGED)
    ctl("restore", path, "-o", tmp_path / "out", "--point", "full", code=WARNED)


def test_damage_is_found(chain: tuple[Path, dict[str, str]], ctl: Ctl, tmp_path: Path) -> None:
    path = shutil.copytree(chain[0], tmp_path / "a set")
    stream = path / "vda.inc.virtnbdbackup.1.data"
    sound = stream.read_bytes()
    place = sound.index(b"data 00") + 40 + 100
    for broken, says in (
        (sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :], ""),
        (sound[:-30], "ends too early|not a frame header|without sizes"),
        (sound.replace(b"stop", b"sxop"), "not a frame header"),
        (sound.replace(b"vda", b"vdb", 1), "meta frame is of disk"),
    ):
        stream.write_bytes(broken)
        is_plain = b'"compressed": false' in sound
        if not says and is_plain and not (path / f"{stream.name}.chksum").exists():
            continue  # a plain block of the older version: nothing vouches for it
        told = ctl("verify", path, code=DAMAGED)
        assert re.search(says, told.stdout), told.stdout
        assert stream.name in told.stdout or "inc.virtnbdbackup.1" in told.stdout
        failed = ctl("restore", path, "-o", tmp_path / "out", code=None)
        assert failed.code in (DAMAGED, BROKEN)
        assert not list(tmp_path.glob("out/*.qcow2"))
    stream.write_bytes(sound)
    (path / "vdb.full.data.partial").write_bytes(b"meta")
    assert verify(ctl, path)["sound"]


def test_stream_versions(
    made: PeerSets, chain: tuple[Path, dict[str, str]], ctl: Ctl, tmp_path: Path
) -> None:
    """Version 1 is read as 2 is, a newer one is refused."""
    path = shutil.copytree(chain[0], tmp_path / "a set")
    for file in path.glob("*.chksum"):
        file.unlink()
    for version in (b"1", b"3"):
        for file in path.glob("*.data"):
            data = file.read_bytes()
            file.write_bytes(re.sub(rb'("streamVersion": )\d', rb"\g<1>" + version, data, count=1))
        if version == b"1":
            made.check(ctl, path, "inc.virtnbdbackup.2", chain[1]["inc.virtnbdbackup.2"], TWO)
    told = ctl("restore", path, "-o", tmp_path / "out", code=BROKEN).stderr
    assert "written by a newer program" in told


def test_copies_raw_disks_and_archives(made: PeerSets, ctl: Ctl, tmp_path: Path) -> None:
    made.check(ctl, made.directory / "copy", "copy", "now")
    made.check(ctl, made.directory / "bare", "copy", "now", TWO)
    listed = ctl("list", made.directory / "bare", "--json").json
    assert [skip["target"] for skip in listed["points"][0]["skipped"]] == ["vdc"]
    assert any("nothing says when" in warning for warning in listed["warnings"])
    archive = made.directory / "stdout.zip"
    assert ctl("list", archive, "--json").json["points"][0]["domain"] == made.guest.name
    assert verify(ctl, archive)["sound"]
    made.check(ctl, archive, "copy", "now", TWO)
    into = tmp_path / "from archive"
    ctl("import", archive, "-o", into, code=None)
    made.check(ctl, into, "copy", "now", TWO)
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(archive, unpacked, "zip")
    made.check(ctl, unpacked, "copy", "now", TWO)
    broken = tmp_path / "broken.zip"
    data = bytearray(archive.read_bytes())
    data[5000] ^= 1
    broken.write_bytes(data)
    told = ctl("import", broken, "-o", tmp_path / "other", code=DAMAGED).stderr
    assert "CRC" in told
    ctl("verify", broken, code=DAMAGED)
    assert {each.name for each in (tmp_path / "other").iterdir()} <= {".lock"}


def test_import(
    made: PeerSets, chain: tuple[Path, dict[str, str]], ctl: RiggedCtl, tmp_path: Path
) -> None:
    path = shutil.copytree(chain[0], tmp_path / "a set")
    before = content(path)
    report = ctl("import", path, "--json", code=None).json
    assert report["imported"]
    after = content(path)
    assert {name: data for name, data in after.items() if name in before} == before
    assert not ctl("import", path, "--json").json["imported"]
    assert content(path) == after
    ctl("verify", path)
    for point in ("full", "inc.virtnbdbackup.2"):
        made.check(ctl, path, point, chain[1][point], TWO)
    # now a SHA-256 finds what nothing else could
    stream = path / "vdb.full.data"
    data = bytearray(stream.read_bytes())
    data[data.index(b"data 00") + 200] ^= 1
    stream.write_bytes(data)
    told = ctl("verify", path, code=DAMAGED).stdout
    assert "vdb.full.data at byte" in told
    # the peer can still read what it wrote
    linked = tmp_path / "linked"
    ctl("import", chain[0], "-o", linked, "--link", code=None)
    assert (linked / "vda.full.data").stat().st_nlink > 1
    dumped = json.loads(made.peer.restore("-i", linked, "-o", "dump"))
    assert len(dumped) == 2 * len(chain[1])
    # frames that hold several blocks, and a full of fewer ranges than the disk has
    ctl("merge", linked, "--point", "inc.virtnbdbackup.2")
    kept = {point: name for point, name in chain[1].items() if point != "full"}
    del kept["inc.virtnbdbackup.1"]
    assert {each["id"] for each in ctl.points(linked)} == set(kept)
    for point, name in kept.items():
        made.check(ctl, linked, point, name, TWO)
    ctl("verify", linked)


@pytest.mark.parametrize(
    "fault",
    [
        "KILL@peer-index-written#3",
        "KILL@os-rename#1",
        "KILL@os-rename#4",
        "KILL+@file-replaced#2",
        "EIO@os-rename#3",
        "NOSPACE@file-created#4",
    ],
)
def test_interrupted_import(made: PeerSets, ctl: RiggedCtl, tmp_path: Path, fault: str) -> None:
    source = made.directory / "copy"
    path = shutil.copytree(source, tmp_path / "a set")
    before = content(path)
    with ctl.rigged(fault):
        failed = ctl("import", path, code=None)
    assert failed.code not in (0, WARNED)
    assert ctl("list", path, "--json").json["written_by"] == "virtnbdbackup"
    made.check(ctl, path, "copy", "now")
    if "KILL" not in fault:
        assert content(path) == before
    assert {name: data for name, data in content(path).items() if name in before} == before
    ctl("import", path, code=WARNED)
    ctl("verify", path)
    assert not (path / ".import").exists()


def content(path: Path) -> dict[str, bytes]:
    """All files of a set but locks."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name not in {".lock", ".reading"}
    }


def test_an_increment_that_was_replaced_is_named(made: PeerSets, ctl: Ctl) -> None:
    """Off, the peer gives an increment the name of the one that made the checkpoint."""
    guest = made.guest
    made.note("offline-0")
    path = made.run("full", "offline")
    guest.write("vda", 0, MIB, 0x77)
    made.note("offline-1")
    guest.stop()
    made.run("inc", "offline")
    # on the full's checkpoint it replaces nothing
    made.check(ctl, path, "inc.virtnbdbackup.0", "offline-1", TWO)
    made.check(ctl, path, "full", "offline-0", TWO)
    guest.start()
    made.run("inc", "offline")
    made.check(ctl, path, "inc.virtnbdbackup.1", "offline-1", TWO)
    guest.stop()
    made.run("inc", "offline")
    told = ctl("list", path, "--json", code=DAMAGED).json
    assert [point["id"] for point in told["points"]] == ["full", "inc.virtnbdbackup.0"]
    assert "was replaced by one of the same name" in told["problems"][0]
    told = ctl("import", path, code=BROKEN).stderr
    assert "import --sound" in told
    rest = made.directory / "rest"
    ctl("import", path, "-o", rest, "--sound", code=WARNED)
    ctl("verify", rest)
    made.check(ctl, rest, "inc.virtnbdbackup.0", "offline-1", TWO)
    guest.start()


def test_extents_of_several_requests(
    lab: DaemonLab, made: PeerSets, ctl: Ctl, tmp_path: Path
) -> None:
    """An extent of more than QEMU's 32 MiB for a request is several lz4 frames."""
    guest = lab.guest(f"large {lab.directory.name}{id(made)}", [DiskSpec(size=48 * MIB)])
    guest.start()
    try:
        sets = PeerSets(peer=made.peer, guest=guest, directory=tmp_path, scratch=made.scratch)
        sets.fill("vda", MIB, 36 * MIB)
        sets.note("now")
        path = sets.run("full", "set", "-z")
        assert re.search(rb'\[{"\d+": \[\d+, \d+\]}', (path / "vda.full.data").read_bytes()[-200:])
        sets.check(ctl, path, "full", "now")
        ctl("import", path, code=None)
        ctl("verify", path)
        sets.check(ctl, path, "full", "now")
    finally:
        guest.close()


@pytest.mark.parametrize("imported", [False, True])
def test_map(
    made: PeerSets, chain: tuple[Path, dict[str, str]], ctl: Ctl, tmp_path: Path, *, imported: bool
) -> None:
    path, points = chain
    if imported:
        path = tmp_path / "imported"
        ctl("import", chain[0], "-o", path, "--link", code=None)
    socket = tmp_path / "socket"
    with ctl.start("map", path, "--point", "inc.virtnbdbackup.2", "-d", "vda",
                   "--socket", socket) as served:  # fmt: skip
        assert served.stdout is not None
        assert served.stdout.readline()  # all servers listen
        uri = f"nbd+unix:///?socket={socket}"
        reference = made.references[points["inc.virtnbdbackup.2"]]["vda"]
        assert "identical" in run(["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, reference])
        served.terminate()
        served.wait(20)


@pytest.mark.parametrize("style", ["--as-chain", "--as-snapshots"])
def test_several_points_in_one_restore(
    made: PeerSets, chain: tuple[Path, dict[str, str]], ctl: RiggedCtl, tmp_path: Path, style: str
) -> None:
    path, points = chain
    report = ctl("restore", path, "-o", tmp_path / "out", style, "--json", code=None).json
    for disk in report["disks"]:
        # the full and its three increments
        assert len(disk["points"]) == 4
        images = [*disk["images"], disk["path"]]
        for number, point in enumerate(disk["points"]):
            raw = tmp_path / "raw"
            argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"]
            argv += [] if disk["images"] else ["-l", f"snapshot.name={point}"]
            run([*argv, images[number if disk["images"] else 0], raw])
            reference = made.references[points[point]][disk["target"]]
            assert first_difference_raw(raw, reference) is None, (point, disk["target"])
