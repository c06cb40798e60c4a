"""Freezing a real guest's file systems: in time, for a short time, and never for ever."""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdbackupd import rundir
from nbdbackupd.errors import FreezeError
from nbdbackupd.model.chain import Consistency
from nbdbackupd.model.freeze_memory import FreezeMemory
from nbdbackupd.model.policy import FreezePolicy
from nbdbackupd.ops.backup import metadata
from nbdbackupd.ops.domain import domains
from nbdbackupd.repo.state import StateDirectory
from nbdbackupd.source import quiesce, running
from nbdbackupd.source.quiesce import Quiet
from nbdbackupd.source.running import RunningDisk, RunningRequest, open_running
from nbdbackupd.source.sweep import Swept, sweep
from nbdbackupd.virt import guest as guest_agent
from nbdbackupd.virt import jobs
from nbdbackupd.virt.connection import open_connection
from nbdbackupd.virt.domain import Domain
from tests.lab.agent_guest import AgentGuest
from tests.lab.daemon import DaemonLab
from tests.lab.process import wait_until
from tests.lib.rigged import RiggedCtl
from tests.lib.told import heard

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def domain(lab: DaemonLab, linux: AgentGuest) -> Iterator[Domain]:
    linux.set_freeze_hook("exit 0")
    linux.exec("rm -f /tmp/freeze.log; mount /dev/vda /mnt/vda; mount /dev/vdb /mnt/vdb; :")
    with open_connection(lab.uri) as connection:
        yield Domain.find(connection, linux.guest.name)


@pytest.fixture
def wish(tmp_path: Path) -> Quiet:
    return Quiet(marker=tmp_path / "held", run_id="r1", seconds=15)


def request_for(lab: DaemonLab, domain: Domain, policy: FreezePolicy) -> RunningRequest:
    rundir.make_domain_dir(lab.directory / "run", domain.uuid)
    return RunningRequest(
        domain=domain,
        disks=(RunningDisk(target="vda"), RunningDisk(target="vdb")),
        run_id="r1",
        runtime_dir=rundir.socket_dir(lab.directory / "run", domain.uuid),
        scratch_dir=lab.directory / "scratch",
        scratch_reserve=0,
        on_trouble=lambda _error: None,
        freeze=policy,
        freeze_seconds=15,
    )


def assert_thawed(linux: AgentGuest, wish: Quiet) -> None:
    assert not linux.is_frozen()
    assert not wish.marker.exists()


def test_job_begins_frozen_and_copies_thawed(
    lab: DaemonLab, linux: AgentGuest, domain: Domain
) -> None:
    with open_running(request_for(lab, domain, FreezePolicy.REQUIRE)) as snapshot:
        assert snapshot.consistency is Consistency.FILESYSTEM
        assert snapshot.warnings == ()
        assert not linux.is_frozen()
    assert linux.freeze_log() == ["freeze", "thaw"]


def test_frozen_while_the_body_runs(linux: AgentGuest, domain: Domain, wish: Quiet) -> None:
    with quiesce.quiet(domain, wish) as moment:
        assert linux.is_frozen()
        assert wish.marker.read_text() == "frozen r1"
    assert moment.consistency is Consistency.FILESYSTEM
    assert moment.warnings == []
    assert_thawed(linux, wish)


def test_single_mountpoints(linux: AgentGuest, domain: Domain) -> None:
    assert guest_agent.freeze(domain, ["/mnt/vdb"], seconds=15) == 1
    assert guest_agent.thaw(domain, seconds=15) == 1
    assert not linux.is_frozen()


def test_thawed_when_the_body_fails(linux: AgentGuest, domain: Domain, wish: Quiet) -> None:
    with pytest.raises(KeyboardInterrupt), quiesce.quiet(domain, wish):
        raise KeyboardInterrupt
    assert_thawed(linux, wish)


def test_failing_freeze_is_a_warning_or_an_error(
    lab: DaemonLab, linux: AgentGuest, domain: Domain
) -> None:
    linux.set_freeze_hook('[ "$1" = thaw ]')
    with heard() as told, open_running(request_for(lab, domain, FreezePolicy.AUTO)) as snapshot:
        assert snapshot.consistency is Consistency.CRASH
        assert "not frozen" in snapshot.warnings[0]
    assert told == ["freeze-failed"]
    with pytest.raises(FreezeError, match="was not frozen"):
        open_running(request_for(lab, domain, FreezePolicy.REQUIRE)).__enter__()
    assert jobs.active_job(domain) is None
    assert not linux.is_frozen()


