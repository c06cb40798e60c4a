"""Whether the next point fits: what it may take at most, beside what is free."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nbdbackupd import durable
from nbdbackupd.errors import CheckpointError, DomainError
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.ops.domain.survey import Looked, Survey
from nbdbackupd.units import human_size


def free_bytes(path: Path) -> int:
    """What anybody may still write to the file system of a path. Raises RepositoryError."""
    with durable.translate_os_errors("look at", path):
        found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def most_bytes(looked: Looked, targets: Iterable[str], changed: dict[str, int]) -> int:
    """The most that a point of these disks takes before compression.

    ``changed`` are the bytes of disks whose changes are known; of others all that is allocated is
    the bound. What boots the guest counts, though it may be in the set already.
    """
    total = _beside(looked)
    for target in targets:
        state = looked.states[target]
        chain = looked.chains.get(target, ())
        allocated = sum(layer.actual_size for layer in chain) if chain else state.size
        total += changed.get(target, min(allocated, state.size))
    return total


def shortage(
    looked: Looked,
    survey: Survey,
    parent: RestorePoint | None,
    path: Path,
    sizes: Callable[[str], Mapping[str, int]],
) -> str:
    """A line if the next point may not fit, or nothing.

    What changed since a checkpoint is asked of ``sizes`` only if all that is allocated would not
    fit; it may raise CheckpointError or DomainError if that can't be told. Of a domain that is off
    nobody tells it: then nothing is said of increments.

    Raises RepositoryError if the file system can't be asked.
    """
    free = free_bytes(path)
    targets = [plan.target for plan in survey.plans if plan.target in looked.states]
    most = most_bytes(looked, targets, {})
    if most <= free:
        return ""
    if parent is not None and any(plan.delta for plan in survey.plans):
        if not looked.is_active:
            return ""
        changed: Mapping[str, int] = {}
        with contextlib.suppress(CheckpointError, DomainError):
            changed = sizes(parent.checkpoint)
        deltas = {plan.target for plan in survey.plans if plan.delta}
        most = most_bytes(looked, targets, {each: changed[each] for each in deltas & set(changed)})
    if most <= free:
        return ""
    return (
        f"the next point takes up to {human_size(most)} before compression, and "
        f"{human_size(free)} are free in {path}: it may not fit; make room there"
    )


def _beside(looked: Looked) -> int:
    """Bytes of the files of the domain's host that a set has a copy of (``metadata.py``)."""
    found = looked.definition
    paths = (found.loader, found.nvram, found.kernel, found.initrd)
    facts = [looked.where.facts(path) for path in paths if path]
    return sum(each.size for each in facts if each is not None)
