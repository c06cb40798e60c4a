"""The runtime directory, ``/run/nbdbackup``: what lies in it, who gets in, how long a path may be.

    UUID/                     711  a domain's locks and notes; its QEMU passes, and opens nothing
    libvirt-UUID/             700  the socket of its QEMU, which gets in as well
    boot/NAME/, NAME.lock     711  sockets of a boot; who attends to it
    called                         libvirt's daemon that called the hook last, "PID START"
    doing/RUN                 700  what a run does now, in words
    map/ID/, mounts/ID/            a map (711), a mount (700): see ops/map/mapped.py, browsing
    slots/NUMBER              700  locks, one for each run that there may be at a time
    starting/DOMAIN.starting  700  its time is that at which a start was announced
    xml/DOMAIN.xml, .end      700  what the hook keeps of a domain: see source/kept.py

All is gone with a boot of the host, the directories of domains that libvirt no longer knows a day
after their last use, by the next run of any. The hook (hooks/nbdbackup) makes ``called``,
``starting`` and ``xml`` by the same names.
"""

import os
from pathlib import Path
from typing import Final
from urllib.parse import quote

from nbdbackupd import durable

DEFAULT: Final = Path("/run/nbdbackup")
MODE: Final = 0o755
CLOSED: Final = 0o700
PASSED: Final = 0o711
"""QEMU runs as another user and must get through to what is its own."""

BOOT: Final = "boot"
CALLED: Final = "called"
DOING: Final = "doing"
MAP: Final = "map"
MOUNTS: Final = "mounts"
SLOTS: Final = "slots"
STARTING: Final = "starting"
XML: Final = "xml"

LOCK: Final = "lock"
NOTE: Final = "run.json"
LEASE: Final = "lease.json"
IMAGES: Final = "images"
GUARDS: Final = "guards"
HELD: Final = "guest-held"
STARTED_PAUSED: Final = "started-paused"
OFFLINE_SOCKET: Final = "offline.sock"
EXPORT_SOCKET: Final = "export.sock"
"""What lies in a domain's directory."""

PROFILE: Final = "libvirt-"
NBD_SOCKET: Final = "nbd.sock"
MAX_NAME: Final = 200
SOCKET_PATH_MAX: Final = 107
"""Bytes: sun_path holds 108, the last of which is zero."""


def make(runtime_dir: Path, name: str, mode: int = CLOSED) -> Path:
    """Make a directory in the runtime directory, and that one. Raises OSError."""
    durable.make_directory(runtime_dir, MODE)
    durable.make_directory(runtime_dir / name, mode)
    return runtime_dir / name


def make_domain_dir(runtime_dir: Path, uuid: str) -> Path:
    """Make the domain's directory. Raises RepositoryError."""
    with durable.translate_os_errors("create", domain_dir(runtime_dir, uuid)):
        return make(runtime_dir, uuid, PASSED)


def domain_dir(runtime_dir: Path, uuid: str) -> Path:
    """The domain's directory: by UUID, because a name may be long or hostile."""
    return runtime_dir / uuid


def socket_dir(runtime_dir: Path, uuid: str) -> Path:
    """The directory that QEMU gets for its socket, apart from what only we may touch.

    It has the name of the domain's AppArmor profile: a rule for all domains lets each one's QEMU
    into its own alone (packaging/common/libvirt-qemu.apparmor).
    """
    return runtime_dir / f"{PROFILE}{uuid}"


def beside(socket_dir: Path) -> Path:
    """The domain's own directory, given that of its QEMU's socket."""
    return socket_dir.parent / socket_dir.name.removeprefix(PROFILE)


def offline_socket(runtime_dir: Path, uuid: str) -> Path:
    """Where the images of a domain that is off are offered, to ourselves alone."""
    return domain_dir(runtime_dir, uuid) / OFFLINE_SOCKET


def file_name(domain: str) -> str:
    """A domain's name or UUID as the hook and we name files after it."""
    return quote(domain, safe=" ")[:MAX_NAME]


def socket_fault(path: Path) -> str:
    """Why there can be no Unix socket at a path: it is too long; empty if it is not."""
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return ""
    return f"the path of socket {path} is longer than {SOCKET_PATH_MAX} bytes"


def uri_fault(path: Path) -> str:
    """The same of a socket that others are given the URI of.

    QEMU 10 takes a query apart after it has decoded it: an ampersand ends the path there.
    """
    if any(char in os.fspath(path) for char in "&;%"):
        return f"the path of socket {path} has &, ; or %, which QEMU misreads in a URI"
    return socket_fault(path)
