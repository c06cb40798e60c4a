"""Points run as domains, at once: beside the original, torn down in every case, moved in place.

The guest is a boot sector that writes to its disk and says so: ``tests.lib.bootsector``.
"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.model import throwaway
from tests.lab.command import LabError, run
from tests.lab.compare import first_difference_raw
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lab.guest import GuestOptions
from tests.lab.peer import TRIXIE, peer
from tests.lab.process import command_line, wait_until
from tests.lib import bootsector
from tests.lib.accounts import open_to_others
from tests.lib.ctl import Result
from tests.lib.peer_sets import PeerSets
from tests.lib.scene import Saved, Scene, scene
from tests.lib.told import told

pytestmark = pytest.mark.system
SIZE = 32 * MIB
SECONDS = 30.0
WARNED = 3
"""The lab gives QEMU arguments of its own, and a clone is not to have them."""
SCREEN = (
    "<video><model type='vga'/></video>"
    "<graphics type='vnc' port='-1'><listen type='none'/></graphics>"
    "<interface type='user'><mac address='52:54:00:aa:bb:cc'/></interface>"
)


@pytest.fixture(scope="module")
def production(lab: DaemonLab) -> Iterator[Scene]:
    """A running guest, beside a disk that only the test writes to."""
    directory = lab.directory / "w"
    directory.mkdir(mode=0o755)
    image = bootsector.make_disk(directory / "vm.qcow2", SIZE, 1)
    options = GuestOptions(console_log=directory / "console", extra_devices=SCREEN)
    with scene(
        lab, directory, "vm1", [DiskSpec(path=image), DiskSpec(target="vdb")], options
    ) as made:
        yield made


@pytest.fixture(scope="module")
def saved(production: Scene) -> Saved:
    """A full, and an increment on it."""
    production.guest.write("vdb", 5 * MIB, 3 * MIB, 0x51)
    production.save()
    production.guest.write("vdb", 6 * MIB, MIB, 0x52)
    production.guest.write_zeroes("vdb", 7 * MIB, MIB, unmap=True)
    return production.save()


@pytest.fixture
def out(lab: DaemonLab) -> Iterator[Path]:
    """Where a live restore puts the disks: QEMU has to get there."""
    path = lab.directory / "out"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def clean(production: Scene) -> Iterator[None]:
    """Whatever a test does, nothing stays, and the original runs on."""
    yield
    lab = production.lab
    for name in boots(production):
        # of a test that has failed; those that ended by themselves go with their domain
        production.ctl("boot", "--stop", name, code=None)
    for name in lab.virsh("list", "--name").split():
        if name != "vm1":
            lab.virsh("destroy", name)
    for name in lab.virsh("list", "--all", "--name").split():
        if name != "vm1":
            lab.virsh("undefine", name)
    production.ctl("boot", "--list")
    assert production.guest.is_running()


def boots(made: Scene) -> dict[str, dict[str, object]]:
    """What is booted, by name."""
    return {each["name"]: each for each in made.ctl("boot", "--list", "--json").json["boots"]}


def domains(made: Scene) -> list[str]:
    """The running domains beside the original."""
    return sorted(set(made.lab.virsh("list", "--name").split()) - {"vm1"})


def servers(made: Scene) -> list[int]:
    """The processes that serve this lab's disks."""
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and is_server(int(path.name), made.ctl.runtime)
    ]


def is_server(pid: int, runtime: Path) -> bool:
    """Say whether a process is an nbdkit of a runtime directory."""
    words = command_line(pid)
    return bool(words) and "nbdkit" in words[0] and any(str(runtime) in word for word in words)


def assert_nothing(made: Scene) -> None:
    """No domain, no server, no overlay, no map, no socket."""
    assert domains(made) == []
    assert boots(made) == {}
    wait_until(lambda: servers(made) == [], "end of the servers", SECONDS)
    assert not made.ctl.scratch.exists() or list(made.ctl.scratch.iterdir()) == []
    assert [path for path in (made.ctl.runtime / "map").iterdir() if path.is_dir()] == []
    assert [path for path in (made.ctl.runtime / "boot").iterdir() if path.is_dir()] == []


