"""Blocks as they are stored: plain or one lz4 or zstd frame each, and their digests."""

import hashlib
from functools import partial
from typing import Final

from nbdbackupd.errors import ConfigError, IntegrityError
from nbdbackupd.format.adler import Buffer
from nbdbackupd.model.chain import Codec, Compression, DigestKind

DIGEST_SIZE = 32
"""Bytes of a digest in an index; a shorter one is followed by zero bytes."""

PACKAGES: Final[dict[DigestKind | Codec, str]] = {
    DigestKind.BLAKE3: "python3-blake3",
    DigestKind.XXH128: "python3-xxhash",
    Codec.LZ4: "python3-lz4",
    Codec.ZSTD: "python3-zstandard",
}
"""What has the library of each kind that Python does not bring."""

MAX_WINDOW: Final = 1 << 20
"""Bytes that a zstd frame may look back: a block, which is all that ours ever do."""

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_RLE: Final = 1


def compress(block: Buffer, wanted: Compression) -> bytes:
    """One frame that says how much it holds.

    One of lz4 has block and content checksums, as virtnbdbackup writes them; one of zstd has none,
    since the digest proves more.
    """
    if wanted.codec is Codec.ZSTD:
        import zstandard  # late: as lz4

        packed: bytes = zstandard.ZstdCompressor(level=wanted.level).compress(block)
        return packed
    import lz4.frame  # late: plain runs and ``--version`` do without it

    frame: bytes = lz4.frame.compress(
        block,
        compression_level=wanted.level,
        content_checksum=True,
        block_checksum=True,
        store_size=True,
    )
    return frame


def decompress(stored: Buffer, length: int, codec: Codec) -> bytes:
    """The ``length`` guest bytes of one frame; no more memory than that is ever taken.

    Raises IntegrityError if it is no sound frame or holds another number of bytes.
    """
    return _unzstd(stored, length) if codec is Codec.ZSTD else _unlz4(stored, length)


def decompress_head(stored: Buffer, length: int, codec: Codec) -> bytes:
    """The first ``length`` guest bytes of a frame, which is not looked at any further.

    Raises IntegrityError if they can't be had.
    """
    if codec is Codec.ZSTD:
        import zstandard

        fault: type[Exception] = zstandard.ZstdError
        reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(stored)
        unpack = reader.read
    else:
        import lz4.frame

        fault = RuntimeError
        unpack = partial(lz4.frame.LZ4FrameDecompressor().decompress, stored)
    try:
        head: bytes = unpack(length)
    except fault as err:
        raise IntegrityError(f"block can't be decompressed: {err}") from err
    if len(head) != length:
        raise IntegrityError("block has the wrong length", expected=length, found=len(head))
    return head


def _unzstd(stored: Buffer, length: int) -> bytes:
    import zstandard

    try:
        said = zstandard.get_frame_parameters(stored)
        # a skippable frame has parameters, too
        if bytes(stored[:4]) != _ZSTD_MAGIC or said.window_size > MAX_WINDOW or said.dict_id:
            raise IntegrityError("block can't be decompressed: not a zstd frame of ours")
        if said.content_size != length:
            unsaid = said.content_size == zstandard.CONTENTSIZE_UNKNOWN
            found = "unknown" if unsaid else said.content_size
            raise IntegrityError("block has the wrong length", expected=length, found=found)
        head = zstandard.frame_header_size(stored)
        # the library would read one frame and not look at what is behind it
        if _zstd_end(stored, head) + 4 * said.has_checksum != len(stored):
            raise IntegrityError(
                "block can't be decompressed: its frame does not end where it should"
            )
        block: bytes = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompress(stored)
    except zstandard.ZstdError as err:
        raise IntegrityError(f"block can't be decompressed: {err}") from err
    return block


def _zstd_end(stored: Buffer, place: int) -> int:
    """Where the last block of a zstd frame ends, the first of which begins at ``place``.

    Each has a header of 3 bytes (RFC 8878, 3.1.1.2): whether it is the last, type, size.
    """
    while place + 3 <= len(stored):
        head = int.from_bytes(stored[place : place + 3], "little")
        place += 3 + (1 if head >> 1 & 3 == _ZSTD_RLE else head >> 3)
        if head & 1:
            return place
    return -1


def _unlz4(stored: Buffer, length: int) -> bytes:
    import lz4.frame

    # one byte more than wanted: memory stays bounded whatever the frame holds, and its end is seen
    decompressor = lz4.frame.LZ4FrameDecompressor()
    try:
        block: bytes = decompressor.decompress(stored, max_length=length + 1)
    except (RuntimeError, EOFError, ValueError) as err:
        raise IntegrityError(f"block can't be decompressed: {err}") from err
    if len(block) != length:
        found = len(block) if len(block) < length else "more"
        raise IntegrityError("block has the wrong length", expected=length, found=found)
    if not decompressor.eof or decompressor.unused_data:
        raise IntegrityError("block can't be decompressed: its frame does not end where it should")
    return block


def content_size(head: Buffer) -> int:
    """The guest bytes of the lz4 frame that begins with ``head`` (15 bytes), as it says itself.

    Raises IntegrityError if that is no frame or it does not say so.
    """
    import lz4.frame

    try:
        size: int = lz4.frame.get_frame_info(bytes(head))["content_size"]
    except (RuntimeError, ValueError) as err:
        raise IntegrityError(f"not an lz4 frame: {err}") from err
    if not size:
        raise IntegrityError("lz4 frame does not say how much it holds")
    return size


def digest(block: Buffer, kind: DigestKind) -> bytes:
    """The digest of guest bytes as an index holds it, ``DIGEST_SIZE`` bytes.

    Other threads run meanwhile, but for XXH128, which takes 0.3 ms for a block. Raises ConfigError
    if the library is missing.
    """
    if kind is DigestKind.SHA256:
        return hashlib.sha256(block).digest()
    try:  # late: most sets do without these libraries
        if kind is DigestKind.BLAKE3:
            import blake3

            return blake3.blake3(block).digest()
        import xxhash

        return xxhash.xxh3_128_digest(block).ljust(DIGEST_SIZE, b"\0")
    except ImportError as err:
        raise _missing(f"digests of kind {kind} need", kind, err) from err


def lack(digests: DigestKind, wanted: Compression | None) -> str:
    """Which library is missing for these, with its package; empty if none is."""
    try:
        require(digests, wanted.codec if wanted is not None else Codec.NONE)
    except ConfigError as err:
        return err.message
    return ""


def require(digests: DigestKind, codec: Codec) -> None:
    """Prove that digests can be made, and blocks packed and unpacked, here. Raises ConfigError."""
    digest(b"", digests)
    if codec is Codec.NONE:
        return
    try:
        compress(b"", Compression(codec, 1))
    except ImportError as err:
        raise _missing(f"compression with {codec} needs", codec, err) from err


def _missing(what: str, kind: DigestKind | Codec, err: ImportError) -> ConfigError:
    return ConfigError(f"{what} a Python library: {err}; install {PACKAGES[kind]}")
