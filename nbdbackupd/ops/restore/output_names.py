"""File names of restored images and the domain's XML: recognizable, safe, never twice."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

INCOMPLETE: Final = ".incomplete"
CONFIG: Final = "config"
MAX_NAME: Final = 200
"""Leaves room for ``INCOMPLETE`` and more within the 255 bytes of a file name."""

SUFFIXES: Final = frozenset(
    {".img", ".luks", ".qcow", ".qcow2", ".qed", ".raw", ".vdi", ".vhd", ".vhdx", ".vmdk"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One disk: target, path of its original image, original and wanted format."""

    target: str
    source: str
    original: str
    format: str


def choose(disks: Iterable[Wanted], domain: str) -> dict[str, str]:
    """File name of each disk's image, by target: as the original's, if that can be.

    The suffix changes with the format. A name that is odd, taken by the domain's XML, or wanted
    by two disks gets the target in front.
    """
    wanted = list(disks)
    first = {disk.target: _name(disk) for disk in wanted}
    rivals = [name.casefold() for name in first.values()]
    rivals += [CONFIG, xml_name(domain).casefold() if domain else ""]
    names: dict[str, str] = {}
    for number, disk in enumerate(wanted):
        name = first[disk.target]
        if not is_plain(name) or rivals.count(name.casefold()) > 1:
            name = clean(f"{disk.target}-{name}", _suffix(disk))
        if name in names.values():
            name = clean(f"{number}-{name}", _suffix(disk))
        names[disk.target] = name
    return names


def xml_name(domain: str) -> str:
    """File name of the domain's XML."""
    return clean(f"{domain}.xml", ".xml")


def is_plain(name: str) -> bool:
    """Whether a name is one component that no shell, file system or reader stumbles over."""
    return (
        0 < len(name.encode(errors="replace")) <= MAX_NAME
        and name[0] not in ".-~ "
        and "/" not in name
        and name.isprintable()
        and not name.endswith(INCOMPLETE)
    )


def clean(name: str, suffix: str) -> str:
    """``name`` if it is plain, else a plain one that resembles it and ends with ``suffix``."""
    if is_plain(name):
        return name
    stem = name.removesuffix(suffix)
    kept = "".join(
        char if char.isascii() and (char.isalnum() or char in "._-+") else "_" for char in stem
    )
    tag = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{kept.lstrip('.-_')[:100] or 'disk'}-{tag}{suffix}"


def _suffix(disk: Wanted) -> str:
    return ".raw" if disk.format == "raw" else f".{disk.format}"


def _name(disk: Wanted) -> str:
    base = PurePosixPath(disk.source).name
    if not base:
        return f"{disk.target}{_suffix(disk)}"
    if disk.format == disk.original:
        return base
    path = PurePosixPath(base)
    stem = path.stem if path.suffix.lower() in SUFFIXES else base
    return f"{stem}{_suffix(disk)}"
