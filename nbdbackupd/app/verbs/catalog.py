"""``nbdbackupctl list`` and ``nbdbackupctl show``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context

DAMAGED = 40


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add both verbs."""
    parser = subparsers.add_parser(
        "list", help="list the restore points of a set",
        description="List the restore points of a backup set, oldest first.",
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help="directory of the set")
    parser.set_defaults(run=run_list)
    parser = subparsers.add_parser(
        "show", help="show all that a set says of itself",
        description="Show the metadata of each point and stream of a backup set.",
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help="directory of the set")
    parser.add_argument("--point", metavar="ID", help="only this point ('latest': the newest)")
    parser.set_defaults(run=run_show)


def run_list(args: Arguments, context: Context) -> int:
    """Carry ``list`` out; 40 if a point is damaged, the sound ones are listed all the same."""
    from nbdbackupd.ops import catalog

    report = catalog.list_points(args.source.absolute())
    context.show(report.to_json(), catalog.render_list(report))
    for problem in report.problems:
        print(f"nbdbackupctl: {problem}", file=sys.stderr)
    return DAMAGED if report.problems else 0


def run_show(args: Arguments, context: Context) -> int:
    """Carry ``show`` out."""
    from nbdbackupd.ops import catalog

    report = catalog.show(args.source.absolute(), point=args.point or "")
    context.show(report.to_json(), catalog.render_show(report))
    return 0
