"""The files below ``/etc/nbdbackup``: each read by the schema as far as it can be.

One pass finds all that is wrong.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from nbdbackupd.config import kinds, reading, schema
from nbdbackupd.config.matching import MATCHERS, METADATA, Match
from nbdbackupd.config.reading import MappingNode, Node, Problem, ScalarNode, SequenceNode
from nbdbackupd.config.schema import BY_PATH, MATCH, SECTIONS
from nbdbackupd.config.setting import Setting
from nbdbackupd.errors import ConfigError

SECRETS: Final = frozenset({"password", "passwd", "passphrase", "secret", "token", "key"})
MAX_ITEMS: Final = 1000
Pairs = dict[str, tuple[Node, Node]]


@dataclass(frozen=True, slots=True)
class Value:
    """A value and where it stands; the line counts from 1."""

    value: Any
    file: str
    line: int


class Interpreter:
    """Reads one file's tree; ``problems`` and ``places``, as of ConfigFile, grow meanwhile."""

    def __init__(
        self, path: Path, *, is_main: bool, event_fault: Callable[[str], str] | None = None
    ) -> None:
        self.file = str(path)
        self.is_main = is_main
        self.problems: list[Problem] = []
        self.places: dict[tuple[str, str], int] = {}
        self._event_fault = event_fault
        self._values: dict[str, Value] = {}

    def interpret(self, root: Node | None) -> tuple[Match | None, dict[str, Value]]:
        """The file's condition, None for the main file, and its values.

        Raises UnreadableError if the tree as a whole is of no use.
        """
        match = None if self.is_main else Match(metadata={})
        pairs = self._pairs(root, "") if root is not None else {}
        if not self.is_main and MATCH not in pairs:
            line = root.start_mark.line + 1 if root is not None else 0
            self._complain(line, MATCH, "is missing: it says which domains the file is for")
        for key, (name, value) in pairs.items():
            if key == MATCH and not self.is_main:
                match = self._match(value)
            elif key in SECTIONS:
                self._section(key, value)
            elif key in BY_PATH:
                self._setting(BY_PATH[key], name, value)
            else:
                self._unknown(key, name, "", [*SECTIONS, *_lone(), *([MATCH] * (not self.is_main))])
        if match is None or not match.sole_name:
            given = [path for path, each in self._values.items() if each.value is not None]
            for path in filter(lambda path: BY_PATH[path].single, given):
                self._complain(
                    self._values.pop(path).line, path, "is for one machine; give match its name"
                )
        return match, self._values

    def _section(self, section: str, node: Node) -> None:
        if _is_empty(node):
            return  # a section whose settings are all commented out
        for key, (name, value) in self._pairs(node, section).items():
            setting = BY_PATH.get(f"{section}.{key}")
            if setting is not None:
                self._setting(setting, name, value)
            else:
                known = [each.key for each in BY_PATH.values() if each.section == section]
                self._unknown(key, name, section, known)

    def _setting(self, setting: Setting[Any], name: Node, node: Node) -> None:
        line = _line(name)
        if not setting.everywhere and not self.is_main:
            self._complain(line, setting.path, f"is for all domains; move it to {schema.MAIN}")
            return
        if setting.kind.many:
            value: Any = self._list(setting, node)
        else:
            text = self._scalar(node, setting.path)
            value = None if text is None else self._parse(setting, text, _line(node))
            if text is None or isinstance(value, _Bad):
                return
        self._values[setting.path] = Value(value, self.file, line)

    def _list(self, setting: Setting[Any], node: Node) -> tuple[Any, ...]:
        found = []
        for text, line in self._texts(node, setting.path):
            value = self._parse(setting, text, line)
            if value in found:
                self._complain(line, setting.path, f"{text!r} stands there twice; remove one")
            elif not isinstance(value, _Bad):
                found.append(value)
        return tuple(found)

    def _parse(self, setting: Setting[Any], text: str, line: int) -> Any:
        try:
            value = setting.kind.parse(text)
        except ValueError as err:
            self._complain(line, setting.path, str(err))
            return _Bad()
        fault = ""
        if self._event_fault and setting.kind.parse is kinds.CALENDAR.parse:
            fault = self._event_fault(value)
        if fault:
            self._complain(line, setting.path, fault)
        return _Bad() if fault else value

    def _match(self, node: Node) -> Match:
        found: dict[str, tuple[str, ...]] = {}
        metadata: dict[str, tuple[str, ...]] = {}
        pairs = {} if _is_empty(node) else self._pairs(node, MATCH)
        if not pairs and isinstance(node, MappingNode | ScalarNode):
            words = ", ".join(MATCHERS)
            self._complain(_line(node), MATCH, f"says nothing; give one of {words}")
        for key, (name, value) in pairs.items():
            path = f"{MATCH}.{key}"
            if key == METADATA:
                metadata = {
                    label: self._patterns(each, f"{path}.{label}")
                    for label, (_, each) in self._pairs(value, path).items()
                }
                if not metadata:
                    self._complain(_line(name), path, "says nothing; give labels with patterns")
            elif key in MATCHERS:
                found[key] = self._patterns(value, path)
                if key == "regex":
                    self._check_regexes(value, path)
            else:
                self._unknown(key, name, MATCH, list(MATCHERS))
        return Match(
            names=found.get("name", ()),
            globs=found.get("glob", ()),
            regexes=found.get("regex", ()),
            metadata=metadata,
        )

    def _patterns(self, node: Node, path: str) -> tuple[str, ...]:
        found = self._texts(node, path)
        self.places |= {(path, text): line for text, line in found}
        texts = tuple(text for text, _ in found)
        if not texts and isinstance(node, SequenceNode):
            self._complain(_line(node), path, "an empty list fits no domain; give a text")
        return texts

    def _check_regexes(self, node: Node, path: str) -> None:
        for text, line in self._texts(node, path, silent=True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # "possible nested set" means a slip
                    re.compile(text)
            except (re.error, OverflowError, RecursionError, FutureWarning) as err:
                self._complain(line, path, f"not a regular expression: {text!r}: {err}; fix it")

    def _texts(self, node: Node, path: str, *, silent: bool = False) -> list[tuple[str, int]]:
        """The texts of a list, each with its line; a single one counts as a list."""
        items = node.value if isinstance(node, SequenceNode) else [node]
        if len(items) > MAX_ITEMS:
            self._complain(_line(node), path, f"more than {MAX_ITEMS} values; drop some")
            return []
        known = len(self.problems)
        found = [(self._scalar(item, path), _line(item)) for item in items]
        if silent:
            del self.problems[known:]
        return [(text, line) for text, line in found if text is not None]

    def _scalar(self, node: Node, path: str) -> str | None:
        """The text of a scalar, None with a problem for everything else."""
        if isinstance(node, ScalarNode) and node.tag in reading.TAGS:
            if not _is_empty(node):
                return node.value
            setting = BY_PATH.get(path)
            example = f" (default: {setting.kind.show(setting.default)})" if setting else ""
            quotes = f"; if {node.value} is the text, put it in quotes" if node.value else ""
            message = f"has no value; give one{example} or remove the line{quotes}"
            self._complain(_line(node), path, message)
        elif node.tag not in reading.TAGS:
            self._complain(_line(node), path, f"the tag {_tag(node)} is not allowed; remove it")
        else:
            form = "list" if isinstance(node, SequenceNode) else "section"
            self._complain(_line(node), path, f"a single value is wanted here, not a {form}")
        return None

    def _pairs(self, node: Node, path: str) -> Pairs:
        """Keys and values of a section; duplicates and odd keys are problems."""
        found: Pairs = {}
        if not isinstance(node, MappingNode) or node.tag not in reading.TAGS:
            if node.tag not in reading.TAGS:
                message = f"the tag {_tag(node)} is not allowed; remove it"
            else:
                message = "a section with lines 'key: value' is wanted here"
            self._complain(_line(node), path, message)
            return found
        for key, value, merged in reading.pairs(node):
            if not isinstance(key, ScalarNode) or key.tag not in reading.TAGS:
                self._complain(_line(key), path, "a key must be a plain word")
            elif key.value not in found:
                found[key.value] = key, value
            elif not merged:
                first = _line(found[key.value][0])
                self._complain(
                    _line(key),
                    _join(path, key.value),
                    f"stands in line {first} already; remove one of them",
                )
        return found

    def _unknown(self, key: str, name: Node, section: str, known: list[str]) -> None:
        path = _join(section, key)
        if key == MATCH:
            message = f"belongs into a file of {schema.DOMAINS}"
        elif key.lower() in SECRETS and key not in known:
            message = (
                "secrets don't belong here; use libvirt.password_file or "
                "libvirt.password_credential"
            )
        else:
            message = f"unknown key{_guess(key, section, known)}"
        self._complain(_line(name), path, message)

    def _complain(self, line: int, path: str, message: str) -> None:
        self.problems.append(Problem(self.file, line, path, message))


class _Bad:
    """Stands for a value that was refused."""


def _guess(key: str, section: str, known: list[str]) -> str:
    """``; how to fix it``: the nearest key of the section, else that of another one."""
    plain = key.lower().replace("-", "_")
    near = get_close_matches(plain, known, 1, 0.7)
    if not near:
        others = {each.key: each.path for each in reversed(list(BY_PATH.values()))} | dict(
            zip(BY_PATH, BY_PATH, strict=True)
        )
        near = [others[each] for each in get_close_matches(plain, others, 1, 0.8)]
    near = near or get_close_matches(plain, known, 1)
    if near:
        return f" (did you mean '{near[0]}'?)"
    where = f"'{section}'" if section else "a file"
    return f"; {where} may hold {kinds.spoken(tuple(sorted(known)))}"


def _lone() -> list[str]:
    return [path for path, setting in BY_PATH.items() if not setting.section]


def _join(section: str, key: str) -> str:
    shown = key if key.isprintable() and len(key) < 100 else repr(key[:100])
    return f"{section}.{shown}" if section else shown


def _is_empty(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.style is None and node.value.lower() in kinds.EMPTY


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _tag(node: Node) -> str:
    return node.tag.replace("tag:yaml.org,2002:", "!!")


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
        reader = Interpreter(path, is_main=is_main, event_fault=event_fault)
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


def signature(directory: Path) -> frozenset[tuple[str | int, ...]]:
    """What changes when one of the files does: names, inodes, sizes, modes and times of change."""
    places = [directory / schema.MAIN]
    with contextlib.suppress(OSError):
        places += (directory / schema.DOMAINS).iterdir()
    found: set[tuple[str | int, ...]] = set()
    for each in places:
        with contextlib.suppress(OSError):
            of = each.stat()
            found.add((str(each), of.st_ino, of.st_size, of.st_mode, of.st_ctime_ns))
    return frozenset(found)


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
    if get("agent") and not get("qmp"):
        complain("agent", "agent", "is for a QEMU without libvirt: add qmp, or remove it")
    for name in ("on_shutdown", "standby", "start_paused"):
        if get("qmp") and get(name):
            complain(
                "qmp", name, f"a QEMU without libvirt knows no {name}; set {name}: no in its file"
            )
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
