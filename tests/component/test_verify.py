"""Verify finds any damage and names it; restore then fails too, or is exact without that byte."""

import itertools
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.errors import (
    FormatError,
    Interrupted,
    NbdbackupError,
    RepositoryError,
    UsageError,
)
from nbdbackupd.format.index import HEADER, RECORD, Index, Kind
from nbdbackupd.format.stream import StreamReader
from nbdbackupd.model.chain import DiskMode, Level
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.restore import RestoreRequest
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.findings import MAX_PER_FILE
from nbdbackupd.ops.verify.verify import VerifyReport, VerifyRequest
from nbdbackupd.repo import layout
from tests.lib import sets
from tests.lib.ctl import Ctl
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
KINDS = ("plain", "lz4", "raw")


def built(path: Path, kind: str) -> SetBuilder:
    rng = random.Random(3)
    made = SetBuilder(path, level=1 if kind == "lz4" else None, raw=kind == "raw", block=16 * KIB)
    disk = bytearray(256 * KIB)
    sets.apply(disk, sets.random_changes(rng, 256 * KIB, 4))
    made.disks = {"vda": disk, "vdb": bytearray(b"compressible " * 5000)[: 64 * KIB]}
    made.full()
    if kind != "raw":
        made.inc({"vda": sets.random_changes(rng, 256 * KIB, 6), "vdb": [Change(512, 4096)]})
        made.inc({"vda": [Change(0, b"n" * 512)]}, level=Level.DIFF)
    return made


def check(path: Path, **options: object) -> VerifyReport:
    request = VerifyRequest(path=path, **options)  # type: ignore[arg-type]
    return verify.run(request, progress=lambda *_: None, cancelled=lambda: None)


def rebuilt(made: SetBuilder, out: Path) -> None:
    """Restore the newest point and compare it."""
    request = RestoreRequest(source=made.path, output=out, format="raw", force=True)
    report = restore.run(request, progress=lambda *_: None, cancelled=lambda: None)
    for disk in report.disks:
        assert disk.path.read_bytes() == made.images[-1][disk.target]


def all_files(made: SetBuilder) -> list[Path]:
    return sorted(path for path in made.path.rglob("*") if path.is_file())


