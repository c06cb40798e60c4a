"""What is well formed in the files and still can't have the effect that was meant, on this host.

Errors keep every run from beginning; remarks are what ``config check`` warns of beside them. A URI
of another host is an error, which only the host can tell.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from nbdbackupd.config.files import ConfigFile, Configuration
from nbdbackupd.config.matching import Match
from nbdbackupd.config.reading import Problem
from nbdbackupd.config.schema import MATCH
from nbdbackupd.model.chain import Compression, DigestKind
from nbdbackupd.model.domain import is_uuid

DISKS: Final = ("disks.include", "disks.exclude")
COMMANDS: Final = ("commands.pre", "commands.post", "notification.command")
DIRECTORIES: Final = ("monitoring.metrics_directory", "repository.mount_point")
FILES: Final = ("libvirt.password_file",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A domain that libvirt knows; ``targets`` are its disks, None if they are not known."""

    name: str
    uuid: str
    labels: Mapping[str, str]
    targets: tuple[str, ...] | None = None


def remarks(
    configuration: Configuration,
    domains: Sequence[Known] | None,
    is_over: Callable[[str], bool],
    lack: Callable[[DigestKind, Compression | None], str],
) -> tuple[Problem, ...]:
    """All that is odd, each once, in the order of files and lines.

    ``domains`` are those of this host, None if nobody tells; ``is_over`` tells whether a calendar
    event never comes again, ``lack`` which library is missing for a digest or a compression.
    """
    found: list[Problem] = []
    for file in configuration.files:
        found += _of_places(file)
        found += _of_events(file, is_over)
        found += _of_libraries(file, lack)
        if domains is None:
            continue
        chosen: Sequence[Known] = domains
        if file.match is not None:
            found += _of_match(file, file.match, domains)
            found += _of_machines(file, file.match, domains)
            match = file.match
            chosen = [each for each in domains if match.fits(each.name, each.uuid, each.labels)]
        found += _of_disks(file, chosen)
    return tuple(sorted(set(found)))


def _of_places(file: ConfigFile) -> Iterator[Problem]:
    """Programs, directories and files that are not there."""
    for path in COMMANDS:
        value = _value(file, path)
        for words in (value or ()) if path != COMMANDS[-1] else filter(None, [value]):
            if not Path(words[0]).is_file():
                yield _problem(file, path, f"there is no program {words[0]}: fix it, or install it")
            elif not os.access(words[0], os.X_OK):
                yield _problem(file, path, f"{words[0]} can't be executed: 'chmod +x {words[0]}'")
    for path in DIRECTORIES:
        value = _value(file, path)
        if value is not None and not value.is_dir():
            yield _problem(file, path, f"there is no directory {value}: make it")
    for path in FILES:
        value = _value(file, path)
        if value is not None and not value.is_file():
            yield _problem(file, path, f"there is no file {value}: write it")


def _of_events(file: ConfigFile, is_over: Callable[[str], bool]) -> Iterator[Problem]:
    path = "schedule.calendar"
    for event in _value(file, path) or ():
        if is_over(event):
            yield _problem(file, path, f"{event!r} is over and never comes again; give another one")


def _of_libraries(
    file: ConfigFile, lack: Callable[[DigestKind, Compression | None], str]
) -> Iterator[Problem]:
    wanted = (
        ("digest", lack(_value(file, "digest") or DigestKind.SHA256, None)),
        ("compression", lack(DigestKind.SHA256, _value(file, "compression"))),
    )
    yield from (_problem(file, path, said) for path, said in wanted if said)


def _of_match(file: ConfigFile, match: Match, domains: Sequence[Known]) -> Iterator[Problem]:
    def complain(matcher: str, text: str, message: str) -> Problem:
        path = f"{MATCH}.{matcher}"
        return Problem(str(file.path), file.places.get((path, text), 0), path, message)

    before: list[Problem] = []
    for name in match.names:
        if not any(name == each.name or name.lower() == each.uuid.lower() for each in domains):
            kind = "UUID" if is_uuid(name) else "name"
            cure = "; a pattern goes into match.glob" if set("*?[") & {*name} else ""
            message = f"libvirt knows no domain of the {kind} {name!r}{cure}"
            before.append(complain("name", name, message))
    for matcher, patterns in (("glob", match.globs), ("regex", match.regexes)):
        for text in patterns:
            key = "globs" if matcher == "glob" else "regexes"
            alone = Match(metadata={}, **{key: (text,)})
            if not any(alone.fits_name(each.name, each.uuid) for each in domains):
                before.append(
                    complain(matcher, text, f"{text!r} fits no domain that libvirt knows")
                )
    yield from before
    if not before and not any(match.fits(each.name, each.uuid, each.labels) for each in domains):
        line = min(file.places.values(), default=0)
        message = "all conditions together fit no domain that libvirt knows"
        yield Problem(str(file.path), line, MATCH, message)


def _of_machines(file: ConfigFile, match: Match, domains: Sequence[Known]) -> Iterator[Problem]:
    """A QEMU without libvirt that has a domain's name, which nothing saves then."""
    if _value(file, "qmp") is None:
        return
    # machines without libvirt have no UUID here
    for each in domains:
        if each.uuid and each.name == match.sole_name:
            yield _problem(
                file, "qmp", f"libvirt has a domain {each.name!r}, too, which is not saved because "
                "of this file; give the machine without libvirt another name",
            )  # fmt: skip


def _of_disks(file: ConfigFile, domains: Sequence[Known]) -> Iterator[Problem]:
    """Disks that none of the domains has that the file is for."""
    seen = [each.targets for each in domains if each.targets is not None]
    if not seen:
        return
    there = {target for targets in seen for target in targets}
    for path in DISKS:
        for target in _value(file, path) or ():
            if target not in there:
                whose = domains[0].name if len(domains) == 1 else "any domain that this file is for"
                yield _problem(file, path, f"{target} is no disk of {whose}; fix or remove it")


def _value(file: ConfigFile, path: str) -> Any:
    return file.values[path].value if path in file.values else None


def _problem(file: ConfigFile, path: str, message: str) -> Problem:
    return Problem(str(file.path), file.values[path].line, path, message)


def foreign_hosts(configuration: Configuration) -> list[Problem]:
    """The URIs of libvirt that name another host."""
    path = "libvirt.uri"
    uris = [file.values[path] for file in configuration.files if path in file.values]
    faults = [(each, _address_fault(each.value)) for each in uris]
    return [Problem(each.file, each.line, path, said) for each, said in faults if said]


def _address_fault(uri: str) -> str:
    """Why this URI can't be that of this host's libvirt, or nothing.

    Looks the name up and asks the kernel whether such an address is one of ours. What passes
    may still lead elsewhere (a tunnel); each run has that proven by libvirt itself.
    """
    try:
        host = urlsplit(uri).hostname
    except ValueError as err:
        return f"not a libvirt URI: {uri!r}: {err}"
    if not host:
        return ""
    cure = "run nbdbackupctl on that host, and leave the host out of the URI"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return f"{host} has no address, so it can't be shown to be this host; {cure}"
    if any(_is_ours(family, address) for family, _, _, _, address in found):
        return ""
    return f"{host} is another host, whose guests can't be saved from here; {cure}"


def _is_ours(family: int, address: tuple[Any, ...]) -> bool:
    """Whether the kernel lets us bind to an address, as it does to those of its own."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind(address)
    except OSError:
        return False
    return True
