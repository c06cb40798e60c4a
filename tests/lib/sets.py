"""Backup sets made by hand, without libvirt, and what each restored disk must look like."""

import hashlib
import os
import random
import subprocess
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from nbdbackupd.format import manifest
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.format.writer import RawWriter, StreamWriter
from nbdbackupd.model.chain import (
    Codec,
    Compression,
    Consistency,
    DigestKind,
    DiskMode,
    DiskPoint,
    Layout,
    Level,
    RestorePoint,
    StoredFile,
)
from nbdbackupd.repo import layout

UUID = "5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77"
CHAIN = "c0ffee00"
BEGIN = datetime.fromisoformat("2026-01-31T00:00:00+00:00")


@dataclass(frozen=True)
class Change:
    """Guest bytes at ``offset``: data, or so many zeroes."""

    offset: int
    data: bytes | int

    @property
    def length(self) -> int:
        return self.data if isinstance(self.data, int) else len(self.data)


@dataclass
class SetBuilder:
    """Writes points into a set; ``disks`` holds the guest's disks as they are now."""

    path: Path
    format: str = "qcow2"
    level: int | None = None
    codec: Codec = Codec.LZ4
    block: int = 64 << 10
    domain: str = "vm1"
    raw: bool = False
    digest: DigestKind = DigestKind.SHA256
    image_info: bytes = b""
    disks: dict[str, bytearray] = field(default_factory=dict)
    points: list[RestorePoint] = field(default_factory=list)
    images: list[dict[str, bytes]] = field(default_factory=list)

    @property
    def compression(self) -> Compression | None:
        return None if self.level is None else Compression(self.codec, self.level)

    def full(self, level: Level = Level.FULL) -> RestorePoint:
        """A point that holds the disks as they are."""
        changes = {target: tiles(bytes(disk), self.block) for target, disk in self.disks.items()}
        return self._point(level, changes, DiskMode.FULL)

    def inc(
        self, changes: dict[str, list[Change]], *, whole: tuple[str, ...] = (),
        level: Level = Level.INC,
    ) -> RestorePoint:  # fmt: skip
        """Apply the changes to the disks and save just them; ``whole`` disks are read in full."""
        for target, each in changes.items():
            apply(self.disks[target], each)
        stored = {target: sorted(changes.get(target, []), key=lambda c: c.offset)
                  for target in self.disks}  # fmt: skip
        for target in whole:
            stored[target] = tiles(bytes(self.disks[target]), self.block)
        return self._point(level, stored, DiskMode.DELTA, whole)

    def _point(
        self, level: Level, changes: dict[str, list[Change]], mode: DiskMode,
        whole: tuple[str, ...] = (),
    ) -> RestorePoint:  # fmt: skip
        self.path.mkdir(exist_ok=True)
        (self.path / "points").mkdir(exist_ok=True)
        number = len(self.points) + 1
        ident = f"point{number}"
        checkpoint = f"nbdbackup-{CHAIN}-{number}" if level in (Level.FULL, Level.INC) else ""
        bases = [each for each in self.points if each.makes_base]
        parent = bases[-1] if level in (Level.INC, Level.DIFF) else None
        files: list[StoredFile] = []
        disks = []
        for target, each in changes.items():
            this_mode = DiskMode.FULL if target in whole else mode
            name = layout.stream(
                target, level, checkpoint=checkpoint, point_id=ident,
                layout=Layout.RAW if self.raw else Layout.STREAM,
            )  # fmt: skip
            meta = StreamMeta(
                virtual_size=len(self.disks[target]), data_size=0, date="2026-01-31T12:00:00Z",
                disk_name=target, disk_format=self.format, checkpoint=checkpoint,
                compression=self.compression, parent_checkpoint=parent.checkpoint if parent else "",
                incremental=this_mode is DiskMode.DELTA,
            )  # fmt: skip
            disks.append(self._disk(name, meta, each, this_mode))
            if self.image_info:
                stored = layout.image_info(target, ident)
                files.append(self._file(stored, self.image_info, "image-info", target))
        xml = f"<domain><name>{self.domain}</name><!-- {ident} --></domain>".encode()
        files.append(self._file(layout.domain_xml(ident), xml, "domain-xml"))
        nvram = layout.copy("nvram", ident, "vm1_VARS.fd")
        files.append(
            self._file(nvram, f"vars {ident}".encode() * 100, "nvram", origin="/n/vm1_VARS.fd")
        )
        tree = layout.copy("tpm-state", ident, "tpm2/tpm2-00.permall")
        files.append(self._file(tree, b"tpm" * 77, "tpm-state", origin="/t/tpm2-00.permall"))
        point = RestorePoint(
            id=ident, sequence=number, chain=CHAIN, level=level,
            created=f"{BEGIN + timedelta(hours=number):%Y-%m-%dT%H:%M:%SZ}",
            domain=self.domain, uuid=UUID,
            disks=tuple(disks), consistency=Consistency.CRASH,
            parent=parent.id if parent else "", parent_digest=parent.digest if parent else "",
            checkpoint=checkpoint, base_checkpoint=parent.checkpoint if parent else "",
            files=tuple(files), program="test",
        )  # fmt: skip
        data = manifest.pack(point)
        (self.path / "points" / layout.manifest(number, ident)).write_bytes(data)
        self.points.append(manifest.parse(data))
        self.images.append({target: bytes(disk) for target, disk in self.disks.items()})
        return self.points[-1]

    def rewrite(self) -> None:
        """Write all manifests anew after ``points`` was changed by hand; links are renewed."""
        digests: dict[str, str] = {}
        for number, point in enumerate(self.points):
            linked = replace(point, parent_digest=digests.get(point.parent, ""))
            data = manifest.pack(linked)
            name = layout.manifest(point.sequence, point.id)
            (self.path / "points" / name).write_bytes(data)
            self.points[number] = manifest.parse(data)
            digests[point.id] = self.points[number].digest

    def _file(
        self, name: str, data: bytes, role: str, disk: str = "", origin: str = ""
    ) -> StoredFile:
        (self.path / name).write_bytes(data)
        return StoredFile(name, role, len(data), sha(data), origin=origin, disk=disk)

    def _disk(
        self, name: str, meta: StreamMeta, changes: list[Change], mode: DiskMode
    ) -> DiskPoint:
        path, index = self.path / name, self.path / layout.index(name)
        writer: StreamWriter | RawWriter
        if self.raw:
            writer = RawWriter(path, index, disk_size=meta.virtual_size, digest=self.digest)
        else:
            writer = StreamWriter(path, index, meta=meta, digest=self.digest)
        for change in changes:
            for offset, data in cut(change, self.block):
                if isinstance(data, int):
                    made = writer.zero(offset, data)
                else:
                    made = writer.prepare(offset, memoryview(data))
                writer.place(made)
                writer.write(made)
        written = writer.finish()
        writer.close()
        if not self.raw:
            (self.path / layout.checksum(name)).write_text(str(written.adler32))
        return DiskPoint(
            target=meta.disk_name, mode=mode, size=meta.virtual_size, format=self.format,
            source=f"/images/{meta.disk_name}.{'raw' if self.format == 'raw' else 'qcow2'}",
            file=name, file_size=written.file_size, adler32=written.adler32,
            index=StoredFile(
                index.name, "disk-index", written.index_size, sha(index.read_bytes()),
                disk=meta.disk_name,
            ),
            data_bytes=written.data_bytes, zero_bytes=written.zero_bytes,
            codec=Codec.NONE if self.raw else meta.codec, digest=self.digest,
            layout=Layout.RAW if self.raw else Layout.STREAM,
        )  # fmt: skip


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def apply(disk: bytearray, changes: list[Change]) -> None:
    """Write the changes into a disk."""
    for change in changes:
        data = bytes(change.data)  # so many zeroes for a number
        disk[change.offset : change.offset + change.length] = data


