"""What is measured.  Each case prints its figures and the goals it has."""

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdbackupd.format import manifest
from scripts.benchmark import data, growth, maps
from scripts.benchmark.measure import (
    Sample,
    Series,
    print_cpu,
    print_ratio,
    print_series,
    timed,
    verdict,
)
from scripts.benchmark.setting import DOMAIN, TARGET, Setting
from tests.lab.command import run
from tests.lab.disks import DiskSpec

INCREMENTS = 10
EXTENTS = 1_000_000
MIB = 2**20
MEMORY_GOAL_MIB = 120
EMPTY_GOAL_SECONDS = 0.3
EMPTY_GOAL_CPU_SECONDS = 0.35
VERSION_GOAL_SECONDS = 0.1
FULL_GOAL_CPU_SECONDS = 1.8
"""For each GiB."""

DISKS = 6
SEED = 7
MERGED = 30
MERGE_GOAL_MIB = 64


def full(setting: Setting) -> None:
    """Full backup, uncompressed: against the peer, and nbdcopy to a raw file."""
    for place in setting.places:
        found = _full_backups(setting, place, ours=[], peer=[], with_nbdcopy=True)
        goals = (0.45, 1.5) if place == "tmpfs" else (None, None)
        _print_full(found, goals)
        if place == "tmpfs":
            print_cpu(found["ours"], FULL_GOAL_CPU_SECONDS * setting.size_gib)


def lz4(setting: Setting) -> None:
    """Full backup with lz4: against the peer."""
    for place in setting.places:
        found = _full_backups(setting, place, ours=["-z"], peer=["--compress"])
        _print_full(found, (0.4 if place == "tmpfs" else None, None))


def restore(setting: Setting) -> None:
    """Restore of a full and ten increments: against the peer."""
    with (
        _chain(setting, setting.ours, ["backup", DOMAIN, "-l"]) as ours,
        _chain(setting, setting.peer_backup, ["-l"]) as peer,
    ):
        for place in setting.places:
            print(f"  to {place}")
            found = setting.repeat(
                place,
                ours=lambda into: setting.ours("restore", ours, "-o", into / "out"),
                peer=lambda into: setting.peer_restore("-i", peer, "-o", into / "out"),
            )
            for who, series in found.items():
                print_series(who, series)
            goal = 0.4 if place == "tmpfs" else None
            print_ratio("ours / peer", found["ours"], found["peer"], goal)


def merge(setting: Setting) -> None:
    """Merge of thirty increments into a full, plain and with lz4: against cp of the new full."""
    for name, options in (("plain", []), ("lz4", ["-z"])):
        with setting.new_directory("disk") as directory:
            kept = directory / "kept"
            point = _points_to_merge(setting, kept, options)
            found = setting.repeat(
                "disk",
                ours=functools.partial(_merged, setting, kept, point),
                cp=functools.partial(_copied, setting, kept, point),
            )
        print(f"  {name}")
        for who, series in found.items():
            print_series(who, series)
        print_ratio("ours / cp", found["ours"], found["cp"], None)
        peak = found["ours"].peak_bytes / MIB
        print(f"    {'peak memory':<24}{verdict(peak, MERGE_GOAL_MIB)}", flush=True)


def empty(setting: Setting) -> None:
    """Increment without changes: against libvirt's own begin and end of a job."""
    setting.forget_checkpoints()
    bare = Series([_bare_job(setting) for _ in range(setting.runs)])
    with setting.new_directory("tmpfs") as directory:
        target = directory / "set"
        setting.ours("backup", DOMAIN, "-l", "full", "-o", target)
        runs = range(setting.runs)
        ours = Series([setting.ours("backup", DOMAIN, "-l", "inc", "-o", target) for _ in runs])
    setting.forget_checkpoints()
    print_series("ours", ours)
    print_series("libvirt alone", bare)
    above = ours.seconds - bare.seconds
    print(f"    {'above libvirt':<24}{above:6.2f} s  ({verdict(above, EMPTY_GOAL_SECONDS)})")
    print_cpu(ours, EMPTY_GOAL_CPU_SECONDS)


def memory(setting: Setting) -> None:
    """Peak memory: a full of the usual disk, and of 2 TiB with a million extents."""
    with setting.new_directory("tmpfs") as directory:
        target = directory / "set"
        setting.forget_checkpoints()
        usual = setting.ours("backup", DOMAIN, "-l", "full", "-o", target)
        _print_peak("backup, usual disk", usual)
        _print_peak("restore, usual disk", setting.ours("restore", target, "-o", directory / "r"))
    setting.forget_checkpoints()
    with setting.new_directory("disk") as directory:
        image = data.fragmented_image(directory / "fragmented.qcow2", EXTENTS)
        spec = DiskSpec(target=TARGET, path=image)
        guest = setting.lab.guest("fragmented", [spec])
        guest.start()
        try:
            target = directory / "set"
            sample = setting.ours("backup", "fragmented", "-l", "full", "-o", target)
        finally:
            guest.close()
        _print_peak("backup, 2 TiB in 1 M extents", sample)


