"""``restore --define``: the options, and the domain in the report."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdbackupd import plain
from nbdbackupd.app import asking
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import missing
from nbdbackupd.errors import UsageError
from nbdbackupd.model.definition import Consent, refuse
from nbdbackupd.ops.define import adjust
from nbdbackupd.ops.define.adjust import Adjuster
from nbdbackupd.ops.restore.request import Definition


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("a domain on the restored images")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--define", action="store_true", help="define a domain, from the XML of the point"
    )
    which.add_argument(
        "--adjust-config", action="store_true", help="only write that domain's XML, without libvirt"
    )
    group.add_argument(
        "--name", metavar="NAME", help="its name (default: restore_ and the original's)"
    )
    group.add_argument("--start", action="store_true", help="start it")
    group.add_argument(
        "--keep-identity",
        action="store_true",
        help="keep name, UUID, MAC addresses and host devices: the original is gone",
    )
    group.add_argument(
        "--media",
        choices=("keep", "remove"),
        default="remove",
        help="CDs and floppies in the drives (default: remove)",
    )
    group.add_argument(
        "--network",
        choices=("keep", "down", "none"),
        default="keep",
        help="network cards: keep, with the link down, none at all (default: keep)",
    )
    group.add_argument(
        "--other-disks",
        choices=("keep", "remove"),
        default="remove",
        help="disks that are not restored (default: remove)",
    )
    add_trust(group)


def add_trust(group: argparse._ActionsContainer) -> None:
    """Add the option that all verbs have that make a domain of a set."""
    group.add_argument(
        "--trust-definition",
        action="store_true",
        help="whoever could write to the set is trusted: keep what its definition names of a host "
        "(programs, devices, files, labels, words for QEMU)",
    )


def consent(cancelled: Callable[[], None]) -> Consent:
    """What asks before a definition keeps something of its host; it raises UsageError."""

    def agree(kept: tuple[str, ...]) -> None:
        if not asking.has_person():
            refuse(kept)
        refused = "nothing was done: the answer was not 'yes'"
        asking.ask("The definition names this of its host, and keeps it", kept, refused, cancelled)

    return agree


@contextmanager
def definer(
    args: Arguments, context: Context, cancelled: Callable[[], None]
) -> Iterator[Adjuster | None]:
    """What defines the domain, with its connection; None if no domain is wanted.

    Raises UsageError, DomainError.
    """
    if not args.define and not args.adjust_config:
        for name in ("name", "start", "keep_identity", "trust_definition"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} goes with --define")
        yield None
        return
    if args.start and not args.define:
        raise UsageError("--start goes with --define")

    request = adjust.DefineRequest(
        name=args.name or "",
        keep_identity=args.keep_identity,
        media=args.media,
        network=args.network,
        other_disks=args.other_disks,
        start=args.start,
        trusted=args.trust_definition,
    )
    if not args.define:
        yield adjust.Adjuster(request, os.urandom, consent(cancelled))
        return
    try:
        from nbdbackupd.ops.define import define
    except ImportError as err:
        raise missing(err) from err
    with context.connection() as connection:
        yield define.DomainDefiner(request, os.urandom, connection, consent(cancelled))


def render(definition: Definition) -> list[str]:
    """Lines for people about the domain."""
    state = "is running" if definition.started else "is defined"
    if not definition.defined:
        state = "is not defined, its XML is written"
    lines = [f"domain {definition.name} {state} (UUID {definition.uuid})"]
    lines.append(f"  config {definition.config}")
    return lines + [f"  {plain.line(change)}" for change in definition.changes]
