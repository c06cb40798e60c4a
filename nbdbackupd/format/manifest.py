"""The manifest: one restore point as a JSON file, version 1, or 2 if others were merged into it.

Version 3 is of points with other digests of blocks than SHA-256, version 4 of those with zstd,
version 5 of those in qcow2 images.

The bytes are canonical: keys sorted, indented by one, ASCII with JSON escapes, a final line feed.
The member ``digest`` is the SHA-256 (hex) of the same document without that member, in the same
form, so a flipped bit in the newest manifest is found, too; each older one is also vouched for by
its children, which carry the SHA-256 of all of its bytes in ``parent_digest``.

Nothing that a manifest says is trusted: every member must be there, of its type and in its range,
no other member may be, and names can't lead out of the set.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from nbdbackupd import documents, plain
from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.format.proven import PROVEN
from nbdbackupd.model.chain import (
    Codec,
    Consistency,
    DigestKind,
    DiskMode,
    DiskPoint,
    ImageLayer,
    Layout,
    Level,
    RestorePoint,
    SkippedDisk,
    StoredFile,
)

VERSION: Final = 1
MERGED_VERSION: Final = 2
"""Of a point that others were merged into: with the member ``merged``."""

DIGEST_VERSION: Final = 3
"""Of a point with a disk whose index has other digests than SHA-256: each disk has ``digest``."""

CODEC_VERSION: Final = 4
"""Of a point with a disk in zstd: each disk has ``digest``, and ``codec`` for ``compressed``."""

IMAGE_VERSION: Final = 5
"""Of a point in qcow2 images that QEMU wrote: each disk has ``sha256``, too."""

MAX_SIZE: Final = 16 << 20
"""A manifest of more bytes is refused unread."""

MAX_KNOWN: Final = 8 << 20
"""Bytes of manifests whose points are kept: a run reads those of its set several times."""

MAX_NUMBER: Final = (1 << 63) - 1
MAX_NAME: Final = 255
MAX_WORD: Final = 1024
"""Characters of a name, a target, a format; libvirt keeps a domain in a file of its name."""

CHECKPOINTS: Final = "checkpoints/"
"""The one directory that a stored file's name may begin with."""

_quoted: Final = json.encoder.encode_basestring_ascii
_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
# from 1970 to 2999: years that exist in each zone
_TIME: Final = re.compile(
    r"(?:19[7-9]|2\d\d)\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)", re.ASCII
)

_UNSOUND: Final = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")


def pack(point: RestorePoint) -> bytes:
    """The bytes of a point's manifest; ``point.digest`` is not part of them.

    Raises FormatError if the point holds what ``parse`` would refuse: nothing is ever written
    that can't be read.
    """
    document = _document(point)
    document["digest"] = _digest(document)
    data = _canonical(document)
    if replace(parse(data), digest="") != replace(point, digest=""):
        raise FormatError(f"restore point {point.id} can't be written: it would read otherwise")
    return data


def parse(data: bytes, file: object = "") -> RestorePoint:
    """The point that a manifest describes; its ``digest`` is the SHA-256 of ``data``.

    ``file`` names the place in errors. Raises UnsupportedVersionError for a newer version,
    IntegrityError if the bytes are not those that were written, FormatError with the dotted path
    of the member that is wrong.
    """
    digest = hashlib.sha256(data).hexdigest()
    try:
        return _known.get(digest) or _known.add(_take_apart(data, digest), len(data))
    except FormatError as err:
        if file:
            err.fields.setdefault("file", file)
        raise


def _take_apart(data: bytes, digest: str) -> RestorePoint:
    if PROVEN.holds(digest):
        with suppress(ValueError, TypeError, KeyError):
            return _rebuilt(documents.parse_json(data), digest)
    point = _parse_point(_Node(_load(data), ""), digest)
    PROVEN.add(digest)
    return point


def _rebuilt(document: dict[str, Any], digest: str) -> RestorePoint:
    """The point of a manifest that was proven, of which nothing is looked at any more."""
    del document["version"]
    document["digest"] = digest
    document["level"] = Level(document["level"])
    document["consistency"] = Consistency(document["consistency"])
    document["skipped"] = tuple(SkippedDisk(**each) for each in document["skipped"])
    document["files"] = tuple(StoredFile(**each) for each in document["files"])
    document["warnings"] = tuple(document["warnings"])
    document["merged"] = tuple(document.get("merged", ()))
    document["disks"] = tuple(map(_rebuilt_disk, document["disks"]))
    return RestorePoint(**document)


