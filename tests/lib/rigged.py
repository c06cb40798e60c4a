"""``nbdbackupctl`` with a fault at a chosen step: ``python -m tests.lib.rigged FAULT... -- ARGS``.

A fault is ``WHAT@STEP#NUMBER`` and happens the so manieth time that the step (``tests.lib.steps``)
is called: a signal's name, such as ``KILL``, sends it to ourselves before the call; with a ``+``
(``KILL+``) after it; ``SLAY`` kills our guard and then ourselves; ``UNGUARD`` kills the guard
alone; ``CALMSTOP`` is ``STOP`` as soon as no connection is in its handshake; ``SLOW0.1`` makes each
call from that one on take so much longer; ``LATER40`` has a clock return a time so many days later;
``NOSPACE`` and ``EIO`` raise that OSError instead of calling. ``DEFAULT2@FIELD#1`` gives the field
of a dataclass (by keyword only) another default.
"""

import errno
import functools
import gc
import importlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from nbdbackupd.source.guard import Guard
from nbdbackupd.source.kept_connections import Stage
from tests.lab.process import wait_until
from tests.lib.ctl import Ctl
from tests.lib.steps import FIELDS, GUARD, STEPS

FORM = re.compile(r"([A-Z]+)([\d.]*)(\+?)@([a-z-]+)#(\d+)")
SIGNALS = {"SLAY": "KILL", "CALMSTOP": "STOP"}
ERRORS = {"NOSPACE": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}


class RiggedCtl(Ctl):
    """``Ctl`` whose commands run into ``faults`` while these are set."""

    faults: tuple[str, ...] = ()
    always: tuple[str, ...] = ()

    def argv(self, verb: str, *arguments: str | os.PathLike[str]) -> list[str]:
        """The whole command line."""
        words = super().argv(verb, *arguments)
        faults = (*self.always, *self.faults)
        if not faults:
            return words
        place = words.index("nbdbackupd")
        return [*words[:place], "tests.lib.rigged", *faults, "--", *words[place + 1 :]]

    @contextmanager
    def rigged(self, *faults: str) -> Iterator[None]:
        """Let the commands of the body run into these faults."""
        self.faults = faults
        try:
            yield
        finally:
            self.faults = ()


def rig(fault: str) -> None:
    """Replace the function that ``fault`` names."""
    found = FORM.fullmatch(fault)
    if found is None:
        raise ValueError(f"no fault: {fault}")
    what, amount, after, step, number = found.groups()
    if what == "DEFAULT":
        owner, name = owner_of(FIELDS[step])
        owner.__init__.__kwdefaults__[name] = float(amount)
        return
    owner, name = owner_of(STEPS[step])
    before: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)

    @functools.wraps(before)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if what == "SLOW":
            time.sleep(float(amount) if call >= int(number) else 0)
            return before(*args, **kwargs)
        if what == "LATER":
            return before(*args, **kwargs) + timedelta(days=float(amount))
        if call != int(number):
            return before(*args, **kwargs)
        if what in ERRORS:
            raise OSError(ERRORS[what], os.strerror(ERRORS[what]))
        result = before(*args, **kwargs) if after else None
        if what in {"SLAY", "UNGUARD"}:
            for guard in guards_of(os.getpid()):
                os.kill(guard, signal.SIGKILL)
        if what == "CALMSTOP":
            wait_until(is_connected, "the end of each handshake", 20)
        if what != "UNGUARD":
            os.kill(os.getpid(), signal.Signals[f"SIG{SIGNALS.get(what, what)}"])
        return result if after else before(*args, **kwargs)

    setattr(owner, name, replacement)
    # those who took it by its name when they were loaded
    for module in [each for key, each in sys.modules.items() if key.startswith("nbdbackupd")]:
        for own in [key for key, value in vars(module).items() if value is before]:
            setattr(module, own, replacement)


def is_connected() -> bool:
    """Whether no connection of this run to QEMU is in its handshake."""
    guards = [each for each in gc.get_objects() if isinstance(each, Guard)]
    return all(stage is Stage.READY for guard in guards for stage in guard.kept.stages)


def owner_of(place: str) -> tuple[Any, str]:
    """The module or class that holds the last name of a place, and that name."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *between, name = path.split(".")
    for each in between:
        owner = getattr(owner, each)
    return owner, name


def guards_of(pid: int) -> list[int]:
    """The guards that a run has now, by its process id; a run that is gone has none."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children = [int(child) for child in task.read_text().split()]
            found += [child for child in children if GUARD.encode() in _command_line(child)]
    return found


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def main() -> int:
    """Rig, then run the command line."""
    os.environ.setdefault("LIBVIRT_DEBUG", "error")
    place = sys.argv.index("--")
    for fault in sys.argv[1:place]:
        rig(fault)
    from nbdbackupd.app import ctl

    return ctl.main(sys.argv[place + 1 :])


if __name__ == "__main__":
    sys.exit(main())
