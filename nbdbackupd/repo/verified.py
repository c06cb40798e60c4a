"""The newest verification of each point, kept in the set beside its manifests.

``verified/<point>.json``. It belongs to no manifest: what is missing or damaged there takes
nothing from the point, which counts as never verified. Nothing follows from "sound" but that
somebody says so; from "damaged", that the next increment does not hang on it.
"""

import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import IntegrityError, RepositoryError, one_line
from nbdbackupd.files import open_untrusted
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.model.proof import Proof, content_of, soundness
from nbdbackupd.plain import versioned
from nbdbackupd.repo import layout
from nbdbackupd.units import utc_time

log = logging.getLogger(__name__)
VERSION: Final = 1
MAX_SIZE: Final = 64 << 10
MAX_DAMAGE: Final = 20
"""Lines of damage that are kept; the rest is what ``verify`` tells."""
MAX_LINE: Final = 500
MODE: Final = 0o644
"""No secret, and the set shuts others out: no reason to warn where modes can't be set."""


def write(set_path: Path, proof: Proof) -> None:
    """Replace a point's note, durably; the set must be there.

    Raises RepositoryError or NoSpaceError.
    """
    path = set_path / layout.verified(proof.point)
    note = versioned(
        point=proof.point,
        content=proof.content,
        verified=proof.verified,
        bytes=proof.size,
        damage=[line[:MAX_LINE] for line in proof.damage[:MAX_DAMAGE]],
    )
    data = json.dumps(note, indent=1).encode() + b"\n"
    # the set is not made: a repository that is not mounted any more must not seem to be there
    with (
        durable.translate_os_errors("write", path),
        durable.hold_directory(set_path, path.parent, make=True) as at,
    ):
        durable.write_atomic(path, data, MODE, at=at)


def read(set_path: Path, known: BackupSet) -> dict[str, Proof]:
    """The notes of these points, by point; one that can't be used is told, and counts as none.

    So does one of other files than the point has now.
    """
    folder = set_path / layout.VERIFIED
    try:
        durable.refuse_links(set_path, folder)
        names = {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return {}
    except (OSError, RepositoryError) as err:
        log.warning("verifications noted in %s can't be read: %s", folder, err)
        return {}
    found = {}
    for point in known.points:
        path = set_path / layout.verified(point.id)
        proof = _read(path) if path.name in names else None
        if proof is not None and (proof.point, proof.content) == (point.id, content_of(point)):
            found[point.id] = proof
    return found


def damage_of(set_path: Path, known: BackupSet, point: RestorePoint) -> str:
    """What was found damaged of all that a point is made of: the first of it, or nothing."""
    return soundness(known, read(set_path, known))[point.id].damage


def _read(path: Path) -> Proof | None:
    try:
        with os.fdopen(open_untrusted(path), "rb") as file:
            data = file.read(MAX_SIZE + 1)
        if len(data) > MAX_SIZE:
            raise ValueError(f"larger than {MAX_SIZE} bytes")
        return _parse(documents.parse_json(data))
    except (IntegrityError, OSError, ValueError) as err:
        log.warning("a note of a verification can't be used: %s: %s", path, one_line(err))
        return None


def _parse(note: Any) -> Proof:
    """Raises ValueError."""
    kinds = {
        "version": int, "point": str, "content": str, "verified": str, "bytes": int, "damage": list
    }  # fmt: skip
    if not isinstance(note, dict) or {name: type(each) for name, each in note.items()} != kinds:
        raise ValueError("it is not what this program writes")
    if note["version"] != VERSION:
        raise ValueError(f"it has version {note['version']}, this program reads {VERSION}")
    damage = note["damage"]
    if note["bytes"] < 0 or not all(isinstance(line, str) and line for line in damage):
        raise ValueError("it is not what this program writes")
    return Proof(
        point=note["point"],
        content=note["content"],
        verified=_time(note["verified"]),
        size=note["bytes"],
        damage=tuple(line[:MAX_LINE] for line in damage[:MAX_DAMAGE]),
    )


def _time(text: str) -> str:
    """Raises ValueError unless it is a time as this program writes it: such texts sort by time."""
    if not manifest.is_time(text) or utc_time(datetime.fromisoformat(text)) != text:
        raise ValueError(f"{text[:40]!r} is no time in UTC")
    return text
