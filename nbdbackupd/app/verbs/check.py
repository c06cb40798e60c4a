"""``nbdbackupctl check``."""

import logging
import os
import sys
import textwrap
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from nbdbackupd import plain
from nbdbackupd.app import tables
from nbdbackupd.app.arguments import (
    Arguments,
    add_checkpoint_dir,
    add_machine,
    directory,
    machine,
    size,
)
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs import Registry
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.errors import ConfigError
from nbdbackupd.model.finding import Finding
from nbdbackupd.ops.check import check
from nbdbackupd.ops.check.check import CheckReport
from nbdbackupd.ops.check.request import CheckRequest
from nbdbackupd.ops.domain import configured, qemu
from nbdbackupd.virt.domain import Domain

DESCRIPTION = """\
Find out whether the next backup of a domain will work: programs, libvirt, images, checkpoints,
guest agent, space, access, locks, leftovers of dead runs; without -o also all that the next run by
the configuration needs. Nothing is changed. Exit status: 0 if all
is well, 3 with warnings, 20 with a failure.
"""
EXIT: Final = {"ok": 0, "warn": 3, "fail": 20}
COLOURS: Final = {"ok": "32", "warn": "33", "fail": "1;31"}
WIDTH: Final = 100
GAP: Final = "        "
SURVEY_LOGGER: Final = "nbdbackupd.ops.domain.survey"


def register(verbs: Registry) -> None:
    """Add the verb."""
    parser = verbs.add("check", DESCRIPTION)
    parser.add_argument("domain", metavar="DOMAIN", help="name or UUID of the domain")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=directory, help="directory of the set to look at, too"
    )
    parser.add_argument(
        "--scratch-dir",
        metavar="DIR",
        type=Path,
        help="directory for QEMU's scratch files (default: /var/lib/nbdbackup/scratch)",
    )
    parser.add_argument(
        "--scratch-reserve",
        metavar="SIZE",
        type=size,
        help="what is to stay free of it (default: 512M)",
    )
    add_checkpoint_dir(parser)
    add_machine(parser, has_agent=True)
    parser.set_defaults(run=run)


def run(args: Arguments, context: Context) -> int:
    """Carry the verb out."""
    # what it warns of becomes a finding
    logging.getLogger(SURVEY_LOGGER).setLevel(logging.ERROR)
    found = None
    if "qmp" in args or args.output is None:
        found = configured.machine_of(args.domain, context.host, machine(args))
    if found is not None:
        with qemu.connect(found.monitor, args.domain) as reached:
            settings = None if "qmp" in args else found
            request, findings = _request(args, context, reached.name, reached.uuid, settings)
            report = check.run_of_qemu(request, found, reached)
    else:
        with _connected(args, context).connection() as connection:
            domain = Domain.find(connection, args.domain)
            wanted = check.settings_of(domain, context.host)
            request, findings = _request(args, context, domain.name, domain.uuid, wanted)
            report = check.run(request, connection)
    report = replace(report, findings=(*findings, *report.findings))
    coloured = tables.wants_colour(sys.stdout, os.environ)
    context.show(report.to_json(), render(report, colour=coloured), painted=True)
    return EXIT[report.severity.value]


def _connected(args: Arguments, context: Context) -> Context:
    """As ``run`` connects, unless a set was named: then no configuration counts."""
    if args.output is not None:
        return context
    try:
        host = configured.connected(configured.read(context.host), context.host)
    except ConfigError:
        # that becomes a finding
        return context
    return replace(context, host=host)


def _request(
    args: Arguments,
    context: Context,
    name: str,
    uuid: str,
    settings: DomainSettings | Finding | None,
) -> tuple[CheckRequest, tuple[Finding, ...]]:
    """What is to be looked at: a set that was named, or what ``run`` will do."""
    facts: dict[str, Any] = {
        "directory": args.output.absolute() if args.output is not None else None,
        "scratch_dir": context.host.scratch_dir,
        "scratch_reserve": DomainSettings.scratch_reserve.default,
        "state_dir": context.host.state_dir,
        "now": context.host.now(),
    }
    findings: tuple[Finding, ...] = ()
    if isinstance(settings, Finding):
        if args.output is None:
            findings = (settings,)
    elif settings is not None:
        facts |= {
            "state_dir": configured.state_directory(args.domain, context.host).absolute(),
            "sharing": configured.sharing_of(args.domain, context.host),
        }
        if args.output is None:
            facts["directory"], findings = check.next_run(name, uuid, settings, context.host)
            if args.scratch_dir is None and not settings.is_default("scratch.directory"):
                facts["scratch_dir"] = settings.scratch_directory
            facts["scratch_reserve"] = settings.scratch_reserve
            proofs = (settings.repository_mount_point, settings.repository_marker)
            facts["is_proven"] = any(each is not None for each in proofs)
            facts["freeze_policy"] = settings.freeze_policy
    if args.scratch_reserve is not None:
        facts["scratch_reserve"] = args.scratch_reserve
    runtime_dir = context.host.runtime_dir
    return CheckRequest(domain=uuid, runtime_dir=runtime_dir, **facts), findings


def render(report: CheckReport, *, colour: bool) -> str:
    """The findings by area, one line each or folded, with advice below what is not right."""
    lines = [f"{report.domain} ({report.uuid}), {report.state}"]
    for area, findings in groupby(report.findings, key=lambda each: each.area):
        lines += ["", area.value]
        for each in findings:
            kind = each.severity.value
            label = tables.paint(f"{kind.upper():<4}", COLOURS[kind], coloured=colour)
            first, *rest = _fold(each.text)
            lines.append(f"  {label}  {first}")
            lines += [f"{GAP}{line}" for line in rest]
            lines += [
                f"{GAP}{line}" for line in (_fold(f"-> {each.advice}") if each.advice else ())
            ]
    return "\n".join([*lines, "", _summary(report, colour=colour)])


def _summary(report: CheckReport, *, colour: bool) -> str:
    kinds = [each.severity.value for each in report.findings]
    words = {"ok": "ok", "warn": "warning(s)", "fail": "failure(s)"}
    counts = ", ".join(f"{kinds.count(kind)} {word}" for kind, word in words.items())
    verdict = {
        "ok": "all is well",
        "warn": "a backup works, see the warnings",
        "fail": "a backup will not work as it should",
    }[report.severity.value]
    return f"{tables.paint(verdict, COLOURS[report.severity.value], coloured=colour)}: {counts}"


def _fold(text: str) -> list[str]:
    """Lines of a width that can be read; paths stay whole, to be copied."""
    clean = plain.line(text)
    width = WIDTH - len(GAP)
    return textwrap.wrap(clean, width, break_long_words=False, break_on_hyphens=False) or [""]
