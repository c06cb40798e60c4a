"""Histories that the model test found, reduced: what was wrong once stays right."""

from pathlib import Path

import pytest

from tests.lib import model_play
from tests.lib.model_kinds import Step

pytestmark = pytest.mark.system

KILLED = (
    '{"into": "packed", "level": "auto", "after": 0, "term": false, "fault": "KILL+@os-rename#4"}'
)
FOUND = {
    # libvirt can't merge bitmaps of different sizes, and then tells of no disk
    "an overlay that has grown": """
        ["start", {}]
        ["backup", {"into": "plain", "level": "auto"}]
        ["snapshot", {"target": "vda"}]
        ["grow", {"target": "vda", "by": 65536}]
        ["write", {"ops": [["data", "vda", 0, 65536, 1], ["data", "vdb", 65536, 4096, 2]]}]
        ["backup", {"into": "plain", "level": "inc"}]
        ["write", {"ops": [["data", "vda", 8388608, 65536, 3], ["zero", "vdb", 0, 65536, 0]]}]
        ["backup", {"into": "plain", "level": "inc"}]
        ["stop", {}]
        ["backup", {"into": "plain", "level": "inc"}]
    """,
    # a first run that died while it published is no set of somebody else
    "a full that was killed between its renames": """
        ["start", {}]
        ["backup-killed", KILLED]
        ["backup", {"into": "packed", "level": "auto"}]
    """.replace("KILLED", KILLED),
    # a base that was redefined for one disk has a bitmap on the other one, too
    "a disk that has grown while libvirt forgot the checkpoint": """
        ["start", {}]
        ["backup", {"into": "plain", "level": "auto"}]
        ["lose-metadata", {}]
        ["grow", {"target": "vda", "by": 65536}]
        ["backup", {"into": "plain", "level": "auto"}]
        ["backup", {"into": "plain", "level": "diff"}]
    """,
    # bitmaps of one checkpoint have one name in all images
    "an image that was copied over that of another disk": """
        ["start", {}]
        ["write", {"ops": [["data", "vda", 0, 65536, 1], ["data", "vdb", 0, 65536, 2]]}]
        ["stop", {}]
        ["backup", {"into": "plain", "level": "auto"}]
        ["swap-for-other", {"target": "vda", "in_place": true}]
        ["backup", {"into": "plain", "level": "inc"}]
    """,
}


@pytest.mark.parametrize("history", FOUND.values(), ids=FOUND)
def test_history(history: str, tmp_path: Path) -> None:
    steps = [Step.parse(line) for line in history.splitlines() if "[" in line]
    with model_play.world_of(tmp_path) as world:
        model_play.play(world, steps)
        assert not [line for line in world.log if "not possible" in line]
