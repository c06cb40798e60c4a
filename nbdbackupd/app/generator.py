"""systemd's generator: makes timers of what the configuration says about schedules.

systemd calls it at boot and at ``daemon-reload``, before anything else runs, with a directory for
units of its own. It writes drop-ins for ``nbdbackup@NAME.timer`` there, and links for those that
are to begin by themselves. It never fails: what it can't do it tells, and does the rest.

Only instances that have a name get a drop-in: those that a file names letter for letter, those
that libvirt has defined and a file is for, and those that the administrator has enabled. What the
main file says goes to all others.

With ``--refresh`` it sees to it that systemd has the timers that it would make now: domains come
and go (nbdbackup-timers.path).
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdbackupd import plain
from nbdbackupd.model import unitname

if TYPE_CHECKING:
    from nbdbackupd.config.files import Configuration
    from nbdbackupd.config.timers import TimerSettings

UNITS: Final = Path("/etc/systemd/system")
GENERATED: Final = Path("/run/systemd/generator")
SYSTEMCTL_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = 2.0
VENDOR: Final = Path("/usr/lib/systemd/system")
TEMPLATE: Final = f"{unitname.RUNNER}@.timer"
TEMPLATES: Final = (unitname.RUNNER, unitname.PRUNER)
"""What has timers that begin by the configuration."""

DROP_IN: Final = "50-schedule.conf"
WANTS: Final = "timers.target.wants"
NEVER: Final = "1970-01-02 00:00:00 UTC"
"""An event that is over."""

KMSG: Final = Path("/dev/kmsg")
MAX_TOLD: Final = 20

Tell = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Write what belongs into the first of systemd's directories; always 0.

    With ``--refresh`` what ``refresh`` returns, and 1 for a fault of our own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    tell = _teller(os.environ)
    try:
        if os.environ.get("SYSTEMD_IN_INITRD") == "1":
            return 0
        if words == ["--refresh"]:
            # what is defined within the pause is seen at once
            time.sleep(PAUSE_SECONDS)
            return refresh(tell=tell)
        if not words:
            tell("no directory given: systemd calls this program, see systemd.generator(7)")
            return 0
        generate(Path(words[0]), tell=tell)
    except Exception as err:  # noqa: BLE001 - a boot must not end here, whatever it is
        tell(f"timers are as the units have them: {type(err).__name__}: {err}")
        return int(words == ["--refresh"])
    return 0


def generate(
    output: Path,
    *,
    config: Path | None = None,
    units: Path = UNITS,
    definitions: Path | None = None,
    tell: Tell,
) -> tuple[str, ...]:
    """Write drop-ins and links below ``output``; returns the names that got one.

    ``config`` is the directory of the configuration, by default the usual one, ``definitions``
    that of libvirt's domains; ``units`` is where the administrator's links are. ``tell`` gets a
    line for each thing that is wrong.
    """
    from nbdbackupd.config import analyze, files, inventory, schema, timers

    configuration = files.read_all(config or schema.DIRECTORY, event_fault=analyze.fault)
    problems = configuration.problems
    for problem in problems[:MAX_TOLD]:
        tell(str(problem))
    if len(problems) > MAX_TOLD:
        tell(f"{len(problems) - MAX_TOLD} more: 'nbdbackupctl config check' shows all")
    common = timers.timer_for("", _main_only(configuration))
    _try(tell, TEMPLATE, partial(_write, output, TEMPLATE, _drop_in(common)))
    defined = inventory.read(definitions or inventory.DEFINITIONS)
    matched = timers.matched_names(configuration, defined)
    enabled = enabled_names(units)
    # a timer by UUID is one for that domain, too
    by_uuid = {name for name, domain in defined.items() if domain.uuid in enabled}
    done = []
    for name in dict.fromkeys((*matched, *enabled)):
        unit = unitname.unit(unitname.RUNNER, name, "timer")
        # the directory of a drop-in has two characters more than the unit
        if unitname.is_too_long(f"{unit}.d"):
            tell(f"domain {name}: its name is too long for a unit; use its UUID: {unit[:60]}…")
            continue
        found = timers.timer_for(name, configuration, defined.get(name))
        begins = found.enable and name in matched and name not in by_uuid
        if _try(tell, unit, partial(_write_timer, output, unit, found, begins=begins)):
            done.append(name)
        if begins and found.prunes:
            pruner = unitname.unit(unitname.PRUNER, name, "timer")
            _try(tell, pruner, partial(_want, output, pruner))
    return tuple(done)


def refresh(
    *,
    generated: Path = GENERATED,
    config: Path | None = None,
    units: Path = UNITS,
    definitions: Path | None = None,
    tell: Tell,
) -> int:
    """Have systemd take up what ``generate`` makes now, if that is not what it made last.

    All timers that are wanted begin, also those that a daemon-reload has made known before. Those
    that neither a file nor a link of the administrator wants end, as of domains that are gone,
    also those whose links a daemon-reload has taken away before; none if a file has an error.
    Returns an exit status: 10 then, 30 if systemd did not do all of it, which is told.
    """
    from nbdbackupd.config import files, schema
    from nbdbackupd.errors import ConfigError, ProcessError

    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory)
        generate(made, config=config, units=units, definitions=definitions, tell=tell)
        before, after = _tree(generated), _tree(made)
    is_sound = not files.read_all(config or schema.DIRECTORY).problems
    if before != after and not _order(tell, "daemon-reload"):
        return ProcessError.exit_code
    wanted = _links(after)
    done = _begin(tell, wanted)
    if not is_sound:
        return ConfigError.exit_code
    enabled = {
        unitname.unit(template, name, "timer")
        for template in TEMPLATES
        for name in enabled_names(units, template)
    }
    return 0 if _end(tell, wanted | enabled) and done else ProcessError.exit_code


def _end(tell: Tell, wanted: Collection[str]) -> bool:
    """Stop our active timers but these; none that is masked, or that another unit wants."""
    from nbdbackupd.errors import ProcessError
    from nbdbackupd.systemd import units as systemd

    try:
        unwanted = systemd.unwanted(*(f"{each}@*.timer" for each in TEMPLATES))
    except ProcessError as err:
        tell(str(err))
        return False
    gone = sorted(set(unwanted).difference(wanted))
    return not gone or _order(tell, "stop", "--", *gone)


def _begin(tell: Tell, timers: Collection[str]) -> bool:
    """Start those of the timers that are not active; none that the administrator has masked."""
    from nbdbackupd.errors import ProcessError
    from nbdbackupd.systemd import units as systemd

    if not timers:
        return True
    try:
        idle = systemd.idle(*sorted(timers))
    except ProcessError as err:
        tell(str(err))
        return False
    return not idle or _order(tell, "start", "--", *idle)


def _order(tell: Tell, *words: str) -> bool:
    """Have systemctl do something; False if it did not, which is told."""
    from nbdbackupd import proc
    from nbdbackupd.errors import ProcessError

    try:
        proc.output(["systemctl", "--no-ask-password", *words], timeout=SYSTEMCTL_SECONDS)
    except ProcessError as err:
        tell(str(err))
        return False
    return True


def _tree(directory: Path) -> dict[str, str]:
    """What a directory of generated units holds of ours: texts of drop-ins, and links."""
    try:
        found = [*directory.glob(f"{unitname.RUNNER}@*.d/{DROP_IN}")]
        for template in TEMPLATES:
            found += directory.glob(f"{WANTS}/{template}@*")
        return {
            str(path.relative_to(directory)): str(path.readlink())
            if path.is_symlink()
            else path.read_text()
            for path in found
        }
    except OSError:
        return {}


def _links(tree: Mapping[str, str]) -> set[str]:
    return {path.removeprefix(f"{WANTS}/") for path in tree if path.startswith(f"{WANTS}/")}


def enabled_names(units: Path, template: str = unitname.RUNNER) -> tuple[str, ...]:
    """The domains whose timers of a template the administrator has enabled, by name."""
    try:
        links = [path.name for folder in units.glob("*.wants") for path in folder.iterdir()]
    except OSError:
        return ()
    names = (unitname.domain_of(link) for link in sorted(links) if link.endswith(".timer"))
    ours = {unitname.unit(template, name, "timer"): name for name in names if name}
    return tuple(name for unit, name in ours.items() if unit in links)


def _main_only(configuration: "Configuration") -> "Configuration":
    from nbdbackupd.config.files import Configuration

    files = tuple(file for file in configuration.files if file.match is None)
    return Configuration(files=files, problems=configuration.problems)


def _write_timer(output: Path, unit: str, timer: "TimerSettings", *, begins: bool) -> None:
    _write(output, unit, _drop_in(timer))
    if begins and timer.calendar != ():
        _want(output, unit)


def _want(output: Path, unit: str) -> None:
    """Have a timer begin with the others."""
    wants = output / WANTS
    wants.mkdir(exist_ok=True)
    (wants / unit).symlink_to(VENDOR / f"{unit.partition('@')[0]}@.timer")


def _write(output: Path, unit: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    folder = output / f"{unit}.d"
    folder.mkdir(exist_ok=True)
    text = "\n".join(["# Made by nbdbackup-generator from /etc/nbdbackup", *lines])
    (folder / DROP_IN).write_text(text + "\n")


def _drop_in(timer: "TimerSettings") -> list[str]:
    """The lines of a drop-in; none if the unit's own values hold."""
    lines: list[str] = []
    if timer.calendar == ():
        # a timer without an event would be refused, and shown as broken
        lines += ["[Timer]", "OnCalendar=", f"OnCalendar={NEVER}"]
    elif timer.calendar is not None:
        # the empty one takes away what the unit says
        lines += ["[Timer]", "OnCalendar="]
        lines += [f"OnCalendar={_literal(event)}" for event in timer.calendar]
    if timer.random_delay is not None:
        lines += ["[Timer]", f"RandomizedDelaySec={timer.random_delay:.3f}s"]
    return lines


def _literal(text: str) -> str:
    """A value in which systemd sees no specifiers."""
    return text.replace("%", "%%")


def _try(tell: Tell, unit: str, write: Callable[[], None]) -> bool:
    try:
        write()
    except OSError as err:
        tell(f"{unit}: can't write its schedule: {err.strerror}")
        return False
    return True


def _teller(environ: Mapping[str, str]) -> Tell:
    """To the kernel's log if systemd calls, since the journal may not be there yet; else stderr."""

    def tell(text: str) -> None:
        line = f"nbdbackup-generator: {_one_line(text)}"
        if "SYSTEMD_SCOPE" in environ:
            try:
                with KMSG.open("w") as log:
                    log.write(f"<4>{line}\n")
            except OSError:
                pass
            else:
                return
        print(line, file=sys.stderr)

    return tell


def _one_line(text: str) -> str:
    return plain.line(text)[:900]
