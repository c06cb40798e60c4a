"""Runs as the configuration says, with real domains: sets, places, programs, ends of guests."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.model.policy import Rotate, period
from nbdbackupd.repo import layout
from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.ctl import ROOT
from tests.lib.scene import WARNED, Saved, Scene, assert_same, scene, tree

pytestmark = pytest.mark.system
KIB = 1024
DAMAGED = 40
DISK = DiskSpec(target="vda", size=8 * MIB)
DOMAIN, SOURCE, REPOSITORY, BUSY = 20, 30, 50, 75
LATER = "LATER40@clock-read#1"


@dataclass(frozen=True)
class Appliance:
    """A scene whose runs read a configuration below ``directory``."""

    scene: Scene
    directory: Path

    @property
    def repository(self) -> Path:
        return self.directory / "repository"

    @property
    def home(self) -> Path:
        """Where the domain's sets are, its name being harmless."""
        return self.repository / self.scene.guest.name

    def configure(self, **settings: Any) -> None:
        """Write the main file; section and key are parted by two underscores."""
        ctl = self.scene.ctl
        document: dict[str, Any] = {
            "repository": {"path": str(self.repository)},
            "scratch": {"directory": str(ctl.scratch), "reserve": "16M"},
            "checkpoint_directory": str(ctl.state),
        }
        for name, value in settings.items():
            section, _, key = name.rpartition("__")
            (document.setdefault(section, {}) if section else document)[key] = value
        (self.directory / "etc").mkdir(exist_ok=True)
        # JSON is YAML
        (self.directory / "etc/nbdbackup.yaml").write_text(json.dumps(document))

    def argv(self, *options: str) -> tuple[str, ...]:
        return (self.scene.guest.name, "--config-dir", str(self.directory / "etc"), *options)

    def run(self, *options: str, code: int = 0) -> Any:
        """Run and return the report; nothing is left but the point."""
        report = self.scene.ctl("run", *self.argv("--json", *options), code=code).json
        self.scene.assert_clean()
        return report

    def save(self, *options: str, code: int = 0) -> Saved:
        """Take references, run, remember the point for ``prove_all``."""
        references = self.scene.references()
        report = self.run(*options, code=code)
        assert report["result"] == "saved", report
        saved = Saved(set=Path(report["set"]), report=report["backup"], references=references)
        self.scene.history.append(saved)
        return saved

    def refuse(self, *options: str, code: int) -> str:
        """Have a run refused; the line that says why."""
        result = self.scene.ctl("run", *self.argv(*options), code=code)
        (line,) = [each for each in result.stderr.splitlines() if each.startswith("nbdbackupctl:")]
        self.scene.assert_clean()
        return line


def change(here: Scene, number: int) -> None:
    """Write some data and some zeroes."""
    here.guest.write("vda", number * 64 * KIB, 64 * KIB, number)
    here.guest.write_zeroes("vda", 4 * MIB + number * 64 * KIB, 64 * KIB, unmap=True)


@pytest.fixture
def one(lab: DaemonLab, tmp_path: Path) -> Iterator[Appliance]:
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, f"run-{uuid.uuid4().hex[:8]}", [DISK], options) as here:
        here.guest.write("vda", 0, 4 * MIB, 0xEE)
        appliance = Appliance(here, tmp_path)
        appliance.configure()
        yield appliance


