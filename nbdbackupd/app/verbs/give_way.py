"""``nbdbackupctl yield``."""

import sys

from nbdbackupd import log
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config.matching import labels_of
from nbdbackupd.model.domain import parse_domain
from nbdbackupd.ops.backup import give_way
from nbdbackupd.ops.domain import configured

MAX_XML = 4 << 20
OPERATIONS = ("prepare", "restore", "migrate", "started", "reconnect", "release")
DESCRIPTION = """\
Make a backup let go of the images of a domain that is off and is to start now. The backup ends
with exit status 75; backups of a running domain go on. libvirt is not asked, so that its hook may
call this: libvirt waits for its hook.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("yield", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "--journal",
        action="store_true",
        help="tell the journal, not standard error; for libvirt's hook, whose output nobody reads",
    )
    parser.add_argument(
        "--hosts",
        metavar="OPERATION",
        choices=OPERATIONS,
        default="",
        help="tell the hosts that share the domain's checkpoint_directory instead: what libvirt's "
        "hook is called for (%(choices)s), with the domain's XML on standard input",
    )
    parser.add_argument(
        "--reason", metavar="TEXT", default="", help="with --hosts release: libvirt's word for why"
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    if args.journal:
        log.to_journal(sys.stderr)
    if args.hosts:
        print(_tell_hosts(args, context))
        return 0
    report = give_way.run(args.domain, context.host.runtime_dir)
    context.show(report.to_json(), report.message)
    return 0


def _tell_hosts(args: Arguments, context: Context) -> str:
    """By the XML alone: libvirt can't be asked while its hook is at work."""
    from nbdbackupd.config.settings import settings_for
    from nbdbackupd.ops.backup import moving

    xml = sys.stdin.read(MAX_XML)
    domain = parse_domain(xml)
    configuration = configured.read(context.host)
    settings = settings_for(domain.name, domain.uuid, labels_of(xml), configuration)
    return moving.run(args.hosts, args.reason, domain, configured.sharing(settings))
