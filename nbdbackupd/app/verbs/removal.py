"""``nbdbackupctl merge`` and ``nbdbackupctl remove``."""

from collections.abc import Callable

from nbdbackupd import __version__
from nbdbackupd.app import named, signals
from nbdbackupd.app.arguments import (
    Arguments,
    Parser,
    add_checkpoint_dir,
    add_source,
    rate,
    seconds,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.removal import by_hand
from nbdbackupd.ops.removal.apply import RemovalReport, RemovalRequest
from nbdbackupd.ops.removal.by_hand import HandRequest
from nbdbackupd.units import human_size, human_time

MERGE = """\
Make one full of a restore point and all that it hangs on: these leave the set, and the point
restores to the same bytes as before, as do all after it. Blocks are copied as they are stored, each
proven by its SHA-256; the set needs room for the new full until the old files go. If it ends early
the set is what it was. What is being read by a restore, map, mount or boot goes later: exit 3.
"""
REMOVE = """\
Remove restore points on which no other hangs: copies, differentials, the newest of a set that runs
go on with no more, or all of its points and so the set. What others need is refused, with what
keeping that would take.
"""


def register(verbs: Registry) -> None:
    """Add both verbs."""
    parser = verbs.add("merge", MERGE)
    add_source(parser)
    parser.add_argument(
        "--point", metavar="ID", dest="points", nargs=1, required=True,
        help="the point that becomes a full",
    )  # fmt: skip
    parser.add_argument(
        "--bandwidth-limit", metavar="RATE", type=rate, default=0,
        help="read at most so many bytes per second (100M)",
    )  # fmt: skip
    _add(parser)
    parser.set_defaults(run=lambda args, context: _run(args, context, by_hand.merge))
    parser = verbs.add("remove", REMOVE)
    add_source(parser)
    parser.add_argument(
        "--point", metavar="ID", dest="points", action="append", required=True,
        help="a point; may be given more than once",
    )  # fmt: skip
    _add(parser)
    parser.set_defaults(
        run=lambda args, context: _run(args, context, by_hand.remove), bandwidth_limit=0
    )


def _add(parser: Parser) -> None:
    parser.add_argument(
        "--wait", metavar="SECONDS", type=seconds, default=0.0,
        help="wait so long for the locks of domain and set (default: 0, exit 75 at once)",
    )  # fmt: skip
    add_checkpoint_dir(parser)


def _run(args: Arguments, context: Context, act: Callable[..., RemovalReport]) -> int:
    """Carry a verb out; 3 if old files are still there."""
    path = named.set_of(args.source, context, Choice(point=args.points[0]))
    request = HandRequest(
        path=path,
        points=tuple(args.points),
        runtime_dir=context.host.runtime_dir,
        now=context.host.now(),
        removal=RemovalRequest(
            program=f"nbdbackupd {__version__}",
            state_dirs=configured.state_directories(context.host),
            bandwidth=args.bandwidth_limit or None,
        ),
        wait=args.wait,
    )
    with signals.listen() as cancel, context.progress() as progress:
        report = act(request, progress=progress.part, cancelled=cancel.check)
    context.show(report.to_json(), render(report))
    return WARNED if report.pending else 0


def render(report: RemovalReport) -> str:
    """The report for people."""
    lines = [
        f"{_points(len(each.absorbed))} became a part of {each.into}" for each in report.merges
    ]
    if report.dropped:
        lines.append(f"removed {_points(len(report.dropped))}")
    if report.is_gone:
        lines.append("the set held no other, and is gone")
    lines.append(f"{human_size(report.freed_bytes)} more are free ({human_time(report.seconds)})")
    if report.pending:
        lines.append(f"! old files are removed by the next run or removal: {report.pending}")
    return "\n".join(lines)


def _points(count: int) -> str:
    return f"{count} restore point{'s' * (count != 1)}"
