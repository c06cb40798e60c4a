"""From the tree of a file to values, by the schema; one pass finds all that is wrong."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from nbdbackupd.config import kinds, reading, schema
from nbdbackupd.config.matching import Match
from nbdbackupd.config.reading import MappingNode, Node, Problem, ScalarNode, SequenceNode
from nbdbackupd.config.schema import BY_PATH, MATCH, MATCHERS, METADATA, SECTIONS
from nbdbackupd.config.setting import Setting

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
