"""Whether another host may open an image: by what the kernel tells of where it lies."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SYS: Final = Path("/sys")
MOUNTS: Final = Path("/proc/self/mountinfo")
MAX_DEPTH: Final = 16

OWN: Final = re.compile(r"/(ata\d+|usb\d+|mmc_host|nd_btt|ndbus\d+)/")
"""What no second host can be attached to."""

CONTROLLER: Final = re.compile(r"/[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]/host\d+/target")
"""A disk of a RAID controller: SCSI right below a PCI device, with no port or session between."""

NETWORK: Final = frozenset(
    {
        "9p",
        "afs",
        "ceph",
        "cifs",
        "gfs2",
        "glusterfs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "smb3",
        "virtiofs",
    }
)
"""File systems that other hosts may have mounted; so may what FUSE shows (fuse, fuse.*)."""

MULTIPATH: Final = "mpath-"
MOUNT_FIELDS: Final = 5
"""The fifth of a line of mountinfo is the mount point, with blanks in octal: proc(5)."""

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def is_own(path: str) -> bool:
    """Whether only this host can reach an image; False where that can't be said.

    A file is own on a file system of this host, a volume if all that it lies on is. Disks by Fibre
    Channel, iSCSI, SAS, NVMe over fabrics, multipath, RBD, DRBD, NBD may be another host's, too; so
    may a virtual machine's.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - a name from an XML
    except (OSError, ValueError):
        return False
    if not stat.S_ISBLK(found.st_mode):
        return _is_own_file(path)
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    return _is_own(SYS / "dev/block" / number, 0)


def _is_own(device: Path, depth: int) -> bool:
    if depth > MAX_DEPTH:
        return False
    try:
        real = device.resolve(strict=True)
        if (real / "partition").exists():
            real = real.parent
        below = [real / "slaves" / each.name for each in _listed(real / "slaves")]
        if _text(real / "dm/uuid").startswith(MULTIPATH):
            return False
    except (OSError, RuntimeError):
        return False
    if below:
        return all(_is_own(each, depth + 1) for each in below)
    return _is_own_disk(real)


def _is_own_disk(real: Path) -> bool:
    name = real.name
    if name.startswith("nvme"):
        return _is_own_nvme(real)
    if name.startswith("loop"):
        return _is_own_file(_text(real / "loop/backing_file"))
    if re.fullmatch(r"(zd|zram|ram)\d+", name):
        return True
    where = f"{real}/"
    return bool(OWN.search(where) or CONTROLLER.search(where))


def _is_own_nvme(real: Path) -> bool:
    """All controllers are on PCI; with native multipath the disk is below its subsystem."""
    ways = [each for each in _listed(real.parent) if re.fullmatch(r"nvme\d+", each.name)]
    transports = [_text(each / "transport") for each in ways or [real.parent]]
    return set(transports) == {"pcie"}


def _is_own_file(path: str) -> bool:
    """Whether a file is on a file system of this host; one that is not seen here is not.

    By its path: what stat(2) says of its device is not in the list for some (btrfs, overlay).
    """
    if not path.startswith("/") or not os.path.exists(path):  # noqa: PTH110 - a kernel's name
        return False
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in _text(MOUNTS).splitlines():
        before, _, after = line.partition(" - ")
        words = before.split(" ")
        if len(words) < MOUNT_FIELDS:
            continue
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), words[MOUNT_FIELDS - 1])
        # of several on one point the last is what is seen
        if len(point) >= len(best) and f"{real}/".startswith(f"{point.rstrip('/')}/"):
            best, kind = point, after.partition(" ")[0]
    # mounted here, and none for clusters: mounted nowhere else
    return kind != "" and kind not in NETWORK and kind.partition(".")[0] != "fuse"


def _listed(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").rstrip("\n")
    except OSError:
        return ""
