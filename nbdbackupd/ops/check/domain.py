"""The domain itself: what libvirt can do with it, images, guest agent, scratch space."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from nbdbackupd import rundir
from nbdbackupd.errors import FreezeError, NbdbackupError
from nbdbackupd.model import access
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.access import Account
from nbdbackupd.model.chain import Level
from nbdbackupd.model.domain import Agent
from nbdbackupd.model.finding import Notes
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.model.selection import BY_REQUEST, ImageFacts, select_disks, why_whole
from nbdbackupd.ops.check import sets
from nbdbackupd.ops.check.request import OfLibvirt, OfQemu, Patient, existing
from nbdbackupd.ops.domain import accounts, domains
from nbdbackupd.ops.domain.survey import LOCAL_TYPES
from nbdbackupd.qemu import image
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.units import human_size
from nbdbackupd.virt import features, guest
from nbdbackupd.virt.domain import GuestState
from nbdbackupd.where import HERE

AGENT_SECONDS = 3.0
QCOW2 = "qcow2"
RAW = "raw"


def features_of(patient: OfLibvirt, notes: Notes) -> None:
    """Whether libvirt backs up this domain, and how well."""
    domain = patient.domain
    match features.has_backup(domain):
        case True:
            notes.ok("its emulator can be backed up")
        case False:
            notes.fail(
                "libvirt can't back up a domain with this emulator",
                "use libvirt 7.6 and QEMU 5.2 or newer",
            )
        case None:
            notes.warn("libvirt does not say whether it can back up this domain")
    if features.has_checkpoints(domain):
        notes.ok("checkpoints are supported")
    else:
        notes.fail("libvirt has no checkpoints", "use libvirt 7.6 or newer")
    if features.has_begin_flag(domain, features.PRESERVE_SHUTDOWN_FLAG):
        notes.ok("a guest that shuts down during a backup is kept until the backup ends")
    else:
        notes.ok("a guest that shuts down during a backup ends that run; the next one makes it up")
    if not patient.looked.is_active:
        notes.ok("the domain is off: what only a running one shows was not looked at")


def disks(patient: Patient, notes: Notes) -> None:
    """Which disks a backup takes, and what is wrong with their images."""
    looked = patient.looked
    facts = looked.facts
    head = sets.head(patient)
    before = head.disks if head is not None else ()
    skipped_before = head.skipped if head is not None else ()
    left_out = {each.target for each in skipped_before if each.reason in BY_REQUEST}
    raw = any(disk.format == RAW for disk in before)
    try:
        # this level takes every disk that can be saved at all
        found = select_disks(looked.definition, facts, level=Level.COPY, raw=raw)
    except NbdbackupError as err:
        notes.fail(err.message)
        return
    for skipped in found.skipped:
        text = f"{skipped.target} is not saved: it is {skipped.reason}"
        if skipped.target in left_out:
            notes.ok(f"{skipped.target} is not saved, nor was it in the last point")
        elif skipped in found.unsaved:
            notes.warn(text, f"if that is meant, exclude it: {_exclude(skipped.target)}")
        else:
            notes.ok(text)
    for chosen in found.chosen:
        if chosen.target in left_out:
            notes.ok(f"{chosen.target} was left out of the last point")
        disk = looked.definition.disk(chosen.target)
        why, _ = why_whole(disk, facts.get(disk.target, ImageFacts()))
        _disk(patient, disk, why, notes)


def _disk(patient: Patient, disk: domain_model.Disk, why: str, notes: Notes) -> None:
    chain = patient.looked.chains.get(disk.target)
    if chain is None:
        _unseen(disk, notes)
        return
    for layer in chain:
        _layer(disk, layer, is_active=patient.looked.is_active, notes=notes)
    top = chain[0]
    text = f"{disk.target}: {top.format}, {human_size(top.virtual_size)}"
    if len(chain) > 1:
        text += f", {len(chain) - 1} backing image{'s' * (len(chain) > 2)}"
    old = f"set it with 'qemu-img amend -f qcow2 -o compat=1.1 {top.filename}' while it is off"
    if disk.format == RAW:
        # only here if the last point holds it, so that is known and wanted
        notes.ok(f"{text}; saved whole each time: a raw image records no changes")
    elif disk.format != QCOW2:
        notes.warn(f"{text}; saved whole each time: it records no changes", "convert it to qcow2")
    elif not top.can_hold_bitmaps:
        notes.warn(f"{text}; saved whole each time: version 2 records no changes", old)
    elif why:
        notes.ok(f"{text}; saved whole each time: {why}")
    else:
        notes.ok(f"{text}; its changes can be tracked")
    if disk.shareable:
        notes.warn(
            f"{disk.target} is shareable: what other domains write to it is not recorded",
            f"leave it out ({_exclude(disk.target)}), or make fulls only",
        )


def _exclude(target: str) -> str:
    return f"disks.exclude [{target}], or 'backup -x {target}'"


def _unseen(disk: domain_model.Disk, notes: Notes) -> None:
    """An image that qemu-img could not read; asked again for the reason."""
    if disk.type not in LOCAL_TYPES:
        notes.ok(f"{disk.target}: {disk.format} of kind {disk.type}, not to be seen from here")
        return
    try:
        image.info_chain(Path(disk.source), format=disk.format)
    except NbdbackupError as err:
        notes.fail(
            f"{disk.target}: {err.message}", "see that all images of its backing chain are there"
        )


def _layer(
    disk: domain_model.Disk, layer: image.ImageInfo, *, is_active: bool, notes: Notes
) -> None:
    """What an image's header says against it."""
    name = f"{disk.target}: image {layer.filename}"
    if layer.corrupt:
        notes.fail(
            f"{name} is marked corrupt",
            f"power the guest off, then 'qemu-img check -r all {layer.filename}'; make a full then",
        )
    if layer.dirty and not is_active:
        # a running guest with lazy refcounts has it set all the time
        notes.warn(
            f"{name} was not closed cleanly",
            "QEMU repairs it when the guest starts; or 'qemu-img check -r leaks'",
        )
    if layer.encrypted:
        notes.warn(
            f"{name} is encrypted: a backup of it is not", "keep the target where that is right"
        )
    if layer.data_file and not _is_readable(layer):
        notes.fail(f"{name}: its data file {layer.data_file} can't be read")


