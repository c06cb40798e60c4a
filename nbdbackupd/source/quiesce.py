"""Hold the guest still for the instant at which a job begins, and never longer.

A marker file says which run has frozen or paused the guest. It stays as long as the guest may be
held: that run may be killed in between, or its agent may answer neither the freeze nor the thaw,
and then freeze late. The run's guard (source/guarding.py) lets the guest go, or else the next run.

An agent does one thing after the other: once it has answered a thaw, no earlier freeze is to come.
"""

import contextlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Protocol

from nbdbackupd import durable, events, files
from nbdbackupd import log as runlog
from nbdbackupd.errors import AgentAnswerError, FreezeError, IntegrityError, NbdbackupError
from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.domain import Agent
from nbdbackupd.model.freeze_memory import MAY_BE_FROZEN
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.virt import guest
from nbdbackupd.virt.domain import Domain, GuestState

LOG = logging.getLogger(__name__)
THAW_ATTEMPTS: Final = 2
ANSWER_SECONDS: Final = 5.0
"""For an agent that has just let a deadline pass."""

EMBEDDED_SECONDS: Final = 2.0
POLL_SECONDS: Final = 0.05
FROZEN: Final = "frozen"
PAUSED: Final = "paused"
BOTH: Final = "both"
"""Paused for a moment while it is frozen."""

WITHOUT: Final = "or do without: freeze.policy 'never' ('backup --freeze never')"
MAX_MARKER: Final = 256


class Pausable(Protocol):
    """A guest whose processors can be halted."""

    def state(self) -> GuestState:
        """What QEMU does with it."""

    def suspend(self) -> None:
        """Halt it."""

    def resume(self) -> None:
        """Let it go on."""


class Freezable(ABC):
    """A guest that may have an agent.

    ``cures`` are for each state of its agent, ``by_hand`` is how a person thaws it, or empty.
    """

    name: str
    cures: ClassVar[Mapping[Agent, str]]
    by_hand: ClassVar[str]

    @abstractmethod
    def state(self) -> GuestState:
        """What QEMU does with it."""

    @abstractmethod
    def suspend(self) -> None:
        """Halt it."""

    @abstractmethod
    def resume(self) -> None:
        """Let it go on."""

    @abstractmethod
    def is_active(self) -> bool:
        """Whether there is somebody to thaw."""

    @abstractmethod
    def agent(self) -> Agent:
        """Whether an agent is there."""

    @abstractmethod
    def freeze(self, mountpoints: Sequence[str], *, seconds: float) -> int:
        """Freeze all file systems, or these; returns how many. Raises FreezeError."""

    @abstractmethod
    def thaw(self, *, seconds: float) -> int:
        """Thaw all file systems; returns how many were frozen. Raises FreezeError."""


class _OfLibvirt(Freezable):
    """The guest of a domain."""

    cures: ClassVar = {
        Agent.ABSENT: "give the domain a channel org.qemu.guest_agent.0, its guest the agent",
        Agent.DISCONNECTED: "start the agent in the guest",
        Agent.CONNECTED: "resume the guest",
    }
    by_hand = ", and 'virsh domfsthaw' does it, too"

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.name = domain.name

    def state(self) -> GuestState:
        return self._domain.state()

    def suspend(self) -> None:
        self._domain.suspend()

    def resume(self) -> None:
        self._domain.resume()

    def is_active(self) -> bool:
        return self._domain.is_active()

    def agent(self) -> Agent:
        """Look at the agent's channel; an embedded libvirt needs a moment to see that it is there.

        Measured with libvirt 9.0: some 100 ms after the open.
        """
        agent = self._domain.definition().agent
        seconds = EMBEDDED_SECONDS if self._domain.connection.is_embedded else 0.0
        deadline = time.monotonic() + seconds
        while agent is Agent.DISCONNECTED and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            agent = self._domain.definition().agent
        return agent

    def freeze(self, mountpoints: Sequence[str], *, seconds: float) -> int:
        return guest.freeze(self._domain, mountpoints, seconds=seconds)

    def thaw(self, *, seconds: float) -> int:
        return guest.thaw(self._domain, seconds=seconds)


def _freezable(held: Domain | Freezable) -> Freezable:
    return held if isinstance(held, Freezable) else _OfLibvirt(held)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiet:
    """How the guest is held still, ``mountpoints`` all if there are none.

    ``seconds`` bounds the wait for the agent's answer and the time that the guest stays frozen,
    each; ``marker`` is the file that tells of it, ``run_id`` what it says. ``on_held`` is called
    if the agent has not confirmed the thaw, from any thread: somebody has to go on thawing.
    ``on_freeze`` is called after a freeze was tried: whether the agent has let a deadline pass.
    ``obstacle`` is why the guest had better not be frozen now, or empty. ``was_frozen``: earlier
    points of it were taken frozen, so that one that is not is to be told (W-1).
    """

    marker: Path
    run_id: str = ""
    on_held: Callable[[], None] = lambda: None
    on_freeze: Callable[[bool], None] = lambda _is_unanswered: None
    freeze: FreezePolicy = FreezePolicy.AUTO
    mountpoints: tuple[str, ...] = ()
    seconds: float = 30.0
    obstacle: str = ""
    was_frozen: bool = False


