"""Sets that virtnbdbackup wrote: which files they are made of, and what each says of itself.

Names, as its versions 1.9.15 and 2.28 make them (measured)::

    DISK.full.data  DISK.copy.data          a whole disk
    DISK.inc.CHECKPOINT.data                what changed since the checkpoint before
    DISK.diff.SECONDS.data                  the same, without a checkpoint; begun at these seconds
    ….data.partial                          of a run that failed
    ….data.chksum                           decimal Adler-32 of the file; 1.9.15 writes none
    vmconfig.IDENT.xml, DISK.IDENT.qcow.json    IDENT: copy, the checkpoint, seconds of the end
    DOMAIN.cpt, checkpoints/CHECKPOINT.xml  the chain's checkpoints, also of runs that failed

A raw disk that was saved with ``--raw`` is ``DISK.copy.data`` in any case, and that file is the
raw image itself, as all are with ``--type raw``. Nothing that a file says is trusted.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from nbdbackupd import documents, durable, plain
from nbdbackupd.errors import CheckpointError, DomainError, FormatError, IntegrityError, one_line
from nbdbackupd.format import stream
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import Level
from nbdbackupd.model.domain import Domain, parse_domain
from nbdbackupd.repo import layout
from nbdbackupd.repo.virtnbdbackup.storage import Storage

MAX_FILE: Final = 16 << 20
"""A small file (XML, JSON, checksum) of more bytes is refused unread."""

MAX_NAMES: Final = 1 << 20
PARTIAL: Final = ".data.partial"
SECTOR: Final = 512
_WHOLE: Final = re.compile(r"(?P<disk>[^.].*)\.(?P<level>full|copy)\.data", re.DOTALL)
_CHANGES: Final = re.compile(
    r"(?P<disk>[^.].*?)\.(?P<level>inc|diff)\.(?P<ident>.+)\.data", re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFile:
    """One disk in one run. ``ident``: checkpoint of an increment, seconds of a differential.

    ``meta`` is None for a raw image; ``checksum`` None if there is no checksum file. ``has_crc``:
    an archive vouches for its bytes.
    """

    name: str
    disk: str
    level: Level
    ident: str
    size: int
    meta: StreamMeta | None
    checksum: int | None
    has_crc: bool = False

    @property
    def is_offline(self) -> bool:
        """Whether the domain was off: such an increment starts from the checkpoint it names."""
        meta = self.meta
        return (
            self.level is Level.INC
            and meta is not None
            and bool(meta.checkpoint)
            and meta.checkpoint == meta.parent_checkpoint
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFiles:
    """What a directory holds: sound files, a line for each that is not, and what else matters.

    ``checkpoints`` is the domain's list, ``tracked`` the disks of each as far as its XML is there;
    ``broken`` are points (level, ident) with a file that is not sound. ``sizes`` are the sizes of
    all regular files, by name.
    """

    files: tuple[PeerFile, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    broken: frozenset[tuple[Level, str]]
    checkpoints: tuple[str, ...]
    domain: str
    sizes: Mapping[str, int]
    configs: Mapping[str, Domain] = field(default_factory=dict)
    tracked: Mapping[str, frozenset[str]] = field(default_factory=dict)


def stream_names(storage: Storage) -> list[str]:
    """The names that streams have, whatever the files hold. Raises RepositoryError."""
    return sorted(name for name in storage.sizes() if _parse_name(name) is not None)


def read_files(storage: Storage) -> PeerFiles:
    """Read the heads of all streams and the small files; contents are not read.

    Raises RepositoryError if they can't be read.
    """
    sizes = storage.sizes()
    found: list[PeerFile] = []
    problems: list[str] = []
    warnings: list[str] = []
    broken = set()
    configs = _read_configs(storage, sizes, warnings)
    infos = _infos(sizes)
    for name in sorted(sizes):
        if name.endswith(PARTIAL):
            warnings.append(f"{name} is left of a run that failed, it is ignored")
        parsed = _parse_name(name)
        if parsed is None:
            continue
        _, level, ident = parsed
        try:
            config = configs.get("copy" if level is Level.COPY else ident)
            found.append(_read_file(storage, name, parsed, sizes, config, infos=infos[parsed[0]]))
        except FormatError as err:
            err.fields.setdefault("file", storage.path / name)
            problems.append(one_line(err))
            broken.add((level, ident))
    domain, checkpoints = _read_checkpoints(storage, sizes, warnings)
    return PeerFiles(
        files=tuple(found),
        problems=tuple(problems),
        warnings=tuple(warnings),
        broken=frozenset(broken),
        checkpoints=checkpoints,
        domain=domain,
        sizes=sizes,
        configs=configs,
        tracked=_read_tracked(storage, found, warnings),
    )


def parse_checkpoints(data: bytes) -> tuple[str, ...]:
    """The names in a ``.cpt`` file, a JSON list.

    Raises FormatError.
    """
    try:
        names = documents.parse_json(data)
    except ValueError as err:
        raise FormatError(f"list of checkpoints is no JSON: {err}") from err
    if (
        not isinstance(names, list)
        or len(names) > MAX_NAMES
        or not all(isinstance(name, str) and _is_name(name) for name in names)
    ):
        raise FormatError("list of checkpoints holds something else than names")
    return tuple(names)


def parse_image_size(data: bytes) -> int | None:
    """The virtual size (bytes) that ``qemu-img info`` told, or None if it does not say."""
    try:
        document: Any = documents.parse_json(data)
    except ValueError:
        return None
    if isinstance(document, list) and document:
        document = document[0]
    size = document.get("virtual-size") if isinstance(document, dict) else None
    return size if type(size) is int and 0 < size <= stream.MAX_NUMBER else None


def parse_config(data: bytes) -> Domain:
    """A domain's XML.

    Raises FormatError.
    """
    try:
        found = parse_domain(data.decode())
    except (DomainError, ValueError) as err:
        raise FormatError(f"not a domain XML: {err}") from err
    disks = (text for disk in found.disks for text in (disk.target, disk.format))
    if any(map(plain.CONTROL.search, (found.name, found.uuid, *disks))):
        raise FormatError("domain XML: a name holds control characters")
    return found


def _parse_name(name: str) -> tuple[str, Level, str] | None:
    """Disk, level and ident that a stream's name tells; None for other files."""
    found = _WHOLE.fullmatch(name) or _CHANGES.fullmatch(name)
    if found is None:
        return None
    groups = found.groupdict()
    return groups["disk"], Level(groups["level"]), groups.get("ident", "")


