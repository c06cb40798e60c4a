"""Values on the command line, for argparse: what a verb's options accept."""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nbdbackupd import units
from nbdbackupd.model.choice import Choice

Arguments = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """A verb's parser; ``takes_any_order`` lets options stand between positional arguments.

    Before 3.12.7 argparse takes a positional argument that may be left out for absent when an
    option follows, unless it is asked to intermix them.
    """

    takes_any_order = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse."""
        if not self.takes_any_order:
            return super().parse_known_args(args, namespace)
        # to intermix calls this method itself
        self.takes_any_order = False
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.takes_any_order = True


def directory(text: str) -> Path:
    """A directory, for argparse; nothing is streamed, so ``-`` is none."""
    if text == "-":
        raise argparse.ArgumentTypeError(
            "'-': nothing is written to standard output; give a directory ('./-' for that name)"
        )
    if not text:
        raise argparse.ArgumentTypeError("an empty name; give a directory")
    return Path(text)


def size(text: str) -> int:
    """An argument in bytes, for argparse."""
    try:
        return units.parse_size(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def rate(text: str) -> int:
    """An argument in bytes per second, 64 KiB or more, for argparse."""
    value = size(text)
    if value < units.LEAST_RATE:
        raise argparse.ArgumentTypeError(f"a rate of at least 64K is needed, not {text!r}")
    return value


def seconds(text: str) -> float:
    """A duration in seconds, not negative, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}")
    return value


def duration(text: str) -> float:
    """``36h``, ``3d`` as seconds, for argparse."""
    try:
        return units.parse_duration(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def positive(text: str) -> int:
    """A number from 1 to 64, for argparse."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"not a number from 1 to 64: {text!r}")
    return int(text)


def lz4_level(text: str) -> int:
    """An lz4 level, for argparse; the domain after a bare ``-z`` ends up here, too."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(
            f"not a level from 1 to 16: {text!r} (if that is the domain, give it before -z)"
        )
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """``vda,vdb`` as names, for argparse."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError("expected names with commas between them")
    return found


def moment(text: str) -> datetime:
    """RFC 3339, or local time without a zone, for argparse."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"not a time: {text!r} (examples: 2026-01-31T23:59:59Z, '2026-01-31 23:59')"
        ) from err
    return parsed.astimezone(UTC)


def add_point(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add the options that choose a point of a set; returned for others that exclude them."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--point", metavar="ID", help="the point (default: the newest)")
    which.add_argument("--until", metavar="CHECKPOINT", help="the point that made this checkpoint")
    which.add_argument(
        "--at", metavar="TIME", type=moment,
        help="the newest point made at this time or before (2026-01-31T23:59:59Z, or local time: "
        "'2026-01-31 23:59')",
    )  # fmt: skip
    return which


def chosen(args: Arguments) -> Choice:
    """What the options of ``add_point`` say, or ``--point`` alone where a verb has no other."""
    until, at = getattr(args, "until", None), getattr(args, "at", None)
    return Choice(point=args.point or "", until=until or "", at=at)


def add_checkpoint_dir(group: argparse._ActionsContainer) -> None:
    """Add the option for the state directory, which several verbs read."""
    group.add_argument(
        "--checkpoint-dir", metavar="DIR", type=Path,
        help="where the base of each chain and the digest of each manifest are noted; hosts of a "
        "cluster may share it (default: /var/lib/nbdbackup/state)",
    )  # fmt: skip