def _is_readable(layer: image.ImageInfo) -> bool:
    path = Path(layer.filename).parent / layer.data_file
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def agent(patient: OfLibvirt, notes: Notes) -> None:
    """Whether the guest can be frozen; a backup of one that can't is crash consistent, or fails."""
    policy = patient.request.freeze_policy
    kind = patient.looked.definition.agent
    if not patient.looked.is_active:
        channel = "has no channel for" if kind is Agent.ABSENT else "has a channel for"
        notes.ok(f"the domain is off, and {channel} a guest agent")
    elif policy not in (FreezePolicy.AUTO, FreezePolicy.REQUIRE):
        notes.ok(f"the guest is not frozen, as freeze.policy says: {policy}")
    elif kind is Agent.ABSENT:
        cure = f"add a channel {domain_model.AGENT_CHANNEL} to the domain; install qemu-guest-agent"
        unfrozen(patient, notes, "no channel for a guest agent", f"{cure} in the guest")
    elif kind is Agent.DISCONNECTED:
        cure = "install qemu-guest-agent in the guest, and start it"
        unfrozen(patient, notes, "the guest agent is not connected", cure)
    else:
        _ask(patient, notes)


def agent_of(patient: OfQemu, notes: Notes) -> None:
    """The same for a QEMU without libvirt."""
    policy = patient.request.freeze_policy
    if policy not in (FreezePolicy.AUTO, FreezePolicy.REQUIRE):
        notes.ok(f"the guest is not frozen, as freeze.policy says: {policy}")
        return
    if patient.guest.state() is not GuestState.RUNNING:
        notes.ok("the guest does not run, so its agent was not asked")
        return
    kind = patient.guest.agent()
    problem = {
        Agent.ABSENT: "no socket of a guest agent is named",
        Agent.DISCONNECTED: "no guest agent answers on its socket",
    }.get(kind, "")
    if problem:
        unfrozen(patient, notes, problem, patient.guest.cures[kind])
    else:
        notes.ok("the guest agent answers")


