"""Each codec with each digest, mixed in a chain; frames that are damaged, hostile or unreadable.

The references are the bytes that were put into the sets. Frames that no writer of ours makes are
made by zstandard itself, or by hand from RFC 8878.
"""

import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.format import blocks, manifest, stream
from nbdbackupd.format.index import HEADER, MAX_BLOCK, Index, IndexHeader, Kind
from nbdbackupd.model.chain import Codec, Compression, DigestKind, Level
from nbdbackupd.model.removal import plan_removal
from nbdbackupd.ops.removal import apply
from nbdbackupd.ops.removal.apply import RemovalRequest
from nbdbackupd.ops.sets.layers import open_proven
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.verify import VerifyRequest
from tests.lib import sets
from tests.lib.contents import read_disk
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
CODECS = list(Codec)
DIGESTS = list(DigestKind)


def problems(path: Path) -> list[str]:
    request = VerifyRequest(path=path, workers=1)
    report = verify.run(request, progress=lambda *_: None, cancelled=lambda: None)
    return [str(each) for each in report.problems]


def chain(path: Path, codecs: list[Codec], digests: list[DigestKind]) -> SetBuilder:
    """A full and increments, each point with the next codec and digest; half of it can shrink."""
    rng = random.Random(4)
    made = SetBuilder(path / "set", block=16 * KIB)
    half = random.Random(5).randbytes(KIB) * 128
    made.disks = {"vda": bytearray(half + rng.randbytes(128 * KIB) + bytes(64 * KIB) + half[:512])}
    for number, (codec, digest) in enumerate(zip(codecs, digests, strict=True)):
        made.codec, made.digest = codec, digest
        made.level = None if codec is Codec.NONE else 1
        if number:
            made.inc({"vda": sets.random_changes(rng, len(made.disks["vda"]), 4)})
        else:
            made.full()
    return made


def payloads(path: Path, index: Path) -> Iterator[tuple[int, int, bytes]]:
    """Guest offset and length of each data block, and its payload."""
    with Index(index) as opened:
        data = path.read_bytes()
        for each in opened:
            if each.kind == Kind.DATA:
                payload = data[each.position : each.position + each.stored]
                yield each.offset, each.length, payload


def remove(made: SetBuilder, run: Path, doomed: str) -> None:
    with apply.opened(made.path, run, owner="test of ") as (set_dir, known):
        apply.apply_removal(
            set_dir, known, plan_removal(known, [doomed], live=True),
            RemovalRequest(program="test"), progress=lambda *_: None, cancelled=lambda: None,
        )  # fmt: skip


@pytest.mark.parametrize("digest", range(3))
@pytest.mark.parametrize("codec", range(3))
def test_codecs_and_digests_mix_in_a_chain(tmp_path: Path, codec: int, digest: int) -> None:
    """All points restore and verify, before and after each merge, which takes payloads over."""
    codecs = [CODECS[(codec + each) % 3] for each in range(3)]
    digests = [DIGESTS[(digest + each) % 3] for each in range(3)]
    made = chain(tmp_path, codecs, digests)
    last = made.points[-1].disk("vda")
    before = set(payloads(made.path / last.file, made.path / last.index.name))
    for point, kind in zip(made.points, codecs, strict=True):
        disk = point.disk("vda")
        with Index(made.path / disk.index.name) as index:
            assert (index.header.codec, disk.codec) == (kind, kind)
        meta = stream.read_meta(made.path / disk.file)
        assert meta.codec is kind
        assert meta.to_json()["compressionMethod"] == ("zstd" if kind is Codec.ZSTD else "lz4")
    for number, doomed in enumerate(["", *(point.id for point in made.points[:-1])]):
        if doomed:
            remove(made, tmp_path / "run", doomed)
        for point, images in list(zip(made.points, made.images, strict=True))[number:]:
            assert read_disk(made.path, point.id, "vda") == images["vda"]
        assert problems(made.path) == []
    with apply.opened(made.path, tmp_path / "run", owner="test of ") as (_, known):
        (left,) = known.points
    disk = left.disk("vda")
    assert (left.level, disk.codec, disk.digest) == (Level.FULL, codecs[-1], digests[-1])
    after = set(payloads(made.path / disk.file, made.path / disk.index.name))
    # what the newest held in whole blocks is as it was stored
    assert before & after
    assert before <= after or codecs[-1] is not Codec.NONE