def test_a_freeze_that_answers_too_late_is_thawed(
    linux: AgentGuest, domain: Domain, wish: Quiet
) -> None:
    linux.set_freeze_hook('[ "$1" = thaw ] || sleep 6')
    impatient = Quiet(marker=wish.marker, seconds=4)
    begun = time.monotonic()
    with quiesce.quiet(domain, impatient) as moment:
        assert time.monotonic() - begun < 20
    assert moment.consistency is Consistency.CRASH
    assert moment.warnings
    wait_until(lambda: not linux.is_frozen(), "thaw", 20)


def test_nothing_to_freeze(linux: AgentGuest, domain: Domain, wish: Quiet) -> None:
    linux.exec("umount /mnt/vda /mnt/vdb")
    with quiesce.quiet(domain, wish) as moment:
        pass
    assert moment.consistency is Consistency.CRASH
    assert "no file system" in moment.warnings[0]
    required = Quiet(marker=wish.marker, freeze=FreezePolicy.REQUIRE)
    with pytest.raises(FreezeError, match="no file system"):
        quiesce.quiet(domain, required).__enter__()
    assert_thawed(linux, wish)


def test_a_body_that_takes_too_long_is_thawed(
    linux: AgentGuest, domain: Domain, wish: Quiet
) -> None:
    short = Quiet(marker=wish.marker, seconds=2)
    with heard() as told, quiesce.quiet(domain, short) as moment:
        assert linux.is_frozen()
        wait_until(lambda: not linux.is_frozen(), "thaw by the watchdog", 10)
    assert told == ["thaw-forced"]
    assert moment.consistency is Consistency.CRASH
    assert "thawed after 2 s" in moment.warnings[0]
    assert linux.freeze_log() == ["freeze", "thaw"]


def test_somebody_else_thaws(linux: AgentGuest, domain: Domain, wish: Quiet) -> None:
    with quiesce.quiet(domain, wish) as moment:
        linux.agent("guest-fsfreeze-thaw")
    assert moment.consistency is Consistency.CRASH
    assert "only 0 of 2" in moment.warnings[0]
    assert_thawed(linux, wish)


def test_a_killed_run_is_thawed_by_the_next(
    lab: DaemonLab, linux: AgentGuest, domain: Domain
) -> None:
    runtime_dir = lab.directory / "run" / domain.uuid
    runtime_dir.mkdir(parents=True, exist_ok=True)
    (runtime_dir / "guest-held").write_text("frozen")
    guest_agent.freeze(domain, [], seconds=15)
    swept = sweep(domain, runtime_dir, lab.directory / "scratch")
    assert "2 file systems" in swept.guest
    assert not linux.is_frozen()
    assert sweep(domain, runtime_dir, lab.directory / "scratch") == Swept()


LATE = '[ "$1" = thaw ] || sleep 13'


def test_a_guest_that_freezes_late_is_thawed(
    lab: DaemonLab, linux: AgentGuest, domain: Domain
) -> None:
    """G-2: nobody waits for the agent; when it has frozen after all, the guard thaws."""
    linux.set_freeze_hook(LATE)
    told: list[bool] = []
    request = replace(
        request_for(lab, domain, FreezePolicy.AUTO), freeze_seconds=2, on_freeze=told.append
    )
    marker = running.marker(request.runtime_dir)
    begun = time.monotonic()
    with heard() as events, open_running(request) as snapshot:
        assert time.monotonic() - begun < 12
        assert "FREEZE LATE" in snapshot.warnings[0]
        assert snapshot.consistency is Consistency.CRASH
    assert events == ["thaw-failed", "freeze-failed"]
    assert told == [True]
    assert marker.exists()
    # the next run does not ask again while nobody has answered
    with open_running(replace(request, run_id="r2")) as snapshot:
        assert "has not yet confirmed the thaw" in snapshot.warnings[0]
    wait_until(lambda: not marker.exists(), "the agent's answer", 60)
    assert_thawed(linux, Quiet(marker=marker))
    assert linux.freeze_log() == ["freeze", "thaw"]


def test_a_run_that_is_killed_while_the_guest_is_frozen(
    lab: DaemonLab, linux: AgentGuest, domain: Domain, tmp_path: Path
) -> None:
    """G-2: its guard thaws at once, and no next run is needed."""
    ctl = RiggedCtl(lab.uri, lab.directory / "ctl")
    with ctl.rigged("KILL@job-begun#1"):
        ctl("backup", linux.guest.name, "-o", tmp_path / "set", code=-signal.SIGKILL)
    wait_until(lambda: not list(ctl.runtime.rglob("guest-held")), "thaw", 20)
    assert not linux.is_frozen()
    assert linux.freeze_log() == ["freeze", "thaw"]
    assert jobs.active_job(domain) is None


