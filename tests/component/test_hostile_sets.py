"""Sets and archives that somebody made to harm: each ends with a line, soon, small, and in place.

The digests are right, as those of a stranger's own set are. What may not happen: a traceback, a
path outside of the output directory, a program that waits for ever or eats the memory.
"""

import json
import random
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import DiskMode, Level, SkippedDisk
from nbdbackupd.repo import layout
from nbdbackupd.repo.virtnbdbackup import peer, storage
from tests.lib import sets
from tests.lib.ctl import ROOT, Ctl
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
MEMORY = 600 * MIB
"""Of address space beyond what the program needs anyway: some 150 MiB."""

SECONDS = 100
ENDS = {2, 3, 10, 20, 30, 40, 50, 75}


class Victim:
    """Runs verbs on a set within bounds, and looks at what they leave."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "set"
        self.out = directory / "out"
        self.ctl = Ctl("test:///default", directory / "ctl")

    def run(self, verb: str, *words: str | Path, codes: set[int] = ENDS) -> str:
        """One verb; its standard error, which is a few lines and no traceback."""
        argv = [
            "prlimit", f"--data={MEMORY}", "--", *self.ctl.argv(verb, *words),
        ]  # fmt: skip
        done = subprocess.run(
            argv, cwd=ROOT, env=self.ctl.environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        text = done.stderr.decode(errors="surrogateescape")
        assert done.returncode in codes, (verb, done.returncode, text)
        assert "Traceback" not in text, text
        assert text.count("\n") <= 12, text
        assert max(map(len, text.split("\n"))) < 2000
        for stream in (text, done.stdout.decode(errors="surrogateescape")):
            assert harmless(stream), (verb, stream)
        return text


def harmless(text: str) -> bool:
    """Whether a terminal shows the text and does nothing else."""
    return all(char == "\n" or char.isprintable() for char in text)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A place for a set; nothing beside it may change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_text("kept")
    found = Victim(tmp_path)
    yield found
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["kept"]
    assert (tmp_path / "outside/kept").read_text() == "kept"
    known = {"outside", "set", "out", "ctl", "archive.zip"}
    assert {path.name for path in tmp_path.iterdir()} <= known


def make_set(path: Path) -> SetBuilder:
    """A full and an increment of one disk."""
    rng = random.Random(5)
    builder = SetBuilder(path)
    builder.disks = {"vda": sets.random_disk(rng, MIB)}
    builder.full()
    builder.inc({"vda": sets.random_changes(rng, MIB, 5)})
    return builder


@pytest.mark.parametrize("name", layout.DIRECTORIES)
def test_directories_that_are_links(victim: Victim, name: str) -> None:
    """S-7: root would read and write wherever the link leads."""
    make_set(victim.path)
    away = victim.directory / "ctl"
    away.mkdir()
    if (victim.path / name).is_dir():
        (victim.path / name).rename(away / name)
    else:
        (away / name).mkdir()
    (victim.path / name).symlink_to(away / name)
    before = sorted(map(str, away.rglob("*")))
    for verb, *words in (
        ("list", victim.path), ("show", victim.path), ("verify", victim.path),
        ("restore", victim.path, "-o", victim.out), ("map", victim.path, "--detach"),
        ("import", victim.path)
    ):  # fmt: skip
        text = victim.run(verb, *words, codes={50})
        assert f"{victim.path / name} is a symbolic link" in text
        assert text.count("\n") == 1
    assert [each for each in sorted(map(str, away.rglob("*"))) if each not in before] == []
    assert not victim.out.exists()


def test_a_log_that_is_a_link_or_has_no_end(victim: Victim) -> None:
    """S-7, S-6: ``log --set`` reads what lies in the set, in lines of bounded length."""
    make_set(victim.path)
    (victim.path / "logs").mkdir()
    (victim.path / "logs/a.log").symlink_to(victim.directory / "outside/kept")
    assert "a.log" in victim.run("log", "-o", victim.path, codes={50})
    (victim.path / "logs/a.log").unlink()
    with (victim.path / "logs/a.log").open("wb") as file:
        file.truncate(256 << 20)
    victim.run("log", "-o", victim.path, codes={0})


def test_an_output_whose_config_is_a_link(victim: Victim) -> None:
    """S-7: firmware would be written wherever the link leads."""
    make_set(victim.path)
    victim.out.mkdir()
    (victim.out / "config").symlink_to(victim.directory / "outside")
    text = victim.run("restore", victim.path, "-o", victim.out, codes={50})
    assert "config is a symbolic link" in text


def make_huge(path: Path, size: int, format_: str) -> SetBuilder:
    """One disk of ``size`` bytes that is zero but for a block at its end."""

    class Disk(bytearray):
        def __len__(self) -> int:
            return size

        def __bytes__(self) -> bytes:
            return b""

    builder = SetBuilder(path, format=format_)
    builder.disks = {"vda": Disk()}
    last = 64 * KIB
    changes = [sets.Change(0, size - last), sets.Change(size - last, b"x" * last)]
    builder._point(Level.FULL, {"vda": changes}, DiskMode.FULL)
    return builder


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [1 << 40, 1 << 50, (1 << 63) - 512])
def test_a_disk_of_any_size(victim: Victim, size: int, format_: str) -> None:
    """S-6: our memory does not grow with a disk's size; what no image can be is refused."""
    make_huge(victim.path, size, format_)
    victim.run("list", victim.path, codes={0})
    victim.run("verify", victim.path, codes={0})
    # 3: nobody says how the original qcow2 was made
    done = {0} if format_ == "raw" else {3}
    text = victim.run(
        "restore", victim.path, "-o", victim.out, codes=done if size == 1 << 40 else done | {30, 50}
    )
    assert text.count("\n") <= 2
    for image in victim.out.glob(f"vda.{format_}"):
        assert image.stat().st_blocks * 512 < 64 * MIB
    assert size > 1 << 40 or list(victim.out.glob(f"vda.{format_}"))


