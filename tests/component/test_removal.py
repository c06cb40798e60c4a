"""Points leave a set: what stays restores to the same bytes, whatever was merged or dropped."""

import itertools
import logging
import random
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from nbdbackupd import events
from nbdbackupd import log as runlog
from nbdbackupd.errors import IntegrityError, Interrupted, NoSpaceError
from nbdbackupd.format import stream as stream_format
from nbdbackupd.format.stream import StreamReader, read_meta
from nbdbackupd.model.chain import BackupSet, DiskMode, Level
from nbdbackupd.model.removal import plan_removal
from nbdbackupd.nbdio.throttle import BURST_SECONDS
from nbdbackupd.ops.removal import apply
from nbdbackupd.ops.removal.apply import Progress, RemovalReport, RemovalRequest
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.findings import VerifyRequest
from nbdbackupd.repo import generation, layout
from nbdbackupd.repo.set_directory import all_names
from tests.lib import chains
from tests.lib.contents import read_disk
from tests.lib.sets import Change, SetBuilder, random_changes, random_disk

pytestmark = pytest.mark.component

MIB = 1 << 20
REQUEST = RemovalRequest(program="test")


def remove(
    path: Path,
    doomed: Collection[str],
    *,
    live: bool = True,
    request: RemovalRequest = REQUEST,
    progress: Progress = lambda *_: None,
    cancelled: Callable[[], None] = lambda: None,
) -> RemovalReport:
    """Remove points as the plan has it."""
    with apply.opened(path, path.parent / "run", owner="test of ") as (set_dir, known):
        removal = plan_removal(known, doomed, live=live)
        return apply.apply_removal(
            set_dir, known, removal, request, progress=progress, cancelled=cancelled
        )


def check(bench: SetBuilder, gone: Collection[str]) -> BackupSet:
    """All points but those that are gone restore to what the guest had; nothing else is left."""
    with apply.opened(bench.path, bench.path.parent / "run", owner="test of ") as (_, known):
        pass
    kept = [point for point in bench.points if point.id not in gone]
    assert [point.id for point in known.points] == [point.id for point in kept]
    for number, point in enumerate(bench.points):
        for target, image in bench.images[number].items() if point in kept else ():
            assert read_disk(bench.path, point.id, target) == image, (point.id, target)
    named = {name for point in known.points for name in all_names(point)}
    files = {path.name for path in bench.path.iterdir() if path.is_file()}
    mine = {layout.LOCK, layout.READING, layout.GENERATION, f"{bench.domain}.cpt"}
    assert files - mine == named
    folders = {path.name for path in bench.path.iterdir() if path.is_dir()}
    assert folders - {*layout.NOTES} == {layout.POINTS, generation.directory(bench.path).name}
    request = VerifyRequest(path=bench.path, workers=1)
    report = verify.run(request, progress=lambda *_: None, cancelled=lambda: None)
    assert report.problems == ()
    return known


def chain(path: Path, seed: int, *, level: int | None = None, count: int = 5) -> SetBuilder:
    """A full and increments of two disks, of which one is read in full now and then."""
    rng = random.Random(seed)
    bench = SetBuilder(path / "set", level=level, block=rng.choice([64 << 10, MIB, 12 << 10]))
    size = 3 * MIB + 512 * rng.randrange(9)
    bench.disks = {"vda": random_disk(rng, size), "vdb": random_disk(rng, MIB + 512)}
    bench.full()
    for _ in range(count):
        whole = ("vdb",) if rng.random() < 0.2 else ()
        bench.inc(
            {target: random_changes(rng, len(disk), rng.randrange(12))
             for target, disk in bench.disks.items()},
            whole=whole,
        )  # fmt: skip
    return bench


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("seed", range(3))
def test_random_removals(tmp_path: Path, seed: int, level: int | None) -> None:
    """Again and again, until the newest is all that is left."""
    bench = chain(tmp_path, seed, level=level)
    rng = random.Random(seed)
    gone: set[str] = set()
    left = [point.id for point in bench.points[:-1]]
    while left:
        doomed = rng.sample(left, min(len(left), rng.randrange(1, 4)))
        report = remove(bench.path, doomed)
        assert report.pending == ""
        gone.update(doomed)
        left = [ident for ident in left if ident not in gone]
        check(bench, gone)
    (last,) = check(bench, gone).points
    assert (last.level, last.parent, last.base_checkpoint) == (Level.FULL, "", "")
    assert sorted(last.merged) == sorted(gone)
    assert last.created == bench.points[-1].created
    assert last.checkpoint == bench.points[-1].checkpoint


