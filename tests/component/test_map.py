"""Maps of sets made by hand, read by real NBD clients and compared with real restores."""

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbd
import pytest

from nbdbackupd.errors import (
    IntegrityError,
    NbdbackupError,
)
from nbdbackupd.format.index import HEADER, MAGIC, NO_DIGEST, RECORD
from nbdbackupd.format.stream import StreamMeta
from nbdbackupd.model.chain import Codec, DiskMode, DiskPoint, Level
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.map import map as maps
from nbdbackupd.ops.map import mapped
from nbdbackupd.ops.map.map import MapRequest, ServedDisk
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.restore import RestoreRequest
from tests.lib import sets
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
READS = int(os.environ.get("NBDBACKUP_MAP_READS", "100000"))
"""Random reads over all kinds of chains; a million were made once, see the test."""

SECONDS = 10.0


def idle() -> None:
    """Nobody cancels."""


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runtime directory of a short name; nothing may be left in it."""
    path = tmp_path_factory.mktemp("r")
    yield path
    assert mapped.known(path) == ()
    assert [each.name for each in (path / "map").iterdir()] in ([], ["gate"])


def built(path: Path, kind: str, seed: int = 5, of: type[SetBuilder] = SetBuilder) -> SetBuilder:
    """A chain with all that can happen to a disk; the newest point is a differential."""
    rng = random.Random(seed)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "lz4": {"level": 2},
        "zstd": {"level": 1, "codec": Codec.ZSTD},
        "blocks": {"block": MIB, "level": 1, "codec": Codec.ZSTD},
        "plain-blocks": {"block": MIB},
    }
    size = 6 * MIB + 512
    made = of(path, **kinds[kind])
    made.disks = {"vda": sets.random_disk(rng, size), "vdb": sets.random_disk(rng, MIB)}
    made.full()
    for number in range(8):
        if number == 3:  # grown
            made.disks["vda"] += bytes(2 * MIB)
        elif number == 5:  # shrunk, below what older points hold
            del made.disks["vda"][5 * MIB :]
        elif number == 6:  # grown again: what was lost does not come back
            made.disks["vda"] += bytes(3 * MIB)
        now = len(made.disks["vda"])
        changes = {"vda": sets.random_changes(rng, now, 30)}
        if number in (3, 6):
            # libvirt's bitmaps say that what is new is dirty
            old = 6 * MIB + 512 if number == 3 else 5 * MIB
            changes["vda"] = [
                *(each for each in changes["vda"] if each.offset + each.length <= old),
                Change(old, now - old - MIB), Change(now - MIB, rng.randbytes(MIB)),
            ]  # fmt: skip
        # read whole within the chain
        demoted = ("vda",) if number == 2 else ("vdb",) if number == 4 else ()
        changes["vdb"] = sets.random_changes(rng, MIB, 3)
        made.inc(changes, whole=demoted)
    made.inc({"vda": sets.random_changes(rng, len(made.disks["vda"]), 9)}, level=Level.DIFF)
    return made


def restored(source: Path, into: Path, **choice: Any) -> dict[str, bytes]:
    """The disks as a restore gives them."""
    request = RestoreRequest(source=source, output=into, format="raw", **choice)
    report = restore.run(request, progress=lambda *_: None, cancelled=idle)
    return {disk.target: disk.path.read_bytes() for disk in report.disks}


@contextlib.contextmanager
def connected(disk: ServedDisk) -> Iterator[nbd.NBD]:
    """A client."""
    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.connect_unix(str(disk.socket))
    try:
        yield client
    finally:
        client.shutdown()


def compare(disk: ServedDisk, expected: bytes, reads: int, seed: int) -> None:
    """Random reads: small and large ones, aligned or not, up to the last byte."""
    rng = random.Random(seed)
    with connected(disk) as client:
        assert client.get_size() == len(expected)
        for _ in range(reads):
            length = min(int(2 ** rng.uniform(0, 21 if rng.random() < 0.01 else 14)), len(expected))
            offset = rng.randrange(len(expected) - length + 1)
            if rng.random() < 0.3:
                offset &= ~4095
            found = client.pread(length, offset)
            assert found == expected[offset : offset + length], (offset, length)


def read(disk: ServedDisk) -> bytes:
    """The whole disk, by several connections."""
    argv = ["nbdcopy", "--connections=4", disk.uri, "-"]
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


# -- what is read


@pytest.mark.parametrize("kind", ["plain", "lz4", "blocks", "plain-blocks"])
def test_random_reads_equal_a_restore(kind: str, tmp_path: Path, runtime: Path) -> None:
    """A million reads were made with NBDBACKUP_MAP_READS, see docs/adr."""
    made = built(tmp_path / "set", kind)
    request = MapRequest(runtime_dir=runtime, source=made.path)
    if kind == "plain-blocks":
        request = replace(request, prove=True)
    wanted = restored(made.path, tmp_path / "out")
    assert wanted == made.images[-1]
    with maps.serving(request, cancelled=idle) as up, ThreadPoolExecutor(4) as pool:
        assert [disk.target for disk in up.disks] == ["vda", "vdb"]
        runs = [
            pool.submit(compare, up.disks[n % 4 == 3], wanted[up.disks[n % 4 == 3].target],
                        READS // 16, n)
            for n in range(4)
        ]  # fmt: skip
        for each in runs:
            each.result()
        assert up.check() == 0
        for disk in up.disks:
            assert read(disk) == wanted[disk.target]


def test_each_point_is_exact(tmp_path: Path, runtime: Path) -> None:
    made = built(tmp_path / "set", "zstd", 6)
    for point, images in zip(made.points, made.images, strict=True):
        request = MapRequest(runtime_dir=runtime, source=made.path, choice=Choice(point=point.id))
        with maps.serve(request, cancelled=idle) as disks:
            assert {disk.target: read(disk) for disk in disks} == images


def test_raw_images(tmp_path: Path, runtime: Path) -> None:
    rng = random.Random(8)
    made = SetBuilder(tmp_path / "set", raw=True, format="raw")
    made.disks = {"sda": sets.random_disk(rng, 3 * MIB)}
    made.full(Level.COPY)
    with maps.serve(MapRequest(runtime_dir=runtime, source=made.path), cancelled=idle) as disks:
        compare(disks[0], made.images[0]["sda"], 500, 1)
        assert read(disks[0]) == made.images[0]["sda"]


@pytest.mark.parametrize("kind", ["lz4", "zstd"])
def test_a_sequence_of_streams_without_indexes(kind: str, tmp_path: Path, runtime: Path) -> None:
    made = built(tmp_path / "set", kind, 7)
    files = [point.disk("vda").file for point in made.points[-3:-1]]
    full = [point.disk("vda").file for point in made.points[:-1]]
    for name in full:
        (made.path / f"{name}.index").unlink()
    request = MapRequest(runtime_dir=runtime, sequence=tuple(made.path / name for name in full))
    with maps.serving(request, cancelled=idle) as up:
        assert read(up.disks[0]) == made.images[-2]["vda"]
        compare(up.disks[0], made.images[-2]["vda"], 500, 2)
    with pytest.raises(NbdbackupError):
        maps.detach(
            replace(request, sequence=tuple(made.path / name for name in files)), cancelled=idle
        )


def status(disk: ServedDisk) -> list[dict[str, Any]]:
    """The extents as nbdinfo tells them."""
    argv = ["nbdinfo", "--map", "--json", disk.uri]
    text = subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout
    found: list[dict[str, Any]] = json.loads(text)
    return found


@dataclass
class Flagged(SetBuilder):
    """Notes which bytes of a disk its points hold as zero, by writing one over the other."""

    is_zero: dict[str, bytearray] = field(default_factory=dict)

    def _disk(
        self, name: str, meta: StreamMeta, changes: list[Change], mode: DiskMode
    ) -> DiskPoint:
        flags = self.is_zero.setdefault(meta.disk_name, bytearray())
        flags[:] = flags[: meta.virtual_size].ljust(meta.virtual_size, b"\1")
        for change in changes:
            held = b"\1" if isinstance(change.data, int) else b"\0"
            flags[change.offset : change.offset + change.length] = held * change.length
        return super()._disk(name, meta, changes, mode)


@pytest.mark.parametrize("kind", ["plain", "lz4"])
def test_extents_tell_zeroes_and_nothing_else(kind: str, tmp_path: Path, runtime: Path) -> None:
    made = built(tmp_path / "set", kind, of=Flagged)
    assert isinstance(made, Flagged)
    with maps.serve(MapRequest(runtime_dir=runtime, source=made.path), cancelled=idle) as disks:
        for disk in disks:
            found = bytearray()
            for extent in status(disk):
                assert extent["offset"] == len(found)
                # 3: a hole that reads as zeroes
                found += {3: b"\1", 0: b"\0"}[extent["type"]] * extent["length"]
            assert found == made.is_zero[disk.target]
            assert set(found) == {0, 1}
        out = tmp_path / "copy.qcow2"
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disks[0].uri, str(out)]
        subprocess.run(argv, check=True, timeout=60)
        assert sets.read_image(out, "qcow2") == made.images[-1]["vda"]


def test_a_sparse_terabyte_with_a_million_blocks(tmp_path: Path, runtime: Path) -> None:
    """Ready at once, small in memory, and right anywhere; blocks are of a sparse file."""
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(b"x" * 512)}
    made.full()
    (point,) = made.points
    disk = point.disk("vda")
    size, count, length = 1 << 40, 1_000_000, 4096
    stride = size // count & ~511
    stream, index = made.path / disk.file, made.path / disk.index.name
    begin = 1 << 16
    records = bytearray(HEADER.pack(MAGIC, 1, 0, size, 2 * count))
    for n in range(count):
        end = size if n == count - 1 else (n + 1) * stride
        start = n * stride
        records += RECORD.pack(start, length, begin + n * length, length, 0, NO_DIGEST)
        records += RECORD.pack(start + length, end - start - length, 0, 0, 1, NO_DIGEST)
    index.write_bytes(records)
    os.truncate(stream, begin + count * length)
    rng = random.Random(4)
    marked = sorted(rng.sample(range(count), 300))
    with stream.open("r+b") as file:
        for n in marked:
            file.seek(begin + n * length + 17)
            file.write(struct.pack("<Q", n + 1))
    made.points[0] = replace(
        point,
        disks=(
            replace(
                disk, size=size, file_size=begin + count * length, data_bytes=count * length,
                zero_bytes=size - count * length,
                index=replace(disk.index, size=len(records), sha256=sets.sha(bytes(records))),
            ),
        ),
    )  # fmt: skip
    made.rewrite()
    with maps.serving(MapRequest(runtime_dir=runtime, source=made.path), cancelled=idle) as up:
        (served,) = up.disks
        assert resident(served.pid) < 64 * MIB
        with connected(served) as client:
            for n in marked:
                wanted = bytes(17) + struct.pack("<Q", n + 1) + bytes(75)
                assert client.pread(100, n * stride) == wanted
                assert client.pread(50, n * stride + 8 * KIB) == bytes(50)
            assert client.pread(512, size - 512) == bytes(512)
        # the index is mapped: its pages count, but the kernel takes them back
        assert resident(served.pid) - mapped_files(served.pid) < 64 * MIB


def resident(pid: int) -> int:
    """Memory of a process, in bytes."""
    return memory(pid, "VmRSS")


def mapped_files(pid: int) -> int:
    """Of this, pages of files."""
    return memory(pid, "RssFile")


def memory(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * KIB


def test_a_long_chain_is_ready_at_once(tmp_path: Path, runtime: Path) -> None:
    """Goal: 0.3 s for 100 points. Processor time, ours and nbdkit's: others use the machine."""
    rng = random.Random(2)
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": sets.random_disk(rng, 8 * MIB)}
    made.full()
    for _ in range(99):
        made.inc({"vda": sets.random_changes(rng, 8 * MIB, 4)})
    del made.images[:-1]
    taken = []
    for _ in range(5):
        begun = time.process_time()
        with maps.serve(MapRequest(runtime_dir=runtime, source=made.path), cancelled=idle) as disks:
            taken.append(time.process_time() - begun + processor_seconds(disks[0].pid))
            compare(disks[0], made.images[0]["vda"], 200, 3)
    assert min(taken) < 0.3
    with maps.serve(MapRequest(runtime_dir=runtime, source=made.path), cancelled=idle) as disks:
        assert read(disks[0]) == made.images[0]["vda"]


