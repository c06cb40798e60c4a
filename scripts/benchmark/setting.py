"""Where the measuring happens: a private libvirtd, one running guest, a tmpfs and a disk."""

import contextlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.benchmark.measure import Sample, Series, processor_seconds, timed
from tests.lab.base import cache_directory
from tests.lab.command import LabError, run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import GIB, MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lab.peer import Peer, host_suite, peer
from tests.lab.virsh import TOP

DOMAIN = "bench"
TARGET = "vda"
PULL = """<domainbackup mode='pull'>{incremental}
<server transport='unix' socket='{socket}'/>
<disks><disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk></disks>
</domainbackup>"""


NEWEST_SUITE = "sid"
"""Where Debian has the newest virtnbdbackup."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that a case needs; ``places`` are the directories to write to, by name."""

    lab: DaemonLab
    guest: Guest
    peer: Peer
    places: dict[str, Path]
    runs: int
    size_gib: float

    # -- the programs

    def ours(self, *words: str | Path) -> Sample:
        """Run nbdbackupctl of this checkout."""
        connection = ["-c", self.lab.uri] if words[0] == "backup" else []
        return timed(["/usr/bin/python3", "-m", "nbdbackupd", *connection, *words])

    def peer_backup(self, *words: str | Path) -> Sample:
        """Run virtnbdbackup on the domain."""
        program = self.peer.backup_program
        return timed(self.peer.argv(program, "-U", "qemu:///system", "-d", DOMAIN, *words))

    def peer_restore(self, *words: str | Path) -> Sample:
        """Run virtnbdrestore."""
        program = self.peer.restore_program
        return timed(self.peer.argv(program, "-U", "qemu:///system", *words))

    def nbdcopy(self, into: Path) -> Sample:
        """Copy the disk of a pull job, begun and ended outside of the time, to a raw file."""
        with self.pull_job() as uri:
            # --flush: we, too, bring everything to the disk
            return timed(["nbdcopy", "--flush", uri, into])

    @contextlib.contextmanager
    def pull_job(self) -> Iterator[str]:
        """Begin a full pull job by virsh and end it; gives the NBD URI of the disk."""
        socket, scratch = (self.lab.directory / name for name in ("pull.sock", "scratch"))
        job = self.lab.directory / "pull.xml"
        job.write_text(PULL.format(incremental="", socket=socket, scratch=scratch))
        self.lab.virsh("backup-begin", DOMAIN, job)
        try:
            yield f"nbd+unix:///{TARGET}?socket={socket}"
        finally:
            self.guest.abort_job()

    # -- what lies around a run

    def repeat(self, place: str, **programs: Callable[[Path], Sample]) -> dict[str, Series]:
        """Run every program in turn, ``runs`` times, each time into a new directory.

        In turn, so that a disturbance of the machine hits all of them.
        """
        samples: dict[str, list[Sample]] = {name: [] for name in programs}
        for _ in range(self.runs):
            for name, program in programs.items():
                with self.new_directory(place) as directory:
                    before = processor_seconds(self.guest.process().pid)
                    sample = program(directory)
                    taken = processor_seconds(self.guest.process().pid) - before
                    samples[name].append(replace(sample, server_cpu_seconds=taken))
        return {name: Series(found) for name, found in samples.items()}

    @contextlib.contextmanager
    def new_directory(self, place: str) -> Iterator[Path]:
        """Give a directory, remove it afterwards; nothing older is still being written."""
        os.sync()
        with tempfile.TemporaryDirectory(dir=self.places[place]) as directory:
            yield Path(directory)

    @contextlib.contextmanager
    def with_disks(self, directory: Path, count: int) -> Iterator["Setting"]:
        """Give the same with a guest whose disks together hold as much as the usual one's."""
        specs = []
        for number in range(count):
            image = directory / f"{number}.qcow2"
            make_image(image, int(self.size_gib * GIB / count) // MIB * MIB)
            specs.append(DiskSpec(target=f"vd{'abcdefgh'[number]}", path=image))
        guest = self.lab.guest(f"disks{count}", specs)
        guest.start()
        try:
            yield replace(self, guest=guest)
        finally:
            guest.close()

    def forget_checkpoints(self) -> None:
        """Remove every checkpoint of the domain, with its bitmaps."""
        names = self.lab.virsh("checkpoint-list", "--name", "--topological", DOMAIN).split()
        for name in reversed(names):
            self.lab.virsh("checkpoint-delete", DOMAIN, name)

    def change_disk(self, rng: random.Random, changes: int = 32) -> None:
        """Have the guest write ``changes`` MiB here and there, and zero a quarter as much."""
        size = self.guest.disk_size(TARGET)
        for number in range(changes):
            offset = rng.randrange(size // MIB) * MIB
            self.guest.write(TARGET, offset, MIB, rng.randint(1, 255))
            if number % 4 == 0:
                offset = rng.randrange(size // MIB) * MIB
                self.guest.write_zeroes(TARGET, offset, MIB, unmap=True)


@contextlib.contextmanager
def open_setting(runs: int, size_gib: float) -> Iterator[Setting]:
    """Make everything; removes it all at the end, also after an error."""
    with contextlib.ExitStack() as stack:
        disk = Path(tempfile.mkdtemp(prefix="bench-", dir=cache_directory()))
        stack.callback(shutil.rmtree, disk, ignore_errors=True)
        # before the daemon starts, since the peer runs in its mount namespace
        memory = disk / "tmpfs"
        memory.mkdir()
        # two sets and some more; pages that nobody writes take no memory
        limit = f"size={int(size_gib * 6 + 6)}g"
        run(["mount", "-t", "tmpfs", "-o", limit, "tmpfs", memory])
        stack.callback(run, ["umount", memory])
        lab = stack.enter_context(DaemonLab(qemu_user="root"))
        image = disk / "source.qcow2"
        make_image(image, int(size_gib * GIB))
        guest = lab.guest(DOMAIN, [DiskSpec(target=TARGET, path=image)])
        guest.start()
        stack.callback(guest.close)
        # as packages do at their installation
        run(["/usr/bin/python3", "-m", "compileall", "-q", TOP / "nbdbackupd"])
        places = {"tmpfs": memory, "disk": disk}
        yield Setting(lab, guest, newest_peer(lab), places, runs, size_gib)


def make_image(path: Path, data_bytes: int) -> None:
    """Make a disk in a process of its own: a program's peak memory begins with its parent's."""
    module = "scripts.benchmark.data"
    argv: list[str | Path] = ["/usr/bin/python3", "-m", module, path, str(data_bytes)]
    run(argv, timeout_seconds=900, cwd=TOP)


def newest_peer(lab: DaemonLab) -> Peer:
    """Return the newest virtnbdbackup that can be had: without a network, this Debian's."""
    try:
        return peer(NEWEST_SUITE, lab.launcher)
    except LabError as err:
        print(f"no virtnbdbackup of {NEWEST_SUITE}: {err}", file=sys.stderr)
        return peer(host_suite(), lab.launcher)