def test_a_name_of_two_domains(one: Appliance) -> None:
    """H-6: each UUID has increments of its own in one repository, and no name chooses one."""
    here, name = one.scene, one.scene.guest.name
    first = one.save()
    change(here, 1)
    assert one.save().point["level"] == "inc"
    mine, other = here.guest.options, GuestOptions(uuid=str(uuid.uuid4()))

    def become(options: GuestOptions) -> None:
        """As the other host that has the same repository knows the name."""
        here.guest.destroy()
        for each in here.checkpoints():
            here.lab.virsh("checkpoint-delete", name, each, "--metadata")
        here.guest.undefine()
        here.guest.options = options
        here.guest.define()
        here.guest.start()

    become(other)
    theirs = [one.save()]
    home = one.repository / f"{name}@{other.uuid[:8]}" if other.uuid else one.home
    assert theirs[0].set.parent == home
    change(here, 2)
    theirs.append(one.save())
    assert [each.point["level"] for each in theirs] == ["full", "inc"]
    config = ("--config-dir", str(one.directory / "etc"))
    for words in (
        ("list", name),
        ("show", name),
        ("verify", name),
        ("restore", name, "-o", str(one.directory / "out")),
        ("map", name),
        ("files", name, "fs"),
    ):
        said = here.ctl(*words, *config, code=2).stderr
        assert f"{name} means more than one domain" in said, words
        assert str(mine.uuid) in said
        assert str(other.uuid) in said
    assert not (one.directory / "out").exists()
    listed = here.ctl("list", str(mine.uuid), *config, "--json").json
    assert [each["set"] for each in listed["sets"]] == [str(first.set)]
    assert here.ctl("status", name, *config, "--json", code=None).json["domains"][0]["point"] == (
        theirs[-1].id
    )
    here.prove_all()
    # and the first one goes on where it was
    become(mine)
    change(here, 3)
    again = one.save()
    assert (again.set, again.point["level"]) == (first.set, "inc")
    here.prove(again)


def test_a_set_for_each_month(one: Appliance) -> None:
    here = one.scene
    planned = one.run("--dry-run")
    assert (planned["result"], planned["level"]) == ("planned", "full")
    assert not one.repository.exists()
    month = period(Rotate.MONTHLY, datetime.now().astimezone())
    full = one.save()
    assert full.set == one.home / month
    assert str(full.set) == planned["set"]
    assert full.point["level"] == "full"
    change(here, 1)
    second = one.save()
    assert (second.set, second.point["level"], second.modes) == (full.set, "inc", {"vda": "delta"})
    old = second.point["checkpoint"]
    assert here.checkpoints() == [old]
    with here.ctl.rigged(LATER):
        change(here, 2)
        third = one.save()
        later = datetime.now().astimezone() + timedelta(days=40)
        assert third.set == one.home / period(Rotate.MONTHLY, later)
        assert third.point["level"] == "full"
        # nothing of the old set weighs on the guest any more
        assert here.checkpoints() == [third.point["checkpoint"]]
        assert list(here.guest.bitmaps("vda")) == here.checkpoints()
        change(here, 3)
        # off or not, the set goes on
        here.guest.stop()
        fourth = one.save()
        assert (fourth.set, fourth.modes) == (third.set, {"vda": "delta"})
    assert sorted(path.name for path in one.home.iterdir()) == [full.set.name, third.set.name]
    here.prove_all()
    # and by the domain's name, the newest set or the one that has the point
    config = ("--config-dir", str(one.directory / "etc"))
    name = here.guest.name
    listed = here.ctl("list", name, *config, "--json").json
    assert [len(each["points"]) for each in listed["sets"]] == [2, 2]
    here.ctl("verify", name, *config)
    for saved, wish in ((fourth, ()), (second, ("--until", old)), (full, ("--point", full.id))):
        into = one.directory / "restored"
        done = here.ctl("restore", name, *config, "-o", into, "--format", "raw", *wish, "--json")
        assert done.json["point"] == saved.id
        (disk,) = done.json["disks"]
        assert_same(Path(disk["path"]), "raw", saved.references["vda"])
        shutil.rmtree(into)


def test_checkpoints_of_a_chain_without_a_record(one: Appliance) -> None:
    here = one.scene
    full = one.save()
    shutil.rmtree(here.ctl.state)
    # told to end when the point is made: it counts, and what is left is dropped later
    with here.ctl.rigged(LATER, "TERM@chains-retired#1"):
        second = one.save()
    assert second.set != full.set
    assert len(here.checkpoints()) == 2
    shutil.rmtree(second.set)
    with here.ctl.rigged(LATER):
        third = one.save()
    assert third.point["checkpoint"] in here.checkpoints()
    assert full.point["checkpoint"] not in here.checkpoints()
    assert second.point["checkpoint"] not in here.checkpoints()
    here.history.remove(second)
    here.prove_all()


