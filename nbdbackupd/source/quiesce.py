"""Hold the guest still for the instant at which a job begins, and never longer.

A marker file says, for the next run, that this one has frozen or paused the guest: a run that is
killed in between leaves the guest so, and ``release`` of the next one lets it go.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd import log as runlog
from nbdbackupd.errors import FreezeError, NbdbackupError
from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.domain import Agent
from nbdbackupd.virt import guest
from nbdbackupd.virt.domain import Domain, State

LOG = logging.getLogger(__name__)
THAW_ATTEMPTS: Final = 2
EMBEDDED_SECONDS: Final = 2.0
POLL_SECONDS: Final = 0.05
FROZEN: Final = "frozen"
PAUSED: Final = "paused"


class FreezePolicy(StrEnum):
    """Whether the guest's file systems are frozen: if it works, necessarily, or not at all."""

    AUTO = "auto"
    REQUIRE = "require"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiet:
    """How the guest is held still. ``pause`` stops its CPUs instead of freezing.

    ``seconds`` bounds the wait for the agent's answer and the time that the guest stays frozen,
    each; ``marker`` is the file for the next run.
    """

    marker: Path
    freeze: FreezePolicy = FreezePolicy.AUTO
    mountpoints: tuple[str, ...] = ()
    pause: bool = False
    seconds: float = 30.0


@dataclass(slots=True)
class Moment:
    """What came of it; complete when the context has been left."""

    consistency: Consistency = Consistency.CRASH
    warnings: list[str] = field(default_factory=list)


@contextlib.contextmanager
def quiet(domain: Domain, wish: Quiet) -> Iterator[Moment]:
    """Hold the guest still during the body, as far as wished and possible.

    Raises FreezeError if freezing is required and does not succeed; nothing is frozen then.
    """
    moment = Moment()
    with contextlib.ExitStack() as stack:
        if wish.pause:
            stack.enter_context(_paused(domain, wish, moment))
        elif wish.freeze is not FreezePolicy.NEVER:
            stack.enter_context(_frozen(domain, wish, moment))
        yield moment


def release(domain: Domain, marker: Path, *, seconds: float = 30.0) -> str:
    """Let a guest go that a killed run has left frozen or paused; say what was done, or nothing.

    A guest whose agent does not answer is said so, too: that must not hinder a backup, and the
    guest may have been started anew since then. Raises DomainError if it can't be resumed.
    """
    try:
        held = marker.read_text("ascii")
    except FileNotFoundError:
        return ""
    done = ""
    if held == FROZEN and domain.is_active():
        try:
            count = guest.thaw(domain, seconds=seconds)
            done = f"{count} file systems of the guest, frozen by a killed run, were thawed"
        except FreezeError as err:
            done = f"a killed run had frozen the guest: {err.message}"
    elif held == PAUSED and domain.state() is State.PAUSED:
        domain.resume()
        done = "the guest, paused by a killed run, was resumed"
    marker.unlink(missing_ok=True)
    return done


@contextlib.contextmanager
def _paused(domain: Domain, wish: Quiet, moment: Moment) -> Iterator[None]:
    moment.consistency = Consistency.PAUSED
    if domain.state() is State.PAUSED:
        # somebody else's pause: not ours to end
        yield
        return
    wish.marker.write_text(PAUSED, "ascii")
    try:
        domain.suspend()
        yield
    finally:
        if domain.state() is State.PAUSED:
            domain.resume()
        wish.marker.unlink(missing_ok=True)


@contextlib.contextmanager
def _frozen(domain: Domain, wish: Quiet, moment: Moment) -> Iterator[None]:
    obstacle = _obstacle(domain)
    if obstacle:
        if wish.freeze is FreezePolicy.REQUIRE:
            raise FreezeError(
                f"domain {domain.name} can't be frozen: {obstacle}; "
                f"start the agent in the guest or use '--freeze auto'",
                domain=domain.name,
            )
        LOG.info("domain %s is not frozen: %s", domain.name, obstacle)
        yield
        return
    ice = _Ice(domain, wish, moment)
    try:
        ice.freeze()
        yield
    finally:
        ice.thaw()


