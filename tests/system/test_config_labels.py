"""Labels in a real domain's XML, set as the manual tells, choose files of the configuration."""

import json
import re
import shlex
import uuid
from pathlib import Path

import pytest

from nbdbackupd.config import manpage
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lib.scene import Scene, scene

pytestmark = pytest.mark.system

GOLD = "match:\n  metadata:\n    tier: gold\nstrict: yes\n"
OTHER = "match:\n  metadata:\n    '{urn:other}owner/team@name': 'a*'\nthreshold: 3M\n"
DISK = DiskSpec(target="vda", size=MIB)


def applied(here: Scene, directory: Path, name: str) -> set[str]:
    """The files that apply, by stem."""
    found = json.loads(here.ctl("config", "show", name, "--config-dir", directory, "--json").stdout)
    assert found["domain"] == here.guest.name
    by_path = {each["path"]: each["value"] for each in found["settings"]}
    stems = {Path(each).stem for each in found["files"]}
    assert by_path["strict"] == ("gold" in stems)
    assert by_path["threshold"] == (3 * MIB if "other" in stems else None)
    return stems


def test_labels_of_a_running_domain_and_of_its_definition(lab: DaemonLab, tmp_path: Path) -> None:
    directory = tmp_path / "etc"
    (directory / "domains.d").mkdir(parents=True)
    (directory / "domains.d/gold.yaml").write_text(GOLD)
    (directory / "domains.d/other.yaml").write_text(OTHER)
    (told,) = re.findall(r"^    virsh (metadata .*?\\\n.*?)$", manpage.LABELS, re.MULTILINE)
    words = shlex.split(told.replace("\\\n", ""))
    assert words[:2] == ["metadata", "vm1"]
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, "vm1", [DISK], options) as here:
        assert applied(here, directory, "vm1") == set()
        lab.virsh(*words)
        assert applied(here, directory, "vm1") == {"gold"}
        assert applied(here, directory, str(options.uuid)) == {"gold"}
        foreign = "<owner><team name='abc'/></owner>"
        head = ["metadata", "vm1", "--uri", "urn:other", "--key", "o"]
        lab.virsh(*head, "--config", "--set", foreign)
        assert applied(here, directory, "vm1") == {"gold", "other"}
        # what runs counts before what is defined
        lab.virsh(*head, "--live", "--set", foreign.replace("abc", "xyz"))
        assert applied(here, directory, "vm1") == {"gold"}
        here.guest.stop()
        assert applied(here, directory, "vm1") == {"gold", "other"}
