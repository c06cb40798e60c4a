"""What hosts tell one another in a state directory that they share (H-1, H-7, H-8)."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdbackupd.errors import BusyError, RepositoryError
from nbdbackupd.model.whereabouts import Note, Phase, standing
from nbdbackupd.source.hosts import BEAT_SECONDS, DEAD_SECONDS, Host, Hosts

UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"


def host(state: Path, letter: str) -> Hosts:
    return Hosts(state, "vm1", UUID, Host(letter * 32, f"host-{letter}"))


@contextmanager
def reading(hosts: Hosts, wished: list[Note]) -> Iterator[None]:
    """A run that lets go as soon as it is asked, and is over then."""
    asked = threading.Event()

    def wanted(note: Note) -> None:
        wished.append(note)
        asked.set()

    held = threading.Event()
    over = threading.Event()

    def run() -> None:
        with hosts.reading("run-1", wanted):
            held.set()
            asked.wait(30)
        over.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert held.wait(10)
    try:
        yield
    finally:
        asked.set()
        thread.join()
        assert over.is_set()


def test_life_of_a_domain_on_two_hosts(tmp_path: Path) -> None:
    """Numbers rise from start to start, and each host writes its own note only."""
    a, b = host(tmp_path, "a"), host(tmp_path, "b")
    assert a.notes() == ()
    a.announce(arrived=False)
    assert standing(b.notes(), b.here.id).holder is not None
    a.started()
    assert [(note.number, note.phase) for note in b.notes()] == [(1, Phase.RUNNING)]
    a.ended("shutdown")
    assert standing(b.notes(), b.here.id).is_closed
    # a start that fails leaves what was noted before
    b.announce(arrived=False)
    b.ended("failed")
    assert [(note.name, note.reason) for note in a.notes()] == [("host-a", "shutdown")]
    b.announce(arrived=False)
    b.started()
    assert b.own() is not None
    assert b.own() == next(note for note in a.notes() if note.name == "host-b")
    assert {note.name: note.number for note in a.notes()} == {"host-a": 1, "host-b": 2}
    # a migration: libvirt calls its hook first for that, then for a start
    a.announce(arrived=True)
    a.announce(arrived=False)
    a.started()
    own = a.own()
    assert own is not None
    assert (own.arrived, own.phase) == (True, Phase.RUNNING)
    b.ended("migrated")
    assert standing(b.notes(), b.here.id).holder == own
    a.ended("shutdown")
    b.saved("point-3", own.number)
    found = standing(a.notes(), a.here.id)
    assert found.is_closed
    assert found.saver is not None
    assert (found.saver.name, found.saver.saved) == ("host-b", "point-3")


def test_what_runs_and_was_never_announced(tmp_path: Path) -> None:
    a, b = host(tmp_path, "a"), host(tmp_path, "b")
    a.started()
    a.started()
    assert [(note.number, note.arrived) for note in a.notes()] == [(1, True)]
    b.ended("destroyed")
    assert standing(b.notes(), b.here.id).holder == a.own()


def test_a_reader_lets_go_for_a_start(tmp_path: Path) -> None:
    """H-1: within two seconds, on whichever host it starts."""
    a, b = host(tmp_path, "a"), host(tmp_path, "b")
    wished: list[Note] = []
    with reading(b, wished):
        begun = time.monotonic()
        a.announce(arrived=False)
        a.wait_for_readers()
        assert time.monotonic() - begun < 2
    assert [note.name for note in wished] == ["host-a"]
    a.started()
    # nothing is left but notes
    assert {path.suffix for path in a.directory.iterdir()} == {".json"}


def test_one_that_does_not_let_go_is_named(tmp_path: Path) -> None:
    a, b = host(tmp_path, "a"), host(tmp_path, "b")
    with b.reading("run-1", lambda _note: None):
        a.announce(arrived=False)
        with pytest.raises(BusyError, match=r"host-b \(run run-1\) still has images"):
            a.wait_for_readers()


def test_a_dead_reader_holds_nobody_up_twice(tmp_path: Path) -> None:
    a, b = host(tmp_path, "a"), host(tmp_path, "b")
    with b.reading("run-1", lambda _note: None):
        left = next(b.directory.glob("*.read")).read_bytes()
    dead = b.directory / f"{b.here.id}.read"
    dead.write_bytes(left)
    a.announce(arrived=False)
    begun = time.monotonic()
    a.wait_for_readers()
    assert DEAD_SECONDS <= time.monotonic() - begun < DEAD_SECONDS + 2
    assert not dead.exists()
    dead.write_bytes(left)
    with a.reading("run-2", lambda _note: None):
        assert not dead.exists()


def test_only_one_host_reads(tmp_path: Path) -> None:
    """H-2: also if both begin at the same moment."""
    hosts = [host(tmp_path, letter) for letter in "ab"]
    with (
        hosts[1].reading("run-1", lambda _note: None),
        pytest.raises(BusyError, match=r"backed up on host host-b \(run run-1\)"),
        hosts[0].reading("run-2", lambda _note: None),
    ):
        pass
    together = threading.Barrier(2)
    ends: list[str] = []

    def run(each: Hosts) -> None:
        together.wait()
        try:
            with each.reading("run", lambda _note: None):
                ends.append("read")
                time.sleep(4 * BEAT_SECONDS)
        except BusyError:
            ends.append("refused")

    threads = [threading.Thread(target=run, args=(each,)) for each in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["read", "refused"]
    assert list(hosts[0].directory.glob("*.read")) == []


def test_a_cloned_machine_is_another_host(tmp_path: Path) -> None:
    """H-7: it has the same id, and its standby would have taken the other's note for its own."""
    a = host(tmp_path, "a")
    clone = Hosts(tmp_path, "vm1", UUID, Host(a.here.id, "host-clone"))
    a.announce(arrived=False)
    a.started()
    holder = standing(clone.notes(), clone.here.id).holder
    assert holder is not None
    assert holder.name == "host-a"
    a.ended("shutdown")
    assert standing(clone.notes(), clone.here.id).is_closed
    with a.reading("run-1", lambda _note: None):
        assert clone.readers() == ("host-a",)
        with (
            pytest.raises(BusyError, match=r"host-a \(run run-1\)"),
            clone.reading("run-2", lambda _note: None),
        ):
            pass
        assert clone.readers() == ("host-a",)
    clone.started()
    holder = standing(a.notes(), a.here.id).holder
    assert holder is not None
    assert holder.name == "host-clone"


