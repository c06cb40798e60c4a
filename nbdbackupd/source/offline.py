"""A domain that is off as a source: its images, read by a storage daemon of our own.

The new bitmap is added before the daemon opens the images and must be clean once they are open:
then all that is written after this instant is recorded in it, and all that was written before is
in what we read. Adding it after the copy would lose what a guest writes in between.

QEMU's locks keep writers away from qcow2 images while the daemon has them open, not from raw ones
(QEMU 7.2, measured). The daemon takes them only where libvirt's hook tells us of a start, so that
we can let go: else a start would be refused. Everywhere the state of the domain and of the files
tells in the end whether somebody wrote.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import (
    BusyError,
    CheckpointError,
    GaveWayError,
    NbdbackupError,
    NotSupportedError,
    ProcessError,
    SourceError,
)
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import Consistency, ImageLayer
from nbdbackupd.qemu import bitmaps, image, storage_daemon
from nbdbackupd.qemu.storage_daemon import Image, Node, Server
from nbdbackupd.source import Export, Snapshot, untouched
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt.domain import Domain, Ending

LOG = logging.getLogger(__name__)
ATTEMPTS: Final = 3
QCOW2: Final = "qcow2"


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineDisk:
    """A disk to read. ``layers`` is its whole backing chain, top first.

    ``delta``: only what changed since the base, which the bitmaps of the images ``bitmap_layers``
    (paths, top first) tell together. ``tracked``: the new checkpoint covers it.
    """

    target: str
    layers: tuple[ImageLayer, ...]
    delta: bool = False
    tracked: bool = True
    bitmap_layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRequest:
    """What ``open_offline`` needs.

    ``socket`` is where the exports are offered, in the domain's runtime directory. An empty
    ``new_checkpoint`` makes none; ``created`` is its time, in seconds since 1970. ``ending`` is how
    the guest ended, if libvirt has forgotten it. ``on_trouble`` is called from another thread.
    ``cancelled`` raises to end a wait.
    """

    domain: Domain
    disks: tuple[OfflineDisk, ...]
    socket: Path
    lease: Lease
    on_trouble: Callable[[NbdbackupError], None]
    cancelled: Callable[[], None]
    base_checkpoint: str = ""
    new_checkpoint: str = ""
    created: int = 1
    ending: Ending = Ending.UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """The server and its nodes: for each disk, by target, the nodes of its layers, top first.

    ``before``: what the files were just before they were opened.
    """

    server: Server
    chains: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    before: Mapping[str, untouched.Fingerprint] = field(default_factory=dict)

    def is_clean(self, request: OfflineRequest) -> bool:
        """Whether no byte was written since the new bitmaps were added."""
        for disk in _tracked(request):
            bitmap = self.chains[disk.target][0].bitmap(request.new_checkpoint)
            if bitmap is None or not bitmap.sound or not bitmap.recording or bitmap.dirty:
                return False
        return True


@contextmanager
def open_offline(request: OfflineRequest) -> Iterator[Snapshot]:
    """Yield the disks of a domain that is off as exports; end the server on every path out.

    A disk whose bitmaps are lost or broken is read in full (``demoted``). While the body runs the
    new bitmap is in the image of each tracked disk; removing it when the run fails is the
    caller's. ``checkpoint_xml`` is what libvirt is to be told of it, by a redefinition.

    Raises BusyError if the domain runs or its images are in use, GaveWayError if it is being
    started, NotSupportedError for images that can't be read without libvirt, SourceError if an
    image can't be opened; on leaving also if somebody wrote to an image or started the domain.
    """
    consistency = _check(request)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_open_tracked(request))
        demoted: dict[str, str] = {}
        exports = {}
        for disk in request.disks:
            bitmap, reason = _merge_changes(request, opened, disk) if disk.delta else ("", "")
            if reason:
                demoted[disk.target] = reason
            exports[disk.target] = _export(request, opened, disk, bitmap)
        snapshot = Snapshot(
            exports=exports,
            consistency=consistency,
            checkpoint_xml=_checkpoint_xml(request),
            demoted=demoted,
        )
        stack.enter_context(_giving_way(request))
        unhooked = bool(request.lease.unhooked)
        stack.enter_context(untouched.watch(request.domain, request.on_trouble, wins=unhooked))
        yield snapshot
        opened.server.check()
        untouched.check(request.domain, opened.before)


def changed_bytes(request: OfflineRequest) -> dict[str, int]:
    """The bytes that changed since the base, for each delta disk that can tell.

    No bitmap is added. Raises as ``open_offline``.
    """
    _check(request)
    found = {}
    with _giving_way(request), _serve(request) as opened:
        for disk in request.disks:
            if disk.delta:
                bitmap, reason = _merge_changes(request, opened, disk)
                if not reason:
                    name = opened.chains[disk.target][0].name
                    merged = opened.server.nodes()[name].bitmap(bitmap)
                    found[disk.target] = merged.dirty if merged is not None else 0
    return found


def remove_bitmap(lease: Lease, layers: Iterable[ImageLayer], name: str) -> tuple[str, ...]:
    """Remove a bitmap from each of these images that has it; return their paths.

    The domain is off. All are tried; raises the first BusyError, SourceError or GaveWayError.
    """
    removed = []
    failures: list[NbdbackupError] = []
    for path in dict.fromkeys(layer.path for layer in layers if layer.format == QCOW2):
        try:
            held = image.info(Path(path), format=QCOW2).bitmaps
            if any(bitmap.name == name for bitmap in held):
                with lease.writing(path) as fd:
                    bitmaps.remove(path, name, pass_fds=(fd,))
                removed.append(path)
        except GaveWayError:
            raise
        except NbdbackupError as err:
            failures.append(err)
    if failures:
        raise failures[0]
    return tuple(removed)


def _tracked(request: OfflineRequest) -> tuple[OfflineDisk, ...]:
    if not request.new_checkpoint:
        return ()
    return tuple(disk for disk in request.disks if disk.tracked)


def _check(request: OfflineRequest) -> Consistency:
    domain = request.domain
    if domain.is_active():
        raise BusyError(f"domain {domain.name} was started just now", domain=domain.name)
    ending = domain.ending()
    if ending is Ending.UNKNOWN:
        ending = request.ending
    return Consistency.OFFLINE if ending is Ending.SHUTDOWN else Consistency.CRASH


@contextmanager
def _giving_way(request: OfflineRequest) -> Iterator[None]:
    """A server that was killed by ``yield`` is no failure of the server.

    Nor is what it reads in images that the guest writes to, where no lock keeps it from that.
    """
    try:
        yield
    except SourceError:
        request.cancelled()
        request.lease.check()
        if request.lease.unhooked and request.domain.is_active():
            raise untouched.started(request.domain) from None
        raise


@contextmanager
def _open_tracked(request: OfflineRequest) -> Iterator[_Opened]:
    """Add the new bitmaps, then open the images; anew while somebody writes in between."""
    for _ in range(ATTEMPTS):
        with contextlib.ExitStack() as failing, contextlib.ExitStack() as stack:
            failing.callback(_drop_bitmaps, request)
            with _giving_way(request):
                _add_bitmaps(request)
                opened = stack.enter_context(_serve(request))
            if opened.is_clean(request):
                # from here on the bitmaps belong to the caller
                failing.pop_all()
                yield opened
                return
        LOG.info("domain %s: somebody wrote to an image, once more", request.domain.name)
    raise BusyError(
        f"domain {request.domain.name} is off, but another program keeps writing to its images",
        domain=request.domain.name,
    )


def _add_bitmaps(request: OfflineRequest) -> None:
    name = request.new_checkpoint
    for disk in _tracked(request):
        path = disk.layers[0].path
        for _ in range(2):
            request.cancelled()
            with request.lease.writing(path) as fd:
                if bitmaps.add(path, name, pass_fds=(fd,)):
                    break
                # of an attempt that failed: what it recorded means nothing
                bitmaps.remove(path, name, pass_fds=(fd,))


def _drop_bitmaps(request: OfflineRequest) -> None:
    """Remove the new bitmaps where that is possible; the next run sees to the rest."""
    for disk in _tracked(request):
        try:
            remove_bitmap(request.lease, disk.layers[:1], request.new_checkpoint)
        except NbdbackupError as err:
            LOG.info("bitmap %s stays for now: %s", request.new_checkpoint, err)


@contextmanager
def _serve(request: OfflineRequest) -> Iterator[_Opened]:
    chains = {disk.target: _images(disk) for disk in request.disks}
    lease = request.lease
    with contextlib.ExitStack() as stack:
        with lease.images() as fd:
            server = stack.enter_context(
                storage_daemon.serve(
                    request.socket,
                    pass_fds=(fd,),
                    started=lease.name_server,
                    cancelled=request.cancelled,
                    locking=not lease.unhooked,
                )
            )
        files = [name for chain in chains.values() for each in chain for name in _files(each)]
        # what is no file can't be opened, which the server says better
        before = untouched.states(dict.fromkeys(each for each in files if each.startswith("/")))
        names = {target: server.open_chain(chain) for target, chain in chains.items()}
        nodes = server.nodes()
        yield _Opened(
            server=server,
            chains={
                target: tuple(nodes[name] for name in chain) for target, chain in names.items()
            },
            before=before,
        )


def _images(disk: OfflineDisk) -> tuple[Image, ...]:
    if not disk.layers:
        raise NotSupportedError(f"disk {disk.target} has no image")
    return tuple(
        Image(layer.path, layer.format, _data_file(layer) if layer.format == QCOW2 else "")
        for layer in disk.layers
    )


def _data_file(layer: ImageLayer) -> str:
    """The external data file that a qcow2 image names; the guest's QEMU believes it, too."""
    if not layer.path.startswith("/"):
        return ""
    try:
        return image.info(Path(layer.path), format=QCOW2).data_file
    except ProcessError as err:
        raise storage_daemon.translate(err, layer.path) from err


