"""``nbdbackupctl checkpoints``."""

import contextlib

from nbdbackupd.app import signals
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    add_machine,
    directory,
    machine,
    seconds,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED, DomainNotFoundError, NbdbackupError, UsageError
from nbdbackupd.model.host import new_run_id
from nbdbackupd.model.naming import point_of, tag_of
from nbdbackupd.model.reconcile import LEFT_ALONE, WHY, Action, Entry, KnownChain, Step
from nbdbackupd.ops.checkpoints import checkpoints
from nbdbackupd.ops.checkpoints.checkpoints import CheckpointsReport, CheckpointsRequest
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.domain.images import ALONE
from nbdbackupd.plain import versioned

DESCRIPTION = """\
Show the checkpoints and bitmaps that backups of a domain have left in libvirt and in its images,
whether they agree with the restore points, and what is to be done where they do not. Nothing is
changed without --repair, --drop or --release. Works while the domain runs and while it is off.
Chains are found by the state directory, and by the set that -o gives.
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("checkpoints", DESCRIPTION)
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="?", default="", help="name or UUID of the domain"
    )
    parser.add_argument(
        "--all", action="store_true",
        help="with --release: of all domains that libvirt knows, before this program is removed",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=directory, help="directory of a set of the domain"
    )
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="change nothing, whatever else is asked for"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--repair", action="store_true",
        help="make known to libvirt again what increments need, remove what nothing needs",
    )  # fmt: skip
    what.add_argument(
        "--drop", metavar="CHAIN", default="",
        help="remove all checkpoints and bitmaps of a chain whose set is gone for good; its id, "
        "or the part of it that is in the checkpoints' names",
    )  # fmt: skip
    what.add_argument(
        "--release", action="store_true",
        help="remove those of all chains, as QEMU wants it before a running domain is reverted to "
        "a snapshot; the next backup into each set reads all disks whole, and goes on from there",
    )  # fmt: skip
    parser.add_argument(
        "--started", action="store_true",
        help="it was started just now: wait until a migration has brought it here, at most an "
        "hour; that it is gone again is no error",
    )  # fmt: skip
    add_checkpoint_dir(parser)
    add_machine(parser)
    parser.add_argument(
        "--wait", metavar="SECONDS", type=seconds, default=0.0,
        help="wait so long for the lock of the domain (default: 0, exit 75 at once)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 3 if something could not be done.

    Raises UsageError unless there is one domain, or all are to be released.
    """
    if bool(args.domain) == args.all or (args.all and not args.release):
        raise UsageError("give a DOMAIN, or --all with --release")
    if args.all and "qmp" in args:
        raise UsageError("--qmp and --all exclude one another: it is one machine")
    if args.all:
        return _release_all(args, context)

    request = _request(args, context, args.domain)
    found = configured.machine_of(args.domain, context.host, machine(args))
    if found is not None:
        report = checkpoints.run_of_qemu(request, found.monitor)
        return _show(report, request, context)
    with signals.listen() as cancel, context.connection() as connection:
        report = checkpoints.run(request, connection, cancelled=cancel.check)
    return _show(report, request, context)


def _show(report: CheckpointsReport, request: CheckpointsRequest, context: Context) -> int:
    is_logged = report.changed and bool(report.steps)
    context.show(report.to_json(), render(report, dropping=request.removes), is_logged=is_logged)
    return WARNED if report.problems else 0


def _release_all(args: Arguments, context: Context) -> int:
    """Each domain in its turn; what one of them is in the way of does not keep the others."""
    documents, lines, failed = [], [], 0
    with signals.listen() as cancel, context.connection() as connection:
        for name, uuid in connection.domains():
            try:
                request = _request(args, context, uuid)
                report = checkpoints.run(request, connection, cancelled=cancel.check)
            except NbdbackupError as err:
                failed += 1
                documents.append({"domain": name, "uuid": uuid, "problem": err.message})
                lines.append(f"{name}: NOT released: {err.message}")
                continue
            failed += bool(report.problems)
            documents.append({**report.to_json(), "problem": ""})
            if report.steps:
                said = _done_lines(report) if report.changed else _todo_lines(report, dropping=True)
                lines += [f"{name}:", *(f"  {line}" for line in said)]
    document = versioned(domains=documents)
    context.show(document, "\n".join(lines) or "no domain carries checkpoints or bitmaps of ours")
    return WARNED if failed else 0


def _request(args: Arguments, context: Context, domain: str) -> CheckpointsRequest:
    state_dir = context.host.state_dir
    if "qmp" not in args:
        # that it is gone matters no more to one that was started
        with contextlib.suppress(*([DomainNotFoundError] if args.started else ())):
            state_dir = configured.state_directory(domain, context.host).absolute()
    now = context.host.now()
    return checkpoints.CheckpointsRequest(
        domain=domain,
        runtime_dir=context.host.runtime_dir,
        state_dir=state_dir,
        run_id=new_run_id(now),
        directory=args.output.absolute() if args.output else None,
        repair=args.repair,
        drop=args.drop,
        release=args.release,
        moment=now.isoformat(timespec="seconds"),
        dry_run=args.dry_run,
        wait_seconds=args.wait,
        started=args.started,
        sharing=ALONE if "qmp" in args else configured.sharing_of(domain, context.host),
    )


