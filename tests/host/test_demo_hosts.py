"""``scripts/demo`` as a newcomer runs it on a host with systemd and libvirt."""

import os
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.host import PROXIES
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import hypervisor
from tests.lib.pages import TOP

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

TREE = "/usr/local/src/nbdbackupd"
DEMO_SECONDS = 600.0
OF_THE_HOST = {
    "/run/nbdbackup/called",
    "/run/nbdbackup/slots/1",
    "/var/lib/nbdbackup/state/manifests",
    "/var/lib/nbdbackup/state/notification/%.json",
    "/var/lib/nbdbackup/state/runs/.lock",
    "/var/lib/nbdbackup/state/summaries",
}
"""Files that are for all domains, and stay."""


def test_the_demo_of_the_packages(suite: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    run([TOP / "scripts/copy-tree", tree])
    tree.chmod(0o755)
    with HostLab() as lab:
        # read-only: it makes nothing in the sources
        host = lab.host("lab-a", hypervisor(suite), readonly_binds={TREE: tree})
        host.apt("update")
        words = [f"{name}={os.environ[name]}" for name in PROXIES if name in os.environ]
        done = host.call("env", *words, f"{TREE}/scripts/demo",
                         timeout_seconds=DEMO_SECONDS, outer_network=True)  # fmt: skip
        told = done.stdout.decode()
        assert done.returncode == 0, (told, done.stderr.decode())
        assert told.count("identical: ") == 6
        assert "All restored disks are identical" in told
        # the packages stay, nothing else does
        assert host.run("dpkg-query", "-W", "-f", "${db:Status-Status}", "nbdbackupd") == (
            "installed"
        )
        assert host.run("virsh", "list", "--all", "--name").strip() == ""
        left = host.run("find", "/var/lib/nbdbackup", "/var/lib/libvirt/images",
                        "/etc/nbdbackup/domains.d", "/run/nbdbackup", "-type", "f")  # fmt: skip
        assert set(left.splitlines()) <= OF_THE_HOST
        assert host.run("systemctl", "list-units", "--all", "--plain", "--no-legend",
                        "nbdbackup*@*demo*") == ""  # fmt: skip
