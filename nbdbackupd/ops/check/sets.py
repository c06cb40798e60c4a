"""The set that the next point goes to: is it sound, is there room, and where will it start from."""

import os
from dataclasses import replace
from pathlib import Path

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model.chain import BackupSet, RestorePoint
from nbdbackupd.model.finding import Notes
from nbdbackupd.model.naming import tag_of, tag_of_chain
from nbdbackupd.model.reconcile import WHY, Action, Entry, Fate, KnownChain, Plan, reconcile
from nbdbackupd.ops.backup import room
from nbdbackupd.ops.check.request import OfLibvirt, OfQemu, Patient, existing
from nbdbackupd.ops.checkpoints import bitmaps, leftovers, others
from nbdbackupd.ops.checkpoints import reconcile as reconciling
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.units import human_size

WILL = {Action.REDEFINE: "is to be made known to libvirt", Action.REMOVE: "is to be removed"}


def checkpoints(patient: OfLibvirt, notes: Notes) -> None:
    """Whether the next increment can start where the last point ended, for each disk."""
    busy = patient.domain_holder()
    if busy:
        notes.ok(f"not looked at while {busy} changes them")
        return
    elsewhere = patient.elsewhere
    if elsewhere:
        notes.ok(f"not looked at from here: {elsewhere}")
        return
    chains = _chains(patient)
    if not chains:
        notes.ok("no chain of this domain is known here; '-o DIR' names a set to look at")
    noted = leftovers.dead_run(patient.request.runtime_dir, patient.uuid)
    dead = {noted.checkpoint} if noted is not None and noted.checkpoint else set()
    found = reconciling.view(patient.domain, patient.looked, [each.base for each in chains])
    plan = reconcile(found, chains, dead)
    _tell(patient, plan, chains, notes)
    _count(patient, plan, notes)


def bitmaps_of(patient: OfQemu, notes: Notes) -> None:
    """The same for a QEMU without libvirt, whose bitmaps are all that there is."""
    chains = _chains(patient)
    noted = leftovers.dead_run(patient.request.runtime_dir, patient.uuid)
    dead = {noted.checkpoint} if noted is not None and noted.checkpoint else set()
    plan = reconcile(bitmaps.view(patient.looked), chains, dead)
    _tell(patient, replace(plan, steps=bitmaps.removals(plan.steps)), chains, notes)
    names = {name for name in bitmaps.names(patient.looked) if tag_of(name)}
    tags = {tag_of(name) for name in names}
    notes.ok(f"its disks carry {len(names)} bitmap(s) of ours, of {len(tags)} chain(s)")


def _count(patient: OfLibvirt, plan: Plan, notes: Notes) -> None:
    """How many chains the guest's writes pay for; those that nobody goes on with (L-1)."""
    records = StateDirectory(patient.request.state_dir).records(patient.uuid)
    known = {entry.name for entry in plan.entries if entry.in_libvirt or entry.held}
    names = reconciling.carried(patient.domain, patient.looked)
    newest = head(patient)
    mine = [newest.chain] if newest is not None else []
    found = others.other_chains(patient.name, known | names, records, mine, carried=names)
    chains = {tag_of(name) for name in names}
    _tell_snapshots(patient, notes, has_bitmaps=bool(names))
    if names:
        notes.ok(f"the domain carries {len(names)} bitmap(s) of ours, of {len(chains)} chain(s)")
    for each in found:
        if each.is_gone or not each.set:
            notes.warn(each.text, each.cure)
        elif newest is not None:
            notes.ok(str(each))


def _tell_snapshots(patient: OfLibvirt, notes: Notes, *, has_bitmaps: bool) -> None:
    """QEMU's limit: it does not load a snapshot into a disk with an active bitmap (G-5)."""
    snapshots = patient.domain.snapshot_names() if has_bitmaps else ()
    if snapshots:
        notes.warn(
            f"to revert to a snapshot ({', '.join(snapshots[:3])}) while it runs would end the "
            f"guest: QEMU refuses that to disks whose changes are tracked",
            f"before reverting: 'nbdbackupctl checkpoints {patient.name} --release'",
        )


def _chains(patient: Patient) -> tuple[KnownChain, ...]:
    """The chain of the set that was named, and those of which the state directory tells."""
    records = StateDirectory(patient.request.state_dir).records(patient.uuid)
    chains: tuple[KnownChain, ...] = ()
    if patient.request.directory is not None:
        set_dir, known = _load(patient.request.directory)
        if known is not None and known.head is not None:
            chains = reconciling.of_set(set_dir, known, records).chains
    seen = {chain.id for chain in chains}
    others = [reconciling.of_record(each) for each in records if each.chain not in seen]
    return (*chains, *(chain for other in others for chain in other.chains))


