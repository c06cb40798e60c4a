"""The source of a run: the domain's running QEMU."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.ops import leftovers
from nbdbackupd.ops.backup_job import Job
from nbdbackupd.source import Snapshot, running


def open_source(
    job: Job, on_trouble: Callable[[NbdbackupError], None]
) -> AbstractContextManager[Snapshot]:
    """The disks of the domain at one instant, as exports, for the body.

    ``on_trouble`` is told, from another thread, what ends the source in the middle. Raises the
    errors of the source when it is entered.
    """
    return running.open_running(_running_request(job, on_trouble))


def _running_request(
    job: Job, on_trouble: Callable[[NbdbackupError], None]
) -> running.RunningRequest:
    request = job.request
    return running.RunningRequest(
        domain=job.domain,
        disks=tuple(
            running.RunningDisk(target=plan.target, delta=plan.delta, tracked=plan.tracked)
            for plan in job.survey.plans
        ),
        run_id=request.run_id,
        runtime_dir=leftovers.socket_dir(request.runtime_dir, job.domain.uuid),
        scratch_dir=request.scratch_dir,
        scratch_reserve=request.scratch_reserve,
        on_trouble=on_trouble,
        base_checkpoint=job.parent.checkpoint if job.parent is not None else "",
        base_xml=job.repository.checkpoint_xml(job.parent),
        new_checkpoint=job.checkpoint,
        freeze=request.freeze,
        freeze_mountpoints=request.mountpoints,
        pause=request.pause,
    )