def cut(change: Change, block: int) -> list[tuple[int, bytes | int]]:
    """Data in pieces that a record can hold; zeroes as they are."""
    if isinstance(change.data, int):
        return [(change.offset, change.data)]
    return [
        (change.offset + start, change.data[start : start + block])
        for start in range(0, len(change.data), block)
    ]


def tiles(disk: bytes, block: int) -> list[Change]:
    """A whole disk as changes without gap: runs of zero blocks, and data."""
    found = []
    for start in range(0, len(disk), block):
        data = disk[start : start + block]
        found.append(Change(start, data if any(data) else len(data)))
    return found


def random_changes(rng: random.Random, size: int, count: int, grain: int = 512) -> list[Change]:
    """Ranges that don't overlap, in multiples of ``grain``; a third of them zeroes."""
    borders = sorted(rng.sample(range(size // grain + 1), min(2 * count, size // grain)))
    found = []
    for start, end in zip(borders[::2], borders[1::2], strict=False):
        length = (end - start) * grain
        zero = rng.random() < 0.33
        found.append(Change(start * grain, length if zero else rng.randbytes(length)))
    return found


def random_disk(rng: random.Random, size: int) -> bytearray:
    """A disk with data and large empty parts."""
    disk = bytearray(size)
    apply(disk, random_changes(rng, size, 6))
    return disk


def read_image(path: Path, format_: str) -> bytes:
    """The guest bytes of an image, as QEMU sees them."""
    if format_ == "raw":
        return path.read_bytes()
    out = path.with_name(f"{path.name}.converted")
    argv = ["qemu-img", "convert", "-f", format_, "-O", "raw", os.fspath(path), os.fspath(out)]
    subprocess.run(argv, check=True, timeout=60)
    data = out.read_bytes()
    out.unlink()
    return data
