"""What a check of a domain found: one line each, with what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """``warn``: a backup works, though less well than it could; ``fail``: it will not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Area(StrEnum):
    """What a finding is about; in the order in which they are told."""

    CONFIGURATION = "configuration"
    HOST = "host"
    LIBVIRT = "libvirt"
    DISKS = "disks"
    CHECKPOINTS = "checkpoints"
    GUEST = "guest"
    SCRATCH = "scratch"
    TARGET = "target"
    ACCESS = "access"
    RUNS = "runs"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``advice`` says how to fix what is not right."""

    severity: Severity
    area: Area
    text: str
    advice: str = ""

    @classmethod
    def fail(cls, area: Area, text: str, advice: str) -> "Finding":
        """What no backup gets along with."""
        return cls(Severity.FAIL, area, text, advice)

    def to_json(self) -> dict[str, Any]:
        """The finding as a JSON object."""
        return {
            "severity": self.severity.value,
            "area": self.area.value,
            "text": self.text,
            "advice": self.advice,
        }


def worst(findings: Iterable[Finding]) -> Severity:
    """The gravest severity; of no findings at all: ok."""
    order = list(Severity)
    return max((each.severity for each in findings), key=order.index, default=Severity.OK)


class Notes:
    """Findings of one area, in the making."""

    def __init__(self, area: Area) -> None:
        self._area = area
        self._found: list[Finding] = []

    def ok(self, text: str) -> None:
        """Note what is as it should be, or can't be told and does no harm."""
        self._found.append(Finding(Severity.OK, self._area, text))

    def warn(self, text: str, advice: str = "") -> None:
        """Note what a backup gets along with."""
        self._found.append(Finding(Severity.WARN, self._area, text, advice))

    def fail(self, text: str, advice: str = "") -> None:
        """Note what a backup would fail at."""
        self._found.append(Finding(Severity.FAIL, self._area, text, advice))

    def done(self) -> tuple[Finding, ...]:
        """All that was noted."""
        return tuple(self._found)
