"""Domains that libvirt forgets when they end, with libvirt's real hook: ours."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.source import kept
from tests.lab.command import LabError, run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import open_pid_file, wait_until
from tests.lib.pages import TOP
from tests.lib.scene import WARNED, Saved, Scene, scene, scene_of, tree
from tests.lib.told import told

pytestmark = pytest.mark.system
KIB = 1024
DISKS = [DiskSpec(target="vda", size=8 * MIB), DiskSpec(target="vdb", size=4 * MIB)]
DOMAIN = 20

WRAPPER = """#!/bin/sh
export NBDBACKUP_RUNTIME_DIR={runtime} NBDBACKUP_STATE_DIR={state}
export PATH={bin}:$PATH
echo "$@" >>{bin}/hooked
exec {top}/hooks/qemu "$@"
"""
SYSTEMCTL = """#!/bin/sh
[ "$1" != is-system-running ] || {{ echo running; exit; }}
for unit; do :; done
echo "$unit" >>{bin}/units
"""


class HookedLab(DaemonLab):
    """A libvirtd that calls our hook; what it would have systemd start is only noted."""

    def __init__(self) -> None:
        super().__init__()
        self.bin = self.directory / "b"
        self.bin.mkdir()
        self.runtime = self.directory / "run"
        words = {"runtime": self.runtime, "state": self.runtime, "top": TOP, "bin": self.bin}
        hooks = self.root / "etc/hooks/qemu.d"
        hooks.mkdir(parents=True)
        for path, text in ((hooks / "nbdbackup", WRAPPER), (self.bin / "systemctl", SYSTEMCTL)):
            path.write_text(text.format(**words))
            path.chmod(0o755)
        # it had no hooks when it started
        self.restart()

    def units(self, name: str) -> list[str]:
        """What systemd was asked to start for a domain since the last look."""
        path = self.bin / "units"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return [each.partition("@")[0] for each in found if each.endswith(f"@{name}.service")]


LAB = HookedLab


class TransientGuest:
    """Runs a guest without leaving libvirt a definition."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.xml = guest.places.images / f"define-{guest.places.monitor.stem}.xml"
        guest.virsh("undefine", "--domain", guest.name)

    def create(self) -> None:
        self.guest.virsh("create", "--file", self.xml)
        self.guest.adopt_process()
        assert self.guest.is_running()

    def is_known(self) -> bool:
        names = self.guest.virsh("list", "--all", "--name").split()
        return self.guest.name in names

    def wait_gone(self) -> None:
        wait_until(lambda: not self.is_known(), "the domain to be forgotten", 30)

    def quit(self) -> None:
        """End in order, as a guest that powers off."""
        process = self.guest.process()
        with suppress(LabError):
            self.guest.qmp("quit")
        assert process.wait(30)
        self.guest.close()
        self.wait_gone()


@dataclass(frozen=True)
class Appliance:
    """A transient guest and a configuration for it."""

    scene: Scene
    transient: TransientGuest
    directory: Path
    lab: HookedLab

    def argv(self, *options: str) -> tuple[str, ...]:
        return (self.scene.guest.name, "--config-dir", str(self.directory / "etc"), *options)

    def run(self, *options: str, code: int = 0) -> Any:
        return self.scene.ctl("run", *self.argv("--json", *options), code=code).json

    def save(self, *options: str, code: int = 0) -> Saved:
        """As the units do."""
        references = self.references()
        report = self.run(*options, code=code)
        assert report["result"] == "saved", report
        saved = Saved(set=Path(report["set"]), report=report["backup"], references=references)
        self.scene.history.append(saved)
        return saved

    def references(self) -> dict[str, Path]:
        """Copies of the disks, of qemu-img's making."""
        return self.scene.references()


@contextmanager
def appliance(lab: HookedLab, directory: Path) -> Iterator[Appliance]:
    options = GuestOptions(uuid=str(uuid.uuid4()))
    guest = lab.guest(f"t{uuid.uuid4().hex[:8]}", DISKS, options)
    here = scene_of(lab, directory, guest)
    here.ctl.runtime = lab.runtime
    document = {
        "repository": {"path": str(directory / "repository")},
        "scratch": {"directory": str(here.ctl.scratch), "reserve": "16M"},
        "checkpoint_directory": str(here.ctl.state),
        "on_shutdown": True,
    }
    (directory / "etc").mkdir()
    (directory / "etc/nbdbackup.yaml").write_text(json.dumps(document))
    transient = TransientGuest(guest)
    try:
        transient.create()
        guest.write("vda", 0, 2 * MIB, 0xEE)
        guest.write("vdb", 0, MIB, 0xDD)
        lab.units(guest.name)
        yield Appliance(here, transient, directory, lab)
    finally:
        guest.close()


