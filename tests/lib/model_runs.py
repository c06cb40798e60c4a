"""Steps of the model test: backups, and what may happen to them on their way."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.lab.command import LabError
from tests.lab.process import wait_until
from tests.lib import model_checks as checks
from tests.lib.ctl import SECONDS, Result
from tests.lib.model_kinds import Arguments, draw_ops, is_active, is_off, is_running, step
from tests.lib.model_world import LOCKED, Op, SetModel, World

DONE = (0, 3)
REPOSITORY = 50
GAVE_WAY = 75
SWEPT = (*DONE, 20, 30, REPOSITORY, GAVE_WAY)
"""Exit codes of runs that have come so far that they swept up after dead ones."""
LEVELS = ("auto",) * 8 + ("inc",) * 3 + ("diff",) * 2 + ("copy", "full")
FAULTS = (
    "KILL@file-replaced#1",
    "KILL+@file-replaced#2",
    "KILL@metadata-collected#1",
    "KILL@blocks-copied#1",
    "KILL@blocks-copied#2",
    "KILL+@block-written#2",
    "KILL@stream-finished#2",
    "KILL@point-published#1",
    "KILL@os-rename#1",
    "KILL+@os-rename#4",
    "KILL+@point-published#1",
    "KILL@draft-removed#1",
)
ONLINE_FAULTS = (
    "KILL@job-begun#1",
    "KILL+@job-begun#1",
    "KILL@job-aborted#1",
    "KILL+@job-aborted#1",
    "KILL@checkpoint-deleted#1",
    "KILL+@checkpoint-deleted#1",
)
OFFLINE_FAULTS = (
    "KILL@bitmap-added#1",
    "KILL+@bitmap-added#1",
    "KILL+@bitmap-added#2",
    "KILL@daemon-serves#1",
    "KILL@changes-merged#2",
    "KILL@images-compared#1",
    "KILL@bitmap-removed#1",
    "KILL+@bitmap-removed#1",
)
NBDINFO = "nbdinfo"
HOLD = "STOP@blocks-copied#1"


def draw_run(world: World, rng: random.Random) -> Arguments:
    """A set and a level, now and then one that can't be."""
    name = rng.choice(sorted(world.sets))
    return {"into": name, "level": rng.choice(LEVELS)}


@step(36, draw=draw_run)
def backup(world: World, into: str, level: str) -> str:
    """A run that nothing disturbs."""
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    result = world.ctl(*words(world, target, level), code=None)
    expected = expected_codes(target, level)
    assert result.code in expected, f"exit code {result.code}: {result.stderr}"
    return settle(world, target, references, before, result)


def draw_writing(world: World, rng: random.Random) -> Arguments:
    how = {"hold": rng.random() < 0.5, "storm": rng.random() < 0.5}
    return {**draw_run(world, rng), "ops": draw_ops(world, rng), **how}


@step(8, is_running, draw_writing)
def backup_while_writing(
    world: World, into: str, level: str, ops: list[Op], *, hold: bool, storm: bool
) -> str:
    """The guest writes during the job: the point holds what was there when it began.

    In a ``storm`` it goes on until the run has ended.
    """
    # the job of a run that was killed looks like that of this one
    hold = hold or world.job_left
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    faults = (HOLD,) if hold else ()
    with world.ctl.rigged(*faults), world.ctl.start(*words(world, target, level)) as process:
        reached = wait_for_job(world, process, hold=hold)
        if reached:
            world.operate(ops)
        process.send_signal(signal.SIGCONT)
        while reached and storm and process.poll() is None:
            world.operate(ops)
        result = outcome(process)
    assert result.code in expected_codes(target, level), result.stderr
    said = settle(world, target, references, before, result)
    return f"{said}, {'wrote in the job' if reached else 'no job'}"


def draw_killed(world: World, rng: random.Random) -> Arguments:
    how: Arguments = {"after": rng.random() * 1.5, "fault": ""}
    if rng.random() < 0.6:
        faults = FAULTS + (ONLINE_FAULTS if world.is_active else OFFLINE_FAULTS)
        how = {"after": 0, "fault": rng.choice(faults)}
    return {**draw_run(world, rng), **how, "term": rng.random() < 0.3}