def processor_seconds(pid: int) -> float:
    """What a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def test_memory_for_unpacked_blocks_is_bounded(tmp_path: Path, runtime: Path) -> None:
    rng = random.Random(2)
    made = SetBuilder(tmp_path / "set", level=1, block=MIB)
    made.disks = {"vda": bytearray(rng.randbytes(96 * MIB))}
    made.full()
    request = MapRequest(runtime_dir=runtime, source=made.path, cache_bytes=8 * MIB)
    with maps.serve(request, cancelled=idle) as disks:
        assert read(disks[0]) == made.images[0]["vda"]
        assert resident(disks[0].pid) < 90 * MIB


# -- damage


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 4]))


def damaged(tmp_path: Path, level: int | None) -> tuple[SetBuilder, bytes]:
    """A set with a flipped bit in the third block of 64 KiB; and what it should hold."""
    made = SetBuilder(tmp_path / "set", level=level)
    made.disks = {"vda": bytearray(random.Random(1).randbytes(512 * KIB))}
    made.full()
    disk = made.points[0].disk("vda")
    with (made.path / disk.index.name).open("rb") as file:
        file.seek(HEADER.size + 2 * RECORD.size)
        place = RECORD.unpack(file.read(RECORD.size))[2]
    flip(made.path / disk.file, place + 20_000)
    return made, made.images[0]["vda"]


def refused(client: nbd.NBD, length: int, offset: int) -> None:
    with pytest.raises(nbd.Error) as caught:
        client.pread(length, offset)
    assert caught.value.errno == "EIO"


@pytest.mark.parametrize(("level", "prove"), [(2, False), (None, True)])
def test_no_byte_of_a_damaged_block_is_given_out(
    level: int | None, prove: bool, tmp_path: Path, runtime: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    made, wanted = damaged(tmp_path, level)
    request = MapRequest(runtime_dir=runtime, source=made.path, prove=prove)
    with maps.serving(request, cancelled=idle) as up, connected(up.disks[0]) as client:
        for offset in (128 * KIB, 150_000, 192 * KIB - 1):
            refused(client, 1, offset)
        refused(client, 512 * KIB, 0)
        assert client.pread(128 * KIB, 0) == wanted[: 128 * KIB]
        assert client.pread(320 * KIB, 192 * KIB) == wanted[192 * KIB :]
        wait_for(lambda: up.check() == 1)
    told = [each.message for each in caplog.records if each.levelname == "ERROR"]
    assert len(told) == 1
    assert told[0].startswith("disk vda of a map: block")
    assert f"guest={128 * KIB}" in told[0]


def test_a_plain_block_is_proven_when_it_is_read_at_once(tmp_path: Path, runtime: Path) -> None:
    made, wanted = damaged(tmp_path, None)
    request = MapRequest(runtime_dir=runtime, source=made.path)
    with maps.serve(request, cancelled=idle) as disks, connected(disks[0]) as client:
        # a part of a plain block can't be proven without reading all of it
        assert client.pread(4096, 128 * KIB) == wanted[128 * KIB :][:4096]
        assert client.pread(1, 128 * KIB + 20_000)[0] == wanted[128 * KIB + 20_000] ^ 4
        refused(client, 64 * KIB, 128 * KIB)
        # now it is known
        refused(client, 4096, 128 * KIB)


def wait_for(condition: Any, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_can_be_proven_is_proven_before(tmp_path: Path, runtime: Path) -> None:
    made = built(tmp_path / "set", "plain")
    request = MapRequest(runtime_dir=runtime, source=made.path)
    disk = made.points[3].disk("vda")
    flip(made.path / disk.index.name, 500)
    with pytest.raises(IntegrityError, match=r"index is damaged"):
        maps.detach(request, cancelled=idle)
    flip(made.path / disk.index.name, 500)
    shutil.move(made.path / disk.file, tmp_path / "away")
    with (
        pytest.raises(IntegrityError, match=r"missing"),
        maps.serve(request, cancelled=idle),
    ):
        pytest.fail("served")
    assert mapped.known(runtime) == ()


def test_a_gap_in_a_full_is_no_zero(tmp_path: Path, runtime: Path) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(random.Random(1).randbytes(512 * KIB))}
    made.full()
    disk = made.points[0].disk("vda")
    index = made.path / disk.index.name
    data = bytearray(index.read_bytes())
    del data[HEADER.size + RECORD.size : HEADER.size + 2 * RECORD.size]
    data[: HEADER.size] = HEADER.pack(MAGIC, 1, 0, 512 * KIB, 7)
    index.write_bytes(data)
    stored = replace(disk.index, size=len(data), sha256=sets.sha(bytes(data)))
    made.points[0] = replace(made.points[0], disks=(replace(disk, index=stored),))
    made.rewrite()
    request = MapRequest(runtime_dir=runtime, source=made.path)
    with maps.serve(request, cancelled=idle) as disks, connected(disks[0]) as client:
        assert client.pread(64 * KIB, 0) == made.images[0]["vda"][: 64 * KIB]
        refused(client, 1, 64 * KIB)
        refused(client, 64 * KIB + 1, 0)
        assert client.pread(10, 128 * KIB) == made.images[0]["vda"][128 * KIB :][:10]