def test_a_merged_full_is_as_the_peer_knows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A meta frame without a parent, frames in order, one for each byte."""
    bench = chain(tmp_path, 1, count=2)
    caplog.set_level(logging.INFO)
    times = (bench.path / bench.points[-1].disk("vda").file).stat().st_mtime_ns
    remove(bench.path, ["point1", "point2"])
    (point,) = check(bench, ["point1", "point2"]).points
    disk = point.disk("vda")
    assert disk.file == "vda.full.1.data"
    meta = read_meta(bench.path / disk.file)
    assert (meta.incremental, meta.parent_checkpoint) == (False, "")
    assert meta.checkpoint == point.checkpoint
    with StreamReader(bench.path / disk.file) as reader:
        assert sum(frame.length for frame in reader.frames()) == disk.size
    assert (bench.path / disk.file).stat().st_mtime_ns == times
    ids = [getattr(each, runlog.MESSAGE_ID, "") for each in caplog.records]
    assert events.POINTS_MERGED.id in ids


def test_payloads_are_taken_over_as_they_are(tmp_path: Path) -> None:
    """Blocks that nobody has cut keep their bytes, also those that lz4 would pack otherwise now."""
    bench = SetBuilder(tmp_path / "set", level=9, block=MIB)
    rng = random.Random(3)
    text = b"".join(rng.choice([b"one ", b"two ", b"three "]) for _ in range(MIB))[: 3 * MIB]
    bench.disks = {"vda": bytearray(text)}
    full = bench.full().disk("vda")
    bench.level = 1
    bench.inc({"vda": [Change(MIB, b"new" * 100)]})
    before = _payloads(bench.path / full.file)
    remove(bench.path, ["point1"])
    known = check(bench, ["point1"])
    after = _payloads(bench.path / known.points[0].disk("vda").file)
    assert list(after) == [0, MIB, 2 * MIB]
    assert (after[0], after[2 * MIB]) == (before[0], before[2 * MIB])
    assert after[MIB] != before[MIB]


def _payloads(path: Path) -> dict[int, bytes]:
    with StreamReader(path) as reader:
        return {each.start: reader.read(each.position, each.stored)
                for each in reader.frames() if each.stored}  # fmt: skip


def test_a_disk_that_was_smaller_meanwhile(tmp_path: Path) -> None:
    """What shrinking has taken does not come back from below a merged increment."""
    bench = SetBuilder(tmp_path / "set", block=64 << 10)
    bench.disks = {"vda": bytearray(b"x" * MIB)}
    bench.full()
    bench.inc({"vda": [Change(0, b"1" * 4096)]})
    del bench.disks["vda"][MIB // 2 :]
    bench.inc({"vda": [Change(4096, b"2" * 4096)]})
    bench.disks["vda"] += bytes(MIB // 2)
    bench.inc({"vda": [Change(8192, b"3" * 4096)]})
    bench.inc({"vda": []})
    remove(bench.path, ["point2", "point3"])
    known = check(bench, ["point2", "point3"])
    assert known.points[1].disk("vda").mode is DiskMode.DELTA
    remove(bench.path, ["point1"])
    check(bench, ["point1", "point2", "point3"])


def test_disks_that_come_and_go(tmp_path: Path) -> None:
    bench = SetBuilder(tmp_path / "set", block=64 << 10)
    bench.disks = {"vda": bytearray(b"a" * MIB), "vdb": bytearray(b"b" * MIB)}
    bench.full()
    del bench.disks["vdb"]
    bench.disks["vdc"] = bytearray(b"c" * MIB)
    bench.inc({"vda": [Change(0, 4096)]}, whole=("vdc",))
    bench.inc({"vda": [Change(512, b"n" * 512)], "vdc": [Change(MIB - 512, 512)]})
    remove(bench.path, ["point1", "point2"])
    (point,) = check(bench, ["point1", "point2"]).points
    assert [disk.target for disk in point.disks] == ["vda", "vdc"]
    assert {disk.mode for disk in point.disks} == {DiskMode.FULL}


def test_leaves_and_a_whole_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Copies and differentials go as they are; a set of which nothing is kept goes itself."""
    caplog.set_level(logging.INFO)
    bench = chain(tmp_path, 2, count=1)
    bench.inc({"vda": [Change(0, b"d" * 512)]}, level=Level.DIFF)
    bench.disks["vda"][:512] = bench.images[1]["vda"][:512]
    bench.full(Level.COPY)
    report = remove(bench.path, ["point3", "point4"])
    assert report.dropped == ("point3", "point4")
    assert report.freed_bytes > 0
    check(bench, ["point3", "point4"])
    report = remove(bench.path, ["point1", "point2"], live=False)
    assert report.is_gone
    assert not bench.path.exists()
    ids = [getattr(each, runlog.MESSAGE_ID, "") for each in caplog.records]
    assert ids.count(events.POINTS_REMOVED.id) == 2
    assert events.POINTS_MERGED.id not in ids