@step(10, draw=draw_killed)
def backup_killed(
    world: World, into: str, level: str, after: float, fault: str, *, term: bool
) -> str:
    """Our run ends by a signal: at a certain step, or somewhere."""
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    kind = "TERM" if term else "KILL"
    faults = (fault.replace("KILL", kind),) if fault else ()
    with world.ctl.rigged(*faults), world.ctl.start(*words(world, target, level)) as process:
        if not fault:
            time.sleep(after)
            process.send_signal(signal.Signals[f"SIG{kind}"])
        result = outcome(process)
    by_signal = 128 + signal.SIGTERM if term else -signal.SIGKILL
    # a signal that comes before Python has its handler ends it, too
    codes = {*expected_codes(target, level), by_signal, -signal.SIGTERM}
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    if result.code < 0:
        world.job_left = world.is_active
    return settle(world, target, references, before, result)


def draw_death(world: World, rng: random.Random) -> Arguments:
    return {**draw_run(world, rng), "how": rng.choice(["stop", "destroy", "kill9"])}


@step(3, is_active, draw_death)
def backup_guest_dies(world: World, into: str, level: str, how: str) -> str:
    """The guest ends during the job."""
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    forgets = not world.persistent
    with world.ctl.rigged(HOLD), world.ctl.start(*words(world, target, level)) as process:
        reached = wait_for_job(world, process, hold=True)
        if how == "kill9":
            world.lose()
        world.end(how)
        process.send_signal(signal.SIGCONT)
        result = outcome(process)
    codes = expected_codes(target, level) | ({20, 30} if reached else set())
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    return settle(
        world, target, references, before, result, is_lossy=how == "kill9", forgets=forgets
    )


def draw_start(world: World, rng: random.Random) -> Arguments:
    return {**draw_run(world, rng), "hold": rng.random() < 0.5, "after": rng.random() * 0.8}


@step(5, is_off, draw_start)
def backup_yields(world: World, into: str, level: str, after: float, *, hold: bool) -> str:
    """The domain is started while its images are read, as libvirt's hook does: at once."""
    target = world.sets[into]
    before = checks.look(world)
    head = target.head
    references = world.take_references()
    faults = (HOLD,) if hold else ()
    with world.ctl.rigged(*faults), world.ctl.start(*words(world, target, level)) as process:
        world.ctl.faults = ()
        is_held = hold and wait_for_job(world, process, hold=True)
        if not hold:
            time.sleep(after)
        world.ctl("yield", world.guest.name)
        world.guest.start()
        world.started()
        process.send_signal(signal.SIGCONT)
        result = outcome(process)
    codes = {GAVE_WAY} if is_held else expected_codes(target, level) | {GAVE_WAY}
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    # one that is told after it has committed leaves the old base to the next run
    return settle(world, target, references, before, result, spared=head)


@step(3, is_off, draw_start)
def backup_raced(world: World, into: str, level: str, after: float, *, hold: bool) -> str:
    """The domain is started at that moment, and nobody tells us: one of the two gives up."""
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    faults = (HOLD,) if hold else ()
    with world.ctl.rigged(*faults), world.ctl.start(*words(world, target, level)) as process:
        if hold:
            wait_for_job(world, process, hold=True)
        else:
            time.sleep(after)
        try:
            world.guest.start()
        except LabError as err:
            if LOCKED not in str(err):
                raise
        else:
            world.started()
        process.send_signal(signal.SIGCONT)
        result = outcome(process)
    codes = expected_codes(target, level) | ({30, GAVE_WAY} if world.is_active else set())
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    said = settle(world, target, references, before, result)
    return f"{said}, the domain is {world.power}"


def words(world: World, target: SetModel, level: str) -> tuple[str, ...]:
    """The command line of a run."""
    # an external program closes its connection first, which QEMU 7.2 does not survive there
    options = () if NBDINFO in target.options and world.guest.iothreads else target.options
    return (
        "backup", world.guest.name, "-o", str(target.path), "--json", "-l", level, *options,
    )  # fmt: skip


