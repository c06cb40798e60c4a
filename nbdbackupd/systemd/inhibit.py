"""The host's shutdown waits a little for a run: a delay lock of systemd-logind.

logind waits at most ``InhibitDelayMaxSec=`` (logind.conf(5)), 5 seconds unless it is configured.
Then units are stopped: the run gets SIGTERM and ends in order, without a point. The package does
not raise that bound, since libvirtd holds such a lock, too, as long as a guest runs (9.0 and 11.3,
measured): each shutdown with guests would take so long.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nbdbackupd import proc
from nbdbackupd.errors import ProcessError

log = logging.getLogger(__name__)


@contextmanager
def shutdown_delayed(why: str) -> Iterator[None]:
    """Hold the lock while the block runs, as far as the host has a logind that gives it.

    The lock goes with ``systemd-inhibit``, and that one with ``cat``, which ends with us.
    """
    with ExitStack() as stack:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, writing)
        argv = ["systemd-inhibit", "--what=shutdown", "--mode=delay", "--who=nbdbackup"]
        try:
            stack.enter_context(proc.spawn([*argv, f"--why={why}", "--", "cat"], stdin=reading))
        except ProcessError as err:
            log.debug("the host's shutdown does not wait: %s", err)
        finally:
            os.close(reading)
        yield
