"""``verify --older-than``, ``--limit`` and ``--all``."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from nbdbackupd import plain
from nbdbackupd.app import named, signals, streams
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.errors import WARNED, ConfigError, FormatError, UsageError
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.sets import lookup
from nbdbackupd.ops.sets.sets import sets_of
from nbdbackupd.ops.verify import by_age
from nbdbackupd.units import human_size


def run(args: Arguments, context: Context) -> int:
    """Carry it out; 40 if anything is damaged, 3 for warnings."""
    if args.all == (args.source is not None):
        raise UsageError("give SOURCE, or --all")
    if args.point or args.boot:
        raise UsageError("--all, --older-than and --limit exclude --point and --boot")
    paths, absent = _paths(args, context)
    request = by_age.AgedRequest(
        paths=paths,
        clock=context.host.now,
        older_than=args.older_than or 0.0,
        limit=args.limit,
        workers=args.workers,
        state_dirs=configured.state_directories(context.host),
    )
    with signals.listen() as cancel, context.progress() as progress:

        def show(label: str, done: int, total: int) -> None:
            progress.disk(label, done, total, done)

        report = by_age.run(request, progress=show, cancelled=cancel.check)
    record(context, args.source, paths)
    warnings = (*absent, *report.warnings)
    streams.warn(warnings)
    context.show(report.to_json(), render(report))
    if report.problems:
        count = len(report.problems)
        streams.complain(f"damage was found: {count} problem{'s' * (count > 1)}")
        return FormatError.exit_code
    return WARNED if warnings else 0


def render(report: by_age.AgedReport) -> str:
    """What is wrong, or how much is sound; and what is left for the next time."""
    lines = [plain.line(each) for each in report.problems]
    checked = f"{report.points} point(s), {human_size(report.checked_bytes)} checked"
    lines.append(f"{'damaged' if report.problems else 'sound'}: {checked}")
    if report.left:
        size = human_size(report.left_bytes)
        lines.append(f"beyond the limit, for the next time: {report.left} point(s), {size}")
    return "\n".join(lines)


def record(context: Context, source: Path | None, paths: Iterable[Path]) -> None:
    """Write the metrics of the domains of these sets, if that is configured.

    A set that was named by its path may be of any host: it has none.
    """
    if source is not None and (os.path.lexists(source) or os.sep in str(source)):
        return
    from nbdbackupd.config.settings import global_settings
    from nbdbackupd.ops.run import metrics

    with suppress(ConfigError):
        directory = global_settings(configured.read(context.host)).monitoring_metrics_directory
        if directory is None:
            return
        for home in dict.fromkeys(path.parent for path in paths):
            points = [point for each in sets_of(home) for point in each.known.points]
            if points:
                domain = max(points, key=lambda each: each.created).domain
                metrics.record_sets(directory, domain, home)


def _paths(args: Arguments, context: Context) -> tuple[tuple[Path, ...], list[str]]:
    """The sets, and a line for each repository that is not there."""
    if args.all:
        places = named.repositories(context)
        absent = [f"there is no repository {each}" for each in places if not each.is_dir()]
        return lookup.every_set(places), absent
    domain = named.domain_of(args.source, context)
    if domain is None:
        return (args.source.absolute(),), []
    return tuple(each.path for each in domain.sets if each.known.points or each.problems), []
