"""The pages in docs say what the program does: each claim that can be compared is compared."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nbdbackupd import errors
from nbdbackupd.format import index, manifest, stream
from nbdbackupd.format.writer import StreamWriter
from nbdbackupd.model import chain
from nbdbackupd.model.chain import Layout, Level
from nbdbackupd.ops.removal import apply
from nbdbackupd.repo import draft, layout, removing
from nbdbackupd.repo.draft import Intent
from scripts import gen_completion
from tests.lib.pages import DESIGN, FORMAT, PAGES, TOP, section, tables

CLOSED = (chain.DiskMode, chain.Consistency, chain.Layout, chain.Codec, chain.DigestKind)

# -- the format


def members(heading: str) -> dict[str, str]:
    """Name and type of what a member table lists."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \|", section(FORMAT, heading), re.MULTILINE)
    assert found
    return dict(found)


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("### Members of the manifest", chain.RestorePoint),
        ("### Members of a disk", chain.DiskPoint),
        ("### Members of an image layer", chain.ImageLayer),
        ("### Members of a skipped disk", chain.SkippedDisk),
        ("### Members of a stored file", chain.StoredFile),
    ],
)
def test_members_of_the_manifest(heading: str, kind: type) -> None:
    told = members(heading)
    assert told.pop("version", "number") == "number"
    assert told.pop("compressed", "bool") == "bool"
    types = {each.name: str(getattr(each.type, "__name__", each.type)) for each in fields(kind)}
    assert sorted(told) == sorted(types)
    closed = {each.__name__: each for each in CLOSED}
    for name, type_ in types.items():
        said = told[name]
        if type_ in closed:
            assert said == " ".join(f"`{each}`" for each in closed[type_])
        elif type_ == "Level":
            assert said == " ".join(f"`{each}`" for each in Level if each is not Level.AUTO)
        elif type_ == "int":
            assert said.startswith("number")
        elif type_ == "bool":
            assert said == "bool"
        elif "tuple" in type_:
            assert said.startswith("list")
        else:
            kinds = "object" if type_ == "StoredFile" else "text|name|file|digest|time"
            assert re.match(rf"({kinds})\b", said), name


def test_keys_of_meta() -> None:
    meta = example_meta().to_json()
    assert list(members("### Keys of `meta`")) == list(meta)


def test_byte_tables_are_the_structs() -> None:
    header, *_ = found = [
        [(int(row[0]), int(row[1])) for row in table] for table in tables(FORMAT, "position")
    ]
    assert header == [(0, 4), (4, 1), (5, 16), (21, 1), (22, 16), (38, 2)]
    assert sum(size for _, size in header) == stream.HEADER_LENGTH
    assert found[1:] == [struct_fields(index.HEADER.format), struct_fields(index.RECORD.format)]


def struct_fields(code: str) -> list[tuple[int, int]]:
    """Position and size of each field of a struct's format."""
    sizes = {"Q": 8, "I": 4}
    found, position = [], 0
    for count, letter in re.findall(r"(\d*)([a-zA-Z])", code):
        size = int(count) if letter == "s" else sizes[letter]
        found.append((position, size))
        position += size
    return found


def test_limits_and_numbers() -> None:
    limits = {row[0]: row[1].removesuffix(" bytes") for row in tables(FORMAT, "what")[-1]}
    assert limits == {
        "manifest": str(manifest.MAX_SIZE),
        "`intent.json` of a draft": str(draft.MAX_INTENT),
        "`intent.json` of a removal": str(removing.MAX_INTENT),
        "ids in `merged`": f"the newest {apply.MAX_MERGED}",
        "payload of `meta`": str(stream.MAX_META),
        "list of sizes of a compressed stream": str(stream.MAX_SIZES),
        "data record": str(index.MAX_BLOCK),
        "stored length of a compressed block": str(index.MAX_BLOCK + (64 << 10)),
        "disk": str(manifest.MAX_NUMBER),
    }
    versions = {row[0]: row[1] for row in tables(FORMAT, "what")[0]}
    assert versions == {
        "stream": str(stream.VERSION),
        "index": f"{index.VERSION}, {index.NEWER_VERSION}",
        "manifest": ", ".join(map(str, range(manifest.VERSION, manifest.IMAGE_VERSION + 1))),
    }
    maxima = {row[0]: int(row[1]) for row in tables(FORMAT, "name")[1]}
    assert list(maxima.values()) == [
        layout.MAX_TARGET, layout.MAX_IDENT, layout.MAX_BASE, layout.MAX_DOMAIN,
    ]  # fmt: skip


