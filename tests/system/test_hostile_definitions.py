"""Sets whose definitions are hostile, restored and booted for real: nothing of them is run.

The digests of such a set are right: whoever could write to it wrote them, too. What it names lies
in a directory of canaries: programs that leave a trace when they are run, files whose owner libvirt
would change.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from nbdbackupd.model.chain import StoredFile
from tests.lab.command import LabError
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec, create_image
from tests.lab.process import wait_until
from tests.lib.altered import altered
from tests.lib.scene import Scene, scene

pytestmark = pytest.mark.system

WARNED: Final = 3
CLONE: Final = "restore_vm1"
QEMU: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
SECRET: Final = b"a secret of the host\n"


@dataclass(frozen=True)
class Canaries:
    """Programs and files of the host that no set may touch."""

    directory: Path

    def make(self) -> None:
        """Make them, and the place where a trace would be."""
        self.directory.mkdir(mode=0o755)
        self.traces.mkdir()
        self.traces.chmod(0o777)
        for name in ("script", "emulator", "virtiofsd"):
            program = self.directory / name
            program.write_text(f"#!/bin/sh\nid -u > {self.traces}/{name}.$$\nexit 1\n")
            program.chmod(0o755)
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)

    @property
    def traces(self) -> Path:
        return self.directory / "traces"

    @property
    def secret(self) -> Path:
        return self.directory / "secret"

    def assert_untouched(self) -> None:
        """Nothing was run, made or given away."""
        assert list(self.traces.iterdir()) == []
        status = self.secret.stat()
        assert (status.st_uid, status.st_mode & 0o777) == (0, 0o600)
        assert self.secret.read_bytes() == SECRET


@pytest.fixture(scope="module")
def production(lab: DaemonLab) -> Iterator[Scene]:
    directory = lab.directory / "w"
    directory.mkdir(mode=0o755)
    with scene(lab, directory, "vm1", [DiskSpec(size=4 * MIB)]) as made:
        made.save()
        yield made


@pytest.fixture
def canaries(lab: DaemonLab) -> Iterator[Canaries]:
    found = Canaries(lab.directory / f"canaries-{time.monotonic_ns()}")
    found.make()
    yield found
    for name in {*lab.virsh("list", "--all", "--name").split()} - {"vm1"}:
        forget(lab, name)


@pytest.fixture
def out(lab: DaemonLab) -> Path:
    """Where images go: QEMU has to get there."""
    path = lab.directory / f"out-{time.monotonic_ns()}"
    path.mkdir(mode=0o711)
    return path


def forget(lab: DaemonLab, name: str) -> None:
    if name in lab.virsh("list", "--name").split():
        lab.virsh("destroy", name)
    if name in lab.virsh("list", "--all", "--name").split():
        lab.virsh("undefine", name)


def hostile(canaries: Canaries) -> Callable[[str], str]:
    """S-1 to S-3 and their kind, in one definition."""
    here, secret = canaries.directory, canaries.secret
    devices = f"""
      <interface type='ethernet'><mac address='52:54:00:00:00:77'/>
        <script path='{here}/script'/><target dev='canary0'/><model type='virtio'/>
        <rom file='{secret}'/></interface>
      <filesystem type='mount' accessmode='passthrough'><driver type='virtiofs'/>
        <binary path='{here}/virtiofsd'/><source dir='/'/><target dir='all'/></filesystem>
      <filesystem type='mount'><source dir='{here}'/><target dir='ro'/><readonly/></filesystem>
      <serial type='file'><source path='{canaries.traces}/serial'/></serial>
      <console type='pty'><log file='{canaries.traces}/log'/><target type='virtio'/></console>
      <disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
        <source file='{secret}'/><target dev='sdz' bus='scsi'/><readonly/></disk>
      <rng model='virtio'><backend model='random'>{secret}</backend></rng>
      <hostdev mode='capabilities' type='storage'><source><block>/dev/sda</block></source></hostdev>
    """
    system = f"""
      <kernel>{secret}</kernel><initrd>{secret}</initrd><dtb>{secret}</dtb>
      <acpi><table type='slic'>{secret}</table></acpi>
    """
    rest = f"""
      <sysinfo type='fwcfg'><entry name='opt/canary' file='{secret}'/></sysinfo>
      <seclabel type='static' model='dac' relabel='no'><label>+0:+0</label></seclabel>
      <seclabel type='none' model='selinux'/><on_crash>coredump-restart</on_crash>
      <q:commandline xmlns:q='{QEMU}'><q:arg value='-chardev'/>
        <q:arg value='file,id=canary,path={canaries.traces}/arg'/>
        <q:env name='LD_PRELOAD' value='{here}/canary.so'/></q:commandline>
    """

    def change(xml: str) -> str:
        xml = re.sub(r"<emulator>.*?</emulator>", f"<emulator>{here}/emulator</emulator>", xml)
        xml = re.sub(r"<on_crash>.*?</on_crash>", "", xml)
        xml = xml.replace("</os>", f"{system}</os>")
        return xml.replace("</devices>", f"{devices}</devices>").replace(
            "</domain>", f"{rest}</domain>"
        )

    return change


def processes(name: str) -> list[Path]:
    """The QEMU processes of a domain."""
    word = f"guest={name},".encode()
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                if word in (each / "cmdline").read_bytes():
                    found.append(each)
            except OSError:
                continue
    return found


def test_a_hostile_definition_is_restored(
    production: Scene, lab: DaemonLab, canaries: Canaries, out: Path
) -> None:
    """S-1, S-2, S-3: defined and started, and nothing that the set names has run or was read."""
    changed = altered(production, canaries.directory / "set", hostile(canaries))
    words = ("restore", changed, "-o", out, "--define", "--start")
    result = production.ctl(*words, "--json", code=WARNED)
    canaries.assert_untouched()
    warnings = result.json["warnings"]
    for word in (
        "script", "+0:+0", "LD_PRELOAD", "emulator", "sysinfo/entry", "on_crash", "rom file",
        "os/dtb", "os/acpi", "kernel", "shared directory all", "shared directory ro",
    ):  # fmt: skip
        assert [line for line in warnings if word in line], word
    assert [line for line in warnings if "is not what this host wrote" in line]
    (qemu,) = processes(CLONE)
    assert qemu.stat().st_uid != 0
    assert b"canar" not in (qemu / "environ").read_bytes() + (qemu / "cmdline").read_bytes()
    assert "canar" not in lab.virsh("dumpxml", CLONE).replace(str(out), "")
    assert not Path("/sys/class/net/canary0").exists()
    config = Path(result.json["definition"]["config"])
    assert str(canaries.directory) not in config.read_text().replace(str(out), "")


def test_a_hostile_definition_is_not_booted(
    production: Scene, lab: DaemonLab, canaries: Canaries
) -> None:
    """S-1: refused by ``boot`` and by the boot test, which runs by itself."""
    changed = altered(production, canaries.directory / "set", hostile(canaries))
    refused = production.ctl("boot", changed, "--detach", code=20).stderr
    assert "LD_PRELOAD" in refused
    assert "--trust-definition" in refused
    test = ("verify", changed, "--boot", "--boot-only", "--boot-wait", "console:x")
    refused = production.ctl(*test, "--scratch-dir", production.ctl.scratch, code=40).stderr
    assert "is not what this host wrote" in refused
    canaries.assert_untouched()
    assert lab.virsh("list", "--all", "--name").split() == ["vm1"]
    assert not list((production.ctl.scratch / "boot").glob("*/*.json"))
    # a host that has noted nothing of it
    other = canaries.directory / "state"
    words = ("--scratch-dir", production.ctl.scratch, "--checkpoint-dir", other)
    refused = production.ctl(*test, *words, code=20).stderr
    assert "names what is not its own" in refused
    canaries.assert_untouched()


def test_the_same_machine_is_asked_about(
    production: Scene, lab: DaemonLab, canaries: Canaries, out: Path
) -> None:
    """S-1: ``--keep-identity`` does not keep what nobody has agreed to, nor tries it out."""
    changed = altered(production, canaries.directory / "set", hostile(canaries))
    words = ("--keep-identity", "--name", "again")
    for how in ("--define", "--adjust-config"):
        asked = production.ctl("restore", changed, "-o", out, how, *words, code=2).stderr
        for each in ("script", "+0:+0", "LD_PRELOAD", "emulator", "virtiofsd", "hostdev"):
            assert each in asked
    refused = production.ctl("boot", changed, *words, "--detach", code=2).stderr
    assert "LD_PRELOAD" in refused
    canaries.assert_untouched()
    assert list(out.iterdir()) == []
    assert lab.virsh("list", "--all", "--name").split() == ["vm1"]


@pytest.mark.parametrize("what", ["script", "emulator"])
def test_the_canaries_sing(
    production: Scene, lab: DaemonLab, canaries: Canaries, out: Path, what: str
) -> None:
    """S-2, S-3: who trusts the set has it run, so that the tests above can fail."""

    def change(xml: str) -> str:
        here = canaries.directory
        if what == "emulator":
            return re.sub(r"<emulator>.*?</emulator>", f"<emulator>{here}/emulator</emulator>", xml)
        card = f"<interface type='ethernet'><script path='{here}/script'/></interface>"
        return xml.replace("</devices>", f"{card}</devices>")

    changed = altered(production, canaries.directory / "set", change)
    words = ("restore", changed, "-o", out, "--define", "--start", "--trust-definition")
    production.ctl(*words, code=None)
    wait_until(lambda: bool(list(canaries.traces.iterdir())), "a trace", 20)
    assert {path.name.partition(".")[0] for path in canaries.traces.iterdir()} == {what}
    with pytest.raises(AssertionError):
        canaries.assert_untouched()
    with_start = {*lab.virsh("list", "--all", "--name").split()}
    assert with_start <= {"vm1", CLONE}


@pytest.mark.parametrize("kind", ["device", "pipe", "link", "elsewhere"])
def test_a_loader_that_is_no_loader(
    production: Scene, canaries: Canaries, out: Path, kind: str
) -> None:
    """S-4: neither the file in the set nor what it calls its origin is read for ever, or at all."""
    name, data = "loader.code.fd", b"firmware" * 1000
    pipe = canaries.directory / "pipe"
    os.mkfifo(pipe)
    origin = {"device": "/dev/zero", "pipe": str(pipe), "elsewhere": str(canaries.secret)}
    if kind == "elsewhere":
        data = SECRET
    digest = hashlib.sha256(data).hexdigest()
    stored = StoredFile(name, "loader", len(data), digest, origin.get(kind, "/dev/zero"))
    loader = "<loader readonly='yes' type='rom'>/dev/zero</loader>"

    def change(xml: str) -> str:
        return re.sub(r"(</type>)", rf"\1{loader}", xml, count=1)

    changed = altered(production, canaries.directory / "set", change, (stored, data))
    words = ("restore", changed, "-o", out, "--adjust-config")
    begun = time.monotonic()
    if kind == "link":
        (changed / name).unlink()
        (changed / name).symlink_to("/dev/zero")
        refused = production.ctl(*words, code=40).stderr
        assert "not a regular file" in refused
    else:
        production.ctl(*words, code=WARNED)
        text = (out / f"{CLONE}.adjusted.xml").read_text()
        assert f"{out}/config/loader/" in text
        assert "/dev/zero" not in text
    assert time.monotonic() - begun < 60
    canaries.assert_untouched()


def test_the_xml_is_no_file(production: Scene, canaries: Canaries, out: Path) -> None:
    """S-4: a pipe in the place of the definition is not waited for."""
    changed = altered(production, canaries.directory / "set", lambda xml: f"{xml}\n")
    (xml,) = changed.glob("vmconfig.*.xml")
    xml.unlink()
    os.mkfifo(xml)
    refused = production.ctl("restore", changed, "-o", out, "--adjust-config", code=40).stderr
    assert "not a regular file" in refused
    (xml).unlink()
    with pytest.raises(LabError):
        production.lab.virsh("dominfo", CLONE)


ORDINARY: Final = """
<domain type='qemu'><name>ordinary</name><title>a / b</title>
  <metadata><x:os xmlns:x='urn:x'>any/thing</x:os></metadata>
  <memory unit='MiB'>32</memory><vcpu placement='static' cpuset='0'>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><bootmenu enable='yes'/></os>
  <features><acpi/><apic/></features><clock offset='utc'><timer name='hpet' present='no'/></clock>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>
      <target dev='vda' bus='virtio'/><serial>a-1</serial></disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='pty'/><console type='pty'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <graphics type='vnc'/><video><model type='vga'/></video><sound model='ich9'/>
    <watchdog model='i6300esb' action='reset'/><memballoon model='virtio'/><panic model='isa'/>
  </devices>
