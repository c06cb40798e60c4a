"""What is worth asking the journal for: each event with its id, text, meaning and cure.

``scripts/gen-events`` makes docs/reference/events.md and systemd's message catalogue of this. An
id never changes and is never used again (``journalctl --new-id128`` makes one): people filter by
it. Texts name fields in braces; the journal has each as ``NBDBACKUP_<field>``.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nbdbackupd import log as runlog

CONTEXT: Final = ("DOMAIN", "UUID", "RUN", "SET")
"""Fields that ``log.context`` sets once for everything that a run says, as far as it knows them."""

FIELDS: Final[Mapping[str, str]] = {
    "DOMAIN": "name of the domain",
    "UUID": "its UUID",
    "RUN": "id of the run; all records of one run share it",
    "SET": "path of the backup set",
    "POINT": "id of the restore point",
    "LEVEL": "level of the point, or the one that was asked for",
    "DISK": "target of the disk, as `vda`",
    "CHECKPOINT": "name of the checkpoint",
    "BYTES": "number of bytes, see the event",
    "COUNT": "how many, see the event",
    "DURATION_USEC": "how long it took, in microseconds",
    "UNIT": "name of the systemd unit",
    "REASON": "why, in words",
    "AT": "when, in local time",
}
"""What each field means, in the order of the page."""

CRITICAL: Final = 2
ERROR: Final = 3
WARNING: Final = 4
NOTICE: Final = 5
INFO: Final = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One kind of event. ``priority`` is syslog's, as the journal keeps it.

    ``level`` is what terminals and the run's log go by: lower than the priority where the command
    says the same by itself. ``fields`` come with each event of this kind; ``text``, ``meaning``
    and ``cure`` may name them and those of the context.
    """

    name: str
    id: str
    priority: int
    level: int
    text: str
    fields: tuple[str, ...]
    meaning: str
    cure: str


_TOLD: Final = "told_as_event"
"""An attribute of exceptions."""


def mark_told(err: BaseException) -> None:
    """Remember that an event has told of this error: the journal need not hear of it twice."""
    vars(err)[_TOLD] = True


def is_told(err: BaseException) -> bool:
    """Whether an event has told of this error."""
    return _TOLD in vars(err)


def emit(logger: logging.Logger, event: Event, /, **values: object) -> None:
    """Log one event with its fields, named in lower case; the context adds its own.

    Raises ValueError for fields that are not those of the event.
    """
    given = runlog.fields(**{name.upper(): value for name, value in values.items()})
    if set(given) != set(event.fields):
        raise ValueError(f"event {event.name} has fields {event.fields}, not {tuple(given)}")
    known = defaultdict(lambda: "?", {**runlog.present(), **given})
    extra = {**given, runlog.MESSAGE_ID: event.id, runlog.PRIORITY: event.priority}
    logger.log(event.level, "%s", event.text.format_map(known), extra=extra, stacklevel=2)


def usec(seconds: float) -> int:
    """A duration as the journal has it."""
    return round(seconds * 1_000_000)


