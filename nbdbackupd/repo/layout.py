"""Names of the files of a set.

Names that come from a domain (disk targets, the domain's own name, base names of its files) are
escaped: letters, digits and ``._+=@,-`` stay, a space too, and every other byte of the UTF-8 text
becomes ``%`` and two hexadecimal digits, so that the name is the same in every locale and on every
file system; so do a leading dot or dash and a space at either end. What is too long is cut and gets
``~`` and 16 digits of its SHA-256, so that two names never become one and no file name exceeds 255
bytes.
"""

import hashlib
import re
from pathlib import Path
from typing import Final

from nbdbackupd.errors import FormatError
from nbdbackupd.model.chain import Layout, Level, StoredFile

POINTS: Final = "points"
GENERATION: Final = "generation"
READING: Final = ".reading"
REMOVAL_PREFIX: Final = ".removal-"
CHECKPOINTS: Final = "checkpoints"
LOGS: Final = "logs"
BOOT_TESTS: Final = "boot-tests"
PROTECTED: Final = "protected"
VERIFIED: Final = "verified"
NOTES: Final = (BOOT_TESTS, PROTECTED, VERIFIED)
"""Directories with what is noted about points, in files of their ids."""

DIRECTORIES: Final = (POINTS, CHECKPOINTS, LOGS, *NOTES)
LOCK: Final = ".lock"
DRAFT_PREFIX: Final = ".draft-"
SPARE: Final = ".spare"
INTENT: Final = "intent.json"
DRAFT_MANIFEST: Final = "manifest.json"
CHECKSUM_SUFFIX: Final = ".chksum"
INDEX_SUFFIX: Final = ".index"
MANIFEST_SUFFIX: Final = ".json"

MAX_TARGET: Final = 64
MAX_IDENT: Final = 100
MAX_DOMAIN: Final = 200
MAX_BASE: Final = 100
_MARK: Final = 17  # "~" and the digits

_KEPT: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+=@,- ")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_+=@,][A-Za-z0-9._+=@,-]*", re.ASCII)
"""What is its own name, as nearly all are."""
_ESCAPE: Final = re.compile(rb"%([0-9A-F]{2})")


def escape(text: str, maximum: int) -> str:
    """A component of a file name for any text: injective, ASCII, at most ``maximum`` bytes.

    Raises FormatError for an empty text.
    """
    if not text:
        raise FormatError("an empty name can't become the name of a file")
    if len(text) <= maximum and _PLAIN.fullmatch(text):
        return text
    raw = _bytes(text)
    last = len(raw) - 1
    parts = []
    for place, byte in enumerate(raw):
        edge = (place == 0 and byte in b".- ") or (place == last and byte in b" ")
        parts.append(chr(byte) if byte in _KEPT and not edge else f"%{byte:02X}")
    escaped = "".join(parts)
    if len(escaped) <= maximum:
        return escaped
    head = escaped[: maximum - _MARK]
    return f"{head}~{hashlib.sha256(raw).hexdigest()[:16]}"


def _bytes(text: str) -> bytes:
    try:
        # A path that is no UTF-8 reaches us with surrogates for its bytes (PEP 383).
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def unescape(name: str) -> str:
    """The text that ``escape`` made a name of.

    Raises FormatError if the name was cut.
    """
    if "~" in name:
        raise FormatError(f"the name {name} was cut, its text is not known")
    raw = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), _bytes(name))
    return raw.decode(errors="surrogateescape")


def stream(
    target: str,
    level: Level,
    *,
    checkpoint: str = "",
    point_id: str = "",
    layout: Layout = Layout.STREAM,
    generation: int = 0,
) -> str:
    """The file of one disk in one point, named as virtnbdbackup names it.

    An increment needs ``checkpoint``, a differential and a copy need ``point_id``; a merge gives
    its number. Raises FormatError without it.
    """
    suffix = "data" if layout is Layout.STREAM else layout.value
    suffix = f"{generation}.{suffix}" if generation else suffix
    disk = escape(target, MAX_TARGET)
    match level:
        case Level.FULL:
            return f"{disk}.full.{suffix}"
        case Level.INC:
            return f"{disk}.inc.{escape(checkpoint, MAX_IDENT)}.{suffix}"
        case Level.DIFF | Level.COPY:
            return f"{disk}.{level}.{escape(point_id, MAX_IDENT)}.{suffix}"
        case Level.AUTO:
            raise FormatError("level auto names no file")


def index(stream_name: str) -> str:
    """The index beside a stream or raw image."""
    return f"{stream_name}{INDEX_SUFFIX}"


