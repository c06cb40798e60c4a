r"""Names of systemd's units that stand for one domain: ``nbdbackup@NAME.service``.

The name is escaped as systemd-escape(1) does it for a text that is no path: ``/`` becomes ``-``,
and each byte of the UTF-8 text but letters, digits and ``:_.`` becomes ``\xXX``; so does a dot at
the beginning. Any name of a domain can be written thus, if it is not too long.
"""

import re
from typing import Final

MAX_UNIT: Final = 255
"""Characters of a whole unit's name, its suffix included (systemd's UNIT_NAME_MAX is 256)."""

RUNNER: Final = "nbdbackup"
PRUNER: Final = "nbdbackup-prune"

_KEPT: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:_.")
_ESCAPE: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")
_UNIT: Final = re.compile(r"(nbdbackup(?:-[a-z]+)*)@(.+)\.([a-z]+)", re.DOTALL)


def escape(name: str) -> str:
    """What stands for a name between ``@`` and the suffix of a unit."""
    parts = []
    for place, byte in enumerate(name.encode(errors="surrogateescape")):
        if byte == ord("/"):
            parts.append("-")
        elif byte in _KEPT and not (place == 0 and byte == ord(".")):
            parts.append(chr(byte))
        else:
            parts.append(f"\\x{byte:02x}")
    return "".join(parts)


def unescape(instance: str) -> str:
    """The name that ``escape`` made an instance of."""
    raw = instance.encode(errors="surrogateescape").replace(b"-", b"/")
    plain = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), raw)
    return plain.decode(errors="surrogateescape")


def unit(template: str, name: str, suffix: str) -> str:
    """``nbdbackup@NAME.service`` of a template ``nbdbackup``, a name and ``service``."""
    return f"{template}@{escape(name)}.{suffix}"


def is_too_long(unit_name: str) -> bool:
    """Whether systemd takes no unit of that name."""
    return len(unit_name) > MAX_UNIT


def domain_of(unit_name: str) -> str:
    """The domain that one of our units is for; empty if it is for none."""
    found = _UNIT.fullmatch(unit_name)
    return unescape(found[2]) if found else ""
