"""Which streams of a peer's set were made by one run.

Those of fulls, copies and increments share a name. Each stream of a differential carries the
seconds at which its own disk was begun, and the domain's XML those at which the run ended: with
fewer workers than disks, all of them differ (1.9.15 and 2.28, measured).
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from nbdbackupd.model.chain import Level
from nbdbackupd.repo.virtnbdbackup.peer import PeerFile, PeerFiles

Run: TypeAlias = tuple[Level, str]
"""Level, and what the names of the run's small files carry: its ident."""

FULL: Final[Run] = (Level.FULL, "")
COPY: Final[Run] = (Level.COPY, "")
MAX_DIGITS: Final = 12


def group(found: PeerFiles) -> dict[Run, list[PeerFile]]:
    """The sound files of each run; a run with one that is not sound is left out."""
    ends = _ends(found.sizes)
    groups: dict[Run, list[PeerFile]] = {}
    for file in found.files:
        groups.setdefault(_run(file.level, file.ident, ends), []).append(file)
    if FULL in groups and all(file.meta is None for file in groups.get(COPY, ())):
        # a raw image beside a full was saved with it
        held = {file.disk for file in groups[FULL]}
        groups[FULL] += [file for file in groups.pop(COPY, []) if file.disk not in held]
    for run in [run for run in groups if run[0] is Level.DIFF]:
        groups.update(_ended(run, groups[run]))
    broken = {_run(level, ident, ends) for level, ident in found.broken}
    return {run: files for run, files in groups.items() if run not in broken}


def _ends(names: Iterable[str]) -> list[int]:
    """When differentials ended, ascending."""
    idents = (
        name.removeprefix("vmconfig.").removesuffix(".xml")
        for name in names
        if name.startswith("vmconfig.") and name.endswith(".xml")
    )
    return sorted(int(ident) for ident in idents if _is_seconds(ident))


def _is_seconds(ident: str) -> bool:
    return ident.isascii() and ident.isdecimal() and len(ident) <= MAX_DIGITS


def _run(level: Level, ident: str, ends: Sequence[int]) -> Run:
    """The run that a stream's name means: a differential is of the first that ended after it."""
    if level is Level.DIFF and _is_seconds(ident):
        place = bisect.bisect_left(ends, int(ident))
        if place < len(ends):
            return level, str(ends[place])
    return level, ident


def _ended(run: Run, files: Sequence[PeerFile]) -> dict[Run, list[PeerFile]]:
    """Of a run and those before it that did not end: each with its files.

    They left streams with the same end: of the same disk, or on another checkpoint. Those that
    were begun last are the run's own.
    """
    newest = sorted(files, key=lambda file: file.ident.zfill(MAX_DIGITS), reverse=True)
    parent = newest[0].meta.parent_checkpoint if newest[0].meta else ""
    kept: dict[str, PeerFile] = {}
    found: dict[Run, list[PeerFile]] = {}
    for file in newest:
        same = file.meta is not None and file.meta.parent_checkpoint == parent
        if same and file.disk not in kept:
            kept[file.disk] = file
        else:
            found.setdefault((Level.DIFF, file.ident), []).append(file)
    found[run] = sorted(kept.values(), key=lambda file: file.disk)
    return found
