"""Each kind of digest, with and without compression, mixed in a chain; what is hostile or missing.

The references are the bytes that were put into the sets, and digests made by other programs.
"""

import hashlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import pytest

from nbdbackupd.errors import IntegrityError, UnsupportedVersionError
from nbdbackupd.format import blocks, manifest
from nbdbackupd.format.index import DIGESTS, HEADER, RECORD, Index, Kind
from nbdbackupd.model.chain import DigestKind, Level
from nbdbackupd.model.flatten import Part
from nbdbackupd.model.removal import plan_removal
from nbdbackupd.ops.map import map as maps
from nbdbackupd.ops.map.map import MapRequest
from nbdbackupd.ops.removal import apply
from nbdbackupd.ops.removal.apply import RemovalRequest
from nbdbackupd.ops.restore.work import difference
from nbdbackupd.ops.sets.layers import open_proven
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.verify import VerifyRequest
from tests.lib import sets
from tests.lib.contents import read_disk
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
ALL = list(DigestKind)


def problems(path: Path) -> list[str]:
    request = VerifyRequest(path=path, workers=1)
    report = verify.run(request, progress=lambda *_: None, cancelled=lambda: None)
    return [str(each) for each in report.problems]


def chain(path: Path, kinds: list[DigestKind], levels: list[int | None]) -> SetBuilder:
    """A full and increments, each point with the next digest and compression."""
    rng = random.Random(4)
    made = SetBuilder(path / "set", block=16 * KIB)
    made.disks = {"vda": sets.random_disk(rng, 512 * KIB + 512)}
    for number, (kind, level) in enumerate(zip(kinds, levels, strict=True)):
        made.digest, made.level = kind, level
        if number:
            made.inc({"vda": sets.random_changes(rng, len(made.disks["vda"]), 8)})
        else:
            made.full()
    return made


def data_records(index: Path) -> Iterator[tuple[int, int, int]]:
    """Number, position and stored length of each data record."""
    with Index(index) as opened:
        for number, record in enumerate(opened):
            if record.kind == Kind.DATA:
                yield number, record.position, record.stored


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 16]))


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("kinds", list(itertools.permutations(ALL)))
def test_kinds_mix_in_a_chain(
    tmp_path: Path, kinds: tuple[DigestKind, ...], level: int | None
) -> None:
    """Each point restores and verifies; so does what is left after each merge, by its own kind."""
    levels = [level, None if level else 1, level]
    made = chain(tmp_path, list(kinds), levels)
    for point, kind in zip(made.points, kinds, strict=True):
        with Index(made.path / point.disk("vda").index.name) as index:
            assert (index.header.digest, point.disk("vda").digest) == (kind, kind)
    assert problems(made.path) == []
    for number, doomed in enumerate(["", *(point.id for point in made.points[:-1])]):
        if doomed:
            with apply.opened(made.path, tmp_path / "run", owner="test of ") as (set_dir, known):
                apply.apply_removal(
                    set_dir, known, plan_removal(known, [doomed], live=True),
                    RemovalRequest(program="test"),
                    progress=lambda *_: None, cancelled=lambda: None,
                )  # fmt: skip
        for point, images in list(zip(made.points, made.images, strict=True))[number:]:
            assert read_disk(made.path, point.id, "vda") == images["vda"]
        assert problems(made.path) == []
    with apply.opened(made.path, tmp_path / "run", owner="test of ") as (_, known):
        (last,) = known.points
    assert (last.level, last.disk("vda").digest) == (Level.FULL, kinds[-1])
    with Index(made.path / last.disk("vda").index.name) as index:
        assert index.header.digest is kinds[-1]


@pytest.mark.parametrize(
    ("kind", "program"),
    [(DigestKind.SHA256, "sha256sum"), (DigestKind.XXH128, "xxh128sum")],
)
def test_digests_are_what_other_programs_make(kind: DigestKind, program: str) -> None:
    for size in (1, 512, 64 * KIB, 1 << 20):
        block = random.Random(size).randbytes(size)
        said = subprocess.run([program], input=block, stdout=subprocess.PIPE, check=True).stdout
        found = blocks.digest(memoryview(block), kind)
        assert found == bytes.fromhex(said.split()[0].decode()).ljust(32, b"\0")


def test_blake3_is_that_of_its_specification() -> None:
    """The first test vectors that come with BLAKE3: bytes 0, 1, … 250, 0, 1, …, without key."""
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    one = "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"
    assert blocks.digest(b"", DigestKind.BLAKE3).hex() == empty
    assert blocks.digest(bytes(1), DigestKind.BLAKE3).hex() == one


@pytest.mark.parametrize("kind", ALL)
def test_each_flipped_byte_is_found(tmp_path: Path, kind: DigestKind) -> None:
    """In a plain block nothing but the digest can find it; in a raw image not even an Adler-32."""
    made = SetBuilder(tmp_path / "set", raw=True, digest=kind, block=512)
    made.disks = {"vda": bytearray(random.Random(6).randbytes(8 * 512))}
    made.full(Level.COPY)
    disk = made.points[0].disk("vda")
    for number, position, stored in list(data_records(made.path / disk.index.name)):
        for place in range(position, position + stored, 41):
            flip(made.path / disk.file, place)
            (found,) = problems(made.path)
            assert kind.label in found
            assert f"{number * 512}+512" in found
            with pytest.raises(IntegrityError, match=kind.label):
                read_disk(made.path, made.points[0].id, "vda")
            flip(made.path / disk.file, place)
    assert problems(made.path) == []


