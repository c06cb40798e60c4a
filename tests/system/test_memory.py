"""Peak memory does not grow with the disk, its data or its fragmentation."""

import logging
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.disks import GIB, MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lib.ctl import PYTHON, ROOT, Ctl

pytestmark = [pytest.mark.system, pytest.mark.slow]
LAB = EmbeddedLab

LIMIT = 120 * MIB
KIB = 1024
FEW, MANY = 1 << 16, 1 << 18
GROWTH = 10 * MIB
"""The most that so many more extents may cost: 53 bytes for each, less than a tuple or a record."""

EXTENDED_L2 = 1 << 4
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
log = logging.getLogger(__name__)


def peak(ctl: Ctl, verb: str, *arguments: str | Path) -> int:
    """Run to success and return the peak of the resident memory in bytes.

    By way of a small process: the kernel counts what the parent had at the fork, too.
    """
    begun = time.monotonic()
    done = subprocess.run(
        [PYTHON, "-c", MEASURE, *ctl.argv(verb, *arguments)], cwd=ROOT, env=ctl.environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    size = int(done.stdout) * KIB
    seconds = time.monotonic() - begun
    log.info("%s: %.1f MiB, %.1f s", verb, size / MIB, seconds)
    return size


def check_all(ctl: Ctl, domain: str, tmp_path: Path, *options: str) -> dict[str, int]:
    """Back up, verify, restore: each within the limit. The peaks in bytes."""
    path = tmp_path / "set"
    peaks = {
        "backup": peak(ctl, "backup", domain, "-o", path, *options),
        "verify": peak(ctl, "verify", path),
        "show": peak(ctl, "show", path),
        "restore": peak(ctl, "restore", path, "--format", "raw", "-o", tmp_path / "restored"),
    }
    shutil.rmtree(tmp_path)
    assert {verb: size // MIB for verb, size in peaks.items() if size > LIMIT} == {}
    return peaks


@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [[], ["-z"]], ids=["plain", "lz4"])
def test_large_disk(lab: EmbeddedLab, ctl: Ctl, tmp_path: Path, options: list[str]) -> None:
    guest = lab.guest(f"large{len(options)}", [DiskSpec(size=8 * GIB)])
    guest.start()
    source = guest.places.images / "random"
    source.write_bytes(random.Random(1).randbytes(64 * MIB))
    for number in range(3):
        guest.write_file("vda", number * 3 * GIB - number * 64 * MIB, source)
    check_all(ctl, guest.name, tmp_path, *options)
    guest.destroy()


def fragmented(path: Path, extents: int) -> Path:
    """A qcow2 image, in which data and holes of 512 bytes alternate here and there.

    Written by hand, with subclusters: its first-level table points to a few second-level tables
    again and again, so that the image is small and quickly made. Its reference counts are wrong:
    only read it.
    """
    cluster, tables = 16 * KIB, 61
    entries = cluster // 16
    count = extents // 8
    size = count * entries * cluster
    first = 2 * cluster
    second = first + count * 8
    data = second + tables * cluster
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb", 3, 0, 0, 14, size, 0, count, first, cluster, 1, 0, 0, EXTENDED_L2, 0, 0, 4,
        104,
    )  # fmt: skip
    with path.open("wb") as file:
        file.write(header.ljust(first, b"\0"))
        for number in range(count):
            file.write(struct.pack(">Q", second + number % tables * cluster))
        for number in range(tables):
            level2 = bytearray(cluster)
            # four allocated subclusters of 512 bytes, every other one
            entry = struct.pack(">QQ", data + number * cluster, 0b01010101)
            level2[number * 160 : number * 160 + 16] = entry
            file.write(level2)
        for number in range(tables):
            file.write(bytes([number + 1]) * cluster)
    return path


@pytest.mark.timeout(300)
def test_extents_cost_no_memory(lab: EmbeddedLab, ctl: Ctl, tmp_path: Path) -> None:
    """Compressed, which keeps more in memory: the size of each block, for the stream's end.

    A verification has all its buffers only after so much data: it keeps to the limit.
    """
    peaks = []
    for extents in (FEW, MANY):
        path = fragmented(lab.images / f"{extents}.qcow2", extents)
        guest = lab.guest(f"extents{extents}", [DiskSpec(path=path)])
        guest.start()
        (tmp_path / "run").mkdir()
        peaks.append(check_all(ctl, guest.name, tmp_path / "run", "-l", "copy", "-z"))
        guest.kill9()
    few, many = peaks
    grown = {verb: size - few[verb] for verb, size in many.items() if verb != "verify"}
    assert {verb: size // MIB for verb, size in grown.items() if size > GROWTH} == {}
