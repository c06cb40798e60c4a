"""``nbdbackupctl restore``."""

from nbdbackupd.app import named, signals
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    add_point,
    add_sequence,
    add_source,
    add_workers,
    chosen,
    directory,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry, restore_define, restore_targets
from nbdbackupd.errors import WARNED, UsageError
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.restore import restore
from nbdbackupd.ops.restore.restore import RestoreReport
from nbdbackupd.units import human_size, human_time, local_time

DESCRIPTION = """\
Bring the disks of a restore point back as images, with the domain's XML beside them. Needs
nothing but the backup set. Existing images are not touched without --force; an image that is not
complete carries the suffix '.incomplete'.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("restore", DESCRIPTION)
    add_source(parser, optional=True)
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=directory,
        help="directory for the images and the domain's XML",
    )
    add_sequence(add_point(parser))
    parser.add_argument(
        "--format", choices=("qcow2", "raw"), help="image format (default: as the original)"
    )
    parser.add_argument(
        "--preallocate", action="store_true", help="allocate the whole image (default: sparse)"
    )
    parser.add_argument(
        "--compress", action="store_true", help="qcow2 images of compressed clusters"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    add_workers(parser, "read and hash")
    add_checkpoint_dir(parser)
    restore_targets.add_arguments(parser)
    restore_define.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    if args.source is None and not args.sequence:
        raise UsageError("restore takes a SOURCE, or --sequence FILES")
    source = None
    sequence = named.sequence_of(args.source, args.sequence, context)
    if args.source is not None and not sequence:
        source = named.set_of(args.source, context, chosen(args))
    request = restore.RestoreRequest(
        source=source,
        output=args.output.absolute() if args.output is not None else None,
        choice=chosen(args),
        sequence=sequence,
        format=args.format,
        preallocate=args.preallocate,
        compress=args.compress,
        force=args.force,
        workers=args.workers,
        state_dirs=configured.state_directories(context.host),
        **restore_targets.request_fields(args),
    )
    with (
        signals.listen() as cancel,
        restore_targets.placement(args, context, cancel.check) as placement,
        restore_define.definer(args, context, cancel.check) as definer,
        context.progress() as progress,
    ):
        report = restore.run(
            request,
            progress=progress.part,
            cancelled=cancel.check,
            placement=placement,
            confirm=restore_targets.confirm(args, cancel.check),
            definer=definer,
        )
    context.show(report.to_json(), render(report))
    return WARNED if report.warnings else 0


def render(report: RestoreReport) -> str:
    """The report for people."""
    of = report.domain or "disk"
    point = f" (point {report.point})" if report.point else ""
    lines = [f"restored {of} as of {local_time(report.created)}{point}"]
    lines += [
        f"  {disk.target:<6} {disk.path}  {disk.format}, {human_size(disk.size)}, "
        f"{_speed(disk.data_bytes, disk.seconds)}"
        for disk in report.disks
    ]
    if len(report.disks) > 1:
        lines.append(f"  {len(report.disks)} disks: {_speed(report.data_bytes, report.seconds)}")
    if report.config is not None:
        lines.append(f"  config {report.config}")
    if report.definition is not None:
        lines += restore_define.render(report.definition)
    return "\n".join(lines)


def _speed(data: int, seconds: float) -> str:
    rate = f", {human_size(int(data / seconds))}/s" if seconds > 0 else ""
    return f"{human_size(data)} written in {human_time(seconds)}{rate}"
