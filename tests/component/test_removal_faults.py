"""Kill -9, full, failing and read-only storage at every step of a removal.

Each leaves the old set or the new one, of which every point restores to the same bytes, and the
next removal or run leaves nothing else.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.model.chain import Level
from nbdbackupd.ops.removal import apply
from nbdbackupd.ops.removal.apply import RemovalRequest
from nbdbackupd.repo import written
from nbdbackupd.repo.set_directory import SetDirectory
from tests.component.test_removal import check, remove
from tests.lib import chains
from tests.lib.sets import Change, SetBuilder

pytestmark = pytest.mark.component

CALLS = ("open", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "write", "pwritev")
DONE, FAILED = 0, 7
GONE = ("point1", "point2", "point5")
STRIKES = (("KILL", 1, 1), ("ENOSPC", 1, 3), ("EIO", 2, 3), ("EROFS", 3, 3))
"""Those that fail a call have much in common: each third step for each of them."""


def strike(number: int, fault: str) -> Callable[[], int]:
    """Let that call which changes or settles the file system fail; from EROFS on, all of them.

    Returns what tells how many there were.
    """
    count = 0

    def rigged(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if name == "open" and not args[1] & os.O_CREAT:
                return plain(*args, **kwargs)
            count += 1
            if count == number and fault == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == number or (fault == "EROFS" and 0 < number < count):
                raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
            return plain(*args, **kwargs)

        return call

    for each in CALLS:
        setattr(os, each, rigged(each, getattr(os, each)))
    return lambda: count


def attempt(path: Path, number: int, fault: str) -> int:
    """Remove points in a child that is struck; its exit status, or minus the signal."""
    for point in SetDirectory.open(path).load().points:
        written.note(state(path), point)
    pid = os.fork()
    if not pid:
        status = 99
        try:
            counted = strike(number, fault)
            remove(path, GONE, request=RemovalRequest(program="test", state_dirs=(state(path),)))
            path.with_name("steps").write_text(str(counted()))
            status = DONE
        except NbdbackupError:
            status = FAILED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state(path: Path) -> Path:
    """Where a copy's manifests are noted."""
    return path.with_name(f"{path.name}-state")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> SetBuilder:
    """A full, three increments, of which the second reads a disk in full, and a copy."""
    bench = SetBuilder(tmp_path_factory.mktemp("faults") / "set", block=4096, level=1)
    bench.disks = {"vda": bytearray(os.urandom(4096 * 6)), "vdb": bytearray(4096)}
    bench.full()
    bench.inc({"vda": [Change(512, b"1" * 512), Change(8192, 4096)]})
    bench.inc({"vda": [Change(1024, b"2" * 512)]}, whole=("vdb",))
    bench.inc({"vda": [Change(0, b"3" * 512)]})
    bench.full(level=Level.COPY)
    return bench


def content(path: Path) -> dict[str, bytes]:
    """What a set holds, without what can be made anew."""
    return {name: data for name, data in chains.tree(path).items() if not name.endswith(".cpt")}


@pytest.fixture(scope="module")
def done(bench: SetBuilder) -> tuple[int, dict[str, bytes]]:
    """How many steps a removal has, once there is a runtime directory; what it leaves, proven."""
    for name in ("first", "counted"):
        copy = bench.path.with_name(name)
        shutil.copytree(bench.path, copy)
        assert attempt(copy, 0, "KILL") == DONE
    steps = int(copy.with_name("steps").read_text())
    assert steps > 60
    found = content(copy)
    check(replace(bench, path=copy), GONE)
    return steps, found


@pytest.mark.parametrize(("fault", "first", "stride"), STRIKES)
def test_struck_at_every_step(
    bench: SetBuilder,
    done: tuple[int, dict[str, bytes]],
    fault: str,
    first: int,
    stride: int,
) -> None:
    outcomes = set()
    for number in range(first, done[0] + 1, stride):
        copy = bench.path.with_name(f"{fault}{number}")
        shutil.copytree(bench.path, copy)
        status = attempt(copy, number, fault)
        assert status in ((-signal.SIGKILL,) if fault == "KILL" else (DONE, FAILED)), number
        # a run sweeps as well as the next removal does
        if number % 2:
            set_dir = SetDirectory.open(copy)
            with set_dir.lock(owner="test"):
                set_dir.sweep()
        else:
            with apply.opened(copy, copy.parent / "run", owner="test of "):
                pass
        points = SetDirectory.open(copy).load().points
        assert written.warnings([state(copy)], points) == ()
        is_new = {point.id for point in points}.isdisjoint(GONE)
        assert is_new or status != DONE
        assert content(copy) == (done[1] if is_new else content(bench.path)), number
        shutil.rmtree(copy)
        outcomes.add(is_new)
    assert outcomes == {True, False}
