"""Kill -9 before every change of the file system, and what a power cut would find."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.errors import RepositoryError
from nbdbackupd.model.chain import Level
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains

pytestmark = pytest.mark.component

ROOT = Path(__file__).parents[2]

CALLS = ("open", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "write", "pwritev")

# The child counts the calls that change or settle the file system and dies right before one, or
# halfway through a write; whatever it was about to do is not done.
CHILD = """
import os, signal, sys
from pathlib import Path
from nbdbackupd.model.chain import Level
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains

action, path, number, deadly, *calls = sys.argv[1:]
path, number, deadly, count = Path(path), int(number), int(deadly), 0
log = os.open(path.parent / "calls.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
plain_write = os.write

def deadly_call(name, plain):
    def call(*args, **kwargs):
        global count
        if name == "open" and not (args[1] & os.O_CREAT):
            return plain(*args, **kwargs)
        count += 1
        if count == deadly:
            if name == "write" and len(args[1]) > 1:
                plain(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        place = ""
        if name == "fsync":
            place = os.readlink(f"/proc/self/fd/{args[0]}")
        elif isinstance(args[0], (str, Path)):
            place = "\\t".join(os.fspath(arg) for arg in args if isinstance(arg, (str, Path)))
        plain_write(log, f"{name}\\t{place}\\n".encode())
        return plain(*args, **kwargs)
    return call

for each in calls:
    setattr(os, each, deadly_call(each, getattr(os, each)))
if action == "add":
    chains.add_point(path, number, Level.FULL if number == 1 else Level.INC)
else:
    repository = SetDirectory.open(path)
    with repository.lock(owner="sweep"):
        repository.sweep()
"""


def run(action: str, path: Path, number: int, deadly: int) -> bool:
    """Let a child act until it dies before call ``deadly``; whether it came to its end."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, action, path, str(number), str(deadly), *CALLS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


def sweep(path: Path) -> tuple[int, int]:
    """Sweep; how many points there are, and how many runs were found dead."""
    repository = SetDirectory.open(path)
    with repository.lock(owner="test"):
        dead = repository.dead_runs()
        assert repository.sweep() == dead
        known = repository.load()
        repository.check_present(known.points)
        assert not any(entry.name.startswith((".draft", ".nbdb")) for entry in path.rglob("*"))
        return len(known.points), len(dead)


def copied(source: Path, target: Path) -> Path:
    target.mkdir(0o700)
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True, timeout=60)
    return target


@pytest.mark.parametrize("number", [1, 2])
def test_kill_at_every_step(tmp_path: Path, number: int) -> None:
    """Each kill leaves the old set or the new one, never a mixture, and nobody's files suffer."""
    base = tmp_path / "base" / "set"
    base.mkdir(parents=True, mode=0o700)
    for folder in (tmp_path, base.parent):
        (folder / chains.KERNEL).write_text("a kernel that both points boot")
    if number > 1:
        chains.make_chain(base, number - 2)
    (base / ".mine").write_text("keep me")
    sweep(base)
    old = chains.tree(base)
    outcomes = []
    for deadly in range(1, 1000):
        path = copied(base, tmp_path / f"set{deadly}")
        finished = run("add", path, number, deadly)
        # A run looks at the directory before it sweeps it.
        SetDirectory.open(path).check_can_begin()
        found, dead = sweep(path)
        assert found in (number - 1, number)
        if found == number - 1:
            assert chains.tree(path) == old, deadly
        else:
            assert (dead, "keep me") == (0, (path / ".mine").read_text())
            new = set(chains.tree(path)) - set(old)
            assert len([name for name in new if name.endswith(".data")]) == 2
            assert [path.name for path in path.glob("kernel.*")] == ["kernel.p1.vmlinuz"]
        outcomes.append((found, dead))
        if finished:
            break
        # The chain goes on, whatever was the outcome.
        chains.add_point(path, found + 1, Level.FULL if found == 0 else Level.INC)
    else:
        pytest.fail("the child never came to its end")
    # All three ends were seen: before the intent, before the commit, after it.
    assert {(number - 1, 0), (number - 1, 1), (number, 0)} <= set(outcomes)
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome[0])
    assert len(outcomes) > 30


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_call_that_fails_at_every_step(tmp_path: Path, code: int) -> None:
    """Each failure of the target leaves the old set or the new one; a shared file stays."""
    base = tmp_path / "base" / "set"
    base.mkdir(parents=True, mode=0o700)
    for folder in (tmp_path, base.parent):
        (folder / chains.KERNEL).write_text("a kernel that both points boot")
    chains.make_chain(base, 0)
    sweep(base)
    old = chains.tree(base)
    counts = set()
    for step in range(1, 1000):
        path = copied(base, tmp_path / f"set{step}")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RepositoryError):
            count = fail_at(patch, step, code)
            chains.add_point(path, 2)
        found, _ = sweep(path)
        counts.add(found)
        if found == 1:
            assert chains.tree(path) == old, step
        assert (path / "kernel.p1.vmlinuz").read_bytes() == old["kernel.p1.vmlinuz"]
        if count[0] < step:
            break
    assert (counts, step > 50) == ({1, 2}, True)


