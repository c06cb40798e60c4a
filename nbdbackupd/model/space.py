"""What points take, in bytes: a file that several of them name is counted once."""

from collections.abc import Iterable

from nbdbackupd.model.chain import DiskPoint, Layout, RestorePoint


def disk_bytes(disk: DiskPoint) -> int:
    """What a disk's files take: stream and index; of a raw image, which is sparse, its data."""
    content = disk.data_bytes if disk.layout is Layout.RAW else disk.file_size
    return content + disk.index.size


def own_bytes(points: Iterable[RestorePoint]) -> dict[str, int]:
    """What the files of each point of a set take, by its id; ``points`` are in order.

    A file counts for the first that names it. Manifests are left out.
    """
    counted: set[str] = set()
    found = {}
    for point in points:
        new = [file for file in point.files if file.name not in counted]
        counted |= {file.name for file in new}
        found[point.id] = sum(map(disk_bytes, point.disks)) + sum(file.size for file in new)
    return found
