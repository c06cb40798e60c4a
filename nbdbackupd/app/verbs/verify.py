"""``nbdbackupctl verify``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from nbdbackupd.app import named, signals
from nbdbackupd.app.arguments import Arguments, positive
from nbdbackupd.app.context import Context
from nbdbackupd.app.sizes import human_size

DAMAGED = 40
DESCRIPTION = """\
Prove a backup set: manifests, parent links, presence and size of every file, each index against
its stream, the SHA-256 of every block, and that each disk is covered completely. Damage is named
by file, offset, disk and point; the exit status is then 40.
"""


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "verify", help="prove a backup set", description=DESCRIPTION,
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help=named.HELP)
    parser.add_argument("--point", metavar="ID", help="only this point and what it is made of")
    parser.add_argument(
        "-w", "--workers", metavar="N", type=positive, default=min(8, os.cpu_count() or 2),
        help="threads that hash (default: one for each processor, at most 8)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 40 if anything is damaged."""
    from nbdbackupd.ops import verify

    point = args.point or ""
    path = named.set_of(args.source, context, point=point)
    request = verify.VerifyRequest(path=path, point=point, workers=args.workers)
    with signals.listen() as cancel, context.progress() as progress:

        def show(label: str, done: int, total: int) -> None:
            progress.disk(label, done, total, done)

        report = verify.run(request, progress=show, cancelled=cancel.check)
    for warning in report.warnings:
        print(f"nbdbackupctl: warning: {warning}", file=sys.stderr)
    if not report.problems:
        checked = human_size(report.checked_bytes)
        context.show(report.to_json(), f"sound: {report.points} point(s), {checked} checked")
        return 0
    context.show(report.to_json(), "\n".join(problem.text for problem in report.problems))
    count = len(report.problems)
    print(
        f"nbdbackupctl: {path} is damaged: {count} problem{'s' * (count > 1)} found",
        file=sys.stderr,
    )
    return DAMAGED
