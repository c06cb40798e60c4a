"""The one list of all settings: path, kind, default, help. Everything else is made from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd.config import kinds
from nbdbackupd.config.kinds import Kind, choice, count, listed, optional

DIRECTORY: Final = Path("/etc/nbdbackup")
MAIN: Final = "nbdbackup.yaml"
DOMAINS: Final = "domains.d"
MATCH: Final = "match"
METADATA: Final = "metadata"
LABELS_URI: Final = "urn:nbdbackup:1"

USE: Final = (
    "They are read by the verbs run, which timers start, status, notify, and backup without -o, by "
    "the generator of timers, and to find the sets of a domain by its name."
)
"""What the generated pages must tell as long as it is so; empty when it is not."""

MATCHERS: Final[Mapping[str, str]] = {
    "name": "The domain's name or UUID, letter for letter.",
    "glob": "A pattern for the whole name: * for any text, ? for one character, [ab] for one "
    "of these.",
    "regex": "A regular expression, in Python's syntax, for the whole name.",
    METADATA: "Labels in the domain's XML, each with a pattern as for glob.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting.

    ``default`` None means what ``kind`` renders for it. ``example`` is a value, as YAML, for a
    setting whose default is empty. ``option`` is the option of ``backup`` for the same.
    ``everywhere``: may also stand in a file for some domains; else in the main file only.
    """

    path: str
    kind: Kind
    default: Any
    help: str
    example: str = ""
    option: str = ""
    everywhere: bool = True

    @property
    def section(self) -> str:
        """The first part of the path, or empty for a setting that stands alone."""
        return self.path.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def field(self) -> str:
        """The name of the value in ``DomainSettings``."""
        return self.path.replace(".", "_")


SECTIONS: Final[Mapping[str, str]] = {
    "repository": "Where backup sets go, and how to notice that the place is not mounted.",
    "level": "When a new set begins, which means a new full. Until then each run makes an "
    "increment. A set begins as soon as one of these says so.",
    "schedule": "When the domain is backed up.",
    "disks": "Which disks are saved.",
    "freeze": "How the guest is held still at the instant of the point.",
    "scratch": "Where QEMU keeps old blocks that the guest overwrites during a run.",
    "limits": "How much a run may take, and how long it waits.",
    "retention": "Which points are kept. A point is kept if one of these wants it, and so is all "
    "that it needs. With no number set, all are kept. This version shows these settings and "
    "removes nothing.",
    "commands": "Programs to run around a backup. They are started directly, not by a shell.",
    "notification": "Whom to tell about the end of a run.",
    "monitoring": "How old the newest point may be, and what is told to Prometheus.",
    "libvirt": "The connection to libvirt. Secrets never stand in these files: they come from a "
    "file that only its owner can read, or from systemd's credentials.",
}


def _numbers(period: str, unit: str) -> Setting:
    return Setting(
        path=f"retention.{period}", kind=count(0, 9999), default=0,
        help=f"Keep the newest point of each of so many {unit} that have one.",
    )  # fmt: skip


_REPOSITORY: Final = (
    Setting(
        path="repository.path", kind=kinds.PATH, default=Path("/var/lib/nbdbackup/repository"),
        help="Each domain has a directory of its name below this one, and in it each set has one. "
        "Hosts may share it: a directory belongs to one UUID.",
    ),
    Setting(
        path="repository.marker", kind=optional(kinds.FILE_NAME, "none"), default=None,
        example=".nbdbackup-repository",
        help="A file that must exist in the path. Make it once, on the mounted target: a run "
        "that does not find it saves nothing, instead of filling the root disk.",
    ),
    Setting(
        path="repository.mount_point", kind=optional(kinds.PATH, "none"), default=None,
        example="/backup",
        help="A directory, the path itself or one above it, on which something must be mounted; / "
        "says that the root file system is meant.",
    ),
)  # fmt: skip

_LEVEL: Final = (
    Setting(
        path="level.rotate", kind=choice("monthly", "weekly", "never"), default="monthly",
        help="Begin a set with the first run of a calendar month or ISO week, in local time.",
    ),
    Setting(
        path="level.full_every", kind=optional(kinds.DAYS, "never"), default=None, example="14d",
        help="Begin a set when the newest full is so many calendar days old, in local time.",
    ),
    Setting(
        path="level.max_increments", kind=optional(count(0, 100000), "unlimited"), default=None,
        example="60",
        help="Begin a set instead of adding one more increment than this.",
    ),
)  # fmt: skip

