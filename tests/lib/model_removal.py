"""Steps of the model test: points leave a set, merged or removed, and what may end that early."""

import random
import signal

from tests.lib import model_checks as checks
from tests.lib.model_kinds import Arguments, step
from tests.lib.model_world import SetModel, World

REPOSITORY = 50
FAULTS = (
    "KILL@file-replaced#1",
    "KILL+@file-replaced#1",
    "KILL@stream-finished#2",
    "KILL@os-rename#1",
    "KILL+@os-rename#3",
    "KILL@file-replaced#2",
    "KILL+@file-replaced#2",
)


def can_remove(world: World) -> bool:
    """Some set has points, on a file system from which files can be removed."""
    return any(each.references and not each.oddities for each in world.sets.values())


def draw_removal(world: World, rng: random.Random) -> Arguments:
    names = [name for name, each in sorted(world.sets.items())
             if each.references and not each.oddities]  # fmt: skip
    return {"of": rng.choice(names), "choice": rng.random(),
            "fault": rng.choice(FAULTS) if rng.random() < 0.4 else ""}  # fmt: skip


@step(6, can_remove, draw_removal)
def merge(world: World, of: str, choice: float, fault: str) -> str:
    """The oldest points up to one of them become a full."""
    target = world.sets[of]
    bases = [each["id"] for each in world.ctl.points(target.path)
             if each["level"] in ("full", "inc") and each["checkpoint"]]  # fmt: skip
    if len(bases) < 2:
        return "nothing to merge"
    return leave(world, target, "merge", bases[1 + int(choice * (len(bases) - 1))], fault)


@step(3, can_remove, draw_removal)
def remove(world: World, of: str, choice: float, fault: str) -> str:
    """A copy or a differential goes."""
    target = world.sets[of]
    ids = [each["id"] for each in world.ctl.points(target.path)
           if each["level"] in ("diff", "copy")]  # fmt: skip
    if not ids:
        return "nothing to remove"
    return leave(world, target, "remove", ids[int(choice * len(ids))], fault)


def leave(world: World, target: SetModel, verb: str, point: str, fault: str) -> str:
    """What is left restores, whatever ended the verb; the set is the old one or the new one."""
    with world.ctl.rigged(*((fault,) if fault else ())):
        result = world.ctl(verb, target.path, "--point", point, code=None)
    codes = {0, REPOSITORY, *((-signal.SIGKILL,) if fault else ())}
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    listed = {each["id"]: each for each in world.ctl.points(target.path)}
    gone = set(target.references) - set(listed)
    assert set(listed) <= set(target.references)
    if result.code == 0:
        assert gone
    if result.code == REPOSITORY:
        assert not gone
        reasons = ("needed by", "hangs on no other", "No space", "are free")
        assert any(reason in result.stderr for reason in reasons), result.stderr
    for each in gone:
        world.drop_references(target.references.pop(each))
    if point in listed:
        checks.prove(world, target, point)
    return f"{result.code} {verb} {point}: {len(gone)} gone"
