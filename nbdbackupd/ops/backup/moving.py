"""``yield --hosts``: what libvirt's hook tells the hosts that share a domain's state directory."""

import logging
from typing import Final

from nbdbackupd.model.domain import Domain
from nbdbackupd.ops.domain.images import Sharing
from nbdbackupd.source.hosts import Hosts

log = logging.getLogger(__name__)
UNKNOWN: Final = "unknown"


def run(operation: str, reason: str, domain: Domain, sharing: Sharing) -> str:
    """Tell them of a start, a migration or an end; before a start have their backups let go.

    ``operation`` is libvirt's word (https://libvirt.org/hooks.html). Says what was done. Raises
    BusyError if a backup does not let go, RepositoryError.
    """
    if sharing.state_dir is None:
        return f"no other host shares the state of domain {domain.name}"
    hosts = Hosts(sharing.state_dir, domain.name, domain.uuid)
    match operation:
        case "started" | "reconnect":
            hosts.started()
            return f"noted that domain {domain.name} runs on this host"
        case "release":
            hosts.ended(UNKNOWN if reason in ("", "-") else reason)
            return f"noted that domain {domain.name} has ended on this host"
        case _:
            hosts.announce(arrived=operation == "migrate")
            hosts.wait_for_readers()
            return f"no other host reads the images of domain {domain.name}"
