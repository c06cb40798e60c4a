"""A real domain through hundreds of random steps: no point that can be restored ever lies.

    NBDBACKUP_MODEL_SEED=7 NBDBACKUP_MODEL_STEPS=300 pytest tests/system/test_model.py
    NBDBACKUP_MODEL_LOG=FILE pytest tests/system/test_model.py

The first plays other seeds (several with commas between), the second the steps of a log, as a
failure prints it; lines may be taken out of it to find the shortest history that still fails.
"""

import logging
import os
from pathlib import Path

import pytest

from tests.lib import model_play

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = os.environ.get("NBDBACKUP_MODEL_SEED", "1,2").split(",")
STEPS = int(os.environ.get("NBDBACKUP_MODEL_STEPS", "60"))
LOG = os.environ.get("NBDBACKUP_MODEL_LOG", "")


@pytest.mark.parametrize("seed", SEEDS if not LOG else [LOG])
def test_random_history(seed: str, tmp_path: Path) -> None:
    with model_play.world_of(tmp_path) as world:
        if LOG:
            steps = iter(model_play.logged_steps(Path(LOG)))
        else:
            steps = model_play.random_steps(world, seed, STEPS)
        model_play.play(world, steps)
        log.info("%s\n%s", "\n".join(world.log), model_play.report(world))
