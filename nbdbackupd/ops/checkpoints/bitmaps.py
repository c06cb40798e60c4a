"""Bitmaps of a QEMU without libvirt, by the rules of checkpoints: they are all that there is."""

from collections.abc import Iterable

from nbdbackupd.model.reconcile import Action, Step, View
from nbdbackupd.ops.checkpoints.reconcile import Done
from nbdbackupd.ops.domain.qemu import Qemu
from nbdbackupd.ops.domain.survey import Looked


def view(looked: Looked) -> View:
    """What is there now."""
    return View(is_active=True, checkpoints=frozenset(), disks=looked.states)


def names(looked: Looked) -> frozenset[str]:
    """All bitmaps that the disks carry, whose they ever are."""
    return frozenset(
        name
        for state in looked.states.values()
        for found in state.bitmaps.values()
        for name in found
    )


def removals(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Those that can be done: there is no libvirt that could be told of a base."""
    return tuple(step for step in steps if step.action is Action.REMOVE)


def apply(qemu: Qemu, steps: Iterable[Step]) -> tuple[Done, ...]:
    """Do each step; one that fails is told in the log and in the result, the others go on."""
    return tuple(
        Done(step, qemu.remove(step.name, step.why, step.targets or None)) for step in steps
    )
