"""Notifications: what is told, to whom, and that nothing keeps it back."""

import email
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd import events
from nbdbackupd.model import unitname
from nbdbackupd.ops.notify import notification
from nbdbackupd.ops.notify.notification import Notice
from nbdbackupd.repo import runs
from nbdbackupd.systemd import units
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

# what systemctl 252 prints for a service that failed
SHOW = """\
ExecMainStartTimestamp=@1769911200
ExecMainExitTimestamp=@1769911265
ExecMainStatus=20
InvocationID=c0ffee00c0ffee00c0ffee00c0ffee00
Id={unit}
LoadState=loaded
ActiveState={active}
Result={result}
"""
SYSTEMCTL = """\
#!/usr/bin/python3
import os, sys
print(*sys.argv[1:], sep="\\n", file=open({calls!r}, "a"))
print(open({state!r}).read())
"""
JOURNALCTL = """\
#!/usr/bin/python3
import sys
print(*sys.argv[1:], sep="\\n", file=open({calls!r}, "a"))
print("backup of vm1 started")
print("can't reach libvirt\\x1b[31m: ü s3cret")
"""
TELLER = """\
#!/usr/bin/python3
import json, os, sys
said = dict(argv=sys.argv[1:], text=sys.stdin.buffer.read().decode(),
            facts={{k: v for k, v in os.environ.items()
                   if k.startswith("NBDBACKUP_") and k != "NBDBACKUP_STATE_DIR"}})
json.dump(said, open({said!r}, "w"))
sys.exit({status})
"""


class Host:
    """Programs in a PATH of their own, and a configuration."""

    def __init__(self, root: Path) -> None:
        self.programs = root / "bin"
        self.config = root / "config"
        self.own = root / "own"
        self.calls = root / "calls"
        self.state = root / "state"
        self.mail = root / "mail.json"
        self.pager = root / "pager.json"
        self.in_journal = False
        self.programs.mkdir()
        (self.config / "domains.d").mkdir(parents=True)
        self.unit("nbdbackup@vm1.service")
        self.program("systemctl", SYSTEMCTL, calls=str(self.calls), state=str(self.state))
        self.program("journalctl", JOURNALCTL, calls=str(self.calls))
        self.teller("sendmail", self.mail)
        self.command = self.teller("pager", self.pager)

    def unit(self, name: str, active: str = "failed", result: str = "exit-code") -> None:
        self.state.write_text(SHOW.format(unit=name, active=active, result=result))

    def program(self, name: str, text: str, **facts: object) -> Path:
        path = self.programs / name
        path.write_text(text.format(**facts))
        path.chmod(0o755)
        return path

    def teller(self, name: str, said: Path, status: int = 0) -> Path:
        return self.program(name, TELLER, said=str(said), status=status)

    def main(self, text: str) -> None:
        (self.config / "nbdbackup.yaml").write_text(text)

    def notify(
        self, unit: str = "nbdbackup@vm1.service", *options: str, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith("MONITOR_")}
        plain["NBDBACKUP_STATE_DIR"] = str(self.own)
        stream = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); " * self.in_journal
        return subprocess.run(
            ["sh", "-c", f'{stream}exec "$@"', "-", sys.executable, "-m", "nbdbackupd",
             "--config-dir", self.config, "notify", *options, "--", unit],
            cwd=TOP, capture_output=True, text=True, check=False, timeout=100,
            env={**plain, "PATH": f"{self.programs}:/usr/bin:/bin", **environ},
        )  # fmt: skip

    def told(self, file: Path) -> Any:
        return json.loads(file.read_text()) if file.exists() else None


def parsed(mail: dict[str, Any]) -> EmailMessage:
    message = email.message_from_bytes(mail["text"].encode(), policy=default)
    assert isinstance(message, EmailMessage)
    return message


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def monitored(unit: str, result: str, status: str) -> dict[str, str]:
    return {
        "MONITOR_UNIT": unit, "MONITOR_SERVICE_RESULT": result, "MONITOR_EXIT_STATUS": status,
        "MONITOR_EXIT_CODE": "exited", "MONITOR_INVOCATION_ID": "d" * 32,
    }  # fmt: skip


