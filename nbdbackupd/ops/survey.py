"""A look at the domain before a run: its disks, their images, and how each is to be read."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nbdbackupd.errors import DomainError, FormatError, ProcessError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.chain import ImageLayer, Level, RestorePoint
from nbdbackupd.model.plan import DiskPlan, DiskState, lost_disks, plan_disks
from nbdbackupd.model.selection import ImageFacts, Selection, select_disks
from nbdbackupd.qemu import image
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)
LOCAL_TYPES = ("file", "block")
VOLUME = "volume"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Which disks the request wants."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    raw: bool = False


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


def survey_domain(domain: Domain, wish: Wish, level: Level, parent: RestorePoint | None) -> Survey:
    """Look at the running domain.

    Raises UsageError or NotSupportedError if its disks can't be saved as asked, DomainError.
    """
    definition = _with_paths(domain, domain.definition())
    infos = {disk.target: _info(disk) for disk in definition.disks}
    chains = {target: image.parse_chain(text) for target, text in infos.items() if text}
    facts = {
        target: ImageFacts(
            format=chain[0].format, compat=chain[0].compat, size=chain[0].virtual_size
        )
        for target, chain in chains.items()
    }
    selection = select_disks(
        definition, facts, level=level, include=wish.include, exclude=wish.exclude, raw=wish.raw
    )
    states = {
        chosen.target: DiskState(
            size=domain.disk_size(chosen.target),
            serial=definition.disk(chosen.target).serial,
            layers=_layers(definition.disk(chosen.target), chains.get(chosen.target, ())),
            bitmaps={
                each.filename: frozenset(bitmap.name for bitmap in each.bitmaps)
                for each in chains.get(chosen.target, ())
            },
        )
        for chosen in selection.chosen
    }
    return Survey(
        definition=definition,
        selection=selection,
        plans=plan_disks(selection, level, parent, states),
        states=states,
        infos={target: text for target, text in infos.items() if text},
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
        path = Path(domain.volume_path(pool, volume))
    except DomainError as err:
        log.warning("disk %s: %s", disk.target, err)
        return disk
    if not path.exists():
        # of a pool that is no directory of this host: libvirt's notation tells more
        return disk
    return replace(
        disk,
        type="block" if path.is_block_device() else "file",
        source=os.fspath(path),
        layers=(ImageLayer(os.fspath(path), disk.format), *disk.layers[1:]),
    )


def _info(disk: domain_model.Disk) -> str:
    """qemu-img's JSON of the backing chain, or nothing where there is no image to look at."""
    if disk.device != "disk" or disk.type not in LOCAL_TYPES or not disk.source:
        return ""
    try:
        text = image.info_json(Path(disk.source), format=disk.format, chain=True)
        image.parse_chain(text)
    except (ProcessError, FormatError) as err:
        log.warning("image of disk %s can't be examined: %s", disk.target, err)
        return ""
    return text


def _layers(disk: domain_model.Disk, chain: tuple[image.ImageInfo, ...]) -> tuple[ImageLayer, ...]:
    """What tells the disk's images from others; from the XML where the files can't be seen."""
    if not chain:
        return disk.layers
    return tuple(_layer(each.filename, each.format) for each in chain)


def _layer(path: str, image_format: str) -> ImageLayer:
    try:
        status = os.stat(path)  # noqa: PTH116 - a name that may be no path at all
    except (OSError, ValueError):
        return ImageLayer(path, image_format)
    if os.path.isfile(path):  # noqa: PTH113 - as above
        return ImageLayer(path, image_format, status.st_dev, status.st_ino)
    # a block device's node is made anew at each boot: its path is what stays
    return ImageLayer(path, image_format)
