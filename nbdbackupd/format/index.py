"""The index beside each stream: fixed-size records, sorted by guest offset, mmap-able.

Layout, little endian:

* header, 32 bytes: magic ``NBDXIDX1``, u32 version (1, or 2 with zstd, a qcow2 image, or other
  digests than SHA-256), u32 flags (bit 0: blocks are lz4 frames, bit 1: raw image instead of a
  stream, bit 2: frames of the stream hold several blocks, as in imported sets, bit 3: blocks are
  zstd frames, bit 4: qcow2 image instead of a stream, bits 8 to 15: kind of the digests, 0 SHA-256,
  1 BLAKE3, 2 XXH128), u64 disk size, u64 record count;
* records, 64 bytes each: u64 guest offset, u64 length, u64 position of the payload in the
  stream file, u32 stored length, u32 kind (0 data, 1 zero), 32 bytes digest of the guest bytes,
  a shorter one followed by zero bytes (nothing else for kind zero, whose position and stored
  length are 0).

Ranges are half open, ascending and do not overlap; a data record is at most ``MAX_BLOCK`` long.
With bit 2, adjacent data records of one position share one lz4 frame, its payload is all of it.
"""

import bisect
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

from nbdbackupd.errors import IntegrityError, UnsupportedVersionError
from nbdbackupd.files import File
from nbdbackupd.model.chain import Codec, DigestKind, Layout

MAGIC = b"NBDXIDX1"
VERSION = 1
NEWER_VERSION = 2
"""Of an index with blocks in zstd or a qcow2 image, or digests that are no SHA-256."""

FLAG_LZ4 = 1
FLAG_RAW = 2
FLAG_FRAMES = 4
FLAG_ZSTD = 8
FLAG_QCOW2 = 16
CODECS = {Codec.NONE: 0, Codec.LZ4: FLAG_LZ4, Codec.ZSTD: FLAG_ZSTD}
OLD_FLAGS = FLAG_LZ4 | FLAG_RAW | FLAG_FRAMES
"""All that version 1 has."""

DIGEST_BIT = 8
DIGESTS = (DigestKind.SHA256, DigestKind.BLAKE3, DigestKind.XXH128)
"""Kinds by their number in the flags."""

MAX_BLOCK = 1 << 20
MAX_SHARING = 64
"""Records that may share one lz4 frame."""
HEADER = struct.Struct("<8sIIQQ")
RECORD = struct.Struct("<QQQII32s")
PLACE = struct.Struct("<QQQ")
NO_DIGEST = bytes(32)
SOME = 1 << 8
"""Records that are read at a time, a piece: 16 KiB, for each file of a chain."""
UNKNOWN = (1 << 64) - 1


class Kind(IntEnum):
    """What a record or segment holds."""

    DATA = 0
    ZERO = 1


class Record(NamedTuple):
    """One block: guest range ``[offset, offset + length)`` and where its payload lies.

    A block may be a part of a larger lz4 frame, as virtnbdbackup makes them: then the payload is
    the whole frame's, which holds ``whole`` guest bytes, ``skip`` of them before the block. Of
    other blocks both are 0.
    """

    offset: int
    length: int
    position: int
    stored: int
    kind: int
    digest: bytes
    skip: int = 0
    whole: int = 0

    @property
    def end(self) -> int:
        """First guest byte after the block."""
        return self.offset + self.length

    @property
    def is_vouched(self) -> bool:
        """Whether nobody can make other bytes of this digest: it is there, and no XXH128."""
        return any(self.digest[16:])


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """What the header says: virtual size of the disk (bytes), number of records, flags, digests."""

    disk_size: int
    count: int
    codec: Codec
    raw: bool
    frames: bool = False
    digest: DigestKind = DigestKind.SHA256
    qcow2: bool = False

    @property
    def layout(self) -> Layout:
        """What the index describes."""
        if self.qcow2:
            return Layout.QCOW2
        return Layout.RAW if self.raw else Layout.STREAM

    def pack(self) -> bytes:
        """The 32 bytes of the header."""
        flags = CODECS[self.codec] + FLAG_RAW * self.raw + FLAG_FRAMES * self.frames
        flags += FLAG_QCOW2 * self.qcow2
        flags |= DIGESTS.index(self.digest) << DIGEST_BIT
        version = NEWER_VERSION if flags & ~OLD_FLAGS else VERSION
        return HEADER.pack(MAGIC, version, flags, self.disk_size, self.count)


