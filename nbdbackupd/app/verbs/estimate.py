"""``nbdbackupctl estimate``."""

from nbdbackupd.app import signals
from nbdbackupd.app.arguments import Arguments, add_machine, directory, machine
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.model.host import new_run_id
from nbdbackupd.ops.backup import estimate
from nbdbackupd.ops.domain import configured
from nbdbackupd.units import human_size

DESCRIPTION = "Tell what the next increment into a set would save, disk by disk; saves nothing."


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("estimate", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=directory, required=True, help="directory of the set"
    )
    add_machine(parser)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    request = estimate.EstimateRequest(
        domain=args.domain,
        directory=args.output.absolute(),
        runtime_dir=context.host.runtime_dir,
        run_id=new_run_id(context.host.now()),
        sharing=configured.sharing_of(args.domain, context.host),
    )
    found = configured.machine_of(args.domain, context.host, machine(args))
    if found is not None:
        report = estimate.run_of_qemu(request, found.monitor)
    else:
        with signals.listen() as cancel, context.connection() as connection:
            report = estimate.run(request, connection, cancelled=cancel.check)
    lines = []
    for disk in report.disks:
        why = f"  whole: {disk.reason}" if disk.reason else ""
        lines.append(f"{disk.target:<6} {human_size(disk.bytes):>10}{why}")
    lines.append(f"{'total':<6} {human_size(report.total):>10}")
    context.show(report.to_json(), "\n".join(lines))
    return 0
