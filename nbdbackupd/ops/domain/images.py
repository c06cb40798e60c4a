"""The images of a domain that is off: the proof that nobody has them, and the hold on them.

Before a run writes a first byte into an image it proves that no other host may have it open (ADR
30). Files have QEMU's lock. Block devices have none between hosts: there the hosts' own notes in
a state directory that they share are the proof, or that no other host can reach the device.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd.errors import (
    BusyError,
    DomainError,
    ElsewhereError,
    NbdbackupError,
    RepositoryError,
)
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.whereabouts import Note, Phase, Standing, standing
from nbdbackupd.ops.domain.survey import DiskFilter
from nbdbackupd.qemu import image, storage_daemon
from nbdbackupd.source import hooked, kept, lease, reach
from nbdbackupd.source.hosts import Hosts
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt import jobs
from nbdbackupd.virt.domain import Domain, Ending

log = logging.getLogger(__name__)
END_SECONDS: Final = 35.0
END_POLL_SECONDS: Final = 0.1
AUTO = "auto"
LOCAL = "local"
SHARED = "shared"
QCOW2 = "qcow2"
CURE = (
    "set checkpoint_directory to a directory that all hosts share, or block_devices to local if "
    "no other host can open it (nbdbackup.yaml(5))"
)


ALL: Final = DiskFilter()
"""All disks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """What the configuration says of other hosts.

    ``state_dir`` is one that was set, so that others may share it; None: the host's own default.
    ``devices``: whether other hosts may open the domain's block devices, ``local``, ``shared``, or
    ``auto``: they may if there is a ``state_dir``, or unless the kernel shows that they can't.
    ``disks``: the disks that matter.
    """

    state_dir: Path | None = None
    devices: str = AUTO
    disks: DiskFilter = ALL

    def hosts(self, domain: Domain) -> Hosts | None:
        """The hosts that share the state of a domain; None: nobody tells of another one."""
        return None if self.state_dir is None else Hosts(self.state_dir, domain.name, domain.uuid)

    def standing(self, domain: Domain) -> Standing:
        """What the hosts have noted of a domain that is off here. Raises RepositoryError."""
        hosts = self.hosts(domain)
        return Standing() if hosts is None else standing(hosts.notes(), hosts.here.id)


ALONE: Final = Sharing()
"""No other host is known of."""


def await_end(domain: Domain, cancelled: Callable[[], None]) -> None:
    """Wait until a domain is off whose guest has shut down, unless a job keeps it.

    libvirt 11.3 takes 30 s to see it if a backup job ran (W-12). Raises BusyError if it takes
    longer.
    """
    deadline = time.monotonic() + END_SECONDS
    while domain.is_active() and domain.is_shut_down() and jobs.active_job(domain) is None:
        if time.monotonic() > deadline:
            raise BusyError(
                f"the guest of domain {domain.name} has shut down, and libvirt has not seen its "
                f"QEMU end within {END_SECONDS:g} s: try later",
                domain=domain.name,
            )
        cancelled()
        time.sleep(END_POLL_SECONDS)


