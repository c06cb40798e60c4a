"""Durable files and locks."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbdbackupd import durable
from nbdbackupd.errors import BusyError, NoSpaceError, RepositoryError
from tests.lib.accounts import NOBODY, flock_as_nobody, open_to_others, run_as

pytestmark = pytest.mark.component

HOLD = """
import sys, time
from pathlib import Path
from nbdbackupd import durable
with durable.Lock(Path(sys.argv[1]), owner="backup of vm1"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, os.fspath(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait(10)
    assert child.stdout is not None
    child.stdout.close()


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("before", [None, 0o644, 0o666, 0o600])
def test_nobody_else_can_take_a_lock(tmp_path: Path, umask: int, before: int | None) -> None:
    """S-8: who may open the file for reading may lock it; older versions made it 0644."""
    path = tmp_path / "lock"
    tmp_path.chmod(0o711)
    if before is not None:
        path.touch()
        path.chmod(before)
    old = os.umask(umask)
    try:
        with durable.Lock(path, owner="me"):
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)
    assert flock_as_nobody(path) != 0
    path.chmod(0o644)
    assert flock_as_nobody(path) == 0


def test_a_lock_is_closed_from_its_creation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-8: there is no moment in which another account could open it."""
    seen = []
    real = os.open

    def spy(path: Path, flags: int, mode: int = 0o777, **more: int) -> int:
        found = real(path, flags, mode, **more)
        seen.append(os.fstat(found).st_mode & 0o777)
        return found

    monkeypatch.setattr(os, "open", spy)
    old = os.umask(0)
    try:
        with durable.Lock(tmp_path / "lock", owner="me"):
            pass
    finally:
        os.umask(old)
    assert seen
    assert set(seen) == {0o600}


def test_one_more_account_gets_into_a_directory(tmp_path: Path) -> None:
    """S-12: by an access control list, so that no unit need give files away."""
    tmp_path.chmod(0o711)
    directory = tmp_path / "nbd"
    directory.mkdir()
    for _ in range(2):
        durable.admit(directory, NOBODY, NOBODY)
    assert directory.stat().st_uid == os.geteuid()
    assert directory.stat().st_mode & 0o007 == 0
    if os.geteuid() == 0:
        for uid, code in ((NOBODY, 0), (NOBODY - 1, 1)):
            assert run_as(uid, ["touch", str(uid)], directory) == code
    assert open_to_others(tmp_path) == []


def test_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    child = hold(path)
    try:
        with (
            pytest.raises(BusyError, match=rf"process {child.pid} \(backup of vm1\)"),
            durable.Lock(path, owner="me"),
        ):
            pass
    finally:
        end(child)
    lock = durable.Lock(path, owner="me")
    states = [lock.is_held]
    with lock:
        states.append(lock.is_held)
    states.append(lock.is_held)
    assert states == [False, True, False]
    assert path.exists()


def test_lock_waits_up_to_its_deadline(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    child = hold(path)
    try:
        begin = time.monotonic()
        with pytest.raises(BusyError, match="is locked by process"):
            durable.Lock(path, owner="me", wait=durable.Wait(seconds=0.3)).__enter__()
        assert 0.3 <= time.monotonic() - begin < 20
        timer = threading.Timer(0.3, child.send_signal, [signal.SIGKILL])
        timer.start()
        with durable.Lock(path, owner="me", wait=durable.Wait(seconds=30)) as lock:
            assert lock.is_held
        timer.join()
    finally:
        end(child)


def test_removed_lock_file_is_no_hole(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with durable.Lock(path, owner="first"):
        path.unlink()
        with (
            durable.Lock(path, owner="second"),
            pytest.raises(BusyError, match="second"),
            durable.Lock(path, owner="third"),
        ):
            pass


def test_lock_on_a_file_that_was_just_removed_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    flock, count = fcntl.flock, 0

    def remove_first(fd: int, operation: int) -> None:
        nonlocal count
        count += 1
        if count == 1:
            path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with (
        durable.Lock(path, owner="first", wait=durable.Wait(seconds=10)),
        pytest.raises(BusyError, match="first"),
        durable.Lock(path, owner="second"),
    ):
        pass
    assert count == 3


def test_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"), durable.Lock(tmp_path / ".lock", owner="me"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_is_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    """S-8: a stranger's set may have one in the place of its lock."""
    os.mkfifo(tmp_path / ".lock")
    with (
        pytest.raises(RepositoryError, match="no lock"),
        durable.Lock(tmp_path / ".lock", owner="me", wait=durable.Wait(seconds=60)),
    ):
        pass
    assert durable.holder(tmp_path / ".lock") == "another process"
    assert not durable.is_locked(tmp_path / ".lock")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"12\n\x1b[31m x", b"abc def"])