@dataclass(slots=True)
class Moment:
    """What came of it; complete when the context has been left.

    ``is_unanswered``: the agent was given up; it is not to be asked again soon (F-45).
    """

    consistency: Consistency = Consistency.CRASH
    is_unanswered: bool = False
    warnings: list[str] = field(default_factory=list)


@contextlib.contextmanager
def quiet(held: Domain | Freezable, request: Quiet) -> Iterator[Moment]:
    """Hold the guest still during the body, as far as wished and possible.

    Raises FreezeError if freezing is required and does not succeed; nothing is frozen then.
    """
    moment, domain = Moment(), _freezable(held)
    with contextlib.ExitStack() as stack:
        if request.freeze is FreezePolicy.PAUSE:
            stack.enter_context(paused(domain, request, moment))
        elif request.freeze is not FreezePolicy.NEVER:
            stack.enter_context(_frozen(domain, request, moment))
        yield moment


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What became of a guest that was held: ``done`` to it, or the ``problem`` that keeps it so.

    ``is_answered``: the problem is the agent's own answer.
    """

    done: str = ""
    problem: str = ""
    is_answered: bool = False


def release(guest: Domain | Freezable, marker: Path, *, seconds: float = ANSWER_SECONDS) -> Release:
    """Let a guest go that an earlier run has left frozen or paused.

    A guest whose agent does not answer is said so, too, and the marker stays: that must not hinder
    a backup, and its guard goes on. Raises DomainError if it can't be resumed.
    """
    held, _ = _held(marker)
    domain, done = _freezable(guest), ""
    if held in (PAUSED, BOTH):
        done = _resumed(domain)
    if held in (FROZEN, BOTH) and domain.is_active():
        answer = "the guest's agent, which an earlier run had asked to freeze, answers: "
        try:
            done = answer + _thawed(domain.thaw(seconds=seconds))
        except FreezeError as err:
            is_answered = isinstance(err, AgentAnswerError)
            if not isinstance(err, AgentAnswerError) or not err.is_thawed:
                text = f"an earlier run had frozen the guest, or tried to: {err.message}"
                return Release(problem=text, is_answered=is_answered)
            done = f"{answer}nothing is frozen, but {err.message}"
    marker.unlink(missing_ok=True)
    return Release(done=done)


def _resumed(guest: Pausable) -> str:
    if guest.state() is not GuestState.PAUSED:
        return ""
    guest.resume()
    return "the guest, paused by a killed run, was resumed"


def _thawed(count: int) -> str:
    if not count:
        return "nothing is frozen"
    return "1 file system was thawed" if count == 1 else f"{count} file systems were thawed"


def settle(domain: Domain | Freezable, marker: Path, run_id: str, *, seconds: float) -> Release:
    """Let a guest go that the run has left frozen or paused.

    What another run holds is not touched. Raises DomainError.
    """
    if _held(marker)[1] != run_id:
        return Release()
    found = release(domain, marker, seconds=seconds)
    if found.done:
        events.emit(LOG, events.GUEST_RELEASED, reason=found.done)
    return found


def forget(marker: Path, run_id: str) -> None:
    """Remove the marker of a run's guest that is no more."""
    if _held(marker)[1] == run_id:
        marker.unlink(missing_ok=True)


def is_held(marker: Path) -> bool:
    """Tell whether a run has frozen or paused the guest, and nobody knows that it was let go."""
    return marker.exists()


def _held(marker: Path) -> tuple[str, str]:
    """What a marker says: how the guest is held, and by which run.

    QEMU can write where it lies: it may be a link, a pipe, or without end.
    """
    try:
        with os.fdopen(files.open_untrusted(marker), "rb") as file:
            text = file.read(MAX_MARKER).decode(errors="replace")
    except FileNotFoundError:
        return "", ""
    except (OSError, IntegrityError) as err:
        LOG.warning("%s is no marker of ours: %s", marker, err)
        return "", ""
    how, _, run_id = text.partition(" ")
    return how, run_id


def _mark(request: Quiet, how: str) -> None:
    # in the place of whatever is there: never through a link that QEMU made
    durable.write_atomic(request.marker, f"{how} {request.run_id}".encode())