def structure(path: Path) -> set[int]:
    """One byte of each kind of region of a file: frames, payloads, terminators, trailer, ends."""
    size = path.stat().st_size
    found = {0, size - 1, size // 2}
    if path.suffix == ".data":
        with StreamReader(path) as reader:
            for frame in reader.frames():
                found |= {frame.header + part for part in (0, 4, 10, 21, 30, 38, 39)}
                found |= {frame.position, frame.position + frame.stored // 2}
                found |= {frame.position + frame.stored, frame.position + frame.stored + 1}
        found |= {10, 30, 41, 60, size - 2, size - 30, size - 41, size - 45}
    if path.suffix == ".index":
        found |= set(range(HEADER.size)) | {HEADER.size + at for at in range(RECORD.size)}
    if path.suffix == ".raw":
        found |= set(range(0, size, 8 * KIB))
    return {at for at in found if 0 <= at < size}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_set(tmp_path: Path, kind: str) -> None:
    made = built(tmp_path / "set", kind)
    seen: dict[str, int] = {}
    report = verify.run(
        VerifyRequest(path=made.path, workers=3),
        progress=lambda label, done, _: seen.update({label: done}), cancelled=lambda: None,
    )  # fmt: skip
    assert report.problems == ()
    assert report.points == len(made.points)
    assert report.checked_bytes >= sum(p.disks[0].file_size for p in made.points)
    assert set(seen) == {"vda", "vdb"}
    assert report.to_json()["sound"] is True
    rebuilt(made, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_each_flipped_byte_is_named(tmp_path: Path, kind: str) -> None:
    made = built(tmp_path / "set", kind)
    rng = random.Random(5)
    for path in all_files(made):
        data = path.read_bytes()
        places = structure(path) | {rng.randrange(len(data)) for _ in range(5)}
        name = os.fspath(path.relative_to(made.path))
        for at in sorted(places):
            bad = bytearray(data)
            bad[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            problems = [each for each in check(made.path).problems if each.file == name]
            assert problems, f"byte {at} of {name} is flipped and nobody noticed"
            if path.suffix in (".data", ".raw"):
                assert problems[0].disk in name
                placed = [each.offset for each in problems if each.offset is not None]
                in_meta = path.suffix == ".data" and at < 1200
                assert in_meta or any(0 <= at - offset < 17 * KIB for offset in placed), at
            if rng.random() < 0.1:
                fails_or_is_exact(made, tmp_path / "out", {40, 50})
        path.write_bytes(data)
    assert check(made.path).problems == ()


def fails_or_is_exact(made: SetBuilder, out: Path, codes: set[int]) -> bool:
    """Whether a restore fails, with one of these exit codes; if not, it must be exact."""
    code = 0
    try:
        rebuilt(made, out)
    except NbdbackupError as err:
        code = err.exit_code
    assert code in codes | {0}
    return bool(code)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_delete(path: Path) -> None:
    path.unlink()


def damage_link(path: Path) -> None:
    away = path.with_name(f".{path.name}.away")
    path.rename(away)
    path.symlink_to(away)


def damage_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (
    damage_truncate, damage_append, damage_empty, damage_delete, damage_link, damage_directory,
    damage_fifo,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_each_file_must_be_whole(tmp_path: Path, kind: str, damage: Callable[[Path], None]) -> None:
    sound = built(tmp_path / "sound", kind)
    last = sound.points[-1]
    needed = {name for disk in last.disks for name in (disk.file, disk.index.name)}
    needed |= {stored.name for stored in last.files}
    for number, path in enumerate(all_files(sound)):
        name = os.fspath(path.relative_to(sound.path))
        damaged = tmp_path / f"set{number}"
        shutil.copytree(sound.path, damaged)
        damage(damaged / name)
        if kind == "raw" and damage is damage_delete and name.startswith("points/"):
            with pytest.raises(RepositoryError, match="is it a backup set"):
                check(damaged)
            continue
        problems = check(damaged).problems
        if name.startswith("points/") and damage is damage_delete:
            # its streams are there, and so may be points that hang on it
            assert any("its manifest is missing" in each.message for each in problems), name
        else:
            assert any(each.file == name for each in problems), name
        if name in needed:
            copy = replace(sound, path=damaged)
            assert fails_or_is_exact(copy, tmp_path / "out", {40})
        shutil.rmtree(damaged)


@pytest.mark.parametrize("kind", ["plain", "lz4"])
def test_swapped_files_are_named(tmp_path: Path, kind: str) -> None:
    made = built(tmp_path / "set", kind)
    one, two = (made.path / point.disk("vda").file for point in made.points[:2])
    for suffix in ("", ".index", ".chksum"):
        left, right = (path.with_name(f"{path.name}{suffix}") for path in (one, two))
        swap(left, right)
        found = {problem.file for problem in check(made.path).problems}
        assert found == {left.name, right.name}
        if suffix != ".chksum":
            assert fails_or_is_exact(made, tmp_path / "out", {40})
        swap(left, right)
    left, right = sorted((made.path / "points").iterdir())[:2]
    swap(left, right)
    assert {each.file for each in check(made.path).problems} >= {
        f"points/{left.name}", f"points/{right.name}",
    }  # fmt: skip
    assert fails_or_is_exact(made, tmp_path / "out", {40})


def swap(left: Path, right: Path) -> None:
    away = left.with_name("away")
    left.rename(away)
    right.rename(left)
    away.rename(right)


def test_all_damage_is_found_not_only_the_first(tmp_path: Path) -> None:
    made = built(tmp_path / "set", "plain")
    path = made.path / made.points[0].disk("vda").file
    with Index(path.with_name(f"{path.name}.index")) as index:
        blocks = [record.position for record in index if record.kind == Kind.DATA]
    data = bytearray(path.read_bytes())
    for position in (blocks[0] - 3, blocks[1] + 5, blocks[-1]):
        data[position] ^= 0x80
    path.write_bytes(data)
    other = made.path / made.points[1].files[0].name
    other.write_bytes(other.read_bytes().replace(b"point2", b"point9"))
    problems = check(made.path).problems
    placed = [(each.file, each.offset) for each in problems if each.offset is not None]
    assert placed == [
        (path.name, blocks[0] - 3), (path.name, blocks[1]), (path.name, blocks[-1]),
    ]  # fmt: skip
    assert {each.file for each in problems} == {path.name, other.name}
    texts = [problem.text for problem in problems]
    wanted = f"{path.name} at byte {blocks[1]}: disk vda, point point1: "
    assert any(text.startswith(wanted) for text in texts)


def test_garbage_has_a_bounded_report(tmp_path: Path) -> None:
    made = SetBuilder(tmp_path / "set", block=512)
    made.disks = {"vda": bytearray(random.Random(1).randbytes(64 * KIB))}
    made.full()
    path = made.path / "vda.full.data"
    path.write_bytes(path.read_bytes()[:1200] + bytes(path.stat().st_size - 1200))
    problems = check(made.path).problems
    assert MAX_PER_FILE < len(problems) <= MAX_PER_FILE + 2
    assert "more problems" in problems[-1].message


def test_one_point(tmp_path: Path) -> None:
    """Only what the point is made of matters."""
    made = built(tmp_path / "set", "plain")
    (made.path / made.points[1].disk("vda").file).unlink()
    assert check(made.path, point="point1").problems == ()
    assert check(made.path, point="point1").points == 1
    found = {each.file for each in check(made.path, point="point3").problems}
    assert found == {made.points[1].disk("vda").file}
    with pytest.raises(RepositoryError):
        check(made.path, point="nosuch")


def test_missing_middle_manifest(tmp_path: Path) -> None:
    made = built(tmp_path / "set", "plain")
    (made.path / "points/000002-point2.json").unlink()
    problems = check(made.path).problems
    assert {each.file for each in problems} >= {made.points[1].disk("vda").file}
    assert any("point2" in each.message for each in problems)
    assert any(each.point == "point3" for each in problems)


def test_what_a_draft_is_about_to_publish_is_no_damage(tmp_path: Path) -> None:
    made = built(tmp_path / "set", "plain")
    draft = made.path / ".draft-run1"
    draft.mkdir()
    (made.path / "points/000003-point3.json").rename(draft / "manifest.json")
    assert check(made.path).problems == ()


def test_a_draft_that_cannot_be_read_is_status_3(tmp_path: Path) -> None:
    """W-1: no line "warning" with status 0, from whichever depth it comes."""
    made = built(tmp_path / "set", "plain")
    draft = made.path / f"{layout.DRAFT_PREFIX}{'a' * 8}" / layout.DRAFT_MANIFEST
    draft.parent.mkdir()
    draft.write_bytes(b"no manifest")
    ctl = Ctl("test:///default", tmp_path)
    told = ctl("verify", made.path, code=3)
    assert re.search(r"^warning: .*can't be read", told.stderr, re.MULTILINE)
    assert ctl("verify", made.path, "--quiet", code=3).stderr == ""
    draft.unlink()
    ctl("verify", made.path)


def test_uncovered_disk(tmp_path: Path) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"a" * 64 * KIB)}
    changes = {"vda": [Change(0, b"a" * 4096), Change(8192, 512), Change(9000, b"b")]}
    made._point(Level.FULL, changes, DiskMode.FULL)
    messages = [problem.message for problem in check(made.path).problems]
    assert messages == [
        "guest bytes 4096 to 8192 are in no block",
        "guest bytes 8704 to 9000 are in no block",
        "guest bytes 9001 to 65536 are in no block",
    ]


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError):
        check(tmp_path / "nosuch")
    (tmp_path / "points").mkdir()
    with pytest.raises(RepositoryError, match="is it a backup set"):
        check(tmp_path)
    with pytest.raises(UsageError):
        check(tmp_path, workers=0)


def test_cancel(tmp_path: Path) -> None:
    made = built(tmp_path / "set", "plain")
    calls = itertools.count()

    def cancelled() -> None:
        if next(calls) == 40:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        verify.run(VerifyRequest(path=made.path), progress=lambda *_: None, cancelled=cancelled)


def test_manifest_of_garbage(tmp_path: Path) -> None:
    made = built(tmp_path / "set", "plain")
    bad = made.path / "points/000009-x.json"
    for data in (b"", b"{", b"[" * 100000, b"\xff" * 100, b'{"version": 2}', bytes(17 << 20)):
        bad.write_bytes(data)
        assert {each.file for each in check(made.path).problems} == {"points/000009-x.json"}
        with pytest.raises(FormatError):
            rebuilt(made, tmp_path / "out")