@contextmanager
def images_of(
    domain: Domain,
    runtime_dir: Path,
    run_id: str,
    cancelled: Callable[[], None],
    sharing: Sharing = ALONE,
) -> Iterator[Lease | None]:
    """A lease on the images of a domain that is off; None if it runs. Its lock is held.

    A domain that is about to start is waited for, so ask for its state only afterwards. Images
    that are not as the guest left them are told of. Nothing has been written when this raises
    ElsewhereError: another host has the domain, or may; BusyError: it is being started there or
    backed up, or an image is in use; the errors of ``lease.hold``; and DomainError for changed
    images of a domain that libvirt no longer knows. Of images that are not proven to be closed
    the lease has a ``doubt``; where libvirt does not call our hook it says so (``unhooked``).
    """
    await_end(domain, cancelled)
    if domain.is_active():
        note_running(domain, sharing)
        yield None
        return
    with ExitStack() as stack:
        held: Lease | None = stack.enter_context(
            lease.hold(
                runtime_dir,
                domain=domain.name,
                uuid=domain.uuid,
                run_id=run_id,
                is_active=domain.is_active,
                cancelled=cancelled,
            )
        )
        if held is None or domain.is_active():
            # QEMU has them; nobody must be told that we do
            stack.close()
            held = None
        else:
            unheard = _tell_hosts(domain, sharing, runtime_dir, run_id, stack)
            found = prove(domain, sharing)
            held.doubt = _Doubts(sharing, found, unheard)
            hook = hooked.look(domain.connection, runtime_dir)
            held.unhooked, held.is_read_only = hook.why, hook.is_installed
            if hook.why:
                log.info("libvirt does not tell us of a start: %s", hook.why)
            _tell_changes(domain, runtime_dir)
            stack.callback(kept.renew, runtime_dir, domain.name, domain.uuid)
        yield held


def prove(domain: Domain, sharing: Sharing) -> Standing:
    """What the hosts have noted of a domain that is off, if none of them has its images.

    Of disks that are not wished for, of shareable ones and of those that are only read another
    domain may have the image, which is no sign of this one. Changes nothing. Raises ElsewhereError,
    BusyError, RepositoryError, and DomainError if libvirt
    can't be asked.
    """
    found = sharing.standing(domain)
    if found.holder is not None:
        raise _elsewhere(domain, found.holder)
    if domain.ending() is Ending.MIGRATED and not found.is_closed:
        raise ElsewhereError(
            f"domain {domain.name} was migrated away: back it up on the host where it is now, or "
            f"start it here once, if no host has it any more",
            domain=domain.name,
        )
    for disk in domain.definition().disks:
        is_own = not (disk.shareable or disk.readonly)
        if disk.device == "disk" and disk.layers and is_own and sharing.disks.wants(disk.target):
            _prove_unlocked(disk)
    return found


def prove_start(domain: Domain, sharing: Sharing) -> None:
    """Prove that a domain that is off may be started here: also paused it writes to its images.

    Raises DomainError if another host may have one of them, and as ``prove``.
    """
    doubt = _Doubts(sharing, prove(domain, sharing), "")
    for disk in domain.definition().disks:
        why = doubt(disk.layers[0].path) if disk.device == "disk" and disk.layers else ""
        if why:
            raise DomainError(
                f"domain {domain.name} is not started, disk {disk.target}: {why}",
                domain=domain.name,
            )


def why_elsewhere(domain: Domain, sharing: Sharing) -> str:
    """Why a domain is not this host's to look into now; empty if it is, or runs here.

    Raises DomainError if libvirt can't be asked.
    """
    if domain.is_active():
        return ""
    try:
        prove(domain, sharing)
    except (ElsewhereError, BusyError, RepositoryError) as err:
        return err.message
    return ""


def _elsewhere(domain: Domain, note: Note) -> NbdbackupError:
    name = domain.name
    if note.phase is Phase.STARTING:
        return BusyError(f"domain {name} is being started on host {note.name}", domain=name)
    if note.phase is Phase.ENDED:
        what = (
            f"domain {name} was migrated away from host {note.name}, and no host noted its coming"
        )
    else:
        what = f"domain {name} runs on host {note.name}, as that host has noted"
    return ElsewhereError(f"{what}: back it up there", domain=name, host=note.name)


def _prove_unlocked(disk: domain_model.Disk) -> None:
    """By QEMU's lock: a QEMU on this host, or on any that shares the file system and its locks."""
    top = disk.layers[0]
    if top.format == QCOW2 and top.path.startswith("/"):
        why = image.why_locked(Path(top.path), format=QCOW2)
        if why is not None:
            raise storage_daemon.translate(why, top.path)


