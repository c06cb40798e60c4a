"""``verify --boot``: see whether a guest really comes up from a point.

The point is booted as ``boot`` does, without a network, and libvirt ends the domain should we die.
Then one of three things must happen in time: the guest's agent answers, its first serial port says
something, or a program of the user is content. A picture of the screen is taken in any case, all is
torn down, and the result is written into the set.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from nbdbackupd import events, plain, proc
from nbdbackupd import log as runlog
from nbdbackupd.errors import NbdbackupError, ProcessError, UsageError
from nbdbackupd.model.domain import Agent, parse_domain
from nbdbackupd.ops.boot import boot
from nbdbackupd.ops.boot.boot import Booted, BootRequest
from nbdbackupd.repo import boot_tests
from nbdbackupd.repo.boot_tests import BootTest
from nbdbackupd.virt import transient
from nbdbackupd.virt.connection import Connection

log = logging.getLogger(__name__)
POLL_SECONDS: Final = 0.2
PROBE_PAUSE_SECONDS: Final = 2.0
PING_SECONDS: Final = 5
MAX_CONSOLE: Final = 1 << 20
"""Only the last bytes of what the guest says are searched."""


class Sign(StrEnum):
    """What tells that a guest is up."""

    AGENT = "agent"
    CONSOLE = "console"
    COMMAND = "command"


@dataclass(frozen=True, kw_only=True, slots=True)
class BootTestRequest:
    """What to boot and what to wait for, at most ``seconds``.

    ``pattern`` goes with the sign CONSOLE, ``command`` with COMMAND: a program and its arguments,
    started again and again until it ends with 0. It finds the domain in its environment:
    ``NBDBACKUP_BOOT_NAME``, ``NBDBACKUP_BOOT_UUID``, ``NBDBACKUP_BOOT_URI`` and
    ``NBDBACKUP_BOOT_CONSOLE``, a file with what the first serial port has said.
    """

    boot: BootRequest
    sign: Sign = Sign.AGENT
    pattern: re.Pattern[bytes] | None = None
    command: tuple[str, ...] = ()
    seconds: float = 300.0

    @property
    def waited_for(self) -> str:
        """The sign in words."""
        if self.pattern is not None:
            return f"console {self.pattern.pattern.decode(errors='replace')}"
        return f"command {proc.program(self.command)}" if self.command else str(self.sign)


@dataclass(frozen=True, kw_only=True, slots=True)
class BootTestReport:
    """A test; ``result`` and ``picture`` are files, None if they could not be written."""

    test: BootTest
    result: Path | None
    picture: Path | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            **self.test.to_json(),
            "picture": str(self.picture) if self.picture else "",
            "result": str(self.result) if self.result else "",
            "warnings": list(self.warnings),
        }


def run(
    request: BootTestRequest,
    connection: Connection,
    *,
    cancelled: Callable[[], None],
) -> BootTestReport:
    """Test a point; a guest that does not come up is a result, no error.

    Raises UsageError (the domain has no agent to wait for), and as ``boot.start``: what keeps a
    domain from starting at all is told as such.
    """
    with (
        runlog.context(SET=request.boot.source),
        boot.booted(request.boot, connection, cancelled=cancelled) as up,
    ):
        begun = time.monotonic()
        _check(request, up)
        reason = _Waiting(request, up, cancelled).run()
        seconds = time.monotonic() - begun
        suffix, picture = _picture(up)
        test = BootTest(
            point=up.record.point,
            tested=f"{request.boot.started:%Y-%m-%dT%H:%M:%SZ}",
            passed=not reason,
            waited_for=request.waited_for,
            seconds=round(seconds, 3),
            reason=reason,
            picture=boot_tests.picture_name(up.record.point, suffix) if picture else "",
        )
        domain = up.domain.name
    report = _record(request, test, picture, up.warnings)
    _tell(test, domain)
    return report


def _check(request: BootTestRequest, up: Booted) -> None:
    if request.sign is Sign.AGENT and parse_domain(up.record.xml).agent is Agent.ABSENT:
        raise UsageError(
            "this domain has no channel for the guest's agent: wait for something else, with "
            "--boot-wait console:REGEX or command:PROGRAM"
        )


class _Waiting:
    """Waits for the sign of one boot."""

    def __init__(self, request: BootTestRequest, up: Booted, cancelled: Callable[[], None]) -> None:
        self._request = request
        self._up = up
        self._cancelled = cancelled
        self._deadline = time.monotonic() + request.seconds
        self._said = ""

    def run(self) -> str:
        """Wait; why it was in vain, or nothing."""
        while True:
            self._cancelled()
            if not transient.is_running(self._up.domain):
                # its last words may have been what was waited for
                if self._request.sign is Sign.CONSOLE and self._is_there():
                    return ""
                return "the guest has ended" + self._last_words()
            if self._is_there():
                return ""
            if transient.is_held_by_error(self._up.domain):
                return "the guest was stopped by an error of its disks" + self._last_words()
            if time.monotonic() > self._deadline:
                return f"no sign within {self._request.seconds:g} s" + self._last_words()
            time.sleep(POLL_SECONDS)

    def _is_there(self) -> bool:
        match self._request.sign:
            case Sign.AGENT:
                return transient.ping(self._up.domain, seconds=PING_SECONDS)
            case Sign.CONSOLE:
                pattern = self._request.pattern
                return pattern is not None and pattern.search(_tail(self._up.console)) is not None
            case Sign.COMMAND:
                return self._probe()

    def _probe(self) -> bool:
        """Run the user's program once, for as long as there is time."""
        record = self._up.record
        environment = {
            "NBDBACKUP_BOOT_NAME": record.name,
            "NBDBACKUP_BOOT_UUID": record.uuid,
            "NBDBACKUP_BOOT_URI": record.uri,
            "NBDBACKUP_BOOT_CONSOLE": str(self._up.console),
        }
        try:
            with proc.spawn(self._request.command, env=environment, umask=proc.INHERITED) as child:
                while (status := child.poll()) is None:
                    self._cancelled()
                    if time.monotonic() > self._deadline:
                        self._said = f": {child.name} did not end"
                        return False
                    time.sleep(POLL_SECONDS)
                if status:
                    self._said = f": {child.failure(status).message}"
        except ProcessError as err:
            # a program that can't be started never will be content
            raise UsageError(f"--boot-wait: {err.message}") from err
        if status:
            self._pause()
        return not status

    def _pause(self) -> None:
        until = min(time.monotonic() + PROBE_PAUSE_SECONDS, self._deadline)
        while time.monotonic() < until:
            self._cancelled()
            time.sleep(POLL_SECONDS)

    def _last_words(self) -> str:
        if self._said:
            return self._said
        text = _tail(self._up.console).decode(errors="replace")
        lines = (plain.line(each.strip()) for each in reversed(text.split("\n")))
        last = next(filter(None, lines), "")
        return f"; its console ends with: {last[-200:]}" if last else ""


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - MAX_CONSOLE))
            return file.read(MAX_CONSOLE)
    except OSError:
        # not written yet
        return b""


def _picture(up: Booted) -> tuple[str, bytes]:
    try:
        return transient.screenshot(up.domain)
    except NbdbackupError as err:
        # a guest without a screen, or one that has ended
        log.info("no picture: %s", err)
        return "", b""


def _record(
    request: BootTestRequest, test: BootTest, picture: bytes, warnings: tuple[str, ...]
) -> BootTestReport:
    try:
        result = boot_tests.write(request.boot.source, test, picture)
    except NbdbackupError as err:
        note = f"the boot test is not recorded: {err.message}"
        return BootTestReport(
            test=replace(test, picture=""), result=None, picture=None, warnings=(*warnings, note)
        )
    place = result.parent / test.picture if test.picture else None
    return BootTestReport(test=test, result=result, picture=place, warnings=warnings)


def _tell(test: BootTest, domain: str) -> None:
    if test.passed:
        log.info("point %s of %s came up in %.1f s", test.point, domain, test.seconds)
        return
    with runlog.context(DOMAIN=domain):
        events.emit(
            log,
            events.BOOT_TEST_FAILED,
            point=test.point,
            reason=test.reason,
            duration_usec=events.usec(test.seconds),
        )
