"""The body of scripts/demo: a story in seven steps, each one shown as a user would type it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.lab.command import LabError
from tests.lab.compare import first_difference
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import Guest

TOP = Path(__file__).resolve().parent.parent
DISKS = ("vda", "vdb")
DISK_SIZE = 256 * MIB
STEP_TIMEOUT_SECONDS = 100
EXIT_DAMAGED = 40
BOLD, GREEN, RED, PLAIN = (
    ("\033[1m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "", "", "")
)


class DemoError(Exception):
    """The product did not do what it promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The true content of every disk at a moment, taken without the product."""

    what: str
    images: dict[str, Path]


class Demo:
    """One run of the demo; ``work`` is a directory of its own."""

    def __init__(self, lab: EmbeddedLab, work: Path) -> None:
        self.lab = lab
        self.work = work
        self.set = work / "set"
        self.damaged = work / "damaged"
        self.restored = work / "restored"
        self.variables = {
            "URI": lab.uri,
            "SET": str(self.set),
            "DAMAGED": str(self.damaged),
            "OUT": str(self.restored),
        }
        self.step_number = 0
        self.references: list[Reference] = []

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

    def compare(self, reference: Reference, name: str, restored: Path) -> None:
        """Compare one disk; raises ``DemoError`` at the first different byte."""
        offset = first_difference(reference.images[name], restored)
        if offset is not None:
            raise DemoError(f"{reference.what}: {name} differs at byte {offset}")
        self.note(f"{GREEN}identical{PLAIN}: {name} at {reference.what}, all {DISK_SIZE} bytes")

    def ctl(self, *words: str | Path, expect: int = 0) -> None:
        """Run and show one nbdbackupctl command with its output."""
        done = self.call(words, expect=expect, show=True)
        for line in (done.stdout or done.stderr).splitlines():
            print(f"     {line}")
        if expect:
            self.note(f"exit status {done.returncode}, as it should be")

    def ctl_json(self, *words: str | Path, show: bool = False) -> Any:
        """Run one nbdbackupctl command for its JSON report."""
        return json.loads(self.call((*words, "--json"), expect=0, show=show).stdout)

    def call(
        self, words: tuple[str | Path, ...], *, expect: int, show: bool
    ) -> subprocess.CompletedProcess[str]:
        """Run nbdbackupctl from this checkout; raises ``DemoError`` on another exit status."""
        # only a backup needs libvirt
        connection = ["-c", self.lab.uri] if words[0] == "backup" else []
        if show:
            self.say(f"$ nbdbackupctl {self.as_typed([*connection, *words])}")
        started = time.monotonic()
        done = subprocess.run(
            ["/usr/bin/python3", "-m", "nbdbackupd", *connection, *words],
            cwd=TOP,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_SECONDS,
            # the embedded driver logs like a daemon, to stderr
            env={**os.environ, "LIBVIRT_DEBUG": "error"},
            check=False,
        )
        if done.returncode != expect:
            raise DemoError(f"exit status {done.returncode}: {done.stdout}{done.stderr}")
        if show:
            self.note(f"took {time.monotonic() - started:.1f} s")
        return done

    def as_typed(self, words: Sequence[str | Path]) -> str:
        """Return a command's words with the long ones replaced by their variables."""
        line = " ".join(os.fspath(word) for word in words)
        for name, value in self.variables.items():
            line = line.replace(value, f'"${name}"')
        return line.replace(" --json", "")

    def step(self, title: str) -> None:
        """Begin a chapter."""
        self.step_number += 1
        print(f"\n{BOLD}{self.step_number}. {title}{PLAIN}")

    def say(self, text: str) -> None:
        """Print something that a user would type."""
        print(f"   {BOLD}{text}{PLAIN}", flush=True)

    def note(self, text: str) -> None:
        """Print what happened."""
        print(f"   - {text}", flush=True)


def interrupted(number: int, _frame: FrameType | None) -> None:
    """Leave by an exception, so that everything is torn down."""
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demo; 0 if every byte was right."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, interrupted)
    started = time.monotonic()
    print("A guest is backed up, changed, backed up again, restored and compared.")
    try:
        with EmbeddedLab() as lab:
            work = lab.directory / "demo"
            work.mkdir()
            print(f"Everything happens in {lab.directory} and is removed at the end.")
            Demo(lab, work).run()
    except (DemoError, LabError, subprocess.TimeoutExpired) as err:
        print(f"\n{RED}FAILED{PLAIN}: {err}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    print(f"\n{GREEN}All restored disks are identical{PLAIN} ({seconds:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