def start(setting: Setting) -> None:
    """Start-up: what is imported for a backup, beside Python alone."""
    for what, code in (("python", "pass"), ("backup", "import nbdbackupd.app.verbs.backup")):
        argv = ["/usr/bin/python3", "-c", code]
        print_series(what, Series([timed(argv) for _ in range(setting.runs)]))


def disks(setting: Setting) -> None:
    """Full backup of as much data on one disk and on six."""
    for count in (1, DISKS):
        with setting.new_directory("disk") as images, setting.with_disks(images, count) as other:
            backup = functools.partial(setting.ours, "backup", other.guest.name, "-l", "copy", "-o")
            found = other.repeat("tmpfs", ours=backup)
        print_series(f"{count} disk{'s' * (count > 1)}", found["ours"])


def version(setting: Setting) -> None:
    """Start-up: nbdbackupctl --version."""
    series = Series([setting.ours("--version") for _ in range(setting.runs)])
    print_series("ours", series)
    print(f"    {'--version':<24}{verdict(series.seconds, VERSION_GOAL_SECONDS)}")


CASES = {
    **{
        case.__name__: case
        for case in (
            full,
            lz4,
            restore,
            merge,
            empty,
            memory,
            disks,
            start,
            version,
        )
    },
    "map": maps.measure,
    "growth": growth.measure,
}


def _full_backups(
    setting: Setting, place: str, *, ours: list[str], peer: list[str], with_nbdcopy: bool = False
) -> dict[str, Series]:
    print(f"  to {place}")

    def run_ours(into: Path) -> Sample:
        setting.forget_checkpoints()
        return setting.ours("backup", DOMAIN, "-l", "full", "-o", into / "set", *ours)

    def run_peer(into: Path) -> Sample:
        setting.forget_checkpoints()
        return setting.peer_backup("-l", "full", "-o", into / "set", *peer)

    programs = {"ours": run_ours, "peer": run_peer}
    if with_nbdcopy:
        programs["nbdcopy"] = lambda into: setting.nbdcopy(into / "disk.raw")
    try:
        return setting.repeat(place, **programs)
    finally:
        setting.forget_checkpoints()


def _print_full(found: dict[str, Series], goals: tuple[float | None, float | None]) -> None:
    for who, series in found.items():
        print_series(who, series)
    for who, goal in zip(("peer", "nbdcopy"), goals, strict=True):
        if who in found:
            print_ratio(f"ours / {who}", found["ours"], found[who], goal)


@contextlib.contextmanager
def _chain(setting: Setting, tool: Callable[..., Sample], words: list[str]) -> Iterator[Path]:
    """Make a full and ten increments with one tool; gives the set."""
    rng = random.Random(SEED)
    setting.forget_checkpoints()
    with setting.new_directory("tmpfs") as directory:
        target = directory / "set"
        tool(*words, "full", "-o", target)
        for _ in range(INCREMENTS):
            setting.change_disk(rng)
            tool(*words, "inc", "-o", target)
        setting.forget_checkpoints()
        yield target


def _points_to_merge(setting: Setting, target: Path, options: list[str]) -> str:
    """Make a full and thirty increments of a GiB in all; gives the newest point's id."""
    rng = random.Random(SEED)
    setting.forget_checkpoints()
    setting.ours("backup", DOMAIN, "-l", "full", "-o", target, *options)
    for _ in range(MERGED):
        setting.change_disk(rng, changes=1024 // MERGED)
        setting.ours("backup", DOMAIN, "-l", "inc", "-o", target, *options)
    setting.forget_checkpoints()
    return manifest.parse(max((target / "points").iterdir()).read_bytes()).id


def _merged(setting: Setting, kept: Path, point: str, into: Path) -> Sample:
    """Merge a copy of the set that shares its files: a merge writes new ones."""
    run(["cp", "-al", kept, into / "set"])
    state = ("--checkpoint-dir", into / "state")
    return setting.ours("merge", into / "set", "--point", point, *state)


def _copied(setting: Setting, kept: Path, point: str, into: Path) -> Sample:
    """Copy what a merge makes, and bring it to the disk as a merge does."""
    _merged(setting, kept, point, into)
    stream = max((into / "set").glob("*.data"), key=lambda path: path.stat().st_size)
    os.sync()
    return timed(
        ["dd", f"if={stream}", f"of={into / 'copy'}", "bs=1M", "conv=fsync", "status=none"]
    )


def _bare_job(setting: Setting) -> Sample:
    """Begin and end a job without reading anything."""
    started = time.monotonic()
    with setting.pull_job():
        pass
    return Sample(time.monotonic() - started, 0, 0.0)


def _print_peak(what: str, sample: Sample) -> None:
    peak = sample.peak_bytes / MIB
    judged = verdict(peak, MEMORY_GOAL_MIB)
    print(f"    {what:<30}{peak:6.0f} MiB  {sample.seconds:7.2f} s  ({judged})", flush=True)