def test_a_renamed_host_knows_itself_by_what_it_does_next(tmp_path: Path) -> None:
    old = host(tmp_path, "a")
    old.started()
    new = Hosts(tmp_path, "vm1", UUID, Host(old.here.id, "renamed"))
    new.ended("shutdown")
    assert standing(new.notes(), new.here.id).is_closed


HOSTILE = {
    "no document": b"\0",
    "another version": b'{"version": 2}',
    "no phase": b'{"version": 1, "name": "x", "domain": "vm1", "number": 1}',
    "a deep one": b"[" * 10000,
    "too long": b'{"version": 1, "x": "' + b"y" * 20000 + b'"}',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_note_that_is_not_understood_is_no_proof(tmp_path: Path, what: str) -> None:
    """It may be that of the host that runs the domain."""
    a = host(tmp_path, "a")
    a.directory.mkdir(parents=True)
    (a.directory / "b.json").write_bytes(HOSTILE[what])
    with pytest.raises(RepositoryError, match=r"b\.json can't be read, so nobody knows where"):
        a.notes()


def test_a_sign_that_is_not_understood_is_that_of_a_run(tmp_path: Path) -> None:
    """H-1: it is not made durable, so a power cut leaves half of it; the next start must go on."""
    a = host(tmp_path, "a")
    a.directory.mkdir(parents=True)
    for number, sign in enumerate((b"", *HOSTILE.values())):
        (a.directory / f"b{number}.read").write_bytes(sign)
    assert a.readers() == tuple(f"b{number}" for number in range(6))
    a.wait_for_readers()
    assert a.readers() == ()


@pytest.mark.parametrize("number", ["1e999", "-1", "true", "1.5", '"7"', str(1 << 63)])
def test_a_number_that_is_none(tmp_path: Path, number: str) -> None:
    a = host(tmp_path, "a")
    a.started()
    (note,) = a.directory.glob("*.json")
    (a.directory / "b.json").write_text(note.read_text().replace(": 1,", f": {number},"))
    with pytest.raises(RepositoryError, match=r"b\.json can't be read"):
        a.notes()


def test_a_note_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    a = host(tmp_path, "a")
    a.started()
    note = a.directory / f"{a.here.id}.json"
    (a.directory / "b.json").symlink_to(note)
    with pytest.raises(RepositoryError):
        a.notes()


def test_what_others_write_is_printable_and_short(tmp_path: Path) -> None:
    a = host(tmp_path, "a")
    a.started()
    path = a.directory / f"{a.here.id}.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "name": "x\n\x1b[31m" + "y" * 1000}))
    (note,) = a.notes()
    assert note.name.isprintable()
    assert len(note.name) <= 256


def test_a_directory_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / UUID).write_text("")
    with pytest.raises(RepositoryError):
        host(tmp_path, "a").notes()
    with ExitStack() as stack, pytest.raises(RepositoryError):
        stack.enter_context(host(tmp_path, "a").reading("run", lambda _note: None))
