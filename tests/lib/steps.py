"""The steps of the product at which tests let something happen: see ``tests.lib.rigged``.

A name says what the step has done once it is over: ``KILL@job-begun#1`` strikes just before the
first job begins, ``KILL+@job-begun#1`` just after. Where a step is in the code stands here only,
so that code which moves changes one line of the tests.
"""

from typing import Final

GUARD: Final = "nbdbackupd.app.guard"
"""The program that holds the connections of a run."""

STEPS: Final = {
    # files
    "file-created": "nbdbackupd.durable:create_exclusive",
    "file-replaced": "nbdbackupd.durable:write_atomic",
    "file-synced": "nbdbackupd.durable:fsync_file",
    "directory-synced": "nbdbackupd.durable:fsync_directory",
    "os-fsync": "os:fsync",
    "os-pwritev": "os:pwritev",
    "os-rename": "os:rename",
    "os-unlink": "os:unlink",
    # a backup
    "clock-read": "nbdbackupd.app.context:now",
    "backup-made": "nbdbackupd.ops.backup.backup:_run_locked",
    "metadata-collected": "nbdbackupd.ops.backup.metadata:collect",
    "disk-copied": "nbdbackupd.ops.backup.recording:copy_disk",
    "image-taken": "nbdbackupd.ops.backup.recording:take_image",
    "blocks-copied": "nbdbackupd.nbdio.copy:copy",
    "request-begun": "nbdbackupd.nbdio.requests:Requests.begin",
    "requests-moved": "nbdbackupd.nbdio.requests:Requests.step",
    "requests-checked": "nbdbackupd.nbdio.requests:Requests.check",
    "block-written": "nbdbackupd.format.writer:StreamWriter.write",
    "stream-finished": "nbdbackupd.format.writer:StreamWriter.finish",
    "point-published": "nbdbackupd.repo.draft:Draft.publish",
    "derived-files-written": "nbdbackupd.repo.set_directory:SetDirectory._write_derived",
    "generation-switched": "nbdbackupd.repo.generation:switch",
    "draft-removed": "nbdbackupd.repo.draft:remove",
    "set-removal-applied": "nbdbackupd.ops.retention.prune:_apply",
    "removals-swept": "nbdbackupd.repo.set_directory:SetDirectory.sweep_removals",
    "empty-set-removed": "nbdbackupd.repo.set_directory:SetDirectory.remove_empty",
    # before and after it
    "leftovers-swept": "nbdbackupd.ops.checkpoints.leftovers:sweep",
    "run-noted": "nbdbackupd.ops.checkpoints.leftovers:note",
    "run-forgotten": "nbdbackupd.ops.checkpoints.leftovers:forget",
    "base-advanced": "nbdbackupd.ops.checkpoints.reconcile:advance",
    "chains-retired": "nbdbackupd.ops.run.retire:checkpoints.run",
    # a running domain
    "scratch-measured": "nbdbackupd.where:Here.free_bytes",
    "space-measured": "nbdbackupd.source.scratch:Space.is_low",
    "scratch-prepared": "nbdbackupd.source.scratch:prepare",
    "job-begun": "nbdbackupd.virt.jobs:begin",
    "job-aborted": "nbdbackupd.virt.jobs:abort",
    "checkpoint-redefined": "nbdbackupd.virt.checkpoints:redefine",
    "checkpoint-deleted": "nbdbackupd.virt.checkpoints:delete",
    "connection-kept": "nbdbackupd.source.guard:Guard.keep",
    "connection-going": "nbdbackupd.source.guard:Guard.going",
    "connection-ready": "nbdbackupd.source.guard:Guard.ready",
    "instance-started": "nbdbackupd.virt.instance:start_paused",
    "instance-ended": "nbdbackupd.virt.instance:end",
    "guest-frozen": "nbdbackupd.source.quiesce:_Ice.freeze",
    "jobs-begun": "nbdbackupd.source.standalone:_begin",
    "filter-put": "nbdbackupd.qemu.machine:Machine.put_filter",
    # a domain that is off
    "lease-announced": "nbdbackupd.source.lease:Lease.announce",
    "daemon-serves": "nbdbackupd.qemu.storage_daemon:serve",
    "changes-merged": "nbdbackupd.source.offline:_merge_changes",
    "images-compared": "nbdbackupd.source.untouched:check",
    "bitmap-added": "nbdbackupd.qemu.bitmaps:add",
    "bitmap-removed": "nbdbackupd.qemu.bitmaps:remove",
    # a restore
    "images-written": "nbdbackupd.ops.restore.work:write_all",
    "images-set-aside": "nbdbackupd.ops.restore.restore:_set_aside",
    "images-named": "nbdbackupd.ops.restore.restore:_name_all",
    "device-finished": "nbdbackupd.ops.restore.devices:Device.finish",
    "side-files-copied": "nbdbackupd.ops.restore.side_files:copy",
    "domain-defined": "nbdbackupd.virt.definition:define",
    # a boot
    "point-served": "nbdbackupd.ops.boot.launch:serve",
    "overlay-created": "nbdbackupd.qemu.image:create_on_server",
    "transient-started": "nbdbackupd.virt.transient:start",
    "final-image-made": "nbdbackupd.ops.boot.images:make",
    "blockcopy-begun": "nbdbackupd.virt.blockcopy:begin",
    "blockcopy-pivoted": "nbdbackupd.virt.blockcopy:pivot",
    # sets of others
    "peer-index-written": "nbdbackupd.ops.sets.peer_index:write",
}
"""Functions, by module and path in it."""

FIELDS: Final = {
    "freeze-seconds": "nbdbackupd.source.running:RunningRequest.freeze_seconds",
    "quiet-seconds": "nbdbackupd.source.quiesce:Quiet.seconds",
}
"""Fields of dataclasses, whose default can be another one."""
