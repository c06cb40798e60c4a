"""Whatever bytes a set holds, reading it ends with a value or one of our errors, soon and small.

Short and the same each time in CI; ``NBDBACKUP_FUZZ_SECONDS`` lets each test search so long.
"""

import io
import json
import math
import os
import resource
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from nbdbackupd import documents
from nbdbackupd.errors import FormatError, NbdbackupError
from nbdbackupd.format import blocks, index, manifest, stream
from nbdbackupd.format.index import HEADER, RECORD, Index
from nbdbackupd.format.stream import StreamReader
from nbdbackupd.model.chain import Codec, Compression
from nbdbackupd.ops.sets import import_files, opened, sequence
from nbdbackupd.ops.sets.layers import MAX_STORED, IndexedLayer, Layer, ScannedLayer
from nbdbackupd.repo.draft import Intent
from nbdbackupd.repo.importing import Stage
from nbdbackupd.repo.virtnbdbackup import peer
from tests.lib.points import full_point

T = TypeVar("T")
SECONDS = float(os.environ.get("NBDBACKUP_FUZZ_SECONDS", "0"))
EXAMPLES = 150
SLOW = 10.0
"""Seconds that one input may take; far more than any needs, for a machine that is busy."""
GROWTH = 400 << 10
"""KiB by which the process may grow over a test: one frame of 64 MiB is held in several forms."""


def fuzz(values: SearchStrategy[T], check: Callable[[T], None]) -> None:
    """Call ``check`` with many values; it may raise nothing."""

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(values)
    def one(value: T) -> None:
        begun = time.monotonic()
        check(value)
        assert time.monotonic() - begun < SLOW

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if SECONDS:
        end, number = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            seed(number)(one)()
            number += 1
    else:
        one()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    yield directory
    shutil.rmtree(directory)


NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 511, 512, 4096, 65536, 1 << 20, (1 << 20) + 1, 1 << 26, (1 << 26) + 1,
         (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30]
    ),
    st.integers(0, 1 << 18),
)  # fmt: skip
NAMES = st.sampled_from(
    ["vda", "vdb", "", "..", "a/b", "virtnbdbackup.0", "virtnbdbackup.1", "virtnbdbackup.2", "\0",
     "\udc80", "x" * 300, "copy"]
)  # fmt: skip
VALUES: SearchStrategy[Any] = st.recursive(
    st.one_of(
        NUMBERS, NAMES, st.none(), st.booleans(), st.sampled_from([math.nan, math.inf, -0.5, 1e300])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
DEEP = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"[" * 9, b'{"virtualSize":' * 9000])


