"""``nbdbackupctl backup``."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbdbackupd import log as runlog
from nbdbackupd.app import held, signals
from nbdbackupd.app.arguments import Arguments, add_settings, argument, directory, given
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config import schema
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import WARNED, UsageError
from nbdbackupd.model.chain import Layout, Level
from nbdbackupd.model.naming import CHAIN_NAME
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.ops.backup import backup, prepare, standalone
from nbdbackupd.ops.backup.request import BackupReport, BackupRequest
from nbdbackupd.ops.domain import configured, domains, qemu
from nbdbackupd.ops.domain.images import ALONE
from nbdbackupd.ops.status import record as run_record
from nbdbackupd.source import ssh
from nbdbackupd.systemd import notify
from nbdbackupd.units import human_size, human_time
from nbdbackupd.virt.connection import Connection

if TYPE_CHECKING:
    from nbdbackupd.config.files import Configuration  # PyYAML, which -o needs not

LEVELS = ("auto", "full", "inc", "diff", "copy")
DESCRIPTION = """\
Save a domain into a backup set. The first run makes a full, later ones save only what changed
since. The set's directory is given with -o; nothing else must live in it. With -o no
configuration is read. Without it the set is chosen as the configuration says, and what no option
says comes from there, too; programs of the configuration are not run, see the verb run.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("backup", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "-l",
        "--level",
        choices=LEVELS,
        default="auto",
        help="auto (default): full into an empty set, else inc; full: new chain; inc: changes "
        "since the last point; diff: the same without moving on; copy: a full beside the chain",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=directory,
        help="directory of the set (default: as the configuration says)",
    )
    parser.add_argument(
        "--chain",
        metavar="NAME",
        type=chain_name,
        help="what a chain that begins is called in the names of its checkpoints and bitmaps; one "
        "that goes on has to be called so (default: a mark of its first run)",
    )
    _add_disks(parser.add_argument_group("disks"))
    guest = parser.add_argument_group("guest")
    add_settings(guest, "guest")
    guest.add_argument(
        "--pause", action="store_true", help="pause the domain at the instant instead of freezing"
    )
    how = parser.add_argument_group("run")
    add_settings(how, "run")
    _add_ssh(how)
    parser.set_defaults(run=run)


def _add_ssh(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--ssh-config",
        metavar="FILE",
        type=Path,
        help="ssh's configuration for '-c qemu+ssh://' (default: as ssh has it)",
    )


def _add_disks(disks: argparse._ArgumentGroup) -> None:
    add_settings(disks, "disks")
    disks.add_argument(
        "-t",
        "--type",
        choices=("stream", "raw"),
        default="stream",
        help="stream (default), or raw: one full raw image for each disk, level copy only",
    )
    disks.add_argument(
        "--push",
        action="store_true",
        help="let QEMU write plain qcow2 images, each on the one before; needs -o",
    )
    disks.add_argument(
        "--extents",
        choices=("own", "nbdinfo"),
        default="own",
        help="who asks for extents: we (default) or the nbdinfo tool, to cross-check",
    )


@argument
def chain_name(text: str) -> str:
    """A name for a chain."""
    if not CHAIN_NAME.fullmatch(text):
        raise ValueError("up to 32 of a-z, 0-9 and _ are a chain's name")
    return text


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 with warnings."""
    with ExitStack() as stack:
        record = run_record.RunRecord(context.host)
        if args.output is None:
            # into a directory of the user's own, status has nothing to say about it
            record = stack.enter_context(run_record.begun(args.domain, context.host))
        held.hold()
        beat = notify.Pulse({}, tell=record.doing)
        cancel = stack.enter_context(signals.listen())
        progress = stack.enter_context(context.progress())

        def moved(disk: str, position: int, size: int, data: int) -> None:
            beat.progress(disk, position, size, data)
            progress.disk(disk, position, size, data)

        try:
            request, report = _backup(args, context, moved, cancel.check)
        except BaseException as err:
            record.failed(err)
            raise
        code = WARNED if report.warnings or runlog.warned() else 0
        record.done(code, report, report.skipped, str(request.directory))
    text = render(report)
    if args.output is None and report.point is not None:
        text += f"\n  into {request.directory}"
    context.show(report.to_json(), text)
    return code


def _backup(
    args: Arguments,
    context: Context,
    moved: Callable[[str, int, int, int], None],
    cancelled: Callable[[], None],
) -> tuple[BackupRequest, BackupReport]:
    configuration = configured.read(context.host) if args.output is None else None
    if "qmp" in args and configuration is not None:
        raise UsageError("--qmp needs a set: give its directory with -o")
    found = schema.defaults() if "qmp" in args else None
    if configuration is not None:
        found = configured.standalone(args.domain, configuration)
    if found is not None:
        settings = with_options(args, found)
        return _standalone(args, context, settings, progress=moved, cancelled=cancelled)
    if ssh.leads(context.host.uri):
        return _by_ssh(args, context, moved, cancelled)
    if configuration is not None:
        context = replace(context, host=configured.connected(configuration, context.host))
    with context.connection() as connection:
        request = _request(args, context, connection, configuration)
        return request, backup.run(request, connection, progress=moved, cancelled=cancelled)


def _by_ssh(
    args: Arguments,
    context: Context,
    moved: Callable[[str, int, int, int], None],
    cancelled: Callable[[], None],
) -> tuple[BackupRequest, BackupReport]:
    """Raises UsageError for what is not done by ssh."""
    if args.output is None:
        raise UsageError("a domain of another host needs a set: give its directory with -o")
    settings = with_options(args, schema.defaults())
    if not settings.is_default("checkpoint_directory"):
        context = replace(
            context, host=replace(context.host, state_dir=settings.checkpoint_directory)
        )
    with domains.connect_by_ssh(context.host) as (connection, host):
        scratch = connection.where.scratch_dir(settings.scratch_directory)
        request = prepare.request(
            args.domain,
            args.output,
            host,
            settings.given(scratch_directory=scratch, checkpoint_directory=host.state_dir),
            ALONE,
            level=Level(args.level),
            layout=Layout(args.type),
            by_nbdinfo=args.extents == "nbdinfo",
            chain_name=args.chain or "",
        )
        return request, backup.run(request, connection, progress=moved, cancelled=cancelled)


def _standalone(
    args: Arguments,
    context: Context,
    settings: DomainSettings,
    *,
    progress: Callable[[str, int, int, int], None],
    cancelled: Callable[[], None],
) -> tuple[BackupRequest, BackupReport]:
    """Raises UsageError for what a QEMU without libvirt can't do."""
    if args.push:
        raise UsageError("--push needs libvirt")
    if settings.start_paused:
        raise UsageError("a QEMU without libvirt and --start-paused exclude one another: it runs")
    level, host = Level(args.level), context.host
    directory, sharing = args.output, ALONE
    if directory is None:
        with qemu.connect(settings.monitor, args.domain) as found:
            uuid = found.uuid
        directory = prepare.plan(args.domain, uuid, settings, host.now(), level).set
        sharing = configured.sharing(settings)
    request = prepare.request(
        args.domain,
        directory,
        host,
        settings,
        sharing,
        level=level,
        layout=Layout(args.type),
        by_nbdinfo=args.extents == "nbdinfo",
        chain_name=args.chain or "",
    )
    report = standalone.run(request, progress=progress, cancelled=cancelled)
    return request, report


