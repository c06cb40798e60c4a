"""Levels, disks and options of ``backup``, and what it refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lib.scene import WARNED, Saved, Scene, assert_same, scene, scene_of

pytestmark = pytest.mark.system
KIB = 1024
USAGE, CONFIG, DOMAIN, REPOSITORY = 2, 10, 20, 50


@pytest.fixture(scope="module")
def guest(lab: DaemonLab) -> Guest:
    """A guest whose disks no test changes but by writing."""
    iso = lab.images / "cd.iso"
    iso.write_bytes(bytes(MIB))
    disks = [
        DiskSpec(target="vda", size=16 * MIB),
        DiskSpec(target="vdb", size=8 * MIB),
        DiskSpec(target="vdc", size=4 * MIB, format="raw"),
        DiskSpec(target="hda", device="cdrom", format="raw", path=iso),
        DiskSpec(target="hdb", device="cdrom", format="raw"),
        DiskSpec(target="fda", device="floppy", format="raw"),
    ]
    guest = lab.guest("shared", disks)
    guest.start()
    return guest


@pytest.fixture
def here(lab: DaemonLab, guest: Guest, tmp_path: Path) -> Iterator[Scene]:
    """The shared guest, with sets of the test's own."""
    guest.write("vda", 0, 3 * MIB, 0xA1)
    guest.write("vdb", MIB, MIB, 0xB1)
    guest.write("vdc", MIB, MIB, 0xC1)
    here = scene_of(lab, tmp_path, guest)
    here.always = ("-x", "vdc")
    yield here
    for name in here.checkpoints():
        lab.virsh("checkpoint-delete", "--domain", guest.name, name)


def test_levels_make_one_chain(here: Scene) -> None:
    for level in ("inc", "diff"):
        assert "needs a full first" in here.refuse("-l", level, code=REPOSITORY)
    copy = here.save("-l", "copy")
    assert (copy.point["level"], copy.point["checkpoint"]) == ("copy", "")
    # a copy is no base
    assert "needs a full first" in here.refuse("-l", "inc", code=REPOSITORY)
    full = here.save("--chain", "mine_1")
    assert full.point["level"] == "full"
    assert here.checkpoints() == [full.point["checkpoint"]] == [f"nbdbackup.mine_1.{full.id}"]
    assert "of this set is mine_1, not weekly" in here.refuse("--chain", "weekly", code=CONFIG)
    assert "already holds a full" in here.refuse("-l", "full", code=REPOSITORY)

    here.guest.write("vda", 5 * MIB, 64 * KIB, 1)
    diff = here.save("-l", "diff")
    assert (diff.point["level"], diff.point["checkpoint"]) == ("diff", "")
    assert diff.point["parent"] == full.id
    here.guest.write("vda", 6 * MIB, 64 * KIB, 2)
    second = here.save("-l", "diff")
    inc = here.save("-l", "inc")
    # only the newest base is kept at libvirt
    assert here.checkpoints() == [inc.point["checkpoint"]]
    # neither differential was a step: both writes are in each that follows
    assert data_bytes(diff) == {"vda": 64 * KIB, "vdb": 0}
    assert data_bytes(second) == data_bytes(inc) == {"vda": 128 * KIB, "vdb": 0}
    assert inc.point["parent"] == full.id
    here.save("-l", "copy")
    here.guest.write_zeroes("vda", 0, MIB, unmap=True)
    auto = here.save()
    assert (auto.point["level"], auto.point["parent"]) == ("inc", inc.id)
    assert (auto.disk("vda")["data_bytes"], auto.disk("vda")["zero_bytes"]) == (0, MIB)
    last = here.save("-l", "diff")
    assert data_bytes(last) == {"vda": 0, "vdb": 0}
    here.prove_all()


def data_bytes(saved: Saved) -> dict[str, int]:
    return {disk["target"]: disk["data_bytes"] for disk in saved.point["disks"]}


