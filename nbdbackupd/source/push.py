"""Push mode: the images that QEMU is to write, and the wait until it has."""

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import NoSpaceError, RepositoryError
from nbdbackupd.model.jobxml import JobDisk
from nbdbackupd.qemu import image
from nbdbackupd.source import scratch
from nbdbackupd.virt import jobs
from nbdbackupd.virt.domain import Domain

POLL_SECONDS: Final = 0.1


def make_images(domain: Domain, plan: Sequence[JobDisk], backings: Mapping[str, str]) -> None:
    """Make the images that QEMU is to write: one that libvirt makes would name the live disk.

    They are its account's as long as it writes. ``backings`` are the names below deltas, by
    target; they need not be found from where the images are now.
    Raises NoSpaceError, ProcessError, RepositoryError.
    """
    owner = domain.owner() if os.geteuid() == 0 else None
    jobs.outcome(domain)  # of an earlier job, which must not be taken for ours
    for disk in plan:
        path, backing = Path(disk.scratch), Path(backings[disk.target]) if disk.base else None
        options = image.CreateOptions(format="qcow2")
        image.create(path, domain.disk_size(disk.target), options, backing=backing)
        with durable.translate_os_errors("give to QEMU", path):
            durable.set_mode(path, 0o600)
            if owner is not None:
                os.chown(path, *owner)


def finish(
    domain: Domain, directory: Path, tell: Callable[[int, int], None], check: Callable[[], None]
) -> None:
    """See ``source.Finish``. What libvirt does not call whole is not taken for it."""
    while (found := jobs.stats(domain)).is_active:
        tell(found.done, found.total)
        check()
        time.sleep(POLL_SECONDS)
    ended = jobs.outcome(domain) if domain.is_active() else None
    if ended is None or not (ended.is_whole or ended.error):
        raise scratch.why_gone(domain)
    if ended.is_whole:
        return
    kind = NoSpaceError if os.strerror(errno.ENOSPC) in ended.error else RepositoryError
    raise kind(
        f"QEMU could not write domain {domain.name} into {directory}: {ended.error}; "
        f"nothing was saved, and the guest has not seen it"
    )
