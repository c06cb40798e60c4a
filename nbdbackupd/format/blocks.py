"""Blocks as they are stored: plain or one lz4 frame each, and their digests."""

import hashlib

from nbdbackupd.errors import ConfigError, IntegrityError
from nbdbackupd.format.adler import Buffer
from nbdbackupd.model.chain import DigestKind

DIGEST_SIZE = 32
"""Bytes of a digest in an index; a shorter one is followed by zero bytes."""

PACKAGES = {DigestKind.BLAKE3: "python3-blake3", DigestKind.XXH128: "python3-xxhash"}
"""What has the library of each kind that Python does not bring."""


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
        package = PACKAGES[kind]
        raise ConfigError(
            f"digests of kind {kind} need a Python library: {err}; install {package}"
        ) from err


def require(kind: DigestKind) -> None:
    """Prove that digests of a kind can be made here. Raises ConfigError."""
    digest(b"", kind)


def lz4_version() -> str:
    """The versions of the Python binding and of the library in it.

    Raises ImportError if python3-lz4 is missing.
    """
    import lz4  # late: plain runs do without it

    return f"{lz4.__version__}, library {lz4.library_version_string()}"
