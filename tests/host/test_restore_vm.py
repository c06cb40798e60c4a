"""Whole domains come back on real hosts, beside the original: firmware, TPM, chains, many disks."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.model import definition
from tests.lab.agent_guest import make_ext4
from tests.lab.disks import MIB
from tests.lab.host import Host
from tests.lab.hostguest import HostGuest, guest_binds
from tests.lab.hostlab import SHARED, HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lab.process import wait_until
from tests.lib.definitions import CLONE, PRODUCTION

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

TOP: Final = Path(__file__).parents[2]
SOURCE: Final = "/src"
PROGRAM: Final = (
    "env", f"PYTHONPATH={SOURCE}", "PYTHONDONTWRITEBYTECODE=1", "python3", "-m", "nbdbackupd",
)  # fmt: skip
IMAGES: Final = "/var/lib/libvirt/images"
TPM: Final = "/var/lib/libvirt/swtpm"
ACCOUNT: Final = 'swtpm_user = "tss"\nswtpm_group = "tss"'
FIRMWARE: Final = (
    "<os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type>"
    "<firmware><feature enabled='no' name='secure-boot'/></firmware></os>"
)
# TPM 2.0 library, part 3: NV_DefineSpace of 8 bytes at an index, with the owner's empty password
DEFINE_INDEX: Final = (
    "80 02 00 00 00 2d 00 00 01 2a 40 00 00 01 00 00 00 09 40 00 00 09 00 00 00 00 00 00 00 "
    "00 0e 01 50 00 {index:02x} 00 0b 00 04 00 04 00 00 00 08"
)
READ_PUBLIC: Final = "80 01 00 00 00 0e 00 00 01 69 01 50 00 {index:02x}"
DONE: Final = 0
BOOT_SECONDS: Final = 240.0


@pytest.fixture(scope="module", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lab(suite: str) -> Iterator[HostLab]:
    """One for each suite."""
    assert suite in SUITES
    with HostLab() as lab:
        yield lab


@pytest.fixture(scope="module")
def host(suite: str, lab: HostLab) -> Host:
    """A hypervisor with firmware and TPMs, and the program as it is here."""
    binds = {**guest_binds(), SOURCE: TOP}
    host = lab.host("lab-a", hypervisor(suite), readonly_binds=binds)
    host.apt("update")
    host.apt("install", "ovmf", "swtpm", "swtpm-tools", "python3-lz4", "python3-yaml")
    # the TPM's account is another one than ours and QEMU's
    host.run("sh", "-c", f"echo '{ACCOUNT}' >>/etc/libvirt/qemu.conf")
    host.run("systemctl", "restart", "libvirtd")
    return host


def ctl(host: Host, *words: str, code: int = 0) -> Any:
    """Run the program of the checkout in a host; return its document."""
    done = host.call(*PROGRAM, "--json", *words, timeout_seconds=100)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return json.loads(done.stdout)


def save(host: Host, name: str, into: str) -> Any:
    """Back up, and return the point."""
    directories = ("--scratch-dir", "/var/tmp/scratch", "--checkpoint-dir", "/var/tmp/state")
    report = ctl(
        host, "backup", name, "-o", into, *directories, "--scratch-reserve", "16M", "--raw"
    )
    return report["point"]


def sums(host: Host, *paths: str) -> dict[str, str]:
    """SHA-256 of files."""
    lines = host.run("sha256sum", "--zero", "--", *paths).split("\0")
    return {line[66:]: line[:64] for line in lines if line}


class Clone(HostGuest):
    """A domain that was defined by a restore."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name

    def wait_ready(self, timeout_seconds: float = BOOT_SECONDS) -> None:
        """UEFI takes its time under TCG, and more where other tests run."""
        super().wait_ready(timeout_seconds)

    def tpm(self, command: str, index: int) -> int:
        """Have the guest's TPM do something; return its response code."""
        octal = "".join(f"\\{int(byte, 16):03o}" for byte in command.format(index=index).split())
        script = (
            f"exec 3<>/dev/tpm0 && printf '{octal}' >&3 && "
            "dd bs=4096 count=1 <&3 2>/dev/null | od -An -tx1 -v"
        )
        answer = bytes.fromhex(self.exec(script))
        return int.from_bytes(answer[6:10], "big")


