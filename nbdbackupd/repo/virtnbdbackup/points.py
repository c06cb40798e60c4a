"""The restore points of a set that virtnbdbackup wrote, linked by what its streams say.

An increment names the checkpoint that it starts from and the one that it made, in its meta frame;
times and names order nothing. What such a set can't tell (digests, how the guest was held) is
empty, or the least that can be said.

Streams of fulls, copies and increments that one run made share a name. Each stream of a
differential carries the seconds at which its own disk was begun, and the domain's XML those at
which the run ended: with fewer workers than disks, all of them differ (1.9.15 and 2.28, measured).
"""

import bisect
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, TypeAlias

from nbdbackupd.errors import ChainBrokenError
from nbdbackupd.format import manifest
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model.chain import (
    BackupSet,
    Codec,
    Consistency,
    DiskMode,
    DiskPoint,
    ForeignSet,
    ImageLayer,
    Layout,
    Level,
    RestorePoint,
    SkippedDisk,
    StoredFile,
)
from nbdbackupd.model.domain import Domain
from nbdbackupd.repo.virtnbdbackup.peer import PeerFile, PeerFiles

Run: TypeAlias = tuple[Level, str]
"""Level, and what the names of the run's small files carry: its ident."""

FULL_RUN: Final[Run] = (Level.FULL, "")
COPY_RUN: Final[Run] = (Level.COPY, "")
MAX_DIGITS: Final = 12
CHAIN: Final = "virtnbdbackup"
NO_INDEX: Final = StoredFile("", "disk-index", 0, "")
UNKNOWN_TIME: Final = "1970-01-01T00:00:00Z"
XML_ROLE: Final = "domain-xml"
INFO_ROLE: Final = "image-info"
FIRMWARE: Final = ("loader", "nvram", "kernel", "initrd")
"""Files that each run writes under one name, that of the original: only the last is kept."""


def build(found: PeerFiles) -> ForeignSet:
    """Make points of the files and prove that they hang together."""
    problems = list(found.problems)
    points = []
    for key, files in _group(found).items():
        try:
            points.append(_point(key, files, found))
        except ChainBrokenError as err:
            problems.append(err.message)
    linked = _link(points, found.files, problems)
    try:
        known = BackupSet.from_points(_order(linked))
    except ChainBrokenError as err:
        known, more = BackupSet.from_sound(_order(linked))
        problems += more or [err.message]
    for point in known.points:
        problems += _lost_disks(known, point)
    return ForeignSet(
        known=known, problems=tuple(problems), warnings=(*found.warnings, *_warnings(found, known))
    )


def _point(key: tuple[Level, str], files: Sequence[PeerFile], found: PeerFiles) -> RestorePoint:
    level, ident = key
    name = f"{level}.{ident}" if ident else str(level)
    links = {(file.meta.checkpoint, file.meta.parent_checkpoint) for file in files if file.meta}
    if len(links) > 1:
        raise ChainBrokenError(
            f"the disks of {name} do not belong together: they name different checkpoints"
        )
    checkpoint, base = links.pop() if links else ("", "")
    if level is Level.INC and not base and checkpoint in found.checkpoints[1:]:
        # a stream of version 1 may not name its parent: the list has them in their order
        base = found.checkpoints[found.checkpoints.index(checkpoint) - 1]
    if level is Level.FULL and not checkpoint and found.checkpoints:
        checkpoint = found.checkpoints[0]
    if level in (Level.COPY, Level.DIFF) or any(file.is_offline for file in files):
        made = ""
    else:
        made = checkpoint
    lost = found.tracked.get(made, frozenset()) - {file.disk for file in files} if made else ()
    if lost:
        raise ChainBrokenError(
            f"{name} lacks disk {', '.join(sorted(lost))}, which checkpoint {made} covers: "
            f"a stream is missing"
        )
    config_name = {Level.COPY: "copy", Level.FULL: checkpoint}.get(level, ident)
    config = found.configs.get(config_name)
    dates = sorted(file.meta.date for file in files if file.meta)
    return RestorePoint(
        id=name,
        sequence=1,
        chain=CHAIN,
        level=level,
        created=_utc(dates[0]) if dates else UNKNOWN_TIME,
        domain=config.name if config else found.domain or _only(found, "name"),
        uuid=config.uuid if config else _only(found, "uuid"),
        disks=tuple(_disk(file, config) for file in files),
        consistency=Consistency.CRASH,
        parent=base,
        checkpoint=made,
        base_checkpoint=base,
        skipped=_skipped(files, config),
        files=_stored(config_name, config, files, found),
    )


