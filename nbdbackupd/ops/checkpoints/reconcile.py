"""Making libvirt and the images agree with the points that are committed.

``model/reconcile.py`` says what is to be done; here it is found out and carried out. While a
domain runs libvirt removes bitmaps. While it is off we take them out of the images first and
then make libvirt forget the checkpoint: a kill in between leaves a checkpoint without a bitmap,
which the next run forgets, never a bitmap that libvirt does not know of.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd.errors import (
    BusyError,
    CheckpointError,
    DomainError,
    GaveWayError,
    NbdbackupError,
)
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import BackupSet, DiskMode, RestorePoint
from nbdbackupd.model.naming import tag_of
from nbdbackupd.model.plan import BaseDisk, DiskState
from nbdbackupd.model.reconcile import (
    WHY,
    Action,
    Fate,
    KnownChain,
    Step,
    View,
    reconcile,
    removal,
)
from nbdbackupd.ops.domain.survey import Looked
from nbdbackupd.qemu import bitmaps
from nbdbackupd.repo import generation, layout
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import Record, StateDirectory
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt import checkpoints
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
QCOW2 = "qcow2"
Erase = Callable[[str, Path], None]
"""Removes a bitmap from one image of a domain that is off; one that is not there is fine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Chains of a domain, and the stored XML of their bases by checkpoint."""

    chains: tuple[KnownChain, ...] = ()
    xml: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was tried; ``problem``: why it could not be done.

    ``lost``: disks that have no bitmap of the checkpoint, as only a running QEMU that was told of
    it could show. Where no disk has one libvirt was made to forget it again: nothing is of use in
    it, and ``virsh undefine`` refuses a domain with a checkpoint.
    """

    step: Step
    problem: str = ""
    lost: tuple[str, ...] = ()


def of_set(set_dir: SetDirectory, known: BackupSet, records: Iterable[Record] = ()) -> Known:
    """The chain of a set that was read; a record of another copy of it protects that one's base."""
    chain = KnownChain.of_set(known, os.fspath(set_dir.path))
    if chain is None:
        return Known()
    record = next((each for each in records if each.chain == chain.id), None)
    stored = _stored_xml(set_dir, known.head)
    if record is not None:
        lost = frozenset(record.lost.get(chain.base, ()))
        chain = replace(chain, elsewhere=_elsewhere(record, chain), lost=lost)
        if record.checkpoint == chain.base:
            stored = stored or record.xml
    return Known(chains=(chain,), xml={chain.base: stored})


def of_record(record: Record) -> Known:
    """A chain whose set is not at hand: its base can be redefined, nothing can be removed."""
    chain = KnownChain(
        id=record.chain,
        base=record.checkpoint,
        point=record.point,
        disks=tuple(disk for disk in record.disks if disk.bitmap),
        committed=frozenset({record.checkpoint} - {""}),
        set=record.set,
        lost=frozenset(record.lost.get(record.checkpoint, ())),
    )
    return Known(chains=(chain,), xml={record.checkpoint: record.xml})


def view(domain: Domain, looked: Looked, ask: Iterable[str] = ()) -> View:
    """What is there now. A running domain is asked which disks can tell since checkpoints ``ask``.

    libvirt 9.0 tells nothing at all if one disk has grown since (measured): then nothing is
    known of any. Raises DomainError.
    """
    found = frozenset(checkpoints.names(domain))
    sound = {}
    for name in found.intersection(ask) if looked.is_active else ():
        try:
            sound[name] = frozenset(checkpoints.sound_sizes(domain, name))
        except DomainError as err:
            log.info("%s", err.message)
    return View(is_active=looked.is_active, checkpoints=found, disks=looked.states, sound=sound)


def carried(domain: Domain, looked: Looked) -> frozenset[str]:
    """Names of our bitmaps that the images hold, or that QEMU has of a running domain.

    A checkpoint may be known though its bitmap is lost. Raises DomainError if libvirt does not list
    the checkpoints.
    """
    held = frozenset(
        name
        for state in looked.states.values()
        for found in state.bitmaps.values()
        for name in found
        if tag_of(name)
    )
    if not looked.is_active:
        return held
    others = {name for name in checkpoints.names(domain) if tag_of(name)} - held
    return held.union(name for name in others if _has_bitmap(domain, name))


def _has_bitmap(domain: Domain, name: str) -> bool:
    """Whether QEMU has a bitmap of a checkpoint; yes where that is not known, see ``view``."""
    try:
        return bool(checkpoints.sound_sizes(domain, name))
    except DomainError:
        return True


