"""The command line: global options, which stand before or after the verb, and the verbs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from nbdbackupd import __version__
from nbdbackupd.app import verbs
from nbdbackupd.app.arguments import Parser, add_settings
from nbdbackupd.config.setting import GLOBAL
from nbdbackupd.errors import MEANINGS

STATUSES = "\n".join(f"{status:>7} {meaning}" for status, meaning in MEANINGS.items())
EPILOG = f"""\
exit status:
{STATUSES}

'nbdbackupctl VERB --help' explains a verb, nbdbackupctl(1) everything.
"""


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of ``nbdbackupctl``.

    With the words of a command line only the verb that they name has its options, and only its
    module is imported. Raises DomainError, ConfigError if that lacks a library.
    """
    shared = _global_options()
    parser = argparse.ArgumentParser(
        prog="nbdbackupctl",
        description="Back up libvirt/QEMU domains, running or off, and restore them bit for bit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nbdbackupctl {__version__}")
    subparsers = parser.add_subparsers(
        title="verbs",
        metavar="VERB",
        required=True,
        parser_class=cast("type[Parser]", verbs.parser),
    )
    registry = verbs.Registry(subparsers, shared)
    # a word that only looks like a verb costs an import, no more
    wanted = {verbs.ALL[each][0] for each in verbs.ALL if argv is None or each in argv}
    loaded = set()
    for verb, (module, _) in verbs.ALL.items():
        if module not in wanted:
            registry.list(verb)
        elif module not in loaded:
            registry.load(module)
            loaded.add(module)
    return parser


def _global_options() -> argparse.ArgumentParser:
    """Options for every verb. SUPPRESS: a value before the verb survives its absence after it."""
    shared = argparse.ArgumentParser(
        add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    group = shared.add_argument_group("global options")
    add_settings(group, GLOBAL)
    group.add_argument(
        "--config-dir",
        metavar="DIR",
        type=Path,
        help="directory of the configuration (default: /etc/nbdbackup)",
    )
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument(
        "--progress",
        choices=("auto", "line", "plain", "none"),
        help="how to show progress on stderr (default: auto, a line on a terminal)",
    )
    group.add_argument(
        "--runtime-dir",
        metavar="DIR",
        type=Path,
        help="directory for sockets and locks (default: /run/nbdbackup)",
    )
    group.add_argument(
        "-v", "--verbose", action="count", help="tell what is done; twice: in detail"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="only errors")
    return shared
