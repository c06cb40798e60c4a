"""``boot --live-restore``: the disks move to their place while the guest runs on them.

QEMU copies each disk whole, with all that the guest writes meanwhile, until every copy follows it
synchronously. Then the guest is paused, each disk is changed over to its copy, and only when the
record says that all are does the guest go on: while it is paused, overlays and copies are equal, so
that a cut at any step leaves either all of the guest on the overlays or all of it on the copies.
What was cut short is taken up by ``resume``, after a power cut, too.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import durable
from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError, DomainError, NbdbackupError, RepositoryError
from nbdbackupd.ops.boot import boot, images, launch
from nbdbackupd.ops.boot.record import BootDisk, BootRecord, Phase, Places
from nbdbackupd.ops.map import mapped
from nbdbackupd.plain import versioned
from nbdbackupd.qemu import image
from nbdbackupd.qemu.image import CreateOptions
from nbdbackupd.virt import blockcopy, definition, transient
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, GuestState

log = logging.getLogger(__name__)
POLL_SECONDS: Final = 0.2
# a request that met no server was answered with an error: the guest's next one finds it again
RECONNECT_SECONDS: Final = 30.0
"""QEMU looks for a server that went after 1, 2, 4, 8, then each 16 s (7.2, block/nbd.c)."""

RECONNECT_POLL_SECONDS: Final = 1.0
RESUME_TRIES: Final = 5
RESUME_SECONDS: Final = 0.5

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReport:
    """A live restore that is complete: the domain runs on its images, or has ended on them."""

    record: BootRecord
    defined: bool
    running: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            name=self.record.name,
            uuid=self.record.uuid,
            point=self.record.point,
            created=self.record.created,
            defined=self.defined,
            running=self.running,
            disks=[
                {
                    "target": disk.target,
                    "path": disk.final,
                    "format": disk.format,
                    "size": disk.size,
                }
                for disk in self.record.disks
            ],
            seconds=round(self.seconds, 3),
        )


def resume(
    places: Places,
    connection: Connection,
    *,
    progress: Progress,
    cancelled: Callable[[], None],
    bandwidth: int = 0,
) -> LiveReport:
    """Take a live restore up where it is, and end it.

    ``bandwidth`` in bytes per second bounds each copy, 0 for no limit. Raises RepositoryError (no
    such live restore), BusyError (a process attends to it), DomainError, what ``map.detach``
    raises, and what ``cancelled`` raises: then the guest runs on, and nothing is lost.
    """
    with places.attended():
        record = places.read()
        if record is None or not record.output or record.phase is Phase.STARTING:
            raise RepositoryError(
                f"there is no live restore {places.name} to go on with: "
                f"'nbdbackupctl boot --list' shows what there is"
            )
        if record.uri != connection.uri:
            raise DomainError(f"{record.name} runs at {record.uri}: give --connect {record.uri}")
        work = _Work(places, record, connection, cancelled)
        work.revive()
        return work.run(progress, bandwidth)


class _Work:
    """One live restore; ``record`` is what is written down."""

    def __init__(
        self,
        places: Places,
        record: BootRecord,
        connection: Connection,
        cancelled: Callable[[], None],
    ) -> None:
        self._places = places
        self._record = record
        self._connection = connection
        self._cancelled = cancelled
        self._begun = time.monotonic()
        self._patience = 0.0

    def _note(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)
        self._places.write(self._record)

    # -- after a cut

    def revive(self) -> None:
        """Have the point served, and the guest run on what it stood on."""
        record = self._record
        if record.phase is Phase.PIVOTED:
            return
        self._places.make()
        purpose = launch.purpose(record.name)
        if not any(each.purpose == purpose for each in mapped.known(self._places.runtime_dir)):
            for disk in record.disks:
                mapped.remove_socket(Path(disk.socket))
            launch.serve(record, self._places, self._connection, self._cancelled)
            self._patience = time.monotonic() + RECONNECT_SECONDS
        domain = transient.find(self._connection, record.uuid)
        if domain is None:
            # the overlays hold all: the guest was paused as long as a disk was on its copy
            text = "domain %s is gone, it starts again from its overlays"
            log.log(runlog.NOTICE, text, record.name)
            self._note(phase=Phase.RUNNING, held=False)
            transient.start(self._connection, record.xml)
            return
        if not record.held and transient.is_held_by_error(domain):
            _let_go(domain)

    # -- the way to the end

    def run(self, progress: Progress, bandwidth: int) -> LiveReport:
        """Copy, change over, let go of the point."""
        if self._record.phase is not Phase.PIVOTED:
            domain = self._domain()
            self._copy(domain, bandwidth)
            self._wait(domain, progress, bandwidth)
            self._pivot(domain)
        return self._finish()

    def _domain(self) -> Domain:
        domain = transient.find(self._connection, self._record.uuid)
        if domain is None:
            raise self._ended()
        return domain

    def _ended(self) -> DomainError:
        name = self._record.name
        return DomainError(
            f"domain {name} has ended before its disks were in place: 'nbdbackupctl boot --resume "
            f"{name}' starts it again and goes on, --stop {name} gives it up",
            domain=name,
        )

    def _copy(self, domain: Domain, bandwidth: int) -> None:
        """Begin a copy of each disk that has none; the others get the limit of now."""
        if self._record.phase is Phase.RUNNING:
            self._note(phase=Phase.COPYING)
        live = blockcopy.disks(domain)
        for disk in self._record.disks:
            found = live.get(disk.target)
            if found is None:
                raise DomainError(f"disk {disk.target} was taken from {domain.name} meanwhile")
            if disk.final == found.path:
                continue
            if disk.final == found.mirror:
                _limit(domain, disk.target, bandwidth)
                continue
            if found.mirror:
                raise BusyError(f"disk {disk.target} of {domain.name} is copied by somebody else")
            _empty(disk)
            blockcopy.begin(domain, disk.target, disk.final, disk.format, bandwidth=bandwidth)

    def _wait(self, domain: Domain, progress: Progress, bandwidth: int) -> None:
        """Wait until all copies are synchronous.

        Servers that were made anew are not known to QEMU at once: a copy that fails then is begun
        once more. One that has caught up goes on without its limit: else a guest that writes as
        fast never lets it end.
        """
        unlimited = set[str]()
        left = {disk.target: disk for disk in self._record.disks}
        while True:
            self._cancelled()
            if not transient.is_running(domain):
                raise self._ended()
            live = blockcopy.disks(domain)
            for target, disk in list(left.items()):
                found = live.get(target)
                if found is not None and (found.is_ready or found.path == disk.final):
                    progress(target, disk.size, disk.size)
                    del left[target]
                elif found is not None and not found.mirror and time.monotonic() < self._patience:
                    time.sleep(RECONNECT_POLL_SECONDS)
                    self._copy(domain, bandwidth)
                    unlimited.clear()
                elif found is None or found.mirror != disk.final:
                    raise DomainError(
                        f"the copy of disk {target} to {disk.final} has failed; the guest runs on: "
                        f"look whether there is space, and at the set with 'nbdbackupctl verify'; "
                        f"'nbdbackupctl boot --resume {domain.name}' goes on",
                        domain=domain.name,
                        disk=target,
                    )
                else:
                    now = blockcopy.done(domain, target)
                    if now is not None and now[1]:
                        progress(target, disk.size * now[0] // now[1], disk.size)
                    if now is not None and now[0] == now[1] and target not in unlimited:
                        _limit(domain, target, 0)
                        unlimited.add(target)
            if not left:
                return
            time.sleep(POLL_SECONDS)

    def _pivot(self, domain: Domain) -> None:
        """Change all disks over; the guest does not run before that is written down."""
        if transient.state(domain) is GuestState.RUNNING:
            self._note(held=True)
            domain.suspend()
        self._note(phase=Phase.PIVOTING)
        try:
            live = blockcopy.disks(domain)
            for disk in self._record.disks:
                if live[disk.target].path != disk.final:
                    blockcopy.pivot(domain, disk.target)
            live = blockcopy.disks(domain)
            wrong = [
                disk.target
                for disk in self._record.disks
                if live[disk.target].path != disk.final or live[disk.target].is_mapped
            ]
            if wrong:
                raise DomainError(f"{domain.name}: {', '.join(wrong)} did not change over")
        except NbdbackupError as err:
            name = self._record.name
            err.message += f"; the guest is paused: 'nbdbackupctl boot --resume {name}' goes on"
            raise
        for disk in self._record.disks:
            with durable.translate_os_errors("write", disk.final):
                durable.fsync_file(Path(disk.final))
        self._note(phase=Phase.PIVOTED)

    def _finish(self) -> LiveReport:
        record = self._record
        domain = transient.find(self._connection, record.uuid)
        running = domain is not None and transient.is_running(domain)
        if record.held and domain is not None and running:
            domain.resume()
            self._note(held=False)
        if domain is not None and running:
            transient.unmark(domain)
        defined = False
        if record.define:
            definition.define(self._connection, record.definition)
            defined = True
        marker = images.marker(Path(record.output))
        with durable.translate_os_errors("remove", marker):
            marker.unlink(missing_ok=True)
            durable.fsync_directory(marker.parent)
        boot.release(self._places, record)
        return LiveReport(
            record=record,
            defined=defined,
            running=running,
            seconds=time.monotonic() - self._begun,
        )


def _limit(domain: Domain, target: str, bandwidth: int) -> None:
    try:
        blockcopy.limit(domain, target, bandwidth)
    except DomainError as err:
        # it may have ended just now: the next look tells
        log.debug("%s", err)


def _empty(disk: BootDisk) -> None:
    """Make the image anew: an earlier copy may have left half of the disk in it."""
    path = Path(disk.final)
    known = image.info(path, format=disk.format)
    options = CreateOptions(format=disk.format)
    if disk.format == "qcow2":
        options = CreateOptions.like(known)
    image.create(path, disk.size, options)


def _let_go(domain: Domain) -> None:
    """Let a guest go on that was held by an error of its disks."""
    for _ in range(RESUME_TRIES):
        domain.resume()
        time.sleep(RESUME_SECONDS)
        if not transient.is_held_by_error(domain):
            return
    raise DomainError(f"domain {domain.name} stays paused: its disks report errors")