class Uefi(Clone):
    """Linux with UEFI firmware and a TPM, on an image in a directory with an odd name."""

    def __init__(self, host: Host, name: str, disks: dict[str, str], directory: str) -> None:
        HostGuest.__init__(self, host, name, disks)
        root = ET.fromstring(self.virsh("dumpxml", "--", name))
        files = {tag: root.find(f"./os/{tag}") for tag in ("kernel", "initrd", "cmdline")}
        self.virsh("undefine", "--", name)
        system = root.find("os")
        devices = root.find("devices")
        assert system is not None
        assert devices is not None
        root.remove(system)
        new = ET.fromstring(FIRMWARE)
        new.extend(each for each in files.values() if each is not None)
        root.insert(list(root).index(devices), new)
        for device in list(devices):
            # of another machine type, and with addresses
            if device.tag == "controller":
                devices.remove(device)
            for address in device.findall("address"):
                device.remove(address)
        disk = devices.find("./disk/target[@dev='vdb']/..")
        assert disk is not None
        driver = disk.find("driver")
        assert driver is not None
        driver.set("type", "raw")
        tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
        devices.append(ET.fromstring(tpm))
        for tag in ("memory", "currentMemory"):
            element = root.find(tag)
            assert element is not None
            element.text = str(256 << 10)
        self.directory = directory
        self.virsh("define", "/dev/stdin", stdin=ET.tostring(root))

    def put(self, text: str) -> None:
        """Write to the file system, to the raw disk, and to the TPM."""
        self.exec(
            f"echo {text} >/mnt/vda/proof && echo {text} | dd of=/dev/vdb conv=fsync,notrunc "
            "2>/dev/null && sync"
        )


def proof(guest: HostGuest) -> tuple[str, str]:
    """What is in the file, and on the raw disk."""
    raw = guest.exec("dd if=/dev/vdb bs=16 count=1 2>/dev/null | head -n 1")
    return guest.exec("cat /mnt/vda/proof").strip(), raw.strip()


def indexes(guest: Clone) -> list[int]:
    """What the guest's TPM has kept since earlier: what tests have defined there."""
    return [index for index in (1, 2, 3) if guest.tpm(READ_PUBLIC, index) == DONE]


@pytest.fixture(autouse=True)
def forgotten(host: Host) -> Iterator[None]:
    """No test leaves a clone to the next one."""
    yield
    for name in host.run("virsh", "list", "--all", "--name").split():
        if name.startswith("restore_"):
            host.call("virsh", "destroy", name)
            host.run("virsh", "undefine", "--nvram", name)


