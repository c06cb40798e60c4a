"""``nbdbackupctl files``."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from nbdbackupd.app import signals, streams, tables, tree_options
from nbdbackupd.app.arguments import Arguments, add_source
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED, FormatError, SourceError, UsageError
from nbdbackupd.ops.files import mount, tar
from nbdbackupd.ops.files import report as files_report
from nbdbackupd.ops.files.files import Entry
from nbdbackupd.ops.files.mount import MountedTree
from nbdbackupd.ops.files.report import FilesReport
from nbdbackupd.units import human_size, local_time

DESCRIPTION: Final = """\
Read single files of a restore point, without restoring disks and without root. fs: show the
partitions and file systems. ls: list directories. cp: copy files and directories out, the last PATH
is where to. tar: write them as an archive.
"""
ACTIONS: Final = ("fs", "ls", "cp", "tar")


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("files", DESCRIPTION)
    add_source(parser)
    parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help=" | ".join(ACTIONS))
    parser.add_argument("paths", metavar="PATH", nargs="*", help="in the file system")
    tree_options.add(parser)
    parser.add_argument("-R", "--recursive", action="store_true", help="ls: all below, too")
    parser.add_argument("-f", "--file", metavar="FILE", type=Path, help="tar: not to stdout")
    parser.add_argument("-z", "--gzip", action="store_true", help="tar: compressed")
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 30 if something could not be read, 40 if for damage."""
    _check(args, context)

    request = tree_options.request(args, context)
    with signals.listen() as cancel, ExitStack() as stack:
        if args.action == "fs":
            tree_options.show_file_systems(mount.look(request, cancelled=cancel.check), context)
            return 0
        output = sys.stdout.fileno()
        if args.action == "tar" and args.file:
            output = stack.enter_context(tar.output_file(args.file.absolute()))
        tree = stack.enter_context(mount.opened(request, cancelled=cancel.check))
        tree_options.warn(tree.warnings, tree.notes)
        report = _act(args, tree, output, cancel)
        damaged = tree.check()
    for line in report.problems.skipped:
        tree_options.warn([f"left out: {line}"])
    if args.action != "tar" or args.file:
        context.show(report.to_json(), _render(report))
    for line in report.problems.failed:
        streams.complain(f"can't read {line}")
    if damaged:
        return FormatError.exit_code
    if not report.is_complete:
        return SourceError.exit_code
    return WARNED if tree.warnings or report.problems.skipped else 0


def _check(args: Arguments, context: Context) -> None:
    if args.recursive and args.action != "ls":
        raise UsageError("-R is for ls")
    if (args.file or args.gzip) and args.action != "tar":
        raise UsageError("-f and -z are for tar")
    if args.action == "fs" and args.paths:
        raise UsageError("files SOURCE fs takes no PATH")
    if args.action == "cp" and len(args.paths) < 2:
        raise UsageError("files SOURCE cp wants what to copy, and where to")
    if args.action == "tar" and not args.file:
        if context.json:
            raise UsageError("the archive goes to stdout, no place for JSON: give -f FILE")
        if os.isatty(sys.stdout.fileno()):
            raise UsageError("the archive would go to the terminal: give -f FILE, or use a pipe")


def _act(args: Arguments, tree: MountedTree, output: int, cancel: signals.Cancel) -> FilesReport:
    paths = args.paths or ["/"]
    if args.action == "cp":
        *paths, last = args.paths
        destination = Path(last).absolute()
        return files_report.copy(tree, paths, destination, cancelled=cancel.check)
    if args.action == "tar":
        return files_report.archive(tree, paths, output, compress=args.gzip, cancelled=cancel.check)
    return files_report.show(tree, paths, recursive=args.recursive, cancelled=cancel.check)


def _render(report: FilesReport) -> str:
    """The report for people."""
    if report.action == "ls":
        rows = [_row(each) for each in report.entries]
        return "\n".join(tables.render(rows)) if rows else ""
    if report.copied is not None:
        done = report.copied
        return (
            f"copied {done.files} file(s), {done.directories} directories, {done.links} links, "
            f"{human_size(done.size)}"
        )
    return f"archived {report.archived} names"


def _row(entry: Entry) -> tuple[str, ...]:
    import stat

    target = f" -> {entry.target}" if entry.target else ""
    return (
        stat.filemode(entry.mode),
        str(entry.uid),
        str(entry.gid),
        f"{entry.size:>12}",
        local_time(entry.modified) if entry.modified else "-",
        f"{entry.path}{target}",
    )
