"""The stream file of one disk in one point: virtnbdbackup's format, version 2; 1 is read, too.

Frames are a kind of four letters, a start and a length as 16 hexadecimal digits each, and CR LF::

    meta START LENGTH CRLF <LENGTH bytes of JSON> CRLF
    data START LENGTH CRLF <payload> CRLF        payload: LENGTH bytes, or one frame
    zero START LENGTH CRLF
    stop 0 0 CRLF
    <JSON list of the payload sizes> CRLF comp 0 LENGTH CRLF       only in compressed streams

``START`` and ``LENGTH`` are guest bytes, ascending, half open. The last frame's ``LENGTH`` is the
number of bytes of the list. This module holds the codec and the reader; ``writer`` writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar

from nbdbackupd import documents, plain
from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.files import File, open_untrusted
from nbdbackupd.format.sizes import Size, Sizes
from nbdbackupd.format.sizes import parse as parse_sizes
from nbdbackupd.model.chain import Codec, Compression

VERSION: Final = 2
TERMINATOR: Final = b"\r\n"
HEADER_LENGTH: Final = 4 + 1 + 16 + 1 + 16 + 2
META, DATA, ZERO, STOP, COMP = b"meta", b"data", b"zero", b"stop", b"comp"
KINDS: Final = frozenset({META, DATA, ZERO, STOP, COMP})
MAX_NAME: Final = 128
"""Letters of a point's id."""

MAX_META: Final = 1 << 20
MAX_SIZES: Final = 1 << 32
MAX_NUMBER: Final = (1 << 63) - 1
MAX_LEVELS: Final = {"lz4": 1 << 16, "zstd": 22}
HEX_DIGITS: Final = frozenset(b"0123456789abcdef")


class Frame(NamedTuple):
    """One frame: kind, guest range, place of its header and of its payload in the file.

    ``stored`` is the number of payload bytes at ``position`` (0 for zero and stop). ``parts``: the
    sizes of the lz4 frames that the payload is made of, if it is more than one.
    """

    kind: bytes
    start: int
    length: int
    header: int
    position: int
    stored: int
    parts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMeta:
    """The first frame's JSON: the peer's keys; ``extra`` holds ours beside them.

    ``disk_format`` is empty in a stream of version 1.
    """

    virtual_size: int
    data_size: int
    date: str
    disk_name: str
    disk_format: str
    checkpoint: str
    compression: Compression | None
    parent_checkpoint: str
    incremental: bool
    stream_version: int = VERSION
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def codec(self) -> Codec:
        """How the payloads are packed."""
        return self.compression.codec if self.compression is not None else Codec.NONE

    def to_json(self) -> dict[str, Any]:
        """The keys and values in the order in which virtnbdbackup writes them."""
        return {
            "virtualSize": self.virtual_size,
            "dataSize": self.data_size,
            "date": self.date,
            "diskName": self.disk_name,
            "diskFormat": self.disk_format,
            "checkpointName": self.checkpoint,
            "compressed": self.compression is not None and self.compression.level,
            "compressionMethod": "zstd" if self.codec is Codec.ZSTD else "lz4",
            "parentCheckpoint": self.parent_checkpoint,
            "incremental": self.incremental,
            "streamVersion": self.stream_version,
            **dict(self.extra),
        }


class Window(NamedTuple):
    """Where a stream lies within a file, in bytes; positions stay those of the file."""

    start: int
    size: int


def pack_header(kind: bytes, start: int, length: int) -> bytes:
    """The 40 bytes of a frame header."""
    return b"%s %016x %016x\r\n" % (kind, start, length)


def parse_header(raw: bytes, position: int) -> tuple[bytes, int, int]:
    """Kind, start and length of a header.

    Raises IntegrityError with the position in the file if the bytes are no header.
    """
    digits = raw[5:21] + raw[22:38]
    well_formed = (
        len(raw) == HEADER_LENGTH
        and raw[4:5] == raw[21:22] == b" "
        and raw[38:] == TERMINATOR
        and HEX_DIGITS.issuperset(digits)
    )
    if not well_formed or raw[:4] not in KINDS:
        raise IntegrityError("not a frame header", offset=position, found=raw[:8].hex())
    return raw[:4], int(raw[5:21], 16), int(raw[22:38], 16)


