"""W-1: a domain that has a channel for an agent, and none that answers, is not saved in silence."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lib.scene import WARNED, Scene, scene

pytestmark = pytest.mark.system
DOMAIN = 20


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path) -> Iterator[Scene]:
    """A guest with a channel, and nobody at its end."""
    options = GuestOptions(has_agent=True, uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, "silent", (DiskSpec(size=4 * MIB),), options) as here:
        yield here


def test_an_agent_that_is_gone(here: Scene) -> None:
    (warning,) = here.save(code=WARNED).warnings
    assert warning == (
        "not frozen: no guest agent is connected; start the agent in the guest, or do without: "
        "freeze.policy 'never' ('backup --freeze never')"
    )
    assert "not frozen" in here.refuse("--strict", code=DOMAIN)
    refused = here.refuse("--freeze", "require", code=DOMAIN)
    assert refused == (
        "nbdbackupctl: domain silent can't be frozen: no guest agent is connected; start the agent "
        "in the guest, or set freeze.policy to 'auto' ('backup --freeze auto')"
    )
    assert here.save("--freeze", "never", "--strict").warnings == []
    assert here.save("--pause", "--strict").warnings == []


def test_no_channel_for_an_agent(lab: DaemonLab, tmp_path: Path) -> None:
    """Nothing in the guest can be started then: the domain lacks something."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, "mute", (DiskSpec(size=4 * MIB),), options) as here:
        assert here.save("--strict").warnings == []
        refused = here.refuse("--freeze", "require", code=DOMAIN)
    assert refused == (
        "nbdbackupctl: domain mute can't be frozen: it has no guest agent channel; give the domain "
        "a channel org.qemu.guest_agent.0, its guest the agent, or set freeze.policy "
        "to 'auto' ('backup --freeze auto')"
    )
