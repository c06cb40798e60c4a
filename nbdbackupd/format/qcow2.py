"""Where a qcow2 file has its clusters: what it holds itself, and nothing of what it names.

Some other program wrote the file, maybe to harm. A backing or data file that it names is never
looked at, no other program opens it, and every place in it is proven to be within it. A table that
is used twice would let a small file stand for endless blocks: it is refused.

Source of the format: QEMU, docs/interop/qcow2.txt.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.files import File
from nbdbackupd.format.adler import Buffer
from nbdbackupd.format.index import MAX_BLOCK, NO_DIGEST, Kind, Record

MAGIC: Final = b"QFI\xfb"
HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
"""Magic, version, place and size of the backing file's name, bits of a cluster, size, encryption,
entries and place of the L1 table, place and clusters of the refcount table, number and place of
the snapshots."""

FEATURES: Final = struct.Struct(">QQQII")
"""Behind it, from version 3 on: incompatible, compatible and autoclear features, order of the
refcounts, length of the header."""

COMPRESSION_PLACE: Final = HEADER.size + FEATURES.size
"""Where the kind of compression stands, a byte: 0 zlib, 1 zstd."""

DIRTY: Final = 1
"""Refcounts may be wrong, which are of no use to a reader."""

CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
CLUSTER_BITS: Final = range(9, 22)
MAX_L1: Final = 4 << 20
"""Entries of an L1 table: QEMU's limit of 32 MiB."""

MAX_BACKING: Final = 1023
"""Bytes of the name of a backing file: QEMU's limit."""