def _rebuilt_disk(disk: dict[str, Any]) -> DiskPoint:
    disk["mode"] = DiskMode(disk["mode"])
    disk["layout"] = Layout(disk["layout"])
    disk["digest"] = DigestKind(disk.get("digest", DigestKind.SHA256))
    # of an older version
    plain_codec = Codec.LZ4 if disk.pop("compressed", False) else Codec.NONE
    disk["codec"] = Codec(disk.get("codec", plain_codec))
    disk["index"] = StoredFile(**disk["index"])
    disk["layers"] = tuple(ImageLayer(**each) for each in disk["layers"])
    return DiskPoint(**disk)


class _Known:
    """Points by the digests of their manifests: equal bytes are taken apart once in a while.

    Those that somebody holds are there anyway. Of others what came last is kept, and what came
    before that is let go together, a half of all.
    """

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[str, RestorePoint] = WeakValueDictionary()
        self._new: list[RestorePoint] = []
        self._old: list[RestorePoint] = []
        self._left = MAX_KNOWN // 2

    def get(self, digest: str) -> RestorePoint | None:
        """The point, if it is there."""
        return self._alive.get(digest)

    def add(self, point: RestorePoint, size: int) -> RestorePoint:
        """Keep a point whose manifest has that many bytes; returns it."""
        self._left -= size
        if self._left < 0:
            self._old, self._new = self._new, []
            self._left = MAX_KNOWN // 2 - size
        self._new.append(point)
        self._alive[point.digest] = point
        return point


_known: Final = _Known()