def boot(made: Scene, *options: str | Path, code: int | None = WARNED) -> Result:
    """Boot the newest point."""
    return made.ctl("boot", made.set, *options, code=code)


def wait_alive(console: Path, beyond: int = 2) -> None:
    """Wait until the guest has written more than so many sectors."""
    wait_until(lambda: len(bootsector.said(console)) > beyond, f"guest of {console}", SECONDS)


def digest(directory: Path) -> dict[str, str]:
    """The contents of a set."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_is_point(raw: Path, reference: Path) -> list[int]:
    """But for the sectors that the guest writes, the image is as the reference; the counts."""
    counts = bootsector.counts(raw)
    for path in (raw, reference):
        with path.open("r+b") as file:
            file.seek(bootsector.FIRST * bootsector.SECTOR)
            file.write(bytes(bootsector.END - bootsector.FIRST * bootsector.SECTOR))
    assert first_difference_raw(raw, reference) is None
    return counts


class TestBoot:
    """Runs, and ends without a trace."""

    def test_beside_the_original(self, production: Scene, saved: Saved) -> None:
        before = digest(saved.set)
        begun = time.monotonic()
        report = boot(production, "--detach", "--json").json
        console = Path(report["console"])
        wait_until(lambda: bootsector.GREETING in console.read_text(), "greeting", SECONDS)
        # generous: it takes 0.5 s where nothing else runs
        assert time.monotonic() - begun < 10
        assert (report["name"], report["point"]) == ("boot_vm1", saved.id)
        wait_alive(console)
        known = boots(production)["boot_vm1"]
        assert (known["running"], known["phase"], known["point"]) == (True, "running", saved.id)
        # L-2: what decides what is to be saved knows it by this
        assert throwaway.is_marked(production.lab.virsh("dumpxml", "boot_vm1"))
        clone, original = (
            ET.fromstring(production.lab.virsh("dumpxml", name)) for name in ("boot_vm1", "vm1")
        )
        assert clone.findtext("uuid") == report["uuid"] != original.findtext("uuid")
        assert original.find("./devices/interface") is not None
        assert clone.find("./devices/interface") is None
        mine, theirs = (
            {each.get("file") for each in root.iter("source")} - {None}
            for root in (clone, original)
        )
        assert mine
        assert not mine & theirs
        assert production.lab.virsh("dominfo", "boot_vm1").count("Persistent:     no") == 1
        # the point itself is below what the guest wrote
        overlay = production.ctl.scratch / "boot/boot_vm1/1.qcow2"
        # S-9: what the guest holds is nobody else's; S-8: nor can others lock
        assert open_to_others(production.ctl.scratch, production.ctl.runtime) == []
        raw = production.directory / "vdb.raw"
        run(["qemu-img", "convert", "-U", "-O", "raw", overlay, raw])
        assert first_difference_raw(raw, saved.references["vdb"]) is None
        # what the guest stands on is not to be taken away by mistake
        (served,) = production.ctl("map", "--list", "--json").json["maps"]
        refused = production.ctl("unmap", served["id"], code=2)
        assert "is of 'boot boot_vm1', which must end it" in refused.stderr
        production.ctl("unmap", "--all")
        assert servers(production)
        production.ctl("boot", "--stop", "boot_vm1")
        assert_nothing(production)
        assert digest(saved.set) == before

    def test_several_and_older_points(self, production: Scene, saved: Saved) -> None:
        older = production.history[0].id
        for name, point in (("one", older), ("two", saved.id)):
            report = boot(production, "--detach", "--json", "--name", name, "--point", point).json
            assert report["point"] == point
            wait_alive(Path(report["console"]))
        assert domains(production) == ["one", "two"]
        overlay = production.ctl.scratch / "boot/one/1.qcow2"
        raw = production.directory / "older.raw"
        run(["qemu-img", "convert", "-U", "-O", "raw", overlay, raw])
        assert first_difference_raw(raw, production.history[0].references["vdb"]) is None
        refused = boot(production, "--detach", "--name", "one", code=75)
        assert "boot --stop one" in refused.stderr
        refused = boot(production, "--name", "vm1", code=20)
        assert "a domain vm1 exists" in refused.stderr
        for name in ("one", "two"):
            production.ctl("boot", "--stop", name)
        assert_nothing(production)

    def test_a_signal_ends_it(self, production: Scene, saved: Saved) -> None:
        with production.ctl.start("boot", saved.set, "--json") as process:
            wait_until(lambda: domains(production) == ["boot_vm1"], "the domain", SECONDS)
            wait_until(lambda: boots(production)["boot_vm1"]["phase"] == "running", "it", SECONDS)
            assert boots(production)["boot_vm1"]["attended_by"]
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == WARNED
        assert_nothing(production)

    def test_the_guest_ends_it(self, production: Scene, saved: Saved) -> None:
        with production.ctl.start("boot", saved.set) as process:
            wait_until(lambda: domains(production) == ["boot_vm1"], "the domain", SECONDS)
            wait_until(lambda: boots(production)["boot_vm1"]["phase"] == "running", "it", SECONDS)
            with contextlib.suppress(LabError):
                production.lab.virsh("destroy", "boot_vm1")
            assert process.wait(SECONDS) == WARNED
        assert_nothing(production)

    def test_another_process_ends_it(self, production: Scene, saved: Saved) -> None:
        with production.ctl.start("boot", saved.set) as process:
            wait_until(lambda: domains(production) == ["boot_vm1"], "the domain", SECONDS)
            production.ctl("boot", "--stop", "boot_vm1")
            process.wait(SECONDS)
        assert_nothing(production)

    def test_the_next_one_ends_what_the_dead_left(self, production: Scene, saved: Saved) -> None:
        with production.ctl.start("boot", saved.set) as process:
            wait_until(lambda: domains(production) == ["boot_vm1"], "the domain", SECONDS)
            wait_until(lambda: boots(production)["boot_vm1"]["phase"] == "running", "it", SECONDS)
            process.kill()
            process.wait()
        # it runs on meanwhile
        assert boots(production)["boot_vm1"]["running"] is True
        report = boot(production, "--detach", "--json").json
        assert report["name"] == "boot_vm1"
        assert domains(production) == ["boot_vm1"]
        production.ctl("boot", "--stop", "boot_vm1")
        assert_nothing(production)

    @pytest.mark.parametrize(
        "fault",
        [
            "KILL+@point-served#1",
            "TERM+@overlay-created#2",
            "KILL@transient-started#1",
            "KILL+@transient-started#1",
        ],
    )
    def test_cut_while_it_begins(self, production: Scene, saved: Saved, fault: str) -> None:
        with production.ctl.rigged(fault):
            code = boot(production, "--detach", code=None).code
        assert code == (-9 if "KILL" in fault else 128 + 15)
        if "KILL" in fault:
            # swept by the next one, which is refused itself
            boot(production, "--point", "none", code=50)
        assert_nothing(production)
        assert saved.id

    def test_refused(self, production: Scene, saved: Saved, tmp_path: Path) -> None:
        ctl = production.ctl
        assert "no boot nobody" in ctl("boot", "--stop", "nobody", code=50).stderr
        assert "no live restore nobody" in ctl("boot", "--resume", "nobody", code=50).stderr
        ctl("boot", code=2)
        ctl("boot", saved.set, "--define", code=2)
        ctl("boot", saved.set, "--list", code=2)
        ctl("boot", saved.set, "--live-restore", tmp_path, "--detach", code=2)
        ctl("boot", tmp_path, code=50)
        assert "can't be the name" in boot(production, "--name", "a/b", code=2).stderr
        assert_nothing(production)


class TestLiveRestore:
    """The disks move to their place, all of them or none."""

    def test_while_the_guest_writes(self, production: Scene, saved: Saved, out: Path) -> None:
        report = boot(
            production, "--live-restore", out, "--define", "--json", "--format", "raw"
        ).json
        assert (report["running"], report["defined"]) == (True, True)
        paths = {disk["target"]: Path(disk["path"]) for disk in report["disks"]}
        assert_let_go(production, out)
        # the point is not needed any more: the guest writes on, and starts again
        lab = production.lab
        time.sleep(1)
        lab.virsh("destroy", "boot_vm1")
        counts = assert_is_point(paths["vda"], saved.references["vda"])
        assert counts == list(range(1, max(counts) + 1))
        assert len(counts) > 10
        assert first_difference_raw(paths["vdb"], saved.references["vdb"]) is None
        lab.virsh("start", "boot_vm1")
        assert domains(production) == ["boot_vm1"]

    def test_killed_and_servers_dead(self, production: Scene, saved: Saved, out: Path) -> None:
        """The guest runs on when we die, is held when the servers die, and nothing is lost."""
        words = ("--live-restore", out, "--bandwidth-limit", "128K", "--name", "live")
        with production.ctl.start("boot", saved.set, *words) as process:
            wait_until(lambda: phase(production, "live") == "copying", "the copy", SECONDS)
            process.kill()
            process.wait()
        assert (out / "live-restore.incomplete").exists()
        assert domains(production) == ["live"]
        # a sweep lets it be: it holds what its guest wrote
        boot(production, "--point", "none", code=50)
        assert boots(production)["live"]["running"] is True
        for pid in servers(production):
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: "I/O error" in production.lab.virsh("domstate", "live", "--reason"),
            "the guest to be held", SECONDS,
        )  # fmt: skip
        report = production.ctl("boot", "--resume", "live", "--json").json
        assert (report["running"], report["defined"]) == (True, False)
        assert_let_go(production, out)
        time.sleep(1)
        production.lab.virsh("destroy", "live")
        raw = production.directory / "live.raw"
        for disk in report["disks"]:
            run(["qemu-img", "check", "-q", disk["path"]])
            run(["qemu-img", "convert", "-O", "raw", disk["path"], raw])
            reference = saved.references[disk["target"]]
            if disk["target"] == "vdb":
                assert first_difference_raw(raw, reference) is None
            else:
                counts = assert_is_point(raw, reference)
                assert counts == list(range(1, max(counts) + 1))

    @pytest.mark.parametrize(
        ("fault", "kept"),
        [
            ("KILL@blockcopy-begun#2", True),
            ("KILL+@blockcopy-pivoted#1", True),
            ("KILL+@blockcopy-pivoted#2", True),
            ("KILL+@domain-defined#1", True),
            ("TERM@blockcopy-begun#1", True),
            ("KILL@final-image-made#2", False),
        ],
    )
    def test_cut_at_a_step(
        self, production: Scene, saved: Saved, out: Path, fault: str, kept: bool
    ) -> None:
        with production.ctl.rigged(fault):
            boot(production, "--live-restore", out, "--define", code=None)
        if not kept:
            boot(production, "--point", "none", code=50)
            assert_nothing(production)
            assert not out.exists() or list(out.iterdir()) == []
            return
        assert "boot_vm1" in boots(production)
        report = production.ctl("boot", "--resume", "boot_vm1", "--json").json
        assert (report["running"], report["defined"]) == (True, True)
        assert "running" in production.lab.virsh("domstate", "boot_vm1")
        assert_let_go(production, out)
        time.sleep(1)
        production.lab.virsh("destroy", "boot_vm1")
        assert_images(production, report, saved)

    def test_the_host_goes_down(
        self, lab: DaemonLab, production: Scene, saved: Saved, out: Path
    ) -> None:
        """Without its QEMU the guest starts again from its overlays: on none of the copies."""
        with production.ctl.rigged("KILL@blockcopy-pivoted#2"):
            boot(production, "--live-restore", out, "--format", "raw", code=None)
        pid = (lab.root / "run/qemu/boot_vm1.pid").read_text()
        for each in (int(pid), *servers(production)):
            os.kill(each, signal.SIGKILL)
        wait_until(lambda: domains(production) == [], "libvirt to notice", SECONDS)
        report = production.ctl("boot", "--resume", "boot_vm1", "--json").json
        assert (report["running"], report["defined"]) == (True, False)
        time.sleep(1)
        production.lab.virsh("destroy", "boot_vm1")
        assert_images(production, report, saved)
        assert_let_go(production, out, running=False)

    def test_damaged_data_is_not_copied(self, production: Scene, saved: Saved, out: Path) -> None:
        with damaged(saved.set / "vdb.full.data"):
            refused = boot(production, "--live-restore", out, "--define", code=20)
            assert "the copy of disk vdb" in refused.stderr
            assert "has failed" in refused.stderr
            assert production.ctl("boot", "--resume", "boot_vm1", code=20).stderr
            assert "Persistent:     no" in production.lab.virsh("dominfo", "boot_vm1")
            production.ctl("boot", "--stop", "boot_vm1")
        assert_nothing(production)
        assert list(out.iterdir()) == []

    def test_given_up(self, production: Scene, saved: Saved, out: Path) -> None:
        out.mkdir(mode=0o755)
        (out / "mine").write_text("keep")
        with production.ctl.rigged("KILL@blockcopy-pivoted#2"):
            boot(production, "--live-restore", out, code=None)
        production.ctl("boot", "--stop", "boot_vm1")
        assert_nothing(production)
        assert [path.name for path in out.iterdir()] == ["mine"]
        assert saved.id

    def test_what_is_there_is_not_touched(self, production: Scene, saved: Saved, out: Path) -> None:
        out.mkdir(mode=0o755)
        (out / "vm.qcow2").write_text("mine")
        refused = boot(production, "--live-restore", out, code=50)
        assert "vm.qcow2 exists" in refused.stderr
        assert [path.name for path in out.iterdir()] == ["vm.qcow2"]
        assert (out / "vm.qcow2").read_text() == "mine"
        assert_nothing(production)
        assert saved.id


def phase(made: Scene, name: str) -> object:
    """How far a boot is."""
    return boots(made).get(name, {}).get("phase")


def assert_let_go(made: Scene, out: Path, *, running: bool = True) -> None:
    """The live restore is complete, and nothing of the boot is left but the domain."""
    assert boots(made) == {}
    wait_until(lambda: servers(made) == [], "end of the servers", SECONDS)
    assert list(made.ctl.scratch.iterdir()) == []
    assert not (out / "live-restore.incomplete").exists()
    if running:
        (name,) = domains(made)
        text = made.lab.virsh("dumpxml", name)
        assert "protocol='nbd'" not in text
        assert not throwaway.is_marked(text)
        assert set(re.findall("<source file='([^']*)'", text)) == {
            str(path) for path in out.iterdir() if path.suffix in (".qcow2", ".raw")
        }


def assert_images(made: Scene, report: dict[str, object], saved: Saved) -> None:
    """Restored images are the point, but for what the guest wrote."""
    raw = made.directory / "restored.raw"
    disks = report["disks"]
    assert isinstance(disks, list)
    for disk in disks:
        run(["qemu-img", "convert", "-f", disk["format"], "-O", "raw", disk["path"], raw])
        if disk["target"] == "vdb":
            assert first_difference_raw(raw, saved.references["vdb"]) is None
        else:
            assert assert_is_point(raw, saved.references["vda"])


class TestVerifyBoot:
    """The result is told, and kept with the point."""

    def test_comes_up(self, production: Scene, saved: Saved) -> None:
        report = verify(production, "console:W0000000[5-9a-f]", code=WARNED).json
        assert report["sound"] is True
        test = report["boot"]
        assert (test["passed"], test["point"], test["reason"]) == (True, saved.id, "")
        assert Path(test["picture"]).read_bytes().startswith(b"\x89PNG\r\n")
        assert_nothing(production)
        listed = {point["id"]: point["boot_test"] for point in production.ctl.points(saved.set)}
        assert listed[production.history[0].id] is None
        assert listed[saved.id]["passed"] is True
        assert f"{saved.id}.png" == listed[saved.id]["picture"]
        assert "came up" in production.ctl("list", saved.set).stdout
        assert "waited_for: console" in production.ctl("show", saved.set).stdout

    def test_does_not_come_up(self, production: Scene, saved: Saved) -> None:
        before = time.monotonic()
        result = verify(production, "console:login:", "--boot-timeout", "2", "-v", code=40)
        assert time.monotonic() - before < 30
        test = result.json["boot"]
        assert test["passed"] is False
        assert re.search("no sign within 2 s; its console ends with: W0", test["reason"])
        assert f"point {saved.id} did not come up" in result.stderr
        assert "boot-test-failed" in told(result.stderr)
        assert_nothing(production)
        # it is the newest test that counts, and the set is what it was
        assert "did not come up" in production.ctl("list", saved.set).stdout
        production.ctl("verify", saved.set)

    def test_a_program_decides(self, production: Scene, tmp_path: Path) -> None:
        probe = tmp_path / "a probe"
        probe.write_text(
            '#!/bin/sh -e\n[ "$1" = "an argument" ]\n'
            'virsh -q -c "$NBDBACKUP_BOOT_URI" domname "$NBDBACKUP_BOOT_UUID"'
            ' | grep -q "^$NBDBACKUP_BOOT_NAME$"\n'
            'grep -q W00000004 "$NBDBACKUP_BOOT_CONSOLE"\n'
        )
        probe.chmod(0o755)
        command = f"command:'{probe}' 'an argument'"
        test = verify(production, command, "--boot-only", code=WARNED).json["boot"]
        assert (test["passed"], test["waited_for"]) == (True, "command a probe")
        result = verify(production, "command:false", "--boot-only", "--boot-timeout", "3", code=40)
        assert "false failed with exit status 1" in result.json["boot"]["reason"]
        result = verify(production, "command:sleep 60", "--boot-timeout", "2", code=40)
        assert "sleep did not end" in result.json["boot"]["reason"]
        missing = verify(production, f"command:{tmp_path}/gone", "--boot-only", code=2)
        assert "gone" in missing.stderr
        assert_nothing(production)

    def test_the_guest_ends_early(self, production: Scene, saved: Saved) -> None:
        words = ("--boot", "--boot-wait", "console:login:", *scratch(production))
        with production.ctl.start("verify", saved.set, "--json", *words) as process:
            wait_until(lambda: phase(production, "boottest_vm1") == "running", "it", SECONDS)
            # libvirt's answer may come too late to find a transient domain
            with contextlib.suppress(LabError):
                production.lab.virsh("destroy", "boottest_vm1")
            assert process.wait(SECONDS) == 40
            assert process.stderr is not None
            assert "the guest has ended" in process.stderr.read()
        assert_nothing(production)

    def test_killed(self, production: Scene, saved: Saved) -> None:
        """libvirt ends the domain when we are gone; the next one removes the rest."""
        words = ("--boot", "--boot-only", "--boot-wait", "console:login:", *scratch(production))
        with production.ctl.start("verify", saved.set, *words) as process:
            wait_until(lambda: domains(production) == ["boottest_vm1"], "the domain", SECONDS)
            wait_until(lambda: phase(production, "boottest_vm1") == "running", "it", SECONDS)
            process.kill()
            process.wait()
        wait_until(lambda: domains(production) == [], "libvirt to end it", SECONDS)
        verify(production, "console:tiny", "--boot-only", code=WARNED)
        assert_nothing(production)

    def test_not_recorded(self, production: Scene, saved: Saved) -> None:
        shutil.rmtree(saved.set / "boot-tests", ignore_errors=True)
        (saved.set / "boot-tests").write_text("in the way")
        try:
            test = verify(production, "console:tiny", "--boot-only", code=WARNED).json["boot"]
        finally:
            (saved.set / "boot-tests").unlink()
        assert (test["passed"], test["result"]) == (True, "")
        assert any("not recorded" in warning for warning in test["warnings"])

    def test_no_agent_to_wait_for(self, production: Scene, saved: Saved) -> None:
        result = verify(production, "agent", code=2)
        assert "no channel for the guest's agent" in result.stderr
        assert_nothing(production)
        production.ctl("verify", saved.set, "--boot-timeout", "3", code=2)
        production.ctl("verify", saved.set, "--boot", "--boot-wait", "console:(", code=2)
        production.ctl("verify", saved.set, "--boot", "--boot-wait", "prayer", code=2)

    def test_damaged_data_is_not_booted(self, production: Scene, saved: Saved) -> None:
        with damaged(saved.set / "vdb.full.data"):
            report = verify(production, "console:tiny", code=40).json
        assert (report["sound"], report["boot"]) == (False, None)
        assert_nothing(production)


@contextlib.contextmanager
def damaged(stream: Path) -> Iterator[None]:
    """A bit of a stream's first data is wrong meanwhile: what no increment replaces."""
    whole = stream.read_bytes()
    at = whole.index(b"\x51" * 4096) + 4096
    stream.write_bytes(whole[:at] + b"\x50" + whole[at + 1 :])
    try:
        yield
    finally:
        stream.write_bytes(whole)


