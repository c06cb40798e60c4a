"""Chains of a domain beside the one that a run goes on with: each costs the guest's writes."""

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd.errors import ConfigError
from nbdbackupd.model.chain import BackupSet
from nbdbackupd.model.naming import tag_of, tag_of_chain
from nbdbackupd.repo.state import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherChain:
    """A chain, by the tag in its names; ``set``: where a record has it, or empty.

    ``is_gone``: the set is not there, though the directory that held it is and holds other things,
    so that it is no file system which is not mounted now.
    """

    domain: str
    tag: str
    set: str = ""
    is_gone: bool = False

    @property
    def text(self) -> str:
        """What it is."""
        of = f"set {self.set}" if self.set else "a set that is not known here"
        gone = ", which is gone" if self.is_gone else ""
        return f"the images carry bitmaps of chain {self.tag}, too, for {of}{gone}"

    @property
    def cure(self) -> str:
        """How to be rid of it."""
        unless = "" if self.is_gone else "if no backup goes there any more, "
        drop = f"'nbdbackupctl checkpoints {self.domain} --drop {self.tag}'"
        return f"{unless}remove them with {drop}"

    def __str__(self) -> str:
        return f"{self.text}; {self.cure}"


def other_chains(
    domain: str,
    names: Iterable[str],
    records: Collection[Record],
    mine: Collection[str],
    *,
    carried: Collection[str],
    retired: Path | None = None,
) -> tuple[OtherChain, ...]:
    """The chains of which ``names``, checkpoints and bitmaps, tell; ``mine``: ids to leave out.

    ``carried`` are the bitmaps that are really there: a chain that has lost its own costs nothing,
    and begins anew with the next backup into its set, unless that is gone. The sets in directory
    ``retired`` are somebody else's care (ops/run/retire.py).
    """
    known = {tag_of_chain(record.chain): record for record in records}
    tags = {tag_of(name) for name in names} - {tag_of_chain(chain) for chain in mine} - {""}
    bitmaps = {tag_of(name) for name in carried}
    found = []
    for tag in sorted(tags):
        record = known.get(tag)
        path = Path(record.set) if record is not None else None
        if path is None:
            found.append(OtherChain(domain=domain, tag=tag))
        elif retired is None or os.path.realpath(path.parent) != os.path.realpath(retired):
            gone = _is_gone(path)
            if not gone and tag not in bitmaps:
                continue
            found.append(OtherChain(domain=domain, tag=tag, set=os.fspath(path), is_gone=gone))
    return tuple(found)


def check_name(
    domain: str, name: str, known: BackupSet, names: Iterable[str], records: Collection[Record]
) -> None:
    """See that a chain may have the name that its user gives it; empty is fine.

    ``names``: the checkpoints and bitmaps that there are. Raises ConfigError if the set's chain has
    another one, or another chain of the domain has this one.
    """
    if not name:
        return
    if known.full is not None:
        own = tag_of_chain(known.full.chain)
        if own != name:
            raise ConfigError(
                f"the chain of this set is {own}, not {name}: leave --chain out, or begin another "
                f"set with another -o"
            )
    elif name in {tag_of(each) for each in names} | {tag_of_chain(each.chain) for each in records}:
        raise ConfigError(
            f"domain {domain} has a chain {name} already: give another --chain, or if no backup "
            f"goes there any more, remove it with 'nbdbackupctl checkpoints {domain} --drop {name}'"
        )


def _is_gone(path: Path) -> bool:
    # asked by its name: a file system that folds case lists another one
    try:
        path.lstat()
    except FileNotFoundError:
        with suppress(OSError):
            return any(path.parent.iterdir())
    except OSError:
        return False
    return False
