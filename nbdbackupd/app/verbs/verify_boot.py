"""``verify --boot``: its options, and what it says."""

import argparse
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdbackupd.app import signals, streams
from nbdbackupd.app.arguments import Arguments, chosen, duration, size
from nbdbackupd.app.context import Context, now
from nbdbackupd.app.verbs import missing, restore_define
from nbdbackupd.errors import UsageError
from nbdbackupd.ops.domain import configured
from nbdbackupd.units import human_time

if TYPE_CHECKING:
    from nbdbackupd.ops.boot.boot_test import BootTestReport, BootTestRequest

PREFIX: Final = "boottest_"
DEFAULT_WAIT: Final = "agent"
EXAMPLES: Final = "agent, 'console:login:', 'command:/usr/local/sbin/probe --quick'"
ONLY_WITH: Final = (
    "boot_only",
    "boot_wait",
    "boot_timeout",
    "boot_memory",
    "boot_name",
    "trust_definition",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a boot test."""
    group = parser.add_argument_group("boot test")
    group.add_argument(
        "--boot",
        action="store_true",
        help="then run the point as a transient domain without a network, see whether it comes up, "
        "and record that with the point",
    )
    group.add_argument(
        "--boot-only", action="store_true", help="with --boot: leave the proof of all blocks out"
    )
    group.add_argument(
        "--boot-wait",
        metavar="SIGN",
        type=sign,
        default=None,
        help="what tells that it is up: agent (the guest's agent answers), console:REGEX (on the "
        "first serial port) or command:PROGRAM (which ends with 0) (default: agent)",
    )
    group.add_argument(
        "--boot-timeout",
        metavar="TIME",
        type=duration,
        default=None,
        help="how long to wait for that (default: 5m)",
    )
    group.add_argument(
        "--boot-memory",
        metavar="SIZE",
        type=size,
        default=None,
        help="memory of the domain (default: as the original)",
    )
    group.add_argument(
        "--boot-name",
        metavar="NAME",
        default=None,
        help="name of the domain (default: boottest_ and the original's)",
    )
    restore_define.add_trust(group)
    parser.add_argument(
        "--scratch-dir",
        metavar="DIR",
        type=Path,
        help="where overlays of a boot test go (default: /var/lib/nbdbackup/scratch)",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """What to wait for: a kind, and the pattern or the program that goes with it."""

    kind: str = DEFAULT_WAIT
    pattern: re.Pattern[bytes] | None = None
    command: tuple[str, ...] = ()


def sign(text: str) -> Awaited:
    """What to wait for, for argparse."""
    kind, colon, rest = text.partition(":")
    try:
        if text == DEFAULT_WAIT:
            return Awaited()
        if kind == "console" and rest:
            return Awaited(kind=kind, pattern=re.compile(rest.encode()))
        if kind == "command" and colon and (words := shlex.split(rest)):
            return Awaited(kind=kind, command=tuple(words))
    except (re.error, ValueError) as err:
        raise argparse.ArgumentTypeError(f"can't read {rest!r}: {err}") from err
    raise argparse.ArgumentTypeError(f"not something to wait for: {text!r} (examples: {EXAMPLES})")


def check(args: Arguments) -> None:
    """Raise UsageError for options that do nothing, DomainError if libvirt's library is missing."""
    given = [name for name in ONLY_WITH if getattr(args, name)]
    if given and not args.boot:
        raise UsageError(f"--{given[0].replace('_', '-')} goes with --boot")
    if not args.boot:
        return
    try:
        import nbdbackupd.virt.transient  # noqa: F401 - only to see whether it can be
    except ImportError as err:
        raise missing(err) from err


def run(
    args: Arguments, context: Context, source: Path, cancel: signals.Cancel
) -> "BootTestReport":
    """Do the boot test, and say how it went on standard error if it has failed."""
    from nbdbackupd.ops.boot import boot_test, boots

    with context.connection() as connection:
        request = _request(args, context, source)
        boots.sweep(request.boot.runtime_dir, request.boot.scratch_dir, connection)
        report = boot_test.run(request, connection, cancelled=cancel.check)
    streams.warn(report.warnings)
    if not report.test.passed:
        streams.complain(f"point {report.test.point} did not come up: {report.test.reason}")
    return report


def _request(args: Arguments, context: Context, source: Path) -> "BootTestRequest":
    from nbdbackupd.ops.boot.boot_test import BootTestRequest, Sign
    from nbdbackupd.ops.boot.launch import BootRequest
    from nbdbackupd.ops.sets import opened

    choice = chosen(args)
    awaited: Awaited = args.boot_wait or Awaited()
    name = args.boot_name
    if not name:
        name = f"{PREFIX}{opened.open_point(source, choice)[1].domain}"
    request = BootTestRequest(
        boot=BootRequest(
            source=source,
            runtime_dir=context.host.runtime_dir,
            scratch_dir=context.host.scratch_dir,
            started=now(),
            choice=choice,
            name=name,
            memory=args.boot_memory or 0,
            with_us=True,
            trusted=args.trust_definition,
            state_dirs=configured.state_directories(context.host),
            unattended=True,
        ),
        sign=Sign(awaited.kind),
        pattern=awaited.pattern,
        command=awaited.command,
    )
    return request if args.boot_timeout is None else replace(request, seconds=args.boot_timeout)


def render(report: "BootTestReport") -> str:
    """The test for people."""
    test = report.test
    how = "came up" if test.passed else "did not come up"
    lines = [f"point {test.point} {how}: {test.waited_for}, {human_time(test.seconds)}"]
    if report.picture is not None:
        lines.append(f"  picture {report.picture}")
    return "\n".join(lines)
