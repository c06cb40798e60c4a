"""What a restore puts beside the images: the domain's XML, and files that the guest needs.

NVRAM, loader, kernel, initrd and vTPM state come from the very point that is restored, into
``config/<role>/`` of the output directory; nothing on the host is touched (F-91).
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from nbdbackupd import durable, files
from nbdbackupd.errors import FormatError, IntegrityError
from nbdbackupd.model.chain import RestorePoint, StoredFile
from nbdbackupd.ops.restore import output_names
from nbdbackupd.repo import layout

XML_ROLE: Final = "domain-xml"
LIVE_ROLE: Final = "domain-xml-live"
TREE_ROLE: Final = "tpm-state"
COPIED: Final = frozenset({"loader", "nvram", "kernel", "initrd", TREE_ROLE})
CHUNK: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCopy:
    """A file of the set and where it goes; ``final`` is its name once it is complete.

    ``replaces``: the user agreed that one of that name is replaced.
    """

    stored: StoredFile
    source: Path
    final: Path
    replaces: bool = False

    @property
    def incomplete(self) -> Path:
        """Where it is written first."""
        return self.final.with_name(f"{self.final.name}{output_names.INCOMPLETE}")


def plan(directory: Path, point: RestorePoint, output: Path) -> tuple[FileCopy, ...]:
    """The files of a point that belong to a restored domain, the XML first."""
    copies = []
    taken: set[Path] = set()
    for stored in sorted(point.files, key=lambda each: each.role != XML_ROLE):
        if stored.role == XML_ROLE:
            final = output / output_names.xml_name(point.domain)
        elif stored.role in COPIED:
            final = output / output_names.CONFIG / stored.role / _name(stored, point)
        else:
            continue
        if final in taken:
            final = final.parent / output_names.clean(stored.name, "")
        taken.add(final)
        durable.refuse_links(output, final.parent)
        copies.append(FileCopy(stored=stored, source=directory / stored.name, final=final))
    return tuple(copies)


def live_xml(directory: Path, point: RestorePoint) -> FileCopy | None:
    """The XML of the domain as it ran when the point was made; it is read and goes nowhere."""
    for stored in point.files:
        if stored.role == LIVE_ROLE:
            source = directory / stored.name
            return FileCopy(stored=stored, source=source, final=source)
    return None


def _name(stored: StoredFile, point: RestorePoint) -> PurePosixPath:
    if stored.role == TREE_ROLE:
        try:
            parts = PurePosixPath(layout.path_in_tree(stored, point.id)).parts
        except FormatError:  # a name that was cut to fit can't be told any more
            parts = (stored.name,)
        return PurePosixPath(*(output_names.clean(part, "") for part in parts))
    base = PurePosixPath(stored.origin).name or stored.name
    return PurePosixPath(output_names.clean(base, ""))


def copy(each: FileCopy, check: Callable[[], None], **where: object) -> None:
    """Write the incomplete copy, durably; size and digest are proven on the way.

    Raises IntegrityError, OSError.
    """
    reading = files.open_sized(each.source, each.stored.size, **where)
    try:
        durable.make_directory(each.incomplete.parent)
        each.incomplete.unlink(missing_ok=True)
        writing = durable.create_exclusive(each.incomplete)
        try:
            size, found = _pour(reading, writing, each.stored.size, check)
            durable.fsync_file(writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
    # the files of a peer's set have no digest
    if (size, found) != (each.stored.size, each.stored.sha256 or found):
        raise IntegrityError(
            "file is damaged: its SHA-256 does not match", file=each.source, **where
        )


def _pour(reading: int, writing: int, most: int, check: Callable[[], None]) -> tuple[int, str]:
    size, total = 0, hashlib.sha256()
    # one that grows meanwhile is seen by a byte too many
    while part := os.read(reading, min(CHUNK, most + 1 - size)):
        check()
        durable.write_all(writing, part)
        total.update(part)
        size += len(part)
    return size, total.hexdigest()
