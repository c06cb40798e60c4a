"""Steps of the model test: what the guest, its administrator and fate do to the domain."""

import random
import shutil

from tests.lab.command import LabError, run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.process import wait_until
from tests.lib.model_kinds import (
    Arguments,
    draw_ops,
    is_active,
    is_calm,
    is_off,
    is_running,
    step,
)
from tests.lib.model_world import LOCKED, PLUGGED, Op, Power, World

START_SECONDS = 10.0


def draw_write(world: World, rng: random.Random) -> Arguments:
    return {"ops": draw_ops(world, rng)}


def draw_some(_world: World, rng: random.Random) -> Arguments:
    return {"targets": rng.choice([["vda"], ["vdb"], ["vda", "vdb"]])}


@step(22, lambda world: world.power in ("running", "off"), draw_write)
def write(world: World, ops: list[Op]) -> None:
    """The guest writes; or someone does to the images of a domain that is off."""
    world.operate(ops)


@step(14, lambda world: not world.is_active)
def start(world: World) -> None:
    """Start the domain; a killed run's reader may still be letting go of its images."""

    def works() -> bool:
        try:
            world.guest.start()
        except LabError as err:
            if LOCKED not in str(err):
                raise
            return False
        return True

    wait_until(works, "start of the domain", START_SECONDS)
    world.started()


@step(6, is_active)
def stop(world: World) -> None:
    """The guest powers off."""
    world.end("stop")


@step(3, is_active)
def destroy(world: World) -> None:
    """Someone pulls the plug: libvirt ends QEMU with SIGTERM, which stores bitmaps."""
    world.end("destroy")


@step(2, is_active)
def kill_qemu(world: World) -> None:
    """QEMU crashes, or the host does: no bitmap of it can be trusted."""
    world.end("kill9")
    world.lose()


@step(2, lambda world: is_calm(world) and world.persistent and not world.is_plugged)
def managed_save(world: World) -> None:
    """The domain is saved to a file."""
    world.lab.virsh("managedsave", "--domain", world.guest.name)
    world.ended()
    world.power = Power.SAVED


@step(2, is_running)
def pause(world: World) -> None:
    """The administrator suspends the guest."""
    world.lab.virsh("suspend", "--domain", world.guest.name)
    world.power = Power.PAUSED


@step(12, lambda world: world.power == "paused")
def resume(world: World) -> None:
    """And lets it go on."""
    world.lab.virsh("resume", "--domain", world.guest.name)
    world.power = Power.RUNNING


@step(2)
def restart_libvirtd(world: World) -> None:
    """The daemon is upgraded, say."""
    world.lab.restart()


@step(4)
def lose_metadata(world: World) -> str:
    """Libvirt forgets all checkpoints; the bitmaps stay."""
    names = sorted(world.checkpoints())
    for name in names:
        world.lab.virsh("checkpoint-delete", "--metadata", "--domain", world.guest.name, name)
    return f"{len(names)}"


@step(2, lambda world: is_off(world) or (is_calm(world) and world.persistent))
def redefine(world: World) -> None:
    """Undefine with all metadata, define anew with the same UUID."""
    world.guest.undefine()
    world.guest.define()


@step(2, lambda world: is_calm(world) and world.persistent)
def make_transient(world: World) -> None:
    """Take the definition away from the running domain: at its end it is gone."""
    world.guest.undefine()
    world.persistent = False


@step(2, is_off)
def rename(world: World) -> str:
    """Give the domain another name."""
    name = f"vm-{world.next_number()}"
    world.lab.virsh("domrename", world.guest.name, name)
    world.rename_guest(world.guest, name)
    return name


@step(2, is_calm, draw_some)
def plant_checkpoint(world: World, targets: list[str]) -> str | None:
    """Another program makes a checkpoint."""
    if len(world.planted) > 6:
        return "enough"
    name = f"theirs.{world.next_number()}"
    disks = [
        f"{target},checkpoint={'bitmap' if target in targets else 'no'}" for target in world.sizes
    ]
    specs = [word for disk in disks for word in ("--diskspec", disk)]
    world.lab.virsh("checkpoint-create-as", world.guest.name, name, *specs)
    world.planted.add(name)
    return name


