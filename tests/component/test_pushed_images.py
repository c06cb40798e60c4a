"""Images that QEMU wrote, and what else may lie in their place: their index."""

import hashlib
import random
import subprocess
from pathlib import Path
from typing import Final

import pytest

from nbdbackupd.errors import FormatError, IntegrityError
from nbdbackupd.format.index import Index, Kind
from nbdbackupd.format.writer import ImageIndexer, Written
from nbdbackupd.model.chain import Layout

pytestmark = pytest.mark.component
SIZE: Final = 3 << 20


def make_image(path: Path, *options: str, size: int = SIZE) -> bytes:
    """A qcow2 image with data at 1 MiB and zeroes that it holds at 2 MiB; its data."""
    data = random.Random(5).randbytes(65536)
    (path.parent / "data").write_bytes(data)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size)], check=True
    )
    steps = (f"write -s {path.parent / 'data'} 1M 64k", "write -z 2M 64k")
    node = f"driver=qcow2,file.filename={path},backing="
    argv = ["qemu-io", "--image-opts", node]
    subprocess.run([*argv, *(w for step in steps for w in ("-c", step))], check=True)
    return data


def described(path: Path, backing: str = "", size: int = SIZE) -> tuple[Written, str]:
    index = path.with_name("i")
    index.unlink(missing_ok=True)
    indexer = ImageIndexer(path, index, disk_size=size)
    try:
        return indexer.describe(backing=backing, check=lambda: None)
    finally:
        indexer.close()


@pytest.mark.parametrize("backing", ["", "below.qcow2", "./be:low.qcow2"])
def test_an_image_that_qemu_wrote(tmp_path: Path, backing: str) -> None:
    path = tmp_path / "s"
    below = ("-u", "-F", "qcow2", "-b", backing) if backing else ()
    data = make_image(path, *below)
    written, sha256 = described(path, backing.removeprefix("./"))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.file_size == path.stat().st_size
    assert written.zero_bytes == (65536 if backing else SIZE - 65536)
    with Index(tmp_path / "i") as index:
        assert index.header.layout is Layout.QCOW2
        found = {record.offset: record for record in index}
    record = found[1 << 20]
    assert record.digest == hashlib.sha256(data).digest()
    assert path.read_bytes()[record.position : record.position + record.stored] == data
    assert found[2 << 20].kind == Kind.ZERO
    if not backing:
        # nothing is left out
        assert sum(each.length for each in found.values()) == SIZE


def test_an_image_that_is_not_what_qemu_was_given(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make_image(path, "-u", "-F", "qcow2", "-b", "below.qcow2")
    for backing, size in (("", SIZE), ("other", SIZE), ("below.qcow2", SIZE + 512)):
        with pytest.raises(IntegrityError, match="not the one that QEMU was given"):
            described(path, backing, size)
    make_image(path)
    image = bytearray(path.read_bytes())
    # its last cluster of data is gone
    path.write_bytes(image[:-4096])
    with pytest.raises(IntegrityError):
        described(path)
    # bytes of another file instead of its own
    image[79] |= 4
    path.write_bytes(image)
    with pytest.raises(FormatError, match="data in another file"):
        described(path)
    path.unlink()
    path.symlink_to("data")
    with pytest.raises(OSError, match="symbolic links"):
        ImageIndexer(path, tmp_path / "n", disk_size=SIZE)