def edits(data: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """The bytes themselves, mostly with some of them changed, cut out or put in."""

    def edit(drawn: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
        found = bytearray(drawn[0])
        for at, length, new in drawn[1]:
            begin = at % (len(found) + 1)
            found[begin : begin + length] = new
        return bytes(found)

    change = st.tuples(st.integers(0, 1 << 16), st.integers(0, 60), st.binary(max_size=60))
    return st.tuples(data, st.lists(change, max_size=3)).map(edit)


META: dict[str, Any] = {
    "virtualSize": 1 << 20,
    "dataSize": 4096,
    "date": "2026-01-31T23:59:59.1",
    "diskName": "vda",
    "diskFormat": "qcow2",
    "checkpointName": "virtnbdbackup.0",
    "compressed": False,
    "compressionMethod": "lz4",
    "parentCheckpoint": "",
    "incremental": False,
    "streamVersion": 2,
}


def meta_frame(changes: dict[str, Any]) -> bytes:
    payload = json.dumps({**META, **changes}).encode()
    return stream.pack_header(stream.META, 0, len(payload)) + payload + b"\r\n"


METAS = st.dictionaries(st.sampled_from(sorted(META)), VALUES, max_size=2).map(meta_frame)
ODD_METAS = st.builds(
    lambda payload: stream.pack_header(stream.META, 0, len(payload)) + payload + b"\r\n",
    st.one_of(DEEP, st.binary(max_size=80)),
)
PACKED = [
    blocks.compress(bytes(size), Compression(codec, 1))
    for codec in (Codec.LZ4, Codec.ZSTD)
    for size in (512, 4096, 1 << 20, 3 << 20, 65 << 20)
]
PAYLOADS = st.one_of(st.sampled_from(PACKED), st.binary(max_size=200), st.just(bytes(4096)))
WORDS = NUMBERS.map(lambda number: number % (1 << 64))


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A stream of frames that fit together more or less."""
    compressed = draw(st.booleans())
    method = draw(st.sampled_from(["lz4", "zstd"]))
    changes: dict[str, Any] = {"compressed": 1, "compressionMethod": method} if compressed else {}
    size = draw(st.sampled_from([1 << 20, 4 << 20, 70 << 20, (1 << 63) - 1]))
    changes["virtualSize"] = size
    found = [draw(st.one_of(st.just(meta_frame(changes)), METAS, ODD_METAS))]
    sizes: list[Any] = []
    start = 0
    for _ in range(draw(st.integers(0, 4))):
        start += draw(st.sampled_from([0, 0, 4096, 1 << 20]))
        kind = draw(st.sampled_from([stream.DATA, stream.DATA, stream.ZERO, stream.STOP]))
        payload = draw(PAYLOADS)
        natural = len(payload)
        if compressed and payload in PACKED[:5]:
            natural = blocks.content_size(payload[:15])
        length = draw(st.one_of(st.just(natural), st.just(natural), WORDS))
        found.append(stream.pack_header(kind, start % (1 << 64), length % (1 << 64)))
        if kind == stream.DATA:
            parts = draw(st.integers(1, 3)) if compressed else 1
            found += [payload] * parts + [b"\r\n"]
            total = len(payload) * parts
            sizes.append(total if parts == 1 else {str(total): [len(payload)] * parts})
        start = min(start + length, 1 << 63)
    found.append(stream.pack_header(stream.STOP, 0, 0))
    if compressed:
        told = draw(st.one_of(st.just(sizes), VALUES))
        text = json.dumps(told).encode()
        if draw(st.integers(0, 9)) == 0:
            text = draw(DEEP)
        found += [text, b"\r\n", stream.pack_header(stream.COMP, 0, len(text))]
    return b"".join(found)


def read_all(layer: Layer) -> None:
    view = memoryview(bytearray(index.MAX_BLOCK))
    scratch = memoryview(bytearray(MAX_STORED))
    end = 0
    for record in layer.records():
        assert record.offset >= end
        assert record.length > 0
        end = record.end
        assert end <= layer.size
        if record.kind == index.Kind.DATA:
            assert record.length <= index.MAX_BLOCK
            layer.read(record, view[: record.length], scratch)


def test_streams(place: Path) -> None:
    path = place / "vda.full.data"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with StreamReader(path) as reader:
                meta = reader.meta
            with ScannedLayer(path, meta) as layer:
                read_all(layer)
        except NbdbackupError:
            pass

    fuzz(edits(streams()), check)


def test_lists_of_sizes(place: Path) -> None:
    path = place / "vda.full.data"
    numbers = st.lists(st.one_of(st.integers(0, 1 << 40), VALUES), max_size=8)
    texts = st.one_of(numbers.map(lambda each: json.dumps(each).encode()), DEEP)

    def check(text: bytes) -> None:
        begin = meta_frame({"compressed": 1}) + stream.pack_header(stream.STOP, 0, 0)
        path.write_bytes(begin + text + b"\r\n" + stream.pack_header(stream.COMP, 0, len(text)))
        try:
            with StreamReader(path) as reader:
                assert reader.sizes is not None
                list(reader.sizes)
        except FormatError:
            pass

    fuzz(edits(texts), check)


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    count = draw(st.integers(0, 5))
    said = draw(st.one_of(st.just(count), WORDS))
    flags = draw(st.integers(0, 9))
    head = HEADER.pack(index.MAGIC, draw(st.sampled_from([1, 1, 1, 2])), flags,
                       draw(WORDS), said)  # fmt: skip
    records, offset = [], 0
    for _ in range(count):
        length = draw(st.one_of(st.just(4096), WORDS))
        kind = draw(st.sampled_from([0, 0, 1, 2]))
        stored = draw(WORDS) % (1 << 32)
        records.append(
            RECORD.pack(offset % (1 << 64), length, draw(WORDS), stored, kind, bytes(32))
        )
        offset += length
    return head + b"".join(records)


def test_indexes(place: Path) -> None:
    path, data = place / "vda.full.data.index", place / "vda.full.data"
    data.write_bytes(bytes(8192))

    def check(found: bytes) -> None:
        path.write_bytes(found)
        try:
            with Index(path) as opened_index:
                list(opened_index)
            with IndexedLayer(data, path, whole=True) as layer:
                read_all(layer)
        except NbdbackupError:
            pass

    fuzz(edits(indexes()), check)


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """A manifest with some members replaced, and a digest that fits it."""
    document = json.loads(manifest.pack(full_point()))
    del document["digest"]
    for _ in range(draw(st.integers(0, 3))):
        at = document
        while True:
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.booleans()):
                at = at[key]
                continue
            at[key] = draw(VALUES)
            break
    document["digest"] = manifest._digest(document)
    return manifest._canonical(document)


def test_manifests() -> None:
    def check(data: bytes) -> None:
        with suppress(FormatError):
            manifest.parse(data)

    fuzz(st.one_of(manifests(), edits(manifests()), DEEP), check)


def test_small_files() -> None:
    xml = b"<domain><name>vm1</name><uuid>u</uuid><devices><disk type='file'><target dev='vda'/>"
    xml += b"<backingStore><source file='/x'/><backingStore/></backingStore></disk></devices>"
    texts = st.one_of(
        VALUES.map(lambda each: json.dumps(each).encode()),
        edits(st.just(xml + b"</domain>")),
        st.just(b"<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>"),
        st.just(b"<a>" * 100_000),
        DEEP,
        st.binary(max_size=60),
    )

    def check(data: bytes) -> None:
        parsers: tuple[Callable[[bytes], object], ...] = (
            peer.parse_checkpoints, peer.parse_config, peer.parse_image_size, Intent.parse,
        )  # fmt: skip
        for parse in parsers:
            with suppress(FormatError):
                parse(data)

    fuzz(texts, check)


FILES = st.sampled_from(
    ["vda.full.data", "vda.copy.data", "vdb.full.data", "vdb.copy.data",
     "vda.inc.virtnbdbackup.1.data", "vda.inc.virtnbdbackup.2.data", "vda.diff.17.data",
     "vda.inc.virtnbdbackup.0.data", "vda.full.data.partial", "vm1.cpt", "vm2.cpt",
     "vmconfig.copy.xml", "vmconfig.19.xml", "vdb.diff.18.data",
     f"vmconfig.{'9' * 30}.xml", f"vda.diff.{'1' * 40}.data",
     "vmconfig.virtnbdbackup.0.xml", "vda.virtnbdbackup.0.qcow.json",
     "vda.full.data.chksum", ".full.data", "vda.inc..data"]
)  # fmt: skip
LINKS = st.sampled_from(["", *(f"virtnbdbackup.{number}" for number in range(3))])


@st.composite
def peer_streams(draw: st.DrawFn) -> bytes:
    """Small sound streams with links of all kinds."""
    changes = {
        "diskName": draw(st.sampled_from(["vda", "vda", "vdb"])),
        "checkpointName": draw(LINKS),
        "parentCheckpoint": draw(LINKS),
        "incremental": draw(st.booleans()),
        "date": draw(st.sampled_from([META["date"], "", "0001-01-01T00:00:00", "9" * 40])),
    }
    payload = stream.pack_header(stream.DATA, 0, 512) + bytes(512) + b"\r\n"
    return meta_frame(changes) + payload + stream.pack_header(stream.STOP, 0, 0)


MARKUP = st.one_of(
    st.sampled_from(
        ["<a/>", "<b>", "</b>", "<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "&#10;", "&lt;",
         "<![CDATA[", "]]>", "<!--", "-->", "<?a b?>", "<p:a xmlns:p='u'/>", "<a b='c' b='d'/>",
         "\x1b", "\ud800"]
    ),
    st.text(max_size=5),
)  # fmt: skip
CONTENTS = st.one_of(
    peer_streams(), peer_streams(), edits(streams()), st.just(b"123"), st.just(b'["a", "b"]'),
    st.just(b"<domain><name>vm1</name></domain>"), st.just(bytes(512)),
    VALUES.map(lambda each: json.dumps(each).encode()),
)  # fmt: skip


def test_directories(place: Path) -> None:
    count = 0

    def check(files: dict[str, bytes]) -> None:
        nonlocal count
        count += 1
        made = place / str(count)
        made.mkdir()
        for name, data in files.items():
            (made / name).write_bytes(data)
        try:
            open_all(made)
        finally:
            shutil.rmtree(made)

    fuzz(st.dictionaries(FILES, CONTENTS, max_size=7), check)


@st.composite
def markup(draw: st.DrawFn) -> str:
    """XML of elements, prefixes, entities and text, well formed or nearly so."""
    parts = draw(st.lists(MARKUP, max_size=40))
    deep = draw(st.sampled_from([0, 1, 3, 400]))
    return "<domain>" + "<a>" * deep + "".join(parts) + "</a>" * deep + "</domain>"


def test_xml() -> None:
    """Whatever a definition of a set holds, reading it ends in an element or one of our errors."""

    def check(text: str) -> None:
        with suppress(NbdbackupError):
            root = documents.parse_xml(text, "domain", FormatError, prefixes=True)
            assert root.tag == "domain"
        with suppress(NbdbackupError):
            documents.parse_xml(text[1:], "", FormatError)

    fuzz(markup(), check)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """What the peer writes to standard output, or nearly so."""
    made = io.BytesIO()
    kind = draw(st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED]))
    names = st.one_of(FILES, st.sampled_from(["../a", "/a", "checkpoints/a.xml", "..", "a/"]))
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, data in draw(st.dictionaries(names, CONTENTS, max_size=4)).items():
            archive.writestr(name, data)
    return made.getvalue()


def test_archives(place: Path) -> None:
    path = place / "a.zip"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(NbdbackupError):
            open_all(path)
        stage = Stage(place / "stage")
        stage.path.mkdir(parents=True)
        try:
            with suppress(NbdbackupError):
                import_files.unpack(path, stage, lambda: None)
        finally:
            shutil.rmtree(stage.root)
        assert sorted(place.iterdir()) == [path]

    fuzz(edits(archives()), check)


def open_all(directory: Path) -> None:
    with suppress(NbdbackupError):
        opened.open_set(directory)
    given_set = opened.open_set(directory, sound=True)
    for point in given_set.known.points:
        for disk in point.disks:
            try:
                with ExitStack() as stack:
                    for layer in given_set.layers(
                        point, disk.target, stack, lambda: None, deep=True
                    ):
                        read_all(layer)
            except NbdbackupError:
                pass
    names = tuple(sorted(directory.glob("*.data")))
    if names:
        with ExitStack() as stack, suppress(NbdbackupError):
            sequence.load(names, stack, lambda: None)
