"""The exception tree: one class per kind of failure, each with its exit code.

::

    NbdbackupError 1
    |- UsageError 2              options that contradict one another
    |- ConfigError 10            a setting that can't work
    |- DomainError 20            libvirt or the domain
    |  |- DomainNotFoundError
    |  |- ElsewhereError        another host has the domain, or may
    |  |- NotSupportedError      a disk, image or libvirt that can't do what was asked
    |  |- CheckpointError        a checkpoint or bitmap is missing or broken
    |  `- FreezeError            the guest's file systems could not be frozen
    |     `- AgentAnswerError    its agent has said so
    |- SourceError 30            where the blocks come from
    |  |- NbdError
    |  |- ScratchSpaceError      scratch space too small or filling up
    |  `- ProcessError           a program that we ran failed
    |- FormatError 40            bytes of a backup that are not what they should be
    |  |- UnsupportedVersionError
    |  `- IntegrityError
    |- RepositoryError 50        the set or its directory
    |  |- ChainBrokenError
    |  |- NoFullError
    |  `- NoSpaceError
    `- BusyError 75              locked or busy: try later
       `- GaveWayError           the domain is being started, which comes first

    Interrupted 128+n            a BaseException: no ``except Exception`` may eat it

Every error carries ``fields``: what is known about the place (domain, disk, file, offset), used
in messages, unless they say it already, and later as journal fields. The message itself is one
line: what, where, how to fix it.
"""

import re
from typing import ClassVar, Final

WARNED: Final = 3
"""The exit status of a run that is done, with warnings."""

MEANINGS: Final = {
    "0": "done",
    "1": "a bug in this program, with a traceback",
    "2": "the command line is wrong or contradicts itself",
    "3": "done, with warnings",
    "10": "the configuration",
    "20": "the domain or libvirt",
    "30": "the source of the blocks, or a program",
    "40": "damaged data, or an unknown format",
    "50": "the backup set or its directory",
    "75": "locked or busy: try later",
    "128+n": "ended by signal n",
}
"""What each exit status means: for ``--help``, notifications, and all pages that tell of it."""


class NbdbackupError(Exception):
    """Base of all expected failures; ``exit_code`` is the documented exit status."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        detail = ", ".join(
            f"{name}={value}"
            for name, value in self.fields.items()
            if not re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", self.message)
        )
        return f"{self.message} ({detail})" if detail else self.message


class UsageError(NbdbackupError):
    """The request contradicts itself or the command line is wrong."""

    exit_code = 2


class ConfigError(NbdbackupError):
    """A setting (directory, size, URI) that can't work on this host."""

    exit_code = 10


class DomainError(NbdbackupError):
    """libvirt refused or the domain is in the wrong state."""

    exit_code = 20


class DomainNotFoundError(DomainError):
    """No domain of that name or UUID."""


class ElsewhereError(DomainError):
    """Another host has the domain, or may: it is that host's to save."""


class NotSupportedError(DomainError):
    """An image format, disk type or libvirt version that can't do what was asked."""


class CheckpointError(DomainError):
    """A checkpoint or its bitmap is missing or inconsistent."""


class FreezeError(DomainError):
    """The guest's file systems could not be frozen and the request demanded it."""


class AgentAnswerError(FreezeError):
    """The agent has answered a thaw, with an error. ``is_thawed``: nothing is frozen all the same.

    Other FreezeErrors mean that nobody has answered.
    """

    def __init__(self, message: str, *, is_thawed: bool, **fields: object) -> None:
        super().__init__(message, **fields)
        self.is_thawed = is_thawed


class SourceError(NbdbackupError):
    """Blocks could not be read from where they come from."""

    exit_code = 30


class NbdError(SourceError):
    """An NBD server refused, died, stalled or answered nonsense."""


class ScratchSpaceError(SourceError):
    """Scratch space is too small for the job, or was filling up during it."""


class ProcessError(SourceError):
    """A program that we ran failed; the message carries its last line of stderr."""


class FormatError(NbdbackupError):
    """Bytes of a backup set are not what the format says."""

    exit_code = 40


class UnsupportedVersionError(FormatError):
    """Written by a newer version of the format than this program reads."""


class IntegrityError(FormatError):
    """A digest, size or coverage does not match: the data is damaged."""


class RepositoryError(NbdbackupError):
    """The set or its directory can't be used as asked."""

    exit_code = 50


class ChainBrokenError(RepositoryError):
    """A parent is missing, or points do not hang together."""


class NoFullError(RepositoryError):
    """An increment was asked of a set that holds no usable full."""


class NoSpaceError(RepositoryError):
    """The target has no space left."""


class BusyError(NbdbackupError):
    """Somebody else works on this set or domain; trying later may succeed."""

    exit_code = 75


class GaveWayError(BusyError):
    """The run let go of the images of a domain that was off and is being started."""


class Interrupted(BaseException):
    """A signal asked the run to end; the exit status is 128 plus its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention for death by signal."""
        return 128 + self.signum


def one_line(err: BaseException) -> str:
    """What an error says, as one line; what kind it is, if it says nothing."""
    return " ".join(str(err).split()) or type(err).__name__