def test_directories_that_are_no_place_for_a_set(
    here: Scene, lab: DaemonLab, tmp_path: Path
) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "holiday.jpg").write_bytes(b"x")
    assert "holiday.jpg" in here.refuse(code=REPOSITORY, into=strange)
    peer = tmp_path / "peer"
    (peer / "checkpoints").mkdir(parents=True)
    for name in ("vda.full.data", "vda.full.data.chksum", "shared.cpt", "vmconfig.virtnbdbackup.0"):
        (peer / name).write_bytes(b"x")
    for level in ("auto", "full", "copy", "inc"):
        assert "virtnbdbackup" in here.refuse("-l", level, code=REPOSITORY, into=peer)
    assert "no directory" in here.refuse(code=REPOSITORY, into=strange / "holiday.jpg")
    full = here.save()
    with scene(lab, tmp_path / "other", "other") as other:
        said = other.refuse(code=REPOSITORY, into=here.set)
        assert full.point["uuid"] in said
        for level in ("inc", "copy"):
            other.refuse("-l", level, code=REPOSITORY, into=here.set)
        other.guest.stop()
        assert full.point["uuid"] in other.refuse(code=REPOSITORY, into=here.set)
    here.prove_all()


def test_unknown_domain(here: Scene, tmp_path: Path) -> None:
    done = here.ctl("backup", "nobody's", "-o", tmp_path / "set", code=DOMAIN)
    assert "no domain nobody's" in done.stderr
    assert not (tmp_path / "set").exists()


def test_disks_are_chosen_and_listed(here: Scene) -> None:
    full = here.save("-x", "vdb", code=WARNED)
    assert full.modes == {"vda": "full"}
    assert [each for each in full.warnings if "vdc" not in each] == []
    assert full.skipped["vdb"] == "excluded by request"
    assert full.skipped["hda"] == "a CD-ROM drive"
    assert full.skipped["hdb"] == full.skipped["fda"] == "an empty drive"
    assert "--raw" in full.skipped["vdc"]
    text = here.ctl("backup", "shared", "-o", here.set, "-x", "vdb", code=WARNED).stdout
    assert "left out hda: a CD-ROM drive" in text
    for options, said in (
        (("-x", "vdz"), "has no disk vdz"),
        (("-i", "vda", "-x", "vda"), "both included and excluded"),
        (("-i", "hdb"), "an empty drive"),
        (("-i", "vdc"), "--raw"),
    ):
        assert said in here.refuse(*options, code=USAGE)
    assert "no disk to save" in here.refuse("-x", "vda,vdb", code=DOMAIN)


def test_a_disk_that_is_left_out_once_comes_back_in_full(here: Scene) -> None:
    here.save()
    here.guest.write("vdb", 0, 64 * KIB, 5)
    here.guest.write("vda", 0, 64 * KIB, 5)
    without = here.save("-i", "vda")
    assert without.modes == {"vda": "delta"}
    assert without.skipped["vdb"] == "not among the requested disks"
    here.guest.write("vdb", 4 * MIB, 64 * KIB, 6)
    back = here.save(code=WARNED)
    assert back.modes == {"vda": "delta", "vdb": "full"}
    assert without.id in back.reasons["vdb"]
    after = here.save()
    assert after.modes == {"vda": "delta", "vdb": "delta"}
    here.prove_all()


def test_raw_disks_are_read_in_full_at_the_same_instant(here: Scene) -> None:
    full = here.save("--raw", "-z")
    assert full.modes == {"vda": "full", "vdb": "full", "vdc": "full"}
    for number in (1, 2):
        here.guest.write("vda", 0, 64 * KIB, number)
        here.guest.write("vdc", 0, 64 * KIB, number)
        inc = here.save("-i", "vda,vdc", "--raw")
        assert inc.modes == {"vda": "delta", "vdc": "full"}
        assert not inc.reasons
    # what is not there any more, though nobody excluded it, is said
    lost = here.save("-x", "vdb", code=WARNED)
    assert "disk vdc is part of" in lost.warnings[0]
    assert "left out now: it is a raw image" in lost.warnings[0]
    here.prove_all()


def test_points_of_disks_that_nothing_tracks(here: Scene, tmp_path: Path) -> None:
    full = here.save("--raw")
    here.guest.write("vda", 0, 64 * KIB, 1)
    here.guest.write("vdc", 0, 64 * KIB, 1)
    leaf = here.save("--raw", "-i", "vdc")
    assert (leaf.point["level"], leaf.point["checkpoint"]) == ("inc", "")
    # it lost nothing of the other disks: their base is what it was
    inc = here.save("--raw")
    assert inc.point["parent"] == full.id
    assert inc.modes == {"vda": "delta", "vdb": "delta", "vdc": "full"}
    assert data_bytes(inc)["vda"] == 64 * KIB
    # and a set may hold nothing else
    raw = tmp_path / "raw"
    for level in ("full", "auto", "inc", "diff", "copy", "auto"):
        here.guest.write("vdc", MIB, 64 * KIB, len(here.history))
        only = here.save("--raw", "-i", "vdc", "-l", level, into=raw)
        assert (only.modes, only.point["checkpoint"]) == ({"vdc": "full"}, "")
        assert only.point["level"] == ("inc" if level == "auto" else level)
    assert "already holds a full" in here.refuse("-l", "full", code=REPOSITORY, into=raw)
    told = here.ctl("estimate", "shared", "-o", raw, "--json").json["disks"]
    assert {disk["target"]: (disk["mode"], disk["bytes"]) for disk in told} == {
        "vdc": ("full", 4 * MIB)
    }
    assert set(here.save("--raw", into=raw, code=WARNED).reasons) == {"vda", "vdb"}
    assert here.save("--raw", into=raw).modes == inc.modes
    here.prove_all()