def _disk(file: PeerFile, config: Domain | None) -> DiskPoint:
    known = [disk for disk in config.disks if disk.target == file.disk] if config else []
    meta = file.meta
    size = meta.virtual_size if meta else file.size
    whole = meta is None or not meta.incremental
    return DiskPoint(
        target=file.disk,
        mode=DiskMode.FULL if whole else DiskMode.DELTA,
        size=size,
        format=_format(meta, known[0].format if known else ""),
        source=known[0].source if known else "",
        file=file.name,
        file_size=file.size,
        adler32=file.checksum or 0,
        index=NO_INDEX,
        data_bytes=min(meta.data_size, size) if meta else size,
        zero_bytes=0,
        codec=meta.codec if meta else Codec.NONE,
        layout=Layout.STREAM if meta else Layout.RAW,
        serial=known[0].serial if known else "",
        layers=_layers(known[0].layers) if known else (),
    )


def _format(meta: StreamMeta | None, told: str) -> str:
    """The format of the disk's image; what neither stream nor XML tells is restored as qcow2."""
    if meta is None:
        return told or "raw"
    return meta.disk_format or told or "qcow2"


def _only(found: PeerFiles, what: str) -> str:
    """What all of the set's XML says alike: a directory is one domain's."""
    told = {str(getattr(config, what)) for config in found.configs.values()}
    return told.pop() if len(told) == 1 else ""


def _skipped(files: Sequence[PeerFile], config: Domain | None) -> tuple[SkippedDisk, ...]:
    held = {file.disk for file in files}
    return tuple(
        SkippedDisk(disk.target, "virtnbdbackup did not save it")
        for disk in (config.disks if config else ())
        if disk.target and disk.target not in held
    )


def _layers(layers: tuple[ImageLayer, ...]) -> tuple[ImageLayer, ...]:
    return tuple(layer for layer in layers if layer.path)


def _stored(
    ident: str, config: Domain | None, files: Sequence[PeerFile], found: PeerFiles
) -> tuple[StoredFile, ...]:
    """XML, image infos and firmware of a point, as far as they are there; without digests."""
    wanted: list[tuple[str, str, str, str]] = [(f"vmconfig.{ident}.xml", XML_ROLE, "", "")]
    wanted += [(f"{file.disk}.{ident}.qcow.json", INFO_ROLE, "", file.disk) for file in files]
    for role in FIRMWARE if config else ():
        origin = getattr(config, role)
        base = origin.rpartition("/")[2]
        wanted += [(base, role, origin, "")] if base.strip(".") else []
    return tuple(
        StoredFile(name, role, found.sizes[name], "", origin, disk)
        for name, role, origin, disk in dict.fromkeys(wanted)
        if found.sizes.get(name, -1) >= 0
    )


def _link(
    points: Sequence[RestorePoint], files: Sequence[PeerFile], problems: list[str]
) -> list[RestorePoint]:
    """Put the parent's id in the place of its checkpoint; what lacks its parent goes."""
    makers = {point.checkpoint: point for point in points if point.checkpoint}
    offline = {file.ident for file in files if file.is_offline}
    linked = []
    for point in points:
        if point.level in (Level.FULL, Level.COPY):
            linked.append(replace(point, parent="", base_checkpoint=""))
            continue
        maker = makers.get(point.parent)
        if maker is None or maker.id == point.id:
            problems.append(_why_missing(point, offline))
        else:
            linked.append(replace(point, parent=maker.id))
    return _reachable(linked, problems)


def _why_missing(point: RestorePoint, offline: set[str]) -> str:
    base = point.parent
    text = f"{point.id} starts from checkpoint {base or '(none)'}, and no sound stream made that"
    if base in offline:
        return (
            f"{text}: the increment inc.{base} was replaced by one of the same name, made while "
            f"the domain was off; what it held is lost"
        )
    lost = f"*.inc.{base}.data, or the full," if base else "the full"
    return f"{text}: {lost} is missing or damaged"


def _reachable(points: list[RestorePoint], problems: list[str]) -> list[RestorePoint]:
    """Those whose line of parents leads to a full."""
    children: dict[str, list[RestorePoint]] = {}
    for point in points:
        children.setdefault(point.parent, []).append(point)
    kept = [point for point in points if not point.parent]
    for point in kept:  # grows while it is read
        kept += children.get(point.id, [])
    ids = {point.id for point in kept}
    problems += [
        f"{point.id} hangs on {point.parent}, which does not lead to a full"
        for point in points
        if point.id not in ids
    ]
    return kept


def _order(points: Sequence[RestorePoint]) -> list[RestorePoint]:
    """Number the points, parents first; dates decide only between those that no link orders."""
    children: dict[str, list[RestorePoint]] = {}
    for point in points:
        children.setdefault(point.parent, []).append(point)
    ready = [(point.created, point.makes_base, point.id, point) for point in children.get("", [])]
    heapq.heapify(ready)
    ordered: list[RestorePoint] = []
    while ready:
        *_, point = heapq.heappop(ready)
        ordered.append(replace(point, sequence=len(ordered) + 1))
        for child in children.get(point.id, []):
            heapq.heappush(ready, (child.created, child.makes_base, child.id, child))
    return ordered


