"""What a restore will do: all that can be proven is proven, and nothing is written yet."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbdbackupd.errors import (
    RepositoryError,
    UsageError,
)
from nbdbackupd.model.chain import BackupSet, DiskPoint, RestorePoint
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.restore import options as restore_options
from nbdbackupd.ops.restore import output_names, side_files, sites
from nbdbackupd.ops.restore.options import ImageForm
from nbdbackupd.ops.restore.request import RestoreRequest, Style
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.ops.restore.sites import Site
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets import opened, sequence
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.ops.sets.opened import OpenedSet
from nbdbackupd.qemu.image import CreateOptions
from nbdbackupd.repo import written


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A disk at one point: its layers, newest first.

    ``is_whole``: the point read it in full, or nothing older is restored; else ``layers[0]`` holds
    what changed since the step before. ``site``: the older image of a chain goes there.
    """

    point: str
    layers: tuple[Layer, ...]
    is_whole: bool
    site: Site | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskJob:
    """One disk to write, and where to; ``steps`` are its points, oldest first, the wanted last."""

    target: str
    options: CreateOptions
    site: Site
    steps: tuple[Step, ...]
    style: Style = Style.PLAIN

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The open layers of the wanted point, newest first."""
        return self.steps[-1].layers

    @property
    def size(self) -> int:
        """The disk's, in bytes."""
        return self.layers[0].size

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where something is written: of a chain the older images, too, in the order of points."""
        return (*(step.site for step in self.steps if step.site is not None), self.site)


@dataclass(frozen=True, kw_only=True, slots=True)
class RestorePlan:
    """All that is to be done, everything but the blocks proven.

    ``source`` must live as long: what is unpacked of an archive goes with it.
    """

    point: str
    domain: str
    created: str
    jobs: tuple[DiskJob, ...]
    files: tuple[FileCopy, ...] = ()
    live: FileCopy | None = None
    warnings: tuple[str, ...] = ()
    source: OpenedSet | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where all disks go."""
        return tuple(site for job in self.jobs for site in job.sites)


class Placement(Protocol):
    """Chooses where disks go, in place of the request's output directory.

    Its methods are called in this order, ``check`` often, before and after the last ones.
    ``warnings`` are those of ``begin``.
    """

    warnings: tuple[str, ...]

    def begin(self, point: RestorePoint, disks: tuple[DiskPoint, ...], stack: ExitStack) -> None:
        """Look whether these disks can be placed; ``stack`` is that of the run."""

    def format(self, disk: DiskPoint) -> str:
        """The format that the disk must have there; empty for any."""

    def place(
        self, point: RestorePoint, made: Mapping[DiskPoint, ImageForm], stack: ExitStack
    ) -> Mapping[str, Site]:
        """The place of each disk, by target."""

    def files(self, directory: Path, point: RestorePoint) -> tuple[FileCopy, ...]:
        """Files of the point, in the set's ``directory``, that are to go somewhere."""

    def check(self, *, is_overwritten: bool = False) -> None:
        """Raise if the restore must end; from any thread. ``is_overwritten``: as ``settle``."""

    def adopt(self) -> None:
        """Change what libvirt says of the disks, when all that can go wrong is behind us."""

    def settle(self, *, is_overwritten: bool) -> None:
        """Raise if what was restored must not replace what is there now.

        ``is_overwritten``: a device has lost what it held, so that it is too late to give way.
        """


def of_set(
    path: Path,
    request: RestoreRequest,
    placement: Placement | None,
    stack: ExitStack,
    cancelled: Callable[[], None],
) -> RestorePlan:
    """The plan for a point of the set at ``path``. Raises as ``restore.run``."""
    source, point = opened.open_point(path, request.choice)
    stack.enter_context(closing(source))
    targets = dict.fromkeys((*request.disks, *(place.target for place in request.places)))
    disks = [point.disk(target) for target in targets] or list(point.disks)
    if placement is not None:
        placement.begin(point, tuple(disks), stack)
    made = {disk: _choose(request, source, point, disk, placement) for disk in disks}
    found = _sites(request, placement, point, made, stack)
    jobs = tuple(
        DiskJob(
            target=disk.target,
            options=each.options,
            site=found[disk.target],
            steps=steps_of(
                source, point, disk.target, found[disk.target],
                style=request.style, since=request.since, stack=stack, check=cancelled,
            ),
            style=request.style,
        )
        for disk, each in made.items()
    )  # fmt: skip
    files = _files(request, source, point, placement)
    return RestorePlan(
        point=point.id,
        domain=point.domain,
        created=point.created,
        jobs=jobs,
        files=files,
        live=side_files.live_xml(source.path, point),
        warnings=(
            *source.warnings,
            *written.warnings(request.state_dirs, source.known.needed(point)),
            *(placement.warnings if placement is not None else ()),
            *_told(made, found),
            *(text for job in jobs for text in _sizes(job)),
        ),
        source=source,
    )


