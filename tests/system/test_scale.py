"""Long chains, many checkpoints, large and empty images: what grows only with the changes."""

import json
import logging
import random
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import GIB, MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lib import model_checks, model_kinds, model_play
from tests.lib.ctl import PYTHON, ROOT, Ctl
from tests.lib.model_kinds import Step

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(300)]

INCREMENTS = 40
CHECKPOINTS = 1000
TIB = 1024 * GIB
KIB = 1024
CPU_SECONDS = 1.0
log = logging.getLogger(__name__)

PLANT = """
import sys
import libvirt
libvirt.registerErrorHandler(lambda context, error: None, None)
domain = libvirt.open(sys.argv[1]).lookupByName(sys.argv[2])
for name in sys.stdin.read().split():
    domain.checkpointCreateXML(
        f"<domaincheckpoint><name>{name}</name><creationTime>1</creationTime><disks>"
        "<disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>",
        libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
    )
"""
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "report": json.loads(done.stdout)}))
"""


def off_guest(lab: DaemonLab, name: str, disk: DiskSpec) -> Guest:
    """A guest that has run once and was shut down."""
    guest = lab.guest(name, (disk,), GuestOptions(uuid=str(uuid.uuid4())))
    guest.start()
    guest.stop()
    return guest


def test_forty_increments(tmp_path: Path) -> None:
    """One chain, the guest now running, now off, now started anew; each point comes back."""
    rng = random.Random("forty")
    with model_play.world_of(tmp_path) as world:
        world.most_points = INCREMENTS + 2
        target = world.sets["plain"]
        model_play.carry_out(world, Step(name="start", args={}))
        for number in range(INCREMENTS + 1):
            if number % 3 == 1:
                model_play.carry_out(world, Step(name="stop", args={}))
            elif number % 3 == 0 and not world.is_active:
                model_play.carry_out(world, Step(name="start", args={}))
            world.operate(model_kinds.draw_ops(world, rng))
            run_args = {"into": "plain", "level": "inc" if number else "full"}
            model_play.carry_out(world, Step(name="backup", args=run_args))
        points = world.ctl.points(target.path)
        assert [point["sequence"] for point in points] == list(range(1, INCREMENTS + 2))
        modes = {mode for point in points[1:] for mode in model_checks.modes(point).values()}
        assert modes == {"delta"}
        kinds = [point["consistency"] for point in points]
        assert kinds.count("offline") > INCREMENTS // 2
        assert kinds.count("filesystem") > INCREMENTS // 4
        # the chain has but one bitmap in each image, however long it is
        assert all(world.bitmaps(disk) == {target.head} for disk in world.sizes)
        model_checks.prove_all(world)


def test_one_of_a_thousand_checkpoints(lab: DaemonLab, ctl: Ctl, tmp_path: Path) -> None:
    """The base's metadata is lost among a thousand others: only the base is defined again."""
    guest = off_guest(lab, "many", DiskSpec(size=8 * MIB))
    target = tmp_path / "set"

    def base() -> str:
        return str(ctl.points(target)[-1]["checkpoint"])

    def names() -> set[str]:
        return set(lab.virsh("checkpoint-list", "--name", "--domain", guest.name).split())

    def increment(offset: int) -> float:
        run(["qemu-io", "-c", f"write -P 7 {offset} 64k", str(guest.image("vda"))])
        lab.virsh("checkpoint-delete", "--metadata", "--domain", guest.name, base())
        begun = time.monotonic()
        (disk,) = ctl.backup(guest.name, target, "-l", "inc")["point"]["disks"]
        seconds = time.monotonic() - begun
        assert (disk["mode"], disk["data_bytes"]) == ("delta", 64 * KIB)
        return seconds

    ctl.backup(guest.name, target)
    alone = min(increment(MIB), increment(2 * MIB))
    others = {f"theirs.{number}" for number in range(CHECKPOINTS // 2)}
    others |= {f"nbdbackup.0f0f0f0f.old{number}" for number in range(CHECKPOINTS // 2)}
    subprocess.run(
        [PYTHON, "-c", PLANT, lab.uri, guest.name],
        input="\n".join(sorted(others)), text=True, check=True, env={"LIBVIRT_DEBUG": "error"},
    )  # fmt: skip
    crowded = increment(3 * MIB)
    log.info("alone %.2f s, among %s checkpoints %.2f s", alone, CHECKPOINTS, crowded)
    assert names() == others | {base()}
    # a call for each of them would cost much more than this
    assert crowded < 5 * alone
    guest.start()
    guest.write("vda", 4 * MIB, 64 * KIB, 9)
    lab.virsh("checkpoint-delete", "--metadata", "--domain", guest.name, base())
    report = ctl.backup(guest.name, target, "-l", "inc")
    (disk,) = report["point"]["disks"]
    assert (disk["mode"], disk["data_bytes"]) == ("delta", 64 * KIB)
    assert names() == others | {base()}
    reference = guest.reference("vda", tmp_path / "reference.raw")
    (image,) = ctl.restore(target, tmp_path / "restored", "--format", "raw").values()
    assert image.read_bytes() == reference.read_bytes()


def test_a_little_of_a_large_image(lab: DaemonLab, ctl: Ctl, tmp_path: Path) -> None:
    """Of 1 TiB that is nearly empty, 1 MiB has changed: our work is that of 1 MiB."""
    guest = off_guest(lab, "large", DiskSpec(size=TIB))
    image, target = guest.image("vda"), tmp_path / "set"
    writes = {0: 1, 511 * GIB + 3 * KIB: 2, TIB - 64 * KIB: 3}
    for offset, pattern in writes.items():
        run(["qemu-io", "-c", f"write -P {pattern} {offset} 64k", str(image)])
    ctl.backup(guest.name, target)
    # in 16 places all over the disk; one of them covers data, one is a zero over data
    changes = {offset * (TIB // 16): 4 for offset in range(15)}
    for offset, pattern in changes.items():
        run(["qemu-io", "-c", f"write -P {pattern} {offset} 64k", str(image)])
    run(["qemu-io", "-c", f"write -z {TIB - 64 * KIB} 64k", str(image)])
    done = subprocess.run(
        [PYTHON, "-c", MEASURE, *ctl.argv("backup", guest.name, "-o", str(target), "--json")],
        cwd=ROOT, env=ctl.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    measured = json.loads(done.stdout)
    (disk,) = measured["report"]["point"]["disks"]
    log.info("1 MiB of 1 TiB: %.2f s of CPU time", measured["seconds"])
    assert disk["mode"] == "delta"
    assert (disk["data_bytes"], disk["zero_bytes"]) == (15 * 64 * KIB, 64 * KIB)
    # that of QEMU's tools, which are children of ours, included
    assert measured["seconds"] < CPU_SECONDS
    (restored,) = ctl.restore(target, tmp_path / "restored").values()
    # both are nearly empty: qemu-img compares what is allocated
    assert "identical" in run(["qemu-img", "compare", str(restored), str(image)])
