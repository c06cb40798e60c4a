"""The files below ``/etc/nbdbackup``: each read as far as it can be, all problems collected."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdbackupd.config import interpreting, reading, schema
from nbdbackupd.config.interpreting import Value
from nbdbackupd.config.matching import Match
from nbdbackupd.config.reading import Problem
from nbdbackupd.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFile:
    """What one file says. ``match`` is None for the main file, whose values are for all.

    ``places`` tells the line of each text of the match, by the path of its condition and the text.
    """

    path: Path
    match: Match | None
    values: Mapping[str, Value]
    places: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """All files in the order in which they count: the main file, then the others by name."""

    files: tuple[ConfigFile, ...] = ()
    problems: tuple[Problem, ...] = field(default=())

    def require_sound(self) -> "Configuration":
        """This, if it has no problem. Raises ConfigError, which names the first one."""
        if not self.problems:
            return self
        more = len(self.problems) - 1
        rest = f" ({more} more: 'nbdbackupctl config check' shows all)" if more else ""
        raise ConfigError(f"{self.problems[0]}{rest}")


def read_all(
    directory: Path = schema.DIRECTORY, *, event_fault: Callable[[str], str] | None = None
) -> Configuration:
    """Read the main file and those of ``domains.d``; none of them need be there.

    ``event_fault`` tells what is wrong with a calendar event, beyond its form.
    """
    files: list[ConfigFile] = []
    problems: list[Problem] = []
    main = directory / schema.MAIN
    found = [(main, True)] if _is_there(main, problems) else []
    found += [(path, False) for path in _domain_files(directory / schema.DOMAINS, problems)]
    for path, is_main in found:
        reader = interpreting.Interpreter(path, is_main=is_main, event_fault=event_fault)
        try:
            match, values = reader.interpret(reading.read(path))
        except reading.UnreadableError as err:
            reader.problems.append(Problem(str(path), err.line, "", err.message))
            match, values = None, {}
        else:
            files.append(ConfigFile(path=path, match=match, values=values, places=reader.places))
        problems += sorted(set(reader.problems))
    problems += _together(files, problems)
    return Configuration(files=tuple(files), problems=tuple(sorted(problems)))


def _is_there(path: Path, problems: list[Problem]) -> bool:
    """Whether a file exists; one that can't be looked at is a problem, not one that is missing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as err:
        problems.append(Problem(str(path), 0, "", f"can't be read: {err.strerror}"))
        return False
    return True


def _domain_files(directory: Path, problems: list[Problem]) -> Iterable[Path]:
    try:
        names = sorted(each.name for each in directory.iterdir())
    except FileNotFoundError:
        return
    except OSError as err:
        problems.append(Problem(str(directory), 0, "", f"can't be read: {err.strerror}"))
        return
    for name in names:
        if name.startswith("."):
            continue
        if name.endswith(".yaml"):
            yield directory / name
        elif name.endswith(".yml"):
            message = "is not read; rename it to end in .yaml"
            problems.append(Problem(str(directory / name), 0, "", message))


def _together(files: list[ConfigFile], known: list[Problem]) -> list[Problem]:
    """Contradictions within one file, or between a file and the main file."""
    main = next((each for each in files if each.match is None), None)
    found: list[Problem] = []
    for file in files:
        found += contradictions([*([main] if main else []), *([file] if file is not main else [])])
    return [each for each in dict.fromkeys(found) if each not in known]


def contradictions(files: Sequence[ConfigFile]) -> list[Problem]:
    """Settings of files that apply together and exclude one another.

    A problem stands at the setting that came last, since it was added to what was sound.
    """
    found = []
    values: dict[str, Value] = {}
    for file in files:
        values |= file.values

    def get(path: str) -> Any:
        return values[path].value if path in values else schema.BY_PATH[path].default

    def complain(first: str, second: str, message: str) -> None:
        path = max((path for path in (second, first) if path in values), key=_age(files, values))
        found.append(Problem(values[path].file, values[path].line, path, message))

    both = set(get("disks.include")) & set(get("disks.exclude"))
    if both:
        names = ", ".join(sorted(both))
        message = f"both included and excluded: {names}; remove it from one of the lists"
        complain("disks.include", "disks.exclude", message)
    mount_point, path = get("repository.mount_point"), get("repository.path")
    if mount_point and not path.is_relative_to(mount_point):
        message = f"the repository {path} does not lie below {mount_point}; fix one of them"
        complain("repository.path", "repository.mount_point", message)
    if get("libvirt.password_file") and get("libvirt.password_credential"):
        message = "password_file and password_credential exclude one another; keep one of them"
        complain("libvirt.password_file", "libvirt.password_credential", message)
    if get("monitoring.warning_age") > get("monitoring.critical_age"):
        message = (
            "warning_age is longer than critical_age, and would never be reached; fix one of them"
        )
        complain("monitoring.warning_age", "monitoring.critical_age", message)
    last = files[-1].values if files else {}
    if {"freeze.policy", "freeze.mountpoints"} <= last.keys() and get("freeze.mountpoints"):
        policy = get("freeze.policy")
        if policy in ("never", "pause"):
            message = f"nothing is frozen with policy {policy}; use auto or require, or remove this"
            complain("freeze.mountpoints", "freeze.mountpoints", message)
    return found


def _age(
    files: Sequence[ConfigFile], values: Mapping[str, Value]
) -> Callable[[str], tuple[int, int]]:
    """A sort key: the later a setting was made, the larger."""
    order = {str(file.path): number for number, file in enumerate(files)}
    return lambda path: (order[values[path].file], values[path].line)
