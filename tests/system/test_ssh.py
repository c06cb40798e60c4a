"""Running domains of another host: its libvirt, files and programs are reached by one ssh.

The two hosts are mount namespaces: libvirtd, QEMU and sshd are in one, ``nbdbackupctl`` in another
where the same paths hold other files. A third one is ours of the tests.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import wait_until
from tests.lab.sshd import Sshd
from tests.lab.virtio import HALT
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
HOST = "hv2"
NAME = "it's $(touch x) `id`; \"it"
DISKS = (DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=16 * MIB))
SCRIPT = """\
mount -t tmpfs none /run/nbdbackup
mount -t tmpfs none /dev/shm
alien=$1; shift
while test "$1" != --; do mount --bind "$alien" "$1"; shift; done
shift; exec "$@"
"""


class FarCtl(RiggedCtl):
    """``nbdbackupctl`` on a host where ``paths`` are other files."""

    alien: Path
    paths: tuple[Path, ...] = ()
    options: tuple[str | Path, ...] = ()

    def argv(self, verb: str, *arguments: str | os.PathLike[str]) -> list[str]:
        """The whole command line."""
        more = self.options if verb == "backup" else ()
        inner = super().argv(verb, *arguments, *more)
        places = (os.fspath(each) for each in (self.alien, *self.paths))
        return ["unshare", "--mount", "sh", "-euc", SCRIPT, "sh", *places, "--", *inner]


@pytest.fixture(scope="module")
def sshd(lab: DaemonLab) -> Iterator[Sshd]:
    Path("/run/nbdbackup").mkdir(exist_ok=True)
    with Sshd(lab.launcher, lab.directory / "sshd", HOST) as made:
        yield made


@pytest.fixture(scope="module")
def guest(lab: DaemonLab) -> Guest:
    guest = lab.guest(NAME, DISKS)
    firmware = guest.places.images / "it's $HOME.bin"
    firmware.write_bytes(HALT)
    xml = lab.virsh("dumpxml", "--domain", NAME)
    path = lab.directory / "with-loader.xml"
    path.write_text(xml.replace("</type>", f"</type><loader type='rom'>{firmware}</loader>", 1))
    lab.virsh("define", path)
    guest.start()
    return guest


@pytest.fixture(scope="module")
def ctl(lab: DaemonLab, guest: Guest, sshd: Sshd) -> FarCtl:
    ctl = FarCtl(f"qemu+ssh://root@{HOST}/system", lab.directory / "c")
    ctl.environment["HOME"] = os.fspath(lab.directory)
    ctl.alien = lab.directory / "alien"
    ctl.alien.write_bytes(b"ALIEN" * 4096)
    firmware = guest.places.images / "it's $HOME.bin"
    ctl.paths = (*(guest.image(target) for target in guest.disks), firmware)
    ctl.options = ("--ssh-config", sshd.config)
    return ctl


@pytest.fixture
def witness(ctl: FarCtl, guest: Guest, tmp_path: Path) -> Witness:
    witness = Witness(ctl, guest, tmp_path)
    # of the test before, whose set is its own
    witness.delete_checkpoints()
    return witness


def await_guard(witness: Witness, sshd: Sshd, lab: DaemonLab) -> None:
    """The guest lives, and nothing is left on its host but the checkpoint of a dead run."""
    places = ("/run/nbdbackup", lab.directory / "c/scratch")
    wait_until(lambda: witness.guest.block_jobs() == [], "end of the job", 60)
    deadline = time.monotonic() + 30
    while found := sshd.run("find", *places, "!", "-type", "d").split():
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def check_left(witness: Witness, sshd: Sshd, lab: DaemonLab) -> None:
    """Nothing is left of runs, on either host, and the guest lives."""
    await_guard(witness, sshd, lab)
    bases = [point["checkpoint"] for point in witness.points() if point["checkpoint"]][-1:]
    assert witness.checkpoints() == set(bases)
    for target in witness.guest.disks:
        assert set(witness.guest.bitmaps(target)) == set(bases)
    wait_until(lambda: not [*(lab.directory / "c/run").glob("ssh-*")], "end of guards", 60)


def refused(ctl: FarCtl, code: int, *words: str | Path, domain: str = NAME) -> str:
    """The one line of a backup that was refused."""
    found = ctl("backup", domain, *words, code=code).stderr.splitlines()
    assert len(found) == 1, found
    return found[0]


def test_no_byte_of_the_wrong_host(
    ctl: FarCtl, witness: Witness, sshd: Sshd, lab: DaemonLab, tmp_path: Path
) -> None:
    """Full and increment; a set stays with its host."""
    before = ctl.alien.stat()
    witness.fill(2 * MIB)
    witness.run("-l", "full")
    witness.change()
    point = witness.run().json["point"]
    assert (point["level"], point["warnings"]) == ("inc", [])
    witness.check_all()
    check_left(witness, sshd, lab)
    (loader,) = witness.path.glob("loader.*")
    assert loader.read_bytes() == HALT
    after = ctl.alien.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    # the same domain by a run that is at home there, with all that is the same
    home = RiggedCtl(lab.uri, lab.directory / "home")
    said = home("backup", NAME, "-o", witness.path, code=50).stderr
    assert "of another host, which was saved by ssh, not of this host" in said
    made = tmp_path / "home"
    home.backup(NAME, made, "-l", "full")
    assert "of a host by its own run, not of hv2" in refused(ctl, 50, "-o", made)
    home("checkpoints", NAME, "--drop", home.points(made)[0]["chain"])


def test_what_is_not_done_by_ssh(ctl: FarCtl, sshd: Sshd, lab: DaemonLab, tmp_path: Path) -> None:
    new = tmp_path / "new"
    lab.guest("off")
    said = refused(ctl, 20, "-o", new, domain="off")
    assert "of hv2 is off, and its images can't be read by ssh: start it" in said
    said = refused(ctl, 20, "-o", new, "--start-paused", domain="off")
    assert "no domain of another host is started for a run" in said
    assert "give its directory with -o" in refused(ctl, 2)
    # an ssh that dies would take the guest with it (QEMU before 10.0)
    threads = lab.guest("threads", options=GuestOptions(iothreads=1))
    threads.start()
    done = ctl("backup", "threads", "-o", new, code=None)
    assert threads.is_running()
    if done.code:
        assert "has iothreads, and its QEMU" in done.stderr
        assert not (new / "points").exists()
    # what is refused leaves nothing there, either
    assert sshd.run("find", "/run/nbdbackup", "!", "-type", "d") == ""
    assert lab.virsh("domstate", "off").strip() == "shut off"
    # ssh ends in another place than libvirt; and it does not know the host
    with Sshd(["unshare", "--mount"], tmp_path / "other", HOST) as other:
        ctl.options = ("--ssh-config", other.config)
        uri, ctl.uri = ctl.uri, f"{ctl.uri}?socket={lab.socket}"
        said = refused(ctl, 20, "-o", new)
        assert "ssh and libvirt do not end at the same host" in said
        (other.directory / "known").write_text("")
        assert "put the host's key into known_hosts" in refused(ctl, 30, "-o", new)
        ctl.uri, ctl.options = uri, ("--ssh-config", sshd.config)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return "T (stopped)" in Path(f"/proc/{pid}/status").read_text()


def masters(ctl: FarCtl) -> list[int]:
    """Process ids of ssh's masters of our runs."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = each.read_bytes()
            is_master = words.startswith(b"ssh\0") and b"ControlMaster=yes" in words
            if is_master and os.fsencode(ctl.runtime) in words:
                found.append(int(each.parent.name))
    return found


