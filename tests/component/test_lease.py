"""Leases and giving way: real processes that hold real locks, and die."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbackupd import rundir
from nbdbackupd.errors import BusyError, GaveWayError
from nbdbackupd.source import lease
from nbdbackupd.source.lease import ProcessId
from tests.lib import images
from tests.lib.images import MIB

pytestmark = pytest.mark.component
ROOT = Path(__file__).parents[2]
UUID = "5e2b6f0e-0000-4000-8000-000000000001"
NAME = "a/b ü '%41' .."
LETTING_GO = 0.5
"""Seconds; two are allowed, on a busy machine too."""

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from nbdbackupd.app import signals
from nbdbackupd.errors import GaveWayError
from nbdbackupd.qemu import storage_daemon
from nbdbackupd.source import lease
runtime, uuid, name, image, how = sys.argv[1:]
with signals.listen() as cancel:
    try:
        with lease.hold(
            Path(runtime), domain=name, uuid=uuid, run_id="r1",
            is_active=lambda: False, cancelled=cancel.check,
        ) as held:
            with lease.Lease.images(held) as fd:
                serving = storage_daemon.serve(
                    Path(runtime, uuid, "s"), pass_fds=[fd], started=held.name_server
                )
                server = serving.__enter__()
            server.open_chain([storage_daemon.Image(image, "qcow2")])
            print(server.pid, flush=True)
            if how == "blocked":
                # as deep in the kernel as a call to a hanging libvirt
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                time.sleep(60)
            while True:
                cancel.check()
                time.sleep(0.01)
    except GaveWayError as err:
        server = serving.__exit__(None, None, None)
        sys.exit(err.exit_code)
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / UUID).mkdir(parents=True)
    return path


@pytest.fixture(autouse=True)
def deaf() -> Iterator[None]:
    """Where this process holds a lease itself, it is told by a signal."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGUSR1, before)


@contextmanager
def held(runtime: Path, *, active: Callable[[], bool] = lambda: False) -> Iterator[lease.Lease]:
    with lease.hold(
        runtime, domain=NAME, uuid=UUID, run_id="r1", is_active=active, cancelled=lambda: None
    ) as it:
        yield it


@contextmanager
def holder(
    runtime: Path, tmp_path: Path, how: str = ""
) -> Iterator[tuple["subprocess.Popen[str]", int, Path]]:
    """A run in another process that has an image open; the id of its server, and the image."""
    image = images.make(tmp_path / "image", 4 * MIB)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, runtime, UUID, NAME, image, how],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline()), image
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.mark.parametrize("name", [NAME, UUID])
def test_a_run_gives_way(runtime: Path, tmp_path: Path, name: str) -> None:
    with holder(runtime, tmp_path) as (process, server, image):
        given = lease.give_way(runtime, name)
        # free at that very moment, not a little later
        with images.opened(image):
            pass
        # whichever of us was faster, we or the run that was told
        assert given.seconds < LETTING_GO
        assert [(each.run_id, each.run.pid) for each in given.holders] == [("r1", process.pid)]
        assert process.wait(5) == 75
    assert not images.is_running(server)
    assert lease.read(runtime / UUID) is None


def test_a_run_that_sees_another_boot_id_gives_way(runtime: Path, tmp_path: Path) -> None:
    """As units do in a container; its lock proves that it is of this boot."""
    with holder(runtime, tmp_path) as (process, server, image):
        path = runtime / UUID / "lease.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "boot": "of the kernel"}))
        given = lease.give_way(runtime, NAME)
        with images.opened(image):
            pass
        assert [each.run.pid for each in given.holders] == [process.pid]
        assert process.wait(5) == 75
    assert not images.is_running(server)


@pytest.mark.parametrize("how", ["blocked", "stopped"])
def test_a_run_that_hangs_gives_way(runtime: Path, tmp_path: Path, how: str) -> None:
    with holder(runtime, tmp_path, how) as (process, _, image):
        if how == "stopped":
            process.send_signal(signal.SIGSTOP)
        given = lease.give_way(runtime, NAME)
        with images.opened(image):
            pass
        assert given.seconds < LETTING_GO
        assert process.poll() is None


