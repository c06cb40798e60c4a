"""Sets that the peer's programs write of a real guest, and what its disks held at each point."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.compare import first_difference
from tests.lab.guest import Guest
from tests.lab.peer import Peer
from tests.lib.ctl import Ctl

KIB = 1024


@dataclass(kw_only=True)
class PeerSets:
    """Runs the peer for one guest; its sets lie below ``directory``, ``scratch`` is for QEMU."""

    peer: Peer
    guest: Guest
    directory: Path
    scratch: Path
    references: dict[str, Mapping[str, Path]] = field(default_factory=dict)
    points: dict[str, dict[str, str]] = field(default_factory=dict)
    _rng: random.Random = field(default_factory=lambda: random.Random(5))

    def fill(self, target: str, offset: int, length: int) -> None:
        """Let the guest write data that no compression shrinks."""
        source = self.guest.places.images / "random"
        source.write_bytes(self._rng.randbytes(length))
        self.guest.write_file(target, offset, source)
        source.unlink()

    def note(self, name: str) -> None:
        """Keep copies of all disks as they are now, under a name."""
        folder = self.directory / "references" / name
        folder.mkdir(parents=True)
        self.references[name] = {
            target: self.guest.reference(target, folder / f"{target}.raw")
            for target in self.guest.disks
        }

    def run(self, level: str, into: str, *options: str) -> Path:
        """Have the peer back up into a directory of that name."""
        path = self.directory / into
        self.peer.backup(*self._words(level, path), *options)
        return path

    def archive(self, name: str, *options: str) -> Path:
        """Have the peer write a copy to standard output, which is a zip archive."""
        path = self.directory / name
        words = self.peer.argv(self.peer.backup_program, *self._words("copy", Path("-")), *options)
        with path.open("wb") as file:
            subprocess.run(
                [os.fspath(word) for word in words], stdout=file, stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL, timeout=120, check=True,
            )  # fmt: skip
        return path

    def _words(self, level: str, path: Path) -> list[str | Path]:
        return [
            "-d", self.guest.name, "-l", level, "-o", path, "--scratchdir", self.scratch,
        ]  # fmt: skip

    def chain(self, into: str, *options: str) -> None:
        """A full, two increments, two differentials, an increment; notes references by point."""
        for number, level in enumerate(("full", "inc", "inc", "diff", "diff", "inc")):
            for shift, target in enumerate(self.guest.disks):
                place = (number * 700 + shift * 64) * KIB
                self.guest.write(target, place, 256 * KIB, 0x20 + number)
            self.note(f"{into}-{number}")
            self.run(level, into, *options)
        # the seconds in the names of the streams are others: those at which each disk was begun
        names = sorted(path.name for path in (self.directory / into).glob("vmconfig.1*.xml"))
        first, second = (f"diff.{name.split('.')[1]}" for name in names)
        ids = ["full", "inc.virtnbdbackup.1", "inc.virtnbdbackup.2", first, second]
        ids.append("inc.virtnbdbackup.3")
        self.points[into] = {ident: f"{into}-{number}" for number, ident in enumerate(ids)}

    def check(
        self, ctl: Ctl, path: Path, point: str, reference: str, targets: Iterable[str] = ()
    ) -> None:
        """Restore a point and compare all of its disks, or ``targets``, byte for byte."""
        into = self.directory / "restored"
        images = ctl.restore(path, into, "--point", point, code=None)
        assert set(images) == set(targets or self.guest.disks)
        for target, image in images.items():
            difference = first_difference(self.references[reference][target], image)
            assert difference is None, f"{path.name} {point} {target} differs at {difference}"
        assert (into / f"{self.guest.name}.xml").exists()
        shutil.rmtree(into)


def shuffle_times(path: Path) -> None:
    """Let the times of the files tell the wrong order."""
    for number, file in enumerate(sorted(path.rglob("*"), reverse=True)):
        os.utime(file, (1_000_000_000 + number, 1_000_000_000 + number * 7 % 100))


def open_directory(path: Path) -> Path:
    """A directory in which QEMU may write under any account."""
    path.mkdir(mode=0o777, exist_ok=True)
    path.chmod(0o777)
    return path
