"""The steps of a boot: serve, adapt, make overlays, copy firmware, start."""

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nbdbackupd import durable
from nbdbackupd.errors import DomainError, IntegrityError, RepositoryError
from nbdbackupd.model import bootxml
from nbdbackupd.model.bootxml import MappedDisk
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.choice import NEWEST, Choice
from nbdbackupd.model.definition import Adapted, Consent
from nbdbackupd.ops.boot import images as boot_images
from nbdbackupd.ops.boot.images import FinalImage
from nbdbackupd.ops.boot.record import BootDisk, BootRecord, Phase, Places
from nbdbackupd.ops.define import adjust
from nbdbackupd.ops.define.adjust import DefineRequest, Prepared
from nbdbackupd.ops.define.define import DomainDefiner
from nbdbackupd.ops.domain import vtpm
from nbdbackupd.ops.map import map as mapping
from nbdbackupd.ops.map.map import MapRequest
from nbdbackupd.ops.map.mapped import ServedDisk
from nbdbackupd.ops.restore import side_files
from nbdbackupd.ops.restore.request import PlannedDisk, PlannedDomain
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.qemu import image
from nbdbackupd.repo import written
from nbdbackupd.repo.written import Verdict
from nbdbackupd.virt import transient
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BootRequest:
    """What to boot and how.

    ``choice`` is that of the point. ``name`` empty means the original's with ``boot_`` before it,
    or with ``keep_identity``, which also keeps UUID and MAC addresses, the original's. ``memory``
    in bytes, 0: as the original. ``network`` is ``none``, ``down`` or ``keep``. ``output`` is where
    a live restore puts the images, in ``format`` (None: as the originals), ``define`` makes the
    domain persistent then.

    ``attended``: the boot ends with its process. ``with_us``: libvirt itself ends the domain when
    the connection closes. ``console``: what the guest says on its first serial port is kept.
    ``started`` is the time now. ``trusted`` as in ``DefineRequest``; ``state_dirs`` are where this
    host has noted which manifests it wrote. ``unattended``: a set that was changed is not booted.
    """

    source: Path
    runtime_dir: Path
    scratch_dir: Path
    started: datetime
    choice: Choice = NEWEST
    name: str = ""
    keep_identity: bool = False
    memory: int = 0
    network: str = "none"
    output: Path | None = None
    format: str | None = None
    define: bool = False
    attended: bool = True
    with_us: bool = False
    console: bool = True
    trusted: bool = False
    state_dirs: tuple[Path, ...] = ()
    unattended: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Booted:
    """A domain that runs on a point, ``seconds`` after it was asked for.

    ``warnings`` tell what it misses.
    """

    places: Places
    record: BootRecord
    domain: Domain
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def console(self) -> Path:
        """The file with what the guest has said on its first serial port."""
        return self.places.console


