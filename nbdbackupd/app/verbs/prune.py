"""``nbdbackupctl prune``."""

import os
import sys
from pathlib import Path
from typing import Any

from nbdbackupd import plain
from nbdbackupd.app import named, signals, streams, tables
from nbdbackupd.app.arguments import Arguments, add_checkpoint_dir, add_source, seconds
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED, NbdbackupError, UsageError
from nbdbackupd.ops.retention import prune, scope
from nbdbackupd.ops.retention.history import Verdict
from nbdbackupd.ops.retention.prune import PruneReport
from nbdbackupd.ops.sets import lookup
from nbdbackupd.ops.sets.lookup import DomainSets
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size, local_time

DESCRIPTION = """\
Remove the restore points that no rule of the section retention of nbdbackup.yaml(5) wants. All
sets of a domain are one history; what others still need is merged into them, or stays. Of a set
that is given by its path, points of that set alone.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("prune", DESCRIPTION)
    add_source(parser, optional=True)
    parser.add_argument("--all", action="store_true", help="each domain of the repository")
    parser.add_argument(
        "--scheduled",
        action="store_true",
        help="as the timer does: each domain that was saved under this name; none is no error",
    )
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="only show each point, and what keeps it"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also if more than half of a domain's points go at once",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="wait so long for the locks of the domain and its sets (default: 0, exit 75 at once)",
    )
    add_checkpoint_dir(parser)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 with warnings, and of all domains the status of the first that failed.

    Raises UsageError without a SOURCE, and with one beside ``--all``.
    """
    if args.all == (args.source is not None):
        raise UsageError("give the name of a domain, the path of a set, or --all")
    if args.scheduled and (args.all or os.sep in str(args.source)):
        raise UsageError("--scheduled takes the name of a domain")
    if args.all or args.scheduled:
        return _each(args, context)
    report = _one(args.source, named.domain_of(args.source, context), args, context)
    context.show(report.to_json(), render(report))
    return WARNED if report.warnings else 0


def _each(args: Arguments, context: Context) -> int:
    documents: list[dict[str, Any]] = []
    texts: list[str] = []
    codes: list[int] = []

    def tell(err: NbdbackupError) -> None:
        streams.complain(" ".join(str(err).split()))
        codes.append(err.exit_code)

    if args.all:
        domains = lookup.every(named.repositories(context), tell=tell)
    else:
        domains = named.domains_of(str(args.source), context)
    for domain in domains:
        try:
            report = _one(domain.directory, domain, args, context)
        except NbdbackupError as err:
            tell(err)
            continue
        codes += [WARNED] * bool(report.warnings)
        documents.append(report.to_json())
        texts.append(render(report))
    context.show(versioned(domains=documents), "\n\n".join(texts) or "nothing was removed")
    return next((code for code in codes if code != WARNED), WARNED if codes else 0)


def _one(path: Path, domain: DomainSets | None, args: Arguments, context: Context) -> PruneReport:
    with signals.listen() as cancel, context.progress() as progress:

        def show(disk: str, position: int, size: int) -> None:
            progress.disk(disk, position, size, position)

        request = scope.request(
            path, domain, context.host, dry_run=args.dry_run, force=args.force, wait=args.wait
        )
        report = prune.prune(request, progress=show, cancelled=cancel.check)
    for warning in report.warnings:
        print(f"nbdbackupctl: warning: {plain.line(warning)}", file=sys.stderr)
    return report


def render(report: PruneReport) -> str:
    """A line for each point, then what was done; of a prune only what went."""
    shown = [each for each in report.verdicts if report.dry_run or each.fate != "kept"]
    lines = []
    if shown:
        rows = [("POINT", "LEVEL", "CREATED", "STORED", "FATE", "WHY")]
        lines = [*tables.render(rows + [_row(each) for each in shown]), ""]
    kept = len(report.verdicts) - report.gone
    went = "would go" if report.dry_run else "went"
    freed = human_size(report.freed_bytes)
    if report.problem:
        lines.append(f"nothing is removed of {report.domain}: {report.problem}")
    else:
        lines.append(f"{report.domain}: {report.gone} points {went}, {kept} stay, {freed} freed")
    return "\n".join(lines)


def _row(each: Verdict) -> tuple[str, ...]:
    fate = f"merged into {each.into}" if each.into else each.fate
    when = local_time(each.point.created)
    reasons = ", ".join(each.reasons)
    return (each.point.id, each.point.level.value, when, human_size(each.bytes), fate, reasons)
