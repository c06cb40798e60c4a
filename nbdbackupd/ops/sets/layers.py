"""The files that one disk of a restore point is made of, opened, proven and readable by block.

A layer is one stream (or raw image) with its index: the index says where each block is, the
manifest vouches for the index, the index for each block. A stream without an index is scanned
instead; then the frames' own order is proven, but nothing vouches for the bytes.
"""

import errno
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from nbdbackupd.errors import IntegrityError
from nbdbackupd.files import File, open_regular, open_sized
from nbdbackupd.format import adler, blocks, qcow2, stream
from nbdbackupd.format.index import MAX_BLOCK, NO_DIGEST, Index, Kind, Record
from nbdbackupd.format.stream import StreamMeta, StreamReader, Window
from nbdbackupd.model.chain import Codec, DigestKind, DiskPoint, RestorePoint, StoredFile
from nbdbackupd.ops.sets import frames
from nbdbackupd.ops.sets.frames import FrameCache, max_stored

CHUNK: Final = 1 << 20
MAX_STORED: Final = MAX_BLOCK + (64 << 10)
"""A frame of incompressible data is larger than the data by some headers, no more."""


class Layer(ABC):
    """One file of a disk's path; a context manager that owns it.

    ``size`` is the disk's at that point, ``whole`` whether every byte of it must be covered.
    ``where`` goes into errors. Reading is safe from several threads.
    """

    digest = DigestKind.SHA256
    """Of the records that have one."""

    deflated = False
    """Whether some blocks are parts of compressed clusters of a qcow2 image."""

    def __init__(
        self, path: Path, *, size: int, codec: Codec, raw: bool, whole: bool, **where: object
    ) -> None:
        """Open the file.

        Raises IntegrityError if it is missing.
        """
        self.path = path
        self.size = size
        self.codec = codec
        self.raw = raw
        self.whole = whole
        self.where = {"file": path, **where}
        self.frames = FrameCache()
        self.file = File(path, opener=lambda path: open_regular(path, **where))
        self.file_size = self.file.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self.file.close()

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """All blocks, ascending, each possible within the file.

        Raises IntegrityError.
        """

    def _checked(self, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            if record.kind == Kind.DATA:
                fits = record.position + record.stored <= self.file_size
                if self.codec is not Codec.NONE or record.whole:
                    most = max_stored(record.whole) if record.whole else MAX_STORED
                    fits = fits and 0 < record.stored <= most
                else:
                    fits = fits and record.stored == record.length
                if not fits or (self.raw and record.position != record.offset):
                    raise IntegrityError(
                        "the index names a block that can't be", guest=record.offset, **self.where
                    )
            yield record

    def read(self, record: Record, view: memoryview, scratch: memoryview) -> memoryview | None:
        """The guest bytes of a data block into ``view`` (of its length), proven by their digest.

        ``scratch`` has room for ``MAX_STORED`` bytes and belongs to the calling thread. Returns
        the payload as it is stored, in one of both; None if it is more than the block's. Raises
        IntegrityError with the file and the position in it.
        """
        stored: memoryview | None = view
        if record.whole:
            stored = None
            key = (id(self), record.position)
            frame = self.frames.get(key, record.whole, lambda: self._whole_frame(record))
            view[:] = memoryview(frame)[record.skip : record.skip + record.length]
        elif self.codec is not Codec.NONE:
            stored = scratch[: record.stored]
            self.read_at(stored, record.position)
            view[:] = self._decompress(stored, record, record.length)
        else:
            self.read_at(view, record.position)
        if record.digest != NO_DIGEST and blocks.digest(view, self.digest) != record.digest:
            raise IntegrityError(
                f"block is damaged: its {self.digest.label} does not match",
                offset=record.position,
                guest=record.offset,
                **self.where,
            )
        return stored

    def _whole_frame(self, record: Record) -> bytes:
        stored = memoryview(bytearray(record.stored))
        self.read_at(stored, record.position)
        return self._decompress(stored, record, record.whole)

    def _decompress(self, stored: memoryview, record: Record, length: int) -> bytes:
        try:
            return blocks.decompress(stored, length, self.codec)
        except IntegrityError as err:
            raise IntegrityError(
                err.message, offset=record.position, guest=record.offset, **self.where
            ) from err

    def read_at(self, view: memoryview, position: int) -> None:
        """Fill ``view`` from the file.

        Raises IntegrityError if the file ends before.
        """
        while view:
            count = self.file.preadv(view, position)
            if not count:
                raise IntegrityError("file ends too early", offset=position, **self.where)
            view = view[count:]
            position += count


class IndexedLayer(Layer):
    """A layer with its index file."""

    def __init__(self, path: Path, index: Path, *, whole: bool, **where: object) -> None:
        """Open both.

        Raises IntegrityError, UnsupportedVersionError; ConfigError if a library is missing that
        makes its digests or unpacks its blocks.
        """
        self.index = Index(File(index, opener=lambda path: open_regular(path, **where)))
        try:
            header = self.index.header
            self.digest = header.digest
            blocks.require(self.digest, header.codec)
            super().__init__(
                path,
                size=header.disk_size,
                codec=header.codec,
                raw=header.raw,
                whole=whole,
                **where,
            )
        except BaseException:
            self.index.__exit__()
            raise

    def close(self) -> None:
        """Close both files."""
        super().close()
        self.index.__exit__()

    def records(self) -> Iterator[Record]:
        """The records of the index."""
        return self._checked(iter(self.index))


class ScannedLayer(Layer):
    """A stream without an index: its frames are walked again for each pass over the records."""

    def __init__(self, path: Path, meta: StreamMeta, window: Window | None = None) -> None:
        """Open it; ``meta`` was read from it. ``window``: it is that part of the file.

        Raises ConfigError if the library is missing that unpacks its blocks.
        """
        self._window = window
        blocks.require(self.digest, meta.codec)
        super().__init__(path, size=meta.virtual_size, codec=meta.codec, raw=False, whole=False)

    def records(self) -> Iterator[Record]:
        """Records made of the frames, without digests; long plain frames come in pieces."""
        return self._checked(self._walk())

    def _walk(self) -> Iterator[Record]:
        with StreamReader(self.path, window=self._window) as reader:
            for frame in reader.frames():
                if frame.kind == stream.ZERO:
                    yield Record(frame.start, frame.length, 0, 0, Kind.ZERO, NO_DIGEST)
                elif frame.kind == stream.DATA and self.codec is not Codec.NONE:
                    try:
                        yield from frames.records(frame, reader.read)
                    except IntegrityError as err:
                        raise IntegrityError(err.message, **{**err.fields, **self.where}) from err
                elif frame.kind == stream.DATA:
                    for done in range(0, frame.length, MAX_BLOCK):
                        part = min(MAX_BLOCK, frame.length - done)
                        yield Record(
                            frame.start + done,
                            part,
                            frame.position + done,
                            part,
                            Kind.DATA,
                            NO_DIGEST,
                        )


class RawLayer(Layer):
    """A raw image that no index describes; what the file system has as a hole is not read."""

    def __init__(self, path: Path, **where: object) -> None:
        """Open it; the disk is as large as the file."""
        super().__init__(path, size=0, codec=Codec.NONE, raw=True, whole=True, **where)
        self.size = self.file_size

    def records(self) -> Iterator[Record]:
        """Records of the file's data, without digests, and of its holes as zeroes."""
        place = 0
        while place < self.size:
            data = self._next(place, os.SEEK_DATA)
            if data > place:
                yield Record(place, data - place, 0, 0, Kind.ZERO, NO_DIGEST)
            place = self._next(data, os.SEEK_HOLE) if data < self.size else data
            for start in range(data, place, MAX_BLOCK):
                part = min(MAX_BLOCK, place - start)
                yield Record(start, part, start, part, Kind.DATA, NO_DIGEST)

    def _next(self, place: int, what: int) -> int:
        try:
            with self.file.lent() as fd:
                return min(os.lseek(fd, place, what), self.size)
        except OSError as err:
            if err.errno != errno.ENXIO:  # no data behind
                raise
            return self.size


class Qcow2Layer(Layer):
    """What a qcow2 image holds itself; a backing file that it names is never looked at."""

    def __init__(self, path: Path, check: Callable[[], None], **where: object) -> None:
        """Open it and walk its tables; ``check`` is called now and then and may raise.

        Raises IntegrityError, FormatError.
        """
        super().__init__(path, size=0, codec=Codec.NONE, raw=False, whole=False, **where)
        try:
            self._header = qcow2.read_header(self.file)
            self.size = self._header.size
            for record in self.records():
                check()
                self.deflated = self.deflated or record.whole > 0
        except BaseException:
            self.close()
            raise

    def records(self) -> Iterator[Record]:
        """Records of its clusters, without digests."""
        return self._checked(qcow2.records(self.file, self._header))

    def _decompress(self, stored: memoryview, record: Record, length: int) -> bytes:
        try:
            return qcow2.inflate(stored, length)
        except IntegrityError as err:
            err.fields |= {"offset": record.position, "guest": record.offset, **self.where}
            raise


def check_size(path: Path, size: int, **where: object) -> None:
    """Prove that a file is there and has its size.

    Raises IntegrityError.
    """
    os.close(open_sized(path, size, **where))


def read_file(path: Path, stored: StoredFile, most: int, **where: object) -> bytes:
    """A small file of a set as its manifest tells it: of its size, at most ``most``, its SHA-256.

    The files of a peer's set have no digest. Raises IntegrityError.
    """
    if stored.size > most:
        raise IntegrityError(
            f"file is larger than {most} bytes", file=path, size=stored.size, **where
        )
    with os.fdopen(open_sized(path, stored.size, **where), "rb") as file:
        data = file.read(stored.size + 1)
    if len(data) != stored.size or stored.sha256 not in ("", hashlib.sha256(data).hexdigest()):
        raise IntegrityError("file is damaged: its SHA-256 does not match", file=path, **where)
    return data


def sha256_file(path: Path, check: Callable[[], None], **where: object) -> str:
    """The SHA-256 (hex) of a file, read once; ``check`` is called now and then and may raise.

    Raises IntegrityError if it is missing.
    """
    fd = open_regular(path, **where)
    try:
        sum_ = hashlib.sha256()
        while part := os.read(fd, CHUNK):
            check()
            sum_.update(part)
    finally:
        os.close(fd)
    return sum_.hexdigest()


def adler32_file(path: Path, check: Callable[[], None], window: Window | None = None) -> int:
    """The Adler-32 of a file, or of a part of it, read once; as ``sha256_file``."""
    return _sum_file(path, check, window, adler.adler32, adler.START)


def crc32_file(path: Path, check: Callable[[], None], window: Window | None = None) -> int:
    """The CRC-32 of a file, or of a part of it, read once; as ``sha256_file``."""
    return _sum_file(path, check, window, zlib.crc32, 0)


def _sum_file(
    path: Path,
    check: Callable[[], None],
    window: Window | None,
    add: Callable[[bytes, int], int],
    total: int,
) -> int:
    fd = open_regular(path)
    try:
        place, left = window or (0, os.fstat(fd).st_size)
        while part := os.pread(fd, min(CHUNK, left), place):
            check()
            total = add(part, total)
            place, left = place + len(part), left - len(part)
    finally:
        os.close(fd)
    return total


def open_proven(
    directory: Path, point: RestorePoint, disk: DiskPoint, check: Callable[[], None]
) -> IndexedLayer:
    """The layer of one disk in one point, everything but the blocks themselves proven.

    Raises IntegrityError: a file missing or of the wrong size, an index other than the one that
    the manifest vouches for.
    """
    where: dict[str, object] = {"disk": disk.target, "point": point.id}
    stream_path = directory / disk.file
    index_path = directory / disk.index.name
    check_size(stream_path, disk.file_size, **where)
    check_size(index_path, disk.index.size, **where)
    if sha256_file(index_path, check, **where) != disk.index.sha256:
        raise IntegrityError(
            "index is damaged: its SHA-256 does not match", file=index_path, **where
        )
    layer = IndexedLayer(stream_path, index_path, whole=disk.mode == "full", **where)
    header = layer.index.header
    wanted = (disk.size, disk.codec, disk.layout, disk.digest)
    if (header.disk_size, header.codec, header.layout, header.digest) != wanted:
        layer.close()
        raise IntegrityError("index and manifest disagree", file=index_path, **where)
    return layer


def read_checksum(path: Path) -> int:
    """The number in a checksum file (decimal Adler-32 of the stream beside it).

    Raises IntegrityError if it is missing or no such number.
    """
    fd = open_regular(path)
    try:
        text = os.read(fd, 64).strip()
    finally:
        os.close(fd)
    if not text.isdigit() or len(text) > 10:
        raise IntegrityError("checksum file holds no number", file=path)
    return int(text)
