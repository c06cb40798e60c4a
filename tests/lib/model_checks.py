"""What must hold after each run of the model test, whatever came before."""

import fcntl
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd.repo import generation
from tests.lab.command import LabError, run
from tests.lab.compare import first_difference_raw
from tests.lab.process import wait_until
from tests.lib.model_world import Power, SetModel, World

STATES = {
    Power.RUNNING: "running",
    Power.PAUSED: "paused",
    Power.OFF: "shut off",
    Power.SAVED: "shut off",
}
MARKERS = "starting"
"""Where ``yield`` leaves its marks; they grow old."""
CALM_SECONDS = 30.0
HOLD_SECONDS = 90.0
"""A guard asks an agent that has refused again and again once a minute."""
HELD = "guest-held"
KEPT_FILES = frozenset({"lock", "images", "guards"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a run must not touch: checkpoints and bitmaps, ours and of others, before it."""

    is_active: bool
    checkpoints: frozenset[str]
    bitmaps: Mapping[str, frozenset[str]]


def look(world: World) -> Sight:
    """See what is there."""
    return Sight(
        is_active=world.is_active,
        checkpoints=frozenset(world.checkpoints()),
        bitmaps={target: frozenset(world.bitmaps(target)) for target in world.sizes},
    )


def new_points(world: World, target: SetModel) -> list[dict[str, Any]]:
    """Points of the set that the model does not know yet."""
    points = generation.directory(target.path)
    if not points.is_dir() or len(list(points.glob("*.json"))) == len(target.references):
        return []
    return [each for each in world.ctl.points(target.path) if each["id"] not in target.references]


def is_named(root: Path, name: str) -> bool:
    """Whether a manifest of the set names that file."""
    manifests = generation.directory(root).glob("*.json")
    return any(f'"{name}"' in each.read_text() for each in manifests)


def modes(point: Mapping[str, Any]) -> dict[str, str]:
    """How each disk was read."""
    return {disk["target"]: disk["mode"] for disk in point["disks"]}


def check_point(
    world: World, target: SetModel, point: Mapping[str, Any], disks: Collection[str]
) -> None:
    """The point says of itself what it must; nothing was read in full without need."""
    found = modes(point)
    if point["consistency"] == "offline":
        assert world.last_end == "stop", point
    assert set(found) == set(disks), point
    if point["level"] in ("full", "copy"):
        assert set(found.values()) == {"full"}, point
        return
    needless = [
        disk
        for disk in target.sure & world.chains.keys()
        if found[disk] != "delta" and is_same_disk(target.chains[disk], world.chains[disk])
    ]
    assert not needless, f"{needless} read in full without need: {point}"
    for disk in point["disks"]:
        assert (disk["mode"] == "full") == bool(disk["reason"]), disk


def is_same_disk(before: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Whether snapshots or a commit, not both, lie between two chains of images."""
    return before[0] in now or now[0] in before


def check_kept(
    world: World, own: SetModel, before: Sight, *, is_lossy: bool, forgets: bool
) -> None:
    """Nothing was touched that is not the run's: guest, checkpoints and bitmaps of others."""
    assert world.domain_state() == STATES[world.power]
    now = look(world)
    heads = {each.head for each in world.sets.values() if each is not own and each.head}
    protected = world.planted | heads
    # with a transient domain libvirt's metadata goes
    lost = set() if forgets else protected & before.checkpoints - now.checkpoints
    assert not lost, f"checkpoints of others are gone: {lost}"
    for target, names in before.bitmaps.items():
        gone = protected & names - now.bitmaps.get(target, names)
        # QEMU was killed: what it had not stored is lost
        assert is_lossy or not gone, f"bitmaps of others are gone from {target}: {gone}"


def check_only_base(world: World, target: SetModel, spared: str = "") -> None:
    """Of the set's chain only the base's checkpoint is left, at libvirt and in the images.

    That, and ``spared``, until the next run.
    """
    if not target.tag:
        return
    prefix = f"nbdbackup.{target.tag}."
    left = {name for name in world.checkpoints() if name.startswith(prefix)}
    assert left <= {target.head, spared}, f"checkpoints of the chain are left: {left}"
    found = {name for disk in world.sizes for name in world.bitmaps(disk)}
    bitmaps = {name for name in found if name.startswith(prefix)} - {target.head}
    # one that libvirt has forgotten in the meantime may stay until the next run, not longer
    assert not bitmaps & target.orphans, f"bitmaps of the chain are left: {bitmaps}"
    target.orphans = bitmaps


def check_guest(world: World) -> None:
    """After any step: the guest does what it should, and no job or scratch file is left."""
    assert world.domain_state() == STATES[world.power]
    if world.is_active:
        assert world.guest.is_running()
        assert world.guest.is_paused() == (world.power is Power.PAUSED)
    if not world.job_left:
        assert not leftovers(world)
    if world.power is Power.RUNNING and world.agent.is_prompt:
        wait_until(lambda: not is_held(world), "thaw of the guest", CALM_SECONDS)
    there = world.other
    if there.defined:
        state = there.lab.virsh("domstate", "--domain", there.defined).strip()
        assert state == "shut off", state


def is_held(world: World) -> bool:
    """The guest is frozen, or somebody believes that it may be."""
    return world.agent.is_frozen or bool(list(world.ctl.runtime.rglob(HELD)))


def leftovers(world: World) -> list[str]:
    """Jobs and scratch files: what may harm a guest, or keep others away from it."""
    left = [str(each) for each in world.ctl.scratch.glob("*")]
    if world.is_active:
        left += [str(each) for each in world.guest.block_jobs()]
        job = world.lab.virsh("domjobinfo", "--domain", world.guest.name).splitlines()[0]
        left += [job] if "None" not in job else []
    return left


def wait_calm(world: World) -> None:
    """A run has died, or what it needed: what it left is undone soon, by nobody's next run."""

    def is_calm() -> bool:
        # a guest that is off is held by nobody
        held = [] if world.is_active else [*world.ctl.runtime.rglob(HELD)]
        return not leftovers(world) and not held

    wait_until(is_calm, "end of what the run has left", CALM_SECONDS)


def check_clean(world: World, own: SetModel, allow: frozenset[str]) -> None:
    """A run that could end by itself leaves no job, scratch, socket, note, draft or reader.

    ``allow`` names files of the runtime directory that may stay for the next run.
    """
    if HELD not in allow:
        # who watches over a guest that may be frozen sees its end at his next look
        wait_until(lambda: not [*world.ctl.runtime.rglob(HELD)], "end of a hold", HOLD_SECONDS)
    left = [
        path
        for path in world.ctl.runtime.rglob("*")
        if not path.is_dir() and path.parent.name != MARKERS
    ]
    assert {path.name for path in left} <= KEPT_FILES | allow, left
    if "nodelete" not in own.oddities:
        assert not [*own.path.glob(".draft*"), *own.path.glob(".removal*")]
    assert not leftovers(world)
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

    wait_until(is_free, f"end of the readers that hold {path}", 30)


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


def compare_disks(world: World, wanted: Mapping[str, Path]) -> None:
    """The disks of the domain, which is off, hold what is wanted."""
    for target, reference in wanted.items():
        compare(Path(world.chains[target][0]), reference)


def compare(image: Path, reference: Path) -> None:
    """A qcow2 image holds what a raw reference does."""
    copy = reference.with_suffix(".compared")
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy])
    offset = first_difference_raw(reference, copy)
    copy.unlink()
    assert offset is None, f"{image} differs from {reference} at {offset}"


def prove_all(world: World) -> None:
    """Verify each set that there has been, whole, and restore the newest point and some others.

    Each point was restored when it was made, and that its bytes are those of then is what
    ``verify`` proves, but not of what was merged.
    """
    for target in [*world.sets.values(), *world.retired]:
        if not target.references:
            continue
        world.ctl("verify", target.path)
        listed = [each["id"] for each in world.ctl.points(target.path)]
        assert set(listed) == set(target.references)
        for point in listed if target.is_changed else [*listed[:-1:3], listed[-1]]:
            prove(world, target, point)


def check_images(world: World) -> None:
    """QEMU finds no fault in any image; the domain is off. A killed QEMU leaves clusters over."""
    for target in world.sizes:
        for path in world.chains[target]:
            try:
                run(["qemu-img", "check", "-q", path])
            except LabError as err:
                if "exit status 3" not in str(err):
                    raise
