"""Where the files of a peer's set lie: a directory, or the zip archive that it wrote to stdout.

The archive's members are stored, not deflated (1.9.15 and 2.28, measured), so that a stream can be
read where it lies.
"""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from nbdbackupd import durable
from nbdbackupd.errors import FormatError, IntegrityError, RepositoryError
from nbdbackupd.files import open_untrusted
from nbdbackupd.format.stream import Window

MAX_ENTRIES: Final = 1 << 14
MAX_DIRECTORY: Final = 4 << 20
"""Bytes of an archive's directory: the library makes objects of all of it before it is asked."""

MAX_NAME: Final = 255
"""Letters of a member's name, as of one in a directory: patterns are tried on it."""

MAX_SMALL: Final = 256 << 20
"""Bytes of small files in one archive: XML and JSON of a thousand runs are a tenth of it. A
thousand times as many may be packed into it."""

CHUNK: Final = 1 << 20
END_MARK: Final = b"PK\5\6"
END: Final = struct.Struct("<4s6xHLL")
"""Signature, number of entries and size of the directory, its place (APPNOTE, section 4.3.16)."""

END64: Final = struct.Struct("<4s36xQQ")
LOCATOR: Final = struct.Struct("<4s4xQ4x")
MAX_COMMENT: Final = (1 << 16) - 1
LOCAL_HEADER: Final = struct.Struct("<4s22xHH")
"""Signature, and at byte 26 the lengths of name and extra field (PKWARE APPNOTE, section 4.3.7)."""

SIGNATURE: Final = b"PK\x03\x04"
KNOWN: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
BROKEN: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    IndexError,
)
"""What the library raises for an archive that is damaged or was made to harm."""


class Storage(Protocol):
    """Regular files by name."""

    path: Path

    def sizes(self) -> dict[str, int]:
        """The sizes of all files in bytes; -1 for what has a name and is no regular file.

        Raises RepositoryError, FormatError.
        """

    def read_small(self, name: str, maximum: int) -> bytes:
        """A whole file; raises IntegrityError if it is larger, or another kind of file."""

    def has(self, name: str) -> bool:
        """Whether there is something of that name, which may be in a directory."""

    def file(self, name: str) -> Path:
        """The file that holds the bytes."""

    def window(self, name: str) -> Window | None:
        """Where in ``file`` they lie; None: they are all of it."""

    def crc(self, name: str) -> int | None:
        """The CRC-32 that the place itself tells of the file, or None."""


