"""S-7: a directory of a set that another account swaps for a link while root works in it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError
from nbdbackupd.repo import protected
from nbdbackupd.repo.protected import Protection
from tests.lab.process import wait_until
from tests.lib.ctl import ROOT
from tests.lib.rigged import RiggedCtl
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

SECONDS = 1.0
"""Of racing; without held directories some tries in a hundred lead elsewhere."""

SWAPPER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
one, other = (each.encode() for each in sys.argv[1:])
while not libc.renameat2(-100, one, -100, other, 2):
    pass
sys.exit(f"renameat2: errno {ctypes.get_errno()}")
"""


@pytest.mark.parametrize(
    ("verb", "fault", "name"),
    [
        ("protect", "STOP@file-replaced#1", "protected"),
        ("unprotect", "STOP@os-unlink#1", "protected"),
        ("verify", "STOP@file-replaced#1", "verified"),
    ],
)
def test_swapped_between_check_and_use(tmp_path: Path, verb: str, fault: str, name: str) -> None:
    """Nothing comes to be, is replaced or goes where the link leads."""
    builder = SetBuilder(tmp_path / "set")
    builder.disks = {"vda": bytearray(1 << 20)}
    builder.full()
    # a link above the set is the administrator's
    (tmp_path / "way").symlink_to(tmp_path)
    path = tmp_path / "way" / "set"
    ctl = RiggedCtl("test:///default", tmp_path / "ctl")
    words = [path] if verb == "verify" else [path, "--point", "latest"]
    before = "protect" if verb == "unprotect" else verb
    subprocess.run(ctl.argv(before, *words), cwd=ROOT, env=ctl.environment, check=True)
    (note,) = (path / name).iterdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / note.name).write_text("somebody else's")
    with (
        ctl.rigged(fault),
        subprocess.Popen(ctl.argv(verb, *words), cwd=ROOT, env=ctl.environment) as process,
    ):
        try:
            wait_until(lambda: is_stopped(process.pid), "the step", 60)
            (path / name).rename(tmp_path / "aside")
            (path / name).symlink_to(outside)
        finally:
            process.send_signal(signal.SIGCONT)
        process.wait(60)
    assert process.returncode == 0
    assert [each.name for each in outside.iterdir()] == [note.name]
    assert (outside / note.name).read_text() == "somebody else's"
    assert (tmp_path / "aside" / note.name).exists() == (verb != "unprotect")


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"


def test_swapped_all_the_time(tmp_path: Path) -> None:
    """Whoever exchanges the two names as fast as he can wins nothing."""
    outside, held, link = tmp_path / "outside", tmp_path / "set/protected", tmp_path / "set/link"
    for each in (outside, held):
        each.mkdir(parents=True)
    link.symlink_to(outside)
    files = open_files()
    with subprocess.Popen([sys.executable, "-c", SWAPPER, held, link]) as swapper:
        try:
            wait_until(held.is_symlink, "the first exchange", 60)
            written = refused = 0
            end = time.monotonic() + SECONDS
            while time.monotonic() < end or not (written and refused):
                try:
                    protected.write(tmp_path / "set", Protection(point=f"p{written}"))
                    written += 1
                except RepositoryError:
                    refused += 1
                with suppress(RepositoryError):
                    protected.remove(tmp_path / "set", f"p{written - 1}")
                assert list(outside.iterdir()) == []
                assert swapper.poll() is None
        finally:
            swapper.kill()
    assert open_files() == files


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_errors_tell_the_path(tmp_path: Path) -> None:
    """Not the name in the held directory, which says little."""
    held = tmp_path / "a" / "b"
    with (
        pytest.raises(RepositoryError, match=f"can't write {held}/x: No such file"),
        durable.translate_os_errors("write", tmp_path),
        durable.hold_directory(tmp_path, held, make=True) as at,
    ):
        os.unlink("x", dir_fd=at)
    (held / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match="b/file"),
        durable.hold_directory(tmp_path, held / "file"),
    ):
        pass
    with pytest.raises(FileNotFoundError), durable.hold_directory(tmp_path, held / "none"):
        pass
