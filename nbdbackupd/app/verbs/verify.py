"""``nbdbackupctl verify``."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdbackupd import log as runlog
from nbdbackupd import plain
from nbdbackupd.app import named, signals, streams
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    add_source,
    add_workers,
    chosen,
    duration,
    size,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry, verify_boot, verify_by_age
from nbdbackupd.errors import WARNED, FormatError, UsageError
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.verify import VerifyReport
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size

if TYPE_CHECKING:
    from nbdbackupd.ops.boot.boot_test import BootTestReport

log = logging.getLogger(__name__)
DESCRIPTION = """\
Prove a backup set: manifests, parent links, presence and size of every file, each index against
its stream, the SHA-256 of every block, and that each disk is covered completely. Damage is named
by file, offset, disk and point; the exit status is then 40. What was found is noted in the set,
below verified/, and no backup goes on from a base that is known to be damaged.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("verify", DESCRIPTION)
    add_source(parser, optional=True)
    parser.add_argument("--point", metavar="ID", help="only this point and what it is made of")
    parser.add_argument(
        "--accept",
        action="store_true",
        help="if all is sound, trust manifests that were changed since this host wrote them: after "
        "a merge or prune by a host with another state directory",
    )
    age = parser.add_argument_group("by age: points that wait longest first, of all of its sets")
    age.add_argument(
        "--all", action="store_true", help="of all domains in the configured repositories"
    )
    age.add_argument(
        "--older-than",
        metavar="AGE",
        type=duration,
        help="only points that were not verified for so long, or never (30d)",
    )
    age.add_argument(
        "--limit", metavar="SIZE", type=size, help="no more than so much, but one point at least"
    )
    add_workers(parser, "hash")
    add_checkpoint_dir(parser)
    verify_boot.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 40 if anything is damaged, or a guest did not come up, 3 for warnings."""
    verify_boot.check(args)
    by_age = args.all or args.older_than is not None or args.limit is not None
    if args.accept and (by_age or args.boot_only):
        raise UsageError("--accept goes with a whole verification of SOURCE: leave out the rest")
    if by_age:
        return verify_by_age.run(args, context)
    if args.source is None:
        raise UsageError("give SOURCE: a set or a domain, or --all")
    path = named.set_of(args.source, context, chosen(args))
    document = versioned()
    text, warned = "", False
    with signals.listen() as cancel:
        if not args.boot_only:
            report = _prove(args, context, path, cancel)
            warned = bool(report.warnings)
            document |= report.to_json()
            if report.problems:
                code = _tell_damage(report, context, _document(document, None), path)
                verify_by_age.record(context, args.source, [path])
                return code
            verify_by_age.record(context, args.source, [path])
            checked = human_size(report.checked_bytes)
            text = f"sound: {report.points} point(s), {checked} checked"
            if report.accepted:
                text += f"\nnow trusted as they are: {', '.join(report.accepted)}"
        booted = verify_boot.run(args, context, path, cancel) if args.boot else None
    if booted is None:
        context.show(_document(document, None), text)
        return WARNED if warned else 0
    lines = [text] if text else []
    context.show(_document(document, booted), "\n".join([*lines, verify_boot.render(booted)]))
    if not booted.test.passed:
        return FormatError.exit_code
    return WARNED if booted.warnings or warned else 0


def _document(proof: dict[str, Any], booted: "BootTestReport | None") -> dict[str, Any]:
    return {**proof, "boot": booted.to_json() if booted is not None else None}


def _prove(args: Arguments, context: Context, path: Path, cancel: signals.Cancel) -> VerifyReport:
    request = verify.VerifyRequest(
        path=path,
        point=args.point or "",
        workers=args.workers,
        state_dirs=configured.state_directories(context.host),
        accept=args.accept,
        clock=context.host.now,
    )
    with context.progress() as progress:

        def show(label: str, done: int, total: int) -> None:
            progress.disk(label, done, total, done)

        report = verify.run(request, progress=show, cancelled=cancel.check)
    streams.warn(report.warnings)
    if report.unnoted:
        log.log(runlog.NOTICE, "what was found is not noted: %s", report.unnoted)
    return report


def _tell_damage(
    report: VerifyReport, context: Context, document: dict[str, Any], path: Path
) -> int:
    context.show(document, "\n".join(plain.line(problem.text) for problem in report.problems))
    count = len(report.problems)
    streams.complain(f"{path} is damaged: {count} problem{'s' * (count > 1)} found")
    return FormatError.exit_code