def prepare(
    domain: Domain,
    known: Known,
    looked: Looked,
    dead: Iterable[str],
    *,
    state: StateDirectory,
    erase: Erase | None = None,
    cancelled: Callable[[], None] = lambda: None,
) -> frozenset[str]:
    """At the start of a run: reconcile, as far as that works; the domain's lock is held.

    Returns the checkpoints that something should have been done about and was not: keep the
    notes of dead runs that made them. What can't be removed costs a warning and stays for the
    next run. ``erase`` is needed, and ``cancelled`` looked at before each change, while the
    domain is off. Raises DomainError if libvirt does not list the checkpoints, and what
    ``cancelled`` raises, GaveWayError.
    """
    plan = reconcile(view(domain, looked), known.chains, frozenset(dead))
    done = apply(domain, plan.steps, known.xml, erase=erase, cancelled=cancelled)
    note_lost(state, domain.uuid, done)
    return frozenset(each.step.name for each in done if each.problem)


def apply(
    domain: Domain,
    steps: Iterable[Step],
    xml: Mapping[str, str],
    *,
    erase: Erase | None = None,
    cancelled: Callable[[], None] = lambda: None,
) -> tuple[Done, ...]:
    """Do each step; one that fails is told in the log and in the result, the others go on.

    Raises what ``cancelled`` raises, and GaveWayError if a domain that is off is to start.
    """
    results = []
    for step in steps:
        if step.action is Action.REDEFINE and domain.is_gone():
            # a transient one: libvirt is told when it knows it again
            continue
        cancelled()
        try:
            is_done = _carry_out(domain, step, xml, erase, cancelled)
            done = _seen(domain, step)
        except GaveWayError:
            raise
        except NbdbackupError as err:
            done = Done(step, err.message)
            events.emit(log, events.CHECKPOINT_LEFT, checkpoint=step.name, reason=err.message)
        else:
            if done.step.why == LOST:
                log.info("checkpoint %s: %s", step.name, LOST)
            elif is_done:
                events.emit(log, _EVENTS[step.action], checkpoint=step.name, reason=step.why)
        results.append(done)
    return tuple(results)


def _seen(domain: Domain, step: Step) -> Done:
    """What a base has shown that was redefined; one without a bitmap is forgotten again."""
    if step.action is not Action.REDEFINE or not step.chain or not domain.is_active():
        return Done(step)
    try:
        sound = checkpoints.sound_sizes(domain, step.name)
    except DomainError as err:
        log.info("%s", err.message)
        return Done(step)
    lost = tuple(target for target in step.targets if target not in sound)
    if lost != step.targets:
        return Done(step, lost=lost)
    checkpoints.forget(domain, step.name)
    return Done(replace(step, why=LOST), lost=lost)


LOST: Final = (
    "libvirt does not know it; the running QEMU has lost its bitmap, and the next run reads whole "
    "disks"
)

_EVENTS = {
    Action.REDEFINE: events.CHECKPOINT_REDEFINED,
    Action.REMOVE: events.CHECKPOINT_REMOVED,
}


def _carry_out(
    domain: Domain,
    step: Step,
    xml: Mapping[str, str],
    erase: Erase | None,
    cancelled: Callable[[], None],
) -> bool:
    """Do a step; False if there was nothing to be removed."""
    if step.action is Action.REDEFINE:
        _redefine(domain, step, xml.get(step.name, ""))
    elif domain.is_active():
        if step.targets and not (step.metadata and checkpoints.is_known(domain, step.name)):
            # libvirt removes only bitmaps that it knows of
            _redefine(domain, step, "")
        return checkpoints.delete(domain, step.name) is not checkpoints.Deleted.ABSENT
    else:
        _remove_off(domain, step, erase, cancelled)
    return True


def _redefine(domain: Domain, step: Step, stored: str) -> None:
    """From the stored XML, or from one of our own making, which does as well (measured)."""
    if stored:
        try:
            checkpoints.redefine(domain, stored, step.targets)
        except CheckpointError as err:
            log.info("the stored XML of checkpoint %s can't be used: %s", step.name, err)
        else:
            return
    checkpoints.redefine(domain, jobxml.checkpoint_xml(step.name, step.targets, ()), step.targets)


def _remove_off(
    domain: Domain, step: Step, erase: Erase | None, cancelled: Callable[[], None]
) -> None:
    if step.images and erase is None:
        raise BusyError("the images of the domain can't be changed now")
    for image in step.images:
        if erase is not None:
            cancelled()
            erase(step.name, Path(image))
    if step.metadata:
        checkpoints.delete(domain, step.name)


def eraser(lease: Lease) -> Erase:
    """Removes bitmaps from images of a domain that is off, unless its start is announced."""

    def erase(name: str, path: Path) -> None:
        with lease.writing(os.fspath(path)) as fd:
            bitmaps.remove(os.fspath(path), name, pass_fds=(fd,))

    return erase


