"""``nbdbackupctl``: arguments in, one verb run, text or JSON and an exit code out.

Only this package reads the command line and the environment, prints, and decides exit codes.
Everything heavy is imported by the verb that needs it, so that ``--version`` is quick.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence

from nbdbackupd import events, files, log, plain
from nbdbackupd.app import parser, streams
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.errors import WARNED, BusyError, Interrupted, NbdbackupError, one_line
from nbdbackupd.plain import versioned


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; argparse's own exits pass through."""
    streams.reserve()
    files.allow_many()
    # read when libvirt is imported; else its embedded driver fills stderr with notices
    os.environ.setdefault("LIBVIRT_DEBUG", "error")
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parser.build_parser(words).parse_args(words)
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
        code: int = args.run(args, context)
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
    text = one_line(err)
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
                "message": getattr(err, "message", text),
                "exit_code": code,
                "fields": fields,
            },
        )
        print(json.dumps(document, indent=2))
    return code
