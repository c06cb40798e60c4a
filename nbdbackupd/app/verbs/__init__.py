"""The verbs: one module for each (or for two that belong together), imported when it is named.

A module's ``register`` adds the parsers of its verbs, and sets ``run``, which carries one out.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, Final

from nbdbackupd.app.arguments import Parser
from nbdbackupd.errors import DomainError

ALL: Final = {
    "backup": ("backup", "save a domain, running or off"),
    "run": ("run", "save a domain as the configuration says"),
    "restore": ("restore", "bring disks back"),
    "map": ("mapping", "serve a point as NBD disks"),
    "unmap": ("mapping", "end maps"),
    "boot": ("boot", "run a point as a domain, at once"),
    "mount": ("mount", "show the files of a point"),
    "unmount": ("mount", "end a mount"),
    "files": ("files", "read single files of a point"),
    "list": ("catalog", "list the restore points of a set"),
    "show": ("catalog", "show all that a set says of itself"),
    "verify": ("verify", "prove a backup set"),
    "prune": ("prune", "remove what no rule of retention wants"),
    "protect": ("protect", "keep a point whatever the rules want"),
    "unprotect": ("protect", "leave a point to the rules again"),
    "merge": ("removal", "make one full of the oldest points"),
    "remove": ("removal", "remove points on which nothing hangs"),
    "import": ("import_", "make a set of virtnbdbackup or qmpbackup one of ours"),
    "export": ("export", "offer a running domain's disks to other readers"),
    "estimate": ("estimate", "tell what an increment would save"),
    "check": ("check", "tell whether a backup will work"),
    "checkpoints": ("checkpoints", "show checkpoints and bitmaps, put them in order"),
    "abort": ("abort", "end a leftover backup job"),
    "yield": ("give_way", "let a domain start that is being read"),
    "config": ("config", "check, show or begin the configuration"),
    "status": ("status", "show how well domains are protected"),
    "report": ("report", "tell of the last days: as text, as a page, by mail"),
    "timers": ("timers", "show what runs when, and how it ended"),
    "notify": ("notify", "tell how a unit ended"),
    "log": ("log", "show what was logged"),
}
"""For each verb its module, and what it does in a few words."""


LIBRARIES: Final = {"libvirt": "python3-libvirt", "nbd": "python3-libnbd", "lz4": "python3-lz4"}
"""Packages of Debian, which other distributions name alike, by module."""


def missing(err: ImportError) -> DomainError:
    """What to say of a library that can't be imported, with the package that has it."""
    package = LIBRARIES.get((err.name or "").partition(".")[0], "it")
    return DomainError(f"a Python library can't be used: {err}; install {package}")


def parser(*, parents: Sequence[argparse.ArgumentParser] = (), **options: Any) -> Parser | None:
    """A verb's parser; none for a verb that is only listed, which no command line asks for one."""
    return Parser(parents=parents, **options) if parents else None


class Registry:
    """Where verbs add their parsers; ``shared`` has the options that all of them take."""

    def __init__(self, subparsers: Any, shared: argparse.ArgumentParser) -> None:
        self._subparsers = subparsers
        self._shared = shared

    def load(self, name: str) -> None:
        """Have a module add the parsers of its verbs.

        Raises DomainError or ConfigError if it lacks a library.
        """
        try:
            module = importlib.import_module(f"{__name__}.{name}")
        except ImportError as err:
            raise missing(err) from err
        module.register(self)

    def add(self, verb: str, description: str) -> Parser:
        """A new parser of a verb."""
        added: Parser = self._subparsers.add_parser(
            verb,
            help=ALL[verb][1],
            description=description,
            parents=[self._shared],
            allow_abbrev=False,
        )
        return added

    def list(self, verb: str) -> None:
        """Have a verb in the list of all."""
        self._subparsers.add_parser(verb, help=ALL[verb][1])