def unfrozen(patient: Patient, notes: Notes, problem: str, cure: str) -> None:
    """A guest that can't be frozen: whether its runs fail at that, the policy decides."""
    if patient.request.freeze_policy == FreezePolicy.REQUIRE:
        notes.fail(
            f"{problem}, and freeze.policy is 'require': no run saves the running guest",
            f"{cure}; or set freeze.policy to 'auto'",
        )
    else:
        notes.warn(problem, f"{cure}; else its points are crash consistent")


def _ask(patient: OfLibvirt, notes: Notes) -> None:
    busy = patient.domain_holder()
    if busy:
        # our question would set the agent's timeout that this run relies on
        notes.ok(f"the guest agent is connected; not asked, since {busy} may talk to it")
        return
    try:
        found = guest.guest_info(patient.domain, seconds=AGENT_SECONDS)
    except FreezeError as err:
        problem = f"the guest agent is connected and does not answer: {err.message}"
        unfrozen(patient, notes, problem, "restart qemu-guest-agent in the guest")
    else:
        system = found.get("os.pretty-name") or found.get("os.name") or "unknown system"
        notes.ok(f"the guest agent answers: {system}")
    _remembered(patient, notes)


def _remembered(patient: OfLibvirt, notes: Notes) -> None:
    """Whether runs leave the guest unfrozen for a while; 'require' asks its agent all the same."""
    memory = StateDirectory(patient.request.state_dir).freeze_memory(patient.uuid)
    obstacle = ""
    if memory is not None:
        obstacle = memory.obstacle(patient.request.now, domains.instance_of(patient.domain))
    if obstacle and patient.request.freeze_policy == FreezePolicy.AUTO:
        notes.warn(
            f"a run now would not freeze the guest: {obstacle}",
            "look into the guest: what makes its agent hang or die in a freeze, such as a hook",
        )


ENFORCE = Path("/sys/fs/selinux/enforce")
APPARMOR_RULES = (
    Path("/etc/apparmor.d/local/abstractions/libvirt-qemu"),
    Path("/etc/apparmor.d/abstractions/libvirt-qemu.d"),
    Path("/etc/apparmor.d/abstractions/libvirt-qemu"),
)


def scratch_space(patient: Patient, notes: Notes) -> None:
    """The free space against the reserve, and against the most that a job can need."""
    if not patient.looked.is_active:
        notes.ok("the domain is off: no scratch space is needed")
        return
    request = patient.request
    directory = existing(request.scratch_dir)
    if not directory.is_dir():
        advice = "give another one: scratch.directory, or --scratch-dir"
        notes.fail(f"{directory} is no directory", advice)
        return
    free = HERE.free_bytes(directory)
    where = f"{request.scratch_dir} has {human_size(free)} free"
    if directory != request.scratch_dir:
        where = f"{request.scratch_dir} will be made; {directory} has {human_size(free)} free"
    advice = "make room, or give another directory: scratch.directory, or --scratch-dir"
    if free < 2 * request.scratch_reserve:
        notes.fail(
            f"{where}, a backup begins with {human_size(2 * request.scratch_reserve)}", advice
        )
        return
    most = sum(patient.looked.states[target].size for target in patient.saved())
    if free - request.scratch_reserve >= most:
        notes.ok(f"{where}, enough for a guest that overwrites its disks ({human_size(most)})")
        return
    # hardly any guest overwrites all of its disks within one backup
    notes.ok(
        f"{where}; the backup ends if the guest overwrites more than "
        f"{human_size(free - request.scratch_reserve)} meanwhile (its disks: {human_size(most)})"
    )