def _agent(domain: Domain) -> Agent:
    """Look at the agent's channel; an embedded libvirt needs a moment to see that it is there.

    Measured with libvirt 9.0: some 100 ms after the open.
    """
    agent = domain.definition().agent
    deadline = time.monotonic() + (EMBEDDED_SECONDS if domain.connection.is_embedded else 0.0)
    while agent is Agent.DISCONNECTED and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        agent = domain.definition().agent
    return agent


def _obstacle(domain: Domain) -> str:
    agent = _agent(domain)
    if agent is Agent.ABSENT:
        return "it has no guest agent channel"
    if agent is Agent.DISCONNECTED:
        return "no guest agent is connected"
    if domain.state() is not State.RUNNING:
        return "its guest does not run, so that its agent can't answer"
    return ""


class _Ice:
    """A freeze and its thaw, which happens once: at the end, or when the guest waited too long."""

    def __init__(self, domain: Domain, wish: Quiet, moment: Moment) -> None:
        self._domain = domain
        self._wish = wish
        self._moment = moment
        self._lock = threading.Lock()
        self._count = 0
        self._is_attempted = False
        self._watchdog = threading.Timer(wish.seconds, runlog.carried(self._expire))
        self._watchdog.daemon = True

    def freeze(self) -> None:
        """Freeze; what fails is thawed at once, and raised if freezing is required."""
        self._wish.marker.write_text(FROZEN, "ascii")
        self._is_attempted = True
        try:
            self._count = guest.freeze(
                self._domain, self._wish.mountpoints, seconds=self._wish.seconds
            )
            failure = "" if self._count else "no file system in the guest could be frozen"
        except FreezeError as err:
            failure = err.message
        if not failure:
            self._moment.consistency = Consistency.FILESYSTEM
            self._watchdog.start()
            return
        # it may be frozen all the same: the answer came too late
        self.thaw()
        events.emit(LOG, events.FREEZE_FAILED, reason=failure)
        if self._wish.freeze is FreezePolicy.REQUIRE:
            raise FreezeError(
                f"domain {self._domain.name} was not frozen: {failure}", domain=self._domain.name
            )
        self._moment.warnings.append(f"not frozen: {failure}")

    def thaw(self) -> None:
        """Thaw, unless that has happened; failures become warnings, the backup is sound."""
        self._watchdog.cancel()
        with self._lock:
            if self._is_attempted:
                self._is_attempted = False
                self._thaw()

    def _expire(self) -> None:
        with self._lock:
            if not self._is_attempted:
                return
            self._is_attempted = False
            self._thaw()
            self._warn(
                events.THAW_FORCED,
                f"thawed after {self._wish.seconds:g} s, since the job had not begun by then",
            )

    def _thaw(self) -> None:
        problem = ""
        for _ in range(THAW_ATTEMPTS):
            try:
                thawed = guest.thaw(self._domain, seconds=self._wish.seconds)
            except NbdbackupError as err:
                problem = err.message
                continue
            self._wish.marker.unlink(missing_ok=True)
            if thawed < self._count:
                # Windows ends a freeze after 10 s by itself
                self._warn(
                    events.THAW_FORCED,
                    f"only {thawed} of {self._count} file systems were still frozen",
                )
            return
        if self._count:
            self._warn(
                events.THAW_FAILED,
                f"THE GUEST MAY STILL BE FROZEN: {problem}; try 'virsh domfsthaw'",
            )
        else:
            self._moment.warnings.append(f"thawing after the failed freeze failed, too: {problem}")

    def _warn(self, event: events.Event, text: str) -> None:
        self._moment.consistency = Consistency.CRASH
        self._moment.warnings.append(text)
        with runlog.context(DOMAIN=self._domain.name):
            events.emit(LOG, event, reason=text)
