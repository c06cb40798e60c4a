"""What is done about checkpoints and bitmaps: nothing that could lose a change or touch others."""

import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest

from nbdbackupd.model import naming
from nbdbackupd.model.chain import ImageLayer, Level
from nbdbackupd.model.domain import Disk, Domain
from nbdbackupd.model.plan import BaseDisk, DiskState, plan_disks
from nbdbackupd.model.reconcile import (
    Action,
    Fate,
    KnownChain,
    Plan,
    Step,
    View,
    drop,
    reconcile,
)
from nbdbackupd.model.selection import select_disks
from tests.lib import points

CHAIN = "20261121T101500-0a1b2c3d"
OTHER_CHAIN = "20261121T101500-99999999"
OLD, BASE, NEW = (f"nbdbackup.0a1b2c3d.p{number}" for number in (1, 2, 3))
THEIRS = "nbdbackup.99999999.p1"
STRANGE = "nbdbackup.77777777.p1"
FOREIGN = (
    "virtnbdbackup.0",
    "bitmap0",
    "nbdbackup",
    "nbdbackup.x",
    "nbdbackup.x.",
    "nbdbackup2.x.y",
)
SIZE = 1 << 20
SOUND, BROKEN = True, False


def layer(name: str) -> ImageLayer:
    return ImageLayer(f"/img/{name}", "qcow2", 1, zlib.crc32(name.encode()))


def disk(target: str = "vda", *, bitmap: str = BASE, size: int = SIZE) -> BaseDisk:
    return BaseDisk(target=target, size=size, layers=(layer(target),), bitmap=bitmap)


def state(
    bitmaps: Mapping[str, bool] | None = None,
    *below: Mapping[str, bool],
    target: str = "vda",
    live: bool = False,
    size: int = SIZE,
) -> DiskState:
    """A disk whose recorded image is the lowest one; overlays lie on top of it."""
    held = [bitmaps or {}, *below]
    names = [f"{target}-over{number}" for number in range(len(below), 0, -1)] + [target]
    return DiskState(
        size=size,
        layers=tuple(layer(name) for name in names),
        bitmaps={f"/img/{name}": each for name, each in zip(names, held, strict=True)},
        is_live=live,
    )


def view(
    *states: DiskState,
    known: Iterable[str] = (),
    active: bool = False,
    sound: Mapping[str, frozenset[str]] | None = None,
) -> View:
    targets = [each.layers[-1].path.removeprefix("/img/") for each in states]
    return View(
        is_active=active,
        checkpoints=frozenset(known),
        disks={
            target: replace(each, is_live=active)
            for target, each in zip(targets, states, strict=True)
        },
        sound=sound or {},
    )


def chain(*disks: BaseDisk, whole: bool = True, **more: object) -> KnownChain:
    usual: dict[str, object] = {
        "id": CHAIN, "base": BASE, "disks": disks or (disk(),),
        "committed": frozenset({OLD, BASE}) if whole else frozenset({BASE}), "is_whole": whole,
    }  # fmt: skip
    return KnownChain(**{**usual, **more})  # type: ignore[arg-type]


def done(step: Step) -> tuple[str, str, tuple[str, ...], bool]:
    return step.action, step.name, step.images or step.targets, step.metadata


def steps(plan: Plan) -> list[tuple[str, str, tuple[str, ...], bool]]:
    return [done(step) for step in plan.steps]


def demotions(plan: Plan, chain: str) -> Mapping[str, str]:
    """Why disks of the chain's next increment must be read in full, by target."""
    bases = (entry for entry in plan.entries if entry.chain == chain and entry.fate is Fate.BASE)
    return next((entry.problems for entry in bases), {})