def _told(made: Mapping[DiskPoint, ImageForm], found: Mapping[str, Site]) -> tuple[str, ...]:
    return tuple(
        text
        for disk, each in made.items()
        for text in each.told(disk.target, data_file=found[disk.target].has_data_file)
    )


def _files(
    request: RestoreRequest,
    source: OpenedSet,
    point: RestorePoint,
    placement: Placement | None,
) -> tuple[FileCopy, ...]:
    files: tuple[FileCopy, ...] = ()
    if request.output is not None:
        files = side_files.plan(source.path, point, request.output)
    if placement is not None:
        files += placement.files(source.path, point)
    for each in files:
        layering.check_size(each.source, each.stored.size, point=point.id)
    return files


def _sizes(job: DiskJob) -> tuple[str, ...]:
    sizes = {step.layers[0].size for step in job.steps}
    if job.style is not Style.SNAPSHOTS or len(sizes) == 1:
        return ()
    return (
        f"disk {job.target}: some snapshots are of other sizes than the image: apply them with "
        f"'qemu-img snapshot -a', since 'qemu-img convert -l' gives them its size",
    )


def _choose(
    request: RestoreRequest,
    source: OpenedSet,
    point: RestorePoint,
    disk: DiskPoint,
    placement: Placement | None,
) -> ImageForm:
    path = next((each.path for each in request.places if each.target == disk.target), None)
    wanted = _wanted(request)
    if placement is not None:
        wanted = placement.format(disk) or wanted
    elif wanted is None and path is not None and path.is_block_device():
        wanted = "raw"
    elif request.style is not Style.PLAIN:
        wanted = "qcow2"
    chosen = restore_options.choose(
        source.path, point, disk, wanted=wanted, preallocate=request.preallocate
    )
    if request.style is Style.PLAIN:
        return chosen
    return ImageForm(
        format=chosen.format,
        options=sites.with_plain_options(chosen.options),
        warnings=chosen.warnings,
        data_file=chosen.data_file,
    )


def _wanted(request: RestoreRequest) -> str | None:
    return "qcow2" if request.compress else request.format


def _sites(
    request: RestoreRequest,
    placement: Placement | None,
    point: RestorePoint,
    made: Mapping[DiskPoint, ImageForm],
    stack: ExitStack,
) -> Mapping[str, Site]:
    if placement is not None:
        return placement.place(point, made, stack)
    names = names_of(point, made)
    given = {place.target: place.path for place in request.places}
    found: dict[str, Site] = {}
    for disk in made:
        if disk.target in given:
            about = about_disk(point, disk.target)
            least = sites.room(disk.size, made[disk].format)
            found[disk.target] = sites.at(given[disk.target], least, about, stack)
        elif request.output is None:
            raise UsageError(f"disk {disk.target} has no place: give -o, or -d {disk.target}=PATH")
        else:
            found[disk.target] = sites.NewFile(request.output / names[disk.target])
    if request.style is Style.CHAIN:
        found = {target: sites.ChainFile(site.final) for target, site in found.items()}
    finals = [site.final.resolve() for site in found.values()]
    if len(set(finals)) < len(finals):
        raise UsageError("two disks can't go to one place")
    return found


def names_of(point: RestorePoint, made: Mapping[DiskPoint, ImageForm]) -> dict[str, str]:
    """The file names of the images, by target."""
    return output_names.choose(
        [
            output_names.Wanted(
                target=disk.target, source=disk.source, original=disk.format, format=each.format
            )
            for disk, each in made.items()
        ],
        point.domain,
    )


