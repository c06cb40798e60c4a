"""``restore --adjust-config``: the point's own XML made fit for the restored images.

libvirt is not needed. ``ops.define`` goes on from here and defines the domain.
"""

import contextlib
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import FormatError, IntegrityError, RepositoryError, UsageError
from nbdbackupd.files import open_untrusted
from nbdbackupd.model import definition as model
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model import live_disks, sifting
from nbdbackupd.model.definition import Adapted, Changes, Consent, NewDisk
from nbdbackupd.model.definition_devices import Entropy
from nbdbackupd.model.hostpaths import PathUse
from nbdbackupd.ops.domain import vtpm
from nbdbackupd.ops.restore import output_names, side_files
from nbdbackupd.ops.restore.request import Definition, PlannedDomain
from nbdbackupd.ops.restore.side_files import FileCopy
from nbdbackupd.ops.sets import layers

log = logging.getLogger(__name__)

PREFIX: Final = "restore_"
FIRMWARE: Final = ("nvram", "loader", "kernel", "initrd")
PASS: Final = 0o711
"""Mode of directories that QEMU has to pass."""
NEEDED: Final = (
    "disk",
    "cdrom",
    "floppy",
    "loader",
    "kernel",
    "initrd",
    "dtb",
    "ACPI",
    "filesystem",
)
"""What QEMU does not make itself."""
SYSTEM_URI: Final = "qemu:///system"
MAX_LOADER: Final = 64 << 20
FIRST_PERSON: Final = 1000
"""Smaller user ids are of programs (Debian's and Fedora's UID_MIN)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DefineRequest:
    """What kind of domain to make.

    ``name`` empty: ``restore_`` and the original's, or the original's with ``keep_identity``.
    ``media`` (``keep``, ``remove``), ``network`` (``keep``, ``down``, ``none``) and
    ``other_disks`` (``keep``, ``remove``) as in ``model.definition.Changes``, and so is
    ``trusted``. ``start``: start it once it is defined.
    """

    name: str = ""
    keep_identity: bool = False
    media: str = model.REMOVE
    network: str = model.KEEP
    other_disks: str = model.REMOVE
    start: bool = False
    trusted: bool = False


@dataclass(slots=True)
class Prepared:
    """What ``finish`` needs to know; ``tpm_place``: where a TPM's state is to go."""

    planned: PlannedDomain
    adapted: Adapted
    config: Path
    tpm_place: Path | None = None
    warnings: list[str] = field(default_factory=list)


