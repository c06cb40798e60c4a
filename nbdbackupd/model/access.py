"""Whether an account may do something by the mode bits of a file: path_resolution(7)."""

from dataclasses import dataclass
from typing import Final

READ: Final = 4
WRITE: Final = 2
PASS: Final = 1
"""Of a directory: go through it to a name inside."""


@dataclass(frozen=True, slots=True)
class Account:
    """A process' ids; ``groups`` holds all of its groups, the first one included."""

    uid: int
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"uid {self.uid}"


def allows(mode: int, owner: tuple[int, int], account: Account, wanted: int) -> bool:
    """Whether ``account`` gets all of the ``wanted`` bits of a directory.

    ``mode`` and ``owner`` (uid, gid) are stat(2)'s. The first class that fits decides alone: an
    owner without a right has none though others have it. Root passes everywhere.
    """
    uid, gid = owner
    if account.uid == 0:
        return True
    if account.uid == uid:
        bits = mode >> 6
    elif gid in account.groups:
        bits = mode >> 3
    else:
        bits = mode
    return bits & wanted == wanted
