"""How well a domain is protected: what is known of its backups, judged against limits."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum


class Health(StrEnum):
    """From good to bad, as the order of the members is; ``UNKNOWN``: it could not be found out."""

    OK = "ok"
    WARNING = "warning"
    UNKNOWN = "unknown"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """The higher, the worse."""
        return list(Health).index(self)


UNPROTECTED = (
    "unprotected: no file of the configuration but the main one, no timer and no on_shutdown is "
    "for it"
)
GONE = (
    "libvirt knows no such domain; if it is gone for good, see to it that nothing names it any "
    "more: no file, no timer, no sets in the repository"
)
UNHEARD = (
    "on_shutdown is set, and libvirt calls no hook of ours: the end of its guest saves nothing"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Ages of the newest point, in seconds, beyond which it is a warning, or critical."""

    warning: float
    critical: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a domain.

    ``newest`` is the instant that its newest point holds, None without a point. ``problem`` says
    why the sets can't be read, ``damage`` what in them is damaged, ``warnings`` what the newest
    point lacks, ``failure`` how the last run failed; each is empty if there is none.

    ``is_covered``: the configuration, a timer or the end of its guest is for it; ``unscheduled``
    says why it is not saved all the same, or is empty. ``is_wanted``: it is to be saved on
    schedule, which the configuration can rule out. ``is_known``: libvirt knows it; None if libvirt
    was not asked. ``is_unheard``: the end of its guest is to be saved, and nobody tells us of it.
    """

    newest: datetime | None = None
    problem: str = ""
    damage: str = ""
    warnings: tuple[str, ...] = ()
    failure: str = ""
    is_covered: bool = True
    unscheduled: str = ""
    is_wanted: bool = True
    is_known: bool | None = None
    is_unheard: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The worst that was found, and everything that was, the worst first."""

    health: Health
    reasons: tuple[str, ...] = ()


def judge(facts: Facts, limits: Limits, now: datetime) -> Verdict:
    """What is wrong with a domain's protection at ``now``."""
    found: list[tuple[Health, str]] = []
    if facts.problem:
        found.append((Health.CRITICAL, facts.problem))
    if facts.damage:
        found.append((Health.CRITICAL, facts.damage))
    if facts.failure:
        worse = facts.newest is None and not facts.problem
        found.append((Health.CRITICAL if worse else Health.WARNING, facts.failure))
    if facts.is_known is False and facts.is_covered:
        found.append((Health.WARNING, GONE))
    if facts.is_known is not False and not facts.is_covered:
        found.append((Health.WARNING, UNPROTECTED))
    if facts.unscheduled:
        found.append((Health.WARNING, facts.unscheduled))
    if facts.is_unheard:
        found.append((Health.WARNING, UNHEARD))
    # a domain that is gone gets no new points, and one that is not wanted needs none
    if facts.is_wanted and facts.is_known is not False and not facts.problem:
        found += _of_age(facts, limits, now)
    found += [(Health.WARNING, each) for each in facts.warnings]
    found.sort(key=lambda each: -each[0].rank)
    worst = found[0][0] if found else Health.OK
    return Verdict(health=worst, reasons=tuple(reason for _, reason in found))


def _of_age(facts: Facts, limits: Limits, now: datetime) -> list[tuple[Health, str]]:
    if facts.newest is None:
        return [(Health.WARNING, "no restore point yet")] if facts.is_covered else []
    age = (now - facts.newest).total_seconds()
    for health, limit in ((Health.CRITICAL, limits.critical), (Health.WARNING, limits.warning)):
        if age > limit:
            return [(health, f"the newest point is {age_text(age)} old")]
    if age < -timedelta(days=1).total_seconds():
        return [(Health.WARNING, "the newest point is from the future: fix a clock")]
    return []


def age_text(seconds: float) -> str:
    """``45 s``, ``12 min``, ``5 h``, ``3 days``: one number, rounded down."""
    for length, unit in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // (86400 if unit == 'days' else length))} {unit}"
    return f"{max(0, int(seconds))} s"
