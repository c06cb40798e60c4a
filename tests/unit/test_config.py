"""Configuration files: each error is found, all of them in one run, and no value is guessed."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdbackupd.config import calendar, files, kinds, reading, sample, schema
from nbdbackupd.config.files import Configuration
from nbdbackupd.config.setting import Setting
from nbdbackupd.config.settings import needs_libvirt, settings_for, standalone_names
from nbdbackupd.errors import ConfigError
from nbdbackupd.model.chain import Codec, Compression
from nbdbackupd.units import parse_duration, parse_size
from tests.lib.calendars import BAD_EVENTS, GOOD_EVENTS


def read(directory: Path, main: str | bytes = "", **others: str | bytes) -> Configuration:
    """The configuration of these texts; ``others`` are files of domains.d, by stem."""
    (directory / "domains.d").mkdir(exist_ok=True)
    names = {f"domains.d/{name}.yaml": text for name, text in others.items()}
    for name, text in {"nbdbackup.yaml": main, **names}.items():
        (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return files.read_all(directory)


def problems(directory: Path, main: str | bytes = "", **others: str | bytes) -> list[str]:
    """The problems as they are shown, without the directory."""
    return [
        str(each).replace(f"{directory}/", "") for each in read(directory, main, **others).problems
    ]


ALL_WRONG = """\
repository:
  path: backup
compressions: 2
level:
  rotate: off
  full-every: 7
  max_increments: 3
  max_increments: 4
freeze: require
disks:
  - vda
match: {}
libvirt:
  password: open sesame
full_every: 7d
limits:
  workers: 010
  wait: ~
threshold:
  - 5M
retention: {daily: [1, 2]}
commands:
  pre: "sync 'x"
  post: !!binary abc
  timeout: -3s