class Making:
    """A boot in the making; ``record`` always tells what there is to be undone."""

    def __init__(
        self,
        request: BootRequest,
        places: Places,
        connection: Connection,
        cancelled: Callable[[], None],
        record: BootRecord,
        *,
        consent: Consent,
    ) -> None:
        self.record = record
        self._consent = consent
        self._request = request
        self._places = places
        self._connection = connection
        self._cancelled = cancelled
        self._begun = time.monotonic()

    def run(self, given: OpenedSet, point: RestorePoint, images: tuple[FinalImage, ...]) -> Booted:
        """Make everything, in an order in which each step finds what it needs."""
        changed = self._judge(given, point)
        served = serve(self.record, self._places, self._connection, self._cancelled)
        disks = self._disks(served, images)
        files = self._files(point)
        definer = self._prepared(point, disks, files)
        adapted, config = definer.prepared.adapted, definer.prepared.config
        self._note(
            uuid=adapted.uuid,
            disks=disks,
            files=tuple(map(os.fspath, (config, *(each.final for each in files))))
            if images
            else (),
            definition=adapted.xml if images else "",
            xml=bootxml.over_map(
                adapted.xml,
                {disk.target: _mapped(disk) for disk in disks},
                console=os.fspath(self._places.console) if self._request.console else "",
                memory=self._request.memory,
            ),
        )
        for disk in disks:
            image.create_on_server(Path(disk.overlay), disk.size, socket=Path(disk.socket))
        for final in images:
            boot_images.make(final)
        for each in files:
            self._copy(each)
        self._note(tpm=os.fspath(definer.prepared.tpm_place or ""))
        definition = definer.finish()
        self._cancelled()
        domain = transient.start(self._connection, self.record.xml, with_us=self._request.with_us)
        self._note(phase=Phase.RUNNING)
        log.info("domain %s runs on point %s of %s", domain.name, point.id, given.path)
        told = (text for each in images for text in each.warnings)
        warnings = (*given.warnings, *changed, *definition.warnings, *told)
        return Booted(
            places=self._places,
            record=self.record,
            domain=domain,
            warnings=warnings,
            seconds=time.monotonic() - self._begun,
        )

    def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self._places.write(self.record)

    def _judge(self, given: OpenedSet, point: RestorePoint) -> tuple[str, ...]:
        """Tell of points that this host wrote otherwise. Raises IntegrityError."""
        changed = written.warnings(self._request.state_dirs, given.known.needed(point))
        if changed and self._request.unattended and not self._request.trusted:
            raise IntegrityError(
                f"{changed[0]}; its guest is not run: see who can write to the set, or give "
                f"--trust-definition",
                file=given.path,
            )
        return changed

    def _disks(
        self, served: tuple[ServedDisk, ...], images: tuple[FinalImage, ...]
    ) -> tuple[BootDisk, ...]:
        final = {each.target: each for each in images}
        if images:
            boot_images.mark(images[0].path.parent, self.record.name)
        return tuple(
            BootDisk(
                target=disk.target,
                size=disk.size,
                overlay=os.fspath(self._places.work / f"{number}.qcow2"),
                socket=os.fspath(disk.socket or ""),
                final=os.fspath(final[disk.target].path) if images else "",
                format=final[disk.target].format if images else "",
            )
            for number, disk in enumerate(served)
        )

    def _files(self, point: RestorePoint) -> tuple[FileCopy, ...]:
        """Firmware of the same point; with a live restore it goes where the images go."""
        home = self._request.output or self._places.work
        files = side_files.plan(self._request.source, point, home)
        for each in files:
            if self._request.output is not None and os.path.lexists(each.final):
                raise RepositoryError(f"{each.final} exists: give another directory")
        return files

    def _prepared(
        self, point: RestorePoint, disks: tuple[BootDisk, ...], files: tuple[FileCopy, ...]
    ) -> "BootDefiner":
        """Everything that libvirt must agree to is looked at; nothing is defined."""
        wanted = DefineRequest(
            name=self.record.name,
            keep_identity=self._request.keep_identity,
            network=self._request.network,
            trusted=self._request.trusted,
        )
        definer = BootDefiner(wanted, secrets.token_bytes, self._connection, self._consent)
        definer.proven = written.verdict(self._request.state_dirs, point) is Verdict.OURS
        definer.prepare(
            PlannedDomain(
                point=point.id,
                domain=point.domain,
                output=self._request.output or self._places.work,
                disks=tuple(
                    PlannedDisk(
                        target=disk.target,
                        path=Path(disk.final or disk.overlay),
                        format=disk.format or "qcow2",
                    )
                    for disk in disks
                ),
                files=files,
                live=side_files.live_xml(self._request.source, point),
            )
        )
        return definer

    def _copy(self, each: FileCopy) -> None:
        with durable.translate_os_errors("write", each.incomplete):
            side_files.copy(each, self._cancelled, point=self.record.point)
            durable.rename(each.incomplete, each.final)


class BootDefiner(DomainDefiner):
    """Looks at all that a definition needs, and puts the TPM's state into place; no more."""

    prepared: Prepared
    proven = False
    """Whether this host wrote the definition."""

    def judge(self, adapted: Adapted) -> None:
        """A guest that wants the host's programs is not run, unless it is this host's own."""
        if adapted.foreign and not self.proven:
            raise DomainError(
                f"the definition of the point names what is not its own: "
                f"{'; '.join(adapted.foreign)}; it is not run: give --trust-definition if you know "
                f"who wrote the set"
            )

    def look(self, prepared: Prepared) -> None:
        """Keep what was found out."""
        self.prepared = prepared
        super().look(prepared)

    def act(self, prepared: Prepared) -> tuple[bool, bool]:
        """Put the TPM's state where the domain will look for it."""
        if prepared.tpm_place is not None:
            vtpm.put(prepared.tpm_place, adjust.tpm_files(prepared.planned))
        return False, False


def _mapped(disk: BootDisk) -> MappedDisk:
    return MappedDisk(overlay=disk.overlay, socket=disk.socket)


def serve(
    record: BootRecord,
    places: Places,
    connection: Connection,
    cancelled: Callable[[], None],
) -> tuple[ServedDisk, ...]:
    """Serve the point of a boot on its sockets, also after this process has ended.

    Raises as ``map.detach``.
    """
    owner = connection.base_owner() if os.geteuid() == 0 else None
    request = MapRequest(
        runtime_dir=places.runtime_dir,
        source=Path(record.source),
        choice=Choice(point=record.point),
        socket=places.sockets,
        # what is copied from here becomes the guest's only disk, and a boot test is a proof
        prove=True,
        owner=owner,
        purpose=purpose(record.name),
    )
    return mapping.detach(request, cancelled=cancelled).disks


def purpose(name: str) -> str:
    """What the map of a boot says that it is for."""
    return f"boot {name}"
