"""The restore points of a set that qmpbackup wrote: qcow2 layers, put in order by their names.

Names, as its version 0.67 makes them (measured; the older ones from its history)::

    DISK/LEVEL-SECONDS-IMAGE        LEVEL: FULL, INC, COPY; all disks of a run have one time
    DISK/LEVEL-SECONDS              of older versions
    LEVEL-SECONDS-IMAGE             with --no-subdir
    IMAGE, DISK/IMAGE               a full or copy with --no-timestamp
    ….partial                       of a run that failed
    IMAGE.config                    what qemu-img told of the image, as the last run saved it
    uuid                            in the names of the bitmaps; another full keeps it
    YYYY-MM/                        with --monthly: a set for each month

An increment holds what changed since the one before it, whatever backing file it names: that name
is never followed. One after a run that failed may lack changes, since that run has cleared the
bitmap. Nothing that a file says is trusted.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, IntegrityError, one_line
from nbdbackupd.files import File
from nbdbackupd.format import manifest, qcow2
from nbdbackupd.model.chain import (
    BackupSet,
    Consistency,
    DiskMode,
    DiskPoint,
    ForeignSet,
    Layout,
    Level,
    RestorePoint,
    SkippedDisk,
    StoredFile,
)
from nbdbackupd.repo.virtnbdbackup.points import INFO_ROLE, NO_INDEX, UNKNOWN_TIME
from nbdbackupd.repo.virtnbdbackup.storage import Storage, read_small

PROGRAM: Final = "qmpbackup"
CONFIG: Final = ".config"
PARTIAL: Final = ".partial"
MAX_CONFIG: Final = 1 << 20
RAW: Final = "raw"
QCOW2: Final = "qcow2"
SECTOR: Final = 512
READ: Final = os.R_OK | os.X_OK
RAW_INCREMENT: Final = "zeroes of a raw increment can't be told from what it does not hold"
NEW_CHAIN: Final = "qmpbackup made another full"
_STAMPED: Final = re.compile(
    r"(?P<level>FULL|INC|COPY)-(?P<stamp>[0-9]{1,12})(?:-(?P<image>.+))?", re.DOTALL
)
_MONTH: Final = re.compile(r"[0-9]{4}-[0-9]{2}")


class _Run(NamedTuple):
    """What the names of all files of a run begin with; ``stamp`` is -1 for a name without one."""

    stamp: int
    level: Level

    @property
    def id(self) -> str:
        return f"{self.level.upper()}-{self.stamp}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """One file; ``name`` within the set, ``size`` -1 for what is no regular file."""

    name: str
    folder: str
    image: str
    run: _Run
    is_partial: bool
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Config:
    """What is told of an image; ``size`` is that of the file that tells it, both in bytes."""

    format: str
    source: str
    virtual_size: int
    size: int


def is_set(storage: Storage) -> bool:
    """Whether it holds files named as qmpbackup names them. Raises RepositoryError."""
    return storage.path.is_dir() and next(_files(storage.path), None) is not None


def months(path: Path) -> list[str]:
    """The names of the sets within a directory that ``--monthly`` made. Raises RepositoryError."""
    return sorted(
        name
        for name, is_folder, _ in _entries(path)
        if is_folder and _MONTH.fullmatch(name) and next(_files(path / name), None) is not None
    )


def read(storage: Storage) -> ForeignSet:
    """Read names and headers, and make points of them; contents are not read.

    Raises RepositoryError if they can't be read, or two disks would have one name.
    """
    files = sorted(_files(storage.path), key=lambda each: (each.run, each.name))
    configs: dict[str, _Config] = {}
    warnings = [
        "qmpbackup keeps no checksums and no links: nothing tells of other bytes, or of an "
        "increment that is gone"
    ]
    for image in sorted({each.image for each in files if each.image}):
        try:
            found = _config(storage.path, image)
        except FormatError as err:
            warnings.append(f"{image}{CONFIG}: {one_line(err)}")
        else:
            configs.update({image: found} if found is not None else {})
    made = _Points(storage.path, configs, _targets(files), warnings)
    runs: dict[_Run, list[_File]] = {}
    for each in files:
        if each.run.stamp < 0:
            made.unstamped(each)
        else:
            runs.setdefault(each.run, []).append(each)
    times = Counter(run.stamp for run in runs if run.level is not Level.COPY)
    for run, some in runs.items():
        made.add(run, some, is_clear=run.level is Level.COPY or times[run.stamp] == 1)
    return made.linked()


def _entries(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Name, whether it is a directory, and size of all in a directory; links are neither."""
    with durable.translate_os_errors("read", path), os.scandir(path) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1
            yield entry.name, stat.S_ISDIR(status.st_mode), size


def _files(path: Path) -> Iterator[_File]:
    """What a set holds, as far as names tell, in no order."""
    top = list(_entries(path))
    told = {name.removesuffix(CONFIG) for name, _, size in top if name.endswith(CONFIG)}
    for name, is_folder, size in top:
        if not is_folder:
            yield from _file(path, "", name, size, told)
        elif _is_disk(name) and os.access(path / name, READ):
            for each, is_deeper, length in _entries(path / name):
                if not is_deeper:
                    yield from _file(path, name, each, length, told)


