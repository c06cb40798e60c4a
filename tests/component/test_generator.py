"""Timers made from the configuration, judged by systemd's own programs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbackupd.app import generator
from nbdbackupd.config import schema, timers
from nbdbackupd.errors import ConfigError, ProcessError
from nbdbackupd.model import throwaway, unitname
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

HOSTILE = (
    "vm1", "a b", ".hidden", "-dash", "a/b", "100%", "$HOME", "ü€😀", "a\nb", "back\\slash",
    "\\x2d", "quote'\"", "a@b", "a.timer", "..", "@", "%i", "a:b_c", "#x", "trailing.",
)  # fmt: skip


def systemd_escape(*names: str) -> list[str]:
    # it puts blanks between what several arguments give, and escapes all of these
    done = subprocess.run(
        ["systemd-escape", "--", *names], capture_output=True, text=True, check=True
    )
    return done.stdout.removesuffix("\n").split(" ")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_escaped_as_systemd_does(name: str) -> None:
    assert [unitname.escape(name)] == systemd_escape(name)
    assert unitname.unescape(unitname.escape(name)) == name
    assert unitname.domain_of(unitname.unit("nbdbackup", name, "service")) == name
    assert unitname.domain_of(unitname.unit("nbdbackup-offline", name, "service")) == name


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1), min_size=1))
def test_any_name(names: list[str]) -> None:
    names = [name.encode(errors="replace").decode() for name in names]
    mine = [unitname.escape(name) for name in names]
    assert mine == systemd_escape(*names)
    assert [unitname.unescape(each) for each in mine] == names


def test_names_that_are_no_utf8() -> None:
    name = b"a\xff\xfe".decode(errors="surrogateescape")
    assert [unitname.escape(name)] == systemd_escape(name) == [r"a\xff\xfe"]
    assert unitname.unescape(r"a\xff\xfe") == name


@pytest.mark.parametrize(
    "unit", ["nbdbackup.slice", "nbdbackup-pending.service", "other@vm1.service", "x", "", "@.x"]
)
def test_units_that_are_for_no_domain(unit: str) -> None:
    assert unitname.domain_of(unit) == ""


class Host:
    """A configuration, the administrator's links, and the generator's directory."""

    def __init__(self, root: Path) -> None:
        self.config = root / "config"
        self.units = root / "units"
        self.output = root / "normal"
        self.definitions = root / "qemu"
        self.told: list[str] = []
        (self.config / "domains.d").mkdir(parents=True)
        self.output.mkdir()

    def main(self, text: str) -> None:
        (self.config / "nbdbackup.yaml").write_text(text)

    def file(self, name: str, text: str) -> None:
        (self.config / f"domains.d/{name}.yaml").write_text(text)

    def enable(self, name: str, template: str = "nbdbackup") -> None:
        folder = self.units / "timers.target.wants"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / unitname.unit(template, name, "timer")
        link.symlink_to(f"/usr/lib/systemd/system/{template}@.timer")

    def run(self) -> tuple[str, ...]:
        return generator.generate(
            self.output, config=self.config, units=self.units, definitions=self.definitions,
            tell=self.told.append,
        )  # fmt: skip

    def files(self) -> dict[str, list[str]]:
        """The settings of each drop-in, by unit."""
        return {
            path.parent.name.removesuffix(".d"): path.read_text().splitlines()[1:]
            for path in sorted(self.output.glob("*.d/*.conf"))
        }

    def links(self) -> list[str]:
        return sorted(path.name for path in self.output.glob("timers.target.wants/*"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_nothing_is_said(host: Host) -> None:
    host.enable("vm1")
    assert host.run() == ("vm1",)
    assert (host.files(), host.links(), host.told) == ({}, [], [])


def test_each_schedule_reaches_its_timers(host: Host) -> None:
    host.main("schedule: {calendar: '*-*-* 03:00', random_delay: 0}")
    host.file("a", "match: {name: [vm1, 'a b/c']}\nschedule: {calendar: [daily, 'Mon 7:00'], "
              "enable: yes}")  # fmt: skip
    host.file("b", "match: {glob: 'web-*'}\nschedule: {random_delay: 1h30m}")
    host.file("c", "match: {name: off}\nschedule: {calendar: [], enable: yes}")
    host.enable("web-1")
    host.enable("other")
    assert host.run() == ("vm1", "a b/c", "off", "other", "web-1")
    first = ["[Timer]", "OnCalendar=", "OnCalendar=daily", "OnCalendar=Mon 7:00", "[Timer]"]
    common = ["[Timer]", "OnCalendar=", "OnCalendar=*-*-* 03:00", "[Timer]"]
    assert host.files() == {
        "nbdbackup@.timer": [*common, "RandomizedDelaySec=0.000s"],
        "nbdbackup@vm1.timer": [*first, "RandomizedDelaySec=0.000s"],
        r"nbdbackup@a\x20b-c.timer": [*first, "RandomizedDelaySec=0.000s"],
        r"nbdbackup@web\x2d1.timer": [*common, "RandomizedDelaySec=5400.000s"],
        "nbdbackup@other.timer": [*common, "RandomizedDelaySec=0.000s"],
        "nbdbackup@off.timer": [
            "[Timer]", "OnCalendar=", f"OnCalendar={generator.NEVER}", "[Timer]",
            "RandomizedDelaySec=0.000s",
        ],
    }  # fmt: skip
    assert host.links() == [r"nbdbackup@a\x20b-c.timer", "nbdbackup@vm1.timer"]
    assert host.told == []


def test_one_bad_file_does_not_harm_the_others(host: Host) -> None:
    host.file("a", "match: {name: vm1}\nschedule: {calendar: weekly, enable: yes}")
    host.file("b", "match: {name: vm2\nschedule: [")
    host.file("c", "match: {name: vm3, regex: '('}\nschedule: {calendar: yearly, enable: yes}")
    host.file("d", "schedule: {calendar: yearly, enable: yes}")
    host.file("e", "match: {name: vm4}\ncompresion: 2\nschedule: {calendar: [monthly, noon], "
              "enable: yes}")  # fmt: skip
    host.file("f", "match: {name: vm4, metadata: {x: y}}\nschedule: {calendar: minutely}")
    (host.config / "domains.d/g.yaml").symlink_to("/nonexistent")
    assert host.run() == ("vm1", "vm4")
    assert host.files() == {"nbdbackup@vm1.timer": ["[Timer]", "OnCalendar=", "OnCalendar=weekly"]}
    assert host.links() == ["nbdbackup@vm1.timer", "nbdbackup@vm4.timer"]
    said = "\n".join(host.told)
    for letter in "bcdeg":
        assert f"domains.d/{letter}.yaml" in said
    assert "domains.d/a.yaml" not in said


def test_events_that_only_systemd_knows_to_be_wrong(host: Host) -> None:
    host.file("a", "match: {name: vm1}\nschedule: {calendar: '2026-13-45 99:00', enable: yes}")
    host.run()
    assert (host.files(), host.links()) == ({}, ["nbdbackup@vm1.timer"])
    assert "not a calendar event" in host.told[0]


def test_a_name_that_is_too_long(host: Host) -> None:
    fits, long = "a" * (255 - len("nbdbackup@.timer.d")), "ü" * 60
    host.file("a", f"match: {{name: ['{fits}', '{long}']}}\nschedule: {{enable: yes}}\n")
    assert host.run() == (fits,)
    assert host.links() == [f"nbdbackup@{fits}.timer"]
    assert "too long" in host.told[0]


def test_a_directory_that_cannot_be_written(host: Host) -> None:
    host.main("schedule: {calendar: daily}")
    host.file("a", "match: {name: vm1}\nschedule: {enable: yes}")
    shutil.rmtree(host.output)
    assert host.run() == ()
    assert len(host.told) == 2


# -- as systemd takes it


def test_systemd_takes_what_was_made(host: Host) -> None:
    # a colon has a meaning for systemd-analyze itself, and YAML keeps no line break
    names = [name for name in HOSTILE if "\n" not in name and ":" not in name]
    quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
    host.file("a", f"match: {{name: [{quoted}]}}\nschedule: {{calendar: ['Mon..Fri 22:30 UTC', "
              "'Sat 06:00'], random_delay: 90, enable: yes}")  # fmt: skip
    host.file("b", "match: {name: never}\nschedule: {calendar: []}")
    assert host.run() == (*names, "never")
    assert host.told == []
    for unit in ("nbdbackup@.timer", "nbdbackup@.service", "nbdbackup.slice"):
        shutil.copy(TOP / "units" / unit, host.output / unit)
    timers = [unitname.unit("nbdbackup", name, "timer") for name in (*names, "never")]
    for timer in timers:
        (host.output / timer).symlink_to("nbdbackup@.timer")
    path = {**os.environ, "SYSTEMD_UNIT_PATH": f"{host.output}:"}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(host.output / timer for timer in timers)],
        capture_output=True, text=True, check=False, env=path, timeout=60,
    )  # fmt: skip
    about_programs = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert not [line for line in about_programs if "Unit file" not in line], done.stderr
    # and it does read the drop-ins
    conf = host.output / r"nbdbackup@a\x20b.timer.d/50-schedule.conf"
    conf.write_text(conf.read_text().replace("RandomizedDelaySec=", "RandomisedDelaySec="))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", host.output / r"nbdbackup@a\x20b.timer"],
        capture_output=True, text=True, check=False, env=path, timeout=60,
    )  # fmt: skip
    assert "RandomisedDelaySec" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["{output}", "{output}", "{output}"], ["/nonexistent/x"]]
)
def test_the_program_never_fails(tmp_path: Path, arguments: list[str]) -> None:
    program = tmp_path / "nbdbackup-generator"
    text = (TOP / "packaging/common/nbdbackup-generator.in").read_text()
    program.write_text(text.replace("@libdir@", str(TOP)))
    done = subprocess.run(
        ["/usr/bin/python3", "-IB", program, *(a.format(output=tmp_path) for a in arguments)],
        capture_output=True, text=True, check=False, env={}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert ("no directory given" in done.stderr) == (not arguments)


def test_a_fault_of_our_own_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("out\nof order")

    monkeypatch.setattr(generator, "generate", break_down)
    monkeypatch.delenv("SYSTEMD_SCOPE", raising=False)
    assert generator.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    # no boot waits for this one, and its unit tells root
    monkeypatch.setattr(generator, "PAUSE_SECONDS", 0.0)
    assert generator.main(["--refresh"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_happens_in_the_initrd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_IN_INITRD", "1")
    monkeypatch.setattr(generator, "generate", lambda *_, **__: 1 / 0)
    assert generator.main(["/x"]) == 0


def test_libvirt_is_not_loaded(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from nbdbackupd.app import generator;"
        f"generator.generate(Path({str(tmp_path)!r}), config=Path('/nonexistent'), tell=print);"
        "print(*sorted({'libvirt', 'nbd', 'lz4', 'jinja2', 'argparse'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=TOP, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_unit_alone_runs_when_the_configuration_says() -> None:
    """Without any file, what 'config show' says is what the timer does."""
    lines = (TOP / "units/nbdbackup@.timer").read_text().splitlines()
    (calendar,) = schema.BY_PATH[timers.CALENDAR].default
    assert f"OnCalendar={calendar}" in lines
    delay = schema.BY_PATH[timers.RANDOM_DELAY].default
    assert f"RandomizedDelaySec={delay / 60:.0f}min" in lines


XML = """<!-- made by libvirt -->
<domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid>
<metadata><b:backup xmlns:b="urn:nbdbackup:1" tier="{tier}"/></metadata></domain>"""
UUID = "4a64cc71-19c4-2fd0-2323-3050941ea3c3"


def define(host: Host, name: str, uuid: str = UUID, tier: str = "none") -> Path:
    path = host.definitions / f"{name}.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(XML.format(name=name, uuid=uuid, tier=tier))
    return path


def test_a1_domains_that_a_file_fits_get_timers(host: Host) -> None:
    """A-1: a pattern, labels or a UUID choose domains that libvirt has defined."""
    host.main("schedule: {enable: yes}")
    host.file("a", "match: {glob: 'web-*'}\nschedule: {calendar: daily}")
    host.file("b", "match: {metadata: {tier: gold}}\nschedule: {calendar: weekly}")
    host.file("c", f"match: {{name: {UUID}}}\nschedule: {{calendar: hourly}}")
    host.file("d", "match: {regex: 'db.*'}\nschedule: {calendar: monthly, enable: no}")
    other = "00000000-0000-4000-8000-000000000000"
    for name, uuid, tier in (
        ("web-1", other, "none"), ("shop", other, "gold"), ("by-uuid", UUID, "none"),
        ("db1", other, "none"), ("nobody", other, "none"),
    ):  # fmt: skip
        define(host, name, uuid, tier)
    # L-2: one of ours that somebody has defined
    text = define(host, "web-ours").read_text()
    (host.definitions / "web-ours.xml").write_text(text.replace("b:backup", f"b:{throwaway.NAME}"))
    (host.definitions / "web-broken.xml").write_text("<domain>")
    (host.definitions / "web-away.xml").symlink_to("/nonexistent")
    host.run()
    assert host.links() == [
        r"nbdbackup@by\x2duuid.timer", "nbdbackup@shop.timer", r"nbdbackup@web\x2d1.timer",
    ]  # fmt: skip
    events = {unit: lines[-1] for unit, lines in host.files().items()}
    assert events == {
        r"nbdbackup@by\x2duuid.timer": "OnCalendar=hourly",
        "nbdbackup@shop.timer": "OnCalendar=weekly",
        r"nbdbackup@web\x2d1.timer": "OnCalendar=daily",
        "nbdbackup@db1.timer": "OnCalendar=monthly",
    }
    assert host.told == []


def test_a1_a_timer_by_uuid_is_one(host: Host) -> None:
    host.file("a", "match: {glob: '*'}\nschedule: {enable: yes}")
    define(host, "vm1")
    host.enable(UUID)
    host.run()
    assert host.links() == []


SYSTEMCTL = """\
#!/usr/bin/python3
import json, pathlib, sys
words = [each for each in sys.argv[1:] if not each.startswith("--")]
file = pathlib.Path({state!r})
state = json.loads(file.read_text())
if words[0] == "show":
    units = state["active"] if "*" in words[1] else words[1:]
    for each in units:
        load = "masked" if each in state["masked"] else "loaded"
        active = "active" if each in state["active"] else "inactive"
        by = "timers.target" if each in state["wanted"] else ""
        print(f"Id={{each}}\\nLoadState={{load}}\\nActiveState={{active}}\\nWantedBy={{by}}\\n")
