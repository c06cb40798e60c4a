"""What ``files`` has done, and the frame that its work runs in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nbdbackupd.ops.files import copy as files_copy
from nbdbackupd.ops.files import tar
from nbdbackupd.ops.files.copy import Copied
from nbdbackupd.ops.files.files import Entry, Problems, Tree
from nbdbackupd.ops.files.mount import MountedTree
from nbdbackupd.plain import versioned
from nbdbackupd.threads import Threads

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesReport:
    """What was read of a mounted tree: of one of the three actions, the others are empty."""

    action: str
    tree: MountedTree
    problems: Problems
    entries: tuple[Entry, ...] = ()
    copied: Copied | None = None
    archived: int = 0

    @property
    def is_complete(self) -> bool:
        """All that was asked for could be read."""
        return not self.problems.failed

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            action=self.action,
            point=self.tree.point,
            domain=self.tree.domain,
            created=self.tree.created,
            file_system=self.tree.file_system.to_json(),
            tool=self.tree.reader.tool,
            entries=[each.to_json() for each in self.entries],
            copied=self.copied.to_json() if self.copied else None,
            archived=self.archived,
            notes=list(self.tree.notes),
            warnings=[*self.tree.warnings, *self.problems.skipped],
            problems=list(self.problems.failed),
        )


def show(
    mounted: MountedTree,
    paths: list[str],
    *,
    recursive: bool,
    cancelled: Callable[[], None],
) -> FilesReport:
    """What is at the paths; ``recursive``: and all below. Raises UsageError, SourceError."""
    problems = Problems()

    def work(tree: Tree) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for path in paths:
            names = tree.resolve(path, last=True)
            if not recursive:
                found += tree.list(names, problems)
                continue
            for node in tree.walk(names, problems):
                if not node.leave and node.names != names:
                    found.append(tree.entry(node.names))
        return tuple(found)

    entries = _run(mounted, work, cancelled)
    return FilesReport(action="ls", tree=mounted, problems=problems, entries=entries)


def copy(
    mounted: MountedTree,
    paths: list[str],
    destination: Path,
    *,
    cancelled: Callable[[], None],
) -> FilesReport:
    """Copy out of the tree, see ``files_copy.copy``."""
    problems = Problems()

    def work(tree: Tree) -> Copied:
        return files_copy.copy(tree, paths, destination, problems)

    copied = _run(mounted, work, cancelled)
    return FilesReport(action="cp", tree=mounted, problems=problems, copied=copied)


def archive(
    mounted: MountedTree,
    paths: list[str],
    output: int,
    *,
    compress: bool,
    cancelled: Callable[[], None],
) -> FilesReport:
    """Write an archive to a descriptor, see ``files_tar.archive``."""
    problems = Problems()

    def work(tree: Tree) -> int:
        return tar.archive(tree, paths, output, problems, compress=compress)

    count = _run(mounted, work, cancelled)
    return FilesReport(action="tar", tree=mounted, problems=problems, archived=count)


def _run(
    mounted: MountedTree, work: Callable[[Tree], Result], cancelled: Callable[[], None]
) -> Result:
    """Work in a thread of its own: a read that never ends must not keep signals from us."""
    found: list[Result] = []

    def watch() -> None:
        try:
            cancelled()
            mounted.check()
        except BaseException:
            mounted.abort()
            raise

    threads = Threads(watch)
    tree = Tree(
        root=mounted.path,
        follows_links=mounted.reader.follows_links,
        has_inodes=mounted.has_inodes,
        check=threads.check,
    )
    threads.run({"files": lambda: found.append(work(tree))})
    return found[0]