def test_each_flipped_byte_is_found(tmp_path: Path) -> None:
    """By the frame, the digest, or what is around it; never other bytes, never a traceback."""
    made = chain(tmp_path, [Codec.ZSTD], [DigestKind.SHA256])
    point = made.points[0]
    file = made.path / point.disk("vda").file
    whole = file.read_bytes()
    wanted = made.images[0]["vda"]
    for place in range(0, len(whole), 997):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        assert problems(made.path), place
        try:
            assert read_disk(made.path, point.id, "vda") == wanted
        except FormatError:
            continue
    file.write_bytes(whole)
    assert problems(made.path) == []


BLOCK = random.Random(1).randbytes(1 << 10) * 1024
FRAME = blocks.compress(BLOCK, Compression(Codec.ZSTD, 1))
MAGIC = b"\x28\xb5\x2f\xfd"


def frame(head: bytes, *parts: tuple[int, int, bytes]) -> bytes:
    """A frame by hand: blocks are a type, a size, and what is stored."""
    found = MAGIC + head
    for number, (kind, size, data) in enumerate(parts, 1):
        found += (size << 3 | kind << 1 | (number == len(parts))).to_bytes(3, "little") + data
    return found


SINGLE = b"\xe0" + MIB.to_bytes(8, "little")
"""A header: content size in eight bytes, the window is all of it."""

RAW, RLE = 0, 1
ZEROES = [(RLE, 128 * KIB, b"\0")] * 8
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "magic alone": MAGIC,
    "an lz4 frame": blocks.compress(BLOCK, Compression(Codec.LZ4, 1)),
    "a byte behind it": FRAME + b"\0",
    "two frames": FRAME + FRAME,
    "a skippable frame behind it": FRAME + b"\x50\x2a\x4d\x18\4\0\0\0abcd",
    "a skippable frame before it": b"\x50\x2a\x4d\x18\4\0\0\0abcd" + FRAME,
    "a skippable frame of that size": b"\x50\x2a\x4d\x18" + MIB.to_bytes(4, "little") + bytes(MIB),
    "cut": FRAME[:-1],
    "less than its header": FRAME[:6],
    "size unknown": zstandard.ZstdCompressor(write_content_size=False).compress(BLOCK),
    "less than wanted": blocks.compress(BLOCK[:-1], Compression(Codec.ZSTD, 1)),
    "more than wanted": blocks.compress(BLOCK + b"0", Compression(Codec.ZSTD, 1)),
    "says 16 EiB": frame(b"\xe0" + b"\xfe" + b"\xff" * 7, *ZEROES),
    "says 0": frame(b"\x20\0", (RAW, 0, b"")),
    "holds more than it says": frame(SINGLE, *ZEROES * 2500),
    "holds less than it says": frame(SINGLE, *ZEROES[1:]),
    "a window of 2 GiB": frame(b"\xc0\xa8" + MIB.to_bytes(8, "little"), *ZEROES),
    "a window of 2 MiB": frame(b"\xc0\x58" + MIB.to_bytes(8, "little"), *ZEROES),
    "a dictionary": frame(b"\xe1\7" + MIB.to_bytes(8, "little"), *ZEROES),
    "a block of a type that is reserved": frame(SINGLE, *ZEROES[1:], (3, 128 * KIB, b"")),
    "a block beyond its end": frame(SINGLE, *ZEROES[1:], (RAW, 128 * KIB, b"abc")),
    "a checksum that is wrong": zstandard.ZstdCompressor(write_checksum=True).compress(BLOCK)[:-1]
    + b"\0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_frames_that_are_not_ours(name: str) -> None:
    with pytest.raises(IntegrityError, match="block "):
        blocks.decompress(memoryview(HOSTILE[name]), MAX_BLOCK, Codec.ZSTD)


def test_frames_by_hand_are_read() -> None:
    """Those above differ from these by what is wrong with them alone."""
    assert blocks.decompress(frame(SINGLE, *ZEROES), MIB, Codec.ZSTD) == bytes(MIB)
    window = frame(b"\xc0\x50" + MIB.to_bytes(8, "little"), *ZEROES)
    assert blocks.decompress(window, MIB, Codec.ZSTD) == bytes(MIB)
    summed = zstandard.ZstdCompressor(write_checksum=True).compress(BLOCK)
    assert blocks.decompress(summed, MIB, Codec.ZSTD) == BLOCK


