"""Which points hang together, and from which the next one starts."""

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