def _lost_disks(known: BackupSet, point: RestorePoint) -> list[str]:
    found = []
    for disk in point.disks:
        try:
            known.path(point, disk.target)
        except ChainBrokenError as err:
            found.append(err.message)
    return found


def _warnings(found: PeerFiles, known: BackupSet) -> list[str]:
    warnings = []
    bare = [file.name for file in found.files if file.checksum is None and not file.has_crc]
    if bare:
        more = f" and {len(bare) - 3} more" if len(bare) > 3 else ""
        warnings.append(f"no checksum file vouches for the bytes of {', '.join(bare[:3])}{more}")
    made = {point.checkpoint for point in known.points}
    idle = [name for name in found.checkpoints if name not in made]
    if idle:
        warnings.append(
            f"checkpoint {', '.join(idle[:3])} is listed, but no sound point made it: "
            f"that run failed, or its files are gone"
        )
    undated = [point.id for point in known.points if point.created == UNKNOWN_TIME]
    if undated:
        warnings.append(f"nothing says when {', '.join(undated[:3])} was made")
    shared = sorted(
        {file.name for point in known.points for file in point.files if file.role in FIRMWARE}
    )
    if shared and len(known.points) > 1:
        warnings.append(f"{', '.join(shared)}: kept once for all points, as the last run saved it")
    held = {disk.target for point in known.points[:1] for disk in point.disks}
    for point in known.points:
        missing = held - {disk.target for disk in point.disks}
        if point.level is Level.INC and missing:
            warnings.append(f"{point.id} does not hold disk {', '.join(sorted(missing))}")
    return warnings


def _utc(date: str) -> str:
    """RFC 3339 in UTC; a date without a zone, as all of the peer's, is this host's local time."""
    try:
        moment = datetime.fromisoformat(date).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return UNKNOWN_TIME
    found = moment.isoformat().replace("+00:00", "Z")
    return found if manifest.is_time(found) else UNKNOWN_TIME


# -- runs


def _group(found: PeerFiles) -> dict[Run, list[PeerFile]]:
    """The sound files of each run; a run with one that is not sound is left out."""
    ends = _ends(found.sizes)
    groups: dict[Run, list[PeerFile]] = {}
    for file in found.files:
        groups.setdefault(_run(file.level, file.ident, ends), []).append(file)
    if FULL_RUN in groups and all(file.meta is None for file in groups.get(COPY_RUN, ())):
        # a raw image beside a full was saved with it
        held = {file.disk for file in groups[FULL_RUN]}
        groups[FULL_RUN] += [file for file in groups.pop(COPY_RUN, []) if file.disk not in held]
    for run in [run for run in groups if run[0] is Level.DIFF]:
        groups.update(_ended(run, groups[run]))
    broken = {_run(level, ident, ends) for level, ident in found.broken}
    return {run: files for run, files in groups.items() if run not in broken}


def _ends(names: Iterable[str]) -> list[int]:
    """When differentials ended, ascending."""
    idents = (
        name.removeprefix("vmconfig.").removesuffix(".xml")
        for name in names
        if name.startswith("vmconfig.") and name.endswith(".xml")
    )
    return sorted(int(ident) for ident in idents if _is_seconds(ident))


def _is_seconds(ident: str) -> bool:
    return ident.isascii() and ident.isdecimal() and len(ident) <= MAX_DIGITS


def _run(level: Level, ident: str, ends: Sequence[int]) -> Run:
    """The run that a stream's name means: a differential is of the first that ended after it."""
    if level is Level.DIFF and _is_seconds(ident):
        place = bisect.bisect_left(ends, int(ident))
        if place < len(ends):
            return level, str(ends[place])
    return level, ident


def _ended(run: Run, files: Sequence[PeerFile]) -> dict[Run, list[PeerFile]]:
    """Of a run and those before it that did not end: each with its files.

    They left streams with the same end: of the same disk, or on another checkpoint. Those that
    were begun last are the run's own.
    """
    newest = sorted(files, key=lambda file: file.ident.zfill(MAX_DIGITS), reverse=True)
    parent = newest[0].meta.parent_checkpoint if newest[0].meta else ""
    kept: dict[str, PeerFile] = {}
    found: dict[Run, list[PeerFile]] = {}
    for file in newest:
        same = file.meta is not None and file.meta.parent_checkpoint == parent
        if same and file.disk not in kept:
            kept[file.disk] = file
        else:
            found.setdefault((Level.DIFF, file.ident), []).append(file)
    found[run] = sorted(kept.values(), key=lambda file: file.disk)
    return found
