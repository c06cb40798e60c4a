"""What surrounds a run: an empty environment, closed or broken outputs, secrets."""

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest
from tests.lib.accounts import open_to_others
from tests.lib.ctl import PYTHON, ROOT
from tests.lib.rigged import RiggedCtl
from tests.lib.sets import Change, SetBuilder
from tests.lib.witness import Witness

pytestmark = pytest.mark.system

HIDDEN = "pa55 w0rd'\"<&>"


@pytest.fixture(scope="module")
def guest(lab: DaemonLab) -> Guest:
    guest = lab.guest("vm1", [DiskSpec(size=16 * MIB)])
    guest.start()
    return guest


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A set whose description is longer than a pipe holds."""
    builder = SetBuilder(tmp_path / "many", format="raw")
    for number in range(12):
        builder.disks[f"vd{chr(97 + number)}"] = bytearray(random.Random(1).randbytes(4096))
    builder.full()
    for number in range(20):
        builder.inc({"vda": [Change(number * 100, b"x")]})
    return builder.path


def shell(line: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which ``"$@"`` is a command line of ours."""
    argv = [PYTHON, "-m", "nbdbackupd", *[os.fspath(word) for word in words]]
    return subprocess.run(
        ["bash", "-c", line, "bash", *argv], cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", [["show"], ["show", "--json"], ["list", "--json"]], ids=str)
def test_reader_of_the_output_leaves(many: Path, words: list[str]) -> None:
    line = '"$@" | head -n 1; echo ${PIPESTATUS[0]} >&2'
    done = shell(line, *words, many)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == "141\n"


@pytest.mark.parametrize(
    "words", [["list"], ["show", "--json"], ["verify"], ["--version"]], ids=str
)
def test_closed_outputs(many: Path, words: list[str]) -> None:
    paths = [] if words == ["--version"] else [many]
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"):
        done = shell(f'"$@" {closed}; echo $? >&2', *words, *paths)
        assert done.stderr == "0\n", closed
        assert bool(done.stdout) == (">&-" not in closed.split())


def test_closed_outputs_stay_apart_from_files(many: Path, tmp_path: Path) -> None:
    """What is printed never goes into a file that was opened in the place of a stream."""
    line = '"$@" <&- >&- 2>&-; echo $?'
    done = shell(line, "restore", many, "-o", tmp_path / "restored", "-vv")
    assert done.stdout == "0\n"
    shell('"$@"', "restore", many, "-o", tmp_path / "other")
    for path in (tmp_path / "restored").glob("*.raw"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_full_output_device(many: Path, verb: str) -> None:
    done = shell('"$@" > /dev/full; echo $? >&2', verb, many)
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr
    assert done.stderr.splitlines()[-1] == "50"


def test_report_that_nobody_reads(guest: Guest, ctl: RiggedCtl, tmp_path: Path) -> None:
    """The point is made all the same."""
    argv = ctl.argv("backup", guest.name, "-o", tmp_path / "set", "--json")
    for closed in (">&-", "2>&-", ">&- 2>&-", "| true"):
        done = subprocess.run(
            ["bash", "-c", f'"$@" {closed}', "bash", *argv], cwd=ROOT, env=ctl.environment,
            text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
    assert len(ctl.points(tmp_path / "set")) == 4
    assert guest.block_jobs() == []


def test_empty_environment(lab: DaemonLab, guest: Guest, tmp_path: Path) -> None:
    ctl = RiggedCtl(lab.uri, lab.directory / "empty")
    ctl.environment = {}
    witness = Witness(ctl, guest, tmp_path)
    witness.fill()
    witness.run()
    witness.change()
    witness.run("-z")
    witness.check_all()
    assert ctl("list", witness.path).stderr == ""


def test_secrets_stay_secret(guest: Guest, ctl: RiggedCtl, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{HIDDEN}\n")
    path = tmp_path / "set"
    options = ("--user", "admin", "--password-file", file, "-vv")
    done = ctl("backup", guest.name, "-o", path, *options)
    texts = [done.stdout, done.stderr]
    # a server that is not there: the error tells the address
    argv = [*ctl.argv("backup", guest.name, "-o", path, *options)]
    argv[argv.index("-c") + 1] = "qemu+tcp://localhost:1/system"
    failed = subprocess.run(
        argv, cwd=ROOT, env=ctl.environment, text=True, stdin=subprocess.DEVNULL,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert failed.returncode == 20
    texts += [failed.stdout, failed.stderr]
    texts += [each.read_text() for each in (path / "logs").iterdir()]
    assert len(texts) >= 5
    for text in texts:
        assert "pa55" not in text


def test_nobody_else_reads_a_set(guest: Guest, ctl: RiggedCtl, tmp_path: Path) -> None:
    """A domain's XML and every block of its disks may hold secrets, whatever the umask is.

    S-8: nor can another account lock what a run has to lock.
    """
    old = os.umask(0)
    try:
        ctl("backup", guest.name, "-o", tmp_path / "set")
    finally:
        os.umask(old)
    for path in (tmp_path / "set").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "set").stat().st_mode & 0o077 == 0
    assert list(ctl.runtime.glob("*/lock"))
    assert open_to_others(ctl.runtime, ctl.scratch, ctl.state) == []


@pytest.mark.parametrize("unit", ["nbdbackup@", "nbdbackup-offline@", "nbdbackup-checkpoints@"])
def test_a_run_needs_no_more_than_its_unit_grants(
    unit: str, guest: Guest, ctl: RiggedCtl, tmp_path: Path
) -> None:
    """S-12: its capabilities, no new privileges, and files for nobody else."""
    text = (ROOT / "units" / f"{unit}.service").read_text()
    (words,) = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    granted = ",".join(f"+{word.removeprefix('CAP_').lower()}" for word in words.split())
    bounds = ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{granted}"]
    verbs: tuple[tuple[str | Path, ...], ...] = (
        ("backup", guest.name, "-o", tmp_path / "set"),
        ("checkpoints", guest.name, "--repair", "--started"),
        ("abort", guest.name),
    )
    for verb, *more in verbs:
        done = subprocess.run(
            [*bounds, *ctl.argv(str(verb), *more)], cwd=ROOT, env=ctl.environment, umask=0o077,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_qemu_gets_through_whatever_the_umask_is(
    lab: DaemonLab, guest: Guest, tmp_path: Path
) -> None:
    """QEMU runs as another user and must reach its socket and its scratch files."""
    own = RiggedCtl(lab.uri, lab.directory / "ctl-of-a-strict-shell")
    old = os.umask(0o077)
    try:
        own("backup", guest.name, "-o", tmp_path / "set")
    finally:
        os.umask(old)
