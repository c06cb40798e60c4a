"""Connections: what fails how, the embedded driver, and what the type stubs promise."""

import ast
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from nbdbackupd.errors import BusyError, DomainError, DomainNotFoundError
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import Connection, open_connection
from nbdbackupd.virt.domain import Domain, GuestState
from tests.lab.command import LabError, run
from tests.lab.daemon import DaemonLab
from tests.lab.embed import EmbeddedLab

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


@pytest.fixture
def connection(lab: DaemonLab) -> Iterator[Connection]:
    with open_connection(lab.uri) as connection:
        yield connection


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("qemu+unix:///system?socket=/nowhere", "libvirtd"),
        ("qemu+tcp://127.0.0.1:1/system", "check the host"),
        ("nonsense", "can't connect to nonsense"),
        ("qemu:///embed?root=relative", "absolute"),
    ],
)
def test_unreachable(uri: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DomainError, match=said) as caught:
        open_connection(uri).__enter__()
    assert caught.value.exit_code == 20
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_password_is_no_part_of_an_error() -> None:
    word = "hush"
    with pytest.raises(DomainError) as caught:
        open_connection("qemu+unix:///system?socket=/x", user="me", password=word).__enter__()
    assert word not in str(caught.value) + repr(caught.value.__cause__)


def test_unknown_domain(connection: Connection) -> None:
    for name in ("nix", "5b97b46b-fbfe-4710-94af-d486bf1df6a6", "a 'b' \"c\""):
        with pytest.raises(DomainNotFoundError, match="virsh list"):
            Domain.find(connection, name)


def test_life_of_a_domain(lab: DaemonLab, connection: Connection) -> None:
    guest = lab.guest("life '1' <&>")
    domain = Domain.find(connection, guest.name)
    assert Domain.find(connection, domain.uuid).name == guest.name
    assert domain.state() is GuestState.OFF
    assert domain.is_persistent()
    assert not domain.has_autostart()
    assert jobs.active_job(domain) is None
    assert not jobs.stats(domain).is_active
    jobs.abort(domain)
    guest.start()
    assert domain.state() is GuestState.RUNNING
    assert domain.disk_size("vda") == 64 * 1024 * 1024
    domain.suspend()
    assert domain.state() is GuestState.PAUSED
    domain.resume()
    assert domain.state() is GuestState.RUNNING
    owner = domain.owner()
    assert owner is not None
    assert owner[0] != 0
    assert owner == connection.base_owner()
    with pytest.raises(DomainError, match="size of vdz"):
        domain.disk_size("vdz")
    guest.virsh("autostart", "--domain", guest.name)
    assert domain.has_autostart()
    guest.destroy()


def test_domain_survives_a_restart_of_libvirtd(lab: DaemonLab, connection: Connection) -> None:
    guest = lab.guest("restart")
    domain = Domain.find(connection, "restart")
    lab.restart()
    assert domain.state() is GuestState.OFF
    lab.stop()
    # a call made while libvirtd is away waits for it
    starter = threading.Timer(1.5, lab.start)
    starter.start()
    assert domain.state() is GuestState.OFF
    starter.join()
    guest.undefine()


def test_loop_ends_with_the_last_connection(lab: DaemonLab) -> None:
    def loops() -> int:
        return sum(thread.name == "libvirt-events" for thread in threading.enumerate())

    before = loops()
    with open_connection(lab.uri) as one, open_connection(lab.uri):
        assert one.is_alive()
        assert loops() == 1
    assert loops() == before