def test_file_names_are_those_of_the_layout() -> None:
    listed = {name for row in tables(FORMAT, "name")[0] for name in re.findall("`(.*?)`", row[0])}
    streams = {
        layout.stream("T", Level.FULL),
        layout.stream("T", Level.INC, checkpoint="C"),
        layout.stream("T", Level.DIFF, point_id="P"),
        layout.stream("T", Level.COPY, point_id="P"),
    }
    raw = layout.stream("T", Level.COPY, point_id="P", layout=Layout.RAW)
    images = {
        layout.stream("T", level, checkpoint="C", point_id="P", layout=Layout.QCOW2)
        for level in (Level.FULL, Level.INC, Level.DIFF, Level.COPY)
    }
    copied = {layout.copy(role, "P", "N") for role in ("loader", "nvram", "kernel", "initrd")}
    assert listed == {
        *streams,
        raw,
        *images,
        f"….qcow2{layout.INDEX_SUFFIX}",
        f"….data{layout.INDEX_SUFFIX}",
        f"….raw{layout.INDEX_SUFFIX}",
        f"….data{layout.CHECKSUM_SUFFIX}",
        f"{layout.POINTS}/{layout.manifest(1, 'P').replace('000001', 'S')}",
        layout.checkpoint_xml("C"),
        layout.domain_xml("P"),
        layout.domain_xml_live("P"),
        layout.image_info("T", "P"),
        layout.guest_info("P"),
        layout.machine("P"),
        layout.protection("P"),
        *copied,
        layout.copy("tpm-state", "P", "N"),
        layout.copy("host", "P", "N"),
        layout.checkpoint_list("D"),
        f"{layout.SPARE}/",
        layout.run_log("R"),
        layout.boot_test("P"),
        layout.boot_test("P", "png"),
        layout.verified("P"),
        layout.LOCK,
        layout.READING,
        layout.GENERATION,
        f"{layout.POINTS}.G/{layout.manifest(1, 'P').replace('000001', 'S')}",
        f"{layout.REMOVAL_PREFIX}G/",
        f"{layout.draft('R')}/",
        ".nbdbackup-tmp-…",
    }


def test_roles_are_those_of_the_model() -> None:
    beside = {
        "stream",
        "raw image",
        "qcow2 image",
        "derived",
        "manifest",
        "log",
        "boot test",
        "lock",
        "draft",
    }
    beside |= {"temporary", "protection", "verification", "generation"}
    listed = {row[1] for row in tables(FORMAT, "name")[0]} - beside
    told = re.search(r"``role`` is one of: (.*?)\.", chain.StoredFile.__doc__ or "", re.DOTALL)
    assert told is not None
    assert listed == set(re.split(r",\s+", told[1]))


def test_intent_has_the_members_that_are_told() -> None:
    text = section(FORMAT, "## 7. Draft and publish")
    told = re.search(r"`intent.json` \(JSON object of texts: (.*?)\)", text, re.DOTALL)
    assert told is not None
    assert set(re.findall("`(.*?)`", told[1])) == {each.name for each in fields(Intent)}
    text = section(FORMAT, "## 8. How points leave a set")
    told = re.search(r"next generation \(JSON object of lists of texts: (.*?)\)", text, re.DOTALL)
    assert told is not None
    names = {each.name for each in fields(removing.Intent)}
    assert names == set(re.findall("`([a-z]+)`", told[1]))


# -- the example


def example_meta() -> stream.StreamMeta:
    """As ``ops.recording`` makes it."""
    return stream.StreamMeta(
        virtual_size=16384,
        data_size=0,
        date="2026-01-31T23:59:59+00:00",
        disk_name="vda",
        disk_format="qcow2",
        checkpoint="nbdbackup.1a2b3c4d.20260131T235959-1a2b3c4d",
        compression=None,
        parent_checkpoint="",
        incremental=False,
        extra=(("point", "20260131T235959-1a2b3c4d"), ("program", "nbdbackupd 0.1.0")),
    )


