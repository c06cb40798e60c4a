"""The state directory: what this host knows of each chain, beside the chain's set.

``<directory>/<UUID>/<chain>.json`` holds one record: where the set is, its base checkpoint with
its XML, and what tells the disks' images from others. From it a checkpoint can be redefined where
the set is not at hand, and a host learns which checkpoints belong to other sets. It is a note:
whatever a set says of its chain overrules it, and losing all of it costs nothing as long as the
sets are there.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, UnsupportedVersionError
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.model.freeze_memory import FreezeMemory
from nbdbackupd.model.plan import BaseDisk
from nbdbackupd.repo import layout

log = logging.getLogger(__name__)
VERSION: Final = 1
SUFFIX: Final = ".json"
MAX_SIZE: Final = 16 << 20
MODE: Final = 0o600
RELEASED: Final = "released"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One chain of one domain, as of its newest base.

    ``point`` is that point, ``checkpoint`` what it made (empty if its disks can't be tracked)
    and ``xml`` libvirt's XML of it, or empty. ``set`` is the directory of the set. ``lost`` are
    the disks that were seen to have no bitmap any more, by checkpoint: that one, or the base of a
    copy of the set.
    """

    chain: str
    uuid: str
    domain: str
    set: str
    point: str
    checkpoint: str
    xml: str
    disks: tuple[BaseDisk, ...]
    lost: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The record's JSON."""
        document = {
            "version": VERSION,
            "chain": self.chain,
            "uuid": self.uuid,
            "domain": self.domain,
            "set": self.set,
            "point": self.point,
            "checkpoint": self.checkpoint,
            "xml": self.xml,
            "disks": [
                {
                    "target": disk.target,
                    "size": disk.size,
                    "bitmap": disk.bitmap,
                    "layers": [
                        {
                            "path": layer.path,
                            "format": layer.format,
                            "device": layer.device,
                            "inode": layer.inode,
                        }
                        for layer in disk.layers
                    ],
                }
                for disk in self.disks
            ],
            **({"lost": self.lost} if self.lost else {}),
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> "Record":
        """Read a record.

        Raises FormatError, UnsupportedVersionError.
        """
        try:
            document = documents.parse_json(data)
        except ValueError as err:
            raise FormatError(f"no JSON: {err}") from err
        if not isinstance(document, dict):
            raise FormatError("no JSON object")
        version = _get(document, "version", int)
        if version != VERSION:
            raise UnsupportedVersionError(f"it is of version {version}, not {VERSION}")
        text = {
            name: _get(document, name, str)
            for name in ("chain", "uuid", "domain", "set", "point", "checkpoint", "xml")
        }
        if not text["chain"] or not text["uuid"]:
            raise FormatError("it names no chain or no domain")
        disks = tuple(_disk(each) for each in _get(document, "disks", list))
        # an older version did not note it
        lost = {
            name: tuple(_get({"disk": each}, "disk", str) for each in _get(found, name, list))
            for found in [_get({"lost": {}, **document}, "lost", dict)]
            for name in found
        }
        return cls(**text, disks=disks, lost=lost)


class StateDirectory:
    """The records of a state directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, uuid: str, chain: str) -> Path:
        """Where a chain's record is."""
        return self._folder(uuid) / f"{layout.escape(chain, layout.MAX_IDENT)}{SUFFIX}"

    def records(self, uuid: str) -> tuple[Record, ...]:
        """The records of a domain, in the order of their file names.

        One that is damaged, of a newer version, or not that of its file's name is passed over
        with a warning, and so is a directory that can't be read.
        """
        folder = self._folder(uuid)
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
        except FileNotFoundError:
            return ()
        except OSError as err:
            log.warning("the state in %s can't be read: %s", folder, err.strerror)
            return ()
        found = (self._read(path, uuid) for path in paths if not path.name.startswith("."))
        return tuple(each for each in found if each is not None)

    def save(self, record: Record) -> None:
        """Write a record, durably, in the place of the chain's older one.

        Raises RepositoryError or NoSpaceError.
        """
        path = self.path(record.uuid, record.chain)
        with durable.translate_os_errors("write", path):
            durable.make_directory(path.parent)
            durable.write_atomic(path, record.pack(), MODE)

    def forget(self, uuid: str, chain: str) -> bool:
        """Remove a chain's record; False if there is none.

        Raises RepositoryError.
        """
        path = self.path(uuid, chain)
        with durable.translate_os_errors("remove", path):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return False
            durable.fsync_directory(path.parent)
        return True

    def note_release(self, uuid: str, checkpoints: Collection[str], moment: str) -> None:
        """Note that somebody had these checkpoints of a domain, and their bitmaps, let go of.

        Raises RepositoryError or NoSpaceError.
        """
        path = self._folder(uuid) / RELEASED
        document = {"version": VERSION, "moment": moment, "checkpoints": sorted(checkpoints)}
        with durable.translate_os_errors("write", path):
            durable.make_directory(path.parent)
            durable.write_atomic(path, json.dumps(document).encode() + b"\n", MODE)

    def released(self, uuid: str, checkpoint: str) -> str:
        """When somebody had a checkpoint of a domain let go of; nothing if that is not known."""
        try:
            with (self._folder(uuid) / RELEASED).open("rb") as file:
                document = documents.parse_json(file.read(MAX_SIZE))
            if checkpoint in _get(document, "checkpoints", list):
                return _get(document, "moment", str)
        except (OSError, ValueError, FormatError, AttributeError):
            return ""
        return ""

    def freeze_memory(self, uuid: str) -> FreezeMemory | None:
        """What is remembered of freezes that were not answered; None if nothing, or unreadable."""
        try:
            document = documents.parse_json(self._freeze(uuid).read_bytes())
            last = datetime.fromisoformat(_get(document, "last", str))
            if last.tzinfo is None:
                raise FormatError("it has no time zone")
            # an older version did not note it
            instance = _get({"instance": "", **document}, "instance", str)
            return FreezeMemory(_get(document, "count", int), last, instance)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, TypeError, FormatError) as err:
            log.info("%s is ignored: %s", self._freeze(uuid), err)
            return None

    def remember_freeze(self, uuid: str, memory: FreezeMemory | None) -> None:
        """Note it, or forget it.

        Raises RepositoryError or NoSpaceError.
        """
        path = self._freeze(uuid)
        with durable.translate_os_errors("write", path):
            if memory is None:
                path.unlink(missing_ok=True)
                return
            document = {
                "version": VERSION,
                "count": memory.count,
                "last": memory.last.isoformat(),
                "instance": memory.instance,
            }
            durable.make_directory(path.parent)
            durable.write_atomic(path, json.dumps(document).encode() + b"\n", MODE)

    def _freeze(self, uuid: str) -> Path:
        # without the suffix of a chain's record
        return self._folder(uuid) / "freeze"

    def _folder(self, uuid: str) -> Path:
        return self.directory / layout.escape(uuid, layout.MAX_IDENT)

    def _read(self, path: Path, uuid: str) -> Record | None:
        try:
            if not path.is_file() and path.exists():
                raise FormatError("it is no file")
            with path.open("rb") as file:
                data = file.read(MAX_SIZE)
            record = Record.parse(data)
            if record.uuid != uuid or self.path(uuid, record.chain) != path:
                raise FormatError("it is that of another domain or chain")
        except FileNotFoundError:
            return None
        except (OSError, FormatError) as err:
            log.warning("the record %s is ignored: %s", path, err)
            return None
        return record


def _disk(document: object) -> BaseDisk:
    if not isinstance(document, dict):
        raise FormatError("a disk is no JSON object")
    return BaseDisk(
        target=_get(document, "target", str),
        size=_get(document, "size", int),
        bitmap=_get(document, "bitmap", str),
        layers=tuple(_layer(each) for each in _get(document, "layers", list)),
    )


def _layer(document: object) -> ImageLayer:
    if not isinstance(document, dict):
        raise FormatError("an image is no JSON object")
    return ImageLayer(
        path=_get(document, "path", str),
        format=_get(document, "format", str),
        device=_get(document, "device", int),
        inode=_get(document, "inode", int),
    )


def _get(document: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = document.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{key!r} is missing or no {kind.__name__}")
    return value
