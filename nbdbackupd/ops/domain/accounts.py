"""Accounts by number and name, and what they may pass on the way to a path."""

import grp
import os
import pwd
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nbdbackupd.model.access import Account

ACL = "system.posix_acl_access"


def account(uid: int, gid: int) -> Account:
    """The account with the groups that libvirt gives to QEMU: initgroups(3)'s."""
    groups = {gid}
    with suppress(KeyError, OSError):
        groups |= set(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    return Account(uid, frozenset(groups))


def ancestors(path: Path) -> Iterator[Path]:
    """The path and all above it, the root first; links as the kernel follows them."""
    real = path.resolve()
    yield from reversed(real.parents)
    yield real


def has_acl(path: Path) -> bool:
    """Whether rights are given beyond the mode."""
    try:
        return ACL in os.listxattr(path)
    except OSError:
        return False


def name_of(uid: int) -> str:
    """The account's name, or its number in words."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def group_of(gid: int) -> str:
    """The group's name, or its number in words."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"
