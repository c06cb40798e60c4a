from typing import Protocol

from nbdbackupd.format.adler import Buffer

class _Hash(Protocol):
    def digest(self) -> bytes: ...

def blake3(data: Buffer = ..., /) -> _Hash: ...