def test_a_hanging_libvirtd_is_given_up(lab: DaemonLab, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbdbackupd.virt import connection as module

    monkeypatch.setattr(module, "KEEPALIVE_INTERVAL_SECONDS", 1)
    monkeypatch.setattr(module, "KEEPALIVE_COUNT", 2)
    lab.guest("hang")
    pid = daemon_pid(lab)
    with open_connection(lab.uri) as connection:
        domain = Domain.find(connection, "hang")
        os.kill(pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            with pytest.raises(DomainError):
                domain.state()
            assert time.monotonic() - begun < 30
        finally:
            os.kill(pid, signal.SIGCONT)


def daemon_pid(lab: DaemonLab) -> int:
    """Find the daemon by the lab's directory in its log: the launcher may be its parent."""
    daemon = lab._daemon
    assert daemon is not None
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    candidates = [daemon.pid, *map(int, children)]
    return next(
        pid for pid in candidates if Path(f"/proc/{pid}/comm").read_text().strip() == "libvirtd"
    )


EMBEDDED = """
import os, sys
os.environ["LIBVIRT_DEBUG"] = "error"
from pathlib import Path
from nbdbackupd import rundir
from nbdbackupd.source.running import RunningDisk, RunningRequest, open_running
from nbdbackupd.source.sweep import sweep
from nbdbackupd.virt.connection import open_connection
from nbdbackupd.virt.domain import Domain

uri, base, verb = sys.argv[1:]
base = Path(base)
with open_connection(uri) as connection:
    domain = Domain.find(connection, "vm1")
    rundir.make_domain_dir(base / "run", domain.uuid)
    place = rundir.socket_dir(base / "run", domain.uuid)
    if verb == "sweep":
        swept = sweep(domain, place, base / "scratch")
        print(bool(swept.job), len(swept.files))
        sys.exit()
    request = RunningRequest(
        domain=domain, disks=(RunningDisk(target="vda"),), run_id="r", runtime_dir=place,
        scratch_dir=base / "scratch", scratch_reserve=0, on_trouble=print, new_checkpoint="cp",
    )
    with open_running(request) as snapshot:
        print(sorted(snapshot.exports), snapshot.consistency)
        if verb == "die":
            sys.stdout.flush()
            os._exit(9)
"""


def test_embedded_driver() -> None:
    with EmbeddedLab() as lab:
        lab.guest().start()
        line = run([sys.executable, "-c", EMBEDDED, lab.uri, lab.directory, "go"], cwd=ROOT)
        assert line == "['vda'] crash\n"
        # QEMU survived the program's exit, and so does a job that nobody ended
        lab.virsh("checkpoint-delete", "vm1", "cp")
        with pytest.raises(LabError, match=r"exit status 9: \['vda'\] crash$"):
            run([sys.executable, "-c", EMBEDDED, lab.uri, lab.directory, "die"], cwd=ROOT)
        assert "Backup" in lab.virsh("domjobinfo", "vm1")
        line = run([sys.executable, "-c", EMBEDDED, lab.uri, lab.directory, "sweep"], cwd=ROOT)
        # the NBD socket is gone with the job, and so is the scratch file
        assert line == "True 0\n"
        assert "None" in lab.virsh("domjobinfo", "vm1")
        assert list((lab.directory / "scratch").iterdir()) == []


def test_embedded_root_of_another_process(tmp_path: Path) -> None:
    script = tmp_path / "try.py"
    script.write_text(
        "import os, sys\nos.environ['LIBVIRT_DEBUG'] = 'error'\n"
        "from nbdbackupd.errors import BusyError\n"
        "from nbdbackupd.virt.connection import open_connection\n"
        "try:\n    open_connection(sys.argv[1]).__enter__()\n"
        "except BusyError as err:\n    print(err)\n"
    )
    with EmbeddedLab() as lab:
        hold = (
            "import sys\nfrom nbdbackupd.virt.connection import open_connection\n"
            "import subprocess\n"
            "with open_connection(sys.argv[1]):\n"
            "    print(subprocess.check_output([sys.executable, *sys.argv[2:]], text=True))\n"
        )
        said = run(
            [sys.executable, "-c", hold, lab.uri, script, lab.uri],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
        )
    assert "another process holds" in said
    assert BusyError.exit_code == 75


def test_stubs_name_what_exists() -> None:
    tree = ast.parse((ROOT / "typings/libvirt.pyi").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation)
            assert type(getattr(libvirt, node.target.id)).__name__ == kind, node.target.id
        elif isinstance(node, ast.FunctionDef):
            assert callable(getattr(libvirt, node.name))
        elif isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            assert [
                name for name in methods if not hasattr(getattr(libvirt, node.name), name)
            ] == []