def test_holder_of_a_garbled_file_is_printable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert durable.holder(tmp_path / "lock").isprintable()
    assert durable.holder(tmp_path / "absent") == "another process"


def test_write_atomic_replaces_with_exact_mode(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    durable.write_atomic(path, b"old")
    old_mask = os.umask(0o077)
    try:
        durable.write_atomic(path, b"new", mode=0o644)
    finally:
        os.umask(old_mask)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_failed_write_leaves_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    durable.write_atomic(path, b"old")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_create_exclusive_refuses_existing(tmp_path: Path) -> None:
    os.close(durable.create_exclusive(tmp_path / "a", 0o640))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError):
        durable.create_exclusive(tmp_path / "a")


def test_modes_of_directories_hold_whatever_the_umask_is(tmp_path: Path) -> None:
    old_mask = os.umask(0o077)
    try:
        durable.make_directory(tmp_path / "a" / "b", 0o711)
    finally:
        os.umask(old_mask)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")} == {0o711}


def test_make_directory(tmp_path: Path) -> None:
    durable.make_directory(tmp_path / "a" / "b")
    durable.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="directory"):
        durable.make_directory(tmp_path / "file" / "c")


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, NoSpaceError, "free space"),
        (errno.EDQUOT, NoSpaceError, "free space"),
        (errno.EROFS, RepositoryError, "read-only"),
        (errno.EIO, RepositoryError, "kernel's log"),
        (errno.EACCES, RepositoryError, "owner and mode"),
        (errno.ELOOP, RepositoryError, "symbolic"),
    ],
)
def test_os_errors_are_typed(code: int, kind: type[RepositoryError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught, durable.translate_os_errors("write", "/x/y"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    assert "can't write /x/y" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_short_work_is_waited_for_and_told(tmp_path: Path) -> None:
    """W-15: a backup right after a start met our own check of the bitmaps, and gave up."""
    path = tmp_path / "lock"
    told: list[str] = []
    wait = durable.Wait(brief="checkpoints of ", told=told.append)
    with durable.Lock(path, owner="backup of vm1"), pytest.raises(BusyError, match="backup of vm1"):
        durable.Lock(path, owner="backup of vm1", wait=wait).__enter__()
    first = durable.Lock(path, owner="checkpoints of vm1")
    first.__enter__()
    release = threading.Timer(1.0, first.__exit__, (None, None, None))
    release.start()
    with durable.Lock(path, owner="backup of vm1", wait=wait) as lock:
        assert lock.is_held
    release.join()
    (text,) = told
    assert text.startswith("waiting for ")
    assert "checkpoints of vm1" in text


def test_parents_of_a_private_directory_let_others_pass(tmp_path: Path) -> None:
    """Else what is made first, the state, would keep QEMU from its scratch files beside it."""
    durable.make_directory(tmp_path / "nbdbackup" / "state")
    modes = [(tmp_path / each).stat().st_mode & 0o777 for each in ("nbdbackup", "nbdbackup/state")]
    assert modes == [0o711, 0o700]
