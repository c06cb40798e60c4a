"""Namespaces that hosts stand in: nothing of them is seen outside, nothing of them is left.

One process keeps three namespaces.  In the mount namespace lie the hosts' overlays; /run and
/tmp are empty ones of its own, because systemd-nspawn leaves things there when it is killed.  In
the network namespace is the bridge between hosts; all their processes are in the process
namespace.  The process reads a pipe that we hold open: when we are gone, by
whatever end, it ends, and the kernel ends and removes everything else, first the processes.
"""

import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab.command import DEFAULT_TIMEOUT_SECONDS, LabError, run
from tests.lab.daemon import propagation

START_TIMEOUT_SECONDS = 20.0
END_TIMEOUT_SECONDS = 60.0  # on a busy disk, unmounting takes its time
BRIDGE = "br0"
READY = b"ready\n"
OUTSIDE = "/run/outside"
SETUP = f"""
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/netns /run/hosts {OUTSIDE}
mount --rbind / {OUTSIDE}
mount -t tmpfs -o mode=1777 tmpfs /tmp
ip link set lo up
ip link add {BRIDGE} type bridge
ip link set {BRIDGE} up
echo ready
exec cat >/dev/null
"""


class Ground:
    """The namespaces while they exist; use it in a ``with`` statement."""

    def __init__(self) -> None:
        """Make the namespaces; needs root.  Raises ``LabError``."""
        namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "--propagation", propagation(), "sh", "-c", SETUP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for us, not for the hosts
        )
        try:
            self._wait_ready()
            self.pid = children(self._process.pid)[0]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def launcher(self) -> list[str]:
        """Return the words before a command that run it in all of the namespaces."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--"]

    def run(self, *words: str | Path, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> str:
        """Run a command in the namespaces and return its output; raises ``LabError``."""
        return run([*self.launcher, *words], timeout_seconds=timeout_seconds)

    def outside(self, path: Path) -> Path:
        """Return the path by which a file of this machine is found in the mount namespace."""
        return Path(f"{OUTSIDE}{path.absolute()}")

    def close(self) -> None:
        """End every process within and the namespaces; safe to call twice."""
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        if process.stdout is not None:
            process.stdout.close()
        try:
            process.wait(END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(END_TIMEOUT_SECONDS)

    def _wait_ready(self) -> None:
        out = self._process.stdout
        assert out is not None
        said = b""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not said.endswith(READY):
            left = max(0.0, deadline - time.monotonic())
            more = os.read(out.fileno(), 4096) if select.select([out], [], [], left)[0] else b""
            if not more:
                raise LabError(f"no namespaces for hosts: {said.decode('utf-8', 'replace')}")
            said += more


def children(pid: int) -> list[int]:
    """Return the pids of a process's children; empty when it is gone."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in words]