def scratch(made: Scene) -> tuple[str, str]:
    """Where overlays go."""
    return "--scratch-dir", str(made.ctl.scratch)


def verify(made: Scene, sign: str, *options: str, code: int) -> Result:
    """Verify the set and boot its newest point."""
    words = ("--boot", "--json", "--boot-wait", sign, *options, *scratch(made))
    return made.ctl("verify", made.set, *words, code=code)


def test_in_place_of_the_original(production: Scene, saved: Saved) -> None:
    """On a host that does not know it, the very domain; beside itself, refused."""
    original = ET.fromstring(production.lab.virsh("dumpxml", "vm1"))
    same = ("--keep-identity", "--trust-definition")
    refused = boot(production, *same, code=20)
    assert "a domain vm1 exists" in refused.stderr
    refused = boot(production, *same, "--name", "other", code=20)
    assert f"has UUID {original.findtext('uuid')}" in refused.stderr
    assert_nothing(production)
    with EmbeddedLab() as host:
        ctl = type(production.ctl)(host.uri, host.directory / "ctl")
        words = (*same, "--network", "keep", "--detach", "--json")
        report = ctl("boot", saved.set, *words, code=None).json
        assert (report["name"], report["uuid"]) == ("vm1", original.findtext("uuid"))
        again = ET.fromstring(host.virsh("dumpxml", "vm1"))
        macs = [each.get("address") for each in again.findall("./devices/interface/mac")]
        assert macs == ["52:54:00:aa:bb:cc"]
        wait_alive(Path(report["console"]))
        ctl("boot", "--stop", "vm1")
        assert host.virsh("list", "--all", "--name").split() == []
        assert not list(ctl.scratch.iterdir())


