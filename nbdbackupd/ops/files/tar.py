"""Files of a mounted tree as an archive, by GNU tar, which knows sparse files and attributes.

We walk and give it the names, it walks nowhere: so links that lead round in circles, and names
that look like options, are ours to handle.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd import durable, proc
from nbdbackupd.errors import ProcessError, RepositoryError
from nbdbackupd.ops.files.files import Problems, Tree

POLL_SECONDS: Final = 0.2


@contextmanager
def output_file(path: Path) -> Iterator[int]:
    """A new file for the archive, removed if it does not become whole.

    Raises RepositoryError if it exists or can't be made, NoSpaceError.
    """
    if os.path.lexists(path):
        raise RepositoryError(f"{path} exists: give another name")
    with durable.translate_os_errors("write", path):
        fd = durable.create_exclusive(path, 0o600)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def archive(
    tree: Tree,
    paths: list[str],
    output: int,
    problems: Problems,
    *,
    compress: bool,
) -> int:
    """Write an archive of the paths, with all below them, to a descriptor; the number of names.

    In pax format: owners by number, holes, links, extended attributes, access lists. What could
    not be read is in ``problems``. Raises UsageError if there is no such path, ProcessError if
    tar fails otherwise.
    """
    wanted = [tree.resolve(path) for path in paths]
    with os.fdopen(os.memfd_create("names"), "w+b") as names:
        count = 0
        for each in wanted:
            for node in tree.walk(each, problems):
                if node.leave:
                    continue
                if stat.S_ISSOCK(node.status.st_mode):
                    problems.skip(node.shown, "socket")
                    continue
                names.write(b"./" + b"/".join(node.names) + b"\0")
                count += 1
        names.flush()
        names.seek(0)
        options = ["--gzip"] if compress else []
        if not tree.has_inodes:
            options.append("--hard-dereference")
        argv = [
            "tar", "--create", "--format=pax", "--numeric-owner", "--sparse", "--xattrs", "--acls",
            "--no-recursion", *options, "--file=-", "--directory", os.fspath(tree.root),
            "--null", "--files-from=-",
        ]  # fmt: skip
        with proc.spawn(argv, stdin=names.fileno(), stdout=output) as program:
            status = None
            while status is None:
                tree.check()
                try:
                    status = program.wait(POLL_SECONDS, ok=range(-64, 256))
                except ProcessError:
                    continue
            _judge(program, status, problems)
    return count


def _judge(program: proc.Process, status: int, problems: Problems) -> None:
    """Take tar's complaints about files for problems of ours; 1: it has left nothing out."""
    if status == 0:
        return
    error = program.failure(status)
    lines = [line.removeprefix("tar: ") for line in program.complaints.splitlines()]
    told = [line for line in lines if line.startswith("./")]
    if status not in (1, 2) or not told:
        raise error
    for line in told:
        problems.fail(line.partition(": ")[0][1:], OSError(0, line.partition(": ")[2]))
