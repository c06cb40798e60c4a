"""``nbdbackupctl export``."""

import shlex
import time
from pathlib import Path
from typing import Final

from nbdbackupd.app import held, signals
from nbdbackupd.app.arguments import Arguments, add_option, given
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config import schema
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import UsageError
from nbdbackupd.model.host import new_run_id
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.ops.backup import export
from nbdbackupd.ops.backup.export import ExportReport
from nbdbackupd.units import human_size

DESCRIPTION = """\
Begin a backup job of a running domain and offer its disks over NBD, as they are at that instant,
to a reader of your own; nothing is saved. The guest is frozen only while the job begins. Ends, and
ends the job, with Ctrl-C or SIGTERM.
"""
POLL_SECONDS: Final = 0.1
SETTINGS: Final = (
    DomainSettings.disks_include,
    DomainSettings.disks_exclude,
    DomainSettings.freeze_policy,
    DomainSettings.freeze_mountpoints,
    DomainSettings.scratch_directory,
    DomainSettings.scratch_reserve,
)


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("export", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "--socket",
        metavar="PATH",
        type=Path,
        help="where to listen (default: in the runtime directory); only our user may connect",
    )
    parser.add_argument(
        "--since",
        metavar="CHECKPOINT",
        default="",
        help="tell what changed since this checkpoint of libvirt, as a dirty bitmap",
    )
    for each in SETTINGS:
        add_option(parser, each, each.options[0])
    parser.add_argument(
        "--pause", action="store_true", help="pause the domain at the instant instead of freezing"
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; ends with 0 when it is asked to end."""
    found = given(args)
    found.setdefault("scratch_directory", context.host.scratch_dir)
    if args.pause:
        if found.keys() & {"freeze_policy", "freeze_mountpoints"}:
            raise UsageError("--pause and freezing exclude one another")
        found["freeze_policy"] = FreezePolicy.PAUSE
    request = export.ExportRequest(
        domain=args.domain,
        runtime_dir=context.host.runtime_dir,
        run_id=new_run_id(context.host.now()),
        settings=schema.defaults().given(**found),
        socket=args.socket.absolute() if args.socket else None,
        since=args.since,
    )
    held.hold()
    with (
        signals.listen() as cancel,
        context.connection() as connection,
        export.exported(request, connection) as (report, trouble),
    ):
        context.show(report.to_json(), render(report))
        # whoever reads us through a pipe waits for it
        print(end="", flush=True)
        while not cancel.signum:
            trouble.check()
            time.sleep(POLL_SECONDS)
    return 0


def render(report: ExportReport) -> str:
    """What is offered, and what to do with it, for people."""
    lines = [f"{report.domain}: {report.consistency} consistent, on {report.socket}"]
    for disk in report.disks:
        lines.append(f"  {disk.target:<6} {human_size(disk.size):>10}  {disk.uri}")
        if disk.context:
            lines.append(f"  {'':<6} {'changes':>10}  {disk.context}")
        if disk.reason:
            lines.append(f"  {'':<6} {'whole':>10}  {disk.reason}")
    first = report.disks[0]
    lines.append(f"try: qemu-img convert -O qcow2 {shlex.quote(first.uri)} {first.target}.qcow2")
    changed = next((disk for disk in report.disks if disk.context), None)
    if changed is not None:
        lines.append(f"     nbdinfo --map={changed.context} {shlex.quote(changed.uri)}")
    return "\n".join([*lines, "Ctrl-C ends it"])
