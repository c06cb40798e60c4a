"""``nbdbackupctl backup``."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdbackupd import __version__
from nbdbackupd.app import context as app_context
from nbdbackupd.app import signals
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    lz4_level,
    names,
    positive,
    seconds,
    size,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.sizes import human_size, human_time
from nbdbackupd.errors import UsageError

if TYPE_CHECKING:
    from nbdbackupd.ops.backup_request import BackupReport, BackupRequest

LEVELS = ("auto", "full", "inc", "diff", "copy")
DEFAULT_RESERVE = 512 << 20
DESCRIPTION = """\
Save a running domain into a backup set. The first run makes a full, later ones save only
what changed since. The set's directory is given with -o; nothing else must live in it.
"""


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "backup", help="save a running domain", description=DESCRIPTION,
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "-l", "--level", choices=LEVELS, default="auto",
        help="auto (default): full into an empty set, else inc; full: new chain; inc: changes "
        "since the last point; diff: the same without moving on; copy: a full beside the chain",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="directory of the set"
    )
    _disk_options(parser)
    _guest_options(parser)
    _run_options(parser)
    parser.set_defaults(run=run)


def _disk_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("disks")
    group.add_argument(
        "-i", "--include", metavar="DISKS", type=names, default=(),
        help="only these disks (vda,vdb)",
    )  # fmt: skip
    group.add_argument(
        "-x", "--exclude", metavar="DISKS", type=names, default=(), help="not these disks"
    )
    group.add_argument(
        "--raw", action="store_true", help="save raw disks, too: in full at each point"
    )
    compress = group.add_mutually_exclusive_group()
    compress.add_argument(
        "-z", "--compress", metavar="LEVEL", nargs="?", type=lz4_level, const=2, default=None,
        help="compress with lz4, level 1 to 16 (without one: 2; then give DOMAIN before it)",
    )  # fmt: skip
    compress.add_argument(
        "--no-compress", action="store_const", dest="compress", const=None,
        help="store blocks as they are (default)",
    )  # fmt: skip
    group.add_argument(
        "-t", "--type", choices=("stream", "raw"), default="stream",
        help="stream (default), or raw: one full raw image for each disk, level copy only",
    )  # fmt: skip
    group.add_argument(
        "--extents", choices=("own", "nbdinfo"), default="own",
        help="who asks for extents: we (default) or the nbdinfo tool, to cross-check",
    )  # fmt: skip


def _guest_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guest")
    group.add_argument(
        "--freeze", choices=("auto", "require", "never"), default="auto",
        help="freeze the guest's file systems at the instant of the point: if the agent answers "
        "(auto, default), or fail (require), or not at all (never)",
    )  # fmt: skip
    group.add_argument(
        "-F", "--freeze-mountpoint", metavar="DIRS", type=names, default=(),
        help="freeze only these mount points of the guest (/mnt,/var)",
    )  # fmt: skip
    group.add_argument(
        "--pause", action="store_true", help="pause the domain at the instant instead of freezing"
    )
    group.add_argument(
        "-S", "--start-paused", action="store_true",
        help="start a domain that is off, paused, and end it after the run unless somebody has "
        "resumed it (default: read its images)",
    )  # fmt: skip
    group.add_argument(
        "--scratch-dir", metavar="DIR", type=Path,
        help="where QEMU keeps blocks that the guest overwrites during the run; local and fast "
        "(default: /var/lib/nbdbackup/scratch)",
    )  # fmt: skip
    group.add_argument(
        "--scratch-reserve", metavar="SIZE", type=size, default=DEFAULT_RESERVE,
        help="space that must stay free there; the run needs twice as much to begin and ends "
        "before less is left (default: 512M)",
    )  # fmt: skip


def _run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add_checkpoint_dir(group)
    group.add_argument(
        "--threshold", metavar="SIZE", type=size,
        help="do nothing, successfully, if less than this would be saved by an increment",
    )  # fmt: skip
    group.add_argument(
        "--strict", action="store_true", help="fail, and keep nothing, instead of warning"
    )
    group.add_argument(
        "-w", "--workers", metavar="N", type=positive, default=min(8, os.cpu_count() or 2),
        help="threads that hash and compress (default: one for each processor, at most 8)",
    )  # fmt: skip
    group.add_argument(
        "--wait", metavar="SECONDS", type=seconds, default=0.0,
        help="wait so long for the lock of the set or domain (default: 0, exit 75 at once)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=60.0,
        help="give up after so long without an answer from QEMU (default: 60)",
    )  # fmt: skip


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 with warnings."""
    from nbdbackupd.ops import backup

    with (
        signals.listen() as cancel,
        context.connection() as connection,
        context.progress() as progress,
    ):
        report = backup.run(
            _request(args, context),
            connection,
            progress=progress.disk,
            cancelled=cancel.check,
        )
    context.show(report.to_json(), render(report))
    return 3 if report.warnings else 0


def _request(args: Arguments, context: Context) -> "BackupRequest":
    from nbdbackupd.model.chain import Layout, Level
    from nbdbackupd.ops.backup_request import BackupRequest
    from nbdbackupd.source.quiesce import FreezePolicy

    if args.type == "raw" and (args.level != "copy" or args.compress is not None):
        raise UsageError("--type raw needs '-l copy' and goes without --compress")
    if args.pause and (args.freeze == "require" or args.freeze_mountpoint):
        raise UsageError("--pause and freezing exclude one another")
    moment = app_context.now()
    return BackupRequest(
        domain=args.domain,
        directory=args.output.absolute(),
        level=Level(args.level),
        include=args.include,
        exclude=args.exclude,
        raw=args.raw,
        compression=args.compress,
        layout=Layout(args.type),
        by_nbdinfo=args.extents == "nbdinfo",
        freeze=FreezePolicy.NEVER if args.pause else FreezePolicy(args.freeze),
        mountpoints=args.freeze_mountpoint,
        pause=args.pause,
        start_paused=args.start_paused,
        scratch_dir=context.scratch_dir.absolute(),
        scratch_reserve=args.scratch_reserve,
        runtime_dir=context.runtime_dir.absolute(),
        state_dir=context.state_dir.absolute(),
        workers=args.workers,
        threshold=args.threshold,
        strict=args.strict,
        wait_seconds=args.wait,
        timeout_seconds=args.timeout,
        program=f"nbdbackupd {__version__}",
        run_id=app_context.new_run_id(moment),
        now=moment,
    )


def render(report: "BackupReport") -> str:
    """The report for people."""
    point = report.point
    if point is None:
        return f"nothing saved: {report.skipped}"
    lines = [
        f"saved {point.domain}: {point.level} {point.id}, "
        f"{len(point.disks)} disk{'s' * (len(point.disks) != 1)}, "
        f"{point.consistency} consistent, {human_time(report.seconds)}"
    ]
    for disk in point.disks:
        took = report.disk_seconds.get(disk.target, 0.0)
        line = (
            f"  {disk.target:<6} {'whole' if disk.mode == 'full' else 'changes':<8}"
            f"{human_size(disk.data_bytes):>10} data {human_size(disk.zero_bytes):>10} zero "
            f"{human_size(disk.file_size):>10} stored  {human_time(took)}"
        )
        lines.append(line)
    lines += [f"  left out {skip.target}: {skip.reason}" for skip in point.skipped]
    return "\n".join(lines)