def test_a_damaged_set_is_not_continued(one: Appliance) -> None:
    full = one.save()
    (stream,) = full.set.glob("vda.full.data")
    stream.unlink()
    report = one.run(code=WARNED)
    assert report["set"] == f"{full.set}.2"
    assert report["level"] == "full"
    assert "vda.full.data" in report["problems"][0]
    assert one.run()["level"] == "inc"
    one.scene.ctl("verify", report["set"])
    # and one whose base a verification has found damaged, which nobody would notice else
    stream = Path(report["set"]) / "vda.full.data"
    data = bytearray(stream.read_bytes())
    data[-100] ^= 1
    stream.write_bytes(data)
    one.scene.ctl("verify", report["set"], code=DAMAGED)
    name = one.scene.guest.name
    said = one.scene.ctl("backup", name, "-o", report["set"], code=DAMAGED).stderr
    assert "begin a new set with another -o" in said
    third = one.run(code=WARNED)
    assert (third["set"], third["level"]) == (f"{full.set}.3", "full")
    assert "is damaged: vda.full.data" in third["problems"][0]
    assert one.run()["level"] == "inc"


def test_a_repository_that_is_not_mounted(one: Appliance, tmp_path: Path) -> None:
    one.configure(repository__marker=".marker")
    assert ".marker is missing" in one.refuse(code=REPOSITORY)
    one.configure(repository__mount_point=str(one.repository))
    assert "nothing is mounted" in one.refuse(code=REPOSITORY)
    assert not one.repository.exists()
    # a program before the run may be what mounts it
    marker = one.repository / ".marker"
    mount = tmp_path / "mount"
    mount.write_text(f"#!/bin/sh\nmkdir -p {one.repository} && touch {marker}\n")
    mount.chmod(0o755)
    one.configure(repository__marker=".marker", commands__pre=[str(mount)])
    one.save()
    one.scene.prove_all()


