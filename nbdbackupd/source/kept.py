"""What libvirt's hook keeps of each domain: its XML, how it ended, what its images were then.

``<runtime directory>/xml/<name>.xml`` is the XML that libvirt gave to the hook last, and
``<name>.end``, which is there only while the domain is off, says how it ended:

    reason WORDS            libvirt's word for it, or what its log of the domain says (before 10.5)
    persistent yes|no       whether libvirt had a definition of it
    image DEVICE INODE SIZE MTIME PATH

Both are gone with a boot of the host.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nbdbackupd import durable, rundir
from nbdbackupd.errors import DomainError
from nbdbackupd.model.domain import parse_domain
from nbdbackupd.virt.domain import Ending

log = logging.getLogger(__name__)
XML: Final = ".xml"
END: Final = ".end"
MAX_SIZE: Final = 2 << 20
REASONS: Final = {
    "shutdown": Ending.SHUTDOWN,
    "destroyed": Ending.DESTROYED,
    "crashed": Ending.CRASHED,
    "migrated": Ending.MIGRATED,
    "saved": Ending.SAVED,
    "failed": Ending.FAILED,
    "from snapshot": Ending.SNAPSHOT,
    "daemon": Ending.DAEMON,
}
"""libvirt's words, for its hook and in its log."""

ELSEWHERE: Final = {
    Ending.MIGRATED: "it was migrated to another host",
    Ending.SAVED: "its state was saved, and it will go on from there",
    Ending.FAILED: "its start has failed",
    Ending.UNKNOWN: "libvirt did not say how it ended, so another host may have it",
}
"""Ends after which a domain that libvirt no longer knows may live on."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A file at one moment; ``size`` in bytes, ``mtime`` in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    mtime: int

    @classmethod
    def of(cls, path: str) -> "Identity | None":
        """That of a file as it is now; None if it can't be seen."""
        try:
            found = os.stat(path)  # noqa: PTH116 - a name from an XML
        except (OSError, ValueError):
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a domain ended. ``images`` by path; those that could not be seen are missing."""

    ending: Ending
    is_persistent: bool
    images: Mapping[str, Identity] = field(default_factory=dict)

    def pack(self) -> str:
        """The note's text."""
        reason = next((word for word, each in REASONS.items() if each is self.ending), "unknown")
        lines = [f"reason {reason}", f"persistent {'yes' if self.is_persistent else 'no'}"]
        lines += [
            f"image {each.device} {each.inode} {each.size} "
            f"{each.mtime // 10**9}.{each.mtime % 10**9:09} {path}"
            for path, each in self.images.items()
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> "End":
        """Read a note; lines that are not understood are passed over."""
        ending, is_persistent = Ending.UNKNOWN, False
        images: dict[str, Identity] = {}
        for line in text.split("\n"):
            key, _, value = line.partition(" ")
            if key == "reason":
                ending = REASONS.get(value, Ending.UNKNOWN)
            elif key == "persistent":
                is_persistent = value != "no"
            elif key == "image":
                images |= _image(value)
        return cls(ending=ending, is_persistent=is_persistent, images=images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is kept of a domain; ``end`` is None while it runs, or if its end was not seen."""

    name: str
    uuid: str
    xml: str
    end: End | None

    def why_not(self) -> str:
        """Why a domain that libvirt does not know must be left alone; empty: it has ended here."""
        if self.end is None:
            return "libvirt's hook did not see it end"
        if self.end.is_persistent:
            return "it was undefined, or has another name now"
        return ELSEWHERE.get(self.end.ending, "")


def read(runtime_dir: Path, domain: str) -> Kept | None:
    """What is kept of a domain, given by name or UUID; None if there is nothing of it."""
    directory = runtime_dir / rundir.XML
    named = _read(directory / f"{rundir.file_name(domain)}{XML}")
    if named is not None and domain in (named.name, named.uuid):
        return named
    try:
        paths = sorted(directory.glob(f"*{XML}"))
    except OSError:
        return None
    found = (_read(path) for path in paths)
    return next((each for each in found if each is not None and each.uuid == domain), None)


def put_off(note: Path) -> Ending:
    """How a domain ended whose backup was put off, by the hook's note of that; or UNKNOWN."""
    text = _text(note)
    return End.parse(text).ending if text is not None else Ending.UNKNOWN


def sweep(runtime_dir: Path) -> None:
    """Remove what hooks that were killed had begun to write; each names its process."""
    with suppress(OSError):
        for path in (runtime_dir / rundir.XML).glob(".*.part"):
            pid = path.name.split(".")[1]
            if pid.isdigit() and not Path("/proc", pid).exists():
                path.unlink(missing_ok=True)


def changed(runtime_dir: Path, name: str, uuid: str) -> dict[str, str]:
    """How images of a domain that is off differ from those that its guest left, by path.

    Empty if nobody noted them. A file that is the same and was written to by somebody counts.
    Media of drives and disks that domains share don't: others change them as they like.
    """
    kept = read(runtime_dir, name)
    if kept is None or kept.end is None or kept.uuid != uuid:
        return {}
    own = {
        layer.path
        for disk in parse_domain(kept.xml).disks
        if disk.device == "disk" and not disk.shareable
        for layer in disk.layers
    }
    noted = {path: each for path, each in kept.end.images.items() if path in own}
    found = {path: _difference(before, path) for path, before in noted.items()}
    return {path: text for path, text in found.items() if text}


def renew(runtime_dir: Path, name: str, uuid: str) -> None:
    """Note the images anew after we have changed them ourselves; no note, nothing is done."""
    kept = read(runtime_dir, name)
    if kept is None or kept.end is None or kept.uuid != uuid:
        return
    now = {path: Identity.of(path) for path in kept.end.images}
    images = {path: each for path, each in now.items() if each is not None}
    path = runtime_dir / rundir.XML / f"{rundir.file_name(name)}{END}"
    try:
        if path.exists():
            text = replace(kept.end, images=images).pack()
            durable.write_atomic(path, text.encode(errors="surrogateescape"), 0o600)
    except OSError as err:
        log.warning("what the images of domain %s are now can't be noted: %s", name, err)


def describe(changes: Mapping[str, str]) -> str:
    """What ``changed`` found, in words."""
    return "; ".join(f"image {path} {text}" for path, text in changes.items())


def _difference(before: Identity, path: str) -> str:
    now = Identity.of(path)
    if now is None:
        return "is gone"
    if (now.device, now.inode) != (before.device, before.inode):
        return "was replaced"
    return "" if now == before else "was written to"


def _image(value: str) -> Iterable[tuple[str, Identity]]:
    words = value.split(" ", 4)
    try:
        device, inode, size = (int(word) for word in words[:3])
        seconds, _, rest = words[3].partition(".")
        mtime = int(seconds) * 10**9 + int(rest.ljust(9, "0")[:9])
        return [(words[4], Identity(device, inode, size, mtime))]
    except (ValueError, IndexError):
        return []


def _read(path: Path) -> Kept | None:
    text = _text(path)
    if text is None:
        return None
    try:
        parsed = parse_domain(text)
    except DomainError as err:
        log.debug("%s is ignored: %s", path, err)
        return None
    if not parsed.name or not parsed.uuid:
        return None
    end = _text(path.with_name(f"{path.name.removesuffix(XML)}{END}"))
    return Kept(
        name=parsed.name,
        uuid=parsed.uuid,
        xml=text,
        end=End.parse(end) if end is not None else None,
    )


def _text(path: Path) -> str | None:
    with suppress(OSError), path.open("rb") as file:
        data = file.read(MAX_SIZE)
        return data.decode(errors="surrogateescape")
    return None
