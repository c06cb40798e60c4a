"""Runs: who works on the domain or the set now, and what those left that died."""

from nbdbackupd import rundir
from nbdbackupd.model.finding import Notes
from nbdbackupd.ops.check.request import OfLibvirt, OfQemu, Patient
from nbdbackupd.ops.domain import images
from nbdbackupd.qemu import machine
from nbdbackupd.repo import layout
from nbdbackupd.source import kept, lease, reach, running, scratch
from nbdbackupd.virt import jobs

SHOWN = 5


def job(patient: OfLibvirt, notes: Notes) -> None:
    """A job at libvirt: that of a run that lives, that of a dead one, or somebody else's."""
    name = patient.name
    if jobs.is_migrating(patient.domain):
        notes.warn("the domain is being migrated: a backup would be refused", "wait for its end")
        return
    found = jobs.active_job(patient.domain)
    if found is None:
        notes.ok("no job runs on the domain")
        return
    busy = patient.domain_holder()
    if not running.is_own_job(found, patient.socket_dir, patient.domain):
        notes.warn(
            f"the domain is busy with {found}: a backup would be refused",
            f"wait, or end a backup job with 'nbdbackupctl abort --any {name}'",
        )
    elif busy:
        notes.ok(f"a backup runs: {busy}")
    else:
        notes.warn(
            f"a dead run left its job: {found}",
            f"the next backup ends it, or 'nbdbackupctl abort {name}'",
        )


def jobs_of(patient: OfQemu, notes: Notes) -> None:
    """Jobs in a QEMU without libvirt: none is that of a run that lives, which has the monitor."""
    found = patient.qemu.machine.jobs("")
    for each in found:
        if each.startswith(machine.PREFIX):
            cure = f"the next backup ends it, or 'nbdbackupctl abort {patient.name}'"
            notes.warn(f"a dead run left its job {each}", cure)
        else:
            notes.ok(f"job {each} of another program runs")
    if not found:
        notes.ok("no job runs")


def locks(patient: Patient, notes: Notes) -> None:
    """Who holds the locks, and the lease on the images of a domain that is off."""
    waits = "a backup now would be refused, or wait with --wait"
    domain, of_set = patient.domain_holder(), patient.set_holder()
    if domain:
        notes.warn(f"the domain is locked by {domain}", waits)
    if of_set and of_set != domain:
        notes.warn(f"the set is locked by {of_set}", waits)
    if not domain and not of_set:
        notes.ok("nobody holds a lock")
    held = lease.read(patient.own_dir)
    if held is None:
        return
    if held.run.is_alive():
        notes.ok(f"process {held.run.pid} reads the images of the domain; its start ends that")
    else:
        notes.warn(
            f"a dead run left its lease {patient.own_dir / rundir.LEASE}",
            "it holds nothing; the next backup removes it",
        )


def hosts(patient: OfLibvirt, notes: Notes) -> None:
    """Where the domain is, and whether other hosts are told of what this one does with it."""
    elsewhere = patient.elsewhere
    if elsewhere:
        notes.ok(f"'run' saves nothing now: {elsewhere}")
        return
    sharing = patient.request.sharing
    shared = sharing.hosts(patient.domain)
    if shared is not None:
        for name in shared.readers():
            notes.warn(f"a run on host {name} reads its images", "a backup now would be refused")
        notes.ok(f"hosts that share {sharing.state_dir} are told when it starts and ends")
    elif sharing.devices != images.LOCAL:
        _alone(patient, notes)


def _alone(patient: OfLibvirt, notes: Notes) -> None:
    paths = {
        layer.filename: target
        for target, chain in patient.looked.chains.items()
        for layer in chain[:1]
        if patient.looked.definition.disk(target).device == "disk"
    }
    reached = [path for path in paths if not reach.is_own(path)]
    for path in reached:
        notes.warn(
            f"{paths[path]}: other hosts may reach {path}, and none is told of another: a backup "
            f"while the domain is off would keep it from starting there, and makes no increments "
            f"on block devices",
            images.CURE,
        )
    if not reached:
        notes.ok("no other host reaches its images")


def images_as_left(patient: OfLibvirt, notes: Notes) -> None:
    """Whether images of a domain that is off are as its guest, or our last run, has left them."""
    if patient.looked.is_active:
        return
    domain = patient.domain
    runtime_dir = patient.request.runtime_dir
    known = kept.read(runtime_dir, domain.name)
    if known is None or known.end is None or known.uuid != domain.uuid:
        return
    changes = kept.describe(kept.changed(runtime_dir, domain.name, domain.uuid))
    if changes:
        notes.warn(
            f"since the guest's end {changes}",
            "the next increment has what programs wrote that know qcow2, and reads replaced "
            "images whole; others must not write to images whose changes are tracked",
        )
    else:
        notes.ok("its images are as the guest left them")


def leftovers(patient: Patient, notes: Notes) -> None:
    """Files of dead runs; those of a run that lives are left out."""
    found = [] if patient.domain_holder() else _of_domain(patient, notes)
    if patient.request.directory is not None and not patient.set_holder():
        found += sorted(
            str(path) for path in patient.request.directory.glob(f"{layout.DRAFT_PREFIX}*")
        )
    for path in found[:SHOWN]:
        notes.warn(f"a dead run left {path}", "the next backup removes it")
    if len(found) > SHOWN:
        notes.warn(f"dead runs left {len(found) - SHOWN} files more")
    if not found:
        notes.ok("no dead run left anything")


def _of_domain(patient: Patient, notes: Notes) -> list[str]:
    marker = running.marker(patient.socket_dir)
    if marker.exists():
        notes.fail(
            f"an earlier run held the guest, and nobody saw it let go ({marker}): it may be frozen "
            "or paused, or freeze late",
            f"let it go with 'nbdbackupctl abort {patient.name}'",
        )
    files = [
        patient.own_dir / rundir.NOTE,
        patient.socket_dir / rundir.NBD_SOCKET,
        *scratch.leftovers(patient.request.scratch_dir, patient.uuid),
    ]
    return [str(path) for path in files if path.exists()]
