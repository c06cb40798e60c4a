"""``restore --pool``: disks as new volumes of a storage pool of libvirt on this host.

A volume of a directory carries ``.incomplete`` in its name until it is complete, as every image
does; one that is a device has no beginning until then. What a restore that fails has made is
removed.
"""

import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import NbdbackupError, NotSupportedError, RepositoryError
from nbdbackupd.model.chain import DiskPoint, RestorePoint
from nbdbackupd.ops.restore.options import ImageForm
from nbdbackupd.ops.restore.output_names import INCOMPLETE
from nbdbackupd.ops.restore.outputs import Output
from nbdbackupd.ops.restore.plan import Placement, about_disk, names_of
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.ops.restore.sites import BlockDevice, Site, Work, image_at
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.pools import NewVolume, Pool

log = logging.getLogger(__name__)
NODE_SECONDS: Final = 10.0
NODE_POLL_SECONDS: Final = 0.05
NOT_OF_LVM: Final = re.compile(r"[^A-Za-z0-9+_.-]")


class PoolPlacement(Placement):
    """New volumes in one pool."""

    warnings = ()

    def __init__(self, connection: Connection, name: str) -> None:
        """The connection stays the caller's."""
        self._connection = connection
        self._name = name
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The pool, looked up once."""
        self._pool = self._pool or Pool(self._connection, self._name)
        return self._pool

    def begin(
        self,
        _point: RestorePoint,
        _disks: tuple[DiskPoint, ...],
        stack: ExitStack,
    ) -> None:
        """Find the pool; when the run is over, have libvirt see what it holds.

        Raises DomainError, NotSupportedError.
        """
        if not Path(self.pool.directory).is_dir() and not self.pool.on_devices:
            raise NotSupportedError(
                f"storage pool {self._name} is not on this host: {self.pool.directory} is not there"
            )
        stack.callback(self._refresh)

    def format(self, _disk: DiskPoint) -> str:
        """A device holds the disk itself."""
        return "raw" if self.pool.on_devices else ""

    def place(
        self, point: RestorePoint, made: Mapping[DiskPoint, ImageForm], stack: ExitStack
    ) -> Mapping[str, Site]:
        """A volume for each disk, named as an image in a directory would be."""
        names = names_of(point, made)
        found: dict[str, Site] = {}
        for disk in made:
            name = names[disk.target]
            volume: _Volume
            if self.pool.on_devices:
                name = NOT_OF_LVM.sub("_", name)
                about = about_disk(point, disk.target)
                volume = _DeviceVolume(self.pool, name, disk.size, about, stack)
            else:
                volume = _FileVolume(self.pool, name)
            stack.callback(volume.abandon)
            found[disk.target] = volume
        return found

    def files(
        self,
        _directory: Path,
        _point: RestorePoint,
    ) -> tuple[FileCopy, ...]:
        """A pool holds disks only."""
        return ()

    def check(self, *, is_overwritten: bool = False) -> None:
        """Nothing but the user ends it."""

    def adopt(self) -> None:
        """Nothing: no domain stands on the volumes."""

    def settle(self, *, is_overwritten: bool) -> None:
        """New volumes replace nothing that is in use."""

    def _refresh(self) -> None:
        try:
            self.pool.refresh()
        except NbdbackupError as err:
            log.warning("%s: 'virsh pool-refresh %s' once it works", err, self._name)


class _Volume(Site):
    """A volume that libvirt makes."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool = pool
        self._volume = name
        self._is_made = False
        self._is_named = False
        self.final = Path(pool.directory, name)

    def check(self, *, force: bool) -> None:
        """Refuse to replace a volume. Raises RepositoryError, DomainError."""
        if not self._is_made and not force and self._pool.has(self.final.name):
            raise RepositoryError(
                f"volume {self.final.name} exists in storage pool {self._pool.name}: remove it "
                f"with 'virsh vol-delete', or choose another pool"
            )

    def abandon(self) -> None:
        """Remove what was made unless it was named; what is in the way costs a warning."""
        if not self._is_made or self._is_named:
            return
        try:
            self._pool.delete(self._volume)
        except NbdbackupError as err:
            log.warning("volume %s of a restore that failed stays: %s", self._volume, err)

    def _make(self, work: Work) -> Path:
        if self._pool.has(self._volume):
            # of a restore that was killed, or by the user's wish
            self._pool.delete(self._volume)
        self._is_made = True
        volume = NewVolume(name=self._volume, size=work.size, format=work.options.format)
        return Path(self._pool.create(volume))


class _FileVolume(_Volume):
    """A file in the directory of a pool."""

    def __init__(self, pool: Pool, name: str) -> None:
        super().__init__(pool, f"{name}{INCOMPLETE}")
        self.final = Path(pool.directory, name)

    @property
    def incomplete(self) -> Path:
        """The volume that libvirt made."""
        return Path(self._pool.directory, self._volume)

    @contextmanager
    def open(self, work: Work) -> Iterator[Output]:
        """A fresh image in place of libvirt's, with its owner and mode."""
        like = self._make(work).stat()
        with image_at(self.incomplete, work) as output:
            yield output
        os.chown(self.incomplete, like.st_uid, like.st_gid)
        durable.set_mode(self.incomplete, stat.S_IMODE(like.st_mode))

    def name(self) -> None:
        """Rename the file; libvirt sees it when the pool is refreshed."""
        durable.rename(self.incomplete, self.final)
        self._is_named = True


class _DeviceVolume(_Volume):
    """A block device of a pool."""

    is_device = True

    def __init__(self, pool: Pool, name: str, size: int, about: str, stack: ExitStack) -> None:
        super().__init__(pool, name)
        self._size = size
        self._about = about
        self._stack = stack
        self._device: BlockDevice | None = None

    @contextmanager
    def open(self, work: Work) -> Iterator[Output]:
        """The device, as soon as its node is there."""
        path = self._make(work)
        deadline = time.monotonic() + NODE_SECONDS
        while not path.is_block_device():
            work.cancelled()
            if time.monotonic() > deadline:
                raise RepositoryError(f"volume {path} was made, but its device does not appear")
            time.sleep(NODE_POLL_SECONDS)
        self._device = BlockDevice(path, self._size, self._about, self._stack)
        self._device.check(force=True)
        with self._device.open(work) as output:
            yield output

    def name(self) -> None:
        """Write the beginning of the device."""
        if self._device is not None:
            self._device.name()
        self._is_named = True
