"""``--watch``: the same look again and again, each drawn over the last one on a terminal."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from nbdbackupd import log, plain
from nbdbackupd.app.arguments import Arguments, Parser, duration
from nbdbackupd.app.context import Context, now
from nbdbackupd.errors import NbdbackupError, UsageError, one_line
from nbdbackupd.units import human_time, local_time

EVERY: Final = 5.0
"""Seconds between two looks: one at 500 domains takes about a second of a processor."""
HOME, CUT, WRAP = "\x1b[H", "\x1b[?7l", "\x1b[?7h"
END_OF_LINE, END_OF_SCREEN = "\x1b[K", "\x1b[J"
"""Control sequences of ECMA-48 and of DEC: go home, cut long lines or wrap them, clear the rest."""


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument(
        "--watch", action="store_true", help="look again and again, until Ctrl-C, which ends with 0"
    )
    parser.add_argument(
        "--interval",
        metavar="TIME",
        type=duration,
        help=f"with --watch: how long to wait between two looks (default: {EVERY:.0f}s)",
    )


def is_wanted(args: Arguments, context: Context) -> bool:
    """Whether to watch. Raises UsageError for what does not go with it."""
    if args.interval is not None and not args.watch:
        raise UsageError("--interval is for --watch")
    if args.interval is not None and args.interval <= 0:
        raise UsageError("--interval: give a time above 0")
    if args.watch and context.json:
        raise UsageError("--watch and --json exclude one another: ask for each document")
    return bool(args.watch)


def watch(look: Callable[[], str], args: Arguments) -> int:
    """Show what ``look`` says, a text that is fit for a terminal, until Ctrl-C.

    Raises what the first look raises; of later ones an error is shown, and the next may do well.
    """
    wait = EVERY if args.interval is None else args.interval
    is_drawn = _can_draw()
    text = ""
    try:
        while True:
            try:
                text = look()
            except NbdbackupError as err:
                if not text:
                    raise
                text = f"! {plain.line(one_line(err))}"
            warned = [f"! {plain.line(each)}" for each in dict.fromkeys(log.warned())]
            head = f"{local_time(now())}, every {human_time(wait)}, Ctrl-C ends this"
            lines = [head, "", *text.split("\n"), *(warned if is_drawn else ())]
            if is_drawn:
                sys.stdout.write(picture(lines, shutil.get_terminal_size().lines))
            else:
                sys.stdout.write("\n".join([*lines, "", ""]))
            sys.stdout.flush()
            time.sleep(wait)
    except KeyboardInterrupt:
        return 0


def picture(lines: Sequence[str], height: int) -> str:
    """What draws lines over the last ones, as many as fit; the last line tells of the others."""
    room = max(2, height - 1)
    if len(lines) > room:
        hidden = len(lines) - room + 1
        lines = [*lines[: room - 1], f"({hidden} more lines do not fit on this terminal)"]
    drawn = "".join(f"{line}{END_OF_LINE}\n" for line in lines)
    return f"{CUT}{HOME}{drawn}{END_OF_SCREEN}{WRAP}"


def _can_draw() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
