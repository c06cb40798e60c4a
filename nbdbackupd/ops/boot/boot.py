"""``boot``: a domain that runs on a restore point within seconds, without restoring anything.

The point is served over NBD as ``map`` does (read-only), each disk gets an empty overlay on top,
and a transient domain starts from the overlays: a clone of the point's definition with an identity
of its own, private firmware files and no network card. Neither the set nor the original domain is
touched. The servers outlive us, so that a guest whose attendant is killed runs on; ``boot_record``
tells later commands what there is to end.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import BusyError, ConfigError, RepositoryError, UsageError
from nbdbackupd.model import definition as definition_model
from nbdbackupd.model.definition import Consent
from nbdbackupd.ops.boot import images as boot_images
from nbdbackupd.ops.boot import launch
from nbdbackupd.ops.boot.images import FinalImage
from nbdbackupd.ops.boot.launch import Booted, BootRequest, Making
from nbdbackupd.ops.boot.record import BootRecord, Phase, Places
from nbdbackupd.ops.domain import vtpm
from nbdbackupd.ops.map import mapped
from nbdbackupd.ops.restore import output_names
from nbdbackupd.ops.sets import opened
from nbdbackupd.source import scratch
from nbdbackupd.virt import transient
from nbdbackupd.virt.connection import Connection

__all__ = ["BootRequest", "Booted", "booted", "end", "release", "start", "stop"]

PREFIX: Final = "boot_"
# what a guest writes can't be foreseen; when no space is left, it is paused
SPACE: Final = 64 << 20


@contextmanager
def booted(
    request: BootRequest,
    connection: Connection,
    *,
    cancelled: Callable[[], None],
    consent: Consent = definition_model.refuse,
) -> Iterator[Booted]:
    """Boot for the block: afterwards domain, overlays and servers are gone. Raises as ``start``."""
    places = places_of(request)
    with places.attended():
        up = _start(request, places, connection, cancelled, consent)
        with ExitStack() as stack:
            stack.callback(end, places, up.record, connection)
            yield up


def start(
    request: BootRequest,
    connection: Connection,
    *,
    cancelled: Callable[[], None],
    consent: Consent = definition_model.refuse,
) -> Booted:
    """Boot, and leave it running; ``stop`` ends it.

    ``consent`` is asked before the definition keeps anything of its host.

    Raises UsageError, RepositoryError, ChainBrokenError, FormatError, IntegrityError (the point),
    DomainError (libvirt, or the name is taken), ConfigError, ProcessError, NoSpaceError, BusyError
    (another process attends to a boot of that name). Nothing is left then.
    """
    places = places_of(request)
    with places.attended():
        return _start(request, places, connection, cancelled, consent)


def places_of(request: BootRequest) -> Places:
    """Where the files of the boot go to. Raises what opening the set raises."""
    name = request.name
    if not name:
        _, point = opened.open_point(request.source, request.choice)
        name = point.domain if request.keep_identity else f"{PREFIX}{point.domain}"
    if not name.strip() or definition_model.NAME_BAD.search(name):
        raise UsageError(f"{name!r} can't be the name of a domain")
    return Places.of(name, request.runtime_dir, request.scratch_dir)


def stop(places: Places, connection: Connection) -> BootRecord:
    """End a boot, whatever state it is in, and remove all that belongs to it.

    The images of a live restore are removed, too. Raises RepositoryError if there is no such boot,
    or all of its disks are in place already, BusyError if a process attends to it, DomainError if
    the domain can't be ended.
    """
    with places.attended():
        record = places.read()
        if record is None:
            raise RepositoryError(
                f"there is no boot {places.name}: 'nbdbackupctl boot --list' shows them"
            )
        if record.phase is Phase.PIVOTED:
            raise RepositoryError(
                f"the disks of {places.name} are in place: 'nbdbackupctl boot --resume "
                f"{places.name}' ends the live restore, its domain is yours then"
            )
        end(places, record, connection)
    return record


def _start(
    request: BootRequest,
    places: Places,
    connection: Connection,
    cancelled: Callable[[], None],
    consent: Consent,
) -> Booted:
    if places.read() is not None:
        raise BusyError(
            f"there is a boot {places.name}: end it with 'nbdbackupctl boot --stop {places.name}', "
            f"or give another --name"
        )
    given, point = opened.open_point(request.source, request.choice)
    scratch.prepare(request.scratch_dir, SPACE)
    images: tuple[FinalImage, ...] = ()
    if request.output is not None:
        images = boot_images.plan(given, point, request.output, request.format)
    record = BootRecord(
        name=places.name,
        uri=connection.uri,
        source=str(request.source),
        point=point.id,
        created=point.created,
        started=f"{request.started:%Y-%m-%dT%H:%M:%SZ}",
        attended=request.attended,
        phase=Phase.STARTING,
        output=os.fspath(request.output or ""),
        define=request.define,
    )
    making = Making(request, places, connection, cancelled, record, consent=consent)
    places.make()
    try:
        places.write(record)
        return making.run(given, point, images)
    except BaseException:
        # whatever ended it: nothing of this boot may stay
        end(places, making.record, connection)
        raise


def end(places: Places, record: BootRecord, connection: Connection) -> None:
    """End a boot whose lock the caller holds; as ``stop``."""
    if record.uri != connection.uri:
        raise ConfigError(f"{record.name} was booted at {record.uri}: give --connect {record.uri}")
    known = places.read() or record
    domain = transient.find(connection, known.uuid) if known.uuid else None
    if domain is not None:
        transient.end(domain)
    if known.tpm:
        vtpm.take_back(Path(known.tpm))
    _remove_output(known)
    release(places, known)


def release(places: Places, record: BootRecord) -> None:
    """Let go of map and overlays, which nobody uses any more. Raises RepositoryError, BusyError."""
    for each in mapped.known(places.runtime_dir):
        if each.purpose == launch.purpose(record.name):
            mapped.end(each, places.runtime_dir)
    places.remove()


def _remove_output(record: BootRecord) -> None:
    """Remove what a live restore has made that is not complete."""
    if not record.output:
        return
    files = [Path(disk.final) for disk in record.disks] + [Path(each) for each in record.files]
    output = Path(record.output)
    with durable.translate_os_errors("remove", record.output):
        for path in (*files, boot_images.marker(output)):
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}{output_names.INCOMPLETE}").unlink(missing_ok=True)
        for path in files:
            for folder in path.parents:
                if folder == output or not folder.is_relative_to(output):
                    break
                # those of firmware files, if nobody else has put anything there
                with suppress(OSError):
                    folder.rmdir()
