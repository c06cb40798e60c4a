"""The manifest: what is written is read, and nothing else is believed."""

import gc
import hashlib
import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbackupd import plain
from nbdbackupd.errors import FormatError, IntegrityError, UnsupportedVersionError
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import (
    Codec,
    Consistency,
    DigestKind,
    DiskMode,
    DiskPoint,
    ImageLayer,
    Layout,
    Level,
    RestorePoint,
    SkippedDisk,
    StoredFile,
)
from tests.lib import points

texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
paths = texts.map(lambda text: f"/ä\udcff{text}")
words = texts.map(lambda text: plain.CONTROL.sub("", text))
names = words.map(lambda text: f"n{text.replace('/', '')}")
numbers = st.integers(0, (1 << 63) - 1)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)


def stored_files(number: int) -> st.SearchStrategy[StoredFile]:
    return st.builds(
        StoredFile,
        name=names.map(lambda name: f"{number}{name}"),
        role=names,
        size=numbers,
        sha256=digests,
        origin=paths,
        disk=words,
    )


def disk_points(number: int) -> st.SearchStrategy[DiskPoint]:
    return st.builds(
        DiskPoint,
        target=names.map(lambda name: f"{number}{name}"),
        mode=st.sampled_from(DiskMode),
        size=st.just(1 << 62),
        format=words,
        source=paths,
        file=names.map(lambda name: f"{number}f{name}"),
        file_size=numbers,
        adler32=st.integers(0, 0xFFFFFFFF),
        index=stored_files(number),
        data_bytes=st.integers(0, 1 << 61),
        zero_bytes=st.integers(0, 1 << 61),
        codec=st.sampled_from(Codec),
        layout=st.sampled_from([Layout.STREAM, Layout.RAW]),
        reason=texts,
        serial=texts,
        layers=st.lists(st.builds(ImageLayer, paths, words, numbers, numbers)).map(tuple),
        bitmap=texts,
        digest=st.sampled_from(DigestKind),
    )


restore_points = st.builds(
    RestorePoint,
    id=names,
    sequence=st.integers(1, 1 << 40),
    chain=names,
    level=st.sampled_from([Level.FULL, Level.INC, Level.DIFF, Level.COPY]),
    created=st.datetimes(*map(datetime.fromisoformat, ("1970-01-01", "2999-12-31"))).map(
        lambda when: f"{when.isoformat()}Z"
    ),
    domain=names,
    uuid=names,
    disks=st.tuples(disk_points(1), disk_points(2)) | st.just(()),
    consistency=st.sampled_from(Consistency),
    parent=names | st.just(""),
    parent_digest=digests | st.just(""),
    checkpoint=names | st.just(""),
    base_checkpoint=names | st.just(""),
    skipped=st.lists(st.builds(SkippedDisk, names, texts), max_size=2).map(tuple),
    files=st.tuples(stored_files(3), stored_files(4)) | st.just(()),
    warnings=st.lists(texts, max_size=2).map(tuple),
    autostart=st.booleans(),
    program=texts,
)