schedule: {calendar: [daily, noon, daily]}
"""

ALL_PROBLEMS = """\
domains.d/web.yaml:3: match.globs: unknown key (did you mean 'glob'?)
domains.d/web.yaml:4: match.regex: not a regular expression: 'a(': missing ), unterminated \
subpattern at position 1; fix it
domains.d/web.yaml:6: limits.concurrent_runs: is for all domains; move it to nbdbackup.yaml
nbdbackup.yaml:2: repository.path: not an absolute path: 'backup'; begin with '/'
nbdbackup.yaml:3: compressions: unknown key (did you mean 'compression'?)
nbdbackup.yaml:5: level.rotate: not a valid value: 'off'; use monthly, weekly or never (did you \
mean 'never'?)
nbdbackup.yaml:6: level.full-every: unknown key (did you mean 'full_every'?)
nbdbackup.yaml:8: level.max_increments: stands in line 7 already; remove one of them
nbdbackup.yaml:9: freeze: a section with lines 'key: value' is wanted here
nbdbackup.yaml:11: disks: a section with lines 'key: value' is wanted here
nbdbackup.yaml:12: match: belongs into a file of domains.d
nbdbackup.yaml:14: libvirt.password: secrets don't belong here; use libvirt.password_file or \
libvirt.password_credential
nbdbackup.yaml:15: full_every: unknown key (did you mean 'level.full_every'?)
nbdbackup.yaml:17: limits.workers: a number with a leading zero: '010'; write it without, or 'auto'
nbdbackup.yaml:18: limits.wait: has no value; give one (default: 0s) or remove the line; \
if ~ is the text, put it in quotes
nbdbackup.yaml:20: threshold: a single value is wanted here, not a list
nbdbackup.yaml:21: retention.daily: a single value is wanted here, not a list
nbdbackup.yaml:23: commands.pre: not a command: "sync 'x": no closing quotation; fix the quotes
nbdbackup.yaml:24: commands.post: the tag !!binary is not allowed; remove it
nbdbackup.yaml:25: commands.timeout: not a duration: '-3s' (examples: 30s, 10m, 2h, 1h30m, 7d)
nbdbackup.yaml:26: schedule.calendar: 'daily' stands there twice; remove one
nbdbackup.yaml:26: schedule.calendar: not a calendar event: 'noon' (examples: daily, 'Mon..Fri \
22:30', '*-*-01 02:00'); see systemd.time(7)
"""


def test_all_problems_at_once(tmp_path: Path) -> None:
    web = "match:\n  name: a\n  globs: x\n  regex: 'a('\nlimits:\n  concurrent_runs: 3\n"
    assert problems(tmp_path, ALL_WRONG, web=web) == ALL_PROBLEMS.splitlines()
    found = files.read_all(tmp_path)
    with pytest.raises(ConfigError, match=r"yaml:3: .*\(21 more: 'nbdbackupctl config check'"):
        settings_for("vm", "", {}, found)
    assert "sesame" not in str(found.problems)


def test_secrets_are_not_repeated(tmp_path: Path) -> None:
    text = "password: sesame\nlibvirt: {uri: 'qemu+ssh://me:sesame@host/system', token: sesame}\n"
    found = problems(tmp_path, text)
    assert len(found) == 3
    assert "sesame" not in str(found)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"disks:\n\traw: yes", 2, "a tab"),
        (b"disks:\n  raw: yes\n bad: 1", 3, "indentation"),
        (b"level: {rotate: never", 1, "'{' that is not closed"),
        (b"# x\nthreshold: 'a\n\n\n", 2, "a quote that is not closed"),
        (b"notification:\n  mail: *x", 2, "quotes"),
        (b"threshold: @1", 1, "quotes"),
        (b"threshold: 1M\nstrict", 2, "without ':'"),
        (b"strict: yes\n---\nstrict: no", 2, "more than one document"),
        (b"disks:\n  include: - vda", 2, "begins on a line of its own"),
        (b"# ok\n# \xc3\x28\n", 2, "not UTF-8"),
        ("\ufeffstrict: yes".encode("utf-16-le"), 1, "UTF-16"),
        (b"strict: y\x00es", 1, "control character, U+0000"),
        (b"strict: yes\n# \x1b[31m", 2, "control character, U+001B"),
        (b"[" * 5000, 0, "levels deep"),
        (b"{a: " * 30, 0, "levels deep"),
        (b"#" * (300 << 10), 0, "KiB"),
        (b"just words", 1, "a section with lines"),
        (b"- a\n- b", 1, "a section with lines"),
        (b"? [a, b]\n: c", 1, "plain word"),
        (b"? !!python/name:os.system\n: c", 1, "plain word"),
        (b"!!python/object:os.system {}", 1, "!!python/object:os.system is not allowed"),
        (b"strict: !!bool yes", 1, "!!bool is not allowed"),
        (b"disks: &a\n  include: [*a]", 1, "not a section"),
        (b"<<: x", 1, "can merge sections only"),
        (b"disks: {<<: [x]}", 1, "can merge sections only"),
        (b"disks: &a {<<: *a}", 1, "too many merges"),
        (b"? |\n  x\n  y\n: 1", 1, "unknown key"),
        (b'notification: {mail: "a\\nb"}', 1, "line break"),
        (b"notification: {mail: ''}", 1, "is empty"),
        (b"on: 1", 1, "unknown key"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, text: bytes, line: int, words: str) -> None:
    found = read(tmp_path, text).problems
    assert len(found) == 1, found
    assert found[0].line == line
    assert words in found[0].message
    assert str(found[0]).count("\n") == 0


def test_a_broken_file_hides_no_problem_of_another(tmp_path: Path) -> None:
    found = problems(tmp_path, "a: b: c", x="match: {name: x}\nstrikt: 1", y=b"\xff", z="strict: 1")
    assert [each.partition(": ")[0] for each in found] == [
        "domains.d/x.yaml:2", "domains.d/y.yaml:1", "domains.d/z.yaml:1", "domains.d/z.yaml:1",
        "nbdbackup.yaml:1",
    ]  # fmt: skip


def test_merges_are_bounded(tmp_path: Path) -> None:
    """Each section merges the one before twice: two to the thirtieth, if it were carried out."""
    lines = ["disks: &a0 {raw: yes}"]
    lines += [f"x{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 31)]
    found = problems(tmp_path, "\n".join([*lines, "freeze: *a30"]))
    assert any("too many merges" in each for each in found)


def test_texts_stay_what_they_are(tmp_path: Path) -> None:
    names = ["no", "0755", "1:30", "2026-11-21", "1e3", "~x", "'null'", ".inf", "0x10", "ä"]
    text = f"match:\n  name: [{', '.join(names)}]\nthreshold: 10"
    found = read(tmp_path, "schedule: {calendar: 02:30}\ndisks: {exclude: [on, off]}", names=text)
    for name in names:
        got = settings_for(name.strip("'"), "", {}, found)
        assert got.threshold == 10
        assert got.schedule_calendar == ("02:30",)
        assert got.disks_exclude == ("on", "off")
    assert settings_for("False", "", {}, found).threshold is None


def test_anchors_merges_and_a_mark_of_byte_order(tmp_path: Path) -> None:
    text = """\
commands: &all
  timeout: &t 2m
  pre: &p [/bin/true, "/bin/sh -c 'exit 0'"]
limits: {timeout: *t}
"""
    other = """\
