"""QEMU without libvirt: a process with two monitors, one for the product and one for the test."""

import os
import random
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.process import ProcessHandle, wait_until
from tests.lab.qmp import Monitor
from tests.lib.ctl import Ctl
from tests.lib.images import qemu_img

MIB = 1 << 20
SECONDS = 30.0


class Process:
    """A QEMU whose guest has no system; ``writers`` are its disks, by device, as qemu-io has them.

    ``images`` gives, by the name that the product uses, the image's path and format.
    """

    def __init__(
        self,
        directory: Path,
        arguments: list[str],
        images: Mapping[str, tuple[Path, str]],
        writers: Mapping[str, str],
    ) -> None:
        self.directory = directory
        self.arguments = arguments
        self.images = dict(images)
        self.writers = dict(writers)
        self.socket = directory / "qmp"
        self.handle: ProcessHandle | None = None
        self.monitor: Monitor

    def start(self) -> None:
        """Start it, and hold its second monitor."""
        pid = self.directory / "pid"
        argv = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-display", "none"]
        for name in ("qmp", "own"):
            argv += ["-qmp", f"unix:{self.directory / name},server=on,wait=off"]
        argv += ["-nodefaults", "-pidfile", os.fspath(pid), "-daemonize", *self.arguments]
        subprocess.run(argv, check=True, cwd=self.directory, timeout=SECONDS)
        self.handle = ProcessHandle(int(pid.read_text()))
        self.monitor = Monitor(self.directory / "own")

    @property
    def is_running(self) -> bool:
        """Whether QEMU lives."""
        return self.handle is not None and self.handle.is_running()

    def quit(self) -> None:
        """Let it end in order."""
        self.monitor.execute("quit")
        assert self.handle is not None
        assert self.handle.wait(SECONDS)
        self.monitor.close()

    def kill(self) -> None:
        """Kill it."""
        if self.handle is not None and self.is_running:
            self.handle.send(signal.SIGKILL)
            assert self.handle.wait(SECONDS)
        self.monitor.close()

    def io(self, disk: str, command: str) -> None:
        """Have the guest's disk written by qemu-io in QEMU itself."""
        answer = self.monitor.human(f'qemu-io -d {self.writers[disk]} "{command}"')
        assert "rror" not in answer, answer
        assert "failed" not in answer, answer

    def scribble(self, rng: random.Random, count: int = 10) -> None:
        """Random writes, zeroes and discards on all disks."""
        for disk in self.writers:
            for _ in range(count):
                length = rng.randrange(1, 200) * 512
                offset = rng.randrange(0, (8 * MIB - length) // 512) * 512
                verbs = (
                    f"write -P {rng.randrange(1, 256)}",
                    "write -P 0",
                    "write -z -u",
                    "discard",
                )
                self.io(disk, f"{rng.choice(verbs)} {offset} {length}")

    def contents(self) -> dict[str, bytes]:
        """What each disk holds now, by qemu-img."""
        found = {}
        for disk, (path, form) in self.images.items():
            self.io(disk, "flush")
            raw = self.directory / "reference.raw"
            qemu_img("convert", "-U", "-f", form, "-O", "raw", path, raw)
            found[disk] = raw.read_bytes()
            raw.unlink()
        return found

    def bitmaps(self) -> set[str]:
        """Names of all bitmaps in QEMU."""
        nodes = self.monitor.execute("query-named-block-nodes", {"flat": True})
        return {
            each["name"]
            for node in nodes
            for each in node.get("dirty-bitmaps", [])
            if "name" in each
        }

    def leftovers(self) -> list[str]:
        """What a run has made in QEMU and not removed, but for bitmaps of points."""
        nodes = self.monitor.execute("query-named-block-nodes", {"flat": True})
        found = [each["node-name"] for each in nodes if each["node-name"].startswith("nbdb")]
        found += [each["id"] for each in self.monitor.execute("query-jobs")]
        found += [each["id"] for each in self.monitor.execute("query-block-exports")]
        if self.monitor.execute("query-status")["running"]:
            # QEMU 7.2 lets go of none while the guest is paused
            found += [str(each) for each in self.monitor.execute("query-fdsets")]
        return found + [each for each in self.bitmaps() if each.endswith("-changes")]

    def has_read(self) -> bool:
        """Whether the guest has read from a disk."""
        found = self.monitor.execute("query-blockstats")
        return any(each["stats"]["rd_operations"] for each in found)

    @property
    def has_exports(self) -> bool:
        """Whether a run reads."""
        return bool(self.monitor.execute("query-block-exports"))

    def wait_clean(self) -> None:
        """Wait until nothing of a run is left."""
        wait_until(lambda: not self.leftovers(), "end of what a run left", SECONDS)

    def backup(self, ctl: Ctl, into: Path, *options: str, code: int | None = 0) -> Any:
        """Save it."""
        arguments = ["--qmp", os.fspath(self.socket), "vm7", "-o", os.fspath(into), "--json"]
        done = ctl("backup", *arguments, *options, code=code)
        return done.json if done.code in (0, 3) else done.stderr


@contextmanager
def running(process: Process) -> Iterator[Process]:
    """It runs during the body."""
    process.start()
    try:
        yield process
    finally:
        process.kill()
