"""``nbdbackupctl protect`` and ``nbdbackupctl unprotect``."""

from datetime import date, datetime

from nbdbackupd.app import named
from nbdbackupd.app.arguments import Arguments, Parser, add_source, moment, seconds
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.model.choice import Choice
from nbdbackupd.ops.retention import protect
from nbdbackupd.ops.retention.protect import ProtectRequest
from nbdbackupd.plain import versioned


def register(verbs: Registry) -> None:
    """Add both verbs."""
    parser = verbs.add(
        "protect",
        "Keep a point, whatever the rules of retention want. It takes "
        "no place of a rule. Done again, the new time and note hold.",
    )
    _add(parser)
    parser.add_argument(
        "--until",
        metavar="TIME",
        dest="end",
        type=_end,
        help="only until then: a day, which is counted, or a time as --at of 'restore' takes it "
        "(default: for good)",
    )
    parser.add_argument("--note", metavar="TEXT", default="", help="why, in one line")
    parser.set_defaults(run=run_protect)
    parser = verbs.add("unprotect", "Leave a protected point to the rules again.")
    _add(parser)
    parser.set_defaults(run=run_unprotect)


def _add(parser: Parser) -> None:
    add_source(parser)
    parser.add_argument(
        "--point", metavar="ID", required=True, help="the point ('latest': the newest)"
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="wait so long for the lock of the set (default: 0, exit 75 at once)",
    )


def _end(text: str) -> datetime:
    """When a protection ends; a day alone means its end."""
    try:
        return moment(f"{date.fromisoformat(text)}T23:59:59")
    except ValueError:
        return moment(text)


def run_protect(args: Arguments, context: Context) -> int:
    """Carry ``protect`` out."""
    request = _request(args, context, until=args.end, note=args.note)
    made = protect.protect(request)
    context.show(
        versioned(set=str(request.path), protection=made.to_json()),
        f"point {made.point} is protected {made.text}",
    )
    return 0


def run_unprotect(args: Arguments, context: Context) -> int:
    """Carry ``unprotect`` out."""
    request = _request(args, context)
    point = protect.unprotect(request)
    document = versioned(set=str(request.path), point=point)
    context.show(document, f"point {point} is protected no longer")
    return 0


def _request(
    args: Arguments, context: Context, until: datetime | None = None, note: str = ""
) -> ProtectRequest:
    choice = Choice(point=args.point)
    return ProtectRequest(
        path=named.set_of(args.source, context, choice),
        choice=choice,
        now=context.host.now(),
        until=until,
        note=note,
        wait=args.wait,
    )
