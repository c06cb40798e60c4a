"""``restore --in-place``: onto the images of the very domain, which is off and stays off."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from nbdbackupd import durable, rundir
from nbdbackupd.errors import (
    BusyError,
    DomainError,
    DomainNotFoundError,
    NbdbackupError,
    NotSupportedError,
    SourceError,
)
from nbdbackupd.model import definition as model
from nbdbackupd.model.chain import DiskPoint, RestorePoint
from nbdbackupd.model.domain import Disk
from nbdbackupd.model.hostpaths import PathUse
from nbdbackupd.ops.domain.images import Sharing, images_of
from nbdbackupd.ops.domain.survey import Looked, look
from nbdbackupd.ops.restore import define_paths
from nbdbackupd.ops.restore.options import ImageForm
from nbdbackupd.ops.restore.plan import Placement, about_disk
from nbdbackupd.ops.restore.replaced import ReplacedImage
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.ops.restore.sites import BlockDevice, DataFile, Site, room
from nbdbackupd.source import untouched
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt import definition
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain, Ending

log = logging.getLogger(__name__)
FORMATS = ("qcow2", "raw")
NVRAM_ROLE = "nvram"


class InPlace(Placement):
    """The images of the domain that a point is of."""

    def __init__(
        self,
        connection: Connection,
        *,
        runtime_dir: Path,
        run_id: str,
        force: bool,
        cancelled: Callable[[], None],
        sharing: Callable[[str], Sharing],
    ) -> None:
        """The connection stays the caller's. ``force``: snapshots of the domain may be lost.

        ``sharing`` is what is known of other hosts for a domain, given by its name.
        """
        self._sharing = sharing
        self._connection = connection
        self._runtime_dir = runtime_dir
        self._run_id = run_id
        self._force = force
        self._cancelled = cancelled
        self._disks: Mapping[str, Disk] = {}
        self._domain: Domain | None = None
        self._below: Mapping[str, str] = {}
        self._data: dict[str, DataFile] = {}
        self._trouble: list[NbdbackupError] = []
        self.warnings: tuple[str, ...] = ()

    def begin(self, point: RestorePoint, disks: tuple[DiskPoint, ...], stack: ExitStack) -> None:
        """Find the domain, lock it, take a lease on its images, and refuse what can't be.

        Raises DomainNotFoundError, DomainError, NotSupportedError, BusyError, GaveWayError.
        """
        domain = self._domain = self._find(point)
        directory = rundir.make_domain_dir(self._runtime_dir, domain.uuid)
        stack.enter_context(
            durable.Lock(directory / rundir.LOCK, owner=f"restore of {domain.name} in place")
        )
        held = stack.enter_context(
            images_of(
                domain, self._runtime_dir, self._run_id, self._cancelled, self._sharing(domain.name)
            )
        )
        if held is None:
            raise DomainError(
                f"domain {domain.name} runs: shut it down first ('virsh shutdown'), or restore "
                f"to another place",
                domain=domain.name,
            )
        self._check_domain(domain)
        looked = look(domain)
        self._disks = {
            disk.target: _usable(domain, disk.target, looked, force=self._force) for disk in disks
        }
        self._data = {
            target: _data_file(domain, disk, looked)
            for target, disk in self._disks.items()
            if _data_path(disk, looked)
        }
        self._refuse_shared(domain)
        self._refuse_doubts(domain, held)
        self._below = {
            disk.target: below
            for disk in disks
            if (below := _below(self._disks[disk.target], looked))
        }
        self.warnings = self._told(domain, point, looked)
        stack.enter_context(untouched.watch(domain, self._trouble.append))

    def _told(self, domain: Domain, point: RestorePoint, looked: Looked) -> tuple[str, ...]:
        """What stays as it is, and what will not."""
        left = [
            each.target
            for each in looked.definition.disks
            if each.device == "disk" and all(disk.target != each.target for disk in point.disks)
        ]
        warnings = [
            f"disk {target} stood on {below}, and will not any more: the restored image holds all"
            for target, below in self._below.items()
        ]
        if left:
            warnings.insert(
                0,
                f"restore point {point.id} does not hold all disks of domain {domain.name}: "
                f"{', '.join(left)} stay as they are",
            )
        return tuple(warnings)

    def format(self, disk: DiskPoint) -> str:
        """As the domain's definition says."""
        return self._disks[disk.target].format

    def place(
        self, point: RestorePoint, made: Mapping[DiskPoint, ImageForm], stack: ExitStack
    ) -> Mapping[str, Site]:
        """The image or device of each disk."""
        found: dict[str, Site] = {}
        for disk in made:
            path = Path(self._disks[disk.target].source)
            if path.is_block_device():
                about = about_disk(point, disk.target)
                least = room(disk.size, made[disk].format)
                found[disk.target] = BlockDevice(path, least, about, stack)
            else:
                data = self._data.get(disk.target)
                found[disk.target] = ReplacedImage(path, disk.target, stack, data)
        return found

    def files(self, directory: Path, point: RestorePoint) -> tuple[FileCopy, ...]:
        """The firmware's variables, unless disks of the point are left out.

        Keys that a guest keeps in its TPM may be bound to what they say (BitLocker).
        """
        if self._domain is None or {disk.target for disk in point.disks} - self._disks.keys():
            return ()
        final = Path(self._domain.definition().nvram)
        if not final.is_absolute() or not final.parent.is_dir():
            return ()
        return tuple(
            FileCopy(
                stored=stored,
                source=directory / stored.name,
                final=final.resolve(),
                replaces=True,
            )
            for stored in point.files
            if stored.role == NVRAM_ROLE
        )

    def check(self, *, is_overwritten: bool = False) -> None:
        """Raise GaveWayError if the domain was started meanwhile, SourceError if too late."""
        if self._trouble and is_overwritten and self._domain is not None:
            raise _was_started(SourceError, self._domain)
        if self._trouble:
            raise self._trouble[0]

    def adopt(self) -> None:
        """Have the domain's definition name no images below those that are whole now.

        Before the old images are set aside: those say by themselves what they stand on. Raises
        DomainError.
        """
        domain = self._domain
        layered = [target for target in self._below if len(self._disks[target].layers) > 1]
        if domain is None or not layered:
            return
        xml = domain.xml(inactive=True, secure=True)
        definition.redefine(self._connection, model.without_layers(xml, layered))
        log.info("definition of %s: nothing below the images of %s", domain.name, layered)

    def settle(self, *, is_overwritten: bool) -> None:
        """Raise BusyError if the domain is active now, SourceError if a disk is overwritten."""
        if self._domain is not None and self._domain.is_active():
            raise _was_started(SourceError if is_overwritten else BusyError, self._domain)

    def _find(self, point: RestorePoint) -> Domain:
        try:
            return Domain.find(self._connection, point.uuid or point.domain)
        except DomainNotFoundError as err:
            raise DomainNotFoundError(
                f"domain {point.domain} (UUID {point.uuid or 'not known'}) is not known at "
                f"{self._connection.uri}: restore it to a directory (-o DIR --define)",
                domain=point.domain,
            ) from err

    def _check_domain(self, domain: Domain) -> None:
        ending = domain.ending()
        if ending is Ending.SAVED:
            raise DomainError(
                f"domain {domain.name} has a saved state, which would run on with other disks: "
                f"start it and shut it down, or drop it ('virsh managedsave-remove')",
                domain=domain.name,
            )
        if ending is Ending.MIGRATED:
            raise DomainError(
                f"domain {domain.name} was migrated away: restore it on the host where it is now",
                domain=domain.name,
            )
        names = domain.snapshot_names()
        if names and not self._force:
            raise DomainError(
                f"domain {domain.name} has snapshots ({', '.join(names[:3])}), which would be "
                f"lost: delete them first, or give --force",
                domain=domain.name,
            )

    def _refuse_doubts(self, domain: Domain, held: Lease) -> None:
        for target, disk in self._disks.items():
            why = held.doubt(disk.source)
            if why and not self._force:
                raise DomainError(
                    f"disk {target} of domain {domain.name}: {why}; or, if you know that none has, "
                    f"give --force",
                    domain=domain.name,
                    disk=target,
                )

    def _refuse_shared(self, domain: Domain) -> None:
        paths = [(target, disk.source) for target, disk in self._disks.items()]
        paths += [(target, str(data.final)) for target, data in self._data.items()]
        uses = tuple(PathUse(path=path, what=f"disk {target}") for target, path in paths)
        others = definition.paths_in_use(self._connection)
        others.pop(domain.name, None)
        found = define_paths.shared(uses, others)
        if found:
            each = found[0]
            raise DomainError(
                f"{each.use.what} of domain {domain.name}, {each.use.path}, is {each.what} of "
                f"domain {each.domain}, too: it would lose what it stands on",
                domain=domain.name,
            )