def _is_disk(folder: str) -> bool:
    return not folder.startswith(".") and not _MONTH.fullmatch(folder)


def _file(path: Path, folder: str, name: str, size: int, told: set[str]) -> Iterator[_File]:
    whole = name.removesuffix(PARTIAL)
    found = _STAMPED.fullmatch(whole)
    if found is not None:
        run, image = _Run(int(found["stamp"]), Level(found["level"].lower())), found["image"] or ""
    elif whole in told and size >= 0 and _is_config(path, whole):
        run, image = _Run(-1, Level.COPY), whole
    else:
        return
    yield _File(
        name=f"{folder}/{name}" if folder else name,
        folder=folder,
        image=image,
        run=run,
        is_partial=whole != name,
        size=size,
    )


def _is_config(path: Path, image: str) -> bool:
    try:
        return _config(path, image) is not None
    except FormatError:
        return False


def _config(path: Path, image: str) -> _Config | None:
    """What qemu-img told of an image, None if that was not saved. Raises FormatError."""
    file = path / f"{image}{CONFIG}"
    if not os.path.lexists(file):
        return None
    data = read_small(file, MAX_CONFIG)
    try:
        document = documents.parse_json(data)
    except ValueError as err:
        raise FormatError(f"no JSON: {err}") from err
    form = document.get("format") if isinstance(document, dict) else None
    virtual_size = document.get("virtual-size") if isinstance(document, dict) else None
    if not isinstance(form, str) or type(virtual_size) is not int:
        raise FormatError("does not tell of an image")
    source = document.get("filename")
    return _Config(
        format=form,
        source=source if isinstance(source, str) else "",
        virtual_size=virtual_size,
        size=len(data),
    )


def _targets(files: list[_File]) -> dict[tuple[str, str], str]:
    """The disk that a folder and an image stand for: the folder's name, unless there are more.

    Raises FormatError.
    """
    keys = sorted({(each.folder, each.image) for each in files})
    count = Counter(folder for folder, _ in keys)
    names = {
        (folder, image): (
            folder if folder and count[folder] == 1 else ".".join(filter(None, (folder, image)))
        )
        or "disk"
        for folder, image in keys
    }
    if len(set(names.values())) != len(names):
        raise FormatError("two disks would have one name: give the directory of one of them")
    return names


