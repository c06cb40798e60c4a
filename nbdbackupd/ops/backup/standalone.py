"""``backup --qmp``: one run that saves the disks of a QEMU without libvirt into one set.

The life of a run is that of ``backup.py``. In place of libvirt's checkpoints there are QEMU's own
bitmaps, of the same names, on the images below all filters; they are reconciled by the same rules.
"""

import json
import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nbdbackupd import log as runlog
from nbdbackupd import rundir
from nbdbackupd.errors import NbdbackupError, NotSupportedError
from nbdbackupd.model.chain import BackupSet, Level, RestorePoint, effective_level
from nbdbackupd.model.plan import DiskPlan, lost_disks, plan_disks
from nbdbackupd.model.reconcile import WHY, Fate
from nbdbackupd.model.reconcile import reconcile as compare
from nbdbackupd.model.selection import select_disks
from nbdbackupd.ops.backup import backup, metadata, outcome, recording, room
from nbdbackupd.ops.backup.request import BackupReport, BackupRequest
from nbdbackupd.ops.backup.run import BackupRun
from nbdbackupd.ops.backup.sources import quiet_of
from nbdbackupd.ops.checkpoints import bitmaps, leftovers, reconcile
from nbdbackupd.ops.checkpoints.others import OtherChain, check_name, other_chains
from nbdbackupd.ops.domain import endings
from nbdbackupd.ops.domain import qemu as qemus
from nbdbackupd.ops.domain.qemu import Qemu
from nbdbackupd.ops.domain.survey import DiskFilter, Looked, Survey
from nbdbackupd.qemu.machine import RAW
from nbdbackupd.repo import written
from nbdbackupd.repo.runs import boot_id
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import Snapshot, running, standalone
from nbdbackupd.source.qemu_guest import QemuGuest

log = logging.getLogger(__name__)
MAX_VARIABLES: Final = 64 << 20
"""Bytes, far more than any firmware has; what is larger is read after the instant."""

GONE: Final = (
    "QEMU knows the changes of a raw image as long as its process lives, and has none since "
    "restore point {}"
)


