"""How well domains are protected: real sets, libvirt's test driver, systemd's answers on file."""

import html
import json
import os
import re
import subprocess
import sys
import uuid as uuids
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd import durable, rundir
from nbdbackupd.app import context as app_context
from nbdbackupd.app import ctl, tables
from nbdbackupd.model import throwaway, unitname
from nbdbackupd.model.chain import Level
from nbdbackupd.model.freeze_memory import MAY_BE_FROZEN
from nbdbackupd.model.health import GONE, UNHEARD, Facts, Health, Limits, age_text, judge
from nbdbackupd.ops.status import metrics, record
from nbdbackupd.repo import boot_tests, layout, runs
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.source import hooked
from nbdbackupd.systemd import units
from tests.lib import chains
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

NOW = datetime(2026, 2, 10, 12, 0, 0, tzinfo=UTC)
LIMITS = Limits(warning=36 * 3600, critical=72 * 3600)
HOSTILE = "a b|c='d'é"

SYSTEMCTL = """\
#!/usr/bin/python3
import json, pathlib, sys
host = pathlib.Path({host!r})
if (host / "broken").exists():
    sys.exit("Failed to connect to bus")
if "list-timers" in sys.argv:
    print((host / "timers.json").read_text())
else:
    print((host / "services").read_text())
"""


def uuid_of(name: str) -> str:
    """The UUID of the domain of that name."""
    return str(uuids.uuid5(uuids.NAMESPACE_DNS, name))


class Host:
    """A repository, a configuration, libvirt's and systemd's answers."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.repository = root / "repository"
        self.config = root / "config"
        self.capsys = capsys
        self.uri = "test:///nonexistent"
        (self.config / "domains.d").mkdir(parents=True)
        self.repository.mkdir()
        self.main()
        self.systemd()

    def main(self, text: str = "") -> None:
        head = f"repository: {{path: {self.repository}}}\n"
        (self.config / "nbdbackup.yaml").write_text(head + text)

    def file(self, name: str, text: str) -> None:
        (self.config / f"domains.d/{name}.yaml").write_text(text)

    def libvirt(self, *names: str) -> None:
        """Let libvirt know these domains and no others."""
        domains = "".join(
            f"<domain type='test'><name>{name}</name><uuid>{uuid_of(html.unescape(name))}</uuid>"
            "<memory>8192</memory><os><type>hvm</type></os></domain>"
            for name in names
        )
        (self.root / "node.xml").write_text(f"<node>{domains}</node>")
        self.uri = f"test://{self.root}/node.xml"

    def systemd(self, *timers: dict[str, Any], services: str = "") -> None:
        (self.root / "timers.json").write_text(json.dumps(timers))
        (self.root / "services").write_text(services)

    def save(
        self, domain: str, moment: datetime, *, set_name: str = "", warning: str = "",
        uuid: str = "", into: str = "",
    ) -> None:  # fmt: skip
        """Publish a point; the first of a set is a full."""
        folder = self.repository / (into or layout.escape(domain, layout.MAX_DOMAIN))
        uuid = uuid or uuid_of(domain)
        repository = SetDirectory.open(folder / (set_name or f"{moment:%Y-%m}"))
        with repository.lock(owner="test"):
            known = repository.load().points
            level = Level.INC if known else Level.FULL
            intent = replace(chains.intent_for(len(known) + 1, level=level), uuid=uuid)
            with repository.draft(intent) as draft:
                point = chains.fill(draft, known, level)
                created = moment.isoformat().replace("+00:00", "Z")
                warnings = (warning,) if warning else ()
                made = replace(point, created=created, warnings=warnings, domain=domain, uuid=uuid)
                draft.publish(made)

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status and standard output of a command."""
        self.capsys.readouterr()
        head = ["-c", self.uri, "--config-dir", str(self.config)]
        code = ctl.main([*head, "--runtime-dir", str(self.root / "run"), *words])
        return code, self.capsys.readouterr().out

    def status(self, *words: str) -> dict[str, Any]:
        """The domains of the report, by name; the same by what the first look has kept."""
        first, again = (json.loads(self.run("status", "--json", *words)[1]) for _ in range(2))
        assert (again["domains"], again["notes"]) == (first["domains"], first["notes"])
        return {each["domain"]: each for each in first["domains"]}


