"""The kinds of steps of the model test: when one is possible, what it draws, what it does.

A step's arguments are JSON values and are drawn before it begins. So the log of a run is a list
of lines that can be played again, as it is or with lines left out.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.lab.disks import MIB
from tests.lib.model_world import KIB, Op, World

Arguments = dict[str, Any]
Draw = Callable[[World, random.Random], Arguments]
Act = Callable[..., str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of step; ``weight`` against the others that are possible at the moment."""

    weight: int
    can: Callable[[World], bool]
    draw: Draw
    act: Act


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A kind's name with the arguments that were drawn."""

    name: str
    args: Mapping[str, Any]

    def __str__(self) -> str:
        return json.dumps([self.name, dict(self.args)])

    @classmethod
    def parse(cls, text: str) -> "Step":
        """Read a line of a log; what was noted after it is left out."""
        name, args = json.JSONDecoder().raw_decode(text[text.index("[") :])[0]
        return cls(name=name, args=args)


KINDS: dict[str, Kind] = {}


def nothing(_world: World, _rng: random.Random) -> Arguments:
    """No arguments."""
    return {}


def step(
    weight: int, can: Callable[[World], bool] = lambda _world: True, draw: Draw = nothing
) -> Callable[[Act], Act]:
    """Make a function a kind of step, under its own name; it returns what it has to note."""

    def register(act: Act) -> Act:
        name = act.__name__.replace("_", "-")
        KINDS[name] = Kind(weight=weight, can=can, draw=draw, act=act)
        return act

    return register


def is_running(world: World) -> bool:
    """The guest runs and is not paused."""
    return world.power == "running"


def is_active(world: World) -> bool:
    """QEMU is there."""
    return world.is_active


def is_calm(world: World) -> bool:
    """The guest runs and libvirt has no job of a dead run."""
    return is_running(world) and world.is_calm


def is_off(world: World) -> bool:
    """The domain is off, not saved."""
    return world.power == "off"


def any_disk(world: World, rng: random.Random) -> Arguments:
    """One disk."""
    return {"target": rng.choice(sorted(world.sizes))}


def draw_ops(world: World, rng: random.Random, most: int = 10) -> list[Op]:
    """Operations of all kinds, from a sector to 512 KiB, half of them at the hot beginning."""
    ops: list[Op] = []
    for _ in range(rng.randint(1, most)):
        target = rng.choice(sorted(world.sizes))
        unit = rng.choice([512, 4 * KIB, 64 * KIB, 64 * KIB])
        size = world.sizes[target]
        length = unit * rng.randint(1, max(1, rng.choice([64, 512]) * KIB // unit))
        room = min(size, rng.choice([MIB, size])) - length
        offset = rng.randrange(room // unit + 1) * unit
        kind = rng.choice(["data", "data", "data", "zero", "unmap", "discard"])
        ops.append([kind, target, offset, length, rng.randint(0, 255)])
    return ops