else:
    state["calls"].append(" ".join(words))
    if words[0] == "start":
        state["active"] += words[1:]
    if words[0] == "stop":
        state["active"] = [each for each in state["active"] if each not in words[1:]]
    file.write_text(json.dumps(state))
"""


class Systemd:
    """A systemctl that knows which timers are active, and notes what it is to do.

    ``wanted`` are those that other units want.
    """

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = host
        self.state = host.config / "state.json"
        self.program = host.config / "bin/systemctl"
        self.program.parent.mkdir()
        self.program.write_text(SYSTEMCTL.format(state=str(self.state)))
        self.program.chmod(0o755)
        self.set(active=[], masked=[], wanted=[], calls=[])
        monkeypatch.setenv("PATH", f"{self.program.parent}:{os.environ['PATH']}")

    def set(self, **values: list[str]) -> None:
        known = json.loads(self.state.read_text()) if self.state.exists() else {}
        self.state.write_text(json.dumps(known | values))

    def reload(self) -> None:
        """What a daemon-reload does: run the generator."""
        shutil.rmtree(self.host.output)
        self.host.output.mkdir()
        self.host.run()

    def refresh(self, *, is_sound: bool = True) -> list[str]:
        """What systemctl was asked to do; with an error in a file that is no success."""
        self.set(calls=[])
        host = self.host
        done = generator.refresh(
            generated=host.output, config=host.config, units=host.units,
            definitions=host.definitions, tell=host.told.append,
        )  # fmt: skip
        assert done == (0 if is_sound else ConfigError.exit_code)
        self.reload()
        return list(json.loads(self.state.read_text())["calls"])


def test_a_timer_that_a_reload_made_known_begins(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: after a daemon-reload 'systemctl start nbdbackup-timers' did nothing."""
    systemd = Systemd(host, monkeypatch)
    host.file("a", "match: {name: [vm1, vm2]}\nschedule: {enable: yes}")
    systemd.reload()
    systemd.set(active=["nbdbackup@vm2.timer"])
    assert systemd.refresh() == ["start nbdbackup@vm1.timer"]
    assert systemd.refresh() == []
    # what the administrator has masked stays as it is, and is no failure
    systemd.set(active=[], masked=["nbdbackup@vm2.timer"])
    assert systemd.refresh() == ["start nbdbackup@vm1.timer"]
    assert host.told == []


