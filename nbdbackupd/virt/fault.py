"""libvirt's errors become ours here: one class by code, one line, the place in the fields."""

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from nbdbackupd.errors import (
    BusyError,
    CheckpointError,
    DomainError,
    DomainNotFoundError,
    NbdbackupError,
    NotSupportedError,
)

ERROR_BY_CODE: dict[int, type[NbdbackupError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: DomainNotFoundError,
    libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT: CheckpointError,
    libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT: CheckpointError,
    libvirt.VIR_ERR_NO_SUPPORT: NotSupportedError,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: NotSupportedError,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: NotSupportedError,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: NotSupportedError,
    # "cannot acquire state change lock": somebody else's job holds the domain
    libvirt.VIR_ERR_OPERATION_TIMEOUT: BusyError,
    libvirt.VIR_ERR_RESOURCE_BUSY: BusyError,
}


def line(error: libvirt.libvirtError) -> str:
    """Return the text of a libvirt error as one line (QEMU's part may hold several)."""
    return " ".join((error.get_error_message() or str(error)).split())


@contextmanager
def translate(what: str, **fields: object) -> Iterator[None]:
    """Raise a libvirt error of the body as the class that its code stands for.

    ``what`` begins the message: the thing that could not be done.
    """
    try:
        yield
    except libvirt.libvirtError as err:
        kind = ERROR_BY_CODE.get(err.get_error_code(), DomainError)
        raise kind(f"{what}: {line(err)}", **fields) from err