def fail_at(patch: pytest.MonkeyPatch, step: int, code: int) -> list[int]:
    """Have one call that changes or settles the file system fail; how many there were, in a list.

    No real target fails at a chosen call.
    """
    count = [0]

    def failing(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not (args[1] & os.O_CREAT):
                return plain(*args, **kwargs)
            count[0] += 1
            if count[0] == step:
                raise OSError(code, os.strerror(code))
            return plain(*args, **kwargs)

        return call

    for each in CALLS:
        patch.setattr(os, each, failing(each, getattr(os, each)))
    return count


def test_kill_during_the_sweep(tmp_path: Path) -> None:
    """A sweep that dies is finished by the next, and no intent is lost on the way."""
    base = tmp_path / "base" / "set"
    base.mkdir(parents=True)
    chains.make_chain(base, 0)
    old = chains.tree(base)
    # Die right before the manifest is renamed into points/: everything else has been.
    for deadly in range(1, 1000):
        path = copied(base, tmp_path / f"add{deadly}")
        run("add", path, 2, deadly)
        if len([name for name in chains.tree(path) if ".inc." in name and "/" not in name]) == 6:
            break
    torn = path
    for deadly in range(1, 1000):
        path = copied(torn, tmp_path / f"sweep{deadly}")
        finished = run("sweep", path, 0, deadly)
        repository = SetDirectory.open(path)
        with repository.lock(owner="test"):
            if not finished and (path / ".draft-run2" / "manifest.json").exists():
                assert repository.dead_runs() == [chains.intent_for(2)]
            repository.sweep()
        assert chains.tree(path) == old
        if finished:
            return
    pytest.fail("the sweep never came to its end")


def test_order_of_fsyncs(tmp_path: Path) -> None:
    """What a power cut may reorder is settled before it is relied upon."""
    path = tmp_path / "set"
    path.mkdir()
    chains.make_chain(path, 0)
    assert run("add", path, 2, 0)
    calls = [line.split("\t") for line in (tmp_path / "calls.log").read_text().splitlines()]
    renames = [call for call in calls if call[0] == "rename"]
    commit = calls.index(renames[-1])
    assert Path(renames[-1][2]) == path / "points" / "000002-p2.json"
    assert len(renames) == 2 * 3 + 2 + 1

    def synced(place: Path, begin: int, end: int) -> bool:
        return ["fsync", os.fspath(place)] in calls[begin:end]

    draft = path / ".draft-run2"
    for _, source, target in renames[:-1]:
        place = calls.index(["rename", source, target])
        assert synced(Path(source), 0, place), source
        assert synced(Path(target).parent, place, commit), target
    named = [call for call in calls if call[0] == "replace" and call[2] == f"{draft}/manifest.json"]
    assert synced(draft, calls.index(named[0]), calls.index(renames[0]))
    temporary = Path(named[0][1])
    assert synced(temporary, 0, calls.index(named[0]))
    assert synced(path / "points", commit, len(calls))
    intent = next(
        number
        for number, call in enumerate(calls)
        if call[0] == "replace" and call[2] == f"{draft}/intent.json"
    )
    first = next(
        number
        for number, call in enumerate(calls)
        if call[-1].endswith((".data", "vmconfig.p2.xml"))
    )
    assert synced(draft, intent, first)
    assert synced(path, intent, first)
