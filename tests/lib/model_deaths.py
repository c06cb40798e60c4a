"""Steps of the model test: what a run depends on dies in the middle of it, or has no room."""

import os
import random
import signal
import threading
from pathlib import Path
from subprocess import Popen
from typing import Any

from tests.lab.process import ProcessHandle
from tests.lib import model_checks as checks
from tests.lib.model_kinds import Arguments, step
from tests.lib.model_runs import (
    GAVE_WAY,
    REPOSITORY,
    draw_run,
    expected_codes,
    outcome,
    settle,
    wait_for_job,
    words,
)
from tests.lib.model_world import KIB, SetModel, World
from tests.lib.odd_files import mounted

PLACES = (
    "request-begun",
    "requests-moved",
    "requests-checked",
    "block-written",
    "stream-finished",
)
"""Where the run is when it happens, at a random call of them."""
DEATHS = ("stop", "destroy", "kill9", "abort", "daemon", "daemon")
GOING_ON_SECONDS = 0.5
ODD = "checked"
READER = "qemu-storage-d"
FAILED = frozenset({20, 30, GAVE_WAY})


def draw_death(world: World, rng: random.Random) -> Arguments:
    place = f"{rng.choice(PLACES)}#{rng.choice([1, 2, 3, rng.randint(4, 24)])}"
    how = rng.choice(DEATHS) if world.is_active else "reader"
    return {**draw_run(world, rng), "at": place, "how": how}


@step(7, draw=draw_death)
def backup_cut_off(world: World, into: str, level: str, at: str, how: str) -> str:
    """The guest, its job, libvirt, or the server of its images dies between any two blocks."""
    if (how == "reader") == world.is_active:
        return "not now"
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    forgets = not world.persistent
    # QEMU 7.2 hangs for good if a job ends while a client is in its handshake (ADR 22): a run that
    # ends its job sees to that, but nobody can when others end it
    stop = "CALMSTOP" if how == "abort" else "STOP"
    with world.ctl.rigged(f"{stop}@{at}"), world.ctl.start(*words(world, target, level)) as process:
        reached = wait_for_job(world, process, hold=True)
        is_struck = reached and strike(world, process, how)
        process.send_signal(signal.SIGCONT)
        result = outcome(process)
    codes = expected_codes(target, level) | (FAILED if is_struck else set())
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    checks.wait_calm(world)
    is_lossy = is_struck and how == "kill9"
    said = settle(world, target, references, before, result, is_lossy=is_lossy, forgets=forgets)
    return f"{said}, {'cut off' if is_struck else 'nothing died'}"


def strike(world: World, process: "Popen[str]", how: str) -> bool:
    """Let it die; False if there was nothing to kill."""
    match how:
        case "abort":
            world.lab.virsh("domjobabort", "--domain", world.guest.name)
        case "daemon":
            world.lab.kill9()
            world.lab.start()
        case "reader":
            readers = [pid for pid in children(process.pid) if command(pid) == READER]
            for pid in readers:
                with ProcessHandle(pid) as reader:
                    # its parent is stopped and can't bury it
                    reader.send(signal.SIGKILL)
            return bool(readers)
        case _:
            if how == "kill9":
                world.lose()
            # QEMU that ends in order first sends what a client asked for: that one must read
            going_on = threading.Timer(GOING_ON_SECONDS, process.send_signal, [signal.SIGCONT])
            going_on.start()
            try:
                world.end(how)
            finally:
                going_on.join()
    return True


def children(pid: int) -> list[int]:
    """The children of all threads of a process."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(each) for each in (thread / "children").read_text("ascii").split()]
    return found


def command(pid: int) -> str:
    """The short name of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8").strip()
    except FileNotFoundError:
        return ""


def draw_room(world: World, rng: random.Random) -> Arguments:
    names = sorted(name for name, each in world.sets.items() if world.small in each.path.parents)
    return {**draw_run(world, rng), "into": rng.choice(names), "room": rng.randrange(12_000)}