def paths(patient: OfLibvirt, notes: Notes) -> None:
    """Every directory on the way to the scratch files and to the socket."""
    request = patient.request
    if fault := rundir.socket_fault(patient.socket_dir / rundir.NBD_SOCKET):
        notes.fail(fault, "give a shorter --runtime-dir")
    owner = patient.domain.owner()
    if owner is None:
        notes.warn("libvirt does not tell under which account QEMU runs; paths were not looked at")
        return
    who = accounts.account(*owner)
    name = accounts.name_of(who.uid)
    _way("the scratch directory", request.scratch_dir, who, notes)
    # the last directory is given to QEMU's account when a job begins
    _way("the directory of the NBD socket", patient.socket_dir.parent, who, notes)
    for directory in (request.scratch_dir, patient.own_dir):
        _writable(directory, notes)
    notes.ok(f"QEMU runs as {name}, in {len(who.groups)} group{'s' * (len(who.groups) != 1)}")


def _way(what: str, path: Path, who: Account, notes: Notes) -> None:
    """Note the first directory that ``who`` can't pass; what is missing will be made passable."""
    for directory in accounts.ancestors(path):
        try:
            status = directory.stat()
        except FileNotFoundError:
            break
        if not stat.S_ISDIR(status.st_mode):
            notes.fail(f"{directory} on the way to {what} is no directory")
            return
        owner = (status.st_uid, status.st_gid)
        if access.allows(status.st_mode, owner, who, access.PASS):
            continue
        text = (
            f"QEMU ({accounts.name_of(who.uid)}) can't pass {directory} (mode "
            f"{stat.S_IMODE(status.st_mode):o}, owner {accounts.name_of(status.st_uid)}, group "
            f"{accounts.group_of(status.st_gid)}) to {what} {path}"
        )
        if accounts.has_acl(directory):
            notes.warn(f"{text}, unless its ACL lets it", f"see 'getfacl {directory}'")
            continue
        notes.fail(text, f"'chmod o+x {directory}', or choose another directory")
        return
    notes.ok(f"QEMU gets to {what} {path}")


def _writable(path: Path, notes: Notes) -> None:
    directory = existing(path)
    # that it is no directory was said already
    if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):
        notes.fail(f"this account can't write to {directory}", "run as root, or give another one")


def confinement(patient: OfLibvirt, notes: Notes) -> None:
    """What AppArmor or SELinux must let QEMU do: libvirt labels scratch files, not the socket."""
    found = features.confinement(patient.domain)
    if not found.host:
        notes.ok("libvirt confines no domains with AppArmor or SELinux")
        return
    if patient.looked.is_active and not found.worn:
        notes.ok(f"{', '.join(found.host)} does not confine this domain")
        return
    runtime = patient.request.runtime_dir
    if "apparmor" in found.host:
        rule = f"{runtime}/@{{profile_name}}/* rwk,"
        if _is_allowed(runtime):
            notes.ok(f"AppArmor's rules for QEMU name {runtime}")
        else:
            notes.warn(
                f"AppArmor may keep QEMU from its socket: no rule for QEMU names {runtime}",
                f"add '{rule}' to {APPARMOR_RULES[0]}; libvirt 11.3 loads it with the next "
                "backup, others when the guest is powered off and on",
            )
    if "selinux" in found.host and _is_enforcing():
        _selinux(runtime, notes)


def _is_allowed(runtime: Path) -> bool:
    """Whether a rule of ours is in one of the files that each domain's profile includes."""
    for place in APPARMOR_RULES:
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        for file in files:
            with suppress(OSError):
                lines = file.read_text(errors="replace").splitlines()
                rules = (line.strip().strip('"') for line in lines)
                if any(rule.startswith(f"{runtime}/") for rule in rules):
                    return True
    return False


def _is_enforcing() -> bool:
    try:
        return ENFORCE.read_text().strip() == "1"
    except OSError:
        return False


def _selinux(runtime: Path, notes: Notes) -> None:
    directory = existing(runtime)
    try:
        context = os.getxattr(directory, "security.selinux").rstrip(b"\0").decode(errors="replace")
    except OSError:
        context = "no context"
    kind = "qemu_var_run_t"
    if directory == runtime and f":{kind}:" in context:
        notes.ok(f"SELinux: {runtime} has the context {context}")
        return
    notes.warn(
        f"SELinux may keep QEMU from its socket: {directory} has the context {context}",
        f"'semanage fcontext -a -t {kind} \"{runtime}(/.*)?\"', then 'restorecon -R {runtime}'",
    )
