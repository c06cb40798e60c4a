"""What a guard does about a run that has not ended, but does not move.

A run says twice a second that it lives. Two things keep one from that:

* It is stopped (SIGSTOP, a terminal's Ctrl-Z) or hangs as a whole. Answers of QEMU's NBD server may
  wait for it then. QEMU serves its guest all the same, until it has to drain its disks: to pause
  the guest, to power it off, for a snapshot. Then it hangs, and the guest with it, as long as the
  run does (measured with QEMU 7.2: ``virsh suspend`` without end, ``virsh destroy`` kills QEMU
  after 11 s). Nor does anybody look at the scratch space, of which the guest sees the end.
* It was killed, but a thread of it waits in the kernel for a target that is gone, and can't die
  before. Neither does it let go of its end of the guard's socket.

A run that is slow, or waits for its target in a thread of its own, is none of these: it reads its
answers, and says that it lives. A stopped one is left alone, too, as long as QEMU answers, scratch
space is left and it does not hold its guest: somebody may have stopped it on purpose. Of a guest
on another host nothing of that can be seen from here: its run is killed after ten seconds.
"""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdbackupd import events
from nbdbackupd.errors import NbdbackupError
from nbdbackupd.source import quiesce
from nbdbackupd.source.guard import Charge
from nbdbackupd.source.running import marker
from nbdbackupd.source.scratch import Space
from nbdbackupd.virt.connection import open_connection
from nbdbackupd.virt.domain import Domain
from nbdbackupd.where import HERE

LOG = logging.getLogger(__name__)
LOOK_SECONDS: Final = 1.0
SHORT_SECONDS: Final = 2.0
"""Nobody looks at the scratch space; the run does ten times a second."""

LONG_SECONDS: Final = 10.0
"""No machine is so busy that a thread does not come to its turn."""

ANSWER_SECONDS: Final = 5.0
PROBE_PAUSE_SECONDS: Final = 2.0
"""With that and a drain, less than libvirt lets QEMU have to end by itself."""

DYING_SECONDS: Final = 3.0
KILLED: Final = 1 << (signal.SIGKILL - 1)


class Silence:
    """Looks at the run of a charge, while its end of the line is open."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._dying_since: float | None = None
        self._space: Space | None = None
        self._probe: _Probe | None = None
        self._is_killed = False

    def is_over(self, heard: float) -> bool:
        """Look; True if the run is dead, but for what the kernel still does for it.

        ``heard`` is when it has last said anything. Kills it if its guest has to wait for it.
        """
        # our parent, or a process that is another one by now
        if os.getppid() != self._charge.pid:
            return False
        if not is_dying(self._charge.pid):
            self._dying_since = None
            self._listen(time.monotonic() - heard)
            return False
        self._dying_since = self._dying_since or time.monotonic()
        return time.monotonic() - self._dying_since > DYING_SECONDS

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return LOOK_SECONDS if self._space is None else self._space.pause()

    def _listen(self, seconds: float) -> None:
        """Judge a run that has been silent for so long."""
        if seconds < SHORT_SECONDS:
            self._space = self._probe = None
            return
        charge = self._charge
        if charge.host:
            if seconds > LONG_SECONDS:
                self._kill(seconds, f"nobody sees what its guest on {charge.uri} needs")
            return
        self._space = self._space or _space(charge)
        if self._space.is_low():
            self._kill(seconds, f"{self._space.free} bytes of scratch space are left")
        elif charge.monitor:
            # of its own it holds a guest for milliseconds
            if seconds > LONG_SECONDS and quiesce.is_held(marker(Path(charge.runtime_dir))):
                self._kill(seconds, "its guest is held")
        elif seconds > LONG_SECONDS and charge.is_reachable:
            if self._probe is None or self._probe.is_old():
                self._probe = _Probe(charge)
            elif self._probe.is_unanswered():
                self._kill(seconds, "QEMU waits for it")

    def _kill(self, seconds: float, why: str) -> None:
        if self._is_killed:
            return
        self._is_killed = True
        # first: its guest waits
        os.kill(self._charge.pid, signal.SIGKILL)
        what = f"process {self._charge.pid} has not moved for {seconds:.0f} s, and {why}"
        events.emit(LOG, events.HUNG_RUN_KILLED, reason=what)


def _space(charge: Charge) -> Space:
    directory = Path(charge.scratch_dir)
    return Space(directory, charge.scratch_reserve, lambda: HERE.free_bytes(directory))


class _Probe:
    """A question to QEMU, in a thread of its own, since it may get no answer."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._asked = 0.0
        self._over = 0.0
        threading.Thread(target=self._ask, name="probe", daemon=True).start()

    def is_unanswered(self) -> bool:
        """Whether libvirt has answered in time, but QEMU has not."""
        return bool(
            self._asked and not self._over and time.monotonic() - self._asked > ANSWER_SECONDS
        )

    def is_old(self) -> bool:
        """Whether it was answered, or failed, so long ago that another one is due."""
        return bool(self._over and time.monotonic() - self._over > PROBE_PAUSE_SECONDS)

    def _ask(self) -> None:
        charge = self._charge
        try:
            with open_connection(
                charge.uri, user=charge.user, password=charge.password
            ) as connection:
                domain = Domain.find(connection, charge.uuid)
                if domain.is_active():
                    self._asked = time.monotonic()
                    domain.disk_errors()
        except NbdbackupError as err:
            LOG.debug("domain %s: %s", charge.domain, err)
        finally:
            self._over = time.monotonic()


def is_dying(pid: int) -> bool:
    """Tell whether a process was killed, also if a thread of it can't die yet."""
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError, ValueError):
            for line in status.read_text("utf-8", "replace").splitlines():
                name, _, value = line.partition(":")
                if name in {"SigPnd", "ShdPnd"} and int(value, 16) & KILLED:
                    return True
    return False
