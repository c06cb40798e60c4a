"""``nbdbackupctl config``: prove, explain and begin the configuration."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from nbdbackupd import plain
from nbdbackupd.app.arguments import Arguments
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config import analyze, inventory, sample, schema
from nbdbackupd.config import remarks as config_remarks
from nbdbackupd.config.files import Configuration
from nbdbackupd.config.reading import Problem
from nbdbackupd.config.remarks import Known
from nbdbackupd.config.schema import BY_PATH, DomainSettings
from nbdbackupd.config.settings import standalone_names
from nbdbackupd.errors import WARNED, ConfigError, DomainNotFoundError, NbdbackupError, UsageError
from nbdbackupd.format import blocks
from nbdbackupd.model import throwaway
from nbdbackupd.model.chain import Compression
from nbdbackupd.model.domain import parse_domain
from nbdbackupd.ops.domain import configured
from nbdbackupd.ops.notify import notification
from nbdbackupd.plain import versioned

ACTIONS = ("check", "show", "sample")
DESCRIPTION = """\
check: show all errors of the configuration files, each with its file and line, and what in them
can't work on this host: domains, disks, programs and directories that are not there. show: print
each setting for a domain, and where it comes from. sample: print a commented main file with all
settings and their defaults. The files are described in nbdbackup.yaml(5).
"""


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("config", DESCRIPTION)
    parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help=" | ".join(ACTIONS))
    parser.add_argument(
        "domain", metavar="DOMAIN", nargs="?", help="name or UUID of the domain, for show"
    )
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out; 10 if ``check`` finds an error, 3 if it warns."""
    if (args.action == "show") != (args.domain is not None):
        wants = "wants a DOMAIN" if args.action == "show" else "takes no DOMAIN"
        raise UsageError(f"config {args.action} {wants}")
    if args.action == "sample":
        return _sample(context)

    if args.action == "check":
        return _check(configured.read(context.host, event_fault=analyze.fault), context)
    return _show(args.domain, configured.read(context.host).require_sound(), context)


def _sample(context: Context) -> int:
    text = sample.render()
    context.show(versioned(sample=text), text.rstrip("\n"))
    return 0


def _check(configuration: Configuration, context: Context) -> int:
    problems = tuple(
        sorted({*configuration.problems, *config_remarks.foreign_hosts(configuration)})
    )
    remarks = _remarks(configuration, context)
    document = versioned(
        result="bad" if problems else "sound",
        files=[str(file.path) for file in configuration.files],
        problems=[
            {"file": each.file, "line": each.line, "path": each.path, "message": each.message}
            for each in problems
        ],
        warnings=[str(each) for each in remarks],
    )
    for problem in problems:
        print(plain.line(str(problem)), file=sys.stderr)
    for remark in remarks:
        print(f"warning: {plain.line(str(remark))}", file=sys.stderr)
    number = len(configuration.files)
    text = f"sound: {number} file{'s' * (number != 1)}" if number else "sound: no files, defaults"
    context.show(document, "" if problems else text)
    if problems:
        return ConfigError.exit_code
    return WARNED if remarks else 0


def _remarks(configuration: Configuration, context: Context) -> tuple[Problem, ...]:
    """What is sound and still can't work, as far as libvirt, or else its files, tell."""
    domains = _domains(configuration, context)
    if domains is not None:
        names = standalone_names(configuration)
        domains += [Known(name=name, uuid="", labels={}) for name in names]
    found = config_remarks.remarks(configuration, domains, analyze.is_over, blocks.lack)
    directory = context.host.config_dir or schema.DIRECTORY
    try:
        fault = notification.template_fault(directory)
    except ConfigError as err:
        fault = err.message
    if fault:
        template = str(directory / notification.TEMPLATE)
        found = (*found, Problem(template, 0, "", f"can't be used: {fault}"))
    return found


def _domains(configuration: Configuration, context: Context) -> list[Known] | None:
    """The domains that libvirt knows; if it can't be asked, those of its files; None without."""
    try:
        from nbdbackupd.ops.domain import domains
        from nbdbackupd.virt.domain import Domain

        found = []
        host = configured.connected(configuration, context.host)
        with domains.connect(host, any_host=True) as connection:
            for name, uuid in connection.domains():
                with contextlib.suppress(DomainNotFoundError):
                    domain = Domain(connection, name, uuid)
                    if throwaway.is_marked(domain.xml()):
                        continue
                    targets = tuple(disk.target for disk in parse_domain(domain.xml()).disks)
                    labels = configured.labels(domain)
                    found.append(Known(name=name, uuid=uuid, labels=labels, targets=targets))
    except (ImportError, NbdbackupError):
        if not os.access(inventory.DEFINITIONS, os.R_OK | os.X_OK):
            return None
        defined = inventory.read(inventory.DEFINITIONS)
        return [
            Known(name=name, uuid=each.uuid, labels=each.labels) for name, each in defined.items()
        ]
    return found


def _show(domain: str, configuration: Configuration, context: Context) -> int:
    name, uuid, found = configured.settings_of(domain, configuration, context.host)
    context.show(_document(found, name, uuid), _render(found, name))
    return 0


def _document(settings: DomainSettings, name: str, uuid: str) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, Path | Compression) else value

    return versioned(
        domain=name,
        uuid=uuid,
        files=[str(path) for path in settings.applied],
        settings=[
            {
                "path": setting.path,
                "value": plain(settings.get(setting.path)),
                "text": setting.kind.show(settings.get(setting.path)),
                "file": settings.origins[setting.path].file,
                "line": settings.origins[setting.path].line,
            }
            for setting in BY_PATH.values()
        ],
    )


def _render(settings: DomainSettings, name: str) -> str:
    rows = [
        (each.path, each.kind.show(settings.get(each.path)), str(settings.origins[each.path]))
        for each in BY_PATH.values()
    ]
    first = max(len(row[0]) for row in rows)
    # a long list must not push the origins of all others out of sight
    second = min(40, max(len(row[1]) for row in rows))
    files = ", ".join(map(str, settings.applied)) or "none, all defaults"
    lines = [f"{path:<{first}}  {text:<{second}}  {origin}" for path, text, origin in rows]
    return "\n".join([f"domain {name}; files: {files}", *lines])
