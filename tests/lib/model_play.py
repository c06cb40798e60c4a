"""Drive the model test: draw steps from a seed, or play a log again."""

import random
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.virtio_agent import Agent
from tests.lib import (
    model_checks,
    model_deaths,
    model_guest,
    model_hosts,
    model_images,
    model_removal,
    model_runs,
)
from tests.lib.model_kinds import KINDS, Step
from tests.lib.model_world import SMALL_KIB, Place, SetModel, World
from tests.lib.rigged import RiggedCtl

MODULES = (model_deaths, model_guest, model_hosts, model_images, model_removal, model_runs)
"""Where the kinds of steps are."""
DISKS = (
    DiskSpec(target="vda", size=8 * MIB),
    DiskSpec(target="vdb", size=8 * MIB, cluster_size=32 * 1024, options=("extended_l2=on",)),
)
SMALL = "small"
OPTIONS = {"plain": (), "packed": ("-z",), "checked": ("--extents", "nbdinfo")}
PLACES = {"packed": SMALL}
QUICK = ("DEFAULT2@freeze-seconds#1",)
"""So long the guest's agent has for a freeze."""


@contextmanager
def world_of(directory: Path) -> Iterator[World]:
    """A domain that is off, with two empty disks and no sets yet."""
    with (
        DaemonLab(host="lab-a") as lab,
        DaemonLab(host="lab-b") as second,
        small_place(directory / SMALL) as small,
        ExitStack() as mounts,
    ):
        agent = Agent()
        # the number of iothreads is a matter of steps, so that a log can be played again
        options = GuestOptions(iothreads=0, uuid=str(uuid.uuid4()), has_agent=True, agent=agent)
        for each in (lab, second):
            # QEMU goes through it to scratch files; whoever makes the state first closes it
            (each.directory / "ctl").mkdir(mode=0o755)
        guest = lab.guest("vm-0", DISKS, options)
        disks = [replace(disk, path=guest.image(disk.target)) for disk in DISKS]
        ctl = RiggedCtl(second.uri, second.directory / "ctl")
        ctl.state = lab.directory / "ctl" / "state"
        ctl.always = QUICK
        other = second.guest("vm-0", disks, options)
        world = World(
            lab=lab,
            guest=guest,
            ctl=RiggedCtl(lab.uri, lab.directory / "ctl"),
            agent=agent,
            other=Place(lab=second, guest=other, ctl=ctl, defined=other.name),
            directory=directory,
            mounts=mounts,
            small=small,
            sets={
                name: SetModel(path=directory / PLACES.get(name, "") / name, options=options)
                for name, options in OPTIONS.items()
            },
            sizes={disk.target: disk.size for disk in DISKS},
            chains={disk.target: (str(guest.image(disk.target)),) for disk in DISKS},
        )
        world.ctl.always = QUICK
        yield world


@contextmanager
def small_place(path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    path.mkdir()
    run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_KIB}k,mode=0755", "tmpfs", path])
    try:
        yield path
    finally:
        run(["umount", "--lazy", path])


def draw(world: World, seed: str, number: int) -> Step:
    """The step of that number: depends on the seed, the number and what is possible."""
    rng = random.Random(f"{seed}/{number}")
    possible = {name: kind.weight for name, kind in sorted(KINDS.items()) if kind.can(world)}
    (name,) = rng.choices(list(possible), list(possible.values()))
    return Step(name=name, args=KINDS[name].draw(world, rng))


def play(world: World, steps: Iterable[Step]) -> None:
    """Carry steps out, then prove every point; an error gets the log of all steps as a note."""
    try:
        for step in steps:
            carry_out(world, step)
        if world.is_active:
            carry_out(world, Step(name="stop", args={}))
        model_checks.check_images(world)
        model_checks.prove_all(world)
    except Exception as err:
        err.add_note("\n".join(["the steps, the last of which failed:", *world.log]))
        raise


def carry_out(world: World, step: Step) -> None:
    """One step; what is not possible (in a log with lines left out) is passed over."""
    kind = KINDS[step.name]
    world.log.append(f"{len(world.log)} {step}")
    if not kind.can(world):
        world.log[-1] += " -> not possible now"
        return
    begun = time.monotonic()
    said = kind.act(world, **step.args)
    model_checks.check_guest(world)
    world.count(step.name)
    world.count_seconds(step.name, time.monotonic() - begun)
    world.log[-1] += f" -> {said or 'done'}"


def random_steps(world: World, seed: str, count: int) -> Iterator[Step]:
    """``count`` steps, each drawn when the one before is done."""
    yield Step(name="start", args={})
    for number in range(count):
        yield draw(world, seed, number)


def logged_steps(path: Path) -> list[Step]:
    """The steps of a log, from the lines that hold one."""
    return [Step.parse(line) for line in path.read_text().splitlines() if "[" in line]


def report(world: World) -> str:
    """What was done how often, and how long it took."""
    return ", ".join(
        f"{name} {count}" + (f" ({world.seconds[name]:.1f} s)" if name in world.seconds else "")
        for name, count in sorted(world.counts.items())
    )
