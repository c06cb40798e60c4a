"""The definition of a point, with the disks that its domain had while it ran alone."""

import hashlib

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, IntegrityError
from nbdbackupd.model import live_disks
from nbdbackupd.ops.restoring.definer import Planned
from nbdbackupd.ops.sets import layers


def completed(planned: Planned, xml: str) -> tuple[str, tuple[str, ...]]:
    """``xml`` with what is missing in it, and a line for each disk that was added.

    The XML of the running domain is read only if a disk of the restore is missing. Raises
    FormatError, IntegrityError.
    """
    targets = [disk.target for disk in planned.disks]
    if planned.live is None or not live_disks.missing(xml, targets):
        return xml, ()
    stored, path = planned.live.stored, planned.live.source
    layers.check_size(path, min(stored.size, documents.MAX_XML), point=planned.point)
    with durable.translate_os_errors("read", path):
        data = path.read_bytes()
    if stored.sha256 and hashlib.sha256(data).hexdigest() != stored.sha256:
        raise IntegrityError(
            "file is damaged: its SHA-256 does not match", file=path, point=planned.point
        )
    try:
        text = data.decode()
        documents.parse_xml(text, "domain", FormatError)
    except (UnicodeDecodeError, FormatError) as err:
        raise IntegrityError(f"the XML of the running domain is damaged: {err}", file=path) from err
    return live_disks.complete(xml, text, targets)
