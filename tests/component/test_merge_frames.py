"""A set of virtnbdbackup's kind, whose lz4 frames hold several blocks, is merged."""

import random
import shutil
from pathlib import Path

from nbdbackupd.repo import layout
from tests.lib.ctl import Ctl
from tests.lib.sets import Change, SetBuilder

MIB = 1 << 20


def test_blocks_that_newer_ones_cut(tmp_path: Path) -> None:
    """Finding: the cut block waited for the cache that itself held, for ever."""
    rng = random.Random(3)
    made = SetBuilder(tmp_path / "made", block=8 * MIB, level=1, format="raw")
    made.disks = {"vda": bytearray(rng.randbytes(MIB) * 24)}
    made.full()
    for number in range(3):
        made.inc({"vda": [Change((3 + 7 * number) * MIB + 4096, rng.randbytes(4096))]})
    path = tmp_path / "set"
    path.mkdir()
    devices = "<devices><disk><target dev='vda'/></disk></devices>"
    for point in made.points:
        xml = path / f"vmconfig.{point.checkpoint}.xml"
        xml.write_text(f"<domain><name>vm1</name><uuid>{point.uuid}</uuid>{devices}</domain>")
        name = point.disk("vda").file
        shutil.copy(made.path / name, path)
        shutil.copy(made.path / layout.checksum(name), path)
    ctl = Ctl("test:///default", tmp_path)
    ctl("import", path)
    ctl("merge", path, "--point", ctl.points(path)[-1]["id"])
    (image,) = ctl.restore(path, tmp_path / "out").values()
    assert image.read_bytes() == made.images[-1]["vda"]
