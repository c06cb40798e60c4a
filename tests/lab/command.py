"""Run a program with a deadline and keep what it said."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

DEFAULT_TIMEOUT_SECONDS = 60.0


class LabError(Exception):
    """Something in the lab failed: a program, the guest's monitor, a deadline."""


def run(
    argv: Sequence[str | Path],
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run ``argv`` and return its standard output.

    ``env`` is added to the caller's environment; messages are always in English, since some
    are read.  Raises ``LabError`` with both outputs when it fails or takes too long.
    """
    words = [os.fspath(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout_seconds,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise LabError(f"{words}: still running after {timeout_seconds} s") from err
    except OSError as err:
        raise LabError(f"{words}: {err}") from err
    if done.returncode != 0:
        said = f"{done.stdout}{done.stderr}".strip()
        raise LabError(f"{words}: exit status {done.returncode}: {said}")
    return done.stdout
