"""Driving ``nbdbackupctl`` as other programs do: a process from the checkout."""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lib import ready

ROOT = ready.ROOT
PYTHON = ready.PYTHON
SECONDS = 110.0
are_programs = False
"""Whether even what runs to its end in a plain environment is started as a program of its own."""
WARNING = re.compile(r"^warning\b", re.MULTILINE)
WITH_STATE = (
    "backup",
    "boot",
    "checkpoints",
    "merge",
    "prune",
    "remove",
    "restore",
    "verify",
)
WITH_SCRATCH = ("backup", "boot", "export")
PROGRAMS = ("map", "mount", "unmap", "unmount")
"""Verbs that are always programs of their own: what they start goes on after them."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.stdout)


class Ctl:
    """``nbdbackupctl`` with a connection and directories of its own.

    Everything that it writes beside sets lies below ``directory``: runtime, scratch, state.
    """

    def __init__(
        self, uri: str, directory: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.uri = uri
        self.runtime = directory / "run"
        self.scratch = directory / "scratch"
        self.state = directory / "state"
        self.environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "NBDBACKUP_STATE_DIR": os.fspath(self.state),
            **(environment or {}),
        }

    def argv(self, verb: str, *arguments: str | os.PathLike[str]) -> list[str]:
        """The whole command line."""
        head = [
            PYTHON,
            "-m",
            "nbdbackupd",
            "-c",
            self.uri,
            "--runtime-dir",
            os.fspath(self.runtime),
        ]
        extra = []
        if verb in WITH_SCRATCH and "--scratch-dir" not in arguments:
            extra += ["--scratch-dir", os.fspath(self.scratch)]
        if verb in WITH_STATE and "--checkpoint-dir" not in arguments:
            extra += ["--checkpoint-dir", os.fspath(self.state)]
        if verb in ("backup", "export") and "--scratch-reserve" not in arguments:
            extra += ["--scratch-reserve", "16M"]
        return [*head, verb, *(os.fspath(each) for each in arguments), *extra]

    def __call__(
        self, verb: str, *arguments: str | os.PathLike[str], code: int | None = 0
    ) -> Result:
        """Run to the end; ``code`` is the expected exit code, None takes any.

        Raises AssertionError with both outputs if it is another one.
        """
        argv = self.argv(verb, *arguments)
        if self._is_forked(argv, verb):
            result = Result(*ready.ready().run(argv[2:], self.environment, SECONDS))
        else:
            done = subprocess.run(
                argv, cwd=ROOT, env=self.environment, text=True,
                stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False,
            )  # fmt: skip
            result = Result(done.returncode, done.stdout, done.stderr)
        assert code is None or result.code == code, (
            f"{verb} {arguments}: exit code {result.code}, expected {code}\n"
            f"{result.stdout}\n{result.stderr}"
        )
        assert "Traceback" not in result.stderr, result.stderr
        # W-1: of every command that any test runs
        assert result.code or not WARNING.search(result.stdout + result.stderr), (
            f"{verb} {arguments}: a warning with exit code 0\n{result.stdout}\n{result.stderr}"
        )
        return result

    def _is_forked(self, argv: list[str], verb: str) -> bool:
        is_plain = self.environment.keys() <= ready.VARIABLES and argv[:2] == [PYTHON, "-m"]
        return is_plain and verb not in PROGRAMS and not are_programs

    @contextmanager
    def start(
        self, verb: str, *arguments: str | os.PathLike[str]
    ) -> Iterator[subprocess.Popen[str]]:
        """Run in the background; killed at the end of the block if it still runs."""
        with subprocess.Popen(
            self.argv(verb, *arguments), cwd=ROOT, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def backup(self, domain: str, into: Path, *options: str, code: int | None = 0) -> Any:
        """Back up and return the JSON report."""
        return self("backup", domain, "-o", into, "--json", *options, code=code).json

    def points(self, source: Path) -> list[dict[str, Any]]:
        """The points of a set, oldest first."""
        points: list[dict[str, Any]] = self("list", source, "--json").json["points"]
        return points

    def restore(
        self, source: Path, into: Path, *options: str, code: int | None = 0
    ) -> dict[str, Path]:
        """Restore and return the images by disk."""
        report = self("restore", source, "-o", into, "--json", *options, code=code).json
        return {disk["target"]: Path(disk["path"]) for disk in report["disks"]}