PEER_FILES: dict[str, bytes] = {
    "vm1.cpt": b"[]",
    "vmconfig.copy.xml": b"<domain><name>vm1</name></domain>",
}


def peer_stream(size: int = 64 * KIB) -> bytes:
    """A whole disk as the peer writes it."""
    from nbdbackupd.format import stream

    meta = stream.StreamMeta(
        virtual_size=size, data_size=size, date="2026-01-31T12:00:00", disk_name="vda",
        disk_format="raw", checkpoint="", compression=None, parent_checkpoint="", incremental=False,
    )  # fmt: skip
    text = json.dumps(meta.to_json()).encode()
    frames = stream.pack_header(stream.META, 0, len(text)) + text + b"\r\n"
    frames += stream.pack_header(stream.DATA, 0, size) + b"x" * size + b"\r\n"
    return frames + stream.pack_header(stream.STOP, 0, 0)


def archive(path: Path, *more: tuple[str | zipfile.ZipInfo, bytes], kind: int = 0) -> None:
    """What the peer writes to standard output, and members beside that."""
    with zipfile.ZipFile(path, "w", kind) as made:
        for name, data in PEER_FILES.items():
            made.writestr(name, data)
        for member, data in more:
            made.writestr(member, data)
        made.writestr("vda.copy.data", peer_stream())


def linked(path: Path) -> None:
    entry = zipfile.ZipInfo("vda.full.data")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive(path, (entry, b"/etc/passwd"))


def nameless(path: Path) -> None:
    archive(path, ("name", b"x"))
    path.write_bytes(path.read_bytes().replace(b"name", b"\0ame"))


