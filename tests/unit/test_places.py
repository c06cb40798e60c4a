"""Where the files are that a QEMU was given by relative names."""

import os
from pathlib import Path

import pytest

from nbdbackupd.ops.domain.qemu import _Places


def test_a_relative_name_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel").touch()
    places = _Places(os.getpid())
    assert places.absolute("kernel") == str(tmp_path / "kernel")
    for name in ("", "/boot/kernel", "nbd://host/x", "json:{}"):
        assert places.absolute(name) == name


def test_a_name_that_cannot_be_told_is_never_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose directory we may not see, as a unit without CAP_SYS_PTRACE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel").write_text("another one")
    gone = 2**22 + 1
    assert _Places(gone).absolute("kernel") == f"/proc/{gone}/cwd/kernel"