match: {name: vm}
commands: {post: [/bin/a], <<: {post: /bin/b, timeout: 3m}}
"""
    found = read(tmp_path, b"\xef\xbb\xbf" + text.encode(), other=other)
    got = settings_for("vm", "", {}, found)
    assert got.commands_pre == (("/bin/true",), ("/bin/sh", "-c", "exit 0"))
    assert got.commands_post == (("/bin/a",),)
    assert (got.commands_timeout, got.limits_timeout) == (180.0, 120.0)
    assert str(got.origins["limits.timeout"]).endswith("nbdbackup.yaml:4")


def test_contradictions(tmp_path: Path) -> None:
    main = "disks: {include: [vda, vdb]}\nrepository: {path: /b/x, mount_point: /c}\n"
    assert problems(tmp_path, main, a="match: {name: a}\ndisks: {exclude: vdb}") == [
        "domains.d/a.yaml:2: disks.exclude: both included and excluded: vdb; remove it from one "
        "of the lists",
        "nbdbackup.yaml:2: repository.mount_point: the repository /b/x does not lie below /c; "
        "fix one of them",
    ]
    (tmp_path / "domains.d/a.yaml").unlink()
    both = "libvirt:\n  password_credential: a\n  password_file: /a\n"
    freeze = "freeze: {policy: pause, mountpoints: /}"
    found = problems(tmp_path, both + freeze)
    assert [each.partition(": ")[0] for each in found] == ["nbdbackup.yaml:3", "nbdbackup.yaml:4"]
    # what a file for some domains switches off needs no second line there
    assert problems(tmp_path, "freeze: {mountpoints: /}", a="match: {name: a}\nfreeze:\n"
                    "  policy: never") == []  # fmt: skip


def test_files_that_can_not_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "domains.d"
    folder.mkdir()
    (folder / "fifo.yaml").mkdir()
    os.mkfifo(folder / "pipe.yaml")
    (folder / "gone.yaml").symlink_to("/nonexistent")
    (folder / "old.yml").touch()
    (folder / "web.yaml~").write_text("x: [")
    (folder / ".web.yaml.swp").write_text("x: [")
    open_to_all = folder / "open.yaml"
    open_to_all.write_text("match: {name: x}")
    open_to_all.chmod(0o666)
    found = {Path(each.file).name: each.message for each in files.read_all(tmp_path).problems}
    assert set(found) == {"fifo.yaml", "pipe.yaml", "gone.yaml", "old.yml", "open.yaml"}
    assert "chmod o-w" in found["open.yaml"]
    assert "rename" in found["old.yml"]
    assert files.read_all(tmp_path / "nothing") == Configuration()


PIECES = st.sampled_from(
    [*schema.SECTIONS, *(each.key for each in schema.BY_PATH.values()), "match", "name", "metadata",
     ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", "*a", "&a ", "<<", "!!str ", "|", ">", "'", '"',
     "\t", "#", "?", "~", "yes", "7d", "010", "daily", "/a", "%", "\r", "\x85", "\ufeff", "---"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=40), st.booleans())
@example("\x85a: 1", True)
@example("a: 1\r\nb: 2", True)
def test_no_text_breaks_the_reader(text: str, is_main: bool) -> None:
    from nbdbackupd.config.files import Interpreter

    reader = Interpreter(Path("/f"), is_main=is_main)
    with contextlib.suppress(reading.UnreadableError):
        reader.interpret(reading.parse(text))
    for problem in reader.problems:
        assert len(str(problem).splitlines()) == 1


# -- machines without libvirt


def test_a_monitor_belongs_to_one_name(tmp_path: Path) -> None:
    text = "qmp: /run/x/qmp\n"
    assert problems(tmp_path, text) == [
        "nbdbackup.yaml:1: qmp: is for one machine; give match its name"
    ]
    for match in (
        "{name: [a, b]}",
        "{glob: a}",
        "{name: a, glob: '*'}",
        "{name: 6f6a3e2c-8d2b-4a3c-9b1e-7f0a1c2d3e4f}",
    ):
        (said,) = problems(tmp_path, x=f"match: {match}\n{text}")
        assert said.startswith("domains.d/x.yaml:2: qmp: is for one machine")
    (said,) = problems(tmp_path, "on_shutdown: yes\n", x=f"match: {{name: a}}\n{text}")
    assert "a QEMU without libvirt knows no on_shutdown; set on_shutdown: no" in said
    body = f"match: {{name: a}}\n{text}on_shutdown: no\n"
    found = read(tmp_path, "on_shutdown: yes\n", x=body, y="match: {metadata: {a: b}}\nqmp: none\n")
    assert standalone_names(found.require_sound()) == ("a",)
    # what only libvirt could tell does not matter
    assert needs_libvirt("a", found) == ()
    assert len(needs_libvirt("b", found)) == 1
    assert settings_for("a", "", {}, found).monitor == Path("/run/x/qmp")


# -- kinds


@pytest.mark.parametrize("setting", schema.BY_PATH.values(), ids=lambda setting: setting.path)
def test_every_value_survives_being_shown(setting: Setting[Any], tmp_path: Path) -> None:
    shown = [setting.kind.show(setting.default), *([setting.example] if setting.example else [])]
    for text in shown:
        body = f"{setting.section}:\n  {setting.key}" if setting.section else setting.key
        if setting.path == "repository.mount_point":
            body = body.replace(":", ":\n  path: /backup/x", 1)
        found = read(tmp_path, f"{body}: {text}\n")
        if setting.single:
            other = "qmp: /x\n" if setting.path == "agent" else ""
            found = read(tmp_path, x=f"match: {{name: x}}\n{body}: {text}\n{other}")
        found.require_sound()
        got = settings_for("x", "", {}, found)
        assert setting.kind.show(got.get(setting.path)) == text
        assert (got.get(setting.path) == setting.default) == (text == shown[0])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("1.5", 1.5), ("30s", 30), ("2h", 7200), ("1h30m", 5400),
     ("10min", 600), ("1d 2h", 93600), ("2w", 1209600), (" 5 m ", 300)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "5 x", "1h30", "30 sec", "1M", "1e3", "٣", "9" * 30, "1h,2m"]
)
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "T", "9223372036854775808", "1e3", "-1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@given(st.integers(0, 10**8))
def test_durations_and_sizes_survive_being_shown(number: int) -> None:
    for kind in (kinds.DURATION, kinds.SIZE):
        assert kind.parse(kind.render(number)) == number


@given(st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable() and text.strip()))
@example("no")
@example("Null")
@example("~")
@example("it's # a: {text}")
@example("-")
@example("1:30")
def test_quoted_texts_are_texts_to_any_reader(text: str) -> None:
    yaml = pytest.importorskip("yaml")
    try:
        loaded = yaml.safe_load(f"a: {kinds.quoted(text)}")
    except yaml.YAMLError:
        with pytest.raises(reading.UnreadableError):
            reading.parse(f"a: {kinds.quoted(text)}")
    else:
        assert loaded == {"a": text}


# -- calendar events


def test_calendar_events_by_their_form() -> None:
    for event in GOOD_EVENTS:
        assert not calendar.plain_fault(event), event
    for event in BAD_EVENTS:
        assert "systemd.time(7)" in calendar.plain_fault(event), event
    began = time.monotonic()
    for event in ("1," * 2000, "Mon," * 1000, "*-" * 2000, "1:" * 2000, " " * 4000, "1..1" * 1000):
        calendar.plain_fault(f"{event}x")
    assert time.monotonic() - began < 5


def test_check_asks_systemd(tmp_path: Path) -> None:
    text = "schedule:\n  calendar:\n  - daily\n  - Mon 25:00\n"
    assert problems(tmp_path, text) == []
    asked = []

    def fault(event: str) -> str:
        asked.append(event)
        return "is bad" if "25" in event else ""

    (problem,) = files.read_all(tmp_path, event_fault=fault).problems
    assert (problem.line, problem.path, problem.message) == (4, "schedule.calendar", "is bad")
    assert asked == ["daily", "Mon 25:00"]


# -- the sample


def test_sample_is_sound_and_says_the_defaults(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = sample.render()
    assert set(yaml.safe_load(text)) == set(schema.SECTIONS)
    assert read(tmp_path, text).require_sound().files[0].values == {}
    lines = [
        line.replace("#", "", 1)
        if line.lstrip().startswith("#") and not line.lstrip().startswith(("# ", "#  "))
        and line.strip() != "#"
        else line
        for line in text.splitlines()
    ]  # fmt: skip
    loaded = yaml.safe_load("\n".join(lines))
    paths = {
        f"{key}.{name}" if isinstance(value, dict) else key
        for key, value in loaded.items()
        for name in (value if isinstance(value, dict) else [key])
    }
    assert paths == set(schema.BY_PATH)
    got = settings_for("x", "", {}, read(tmp_path, "\n".join(lines)).require_sound())
    for setting in schema.BY_PATH.values():
        assert got.get(setting.path) == setting.default, setting.path
        assert not got.is_default(setting.path)


def test_example_of_the_sample_is_sound(tmp_path: Path) -> None:
    found = read(tmp_path, "", web=sample.EXAMPLE_FILE).require_sound()
    assert settings_for("web-1", "", {}, found).compression == Compression(Codec.LZ4, 2)
    assert settings_for("mail", "", {}, found).compression is None