@pytest.fixture
def host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Host:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text(SYSTEMCTL.format(host=str(tmp_path)))
    (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("TZ", "UTC")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    monkeypatch.setenv("NBDBACKUP_STATE_DIR", str(state))
    monkeypatch.setattr(units, "BOOTED", tmp_path)
    monkeypatch.setattr(app_context, "now", lambda: NOW)
    return Host(tmp_path, capsys)


def timer(name: str, template: str = "nbdbackup") -> dict[str, Any]:
    """As systemctl 252 tells it."""
    usec = int(NOW.timestamp()) * 1_000_000
    return {
        "next": usec + 3600_000_000, "left": 3600_000_000, "last": usec - 7200_000_000,
        "passed": 7200_000_000, "unit": unitname.unit(template, name, "timer"),
        "activates": unitname.unit(template, name, "service"),
    }  # fmt: skip


def service(
    name: str, *, active: str = "inactive", result: str = "success", status: int = 0,
    ago: int = 7200,
) -> str:  # fmt: skip
    start = int(NOW.timestamp()) - ago
    return (
        f"Id={unitname.unit('nbdbackup', name, 'service')}\nActiveState={active}\n"
        f"Result={result}\nExecMainStatus={status}\nExecMainStartTimestamp=@{start}\n"
        f"ExecMainExitTimestamp=@{start + 95}\nInvocationID=\n\n"
    )


# -- the verdict


@pytest.mark.parametrize(
    ("facts", "health", "words"),
    [
        (Facts(newest=NOW), Health.OK, ""),
        (Facts(newest=NOW - timedelta(hours=36)), Health.OK, ""),
        (Facts(newest=NOW - timedelta(hours=37)), Health.WARNING, "37 h old"),
        (Facts(newest=NOW - timedelta(hours=73)), Health.CRITICAL, "3 days old"),
        (Facts(newest=NOW + timedelta(hours=2)), Health.OK, ""),
        (Facts(newest=NOW + timedelta(days=2)), Health.WARNING, "future"),
        (Facts(), Health.WARNING, "no restore point yet"),
        (Facts(failure="failed"), Health.CRITICAL, "failed"),
        (Facts(newest=NOW, failure="failed"), Health.WARNING, "failed"),
        (Facts(newest=NOW, damage="damaged"), Health.CRITICAL, "damaged"),
        (Facts(problem="not mounted"), Health.CRITICAL, "not mounted"),
        (Facts(newest=NOW, warnings=("vda was read whole",)), Health.WARNING, "vda"),
        (Facts(is_covered=False), Health.WARNING, "unprotected"),
        (Facts(is_covered=False, is_known=True, newest=NOW), Health.WARNING, "unprotected"),
        (Facts(is_covered=False, is_known=False, newest=NOW - timedelta(days=99)), Health.OK, ""),
        (Facts(is_known=False, newest=NOW), Health.WARNING, "libvirt knows no such"),
        (Facts(is_wanted=False), Health.OK, ""),
        (Facts(is_wanted=False, newest=NOW - timedelta(days=99)), Health.OK, ""),
        (Facts(is_wanted=False, newest=NOW, damage="damaged"), Health.CRITICAL, "damaged"),
    ],
)
def test_judge(facts: Facts, health: Health, words: str) -> None:
    verdict = judge(facts, LIMITS, NOW)
    assert verdict.health is health
    assert words in " ".join(verdict.reasons[:1])
    assert bool(words) == bool(verdict.reasons)


def test_the_worst_comes_first() -> None:
    facts = Facts(newest=NOW - timedelta(days=9), failure="failed", warnings=("w",), damage="bad")
    assert judge(facts, LIMITS, NOW).reasons == (
        "bad", "the newest point is 9 days old", "failed", "w",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (172799, "47 h"),
     (172800, "2 days"), (9e6, "104 days")],
)  # fmt: skip
def test_ages(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


# -- the report


def test_domains_of_all_kinds(host: Host) -> None:
    host.file("a", "match: {name: [vm1, vm4]}")
    host.file("b", "match: {name: 'off'}\nschedule: {calendar: []}")
    host.file("c", "match: {glob: 'gone*'}")
    host.save("vm1", NOW - timedelta(days=30), set_name="2026-01")
    host.save("vm1", NOW - timedelta(days=8))
    host.save("vm1", NOW - timedelta(hours=2))
    host.save("vm2", NOW - timedelta(days=4))
    host.save("former", NOW - timedelta(days=90))
    host.libvirt("vm1", "vm2", "vm3", "off", "standby")
    # H-4: with a repository of its own this host may have no point, or an old one
    host.file("d", "match: {name: standby}\nstandby: yes")
    host.save("standby", NOW - timedelta(days=90))
    host.systemd(timer("vm1"), timer("vm2"), timer("standby"), services=service("vm1") + service(
        "vm2", active="failed", result="exit-code", status=20))  # fmt: skip
    found = host.status()
    healths = {name: each["health"] for name, each in found.items()}
    assert healths == {
        "former": "ok", "off": "ok", "standby": "ok", "vm1": "ok", "vm2": "critical",
        "vm3": "warning", "vm4": "warning",
    }  # fmt: skip
    assert {name for name, each in found.items() if not each["protected"]} == {"former", "vm3"}
    one = found["vm1"]
    assert one["set"] == str(host.repository / "vm1/2026-02")
    assert (one["points"], one["level"], one["age"]) == (2, "inc", 7200)
    assert one["next_run"] == "2026-02-10T13:00:00Z"
    assert found["vm2"]["reasons"] == [
        "the newest point is 4 days old",
        "the last run failed: exit status 20 (the domain or libvirt)",
    ]
    assert found["vm3"]["reasons"][0].startswith("unprotected")
    assert found["vm4"]["reasons"] == [GONE]
    code, out = host.run("status")
    assert code == 3
    head, *lines = out.splitlines()
    assert re.split("  +", head) == [
        "DOMAIN", "LAST POINT", "AGE", "LEVEL", "SIZE", "TOTAL", "VERIFIED", "NEXT RUN", "HEALTH"
    ]  # fmt: skip
    row = next(line for line in lines if line.startswith("vm1 "))
    assert re.fullmatch(
        r"vm1 +2026-02-10 10:00 UTC  2 h +inc +[\d.]+ [KM]?i?B +[\d.]+ KiB +- +"
        r"2026-02-10 13:00 UTC  ok",
        row,
    )
    assert "vm2: the newest point is 4 days old" in lines
    assert "\x1b" not in out


def test_all_is_well(host: Host) -> None:
    host.libvirt("vm1")
    host.file("a", "match: {name: vm1}")
    host.systemd(timer("vm1"))
    host.save("vm1", NOW)
    code, out = host.run("status", "vm1")
    assert (code, len(out.splitlines())) == (0, 4)
    assert re.search(r"^[\d.]+ \w+ of [\d.]+ \w+ are free in /", out, re.MULTILINE)
    code, out = host.run("status", "--nagios")
    assert (code, out) == (
        0,
        "NBDBACKUP OK - 1 domain | domains=1;;;0 unprotected=0;;;0 'vm1 age'=0s;129600;259200;0\n",
    )


def end(minutes: int, result: str = runs.FAILED, status: int = 50, **more: str) -> runs.End:
    """Of a run that began so many minutes ago."""
    began = NOW - timedelta(minutes=minutes)
    facts = {"unit": "nbdbackup@vm1.service", "reason": "No space left on device", **more}
    return runs.End(
        domain="vm1", host="here", begun=record.stamp(began),
        ended=record.stamp(began + timedelta(minutes=1)), result=result, status=status, **facts,
    )  # fmt: skip


def test_w6_how_the_last_run_ended_whoever_ran_it(host: Host) -> None:
    """W-6: by its own words, over a boot, and no longer than until a newer good point."""
    host.libvirt("vm1")
    host.file("a", "match: {name: vm1}")
    host.save("vm1", NOW - timedelta(hours=2))
    # systemd knows nothing of it: it was before the boot
    host.systemd(timer("vm1"))
    known = runs.Runs(host.root / "state")
    known.record(end(60))
    found = host.status()["vm1"]
    why = (
        "the run of 2026-02-10 11:01 UTC failed: No space left on device "
        "(by nbdbackup@vm1.service, exit status 50)"
    )
    assert (found["health"], found["reasons"]) == ("warning", [why])
    assert found["last_run"]["status"] == 50
    code, out = host.run("status", "--nagios")
    assert (code, f"vm1: {why} |" in out) == (1, True)
    (entry,) = json.loads(host.run("timers", "--json")[1])["timers"]
    assert (entry["result"], entry["exit_status"]) == ("failed (exit status 50)", 50)
    lines = host.run("timers")[1].splitlines()
    assert "vm1: No space left on device" in lines
    # of the same run, though the timer was due at another time
    assert " 11:00:00 UTC  1:00  failed (exit status 50)" in lines[1]
    # systemd tells of the same failure, and not twice
    host.systemd(timer("vm1"), services=service("vm1", active="failed", result="exit-code",
                                                status=50))  # fmt: skip
    assert host.status()["vm1"]["reasons"] == [why]
    # one that had nothing to do, or gave way by hand, is no good end
    known.record(end(50, runs.SKIPPED, 0))
    known.record(end(40, runs.BUSY, 75, unit=""))
    assert host.status()["vm1"]["reasons"] == [why]
    # a newer point clears it, whatever made that: here nobody noted who
    host.save("vm1", NOW - timedelta(minutes=30))
    assert host.status()["vm1"]["health"] == "ok"
    # and so does a run that found nothing new
    known.record(end(20, unit=""))
    assert "(by hand, exit status 50)" in host.status()["vm1"]["reasons"][0]
    known.record(end(10, runs.CURRENT, 0))
    assert host.status()["vm1"]["health"] == "ok"


def test_what_a_run_warned_of_is_told_until_the_next_point(host: Host) -> None:
    """It had to begin a set, of which the point in it knows nothing."""
    host.libvirt("vm1")
    host.file("a", "match: {name: vm1}")
    host.save("vm1", NOW - timedelta(hours=1))
    host.systemd(timer("vm1"))
    known = runs.Runs(host.root / "state")
    known.record(end(60, runs.SAVED, 3, point="p1", reason="set 2026-01 can't be continued"))
    found = host.status()["vm1"]
    why = "the run of the newest point ended with a warning: set 2026-01 can't be continued"
    assert (found["health"], found["reasons"]) == ("warning", [why])
    host.save("vm1", NOW - timedelta(minutes=30))
    assert host.status()["vm1"]["health"] == "ok"
    known.record(end(30, runs.SAVED, 0, point="p2", reason=""))
    assert host.status()["vm1"]["health"] == "ok"


def test_a1_a_pattern_that_fits_is_no_schedule(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A-1: a domain that a pattern matches had no timer, HEALTH ok and unprotected=0."""
    monkeypatch.setattr(units, "RUNNER", host.config)
    host.libvirt("web-1", "web 2")
    host.file("a", "match: {glob: 'web*'}")
    host.save("web 2", NOW)
    never = {**timer("web-1"), "next": 0}
    host.systemd(never)
    found = host.status()
    for name, unit in (
        ("web-1", r"'nbdbackup@web\x2d1.timer'"),
        ("web 2", r"'nbdbackup@web\x202.timer'"),
    ):
        assert (found[name]["protected"], found[name]["health"]) == (False, "warning")
        why = found[name]["reasons"][0]
        assert why.startswith("not scheduled, no timer is active: ")
        assert f"systemctl enable --now {unit}'" in why
    code, out = host.run("status", "--nagios")
    assert (code, "unprotected=2;" in out) == (1, True)
    host.main(f"monitoring: {{metrics_directory: {host.root}}}")
    host.run("status", "--metrics")
    assert "\nnbdbackup_unprotected_domains 2\n" in (host.root / "nbdbackup.prom").read_text()
    # a timer that starts its service has no next time while that runs
    host.systemd(never, timer("web 2"), services=service("web-1", active="activating"))
    assert all(each["protected"] for each in host.status().values())
    # other schedulers than timers, or none, are meant
    host.systemd()
    host.file("b", "match: {glob: 'web*'}\nschedule: {calendar: []}")
    assert {each["health"] for each in host.status().values()} == {"ok"}


def test_a_schedule_that_is_enabled_needs_a_timer(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F2: with on_shutdown a timer that never began was no fault."""
    host.libvirt("vm1", "vm2")
    host.main("on_shutdown: yes\nschedule: {enable: yes}")
    host.file("a", "match: {name: vm1}")
    for name in ("vm1", "vm2"):
        host.save(name, NOW)
    monkeypatch.setattr(units, "RUNNER", host.config)
    found = host.status()
    # the main file alone begins no timer: who set it there did not mean each domain
    assert (found["vm2"]["health"], found["vm2"]["protected"]) == ("ok", True)
    assert (found["vm1"]["health"], found["vm1"]["protected"]) == ("warning", False)
    (why,) = found["vm1"]["reasons"]
    assert why == (
        "not scheduled although schedule.enable is set, no timer is active: 'systemctl start "
        "nbdbackup-timers', or 'systemctl enable --now nbdbackup@vm1.timer'"
    )
    assert host.run("status")[0] == 3
    assert host.run("status", "--nagios")[0] == 1
    # its package has been removed, and the commands are still there
    monkeypatch.setattr(units, "RUNNER", host.config / "gone")
    assert host.status()["vm1"]["reasons"][0].endswith(": install the package nbdbackupd")
    host.main()
    assert host.status()["vm1"]["reasons"] == [
        "not scheduled, no timer is active: install the package nbdbackupd"
    ]
    monkeypatch.setattr(units, "is_booted", lambda: True)
    assert host.run("timers") == (0, "no timers: install the package nbdbackupd\n")
    host.main("on_shutdown: yes\nschedule: {enable: yes}")
    host.systemd(timer("vm1"))
    assert host.status()["vm1"]["health"] == "ok"
    # that there is none is meant
    host.systemd()
    host.file("a", "match: {name: vm1}\nschedule: {calendar: []}")
    assert host.status()["vm1"]["health"] == "ok"


def test_the_hook_of_a_removed_package_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.libvirt("vm1")
    host.file("a", "match: {name: vm1}\non_shutdown: yes")
    host.save("vm1", NOW)
    assert host.run("status")[0] == 0
    gone = hooked.Hook(why=hooked.REMOVED, is_removed=True)
    monkeypatch.setattr(hooked, "look", lambda *_: gone)
    code, out = host.run("status")
    assert code == 3
    assert f"vm1: {UNHEARD}\n" in out
    told = "libvirt's hook does nothing: the package nbdbackupd was removed; install it again"
    assert told in out
    code, out = host.run("status", "--nagios")
    assert (code, told in out) == (1, True)
    # one that never was there is missed only where the end of a guest is to be saved
    monkeypatch.setattr(hooked, "look", lambda *_: hooked.Hook(why="none", is_missing=True))
    code, out = host.run("status")
    assert code == 3
    assert "libvirt calls no hook of ours: none; install the package nbdbackupd" in out
    host.file("a", "match: {name: vm1}\nschedule: {calendar: []}")
    code, out = host.run("status")
    assert (code, "hook of ours" in out) == (0, False)


def test_l2_our_own_domains_are_not_counted(host: Host) -> None:
    """L-2: a throw-away domain of a boot is no domain that somebody has to protect."""
    host.libvirt("vm1", "boot_vm1")
    node = host.root / "node.xml"
    root = ET.fromstring(node.read_text())
    throwaway.mark(root[1])
    node.write_text(ET.tostring(root, encoding="unicode"))
    host.main(f"on_shutdown: yes\nmonitoring: {{metrics_directory: {host.root}}}")
    assert set(host.status()) == {"vm1"}
    host.run("status", "--metrics")
    assert "\nnbdbackup_domains 1\n" in (host.root / "nbdbackup.prom").read_text()


def test_w14_what_its_end_saves_is_protected(host: Host) -> None:
    """W-14: "unprotected" beside a point that the hook saved 3 s ago."""
    host.libvirt("vm1")
    host.main("on_shutdown: yes")
    host.save("vm1", NOW - timedelta(seconds=3))
    found = host.status()["vm1"]
    assert (found["health"], found["protected"], found["reasons"]) == ("ok", True, [])


def test_a3_runs_that_live(host: Host) -> None:
    """A-3: how far a run is, and that it waits, whoever began it."""
    host.libvirt("vm1")
    host.file("a", "match: {name: vm1}")
    host.systemd(timer("vm1"))
    host.save("vm1", NOW)
    known = runs.Runs(host.root / "state")
    doing = host.root / "run/doing"
    doing.mkdir(parents=True)
    begun = record.stamp(NOW - timedelta(minutes=5))
    with ExitStack() as stack:
        for ident in ("nbdbackup@vm1.service", "hand-1"):
            run = runs.Begun(
                ident=ident, domain="vm1", host="here", boot=runs.boot_id(), begun=begun
            )
            stack.enter_context(known.living(run))
        (doing / "nbdbackup@vm1.service").write_text("vda: 45 %")
        (doing / "hand-1").write_text("waiting for a place\x1b")
        code, out = host.run("status")
        assert code == 0
        assert out.splitlines()[-2:] == [
            "vm1: running, waiting for a place\\x1b (by hand, since 11:55)",
            "vm1: running, vda: 45 % (nbdbackup@vm1.service, since 11:55)",
        ]
        assert host.status()["vm1"]["runs"][1] == {
            "unit": "nbdbackup@vm1.service", "begun": begun, "doing": "vda: 45 %",
        }  # fmt: skip
    # they left the block without a word of their end
    assert host.status()["vm1"]["runs"] == []


NAGIOS = re.compile(
    r"NBDBACKUP (OK|WARNING|CRITICAL|UNKNOWN) - [^|\n]+"
    r"(?: \|(?: (?:[a-z]+|'(?:[^'=|]|'')+')=\d+s?(?:;\d*){2};0)+)?\n"
)


def test_nagios_line(host: Host) -> None:
    host.libvirt("vm1")
    host.systemd(timer("vm1"), timer(HOSTILE), timer("vm2"))
    host.main("monitoring: {warning_age: 1h, critical_age: 5h}")
    host.file("a", "match: {glob: '*'}\nmonitoring: {critical_age: 9h}")
    for name, hours in (("vm1", 0), (HOSTILE, 2)):
        host.save(name, NOW - timedelta(hours=hours))
    host.libvirt("vm1", "vm2", HOSTILE.replace("é", "&#233;"))
    for words, code, word in (
        ([], 1, "WARNING"),
        (["vm1"], 0, "OK"),
        (["--critical", "1h"], 2, "CRITICAL"),
        (["--warning", "3h", HOSTILE], 0, "OK"),
        (["nobody"], 3, "UNKNOWN"),
    ):
        got, out = host.run("status", "--nagios", *words)
        found = NAGIOS.fullmatch(out)
        assert found is not None, out
        assert (got, found[1]) == (code, word), out
    _, out = host.run("status", "--nagios")
    assert out.endswith("'a b?c_''d''é age'=7200s;3600;32400;0 'vm1 age'=0s;3600;32400;0\n")
    assert "2 of 3 domains" in out


def test_nagios_with_a_broken_configuration(host: Host) -> None:
    host.main("x: y")
    code, out = host.run("status", "--nagios")
    assert code == 3
    assert re.fullmatch(r"NBDBACKUP UNKNOWN - .*unknown key.*\n", out)


def test_without_libvirt_and_systemd(host: Host) -> None:
    host.file("a", "match: {name: vm1}")
    host.file("b", "match: {metadata: {tier: gold}}")
    host.save("vm1", NOW)
    (host.root / "broken").touch()
    code, out = host.run("status")
    assert code == 0
    assert "libvirt can't be asked: " in out
    assert "systemd can't be asked: " in out
    assert "files that choose domains by labels" in out
    code, out = host.run("timers")
    assert (code, out) == (30, "")


def test_where_libvirt_is_not_installed(host: Host) -> None:
    host.save("vm1", NOW)
    (host.root / "libvirt.py").write_text("raise ImportError('it is gone')")
    (host.root / "nbd.py").write_text("raise ImportError('it is gone')")
    done = subprocess.run(
        [sys.executable, "-m", "nbdbackupd", "--config-dir", host.config, "status"],
        cwd=TOP, env={**os.environ, "PYTHONPATH": str(host.root)}, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert "python3-libvirt is not installed" in done.stdout
    assert "\nvm1 " in done.stdout


def test_nothing_is_known_and_nobody_could_be_asked(host: Host) -> None:
    assert host.run("status", "--nagios")[0] == 3
    host.libvirt()
    assert host.run("status", "--nagios")[0] == 0
    assert host.run("status")[0] == 0


def test_a_repository_that_is_not_mounted(host: Host) -> None:
    host.libvirt("vm1")
    host.main("monitoring: {warning_age: 1h}")
    head = f"repository: {{path: {host.repository}, marker: .here}}\n"
    (host.config / "nbdbackup.yaml").write_text(head)
    host.file("a", "match: {name: vm1}")
    found = host.status()["vm1"]
    assert found["health"] == "critical"
    assert "marker" in found["reasons"][0]


def test_a_damaged_set(host: Host) -> None:
    host.libvirt("vm1")
    host.file("a", "match: {name: vm1}")
    host.save("vm1", NOW - timedelta(hours=3))
    host.save("vm1", NOW)
    newest = max((host.repository / "vm1/2026-02/points").iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])
    found = host.status()["vm1"]
    assert (found["health"], found["points"], found["age"]) == ("critical", 1, 3 * 3600)
    assert "2026-02: " in found["reasons"][0]


def test_what_the_newest_point_lacks(host: Host) -> None:
    host.libvirt("vm1")
    host.systemd(timer("vm1"))
    host.file("a", "match: {name: vm1}")
    host.save("vm1", NOW, warning="vda was read whole: its bitmap is lost")
    assert host.status()["vm1"]["reasons"] == ["vda was read whole: its bitmap is lost"]


def test_a_point_that_did_not_come_up(host: Host) -> None:
    """The last boot test counts; those of points that are gone do not."""
    host.libvirt("vm1")
    host.systemd(timer("vm1"))
    host.file("a", "match: {name: vm1}")
    host.save("vm1", NOW)
    (folder,) = (host.repository / "vm1").iterdir()
    (point,) = (each.id for each in SetDirectory.open(folder).load().points)
    failed = boot_tests.BootTest(
        point=point, tested="2026-03-01T00:00:00Z", passed=False, waited_for="agent", seconds=9.0,
        reason="no sign within 9 s",
    )  # fmt: skip
    boot_tests.write(folder, failed, b"")
    boot_tests.write(folder, replace(failed, point="gone", tested="2026-03-02T00:00:00Z"), b"")
    found = host.status()["vm1"]
    assert found["reasons"] == [f"point {point} did not come up: no sign within 9 s"]
    assert (found["health"], found["boot_test"]["passed"]) == ("warning", False)
    boot_tests.write(folder, replace(failed, passed=True, reason=""), b"")
    found = host.status()["vm1"]
    assert (found["health"], found["boot_test"]["passed"]) == ("ok", True)


def test_names_that_are_too_long_for_a_directory(host: Host) -> None:
    name = "ü" * 90
    host.save(name, NOW)
    assert list(host.status()) == [name]


def test_a_run_in_progress(host: Host) -> None:
    host.libvirt("vm1")
    host.save("vm1", NOW)
    folder = host.root / "run" / uuid_of("vm1")
    folder.mkdir(parents=True)
    with durable.Lock(folder / "lock", owner="backup of vm1"):
        found = host.status()["vm1"]
        assert found["busy"] == f"process {os.getpid()} (backup of vm1)"
        assert "vm1: in progress, process" in host.run("status")[1]
    assert host.status()["vm1"]["busy"] == ""


def test_an_unknown_name(host: Host) -> None:
    host.libvirt("vm1")
    code, out = host.run("status", "--json", "wm1")
    assert code == 20
    assert "did you mean vm1?" in json.loads(out)["error"]["message"]


def test_metrics_of_the_host(host: Host) -> None:
    host.libvirt("vm1", "vm2")
    host.systemd(timer("vm1"))
    host.file("a", "match: {name: vm1}")
    assert host.run("status", "--metrics")[0] == 10
    host.main(f"monitoring: {{metrics_directory: {host.root}}}")
    assert host.run("status", "--metrics", "vm1")[0] == 2
    assert host.run("status", "--nagios", "--metrics")[0] == 1
    text = (host.root / "nbdbackup.prom").read_text()
    assert "\nnbdbackup_domains 2\n" in text
    assert "\nnbdbackup_unprotected_domains 1\n" in text


def test_l3_metrics_follow_the_inventory(host: Host) -> None:
    """L-3: files of domains that are gone stayed for ever."""
    host.libvirt("vm1")
    host.systemd(timer("vm2"))
    host.file("a", "match: {name: vm3}")
    host.main(f"monitoring: {{metrics_directory: {host.root}}}")
    for name in ("vm1", "vm2", "vm3", "gone", "boot_vm1"):
        facts = metrics.RunFacts(domain=name, ended=NOW, seconds=1, exit_status=0, succeeded=True)
        metrics.record(host.root, facts)
    others = [host.root / name for name in ("other-nbdbackup-x.prom", "nbdbackup.prom")]
    for path in others:
        path.touch()
    uri, host.uri = host.uri, "test:///nonexistent"
    host.run("status", "--metrics")
    # nobody knows which are gone
    assert metrics.domain_file(host.root, "gone").exists()
    host.uri = uri
    host.run("status", "--metrics")
    assert {path.name for path in host.root.glob("*.prom")} == {
        "nbdbackup_repositories.prom",
        *(path.name for path in others),
        *(metrics.domain_file(host.root, name).name for name in ("vm1", "vm2", "vm3")),
    }


# -- timers


def test_timers(host: Host) -> None:
    verify = {**timer("vm1", "nbdbackup-verify"), "next": None, "last": 0}
    running = service("r", active="activating").replace(str(int(NOW.timestamp()) - 7105), "")
    host.systemd(
        verify, timer(HOSTILE), timer("vm2"), timer("w"), timer("r"), timer("new"),
        services=service(HOSTILE) + running
        + service("vm2", active="failed", result="exit-code", status=20)
        + service("w", active="failed", result="exit-code", status=3),
    )  # fmt: skip
    code, out = host.run("timers", "--json")
    assert code == 0
    entries = json.loads(out)["timers"]
    assert [each["domain"] for each in entries] == [HOSTILE, "new", "r", "vm2", "w", "vm1"]
    assert [each["result"] for each in entries] == [
        "done", "-", "running", "failed (exit status 20)", "warning (exit status 3)", "-",
    ]  # fmt: skip
    assert entries[0]["next"] == "2026-02-10T13:00:00Z"
    assert entries[0]["ended"] == "2026-02-10T10:01:35Z"
    assert (entries[5]["next"], entries[5]["last"]) == ("", "")
    assert [each["running"] for each in entries] == [False, False, True, False, False, False]
    code, out = host.run("timers")
    lines = out.splitlines()
    assert lines[0].split() == ["DOMAIN", "WHAT", "NEXT", "LAST", "TOOK", "RESULT"]
    assert lines[1].split()[-4:] == ["10:00:00", "UTC", "1:35", "done"]
    assert lines[6].split() == ["vm1", "verify", "-", "-", "-", "-"]
    code, out = host.run("timers", "--json", "vm2")
    assert [each["domain"] for each in json.loads(out)["timers"]] == ["vm2"]


def test_the_row_of_a_timer_is_about_one_run(host: Host) -> None:
    """F6: beside the timer's last time stood how long a later run by hand took."""
    never = {**timer("vm2"), "last": 0}
    host.systemd(timer("vm1"), never, services=service("vm1", ago=600) + service("vm2"))
    first, second = host.run("timers")[1].splitlines()[1:]
    assert first.endswith(" 11:50:00 UTC  1:35  done")
    assert second.endswith(" 10:00:00 UTC  1:35  done")
    entries = json.loads(host.run("timers", "--json")[1])["timers"]
    assert [each["last"] for each in entries] == ["2026-02-10T10:00:00Z", ""]


def test_no_timers(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "RUNNER", host.config)
    code, out = host.run("timers")
    assert code == 0
    assert "systemctl enable --now" in out


def test_timers_without_systemd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "BOOTED", Path("/nonexistent"))
    code, out = host.run("timers", "--json")
    assert code == 10
    assert "systemd does not run this host" in json.loads(out)["error"]["message"]


def test_an_answer_that_is_not_understood(host: Host) -> None:
    for text in ("{", "[1]", '[{"next": 1}]', "3"):
        (host.root / "timers.json").write_text(text)
        code, out = host.run("timers", "--json")
        assert (code, json.loads(out)["error"]["kind"]) == (30, "ProcessError")


# -- tables


def test_colours_only_on_a_terminal() -> None:
    first, second = os.openpty()
    with open(second, "w") as terminal, open(first, "rb"), open(os.devnull, "w") as null:  # noqa: PTH123
        wants = tables.wants_colour
        assert wants(terminal, {})
        assert not wants(terminal, {"NO_COLOR": "1"})
        assert not wants(terminal, {"TERM": "dumb"})
        assert not wants(null, {})
    rows = [("A", "HEALTH"), ("b\x1b[0m", "ok"), ("c", "critical")]
    assert tables.render(rows) == ["A         HEALTH", r"b\x1b[0m  ok", "c         critical"]
    assert tables.render(rows, coloured=True)[1].endswith("\x1b[32mok\x1b[0m")


def test_a_repository_of_two_hosts(host: Host) -> None:
    """H-6: each host shows its own domain's points, and tells the other one from it."""
    host.libvirt("web")
    host.file("a", "match: {name: web}")
    host.systemd(timer("web"))
    other = "aaaaaaaa-2222-4333-8444-555555555555"
    host.save("web", NOW - timedelta(days=9), uuid=other)
    assert host.status()["web"]["reasons"] == ["no restore point yet"]
    mine = f"web@{uuid_of('web')[:8]}"
    host.save("web", NOW - timedelta(hours=1), into=mine)
    found = host.status()
    assert set(found) == {"web", "web@aaaaaaaa"}
    assert found["web"]["set"].startswith(str(host.repository / mine))
    assert found["web@aaaaaaaa"]["set"].startswith(str(host.repository / "web"))
    assert list(host.status("web")) == ["web"]
    # what an older version has put into one directory
    host.save("web", NOW - timedelta(minutes=30), set_name="2026-02.2")
    found = host.status()
    assert found["web"]["age"] == 1800
    assert found["web@aaaaaaaa"]["age"] == 9 * 86400
    # nobody says which one is meant
    host.libvirt("db")
    code, out = host.run("status", "--json", "web")
    assert code == 2
    assert f"give web or {mine}" in json.loads(out)["error"]["message"]


def test_a_guest_that_was_thawed_late_is_not_called_frozen(host: Host) -> None:
    """What a point's warning feared is told only as long as the marker of the held guest is there.

    Of a guest that libvirt here does not know nothing is known.
    """
    host.libvirt("vm1")
    host.save("vm1", NOW, warning=f"{MAY_BE_FROZEN}: no answer; it is thawed")
    held = rundir.make_domain_dir(host.root / "run", uuid_of("vm1")) / rundir.HELD
    held.write_text("frozen r1")
    assert any(MAY_BE_FROZEN in each for each in host.status()["vm1"]["reasons"])
    held.unlink()
    found = host.status()["vm1"]
    assert found["health"] == "warning"
    assert not any("FROZEN" in each for each in found["reasons"])
    assert any("the guest is held no more" in each for each in found["reasons"])
    host.libvirt()
    assert any(MAY_BE_FROZEN in each for each in host.status()["vm1"]["reasons"])


def test_what_a_prune_would_remove_is_told(host: Host) -> None:
    for day in (6, 7, 8, 9):
        host.save("vm1", NOW.replace(day=day))
    host.libvirt("vm1")
    assert host.status("vm1")["vm1"]["unwanted_points"] == 0
    host.main("retention: {last: 2}\n")
    found = host.status("vm1")["vm1"]
    # what they hold becomes a part of the next point
    assert (found["unwanted_points"], found["unwanted_bytes"]) == (2, 0)
    assert "vm1: 2 points are wanted by no rule of retention" in host.run("status", "vm1")[1]
