"""Where a restored disk goes: a new image, or a block device.

A site is checked before anything is written, filled, and named when all sites are filled. What it
holds before it is named is not taken for a disk by anybody.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.ops.restore import outputs
from nbdbackupd.ops.restore.devices import Device, claimed
from nbdbackupd.ops.restore.output_names import INCOMPLETE
from nbdbackupd.ops.restore.outputs import Output
from nbdbackupd.qemu import image, qcow2
from nbdbackupd.qemu.image import CreateOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is to be made: a disk of ``size`` bytes, as an image of these ``options``.

    ``compress``: its clusters are, which only a new file can have.

    The calling thread asks ``cancelled`` and those of the writers ``check``; both may raise.
    """

    size: int
    options: CreateOptions
    workers: int
    cancelled: Callable[[], None]
    check: Callable[[], None]
    compress: bool = False


class Site:
    """One place; ``final`` is its path."""

    final: Path
    overwrites = ""
    """What will be lost here, for people; empty: nothing that they do not know of."""

    is_overwritten = False
    """Whether it is lost as soon as something is written."""

    is_device = False

    has_data_file = False
    """Whether the image gets its data in a file beside it."""

    @property
    def incomplete(self) -> Path:
        """What is filled, before it has its name."""
        return self.final

    def check(self, *, force: bool) -> None:
        """Refuse what can't work, before anything is written.

        Raises RepositoryError, BusyError, NoSpaceError.
        """
        raise NotImplementedError

    def open(self, work: Work) -> AbstractContextManager[Output]:
        """The image or device, to be filled; on the device when the context ends well.

        Raises NoSpaceError, BusyError, ProcessError, NbdError, OSError.
        """
        raise NotImplementedError

    def set_aside(self) -> None:
        """Take what is to be replaced out of its place. Raises OSError."""

    def name(self) -> None:
        """Make what was filled what it is to be; the caller makes the name durable.

        Raises OSError.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Remove what is of no use when all sites are named, durably. Raises OSError."""

    def state(self) -> str:
        """What a restore that failed has left here, for people; empty: nothing to worry about."""
        return ""


class NewFile(Site):
    """An image that is new, or replaces a file as a whole when it is complete."""

    def __init__(self, final: Path) -> None:
        self.final = final

    @property
    def incomplete(self) -> Path:
        """The image until it is complete."""
        return self.final.with_name(f"{self.final.name}{INCOMPLETE}")

    def check(self, *, force: bool) -> None:
        """Refuse to replace what exists; what is no file is not replaced even by force."""
        refuse_existing(self.final, force=force)

    def open(self, work: Work) -> AbstractContextManager[Output]:
        """The image under its name for the time being."""
        return image_at(self.incomplete, work)

    def name(self) -> None:
        """Rename it."""
        durable.rename(self.incomplete, self.final)


class ChainFile(NewFile):
    """A new image that others of a chain stand on, or that stands on others."""

    def set_aside(self) -> None:
        """Remove an older one: for a moment it would stand on an image that it is not made for."""
        self.final.unlink(missing_ok=True)


