"""hooks/load-hook restarts libvirt's daemon at a quiet moment only (G-3)."""

import subprocess
from pathlib import Path

import pytest

from tests.lib.pages import TOP

UUID = "0d2f6a3e-5c1b-4f7a-9a5d-3b8e6c41f0a7"
VIRSH = """#!/bin/sh
shift 3
case $1 in
list) echo {uuid}; echo ;;
domname) echo vm1; echo ;;
domstate) cat {place}/state; echo ;;
domjobinfo) cat {place}/job; echo ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
case "$*" in
"is-active --quiet libvirtd.service") ;;
is-active*) exit 3 ;;
*) echo "$*" >>{place}/asked ;;
esac
"""
SLEEP = """#!/bin/sh
echo . >>{place}/slept
[ "$(wc -l <{place}/slept)" -lt 3 ] || echo 'running (booted)' >{place}/state
"""
QUIET = "Job type:         None"


def call(place: Path, state: str, job: str = QUIET, seconds: int = 5) -> tuple[int, str, str]:
    """Exit status, what systemctl was asked, and what was said."""
    (place / "state").write_text(state)
    (place / "job").write_text(job)
    for name, text in (("virsh", VIRSH), ("systemctl", SYSTEMCTL), ("sleep", SLEEP)):
        program = place / name
        program.write_text(text.format(place=place, uuid=UUID))
        program.chmod(0o755)
    done = subprocess.run(
        [TOP / "hooks/load-hook"], check=False, capture_output=True, text=True, timeout=60,
        env={"PATH": f"{place}:/usr/bin:/bin", "NBDBACKUP_QUIET_SECONDS": str(seconds)},
    )  # fmt: skip
    asked = place / "asked"
    return done.returncode, asked.read_text() if asked.exists() else "", done.stderr


@pytest.mark.parametrize("state", ["running (booted)", "paused (user)", "running (restored)", ""])
def test_a_quiet_host(tmp_path: Path, state: str) -> None:
    assert call(tmp_path, state) == (0, "--no-ask-password try-restart libvirtd.service\n", "")
    assert not (tmp_path / "slept").exists()


def test_a_start_is_waited_for(tmp_path: Path) -> None:
    code, asked, said = call(tmp_path, "paused (starting up)")
    assert (code, said) == (0, "")
    assert "try-restart" in asked
    assert (tmp_path / "slept").read_text().count(".") == 3


@pytest.mark.parametrize(
    ("state", "job", "why"),
    [
        ("paused (migrating)", QUIET, "domain vm1 is being started, moved or shut down"),
        ("running (booted)", "Job type:         Unbounded", "domain vm1 has a job"),
    ],
)
def test_nothing_is_done_if_no_moment_comes(tmp_path: Path, state: str, job: str, why: str) -> None:
    assert call(tmp_path, state, job, seconds=2) == (
        75, "",
        f"load-hook: libvirt's daemon is not restarted, {why}: "
        f"'systemctl start nbdbackup-load-hook' later\n",
    )  # fmt: skip
