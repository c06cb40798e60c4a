"""Going on from a checkpoint that another program made: the base of an imported set.

Our own names are used once, so a bitmap of such a name was made for that point. virtnbdbackup
counts its names anew in each chain of a domain: ``virtnbdbackup.1`` of another chain has the same
name and covers another time. What tells them apart is the time at which libvirt made the
checkpoint, which the set has kept. So nothing is redefined for such a base, and it is not ours to
remove.
"""

import logging
from dataclasses import replace

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model import jobxml
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.naming import is_foreign
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.source import Snapshot
from nbdbackupd.virt import checkpoints
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)


def stored_xml(set_dir: SetDirectory, parent: RestorePoint | None) -> str:
    """The stored XML from which a base may be redefined; nothing for one of others.

    Raises RepositoryError or FormatError if the file can't be read.
    """
    if parent is None or is_foreign(parent.checkpoint):
        return ""
    return set_dir.checkpoint_xml(parent)


def prove(
    snapshot: Snapshot, domain: Domain, set_dir: SetDirectory, parent: RestorePoint
) -> Snapshot:
    """The snapshot without changes if their base is not the checkpoint that the set knows.

    Called while the source is open: a checkpoint that is replaced later changes nothing any more.
    The disks are to be read in full then, ``demoted`` says why.
    """
    deltas = [target for target, export in snapshot.exports.items() if export.bitmap]
    if not deltas or not is_foreign(parent.checkpoint):
        return snapshot
    reason = why_other(domain, set_dir, parent)
    if not reason:
        log.info("checkpoint %s is the one that the set knows", parent.checkpoint)
        return snapshot
    exports = {target: replace(export, bitmap="") for target, export in snapshot.exports.items()}
    return replace(
        snapshot, exports=exports, demoted={**snapshot.demoted, **dict.fromkeys(deltas, reason)}
    )


def why_other(domain: Domain, set_dir: SetDirectory, parent: RestorePoint) -> str:
    """Why libvirt's checkpoint may be another than the base of that name, or nothing."""
    name = parent.checkpoint
    if not is_foreign(name):
        return ""
    try:
        stored = jobxml.creation_time(set_dir.checkpoint_xml(parent))
        found = jobxml.creation_time(checkpoints.xml(domain, name))
    except NbdbackupError as err:
        return f"whether checkpoint {name} is that of the set is not known: {err.message}"
    if stored and found == stored:
        return ""
    return (
        f"checkpoint {name} was made at {found or 'an unknown time'}, that of the set at "
        f"{stored or 'an unknown time'}: another chain has the same name"
    )
