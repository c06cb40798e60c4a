"""``nbdbackupctl abort``."""

import os

from nbdbackupd.app.arguments import Arguments, add_machine, machine
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import DomainNotFoundError
from nbdbackupd.ops.backup import abort
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.run import metrics
from nbdbackupd.ops.status import record

DESCRIPTION = """\
End the backup job that a dead run of ours left behind, with its scratch files, and note how that
run ended. A job of another
program is named and left alone, unless --any is given.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("abort", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument("--any", action="store_true", help="also a job that is not ours")
    add_machine(parser, has_agent=True)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    # to a unit's ExecStopPost= systemd tells how the run ended
    told = [os.environ.get(each, "") for each in ("SERVICE_RESULT", "EXIT_STATUS")]
    ends = record.settle(context.host, args.domain, record.why_killed(*told))
    if ends:
        metrics.unseen(ends[-1], configured.read(context.host), context.host)
    quiet = getattr(args, "quiet", False)
    found = configured.machine_of(args.domain, context.host, machine(args))
    request = abort.AbortRequest(
        domain=args.domain,
        runtime_dir=context.host.runtime_dir,
        scratch_dir=context.host.scratch_dir,
        any=args.any,
        agent=found.agent if found is not None else None,
    )
    try:
        if found is not None:
            report = abort.run_of_qemu(request, found.monitor)
        else:
            with context.connection() as connection:
                report = abort.run(request, connection)
    except DomainNotFoundError:
        if not quiet:
            raise
        report = abort.AbortReport(domain=args.domain)
    # it is in the log, too, so that a unit's journal would have it twice
    context.show(report.to_json(), "" if quiet else report.message)
    return 0
