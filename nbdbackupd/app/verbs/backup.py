"""``nbdbackupctl backup``."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdbackupd import log as runlog
from nbdbackupd.app import making, signals
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    directory,
    lz4_level,
    names,
    positive,
    rate,
    seconds,
    size,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.making import UNSET
from nbdbackupd.app.verbs import Registry
from nbdbackupd.ops.domain import configured
from nbdbackupd.units import human_size, human_time

if TYPE_CHECKING:
    from nbdbackupd.config.files import Configuration
    from nbdbackupd.ops.backup.request import BackupReport, BackupRequest
    from nbdbackupd.virt.connection import Connection

LEVELS = ("auto", "full", "inc", "diff", "copy")
DESCRIPTION = """\
Save a domain into a backup set. The first run makes a full, later ones save only what changed
since. The set's directory is given with -o; nothing else must live in it. With -o no
configuration is read. Without it the set is chosen as the configuration says, and what no option
says comes from there, too; programs of the configuration are not run, see the verb run.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("backup", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "-l", "--level", choices=LEVELS, default="auto",
        help="auto (default): full into an empty set, else inc; full: new chain; inc: changes "
        "since the last point; diff: the same without moving on; copy: a full beside the chain",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=directory,
        help="directory of the set (default: as the configuration says)",
    )  # fmt: skip
    _disk_options(parser)
    _guest_options(parser)
    _run_options(parser)
    parser.set_defaults(run=run)


def _disk_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("disks")
    group.add_argument(
        "-i", "--include", metavar="DISKS", type=names, default=UNSET,
        help="only these disks (vda,vdb)",
    )  # fmt: skip
    group.add_argument(
        "-x", "--exclude", metavar="DISKS", type=names, default=UNSET, help="not these disks"
    )
    group.add_argument(
        "--raw",
        action="store_true",
        default=UNSET,
        help="save raw disks, too: in full at each point",
    )
    compress = group.add_mutually_exclusive_group()
    compress.add_argument(
        "-z", "--compress", metavar="LEVEL", nargs="?", type=lz4_level, const=2, default=UNSET,
        help="compress with lz4, level 1 to 16 (without one: 2; then give DOMAIN before it)",
    )  # fmt: skip
    compress.add_argument(
        "--no-compress", action="store_const", dest="compress", const=None,
        default=UNSET,
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
        "--freeze", choices=("auto", "require", "never"), default=UNSET,
        help="freeze the guest's file systems at the instant of the point: if the agent answers "
        "(auto, default), or fail (require), or not at all (never)",
    )  # fmt: skip
    group.add_argument(
        "-F", "--freeze-mountpoint", metavar="DIRS", type=names, default=UNSET,
        help="freeze only these mount points of the guest (/mnt,/var)",
    )  # fmt: skip
    group.add_argument(
        "--pause",
        action="store_true",
        default=UNSET,
        help="pause the domain at the instant instead of freezing",
    )
    group.add_argument(
        "-S", "--start-paused", action="store_true", default=UNSET,
        help="start a domain that is off, paused, and end it after the run unless somebody has "
        "resumed it (default: read its images)",
    )  # fmt: skip
    group.add_argument(
        "--scratch-dir", metavar="DIR", type=Path,
        help="where QEMU keeps blocks that the guest overwrites during the run; local and fast "
        "(default: /var/lib/nbdbackup/scratch)",
    )  # fmt: skip
    group.add_argument(
        "--scratch-reserve", metavar="SIZE", type=size, default=UNSET,
        help="space that must stay free there; the run needs twice as much to begin and ends "
        "before less is left (default: 512M)",
    )  # fmt: skip