def test_the_way_is_lost(ctl: FarCtl, witness: Witness, sshd: Sshd, lab: DaemonLab) -> None:
    """ssh dies, the run dies, both and the guard; the base stays, the next run is clean."""
    witness.run("-l", "full")
    witness.change()
    with (
        ctl.rigged("STOP@block-written#2"),
        ctl.start("backup", NAME, "-o", witness.path) as run,
    ):
        wait_until(lambda: is_stopped(run.pid), "stop", 60)
        (master,) = masters(ctl)
        os.kill(master, signal.SIGKILL)
        os.kill(run.pid, signal.SIGCONT)
        said = run.communicate(timeout=60)[1]
        assert run.returncode == 30, said
        assert "by ssh was lost" in said
    await_guard(witness, sshd, lab)
    with ctl.rigged("SLAY+@block-written#2"):
        witness.run(code=-signal.SIGKILL)
    witness.change()
    point = witness.run().json["point"]
    assert (point["level"], point["warnings"]) == ("inc", [])
    check_left(witness, sshd, lab)
    # the host does not hear that we are gone, and a client is in its handshake
    with (
        ctl.rigged("STOP+@connection-kept#1"),
        ctl.start("backup", NAME, "-o", witness.path) as run,
    ):
        wait_until(lambda: is_stopped(run.pid), "stop", 60)
        note = sshd.run("sh", "-c", "cat /run/nbdbackup/ssh-*/*").split()
        os.kill(int(note[0]), signal.SIGSTOP)
        run.kill()
        await_guard(witness, sshd, lab)
    witness.change()
    assert witness.run().json["point"]["level"] == "inc"
    witness.check_all()
    check_left(witness, sshd, lab)
