"""Time programs and say what the numbers mean."""

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.command import LabError
from tests.lab.virsh import TOP

TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a program; ``peak_bytes`` is its largest resident size.

    ``cpu_seconds``: user and system time of the program and of its children that it waited for;
    ``server_cpu_seconds``: that of the guest's QEMU meanwhile.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float
    server_cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Series:
    """Runs of the same thing."""

    samples: Sequence[Sample]

    @property
    def seconds(self) -> float:
        """Return the median duration."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def peak_bytes(self) -> int:
        """Return the largest peak of all runs."""
        return max(sample.peak_bytes for sample in self.samples)

    @property
    def cpu_seconds(self) -> float:
        """Return the median of the processor time."""
        return statistics.median(sample.cpu_seconds for sample in self.samples)

    @property
    def server_cpu_seconds(self) -> float:
        """Return the median of QEMU's processor time."""
        return statistics.median(sample.server_cpu_seconds for sample in self.samples)

    def __str__(self) -> str:
        low, high = (pick(sample.seconds for sample in self.samples) for pick in (min, max))
        server = f" + QEMU {self.server_cpu_seconds:.2f} s" if self.server_cpu_seconds else ""
        wall = f"{self.seconds:7.2f} s  ({low:.2f} - {high:.2f})"
        return f"{wall}  cpu {self.cpu_seconds:5.2f} s{server}"


def timed(
    argv: Sequence[str | Path],
    environment: dict[str, str] | None = None,
    statuses: Sequence[int] = (0,),
) -> Sample:
    """Run a program to its end and measure it; raises ``LabError`` for other exit statuses."""
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(
            [os.fspath(word) for word in argv],
            cwd=TOP,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
        alarm = threading.Timer(TIMEOUT_SECONDS, process.kill)
        alarm.start()
        try:
            # wait4 and not wait(): it also says how much memory it took
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            alarm.cancel()
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in statuses:
            output.seek(0)
            said = output.read().decode("utf-8", "replace")[-4000:]
            raise LabError(f"{list(argv)}: exit status {process.returncode}: {said}")
    return Sample(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def processor_seconds(pid: int) -> float:
    """Return the processor time that a running process has taken so far, all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def verdict(value: float, goal: float) -> str:
    """Return whether a value that should be small is small enough."""
    return f"goal {goal:.3g}: {'met' if value <= goal else 'MISSED'}"


def print_ratio(what: str, ours: Series, other: Series, goal: float | None) -> None:
    """Print how long we took in relation to another."""
    ratio = ours.seconds / other.seconds
    judged = f"  ({verdict(ratio, goal)})" if goal is not None else ""
    print(f"    {what:<24}{ratio:6.2f}{judged}", flush=True)


def print_cpu(series: Series, goal: float) -> None:
    """Print whether the processor time of a program is short enough."""
    print(f"    {'processor seconds':<24}{verdict(series.cpu_seconds, goal)}", flush=True)


def print_series(who: str, series: Series) -> None:
    """Print the figures of one program."""
    print(f"    {who:<16}{series}  peak {series.peak_bytes / 2**20:.0f} MiB", flush=True)
