"""``nbdbackupctl import``."""

import argparse
from pathlib import Path
from uuid import UUID

from nbdbackupd import plain
from nbdbackupd.app import signals
from nbdbackupd.app.arguments import Arguments, directory
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED
from nbdbackupd.model.host import new_run_id
from nbdbackupd.ops.sets import import_set

DESCRIPTION = """\
Make a set that virtnbdbackup wrote one of ours: each block gets a SHA-256, each restore point a
manifest, so that it is verified, mapped and continued as ours are. The streams stay as they are.
Without -o this happens where the set lies. A set of qmpbackup is written anew, into -o, and needs
--name. If it ends early the set is what it was.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("import", DESCRIPTION)
    parser.add_argument(
        "source",
        metavar="SET",
        type=Path,
        help="directory that virtnbdbackup or qmpbackup wrote, or the former's zip archive",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=directory,
        help="leave SET alone and put a copy in this new directory",
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="with -o: hard links instead of copies, on the same file system",
    )
    parser.add_argument(
        "--sound",
        action="store_true",
        help="with -o: leave out what is damaged, or hangs on what is missing",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        default="",
        help="of a set of qmpbackup: the name that 'backup --qmp' will be given",
    )
    parser.add_argument(
        "--uuid",
        metavar="UUID",
        type=_uuid,
        help="of a set of qmpbackup: the UUID that QEMU was given (default: none)",
    )
    parser.set_defaults(run=run)


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is no UUID") from err


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 with warnings."""
    request = import_set.ImportRequest(
        source=args.source.absolute(),
        run_id=new_run_id(context.host.now()),
        output=args.output.absolute() if args.output else None,
        link=args.link,
        sound=args.sound,
        name=args.name,
        uuid=args.uuid or "",
    )
    with signals.listen() as cancel, context.progress() as progress:

        def show(label: str, done: int, total: int) -> None:
            progress.disk(label, done, total, done)

        report = import_set.run(request, progress=show, cancelled=cancel.check)
    count = f"{len(report.points)} restore point{'s' * (len(report.points) != 1)}"
    text = f"imported {count}: {report.path}" if report.done else f"{report.path}: imported already"
    context.show(
        report.to_json(),
        "\n".join([text, *(f"  ! {plain.line(each)}" for each in report.warnings)]),
    )
    return WARNED if report.warnings else 0
