"""A run as others see it: what it does while it lives, and how it ended.

Nothing of this may make a failure of a backup: what can't be written costs a warning.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdbackupd import rundir
from nbdbackupd.errors import BusyError, Interrupted, NbdbackupError
from nbdbackupd.model import unitname
from nbdbackupd.model.host import Host, new_run_id
from nbdbackupd.ops.notify import notification
from nbdbackupd.repo import runs
from nbdbackupd.repo.runs import Begun, End, Living, Runs, Seen
from nbdbackupd.systemd import units

if TYPE_CHECKING:
    from nbdbackupd.ops.backup.request import BackupReport

log = logging.getLogger(__name__)

MAX_DOING: Final = 4 << 10
CGROUP: Final = Path("/proc/self/cgroup")
TROUBLE: Final = (NbdbackupError, OSError)


class RunRecord:
    """The record of one run, which may be tried several times; see ``begun``."""

    def __init__(self, host: Host, living: Living | None = None) -> None:
        self._host = host
        self._directory = host.runtime_dir / rundir.DOING
        self._living = living

    def doing(self, text: str) -> None:
        """Tell what the run does now, in words: ``vda: 45 %``."""
        if self._living is None:
            return
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=rundir.CLOSED, parents=True, exist_ok=True)
            (self._directory / self._living.run.ident).write_text(text)

    def failed(self, err: BaseException, again: datetime | None = None) -> None:
        """It was ended by this; ``again`` is when it will be tried again by itself."""
        reason = str(err) or type(err).__name__
        is_busy = isinstance(err, BusyError)
        if isinstance(err, Interrupted):
            reason = f"it was told to end ({signal.Signals(err.signum).name})"
            if self._living is not None and self._living.run.unit and units.is_stopping():
                self._living.is_unfinished = True
                reason = "the host was going down"
        by_unit = self._living is not None and self._living.run.unit
        given_up = not is_busy or (by_unit and again is None)
        self._end(
            result=runs.FAILED if given_up else runs.BUSY,
            status=getattr(err, "exit_code", 1),
            reason=reason,
            again=stamp(again),
        )

    def done(
        self,
        status: int,
        report: "BackupReport | None",
        reason: str,
        directory: str,
        problems: Iterable[str] = (),
    ) -> None:
        """It did what it should; ``report`` is None if no backup was tried.

        ``problems`` are warnings of which the point does not know.
        """
        point = report.point if report is not None else None
        if point is not None:
            self._end(
                result=runs.SAVED,
                status=status,
                reason="; ".join((*point.warnings, *problems)),
                level=point.level.value,
                point=point.id,
                set=directory,
            )
            return
        is_current = report is not None and report.is_current
        self._end(result=runs.CURRENT if is_current else runs.SKIPPED, status=status, reason=reason)

    def _end(self, *, result: str, status: int, reason: str, **facts: str) -> None:
        if self._living is None:
            return
        try:
            ended = stamp(self._host.now())
            self._living.end(ended=ended, result=result, status=status, reason=reason, **facts)
        except TROUBLE as err:
            log.warning("how this run ended is not noted: %s", err)


@contextlib.contextmanager
def begun(domain: str, host: Host) -> Iterator[RunRecord]:
    """Note that a run of a domain lives, as long as the block does."""
    moment = host.now()
    run = Begun(
        ident=own_unit() or f"hand-{new_run_id(moment)}",
        domain=domain,
        host=os.uname().nodename,
        boot=runs.boot_id(),
        begun=stamp(moment),
    )
    with contextlib.ExitStack() as stack:
        try:
            living = stack.enter_context(Runs(host.own_state_dir).living(run))
        except TROUBLE as err:
            log.warning("this run is not noted: %s", err)
            yield RunRecord(host)
            return
        try:
            yield RunRecord(host, living)
        finally:
            _forget_doing(host, run.ident)


def _forget_doing(host: Host, ident: str) -> None:
    """Remove what a run said of itself, and those that were killed."""
    known = Runs(host.own_state_dir)
    with contextlib.suppress(OSError):
        for path in (host.runtime_dir / rundir.DOING).iterdir():
            if path.name == ident or not known.is_alive(path.name):
                path.unlink()


def look(host: Host, *names: str) -> Seen:
    """What is known of the runs of a domain with these names, its UUID among them."""
    return Runs(host.own_state_dir).look(*names, boot=runs.boot_id())


def failure_text(seen: Seen, newest: datetime | None) -> str:
    """How the newest run failed that no good one has followed, nor any newer point ``newest``."""
    end = seen.failure
    if end is None or (newest is not None and newest > datetime.fromisoformat(end.begun)):
        return ""
    moment = datetime.fromisoformat(end.ended or end.begun).astimezone()
    status = "" if end.status is None else f", exit status {end.status}"
    return f"the run of {moment:%Y-%m-%d %H:%M %Z} failed: {end.reason} (by {by(end)}{status})"


def by(run: Begun | End) -> str:
    """Who began a run."""
    return run.unit or "hand"


def settle(host: Host, domain: str, reason: str = runs.KILLED) -> tuple[End, ...]:
    """Remember the ends of a domain's runs that nobody saw; they are returned."""
    try:
        return Runs(host.own_state_dir).settle(domain, boot=runs.boot_id(), reason=reason)
    except TROUBLE as err:
        log.warning("how runs of %s ended is not noted: %s", domain, err)
        return ()


def why_killed(result: str, status: str) -> str:
    """Why a run of this boot did not see its own end, by systemd's words for it, if there are.

    They are SERVICE_RESULT and EXIT_STATUS of systemd.exec(5).
    """
    _, shown, meaning = notification.result_of(result, status)
    return meaning or (f"it was killed ({shown})" if result else runs.KILLED)


def doing(run: Begun, host: Host) -> str:
    """What a living run does now, in its own words; empty if it has not said it."""
    try:
        with (host.runtime_dir / rundir.DOING / run.ident).open(errors="replace") as file:
            return file.read(MAX_DOING)
    except OSError:
        return ""


def own_unit() -> str:
    """The unit of ours that this process belongs to; empty if it belongs to none."""
    try:
        lines = CGROUP.read_text().splitlines()
    except OSError:
        return ""
    names = {line.rpartition("/")[2] for line in lines}
    return next((each for each in sorted(names) if unitname.domain_of(each)), "")


def stamp(moment: datetime | None) -> str:
    """RFC 3339 in UTC, to the microsecond: such texts sort by time; empty for none."""
    if moment is None:
        return ""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
