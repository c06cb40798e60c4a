"""A target that runs full: real, small file systems."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdbackupd.errors import NoSpaceError, RepositoryError
from nbdbackupd.model.chain import Level
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

Mount = Callable[[Path, str], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount a tmpfs at a new directory; unmounted at the end."""
    with ExitStack() as stack:

        def do(path: Path, options: str) -> None:
            path.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True, timeout=30
            )
            stack.callback(lambda: subprocess.run(["umount", path], check=True, timeout=30))

        yield do


def free_pages(path: Path) -> int:
    return os.statvfs(path).f_bavail


def leave_pages(path: Path, count: int) -> None:
    """Fill the file system but for ``count`` pages."""
    page = os.statvfs(path).f_frsize
    ballast = path / ".ballast"
    ballast.write_bytes(b"")
    (path / ".ballast").write_bytes(bytes(page * (free_pages(path) - count)))
    assert free_pages(path) == count


@pytest.mark.parametrize("level", [Level.INC, Level.COPY])
def test_each_shortage_of_space_leaves_the_old_set(
    tmp_path: Path, mount: Mount, level: Level
) -> None:
    path = tmp_path / "set"
    mount(path, "size=2m")
    chains.make_chain(path, 0)
    repository = SetDirectory.open(path)
    for count in range(200):
        with repository.lock(owner="test"):
            repository.sweep()
        old = {name: data for name, data in chains.tree(path).items() if name != ".ballast"}
        leave_pages(path, count)
        try:
            chains.add_point(path, 2, level)
        except NoSpaceError:
            (path / ".ballast").unlink()
            assert chains.tree(path) == old
            assert len(repository.load().points) == 1
            continue
        (path / ".ballast").unlink()
        assert count > 10
        break
    known = repository.load()
    repository.check_present(known.points)
    assert len(known.points) == 2


def test_shortage_of_inodes(tmp_path: Path, mount: Mount) -> None:
    for inodes in range(10, 60):
        path = tmp_path / f"set{inodes}"
        mount(path, f"size=2m,nr_inodes={inodes}")
        try:
            chains.make_chain(path, 1)
        except NoSpaceError:
            repository = SetDirectory.open(path)
            with repository.lock(owner="test"):
                assert repository.sweep() == []
            repository.check_present(repository.load().points)
            assert not list(path.glob(".draft*"))
        else:
            assert inodes > 20
            return
    pytest.fail("60 inodes should be enough")


def test_full_disk_can_still_be_locked(tmp_path: Path, mount: Mount) -> None:
    path = tmp_path / "set"
    mount(path, "size=1m")
    chains.make_chain(path, 0)
    (path / ".lock").unlink()
    (path / ".lock").touch()
    leave_pages(path, 0)
    with SetDirectory.open(path).lock(owner="prune"):
        assert SetDirectory.open(path).load().points


def test_read_only_target(tmp_path: Path, mount: Mount) -> None:
    path = tmp_path / "set"
    mount(path, "size=1m")
    made = chains.make_chain(path, 1)
    subprocess.run(["mount", "-o", "remount,ro", path], check=True, timeout=30)
    assert list(SetDirectory.open(path).load().points) == made
    with pytest.raises(RepositoryError, match="mounted read-only"):
        chains.add_point(path, 3)
