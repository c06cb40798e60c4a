"""``nbdbackupctl list`` and ``nbdbackupctl show``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nbdbackupd import plain
from nbdbackupd.app import named, streams, tables
from nbdbackupd.app.arguments import Arguments, add_source, chosen
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import FormatError, UsageError
from nbdbackupd.ops.retention import history
from nbdbackupd.ops.sets import catalog, sizes
from nbdbackupd.ops.sets.catalog import ListReport
from nbdbackupd.ops.sets.lookup import DomainSets
from nbdbackupd.plain import versioned


def register(verbs: Registry) -> None:
    """Add both verbs."""
    parser = verbs.add(
        "list",
        "List the restore points of a backup set, oldest first; of a domain, all sets.",
    )
    add_source(parser, optional=True)
    parser.add_argument(
        "--sizes",
        action="store_true",
        help="what each set takes, or without SOURCE each domain of the repositories, and what is "
        "free",
    )
    parser.set_defaults(run=run_list)
    parser = verbs.add(
        "show",
        "Show the metadata of each point and stream of a backup set.",
    )
    add_source(parser)
    parser.add_argument("--point", metavar="ID", help="only this point ('latest': the newest)")
    parser.set_defaults(run=run_show)


def run_list(args: Arguments, context: Context) -> int:
    """Carry ``list`` out; 40 if a point is damaged, the sound ones are listed all the same."""
    if args.sizes:
        return _list_sizes(args, context)
    if args.source is None:
        raise UsageError("give SOURCE, a set or a domain, or --sizes for all domains")
    domain = named.domain_of(args.source, context)
    paths = [args.source.absolute()] if domain is None else [each.path for each in domain.sets]
    reports = [catalog.list_points(path) for path in paths]
    if domain is not None:
        told = history.told(domain.sets, context.host)
        reports = [
            replace(each, retention={p.id: told[p.id] for p in each.points if p.id in told})
            for each in reports
        ]
    document = reports[0].to_json() if domain is None else _document(domain, reports)
    context.show(document, "\n\n".join(map(catalog.render_list, reports)))
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems:
        streams.complain(problem)
    return FormatError.exit_code if problems else 0


def _list_sizes(args: Arguments, context: Context) -> int:
    """Carry ``list --sizes`` out; 40 if points are damaged, which don't count."""
    if args.source is None:
        report = sizes.of_repositories(named.repositories(context))
    else:
        domain = named.domain_of(args.source, context)
        paths = [args.source.absolute()] if domain is None else [each.path for each in domain.sets]
        report = sizes.of_sets(paths)
    free = [plain.line(str(each)) for each in report.file_systems]
    context.show(report.to_json(), "\n".join([*tables.render(sizes.rows(report)), "", *free]))
    for problem in report.problems:
        streams.complain(problem)
    return FormatError.exit_code if report.problems else 0


def _document(domain: DomainSets, reports: Sequence[ListReport]) -> dict[str, Any]:
    return versioned(
        domain=domain.name,
        directory=str(domain.directory),
        sets=[report.to_json() for report in reports],
    )


def run_show(args: Arguments, context: Context) -> int:
    """Carry ``show`` out."""
    path = named.set_of(args.source, context, chosen(args))
    report = catalog.show(path, args.point or "")
    context.show(report.to_json(), catalog.render_show(report))
    return 0
