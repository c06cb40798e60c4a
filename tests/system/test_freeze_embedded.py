"""An embedded libvirt sees the guest's agent a moment after it was opened; we wait for it."""

from pathlib import Path

import pytest

from tests.lab.agent_guest import agent_guest, make_ext4
from tests.lab.disks import DiskSpec
from tests.lab.embed import EmbeddedLab
from tests.lib.ctl import Ctl

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_an_embedded_libvirt_freezes_too(tmp_path: Path) -> None:
    with EmbeddedLab() as lab:
        linux = agent_guest(lab, disks=[DiskSpec(path=make_ext4(lab.images / "data.qcow2"))])
        linux.start()
        ctl = Ctl(lab.uri, lab.directory / "ctl")
        for freeze in ("require", "auto"):
            report = ctl.backup(linux.guest.name, tmp_path / "set", "--freeze", freeze)
            assert report["point"]["consistency"] == "filesystem"
        assert linux.freeze_log() == ["freeze", "thaw"] * 2
        assert not linux.is_frozen()
