"""A look at the domain before a run: its disks, their images, and how each is to be read."""

import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdbackupd.errors import DomainError, FormatError, ProcessError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.chain import ImageLayer, Level, RestorePoint
from nbdbackupd.model.plan import DiskPlan, DiskState, lost_disks, plan_disks
from nbdbackupd.model.selection import ImageFacts, Selection, select_disks
from nbdbackupd.qemu import image
from nbdbackupd.virt.domain import Domain
from nbdbackupd.where import HERE, Where

log = logging.getLogger(__name__)
LOCAL_TYPES = ("file", "block")
VOLUME = "volume"
VHOST_USER = "vhostuser"


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFilter:
    """Which disks the request wants."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    raw: bool = False

    def wants(self, target: str) -> bool:
        """Whether a disk may be among those."""
        return target not in self.exclude and (not self.include or target in self.include)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What was found. ``infos`` holds qemu-img's JSON by disk, where the image is on this host.

    ``lost`` names disks that the parent point holds and the domain no longer offers.
    """

    definition: domain_model.Domain
    selection: Selection
    plans: tuple[DiskPlan, ...]
    states: Mapping[str, DiskState]
    infos: Mapping[str, str]
    lost: tuple[str, ...]

    def plan(self, target: str) -> DiskPlan:
        """The plan of one disk."""
        return next(plan for plan in self.plans if plan.target == target)


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """A domain's definition, and what is known of its disks whatever a run wishes.

    ``infos`` is qemu-img's JSON, ``chains`` the same parsed. ``states`` lacks disks that have no
    image, or one that can't be looked at: ``problems`` says why. ``is_active``: a QEMU had the
    images open. ``where``: the host that they lie on.
    """

    definition: domain_model.Domain
    is_active: bool
    infos: Mapping[str, str]
    chains: Mapping[str, tuple[image.ImageInfo, ...]]
    states: Mapping[str, DiskState]
    problems: Mapping[str, str] = field(default_factory=dict)
    where: Where = HERE

    @property
    def encrypted(self) -> tuple[str, ...]:
        """Disks of which an image is encrypted; what is read of them is not."""
        return tuple(
            target for target, chain in self.chains.items() if any(each.encrypted for each in chain)
        )

    @property
    def facts(self) -> dict[str, ImageFacts]:
        """What a selection of disks needs of the images, by target."""
        return {
            target: ImageFacts(
                format=chain[0].format,
                compat=chain[0].compat,
                size=chain[0].virtual_size,
                has_raw_data=chain[0].data_file_raw,
            )
            for target, chain in self.chains.items()
        }


def look(domain: Domain) -> Looked:
    """Look at the definition and the images of a domain that runs or is off; changes nothing.

    Raises DomainError.
    """
    is_active = domain.is_active()
    definition = _with_paths(domain, domain.definition())
    problems: dict[str, str] = {}
    disks = [disk for disk in definition.disks if disk.device == "disk"]
    where = domain.connection.where
    infos = {disk.target: _info(disk, problems, where) for disk in disks}
    chains = {target: image.parse_chain(text) for target, text in infos.items() if text}
    states = {}
    for disk in disks:
        if not disk.source or disk.type == VHOST_USER:
            continue
        chain = chains.get(disk.target, ())
        try:
            states[disk.target] = _state(domain, disk, chain, is_active=is_active)
        except DomainError as err:
            problems.setdefault(disk.target, err.message)
    return Looked(
        definition=definition,
        is_active=is_active,
        infos={target: text for target, text in infos.items() if text},
        chains=chains,
        states=states,
        problems=problems,
        where=where,
    )


def _state(
    domain: Domain,
    disk: domain_model.Disk,
    chain: tuple[image.ImageInfo, ...],
    *,
    is_active: bool,
) -> DiskState:
    size = domain.disk_size(disk.target) if is_active or not chain else chain[0].virtual_size
    return DiskState(
        size=size,
        serial=disk.serial,
        layers=_layers(disk, chain, domain.connection.where),
        bitmaps={
            each.filename: {bitmap.name: _is_sound(bitmap) for bitmap in each.bitmaps}
            for each in chain
        },
        is_live=is_active,
    )