def test_a_short_digest_is_followed_by_zeroes(tmp_path: Path) -> None:
    """Other bytes there are a digest that no block has."""
    made = chain(tmp_path, [DigestKind.XXH128], [None])
    disk = made.points[0].disk("vda")
    index = made.path / disk.index.name
    number, _, _ = next(data_records(index))
    flip(index, HEADER.size + (number + 1) * RECORD.size - 1)
    assert problems(made.path)
    sha256 = hashlib.sha256(index.read_bytes()).hexdigest()
    say_of_disk(made, index=replace(disk.index, sha256=sha256))
    (found,) = problems(made.path)
    assert "XXH128" in found


def say_of_disk(made: SetBuilder, **changes: Any) -> None:
    """Change what the first point says of its only disk."""
    (disk,) = made.points[0].disks
    made.points[0] = replace(made.points[0], disks=(replace(disk, **changes),))
    made.rewrite()


@pytest.mark.parametrize(
    ("version", "flags"),
    [(1, 1 << 8), (2, 0), (2, 3 << 8), (2, 255 << 8), (2, 1 << 8 | 32), (2, 1 << 16), (3, 1 << 8)],
)
def test_headers_that_nobody_writes(tmp_path: Path, version: int, flags: int) -> None:
    path = tmp_path / "index"
    path.write_bytes(HEADER.pack(b"NBDXIDX1", version, flags, 512, 0))
    with pytest.raises(UnsupportedVersionError, match="newer program"):
        Index(path)


def test_manifest_and_index_must_agree(tmp_path: Path) -> None:
    made = chain(tmp_path, [DigestKind.BLAKE3], [1])
    say_of_disk(made, digest=DigestKind.XXH128)
    assert any("does not fit the manifest" in each for each in problems(made.path))
    with pytest.raises(IntegrityError, match="disagree"):
        read_disk(made.path, made.points[0].id, "vda")


def test_manifests_of_sha256_are_as_ever(tmp_path: Path) -> None:
    """Older programs read them; of the others they say that they are too old."""
    for kind in ALL:
        (tmp_path / kind).mkdir()
        made = chain(tmp_path / kind, [kind], [None])
        document = json.loads(manifest.pack(made.points[0]))
        is_old = kind is DigestKind.SHA256
        assert document["version"] == (1 if is_old else 3)
        assert document["disks"][0].get("digest") == (None if is_old else kind)


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("kind", DIGESTS)
def test_a_map_reads_each_kind(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: DigestKind,
    level: int | None,
) -> None:
    """By the server, whose Python is the system's: Debian 12 has no BLAKE3 for that."""
    here = Path(blake3.__file__).parents[1]
    monkeypatch.setattr(
        maps, "_environment", lambda: {"PYTHONPATH": f"{maps.PACKAGE.parent}:{here}"}
    )
    made = chain(tmp_path_factory.mktemp("s"), [kind, kind], [level, level])
    request = MapRequest(
        runtime_dir=tmp_path_factory.mktemp("r"), source=made.path, prove=level is None
    )
    with maps.serving(request, cancelled=lambda: None) as up:
        argv = ["nbdcopy", up.disks[0].uri, "-"]
        found = subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout
        assert found == made.images[-1]["vda"]
        assert up.check() == 0


@pytest.mark.parametrize(
    ("kind", "module"), [(DigestKind.BLAKE3, "blake3"), (DigestKind.XXH128, "xxhash")]
)
def test_a_library_that_is_missing(tmp_path: Path, kind: DigestKind, module: str) -> None:
    """One line with the package, exit status 10, and nothing is written or passed unproven."""
    made = chain(tmp_path, [DigestKind.SHA256, kind], [None, 1])
    out = tmp_path / "out"
    out.mkdir()
    hidden = (
        f"import sys; sys.modules[{module!r}] = None; from nbdbackupd.app import ctl; "
        "sys.exit(ctl.main(sys.argv[1:]))"
    )
    for argv in (["verify", str(made.path)], ["restore", str(made.path), "-o", str(out)]):
        done = subprocess.run(
            [sys.executable, "-c", hidden, *argv], capture_output=True, text=True, check=False
        )
        assert done.returncode == 10, done.stderr
        assert f"install python3-{module}" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("kind", ALL)
def test_what_a_guest_can_forge_saves_no_write(tmp_path: Path, kind: DigestKind) -> None:
    """A restore onto an older point's disk leaves alone what is known to be the same."""
    made = chain(tmp_path, [kind], [None])
    point = made.points[0]
    with (
        open_proven(made.path, point, point.disk("vda"), lambda: None) as now,
        open_proven(made.path, point, point.disk("vda"), lambda: None) as then,
    ):
        written = [each for each in difference([now], [then]) if isinstance(each, Part)]
    assert bool(written) is (kind is DigestKind.XXH128)
