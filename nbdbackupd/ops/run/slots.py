"""How many runs there are at a time on this host: each holds one of a few numbered locks."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import durable, rundir
from nbdbackupd.errors import BusyError

POLL_SECONDS: Final = 0.2


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
            time.sleep(min(POLL_SECONDS, left))
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
