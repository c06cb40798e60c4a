"""``restore``: options that say where disks go and how, and the question before they overwrite."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbdbackupd.app import asking
from nbdbackupd.app.arguments import Arguments, names, positive, rate
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import missing
from nbdbackupd.errors import UsageError
from nbdbackupd.model.host import new_run_id
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.restore.plan import Placement
from nbdbackupd.ops.restore.request import OutputPlace, Style


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "-d", "--disk", metavar="DISKS", type=_disks, action="append", default=[],
        help="only these disks (vda,vdb); vda=PATH also says where to: an image or a block "
        "device, which is overwritten; may be repeated",
    )  # fmt: skip
    group = parser.add_argument_group("other places than a directory")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--in-place", action="store_true",
        help="onto the images of the domain itself, which is off",
    )  # fmt: skip
    where.add_argument(
        "--pool", metavar="NAME", help="as new volumes of this storage pool of libvirt"
    )
    group.add_argument(
        "--yes", action="store_true", help="don't ask before images or devices are overwritten"
    )
    group = parser.add_argument_group("several points in one restore")
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--as-chain", action="store_true",
        help="a qcow2 image for each point, on that of the point before",
    )  # fmt: skip
    how.add_argument(
        "--as-snapshots", action="store_true",
        help="one qcow2 image with an internal snapshot for each point",
    )  # fmt: skip
    group.add_argument(
        "--since", metavar="ID", default="", help="the oldest of them (default: the full)"
    )
    group = parser.add_argument_group("speed")
    group.add_argument(
        "-j", "--jobs", metavar="N", type=positive, default=2,
        help="disks that are written at a time (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--bandwidth-limit", metavar="RATE", type=rate, default=0,
        help="write at most so many bytes per second (100M)",
    )  # fmt: skip


def _disks(text: str) -> tuple[tuple[str, Path | None], ...]:
    """``vda,vdb``, or ``vda=PATH``, in which a comma is part of the path."""
    target, equals, path = text.partition("=")
    if not equals:
        return tuple((name, None) for name in names(text))
    if not target.strip() or "," in target or not path:
        raise argparse.ArgumentTypeError(f"not DISK=PATH: {text!r}")
    return ((target.strip(), Path(path).absolute()),)


def request_fields(args: Arguments) -> dict[str, Any]:
    """What the options mean, as members of the request. Raises UsageError."""
    given = [each for part in args.disk for each in part]
    placed = [target for target, path in given if path is not None]
    if len(set(placed)) < len(placed):
        raise UsageError("a disk can be given one place only")
    if placed and (args.in_place or args.pool):
        raise UsageError("a disk has its place with --in-place or --pool: don't give it another")
    if args.compress and (args.in_place or args.pool):
        raise UsageError("--compress makes images in a directory: give -o")
    style = Style.PLAIN
    if args.as_chain or args.as_snapshots:
        style = Style.CHAIN if args.as_chain else Style.SNAPSHOTS
        if args.in_place or args.pool:
            raise UsageError("--as-chain and --as-snapshots make images in a directory: give -o")
    elif args.since:
        raise UsageError("--since goes with --as-chain or --as-snapshots")
    return {
        "disks": tuple(target for target, path in given if path is None),
        "places": tuple(OutputPlace(target, path) for target, path in given if path is not None),
        "style": style,
        "since": args.since,
        "jobs": args.jobs,
        "bandwidth": args.bandwidth_limit,
    }


@contextmanager
def placement(
    args: Arguments, context: Context, cancelled: Callable[[], None]
) -> Iterator[Placement | None]:
    """What chooses places that libvirt knows, with its connection; None if none is asked for.

    Raises UsageError, DomainError.
    """
    if not args.in_place and not args.pool:
        yield None
        return
    if args.sequence:
        raise UsageError("stream files by hand have no domain: give -o, or -d DISK=PATH")
    try:
        from nbdbackupd.ops.restore import in_place, pool
    except ImportError as err:
        raise missing(err) from err
    with context.connection() as connection:
        if args.pool:
            yield pool.PoolPlacement(connection, args.pool)
            return
        yield in_place.InPlace(
            connection,
            runtime_dir=context.host.runtime_dir,
            run_id=new_run_id(context.host.now()),
            force=args.force,
            cancelled=cancelled,
            sharing=lambda domain: configured.sharing_of(domain, context.host),
        )


def confirm(args: Arguments, cancelled: Callable[[], None]) -> Callable[[tuple[str, ...]], None]:
    """What asks before things are overwritten. It raises UsageError without a yes."""

    def ask(lost: tuple[str, ...]) -> None:
        if args.yes:
            return
        if not asking.has_person():
            raise UsageError(
                f"{' and '.join(lost)} would be overwritten: give --yes if that is meant"
            )
        refused = "nothing was overwritten: the answer was not 'yes'"
        asking.ask("This will be overwritten", lost, refused, cancelled)

    return ask
