"""Blocks as they are stored: plain or one lz4 frame each, and the sums over them."""

import hashlib
from typing import Final, TypeAlias

from nbdbackupd.errors import IntegrityError

Buffer: TypeAlias = bytes | bytearray | memoryview

ADLER_BASE: Final = 65521
ADLER_START: Final = 1


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


def combine_adler32(first: int, second: int, second_length: int) -> int:
    """Adler-32 of two joined byte strings from the sums of each (RFC 1950, section 8.2).

    With A the low and B the high 16 bits, both modulo 65521, and A starting at 1:
    ``A = A1 + A2 - 1`` and ``B = B1 + B2 + length2 * (A1 - 1)``.
    """
    low1, high1 = first & 0xFFFF, first >> 16
    low2, high2 = second & 0xFFFF, second >> 16
    low = (low1 + low2 - 1) % ADLER_BASE
    high = (high1 + high2 + second_length * (low1 - 1)) % ADLER_BASE
    return high << 16 | low
