"""After a new set has begun: the checkpoints of the domain's older sets are of no more use."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.ops import checkpoints
from nbdbackupd.ops.checkpoints import CheckpointsRequest
from nbdbackupd.repo.state import State
from nbdbackupd.virt.connection import Connection

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetireRequest:
    """The domain; the directory of its sets; the chain that goes on, whose checkpoints stay."""

    uuid: str
    directory: Path
    chain: str
    runtime_dir: Path
    state_dir: Path
    run_id: str


def retire(
    request: RetireRequest, connection: Connection, cancelled: Callable[[], None]
) -> tuple[str, ...]:
    """Drop checkpoints and bitmaps of the other chains of ``directory``; a line for each problem.

    Each bitmap costs the guest's writes and its disks' space, and would stay for good: only the
    newest set of a directory is ever continued. What can't be dropped is tried by the next run.
    Raises what ``cancelled`` raises.
    """
    problems: list[str] = []
    home = os.path.realpath(request.directory)
    for record in State(request.state_dir).records(request.uuid):
        if record.chain == request.chain or os.path.realpath(Path(record.set).parent) != home:
            continue
        log.info("dropping the checkpoints of set %s, which is complete", record.set)
        try:
            report = checkpoints.run(
                CheckpointsRequest(
                    domain=request.uuid,
                    runtime_dir=request.runtime_dir,
                    state_dir=request.state_dir,
                    run_id=request.run_id,
                    drop=record.chain,
                ),
                connection,
                cancelled=cancelled,
            )
            problems += report.problems
        except NbdbackupError as err:
            problems.append(f"checkpoints of set {record.set} are not dropped: {err.message}")
    return tuple(problems)
