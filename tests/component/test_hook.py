"""The hook as a program: what it starts, what it leaves, and that nothing holds libvirt up."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from nbdbackupd import events
from nbdbackupd.model import throwaway
from nbdbackupd.repo import runs
from nbdbackupd.source import kept, lease
from nbdbackupd.source.hosts import Host as OtherHost
from nbdbackupd.source.hosts import Hosts
from nbdbackupd.virt.domain import Ending
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

HOOK = TOP / "hooks" / "qemu"
ENTRY = TOP / "hooks" / "qemu.d" / "nbdbackup"
CATCH_UP = TOP / "hooks" / "catch-up"
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
QUOTES = {"'": "&apos;", '"': "&quot;"}
XML = f"<domain>\n  <name>x</name>\n  <uuid>{UUID}</uuid>\n  <title>t</title>\n</domain>\n"
HOSTILE = (
    "two words", "-dash", "--version", ".dot", "..", "a/b", "50%", "$HOME", "`id`", "it's", '"q"',
    "back\\slash", "new\nline", "tab\there", "ümläut", "日本", "*", "[a]", "a@b:c", "~", "a;id",
    "x\n", " lead", "trail ", "@", "%s%n", "\x7f",
)  # fmt: skip

HUNG = 13.0
"""Seconds: all deadlines together are 4, and a busy machine takes its time for the rest."""
HOSTS_HUNG = 20.0
"""The same with the deadline for what other hosts are told, which is 6."""

FAKE = """#!/bin/sh
# {name}: tells its arguments and descriptors, then does as it is bid
{{
    printf '%s\\0' {name} "$@"
    printf '\\n'
}} >>"$HOOK_TEST/calls"
if [ "$1" = is-system-running ]; then
    cat "$HOOK_TEST/running"
    exit
