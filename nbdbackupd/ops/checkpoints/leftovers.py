"""What dead runs left behind, in the set, at libvirt and under the runtime directory.

A run notes what it is about to do in two places before it does it: in its draft (so that the next
run into the same set knows) and under the domain's runtime directory (so that the next run of the
domain knows, whatever its set). A checkpoint that such a note names, and that no committed point
made, is removed (``ops/checkpoints/reconcile.py``): it would only collect changes that nobody will
ever ask for. Deleting it loses nothing, since the older bitmaps kept recording (libvirt 9.0,
measured).
"""

import json
import logging
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from nbdbackupd import documents, durable, rundir
from nbdbackupd.errors import BusyError, FormatError, NbdbackupError
from nbdbackupd.model.domain import is_uuid
from nbdbackupd.repo import generation, layout
from nbdbackupd.repo.draft import Intent
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.source import kept, lease
from nbdbackupd.source import sweep as source_sweep
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
OWNER: Final = "sweep of "
IDLE_SECONDS: Final = 86400.0
MAX_GONE: Final = 1000
"""Directories of domains that are gone that one run removes."""


def sweep(
    domain: Domain, set_dir: SetDirectory, runtime_dir: Path, scratch_dir: Path
) -> frozenset[str]:
    """End the job of a dead run, remove its files and let its guest go; both locks are held.

    To be done before the domain is asked whether it runs: a job may keep the QEMU of a guest that
    has shut down (libvirt 11.10). Returns the checkpoints of dead runs: remove them before
    ``finish`` forgets their names.
    Raises the errors of libvirt and of the set: a run that can't clean up must not go on.
    """
    kept.sweep(runtime_dir)
    own = rundir.socket_dir(runtime_dir, domain.uuid)
    source_sweep.sweep(domain, own, scratch_dir).tell()
    if domain.is_active():
        # of a run that read the images of the domain while it was off
        lease.forget(rundir.domain_dir(runtime_dir, domain.uuid))
        with suppress(OSError):
            rundir.offline_socket(runtime_dir, domain.uuid).unlink(missing_ok=True)
    return dead_checkpoints(domain.uuid, set_dir, runtime_dir)


def dead_checkpoints(uuid: str, set_dir: SetDirectory, runtime_dir: Path) -> frozenset[str]:
    """The checkpoints of runs that died before their points were published; locks are held."""
    dead = [each for each in set_dir.dead_runs() if each.uuid == uuid]
    noted = dead_run(runtime_dir, uuid)
    if noted is not None:
        dead.append(noted)
    return frozenset(each.checkpoint for each in dead if each.checkpoint)


def finish(uuid: str, set_dir: SetDirectory, runtime_dir: Path) -> None:
    """Remove what dead runs left in the set, and their notes; both locks are held.

    Raises the errors of the set.
    """
    set_dir.sweep()
    forget(runtime_dir, uuid)


def sweep_gone(connection: Connection, runtime_dir: Path, now: datetime) -> None:
    """Remove the directories of domains that are gone, in which nothing happened for a day.

    Who was killed has left more than locks in one: that stays, since a transient domain may come
    back with the same images. A run that can't do this goes on.
    """
    with suppress(OSError, NbdbackupError):
        before = now.timestamp() - IDLE_SECONDS
        places = [
            each for each in runtime_dir.iterdir() if is_uuid(each.name) and _is_idle(each, before)
        ]
        known = {uuid for _, uuid in connection.domains()} if places else set()
        for place in places[:MAX_GONE]:
            if place.name not in known:
                _remove_idle(runtime_dir, place)


def _is_idle(directory: Path, before: float) -> bool:
    if {each.name for each in directory.iterdir()} - {rundir.LOCK, rundir.GUARDS}:
        return False
    files = (directory, directory / rundir.LOCK)
    newest = max(each.stat().st_mtime for each in files if each.exists())
    return newest < before


def _remove_idle(runtime_dir: Path, directory: Path) -> None:
    """Remove it unless somebody is there, with the directory of its QEMU's socket."""
    with suppress(OSError, BusyError):
        lock = directory / rundir.LOCK
        with durable.Lock(lock, owner=f"{OWNER}{directory.name}"):
            if _is_guarded(directory):
                return
            with suppress(FileNotFoundError):
                rundir.socket_dir(runtime_dir, directory.name).rmdir()
            (directory / rundir.GUARDS).unlink(missing_ok=True)
            # one who opens it now fails once; nobody runs for a domain that libvirt does not know
            lock.unlink()
            directory.rmdir()


def _is_guarded(directory: Path) -> bool:
    return durable.is_locked(directory / rundir.GUARDS, shared=False)


def note(runtime_dir: Path, intent: Intent, set_path: Path) -> None:
    """Note a run before it makes anything at libvirt."""
    path = rundir.domain_dir(runtime_dir, intent.uuid) / rundir.NOTE
    document = {"set": os.fspath(set_path), "intent": documents.parse_json(intent.pack())}
    with durable.translate_os_errors("write", path):
        durable.write_atomic(path, json.dumps(document).encode(), 0o600)


def forget(runtime_dir: Path, uuid: str) -> None:
    """Remove the note of a run that is over."""
    with suppress(OSError):
        (rundir.domain_dir(runtime_dir, uuid) / rundir.NOTE).unlink(missing_ok=True)


def dead_run(runtime_dir: Path, uuid: str) -> Intent | None:
    """The intent of a run of the domain that died before its point was published, if noted.

    Without the domain's lock it may be that of a run that lives.
    """
    directory = rundir.domain_dir(runtime_dir, uuid)
    try:
        document = documents.parse_json((directory / rundir.NOTE).read_bytes())
        intent = Intent.parse(json.dumps(document["intent"]).encode())
        set_path = Path(document["set"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, FormatError) as err:
        log.warning("the note of a dead run in %s can't be read: %s", directory, err)
        return None
    try:
        if not (set_path / layout.LOCK).exists():
            log.warning("the set of an earlier run, %s, is not there now", set_path)
            return None
        names = generation.stable(set_path, generation.names)
    except (OSError, NbdbackupError) as err:
        # whether the point exists can't be seen: its checkpoint may be the base of a chain
        log.warning("the set of an earlier run can't be read: %s", err)
        return None
    committed = any(layout.names_point(name, intent.point_id) for name in names)
    return None if committed else intent