def test_images_as_they_are(here: Scene) -> None:
    for options in (("-l", "full"), ("-l", "copy", "-z"), ()):
        assert "-l copy" in here.refuse("-t", "raw", *options, code=USAGE)
    saved = here.save("-l", "copy", "-t", "raw", "--raw")
    images = sorted(here.set.glob("vd?.*.raw")) or sorted(here.set.glob("vd?.*"))
    for target in ("vda", "vdb", "vdc"):
        (image,) = (
            path
            for path in images
            if path.name.startswith(f"{target}.") and path.stat().st_size >= 4 * MIB
        )
        assert_same(image, "raw", saved.references[target])
        assert image.stat().st_blocks * 512 < saved.disk(target)["size"]
    here.save()
    here.prove_all()


def test_nbdinfo_finds_the_same_extents(here: Scene) -> None:
    """Where an iothread serves a disk, no program that leaves first is let in (G-1)."""
    here.save()
    if here.guest.iothreads:
        assert "'--extents own'" in here.refuse("-l", "diff", "--extents", "nbdinfo", code=DOMAIN)
        return
    guest = here.guest
    guest.write("vda", 64 * KIB, 700 * KIB, 7)
    guest.write_zeroes("vda", MIB, MIB, unmap=True)
    guest.discard("vdb", MIB, 256 * KIB)
    guest.write("vdb", 3 * MIB + 512, 512, 9)
    for level in ("copy", "diff"):
        own = here.save("-l", level)
        other = here.save("-l", level, "--extents", "nbdinfo")
        assert indexes(here, own) == indexes(here, other)
        assert any(indexes(here, own).values())
    here.prove_all()


def indexes(here: Scene, saved: Saved) -> dict[str, bytes]:
    """The records of each disk's index: offset, length, place, kind and digest of each block."""
    report = here.ctl("show", saved.set, "--point", saved.id, "--json").json
    return {
        disk["target"]: (saved.set / disk["index"]["name"]).read_bytes()
        for disk in report["points"][0]["disks"]
    }


def test_compression(here: Scene) -> None:
    for level in ("0", "17", "-1", "zstd:20", "zip"):
        here.ctl("backup", "shared", "-o", here.set, f"-z{level}", code=USAGE)
    plain = here.save()
    here.guest.write("vda", 0, 2 * MIB, 3)
    packed = here.save("-z")
    assert packed.disk("vda")["compressed"]
    assert packed.disk("vda")["stored_bytes"] < packed.disk("vda")["data_bytes"] / 4
    here.guest.write("vda", MIB, 2 * MIB, 4)
    here.save("-z", "16", "-w", "1")
    here.guest.write("vda", MIB, MIB, 5)
    unpacked = here.save("--no-compress")
    assert not unpacked.disk("vda")["compressed"]
    assert plain.disk("vda")["stored_bytes"] > 3 * MIB
    here.prove_all()


