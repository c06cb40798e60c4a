"""The points of a domain as retention sees them: all its sets are one history."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import ConfigError, DomainError, RepositoryError
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.host import Host
from nbdbackupd.model.proof import Proof, soundness
from nbdbackupd.model.removal import Removal, plan_removal
from nbdbackupd.model.retention import Decision, PointFacts, Rules, decide
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.removal.live import live_sets
from nbdbackupd.ops.sets.sets import DomainSet
from nbdbackupd.repo import generation, protected, verified

log = logging.getLogger(__name__)
BASE: Final = "the next increment starts from it"
FRESH_SECONDS: Final = 2 * 86400.0
"""A timer prunes each day; what is older than this should have been judged by it."""
UNCLEAR: Final = "its set is damaged: 'nbdbackupctl verify' tells more"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What retention wants of a domain's sets: the decision, and what that means for each set.

    ``fresh``: ids of points that no prune has judged before.
    """

    sets: tuple[DomainSet, ...]
    decision: Decision
    removals: Mapping[Path, Removal]
    fresh: frozenset[str] = frozenset()

    @property
    def gone(self) -> int:
        """How many points are to leave."""
        return sum(len(each.gone) for each in self.removals.values())

    @property
    def total(self) -> int:
        """How many sound points there are."""
        return sum(len(each.known.points) for each in self.sets)

    @property
    def is_drastic(self) -> bool:
        """Whether more than half of all points would leave at once, and of those judged before.

        Runs of each hour make more points in a day than rules of days keep in all.
        """
        older = self.total - len(self.fresh)
        gone = self.gone - sum(len(each.gone & self.fresh) for each in self.removals.values())
        return 2 * self.gone > self.total and 2 * gone > older


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of a point: ``kept``, ``removed`` or ``merged``, and why.

    ``into`` is the id of the point that it becomes a part of; ``bytes`` is what files of its own
    take.
    """

    set: Path
    point: RestorePoint
    fate: str
    reasons: tuple[str, ...]
    into: str = ""
    bytes: int = 0

    @property
    def text(self) -> str:
        """``daily 2026-01-31, newest``, or what else becomes of it."""
        fate = f"merged into {self.into}" if self.into else self.fate
        return ", ".join(self.reasons) or fate

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON object."""
        return {
            "set": str(self.set),
            "point": self.point.id,
            "level": self.point.level.value,
            "created": self.point.created,
            "stored_bytes": self.bytes,
            "fate": self.fate,
            "into": self.into,
            "reasons": list(self.reasons),
        }


def rules_of(settings: DomainSettings) -> Rules:
    """The rules as the configuration has them."""
    return Rules(
        last=settings.retention_last,
        within=settings.retention_within or 0.0,
        hourly=settings.retention_hourly,
        daily=settings.retention_daily,
        weekly=settings.retention_weekly,
        monthly=settings.retention_monthly,
        yearly=settings.retention_yearly,
        minimum=settings.retention_minimum,
    )


def newest_of(sets: Sequence[DomainSet]) -> DomainSet | None:
    """The newest of the sets that has points."""
    return next((each for each in reversed(sets) if each.known.points), None)


def settings_of(newest: DomainSet, host: Host) -> DomainSettings:
    """By the name that the domain had at its newest point.

    Raises ConfigError, DomainError if they depend on libvirt and it can't be asked.
    """
    name = newest.known.newest.domain
    return configured.settings_of(name, configured.read(host), host)[2]


def state_dirs_of(settings: DomainSettings, host: Host) -> tuple[Path, ...]:
    """The state directories of this host, the one in which a run notes its bases first."""
    is_own = settings.is_default("checkpoint_directory") or host.is_state_given
    first = host.state_dir if is_own else settings.checkpoint_directory
    return tuple(dict.fromkeys((first, *configured.state_directories(host))))


