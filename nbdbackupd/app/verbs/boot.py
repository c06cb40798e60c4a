"""``nbdbackupctl boot``."""

import argparse
import logging
import shlex
import time
from pathlib import Path
from typing import Final

from nbdbackupd.app import named, signals
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    add_point,
    add_source,
    chosen,
    directory,
    rate,
    size,
)
from nbdbackupd.app.context import Context, now
from nbdbackupd.app.verbs import Registry, restore_define
from nbdbackupd.errors import WARNED, Interrupted, UsageError
from nbdbackupd.ops.boot import boot, boots, live_restore
from nbdbackupd.ops.boot.boot import Booted, BootRequest
from nbdbackupd.ops.boot.boots import KnownBoot
from nbdbackupd.ops.boot.live_restore import LiveReport
from nbdbackupd.ops.boot.record import Places
from nbdbackupd.ops.domain import configured
from nbdbackupd.plain import versioned
from nbdbackupd.units import local_time
from nbdbackupd.virt.connection import Connection

DESCRIPTION: Final = """\
Run a restore point as a transient domain within seconds, without restoring it: its disks are read
from the set, and what the guest writes goes to overlays. The clone has an identity of its own and
no network card, and neither the set nor the original is touched. Ctrl-C ends it, and what it wrote
is gone, unless --live-restore moves its disks to a directory while it runs.
"""
POLL_SECONDS: Final = 0.5

