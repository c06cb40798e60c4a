"""Restore points for tests: values only, or with files that fit."""

import hashlib
import zlib
from dataclasses import replace

from nbdbackupd.model.chain import (
    Consistency,
    DiskMode,
    DiskPoint,
    ImageLayer,
    Level,
    RestorePoint,
    SkippedDisk,
    StoredFile,
)

UUID = "5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77"
CHAIN = "c0ffee00"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(name: str, data: bytes, role: str, disk: str = "") -> StoredFile:
    return StoredFile(name=name, role=role, size=len(data), sha256=sha(data), disk=disk)


def disk_point(target: str, file: str, data: bytes, index: bytes) -> DiskPoint:
    return DiskPoint(
        target=target,
        mode=DiskMode.FULL,
        size=1 << 20,
        format="qcow2",
        source=f"/images/{target}.qcow2",
        file=file,
        file_size=len(data),
        adler32=zlib.adler32(data),
        index=stored(f"{file}.index", index, "disk-index", target),
        data_bytes=4096,
        zero_bytes=8192,
        layers=(ImageLayer(path=f"/images/{target}.qcow2", format="qcow2", device=1, inode=2),),
        bitmap=f"nbdbackup-{CHAIN}-1",
    )


def full_point(ident: str = "p1", *, disks: tuple[DiskPoint, ...] = ()) -> RestorePoint:
    return RestorePoint(
        id=ident,
        sequence=1,
        chain=CHAIN,
        level=Level.FULL,
        created="2026-01-31T23:59:59Z",
        domain="vm1",
        uuid=UUID,
        disks=disks or (disk_point("vda", "vda.full.data", b"full", b"index"),),
        consistency=Consistency.CRASH,
        checkpoint=f"nbdbackup-{CHAIN}-1",
        skipped=(SkippedDisk("sda", "cdrom"),),
        warnings=("freeze failed",),
        autostart=True,
        program="nbdbackupd 0.1.0",
    )


def child_of(
    parent: RestorePoint,
    *,
    level: Level = Level.INC,
    sequence: int = 0,
    disks: tuple[DiskPoint, ...] = (),
) -> RestorePoint:
    """A point that hangs on ``parent`` (whose digest must be known)."""
    number = sequence or parent.sequence + 1
    checkpoint = f"nbdbackup-{CHAIN}-{number}" if level is Level.INC else ""
    name = f"vda.inc.{checkpoint}.data" if level is Level.INC else f"vda.diff.p{number}.data"
    found = disks or (disk_point("vda", name, b"more", b"idx"),)
    return replace(
        parent,
        id=f"p{number}",
        sequence=number,
        level=level,
        parent=parent.id,
        parent_digest=parent.digest,
        base_checkpoint=parent.checkpoint,
        checkpoint=checkpoint,
        disks=tuple(replace(disk, mode=DiskMode.DELTA) for disk in found),
        files=(),
        digest="",
    )
