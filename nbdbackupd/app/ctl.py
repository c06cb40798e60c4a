"""``nbdbackupctl``: arguments in, one verb run, text or JSON and an exit code out.

Only this package reads the command line and the environment, prints, and decides exit codes.
Everything heavy is imported by the verb that needs it, so that ``--version`` is quick.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from nbdbackupd import __version__, events, files, log, plain
from nbdbackupd.app import streams, verbs
from nbdbackupd.app.arguments import Arguments, Parser, add_settings
from nbdbackupd.app.context import Context
from nbdbackupd.config.setting import GLOBAL
from nbdbackupd.errors import MEANINGS, WARNED, BusyError, Interrupted, NbdbackupError, one_line
from nbdbackupd.format.proven import PROVEN
from nbdbackupd.plain import versioned

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
        title="verbs", metavar="VERB", required=True, parser_class=Parser
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse's own exits pass through."""
    streams.reserve()
    # read when libvirt is imported; else its embedded driver fills stderr with notices
    os.environ.setdefault("LIBVIRT_DEBUG", "error")
    words = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(words).parse_args(words)
    except NbdbackupError as err:
        streams.complain(str(err))
        return err.exit_code
    context = Context.from_args(args)
    code = 0
    try:
        code = _run(args, context)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of our output left (``| head``): nothing more to tell it
        streams.give_up_stdout()
        return 128 + 13
    except OSError as err:
        streams.give_up_stdout()
        streams.complain(f"can't write the output: {err.strerror}")
        return code or 50
    return code


def _run(args: Arguments, context: Context) -> int:
    try:
        files.allow_many()
        PROVEN.keep_in(context.host.own_state_dir)
        try:
            code: int = args.run(args, context)
        finally:
            PROVEN.save()
    except NbdbackupError as err:
        return _report(context, err, err.exit_code)
    except Interrupted as stop:
        return _report(context, stop, stop.exit_code)
    except KeyboardInterrupt:
        return _report(context, Interrupted(2), 130)
    except BrokenPipeError:
        raise
    except OSError as err:
        return _report(context, err, 50)
    except Exception as err:  # noqa: BLE001 - the one place where bugs end
        print(plain.lines(traceback.format_exc()), end="", file=sys.stderr)
        return _report(context, err, 1)
    # a monitoring plugin's statuses mean something else
    if log.warned() and not getattr(args, "nagios", False):
        return code or WARNED
    return code


def _report(context: Context, err: BaseException, code: int) -> int:
    """One line on stderr, and the same as JSON on stdout if JSON was asked for."""
    cure = f": {found}" if (found := files.cure(err)) else ""
    text = one_line(err) + cure
    # what is tried again later is no error of this host
    priority = 4 if code == BusyError.exit_code else 3
    streams.complain(text, is_told=events.is_told(err), priority=priority)
    if context.json:
        fields = {
            name: value if isinstance(value, int) else str(value)
            for name, value in getattr(err, "fields", {}).items()
        }
        document = versioned(
            error={
                "kind": type(err).__name__,
                "message": getattr(err, "message", one_line(err)) + cure,
                "exit_code": code,
                "fields": fields,
            },
        )
        print(json.dumps(document, indent=2))
    return code
