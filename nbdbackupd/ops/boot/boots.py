"""The boots of this host: what there is, and the end of those that nobody attends to any more."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError, NbdbackupError
from nbdbackupd.ops.boot import boot
from nbdbackupd.ops.boot import record as boot_record
from nbdbackupd.ops.boot.record import BootRecord, Phase, Places
from nbdbackupd.virt import transient
from nbdbackupd.virt.connection import Connection

log = logging.getLogger(__name__)
LET_GO_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBoot:
    """One boot; ``running`` is None where libvirt was not asked."""

    record: BootRecord
    attendant: str
    running: bool | None

    def to_json(self) -> dict[str, Any]:
        """The boot as a JSON object."""
        return boot_record.describe(self.record, running=self.running, attendant=self.attendant)


def known(runtime_dir: Path, scratch_dir: Path, connection: Connection) -> tuple[KnownBoot, ...]:
    """All boots of this host, by name. Raises RepositoryError, DomainError."""
    found = []
    for places, record in boot_record.all_of(scratch_dir, runtime_dir):
        running = None
        if record.uri == connection.uri:
            running = _domain_runs(record, connection)
        found.append(KnownBoot(record=record, attendant=places.attendant(), running=running))
    return tuple(found)


def sweep(runtime_dir: Path, scratch_dir: Path, connection: Connection) -> tuple[str, ...]:
    """End what dead processes have left, and boots whose guest has ended; return their names.

    A live restore is never given up here: it holds what its guest wrote. What can't be ended is
    logged, and left for the next time.
    """
    ended = []
    for places, record in boot_record.all_of(scratch_dir, runtime_dir):
        if record.uri != connection.uri or places.attendant():
            continue
        try:
            with places.attended():
                # what it is now: it may have been made at this moment
                left = places.read()
                if left is None or not _is_left(left, connection):
                    continue
                boot.end(places, left, connection)
        except BusyError:
            # somebody took it up
            continue
        except NbdbackupError as err:
            log.warning("boot %s can't be ended: %s", record.name, err)
            continue
        log.log(runlog.NOTICE, "boot %s was left behind, it was ended", record.name)
        ended.append(record.name)
    return tuple(ended)


def _is_left(record: BootRecord, connection: Connection) -> bool:
    if record.phase is Phase.STARTING:
        return True
    if record.output:
        return False
    return record.attended or not _domain_runs(record, connection)


def _domain_runs(record: BootRecord, connection: Connection) -> bool:
    return bool(record.uuid) and transient.find(connection, record.uuid) is not None


def wait_for_end(
    up: boot.Booted, *, pause: Callable[[], None], on_held: Callable[[], None]
) -> None:
    """Wait until the guest has ended; ``pause`` waits a little and raises to end the wait.

    ``on_held`` is called each time that a disk's error has stopped the guest. Raises DomainError if
    libvirt can't be asked.
    """
    was_held = False
    while transient.is_running(up.domain):
        is_held = transient.is_held_by_error(up.domain)
        if is_held and not was_held:
            on_held()
        was_held = is_held
        pause()


def stop(
    name: str,
    runtime_dir: Path,
    scratch_dir: Path,
    connection: Connection,
    *,
    cancelled: Callable[[], None],
) -> BootRecord:
    """End a boot by its name; a process that attends to it is asked to let go first.

    Raises as ``boot.stop``, and BusyError if that process does not let go in time.
    """
    places = Places.of(name, runtime_dir, scratch_dir)
    record = places.read()
    deadline = time.monotonic() + LET_GO_SECONDS
    while record is not None:
        try:
            return boot.stop(places, connection)
        except BusyError:
            if time.monotonic() > deadline:
                raise
            _ask_to_end(places)
        cancelled()
        time.sleep(POLL_SECONDS)
        if places.read() is None and not places.attendant():
            # it has cleaned up by itself
            return record
    return boot.stop(places, connection)


def _ask_to_end(places: Places) -> None:
    """Signal the process that holds the lock; an id may be a stranger's by now."""
    words = places.attendant().split()
    if len(words) < 2 or not words[1].isdigit():
        return
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(int(words[1]))
        try:
            if places.attendant().split()[:2] == words[:2]:
                signal.pidfd_send_signal(fd, signal.SIGTERM)
        finally:
            os.close(fd)
