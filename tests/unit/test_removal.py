"""Which points can leave a set, which are merged, which stay because others need them."""

import itertools
import random
from dataclasses import replace

import pytest

from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import BackupSet, DiskMode, Layout, Level, RestorePoint
from nbdbackupd.model.removal import Merge, disk_merges, plan_removal
from tests.lib import points


def chain(levels: str) -> BackupSet:
    """f, i, d, c: a full, increments, differentials on the newest base, copies; i without base: x.

    The points are p1, p2, …; digests are made up.
    """
    made: list[RestorePoint] = []
    base = points.full_point()
    for number, letter in enumerate(levels, 1):
        if letter in "fc":
            level = Level.FULL if letter == "f" else Level.COPY
            point = replace(points.full_point(f"p{number}"), sequence=number, level=level)
            if letter == "c":
                point = replace(point, checkpoint="")
        else:
            level = Level.DIFF if letter == "d" else Level.INC
            point = points.child_of(base, level=level, sequence=number)
            if letter == "x":
                point = replace(point, checkpoint="")
        point = replace(point, digest=f"{number:064x}")
        made.append(point)
        if letter in "fi":
            base = point
    return BackupSet.from_points(made)


@pytest.mark.parametrize(
    "case",
    [
        # the oldest become one full
        ("fiii", "1 2", True, "", [("p3", "p1 p2")], {}),
        # between kept ones
        ("fiiiii", "2 3 5", True, "", [("p4", "p2 p3"), ("p6", "p5")], {}),
        # leaves
        ("fcdxi", "2 3 4", True, "p2 p3 p4", [], {}),
        # the head stays, what is before it is merged into it
        ("fii", "1 2 3", True, "", [("p3", "p1 p2")], {"p3": "the next increment starts from it"}),
        ("fii", "1 2 3", False, "p1 p2 p3", [], {}),
        ("fii", "2 3", False, "p2 p3", [], {}),
        # two hang on it, then one of them goes
        ("fdi", "1", True, "", [], {"p1": "needed by p2, p3"}),
        ("fdi", "1 2", True, "p2", [("p3", "p1")], {}),
        # a differential does not become a full
        ("fd", "1", False, "", [], {"p1": "needed by p2"}),
        # what stays because of others ends a merge
        ("fiidi", "1 2 3", True, "", [("p3", "p1 p2")], {"p3": "needed by p4, p5"}),
    ],
)
def test_cases(case: tuple[str, str, bool, str, list[tuple[str, str]], dict[str, str]]) -> None:
    levels, doomed, live, dropped, merges, needed = case
    found = plan_removal(chain(levels), {f"p{each}" for each in doomed.split()}, live=live)
    assert found.dropped == tuple(dropped.split())
    assert found.merges == tuple(Merge(into, tuple(gone.split())) for into, gone in merges)
    assert found.needed == needed


def test_what_is_damaged_is_not_merged() -> None:
    found = plan_removal(chain("fiiiii"), ["p1", "p2", "p3", "p4", "p5"], damaged=["p2"])
    assert found.merges == (Merge("p6", ("p3", "p4", "p5")),)
    assert found.needed == {
        "p1": "needed by p2, which is damaged", "p2": "damaged, and needed by p3",
    }  # fmt: skip
    found = plan_removal(chain("fii"), ["p1", "p2", "p3"], live=False, damaged=["p2"])
    assert (found.dropped, found.needed) == (("p1", "p2", "p3"), {})


def test_images_that_qemu_wrote_are_not_merged() -> None:
    disks = (replace(points.full_point().disks[0], layout=Layout.QCOW2),)
    full = points.full_point(disks=disks)
    inc = points.child_of(full)
    known = BackupSet.from_points([full, replace(inc, disks=disks)])
    found = plan_removal(known, [full.id], live=False)
    assert found.needed == {full.id: "needed by p2: images that QEMU wrote are not merged"}
    assert plan_removal(known, [inc.id, full.id], live=False).gone == {full.id, inc.id}


def test_an_unknown_point() -> None:
    with pytest.raises(RepositoryError, match="no restore point p7"):
        plan_removal(chain("fi"), ["p1", "p7"])


def test_what_is_left_is_a_chain() -> None:
    """Random sets and wishes: each doomed id has one fate, what stays hangs on what stays."""
    rng = random.Random(5)
    for _ in range(300):
        known = chain("f" + "".join(rng.choices("iiidxc", k=rng.randrange(12))))
        ids = [point.id for point in known.points]
        doomed = rng.sample(ids, rng.randrange(len(ids) + 1))
        live = rng.random() < 0.7
        found = plan_removal(known, doomed, live=live)
        absorbed = [ident for each in found.merges for ident in each.absorbed]
        assert sorted([*found.dropped, *absorbed, *found.needed]) == sorted(doomed)
        assert found.gone == {*found.dropped, *absorbed}
        assert not live or known.head is None or known.head.id not in found.gone
        parents = {point.id: point.parent for point in known.points}
        for each in found.merges:
            assert each.into not in found.gone
            newest_first = [*reversed(each.absorbed)]
            assert parents[each.into] == newest_first[0]
            for child, parent in itertools.pairwise(newest_first):
                assert parents[child] == parent
            parents[each.into] = parents[each.absorbed[0]]
        for ident in set(ids) - found.gone:
            assert parents[ident] not in found.gone


def test_how_each_disk_is_made() -> None:
    known = chain("fiii")
    full, first, second, third = known.points
    # vda was read in full by the third
    whole = replace(second, disks=(replace(second.disks[0], mode=DiskMode.FULL),))
    known = BackupSet((full, first, whole, third))
    found = disk_merges(known, Merge("p4", ("p2", "p3")))
    assert [(each.target, [p.id for p in each.sources], each.mode) for each in found] == [
        ("vda", ["p4", "p3"], DiskMode.FULL)
    ]
    assert disk_merges(known, Merge("p3", ("p1", "p2"))) == ()
    (delta,) = disk_merges(BackupSet((full, first, second, third)), Merge("p4", ("p2", "p3")))
    assert ([p.id for p in delta.sources], delta.mode) == (["p4", "p3", "p2"], DiskMode.DELTA)
