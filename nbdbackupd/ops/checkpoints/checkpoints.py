"""``checkpoints``: show what there is of our checkpoints in a domain, and put it in order."""

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import durable, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import (
    BusyError,
    CheckpointError,
    DomainNotFoundError,
    NbdbackupError,
    RepositoryError,
)
from nbdbackupd.model.naming import point_of, tag_of, tag_of_chain
from nbdbackupd.model.reconcile import WHY, Entry, KnownChain, Plan, drop, reconcile
from nbdbackupd.ops.checkpoints import bitmaps, leftovers
from nbdbackupd.ops.checkpoints import reconcile as reconciling
from nbdbackupd.ops.checkpoints.reconcile import Done, Known
from nbdbackupd.ops.domain import domains, locks
from nbdbackupd.ops.domain import qemu as qemus
from nbdbackupd.ops.domain.images import ALONE, Sharing, images_of, why_elsewhere
from nbdbackupd.ops.domain.qemu import Qemu
from nbdbackupd.ops.domain.survey import Looked, look
from nbdbackupd.plain import versioned
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.state import Record, StateDirectory
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
OWNER: Final = "checkpoints of "
"""How the owner of a lock begins that this verb holds."""

ARRIVAL_SECONDS: Final = 3600.0
ARRIVAL_POLL_SECONDS: Final = 1.0
Work = Callable[[Known, set[str]], tuple[Looked, Plan, tuple[Done, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointsRequest:
    """Which domain; ``directory``: a set of it that may have no record yet.

    ``repair`` carries out what is to be done, else nothing is changed anywhere. ``drop``: take
    away all checkpoints of that chain instead, given by its id or tag; with ``dry_run`` only
    say which. ``release``: the same with all chains, whose sets go on, at ``moment`` (RFC 3339).
    ``started``: libvirt's hook says that it has just been started.
    """

    domain: str
    runtime_dir: Path
    state_dir: Path
    run_id: str
    directory: Path | None = None
    repair: bool = False
    drop: str = ""
    release: bool = False
    moment: str = ""
    dry_run: bool = False
    wait_seconds: float = 0.0
    started: bool = False
    sharing: Sharing = ALONE

    @property
    def changes(self) -> bool:
        """Whether anything is to be changed."""
        return (self.repair or self.removes) and not self.dry_run

    @property
    def removes(self) -> bool:
        """Whether bases are to be removed."""
        return bool(self.drop) or self.release


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointsReport:
    """What was found and is to be done, or (``changed``) was done.

    ``missing`` says of chains, by id, why their sets could not be read. ``holder`` is a run that
    has the domain locked: what it has just made looks like what a dead run left. ``elsewhere`` says
    why another host has the domain: then nothing is looked at. ``others`` are the bitmaps of other
    programs, each behind its disk.
    """

    domain: str
    uuid: str
    is_active: bool
    chains: tuple[KnownChain, ...]
    missing: Mapping[str, str]
    plan: Plan
    steps: tuple[Done, ...]
    changed: bool
    holder: str = ""
    elsewhere: str = ""
    others: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why steps could not be done."""
        return tuple(f"{each.step.name}: {each.problem}" for each in self.steps if each.problem)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return versioned(
            domain=self.domain,
            uuid=self.uuid,
            active=self.is_active,
            busy=self.holder,
            elsewhere=self.elsewhere,
            chains=[
                {
                    "id": chain.id,
                    "tag": tag_of_chain(chain.id),
                    "set": chain.set,
                    "readable": chain.is_whole,
                    "problem": self.missing.get(chain.id, ""),
                    "base": chain.base,
                    "point": chain.point,
                }
                for chain in self.chains
            ],
            checkpoints=[_entry_json(entry) for entry in self.plan.entries],
            foreign=self.plan.foreign,
            foreign_bitmaps=list(self.others),
            changed=self.changed,
            steps=[_step_json(each) for each in self.steps],
        )


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "chain": entry.chain,
        "tag": tag_of(entry.name),
        "point": point_of(entry.name),
        "state": entry.fate.value,
        "meaning": WHY[entry.fate],
        "libvirt": entry.in_libvirt,
        "bitmaps": [
            {"disk": held.target, "image": held.path, "sound": held.is_sound} for held in entry.held
        ],
        "problems": dict(entry.problems),
    }


def _step_json(done: Done) -> dict[str, Any]:
    step = done.step
    return {
        "action": step.action.value,
        "checkpoint": step.name,
        "reason": step.why,
        "disks": list(step.targets),
        "images": list(step.images),
        "metadata": step.metadata,
        "lost": list(done.lost),
        "problem": done.problem,
    }


def run(
    request: CheckpointsRequest,
    connection: Connection,
    *,
    cancelled: Callable[[], None] = lambda: None,
) -> CheckpointsReport:
    """Look at the chains of the given set and of the state directory; change what was asked for.

    Of a domain that was ``started`` and is gone again, or that is being saved, there is nothing to
    be reported: a backup reconciles by itself.

    Raises BusyError if something is to be changed and a run holds the domain, or if it does not
    arrive, RepositoryError or FormatError if the given set can't be read or is another domain's,
    CheckpointError if there is nothing of the chain to drop, DomainError.
    """
    if request.started:
        try:
            _wait_arrival(request, connection, cancelled)
            return _run(request, connection, cancelled)
        except DomainNotFoundError as err:
            log.info("nothing to be done: %s", err.message)
            return _nothing(request)
    return _run(request, connection, cancelled)


def _wait_arrival(
    request: CheckpointsRequest, connection: Connection, cancelled: Callable[[], None]
) -> None:
    """Wait while a migration brings the domain. Raises BusyError after an hour."""
    domain = domains.find(connection, request.domain, request.runtime_dir)
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while not domain.is_gone() and jobs.is_arriving(domain):
        cancelled()
        if time.monotonic() > deadline:
            raise BusyError(
                f"domain {domain.name} is still being migrated after {ARRIVAL_SECONDS:.0f} s: "
                f"its next backup puts its checkpoints in order",
                domain=domain.name,
            )
        time.sleep(ARRIVAL_POLL_SECONDS)


def _nothing(request: CheckpointsRequest) -> CheckpointsReport:
    return CheckpointsReport(
        domain=request.domain,
        uuid="",
        is_active=False,
        chains=(),
        missing={},
        plan=Plan(),
        steps=(),
        changed=request.changes,
    )


def _run(
    request: CheckpointsRequest, connection: Connection, cancelled: Callable[[], None]
) -> CheckpointsReport:
    domain = domains.find(connection, request.domain, request.runtime_dir)
    elsewhere = "" if request.changes else why_elsewhere(domain, request.sharing)
    if elsewhere:
        return replace(_nothing(request), uuid=domain.uuid, elsewhere=elsewhere)
    work = functools.partial(_reconcile, request, domain, cancelled)
    return _work(request, domain.name, domain.uuid, work, cancelled)


def run_of_qemu(
    request: CheckpointsRequest, path: Path, *, cancelled: Callable[[], None] = lambda: None
) -> CheckpointsReport:
    """The same with the bitmaps of a QEMU without libvirt, whose monitor is ``path``.

    Raises BusyError also if another program, or a run, holds the monitor, DomainNotFoundError.
    """
    with qemus.connect(path, request.domain) as qemu:
        work = functools.partial(_reconcile_qemu, request, qemu)
        return _work(request, qemu.name, qemu.uuid, work, cancelled)


def _work(
    request: CheckpointsRequest, name: str, uuid: str, work: Work, cancelled: Callable[[], None]
) -> CheckpointsReport:
    """Look, and carry out what is wished; what there is to be done is found out by ``work``."""
    lock = rundir.domain_dir(request.runtime_dir, uuid) / rundir.LOCK
    with ExitStack() as stack:
        stack.enter_context(runlog.context(DOMAIN=name, UUID=uuid))
        if request.changes:
            rundir.make_domain_dir(request.runtime_dir, uuid)
            wait = durable.Wait(seconds=request.wait_seconds, cancelled=cancelled, option="--wait")
            if request.started and f"({locks.BACKUP}" in (who := locks.holder(lock)):
                log.info("nothing to be done, %s does it by itself", who)
                return _nothing(request)
            stack.enter_context(durable.Lock(lock, owner=f"{OWNER}{name}", wait=wait))
        sets = _Sets(name, uuid, stack if request.changes else None)
        known = sets.all(request.directory, StateDirectory(request.state_dir).records(uuid))
        noted = leftovers.dead_run(request.runtime_dir, uuid)
        dead = sets.dead | ({noted.checkpoint} if noted is not None else set())
        looked, plan, done = work(known, dead)
        if request.drop:
            _forget(request, name, uuid, known, done)
        if request.release and request.changes and done:
            gone = {each.step.name for each in done if not each.problem}
            StateDirectory(request.state_dir).note_release(uuid, gone, request.moment)
    return CheckpointsReport(
        domain=name,
        uuid=uuid,
        is_active=looked.is_active,
        chains=known.chains,
        missing=sets.missing,
        plan=plan,
        steps=done,
        others=_others(looked),
        changed=request.changes,
        holder="" if request.changes else _holder(lock),
    )


def _reconcile(
    request: CheckpointsRequest,
    domain: Domain,
    cancelled: Callable[[], None],
    known: Known,
    dead: set[str],
) -> tuple[Looked, Plan, tuple[Done, ...]]:
    """What there is, and what is to be done about it, or was."""
    with ExitStack() as stack:
        erase = None
        if request.changes:
            held = stack.enter_context(
                images_of(domain, request.runtime_dir, request.run_id, cancelled, request.sharing)
            )
            erase = reconciling.eraser(held) if held is not None else None
        looked = look(domain)
        view = reconciling.view(domain, looked, [chain.base for chain in known.chains])
        plan = reconcile(view, known.chains, dead)
        tag = None if request.release else tag_of_chain(request.drop)
        steps = drop(view, tag) if request.removes else plan.steps
        if not request.changes:
            return looked, plan, tuple(Done(step) for step in steps)
        done = reconciling.apply(domain, steps, known.xml, erase=erase, cancelled=cancelled)
        reconciling.note_lost(StateDirectory(request.state_dir), domain.uuid, done)
    return looked, plan, done


def _reconcile_qemu(
    request: CheckpointsRequest, qemu: Qemu, known: Known, dead: set[str]
) -> tuple[Looked, Plan, tuple[Done, ...]]:
    """As ``_reconcile``, for a QEMU without libvirt."""
    looked = qemus.look(qemu)
    view = bitmaps.view(looked)
    plan = reconcile(view, known.chains, dead)
    tag = None if request.release else tag_of_chain(request.drop)
    steps = bitmaps.removals(drop(view, tag) if request.removes else plan.steps)
    if not request.changes:
        return looked, plan, tuple(Done(step) for step in steps)
    return looked, plan, bitmaps.apply(qemu, steps)


def _others(looked: Looked) -> tuple[str, ...]:
    """Bitmaps that are not ours, each with its disk."""
    found = {
        f"{target}: {name}"
        for target, state in looked.states.items()
        for names in state.bitmaps.values()
        for name in names
        if not tag_of(name)
    }
    return tuple(sorted(found))


def _forget(
    request: CheckpointsRequest, name: str, uuid: str, known: Known, done: tuple[Done, ...]
) -> None:
    """Forget the records of a chain that was dropped, if nothing of it is left.

    Raises CheckpointError if there was nothing at all.
    """
    tag = tag_of_chain(request.drop)
    chains = [chain.id for chain in known.chains if tag_of_chain(chain.id) == tag]
    if not done and not chains:
        raise CheckpointError(
            f"domain {name} has no checkpoint of chain {request.drop}; "
            f"'nbdbackupctl checkpoints {name}' shows those that it has",
            domain=name,
        )
    if request.changes and not any(each.problem for each in done):
        for chain in chains:
            StateDirectory(request.state_dir).forget(uuid, chain)


class _Sets:
    """Reads the sets of a domain; ``stack`` (None: nothing will be changed) keeps their locks."""

    def __init__(self, name: str, uuid: str, stack: ExitStack | None) -> None:
        self._name = name
        self._uuid = uuid
        self._stack = stack
        self._read_sets: dict[str, Known] = {}
        self.missing: dict[str, str] = {}
        self.dead: set[str] = set()

    def all(self, directory: Path | None, records: Iterable[Record]) -> Known:
        """The chain of the given set, then those of the records."""
        records = tuple(records)
        chains: list[KnownChain] = []
        xml: dict[str, str] = {}
        if directory is not None:
            given = self._read(directory, records)
            chains += given.chains
            xml |= given.xml
        for record in records:
            if any(chain.id == record.chain for chain in chains):
                continue
            found = self._of_record(record, records)
            chains += found.chains
            xml |= found.xml
        return Known(chains=tuple(chains), xml=xml)

    def _of_record(self, record: Record, records: tuple[Record, ...]) -> Known:
        try:
            found = self._read(Path(record.set), records)
            if [chain.id for chain in found.chains] != [record.chain]:
                what = "another chain" if found.chains else "no full"
                raise RepositoryError(f"{record.set} holds {what}")
        except NbdbackupError as err:
            self.missing[record.chain] = err.message
            return reconciling.of_record(record)
        return found

    def _read(self, path: Path, records: tuple[Record, ...]) -> Known:
        """Each set once: a second lock would wait for our first."""
        real = os.path.realpath(path)
        if real not in self._read_sets:
            self._read_sets[real] = self._read_new(path, records)
        return self._read_sets[real]

    def _read_new(self, path: Path, records: tuple[Record, ...]) -> Known:
        set_dir = SetDirectory.open(path)
        if not set_dir.exists:
            raise RepositoryError(f"there is no set {path}")
        if self._stack is not None:
            self._stack.enter_context(set_dir.lock(owner=f"{OWNER}{self._name}"))
        known = set_dir.load()
        for point in known.points:
            if point.uuid != self._uuid:
                raise RepositoryError(f"set {path} belongs to domain {point.domain}, {point.uuid}")
        if self._stack is not None:
            dead = [each for each in set_dir.dead_runs() if each.uuid == self._uuid]
            self.dead |= {each.checkpoint for each in dead if each.checkpoint}
        return reconciling.of_set(set_dir, known, records)


def _holder(lock: Path) -> str:
    """Who seems to hold the domain's lock, without taking it."""
    text = durable.holder(lock)
    pid = text.removeprefix("process ").partition(" ")[0]
    return text if pid.isdigit() and Path(f"/proc/{pid}").exists() else ""