def test_the_lease_of_a_dead_run(runtime: Path, tmp_path: Path) -> None:
    with holder(runtime, tmp_path) as (process, server, image):
        process.kill()
        process.wait()
        images.wait_gone(server)
        left = lease.read(runtime / UUID)
        assert left is not None
        assert left.run.pid == process.pid
        assert not left.run.is_alive()
        given = lease.give_way(runtime, NAME)
        assert (given.holders, given.killed) == ((), False)
        assert given.seconds < LETTING_GO
        with images.opened(image):
            pass
    # and the next run is not kept by it
    lease.marker(runtime, NAME).unlink()
    with held(runtime) as it, it.images():
        pass


def test_a_stranger_with_the_id_of_a_dead_process(runtime: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        document = {
            "version": 1, "domain": NAME, "uuid": UUID, "run_id": "r0", "boot": boot(),
            "pid": stranger.pid, "start": 5, "server_pid": stranger.pid, "server_start": 5,
        }  # fmt: skip
        (runtime / UUID / rundir.LEASE).write_text(json.dumps(document))
        assert lease.give_way(runtime, NAME).holders == ()
        real = ProcessId.of(stranger.pid)
        assert real is not None
        later = {**document, "start": real.start, "server_start": real.start, "boot": "other"}
        (runtime / UUID / rundir.LEASE).write_text(json.dumps(later))
        assert lease.give_way(runtime, NAME).holders == ()
        assert stranger.poll() is None
        stranger.kill()


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"version": 1}', '{"pid": "x"}', "\0"])
def test_a_lease_that_is_none(runtime: Path, text: str) -> None:
    (runtime / UUID / rundir.LEASE).write_text(text)
    assert lease.read(runtime / UUID) is None
    assert lease.give_way(runtime, NAME).holders == ()


def test_other_domains_go_on(runtime: Path, tmp_path: Path) -> None:
    with holder(runtime, tmp_path) as (process, server, image):
        given = lease.give_way(runtime, "other")
        assert (given.holders, given.killed) == ((), False)
        time.sleep(0.1)
        assert process.poll() is None
        assert images.is_running(server)
        result = subprocess.run(
            ["qemu-img", "bitmap", "--add", image, "b"], check=False, capture_output=True
        )
        assert result.returncode == 1


def test_nothing_to_do(tmp_path: Path) -> None:
    given = lease.give_way(tmp_path / "not" / "there", NAME)
    assert (given.holders, given.killed) == ((), False)


def test_what_does_not_let_go(runtime: Path) -> None:
    """A qemu-img that writes is never killed; one that hangs is told of after two seconds."""
    with held(runtime) as it:
        with it.images() as fd:
            child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
        begun = time.monotonic()
        with pytest.raises(BusyError, match=r"still open after [2-9]\.\d s"):
            lease.give_way(runtime, NAME)
        assert 2 <= time.monotonic() - begun < 10
        assert child.poll() is None
        child.kill()
        child.wait()
        assert lease.give_way(runtime, NAME).seconds < LETTING_GO


def test_it_waits_for_a_writer_that_ends(runtime: Path) -> None:
    with held(runtime) as it:
        with it.images() as fd, subprocess.Popen(["sleep", "0.5"], pass_fds=[fd]):
            pass
        with it.images() as fd:
            child = subprocess.Popen(["sleep", "0.5"], pass_fds=[fd])
        given = lease.give_way(runtime, NAME)
        assert given.seconds > 0.1
        assert child.wait(10) == 0
        assert not given.killed


def test_a_server_that_was_only_just_begun(runtime: Path) -> None:
    """It has the lock already, and is named a moment later: it is ended all the same."""
    with held(runtime) as it:
        with it.images() as fd:
            child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
        giving = subprocess.Popen(
            [sys.executable, "-m", "nbdbackupd", "--runtime-dir", runtime, "yield", NAME], cwd=ROOT
        )
        deadline = time.monotonic() + 30
        while not lease.marker(runtime, NAME).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.3)
        assert giving.poll() is None
        it.name_server(child.pid)
        assert giving.wait(20) == 0
        assert child.wait(10) == -signal.SIGKILL