@contextlib.contextmanager
def paused(domain: Pausable, request: Quiet, moment: Moment) -> Iterator[None]:
    """Pause the guest during the body, unless somebody has paused it already."""
    moment.consistency = Consistency.PAUSED
    if domain.state() is GuestState.PAUSED:
        # somebody else's pause: not ours to end
        yield
        return
    before = _held(request.marker)[0]
    is_frozen = before in (FROZEN, BOTH)
    _mark(request, BOTH if is_frozen else PAUSED)
    try:
        domain.suspend()
        yield
    finally:
        if domain.state() is GuestState.PAUSED:
            domain.resume()
        if is_frozen:
            _mark(request, FROZEN)
        else:
            request.marker.unlink(missing_ok=True)


@contextlib.contextmanager
def _frozen(domain: Freezable, request: Quiet, moment: Moment) -> Iterator[None]:
    agent = domain.agent()
    obstacle = _obstacle(domain, agent)
    if obstacle and request.freeze is FreezePolicy.AUTO:
        if agent is not Agent.ABSENT or request.was_frozen:
            moment.warnings.append(f"not frozen: {obstacle}; {domain.cures[agent]}, {WITHOUT}")
    elif not obstacle and request.freeze is not FreezePolicy.REQUIRE:
        obstacle = request.obstacle
        if is_held(request.marker):
            # what the agent does next is what it was asked before
            obstacle = "its agent has not yet confirmed the thaw after an earlier freeze"
        if obstacle:
            moment.warnings.append(f"not frozen: {obstacle}")
    if obstacle:
        if request.freeze is FreezePolicy.REQUIRE:
            raise FreezeError(
                f"domain {domain.name} can't be frozen: {obstacle}; {domain.cures[agent]}, or set "
                f"freeze.policy to 'auto' ('backup --freeze auto')",
                domain=domain.name,
            )
        LOG.info("domain %s is not frozen: %s", domain.name, obstacle)
        yield
        return
    ice = _Ice(domain, request, moment)
    try:
        ice.freeze()
        yield
    finally:
        ice.thaw()
        request.on_freeze(moment.is_unanswered)


def _obstacle(domain: Freezable, agent: Agent) -> str:
    if agent is Agent.ABSENT:
        return "it has no guest agent channel"
    if agent is Agent.DISCONNECTED:
        return "no guest agent is connected"
    if domain.state() is not GuestState.RUNNING:
        return "its guest does not run, so that its agent can't answer"
    return ""


class _Ice:
    """A freeze and its thaw, which happens once: at the end, or when the guest waited too long."""

    def __init__(self, domain: Freezable, request: Quiet, moment: Moment) -> None:
        self._domain = domain
        self._request = request
        self._moment = moment
        self._lock = threading.Lock()
        self._count = 0
        self._is_attempted = False
        self._watchdog = threading.Timer(request.seconds, runlog.carried(self._expire))
        self._watchdog.daemon = True

    def freeze(self) -> None:
        """Freeze; what fails is thawed at once, and raised if freezing is required."""
        _mark(self._request, FROZEN)
        self._is_attempted = True
        begun = time.monotonic()
        try:
            self._count = self._domain.freeze(
                self._request.mountpoints, seconds=self._request.seconds
            )
            failure = "" if self._count else "no file system in the guest could be frozen"
        except FreezeError as err:
            failure = err.message
            self._moment.is_unanswered = time.monotonic() - begun >= self._request.seconds
        if not failure:
            self._moment.consistency = Consistency.FILESYSTEM
            self._watchdog.start()
            return
        # it may be frozen all the same: the answer came too late
        self.thaw()
        events.emit(LOG, events.FREEZE_FAILED, reason=failure)
        if self._request.freeze is FreezePolicy.REQUIRE:
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
                f"thawed after {self._request.seconds:g} s, since the job had not begun by then",
            )

    def _thaw(self) -> None:
        problem = ""
        is_late = self._moment.is_unanswered
        seconds = min(ANSWER_SECONDS, self._request.seconds) if is_late else self._request.seconds
        for _ in range(1 if is_late else THAW_ATTEMPTS):
            try:
                thawed = self._domain.thaw(seconds=seconds)
            except NbdbackupError as err:
                problem = err.message
                if isinstance(err, AgentAnswerError) and err.is_thawed:
                    self._request.marker.unlink(missing_ok=True)
                    self._warn(events.THAW_FORCED, f"nothing is frozen any more, but {problem}")
                    return
                continue
            self._request.marker.unlink(missing_ok=True)
            if thawed < self._count:
                # Windows ends a freeze after 10 s by itself
                self._warn(
                    events.THAW_FORCED,
                    f"only {thawed} of {self._count} file systems were still frozen",
                )
            return
        self._moment.is_unanswered = True
        self._warn(
            events.THAW_FAILED,
            f"{MAY_BE_FROZEN}: {problem}; it is thawed as soon as its agent answers"
            f"{self._domain.by_hand}",
        )
        self._request.on_held()

    def _warn(self, event: events.Event, text: str) -> None:
        self._moment.consistency = Consistency.CRASH
        self._moment.warnings.append(text)
        with runlog.context(DOMAIN=self._domain.name):
            events.emit(LOG, event, reason=text)
