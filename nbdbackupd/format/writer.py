"""Writing a stream (or a raw image) and its index in one pass, from several threads.

Three steps for each block, so that the costly ones run in parallel and the file is still written
strictly in guest order, without a second look at any byte:

* ``prepare`` (any thread): zero test, digest, compression, Adler-32 of the payload;
* ``place`` (one thread at a time, in guest order): position in the file, index record, running sum;
* ``write`` (any thread): one positioned write.
"""

import array
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdbackupd.errors import IntegrityError
from nbdbackupd.files import HeldFile
from nbdbackupd.format import adler, blocks, qcow2
from nbdbackupd.format.index import HEADER, NO_DIGEST, RECORD, IndexHeader, Kind, Record
from nbdbackupd.format.stream import (
    COMP,
    DATA,
    HEADER_LENGTH,
    META,
    STOP,
    TERMINATOR,
    ZERO,
    StreamMeta,
    pack_header,
)
from nbdbackupd.model.chain import Codec, Compression, DigestKind

META_ROOM: Final = 1024
"""The meta frame's payload is padded to a multiple of this, so that it can be written last."""

PROBE: Final = bytes(64)
CHUNK: Final = 1 << 20
MAX_PARTS: Final = 900
"""Pieces of one write; Linux takes 1024 (IOV_MAX)."""

DROP_EVERY: Final = 128 << 20
"""Bytes after which what was written is flushed and dropped from the page cache."""


@dataclass(slots=True)
class Block:
    """One block on its way into the file; filled in by the three steps."""

    offset: int
    length: int
    payload: adler.Buffer = b""
    digest: bytes = NO_DIGEST
    adler32: int = adler.START
    position: int = 0
    head: bytes = b""

    @property
    def is_zero(self) -> bool:
        """Whether the block reads as zeroes and needs no payload."""
        return not self.payload


@dataclass(frozen=True, slots=True)
class Written:
    """What a finished file holds; sizes in bytes."""

    file_size: int
    adler32: int
    index_size: int
    data_bytes: int
    zero_bytes: int


