"""Steps of the model test: what happens to the images under the domain."""

import random
from pathlib import Path

from tests.lab.command import LabError, run
from tests.lab.disks import MIB
from tests.lib.model_kinds import Arguments, any_disk, is_calm, is_off, step
from tests.lib.model_world import KIB, PREFIX, OldCopy, World

MOST_LAYERS = 3
MOST_COPIES = 4
LARGEST_DISK = 12 * MIB
DATA_FILE = "has a data file"


@step(4, is_calm, any_disk)
def snapshot(world: World, target: str) -> str:
    """An external snapshot: the guest writes into a new overlay."""
    chain = world.chains[target]
    if len(chain) >= MOST_LAYERS:
        return "deep enough"
    overlay = world.lab.images / f"{target}-{world.next_number()}.qcow2"
    others = [each for each in world.sizes if each != target]
    words = ["--diskspec", f"{target},file={overlay}"]
    words += [word for each in others for word in ("--diskspec", f"{each},snapshot=no")]
    world.lab.virsh(
        "snapshot-create-as", "--disk-only", "--atomic", "--no-metadata",
        "--domain", world.guest.name, *words,
    )  # fmt: skip
    world.set_chain(target, (str(overlay), *chain))
    return overlay.name


@step(4, is_calm, any_disk)
def commit(world: World, target: str) -> str:
    """Everything goes back into the lowest image."""
    chain = world.chains[target]
    if len(chain) == 1:
        return "nothing to commit"
    world.lab.virsh(
        "blockcommit", "--active", "--pivot", "--wait", "--domain", world.guest.name, target
    )
    world.set_chain(target, chain[-1:])
    for overlay in chain[:-1]:
        Path(overlay).unlink()
    return f"{len(chain)} layers"


def draw_growth(world: World, rng: random.Random) -> Arguments:
    return {**any_disk(world, rng), "by": rng.choice([64 * KIB, 512 * KIB, MIB])}


@step(1, lambda world: is_calm(world) or is_off(world), draw_growth)
def grow(world: World, target: str, by: int) -> str:
    """Make a disk larger, running or off."""
    size = world.sizes[target] + by
    if size > LARGEST_DISK:
        return "large enough"
    try:
        if world.is_active:
            world.lab.virsh("blockresize", "--domain", world.guest.name, target, f"{size}B")
        else:
            world.unlocked(["qemu-img", "resize", "-q", world.chains[target][0], str(size)])
    except LabError as err:
        if "is inconsistent and cannot be used" not in str(err):
            raise
        return "a broken bitmap forbids it"
    world.sizes[target] = size
    world.lose([target])
    return str(size)


@step(3, is_off, any_disk)
def keep_copy(world: World, target: str) -> str:
    """Someone copies an image away ..."""
    if world.has_data_file(target):
        return DATA_FILE
    if len(world.copies) >= MOST_COPIES:
        world.copies.pop(0).path.unlink()
    chain = world.chains[target]
    path = world.directory / f"old-{world.next_number()}.qcow2"
    world.copy_file(Path(chain[0]), path)
    world.copies.append(OldCopy(target=target, chain=chain, path=path, size=world.sizes[target]))
    return path.name


def draw_rollback(_world: World, rng: random.Random) -> Arguments:
    """One of the kept copies, by its number, and whether the file keeps its inode."""
    return {"which": rng.randrange(MOST_COPIES), "in_place": rng.random() < 0.5}


@step(3, lambda world: is_off(world) and bool(world.copies), draw_rollback)
def roll_back(world: World, which: int, *, in_place: bool) -> str:
    """... and puts it back later; the disk is what it was then, with the bitmaps of then."""
    if not world.copies:
        return "no copy"
    copy = world.copies[which % len(world.copies)]
    if copy.chain != world.chains[copy.target]:
        return "the chain is another one"
    put(world, copy.path, Path(copy.chain[0]), in_place=in_place)
    world.sizes[copy.target] = copy.size
    world.lose([copy.target])
    return f"{copy.target} {copy.path.name}"


def draw_swap(world: World, rng: random.Random) -> Arguments:
    """A disk, and whether its file stays the same one."""
    return {**any_disk(world, rng), "in_place": rng.random() < 0.5}


@step(2, is_off, draw_swap)
def swap_for_other(world: World, target: str, *, in_place: bool) -> str:
    """The image becomes a copy of the other disk's: it holds bitmaps of the same names."""
    (other,) = (each for each in world.sizes if each != target)
    if world.has_data_file(other):
        return DATA_FILE
    if len(world.chains[other]) > 1 or len(world.chains[target]) > 1:
        return "has overlays"
    put(world, Path(world.chains[other][0]), Path(world.chains[target][0]), in_place=in_place)
    world.sizes[target] = world.sizes[other]
    world.lose([target])
    return f"{target} is {other} now"