def test_an_agent_that_let_a_deadline_pass_is_left_alone(
    lab: DaemonLab, linux: AgentGuest, domain: Domain, tmp_path: Path
) -> None:
    """G-2, F-45: for a while; 'require' asks it all the same, and an answer ends that."""
    ctl = RiggedCtl(lab.uri, lab.directory / "ctl")
    state = StateDirectory(ctl.state)
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    current = domains.instance_of(domain)
    assert current
    state.remember_freeze(domain.uuid, FreezeMemory(1, hour_ago, current))
    point = ctl.backup(linux.guest.name, tmp_path / "set", code=3)["point"]
    assert "its agent did not answer the freeze of " in point["warnings"][0]
    assert linux.freeze_log() == []
    ctl.backup(linux.guest.name, tmp_path / "set", "--freeze", "require")
    assert linux.freeze_log() == ["freeze", "thaw"]
    assert state.freeze_memory(domain.uuid) is None
    assert ctl.backup(linux.guest.name, tmp_path / "set")["point"]["consistency"] == "filesystem"
    # and so does a guest that was started anew
    state.remember_freeze(domain.uuid, FreezeMemory(1, hour_ago, f"{current}0"))
    assert ctl.backup(linux.guest.name, tmp_path / "set")["point"]["consistency"] == "filesystem"
    assert state.freeze_memory(domain.uuid) is None


def test_a_guard_tells_what_it_has_let_go(
    linux: AgentGuest, domain: Domain, tmp_path: Path
) -> None:
    """G-2: and touches nothing that another run holds."""
    marker = tmp_path / "held"
    marker.write_text("frozen r1")
    guest_agent.freeze(domain, [], seconds=15)
    assert quiesce.settle(domain, marker, "r2", seconds=5) == quiesce.Release()
    assert linux.is_frozen()
    with heard() as told:
        assert not quiesce.settle(domain, marker, "r1", seconds=5).problem
    assert told == ["guest-released"]
    assert_thawed(linux, Quiet(marker=marker))


def test_a_thaw_whose_hook_fails(linux: AgentGuest, domain: Domain, wish: Quiet) -> None:
    """The agent answers with an error, and nothing is frozen: then nobody has to ask again."""
    linux.set_freeze_hook('[ "$1" = freeze ]')
    with heard() as told, quiesce.quiet(domain, wish) as moment:
        assert linux.is_frozen()
        # while it is, its agent does not list the file systems
        assert not guest_agent._is_thawed(domain, 5)
    assert told == ["thaw-forced"]
    assert not moment.is_unanswered
    assert "nothing is frozen any more, but" in moment.warnings[0]
    assert_thawed(linux, wish)
    # so does a guard, or the next run
    wish.marker.write_text("frozen r1")
    with heard() as told:
        found = quiesce.settle(domain, wish.marker, "r1", seconds=5)
    assert told == ["guest-released"]
    assert "nothing is frozen, but" in found.done
    assert_thawed(linux, wish)


def test_guest_info_is_saved(domain: Domain) -> None:
    collected = metadata.collect(domain, domain.definition())
    data = next(item.data for item in collected.items if item.role == "guest-info")
    found = json.loads(data)
    assert found["fs.count"] == 2
    assert found["hostname"]
    roles = [item.role for item in collected.items]
    assert roles == ["domain-xml", "domain-xml-live", "kernel", "initrd", "guest-info"]
    assert collected.warnings == ()
    assert collected.autostart is False


def test_a_hanging_agent_does_not_hold_us(
    lab: DaemonLab, linux: AgentGuest, domain: Domain, wish: Quiet
) -> None:
    # last: the agent does not come back
    linux.exec("(sleep 2; kill -STOP $(pidof qemu-ga)) >/dev/null 2>&1 &")
    with heard() as told, quiesce.quiet(domain, Quiet(marker=wish.marker, seconds=6)) as moment:
        assert linux.is_frozen()
        time.sleep(3)
    # nobody answers the thaw: it is told, and noted for the next run
    assert told == ["thaw-failed"]
    assert moment.consistency is Consistency.CRASH
    assert wish.marker.exists()
    wish.marker.unlink()

    impatient = Quiet(marker=wish.marker, seconds=2)
    begun = time.monotonic()
    with quiesce.quiet(domain, impatient) as moment:
        assert 2 <= time.monotonic() - begun < 60
    assert moment.consistency is Consistency.CRASH
    assert "not frozen" in moment.warnings[-1]
    with pytest.raises(FreezeError):
        guest_agent.guest_info(domain, seconds=2)
    # and a backup goes on without the agent
    with open_running(request_for(lab, domain, FreezePolicy.NEVER)) as snapshot:
        assert snapshot.consistency is Consistency.CRASH
