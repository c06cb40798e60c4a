"""Which points hang together, and from which the next one starts."""

import time
from dataclasses import replace

import pytest

from nbdbackupd.errors import ChainBrokenError
from nbdbackupd.model.chain import BackupSet, Level, RestorePoint, effective_level
from tests.lib import points


def without_checkpoint(point: RestorePoint) -> RestorePoint:
    return replace(point, checkpoint="", digest="d" * 64)


def test_an_increment_of_untracked_disks_is_a_leaf() -> None:
    full = replace(points.full_point(), digest="a" * 64)
    leaf = without_checkpoint(points.child_of(full, sequence=2))
    inc = points.child_of(full, sequence=3)
    known = BackupSet.from_points([inc, full, leaf])
    assert [point.sequence for point in known.points] == [1, 2, 3]
    assert BackupSet.from_points([full, leaf]).head == full
    assert known.head == inc
    with pytest.raises(ChainBrokenError, match="two increments hang on"):
        BackupSet.from_points([full, inc, replace(inc, id="other", sequence=4)])
    with pytest.raises(ChainBrokenError, match="is no base"):
        BackupSet.from_points([full, leaf, points.child_of(leaf, sequence=3)])


def test_what_is_left_of_a_long_chain_is_found_at_once() -> None:
    """An hour's points for a year are no reason to wait: each is compared with all in one look."""
    chain = [replace(points.full_point(), digest="0")]
    for number in range(2, 4000):
        chain.append(replace(points.child_of(chain[-1], sequence=number), digest=f"{number}"))
    broken = replace(chain[-1], id="fork", sequence=4000)
    begun = time.process_time()
    known, problems = BackupSet.from_sound([*chain, broken, replace(broken, sequence=4001)])
    assert time.process_time() - begun < 60
    assert [point.id for point in known.points] == [point.id for point in chain]
    assert len(problems) == 2
    assert "two increments hang on" in problems[0]


def test_a_full_of_untracked_disks_has_increments() -> None:
    full = without_checkpoint(points.full_point())
    known = BackupSet.from_points([full])
    assert known.head == full
    assert effective_level(Level.AUTO, known) is Level.INC
    for number in (2, 3):
        child = without_checkpoint(points.child_of(full, sequence=number))
        known = BackupSet.from_points([*known.points, child])
        assert known.head == full
    tracked = points.child_of(full, sequence=4)
    assert BackupSet.from_points([*known.points, tracked]).head == tracked