def sealed(document: dict[str, Any]) -> bytes:
    """The bytes of a forged document with a digest that fits."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    plain = json.dumps(rest, sort_keys=True, indent=1).encode() + b"\n"
    rest["digest"] = hashlib.sha256(plain).hexdigest()
    return json.dumps(rest, sort_keys=True, indent=1).encode() + b"\n"


def document() -> dict[str, Any]:
    files = (points.stored("checkpoints/c.xml", b"x", "checkpoint-xml"),)
    loaded = json.loads(manifest.pack(replace(points.full_point(), files=files)))
    assert isinstance(loaded, dict)
    return loaded


@given(restore_points)
def test_round_trip(point: RestorePoint) -> None:
    data = manifest.pack(point)
    read = manifest.parse(data)
    assert read == point
    assert read.digest == hashlib.sha256(data).hexdigest()
    assert manifest.pack(read) == data


def test_images_that_qemu_wrote() -> None:
    point = points.full_point()
    known: dict[str, Any] = {"layout": Layout.QCOW2, "sha256": "0" * 64}
    disks = tuple(replace(each, **known) for each in point.disks)
    made = replace(point, disks=disks)
    data = manifest.pack(made)
    assert replace(manifest.parse(data), digest="") == made
    loaded = json.loads(data)
    assert loaded["version"] == 5
    other = points.disk_point("vdb", "vdb.full.data", b"full", b"index")
    for wrong, message in (
        ({**known, "sha256": ""}, "not a SHA-256"),
        ({**known, "codec": Codec.LZ4}, "not packed"),
    ):
        with pytest.raises(FormatError, match=message):
            manifest.pack(replace(point, disks=(replace(point.disks[0], **wrong),)))
    # all disks or none
    with pytest.raises(FormatError, match="'stream' is none of qcow2"):
        manifest.pack(replace(point, disks=(*disks, other)))
    loaded["version"] = 4
    with pytest.raises(FormatError, match="'qcow2' is none of stream, raw"):
        manifest.parse(sealed(loaded))
    # no manifest of older versions has grown
    assert "sha256" not in json.loads(manifest.pack(point))["disks"][0]


def test_equal_bytes_are_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reads the manifests of its set several times; what nobody holds is bounded."""
    data = manifest.pack(points.full_point())
    monkeypatch.setattr(manifest, "MAX_KNOWN", 5 * len(data))
    monkeypatch.setattr(manifest, "_known", manifest._Known())
    first = manifest.parse(data)
    for number in range(20, 26):
        manifest.pack(replace(points.full_point(), domain=f"vm{number}"))
    assert manifest.parse(data) is first
    assert len(manifest._known._new) + len(manifest._known._old) <= 4
    del first
    gc.collect()
    assert len(manifest._known._alive) <= 4


def test_form_of_the_file() -> None:
    data = manifest.pack(points.full_point())
    assert sealed(json.loads(data)) == data
    loaded = json.loads(data)
    assert loaded["version"] == 1
    assert loaded["disks"][0]["index"]["role"] == "disk-index"
    assert data.isascii()
    assert data.endswith(b"}\n")


def test_every_flipped_bit_is_found() -> None:
    data = manifest.pack(points.full_point())
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(FormatError):
                manifest.parse(bytes(damaged))


def test_truncation_is_found() -> None:
    data = manifest.pack(points.full_point())
    for end in range(len(data)):
        with pytest.raises(IntegrityError, match="damaged"):
            manifest.parse(data[:end])


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        manifest.parse(data, "points/x.json")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b"[" * 600 + b"]" * 600,
        b"NaN",
        b"-Infinity",
        b"9" * 5000,
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b'{"version": 1, "version": 1}',
        b" " * (manifest.MAX_SIZE + 1),
    ],
    ids=range(10),
)
def test_hostile_json_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        manifest.parse(data)


