"""Short libvirt calls by ``virsh``, so that no connection outlives a call.

With the embedded driver only one process at a time can hold a root; a second one is refused
with "Failed to acquire pid file".  The lab therefore waits its turn, up to a deadline.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab.command import DEFAULT_TIMEOUT_SECONDS, LabError, run
from tests.lab.process import POLL_SECONDS

ROOT_IS_HELD = "Failed to acquire pid file"
CRASHED = "exit status -11"
TIMES_ASKED = 5
QUESTIONS = frozenset({"checkpoint-list", "domjobinfo", "domstate", "dumpxml", "list"})
DONE = {"define": "already exists with uuid", "undefine": "failed to get domain"}
"""What is said of these, asked again, if the first time was enough."""

TOP = Path(__file__).resolve().parents[2]


class Virsh:
    """``virsh`` bound to one connection URI."""

    def __init__(self, uri: str) -> None:
        """Bind to ``uri``; nothing is opened yet."""
        self.uri = uri

    def __call__(self, *words: str | Path, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> str:
        """Run one virsh command and return its output; raises ``LabError``."""
        argv = ["virsh", "--quiet", "--connect", self.uri, *words]
        left = TIMES_ASKED
        while True:
            try:
                return run_libvirt_client(argv, timeout_seconds)
            except LabError as err:
                if left < TIMES_ASKED and words[0] in DONE and DONE[words[0]] in str(err):
                    return ""
                left -= 1
                # the embedded driver was seen to crash at its end, with all work done, while
                # it was still attaching to a guest: on a fast machine twice in a row
                can_ask = words[0] in QUESTIONS or words[0] in DONE
                if CRASHED not in str(err) or not can_ask or not left:
                    raise
            time.sleep(POLL_SECONDS)

    def client(self, domain: str, seconds: float, verb: str, *words: str) -> str:
        """Run a verb of ``tests.lab.client`` and return its output; raises ``LabError``."""
        program = ["/usr/bin/python3", "-m", "tests.lab.client"]
        argv = [*program, self.uri, domain, str(seconds), verb, *words]
        return run_libvirt_client(argv, seconds + DEFAULT_TIMEOUT_SECONDS)


def run_libvirt_client(argv: Sequence[str | Path], timeout_seconds: float) -> str:
    """Run a libvirt client, again while another process holds the embedded driver's root."""
    deadline = time.monotonic() + timeout_seconds
    # libvirt logs its version and every warning to stderr unless told otherwise
    quiet = {"LIBVIRT_DEBUG": "error"}
    while True:
        try:
            return run(argv, timeout_seconds=timeout_seconds, env=quiet, cwd=TOP)
        except LabError as err:
            if ROOT_IS_HELD not in str(err) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)
