"""A target that gets full: a small file system of its own."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd.errors import NoSpaceError
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.request import Style
from nbdbackupd.ops.restore.restore import RestoreRequest
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.system

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "small", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("output", ["qcow2", "raw"])
@pytest.mark.parametrize("preallocate", [False, True])
def test_full_target(tmp_path: Path, small: Path, output: str, *, preallocate: bool) -> None:
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(random.Random(1).randbytes(16 * MIB))}
    made.full()
    request = RestoreRequest(source=made.path, output=small, format=output, preallocate=preallocate)
    with pytest.raises(NoSpaceError) as found:
        restore.run(request, progress=lambda *_: None, cancelled=lambda: None)
    assert found.value.exit_code == 50
    # qemu-img removes what it could not preallocate
    left = {path.name for path in small.iterdir()}
    assert left <= {f"vda.{output}.incomplete"}
    assert left or preallocate


@pytest.mark.parametrize("style", [Style.CHAIN, Style.SNAPSHOTS])
@pytest.mark.parametrize("mib", range(2, 8))
def test_full_target_at_any_point(tmp_path: Path, small: Path, style: Style, mib: int) -> None:
    """Wherever the space ends, in the full or in an increment, it is said, and nothing is named."""
    rng = random.Random(mib)
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(rng.randbytes(8 * MIB))}
    made.disks["vda"][mib * MIB :] = bytes((8 - mib) * MIB)
    made.full()
    for number in range(4):
        made.inc({"vda": [Change(number * MIB, rng.randbytes(2 * MIB))]})
    request = RestoreRequest(source=made.path, output=small, style=style, disks=("vda",))
    with pytest.raises(NoSpaceError) as found:
        restore.run(request, progress=lambda *_: None, cancelled=lambda: None)
    assert found.value.exit_code == 50
    assert all(path.name.endswith(".incomplete") for path in small.iterdir())