VDA = ("/img/vda",)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # all is well
        (view(state({BASE: SOUND}), known=[BASE]), []),
        (view(state({BASE: BROKEN}), known=[BASE], active=True), []),
        # libvirt lost it
        (view(state({BASE: SOUND})), [("redefine", BASE, ("vda",), False)]),
        (view(state({}), active=True), [("redefine", BASE, ("vda",), False)]),
        # superseded, of a dead run, or both kinds of traces apart
        (view(state({OLD: SOUND, BASE: SOUND}), known=[OLD, BASE]), [("remove", OLD, VDA, True)]),
        (view(state({NEW: SOUND, BASE: SOUND}), known=[BASE]), [("remove", NEW, VDA, False)]),
        (view(state({BASE: SOUND}), known=[BASE, NEW]), [("remove", NEW, (), True)]),
        (
            view(state({OLD: BROKEN, BASE: BROKEN}), known=[BASE, OLD], active=True),
            [("remove", OLD, VDA, True)],
        ),
        # the base itself is lost
        (view(state({BASE: BROKEN}), known=[BASE]), [("remove", BASE, VDA, True)]),
        (view(state({BASE: BROKEN})), [("remove", BASE, VDA, False)]),
        (view(state({}), known=[BASE]), [("remove", BASE, (), True)]),
        (view(state({})), []),
        (
            view(state({}), known=[BASE], active=True, sound={BASE: frozenset()}),
            [("remove", BASE, (), True)],
        ),
        # a lower image may be the disk's again
        (view(state({}, {BASE: SOUND}), known=[BASE], active=True, sound={BASE: frozenset()}), []),
        # another size, another disk: what is sound stays, the disk may come back
        (view(state({BASE: SOUND}, size=9), known=[BASE]), []),
        (view(state({BASE: SOUND}, size=9)), []),
        (view(known=[BASE]), [("remove", BASE, (), True)]),
        # others are not touched
        (view(state({BASE: SOUND, THEIRS: SOUND, STRANGE: BROKEN}), known=[BASE, THEIRS]), []),
        (view(state({BASE: SOUND, **dict.fromkeys(FOREIGN, False)}), known=[BASE, *FOREIGN]), []),
    ],
)  # fmt: skip
def test_steps(seen: View, expected: list[tuple[str, str, tuple[str, ...], bool]]) -> None:
    assert steps(reconcile(seen, [chain()])) == expected


@pytest.mark.parametrize(
    ("seen", "whole"),
    [
        # remembered: libvirt is not told of it again
        (view(state({}), state({}, target="vdb"), active=True), {"vda"}),
        # while it is off the image is the proof, and libvirt's word is newer than a note
        (view(state({BASE: SOUND}), state({BASE: SOUND}, target="vdb")), set()),
        (view(state({}), state({}, target="vdb"), known=[BASE], active=True), set()),
    ],
)
def test_what_was_lost(seen: View, whole: set[str]) -> None:
    ours = chain(disk("vda"), disk("vdb"), lost=frozenset({"vda"}))
    plan = reconcile(seen, [ours])
    assert demotions(plan, CHAIN).keys() == whole
    told = [step.targets for step in plan.steps]
    assert told == ([] if seen.checkpoints else [tuple(sorted({"vda", "vdb"} - whole))])
    both = reconcile(seen, [replace(ours, lost=frozenset({"vda", "vdb"}))])
    assert bool(both.steps) == (not seen.is_active)


def test_two_disks_and_layers() -> None:
    two = chain(disk("vda"), disk("vdb"))
    over = state({BASE: SOUND}, {BASE: SOUND})
    # each layer that must hold the bitmap does
    plan = reconcile(view(over, state({BASE: BROKEN}, target="vdb"), known=[BASE]), [two])
    assert steps(plan) == [("remove", BASE, ("/img/vdb",), False)]
    assert demotions(plan, CHAIN) == {"vdb": f"bitmap {BASE} in image /img/vdb is inconsistent"}
    for below in ({}, {BASE: BROKEN}):
        for active in (False, True):
            lost = state({BASE: SOUND}, below)
            seen = view(lost, state({BASE: SOUND}, target="vdb"), known=[BASE], active=active)
            assert list(demotions(reconcile(seen, [two]), CHAIN)) == ["vda"], (below, active)
    # the top of a running guest is asked of libvirt
    seen = view(
        over, state({}, target="vdb"), known=[BASE], active=True, sound={BASE: frozenset({"vda"})}
    )
    assert list(demotions(reconcile(seen, [two]), CHAIN)) == ["vdb"]
    # a bitmap of the base that lies below an image that is needed in another way stays
    redefined = reconcile(view(over, state({}, target="vdb")), [two])
    assert steps(redefined) == [("redefine", BASE, ("vda",), False)]


def test_a_lower_image_that_two_disks_share() -> None:
    """One of them can't use the bitmap there, the other one can."""
    shared = layer("shared")
    held = {"/img/shared": {BASE: SOUND}, "/img/a": {BASE: SOUND}, "/img/b": {BASE: BROKEN}}
    disks = tuple(
        BaseDisk(target=target, size=SIZE, layers=(shared,), bitmap=BASE)
        for target in ("vda", "vdb")
    )
    seen = View(
        is_active=False,
        checkpoints=frozenset({BASE}),
        disks={
            "vda": DiskState(size=SIZE, layers=(layer("a"), shared), bitmaps=held, is_live=False),
            "vdb": DiskState(size=SIZE, layers=(layer("b"), shared), bitmaps=held, is_live=False),
        },
    )
    assert steps(reconcile(seen, [chain(*disks)])) == [("remove", BASE, ("/img/b",), False)]