def _request(
    args: Arguments,
    context: Context,
    connection: Connection,
    configuration: "Configuration | None",
) -> BackupRequest:
    level, host = Level(args.level), context.host
    if configuration is None:
        name, directory, settings = args.domain, args.output, schema.defaults()
    else:
        domain = domains.find(connection, args.domain, host.runtime_dir)
        settings = configured.settings_of_domain(domain, configuration)
        planned = prepare.plan(domain.name, domain.uuid, settings, host.now(), level)
        name, directory = domain.uuid, planned.set
    is_told = configuration is None or host.is_state_given
    return prepare.request(
        name,
        directory,
        host,
        with_options(args, settings),
        configured.sharing_of(name, host) if is_told else configured.sharing(settings),
        level=level,
        layout=Layout.QCOW2 if args.push else Layout(args.type),
        by_nbdinfo=args.extents == "nbdinfo",
        chain_name=args.chain or "",
    )


def with_options(args: Arguments, settings: DomainSettings) -> DomainSettings:
    """The settings with what options say instead. Raises UsageError if these contradict."""
    found = given(args)
    if "disks_include" in found or "disks_exclude" in found:
        # the two belong together: a disk of one list may be in the setting of the other
        found = {"disks_include": (), "disks_exclude": (), **found}
    if args.type == "raw":
        if args.level != "copy" or found.get("compression") is not None:
            raise UsageError("--type raw needs '-l copy' and goes without --compress")
        found["compression"] = None
    if args.chain and args.level == "copy":
        raise UsageError("--chain and '-l copy' exclude one another: a copy begins no chain")
    if args.push:
        # what QEMU can't do is refused, not left out
        unlike = args.type == "raw" or args.extents == "nbdinfo" or args.output is None
        if unlike or not {found.get("compression"), found.get("limits_bandwidth")} <= {None}:
            raise UsageError(
                "--push needs -o, and goes without --type, --extents, --compress and --limit-rate"
            )
    if settings.qmp is None and "qmp" not in found and "agent" in found:
        raise UsageError("--agent needs --qmp: libvirt speaks to the agents of its domains")
    policy, is_some = found.get("freeze_policy"), "freeze_mountpoints" in found
    before = settings.freeze_policy
    if args.pause:
        if policy is FreezePolicy.REQUIRE or is_some:
            raise UsageError("--pause and freezing exclude one another")
        found["freeze_policy"] = FreezePolicy.PAUSE
    elif policy is None and is_some and before is not FreezePolicy.REQUIRE:
        found["freeze_policy"] = FreezePolicy.AUTO
    elif policy is not None and before in (FreezePolicy.NEVER, FreezePolicy.PAUSE):
        # what is not frozen has no mount points of its own
        found.setdefault("freeze_mountpoints", ())
    return settings.given(**found)


def render(report: BackupReport) -> str:
    """The report for people."""
    point = report.point
    if point is None:
        return f"nothing saved: {report.skipped}"
    lines = [
        f"saved {point.domain}: {point.level} {point.id}, "
        f"{len(point.disks)} disk{'s' * (len(point.disks) != 1)}, "
        f"{point.consistency} consistent, {human_time(report.seconds)}"
    ]
    for disk in point.disks:
        took = report.disk_seconds.get(disk.target, 0.0)
        line = (
            f"  {disk.target:<6} {'whole' if disk.mode == 'full' else 'changes':<8}"
            f"{human_size(disk.data_bytes):>10} data {human_size(disk.zero_bytes):>10} zero "
            f"{human_size(disk.file_size):>10} stored  {human_time(took)}"
        )
        lines.append(line)
    lines += [f"  left out {skip.target}: {skip.reason}" for skip in point.skipped]
    lines += [f"  note: {text}" for text in report.notes]
    return "\n".join(lines)
