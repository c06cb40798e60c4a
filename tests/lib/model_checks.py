"""What must hold after each run of the model test, whatever came before."""

import fcntl
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.command import run
from tests.lab.compare import first_difference_raw
from tests.lab.process import wait_until
from tests.lib.model_world import Power, SetModel, World

STATES = {
    Power.RUNNING: "running",
    Power.PAUSED: "paused",
    Power.OFF: "shut off",
    Power.SAVED: "shut off",
}
KEPT_FILES = frozenset({"lock", "images"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a run must not touch: checkpoints and bitmaps, ours and of others, before it."""

    checkpoints: frozenset[str]
    bitmaps: Mapping[str, frozenset[str]]


def look(world: World) -> Sight:
    """See what is there."""
    return Sight(
        checkpoints=frozenset(world.checkpoints()),
        bitmaps={target: frozenset(world.bitmaps(target)) for target in world.sizes},
    )


def new_points(world: World, target: SetModel) -> list[dict[str, Any]]:
    """Points of the set that the model does not know yet."""
    if not (target.path / "points").is_dir():
        return []
    return [each for each in world.ctl.points(target.path) if each["id"] not in target.references]


def modes(point: Mapping[str, Any]) -> dict[str, str]:
    """How each disk was read."""
    return {disk["target"]: disk["mode"] for disk in point["disks"]}


def check_point(target: SetModel, point: Mapping[str, Any]) -> None:
    """The point says of itself what it must; nothing was read in full without need."""
    found = modes(point)
    assert set(found) == {"vda", "vdb"}, point
    if point["level"] in ("full", "copy"):
        assert set(found.values()) == {"full"}, point
        return
    needless = [each for each in target.sure if found[each] != "delta"]
    assert not needless, f"{needless} read in full without need: {point}"
    for disk in point["disks"]:
        assert (disk["mode"] == "full") == bool(disk["reason"]), disk


def check_kept(world: World, own: SetModel, before: Sight, *, is_lossy: bool) -> None:
    """Nothing was touched that is not the run's: guest, checkpoints and bitmaps of others."""
    assert world.domain_state() == STATES[world.power]
    now = look(world)
    heads = {each.head for each in world.sets.values() if each is not own and each.head}
    protected = world.planted | heads
    assert protected & before.checkpoints <= now.checkpoints, "checkpoints of others are gone"
    for target, names in before.bitmaps.items():
        gone = protected & names - now.bitmaps[target]
        # QEMU was killed: what it had not stored is lost
        assert is_lossy or not gone, f"bitmaps of others are gone from {target}: {gone}"


def check_only_base(world: World, target: SetModel) -> None:
    """Of the set's chain only the base's checkpoint is left, at libvirt and in the images."""
    if not target.tag:
        return
    prefix = f"nbdbackup.{target.tag}."
    left = {name for name in world.checkpoints() if name.startswith(prefix)}
    assert left <= {target.head}, f"checkpoints of the chain are left: {left}"
    for disk in world.sizes:
        left = {name for name in world.bitmaps(disk) if name.startswith(prefix)}
        assert left <= {target.head}, f"bitmaps of the chain are left in {disk}: {left}"


def check_clean(world: World) -> None:
    """A run that could end by itself leaves no job, scratch, socket, note, draft or reader."""
    scratch = world.ctl.scratch
    assert not scratch.exists() or not list(scratch.iterdir()), list(scratch.iterdir())
    left = [path for path in world.ctl.runtime.rglob("*") if not path.is_dir()]
    assert {path.name for path in left} <= KEPT_FILES, left
    for each in world.sets.values():
        assert not list(each.path.glob(".draft*"))
    if world.is_active:
        assert world.guest.block_jobs() == []
        job = world.lab.virsh("domjobinfo", "--domain", world.guest.name)
        assert "None" in job.splitlines()[0], job
    for path in left:
        if path.name == "images":
            check_unlocked(path)


def check_unlocked(path: Path) -> None:
    """Nobody holds the lock that readers of images hold."""

    def is_free() -> bool:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    wait_until(is_free, f"end of the readers that hold {path}", 2)


def prove(world: World, target: SetModel, point: str) -> None:
    """Restore one point and compare all disks with what they were, byte for byte."""
    into = world.directory / "restored"
    begun = time.monotonic()
    images = world.ctl.restore(target.path, into, "--point", point, "--format", "raw")
    references = target.references[point]
    assert set(images) == set(references)
    for disk, image in images.items():
        offset = first_difference_raw(references[disk], image)
        assert offset is None, f"{target.path.name} {point}: {disk} differs at {offset}"
    shutil.rmtree(into)
    world.count("restores")
    world.count_seconds("restores", time.monotonic() - begun)


def prove_all(world: World) -> None:
    """Restore each point of each set that there has been; all of them must be sound."""
    for target in [*world.sets.values(), *world.retired]:
        if not target.references:
            continue
        world.ctl("verify", target.path)
        assert new_points(world, target) == []
        for point in target.references:
            prove(world, target, point)


def check_images(world: World) -> None:
    """QEMU finds no fault in any image; the domain is off."""
    for target in world.sizes:
        for path in world.chains[target]:
            run(["qemu-img", "check", "-q", path])