class Folder:
    """A directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def sizes(self) -> dict[str, int]:
        """See ``Storage``."""
        found = {}
        with durable.translate_os_errors("read", self.path), os.scandir(self.path) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    found[entry.name] = status.st_size if stat.S_ISREG(status.st_mode) else -1
        return found

    def read_small(self, name: str, maximum: int) -> bytes:
        """See ``Storage``."""
        return read_small(self.path / name, maximum)

    def has(self, name: str) -> bool:
        """See ``Storage``."""
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path:
        """See ``Storage``."""
        return self.path / name

    def window(self, _name: str) -> Window | None:
        """See ``Storage``."""
        return None

    def crc(self, _name: str) -> int | None:
        """See ``Storage``."""
        return None


class Archive:
    """A zip archive whose members are stored as they are."""

    def __init__(self, path: Path) -> None:
        """Read its directory.

        Raises RepositoryError, FormatError, IntegrityError.
        """
        self.path = path
        self._left = MAX_SMALL
        try:
            with durable.translate_os_errors("read", path), _open_archive(path) as file:
                if _directory_size(file) > MAX_DIRECTORY:
                    raise FormatError("archive holds too many files", file=path)
                with zipfile.ZipFile(file) as opened:
                    listed = opened.infolist()
        except BROKEN as err:
            raise IntegrityError(f"archive is damaged: {err}", file=path) from err
        if not all(_is_name(each.filename) for each in listed):
            raise FormatError("archive holds a file without a proper name", file=path)
        entries = [each for each in listed if not each.is_dir()]
        self._entries = {each.filename: each for each in entries}
        if len(self._entries) != len(entries) or len(entries) > MAX_ENTRIES:
            raise FormatError("archive holds a name twice, or too many", file=path)
        places = sorted((each.header_offset, each.compress_size) for each in entries)
        if any(
            one + LOCAL_HEADER.size + size > then for (one, size), (then, _) in pairwise(places)
        ):
            raise IntegrityError("archive is damaged: two files lie in one place", file=path)
        if any(each.compress_type not in KNOWN for each in entries):
            raise FormatError("archive is compressed in a way that is not known", file=path)

    @property
    def entries(self) -> tuple[zipfile.ZipInfo, ...]:
        """All members that are files."""
        return tuple(self._entries.values())

    def sizes(self) -> dict[str, int]:
        """See ``Storage``."""
        return {name: each.file_size for name, each in self._entries.items() if "/" not in name}

    def read_small(self, name: str, maximum: int) -> bytes:
        """See ``Storage``; its CRC-32 is proven.

        Raises RepositoryError if all that were read are too much together.
        """
        if self._entries[name].file_size > maximum:
            raise IntegrityError(f"larger than {maximum} bytes", file=f"{self.path}:{name}")
        self._left -= self._entries[name].file_size
        if self._left < 0:
            raise RepositoryError(
                f"{self.path}: its small files unpack to more than {MAX_SMALL >> 20} MiB"
            )
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a member in parts; what they are is known only when the last has come.

        Raises IntegrityError if the archive is damaged, or the member longer than it says.
        """
        entry, size = self._entries[name], 0
        try:
            with (
                durable.translate_os_errors("read", self.path),
                zipfile.ZipFile(self.path) as opened,
                opened.open(entry) as file,
            ):
                while part := file.read(CHUNK):
                    size += len(part)
                    if size > entry.file_size:
                        raise IntegrityError("entry is longer than it says", file=name)
                    yield part
        except BROKEN as err:
            raise IntegrityError(f"archive is damaged: {err}", file=self.path) from err

    def has(self, name: str) -> bool:
        """See ``Storage``."""
        return name in self._entries

    def file(self, _name: str) -> Path:
        """See ``Storage``."""
        return self.path

    def window(self, name: str) -> Window | None:
        """See ``Storage``. Raises FormatError for a member that is not stored as it is."""
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise FormatError(
                f"{name} is compressed by the archive: unpack it, or import it",
                file=self.path,
            )
        with durable.translate_os_errors("read", self.path), self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(entry.header_offset)
            head = file.read(LOCAL_HEADER.size)
        if len(head) < LOCAL_HEADER.size or not head.startswith(SIGNATURE):
            raise IntegrityError("archive is damaged", file=self.path, offset=entry.header_offset)
        _, name_length, extra_length = LOCAL_HEADER.unpack(head)
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if start + entry.file_size > size:
            raise IntegrityError("archive ends too early", file=self.path, offset=size)
        return Window(start, entry.file_size)

    def crc(self, name: str) -> int | None:
        """See ``Storage``."""
        return self._entries[name].CRC


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def _open_archive(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return os.fdopen(fd, "rb")


def _directory_size(file: BinaryIO) -> int:
    """How many bytes the library might take for an archive's directory, at most.

    It looks for an end record, and for a larger one before it, in ways that differ between its
    versions: each that could be one counts. One that tells more than lies before it is refused.
    """
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - END.size - 2 - MAX_COMMENT)
    file.seek(start)
    tail = file.read()
    found = [0]
    place = tail.find(END_MARK)
    while place >= 0:
        if place + END.size <= len(tail):
            found.append(END.unpack_from(tail, place)[2])
            found += _larger(file, start + place)
        place = tail.find(END_MARK, place + 1)
    return max(each for each in found if each <= size)


def _larger(file: BinaryIO, end: int) -> Iterator[int]:
    """What records for large archives say that belong to an end record at this place."""
    before = end - LOCATOR.size
    if before < END64.size:
        return
    file.seek(before)
    mark, where = LOCATOR.unpack(file.read(LOCATOR.size))
    if mark != b"PK\6\7":
        return
    for place in {before - END64.size, min(where, before)}:
        file.seek(place)
        record = file.read(END64.size)
        if len(record) == END64.size:
            yield END64.unpack(record)[1]


def read_small(path: Path, maximum: int) -> bytes:
    """A regular file of bounded size; a pipe or a link in its place is refused.

    Raises IntegrityError, RepositoryError.
    """
    with (
        durable.translate_os_errors("read", path),
        os.fdopen(open_untrusted(path), "rb") as file,
    ):
        # what would be room for the largest costs more than all else
        expected = min(os.fstat(file.fileno()).st_size, maximum)
        data = file.read(expected + 1)
        if len(data) > expected:
            data += file.read(maximum + 1 - len(data))
    if len(data) > maximum:
        raise IntegrityError(f"larger than {maximum} bytes", file=path)
    return data


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive. Raises RepositoryError if it can't be read."""
    with durable.translate_os_errors("read", path):
        return path.is_file() and zipfile.is_zipfile(path)