_SCHEDULE: Final = (
    Setting(
        path="schedule.calendar", kind=listed(kinds.CALENDAR), default=("*-*-* 02:00:00",),
        help="When to run, as calendar events of systemd.time(7); an empty list means never. "
        "'systemd-analyze calendar' explains an event.",
    ),
    Setting(
        path="schedule.random_delay", kind=kinds.DURATION, default=1800.0,
        help="Begin up to so much later. Each domain has its own delay, the same every day.",
    ),
    Setting(
        path="schedule.enable", kind=kinds.BOOL, default=False,
        help="Also begin the timer without 'systemctl enable': for each domain that a file of "
        "domains.d names, and each that libvirt has defined and such a file fits, also later. "
        "Changes of the files hold from the next boot, or 'systemctl start nbdbackup-timers'.",
    ),
    Setting(
        path="on_shutdown", kind=kinds.BOOL, default=False,
        help="Also save the domain when it has shut down.",
    ),
)  # fmt: skip

_DISKS: Final = (
    Setting(
        path="disks.include", kind=listed(kinds.TEXT), default=(), example="[vda, vdb]",
        help="Only these disks, by target name. An empty list means all.", option="--include",
    ),
    Setting(
        path="disks.exclude", kind=listed(kinds.TEXT), default=(), example="[vdc]",
        help="Not these disks.", option="--exclude",
    ),
    Setting(
        path="disks.raw", kind=kinds.BOOL, default=False,
        help="Save raw disks, too. Their changes can't be tracked: each point holds them whole.",
        option="--raw",
    ),
    Setting(
        path="compression", kind=optional(count(1, 16), "none"), default=None, example="2",
        help="Level of lz4 compression. 1 and 2 are fast; 3 and above take much more time and "
        "save a little more space.",
        option="--compress",
    ),
)  # fmt: skip

_GUEST: Final = (
    Setting(
        path="freeze.policy", kind=choice("auto", "require", "never", "pause"), default="auto",
        help="auto: freeze the file systems if the guest's agent answers; require: and fail if "
        "it does not; never: leave them alone; pause: stop the CPUs for the instant instead.",
        option="--freeze",
    ),
    Setting(
        path="freeze.mountpoints", kind=listed(kinds.PATH), default=(), example="[/, /var]",
        help="Freeze only these mount points of the guest. An empty list means all.",
        option="--freeze-mountpoint",
    ),
    Setting(
        path="scratch.directory", kind=kinds.PATH, default=Path("/var/lib/nbdbackup/scratch"),
        help="Take fast local storage: its speed is that of the guest's writes during a run. "
        "Default for others than root: nbdbackup/scratch below XDG_STATE_HOME.",
        option="--scratch-dir",
    ),
    Setting(
        path="scratch.reserve", kind=kinds.SIZE, default=512 << 20,
        help="Space that must stay free there. A run begins only if twice as much is free, and "
        "ends itself before less is left.",
        option="--scratch-reserve",
    ),
    Setting(
        path="checkpoint_directory", kind=kinds.PATH, default=Path("/var/lib/nbdbackup/state"),
        help="Where this host notes the checkpoints of each chain. Put it on shared storage if "
        "domains move between hosts, the same on each: there the hosts tell one another which of "
        "them runs a domain, starts it, or reads its images. Default for others than root: "
        "nbdbackup/state below XDG_STATE_HOME.",
        option="--checkpoint-dir",
    ),
    Setting(
        path="block_devices", kind=choice("auto", "local", "shared"), default="auto",
        help="Whether another host may open the block devices that the disks are on. QEMU does "
        "not lock them between hosts, so a domain that is off and of which no host can say that it "
        "has ended is read without a bitmap of its own, and that is a warning. auto: yes if "
        "checkpoint_directory is set, or unless the kernel shows that they can't be reached from "
        "elsewhere.",
    ),
    Setting(
        path="standby", kind=kinds.BOOL, default=False,
        help="Save the domain on this host only while it runs here: while it is off another host "
        "does. 'status' here does not judge the age of its points.",
    ),
)  # fmt: skip

_RUN: Final = (
    Setting(
        path="start_paused", kind=kinds.BOOL, default=False,
        help="Start a domain that is off for the run, paused, and end it again, instead of "
        "reading its images without it.",
        option="--start-paused",
    ),
    Setting(
        path="threshold", kind=optional(kinds.SIZE, "none"), default=None, example="16M",
        help="Save nothing, successfully, if an increment would hold less than this.",
        option="--threshold",
    ),
    Setting(
        path="strict", kind=kinds.BOOL, default=False,
        help="Fail, and keep no point, where a warning would do.", option="--strict",
    ),
    Setting(
        path="limits.bandwidth", kind=optional(kinds.RATE, "unlimited"), default=None,
        example="200M",
        help="Read no more than so many bytes of the disks per second, 64K or more.",
        option="--limit-rate",
    ),
    Setting(
        path="limits.workers", kind=optional(count(1, 64), "auto"), default=None, example="4",
        help="Threads that hash and compress. auto: one for each processor, at most 8.",
        option="--workers",
    ),
    Setting(
        path="limits.concurrent_runs", kind=count(1, 64), default=2, everywhere=False,
        help="Runs of all domains at a time; others wait.",
    ),
    Setting(
        path="limits.wait", kind=kinds.DURATION, default=0.0,
        help="Wait so long for the lock of the set or the domain.", option="--wait",
    ),
    Setting(
        path="limits.timeout", kind=kinds.DURATION, default=60.0,
        help="Give up after so long without an answer from QEMU.", option="--timeout",
    ),
)  # fmt: skip