def _files(each: Image) -> tuple[str, ...]:
    return (each.path, each.data_file) if each.data_file else (each.path,)


def _merge_changes(request: OfflineRequest, opened: _Opened, disk: OfflineDisk) -> tuple[str, str]:
    """Make the bitmap of a disk's changes; return its name, or why there is none."""
    base = request.base_checkpoint
    chain = opened.chains[disk.target]
    paths = tuple(layer.path for layer in disk.layers)
    count = len(disk.bitmap_layers)
    if not base or not count or disk.bitmap_layers != paths[:count]:
        return "", f"it is not known which images hold its bitmaps of checkpoint {base or 'none'}"
    granularities = []
    for number, node in enumerate(chain[:count]):
        bitmap = node.bitmap(base)
        if bitmap is None:
            return "", f"image {paths[number]} has lost bitmap {base}"
        if not bitmap.sound:
            return "", f"bitmap {base} in image {paths[number]} is inconsistent"
        if number == 0 and not bitmap.recording:
            return "", f"bitmap {base} in image {paths[number]} was switched off"
        granularities.append(bitmap.granularity)
    name = f"changes-{disk.target}"
    sources = [(node.name, base) for node in reversed(chain[:count])]
    sizes = {node.size for node in chain[:count]}
    if len(sizes) > 1:
        return "", f"its images have different sizes: bitmaps of checkpoint {base} don't fit"
    try:
        opened.server.merge(chain[0].name, name, sources, min(granularities))
    except ProcessError as err:
        opened.server.check()
        return "", f"bitmaps of checkpoint {base} can't be merged: {err.message}"
    return name, ""


def _export(request: OfflineRequest, opened: _Opened, disk: OfflineDisk, bitmap: str) -> Export:
    top = opened.chains[disk.target][0]
    opened.server.export(top.name, disk.target, bitmap)
    return Export(
        target=disk.target,
        socket=request.socket,
        name=disk.target,
        size=top.size,
        bitmap=bitmap,
    )


def _checkpoint_xml(request: OfflineRequest) -> str:
    tracked = [disk.target for disk in _tracked(request)]
    if not tracked:
        return ""
    known = [disk.target for disk in request.domain.definition().disks]
    others = [target for target in known if target not in tracked]
    root = documents.parse_xml(
        jobxml.checkpoint_xml(request.new_checkpoint, tracked, others),
        "domaincheckpoint",
        CheckpointError,
    )
    ET.SubElement(root, "creationTime").text = str(request.created)
    return ET.tostring(root, encoding="unicode")