def parse_meta(payload: bytes) -> StreamMeta:
    """The JSON of the meta frame, each value checked.

    Raises FormatError if it is not what version 1 or 2 writes, UnsupportedVersionError if newer.
    """
    try:
        document = documents.parse_json(payload)
    except ValueError as err:
        raise FormatError(f"meta frame is not JSON: {err}") from err
    if not isinstance(document, dict):
        raise FormatError("meta frame is not a JSON object")
    # version 1 has another name for it, no format of the disk, and may have false for no parent
    document.setdefault("streamVersion", document.get("stream-version", 1))
    version = _typed(document, "streamVersion", int)
    if version not in (1, VERSION):
        raise UnsupportedVersionError("stream was written by a newer program", version=version)
    if version == 1:
        document = {"diskFormat": "", **document}
        if document.get("parentCheckpoint") in (False, None):
            document["parentCheckpoint"] = ""
    known = StreamMeta(
        virtual_size=_typed(document, "virtualSize", int),
        data_size=_typed(document, "dataSize", int),
        date=_typed(document, "date", str),
        disk_name=_typed(document, "diskName", str),
        disk_format=_typed(document, "diskFormat", str),
        checkpoint=_typed(document, "checkpointName", str, ""),
        compression=_compression(document),
        parent_checkpoint=_typed(document, "parentCheckpoint", str, ""),
        incremental=_typed(document, "incremental", bool, default=False),
        stream_version=version,
        extra=_point(document.get("point")),
    )
    if not 0 <= known.virtual_size <= MAX_NUMBER or not 0 <= known.data_size <= MAX_NUMBER:
        raise FormatError("meta frame: a size is out of range")
    words = (known.disk_name, known.disk_format, known.checkpoint, known.parent_checkpoint)
    if any(map(plain.CONTROL.search, words)):
        raise FormatError("meta frame: a name holds control characters")
    return known


def _compression(document: dict[str, Any]) -> Compression | None:
    level = document.get("compressed", 0)
    if not isinstance(level, int):
        raise FormatError("meta frame: 'compressed' is neither a number nor false")
    if not level:
        return None
    # version 1 names no method
    most = MAX_LEVELS.get(_typed(document, "compressionMethod", str, "lz4"))
    if most is None:
        raise UnsupportedVersionError("stream is compressed in a way that is not known")
    if not 0 < level <= most:
        raise FormatError("meta frame: 'compressed' is out of range")
    return Compression(Codec(document.get("compressionMethod", "lz4")), int(level))


def _point(said: object) -> tuple[tuple[str, str], ...]:
    """The point that a stream of ours is of, if it says so in a form that can be shown."""
    if isinstance(said, str) and said.isprintable() and len(said) <= MAX_NAME:
        return (("point", said),)
    return ()


T = TypeVar("T")


def _typed(document: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = document.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"meta frame: {key!r} is missing or no {kind.__name__}")
    return value


