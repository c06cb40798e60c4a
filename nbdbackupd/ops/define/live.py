"""The definition of a point, with the disks that its domain had while it ran alone."""

from nbdbackupd import documents
from nbdbackupd.errors import FormatError, IntegrityError
from nbdbackupd.model import live_disks
from nbdbackupd.ops.restore.definer import PlannedDomain
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.ops.sets import layers


def completed(planned: PlannedDomain, xml: str) -> tuple[str, tuple[str, ...]]:
    """``xml`` with what is missing in it, and a line for each disk that was added.

    The XML of the running domain is read only if a disk of the restore is missing. Raises
    FormatError, IntegrityError.
    """
    targets = [disk.target for disk in planned.disks]
    if planned.live is None or not live_disks.missing(xml, targets):
        return xml, ()
    return live_disks.complete(xml, read(planned.live, planned.point), targets)


def read(copy: FileCopy, point: str) -> str:
    """A domain XML of a set, proven and bounded. Raises FormatError, IntegrityError."""
    path = copy.source
    data = layers.read_file(path, copy.stored, documents.MAX_XML, point=point)
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        raise IntegrityError("the domain XML is no UTF-8", file=path, point=point) from err
    try:
        documents.parse_xml(text, "domain", FormatError)
    except FormatError as err:
        err.fields |= {"file": path, "point": point}
        raise
    return text
