"""What is told about the end of a unit, and how it gets to people: by mail, or by a program."""

import shlex
import shutil
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nbdbackupd import plain, proc
from nbdbackupd.errors import MEANINGS, WARNED, ConfigError, ProcessError, one_line

TEMPLATE: Final = "notify.txt.j2"
MAX_TEMPLATE: Final = 64 << 10
MAX_TEXT: Final = 1 << 20
DELIVERY_SECONDS: Final = 45.0
"""For one mail, or one program: both fit into the unit's two minutes."""

SENDMAIL: Final = ("/usr/sbin/sendmail", "/usr/lib/sendmail")

EVENTS: Final = {
    "failure": "failed",
    "warning": "is done, with warnings",
    "success": "is done",
}

DEFAULT: Final = """\
{{ what }} {{ word }}{% if event == "warning" %},{% endif %} on {{ host }}
{{ what }} {{ word }}{% if event == "warning" %},{% endif %} on {{ host }}.

unit:    {{ unit }}
{% if domain %}domain:  {{ domain }}
{% endif %}result:  {{ result }}{% if meaning %} ({{ meaning }}){% endif %}

{% if reason %}reason:  {{ reason }}

{% endif %}{% if started %}started: {{ started }}
{% endif %}{% if ended %}ended:   {{ ended }}
{% endif %}
{% if remark %}{{ remark }}

{% endif %}{% if lines %}What it said last:

{% for line in lines %}  {{ line }}
{% endfor %}{% else %}It left nothing in the journal.
{% endif %}
More: {{ more }}
"""
"""The first line is the subject."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """What a template may use.

    ``event`` is ``failure``, ``warning`` or ``success``, ``word`` the same for a sentence, and
    ``what`` its subject. ``result`` is ``exit status 20`` or systemd's word, ``meaning`` what the
    status stands for. Times are texts, or empty. ``remark`` tells what is odd about this notice,
    ``reason`` why the run failed, as it said itself.
    """

    event: str
    unit: str
    domain: str
    host: str
    what: str
    result: str
    meaning: str
    started: str
    ended: str
    lines: tuple[str, ...]
    remark: str = ""
    reason: str = ""

    @property
    def word(self) -> str:
        """``failed``, for example."""
        return EVENTS[self.event]

    @property
    def more(self) -> str:
        """Commands that tell more."""
        found = f"journalctl -u {shlex.quote(self.unit)}"
        if not self.domain:
            return found
        return f"{found}; nbdbackupctl status -- {shlex.quote(self.domain)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A notice in words."""

    subject: str
    body: str


def result_of(result: str, status: str) -> tuple[str, str, str]:
    """Event, result and meaning of systemd's two words: ``exit-code`` and ``20``, for example.

    The second one of a signal is its name, or its number (systemctl).
    """
    number = int(status) if status.isascii() and status.isdigit() else None
    if number is not None and (result == "exit-code" or (result == "success" and number)):
        event = "success" if result == "success" else "failure"
        meaning = MEANINGS.get(str(number), "ended by a signal" if number > 128 else "")
        return ("warning" if number == WARNED else event), f"exit status {number}", meaning
    if result == "success":
        return "success", "success", ""
    meanings = {
        "timeout": "it took too long",
        "watchdog": "it made no progress and was ended",
        "oom-kill": "it was ended because memory ran out",
        "resources": "systemd could not start it",
    }
    shown = result or "unknown"
    if result in ("signal", "core-dump") and status:
        shown += f" {status if number is None else _signal_name(number)}"
    return "failure", shown, meanings.get(result, "")


def _signal_name(number: int) -> str:
    """As systemd names it: ``KILL``."""
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)


def render(notice: Notice, directory: Path) -> Text:
    """The notice in words, by the template in the directory, or by our own.

    A template that is broken does not keep the notice back: ours takes its place and tells.
    Raises ConfigError if jinja2 is not installed.
    """
    found = _by_template(notice, directory / TEMPLATE)
    if isinstance(found, Text):
        return found
    if found:
        remarks = [notice.remark, f"The template {directory / TEMPLATE} can't be used: {found}"]
        notice = replace(notice, remark="\n".join(filter(None, remarks)))
    return _fill(DEFAULT, notice)