def _read_file(
    storage: Storage,
    name: str,
    parsed: tuple[str, Level, str],
    sizes: Mapping[str, int],
    config: Domain | None,
    *,
    infos: list[str],
) -> PeerFile:
    disk, level, ident = parsed
    if sizes[name] < 0:
        raise IntegrityError("not a regular file")
    with durable.translate_os_errors("read", storage.path / name):
        meta = _read_meta(storage, name, parsed, sizes[name], config, infos=infos)
    if meta is not None:
        _check_meta(meta, disk, level, ident)
    sum_name = layout.checksum(name)
    checksum = read_checksum(storage, sum_name) if sum_name in sizes else None
    return PeerFile(
        name=name,
        disk=disk,
        level=level,
        ident=ident,
        size=sizes[name],
        meta=meta,
        checksum=checksum,
        has_crc=storage.crc(name) is not None,
    )


def _read_meta(
    storage: Storage,
    name: str,
    parsed: tuple[str, Level, str],
    size: int,
    config: Domain | None,
    *,
    infos: list[str],
) -> StreamMeta | None:
    """The meta frame, or None where something else than the file says that it is a raw image."""
    disk, level, _ = parsed
    try:
        return stream.read_meta(storage.file(name), storage.window(name))
    except IntegrityError:
        if level not in (Level.FULL, Level.COPY):
            raise
        driver = [each.format for each in config.disks if each.target == disk] if config else []
        if level is Level.COPY and driver == [] and not infos:
            driver = ["raw"]  # a raw disk saved beside a full: its XML has the checkpoint's name
        if size and size % SECTOR == 0 and driver == ["raw"]:
            return None
        told = {parse_image_size(storage.read_small(info, MAX_FILE)) for info in infos}
        if size in told:
            return None
        raise


