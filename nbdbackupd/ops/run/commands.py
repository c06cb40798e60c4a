"""The administrator's programs before and after a run."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nbdbackupd import proc
from nbdbackupd.errors import ProcessError

log = logging.getLogger(__name__)
POLL_SECONDS: Final = 0.05


def run_each(
    programs: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    *,
    timeout: float,
    cancelled: Callable[[], None] = lambda: None,
) -> None:
    """Run one after the other, each for at most ``timeout`` seconds; their output is not kept.

    ``environment`` is added to ours. Raises ProcessError at the first one that can't be started,
    fails or takes too long, and what ``cancelled`` raises; the program is ended then.
    """
    for argv in programs:
        log.info("running %s", proc.program(argv))
        deadline = time.monotonic() + timeout
        with proc.spawn(argv, env=environment, umask=proc.INHERITED) as child:
            while child.poll() is None:
                cancelled()
                if time.monotonic() > deadline:
                    raise ProcessError(f"{child.name} did not end within {timeout:g} s")
                time.sleep(POLL_SECONDS)
            child.wait(0)


def run_all(
    programs: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    *,
    timeout: float,
    waiting: Callable[[], None],
) -> tuple[str, ...]:
    """Run all, whatever becomes of those before; a line for each that failed.

    ``waiting`` is called again and again meanwhile.
    """
    problems = []
    for argv in programs:
        try:
            run_each([argv], environment, timeout=timeout, cancelled=waiting)
        except ProcessError as err:
            problems.append(f"program after the run: {err.message}")
    return tuple(problems)