@step(1)
def lose_state(world: World) -> None:
    """The state directory is lost."""
    world.forget_files(world.state)


@step(2)
def keep_state(world: World) -> None:
    """Someone makes a backup of the state directory ..."""
    kept = world.directory / "old-state"
    world.forget_files(kept)
    if world.state.exists():
        shutil.copytree(world.state, kept)


@step(1)
def old_state(world: World) -> None:
    """... and restores it later; what was merged meanwhile has to be vouched for anew."""
    kept = world.directory / "old-state"
    if not kept.exists():
        return
    world.forget_files(world.state)
    shutil.copytree(kept, world.state)
    for each in world.sets.values():
        if each.is_changed and each.references:
            accepted = world.ctl("verify", each.path, "--accept", code=None)
            assert accepted.code in (0, 3), accepted.stderr


@step(1, lambda world: is_calm(world) and world.persistent)
def revert_running(world: World) -> str:
    """Revert to an internal snapshot: libvirt 9.0 kills a guest that has bitmaps."""
    if any(world.has_data_file(target) for target in world.sizes):
        return "a data file has no internal snapshots"
    name = f"snap{world.next_number()}"
    world.lab.virsh("snapshot-create-as", "--domain", world.guest.name, name)
    world.operate([["data", target, 0, 65536, 0x5A] for target in world.sizes])
    try:
        world.lab.virsh("snapshot-revert", "--domain", world.guest.name, name)
    except LabError as err:
        said = f"the guest died: {str(err).rpartition('error: ')[2].splitlines()[0]}"
    else:
        said = "reverted"
    world.lose()
    world.guest.adopt_process()
    if world.guest.is_running():
        world.lab.virsh("snapshot-delete", "--domain", world.guest.name, name)
        return said
    world.lab.virsh("snapshot-delete", "--metadata", "--domain", world.guest.name, name)
    world.ended()
    for target in world.sizes:
        run(["qemu-img", "snapshot", "-d", name, world.chains[target][0]])
    return said


def draw_threads(_world: World, rng: random.Random) -> Arguments:
    return {"count": rng.choice([0, 1, 2, 2])}


@step(3, is_off, draw_threads)
def change_iothreads(world: World, count: int) -> None:
    """The disks are served by QEMU's main thread from now on, or by others."""
    world.guest.iothreads = count
    world.guest.define()


def draw_plug(_world: World, rng: random.Random) -> Arguments:
    return {"again": rng.random() < 0.5}


@step(2, lambda world: is_calm(world) and not world.is_plugged, draw_plug)
def plug(world: World, *, again: bool) -> str:
    """Plug a disk into the running guest alone: a new one, or the one that it had last."""
    path = world.lab.images / f"plugged-{world.last_plugged}.qcow2"
    if not (again and path.exists()):
        world.last_plugged = world.next_number()
        path = world.lab.images / f"plugged-{world.last_plugged}.qcow2"
    world.guest.attach(DiskSpec(target=PLUGGED, size=4 * MIB, path=path), keep=False)
    world.chains[PLUGGED] = (str(path),)
    world.sizes[PLUGGED] = world.guest.disk_size(PLUGGED)
    world.lose([PLUGGED])
    return path.name


def draw_agent(_world: World, rng: random.Random) -> Arguments:
    how = rng.choice(["prompt", "prompt", "slow", "hung", "gone"])
    return {"how": how, "seconds": round(rng.uniform(0.5, 4), 1) if how == "slow" else 0}


@step(5, draw=draw_agent)
def change_agent(world: World, how: str, seconds: float) -> None:
    """The guest's agent is slow in freezing, hangs, or is gone; or it is well again."""
    world.agent.freeze_seconds = seconds
    world.agent.is_hung = how == "hung"
    world.agent.is_gone = how == "gone"
