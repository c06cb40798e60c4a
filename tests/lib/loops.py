"""Block devices of our own: loop devices over sparse files."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loop(path: Path, size: int, *, filled: bytes = b"\xa5", sector: int = 512) -> Iterator[Path]:
    """A loop device of ``size`` bytes, each of them ``filled``, over the new file ``path``."""
    path.write_bytes(filled * size)
    argv = ["losetup", "--find", "--show", "--sector-size", str(sector), str(path)]
    made = subprocess.run(argv, check=True, capture_output=True, text=True)
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def content(device: Path, size: int) -> bytes:
    """What a device holds, read past the kernel's cache of it."""
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    with device.open("rb") as file:
        return file.read(size)
