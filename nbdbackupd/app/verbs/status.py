"""``nbdbackupctl status``: how well the domains of this host are protected."""

import os
import sys

from nbdbackupd import plain
from nbdbackupd.app import tables, watching
from nbdbackupd.app.arguments import Arguments, duration
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config.settings import global_settings
from nbdbackupd.errors import WARNED, ConfigError, NbdbackupError, UsageError, one_line
from nbdbackupd.model.health import Health
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.status import gather, metrics, status
from nbdbackupd.ops.status.status import StatusReport
from nbdbackupd.units import human_size

UNKNOWN = 3
DESCRIPTION = """\
Show the newest restore point of each domain, its next run, and what is wrong. Domains are those
that libvirt, the configuration, the repositories and the timers know. Ages that are too high are
told by the section monitoring of the configuration.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("status", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", nargs="*", help="only these (default: all)")
    parser.add_argument(
        "--nagios",
        action="store_true",
        help="print one line with performance data; exit with 0, 1, 2 or 3 as Nagios' plugins do",
    )
    parser.add_argument(
        "--warning",
        metavar="AGE",
        type=duration,
        help="warn if the newest point is older (default: monitoring.warning_age)",
    )
    parser.add_argument(
        "--critical",
        metavar="AGE",
        type=duration,
        help="and call it critical if it is older than this (default: monitoring.critical_age)",
    )
    parser.add_argument(
        "--metrics",
        action="store_true",
        help="also write the host's metrics into monitoring.metrics_directory",
    )
    watching.add(parser)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 if a domain is not well, but for ``--watch``."""
    if watching.is_wanted(args, context):
        if args.nagios or args.metrics:
            raise UsageError("--watch goes neither with --nagios nor with --metrics")
        return watching.watch(lambda: render(_gather(args, context)), args)
    if not args.nagios:
        return _show(args, context)
    if context.json:
        raise UsageError("--nagios and --json exclude one another")

    try:
        report = _gather(args, context)
        if args.metrics:
            _write_metrics(report, args, context)
    except NbdbackupError as err:
        message = one_line(err).replace("|", "?")
        print(f"NBDBACKUP UNKNOWN - {plain.line(message)}")
        return UNKNOWN
    line, code = status.nagios(report)
    print(line)
    return code


def _gather(args: Arguments, context: Context) -> StatusReport:
    return gather.gather(args.domain, context.host, warning=args.warning, critical=args.critical)


def _show(args: Arguments, context: Context) -> int:
    report = _gather(args, context)
    if args.metrics:
        _write_metrics(report, args, context)
    context.show(report.to_json(), render(report), painted=True)
    return 0 if report.health is Health.OK else WARNED


def render(report: StatusReport) -> str:
    """A table, below it what is wrong with each domain, and what could not be asked."""
    coloured = tables.wants_colour(sys.stdout, os.environ)
    lines = []
    if report.domains:
        lines += tables.render(status.rows(report.domains, report.moment), coloured=coloured)
    else:
        lines.append("no domains: libvirt, configuration and repository know none")
    if report.file_systems:
        lines += ["", *(plain.line(str(each)) for each in report.file_systems)]
    said = []
    for each in report.domains:
        name = plain.line(each.name)
        said += [f"{name}: {plain.line(reason)}" for reason in each.verdict.reasons]
        said += [f"{name}: running, {plain.line(run.text)}" for run in each.runs]
        if each.unwanted.points:
            size = human_size(each.unwanted.size)
            said.append(
                f"{name}: {each.unwanted.points} points are wanted by no rule of retention, "
                f"{size}: 'nbdbackupctl prune' removes them"
            )
        if each.busy and not each.runs:
            said.append(f"{name}: in progress, {plain.line(each.busy)}")
    lines += ["", *said] if said else []
    lines += ["", *map(plain.line, report.notes)] if report.notes else []
    return "\n".join(lines)


def _write_metrics(report: StatusReport, args: Arguments, context: Context) -> None:
    if args.domain:
        raise UsageError("--metrics is about all domains: give none")
    directory = global_settings(configured.read(context.host)).monitoring_metrics_directory
    if directory is None:
        raise ConfigError("no directory for metrics: set monitoring.metrics_directory")
    metrics.record_host(
        directory,
        domains=len(report.domains),
        unprotected=sum(not each.is_covered for each in report.domains),
        moment=report.moment,
    )
    metrics.record_repositories(directory, report.file_systems)
    for each in report.domains:
        if each.stored.set:
            metrics.record_sets(directory, each.name, each.stored.all)
    if report.inventory is not None:
        metrics.forget_others(directory, report.inventory)