@pytest.fixture
def one(lab: HookedLab, tmp_path: Path) -> Iterator[Appliance]:
    with appliance(lab, tmp_path) as found:
        yield found


def change(guest: Guest, number: int) -> None:
    guest.write("vda", number * 128 * KIB, 64 * KIB, number)
    guest.write_zeroes("vdb", number * 64 * KIB, 64 * KIB, unmap=True)


def test_a_true_increment_after_each_end(one: Appliance) -> None:
    here, guest = one.scene, one.scene.guest
    full = one.save()
    assert full.point["level"] == "full"
    for number, end in enumerate([guest.destroy, one.transient.quit], 1):
        change(guest, number)
        end()
        one.transient.wait_gone()
        assert one.lab.units(guest.name) == ["nbdbackup-offline"]
        off = one.save("--shutdown")
        assert off.modes == {"vda": "delta", "vdb": "delta"}
        assert off.disk("vda")["data_bytes"] == 64 * KIB
        assert off.point["consistency"] == ("crash" if number == 1 else "offline")
        assert list(here.bitmaps_off("vda")) == [off.point["checkpoint"]]
        # nothing more to be saved, and nothing that anybody else did
        again = one.run("--shutdown")
        why = "nothing has changed since the newest point"
        assert (again["result"], again["reason"]) == ("skipped", why)

        one.transient.create()
        assert one.lab.units(guest.name) == ["nbdbackup-checkpoints"]
        # libvirt has forgotten all checkpoints, and is told again by the unit
        assert here.checkpoints() == []
        here.ctl("checkpoints", guest.name, "--repair", "--started")
        assert here.checkpoints() == [off.point["checkpoint"]]
        change(guest, number + 10)
        on = one.save()
        assert on.modes == {"vda": "delta", "vdb": "delta"}
        assert on.point["parent"] == off.id
        assert on.disk("vda")["data_bytes"] == 64 * KIB
    here.prove_all()


def test_by_hand_and_by_uuid(one: Appliance) -> None:
    here, guest = one.scene, one.scene.guest
    into = here.directory / "set"
    here.save()
    change(guest, 1)
    guest.destroy()
    one.transient.wait_gone()
    references = here.references()
    for name, amount in ((guest.name, 64 * KIB), (guest.options.uuid or "", 0)):
        report = here.ctl.backup(name, into)
        saved = Saved(set=into, report=report, references=references)
        assert saved.modes == {"vda": "delta", "vdb": "delta"}
        assert saved.disk("vda")["data_bytes"] == amount
        here.history.append(saved)
    shown = here.ctl("checkpoints", guest.name, "--json").json
    assert [each["state"] for each in shown["checkpoints"]] == ["base"]
    # H-2: so does a timer's run, into the set of the configuration
    assert here.ctl("run", *one.argv("--json")).json["backup"]["result"] == "saved"
    here.prove_all()


