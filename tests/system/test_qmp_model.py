"""A QEMU without libvirt through random steps: no point that can be restored ever lies.

NBDBACKUP_MODEL_SEED=7 NBDBACKUP_MODEL_STEPS=500 pytest tests/system/test_qmp_model.py
"""

import logging
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.lab.process import wait_until
from tests.lib.contents import read_disk
from tests.lib.rigged import RiggedCtl
from tests.lib.standalone import ABOVE, MIB, Process, modern, running

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]
SMALL_MIB = 36
SEED = os.environ.get("NBDBACKUP_MODEL_SEED", "1")
STEPS = int(os.environ.get("NBDBACKUP_MODEL_STEPS", "25"))
STEPS_OF_A_SET = 40
RAW = "disk3"
PLACES = (
    *("jobs-begun", "filter-put", "connection-ready", "requests-moved", "disk-copied"),
    *("point-published", "file-synced", "os-rename", "run-noted", "run-forgotten"),
)


class World:
    """The machine, its set, and what each point of that has to hold."""

    def __init__(self, ctl: RiggedCtl, qemu: Process, directory: Path, small: Path) -> None:
        self.rng = random.Random(f"qmp {SEED}")
        self.ctl, self.qemu, self.directory, self.small = ctl, qemu, directory, small
        self.scratch = ctl.scratch
        self.into = directory / "set-0"
        self.expected: dict[str, dict[str, bytes]] = {}
        self.sound: set[str] = set()
        """Disks whose bitmaps of the base are there."""
        self.has_base = self.has_died = False
        self.points = self.sets = 0

    def save(self, *, is_busy: bool = False, faults: tuple[str, ...] = ()) -> None:
        """A run; it may come to its end or not."""
        level = self.rng.choice(["auto"] * 6 + ["diff", "copy"]) if self.has_base else "auto"
        before, was_running = self.qemu.contents(), self.qemu.guest_runs
        words = ("--qmp", self.qemu.socket, "vm7", "-o", self.into, "--raw", "-l", level)
        dead = self.qemu.exports()
        self.ctl.faults = (*faults, *(("SLOW1@disk-copied#1",) if is_busy else ()))
        with self.ctl.start("backup", *words) as run:
            if is_busy:
                wait_until(
                    lambda: self.qemu.is_read_since(dead) or run.poll() is not None, "export", 60
                )
                # after the instant
                self.qemu.scribble(self.rng, 20)
            _, said = run.communicate(timeout=110)
        self.ctl.faults = ()
        assert "Traceback" not in said, said
        log.info("%s %s -> %s", level, faults, run.returncode)
        code = run.returncode
        assert code in ((0, 3, -signal.SIGKILL, 50) if faults else (0, 3)), said
        self._look(before, code, was_running=was_running)

    def save_while_written(self) -> None:
        """A run; the guest writes all the time that it reads."""
        self.save(is_busy=True)

    def _look(self, before: dict[str, bytes], code: int, *, was_running: bool) -> None:
        new = [each for each in self._points() if each["id"] not in self.expected]
        assert len(new) == (code in (0, 3)) or (not new or code == -signal.SIGKILL)
        for point in new:
            self.points += 1
            self.expected[point["id"]] = before
            is_delta = self.has_base and point["level"] in ("inc", "diff")
            modes = {each["target"]: each["mode"] for each in point["disks"]}
            for disk, mode in modes.items():
                wanted = "delta" if is_delta and disk in self.sound else "full"
                assert mode == wanted, (point["id"], disk, mode, wanted)
            if point["level"] in ("full", "inc"):
                self.has_base, self.sound = True, {*modes}
        if code in (0, 3):
            assert (code == 3) == (self.has_died and self.has_base and bool(new[0]["warnings"]))
            self.has_died = self.has_died and new[0]["level"] in ("diff", "copy")
            assert self.qemu.leftovers() == []
            # with QEMU the base's was lost
            assert len(self.qemu.bitmaps()) == (0 if self.has_died else 1)
            assert self.qemu.guest_runs or not was_running

    def _points(self) -> list[dict[str, Any]]:
        with suppress(AssertionError):
            return self.ctl.points(self.into)
        assert not list(self.into.glob("*.manifest*"))
        return []

    def kill(self) -> None:
        """A run that is killed, with its guard or without."""
        what = self.rng.choice(["KILL", "KILL+", "SLAY"])
        place = f"{what}@{self.rng.choice(PLACES)}#{self.rng.randrange(1, 5)}"
        self.save(faults=(place,), is_busy=self.rng.random() < 0.3)
        if what != "SLAY" and self.rng.random() < 0.5:
            self.qemu.wait_clean()

    def full_target(self) -> None:
        """A write into the set that finds no room."""
        self.save(faults=(f"NOSPACE@os-pwritev#{self.rng.randrange(1, 6)}",))

    def full_scratch(self) -> None:
        """All disks are written all over: the run ends, and each write lands."""
        self.ctl.scratch = self.small / "scratch"
        value = self.rng.randrange(1, 256)
        self.ctl.faults = ("SLOW4@disk-copied#1",)
        words = ("--qmp", self.qemu.socket, "vm7", "-o", self.into, "--raw")
        before, dead = len(self._points()), self.qemu.exports()
        with self.ctl.start("backup", *words) as run:
            wait_until(
                lambda: self.qemu.is_read_since(dead) or run.poll() is not None, "export", 60
            )
            for place in range(0, 8 * MIB, MIB // 2):
                for disk in self.qemu.writers:
                    self.qemu.io(disk, f"write -P {value} {place} {MIB // 2}")
            _, said = run.communicate(timeout=60)
        self.ctl.faults, self.ctl.scratch = (), self.scratch
        assert run.returncode == 30, said
        assert "scratch directory" in said
        assert {*self.qemu.contents().values()} == {bytes([value]) * 8 * MIB}
        assert len(self._points()) == before
        assert self.qemu.leftovers() == []

    def restart(self) -> None:
        """QEMU ends in order, and is begun with another command line."""
        self.qemu.quit()
        self.sound.discard(RAW)
        self._start()

    def kill_qemu(self) -> None:
        """QEMU is killed."""
        self.qemu.contents()
        self.qemu.kill()
        self.sound, self.has_died = set(), True
        self._start()

    def _start(self) -> None:
        words = modern(self.directory, above=self.rng.choice([*ABOVE]), is_new=False).arguments
        self.qemu.arguments = [each for each in words if each != "-S" or self.rng.random() < 0.5]
        self.qemu.start()

    def check(self) -> None:
        """Each point of the set; then another one is begun."""
        for point, disks in self.expected.items():
            for disk, content in disks.items():
                assert read_disk(self.into, point, disk) == content, (point, disk)
        self.expected.clear()
        self.sets += 1
        self.into = self.directory / f"set-{self.sets}"
        self.sound, self.has_base, self.has_died = set(), False, False
        for each in self.qemu.bitmaps():
            for node in ("n1", "n2", "n3"):
                with suppress(Exception):
                    self.qemu.monitor.execute(
                        "block-dirty-bitmap-remove", {"node": node, "name": each}
                    )

    def step(self) -> None:
        """One more."""
        kinds: dict[Callable[[], None], int] = {
            self.save: 6, self.save_while_written: 6, self.kill: 6, self.full_target: 2,
            self.full_scratch: 1, self.restart: 2, self.kill_qemu: 1,
        }  # fmt: skip
        what = self.rng.choices([*kinds], [*kinds.values()])[0]
        log.info("%s", what.__name__)
        self.qemu.scribble(self.rng, 4)
        what()


@pytest.fixture
def world(tmp_path: Path, small: Path) -> Iterator[World]:
    with (
        tempfile.TemporaryDirectory(prefix="nbq-", dir="/tmp") as short,
        running(modern(tmp_path)) as qemu,
    ):
        yield World(RiggedCtl("test:///none", Path(short)), qemu, tmp_path, small)


def test_random_history(world: World) -> None:
    for number in range(1, STEPS + 1):
        log.info("step %d", number)
        world.step()
        if number % STEPS_OF_A_SET == 0 or number == STEPS:
            world.check()
    log.info("%d points in %d sets", world.points, world.sets)
    assert world.points >= STEPS / 4
