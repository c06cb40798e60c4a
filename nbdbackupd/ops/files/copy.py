"""Files and directories out of a mounted tree into a directory of this host.

Nothing that exists is replaced, nothing is written through a link: each file and directory is
made anew, within a directory that is held open. Kept are contents, holes, times, the rights of
owner, group and others, links of both kinds, and extended attributes of users. Owners are not
kept, nor what lets a program run as its owner; an archive (``ops/files/tar.py``) has both.
"""

import contextlib
import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.ops.files.files import KINDS, Node, Problems, Tree

CHUNK: Final = 1 << 20
HOLE: Final = 4096
"""Blocks of so many zero bytes are not written."""

ZEROES: Final = bytes(CHUNK)
RIGHTS: Final = 0o1777
"""Not those to run as the owner or the group: they are others here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """What was copied: numbers, and sizes of files in bytes."""

    files: int
    directories: int
    links: int
    size: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "files": self.files,
            "directories": self.directories,
            "links": self.links,
            "bytes": self.size,
        }


@dataclass(slots=True)
class _Run:
    """One copy on its way: names of files with several names, and open directories."""

    tree: Tree
    problems: Problems
    first: dict[tuple[int, int], tuple[bytes, ...]] = field(default_factory=dict)
    base: int = -1
    top: bytes = b""
    depth: int = 0
    files: int = 0
    directories: int = 0
    links: int = 0
    size: int = 0


def copy(
    tree: Tree,
    paths: list[str],
    destination: Path,
    problems: Problems,
) -> Copied:
    """Copy each of the paths, with all below it, into ``destination`` or to that name.

    One that is an existing directory takes all of them; otherwise it becomes the one path that is
    given. Raises UsageError if there is no such path, or several for one name, RepositoryError,
    NoSpaceError; what could not be read is in ``problems``.
    """
    wanted = [tree.resolve(path) for path in paths]
    run = _Run(tree, problems)
    for names, path in zip(wanted, paths, strict=True):
        directory, name = _place(destination, names, several=len(paths) > 1)
        with durable.translate_os_errors("write", directory), ExitStack() as stack:
            run.base = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, run.base)
            if _exists(run.base, name):
                raise RepositoryError(f"{directory / os.fsdecode(name)} exists: give another name")
            run.top, run.depth = name, len(names)
            run.first.clear()
            _copy_one(run, names, path)
    return Copied(files=run.files, directories=run.directories, links=run.links, size=run.size)


def _place(destination: Path, names: tuple[bytes, ...], *, several: bool) -> tuple[Path, bytes]:
    """The directory, which exists, and the name to be made in it."""
    if destination.is_dir():
        if not names:
            raise UsageError(
                f"{destination} exists: give a new name for a copy of the whole file system"
            )
        return destination, names[-1]
    if several:
        raise UsageError(f"{destination} is no directory, and can't take several files")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise RepositoryError(f"there is no directory {parent}")
    return parent, os.fsencode(destination.name)


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _copy_one(run: _Run, names: tuple[bytes, ...], path: str) -> None:
    """Walk a path and make all that is met; ``targets`` are the open directories on the way."""
    targets = [run.base]
    seen = False
    try:
        for node in run.tree.walk(names, run.problems):
            run.tree.check()
            seen = True
            name = run.top if len(node.names) == run.depth else node.name
            if node.leave:
                fd = targets.pop()
                try:
                    _finish(fd, node.status)
                finally:
                    os.close(fd)
            elif stat.S_ISDIR(node.status.st_mode):
                os.mkdir(name, 0o700, dir_fd=targets[-1])
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                targets.append(os.open(name, flags, dir_fd=targets[-1]))
                run.directories += 1
            else:
                _copy_file(run, node, name, targets[-1])
    finally:
        for fd in targets[1:]:
            os.close(fd)
    if not seen and not run.problems.failed:
        raise UsageError(f"{path} can't be copied: {run.problems.skipped[-1]}")


def _copy_file(run: _Run, node: Node, name: bytes, target: int) -> None:
    mode = node.status.st_mode
    if stat.S_ISLNK(mode):
        try:
            points_to = os.readlink(node.name, dir_fd=node.parent)
        except OSError as err:
            run.problems.fail(node.shown, err)
            return
        os.symlink(points_to, name, dir_fd=target)
        times = (node.status.st_mtime_ns, node.status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)
        run.links += 1
    elif stat.S_ISREG(mode):
        _copy_regular(run, node, name, target)
    else:
        run.problems.skip(node.shown, KINDS.get(stat.S_IFMT(mode), "unknown"))


def _copy_regular(run: _Run, node: Node, name: bytes, target: int) -> None:
    """A file's bytes; a further name of one that is there already becomes that."""
    key = (node.status.st_dev, node.status.st_ino)
    several = node.status.st_nlink > 1 and run.tree.has_inodes
    if several and key in run.first:
        old = b"/".join([run.top, *run.first[key]])
        # a path that is too long, a file system without links: then it is copied once more
        with contextlib.suppress(OSError):
            os.link(old, name, src_dir_fd=run.base, dst_dir_fd=target, follow_symlinks=False)
            run.files += 1
            return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=target)
    try:
        try:
            complete = _copy_bytes(run, node, fd)
            if complete:
                _finish(fd, node.status)
        finally:
            os.close(fd)
    except BaseException:
        os.unlink(name, dir_fd=target)
        raise
    if not complete:
        # half a file would pass for one
        os.unlink(name, dir_fd=target)
        return
    run.files += 1
    if several:
        run.first[key] = node.names[run.depth :]


def _copy_bytes(run: _Run, node: Node, target: int) -> bool:
    """Copy; False if the file can't be read, which is noted then."""
    try:
        # not to wait for anybody, were it no regular file after all
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        source = os.open(node.name, flags, dir_fd=node.parent)
    except OSError as err:
        run.problems.fail(node.shown, err)
        return False
    try:
        offset = 0
        while True:
            run.tree.check()
            try:
                data = os.pread(source, CHUNK, offset)
            except OSError as err:
                run.problems.fail(node.shown, err)
                return False
            if not data:
                break
            _write_sparse(target, data, offset)
            offset += len(data)
        os.ftruncate(target, offset)
        if offset != node.status.st_size:
            short = OSError(errno.EIO, f"{offset} bytes instead of {node.status.st_size}")
            run.problems.fail(node.shown, short)
            return False
        run.size += offset
        _copy_attributes(source, target)
    finally:
        os.close(source)
    return True


def _write_sparse(target: int, data: bytes, offset: int) -> None:
    if data == ZEROES[: len(data)]:
        return
    view = memoryview(data)
    start = 0
    while start < len(data):
        end = start
        while end < len(data) and any(view[end : end + HOLE]):
            end += HOLE
        part = view[start:end]
        while part:
            part = part[os.pwrite(target, part, offset + min(end, len(data)) - len(part)) :]
        start = end + HOLE


def _copy_attributes(source: int, target: int) -> None:
    """Extended attributes of users, as far as both file systems have them."""
    with contextlib.suppress(OSError):
        for name in os.listxattr(source):
            if name.startswith("user."):
                os.setxattr(target, name, os.getxattr(source, name))


def _finish(fd: int, status: os.stat_result) -> None:
    os.fchmod(fd, status.st_mode & RIGHTS)
    with contextlib.suppress(OverflowError):
        os.utime(fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