def test_fates() -> None:
    names = [OLD, BASE, NEW, THEIRS, STRANGE, *FOREIGN]
    seen = view(state({BASE: SOUND}), known=names)
    other = KnownChain(id=OTHER_CHAIN, base="nbdbackup.99999999.p2")
    plan = reconcile(seen, [chain(), other], dead=[STRANGE])
    assert {entry.name: entry.fate for entry in plan.entries} == {
        OLD: Fate.SUPERSEDED,
        BASE: Fate.BASE,
        NEW: Fate.STRAY,
        THEIRS: Fate.UNSURE,
        STRANGE: Fate.DEAD,
        other.base: Fate.BASE,
    }
    assert plan.foreign == len(FOREIGN)
    assert {step.name for step in plan.steps} == {OLD, NEW, STRANGE}
    # a point of another copy of the set may need it
    kept = reconcile(seen, [chain(elsewhere=frozenset({NEW}))])
    assert {entry.fate for entry in kept.entries if entry.name == NEW} == {Fate.ELSEWHERE}
    assert [step.name for step in kept.steps] == [OLD]
    # what is said to be dead may be a base all the same
    assert BASE not in {step.name for step in reconcile(seen, [chain()], dead=[BASE]).steps}


def test_a_record_alone_removes_nothing() -> None:
    record = chain(whole=False)
    for held in ({BASE: SOUND, OLD: SOUND}, {BASE: BROKEN}, {}):
        plan = reconcile(view(state(held), known=[BASE, OLD, NEW]), [record])
        assert plan.steps == ()
    assert steps(reconcile(view(state({BASE: SOUND})), [record])) == [
        ("redefine", BASE, ("vda",), False)
    ]


def test_two_chains_of_one_tag_remove_nothing() -> None:
    twin = chain(id="20270101T000000-0a1b2c3d", base="", committed=frozenset())
    plan = reconcile(view(state({BASE: SOUND}), known=[OLD, BASE, NEW]), [chain(), twin])
    assert plan.steps == ()


def test_drop_takes_one_chain_and_nothing_else() -> None:
    names = [OLD, BASE, THEIRS, *FOREIGN]
    seen = view(state({BASE: BROKEN, NEW: SOUND, THEIRS: SOUND, "bitmap0": SOUND}), known=names)
    assert [done(step) for step in drop(seen, "0a1b2c3d")] == [
        ("remove", OLD, (), True),
        ("remove", BASE, VDA, True),
        ("remove", NEW, VDA, False),
    ]
    assert drop(seen, "") == ()
    assert drop(seen, "x") == ()


# -- any view


def random_world(rng: random.Random) -> tuple[View, list[KnownChain], list[str]]:
    """Disks with up to three layers, two chains and strangers, bitmaps strewn over all."""
    active = rng.random() < 0.4
    names = [OLD, BASE, NEW, THEIRS, "nbdbackup.99999999.p2", STRANGE, *FOREIGN]
    states = [
        state(
            *(
                {name: rng.random() < 0.7 for name in names if rng.random() < 0.5}
                for _ in range(rng.randint(1, 3))
            ),
            target=target,
            size=SIZE if rng.random() < 0.9 else 2 * SIZE,
        )
        for target in ("vda", "vdb", "vdc")[: rng.randint(1, 3)]
    ]
    known = [name for name in names if rng.random() < 0.5]
    sound = {}
    if active:
        targets = frozenset(target for target in ("vda", "vdb", "vdc") if rng.random() < 0.5)
        sound = {BASE: targets} if BASE in known and rng.random() < 0.7 else {}
    disks = tuple(disk(target) for target in ("vda", "vdb", "vdc") if rng.random() < 0.8)
    ours = chain(*disks, whole=rng.random() < 0.8)
    other = KnownChain(
        id=OTHER_CHAIN,
        base="nbdbackup.99999999.p2",
        disks=(disk("vda", bitmap="nbdbackup.99999999.p2"),),
        committed=frozenset({"nbdbackup.99999999.p2"}),
        is_whole=rng.random() < 0.5,
    )
    dead = [name for name in (NEW, STRANGE) if rng.random() < 0.3]
    seen = view(*states, known=known, active=active, sound=sound)
    return seen, [ours, other][: rng.randint(1, 2)], dead