class BlockDevice(Site):
    """A block device, which is overwritten."""

    is_overwritten = True
    is_device = True

    def __init__(self, path: Path, size: int, about: str, stack: ExitStack) -> None:
        """``size`` is the least; ``about`` says what is restored. ``stack`` keeps the claim."""
        self.final = path
        self.overwrites = f"block device {path}"
        self._size = size
        self._about = about
        self._stack = stack
        self._device: Device | None = None

    def check(self, *, force: bool) -> None:
        """Claim the device."""
        del force  # a device is there in any case
        if self._device is None:
            with durable.translate_os_errors("open", self.final):
                self._device = self._stack.enter_context(claimed(self.final, self._size))

    @contextmanager
    def open(self, work: Work) -> Iterator[Output]:
        """The device, all of it but its beginning."""
        device = self._device
        assert device is not None, "checked before"  # noqa: S101 - for the type checker
        if work.options.format == "raw":
            yield from self._raw(device, work)
        else:
            yield from self._qcow2(device, work)

    def _raw(self, device: Device, work: Work) -> Iterator[Output]:
        device.begin(self._about)

        def zero(offset: int, length: int) -> None:
            device.zero(offset, length, work.check)

        yield outputs.direct(device.put, work.workers, zero)
        device.zero(work.size, device.size - work.size, work.cancelled)
        os.fsync(device.fd)

    def _qcow2(self, device: Device, work: Work) -> Iterator[Output]:
        with tempfile.TemporaryDirectory(prefix="nbdbackup-") as directory:
            template = Path(directory, "template")
            image.create(template, work.size, work.options)
            if not qcow2.can_fill(template):
                plain = CreateOptions(format="qcow2", cluster_size=work.options.cluster_size)
                image.create(template, work.size, plain)
            # never less than it is found by
            device.begin(self._about, 1 << image.info(template).cluster_size.bit_length() - 1)
            filler = qcow2.DeviceFiller(
                device.fd,
                template,
                lambda offset, length: device.zero(offset, length, work.check),
                device.size,
            )
        with filler:
            yield outputs.direct(filler.write, work.workers)
            filler.finish()
            device.put(memoryview(filler.head), 0)

    def name(self) -> None:
        """Write the beginning."""
        if self._device is not None:
            self._device.finish()

    def state(self) -> str:
        """Whether its old content is lost and the new one not there."""
        if self._device is None or not self._device.is_begun:
            return ""
        return f"{self.final} is incomplete now: restore to it once more"


@contextmanager
def image_at(path: Path, work: Work) -> Iterator[Output]:
    """A fresh image at ``path``, as ``Site.open``."""
    if work.options.format == "raw":
        preallocate = bool(work.options.preallocation)
        with outputs.raw(path, work.size, preallocate=preallocate, workers=work.workers) as output:
            yield output
        return
    make = outputs.compressed if work.compress else outputs.qcow2
    with make(
        path,
        work.size,
        work.options,
        workers=work.workers,
        cancelled=work.cancelled,
        check=work.check,
    ) as output:
        yield output


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """The file beside a qcow2 image that holds the guest's bytes, as they are if ``raw``.

    ``name`` is how the image is to name it. A relative name would be looked for in the directory
    that QEMU happens to run in (7.2, measured).
    """

    final: Path
    name: str
    raw: bool

    @property
    def incomplete(self) -> Path:
        """The file until it is complete."""
        return self.final.with_name(f"{self.final.name}{INCOMPLETE}")


@contextmanager
def image_with_data(path: Path, data: DataFile, work: Work) -> Iterator[Output]:
    """A fresh qcow2 image at ``path`` with its data in ``data.incomplete``, as ``Site.open``.

    When the context ends well, the image names the file as it will be called.
    """
    os.close(outputs.create_private(data.incomplete))
    options = replace(
        work.options,
        # images of version 2 have no such file
        compat="" if work.options.compat == "0.10" else work.options.compat,
        data_file=os.fspath(data.incomplete.absolute()),
        data_file_raw=data.raw,
    )
    with image_at(path, replace(work, options=options)) as output:
        yield output
    image.name_data_file(path, data.name)
    durable.fsync_file(path)
    durable.fsync_file(data.incomplete)


def refuse_existing(final: Path, *, force: bool) -> None:
    """Raise RepositoryError for what exists, unless it is a file and ``force`` is given."""
    if not os.path.lexists(final):
        return
    if not force:
        raise RepositoryError(f"{final} exists: use --force to replace it, or another -o")
    if not final.is_file() and not final.is_symlink():
        raise RepositoryError(f"{final} exists and is no file: give another -o")


def room(size: int, format_: str) -> int:
    """The least size of a device for a disk; for qcow2 that depends on the data."""
    return size if format_ == "raw" else 0


def at(path: Path, least: int, about: str, stack: ExitStack) -> Site:
    """The site that a path means: a block device, else an image in a directory that exists.

    ``least`` is how large a device must be, in bytes. Raises UsageError.
    """
    if path.is_block_device():
        return BlockDevice(path, least, about, stack)
    if path.is_dir():
        raise UsageError(f"{path} is a directory: give the path of an image or of a block device")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent} for image {path.name}")
    return NewFile(path)


def with_plain_options(options: CreateOptions) -> CreateOptions:
    """Options that an image with snapshots, or on another one, can have."""
    return replace(options, compat="", preallocation="")