class StreamReader:
    """A stream file opened for reading; a context manager.

    ``meta`` is the parsed first frame; ``sizes`` the payload sizes of a compressed stream, else
    None. Nothing that the file says is trusted: every place is checked against the file's size.
    """

    def __init__(self, path: Path, *, head: bool = False, window: Window | None = None) -> None:
        """Open the file, read its meta frame and, if compressed and not ``head``, its sizes.

        With ``head`` only ``meta`` is of use; ``window``: the stream is that part of the file.
        Raises FormatError (IntegrityError, UnsupportedVersionError) and OSError.
        """
        self.path = path
        self._file = File(path, opener=open_untrusted)
        try:
            start, size = window or (0, self._file.size)
            self.size = min(start + size, self._file.size)
            kind, _, length = self._header(start)
            if kind != META or length > MAX_META:
                raise IntegrityError(
                    "stream does not begin with a meta frame", file=path, offset=start
                )
            self.meta = parse_meta(self.read(start + HEADER_LENGTH, length))
            self._first = self._after(start + HEADER_LENGTH, length)
            self.sizes = self._load_sizes() if self.meta.compression and not head else None
        except BaseException as err:
            self._file.close()
            if isinstance(err, FormatError):
                err.fields.setdefault("file", path)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, position: int, length: int) -> bytes:
        """Exactly ``length`` bytes of the file. Raises IntegrityError if the file ends before."""
        if position + length > self.size:
            raise IntegrityError(
                "stream ends too early", file=self.path, offset=position, missing=length
            )
        parts = []
        while length:
            part = self._file.pread(length, position)
            if not part:
                raise IntegrityError("stream ends too early", file=self.path, offset=position)
            parts.append(part)
            position += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def frames(self) -> Iterator[Frame]:
        """Data and zero frames in file order, then the stop frame; the trailer is checked.

        Ranges must ascend within the virtual size; the file must end where the format ends.
        Raises IntegrityError with file and offset at the first byte that is wrong.
        """
        place, end, number = self._first, 0, 0
        while True:
            kind, start, length = self._header(place)
            if kind == STOP:
                yield Frame(kind, start, length, place, place + HEADER_LENGTH, 0)
                self._check_end(place + HEADER_LENGTH, number)
                return
            if kind not in (DATA, ZERO) or length == 0:
                raise IntegrityError("unexpected frame", file=self.path, offset=place)
            if start < end or start + length > self.meta.virtual_size:
                raise IntegrityError("frame out of order", file=self.path, offset=place)
            end = start + length
            payload = place + HEADER_LENGTH
            if kind == ZERO:
                yield Frame(kind, start, length, place, payload, 0)
                place = payload
                continue
            stored, parts = self._stored(number, length, place)
            number += 1
            following = self._after(payload, stored)
            yield Frame(kind, start, length, place, payload, stored, parts)
            place = following

    def _stored(self, number: int, length: int, place: int) -> Size:
        if self.sizes is None:
            return Size(length)
        if number >= len(self.sizes):
            raise IntegrityError("more blocks than sizes", file=self.path, offset=place)
        return self.sizes[number]

    def _header(self, place: int) -> tuple[bytes, int, int]:
        try:
            return parse_header(self.read(place, HEADER_LENGTH), place)
        except IntegrityError as err:
            err.fields.setdefault("file", self.path)
            raise

    def _after(self, payload: int, length: int) -> int:
        end = payload + length
        if self.read(end, len(TERMINATOR)) != TERMINATOR:
            raise IntegrityError("bad frame terminator", file=self.path, offset=end)
        return end + len(TERMINATOR)

    def _load_sizes(self) -> Sizes:
        place = self.size - HEADER_LENGTH
        if place < self._first:
            raise IntegrityError("stream ends too early", file=self.path, offset=self.size)
        kind, _, length = self._header(place)
        begin = place - len(TERMINATOR) - length
        if kind != COMP or length > MAX_SIZES or begin < self._first:
            raise IntegrityError("compressed stream without sizes", file=self.path, offset=place)
        self._after(begin, length)
        # each block has a frame header, a byte at least, and a terminator
        maximum = (begin - self._first) // (HEADER_LENGTH + 1 + len(TERMINATOR))
        try:
            sizes = parse_sizes(self.read, begin, length, maximum)
        except IntegrityError as err:
            err.fields.setdefault("file", self.path)
            raise
        self._sizes_at = begin
        return sizes

    def _check_end(self, place: int, blocks: int) -> None:
        if self.sizes is not None:
            if blocks != len(self.sizes):
                raise IntegrityError("fewer blocks than sizes", file=self.path, offset=place)
            if place != self._sizes_at:
                raise IntegrityError("bytes before the sizes", file=self.path, offset=place)
        elif place != self.size:
            raise IntegrityError("bytes after the stop frame", file=self.path, offset=place)


def read_meta(path: Path, window: Window | None = None) -> StreamMeta:
    """The meta frame of a stream file, nothing else of it is read; errors as ``StreamReader``."""
    with StreamReader(path, head=True, window=window) as reader:
        return reader.meta
