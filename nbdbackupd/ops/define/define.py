"""``restore --define``: a domain on the restored images, made of the point's own XML.

All that could stand in the way is looked at before the first byte is written: the name, the
UUID, whether this host can run the guest, whether libvirt takes the definition, and whether one of
its files is used by another domain. The domain is defined only when all images are complete.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from nbdbackupd.errors import DomainError, NbdbackupError
from nbdbackupd.model import definition as model
from nbdbackupd.model.definition import Adapted, Changes, Consent
from nbdbackupd.model.definition_devices import Entropy
from nbdbackupd.ops.define import adjust
from nbdbackupd.ops.define.adjust import Adjuster, DefineRequest, Prepared
from nbdbackupd.ops.domain import vtpm
from nbdbackupd.ops.restore import define_paths
from nbdbackupd.virt import definition as virt
from nbdbackupd.virt.connection import Connection

log = logging.getLogger(__name__)


class DomainDefiner(Adjuster):
    """Defines the domain, and starts it if that is asked for."""

    def __init__(
        self,
        request: DefineRequest,
        entropy: Entropy,
        connection: Connection,
        consent: Consent = model.refuse,
    ) -> None:
        """The connection stays the caller's; ``consent`` as in ``Adjuster``."""
        super().__init__(request, entropy, consent)
        self._connection = connection

    def fit(self, xml: str, changes: Changes) -> Changes:
        """Replace an emulator and a machine type that the host does not have."""
        host = virt.look_at_host(self._connection, xml)
        if not host.has_emulator:
            changes = replace(changes, emulator=host.emulator)
        if not host.has_machine:
            kind = model.parse(xml).find("./os/type")
            machine = kind.get("machine", "") if kind is not None else ""
            changes = replace(changes, machine=model.machine_family(machine))
        return changes

    def look(self, prepared: Prepared) -> None:
        """See that nobody else has the name, the UUID or a file, and that libvirt takes it.

        Raises DomainError, NotSupportedError, ConfigError, RepositoryError.
        """
        connection, adapted = self._connection, prepared.adapted
        self._refuse_others(adapted)
        images = {disk.path.parent for disk in prepared.planned.disks if disk.type == "file"}
        define_paths.check_way(connection.base_owner(), sorted(images))
        adjust.tell_missing(prepared)
        with _saying("--adjust-config writes it down, to be changed by hand"):
            virt.try_out(connection, adapted.xml)
        if adjust.wants_tpm(prepared):
            prepared.tpm_place = vtpm.places(connection.uri, adapted.uuid)[0]
            vtpm.check(prepared.tpm_place)

    def _refuse_others(self, adapted: Adapted) -> None:
        """See that the name, the UUID and the files are nobody else's."""
        connection = self._connection
        _refuse_taken(connection, adapted)
        uses = virt.resolve_all(connection, adapted.uses)
        define_paths.refuse_shared(uses, virt.paths_in_use(connection))

    def act(self, prepared: Prepared) -> tuple[bool, bool]:
        """Put the TPM's state into its place, define, and start.

        Raises DomainError, NotSupportedError, BusyError, RepositoryError; the message says what
        stands.
        """
        connection, adapted = self._connection, prepared.adapted
        with _saying(
            f"the images in {prepared.planned.output} are complete and {prepared.config} is their "
            f"definition, but no domain is defined"
        ):
            # a restore takes its time, and others work meanwhile
            self._refuse_others(adapted)
            if prepared.tpm_place is not None:
                vtpm.put(prepared.tpm_place, adjust.tpm_files(prepared.planned))
            try:
                domain, fits = virt.define(connection, adapted.xml)
            except BaseException:
                if prepared.tpm_place is not None:
                    vtpm.take_back(prepared.tpm_place)
                raise
        log.info("domain %s is defined, UUID %s", adapted.name, adapted.uuid)
        if not fits:
            prepared.warnings.append("libvirt's schema does not know all of the definition")
            log.warning("%s", prepared.warnings[-1])
        if self.request.start:
            with _saying(f"domain {adapted.name} is defined, and its images are complete"):
                virt.start(domain)
        return True, self.request.start


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Add to the message of a failure what stands nevertheless."""
    try:
        yield
    except NbdbackupError as err:
        err.message += f"; {what}"
        raise


def _refuse_taken(connection: Connection, adapted: Adapted) -> None:
    by_name, by_uuid = virt.find_taken(connection, adapted.name, adapted.uuid)
    if by_name:
        raise DomainError(
            f"a domain {adapted.name} exists at {connection.uri}: give another --name, or remove "
            f"it first with 'virsh undefine'",
            domain=adapted.name,
        )
    if by_uuid:
        raise DomainError(
            f"domain {by_uuid} at {connection.uri} has UUID {adapted.uuid}: leave out "
            f"--keep-identity, or remove it first with 'virsh undefine'",
            domain=by_uuid,
        )
