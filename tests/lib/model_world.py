"""What the model test knows of its domain: power, images, sets, and what may be expected.

The model is small on purpose. What a point must hold is never computed: it is copied from the
images by ``qemu-img`` at the instant of the run. What is modelled is which disks the next
increment must not read in full, since nothing has happened that loses their changes.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.lab.command import LabError, run
from tests.lab.daemon import DaemonLab
from tests.lab.guest import Guest
from tests.lab.process import NOTICE_TIMEOUT_SECONDS, wait_until
from tests.lab.virtio_agent import Agent
from tests.lib.rigged import RiggedCtl

KIB = 1024
PREFIX = "nbdbackup."
PLUGGED = "vdc"
"""The disk that is plugged in now and then, and gone when the guest ends."""
SMALL_KIB = 2 * KIB * KIB
LOCKED = 'Failed to get "write" lock'
Op = list[Any]
"""One operation on a disk: kind, target, offset, length, pattern; as a step's log holds it."""


class Power(StrEnum):
    """What the domain does; ``SAVED``: off, with a managed save image."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    SAVED = "saved"


@dataclass(kw_only=True)
class SetModel:
    """One backup set: references by point and disk, and what is known of its base."""

    path: Path
    options: tuple[str, ...] = ()
    oddities: tuple[str, ...] = ()
    """What its file system can't do, see ``odd_files``."""
    references: dict[str, dict[str, Path]] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    is_changed: bool = False
    """Points have left it."""
    head: str = ""
    """Name of the base's checkpoint."""
    tag: str = ""
    sure: set[str] = field(default_factory=set)
    """Disks whose changes since the base can't have been lost: they must be read as deltas."""
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The disks' images when the base was made."""
    orphans: set[str] = field(default_factory=set)
    """Bitmaps of the chain that the last run left, though they are of no use."""

    @property
    def has_full(self) -> bool:
        """Whether an increment can be made."""
        return bool(self.head)


@dataclass(frozen=True, kw_only=True, slots=True)
class OldCopy:
    """A copy of a disk's top image, made while the domain was off."""

    target: str
    chain: tuple[str, ...]
    path: Path
    size: int


@dataclass(kw_only=True)
class Place:
    """A host that is not where the domain is now."""

    lab: DaemonLab
    guest: Guest
    ctl: RiggedCtl
    untidy: bool = False
    defined: str = ""
    """The domain's name there; empty: it is not defined there."""
    is_left: bool = False
    """It was migrated from there, which libvirt says of it until it is started there."""


