"""The new stream of one disk of a point that others are merged into.

Payloads are taken over as they are stored, each proven by its digest on the way. Blocks of which
newer points cover a part are cut at the seams and packed anew, with their neighbours within the
same 1 MiB, so that a disk does not fall to pieces over the years.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import IntegrityError
from nbdbackupd.format import adler, stream
from nbdbackupd.format.index import HEADER, MAX_BLOCK, NO_DIGEST, RECORD, Kind, Record
from nbdbackupd.format.stream import HEADER_LENGTH, TERMINATOR, StreamMeta
from nbdbackupd.format.writer import DROP_EVERY, META_ROOM, Block, StreamWriter, Written
from nbdbackupd.model import flatten
from nbdbackupd.model.chain import BackupSet, DiskMode, RestorePoint
from nbdbackupd.model.flatten import Piece
from nbdbackupd.model.removal import DiskMerge, Removal, disk_merges
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.frames import FrameCache
from nbdbackupd.ops.sets.layers import Layer

FRAMES: Final = 16 << 20
"""Bytes of unpacked frames and cut blocks that are kept; a frame of an imported set may be more."""

FRAME_ROOM: Final = HEADER_LENGTH + len(TERMINATOR) + RECORD.size + len("1114112, ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What all disks of a removal share; ``progress`` gets disk, position and size."""

    directory: Path
    program: str
    progress: Callable[[str, int, int], None]
    cancelled: Callable[[], None]
    pace: Throttle | None = None


Run = list[Piece[Record]]
"""Pieces that follow one another without a gap: data of at most ``MAX_BLOCK``, or one of zeroes."""


class Source:
    """The layers of one disk merge, newest first; a context manager that owns their files."""

    def __init__(self, tools: Tools, merge: DiskMerge) -> None:
        """Open and prove all but the blocks.

        Raises IntegrityError, FormatError.
        """
        self._mode = merge.mode
        self._stack = ExitStack()
        self._cut = FrameCache(FRAMES)
        frames = FrameCache(FRAMES)
        self._scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
        self._view = memoryview(mmap.mmap(-1, MAX_BLOCK))
        self.layers: list[Layer] = []
        try:
            for point in merge.sources:
                disk = point.disk(merge.target)
                layer = layering.open_proven(tools.directory, point, disk, tools.cancelled)
                layer.frames = frames
                self.layers.append(self._stack.enter_context(layer))
        except BaseException:
            self._stack.close()
            raise
        self.size = self.layers[0].size

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def forget(self) -> None:
        """Drop what was read from the page cache: it would only push out the guest's."""
        for layer in self.layers:
            with layer.file.lent() as fd:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def runs(self) -> Iterator[Run]:
        """What the new stream holds, ascending.

        Raises IntegrityError if the layers of a whole disk leave a byte out.
        """
        run: Run = []
        length = 0
        for piece in self._pieces():
            is_data = piece.block is not None and piece.block.kind == Kind.DATA
            follows = run and run[-1].end == piece.offset and piece.offset % MAX_BLOCK
            if run and not (is_data and follows and length + piece.length <= MAX_BLOCK):
                yield run
                run, length = [], 0
            if is_data:
                run.append(piece)
                length += piece.length
            else:
                yield [piece]
        if run:
            yield run

    def _pieces(self) -> Iterator[Piece[Record]]:
        """Data, and zeroes: those without a block are what no layer holds, where that is zero."""
        lowest = min(layer.size for layer in self.layers)
        found = flatten.pieces(
            [flatten.Layer(layer.size, layer.records()) for layer in self.layers]
        )
        for piece in found:
            if piece.block is not None:
                yield piece
            elif self._mode is DiskMode.FULL and piece.offset < lowest:
                raise IntegrityError(
                    "no block holds a part of the disk",
                    guest=piece.offset,
                    **self.layers[-1].where,
                )
            elif piece.end > lowest:
                # what the disk lost by shrinking must not come back from older points
                start = max(piece.offset, lowest)
                yield Piece(start, piece.end - start, -1, None)

    def blocks(self, run: Run, writer: StreamWriter) -> Iterator[Block]:
        """The blocks of a run; each is to be written before the next is asked for."""
        if is_zero(run):
            yield writer.zero(run[0].offset, run[0].length)
        elif is_cut(run):
            buffer = bytearray(run[-1].end - run[0].offset)
            for piece in run:
                start = piece.offset - run[0].offset
                buffer[start : start + piece.length] = self._part(piece)
            yield writer.prepare(run[0].offset, memoryview(buffer))
        else:
            for piece in run:
                yield self._whole(piece, writer)

    def _whole(self, piece: Piece[Record], writer: StreamWriter) -> Block:
        record, layer = self._of(piece)
        view = self._view[: record.length]
        stored = layer.read(record, view, self._scratch)
        newest = self.layers[0]
        is_same = (layer.codec, layer.digest) == (newest.codec, newest.digest)
        if stored is None or not is_same or record.digest == NO_DIGEST:
            return writer.prepare(record.offset, view)
        total = adler.adler32(stored)
        return Block(record.offset, record.length, stored, record.digest, total)

    def _part(self, piece: Piece[Record]) -> memoryview:
        """The bytes of a piece, of a block that is read once for all its pieces."""
        record, layer = self._of(piece)

        def load() -> bytes:
            layer.read(record, self._view[: record.length], self._scratch)
            return bytes(self._view[: record.length])

        # not the frames' cache: a block's frame is got from that while the block is loaded
        found = self._cut.get((piece.layer, record.offset), record.length, load)
        start = piece.offset - record.offset
        return memoryview(found)[start : start + piece.length]

    def _of(self, piece: Piece[Record]) -> tuple[Record, Layer]:
        assert piece.block is not None  # noqa: S101 - for the type checker
        return piece.block, self.layers[piece.layer]