def _load(path: Path) -> tuple[SetDirectory, BackupSet | None]:
    """The set and its points, or None if it is damaged, or none: that is told of the target."""
    set_dir = SetDirectory(path)
    try:
        set_dir = SetDirectory.open(path)
        return set_dir, set_dir.load()
    except (NbdbackupError, OSError):
        return set_dir, None


def head(patient: Patient) -> RestorePoint | None:
    """The newest point of the set that was named, if that can be read."""
    if patient.request.directory is None:
        return None
    _, known = _load(patient.request.directory)
    return known.head if known is not None else None


def _tell(patient: Patient, plan: Plan, chains: tuple[KnownChain, ...], notes: Notes) -> None:
    sets = {chain.id: chain.set for chain in chains}
    for entry in plan.entries:
        if entry.fate is Fate.BASE:
            _tell_base(entry, sets.get(entry.chain, ""), notes)
        elif entry.fate in (Fate.ELSEWHERE, Fate.UNSURE):
            notes.ok(f"{entry.name} is left alone: {WHY[entry.fate]}")
    advice = f"the next backup does it, or 'nbdbackupctl checkpoints {patient.name} --repair'"
    for step in plan.steps:
        notes.warn(f"{step.name} {WILL[step.action]}: {step.why}", advice)
    if plan.foreign:
        notes.ok(f"{plan.foreign} of other programs, left alone")


def _tell_base(entry: Entry, path: str, notes: Notes) -> None:
    for target, why in entry.problems.items():
        notes.warn(
            f"{target} will be read whole into {path}: {why}", "the next backup begins it anew"
        )
    if not entry.problems:
        notes.ok(f"{entry.name}, where the next increment into {path} starts, is sound")


def target(patient: Patient, notes: Notes) -> None:
    """The directory, the soundness of what it holds, and its space."""
    path = patient.request.directory
    if path is None:
        notes.ok("not looked at: which set is next is not known")
        return
    set_dir = SetDirectory.open(path)
    _place(path, notes, is_proven=patient.request.is_proven)
    try:
        set_dir.check_can_begin()
        known = set_dir.load()
        if known.head is not None:
            set_dir.check_present(known.points)
    except NbdbackupError as err:
        notes.fail(err.message, f"'nbdbackupctl verify {path}' names all that is damaged")
        return
    newest = known.head
    if newest is None:
        notes.ok("the set has no point yet: the next one is a full")
    elif newest.uuid != patient.uuid:
        notes.fail(
            f"the set belongs to domain {newest.domain} (UUID {newest.uuid})", "give another set"
        )
        return
    else:
        chain = tag_of_chain(newest.chain)
        notes.ok(f"{len(known.points)} point(s), the newest is {newest.id} of chain {chain}")
    _space(patient, path, newest, notes)


def _place(path: Path, notes: Notes, *, is_proven: bool) -> None:
    there = existing(path)
    if not there.is_dir():
        notes.fail(f"{there} is no directory", "give another set")
    elif not os.access(there, os.W_OK | os.X_OK):
        notes.fail(f"this account can't write to {there}", "check owner and mode, and the mount")
    is_root = there.stat().st_dev == Path("/").stat().st_dev
    if is_root and not is_proven:
        notes.warn(
            f"{path} is on the root file system: is its storage mounted?",
            "mount it, or leave it so if it belongs there: the configuration, which does not count "
            "with -o, can say that with repository.mount_point: /",
        )
    elif is_root:
        notes.ok(f"{path} is on the root file system, as the configuration has it")
    elif there != path:
        notes.ok(f"{path} will be made in {there}")
    else:
        notes.ok(f"{path} is there, on a file system of its own")


def _space(patient: Patient, path: Path, last: RestorePoint | None, notes: Notes) -> None:
    free = room.free_bytes(existing(path))
    expected = _expected(patient, last)
    if expected is None:
        notes.ok(f"{human_size(free)} are free; what changed is not told of a domain that is off")
        return
    text = f"{human_size(free)} are free, the next point takes up to {human_size(expected)}"
    if free < expected:
        notes.fail(text, "free space on the target; compression (-z) may help")
    else:
        notes.ok(text)


def _expected(patient: Patient, last: RestorePoint | None) -> int | None:
    """The most bytes that the next point saves; None where nobody tells what changed."""
    changed: dict[str, int] = {}
    if last is not None and last.checkpoint:
        if not patient.looked.is_active:
            return None
        changed = dict(patient.changed(last.checkpoint))
    return room.most_bytes(patient.looked, patient.saved(last), changed)
