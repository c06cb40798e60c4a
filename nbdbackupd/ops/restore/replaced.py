"""An image of a domain that is off, replaced by a restored one.

The new image is made beside the old one, so all that goes wrong while it is made leaves the domain
as it was. Then the old images are set aside, and only when all the new ones are complete do they
get their names. A run that is killed in between leaves a domain that lacks an image: it can't
start as if nothing had happened.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError
from nbdbackupd.ops.restore.devices import lock_like_qemu
from nbdbackupd.ops.restore.output_names import INCOMPLETE
from nbdbackupd.ops.restore.outputs import Output
from nbdbackupd.ops.restore.sites import DataFile, Site, Work, image_at, image_with_data

log = logging.getLogger(__name__)
SET_ASIDE: Final = ".replaced"
OURS: Final = ("user.", "system.", "security.")
"""Extended attributes that go over to the new image; ``trusted.`` ones are libvirt's notes."""


class ReplacedImage(Site):
    """An image file that is replaced, with the file that holds its data, if it has one."""

    def __init__(
        self, path: Path, target: str, stack: ExitStack, data: DataFile | None = None
    ) -> None:
        """``stack`` keeps every QEMU away from the old files."""
        self._image = _Replaced(path.resolve(), stack)
        self._data = data
        # an image without its data is worse than none
        self._files = [_Replaced(data.final, stack)] if data is not None else []
        self._files.append(self._image)
        self.final = self._image.final
        self.has_data_file = data is not None
        self.overwrites = f"disk {target}, image {self.final}"
        if data is not None:
            self.overwrites += f" and its data file {data.final}"

    @property
    def incomplete(self) -> Path:
        """The new image until it is complete."""
        return self._image.incomplete

    def check(self, *, force: bool) -> None:
        """Keep QEMU away from the old files; they may be gone, their directories not.

        Raises BusyError if one is in use, RepositoryError if it is no file.
        """
        del force  # being there is no reason to refuse
        for each in self._files:
            each.check()

    @contextmanager
    def open(self, work: Work) -> Iterator[Output]:
        """The new image and its data file, which get owner, mode and labels of the old ones."""
        if self._data is None:
            made = image_at(self.incomplete, work)
        else:
            made = image_with_data(self.incomplete, self._data, work)
        with made as output:
            yield output
        for each in self._files:
            each.resemble_old()

    def set_aside(self) -> None:
        """Rename the old files, durably."""
        for each in self._files:
            each.set_aside()

    def name(self) -> None:
        """Give the new files their names."""
        for each in self._files:
            each.name()

    def finish(self) -> None:
        """Remove the old files."""
        for each in self._files:
            each.finish()

    def state(self) -> str:
        """Whether the domain has no image there now."""
        return "; ".join(filter(None, (each.state() for each in self._files)))


class _Replaced:
    """One file that is replaced."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.final = path
        self._stack = stack
        self._is_locked = False
        self._is_aside = False

    @property
    def incomplete(self) -> Path:
        return self.final.with_name(f"{self.final.name}{INCOMPLETE}")

    @property
    def aside(self) -> Path:
        """The old file once it is set aside."""
        return self.final.with_name(f"{self.final.name}{SET_ASIDE}")

    def check(self) -> None:
        if self._is_locked or self._is_aside:
            return
        with durable.translate_os_errors("open", self.final):
            if not os.path.lexists(self.final) and self.final.parent.is_dir():
                return
            fd = os.open(self.final, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            self._stack.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RepositoryError(f"{self.final} is no file")
            lock_like_qemu(fd, self.final)
        self._is_locked = True

    def resemble_old(self) -> None:
        like = next((each for each in (self.final, self.aside) if each.exists()), None)
        if like is not None:
            resemble(self.incomplete, like)
            durable.fsync_file(self.incomplete)

    def set_aside(self) -> None:
        if self._is_aside:
            return
        if self.final.exists():
            durable.rename(self.final, self.aside)
            durable.fsync_directory(self.final.parent)
        self._is_aside = True

    def name(self) -> None:
        durable.rename(self.incomplete, self.final)
        durable.fsync_directory(self.final.parent)
        self._is_aside = False

    def finish(self) -> None:
        self.aside.unlink(missing_ok=True)
        durable.fsync_directory(self.final.parent)

    def state(self) -> str:
        if not self._is_aside:
            return ""
        return f"{self.final} is missing now (the old one is {self.aside}): restore once more"


def resemble(path: Path, like: Path) -> None:
    """Owner, mode, and what the file system calls attributes: labels and access lists."""
    found = like.stat()
    with suppress(PermissionError):
        os.chown(path, found.st_uid, found.st_gid)
    durable.set_mode(path, stat.S_IMODE(found.st_mode))
    try:
        for name in os.listxattr(like):
            if name.startswith(OURS):
                os.setxattr(path, name, os.getxattr(like, name))
    except OSError as err:
        log.info("attributes of %s are not all copied: %s", like, err.strerror)
