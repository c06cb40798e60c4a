"""Command line of scripts/bench."""

import argparse
import signal
import sys
from types import FrameType

from scripts.benchmark.cases import CASES
from scripts.benchmark.setting import open_setting
from tests.lab.command import LabError


def interrupted(number: int, _frame: FrameType | None) -> None:
    """Leave by an exception, so that everything is torn down."""
    raise SystemExit(128 + number)


def parse_arguments() -> argparse.Namespace:
    """Return cases, runs and size."""
    lines = [f"  {name:<9}{case.__doc__}" for name, case in CASES.items()]
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure nbdbackupctl beside virtnbdbackup and nbdcopy; needs root.",
        epilog="cases:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("-n", "--runs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument(
        "--size", type=float, default=2.0, metavar="GIB", help="data in the disk (default: 2)"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.case) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if arguments.runs < 1 or arguments.size <= 0:
        parser.error("runs and size have to be positive")
    return arguments


def main() -> int:
    """Run the cases; 0 unless one could not be run."""
    arguments = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, interrupted)
    size = arguments.size
    print(f"{size:g} GiB of data in a disk of {size * 4:g} GiB; median of {arguments.runs} runs")
    try:
        with open_setting(arguments.runs, size) as setting:
            print(f"the peer is virtnbdbackup {setting.peer.version()}")
            for name in arguments.case or CASES:
                print(f"\n{name}: {CASES[name].__doc__}", flush=True)
                CASES[name](setting)
    except LabError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