def test_memory_does_not_depend_on_a_frame() -> None:
    """Changed at random, thousands of times: as many bytes as asked for, or an error."""
    rng = random.Random(9)
    small = blocks.compress(BLOCK[: 16 * KIB], Compression(Codec.ZSTD, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for each in HOSTILE.values():
        with pytest.raises(IntegrityError):
            blocks.decompress(each, MAX_BLOCK, Codec.ZSTD)
    read = 0
    for _ in range(4000):
        changed = bytearray(small)
        for _ in range(rng.randrange(1, 4)):
            changed[min(int(rng.expovariate(0.01)), len(small) - 1)] = rng.randrange(256)
        try:
            assert len(blocks.decompress(changed, 16 * KIB, Codec.ZSTD)) == 16 * KIB
            read += 1
        except IntegrityError:
            continue
    assert read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * KIB


@pytest.mark.parametrize("flags", [8 | 1, 32, 8 | 16, 16 | 1, 16 | 2, 16 | 4])
@pytest.mark.parametrize("version", [1, 2])
def test_headers_that_nobody_writes(tmp_path: Path, version: int, flags: int) -> None:
    path = tmp_path / "index"
    path.write_bytes(HEADER.pack(b"NBDXIDX1", version, flags, 512, 0))
    with pytest.raises(UnsupportedVersionError, match="newer program"):
        Index(path)


def test_older_programs_read_what_has_no_zstd(tmp_path: Path) -> None:
    for codec in CODECS:
        (tmp_path / codec).mkdir()
        made = chain(tmp_path / codec, [codec], [DigestKind.SHA256])
        document = json.loads(manifest.pack(made.points[0]))
        (disk,) = document["disks"]
        if codec is Codec.ZSTD:
            assert (document["version"], disk["codec"], "compressed" in disk) == (4, "zstd", False)
        else:
            assert (document["version"], disk["compressed"]) == (1, codec is Codec.LZ4)
            assert "codec" not in disk
        version = IndexHeader(512, 0, codec, raw=False).pack()[8]
        assert version == (2 if codec is Codec.ZSTD else 1)


def test_all_must_name_the_same_codec(tmp_path: Path) -> None:
    made = chain(tmp_path, [Codec.ZSTD], [DigestKind.SHA256])
    (disk,) = made.points[0].disks
    made.points[0] = replace(made.points[0], disks=(replace(disk, codec=Codec.LZ4),))
    made.rewrite()
    assert any("does not fit the manifest" in each for each in problems(made.path))
    with pytest.raises(IntegrityError, match="disagree"):
        open_proven(made.path, made.points[0], made.points[0].disk("vda"), lambda: None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"compressionMethod": "zip"}, UnsupportedVersionError),
        ({"compressionMethod": None}, FormatError),
        ({"compressed": 23}, FormatError),
        ({"compressed": -1}, FormatError),
        ({"compressed": "1"}, FormatError),
    ],
)
def test_a_meta_frame_names_what_is_known(
    tmp_path: Path, changes: dict[str, object], expected: type[FormatError]
) -> None:
    made = chain(tmp_path, [Codec.ZSTD], [DigestKind.SHA256])
    document = stream.read_meta(made.path / made.points[0].disk("vda").file).to_json()
    assert stream.parse_meta(json.dumps(document).encode()).codec is Codec.ZSTD
    with pytest.raises(expected):
        stream.parse_meta(json.dumps({**document, **changes}).encode())


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def without() -> Run:
    """Runs a command line where zstandard can't be imported."""
    hidden = (
        "import sys; sys.modules['zstandard'] = None; from nbdbackupd.app import ctl; "
        "sys.exit(ctl.main(sys.argv[1:]))"
    )

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", hidden, *map(str, words)]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    return run


def test_a_library_that_is_missing(tmp_path: Path, without: Run) -> None:
    """One line with the package, exit status 10, and nothing is written or passed unproven."""
    made = chain(tmp_path, [Codec.ZSTD], [DigestKind.SHA256])
    out = tmp_path / "out"
    out.mkdir()
    loose = tmp_path / "vda.full.data"
    shutil.copy(made.path / made.points[0].disk("vda").file, loose)
    for words in (
        ("verify", made.path),
        ("restore", made.path, "-o", out),
        ("restore", "--sequence", loose, "-o", out),
        ("map", made.path),
    ):
        done = without(*words)
        assert done.returncode == 10, done
        (line,) = done.stderr.splitlines()
        assert "install python3-zstandard" in line
    assert list(out.iterdir()) == []
    # what needs no block is told all the same
    assert "zstd" in without("show", made.path).stdout


def test_config_check_tells_of_a_missing_library(tmp_path: Path, without: Run) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "nbdbackup.yaml").write_text("threshold: 0\ncompression: zstd:3\n")
    done = without("config", "check", "--config-dir", folder)
    assert done.returncode == 3, done
    assert "nbdbackup.yaml:2: compression: " in done.stderr + done.stdout
    assert "install python3-zstandard" in done.stderr + done.stdout