log = logging.getLogger(__name__)


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("boot", DESCRIPTION)
    add_source(parser, optional=True)
    add_point(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the domain (default: boot_ and the original's)"
    )
    parser.add_argument(
        "--keep-identity",
        action="store_true",
        help="keep name, UUID and MAC addresses: the original is gone for good",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=size, default=0, help="memory (default: as the original)"
    )
    parser.add_argument(
        "--network",
        choices=("none", "down", "keep"),
        default="none",
        help="network cards: none at all, with their link down, or as the original's with new MAC "
        "addresses (default: none)",
    )
    restore_define.add_trust(parser)
    add_checkpoint_dir(parser)
    parser.add_argument("--detach", action="store_true", help="return when it runs; --stop ends it")
    _add_live(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="only list what is booted")
    what.add_argument("--stop", metavar="NAME", default="", help="end a boot and forget its writes")
    what.add_argument(
        "--resume", metavar="NAME", default="", help="go on with a live restore that was cut short"
    )
    parser.add_argument(
        "--scratch-dir",
        metavar="DIR",
        type=Path,
        help="where overlays go (default: /var/lib/nbdbackup/scratch)",
    )
    parser.set_defaults(run=run)


def _add_live(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("live restore")
    group.add_argument(
        "--live-restore",
        metavar="DIR",
        type=directory,
        help="copy the disks to this directory while the guest runs, and go on there",
    )
    group.add_argument(
        "--define", action="store_true", help="make the domain persistent when its disks are there"
    )
    group.add_argument(
        "--format", choices=("qcow2", "raw"), help="image format (default: as the original)"
    )
    group.add_argument(
        "--bandwidth-limit",
        metavar="RATE",
        type=rate,
        default=0,
        help="most bytes per second of each disk's copy",
    )


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    _check(args)
    if args.list:
        return _list(context)
    if args.stop:
        return _stop(args.stop, context)
    if args.resume:
        return _resume(args, context)

    source = named.set_of(args.source, context, chosen(args))
    request = _request(args, context, source)
    with signals.listen() as cancel, context.connection() as connection:
        boots.sweep(request.runtime_dir, request.scratch_dir, connection)
        agree = restore_define.consent(cancel.check)
        if request.output is not None:
            up = boot.start(request, connection, cancelled=cancel.check, consent=agree)
            _tell(up, context, request)
            return _follow(up.places, args, context, connection, cancel) or _code(up)
        if args.detach:
            up = boot.start(request, connection, cancelled=cancel.check, consent=agree)
            _tell(up, context, request)
            return _code(up)
        with boot.booted(request, connection, cancelled=cancel.check, consent=agree) as up:
            _tell(up, context, request)
            _wait(up, cancel)
    return _code(up)


def _check(args: Arguments) -> None:
    others = sum(map(bool, (args.list, args.stop, args.resume)))
    if bool(args.source) == bool(others):
        raise UsageError("boot takes either a SOURCE, or one of --list, --stop and --resume")
    if args.live_restore is None and (args.define or args.format):
        raise UsageError("--define and --format go with --live-restore")
    if args.live_restore is not None and (args.detach or others):
        raise UsageError("--live-restore goes without --detach, --list, --stop and --resume")


def _request(args: Arguments, context: Context, source: Path) -> BootRequest:
    output = args.live_restore.absolute() if args.live_restore is not None else None
    return BootRequest(
        source=source,
        runtime_dir=context.host.runtime_dir,
        scratch_dir=context.host.scratch_dir,
        started=now(),
        choice=chosen(args),
        name=args.name or "",
        keep_identity=args.keep_identity,
        memory=args.memory,
        network=args.network,
        output=output,
        format=args.format,
        define=args.define,
        attended=output is None and not args.detach,
        console=output is None,
        trusted=args.trust_definition,
        state_dirs=configured.state_directories(context.host),
    )


def _tell(up: Booted, context: Context, request: BootRequest) -> None:
    for warning in up.warnings:
        log.warning("%s", warning)
    record = up.record
    document = versioned(
        name=record.name,
        uuid=record.uuid,
        point=record.point,
        created=record.created,
        console=str(up.console) if request.console else "",
        warnings=list(up.warnings),
        seconds=round(up.seconds, 3),
    )
    name = shlex.quote(record.name)
    end = f"'nbdbackupctl boot --stop {name}'" + ("" if not record.attended else " or Ctrl-C")
    lines = [
        f"domain {record.name} runs on point {record.point}, as of {local_time(record.created)}",
        f"try: virsh console {name}, virt-viewer {name}",
        f"{end} ends it, and what it wrote is gone then",
    ]
    if record.output:
        lines = [lines[0], f"its disks move to {record.output}"]
        if context.json:
            return
    context.show(document, "\n".join(lines))
    # whoever reads us through a pipe waits for it
    print(end="", flush=True)


def _code(up: Booted) -> int:
    return WARNED if up.warnings else 0


def _wait(up: Booted, cancel: signals.Cancel) -> None:
    """Wait until the guest has ended, or somebody asks us to end it."""

    def pause() -> None:
        time.sleep(POLL_SECONDS)
        cancel.check()

    def tell_held() -> None:
        log.warning(
            "the guest is held by an error of its disks: if %s is full, make room and let it go on "
            "with 'virsh resume %s'; else see 'nbdbackupctl verify'",
            up.places.work,
            up.record.name,
        )

    try:
        boots.wait_for_end(up, pause=pause, on_held=tell_held)
    except Interrupted:
        # the way this is meant to end
        log.info("ending %s", up.record.name)


def _follow(
    places: Places,
    args: Arguments,
    context: Context,
    connection: Connection,
    cancel: signals.Cancel,
) -> int:
    with context.progress() as progress:

        def show(label: str, done: int, total: int) -> None:
            progress.disk(label, done, total, done)

        try:
            report = live_restore.resume(
                places,
                connection,
                progress=show,
                cancelled=cancel.check,
                bandwidth=args.bandwidth_limit,
            )
        except Interrupted:
            log.warning(
                "the guest runs on from the set: 'nbdbackupctl boot --resume %s' goes on, "
                "--stop %s ends it",
                places.name,
                places.name,
            )
            raise
    context.show(report.to_json(), _render(report))
    return 0


def _render(report: LiveReport) -> str:
    name = report.record.name
    kind = "persistent" if report.defined else "transient"
    state = "runs" if report.running else "has ended"
    lines = [f"domain {name} ({kind}) {state} on its own images, the set is let go"]
    lines += [f"  {disk.target:<6} {disk.final}  {disk.format}" for disk in report.record.disks]
    if not report.defined:
        output = report.record.output
        lines.append(f"to keep it when it ends: virsh define the .adjusted.xml in {output}")
    return "\n".join(lines)


def _resume(args: Arguments, context: Context) -> int:
    places = Places.of(args.resume, context.host.runtime_dir, context.host.scratch_dir)
    with signals.listen() as cancel, context.connection() as connection:
        return _follow(places, args, context, connection, cancel)


def _stop(name: str, context: Context) -> int:
    with signals.listen() as cancel, context.connection() as connection:
        record = boots.stop(
            name,
            context.host.runtime_dir,
            context.host.scratch_dir,
            connection,
            cancelled=cancel.check,
        )
    document = versioned(ended=record.name, point=record.point)
    context.show(document, f"ended {record.name}")
    return 0


def _list(context: Context) -> int:
    with context.connection() as connection:
        found = boots.known(context.host.runtime_dir, context.host.scratch_dir, connection)
    document = versioned(boots=[each.to_json() for each in found])
    context.show(document, "\n".join(map(_line, found)) or "nothing is booted")
    return 0


def _line(each: KnownBoot) -> str:
    record = each.record
    state = {True: "runs", False: "has ended", None: f"at {record.uri}"}[each.running]
    parts = [record.name, state, f"point {record.point} of {record.source}"]
    if record.output:
        parts.append(f"{record.phase.value}, moves to {record.output}")
    if each.attendant:
        parts.append(each.attendant)
    elif record.output:
        parts.append("nobody attends to it: --resume")
    return "  ".join(parts)