def checksum(stream_name: str) -> str:
    """The peer's checksum beside a stream."""
    return f"{stream_name}{CHECKSUM_SUFFIX}"


def points(generation: int) -> str:
    """The directory of the manifests of a generation."""
    return f"{POINTS}.{generation}" if generation else POINTS


def manifest(sequence: int, point_id: str) -> str:
    """The manifest of a point, a name within ``points/``."""
    return f"{sequence:06d}-{escape(point_id, MAX_IDENT)}{MANIFEST_SUFFIX}"


def names_point(manifest_name: str, point_id: str) -> bool:
    """Whether a name within ``points/`` is that of this point's manifest, whatever its number."""
    number, dash, rest = manifest_name.partition("-")
    wanted = f"{escape(point_id, MAX_IDENT)}{MANIFEST_SUFFIX}"
    return number.isdigit() and bool(dash) and is_same(rest, wanted)


def is_same(name: str, other: str) -> bool:
    """Whether two names are the same on each file system: some fold case when they store them.

    Ids of ours differ in more than case.
    """
    return name.casefold() == other.casefold()


def draft(run_id: str) -> str:
    """The directory of a run's unpublished point."""
    return f"{DRAFT_PREFIX}{escape(run_id, MAX_IDENT)}"


def run_log(run_id: str) -> str:
    """The log of a run, relative to the set."""
    return f"{LOGS}/{escape(run_id, MAX_IDENT)}.log"


def boot_test(point_id: str, suffix: str = "json") -> str:
    """The newest boot test of a point, or with ``png`` its picture, relative to the set."""
    return f"{BOOT_TESTS}/{escape(point_id, MAX_IDENT)}.{suffix}"


def protection(point_id: str) -> str:
    """The note that protects a point, relative to the set."""
    return f"{PROTECTED}/{escape(point_id, MAX_IDENT)}{MANIFEST_SUFFIX}"


def verified(point_id: str) -> str:
    """What the newest verification of a point found, relative to the set."""
    return f"{VERIFIED}/{escape(point_id, MAX_IDENT)}{MANIFEST_SUFFIX}"


def notes(root: Path, point_id: str) -> list[Path]:
    """What is noted about a point beside the manifests of a set, under its id and any suffix."""
    stem = escape(point_id, MAX_IDENT)
    folders = [root / name for name in NOTES if not (root / name).is_symlink()]
    return [path for each in folders for path in each.glob("*") if path.stem == stem]


def checkpoint_xml(checkpoint: str) -> str:
    """The XML of a checkpoint, relative to the set."""
    return f"{CHECKPOINTS}/{escape(checkpoint, MAX_DOMAIN)}.xml"


def domain_xml(point_id: str) -> str:
    """The inactive XML of the domain at that point (the peer's name for it)."""
    return f"vmconfig.{escape(point_id, MAX_IDENT)}.xml"


def domain_xml_live(point_id: str) -> str:
    """The XML of the running domain at that point."""
    return f"domain-live.{escape(point_id, MAX_IDENT)}.xml"


def guest_info(point_id: str) -> str:
    """What the guest's agent told of its system."""
    return f"guest-info.{escape(point_id, MAX_IDENT)}.json"


def machine(point_id: str) -> str:
    """What a QEMU without libvirt was started with."""
    return f"machine.{escape(point_id, MAX_IDENT)}.json"


def checkpoint_list(domain: str) -> str:
    """The peer's list of the chain's checkpoints."""
    return f"{escape(domain, MAX_DOMAIN)}.cpt"


def image_info(target: str, point_id: str) -> str:
    """What qemu-img tells of a disk's image (the peer's name for it)."""
    return f"{escape(target, MAX_TARGET)}.{escape(point_id, MAX_IDENT)}.qcow.json"


def copy(role: str, point_id: str, base: str) -> str:
    """A copied file (loader, nvram, kernel, initrd) or, with a relative path, one of a tree."""
    return f"{role}.{escape(point_id, MAX_IDENT)}.{escape(base, MAX_BASE)}"


def path_in_tree(file: StoredFile, point_id: str) -> str:
    """The path within its tree of a file whose name ``copy`` made of it.

    Raises FormatError if the name is of another kind or would lead out of the tree.
    """
    head = f"{file.role}.{escape(point_id, MAX_IDENT)}."
    path = unescape(file.name.removeprefix(head)) if file.name.startswith(head) else ""
    if not path or path.startswith("/") or {"", ".", ".."}.intersection(path.split("/")):
        raise FormatError("file of a tree has a bad name", file=file.name)
    return path
