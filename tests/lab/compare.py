"""Compare disk images byte for byte, over the whole size, without the product."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.lab.command import run

CHUNK_BYTES = 4 * 1024 * 1024


def first_difference(left: Path, right: Path) -> int | None:
    """Return the first offset at which two images differ as a guest sees them, or None.

    Each may be raw or of any format that ``qemu-img`` knows, told by its suffix: ``.raw`` and
    ``.img`` are raw, the rest is converted first.  A different size counts as a difference at
    the end of the shorter one.  Raises ``LabError`` when an image cannot be read.
    """
    with ExitStack() as stack:
        left, right = (_as_raw(path, stack) for path in (left, right))
        return first_difference_raw(left, right)


def first_difference_raw(left: Path, right: Path) -> int | None:
    """Do the same for two raw files or block devices."""
    offset = 0
    with left.open("rb") as one, right.open("rb") as other:
        while True:
            a, b = one.read(CHUNK_BYTES), other.read(CHUNK_BYTES)
            if a != b:
                return offset + _first_difference_bytes(a, b)
            if not a:
                return None
            offset += len(a)


def _first_difference_bytes(a: bytes, b: bytes) -> int:
    """Return the first index at which two different strings differ, by halving."""
    low, high = 0, max(len(a), len(b))
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] != b[low:middle]:
            high = middle
        else:
            low = middle
    return low


def _as_raw(path: Path, stack: ExitStack) -> Path:
    if path.suffix in {".raw", ".img"} or path.is_block_device():
        return path
    directory = stack.enter_context(TemporaryDirectory(prefix="compare-", dir=path.parent))
    raw = Path(directory) / "image.raw"
    run(["qemu-img", "convert", "-U", "-O", "raw", path, raw], timeout_seconds=600)
    return raw