@pytest.fixture(scope="module")
def production(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Uefi:
    """The original, not started; its second disk is raw."""
    directory = f'{IMAGES}/it\'s "here" & <there>'
    host.run("mkdir", "-p", directory)
    disks = {"vda": f"{directory}/system disk.qcow2", "vdb": f"{directory}/data,raw.img"}
    image = make_ext4(tmp_path_factory.mktemp("image") / "system disk.qcow2", 32 * MIB)
    host.copy_in(image, directory)
    host.run("truncate", "-s", str(4 * MIB), disks["vdb"])
    return Uefi(host, "prod", disks, directory)


def test_a_uefi_guest_with_a_tpm_and_snapshots(host: Host, production: Uefi) -> None:
    """Each point comes back as a domain of its own, which boots; the original does not notice."""
    production.start()
    production.put("first")
    assert production.tpm(DEFINE_INDEX, 1) == DONE
    first = save(host, "prod", "/var/tmp/set")
    production.virsh(
        "snapshot-create-as", "prod", "s1", "--disk-only",
        "--diskspec", f"vda,file={production.directory}/over 'lay'.qcow2",
        "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    production.put("second")
    assert production.tpm(DEFINE_INDEX, 2) == DONE
    second = save(host, "prod", "/var/tmp/set")
    assert (first["level"], second["level"]) == ("full", "inc")
    assert {disk["target"]: disk["mode"] for disk in second["disks"]} == {
        "vda": "delta", "vdb": "full",
    }  # fmt: skip
    production.put("third")
    assert production.tpm(DEFINE_INDEX, 3) == DONE

    production.virsh("suspend", "prod")
    files = host.run("find", production.directory, "-type", "f", "-print0").split("\0")[:-1]
    uuid = production.virsh("domuuid", "prod").strip()
    nvram = "/var/lib/libvirt/qemu/nvram/prod_VARS.fd"
    state = f"{TPM}/{uuid}/tpm2/tpm2-00.permall"
    before = sums(host, *files, nvram, state)
    xml = production.virsh("dumpxml", "--inactive", "prod")
    prove_clone(host, first["id"])
    assert sums(host, *files, nvram, state) == before
    assert production.virsh("dumpxml", "--inactive", "prod") == xml
    production.virsh("resume", "prod")
    assert proof(production) == ("third", "third")
    production.virsh("destroy", "prod")


def prove_clone(host: Host, point: str) -> None:
    """Restore the first point beside the original: files, disks, NVRAM, TPM."""
    into = f'{IMAGES}/back to "it\'s" place'
    words = ("--point", point, "-o", into, "--define")
    report = ctl(host, "restore", "/var/tmp/set", *words)
    told = report["definition"]
    assert (told["name"], told["started"]) == ("restore_prod", False)
    root = ET.fromstring(host.run("virsh", "dumpxml", "--inactive", "restore_prod"))
    nvram = root.findtext("./os/nvram", "")
    assert nvram == f"{into}/config/nvram/prod_VARS.fd"
    stored = f"/var/tmp/set/nvram.{point}.prod_VARS.fd"
    digests = sums(host, nvram, stored)
    assert digests[nvram] == digests[stored]
    kernel, initrd = (root.findtext(f"./os/{tag}", "") for tag in ("kernel", "initrd"))
    assert kernel.startswith(f"{into}/config/kernel/")
    assert initrd.startswith(f"{into}/config/initrd/")

    clone = Clone(host, "restore_prod")
    clone.start()
    assert proof(clone) == ("first", "first")
    assert "efi" in clone.exec("ls /sys/firmware")
    assert indexes(clone) == [1]
    owned = host.run("find", f"{TPM}/{told['uuid']}", "-name", "*.permall", "-printf", "%u %m")
    assert owned == "tss 600"
    clone.shutdown()
    for disk in report["disks"]:
        if disk["format"] == "qcow2":
            host.run("qemu-img", "check", "-q", disk["path"])
            assert "bitmaps" not in host.run("qemu-img", "info", disk["path"])
            assert "backing" not in host.run("qemu-img", "info", disk["path"])
    host.run("virsh", "undefine", "--nvram", "restore_prod")
    assert host.call("test", "-e", nvram).returncode == 1
    host.run("rm", "-r", into)
    host.run("rm", "-rf", f"{TPM}/{told['uuid']}")  # libvirt may have done so


def test_other_firmware(host: Host, production: Uefi) -> None:
    """After an upgrade the guest still has the loader of its point."""
    loader = "/usr/share/OVMF/OVMF_CODE_4M.fd"
    into = f"{IMAGES}/other"
    host.run("cp", loader, "/var/tmp/loader")
    host.run("truncate", "-s", "+4096", loader)
    try:
        report = ctl(host, "restore", "/var/tmp/set", "-o", into, "--define", "--start")
    finally:
        host.run("cp", "/var/tmp/loader", loader)
    assert report["definition"]["started"]
    root = ET.fromstring(host.run("virsh", "dumpxml", "restore_prod"))
    assert root.findtext("./os/loader") == f"{into}/config/loader/OVMF_CODE_4M.fd"
    clone = Clone(host, "restore_prod")
    clone.wait_ready()
    assert proof(clone) == ("second", "second")
    assert indexes(clone) == [1, 2]
    host.run("virsh", "destroy", "restore_prod")
    host.run("virsh", "undefine", "--nvram", "restore_prod")
    host.run("rm", "-r", into)
    host.run("rm", "-rf", f"{TPM}/{report['definition']['uuid']}")
    del production


def test_a_uefi_guest_that_is_off(host: Host, production: Uefi) -> None:
    """Its NVRAM is saved though libvirt 9.0 does not tell of it; and it is the clone's."""
    assert production.state() == "shut off"
    point = save(host, "prod", "/var/tmp/off")
    assert point["consistency"] in ("offline", "crash")
    into = f"{IMAGES}/off"
    report = ctl(host, "restore", "/var/tmp/off", "-o", into, "--define")
    nvram = f"{into}/config/nvram/prod_VARS.fd"
    assert nvram in report["files"]
    xml = host.run("virsh", "dumpxml", "--inactive", "restore_prod")
    assert ET.fromstring(xml).findtext("./os/nvram") == nvram
    original = "/var/lib/libvirt/qemu/nvram/prod_VARS.fd"
    found = sums(host, nvram, original)
    assert found[nvram] == found[original]


def test_what_would_not_work_is_refused(host: Host, production: Uefi) -> None:
    """A directory that QEMU can't pass, and files of another domain by a link."""
    before = host.run("virsh", "list", "--all", "--name")
    host.run("install", "-d", "-m", "700", "/var/tmp/closed")
    error = ctl(host, "restore", "/var/tmp/set", "-o", "/var/tmp/closed/r", "--define", code=10)
    assert "can't pass /var/tmp/closed (mode 700" in error["error"]["message"]
    into = f"{IMAGES}/linked"
    host.run("mkdir", into)
    host.run("ln", f"{production.directory}/system disk.qcow2", f"{into}/over 'lay'.qcow2")
    words = ("-o", into, "--define", "--force")
    error = ctl(host, "restore", "/var/tmp/set", *words, code=20)
    assert "is disk vda, backing file of domain prod" in error["error"]["message"]
    assert host.run("virsh", "list", "--all", "--name") == before
    assert host.run("ls", TPM).split() == [production.virsh("domuuid", "prod").strip()]


def test_thirty_disks(host: Host) -> None:
    """All of them are the guest's again, each in its place; one was a volume of a pool."""
    names = [f"sd{chr(97 + number % 26)}" if number < 26 else f"sda{chr(71 + number)}"
             for number in range(30)]  # fmt: skip
    host.run("mkdir", f"{IMAGES}/many")
    script = "".join(
        f"qemu-img create -q -f qcow2 {IMAGES}/many/{name}.qcow2 1M; "
        f"qemu-io -f qcow2 -c 'write -q -P {number + 1} 0 64k' {IMAGES}/many/{name}.qcow2; "
        for number, name in enumerate(names)
    )
    host.run("sh", "-ec", script)
    host.run("virsh", "pool-create-as", "many", "dir", "--target", f"{IMAGES}/many")
    sources = {name: f"file='{IMAGES}/many/{name}.qcow2'" for name in names}
    sources["sdb"] = "pool='many' volume='sdb.qcow2'"
    disks = "".join(
        f"<disk type='{'volume' if 'pool' in source else 'file'}' device='disk'>"
        f"<driver name='qemu' type='qcow2'/><source {source}/>"
        f"<target dev='{name}' bus='scsi'/></disk>"
        for name, source in sources.items()
    )
    xml = (
        "<domain type='qemu'><name>many</name><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64'>hvm</type></os><features><acpi/></features><devices>"
        "<emulator>/usr/bin/qemu-system-x86_64</emulator>"
        f"<controller type='scsi' model='virtio-scsi'/>{disks}</devices></domain>"
    )
    host.run("virsh", "define", "/dev/stdin", stdin=xml.encode())
    save(host, "many", "/var/tmp/many")
    into = f"{IMAGES}/again"
    report = ctl(host, "restore", "/var/tmp/many", "-o", into, "--define", "--start")
    assert [disk["target"] for disk in report["disks"]] == names
    # a volume is a file under another name
    host.run("mkdir", f"{IMAGES}/linked-many")
    host.run("ln", f"{IMAGES}/many/sdb.qcow2", f"{IMAGES}/linked-many/sdb.qcow2")
    words = ("-o", f"{IMAGES}/linked-many", "-d", "sdb", "--name", "x", "--define", "--force")
    error = ctl(host, "restore", "/var/tmp/many", *words, code=20)
    assert "is disk sdb of domain many" in error["error"]["message"]
    root = ET.fromstring(host.run("virsh", "dumpxml", "restore_many"))
    found = {}
    for disk in root.findall("./devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        assert target is not None
        assert source is not None
        found[target.get("dev", "")] = source.get("file", "")
    assert found == {name: f"{into}/{name}.qcow2" for name in names}
    compare = "; ".join(
        shlex.join(["qemu-img", "compare", "-q", "-U", f"{IMAGES}/many/{name}.qcow2", path])
        for name, path in found.items()
    )
    host.run("sh", "-ec", compare)
    host.run("virsh", "destroy", "restore_many")
    host.run("virsh", "undefine", "restore_many")


def test_onto_a_block_device_and_into_a_pool(host: Host) -> None:
    """A domain starts on what is written elsewhere than in the output directory."""
    host.run("truncate", "-s", "1M", "/var/tmp/device")
    device = host.run("losetup", "--find", "--show", "/var/tmp/device").strip()
    try:
        words = ("-d", f"sda={device}", "--yes", "-o", "/var/tmp/block", "--define", "--start")
        report = ctl(host, "restore", "/var/tmp/many", *words, code=3)
        assert report["definition"]["started"]
        root = ET.fromstring(host.run("virsh", "dumpxml", "--inactive", "restore_many"))
        (disk,) = root.findall("./devices/disk")
        source, driver = disk.find("source"), disk.find("driver")
        assert source is not None
        assert driver is not None
        assert (disk.get("type"), source.get("dev"), driver.get("type")) == ("block", device, "raw")
        host.run("virsh", "destroy", "restore_many")
        host.run("qemu-img", "compare", "-q", device, f"{IMAGES}/many/sda.qcow2")
        host.run("virsh", "undefine", "restore_many")
    finally:
        host.run("losetup", "--detach", device)
    host.run("mkdir", f"{IMAGES}/pool")
    host.run("virsh", "pool-create-as", "clones", "dir", "--target", f"{IMAGES}/pool")
    into = ("--pool", "clones", "-o", "/var/tmp/pool")
    report = ctl(
        host, "restore", "/var/tmp/many", "-d", "sdb", *into, "--define", "--start", code=3
    )
    assert report["definition"]["started"]
    xml = host.run("virsh", "dumpxml", "--inactive", "restore_many")
    assert f"<source file='{IMAGES}/pool/sdb.qcow2'/>" in xml


def test_a_name_that_is_taken_meanwhile(host: Host) -> None:
    """The last look comes before the definition; the message says what stands."""
    into = f"{IMAGES}/late"
    words = ("/var/tmp/many", "-o", into, "--define", "--name", "late", "--bandwidth-limit", "512K")
    argv = host.argv(*PROGRAM, "restore", *words)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        looked = ("sh", "-c", f"ls {IMAGES}/late/*.incomplete")
        wait_until(lambda: host.call(*looked).returncode == 0, "the first image", 30)
        xml = (
            "<domain type='qemu'><name>late</name><memory unit='MiB'>64</memory>"
            "<os><type arch='x86_64'>hvm</type></os></domain>"
        )
        host.run("virsh", "define", "/dev/stdin", stdin=xml.encode())
        _, said = run.communicate(timeout=60)
    assert run.returncode == 20
    assert "a domain late exists" in said
    assert f"the images in {into} are complete and {into}/late.adjusted.xml is their" in said
    assert host.run("virsh", "domblklist", "late").count("\n") <= 3
    host.run("virsh", "undefine", "late")
    host.run("virsh", "define", f"{into}/late.adjusted.xml")
    host.run("virsh", "undefine", "late")


def test_a_libvirt_of_another_host(suite: str, lab: HostLab, host: Host) -> None:
    """D-1: refused, though both see the directory; the own one is taken by any address."""
    other = lab.host("lab-b", hypervisor(suite))
    into = f"{SHARED}/it's elsewhere"
    words = ("/var/tmp/many", "-d", "sda", "-o", into, "--define")
    for where in ("root@lab-b", "lab-b"):
        uri = f"qemu+ssh://{where}/system"
        error = ctl(host, "restore", *words, "-c", uri, "--start", code=20)
        assert f"{uri} is the libvirt of another host or container" in error["error"]["message"]
        check = ctl(host, "check", "many", "-c", uri, code=20)
        assert "is the libvirt of another" in check["error"]["message"]
    assert host.call("test", "-e", into).returncode == 1
    assert "restore_many" not in other.run("virsh", "list", "--all", "--name")
    report = ctl(host, "restore", *words, "-c", f"qemu+ssh://root@{host.name}/system", code=3)
    assert report["definition"]["defined"]
    assert "restore_many" in host.run("virsh", "list", "--all", "--name")
    host.run("virsh", "undefine", "restore_many")


@pytest.mark.parametrize("keep", [False, True], ids=["clone", "same"])
def test_libvirt_takes_every_change(host: Host, *, keep: bool) -> None:
    """Its schema and its own rules judge what becomes of a definition with all that changes."""
    original = PRODUCTION.replace("type='kvm'", "type='qemu'")
    # which Debian's QEMU may lack
    original = re.sub("<graphics type='spice'.*</graphics>", "", original)
    variants = []
    for network in ("keep", "down", "none"):
        for nvram in (CLONE.nvram, None):
            changes = replace(
                CLONE, keep_identity=keep, network=network, nvram=nvram,
                media="remove" if nvram else "keep", other_disks="keep" if nvram else "remove",
            )  # fmt: skip
            variants.append(definition.adapt(original, changes, os.urandom, lambda _: None).xml)
    for xml in variants:
        host.run("virsh", "define", "--validate", "/dev/stdin", stdin=xml.encode())
        host.run("virsh", "undefine", "--keep-nvram", ET.fromstring(xml).findtext("name", ""))
