"""When to leave a guest alone whose agent let a freeze's deadline pass (F-45).

Such an agent may freeze its guest late, or hang; a run each night that asks again does harm each
night. The first time it is left alone for a day and a half, then twice as long, and so on. A guest
that was started anew is asked again: its agent may have been repaired, and hangs no more.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from nbdbackupd.units import local_time

MAY_BE_FROZEN: Final = "THE GUEST MAY BE FROZEN, OR FREEZE LATE"
"""How the warning of a point begins whose thaw was not answered in time."""

FIRST_HOURS: Final = 36
MOST_HOURS: Final = 12 * 24


@dataclass(frozen=True, slots=True)
class FreezeMemory:
    """How often in a row the agent has let a deadline pass, and when it did last.

    ``instance`` tells that run of the guest from others, or is empty.
    """

    count: int
    last: datetime
    instance: str = ""

    @property
    def until(self) -> datetime:
        """When it is asked again."""
        hours = FIRST_HOURS << min(max(self.count, 1) - 1, 16)
        return self.last + timedelta(hours=min(hours, MOST_HOURS))

    def obstacle(self, now: datetime, instance: str = "") -> str:
        """Why the guest, which runs as ``instance`` now, is not frozen, or nothing."""
        if self.instance and instance and self.instance != instance:
            return ""
        # a clock that was put back is no reason to wait for years
        if not self.last <= now < self.until:
            return ""
        return (
            f"its agent did not answer the freeze of {local_time(self.last)}; it is asked "
            f"again from {local_time(self.until)} on, or at once with freeze.policy 'require' "
            f"('backup --freeze require')"
        )


def once_let_go(warning: str) -> str:
    """A warning of a point, to be told when nothing holds its guest any more."""
    if not warning.startswith(MAY_BE_FROZEN):
        return warning
    return "the guest is held no more; its agent had not confirmed the thaw in time"


def after(
    known: FreezeMemory | None, now: datetime, *, is_unanswered: bool, instance: str = ""
) -> FreezeMemory | None:
    """What is to be remembered after a freeze of the guest's ``instance`` was tried."""
    if not is_unanswered:
        return None
    return FreezeMemory((known.count if known is not None else 0) + 1, now, instance)
