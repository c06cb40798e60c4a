"""What must be done so that libvirt and the images agree with the points that are committed.

Four places know something of a chain: its set, libvirt's checkpoints, the bitmaps in the images,
and the record in the state directory. The set says which checkpoint the next increment starts
from; the bitmap of that unique name is the only proof that the changes since then are known;
libvirt's metadata is made to agree. What is not certainly ours and useless is left alone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from nbdbackupd.model.chain import BackupSet
from nbdbackupd.model.domain import bitmap_layers
from nbdbackupd.model.naming import is_foreign, tag_of, tag_of_chain
from nbdbackupd.model.plan import BaseDisk, DiskState, why_full

GONE = "the domain has no such disk now, or its image can't be examined"
LOST = "its bitmap is missing or inconsistent in the running QEMU"


class Fate(StrEnum):
    """What a checkpoint of ours is. Only those of DEAD, STRAY and SUPERSEDED are removed."""

    BASE = "base"
    SUPERSEDED = "superseded"
    DEAD = "dead"
    STRAY = "stray"
    ELSEWHERE = "elsewhere"
    UNSURE = "unsure"
    UNKNOWN = "unknown"


WHY = {
    Fate.BASE: "the next increment starts from it",
    Fate.SUPERSEDED: "a newer point of its chain is the base",
    Fate.DEAD: "made by a run that died before its point was published",
    Fate.STRAY: "no restore point of its set made it",
    Fate.ELSEWHERE: "the base of another copy of its set",
    Fate.UNSURE: "its set is not at hand",
    Fate.UNKNOWN: "its chain is not known here",
}
USELESS = (Fate.SUPERSEDED, Fate.DEAD, Fate.STRAY)
LEFT_ALONE = (Fate.ELSEWHERE, Fate.UNSURE)


class Action(StrEnum):
    """What a step does: make libvirt know a checkpoint again, or take one away."""

    REDEFINE = "redefine"
    REMOVE = "remove"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownChain:
    """A chain of the domain: its base (empty: its points have none) and what that recorded.

    ``committed`` are the checkpoints of all its points. ``elsewhere`` are those that a point of
    another copy of the set may need. ``is_whole``: the set itself was read; from a record of it
    alone nothing can be said to be useless. ``lost`` are disks that had lost the base's bitmap
    when they were last asked.
    """

    id: str
    base: str
    point: str = ""
    disks: tuple[BaseDisk, ...] = ()
    committed: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    is_whole: bool = False
    set: str = ""
    lost: frozenset[str] = frozenset()

    @classmethod
    def of_set(cls, known: BackupSet, path: str) -> "KnownChain | None":
        """The chain of a set that was read, or None if it has no full yet."""
        if known.head is None or known.full is None:
            return None
        # what another program made is neither redefined nor removed
        base = "" if is_foreign(known.head.checkpoint) else known.head.checkpoint
        return cls(
            id=known.full.chain,
            base=base,
            point=known.head.id,
            disks=tuple(BaseDisk.of(disk) for disk in known.head.disks if disk.bitmap),
            committed=frozenset(point.checkpoint for point in known.points if point.checkpoint),
            is_whole=True,
            set=path,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What is there: libvirt's checkpoints, foreign ones included, and the disks by target.

    ``sound``: for each checkpoint of which a running domain was asked, the disks that can tell
    what changed since then.
    """

    is_active: bool
    checkpoints: frozenset[str]
    disks: Mapping[str, DiskState]
    sound: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Held:
    """A bitmap in an image. Of a running guest's top image ``is_sound`` says nothing: None."""

    target: str
    path: str
    is_sound: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A checkpoint or bitmap of ours. ``problems``: why disks can't use this base, by target."""

    name: str
    fate: Fate
    chain: str = ""
    in_libvirt: bool = False
    held: tuple[Held, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One thing to do about checkpoint ``name``.

    REDEFINE: for the disks ``targets``. REMOVE: its bitmaps from ``images``, which belong to the
    disks ``targets``, and, if ``metadata``, then what libvirt knows of it.
    """

    action: Action
    name: str
    why: str
    chain: str = ""
    targets: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    metadata: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All of our checkpoints in a domain and what to do; ``foreign`` counts those of others."""

    entries: tuple[Entry, ...] = ()
    steps: tuple[Step, ...] = ()
    foreign: int = 0


def reconcile(view: View, chains: Sequence[KnownChain], dead: Collection[str] = ()) -> Plan:
    """Compare what is there with the chains that are known.

    ``dead`` are checkpoints of runs that certainly died without a point. Doing the steps in
    their order leads to a view for which there are none; nothing is lost if they end midway.
    """
    by_tag = _by_tag(chains)
    bases = {chain.base: chain for chain in chains if chain.base}
    held = _held(view.disks)
    names = view.checkpoints | held.keys()
    entries, steps = [], []
    for name in sorted({each for each in names if tag_of(each)} | bases.keys()):
        found = held.get(name, ())
        if name in bases:
            entry = _base(view, bases[name], found)
            steps += _base_steps(view, bases[name], entry)
        else:
            chain = by_tag.get(tag_of(name))
            entry = Entry(
                name=name,
                fate=_fate(name, chain, dead),
                chain=chain.id if chain is not None else "",
                in_libvirt=name in view.checkpoints,
                held=found,
            )
            if entry.fate in USELESS:
                steps.append(_removal(entry, WHY[entry.fate]))
        entries.append(entry)
    foreign = sum(not tag_of(each) for each in names)
    return Plan(entries=tuple(entries), steps=tuple(steps), foreign=foreign)


def drop(view: View, tag: str | None) -> tuple[Step, ...]:
    """The steps that take away every checkpoint and bitmap of one chain, or of all (None of tags).

    Its base as well.
    """
    held = _held(view.disks)
    return tuple(
        _removal(
            Entry(
                name=name,
                fate=Fate.UNKNOWN,
                in_libvirt=name in view.checkpoints,
                held=held.get(name, ()),
            ),
            "by request",
        )
        for name in sorted(view.checkpoints | held.keys())
        if tag_of(name) and tag in (None, tag_of(name))
    )


def _by_tag(chains: Sequence[KnownChain]) -> dict[str, KnownChain]:
    """The chains by tag; of a tag that two chains share nothing can be said."""
    found: dict[str, KnownChain] = {}
    twice = set()
    for chain in chains:
        tag = tag_of_chain(chain.id)
        if tag in found:
            twice.add(tag)
        found[tag] = chain
    return {tag: chain for tag, chain in found.items() if tag not in twice}


def _held(disks: Mapping[str, DiskState]) -> dict[str, tuple[Held, ...]]:
    """Where the bitmaps are, by name."""
    found: dict[str, list[Held]] = {}
    for target, state in disks.items():
        for number, layer in enumerate(state.layers):
            is_unclear = state.is_live and number == 0
            for name, is_sound in state.bitmaps.get(layer.path, {}).items():
                each = Held(target, layer.path, None if is_unclear else is_sound)
                found.setdefault(name, []).append(each)
    return {name: tuple(places) for name, places in found.items()}


def _fate(name: str, chain: KnownChain | None, dead: Collection[str]) -> Fate:
    if name in dead:
        return Fate.DEAD
    if chain is None:
        return Fate.UNKNOWN
    if name in chain.elsewhere:
        return Fate.ELSEWHERE
    if not chain.is_whole:
        return Fate.UNSURE
    return Fate.SUPERSEDED if name in chain.committed else Fate.STRAY


def _base(view: View, chain: KnownChain, held: tuple[Held, ...]) -> Entry:
    problems = {}
    # only of a checkpoint that libvirt knows a running QEMU tells, and images that are at rest
    lost = chain.lost if view.is_active and chain.base not in view.checkpoints else frozenset()
    for disk in chain.disks:
        state = view.disks.get(disk.target)
        why = why_full(disk, state) if state is not None else GONE
        if not why and disk.target not in view.sound.get(chain.base, {disk.target} - lost):
            why = LOST
        if why:
            problems[disk.target] = why
    return Entry(
        name=chain.base,
        fate=Fate.BASE,
        chain=chain.id,
        in_libvirt=chain.base in view.checkpoints,
        held=held,
        problems=problems,
    )


def _base_steps(view: View, chain: KnownChain, entry: Entry) -> list[Step]:
    usable = tuple(disk.target for disk in chain.disks if disk.target not in entry.problems)
    if usable and not entry.in_libvirt:
        why = "libvirt does not know it, and the next increment starts from it"
        redefinition = Step(
            action=Action.REDEFINE, name=entry.name, why=why, chain=chain.id, targets=usable
        )
        return [redefinition, *_broken(view, chain, entry, usable)]
    return _broken(view, chain, entry, usable)


def _broken(view: View, chain: KnownChain, entry: Entry, usable: tuple[str, ...]) -> list[Step]:
    """Clean up after lost bitmaps of the base; of a running guest only if no disk has one left.

    A bitmap that is sound stays even where it can't be used now: its disk may come back.
    """
    if not chain.is_whole:
        return []
    broken: tuple[Held, ...] = ()
    forget = entry.in_libvirt and not any(each.is_sound for each in entry.held)
    if view.is_active:
        why = LOST
        forget = forget and not usable and {*entry.problems.values()} == {LOST}
    else:
        needed = {
            layer.path
            for disk in chain.disks
            if disk.target in usable
            for layer in bitmap_layers(disk.layers, view.disks[disk.target].layers)
        }
        broken = tuple(each for each in entry.held if not each.is_sound and each.path not in needed)
        why = "inconsistent" if broken else "no image holds its bitmap any more"
    if not broken and not forget:
        return []
    return [_removal(replace(entry, held=broken, in_libvirt=forget), why)]


def _removal(entry: Entry, why: str) -> Step:
    return Step(
        action=Action.REMOVE,
        name=entry.name,
        why=why,
        chain=entry.chain,
        targets=_targets(entry.held),
        images=_images(entry.held),
        metadata=entry.in_libvirt,
    )


def removal(name: str, disks: Mapping[str, DiskState], why: str) -> Step:
    """The step that takes away a checkpoint of which libvirt knows, or may know."""
    held = _held(disks).get(name, ())
    return _removal(Entry(name=name, fate=Fate.SUPERSEDED, in_libvirt=True, held=held), why)


def _targets(held: tuple[Held, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.target for each in held))


def _images(held: tuple[Held, ...]) -> tuple[str, ...]:
    """Each image once: two disks may share one further down."""
    return tuple(dict.fromkeys(each.path for each in held))
