"""A configuration file as a tree of YAML nodes, each of which knows its line.

Nothing is constructed from the nodes here, no tag is obeyed, and scalars stay the texts that they
are. The size and the depth are bounded, so that no file can exhaust memory or the stack.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd.errors import ConfigError

try:
    import yaml
except ImportError as err:
    raise ConfigError(
        "PyYAML is missing: install python3-yaml (Debian) or python3-pyyaml (Fedora, EL)"
    ) from err

Node = yaml.Node
ScalarNode = yaml.ScalarNode
SequenceNode = yaml.SequenceNode
MappingNode = yaml.MappingNode

MAX_SIZE: Final = 256 << 10
MAX_DEPTH: Final = 20
BOM: Final = b"\xef\xbb\xbf"
MERGE: Final = "<<"
MAX_MERGES: Final = 100
TAGS: Final = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:str")

HINTS: Final = (
    ("found character '\\t'", "a tab; indent with spaces"),
    (
        "mapping values are not allowed",
        "a ':' where none can be; check the indentation of this "
        "line and the one above, and put texts with ': ' in quotes",
    ),
    ("scanning an alias", "a text that begins with '*' must stand in quotes"),
    ("found undefined alias", "a text that begins with '*' must stand in quotes"),
    ("sequence entries are not allowed", "a list below a key begins on a line of its own"),
    ("scanning an anchor", "a text that begins with '&' must stand in quotes"),
    ("that cannot start any token", "a text that begins with this character must stand in quotes"),
    (
        "but found '<block mapping start>'",
        "wrong indentation; keys of one section begin in the same column",
    ),
    ("expected <block end>", "wrong indentation, or a text that needs quotes"),
    ("could not find expected ':'", "a key without ':', or a quote that is not closed"),
    ("unexpected end of stream", "a quote that is not closed"),
    ("expected a single document", "more than one document; remove the line '---'"),
    ("flow sequence", "a '[' that is not closed, or a text that begins with '[' and needs quotes"),
    ("flow mapping", "a '{' that is not closed, or a text that begins with '{' and needs quotes"),
)
"""What a YAML error's text contains, and what it mostly means."""


@dataclass(frozen=True, order=True, slots=True)
class Problem:
    """Something wrong in a file; ``line`` counts from 1, and 0 stands for the file itself."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class UnreadableError(Exception):
    """The file as a whole can't be used."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


class _Loader(yaml.BaseLoader):
    """Texts only, to a limited depth."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(0, f"nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(path: Path) -> Node | None:
    """The root of a file's tree, None if it holds nothing but comments. Raises UnreadableError."""
    return parse(_text(_bytes(path)))


def parse(text: str) -> Node | None:
    """The same of a text."""
    # everything that a YAML reader refuses, found here since the reader tells no line
    bad = re.search("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    if bad:
        raise UnreadableError(
            text.count("\n", 0, bad.start()) + 1, f"a control character, U+{ord(bad[0]):04X}"
        )
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as err:
        raise _explained(err) from err
    except RecursionError as err:
        raise UnreadableError(0, f"nested more than {MAX_DEPTH} levels deep") from err


def pairs(node: MappingNode) -> Iterator[tuple[Node, Node, bool]]:
    """Key, value, and whether it came by a merge key (``<<``), of a mapping.

    What stands in the mapping itself comes first, then what is merged, the earlier merge first.
    Raises UnreadableError for a merge of something else than mappings, or too many of them.
    """
    budget = [MAX_MERGES]
    yield from _pairs(node, budget, merged=False)


def _pairs(
    node: MappingNode, budget: list[int], *, merged: bool
) -> Iterator[tuple[Node, Node, bool]]:
    budget[0] -= 1
    sources: list[Node] = []
    for key, value in node.value:
        if _is_merge(key):
            sources += value.value if isinstance(value, SequenceNode) else [value]
        else:
            yield key, value, merged
    for source in sources:
        if not isinstance(source, MappingNode):
            line = source.start_mark.line + 1
            raise UnreadableError(line, "'<<' can merge sections only, each an alias such as *name")
        if budget[0] <= 0:
            raise UnreadableError(node.start_mark.line + 1, "too many merges ('<<')")
        yield from _pairs(source, budget, merged=True)


def _is_merge(key: Node) -> bool:
    return isinstance(key, ScalarNode) and key.value == MERGE and key.style is None


def _bytes(path: Path) -> bytes:
    try:
        # a pipe or terminal in place of the file must not hold us up
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError(0, "is no regular file")
            if status.st_mode & stat.S_IWOTH:
                raise UnreadableError(0, "may be written by everybody; 'chmod o-w' it")
            data = stream.read(MAX_SIZE + 1)
    except OSError as err:
        raise UnreadableError(0, f"can't be read: {err.strerror}") from err
    if len(data) > MAX_SIZE:
        raise UnreadableError(0, f"has more than {MAX_SIZE >> 10} KiB")
    return data


def _text(data: bytes) -> str:
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UnreadableError(1, "is UTF-16; save it as UTF-8") from err
        raise UnreadableError(line, "is not UTF-8; save it in that encoding") from err


def _explained(err: yaml.MarkedYAMLError) -> UnreadableError:
    mark = err.problem_mark or err.context_mark
    if err.context and "quoted scalar" in err.context:
        mark = err.context_mark  # where the quote begins, not the end of the file
    text = " ".join(filter(None, (err.context, err.problem)))
    hint = next((hint for part, hint in HINTS if part in text), "")
    told = " ".join((err.problem or err.context or "can't be read").split())
    line = mark.line + 1 if mark else 0
    return UnreadableError(line, f"not YAML: {hint} ({told})" if hint else f"not YAML: {told}")
