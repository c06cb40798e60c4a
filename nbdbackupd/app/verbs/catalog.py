"""``nbdbackupctl list`` and ``nbdbackupctl show``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbdbackupd import plain
from nbdbackupd.app import named, streams, tables, watching
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
    watching.add(parser)
    parser.set_defaults(run=run_list)
    parser = verbs.add(
        "show",
        "Show the metadata of each point and stream of a backup set.",
    )
    add_source(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--point", metavar="ID", help="only this point ('latest': the newest)")
    which.add_argument(
        "--tree",
        action="store_true",
        help="a time line instead: what bases on what, when it was verified, what keeps it",
    )
    parser.set_defaults(run=run_show)


def run_list(args: Arguments, context: Context) -> int:
    """Carry ``list`` out; 40 if a point is damaged, the sound ones are listed all the same."""
    if args.source is None and not args.sizes:
        raise UsageError("give SOURCE, a set or a domain, or --sizes for all domains")
    look = _sizes if args.sizes else _points
    if not watching.is_wanted(args, context):
        return _show(look(args, context), context)

    def seen() -> str:
        found = look(args, context)
        return plain.lines("\n".join([found.text, *(f"! {each}" for each in found.problems)]))

    return watching.watch(seen, args)


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at sets has found: as a document, as text, and what is wrong there."""

    document: dict[str, Any]
    text: str
    problems: Sequence[str]


def _show(found: _Look, context: Context) -> int:
    context.show(found.document, found.text)
    for problem in found.problems:
        streams.complain(problem)
    return FormatError.exit_code if found.problems else 0


def _sizes(args: Arguments, context: Context) -> _Look:
    """What sets take; points that are damaged don't count."""
    if args.source is None:
        report = sizes.of_repositories(named.repositories(context))
    else:
        domain = named.domain_of(args.source, context)
        paths = [args.source.absolute()] if domain is None else [each.path for each in domain.sets]
        report = sizes.of_sets(paths)
    free = [plain.line(str(each)) for each in report.file_systems]
    text = "\n".join([*tables.render(sizes.rows(report)), "", *free])
    return _Look(report.to_json(), text, report.problems)


def _points(
    args: Arguments,
    context: Context,
    render: Callable[[ListReport], str] = catalog.render_list,
) -> _Look:
    """The points of a set, or of all sets of a domain, with what is known of each."""
    domain = named.domain_of(args.source, context)
    paths = [args.source.absolute()] if domain is None else [each.path for each in domain.sets]
    reports = [catalog.list_points(path, proofs=True) for path in paths]
    if domain is not None:
        told = history.told(domain.sets, context.host)
        reports = [
            replace(each, retention={p.id: told[p.id] for p in each.points if p.id in told})
            for each in reports
        ]
    document = reports[0].to_json() if domain is None else _document(domain, reports)
    problems = [problem for report in reports for problem in report.problems]
    return _Look(document, "\n\n".join(map(render, reports)), problems)


def _document(domain: DomainSets, reports: Sequence[ListReport]) -> dict[str, Any]:
    return versioned(
        domain=domain.name,
        directory=str(domain.directory),
        sets=[report.to_json() for report in reports],
    )


def run_show(args: Arguments, context: Context) -> int:
    """Carry ``show`` out; with ``--tree`` 40 as ``list``, whose document it has then."""
    if args.tree:
        return _show(_points(args, context, catalog.render_tree), context)
    path = named.set_of(args.source, context, chosen(args))
    report = catalog.show(path, args.point or "")
    context.show(report.to_json(), catalog.render_show(report))
    return 0