def run(
    request: BackupRequest, *, progress: backup.Progress, cancelled: backup.Cancelled
) -> BackupReport:
    """Save the disks of the QEMU whose monitor is ``settings.qmp``; as ``backup.run``.

    Raises BusyError also if another program holds the monitor, DomainNotFoundError if none is
    there, ProcessError if QEMU does not answer.
    """
    ending = endings.Ending(log, outcome.event_of)
    with ExitStack() as stack:
        stack.enter_context(
            runlog.context(DOMAIN=request.domain, RUN=request.run_id, SET=request.directory)
        )
        stack.enter_context(ending.told())
        found = stack.enter_context(qemus.connect(request.settings.monitor, request.domain))
        qemu = Standalone(machine=found.machine, name=found.name, uuid=found.uuid)
        set_dir = stack.enter_context(
            backup.begun(request, qemu.name, qemu.uuid, cancelled, ending)
        )
        dead = leftovers.dead_checkpoints(qemu.uuid, set_dir, request.runtime_dir)
        guest = QemuGuest.of(qemu.name, qemu.machine, request.settings.agent)
        standalone.sweep(guest, qemu.machine, rundir.socket_dir(request.runtime_dir, qemu.uuid))
        report = _save(request, qemu, set_dir, dead, progress=progress, cancelled=cancelled)
        report = replace(report, seconds=ending.seconds)
        outcome.tell(log, report)
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class Standalone(Qemu):
    """A QEMU without libvirt, see ``run.Subject``."""

    variables: list[metadata.Item] = field(default_factory=list)
    """The firmware's, read at the instant of the point."""

    def open(
        self, run: BackupRun, on_trouble: Callable[[NbdbackupError], None]
    ) -> AbstractContextManager[Snapshot]:
        """Jobs in the running QEMU."""
        settings = run.request.settings
        if run.request.by_nbdinfo and run.survey.definition.has_iothreads:
            raise NotSupportedError(
                f"QEMU of {self.name} has iothreads, and nbdinfo closes its connection first: it "
                f"might end by that; use '--extents own'"
            )
        drives = self.drives()
        directory = rundir.socket_dir(run.request.runtime_dir, self.uuid)
        instance = f"{boot_id()} qemu {self.machine.pid}"
        nvram = Path(run.survey.definition.nvram)
        return standalone.open_standalone(
            standalone.StandaloneRequest(
                machine=self.machine,
                name=self.name,
                uuid=self.uuid,
                disks=tuple(
                    standalone.StandaloneDisk(
                        target=plan.target,
                        drive=drives[plan.target],
                        delta=plan.delta,
                        tracked=plan.tracked,
                    )
                    for plan in run.survey.plans
                ),
                run_id=run.request.run_id,
                runtime_dir=directory,
                scratch_dir=settings.scratch_directory,
                scratch_reserve=settings.scratch_reserve,
                on_trouble=on_trouble,
                base_bitmap=run.parent.checkpoint if run.parent is not None else "",
                new_bitmap=run.checkpoint,
                quiet=quiet_of(run, running.marker(directory), instance),
                agent=settings.agent,
                at_instant=(lambda: self._read_variables(nvram)) if nvram.is_absolute() else None,
            )
        )

    def _read_variables(self, path: Path) -> None:
        """Keep the firmware's variables; what can't be read is told of by ``collect``."""
        with suppress(OSError), path.open("rb") as file:
            data = file.read(MAX_VARIABLES + 1)
            if len(data) <= MAX_VARIABLES:
                self.variables.append(metadata.Item(role="nvram", data=data, inner=path.name))

    def prove(self, run: BackupRun, parent: RestorePoint, snapshot: Snapshot) -> Snapshot:
        """A bitmap of a name of ours was made for one point and nothing else."""
        del run, parent
        return snapshot

    def collect(self, run: BackupRun) -> metadata.Collected:
        """How QEMU was started, its firmware, and Proxmox's file of it."""
        warnings: list[str] = []
        data = json.dumps(qemus.describe(self), indent=1).encode()
        items = [metadata.Item(role=metadata.MACHINE, data=data)]
        found = run.survey.definition
        items += self.variables
        items += metadata.boot_files(
            replace(found, nvram="") if self.variables else found, warnings
        )
        return metadata.Collected(items=tuple(items), warnings=tuple(warnings), autostart=False)

    def drop_failed(self, run: BackupRun) -> bool:
        """QEMU may have ended, with its bitmap or without: then the next run sees to it."""
        return not self.remove(run.checkpoint, "the run that made it failed")


def _save(
    request: BackupRequest,
    qemu: Standalone,
    set_dir: SetDirectory,
    dead: frozenset[str],
    *,
    progress: backup.Progress,
    cancelled: backup.Cancelled,
) -> BackupReport:
    """Reconcile, decide, make the point, let the base advance; the locks are held."""
    state = StateDirectory(request.settings.checkpoint_directory)
    known = set_dir.load()
    backup.check_binding(qemu.name, qemu.uuid, known)
    looked = qemus.look(qemu)
    chains = reconcile.of_set(set_dir, known, state.records(qemu.uuid)).chains
    plan = compare(bitmaps.view(looked), chains, dead)
    done = bitmaps.apply(qemu, bitmaps.removals(plan.steps))
    if not {each.step.name for each in done if each.problem} & dead:
        leftovers.finish(qemu.uuid, set_dir, request.runtime_dir)
    level = effective_level(request.level, known)
    parent = known.head if level in (Level.INC, Level.DIFF) else None
    if parent is not None:
        set_dir.check_present(known.points)
        backup.check_undamaged(set_dir, known, parent)
    found = survey(qemu, looked, backup.disk_filter(request), level, parent)
    cancelled()
    beside = _others(request, qemu, bitmaps.names(looked) - dead, state, known)
    sizes = changed(qemu, found, parent)
    threshold = request.settings.threshold
    is_told = threshold is not None and parent is not None and len(sizes) == len(found.plans)
    small = backup.below(threshold or 0, sum(sizes.values())) if is_told else ""
    if small:
        return BackupReport(point=None, skipped=small, is_current=True)
    short = room.shortage(looked, found, parent, set_dir.path, lambda _name: sizes)
    if short and request.may_make_room:
        return BackupReport(point=None, skipped=short, is_short=True)
    if short:
        log.warning("%s", short)
    point, seconds = recording.record(
        BackupRun(
            request=request, set_dir=set_dir, survey=found, level=level, subject=qemu,
            known=known, parent=parent, progress=progress, cancelled=cancelled,
            warnings=tuple(str(each) for each in beside if each.is_gone),
        )
    )  # fmt: skip
    written.note(state.directory, point)
    _advance(qemu, set_dir, point, parent, state)
    return backup.report_of(known, point, seconds, looked, beside)


