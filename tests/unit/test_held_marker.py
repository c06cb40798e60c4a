"""The marker of a held guest lies where QEMU can write: a QEMU that was taken over may plant it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdbackupd.source import quiesce


def wish(marker: Path) -> Any:
    return SimpleNamespace(marker=marker, run_id="r1")


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "nothing"])
def test_it_is_written_in_the_place_of_what_is_there(kind: str, tmp_path: Path) -> None:
    """S-7: root wrote through a link, to any file of the host."""
    victim, marker = tmp_path / "victim", tmp_path / "guest-held"
    if kind == "link":
        victim.write_text("kept")
        marker.symlink_to(victim)
    elif kind == "dangling":
        marker.symlink_to(victim)
    elif kind == "file":
        marker.write_text("other")
    quiesce._mark(wish(marker), quiesce.FROZEN)
    assert not marker.is_symlink()
    assert quiesce._held(marker) == (quiesce.FROZEN, "r1")
    assert not victim.exists() or victim.read_text() == "kept"


def test_it_is_read_within_bounds(tmp_path: Path) -> None:
    """S-6, S-7: a link to a device without end, a pipe, a file without end."""
    marker = tmp_path / "guest-held"
    assert quiesce._held(marker) == ("", "")
    marker.symlink_to("/dev/zero")
    assert quiesce._held(marker) == ("", "")
    marker.unlink()
    os.mkfifo(marker)
    assert quiesce._held(marker) == ("", "")
    marker.unlink()
    with marker.open("wb") as file:
        file.truncate(1 << 40)
    how, run_id = quiesce._held(marker)
    assert len(how) <= quiesce.MAX_MARKER
    assert run_id == ""
