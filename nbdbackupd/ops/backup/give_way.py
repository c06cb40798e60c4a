"""``yield``: make backups let go of the images of a domain that is to start."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd import events
from nbdbackupd import log as runlog
from nbdbackupd.errors import BusyError
from nbdbackupd.plain import versioned
from nbdbackupd.source import lease

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveWayReport:
    """``runs`` are the run ids and process ids of those that were told; ``seconds`` until free.

    ``killed`` tells whether a server that read images had to be ended.
    """

    domain: str
    runs: tuple[tuple[str, int], ...]
    killed: bool
    seconds: float

    @property
    def message(self) -> str:
        """What was done, for a reader."""
        if not self.runs and not self.killed:
            return f"no backup has images of domain {self.domain} open"
        told = ", ".join(f"run {run} (process {pid})" for run, pid in self.runs) or "a dead run"
        return f"{told} let go of domain {self.domain} within {self.seconds:.2f} s"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return versioned(
            domain=self.domain,
            runs=[{"run": run, "pid": pid} for run, pid in self.runs],
            killed=self.killed,
            seconds=round(self.seconds, 3),
        )


def run(domain: str, runtime_dir: Path) -> GiveWayReport:
    """Free the images of a domain, given by name or UUID. libvirt is not asked.

    Raises BusyError if an image is still open after two seconds.
    """
    with runlog.context(DOMAIN=domain):
        try:
            given = lease.give_way(runtime_dir, domain)
        except BusyError as err:
            events.emit(log, events.IMAGES_HELD, reason=err)
            raise
        report = GiveWayReport(
            domain=domain,
            runs=tuple((holder.run_id, holder.run.pid) for holder in given.holders),
            killed=given.killed,
            seconds=given.seconds,
        )
        if report.runs or report.killed:
            duration = events.usec(given.seconds)
            events.emit(log, events.IMAGES_RELEASED, reason=report.message, duration_usec=duration)
    return report
