"""Proving the files of one disk in one point: index, stream or raw image, checksum file."""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd.errors import FormatError, IntegrityError
from nbdbackupd.files import open_sized
from nbdbackupd.format import stream
from nbdbackupd.format.index import MAX_BLOCK, Kind
from nbdbackupd.format.stream import HEADER_LENGTH, META, TERMINATOR, StreamMeta, StreamReader
from nbdbackupd.model.chain import DiskMode, DiskPoint, Layout, RestorePoint
from nbdbackupd.ops.sets import layers, peer_index
from nbdbackupd.ops.sets.layers import IndexedLayer, ScannedLayer
from nbdbackupd.ops.verify import blocks
from nbdbackupd.ops.verify.blocks import Prover
from nbdbackupd.ops.verify.findings import Findings, Problem
from nbdbackupd.repo import layout

MAX_META: Final = stream.MAX_META


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskCheck:
    """All that the checks of one disk share."""

    directory: Path
    point: RestorePoint
    disk: DiskPoint
    findings: Findings
    prover: Prover
    progress: Callable[[int], None]
    cancelled: Callable[[], None]

    def run(self) -> None:
        """Prove all files of the disk; what is wrong goes to the findings."""
        sound = self._check_index()
        try:
            found = self._open_stream()
            if found is None:
                return
            adler = self._check_by_index() if sound else self._check_by_scan()
        except (FormatError, OSError) as err:
            self._error(err, self.disk.file)
            return
        if self.disk.layout is Layout.STREAM:
            if adler is not None and adler != self.disk.adler32:
                self._problem("Adler-32 of the file is not the manifest's", self.disk.file)
            self._check_checksum_file()

    def _problem(self, message: str, file: str, offset: int | None = None) -> None:
        self.findings.add(
            Problem(
                message=message,
                point=self.point.id,
                disk=self.disk.target,
                file=file,
                offset=offset,
            )
        )

    def _error(self, err: FormatError | OSError, file: str) -> None:
        self.findings.add_error(err, point=self.point.id, disk=self.disk.target, file=file)

    def _check_index(self) -> bool:
        """Whether the index is what the manifest vouches for."""
        stored = self.disk.index
        path = self.directory / stored.name
        try:
            layers.check_size(path, stored.size)
            if layers.sha256_file(path, self.cancelled) != stored.sha256:
                raise IntegrityError("SHA-256 of the file is not the manifest's")
        except (FormatError, OSError) as err:
            self._error(err, stored.name)
            return False
        return True

    def _open_stream(self) -> int | None:
        """The size of the stream, or None if it is not there."""
        path = self.directory / self.disk.file
        try:
            layers.check_size(path, self.disk.file_size)
        except IntegrityError as err:
            self._error(err, self.disk.file)
            found = err.fields.get("found")
            return found if isinstance(found, int) else None
        return self.disk.file_size

    def _check_by_index(self) -> int | None:
        """Prove the stream as its index wants it; its Adler-32."""
        name, disk = self.disk.file, self.disk

        def report(message: str, offset: int) -> None:
            self._problem(message, name, offset)

        index = self.directory / disk.index.name
        with IndexedLayer(self.directory / name, index, whole=disk.mode is DiskMode.FULL) as layer:
            self._check_records(layer)
            if layer.raw:
                self.prover.prove(layer, blocks.raw_runs(layer), report, self.progress)
                blocks.prove_raw_zeroes(layer, report, self.cancelled)
                return None
            if layer.index.header.layout is Layout.QCOW2:
                self._check_image(layer)
                return None
            if layer.index.header.frames:
                return self._check_imported(layer)
            first = self._check_meta(layer)
            runs = blocks.stream_runs(layer, first)
            return self.prover.prove(layer, runs, report, self.progress)

    def _check_imported(self, layer: IndexedLayer) -> int:
        """A stream with larger frames: its frames against the index, each block, its Adler-32."""
        path, name = layer.path, self.disk.file
        with ScannedLayer(path, stream.read_meta(path)) as scanned:
            if not peer_index.fits(layer, scanned, self.cancelled):
                self._problem("frames of the stream are not what the index says", name)
        self._check_blocks(layer)
        return layers.adler32_file(path, self.cancelled)

    def _check_image(self, layer: IndexedLayer) -> None:
        """An image that QEMU wrote: all of it, tables as well, and each block."""
        if layers.sha256_file(layer.path, self.cancelled) != self.disk.sha256:
            self._problem("SHA-256 of the file is not the manifest's", self.disk.file)
        self._check_blocks(layer)

    def _check_blocks(self, layer: IndexedLayer) -> None:
        name = self.disk.file
        view = memoryview(mmap.mmap(-1, MAX_BLOCK))
        scratch = memoryview(mmap.mmap(-1, layers.MAX_STORED))
        for record in layer.records():
            self.cancelled()
            if record.kind != Kind.DATA:
                continue
            try:
                layer.read(record, view[: record.length], scratch)
            except IntegrityError as err:
                self._error(err, name)
            self.progress(record.position)

    def _check_records(self, layer: IndexedLayer) -> None:
        """The index against the manifest: size, flags, sums, coverage."""
        disk, header, name = self.disk, layer.index.header, self.disk.index.name
        said = (header.disk_size, header.codec, header.layout, header.digest)
        if said != (disk.size, disk.codec, disk.layout, disk.digest):
            self._problem("header of the index does not fit the manifest", name, 0)
        end = data = zero = 0
        for record in layer.records():
            self.cancelled()
            if layer.whole and record.offset != end:
                self._problem(f"guest bytes {end} to {record.offset} are in no block", name)
            end = record.end
            if record.kind == Kind.DATA:
                data += record.length
            else:
                zero += record.length
        if layer.whole and end != disk.size:
            self._problem(f"guest bytes {end} to {disk.size} are in no block", name)
        if (data, zero) != (disk.data_bytes, disk.zero_bytes):
            self._problem("sums of the index are not the manifest's", name)

    def _check_meta(self, layer: IndexedLayer) -> int:
        """The meta frame against the manifest; where it ends.

        Raises IntegrityError if it is so damaged that its end is not known.
        """
        room = memoryview(bytearray(HEADER_LENGTH))
        layer.read_at(room, 0)
        kind, start, length = stream.parse_header(bytes(room), 0)
        if kind != META or start or length > MAX_META:
            raise IntegrityError("stream does not begin with a meta frame", offset=0)
        payload = memoryview(bytearray(length + len(TERMINATOR)))
        layer.read_at(payload, HEADER_LENGTH)
        end = HEADER_LENGTH + len(payload)
        if bytes(payload[length:]) != TERMINATOR:
            self._problem("bad frame terminator", self.disk.file, HEADER_LENGTH + length)
        try:
            meta = stream.parse_meta(bytes(payload[:length]))
        except FormatError as err:
            self._problem(err.message, self.disk.file, HEADER_LENGTH)
        else:
            self._compare_meta(meta)
        return end

    def _compare_meta(self, meta: StreamMeta) -> None:
        disk = self.disk
        wanted = {
            "virtualSize": (meta.virtual_size, disk.size),
            "dataSize": (meta.data_size, disk.data_bytes),
            "diskName": (meta.disk_name, disk.target),
            "incremental": (meta.incremental, disk.mode is DiskMode.DELTA),
            "checkpointName": (meta.checkpoint, self.point.checkpoint or meta.checkpoint),
        }
        for key, (found, expected) in wanted.items():
            if found != expected:
                self._problem(
                    f"meta frame says {key} {found!r}, the manifest {expected!r}", disk.file, 0
                )

    def _check_by_scan(self) -> int | None:
        """Without an index: the frames as they are, and the Adler-32."""
        path = self.directory / self.disk.file
        if self.disk.layout is Layout.RAW:
            return None
        if self.disk.layout is Layout.QCOW2:
            if layers.sha256_file(path, self.cancelled) != self.disk.sha256:
                self._problem("SHA-256 of the file is not the manifest's", self.disk.file)
            return None
        try:
            with StreamReader(path) as reader:
                meta = reader.meta
            self._compare_meta(meta)
            with ScannedLayer(path, meta) as layer:
                for _ in layer.records():
                    self.cancelled()
        except FormatError as err:
            self._error(err, self.disk.file)
        return layers.adler32_file(path, self.cancelled)

    def _check_checksum_file(self) -> None:
        name = layout.checksum(self.disk.file)
        text = str(self.disk.adler32).encode()
        try:
            with os.fdopen(open_sized(self.directory / name, len(text)), "rb") as file:
                found = file.read(len(text))
            if found != text:
                self._problem("Adler-32 in the checksum file is not the manifest's", name)
        except (FormatError, OSError) as err:
            self._error(err, name)