def test_a_failure_is_told_by_both_ways(host: Host) -> None:
    secret = host.config / "password"
    secret.write_text("s3cret\n")
    host.main(f"notification: {{mail: [root, 'ü@example.org'], command: '{host.command} -x \"a b\"'"
              f"}}\nlibvirt: {{password_file: {secret}}}")  # fmt: skip
    done = host.notify()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    mail = host.told(host.mail)
    assert mail["argv"] == ["-i", "--", "root", "ü@example.org"]
    message = parsed(mail)
    assert message["Subject"].startswith("backup of domain vm1 failed on ")
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["To"] == "root, ü@example.org"
    body = message.get_content()
    assert "exit status 20 (the domain or libvirt)" in body
    assert "  backup of vm1 started\n  can't reach libvirt\\x1b[31m: ü ********\n" in body
    assert "s3cret" not in mail["text"]
    pager = host.told(host.pager)
    assert pager["argv"] == ["-x", "a b"]
    assert pager["text"] == f"{message['Subject']}\n\n{body}"
    assert pager["facts"] == {
        "NBDBACKUP_EVENT": "failure",
        "NBDBACKUP_UNIT": "nbdbackup@vm1.service",
        "NBDBACKUP_DOMAIN": "vm1",
        "NBDBACKUP_HOST": os.uname().nodename,
        "NBDBACKUP_RESULT": "exit status 20",
        "NBDBACKUP_REASON": "",
        "NBDBACKUP_SUBJECT": message["Subject"],
    }
    calls = host.calls.read_text().split("\n")
    assert "nbdbackup@vm1.service" in calls
    assert "_SYSTEMD_INVOCATION_ID=" + "c0ffee00" * 4 in calls


def test_what_systemd_hands_over_counts(host: Host) -> None:
    unit = "nbdbackup@vm1.service"
    done = host.notify(unit, "--json", **monitored(unit, "success", "0"))
    document = json.loads(done.stdout)
    assert (document["event"], document["told"]) == ("success", [])
    assert "_SYSTEMD_INVOCATION_ID=" + "d" * 32 in host.calls.read_text()
    done = host.notify(unit, "--json", **monitored("other.service", "success", "0"))
    assert json.loads(done.stdout)["event"] == "failure"


@pytest.mark.parametrize(
    ("result", "status", "event", "shown"),
    [
        ("success", "0", "success", "success"),
        ("success", "75", "success", "exit status 75"),
        ("exit-code", "3", "warning", "exit status 3"),
        ("success", "3", "warning", "exit status 3"),
        ("exit-code", "20", "failure", "exit status 20"),
        ("exit-code", "143", "failure", "exit status 143"),
        ("signal", "KILL", "failure", "signal KILL"),
        ("signal", "9", "failure", "signal KILL"),
        ("signal", "", "failure", "signal"),
        ("core-dump", "6", "failure", "core-dump ABRT"),
        ("signal", "99", "failure", "signal 99"),
        ("watchdog", "ABRT", "failure", "watchdog"),
        ("timeout", "TERM", "failure", "timeout"),
        ("", "", "failure", "unknown"),
    ],
)
def test_events(result: str, status: str, event: str, shown: str) -> None:
    assert notification.result_of(result, status)[:2] == (event, shown)