def about_disk(point: RestorePoint, target: str) -> str:
    """What stands on a device that is not complete."""
    return f"Disk {target} of domain {point.domain}, restore point {point.id}"


def of_sequence(
    request: RestoreRequest, stack: ExitStack, cancelled: Callable[[], None]
) -> RestorePlan:
    """The plan for stream files given by hand. Raises as ``restore.run``."""
    given = sequence.load(request.sequence, stack, cancelled)
    wrong = [place.target for place in request.places if place.target != given.disk]
    if wrong:
        raise UsageError(f"the stream files are of disk {given.disk}, not of {wrong[0]}")
    wanted = _wanted(request)
    path = request.places[0].path if request.places else None
    if wanted is None and path is not None and path.is_block_device():
        wanted = "raw"
    format_, warnings = restore_options.choose_format(given.format, wanted, given.disk)
    if path is not None:
        least = sites.room(given.layers[0].size, format_)
        site = sites.at(path, least, f"Disk {given.disk}", stack)
    elif request.output is not None:
        naming = output_names.Wanted(
            target=given.disk, source="", original=given.format, format=format_
        )
        site = sites.NewFile(request.output / output_names.choose([naming], "")[given.disk])
    else:
        raise UsageError("the disk has no place: give -o, or -d DISK=PATH")
    job = DiskJob(
        target=given.disk,
        options=restore_options.plain(format_, preallocate=request.preallocate),
        site=site,
        steps=(Step(point="", layers=given.layers, is_whole=True),),
    )
    return RestorePlan(
        point=given.point,
        domain="",
        created=given.created,
        jobs=(job,),
        warnings=(*given.warnings, *warnings),
    )


def steps_of(
    source: OpenedSet,
    point: RestorePoint,
    target: str,
    site: Site,
    *,
    style: Style,
    since: str,
    stack: ExitStack,
    check: Callable[[], None],
) -> tuple[Step, ...]:
    """The wanted point, and with other styles than plain those before it.

    ``stack`` owns the open files. Raises RepositoryError if ``since`` is not among them, and as
    ``OpenedSet.layers``.
    """
    if style is Style.PLAIN:
        layers = source.layers(point, target, stack, check, deep=True)
        return (Step(point=point.id, layers=layers, is_whole=True),)
    wanted = _line(source.known, point, target, since)
    steps: list[Step] = []
    while wanted:
        # a disk that was read in full within the chain starts anew there
        path = source.known.path(wanted[-1], target)
        layers = source.layers(wanted[-1], target, stack, check, deep=True)
        part = [
            Step(
                point=each.id,
                layers=layers[number:],
                is_whole=each is path[-1],
                site=_older(site, each) if style is Style.CHAIN and each is not point else None,
            )
            for number, each in enumerate(path)
            if each in wanted
        ]
        steps = [*reversed(part), *steps]
        wanted = wanted[: len(wanted) - len(part)]
    first = steps[0]
    return (
        Step(point=first.point, layers=first.layers, is_whole=True, site=first.site),
        *steps[1:],
    )


def _line(
    known: BackupSet, point: RestorePoint, target: str, since: str
) -> tuple[RestorePoint, ...]:
    """The points from ``since``, or the first one with the disk, to ``point``, by their links."""
    by_id = {each.id: each for each in known.points}
    line = [point]
    oldest = Choice(point=since).find(known) if since else None
    while line[-1] is not oldest:
        parent = by_id.get(line[-1].parent)
        if parent is None or all(disk.target != target for disk in parent.disks):
            break
        line.append(parent)
    if oldest is not None and line[-1] is not oldest:
        lacks = all(disk.target != target for disk in oldest.disks)
        why = f"does not hold disk {target}" if lacks else "is not one that it hangs on"
        raise RepositoryError(f"restore point {point.id} can't begin with {oldest.id}, which {why}")
    return tuple(reversed(line))


def _older(site: Site, point: RestorePoint) -> Site:
    """The image of an older point, beside that of the wanted one and named after both."""
    path: Path = site.final
    name = output_names.clean(f"{path.stem}.{point.id}{path.suffix}", path.suffix)
    return sites.ChainFile(path.with_name(name))
