"""Points of a real Linux with UEFI and a TPM run beside it at once, on both Debian releases."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.host.test_restore_vm import (
    DEFINE_INDEX,
    IMAGES,
    SOURCE,
    TOP,
    TPM,
    Clone,
    Uefi,
    ctl,
    indexes,
    proof,
    save,
    sums,
)
from tests.lab.agent_guest import make_ext4
from tests.lab.disks import MIB
from tests.lab.host import Host
from tests.lab.hostguest import guest_binds
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lab.process import wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

SET = "/srv/set"  # not in /var/tmp: units have one of their own
SCRATCH = ("--scratch-dir", "/var/lib/nbdbackup/scratch")


@pytest.fixture(scope="module", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def host(suite: str) -> Iterator[Host]:
    """A hypervisor with firmware and TPMs, and the program as it is here."""
    with HostLab() as lab:
        binds = {**guest_binds(), SOURCE: TOP}
        host = lab.host("lab-a", hypervisor(suite), readonly_binds=binds)
        host.apt("update")
        host.apt("install", "ovmf", "swtpm", "swtpm-tools", "python3-lz4", "python3-yaml",
                 "nbdkit-plugin-python")  # fmt: skip
        yield host


@pytest.fixture(scope="module")
def production(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Uefi:
    """A running guest; its set holds one point, and it has gone on since."""
    disks = {"vda": f"{IMAGES}/system.qcow2", "vdb": f"{IMAGES}/data.img"}
    host.copy_in(make_ext4(tmp_path_factory.mktemp("image") / "system.qcow2", 32 * MIB), IMAGES)
    host.run("truncate", "-s", str(4 * MIB), disks["vdb"])
    guest = Uefi(host, "prod", disks, IMAGES)
    guest.start()
    guest.put("saved")
    assert guest.tpm(DEFINE_INDEX, 1) == 0
    save(host, "prod", SET)
    guest.put("later")
    assert guest.tpm(DEFINE_INDEX, 2) == 0
    return guest


def assert_nothing(host: Host, production: Uefi) -> None:
    """Only the original is there."""
    assert host.run("virsh", "list", "--all", "--name").split() == ["prod"]
    assert ctl(host, "boot", "--list")["boots"] == []
    assert ctl(host, "map", "--list")["maps"] == []
    assert host.call("pgrep", "nbdkit").returncode == 1
    assert host.run("find", SCRATCH[1], "-type", "f") == ""
    assert host.run("ls", TPM).split() == [production.virsh("domuuid", "prod").strip()]


def test_beside_the_original(host: Host, production: Uefi) -> None:
    """Firmware, TPM and disks are the clone's own, of the point; the original does not notice."""
    uuid = production.virsh("domuuid", "prod").strip()
    nvram = "/var/lib/libvirt/qemu/nvram/prod_VARS.fd"
    production.virsh("suspend", "prod")
    mine = (*production_files(host), nvram, f"{TPM}/{uuid}/tpm2/tpm2-00.permall")
    before = sums(host, *mine)
    report = ctl(host, "boot", SET, "--detach")
    assert report["seconds"] < 20
    clone = Clone(host, "boot_prod")
    clone.wait_ready()
    assert proof(clone) == ("saved", "saved")
    assert indexes(clone) == [1]
    assert "efi" in clone.exec("ls /sys/firmware")
    assert clone.exec("ls /sys/class/net").split() == ["lo"]
    clone.exec("echo gone >/mnt/vda/proof && sync")
    root = ET.fromstring(host.run("virsh", "dumpxml", "boot_prod"))
    assert root.findtext("./os/nvram", "").startswith(SCRATCH[1])
    ctl(host, "boot", "--stop", "boot_prod")
    assert sums(host, *mine) == before
    production.virsh("resume", "prod")
    assert_nothing(host, production)


def production_files(host: Host) -> list[str]:
    """The images of the original."""
    return host.run("find", IMAGES, "-maxdepth", "1", "-type", "f").split()


def test_its_agent_is_waited_for(host: Host, production: Uefi) -> None:
    report = ctl(host, "verify", SET, "--boot")
    test = report["boot"]
    assert (report["sound"], test["passed"], test["waited_for"]) == (True, True, "agent")
    assert ctl(host, "list", SET)["points"][0]["boot_test"]["passed"] is True
    assert_nothing(host, production)


def test_it_moves_to_its_place(host: Host, production: Uefi) -> None:
    """While it boots; then it starts again from there, without the set."""
    out = f"{IMAGES}/moved here"
    report = ctl(host, "boot", SET, "--name", "moved", "--live-restore", out, "--define")
    assert (report["defined"], report["running"]) == (True, True)
    host.run("mv", SET, f"{SET}.away")
    clone = Clone(host, "moved")
    clone.wait_ready()
    assert proof(clone) == ("saved", "saved")
    clone.exec("echo moved >/mnt/vda/proof && echo moved | dd of=/dev/vdb conv=fsync,notrunc")
    assert clone.tpm(DEFINE_INDEX, 3) == 0
    clone.shutdown()
    clone.start()
    assert proof(clone) == ("moved", "moved")
    assert indexes(clone) == [1, 3]
    host.run("virsh", "destroy", "moved")
    for disk in report["disks"]:
        assert disk["path"].startswith(out)
        told = json.loads(host.run("qemu-img", "info", "--output=json", disk["path"]))
        assert "backing-filename" not in told
    host.run("virsh", "undefine", "--nvram", "moved")
    host.run("rm", "-rf", out, f"{TPM}/{report['uuid']}")
    host.run("mv", f"{SET}.away", SET)
    assert_nothing(host, production)


def test_as_a_service(host: Host, production: Uefi) -> None:
    """The unit's sandbox lets it work; stopped in the middle, it ends without a trace."""
    name = "nbdbackup-boot-test@prod.service"
    unit = (TOP / "units" / name.replace("prod", "")).read_text()
    host.write("/etc/systemd/system/nbdbackup-boot-test@.service", unit)
    words = f"/usr/bin/python3 -m nbdbackupd verify --boot --boot-only {SET}"
    drop_in = f"/etc/systemd/system/{name}.d/lab.conf"
    plain = f"[Service]\nEnvironment=PYTHONPATH={SOURCE}\nExecStart=\nExecStart={words}"
    host.write(drop_in, f"{plain}\n")
    host.run("systemctl", "daemon-reload")
    host.run("rm", "-rf", f"{SET}/boot-tests")
    host.run("systemctl", "start", name, timeout_seconds=120)
    assert ctl(host, "list", SET)["points"][0]["boot_test"]["passed"] is True
    assert_nothing(host, production)
    host.write(drop_in, f"{plain} --boot-wait console:never\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "--no-block", name)
    wait_until(lambda: "boottest_prod" in host.run("virsh", "list", "--name"), "the domain", 60)
    host.run("systemctl", "stop", name)
    assert_nothing(host, production)
    production.virsh("destroy", "prod")


def test_without_libvirt(host: Host) -> None:
    """A host that only keeps backups says what is missing."""
    host.run("systemctl", "stop", "libvirtd.socket", "libvirtd-ro.socket",
             "libvirtd-admin.socket", "libvirtd.service")  # fmt: skip
    error = ctl(host, "boot", SET, code=20)
    assert "can't connect to qemu:///system" in error["error"]["message"]
    assert Path(SET).name in str(host.run("ls", "/srv"))
