"""A guest, its backup set, and what each restore point must bring back.

Before each run a reference of each disk is made by ``qemu-img`` of the paused guest; the point
that the run publishes, if it does, has to restore to it, byte for byte.
"""

import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbdbackupd.format import manifest
from nbdbackupd.model.chain import Layout
from nbdbackupd.repo import generation, layout
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lab.command import LabError
from tests.lab.compare import first_difference
from tests.lab.disks import MIB
from tests.lab.guest import Guest
from tests.lib.ctl import Ctl, Result

KIB = 1024


class Witness:
    """Knows what the guest's disks held when each point was made."""

    def __init__(self, ctl: Ctl, guest: Guest, directory: Path, name: str = "set") -> None:
        self.ctl = ctl
        self.guest = guest
        self.path = directory / name
        self._directory = directory
        self._references: dict[str, dict[str, Path]] = {}
        self._rng = random.Random(name)
        self._count = 0

    def fill(self, length: int = 8 * MIB) -> None:
        """Let the guest write data at the beginning of each disk that no compression shrinks."""
        # where QEMU can read it under any account
        source = self.guest.places.images / f"{self.path.name}.random"
        for target in self.guest.disks:
            source.write_bytes(self._rng.randbytes(length))
            self.guest.write_file(target, 0, source)
        source.unlink()

    def change(self) -> None:
        """Let the guest write data, zero and discard at places that differ each time."""
        for target in self.guest.disks:
            size = self.guest.disk_size(target)
            for _ in range(3):
                place = self._rng.randrange(size // (64 * KIB) - 1) * 64 * KIB
                self.guest.write(target, place, 64 * KIB, self._rng.randint(1, 255))
            place = self._rng.randrange(64) * 64 * KIB
            self.guest.write_zeroes(target, place, 64 * KIB, unmap=bool(self._rng.randint(0, 1)))
            self.guest.discard(target, self._rng.randrange(64) * 64 * KIB, 64 * KIB)

    def run(self, *options: str, code: int | None = 0, guest_runs: bool = True) -> Result:
        """Back up; the references of what is published are kept. ``code`` as in ``Ctl``."""
        references = self._take() if guest_runs else {}
        result = self.ctl("backup", self.guest.name, "-o", self.path, "--json", *options, code=code)
        self.note(references)
        return result

    def _take(self) -> dict[str, Path]:
        self._count += 1
        return {
            target: self.guest.reference(
                target, self._directory / f"{self.path.name}-{self._count}-{target}.raw"
            )
            for target in self.guest.disks
        }

    def take(self) -> dict[str, Path]:
        """Copies of all disks as they are now, for ``note``."""
        return self._take()

    def references(self, point: str) -> dict[str, Path]:
        """What the disks held at a point, by target: raw images."""
        return self._references[point]

    def note(self, references: dict[str, Path]) -> None:
        """Points that are new in the set must restore to ``references``."""
        new = [point for point in self.points() if point["id"] not in self._references]
        assert len(new) <= 1
        for point in new:
            self._references[point["id"]] = references

    def points(self) -> list[dict[str, Any]]:
        """The set's points as the program lists them; none if there is no set yet."""
        if not (self.path / layout.POINTS).is_dir():
            return []
        return self.ctl.points(self.path)

    def check_restores(self, which: Iterable[str] = ()) -> None:
        """Restore points, the newest without ``which``, and compare every byte."""
        for point in which or [self.points()[-1]["id"]]:
            into = Path(tempfile.mkdtemp(prefix="restore-", dir=self._directory))
            images = self.ctl.restore(self.path, into, "--point", point)
            assert set(images) == set(self._references[point])
            for target, image in images.items():
                difference = first_difference(self._references[point][target], image)
                assert difference is None, f"{point} {target} differs at {difference}"
            shutil.rmtree(into)

    def check_all(self) -> None:
        """Restore every point; the program itself must find the set sound, too."""
        self.check_restores([point["id"] for point in self.points()])
        self.ctl("verify", self.path)

    def assert_clean(self) -> None:
        """Nothing is left of any run but points, their one base and logs."""
        assert self.guest.block_jobs() == []
        assert not self.guest.is_paused()
        self.assert_no_files()
        bases = [point["checkpoint"] for point in self.points() if point["checkpoint"]]
        head = set(bases[-1:])
        assert self.checkpoints() == head
        for target in self.guest.disks:
            assert set(self.guest.bitmaps(target)) == head, target

    def checkpoints(self) -> set[str]:
        """What libvirt lists."""
        listed = self.guest.virsh("checkpoint-list", "--domain", self.guest.name, "--name")
        return set(listed.split())

    def delete_checkpoints(self) -> None:
        """Begin anew: whatever earlier tests left goes, with its bitmaps."""
        for _ in range(3):
            for name in self.checkpoints():
                # an embedded libvirt may crash at its end, with all work done
                with contextlib.suppress(LabError):
                    self.guest.virsh("checkpoint-delete", "--domain", self.guest.name, name)
        assert self.checkpoints() == set()

    def assert_no_files(self, allow: Iterable[str] = ()) -> None:
        """No scratch file, socket, note or draft is left, and no file that no point names.

        ``allow`` names files of the runtime directory.
        """
        assert list(self.ctl.scratch.glob("*")) == []
        left = [path.name for path in self.ctl.runtime.rglob("*") if not path.is_dir()]
        # files for kernel locks stay
        assert set(left) - set(allow) <= {"lock", "images", "guards"}
        if not self.path.exists():
            return
        known = SetDirectory.open(self.path).load()
        manifests = generation.directory(self.path).name
        names = {f"{manifests}/{layout.manifest(each.sequence, each.id)}"
                 for each in known.points}  # fmt: skip
        for point in known.points:
            names |= set(manifest.file_names(point))
            names |= {layout.checksum(disk.file) for disk in point.disks
                      if disk.layout is Layout.STREAM}  # fmt: skip
        names |= {layout.verified(each.id) for each in known.points}
        names |= {layout.LOCK, layout.READING, layout.GENERATION}
        names.add(layout.checkpoint_list(self.guest.name))
        found = {str(path.relative_to(self.path)) for path in self.path.rglob("*")
                 if not path.is_dir()}  # fmt: skip
        beside = {layout.LOGS, *layout.NOTES}
        strangers = {name for name in found - names if name.partition("/")[0] not in beside}
        assert strangers == set()
        assert not list(self.path.glob(".draft*"))


def wait_for_job(guest: Guest) -> None:
    """Wait until a backup job runs in QEMU; raises LabError."""
    from tests.lab.process import wait_until

    def runs() -> bool:
        try:
            return bool(guest.block_jobs())
        except LabError:
            return False

    wait_until(runs, "backup job", 60)


def wait_for_copy(guest: Guest, path: Path) -> None:
    """Wait until a run into the set has written data of its first disk; raises LabError."""
    from tests.lab.process import wait_until

    wait_for_job(guest)
    drafts = f"{layout.DRAFT_PREFIX}*/*.data"
    wait_until(lambda: any(each.stat().st_size for each in path.glob(drafts)), "copy", 60)