@dataclass(frozen=True, slots=True)
class _Doubts:
    """Says of an image, by its path, why another host may have it open; nothing if none can.

    ``unheard``: why the other hosts were not told that this one reads.
    """

    sharing: Sharing
    standing: Standing
    unheard: str

    def __call__(self, path: str) -> str:
        if self.sharing.devices == LOCAL or not Path(path).is_block_device():
            return ""
        if self.sharing.state_dir is None:
            if self.sharing.devices != SHARED and reach.is_own(path):
                return ""
            return f"no host tells another whether it has {path} open: {CURE}"
        if self.unheard:
            return f"other hosts can't be told that {path} is read: {self.unheard}"
        if not self.standing.is_closed:
            return (
                f"no host has noted where its domain last ran, so another one may have {path} "
                f"open: start it once where libvirt calls our hook"
            )
        return ""


def _tell_hosts(
    domain: Domain, sharing: Sharing, runtime_dir: Path, run_id: str, stack: ExitStack
) -> str:
    """Have the other hosts know that this one reads, and ours let go when one starts the domain.

    Returns why that can't be done. Raises BusyError while a run on another host reads.
    """
    hosts = sharing.hosts(domain)
    if hosts is None:
        return ""

    def wanted(note: Note) -> None:
        log.info("host %s is about to start domain %s", note.name, domain.name)
        with suppress(NbdbackupError, OSError):
            lease.give_way(runtime_dir, domain.uuid)

    try:
        stack.enter_context(hosts.reading(run_id, wanted))
        own = hosts.own()
        if own is not None and own.phase is Phase.RUNNING:
            # its end was not seen, as when the host lost its power
            hosts.ended(own.reason or "unseen")
    except BusyError:
        raise
    except NbdbackupError as err:
        log.info("other hosts can't be told of this run: %s", err.message)
        return err.message
    return ""


def gone_to(name: str, sharing: Sharing) -> str:
    """On which host a domain is, given by its name, that this one's libvirt does not know.

    Empty if no other host has noted it. Raises RepositoryError.
    """
    if sharing.state_dir is None:
        return ""
    for hosts in Hosts.all_of(sharing.state_dir, name):
        found = standing(hosts.notes(), hosts.here.id)
        note = found.holder or found.last
        if note is not None and note.host != hosts.here.id and note.domain == name:
            return f"no domain {name} is defined here; it last ran on host {note.name}"
    return ""


def note_running(domain: Domain, sharing: Sharing) -> None:
    """Tell the other hosts that the domain runs here, unless the hook has told them."""
    hosts = sharing.hosts(domain)
    if hosts is None:
        return
    try:
        hosts.started()
    except NbdbackupError as err:
        log.info("other hosts can't be told that the domain runs here: %s", err.message)


def note_saved(domain: Domain, sharing: Sharing, point: str) -> None:
    """Tell the other hosts that a point holds what the domain's last end has left."""
    hosts = sharing.hosts(domain)
    if hosts is None:
        return
    try:
        found = sharing.standing(domain)
        if found.last is not None:
            hosts.saved(point, found.last.number)
    except NbdbackupError as err:
        log.info("other hosts can't be told of the point: %s", err.message)


def _tell_changes(domain: Domain, runtime_dir: Path) -> None:
    """Of images that somebody changed since the guest's end, as far as libvirt's hook saw that.

    Where libvirt knows the domain, what the bitmaps say is right (ADR 12). One that it does not
    know may have been started on another host: nothing else would keep us from its images.
    """
    changes = kept.describe(kept.changed(runtime_dir, domain.name, domain.uuid))
    if not changes:
        return
    if domain.is_gone():
        raise DomainError(
            f"domain {domain.name} has ended and libvirt no longer knows it, but since then "
            f"{changes}: it may run on another host, so start it here or save it there",
            domain=domain.name,
        )
    events.emit(log, events.IMAGES_CHANGED, reason=changes)