class Adjuster:
    """Adapts the point's XML and writes it beside the images; see ``Definer``."""

    def __init__(
        self, request: DefineRequest, entropy: Entropy, consent: Consent = model.refuse
    ) -> None:
        """``entropy`` gives random bytes for UUIDs and MAC addresses.

        ``consent`` is asked before anything of the host is kept; not at all if ``trusted``.
        """
        self.request = request
        self._entropy = entropy
        self._consent = consent
        self._prepared: Prepared | None = None

    def prepare(self, planned: PlannedDomain) -> None:
        """Look at everything; nothing is made but directories for firmware.

        Raises UsageError, RepositoryError, IntegrityError, DomainError, NotSupportedError,
        ConfigError.
        """
        xml, added = _completed(planned, _read_xml(planned))
        changes = _changes(planned, xml, self.request)
        # nothing of it gets to libvirt before it is sifted: that runs an emulator to look at it
        adapted = model.adapt(xml, changes, self._entropy, self._agree)
        fitting = self.fit(adapted.xml, changes)
        if fitting != changes:
            adapted = model.adapt(xml, fitting, self._entropy, lambda _: None)
        self.judge(adapted)
        config = planned.output / output_names.clean(f"{adapted.name}.adjusted.xml", ".xml")
        if os.path.lexists(config) and not planned.force:
            raise RepositoryError(f"{config} exists: use --force to replace it, or another -o")
        self._prepared = prepared = Prepared(planned, adapted, config, warnings=[*added])
        self.look(prepared)
        for warning in (*adapted.warnings, *prepared.warnings):
            log.warning("%s", warning)
        _make_passable(planned)

    def _agree(self, kept: tuple[str, ...]) -> None:
        if not self.request.trusted:
            self._consent(kept)

    def fit(self, xml: str, changes: Changes) -> Changes:
        """Add what the host demands. Raises DomainError or NotSupportedError."""
        del xml
        return changes

    def judge(self, adapted: Adapted) -> None:
        """Refuse a definition for what was in it. Raises DomainError."""

    def look(self, prepared: Prepared) -> None:
        """See whether the definition will do. Raises NbdbackupError."""
        tell_missing(prepared)
        if wants_tpm(prepared):
            tell_tpm(prepared)

    def act(self, prepared: Prepared) -> tuple[bool, bool]:
        """Make the domain; return whether it is defined, and whether it runs.

        Raises NbdbackupError.
        """
        del prepared
        return False, False

    def finish(self) -> Definition:
        """Write the adapted XML; the rest is up to ``act``.

        Raises RepositoryError, NoSpaceError, and what ``act`` raises.
        """
        prepared = self._prepared
        assert prepared is not None  # noqa: S101 - prepare came first
        with durable.translate_os_errors("write", prepared.config):
            durable.write_atomic(prepared.config, prepared.adapted.xml.encode(), 0o600)
            for each in prepared.planned.files:
                if each.stored.role == side_files.TREE_ROLE:
                    _own_like(each.final, each.stored.origin)
                if each.stored.role == "loader":
                    # no secret, and the one file that libvirt does not give to QEMU's account
                    each.final.chmod(0o644)
        defined, started = self.act(prepared)
        return Definition(
            name=prepared.adapted.name,
            uuid=prepared.adapted.uuid,
            config=prepared.config,
            defined=defined,
            started=started,
            changes=prepared.adapted.changes,
            warnings=(*prepared.adapted.warnings, *prepared.warnings),
        )


def wants_tpm(prepared: Prepared) -> bool:
    """Whether a TPM's state has to go to libvirt's own place; warns if the point holds none."""
    backend = model.parse(prepared.adapted.xml).find("./devices/tpm/backend[@type='emulator']")
    if backend is None:
        return False
    if not tpm_files(prepared.planned):
        prepared.warnings.append(
            "the point does not hold the TPM's state: the guest gets an empty TPM"
        )
        return False
    return backend.find("source") is None


def tell_missing(prepared: Prepared) -> None:
    """Warn of files that the definition names, and that are neither here nor to come."""
    planned = prepared.planned
    coming = {str(disk.path) for disk in planned.disks}
    coming |= {str(each.final) for each in planned.files} | {str(_tpm_directory(planned))}
    for use in prepared.adapted.uses:
        if not isinstance(use, PathUse) or not use.what.startswith(NEEDED) or use.path in coming:
            continue
        if not os.path.exists(use.path):  # noqa: PTH110 - a path with a zero byte is just missing
            lack = (
                "the drive will be empty" if use.optional else "the domain can't start without it"
            )
            prepared.warnings.append(f"{use.what} {use.path} is not on this host: {lack}")


def tell_tpm(prepared: Prepared) -> None:
    """Warn that the user has to put the TPM's state into its place."""
    place = vtpm.places(SYSTEM_URI, prepared.adapted.uuid)[0]
    prepared.warnings.append(
        f"put the TPM's state, {_tpm_directory(prepared.planned)}, to "
        f"{place} on the domain's host before its first start"
    )


def _read_xml(planned: PlannedDomain) -> str:
    """The point's domain XML, proven."""
    if not planned.point and not planned.files:
        raise UsageError("stream files alone are no domain: give the backup set to define one")
    found = [each for each in planned.files if each.stored.role == side_files.XML_ROLE]
    if not found:
        raise RepositoryError(
            f"restore point {planned.point} holds no domain XML, as of a QEMU without libvirt: "
            f"restore its disks without a definition"
        )
    return _read(found[0], planned.point)


def _read(copy: FileCopy, point: str) -> str:
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


def _completed(planned: PlannedDomain, xml: str) -> tuple[str, tuple[str, ...]]:
    """``xml`` with what is missing in it, and a line for each disk that was added.

    The XML of the running domain is read only if a disk of the restore is missing. Raises
    FormatError, IntegrityError.
    """
    targets = [disk.target for disk in planned.disks]
    if planned.live is None or not live_disks.missing(xml, targets):
        return xml, ()
    return live_disks.complete(xml, _read(planned.live, planned.point), targets)


