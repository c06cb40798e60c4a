"""The domains that libvirt has defined on this host, read from its files: no daemon is asked.

systemd's generator runs before libvirt does. A transient domain has no such file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd.config.matching import labels_of
from nbdbackupd.errors import DomainError
from nbdbackupd.model import throwaway

DEFINITIONS: Final = Path("/etc/libvirt/qemu")
MAX_XML: Final = 4 << 20
_UUID: Final = re.compile(r"<uuid>([-0-9a-fA-F]{36})</uuid>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Defined:
    """What files of the configuration may choose a domain by, beside its name."""

    uuid: str
    labels: Mapping[str, str]


def read(directory: Path = DEFINITIONS) -> dict[str, Defined]:
    """The defined domains by name; libvirt names each file after its domain.

    What can't be read is left out: a domain that is being defined or undefined. So are domains of
    our own that are thrown away.
    """
    found = {}
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".xml")
    except OSError:
        return {}
    for path in paths:
        try:
            with path.open("rb") as file:
                text = file.read(MAX_XML).decode()
            if throwaway.is_marked(text):
                continue
            # libvirt escapes what stands in other elements, so the first one is the domain's
            uuid = _UUID.search(text)
            found[path.stem] = Defined(uuid=uuid[1] if uuid else "", labels=labels_of(text))
        except (OSError, UnicodeDecodeError, DomainError):
            continue
    return found


def has_any(directory: Path = DEFINITIONS) -> bool:
    """Whether libvirt has defined a domain, or who asks may not see that."""
    try:
        return any(path.suffix == ".xml" for path in directory.iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True
