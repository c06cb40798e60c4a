"""Disks of a lab guest: what they are, how their images are made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.lab.command import run

MIB = 1024 * 1024
GIB = 1024 * MIB
DEFAULT_BUS = {"disk": "virtio", "cdrom": "ide", "floppy": "fdc"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskSpec:
    """One disk of a guest; sizes are bytes.

    An image that exists already is attached as it is; else one is made.  ``path`` may name a
    block device (``block=True``, see ``loop_device``).  A cdrom or floppy without ``path`` is
    an empty drive.
    """

    target: str = "vda"
    path: Path | None = None
    size: int = 64 * MIB
    format: str = "qcow2"
    cluster_size: int | None = None
    compat: Literal["0.10", "1.1"] | None = None
    options: tuple[str, ...] = ()  # more ``qemu-img create -o`` settings, "key=value"
    backing: Path | None = None
    backing_format: str = "qcow2"
    device: Literal["disk", "cdrom", "floppy"] = "disk"
    bus: str | None = None  # default: virtio, or what the kind of device needs
    serial: str | None = None
    block: bool = False
    cache: str | None = None
    shareable: bool = False
    readonly: bool = False

    @property
    def alias(self) -> str:
        """Return libvirt's and QEMU's name of the device; libvirt asks for the ``ua-`` prefix."""
        return f"ua-{self.target}"

    @property
    def device_bus(self) -> str:
        """Return the bus that the device is on."""
        return self.bus or DEFAULT_BUS[self.device]

    @property
    def is_virtio(self) -> bool:
        """Say whether it is a virtio-blk disk, which may have an iothread."""
        return self.device == "disk" and self.device_bus == "virtio"

    @property
    def is_writable(self) -> bool:
        """Say whether the guest can write to it."""
        return self.device == "disk" and not self.readonly


def create_image(spec: DiskSpec, path: Path) -> None:
    """Make the image that ``spec`` describes at ``path``; raises ``LabError``."""
    settings = list(spec.options)
    if spec.cluster_size is not None:
        settings.append(f"cluster_size={spec.cluster_size}")
    if spec.compat is not None:
        settings.append(f"compat={spec.compat}")
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", spec.format]
    if settings:
        argv += ["-o", ",".join(settings)]
    if spec.backing is not None:
        argv += ["-b", spec.backing, "-F", spec.backing_format]
    argv += ["--", path.absolute(), str(spec.size)]
    run(argv)


def attach_loop(path: Path) -> Path:
    """Make a block device of a file and return its path; raises ``LabError``."""
    return Path(run(["losetup", "--find", "--show", "--", path]).strip())


def detach_loop(device: Path) -> None:
    """Undo ``attach_loop``; raises ``LabError``."""
    run(["losetup", "--detach", device])
