"""The pure parts of ``check``: who gets through, what is told, what is coloured."""

import os
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdbackupd.app.verbs import check as verb
from nbdbackupd.model import access
from nbdbackupd.model.access import Account
from nbdbackupd.model.domain import Agent, Domain
from nbdbackupd.model.finding import Area, Finding, Notes, Severity, worst
from nbdbackupd.model.freeze_memory import FreezeMemory
from nbdbackupd.model.plan import DiskState
from nbdbackupd.ops.backup import room
from nbdbackupd.ops.check import check, request, sets
from nbdbackupd.ops.check import domain as check_domain
from nbdbackupd.ops.check.check import CheckReport
from nbdbackupd.ops.domain import accounts, domains, locks
from nbdbackupd.ops.domain.survey import Looked
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.systemd import units
from nbdbackupd.virt import guest

pytestmark = pytest.mark.component

OWNER, GROUP, OTHER = 65001, 65002, 65003


def kernel_allows(directory: Path, uid: int, gid: int) -> bool:
    """Ask the kernel whether this account reaches a name in the directory."""
    line = f"cat {shlex.quote(str(directory / 'file'))}"
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "sh", "-c", line],
        capture_output=True, timeout=20, check=False,
    )  # fmt: skip
    return done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs other accounts")
@pytest.mark.parametrize("mode", [0o711, 0o710, 0o701, 0o611, 0o770, 0o007, 0o000, 0o070])
def test_mode_bits_as_the_kernel_reads_them(tmp_path: Path, mode: int) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o777 == 0o700:  # those that pytest has made
            directory.chmod(0o711)
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").touch()
    (place / "file").chmod(0o644)
    os.chown(place, OWNER, GROUP)
    place.chmod(mode)
    status = place.stat()
    for uid, gid in [(OWNER, GROUP), (OTHER, GROUP), (OWNER, OTHER), (OTHER, OTHER), (0, 0)]:
        who = Account(uid, frozenset({gid}))
        expected = kernel_allows(place, uid, gid)
        owner = (status.st_uid, status.st_gid)
        assert access.allows(status.st_mode, owner, who, access.PASS) == expected, (uid, gid)


