"""What libvirt and its QEMU can do, and how they are confined; asked for, never guessed.

Versions are only told. Whether backups work stands in the domain capabilities (since libvirt
6.0), and whether ``backupBegin`` knows a flag is found out by calling it with a text that is no
backup XML: libvirt looks at the flags first, and nothing can begin from such a text.
"""

from dataclasses import dataclass
from typing import Final

import libvirt

from nbdbackupd import documents
from nbdbackupd.errors import DomainError, NbdbackupError
from nbdbackupd.virt import fault
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain

PRESERVE_SHUTDOWN_FLAG: Final = 2
"""VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN, which older bindings have no name for."""

NO_BACKUP_XML: Final = "<nothing/>"
DYNAMIC_MODELS: Final = ("apparmor", "selinux")


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    """As ``9.0.0``: libvirt's daemon, the QEMU that it would start, the Python binding."""

    libvirt: str
    qemu: str
    binding: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """Security models of the host, and those whose label the domain's QEMU really wears."""

    host: tuple[str, ...]
    worn: tuple[str, ...]


def versions(connection: Connection) -> Versions:
    """Return the versions. Raises DomainError."""
    _, handle = connection.current()
    with fault.translate("can't read versions"):
        return Versions(
            libvirt=_dotted(handle.getLibVersion()),
            qemu=_dotted(handle.getVersion()),
            binding=_dotted(libvirt.getVersion()),
        )


def _dotted(number: int) -> str:
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def has_backup(domain: Domain) -> bool | None:
    """Tell whether libvirt backs up and tracks disks with this domain's emulator.

    None where the capabilities do not speak of it. Raises DomainError.
    """
    root = documents.parse_xml(domain.xml(inactive=domain.is_persistent()), "domain", DomainError)
    kind = root.find("./os/type")
    architecture = kind.get("arch") if kind is not None else None
    machine = kind.get("machine") if kind is not None else None
    _, handle = domain.connection.current()
    with fault.translate("can't read the domain capabilities", domain=domain.name):
        text = handle.getDomainCapabilities(
            root.findtext("./devices/emulator") or None, architecture, machine, root.get("type"), 0
        )
    found = documents.parse_xml(text, "domainCapabilities", DomainError).find("./features/backup")
    return found.get("supported") == "yes" if found is not None else None


def has_checkpoints(domain: Domain) -> bool:
    """Tell whether libvirt has the calls for checkpoints."""
    try:
        domain.call("can't list its checkpoints", lambda each: each.listAllCheckpoints())
    except NbdbackupError as err:
        if _code(err) in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
            return False
        raise
    return True


def has_begin_flag(domain: Domain, flag: int) -> bool | None:
    """Tell whether ``backupBegin`` knows a flag; None if it does not say. Nothing begins.

    Raises DomainError if libvirt can't be asked.
    """
    handle = domain.handle()
    try:
        handle.backupBegin(NO_BACKUP_XML, None, flag)
    except libvirt.libvirtError as err:
        code = err.get_error_code()
        if code == libvirt.VIR_ERR_INVALID_ARG:
            return False
        if code in (libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_ERR_OPERATION_INVALID):
            return True
    return None


def confinement(domain: Domain) -> Confinement:
    """Return the security models beside DAC. Raises DomainError."""
    _, handle = domain.connection.current()
    with fault.translate("can't read libvirt's capabilities"):
        root = documents.parse_xml(handle.getCapabilities(), "capabilities", DomainError)
    host = (each.findtext("model", "") for each in root.findall("./host/secmodel"))
    live = documents.parse_xml(domain.xml(), "domain", DomainError)
    labels = {each.get("model", ""): each for each in live.findall("./seclabel")}
    return Confinement(
        host=tuple(model for model in host if model in DYNAMIC_MODELS),
        worn=tuple(
            model
            for model, label in labels.items()
            if model in DYNAMIC_MODELS and label.get("type") != "none"
        ),
    )


def _code(err: NbdbackupError) -> int:
    cause = err.__cause__
    code: int = cause.get_error_code() if isinstance(cause, libvirt.libvirtError) else 0
    return code
