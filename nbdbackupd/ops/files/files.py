"""Names in a mounted tree: looked up, listed and walked without leaving the tree.

Symbolic links are a stranger's. Those on the way to a path that the user gave are followed within
the tree, as the guest would; those met on a walk are never followed. Names are bytes, shown as
UTF-8 with surrogate escapes for what is none.
"""

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd.errors import SourceError, UsageError

MAX_LINKS: Final = 40
"""As the kernel: more links on the way to a file than this are a loop."""

MAX_DEPTH: Final = 400
"""Each level of a walk holds a directory open."""

MAX_PROBLEMS: Final = 1000
KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One name: ``path`` from the root of the tree; sizes in bytes, ``target`` of a link.

    ``mtime`` is in nanoseconds since 1970. ``mode`` has the type's bits, too.
    """

    path: str
    mode: int
    size: int
    mtime: int
    uid: int
    gid: int
    links: int
    target: str = ""

    @property
    def kind(self) -> str:
        """``file``, ``directory``, ``link``, …."""
        return KINDS.get(stat.S_IFMT(self.mode), "unknown")

    @property
    def modified(self) -> str:
        """The time of the last change, RFC 3339, or empty if no calendar has it."""
        try:
            moment = datetime.fromtimestamp(self.mtime // 10**9, UTC)
        except (ValueError, OverflowError, OSError):
            return ""
        return f"{moment:%Y-%m-%dT%H:%M:%SZ}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "path": self.path,
            "type": self.kind,
            "mode": f"{stat.S_IMODE(self.mode):04o}",
            "size": self.size,
            "modified": self.modified,
            "uid": self.uid,
            "gid": self.gid,
            "links": self.links,
            "target": self.target,
        }


@dataclass(slots=True)
class Problems:
    """What could not be read (``failed``) or taken along (``skipped``), a line each."""

    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def fail(self, path: str, err: OSError) -> None:
        """Note a file that could not be read; the first ones are kept."""
        if len(self.failed) < MAX_PROBLEMS:
            self.failed.append(f"{path}: {err.strerror or err}")

    def skip(self, path: str, why: str) -> None:
        """Note a file that was left out."""
        if len(self.skipped) < MAX_PROBLEMS:
            self.skipped.append(f"{path}: {why}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A name on a walk: ``parent`` is its directory's descriptor, open while the node is used.

    ``names`` lead to it from where the walk began; ``leave`` is told after all that is in a
    directory, before it nothing.
    """

    names: tuple[bytes, ...]
    parent: int
    name: bytes
    status: os.stat_result
    leave: bool = False

    @property
    def shown(self) -> str:
        """The path as it is shown."""
        return shown(self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """The root of a mounted file system; ``follows_links`` as of its reader.

    ``has_inodes``: two names with one inode number are names of one file.
    """

    root: Path
    follows_links: bool
    has_inodes: bool
    check: Callable[[], None]

    def resolve(self, path: str, *, last: bool = False) -> tuple[bytes, ...]:
        """The names from the root to what the guest would find at ``path``.

        No directory on the way is a link then; ``last``: the last name is none, either. Raises
        UsageError if there is no such file, SourceError if it can't be read.
        """
        left = [name for name in os.fsencode(path).split(b"/") if name not in (b"", b".")]
        names: list[bytes] = []
        links = 0
        while left:
            name = left.pop(0)
            if name == b"..":
                names = names[:-1]
                continue
            place = self._join([*names, name])
            try:
                status = os.lstat(place)
                if not stat.S_ISLNK(status.st_mode) or not (left or last):
                    names.append(name)
                    continue
                target = os.readlink(place)  # noqa: PTH115 - bytes
            except (FileNotFoundError, NotADirectoryError) as err:
                raise UsageError(f"there is no {path} in the file system") from err
            except (OSError, ValueError) as err:
                raise SourceError(f"can't read {path}: {err}") from err
            links += 1
            if links > MAX_LINKS:
                raise UsageError(f"{path} goes round in a loop of symbolic links")
            if target.startswith(b"/"):
                names = []
            left = [each for each in target.split(b"/") if each not in (b"", b".")] + left
        return tuple(names)

    def entry(self, names: Sequence[bytes]) -> Entry:
        """One name. Raises SourceError."""
        place = self._join(names)
        try:
            status = os.lstat(place)
            is_link = stat.S_ISLNK(status.st_mode)
            target = os.readlink(place) if is_link else b""  # noqa: PTH115 - bytes
        except OSError as err:
            raise SourceError(f"can't read {shown(names)}: {err.strerror}") from err
        return _entry(shown(names), status, target)

    def list(self, names: Sequence[bytes], problems: Problems) -> Iterator[Entry]:
        """What is in a directory, by name; or the name itself if it is none."""
        if not stat.S_ISDIR(self.entry(names).mode):
            yield self.entry(names)
            return
        place = self._join(names)
        try:
            found = sorted(os.listdir(place))  # noqa: PTH208 - bytes
        except OSError as err:
            problems.fail(shown(names), err)
            return
        for name in found:
            self.check()
            try:
                yield self.entry([*names, name])
            except SourceError as err:
                self._note(problems, shown([*names, name]), _cause(err))

    def walk(self, names: Sequence[bytes], problems: Problems) -> Generator[Node, None, None]:
        """The name and all below it; a directory before and, with ``leave``, after its content.

        What can't be read is noted, and so is a directory that is its own ancestor, which a
        reader that follows links may show.
        """
        with ExitStack() as stack:
            parent = os.open(self._join(names[:-1]), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, parent)
            name = names[-1] if names else b"."
            yield from self._walk(parent, name, tuple(names), problems, ())

    def _walk(
        self,
        parent: int,
        name: bytes,
        path: tuple[bytes, ...],
        problems: Problems,
        marks: tuple[int, ...],
    ) -> Iterator[Node]:
        self.check()
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except OSError as err:
            self._note(problems, shown(path), err)
            return
        node = Node(names=path, parent=parent, name=name, status=status)
        if not stat.S_ISDIR(status.st_mode):
            yield node
            return
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=parent)
        except OSError as err:
            problems.fail(shown(path), err)
            return
        try:
            try:
                inside = sorted(map(os.fsencode, os.listdir(fd)))  # noqa: PTH208 - a descriptor
            except OSError as err:
                problems.fail(shown(path), err)
                return
            mark = _mark(fd, inside) if self.follows_links else 0
            if self.follows_links and inside and mark in marks:
                problems.skip(shown(path), "a link to a directory that holds it")
                return
            if len(marks) >= MAX_DEPTH:
                problems.skip(shown(path), f"deeper than {MAX_DEPTH} directories")
                return
            yield node
            for each in inside:
                yield from self._walk(fd, each, (*path, each), problems, (*marks, mark))
            yield Node(names=path, parent=parent, name=name, status=status, leave=True)
        finally:
            os.close(fd)

    def _note(self, problems: Problems, path: str, err: OSError) -> None:
        """A name that is there and can't be looked at."""
        if self.follows_links and err.errno == errno.ENOENT:
            problems.skip(path, "a link to what is not there")
        else:
            problems.fail(path, err)

    def _join(self, names: Sequence[bytes]) -> bytes:
        return b"/".join([os.fsencode(self.root), *names])


def shown(names: Sequence[bytes]) -> str:
    """A path in the tree as it is shown: from its root."""
    return "/" + os.fsdecode(b"/".join(names))


def _entry(path: str, status: os.stat_result, target: bytes) -> Entry:
    return Entry(
        path=path,
        mode=status.st_mode,
        size=status.st_size,
        mtime=status.st_mtime_ns,
        uid=status.st_uid,
        gid=status.st_gid,
        links=status.st_nlink,
        target=os.fsdecode(target),
    )


def _cause(err: SourceError) -> OSError:
    return err.__cause__ if isinstance(err.__cause__, OSError) else OSError(0, err.message)


def _mark(fd: int, names: Sequence[bytes]) -> int:
    """What tells a directory from others where inodes are made up: all that is in it."""
    parts: list[tuple[bytes, int, int, int]] = []
    for name in names:
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            parts.append((name, status.st_mode, status.st_size, status.st_mtime_ns))
        except OSError:
            parts.append((name, 0, 0, 0))
    return hash(tuple(parts))
