"""What we use of python-lz4."""

from typing import TypedDict

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

class LZ4FrameDecompressor:
    eof: bool
    unused_data: bytes | None
    def decompress(self, data: bytes | bytearray | memoryview, max_length: int = -1) -> bytes: ...

class _FrameInfo(TypedDict):
    content_size: int

def get_frame_info(frame: bytes) -> _FrameInfo: ...
