"""Start a domain that is off, paused, for one run; end it again unless somebody took it over.

A marker file tells the next run of an instance that a killed one has left. Nothing is tied to
our connection (libvirt's autodestroy): the loss of it would end an instance that somebody has
resumed meanwhile. An instance is ended only if it is the one that we started and its guest has
never run: whoever resumes it keeps it.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

from nbdbackupd import documents, durable, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model.chain import Consistency
from nbdbackupd.virt import instance
from nbdbackupd.virt.domain import Domain, Ending

LOG = logging.getLogger(__name__)
MARKER_MODE: Final = 0o600
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class PausedStart:
    """What became of it. ``at_rest``: what the disks of a guest that has not run are.

    None if the domain ran already, or somebody else started it: the run is an ordinary one.
    ``left`` is complete when the context has been left: why the instance goes on, or empty.
    """

    at_rest: Consistency | None = None
    left: str = ""


def marker(directory: Path) -> Path:
    """Where the marker is in the domain's directory, which QEMU can't write to."""
    return directory / rundir.STARTED_PAUSED


@contextlib.contextmanager
def started_paused(
    domain: Domain, directory: Path, *, wanted: bool = True
) -> Iterator[PausedStart]:
    """Have the domain there for the body, paused if it was off; then end it if still untouched.

    ``directory`` is the domain's own; its lock is held. What a killed run left is
    ended first, also if nothing is ``wanted``. A domain that runs is left as it is. Raises
    NotSupportedError (a saved state would be restored), DomainError, RepositoryError (the marker
    can't be written). An instance that can't be ended on leaving is told in ``left`` and left to
    the next run; that is no reason to lose a point.
    """
    started = PausedStart()
    old = release(domain, directory)
    if old:
        LOG.info("removed what a dead run left: %s", old)
    if not wanted or domain.is_active():
        yield started
        return
    at_rest = _at_rest(domain)
    file = marker(directory)
    with durable.translate_os_errors("write", file):
        durable.make_directory(file.parent, 0o711)
        # before the start, so that no kill can come between
        durable.write_atomic(file, _document(None), MARKER_MODE)
    try:
        number = instance.start_paused(domain)
        if number is None:
            file.unlink(missing_ok=True)
        else:
            with durable.translate_os_errors("write", file):
                durable.write_atomic(file, _document(number), MARKER_MODE)
            LOG.info("domain %s was started paused, instance %d", domain.name, number)
            started.at_rest = at_rest
        yield started
    finally:
        # by the marker, whether or not the number got there before an interruption
        started.left = _leave(domain, file)


def release(domain: Domain, directory: Path) -> str:
    """End an instance that a killed run has left paused; say what was done, or nothing.

    One that somebody has resumed, or that is another one by now, is left alone. Raises
    DomainError if it can't be ended.
    """
    match _settle(domain, marker(directory)):
        case _End.ENDED:
            return "the domain, started paused by a killed run, was ended"
        case _End.TAKEN:
            return "the domain, started paused by a killed run, was left to whoever resumed it"
        case _:
            return ""


def _at_rest(domain: Domain) -> Consistency:
    return Consistency.OFFLINE if domain.ending() is Ending.SHUTDOWN else Consistency.CRASH


class _End(Enum):
    """What became of an instance."""

    NONE = auto()
    GONE = auto()
    TAKEN = auto()
    ENDED = auto()


def _leave(domain: Domain, file: Path) -> str:
    try:
        end = _settle(domain, file)
    except (NbdbackupError, OSError) as err:
        text = f"the domain, started paused for this run, was not ended: {err}"
    else:
        if end is not _End.TAKEN:
            return ""
        text = "the domain, started paused for this run, was resumed by somebody: it goes on"
        # the guest has what its owner wants, and the point is whole
        LOG.log(runlog.NOTICE, "domain %s: %s", domain.name, text)
        return text
    LOG.warning("domain %s: %s", domain.name, text)
    return text


def _settle(domain: Domain, file: Path) -> _End:
    """End the instance of the marker if it is untouched; then the marker goes."""
    try:
        noted = _parse(file.read_bytes())
    except FileNotFoundError:
        return _End.NONE
    end = _End.GONE
    if noted is not None and _is_there(domain, noted):
        end = _End.ENDED if instance.never_ran(domain) else _End.TAKEN
    if end is _End.ENDED:
        instance.end(domain)
    file.unlink(missing_ok=True)
    return end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Noted:
    """The marker's content. ``number`` is None if the run ended before it knew."""

    number: int | None
    boot: str


def _document(number: int | None) -> bytes:
    return json.dumps({"version": 1, "instance": number, "boot": _boot()}).encode()


def _parse(data: bytes) -> _Noted | None:
    try:
        document = documents.parse_json(data)
        number = document["instance"]
        return _Noted(number=None if number is None else int(number), boot=str(document["boot"]))
    except (ValueError, KeyError, TypeError) as err:
        LOG.warning("the marker of a domain started paused can't be read: %s", err)
        return None


def _is_there(domain: Domain, noted: _Noted) -> bool:
    """Tell whether the instance of the marker runs; numbers begin anew with the host."""
    if noted.boot != _boot() or not domain.is_active():
        return False
    return noted.number is None or noted.number == instance.number(domain)


def _boot() -> str:
    return BOOT_ID.read_text("ascii").strip()