def test_images_that_somebody_used_meanwhile_are_left_alone(one: Appliance) -> None:
    """As they are if it was started on another host."""
    here, guest = one.scene, one.scene.guest
    one.save()
    change(guest, 1)
    guest.destroy()
    one.transient.wait_gone()
    before = tree(one.directory / "repository")
    image = here.guest.image("vda")
    kept = image.stat()
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 64k", image])
    said = here.ctl("run", *one.argv("--shutdown"), code=DOMAIN).stderr
    assert f"image {image} was written to: it may run on another host" in said
    copy = image.with_name("copy.qcow2")
    image.rename(copy)
    run(["cp", copy, image])
    os.utime(image, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    said = here.ctl("run", *one.argv("--shutdown"), code=DOMAIN).stderr
    assert f"image {image} was replaced" in said
    copy.rename(image)
    assert tree(one.directory / "repository") == before
    # here it can be saved again, and it is: what was written has gone through the bitmap
    one.transient.create()
    saved = one.save()
    assert saved.modes == {"vda": "delta", "vdb": "delta"}
    here.prove_all()


def test_ends_that_are_none(one: Appliance, tmp_path: Path) -> None:
    here, guest = one.scene, one.scene.guest
    one.save()
    change(guest, 1)
    lab = one.lab
    state = tmp_path / "saved"
    lab.virsh("save", "--domain", guest.name, "--file", state)
    one.transient.wait_gone()
    assert lab.units(guest.name) == []
    for verb in (("run", *one.argv("--shutdown")), ("backup", guest.name, "-o", here.set)):
        done = here.ctl(*verb, code=None)
        assert "its state was saved" in done.stdout + done.stderr
        assert done.code == (0 if verb[0] == "run" else DOMAIN)
    lab.virsh("restore", "--file", state)
    guest.adopt_process()
    lab.units(guest.name)
    # defined while it runs, ended, undefined: gone for good
    lab.virsh("define", one.transient.xml)
    guest.destroy()
    assert lab.units(guest.name) == ["nbdbackup-offline"]
    saved = one.save("--shutdown")
    assert saved.modes == {"vda": "delta", "vdb": "delta"}
    assert "no backup job" in here.ctl("abort", guest.name).stdout
    silent = here.ctl("abort", "--quiet", guest.name)
    assert (silent.stdout, silent.stderr) == ("", "")
    lab.virsh("undefine", "--checkpoints-metadata", "--domain", guest.name)
    assert "it was undefined" in one.run("--shutdown")["reason"]
    # nor does what the units run after a run say anything where there is nothing
    here.ctl("abort", guest.name, code=DOMAIN)
    silent = here.ctl("abort", "--quiet", guest.name)
    assert (silent.stdout, silent.stderr) == ("", "")
    # a unit that systemd starts so late has nothing to do
    here.ctl("checkpoints", guest.name, "--repair", code=DOMAIN)
    assert here.ctl("checkpoints", guest.name, "--repair", "--started").stdout == "nothing to do\n"
    here.prove_all()


def test_qemu_is_killed(one: Appliance) -> None:
    """Its bitmaps are looked at and nothing is saved that trusts them; nor is anything lost."""
    here, guest = one.scene, one.scene.guest
    one.save()
    guest.destroy()
    one.transient.wait_gone()
    off = one.run("--shutdown")
    assert off["result"] == "skipped"
    one.transient.create()
    one.lab.units(guest.name)
    change(guest, 1)
    process = open_pid_file(guest.places.pid_file)
    assert process is not None
    with process:
        process.kill()
    guest.close()
    one.transient.wait_gone()
    assert one.lab.units(guest.name) == ["nbdbackup-checkpoints"]
    report = here.ctl("checkpoints", guest.name, "--repair", "--started", "--json").json
    assert [(each["action"], each["problem"]) for each in report["steps"]] == [("remove", "")]
    assert here.bitmaps_off("vda") == here.bitmaps_off("vdb") == {}
    saved = one.save("--shutdown", code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "full"}
    one.transient.create()
    change(guest, 2)
    last = one.save()
    assert last.modes == {"vda": "delta", "vdb": "delta"}
    here.prove_all()


def test_somebody_wrote_to_images_of_a_domain_that_stays(lab: HookedLab, tmp_path: Path) -> None:
    """libvirt knows it, so that is told, and what was written is in the increment."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    name = f"p{uuid.uuid4().hex[:8]}"
    with scene(lab, tmp_path, name, DISKS, options) as here:
        here.ctl.runtime = lab.runtime
        here.guest.write("vda", 0, MIB, 1)
        here.save()
        here.guest.stop()
        # at the time when the hook is called libvirt does not say "shut off" yet
        found = kept.read(lab.runtime, name)
        assert found is not None
        wait_until(lambda: bool(list((lab.runtime / "xml").glob(f"{name}.end"))), "the hook", 30)
        assert "images-changed" not in told(here.save("-v").stderr)
        image = here.guest.image("vda")
        run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 64k", image])
        checked = here.ctl("check", name, "-o", here.set, code=None).stdout
        assert f"image {image} was written to" in checked
        saved = here.save("-v")
        assert "images-changed" in told(saved.stderr)
        assert saved.disk("vda")["data_bytes"] == 64 * KIB
        # once
        assert "images-changed" not in told(here.save("-v").stderr)
        here.prove_all()
