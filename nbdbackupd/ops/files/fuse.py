"""Mounts in user space: start a FUSE program, see that its mount is there, take it away again.

A mount is looked for in the kernel's table and never touched to find out: a file system whose
program hangs would make whoever asks hang, too. A mount that is in use at the end is detached
(lazily): it vanishes from its directory at once, and what is open in it can't be read any more.
"""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import plain, proc
from nbdbackupd.errors import BusyError, ConfigError, ProcessError

log = logging.getLogger(__name__)

TABLE: Final = Path("/proc/self/mountinfo")
DEVICE: Final = Path("/dev/fuse")
POLL_SECONDS: Final = 0.01
MAX_WORDS: Final = 300
WATCH_SECONDS: Final = 0.2
BUSY_SECONDS: Final = 3.0
"""How long a mount that is in use at the end is tried again before it is detached."""

UNMOUNT_SECONDS: Final = 30.0
END_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the kernel's table: where, of which type, of what."""

    path: Path
    type: str
    source: str


def table() -> tuple[Mount, ...]:
    """All mounts of our namespace; what was mounted last is last."""
    found = []
    for line in TABLE.read_bytes().decode(errors="surrogateescape").split("\n"):
        left, _, right = line.partition(" - ")
        first, second = left.split(" "), right.split(" ")
        if len(first) > 4 and len(second) > 1:
            found.append(Mount(Path(_plain(first[4])), second[0], _plain(second[1])))
    return tuple(found)


def _plain(text: str) -> str:
    r"""A field in which the kernel writes blanks and backslashes as ``\040``."""
    raw = re.sub(
        rb"\\([0-7]{3})",
        lambda found: bytes([int(found[1], 8)]),
        text.encode(errors="surrogateescape"),
    )
    return raw.decode(errors="surrogateescape")


def is_mounted(path: Path) -> bool:
    """Whether something is mounted right there; ``path`` is absolute and without links."""
    return any(each.path == path for each in table())


def require_fuse() -> None:
    """See that this host has FUSE for us. Raises ConfigError that says what is missing."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        there = "may not be used by this account" if DEVICE.exists() else "does not exist"
        raise ConfigError(
            f"{DEVICE} {there}: files of a backup are read through FUSE; load the kernel module "
            "fuse, or give the container this device"
        )
    _unmounter()


def _unmounter() -> str:
    for name in ("fusermount3", "fusermount"):
        if shutil.which(name):
            return name
    raise ProcessError(f"program fusermount3 was not found: {proc.hint('fusermount3')}")


@contextmanager
def foreground(
    argv: Sequence[str | os.PathLike[str]],
    at: Path,
    *,
    seconds: float,
    cancelled: Callable[[], None],
    busy_seconds: float = BUSY_SECONDS,
    env: Mapping[str, str] | None = None,
) -> Iterator[proc.Process]:
    """Run a program that stays in the foreground and mounts at ``at``; both end with the block.

    ``env`` is added to our environment. Raises ProcessError if it can't be started, or has mounted
    nothing in so many ``seconds``, and what ``cancelled`` raises.
    """
    with proc.spawn(argv, env=env, grace_seconds=END_SECONDS) as program:
        try:
            deadline = time.monotonic() + seconds
            while not is_mounted(at):
                cancelled()
                _check(program)
                if time.monotonic() > deadline:
                    raise ProcessError(f"{program.name} mounted nothing within {seconds:g} s")
                time.sleep(POLL_SECONDS)
            yield program
        finally:
            if unmount(at, busy_seconds=busy_seconds):
                # it writes nothing back, but its own end is the proper one
                with contextlib.suppress(ProcessError):
                    program.wait(END_SECONDS, ok=range(-64, 256))


def _check(program: proc.Process) -> None:
    """As its own check; the first error that it told says more than its last line."""
    try:
        program.check()
    except ProcessError as err:
        told = [line for line in program.complaints.split("\n") if "error:" in line]
        if not told:
            raise
        words = plain.line(told[0].strip())
        raise ProcessError(f"{program.name} failed: {words[:MAX_WORDS]}") from err


@contextmanager
def background(
    argv: Sequence[str | os.PathLike[str]],
    at: Path,
    *,
    seconds: float,
    kernel: bool = False,
) -> Iterator[None]:
    """Run a program that ends when it has mounted at ``at``; its mount ends with the block.

    ``kernel``: it is no FUSE mount. Raises ProcessError if it fails or mounts nothing.
    """
    try:
        proc.output(argv, timeout=seconds)
        if not is_mounted(at):
            raise ProcessError(f"{proc.program(argv)} mounted nothing")
        yield
    finally:
        unmount(at, kernel=kernel)


def unmount(at: Path, *, kernel: bool = False, busy_seconds: float = BUSY_SECONDS) -> bool:
    """Take a mount away, if it is there; False if it was in use and could only be detached.

    Never raises: it runs where other things fail.
    """
    try:
        unmount_unused(at, kernel=kernel, busy_seconds=busy_seconds)
    except (BusyError, ProcessError) as err:
        log.warning("%s; it was detached", err)
        try:
            detach(at, kernel=kernel)
        except ProcessError as failure:
            log.warning("%s can't be unmounted: %s", at, failure)
        return False
    return True


def unmount_unused(at: Path, *, kernel: bool = False, busy_seconds: float = BUSY_SECONDS) -> None:
    """Take a mount away, if it is there.

    Raises BusyError if it is in use for so many seconds, ProcessError.
    """
    deadline = time.monotonic() + busy_seconds
    while is_mounted(at):
        try:
            _run(["umount"] if kernel else ["fusermount3", "-u"], at)
        except ProcessError as err:
            if "busy" not in str(err):
                raise
            if time.monotonic() > deadline:
                message = f"{at} is in use: a program has a file or its directory open there"
                raise BusyError(message) from err
            time.sleep(WATCH_SECONDS)


def detach(at: Path, *, kernel: bool = False) -> None:
    """Take a mount out of its directory though it is in use. Raises ProcessError."""
    if is_mounted(at):
        _run(["umount", "-l"] if kernel else ["fusermount3", "-u", "-z"], at)


def _run(argv: list[str], at: Path) -> None:
    if argv[0] == "fusermount3":
        argv = [_unmounter(), *argv[1:]]
    proc.output([*argv, "--", at], timeout=UNMOUNT_SECONDS, must_finish=True)
