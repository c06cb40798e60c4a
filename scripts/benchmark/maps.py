"""The case ``map``: a served point beside its restored image in nbdkit's file plugin."""

import contextlib
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbd

from nbdbackupd.ops.map import map as maps
from nbdbackupd.ops.map.map import MapRequest, ServedDisk
from scripts.benchmark.measure import (
    Sample,
    Series,
    print_ratio,
    print_series,
    processor_seconds,
    timed,
    verdict,
)
from scripts.benchmark.setting import DOMAIN, TARGET, Setting
from tests.lib import sets
from tests.lib.sets import SetBuilder

INCREMENTS = 10
POINTS = 100
SEED = 7
MIB = 2**20
SLOWER = 1 / 0.7
"""Goal: 0.7 of the throughput of the file plugin."""

READS_GOAL = 5000
READ = 4096
READ_SECONDS = 3.0
READY_GOAL_SECONDS = 0.3
READY_SECONDS = 30.0


def measure(setting: Setting) -> None:
    """A map: ready, read in one go and at random, against nbdkit's file plugin."""
    for what, options in (("plain", []), ("lz4", ["-z"])):
        with setting.new_directory("tmpfs") as directory:
            rng = random.Random(SEED)
            setting.forget_checkpoints()
            target = directory / "set"
            setting.ours("backup", DOMAIN, "-l", "full", "-o", target, *options)
            for _ in range(INCREMENTS):
                setting.change_disk(rng)
                setting.ours("backup", DOMAIN, "-l", "inc", "-o", target, *options)
            setting.forget_checkpoints()
            setting.ours("restore", target, "-o", directory / "out", "--format", "raw")
            (image,) = (directory / "out").glob("*.raw")
            print(f"  {what}")
            _compare(setting, directory, target, image, is_plain=what == "plain")
    _long_chain(setting)


def _compare(
    setting: Setting, directory: Path, target: Path, image: Path, *, is_plain: bool
) -> None:
    request = MapRequest(runtime_dir=directory / "run", source=target, disks=(TARGET,))
    samples: dict[str, list[Sample]] = {"map": [], "file plugin": []}
    with _file_plugin(directory / "file.sock", image) as other, _served(request) as disk:
        for _ in range(setting.runs):
            samples["map"].append(timed(["nbdcopy", disk.uri, "null:"]))
            uri = f"nbd+unix:///?socket={other}"
            samples["file plugin"].append(timed(["nbdcopy", uri, "null:"]))
        found = {name: Series(each) for name, each in samples.items()}
        for name, series in found.items():
            print_series(name, series)
        goal = SLOWER if is_plain else None
        print_ratio("map / file plugin", found["map"], found["file plugin"], goal)
        for name, socket in (("map", disk.socket), ("file plugin", other)):
            rate = _random_reads(str(socket))
            judged = ""
            if name == "map" and is_plain:
                judged = f"  (goal {READS_GOAL}: {'met' if rate >= READS_GOAL else 'MISSED'})"
            print(f"    {name:<16}{rate:9.0f} reads of 4 KiB a second, one at a time{judged}")
        print(f"    {'memory':<16}{_resident(disk.pid) / MIB:9.0f} MiB", flush=True)


def _long_chain(setting: Setting) -> None:
    """How long until a chain of many points is ready."""
    rng = random.Random(SEED)
    with setting.new_directory("tmpfs") as directory:
        made = SetBuilder(directory / "set")
        made.disks = {TARGET: sets.random_disk(rng, 64 * MIB)}
        made.full()
        for _ in range(POINTS - 1):
            made.inc({TARGET: sets.random_changes(rng, 64 * MIB, 50, 4096)})
            made.images.clear()
        request = MapRequest(runtime_dir=directory / "run", source=made.path)
        taken = []
        for _ in range(setting.runs):
            begun = time.monotonic()
            with _served(request) as disk:
                seconds = time.monotonic() - begun
                taken.append(Sample(seconds, _resident(disk.pid), processor_seconds(disk.pid)))
        series = Series(taken)
        print(f"  {POINTS} points")
        print_series("ready after", series)
        print(f"    {'':<24}{verdict(series.seconds, READY_GOAL_SECONDS)}", flush=True)


@contextlib.contextmanager
def _served(request: MapRequest) -> Iterator[ServedDisk]:
    with maps.serve(request, cancelled=lambda: None) as (disk,):
        yield disk


@contextlib.contextmanager
def _file_plugin(socket: Path, image: Path) -> Iterator[Path]:
    argv = ["nbdkit", "-f", "--exit-with-parent", "-U", str(socket), "-r", "file", str(image)]
    with tempfile.TemporaryFile() as said, subprocess.Popen(argv, stderr=said) as server:
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not socket.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError("nbdkit does not listen")
                time.sleep(0.01)
            yield socket
        finally:
            server.terminate()


def _random_reads(socket: str) -> float:
    """Reads a second, one after the other, of one connection."""
    rng = random.Random(SEED)
    client = nbd.NBD()
    client.connect_unix(socket)
    try:
        blocks = client.get_size() // READ
        begun, count = time.monotonic(), 0
        while (passed := time.monotonic() - begun) < READ_SECONDS:
            client.pread(READ, rng.randrange(blocks) * READ)
            count += 1
        return count / passed
    finally:
        client.shutdown()


def _resident(pid: int) -> int:
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024
