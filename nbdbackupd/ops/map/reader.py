"""One disk of a restore point as it is read by NBD clients; runs within nbdkit.

The open files come from ``ops/map/map.py``, which has proven all but the blocks. What is read
is proven where that costs no other reads (docs/adr/0018-what-a-map-proves.md): every compressed
block, and every plain one that is read at once or, with ``prove``, at all. A block that was found
to be damaged is never given out, in part or whole.
"""

import dataclasses
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd import files
from nbdbackupd.errors import IntegrityError
from nbdbackupd.files import File, HeldFile
from nbdbackupd.format import blocks, qcow2
from nbdbackupd.format.index import MAX_BLOCK, NO_DIGEST, Index, Kind, Record
from nbdbackupd.model.chain import Codec
from nbdbackupd.model.view import ZERO, BlockPlace, View
from nbdbackupd.ops.sets.frames import FrameCache

ZEROES: Final = memoryview(bytes(1 << 20))
PART: Final = struct.Struct("<QQ16x")
"""Of a block that is a part of a frame: the guest bytes before it, and all of the frame."""

SMALL: Final = 16 << 10
"""Bytes of a read for which the rest of a frame may not be worth its unpacking."""

STEP: Final = 64 << 20
"""Guest bytes whose pieces are looked up at a time for extents: of a few bytes each at worst."""

MOST_EXTENTS: Final = 8192
"""In one answer; the client asks on from where it ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedFile:
    """A file that the server reads: an open descriptor, or -1, and what it is then opened by."""

    path: str
    fd: int = -1
    identity: files.Identity | None = None

    def open(self) -> File:
        """The file. Raises IntegrityError when it is read, if it is not the one it was."""
        path = Path(self.path)
        if self.fd >= 0:
            return HeldFile(self.fd, path)
        return File(path, identity=self.identity)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "ServedFile":
        """As it was before it became JSON."""
        identity = document["identity"]
        return cls(**{**document, "identity": tuple(identity) if identity else None})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedLayer:
    """One file of the disk's path, and its index, which is a part of ``index``.

    ``longest`` bounds a block, in guest bytes, and ``stored`` in the file. ``is_made``: the index
    was made for the server and has ``PART`` in place of digests. ``deflated``: blocks that are
    parts of a frame are of a qcow2 image's compressed clusters, the others plain.
    """

    stream: ServedFile
    index: ServedFile
    index_start: int
    index_size: int
    codec: Codec
    raw: bool
    is_made: bool
    longest: int
    stored: int
    deflated: bool = False

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "ServedLayer":
        """As it was before it became JSON."""
        parts = {name: ServedFile.from_json(document[name]) for name in ("stream", "index")}
        return cls(**{**document, **parts, "codec": Codec(document["codec"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedPlan:
    """What a server needs to know; travels as JSON. ``cache_bytes`` bounds unpacked blocks."""

    target: str
    whole: bool
    layers: tuple[ServedLayer, ...]
    cache_bytes: int
    prove: bool

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "ServedPlan":
        """The plan that ``to_json`` gave."""
        layers = tuple(ServedLayer.from_json(each) for each in document["layers"])
        return cls(**{**document, "layers": layers})


class ServedDisk:
    """The disk: read-only, for many threads; ``told`` gets a line for each damaged block."""

    def __init__(self, plan: ServedPlan, told: Callable[[str], None]) -> None:
        """Map the indexes. Raises IntegrityError for one that can't be."""
        self._layers = [_Layer(each, prove=plan.prove) for each in plan.layers]
        self._view = View(self._layers, whole=plan.whole)
        self._lock = threading.Lock()
        self._cache = FrameCache(plan.cache_bytes)
        self._looks: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._most_looks = plan.cache_bytes // MAX_BLOCK + 1
        self._told = told
        self._damaged: dict[tuple[int, int], str] = {}
        self.size = self._view.size

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the guest's bytes from ``offset`` on.

        Raises IntegrityError if a part of them is damaged, OSError if it can't be read.
        """
        with self._lock:
            spans = self._view.spans(offset, len(buffer))
        for at, length, layer, number in spans:
            part = buffer if length == len(buffer) else buffer[at - offset : at - offset + length]
            if layer >= 0:
                self._read_block(layer, number, at, part)
            elif layer == ZERO:
                _clear(part)
            else:
                raise IntegrityError("no block holds a part of the disk", guest=at)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Ranges (offset, length, whether all zero), ascending, alternating, from ``offset`` on.

        They may end before the range does, never before its first byte. Zeroes that lie in data
        count as data. Raises IntegrityError.
        """
        end, given = offset + length, 0
        start, was_zero = offset, False
        while offset < end and given < MOST_EXTENTS:
            with self._lock:
                spans = self._view.spans(offset, min(end - offset, STEP))
            for at, _, layer, _ in spans:
                is_zero = layer == ZERO
                if is_zero is not was_zero and at > start:
                    yield start, at - start, was_zero
                    start = at
                    given += 1
                was_zero = is_zero
            offset = spans[-1][0] + spans[-1][1]
        yield start, offset - start, was_zero

    def _read_block(self, layer: int, number: int, at: int, part: memoryview) -> None:
        key = (layer, number)
        if self._damaged and key in self._damaged:
            raise IntegrityError(self._damaged[key])
        files = self._layers[layer]
        try:
            if files.is_packed:
                record = files.record(number)
                # blocks that are parts of one frame share it
                place = (layer, record.position)
                start = record.skip + at - record.offset
                # a cluster of a qcow2 image has no such head
                is_small = len(part) <= SMALL and files.codec is not Codec.NONE
                if is_small and files.is_proven(number) and self._is_first_look(place):
                    part[:] = memoryview(files.head(record, start + len(part)))[start:]
                    return
                length = record.whole or record.length
                block = self._cache.get(place, length, lambda: files.unpacked(number, record))
                if record.whole:
                    files.check_part(number, record, block)
                part[:] = memoryview(block)[start : start + len(part)]
            else:
                files.read_plain(number, at, part)
        except IntegrityError as err:
            with self._lock:
                is_new = key not in self._damaged
                self._damaged[key] = str(err)
            if is_new:
                self._told(str(err))
            raise

    def _is_first_look(self, place: tuple[int, int]) -> bool:
        """Whether a frame is neither unpacked nor was looked at while the cache was filled anew.

        A frame of which one part is read is not worth the cache, and only that is unpacked.
        """
        if place in self._cache:
            return False
        with self._lock:
            if place in self._looks:
                self._looks.move_to_end(place)
                return False
            self._looks[place] = None
            if len(self._looks) > self._most_looks:
                self._looks.popitem(last=False)
        return True


