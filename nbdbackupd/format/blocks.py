"""Blocks as they are stored: plain or one lz4 frame each, and their digests."""

import hashlib

from nbdbackupd.errors import IntegrityError
from nbdbackupd.format.adler import Buffer


def compress(block: Buffer, level: int) -> bytes:
    """One lz4 frame with block and content checksums, as virtnbdbackup writes them."""
    import lz4.frame  # late: plain runs and ``--version`` do without it

    frame: bytes = lz4.frame.compress(
        block,
        compression_level=level,
        content_checksum=True,
        block_checksum=True,
        store_size=True,
    )
    return frame


def decompress(stored: Buffer, length: int) -> bytes:
    """The ``length`` guest bytes of one lz4 frame.

    Raises IntegrityError if it is no sound frame or holds another number of bytes.
    """
    import lz4.frame

    try:
        block: bytes = lz4.frame.decompress(stored)
    except (RuntimeError, EOFError, ValueError) as err:
        raise IntegrityError(f"block can't be decompressed: {err}") from err
    if len(block) != length:
        raise IntegrityError("block has the wrong length", expected=length, found=len(block))
    return block


def digest(block: Buffer) -> bytes:
    """SHA-256 of guest bytes, 32 bytes."""
    return hashlib.sha256(block).digest()
