"""What a point holds beside the disks: definition, firmware, TPM state, what the guest tells.

Collecting reads libvirt only; saving copies files of the domain's host. A component that the domain
declares and that can't be read costs a warning, never the backup (F-92).
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdbackupd.errors import FreezeError, SourceError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.chain import StoredFile
from nbdbackupd.model.domain import Agent
from nbdbackupd.ops.domain import vtpm
from nbdbackupd.repo import layout
from nbdbackupd.repo.draft import Draft
from nbdbackupd.virt import guest
from nbdbackupd.virt.domain import Domain, GuestState
from nbdbackupd.where import HERE, Where

log = logging.getLogger(__name__)
GUEST_INFO_SECONDS: Final = 10.0
DOMAIN_XML: Final = "domain-xml"
DOMAIN_XML_LIVE: Final = "domain-xml-live"
GUEST_INFO: Final = "guest-info"
MACHINE: Final = "machine"
HOST: Final = "host"
"""The id of another host than ours that the domain was saved on, as the file's content."""

TPM_STATE: Final = "tpm-state"
BOOT_ROLES: Final = frozenset({"loader", "nvram", "kernel", "initrd"})
"""Stored once in a set as long as they don't change; a vTPM's files are small and tell a path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One thing to save: ``data``, or the file ``source``.

    ``inner`` is the name that a copied file keeps in the set: its base name, or its path within
    the tree that it is part of.
    """

    role: str
    data: bytes = b""
    source: Path | None = None
    inner: str = ""

    @property
    def digest(self) -> str:
        """The SHA-256 of ``data``, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """All items of a domain, what could not be found, and libvirt's autostart flag.

    ``where``: the host that the files are of.
    """

    items: tuple[Item, ...]
    warnings: tuple[str, ...]
    autostart: bool
    where: Where = HERE


def collect(domain: Domain, definition: domain_model.Domain) -> Collected:
    """List what belongs to the domain; ``definition`` is its XML, parsed: live if it runs.

    Raises DomainError if libvirt does not tell the domain's XML.
    """
    warnings: list[str] = []
    items = [Item(role=DOMAIN_XML, data=domain.xml(inactive=True, secure=True).encode())]
    if domain.is_active():
        items.append(Item(role=DOMAIN_XML_LIVE, data=domain.xml(secure=True).encode()))
    nvram = definition.nvram or _chosen_nvram(domain, definition)
    items += boot_files(replace(definition, nvram=nvram), warnings)
    items += _guest_info(domain, definition)
    where = domain.connection.where
    if definition.has_tpm:
        items += _tpm_items(_tpm_directories(domain, definition), warnings, where)
    if not where.is_here:
        items.append(host_item(where))
    return Collected(
        items=tuple(items),
        warnings=tuple(warnings),
        autostart=domain.has_autostart(),
        where=where,
    )


def host_item(where: Where) -> Item:
    """What binds a set to another host than ours: the same bytes in each of its points."""
    return Item(role=HOST, data=f"{where.id}\n".encode(), inner=where.id)


def boot_files(definition: domain_model.Domain, warnings: list[str]) -> list[Item]:
    """What the guest is booted with; of what is no file of this host ``warnings`` get a line."""
    items = []
    for role, path in (
        ("loader", definition.loader),
        ("nvram", definition.nvram),
        ("kernel", definition.kernel),
        ("initrd", definition.initrd),
    ):
        if path and not Path(path).is_absolute():
            warnings.append(f"the {role} is not saved: {path} is no file of its host")
        elif path:
            items.append(Item(role=role, source=Path(path), inner=Path(path).name))
    return items


def save(
    draft: Draft, collected: Collected, point_id: str, held: Collection[StoredFile] = ()
) -> tuple[list[StoredFile], list[str]]:
    """Put the items into a draft; return the stored files, and a warning for each unreadable one.

    What boots the guest and is among ``held``, files of the set's points, is not stored again.
    Raises RepositoryError or NoSpaceError if the set can't be written.
    """
    files: list[StoredFile] = []
    warnings: list[str] = []
    for item in collected.items:
        name = _name(item, point_id)
        if item.source is None:
            files.append(draft.add_bytes(name, item.data, item.role))
            continue
        if item.role == TPM_STATE and "~" in name:
            # the name was cut, and nobody could put the file back into its place
            warnings.append(f"the {item.role} is not saved: {item.source} has too long a path")
            continue
        try:
            with collected.where.near(item.source) as file:
                shared = draft.share(file, item.role, held) if item.role in BOOT_ROLES else None
                stored = shared or draft.copy_file(name, file, item.role)
            files.append(replace(stored, origin=os.fspath(item.source.absolute())))
        except SourceError as err:
            draft.discard(name)
            warnings.append(f"the {item.role} is not saved: {err.message}")
    return files, warnings


def _name(item: Item, point_id: str) -> str:
    names = {
        DOMAIN_XML: layout.domain_xml,
        DOMAIN_XML_LIVE: layout.domain_xml_live,
        GUEST_INFO: layout.guest_info,
        MACHINE: layout.machine,
    }
    if item.role in names:
        return names[item.role](point_id)
    return layout.copy(item.role, point_id, item.inner)


def _guest_info(domain: Domain, definition: domain_model.Domain) -> list[Item]:
    # nobody in a guest that is paused can answer
    if definition.agent is not Agent.CONNECTED or domain.state() is not GuestState.RUNNING:
        return []
    try:
        found = guest.guest_info(domain, seconds=GUEST_INFO_SECONDS)
    except FreezeError as err:
        # worth knowing, but a restore does not miss it
        log.warning("%s", err)
        return []
    return [Item(role=GUEST_INFO, data=json.dumps(found, indent=1, sort_keys=True).encode())]


def _chosen_nvram(domain: Domain, definition: domain_model.Domain) -> str:
    """Where libvirt has put the NVRAM if the XML does not tell; empty if there is none.

    Measured: libvirt 9.0.0 tells it only while the guest runs, 11.3.0 in the definition, too.
    """
    if definition.firmware != "efi":
        return ""
    name = f"{domain.name}_VARS.fd"
    places = [each / "qemu/nvram" / name for each in vtpm.state_directories(domain.connection.uri)]
    where = domain.connection.where
    return next((path for path in map(os.fspath, places) if where.facts(path) is not None), "")


def _tpm_items(candidates: list[Path], warnings: list[str], where: Where) -> list[Item]:
    """List the files of the first of ``candidates`` that is there."""
    kinds = {path: where.facts(os.fspath(path)) for path in candidates}
    found, facts = next(((path, each) for path, each in kinds.items() if each), (None, None))
    if found is None or facts is None:
        looked = " or ".join(str(path) for path in candidates)
        warnings.append(f"the TPM's state is not saved: it is not at {looked}")
        return []
    if stat.S_ISREG(facts.mode):
        return [Item(role=TPM_STATE, source=found, inner=found.name)]
    try:
        paths = where.tree(found)
    except (OSError, SourceError) as err:
        warnings.append(f"the TPM's state is not saved: {err}")
        return []
    items = [
        Item(role=TPM_STATE, source=path, inner=os.fspath(path.relative_to(found)))
        for path in paths
        # swtpm's lock file and what is written at the moment come and go
        if path.name != ".lock"
    ]
    if not items:
        warnings.append(f"the TPM's state is not saved: {found} holds no file")
    return items


def _tpm_directories(domain: Domain, definition: domain_model.Domain) -> list[Path]:
    """Return where libvirt keeps a vTPM's state, by the kind of its driver."""
    if definition.tpm_source:
        return [Path(definition.tpm_source)]
    return vtpm.places(domain.connection.uri, domain.uuid)
