"""After a new set has begun: the checkpoints of the domain's older sets are of no more use."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd.errors import GaveWayError, NbdbackupError
from nbdbackupd.model.naming import tag_of, tag_of_chain
from nbdbackupd.ops.checkpoints import checkpoints
from nbdbackupd.ops.checkpoints.checkpoints import CheckpointsReport, CheckpointsRequest
from nbdbackupd.ops.domain import domains, qemu
from nbdbackupd.ops.domain.images import ALONE, Sharing
from nbdbackupd.ops.sets.sets import sets_of
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.virt import checkpoints as virt_checkpoints
from nbdbackupd.virt.connection import Connection

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetireRequest:
    """The domain; the directory of its sets; the chain that goes on, whose checkpoints stay.

    ``has_begun``: that chain is new, so the sets are read, too, for chains without a record.
    """

    uuid: str
    directory: Path
    chain: str
    runtime_dir: Path
    state_dir: Path
    run_id: str
    has_begun: bool
    sharing: Sharing = ALONE


def retire(
    request: RetireRequest, connection: Connection, cancelled: Callable[[], None]
) -> tuple[str, ...]:
    """Drop checkpoints and bitmaps of the other chains of ``directory``; a line for each problem.

    Each bitmap costs the guest's writes and its disks' space, and would stay for good: only the
    newest set of a directory is ever continued. What can't be dropped is tried by the next run,
    also if the domain is just being started. Raises what ``cancelled`` raises.
    """

    def tags() -> set[str]:
        domain = domains.find(connection, request.uuid, request.runtime_dir)
        return {tag_of(name) for name in virt_checkpoints.names(domain)}

    def drop(order: CheckpointsRequest) -> CheckpointsReport:
        return checkpoints.run(order, connection, cancelled=cancelled)

    return _retire(request, request.uuid, tags, drop)


def retire_of_qemu(request: RetireRequest, path: Path, name: str) -> tuple[str, ...]:
    """The same with the bitmaps of a QEMU without libvirt, whose monitor is ``path``."""

    def tags() -> set[str]:
        with qemu.connect(path, name) as found:
            drives = found.drives().values()
            return {tag_of(each) for drive in drives for each in drive.bitmaps or {}}

    def drop(order: CheckpointsRequest) -> CheckpointsReport:
        return checkpoints.run_of_qemu(order, path)

    return _retire(request, name, tags, drop)


def _retire(
    request: RetireRequest,
    domain: str,
    tags: Callable[[], set[str]],
    drop: Callable[[CheckpointsRequest], CheckpointsReport],
) -> tuple[str, ...]:
    problems: list[str] = []
    try:
        for chain in _others(request, tags):
            log.info("dropping the checkpoints of chain %s, whose set is complete", chain)
            problems += _drop(request, domain, chain, drop)
    except GaveWayError as err:
        log.info("checkpoints of older sets are left to the next run: %s", err)
    except NbdbackupError as err:
        problems.append(f"checkpoints of older sets are not dropped: {err.message}")
    return tuple(problems)


def _drop(
    request: RetireRequest,
    domain: str,
    chain: str,
    drop: Callable[[CheckpointsRequest], CheckpointsReport],
) -> tuple[str, ...]:
    order = CheckpointsRequest(
        domain=domain,
        runtime_dir=request.runtime_dir,
        state_dir=request.state_dir,
        run_id=request.run_id,
        drop=chain,
        sharing=request.sharing,
    )
    try:
        return drop(order).problems
    except GaveWayError:
        raise
    except NbdbackupError as err:
        return (f"checkpoints of chain {chain} are not dropped: {err.message}",)


def _others(request: RetireRequest, tags: Callable[[], set[str]]) -> Iterator[str]:
    """The chains of the directory that have a record, or have left a checkpoint at libvirt."""
    home = os.path.realpath(request.directory)
    noted = {
        record.chain
        for record in StateDirectory(request.state_dir).records(request.uuid)
        if os.path.realpath(Path(record.set).parent) == home
    }
    stored = set()
    if request.has_begun:
        left = tags()
        stored = {
            point.chain
            for each in sets_of(request.directory)
            for point in each.known.points
            if point.uuid == request.uuid and tag_of_chain(point.chain) in left
        }
    yield from sorted((noted | stored) - {request.chain})