def is_zero(run: Run) -> bool:
    """Whether a run is one of zeroes."""
    return run[0].block is None or run[0].block.kind == Kind.ZERO


def is_cut(run: Run) -> bool:
    """Whether a run of data holds a part of a block, and so is packed anew."""
    return any(each.block is not None and each.length != each.block.length for each in run)


def room(directory: Path, known: BackupSet, removal: Removal, cancelled: Callable[[], None]) -> int:
    """What all new streams and indexes of a removal take at most. Raises as ``Source``."""
    tools = Tools(directory=directory, program="", progress=lambda *_: None, cancelled=cancelled)
    merges = [each for some in removal.merges for each in disk_merges(known, some)]
    return sum(_room(tools, each) for each in merges)


def _room(tools: Tools, merge: DiskMerge) -> int:
    total = HEADER.size + 2 * META_ROOM + 4 * HEADER_LENGTH
    with closing(Source(tools, merge)) as source:
        for run in source.runs():
            tools.cancelled()
            if is_cut(run):
                total += layering.MAX_STORED + FRAME_ROOM
            else:
                held = sum(each.block.stored for each in run if each.block is not None)
                total += held + len(run) * FRAME_ROOM
    return total


def write(tools: Tools, merge: DiskMerge, into: RestorePoint, file: Path, index: Path) -> Written:
    """Write the stream of a disk of ``into`` and its index, both new and durable afterwards.

    ``into`` is the point as it will be. Raises IntegrityError for damage that is met on the way,
    NoSpaceError or RepositoryError, and what ``tools.cancelled`` raises.
    """
    newest = merge.sources[0].disk(merge.target)
    meta = _meta(tools, merge, into)
    with ExitStack() as stack:
        stack.enter_context(durable.translate_os_errors("write", file))
        source = stack.enter_context(closing(Source(tools, merge)))
        writer = StreamWriter(file, index, meta=meta, digest=newest.digest)
        stack.callback(writer.close)
        forgotten = 0
        for run in source.runs():
            tools.cancelled()
            if run[-1].end - forgotten >= DROP_EVERY:
                source.forget()
                forgotten = run[-1].end
            if tools.pace is not None and not is_zero(run):
                tools.pace.wait(run[-1].end - run[0].offset, tools.cancelled)
            for block in source.blocks(run, writer):
                writer.place(block)
                writer.write(block)
            tools.progress(merge.target, run[-1].end, source.size)
        written = writer.finish()
        source.forget()
        tools.progress(merge.target, source.size, source.size)
    return written


def _meta(tools: Tools, merge: DiskMerge, into: RestorePoint) -> StreamMeta:
    newest = merge.sources[0].disk(merge.target)
    path = tools.directory / newest.file
    found = stream.read_meta(path)
    if found.codec is not newest.codec:
        raise IntegrityError("stream and manifest disagree", file=path, disk=merge.target)
    return replace(
        found,
        virtual_size=newest.size,
        data_size=0,
        disk_name=merge.target,
        disk_format=found.disk_format or newest.format,
        parent_checkpoint=into.base_checkpoint,
        incremental=merge.mode is DiskMode.DELTA,
        stream_version=stream.VERSION,
        extra=(("point", into.id), ("program", tools.program)),
    )