def _document(point: RestorePoint) -> dict[str, Any]:
    document: dict[str, Any] = _plain(point)
    del document["digest"]
    if any(disk.layout is Layout.QCOW2 for disk in point.disks):
        document["version"] = IMAGE_VERSION
        return document
    for disk in document["disks"]:
        del disk["sha256"]
    if any(disk.codec is Codec.ZSTD for disk in point.disks):
        document["version"] = CODEC_VERSION
        return document
    for disk in document["disks"]:
        disk["compressed"] = Codec(disk.pop("codec")) is Codec.LZ4
    if any(disk.digest is not DigestKind.SHA256 for disk in point.disks):
        document["version"] = DIGEST_VERSION
        return document
    document["version"] = MERGED_VERSION if point.merged else VERSION
    if not point.merged:
        del document["merged"]
    for disk in document["disks"]:
        del disk["digest"]
    return document


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, enumerations as their text."""
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value


def _canonical(document: Any) -> bytes:
    """As ``json.dumps(document, sort_keys=True, indent=1)``, which takes four times as long."""
    # ASCII: a path that is no UTF-8 (a surrogate escape) survives, whatever the locale.
    return _text(document, "\n").encode("ascii") + b"\n"


def _text(value: Any, gap: str) -> str:
    """A value that stands behind ``gap``, a line feed and the spaces of its depth."""
    if type(value) is str:
        return _quoted(value)
    inner = f"{gap} "
    if isinstance(value, dict) and value:
        members = [f"{_quoted(key)}: {_text(value[key], inner)}" for key in sorted(value)]
        return f"{{{inner}{f',{inner}'.join(members)}{gap}}}"
    if isinstance(value, list) and value:
        return f"[{inner}{f',{inner}'.join([_text(each, inner) for each in value])}{gap}]"
    return repr(value) if type(value) is int else json.dumps(value)


def _digest(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(_canonical(rest)).hexdigest()


def _digest_of(data: bytes) -> str:
    """The digest of canonical bytes, whose member of that name is a line of its own."""
    head, _, tail = data.partition(b'\n "digest": ')
    return hashlib.sha256(head + b"\n" + tail.partition(b"\n")[2]).hexdigest()


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_SIZE:
        raise FormatError(f"manifest is larger than {MAX_SIZE} bytes", size=len(data))
    try:
        document = documents.parse_json(data)
        sound = data == _canonical(document)
    except (ValueError, RecursionError) as err:
        raise IntegrityError(f"manifest is not JSON, it is damaged: {err}") from err
    if not isinstance(document, dict):
        raise FormatError("manifest is not a JSON object")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise FormatError("version: missing or no positive number")
    if version > IMAGE_VERSION:
        raise UnsupportedVersionError(
            f"manifest has version {_short(version)}, this program reads {IMAGE_VERSION}: "
            f"use a newer program"
        )
    # Other bytes of the same meaning (a key that comes twice, spaces) are damage, too.
    if not sound or document.get("digest") != _digest_of(data):
        raise IntegrityError("manifest is damaged: its digest does not match its content")
    return document


class _Node:
    """A JSON object with its dotted path; getters check type and range and note what was read."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{path or 'manifest'}: not a JSON object")
        self._members: dict[str, Any] = value
        self._path = path
        self._left = set(value)

    def wrong(self, key: str, problem: str) -> FormatError:
        """An error that names the member."""
        return FormatError(f"{self._name(key)}: {problem}")

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def get(self, key: str, kind: type[T]) -> T:
        """The member's value, exactly of that type (a bool is no int)."""
        if key not in self._members:
            raise self.wrong(key, "missing")
        value = self._members[key]
        if type(value) is not kind:
            raise self.wrong(key, f"expected {kind.__name__}, found {type(value).__name__}")
        self._left.discard(key)
        return value

    def number(self, key: str, maximum: int = MAX_NUMBER, minimum: int = 0) -> int:
        value = self.get(key, int)
        if not minimum <= value <= maximum:
            raise self.wrong(key, f"{_short(value)} is out of range")
        return value

    def text(self, key: str, *, empty: bool = True) -> str:
        value = self.get(key, str)
        if not value and not empty:
            raise self.wrong(key, "empty")
        self._check_text(key, value)
        return value

    def _check_text(self, key: str, value: str) -> None:
        # Of the surrogates only those that stand for a byte of a path (PEP 383) are of use.
        if _UNSOUND.search(value):
            raise self.wrong(key, "holds characters that stand for nothing")

    def word(self, key: str, *, empty: bool = True) -> str:
        """Short text without control characters: it goes to terminals, and into names."""
        return self._check_word(key, self.text(key, empty=empty))

    def _check_word(self, key: str, value: str) -> str:
        if len(value) > MAX_WORD:
            raise self.wrong(key, f"{_short(value)} is too long")
        if plain.CONTROL.search(value):
            raise self.wrong(key, f"{_short(value)} holds control characters")
        return value

    def name(self, key: str, *, empty: bool = False) -> str:
        """Text that may become one component of a file name."""
        return self._check_name(key, self.word(key, empty=empty))

    def _check_name(self, key: str, value: str) -> str:
        if "/" in value or value in (".", ".."):
            raise self.wrong(key, f"{_short(value)} is no name")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of such texts, none empty."""
        values = self.texts(key)
        for number, value in enumerate(values):
            if not value:
                raise self.wrong(f"{key}[{number}]", "empty")
            self._check_name(f"{key}[{number}]", self._check_word(f"{key}[{number}]", value))
        return values

    def file(self, key: str) -> str:
        """A file of the set: one component, not hidden, or such a one in ``checkpoints/``."""
        value = self.word(key, empty=False)
        base = value.removeprefix(CHECKPOINTS)
        size = len(base.encode(errors="surrogateescape"))
        if not base or "/" in base or base.startswith(".") or size > MAX_NAME:
            raise self.wrong(key, f"{_short(value)} is no name of a file of the set")
        return value

    def digest(self, key: str, *, empty: bool = False) -> str:
        value = self.get(key, str)
        if not _HEX.fullmatch(value) and (value or not empty):
            raise self.wrong(key, "not a SHA-256 in hexadecimal")
        return value

    def choice(self, key: str, kind: type[E], *refused: E) -> E:
        value = self.get(key, str)
        for each in kind:
            if each.value == value and each not in refused:
                return each
        allowed = ", ".join(each for each in kind if each not in refused)
        raise self.wrong(key, f"{_short(value)} is none of {allowed}")

    def node(self, key: str) -> "_Node":
        return _Node(self.get(key, dict), self._name(key))

    def each(self, key: str, build: Callable[["_Node"], T]) -> tuple[T, ...]:
        """A list of objects, each built by ``build``."""
        values = self.get(key, list)
        return tuple(
            build(_Node(value, f"{self._name(key)}[{number}]"))
            for number, value in enumerate(values)
        )

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.get(key, list)
        for number, value in enumerate(values):
            if type(value) is not str:
                raise self.wrong(f"{key}[{number}]", f"expected str, found {type(value).__name__}")
            self._check_text(f"{key}[{number}]", value)
        return tuple(values)

    def done(self) -> None:
        """Refuse members that nobody asked for: what they mean is not known here."""
        if self._left:
            raise self.wrong(min(self._left), "unknown member")


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) <= MAX_NUMBER else "number"
    return text if len(text) <= 80 else f"{text[:80]}…"


def _parse_point(node: _Node, digest: str) -> RestorePoint:
    version = node.number("version")
    node.digest("digest")
    point = RestorePoint(
        id=node.name("id"),
        sequence=node.number("sequence", minimum=1),
        chain=node.name("chain"),
        level=node.choice("level", Level, Level.AUTO),
        created=_time(node, "created"),
        domain=node.name("domain"),
        uuid=node.name("uuid"),
        disks=node.each("disks", lambda disk: _parse_disk(disk, version)),
        consistency=node.choice("consistency", Consistency),
        parent=node.name("parent", empty=True),
        parent_digest=node.digest("parent_digest", empty=True),
        checkpoint=node.name("checkpoint", empty=True),
        base_checkpoint=node.name("base_checkpoint", empty=True),
        skipped=node.each("skipped", _parse_skipped),
        files=node.each("files", _parse_file),
        warnings=node.texts("warnings"),
        autostart=node.get("autostart", bool),
        program=node.text("program"),
        merged=node.names("merged") if version >= MERGED_VERSION else (),
        digest=digest,
    )
    node.done()
    if version == MERGED_VERSION and not point.merged:
        raise node.wrong("merged", "empty")
    if version == DIGEST_VERSION and all(each.digest is DigestKind.SHA256 for each in point.disks):
        raise node.wrong("version", "3 is of points with other digests than SHA-256")
    if version == CODEC_VERSION and all(each.codec is not Codec.ZSTD for each in point.disks):
        raise node.wrong("version", "4 is of points with zstd")
    if version == IMAGE_VERSION and not point.disks:
        raise node.wrong("version", "5 is of points in qcow2 images")
    targets = [disk.target for disk in point.disks]
    if len(set(targets)) != len(targets):
        raise node.wrong("disks", "one target comes twice")
    file_names(point)  # refuses one name for two files
    return point


def file_names(point: RestorePoint) -> dict[str, int]:
    """The files that a point's manifest vouches for: name in the set → size in bytes.

    Raises FormatError if two of them carry one name.
    """
    found: dict[str, int] = {}
    streams = [(disk.file, disk.file_size) for disk in point.disks]
    stored = [*(disk.index for disk in point.disks), *point.files]
    for name, size in [*streams, *((each.name, each.size) for each in stored)]:
        if name in found:
            raise FormatError(f"restore point {point.id}: file {name} comes twice")
        found[name] = size
    return found


def is_time(text: str) -> bool:
    """Whether a text is a time in UTC that a point may have."""
    try:
        return bool(_TIME.fullmatch(text) and datetime.fromisoformat(text))
    except ValueError:
        return False


def _time(node: _Node, key: str) -> str:
    value = node.get(key, str)
    if not is_time(value):
        raise node.wrong(key, f"{_short(value)} is no time in UTC (RFC 3339), or a far one")
    return value


def _codec(node: _Node, version: int) -> Codec:
    if version >= CODEC_VERSION:
        return node.choice("codec", Codec)
    return Codec.LZ4 if node.get("compressed", bool) else Codec.NONE


def _layout(node: _Node, version: int) -> Layout:
    """All disks of a point are images that QEMU wrote, or none."""
    if version >= IMAGE_VERSION:
        return node.choice("layout", Layout, Layout.STREAM, Layout.RAW)
    return node.choice("layout", Layout, Layout.QCOW2)


def _digest_kind(node: _Node, version: int) -> DigestKind:
    return node.choice("digest", DigestKind) if version >= DIGEST_VERSION else DigestKind.SHA256


def _parse_disk(node: _Node, version: int) -> DiskPoint:
    disk = DiskPoint(
        target=node.name("target"),
        mode=node.choice("mode", DiskMode),
        size=node.number("size"),
        format=node.word("format"),
        source=node.text("source"),
        file=node.file("file"),
        file_size=node.number("file_size"),
        adler32=node.number("adler32", maximum=0xFFFFFFFF),
        index=_parse_file(node.node("index")),
        data_bytes=node.number("data_bytes"),
        zero_bytes=node.number("zero_bytes"),
        codec=_codec(node, version),
        layout=_layout(node, version),
        reason=node.text("reason"),
        serial=node.text("serial"),
        layers=node.each("layers", _parse_layer),
        bitmap=node.text("bitmap"),
        digest=_digest_kind(node, version),
        sha256=node.digest("sha256") if version >= IMAGE_VERSION else "",
    )
    node.done()
    if version >= IMAGE_VERSION and disk.codec is not Codec.NONE:
        raise node.wrong("codec", "an image that QEMU wrote is not packed")
    if disk.data_bytes + disk.zero_bytes > disk.size:
        raise node.wrong("data_bytes", "more bytes than the disk has")
    return disk


def _parse_layer(node: _Node) -> ImageLayer:
    layer = ImageLayer(
        path=node.text("path"),
        format=node.word("format"),
        device=node.number("device", maximum=(1 << 64) - 1),
        inode=node.number("inode", maximum=(1 << 64) - 1),
    )
    node.done()
    return layer


def _parse_skipped(node: _Node) -> SkippedDisk:
    skipped = SkippedDisk(target=node.word("target", empty=False), reason=node.text("reason"))
    node.done()
    return skipped


def _parse_file(node: _Node) -> StoredFile:
    stored = StoredFile(
        name=node.file("name"),
        role=node.word("role", empty=False),
        size=node.number("size"),
        sha256=node.digest("sha256"),
        origin=node.text("origin"),
        disk=node.word("disk"),
    )
    node.done()
    return stored
