"""The case ``growth``: what a verb costs as points, disks, extents and domains grow in number.

By processor seconds, which hold on a machine that does something else, too. Each verb runs once
before it is measured, so that the host has noted which manifests it has proven.
"""

import contextlib
import math
import os
import statistics
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbd

from nbdbackupd.format import manifest
from nbdbackupd.model.chain import DiskMode, DiskPoint, Level, RestorePoint
from nbdbackupd.repo import layout
from scripts.benchmark.measure import Sample, timed, verdict
from scripts.benchmark.setting import Setting
from tests.lab.command import run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lab.process import wait_until
from tests.lib import points

POINTS = (2, 10, 100, 1_000, 10_000)
DISKS = (1, 10, 30)
EXTENTS = (10_000, 100_000, 1_000_000)
DOMAINS, POINTS_EACH = 500, 60
BEGIN = datetime(2025, 1, 1, tzinfo=UTC)
RULES = "retention: {last: 30, daily: 7, weekly: 5, monthly: 12}"
CLUSTER = 4096
IN_FLIGHT = 64
READY_SECONDS = 20.0
END_SECONDS = 120.0  # until it has written what it holds of a million clusters
STATUS_GOAL_SECONDS = 1.5
LEAST_SECONDS = 0.03
"""What is less above the smallest tells nothing of an exponent."""


@dataclass(frozen=True, slots=True)
class _Program:
    """nbdbackupctl with a state directory and a configuration of its own."""

    uri: str
    directory: Path
    runs: int

    def run(self, *words: str | Path) -> Sample:
        head = ["/usr/bin/python3", "-m", "nbdbackupd", "-c", self.uri, "--config-dir"]
        state = {"NBDBACKUP_STATE_DIR": str(self.directory / "state")}
        # 3: with warnings, as for a host that runs without systemd
        return timed([*head, self.directory, *words], state, statuses=(0, 3))

    def again(self, *words: str | Path) -> Sample:
        """The median of the processor time, and the largest peak, once all is known."""
        self.run(*words)
        found = [self.run(*words) for _ in range(self.runs)]
        taken = statistics.median(each.cpu_seconds for each in found)
        return Sample(0.0, max(each.peak_bytes for each in found), taken)


def measure(setting: Setting) -> None:
    """Growth with domains, points, disks and changed extents, in processor seconds."""
    with setting.new_directory("disk") as directory:
        (directory / "nbdbackup.yaml").write_text(
            f"repository: {{path: {directory}/repository}}\n{RULES}\n"
        )
        (directory / "state").mkdir(mode=0o700)
        program = _Program(setting.lab.uri, directory, setting.runs)
        _domains(program)
        _points(setting, program)
        _disks(setting, program)
        _extents(setting, program)


def _domains(program: _Program) -> None:
    for number in range(1, DOMAINS + 1):
        folder = program.directory / f"repository/vm{number}/2025-01/points"
        folder.mkdir(parents=True)
        last: RestorePoint | None = None
        for hours in range(POINTS_EACH):
            made = points.full_point() if last is None else points.child_of(last)
            last = _publish(folder, replace(
                made, created=f"{BEGIN + timedelta(hours=hours):%Y-%m-%dT%H:%M:%SZ}",
                domain=f"vm{number}", uuid=str(uuid.UUID(int=number)),
            ))  # fmt: skip
    first, found = program.run("status"), program.again("status")
    print(f"  {DOMAINS} domains of {POINTS_EACH} points")
    print(f"    status, the first one   {first.cpu_seconds:8.2f} s")
    judged = verdict(found.cpu_seconds, STATUS_GOAL_SECONDS)
    print(f"    status, the next        {found.cpu_seconds:8.2f} s  ({judged})", flush=True)


def _points(setting: Setting, program: _Program) -> None:
    verbs: dict[str, list[Sample]] = {"list": [], "prune --dry-run": [], "increment": []}
    for number in POINTS:
        with _guest(setting, f"points{number}", [DiskSpec()]) as guest:
            target = program.directory / f"repository/{guest.name}/2025-01"
            backup = ("backup", guest.name, "-o", target)
            program.run(*backup)
            _lengthen(target, number)
            verbs["list"].append(program.again("list", target))
            verbs["prune --dry-run"].append(program.again("prune", "--dry-run", target))
            verbs["increment"].append(program.again(*backup))
    _table("points", POINTS, verbs)


def _disks(setting: Setting, program: _Program) -> None:
    verbs: dict[str, list[Sample]] = {"full": [], "increment": []}
    for number in DISKS:
        specs = [DiskSpec(target=f"vd{chr(97 + each)}" if each < 26 else f"vda{chr(71 + each)}")
                 for each in range(number)]  # fmt: skip
        with _guest(setting, f"disks{number}", specs) as guest:
            target = program.directory / guest.name
            verbs["full"].append(program.run("backup", guest.name, "-o", target))
            verbs["increment"].append(program.again("backup", guest.name, "-o", target))
    _table("disks", DISKS, verbs)