def test_a_timer_that_no_file_wants_any_more_ends(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a daemon-reload by hand, which had taken its link away and left it active."""
    systemd = Systemd(host, monkeypatch)
    names = [f"nbdbackup@vm{number}.timer" for number in range(1, 7)]
    host.file("a", "match: {name: [vm1, vm2, vm3, vm4]}\nschedule: {enable: yes}")
    systemd.reload()
    systemd.set(active=names, masked=[names[1]], wanted=[names[4]])
    host.enable("vm3")
    assert systemd.refresh() == ["stop nbdbackup@vm6.timer"]
    host.file("a", "match: {name: [vm1, vm2, vm3, vm4]}\nschedule: {enable: [}")
    systemd.reload()
    assert systemd.refresh(is_sound=False) == []
    host.file("a", "match: {name: [vm1, vm2, vm3, vm4]}\nschedule: {enable: no}")
    systemd.reload()
    # that of vm2 is masked, that of vm3 enabled, and another unit wants that of vm5
    assert systemd.refresh() == ["stop nbdbackup@vm1.timer nbdbackup@vm4.timer"]
    assert systemd.refresh() == []


def test_rules_of_retention_begin_a_timer_too(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd(host, monkeypatch)
    host.main("retention: {daily: 7}\nschedule: {enable: yes}")
    host.file("a", "match: {name: vm1}")
    host.file("b", "match: {name: vm2}\nretention: {prune: never}")
    host.file("c", "match: {name: vm3}\nretention: {daily: 0, minimum: 3}")
    host.file("d", "match: {name: vm4}\nretention: {prune: run}")
    host.file("e", "match: {name: vm5}\nschedule: {enable: no}")
    host.file("f", "match: {name: vm6}\nretention: {daily: 0, within: 2d}")
    pruned = ["nbdbackup-prune@vm1.timer", "nbdbackup-prune@vm6.timer"]
    systemd.reload()
    assert [each for each in host.links() if "prune" in each] == pruned
    link = host.output / f"timers.target.wants/{pruned[0]}"
    assert str(link.readlink()) == "/usr/lib/systemd/system/nbdbackup-prune@.timer"
    (start,) = systemd.refresh()
    assert start.startswith(f"start {' '.join(pruned)} nbdbackup@vm1.timer ")
    # one that the administrator has enabled is not ended with the rules
    host.enable("vm6", "nbdbackup-prune")
    host.main("schedule: {enable: yes}")
    host.file("f", "match: {name: vm6}")
    assert systemd.refresh() == ["daemon-reload", f"stop {pruned[0]}"]
    assert host.told == []


def test_a1_domains_come_and_go(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nbdbackup-timers.path has done when libvirt's directory has changed."""
    systemd = Systemd(host, monkeypatch)
    refresh = systemd.refresh
    host.file("a", "match: {glob: 'web*'}\nschedule: {enable: yes}")
    assert refresh() == []
    define(host, "web1")
    define(host, "other")
    assert refresh() == ["daemon-reload", "start nbdbackup@web1.timer"]
    assert refresh() == []
    define(host, "web2")
    (host.definitions / "web1.xml").unlink()
    assert refresh() == [
        "daemon-reload", "start nbdbackup@web2.timer", "stop nbdbackup@web1.timer",
    ]  # fmt: skip
    # what the administrator has enabled is his
    host.enable("web2")
    (host.definitions / "web2.xml").unlink()
    assert refresh() == ["daemon-reload"]
    # a file in the making takes nobody's timer away
    define(host, "web3")
    refresh()
    host.file("a", "match: {glob: 'web*'\nschedule: {")
    assert refresh(is_sound=False) == ["daemon-reload"]
    assert "a.yaml" in host.told[-1]
    systemd.program.write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    host.file("a", "match: {glob: 'web*'}\nschedule: {enable: yes}")
    failed = generator.refresh(
        generated=host.output, config=host.config, units=host.units,
        definitions=host.definitions, tell=host.told.append,
    )  # fmt: skip
    assert failed == ProcessError.exit_code
    assert "no bus" in host.told[-1]