class _Layer:
    """An open stream or raw image and its index."""

    def __init__(self, plan: ServedLayer, *, prove: bool) -> None:
        self._plan = plan
        self._prove = prove
        self._file = plan.stream.open()
        self.codec = plan.codec
        self.is_packed = plan.codec is not Codec.NONE or plan.deflated
        self.index = Index(plan.index.open(), start=plan.index_start, size=plan.index_size)
        # not every Python on a host has the library, and the server's may be another one
        blocks.require(self.index.header.digest, self.codec)
        self.size = self.index.header.disk_size
        self._proven = bytearray(len(self.index) + 7 >> 3)
        self._lock = threading.Lock()

    def record(self, number: int) -> Record:
        """A block of the index."""
        record = self.index.record(number)
        if not self._plan.is_made:
            return record
        skip, whole = PART.unpack(record.digest)
        return record._replace(digest=NO_DIGEST, skip=skip, whole=whole)

    def places(self, start: int) -> Iterator[BlockPlace]:
        """The blocks that end after ``start``; each is proven to be possible."""
        end = 0
        for number in range(self.index.find(start), len(self.index)):
            record = self.record(number)
            if record.offset < end or not self._fits(record):
                raise IntegrityError(
                    "the index names a block that can't be",
                    guest=record.offset,
                    file=self._plan.stream.path,
                )
            end = record.end
            yield BlockPlace(record.offset, record.length, number, record.kind == Kind.ZERO)

    def _fits(self, record: Record) -> bool:
        if not 0 < record.length <= self.size - record.offset:
            return False
        if record.kind == Kind.ZERO:
            return not record.stored
        if record.kind != Kind.DATA or record.length > self._plan.longest:
            return False
        if record.position + record.stored > self._file.size:
            return False
        if record.whole if self._plan.deflated else self.is_packed:
            fits = record.skip + record.length <= record.whole or not record.whole
            return fits and 0 < record.stored <= self._plan.stored
        if self._plan.raw and record.position != record.offset:
            return False
        return record.stored == record.length

    def unpacked(self, number: int, record: Record) -> bytes:
        """The guest bytes of a compressed block's frame; proven once, if the block is all of it."""
        stored = bytearray(record.stored)
        self._read_at(memoryview(stored), record.position)
        try:
            if self._plan.deflated:
                return qcow2.inflate(stored, record.whole) if record.whole else bytes(stored)
            block = blocks.decompress(stored, record.whole or record.length, self.codec)
        except IntegrityError as err:
            raise self._damage(err.message, record) from err
        if not record.whole:
            self._prove_once(number, record, block)
        return block

    def head(self, record: Record, length: int) -> bytes:
        """The first guest bytes of a compressed block's frame, which was proven before."""
        stored = bytearray(record.stored)
        self._read_at(memoryview(stored), record.position)
        try:
            return blocks.decompress_head(stored, length, self.codec)
        except IntegrityError as err:
            raise self._damage(err.message, record) from err

    def check_part(self, number: int, record: Record, frame: bytes) -> None:
        """Prove a block that is a part of a frame, once."""
        self._prove_once(
            number, record, memoryview(frame)[record.skip : record.skip + record.length]
        )

    def _prove_once(self, number: int, record: Record, block: bytes | memoryview) -> None:
        if not self.is_proven(number):
            self._check(record, block)
            self._note_proven(number)

    def read_plain(self, number: int, at: int, part: memoryview) -> None:
        """A part of a plain block, from guest offset ``at`` on."""
        offset, length, position = self.index.place(number)
        whole = len(part) == length
        if not (whole or self._prove) or self.is_proven(number):
            self._read_at(part, position + at - offset)
            return
        record = self.record(number)
        if record.digest == NO_DIGEST:
            self._read_at(part, position + at - offset)
            return
        block = part if whole else memoryview(bytearray(record.length))
        self._read_at(block, record.position)
        try:
            self._check(record, block)
        except IntegrityError:
            _clear(part)
            raise
        self._note_proven(number)
        if not whole:
            part[:] = block[at - record.offset : at - record.offset + len(part)]

    def is_proven(self, number: int) -> bool:
        """Whether a block was proven before, or has nothing that could prove it."""
        return bool(self._proven[number >> 3] >> (number & 7) & 1)

    def _note_proven(self, number: int) -> None:
        with self._lock:
            self._proven[number >> 3] |= 1 << (number & 7)

    def _check(self, record: Record, block: bytes | memoryview) -> None:
        kind = self.index.header.digest
        if record.digest != NO_DIGEST and blocks.digest(block, kind) != record.digest:
            raise self._damage(f"block is damaged: its {kind.label} does not match", record)

    def _damage(self, message: str, record: Record) -> IntegrityError:
        return IntegrityError(
            message, file=self._plan.stream.path, offset=record.position, guest=record.offset
        )

    def _read_at(self, view: memoryview, position: int) -> None:
        count = self._file.preadv(view, position)
        while count < len(view):
            if not count:
                raise IntegrityError(
                    "file ends too early", file=self._plan.stream.path, offset=position
                )
            view = view[count:]
            position += count
            count = self._file.preadv(view, position)


def _clear(part: memoryview) -> None:
    for start in range(0, len(part), len(ZEROES)):
        length = min(len(ZEROES), len(part) - start)
        part[start : start + length] = ZEROES[:length]
