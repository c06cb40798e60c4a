"""What a guard does when its run has ended: see source/guard.py.

It works through the same list again and again until nothing of it is left: thaw a guest that the
run has frozen, end the run's job, remove its scratch files, see the server close the connections.
A libvirtd that is away is waited for, and so is a monitor that is in use.

Two guards, or a guard and the next run's sweep, never do this at one time (``turn``). What belongs
to another run is not touched: a job is told by its scratch files, a held guest by its marker.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import events, rundir
from nbdbackupd import log as runlog
from nbdbackupd.errors import DomainNotFoundError, ElsewhereError
from nbdbackupd.source import quiesce, running, ssh, standalone
from nbdbackupd.source.guard import BEGUN, DISCARD_SECONDS, THAW, Charge, Post, turn
from nbdbackupd.source.qemu_guest import QemuGuest
from nbdbackupd.source.silence import Silence
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import Connection, open_connection
from nbdbackupd.virt.domain import Domain

LOG = logging.getLogger(__name__)
PAUSE_SECONDS: Final = 0.2
LONGEST_PAUSE_SECONDS: Final = 15.0
BEGINNING_SECONDS: Final = 40.0
"""libvirt begins a job to the end though its client has died, and waits 30 s for its own locks."""

JOB_SECONDS: Final = 600.0
"""How long a libvirt is waited for that is away, if no connection is held; the next run sweeps."""

THAW_SECONDS: Final = 2 * 3600.0
"""How long an agent is asked to thaw that does not answer."""

THAW_PAUSE_SECONDS: Final = 1.0
LONGEST_THAW_PAUSE_SECONDS: Final = 60.0
"""An agent that answers with an error does so again; one that says nothing may freeze any time."""

ANSWER_SECONDS: Final = 5


class Watch:
    """The work on one charge; ``post`` holds what the run has said."""

    def __init__(self, post: Post, charge: Charge) -> None:
        self._post = post
        self.charge = charge
        self._begun = time.monotonic()
        self._is_job_gone = False
        self._is_thawed = False
        self._refusals = 0
        self._pause = PAUSE_SECONDS
        self._problem = ""

    def finish(self) -> None:
        """Work until nothing is left to do, or nothing more can be done."""
        with self._discarding():
            self._finish()

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        """Keep reading what QEMU sends, which may be what libvirt waits for."""
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                self._post.kept.discard(DISCARD_SECONDS)

        thread = threading.Thread(target=read, name="discard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _finish(self) -> None:
        self._begun = time.monotonic()
        while True:
            # first, also for others who want to end the job
            is_settled = self._post.settle()
            is_done = self._try(is_settled=is_settled) if self.charge.is_reachable else True
            # what leads to another host ends with its ssh, and the job does not
            if not self.charge.host and self._post.kept.has_ended():
                self._is_job_gone = True
            is_done = is_done or (self._is_job_gone and self._is_thawed)
            is_closed = self._post.kept.wait_closed()
            if is_done and is_closed:
                return
            if is_closed and self._is_late():
                LOG.error(
                    "domain %s: given up, see what is left with 'nbdbackupctl abort %s'",
                    self.charge.domain,
                    self.charge.domain,
                )
                return
            self._wait()

    def thaw(self) -> bool:
        """Thaw while the run lives, which has not seen its freeze answered; whether it is done."""
        try:
            if self.charge.monitor:
                return self._thaw(QemuGuest.charged(self.charge))
            with self._domain() as domain:
                return self._thaw(domain)
        except Exception as err:  # noqa: BLE001 - as below
            self._tell(str(err))
        return False

    def _try(self, *, is_settled: bool) -> bool:
        """One attempt at all that is left at libvirt; whether it is done.

        The job is not ended before its connections are settled.
        """
        try:
            if self.charge.monitor:
                with turn(Path(self.charge.runtime_dir)):
                    guest = QemuGuest.charged(self.charge)
                    self._is_thawed = self._is_thawed or self._thaw(guest)
                    if is_settled and not self._is_job_gone:
                        self._is_job_gone = standalone.clear_dead(self.charge)
                return self._is_thawed and self._is_job_gone
            with self._domain() as domain, turn(Path(self.charge.runtime_dir)):
                # first: a guest that is frozen hangs, and this is quick
                self._is_thawed = self._is_thawed or self._thaw(domain)
                if is_settled and not self._is_job_gone:
                    self._is_job_gone = self._end_job(domain)
        except DomainNotFoundError:
            # a transient guest that has ended: there is nobody to be thawed
            quiesce.forget(running.marker(Path(self.charge.runtime_dir)), self.charge.run_id)
            return True
        except Exception as err:  # noqa: BLE001 - the end of a guard may be that of the guest
            self._tell(str(err))
            return False
        return self._is_thawed and self._is_job_gone

    def _tell(self, problem: str) -> None:
        """Log what keeps us from being done, once."""
        if problem != self._problem:
            LOG.info("domain %s: the guard of its run waits: %s", self.charge.domain, problem)
        self._problem = problem

    @contextmanager
    def _domain(self) -> Iterator[Domain]:
        charge = self.charge
        with self._connection() as connection:
            if connection.where.id != charge.host:
                raise ElsewhereError(f"{charge.uri} leads to another host than before")
            yield Domain.find(connection, charge.uuid)

    def _connection(self) -> AbstractContextManager[Connection]:
        charge = self.charge
        user, password = charge.user, charge.password
        if not charge.host:
            return open_connection(charge.uri, user=user, password=password)
        directory = Path(charge.ssh_dir)
        return ssh.connected(charge.uri, directory, charge.ssh_config, user=user, password=password)

    def _thaw(self, domain: Domain | QemuGuest) -> bool:
        marker = running.marker(Path(self.charge.runtime_dir))
        found = quiesce.settle(domain, marker, self.charge.run_id, seconds=ANSWER_SECONDS)
        self._refusals = self._refusals + 1 if found.is_answered else 0
        if found.problem:
            self._tell(found.problem)
        return not found.problem

    @property
    def thaw_pause(self) -> float:
        """Seconds until the agent is asked again: longer each time that it has refused."""
        times = 1 << min(max(self._refusals - 1, 0), 16)
        return min(THAW_PAUSE_SECONDS * times, LONGEST_THAW_PAUSE_SECONDS)

    def _end_job(self, domain: Domain) -> bool:
        """End the run's job; False if it may yet begin."""
        job = jobs.active_job(domain)
        backup = job.backup if job is not None else None
        own = set(self.charge.scratch)
        where = domain.connection.where
        if job is not None and backup is not None and own & set(backup.scratch.values()):
            where.cut(Path(self.charge.runtime_dir) / rundir.NBD_SOCKET)
            jobs.abort(domain)
            events.emit(LOG, events.DEAD_RUN_SWEPT, reason=job)
        elif BEGUN not in self._post.words and time.monotonic() - self._begun <= BEGINNING_SECONDS:
            return False
        for file in own:
            with contextlib.suppress(OSError):
                where.remove(Path(file))
        where.leave(Path(self.charge.runtime_dir) / rundir.NBD_SOCKET)
        return True

    def _is_late(self) -> bool:
        limit = THAW_SECONDS if self._is_job_gone else JOB_SECONDS
        return time.monotonic() - self._begun > limit

    def _wait(self) -> None:
        """Wait a while; the server's end of its connections cuts it short."""
        if self._is_job_gone and not self._is_thawed:
            time.sleep(self.thaw_pause)
        elif self.charge.host:
            # a login each time, and no connection whose end could be seen
            time.sleep(self._pause)
        elif self._post.kept.wait_closed(self._pause):
            time.sleep(PAUSE_SECONDS)
        self._pause = min(self._pause * 2, LONGEST_PAUSE_SECONDS)


