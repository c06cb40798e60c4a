"""``nbdbackupctl mount`` and ``nbdbackupctl unmount``."""

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, proc
from nbdbackupd.app import signals, streams, tree_options
from nbdbackupd.app.arguments import Arguments, add_source
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.errors import WARNED, FormatError
from nbdbackupd.ops.files import mount
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size, local_time

MOUNT: Final = """\
Show the files of a restore point in an empty directory, read-only, without restoring disks and
without root. Ends on Ctrl-C, by 'unmount' or when the directory is unmounted.
"""
UNMOUNT: Final = "End what 'mount' has begun, and tell when nothing of it is left."
KEEPER: Final = "NBDBACKUP_KEEPS_MOUNT"
"""Set for the process in the background that ``--detach`` starts."""

READY_SECONDS: Final = 900.0


def register(verbs: Registry) -> None:
    """Add both verbs."""
    parser = verbs.add("mount", MOUNT)
    add_source(parser)
    parser.add_argument("directory", metavar="DIR", type=Path, help="an empty directory")
    tree_options.add(parser)
    parser.add_argument(
        "--detach", action="store_true", help="return when it is mounted; 'unmount' ends it"
    )
    parser.set_defaults(run=run_mount)
    parser = verbs.add("unmount", UNMOUNT)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where it is mounted")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="though programs have files open there"
    )
    parser.set_defaults(run=run_unmount)


def run_mount(args: Arguments, context: Context) -> int:
    """Carry ``mount`` out; 40 if damage was met, 0 when it is asked to end."""
    if args.detach and KEEPER not in os.environ:
        return _detach(context)

    request = tree_options.request(args, context)
    with signals.listen() as cancel:
        at = args.directory.absolute()
        with mount.opened(request, at=at, cancelled=cancel.check) as tree:
            if not args.detach:
                tree_options.warn(tree.warnings, tree.notes)
            document = tree.to_json()
            if args.detach:
                print(json.dumps(document), flush=True)
                streams.let_go()
            else:
                context.show(document, _render(document))
                print(end="", flush=True)
            damaged = tree.wait(lambda: bool(cancel.signum))
    if damaged:
        return FormatError.exit_code
    return WARNED if tree.warnings else 0


def _detach(context: Context) -> int:
    """Start ourselves once more in the background, and tell what that one tells."""
    program = [os.path.realpath(sys.argv[0])]
    if Path(sys.argv[0]).name == "__main__.py":
        program = [sys.executable, "-m", "nbdbackupd"]
    # setsid returns at once; the text ends when the other one lets go of its streams, or ends
    text = proc.output(
        ["setsid", "--fork", *program, *sys.argv[1:], "--json"],
        timeout=READY_SECONDS,
        env={KEEPER: "1"},
        must_finish=True,
    )
    document = documents.parse_json(text)
    if "error" in document:
        if context.json:
            print(json.dumps(document, indent=2))
        error = document["error"]
        streams.complain(error["message"])
        code: int = error["exit_code"]
        return code
    tree_options.warn(document["warnings"], document["notes"])
    context.show(document, _render(document))
    return WARNED if document["warnings"] else 0


def _render(document: dict[str, Any]) -> str:
    """What is mounted, for people."""
    created = local_time(document["created"])
    of = f"{document['domain']} as of {created} (point {document['point']})"
    found = document["file_system"]
    place = found["volume"] or (
        f"partition {found['partition']} of {found['disk']}"
        if found["partition"]
        else found["disk"]
    )
    return (
        f"{of}: {found['type']} of {place}, {human_size(found['size'])}, at "
        f"{document['directory']}, read-only, by {document['tool']}\n"
        f"'nbdbackupctl unmount {document['directory']}' ends it"
    )


def run_unmount(args: Arguments, context: Context) -> int:
    """Carry ``unmount`` out."""
    directory = args.directory.absolute()
    mount.end(directory, context.host.runtime_dir, lazy=args.lazy)
    context.show(versioned(directory=str(directory)), f"{directory} is unmounted")
    return 0