def _below(disk: Disk, looked: Looked) -> str:
    """The image that a disk's own stands on, as the definition or the image says; or nothing."""
    chain = looked.chains.get(disk.target, ())
    if len(chain) > 1:
        return chain[1].filename
    return disk.layers[1].path if len(disk.layers) > 1 else ""


def _data_path(disk: Disk, looked: Looked) -> str:
    """The file that holds the data of a disk's image, as the image or the definition says."""
    chain = looked.chains.get(disk.target, ())
    return (chain[0].data_file if chain else "") or disk.data_file


def _data_file(domain: Domain, disk: Disk, looked: Looked) -> DataFile:
    """The data file of a disk that has one, to be replaced with the image.

    Only what this host says counts: a path from a set would be anybody's. Raises NotSupportedError.
    """
    chain = looked.chains.get(disk.target, ())
    name = _data_path(disk, looked)
    path = Path(name)
    if not chain:
        why = "its image is gone, which would tell what it is"
    elif not path.is_absolute():
        why = "it has no absolute path"
    elif disk.data_file and Path(disk.data_file).resolve() != path.resolve():
        why = f"the domain's definition names another one, {disk.data_file}"
    elif not path.is_file():
        why = "it is no file"
    else:
        return DataFile(final=path.resolve(), name=name, raw=chain[0].data_file_raw)
    raise NotSupportedError(
        f"disk {disk.target} of domain {domain.name} has its data in {name} beside the image "
        f"(data_file), and can't be restored in place: {why}; restore it to another place",
        domain=domain.name,
        disk=disk.target,
    )


def _usable(domain: Domain, target: str, looked: Looked, *, force: bool) -> Disk:
    """The domain's disk of that name, if its image can be replaced.

    Raises DomainError, NotSupportedError.
    """
    disk = looked.definition.disk(target)
    chain = looked.chains.get(target, ())
    why = ""
    if disk.device != "disk" or disk.type not in ("file", "block") or not disk.source:
        why = "has no image on this host"
    elif disk.format not in FORMATS:
        why = f"has format {disk.format}"
    elif chain and chain[0].encrypted:
        why = "is encrypted, and would come back in plain"
    elif (below := _below(disk, looked)) and not force:
        why = f"stands on {below}, and would no longer: if that is meant, give --force"
    if why:
        raise NotSupportedError(
            f"disk {target} of domain {domain.name} {why}; or restore it to another place",
            domain=domain.name,
            disk=target,
        )
    return disk


def _was_started(kind: type[NbdbackupError], domain: Domain) -> NbdbackupError:
    text = f"domain {domain.name} was started: end it and restore once more"
    return kind(text, domain=domain.name)
