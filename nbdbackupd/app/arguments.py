"""Values on the command line, for argparse: what a verb's options accept."""

import argparse
import functools
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdbackupd import units
from nbdbackupd.config import kinds, schema, setting
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.config.setting import Option, Setting
from nbdbackupd.model.choice import Choice

Arguments = argparse.Namespace
T = TypeVar("T")
UNSET: Final = argparse.SUPPRESS
"""The default of options that a setting can stand for: absent tells from given."""


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


def argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """A reader that raises ValueError, for argparse, which then shows its message."""

    def parse(text: str) -> T:
        try:
            return read(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return parse


size = argument(units.parse_size)
rate = argument(units.parse_rate)
seconds = argument(units.parse_seconds)
duration = argument(units.parse_duration)
positive = argument(kinds.threads)
names = argument(setting.names)


def moment(text: str) -> datetime:
    """RFC 3339, or local time without a zone, for argparse."""
    try:
        # in this host's zone, too: the calendar ends
        return datetime.fromisoformat(text).astimezone().astimezone(UTC)
    except (ValueError, OverflowError) as err:
        raise argparse.ArgumentTypeError(
            f"not a time: {text!r} (examples: 2026-01-31T23:59:59Z, '2026-01-31 23:59')"
        ) from err


def add_source(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add SOURCE, which names a set: see ``named``."""
    text = "directory of the set, or name of a domain that the configured repository has sets of"
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, nargs="?" if optional else None, help=text
    )


def add_point(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add the options that choose a point of a set; returned for others that exclude them."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--point", metavar="ID", help="the point (default: the newest)")
    which.add_argument("--until", metavar="CHECKPOINT", help="the point that made this checkpoint")
    which.add_argument(
        "--at",
        metavar="TIME",
        type=moment,
        help="the newest point made at this time or before (2026-01-31T23:59:59Z, or local time: "
        "'2026-01-31 23:59')",
    )
    return which


def add_sequence(which: argparse._MutuallyExclusiveGroup) -> None:
    """Add the option that names streams in place of a set."""
    which.add_argument(
        "--sequence",
        metavar="FILES",
        type=names,
        default=(),
        help="these stream files of one disk by hand, oldest first, commas between them",
    )


def add_workers(parser: argparse.ArgumentParser, work: str) -> None:
    """Add the option for the number of threads, which do that ``work``."""
    parser.add_argument(
        "-w",
        "--workers",
        metavar="N",
        type=positive,
        default=min(8, os.cpu_count() or 2),
        help=f"threads that {work} (default: one for each processor, at most 8)",
    )


def chosen(args: Arguments) -> Choice:
    """What the options of ``add_point`` say, or ``--point`` alone where a verb has no other."""
    until, at = getattr(args, "until", None), getattr(args, "at", None)
    return Choice(point=args.point or "", until=until or "", at=at)


def add_settings(place: argparse._ActionsContainer, group: str) -> None:
    """Add the options of a group that settings have, in the order of the table."""
    for each in schema.BY_PATH.values():
        options = [option for option in each.options if option.group == group]
        chosen = place.add_mutually_exclusive_group() if len(options) > 1 else place
        for option in options:
            add_option(chosen, each, option)


def add_option(place: argparse._ActionsContainer, each: Setting[Any], option: Option) -> None:
    """Add an option of a setting; one that is not given leaves no argument behind."""
    shared: dict[str, Any] = {"help": each.help_of(option).replace("%", "%%"), "default": UNSET}
    if option.words:
        place.add_argument(*option.flags, choices=option.words, **shared)
    elif not option.argument:
        place.add_argument(*option.flags, action="store_const", const=option.value, **shared)
    else:
        if option.is_bare:
            shared |= {"nargs": "?", "const": option.value}
        read = argument(functools.partial(each.read, option))
        place.add_argument(*option.flags, metavar=option.argument, type=read, **shared)


def add_checkpoint_dir(place: argparse._ActionsContainer) -> None:
    """Add the option for the state directory, which several verbs read."""
    each = DomainSettings.checkpoint_directory
    add_option(place, each, each.options[0])


def add_machine(place: argparse._ActionsContainer, *, has_agent: bool = False) -> None:
    """Add the options for a QEMU without libvirt."""
    for each in (DomainSettings.qmp, DomainSettings.agent)[: 1 + has_agent]:
        add_option(place, each, each.options[0])


def machine(args: Arguments) -> dict[str, Path]:
    """What those options say."""
    return {name: value for name, value in given(args).items() if name in ("qmp", "agent")}


def given(args: Arguments) -> dict[str, Any]:
    """The values of settings that options give, by attribute; paths are absolute."""
    found: dict[str, Any] = {}
    for each in schema.BY_PATH.values():
        for option in each.options:
            if option.name in args:
                value = getattr(args, option.name)
                value = each.kind.parse(value) if option.words else value
                found[each.field] = value.absolute() if isinstance(value, Path) else value
    return found