_RETENTION: Final = (
    Setting(
        path="retention.last", kind=count(0, 9999), default=0, help="Keep so many newest points.",
    ),
    _numbers("hourly", "hours"),
    _numbers("daily", "days"),
    _numbers("weekly", "ISO weeks"),
    _numbers("monthly", "months"),
    _numbers("yearly", "years"),
)  # fmt: skip

_AROUND: Final = (
    Setting(
        path="commands.pre", kind=listed(kinds.COMMAND), default=(),
        example="['/usr/local/sbin/before-backup --quiet']",
        help="Programs to run before, one after the other. One that fails ends the run.",
    ),
    Setting(
        path="commands.post", kind=listed(kinds.COMMAND), default=(),
        example="[/usr/local/sbin/after-backup]",
        help="Programs to run after, whether the run succeeded or not.",
    ),
    Setting(
        path="commands.timeout", kind=kinds.DURATION, default=300.0,
        help="End a program that takes longer; that counts as a failure.",
    ),
    Setting(
        path="notification.events", kind=listed(choice("failure", "warning", "success")),
        default=("failure", "warning"), help="Ends of a run that are told.",
    ),
    Setting(
        path="notification.mail", kind=listed(kinds.MAIL), default=(), example="[root]",
        help="Mail addresses to tell, through the host's sendmail.",
    ),
    Setting(
        path="notification.command", kind=optional(kinds.COMMAND, "none"), default=None,
        example="/usr/local/sbin/tell-the-pager", help="A program to tell.",
    ),
)  # fmt: skip

_MONITORING: Final = (
    Setting(
        path="monitoring.warning_age", kind=kinds.DURATION, default=36 * 3600.0,
        help="'nbdbackupctl status' warns if the newest point is older.",
    ),
    Setting(
        path="monitoring.critical_age", kind=kinds.DURATION, default=72 * 3600.0,
        help="And calls it critical if it is older than this.",
    ),
    Setting(
        path="monitoring.metrics_directory", kind=optional(kinds.PATH, "none"), default=None,
        example="/var/lib/prometheus/node-exporter", everywhere=False,
        help="Where each run writes metrics for the textfile collector of Prometheus' node "
        "exporter, a file for each domain. The directory must exist.",
    ),
)  # fmt: skip

_LIBVIRT: Final = (
    Setting(
        path="libvirt.uri", kind=kinds.URI, default="qemu:///system", everywhere=False,
        help="Where libvirt is. It must run on this host, which each run has proven.",
        option="--connect",
    ),
    Setting(
        path="libvirt.user", kind=optional(kinds.TEXT, "none"), default=None, everywhere=False,
        example="backup", help="The user name that libvirt may ask for.", option="--user",
    ),
    Setting(
        path="libvirt.password_file", kind=optional(kinds.PATH, "none"), default=None,
        everywhere=False, example="/etc/nbdbackup/libvirt.secret",
        help="A file with the password that libvirt may ask for.", option="--password-file",
    ),
    Setting(
        path="libvirt.password_credential", kind=optional(kinds.FILE_NAME, "none"), default=None,
        everywhere=False, example="libvirt-password",
        help="Instead of a file: the name of a credential that the unit loads, see "
        "LoadCredential= in systemd.exec(5).",
    ),
)  # fmt: skip

SETTINGS: Final = (
    *_REPOSITORY, *_LEVEL, *_SCHEDULE, *_DISKS, *_GUEST, *_RUN, *_RETENTION, *_AROUND,
    *_MONITORING, *_LIBVIRT,
)  # fmt: skip
"""All settings, in the order of the sample and the manual."""

BY_PATH: Final[Mapping[str, Setting]] = {setting.path: setting for setting in SETTINGS}


def groups() -> list[tuple[str, list[Setting]]]:
    """The settings in order, those of a section together; a lone one has an empty section."""
    found: list[tuple[str, list[Setting]]] = []
    for setting in SETTINGS:
        if setting.section and found and found[-1][0] == setting.section:
            found[-1][1].append(setting)
        else:
            found.append((setting.section, [setting]))
    return found