@pytest.mark.slow
def test_a_set_of_the_peer(lab: DaemonLab, production: Scene, tmp_path: Path) -> None:
    scratch_dir = lab.directory / "peer"
    scratch_dir.mkdir()
    scratch_dir.chmod(0o777)
    sets = PeerSets(
        peer=peer(TRIXIE, lab.launcher), guest=production.guest, directory=tmp_path,
        scratch=scratch_dir,
    )  # fmt: skip
    path = sets.run("copy", "copy", "-z")
    words = ("--boot", "--json", "--boot-wait", "console:W0000000[5-9a-f]", *scratch(production))
    # the lab gives QEMU arguments of its own, and nobody vouches for a set of the peer
    refused = production.ctl("verify", path, *words, code=20).stderr
    assert "qemu:arg" in refused
    test = production.ctl("verify", path, *words, "--trust-definition", code=WARNED).json["boot"]
    assert (test["passed"], test["reason"]) == (True, "")
    assert production.ctl.points(path)[0]["boot_test"]["passed"] is True
    assert_nothing(production)


def test_without_libvirt(production: Scene, saved: Saved, tmp_path: Path) -> None:
    ctl = type(production.ctl)("qemu:///system?socket=/nowhere", tmp_path / "ctl")
    refused = ctl("boot", saved.set, code=20)
    assert "can't connect to" in refused.stderr
    # a host that keeps backups may not even have the library
    (tmp_path / "libvirt.py").write_text("raise ImportError('it is gone', name='libvirt')")
    ctl.environment["PYTHONPATH"] = str(tmp_path)
    for words in (("boot", saved.set), ("verify", saved.set, "--boot")):
        refused = ctl(*words, code=20)
        assert "it is gone; install python3-libvirt" in refused.stderr
    ctl("verify", saved.set)