class _BlockWriter:
    """What both layouts share: preparing blocks, the index, dropping the page cache."""

    def __init__(
        self,
        path: Path,
        index: Path,
        *,
        disk_size: int,
        compression: Compression | None,
        digest: DigestKind,
        is_there: bool = False,
    ) -> None:
        self._compression = compression
        self._digest = digest
        self._disk_size = disk_size
        self._count = 0
        self._data_bytes = 0
        self._zero_bytes = 0
        self._dropped = 0
        kind = os.O_NOFOLLOW | os.O_NONBLOCK if is_there else os.O_CREAT | os.O_EXCL
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | kind, 0o600)
        try:
            fd = os.open(index, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._fd)
            raise
        self._records = io.BufferedWriter(io.FileIO(fd, "r+b"), 1 << 18)
        self._records.write(bytes(HEADER.size))

    def close(self) -> None:
        """Close both files; after ``finish`` or to give up. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._records.close()

    def prepare(self, offset: int, view: memoryview) -> Block:
        """Hash and compress the guest bytes at ``offset``; ``view`` must live until ``write``."""
        length = len(view)
        if view[:64] == PROBE[:length] and bytes(view) == bytes(length):
            return Block(offset, length)
        payload: adler.Buffer = view
        if self._compression is not None:
            payload = blocks.compress(view, self._compression)
        return Block(offset, length, payload, blocks.digest(view, self._digest), self._sum(payload))

    def _sum(self, payload: adler.Buffer) -> int:
        return adler.adler32(payload)

    def zero(self, offset: int, length: int) -> Block:
        """A block of zeroes, of any length."""
        return Block(offset, length)

    def _note(self, block: Block) -> None:
        """Append the block's index record and count it."""
        if block.is_zero:
            record = (block.offset, block.length, 0, 0, Kind.ZERO, NO_DIGEST)
            self._zero_bytes += block.length
        else:
            stored = len(block.payload)
            record = (block.offset, block.length, block.position, stored, Kind.DATA, block.digest)
            self._data_bytes += block.length
        self._records.write(RECORD.pack(*record))
        self._count += 1

    def _finish_index(self, *, raw: bool = False, qcow2: bool = False) -> int:
        codec = self._compression.codec if self._compression is not None else Codec.NONE
        header = IndexHeader(
            self._disk_size, self._count, codec, raw, digest=self._digest, qcow2=qcow2
        )
        self._records.seek(0)
        self._records.write(header.pack())
        self._records.flush()
        os.fsync(self._records.fileno())
        return HEADER.size + self._count * RECORD.size

    def _drop_cache(self, end: int) -> None:
        """Write back and forget what lies before ``end``: it would only push out the guest's.

        Two threads may get here at once; the worst is one flush too many.
        """
        if end - self._dropped >= DROP_EVERY:
            self._dropped = end
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, end, os.POSIX_FADV_DONTNEED)

    def _sync(self) -> None:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class StreamWriter(_BlockWriter):
    """Writes one stream file and its index; fits the copy pipeline's sink."""

    def __init__(
        self,
        path: Path,
        index: Path,
        *,
        meta: StreamMeta,
        digest: DigestKind = DigestKind.SHA256,
    ) -> None:
        """Create both files, which must not exist.

        ``meta.data_size`` may be 0 here: the meta frame is written at the end, with the number of
        data bytes that were stored; and it says how they are compressed.
        """
        super().__init__(
            path, index, disk_size=meta.virtual_size, compression=meta.compression, digest=digest
        )
        self._meta = meta
        size = len(self._meta_json(1 << 62))
        self._meta_room = -(-size // META_ROOM) * META_ROOM
        self._first = HEADER_LENGTH + self._meta_room + len(TERMINATOR)
        self._end = self._first
        self._adler = adler.START
        self._pending: Block | None = None
        self._sizes = array.array("Q")

    def place(self, block: Block) -> None:
        """Give the block its place. Call in guest order, one thread at a time."""
        if block.is_zero:
            if self._pending is not None:
                if self._pending.offset + self._pending.length == block.offset:
                    self._pending.length += block.length
                    return
                self._emit(block, self._take_pending())
            self._pending = replace(block)
            return
        head = self._take_pending() + pack_header(DATA, block.offset, block.length)
        self._emit(block, head)
        block.position = self._end
        payload = block.payload
        self._adler = adler.combine(self._adler, block.adler32, len(payload))
        self._adler = adler.adler32(TERMINATOR, self._adler)
        self._end += len(payload) + len(TERMINATOR)
        if self._compression is not None:
            self._sizes.append(len(payload))
        self._note(block)

    def _emit(self, block: Block, head: bytes) -> None:
        """``head`` will be written together with ``block``, right before its payload."""
        block.head = head
        block.position = self._end
        self._adler = adler.adler32(head, self._adler)
        self._end += len(head)
        if block.is_zero:
            block.position = self._end

    def _take_pending(self) -> bytes:
        """The header of the zero range that was held back, so that neighbours could join it."""
        if self._pending is None:
            return b""
        held, self._pending = self._pending, None
        self._note(held)
        return pack_header(ZERO, held.offset, held.length)

    def write(self, *blocks: Block) -> None:
        """Write what ``place`` gave places, one after the other; any thread, any order."""
        parts: list[adler.Buffer] = []
        start = end = 0
        for block in blocks:
            if block.is_zero and not block.head:
                continue
            begin = block.position - len(block.head)
            if begin != end or len(parts) > MAX_PARTS:
                _write_all(self._fd, parts, start)
                parts, start, end = [], begin, begin
            parts.append(block.head)
            end = block.position
            if not block.is_zero:
                parts += (block.payload, TERMINATOR)
                end += len(block.payload) + len(TERMINATOR)
        _write_all(self._fd, parts, start)
        self._drop_cache(end)

    def finish(self) -> Written:
        """Write trailer, meta and index header, and fsync both files."""
        tail = self._take_pending() + pack_header(STOP, 0, 0)
        if self._compression is not None:
            sizes = json.dumps(self._sizes.tolist()).encode()
            tail += sizes + TERMINATOR + pack_header(COMP, 0, len(sizes))
        _write_all(self._fd, [tail], self._end)
        meta = self._meta_json(self._data_bytes).ljust(self._meta_room) + TERMINATOR
        meta = pack_header(META, 0, self._meta_room) + meta
        _write_all(self._fd, [meta], 0)
        total = adler.combine(adler.adler32(meta), self._adler, self._end - self._first)
        total = adler.adler32(tail, total)
        index_size = self._finish_index()
        self._sync()
        return Written(self._end + len(tail), total, index_size, self._data_bytes, self._zero_bytes)

    def _meta_json(self, data_size: int) -> bytes:
        document = replace(self._meta, data_size=data_size).to_json()
        return json.dumps(document, indent=4).encode()


class RawWriter(_BlockWriter):
    """Writes one disk as a plain sparse image, with the same index beside it."""

    def __init__(
        self,
        path: Path,
        index: Path,
        *,
        disk_size: int,
        digest: DigestKind = DigestKind.SHA256,
    ) -> None:
        """Create both files, which must not exist; the image gets its full size at once."""
        super().__init__(path, index, disk_size=disk_size, compression=None, digest=digest)
        try:
            os.ftruncate(self._fd, disk_size)
        except BaseException:
            self.close()
            raise

    def _sum(self, _payload: adler.Buffer) -> int:
        """None: a raw image carries no sum."""
        return 0

    def place(self, block: Block) -> None:
        """Note the block; its place is its guest offset."""
        block.position = block.offset
        self._note(block)

    def write(self, *blocks: Block) -> None:
        """Write data; zeroes stay holes."""
        for block in blocks:
            if not block.is_zero:
                _write_all(self._fd, [block.payload], block.position)
                self._drop_cache(block.position)

    def finish(self) -> Written:
        """Write the index header and fsync both files; ``adler32`` is 0 for a raw image."""
        index_size = self._finish_index(raw=True)
        self._sync()
        return Written(self._disk_size, 0, index_size, self._data_bytes, self._zero_bytes)


class ImageIndexer(_BlockWriter):
    """Makes the index of a qcow2 image that QEMU has written, which stays as it is.

    From then on nobody asks the image's own tables any more. What they say now is not trusted:
    the guest may have got hold of its QEMU.
    """

    def __init__(
        self, path: Path, index: Path, *, disk_size: int, digest: DigestKind = DigestKind.SHA256
    ) -> None:
        """Open the image, and create the index, which must not exist."""
        super().__init__(
            path, index, disk_size=disk_size, compression=None, digest=digest, is_there=True
        )
        self._path = path

    def describe(self, *, backing: str, check: Callable[[], None]) -> tuple[Written, str]:
        """Index each block, prove the header, fsync both files; returns the image's SHA-256, too.

        ``backing`` is the name that the image must have below it; without one it must hold the
        whole disk, and what it does not hold is zero. ``check`` is called now and then and may
        raise. Raises IntegrityError, FormatError for an image that no backup job writes, OSError.
        """
        file = HeldFile(self._fd, self._path)
        header = qcow2.read_header(file)
        if header.size != self._disk_size or qcow2.backing_name(file) != backing:
            raise IntegrityError("image is not the one that QEMU was given", file=self._path)
        end = 0
        for record in qcow2.records(file, header):
            check()
            if not backing and record.offset > end:
                self._note(self.zero(end, record.offset - end))
            self._note(self._block(file, record))
            end = record.end
        if not backing and end < self._disk_size:
            self._note(self.zero(end, self._disk_size - end))
        digest = hashlib.sha256()
        for place in range(0, file.size, CHUNK):
            check()
            digest.update(file.pread(min(CHUNK, file.size - place), place))
        index_size = self._finish_index(qcow2=True)
        self._sync()
        written = Written(file.size, 0, index_size, self._data_bytes, self._zero_bytes)
        return written, digest.hexdigest()

    def _block(self, file: HeldFile, record: Record) -> Block:
        if record.kind == Kind.ZERO:
            return self.zero(record.offset, record.length)
        data = file.pread(record.length, record.position)
        if record.whole or len(data) != record.length:
            raise IntegrityError(
                "image holds a cluster that no backup job writes", file=self._path,
                guest=record.offset,
            )  # fmt: skip
        block = self.prepare(record.offset, memoryview(data))
        block.position = record.position
        return block

    def _sum(self, _payload: adler.Buffer) -> int:
        """None: an image carries no sum."""
        return 0


def _write_all(fd: int, parts: Iterable[adler.Buffer], position: int) -> None:
    """``pwritev`` until nothing is left: a short write is no error on its own."""
    left = [memoryview(part) for part in parts if len(part)]
    while left:
        written = os.pwritev(fd, left, position)
        position += written
        ends = list(itertools.accumulate(len(part) for part in left))
        done = sum(1 for end in ends if end <= written)
        rest = written - (ends[done - 1] if done else 0)
        left = left[done:]
        if rest:
            left[0] = left[0][rest:]