def test_only_what_is_wanted_is_told(host: Host) -> None:
    host.main("notification: {mail: root, events: [failure, warning]}")
    (host.config / "domains.d/a.yaml").write_text(
        "match: {name: vm1}\nnotification: {events: [success], mail: me}"
    )
    unit = "nbdbackup@vm1.service"
    for given, result, argv in (
        (unit, "exit-code", None),
        (unit, "success", ["-i", "--", "me"]),
        ("nbdbackup@vm2.service", "exit-code", ["-i", "--", "root"]),
        ("nbdbackup@vm2.service", "success", None),
        # with warnings, which the units take for success
        ("nbdbackup@vm2.service", "warned", ["-i", "--", "root"]),
        ("nbdbackup-pending.service", "exit-code", ["-i", "--", "root"]),
    ):
        host.mail.unlink(missing_ok=True)
        status = {"exit-code": "20", "warned": "3"}.get(result, "0")
        facts = monitored(given, "success" if result == "warned" else result, status)
        assert host.notify(given, **facts).returncode == 0
        mail = host.told(host.mail)
        assert (mail and mail["argv"]) == argv, (given, result)


def test_nobody_to_tell_is_no_failure(host: Host) -> None:
    assert host.notify().returncode == 0


def test_a_broken_configuration_is_told_to_those_who_can_be_read(host: Host) -> None:
    host.main("notification: {mail: root}\ncompresion: 2")
    assert host.notify().returncode == 0
    assert "unknown key" in parsed(host.told(host.mail)).get_content()


BROKEN = "notification: {mail: root\n  no: [yaml"


def test_w3_a_file_that_is_no_yaml(host: Host) -> None:
    """W-3: nobody was told of it, since the notifier reads the same file."""
    secret = host.config / "password"
    secret.write_text("s3cret\n")
    host.main(f"notification: {{mail: me@here, command: '{host.command} -x', events: [failure]}}\n"
              f"libvirt: {{password_file: {secret}}}")  # fmt: skip
    unit = "nbdbackup@vm1.service"
    # the configuration is read well, and nothing is to be told
    assert host.notify(unit, **monitored(unit, "success", "0")).returncode == 0
    assert host.told(host.mail) is None
    host.main(BROKEN)
    for name in (unit, "nbdbackup@vm2.service", "nbdbackup-pending.service"):
        host.mail.unlink(missing_ok=True)
        host.pager.unlink(missing_ok=True)
        done = host.notify(name, **monitored(name, "exit-code", "10"))
        assert (done.returncode, done.stderr) == (0, "")
        mail = host.told(host.mail)
        if name == unit:
            assert mail["argv"] == ["-i", "--", "me@here"]
            assert host.told(host.pager)["argv"] == ["-x"]
        else:
            # of these it was never read; root it is
            assert mail["argv"] == ["-i", "--", "root"]
        text = parsed(mail).get_content()
        assert "exit status 10 (the configuration)" in text
        assert f"The configuration has an error: {host.config}/nbdbackup.yaml:" in text
        assert ("s3cret" in text) == (name != unit)
    for path in (host.own / "notification").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    # what a file says that can be read comes first
    (host.config / "domains.d/a.yaml").write_text(
        "match: {name: vm1}\nnotification: {mail: you@here}"
    )
    assert host.notify(unit).returncode == 0
    assert host.told(host.mail)["argv"] == ["-i", "--", "you@here"]


def test_w3_nobody_can_be_told_and_that_is_seen(host: Host) -> None:
    host.main(BROKEN)
    host.teller("sendmail", host.mail, status=75)
    done = host.notify("nbdbackup@vm1.service", "--verbose")
    assert done.returncode == 30
    assert "sendmail" in done.stderr
    event = events.NOTIFY_FAILED.text.partition("{")[0]
    assert f"{event}nbdbackup@vm1.service ended: " in done.stderr
    # where the journal has both, it is told by that alone
    host.in_journal = True
    done = host.notify()
    assert done.returncode == 30
    assert "nbdbackupctl: " not in done.stderr
    host.in_journal = False
    # a note that is damaged is none
    (host.own / "notification").mkdir(parents=True)
    for name in ("vm1", "%"):
        (host.own / f"notification/{name}.json").write_text('{"version": 1, "mail": 5}')
    host.teller("sendmail", host.mail)
    assert host.notify().returncode == 0
    assert host.told(host.mail)["argv"] == ["-i", "--", "root"]