def drop_failed(
    domain: Domain,
    name: str,
    states: Mapping[str, DiskState],
    erase: Erase | None = None,
) -> bool:
    """Remove the checkpoint of a run that made no point; False if it stays for the next run.

    Of a domain that was off (``erase``) its bitmap is looked for in the top image of every disk,
    where alone a run adds it; also in the QEMU that has them open by now (W-8).
    """
    tops = {
        target: state.layers[0].path
        for target, state in states.items()
        if state.layers and state.layers[0].format == QCOW2
    }
    step = Step(
        action=Action.REMOVE,
        name=name,
        why="the run that made it failed",
        targets=tuple(tops) if erase is not None else (),
        images=tuple(dict.fromkeys(tops.values())),
        metadata=True,
    )
    return all(not each.problem for each in _try(domain, [step], {}, erase))


def _try(
    domain: Domain, steps: list[Step], xml: Mapping[str, str], erase: Erase | None
) -> tuple[Done, ...]:
    """``apply`` where the run's outcome is settled: what is in the way costs a warning only."""
    try:
        return apply(domain, steps, xml, erase=erase)
    except GaveWayError as err:
        log.warning("%s", err)
        return tuple(Done(step, err.message) for step in steps)


def advance(
    domain: Domain,
    set_dir: SetDirectory,
    point: RestorePoint,
    parent: RestorePoint | None,
    looked: Looked,
    *,
    state: StateDirectory | None = None,
    erase: Erase | None = None,
) -> None:
    """After a point was published: its checkpoint is the base now, the parent's goes.

    The point exists whatever happens here; what fails costs a warning, and the next run does it.
    """
    if not point.makes_base:
        return
    xml = {point.checkpoint: _stored_xml(set_dir, point)}
    steps = []
    if point.checkpoint and not looked.is_active:
        # of a running domain libvirt made it itself
        targets = tuple(disk.target for disk in point.disks if disk.bitmap)
        why = WHY[Fate.BASE]
        steps.append(Step(action=Action.REDEFINE, name=point.checkpoint, why=why, targets=targets))
    if parent is not None and point.checkpoint and tag_of(parent.checkpoint):
        steps += _whole_again(point, parent, looked)
        steps.append(removal(parent.checkpoint, looked.states, WHY[Fate.SUPERSEDED]))
    if state is not None:
        remember(state, set_dir, point, xml[point.checkpoint])
    _try(domain, steps, xml, erase)


def _whole_again(point: RestorePoint, parent: RestorePoint, looked: Looked) -> list[Step]:
    """Tell libvirt of bitmaps that it would leave behind with the parent's checkpoint.

    That one may have been redefined for those disks alone whose changes could be used.
    """
    targets = tuple(
        disk.target for disk in parent.disks if disk.bitmap and disk.target in looked.states
    )
    unused = {disk.target for disk in point.disks if disk.mode is DiskMode.FULL}
    if not looked.is_active or not unused.intersection(targets):
        return []
    why = "its bitmaps are to be removed"
    return [Step(action=Action.REDEFINE, name=parent.checkpoint, why=why, targets=targets)]


def remember(state: StateDirectory, set_dir: SetDirectory, head: RestorePoint, xml: str) -> None:
    """Note a chain's newest base in the state directory; a failure costs a warning."""
    record = Record(
        chain=head.chain,
        uuid=head.uuid,
        domain=head.domain,
        set=os.fspath(set_dir.path),
        point=head.id,
        checkpoint=head.checkpoint,
        xml=xml,
        disks=tuple(BaseDisk.of(disk) for disk in head.disks),
    )
    _save(state, record)


def _save(state: StateDirectory, record: Record) -> None:
    try:
        state.save(record)
    except NbdbackupError as err:
        log.warning("the base of the chain is not noted: %s", err)


def note_lost(state: StateDirectory, uuid: str, done: Iterable[Done]) -> None:
    """Note with each chain which disks have lost its base; a failure costs a warning."""
    tried = [each for each in done if each.lost or (each.step.metadata and not each.problem)]
    for record in state.records(uuid) if tried else ():
        lost = dict(record.lost)
        for each in tried:
            name = each.step.name
            if each.step.chain == record.chain and each.lost:
                lost[name] = each.lost
            elif name == record.checkpoint and each.step.action is Action.REMOVE:
                lost[name] = tuple(disk.target for disk in record.disks if disk.bitmap)
        if lost != record.lost:
            _save(state, replace(record, lost=lost))


def _stored_xml(set_dir: SetDirectory, point: RestorePoint | None) -> str:
    try:
        return set_dir.checkpoint_xml(point)
    except NbdbackupError as err:
        log.warning("the XML of a checkpoint can't be read: %s", err)
        return ""


def _elsewhere(record: Record, chain: KnownChain) -> frozenset[str]:
    """The base of another copy of the set, unless that is known not to hold its point."""
    if not record.checkpoint or record.checkpoint in chain.committed or record.set == chain.set:
        return frozenset()
    path = Path(record.set)
    try:
        if not path.is_dir():
            raise NotADirectoryError(path)
        names = generation.stable(path, generation.names)
    except (OSError, NbdbackupError):
        # away for now, or for good
        return frozenset({record.checkpoint})
    holds = any(layout.names_point(name, record.point) for name in names)
    return frozenset({record.checkpoint} if holds else ())