def after(seen: View, step: Step) -> View:
    """What a step makes of a view, as libvirt and qemu-img would."""
    if step.action is Action.REDEFINE:
        return replace(seen, checkpoints=seen.checkpoints | {step.name})
    gone = set(step.images)
    disks = {
        target: replace(
            each,
            bitmaps={
                path: {
                    name: is_sound
                    for name, is_sound in held.items()
                    if name != step.name or path not in gone
                }
                for path, held in each.bitmaps.items()
            },
        )
        for target, each in seen.disks.items()
    }
    left = seen.checkpoints - ({step.name} if step.metadata else set())
    return replace(seen, disks=disks, checkpoints=left)


def deltas(seen: View, ours: KnownChain) -> set[str]:
    """By itself: the disks whose every layer holds a sound bitmap of the base, size unchanged."""
    found = set()
    for base in ours.disks:
        now = seen.disks.get(base.target)
        if now is None or now.size != base.size:
            continue
        # the recorded image is the lowest one of these chains
        looked = now.layers[1:] if seen.is_active else now.layers
        if not all(now.bitmaps[each.path].get(ours.base) is True for each in looked):
            continue
        if ours.base in seen.sound and base.target not in seen.sound[ours.base]:
            continue
        found.add(base.target)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_any_view(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        seen, known, dead = random_world(rng)
        plan = reconcile(seen, known, dead)
        whole = {naming.tag_of_chain(each.id) for each in known if each.is_whole}
        for each in known:
            usable = {base.target for base in each.disks} - demotions(plan, each.id).keys()
            assert usable == deltas(seen, each)
        for step in plan.steps:
            assert naming.tag_of(step.name)
            if step.action is Action.REDEFINE:
                assert step.name not in seen.checkpoints
                continue
            assert naming.tag_of(step.name) in whole or step.name in dead
            for each in known:
                if step.name == each.base:
                    # of a guest that runs only what libvirt says is lost
                    assert not seen.is_active or not (deltas(seen, each) or step.images)
                    # not one sound bitmap of a base goes, nor its metadata while one is there
                    sound = [
                        image.path
                        for now in seen.disks.values()
                        for image in now.layers[seen.is_active :]
                        if now.bitmaps[image.path].get(step.name)
                    ]
                    assert not set(step.images) & set(sound)
                    assert not (step.metadata and sound)
        # at each step that a kill may leave: what could be read incrementally still can
        now = seen
        for step in plan.steps:
            before = [deltas(now, each) for each in known]
            now = after(now, step)
            assert [deltas(now, each) for each in known] == before
        assert reconcile(now, known, dead).steps == ()
        strangers = {name for name in seen.checkpoints if not naming.tag_of(name)}
        assert strangers <= now.checkpoints
        for target, was in seen.disks.items():
            for path, held in was.bitmaps.items():
                left = now.disks[target].bitmaps[path]
                assert {name for name in held if not naming.tag_of(name)} <= left.keys()


def test_plans_agree_with_reconciliation() -> None:
    """A disk is planned as a delta exactly where no problem is seen, with all layers it needs."""
    full = points.full_point()
    target = full.disks[0].target
    point = replace(
        full,
        checkpoint=BASE,
        disks=(
            replace(full.disks[0], size=SIZE, layers=(layer(target),), bitmap=BASE, format="qcow2"),
        ),
    )
    definition = Domain(
        name="vm", uuid=point.uuid, disks=(Disk(target=target, format="qcow2", source="/img/x"),)
    )
    selection = select_disks(definition, {}, level=Level.INC)
    cases: list[list[dict[str, bool]]] = [
        [{BASE: SOUND}, {BASE: SOUND}], [{BASE: SOUND}, {}], [{BASE: BROKEN}], [{}],
    ]  # fmt: skip
    for held in cases:
        now = state(*held, target=target)
        (planned,) = plan_disks(selection, Level.INC, point, {target: now})
        ours = chain(BaseDisk.of(point.disks[0]))
        problems = demotions(reconcile(view(now), [ours]), CHAIN)
        assert planned.delta == (not problems)
        assert planned.reason == problems.get(target, "")
        expected = tuple(each.path for each in now.layers) if planned.delta else ()
        assert planned.bitmap_layers == expected


@pytest.mark.parametrize(
    ("name", "tag", "point"),
    [
        (BASE, "0a1b2c3d", "p2"),
        ("nbdbackup.0a1b2c3d.20261121T101500-0a1b2c3d", "0a1b2c3d", "20261121T101500-0a1b2c3d"),
        ("nbdbackup.a.b.c", "a", "b.c"),
        *((name, "", "") for name in (*FOREIGN, "", ".", "..", "nbdbackup..p1")),
    ],
)
def test_names(name: str, tag: str, point: str) -> None:
    assert naming.tag_of(name) == tag
    assert naming.point_of(name) == point
    if tag:
        assert name.startswith(naming.checkpoint_prefix(f"20261121T101500-{tag}"))