def _is_sound(bitmap: image.BitmapInfo) -> bool:
    """Whether a bitmap that no QEMU has open is consistent, and records once one has."""
    return "auto" in bitmap.flags and "in-use" not in bitmap.flags


def survey_domain(
    domain: Domain,
    wanted: DiskFilter,
    level: Level,
    parent: RestorePoint | None,
    looked: Looked | None = None,
) -> Survey:
    """Decide which disks a point holds and how each is read; ``looked`` saves another look.

    Raises UsageError or NotSupportedError if its disks can't be saved as asked, DomainError.
    """
    looked = looked or look(domain)
    selection = select_disks(
        looked.definition,
        looked.facts,
        level=level,
        include=wanted.include,
        exclude=wanted.exclude,
        raw=wanted.raw,
        missing={} if looked.is_active else _missing(looked),
    )
    states = {}
    for chosen in selection.chosen:
        state = looked.states.get(chosen.target)
        states[chosen.target] = state or _state_of_drive(domain, looked, chosen.target)
    return Survey(
        definition=looked.definition,
        selection=selection,
        plans=plan_disks(selection, level, parent, states),
        states=states,
        infos=looked.infos,
        lost=lost_disks(parent, selection),
    )


def _with_paths(domain: Domain, definition: domain_model.Domain) -> domain_model.Domain:
    """Say of volumes where they lie: pools may be gone on the day of the restore (F-94)."""
    return replace(definition, disks=tuple(_with_path(domain, each) for each in definition.disks))


def _with_path(domain: Domain, disk: domain_model.Disk) -> domain_model.Disk:
    if disk.type != VOLUME or not disk.source:
        return disk
    pool, _, volume = disk.source.partition("/")
    try:
        path = domain.volume_path(pool, volume)
    except DomainError as err:
        log.warning("disk %s: %s", disk.target, err)
        return disk
    facts = domain.connection.where.facts(path)
    if facts is None:
        # of a pool that is no directory of the host: libvirt's notation tells more
        return disk
    return replace(
        disk,
        type="block" if stat.S_ISBLK(facts.mode) else "file",
        source=path,
        layers=(ImageLayer(path, disk.format), *disk.layers[1:]),
    )


def _state_of_drive(domain: Domain, looked: Looked, target: str) -> DiskState:
    """A CD or floppy that is to be saved; of a disk it raises why it can't be looked at."""
    disk = looked.definition.disk(target)
    text = _info(disk, {}, looked.where)
    chain = image.parse_chain(text) if text else ()
    return _state(domain, disk, chain, is_active=looked.is_active)


def _missing(looked: Looked) -> dict[str, str]:
    """Why images of a domain that is off can't be read; a QEMU that runs has them open."""
    return {target: why for target, why in looked.problems.items() if target not in looked.states}


def _info(disk: domain_model.Disk, problems: dict[str, str], where: Where) -> str:
    """qemu-img's JSON of the backing chain, or nothing where there is no image to look at.

    Why one can't be looked at is added to ``problems``.
    """
    if disk.type not in LOCAL_TYPES or not disk.source:
        return ""
    try:
        text = image.info_json(Path(disk.source), format=disk.format, chain=True, where=where)
        image.parse_chain(text)
    except (ProcessError, FormatError) as err:
        problems[disk.target] = err.message
        return ""
    return text


def _layers(
    disk: domain_model.Disk, chain: tuple[image.ImageInfo, ...], where: Where
) -> tuple[ImageLayer, ...]:
    """What tells the disk's images from others; from the XML where the files can't be seen."""
    if not chain:
        return disk.layers
    return tuple(image_layer(each.filename, each.format, where) for each in chain)


def image_layer(path: str, image_format: str, where: Where = HERE) -> ImageLayer:
    """An image with what tells its file from others, where it is one of the host."""
    facts = where.facts(path)
    if facts is not None and stat.S_ISREG(facts.mode):
        return ImageLayer(path, image_format, facts.device, facts.inode)
    # a block device's node is made anew at each boot: its path is what stays
    return ImageLayer(path, image_format)
