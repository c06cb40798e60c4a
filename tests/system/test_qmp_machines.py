"""Machines without libvirt as the configuration has them, and the verbs that look at them."""

import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.rundir import HELD
from tests.lab.process import wait_until
from tests.lib.contents import read_disk
from tests.lib.images import make
from tests.lib.rigged import RiggedCtl
from tests.lib.standalone import MIB, AgentSocket, Process, running

pytestmark = pytest.mark.system
UUID = "3c4f1a52-9a3e-4a40-9bb1-0a1d7a4b9c12"


@pytest.fixture
def ctl() -> Iterator[RiggedCtl]:
    # a socket's path must be short, and no libvirt is there at all
    with tempfile.TemporaryDirectory(prefix="nbq-", dir="/tmp") as directory:
        yield RiggedCtl("qemu:///system", Path(directory), {"LIBVIRT_DEFAULT_URI": "none:///"})


def machine(directory: Path, *more: str) -> Process:
    """Two disks."""
    one, two = make(directory / "one.qcow2", 8 * MIB), make(directory / "two.qcow2", 8 * MIB)
    arguments = [
        *("-uuid", UUID, "-S", "-object", "secret,id=s0,data=hushhush"),
        *("-blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={one}"),
        *("-device", "virtio-blk-pci,drive=n1,id=disk1"),
        *("-blockdev", f"driver=qcow2,node-name=n2,file.driver=file,file.filename={two}"),
        *("-device", "virtio-blk-pci,drive=n2,id=disk2"),
        *more,
    ]
    images = {"disk1": (one, "qcow2"), "disk2": (two, "qcow2")}
    writers = {name: f"/machine/peripheral/{name}/virtio-backend" for name in images}
    return Process(directory, arguments, images, writers)


def configure(directory: Path, ctl: RiggedCtl, qemu: Process, **more: Any) -> list[str]:
    """Files for it and for a domain of libvirt; the options that name them."""
    etc = directory / "etc"
    (etc / "domains.d").mkdir(parents=True, exist_ok=True)
    main = {
        "repository": {"path": str(directory / "repository")},
        "scratch": {"directory": str(ctl.scratch), "reserve": "16M"},
        "checkpoint_directory": str(ctl.state),
        "level": {"max_increments": 1},
        "monitoring": {"metrics_directory": str(directory)},
    }
    own = {"match": {"name": "vm7"}, "qmp": str(qemu.socket), **more}
    # this one's labels are known to libvirt only
    other = {"match": {"glob": "*", "metadata": {"backup": "x"}}, "compression": 2}
    (etc / "nbdbackup.yaml").write_text(json.dumps(main))
    (etc / "domains.d/vm7.yaml").write_text(json.dumps(own))
    (etc / "domains.d/labels.yaml").write_text(json.dumps(other))
    return ["--config-dir", os.fspath(etc)]


def test_a_machine_as_its_file_says(ctl: RiggedCtl, tmp_path: Path, seed: int) -> None:
    """Runs, rotation, retention, status and the rest, without libvirt."""
    rng, expected = random.Random(seed), {}
    with running(machine(tmp_path)) as qemu:
        config = configure(tmp_path, ctl, qemu, disks={"exclude": ["n2"]}, retention={"last": 1})

        def run(*options: str, code: int = 0) -> Any:
            report = ctl("run", "vm7", *config, "--json", *options, code=code).json
            assert qemu.leftovers() == []
            return report

        shown = ctl("config", "show", "vm7", *config, "--json").json["settings"]
        assert [each["value"] for each in shown if each["path"] == "qmp"] == [str(qemu.socket)]
        assert run("--dry-run")["result"] == "planned"
        assert "alone tells" in run("--shutdown")["reason"]
        for level in ("full", "inc", "full"):
            qemu.scribble(rng)
            report = run()
            assert (report["result"], report["level"]) == ("saved", level)
            expected[report["backup"]["point"]["id"]] = (report["set"], qemu.contents()["disk1"])
            # a new set has begun: the bitmap of the old one is gone
            assert len(qemu.bitmaps()) == 1
        for point, (into, content) in expected.items():
            assert read_disk(Path(into), point, "disk1") == content
            stored = (path.read_bytes() for path in Path(into).rglob("*") if path.is_file())
            assert not any(b"hushhush" in each for each in stored)
        seen = ctl("check", "vm7", *config, "--json", code=None).json
        assert (seen["domain"], seen["uuid"], seen["state"]) == ("vm7", UUID, "paused")
        told = [each["text"] for each in seen["findings"] if each["severity"] != "fail"]
        assert any("disk1" in each and "can be tracked" in each for each in told)
        assert any("where the next increment into" in each for each in told)
        assert any("'run' will save into" in each for each in told)
        assert not [each for each in seen["findings"] if each["severity"] == "fail"]
        qemu.scribble(rng)
        level = ctl("backup", "vm7", *config, "--json").json["point"]["level"]
        assert level == "inc"
        (seen,) = ctl("status", *config, "--json", code=None).json["domains"]
        assert (seen["domain"], seen["protected"], seen["points"]) == ("vm7", True, 2)
        assert seen["last_run"]["result"] == "saved"
        assert "vm7" in (tmp_path / "nbdbackup-vm7.prom").read_text()
        pruned = ctl("prune", "vm7", *config, "--force", "--json").json
        assert pruned
        assert ctl("abort", "vm7", *config).stdout.strip() == "domain vm7 has no backup job"
        # it ends: nobody is there
        qemu.quit()
        said = ctl("run", "vm7", *config, code=20).stderr
        assert "no QEMU listens" in said
        assert ctl("--quiet", "abort", "vm7", *config).stdout == ""
        qemu.start()


