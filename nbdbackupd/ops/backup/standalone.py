"""``backup --qmp``: one run that saves the disks of a QEMU without libvirt into one set.

The life of a run is that of ``backup.py``. In place of libvirt's checkpoints there are QEMU's own
bitmaps, of the same names, on the images below all filters; they are reconciled by the same rules.
"""

import json
import logging
import os
import uuid as uuids
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdbackupd import events, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import NbdbackupError, NotSupportedError, UsageError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.chain import ImageLayer, Level, RestorePoint, effective_level
from nbdbackupd.model.plan import DiskState, lost_disks, plan_disks
from nbdbackupd.model.reconcile import WHY, Action, Fate, KnownChain, View
from nbdbackupd.model.reconcile import reconcile as compare
from nbdbackupd.model.selection import select_disks
from nbdbackupd.ops.backup import backup, metadata, outcome, recording, room
from nbdbackupd.ops.backup.request import BackupReport, BackupRequest
from nbdbackupd.ops.backup.run import BackupRun
from nbdbackupd.ops.checkpoints import leftovers, reconcile
from nbdbackupd.ops.domain import endings
from nbdbackupd.ops.domain.survey import Looked, Survey, image_layer
from nbdbackupd.qemu import machine
from nbdbackupd.qemu.machine import Drive, Machine
from nbdbackupd.repo import written
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import Snapshot, standalone

log = logging.getLogger(__name__)
NO_UUID: Final = str(uuids.UUID(int=0))
NAMESPACE: Final = uuids.UUID("5a0b8d3e-6c5c-4d4f-9a0e-8b1f6f1c7a52")
"""For a QEMU that was given no UUID: its set goes by the name that the user gives it."""

FLASH: Final = "flash"
PROXMOX: Final = "/etc/pve/qemu-server/{}.conf"
MAX_FILE: Final = 1 << 20


def run(
    request: BackupRequest, path: Path, *, progress: backup.Progress, cancelled: backup.Cancelled
) -> BackupReport:
    """Save the disks of the QEMU whose monitor is ``path``; as ``backup.run``.

    Raises BusyError also if another program holds the monitor, DomainNotFoundError if none is
    there, ProcessError if QEMU does not answer.
    """
    ending = endings.Ending(log, outcome.event_of)
    with ExitStack() as stack:
        stack.enter_context(
            runlog.context(DOMAIN=request.domain, RUN=request.run_id, SET=request.directory)
        )
        stack.enter_context(ending.told())
        found = stack.enter_context(machine.connect(path, request.domain))
        uuid = found.uuid()
        if uuid == NO_UUID:
            uuid = str(uuids.uuid5(NAMESPACE, request.domain))
        set_dir = stack.enter_context(
            backup.begun(request, request.domain, uuid, cancelled, ending)
        )
        dead = leftovers.dead_checkpoints(uuid, set_dir, request.runtime_dir)
        standalone.sweep(found, rundir.socket_dir(request.runtime_dir, uuid))
        qemu = Qemu(machine=found, name=request.domain, uuid=uuid)
        report = _save(request, qemu, set_dir, dead, progress=progress, cancelled=cancelled)
        report = replace(report, seconds=ending.seconds)
        outcome.tell(log, report)
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class Qemu:
    """A QEMU without libvirt, see ``run.Subject``."""

    machine: Machine
    name: str
    uuid: str

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
                runtime_dir=rundir.socket_dir(run.request.runtime_dir, self.uuid),
                scratch_dir=settings.scratch_directory,
                scratch_reserve=settings.scratch_reserve,
                on_trouble=on_trouble,
                base_bitmap=run.parent.checkpoint if run.parent is not None else "",
                new_bitmap=run.checkpoint,
                freeze=settings.freeze_policy,
            )
        )

    def prove(self, run: BackupRun, parent: RestorePoint, snapshot: Snapshot) -> Snapshot:
        """A bitmap of a name of ours was made for one point and nothing else."""
        del run, parent
        return snapshot

    def collect(self, run: BackupRun) -> metadata.Collected:
        """How QEMU was started, its firmware, and Proxmox's file of it."""
        warnings: list[str] = []
        known = {"name": self.name, "uuid": self.uuid, "command_line": _command_line(self.machine)}
        number = _argument(_command_line(self.machine), "-id")
        if number.isdecimal() and (text := _read(Path(PROXMOX.format(number)))):
            known["proxmox"] = text
        data = json.dumps(known, indent=1).encode()
        items = [metadata.Item(role=metadata.MACHINE, data=data)]
        items += metadata.boot_files(run.survey.definition, warnings)
        return metadata.Collected(items=tuple(items), warnings=tuple(warnings), autostart=False)

    def drop_failed(self, run: BackupRun) -> bool:
        """QEMU may have ended, with its bitmap or without: then the next run sees to it."""
        return self.remove(run.checkpoint, "the run that made it failed")

    def drives(self) -> dict[str, Drive]:
        """The drives by name. Raises ProcessError."""
        return {each.name: each for each in self.machine.drives()}

    def remove(self, name: str, why: str, targets: Collection[str] | None = None) -> bool:
        """Remove a bitmap from these drives, or all; what fails costs a warning: False."""
        count = 0
        try:
            for target, drive in self.drives().items():
                if drive.bitmap(name) is not None and (targets is None or target in targets):
                    self.machine.remove_bitmap(drive.node, name)
                    count += 1
        except NbdbackupError as err:
            events.emit(log, events.CHECKPOINT_LEFT, checkpoint=name, reason=err.message)
            return False
        if count:
            events.emit(log, events.CHECKPOINT_REMOVED, checkpoint=name, reason=why)
        return True