def test_ancestors_follow_links(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    found = list(accounts.ancestors(tmp_path / "link" / "deep" / "missing"))
    assert found[0] == Path("/")
    assert found[-3:] == [
        tmp_path / "real",
        tmp_path / "real" / "deep",
        tmp_path / "real" / "deep" / "missing",
    ]


def test_the_gravest_finding_counts() -> None:
    notes = Notes(Area.DISKS)
    assert worst(notes.done()) is Severity.OK
    notes.ok("a")
    notes.fail("b", "fix it")
    notes.warn("c")
    assert worst(notes.done()) is Severity.FAIL
    assert [each.area for each in notes.done()] == [Area.DISKS] * 3
    assert worst([notes.done()[2], notes.done()[0]]) is Severity.WARN


def report(*findings: Finding) -> CheckReport:
    return CheckReport(domain="vm1", uuid="u", state="off", findings=findings)


def test_text_is_folded_and_harmless() -> None:
    path = "/" + "x" * 150
    found = report(
        Finding(Severity.OK, Area.HOST, "fine"),
        Finding(Severity.FAIL, Area.DISKS, f"bad \033[31m {path} " + "word " * 40, "do this"),
    )
    text = verb.render(found, colour=False)
    assert "\033" not in text
    assert path in text
    assert all(len(line) <= verb.WIDTH or path in line for line in text.splitlines())
    lines = text.splitlines()
    assert "  OK    fine" in lines
    assert "        -> do this" in lines
    assert lines[-1].endswith("1 ok, 0 warning(s), 1 failure(s)")
    assert "\033[1;31mFAIL\033[0m" in verb.render(found, colour=True)


def test_rules_of_apparmor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the files are ours here: a kernel without AppArmor loads no profile."""
    local, folder = tmp_path / "local", tmp_path / "folder.d"
    folder.mkdir()
    monkeypatch.setattr(check_domain, "APPARMOR_RULES", (local, folder))
    runtime = Path("/run/nbdbackup")
    assert not check_domain._is_allowed(runtime)
    local.write_text("# /run/nbdbackup/** rw,\n/run/nbdbackup2/** rw,\n")
    assert not check_domain._is_allowed(runtime)
    (folder / "ours").write_text('  "/run/nbdbackup/**" rwk,\n')
    assert check_domain._is_allowed(runtime)


def test_a_path_that_is_to_be_made(tmp_path: Path) -> None:
    assert request.existing(tmp_path / "a" / "b") == tmp_path
    assert request.existing(tmp_path) == tmp_path
    assert locks.holder(tmp_path / "lock") == ""


@pytest.mark.parametrize(
    ("host", "severity", "words"),
    [
        (("a.service libvirtd.service", "active", "libvirtd"), "ok", "shut down with the"),
        (("a.service", "active", "libvirtd"), "warn", "beside libvirtd.service"),
        (("libvirtd.service", "active", "virtqemud"), "warn", "After=virtqemud.service"),
        (("libvirtd.service", "inactive", "libvirtd"), "warn", "systemctl enable --now"),
    ],
)
def test_a2_the_order_at_the_end_of_the_host(
    host: tuple[str, str, str],
    severity: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A-2: where libvirt-guests is stopped beside libvirt, guests are killed."""
    after, active, daemon = host
    program = tmp_path / "systemctl"
    program.write_text(
        f"""#!/bin/sh
case "$*" in
*libvirt-guests.service) printf 'LoadState=loaded\\nActiveState={active}\\nAfter={after}\\n' ;;
*{daemon}.service) echo LoadState=loaded ;;
*) echo LoadState=not-found ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(units, "BOOTED", tmp_path)
    notes = Notes(Area.CONFIGURATION)
    check._end_of_host(notes)
    (found,) = notes.done()
    assert found.severity.value == severity
    assert words in f"{found.text} {found.advice}"


def test_files_that_each_point_copies_need_room(tmp_path: Path) -> None:
    """W-2: a kernel and an initramfs may be larger than what changed on the disks."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(3000))
    domain = Domain(name="vm1", uuid="u", kernel=str(kernel), initrd=f"{tmp_path}/none")
    states = {"vda": DiskState(size=1 << 20), "vdb": DiskState(size=1 << 20)}
    looked = Looked(definition=domain, is_active=True, infos={}, chains={}, states=states)
    assert room.most_bytes(looked, [], {}) == 3000
    assert room.most_bytes(looked, ["vda", "vdb"], {"vda": 512}) == 3000 + 512 + (1 << 20)


@pytest.mark.parametrize("is_proven", [False, True])
def test_who_saves_to_the_root_file_system_can_say_so(*, is_proven: bool) -> None:
    notes = Notes(Area.TARGET)
    sets._place(Path("/"), notes, is_proven=is_proven)
    (found,) = notes.done()
    assert found.severity == (Severity.OK if is_proven else Severity.WARN)
    assert ("repository.mount_point: /" in found.advice) != is_proven


NOW = datetime(2026, 1, 31, 2, 0, tzinfo=UTC)


def patient(state: Path, policy: str, kind: Agent) -> Any:
    """A running guest, with what a check of its agent looks at."""
    return SimpleNamespace(
        request=SimpleNamespace(freeze_policy=policy, state_dir=state, now=NOW),
        name="vm1",
        uuid="u",
        domain=SimpleNamespace(),
        looked=SimpleNamespace(is_active=True, definition=SimpleNamespace(agent=kind)),
        domain_holder=lambda: "",
    )


@pytest.mark.parametrize("kind", [Agent.ABSENT, Agent.DISCONNECTED])
@pytest.mark.parametrize(
    ("policy", "severity", "words"),
    [
        ("auto", "warn", "crash consistent"),
        ("require", "fail", "set freeze.policy to 'auto'"),
        ("never", "ok", "never"),
        ("pause", "ok", "pause"),
    ],
)
def test_an_agent_that_is_away_is_judged_by_the_policy(
    kind: Agent, policy: str, severity: str, words: str, tmp_path: Path
) -> None:
    notes = Notes(Area.GUEST)
    check_domain.agent(patient(tmp_path, policy, kind), notes)
    (found,) = notes.done()
    assert found.severity.value == severity
    assert words in f"{found.text} {found.advice}"


@pytest.mark.parametrize(
    ("policy", "hours", "severities"),
    [
        ("auto", 1, ["ok", "warn"]),
        ("auto", 37, ["ok"]),
        ("require", 1, ["ok"]),
        ("never", 1, ["ok"]),
    ],
)
def test_an_agent_that_runs_leave_alone_for_a_while(
    policy: str,
    hours: int,
    severities: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F-45: it answers, and yet the next run would not freeze the guest."""
    monkeypatch.setattr(guest, "guest_info", lambda *_args, **_more: {})
    monkeypatch.setattr(domains, "instance_of", lambda _domain: "boot 1")
    memory = FreezeMemory(1, NOW - timedelta(hours=hours), "boot 1")
    StateDirectory(tmp_path).remember_freeze("u", memory)
    notes = Notes(Area.GUEST)
    check_domain.agent(patient(tmp_path, policy, Agent.CONNECTED), notes)
    found = notes.done()
    assert [each.severity.value for each in found] == severities
    if "warn" in severities:
        assert "asked again from" in found[-1].text
        assert "require" in found[-1].text
