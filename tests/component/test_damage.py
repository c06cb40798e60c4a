"""Sets whose bytes changed after the backup: every verb says so, none ever lies or breaks.

The one promise that counts: a restore that ends with 0 has restored every byte.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.app import ctl
from tests.lib.sets import SetBuilder, random_changes

pytestmark = pytest.mark.component

KIB = 1024
SIZE = 512 * KIB
SAID = {0, 3, 40, 50}


@pytest.fixture(scope="module", params=[None, 1], ids=["plain", "lz4"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SetBuilder:
    """A full and two increments of two raw disks."""
    rng = random.Random(1)
    builder = SetBuilder(
        tmp_path_factory.mktemp("built") / "set", format="raw", level=request.param
    )
    for target in ("vda", "vdb"):
        builder.disks[target] = bytearray(rng.randbytes(SIZE // 2) + bytes(SIZE // 2))
    builder.full()
    for _ in range(2):
        builder.inc({target: random_changes(rng, SIZE, 5) for target in builder.disks})
    return builder


class Bench:
    """A copy of the set to damage, and the verbs on it."""

    def __init__(
        self, built: SetBuilder, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.path = directory / "set"
        self._built = built
        self._into = directory / "restored"
        self._capsys = capsys

    def fresh(self) -> None:
        """Make the set whole again."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self._built.path, self.path)

    def run(self, *words: str | Path) -> int:
        """Run a command line and return its exit code, which is never that of a bug."""
        code = ctl.main([os.fspath(word) for word in words])
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        assert code in SAID, f"{words}: exit code {code}: {said.err}"
        if code:
            assert said.err.startswith("nbdbackupctl: ") or said.err, words
            assert code != 50 or "[Errno" not in said.err
        return code

    def restore(self, *options: str) -> int:
        """Restore; what is restored with success is right, and nothing lies elsewhere."""
        shutil.rmtree(self._into, ignore_errors=True)
        before = {path.name for path in self._into.parent.iterdir()}
        point = self._built.points[-1].id
        code = self.run("restore", self.path, "-o", self._into, "--point", point, *options)
        found = {path.name for path in self._into.parent.iterdir()}
        assert found - before <= {self._into.name}
        if code in {0, 3}:
            for target, content in self._built.images[-1].items():
                for path in self._into.glob(f"{target}*"):
                    if path.is_file() and path.suffix != ".xml":
                        assert path.read_bytes() == content, path
        return code

    def all_verbs(self) -> dict[str, int]:
        """The exit codes of all verbs that read a set."""
        codes = {verb: self.run(verb, self.path) for verb in ("list", "show", "verify")}
        return {**codes, "restore": self.restore()}


@pytest.fixture
def bench(built: SetBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    bench = Bench(built, tmp_path, capsys)
    bench.fresh()
    return bench


def files(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())


def test_whole(bench: Bench) -> None:
    assert set(bench.all_verbs().values()) == {0}


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 33, 5000])))


def empty(path: Path, _rng: random.Random) -> None:
    os.truncate(path, 0)


def unlink(path: Path, _rng: random.Random) -> None:
    path.unlink()


def into_directory(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def into_pipe(path: Path, _rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def zero_page(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(data) - 512))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


DAMAGES = [flip, truncate, append, empty, unlink, into_directory, into_pipe, zero_page]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_damaged_files(bench: Bench, damage: Callable[[Path, random.Random], None]) -> None:
    rng = random.Random(damage.__name__)
    for name in files(bench.path):
        for _ in range(3 if damage in (flip, truncate, zero_page) else 1):
            bench.fresh()
            before = (bench.path / name).read_bytes()
            damage(bench.path / name, rng)
            if (bench.path / name).is_file() and (bench.path / name).read_bytes() == before:
                continue
            codes = bench.all_verbs()
            assert codes["verify"] != 0 or name.endswith(".json"), f"{name} {codes}"


def mutate(rng: random.Random, value: Any) -> Any:
    """Change one thing somewhere in a document."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = dict(value)
        match rng.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[f"{key}x"] = changed.pop(key)
            case _:
                changed[key] = mutate(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        items = list(value)
        match rng.randrange(6):
            case 0:
                del items[place]
            case 1:
                items.append(items[place])
            case _:
                items[place] = mutate(rng, value[place])
        return items
    return rng.choice(ODD)


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, 2**200, 1e308, "", "x", "/", "..", "../../x", "a/b",
    "\0", "\n", "\ud800", "~" * 300, "ä" * 200, [], {}, [None], {"a": []}, DEEP, "full", "inc",
    "vda", "vdb", "point1", "9999-99-99T99:99:99Z",
]  # fmt: skip


def dump(document: Any, rng: random.Random) -> bytes:
    data = json.dumps(document).encode("utf-8", "surrogatepass")
    match rng.randrange(20):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            return data.replace(b'": 1', b'": NaN')
        case 2:
            return data + data
        case 3:
            place = rng.randrange(len(data))
            return data[:place] + rng.randbytes(3) + data[place + 3 :]
    return data


@pytest.mark.parametrize("number", [1, 2, 3])
def test_strange_manifests(bench: Bench, number: int) -> None:
    path = bench.path / "points" / f"{number:06d}-point{number}.json"
    original = path.read_bytes()
    rng = random.Random(number)
    for _ in range(40):
        path.write_bytes(dump(mutate(rng, json.loads(original)), rng))
        for verb in ("list", "show", "verify"):
            bench.run(verb, bench.path)
        bench.restore()


def test_foreign_files_in_points(bench: Bench) -> None:
    points = bench.path / "points"
    names = ["000001-point1.json.bak", "x.json", "000009-.json", "README", ".hidden.json"]
    for name in names:
        bench.fresh()
        (points / name).write_bytes(b"{}")
        bench.all_verbs()
    for target in ("/", "nowhere", "000002-point2.json"):
        bench.fresh()
        (points / "000004-point4.json").symlink_to(target)
        bench.all_verbs()
