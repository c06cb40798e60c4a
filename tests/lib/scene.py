"""A domain, its sets, and what its disks were at each point: the ground of the system tests.

References come from ``qemu-img convert`` of the paused guest's images, so that they share
nothing with the product but the image itself.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.base import Lab
from tests.lab.command import run
from tests.lab.compare import first_difference_raw
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import wait_until
from tests.lib.rigged import RiggedCtl

WARNED = 3
CHOOSING = {"-i", "-x", "--raw"}
LOCKS = {"lock", "images", "guards", "called"}
"""Files for kernel locks, which stay, and the hook's note of who calls it."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One point that a run made; ``references`` are raw copies of the disks at its instant."""

    set: Path
    report: dict[str, Any]
    references: dict[str, Path]
    stderr: str = ""

    @property
    def point(self) -> dict[str, Any]:
        """The point as the report tells it."""
        found: dict[str, Any] = self.report["point"]
        return found

    @property
    def id(self) -> str:
        """The point's id."""
        return str(self.point["id"])

    @property
    def modes(self) -> dict[str, str]:
        """How each disk was read: full or delta."""
        return {disk["target"]: disk["mode"] for disk in self.point["disks"]}

    @property
    def reasons(self) -> dict[str, str]:
        """Why disks were read in full that should not be."""
        return {disk["target"]: disk["reason"] for disk in self.point["disks"] if disk["reason"]}

    @property
    def skipped(self) -> dict[str, str]:
        """Disks that were left out, and why."""
        return {skip["target"]: skip["reason"] for skip in self.point["skipped"]}

    @property
    def warnings(self) -> list[str]:
        """The point's warnings."""
        found: list[str] = self.point["warnings"]
        return found

    def disk(self, target: str) -> dict[str, Any]:
        """What the report says of one disk."""
        found: dict[str, Any]
        (found,) = (disk for disk in self.point["disks"] if disk["target"] == target)
        return found


