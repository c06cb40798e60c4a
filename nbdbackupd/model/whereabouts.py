"""Where a domain last ran, by what the hosts that share its state directory have noted.

Each host has one note for a domain, which it alone writes. A start takes the number after the
highest one, so the highest number is where the domain last ran, whatever the hosts' clocks say.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MIGRATED = "migrated"


class Phase(StrEnum):
    """What a host says of the domain: about to start it, running it, seen it end."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What one host has noted. ``host`` is its machine id, ``name`` what people call it.

    ``arrived``: a migration brought the guest, which may go on where it came from if that fails.
    ``reason`` is libvirt's word for the end. ``saved`` is the point that holds what the end
    number ``saved_number`` left.
    """

    host: str
    name: str
    domain: str
    number: int
    phase: Phase
    arrived: bool = False
    reason: str = ""
    saved: str = ""
    saved_number: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """What the notes say to a host whose libvirt does not run the domain.

    ``holder``: another host that has its images open, or may. ``last``: where it last ran.
    ``saver``: another host that has saved what the last end left. Without a holder, and with a
    last, all of its images are closed everywhere.
    """

    holder: Note | None = None
    last: Note | None = None
    saver: Note | None = None

    @property
    def is_closed(self) -> bool:
        """Whether it is proven that no host has its images open."""
        return self.holder is None and self.last is not None


def standing(notes: Iterable[Note], here: str) -> Standing:
    """Judge the notes on the host ``here``, where the domain is off.

    What another host runs it has until it notes the end, or until the domain was started anew
    elsewhere: whoever does that has made sure that the other one is dead. A migration proves no
    such thing, for it may fail. Of the own note a start without an end is an end that nobody saw.
    """
    found = sorted(notes, key=lambda note: (-note.number, note.host))
    begun = [note for note in found if note.phase is not Phase.STARTING]
    last = max(begun, key=lambda note: note.number, default=None)
    for note in found:
        if note.host == here:
            if note.phase is not Phase.STARTING and _went_away(note, begun):
                return Standing(holder=note, last=last)
        elif _may_have(note, begun):
            return Standing(holder=note, last=last)
    savers = (note for note in begun if last and note.saved and note.saved_number == last.number)
    return Standing(last=last, saver=next((note for note in savers if note.host != here), None))


def _may_have(note: Note, begun: list[Note]) -> bool:
    if note.phase is Phase.ENDED:
        return _went_away(note, begun)
    return not any(
        other.number > note.number and not other.arrived
        for other in begun
        if other.host != note.host
    )


def _went_away(note: Note, begun: list[Note]) -> bool:
    """Whether it was migrated to a host that has not noted that it came."""
    return note.reason == MIGRATED and all(other.number <= note.number for other in begun)


def next_number(notes: Iterable[Note]) -> int:
    """The number of a start."""
    return max((note.number for note in notes), default=0) + 1