@step(3, draw=draw_room)
def backup_without_room(world: World, into: str, level: str, room: int) -> str:
    """The target has so many KiB left when the run begins."""
    target = world.sets[into]
    before = checks.look(world)
    references = world.take_references()
    state = os.statvfs(world.small)
    used = (state.f_blocks - state.f_bfree) * state.f_frsize // KIB
    world.resize_small(used + room)
    result = world.ctl(*words(world, target, level), code=None)
    world.resize_small()
    codes = expected_codes(target, level) | {REPOSITORY}
    assert result.code in codes, f"exit code {result.code}: {result.stderr}"
    return settle(world, target, references, before, result)


def draw_restore(world: World, rng: random.Random) -> Arguments:
    names = sorted(name for name, each in world.sets.items() if each.references)
    some = rng.choice([[], [], sorted(world.sizes)[:1]])
    return {"source": rng.choice(names), "which": rng.randrange(100), "disks": some}


@step(
    3,
    lambda world: world.power == "off" and any(each.references for each in world.sets.values()),
    draw_restore,
)
def restore_in_place(world: World, source: str, which: int, disks: list[str]) -> str:
    """Some or all disks become again what they were at a point; or nothing is touched."""
    target = world.sets[source]
    if not target.references:
        return "no point"
    point = list(target.references)[which % len(target.references)]
    before = world.take_references()
    some = ["-d", ",".join(disks)] if disks else []
    words = ("--in-place", "--yes", "--force", "--point", point, "--json", *some)
    result = world.ctl("restore", str(target.path), *words, code=None)
    is_done = result.code in (0, 3)
    assert is_done or result.code == 20, f"exit code {result.code}: {result.stderr}"
    told = {each["target"]: each["path"] for each in result.json["disks"]} if is_done else {}
    wanted = {**before, **{each: target.references[point][each] for each in told}}
    for each, path in told.items():
        world.take_chain(each, path)
    world.lose(told)
    checks.compare_disks(world, wanted)
    world.drop_references(before)
    reason = "" if is_done else result.stderr.strip().splitlines()[-1]
    return f"{result.code} {point} {sorted(told)} {reason}"


@step(1, lambda world: any(each.references for each in world.sets.values()), draw_restore)
def define_clone(world: World, source: str, which: int, **_rest: Any) -> str:
    """A domain from a point is defined beside ours, and removed again."""
    target = world.sets[source]
    if not target.references:
        return "no point"
    point = list(target.references)[which % len(target.references)]
    name = f"clone-{world.next_number()}"
    into = world.lab.images / name
    words = ("-o", into, "--define", "--name", name, "--point", point, "--json")
    result = world.ctl("restore", target.path, *words, code=None)
    assert result.code in (0, 3), f"exit code {result.code}: {result.stderr}"
    xml = world.lab.virsh("dumpxml", name)
    for each in result.json["disks"]:
        assert f"'{each['path']}'" in xml, xml
        checks.compare(Path(each["path"]), target.references[point][each["target"]])
    world.lab.virsh("undefine", name)
    world.forget_files(into)
    return f"{result.code} {point} {len(result.json['disks'])} disks"


ODDITIES: tuple[list[str], ...] = (
    ["fold"], ["nochmod"], ["nodelete"], ["noreplace", "nodirsync"], ["nodelete", "noreplace"],
    ["fold", "nochmod"], [],
)  # fmt: skip


def draw_oddities(_world: World, rng: random.Random) -> Arguments:
    return {"oddities": rng.choice(ODDITIES)}


@step(2, draw=draw_oddities)
def change_target(world: World, oddities: list[str]) -> str:
    """From now on one of the sets is begun anew where the file system can't do this or that."""
    old = world.sets[ODD]
    world.retired.append(old)
    folder = world.directory / f"odd-{world.next_number()}"
    at = folder / "at"
    if oddities:
        world.mounts.enter_context(mounted(folder / "below", at, *oddities))
    world.sets[ODD] = SetModel(path=at / "The Set", options=old.options, oddities=tuple(oddities))
    return str(at)