</domain>
"""


def test_an_ordinary_domain_comes_back_without_a_word(
    production: Scene, lab: DaemonLab, canaries: Canaries, out: Path
) -> None:
    """Its XML is what libvirt told while it ran; nothing of it is left out or asked about."""
    image = canaries.directory / "a.qcow2"
    create_image(DiskSpec(size=4 * MIB), image)
    image.chmod(0o666)
    xml = canaries.directory / "ordinary.xml"
    xml.write_text(ORDINARY.format(image=image))
    lab.virsh("define", str(xml))
    lab.virsh("start", "ordinary")
    into = canaries.directory / "set"
    production.ctl("backup", "ordinary", "-o", into, "--freeze", "never")
    words = ("--define", "--start", "--json")
    clone = production.ctl("restore", into, "-o", out / "clone", *words).json
    assert clone["warnings"] == []
    same = ("--adjust-config", "--keep-identity")
    production.ctl("restore", into, "-o", out / "same", *same)
    production.ctl("boot", into, "--detach")
    production.ctl("boot", "--stop", "boot_ordinary")
    # the peer and other hosts note nothing here, and that is no reason to say anything
    production.ctl("verify", into, "--checkpoint-dir", canaries.directory / "state")
    for name in lab.virsh("checkpoint-list", "ordinary", "--name").split():
        lab.virsh("checkpoint-delete", "ordinary", name)
