"""What an entry of the table of settings is, and what is made of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar, overload

from nbdbackupd.config.kinds import Kind

T = TypeVar("T")

GLOBAL: Final = "global options"
"""The group of options that all verbs have."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of the command line for a setting: of ``backup``, or of all verbs.

    ``usage`` is what a manual shows: ``-z, --compress [LEVEL]``, ``--freeze auto|never``.
    ``group`` is its heading in the help, and ``help`` what stands there if the setting's own does
    not fit. ``read`` makes the value of its argument, or raises ValueError; as in the files if it
    is None. ``value`` is what the option means without an argument. ``other`` is one for the same
    setting, which excludes it.
    """

    usage: str
    group: str
    read: Callable[[str], Any] | None = None
    _: KW_ONLY
    value: Any = None
    help: str = ""
    other: "Option | None" = None

    @property
    def flags(self) -> tuple[str, ...]:
        """Its spellings, the long one last."""
        return tuple(word for word in self.usage.replace(",", " ").split() if word[0] == "-")

    @property
    def name(self) -> str:
        """What the parsed arguments call it."""
        return self.flags[-1].lstrip("-").replace("-", "_")

    @property
    def argument(self) -> str:
        """What the usage calls its argument; empty if it takes none."""
        return self.usage.partition(self.flags[-1])[2].strip(" []")

    @property
    def words(self) -> tuple[str, ...]:
        """All arguments that there are, if they are few."""
        return tuple(self.argument.split("|")) if "|" in self.argument else ()

    @property
    def is_bare(self) -> bool:
        """Whether its argument may be left out."""
        return self.usage.endswith("]")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from; a default has no ``file``, an option no ``line``."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file or "default"


DEFAULT: Final = Origin()
GIVEN: Final = Origin("command line")


class Valued(Protocol):
    """Holds a value for each setting, by path."""

    @property
    def values(self) -> Mapping[str, Any]:
        """The values."""


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """One setting; as an attribute of what is ``Valued``, its value there.

    ``path`` is its name in the files; the attribute has the same with ``_`` for the dot.
    ``example`` is a value, as YAML, for a setting whose default is empty. ``everywhere``: may also
    stand in a file for some domains; else in the main file only. ``single``: only in a file whose
    match is one name.
    """

    path: str
    kind: Kind[T]
    default: T
    _: KW_ONLY
    help: str
    example: str = ""
    option: Option | None = None
    everywhere: bool = True
    single: bool = False

    @overload
    def __get__(self, holder: None, owner: type) -> "Setting[T]": ...

    @overload
    def __get__(self, holder: Valued, owner: type) -> T: ...

    def __get__(self, holder: Valued | None, owner: type) -> "Setting[T] | T":
        return self if holder is None else holder.values[self.path]

    @property
    def section(self) -> str:
        """The first part of the path, or empty for a setting that stands alone."""
        return self.path.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def field(self) -> str:
        """The name of the attribute that has its value."""
        return self.path.replace(".", "_")

    @property
    def options(self) -> tuple[Option, ...]:
        """Its options on the command line."""
        return tuple(filter(None, (self.option, self.option.other))) if self.option else ()

    def help_of(self, option: Option) -> str:
        """What the command line says of an option for it."""
        return option.help or f"{self.help[:1].lower()}{self.help[1:].removesuffix('.')}"

    def read(self, option: Option, text: str) -> Any:
        """The value that an argument of an option means. Raises ValueError."""
        if option.read is not None:
            return option.read(text)
        if self.kind.many:
            return tuple(map(self.kind.parse, names(text)))
        return self.kind.parse(text)


def names(text: str) -> tuple[str, ...]:
    """``vda,vdb`` as names. Raises ValueError."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise ValueError("expected names with commas between them")
    return found


def groups(table: Iterable[Setting[Any]]) -> list[tuple[str, list[Setting[Any]]]]:
    """The settings in order, those of a section together; a lone one has an empty section."""
    found: list[tuple[str, list[Setting[Any]]]] = []
    sections: dict[str, list[Setting[Any]]] = {}
    for setting in table:
        if setting.section in sections:
            sections[setting.section].append(setting)
        else:
            found.append((setting.section, [setting]))
            if setting.section:
                sections[setting.section] = found[-1][1]
    return found


def paths(text: str) -> tuple[Path, ...]:
    """``/mnt,/var``; of a guest, so that no form of them is wrong."""
    return tuple(map(Path, names(text)))
