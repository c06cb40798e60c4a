"""A whole domain comes back beside the original, and shares nothing with it."""

import contextlib
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.lab.base import Lab
from tests.lab.command import LabError, run
from tests.lab.disks import MIB, DiskSpec, create_image
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.altered import altered
from tests.lib.ctl import PYTHON, ROOT
from tests.lib.scene import Saved, Scene, assert_same, scene

pytestmark = pytest.mark.system
LAB = EmbeddedLab

UUID = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
DEVICES = """
<interface type='user'>
  <mac address='52:54:00:aa:bb:cc'/><model type='virtio'/>
</interface>
<graphics type='vnc' socket='{directory}/vnc'/>
<channel type='unix'>
  <source mode='bind' path='{directory}/agent'/>
  <target type='virtio' name='org.qemu.guest_agent.0'/>
</channel>
<serial type='file'>
  <source path='{directory}/console'/><log file='{directory}/log' append='on'/>
</serial>
<shmem name='{name}'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>
"""
CARD = """
<hostdev mode='subsystem' type='pci' managed='yes'>
  <source><address domain='0x0000' bus='0x77' slot='0x00' function='0x0'/></source>
</hostdev>
"""


@pytest.fixture(scope="module")
def production(lab: EmbeddedLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A running domain with much that a clone must not share, and one point of it."""
    directory = tmp_path_factory.mktemp("odd 'name' & \"more\"")
    template = DiskSpec(path=directory / "template.qcow2", size=16 * MIB)
    assert template.path is not None
    create_image(template, template.path)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", template.path])
    iso = directory / "medium.iso"
    iso.write_bytes(b"medium" * 4096)
    disks = (
        DiskSpec(size=16 * MIB, path=directory / "system disk.qcow2", backing=template.path),
        DiskSpec(target="vdb", size=16 * MIB + 512, format="raw"),
        DiskSpec(target="vdc", size=8 * MIB),
        DiskSpec(target="hdc", device="cdrom", path=iso, format="raw"),
    )
    options = GuestOptions(
        uuid=UUID,
        extra_devices=DEVICES.format(
            directory=lab.directory, name=f"nbdbackup-{lab.directory.name}"
        ),
    )
    with scene(lab, directory, "vm1", disks, options) as found:
        found.guest.write("vda", 3 * MIB, MIB, 5)
        found.guest.write("vdb", 0, MIB, 6)
        found.save("--raw", "--freeze", "never")  # nobody answers at its channel
        found.guest.write("vda", 4 * MIB, MIB, 8)
        found.save("--raw", "--freeze", "never")  # nobody answers at its channel
        yield found


def digests(scene: Scene) -> dict[str, str]:
    """Sums of all images of the original, and its definition."""
    files = [path for path in scene.directory.iterdir() if path.is_file()]
    files += [scene.guest.image(target) for target in ("vdb", "vdc")]
    found = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {**found, "xml": scene.lab.virsh("dumpxml", "vm1", "--inactive")}


def undefine(lab: Lab, name: str) -> None:
    """End and forget a domain that a test has made."""
    end(lab, name)
    lab.virsh("undefine", name)


def end(lab: Lab, name: str) -> None:
    """End it; the embedded driver may say that it is off already when it has just ended it."""
    if name in running(lab):
        with contextlib.suppress(LabError):
            lab.virsh("destroy", name)
        wait_until(lambda: name not in running(lab), "its end", 20)


@pytest.fixture(autouse=True)
def forgotten(production: Scene) -> Iterator[None]:
    """No test leaves a domain to the next one."""
    yield
    for name in names(production.lab) - {"vm1", "vm2", "vm3"}:
        undefine(production.lab, name)


def names(lab: Lab) -> set[str]:
    return set(lab.virsh("list", "--all", "--name").split("\n")) - {""}


def running(lab: Lab) -> set[str]:
    return set(lab.virsh("list", "--name").split("\n")) - {""}


def restore(scene: Scene, into: Path, *options: str, code: int = 3) -> Any:
    result = scene.ctl("restore", scene.set, "-o", into, "--json", *options, code=code)
    return result.json


def refuse(scene: Scene, into: Path, *options: str, code: int) -> str:
    """Have a restore refused before anything is written; return why."""
    before = names(scene.lab)
    result = scene.ctl("restore", scene.set, "-o", into, "--define", *options, code=code)
    left = [path for path in into.rglob("*") if path.is_file()] if into.exists() else []
    assert left == []
    assert names(scene.lab) == before
    (line,) = result.stderr.splitlines()
    return line


def prove(saved: Saved, report: Any) -> None:
    """Compare the restored disks with what they were."""
    for disk in report["disks"]:
        assert_same(Path(disk["path"]), disk["format"], saved.references[disk["target"]])


def test_a_clone_runs_beside_the_original(production: Scene, tmp_path: Path) -> None:
    lab, before = production.lab, digests(production)
    into = tmp_path / 'restored "it"s & <all>'
    report = restore(production, into, "--define")
    told = report["definition"]
    assert (told["name"], told["defined"], told["started"]) == ("restore_vm1", True, False)
    assert told["uuid"] != UUID
    # QEMU's own words are the lab's monitor, which two can't have
    assert [text for text in report["warnings"] if "qemu:commandline" in text]
    prove(production.history[-1], report)
    original = lab.virsh("dumpxml", "vm1", "--inactive", "--security-info")
    clone = lab.virsh("dumpxml", "restore_vm1", "--inactive", "--security-info")
    assert_private(original, clone)
    images = {disk["target"]: disk["path"] for disk in report["disks"]}
    for target, path in images.items():
        element = ET.fromstring(clone).find(f"./devices/disk/target[@dev='{target}']/../source")
        assert element is not None
        assert element.get("file") == path
    assert re.search("Autostart: *disable", lab.virsh("dominfo", "restore_vm1"))
    assert lab.virsh("checkpoint-list", "--name", "--domain", "restore_vm1").strip() == ""
    assert len(production.checkpoints()) == 1

    lab.virsh("start", "restore_vm1")
    assert running(lab) == {"vm1", "restore_vm1"}
    live = lab.virsh("dumpxml", "restore_vm1")
    assert_private(lab.virsh("dumpxml", "vm1"), live)
    undefine(lab, "restore_vm1")
    assert digests(production) == before


def assert_private(original: str, clone: str) -> None:
    """Nothing that names one of a kind is in both: files, MAC, UUID."""

    def singular(text: str) -> set[str]:
        root = ET.fromstring(text)
        found = {each.get("address") for each in root.iter("mac")}
        found |= {root.findtext("uuid"), root.findtext("name")}
        for each in root.iter():
            values = [*each.attrib.values(), each.text or ""]
            found |= {value.strip() for value in values if value.strip().startswith("/")}
        found |= {each.get("name") for each in root.iter("shmem")}
        return {text for text in found if text}

    shared = singular(original) & singular(clone)
    # programs (the emulator, what the lab has it load), and the control group of all domains; a
    # live XML tells where consoles are
    common = ("/usr/", "/dev/pts/", "/machine")
    assert {text for text in shared if not text.startswith(common)} == set()


def test_start_of_one_disk(production: Scene, tmp_path: Path) -> None:
    """Disks that are not restored are not there; MAC and network as asked."""
    report = restore(
        production, tmp_path / "r", "--define", "--start", "--name", "other", "-d", "vda",
        "--network", "none", "--media", "keep", "--trust-definition", "--format", "raw",
    )  # fmt: skip
    assert report["definition"]["started"]
    assert "other" in running(production.lab)
    root = ET.fromstring(production.lab.virsh("dumpxml", "other", "--inactive"))
    disks = root.findall("./devices/disk")
    assert [disk.get("device") for disk in disks] == ["disk", "cdrom"]
    driver = disks[0].find("driver")
    assert driver is not None
    assert driver.get("type") == "raw"
    # two may read one medium
    medium = disks[1].find("source")
    assert medium is not None
    assert medium.get("file") == str(production.directory / "medium.iso")
    assert root.findall("./devices/interface") == []
    assert sum("is not restored" in text for text in report["warnings"]) == 2
    undefine(production.lab, "other")


def test_what_is_there_is_refused(production: Scene, tmp_path: Path) -> None:
    into = tmp_path / "r"
    assert "a domain vm1 exists" in refuse(production, into, "--name", "vm1", code=20)
    trust = "--trust-definition"
    same = refuse(production, into, "--keep-identity", "--name", "new", trust, code=20)
    assert f"domain vm1 at {production.lab.uri} has UUID {UUID}" in same
    assert "can't be the name" in refuse(production, into, "--name", "a/b", code=2)
    shared = refuse(production, into, "-d", "vda", "--other-disks", "keep", trust, code=20)
    assert f"disk vdb {production.guest.image('vdb')} is disk vdb of domain vm1" in shared
    alone = production.ctl("restore", production.set, "-o", into, "--start", code=2)
    assert "--define" in alone.stderr


def test_images_of_others_are_refused(production: Scene, tmp_path: Path) -> None:
    """By another name of the file, as the template of a domain that is off, or of a snapshot."""
    lab = production.lab
    into = tmp_path / "r"
    into.mkdir(0o755)
    images = {"vda": "system disk.qcow2", "vdb": production.guest.image("vdb").name}
    for target, name in images.items():
        link = into / name
        link.symlink_to(production.guest.image(target))
        before = digests(production)
        result = production.ctl(
            "restore", production.set, "-o", into, "--define", "--force", "-d", target, code=20
        )
        assert f"is disk {target} of domain vm1" in result.stderr
        assert digests(production) == before
        link.unlink()
    # hard links, and images below others: only the images themselves tell
    template = DiskSpec(path=tmp_path / "base.qcow2", size=MIB)
    assert template.path is not None
    create_image(template, template.path)
    lab.guest("vm2", [DiskSpec(size=MIB, backing=template.path)])
    (into / images["vda"]).hardlink_to(template.path)
    result = production.ctl(
        "restore", production.set, "-o", into, "--define", "--force", "-d", "vda", code=20
    )
    assert "is disk vda, backing file of domain vm2" in result.stderr
    assert template.path.stat().st_nlink == 2
    # what a guest has written into a raw image is not believed
    (into / images["vda"]).unlink()
    claimed, raw = DiskSpec(path=tmp_path / "claimed", size=MIB), tmp_path / "raw"
    assert claimed.path is not None
    create_image(claimed, claimed.path)
    create_image(DiskSpec(size=MIB, backing=claimed.path), raw)
    lab.guest("vm3", [DiskSpec(path=raw, format="raw")])
    (into / images["vda"]).hardlink_to(claimed.path)
    production.ctl(
        "restore", production.set, "-o", into, "--define", "--force", "-d", "vda", code=3
    )


def test_a_failed_restore_defines_nothing(production: Scene, tmp_path: Path) -> None:
    """A bit, a missing layer, no space, a kill: there is no domain afterwards."""
    lab, ctl = production.lab, production.ctl
    before = names(lab)
    damaged, lost = tmp_path / "damaged", tmp_path / "lost"
    shutil.copytree(production.set, damaged)
    shutil.copytree(production.set, lost)
    stream = next(damaged.glob("vda.full.data"))
    data = bytearray(stream.read_bytes())
    data[len(data) // 2] ^= 1
    stream.write_bytes(data)
    next(lost.glob("vda.full.data")).unlink()
    into = tmp_path / "r"
    words = ("-o", into, "--define", "--start")
    ctl("restore", damaged, *words, code=40)
    ctl("restore", lost, *words, code=40)
    for fault, code in (
        ("NOSPACE@side-files-copied#1", 50),
        ("TERM@side-files-copied#1", 143),
        ("KILL@os-rename#1", -9),
    ):
        with ctl.rigged(fault):
            ctl("restore", production.set, *words, code=code)
        assert names(lab) == before, fault
        assert not list(into.glob("*.adjusted.xml")), fault
    with ctl.rigged("KILL@domain-defined#1"):
        ctl("restore", production.set, *words, "--force", code=-9)
    assert names(lab) == before
    # all is complete, and the definition can be used by hand
    lab.virsh("define", into / "restore_vm1.adjusted.xml")
    lab.virsh("start", "restore_vm1")


def test_libvirt_refuses_at_once(production: Scene, tmp_path: Path) -> None:
    """What libvirt can't run is found before the first byte, not after the last."""
    changed = altered(
        production, tmp_path / "set", lambda xml: xml.replace("bus='virtio'", "bus='bogus'", 1)
    )
    result = production.ctl("restore", changed, "-o", tmp_path / "r", "--define", code=20)
    assert "libvirt does not take the definition" in result.stderr
    assert [path for path in (tmp_path / "r").rglob("*") if path.is_file()] == []


def test_another_host(production: Scene, tmp_path: Path) -> None:
    """Its emulator lies elsewhere, and it does not know the machine type."""

    def change(xml: str) -> str:
        xml = xml.replace("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm")
        return re.sub(r"machine='pc-i440fx-[\d.]+'", "machine='pc-i440fx-99.9'", xml)

    changed = altered(production, tmp_path / "set", change)
    report = production.ctl(
        "restore", changed, "-o", tmp_path / "r", "--define", "--start", "--json", code=3
    ).json
    assert [text for text in report["warnings"] if "pc-i440fx-99.9 is not known here" in text]
    assert [text for text in report["definition"]["changes"] if "/usr/libexec/qemu-kvm" in text]
    assert report["definition"]["started"]
    undefine(production.lab, "restore_vm1")


def test_adjusted_without_libvirt(production: Scene, tmp_path: Path) -> None:
    """The same XML, and libvirt is not even imported."""
    into = tmp_path / "r"
    hide = (
        "import sys; sys.modules['libvirt'] = None\n"
        "from nbdbackupd.app.ctl import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ("restore", production.set, "-o", into, "--adjust-config", "--name", "vm7")
    done = subprocess.run(
        [PYTHON, "-c", hide, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    config = into / "vm7.adjusted.xml"
    assert config.stat().st_mode & 0o777 == 0o600
    assert "vm7" not in names(production.lab)
    production.lab.virsh("define", config)
    original = production.lab.virsh("dumpxml", "vm1", "--inactive", "--security-info")
    assert_private(original, production.lab.virsh("dumpxml", "vm7", "--inactive"))
    undefine(production.lab, "vm7")


def test_the_very_machine_again(lab: EmbeddedLab, tmp_path: Path) -> None:
    """The original is gone: its identity comes back, but for its generation."""
    options = GuestOptions(extra_devices=DEVICES.format(directory=tmp_path, name="m"))
    with scene(lab, tmp_path, "lost", [DiskSpec(size=8 * MIB)], options) as lost:
        lost.guest.write("vda", 0, MIB, 1)
        xml = tmp_path / "genid.xml"
        text = lab.virsh("dumpxml", "lost", "--inactive").replace("<memory ", "<genid/><memory ", 1)
        xml.write_text(text.replace("</devices>", f"{CARD}</devices>"))
        lab.virsh("define", xml)
        saved = lost.save("--freeze", "never")
        original = ET.fromstring(lab.virsh("dumpxml", "lost", "--inactive"))
        lost.guest.destroy()
        for name in lost.checkpoints():
            lab.virsh("checkpoint-delete", "lost", name, "--metadata")
        lab.virsh("undefine", "lost")
        words = ("--define", "--keep-identity")
        asked = lost.ctl("restore", lost.set, "-o", tmp_path / "r", *words, code=2).stderr
        for each in ("hostdev", f"{tmp_path}/console", "qemu:env", "--trust-definition"):
            assert each in asked
        assert "lost" not in names(lab)
        report = restore(lost, tmp_path / "r", *words, "--trust-definition", code=0)
        assert [line for line in report["definition"]["changes"] if "kept: hostdev" in line]
        again = ET.fromstring(lab.virsh("dumpxml", "lost", "--inactive"))
        for path in ("name", "uuid"):
            assert again.findtext(path) == original.findtext(path)
        # it comes back defined: whether this host has the device, only a start can tell
        assert len(again.findall("./devices/hostdev")) == 1
        assert mac(again) == mac(original) == "52:54:00:aa:bb:cc"
        assert again.findtext("genid") != original.findtext("genid") != None  # noqa: E711
        assert report["definition"]["name"] == "lost"
        prove(saved, report)
        # the chain goes on, and nothing that bitmaps said once is believed
        again_saved = lost.ctl.backup("lost", lost.set, code=3)["point"]
        assert (again_saved["level"], again_saved["parent"]) == ("inc", saved.id)
        (disk,) = again_saved["disks"]
        assert disk["mode"] == "full"
        assert disk["reason"]
        prove(saved, restore(lost, tmp_path / "later", code=0))
        lab.virsh("checkpoint-delete", "lost", again_saved["checkpoint"], "--metadata")


def mac(root: ET.Element) -> str | None:
    element = root.find("./devices/interface/mac")
    return element.get("address") if element is not None else None


def test_a_start_that_fails(production: Scene, tmp_path: Path) -> None:
    """It says what stands, and that can be used."""

    def change(xml: str) -> str:
        # QEMU finds out: no such file
        return xml.replace("<boot dev='hd'/>", "<kernel>/nonexistent/kernel</kernel>")

    changed = altered(production, tmp_path / "set", change)
    result = production.ctl(
        "restore", changed, "-o", tmp_path / "r", "--define", "--start", "--trust-definition",
        code=20,
    )  # fmt: skip
    assert "domain restore_vm1 is defined, and its images are complete" in result.stderr
    assert "restore_vm1" in names(production.lab)
    with pytest.raises(LabError):
        production.lab.virsh("start", "restore_vm1")
    undefine(production.lab, "restore_vm1")