def test_digests(here: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind and each codec in one chain of a running guest; without one, SHA-256."""
    # Debian 12 has no BLAKE3 for its own Python
    # of PyPI; Debian 13 has no package of it
    blake3 = pytest.importorskip("blake3")
    libraries = Path(blake3.__file__).parents[1]
    monkeypatch.setitem(here.ctl.environment, "PYTHONPATH", str(libraries))
    here.ctl("backup", "shared", "-o", here.set, "--digest", "md5", code=USAGE)
    kinds = ["sha256", "blake3", "xxh128", "blake3", "sha256"]
    codecs = ["none", "zstd", "lz4", "zstd:19", "zstd:3"]
    for number, (kind, codec) in enumerate(zip(kinds, codecs, strict=True)):
        here.guest.write("vda", number * MIB, 2 * MIB, number + 3)
        saved = here.save("--digest", kind, *(["-z", codec] if number else []))
        disk = saved.disk("vda")
        assert (disk["digest"], disk["codec"]) == (kind, codec.partition(":")[0])
    here.guest.write("vda", MIB, MIB, 9)
    assert here.save().disk("vda")["digest"] == "sha256"
    here.prove_all()


def test_threshold(here: Scene) -> None:
    full = here.save("--threshold", "1G")
    here.guest.write("vda", 0, 3 * 64 * KIB, 8)
    options = ("backup", "shared", "-o", here.set, "--threshold")
    skipped = here.ctl(*options, "193K", "--json").json
    assert (skipped["result"], skipped["point"]) == ("skipped", None)
    assert "196608" in skipped["reason"]
    assert "nothing saved" in here.ctl(*options, "1M").stdout
    assert [point["id"] for point in here.ctl.points(here.set)] == [full.id]
    assert here.checkpoints() == [full.point["checkpoint"]]
    here.assert_clean()
    inc = here.save("--threshold", "192K")
    assert inc.disk("vda")["data_bytes"] == 3 * 64 * KIB
    here.prove_all()


def test_a_cd_that_is_named_is_saved(here: Scene) -> None:
    """L-7: whoever names a drive wants its medium."""
    for expected in ("full", "delta"):
        saved = here.save("-i", "vda,hda")
        assert saved.modes == {"vda": expected, "hda": "full"}
        restored = here.ctl.restore(here.set, here.directory / expected, "--format", "raw")
        assert restored["hda"].read_bytes() == bytes(MIB)


def test_one_missing_image_does_not_sink_the_rest(lab: DaemonLab, tmp_path: Path) -> None:
    """L-7: the other disks and the definition are saved, and the run is no success."""
    disks = [DiskSpec(target="vda", size=4 * MIB), DiskSpec(target="vdb", size=4 * MIB)]
    with scene(lab, tmp_path, "missing", disks) as here:
        here.guest.write("vda", 0, MIB, 3)
        here.guest.stop()
        away = here.guest.image("vdb").rename(tmp_path / "away")
        here.guest.disks.pop("vdb")
        saved = here.save(code=WARNED)
        assert saved.modes == {"vda": "full"}
        (warning,) = saved.warnings
        assert "disk vdb is not saved: it is a disk whose image can't be read" in warning
        assert "No such file" in warning
        assert "warnings are errors (strict)" in here.refuse("--strict", code=DOMAIN)
        assert here.save("-x", "vdb").modes == {"vda": "delta"}
        here.prove_all()
        away.rename(here.guest.image("vda").with_name(away.name))


def test_old_and_foreign_formats(lab: DaemonLab, tmp_path: Path) -> None:
    disks = [
        DiskSpec(target="vda", size=4 * MIB),
        DiskSpec(target="vdb", size=4 * MIB, compat="0.10"),
        DiskSpec(target="vdc", size=4 * MIB, format="vmdk"),
    ]
    with scene(lab, tmp_path, "formats", disks) as here:
        for target in here.guest.disks:
            here.guest.write(target, 0, MIB, 9)
        for expected in ("full", "delta"):
            here.guest.write("vda", 0, MIB, 8)
            told = here.save(code=WARNED, into=tmp_path / "whole")
            assert told.modes == {"vda": expected, "vdb": "full", "vdc": "full"}
            first, second = told.warnings
            assert "vdb is read in full: qcow2 of version 2 holds no bitmaps" in first
            assert f"'qemu-img amend -f qcow2 -o compat=1.1 {here.guest.image('vdb')}'" in first
            assert "vdc is read in full: format vmdk holds no bitmaps" in second
            refusal = here.refuse("--strict", code=DOMAIN, into=tmp_path / "whole")
            assert "warnings are errors (strict)" in refusal
        for saved in here.history:
            here.prove(saved, "--format", "raw")
        copy = here.save("-l", "copy")
        assert copy.modes == {"vda": "full", "vdb": "full", "vdc": "full"}
        here.prove(copy, "--format", "raw")
        here.prove(copy, "--format", "qcow2")
        here.save("-x", "vdb,vdc")
        here.guest.write("vda", 0, MIB, 10)
        inc = here.save("-x", "vdb,vdc")
        assert inc.modes == {"vda": "delta"}
        here.prove(inc)
        here.verify()
