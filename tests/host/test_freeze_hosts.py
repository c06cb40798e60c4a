"""Mounted file systems that are written to: a frozen one is clean in the point."""

from pathlib import Path
from typing import Any

import pytest

from tests.host.appliance import IMAGES, Appliance
from tests.lab.agent_guest import make_ext4, make_xfs
from tests.lab.command import run
from tests.lab.hostguest import HostGuest
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

MAKERS = {"vda": make_ext4, "vdb": make_xfs}
# "count" names the last generation that is whole; never synced, so all is in the guest's memory
WRITER = """
for disk in vda vdb; do
    (
        cd /mnt/$disk
        n=0
        while :; do
            n=$((n + 1))
            dd if=/dev/urandom of=data.$n bs=64k count=4
            md5sum <data.$n >sum.$n
            mkdir -p many/$n/$n && echo $n >many/$n/$n/file
            echo $n >count.new
            mv count.new count
            rm -rf many/$((n - 4)) data.$((n - 4)) sum.$((n - 4))
        done
    ) >/dev/null 2>&1 &
done
"""
READER = """
for disk in vda vdb; do
    cd /mnt/$disk
    n=$(cat count)
    [ "$(md5sum <data.$n)" = "$(cat sum.$n)" ] && [ "$(cat many/$n/$n/file)" = $n ] && echo $n
done
"""


def counts(guest: HostGuest) -> list[int]:
    return [int(guest.exec(f"cat /mnt/{disk}/count || echo 0")) for disk in MAKERS]


def restore(appliance: Appliance, point: dict[str, Any], image: str) -> dict[str, Path]:
    """Restore a point, raw or qcow2: target -> path as seen outside of the host."""
    host = appliance.host
    directory = f"/var/tmp/{point['id']}-{image}"
    words = ("--point", point["id"], "--format", image, "-o", directory)
    report = appliance.json("restore", *words, "vm15")
    upper = host.spec.directory / "upper"
    return {disk["target"]: Path(f"{upper}{disk['path']}") for disk in report["disks"]}


def needs_journal(image: Path) -> bool:
    """Say whether what is on the disk is whole only together with the journal of ext4."""
    return "needs_recovery" in run(["dumpe2fs", "-h", image])


def test_frozen_file_systems_are_clean(appliance: Appliance) -> None:
    host = appliance.host
    images = {}
    for target, make in MAKERS.items():
        image = make(appliance.lab.directory / f"vm15-{target}.qcow2")
        host.copy_in(image, IMAGES)
        image.unlink()
        images[target] = f"{IMAGES}/{image.name}"
    guest = HostGuest(host, "vm15", images)
    appliance.configure("vm15")
    guest.start()
    for target in MAKERS:
        assert f"lab: mounted {target}" in guest.console()
    guest.exec(WRITER)
    wait_until(lambda: min(counts(guest)) > 3, "work of the guest", 60)
    points = []
    for number in range(2):
        before = counts(guest)
        points.append(appliance.save("vm15"))
        assert points[-1]["consistency"] == "filesystem"
        assert points[-1]["level"] == ("inc" if number else "full")
        assert guest.freeze_log() == ["freeze", "thaw"] * (number + 1)
        assert not guest.is_frozen()
        # it was not held for long, and goes on
        wait_until(lambda: min(counts(guest)) > max(before), "more work of the guest", 60)  # noqa: B023
    appliance.configure("vm15", freeze__policy="never")
    crash = appliance.save("vm15")
    assert crash["consistency"] == "crash"
    assert guest.freeze_log() == ["freeze", "thaw"] * 2
    guest.destroy()

    for point in points:
        image = restore(appliance, point, "raw")["vda"]
        assert not needs_journal(image)
        run(["e2fsck", "-f", "-n", image])
    # not so by itself
    assert needs_journal(restore(appliance, crash, "raw")["vda"])

    # the files are whole, too, as a guest sees them that boots from the restored images
    inside = {target: f"/var/tmp/{points[-1]['id']}-qcow2/{path.name}"
              for target, path in restore(appliance, points[-1], "qcow2").items()}  # fmt: skip
    host.run("chmod", "755", f"/var/tmp/{points[-1]['id']}-qcow2")
    copy = HostGuest(host, "copy", inside)
    copy.start()
    assert len([int(word) for word in copy.exec(READER).split()]) == 2
    # a frozen xfs keeps counters of its superblock in the log, so it must be mounted once
    copy.shutdown()
    copy.virsh("undefine", "copy")  # else it counts as unprotected
    raw = "/var/tmp/copy.raw"
    host.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", inside["vdb"], raw)
    run(["xfs_repair", "-n", host.spec.directory / f"upper{raw}"])