SOME_L1: Final = 8192
PLACE: Final = 0x00FF_FFFF_FFFF_FE00
COPIED: Final = 1 << 63
PACKED: Final = 1 << 62
ZERO: Final = 1
SECTOR: Final = 512
SUBCLUSTERS: Final = 32
LOW: Final = (1 << SUBCLUSTERS) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the header says. ``size`` of the disk in bytes, ``l1`` the place of the L1 table.

    ``is_alone``: it names no backing file. ``snapshots`` is the number of internal ones.
    """

    version: int
    size: int
    cluster_bits: int
    l1: int
    entries: int
    is_alone: bool
    snapshots: int
    extended: bool = False
    zstd: bool = False

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def per_table(self) -> int:
        """Clusters that an L2 table tells of."""
        return self.cluster // (16 if self.extended else 8)


def is_qcow2(file: File) -> bool:
    """Whether a file begins as a qcow2 file does. Raises OSError."""
    return file.pread(len(MAGIC), 0) == MAGIC


def read_header(file: File) -> Header:
    """The header, of version 2 or 3, of a file that holds its own bytes in plain.

    Raises IntegrityError if it is damaged or none, UnsupportedVersionError for a feature that is
    not known, FormatError for an encrypted image or one with a data file, OSError.
    """
    raw = file.pread(COMPRESSION_PLACE + 1, 0)
    if not raw.startswith(MAGIC):
        raise IntegrityError("not a qcow2 image", file=file.path, offset=0)
    if len(raw) < HEADER.size:
        raise IntegrityError("image ends too early", file=file.path, offset=len(raw))
    (
        _, version, backing, _, bits, size, encryption, entries, l1, _, _, snapshots, _,
    ) = HEADER.unpack_from(raw)  # fmt: skip
    features = kind = 0
    if version not in (2, 3):
        raise UnsupportedVersionError("qcow2 image of a version that is not read", file=file.path)
    if version == 3:
        if len(raw) < COMPRESSION_PLACE:
            raise IntegrityError("image ends too early", file=file.path, offset=len(raw))
        features, _, _, _, length = FEATURES.unpack_from(raw, HEADER.size)
        if length > COMPRESSION_PLACE and len(raw) > COMPRESSION_PLACE:
            kind = raw[COMPRESSION_PLACE]
    found = Header(
        version=version,
        size=size,
        cluster_bits=bits,
        l1=l1,
        entries=entries,
        is_alone=not backing,
        snapshots=snapshots,
        extended=bool(features & EXTENDED_L2),
        zstd=bool(features & COMPRESSION and kind),
    )
    if encryption:
        raise FormatError("image is encrypted, which is not read", file=file.path)
    _check_features(features, kind, file)
    _check_header(found, file)
    return found


def backing_name(file: File) -> str:
    """The name of the backing file that the header tells, without ``./`` before it; or nothing.

    Raises IntegrityError, OSError.
    """
    place, size = struct.unpack_from(">QI", file.pread(HEADER.size, 0), len(MAGIC) + 4)
    name = file.pread(size, place) if place and size <= MAX_BACKING else b""
    if place and (not size or len(name) != size):
        raise IntegrityError("qcow2 image with a header that can't be", file=file.path)
    return os.fsdecode(name).removeprefix("./")


def _check_features(features: int, kind: int, file: File) -> None:
    if features & DATA_FILE:
        raise FormatError("image has its data in another file, which is not read", file=file.path)
    if features & CORRUPT:
        raise IntegrityError("image is marked as corrupt", file=file.path)
    if features & ~(DIRTY | COMPRESSION | EXTENDED_L2) or kind > 1:
        raise UnsupportedVersionError("qcow2 image of a newer QEMU", file=file.path)


def _check_header(header: Header, file: File) -> None:
    sound = header.cluster_bits in CLUSTER_BITS and header.size < 1 << 63
    sound = sound and not (header.extended and header.cluster_bits < CLUSTER_BITS.start + 5)
    needed = -(-header.size // (header.cluster * header.per_table)) if sound else 0
    sound = sound and needed <= header.entries <= MAX_L1 and header.l1 % header.cluster == 0
    if not sound:
        raise IntegrityError("qcow2 image with a header that can't be", file=file.path)


def inflate(stored: Buffer, length: int) -> bytes:
    """The ``length`` guest bytes of a compressed cluster; behind it others may follow.

    Raises IntegrityError if it is damaged.
    """
    try:
        block = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, length)
    except zlib.error as err:
        raise IntegrityError(f"cluster can't be decompressed: {err}") from err
    if len(block) != length:
        raise IntegrityError("cluster has the wrong length", expected=length, found=len(block))
    return block


def records(file: File, header: Header) -> Iterator[Record]:
    """What the file holds, ascending, in blocks without digests; the rest it knows nothing of.

    Plain clusters that follow one another are one block, cut where ``MAX_BLOCK`` divides the
    guest's offset. A block of a compressed cluster has that as its frame. Raises IntegrityError,
    OSError.
    """
    held: Record | None = None
    for record in _pieces(file, header):
        if held is not None and _follows(held, record):
            stored = held.stored + record.stored
            held = held._replace(length=held.length + record.length, stored=stored)
            continue
        if held is not None:
            yield held
        held = record
    if held is not None:
        yield held


def _follows(held: Record, record: Record) -> bool:
    if held.kind != record.kind or held.end != record.offset or held.whole or record.whole:
        return False
    if record.kind == Kind.ZERO:
        return True
    return held.position + held.stored == record.position and record.offset % MAX_BLOCK != 0


def _pieces(file: File, header: Header) -> Iterator[Record]:
    seen: set[int] = set()
    step = 2 if header.extended else 1
    for number, place in _tables(file, header):
        if place in seen:
            raise IntegrityError("a table of the image is used twice", file=file.path, offset=place)
        seen.add(place)
        words = _numbers(file, place, header.per_table * step)
        first = number * header.per_table << header.cluster_bits
        slot = 0
        while slot < len(words):
            start = first + (slot // step << header.cluster_bits)
            entry, bitmap = words[slot], words[slot + 1] if header.extended else 0
            count = 1
            if entry | bitmap and start < header.size:
                count = 1 if header.extended else _alike(words, slot, start, header.cluster)
                length = min(header.cluster * count, header.size - start)
                try:
                    yield from _clusters(header, start, length, entry, bitmap, end=file.size)
                except FormatError as err:
                    err.fields |= {"file": file.path, "guest": start}
                    raise
            slot += count * step


def _alike(words: Sequence[int], slot: int, start: int, cluster: int) -> int:
    """How many entries say together what the first one says: for a block, or a run of zeroes."""
    wanted, grows, end = words[slot], cluster, len(words)
    if wanted == ZERO:
        grows = 0
    elif wanted & (PACKED | ZERO) or not wanted & PLACE:
        return 1
    else:
        end = min(end, slot + max((MAX_BLOCK - start % MAX_BLOCK) // cluster, 1))
    place = slot + 1
    while place < end and words[place] == wanted + grows:
        wanted += grows
        place += 1
    return place - slot


def _tables(file: File, header: Header) -> Iterator[tuple[int, int]]:
    """Number and place of each L2 table."""
    needed = -(-header.size // (header.cluster * header.per_table))
    for first in range(0, needed, SOME_L1):
        some = _numbers(file, header.l1 + first * 8, min(SOME_L1, needed - first))
        for number, entry in enumerate(some, first):
            if not entry:
                continue
            if entry & ~(PLACE | COPIED) or entry & PLACE & (header.cluster - 1):
                raise IntegrityError(
                    "image is damaged: a bad entry in its L1 table", file=file.path, entry=number
                )
            if entry & PLACE:
                yield number, entry & PLACE


def _numbers(file: File, place: int, count: int) -> tuple[int, ...]:
    raw = file.pread(count * 8, place)
    if len(raw) != count * 8:
        raise IntegrityError("image ends too early", file=file.path, offset=place)
    return struct.unpack(f">{count}Q", raw)


def _clusters(
    header: Header, start: int, length: int, entry: int, bitmap: int, *, end: int
) -> Iterator[Record]:
    """The blocks of the clusters of a range of the guest; the file ends at ``end``."""
    if entry & PACKED:
        yield from _packed(header, start, length, entry, end)
        return
    place = entry & PLACE
    known = PLACE | COPIED | (0 if header.extended or header.version < 3 else ZERO)
    if entry & ~known or place & (header.cluster - 1):
        raise IntegrityError("image is damaged: a bad entry in an L2 table")
    if header.extended:
        yield from _subclusters(header, start, length, place, bitmap)
    elif entry & ZERO:
        yield Record(start, length, 0, 0, Kind.ZERO, NO_DIGEST)
    elif place:
        yield from _plain(start, length, place)


def _plain(start: int, length: int, place: int) -> Iterator[Record]:
    for done in range(0, length, MAX_BLOCK):
        part = min(MAX_BLOCK, length - done)
        yield Record(start + done, part, place + done, part, Kind.DATA, NO_DIGEST)


def _subclusters(
    header: Header, start: int, length: int, place: int, bitmap: int
) -> Iterator[Record]:
    held, zero = bitmap & LOW, bitmap >> SUBCLUSTERS
    if held & zero or (held and not place):
        raise IntegrityError("image is damaged: a bad bitmap in an L2 table")
    size = header.cluster // SUBCLUSTERS
    for number in range(-(-length // size)):
        offset, part = number * size, min(size, length - number * size)
        if held >> number & 1:
            yield from _plain(start + offset, part, place + offset)
        elif zero >> number & 1:
            yield Record(start + offset, part, 0, 0, Kind.ZERO, NO_DIGEST)


def _packed(header: Header, start: int, length: int, entry: int, end: int) -> Iterator[Record]:
    if header.zstd:
        raise FormatError("clusters are compressed with zstd, which is not read")
    shift = 62 - (header.cluster_bits - 8)
    place = entry & ((1 << shift) - 1)
    sectors = ((entry & (PACKED - 1)) >> shift) + 1
    # the last sector may be beyond the end of the file
    stored = min(sectors * SECTOR - place % SECTOR, end - place)
    if stored <= 0:
        raise IntegrityError("image ends too early", offset=place)
    for skip in range(0, length, MAX_BLOCK):
        part = min(MAX_BLOCK, length - skip)
        yield Record(start + skip, part, place, stored, Kind.DATA, NO_DIGEST, skip, header.cluster)
