"""The images of a domain that is off, held while they are worked on."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nbdbackupd import events
from nbdbackupd.errors import DomainError
from nbdbackupd.source import kept, lease
from nbdbackupd.source.lease import Lease
from nbdbackupd.virt.domain import Domain

log = logging.getLogger(__name__)


@contextmanager
def images_of(
    domain: Domain, runtime_dir: Path, run_id: str, cancelled: Callable[[], None]
) -> Iterator[Lease | None]:
    """A lease on the images of a domain that is off; None if it runs. Its lock is held.

    A domain that is about to start is waited for, so ask for its state only afterwards. Images
    that are not as the guest left them are told of. Raises the errors of ``lease.hold``, and
    DomainError for such images of a domain that libvirt no longer knows.
    """
    if domain.is_active():
        yield None
        return
    with ExitStack() as stack:
        held: Lease | None = stack.enter_context(
            lease.hold(
                runtime_dir, domain=domain.name, uuid=domain.uuid, run_id=run_id,
                is_active=domain.is_active, cancelled=cancelled,
            )
        )  # fmt: skip
        if domain.is_active():
            # QEMU has them; nobody must be told that we do
            stack.close()
            held = None
        else:
            _tell_changes(domain, runtime_dir)
            stack.callback(kept.renew, runtime_dir, domain.name, domain.uuid)
        yield held


def _tell_changes(domain: Domain, runtime_dir: Path) -> None:
    """Of images that somebody changed since the guest's end, as far as libvirt's hook saw that.

    Where libvirt knows the domain, what the bitmaps say is right (ADR 12). One that it does not
    know may have been started on another host: nothing else would keep us from its images.
    """
    changes = kept.describe(kept.changed(runtime_dir, domain.name, domain.uuid))
    if not changes:
        return
    if domain.is_gone():
        raise DomainError(
            f"domain {domain.name} has ended and libvirt no longer knows it, but since then "
            f"{changes}: it may run on another host, so start it here or save it there",
            domain=domain.name,
        )
    events.emit(log, events.IMAGES_CHANGED, reason=changes)
