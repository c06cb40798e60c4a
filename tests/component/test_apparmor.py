"""AppArmor's rules for QEMU, as they are installed, in the profiles that libvirt makes (S-11)."""

import re
import subprocess
from pathlib import Path

import pytest

from nbdbackupd import rundir
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

SNIPPET = TOP / "packaging/common/libvirt-qemu.apparmor"
MINE, OTHER = "5a1f0a3e-9d0f-4a8e-8a5e-0f2a3f9b1c77", "0b6cf5b0-1f5c-4a07-9b55-6c0f6d6f7a11"
RUNTIME = rundir.DEFAULT


def rules_of(uuid: str, directory: Path) -> list[re.Pattern[str]]:
    """What the parser makes of the snippet in the profile of a domain, as patterns of paths."""
    profile = directory / "profile"
    profile.write_text(
        "abi <abi/3.0>,\n"
        f"profile libvirt-{uuid} flags=(attach_disconnected) {{\n"
        f'  #include "{SNIPPET}"\n}}\n'
    )
    done = subprocess.run(
        ["/usr/sbin/apparmor_parser", "-QK", "-D", "rule-exprs", profile],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^rule: (/\S+)", done.stdout + done.stderr, re.MULTILINE)
    return [re.compile(each) for each in found]


def may(rules: list[re.Pattern[str]], path: Path | str) -> bool:
    return any(rule.fullmatch(str(path)) for rule in rules)


def test_each_qemu_reaches_its_own_directory_alone(tmp_path: Path) -> None:
    rules = rules_of(MINE, tmp_path)
    assert may(rules, rundir.socket_dir(RUNTIME, MINE) / rundir.NBD_SOCKET)
    assert not may(rules, rundir.socket_dir(RUNTIME, OTHER) / rundir.NBD_SOCKET)
    for closed in (
        rundir.domain_dir(RUNTIME, MINE) / "lock",
        rundir.domain_dir(RUNTIME, MINE) / "run.json",
        RUNTIME / "xml/vm1.xml",
        RUNTIME / "map/gate",
        RUNTIME / "boot/vm1.lock",
        "/var/lib/nbdbackup/scratch/nbdbackup-other.qcow2",
        "/var/lib/nbdbackup/scratch/boot/vm2/0.qcow2",
    ):
        assert not may(rules, closed), closed
    assert may(rules, RUNTIME / "boot/vm1/vda.sock")


@pytest.mark.parametrize("path", ["/run/nbdbackup/lock", "/run/nbdbackup/boot/a/b/c.sock"])
def test_the_check_can_fail(path: str, tmp_path: Path) -> None:
    assert not may(rules_of(MINE, tmp_path), path)
    assert may([re.compile("/run/.*")], path)