def dump(data: bytes) -> str:
    """As ``hexdump -C`` prints it."""
    lines: list[str] = []
    for position in range(0, len(data), 16):
        row = data[position : position + 16]
        if position and row == data[position - 16 : position]:
            lines += ["*"] if lines[-1] != "*" else []
            continue
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{position:08x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|")
    return "\n".join([*lines, f"{len(data):08x}"])


def test_example_is_what_the_writer_writes(tmp_path: Path) -> None:
    paths = tmp_path / "stream", tmp_path / "index"
    writer = StreamWriter(*paths, meta=example_meta())
    blocks = [
        writer.prepare(0, memoryview(b"A" * 512)),
        writer.zero(512, 15360),
        writer.prepare(15872, memoryview(b"B" * 512)),
    ]
    for block in blocks:
        writer.place(block)
        writer.write(block)
    writer.finish()
    writer.close()
    for path in paths:
        told = re.search(rf"```hexdump {path.name}\n(.*?)\n```", FORMAT.read_text(), re.DOTALL)
        assert told is not None
        assert told[1] == dump(path.read_bytes())


def test_example_of_a_trailer_is_well_formed() -> None:
    told = re.search(r"```text\n(stop .*?)```", FORMAT.read_text(), re.DOTALL)
    assert told is not None
    raw = told[1].replace("␍␊\n", "\r\n").encode()
    stop, rest = raw[: stream.HEADER_LENGTH], raw[stream.HEADER_LENGTH :]
    sizes, comp = rest[: -stream.HEADER_LENGTH - 2], rest[-stream.HEADER_LENGTH :]
    assert stream.parse_header(stop, 0)[0] == stream.STOP
    assert stream.parse_header(comp, 0) == (stream.COMP, 0, len(sizes))


# -- pages


def anchors(page: Path) -> set[str]:
    """The fragments that headings of a page can be reached by."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_and_paths_resolve(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target
    for path in re.findall(r"`((?:docs|tests|scripts|packaging|nbdbackupd)/[\w./-]+)", text):
        assert (TOP / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_lines_are_short_and_name_no_machine(page: Path) -> None:
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 100, number
        assert not line.endswith(" "), number


def test_commands_of_the_readme_exist() -> None:
    text = (TOP / "README.md").read_text()
    _, verbs = gen_completion.read_parser()
    used = re.findall(r"nbdbackupctl ([a-z]+)((?: --?[a-z]+)*)", text)
    assert used
    for verb, _ in used:
        assert verb in verbs
    accepted = {
        name
        for command in (*verbs.values(), gen_completion.read_parser()[0])
        for option in command.options
        for name in option.names
    }
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(
        r"^(?:nbdbackupctl .*)$", text, re.MULTILINE
    )
    for piece in code:
        for name in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", piece):
            assert name in accepted, piece
    for program in re.findall(r"scripts/[a-z-]+", text):
        assert (TOP / program).is_file(), program
        assert (TOP / program).stat().st_mode & 0o111, program


def test_every_test_that_the_design_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DESIGN.read_text())
    assert len(named) >= 9
    for path, name in named:
        assert re.search(rf"^def {name}\(", (TOP / path).read_text(), re.MULTILINE), (path, name)


def test_exceptions_of_the_design_are_ours() -> None:
    named = re.findall(r"`(\w+Error|Interrupted)`", DESIGN.read_text())
    assert len(named) > 20
    for name in named:
        assert hasattr(errors, name), name


def test_the_glossary_names_classes() -> None:
    """Each class that it names is one of the product, so that a term is found in the code."""
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \|(.*)\|$", section(DESIGN, "## Terms"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert len(named) > 20
    code = "\n".join(path.read_text() for path in (TOP / "nbdbackupd").rglob("*.py"))
    assert named <= set(re.findall(r"^class (\w+)", code, re.MULTILINE))
