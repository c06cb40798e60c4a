"""A random history of one guest, saved into two sets: each point comes back bit for bit."""

import random
from datetime import datetime
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lib.scene import Saved, Scene, scene

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(300)]
LAB = EmbeddedLab
KIB = 1024
STEPS = 8
OPERATIONS = 14
OPTIONS = {"plain": (), "lz4": ("-z",)}


def make_disks(lab: EmbeddedLab, rng: random.Random) -> list[DiskSpec]:
    """Disks of every kind that behaves apart, with odd sizes, one on a template with data."""
    data, template = lab.images / "data.raw", lab.images / "template.qcow2"
    data.write_bytes(bytes(MIB) + rng.randbytes(3 * MIB))
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", data, template])
    data.unlink()
    return [
        DiskSpec(target="vda", size=20 * MIB + 512),
        DiskSpec(target="vdb", size=6 * MIB + 7 * 512, cluster_size=4 * KIB),
        DiskSpec(target="vdc", size=9 * MIB + 3 * KIB, options=("extended_l2=on",)),
        DiskSpec(target="vdd", size=8 * MIB, backing=template),
        DiskSpec(target="sda", size=5 * MIB + 512, bus="sata", cluster_size=2 * MIB),
        DiskSpec(target="vde", size=3 * MIB, format="raw"),
    ]


def zero_everything(guest_scene: Scene, rng: random.Random) -> None:
    """Zero, in each way there is, what the last point holds as data: at whole clusters."""
    guest = guest_scene.guest
    for target in ("vda", "vdb", "vdc", "vdd"):
        start = rng.randrange(0, 40) * 64 * KIB
        guest.write_zeroes(target, start, 128 * KIB, unmap=True)
        guest.write_zeroes(target, start + 256 * KIB, 64 * KIB, unmap=False)
        guest.discard(target, start + 512 * KIB, 192 * KIB)
        guest.write(target, start + MIB, 64 * KIB, 0)


def play(guest_scene: Scene, rng: random.Random) -> None:
    """Make the history: each step the guest works, then one or both of the sets get a point."""
    guest = guest_scene.guest
    sets = {name: guest_scene.directory / name for name in OPTIONS}
    for step in range(STEPS):
        guest.random_ops(rng, OPERATIONS if step != STEPS // 2 else 0)
        if step % 3 == 2:
            zero_everything(guest_scene, rng)
        if step == STEPS // 2 + 1:
            # a clean end stores the bitmaps, the next start loads them
            guest.stop()
            guest.start()
        if step == 0:
            chosen = [("plain", "full"), ("lz4", "auto")]
        else:
            names = [["plain"], ["lz4"], ["plain", "lz4"]][(step + rng.randrange(2)) % 3]
            chosen = [(name, rng.choice(["auto", "inc", "inc", "diff", "copy"])) for name in names]
        for name, level in chosen:
            saved = guest_scene.save(
                "-l", level, "--raw", *OPTIONS[name], *rng.choice([(), ("-w", "1")]),
                into=sets[name],
            )  # fmt: skip
            check_modes(saved, level)


def check_modes(saved: Saved, level: str) -> None:
    """Increments are increments: a disk that is read in full without need is a bug, too."""
    if level == "auto" and saved.point["sequence"] > 1:
        assert saved.point["level"] == "inc"
    is_delta = saved.point["level"] in ("inc", "diff")
    for target, mode in saved.modes.items():
        assert mode == ("delta" if is_delta and target != "vde" else "full"), target
    assert not saved.reasons


def test_each_point_of_a_random_history(lab: EmbeddedLab, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with scene(lab, tmp_path, "history", make_disks(lab, rng)) as here:
        play(here, rng)
        assert len(here.history) >= 10
        for saved in here.history:
            here.prove(saved, "--format", "raw")
            here.prove(saved, *other_way(here, saved))
        here.verify()


def other_way(here: Scene, saved: Saved) -> list[str]:
    """Name the point by its checkpoint, or by a time at which it is the newest of its set."""
    if saved.point["checkpoint"]:
        return ["--until", saved.point["checkpoint"]]
    later = [
        other.point
        for other in here.history
        if other.set == saved.set and other.point["sequence"] > saved.point["sequence"]
    ]
    # the manifest's times have whole seconds: another point may be of the same one
    if any(moment(point) == moment(saved.point) for point in later):
        return []
    return ["--at", saved.point["created"]]


def moment(point: dict[str, str]) -> datetime:
    return datetime.fromisoformat(point["created"])
