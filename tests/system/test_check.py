"""``check``: what is wrong is found before a backup fails at it, and nothing is changed."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.source import lease
from tests.lab.agent_guest import agent_guest
from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.ctl import Ctl
from tests.lib.scene import Scene, scene, scene_of

pytestmark = pytest.mark.system
WARNED = 3
DOMAIN = 20
AGENT = {("guest", "warn")}


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", options, "none", path])
    try:
        yield path
    finally:
        run(["umount", "--lazy", path])


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A guest with a set on a file system of its own."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with (
        mounted(tmp_path / "target", "size=64M"),
        scene(lab, tmp_path / "target", request.node.name, (DiskSpec(size=8 * MIB),), options) as s,
    ):
        yield s


class Found(list[dict[str, str]]):
    """The findings of one check."""

    def bad(self) -> set[tuple[str, str]]:
        """Area and severity of what is not right."""
        return {(each["area"], each["severity"]) for each in self if each["severity"] != "ok"}

    def text(self, area: str, severity: str) -> str:
        """All texts of one kind."""
        return "\n".join(
            f"{each['text']} {each['advice']}"
            for each in self
            if (each["area"], each["severity"]) == (area, severity)
        )


def configure(here: Scene, **settings: Any) -> Path:
    """Write the main file of a configuration, which is JSON; returns its directory."""
    directory = here.directory.parent / "etc"
    directory.mkdir(exist_ok=True)
    document = {"repository": {"path": str(here.directory / "repository")}, **settings}
    (directory / "nbdbackup.yaml").write_text(json.dumps(document))
    return directory


def words(here: Scene, *options: str | Path) -> list[str | Path]:
    found: list[str | Path] = [here.guest.name, "--scratch-reserve", "16M"]
    if not {"-o", "--config-dir"} & set(options):
        found += ["--config-dir", configure(here)]
    found += ["--checkpoint-dir", here.ctl.state]
    if "--scratch-dir" not in options:
        found += ["--scratch-dir", here.ctl.scratch]
    return [*found, *options]


def check(here: Scene, *options: str | Path, code: int, ctl: Ctl | None = None) -> Found:
    result = (ctl or here.ctl)("check", *words(here, *options), "--json", code=code)
    report = result.json
    assert report["severity"] == {0: "ok", WARNED: "warn", DOMAIN: "fail"}[code]
    found = Found(report["findings"])
    # whatever is not right comes with a reason
    assert all(each["text"] for each in found)
    return found


def test_w4_all_that_a_run_needs(here: Scene) -> None:
    """W-4: "all is well" while 'run --dry-run' says 50."""
    directory = configure(here)
    config = ("--config-dir", directory)
    found = check(here, *config, code=WARNED)
    assert found.bad() <= AGENT
    planned = here.ctl("run", here.guest.name, *config, "--dry-run", "--json").json
    assert f"will save into {planned['set']}, full: " in found.text("configuration", "ok")
    assert str(planned["set"]) in found.text("target", "ok")
    repository = {"path": str(here.directory / "repository"), "marker": "here"}
    configure(here, repository=repository)
    refused = here.ctl("run", here.guest.name, *config, "--dry-run", code=50).stderr
    found = check(here, *config, code=DOMAIN)
    (line,) = found.text("configuration", "fail").splitlines()
    assert line.strip() in refused
    # it may be mounted by a program before the run
    missing, there = here.directory / "no-such", "/bin/true"
    configure(here, repository=repository, commands={"pre": there, "post": str(missing)})
    found = check(here, *config, code=WARNED)
    assert "marker" in found.text("configuration", "warn")
    assert f"commands.post: {missing} is not there" in found.text("configuration", "warn")
    configure(here, commands={"pre": str(missing)}, notification={"command": str(missing)},
              monitoring={"metrics_directory": str(missing)})  # fmt: skip
    found = check(here, *config, code=DOMAIN)
    assert "commands.pre" in found.text("configuration", "fail")
    said = found.text("configuration", "warn")
    assert ("notification.command" in said, "metrics_directory" in said) == (True, True)
    (directory / "nbdbackup.yaml").write_text("x: [")
    found = check(here, *config, code=DOMAIN)
    assert "no run begins: " in found.text("configuration", "fail")
    # a set that is named needs none of it
    assert check(here, *config, "-o", here.set, code=WARNED).bad() <= AGENT


def everything(here: Scene) -> dict[str, str]:
    """All files with owner, mode, times and content, and all that libvirt tells."""
    found = {}
    for top in (
        here.directory,
        here.ctl.runtime,
        here.ctl.scratch,
        here.ctl.state,
        # not all of the lab's: libvirt gives those of a guest that has ended back to root
        *map(here.guest.image, here.guest.disks),
    ):
        for path in sorted([top, *top.rglob("*")]) if top.exists() else []:
            if path == here.ctl.runtime:
                continue  # the proof that libvirt is this host's has a file there for a moment
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = (
                f"{status.st_mode:o} {status.st_uid}:{status.st_gid} {status.st_mtime_ns} "
                f"{status.st_ctime_ns} {status.st_ino} {content}"
            )
    name = here.guest.name
    running = [["domjobinfo"]] if here.guest.is_running() else []
    for verb in (["dumpxml"], ["dumpxml", "--inactive"], ["domstate"], *running):
        lines = here.lab.virsh(*verb, "--domain", name).splitlines()
        found[" ".join(verb)] = "\n".join(line for line in lines if "Time elapsed" not in line)
    for checkpoint in here.checkpoints():
        found[checkpoint] = here.lab.virsh(
            "checkpoint-dumpxml", "--domain", name, "--checkpointname", checkpoint
        )
    if here.guest.is_running():
        found["bitmaps"] = json.dumps(here.guest.bitmaps("vda"), sort_keys=True)
    return found


def test_nothing_is_changed(here: Scene) -> None:
    """Not even directories are made, and after a dead run nothing is swept."""
    before = everything(here)
    assert not here.ctl.runtime.exists()
    check(here, "-o", here.directory / "new" / "set", code=WARNED)
    assert everything(here) == before
    here.save()
    with here.ctl.rigged("SLAY@disk-copied#1"):
        here.ctl("backup", here.guest.name, "-o", here.set, code=-9)
    before = everything(here)
    assert any(".scratch" in path for path in before)
    check(here, "-o", here.set, code=WARNED)
    assert everything(here) == before
    here.guest.kill9()
    here.guest.wait_shut_off()
    image = here.guest.image("vda")
    wait_until(lambda: image.stat().st_uid == 0, "libvirt gives the image back", 30)
    before = everything(here)
    check(here, "-o", here.set, code=WARNED)
    assert everything(here) == before


def test_a_sound_domain(here: Scene) -> None:
    """The guest has no agent: that alone is told, running; off, nothing."""
    here.save()
    here.guest.write("vda", 0, MIB, 0x11)
    found = check(here, "-o", here.set, code=WARNED)
    assert found.bad() == AGENT
    assert "1.0 MiB" in found.text("target", "ok")
    assert here.history[0].point["checkpoint"] in found.text("checkpoints", "ok")
    here.guest.stop()
    found = check(here, "-o", here.set, code=0)
    assert "is off" in found.text("libvirt", "ok")
    assert "is sound" in found.text("checkpoints", "ok")
    result = here.ctl("check", *words(here, "-o", here.set), code=0)
    assert result.stderr == ""
    assert "\033" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("all is well: ")


def test_an_agent_that_answers(lab: DaemonLab, tmp_path: Path) -> None:
    linux = agent_guest(lab, "check-linux", [DiskSpec(size=8 * MIB)])
    linux.start()
    with mounted(tmp_path / "target", "size=64M") as target:
        found = check(scene_of(lab, target, linux.guest), code=0)
    assert "the guest agent answers" in found.text("guest", "ok")
    linux.guest.close()


def test_an_agent_that_is_away(lab: DaemonLab, tmp_path: Path) -> None:
    options = GuestOptions(has_agent=True, uuid=str(uuid.uuid4()))
    with (
        mounted(tmp_path / "target", "size=64M") as target,
        scene(lab, target, "check-away", (DiskSpec(size=8 * MIB),), options) as here,
    ):
        found = check(here, code=WARNED)
        assert found.bad() == AGENT
        assert "not connected" in found.text("guest", "warn")
        # what 'run' fails at is a failure
        required = configure(here, freeze={"policy": "require"})
        found = check(here, "--config-dir", required, code=DOMAIN)
        assert found.bad() == {("guest", "fail")}
        assert "freeze.policy" in found.text("guest", "fail")


def test_directories_that_qemu_cannot_pass(here: Scene, tmp_path: Path) -> None:
    """The finding names the directory; a backup fails indeed."""
    closed = tmp_path / "closed"
    (closed / "scratch").mkdir(parents=True)
    for each in (tmp_path, *tmp_path.parents):
        if each.stat().st_mode & 0o777 == 0o700:  # those that pytest has made
            each.chmod(0o711)
    closed.chmod(0o711)
    option = ("--scratch-dir", str(closed / "scratch"))
    assert check(here, *option, code=WARNED).bad() == AGENT
    closed.chmod(0o700)
    found = check(here, *option, code=DOMAIN)
    assert found.bad() == {*AGENT, ("access", "fail")}
    assert f"can't pass {closed} (mode 700" in found.text("access", "fail")
    assert f"chmod o+x {closed}" in found.text("access", "fail")
    here.ctl.scratch = closed / "scratch"
    refused = here.ctl("backup", here.guest.name, "-o", here.set, code=DOMAIN)
    assert "Permission denied" in refused.stderr


def test_scratch_that_is_too_small(here: Scene, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=20M,mode=711") as small:
        found = check(here, "--scratch-dir", small, code=DOMAIN)
        assert ("scratch", "fail") in found.bad()
        assert "20.0 MiB free, a backup begins with 32.0 MiB" in found.text("scratch", "fail")


def test_a_target_without_room_or_mount(here: Scene, tmp_path: Path) -> None:
    here.guest.write("vda", 0, 4 * MIB, 0x22)
    with mounted(tmp_path / "tiny", "size=1M") as tiny:
        found = check(here, "-o", tiny / "set", code=DOMAIN)
        assert "1.0 MiB are free, the next point takes up to 4." in found.text("target", "fail")
        assert found.bad() == {*AGENT, ("target", "fail")}
        # a run says so before it begins
        said = here.ctl("backup", here.guest.name, "-o", tiny / "set", code=50).stderr.splitlines()
        assert "it may not fit" in said[0]
        assert len(said) == 2
    root = Path("/var/tmp") / f"check-{uuid.uuid4()}"
    if root.parent.stat().st_dev == Path("/").stat().st_dev:
        found = check(here, "-o", root, code=WARNED)
        assert "is its storage mounted?" in found.text("target", "warn")
        assert not root.exists()


def test_a_set_of_others_and_a_damaged_one(here: Scene, lab: DaemonLab, tmp_path: Path) -> None:
    here.save()
    with scene(lab, tmp_path, "check-other", (DiskSpec(size=8 * MIB),)) as other:
        found = check(other, "-o", here.set, code=DOMAIN)
        assert f"belongs to domain {here.guest.name}" in found.text("target", "fail")
    (stream,) = here.set.glob("*.data")
    stream.rename(here.directory / "away")
    found = check(here, "-o", here.set, code=DOMAIN)
    assert stream.name in found.text("target", "fail")
    found = check(here, "-o", stream.parent / ".lock", "--scratch-dir", "/etc/passwd", code=DOMAIN)
    assert found.bad() == {*AGENT, ("target", "fail"), ("scratch", "fail"), ("access", "fail")}
    foreign = here.directory / "foreign"
    foreign.mkdir()
    (foreign / "photo.jpg").touch()
    found = check(here, "-o", foreign, code=DOMAIN)
    assert "photo.jpg" in found.text("target", "fail")


def test_images(lab: DaemonLab, tmp_path: Path) -> None:
    """Old, raw, missing below, marked corrupt: each is told of its disk."""
    base = lab.images / "base.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"])
    data, locked = lab.images / "apart.data", lab.images / "locked.qcow2"
    # not luks: to tune that, qemu-img measures the processor, and fails where clocks are coarse
    secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"]
    run(["qemu-img", "create", "-q", "-f", "qcow2", *secret, locked, "8M"])
    disks = (
        DiskSpec(target="vda", size=8 * MIB, compat="0.10"),
        DiskSpec(target="vdb", size=8 * MIB, format="raw"),
        DiskSpec(target="vdc", size=8 * MIB, backing=base),
        DiskSpec(target="vdd", size=8 * MIB),
        DiskSpec(target="vde", size=8 * MIB),
        DiskSpec(target="vdf", size=8 * MIB),
        DiskSpec(target="vdg", size=8 * MIB, options=(f"data_file={data}",)),
        DiskSpec(target="vdh", path=locked),
        DiskSpec(
            target="vdi",
            size=8 * MIB,
            options=(f"data_file={lab.images / 'raw.data'}", "data_file_raw=on"),
        ),
    )
    guest = lab.guest("check-images", disks, GuestOptions(uuid=str(uuid.uuid4())))
    here = scene_of(lab, tmp_path, guest)
    base.unlink()
    data.unlink()
    # qcow2's specification: incompatible features at 72, big-endian; bit 1: corrupt, 0: dirty
    for target, bits in (("vdd", b"\x02"), ("vdf", b"\x01")):
        with guest.image(target).open("r+b") as image:
            image.seek(79)
            image.write(bits)
    found = check(here, code=DOMAIN)
    failed = found.text("disks", "fail")
    assert "vdc: " in failed
    assert str(base) in failed
    assert f"vdd: image {guest.image('vdd')} is marked corrupt" in failed
    assert "vdg: " in failed
    assert str(data) in failed
    warned = found.text("disks", "warn")
    assert "vda: qcow2, 8.0 MiB; saved whole each time: version 2" in warned
    assert f"amend -f qcow2 -o compat=1.1 {guest.image('vda')}" in warned
    assert "vdb is not saved" in warned
    assert f"vdf: image {guest.image('vdf')} was not closed cleanly" in warned
    assert f"vdh: image {locked} is encrypted" in warned
    assert "vde: " in found.text("disks", "ok")
    # W-14: its changes can't be tracked
    assert "vdi: qcow2, 8.0 MiB; saved whole each time: its data lies in a raw file" in found.text(
        "disks", "ok"
    )


def test_a_raw_disk_that_is_left_out_knowingly(lab: DaemonLab, tmp_path: Path) -> None:
    """It is a warning until a point says that it was left out, or holds it."""
    disks = (DiskSpec(size=8 * MIB), DiskSpec(target="vdb", size=8 * MIB, format="raw"))
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, "check-raw", disks, options) as here:
        assert "vdb is not saved" in check(here, code=WARNED).text("disks", "warn")
        here.save("-x", "vdb")
        found = check(here, "-o", here.set, code=WARNED)
        assert "vdb is not saved, nor was it in the last point" in found.text("disks", "ok")
        other = here.directory / "other"
        here.save("--raw", into=other)
        found = check(here, "-o", other, code=WARNED)
        assert "vdb: raw, 8.0 MiB; saved whole each time" in found.text("disks", "ok")


def test_a_bitmap_lost_with_qemu(here: Scene) -> None:
    """The next increment says the same of the disk as the check did."""
    here.save()
    here.guest.kill9()
    here.guest.wait_shut_off()
    here.guest.start()
    found = check(here, "-o", here.set, code=WARNED)
    assert "vda will be read whole" in found.text("checkpoints", "warn")
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full"}
    assert check(here, "-o", here.set, code=WARNED).bad() == AGENT


def test_what_a_dead_run_leaves(here: Scene) -> None:
    here.save()
    with here.ctl.rigged("SLAY@disk-copied#1"):
        here.ctl("backup", here.guest.name, "-o", here.set, code=-9)
    found = check(here, "-o", here.set, code=WARNED)
    text = found.text("runs", "warn")
    for what in ("left its job", "run.json", ".scratch", "nbd.sock", ".draft", "abort"):
        assert what in text, text
    assert "died before its point was published" in found.text("checkpoints", "warn")
    here.save()
    assert check(here, "-o", here.set, code=WARNED).bad() == AGENT


def test_a_run_that_lives(here: Scene) -> None:
    """Its locks are named; what it works with is not taken for leftovers."""
    here.save()
    with here.held() as process:
        found = check(here, "-o", here.set, code=WARNED)
        text = found.text("runs", "warn")
        assert text.count(f"process {process.pid}") >= 1
        assert "the domain is locked by" in text
        assert "dead run" not in text
        assert "a backup runs" in found.text("runs", "ok")
        assert "not looked at" in found.text("checkpoints", "ok")
        process.kill()


def test_leases(here: Scene) -> None:
    """Who reads the images of a domain that is off; and a note of one that died doing so."""
    here.save()
    here.guest.stop()
    home = here.ctl.runtime / str(here.guest.options.uuid)
    with lease.hold(
        here.ctl.runtime, domain=here.guest.name, uuid=home.name, run_id="r1",
        is_active=lambda: False, cancelled=lambda: None,
    ):  # fmt: skip
        found = check(here, "-o", here.set, code=0)
        assert f"process {os.getpid()} reads the images" in found.text("runs", "ok")
        document = json.loads((home / "lease.json").read_bytes())
    # the same process id, of a process that began at another time
    (home / "lease.json").write_text(json.dumps({**document, "start": document["start"] + 1}))
    found = check(here, "-o", here.set, code=WARNED)
    assert "a dead run left its lease" in found.text("runs", "warn")


def test_a_set_that_is_locked(here: Scene) -> None:
    here.save()
    with (here.set / ".lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()} prune of somebody")
        file.flush()
        found = check(here, "-o", here.set, code=WARNED)
        text = found.text("runs", "warn")
        assert f"the set is locked by process {os.getpid()} (prune of somebody)" in text
    # the text stays in the file, and tells nothing now
    assert check(here, "-o", here.set, code=WARNED).bad() == AGENT


def test_a_guest_that_is_held(here: Scene) -> None:
    """A run that dies while the guest is paused: the gravest of what can be left."""
    with here.ctl.rigged("SLAY@job-begun#1"):
        here.ctl("backup", here.guest.name, "-o", here.set, "--pause", code=-9)
    assert here.guest.is_paused()
    found = check(here, "-o", here.set, code=DOMAIN)
    assert "it may be frozen or paused" in found.text("runs", "fail")
    here.ctl("abort", here.guest.name)
    assert not here.guest.is_paused()
    assert ("runs", "fail") not in check(here, "-o", here.set, code=WARNED).bad()


def test_a_job_of_others(here: Scene, tmp_path: Path) -> None:
    shared = here.lab.images / "foreign"
    shared.mkdir()
    shared.chmod(0o777)
    xml = tmp_path / "job.xml"
    xml.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{shared}/s'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{shared}/f'/></disk></disks>"
        "</domainbackup>"
    )
    here.lab.virsh("backup-begin", "--domain", here.guest.name, "--backupxml", xml)
    found = check(here, code=WARNED)
    assert "busy with" in found.text("runs", "warn")
    assert f"abort --any {here.guest.name}" in found.text("runs", "warn")
    assert here.has_job()
    here.guest.abort_job()
    shutil.rmtree(shared)


def test_a_program_is_missing(here: Scene, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("setpriv", "qemu-img", "qemu-nbd"):
        (programs / name).symlink_to(shutil.which(name) or "")
    ctl = Ctl(here.ctl.uri, here.ctl.runtime.parent, {"PATH": os.fspath(programs)})
    found = check(here, code=DOMAIN, ctl=ctl)
    failed = found.text("host", "fail")
    assert "qemu-storage-daemon" in failed
    assert "qemu-system-common" in failed
    assert "nbdinfo is not there" in found.text("host", "ok")
    assert found.bad() == {*AGENT, ("host", "fail")}


def test_a_runtime_directory_with_a_long_name(here: Scene) -> None:
    # not on the file system that was mounted after the lab's libvirtd had started
    long = here.directory.parent / ("r" * 90)
    ctl = Ctl(here.ctl.uri, here.ctl.runtime.parent)
    ctl.runtime = long
    found = check(here, code=DOMAIN, ctl=ctl)
    assert "longer than 107 bytes" in found.text("access", "fail")
    # made for the proof that libvirt is this host's
    assert list(long.iterdir()) == []


@pytest.mark.parametrize("uri", ["", "qemu+unix:///system?socket=/nowhere"], ids=["name", "uri"])
def test_nobody_to_ask(lab: DaemonLab, tmp_path: Path, uri: str) -> None:
    result: Any = Ctl(uri or lab.uri, tmp_path)("check", "nobody-knows-it", code=DOMAIN)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
