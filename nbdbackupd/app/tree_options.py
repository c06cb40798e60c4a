"""Options of the verbs that read files of a point: which set, point, disk, file system."""

import logging
from collections.abc import Iterable
from typing import Final

from nbdbackupd import log as runlog
from nbdbackupd.app import named, tables
from nbdbackupd.app.arguments import Arguments, Parser, add_point, chosen, names
from nbdbackupd.app.context import Context
from nbdbackupd.model.file_systems import FileSystem
from nbdbackupd.ops.files.mount import MountRequest
from nbdbackupd.ops.files.readers import KERNEL
from nbdbackupd.ops.map.map import MapRequest
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size

log = logging.getLogger(__name__)

TOOLS: Final = ("fuse2fs", "grub-mount", "guestmount")


def add(parser: Parser) -> None:
    """Add the options."""
    parser.takes_any_order = True
    parser.add_argument(
        "-d", "--disk", metavar="DISKS", type=names, default=(), help="only this disk (vda)"
    )
    add_point(parser)
    parser.add_argument(
        "-p",
        "--partition",
        metavar="N",
        default="",
        help="number of the partition, or logical volume as GROUP/NAME (default: the only one)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--tool", choices=TOOLS, default="", help="the program that reads the file system"
    )
    how.add_argument(
        "--kernel",
        action="store_true",
        help="let this host's kernel read the file system: only one that you trust",
    )
    parser.add_argument(
        "--replay",
        action="store_true",
        help="replay the file system's journal first, on a copy that is thrown away",
    )


def request(args: Arguments, context: Context) -> MountRequest:
    """What the options ask for. Raises as ``named.set_of``."""
    choice = chosen(args)
    return MountRequest(
        map=MapRequest(
            runtime_dir=context.host.runtime_dir,
            source=named.set_of(args.source, context, choice),
            disks=args.disk,
            choice=choice,
        ),
        partition=args.partition,
        tool=KERNEL if args.kernel else args.tool,
        replay=args.replay,
    )


def warn(warnings: Iterable[str], notes: Iterable[str] = ()) -> None:
    """Tell of what is not as it should be, and of what a reader can't do."""
    for text in warnings:
        log.warning("%s", text)
    for text in notes:
        log.log(runlog.NOTICE, "%s", text)


def show_file_systems(found: Iterable[FileSystem], context: Context) -> None:
    """Print what there is on the disks."""
    known = list(found)
    document = versioned(file_systems=[each.to_json() for each in known])
    rows = [("DISK", "PARTITION", "TYPE", "SIZE", "LABEL")]
    rows += [
        (
            each.disk,
            each.volume or str(each.partition or "-"),
            each.type or "-",
            human_size(each.size),
            each.label or each.name,
        )
        for each in known
    ]
    context.show(document, "\n".join(tables.render(rows)))