@dataclass(kw_only=True)
class Scene:
    """One running guest with ``nbdbackupctl`` beside it; everything lies below ``directory``."""

    lab: Lab
    guest: Guest
    ctl: RiggedCtl
    directory: Path
    history: list[Saved] = field(default_factory=list)
    always: tuple[str, ...] = ()
    """Options of each backup that chooses no disks by itself."""

    @property
    def set(self) -> Path:
        """The directory of the set that is used unless another one is given."""
        return self.directory / "set"

    def save(self, *options: str, into: Path | None = None, code: int = 0) -> Saved:
        """Take references, back up, check the exit code and that nothing is left."""
        into = into or self.set
        options += () if CHOOSING & set(options) else self.always
        references = self.references()
        result = self.ctl("backup", self.guest.name, "-o", into, "--json", *options, code=code)
        report = result.json
        self.assert_clean()
        saved = Saved(set=into, report=report, references=references, stderr=result.stderr)
        assert (code == WARNED) == bool(saved.warnings or "warning: " in saved.stderr), report
        # what is listed is what was reported
        listed = {point["id"]: point for point in self.ctl.points(into)}
        assert listed[saved.id] == saved.point
        self.history.append(saved)
        return saved

    def refuse(self, *options: str, code: int, into: Path | None = None) -> str:
        """Have a backup refused without a trace; return the one line that says why."""
        into = into or self.set
        before = tree(into), self.checkpoints()
        result = self.ctl("backup", self.guest.name, "-o", into, *options, code=code)
        self.assert_clean()
        assert (tree(into), self.checkpoints()) == before
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("nbdbackupctl: ")
        return lines[0]

    def references(self) -> dict[str, Path]:
        """Copy all disks as the guest sees them now."""
        folder = self.directory / "references" / str(len(self.history))
        folder.mkdir(parents=True, exist_ok=True)
        return {
            target: self.guest.reference(target, folder / f"{target}.raw")
            for target, disk in self.guest.disks.items()
            if disk.device == "disk"
        }

    def prove(self, saved: Saved, *options: str, code: int = 0) -> None:
        """Restore a point (default: by its id) and compare all of its disks, byte for byte.

        ``code`` is what the restore exits with: ``WARNED`` where it has something to tell.
        """
        into = self.directory / "restored"
        which = [] if {"--until", "--at", "--point"} & set(options) else ["--point", saved.id]
        done = self.ctl("restore", saved.set, "-o", into, "--json", *which, *options, code=code)
        report = done.json
        assert report["point"] == saved.id
        assert [disk["target"] for disk in report["disks"]] == list(saved.modes)
        for disk in report["disks"]:
            assert_same(Path(disk["path"]), disk["format"], saved.references[disk["target"]])
        shutil.rmtree(into)

    def prove_all(self, *, code: int = 0) -> None:
        """Restore and compare every point of the history; verify each set."""
        for saved in self.history:
            self.prove(saved, code=code)
        self.verify()

    def verify(self) -> None:
        """Have every set of the history verified."""
        for path in {saved.set for saved in self.history}:
            self.ctl("verify", path)

    def bitmaps_off(self, target: str) -> dict[str, list[str]]:
        """The bitmaps in the disk's image while the domain is off, with their flags."""
        text = run(["qemu-img", "info", "--output", "json", self.guest.image(target)])
        data = json.loads(text)["format-specific"]["data"]
        return {bitmap["name"]: bitmap["flags"] for bitmap in data.get("bitmaps", [])}

    def checkpoints(self) -> list[str]:
        """The names of the checkpoints that libvirt knows, in its order."""
        return self.lab.virsh("checkpoint-list", "--name", "--domain", self.guest.name).split()

    def has_job(self) -> bool:
        """Tell whether libvirt has a job of the domain."""
        text = self.lab.virsh("domjobinfo", "--domain", self.guest.name)
        return "None" not in text.splitlines()[0]

    @contextmanager
    def held(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        """A run that stands still within its job, before the first disk: SIGCONT lets it go on.

        No other disk is being opened then: QEMU drops who stands still in the middle of that.
        """
        with (
            self.ctl.rigged("STOP@disk-copied#1"),
            self.ctl.start(
                "backup", self.guest.name, "-o", self.set, "--json", "--workers", "1", *options
            ) as process,
        ):
            self.ctl.faults = ()
            stat = Path(f"/proc/{process.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
            assert self.guest.block_jobs()
            yield process

    def assert_clean(self) -> None:
        """Nothing of a run is left: job, scratch, socket, notes, drafts, block jobs."""
        assert not self.ctl.scratch.exists() or not list(self.ctl.scratch.iterdir())
        left = [path for path in self.ctl.runtime.rglob("*") if not path.is_dir()]
        left = [path for path in left if path.parent.name not in {"starting", "slots", "xml"}]
        assert {path.name for path in left} <= LOCKS, left
        if self.guest.is_running():
            assert self.guest.block_jobs() == []
            assert not self.has_job()
            assert not self.guest.is_paused()


@contextmanager
def scene(
    lab: Lab,
    directory: Path,
    name: str,
    disks: Sequence[DiskSpec] = (DiskSpec(),),
    options: GuestOptions | None = None,
) -> Iterator[Scene]:
    """A running guest of its own in a lab that others may share; killed afterwards."""
    guest = lab.guest(name, disks, options)
    guest.start()
    try:
        yield scene_of(lab, directory, guest)
    finally:
        guest.close()


def scene_of(lab: Lab, directory: Path, guest: Guest) -> Scene:
    """A scene with a guest that is there already; several may share one."""
    # the monitor's name is short, and of this guest alone
    own = lab.directory / f"ctl{guest.places.monitor.stem}"
    return Scene(lab=lab, guest=guest, ctl=RiggedCtl(lab.uri, own), directory=directory)


def assert_same(image: Path, image_format: str, reference: Path) -> None:
    """Compare all guest bytes of an image with a raw reference, the size included.

    QEMU must find no fault in its structure, and no cluster that is leaked.
    """
    raw = image
    if image_format != "raw":
        raw = image.with_name(f"{image.name}.as-raw")
        run(["qemu-img", "check", "-q", "-f", image_format, image])
        run(["qemu-img", "convert", "-f", image_format, "-O", "raw", image, raw])
    different = first_difference_raw(raw, reference)
    assert different is None, f"{image} differs from {reference} at offset {different}"


def tree(path: Path) -> dict[str, int]:
    """All files below a directory with their sizes, but for locks and run logs."""
    return {
        os.fspath(file.relative_to(path)): file.stat().st_size
        for file in path.rglob("*")
        if file.is_file() and file.name not in {".lock", ".reading"} and file.parent.name != "logs"
    }