@step(1, is_off)
def exchange_disks(world: World) -> None:
    """Each disk becomes what the other one was, by a new definition."""
    first, second = sorted(world.sizes)
    chains, sizes = dict(world.chains), dict(world.sizes)
    for target, other in ((first, second), (second, first)):
        world.set_chain(target, chains[other])
        world.sizes[target] = sizes[other]
    world.guest.define()
    world.lose()


def draw_recreation(world: World, rng: random.Random) -> Arguments:
    return {**any_disk(world, rng), "bitmaps": rng.random() < 0.5, "in_place": rng.random() < 0.5}


@step(1, is_off, draw_recreation)
def recreate(world: World, target: str, *, bitmaps: bool, in_place: bool) -> str:
    """The image is made anew with the same content, with its bitmaps or without."""
    chain = world.chains[target]
    if len(chain) > 1:
        return "has overlays"
    flags = {flag for each in world.stored_bitmaps(target).values() for flag in each}
    with_bitmaps = bitmaps and "in-use" not in flags
    new = world.directory / "new.qcow2"
    world.unlocked(
        ["qemu-img", "convert", "-O", "qcow2", *["--bitmaps"] * with_bitmaps, chain[0], str(new)]
    )
    put(world, new, Path(chain[0]), in_place=in_place)
    new.unlink()
    world.lose([target])
    return "with bitmaps" if with_bitmaps else "without"


@step(1, is_off, any_disk)
def move_data_out(world: World, target: str) -> str:
    """The image is made anew, with its data in a raw file of its own."""
    (image, *below) = world.chains[target]
    if below or world.has_data_file(target):
        return "has overlays, or one"
    data = world.lab.images / f"data-{world.next_number()}.raw"
    new = world.directory / "new.qcow2"
    options = f"data_file={data},data_file_raw=on"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, new, str(world.sizes[target])])
    world.unlocked(["qemu-img", "convert", "-n", "-O", "qcow2", image, str(new)])
    # libvirt knows of the image alone
    data.chmod(0o666)
    put(world, new, Path(image), in_place=False)
    new.unlink()
    world.data_files[image] = data
    world.lose([target])
    return data.name


@step(1, is_off, any_disk)
def revert_off(world: World, target: str) -> str:
    """Go back to an internal snapshot: not possible before all bitmaps are removed."""
    if len(world.chains[target]) > 1:
        return "has overlays"
    if world.has_data_file(target):
        return DATA_FILE
    image = world.chains[target][0]
    world.unlocked(["qemu-img", "snapshot", "-c", "before", image])
    world.operate([["data", target, MIB, 256 * KIB, 0xA5]])
    for name in world.stored_bitmaps(target):
        run(["qemu-img", "bitmap", "--remove", image, name])
    run(["qemu-img", "snapshot", "-a", "before", image])
    run(["qemu-img", "snapshot", "-d", "before", image])
    world.lose([target])
    return target


@step(1, is_off, any_disk)
def drop_overlay(world: World, target: str) -> str:
    """Go back to an external snapshot: the overlay is thrown away."""
    chain = world.chains[target]
    if len(chain) == 1:
        return "no overlay"
    world.set_chain(target, chain[1:])
    (info, *_) = world.image_info(target)
    world.sizes[target] = info["virtual-size"]
    world.guest.define()
    Path(chain[0]).unlink()
    world.lose([target])
    return f"{target} {chain[0]}"


@step(2, is_off, any_disk)
def plant_bitmap(world: World, target: str) -> str:
    """Another program adds a bitmap to an image."""
    if len(world.planted) > 6:
        return "enough"
    name = f"theirs.off.{world.next_number()}"
    world.unlocked(["qemu-img", "bitmap", "--add", world.chains[target][0], name])
    world.planted.add(name)
    return name


@step(1, is_off, any_disk)
def remove_bitmaps(world: World, target: str) -> str:
    """Someone removes our bitmaps from the lowest image, which libvirt does not notice."""
    image = world.chains[target][-1]
    found = [name for name in world.stored_bitmaps(target) if name.startswith(PREFIX)]
    for name in found:
        argv = ["qemu-img", "bitmap", "--remove", image, name]
        try:
            world.unlocked(argv)
        except LabError as err:
            if "not found" not in str(err):
                raise
    world.lose([target])
    return f"{len(found)} of {target}"


def put(world: World, source: Path, target: Path, *, in_place: bool) -> None:
    """Replace an image's content: as the same file, or as a new one of that name."""
    world.data_files.pop(str(target), None)
    if in_place:
        target.write_bytes(source.read_bytes())
        return
    new = target.with_name(f"{target.name}.new")
    world.copy_file(source, new)
    new.replace(target)
