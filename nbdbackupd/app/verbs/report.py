"""``nbdbackupctl report``: what was saved, how it is, and what it takes, for people."""

import os
import sys
from pathlib import Path
from typing import Final

from nbdbackupd import durable, plain
from nbdbackupd.app import tables
from nbdbackupd.app.arguments import Arguments, duration
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config.settings import global_settings
from nbdbackupd.errors import WARNED, ConfigError
from nbdbackupd.model.health import Health
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.notify import notification
from nbdbackupd.ops.notify.notification import Text
from nbdbackupd.ops.report import report
from nbdbackupd.ops.report.report import Report

DAYS: Final = 30 * 86400.0
MODE: Final = 0o600
"""Names and sizes are nobody else's business; who wants to publish a page copies it."""

DESCRIPTION = """\
Tell of the last days in one picture: how each domain is, what its points have added, what all of
them take, and what retention will remove. As text, as a page of HTML that needs nothing else, or by
mail. What can't be told from the sets that are there, such as points that have left, is not in it.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("report", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", nargs="*", help="only these (default: all)")
    parser.add_argument(
        "--since",
        metavar="AGE",
        type=duration,
        default=DAYS,
        help="tell of the days since then (default: 30d)",
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page of HTML there")
    parser.add_argument(
        "--mail",
        action="store_true",
        help="send it, with the page, to those that notification.mail of the configuration names",
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 if a domain is not well, unless it was mailed."""
    found = report.build(context.host, args.since, args.domain)
    if args.html is not None:
        text = report.html(found).encode()
        with durable.translate_os_errors("write", args.html):
            durable.write_atomic(args.html.absolute(), text, MODE)
    if args.mail:
        _mail(found, context)
        context.show(found.to_json(), f"sent: {plain.line(found.subject)}")
        return 0
    context.show(found.to_json(), render(found, coloured=_coloured()), painted=True)
    return 0 if found.status.health is Health.OK else WARNED


def _coloured() -> bool:
    return tables.wants_colour(sys.stdout, os.environ)


def render(found: Report, *, coloured: bool = False) -> str:
    """For a terminal, or the text of a mail."""
    lines = [report.summary(found), ""]
    if found.domains:
        lines += tables.render(report.rows(found), coloured=coloured)
    else:
        lines.append("no domains: libvirt, configuration and repository know none")
    wrong = [plain.line(f"{name}: {reason}") for name, reason in report.problems(found)]
    lines += ["", *wrong] if wrong else []
    spaces = [plain.line(str(each)) for each in found.status.file_systems]
    lines += ["", *spaces] if spaces else []
    lines += ["", *map(plain.line, found.status.notes)] if found.status.notes else []
    return "\n".join(lines)


def _mail(found: Report, context: Context) -> None:
    addresses = global_settings(configured.read(context.host)).notification_mail
    if not addresses:
        raise ConfigError("nobody to mail to: set notification.mail")
    text = Text(subject=plain.line(found.subject), body=render(found) + "\n")
    notification.send_mail(text, addresses, found.status.moment, html=report.html(found))