class Index:
    """A read-only view of an index file; a context manager that owns the file.

    Iterating and ``record(i)`` read a few records at a time, so memory stays flat for any size.
    """

    def __init__(self, file: Path | File, *, start: int = 0, size: int | None = None) -> None:
        """Check header and size; with ``start`` and ``size`` it is that part of the file.

        Raises IntegrityError or UnsupportedVersionError, and OSError if it can't be opened.
        """
        self.file = file if isinstance(file, File) else File(file)
        self.path = self.file.path
        self._start = start + HEADER.size
        self._last: tuple[int, bytes] = (-1, b"")
        self._firsts = array("Q")
        try:
            self.header = self._parse_header(start, self.file.size if size is None else size)
        except BaseException:
            self.file.close()
            raise

    def _parse_header(self, start: int, size: int) -> IndexHeader:
        head = self.file.pread(HEADER.size, start)
        if size < HEADER.size or len(head) < HEADER.size:
            raise IntegrityError("index is too short", file=self.path, size=size)
        magic, version, flags, disk_size, count = HEADER.unpack(head)
        if magic != MAGIC:
            raise IntegrityError("not an index file", file=self.path, offset=0)
        kind = flags >> DIGEST_BIT
        codecs = [each for each, bits in CODECS.items() if bits == flags & (FLAG_LZ4 | FLAG_ZSTD)]
        wanted = NEWER_VERSION if flags & ~OLD_FLAGS else VERSION
        # a qcow2 image has no other form
        alone = flags & FLAG_QCOW2
        known = (alone or OLD_FLAGS | FLAG_ZSTD) | kind << DIGEST_BIT
        if version != wanted or kind >= len(DIGESTS) or flags & ~known or not codecs:
            raise UnsupportedVersionError(
                "index was written by a newer program", file=self.path, version=version
            )
        if size != HEADER.size + count * RECORD.size:
            raise IntegrityError(
                "index has the wrong size", file=self.path, records=count, size=size
            )
        return IndexHeader(
            disk_size,
            count,
            codecs[0],
            bool(flags & FLAG_RAW),
            bool(flags & FLAG_FRAMES),
            DIGESTS[kind],
            bool(alone),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.header.count

    def __iter__(self) -> Iterator[Record]:
        """All records, ascending; each is checked against its neighbour and the disk's size.

        Raises IntegrityError at the first record that can't be.
        """
        end = 0
        for number, record in self._records():
            if record.offset < end or record.length == 0 or record.end > self.header.disk_size:
                raise IntegrityError("index records out of order", file=self.path, record=number)
            if record.kind == Kind.DATA:
                if record.length > MAX_BLOCK:
                    raise IntegrityError("index block too long", file=self.path, record=number)
            elif record.kind != Kind.ZERO or record.stored:
                raise IntegrityError("bad kind in index", file=self.path, record=number)
            end = record.end
            yield record

    def _records(self) -> Iterator[tuple[int, Record]]:
        for first in range(0, self.header.count, SOME):
            some = RECORD.iter_unpack(self._some(first // SOME))
            for number, fields in enumerate(some, first):
                yield number, self._in_frame(number, Record(*fields))

    def _some(self, number: int) -> bytes:
        """The records from ``number * SOME`` on, as many as one read brings."""
        count = min(SOME, self.header.count - number * SOME)
        return self._bytes(number * SOME, count * RECORD.size)

    def _bytes(self, first: int, length: int) -> bytes:
        found = self.file.pread(length, self._start + first * RECORD.size)
        if len(found) != length:
            raise IntegrityError("index ends too early", file=self.path, record=first)
        return found

    def find(self, offset: int) -> int:
        """The number of the first record that ends after a guest offset; all records if none.

        Where each piece begins is kept, once it was read: 8 bytes for 256 records.
        """
        if not self._firsts:
            self._firsts = array("Q", [UNKNOWN]) * -(-len(self) // SOME)
        if not self._firsts:
            return 0
        piece = bisect.bisect_right(range(len(self._firsts)), offset, key=self._first) - 1
        begin = max(piece, 0) * SOME
        self._plain(begin)  # keeps the piece
        inside = range(begin, min(begin + SOME, len(self)))
        after = begin + bisect.bisect_right(inside, offset, key=lambda n: self.place(n)[0])
        if not after:
            return 0
        start, length, _ = self.place(after - 1)
        return after - 1 if start + length > offset else after

    def _first(self, piece: int) -> int:
        """Where the first record of a piece begins."""
        if self._firsts[piece] == UNKNOWN:
            self._firsts[piece] = self.place(piece * SOME)[0]
        return self._firsts[piece]

    def record(self, number: int) -> Record:
        """Record ``number``, 0-based, unchecked."""
        return self._in_frame(number, self._plain(number))

    def _in_frame(self, number: int, record: Record) -> Record:
        if not self.header.frames or self.header.codec is Codec.NONE or record.kind != Kind.DATA:
            return record
        first = self._sharing(number, -1)
        last = self._sharing(number, 1)
        if first == last:
            return record
        start = self._plain(first).offset
        return record._replace(skip=record.offset - start, whole=self._plain(last).end - start)

    def place(self, number: int) -> tuple[int, int, int]:
        """Offset, length and position of record ``number``, unchecked; quicker than all of it."""
        at, some = self._last
        found: tuple[int, int, int]
        if at == number // SOME:
            found = PLACE.unpack_from(some, number % SOME * RECORD.size)
        else:
            found = PLACE.unpack(self._bytes(number, PLACE.size))
        return found

    def _plain(self, number: int) -> Record:
        at, some = self._last
        if at != number // SOME:
            at, some = number // SOME, self._some(number // SOME)
            # several threads may be here: they find one another's or read their own
            self._last = (at, some)
        return Record(*RECORD.unpack_from(some, number % SOME * RECORD.size))

    def _sharing(self, number: int, step: int) -> int:
        """The last record in that direction that shares a record's lz4 frame."""
        here = self._plain(number)
        for _ in range(MAX_SHARING):
            if not 0 <= number + step < self.header.count:
                break
            beside = self._plain(number + step)
            touches = beside.end == here.offset if step < 0 else here.end == beside.offset
            if beside.kind != Kind.DATA or beside.position != here.position or not touches:
                break
            number, here = number + step, beside
        return number
