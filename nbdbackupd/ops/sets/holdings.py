"""What the sets of a domain hold together: how much, how much of it is proven, what is damaged."""

from collections.abc import Iterable
from dataclasses import dataclass

from nbdbackupd.model.proof import soundness
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.sets.sets import DomainSet
from nbdbackupd.repo import verified
from nbdbackupd.units import local_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdings:
    """All sets together.

    ``stored_bytes`` is what their files take, manifests left out; ``verified_points`` of
    ``points`` were proven with all that they are made of, the last time at ``verified`` (RFC 3339
    UTC, or empty). ``damage`` has a line for each point in whose files a verification found some.
    """

    stored_bytes: int = 0
    points: int = 0
    verified_points: int = 0
    verified: str = ""
    damage: tuple[str, ...] = ()


def look(sets: Iterable[DomainSet]) -> Holdings:
    """Read what verifications have noted, and count."""
    size = points = proven = 0
    newest, damage = "", []
    for each in sets:
        proofs = verified.read(each.path, each.known)
        size += sum(own_bytes(each.known.points).values())
        points += len(each.known.points)
        proven += sum(bool(one.verified) for one in soundness(each.known, proofs).values())
        newest = max([newest, *(one.verified for one in proofs.values() if not one.damage)])
        damage += [
            f"{each.path.name}: point {one.point} was damaged at {local_time(one.verified)}: "
            f"{one.damage[0]}"
            for one in proofs.values()
            if one.damage
        ]
    return Holdings(
        stored_bytes=size,
        points=points,
        verified_points=proven,
        verified=newest,
        damage=tuple(damage),
    )
