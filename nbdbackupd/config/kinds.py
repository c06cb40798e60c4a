"""Kinds of values: how each is read from the text of a YAML scalar, and written as one.

A scalar is always taken as the text that stands in the file, and read by the kind that its
setting has. So none of YAML's guesses can happen: a domain may be called ``no`` or ``0755``, and
``02:30`` is never the number 150.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from nbdbackupd.config import calendar
from nbdbackupd.model.chain import Codec, Compression
from nbdbackupd.units import LEAST_RATE, parse_duration, parse_size

TRUE: Final = frozenset({"true", "yes", "on"})
FALSE: Final = frozenset({"false", "no", "off"})
EMPTY: Final = frozenset({"", "~", "null"})
"""Plain scalars that YAML takes for no value."""

UNITS: Final = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))
TIMES: Final = ((604800, "w"), (86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
PLAIN: Final = re.compile(r"\.?[A-Za-z/][\w./@+-]*", re.ASCII)
SPECIAL: Final = frozenset({"y", "n", ".inf", ".nan"})
"""Others that some readers of YAML take for something else than a text."""

MAX_TEXT: Final = 4096

LEVELS: Final[dict[str, int]] = {Codec.LZ4: 2, Codec.ZSTD: 1}
MOST_LEVELS: Final[dict[str, int]] = {Codec.LZ4: 16, Codec.ZSTD: 19}
"""What a codec stands for without a level, and the highest one."""


T = TypeVar("T")
Word = TypeVar("Word", bound=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[T]):
    """What a value must be.

    ``name`` is the word for it in the manual. ``parse`` makes the value of a scalar's text, or
    raises ValueError with what is wrong and how to fix it; ``render`` is its opposite. ``many``:
    the setting is a list of such values. ``words`` are all values that there are, if few.
    """

    name: str
    parse: Callable[[str], Any]
    render: Callable[[Any], str]
    many: bool = False
    words: tuple[str, ...] = ()

    def show(self, value: Any) -> str:
        """The value as YAML, on one line."""
        if self.many:
            return f"[{', '.join(self.render(each) for each in value)}]"
        return self.render(value)


def quoted(text: str) -> str:
    """A text as a YAML scalar: plain where every reader of YAML takes it for a text."""
    if PLAIN.fullmatch(text) and text.lower() not in TRUE | FALSE | EMPTY | SPECIAL:
        return text
    return "'" + text.replace("'", "''") + "'"


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give a text or remove the line")
    if len(text) > MAX_TEXT:
        raise ValueError(f"has {len(text)} characters; {MAX_TEXT} are the limit")
    if not text.isprintable():
        raise ValueError("contains a line break or a control character; write it on one line")
    return text


def _path(text: str) -> Path:
    if not _text(text).startswith("/"):
        raise ValueError(f"not an absolute path: {text!r}; begin with '/'")
    if ".." in text.split("/"):
        raise ValueError(f"'..' in a path: {text!r}; write the path without it")
    return Path(text)


def _file_name(text: str) -> str:
    if "/" in _text(text) or text in (".", ".."):
        raise ValueError(f"not the name of a file: {text!r}; give it without a directory")
    return text


def _bool(text: str) -> bool:
    if text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    raise ValueError(f"not yes or no: {text!r}; write 'yes' or 'no'")


def _command(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(_text(text)))
    except ValueError as err:
        raise ValueError(f"not a command: {text!r}: {str(err).lower()}; fix the quotes") from err
    if not words or not words[0].startswith("/"):
        raise ValueError(f"not a command: {text!r}; begin with the program's absolute path")
    return words


def _size_text(size: int) -> str:
    for unit, letter in UNITS:
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def _duration_text(seconds: float) -> str:
    for unit, letter in TIMES:
        if seconds and seconds % unit == 0:
            return f"{seconds / unit:.0f}{letter}"
    return f"{seconds:g}s"


def _days(text: str) -> int:
    found = re.fullmatch(r"(\d{1,5})\s*([dw])", text.strip(), re.ASCII)
    days = int(found[1]) * (7 if found[2] == "w" else 1) if found else 0
    if not 1 <= days <= 36500:
        raise ValueError(f"not a number of days or weeks: {text!r} (examples: 7d, 4w)")
    return days


def _uri(text: str) -> str:
    found = re.fullmatch(r"[a-z][a-z0-9+.-]*://([^/]*)(/.*)?", _text(text), re.ASCII)
    if found is None:
        raise ValueError(f"not a libvirt URI: {text!r} (example: qemu:///system)")
    if ":" in found[1].rpartition("@")[0]:
        raise ValueError("a password in a URI; use password_file or password_credential")
    return text


def _rate(text: str) -> int:
    rate = parse_size(text)
    if rate < LEAST_RATE:
        raise ValueError(f"{text!r} is too slow for a run to end; give 64K or more")
    return rate


def _mail(text: str) -> str:
    # as sendmail takes it on its command line: an account of this host, or one elsewhere
    if re.fullmatch(r"[^\s@<>,;:\"()\\-][^\s@<>,;:\"()\\]*(?:@[\w.\[\]:-]+)?", _text(text)) is None:
        raise ValueError(f"not a mail address: {text!r} (examples: root, admin@example.org)")
    return text


def _calendar(text: str) -> str:
    fault = calendar.plain_fault(_text(text))
    if fault:
        raise ValueError(fault)
    return text


TEXT: Final[Kind[str]] = Kind(name="text", parse=_text, render=quoted)
PATH: Final[Kind[Path]] = Kind(name="path", parse=_path, render=lambda path: quoted(str(path)))
FILE_NAME: Final[Kind[str]] = Kind(name="file name", parse=_file_name, render=quoted)
BOOL: Final[Kind[bool]] = Kind(
    name="yes or no", parse=_bool, render=lambda value: "yes" if value else "no"
)
RATE: Final[Kind[int]] = Kind(name="size", parse=_rate, render=_size_text)
MAIL: Final[Kind[str]] = Kind(name="mail address", parse=_mail, render=quoted)
SIZE: Final[Kind[int]] = Kind(name="size", parse=parse_size, render=_size_text)
DURATION: Final[Kind[float]] = Kind(name="duration", parse=parse_duration, render=_duration_text)
DAYS: Final[Kind[int]] = Kind(name="days", parse=_days, render=lambda days: f"{days}d")
URI: Final[Kind[str]] = Kind(name="URI", parse=_uri, render=quoted)
CALENDAR: Final[Kind[str]] = Kind(name="calendar event", parse=_calendar, render=quoted)
COMMAND: Final[Kind[tuple[str, ...]]] = Kind(
    name="command", parse=_command, render=lambda words: quoted(shlex.join(words))
)


def count(least: int, most: int) -> Kind[int]:
    """A whole number, both limits included."""

    def parse(text: str) -> int:
        if re.fullmatch(r"-?\d{1,12}", text, re.ASCII) is None:
            raise ValueError(f"not a whole number: {text!r}; give one from {least} to {most}")
        if len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0"):
            # octal in YAML 1.1, decimal in YAML 1.2: nobody can tell what was meant
            raise ValueError(f"a number with a leading zero: {text!r}; write it without")
        if not least <= int(text) <= most:
            raise ValueError(f"out of range: {text}; give a number from {least} to {most}")
        return int(text)

    return Kind(name=f"number from {least} to {most}", parse=parse, render=str)


def choice(*words: Word) -> Kind[Word]:
    """One of some words."""

    def parse(text: str) -> Word:
        if text in words:
            return next(word for word in words if word == text)
        near: list[str] = get_close_matches(text.lower(), [*words], 1)
        if text.lower() in FALSE:
            near = [word for word in words if word in ("never", "none")]
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"not a valid value: {text!r}; use {spoken(words)}{hint}")

    return Kind(name=spoken(words), parse=parse, render=quoted, words=words)


def _compression(text: str) -> Compression:
    codec, is_told, level = text.partition(":")
    if re.fullmatch(r"-?\d+", text, re.ASCII):
        codec, is_told, level = Codec.LZ4, ":", text  # as it was when there was no other
    if codec not in MOST_LEVELS:
        raise ValueError(f"not a compression: {text!r}; use lz4, zstd, or one with a level: zstd:3")
    parsed = count(1, MOST_LEVELS[codec]).parse(level) if is_told else LEVELS[codec]
    return Compression(Codec(codec), parsed)


COMPRESSION: Final[Kind[Compression]] = Kind(
    name="lz4, zstd, one of them with a level, or a level of lz4", parse=_compression, render=str
)


def optional(kind: Kind[T], word: str) -> Kind[T | None]:
    """The same, or a word that stands for None."""

    def parse(text: str) -> Any:
        if text == word:
            return None
        if text.lower() in FALSE | {"none", "never", "unlimited", "infinity"}:
            raise ValueError(f"not a {kind.name}: {text!r}; write '{word}' for none")
        try:
            return kind.parse(text)
        except ValueError as err:
            raise ValueError(f"{err}, or '{word}'") from err

    return Kind(
        name=f"{kind.name}, or {word}",
        parse=parse,
        render=lambda value: word if value is None else kind.render(value),
    )


def listed(kind: Kind[T]) -> Kind[tuple[T, ...]]:
    """A list of such values; a single one may stand without brackets."""
    return Kind(
        name=f"list: {kind.name}", parse=kind.parse, render=kind.render, many=True, words=kind.words
    )


def threads(text: str) -> int:
    """A number from 1 to 64, as options have it."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise ValueError(f"not a number from 1 to 64: {text!r}")
    return int(text)


def compress(text: str) -> Compression:
    """A compression as options have it; the domain after a bare ``-z`` ends up here, too."""
    try:
        return _compression(text)
    except ValueError as err:
        raise ValueError(f"{err} (if that is the domain, give it before -z)") from err


def spoken(words: tuple[str, ...]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    head = ", ".join(words[:-1])
    return f"{head} or {words[-1]}" if head else words[-1]
