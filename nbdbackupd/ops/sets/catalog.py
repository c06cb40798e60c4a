"""``list`` and ``show``: what a backup set holds, as documents and as text."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from nbdbackupd import durable, plain
from nbdbackupd.errors import RepositoryError
from nbdbackupd.format import stream
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model.chain import Codec, DigestKind, DiskPoint, Layout, Level, RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.model.proof import Soundness, soundness
from nbdbackupd.model.space import disk_bytes, own_bytes
from nbdbackupd.ops.sets import opened
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.plain import versioned
from nbdbackupd.repo import boot_tests, layout, protected, verified
from nbdbackupd.repo.boot_tests import BootTest
from nbdbackupd.repo.protected import Protection
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.virtnbdbackup.storage import Folder, is_archive
from nbdbackupd.units import human_size, local_time

log = logging.getLogger(__name__)
GAP: Final = "  "


@dataclass(frozen=True, kw_only=True, slots=True)
class ListReport:
    """The sound points of a set, oldest first, and a line for each that is damaged.

    ``written_by`` is empty for our own sets; ``warnings`` tell what of others nobody vouches for.
    ``tests`` are the boot tests, ``protections`` the notes that keep points, ``states`` what
    verifications found, ``retention`` what the rules want, all by point.
    """

    path: Path
    points: tuple[RestorePoint, ...]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    written_by: str = ""
    tests: Mapping[str, BootTest] = field(default_factory=dict)
    protections: Mapping[str, Protection] = field(default_factory=dict)
    states: Mapping[str, Soundness] = field(default_factory=dict)
    retention: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1; sizes in bytes."""
        sizes = own_bytes(self.points)
        return versioned(
            set=str(self.path),
            stored_bytes=sum(sizes.values()),
            points=[
                describe(point, sizes[point.id], self.tests.get(point.id)) for point in self.points
            ],
            problems=list(self.problems),
            warnings=list(self.warnings),
            written_by=self.written_by,
            protections=[each.to_json() for each in self.protections.values()],
            verified={key: each.verified for key, each in self.states.items() if each.verified},
            damage={key: each.damage for key, each in self.states.items() if each.damage},
            retention=dict(self.retention),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowReport:
    """Points with all that their manifests and streams say.

    ``sizes`` is what each point takes, ``metas`` are the meta frames by the stream's file name,
    ``tests`` the boot tests by point.
    """

    path: Path
    points: tuple[RestorePoint, ...]
    sizes: Mapping[str, int]
    metas: Mapping[str, StreamMeta] = field(default_factory=dict)
    tests: Mapping[str, BootTest] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1; sizes in bytes."""
        return versioned(
            set=str(self.path),
            points=[self._point(point) for point in self.points],
        )

    def _point(self, point: RestorePoint) -> dict[str, Any]:
        document = asdict(point)
        document["stored_bytes"] = self.sizes[point.id]
        document["boot_test"] = _test(self.tests.get(point.id))
        for disk, described in zip(point.disks, document["disks"], strict=True):
            described["stored_bytes"] = disk_bytes(disk)
            meta = self.metas.get(disk.file)
            described["stream"] = meta.to_json() if meta is not None else None
        return document


def list_points(path: Path, *, proofs: bool = False) -> ListReport:
    """Read all manifests of the set and prove their links; damaged ones are named.

    ``proofs``: also what verifications have noted, but for archives, which have no notes.
    Raises RepositoryError if there is no set or it can't be read.
    """
    given = _open(path, sound=True)
    return ListReport(
        path=path,
        points=given.known.points,
        problems=given.problems,
        warnings=given.hints,
        written_by=given.written_by,
        tests=boot_tests.read(path),
        protections=_protections(given),
        states=_states(given) if proofs and not is_archive(path) else {},
    )


def show(path: Path, point: str = "") -> ShowReport:
    """Read everything that the set says of its points, or of one (an id, or ``latest``).

    Raises what ``SetDirectory.load`` raises, RepositoryError if there is no set or for an id that
    is none, FormatError or RepositoryError if a stream is damaged or missing.
    """
    given = _open(path)
    known = given.known
    points = (Choice(point=point).find(known),) if point else known.points
    metas = {}
    for each in points:
        for disk in each.disks:
            if disk.layout is Layout.STREAM:
                storage = given.storage or Folder(path)
                file = storage.file(disk.file)
                with durable.translate_os_errors("read", file):
                    metas[disk.file] = stream.read_meta(file, storage.window(disk.file))
    sizes = own_bytes(known.points)
    tests = boot_tests.read(path)
    return ShowReport(path=path, points=points, sizes=sizes, metas=metas, tests=tests)


def _protections(given: OpenedSet) -> dict[str, Protection]:
    try:
        return protected.read(given.path, [point.id for point in given.known.points])
    except RepositoryError as err:
        log.warning("which points are protected is not known: %s", err.message)
        return {}


def _states(given: OpenedSet) -> dict[str, Soundness]:
    return soundness(given.known, verified.read(given.path, given.known))


def _test(test: BootTest | None) -> dict[str, Any] | None:
    return test.to_json() if test is not None else None


def describe(point: RestorePoint, size: int, test: BootTest | None = None) -> dict[str, Any]:
    """One point as ``list`` tells it, with its boot test if it had one; sizes in bytes."""
    return {
        "id": point.id,
        "sequence": point.sequence,
        "level": point.level.value,
        "created": point.created,
        "domain": point.domain,
        "uuid": point.uuid,
        "chain": point.chain,
        "parent": point.parent,
        "checkpoint": point.checkpoint,
        "consistency": point.consistency.value,
        "warnings": list(point.warnings),
        "skipped": [asdict(each) for each in point.skipped],
        "stored_bytes": size,
        "disks": [_describe_disk(disk) for disk in point.disks],
        "boot_test": _test(test),
    }


def _describe_disk(disk: DiskPoint) -> dict[str, Any]:
    return {
        "target": disk.target,
        "mode": disk.mode.value,
        "size": disk.size,
        "format": disk.format,
        "stored_bytes": disk_bytes(disk),
        "data_bytes": disk.data_bytes,
        "zero_bytes": disk.zero_bytes,
        "compressed": disk.codec is not Codec.NONE,
        "codec": disk.codec.value,
        "digest": disk.digest.value,
        "layout": disk.layout.value,
        "reason": disk.reason,
    }


def _check_is_set(path: Path) -> None:
    if not is_archive(path) and not SetDirectory.open(path).exists:
        raise RepositoryError(f"there is no backup set at {path}: no such directory")


def _open(path: Path, *, sound: bool = False) -> opened.OpenedSet:
    """Open a set. Raises RepositoryError if the directory is one of something else (W-10)."""
    _check_is_set(path)
    given = opened.open_set(path, sound=sound)
    if not given.known.points and not given.written_by and not given.problems:
        with durable.translate_os_errors("read", path):
            names = {each.name for each in path.iterdir()}
        if names and not names & {layout.LOCK, layout.POINTS}:
            raise RepositoryError(f"{path} is no backup set: it has no directory {layout.POINTS}")
    return given


def render_list(report: ListReport) -> str:
    """A table: a line for each point, below it one for each disk, then its warnings."""
    sizes = own_bytes(report.points)
    head = _head(report, sizes)
    if not report.points:
        return head
    rows: list[tuple[str, ...]] = [
        ("#", "POINT", "LEVEL", "CREATED", "STATE", "STORED", "CHECKPOINT")
    ]
    rows += [_point_row(point, sizes[point.id]) for point in report.points]
    if report.retention:
        wanted = ["RETENTION", *(report.retention.get(each.id, "-") for each in report.points)]
        rows = [(*row, cell) for row, cell in zip(rows, wanted, strict=True)]
    disks = [_disk_row(disk, point.warnings) for point in report.points for disk in point.disks]
    point_lines = _table(rows, right={0, 5})
    disk_lines = iter(_table(disks, right={1, 3, 4, 5}))
    lines = [head, "", point_lines[0]]
    for point, line in zip(report.points, point_lines[1:], strict=True):
        lines.append(line)
        indent = " " * (len(rows[-1][0]) + len(GAP))
        lines += [f"{indent}{next(disk_lines)}" for _ in point.disks]
        lines += [f"{indent}! {plain.line(warning)}" for warning in point.warnings]
        if test := report.tests.get(point.id):
            how = "came up" if test.passed else f"did not come up: {test.reason}"
            lines.append(f"{indent}booted {local_time(test.tested)}: {plain.line(how)}")
        if protection := report.protections.get(point.id):
            lines.append(f"{indent}protected {plain.line(protection.text)}")
    lines += [f"! {plain.line(warning)}" for warning in report.warnings]
    return "\n".join(lines)


def _head(report: ListReport, sizes: Mapping[str, int]) -> str:
    if not report.points:
        none = "no sound restore points" if report.problems else "no restore points yet"
        return f"{plain.line(str(report.path))}: {none}"
    names = sorted({point.domain for point in report.points})
    total = human_size(sum(sizes.values()))
    count = len(report.points)
    points = "1 restore point" if count == 1 else f"{count} restore points"
    whose = f"{', '.join(names)}, " if any(names) else ""
    head = f"{report.path}: {whose}{points}, {total} stored"
    return plain.line(f"{head}, written by {report.written_by}" if report.written_by else head)


def render_tree(report: ListReport) -> str:
    """A time line: a point each, what it bases on, when it was verified, what keeps it.

    The chain that the next increment goes on from is the line ``*``; what else bases on a point of
    it, or on none, stands beside it.
    """
    sizes = own_bytes(report.points)
    if not report.points:
        return _head(report, sizes)
    numbers = {point.id: str(point.sequence) for point in report.points}
    rows: list[tuple[str, ...]] = [
        ("", "#", "POINT", "LEVEL", "BASE", "CREATED", "STATE", "STORED", "VERIFIED", "KEPT BY")
    ]
    for mark, point in zip(_marks(report.points), report.points, strict=True):
        state = report.states.get(point.id, Soundness())
        protection = report.protections.get(point.id)
        kept = f"protected {protection.text}" if protection else "-"
        rows.append(
            (
                mark,
                str(point.sequence),
                point.id,
                point.level.value,
                numbers.get(point.parent, "missing") if point.parent else "-",
                local_time(point.created),
                point.consistency.value,
                human_size(sizes[point.id]),
                "damaged" if state.damage else local_time(state.verified or "-"),
                report.retention.get(point.id, kept),
            )
        )
    lines = [_head(report, sizes), "", *_table(rows, right={1, 4, 7})]
    damage = dict.fromkeys(each.damage for each in report.states.values() if each.damage)
    return "\n".join([*lines, *(f"! {plain.line(each)}" for each in damage)])


def _marks(points: Sequence[RestorePoint]) -> list[str]:
    """For each point ``*`` in the line of the newest base, or beside it where it hangs."""
    parents = {point.id: point.parent for point in points}
    last = next((each.id for each in reversed(points) if each.level in (Level.FULL, Level.INC)), "")
    line: list[str] = []
    while last in parents and last not in line:
        line.append(last)
        last = parents[last]
    marks, above = [], ""
    for point in points:
        if point.id in line:
            marks.append("*")
            above = point.id
            continue
        goes_on = bool(line) and above != line[0]
        joint = ("|-" if goes_on else "`-") if above and point.parent == above else ""
        marks.append(f"{joint or ('| ' if above and goes_on else '  ')}*")
    return marks


def _point_row(point: RestorePoint, size: int) -> tuple[str, ...]:
    return (
        str(point.sequence),
        point.id,
        point.level.value,
        local_time(point.created),
        point.consistency.value,
        human_size(size),
        point.checkpoint or "-",
    )


def _disk_row(disk: DiskPoint, warnings: Sequence[str]) -> tuple[str, ...]:
    """One line of the table; a reason that a warning below tells is not told twice."""
    name = f"disk {disk.target} "
    is_told = any(each.startswith(name) and each.endswith(disk.reason) for each in warnings)
    form = "" if disk.layout is Layout.STREAM else disk.layout.value
    form = form if disk.codec is Codec.NONE else disk.codec.value
    kind = "" if disk.digest is DigestKind.SHA256 else disk.digest.value
    notes = [form, kind, f"({disk.reason})" if disk.reason and not is_told else ""]
    return (
        disk.target,
        human_size(disk.size),
        "whole" if disk.mode.value == "full" else "changes",
        f"{human_size(disk.data_bytes)} data",
        f"{human_size(disk.zero_bytes)} zero",
        f"{human_size(disk_bytes(disk))} stored",
        " ".join(note for note in notes if note),
    )


def _table(rows: list[tuple[str, ...]], right: set[int]) -> list[str]:
    """Lines with aligned columns, those of ``right`` to the right; the last is not padded."""
    clean = [[plain.line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = []
    for row in clean:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(GAP.join(cells).rstrip())
    return lines


def render_show(report: ShowReport) -> str:
    """Every member, one a line, what lies within indented."""
    if not report.points:
        return f"{plain.line(str(report.path))}: no restore points yet"
    lines: list[str] = []
    for document in report.to_json()["points"]:
        lines += [f"restore point {plain.line(document['id'])}", *_tree(document, GAP), ""]
    return "\n".join(lines[:-1])


def _tree(value: Any, indent: str) -> list[str]:
    """Lines of a nested document; members without a value are left out."""
    lines = []
    pairs = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    for key, each in pairs:
        nested = isinstance(each, dict | list | tuple)
        if not each and (nested or each is None or each == ""):
            continue
        if not nested:
            name = "-" if key is None else f"{key}:"
            lines.append(f"{indent}{name} {plain.line(_scalar(each))}")
        elif key is None:
            first, *rest = _tree(each, indent + GAP)
            lines += [f"{indent}- {first.lstrip()}", *rest]
        else:
            lines += [f"{indent}{key}:", *_tree(each, indent + GAP)]
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
