"""``/dev/nbdN``: the kernel's own NBD client, which nbd-client(8) attaches and detaches."""

import re
import stat
from pathlib import Path
from typing import Final

from nbdbackupd import proc
from nbdbackupd.errors import BusyError, ConfigError, UsageError

SECONDS: Final = 30.0
SYS: Final = Path("/sys/block")


def check(device: Path) -> None:
    """Prove that a device can be attached.

    Raises UsageError for what is no NBD device, ConfigError if the kernel has none of that name,
    BusyError if it is in use.
    """
    if not re.fullmatch(r"/dev/nbd\d+", str(device)):
        raise UsageError(f"{device} is no NBD device: give one as /dev/nbd0")
    try:
        is_there = stat.S_ISBLK(device.stat().st_mode)
    except OSError:
        is_there = False
    if not is_there:
        raise ConfigError(
            f"there is no {device}: load the kernel's module with 'modprobe nbd', "
            "or go without --device and use the socket"
        )
    if (SYS / device.name / "pid").exists():
        raise BusyError(f"{device} is in use: 'nbd-client -d {device}' would detach it")


def attach(device: Path, socket: Path) -> None:
    """Connect the device to a server; the kernel holds the connection. Raises ProcessError."""
    proc.output(
        ["nbd-client", "-unix", str(socket), str(device), "-N", ""],
        timeout=SECONDS,
        must_finish=True,
    )


def detach(device: Path) -> None:
    """Disconnect the device, if it is connected. Raises ProcessError."""
    if (SYS / device.name / "pid").exists():
        proc.output(["nbd-client", "-d", str(device)], timeout=SECONDS)
