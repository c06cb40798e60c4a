"""What we use of python-lz4."""

def compress(
    data: bytes | bytearray | memoryview,
    compression_level: int = ...,
    block_size: int = ...,
    content_checksum: bool = ...,
    block_checksum: bool = ...,
    block_linked: bool = ...,
    store_size: bool = ...,
    auto_flush: bool = ...,
    return_bytearray: bool = ...,
) -> bytes: ...
def decompress(
    data: bytes | bytearray | memoryview,
    return_bytearray: bool = ...,
    return_bytes_read: bool = ...,
) -> bytes: ...