def test_nothing_is_begun_after_a_start_was_announced(runtime: Path) -> None:
    with held(runtime) as it:
        it.check()
        with it.images():
            pass
        lease.give_way(runtime, NAME)
        with pytest.raises(GaveWayError, match="is being started"):
            it.check()
        with pytest.raises(GaveWayError), it.images():
            pytest.fail("was let in")
        # by UUID, too, as the hook knows both
    lease.marker(runtime, NAME).unlink()
    with held(runtime) as it:
        lease.give_way(runtime, UUID)
        with pytest.raises(GaveWayError):
            it.check()


def test_nothing_is_begun_while_somebody_gives_way(runtime: Path) -> None:
    with held(runtime) as it, (runtime / UUID / rundir.IMAGES).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(GaveWayError), it.images():
            pytest.fail("was let in")


def test_a_run_that_comes_after_waits(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.give_way(runtime, NAME)
    polls = 0

    def active() -> bool:
        nonlocal polls
        polls += 1
        return polls > 3

    begun = time.monotonic()
    with held(runtime, active=active):
        assert polls == 4
    assert 0.5 < time.monotonic() - begun < lease.MARKER_SECONDS
    monkeypatch.setattr(lease, "MARKER_SECONDS", 1.0)
    lease.give_way(runtime, NAME)
    begun = time.monotonic()
    # nobody started it after all: then it is read
    with held(runtime) as it, it.images():
        assert 0.7 < time.monotonic() - begun < 10


def test_an_old_announcement_holds_nobody_up(runtime: Path) -> None:
    lease.give_way(runtime, NAME)
    an_hour_ago = time.time() - 3600
    os.utime(lease.marker(runtime, NAME), (an_hour_ago, an_hour_ago))
    begun = time.monotonic()
    with held(runtime) as it:
        assert time.monotonic() - begun < 10
        it.check()


def test_a_clock_that_was_put_back(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows how old the announcement is: the wait is bounded all the same."""
    monkeypatch.setattr(lease, "MARKER_SECONDS", 0.5)
    lease.give_way(runtime, NAME)
    tomorrow = time.time() + 86400
    os.utime(lease.marker(runtime, NAME), (tomorrow, tomorrow))
    begun = time.monotonic()
    with held(runtime):
        assert 0.3 < time.monotonic() - begun < 20


def test_the_wait_can_be_cancelled(runtime: Path) -> None:
    lease.give_way(runtime, NAME)

    def cancelled() -> None:
        raise BusyError("enough")

    with (
        pytest.raises(BusyError, match="enough"),
        lease.hold(
            runtime, domain=NAME, uuid=UUID, run_id="r1", is_active=lambda: False,
            cancelled=cancelled,
        ),
    ):  # fmt: skip
        pytest.fail("was not cancelled")
    assert lease.read(runtime / UUID) is None


def test_names_of_markers(runtime: Path) -> None:
    folder = runtime / rundir.STARTING
    for name in ["..", ".", "", "/etc/passwd", "x" * 1000, "ü" * 255, NAME]:
        assert lease.marker(runtime, name).parent == folder
        lease.give_way(runtime, name)
        assert lease.marker(runtime, name).is_file()


def test_the_verb(runtime: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "nbdbackupd", "--runtime-dir", os.fspath(runtime)]
    with holder(runtime, tmp_path) as (process, _, _image):
        done = subprocess.run(
            [*argv, "yield", NAME, "--json"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        report = json.loads(done.stdout)
        assert report.pop("seconds") < LETTING_GO
        assert report.pop("killed") in (True, False)
        assert report == {
            "version": 1, "domain": NAME,
            "runs": [{"run": "r1", "pid": process.pid}],
        }  # fmt: skip
        assert process.wait(5) == 75
    done = subprocess.run(
        [*argv, "yield", NAME], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"no backup has images of domain {NAME} open\n"
    lease.marker(runtime, NAME).unlink()
    with held(runtime) as it:
        with it.images() as fd:
            child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
        done = subprocess.run(
            [*argv, "yield", NAME], cwd=ROOT, check=False, capture_output=True, text=True
        )
        child.kill()
        child.wait()
    assert done.returncode == 75
    assert "still open" in done.stderr
