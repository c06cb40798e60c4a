"""Real backup sets, small, made without a guest."""

from dataclasses import replace
from pathlib import Path

from nbdbackupd import durable
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.format.writer import StreamWriter
from nbdbackupd.model.chain import DiskMode, DiskPoint, Level, RestorePoint
from nbdbackupd.repo import layout
from nbdbackupd.repo.draft import Draft, Intent
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import points

DISK_SIZE = 1 << 20
BLOCK = 4096
KERNEL = "vmlinuz"
"""A file beside the set: if it is there, the guest boots it directly."""


def intent_for(number: int, *, level: Level = Level.INC) -> Intent:
    makes_base = level in (Level.FULL, Level.INC)
    return Intent(
        uuid=points.UUID,
        domain="vm1",
        chain=points.CHAIN,
        checkpoint=f"nbdbackup-{points.CHAIN}-{number}" if makes_base else "",
        run_id=f"run{number}",
        point_id=f"p{number}",
    )


def write_disk(draft: Draft, target: str, level: Level, content: bytes) -> DiskPoint:
    """One stream of one block and one zero range, with its index; all else of a full is zero."""
    intent = draft.intent
    name = layout.stream(target, level, checkpoint=intent.checkpoint, point_id=intent.point_id)
    path, index = draft.create(name), draft.create(layout.index(name))
    meta = StreamMeta(
        virtual_size=DISK_SIZE,
        data_size=0,
        date="2026-01-31T23:59:59",
        disk_name=target,
        disk_format="qcow2",
        checkpoint=intent.checkpoint,
        compression=None,
        parent_checkpoint="",
        incremental=level is not Level.FULL,
    )
    with durable.translate_os_errors("write", path):
        writer = StreamWriter(path, index, meta=meta)
        try:
            for offset, data in ((0, content.ljust(BLOCK, b".")), (2 * BLOCK, bytes(BLOCK))):
                block = writer.prepare(offset, memoryview(data))
                writer.place(block)
                writer.write(block)
                if level in (Level.FULL, Level.COPY):
                    begin = BLOCK if data[0] else 3 * BLOCK
                    writer.place(writer.zero(begin, BLOCK if data[0] else DISK_SIZE - begin))
            written = writer.finish()
        finally:
            writer.close()
    return DiskPoint(
        target=target,
        mode=DiskMode.FULL if level in (Level.FULL, Level.COPY) else DiskMode.DELTA,
        size=DISK_SIZE,
        format="qcow2",
        source=f"/images/{target}.qcow2",
        file=name,
        file_size=written.file_size,
        adler32=written.adler32,
        index=draft.adopt(layout.index(name), "disk-index", disk=target),
        data_bytes=written.data_bytes,
        zero_bytes=written.zero_bytes,
    )


def fill(draft: Draft, known: tuple[RestorePoint, ...], level: Level) -> RestorePoint:
    """Write the files of the next point into the draft and return what to publish."""
    intent = draft.intent
    disks = tuple(
        write_disk(draft, target, level, f"{target} at {intent.point_id}".encode())
        for target in ("vda", "vdb")
    )
    files = [draft.add_bytes(layout.domain_xml(intent.point_id), b"<domain/>", "domain-xml")]
    if intent.checkpoint:
        name = layout.checkpoint_xml(intent.checkpoint)
        files.append(draft.add_bytes(name, b"<domaincheckpoint/>", "checkpoint-xml"))
    kernel = draft.path.parent.parent / KERNEL
    if kernel.exists():
        held = [file for point in known for file in point.files]
        name = layout.copy("kernel", intent.point_id, KERNEL)
        shared = draft.share(kernel, "kernel", held)
        files.append(shared or draft.copy_file(name, kernel, "kernel"))
    bases = [point for point in known if point.makes_base]
    if level in (Level.FULL, Level.COPY):
        point = replace(points.full_point(intent.point_id), level=level, disks=disks)
    else:
        point = points.child_of(bases[-1], level=level, disks=disks)
    return replace(
        point,
        id=intent.point_id,
        sequence=max((each.sequence for each in known), default=0) + 1,
        checkpoint=intent.checkpoint,
        files=tuple(files),
    )


def add_point(path: Path, number: int, level: Level = Level.INC) -> RestorePoint:
    """Publish point ``number`` into the set."""
    repository = SetDirectory.open(path)
    with repository.lock(owner=f"run {number}"):
        known = repository.load().points
        with repository.draft(intent_for(number, level=level)) as draft:
            return draft.publish(fill(draft, known, level))


def make_chain(path: Path, increments: int = 2) -> list[RestorePoint]:
    """A full and increments."""
    return [
        add_point(path, number, Level.FULL if number == 1 else Level.INC)
        for number in range(1, increments + 2)
    ]


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory but locks, with its content."""
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file() and each.name not in {layout.LOCK, layout.READING}
    }
