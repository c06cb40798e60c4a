"""``nbdbackupctl config``: prove, explain and begin the configuration."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import DEFAULT_URI, Context
from nbdbackupd.errors import ConfigError, DomainError, UsageError

if TYPE_CHECKING:
    from nbdbackupd.app.config.files import Configuration
    from nbdbackupd.app.config.settings import DomainSettings

JSON_VERSION = 1
ACTIONS = ("check", "show", "sample")
DESCRIPTION = """\
check: show all errors of the configuration files, each with its file and line. show: print each
setting for a domain, and where it comes from. sample: print a commented main file with all
settings and their defaults. The files are described in nbdbackup.yaml(5).
"""


def register(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "config", help="check, show or begin the configuration", description=DESCRIPTION,
        parents=[shared], allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help=" | ".join(ACTIONS))
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="?", help="name or UUID of the domain, for show"
    )
    parser.add_argument(
        "--config-dir", metavar="DIR", type=Path,
        help="directory of the configuration (default: /etc/nbdbackup)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 10 if ``check`` finds something."""
    if (args.action == "show") != (args.domain is not None):
        wants = "wants a DOMAIN" if args.action == "show" else "takes no DOMAIN"
        raise UsageError(f"config {args.action} {wants}")
    if args.action == "sample":
        return _sample(context)
    from nbdbackupd.app.config import calendar, files, schema

    directory = (args.config_dir or schema.DIRECTORY).absolute()
    if args.config_dir is not None and not directory.is_dir():
        raise ConfigError(f"no configuration directory {directory}: give an existing one")
    if args.action == "check":
        return _check(files.read_all(directory, event_fault=calendar.systemd_fault), context)
    return _show(args.domain, files.read_all(directory).require_sound(), context)


def _sample(context: Context) -> int:
    from nbdbackupd.app.config import sample

    text = sample.render()
    context.show({"version": JSON_VERSION, "sample": text}, text.rstrip("\n"))
    return 0


def _check(configuration: "Configuration", context: Context) -> int:
    problems = configuration.problems
    document = {
        "version": JSON_VERSION,
        "result": "bad" if problems else "sound",
        "files": [str(file.path) for file in configuration.files],
        "problems": [
            {"file": each.file, "line": each.line, "path": each.path, "message": each.message}
            for each in problems
        ],
    }
    for problem in problems:
        print(problem, file=sys.stderr)
    number = len(configuration.files)
    text = f"sound: {number} file{'s' * (number != 1)}" if number else "sound: no files, defaults"
    context.show(document, "" if problems else text)
    return ConfigError.exit_code if problems else 0


def _show(domain: str, configuration: "Configuration", context: Context) -> int:
    from nbdbackupd.app.config import settings

    name, uuid = domain, ""
    labels: Mapping[str, str] = {}
    asking = settings.needs_libvirt(domain, configuration)
    if asking:
        connection = _connection(settings.global_settings(configuration), context)
        try:
            name, uuid, labels = _ask_libvirt(domain, connection)
        except DomainError as err:
            raise type(err)(
                f"which domains {asking[0]} is for depends on what libvirt knows: {err.message}",
                **err.fields,
            ) from err
    found = settings.settings_for(name, uuid, labels, configuration)
    context.show(_document(found, name, uuid), _render(found, name))
    return 0


def _connection(settings: "DomainSettings", context: Context) -> Context:
    """The context with the connection of the configuration where the command line has none."""
    from nbdbackupd.app.config.settings import password_file

    return replace(
        context,
        uri=settings.libvirt_uri if context.uri == DEFAULT_URI else context.uri,
        user=context.user or settings.libvirt_user or "",
        password_file=context.password_file or password_file(settings, os.environ),
    )


def _ask_libvirt(domain: str, context: Context) -> tuple[str, str, Mapping[str, str]]:
    """Name, UUID and labels; those of the running domain win over those of its definition."""
    from nbdbackupd.app.config.matching import labels_of
    from nbdbackupd.virt.domain import Domain

    with context.connection() as connection:
        found = Domain.find(connection, domain)
        defined, live = labels_of(found.xml(inactive=True)), labels_of(found.xml())
        return found.name, found.uuid, {**defined, **live}


def _document(settings: "DomainSettings", name: str, uuid: str) -> dict[str, Any]:
    from nbdbackupd.app.config.schema import SETTINGS

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, Path) else value

    return {
        "version": JSON_VERSION,
        "domain": name,
        "uuid": uuid,
        "files": [str(path) for path in settings.applied],
        "settings": [
            {
                "path": setting.path,
                "value": plain(settings.get(setting.path)),
                "text": setting.kind.show(settings.get(setting.path)),
                "file": settings.origins[setting.path].file,
                "line": settings.origins[setting.path].line,
            }
            for setting in SETTINGS
        ],
    }


def _render(settings: "DomainSettings", name: str) -> str:
    from nbdbackupd.app.config.schema import SETTINGS

    rows = [
        (
            each.path,
            each.kind.show(settings.get(each.path)),
            str(settings.origins[each.path]),
        )
        for each in SETTINGS
    ]
    first = max(len(row[0]) for row in rows)
    # a long list must not push the origins of all others out of sight
    second = min(40, max(len(row[1]) for row in rows))
    files = ", ".join(map(str, settings.applied)) or "none, all defaults"
    lines = [f"{path:<{first}}  {text:<{second}}  {origin}" for path, text, origin in rows]
    return "\n".join([f"domain {name}; files: {files}", *lines])