def expected_codes(target: SetModel, level: str) -> set[int]:
    """How a run may end that nothing disturbs."""
    is_refused = (level == "full") == target.has_full and level in ("full", "inc", "diff")
    # a run was killed between its renames, and nobody may remove what it has left
    if "nodelete" in target.oddities and level in ("full", "auto"):
        is_refused |= any(
            not checks.is_named(target.path, each.name) for each in target.path.glob("*.full.data")
        )
    return {REPOSITORY} if is_refused else set(DONE)


def wait_for_job(world: World, process: "subprocess.Popen[str]", *, hold: bool) -> bool:
    """Wait until the job is there (and the run stands still); False if the run ended before."""
    stat = Path(f"/proc/{process.pid}/stat")

    def is_there() -> bool:
        if process.poll() is not None:
            return True
        if hold:
            return stat.read_text().rpartition(")")[2].split()[0] == "T"
        return bool(world.guest.block_jobs())

    wait_until(is_there, "job of the run", 180)
    return process.poll() is None


def outcome(process: "subprocess.Popen[str]") -> Result:
    """Wait for the end of a run."""
    stdout, stderr = process.communicate(timeout=SECONDS)
    assert "Traceback" not in stderr, stderr
    return Result(process.returncode, stdout, stderr)


def settle(
    world: World,
    target: SetModel,
    references: dict[str, Path],
    before: checks.Sight,
    result: Result,
    *,
    is_lossy: bool = False,
    forgets: bool = False,
    spared: str = "",
) -> str:
    """Take up the point that the run made, if it did, and check what it left.

    ``spared``: the checkpoint of the former base, where the run may have no time to remove it.
    """
    points = checks.new_points(world, target)
    if result.code in DONE:
        assert points == [json.loads(result.stdout)["point"]], (points, result.stdout)
    elif result.code > 0:
        assert not points, f"exit code {result.code}, and there is a point: {points}"
    assert len(points) < 2, points
    if not points:
        world.drop_references(references)
    for point in points:
        checks.check_point(world, target, point, references)
        take_up(world, target, point, references)
        checks.prove(world, target, point["id"])
    if is_lossy:
        world.lose()
    if result.code < 0:
        world.untidy = True
    elif result.code in SWEPT or not world.untidy:
        world.job_left = False
        allow = allowed(world, result.code, was_active=before.is_active)
        checks.check_clean(world, target, allow)
        world.untidy = bool(allow - {checks.HELD})
    if result.code in DONE:
        checks.check_only_base(world, target, spared)
    checks.check_kept(world, target, before, is_lossy=is_lossy, forgets=forgets)
    said = f"{result.code}"
    for point in points:
        said += f" {point['level']} {point['id']} {checks.modes(point)} {point['warnings']}"
        world.count(point["level"])
        world.count(point["consistency"])
    if len(target.references) >= world.most_points:
        retire(world, target)
    return said


def allowed(world: World, code: int, *, was_active: bool) -> frozenset[str]:
    """Files that may stay when a run ends so."""
    # that the guest may freeze late is known until its agent has answered
    held = {checks.HELD} if world.is_active and not world.agent.is_prompt else set()
    if code in DONE:
        return frozenset(held)
    # a checkpoint or bitmap that can't be removed now
    notes = {"run.json"} if was_active != world.is_active else set()
    # of a dead run; the next one that comes so far removes it or puts its own in its place
    return frozenset({*notes, *held, "offline.sock"})


def take_up(
    world: World, target: SetModel, point: dict[str, Any], references: dict[str, Path]
) -> None:
    """The set has one more point; a full or increment is the base of what follows."""
    target.references[point["id"]] = references
    if point["level"] in ("full", "inc"):
        target.head = point["checkpoint"]
        target.tag = point["checkpoint"].split(".")[1]
        # a disk whose data lie in a raw file is read in full each time
        target.sure = {each for each in world.sizes if not world.has_data_file(each)}
        target.chains = dict(world.chains)


def retire(world: World, target: SetModel) -> None:
    """Begin a new set in its place; the old one stays, to be restored at the end."""
    name = next(name for name, each in world.sets.items() if each is target)
    world.retired.append(target)
    path = target.path.with_name(f"{name}-{world.next_number()}")
    world.sets[name] = SetModel(path=path, options=target.options, oddities=target.oddities)
