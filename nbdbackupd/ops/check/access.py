"""Whether QEMU gets to its scratch files and its socket, and whether there is room for them."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from nbdbackupd import rundir
from nbdbackupd.model import access
from nbdbackupd.model.access import Account
from nbdbackupd.model.finding import Notes
from nbdbackupd.ops.check.request import Patient, existing
from nbdbackupd.ops.domain import accounts
from nbdbackupd.source import scratch
from nbdbackupd.units import human_size
from nbdbackupd.virt import features

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
    free = scratch.free_bytes(directory)
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


def paths(patient: Patient, notes: Notes) -> None:
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


def confinement(patient: Patient, notes: Notes) -> None:
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
