"""What both stories of scripts/demo are told with: steps, commands as typed, comparisons."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.lab.command import LabError
from tests.lab.compare import first_difference
from tests.lab.disks import MIB

TOP = Path(__file__).resolve().parent.parent
DISKS = ("vda", "vdb")
DISK_SIZE = 256 * MIB
STEP_TIMEOUT_SECONDS = 100
BOLD, GREEN, RED, PLAIN = (
    ("\033[1m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "", "", "")
)


class DemoError(Exception):
    """The product did not do what it promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The true content of every disk at a moment, taken without the product."""

    what: str
    images: dict[str, Path]


class Show:
    """How a story is shown; long words are shown as the variables that stand for them."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.step_number = 0
        self.references: list[Reference] = []

    def compare(self, reference: Reference, name: str, restored: Path) -> None:
        """Compare one disk; raises ``DemoError`` at the first different byte."""
        offset = first_difference(reference.images[name], restored)
        if offset is not None:
            raise DemoError(f"{reference.what}: {name} differs at byte {offset}")
        self.note(f"{GREEN}identical{PLAIN}: {name} at {reference.what}, all {DISK_SIZE} bytes")

    def run_command(
        self,
        program: Sequence[str],
        words: Sequence[str | Path],
        *,
        expect: int = 0,
        show: bool = False,
        typed: str = "",
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command; raises ``DemoError`` on another exit status.

        Shown as ``typed`` and the words, without its output.
        """
        if show:
            self.say(f"$ {typed or program[0]} {self.as_typed(words)}")
        started = time.monotonic()
        done = subprocess.run(
            [*program, *words],
            cwd=TOP,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_SECONDS,
            # an embedded driver logs like a daemon, to stderr
            env={**os.environ, "LIBVIRT_DEBUG": "error"},
            check=False,
        )
        if done.returncode != expect:
            raise DemoError(
                f"{typed or program[0]} {' '.join(map(str, words))}: exit status "
                f"{done.returncode}: {done.stdout}{done.stderr}"
            )
        if show:
            self.note(f"took {time.monotonic() - started:.1f} s")
        return done

    def show_output(self, done: subprocess.CompletedProcess[str]) -> None:
        """Print what a command has said."""
        for line in (done.stdout or done.stderr).splitlines():
            print(f"     {line}")

    def as_typed(self, words: Sequence[str | Path]) -> str:
        """Return a command's words with the long ones replaced by their variables."""
        line = " ".join(os.fspath(word) for word in words)
        for name, value in self.variables.items():
            line = line.replace(value, f'"${name}"')
        return line.replace(" --json", "")

    def step(self, title: str) -> None:
        """Begin a chapter."""
        self.step_number += 1
        print(f"\n{BOLD}{self.step_number}. {title}{PLAIN}")

    def say(self, text: str) -> None:
        """Print something that a user would type."""
        print(f"   {BOLD}{text}{PLAIN}", flush=True)

    def note(self, text: str) -> None:
        """Print what happened."""
        print(f"   - {text}", flush=True)


def parse(done: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON document that a command has printed."""
    return json.loads(done.stdout)


def tell(story: str, body: Callable[[], None]) -> int:
    """Run a story and say how it ended; returns 0 if every byte was right."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _interrupted)
    started = time.monotonic()
    print(story)
    try:
        body()
    except (DemoError, LabError, subprocess.TimeoutExpired) as err:
        print(f"\n{RED}FAILED{PLAIN}: {err}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    print(f"\n{GREEN}All restored disks are identical{PLAIN} ({seconds:.0f} s).")
    return 0


def _interrupted(number: int, _frame: FrameType | None) -> None:
    """Leave by an exception, so that everything is torn down."""
    raise SystemExit(128 + number)
