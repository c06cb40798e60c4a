"""Steps of the model test: the domain goes to the other host, which shares its images and sets."""

import random
import re

from tests.lib import model_checks as checks
from tests.lib.model_kinds import Arguments, is_active, is_calm, is_off, step
from tests.lib.model_runs import draw_run, words
from tests.lib.model_world import World

STANDBY = frozenset({0, 3, 20, 30, 50, 75})
"""Exit codes of a run on the host where the domain is not."""


def draw_move(_world: World, rng: random.Random) -> Arguments:
    return {"keep": rng.random() < 0.6}


@step(3, is_off, draw_move)
def move(world: World, *, keep: bool) -> str:
    """A cluster moves the domain that is off; it may stay defined here.

    Not to a host that it was migrated from and is still defined at: a run there declines, since
    libvirt says that it is elsewhere, and that is right as far as anybody can know.
    """
    if world.other.is_left and world.other.defined:
        return "was migrated from there"
    if not keep:
        world.guest.undefine()
    forget_other(world)
    world.change_host(keeps_definition=keep)
    world.guest.define()
    return world.lab.uri


@step(3, lambda world: is_calm(world) and world.persistent and not world.is_plugged, draw_move)
def migrate(world: World, *, keep: bool) -> str:
    """It goes while it runs; what libvirt knows of checkpoints stays behind."""
    forget_other(world)
    here, there = world.guest.places, world.other.guest.places
    xml = world.lab.virsh("dumpxml", "--migratable", world.guest.name)
    # each QEMU has sockets of its own
    xml = xml.replace(f"{here.monitor},", f"{there.monitor},")
    xml = xml.replace(f"{here.qtest},", f"{there.qtest},")
    path = world.lab.images / "migrate.xml"
    path.write_text(xml)
    world.lab.virsh(
        "migrate", "--live", "--unsafe", "--persistent", *([] if keep else ["--undefinesource"]),
        "--migrateuri", "tcp://127.0.0.1", "--xml", path, "--persistent-xml", path,
        "--domain", world.guest.name, "--desturi", world.other.lab.uri,
    )  # fmt: skip
    world.guest.close()
    world.change_host(keeps_definition=keep)
    world.guest.adopt_process()
    world.other.is_left = True
    return world.lab.uri


def forget_other(world: World) -> None:
    """A domain that has another name on the other host is not the same to libvirt."""
    there = world.other
    if there.defined and there.defined != world.guest.name:
        there.lab.virsh("undefine", "--checkpoints-metadata", "--domain", there.defined)
        there.defined = ""


@step(3, lambda world: is_active(world) and bool(world.other.defined), draw_run)
def backup_on_standby(world: World, into: str, level: str) -> str:
    """A run where the domain is defined, but off: it runs here, and nothing of it is touched."""
    there, target = world.other, world.sets[into]
    before = checks.look(world)
    argv = list(words(world, target, level))
    argv[1] = there.defined
    result = there.ctl(*argv, code=None)
    assert result.code in STANDBY, f"exit code {result.code}: {result.stderr}"
    assert checks.new_points(world, target) == [], result.stdout
    assert checks.look(world) == before
    last = re.sub(r"\s+", " ", result.stderr).strip()[-160:]
    return f"{result.code} {last}"
