"""The marker of a held guest lies where QEMU can write: a QEMU that was taken over may plant it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdbackupd import rundir
from nbdbackupd.errors import AgentAnswerError, DomainNotFoundError, FreezeError
from nbdbackupd.source import guarding, quiesce
from nbdbackupd.source.guarding import Watch
from nbdbackupd.source.sweep import Swept
from nbdbackupd.virt import guest
from tests.lib.told import heard


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


def running() -> Any:
    return SimpleNamespace(is_active=lambda: True, name="vm1")


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "answers: nothing is frozen"),
        (1, "answers: 1 file system was thawed"),
        (2, "answers: 2 file systems were thawed"),
    ],
)
def test_who_answers_the_thaw_is_let_go(
    count: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "guest-held"
    marker.write_text("frozen r1")
    monkeypatch.setattr(guest, "thaw", lambda *_args, **_more: count)
    with heard() as told:
        assert quiesce.settle(running(), marker, "r1", seconds=1).done
    assert told == ["guest-released"]
    assert not marker.exists()
    marker.write_text("frozen r1")
    assert quiesce.release(running(), marker).done.endswith(words)


def test_who_does_not_answer_is_held_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def thaw(*_args: object, **_more: object) -> int:
        raise FreezeError("no answer")

    marker = tmp_path / "guest-held"
    marker.write_text("frozen r1")
    monkeypatch.setattr(guest, "thaw", thaw)
    with heard() as told:
        found = quiesce.settle(running(), marker, "r1", seconds=1)
    assert told == []
    assert marker.exists()
    assert "no answer" in found.problem
    assert not found.is_answered


def test_an_agent_that_refuses_is_asked_less_and_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error each second in libvirt's journal, for two hours; one that is silent may freeze."""
    answers: list[FreezeError] = []

    def thaw(*_args: object, **_more: object) -> int:
        raise answers[-1]

    monkeypatch.setattr(guest, "thaw", thaw)
    socket_dir = rundir.socket_dir(tmp_path, "u")
    marker = rundir.domain_dir(tmp_path, "u") / rundir.HELD
    marker.parent.mkdir()
    marker.write_text("frozen r1")
    charge: Any = SimpleNamespace(domain="vm1", runtime_dir=str(socket_dir), run_id="r1")
    post: Any = None
    watch = Watch(post, charge)
    answers.append(AgentAnswerError("a hook has failed", is_thawed=False))
    pauses = []
    for _ in range(8):
        assert not watch._thaw(running())
        pauses.append(watch.thaw_pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    answers.append(FreezeError("no answer"))
    assert not watch._thaw(running())
    assert watch.thaw_pause == 1
    answers.append(AgentAnswerError("a hook has failed", is_thawed=True))
    with heard() as told:
        assert watch._thaw(running())
    assert told == ["guest-released"]
    assert not marker.exists()


@pytest.mark.parametrize(("owner", "stays"), [("r1", False), ("r2", True)])
def test_a_guest_that_is_no_more_is_held_by_nobody(
    owner: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transient one that has ended: libvirt has forgotten it. What another run says stays."""

    def open_connection(*_args: object, **_more: object) -> Any:
        raise DomainNotFoundError("no domain")

    monkeypatch.setattr(guarding, "open_connection", open_connection)
    marker = rundir.domain_dir(tmp_path, "u") / rundir.HELD
    marker.parent.mkdir()
    marker.write_text(f"frozen {owner}")
    socket_dir = rundir.socket_dir(tmp_path, "u")
    charge: Any = SimpleNamespace(
        domain="vm1", runtime_dir=str(socket_dir), run_id="r1", uri="", user="", password="",
        monitor="", host="",
    )  # fmt: skip
    post: Any = None
    assert Watch(post, charge)._try(is_settled=True)
    assert marker.exists() == stays


@pytest.mark.parametrize(
    ("swept", "names"),
    [
        (Swept(), []),
        (Swept(foreign="a job"), []),
        (Swept(held="no answer"), []),
        (Swept(guest="thawed"), ["guest-released"]),
        (Swept(files=(Path("/s"),)), ["dead-run-swept"]),
        (Swept(job="a job", guest="thawed"), ["dead-run-swept", "guest-released"]),
    ],
)
def test_a_guest_that_is_let_go_tells_of_no_dead_run(swept: Swept, names: list[str]) -> None:
    """The run may have ended in order, and its agent answered after it."""
    with heard() as told:
        swept.tell()
    assert told == names