def twice(path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive(path, ("vda.copy.data", peer_stream()))


def bomb(path: Path) -> None:
    archive(path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as made,
        made.open("vdb.copy.data", "w", force_zip64=True) as member,
    ):
        for _ in range(64):
            member.write(bytes(MIB))
    data = bytearray(path.read_bytes())
    # the directory tells 1 PiB of it
    place = data.rfind(b"vdb.copy.data") - 46
    struct.pack_into("<L", data, place + 24, 0xFFFFFFFF)
    path.write_bytes(data)


def wide(path: Path) -> None:
    entry = struct.pack("<4s42x", b"PK\1\2")
    count = 1_000_000
    size = count * len(entry)
    end = struct.pack("<4s4x2H2LH", b"PK\5\6", 65535, 65535, size, 0, 0)
    path.write_bytes(entry * count + end)


def torn(path: Path) -> None:
    archive(path)
    path.write_bytes(path.read_bytes()[:-30])


def overlapping(path: Path) -> None:
    archive(path, ("vdb.copy.data", peer_stream()))
    data = bytearray(path.read_bytes())
    # the directory has it where the first one lies
    struct.pack_into("<L", data, data.rfind(b"vdb.copy.data") - 4, 0)
    path.write_bytes(data)


ARCHIVES: dict[str, tuple[Callable[[Path], None], set[int]]] = {
    "traversal": (lambda path: archive(path, ("../outside/a", b"x"), ("a/../../b", b"x")), {50}),
    "absolute": (lambda path: archive(path, ("/etc/nbdbackup-was-here", b"x")), {50}),
    "link": (linked, {40, 50}),
    "no name": (nameless, {40}),
    "twice": (twice, {40}),
    "control characters": (lambda path: archive(path, ("a\x1b[2Jb", b"x")), {40}),
    "line": (lambda path: archive(path, ("a\nb", b"x")), {40}),
    "bidi": (lambda path: archive(path, ("a\u202eb", b"x")), {40}),
    "bomb": (bomb, {40, 50}),
    "a million members": (wide, {40}),
    "one place": (overlapping, {40}),
    "a name to try patterns on": (
        lambda path: archive(path, ("a" + ".inc." * 12_000 + "b", b"x")),
        {40},
    ),
    "cut": (torn, {2, 40, 50}),
    "deep": (lambda path: archive(path, ("vmconfig.19.xml", b"<a>" * 3000)), {0, 3, 40}),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(victim: Victim, kind: str) -> None:
    """S-6: traversal, links, bombs, members twice, absurd sizes and names."""
    make, codes = ARCHIVES[kind]
    path = victim.directory / "archive.zip"
    make(path)
    victim.run("import", path, "-o", victim.path, codes=codes)
    assert not Path("/etc/nbdbackup-was-here").exists()
    if victim.path.exists() and codes == {40}:
        assert [each for each in victim.path.iterdir() if each.name != ".lock"] == []
    for verb, *words in (
        ("list", path), ("show", path), ("verify", path), ("restore", path, "-o", victim.out),
    ):  # fmt: skip
        victim.run(verb, *words, codes=ENDS | {0})
    for each in victim.out.rglob("*") if victim.out.exists() else ():
        assert not each.is_symlink()


def test_small_files_of_an_archive_are_bounded_together(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-6: a thousand that cost a second each, packed to the size of one."""
    monkeypatch.setattr(storage, "MAX_SMALL", 2 * MIB)
    path = victim.directory / "archive.zip"
    names = [f"vmconfig.{number}.xml" for number in range(3)]
    archive(path, *((name, bytes(MIB)) for name in names), kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(RepositoryError, match="small files unpack to more than 2 MiB"):
        peer.read_files(storage.Archive(path))


EVIL = "a\x1b[2J\nnbdbackupctl: all is well\r\u202ec\u200b\u2028"


def test_texts_that_are_no_names(victim: Victim) -> None:
    """S-5: free texts of a manifest, names of files and of its directory, an XML's."""
    builder = make_set(victim.path)
    for number, point in enumerate(builder.points):
        disks = tuple(
            replace(disk, source=f"/images/{EVIL}", reason=EVIL, serial=EVIL)
            for disk in point.disks
        )
        builder.points[number] = replace(
            point, disks=disks, warnings=(EVIL,), program=EVIL,
            skipped=(SkippedDisk(target="vdz", reason=EVIL),),
            files=tuple(replace(each, origin=f"/n/{EVIL}") for each in point.files),
        )  # fmt: skip
    builder.rewrite()
    for verb, *words in (
        ("list", victim.path), ("show", victim.path), ("verify", victim.path),
        ("restore", victim.path, "-o", victim.out),
        ("map", victim.path, "--detach"), ("map", "--list"), ("unmap", "--all"),
    ):  # fmt: skip
        victim.run(verb, *words, codes={0, 3})
    for path in victim.out.rglob("*"):
        assert path.name.isprintable()
    data = victim.path / builder.points[0].disks[0].file
    data.write_bytes(data.read_bytes()[:-100])
    victim.run("verify", victim.path, codes={40})
    (victim.path / f"{EVIL}.full.data").write_bytes(b"stray")
    victim.run("verify", victim.path, codes={40})
    victim.run("verify", victim.path / EVIL, codes={50})
