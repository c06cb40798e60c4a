"""What systemd knows of our units: when they run, how they ended, what they said.

Read from ``systemctl`` and ``journalctl``, whose forms for programs are stable (systemd 252 to
257 were looked at).
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, plain, proc
from nbdbackupd.errors import ProcessError

BOOTED: Final = Path("/run/systemd/system")
RUNNER: Final = Path("/usr/lib/systemd/system/nbdbackup@.timer")
TIMEOUT_SECONDS: Final = 20.0
STOPPING_SECONDS: Final = 2.0
MAX_OUTPUT: Final = 4 << 20
MAX_LINE: Final = 1000
PROPERTIES: Final = (
    "Id",
    "LoadState",
    "ActiveState",
    "Result",
    "ExecMainStatus",
    "InvocationID",
    "ExecMainStartTimestamp",
    "ExecMainExitTimestamp",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """How a service stands.

    ``active`` is ``inactive``, ``activating``, ``failed``, …; ``result`` is systemd's word for its
    last end, such as ``success``, ``exit-code``, ``watchdog``. ``started`` is None if it never ran
    since the boot, ``ended`` as long as it runs.
    """

    unit: str
    active: str
    result: str
    exit_status: int
    invocation: str
    started: datetime | None
    ended: datetime | None

    @property
    def is_running(self) -> bool:
        """Whether a run is in progress."""
        return self.active in ("activating", "active", "deactivating", "reloading")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timer:
    """A timer and the unit that it starts; ``next`` is None if it has no next time."""

    unit: str
    activates: str
    next: datetime | None
    last: datetime | None


def is_booted() -> bool:
    """Whether systemd runs this host, as sd_booted(3) finds out."""
    return BOOTED.is_dir()


def can_schedule() -> bool:
    """Whether the units of backups are installed, which another package has than the commands."""
    return RUNNER.exists()


def is_stopping() -> bool:
    """Whether the host is going down; no if systemd does not say it in time."""
    try:
        # it exits with 1 for each state but "running"
        said = proc.output(
            ["systemctl", "is-system-running"], timeout=STOPPING_SECONDS, ok=range(256)
        )
    except ProcessError:
        return False
    return said.strip() == "stopping"


def timers(pattern: str) -> tuple[Timer, ...]:
    """The timers that are loaded and fit a pattern, the next one first.

    Raises ProcessError if systemd can't be asked.
    """
    text = _systemctl("list-timers", "--all", "--output=json", "--", pattern)
    try:
        rows = documents.parse_json(text or "[]")
        found = [
            Timer(
                unit=str(row["unit"]),
                activates=str(row.get("activates") or ""),
                next=_from_usec(row.get("next")),
                last=_from_usec(row.get("last")),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ProcessError(f"systemctl list-timers: its answer is not understood: {err}") from err
    return tuple(sorted(found, key=_order))


def services(*names: str) -> tuple[Service, ...]:
    """The services of these names or patterns; for a pattern only those that are loaded.

    Raises ProcessError if systemd can't be asked.
    """
    wanted = ",".join(PROPERTIES)
    text = _systemctl("show", "--timestamp=unix", f"--property={wanted}", "--", *names)
    blocks = [block for block in text.split("\n\n") if block.strip()]
    return tuple(_service(block) for block in blocks)


def idle(*units: str) -> tuple[str, ...]:
    """Those of the units that could be started: they are neither active nor masked.

    Raises ProcessError if systemd can't be asked.
    """
    text = _systemctl("show", "--property=Id,LoadState,ActiveState", "--", *units)
    blocks = [_values(block) for block in text.split("\n\n") if block.strip()]
    return tuple(
        each["Id"]
        for each in blocks
        if each.get("Id")
        and each.get("LoadState") != "masked"
        and each.get("ActiveState") in ("inactive", "failed")
    )


def unwanted(*patterns: str) -> tuple[str, ...]:
    """The active units that fit a pattern and that no other unit wants; none that is masked.

    Raises ProcessError if systemd can't be asked.
    """
    wanting = ("WantedBy", "RequiredBy", "UpheldBy")
    asked = ",".join(("Id", "LoadState", "ActiveState", *wanting))
    text = _systemctl("show", f"--property={asked}", "--", *patterns)
    blocks = [_values(block) for block in text.split("\n\n") if block.strip()]
    return tuple(
        each["Id"]
        for each in blocks
        if each.get("Id")
        and each.get("LoadState") != "masked"
        and each.get("ActiveState") == "active"
        and not any(each.get(name) for name in wanting)
    )


def properties(unit: str, *names: str) -> dict[str, str]:
    """Some properties of a unit; empty texts for what it has not.

    Raises ProcessError if systemd can't be asked.
    """
    text = _systemctl("show", f"--property={','.join(names)}", "--", unit)
    found = _values(text)
    return {name: found.get(name, "") for name in names}


def journal(unit: str, invocation: str, number: int) -> tuple[str, ...]:
    """The last lines that a unit wrote, in one invocation if that is known.

    Raises ProcessError if the journal can't be read.
    """
    chosen = [f"_SYSTEMD_INVOCATION_ID={invocation}", "+", f"INVOCATION_ID={invocation}"]
    text = proc.output(
        [
            "journalctl",
            "--quiet",
            "--no-pager",
            "--output=cat",
            f"--lines={number}",
            *(chosen if invocation else [f"--unit={unit}"]),
        ],
        timeout=TIMEOUT_SECONDS,
        max_output=MAX_OUTPUT,
    )
    return tuple(_clean(line) for line in text.split("\n") if line.strip())[-number:]


def _order(timer: Timer) -> tuple[float, str]:
    return (math.inf if timer.next is None else timer.next.timestamp(), timer.unit)


def _systemctl(*arguments: str) -> str:
    return proc.output(
        ["systemctl", "--no-pager", "--no-ask-password", *arguments],
        timeout=TIMEOUT_SECONDS,
        max_output=MAX_OUTPUT,
    )


def _values(block: str) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in block.strip().split("\n"))


def _service(block: str) -> Service:
    found = _values(block)
    status = found.get("ExecMainStatus", "")
    return Service(
        unit=found.get("Id", ""),
        active=found.get("ActiveState", ""),
        result=found.get("Result", ""),
        exit_status=int(status) if status.isascii() and status.isdigit() else 0,
        invocation=found.get("InvocationID", ""),
        started=_from_unix(found.get("ExecMainStartTimestamp", "")),
        ended=_from_unix(found.get("ExecMainExitTimestamp", "")),
    )


def _from_usec(value: Any) -> datetime | None:
    """Microseconds since 1970; systemd writes 0, null or a number beyond all times for never."""
    if not isinstance(value, int) or not 0 < value < 1 << 62:
        return None
    try:
        return datetime.fromtimestamp(value / 1e6, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _from_unix(text: str) -> datetime | None:
    digits = text.removeprefix("@")
    return _from_usec(int(digits) * 1_000_000) if digits.isascii() and digits.isdigit() else None


def _clean(line: str) -> str:
    clean = plain.line(line.expandtabs())
    return clean if len(clean) <= MAX_LINE else f"{clean[:MAX_LINE]}…"