def test_w6_the_mail_says_why(host: Host) -> None:
    """W-6: "exit status 50" instead of "No space left on device"; also after a boot."""
    host.main("notification: {mail: root}")
    unit = "nbdbackup@vm1.service"
    reason = "can't write /backup/x: No space left on device"
    end = runs.End(
        domain="vm1", unit=unit, host="here", begun="2026-02-01T02:00:00.000000Z",
        ended="2026-02-01T02:01:00.000000Z", result=runs.FAILED, status=50, reason=reason,
    )  # fmt: skip
    known = runs.Runs(host.own)
    known.record(end)
    assert host.notify(unit, **monitored(unit, "exit-code", "50")).returncode == 0
    assert f"reason:  {reason}\n" in parsed(host.told(host.mail)).get_content()
    # an error of the configuration is not told beside itself
    host.main("notification: {mail: root}\ncompresion: 2")
    found = json.loads(host.notify(unit, "--json", "--print").stdout)["body"]
    assert "The configuration has an error: " in found
    problem = found.partition("The configuration has an error: ")[2].partition("\n")[0]
    known.record(replace(end, reason=f"{problem} (1 more)"))
    found = json.loads(host.notify(unit, "--json", "--print").stdout)["body"]
    assert f"reason:  {problem} (1 more)\n" in found
    assert "The configuration has an error" not in found
    known.record(end)
    host.main("notification: {mail: root}")
    # this unit has failed since, before its run could say a word
    other = "nbdbackup@vm2.service"
    known.record(replace(end, domain="vm2", unit=other, begun="2026-01-01T02:00:00.000000Z"))
    assert json.loads(host.notify(other, "--json").stdout)["reason"] == ""
    host.unit(unit, active="inactive", result="")
    host.state.write_text(re.sub("(ExecMain.*Timestamp)=.*", r"\1=", host.state.read_text()))
    document = json.loads(host.notify(unit, "--json", "--print").stdout)
    assert (document["event"], document["reason"]) == ("failure", reason)
    assert "exit status 50" in document["body"]


def test_one_way_that_fails_does_not_keep_the_other(host: Host) -> None:
    host.main(f"notification: {{mail: root, command: {host.command}}}")
    host.teller("sendmail", host.mail, status=75)
    done = host.notify()
    assert done.returncode == 30
    assert done.stderr.count("\n") == 1
    assert "sendmail" in done.stderr
    assert host.told(host.pager) is not None
    (host.programs / "pager").unlink()
    done = host.notify()
    assert done.returncode == 30
    assert "sendmail" in done.stderr
    assert "pager" in done.stderr


def test_addresses_are_no_options(host: Host) -> None:
    host.main("notification: {mail: '-oQ/tmp/x'}")
    assert host.notify().returncode == 0
    mail = host.told(host.mail)
    assert mail["argv"] == ["-i", "--", "root"]
    assert "not a mail address" in parsed(mail).get_content()


def test_without_systemd_it_still_tells(host: Host) -> None:
    host.main("notification: {mail: root}")
    for name in ("systemctl", "journalctl"):
        host.program(name, "#!/bin/sh\necho no systemd here >&2; exit 1\n")
    assert host.notify().returncode == 0
    text = parsed(host.told(host.mail)).get_content()
    assert "no systemd here" in text
    assert "left nothing in the journal" in text


def test_names_are_unescaped(host: Host) -> None:
    name = "a b/ü'\\x20"
    unit = unitname.unit("nbdbackup-offline", name, "service")
    host.unit(unit)
    (host.config / "domains.d/a.yaml").write_text(
        "match: {name: "
        + json.dumps(name)
        + "}\nnotification: {command: "
        + str(host.command)
        + "}"
    )
    assert host.notify(unit).returncode == 0
    pager = host.told(host.pager)
    assert pager["facts"]["NBDBACKUP_DOMAIN"] == name
    assert pager["facts"]["NBDBACKUP_SUBJECT"].startswith(f"backup after the end of domain {name} ")


