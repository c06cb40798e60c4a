"""Which sets of a domain runs go on with: the base of the next increment stays in these."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from nbdbackupd.model import policy
from nbdbackupd.ops.sets.sets import DomainSet
from nbdbackupd.repo.state import StateDirectory


def live_sets(sets: Sequence[DomainSet], state_dirs: Sequence[Path]) -> frozenset[Path]:
    """The sets that an increment may go into: the newest, and those whose base is noted."""
    # runs go on with the newest of their own sets, whatever else lies beside them
    named = [each for each in sets if policy.is_set_name(each.path.name)]
    found = {each.path for each in (*sets[-1:], *named[-1:])}
    uuids = {each.uuid for each in sets if each.uuid}
    noted = noted_chains(uuids, state_dirs)
    return frozenset(
        found | {each.path for each in sets if noted & {p.chain for p in each.known.points}}
    )


def noted_chains(uuids: Iterable[str], state_dirs: Sequence[Path]) -> frozenset[str]:
    """The chains of these domains whose base is noted."""
    known = tuple(uuids)
    return frozenset(
        record.chain
        for directory in state_dirs
        for uuid in known
        for record in StateDirectory(directory).records(uuid)
    )