def render(report: CheckpointsReport, *, dropping: bool = False) -> str:
    """The report for people."""
    if report.changed:
        return "\n".join(_done_lines(report))
    lines = [f"domain {report.domain} ({report.uuid}), {'running' if report.is_active else 'off'}"]
    if report.elsewhere:
        return f"{lines[0]}\nnot looked at from here: {report.elsewhere}"
    if report.holder:
        lines.append(
            f"busy: {report.holder}; what it has made so far looks like a dead run's below"
        )
    for chain in report.chains:
        lines += ["", *_chain_lines(report, chain)]
    unknown = [entry for entry in report.plan.entries if not entry.chain]
    if unknown:
        lines += ["", "chains that are not known here (--drop removes them):"]
        lines += _table(unknown, report)
    if report.plan.foreign:
        lines += [
            "",
            f"checkpoints and bitmaps of other programs, left alone: {report.plan.foreign}",
            *(f"  {each}" for each in report.others),
        ]
    if not report.plan.entries and not report.chains:
        lines.append("no checkpoints of ours")
    return "\n".join([*lines, "", *_todo_lines(report, dropping=dropping)])


def _chain_lines(report: CheckpointsReport, chain: KnownChain) -> list[str]:
    lines = [f"chain {chain.id}", f"  set   {chain.set}"]
    if chain.id in report.missing:
        lines.append(f"        not readable: {report.missing[chain.id]}")
    if not chain.base:
        lines.append("  base  none: its disks can't be tracked")
    entries = [entry for entry in report.plan.entries if entry.chain == chain.id]
    lines += _table(entries, report)
    explained = {entry.fate: WHY[entry.fate] for entry in entries if entry.fate in LEFT_ALONE}
    lines += [f"  {fate}: {why}; left alone" for fate, why in explained.items()]
    for entry in entries:
        lines += [
            f"  next increment reads {target} whole: {why}"
            for target, why in entry.problems.items()
        ]
    return lines


def _table(entries: list[Entry], report: CheckpointsReport) -> list[str]:
    if not entries:
        return []
    rows = [("point", "state", "libvirt", "bitmaps")]
    for entry in entries:
        # of a chain that is known the tag is in its heading
        name = (
            point_of(entry.name) if entry.chain else f"{tag_of(entry.name)} {point_of(entry.name)}"
        )
        known = "knows" if entry.in_libvirt else "-"
        rows.append((name, entry.fate.value, known, _bitmaps(entry, report)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join(part.ljust(width) for part, width in zip(row, [*widths, 0], strict=True))
        for row in rows
    ]


def _bitmaps(entry: Entry, report: CheckpointsReport) -> str:
    """Disks that hold the bitmap; how many images of each, where it is more than one."""
    if report.is_active and entry.in_libvirt:
        # what is stored in the images says little of it
        sound = [target for target in _disks(entry, report) if target not in entry.problems]
        return ", ".join(sound) or ("none" if entry.problems else "in QEMU")
    found: dict[str, list[bool | None]] = {}
    for held in entry.held:
        found.setdefault(held.target, []).append(held.is_sound)
    parts = []
    for target, images in found.items():
        text = target if len(images) == 1 else f"{target} ({len(images)} images)"
        parts.append(f"{text} inconsistent" if False in images else text)
    return ", ".join(parts) or "none"


def _disks(entry: Entry, report: CheckpointsReport) -> list[str]:
    """The disks that a base covers."""
    return [
        disk.target for chain in report.chains if chain.base == entry.name for disk in chain.disks
    ]


def _todo_lines(report: CheckpointsReport, *, dropping: bool) -> list[str]:
    if not report.steps:
        return ["nothing to do"]
    what = "to do:" if dropping else "to do, by --repair or by the next backup into the set:"
    return [what, *(f"  {_step(each.step)}" for each in report.steps)]


def _done_lines(report: CheckpointsReport) -> list[str]:
    lines = []
    for each in report.steps:
        if each.problem:
            lines.append(f"NOT done: {_step(each.step)}")
            lines.append(f"  {each.problem}")
        else:
            is_kept = each.step.action is Action.REMOVE or each.lost != each.step.targets
            lines.append(f"{'done' if is_kept else 'of no use'}: {_step(each.step)}")
            if is_kept and each.lost:
                lines.append(f"  lost, and read whole by the next run: {', '.join(each.lost)}")
    return lines or ["nothing to do"]


def _step(step: Step) -> str:
    disks = f" ({', '.join(step.targets)})" if step.targets else ""
    return f"{step.action.value} {step.name}{disks}: {step.why}"
