"""What a check is asked, and what its parts are given to look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nbdbackupd import rundir
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.ops.domain.images import ALONE, Sharing, why_elsewhere
from nbdbackupd.ops.domain.locks import holder
from nbdbackupd.ops.domain.qemu import Qemu
from nbdbackupd.ops.domain.survey import Looked
from nbdbackupd.repo import layout
from nbdbackupd.source.qemu_guest import QemuGuest
from nbdbackupd.virt.domain import Domain

RAW = "raw"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRequest:
    """Which domain, and where its backups would work; all paths absolute.

    ``directory`` is the set, if one was named. ``scratch_reserve`` is in bytes, ``freeze_policy``
    the setting of that name, ``now`` the moment of the check. ``is_proven``: a run proves by itself
    that the repository's storage is mounted, or that none is meant.
    """

    domain: str
    directory: Path | None
    runtime_dir: Path
    scratch_dir: Path
    scratch_reserve: int
    state_dir: Path
    now: datetime
    freeze_policy: FreezePolicy = FreezePolicy.AUTO
    sharing: Sharing = ALONE
    is_proven: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """Who is examined, and what was seen of the disks; shared by all parts of one check.

    ``changed`` tells the bytes since a checkpoint, for each disk of which they are known.
    """

    request: CheckRequest
    name: str
    uuid: str
    looked: Looked
    changed: Callable[[str], Mapping[str, int]]

    @property
    def own_dir(self) -> Path:
        """The domain's directory for locks and notes; may be missing."""
        return rundir.domain_dir(self.request.runtime_dir, self.uuid)

    @property
    def socket_dir(self) -> Path:
        """The directory of QEMU's socket; may be missing."""
        return rundir.socket_dir(self.request.runtime_dir, self.uuid)

    def saved(self, head: RestorePoint | None = None) -> tuple[str, ...]:
        """The disks that a backup takes; raw ones where the last point ``head`` holds them."""
        before = {disk.target for disk in head.disks} if head is not None else set()
        disks = (self.looked.definition.disk(target) for target in self.looked.states)
        return tuple(
            disk.target
            for disk in disks
            if disk.target in before or (disk.format != RAW and not disk.transient)
        )

    def domain_holder(self) -> str:
        """Who works on the domain now, or nothing."""
        return holder(self.own_dir / rundir.LOCK)

    def set_holder(self) -> str:
        """Who works on the set now, or nothing."""
        directory = self.request.directory
        return holder(directory / layout.LOCK) if directory is not None else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfLibvirt(Patient):
    """A domain of libvirt."""

    domain: Domain

    @property
    def elsewhere(self) -> str:
        """Why the domain is another host's now; empty if it is not."""
        return why_elsewhere(self.domain, self.request.sharing)


@dataclass(frozen=True, kw_only=True, slots=True)
class OfQemu(Patient):
    """A QEMU without libvirt, and its guest."""

    qemu: Qemu
    guest: QemuGuest


def existing(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
