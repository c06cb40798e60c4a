"""The body of scripts/demo without systemd: seven steps, each shown as a user would type it."""

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.demo_show import DISK_SIZE, DISKS, DemoError, Reference, Show, parse, tell
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import Guest

EXIT_DAMAGED = 40


class Demo(Show):
    """One run of the demo; ``work`` is a directory of its own."""

    def __init__(self, lab: EmbeddedLab, work: Path) -> None:
        self.lab = lab
        self.work = work
        self.set = work / "set"
        self.damaged = work / "damaged"
        self.restored = work / "restored"
        variables = {
            "URI": lab.uri,
            "SET": str(self.set),
            "DAMAGED": str(self.damaged),
            "OUT": str(self.restored),
        }
        super().__init__(variables)

    def run(self) -> None:
        """Tell the whole story; raises ``DemoError`` or ``LabError`` where it breaks."""
        guest = self.make_guest()
        self.full_backup(guest)
        self.first_increment(guest)
        self.second_increment(guest)
        points = self.list_points()
        self.verify()
        self.restore(points)

    # -- the story

    def make_guest(self) -> Guest:
        """Define and start a guest with data on its disks."""
        self.step("A guest with two disks of 256 MiB, running under QEMU and libvirt")
        for name, value in self.variables.items():
            self.say(f"{name}='{value}'")
        guest = self.lab.guest("vm1", [DiskSpec(target=name, size=DISK_SIZE) for name in DISKS])
        guest.start()
        noise = self.work / "noise"
        noise.write_bytes(random.Random(1).randbytes(32 * MIB))
        guest.write_file("vda", 0, noise)
        guest.write("vda", 64 * MIB, 32 * MIB, 0x41)
        guest.write("vdb", 100 * MIB, 16 * MIB, 0x42)
        self.note("the guest wrote 64 MiB to vda and 16 MiB to vdb")
        return guest

    def full_backup(self, guest: Guest) -> None:
        """Save everything."""
        self.step("A full backup, while the guest runs")
        self.take_reference(guest, "full")
        self.ctl("backup", "vm1", "-l", "full", "-o", self.set)

    def first_increment(self, guest: Guest) -> None:
        """Change, zero and discard, then save what changed."""
        self.step("The guest writes, zeroes and discards; an increment saves just that")
        guest.write("vda", 10 * MIB, 2 * MIB, 0x61)
        guest.write("vdb", 0, MIB, 0x62)
        guest.write_zeroes("vda", 64 * MIB, 4 * MIB, unmap=True)
        guest.write_zeroes("vda", 0, 64 * 1024, unmap=False)
        guest.discard("vdb", 100 * MIB, 8 * MIB)
        self.note("3 MiB of new data, 4 MiB and 64 KiB zeroed, 8 MiB discarded")
        self.take_reference(guest, "increment 1")
        self.ctl("backup", "vm1", "-l", "inc", "-o", self.set)

    def second_increment(self, guest: Guest) -> None:
        """Do many small changes and save them."""
        self.step("Sixty small changes all over the disks, and a second increment")
        guest.random_ops(random.Random(2), 60)
        self.take_reference(guest, "increment 2")
        self.ctl("backup", "vm1", "-o", self.set)

    def list_points(self) -> list[str]:
        """Show the restore points and return their ids, oldest first."""
        self.step("What is in the backup set")
        self.ctl("list", self.set)
        points = self.ctl_json("list", self.set)["points"]
        if len(points) != len(self.references):
            raise DemoError(f"{len(points)} points listed, {len(self.references)} made")
        return [point["id"] for point in points]

    def verify(self) -> None:
        """Verify the set; then damage a copy by one bit and see it found."""
        self.step("Every block is verified, and one flipped bit is found")
        self.ctl("verify", self.set)
        shutil.copytree(self.set, self.damaged)
        stream = max(self.damaged.glob("*.data"), key=lambda path: path.stat().st_size)
        position = stream.stat().st_size // 2
        with stream.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))
        self.note(f"in a copy, one bit at byte {position} of {stream.name} is flipped:")
        self.ctl("verify", self.damaged, expect=EXIT_DAMAGED)
        shutil.rmtree(self.damaged)

    def restore(self, points: list[str]) -> None:
        """Restore each point and compare it with its reference."""
        self.step("Each point is restored and compared with the disks as they were")
        for point, reference in zip(points, self.references, strict=True):
            out = self.restored
            report = self.ctl_json("restore", self.set, "-o", out, "--point", point, show=True)
            images = {disk["target"]: out / disk["path"] for disk in report["disks"]}
            for name in DISKS:
                self.compare(reference, name, images[name])
            shutil.rmtree(out)

    # -- its parts

    def take_reference(self, guest: Guest, what: str) -> None:
        """Copy both disks with qemu-img, to compare with later."""
        number = len(self.references)
        images = {
            name: guest.reference(name, self.work / f"reference-{number}-{name}.raw")
            for name in DISKS
        }
        self.references.append(Reference(what=what, images=images))

    def ctl(self, *words: str | Path, expect: int = 0) -> None:
        """Run and show one nbdbackupctl command with its output."""
        self.show_output(self.call(words, expect=expect, show=True))
        if expect:
            self.note(f"exit status {expect}, as it should be")

    def ctl_json(self, *words: str | Path, show: bool = False) -> Any:
        """Run one nbdbackupctl command for its JSON report."""
        return parse(self.call((*words, "--json"), expect=0, show=show))

    def call(
        self, words: tuple[str | Path, ...], *, expect: int, show: bool
    ) -> subprocess.CompletedProcess[str]:
        """Run nbdbackupctl from this checkout; raises ``DemoError`` on another exit status."""
        # only a backup needs libvirt
        connection = ["-c", self.lab.uri] if words[0] == "backup" else []
        program = ["/usr/bin/python3", "-m", "nbdbackupd"]
        return self.run_command(
            program, [*connection, *words], expect=expect, show=show, typed="nbdbackupctl"
        )


def embedded() -> None:
    """Tell the story; raises ``DemoError`` or ``LabError``."""
    with EmbeddedLab() as lab:
        work = lab.directory / "demo"
        work.mkdir()
        print(f"Everything happens in {lab.directory} and is removed at the end.")
        Demo(lab, work).run()


if __name__ == "__main__":
    story = "A guest is backed up, changed, backed up again, restored and compared."
    sys.exit(tell(story, embedded))
