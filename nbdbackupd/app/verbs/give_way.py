"""``nbdbackupctl yield``."""

import argparse
import sys
from typing import Any

from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context

DESCRIPTION = """\
Make a backup let go of the images of a domain that is off and is to start now. The backup ends
with exit status 75; backups of a running domain go on. libvirt is not asked, so that its hook may
call this: libvirt waits for its hook.
"""


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "yield", help="let a domain start that is being read", description=DESCRIPTION,
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "--journal", action="store_true",
        help="tell the journal, not standard error; for libvirt's hook, whose output nobody reads",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    from nbdbackupd import log
    from nbdbackupd.ops.saving import give_way

    if args.journal:
        log.to_journal(sys.stderr)
    report = give_way.run(args.domain, context.runtime_dir.absolute())
    context.show(report.to_json(), report.message)
    return 0