def _others(
    request: BackupRequest,
    qemu: Qemu,
    names: Collection[str],
    state: StateDirectory,
    known: BackupSet,
) -> tuple[OtherChain, ...]:
    """As of a domain of libvirt: chains whose bitmaps the disks carry beside this one's."""
    records = state.records(qemu.uuid)
    check_name(qemu.name, request.chain_name, known, names, records)
    return other_chains(
        qemu.name,
        names,
        records,
        [point.chain for point in known.points],
        carried=names,
        retired=request.retired,
    )


def survey(
    qemu: Qemu, looked: Looked, wanted: DiskFilter, level: Level, parent: RestorePoint | None
) -> Survey:
    """Which disks are saved, and how. Raises UsageError, DomainError."""
    selection = select_disks(
        looked.definition,
        looked.facts,
        level=level,
        include=qemu.targets(wanted.include),
        exclude=qemu.targets(wanted.exclude),
        raw=wanted.raw,
        is_tracked=True,
    )
    return Survey(
        definition=looked.definition,
        selection=selection,
        plans=tuple(
            _planned(plan, looked, parent)
            for plan in plan_disks(selection, level, parent, looked.states)
        ),
        states={each.target: looked.states[each.target] for each in selection.chosen},
        infos=looked.infos,
        lost=lost_disks(parent, selection),
    )


def _planned(plan: DiskPlan, looked: Looked, parent: RestorePoint | None) -> DiskPlan:
    """The plan; a raw disk that has lost its bitmap is read in full, as is to be expected."""
    disk, state = looked.definition.disk(plan.target), looked.states[plan.target]
    if not plan.delta or parent is None or disk.format != RAW:
        return plan
    if any(parent.checkpoint in each for each in state.bitmaps.values()):
        return plan
    return replace(plan, delta=False, reason=GONE.format(parent.id), is_expected=True)


def changed(qemu: Qemu, survey: Survey, parent: RestorePoint | None) -> dict[str, int]:
    """Bytes that changed since the parent, for each disk whose changes are known."""
    drives = qemu.drives() if parent is not None else {}
    found = {}
    for plan in survey.plans:
        bitmap = drives[plan.target].bitmap(parent.checkpoint) if parent and plan.delta else None
        if bitmap is not None and bitmap.sound and bitmap.recording:
            found[plan.target] = bitmap.dirty
    return found


def _advance(
    qemu: Standalone,
    set_dir: SetDirectory,
    point: RestorePoint,
    parent: RestorePoint | None,
    state: StateDirectory,
) -> None:
    """After a point was published: its bitmap is the base now, the parent's goes."""
    if not point.makes_base:
        return
    reconcile.remember(state, set_dir, point, "")
    if parent is not None and point.checkpoint and parent.checkpoint:
        qemu.remove(parent.checkpoint, WHY[Fate.SUPERSEDED])
