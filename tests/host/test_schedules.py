"""Schedules, reports and notifications under a real systemd, as the files are installed."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from nbdbackupd.model import unitname
from tests.lab.command import run
from tests.lab.host import Host
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lab.process import wait_until
from tests.lib.pages import TOP

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]

HOSTILE = "a b-c.d%i\\x$HOME'ü"
PACKAGES = ("python3-yaml", "python3-jinja2", "python3-lz4")
PAGER = """\
#!/bin/sh
env | grep ^NBDBACKUP_ >"/var/log/told-$NBDBACKUP_EVENT.facts"
cat >"/var/log/told-$NBDBACKUP_EVENT"
"""
SENDMAIL = """\
#!/bin/sh
{ echo "$@"; cat; } >/var/spool/told-mail
"""
MAIN = """\
schedule: {calendar: '*-*-* 05:00 UTC', random_delay: 0}
notification: {mail: root, command: /usr/local/bin/pager, events: [failure, warning, success]}
"""


@pytest.fixture(scope="module", params=SUITES)
def host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    stage = tmp_path_factory.mktemp("stage")
    run(["make", "-C", TOP, "install", f"DESTDIR={stage}"])
    with HostLab() as lab:
        host = lab.host("lab-a", hypervisor(request.param))
        host.apt("update")
        host.apt("install", "--no-install-recommends", *PACKAGES)
        for name in ("usr", "etc"):
            host.copy_in(stage / name, "/")
        host.write("/usr/local/bin/pager", PAGER, 0o755)
        host.write("/usr/sbin/sendmail", SENDMAIL, 0o755)
        host.write("/etc/nbdbackup/nbdbackup.yaml", MAIN)
        host.run("systemd-tmpfiles", "--create", "nbdbackup.conf")
        yield host


PATTERN_XML = """\
<domain type='qemu'><name>pat 1</name><memory>65536</memory><os><type>hvm</type></os></domain>
"""


def timer(name: str) -> str:
    return unitname.unit("nbdbackup", name, "timer")


def service(name: str) -> str:
    return unitname.unit("nbdbackup", name, "service")


def show(host: Host, unit: str, name: str) -> str:
    return host.run("systemctl", "show", "--value", f"--property={name}", "--", unit).strip()


def timers(host: Host) -> dict[str, dict[str, Any]]:
    document = json.loads(host.run("nbdbackupctl", "timers", "--json"))
    return {each["domain"]: each for each in document["timers"]}


def reload(host: Host, **texts: str) -> None:
    for name, text in texts.items():
        host.write(f"/etc/nbdbackup/domains.d/{name}.yaml", text)
    # that most of these domains are not there is a warning
    assert host.call("nbdbackupctl", "config", "check").returncode in (0, 3)
    host.run("systemctl", "daemon-reload")


def test_timers_follow_the_configuration(host: Host) -> None:
    names = json.dumps(["vm1", HOSTILE])
    reload(host, a=f"match: {{name: {names}}}\nschedule: {{calendar: '*-*-* 03:30 UTC', "
           "enable: yes}",
           b="match: {glob: 'web*'}\nschedule: {calendar: ['Sun 06:00 UTC', 'Mon 06:00 UTC']}",
           c="match: {name: never}\nschedule: {calendar: []}")  # fmt: skip
    # F1: systemd knows the new timers already, and none is active
    host.run("systemctl", "start", "nbdbackup-timers")
    found = timers(host)
    assert set(found) == {"vm1", HOSTILE}
    for each in found.values():
        at = datetime.fromisoformat(each["next"])
        assert (at.hour, at.minute, at.second) == (3, 30, 0)
    for name in ("web1", "never", "other"):
        host.run("systemctl", "enable", "--quiet", "--now", timer(name))
    # web1 has a drop-in only since it is enabled
    host.run("systemctl", "daemon-reload")
    found = timers(host)
    assert datetime.fromisoformat(found["web1"]["next"]).weekday() in (6, 0)
    assert datetime.fromisoformat(found["other"]["next"]).hour == 5
    assert found["never"]["next"] == ""
    assert show(host, timer("never"), "ActiveState") == "active"
    assert show(host, timer(HOSTILE), "LoadState") == "loaded"
    # a new schedule needs nothing but a daemon-reload
    reload(host, a=f"match: {{name: {names}}}\nschedule: {{calendar: '*-*-* 04:45 UTC'}}")
    assert datetime.fromisoformat(timers(host)["vm1"]["next"]).minute == 45
    # that no file wants it any more does
    host.run("systemctl", "start", "nbdbackup-timers")
    assert show(host, timer("vm1"), "ActiveState") == "inactive"
    assert show(host, timer("web1"), "ActiveState") == "active"


def test_a_timer_that_fires_and_a_failure_that_is_told(host: Host) -> None:
    reload(host, a=f"match: {{name: {json.dumps(HOSTILE)}}}\nschedule: {{calendar: '*:*:0/10', "
           "enable: yes}")  # fmt: skip
    host.run("systemctl", "start", "timers.target")
    # its accuracy is a minute; that it fires is told by its run alone: what systemd calls its last
    # time is at first the one of its stamp
    told = "/var/log/told-failure"
    wait_until(lambda: host.call("test", "-s", told).returncode == 0, "the notice of a run", 190)
    assert timers(host)[HOSTILE]["last"] != ""
    reload(host, a=f"match: {{name: {json.dumps(HOSTILE)}}}\nschedule: {{calendar: []}}")
    wait_until(lambda: show(host, service(HOSTILE), "ActiveState") == "failed", "its end", 60)
    text = host.run("cat", told)
    assert text.startswith(f"backup of domain {HOSTILE} failed on lab-a\n")
    assert "exit status 20 (the domain or libvirt)" in text
    assert "no domain " in text
    facts = host.run("cat", f"{told}.facts").splitlines()
    assert f"NBDBACKUP_DOMAIN={HOSTILE}" in facts
    assert f"NBDBACKUP_UNIT={service(HOSTILE)}" in facts
    assert host.call("test", "-e", "/var/log/told-success").returncode == 1
    entry = timers(host)[HOSTILE]
    assert (entry["result"], entry["exit_status"]) == ("failed (exit status 20)", 20)
    assert entry["started"]
    assert entry["started"] <= entry["ended"]
    done = host.call("nbdbackupctl", "status", "--json", HOSTILE)
    assert done.returncode == 3, done
    (domain,) = json.loads(done.stdout)["domains"]
    assert domain["reasons"][0].startswith("the run of ")
    assert "no domain " in domain["reasons"][0]
    assert f"(by {service(HOSTILE)}, exit status 20)" in domain["reasons"][0]
    assert domain["health"] == "critical"


def test_what_the_last_run_was_is_told_by_hand(host: Host) -> None:
    printed = host.run("nbdbackupctl", "notify", "--print", "--", service(HOSTILE))
    assert "exit status 20" in printed
    assert "no domain " in printed


def test_one_bad_file_leaves_the_timers_of_others(host: Host) -> None:
    host.write("/etc/nbdbackup/domains.d/z.yaml", "match: {name: x\n")
    host.run("systemctl", "daemon-reload")
    assert datetime.fromisoformat(timers(host)["web1"]["next"]).weekday() in (6, 0)
    host.run("rm", "/etc/nbdbackup/domains.d/z.yaml")


def test_a1_a_domain_that_a_pattern_fits_gets_its_timer(host: Host) -> None:
    """A-1: as soon as libvirt has it, and as long."""
    reload(host, p="match: {glob: 'pat*'}\nschedule: {calendar: '*-*-* 06:30 UTC', enable: yes}")
    host.run("systemctl", "start", "nbdbackup-timers.path")
    host.write("/root/pat.xml", PATTERN_XML)
    host.run("virsh", "define", "/root/pat.xml")
    wait_until(lambda: "pat 1" in timers(host), "its timer", 60)
    assert datetime.fromisoformat(timers(host)["pat 1"]["next"]).minute == 30
    wait_until(
        lambda: show(host, "nbdbackup-timers.service", "ActiveState") == "inactive", "its end", 60
    )
    host.run("virsh", "undefine", "pat 1")
    wait_until(lambda: "pat 1" not in timers(host), "its timer's end", 60)
    host.run("rm", "/etc/nbdbackup/domains.d/p.yaml")
    assert show(host, "nbdbackup-timers.service", "Result") == "success"


def test_a_success_is_told_by_mail(host: Host) -> None:
    """After the end of a guest that libvirt does not know there is nothing to do."""
    host.run("systemctl", "start", "nbdbackup-offline@gone.service")
    told = "/var/log/told-success"
    wait_until(lambda: host.call("test", "-s", told).returncode == 0, "the notice", 60)
    assert host.run("cat", told).count("nothing saved") == 1
    arguments, subject, *_ = host.run("cat", "/var/spool/told-mail").splitlines()
    assert arguments == "-i -- root"
    assert subject == "Subject: backup after the end of domain gone is done on lab-a"


def test_timers_begin_with_the_host(host: Host) -> None:
    reload(host, a="match: {name: [first, second]}\nschedule: {enable: yes}",
           b="match: {name: second}\nschedule: {enable: no}")  # fmt: skip
    host.poweroff()
    host.boot()
    wait_until(lambda: "first" in timers(host), "the timer", 60)
    assert "second" not in timers(host)
    assert datetime.fromisoformat(timers(host)["first"]["next"]).hour == 5
