"""What is said of a job whose QEMU has gone, when libvirt can't even read the job any more."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdbackupd.errors import DomainError, NbdbackupError, NbdError
from nbdbackupd.source import running, scratch
from nbdbackupd.virt import jobs


@pytest.mark.parametrize("is_ending", [True, False])
def test_the_end_of_the_domain_is_the_cause(
    is_ending: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """W-13, where libvirt 9.0 was seen to say "Unable to read from monitor" for a moment."""
    said: list[NbdbackupError] = []
    request: Any = SimpleNamespace(
        domain=SimpleNamespace(name="vm1", connection=SimpleNamespace(is_embedded=False)),
        runtime_dir=tmp_path / "vm1",
        on_trouble=said.append,
    )
    guard: Any = SimpleNamespace(kept=SimpleNamespace(wait_closed=lambda _: True), is_settled=False)

    def unreadable(_: object) -> None:
        raise DomainError("can't read its job: Unable to read from monitor")

    monkeypatch.setattr(jobs, "active_job", unreadable)
    monkeypatch.setattr(scratch, "is_ending", lambda _: is_ending)
    with caplog.at_level(logging.WARNING):
        running._JobEnd(request, guard)(NbdError, NbdError("the NBD server went away"), None)
    if is_ending:
        (error,) = said
        assert error.message.startswith("domain vm1 ended during the backup")
        assert caplog.messages == []
        assert guard.is_settled
    else:
        assert said == []
        assert "Unable to read from monitor" in caplog.text
        assert not guard.is_settled
