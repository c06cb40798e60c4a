"""Sets as qmpbackup lays them out, made by QEMU's programs alone, which also say what they hold."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lib.images import qemu_img

KIB = 1 << 10
MIB = 1 << 20
STAMP = 1_796_019_000
SIZE = 4 * MIB


def layer(path: Path, commands: Sequence[str], *options: str, size: int = SIZE) -> Path:
    """A qcow2 image without a backing file, written by qemu-io."""
    words = [word for option in options for word in ("-o", option)]
    qemu_img("create", "-q", "-f", "qcow2", *words, path, str(size))
    io(path, commands)
    return path


def io(path: Path, commands: Sequence[str], form: str = "qcow2") -> None:
    """Have qemu-io write."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", form, *words, os.fspath(path)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "failed" not in done.stdout + done.stderr, done


def scribble(
    rng: random.Random, count: int, *, size: int = SIZE, packed: bool = False
) -> list[str]:
    """Writes and zeroes of whole sectors; ``packed``: some of compressed clusters."""
    found = []
    for place in rng.sample(range(size // (64 * KIB)), count if packed else 0):
        # QEMU compresses no cluster that is there
        offset = place * 64 * KIB
        found.append(f"write -c -P {rng.randrange(1, 256)} {offset} {64 * KIB}")
    for _ in range(count):
        length = rng.randrange(1, 300) * 512
        offset = rng.randrange(0, (size - length) // 512) * 512
        verb = rng.choice([f"write -P {rng.randrange(1, 256)}", "write -z", "write -z -u"])
        found.append(f"{verb} {offset} {length}")
    return found


def stacked(layers: Sequence[Path], scratch: Path, *, below: Path | None = None) -> bytes:
    """What QEMU reads from layers, oldest first, that are put on one another, or on a raw image."""
    scratch.mkdir()
    under, form = below, "raw"
    for number, each in enumerate(layers):
        copy = Path(shutil.copy(each, scratch / f"{number}.qcow2"))
        if under is not None:
            qemu_img("rebase", "-u", "-f", "qcow2", "-F", form, "-b", under.absolute(), copy)
        under, form = copy, "qcow2"
    raw = scratch / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", under or "", raw)
    found = raw.read_bytes()
    shutil.rmtree(scratch)
    return found


@dataclass
class QmpbackupSet:
    """One set; ``disks`` are names of images in folders of the same names."""

    path: Path
    disks: tuple[str, ...] = ("d1.qcow2", "d2.qcow2")
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    stamp: int = STAMP
    is_flat: bool = False
    layers: dict[str, list[Path]] = field(default_factory=dict)
    references: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.mkdir()
        (self.path / "uuid").write_text("f70c7063-c13c-48a9-a8ba-e362bcfd00e3")
        for disk in self.disks:
            self.config(disk)

    def config(self, image: str, form: str = "qcow2", **more: object) -> None:
        """Write what qmpbackup keeps of an image."""
        told = {"virtual-size": SIZE, "filename": f"/vm/{image}", "format": form, **more}
        (self.path / f"{image}.config").write_text(json.dumps(told, indent=4))

    def place(self, disk: str, level: str) -> Path:
        """Where a layer of the run that is now belongs."""
        folder = self.path if self.is_flat else self.path / disk
        folder.mkdir(exist_ok=True)
        return folder / f"{level}-{self.stamp}-{disk}"

    def run(self, level: str, *options: str, packed: bool = False, count: int = 12) -> str:
        """A run that saves all disks; the point's id."""
        self.stamp += 60
        ident = f"{level}-{self.stamp}"
        self.references[ident] = {}
        for disk in self.disks:
            commands = scribble(self.rng, count, packed=packed)
            made = layer(self.place(disk, level), commands, *options)
            below = self.layers.get(disk, []) if level == "INC" else []
            if level != "COPY":
                self.layers[disk] = [*below, made]
            scratch = self.path.parent / "stacked"
            self.references[ident][disk] = stacked([*below, made], scratch)
        return ident