def _infos(sizes: Mapping[str, int]) -> Mapping[str, list[str]]:
    """The files about images, by each name of a disk that they may be of; it may have dots."""
    found = defaultdict(list)
    for name in sizes:
        if name.endswith(".qcow.json"):
            for dot in re.finditer(r"\.", name.removesuffix(".qcow.json") + "."):
                found[name[: dot.start()]].append(name)
    return found


def _check_meta(meta: StreamMeta, disk: str, level: Level, ident: str) -> None:
    if meta.disk_name != disk:
        raise FormatError(f"its meta frame is of disk {meta.disk_name[:64]!r}, its name of {disk}")
    if level in (Level.FULL, Level.COPY) and meta.incremental:
        raise FormatError(f"an increment under the name of a {level}")
    if level is Level.INC and meta.checkpoint != ident:
        raise FormatError(f"its meta frame names checkpoint {meta.checkpoint[:64]!r}, its name not")
    for name in (meta.checkpoint, meta.parent_checkpoint):
        if name and not _is_name(name):
            raise FormatError("meta frame: a checkpoint's name can't be")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= layout.MAX_DOMAIN and "/" not in name and name.isprintable()


def read_checksum(storage: Storage, name: str) -> int | None:
    """The Adler-32 in a checksum file, None if there is no such file.

    Raises IntegrityError.
    """
    if not storage.has(name):
        return None
    text = storage.read_small(name, 64).strip()
    if not text.isdigit() or len(text) > 10 or int(text) > 0xFFFFFFFF:
        raise IntegrityError("checksum file holds no number", file=storage.path / name)
    return int(text)


def _read_configs(
    storage: Storage, sizes: Mapping[str, int], warnings: list[str]
) -> dict[str, Domain]:
    """The domain as each ``vmconfig.IDENT.xml`` tells it, by ident."""
    found = {}
    for name in sorted(sizes):
        if name.startswith("vmconfig.") and name.endswith(".xml"):
            try:
                config = parse_config(storage.read_small(name, MAX_FILE))
            except FormatError as err:
                warnings.append(f"{name}: {one_line(err)}")
            else:
                found[name.removeprefix("vmconfig.").removesuffix(".xml")] = config
    return found


def _read_checkpoints(
    storage: Storage, sizes: Mapping[str, int], warnings: list[str]
) -> tuple[str, tuple[str, ...]]:
    """The domain's name and its checkpoints as the ``.cpt`` file tells them."""
    lists = [name for name in sizes if name.endswith(".cpt")]
    if len(lists) != 1:
        if lists:
            warnings.append(f"more than one list of checkpoints: {', '.join(sorted(lists)[:5])}")
        return "", ()
    (name,) = lists
    try:
        return name.removesuffix(".cpt"), parse_checkpoints(storage.read_small(name, MAX_FILE))
    except FormatError as err:
        warnings.append(f"{name}: {one_line(err)}")
        return name.removesuffix(".cpt"), ()


def _read_tracked(
    storage: Storage, files: Iterable[PeerFile], warnings: list[str]
) -> dict[str, frozenset[str]]:
    """The disks of each checkpoint that a stream made, as its XML tells them."""
    found = {}
    for name in sorted({file.meta.checkpoint for file in files if file.meta}):
        path = f"{layout.CHECKPOINTS}/{name}.xml"
        if not name or not storage.has(path):
            continue
        try:
            data = storage.read_small(path, MAX_FILE)
            if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
                raise FormatError("checkpoint XML with a document type")
            found[name] = frozenset(jobxml.tracked(data.decode(errors="replace")))
        except (FormatError, CheckpointError) as err:
            warnings.append(f"{path}: {err.message}")
    return found
