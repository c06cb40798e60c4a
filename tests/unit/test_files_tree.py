"""Walking and copying a tree, on directories of this host: limits, loops, names in the way."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.ops.files import copy, tar
from nbdbackupd.ops.files.files import MAX_DEPTH, Problems, Tree


def tree(root: Path, *, has_inodes: bool = True) -> Tree:
    return Tree(root=root, follows_links=False, has_inodes=has_inodes, check=lambda: None)


def in_a_thread(work: Callable[[], None]) -> None:
    """As ``files`` does it: with the smaller stack of a thread."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as err:  # noqa: BLE001 - raised below
            failures.append(err)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_a_bottomless_directory(tmp_path: Path) -> None:
    """More levels than we hold open, and a longer path than the kernel takes."""
    deep = tmp_path / "src"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 50):
        os.mkdir("d" * 20, dir_fd=fd)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    problems = Problems()

    def work() -> None:
        done = copy.copy(tree(tmp_path), ["src"], tmp_path / "out", problems)
        assert done.directories == MAX_DEPTH

    in_a_thread(work)
    assert problems.failed == []
    (line,) = problems.skipped
    assert f"deeper than {MAX_DEPTH} directories" in line


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    (tmp_path / "src/a/b").mkdir(parents=True)
    (tmp_path / "src/a/b/file").write_text("x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers
    for number in range(3):
        copy.copy(tree(tmp_path / "src"), ["a"], tmp_path / f"{number}", Problems())
    walk = tree(tmp_path / "src").walk((b"a",), Problems())
    next(walk)
    next(walk)
    walk.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - numbers


def test_two_paths_of_one_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "same").write_text(name)
    (tmp_path / "out").mkdir()
    with pytest.raises(RepositoryError, match="same exists"):
        copy.copy(tree(tmp_path / "src"), ["a/same", "b/same"], tmp_path / "out", Problems())
    assert (tmp_path / "out/same").read_text() == "a"


def test_names_of_one_file_stay_within_a_copy(tmp_path: Path) -> None:
    """A further name is linked to what this copy has made, and to nothing else."""
    (tmp_path / "src/a").mkdir(parents=True)
    (tmp_path / "src/a/one").write_text("x")
    os.link(tmp_path / "src/a/one", tmp_path / "src/two")
    (tmp_path / "out").mkdir()
    copy.copy(tree(tmp_path / "src"), ["a", "two"], tmp_path / "out", Problems())
    assert (tmp_path / "out/two").read_text() == "x"
    assert (tmp_path / "out/two").stat().st_nlink == 1
    copy.copy(tree(tmp_path / "src"), ["/"], tmp_path / "all", Problems())
    assert (tmp_path / "all/two").stat().st_nlink == 2
    assert (tmp_path / "all/two").samefile(tmp_path / "all/a/one")
    assert not (tmp_path / "all/two").samefile(tmp_path / "src/two")
    # where numbers of inodes mean nothing, each name is a file of its own
    copy.copy(tree(tmp_path / "src", has_inodes=False), ["/"], tmp_path / "own", Problems())
    assert (tmp_path / "own/two").read_text() == "x"
    assert (tmp_path / "own/two").stat().st_nlink == 1


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 5000])
def test_contents_with_holes_anywhere(tmp_path: Path, size: int) -> None:
    (tmp_path / "src").mkdir()
    for name, data in {
        "zero": bytes(size),
        "full": os.urandom(size),
        "end": bytes(max(0, size - 1)) + b"x" * min(1, size),
        "middle": (bytes(size // 2) + b"y" + bytes(size))[:size],
    }.items():
        (tmp_path / "src" / name).write_bytes(data)
    done = copy.copy(tree(tmp_path), ["src"], tmp_path / "out", Problems())
    assert (done.files, done.size) == (4, 4 * size)
    for path in (tmp_path / "src").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out/zero").stat().st_blocks == 0


def test_paths_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/prog").write_text("x")
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "abs").symlink_to("/bin/prog")
    (tmp_path / "up").symlink_to("../../../usr")
    found = tree(tmp_path)
    assert found.resolve("/") == ()
    assert found.resolve("../../bin/./prog") == (b"usr", b"bin", b"prog")
    assert found.resolve("abs") == (b"abs",)
    assert found.resolve("abs", last=True) == (b"usr", b"bin", b"prog")
    assert found.resolve("up/bin/..") == (b"usr",)
    for path in ("none", "bin/none", "usr/bin/prog/x", "bin/../none"):
        with pytest.raises(UsageError, match="there is no"):
            found.resolve(path)


def test_an_archive_that_does_not_become_whole(tmp_path: Path) -> None:
    def broken() -> None:
        with tar.output_file(tmp_path / "a.tar") as fd:
            os.write(fd, b"half")
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert list(tmp_path.iterdir()) == []
