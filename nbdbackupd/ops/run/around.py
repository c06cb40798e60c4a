"""What stands around a run: its turn on this host, a shutdown that waits, programs."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import durable, proc, rundir
from nbdbackupd.errors import BusyError, ProcessError

log = logging.getLogger(__name__)
LOOK_SECONDS: Final = 0.2
POLL_SECONDS: Final = 0.05


@contextmanager
def shutdown_delayed(why: str) -> Iterator[None]:
    """Hold a delay lock of logind while the block runs, as far as the host has one that gives it.

    logind waits at most ``InhibitDelayMaxSec=`` (logind.conf(5)), 5 seconds unless it is
    configured. Then units are stopped: the run gets SIGTERM and ends in order, without a point.
    The package does not raise that bound, since libvirtd holds such a lock, too, as long as a
    guest runs (9.0 and 11.3, measured): each shutdown with guests would take so long.
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


@contextmanager
def slot(
    runtime_dir: Path,
    count: int,
    *,
    owner: str,
    wait_seconds: float,
    cancelled: Callable[[], None],
) -> Iterator[int]:
    """Hold one of the slots 1 to ``count``; its number.

    The kernel frees the slot of a run that dies. ``owner`` is what others are told, "backup of
    vm1". Who waits longest is not always the next. Raises BusyError that names the holders when
    ``wait_seconds`` have passed, what ``cancelled`` raises, RepositoryError if the runtime
    directory can't be written.
    """
    with durable.translate_os_errors("create", runtime_dir / rundir.SLOTS):
        directory = rundir.make(runtime_dir, rundir.SLOTS)
    deadline = time.monotonic() + wait_seconds
    with ExitStack() as stack:
        while (number := _try(directory, count, owner, stack)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BusyError(_busy(directory, count, wait_seconds))
            cancelled()
            time.sleep(min(LOOK_SECONDS, left))
        yield number


def _try(directory: Path, count: int, owner: str, stack: ExitStack) -> int | None:
    for number in range(1, count + 1):
        lock = durable.Lock(directory / str(number), owner=owner)
        try:
            with durable.translate_os_errors("lock", lock.path):
                stack.enter_context(lock)
        except BusyError:
            continue
        return number
    return None


def _busy(directory: Path, count: int, wait_seconds: float) -> str:
    holders = [durable.holder(directory / str(number)) for number in range(1, count + 1)]
    waited = f" after {wait_seconds:g} s" if wait_seconds > 0 else ""
    return (
        f"at most {count} run{'s' * (count != 1)} at a time (limits.concurrent_runs), and "
        f"no place is free{waited}: {', '.join(holders)}; try later"
    )


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
