"""Who holds a lock, without touching it. Needs neither libvirt nor libnbd."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdbackupd import durable

LOCKS: Final = Path("/proc/locks")
BACKUP: Final = "backup of "
"""What a backup says that it holds the lock for, before the domain's name."""


def holder(path: Path) -> str:
    """Who holds the lock on a file, or nothing.

    Read from the kernel's list: to try the lock, even a shared one, could make a run that begins
    at that moment find it taken. A holder on another host is not in that list, so the lock is tried
    if another host has written into it last.
    """
    try:
        status = path.stat()
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return ""
    who = durable.holder(path)
    for line in lines:
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        major, minor, inode = words[5].split(":")
        device = os.makedev(int(major, 16), int(minor, 16))
        # stat(2) of some file systems (btrfs, overlay) tells another device: the pid will do then
        is_this = device == status.st_dev or f"process {words[4]} " in who
        if int(inode) == status.st_ino and is_this:
            return who
    if durable.is_foreign(path):
        with suppress(OSError):
            return who if durable.is_locked(path) else ""
    return ""