def told(sets: Sequence[DomainSet], host: Host) -> dict[str, str]:
    """What the rules want of each point, in words; none without a rule, or where it is unknown."""
    newest = newest_of(sets)
    try:
        settings = settings_of(newest, host) if newest is not None else None
    except (ConfigError, DomainError) as err:
        log.info("what the rules of retention want is not known: %s", err.message)
        return {}
    if settings is None:
        return {}
    return {each.point.id: each.text for each in _wanted(sets, settings, host)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unwanted:
    """How many points a prune would remove; ``size`` is what those take that are dropped."""

    points: int = 0
    size: int = 0


def unwanted(sets: Sequence[DomainSet], settings: DomainSettings, host: Host) -> Unwanted:
    """What a prune would remove now; nothing without a rule, or where it is unknown."""
    going = [each for each in _wanted(sets, settings, host) if each.fate != "kept"]
    size = sum(each.bytes for each in going if not each.into)
    return Unwanted(points=len(going), size=size)


def _wanted(sets: Sequence[DomainSet], settings: DomainSettings, host: Host) -> list[Verdict]:
    rules = rules_of(settings)
    if not rules.are_set:
        return []
    try:
        judged = judge(sets, rules, host.now(), state_dirs_of(settings, host))
    except RepositoryError as err:
        log.info("what the rules of retention want is not known: %s", err.message)
        return []
    return [one for each in sets for one in verdicts(each, judged)]


def judge(
    sets: Sequence[DomainSet], rules: Rules, now: datetime, state_dirs: Sequence[Path]
) -> Judgement:
    """What is to become of a domain's points, given all its sets, the newest at the end.

    ``state_dirs`` are those of this host. Raises RepositoryError if it can't be told which points
    are protected.
    """
    live = live_sets(sets, state_dirs)
    proofs = {each.path: verified.read(each.path, each.known) for each in sets}
    facts = [
        fact
        for each in sets
        for fact in _facts(each, proofs[each.path], now, is_live=each.path in live)
    ]
    decision = decide(facts, rules, now)
    removals = {}
    for each in sets:
        doomed = decision.doomed.intersection(point.id for point in each.known.points)
        if doomed:
            damaged = {ident for ident, proof in proofs[each.path].items() if proof.damage}
            removals[each.path] = plan_removal(
                each.known, doomed, live=each.path in live, damaged=damaged
            )
    return Judgement(
        sets=tuple(sets), decision=decision, removals=removals, fresh=_fresh(sets, facts, now)
    )


def _fresh(sets: Sequence[DomainSet], facts: Sequence[PointFacts], now: datetime) -> frozenset[str]:
    """The points of the last two days that are newer than the last removal; none without one."""
    last = max((generation.switched(each.path) for each in sets), default=0.0)
    begin = max(last, now.timestamp() - FRESH_SECONDS)
    return frozenset(each.id for each in facts if last and each.created.timestamp() > begin)


def verdicts(found: DomainSet, judged: Judgement) -> list[Verdict]:
    """What becomes of each point of a set, oldest first."""
    removal = judged.removals.get(found.path, Removal((), (), {}))
    into = {ident: each.into for each in removal.merges for ident in each.absorbed}
    sizes = own_bytes(found.known.points)
    fates = dict.fromkeys(removal.dropped, "removed") | dict.fromkeys(into, "merged")
    return [
        Verdict(
            set=found.path,
            point=point,
            fate=fates.get(point.id, "kept"),
            reasons=(
                *judged.decision.reasons[point.id],
                *filter(None, [removal.needed.get(point.id)]),
            ),
            into=into.get(point.id, ""),
            bytes=sizes[point.id],
        )
        for point in found.known.points
    ]


def _facts(
    found: DomainSet, proofs: Mapping[str, Proof], now: datetime, *, is_live: bool
) -> list[PointFacts]:
    points = found.known.points
    notes = protected.read(found.path, [point.id for point in points])
    held = {ident: note.text for ident, note in notes.items() if note.holds(now)}
    states = soundness(found.known, proofs)
    head = found.known.head if is_live else None

    def pinned(point: RestorePoint) -> str:
        if found.problems:
            return UNCLEAR
        return BASE if head is not None and point.id == head.id else ""

    return [
        PointFacts(
            id=point.id,
            created=datetime.fromisoformat(point.created).astimezone(),
            consistency=point.consistency,
            protected=held.get(point.id, ""),
            pinned=pinned(point),
            is_sound=not states[point.id].damage,
            is_verified=bool(states[point.id].verified),
        )
        for point in points
    ]
