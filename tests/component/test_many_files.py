"""Finding R-1: how many files a process may have open does not decide what can be restored."""

import functools
import json
import os
import random
import resource
import shutil
import string
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdbackupd import files
from nbdbackupd.errors import IntegrityError
from nbdbackupd.files import File
from nbdbackupd.repo import layout
from tests.lib import sets
from tests.lib.ctl import PYTHON, ROOT
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

LIMIT = 256
BLOCK = 512


def built(path: Path, disks: int, points: int) -> SetBuilder:
    """A chain in which each point changes each disk a little, and all of them are needed."""
    rng = random.Random(points)
    made = SetBuilder(path, block=BLOCK, format="raw")
    size = (points + 8) * BLOCK
    names = [f"vd{first}{last}" for first in ("", "a") for last in string.ascii_lowercase]
    made.disks = {name: sets.random_disk(rng, size) for name in names[:disks]}
    made.full()
    for number in range(points - 1):
        place = (number * 7 % points) * BLOCK
        made.inc({target: [Change(place, rng.randbytes(BLOCK))] for target in made.disks})
        del made.images[:-1]
    return made


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], SetBuilder]:
    """Makes each chain once, in whichever order the tests come."""

    @functools.cache
    def chain(disks: int, points: int) -> SetBuilder:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "fdatasync"):  # thousands, of files that live a minute
                patch.setattr(os, name, lambda _: None)
            return built(tmp_path_factory.mktemp("s") / "set", disks, points)

    return chain


@pytest.fixture(params=[(30, 60), (1, 1000)], ids=["30x60", "1x1000"])
def chain(request: pytest.FixtureRequest, chains: Callable[[int, int], SetBuilder]) -> SetBuilder:
    return chains(*request.param)


def ctl(*arguments: str | os.PathLike[str], code: int = 0, limit: int = LIMIT) -> str:
    """Run with so many open files, as ``ulimit -n``, which binds the hard limit, too."""
    argv = [PYTHON, "-m", "nbdbackupd", *(os.fspath(each) for each in arguments)]
    done = subprocess.run(
        argv, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code in (0, 3) else done.stdout + done.stderr


def check(chain: SetBuilder, path: Path, out: Path) -> None:
    """Restore all disks of a set, and compare each with what the chain's newest point holds."""
    ctl("restore", path, "-o", out)
    for target, wanted in chain.images[-1].items():
        assert (out / f"{target}.raw").read_bytes() == wanted


def test_restore_and_verify(chain: SetBuilder, tmp_path: Path) -> None:
    """R-1: all points of all disks, more files than may be open."""
    check(chain, chain.path, tmp_path / "out")
    ctl("verify", chain.path)


def test_merge(chain: SetBuilder, tmp_path: Path) -> None:
    """R-1: nearly all points become one full, whose disks are read and written in turns."""
    path = tmp_path / "set"
    shutil.copytree(chain.path, path)
    last = len(chain.points) - 2
    ctl("merge", path, "--point", chain.points[last].id, "--checkpoint-dir", tmp_path / "state")
    assert len(list(path.glob("*.data"))) == 2 * len(chain.disks)
    check(chain, path, tmp_path / "out")


def test_import(chain: SetBuilder, tmp_path: Path) -> None:
    """R-1: what virtnbdbackup wrote has no index, and gets one for each stream."""
    path = tmp_path / "set"
    path.mkdir()
    disks = "".join(f"<disk><target dev='{target}'/></disk>" for target in chain.disks)
    devices = f"<devices>{disks}</devices>"
    for point in chain.points:
        xml = path / f"vmconfig.{point.checkpoint}.xml"
        xml.write_text(f"<domain><name>vm1</name><uuid>{point.uuid}</uuid>{devices}</domain>")
        for disk in point.disks:
            shutil.copy(chain.path / disk.file, path)
            shutil.copy(chain.path / layout.checksum(disk.file), path)
    ctl("import", path)
    check(chain, path, tmp_path / "out")
    ctl("verify", path)


def test_streams_without_an_index(chain: SetBuilder, tmp_path: Path) -> None:
    """R-1: each pass over a stream that is scanned holds it open, too."""
    names = [point.disk("vda").file for point in chain.points]
    for name in names:
        shutil.copy(chain.path / name, tmp_path)
    sequence = ",".join(str(tmp_path / name) for name in names)
    out = tmp_path / "out"
    ctl("restore", "--sequence", sequence, "-o", out, code=3)
    assert (out / "vda.raw").read_bytes() == chain.images[-1]["vda"]


@pytest.fixture
def mapped(chain: SetBuilder, tmp_path: Path) -> Iterator[list[dict[str, str]]]:
    runtime = tmp_path / "r"
    words = ["--runtime-dir", str(runtime), "--json", "map", "--detach", str(chain.path)]
    try:
        yield json.loads(ctl(*words))["map"]["disks"]
    finally:
        ctl("--runtime-dir", runtime, "unmap", "--all")


def test_map(chain: SetBuilder, mapped: list[dict[str, str]]) -> None:
    """R-1: the servers have the same limit."""
    assert [each["target"] for each in mapped] == list(chain.disks)
    for disk in mapped:
        read = subprocess.run(["nbdcopy", disk["uri"], "-"], capture_output=True, check=True)
        assert read.stdout == chain.images[-1][disk["target"]]


def test_files(chain: SetBuilder) -> None:
    """R-1: all servers are children, of each of which a pipe and a socket are held."""
    said = ctl("files", chain.path, "fs")
    assert all(target in said for target in chain.disks)


def test_too_few_files_are_refused(chain: SetBuilder, tmp_path: Path) -> None:
    """R-1: with 24 a package was named that was there, with 14 an errno."""
    said = ctl("verify", chain.path, limit=files.FEWEST - 1, code=10)
    assert f"only {files.FEWEST - 1} files may be open at a time" in said
    assert files.CURE in said
    ctl("--help", limit=files.FEWEST - 1)
    ctl("restore", chain.path, "--disk", "vda", "-o", tmp_path / "out", limit=files.FEWEST)
    ctl("files", chain.path, "--disk", "vda", "fs", limit=files.FEWEST)
    if len(chain.disks) > 20:
        for words in (["files"], ["--json", "files"]):
            said = ctl(*words, chain.path, "fs", limit=files.FEWEST, code=30)
            assert said.count(f"Too many open files: {files.CURE}") == len(words)


def test_a_file_that_was_replaced_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was closed for want of room is opened again only if it is the file that it was."""
    monkeypatch.setattr(files, "room", lambda: 2)
    made = []
    for number in range(5):
        path = tmp_path / f"f{number}"
        path.write_bytes(bytes([number]) * 10)
        made.append(File(path))
    for _ in range(2):
        for number, file in enumerate(made):
            assert file.pread(20, 0) == bytes([number]) * 10
            assert len(files._POOL._open) <= 2
    other = tmp_path / "other"
    other.write_bytes(b"\0" * 10)
    os.utime(other, ns=(0, (tmp_path / "f0").stat().st_mtime_ns))
    other.rename(tmp_path / "f0")
    with pytest.raises(IntegrityError, match="replaced while it was read"):
        made[0].pread(1, 0)
    for file in made:
        file.close()