def _run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add_checkpoint_dir(group)
    group.add_argument(
        "--threshold", metavar="SIZE", type=size, default=UNSET,
        help="do nothing, successfully, if less than this would be saved by an increment",
    )  # fmt: skip
    group.add_argument(
        "--strict",
        action="store_true",
        default=UNSET,
        help="fail, and keep nothing, instead of warning",
    )
    group.add_argument(
        "--limit-rate", metavar="SIZE", type=rate, default=UNSET,
        help="read no more than this per second of all disks together (64K or more)",
    )  # fmt: skip
    group.add_argument(
        "-w", "--workers", metavar="N", type=positive, default=UNSET,
        help="threads that hash and compress (default: one for each processor, at most 8)",
    )  # fmt: skip
    group.add_argument(
        "--wait", metavar="SECONDS", type=seconds, default=UNSET,
        help="wait so long for the lock of the set or domain (default: 0, exit 75 at once)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=UNSET,
        help="give up after so long without an answer from QEMU (default: 60)",
    )  # fmt: skip


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 with warnings."""
    from nbdbackupd.app import preload
    from nbdbackupd.ops.status import record as run_record
    from nbdbackupd.systemd import notify

    with ExitStack() as stack:
        record = run_record.RunRecord(context.host)
        if args.output is None:
            # into a directory of the user's own, status has nothing to say about it
            record = stack.enter_context(run_record.begun(args.domain, context.host))
        preload.preload()
        beat = notify.Pulse({}, tell=record.doing)
        cancel = stack.enter_context(signals.listen())
        progress = stack.enter_context(context.progress())

        def moved(disk: str, position: int, size: int, data: int) -> None:
            beat.progress(disk, position, size, data)
            progress.disk(disk, position, size, data)

        try:
            request, report = _backup(args, context, moved, cancel.check)
        except BaseException as err:
            record.failed(err)
            raise
        code = 3 if report.warnings or runlog.warned() else 0
        record.done(code, report, report.skipped, str(request.directory))
    context.show(report.to_json(), render(report))
    return code


def _backup(
    args: Arguments,
    context: Context,
    moved: Callable[[str, int, int, int], None],
    cancelled: Callable[[], None],
) -> "tuple[BackupRequest, BackupReport]":
    from nbdbackupd.ops.backup import backup

    configuration = None
    if args.output is None:
        configuration = configured.read(context.host)
        context = replace(context, host=configured.connected(configuration, context.host))
    with context.connection() as connection:
        request = _request(args, context, connection, configuration)
        return request, backup.run(request, connection, progress=moved, cancelled=cancelled)


def _request(
    args: Arguments,
    context: Context,
    connection: "Connection",
    configuration: "Configuration | None",
) -> "BackupRequest":
    from nbdbackupd.model.chain import Layout, Level
    from nbdbackupd.ops.backup import prepare

    level = Level(args.level)
    settings: dict[str, Any] = {}
    name, directory = args.domain, args.output
    if configuration is not None:
        from nbdbackupd.config.settings import request_fields
        from nbdbackupd.ops.domain import domains

        domain = domains.find(connection, args.domain, context.host.runtime_dir)
        found = configured.settings_of_domain(domain, configuration)
        settings = request_fields(found) | {"sharing": configured.sharing(found)}
        planned = prepare.plan(domain, found, context.host.now(), level)
        name, directory = domain.uuid, planned.set
    fields = {
        "level": level,
        "layout": Layout(args.type),
        "by_nbdinfo": args.extents == "nbdinfo",
        **settings,
        **making.given(args, settings),
    }
    if configuration is None or context.host.is_state_given:
        fields["sharing"] = configured.sharing_of(name, context.host)
    # the context has them where they are given
    for option, field in (("scratch_dir", "scratch_dir"), ("checkpoint_dir", "state_dir")):
        if getattr(args, option) is not None:
            fields.pop(field, None)
    shared = fields["sharing"].state_dir
    if shared is not None:
        # the base is noted where all hosts look for it
        fields["state_dir"] = shared
    return prepare.request(name, directory, context.host, fields)


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
    lines += [f"  note: {text}" for text in report.notes]
    return "\n".join(lines)
