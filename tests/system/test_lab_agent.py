"""The lab's Linux guest: agent, file system, freeze."""

import pytest

from tests.lab.agent_guest import agent_guest, make_ext4
from tests.lab.base import Lab
from tests.lab.command import LabError
from tests.lab.daemon import DaemonLab
from tests.lab.disks import DiskSpec
from tests.lab.embed import EmbeddedLab

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.mark.parametrize("kind", [EmbeddedLab, DaemonLab])
def test_freeze_is_real(kind: type[Lab]) -> None:
    with kind() as lab:
        image = make_ext4(lab.images / "data.qcow2")
        linux = agent_guest(lab, disks=[DiskSpec(path=image)])
        linux.start()
        linux.exec("echo hello >/mnt/vda/file && sync")
        assert linux.exec("cat /mnt/vda/file") == "hello\n"
        assert linux.agent("guest-fsfreeze-freeze") == 1
        assert linux.is_frozen()
        with pytest.raises(LabError):  # the agent refuses it while frozen
            linux.exec("true")
        assert linux.agent("guest-fsfreeze-thaw") == 1
        assert not linux.is_frozen()
        assert linux.freeze_log() == ["freeze", "thaw"]


def test_failing_freeze_hook() -> None:
    with EmbeddedLab() as lab:
        image = make_ext4(lab.images / "data.qcow2")
        linux = agent_guest(lab, disks=[DiskSpec(path=image)])
        linux.start()
        linux.set_freeze_hook("exit 1")
        with pytest.raises(LabError, match="hook"):
            linux.agent("guest-fsfreeze-freeze")