def _save(
    request: BackupRequest,
    qemu: Qemu,
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
    looked = _look(qemu)
    chains = reconcile.of_set(set_dir, known, state.records(qemu.uuid)).chains
    if not _reconcile(qemu, looked, chains, dead) & dead:
        leftovers.finish(qemu.uuid, set_dir, request.runtime_dir)
    level = effective_level(request.level, known)
    parent = known.head if level in (Level.INC, Level.DIFF) else None
    if parent is not None:
        set_dir.check_present(known.points)
        backup.check_undamaged(set_dir, known, parent)
    survey = _survey(request, qemu, looked, level, parent)
    cancelled()
    sizes = _changed(qemu, survey, parent)
    threshold = request.settings.threshold
    is_told = threshold is not None and parent is not None and len(sizes) == len(survey.plans)
    small = backup.below(threshold or 0, sum(sizes.values())) if is_told else ""
    if small:
        return BackupReport(point=None, skipped=small, is_current=True)
    short = room.shortage(looked, survey, parent, set_dir.path, lambda _name: sizes)
    if short:
        log.warning("%s", short)
    point, seconds = recording.record(
        BackupRun(
            request=request, set_dir=set_dir, survey=survey, level=level, subject=qemu,
            known=known, parent=parent, progress=progress, cancelled=cancelled,
        )
    )  # fmt: skip
    written.note(state.directory, point)
    _advance(qemu, set_dir, point, parent, state)
    return backup.report_of(known, point, seconds, looked, ())


def _look(qemu: Qemu) -> Looked:
    """The drives as disks of a domain, with their images and bitmaps."""
    drives = qemu.drives()
    places = _Places(qemu.machine.pid)
    layers = {
        name: tuple(image_layer(places.absolute(path), form) for path, form in each.layers)
        for name, each in drives.items()
    }
    disks = tuple(
        domain_model.Disk(
            target=name,
            device=each.kind,
            format=each.format,
            source=layers[name][0].path if layers[name] else "",
            # the bitmap of a disk that nobody writes to would always be clean
            readonly=each.is_read_only,
            layers=layers[name],
        )
        for name, each in drives.items()
        if each.kind != FLASH
    )
    flash = {
        each.is_read_only: layers[name][0].path
        for name, each in drives.items()
        if each.kind == FLASH and layers[name]
    }
    argv = _command_line(qemu.machine)
    definition = domain_model.Domain(
        name=qemu.name,
        uuid=qemu.uuid,
        disks=disks,
        loader=flash.get(True, ""),
        nvram=flash.get(False, ""),
        kernel=places.absolute(_argument(argv, "-kernel")),
        initrd=places.absolute(_argument(argv, "-initrd")),
        has_iothreads=qemu.machine.has_iothreads(),
    )
    present = {disk.target: drives[disk.target] for disk in disks if disk.source}
    return Looked(
        definition=definition,
        is_active=True,
        infos={name: each.document for name, each in present.items()},
        chains={name: (each.info,) for name, each in present.items() if each.info is not None},
        states={name: _state(each, layers[name]) for name, each in present.items()},
    )


def _state(drive: Drive, layers: tuple[ImageLayer, ...]) -> DiskState:
    bitmaps = {name: each.sound and each.recording for name, each in (drive.bitmaps or {}).items()}
    return DiskState(size=drive.size, layers=layers, bitmaps={layers[0].path: bitmaps})


class _Places:
    """Where the files are that a QEMU was given by relative names.

    A daemon has changed its directory since; the files that it holds open have kept their places.
    """

    def __init__(self, pid: int) -> None:
        self._directory = _link(Path(f"/proc/{pid}/cwd"))
        try:
            self._held = {_link(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            self._held = set()

    def absolute(self, path: str) -> str:
        """The path, if it can be told; what is none (``nbd://…``, ``json:…``) stays."""
        if not path or path.startswith("/") or ":" in path.partition("/")[0]:
            return path
        held = [each for each in self._held if each.endswith(os.path.normpath(f"/{path}"))]
        if len(held) == 1:
            return held[0]
        beside = os.path.normpath(f"{self._directory}/{path}")
        return beside if self._directory and Path(beside).exists() else path


def _reconcile(
    qemu: Qemu,
    looked: Looked,
    chains: tuple[KnownChain, ...],
    dead: frozenset[str],
) -> frozenset[str]:
    """Remove bitmaps of this chain that no increment starts from; those that are left."""
    view = View(is_active=True, checkpoints=frozenset(), disks=looked.states)
    left = set()
    for step in compare(view, chains, dead).steps:
        # there is no libvirt that could be told of a base
        if step.action is Action.REMOVE and not qemu.remove(step.name, step.why, step.targets):
            left.add(step.name)
    return frozenset(left)


def _survey(
    request: BackupRequest, qemu: Qemu, looked: Looked, level: Level, parent: RestorePoint | None
) -> Survey:
    wanted = backup.disk_filter(request)
    selection = select_disks(
        looked.definition,
        looked.facts,
        level=level,
        include=_targets(qemu, wanted.include),
        exclude=_targets(qemu, wanted.exclude),
        raw=wanted.raw,
    )
    return Survey(
        definition=looked.definition,
        selection=selection,
        plans=plan_disks(selection, level, parent, looked.states),
        states={each.target: looked.states[each.target] for each in selection.chosen},
        infos=looked.infos,
        lost=lost_disks(parent, selection),
    )


def _targets(qemu: Qemu, names: Iterable[str]) -> tuple[str, ...]:
    """Disks by what the user calls them: the device, the drive or the node.

    Raises UsageError for a name that two of them have.
    """
    drives = qemu.machine.drives()
    found = []
    for name in names:
        targets = {each.name for each in drives if name in each.aliases}
        if len(targets) > 1:
            raise UsageError(f"{name} may be one of: {', '.join(sorted(targets))}; name the device")
        found.append(next(iter(targets), name))
    return tuple(found)


def _changed(qemu: Qemu, survey: Survey, parent: RestorePoint | None) -> dict[str, int]:
    """Bytes that changed since the parent, for each disk whose changes are known."""
    drives = qemu.drives() if parent is not None else {}
    found = {}
    for plan in survey.plans:
        bitmap = drives[plan.target].bitmap(parent.checkpoint) if parent and plan.delta else None
        if bitmap is not None and bitmap.sound and bitmap.recording:
            found[plan.target] = bitmap.dirty
    return found


def _advance(
    qemu: Qemu,
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


def _command_line(found: Machine) -> list[str]:
    """QEMU's arguments, as far as this host shows its process."""
    text = _read(Path(f"/proc/{found.pid}/cmdline"))
    return text.split("\0")[:-1]


def _argument(argv: list[str], option: str) -> str:
    place = argv.index(option) + 1 if option in argv else len(argv)
    return argv[place] if place < len(argv) else ""


def _link(path: Path) -> str:
    try:
        return os.fspath(path.readlink())
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE).decode(errors="replace")
    except OSError:
        return ""
