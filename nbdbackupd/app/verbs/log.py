"""``nbdbackupctl log``."""

import argparse
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from nbdbackupd import plain
from nbdbackupd.app import signals
from nbdbackupd.app.arguments import Arguments, directory
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import Interrupted, UsageError
from nbdbackupd.ops.status import journal
from nbdbackupd.ops.status.journal import Entry, Query
from nbdbackupd.units import local_time

MAX_LINES: Final = 1_000_000
PRIORITIES: Final = ("panic", "alert", "critical", "error", "warning", "notice", "info", "debug")
DESCRIPTION = """\
Show what was logged of a domain, or of all: records of systemd's journal, or with -o the logs
that a set keeps itself. 'journalctl -x' explains events. Times are local.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("log", DESCRIPTION)
    parser.add_argument(
        "domain",
        metavar="DOMAIN",
        nargs="?",
        default="",
        help="name or UUID of the domain (default: all)",
    )
    parser.add_argument(
        "--since",
        metavar="TIME",
        default="",
        help="only from this time on, as journalctl takes it (yesterday, -2h, '2026-01-31 23:59'); "
        "with -o a date, or a date and a time",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes new")
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N",
        type=lines,
        default=1000,
        help="at most so many, the newest (default: 1000)",
    )
    parser.add_argument("--run", metavar="ID", dest="run_id", default="", help="only of this run")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=directory, help="the logs in this set's directory"
    )
    parser.set_defaults(run=run)


def lines(text: str) -> int:
    """A number of lines, for argparse."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_LINES:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {MAX_LINES}: {text!r}")
    return int(text)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    query = journal.Query(
        domain=args.domain, run=args.run_id, since=args.since, count=args.lines, follow=args.follow
    )
    with signals.listen() as cancel:
        try:
            entries = _entries(args, query, cancel)
            if args.follow:
                for entry in entries:
                    shown = json.dumps(entry.describe()) if context.json else render(entry)
                    print(plain.lines(shown), flush=True)
                return 0
            found = list(entries)
        except Interrupted:
            if args.follow:
                # that is how following ends
                return 0
            raise
    context.show(journal.to_json(found), "\n".join(render(entry) for entry in found))
    return 0


def _entries(args: Arguments, query: Query, cancel: signals.Cancel) -> Iterator[Entry]:
    if args.output is None:
        return journal.read(query, cancel.check)
    if args.domain or args.follow:
        raise UsageError("-o shows the logs of one set: it goes without DOMAIN and --follow")
    return iter(journal.read_set(args.output.absolute(), query, _moment(args.since)))


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as err:
        raise UsageError(
            f"not a time: {text!r} (with -o: 2026-01-31, '2026-01-31 23:59', or with T and zone)"
        ) from err


def render(entry: Entry) -> str:
    """One record for people; further lines of its text are indented."""
    priority = PRIORITIES[entry.priority] if 0 <= entry.priority < len(PRIORITIES) else "info"
    domain = plain.line(entry.fields.get("domain", ""))
    head = f"{local_time(entry.time)}  {priority:<8}  {domain + '  ' if domain else ''}"
    first, *more = entry.message.split("\n")
    return "\n".join([head + plain.line(first), *(f"    {plain.line(each)}" for each in more)])
