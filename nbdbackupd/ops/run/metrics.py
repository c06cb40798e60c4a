"""The metrics of one run, written when it has ended, well or not."""

import logging
import signal
import time
from pathlib import Path

from nbdbackupd.config.files import Configuration
from nbdbackupd.config.settings import global_settings
from nbdbackupd.errors import ConfigError, Interrupted, NbdbackupError
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.host import Host
from nbdbackupd.ops.backup.request import BackupReport
from nbdbackupd.ops.sets import holdings
from nbdbackupd.ops.sets.sets import sets_of
from nbdbackupd.ops.status import metrics
from nbdbackupd.repo.runs import End
from nbdbackupd.repo.set_directory import SetDirectory

log = logging.getLogger(__name__)


def unseen(end: End, configuration: Configuration, host: Host) -> None:
    """Write the metrics of a run that could not do so itself, if that is configured.

    Its exit status is the shell's for a kill: nobody saw another one.
    """
    try:
        directory = global_settings(configuration).monitoring_metrics_directory
    except ConfigError:
        return
    RunMetrics(directory, end.domain, host).failed(Interrupted(signal.SIGKILL))


def record_sets(directory: Path, domain: str, home: Path) -> None:
    """Write what the sets of a domain in its directory hold; a failure costs a warning."""
    try:
        metrics.record_sets(directory, domain, holdings.look(sets_of(home)))
    except NbdbackupError as err:
        log.warning("the metrics of the sets in %s are not written: %s", home, err)


class RunMetrics:
    """Made when the run begins; without a directory nothing is written.

    What goes wrong here costs a warning: it must not make a failure of a backup.
    """

    def __init__(self, directory: Path | None, domain: str, host: Host) -> None:
        self._directory = directory
        self._domain = domain
        self._host = host
        self._begun = time.monotonic()

    def failed(self, err: BaseException) -> None:
        """The run was ended by this."""
        self._record(getattr(err, "exit_code", 1))

    def done(self, exit_status: int, directory: Path | None, report: BackupReport | None) -> None:
        """The run did what it should; ``directory`` is its set, if one was chosen."""
        point, count = report.point if report is not None else None, 0
        if point is not None and directory is not None:
            try:
                count = len(SetDirectory.open(directory).load().points)
            except NbdbackupError as err:
                log.warning("the points of %s can't be counted: %s", directory, err)
        size = report.stored_bytes if report is not None else 0
        self._record(exit_status, succeeded=True, point=point, size=size, count=count)
        if directory is not None and self._directory is not None:
            record_sets(self._directory, self._domain, directory.parent)

    def _record(
        self,
        exit_status: int,
        *,
        succeeded: bool = False,
        point: RestorePoint | None = None,
        size: int = 0,
        count: int = 0,
    ) -> None:
        if self._directory is None:
            return

        facts = metrics.RunFacts(
            domain=self._domain,
            ended=self._host.now(),
            seconds=time.monotonic() - self._begun,
            exit_status=exit_status,
            succeeded=succeeded,
            point=point,
            stored_bytes=size,
            chain_points=count,
        )
        try:
            metrics.record(self._directory, facts)
        except NbdbackupError as err:
            log.warning("the metrics of this run are not written: %s", err)