def program(path: Path, status: int = 0) -> str:
    """A program that appends what it is told to a file beside it."""
    body = f"env | grep ^NBDBACKUP_ | sort >>{shlex.quote(f'{path}.env')}"
    path.write_text(f"#!/bin/sh\n{body}\necho all is lost >&2\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def told(path: Path) -> dict[str, str]:
    """What a program was told since it was asked last."""
    file = Path(f"{path}.env")
    # the tests' own state directory, tests/conftest.py, is no word of the run
    lines = [each for each in file.read_text().splitlines() if "STATE_DIR" not in each]
    file.unlink()
    return dict(line.removeprefix("NBDBACKUP_").split("=", 1) for line in lines)


def test_programs_around_a_run(one: Appliance, tmp_path: Path) -> None:
    pre, post = tmp_path / "pre", tmp_path / "post"
    both = {"commands__pre": [program(pre)], "commands__post": [program(post)]}
    one.configure(**both)
    name = one.scene.guest.name
    saved = one.save()
    common = {"DOMAIN": name, "UUID": saved.point["uuid"], "DIRECTORY": str(one.home)}
    assert told(pre) == common
    after = told(post)
    reason = after.pop("REASON")
    assert "no set yet" in reason
    assert after == common | {
        "RESULT": "success", "SET": str(saved.set), "LEVEL": "full", "POINT": saved.id,
    }  # fmt: skip
    # one that fails before the run ends it, and those after are told
    program(pre, 5)
    before = tree(one.repository)
    assert "pre failed with exit status 5: all is lost" in one.refuse(code=SOURCE)
    assert tree(one.repository) == before
    after = told(post)
    assert after["RESULT"] == "failure"
    assert "all is lost" in after["REASON"]
    # one that fails after it costs a warning, and takes no other one with it
    program(pre)
    program(tmp_path / "bad", 7)
    one.configure(**both | {"commands__post": [str(tmp_path / "bad"), str(post)]})
    report = one.run(code=WARNED)
    assert report["result"] == "saved"
    assert "bad failed with exit status 7" in report["problems"][0]
    assert told(post)["RESULT"] == "success"
    # one that hangs is ended; and so is a run that is told to end meanwhile
    one.configure(commands__pre=["/bin/sleep 1000"], commands__timeout="1")
    assert "sleep did not end within 1 s" in one.refuse(code=SOURCE)
    one.configure(commands__pre=["/bin/sleep 1000"])
    with one.scene.ctl.start("run", *one.argv()) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: bool(children.read_text()), "program", 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_one_place_for_two_domains(one: Appliance, lab: DaemonLab, tmp_path: Path) -> None:
    here = one.scene
    options = GuestOptions(uuid=str(uuid.uuid4()))
    one.configure(limits__concurrent_runs=1)
    with scene(lab, tmp_path / "b", f"two-{uuid.uuid4().hex[:8]}", [DISK], options) as there:
        # both on one host: one runtime directory
        there.ctl.runtime = here.ctl.runtime
        other = Appliance(there, one.directory)
        with (
            here.ctl.rigged("STOP@disk-copied#1"),
            here.ctl.start("run", *one.argv()) as first,
        ):
            here.ctl.faults = ()
            stat = Path(f"/proc/{first.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
            busy = there.ctl("run", *other.argv("--wait", "1"), code=BUSY).stderr
            assert "at most 1 run at a time (limits.concurrent_runs)" in busy
            assert f"process {first.pid} (run of {here.guest.name})" in busy
            with there.ctl.start("run", *other.argv("--json")) as second:
                first.send_signal(signal.SIGCONT)
                assert first.wait(60) == 0
                out, _ = second.communicate(timeout=60)
                assert second.returncode == 0
        assert json.loads(out)["result"] == "saved"
        assert other.run()["level"] == "inc"
        # a run that was killed leaves no place taken
        with there.ctl.rigged("KILL@disk-copied#1"):
            there.ctl("run", *other.argv(), code=-signal.SIGKILL)
        here.ctl("run", *one.argv())
        assert other.run()["result"] == "saved"


def test_after_the_guests_end(one: Appliance) -> None:
    here = one.scene
    one.save()

    def nothing(why: str) -> None:
        before = tree(one.repository)
        report = one.run("--shutdown")
        assert (report["result"], tree(one.repository)) == ("skipped", before)
        assert why in report["reason"]

    nothing("on_shutdown is off")
    one.configure(on_shutdown=True, start_paused=True)
    nothing("start_paused is on")
    one.configure(on_shutdown=True)
    nothing("runs again")
    # nothing was written since
    here.guest.stop()
    nothing("nothing has changed")
    here.guest.start()
    change(here, 1)
    here.guest.stop()
    saved = one.save("--shutdown")
    assert (saved.point["level"], saved.modes) == ("inc", {"vda": "delta"})
    nothing("nothing has changed")
    # a saved state is no end
    here.guest.start()
    change(here, 2)
    here.lab.virsh("managedsave", "--domain", here.guest.name)
    nothing("its state is saved")
    here.lab.virsh("managedsave-remove", "--domain", here.guest.name)
    here.prove_all()


def test_an_end_in_the_middle_of_a_run(one: Appliance) -> None:
    here = one.scene
    one.configure(on_shutdown=True)
    one.save()
    change(here, 1)
    with (
        here.ctl.rigged("STOP@disk-copied#1"),
        here.ctl.start("run", *one.argv()) as first,
    ):
        here.ctl.faults = ()
        stat = Path(f"/proc/{first.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
        here.guest.stop()
        references = here.references()
        with here.ctl.start("run", *one.argv("--shutdown", "--json")) as second:
            # it waits for the lock of a run that is about to find its guest gone
            place = here.ctl.runtime / "slots/2"
            wait_until(
                lambda: place.exists() and f"{second.pid} " in place.read_text(), "place", 30
            )
            first.send_signal(signal.SIGCONT)
            assert first.wait(60) == SOURCE
            out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    report = json.loads(out)
    saved = Saved(set=Path(report["set"]), report=report["backup"], references=references)
    assert (saved.point["level"], saved.modes) == ("inc", {"vda": "delta"})
    here.assert_clean()
    here.history.append(saved)
    here.prove_all()


def test_a_guest_that_is_started_again_meanwhile(one: Appliance) -> None:
    here = one.scene
    one.configure(on_shutdown=True)
    one.save()
    change(here, 1)
    here.guest.stop()
    # libvirt's hook announces a start: the run waits for it
    here.ctl("yield", here.guest.name)
    with here.ctl.start("run", *one.argv("--shutdown", "--json")) as process:
        leases = here.ctl.runtime
        wait_until(lambda: bool(list(leases.glob("*/lease.json"))), "run", 30)
        here.guest.start()
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (json.loads(out)["result"], json.loads(out)["reason"]) == ("skipped", "the domain runs")
    assert len(here.ctl.points(here.history[0].set)) == 1
    one.save()
    here.prove_all()


def test_a_name_that_needs_escaping(lab: DaemonLab, tmp_path: Path) -> None:
    name = f"ü %41~{uuid.uuid4().hex[:6]} $x"
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, name, [DISK], options) as here:
        one = Appliance(here, tmp_path)
        one.configure()
        here.guest.write("vda", 0, MIB, 0xEE)
        saved = one.save()
        assert saved.set.parent == one.repository / layout.escape(name, layout.MAX_DOMAIN)
        change(here, 1)
        assert one.save().set == saved.set
        here.prove_all()
        config = ("--config-dir", str(one.directory / "etc"))
        listed = here.ctl("list", name, *config, "--json").json
        assert [len(each["points"]) for each in listed["sets"]] == [2]


def test_after_a_crash_the_bitmaps_decide(one: Appliance) -> None:
    here = one.scene
    one.configure(on_shutdown=True)
    one.save()
    change(here, 1)
    here.guest.kill9()
    wait_until(lambda: "crashed" in state(here), "libvirt sees the crash", 30)
    saved = one.save("--shutdown", code=WARNED)
    assert saved.modes == {"vda": "full"}
    here.prove_all()


def state(here: Scene) -> str:
    return here.lab.virsh("domstate", "--reason", "--domain", here.guest.name)


def test_a_domain_that_is_gone(one: Appliance) -> None:
    gone = ("no-such", "--config-dir", str(one.directory / "etc"))
    assert "no-such" in one.scene.ctl("run", *gone, code=DOMAIN).stderr
    done = one.scene.ctl("run", "--shutdown", *gone)
    assert "nothing saved of no-such: libvirt no longer knows it" in done.stdout


def test_the_program_is_replaced_in_the_middle(one: Appliance, tmp_path: Path) -> None:
    """As a package's upgrade does; the run has all of itself in memory."""
    here = one.scene
    one.save()
    change(here, 1)
    program = tmp_path / "program"
    for part in ("nbdbackupd", "tests/lib", "tests/lab"):
        shutil.copytree(ROOT / part, program / part, ignore=shutil.ignore_patterns("*.pyc"))
    (program / "tests/__init__.py").touch()
    references = here.references()
    with here.ctl.rigged("STOP@backup-made#1"):
        argv = here.ctl.argv("run", *one.argv("--json"))
    with subprocess.Popen(
        argv, cwd=program, env=here.ctl.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            stat = Path(f"/proc/{process.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
            shutil.rmtree(program)
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    report = json.loads(out)
    saved = Saved(set=Path(report["set"]), report=report["backup"], references=references)
    assert saved.modes == {"vda": "delta"}
    here.history.append(saved)
    here.assert_clean()
    here.prove_all()


def test_metrics_of_good_and_bad_runs(one: Appliance, tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    one.configure(monitoring__metrics_directory=str(folder))
    assert one.run("--dry-run")["result"] == "planned"
    assert list(folder.iterdir()) == []
    one.run()
    change(one.scene, 1)
    one.run()
    good = metrics(folder)
    for name, value in (
        ("last_run_exit_status", 0), ("last_run_success", 1), ("runs_total", 2),
        ("failed_runs_total", 0), ("chain_points", 2), ("last_point_full", 0),
        ("last_point_data_bytes", 64 * KIB),
    ):  # fmt: skip
        assert good[name] == value, name
    one.configure(monitoring__metrics_directory=str(folder), repository__marker="none-such")
    one.refuse(code=REPOSITORY)
    bad = metrics(folder)
    assert (bad["last_run_exit_status"], bad["last_run_success"]) == (REPOSITORY, 0)
    assert (bad["runs_total"], bad["failed_runs_total"]) == (3, 1)
    for name in ("last_success_timestamp_seconds", "last_point_timestamp_seconds", "chain_points"):
        assert bad[name] == good[name]
    # libvirt is away
    ctl = one.scene.ctl
    uri, ctl.uri = ctl.uri, "qemu:///system?socket=/nowhere"
    ctl("run", *one.argv(), code=DOMAIN)
    ctl.uri = uri
    away = metrics(folder)
    assert (away["last_run_exit_status"], away["failed_runs_total"]) == (DOMAIN, 2)
    # no reason to lose a backup
    one.configure(monitoring__metrics_directory=str(tmp_path / "away"))
    assert one.run(code=WARNED)["result"] == "saved"


def test_status_of_real_domains(one: Appliance, tmp_path: Path) -> None:
    name = one.scene.guest.name
    one.configure(monitoring__metrics_directory=str(tmp_path))

    def status(code: int, *options: str) -> Any:
        words = ("--config-dir", str(one.directory / "etc"), "--json", *options)
        document = one.scene.ctl("status", *words, code=code).json
        (found,) = (each for each in document["domains"] if each["domain"] == name)
        return found

    before = status(WARNED)
    assert (before["protected"], before["point"], before["busy"]) == (False, "", "")
    assert "unprotected" in before["reasons"][0]
    one.run()
    assert host_metrics(tmp_path)["unprotected_domains"] >= 1
    (one.directory / "etc/domains.d").mkdir()
    (one.directory / "etc/domains.d/a.yaml").write_text("match: {regex: '.*'}")
    change(one.scene, 1)
    point = one.run()["backup"]["point"]
    after = status(0, name)
    assert (after["health"], after["reasons"], after["protected"]) == ("ok", [], True)
    assert (after["point"], after["level"], after["points"]) == (point["id"], "inc", 2)
    assert after["stored_bytes"] == point["stored_bytes"]
    assert 0 <= after["age"] < 600
    assert host_metrics(tmp_path)["unprotected_domains"] == 0
    assert host_metrics(tmp_path)["domains"] >= 1
    assert status(WARNED, name, "--critical", "0s")["health"] == "critical"


def host_metrics(folder: Path) -> dict[str, float]:
    """The samples of the host's file."""
    lines = (folder / "nbdbackup.prom").read_text().splitlines()
    pairs = [line.split(" ") for line in lines if not line.startswith("#")]
    return {key.removeprefix("nbdbackup_"): float(value) for key, value in pairs}


def metrics(folder: Path) -> dict[str, float]:
    """The samples of the one file, by name without prefix."""
    (file,) = folder.glob("nbdbackup-*.prom")
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    pairs = [line.rpartition(" ") for line in lines]
    return {
        key.partition("{")[0].removeprefix("nbdbackup_"): float(value) for key, _, value in pairs
    }


def test_systemd_is_told(one: Appliance, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(1)
        one.scene.ctl.environment |= {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000000"}
        one.run()
        lines = receive(receiver)
    assert "WATCHDOG=1" in lines
    assert "STATUS=vda: 100 %" in lines
    assert any(f"STATUS=saving into {one.home}" in line for line in lines)
    assert any(line.startswith("STATUS=saved ") for line in lines)
    # while fsync runs, and until the next disk is copied
    assert "WATCHDOG_USEC=1800000000" in lines


def receive(receiver: socket.socket) -> list[str]:
    lines = []
    while True:
        try:
            lines += receiver.recv(4096).decode().split("\n")
        except TimeoutError:
            return lines


def test_backup_without_a_set(one: Appliance) -> None:
    here = one.scene
    one.configure(compression=3, threshold="1M", limits__bandwidth="2M")
    config = ("--config-dir", str(one.directory / "etc"))
    name = here.guest.name

    def backup(*options: str) -> Any:
        return here.ctl("backup", name, *config, "--json", *options).json

    report = backup()
    first = report["point"]
    # 4 MiB: the limit has time pass, whatever the host is like
    assert report["seconds"] > (4 - 1) / 2 - 0.25
    assert first["disks"][0]["compressed"]
    assert one.home.is_dir()
    change(here, 1)
    assert backup()["result"] == "skipped"
    said = here.ctl("backup", name, *config, "--threshold", "0").stdout
    assert said.splitlines()[-1].startswith(f"  into {one.home}/")
    change(here, 2)
    second = backup("--threshold", "0", "--no-compress", "--limit-rate", "1G")["point"]
    assert (second["level"], second["disks"][0]["compressed"]) == ("inc", False)
    # with -o the configuration is not even read
    (one.directory / "etc/nbdbackup.yaml").write_text("nonsense: yes\n")
    assert not backup("-o", str(here.set))["point"]["disks"][0]["compressed"]
    assert "nonsense" in here.ctl("backup", name, *config, code=10).stderr


def test_old_points_leave_by_the_rules(one: Appliance) -> None:
    """One full for good: runs of a year, each of which prunes; all that stays is what it was.

    ``NBDBACKUP_NIGHTS=365`` has a run for each day of it.
    """
    here, nights = one.scene, int(os.environ.get("NBDBACKUP_NIGHTS", "8"))
    rules = {"daily": 7, "weekly": 4, "monthly": 12} if nights > 100 else {"last": 2, "monthly": 3}
    wanted = {f"retention__{name}": count for name, count in rules.items()}
    one.configure(level__rotate="never", retention__prune="run", **wanted)
    for number in range(nights):
        change(here, number % 32)
        with here.ctl.rigged(f"LATER{number * 365 // nights}@clock-read#1"):
            saved = one.save()
        assert saved.point["level"] == ("inc" if number else "full")
        assert saved.set == here.history[0].set
    made = {each.id: each for each in here.history}
    left = [point["id"] for point in here.ctl.points(saved.set)]
    assert left[-2:] == [each.id for each in here.history[-2:]]
    assert sum(rules.values()) - 1 <= len(left) <= sum(rules.values())
    for ident in left:
        here.prove(made[ident])
    (full,) = [each for each in here.ctl.points(saved.set) if each["level"] == "full"]
    assert full["id"] == left[0]
    # after a year the oldest still stays for the months
    assert (full["id"] == here.history[0].id) is ("daily" in rules)
    here.ctl("verify", saved.set)
    # nothing else of those that went is there: each disk has a stream and an index for each point
    names = [path.name for path in saved.set.glob("vda.*") if path.suffix in (".data", ".index")]
    assert len(names) == 2 * len(left)


def test_room_is_made_for_the_next_point(one: Appliance, tmp_path: Path) -> None:
    """What no rule wants goes before a run that may not fit, and only if that is wanted."""
    here, small = one.scene, tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", small])
    try:
        settings = {
            "repository__path": str(small),
            "level__rotate": "monthly",
            "retention__last": 2,
            "retention__prune": "never",
        }
        one.configure(**settings)
        for number in range(4):
            with here.ctl.rigged(f"LATER{number * 40}@clock-read#1"):
                one.save()
        sets = [each.set for each in here.history]
        ballast = shutil.disk_usage(small).free - 3 * MIB
        run(["fallocate", "-l", str(ballast), small / "ballast"])
        with here.ctl.rigged("LATER160@clock-read#1"):
            said = here.ctl("run", *one.argv(), code=REPOSITORY).stderr
            assert "it may not fit" in said
            assert [each for each in sets if each.is_dir()] == sets
            one.configure(**settings, retention__make_room=True)
            one.save()
        assert [each for each in sets if each.is_dir()] == sets[2:]
        here.history = here.history[2:]
        here.prove_all()
    finally:
        run(["umount", "--lazy", small])