def test_verbs_by_the_monitor(ctl: RiggedCtl, tmp_path: Path, seed: int) -> None:
    """Estimate, checkpoints and abort see and remove what is ours, and nothing else."""
    rng, into = random.Random(seed), tmp_path / "set"
    with running(machine(tmp_path)) as qemu:
        reach = ("--qmp", os.fspath(qemu.socket), "vm7")
        theirs = {"node": "n1", "name": "theirs", "persistent": True}
        qemu.monitor.execute("block-dirty-bitmap-add", theirs)
        chain = qemu.backup(ctl, into)["point"]["chain"]
        qemu.io("disk1", f"write -P 5 0 {MIB}")
        found = ctl("estimate", *reach, "-o", into, "--json").json["disks"]
        assert [(each["mode"], each["bytes"]) for each in found] == [("delta", MIB), ("delta", 0)]
        qemu.backup(ctl, tmp_path / "given-up")
        seen = ctl("checkpoints", *reach, "--json").json
        assert [each["state"] for each in seen["checkpoints"]] == ["base", "base"]
        assert seen["foreign_bitmaps"] == ["disk1: theirs"]
        assert "disk1: theirs" in ctl("checkpoints", *reach).stdout
        # the run of another set is told what the given-up one costs
        notes = qemu.backup(ctl, into)["notes"]
        assert any("given-up" in each for each in notes)
        (other,) = (each["id"] for each in seen["chains"] if each["id"] != chain)
        assert len(qemu.bitmaps()) == 3
        ctl("checkpoints", *reach, "--drop", other, "--dry-run")
        assert len(qemu.bitmaps()) == 3
        ctl("checkpoints", *reach, "--drop", other)
        assert len(qemu.bitmaps()) == 2
        ctl("checkpoints", *reach, "--drop", "theirs", code=20)
        with ctl.rigged("SLAY@disk-copied#1"):
            qemu.backup(ctl, into, code=-signal.SIGKILL)
        assert qemu.leftovers()
        ended = ctl("abort", *reach).stdout
        assert "ended export" in ended
        assert qemu.leftovers() == []
        # the bitmap of the dead run
        fates = [each["state"] for each in ctl("checkpoints", *reach, "--json").json["checkpoints"]]
        assert sorted(fates) == ["base", "dead"]
        said = ctl("check", *reach, "-o", into, code=3).stdout
        assert "made by a run that died" in said
        ctl("checkpoints", *reach, "--repair")
        qemu.scribble(rng)
        point = qemu.backup(ctl, into)["point"]
        assert [each["mode"] for each in point["disks"]] == ["delta", "delta"]
        assert read_disk(into, point["id"], "disk1") == qemu.contents()["disk1"]
        assert "theirs" in qemu.bitmaps()


def test_frozen_by_the_agents_socket(ctl: RiggedCtl, tmp_path: Path) -> None:
    """By our policies, within our deadlines, and thawed on every way out."""
    into, path = tmp_path / "set", tmp_path / "qga"
    process = machine(tmp_path)
    # a guest that runs: firmware, without a system
    process.arguments.remove("-S")
    with running(process) as qemu:

        def save(*options: str, code: int = 0) -> Any:
            found = qemu.backup(ctl, into, "--agent", os.fspath(path), *options, code=code)
            return found["point"] if isinstance(found, dict) else found

        def wait_thawed() -> None:
            wait_until(lambda: not (agent.is_frozen or list(ctl.runtime.rglob(HELD))), "thaw", 60)

        assert "no guest agent is connected" in save(code=3)["warnings"][0]
        assert "no guest agent is connected" in save("--freeze", "require", code=20)
        served = AgentSocket(path)
        agent = served.agent
        assert save("--freeze", "require")["consistency"] == "filesystem"
        assert save("-F", "/mnt")["consistency"] == "filesystem"
        assert agent.history == ["freeze", "thaw"] * 2
        assert save("--freeze", "never")["consistency"] == "crash"
        assert save("--pause")["consistency"] == "paused"
        assert agent.history == ["freeze", "thaw"] * 2
        for end in ("KILL@jobs-begun#1", "KILL+@guest-frozen#1", "KILL+@jobs-begun#1"):
            with ctl.rigged(end):
                save(code=-signal.SIGKILL)
            wait_thawed()
            qemu.wait_clean()
        # one that is slow is thawed by the guard when it answers again
        agent.freeze_seconds = 9
        with ctl.rigged("DEFAULT2@quiet-seconds#1"):
            point = save(code=3)
        assert point["consistency"] == "crash"
        assert "not frozen" in " ".join(point["warnings"])
        agent.freeze_seconds = 0
        wait_thawed()
        assert "did not answer the freeze" in save(code=3)["warnings"][0]
        lies: tuple[object, ...] = ("7", {"a": 1}, 0)
        for served.lie in lies:
            assert save("--freeze", "require", code=20)
        served.lie = None
        for served.flood in (b"x" * 65536, b'{"event": 1}\n' * 1000):
            with ctl.rigged("DEFAULT2@quiet-seconds#1"):
                assert save("--freeze", "require", code=20)
        served.close()