@dataclass(slots=True)
class _Points:
    """Points in the making, oldest first. ``broken`` tells why no increment follows now."""

    path: Path
    configs: Mapping[str, _Config]
    targets: Mapping[tuple[str, str], str]
    warnings: list[str]
    points: list[RestorePoint] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    base: RestorePoint | None = None
    broken: str = "there is no full before it"
    held: frozenset[str] = frozenset()

    def unstamped(self, file: _File) -> None:
        """A full or copy whose name has no time."""
        if file.is_partial:
            self.warnings.append(f"{file.name} is left of a run that failed, it is ignored")
            return
        target = self._target(file)
        try:
            disk = self._disk(file)
        except FormatError as err:
            self.problems.append(self._line(file, err))
            return
        self.warnings.append(
            f"{file.name} has no time in its name: it is a point of its own, and no increment is "
            f"put on it; name it FULL-SECONDS-{file.image} if it is the full of some"
        )
        self._append(f"COPY.{target}", file.run, (disk,), [file])

    def add(self, run: _Run, files: list[_File], *, is_clear: bool) -> None:
        """The next run in time; ``is_clear``: no other that matters has its time."""
        failed = [each.name for each in files if each.is_partial]
        if failed:
            self.warnings.append(f"{failed[0]} is left of a run that failed, which made no point")
            self._break(run, f"{failed[0]} before it is of a run that failed, and took changes")
            return
        if not is_clear:
            self.problems.append(f"{run.id}: a full and an increment have one time")
            self._break(run, f"which run was first at {run.stamp} can't be told")
            return
        if run.level is Level.INC and self.broken:
            self.problems.append(f"{run.id} is not read: {self.broken}")
            return
        disks, skipped = [], []
        for each in files:
            if run.level is Level.INC and self._format(each) == RAW:
                skipped.append(SkippedDisk(self._target(each), RAW_INCREMENT))
                self.warnings.append(f"{each.name} is not read: {RAW_INCREMENT}")
                continue
            target = self._target(each)
            if run.level is Level.INC and target not in self.based:
                why = f"{self.base.id if self.base else 'what'} before it does not hold the disk"
                skipped.append(SkippedDisk(target, why))
                self.problems.append(f"{each.name} is not read: {why}")
                continue
            try:
                disks.append(self._disk(each))
            except FormatError as err:
                self.problems.append(self._line(each, err))
                self._break(run, f"{each.name} before it is not sound")
                return
        if not disks and self.held - {each.target for each in skipped}:
            self.problems.append(f"{run.id} holds none of the disks that are read")
            self._break(run, f"{run.id} before it lacks its images")
        elif disks:
            self._append(run.id, run, tuple(disks), files, tuple(skipped))

    def linked(self) -> ForeignSet:
        """The points as a set."""
        known = BackupSet.from_points(self.points)
        return ForeignSet(known=known, problems=tuple(self.problems), warnings=tuple(self.warnings))

    @property
    def based(self) -> frozenset[str]:
        """The disks that an increment can be put on."""
        disks = self.base.disks if self.base is not None else ()
        return frozenset(each.target for each in disks)

    def _append(
        self,
        ident: str,
        run: _Run,
        disks: tuple[DiskPoint, ...],
        files: list[_File],
        skipped: tuple[SkippedDisk, ...] = (),
    ) -> None:
        is_copy = run.level is Level.COPY
        base = None if is_copy else self.base
        held = {each.target for each in disks}
        if base is not None and run.level is Level.INC:
            lost = self.held - held - {each.target for each in skipped}
            self.warnings += [f"{ident} does not hold disk {each}" for each in sorted(lost)]
        infos = {each.image: self._target(each) for each in files if each.image in self.configs}
        point = RestorePoint(
            id=ident,
            sequence=len(self.points) + 1,
            chain=PROGRAM,
            level=run.level if is_copy or base is None else Level.INC,
            created=_utc(run.stamp),
            domain="",
            uuid="",
            disks=disks,
            consistency=Consistency.CRASH,
            parent=base.id if base else "",
            # no bitmap has that name: it only links the points
            checkpoint="" if is_copy else f"{PROGRAM}.{run.stamp}",
            base_checkpoint=base.checkpoint if base else "",
            skipped=skipped,
            files=tuple(
                StoredFile(f"{image}{CONFIG}", INFO_ROLE, self.configs[image].size, "", "", target)
                for image, target in infos.items()
                if target in held
            ),
        )
        self.points.append(point)
        if not is_copy:
            self.base, self.broken = point, ""
            if run.level is Level.FULL:
                self.held = frozenset(held)

    def _break(self, run: _Run, why: str) -> None:
        if run.level is not Level.COPY:
            self.broken = why

    def _target(self, file: _File) -> str:
        return self.targets[file.folder, file.image]

    def _line(self, file: _File, err: FormatError) -> str:
        err.fields.setdefault("file", self.path / file.name)
        return one_line(err)

    def _format(self, file: _File) -> str:
        """What the file is, as something else than its bytes tells, or empty."""
        config = self.configs.get(file.image)
        return config.format if config is not None else ""

    def _disk(self, file: _File) -> DiskPoint:
        if file.size < 0:
            raise IntegrityError("not a regular file")
        told, level = self._format(file), file.run.level
        with durable.translate_os_errors("read", self.path / file.name):
            size, layout = _look(self.path / file.name, told, level, file.size)
        if not told and layout is Layout.QCOW2:
            self.warnings.append(f"{file.name}: only its first bytes tell that it is a qcow2 image")
        config = self.configs.get(file.image)
        if config is not None and layout is Layout.RAW and size != config.virtual_size:
            self.warnings.append(
                f"{file.name} has {size} bytes, its disk had {config.virtual_size} at the last run"
            )
        whole = level is not Level.INC
        again = level is Level.FULL and self.base is not None
        return DiskPoint(
            target=self._target(file),
            mode=DiskMode.FULL if whole else DiskMode.DELTA,
            size=size,
            format=RAW if layout is Layout.RAW else QCOW2,
            source=config.source if config is not None else "",
            file=file.name,
            file_size=file.size,
            adler32=0,
            index=NO_INDEX,
            data_bytes=min(file.size, size),
            zero_bytes=0,
            layout=layout,
            reason=NEW_CHAIN if again else "",
        )


def _look(path: Path, told: str, level: Level, size: int) -> tuple[int, Layout]:
    """The size of the disk in bytes, and how its blocks lie in the file. Raises FormatError."""
    if told not in ("", RAW, QCOW2):
        raise FormatError(f"an image of format {told[:32]!r}, which is not read")
    with File(path) as file:
        if told == RAW or (not told and level is not Level.INC and not qcow2.is_qcow2(file)):
            if not size or size % SECTOR:
                raise IntegrityError("no raw image: it does not end where a sector does")
            return size, Layout.RAW
        header = qcow2.read_header(file)
    if level is not Level.INC and not header.is_alone:
        raise FormatError("an image with a backing file, which no full of qmpbackup has")
    if header.snapshots:
        raise FormatError(
            "an image with internal snapshots: qmprestore snapshotrebase has changed it since"
        )
    return header.size, Layout.QCOW2


def _utc(stamp: int) -> str:
    try:
        found = datetime.fromtimestamp(stamp, UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return UNKNOWN_TIME
    return found if stamp >= 0 and manifest.is_time(found) else UNKNOWN_TIME