@dataclass(kw_only=True)
class World:
    """The domain, everything around it, and the log of what was done."""

    lab: DaemonLab
    guest: Guest
    ctl: RiggedCtl
    agent: Agent
    other: Place
    """The other host: it shares images, sets and the state directory."""
    directory: Path
    mounts: ExitStack
    """Holds file systems until the end."""
    small: Path
    """A file system that can be made full."""
    sets: dict[str, SetModel] = field(default_factory=dict)
    retired: list[SetModel] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Paths of each disk's images, top first, as the steps made them."""
    data_files: dict[str, Path] = field(default_factory=dict)
    """Images that keep their data in a raw file of its own: image -> that file."""
    power: Power = Power.OFF
    persistent: bool = True
    last_end: str = "another"
    """How the domain ended the last time: stop, destroy, kill9, another."""
    job_left: bool = False
    """A run was killed while the domain ran: libvirt may hold its job until the next run."""
    untidy: bool = False
    """A run was killed, and none has swept up since then."""
    planted: set[str] = field(default_factory=set)
    """Checkpoints and bitmaps of others."""
    copies: list[OldCopy] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    number: int = 0
    last_plugged: int = 0
    most_points: int = 10
    """A set with so many points is left, and a new one begun in its place."""

    @property
    def state(self) -> Path:
        """The state directory of ``nbdbackupctl``."""
        return self.ctl.state

    @property
    def is_active(self) -> bool:
        """Whether QEMU is there."""
        return self.power in (Power.RUNNING, Power.PAUSED)

    @property
    def is_calm(self) -> bool:
        """Whether libvirt has no job, so that it can do other things."""
        return self.is_active and not self.job_left

    @property
    def is_plugged(self) -> bool:
        """Whether the guest has a disk that its definition does not have."""
        return PLUGGED in self.sizes

    def has_data_file(self, target: str) -> bool:
        """Whether one of the disk's images keeps its data in a file of its own."""
        return any(image in self.data_files for image in self.chains[target])

    def next_number(self) -> int:
        """A number that no name has had yet; only steps that are done take one."""
        self.number += 1
        return self.number

    def count(self, what: str) -> None:
        """Count for the report."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def count_seconds(self, what: str, seconds: float) -> None:
        """Add up the time that a kind of step takes."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def lose(self, targets: Iterable[str] = ()) -> None:
        """From now on nothing is promised for these disks (default: all), in any set."""
        for each in self.sets.values():
            each.sure -= set(targets or self.sizes)

    def set_chain(self, target: str, chain: Iterable[str]) -> None:
        """The disk has other images now; also for the next definition."""
        self.chains[target] = tuple(chain)
        path = Path(self.chains[target][0])
        self.guest.use_image(target, path)

    def take_chain(self, target: str, image: str) -> None:
        """The disk is that image with all below it, whatever it was before."""
        self.chains[target] = (image,)
        layers = self.image_info(target)
        self.set_chain(target, [layer["filename"] for layer in layers])
        self.sizes[target] = layers[0]["virtual-size"]
        for layer in layers:
            data = layer.get("format-specific", {}).get("data", {})
            self.data_files.pop(layer["filename"], None)
            if "data-file" in data:
                self.data_files[layer["filename"]] = Path(data["data-file"])

    def resize_small(self, kib: int = SMALL_KIB) -> None:
        """Give the small file system another size."""
        run(["mount", "-o", f"remount,size={kib}k", self.small])

    def started(self) -> None:
        """QEMU runs since now."""
        self.power = Power.RUNNING

    def end(self, how: str) -> None:
        """End QEMU by one of the guest's ways: ``stop``, ``destroy``, ``kill9``."""
        try:
            getattr(self.guest, how)()
        except LabError:
            # a transient domain is gone when "stop" looks for it
            if self.persistent or self._state_if_known():
                raise
        self.ended()
        self.last_end = how

    def ended(self) -> None:
        """QEMU is gone: see libvirt notice; a transient domain is defined anew."""
        wait_until(self._is_over, "end of the domain", NOTICE_TIMEOUT_SECONDS)
        for target in self.guest.unplug():
            del self.sizes[target], self.chains[target]
            for each in self.sets.values():
                each.sure.discard(target)
        if not self._state_if_known():
            self.guest.define()
        self.persistent = True
        self.power = Power.OFF
        self.last_end = "another"
        self.job_left = False

    def rename_guest(self, guest: Guest, name: str) -> None:
        """A domain is called so; libvirt's files of it, too."""
        guest.places = replace(
            guest.places,
            pid_file=guest.places.pid_file.with_name(f"{name}.pid"),
            log=guest.places.log.with_name(f"{name}.log"),
        )
        guest.name = name

    def change_host(self, *, keeps_definition: bool) -> None:
        """The domain is on the other host now."""
        there = self.other
        there.guest.take_over(self.guest)
        name = self.guest.name if keeps_definition else ""
        self.other = Place(
            lab=self.lab, guest=self.guest, ctl=self.ctl, untidy=self.untidy, defined=name
        )
        self.rename_guest(there.guest, self.guest.name)
        self.lab, self.guest, self.ctl = there.lab, there.guest, there.ctl
        self.untidy = there.untidy

    def take_references(self) -> dict[str, Path]:
        """Copy all disks as they are now, by qemu-img."""
        folder = self.directory / "references" / str(self.next_number())
        folder.mkdir(parents=True)
        return {
            target: self.guest.reference(target, folder / f"{target}.raw") for target in self.sizes
        }

    def drop_references(self, references: Mapping[str, Path]) -> None:
        """No point came of them."""
        for path in references.values():
            path.unlink()

    def image_info(self, target: str) -> list[dict[str, Any]]:
        """What qemu-img tells of the disk's images, top first."""
        text = run(
            ["qemu-img", "info", "-U", "--output=json", "--backing-chain", self.chains[target][0]]
        )
        found: list[dict[str, Any]] = json.loads(text)
        return found

    def stored_bitmaps(self, target: str) -> dict[str, list[str]]:
        """Names and flags of the bitmaps stored in any of the disk's images."""
        return {
            bitmap["name"]: bitmap["flags"]
            for layer in self.image_info(target)
            for bitmap in layer.get("format-specific", {}).get("data", {}).get("bitmaps", [])
        }

    def bitmaps(self, target: str) -> set[str]:
        """Names of the bitmaps of a disk, in any of its images: as QEMU has them, if it runs."""
        if not self.is_active:
            return set(self.stored_bitmaps(target))
        # not by the device's node: during a job that is a filter
        return {
            bitmap["name"]
            for node in self.guest.qmp("query-named-block-nodes")
            if node["file"] in self.chains[target] and node["drv"] == "qcow2"
            for bitmap in node.get("dirty-bitmaps", [])
            if "name" in bitmap
        }

    def checkpoints(self) -> set[str]:
        """What libvirt lists."""
        listed = self.lab.virsh("checkpoint-list", "--name", "--domain", self.guest.name)
        return set(listed.split())

    def domain_state(self) -> str:
        """What libvirt says the domain does."""
        return self.lab.virsh("domstate", "--domain", self.guest.name).strip()

    def operate(self, ops: Iterable[Op]) -> None:
        """Write, zero, discard: through the running guest, or with qemu-io while it is off."""
        for op in ops:
            if self.is_active:
                self._operate_guest(*op)
            else:
                self._operate_image(*op)

    def _operate_guest(
        self, kind: str, target: str, offset: int, length: int, pattern: int
    ) -> None:
        match kind:
            case "data":
                self.guest.write(target, offset, length, pattern)
            case "discard":
                self.guest.discard(target, offset, length)
            case _:
                self.guest.write_zeroes(target, offset, length, unmap=kind == "unmap")

    def _operate_image(
        self, kind: str, target: str, offset: int, length: int, pattern: int
    ) -> None:
        words = {
            "data": f"write -P {pattern}",
            "zero": "write -z",
            "unmap": "write -z -u",
            "discard": "discard",
        }
        command = f"{words[kind]} {offset} {length}"
        argv = ["qemu-io", "-f", "qcow2", "-d", "unmap", "-c", command, self.chains[target][0]]
        said = self.unlocked(argv)
        verb = "discard" if kind == "discard" else "wrote"
        assert f"{verb} {length}/{length} bytes" in said, said

    def unlocked(self, argv: list[str]) -> str:
        """Run a program on an image; what a killed run had open may still be closing."""
        said: list[str] = []

        def works() -> bool:
            try:
                said.append(run(argv))
            except LabError as err:
                if LOCKED not in str(err):
                    raise
                return False
            return True

        wait_until(works, f"lock for {argv}", 5)
        return said[0]

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy an image with its holes."""
        run(["cp", "--sparse=always", source, target])

    def forget_files(self, path: Path) -> None:
        """Remove a directory that may not be there."""
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def _is_over(self) -> bool:
        # libvirtd 9.0 that restarts takes a domain with a new snapshot for a persistent one
        return self._state_if_known() in ("", "shut off")

    def _state_if_known(self) -> str:
        """What the domain does, or nothing if libvirt does not know it."""
        try:
            return self.domain_state()
        except LabError as err:
            if not any(said in str(err) for said in ("failed to get domain", "Domain not found")):
                raise
        return ""
