"""``python -m nbdbackupd.app.guard LINE SHARE``: the guard of a run; see source/guard.py.

The descriptors of its socket and of its share in a lock. Only ``source.guard`` starts this.
"""

import os
import signal
import socket
import sys
from typing import Final

from nbdbackupd.app.signals import ASKING

QUIET_SECONDS: Final = 1.0
"""A run that ends soon does not share the processor with imports that nobody needs."""


def main() -> int:
    """Stand guard; returns 0."""
    for signum in (*ASKING, signal.SIGPIPE, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # whatever directory the run was started in, it may be unmounted
    os.chdir("/")
    os.environ.setdefault("LIBVIRT_DEBUG", "error")
    with socket.socket(fileno=int(sys.argv[1])) as line:
        line.setblocking(True)
        _stand(line, int(sys.argv[2]))
    return 0


def _stand(line: socket.socket, share: int) -> None:
    import select

    waiting = select.poll()
    waiting.register(line, select.POLLRDHUP)
    waiting.poll(QUIET_SECONDS * 1000)
    # now, since an upgrade may replace these files while the run works
    from nbdbackupd import log
    from nbdbackupd.source import guard, guarding

    log.to_journal(sys.stderr)
    guarding.stand(guard.Post(line, share))


if __name__ == "__main__":
    sys.exit(main())