def _changes(planned: PlannedDomain, xml: str, request: DefineRequest) -> Changes:
    files = {each.stored.role: each for each in planned.files}
    # what the point's XML says, whatever the domain is called today
    name = model.parse(xml).findtext("name", "") or planned.domain
    finals = {role: str(files[role].final) for role in FIRMWARE if role in files}
    loader, own = _loader(files.get("loader"), domain_model.parse_domain(xml).loader)
    return Changes(
        name=request.name or (name if request.keep_identity else f"{PREFIX}{name}"),
        keep_identity=request.keep_identity,
        disks={
            disk.target: NewDisk(path=str(disk.path), format=disk.format, type=disk.type)
            for disk in planned.disks
        },
        other_disks=request.other_disks,
        media=request.media,
        network=request.network,
        nvram=finals.get("nvram"),
        loader=loader,
        own_loader=own,
        kernel=finals.get("kernel"),
        initrd=finals.get("initrd"),
        tpm=_tpm_path(planned, xml),
        trusted=request.trusted,
    )


def _loader(copy: FileCopy | None, path: str) -> tuple[str | None, bool]:
    """The loader's path, None to leave it, and whether it is the point's own copy.

    The host's is as good if it is the same: libvirt knows it, with all that goes with it. Which
    file that could be is the set's word: nothing is read but a regular file that lies where
    systems have their firmware, and only if it may be the same.
    """
    if copy is None:
        return None, False
    original = copy.stored.origin or path
    if sifting.is_firmware(original) and _is_same(Path(original), copy):
        return original, False
    return str(copy.final), True


def _is_same(path: Path, copy: FileCopy) -> bool:
    """Whether a file of this host is the same as one of the set, byte for byte."""
    if copy.stored.size > MAX_LOADER:
        return False
    try:
        fd = open_untrusted(path.resolve())
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_size != copy.stored.size:
                return False
            found = file.read(copy.stored.size + 1)
    except (OSError, IntegrityError):
        log.info("loader %s is not on this host", path)
        return False
    return found == layers.read_file(copy.source, copy.stored, MAX_LOADER)


def _tpm_directory(planned: PlannedDomain) -> Path:
    return planned.output / output_names.CONFIG / side_files.TREE_ROLE


def tpm_files(planned: PlannedDomain) -> list[tuple[Path, PurePosixPath]]:
    """The restored files of the TPM's state, with their paths within it."""
    base = _tpm_directory(planned)
    return [
        (each.final, PurePosixPath(each.final.relative_to(base)))
        for each in planned.files
        if each.stored.role == side_files.TREE_ROLE
    ]


def _tpm_path(planned: PlannedDomain, xml: str) -> str | None:
    """The private path of a TPM state whose path the XML tells."""
    source = model.parse(xml).find("./devices/tpm/backend[@type='emulator']/source")
    files = tpm_files(planned)
    if source is None or not files:
        return None
    return str(files[0][0] if source.get("type") == "file" else _tpm_directory(planned))


def _make_passable(planned: PlannedDomain) -> None:
    """Make the directories of firmware such that QEMU and swtpm get through as other accounts.

    The files stay closed; libvirt gives them away when the domain starts.
    """
    for each in planned.files:
        if each.stored.role in FIRMWARE or each.stored.role == side_files.TREE_ROLE:
            with durable.translate_os_errors("create", each.final.parent):
                durable.make_directory(each.final.parent, PASS)


def _own_like(path: Path, original: str) -> None:
    """Give a file to the owner of the original, if that is here, a system's account, and we may.

    libvirt gives swtpm the directory of a TPM's state; of a state in a single file, which it has
    known since 10.10, it leaves the owner to the administrator (measured with 11.3.0). The path is
    the set's word, so a person's file says nothing.
    """
    with contextlib.suppress(OSError, ValueError):
        found = Path(original).lstat()
        if stat.S_ISREG(found.st_mode) and found.st_uid < FIRST_PERSON:
            os.chown(path, found.st_uid, found.st_gid)