# -- templates


def test_a_template_of_the_administrator(host: Host) -> None:
    (host.config / "notify.txt.j2").write_text(
        "\n{{ event|upper }} {{ domain }}\nbody\n{{ lines|length }} {{ word }} {{ more }}\n"
    )
    done = host.notify("nbdbackup@vm1.service", "--print")
    assert done.stdout == (
        "FAILURE vm1\n\nbody\n2 failed journalctl -u nbdbackup@vm1.service; "
        "nbdbackupctl status -- vm1\n"
    )
    assert host.told(host.mail) is None


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ nothing_of_that_name }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in range(10**9) %}x{% endfor %}",
        "{% include '/etc/shadow' %}",
        "{{ lines.__class__.__init__.__globals__ }}",
        "\n \nx",
        "",
        "\udcff",
        "x" * (notification.MAX_TEMPLATE + 1),
        "{{ 'x' * 2000000 }}",
    ],
)
def test_a_template_that_is_of_no_use(host: Host, template: str) -> None:
    (host.config / "notify.txt.j2").write_bytes(template.encode(errors="surrogateescape"))
    done = host.notify("nbdbackup@vm1.service", "--print")
    assert done.returncode == 0
    assert done.stdout.startswith("backup of domain vm1 failed on ")
    assert "notify.txt.j2 can't be used: " in done.stdout
    assert "root:" not in done.stdout


def test_without_jinja2(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise ImportError('gone')")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "from nbdbackupd.ops.notify import notification as n; from pathlib import Path;"
        "notice = n.Notice(event='failure', unit='u', domain='', host='h', what='w', result='r',"
        " meaning='', started='', ended='', lines=());"
        "n.render(notice, Path('/nonexistent'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert "install python3-jinja2" in done.stderr


def test_the_default_text() -> None:
    notice = Notice(
        event="success", unit="nbdbackup@vm1.service", domain="vm1", host="h",
        what="backup of domain vm1", result="success", meaning="",
        started="2026-02-01 03:00:00 UTC", ended="", lines=("one", "{{ two }}"),
    )  # fmt: skip
    assert notification.render(notice, Path("/nonexistent")) == notification.Text(
        subject="backup of domain vm1 is done on h",
        body="""\
backup of domain vm1 is done on h.

unit:    nbdbackup@vm1.service
domain:  vm1
result:  success

started: 2026-02-01 03:00:00 UTC

What it said last:

  one
  {{ two }}

More: journalctl -u nbdbackup@vm1.service; nbdbackupctl status -- vm1
""",
    )


def test_warnings_are_not_those_of_the_host() -> None:
    notice = Notice(
        event="warning", unit="nbdbackup@vm1.service", domain="vm1", host="h",
        what="backup of domain vm1", result="exit status 3", meaning="done, with warnings",
        started="", ended="", lines=(),
    )  # fmt: skip
    text = notification.render(notice, Path("/nonexistent"))
    assert text.subject == "backup of domain vm1 is done, with warnings, on h"
    assert text.body.startswith(f"{text.subject}.\n")


# -- what systemd says


def test_how_services_stand(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    second = SHOW.format(unit="b.service", active="activating", result="success")
    second = second.replace("@1769911265", "").replace("ExecMainStatus=20", "ExecMainStatus=")
    host.state.write_text(host.state.read_text() + "\n" + second)
    monkeypatch.setenv("PATH", f"{host.programs}:/usr/bin:/bin")
    one, two = units.services("*.service")
    assert (one.unit, one.exit_status, one.is_running) == ("nbdbackup@vm1.service", 20, False)
    assert one.started is not None
    assert one.ended is not None
    assert (one.ended - one.started).total_seconds() == 65
    assert (two.exit_status, two.ended, two.is_running) == (0, None, True)
