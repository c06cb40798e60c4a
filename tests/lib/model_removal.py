"""Steps of the model test: points are protected, verified, merged and removed; runs go on."""

import random
import signal
import time
from typing import Any

from nbdbackupd.repo import generation
from tests.lib import model_checks as checks
from tests.lib.ctl import Result
from tests.lib.model_kinds import Arguments, step
from tests.lib.model_runs import DONE, REPOSITORY, outcome
from tests.lib.model_world import SetModel, World

RETENTION = "retention:\n  last: {last}\n  minimum: 1\n"
REASONS = ("needed by", "hangs on no other", "nothing hangs", "starts from it", "protected")
FAULTS = (
    "KILL@os-rename#{number}",
    "KILL+@os-rename#{number}",
    "KILL@file-replaced#{number}",
    "KILL+@file-replaced#{number}",
    "KILL@generation-switched#1",
    "KILL+@generation-switched#1",
)


def has_points(world: World) -> bool:
    """Some set holds more than its base."""
    return any(len(target.references) > 1 for target in world.sets.values())


def draw_point(world: World, rng: random.Random) -> Arguments:
    """A point by its set and place in it: ids hold times."""
    names = [name for name, each in sorted(world.sets.items()) if len(each.references) > 1]
    name = rng.choice(names)
    return {"of": name, "place": rng.randrange(len(world.sets[name].references))}


def draw_removal(world: World, rng: random.Random) -> Arguments:
    return {**draw_point(world, rng), "verb": rng.choice(["merge", "merge", "remove", "prune"])}


def draw_killed(world: World, rng: random.Random) -> Arguments:
    fault = rng.choice(("", *FAULTS)).format(number=rng.randint(1, 12))
    return {**draw_removal(world, rng), "fault": fault, "after": rng.random()}


@step(1, can=has_points, draw=draw_point)
def verify_set(world: World, of: str, place: int) -> str:
    """A set is verified, whole or one point; a note says so where it can be written."""
    target = world.sets[of]
    words = ("--point", ident(target, place)) if place % 2 else ()
    result = world.ctl("verify", target.path, *words, code=None)
    assert result.code in DONE, result.stderr
    return str(result.code)


@step(2, can=has_points, draw=draw_point)
def protect(world: World, of: str, place: int) -> str:
    """A point is protected, or no longer."""
    target = world.sets[of]
    point = ident(target, place)
    verb = "unprotect" if point in target.protected else "protect"
    result = world.ctl(verb, target.path, "--point", point, code=None)
    assert result.code in {*DONE, REPOSITORY}, result.stderr
    if result.code in DONE:
        target.protected ^= {point}
    return f"{verb} {result.code}"


@step(6, can=has_points, draw=draw_removal)
def points_leave(world: World, of: str, place: int, verb: str) -> str:
    """Points are merged, removed or pruned; what stays restores to the same bytes."""
    target = world.sets[of]
    before = checks.look(world)
    result = world.ctl(*words(world, target, place, verb), code=None)
    assert result.code in {*DONE, REPOSITORY}, f"exit code {result.code}: {result.stderr}"
    return settle(world, target, before, result)


@step(4, can=has_points, draw=draw_killed)
def removal_killed(
    world: World, of: str, place: int, verb: str, *, fault: str, after: float
) -> str:
    """The same, and it is killed: at a certain step, or somewhere."""
    target = world.sets[of]
    before = checks.look(world)
    faults = (fault,) if fault else ()
    argv = words(world, target, place, verb)
    with world.ctl.rigged(*faults), world.ctl.start(*argv) as process:
        if not fault:
            time.sleep(after)
            process.kill()
        result = outcome(process)
    codes = {*DONE, REPOSITORY, -signal.SIGKILL}
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    return settle(world, target, before, result)


def ident(target: SetModel, place: int) -> str:
    """The id of a point by its place among all of its set."""
    return sorted(target.references)[place % len(target.references)]


def words(world: World, target: SetModel, place: int, verb: str) -> tuple[str, ...]:
    """The command line of a removal."""
    if verb == "prune":
        directory = world.directory / "retention"
        directory.mkdir(exist_ok=True)
        text = RETENTION.format(last=1 + place % 4)
        (directory / "nbdbackup.yaml").write_text(text, encoding="utf-8")
        return ("prune", str(target.path), "--force", "--config-dir", str(directory))
    return (verb, str(target.path), "--point", fitting(world, target, place, verb))


def fitting(world: World, target: SetModel, place: int, verb: str) -> str:
    """A point that may leave so, if there is one; else any, to be refused."""
    points: list[dict[str, Any]] = world.ctl.points(target.path)
    if verb == "merge":
        found = [each["id"] for each in points if each["checkpoint"]][1:]
    else:
        found = [each["id"] for each in points if each["level"] in ("diff", "copy")]
    return found[place % len(found)] if found else ident(target, place)


def settle(world: World, target: SetModel, before: checks.Sight, result: Result) -> str:
    """Forget the points that have left; what stays is what it was, and so is the domain."""
    now = listed(world, target)
    gone = target.references.keys() - now
    assert now <= target.references.keys(), now
    if result.code == REPOSITORY:
        assert not gone, f"refused, and {gone} have left: {result.stderr}"
        assert target.oddities or any(each in result.stderr for each in REASONS), result.stderr
    assert not gone & target.protected, f"protected, and gone: {gone & target.protected}"
    for point in gone:
        world.drop_references(target.references.pop(point))
    checks.check_kept(world, target, before, is_lossy=False, forgets=False)
    target.is_changed = target.is_changed or bool(gone)
    for point in sorted(now)[:1] + sorted(now)[-1:]:
        checks.prove(world, target, point)
    if result.code < 0:
        world.count("removals killed")
    elif gone:
        world.count("removals")
    return f"{result.code}, {len(gone)} left, {len(now)} stay"


def listed(world: World, target: SetModel) -> set[str]:
    """The ids of the set's points."""
    if not generation.directory(target.path).is_dir():
        return set()
    points: list[dict[str, Any]] = world.ctl.points(target.path)
    assert not target.head or target.head in {each["checkpoint"] for each in points}
    return {each["id"] for each in points}
