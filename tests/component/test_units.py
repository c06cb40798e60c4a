"""The units, judged by systemd's own programs, as they are installed."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest

from nbdbackupd.app import ctl
from tests.lab.command import LabError, run
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

UNITS = sorted(path for path in (TOP / "units").iterdir() if path.is_file())
SERVICES = [each for each in UNITS if each.suffix == ".service"]
TIMERS = [each for each in UNITS if each.suffix == ".timer"]
RUNNERS = ("nbdbackup@.service", "nbdbackup-offline@.service", "nbdbackup-checkpoints@.service")
MOST = 2.5
"""How open a unit may be, of 10 (S-12)."""


def names(paths: list[Path]) -> list[str]:
    return [each.name for each in paths]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with our units and the system's, and the programs that ours start."""
    root = tmp_path_factory.mktemp("root")
    run(["make", "-C", TOP, "install", f"DESTDIR={root}"])
    shutil.copytree(
        "/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True,
        dirs_exist_ok=True, ignore_dangling_symlinks=True,
    )  # fmt: skip
    return root


def verify(root: Path, path: Path) -> None:
    # with 252 the exit status is 0 whatever is found
    run(["sh", "-c", 'said=$(systemd-analyze verify --man=no --root="$1" "$2" 2>&1) || exit; '
         '[ -z "$said" ] || { echo "$said" >&2; exit 1; }', "-", root, path])  # fmt: skip


@pytest.mark.parametrize("unit", names(UNITS))
@pytest.mark.parametrize("instance", ["vm1", "a\\x2db\\x20\\xc3\\xbc"])
def test_verify(installed: Path, unit: str, instance: str) -> None:
    directory = installed / "usr/lib/systemd/system"
    path = directory / unit
    if "@." in unit:
        path = directory / unit.replace("@.", f"@{instance}.")
        path.symlink_to(unit)
    try:
        verify(installed, path)
    finally:
        if "@." in unit:
            path.unlink()


@pytest.mark.parametrize(
    ("old", "new"),
    [("ExecStart=:/usr/bin/", "ExecStart=:/no/"), ("KillMode=", "KilMode="), ("=yes", "=perhaps")],
)
def test_verify_finds_mistakes(installed: Path, old: str, new: str) -> None:
    path = installed / "usr/lib/systemd/system/nbdbackup-wrong@.service"
    text = (TOP / "units" / RUNNERS[0]).read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        with pytest.raises(LabError):
            verify(installed, path)
    finally:
        path.unlink()


@pytest.mark.parametrize("unit", names(SERVICES))
def test_exposure(unit: str) -> None:
    told = run(["systemd-analyze", "security", "--offline=yes", "--no-pager", TOP / "units" / unit])
    level = re.search(r"exposure level for \S+: ([\d.]+)", told)
    assert level is not None
    assert float(level[1]) <= MOST


@pytest.mark.parametrize("unit", names(SERVICES))
def test_what_is_left_open_has_its_reason(unit: str) -> None:
    path = TOP / "units" / unit
    told = run(["systemd-analyze", "security", "--offline=yes", "--no-pager", path])
    text = path.read_text()
    for line in told.splitlines():
        found = re.match(r"✗ ((?:Private|Protect|User|IPAddress|ProcSubset)\w*)=", line)
        # ProtectSystem=full, DeviceAllow= and the like are lines of their own
        if found and not re.search(rf"^{found[1]}=", text, re.MULTILINE):
            assert re.search(rf"^# .*\b{found[1]}=", text, re.MULTILINE), line


@pytest.mark.parametrize("unit", names(SERVICES))
def test_what_a_unit_may_take_is_bounded(unit: str) -> None:
    """S-12: memory and tasks, and files that are nobody else's (S-9)."""
    text = (TOP / "units" / unit).read_text()
    for setting in (r"MemoryMax=\d+[MG]", r"TasksMax=\d+", "SystemCallFilter=~.*@resources"):
        assert re.search(rf"^{setting}$", text, re.MULTILINE), setting
    if "DynamicUser=yes" not in text:
        assert "\nUMask=0077\n" in text


@pytest.mark.parametrize("unit", names(SERVICES))
def test_programs_can_be_started(unit: str) -> None:
    """``proc`` starts them by setpriv, which ends if it can't set the capabilities that it has."""
    text = (TOP / "units" / unit).read_text()
    if "~@privileged" in text and not re.search("catch-up|load-hook", text):  # shells
        denied, allowed = text.index("~@privileged"), text.rindex("\nSystemCallFilter=")
        assert allowed > denied
        assert "capset" in text[allowed:]


def test_runners_are_hardened_alike() -> None:
    texts = [(TOP / "units" / each).read_text().partition("# Hardening.")[2] for each in RUNNERS]
    assert texts[0]
    assert set(texts) == {texts[0]}


@pytest.mark.parametrize("unit", names(TIMERS))
def test_timers(unit: str) -> None:
    text = (TOP / "units" / unit).read_text()
    (calendar,) = re.findall(r"^OnCalendar=(.*)$", text, re.MULTILINE)
    assert "Next elapse" in run(["systemd-analyze", "calendar", calendar])
    assert "\nPersistent=true\n" in text
    assert (TOP / "units" / unit.replace(".timer", ".service")).exists()


def commands() -> list[tuple[str, list[str]]]:
    return [
        (unit.name, shlex.split(line.lstrip("-:")))
        for unit in SERVICES
        for line in re.findall(r"^Exec\w+=(.*)$", unit.read_text(), re.MULTILINE)
        if "nbdbackupctl" in line
    ]


@pytest.mark.parametrize(
    ("unit", "words"),
    [pytest.param(unit, words, id=f"{unit}-{words[1]}") for unit, words in commands()],
)
def test_units_call_what_the_command_knows(unit: str, words: list[str]) -> None:
    assert words[0] == "/usr/bin/nbdbackupctl"
    known = ctl.build_parser()
    # a name that looks like an option must be none
    given = [*words[1:-1], "-x"] if "@" in unit else words[1:]
    try:
        args: argparse.Namespace = known.parse_args(given)
    except SystemExit as err:
        raise AssertionError(f"{unit}: not a command: {words}") from err
    if "@" not in unit:
        assert not any("%" in word for word in words)
        return
    assert words[-2] == "--"
    assert words[-1] == ("%i" if "notify" in unit else "%I")
    assert "-x" in [str(each) for each in vars(args).values()]


@pytest.mark.parametrize("unit", names(SERVICES))
def test_no_notification_has_two_triggers(unit: str) -> None:
    """W-9: systemd logs "multiple trigger source candidates" else, at each run."""
    text = (TOP / "units" / unit).read_text()
    told = re.findall(r"^On(?:Failure|Success)=(.*)$", text, re.MULTILINE)
    assert len(told) == len(set(told))
    for each in told:
        assert re.fullmatch(r"nbdbackup-notify@(done-)?%n\.service", each)
