"""Finding R-1: how many files a process may have open does not decide what can be restored."""

import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd import files
from nbdbackupd.errors import IntegrityError
from nbdbackupd.files import File
from tests.lib import sets
from tests.lib.ctl import PYTHON, ROOT
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

LIMIT = 256
BLOCK = 4 << 10


def built(path: Path, disks: int, points: int) -> SetBuilder:
    """A chain in which each point changes each disk a little, and all of them are needed."""
    rng = random.Random(points)
    made = SetBuilder(path, block=BLOCK, format="raw")
    size = (points + 8) * BLOCK
    made.disks = {f"vd{chr(ord('a') + n)}": sets.random_disk(rng, size) for n in range(disks)}
    made.full()
    for number in range(points - 1):
        place = (number * 7 % points) * BLOCK
        made.inc({target: [Change(place, rng.randbytes(BLOCK))] for target in made.disks})
    return made


@pytest.fixture(scope="module", params=[(10, 60), (1, 300)], ids=["10x60", "1x300"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SetBuilder:
    return built(tmp_path_factory.mktemp("s") / "set", *request.param)


def few() -> None:
    """As ``ulimit -n 256``, which binds the hard limit, too."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))


def ctl(*arguments: str | os.PathLike[str], code: int = 0) -> str:
    argv = [PYTHON, "-m", "nbdbackupd", *(os.fspath(each) for each in arguments)]
    done = subprocess.run(
        argv, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False, preexec_fn=few
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_restore_and_verify(chain: SetBuilder, tmp_path: Path) -> None:
    """R-1: all points of all disks, more files than may be open."""
    ctl("restore", chain.path, "-o", tmp_path / "out")
    for target, wanted in chain.images[-1].items():
        assert (tmp_path / "out" / f"{target}.raw").read_bytes() == wanted
    ctl("verify", chain.path)


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
    assert [each["target"] for each in mapped] == sorted(chain.disks)
    for disk in mapped:
        read = subprocess.run(["nbdcopy", disk["uri"], "-"], capture_output=True, check=True)
        assert read.stdout == chain.images[-1][disk["target"]]


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