def template_fault(directory: Path) -> str:
    """Why the template in the directory can't be used; empty if it can, or there is none.

    It is tried with a failure of no domain of this host. Raises ConfigError without jinja2.
    """
    notice = Notice(
        event="failure",
        unit="nbdbackup@example.service",
        domain="example",
        host="host",
        what="backup of domain example",
        result="exit status 20",
        meaning=MEANINGS["20"],
        started="",
        ended="",
        lines=("a line",),
        reason="a reason",
    )
    found = _by_template(notice, directory / TEMPLATE)
    return found if isinstance(found, str) else ""


def _by_template(notice: Notice, path: Path) -> Text | str:
    """The text, or why it can't be made by this template, or nothing if there is none."""
    try:
        source = _read(path)
        return "" if source is None else _fill(source, notice)
    except ConfigError:
        raise
    except Exception as err:  # noqa: BLE001 - a template can fail in any way there is
        return one_line(err)


def sendmail() -> str | None:
    """The program that takes mail on this host; it need not be in the PATH."""
    return next(filter(None, map(shutil.which, ("sendmail", *SENDMAIL))), None)


def send_mail(text: Text, addresses: tuple[str, ...], moment: datetime, *, html: str = "") -> None:
    """Give a mail to the host's sendmail, ``html`` beside its text.

    Raises ConfigError, ProcessError.
    """
    for address in addresses:
        if address.startswith("-") or not address.isprintable():
            raise ConfigError(f"not a mail address: {address!r}; fix notification.mail")
    # late: each run knows how it may be told, and few have to be
    from email.message import EmailMessage
    from email.utils import format_datetime, make_msgid

    message = EmailMessage()
    message["Subject"] = text.subject
    message["To"] = ", ".join(addresses)
    message["Date"] = format_datetime(moment)
    message["Message-ID"] = make_msgid(domain="nbdbackup.invalid")
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text.body)
    if html:
        message.add_alternative(html, subtype="html")
    proc.output(
        [sendmail() or "sendmail", "-i", "--", *addresses],
        input=message.as_bytes(),
        timeout=DELIVERY_SECONDS,
        max_output=MAX_TEXT,
    )


def run_command(argv: tuple[str, ...], text: Text, notice: Notice) -> None:
    """Run a program with the text as its input and the facts in its environment.

    Raises ProcessError.
    """
    facts = {
        "EVENT": notice.event,
        "UNIT": notice.unit,
        "DOMAIN": notice.domain,
        "HOST": notice.host,
        "RESULT": notice.result,
        "REASON": notice.reason,
        "SUBJECT": text.subject,
    }
    try:
        proc.output(
            argv,
            input=f"{text.subject}\n\n{text.body}",
            timeout=DELIVERY_SECONDS,
            env={f"NBDBACKUP_{name}": value for name, value in facts.items()},
            max_output=MAX_TEXT,
        )
    except ValueError as err:
        raise ProcessError(f"{argv[0]}: can't be told of {notice.unit!r}: {err}") from err


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_TEMPLATE:
        raise ValueError(f"it is larger than {MAX_TEMPLATE} bytes")
    return data.decode()


def _fill(source: str, notice: Notice) -> Text:
    try:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as err:
        raise ConfigError("the text of notifications needs jinja2: install python3-jinja2") from err

    # plain text, for people: nothing to be escaped
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=False, autoescape=False
    )
    facts: Mapping[str, Any] = {**asdict(notice), "word": notice.word, "more": notice.more}
    text = environment.from_string(source).render(facts)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it makes more than {MAX_TEXT} characters")
    subject, _, body = text.lstrip("\n").partition("\n")
    if not subject.strip():
        raise ValueError("its first line, which is the subject, is empty")
    shown = plain.line(" ".join(subject.split()))
    return Text(subject=shown[:200], body=plain.lines(body.strip("\n")) + "\n")
