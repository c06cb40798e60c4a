"""Directories of domains that are gone, in the runtime directory."""

import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nbdbackupd import durable, rundir
from nbdbackupd.ops.checkpoints import leftovers
from nbdbackupd.virt.connection import Connection
from tests.lib.points import UUID as GONE

pytestmark = pytest.mark.component

HERE = "00000000-0000-4000-8000-000000000000"


def connection(*uuids: str) -> Connection:
    known = tuple((f"vm{number}", uuid) for number, uuid in enumerate(uuids))
    return cast("Connection", SimpleNamespace(domains=lambda: known))


def used(runtime: Path, uuid: str, hours: float) -> Path:
    """The directories of a domain that was backed up so long ago."""
    directory = rundir.make_domain_dir(runtime, uuid)
    rundir.make(runtime, rundir.socket_dir(runtime, uuid).name)
    with durable.Lock(directory / rundir.LOCK, owner="a run"):
        (directory / rundir.GUARDS).touch()
    age(directory, hours)
    return directory


def age(directory: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    for path in (directory / rundir.LOCK, directory):
        os.utime(path, (then, then))


def left(runtime: Path) -> set[str]:
    return {each.name for each in runtime.iterdir()}


def test_only_what_is_gone_and_idle_goes(tmp_path: Path) -> None:
    used(tmp_path, GONE, 25)
    used(tmp_path, HERE, 25)
    recent = HERE.replace("8000", "8001")
    used(tmp_path, recent, 23)
    others = {rundir.make(tmp_path, name).name for name in (rundir.BOOT, rundir.SLOTS, rundir.XML)}
    leftovers.sweep_gone(connection(HERE), tmp_path, datetime.now(UTC))
    kept = {HERE, recent}
    assert left(tmp_path) == kept | {f"libvirt-{each}" for each in kept} | others
    # a domain that comes back finds its place
    rundir.make_domain_dir(tmp_path, GONE)


@pytest.mark.parametrize("name", [rundir.NOTE, rundir.LEASE, rundir.HELD, "a directory"])
def test_what_dead_runs_have_noted_stays(tmp_path: Path, name: str) -> None:
    directory = used(tmp_path, GONE, 25)
    (directory / name).mkdir()
    age(directory, 25)
    leftovers.sweep_gone(connection(), tmp_path, datetime.now(UTC))
    assert directory.is_dir()
    (directory / name).rmdir()
    age(directory, 25)
    leftovers.sweep_gone(connection(), tmp_path, datetime.now(UTC))
    assert left(tmp_path) == set()


def test_who_is_there_is_left_alone(tmp_path: Path) -> None:
    """A run, a guard, and a QEMU that still has its socket."""
    directory = used(tmp_path, GONE, 25)
    files = [directory / rundir.LOCK, directory / rundir.GUARDS]
    for path, mode in zip(files, (fcntl.LOCK_EX, fcntl.LOCK_SH), strict=True):
        with path.open() as held:
            fcntl.flock(held, mode)
            leftovers.sweep_gone(connection(), tmp_path, datetime.now(UTC))
        assert all(each.exists() for each in files)
        age(directory, 25)
    sockets = rundir.socket_dir(tmp_path, GONE)
    (sockets / rundir.NBD_SOCKET).touch()
    leftovers.sweep_gone(connection(), tmp_path, datetime.now(UTC))
    assert all(each.exists() for each in files)
    (sockets / rundir.NBD_SOCKET).unlink()
    age(directory, 25)
    leftovers.sweep_gone(connection(), tmp_path, datetime.now(UTC))
    assert left(tmp_path) == set()


def test_no_runtime_directory(tmp_path: Path) -> None:
    leftovers.sweep_gone(connection(), tmp_path / "none", datetime.now(UTC))
