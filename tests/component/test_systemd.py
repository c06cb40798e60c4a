"""What this host's systemd says of our files, and of what people write for it."""

import random
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from nbdbackupd.config import analyze, calendar
from nbdbackupd.events import ALL
from tests.lib.calendars import BAD_EVENTS, GOOD_EVENTS
from tests.lib.pages import TOP

pytestmark = pytest.mark.component
CATALOG: Final = TOP / "packaging/common/nbdbackup.catalog"


def systemd_takes(event: str) -> bool:
    argv = [analyze.PROGRAM, "calendar", "--", event]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which(analyze.PROGRAM) is None, reason="no systemd-analyze here")
def test_systemd_is_the_judge() -> None:
    assert all(map(systemd_takes, GOOD_EVENTS))
    assert not any(map(systemd_takes, BAD_EVENTS))
    assert not analyze.fault("Mon..Fri 22:30")
    assert "not a calendar event for systemd" in analyze.fault("Mon 25:00")
    # what systemd takes must not be refused by its form
    rng = random.Random(5)
    days = ("", "Mon ", "tue,Wed ", "Sat..Sun ", "Monday ", "Mon..")
    dates = ("", "*-*-* ", "*-2-29 ", "2027-1/2-1..5 ", "*-*~1 ", "12-24 ", "1- ")
    times = ("", "2:00", "*:*", "00:00:00", "0/4:30:10..20", "24:00", "9")
    zones = ("", " UTC", " Asia/Tokyo", " Xyz")
    taken = 0
    for _ in range(150):
        event = "".join(rng.choice(each) for each in (days, dates, times, zones)).strip()
        if systemd_takes(event):
            taken += 1
            assert not calendar.plain_fault(event), event
    assert taken > 40


@pytest.mark.skipif(shutil.which("journalctl") is None, reason="systemd is not installed")
def test_systemd_takes_the_catalogue(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(CATALOG, folder)
    for action in ("--update-catalog", "--list-catalog"):
        done = subprocess.run(
            ["journalctl", f"--root={tmp_path}", "--no-pager", action],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), action
    lines = done.stdout.splitlines()
    assert sorted(line.split(" ", 1)[0] for line in lines) == sorted(event.id for event in ALL)
    for event in ALL:
        assert any(event.id in line and "nbdbackupd: " in line for line in lines)
