"""Names of files: any text in, one safe component out."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nbdbackupd import plain
from nbdbackupd.errors import FormatError
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import Layout, Level, StoredFile
from nbdbackupd.repo import layout
from tests.lib import points

HOSTILE = [
    "..",
    ".",
    "-rf",
    ".hidden",
    "a b",
    " a ",
    'it\'s "quoted"',
    "100%",
    "%2E",
    "a/b/../c",
    "a\\b",
    "a\nb\0c",
    "müller",
    "日本",
    "\udcff",
    "~",
    "x" * 300,
    "ü" * 100,
    "a;$(rm)`b`",
]
anything = st.text(min_size=1, max_size=300) | st.sampled_from(HOSTILE)


def is_safe(name: str) -> bool:
    return (
        name.isascii()
        and name.isprintable()
        and not set(name) & set("/\\:*?\"'<>|$`;\0")
        and name[0] not in ".- "
        and len(name) <= 255
    )


@given(anything, anything)
def test_every_name_is_one_safe_component(target: str, ident: str) -> None:
    streams = [
        layout.stream(target, level, checkpoint=ident, point_id=ident, layout=kind)
        for level in (Level.FULL, Level.INC, Level.DIFF, Level.COPY)
        for kind in Layout
    ]
    names = [
        *streams,
        *map(layout.index, streams),
        *map(layout.checksum, streams),
        layout.manifest(999_999, ident),
        layout.run_log(ident).removeprefix("logs/"),
        layout.checkpoint_xml(ident).removeprefix("checkpoints/"),
        layout.domain_xml(ident),
        layout.domain_xml_live(ident),
        layout.guest_info(ident),
        layout.checkpoint_list(target),
        layout.image_info(target, ident),
        layout.copy("tpm-state", ident, target),
    ]
    for name in names:
        assert is_safe(name), name
    assert len(set(names)) == len(names)
    assert is_safe(layout.draft(ident).removeprefix(".draft-"))


@given(anything, anything, st.integers(20, 200))
@example("a%2Fb", "a/b", 100)
@example("x" * 300, "x" * 299, 100)
def test_two_texts_never_share_a_name(one: str, other: str, maximum: int) -> None:
    assume(one != other)
    assert layout.escape(one, maximum) != layout.escape(other, maximum)


@given(st.text(st.characters(codec="utf-8") | st.just("\udcff"), min_size=1, max_size=30))
def test_unescape(text: str) -> None:
    assume("\udcc3" not in text)
    assert layout.unescape(layout.escape(text, 1000)) == text


def test_a_name_that_we_have_not_made() -> None:
    """S-5: one directory of such a name made status and restore of all domains a traceback."""
    assert layout.unescape("a\udcff") == "a\udcff"


def test_names_of_the_format() -> None:
    assert layout.stream("vda", Level.FULL) == "vda.full.data"
    assert layout.stream("vda", Level.INC, checkpoint="nb-1.2") == "vda.inc.nb-1.2.data"
    assert layout.stream("vda", Level.DIFF, point_id="p") == "vda.diff.p.data"
    assert layout.stream("vdb", Level.COPY, point_id="p", layout=Layout.RAW) == "vdb.copy.p.raw"
    assert layout.index("vda.full.data") == "vda.full.data.index"
    assert layout.checksum("vda.full.data") == "vda.full.data.chksum"
    assert layout.manifest(7, "20260131T1") == "000007-20260131T1.json"
    assert layout.checkpoint_xml("nb-1") == "checkpoints/nb-1.xml"
    assert layout.checkpoint_list("my vm") == "my vm.cpt"
    assert layout.draft("r1") == ".draft-r1"
    assert layout.run_log("r1") == "logs/r1.log"
    with pytest.raises(FormatError, match="empty name"):
        layout.stream("vda", Level.INC)
    with pytest.raises(FormatError, match="auto"):
        layout.stream("vda", Level.AUTO)


@pytest.mark.parametrize(
    ("name", "ident", "same"),
    [
        ("000001-a.json", "a", True),
        ("1000000-a-b.json", "a-b", True),
        ("000001-a-b.json", "b", False),
        ("x-a.json", "a", False),
        ("000001-a.json~", "a", False),
    ],
)
def test_manifest_names_its_point(name: str, ident: str, same: bool) -> None:
    assert layout.names_point(name, ident) is same


def test_path_in_tree() -> None:
    def stored(name: str) -> StoredFile:
        return points.stored(name, b"", "tpm-state")

    name = layout.copy("tpm-state", "p1", "tpm2/.lock")
    assert layout.path_in_tree(stored(name), "p1") == "tpm2/.lock"
    for bad in ["", "%2Fetc", "a%2F%2E.%2Fb", "..", "a%2F%2Fb"]:
        with pytest.raises(FormatError):
            layout.path_in_tree(stored(f"tpm-state.p1.{bad}"), "p1")
    with pytest.raises(FormatError):
        layout.path_in_tree(stored("nvram.p1.x"), "p1")
    with pytest.raises(FormatError, match="was cut"):
        layout.path_in_tree(stored(layout.copy("tpm-state", "p1", "x" * 200)), "p1")


def test_manifest_accepts_what_layout_makes() -> None:
    for text in HOSTILE:
        name = layout.stream(text, Level.FULL)
        target = plain.CONTROL.sub("", text.replace("/", "").replace("..", "dots"))
        disk = points.disk_point(target if target != "." else "dot", name, b"", b"")
        assert manifest.parse(manifest.pack(points.full_point(disks=(disk,)))).disks == (disk,)
