"""Protected points: a note in the set, beside its manifests, keeps retention away from a point.

``protected/<point>.json``. It belongs to no manifest. A note that can't be read protects: whoever
wrote it wanted the point kept.
"""

import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import IntegrityError
from nbdbackupd.files import open_untrusted
from nbdbackupd.format import manifest
from nbdbackupd.repo import layout
from nbdbackupd.units import local_time

log = logging.getLogger(__name__)
VERSION: Final = 1
MAX_SIZE: Final = 16 << 10
MAX_NOTE: Final = 500
MODE: Final = 0o600


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """That a point is to stay: since when, until when (RFC 3339 UTC; empty: for good), and why.

    ``damage`` says what is wrong with the note; then all else is unknown, and it has no end.
    """

    point: str
    since: str = ""
    until: str = ""
    note: str = ""
    damage: str = ""

    def holds(self, now: datetime) -> bool:
        """Whether it protects at that time."""
        return not self.until or datetime.fromisoformat(self.until) > now

    @property
    def text(self) -> str:
        """What follows "protected": until when, and why."""
        if self.damage:
            return f"by a note that can't be read ({self.damage}); 'unprotect' removes it"
        until = f"until {local_time(self.until)}" if self.until else "for good"
        return f"{until}: {self.note}" if self.note else until

    def to_json(self) -> dict[str, Any]:
        """The protection as a JSON object."""
        return {
            "point": self.point,
            "since": self.since,
            "until": self.until,
            "note": self.note,
            "damage": self.damage,
        }


def write(set_path: Path, protection: Protection) -> None:
    """Protect a point in place of what its note said before, durably; needs the set's lock.

    Raises RepositoryError or NoSpaceError.
    """
    path = set_path / layout.protection(protection.point)
    document = {"version": VERSION, **protection.to_json()}
    del document["damage"]
    data = json.dumps(document, indent=1).encode() + b"\n"
    with (
        durable.translate_os_errors("write", path),
        durable.hold_directory(set_path, path.parent, make=True) as at,
    ):
        durable.write_atomic(path, data, MODE, at=at)


def remove(set_path: Path, point: str) -> bool:
    """Take a point's note away, whatever it holds; False if it has none. Needs the set's lock.

    Raises RepositoryError.
    """
    path = set_path / layout.protection(point)
    with durable.translate_os_errors("remove", path):
        try:
            with durable.hold_directory(set_path, path.parent) as at:
                os.unlink(path.name, dir_fd=at)
                durable.fsync_directory(at)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def read(set_path: Path, points: Collection[str]) -> dict[str, Protection]:
    """The notes of these points, also those that have run out.

    Raises RepositoryError if it can't be told which there are: then nothing may be removed.
    """
    folder = set_path / layout.PROTECTED
    with durable.translate_os_errors("read", folder):
        durable.refuse_links(set_path, folder)
        try:
            # a file system may have stored a name in other letters
            names = {path.name.casefold() for path in folder.iterdir()}
        except FileNotFoundError:
            return {}
    paths = {point: set_path / layout.protection(point) for point in points}
    return {
        point: _read(path, point)
        for point, path in paths.items()
        if path.name.casefold() in names and os.path.lexists(path)
    }


def _read(path: Path, point: str) -> Protection:
    try:
        with os.fdopen(open_untrusted(path), "rb") as file:
            document = documents.parse_json(file.read(MAX_SIZE))
        if document.pop("version") != VERSION or document.get("point") != point:
            raise ValueError("it is of another version or point")
        if not all(type(each) is str for each in document.values()):
            raise ValueError("a member is no text")
        found = Protection(**document)
        if found.until and not manifest.is_time(found.until):
            raise ValueError("it ends at no time that there is")
    except (IntegrityError, OSError, ValueError, AttributeError, KeyError, TypeError) as err:
        log.warning("the protection %s can't be read, and protects: %s", path, err)
        return Protection(point=point, damage=" ".join(str(err).split()) or type(err).__name__)
    return found
