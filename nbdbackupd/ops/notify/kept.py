"""Whom to tell when the configuration can't be read: as it was when it last could.

A note for each domain below the host's state directory, and one for what holds for all, each
written when the configuration was read well. They are root's alone: a command may hold a secret.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import NbdbackupError
from nbdbackupd.repo import layout

if TYPE_CHECKING:
    from nbdbackupd.config.schema import DomainSettings

log = logging.getLogger(__name__)

DIRECTORY: Final = "notification"
COMMON: Final = "%.json"
"""The note for all domains; no escaped name is a lone percent sign."""

VERSION: Final = 1
MAX_SIZE: Final = 1 << 20
MODE: Final = 0o600


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipients:
    """Whom to tell of what; ``password_file`` holds what must not be told."""

    events: tuple[str, ...]
    mail: tuple[str, ...]
    command: tuple[str, ...] | None
    password_file: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Recipients":
        """What settings say, by their paths."""
        password = values.get("libvirt.password_file")
        return cls(
            events=values["notification.events"],
            mail=values["notification.mail"],
            command=values["notification.command"],
            password_file=str(password or ""),
        )


PATHS: Final = (
    "notification.events",
    "notification.mail",
    "notification.command",
    "libvirt.password_file",
)
"""The settings that ``Recipients`` are made of."""


def keep(directory: Path, domain: str, settings: "DomainSettings") -> None:
    """Note whom to tell of a domain's runs, or of all others' if the name is empty.

    ``directory`` is where the host keeps what is about itself.
    """
    recipients = Recipients.of({path: settings.get(path) for path in PATHS})
    document = {
        "version": VERSION,
        "events": recipients.events,
        "mail": recipients.mail,
        "command": recipients.command,
        "password_file": recipients.password_file,
    }
    data = json.dumps(document, indent=1).encode() + b"\n"
    path = _path(directory, domain)
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        with durable.translate_os_errors("write", path):
            durable.make_private_directory(path.parent, path.parents[1])
            durable.write_atomic(path, data, MODE)
    except (NbdbackupError, OSError) as err:
        log.warning("whom to tell is not noted for the time when it can't be read: %s", err)


def kept(directory: Path, domain: str) -> Recipients | None:
    """What was noted last of a domain, or else of all; None if that is nothing that can be read."""
    for path in (_path(directory, domain), _path(directory, "")):
        try:
            with path.open("rb") as file:
                document = documents.parse_json(file.read(MAX_SIZE))
            if document["version"] != VERSION:
                continue
            command = document["command"]
            return Recipients(
                events=_texts(document["events"]),
                mail=_texts(document["mail"]),
                command=None if command is None else _texts(command),
                password_file=str(document["password_file"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _texts(found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise TypeError("no list of texts")
    return tuple(found)


def _path(directory: Path, domain: str) -> Path:
    name = f"{layout.escape(domain, layout.MAX_DOMAIN)}.json" if domain else COMMON
    return directory / DIRECTORY / name
