"""Which directory holds a set's manifests, and who keeps its files while they are read."""

import os
from pathlib import Path

import pytest

from nbdbackupd.errors import BusyError, IntegrityError, RepositoryError
from nbdbackupd.model.chain import BackupSet
from nbdbackupd.repo import generation, layout, reading, removing
from nbdbackupd.repo.removing import Intent


def test_a_switch_while_reading(tmp_path: Path) -> None:
    """What is read is of one generation, also where the old one went on the way."""
    seen = []

    def read(folder: Path) -> str:
        seen.append(folder.name)
        if folder.name != "points.2":
            generation.switch(tmp_path, len(seen))
        if len(seen) == 1:
            raise RepositoryError("it has gone")
        return folder.name

    assert generation.stable(tmp_path, read) == "points.2"
    assert seen == ["points", "points.1", "points.2"]

    def fail(_: Path) -> None:
        raise RepositoryError("broken")

    with pytest.raises(RepositoryError, match="broken"):
        generation.stable(tmp_path, fail)

    def restless(_: Path) -> None:
        generation.switch(tmp_path, generation.current(tmp_path) + 1)

    with pytest.raises(BusyError, match="all the time"):
        generation.stable(tmp_path, restless)


def test_readers_keep_what_removal_would_take(tmp_path: Path) -> None:
    (tmp_path / layout.POINTS).mkdir()
    first, second = reading.hold(tmp_path), reading.hold(tmp_path)
    assert first is not None
    assert second is not None
    assert reading.take(tmp_path) is None
    first.release()
    # one that was handed on holds it as well
    inherited = os.dup(second.fd)
    second.release()
    assert reading.take(tmp_path) is None
    os.close(inherited)
    taken = reading.take(tmp_path)
    assert taken is not None
    taken.release()


def test_no_lock_is_made_where_no_set_is(tmp_path: Path) -> None:
    assert reading.hold(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / layout.READING).symlink_to(tmp_path / "elsewhere")
    (tmp_path / layout.POINTS).mkdir()
    assert reading.hold(tmp_path) is None
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"adds": [], "removes": []}',
        '{"adds": "x", "removes": [], "gone": []}',
        '{"adds": ["../x"], "removes": [], "gone": []}',
        '{"adds": [], "removes": ["a/b"], "gone": []}',
        '{"adds": [], "removes": [".lock"], "gone": []}',
        '{"adds": [], "removes": ["generation"], "gone": []}',
        '{"adds": [], "removes": [3], "gone": []}',
        '{"adds": [], "removes": [], "gone": [""]}',
    ],
)
def test_an_intent_that_is_damaged_removes_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = tmp_path / f"{layout.REMOVAL_PREFIX}1"
    stage.mkdir()
    (stage / layout.INTENT).write_text(text)
    (tmp_path / "x").touch()
    removing.sweep(tmp_path, ())
    assert "some of its files may stay" in caplog.text
    assert (tmp_path / "x").exists()
    assert not stage.exists()


def test_an_intent_takes_no_file_of_a_point(tmp_path: Path) -> None:
    stage = tmp_path / f"{layout.REMOVAL_PREFIX}1"
    stage.mkdir()
    (stage / layout.INTENT).write_bytes(Intent(adds=("x", "y"), removes=(), gone=()).pack())
    for name in ("x", "y"):
        (tmp_path / name).touch()
    removing.sweep(tmp_path, {"x"})
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_generations_end_before_they_can_not_be_read(tmp_path: Path) -> None:
    for number in ("9" * 18, "9" * 19):
        (tmp_path / layout.GENERATION).write_text(f"{number}\n")
        intent = Intent(adds=(), removes=(), gone=())
        with (
            pytest.raises(IntegrityError, match="no removals come to"),
            removing.begun(tmp_path, intent, lambda _: BackupSet(())),
        ):
            pass
        assert [each.name for each in tmp_path.iterdir()] == [layout.GENERATION]


def test_an_intent_can_be_read() -> None:
    intent = Intent(adds=("a",), removes=("checkpoints/c.xml", "b"), gone=("p",))
    assert Intent.parse(intent.pack()) == intent
