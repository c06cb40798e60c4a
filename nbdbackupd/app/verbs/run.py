"""``nbdbackupctl run``."""

import os
from contextlib import ExitStack

from nbdbackupd import log as runlog
from nbdbackupd.app import held, signals
from nbdbackupd.app.arguments import Arguments, seconds
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry, backup
from nbdbackupd.ops.run import runner
from nbdbackupd.ops.run.request import Observer, RunReport, RunRequest
from nbdbackupd.ops.status import record as run_record
from nbdbackupd.systemd import notify

DESCRIPTION = """\
Save a domain as the configuration says: into the set whose turn it is, within the limit of
concurrent runs, with the programs before and after. This is what nbdbackup@DOMAIN.service does.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("run", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "--shutdown",
        action="store_true",
        help="the guest has just ended: save what it left, if on_shutdown is configured, and "
        "nothing else has to be done first",
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--retry",
        action="store_true",
        help="where another run or the start of the guest comes first, try again after 5, 15 and "
        "45 minutes before giving up",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        help="wait so long for a place among the concurrent runs (default: a day), and for the "
        "lock of the set or domain (default: limits.wait)",
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 with warnings."""
    request = RunRequest(
        domain=args.domain,
        shutdown=args.shutdown,
        dry_run=args.dry_run,
        wait=args.wait,
        retry=args.retry,
    )
    with ExitStack() as stack:
        record = run_record.RunRecord(context.host)
        if not args.dry_run:
            record = stack.enter_context(run_record.begun(args.domain, context.host))
            held.hold()
        beat = notify.Pulse(os.environ, tell=record.doing)
        cancel = stack.enter_context(signals.listen())
        progress = stack.enter_context(context.progress())

        def cancelled() -> None:
            beat.alive()
            cancel.check()

        def moved(disk: str, position: int, size: int, data: int) -> None:
            beat.progress(disk, position, size, data)
            progress.disk(disk, position, size, data)

        def anew() -> None:
            cancel.try_again()
            runlog.begin_anew()

        observer = Observer(
            progress=moved, cancelled=cancelled, doing=beat.status, alive=beat.alive, anew=anew
        )
        report = runner.run(request, context.host, observer, record)
        text = render(report)
        beat.status(text.partition("\n")[0])
    context.show(report.to_json(), text, is_logged=report.result == "skipped")
    return report.exit_code


def render(report: RunReport) -> str:
    """The report for people."""
    if report.result == "planned":
        return f"would save {report.domain} into {report.set}, {report.level}: {report.reason}"
    if report.backup is None or report.backup.point is None:
        return f"nothing saved of {report.domain}: {report.reason}"
    why = "" if report.reason in report.problems else f": {report.reason}"
    lines = [backup.render(report.backup), f"  into {report.set}{why}"]
    return "\n".join([*lines, *(f"  warning: {each}" for each in report.problems)])