def test_ended_on_the_way(tmp_path: Path) -> None:
    """Somebody asks it to end, at whatever place: the set is what it was."""
    bench = chain(tmp_path, 5, count=2)
    before = chains.tree(bench.path)
    calls = itertools.count()
    seen: list[tuple[str, int, int]] = []

    def cancelled(last: int) -> None:
        if next(calls) >= last:
            raise Interrupted(15)

    for last in (0, 3, 20):
        calls = itertools.count()
        with pytest.raises(Interrupted):
            remove(bench.path, ["point1", "point2"], cancelled=partial(cancelled, last))
        assert chains.tree(bench.path) == before
    remove(bench.path, ["point1", "point2"], progress=lambda *step: seen.append(step))
    sizes = {disk.target: disk.size for disk in bench.points[-1].disks}
    assert {target: place for target, place, _ in seen} == sizes
    assert all(place <= size == sizes[target] for target, place, size in seen)
    check(bench, ["point1", "point2"])


def test_no_faster_than_it_may(tmp_path: Path) -> None:
    bench = SetBuilder(tmp_path / "set", block=256 << 10)
    bench.disks = {"vda": bytearray(b"x" * 2 * MIB)}
    bench.full()
    bench.inc({"vda": [Change(0, b"y" * 512)]})
    report = remove(bench.path, ["point1"], request=replace(REQUEST, bandwidth=4 * MIB))
    assert report.seconds > 2 / 4 - BURST_SECONDS - 0.1
    check(bench, ["point1"])


def test_damage_and_want_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing damaged is taken over, nothing is begun that would not fit."""
    bench = SetBuilder(tmp_path / "set", block=64 << 10)
    bench.disks = {"vda": bytearray(b"x" * MIB)}
    bench.full()
    bench.inc({"vda": [Change(0, b"y" * 512)]})
    with monkeypatch.context() as patch:
        patch.setattr(apply, "SPARE", 1 << 60)
        with pytest.raises(NoSpaceError, match=r"merging needs up to .* are free: make room"):
            remove(bench.path, ["point1"])
    stream = bench.path / bench.points[0].disk("vda").file
    sound = stream.read_bytes()
    for offset in (0, 512 << 10):  # one that is cut, and one that is not
        place = sound.index(b"data %016x" % offset) + stream_format.HEADER_LENGTH + 600
        stream.write_bytes(sound[:place] + b"!" + sound[place + 1 :])
        with pytest.raises(IntegrityError, match="block is damaged"):
            remove(bench.path, ["point1"])
    stream.write_bytes(sound)
    check(bench, [])