BACKUP_STARTED: Final = Event(
    name="backup-started",
    id="f55f72089d824b4f93e3524f426a71d6",
    priority=INFO,
    level=logging.INFO,
    text="backup of {DOMAIN} ({UUID}), level {LEVEL}",
    fields=("LEVEL",),
    meaning="A run has the locks of the domain and of the set, and begins. {LEVEL} is what was "
    "asked for; auto becomes a full or an increment.",
    cure="Nothing is to be done.",
)
BACKUP_COMMITTED: Final = Event(
    name="backup-committed",
    id="fc784c664edf4627aa3b57fa23ee0f81",
    priority=NOTICE,
    level=logging.INFO,
    text="restore point {POINT} of {DOMAIN} is committed: {LEVEL}, {BYTES} bytes",
    fields=("POINT", "LEVEL", "CHECKPOINT", "BYTES", "DURATION_USEC"),
    meaning="The point can be restored from now on, and its checkpoint is where the next increment "
    "starts. {BYTES} is what its disks take in the set.",
    cure="Nothing is to be done.",
)
BACKUP_WARNED: Final = Event(
    name="backup-warned",
    id="20bc033206534b20bb90f60099b6dd70",
    priority=WARNING,
    level=logging.INFO,
    text="restore point {POINT} of {DOMAIN} is committed with warnings: {REASON}",
    fields=("POINT", "LEVEL", "CHECKPOINT", "BYTES", "DURATION_USEC", "REASON"),
    meaning="The point can be restored, but something is not as it was asked for: a disk was read "
    "in full or left out, the guest was not frozen, a file beside the disks is missing.",
    cure="Read the warnings: the records of run {RUN}, or 'nbdbackupctl list', name them all. The "
    "exit status is 3; with --strict such a run makes no point.",
)
BACKUP_SKIPPED: Final = Event(
    name="backup-skipped",
    id="63df2dea153048dd8e953fa8a839f786",
    priority=INFO,
    level=logging.INFO,
    text="nothing saved: {REASON}",
    fields=("REASON",),
    meaning="The run found that there is nothing worth saving, and ended successfully. The next "
    "increment saves everything since the newest point.",
    cure="Nothing is to be done. If points are missed, lower or leave out the threshold.",
)
BACKUP_FAILED: Final = Event(
    name="backup-failed",
    id="3e863430261945c99d40f6d0e6796530",
    priority=ERROR,
    level=logging.INFO,
    text="backup of {DOMAIN} failed: {REASON}",
    fields=("REASON", "DURATION_USEC"),
    meaning="No point was made. The points that were there are sound, and the next increment saves "
    "everything since the newest of them.",
    cure="Fix what the reason names, then run again: 'systemctl start nbdbackup@NAME.service'. "
    "'nbdbackupctl check {DOMAIN}' tells whether the next run will work. nbdbackupctl(1), EXIT "
    "STATUS, tells what each status stands for.",
)
BACKUP_GAVE_WAY: Final = Event(
    name="backup-gave-way",
    id="bc0bb32f0ce048bebe577df70735fb9d",
    priority=NOTICE,
    level=logging.INFO,
    text="backup of {DOMAIN} gave way to its start: {REASON}",
    fields=("REASON", "DURATION_USEC"),
    meaning="The domain was off and its images were being read when it was to start, which comes "
    "first. No point was made; the newest one is still the base of the next increment.",
    cure="Nothing is to be done: a run that a unit began is tried again soon, and whichever run "
    "comes next saves the changes.",
)
BACKUP_AGAIN: Final = Event(
    name="backup-again",
    id="6efe024c8347411aa36df45c9b76b5ea",
    priority=NOTICE,
    level=logging.INFO,
    text="backup of {DOMAIN} is tried again at {AT}: {REASON}",
    fields=("AT", "REASON"),
    meaning="A run that a unit of ours began gave way to the start of the guest, or found another "
    "run or job at work. It waits, holding nothing, and tries again: after 5, 15 and 45 minutes. "
    "Only then does the unit fail.",
    cure="Nothing is to be done. 'nbdbackupctl status' shows the run as long as it waits.",
)
BACKUP_BUSY: Final = Event(
    name="backup-busy",
    id="d545f5e376684672b66755cdabb29970",
    priority=WARNING,
    level=logging.INFO,
    text="backup of {DOMAIN} was not begun: {REASON}",
    fields=("REASON", "DURATION_USEC"),
    meaning="Another run holds the lock of the domain or of the set, or the domain has a job of "
    "somebody else. No point was made. The exit status is 75.",
    cure="Let the other one end, or give --wait. The kernel drops locks when their holder dies, so "
    "none is ever stale. 'nbdbackupctl check {DOMAIN}' names the holder.",
)
DISK_DEMOTED: Final = Event(
    name="disk-demoted",
    id="a2e9335eff1245478f3ae80a78a46dd9",
    priority=WARNING,
    level=logging.WARNING,
    text="disk {DISK} is read in full: {REASON}",
    fields=("DISK", "REASON"),
    meaning="Within an increment this disk is saved whole, since what changed of it is not known. "
    "The point is sound; it takes more space and time. The next one is an increment again.",
    cure="Seen once, after a power cut, a crash of QEMU or a change of the disk, it is what must "
    "be. Seen again and again, something removes bitmaps: 'nbdbackupctl checkpoints {DOMAIN}' and "
    "'nbdbackupctl check {DOMAIN}' tell more.",
)
BASE_LOST: Final = Event(
    name="base-lost",
    id="6c5b59685c774d92b38de758dcb048f1",
    priority=WARNING,
    level=logging.INFO,
    text="the base of {DOMAIN} is lost: no disk has its changes since checkpoint {CHECKPOINT}",
    fields=("CHECKPOINT",),
    meaning="An increment was to be made, and not one disk could be read by its bitmap. All are "
    "saved whole in this point, which is sound and is the base from now on.",
    cure="Find out what removed the checkpoint: another backup program, 'virsh checkpoint-delete', "
    "images that were copied or converted while the domain was off, a revert to a snapshot.",
)
CHECKPOINT_REDEFINED: Final = Event(
    name="checkpoint-redefined",
    id="be58d1842be5492db320ebad7ef4d7d9",
    priority=INFO,
    level=logging.INFO,
    text="checkpoint {CHECKPOINT}: redefined, {REASON}",
    fields=("CHECKPOINT", "REASON"),
    meaning="libvirt did not know the checkpoint any more (the domain was undefined, migrated, or "
    "is transient) and was told of it again. The bitmaps in the images are as they were.",
    cure="Nothing is to be done.",
)
CHECKPOINT_REMOVED: Final = Event(
    name="checkpoint-removed",
    id="c4e001407f8140af85b462a5cae856cc",
    priority=INFO,
    level=logging.INFO,
    text="checkpoint {CHECKPOINT}: removed, {REASON}",
    fields=("CHECKPOINT", "REASON"),
    meaning="No later increment needs this checkpoint of ours: a newer base has taken its place, "
    "or the run that made it died. It would only have collected changes.",
    cure="Nothing is to be done.",
)
CHECKPOINT_LEFT: Final = Event(
    name="checkpoint-left",
    id="2b8e9bd2deb54b67a2a68ffe4efe717b",
    priority=WARNING,
    level=logging.WARNING,
    text="checkpoint {CHECKPOINT} is left as it is: {REASON}",
    fields=("CHECKPOINT", "REASON"),
    meaning="It should have been redefined or removed, which did not work. Restore points are not "
    "concerned; the next run tries again.",
    cure="If it comes again, see 'nbdbackupctl checkpoints {DOMAIN}', and fix what the reason "
    "names.",
)
DEAD_RUN_SWEPT: Final = Event(
    name="dead-run-swept",
    id="1d5c019f747742428631fb432ad489fd",
    priority=NOTICE,
    level=logging.INFO,
    text="removed what a dead run left: {REASON}",
    fields=("REASON",),
    meaning="An earlier run was killed. What it left (a job, scratch files, a draft) was "
    "cleared away. It had made no point, and none is harmed.",
    cure="Find out what killed it: the out-of-memory killer, the watchdog of the unit, a power "
    "cut, an administrator.",
)
HUNG_RUN_KILLED: Final = Event(
    name="hung-run-killed",
    id="4a2fd52e870348b4b1c235bcdeec4b04",
    priority=ERROR,
    level=logging.ERROR,
    text="the run is stopped or hangs, it is killed: {REASON}",
    fields=("REASON",),
    meaning="QEMU could not go on, or scratch space ran out, because the run of a backup was "
    "stopped or hung as a whole. Its guard has killed it, so that the guest goes on. Nothing was "
    "saved; no point is harmed.",
    cure="Find out what stopped the run: a signal, a terminal, a host that is out of memory. "
    "Then run again.",
)
SCRATCH_LOW: Final = Event(
    name="scratch-low",
    id="a188d108d4b84298999d5d779a11521c",
    priority=ERROR,
    level=logging.INFO,
    text="scratch space is filling up, the job is ended: {REASON}",
    fields=("REASON", "BYTES"),
    meaning="QEMU keeps blocks in scratch files that the guest overwrites during a job. When they "
    "fill the file system, the guest sees an error, or is held; so the job was ended. {REASON} "
    "says what is known of the guest, {BYTES} is what was free.",
    cure="Give more space (--scratch-dir, or 'scratch' in the configuration), or back the domain "
    "up when it writes less.",
)
GUEST_WAITS: Final = Event(
    name="guest-waits",
    id="93594b05d2764ae0b7cf730988e288e1",
    priority=NOTICE,
    level=logging.INFO,
    text="the guest of {DOMAIN} has shut down and waits, paused, for the end of its backup",
    fields=(),
    meaning="libvirt 11.10 and later keep QEMU until the backup job has ended, so that the run can "
    "finish its point. The domain is off afterwards. 'virsh start' is refused until then.",
    cure="Nothing is to be done. To have the guest boot at once: 'virsh resume {DOMAIN}'; the "
    "backup goes on.",
)
FREEZE_FAILED: Final = Event(
    name="freeze-failed",
    id="78e5f358be634f84b6ba4395a1c8213f",
    priority=WARNING,
    level=logging.INFO,
    text="the file systems of {DOMAIN} were not frozen: {REASON}",
    fields=("REASON",),
    meaning="The guest agent refused, or answered too late. The guest was thawed in any case. The "
    "point, if one is made, is what a power cut would leave: crash consistent.",
    cure="Look into the guest: the agent's own log, file systems that hang, a hook of the agent "
    "that fails. 'virsh domfsfreeze' shows the same outside a backup.",
)
THAW_FORCED: Final = Event(
    name="thaw-forced",
    id="fa8f473c621849b3bcc13b94fb47af6a",
    priority=ERROR,
    level=logging.ERROR,
    text="domain {DOMAIN}: {REASON}",
    fields=("REASON",),
    meaning="The guest was frozen, and the freeze ended otherwise than it should: too early, by "
    "our deadline since the job had not begun, or with an error of a hook in the guest. The point "
    "is crash consistent.",
    cure="Find out what held the job up: a loaded host, storage that hangs, another job. A guest "
    "with Windows ends each freeze after 10 seconds by itself.",
)
THAW_FAILED: Final = Event(
    name="thaw-failed",
    id="af0dc1d43df948e79fa114b39db87bca",
    priority=CRITICAL,
    level=logging.ERROR,
    text="domain {DOMAIN}: {REASON}",
    fields=("REASON",),
    meaning="The guest agent did not confirm the thaw. The guest may be frozen, or will be when "
    "the agent comes to an earlier freeze; then all that writes in it hangs. The run's guard asks "
    "for the thaw every second, or each time later, up to a minute, if the agent answers with an "
    "error; for two hours. It tells when the thaw has come (guest-released). The next runs do not "
    "freeze this guest for a while.",
    cure="Look into the guest: a hook of the agent that hangs, file systems that hang. 'virsh "
    "domfsthaw {DOMAIN}' thaws, too; an agent that does not answer has to be restarted.",
)
GUEST_RELEASED: Final = Event(
    name="guest-released",
    id="ea64b1ec6e654baaa042d3833528358a",
    priority=NOTICE,
    level=logging.INFO,
    text="domain {DOMAIN}: {REASON}",
    fields=("REASON",),
    meaning="A run that was killed, or whose freeze the agent answered too late, may have left the "
    "guest frozen or paused. Its guard, or who cleared up after it, has let it go.",
    cure="Nothing is to be done. If the agent answers late again and again, look at its hooks.",
)
IMAGES_RELEASED: Final = Event(
    name="images-released",
    id="ba7debf760834685ad02f9f495ef8e79",
    priority=NOTICE,
    level=logging.INFO,
    text="images of {DOMAIN} were let go of for its start: {REASON}",
    fields=("REASON", "DURATION_USEC"),
    meaning="libvirt's hook, or somebody, asked a backup to let go of the images of a domain that "
    "is to start. {DURATION_USEC} is how long the start was held up.",
    cure="Nothing is to be done.",
)
IMAGES_HELD: Final = Event(
    name="images-held",
    id="ddf086a4fbee4f089c69390738e003fb",
    priority=ERROR,
    level=logging.INFO,
    text="images of {DOMAIN} are still held, its start may fail: {REASON}",
    fields=("REASON",),
    meaning="A reader did not let go in time. QEMU can't lock a qcow2 image that is still read, "
    "and says so.",
    cure="See who holds the file that the reason names ('fuser -v FILE'), end that process, and "
    "start the domain again.",
)
IMAGES_CHANGED: Final = Event(
    name="images-changed",
    id="175280742b254d519deb2ad429c6120d",
    priority=NOTICE,
    level=logging.INFO,
    text="images of {DOMAIN} are not as the guest left them: {REASON}",
    fields=("REASON",),
    meaning="Since libvirt's hook saw the guest end, somebody wrote to these images or replaced "
    "them. What programs wrote that know qcow2 is in the next increment; of an image without the "
    "bitmaps of the base, or that is not the disk's own, everything is read.",
    cure="Nothing is to be done if it was you, or a run that was killed. Don't write to images of "
    "a tracked disk with programs that do not know qcow2.",
)
NOTIFY_FAILED: Final = Event(
    name="notify-failed",
    id="bb9b3ef681534b3aa296bc44573087cf",
    priority=ERROR,
    level=logging.INFO,
    text="not everybody was told how {UNIT} ended: {REASON}",
    fields=("UNIT", "REASON"),
    meaning="A run has ended in a way that the section notification of the configuration wants "
    "told, and a mail or the command of the administrator failed.",
    cure="Fix what the reason names, then try it: 'nbdbackupctl notify UNIT'.",
)
HOOK_TROUBLE: Final = Event(
    name="hook-trouble",
    id="a947cf16816b44a7998ae4bb1b3decef",
    priority=WARNING,
    level=logging.WARNING,
    text="domain {DOMAIN}: {REASON}",
    fields=("REASON",),
    meaning="libvirt's hook could not do something about the start or the end of this domain: "
    "announce its start, start a unit, note a backup for later. It never holds a domain up. This "
    "record is the hook's own (hooks/qemu), so it has no other fields.",
    cure="Fix what the reason names. Then 'systemctl start nbdbackup@NAME.service' saves what was "
    "missed, and 'nbdbackupctl checkpoints {DOMAIN}' shows whether checkpoints are in order.",
)
POINTS_MERGED: Final = Event(
    name="points-merged",
    id="9062e3623ddc4d3386a2368d0e03e9aa",
    priority=NOTICE,
    level=logging.INFO,
    text="{COUNT} older restore points of {DOMAIN} have become a part of {POINT}",
    fields=("POINT", "COUNT"),
    meaning="What they held and {POINT} did not is in it now; it restores to the same bytes as "
    "before, and so do all points after it.",
    cure="Nothing is to be done.",
)
POINTS_REMOVED: Final = Event(
    name="points-removed",
    id="7d0e0233777441a1abca0e1a3e39f038",
    priority=NOTICE,
    level=logging.INFO,
    text="{COUNT} restore points of {DOMAIN} were removed, {BYTES} bytes are free",
    fields=("COUNT", "BYTES"),
    meaning="Nothing that is kept needed them. Files that are still being read are removed by the "
    "next run or removal.",
    cure="Nothing is to be done.",
)
VERIFY_SOUND: Final = Event(
    name="verify-sound",
    id="d69cec48de17451181e5865d358720f0",
    priority=NOTICE,
    level=logging.INFO,
    text="backup set {SET} is sound: {BYTES} bytes checked",
    fields=("BYTES", "DURATION_USEC"),
    meaning="Manifests, links, sizes and digests of all blocks that were to be looked at are as "
    "they should be.",
    cure="Nothing is to be done.",
)
VERIFY_DAMAGED: Final = Event(
    name="verify-damaged",
    id="94b23f15859344f29e336b08d8115f82",
    priority=CRITICAL,
    level=logging.INFO,
    text="backup set {SET} is damaged: {REASON}",
    fields=("REASON", "BYTES", "DURATION_USEC"),
    meaning="Points of this set can't be restored as they were saved. 'nbdbackupctl verify {SET}' "
    "names each damaged file, position, disk and point.",
    cure="Make a new full into a new set now. Keep the damaged set: points that do not need what "
    "is damaged can be restored by name. Then look after the storage.",
)
RESTORE_DONE: Final = Event(
    name="restore-done",
    id="efd253c894444e5dad2d35961cb2757d",
    priority=NOTICE,
    level=logging.INFO,
    text="restore point {POINT} of {DOMAIN} was restored",
    fields=("POINT", "BYTES", "DURATION_USEC"),
    meaning="All images are complete and carry their names. {BYTES} is what was written to them.",
    cure="Nothing is to be done.",
)
RESTORE_FAILED: Final = Event(
    name="restore-failed",
    id="0994473d240849cf83edfb6617ac76ea",
    priority=ERROR,
    level=logging.INFO,
    text="restore failed: {REASON}",
    fields=("REASON", "DURATION_USEC"),
    meaning="Images that were there before are as they were. What is not complete carries the "
    "suffix '.incomplete'.",
    cure="Fix what the reason names and restore again. If data is damaged, 'nbdbackupctl verify' "
    "names all of it, and an older point may be sound.",
)
BOOT_TEST_FAILED: Final = Event(
    name="boot-test-failed",
    id="494d2fdc306347b8887bd193a0b36c3d",
    priority=ERROR,
    level=logging.INFO,
    text="restore point {POINT} of {DOMAIN} did not come up: {REASON}",
    fields=("POINT", "REASON", "DURATION_USEC"),
    meaning="A guest that was booted from the point gave no sign of life in time.",
    cure="Look at the picture in the set, below boot-tests/, and run it by hand: "
    "'nbdbackupctl boot'.",
)
REPOSITORY_NOT_MOUNTED: Final = Event(
    name="repository-not-mounted",
    id="0de8c46365e3410fafb823f469d1d39c",
    priority=ERROR,
    level=logging.INFO,
    text="the repository is not there: {REASON}",
    fields=("REASON",),
    meaning="The configuration demands a marker file or a mount point, which is missing: the file "
    "system of the repository is most likely not mounted. Nothing was written.",
    cure="Mount it and run again. If the repository is new, make its marker file by hand.",
)
RETENTION_DONE: Final = Event(
    name="retention-done",
    id="753c45c8bfa4472593e1323304f6b7c6",
    priority=NOTICE,
    level=logging.INFO,
    text="retention of {DOMAIN}: {REASON}",
    fields=("BYTES", "REASON"),
    meaning="Points that no rule of the section retention wants were removed, so that about "
    "{BYTES} bytes became free; the reason tells how many went and how many stay.",
    cure="Nothing is to be done. 'nbdbackupctl prune --dry-run {DOMAIN}' shows what keeps each "
    "point.",
)
RETENTION_REFUSED: Final = Event(
    name="retention-refused",
    id="5fae6aa27abf4c728e9c5b4c15747612",
    priority=WARNING,
    level=logging.INFO,
    text="retention of {DOMAIN} removed nothing: {REASON}",
    fields=("REASON",),
    meaning="To go on could have cost points that somebody needs: a clock that is wrong, a set "
    "that is damaged, or more than half of all points to go at once.",
    cure="Look with 'nbdbackupctl prune --dry-run {DOMAIN}'. If it is right that so many go, run "
    "'nbdbackupctl prune --force {DOMAIN}' once; otherwise fix what the reason names.",
)
POINT_PROTECTED: Final = Event(
    name="point-protected",
    id="30e453f39e70429bade61626317a89af",
    priority=NOTICE,
    level=logging.INFO,
    text="restore point {POINT} of {DOMAIN} is protected: {REASON}",
    fields=("POINT", "REASON"),
    meaning="Somebody has said that this point is to stay, whatever the rules of retention want.",
    cure="Nothing is to be done. 'nbdbackupctl unprotect' leaves it to the rules again.",
)
POINT_UNPROTECTED: Final = Event(
    name="point-unprotected",
    id="c081a6855e4541e9935d1925441ac8fd",
    priority=NOTICE,
    level=logging.INFO,
    text="restore point {POINT} of {DOMAIN} is protected no longer",
    fields=("POINT",),
    meaning="From now on the rules of retention decide about this point.",
    cure="If it is still needed: 'nbdbackupctl protect'.",
)

ALL: Final = tuple(value for value in list(globals().values()) if isinstance(value, Event))
"""Every event, in the order of this module."""
