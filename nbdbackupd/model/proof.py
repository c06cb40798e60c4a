"""What verifications have found of points, and what follows for those that hang on them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from nbdbackupd.model.chain import BackupSet, DiskMode, RestorePoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What the last verification of a point's own files found.

    ``content`` tells which files they were, ``verified`` is RFC 3339 UTC, ``size`` what was read,
    in bytes. ``damage`` has a line for each thing that is wrong, none if all are sound.
    """

    point: str
    content: str
    verified: str
    size: int
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Soundness:
    """What is known of all that a point is made of, its parents' files included.

    ``verified``: all was proven, the part that waits longest at that time (RFC 3339 UTC); empty
    if not all was. ``damage``: the first thing that is wrong, or empty.
    """

    verified: str = ""
    damage: str = ""

    def __and__(self, other: "Soundness") -> "Soundness":
        """What is known of two things together."""
        both = self.verified and other.verified
        verified = min(self.verified, other.verified) if both else ""
        return Soundness(verified, self.damage or other.damage)


def content_of(point: RestorePoint) -> str:
    """A digest of what the files of a point are: another one if they were written anew.

    Its manifest may be another one as long as it names the same files.
    """
    disks = sorted((disk.file, disk.file_size, disk.index.sha256) for disk in point.disks)
    files = sorted((file.name, file.sha256) for file in point.files)
    return hashlib.sha256(json.dumps([disks, files]).encode()).hexdigest()


def soundness(known: BackupSet, proofs: Mapping[str, Proof]) -> dict[str, Soundness]:
    """What is known of each point, by its id; ``proofs`` are by point, of these very files."""
    found: dict[str, Soundness] = {}
    of_disks: dict[tuple[str, str], Soundness] = {}
    for point in known.points:
        together = own = _own(proofs.get(point.id))
        for disk in point.disks:
            state = own
            if disk.mode is DiskMode.DELTA:
                state = own & of_disks.get((point.parent, disk.target), Soundness())
            of_disks[point.id, disk.target] = state
            together &= state
        found[point.id] = together
    return found


def _own(proof: Proof | None) -> Soundness:
    if proof is None:
        return Soundness()
    if proof.damage:
        return Soundness(damage=f"point {proof.point} is damaged: {proof.damage[0]}")
    return Soundness(verified=proof.verified)