def members(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all members of a document."""
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in pairs:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += members(child, (*path, key))
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=400)
@given(st.data())
def test_forged_members_never_escape_as_other_errors(data: st.DataObject) -> None:
    forged = document()
    path = data.draw(st.sampled_from(members(forged)))
    parent = forged
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(json_values)
    try:
        raw = sealed(forged)
    except ValueError:
        return
    try:
        point = manifest.parse(raw)
    except FormatError:
        return
    assert manifest.pack(point) == raw


def change(path: str, value: Any) -> bytes:
    forged = document()
    place: Any = forged
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        place = place[key]
    place[last] = value
    return sealed(forged)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("id", 5, "id: expected str, found int"),
        ("id", "a/b", "id: 'a/b' is no name"),
        ("id", "", "id: empty"),
        ("sequence", True, "sequence: expected int, found bool"),
        ("sequence", 0, "sequence: 0 is out of range"),
        ("sequence", 1 << 70, "sequence: number is out of range"),
        ("level", "auto", "level: 'auto' is none of full, inc, diff, copy"),
        ("created", "2026-01-31", "created: '2026-01-31' is no time"),
        ("created", "2026-13-31T00:00:00Z", "created: .* is no time"),
        ("created", "2026-01-31T00:00:00+02:00", "created: .* is no time"),
        ("created", "0001-01-01T00:00:00Z", "created: .* is no time"),
        ("created", "9999-12-31T23:59:59Z", "created: .* is no time"),
        ("domain", "d" * 1025, "domain: .*… is too long"),
        ("domain", "..", "domain: '..' is no name"),
        ("domain", "a\0b", "domain: holds characters"),
        ("disks.0.size", -1, r"disks\[0\]\.size: -1 is out of range"),
        ("disks.0.size", 1.0, r"disks\[0\]\.size: expected int, found float"),
        ("disks.0.adler32", 1 << 32, r"disks\[0\]\.adler32: .* out of range"),
        ("disks.0.data_bytes", 1 << 20, r"disks\[0\]\.data_bytes: more bytes"),
        ("disks.0.file", "../../etc/passwd", r"disks\[0\]\.file: .* no name of a file"),
        ("disks.0.file", "/etc/passwd", r"disks\[0\]\.file: .* no name of a file"),
        ("disks.0.file", ".lock", r"disks\[0\]\.file: .* no name of a file"),
        ("disks.0.file", "points/x", r"disks\[0\]\.file: .* no name of a file"),
        ("disks.0.file", "x" * 256, r"disks\[0\]\.file: .*… is no name of a file"),
        ("disks.0.file", "vda.full.data.index", "comes twice"),
        ("disks.0.index.sha256", "00", r"disks\[0\]\.index\.sha256: not a SHA-256"),
        ("disks.0.index", [], r"disks\[0\]\.index: expected dict, found list"),
        ("disks.0", "x", r"disks\[0\]: not a JSON object"),
        ("disks.0.new", 1, r"disks\[0\]\.new: unknown member"),
        ("files.0.name", "checkpoints/../x", r"files\[0\]\.name: .* no name of a file"),
        ("files.0.name", "checkpoints/.x", r"files\[0\]\.name: .* no name of a file"),
        ("files.0.name", "checkpoints/", r"files\[0\]\.name: .* no name of a file"),
        ("warnings", [1], r"warnings\[0\]: expected str, found int"),
        ("warnings", ["\ud800"], r"warnings\[0\]: holds characters"),
        ("parent_digest", "g" * 64, "parent_digest: not a SHA-256"),
        ("unknown", 1, "unknown: unknown member"),
    ],
)
def test_error_names_the_member(path: str, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        manifest.parse(change(path, value), "points/x.json")
    assert caught.value.fields["file"] == "points/x.json"


def test_missing_member_is_named() -> None:
    forged = document()
    del forged["disks"][0]["layers"]
    with pytest.raises(FormatError, match=r"disks\[0\]\.layers: missing"):
        manifest.parse(sealed(forged))


def test_two_disks_of_one_target_are_refused() -> None:
    disks = tuple(points.disk_point("vda", f"{name}.data", b"", b"") for name in "ab")
    with pytest.raises(FormatError, match="one target comes twice"):
        manifest.pack(points.full_point(disks=disks))


def test_newer_version_is_told_apart() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 6"):
        manifest.parse(change("version", 6))
    with pytest.raises(FormatError, match="version: missing"):
        manifest.parse(change("version", "1"))


def test_what_was_merged() -> None:
    """Only a point that others were merged into is of version 2, older programs read the rest."""
    plain, merged = points.full_point(), replace(points.full_point(), merged=("p8", "p9"))
    assert b'"version": 1' in manifest.pack(plain)
    assert b"merged" not in manifest.pack(plain)
    data = manifest.pack(merged)
    assert b'"version": 2' in data
    assert manifest.parse(data).merged == ("p8", "p9")
    with pytest.raises(FormatError, match="merged: missing"):
        manifest.parse(change("version", 2))
    with pytest.raises(FormatError, match="merged: unknown member"):
        manifest.parse(change("merged", ["p8"]))
    for wrong in ((), ("",), ("a/b",), ("a\nb",)):
        forged = manifest._document(replace(plain, merged=("x",)))
        forged["merged"] = list(wrong)
        forged["digest"] = manifest._digest(forged)
        with pytest.raises(FormatError, match="merged"):
            manifest.parse(manifest._canonical(forged))


def test_digest_of_another_document_is_refused() -> None:
    forged = document()
    forged["domain"] = "other"
    raw = json.dumps(forged, sort_keys=True, indent=1).encode() + b"\n"
    with pytest.raises(IntegrityError, match="digest does not match"):
        manifest.parse(raw)


def test_pack_refuses_what_could_not_be_read() -> None:
    with pytest.raises(FormatError, match="id: 'a/b'"):
        manifest.pack(replace(points.full_point(), id="a/b"))
    with pytest.raises(FormatError, match="read otherwise"):
        manifest.pack(replace(points.full_point(), domain="\ud83d\ude00"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_canonical_bytes_are_those_of_json(document: Any) -> None:
    """Told in docs/format.md by what Python prints; ours is quicker."""
    told = json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"
    assert manifest._canonical(document) == told
