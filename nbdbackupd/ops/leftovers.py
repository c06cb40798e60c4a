"""What dead runs left behind, in the set, at libvirt and under the runtime directory.

A run notes what it is about to do in two places before it does it: in its draft (so that the next
run into the same set knows) and under the domain's runtime directory (so that the next run of the
domain knows, whatever its set). A checkpoint that such a note names, and that no committed point
made, is removed: it would only collect changes that nobody will ever ask for. Deleting it loses
nothing, since the older bitmaps kept recording (libvirt 9.0, measured).
"""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import FormatError, NbdbackupError
from nbdbackupd.model.chain import BackupSet
from nbdbackupd.repo import layout
from nbdbackupd.repo.draft import Intent
from nbdbackupd.repo.repository import Repository
from nbdbackupd.source import sweep as source_sweep
from nbdbackupd.virt import checkpoints
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
CHECKPOINT_PREFIX: Final = "nbdbackup"
NOTE: Final = "run.json"
LOCK: Final = "lock"
SOCKET_DIR: Final = "nbd"


def domain_dir(runtime_dir: Path, uuid: str) -> Path:
    """The domain's directory for locks and notes: ``<runtime>/<uuid>``.

    By UUID, because a name may be long or hostile and a socket's path is bounded by 108 bytes.
    """
    return runtime_dir / uuid


def socket_dir(runtime_dir: Path, uuid: str) -> Path:
    """The directory that QEMU gets for its socket, apart from what only we may touch."""
    return domain_dir(runtime_dir, uuid) / SOCKET_DIR


def prepare_domain_dir(runtime_dir: Path, uuid: str) -> Path:
    """Make the domain's directory; QEMU's user may pass through it, not write to it."""
    path = domain_dir(runtime_dir, uuid)
    with durable.translate_os_errors("create", path):
        durable.make_directory(runtime_dir, 0o755)
        durable.make_directory(path, 0o711)
    return path


def sweep(domain: Domain, repository: Repository, runtime_dir: Path, scratch_dir: Path) -> None:
    """Remove what dead runs of this domain left; both locks are held.

    Raises the errors of libvirt and of the set: a run that can't clean up must not go on.
    """
    swept = source_sweep.sweep(domain, socket_dir(runtime_dir, domain.uuid), scratch_dir)
    if swept:
        log.info("removed what a dead run left: %s", swept)
    if not domain.is_active():
        # Checkpoints of an inactive domain lose only their metadata, see drop_checkpoint.
        return
    dead = [each for each in repository.dead_runs() if each.uuid == domain.uuid]
    note = _read_note(domain_dir(runtime_dir, domain.uuid))
    if note is not None:
        dead.append(note)
    for intent in dead:
        if intent.checkpoint:
            drop_checkpoint(domain, intent.checkpoint)
    repository.sweep()
    forget(runtime_dir, domain.uuid)


def checkpoint_prefix(chain: str) -> str:
    """How the names of a chain's checkpoints begin.

    They carry the end of the chain's id, so that two chains of one domain can be told apart.
    """
    return f"{CHECKPOINT_PREFIX}.{chain.rpartition('-')[2]}."


def reclaim(domain: Domain, known: BackupSet) -> None:
    """Delete the checkpoints of the set's chain that are not the base of its next run.

    They stay where a run died, or lost libvirt, between its commit and their deletion. Raises
    DomainError if libvirt does not list them.
    """
    if known.head is None or known.full is None or not domain.is_active():
        return
    prefix = checkpoint_prefix(known.full.chain)
    for name in checkpoints.names(domain):
        if name.startswith(prefix) and name != known.head.checkpoint:
            drop_checkpoint(domain, name)


def note(runtime_dir: Path, intent: Intent, set_path: Path) -> None:
    """Note a run before it makes anything at libvirt."""
    path = domain_dir(runtime_dir, intent.uuid) / NOTE
    document = {"set": os.fspath(set_path), "intent": json.loads(intent.pack())}
    with durable.translate_os_errors("write", path):
        durable.write_atomic(path, json.dumps(document).encode(), 0o600)


def forget(runtime_dir: Path, uuid: str) -> None:
    """Remove the note of a run that is over."""
    with suppress(OSError):
        (domain_dir(runtime_dir, uuid) / NOTE).unlink(missing_ok=True)


def _read_note(directory: Path) -> Intent | None:
    """The intent of a run that died before its point was published, if there is one."""
    try:
        document = json.loads((directory / NOTE).read_bytes())
        intent = Intent.parse(json.dumps(document["intent"]).encode())
        points = Path(document["set"]) / layout.POINTS
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, FormatError) as err:
        log.warning("the note of a dead run in %s can't be read: %s", directory, err)
        return None
    try:
        if not (points.parent / layout.LOCK).exists():
            log.warning("the set of an earlier run, %s, is not there now", points.parent)
            return None
        names = [each.name for each in points.iterdir()]
    except FileNotFoundError:
        return intent
    except OSError as err:
        # whether the point exists can't be seen: its checkpoint may be the base of a chain
        log.warning("the set of an earlier run can't be read: %s", err)
        return None
    committed = any(layout.names_point(name, intent.point_id) for name in names)
    return None if committed else intent


def drop_checkpoint(domain: Domain, name: str) -> bool:
    """Delete a checkpoint that nothing needs any more; False if it stays.

    Of an inactive domain libvirt deletes only the metadata: the bitmap would stay in the image,
    known to nobody. So that waits for the next run.
    """
    try:
        if not domain.is_active():
            log.info("checkpoint %s stays until the domain runs again", name)
            return False
        if checkpoints.delete(domain, name) is not checkpoints.Deleted.ABSENT:
            log.info("checkpoint %s deleted", name)
    except NbdbackupError as err:
        log.warning("checkpoint %s stays: %s", name, err)
        return False
    return True