def _extents(setting: Setting, program: _Program) -> None:
    verbs: dict[str, list[Sample]] = {"increment": [], "verify": []}
    for number in EXTENTS:
        image = program.directory / f"{number}.qcow2"
        disk = DiskSpec(path=image)
        size = 2 * CLUSTER * number
        options = f"cluster_size={CLUSTER}"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(size)])
        with _guest(setting, f"extents{number}", [disk]) as guest:
            target = program.directory / guest.name
            program.run("backup", guest.name, "-o", target)
            guest.stop()
            _write_each_other(image, number, program.directory / "nbd.sock")
            verbs["increment"].append(program.run("backup", guest.name, "-o", target))
            verbs["verify"].append(program.run("verify", target))
        image.unlink()
    _table("extents", EXTENTS, verbs)


@contextlib.contextmanager
def _guest(setting: Setting, name: str, disks: Sequence[DiskSpec]) -> Iterator[Guest]:
    guest = setting.lab.guest(name, disks)
    guest.start()
    try:
        yield guest
    finally:
        guest.close()


def _write_each_other(image: Path, number: int, socket: Path) -> None:
    """Write to every other cluster as any program may while the guest is off.

    QEMU notes it in the bitmaps of the image.
    """
    argv = ["qemu-nbd", "-f", "qcow2", "-k", str(socket), str(image)]
    failed: list[int] = []

    def written(error: "nbd.CInt") -> int:
        if error.value:
            failed.append(error.value)
        return 1

    with subprocess.Popen(argv) as server:
        try:
            wait_until(socket.exists, "socket of qemu-nbd", READY_SECONDS)
            handle = nbd.NBD()
            handle.connect_unix(os.fspath(socket))
            block = nbd.Buffer.from_buffer(bytearray(b"\x5a" * CLUSTER))
            for each in range(number):
                while handle.aio_in_flight() >= IN_FLIGHT:
                    handle.poll(-1)
                handle.aio_pwrite(block, 2 * CLUSTER * each, completion=written)
            while handle.aio_in_flight():
                handle.poll(-1)
            handle.flush()
            handle.shutdown()
            if failed or server.wait(END_SECONDS):
                raise RuntimeError(f"qemu-nbd failed: {len(failed)} writes, {server.returncode}")
        finally:
            server.kill()


def _lengthen(path: Path, number: int) -> None:
    """Make the one point of a set the last of so many, with all files of each."""
    (whole,) = (path / "points").iterdir()
    last = manifest.parse(whole.read_bytes())
    whole.unlink()
    parent: RestorePoint | None = None
    for sequence in range(1, number):
        mark = f"{sequence:05d}"
        made = _hang(replace(
            last,
            id=f"{last.id}-{mark}", sequence=sequence, checkpoint=f"{last.checkpoint}-{mark}",
            disks=tuple(_copied(each, mark, parent is None) for each in last.disks),
            files=tuple(replace(each, name=f"{each.name}.{mark}") for each in last.files),
        ), parent)  # fmt: skip
        for old, new in zip(manifest.file_names(last), manifest.file_names(made), strict=True):
            os.link(path / old, path / new)
        parent = _publish(path / "points", made)
    _publish(path / "points", _hang(replace(last, sequence=number), parent))


def _copied(disk: DiskPoint, mark: str, is_first: bool) -> DiskPoint:
    mode = DiskMode.FULL if is_first else DiskMode.DELTA
    index = replace(disk.index, name=f"{disk.index.name}.{mark}")
    return replace(disk, file=f"{disk.file}.{mark}", index=index, mode=mode)


def _hang(point: RestorePoint, parent: RestorePoint | None) -> RestorePoint:
    if parent is None:
        return point
    return replace(
        point, level=Level.INC, parent=parent.id, parent_digest=parent.digest,
        base_checkpoint=parent.checkpoint,
    )  # fmt: skip


def _publish(folder: Path, point: RestorePoint) -> RestorePoint:
    data = manifest.pack(point)
    (folder / layout.manifest(point.sequence, point.id)).write_bytes(data)
    return manifest.parse(data)


def _table(what: str, sizes: Sequence[int], verbs: dict[str, list[Sample]]) -> None:
    heads = "".join(f"{size:>11,}" for size in sizes)
    print(f"  {what:<18}{heads}   exponent, largest peak")
    for verb, found in verbs.items():
        taken = [each.cpu_seconds for each in found]
        peak = max(each.peak_bytes for each in found) / MIB
        cells = "".join(f"{each:>9.2f} s" for each in taken)
        print(f"    {verb:<16}{cells}   {_exponent(sizes, taken)}, {peak:.0f} MiB", flush=True)


def _exponent(sizes: Sequence[int], taken: Sequence[float]) -> str:
    """Of what the largest two take above the smallest."""
    before, last = (each - taken[0] for each in taken[-2:])
    if before < LEAST_SECONDS or last < LEAST_SECONDS:
        return "flat" if last < LEAST_SECONDS else "-"
    return f"{math.log(last / before) / math.log(sizes[-1] / sizes[-2]):.2f}"