def stand(post: Post) -> None:
    """Watch until the run's end, then do what it has left."""
    standing: _Standing | None = None

    def idle() -> float | None:
        nonlocal standing
        if standing is None and post.charge is not None:
            standing = _Standing(post, post.charge)
        return -1 if standing is None else standing.look()

    post.read(idle)
    if post.charge is not None:
        with runlog.context(
            DOMAIN=post.charge.domain, UUID=post.charge.uuid, RUN=post.charge.run_id
        ):
            Watch(post, post.charge).finish()


class _Standing:
    """What is done while the run lives."""

    def __init__(self, post: Post, charge: Charge) -> None:
        self._post = post
        self._watch = Watch(post, charge)
        self._silence = Silence(charge)
        self._is_thawed = False
        self._thaw_at = 0.0

    def look(self) -> float | None:
        """Do what is due; returns in how many seconds the next is. None: the run is over."""
        charge = self._watch.charge
        with runlog.context(DOMAIN=charge.domain, UUID=charge.uuid, RUN=charge.run_id):
            if self._silence.is_over(self._post.heard):
                return None
            pause = self._silence.pause
            if THAW not in self._post.words or self._is_thawed:
                return pause
            if time.monotonic() >= self._thaw_at:
                self._is_thawed = self._watch.thaw()
                self._thaw_at = time.monotonic() + self._watch.thaw_pause
            return min(pause, max(0.0, self._thaw_at - time.monotonic()))
