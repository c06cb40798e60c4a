"""``list`` and ``show`` on real sets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.errors import ChainBrokenError, FormatError, IntegrityError, RepositoryError
from nbdbackupd.model.chain import DiskMode, Layout, Level
from nbdbackupd.model.proof import Proof, content_of
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.sets import catalog, sizes
from nbdbackupd.repo import verified
from nbdbackupd.units import human_size
from tests.lib import chains, points


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository") / "vm1/set"
    path.parent.mkdir()
    chains.make_chain(path, 1)
    chains.add_point(path, 3, Level.DIFF)
    return path


def test_list_as_json(path: Path) -> None:
    document = json.loads(json.dumps(catalog.list_points(path).to_json()))
    assert document["version"] == 1
    assert [point["id"] for point in document["points"]] == ["p1", "p2", "p3"]
    assert [point["level"] for point in document["points"]] == ["full", "inc", "diff"]
    assert [point["parent"] for point in document["points"]] == ["", "p1", "p2"]
    newest = document["points"][2]
    assert newest["warnings"] == ["freeze failed"]
    assert newest["checkpoint"] == ""
    assert newest["created"] == "2026-01-31T23:59:59Z"
    assert newest["consistency"] == "crash"
    sizes = [
        file.stat().st_size for file in path.glob("*.p3.*") if not file.name.endswith(".chksum")
    ]
    assert newest["stored_bytes"] == sum(sizes)
    assert document["stored_bytes"] == sum(point["stored_bytes"] for point in document["points"])
    disk = newest["disks"][0]
    assert (disk["target"], disk["mode"], disk["size"]) == ("vda", "delta", 1 << 20)
    assert (disk["data_bytes"], disk["zero_bytes"]) == (4096, 4096)


def test_list_as_text(path: Path) -> None:
    lines = catalog.render_list(catalog.list_points(path)).splitlines()
    assert "vm1, 3 restore points" in lines[0]
    heads = [line for line in lines if line[:1].isdigit()]
    column = lines[2].index("LEVEL")
    assert [line[column:].split()[0] for line in heads] == ["full", "inc", "diff"]
    assert lines[2].index("CHECKPOINT") == heads[0].index("nbdbackup-")
    assert sum("! freeze failed" in line for line in lines) == 3
    disks = [line for line in lines if " zero " in line]
    assert len(disks) == 6
    assert len({line.index("data ") for line in disks}) == 1
    assert not any(line.endswith(" ") for line in lines)


def test_a_time_line(tmp_path: Path) -> None:
    """What bases on what, whatever lies between; a copy bases on nothing."""
    levels = (Level.FULL, Level.DIFF, Level.INC, Level.COPY, Level.DIFF, Level.INC, Level.DIFF)
    for number, level in enumerate(levels, 1):
        chains.add_point(tmp_path, number, level)
    report = catalog.list_points(tmp_path, proofs=True)
    known = {point.id: point for point in report.points}
    verified.write(
        tmp_path,
        Proof(point="p1", content=content_of(known["p1"]), verified="2026-02-01T00:00:00Z", size=9),
    )
    bad = Proof(
        point="p3", content=content_of(known["p3"]), verified="2026-02-01T00:00:00Z", size=9,
        damage=("a block of vda\x1b[2J",),
    )  # fmt: skip
    verified.write(tmp_path, bad)
    report = catalog.list_points(tmp_path, proofs=True)
    report = replace(report, retention={"p1": "last 7", "p4": "removed"})
    lines = catalog.render_tree(report).splitlines()
    assert "vm1, 7 restore points" in lines[0]
    cells = [line.split() for line in lines[3:10]]
    assert [line[:4].strip() for line in lines[3:10]] == ["*", "|-*", "*", "| *", "|-*", "*", "`-*"]
    assert [each[2] for each in cells if each[0] == "*"] == ["p1", "p3", "p6"]
    bases = [line[lines[2].index("BASE") :].split()[0] for line in lines[3:10]]
    assert bases == ["-", "1", "1", "-", "3", "3", "6"]
    assert [line.rsplit("  ", 1)[1] for line in lines[3:7]] == ["last 7", "-", "-", "removed"]
    column = lines[2].index("VERIFIED")
    states = [line[column:].split()[0] for line in lines[3:10]]
    # a copy hangs on nothing, and was never looked at
    assert states == ["2026-02-01", "-", "damaged", "-", "damaged", "damaged", "damaged"]
    assert lines[10:] == [r"! point p3 is damaged: a block of vda\x1b[2J"]
    document = report.to_json()
    assert document["verified"] == {"p1": "2026-02-01T00:00:00Z"}
    assert list(document["damage"]) == ["p3", "p5", "p6", "p7"]
    empty = catalog.ListReport(path=Path("/b"), points=())
    assert catalog.render_tree(empty).endswith("no restore points yet")


def test_a_reason_that_a_warning_tells_is_listed_once() -> None:
    whole, raw = (
        replace(points.full_point().disks[0], target=target, reason=reason)
        for target, reason in (("vda", "its bitmap is lost"), ("vdb", "it is raw"))
    )
    warning = f"disk vda is read in full: {whole.reason}"
    point = replace(points.full_point(), disks=(whole, raw), warnings=(warning,))
    text = catalog.render_list(catalog.ListReport(path=Path("/b"), points=(point,)))
    assert text.count(whole.reason) == 1
    assert f"! {warning}" in text
    assert "(it is raw)" in text


def test_show(path: Path) -> None:
    report = catalog.show(path)
    document = json.loads(json.dumps(report.to_json()))
    first = document["points"][0]
    assert first["files"][0]["role"] == "domain-xml"
    assert first["skipped"] == [{"target": "sda", "reason": "cdrom"}]
    assert first["disks"][0]["index"]["sha256"]
    assert first["disks"][0]["stream"]["virtualSize"] == 1 << 20
    assert first["disks"][0]["stream"]["dataSize"] == 4096
    assert first["digest"] == document["points"][1]["parent_digest"]
    text = catalog.render_show(report)
    for word in (
        "restore point p3",
        "checkpointName: nbdbackup-",
        "- target: vdb",
        "autostart: yes",
    ):
        assert word in text
    assert "parent: \n" not in text


def test_show_of_one_point(path: Path) -> None:
    assert [point.id for point in catalog.show(path, "latest").points] == ["p3"]
    assert set(catalog.show(path, "p1").metas) == {"vda.full.data", "vdb.full.data"}
    with pytest.raises(RepositoryError, match="'p9'"):
        catalog.show(path, "p9")


def test_show_names_a_damaged_stream(tmp_path: Path) -> None:
    chains.make_chain(tmp_path, 0)
    stream = tmp_path / "vdb.full.data"
    stream.write_bytes(b"x" + stream.read_bytes()[1:])
    with pytest.raises(FormatError, match=r"vdb\.full\.data"):
        catalog.show(tmp_path)
    stream.unlink()
    with pytest.raises(RepositoryError, match=r"vdb\.full\.data"):
        catalog.show(tmp_path)
    assert len(catalog.list_points(tmp_path).points) == 1


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no backup set at"):
        catalog.list_points(tmp_path / "absent")
    report = catalog.list_points(tmp_path)
    assert report.to_json()["points"] == []
    assert "no restore points" in catalog.render_list(report)
    assert "no restore points" in catalog.render_show(catalog.show(tmp_path))
    (tmp_path / "vda.full.data").touch()
    # the name is virtnbdbackup's, the content is not
    (problem,) = catalog.list_points(tmp_path).problems
    assert "stream ends too early" in problem
    assert "vda.full.data" in problem
    with pytest.raises(ChainBrokenError, match="stream ends too early"):
        catalog.show(tmp_path)


@pytest.mark.parametrize(
    ("damaged", "sound"),
    [("000003-p3.json", ["p1", "p2"]), ("000002-p2.json", ["p1"]), ("000001-p1.json", [])],
)
def test_a_damaged_manifest_is_named_and_the_sound_points_are_listed(
    tmp_path: Path, damaged: str, sound: list[str]
) -> None:
    chains.make_chain(tmp_path, 2)
    manifest = tmp_path / "points" / damaged
    manifest.write_bytes(manifest.read_bytes().replace(b"vm1", b"vm2"))
    report = catalog.list_points(tmp_path)
    assert [point.id for point in report.points] == sound
    assert damaged in report.problems[0]
    # each point that hangs on it is named as well
    assert len(report.problems) == 3 - len(sound)
    with pytest.raises(IntegrityError, match=damaged):
        catalog.show(tmp_path)


def test_hostile_texts_reach_no_terminal() -> None:
    disk = replace(points.full_point().disks[0], reason="lost\x1b[31m\n\udcff", mode=DiskMode.DELTA)
    raw = replace(disk, target="vdb", layout=Layout.RAW, file_size=1 << 50, index=disk.index)
    point = replace(
        points.full_point(), disks=(disk, raw), domain="vm\x1b]0;x\x07", warnings=("a\rb",)
    )
    report = catalog.ListReport(path=Path("/b\udce4\x1b"), points=(point,))
    show = catalog.ShowReport(
        path=report.path, points=report.points, sizes=own_bytes(report.points)
    )
    for text in (catalog.render_list(report), catalog.render_show(show)):
        assert text.replace("\n", "").isprintable()
        text.encode()
        assert r"lost\x1b[31m\n\xff" in text
    assert json.dumps(report.to_json()).isascii()
    assert report.to_json()["points"][0]["disks"][1]["stored_bytes"] == 4096 + 5


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (200 << 30, "200 GiB"),
        (1 << 60, "1048576 TiB"),
    ],
)
def test_human_size(size: int, text: str) -> None:
    assert human_size(size) == text


def test_sizes(path: Path) -> None:
    """What is told is what the files take; of all domains, or of a set."""
    one = sizes.of_sets([path])
    document = one.to_json()
    kept = [each for each in path.rglob("*") if each.suffix in (".data", ".index", ".xml")]
    assert document["total"] == sum(each.stat().st_size for each in kept)
    (found,) = document["sizes"]
    assert (found["points"], found["path"]) == (3, str(path))
    assert found["full"] + found["increments"] + found["others"] == found["total"]
    assert min(found["full"], found["increments"], found["others"]) > 4096
    (place,) = document["file_systems"]
    assert 0 < place["free"] < place["size"]
    assert len(sizes.rows(one)) == 2
    odd = path.parent.parent / "vm2/set"
    odd.mkdir(parents=True)
    (odd / "points").symlink_to(path / "points")
    everything = sizes.of_repositories([path.parent.parent, path / "nothing"])
    (problem,) = everything.problems
    assert str(odd) in problem
    assert found["total"] in [each.total for each in everything.sizes]
    assert len(sizes.rows(sizes.of_sets([path, path]))) == 4
    with pytest.raises(RepositoryError):
        sizes.of_sets([path / "nothing"])