fi
ls -l /proc/self/fd >>"$HOOK_TEST/descriptors"
[ "$1" != --journald ] || cat >>"$HOOK_TEST/journal"
[ ! -e "$HOOK_TEST/{name}.does" ] || . "$HOOK_TEST/{name}.does"
"""


@dataclass(frozen=True)
class Host:
    """Directories of a host that has the hook, with stand-ins for what it would start."""

    top: Path
    shell: str = "dash"

    @property
    def runtime(self) -> Path:
        return self.top / "run"

    @property
    def pending(self) -> Path:
        return self.top / "state" / "pending"

    def environment(self) -> dict[str, str]:
        """What libvirt gives, and where this host is."""
        return {
            "LC_ALL": "C",
            "PATH": f"{self.top}/bin:{os.environ['PATH']}",
            "HOME": "/",
            "HOOK_TEST": str(self.top),
            "NBDBACKUP_RUNTIME_DIR": str(self.runtime),
            "NBDBACKUP_STATE_DIR": str(self.top / "state"),
            "NBDBACKUP_HOOK_CONF": str(self.top / "hook.conf"),
            "NBDBACKUP_CONFIG_DIR": str(self.top / "config"),
            "NBDBACKUP_LIBVIRT_ETC": str(self.top / "etc"),
            "NBDBACKUP_LIBVIRT_LOG": str(self.top / "log"),
        }

    def start(self, *words: str, stdin: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.shell, str(HOOK), *words], env=self.environment(), stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        )  # fmt: skip

    def hook(self, *words: str, xml: str | bytes = XML) -> float:
        """Run the hook as libvirt does; it must succeed and say nothing. Return the seconds."""
        begun = time.monotonic()
        process = self.start(*words)
        data = xml.encode() if isinstance(xml, str) else xml
        out, err = process.communicate(data, timeout=60)
        seconds = time.monotonic() - begun
        assert (process.returncode, out, err) == (0, b"", b"")
        return seconds

    def calls(self) -> list[list[str]]:
        """What was started since the last look, but for questions about the host's state."""
        path = self.top / "calls"
        lines = path.read_bytes().split(b"\0\n")[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        words = [[os.fsdecode(word) for word in line.split(b"\0")] for line in lines]
        return [each for each in words if each[1:] != ["is-system-running"]]

    def told(self) -> list[dict[str, str]]:
        """The records that the journal got since the last look."""
        path = self.top / "journal"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        records = [f"MESSAGE_ID={each}" for each in text.split("MESSAGE_ID=")[1:]]
        return [dict(line.split("=", 1) for line in each.splitlines()) for each in records]

    def trouble(self) -> str:
        """The one trouble that the journal was told of since the last look, and no more."""
        (record,) = self.told()
        event = events.HOOK_TROUBLE
        assert record["MESSAGE_ID"] == event.id
        assert record["PRIORITY"] == str(event.priority)
        fields = {f"NBDBACKUP_{name}" for name in (*event.fields, "DOMAIN")}
        assert {name for name in record if name.startswith("NBDBACKUP_")} == fields
        values = {name.removeprefix("NBDBACKUP_"): record[name] for name in fields}
        assert record["MESSAGE"] == event.text.format_map(values)
        return values["REASON"]

    def log(self, name: str, *lines: str) -> None:
        """What libvirt's log of a domain says, one second for each line."""
        path = self.top / "log/qemu" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for line in lines:
                file.write(f"2026-11-21 15:43:01.123+0000: {line}\n")

    def end(self, domain: str) -> kept.End:
        """What the hook noted of the domain's end."""
        found = kept.read(self.runtime, domain)
        assert found is not None
        assert found.end is not None
        return found.end

    def bid(self, name: str, script: str) -> None:
        """What a stand-in does once it has told its arguments."""
        (self.top / f"{name}.does").write_text(script)

    def leave_lease(self) -> Path:
        directory = self.runtime / UUID
        directory.mkdir(parents=True)
        (directory / "lease.json").write_text("{}")
        return directory

    def share(self, state: Path) -> None:
        """Have a configuration that shares the state of one domain with other hosts."""
        directory = self.top / "config" / "domains.d"
        directory.mkdir(parents=True)
        (self.top / "config" / "nbdbackup.yaml").write_text("#checkpoint_directory: /nowhere\n")
        (directory / "x.yaml").write_text(f"match: {{name: x}}\ncheckpoint_directory: {state}\n")

    def use_real_program(self) -> None:
        (self.top / "bin" / "nbdbackupctl").write_text(
            f'#!/bin/sh\ncd {TOP} && exec {sys.executable} -m nbdbackupd "$@"\n'
        )

    def kept(self, domain: str) -> Path:
        name = lease.marker(self.runtime, domain).name.removesuffix(".starting")
        return self.runtime / "xml" / f"{name}.xml"


def make_host(top: Path, shell: str = "dash") -> Host:
    (top / "bin").mkdir()
    (top / "running").write_text("running\n")
    for name in ("systemctl", "nbdbackupctl", "logger"):
        path = top / "bin" / name
        path.write_text(FAKE.format(name=name))
        path.chmod(0o755)
    return Host(top, shell)


@pytest.fixture(params=["dash", "bash"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Host:
    """/bin/sh is dash with Debian, bash with Fedora."""
    return make_host(tmp_path, request.param)


@pytest.fixture
def dash(tmp_path: Path) -> Host:
    return make_host(tmp_path)


def escaped(name: str) -> str:
    return subprocess.run(
        ["systemd-escape", "--", name], check=True, capture_output=True, text=True
    ).stdout.removesuffix("\n")


def queued(unit: str) -> list[list[str]]:
    return [["systemctl", "--no-block", "--no-ask-password", "start", "--", f"{unit}.service"]]


CHECK = queued("nbdbackup-checkpoints@vm1")
SAVE = queued("nbdbackup-offline@vm1")
NOTHING: list[list[str]] = []
REASONS: dict[str, list[list[str]]] = {
    "-": SAVE, "": SAVE, "unknown": SAVE, "shutdown": SAVE, "destroyed": SAVE, "not yet": SAVE,
    "crashed": CHECK, "daemon": CHECK, "from snapshot": CHECK,
    "migrated": NOTHING, "saved": NOTHING, "failed": NOTHING,
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_end_of_a_domain(host: Host, reason: str) -> None:
    host.hook("vm1", "started", "begin", "-")
    assert host.calls() == CHECK
    host.hook("vm1", "stopped", "end", reason)
    assert host.calls() == []
    host.hook("vm1", "release", "end", reason)
    assert host.calls() == REASONS[reason]
    # another host has it now; else only we know a transient one
    assert host.kept("vm1").exists() == (reason != "migrated")
    assert not host.pending.exists()


STARTED = "starting up libvirt version: 9.0.0, package: 4, qemu version: 7.2.22, kernel: 6.1"
LOGGED = {
    "shutdown": SAVE, "destroyed": SAVE, "crashed": CHECK, "migrated": NOTHING, "saved": NOTHING,
    "failed": NOTHING,
}  # fmt: skip


@pytest.mark.parametrize("reason", LOGGED)
def test_libvirt_that_gives_no_reason_has_logged_it(host: Host, reason: str) -> None:
    """Before 10.5."""
    host.log("vm1", STARTED, "shutting down, reason=migrated", STARTED)
    host.hook("vm1", "started", "begin", "-")
    host.calls()
    host.log("vm1", f"shutting down, reason={reason}")
    host.hook("vm1", "release", "end", "-")
    assert host.calls() == LOGGED[reason]
    assert host.kept("vm1").exists() == (reason != "migrated")


def test_a_log_of_an_earlier_end_says_nothing(host: Host) -> None:
    host.log("vm1", STARTED, "shutting down, reason=migrated", STARTED, "qemu: reason=saved")
    host.hook("vm1", "release", "end", "-")
    assert host.calls() == SAVE
    assert host.end(UUID).ending is Ending.UNKNOWN


def test_what_a_guest_has_left_is_noted(host: Host) -> None:
    """Each image of the XML as it is, named as it may be; a next start makes it void."""
    names = ("plain", "two words", 'it\'s <&> "q"', "ümläut", "$HOME `id` \\ *")
    images = [host.top / name for name in names]
    for number, path in enumerate(images):
        path.write_bytes(bytes(number))
    link = host.top / "link"
    link.symlink_to(images[2])
    media, shared = host.top / "cd.iso", host.top / "shared"
    others = [media, shared]
    for path in others:
        path.touch()
    sources = [*(("file", each, "disk") for each in images), ("dev", link, "disk")]
    sources += [("file", media, "cdrom"), ("file", shared, "disk")]
    disks = "".join(
        f"    <disk type='file' device='{device}'>\n      <target dev='vd{number}'/>\n"
        f"      <source {kind}='{escape(str(path), QUOTES)}' index='1'/>\n"
        f"{'      <shareable/>' if path is shared else ''}    </disk>\n"
        for number, (kind, path, device) in enumerate(sources)
    )
    none = "      <source dev='eth0' mode='bridge'/>\n      <source file='/none/such'/>\n"
    devices = f"<devices>\n{disks}{none}</devices></domain>"
    xml = XML.replace(">x<", ">vm1<").replace("</domain>", devices)
    (host.top / "etc/qemu").mkdir(parents=True)
    (host.top / "etc/qemu/vm1.xml").write_text(xml)
    host.hook("vm1", "started", "begin", "-", xml=xml)
    found = kept.read(host.runtime, UUID)
    assert found is not None
    assert found.end is None
    host.hook("vm1", "release", "end", "destroyed", xml=xml)
    end = host.end(UUID)
    assert (end.ending, end.is_persistent) == (Ending.DESTROYED, True)
    expected = {str(path): kept.Identity.of(str(path)) for path in (*images, link, *others)}
    assert end.images == expected
    assert kept.End.parse(end.pack()) == end
    # what differs is told, as it is since
    changes = partial(kept.changed, host.runtime, "vm1", UUID)
    assert changes() == {}
    for path in others:
        path.write_text("others may")
    assert changes() == {}
    images[0].write_text("more")
    os.utime(images[1], ns=(0, 1))
    images[3].unlink()
    images[4].rename(host.top / "away")
    images[4].write_bytes(bytes(4))
    assert changes() == {
        str(images[0]): "was written to", str(images[1]): "was written to",
        str(images[3]): "is gone", str(images[4]): "was replaced",
    }  # fmt: skip
    kept.renew(host.runtime, "vm1", UUID)
    assert changes() == {}
    host.hook("vm1", "started", "begin", "-", xml=xml)
    assert not host.kept("vm1").with_suffix(".end").exists()


@pytest.mark.parametrize("operation", ["started", "reconnect"])
def test_a_domain_runs(host: Host, operation: str) -> None:
    host.hook("vm1", operation, "begin", "-")
    assert host.calls() == CHECK
    kept = host.kept("vm1")
    assert kept.read_text() == XML
    assert kept.stat().st_mode & 0o7777 == 0o600
    assert kept.parent.stat().st_mode & 0o7777 == 0o700
    assert [each.name for each in kept.parent.iterdir()] == ["vm1.xml"]


@pytest.mark.parametrize("operation", ["start", "attach", "", "unheard-of"])
def test_nothing_to_do(host: Host, operation: str) -> None:
    host.hook("vm1", operation, "begin", "-")
    assert host.calls() == []
    assert not host.runtime.exists()


@pytest.mark.parametrize("words", [(), ("vm1",), ("vm1", "prepare"), ("vm1", "release", "end")])
def test_missing_arguments(host: Host, words: Sequence[str]) -> None:
    host.hook(*words)


@pytest.mark.parametrize("operation", ["prepare", "restore", "migrate"])
def test_a_start_is_announced_before_leases_are_looked_for(host: Host, operation: str) -> None:
    host.hook("vm1", operation, "begin", "-")
    marker = lease.marker(host.runtime, "vm1")
    assert host.calls() == []
    os.utime(marker, (1, 1))
    host.leave_lease()
    host.bid("nbdbackupctl", f'cp -p "{marker}" "$HOOK_TEST/seen"; echo run 1 let go')
    host.hook("vm1", operation, "begin", "-")
    assert (host.top / "seen").stat().st_mtime > time.time() - 60
    # it tells the journal by itself
    assert host.calls() == [
        ["nbdbackupctl", "--runtime-dir", str(host.runtime), "yield", "--journal", "--", "vm1"]
    ]


def test_backups_of_others_are_not_worth_a_line(host: Host) -> None:
    host.leave_lease()
    host.bid("nbdbackupctl", "echo no backup has images of domain vm1 open")
    host.hook("vm1", "prepare", "begin", "-")
    assert [each[0] for each in host.calls()] == ["nbdbackupctl"]


def test_a_start_goes_on_if_yield_fails(host: Host) -> None:
    host.leave_lease()
    host.bid("nbdbackupctl", "echo images are still open >&2; exit 75")
    host.hook("vm1", "prepare", "begin", "-")
    assert "may fail: yield ended with 75: images are still open" in host.trouble()


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ("yield_seconds=1\n", 1),
        ("yield_seconds = 2 \n", 2),
        (
            "# c\nyield_seconds=2\nyield_seconds=0\nyield_seconds=1x\nyield_seconds=$(id)\nrubbish",
            2,
        ),
    ],
)
def test_a_start_is_held_up_only_so_long(dash: Host, settings: str, seconds: int) -> None:
    (dash.top / "hook.conf").write_text(settings)
    dash.leave_lease()
    # also one that does not care for SIGTERM
    dash.bid("nbdbackupctl", "trap '' TERM; sleep 1; sleep 1; sleep 1; sleep 30")
    took = dash.hook("vm1", "prepare", "begin", "-")
    # less than the 10 that count where nothing is set
    assert seconds <= took < seconds + 7
    # 124 after SIGTERM, 137 after SIGKILL
    assert "yield ended with 1" in dash.trouble()


def test_real_yield_ends_a_real_reader(dash: Host) -> None:
    directory = dash.leave_lease()
    dash.use_real_program()
    with (directory / "images").open("w") as images:
        fcntl.flock(images, fcntl.LOCK_SH)
        reader = subprocess.Popen(["sleep", "60"], pass_fds=[images.fileno()])
    server = lease.ProcessId.of(reader.pid)
    assert server is not None
    with reader:
        try:
            (directory / "lease.json").write_text(
                f'{{"version": 1, "domain": "vm1", "uuid": "{UUID}", "run_id": "r", '
                f'"boot": "{server.boot}", "pid": 1, "start": 0, '
                f'"server_pid": {server.pid}, "server_start": {server.start}}}'
            )
            dash.hook("vm1", "prepare", "begin", "-")
            assert reader.wait(timeout=10) == -signal.SIGKILL
        finally:
            reader.kill()
    assert dash.calls() == []


TOLD = {
    "prepare": "-", "restore": "-", "migrate": "-", "started": "-", "reconnect": "-",
    "release": "shutdown",
}  # fmt: skip


@pytest.mark.parametrize("operation", [*TOLD, "start", "stopped"])
def test_hosts_that_share_the_state_are_told(host: Host, operation: str) -> None:
    """H-1, H-7: with the XML, by which alone the program finds out who they are."""
    reason = TOLD.get(operation, "-")
    for shares in (False, True):
        if shares:
            host.share(host.top / "shared")
        host.bid("nbdbackupctl", 'cat >"$HOOK_TEST/stdin"')
        host.hook("x", operation, "begin", reason)
        told = [each for each in host.calls() if each[0] == "nbdbackupctl"]
        if not shares or operation not in TOLD:
            assert told == []
            continue
        directories = ["--runtime-dir", f"{host.runtime}", "--config-dir", f"{host.top}/config"]
        words = ["yield", "--journal", "--hosts", operation, f"--reason={reason}", "--", "x"]
        assert told == [["nbdbackupctl", *directories, *words]]
        assert (host.top / "stdin").read_text() == XML
        assert host.told() == []
        left = [each.name for each in (host.runtime / "xml").iterdir()]
        assert [name for name in left if "part" in name or "hosts" in name] == []


@pytest.mark.parametrize("reason", ["failed", "migrated"])
def test_ends_that_are_none_are_told_to_other_hosts(host: Host, reason: str) -> None:
    host.share(host.top / "shared")
    host.bid("nbdbackupctl", 'cat >"$HOOK_TEST/stdin"')
    host.hook("x", "release", "end", reason)
    assert f"--reason={reason}" in host.calls()[0]
    assert (host.top / "stdin").read_text() == XML


def test_trouble_with_other_hosts_is_told(host: Host) -> None:
    host.share(host.top / "shared")
    host.bid("nbdbackupctl", "cat >/dev/null; echo no such luck; exit 50")
    host.hook("x", "started", "begin", "-")
    assert "(started), and a backup there may still hold its images: yield" in host.trouble()
    assert host.calls()[-1] == queued("nbdbackup-checkpoints@x")[0]


@pytest.mark.slow
def test_a_shared_directory_that_hangs(dash: Host) -> None:
    """H-1: nobody can end who waits there; here the deadline's own program is stopped."""
    dash.share(dash.top / "shared")
    dash.bid("nbdbackupctl", 'echo $$ $PPID >"$HOOK_TEST/pids"; kill -STOP $PPID; sleep 60')
    assert dash.hook("x", "prepare", "begin", "-") < HOSTS_HUNG
    assert "yield ended with nothing" in dash.trouble()
    for pid in (dash.top / "pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


def test_a_life_as_other_hosts_see_it(dash: Host) -> None:
    """H-7: what the hook and the program note, from the first start to the end."""
    shared = dash.top / "shared"
    dash.share(shared)
    dash.use_real_program()
    other = Hosts(shared, "x", UUID, OtherHost("b" * 32, "host-b"))

    def seen() -> list[tuple[str, str]]:
        return [(note.phase.value, note.reason) for note in other.notes()]

    for operation in ("prepare", "start", "started", "reconnect"):
        dash.hook("x", operation, "begin", "-")
        assert seen() == [("starting" if operation in ("prepare", "start") else "running", "")]
    dash.hook("x", "release", "end", "shutdown")
    assert seen() == [("ended", "shutdown")]
    # a start that fails
    dash.hook("x", "prepare", "begin", "-")
    dash.hook("x", "release", "end", "failed")
    assert seen() == [("ended", "shutdown")]
    assert dash.told() == []


@pytest.mark.parametrize("name", HOSTILE)
def test_names(host: Host, name: str) -> None:
    host.hook(name, "prepare", "begin", "-")
    assert lease.marker(host.runtime, name).exists()
    assert len(list((host.runtime / "starting").iterdir())) == 1
    host.hook(name, "started", "begin", "-")
    assert host.kept(name).read_text() == XML
    assert host.calls() == queued(f"nbdbackup-checkpoints@{escaped(name)}")
    (host.top / "running").write_text("stopping\n")
    host.hook(name, "release", "end", "shutdown")
    assert [each.name for each in host.pending.iterdir()] == [escaped(name)]
    host.leave_lease()
    host.hook(name, "prepare", "begin", "-")
    assert host.calls()[0][-2:] == ["--", name]


@pytest.mark.parametrize("name", ["l" * 240, "ö" * 85, "-" * 70])
def test_names_that_are_too_long_for_a_unit(host: Host, name: str) -> None:
    host.hook(name, "prepare", "begin", "-")
    assert lease.marker(host.runtime, name).exists()
    host.hook(name, "release", "end", "-")
    assert host.calls() == queued(f"nbdbackup-offline@{escaped(UUID)}")
    host.hook(name, "release", "end", "-", xml="")
    host.kept(name).unlink()
    host.calls()
    host.hook(name, "release", "end", "-", xml="")
    assert "its name can't be made a unit's" in host.trouble()


@pytest.mark.parametrize("xml", [b"", b"<domain>", XML.encode() * 20000, bytes(3 << 20)])
def test_xml_that_is_not_whole(host: Host, xml: bytes) -> None:
    host.hook("vm1", "started", "begin", "-")
    assert host.calls() == CHECK
    host.hook("vm1", "reconnect", "begin", "-", xml=xml)
    assert host.calls() == CHECK
    assert [each.read_text() for each in host.kept("vm1").parent.iterdir()] == [XML]


def test_closed_and_endless_input(host: Host) -> None:
    subprocess.run(
        [host.shell, "-c", f'{host.shell} "$@" <&-', "-", HOOK, "vm1", "started", "begin", "-"],
        env=host.environment(), check=True,
    )  # fmt: skip
    assert host.calls() == CHECK
    process = host.start("vm1", "started", "begin", "-")
    assert process.wait(timeout=10) == 0
    process.communicate()
    assert host.calls() == CHECK
    assert list(host.kept("vm1").parent.iterdir()) == []


@pytest.mark.parametrize("operation", ["prepare", "started", "release"])
def test_directories_that_can_not_be_written(host: Host, operation: str) -> None:
    for name in ("run", "state"):
        (host.top / name).write_text("in the way\n")
    (host.top / "running").write_text("stopping\n")
    host.hook("vm1", operation, "begin", "shutdown")
    called = [each[0] for each in host.calls()]
    assert called == (["systemctl"] if operation == "started" else ["logger"])


@pytest.mark.parametrize("operation", ["started", "release"])
def test_systemd_hangs(dash: Host, operation: str) -> None:
    dash.bid("systemctl", "trap '' TERM; sleep 60")
    assert dash.hook("vm1", operation, "end", "-") < HUNG
    if operation == "release":
        assert [each.name for each in dash.pending.iterdir()] == ["vm1"]
    else:
        assert "can't start nbdbackup-checkpoints@vm1.service" in dash.trouble()


@pytest.mark.slow
def test_everything_hangs(dash: Host) -> None:
    (dash.top / "hook.conf").write_text("yield_seconds=1\n")
    for name in ("systemctl", "nbdbackupctl", "logger"):
        dash.bid(name, "sleep 60")
    dash.leave_lease()
    assert dash.hook("vm1", "prepare", "begin", "-") < HUNG
    assert dash.hook("vm1", "release", "end", "-") < HUNG


def test_programs_get_no_descriptor_of_libvirt(host: Host) -> None:
    host.leave_lease()
    for operation in ("started", "release", "prepare"):
        host.hook("vm1", operation, "begin", "-")
    told = (host.top / "descriptors").read_text().splitlines()
    targets = {line.partition(" -> ")[2] for line in told if " -> " in line}
    # "ls" lists its own directory; yield's output is read by the hook
    strange = {each for each in targets if not each.startswith(("/dev/null", "/proc/"))}
    assert {each for each in strange if "pipe:" not in each} <= {str(host.top / "descriptors")}
    assert len({each for each in strange if "pipe:" in each}) <= 1


def test_killed_in_the_middle(dash: Host) -> None:
    dash.hook("vm1", "started", "begin", "-")
    process = dash.start("vm1", "reconnect", "begin", "-")
    assert process.stdin is not None
    process.stdin.write(b"<domain>" * 100)
    process.stdin.flush()
    until = time.monotonic() + 20
    while not list((dash.runtime / "xml").glob(".*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert dash.kept("vm1").read_text() == XML
    dash.calls()
    dash.hook("vm1", "release", "end", "-")
    assert dash.calls() == SAVE


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_what_libvirt_calls_reads_the_hook(tmp_path: Path, shell: str) -> None:
    """It does nothing when the package has been removed and not purged."""
    host = Host(tmp_path, shell)
    (tmp_path / "bin").mkdir()
    text = ENTRY.read_text()
    gone = tmp_path / "gone"
    entry = tmp_path / "entry"

    def call(name: str, hook: Path) -> None:
        entry.write_text(text.replace("\nhook=/usr/lib/nbdbackup/hook\n", f"\nhook={hook}\n"))
        words = [shell, str(entry), name, "started", "begin", "-"]
        done = subprocess.run(
            words, env=host.environment(), check=True, input=XML.encode(), capture_output=True
        )
        assert (done.stdout, done.stderr) == (b"", b"")

    call("vm1", gone)
    assert not host.runtime.exists()
    # a start goes on whatever is there
    gone.mkdir()
    call("vm1", gone)
    assert not host.runtime.exists()
    call("vm1", HOOK)
    assert host.kept("vm1").read_text() == XML


@pytest.mark.parametrize(
    ("operation", "most"), [("start", 0.05), ("prepare", 0.05), ("stopped", 0.05), ("started", 0.2)]
)
def test_time(dash: Host, operation: str, most: float) -> None:
    seconds = [dash.hook("vm1", operation, "begin", "-") for _ in range(15)]
    # the quickest: a busy machine makes the others slow
    assert min(seconds) < most
    if operation != "started":
        assert dash.calls() == []


def test_put_off_backups_are_caught_up(dash: Host) -> None:
    (dash.top / "running").write_text("stopping\n")
    for name in ("a b", "c-d", ".e"):
        dash.hook(name, "release", "end", "shutdown")
    assert dash.calls() == []
    notes = sorted(each.name for each in dash.pending.iterdir())
    assert notes == sorted(escaped(each) for each in ("a b", "c-d", ".e"))
    dash.bid("systemctl", "case $5 in *c*d*) exit 1 ;; esac")
    assert subprocess.run([CATCH_UP], env=dash.environment(), check=False).returncode == 1
    assert dash.calls() == [queued(f"nbdbackup-offline@{each}")[0] for each in notes]
    # the unit takes a note away when it has saved: the host may go down again before
    dash.bid("systemctl", "")
    subprocess.run([CATCH_UP], env=dash.environment(), check=True)
    assert dash.calls() == [queued(f"nbdbackup-offline@{each}")[0] for each in notes]
    for instance in notes:
        subprocess.run(removal(dash.pending, instance), check=True)
    assert list(dash.pending.iterdir()) == []
    subprocess.run([CATCH_UP], env=dash.environment(), check=True)
    assert dash.calls() == []


def test_a_note_says_how_the_guest_ended_until_it_runs_again(host: Host) -> None:
    (host.top / "running").write_text("stopping\n")
    note = host.pending / escaped("a-b")
    host.log("a-b", STARTED, "shutting down, reason=shutdown")
    host.hook("a-b", "release", "end", "-")
    assert kept.put_off(note) is Ending.SHUTDOWN
    host.hook("a-b", "release", "end", "destroyed")
    assert kept.put_off(note) is Ending.DESTROYED
    host.hook("other", "started", "begin", "-")
    assert note.exists()
    host.hook("a-b", "started", "begin", "-")
    assert not note.exists()
    assert kept.put_off(note) is Ending.UNKNOWN


def test_what_killed_hooks_have_begun_is_removed(dash: Host) -> None:
    dash.hook("vm1", "started", "begin", "-")
    directory = dash.kept("vm1").parent
    with subprocess.Popen(["sleep", "60"]) as alive:
        try:
            parts = [directory / f".{pid}.part" for pid in (alive.pid, 1 << 23, "x")]
            for part in parts:
                part.touch()
            kept.sweep(dash.runtime)
            assert [part.exists() for part in parts] == [True, False, True]
        finally:
            alive.kill()
    assert dash.kept("vm1").exists()
    kept.sweep(dash.top / "none")


def test_w7_what_the_hosts_end_cut_short_is_begun_again(host: Host) -> None:
    """W-7: after boot, so often as is reasonable; then people are told."""
    begun = host.top / "state/begun"
    begun.mkdir(parents=True)
    host.pending.mkdir()
    (host.pending / "off").touch()
    here = runs.boot_id()
    for name, boot, tries in (
        ("nbdbackup@old.service", "other", 0), (f"nbdbackup@{escaped('a-b c')}.service", "x", 2),
        ("nbdbackup-offline@tired.service", "other", runs.MAX_TRIES),
        ("nbdbackup@living.service", here, 0), ("hand-1", "other", 0),
    ):  # fmt: skip
        run = runs.Begun(ident=name, domain=name, host="h", boot=boot, begun="", tries=tries)
        with runs.Runs(host.top / "state").living(run) as living:
            living.is_unfinished = True
    subprocess.run(
        [host.shell, str(CATCH_UP)], env=host.environment(), check=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert sorted(words[-1] for words in host.calls()) == [
        "nbdbackup-notify@nbdbackup-offline@tired.service.service",
        "nbdbackup-offline@off.service",
        rf"nbdbackup@{escaped('a-b c')}.service",
        "nbdbackup@old.service",
    ]


MARKED = XML.replace(
    "</title>",
    """</title>
  <metadata xmlns:ns0="urn:nbdbackup:throwaway:1">
    <ns0:nbdbackup-throwaway/>
  </metadata>""",
)


def test_l2_of_our_own_domains_nothing_is_saved(host: Host) -> None:
    """L-2: throw-away domains of "boot" and "verify --boot" were backed up, and mailed about."""
    assert throwaway.is_marked(MARKED)
    (host.top / "running").write_text("stopping\n")
    host.hook("boot_vm1", "started", "begin", "-", xml=MARKED)
    host.hook("boot_vm1", "release", "end", "shutdown", xml=MARKED)
    host.hook("boot_vm1", "release", "end", "crashed", xml=MARKED)
    assert host.calls() == []
    assert not host.pending.exists()
    assert list((host.runtime / "xml").iterdir()) == []
    # one that stays, after a live restore, is a domain as others
    stays = MARKED.replace("<ns0:nbdbackup-throwaway/>", "")
    host.hook("boot_vm1", "release", "end", "shutdown", xml=stays)
    assert (host.pending / "boot_vm1").exists()


def removal(pending: Path, instance: str) -> list[str]:
    """What the unit does after a backup; %i is put in as it is (systemd.unit(5))."""
    unit = (TOP / "units/nbdbackup-offline@.service").read_text()
    (line,) = re.findall(r"^ExecStartPost=-:(.*)$", unit, re.MULTILINE)
    words = [word.replace("%i", instance) for word in line.split()]
    assert words[-1] == f"/var/lib/nbdbackup/state/pending/{instance}"
    return [*words[:-1], str(pending / instance)]
