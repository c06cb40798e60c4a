"""The container lab itself: hosts boot, take packages, lose power, migrate, and leave nothing."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.agent_guest import make_ext4
from tests.lab.base import cache_directory
from tests.lab.cgroup import groups
from tests.lab.command import LabError, run
from tests.lab.host import Host
from tests.lab.hostguest import HostGuest, guest_binds
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import BOOKWORM, SUITES, TRIXIE, bare, hypervisor
from tests.lab.process import ProcessHandle, wait_until

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

TOP = Path(__file__).parents[2]
LIBVIRT = {BOOKWORM: "libvirt 9.0.0", TRIXIE: "libvirt 11.3.0"}
FAR = ["ssh", "-o", "ConnectTimeout=3"]

TRIAL = {
    "DEBIAN/control": """Package: labtrial
Version: 1
Architecture: all
Maintainer: nobody <nobody@example.org>
Depends: nbdkit, python3-libnbd
Description: trial of the lab
""",
    "DEBIAN/postinst": """#!/bin/sh
set -e
systemctl daemon-reload
systemctl enable --now labtrial.timer
""",
    "DEBIAN/prerm": """#!/bin/sh
systemctl disable --now labtrial.timer
systemctl stop labtrial.service
""",
    "DEBIAN/postrm": "#!/bin/sh\nsystemctl daemon-reload\n",
    # stopped in its work it would count as failed, and so it would after the purge
    # each second is more often than systemd lets a unit be started by itself
    "usr/lib/systemd/system/labtrial.service": """[Unit]
StartLimitIntervalSec=0
[Service]
Type=oneshot
SuccessExitStatus=SIGTERM 143
ExecStart=/usr/bin/labtrial
""",
    "usr/lib/systemd/system/labtrial.timer": """[Timer]
OnCalendar=*:*:*
AccuracySec=50ms
[Install]
WantedBy=timers.target
""",
    # its own fields need no library; the priority goes before a line
    "usr/bin/labtrial": """#!/bin/sh
set -e
python3 -c 'import nbd; print("<3>libnbd", nbd.NBD().get_version())'
printf 'MESSAGE=done\\nPRIORITY=4\\nLAB_DOMAIN=vm1\\n' | logger --journald
""",
    "usr/share/man/man1/labtrial.1": "a page\n",
}
PROGRAMS = ("DEBIAN/postinst", "DEBIAN/prerm", "DEBIAN/postrm", "usr/bin/labtrial")


@pytest.fixture(scope="module", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(suite: str) -> Iterator[tuple[HostLab, Host, Host]]:
    """Two hypervisors on one network."""
    with HostLab() as lab:
        root, binds = hypervisor(suite), guest_binds()
        first, second = (lab.host(name, root, readonly_binds=binds) for name in ("lab-a", "lab-b"))
        yield lab, first, second


def trial_package(directory: Path) -> Path:
    """A package with dependencies, a timer and a service."""
    tree = directory / "labtrial"
    for name, text in TRIAL.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if name in PROGRAMS else 0o644)
    package = directory / "labtrial_1_all.deb"
    run(["dpkg-deb", "--root-owner-group", "--build", tree, package])
    return package


def assert_healthy(host: Host) -> None:
    """Systemd has started all, and nothing has failed."""
    failed = host.run("systemctl", "--failed", "--plain", "--no-legend")
    assert failed == "", host.run("journalctl", "--no-pager", "-b", "-n", "60")
    assert host.run("systemctl", "is-system-running") == "running\n"


def outside() -> tuple[str, str, list[str], list[str]]:
    """What hosts must not change on this machine; the mounts are those of the lab only."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return (
        run(["ip", "-o", "link"]),
        run(["ip", "route", "show", "table", "all"]),
        [line for line in mounts if f"{cache_directory()}" in line or "/run/hosts" in line],
        [path.name for path in Path("/run/netns").glob("lab-*")],
    )


def test_a_hypervisor_is_complete(pair: tuple[HostLab, Host, Host], suite: str) -> None:
    for host in pair[1:]:
        assert_healthy(host)
        assert host.run("systemctl", "is-active", "libvirtd") == "active\n"
        assert LIBVIRT[suite] in host.run("virsh", "version")
        assert host.run("hostname").strip() == host.name
        assert f"VERSION_CODENAME={suite}\n" in host.run("cat", "/etc/os-release")
    uuids = {host.run("sh", "-c", "virsh capabilities | grep -m 1 uuid") for host in pair[1:]}
    assert len(uuids) == 2


