"""The one table of all settings. Everything else is made from it.

To add one, add its entry to ``DomainSettings``. The reader of the files, the values for a domain,
``config show``, the option of ``backup``, the sample, the manuals and the completion then have it,
these after the scripts ``gen-config``, ``gen-manual`` and ``gen-completion``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import units
from nbdbackupd.config import kinds
from nbdbackupd.config.kinds import choice, count, listed, optional
from nbdbackupd.config.setting import DEFAULT, GIVEN, GLOBAL, Option, Origin, Setting, names, paths
from nbdbackupd.errors import ConfigError
from nbdbackupd.model.chain import DigestKind
from nbdbackupd.model.policy import FreezePolicy, Rotate
from nbdbackupd.model.retention import Pruning

DIRECTORY: Final = Path("/etc/nbdbackup")
MAIN: Final = "nbdbackup.yaml"
DOMAINS: Final = "domains.d"
MATCH: Final = "match"

USE: Final = (
    "They are read by the verbs run, which timers start, status, notify, and backup without -o, by "
    "the generator of timers, and to find the sets of a domain by its name."
)
"""What the generated pages must tell as long as it is so; empty when it is not."""

SECTIONS: Final[Mapping[str, str]] = {
    "repository": "Where backup sets go, and how to notice that the place is not mounted.",
    "level": "When a new set begins, which means a new full. Until then each run makes an "
    "increment. A set begins as soon as one of these says so.",
    "schedule": "When the domain is backed up.",
    "disks": "Which disks are saved.",
    "freeze": "How the guest is held still at the instant of the point.",
    "scratch": "Where QEMU keeps old blocks that the guest overwrites during a run.",
    "limits": "How much a run may take, and how long it waits.",
    "retention": "Which points stay when 'nbdbackupctl prune' has run; with no number set, all do. "
    "The rules are asked in this order, minimum aside, and each looks only at what those before it "
    "left. While the last one lacks points, the oldest point stays, too. What stays in any case: "
    "protected points, the newest, the newest verified, the newest that is more than crash "
    "consistent, what the next increment starts from, and what others need.",
    "commands": "Programs to run around a backup. They are started directly, not by a shell.",
    "notification": "Whom to tell about the end of a run.",
    "monitoring": "How old the newest point may be, and what is told to Prometheus.",
    "libvirt": "The connection to libvirt. Secrets never stand in these files: they come from a "
    "file that only its owner can read, or from systemd's credentials.",
}


def _newest(period: str, unit: str) -> Setting[int]:
    return Setting(
        f"retention.{period}",
        count(0, 9999),
        0,
        help=f"Keep the newest point of each of so many {unit}, counting those that have one that "
        "no rule before this one has kept a point of.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSettings:
    """Every setting, in the order of the sample and the manual; each instance has its values.

    Those for a domain: sizes in bytes (``limits_bandwidth``: per second), durations in seconds,
    None where the files say ``none``, ``never``, ``unlimited`` or ``auto``. ``values`` and
    ``origins`` are by path, ``applied`` the files that count, in their order.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    applied: tuple[Path, ...] = ()

    repository_path = Setting(
        "repository.path",
        kinds.PATH,
        Path("/var/lib/nbdbackup/repository"),
        help="Each domain has a directory of its name below this one, and in it each set has one. "
        "Hosts may share it: a directory belongs to one UUID.",
    )
    repository_marker = Setting(
        "repository.marker",
        optional(kinds.FILE_NAME, "none"),
        None,
        example=".nbdbackup-repository",
        help="A file that must exist in the path. Make it once, on the mounted target: a run "
        "that does not find it saves nothing, instead of filling the root disk.",
    )
    repository_mount_point = Setting(
        "repository.mount_point",
        optional(kinds.PATH, "none"),
        None,
        example="/backup",
        help="A directory, the path itself or one above it, on which something must be mounted; / "
        "says that the root file system is meant.",
    )
    level_rotate = Setting(
        "level.rotate",
        choice(*Rotate),
        Rotate.MONTHLY,
        help="Begin a set with the first run of a calendar month or ISO week, in local time.",
    )
    level_full_every = Setting(
        "level.full_every",
        optional(kinds.DAYS, "never"),
        None,
        example="14d",
        help="Begin a set when the newest full is so many calendar days old, in local time.",
    )
    level_max_increments = Setting(
        "level.max_increments",
        optional(count(0, 100000), "unlimited"),
        None,
        example="60",
        help="Begin a set instead of adding one more increment than this.",
    )
    schedule_calendar = Setting(
        "schedule.calendar",
        listed(kinds.CALENDAR),
        ("*-*-* 02:00:00",),
        help="When to run, as calendar events of systemd.time(7); an empty list means never. "
        "'systemd-analyze calendar' explains an event.",
    )
    schedule_random_delay = Setting(
        "schedule.random_delay",
        kinds.DURATION,
        1800.0,
        help="Begin up to so much later. Each domain has its own delay, the same every day.",
    )
    schedule_enable = Setting(
        "schedule.enable",
        kinds.BOOL,
        False,
        help="Also begin the timer without 'systemctl enable': for each domain that a file of "
        "domains.d names, and each that libvirt has defined and such a file fits, also later. "
        "Changes of the files hold from the next boot, or 'systemctl start nbdbackup-timers', "
        "which also ends the timers that neither a file nor 'systemctl enable' wants. As long as a "
        "file has an error it ends none, and fails.",
    )
    on_shutdown = Setting(
        "on_shutdown", kinds.BOOL, False, help="Also save the domain when it has shut down."
    )
    disks_include = Setting(
        "disks.include",
        listed(kinds.TEXT),
        (),
        example="[vda, vdb]",
        help="Only these disks, by target name. An empty list means all.",
        option=Option("-i, --include DISKS", "disks", names, help="only these disks (vda,vdb)"),
    )
    disks_exclude = Setting(
        "disks.exclude",
        listed(kinds.TEXT),
        (),
        example="[vdc]",
        help="Not these disks.",
        option=Option("-x, --exclude DISKS", "disks", names),
    )
    disks_raw = Setting(
        "disks.raw",
        kinds.BOOL,
        False,
        help=(
            "Save raw disks, too. Their changes can't be tracked, so each point holds them whole; "
            "but of a QEMU without libvirt they are, as long as its process lives."
        ),
        option=Option(
            "--raw", "disks", value=True, help="save raw disks, too: in full at each point"
        ),
    )
    compression = Setting(
        "compression",
        optional(kinds.COMPRESSION, "none"),
        None,
        example="zstd:1",
        help="How blocks are compressed. zstd stores less than lz4 in less time; it needs "
        "python3-zstandard, and virtnbdrestore can't read it. A level may follow, lz4:1 to lz4:16 "
        "(without one: 2), zstd:1 to zstd:19 (1); a number is a level of lz4.",
        option=Option(
            "-z, --compress [CODEC]",
            "disks",
            kinds.compress,
            value=kinds.compress("lz4"),
            help="compress with lz4, or with zstd, which virtnbdrestore can't read; or at a level: "
            "lz4:9, zstd:3 (without CODEC: lz4:2; then give DOMAIN before it)",
            other=Option("--no-compress", "disks", help="store blocks as they are (default)"),
        ),
    )
    digest = Setting(
        "digest",
        choice(*DigestKind),
        DigestKind.SHA256,
        help="How blocks are proven. blake3 takes a part of sha256's processor time and proves as "
        "much; it needs python3-blake3. xxh128 takes nearly none and needs python3-xxhash; it "
        "finds what went wrong by accident, but who can write to the set or choose what the "
        "guest's disk holds can make other bytes of the same digest.",
        option=Option(
            "--digest sha256|blake3|xxh128",
            "disks",
            help="how blocks are proven (default: sha256); xxh128 finds accidents, no forgery",
        ),
    )
    freeze_policy = Setting(
        "freeze.policy",
        choice(*FreezePolicy),
        FreezePolicy.AUTO,
        help="auto: freeze the file systems if the guest's agent answers; require: and fail if "
        "it does not; never: leave them alone; pause: stop the CPUs for the instant instead.",
        option=Option(
            "--freeze auto|require|never",
            "guest",
            help="freeze the guest's file systems at the instant of the point: if the agent "
            "answers (auto, default), or fail (require), or not at all (never)",
        ),
    )
    freeze_mountpoints = Setting(
        "freeze.mountpoints",
        listed(kinds.PATH),
        (),
        example="[/, /var]",
        help="Freeze only these mount points of the guest. An empty list means all.",
        option=Option(
            "-F, --freeze-mountpoint DIRS",
            "guest",
            paths,
            help="freeze only these mount points of the guest (/mnt,/var)",
        ),
    )
    scratch_directory = Setting(
        "scratch.directory",
        kinds.PATH,
        Path("/var/lib/nbdbackup/scratch"),
        help="Take fast local storage: its speed is that of the guest's writes during a run. "
        "Default for others than root: nbdbackup/scratch below XDG_STATE_HOME.",
        option=Option(
            "--scratch-dir DIR",
            "guest",
            Path,
            help="where QEMU keeps blocks that the guest overwrites during the run; local and "
            "fast (default: /var/lib/nbdbackup/scratch)",
        ),
    )
    scratch_reserve = Setting(
        "scratch.reserve",
        kinds.SIZE,
        512 << 20,
        help="Space that must stay free there. A run begins only if twice as much is free, and "
        "ends itself before less is left.",
        option=Option(
            "--scratch-reserve SIZE",
            "guest",
            help="space that must stay free there; the run needs twice as much to begin and ends "
            "before less is left (default: 512M)",
        ),
    )
    checkpoint_directory = Setting(
        "checkpoint_directory",
        kinds.PATH,
        Path("/var/lib/nbdbackup/state"),
        help="Where this host notes the checkpoints of each chain. Put it on shared storage if "
        "domains move between hosts, the same on each: there the hosts tell one another which of "
        "them runs a domain, starts it, or reads its images. Default for others than root: "
        "nbdbackup/state below XDG_STATE_HOME.",
        option=Option(
            "--checkpoint-dir DIR",
            "run",
            Path,
            help="where the base of each chain and the digest of each manifest are noted; hosts "
            "of a cluster may share it (default: /var/lib/nbdbackup/state)",
        ),
    )
    block_devices = Setting(
        "block_devices",
        choice("auto", "local", "shared"),
        "auto",
        help="Whether another host may open the block devices that the disks are on. QEMU does "
        "not lock them between hosts, so a domain that is off and of which no host can say that it "
        "has ended is read without a bitmap of its own, and that is a warning. auto: yes if "
        "checkpoint_directory is set, or unless the kernel shows that they can't be reached from "
        "elsewhere.",
    )
    qmp = Setting(
        "qmp",
        optional(kinds.PATH, "none"),
        None,
        example="/run/vm7/qmp",
        single=True,
        help="The socket of a monitor (QMP) of a QEMU that runs without libvirt, which is then not "
        "asked: the file's name is what the machine is called. The monitor must be its own, since "
        "it serves one program at a time.",
        option=Option(
            "--qmp SOCKET",
            "guest",
            Path,
            help="a running QEMU without libvirt: the path of its monitor's socket; DOMAIN is the "
            "name that its sets have",
        ),
    )
    agent = Setting(
        "agent",
        optional(kinds.PATH, "none"),
        None,
        example="/run/vm7/qga",
        single=True,
        help="The socket of the guest's agent of a QEMU that runs without libvirt, a -chardev for "
        "the port org.qemu.guest_agent.0: with it freeze.policy holds as for a domain.",
        option=Option(
            "--agent SOCKET",
            "guest",
            Path,
            help="with --qmp: the socket of the guest's agent, to freeze it by",
        ),
    )
    standby = Setting(
        "standby",
        kinds.BOOL,
        False,
        help="Save the domain on this host only while it runs here: while it is off another host "
        "does. 'status' here does not judge the age of its points.",
    )
    start_paused = Setting(
        "start_paused",
        kinds.BOOL,
        False,
        help="Start a domain that is off for the run, paused, and end it again, instead of "
        "reading its images without it.",
        option=Option(
            "-S, --start-paused",
            "guest",
            value=True,
            help="start a domain that is off, paused, and end it after the run unless somebody "
            "has resumed it (default: read its images)",
        ),
    )
    threshold = Setting(
        "threshold",
        optional(kinds.SIZE, "none"),
        None,
        example="16M",
        help="Save nothing, successfully, if an increment would hold less than this.",
        option=Option(
            "--threshold SIZE",
            "run",
            units.parse_size,
            help="do nothing, successfully, if less than this would be saved by an increment",
        ),
    )
    strict = Setting(
        "strict",
        kinds.BOOL,
        False,
        help="Fail, and keep no point, where a warning would do.",
        option=Option(
            "--strict", "run", value=True, help="fail, and keep nothing, instead of warning"
        ),
    )
    limits_bandwidth = Setting(
        "limits.bandwidth",
        optional(kinds.RATE, "unlimited"),
        None,
        example="200M",
        help="Read no more than so many bytes of the disks per second, 64K or more.",
        option=Option(
            "--limit-rate SIZE",
            "run",
            units.parse_rate,
            help="read no more than this per second of all disks together (64K or more)",
        ),
    )
    limits_workers = Setting(
        "limits.workers",
        optional(count(1, 64), "auto"),
        None,
        example="4",
        help="Threads that hash and compress; disks at a time, up to 4. auto: one a processor.",
        option=Option(
            "-w, --workers N",
            "run",
            kinds.threads,
            help="threads that hash and compress (default: one for each processor, at most 8)",
        ),
    )
    limits_concurrent_runs = Setting(
        "limits.concurrent_runs",
        count(1, 64),
        2,
        everywhere=False,
        help="Runs of all domains at a time; others wait.",
    )
    limits_wait = Setting(
        "limits.wait",
        kinds.DURATION,
        0.0,
        help="Wait so long for the lock of the set or the domain.",
        option=Option(
            "--wait SECONDS",
            "run",
            units.parse_seconds,
            help="wait so long for the lock of the set or domain (default: 0, exit 75 at once)",
        ),
    )
    limits_timeout = Setting(
        "limits.timeout",
        kinds.DURATION,
        60.0,
        help="Give up after so long without an answer from QEMU.",
        option=Option(
            "--timeout SECONDS",
            "run",
            units.parse_seconds,
            help="give up after so long without an answer from QEMU (default: 60)",
        ),
    )
    retention_last = Setting(
        "retention.last", count(0, 9999), 0, help="Keep so many newest points."
    )
    retention_within = Setting(
        "retention.within",
        optional(kinds.DURATION, "none"),
        None,
        example="2d",
        help="Keep all points that are at most so much older than the newest one.",
    )
    retention_hourly = _newest("hourly", "hours")
    retention_daily = _newest("daily", "days")
    retention_weekly = _newest("weekly", "ISO weeks")
    retention_monthly = _newest("monthly", "months")
    retention_yearly = _newest("yearly", "years")
    retention_minimum = Setting(
        "retention.minimum",
        count(1, 9999),
        1,
        help="So many newest points that are not known to be damaged stay whatever the rules say.",
    )
    retention_prune = Setting(
        "retention.prune",
        choice(*Pruning),
        Pruning.TIMER,
        help="When what no rule wants is removed. timer: by nbdbackup-prune@NAME.timer, each "
        "morning, which begins by itself where a rule is set and schedule.enable is on, else with "
        "'systemctl enable'; run: at the end of each run that made a point; never: only by hand. "
        "More than half of a domain's points at once always go by hand, with 'prune --force'.",
    )
    retention_make_room = Setting(
        "retention.make_room",
        kinds.BOOL,
        False,
        help="If the next point may not fit, a run first removes what no rule wants, whatever "
        "prune says.",
    )
    commands_pre = Setting(
        "commands.pre",
        listed(kinds.COMMAND),
        (),
        example="['/usr/local/sbin/before-backup --quiet']",
        help="Programs to run before, one after the other. One that fails ends the run.",
    )
    commands_post = Setting(
        "commands.post",
        listed(kinds.COMMAND),
        (),
        example="[/usr/local/sbin/after-backup]",
        help="Programs to run after, whether the run succeeded or not.",
    )
    commands_timeout = Setting(
        "commands.timeout",
        kinds.DURATION,
        300.0,
        help="End a program that takes longer; that counts as a failure.",
    )
    notification_events = Setting(
        "notification.events",
        listed(choice("failure", "warning", "success")),
        ("failure", "warning"),
        help="Ends of a run that are told.",
    )
    notification_mail = Setting(
        "notification.mail",
        listed(kinds.MAIL),
        (),
        example="[root]",
        help="Mail addresses to tell, through the host's sendmail.",
    )
    notification_command = Setting(
        "notification.command",
        optional(kinds.COMMAND, "none"),
        None,
        example="/usr/local/sbin/tell-the-pager",
        help="A program to tell.",
    )
    monitoring_warning_age = Setting(
        "monitoring.warning_age",
        kinds.DURATION,
        36 * 3600.0,
        help="'nbdbackupctl status' warns if the newest point is older.",
    )
    monitoring_critical_age = Setting(
        "monitoring.critical_age",
        kinds.DURATION,
        72 * 3600.0,
        help="And calls it critical if it is older than this.",
    )
    monitoring_metrics_directory = Setting(
        "monitoring.metrics_directory",
        optional(kinds.PATH, "none"),
        None,
        example="/var/lib/prometheus/node-exporter",
        everywhere=False,
        help="Where each run writes metrics for the textfile collector of Prometheus' node "
        "exporter, a file for each domain. The directory must exist.",
    )
    libvirt_uri = Setting(
        "libvirt.uri",
        kinds.URI,
        "qemu:///system",
        everywhere=False,
        help="Where libvirt is. It must run on this host, which each run has proven.",
        option=Option(
            "-c, --connect URI", GLOBAL, str, help="libvirt connection (default: qemu:///system)"
        ),
    )
    libvirt_user = Setting(
        "libvirt.user",
        optional(kinds.TEXT, "none"),
        None,
        everywhere=False,
        example="backup",
        help="The user name that libvirt may ask for.",
        option=Option("--user NAME", GLOBAL, str, help="user name for the libvirt connection"),
    )
    libvirt_password_file = Setting(
        "libvirt.password_file",
        optional(kinds.PATH, "none"),
        None,
        everywhere=False,
        example="/etc/nbdbackup/libvirt.secret",
        help="A file with the password that libvirt may ask for.",
        option=Option(
            "--password-file FILE",
            GLOBAL,
            Path,
            help="file with the password for the libvirt connection",
        ),
    )
    libvirt_password_credential = Setting(
        "libvirt.password_credential",
        optional(kinds.FILE_NAME, "none"),
        None,
        everywhere=False,
        example="libvirt-password",
        help="Instead of a file: the name of a credential that the unit loads, see "
        "LoadCredential= in systemd.exec(5).",
    )

    def is_default(self, path: str) -> bool:
        """Whether nothing says anything of a setting."""
        return not self.origins[path].file

    @property
    def monitor(self) -> Path:
        """That of a QEMU without libvirt. Raises ConfigError if none is set."""
        if self.qmp is None:
            raise ConfigError("no monitor of QEMU is set: give --qmp, or qmp in a file")
        return self.qmp

    def get(self, path: str) -> Any:
        """The value of a setting by its path, such as ``level.rotate``."""
        return self.values[path]

    def given(self, **values: Any) -> "DomainSettings":
        """These, but with the values, by attribute, that options or the run itself decide."""
        paths = {getattr(DomainSettings, name).path: value for name, value in values.items()}
        return replace(
            self,
            values={**self.values, **paths},
            origins={**self.origins, **dict.fromkeys(paths, GIVEN)},
        )


BY_PATH: Final[dict[str, Setting[Any]]] = {
    each.path: each for each in vars(DomainSettings).values() if isinstance(each, Setting)
}
"""The table, in its order: all that is made of it is made of this."""


def defaults() -> DomainSettings:
    """What holds where no file says anything."""
    return DomainSettings(
        values={path: setting.default for path, setting in BY_PATH.items()},
        origins=dict.fromkeys(BY_PATH, DEFAULT),
    )