def test_commands_run_inside(pair: tuple[HostLab, Host, Host], tmp_path: Path) -> None:
    lab, host, other = pair
    done = host.call("sh", "-c", "cat; echo $0 >&2; pwd; exit 3", stdin=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in\n/\n", b"sh\n")
    with pytest.raises(LabError, match="exit status 3: said"):
        host.run("sh", "-c", "echo said; exit 3")
    with pytest.raises(LabError, match=r"not done after 0\.5 s"):
        host.run("sleep", "61.5", timeout_seconds=0.5)
    wait_until(lambda: host.call("pgrep", "-f", "^sleep 61").returncode == 1, "end of it", 10)
    # nothing of this machine's environment, processes, network
    assert "PATH=" in host.run("env")
    assert "PYTEST_CURRENT_TEST" not in host.run("env")
    assert host.run("cat", "/proc/1/comm") == "systemd\n"
    assert host.run("readlink", "/proc/self/ns/net") != f"{Path('/proc/self/ns/net').readlink()}\n"

    assert 61184 <= int(host.unit("id", "-u", properties=["DynamicUser=yes"])) <= 65519
    invocation = host.unit("sh", "-c", "echo $INVOCATION_ID; echo to the journal >&2").strip()
    assert len(invocation) == 32
    with pytest.raises(LabError, match="exit status 7"):
        host.unit("sh", "-c", "exit 7")

    host.write("/etc/lab/deep/file", "a text\n", mode=0o600)
    assert host.run("stat", "-c", "%a %U", "/etc/lab/deep/file") == "600 root\n"
    host.copy_in(Path(__file__), "/root")
    copied = host.copy_out(f"/root/{Path(__file__).name}", tmp_path)
    assert copied.read_bytes() == Path(__file__).read_bytes()
    host.copy_out("/etc/lab", tmp_path)
    assert (tmp_path / "lab/deep/file").read_text() == "a text\n"
    # the disk is this host's alone, the shared directory is everybody's
    assert other.call("test", "-e", "/etc/lab").returncode == 1
    host.run("sh", "-c", "echo shared >/shared/file")
    assert other.run("cat", "/shared/file") == "shared\n"
    assert (lab.shared / "file").read_text() == "shared\n"


def test_a_network_is_cut_and_healed(pair: tuple[HostLab, Host, Host]) -> None:
    _, host, other = pair
    assert host.run(*FAR, other.name, "hostname") == f"{other.name}\n"
    other.set_link(up=False)
    assert host.call(*FAR, other.name, "true").returncode == 255
    other.set_link(up=True)
    assert host.run(*FAR, other.name, "hostname") == f"{other.name}\n"


def test_live_migration(pair: tuple[HostLab, Host, Host]) -> None:
    lab, host, other = pair
    make_ext4(lab.shared / "moving.qcow2")
    guest = HostGuest(host, "moving", {"vda": "/shared/moving.qcow2"})
    guest.start()
    assert "lab: ready" in guest.console()
    booted = guest.exec("cat /proc/sys/kernel/random/boot_id")
    guest.exec("while :; do date +%s.%N >/mnt/vda/now; sleep 0.1; done >/dev/null 2>&1 &")
    guest.migrate(other)
    assert guest.state() == "running"
    assert host.run("virsh", "list", "--all", "--name").split() == []
    assert guest.exec("cat /proc/sys/kernel/random/boot_id") == booted
    before = guest.exec("cat /mnt/vda/now")
    assert guest.exec("sleep 1; cat /mnt/vda/now") != before
    assert guest.agent("guest-fsfreeze-freeze") == 1
    assert guest.is_frozen()
    assert guest.agent("guest-fsfreeze-thaw") == 1
    guest.migrate(host)
    assert guest.exec("cat /proc/sys/kernel/random/boot_id") == booted
    guest.virsh("destroy", guest.name)


def test_power_loss(suite: str) -> None:
    with HostLab() as lab:
        host = lab.host("lab-a", hypervisor(suite), readonly_binds=guest_binds())
        image = "/var/lib/libvirt/images/data.qcow2"
        host.copy_in(make_ext4(lab.directory / "data.qcow2"), "/var/lib/libvirt/images")
        guest = HostGuest(host, "vm1", {"vda": image})
        guest.start()
        guest.exec("echo kept >/mnt/vda/file && sync")
        host.write("/root/file", "kept\n")
        pid = int(host.run("sh", "-c", "cat /run/libvirt/qemu/vm1.pid"))
        assert host.run("cat", f"/proc/{pid}/comm") == "qemu-system-x86\n"

        host.crash()
        assert not host.is_running
        with pytest.raises(LabError, match="is off"):
            host.run("true")
        host.boot()
        assert host.run("cat", "/root/file") == "kept\n"
        assert host.call("test", "-e", "/run/libvirt/qemu/vm1.pid").returncode == 1
        assert guest.state() == "shut off"
        guest.start()
        assert guest.exec("cat /mnt/vda/file") == "kept\n"
        guest.shutdown()

        host.poweroff()
        assert not host.is_running
        host.boot()
        boots = [entry["_BOOT_ID"] for entry in host.journal("SYSLOG_IDENTIFIER=systemd")]
        assert len(set(boots)) == 3
        # only the second boot ended in order
        ends = {entry["_BOOT_ID"] for entry in host.journal("UNIT=poweroff.target")}
        assert ends == {list(dict.fromkeys(boots))[1]}


def test_a_package_in_a_bare_host(suite: str, tmp_path: Path) -> None:
    with HostLab() as lab:
        host = lab.host("lab-a", bare(suite))
        assert_healthy(host)
        for missing in ("python3", "nbdkit", "virsh"):
            assert host.call("which", missing).returncode == 1
        host.copy_in(trial_package(tmp_path), "/root")
        host.apt("update")
        host.apt("install", "/root/labtrial_1_all.deb")
        assert host.run("nbdkit", "--version").startswith("nbdkit 1.")
        assert host.run("cat", "/usr/share/man/man1/labtrial.1") == "a page\n"
        # the timer, the service that it starts, and what that one says to the journal
        matches = ("_SYSTEMD_UNIT=labtrial.service", "PRIORITY=3")
        wait_until(lambda: len(host.journal(*matches)) >= 2, "two runs by the timer", 30)
        first, second = host.journal(*matches)[:2]
        assert first["MESSAGE"].startswith("libnbd 1.")
        assert first["_PID"] != second["_PID"]
        assert int(second["__REALTIME_TIMESTAMP"]) - int(first["__REALTIME_TIMESTAMP"]) > 500_000
        own = host.journal("LAB_DOMAIN=vm1")[0]
        assert (own["MESSAGE"], own["PRIORITY"]) == ("done", "4")

        host.crash()
        host.boot()
        assert host.run("systemctl", "is-active", "labtrial.timer") == "active\n"
        host.apt("purge", "labtrial")
        assert host.call("systemctl", "cat", "labtrial.timer").returncode == 1
        assert_healthy(host)


def test_nothing_is_left_outside() -> None:
    before = outside()
    with HostLab() as lab:
        host = lab.host("lab-a", bare(BOOKWORM))
        handles = [ProcessHandle(pid) for pid in (lab.ground.pid, host.leader)]
        assert outside() == before
        directory = lab.directory
    assert all(not handle.is_running() for handle in handles)
    assert not directory.exists()
    assert groups(f"nbdlab-{directory.name.removeprefix('hosts-')}") == []
    assert outside() == before


KILLED = """
import sys
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import BOOKWORM, bare
with HostLab() as lab:
    host = lab.host("lab-a", bare(BOOKWORM))
    host.run("systemd-run", "--quiet", "sleep", "1000")
    print(lab.directory, lab.ground.pid, host.leader, flush=True)
    sys.stdin.read()
"""


def test_a_killed_lab_takes_its_hosts_along() -> None:
    before = outside()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=TOP,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        directory, *pids = process.stdout.readline().split()
        handles = [ProcessHandle(int(pid)) for pid in pids]
        assert len(handles) == 2
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    for handle in handles:
        assert handle.wait(20)
    assert outside() == before
    # the directory waits for the next lab, which finds the lock free
    assert Path(directory).is_dir()
    with HostLab() as lab:
        assert not Path(directory).exists()
        assert lab.directory.is_dir()
    assert groups(f"nbdlab-{Path(directory).name.removeprefix('hosts-')}") == []


MANY = """
from tests.lab.hostlab import HostLab
for _ in range(20):
    with HostLab() as lab:
        assert lab.shared.is_dir()
"""


def test_labs_begin_and_end_side_by_side() -> None:
    """None takes another one, which is about to end, for the leftover of a killed one."""
    with contextlib.ExitStack() as stack:
        argv = [sys.executable, "-c", MANY]
        labs = [
            stack.enter_context(subprocess.Popen(argv, cwd=TOP, stderr=subprocess.PIPE, text=True))
            for _ in range(3)
        ]
        said = [lab.communicate(timeout=100)[1] for lab in labs]
        assert [lab.returncode for lab in labs] == [0, 0, 0], said
